"""Failures of a request: what they say, and what may be chained to an error of ours."""

from __future__ import annotations

import os
import ssl

import aiohttp

from kontext_async.errors import ConfigurationError

__all__ = ["UNTRUSTED_SERVER", "check_for_second_login", "describe_failure", "safe_cause"]

# The server is not the one it should be.
UNTRUSTED_SERVER = (aiohttp.ClientConnectorCertificateError, aiohttp.ServerFingerprintMismatch)


def describe_failure(exc: Exception) -> str:
    """Return what failed, and whether the proxy, the network or TLS said no.

    Without quotes from the answer, which may echo the key.
    """
    match exc:
        case aiohttp.ClientConnectorError():
            return _describe_connecting(exc)
        case aiohttp.ClientHttpProxyError():
            return f"the proxy refuses to forward: {exc.status} {exc.message.partition(':')[0]}"
        case aiohttp.ServerDisconnectedError():
            return "the connection was closed before the answer"
        case aiohttp.ClientResponseError():
            return f"{type(exc).__name__}: {exc.status}, {exc.message.partition(':')[0]}"
        case _:
            return f"{type(exc).__name__}: {exc}"


def _describe_connecting(exc: aiohttp.ClientConnectorError) -> str:
    match exc:
        case aiohttp.ClientProxyConnectionError():
            return f"the proxy {exc.host}:{exc.port} cannot be reached: {_system_error(exc)}"
        case aiohttp.ClientConnectorDNSError():
            return f"the name {exc.host} cannot be resolved: {_system_error(exc)}"
        case aiohttp.ClientConnectorCertificateError():
            return f"the certificate of {exc.host} does not verify: {exc.certificate_error}"
        case _:
            pass
    if isinstance(exc.os_error, ssl.SSLError):
        return f"no TLS connection to {exc.host}:{exc.port}: {exc.os_error}"
    return f"{exc.host}:{exc.port} cannot be reached: {_system_error(exc)}"


def _system_error(exc: aiohttp.ClientConnectorError) -> str:
    """Return the operating system's words; asyncio's own name the call instead."""
    number = exc.os_error.errno
    words = exc.os_error.strerror or str(exc.os_error)
    return os.strerror(number) if number and words.startswith("Connect call failed") else words


def safe_cause(exc: Exception) -> Exception | None:
    """Return the exception to chain: only the operating system's errors.

    Others hold the request's headers, or headers of the answer that may echo them; one about a
    connection holds the proxy's URL with its password. Frames are dropped too: some error
    reporters collect their locals, and request headers are among them.
    """
    if isinstance(exc, aiohttp.ClientConnectorError):
        exc = exc.os_error
    is_safe = isinstance(exc, OSError) and not isinstance(exc, TimeoutError)
    return exc.with_traceback(None) if is_safe else None


def check_for_second_login(exc: Exception) -> None:
    """Raise `ConfigurationError` if the session added a login of its own to a request."""
    if isinstance(exc, ValueError) and "AUTHORIZATION" in str(exc):  # aiohttp found two
        raise ConfigurationError(
            "the session takes a login for this host from netrc, which collides with the "
            "API key: pass one without trust_env, or remove that login"
        ) from None
