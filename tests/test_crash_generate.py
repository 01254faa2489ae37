"""`kontext generate` killed again and again: no prompt has two tasks, and none a wrong one.

Each lost task whose callback was received is found again.

Set ``KONTEXT_CRASHES`` for more than the usual three runs: ``nox -s crash`` does.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import time
from collections import Counter

import pytest
from background import serving
from command import COMMAND, environment

from kontext_async.results import Ledger

PROMPTS = 100
KILLS = 4  # of one batch


class Generation:
    """A hundred prompts, and the command that makes images of them."""

    def __init__(self, simulator, folder):
        self.simulator = simulator
        self.folder = folder
        self.ledger = folder / "kontext.sqlite3"
        self.file = folder.with_name("prompts.txt")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/done/{{token}}"
        # Some are equal: each line is a request of its own.
        self.prompts = [f"prompt {n - n % 10 // 9}" for n in range(PROMPTS)]
        self.file.write_text("\n".join(self.prompts))

    def start(self, output=subprocess.DEVNULL):
        command = ["generate", "--from", self.file, "--into", self.folder]
        command += ["--creation-limit", "20/0.5", "--callback-grace", "3"]
        command += ["--listen", str(self.port), "--callback-url", self.url]
        return subprocess.Popen(
            [*COMMAND, *command, "--base-url", self.simulator.base_url],
            env=environment(),
            stdout=output,
            stderr=output,
            text=True,
        )

    def kill(self, created, seconds):
        """Kill a run some seconds after it created some tasks."""
        begun = len(self.simulator.created)
        with self.start() as process:
            end = time.monotonic() + 30
            while len(self.simulator.created) < begun + created and process.poll() is None:
                assert time.monotonic() < end, "no progress"
                time.sleep(0.001)
            time.sleep(seconds)
            process.kill()

    def made(self):
        """The tasks of each prompt."""
        params = (json.loads(self.simulator._store[t].param_json) for t in self.simulator.created)
        return Counter(fields["prompt"] for fields in params)

    def check(self):
        entries = list(Ledger.read_submissions(self.ledger))
        assert Counter(entry.request.prompt for entry in entries) == Counter(self.prompts)
        assert self.made() <= Counter(self.prompts)  # never two for a line
        bound = [entry.task_id for entry in entries if entry.task_id]
        assert len(set(bound)) == len(bound)
        for entry in entries:
            assert entry.state in {"submitted", "unknown"}
            if entry.task_id:
                params = json.loads(self.simulator._store[entry.task_id].param_json)
                assert params["prompt"] == entry.request.prompt
        assert set(bound) <= set(self.simulator.created)
        assert any(sent.status == 200 for sent in self.simulator.callbacks)
        tasks = {entry.token: entry.task_id for entry in entries}
        for sent in self.simulator.callbacks:
            if sent.status == 200:  # it was received, and written down
                assert tasks[sent.url.rpartition("/")[2]] == sent.task_id


@pytest.mark.parametrize("seed", range(int(os.environ.get("KONTEXT_CRASHES", "3"))))
def test_no_prompt_is_paid_for_twice(seed, tmp_path):
    """Over a simulator that loses 15 % of the answers to requests for tasks."""
    chance = random.Random(seed)
    with serving(
        durations=0.3, lost_answer_rate=0.15, lost_callback_rate=0.1, seed=seed, log_limit=None
    ) as simulator:
        generation = Generation(simulator, tmp_path / "results")
        for _ in range(KILLS):
            generation.kill(chance.randrange(PROMPTS // KILLS), chance.uniform(0, 0.02))
        for _ in range(2):  # a callback may come after the run has stopped waiting for it
            with generation.start(subprocess.PIPE) as process:
                _, errors = process.communicate(timeout=100)
            assert process.returncode in {0, 4}, errors
        generation.check()
        lost = sum(entry.state == "unknown" for entry in Ledger.read_submissions(generation.ledger))
        print(f"{len(simulator.created)} tasks, {lost} lost for good")  # noqa: T201
