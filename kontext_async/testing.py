"""pytest fixtures for code that uses this library. They need the extra ``testing``.

Load them in a ``conftest.py`` with ``pytest_plugins = ["kontext_async.testing"]``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from kontext_async import DurationModel, KontextClient
from kontext_async.simulator import Simulator

try:
    import pytest_asyncio
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "kontext_async.testing needs pytest and pytest-asyncio: "
        "pip install 'kontext-async[testing]'",
        name=exc.name,
    ) from exc

__all__ = ["kontext_client", "kontext_simulator"]


@pytest_asyncio.fixture
async def kontext_simulator() -> AsyncIterator[Simulator]:
    """Provide a simulator of the API, new for each test. Its tasks take 0.1 s by default."""
    async with Simulator(durations=0.1) as simulator:
        yield simulator


@pytest_asyncio.fixture
async def kontext_client(kontext_simulator: Simulator) -> AsyncIterator[KontextClient]:
    """Provide a client of that simulator, with the key ``test-key``, polling about every 0.25 s."""
    eager = DurationModel(cost_per_request=0.001)
    base_url = kontext_simulator.base_url
    async with KontextClient("test-key", base_url=base_url, durations=eager) as client:
        yield client
