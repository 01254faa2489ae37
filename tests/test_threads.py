"""Work in threads, which a cancellation waits for."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import threading
import weakref

import pytest

from kontext_async.results import threads as threads_module
from kontext_async.results.threads import Threads, run_in_thread, uncancellable


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


# Threads of its own


@contextlib.asynccontextmanager
async def all_ended():
    """Show that no thread is left of those that were started here."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()


@contextlib.asynccontextmanager
async def own_threads():
    """Yield threads, which are closed at the end."""
    async with all_ended():
        threads = Threads()
        try:
            yield threads
        finally:
            threads.close()


def handed_over(threads, work=lambda: None):
    """Hand work over; return a future of what it returned and the threads of work and end."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def in_thread():
        result = work()
        return functools.partial(end, result, threading.current_thread())

    def end(result, thread):
        future.set_result((result, thread, threading.current_thread()))

    threads.start(in_thread)
    return future


async def test_work_ends_on_the_event_loop():
    """The thread calls what the work returned by way of the event loop, and not itself."""
    async with own_threads() as threads:
        result, worked, ended = await handed_over(threads, lambda: 7)
        assert (result, ended) == (7, threading.current_thread())
        assert worked is not ended


async def test_an_idle_thread_takes_the_next_work():
    """Another is started only where all that there are have work."""
    async with own_threads() as threads:
        first = [(await handed_over(threads))[1] for _ in range(3)]
        both_work = threading.Barrier(2, timeout=10)
        busy = [handed_over(threads, both_work.wait) for _ in range(2)]
        both = {thread for _, thread, _ in await asyncio.gather(*busy)}
        assert len(set(first)) == 1
        assert both > set(first)


async def test_the_thread_that_ended_its_work_last_takes_the_next():
    """Whichever was started first."""
    async with own_threads() as threads:
        for order in ([0, 1, 2], [2, 0, 1]):
            go = [threading.Event() for _ in range(3)]
            busy = [handed_over(threads, functools.partial(event.wait, 10)) for event in go]
            for n in order:
                go[n].set()
                last = (await busy[n])[1]
            for _ in range(2):
                assert (await handed_over(threads))[1] is last


async def test_work_beyond_the_threads_waits_for_one(monkeypatch):
    """None is lost, and it is begun in order."""
    monkeypatch.setattr(threads_module, "_MOST", 1)
    async with own_threads() as threads:
        go, begun = threading.Event(), []
        busy = handed_over(threads, lambda: go.wait(10))
        waiting = [handed_over(threads, lambda n=n: begun.append(n)) for n in range(20)]
        go.set()
        used = {thread for _, thread, _ in await asyncio.gather(busy, *waiting)}
        assert len(used) == 1
        assert begun == list(range(20))


async def test_one_thread_is_enough_where_no_other_can_be_started(monkeypatch):
    """Without any, it is an error, and the next work is tried anew."""

    def refused(_):
        raise RuntimeError("can't start new thread")

    async with own_threads() as threads:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            with pytest.raises(RuntimeError, match="can't start"):
                handed_over(threads)
        go = threading.Event()
        first = handed_over(threads, lambda: go.wait(10))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            second = handed_over(threads)
        go.set()
        assert (await first)[1] is (await second)[1]


@pytest.mark.parametrize("most", [1, 8])
async def test_closing_lets_the_work_end(most, monkeypatch):
    """That is also the work which is started at the end of other work, or even later."""
    monkeypatch.setattr(threads_module, "_MOST", most)
    go = threading.Event()
    more = asyncio.get_running_loop().create_future()
    async with all_ended():
        threads = Threads()

        def worked():
            go.wait(10)
            return lambda: handed_over(threads, lambda: 7).add_done_callback(more.set_result)

        threads.start(worked)
        threads.close()
        go.set()
        assert (await more).result()[0] == 7
        assert (await handed_over(threads, lambda: 8))[0] == 8


async def test_an_idle_thread_keeps_nothing_of_its_work():
    """Images may be large, and the next may come late."""

    class Work:
        def __call__(self):
            return functools.partial(future.set_result, None)

    async with own_threads() as threads:
        future = asyncio.get_running_loop().create_future()
        work = Work()
        gone = weakref.ref(work)
        threads.start(work)
        del work
        await future
        for _ in range(100):  # until the thread has come to its next wait
            if gone() is not None:
                await asyncio.sleep(0.01)
        assert gone() is None


def test_a_loop_that_was_closed_is_not_called(monkeypatch):
    """Nobody waits for the work any longer, so the thread ends and says nothing."""
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    go = threading.Event()

    async def left_behind():
        threads = Threads()
        threads.start(lambda: go.wait(10) and print)

    before = set(threading.enumerate())
    asyncio.run(left_behind())
    [thread] = set(threading.enumerate()) - before
    go.set()
    thread.join(10)
    assert not thread.is_alive()
    assert failed == []
