"""Results for a CSV file of tasks, with a progress bar.

The input has a column ``task_id``. The output has its columns and two more, ``url`` and ``error``.
"""

from __future__ import annotations

import asyncio
import csv
import sys
from collections import defaultdict
from pathlib import Path

from rich.progress import Progress

from kontext_async import KontextClient


async def fill_in(source: Path, target: Path) -> None:
    """Write the rows of one file to another, in the order in which their tasks end."""
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = [*(reader.fieldnames or []), "url", "error"]
        rows: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        for row in reader:
            rows[row["task_id"]].append(row)
    with target.open("w", newline="", encoding="utf-8") as file, Progress() as progress:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        bar = progress.add_task("Waiting", total=len(rows))
        async with KontextClient() as client, client.as_completed(rows) as outcomes:
            async for outcome in outcomes:
                url = outcome.result.result_image_url if outcome.result else ""
                error = str(outcome.error or "")
                for row in rows[outcome.task_id]:
                    writer.writerow(row | {"url": url, "error": error})
                progress.advance(bar)


if __name__ == "__main__":
    asyncio.run(fill_in(Path(sys.argv[1]), Path(sys.argv[2])))
