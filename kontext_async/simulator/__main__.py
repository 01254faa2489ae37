"""``python -m kontext_async.simulator``: a simulator in a process of its own.

It writes its base URL on a line and serves until it is ended with SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable, Sequence

from kontext_async.simulator import FixedWindow, Limit, Simulator, SlidingWindow, TokenBucket

__all__ = ["main"]


def _limit(make: Callable[[int, float], Limit]) -> Callable[[str], Limit]:
    def parse(text: str) -> Limit:
        count, _, other = text.partition("/")
        return make(int(count), float(other))

    parse.__name__ = "limit"  # argparse names it where the text is wrong
    return parse


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kontext_async.simulator")
    add = parser.add_argument
    add("--port", type=int, default=0, help="0: a free one")
    add("--duration", type=float, default=argparse.SUPPRESS, dest="durations", metavar="SECONDS")
    add("--failure-rate", type=float, default=0.0)
    add("--fault-rate", type=float, default=0.0)
    add("--latency", type=float, default=0.0, metavar="SECONDS")
    add("--auto-create", action="store_true", help="any id is a task")
    add("--image-bytes", type=int, default=0)
    add("--log-limit", type=int, default=0, help="requests remembered")
    add("--seed", type=int, default=0)
    limits = parser.add_mutually_exclusive_group()
    for name, kind, form in (
        ("--window", FixedWindow, "REQUESTS/SECONDS"),
        ("--sliding", SlidingWindow, "REQUESTS/SECONDS"),
        ("--bucket", TokenBucket, "CAPACITY/PER_SECOND"),
    ):
        limits.add_argument(name, type=_limit(kind), dest="rate_limit", metavar=form)
    return parser.parse_args(argv)


async def _serve(simulator: Simulator) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    async with simulator:
        print(simulator.base_url, flush=True)  # noqa: T201  # for the process that started it
        await ended.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Serve as the arguments say."""
    asyncio.run(_serve(Simulator(**vars(_arguments(argv)))))


if __name__ == "__main__":
    main()
