"""A trace with a span for each poll, by OpenTelemetry's instrumentation of aiohttp."""

from __future__ import annotations

import asyncio

import aiohttp
from opentelemetry import trace
from opentelemetry.instrumentation.aiohttp_client import create_trace_config

from kontext_async import KontextClient

tracer = trace.get_tracer(__name__)


async def main(task_id: str) -> None:
    """Wait for a task in a span of its own; its polls are children of that span."""
    async with (
        aiohttp.ClientSession(trace_configs=[create_trace_config()]) as session,
        KontextClient(session=session) as client,
    ):
        with tracer.start_as_current_span("wait for an image"):
            print((await client.wait_for_result(task_id)).result_image_url)


if __name__ == "__main__":
    asyncio.run(main("task12345"))
