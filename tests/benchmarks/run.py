"""Run the benchmarks: tables on standard output, all figures in a JSON file, plots as PNG.

    python tests/benchmarks/run.py --only cpu,scale --plots docs/images

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

from benchmarks import cpu, discovery, ledger_cost, saving, scale, schedule_efficiency, soak

CHECKOUT = Path(__file__).parent.parent.parent
_INTO = CHECKOUT / "build" / "benchmarks"  # git leaves it alone
_PACKAGES = ("aiohttp", "attrs", "cattrs", "tenacity", "httpx", "openai", "fal-client")


def _cpu(plots: Path) -> Any:
    rows = cpu.run()
    print(cpu.table(rows))
    cpu.plot(rows, plots / "performance-cpu.png")
    return rows


def _schedule(plots: Path) -> Any:
    rows = schedule_efficiency.run()
    print(schedule_efficiency.table(rows))
    lognormals = schedule_efficiency.run_lognormals()
    print("\nLearned, J / optimum: tasks one a second · all at once\n")
    print(schedule_efficiency.lognormals_table(lognormals))
    schedule_efficiency.plot(plots / "learned-schedule.png")
    return {"shapes": rows, "lognormals": lognormals}


def _discovery(plots: Path) -> Any:
    rows = discovery.run()
    print(discovery.table(rows))
    deadlines = discovery.run_deadlines()
    print("\n{results} of {tasks} results within their deadlines".format_map(deadlines))
    discovery.plot(plots / "performance-discovery.png")
    return {"limits": rows, "deadlines": deadlines}


def _scale(plots: Path) -> Any:
    rows = scale.run()
    print(scale.table(rows))
    return rows


def _wide(plots: Path) -> Any:
    rows = scale.run_wide()
    print(scale.wide_table(rows))
    return rows


def _soak(plots: Path) -> Any:
    result = soak.run()
    print(soak.table(result))
    return result


def _saving(plots: Path) -> Any:
    rows = saving.run()
    print(saving.table(rows))
    return rows


def _ledger(plots: Path) -> Any:
    rows = ledger_cost.run()
    print(ledger_cost.table(rows))
    return rows


BENCHMARKS: dict[str, Callable[[Path], Any]] = {
    "cpu": _cpu,
    "schedule": _schedule,
    "discovery": _discovery,
    "scale": _scale,
    "wide": _wide,
    "soak": _soak,
    "saving": _saving,
    "ledger": _ledger,
}


def _surroundings() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in _PACKAGES},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", default=",".join(BENCHMARKS), help="some of %(default)s, by commas"
    )
    parser.add_argument("--json", type=Path, default=_INTO / "results.json", help="%(default)s")
    parser.add_argument("--plots", type=Path, default=_INTO, help="folder; %(default)s")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - BENCHMARKS.keys():
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    for folder in (options.plots, options.json.parent):
        folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"surroundings": _surroundings()}
    for name in names:
        began = time.perf_counter()
        print(f"\n## {name}\n")
        results[name] = BENCHMARKS[name](options.plots)
        print(f"\n({time.perf_counter() - began:.0f} s)", flush=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nAll figures: {options.json}")


if __name__ == "__main__":
    main()
