"""Virtual time for a client and a server in one thread."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from virtual_time import VirtualTimeLoop

T = TypeVar("T")


class _InProcessLoop(VirtualTimeLoop):
    """Does not linger before time jumps: what one end has written, the other can read at once."""

    def __init__(self) -> None:
        super().__init__()
        self._jumping._GRACE = 0.0


def run(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine, in virtual time from 0."""
    with asyncio.Runner(loop_factory=_InProcessLoop) as runner:
        return runner.run(work)
