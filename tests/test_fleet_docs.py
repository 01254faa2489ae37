"""The page about fleets: its walk and its programs run on a database of the tests' own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from background import serving
from command import COMMAND, environment

import kontext_async
from kontext_async import KontextClient
from kontext_async.fleet import Fleet

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "several-workers.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture
def user(dsn, monkeypatch, tmp_path):
    """Set up a user's folder, key, database and API."""
    with serving(durations=0.2, auto_create=True) as simulator:
        monkeypatch.setenv("APIKLEY_API_KEY", "key")
        monkeypatch.setenv("KONTEXT_FLEET_DSN", dsn)
        monkeypatch.setenv("KONTEXT_BASE_URL", simulator.base_url)
        monkeypatch.setitem(KontextClient.__init__.__kwdefaults__, "base_url", simulator.base_url)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "ids.txt").write_text("task12345\ntask12346\n")
        yield dsn


def test_the_walk_leads_to_images(user, tmp_path):
    """The commands of the page, as a shell reads them."""
    (walk,) = blocks("console")
    command = f'{sys.executable} -P -m kontext_async "$@"'
    source = Path(kontext_async.__file__).parent.parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"kontext() {{ {command}; }}\n{walk}"],
        env=os.environ | {"PYTHONPATH": str(source)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert json.loads(last)["done"] == 2
    assert len(list(tmp_path.glob("images-*/*"))) == 2


def test_the_programs_run(user):
    """One submits and reads, while the other works with a shared limit."""
    reader, worker = blocks("python")
    asyncio.run(_prepare(user))
    reading = threading.Thread(target=exec, args=(reader, {"__name__": "__main__"}))
    reading.start()
    while not asyncio.run(_has_tasks(user)):
        pass
    exec(worker, {"__name__": "__main__"})
    reading.join(20)
    assert not reading.is_alive()


@pytest.fixture
def compose():
    return yaml.safe_load(blocks("yaml")[0])


def services_after(compose, name):
    """Return the names of the services that one waits for, first things first."""
    names = []
    for other in compose["services"][name].get("depends_on", {}):
        names += [*services_after(compose, other), other]
    return names


def test_the_compose_file_is_consistent(compose):
    """Volumes and services that it names are there, and it stops workers late enough."""
    services = compose["services"]
    mounts = [mount for service in services.values() for mount in service.get("volumes", ())]
    assert {mount.partition(":")[0] for mount in mounts} == set(compose["volumes"])
    assert services_after(compose, "worker") == ["db", "init"]
    assert (
        services["db"]["environment"]["POSTGRES_PASSWORD"]
        == (services["worker"]["environment"]["PGPASSWORD"])
    )
    assert Fleet(services["worker"]["environment"]["KONTEXT_FLEET_DSN"])


def test_the_services_work_and_stop_in_time(user, compose, tmp_path):
    """Their commands as Compose runs them, on this machine: the page's ids become images."""
    folder = tmp_path / "images"
    services = compose["services"]
    env = environment()

    def command(text):
        program, *words = shlex.split(text.replace("/images", str(folder)))
        assert program == "kontext"
        return [*COMMAND, *words]

    submit, status = re.findall(
        r"^docker compose run --rm -T worker (kontext .*?)(?: < ids.txt)?$", TEXT, re.MULTILINE
    )
    subprocess.run(command(services["init"]["command"]), env=env, check=True)
    worker = services["worker"]
    workers = [
        subprocess.Popen(command(worker["command"]), env=env)
        for _ in range(worker["deploy"]["replicas"])
    ]
    try:
        with (tmp_path / "ids.txt").open() as ids:
            subprocess.run(command(submit), env=env, check=True, stdin=ids)
        asyncio.run(asyncio.wait_for(_outcomes(user), 30))
        for process in workers:
            process.terminate()
        grace = float(worker["stop_grace_period"].removesuffix("s"))
        assert [process.wait(grace) for process in workers] == [143] * 3
    finally:
        for process in workers:
            process.kill()
            process.wait()
    done = subprocess.run(command(status), env=env, check=True, stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["done"] == 2
    assert len(list(folder.iterdir())) == 2


async def _outcomes(dsn):
    async with Fleet(dsn) as fleet:
        return [outcome async for outcome in fleet.outcomes()]


async def _prepare(dsn):
    async with Fleet(dsn) as fleet:
        await fleet.init()


async def _has_tasks(dsn):
    async with Fleet(dsn) as fleet:
        return (await fleet.status()).tasks["waiting"]
