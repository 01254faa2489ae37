"""The aims of the client's performance, and whether a run of the benchmarks reaches them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import scale

Results = Mapping[str, Any]
# What is aimed at, what was measured, and of each measurement whether it is within bounds.
Aim = tuple[str, str, Sequence[bool]]


def _aim(
    aim: str, shown: str, *values: float, least: float = -math.inf, most: float = math.inf
) -> Aim:
    return aim, shown.format(*values), [least <= value <= most for value in values]


def _where(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if wanted.items() <= row.items()]


def _percent(share: float) -> str:
    return f"{share * 100:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def _waits(results: Results) -> Iterator[Aim]:
    def ratios(client: str, polls: int) -> list[float]:
        return [row["ratio"] for row in _where(results["cpu"], client=client, polls=polls)]

    first, shown = "a wait that ends at its first poll", "{:.2f} one at a time, {:.2f} with 64"
    one, three = ratios("kontext-async", 1), ratios("kontext-async", 3)
    session = ratios("kontext-async, your session", 1)
    yield _aim(f"{first}: at most 1.3 times the CPU of a bare aiohttp loop", shown, *one, most=1.3)
    yield _aim("the same: no more than the bare loop", shown, *one, most=1)
    yield _aim("a wait of three polls: no more than the bare loop", shown, *three, most=1)
    yield _aim(f"{first}, with a session of yours: at most 1.3 times", shown, *session, most=1.3)


def _polls(results: Results) -> Iterator[Aim]:
    for arrivals, tasks, most in (
        ("one a second", "tasks begun one a second", 1.1),
        ("all at once", "2,000 tasks begun at once, with a fresh model", 1.25),
    ):
        rows = _where(results["schedule"], arrivals=arrivals, schedule="learned")
        ratios = [row["ratio"] for row in rows if not row["shape"].startswith("shift")]
        aim = f"polls of {tasks}: at most {most} times the cost of the best schedule"
        yield _aim(aim, f"{min(ratios):.2f} to {max(ratios):.2f} times", *ratios, most=most)


def _limits(results: Results) -> Iterator[Aim]:
    unknown = _where(results["discovery"], way="kontext-async")
    for period in ("1 s", "10 s", "60 s"):
        rows = [row for row in unknown if row["limit"].endswith(f" {period}")]
        used, refused = ([row[part] for row in rows] for part in ("answered", "refused"))
        least, most = rows[0]["bars"]
        bars = f"at least {_percent(least)} of it used, at most {_percent(most)} refused"
        yield (
            f"an unknown limit per {period}: {bars}",
            f"{_percent(min(used))} to {_percent(max(used))}, at most {_percent(max(refused))}",
            [u >= least and r <= most for u, r in zip(used, refused, strict=True)],
        )
    known = _where(results["discovery"], way="kontext-async, told")
    refusals = sum(row["refusals"] for row in known)
    yield _aim("a known limit: nothing refused", "{} requests", refusals, most=0)


def _many(results: Results) -> Iterator[Aim]:
    [ours] = _where(results["scale"], tasks=100_000, way="kontext-async")
    [plain] = _where(results["scale"], tasks=100_000, way="a plain loop each")
    few, *_, many = map(scale.us_per_poll, results["wide"])
    ratio, soak = ours["polled_s"] / plain["polled_s"], results["soak"]
    kilobytes, longest = ours["bytes_per_task"] / 1e3, ours["longest_callback_s"] * 1e3
    yield _aim("memory of a waiting task: at most 3 KB", "{:.1f} KB", kilobytes, most=3)
    yield _aim(
        "100,000 tasks: each polled once in at most 1.2 times the time of plain loops",
        f"{{:.2f}} times, in {ours['polled_s']:.1f} s",
        ratio,
        most=1.2,
    )
    yield _aim("the same: cancelled in 5 s", "{:.1f} s", ours["cancelled_s"], most=5)
    yield _aim(
        "300,000 tasks: a poll takes no more CPU than with 30,000",
        "{:.2f} times",
        many / few,
        most=1,
    )
    yield _aim(
        "no callback longer than 50 ms, garbage collection aside", "{:.0f} ms", longest, most=50
    )
    right = min(soak["right"], soak["accounted_for"])
    aim = f"{soak['tasks']:,} tasks on a bad day: each with one outcome, the right one"
    yield _aim(aim, "{:,}", right, least=soak["tasks"])


def _disk(results: Results) -> Iterator[Aim]:
    saving = _where(results["saving"], way="kontext-async")
    cpu, speed = ([row[part]["ratio"] for row in saving] for part in ("cpu", "speed"))
    times = "{:.2f} times on all cores, {:.2f} on one"
    bare = "saving images: at most 1.3 times the CPU of a bare loop with `fsync`"
    yield _aim(bare, times, *cpu, most=1.3)
    yield _aim("the same: no fewer images a second", times, *speed, least=1)
    for aim, recorded in (
        ("a ledger: at most 50 µs for a task", "outcomes"),
        ("the same with its image", "outcomes and images"),
    ):
        added = [row["us_per_task"] for row in _where(results["ledger"], recorded=recorded)]
        yield _aim(aim, "{:.0f} µs on all cores, {:.0f} on one", *added, most=50)


def _verdict(within: Sequence[bool]) -> str:
    return "reached" if all(within) else "**in part**" if any(within) else "**not reached**"


def table(results: Results) -> str:
    """Return the aims as a Markdown table."""
    lines = [
        f"| {aim} | {measured} | {_verdict(within)} |"
        for aims in (_waits, _polls, _limits, _many, _disk)
        for aim, measured, within in aims(results)
    ]
    return "\n".join(["| aim | measured | |", "|---|---|---|", *lines])
