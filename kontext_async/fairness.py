"""Long loops that share the event loop with everything else."""

from __future__ import annotations

import asyncio

__all__ = ["yield_to_loop"]

# tests/benchmarks/scale.py: no callback of 100,000 waits comes near 50 ms.
_ITEMS_PER_YIELD = 500


async def yield_to_loop(count: int) -> None:
    """Let other callbacks run after every 500th item; ``count`` is the item's number."""
    if count % _ITEMS_PER_YIELD == 0:
        await asyncio.sleep(0)
