"""A simulator in a process of its own."""

from __future__ import annotations

import asyncio
import runpy
import signal
import sys

import aiohttp
import pytest

from kontext_async.simulator import FixedWindow, SlidingWindow, TokenBucket, __main__


async def started(*arguments):
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "kontext_async.simulator", *arguments],
        stdout=asyncio.subprocess.PIPE,
    )
    line = await process.stdout.readline()
    return process, line.decode().strip()


async def test_it_names_its_address_serves_and_ends_with_a_signal():
    process, base_url = await started("--auto-create", "--duration", "0")
    async with (
        aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as session,
        session.get(f"{base_url}/api/v1/flux/kontext/record-info?taskId=any") as response,
    ):
        assert (await response.json())["data"]["successFlag"] == 1
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0


async def test_the_same_within_this_process(capsys):
    """What the process does, where coverage sees it: one signal ends it."""
    task = asyncio.create_task(__main__._serve(__main__.Simulator()))
    while not capsys.readouterr().out.startswith("http://127.0.0.1:"):  # noqa: ASYNC110  # it has no event to share
        await asyncio.sleep(0.001)
    signal.raise_signal(signal.SIGTERM)
    await task


def test_the_module_is_a_program(monkeypatch):
    started = []
    monkeypatch.setattr(asyncio, "run", lambda coroutine: (started.append(1), coroutine.close()))
    monkeypatch.setattr(sys, "argv", ["simulator"])
    runpy.run_path(__main__.__file__, run_name="__main__")
    assert started


def test_main_serves_as_its_arguments_say(monkeypatch):
    served = []

    async def serve(simulator):
        served.append(simulator)

    monkeypatch.setattr(__main__, "_serve", serve)
    __main__.main(["--port", "0", "--window", "20/10", "--seed", "4", "--latency", "0.5"])
    (simulator,) = served
    assert simulator._limit.max_requests == 20


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ([], None),
        (["--window", "20/10"], FixedWindow(20, 10.0)),
        (["--sliding", "5/0.5"], SlidingWindow(5, 0.5)),
        (["--bucket", "20/2"], TokenBucket(20, 2.0)),
    ],
)
def test_limits_are_written_with_a_slash(arguments, limit):
    assert repr(__main__._arguments(arguments).rate_limit) == repr(limit)


@pytest.mark.parametrize("text", ["20", "a/b", "20/", "0/1"])
def test_a_limit_that_is_none_is_a_usage_error(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__._arguments(["--window", text])
    assert "invalid limit" in capsys.readouterr().err
