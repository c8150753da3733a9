"""Sweeps: which runs, that each is what ``tpext train`` makes of it, and that nothing is lost or run twice."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from runs import SMALL, assert_same_run

import tpext
from tpext.experiments import Config, ConfigError, ImageConfig, sweep_plan
from tpext.experiments.commands import run as tpext_command
from tpext.experiments.runs import differing, load_metrics, load_runs
from tpext.experiments.sweep_folder import Lock, is_held
from tpext.experiments.sweep_plan import grid_of_arguments, grid_of_table, plan, read_file, with_options
from tpext.experiments.sweep_values import expand

pytestmark = pytest.mark.usefixtures("unrendered")


def words_of(**options: Any) -> list[str]:
    return [
        word for name, value in {**SMALL, **options}.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]


FIXED = words_of()

OWN = """
import os, shutil, signal, sys, time
from dataclasses import dataclass
from tpext.rules import Backprop, RegularizedInverse

@dataclass(frozen=True)
class Troubled(RegularizedInverse):
    trouble: str = "none"

    def __post_init__(self):
        super().__post_init__()
        # as one does whose network is too large for the memory, before it is at its folder
        if self.trouble == "killed" and "loky" in " ".join(sys.orig_argv):
            os.kill(os.getpid(), signal.SIGKILL)

    def feedback(self, weight_hh, *owned):
        if self.trouble == "error" and not os.path.exists("mended"):
            raise RuntimeError("the disk is full")
        if self.trouble == "removed":
            shutil.rmtree("all/runs/trouble=removed")
        if self.trouble == "no-table" and os.path.isfile("all/table.csv"):
            os.remove("all/table.csv")
            os.mkdir("all/table.csv")
        if self.trouble == "slow":
            time.sleep(0.1)
        return super().feedback(weight_hh, *owned)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tpext", "sweep", *arguments]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tpext.__file__).parents[1]), "OMP_WAIT_POLICY": "passive"}


def sweep(folder: Path, *arguments: str, status: int = 0) -> str:
    """Run the command in a process of its own, in a folder that has no sources of the package."""
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- which runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,,2", "lr must be a list of values with commas in between, got '1,,2'"),
        ("1e-3,1e-3", "got 1e-3 twice"),
        ("5..1", "lr must be a range that goes up, got 5..1"),
        ("1..1000000000", "lr must be a range of at most 10000 integers, got 1..1000000000"),
        ("0.0..1.0:3", "lr must be a range that goes up from above 0, as it goes by ratios"),
        ("1e-3..5e-2", r"lr must be a range of whole decades, or have a number of values \(:N\)"),
        ("1e-3..1e-1:1", "lr must be a range of at least 2 values"),
    ],
)
def test_values_that_are_no_list_or_range_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand("lr", text)


def test_paths_and_words_are_no_ranges() -> None:
    assert expand("rule", "../mine.py:Mine") == ["../mine.py:Mine"]
    assert grid_of_arguments(["--data-dir", "../a,b"]) == {"data_dir": [("../a,b",)]}


def test_all_combinations_are_planned_the_last_option_fastest() -> None:
    runs, varied = plan("temporal-order", [grid_of_arguments([*FIXED, "--lr", "1e-3,1e-2", "--seed=1..2"])])
    assert varied == ["lr", "seed"]
    assert [run.name for run in runs] == ["lr=1e-3,seed=1", "lr=1e-3,seed=2", "lr=1e-2,seed=1", "lr=1e-2,seed=2"]
    assert [(run.config.lr, run.config.seed) for run in runs] == [(1e-3, 1), (1e-3, 2), (1e-2, 1), (1e-2, 2)]


def test_options_of_one_rule_do_not_multiply_runs_of_another() -> None:
    words = ["--rule", "backprop,regularized-inverse", "--reg", "1,10", "--credit", "local"]
    runs, _ = plan("temporal-order", [grid_of_arguments([*FIXED, *words])])
    rules = [getattr(run.config, "rule") for run in runs]  # noqa: B009  (of either kind of configuration)
    assert [rule.reg for rule in rules] == [0.0, 1.0, 10.0]
    with pytest.raises(ConfigError, match="reg does not belong to rule=backprop"):
        plan("temporal-order", [grid_of_arguments([*FIXED, "--rule", "backprop", "--reg", "1"])])


def test_spaces_part_the_numbers_of_one_value_but_no_path(here: Path) -> None:
    Path("my own").mkdir()
    Path("my own/own.py").write_text(OWN)
    runs, _ = plan("temporal-order", [grid_of_arguments([*FIXED, "--rule", "my own/own.py:Troubled,backprop"])])
    assert [run.name for run in runs] == ["rule=Troubled", "rule=backprop"]
    assert grid_of_arguments(["--sizes", "64 32, 8"]) == grid_of_table({"sizes": ["64 32", "8"]})


def test_switches_of_files_are_true_or_false() -> None:
    runs, _ = plan("temporal-order", [{**grid_of_arguments(FIXED), **grid_of_table({"tensorboard": True})}])
    assert [run.config.tensorboard for run in runs if isinstance(run.config, Config)] == [True]
    runs, _ = plan("images", [grid_of_table({"dataset": "digits", "augment": [True, False]})])
    assert [run.config.augment for run in runs if isinstance(run.config, ImageConfig)] == [True, False]


def test_of_hundreds_of_runs_each_value_is_read_once_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[list[str]] = []
    read = sweep_plan.tyro.cli

    def counted(kind: Any, **options: Any) -> Any:
        parsed.append([field.name for field in dataclasses.fields(kind)])
        return read(kind, **options)

    monkeypatch.setattr(sweep_plan.tyro, "cli", counted)
    runs, _ = plan("temporal-order", [grid_of_arguments([*FIXED, "--lr", "1e-4,1e-3", "--seed", "1001..1150"])])
    assert len(runs) == 300
    # others of the process may have read the fixed ones
    assert 150 <= len(parsed) <= 152 + len(FIXED) // 2
    assert max(map(len, parsed)) == 1, "all options of a command take 100 ms"


def test_the_same_numbers_written_twice_are_one_run() -> None:
    runs, _ = plan("temporal-order", [grid_of_arguments([*FIXED, "--lr", "0.1,1e-1,1e-2"])])
    assert len(runs) == 2


def test_names_of_folders_are_short_safe_and_differ(here: Path) -> None:
    grid = grid_of_arguments(["--rule", "own.py:Troubled", "--rule-options", "trouble=none,error,killed/x"])
    runs, varied = plan("temporal-order", [{**grid, **grid_of_arguments(FIXED)}])
    assert varied == ["rule_options.trouble"]
    assert [run.name for run in runs] == ["trouble=none", "trouble=error", "trouble=killed_x"]
    grid = grid_of_arguments(["--sizes", ",".join(" ".join(["64"] * count) for count in (2, 60, 61))])
    names = [run.name for run in plan("mnist-mlp", [grid])[0]]
    assert names[0] == "sizes=64-64"
    assert max(map(len, names)) < 200
    assert len(set(names)) == 3


def test_other_optimizers_are_told_of(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "adding", "--rule", "own.py:Troubled,regularized-inverse", "--length", "12", "--dry-run"]
    told = (
        "optimizers differ (adam: own.py:Troubled; sgd: regularized-inverse); with --optimizer all runs have the same"
    )
    assert tpext_command(words) == 0
    assert told in capsys.readouterr().out
    assert tpext_command([*words, "--optimizer", "adam"]) == 0
    assert "optimizers differ" not in capsys.readouterr().out


def test_options_of_ones_own_rule_are_left_out_for_others(here: Path) -> None:
    words = ["--rule", "own.py:Troubled,backprop", "--rule-options", "trouble=none,error", "--lr", "1e-3"]
    runs, _ = plan("temporal-order", [grid_of_arguments([*FIXED, *words])])
    assert [run.name for run in runs] == ["rule=Troubled,trouble=none", "rule=Troubled,trouble=error", "rule=backprop"]
    with pytest.raises(ConfigError, match="rule_options belong to a rule of your own"):
        plan("temporal-order", [grid_of_arguments([*FIXED, "--rule", "backprop", "--rule-options", "trouble=none"])])


def test_a_combination_that_is_no_run_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^cell=gru,lr=1e-2: forget_bias belongs to a cell with a forget gate"):
        plan("temporal-order", [grid_of_arguments(["--cell", "lstm,gru", "--lr", "1e-2,1", "--forget-bias", "1"])])


def test_images_are_swept_too() -> None:
    runs, _ = plan("images", [grid_of_arguments(["--dataset", "digits", "--rule", "backprop", "--lr", "0.1,0.2"])])
    assert [run.config.lr for run in runs] == [(0.1,), (0.2,)]


TOML = """
task = "adding"
length = 12
seed = "1..2"

[[grid]]
rule = "backprop"
lr = [1e-3, 1e-2]

[[grid]]
rule = ["own.py:Troubled"]
rule_options = {reg = [1, 10]}
"""

YAML = """
task: adding
length: 12
seed: 1..2
grid:
  - {rule: backprop, lr: [1.0e-3, 1.0e-2]}
  - {rule: ["own.py:Troubled"], rule_options: {reg: [1, 10]}}
"""


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML)])
def test_a_file_has_grids(here: Path, name: str, text: str) -> None:
    Path(name).write_text(text)
    runs, varied = plan(*read_file(Path(name)))
    assert len(runs) == 8
    assert set(varied) == {"rule", "lr", "seed", "rule_options.reg"}
    assert runs[-1].name == "seed=2,rule=Troubled,reg=10"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length = 3", "a.toml must have a task, and options beside it"),
        ("task = ", "a.toml cannot be read: Invalid value"),
        ('task = "adding"\ngrid = 3', "a.toml: grid must be tables of options"),
        ('task = "adding"\nlr = {a = 1}', "lr must be numbers, texts, or lists of them"),
        ('task = "adding"\nout = "x"', "out is no option of a sweep's runs"),
        ('task = "adding"\nresume = true', "resume is no option of a sweep's runs"),
        ('task = "adding"\nlr = []', "lr must have a value, got an empty list"),
        ('task = "adding"\nthreads = [1, 2]', "threads must be one value"),
    ],
)
def test_a_file_that_is_no_sweep_is_named(here: Path, text: str, message: str) -> None:
    Path("a.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(*read_file(Path("a.toml")))


def test_values_of_a_table_are_those_of_the_command_line() -> None:
    words = ["--lr", "0.001,0.01", "--sizes", "64 64,32", "--seed", "1..2", "--tied", "True", "--reg", "1"]
    values = {"lr": [1e-3, 1e-2], "sizes": [[64, 64], [32]], "seed": "1..2", "tied": True, "reg": 1}
    assert grid_of_table(values) == grid_of_arguments(words)


# --- what comes of them ----------------------------------------------------------------------------------------------


def test_each_run_is_what_train_makes_of_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FIXED, "--rule", "backprop,regularized-inverse", "--seed", "1..2"]
    assert tpext_command(["sweep", "temporal-order", *words, "--jobs", "1", "--out", "all"]) == 0
    out = capsys.readouterr().out
    assert "4 complete" in out
    assert "table: all/table.csv" in out
    for rule in ("backprop", "regularized-inverse"):
        for seed in ("1", "2"):
            alone = ["train", "temporal-order", *FIXED, "--rule", rule, "--seed", seed, "--out", f"{rule}-{seed}"]
            assert tpext_command(alone) == 0
            assert_same_run(Path(f"{rule}-{seed}"), Path(f"all/runs/rule={rule},seed={seed}"))
            row = table(Path("all"))[f"rule={rule},seed={seed}"]
            result = json.loads(Path(f"{rule}-{seed}/result.json").read_text())
            assert (row["state"], row["rule"], row["seed"]) == ("complete", rule, seed)
            assert float(row["accuracy"]) == result["accuracy"]


def test_a_finished_sweep_runs_nothing_again_and_more_values_are_added(here: Path) -> None:
    first = ["sweep", "temporal-order", *FIXED, "--lr", "1e-3,1e-2", "--jobs", "1"]
    assert tpext_command(first) == 0
    folder = Path("sweeps/temporal-order")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*") if path.name != "lock"}
    assert tpext_command(first) == 0
    assert tpext_command(["sweep", str(folder), "--jobs", "1"]) == 0
    more = ["sweep", "temporal-order", *FIXED, "--lr", "1e-3,1e-2,1e-1", "--jobs", "1"]
    assert tpext_command(more) == 1  # another sweep, by default in the same folder
    assert tpext_command([*more, "--out", str(folder)]) == 0
    assert tpext_command(["sweep", "temporal-order", *FIXED, "--lr", "1", "--out", str(folder), "--jobs", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(table(folder)) == 4


def test_runs_of_several_commands_are_told_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ["sweep", "temporal-order", *FIXED, "--lr", "1e-3,1e-2", "--jobs", "1", "--out", "all"]
    assert tpext_command([*first, "--credit", "local"]) == 0
    assert "credit" not in (Path("all") / "table.csv").read_text()
    assert tpext_command([*first, "--credit", "through_time"]) == 0
    assert {(row["lr"], row["credit"]) for row in table(Path("all")).values()} == {
        (lr, credit) for lr in ("0.001", "0.01") for credit in ("local", "through_time")
    }
    assert "lr 0.001, credit local" in capsys.readouterr().out


def test_runs_that_differ_in_the_seed_have_a_mean(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tpext_command(["sweep", "temporal-order", *FIXED, "--seed", "1..2", "--jobs", "1", "--out", "all"]) == 0
    accuracies = [float(row["accuracy"]) for row in table(Path("all")).values()]
    assert f"{sum(accuracies) / 2:.2%} ({min(accuracies):.2%} to {max(accuracies):.2%})" in capsys.readouterr().out


def test_options_of_one_rule_leave_the_other_grids_of_a_file_alone(here: Path) -> None:
    Path("a.toml").write_text(
        'task = "adding"\n[[grid]]\nrule = "backprop"\nlr = [1e-3, 1e-2]\n[[grid]]\nrule = "regularized-inverse"'
    )
    task, grids = read_file(Path("a.toml"))
    given = grid_of_arguments(["--reg", "1,10", "--length", "12"])
    runs, _ = plan(task, with_options(task, grids, given))
    assert [run.name for run in runs] == [
        "rule=backprop,lr=0.001",
        "rule=backprop,lr=0.01",
        "rule=regularized-inverse,reg=1",
        "rule=regularized-inverse,reg=10",
    ]
    assert {run.config.task.length for run in runs} == {12}


def test_values_of_several_numbers_stand_in_the_table_as_on_the_command_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--sizes", "8 8,4", "--iterations", "4", "--jobs", "1", "--out", "all"]
    assert tpext_command(["sweep", "xor", *words]) == 0
    assert re.search(r"%  test loss [0-9.]+  sizes 8 8$", capsys.readouterr().out, re.MULTILINE)
    assert [row["sizes"] for row in table(Path("all")).values()] == ["4", "8 8"]


def test_failures_are_kept_and_stop_nobody(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FIXED, "--rule", "own.py:Troubled", "--rule-options", "trouble=none,error", "--lr", "1e-3,1e30"]
    arguments = ["sweep", "temporal-order", *words, "--jobs", "1", "--out", "all"]
    assert tpext_command(arguments) == 1
    assert "failed: RuntimeError: the disk is full" in capsys.readouterr().out
    states = {run: row["state"] for run, row in table(Path("all")).items()}
    assert states == {
        "trouble=none,lr=1e-3": "complete",
        "trouble=none,lr=1e30": "diverged",
        "trouble=error,lr=1e-3": "failed",
        "trouble=error,lr=1e30": "failed",
    }
    assert "RuntimeError" in json.loads(Path("all/runs/trouble=error,lr=1e-3/failure.json").read_text())["details"]
    diverged = Path("all/runs/trouble=none,lr=1e30/failure.json")
    before = diverged.stat().st_mtime_ns
    Path("mended").touch()
    assert tpext_command(arguments) == 0
    assert sorted(row["state"] for row in table(Path("all")).values()) == [
        "complete",
        "complete",
        "diverged",
        "diverged",
    ]
    assert diverged.stat().st_mtime_ns == before


def test_missing_data_is_told_once_and_leaves_its_runs_open(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TPEXT_DATA", "empty")
    words = ["--network", "mlp", "--channels", "8", "--train-size", "50", "--epochs", "1", "--rule", "backprop"]
    arguments = ["sweep", "images", "--dataset", "cifar10,digits", *words, "--seed", "1..2", "--jobs", "1"]
    assert tpext_command([*arguments, "--out", "all"]) == 1
    said = capsys.readouterr()
    assert re.fullmatch(r"tpext: .*CIFAR-10.* \(2 of 4 runs wait for it\)\n", said.err)
    assert "failed" not in said.out
    assert sorted(row["state"] for row in table(Path("all")).values()) == ["complete", "complete", "waiting", "waiting"]
    assert not list(Path("all").glob("runs/*/failure.json"))


def test_a_run_whose_folder_is_removed_stops_nobody_and_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FIXED, "--rule", "own.py:Troubled", "--rule-options", "trouble=removed,none", "--jobs", "1"]
    assert tpext_command(["sweep", "temporal-order", *words, "--out", "all"]) == 1
    assert "not ended, for a process that was stopped, or a folder removed: all/runs/trouble=removed" in (
        capsys.readouterr().out
    )
    assert {run: row["state"] for run, row in table(Path("all")).items()} == {"trouble=none": "complete"}


def test_a_table_that_cannot_be_written_stops_the_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FIXED, "--rule", "own.py:Troubled", "--rule-options", "trouble=no-table,slow", "--jobs", "1"]
    assert tpext_command(["sweep", "temporal-order", *words, "--out", "all"]) == 1
    assert "all/table.csv cannot be written" in capsys.readouterr().err
    assert not Path("all/runs/trouble=slow/result.json").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_process_that_dies_takes_no_other_run_with_it(here: Path, jobs: str) -> None:
    words = [*FIXED, "--rule", "own.py:Troubled", "--rule-options", "trouble=none,killed", "--seed", "1..2"]
    out = sweep(here, "temporal-order", *words, "--jobs", jobs, "--out", "all", status=1)
    states = {run: row["state"] for run, row in table(here / "all").items()}
    assert states == {
        "trouble=none,seed=1": "complete",
        "trouble=none,seed=2": "complete",
        "trouble=killed,seed=1": "failed",
        "trouble=killed,seed=2": "failed",
    }
    assert "its process was killed" in out
    assert "a process was killed (out of memory?)" in out


LONG = words_of(iterations=150, checkpoint_interval=1)
"""So that it can be stopped in mid run."""
SWEEP = ["temporal-order", *LONG, "--seed", "1..4", "--jobs", "2", "--out", "all"]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A sweep of four runs, in a session of its own as in a terminal."""
    return subprocess.Popen(
        command(*SWEEP, *more),
        env=ENVIRONMENT,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_while_the_processes_start_is_one_line(here: Path) -> None:
    with start(here, "--stack", "1") as process:
        assert process.stdout is not None
        while "2 at a time" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(1)  # they import torch
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in out.splitlines() if "/4" not in line] == [
        "tpext: interrupted; runs that were begun have a checkpoint; the same command goes on from there"
    ]


def begin(folder: Path) -> subprocess.Popen[str]:
    """A sweep of four runs, two of which are under way."""
    process = start(folder)
    deadline = time.monotonic() + 120
    while len([path for path in folder.glob("all/runs/*/metrics.csv") if path.read_text().count("\n") > 3]) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the sweep does not get on"
        time.sleep(0.002)
    return process


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT],
    ids=lambda number: number.name,
)
def test_a_sweep_goes_on_where_it_was_stopped(here: Path, number: signal.Signals) -> None:
    with begin(here) as process:
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does it
        else:
            process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, out
        assert "the same command goes on from there" in out
        assert {row["state"] for row in table(here / "all").values()} <= {"complete", "started", "waiting"}
    complete = {path: path.stat().st_mtime_ns for path in here.glob("all/runs/*/result.json")}
    assert len(complete) < 4
    sweep(here, *SWEEP)
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
    assert [row["state"] for row in table(here / "all").values()] == ["complete"] * 4
    for seed in "1", "2":
        assert tpext_command(["train", "temporal-order", *LONG, "--seed", seed, "--out", f"alone-{seed}"]) == 0
        assert_same_run(here / f"alone-{seed}", here / f"all/runs/seed={seed}")


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_clusters_carry_out_runs(here: Path, engine: str, package: str) -> None:
    pytest.importorskip(package)
    words = [*FIXED, "--rule", "own.py:Troubled", "--rule-options", "trouble=none,error", "--jobs", "2"]
    sweep(here, "temporal-order", *words, "--engine", engine, "--out", "all", status=1)
    states = {run: row["state"] for run, row in table(here / "all").items()}
    assert states == {"trouble=none": "complete", "trouble=error": "failed"}
    alone = ["train", "temporal-order", *FIXED, "--rule", "own.py:Troubled", "--out", "alone"]
    assert tpext_command(alone) == 0
    assert_same_run(here / "alone", here / "all/runs/trouble=none")


def test_a_cluster_that_is_not_installed_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert tpext_command(["sweep", "temporal-order", *FIXED, "--engine", "ray"]) == 1
    assert 'engine ray is not installed: pip install "tpext[ray]"' in capsys.readouterr().err


def test_workers_see_that_their_sweep_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = Lock(path), Lock(path)
    assert not is_held(path, first.word)
    first.take()
    assert is_held(path, first.word)
    first.release()
    assert not is_held(path, first.word)
    second.take()
    assert not is_held(path, first.word)
    second.release()


def test_one_sweep_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("all").mkdir()
    lock = Lock(Path("all/lock"))
    lock.take()
    assert tpext_command(["sweep", "temporal-order", *FIXED, "--out", "all"]) == 1
    assert "another process is at this sweep" in capsys.readouterr().err
    lock.release()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["temporal-order", "--jobs", "0"], "jobs must be an integer >= 1, got 0"),
        (["temporal-order", "--device", "cuda:99"], "device must be cpu"),
        (["temporal-order", "--address", "there"], "address belongs to --engine ray and dask"),
        (["temporal-order", "--lr", "1e-3", "--lr", "1e-2"], "lr must be given once, with commas between its values"),
        (["temporal-order", "--resume"], "resume is no option of a sweep's runs"),
        (["sorting"], "task must be one of"),
        (["missing.toml"], "missing.toml cannot be read"),
    ],
)
def test_bad_commands_are_named(
    here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tpext_command(["sweep", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not Path("sweeps").exists()


def test_an_unknown_option_is_told_as_train_tells_it(here: Path) -> None:
    assert tpext_command(["sweep", "temporal-order", "--lrr", "1e-3,1e-2"]) == 2
    assert not Path("sweeps").exists()


def test_a_dry_run_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("temporal-order").mkdir()  # a sweep's that --out has named like its task
    Path("temporal-order/sweep.json").write_text("{}")
    assert tpext_command(["sweep", "temporal-order", *FIXED, "--seed", "1..3", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == ["seed=1", "seed=2", "seed=3", "3 runs in sweeps/temporal-order"]
    assert not Path("sweeps").exists()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_runs_are_read_as_tables(here: Path) -> None:
    words: list[Any] = [*FIXED, "--rule", "backprop,regularized-inverse", "--lr", "1e-3,1e-2", "--jobs", "1"]
    assert tpext_command(["sweep", "temporal-order", *words, "--out", "all"]) == 0
    runs = load_runs("all")
    assert len(runs) == 4
    assert {"rule", "lr", "head_lr"} <= set(differing(runs))
    assert "threads" not in differing(runs)
    assert set(runs.state) == {"complete"}
    assert runs[runs.rule == "backprop"].reg.isna().all()
    rows = load_metrics("all")
    assert len(rows) == 4 * 5  # iterations 0, 6, 12, 18 and 20
    assert set(rows.columns) >= {"folder", "iteration", "accuracy", "rule", "lr", "seed"}
    assert set(differing(runs)) == set(differing(pd.concat([runs[:2], runs[2:]]))) == set(differing(runs.copy()))
    assert len(load_runs()) == len(load_metrics()) == 0
    last = rows[rows.iteration == 20].set_index("folder").accuracy
    assert (last == runs.set_index("folder").accuracy).all()
