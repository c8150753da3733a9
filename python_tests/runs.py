"""What tests of training runs share: reading a run's folder, comparing runs bit for bit, stopping one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from tpext.experiments.image_folder import open_folder
from tpext.experiments.loop import Run


def checkpoint(folder: Path) -> dict[str, Any]:
    state = open_folder(folder).load_checkpoint()
    assert state is not None
    return state


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv as text, without the time."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) >= 0
    return rows


def same(left: Any, right: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def assert_same_run(left: Path, right: Path) -> None:
    first, second = checkpoint(left), checkpoint(right)
    assert first.keys() == second.keys()
    for key in first.keys() - {"rows", "seconds"}:
        assert same(first[key], second[key]), f"{key} differs"
    assert metrics(left) == metrics(right)


class Killed(Exception):  # noqa: N818  (it stands for a kill, not for an error)
    pass


def kill_after(iteration: int, run: type[Run[Any, Any, Any]], patch: pytest.MonkeyPatch) -> None:
    """Let runs of a class end after an iteration, before its checkpoint."""
    step = run._step

    def stopping(self: Run[Any, Any, Any], number: int) -> None:
        step(self, number)
        if number == iteration:
            raise Killed

    patch.setattr(run, "_step", stopping)
