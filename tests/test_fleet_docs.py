"""The page about fleets: its walk and its programs run on a database of the tests' own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from background import serving

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


async def _prepare(dsn):
    async with Fleet(dsn) as fleet:
        await fleet.init()


async def _has_tasks(dsn):
    async with Fleet(dsn) as fleet:
        return (await fleet.status()).tasks["waiting"]
