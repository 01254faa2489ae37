"""Requests by a session's own methods, with all that a session may add to them."""

from __future__ import annotations

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from kontext_async._version import __version__
from kontext_async.transport.answers import RawAnswer, read_body
from kontext_async.wire import MAX_BODY, ApiKey

__all__ = ["CONNECT_TIMEOUT", "MAX_HEADER", "SessionFetcher", "new_session", "request_headers"]

# Seconds for which an idle connection is kept; most delays of the learned schedule are shorter.
_KEEP_ALIVE = 60.0

MAX_HEADER = 64 * 1024  # bytes of one header; aiohttp's default of 8 KiB is less than some send

# The whole request is bounded by its sender: aiohttp rounds 5 s and more to whole seconds.
CONNECT_TIMEOUT = aiohttp.ClientTimeout(sock_connect=10.0)


def request_headers(api_key: ApiKey) -> CIMultiDict[str]:
    """Return the headers of every request to the API."""
    return CIMultiDict(
        {
            "Authorization": f"Bearer {api_key.reveal()}",
            "User-Agent": f"kontext-async/{__version__}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Cache-Control": "no-cache",  # a kept answer would say that a task still runs
        }
    )


def new_session() -> aiohttp.ClientSession:
    """Return a session for a client that was passed none."""
    return aiohttp.ClientSession(
        # The budget bounds the connections.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class SessionFetcher:
    """Fetches by ``session.get``: its tracing, proxies and middlewares take part."""

    def __init__(
        self, session: aiohttp.ClientSession, endpoint: URL, headers: CIMultiDict[str]
    ) -> None:
        self._session = session
        self._endpoint = endpoint
        self._headers = headers

    async def fetch(self, task_id: str) -> RawAnswer:
        response = await self._session.get(
            self._endpoint.with_query({"taskId": task_id}),
            headers=self._headers,
            timeout=CONNECT_TIMEOUT,
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=True,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
        )
        # aiohttp releases the connection when the body is read to its end.
        try:
            body = await read_body(response.content)
        except BaseException:
            response.close()
            raise
        if len(body) > MAX_BODY:
            response.close()
        return RawAnswer(response.status, response.headers, body)
