"""Callbacks that come while the command runs."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import typer
from yarl import URL

from kontext_async.cli.input import read_key
from kontext_async.cli.output import Exit, fail, say
from kontext_async.client import KontextClient
from kontext_async.results import Ledger


@attrs.frozen(kw_only=True)
class Callbacks:
    """The address of callbacks, and the port and the key to receive them with."""

    url: str
    host: str = "127.0.0.1"
    port: int | None = None
    key: str | None = attrs.field(default=None, repr=False)

    @property
    def path(self) -> str:
        """The path of the address, with ``{token}`` as it is."""
        return URL(self.url.replace("{token}", "token-here")).path.replace("token-here", "{token}")


def free_callbacks() -> Callbacks:
    """Return callbacks on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Callbacks(url=f"http://127.0.0.1:{port}/callbacks/{{token}}", port=port)


def read_callbacks(url: str | None, listen: str | None, key_file: Path | None) -> Callbacks | None:
    """Return what the options say of callbacks; None without an address."""
    if url is None:
        if listen is not None or key_file is not None:
            fail("--listen and --callback-key-file need --callback-url")
        return None
    key = None if key_file is None else read_key(key_file)
    if listen is None:
        return Callbacks(url=url, key=key)
    host, _, port = listen.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        fail("give --listen [HOST:]PORT, such as 8080 or 0.0.0.0:8080")
    return Callbacks(url=url, host=host or "127.0.0.1", port=int(port), key=key)


@asynccontextmanager
async def receiving(
    callbacks: Callbacks | None, client: KontextClient, ledger: Ledger
) -> AsyncGenerator[None]:
    """Receive callbacks within the block, if there is a port for them."""
    if callbacks is None or callbacks.port is None:
        yield
        return
    # These are a part of the start of every command, and few receive callbacks.
    from aiohttp import web  # noqa: PLC0415

    from kontext_async.callbacks import CallbackReceiver  # noqa: PLC0415

    receiver = CallbackReceiver(client, key=callbacks.key, on_token=ledger.add_candidate)
    app = web.Application()
    app.router.add_post(callbacks.path, receiver.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, callbacks.host, callbacks.port, reuse_address=True).start()
    except OSError as error:
        say(f"kontext: cannot listen on port {callbacks.port}: {error.strerror}")
        await runner.cleanup()
        raise typer.Exit(Exit.USAGE) from error
    try:
        yield
    finally:
        await runner.cleanup()
