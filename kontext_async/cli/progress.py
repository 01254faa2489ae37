"""Progress of a batch: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Generator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from kontext_async.cli.output import error_console, plain
from kontext_async.cli.tally import Tally
from kontext_async.client import KontextClient
from kontext_async.errors import KontextError

# Seconds between two drawings of the bar, and between two lines elsewhere.
_BAR_INTERVAL = 0.1
_LINE_INTERVAL = 10.0

_MAX_ERRORS_SHOWN = 20


class Display:
    """The progress of a batch on standard error."""

    def __init__(self, tally: Tally, client: KontextClient) -> None:
        self._tally = tally
        self._client = client
        self._console = error_console()
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._interval = _BAR_INTERVAL if self._is_live else _LINE_INTERVAL
        self._loop = asyncio.get_running_loop()
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,  # a timer of the loop redraws it: a thread would delay Ctrl-C
            transient=True,
            redirect_stdout=False,  # results belong to the pipe, not to this console
            redirect_stderr=False,
            disable=not self._is_live,
        )
        self._row = self._bar.add_task("", total=tally.total)

    @contextlib.contextmanager
    def shown(self) -> Generator[None]:
        """Show the progress until the block ends."""
        self._began = self._loop.time()
        tasks = "1 task" if self._tally.total == 1 else f"{self._tally.total} tasks"
        self._say(f"Waiting for {tasks}")
        self._next = self._loop.call_later(self._interval, self._tick)
        try:
            with self._bar:
                yield
        finally:
            self._next.cancel()
        self._say(f"{self._tally.counts()} in {self._loop.time() - self._began:.1f} s")

    def _tick(self) -> None:
        self._next = self._loop.call_later(self._interval, self._tick)
        progress = self._tally.progress(self._loop.time() - self._began)
        if pause := self._client.stats.pause:
            progress += f", paused for {pause:.0f} s"
        if self._is_live:
            self._bar.update(
                self._row, description=progress, completed=self._tally.finished, refresh=True
            )
        else:
            self._say(progress)

    def _say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(plain(text), soft_wrap=True)

    def show_error(self, error: KontextError) -> None:
        """Print the error of a task that the tally has just counted, unless there are many."""
        more = self._tally.unsuccessful - _MAX_ERRORS_SHOWN
        if more <= 0:
            self._say(str(error))
        elif more == 1:
            self._say("More errors are in the results")

    @contextlib.contextmanager
    def bar_hidden(self) -> Generator[None]:
        """Hide the bar while standard output is written to the same terminal."""
        is_shared = self._is_live and sys.stdout.isatty()
        if is_shared:
            self._bar.stop()
        yield
        if is_shared:
            self._bar.start()
