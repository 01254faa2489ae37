"""A FastAPI service that creates images, and lets callbacks end the waits for them."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response

from kontext_async import ImageRequest, KontextClient
from kontext_async.callbacks import CallbackReceiver


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Open one client, and a receiver that passes callbacks on to it."""
    async with KontextClient(callback_url=os.environ["CALLBACK_URL"]) as client:
        app.state.client = client
        app.state.receiver = CallbackReceiver(client, key=os.environ["CALLBACK_KEY"])
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/images")
async def create(prompt: str, request: Request) -> dict[str, str]:
    """Create an image, and return its address when it is ready."""
    client: KontextClient = request.app.state.client
    done = await client.run(ImageRequest(prompt=prompt))
    return {"url": done.result_image_url}


@app.post("/callbacks/{token}")
async def called_back(token: str, request: Request) -> Response:
    """Answer the service at once; the wait for the task polls it now."""
    receiver: CallbackReceiver = request.app.state.receiver
    status = await receiver.receive(request.headers, await request.body(), token=token)
    return Response(status_code=status)
