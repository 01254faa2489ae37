"""Progress of a batch: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from typing import NoReturn

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from kontext_async.cli.output import (
    code_of,
    error_console,
    fail,
    is_logging_polls,
    is_one_terminal,
    message_of,
    plain,
)
from kontext_async.cli.tally import Part, Tally
from kontext_async.client import KontextClient
from kontext_async.errors import KontextError

# Seconds between two drawings of the line on a terminal, and between two lines elsewhere.
_DRAWING_INTERVAL = 0.1
_LINE_INTERVAL = 10.0

# Columns of a terminal that the spinner, the bar and the spaces take.
_BAR_WIDTH = 10
_BESIDE_TEXT = _BAR_WIDTH + 4

_MAX_KINDS_SHOWN = 10
_MAX_IDS_SHOWN = 3
_ROW_HEIGHT = 2  # lines of a result on a terminal of 80 columns


class Display:
    """The progress of a batch on standard error."""

    def __init__(self, tally: Tally, client: KontextClient) -> None:
        self._tally = tally
        self._client = client
        self._console = error_console()
        self._has_results = is_one_terminal()
        # A bar that is drawn again would cut through the lines of a log.
        self._is_live = (
            self._console.is_terminal
            and not self._console.is_dumb_terminal
            and not is_logging_polls()
        )
        self._loop = asyncio.get_running_loop()
        self._bar = Progress(
            SpinnerColumn(),
            # Green, as red is for failures, and dim, which is seen on light and on dark.
            BarColumn(_BAR_WIDTH, style="dim", complete_style="green"),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,  # a timer of the loop redraws it: a thread would delay Ctrl-C
            transient=True,
            redirect_stdout=False,  # results belong to the pipe, not to this console
            redirect_stderr=False,
            disable=not self._is_live or self._console.quiet,
        )
        self._row = self._bar.add_task("")
        self._has_trouble = False
        self._next_line = 0.0
        self._kinds: Counter[str] = Counter()
        self._firsts: dict[str, KontextError] = {}
        self._ids: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def shown(self) -> Generator[None]:
        """Show the progress until the block ends, and then the errors by their kind."""
        self._began = self._loop.time()
        self._next_line = self._began + _LINE_INTERVAL
        self._say(f"Waiting for {self._subject()}")
        self._draw(self._parts(self._began))
        self._next = self._loop.call_later(_DRAWING_INTERVAL, self._tick)
        try:
            with self._bar:
                yield
        finally:
            self._next.cancel()
        self._say_repeated_errors()
        self._say(f"{self._tally.counts()} in {self._loop.time() - self._began:.1f} s")

    def _subject(self) -> str:
        if not self._tally.is_complete:
            return "the tasks on standard input"
        return "1 task" if self._tally.total == 1 else f"{self._tally.total:,} tasks"

    def _tick(self) -> None:
        self._next = self._loop.call_later(_DRAWING_INTERVAL, self._tick)
        now = self._loop.time()
        parts = self._parts(now)
        if self._is_live:
            self._draw(parts)
            return
        began, self._has_trouble = (
            self._tally.trouble is not None and not self._has_trouble,
            self._tally.trouble is not None,
        )
        if began or now >= self._next_line:
            self._next_line = now + _LINE_INTERVAL
            self._say(_joined(parts))

    def _draw(self, parts: list[Part]) -> None:
        """Draw the bar and the text beside it."""
        self._bar.update(
            self._row,
            description=self._fitting(parts),
            completed=self._tally.finished - self._tally.to_save,
            total=self._tally.total if self._tally.is_complete else None,
            refresh=True,
        )

    def _parts(self, now: float) -> list[Part]:
        of = f" of {self._tally.total:,}" if self._tally.is_complete else ""
        finished = Part(f"{self._tally.finished:,}{of}")
        return [finished, *self._waiting_for(), *self._tally.progress(now - self._began)]

    def _waiting_for(self) -> list[Part]:
        """Return why nothing comes, if the last poll failed or the client pauses."""
        trouble, pause = self._tally.trouble, self._client.stats.pause
        parts = [] if trouble is None else [Part(str(trouble.for_task(None)))]
        if pause:
            parts.append(Part(f"paused for {pause:.0f} s"))
        elif trouble is not None:
            parts.append(Part("trying again"))
        return parts

    def _fitting(self, parts: list[Part]) -> str:
        """Return the text of the parts that the terminal is wide enough for, by their ranks.

        Parts of rank 0 are cut where the others would be left out.
        """
        room = self._console.width - _BESIDE_TEXT
        shown: dict[Part, str] = {}
        for part in sorted(parts, key=lambda part: part.rank):
            text = part.text
            if len(text) > room and not part.rank:
                text = f"{text[: room - 1]}…" if room > 1 else ""
            if text and len(text) <= room:
                shown[part] = text
                room -= len(text) + len(", ")
        return ", ".join(shown[part] for part in parts if part in shown)

    def _say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(plain(text), soft_wrap=not self._console.is_terminal)

    def show_problem(self, text: str) -> None:
        """Print a place of the input that holds no id."""
        if self._tally.unreadable <= _MAX_KINDS_SHOWN:
            self._say(f"kontext: {text}")

    def fail(self, problem: str) -> NoReturn:
        """Exit because of wrong usage, without the bar."""
        self._bar.stop()
        fail(problem)

    def show_error(self, error: KontextError) -> None:
        """Print the first error of each kind; the others are counted at the end.

        A terminal that gets the results too has the errors there, and all are counted at the end
        if it is not high enough for the results.
        """
        kind = _kind(error)
        self._kinds[kind] += 1
        if self._has_results:
            self._firsts.setdefault(kind, error)
            return
        ids = self._ids.setdefault(kind, [])
        if self._kinds[kind] == 1:
            if len(self._kinds) <= _MAX_KINDS_SHOWN:
                self._say(str(error))
            elif len(self._kinds) == _MAX_KINDS_SHOWN + 1:
                self._say("More errors are in the results")
        elif error.task_id and len(ids) < _MAX_IDS_SHOWN:
            ids.append(error.task_id)

    def _say_repeated_errors(self) -> None:
        if (more := self._tally.unreadable - _MAX_KINDS_SHOWN) > 0:
            self._say(f"kontext: {more:,} more lines hold no id")
        if self._has_results:
            self._say_errors_out_of_sight()
            return
        for kind, count in self._kinds.most_common(_MAX_KINDS_SHOWN):
            if count > 1:
                shown = self._ids[kind]
                others = " …" if count - 1 > len(shown) else ""
                self._say(f"{count - 1:,} more with {kind}: {', '.join(shown)}{others}")

    def _say_errors_out_of_sight(self) -> None:
        """Count all errors by their kind, where the results have scrolled off."""
        if self._tally.finished * _ROW_HEIGHT <= self._console.height:
            return
        shown = self._kinds.most_common(_MAX_KINDS_SHOWN)
        for kind, count in shown:
            self._say(f"{count:,} with {kind}: {message_of(self._firsts[kind].for_task(None))}")
        if more := self._kinds.total() - sum(count for _, count in shown):
            self._say(f"{more:,} with other errors")

    @contextlib.contextmanager
    def bar_hidden(self) -> Generator[None]:
        """Hide the bar while standard output is written to the same terminal."""
        is_drawn = self._is_live and self._has_results
        if is_drawn:
            self._bar.stop()
        yield
        if is_drawn:
            self._bar.start()


@contextlib.contextmanager
def thumbnails_shown() -> Generator[Callable[[int, int], None]]:
    """Show how many thumbnails are made: live on a terminal, a line at times elsewhere."""
    console = error_console()
    next_line = time.monotonic() + _LINE_INTERVAL
    with console.status("writing the report") as status:

        def show(made: int, total: int) -> None:
            nonlocal next_line
            text = f"thumbnails {made:,} of {total:,}"
            status.update(text)
            if not console.is_terminal and time.monotonic() >= next_line:
                next_line = time.monotonic() + _LINE_INTERVAL
                console.print(text)

        yield show


def _joined(parts: Iterable[Part]) -> str:
    return ", ".join(part.text for part in parts)


def _kind(error: KontextError) -> str:
    """Return the name of a group of alike errors."""
    code = code_of(error)
    return type(error).__name__ + ("" if code is None else f" {code}")
