"""Rows of a JSON file of pytest-benchmark, as the suite's conftest.py fills it, and how their values are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

RULES = {"local": "local", "through_time": "through_time", "backprop": "`Backprop()`"}


class Results(NamedTuple):
    """A result file: ``rows`` in the order in which they ran, ``cpu`` the processor's name, ``gpu`` its facts."""

    rows: list[Row]
    cpu: str
    gpu: Row

    def of(self, test: str, **wanted: object) -> list[Row]:
        """The rows of one test function that have these values."""
        return [r for r in self.rows if r["test"] == test and all(r.get(k) == v for k, v in wanted.items())]


def read(path: Path) -> Results:
    return results_of(json.loads(path.read_text()))


def results_of(data: dict[str, Any]) -> Results:
    """Each row is the test's own ``extra_info`` with ``name`` and ``test`` (the function)."""
    rows = [
        {
            **row["extra_info"],
            "name": row["name"],
            "test": row["name"].partition("[")[0],
        }
        for row in data["benchmarks"]
    ]
    machine = data["machine_info"]
    return Results(rows, machine["cpu"].get("brand_raw", "unknown processor"), machine.get("gpu", {}))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns are numbers, aligned to the right, unless their header begins with a space."""
    lines = [[name.strip() for name in header], ["---" if name.startswith(" ") else "--:" for name in header]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*lines, *rows])


def sizes(row: Row) -> str:
    return ", ".join(str(row[name]) for name in ("I", "H", "B", "T"))


def ms(seconds: float) -> str:
    """Milliseconds with three digits, whole from 100 on."""
    value = seconds * 1e3
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3}f}"


def met(row: Row) -> list[bool]:
    """Whether each of the row's targets is met: of ratio and of time, as far as there are any."""
    found = []
    if row.get("target_ratio") is not None:
        found.append(row["ratio"] >= row["target_ratio"])
    if row.get("target_seconds") is not None:
        found.append(row["seconds"] <= row["target_seconds"])
    return found


def verdict(row: Row) -> str:
    targets = []
    if row.get("target_ratio") is not None:
        targets.append(f"≥ {row['target_ratio']:.3g}")
    if row.get("target_seconds") is not None:
        targets.append(f"≤ {ms(row['target_seconds'])} ms")
    return ", ".join(f"{t} {'met' if ok else '**missed**'}" for t, ok in zip(targets, met(row), strict=True))
