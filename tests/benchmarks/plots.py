"""The plots of the documentation, as SVG, each for light and for dark pages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Text has a contrast of 4.5 at least to the page; blue and orange differ to every kind of eye.
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {
        "text": "#24292f",
        "line": "#6e7781",
        "fill": "#8a949f",
        "blue": "#0a66b0",
        "orange": "#b34700",
        "green": "#00745a",
    },
    "dark": {
        "text": "#d6dbe1",
        "line": "#8b949e",
        "fill": "#66707c",
        "blue": "#62b5f5",
        "orange": "#f0a04b",
        "green": "#4fc3a1",
    },
}
_WIDTH = 7.3  # in, which are 700 px of a page

Draw = Callable[[Figure, Sequence[Mapping[str, Any]], Mapping[str, str]], None]


def _style(theme: Mapping[str, str]) -> dict[str, Any]:
    texts = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    lines = ("axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(texts, theme["text"]),
        **dict.fromkeys(lines, theme["line"]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "font.size": 10.0,
        "legend.frameon": False,
        "svg.hashsalt": "kontext-async",  # the same ids in every run
    }


def _cpu(figure: Figure, rows: Sequence[Mapping[str, Any]], theme: Mapping[str, str]) -> None:
    """Bars of the ratios of each client, for waits that end at their first poll."""
    concurrencies = dict.fromkeys(row["concurrency"] for row in rows)
    figure.set_size_inches(_WIDTH, 2.9)
    axes = figure.subplots(1, len(concurrencies), sharey=True, squeeze=False)[0]
    for ax, concurrency in zip(axes, concurrencies, strict=True):
        shown = [row for row in rows if (row["polls"], row["concurrency"]) == (1, concurrency)]
        shown.reverse()
        is_ours = [row["client"].startswith("kontext-async") for row in shown]
        bars = ax.barh(
            [row["client"].replace(", ", ",\n") for row in shown],
            [row["ratio"] for row in shown],
            color=[theme["blue"] if ours else theme["fill"] for ours in is_ours],
        )
        ax.bar_label(bars, fmt="%.2f", padding=4)
        ax.margins(x=0.18)
        ax.axvline(1, color=theme["line"], linewidth=0.8, linestyle=":")
        ax.set_title(f"{concurrency} at a time" if concurrency > 1 else "one at a time")
    figure.supxlabel("CPU time of a wait that ends at its first poll, bare aiohttp = 1", size=10)


def _seconds(figure: Figure, rows: Sequence[Mapping[str, Any]], theme: Mapping[str, str]) -> None:
    """Answered and refused requests of each second, for each client."""
    figure.set_size_inches(_WIDTH, 4.6)
    axes: Sequence[Axes] = figure.subplots(len(rows), 1, sharex=True)
    for ax, row in zip(axes, rows, strict=True):
        seconds = range(len(row["answered"]))
        settings: Any = {"width": 0.9, "align": "edge"}
        ax.bar(seconds, row["answered"], color=theme["blue"], label="answered", **settings)
        ax.bar(
            seconds,
            row["refused"],
            bottom=row["answered"],
            color=theme["orange"],
            label="refused with 429",
            **settings,
        )
        ax.axhline(row["limit"], color=theme["text"], linewidth=1, ls=":", label="the limit")
        answered, refused = sum(row["answered"]), sum(row["refused"])
        ax.set_title(f"{row['way']}: {answered:,} answered, {refused:,} refused")
        ax.set(ylabel="requests a second", xlim=(0, len(seconds)))
    axes[-1].set_xlabel("second")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, loc="outside upper right")


def _ages(figure: Figure, rows: Sequence[Mapping[str, Any]], theme: Mapping[str, str]) -> None:
    """The ages at which each schedule polls, below those at which tasks end."""
    colours = {"learned": "blue", "optimum": "green", "exponential": "orange"}
    figure.set_size_inches(_WIDTH, 6.2)
    axes: Sequence[Axes] = figure.subplots(len(rows), 1, sharex=True)
    for ax, row in zip(axes, rows, strict=True):
        width, top = row["until"] / len(row["ended"]), max(row["ended"])
        edges = [k * width for k in range(len(row["ended"]) + 1)]
        ax.stairs(row["ended"], edges, fill=True, color=theme["fill"])
        for line, (name, ages) in enumerate(row["polls"].items(), start=1):
            y, colour = -0.17 * line * top, theme[colours[name]]
            ax.plot(ages, [y] * len(ages), "|", color=colour, markersize=11, mew=1.8)
            ax.text(-0.8, y, name, ha="right", va="center", color=colour)
        ax.set(xlim=(0, row["until"]), ylim=(-0.64 * top, 1.05 * top), yticks=[])
        ax.axhline(0, color=theme["line"], linewidth=0.8)
        ax.set_title(f"{row['shape']}: {row['tasks']:,} tasks")
        ax.spines.left.set_visible(False)
    axes[-1].set_xlabel("age in seconds at which tasks ended (grey) and are polled (marks)")


# By the names of their files, which benchmark they show.
PLOTS: Mapping[str, tuple[str, Draw]] = {
    "performance-cpu": ("cpu", _cpu),
    "performance-discovery": ("seconds", _seconds),
    "learned-schedule": ("ages", _ages),
}


@contextlib.contextmanager
def _figure(path: Path, theme: Mapping[str, str]) -> Iterator[Figure]:
    with mpl.rc_context(_style(theme)):
        figure = Figure(layout="constrained")
        yield figure
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Draw all plots from the results of a run."""
    for name, (benchmark, make) in PLOTS.items():
        for theme, colours in THEMES.items():
            with _figure(folder / f"{name}-{theme}.svg", colours) as figure:
                make(figure, results[benchmark], colours)
