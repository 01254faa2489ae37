"""Fill an empty database with a million outcomes of 60 days; time `status` and `prune`.

``python tests/benchmarks/fleet_tables.py DSN``
"""

from __future__ import annotations

import asyncio
import sys
import time

import psycopg

from kontext_async.fleet import Fleet

OUTCOMES = 1_000_000
PRUNED_AFTER = 30 * 86400.0

FILL = """
    INSERT INTO kontext_tasks (task_id, state, attempts, record, position, created_at, updated_at)
    SELECT md5(n::text), CASE WHEN n %% 20 = 0 THEN 'failed' ELSE 'done' END, 1,
        repeat(md5((7 * n)::text), 16), nextval('kontext_position'), ended_at, ended_at
    FROM generate_series(1, %(count)s) AS n,
        LATERAL (SELECT now() - interval '60 days' * (1 - n / %(count)s::float8)) AS t (ended_at)
"""


async def main(dsn: str) -> None:
    async with Fleet(dsn) as fleet:
        await fleet.init()
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            await connection.execute(FILL, {"count": OUTCOMES})
            await connection.execute("VACUUM ANALYZE kontext_tasks")
        begun = time.perf_counter()
        await fleet.status()
        counted = time.perf_counter()
        pruned = await fleet.prune(older_than=PRUNED_AFTER)
        deleted = time.perf_counter()
    print(f"status {counted - begun:.2f} s; prune {deleted - counted:.1f} s, {pruned} outcomes")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
