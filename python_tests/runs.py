"""What tests of training runs share: reading a run's folder, comparing runs bit for bit, stopping one."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tpext.experiments import Config, make_config
from tpext.experiments.cli import main
from tpext.experiments.image_folder import open_folder
from tpext.experiments.loop import Run
from tpext.experiments.run_folder import RunError

DELETED = object()

SMALL: dict[str, Any] = {
    "length": 10,
    "hidden_size": 8,
    "batch_size": 5,
    "test_size": 40,
    "iterations": 20,
    "eval_interval": 6,
    "checkpoint_interval": 4,
    "threads": 1,
}


def small(task: str = "temporal-order", **options: Any) -> Config:
    return make_config(task, **{**SMALL, **options})


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


def assert_last_good(folder: Path, iteration: int) -> None:
    state = checkpoint(folder)
    assert state["iteration"] == iteration
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not (folder / "result.json").exists()
    assert all(float(row["test_loss"]) < float("inf") for row in metrics(folder))


class Killed(BaseException):  # it stands for a kill, not for an error
    pass


def kill_after(iteration: int, run: type[Run[Any, Any, Any]], patch: pytest.MonkeyPatch) -> None:
    """Let runs of a class end after an iteration, before its checkpoint."""
    step = run._step

    def stopping(self: Run[Any, Any, Any], number: int) -> Iterator[Any]:
        yield from step(self, number)
        if number == iteration:
            raise Killed

    patch.setattr(run, "_step", stopping)


def assert_edits_are_named(
    folder: Path, edits: list[tuple[str, Any, str]], resume: Callable[[], object], name: str = "checkpoint.pt"
) -> None:
    """Edits of a saved file, each by itself: resuming is one line that names the file and the field.

    Args:
        folder: of the run.
        edits: a place in the state, such as ``["iteration"]``; its value, or DELETED; what the line says.
        resume: continues the run.
        name: of the file.
    """
    path = folder / name
    whole = path.read_bytes()
    for place, value, message in edits:
        state = torch.load(path, weights_only=True)
        scope = {"state": state, "value": value}
        exec(f"del state{place}" if value is DELETED else f"state{place} = value", scope)
        torch.save(state, path)
        with pytest.raises(RunError) as caught:
            resume()
        text = str(caught.value)
        assert text.startswith(f"{path}: not a checkpoint of this run: ")
        assert message in text
        assert "\n" not in text
        path.write_bytes(whole)


def call(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, output and errors of a command line of ``tpext``."""
    status = main(line.split())
    captured = capsys.readouterr()
    return status, captured.out, captured.err
