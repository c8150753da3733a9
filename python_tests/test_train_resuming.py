"""Runs that were stopped: they resume bit for bit, and what is wrong in their folder is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    DELETED,
    SMALL,
    Killed,
    assert_edits_are_named,
    assert_same_run,
    checkpoint,
    kill_after,
    metrics,
    small,
)

import tpext
from tpext.experiments import make_config
from tpext.experiments import run_folder as run_folder_module
from tpext.experiments import train as train_module
from tpext.experiments.figures import draw_task
from tpext.experiments.model import make_model
from tpext.experiments.run_folder import RunError, RunFolder
from tpext.experiments.train import train

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "learned-inverse", "noise": 0.1, "momentum": 0.9},
        {"rule": "backprop", "optimizer": "adam"},
        {"layers": 2, "optimizer": "rmsprop", "precision": "64"},
    ],
)
@pytest.mark.parametrize("stop", [1, 9, 18])
def test_resuming_changes_nothing(
    options: dict[str, Any], stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(**options)
    train(config, tmp_path / "whole")

    kill_after(stop, train_module.TrainingRun, monkeypatch)
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "result.json").exists()
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_kill_9_in_mid_run_changes_nothing(tmp_path: Path) -> None:
    """Two kills at arbitrary moments of a process that checkpoints at every iteration, many of them while it writes."""
    options = {**SMALL, "iterations": 500, "eval_interval": 10, "checkpoint_interval": 1, "noise": 0.1}
    train(make_config("temporal-order", rule="learned-inverse", **options), tmp_path / "whole")

    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tpext", "train", "temporal-order", "--rule", "learned-inverse", "--resume"]
    command += ["--out", str(folder)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tpext.__file__).parents[1])}
    for rows in (10, 30):
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path) as process:
            deadline = time.monotonic() + 120
            table = folder / "metrics.csv"
            while not table.exists() or table.read_text().count("\n") < rows:
                assert process.poll() is None, "the run ended before it could be killed"
                assert time.monotonic() < deadline, "the run does not get on"
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "result.json").exists()
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "resuming after iteration" in finished.stdout
    assert_same_run(tmp_path / "whole", folder)


def test_a_checkpoint_cut_short_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    train(config, tmp_path / "whole")

    def no_space(source: Path, target: Path) -> None:
        if target.name == "checkpoint.pt" and checkpoint_saved(target) >= 8:
            raise OSError("no space left")
        replace_file(source, target)

    def checkpoint_saved(path: Path) -> int:
        return checkpoint(path.parent)["iteration"] if path.exists() else -1

    replace_file = os.replace
    monkeypatch.setattr(run_folder_module.os, "replace", no_space)
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be written: no space left"):
        train(config, tmp_path / "cut")
    monkeypatch.undo()
    part = tmp_path / "cut" / "checkpoint.pt.new"
    assert not part.exists()
    part.write_bytes((tmp_path / "cut" / "checkpoint.pt").read_bytes()[:100])  # a kill leaves such a part
    assert checkpoint(tmp_path / "cut")["iteration"] == 8
    train(config, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_saves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(rule="learned-inverse", noise=0.1)
    train(config, tmp_path / "whole")
    step = train_module.TrainingRun._step

    def interrupted(run: Any, iteration: int) -> Iterator[Any]:
        if iteration == 9:
            os.kill(os.getpid(), signal.SIGINT)
        yield from step(run, iteration)

    monkeypatch.setattr(train_module.TrainingRun, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="a checkpoint is saved at iteration 9"):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert checkpoint(tmp_path / "stopped")["iteration"] == 9
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Any, iteration: int) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C was not heard")

    monkeypatch.setattr(train_module.TrainingRun, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(small(), tmp_path)
    assert checkpoint(tmp_path)["iteration"] == 0


def test_one_process_at_a_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked():
        for resume in (False, True):
            with pytest.raises(RunError, match="another process is running this run"):
                train(small(), tmp_path, resume=resume)
    train(small(), tmp_path)


def test_a_complete_run_is_left_alone(tmp_path: Path) -> None:
    config = small()
    result = train(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert train(config, tmp_path, resume=True) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_only_the_last_files_missing(tmp_path: Path) -> None:
    """Killed between the last checkpoint and the result."""
    config = small()
    result = train(config, tmp_path)
    rows = metrics(tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "curve.png").unlink()
    again = train(config, tmp_path, resume=True)
    assert replace(again, seconds=result.seconds) == result
    assert metrics(tmp_path) == rows
    assert (tmp_path / "curve.png").exists()


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    train(small(), tmp_path)
    with pytest.raises(RunError, match=r"already holds a run: take another folder .*--resume"):
        train(small(), tmp_path)
    with pytest.raises(RunError, match=r"hidden_size is 8 there, 9 was asked for\. Pass another --out"):
        train(small(hidden_size=9), tmp_path, resume=True)
    with pytest.raises(RunError, match=r"another run: reg is 10\.0 there, 2\.0 was asked for"):
        train(small(reg=2.0), tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be a run's folder"):
        train(small(), tmp_path / "file")
    (tmp_path / "config.json").unlink()
    with pytest.raises(RunError, match=r"holds metrics\.csv but no config\.json, so it cannot be continued"):
        train(small(), tmp_path, resume=True)


@pytest.mark.parametrize("name", ["config.json", "result.json", "checkpoint.pt", "metrics.csv"])
@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "\xff", '{"task": "adding"}'])
def test_a_broken_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    train(small(), tmp_path)
    if name != "result.json":
        (tmp_path / "result.json").unlink()
    if name == "metrics.csv":
        (tmp_path / "checkpoint.pt").unlink()
        content += "\n"
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(RunError, match=f"{name}: not (a|the) "):
        train(small(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("length", "10"),
        ("task", 3),
        ("rule", "learned-inverse"),
        ("device", 0),
        ("data_dir", 1),
        ("chunk", 1.5),
    ],
)
def test_a_wrong_field_of_a_configuration_is_refused(name: str, value: object, tmp_path: Path) -> None:
    train(small(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, name: value}))
    with pytest.raises(RunError, match=r"config\.json: not the configuration"):
        RunFolder(tmp_path).read_config()


def test_a_wrong_field_of_a_result_is_refused(tmp_path: Path) -> None:
    train(small(), tmp_path)
    values = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**values, "accuracy": "high"}))
    with pytest.raises(RunError, match=r"result\.json: accuracy must be of type .*float.*, got 'high'"):
        train(small(), tmp_path, resume=True)


@pytest.mark.parametrize(
    "later", [("validation_loss", "measures"), ("validation_loss", "measures", "running_accuracy")]
)
def test_a_run_of_an_earlier_version_is_read(later: tuple[str, ...], tmp_path: Path) -> None:
    """Without the validation loss, or the running accuracy either, and without a choice of cells."""
    result = train(small(), tmp_path)
    folder = RunFolder(tmp_path)
    config = json.loads(folder.config.read_text())
    assert config.pop("cell") == "rnn"
    folder.config.write_text(json.dumps(config))
    columns = len(later) - 1
    lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("".join(line.rsplit(",", columns)[0] + "\n" for line in lines))
    stored = json.loads(folder.result.read_text())
    for name in later:
        del stored[name]
    folder.result.write_text(json.dumps(stored))
    assert folder.read_result() == result
    assert [row.accuracy for row in folder.read_rows()][-1] == result.accuracy
    state = checkpoint(tmp_path)
    del state["format"]
    folder.save_checkpoint({**state, "rows": [row[:-columns] for row in state["rows"]]})
    folder.result.unlink()
    again = train(small(), tmp_path, resume=True)
    assert replace(again, seconds=0.0) == replace(result, seconds=0.0)


def test_a_lost_or_cut_checkpoint_is_told(tmp_path: Path) -> None:
    train(small(), tmp_path)
    (tmp_path / "result.json").unlink()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint\.pt: not a readable checkpoint"):
        train(small(), tmp_path, resume=True)
    torch.save({"format": 1, "iteration": 4, "model": {}}, path)
    with pytest.raises(RunError, match=r"checkpoint\.pt: not a checkpoint of this run"):
        train(small(), tmp_path, resume=True)
    path.unlink()
    with pytest.raises(RunError, match=r"checkpoint\.pt is missing, and metrics\.csv goes to iteration 20"):
        train(small(), tmp_path, resume=True)
    assert len(metrics(tmp_path)) == 5, "the metrics stay"


def test_the_curve_starts_before_the_first_step(tmp_path: Path) -> None:
    """Its training loss is that of the first batch."""
    config = small(precision="64")
    torch.manual_seed(config.seed)
    task = config.make_task()
    model = make_model(config, task).double()
    input, target = task.batch(config.seed, 0, config.batch_size)
    train(config, tmp_path)
    expected = torch.nn.functional.cross_entropy(model(input.double()), target).item()
    assert float(metrics(tmp_path)[0]["train_loss"]) == pytest.approx(expected, rel=1e-12)


def test_the_time_before_a_stop_counts(tmp_path: Path) -> None:
    train(small(), tmp_path)
    (tmp_path / "result.json").unlink()
    state = checkpoint(tmp_path)
    torch.save({**state, "seconds": 1000.0, "iteration": 18, "rows": state["rows"][:-1]}, tmp_path / "checkpoint.pt")
    assert 1000 < train(small(), tmp_path, resume=True).seconds < 1100


EDITS = [
    ('["iteration"]', -3, "iteration must be an integer >= 0, got -3"),
    ('["iteration"]', "x", "iteration must be of type int, got 'x'"),
    ('["iteration"]', True, "iteration must be of type int, got True"),
    ('["iteration"]', 21, "iteration must be at most 20, got 21"),
    ('["iteration"]', DELETED, "iteration is missing"),
    ('["losses"]', 3, "losses must be of type list[float], got 3"),
    ('["losses"]', ["x"], "losses must be of type list[float], got ['x']"),
    ('["rows"]', [], "rows must be a list of at least one evaluation, got []"),
    ('["rows"]', DELETED, "rows is missing"),
    ('["rows"][1]', "x", "rows[1] must be a list of iteration, train_loss, test_loss, accuracy, seconds"),
    ('["rows"][1][3]', "x", "rows[1].accuracy must be of type float, got 'x'"),
    ('["rows"][1][0]', 0, "rows[1].iteration must be an integer >= 1, got 0"),
    ('["rows"][4:]', [], "iteration of the last of rows must be an integer >= 20, got 18"),
    ('["seconds"]', "x", "seconds must be a number >= 0, got 'x'"),
    ('["seconds"]', DELETED, "seconds is missing"),
    ('["random_state"]', 3, "random_state must be a state of torch's generator, got 3"),
    ('["random_state"]', torch.zeros(3), "random_state must be a state of torch's generator, got a tensor [3]"),
    ('["model"]', DELETED, "model is missing"),
    ('["model"]', "x", "model must be the state of this run's SequenceModel, got another"),
    ('["model"]["head.bias"]', DELETED, 'Missing key(s) in state_dict: "head.bias"'),
    ('["model"]["head.bias"]', torch.zeros(7), "size mismatch for head.bias"),
    ('["model"]["head.bias"]', 3, "head.bias"),
    ('["optimizer"]', None, "optimizer must be the state of this run's Adam, got another"),
    ('["optimizer"]["param_groups"]', [], "optimizer must be the state of this run's Adam, got another"),
    ('["optimizer"]["param_groups"][0]["lr"]', "x", "optimizer.param_groups[0].lr must be a number >= 0, got 'x'"),
    ('["optimizer"]["param_groups"][0]["lr"]', DELETED, "optimizer.param_groups[0].lr is missing"),
    ('["optimizer"]["param_groups"][1]["betas"]', 3, "optimizer.param_groups[1].betas must be of type tuple"),
    ('["optimizer"]["state"][1]', 3, "optimizer must be the state of this run's Adam, got another"),
    ('["optimizer"]["state"][1]["exp_avg"]', DELETED, "optimizer.state[1] must have the keys step, exp_avg"),
    ('["optimizer"]["state"][1]["exp_avg"]', torch.zeros(2, 9), "optimizer.state[1].exp_avg must be a tensor [8, 8]"),
    ('["optimizer"]["state"][1]["exp_avg"]', 3.5, "optimizer.state[1].exp_avg must be a tensor [8, 8], got 3.5"),
    ('["reverse_optimizer"]', DELETED, "reverse_optimizer is missing"),
]  # fmt: skip


def test_an_edited_field_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    config = small(rule="learned-inverse", optimizer="adam")
    train(config, tmp_path)
    (tmp_path / "result.json").unlink()
    assert_edits_are_named(tmp_path, EDITS, lambda: train(config, tmp_path, resume=True))


def test_an_edited_checkpoint_is_named_where_its_task_is_drawn(tmp_path: Path) -> None:
    train(small("spiral", length=None, hidden_size=None, sizes=(4,)), tmp_path)
    edits = [('["model"]', DELETED, "model is missing"), ('["iteration"]', DELETED, "iteration is missing")]
    assert_edits_are_named(tmp_path, edits, lambda: draw_task(tmp_path))


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    config = small()
    train(config, tmp_path)
    (tmp_path / "result.json").unlink()
    torch.save({"format": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="format 99, this version reads 1"):
        train(config, tmp_path, resume=True)
