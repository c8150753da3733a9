"""What a sweep says of its runs while they go on."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from runs import small

from tpext.experiments import make_config, make_image_config, sweep_progress
from tpext.experiments.image_folder import ImageFolder, ImageRow
from tpext.experiments.run_folder import Failure, Row, RunFolder
from tpext.experiments.sweep_progress import SweepProgress, share_done, summarize


def evaluated(folder: RunFolder, *iterations: int) -> None:
    folder.write_rows([Row(iteration, 1.0, 1.0, 0.5, 1.0) for iteration in iterations])


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    folders = [RunFolder(tmp_path / name) for name in "abc"]
    for folder in folders:
        folder.path.mkdir()
        folder.create(small())  # of 20 iterations
    return folders


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(sweep_progress, "QUIET_SECONDS", 0.0)
    return io.StringIO()


def test_runs_that_go_on_count_by_their_evaluations(runs: list[RunFolder], out: io.StringIO) -> None:
    evaluated(runs[0], 0, 6)
    progress = SweepProgress(Console(file=out, width=200), runs, jobs=2)
    assert progress.left() == ""  # no pace is known yet
    progress.look()
    assert out.getvalue() == "3 runs (1 started already), 2 at a time\n    0/3  1 begun\n"
    evaluated(runs[0], 0, 6, 12)
    evaluated(runs[1], 0)
    assert progress.look()
    progress.started -= 60  # 0.3 of a run in a minute, 2.4 runs are left
    assert re.fullmatch("about 8 min left", progress.left())
    evaluated(runs[0], 0, 6, 12, 18)
    evaluated(runs[1], 0, 6, 12)
    runs[2].write_failure(Failure(diverged=True, message="the loss is inf"))
    progress.look()
    assert "    1/3  c: the loss is inf  about " in out.getvalue()
    assert [progress.shares[run.path.name] for run in runs] == [0.9, 0.6, 1.0]
    for run in runs[:2]:
        run.write_failure(Failure(diverged=True, message="the loss is inf"))
    progress.look()
    assert progress.left() == ""


def test_a_pipe_hears_nothing_twice_in_a_minute(
    runs: list[RunFolder], out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_progress, "QUIET_SECONDS", 60.0)
    progress = SweepProgress(Console(file=out, width=200), runs, jobs=2)
    for _ in range(3):
        progress.look()
    assert out.getvalue() == "3 runs, 2 at a time\n"
    progress.told -= 61
    for _ in range(3):
        progress.look()
    assert out.getvalue() == "3 runs, 2 at a time\n    0/3  0 begun\n"


@pytest.mark.parametrize(
    ("options", "iterations", "share"),
    [
        ({}, (), 0.0),
        ({}, (0,), 0.0),
        ({}, (0, 6, 12, 18, 20), 1.0),
        ({"task": "digits-mlp", "epochs": 8}, (0, 14, 28), 0.25),
        ({"task": "digits-mlp", "epochs": 8, "eval_interval": 7}, (0, 7, 14), 0.0),
    ],
)
def test_shares(tmp_path: Path, options: dict[str, Any], iterations: tuple[int, ...], share: float) -> None:
    folder = RunFolder(tmp_path)
    folder.create(make_config(**options) if options else small())
    evaluated(folder, *iterations)
    assert share_done(folder, folder.read_config()) == share


def test_the_share_of_images_is_that_of_their_epochs(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    config = make_image_config(dataset="digits", epochs=10)
    folder.create(config)
    none = (None,) * len(config.block_names)
    folder.write_rows([ImageRow(30, 3, 1.0, 1.0, 0.5, None, 0.1, 1.0, none, none)])
    assert share_done(folder, folder.read_config()) == 0.3
    folder.path.joinpath("metrics.csv").unlink()
    assert share_done(folder, folder.read_config()) == 0.0


def test_settings_of_one_accuracy_stand_by_their_loss() -> None:
    table = pd.DataFrame(
        {"lr": [1.0, 2.0, 3.0], "state": "complete", "accuracy": [0.0, 0.0, 0.5], "test_loss": [300.0, 200.0, 400.0]}
    )
    file = io.StringIO()
    summarize(Console(file=file, width=100), table, ["lr"])
    assert [line.split() for line in file.getvalue().splitlines()[1:]] == [
        ["50.00%", "test", "loss", "400", "lr", "3.0"],
        ["0.00%", "test", "loss", "200", "lr", "2.0"],
        ["0.00%", "test", "loss", "300", "lr", "1.0"],
    ]
