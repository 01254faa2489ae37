"""How a batch stands, shown while it runs: a live bar on a terminal, plain lines elsewhere."""

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

_REFRESH = 0.1  # seconds between two pictures on a terminal
_REPORT = 10.0  # seconds between two lines elsewhere
_NAMED = 20  # errors that get a line of their own


class Display:
    """What people see of a batch, on standard error."""

    def __init__(self, tally: Tally, client: KontextClient) -> None:
        self._tally = tally
        self._client = client
        self._console = error_console()
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._interval = _REFRESH if self._live else _REPORT
        self._loop = asyncio.get_running_loop()
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,  # by a timer of the loop: no thread to outlive Ctrl-C
            transient=True,
            redirect_stdout=False,  # results belong to the pipe, not to this console
            redirect_stderr=False,
            disable=not self._live,
        )
        self._row = self._bar.add_task("", total=tally.total)

    @contextlib.contextmanager
    def shown(self) -> Generator[None]:
        """Show the batch until the block ends."""
        self._began = self._loop.time()
        tasks = "1 task" if self._tally.total == 1 else f"{self._tally.total} tasks"
        self.say(f"Waiting for {tasks}")
        self._next = self._loop.call_later(self._interval, self._tick)
        try:
            with self._bar:
                yield
        finally:
            self._next.cancel()
        self.say(f"{self._tally.counts()} in {self._loop.time() - self._began:.1f} s")

    def _tick(self) -> None:
        self._next = self._loop.call_later(self._interval, self._tick)
        state = self._tally.state(self._loop.time() - self._began)
        if pause := self._client.stats.pause:
            state += f", held back for {pause:.0f} s"
        if self._live:
            self._bar.update(self._row, description=state, completed=self._tally.over, refresh=True)
        else:
            self.say(state)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(plain(text), soft_wrap=True)

    def trouble(self, error: KontextError) -> None:
        """The error of a task that has just ended; of many, only the first get a line."""
        more = self._tally.troubles - _NAMED
        if more <= 0:
            self.say(str(error))
        elif more == 1:
            self.say("More did not succeed: the results have their errors")

    @contextlib.contextmanager
    def aside(self) -> Generator[None]:
        """Let standard output have the screen, where both are the same terminal."""
        shared = self._live and sys.stdout.isatty()
        if shared:
            self._bar.stop()
        yield
        if shared:
            self._bar.start()
