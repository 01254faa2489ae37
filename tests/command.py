"""The command in a process of its own, and a terminal for it in this one."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import kontext_async

COMMAND = [sys.executable, "-P", "-m", "kontext_async"]


def environment(**variables):
    """Return an environment with a key and this package, without the machine's proxies."""
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    source = str(Path(kontext_async.__file__).parent.parent)
    return {**inherited, "PYTHONPATH": source, "APIKLEY_API_KEY": "key", **variables}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True
