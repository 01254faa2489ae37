"""Names of processes."""

from __future__ import annotations

import os
import secrets
import socket

__all__ = ["new_name"]


def new_name() -> str:
    """Return a name that no other worker has, also after a restart with the same process id."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
