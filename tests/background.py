"""A simulator on its own event loop in a thread, for code that runs an event loop itself."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from kontext_async.simulator import Simulator


@contextlib.contextmanager
def serving(**options):
    """Serve a simulator while the block runs. The block's thread may add tasks to it."""
    with asyncio.Runner() as runner:
        simulator = Simulator(**options)
        runner.run(simulator.__aenter__())
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield simulator
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            runner.run(simulator.aclose())
