"""The surroundings of every test.

An ``async def test_…`` needs no marker and runs on a real event loop. Marked
``@pytest.mark.virtual_time`` (or a whole module: ``pytestmark = pytest.mark.virtual_time``) it and
its async fixtures run on a `virtual_time.VirtualTimeLoop`: ``asyncio.sleep(600)`` takes no time,
``asyncio.get_running_loop().time()`` starts at 0, and loopback servers in the same process work.
A property test is a plain function that runs a coroutine itself::

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())

After every async test, and after its fixtures, no task may be left. Helper modules beside this
file are imported by name: ``from virtual_time import VirtualTimeLoop``.

aioresponses works as it is documented; the patches below mend it for the aiohttp of today.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import os
import signal
import time
from unittest.mock import Mock

import aiohttp
import aioresponses.core
import hypothesis
import pytest
from aiohttp.client_proto import ResponseHandler
from client_world import make_client
from postgres import dsn, postgres  # noqa: F401  # fixtures
from virtual_time import VirtualTimeLoop

from kontext_async.simulator import Simulator
from kontext_async.transport import pooled

# A zone that is not UTC, written so that it needs no zone database.
os.environ["TZ"] = "NPT-5:45"
if hasattr(time, "tzset"):
    time.tzset()

# A script's background job ignores Ctrl-C, and so would the processes that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile(
    "kontext", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("kontext")


def pytest_asyncio_loop_factories(config, item):
    """Choose the event loop of a test by its marker."""
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualTimeLoop}
    return {"real": asyncio.new_event_loop}


class _MockedResponse(aiohttp.ClientResponse):
    """Takes aioresponses' arguments, which lack what aiohttp 3.14 began to ask for."""

    def __init__(self, *args, stream_writer=None, **kwargs):
        super().__init__(*args, stream_writer=stream_writer or Mock(output_size=0), **kwargs)


def _stream_reader(loop=None):
    """A reader whose protocol has a parser to pause, as bodies over 128 KiB make it do."""
    protocol = ResponseHandler(loop=loop)
    protocol._parser = Mock()
    return aiohttp.StreamReader(protocol, limit=2**16, loop=loop)


aioresponses.core.ClientResponse = _MockedResponse
aioresponses.core.stream_reader_factory = _stream_reader


@pytest.fixture
async def simulator():
    async with Simulator() as simulator:
        yield simulator


@pytest.fixture
async def client(simulator):
    async with make_client(simulator) as client:
        yield client


@pytest.fixture
async def _nothing_left_running():
    yield
    for _ in range(20):  # tasks that are ending need a few turns to end
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"left running: {left}"


@pytest.fixture(autouse=True)
def _async_tests_end_clean(request):
    """Set up before a test's own fixtures, so that it looks after they are gone."""
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("_nothing_left_running")


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path_factory):
    """The folder of the command's memory: one of each test's own, which is not there yet."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(_numbers)}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "kontext-async"


_numbers = itertools.count()


@pytest.fixture(params=["pooled", "session"])
def fetcher(request, monkeypatch):
    """Run a test with either way in which a client without a session of the user's may ask."""
    if request.param == "session":
        monkeypatch.setattr(pooled, "_has_all", lambda: False)
    return request.param


@pytest.fixture
def traced_paths(monkeypatch):
    """The paths of requests, as a tool sees them that adds a trace to each session made."""
    seen = []
    trace = aiohttp.TraceConfig()

    async def note(session, context, params):
        seen.append(params.url.path)

    trace.on_request_end.append(note)
    traced = functools.partialmethod(aiohttp.ClientSession.__init__, trace_configs=[trace])
    monkeypatch.setattr(aiohttp.ClientSession, "__init__", traced)
    return seen
