"""A PostgreSQL cluster of the tests' own: fixtures ``postgres`` and ``dsn``.

It lives in a temporary folder, listens on a Unix socket alone, and ends with the tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PROGRAMS = sorted(
    Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3])
)
NAME = "PostgreSQL's initdb is not there: apt-get install postgresql"

# Ends it when the thread that started it ends, however that happens.
WITH_US = ("setpriv", "--pdeathsig", "INT") if shutil.which("setpriv") else ()


class Cluster:
    """One server, which may be stopped and started again."""

    def __init__(self, programs, folder, user, *, fsync):
        self.programs = programs
        self.folder = folder
        self.user = user
        self.fsync = fsync
        self.process = None
        self.databases = 0
        self._run("initdb", "-D", self.data, "-U", "kontext", "--auth=trust", "-EUTF8", "-N")

    @property
    def data(self):
        return self.folder / "data"

    def dsn(self, database="postgres"):
        return f"host={self.folder} user=kontext dbname={database}"

    def _run(self, program, *arguments, check=True):
        return subprocess.run(
            [self.programs / program, *arguments],
            user=self.user,
            cwd=self.folder,
            check=check,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start(self):
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.folder,
            "max_connections": 60,
            "fsync": "on" if self.fsync else "off",
            "logging_collector": "off",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*WITH_US, self.programs / "postgres", "-D", self.data, *options],
                user=self.user,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C of the tests must not end it before them
            )
        for _ in range(600):
            ready = self._run("pg_isready", "-q", "-h", self.folder, check=False)
            if ready.returncode == 0:
                return
            time.sleep(0.05)
        raise TimeoutError((self.folder / "log").read_text())

    def stop(self, how=signal.SIGINT):
        """End it at once and in order, or by another signal."""
        if self.process is not None:
            self.process.send_signal(how)
            try:
                self.process.wait(20)
            finally:
                self.process.kill()
                self.process.wait()
                self.process = None

    def create(self):
        """Return the address of a new, empty database."""
        self.databases += 1
        name = f"fleet{self.databases}"
        self._run("createdb", "-h", self.folder, "-U", "kontext", name)
        return self.dsn(name)


@contextlib.contextmanager
def cluster(*, fsync=False):
    """Run a cluster while the block runs."""
    if not PROGRAMS:
        pytest.skip(NAME)
    folder = Path(tempfile.mkdtemp(prefix="kontext-pg-", dir="/tmp"))  # socket paths are short
    import pwd  # not on Windows

    user = None
    if os.geteuid() == 0:  # which initdb refuses
        user = "postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody"
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    try:
        running = Cluster(PROGRAMS[-1].parent, folder, user, fsync=fsync)
        try:
            running.start()
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres():
    with cluster() as running:
        yield running


@pytest.fixture
def dsn(postgres):
    """The address of an empty database."""
    return postgres.create()
