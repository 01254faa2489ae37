"""A FastAPI service that answers with a task's image, or says that it is not ready yet."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
from fastapi import FastAPI, HTTPException, Request

from kontext_async import (
    GenerationFailedError,
    KontextClient,
    KontextError,
    TaskNotFoundError,
    WaitTimeoutError,
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Open one client for the life of the service: all requests share its limits and schedule."""
    async with KontextClient() as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)

LIMIT = 25.0  # seconds; less than the usual limit of a reverse proxy


@app.get("/images/{task_id}")
async def image(task_id: str, request: Request) -> dict[str, Any]:
    """Wait for at most `LIMIT` seconds, and return the task as plain data."""
    client: KontextClient = request.app.state.client
    try:
        done = await client.wait_for_result(task_id, timeout=LIMIT)
    except WaitTimeoutError as error:
        # The task goes on, and the same URL answers later.
        raise HTTPException(503, "not ready", headers={"Retry-After": "10"}) from error
    except TaskNotFoundError as error:
        raise HTTPException(404, "no such task") from error
    except GenerationFailedError as error:
        raise HTTPException(422, error.error_message) from error
    except KontextError as error:
        raise HTTPException(502, "the image service does not answer") from error
    # Without the prompt, which the parameters hold.
    return attrs.asdict(done, filter=attrs.filters.exclude("param_json"))


@app.get("/stats")
async def stats(request: Request) -> Mapping[str, Any]:
    """Return the client's counts and present limits."""
    client: KontextClient = request.app.state.client
    return attrs.asdict(client.stats)
