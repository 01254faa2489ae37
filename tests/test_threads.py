"""Work in threads, which a cancellation waits for."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from kontext_async.results.threads import run_in_thread, uncancellable


async def test_work_in_a_thread_returns_its_result_or_raises():
    """It acts like a direct call."""
    assert await run_in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await run_in_thread(divmod, 7, 0)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancellation_is_raised_when_the_thread_has_finished(times, fails, caplog):
    """This holds for several cancellations, and asyncio does not log the thread's own error."""
    loop = asyncio.get_running_loop()
    begun, go, ended = asyncio.Event(), threading.Event(), threading.Event()

    def work():
        loop.call_soon_threadsafe(begun.set)
        go.wait(10)
        ended.set()
        if fails:
            raise ValueError

    task = asyncio.create_task(run_in_thread(work))
    await begun.wait()
    for _ in range(times):
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
    go.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert ended.is_set()
    del task
    await asyncio.sleep(0.01)  # the thread lets go of what it raised
    gc.collect()
    assert caplog.text == ""


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_work_that_is_cancelled_itself_ends_the_wait(is_cancelled):
    """An executor cancels work that it has not begun when it is shut down."""
    work = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(uncancellable(work))
    await asyncio.sleep(0)
    if is_cancelled:
        waiting.cancel()
        await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
