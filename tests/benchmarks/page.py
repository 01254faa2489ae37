"""Fill the documentation with the results of a complete run of the benchmarks.

    python tests/benchmarks/page.py

does it with the results that the documentation has: after a change to a table or a plot.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

# As for the tests, which import from there as well.
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import (
    aims,
    cpu,
    discovery,
    ledger_cost,
    saving,
    scale,
    schedule_efficiency,
    soak,
)

DOCS = Path(__file__).parent.parent.parent / "docs"
RESULTS = "performance.json"
PAGES = ("performance.md", "learned-schedule.md", "pacing.md")

# The table of each benchmark, as Markdown.
TABLES: Mapping[str, Callable[[Any], str]] = {
    "cpu": cpu.table,
    "schedule": schedule_efficiency.table,
    "lognormals": schedule_efficiency.lognormals_table,
    "discovery": discovery.table,
    "sharing": discovery.sharing_table,
    "deadlines": discovery.deadlines_table,
    "scale": scale.table,
    "wide": scale.wide_table,
    "soak": soak.table,
    "saving": saving.table,
    "ledger": ledger_cost.table,
}


def _surroundings(of: Mapping[str, Any]) -> str:
    day = datetime.fromisoformat(of["date"])
    *others, last = (f"{name} {version}" for name, version in of["packages"].items())
    said = (
        f"Measured on {day.day} {day:%B %Y}, with Python {of['python']} on "
        f"{of['system']}, with {of['cores']} cores, {', '.join(others)} and {last}."
    )
    return textwrap.fill(said, 119)


def parts(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts of the pages that come from a run, by the names of their places."""
    return {
        "surroundings": _surroundings(results["surroundings"]),
        "aims": aims.table(results),
        **{name: table(results[name]) for name, table in TABLES.items()},
    }


def filled(text: str, parts: Mapping[str, str]) -> str:
    """Return a page with each place, from ``<!-- from the run: NAME -->`` on, filled."""
    return re.sub(
        r"(<!-- from the run: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{parts[found[2]]}\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def write(results: Path, docs: Path = DOCS) -> None:
    """Fill the pages, draw the plots, and keep the results beside them."""
    from benchmarks import plots  # needs matplotlib

    text = results.read_text(encoding="utf-8")
    found = json.loads(text)
    for name in PAGES:
        page = docs / name
        page.write_text(filled(page.read_text(encoding="utf-8"), parts(found)), encoding="utf-8")
    plots.draw(found, docs / "images")
    (docs / RESULTS).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(DOCS / RESULTS)
