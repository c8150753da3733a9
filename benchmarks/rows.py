"""Rows of a JSON file of pytest-benchmark, as the suite's conftest.py fills it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Results(NamedTuple):
    """A result file: ``rows`` in the order in which they ran, ``cpu`` the processor's name."""

    rows: list[Row]
    cpu: str

    def of(self, test: str, **wanted: object) -> list[Row]:
        """The rows of one test function that have these values."""
        return [r for r in self.rows if r["test"] == test and all(r.get(k) == v for k, v in wanted.items())]


def read(path: Path) -> Results:
    """Each row is the test's own ``extra_info`` with ``name`` and ``test`` (the function)."""
    data = json.loads(path.read_text())
    rows = [
        {
            **row["extra_info"],
            "name": row["name"],
            "test": row["name"].partition("[")[0],
        }
        for row in data["benchmarks"]
    ]
    return Results(rows, data["machine_info"]["cpu"].get("brand_raw", "unknown processor"))
