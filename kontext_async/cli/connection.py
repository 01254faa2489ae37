"""The command's client, and the session that takes it through a proxy."""

from __future__ import annotations

import contextlib
import shlex
import urllib.request
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import attrs
from yarl import URL

from kontext_async.cli.input import read_key
from kontext_async.cli.memory import remembered
from kontext_async.cli.output import fail
from kontext_async.client import DEFAULT_BASE_URL, KontextClient
from kontext_async.pacing import RateLimit, SlidingWindow


@attrs.frozen(kw_only=True)
class Connection:
    """The options that say how the API is reached."""

    base_url: str
    key: str = attrs.field(repr=False)
    api_key_file: Path | None = None
    allow_http: bool
    proxy: str | None = attrs.field(repr=False)
    rate_limit: RateLimit | SlidingWindow | None = None
    no_memory: bool = False

    @contextlib.asynccontextmanager
    async def open(
        self, **options: Any
    ) -> AsyncGenerator[tuple[KontextClient, aiohttp.ClientSession | None]]:
        """Give a client, and the session it shares with image hosts: None where each has its own.

        Without a proxy in the options or the environment none is needed. ``options`` are further
        arguments of the client.
        """
        async with contextlib.AsyncExitStack() as stack:
            durations = stack.enter_context(remembered(self.base_url, wanted=not self.no_memory))
            session = None
            if self.proxy is not None or _has_proxy_in_environment():
                connector = _Connector(limit=0)
                connector.for_paid = await stack.enter_async_context(
                    aiohttp.TCPConnector(limit=0, force_close=True)
                )
                session = await stack.enter_async_context(
                    aiohttp.ClientSession(
                        connector=connector,
                        cookie_jar=aiohttp.DummyCookieJar(),
                        proxy=self.proxy,
                        trust_env=self.proxy is None,
                    )
                )
            client = await stack.enter_async_context(
                KontextClient(
                    self.key,
                    base_url=self.base_url,
                    rate_limit=self.rate_limit,
                    allow_http=self.allow_http,
                    session=session,
                    durations=durations,
                    **options,
                )
            )
            yield client, session

    def as_options(self) -> str:
        """Return the options that a repetition of the command needs, as a shell reads them."""
        words: list[str] = []
        if self.base_url != DEFAULT_BASE_URL:
            words += ["--base-url", self.base_url]
        if self.allow_http:
            words.append("--allow-http")
        if self.api_key_file is not None:
            words += ["--api-key-file", str(self.api_key_file)]
        if self.proxy is not None and not _has_password(self.proxy):
            words += ["--proxy", self.proxy]
        if self.no_memory:
            words.append("--no-memory")
        return "".join(f"{shlex.quote(word)} " for word in words)


class _Connector(aiohttp.TCPConnector):
    """A connector that reuses connections, except for paid requests: those are the POST requests.

    As without a proxy, a kept connection that is just being closed would lose their answers.
    """

    for_paid: aiohttp.BaseConnector

    async def connect(
        self, req: aiohttp.ClientRequest, traces: Any, timeout: aiohttp.ClientTimeout
    ) -> aiohttp.connector.Connection:
        if req.method == "POST":
            return await self.for_paid.connect(req, traces, timeout)
        return await super().connect(req, traces, timeout)


def _has_proxy_in_environment() -> bool:
    return not {"http", "https"}.isdisjoint(urllib.request.getproxies())


def connection(
    *,
    base_url: str,
    api_key_file: Path | None,
    allow_http: bool,
    proxy: str | None,
    rate_limit: RateLimit | None = None,
    no_memory: bool = False,
) -> Connection:
    """Return the connection of a command's options; exit if they cannot be used."""
    return Connection(
        base_url=base_url,
        key=read_key(api_key_file),
        api_key_file=api_key_file,
        allow_http=allow_http,
        proxy=_checked_proxy(proxy),
        rate_limit=rate_limit,
        no_memory=no_memory,
    )


def _has_password(proxy: str) -> bool:
    url = URL(proxy)
    return url.user is not None or url.password is not None


def _checked_proxy(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        url = URL(text)
        is_usable = url.scheme in {"http", "https"} and url.host is not None
    except ValueError:
        is_usable = False
    if not is_usable:  # not shown: it may hold a password
        fail("--proxy must be an http:// or https:// URL with a host; SOCKS cannot be used here")
    return text
