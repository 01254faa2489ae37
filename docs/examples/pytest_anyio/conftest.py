"""The fixtures of kontext-async under anyio's plugin, on asyncio."""

import pytest

pytest_plugins = ["kontext_async.testing"]


@pytest.fixture
def anyio_backend() -> str:
    """Run the tests on asyncio alone: aiohttp needs it."""
    return "asyncio"
