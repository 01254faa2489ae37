"""Run the benchmarks: tables on standard output, all figures in a JSON file.

    python tests/benchmarks/run.py --only cpu,scale

With ``--docs`` all of them run, and the documentation gets the tables and plots of this run.
Times and memory are of this machine; what carries over are the ratios, each taken within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# As for the tests, which import from there as well.
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import (
    cpu,
    discovery,
    ledger_cost,
    page,
    saving,
    scale,
    schedule_efficiency,
    soak,
)

CHECKOUT = Path(__file__).parent.parent.parent
_INTO = CHECKOUT / "build" / "benchmarks" / "results.json"  # git leaves it alone
_PACKAGES = ("aiohttp", "attrs", "cattrs", "tenacity", "httpx", "openai", "fal-client")

# Those without a table in `page.TABLES` are drawn.
BENCHMARKS: dict[str, Callable[[], Any]] = {
    "cpu": cpu.run,
    "schedule": schedule_efficiency.run,
    "lognormals": schedule_efficiency.run_lognormals,
    "ages": schedule_efficiency.by_age,
    "discovery": discovery.run,
    "seconds": discovery.by_second,
    "sharing": discovery.run_sharing,
    "deadlines": discovery.run_deadlines,
    "scale": scale.run,
    "wide": scale.run_wide,
    "soak": soak.run,
    "saving": saving.run,
    "ledger": ledger_cost.run,
}


def _surroundings() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "packages": {name: version(name) for name in _PACKAGES},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", default=",".join(BENCHMARKS), help="some of %(default)s")
    which.add_argument("--docs", action="store_true", help="run all, and fill the documentation")
    parser.add_argument("--json", type=Path, default=_INTO, help="%(default)s")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - BENCHMARKS.keys():
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"surroundings": _surroundings()}
    for name in names:
        began = time.perf_counter()
        print(f"\n## {name}\n")
        results[name] = BENCHMARKS[name]()
        if name in page.TABLES:
            print(page.TABLES[name](results[name]))
        print(f"\n({time.perf_counter() - began:.0f} s)", flush=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nAll figures: {options.json}")
    if options.docs:
        page.write(options.json)


if __name__ == "__main__":
    main()
