"""A batch that is killed again and again: nothing is lost, and nothing is done twice.

Set ``KONTEXT_CRASHES`` for more than the usual three: ``nox -s crash`` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import time

import pytest
from background import serving
from command import COMMAND, environment

from kontext_async.results import Ledger
from kontext_async.simulator import Failure
from kontext_async.simulator.images import make_image

TASKS = 300
KILLS = 2  # of one batch
SIZE = 20_000

# Not those that ask for pauses or stall: this is about the disk, and ought to be over soon.
FAULTS = ("http_500", "html_502", "empty_200", "html_200", "reset", "reset_mid_body", "truncated")


class Batch:
    """Three hundred tasks on a simulator, and the command that keeps what becomes of them."""

    def __init__(self, simulator, folder, chance):
        self.simulator = simulator
        self.folder = folder
        self.ledger = folder / "kontext.sqlite3"
        self.ids = folder.with_name("ids.txt")
        self.fates = {f"task-{n:03}": chance.random() < 0.06 for n in range(TASKS)}
        for task_id, fails in self.fates.items():
            simulator.add_task(
                task_id,
                duration=10.0,
                outcome=Failure(500, "It failed.") if fails else "success",
                params=self.params(task_id),
                age=60.0 if chance.random() < 0.9 else chance.uniform(8.0, 10.0),
            )
        self.ids.write_text("\n".join(self.fates))

    @staticmethod
    def params(task_id):
        return {"prompt": f"The image of {task_id}", "outputFormat": "png"}

    def start(self):
        command = ["batch", "--from", self.ids, "--into", self.folder]
        return subprocess.Popen(
            [*COMMAND, *command, "--base-url", self.simulator.base_url],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def killed(self, requests, seconds):
        """The tasks known and saved when a run was killed after some requests and seconds."""
        begun = len(self.simulator.requests)
        with self.start() as process:
            end = time.monotonic() + 30
            while len(self.simulator.requests) < begun + requests and process.poll() is None:
                assert time.monotonic() < end, "no progress"
                time.sleep(0.002)
            time.sleep(seconds)
            process.kill()
        entries = Ledger.read(self.ledger) if self.ledger.exists() else ()
        ended = {entry.task_id for entry in entries if entry.state in {"done", "failed"}}
        return Known(len(self.simulator.requests), ended, {p.stem for p in self.images()})

    def images(self):
        return list(self.folder.glob("task-*.png"))

    def check(self, output):
        """One outcome for each, one whole image for each success, and nothing beside them."""
        assert sorted(json.loads(line)["taskId"] for line in output.splitlines()) == list(
            self.fates
        )
        entries = {entry.task_id: entry for entry in Ledger.read(self.ledger)}
        assert {task_id: entry.state for task_id, entry in entries.items()} == {
            task_id: "failed" if fails else "done" for task_id, fails in self.fates.items()
        }
        successes = {task_id for task_id, fails in self.fates.items() if not fails}
        assert {path.stem for path in self.images()} == successes
        for task_id in successes:
            image = (self.folder / entries[task_id].saved_path).read_bytes()
            assert image == make_image(json.dumps(self.params(task_id)), "png", SIZE)
            assert entries[task_id].sha256 == hashlib.sha256(image).hexdigest()
        names = {path.name for path in self.folder.iterdir()} - {f"{t}.png" for t in successes}
        assert names <= {f"kontext.sqlite3{end}" for end in ("", "-lock", "-shm", "-wal")}


class Known:
    """The disk that a killed run left, and the number of its requests."""

    def __init__(self, requests, ended, saved):
        self.requests = requests
        self.ended = ended
        self.saved = saved

    def check(self, requests):
        """Nothing that was known has been asked for since."""
        for request in list(requests)[self.requests :]:
            known = self.ended if request.path.endswith("/record-info") else self.saved
            assert request.task_id not in known, request


@pytest.mark.parametrize("seed", range(int(os.environ.get("KONTEXT_CRASHES", "3"))))
def test_nothing_is_lost_and_nothing_done_twice(seed, tmp_path):
    """Killed twice at random moments and started again, a batch ends as if nothing had been."""
    chance = random.Random(seed)
    with serving(
        fault_rate=0.05, faults=FAULTS, image_bytes=SIZE, seed=seed, log_limit=None
    ) as simulator:
        batch = Batch(simulator, tmp_path / "results", chance)
        known = [
            batch.killed(chance.randrange(2 * TASKS // KILLS), chance.uniform(0, 0.02))
            for _ in range(KILLS)
        ]
        with batch.start() as process:
            output, errors = process.communicate(timeout=50)
        assert process.returncode == 1, errors
        batch.check(output)
        for before in known:
            before.check(simulator.requests)
