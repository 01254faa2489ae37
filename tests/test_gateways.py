"""Real gateways that limit what passes: nginx and HAProxy, each with a configuration of its own.

They take minutes of real time, so only ``nox -s gateways`` runs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket

import pytest

from kontext_async import KontextClient, RateLimit
from kontext_async.simulator import Simulator

pytestmark = [
    pytest.mark.skipif("KONTEXT_GATEWAYS" not in os.environ, reason="only nox -s gateways runs it"),
    pytest.mark.timeout(120),
]

NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    limit_req_zone $binary_remote_addr zone=requests:1m rate=20r/s;
    limit_conn_zone $binary_remote_addr zone=connections:1m;
    upstream api {{ server {api}; keepalive 64; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            {limit}
            limit_req_status {status}; limit_conn_status {status}; limit_req_log_level info;
            proxy_pass http://api; proxy_http_version 1.1; proxy_set_header Connection "";
        }}
    }}
}}
"""
HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    timeout queue 1s
frontend gateway
    bind 127.0.0.1:{port}
    default_backend api
backend api
    server api {api} maxconn 2
"""

# Requests a second that pass, seconds that a request takes, program, and limit.
SHAPES = {
    "limit_req": (20, 0.0, "nginx", "limit_req zone=requests;"),
    "limit_req burst": (20, 0.0, "nginx", "limit_req zone=requests burst=5 nodelay;"),
    "limit_conn": (80, 0.1, "nginx", "limit_conn connections 8;"),
    "queue": (20, 0.1, "haproxy", ""),
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.asynccontextmanager
async def gateway(program, limit, status, api, folder):
    """Run a gateway in front of a simulator; give its address, and end it in any case."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        pytest.skip(f"no {program} here: apt-get install {program}")
    port, file = free_port(), folder / "gateway.conf"
    template = NGINX if program == "nginx" else HAPROXY
    text = template.format(folder=folder, api=api, port=port, limit=limit, status=status)
    file.write_text(text)
    option = ("-c",) if program == "nginx" else ("-db", "-f")
    process = await asyncio.create_subprocess_exec(path, *option, str(file))
    try:
        for _ in range(100):
            await asyncio.sleep(0.05)
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def used(shape, status, folder, known=None):
    """Return the share of a limit that is used from the tenth second on, and that is refused."""
    rate, latency, program, limit = SHAPES[shape]
    async with Simulator(latency=latency, durations=1e9, auto_create=True) as simulator:
        api = simulator.base_url.removeprefix("http://")
        async with (
            gateway(program, limit, status, api, folder) as address,
            KontextClient("key", base_url=address, rate_limit=known) as client,
        ):
            ids = [f"t{n}" for n in range(500)]
            waiting = asyncio.create_task(
                client.wait_for_results(ids, timeout=None, wait=lambda _: 1.0)
            )
            await asyncio.sleep(10)
            sent, answered = client.stats.requests, simulator.answered
            await asyncio.sleep(20)
            sent, answered = client.stats.requests - sent, simulator.answered - answered
            waiting.cancel()
            await asyncio.wait([waiting])
    return answered / 20 / rate, 1 - answered / sent


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_gateways_limit_is_used(shape, status, tmp_path):
    """Four fifths of it from the tenth second on, with six refused in a hundred at most."""
    if shape == "queue" and status == 429:
        pytest.skip("HAProxy refuses from its queue by 503 alone")
    share, refused = await used(shape, status, tmp_path)
    print(f"{shape}, {status}: {share:.2f} used, {refused:.1%} refused")  # noqa: T201
    assert share >= 0.80
    assert refused <= 0.06


async def test_a_known_limit_is_spaced_for_a_gateway(tmp_path):
    """`rate=20r/s burst=5` reads as 20 in a second, but only six pass at once."""
    share, refused = await used("limit_req burst", 503, tmp_path, RateLimit(20, 1.0))
    print(f"known: {share:.2f} used, {refused:.1%} refused")  # noqa: T201
    assert share >= 0.80
    assert refused <= 0.06
