"""The command line."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import call, checkpoint
from test_tasks import write_mnist

import tpext
from tpext.experiments import image_train
from tpext.experiments import train as train_module
from tpext.experiments.cli import main
from tpext.experiments.commands import Train, default_labels
from tpext.experiments.config import Config, make_config
from tpext.experiments.model import make_model, split_parameters
from tpext.experiments.progress import describe
from tpext.experiments.rule_names import RULES, SEQUENCE_RULES, rule_options
from tpext.experiments.run_folder import RunFolder
from tpext.experiments.settings import ConfigError
from tpext.experiments.task_names import task_options
from tpext.rules import RegularizedInverse
from tpext.tasks import TASKS

SMALL = "--length 10 --hidden-size 8 --batch-size 5 --test-size 40 --iterations 20 --eval-interval 10 --threads 1"
MODULE_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tpext.__file__).parents[1])}


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call("--help", capsys)
    assert status == 0
    for command in ("train", "compare", "tasks", "info"):
        assert command in out
    status, out, _ = call("train --help", capsys)
    assert status == 0
    for field in fields(Train):
        assert field.name == "task" or f"--{field.name.replace('_', '-')}" in out
    for name in TASKS:
        assert name in out
    shown = " ".join(out.replace("│", " ").split())
    interval, rows = "100, or the task's; with epochs an epoch", "20; feed-forward 100, or the task's"
    # choices of several rules, each once
    for choices in ("--correction {linearized,difference,none}", "--local-loss {pre,post}"):
        assert f"{choices} " in shown
    for default in (interval, rows, "500", "32", "orthogonal", "through_time", "sgd; feed-forward adam"):
        assert f"(default: {default})" in shown
    assert "least squares, regularized-least-squares)." in shown.replace("- ", "-").replace("-squares,", " squares,")
    assert "Number of steps. (temporal-order, temporal-order-3bit, adding, random-permutation, text)" in shown
    assert "What the layer below receives, always in gradient units (rule regularized-inverse)." in shown
    assert "Of the rule" not in shown, "every field of our rules is told of in its docstring"


def test_options_are_those_of_the_configuration() -> None:
    options_of_rules = {option for name in RULES for option in rule_options(name)}
    groups = {field.name for field in fields(Config)}, options_of_rules - {"reverse_lr"}, set(task_options())
    assert sum(map(len, groups)) == len(set().union(*groups)), "no option of a task or a rule has the name of a run's"
    expected = set().union(*groups, {"out", "resume", "task_options", "rule_options"})
    assert {field.name for field in fields(Train)} == expected


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call("info", capsys)
    assert status == 0
    build = tpext.build_info()
    for value in (build["version"], build["compiler"], *build["cpu_capabilities"], torch.__version__, "cpu"):
        assert str(value) in out
    assert ("this build of tpext has no CUDA kernels" in out) == (not build["cuda_architectures"])


def test_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call("tasks", capsys)
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert set(TASKS) <= set(lines)
    assert "60 steps of 6" in lines["temporal-order"]
    assert "|error| < 0.04" in lines["adding"]
    assert lines["permuted-mnist"].endswith("backprop (published), regularized-inverse (published)")
    assert lines["mnist-mlp"].endswith("kaczmarz (faust), regularized-least-squares (seely)")
    assert "784 numbers  784 numbers" in " ".join(lines["mnist-autoencoder"].split()).replace("numbers ", "numbers  ")
    assert "2 numbers" in lines["spiral"]


def test_train_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    status, out, err = call(
        f"train adding {SMALL} --out {folder} --lr 0.01 --credit local --normalize True --tensorboard", capsys
    )
    assert (status, err) == (0, "")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics.csv", "result.json", "curve.png", "checkpoint.pt", "tensorboard", "lock"}
    config = json.loads((folder / "config.json").read_text())
    assert config["task"] == {"name": "adding", "options": {"length": 10}}
    assert config["rule"] == {"name": "regularized-inverse", "options": {
        "reg": 1.0, "target_step": 0.1, "correction": "linearized", "credit": "local", "margin": 1e-3,
        "normalize": True, "input_rule": "gradient", "slope": "inverse", "slope_reg": 0.0,
        "unit_gain": False, "inverse": "branch", "gate_slope": "derivative", "candidate_slope": "derivative",
        "chebyshev_steps": None,
    }}  # fmt: skip
    assert f"curve: {folder / 'curve.png'}" in out
    assert "20 iterations" in out


def test_feed_forward_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path / "data")
    line = f"train mnist-autoencoder --data-dir {tmp_path / 'data'} --out {tmp_path / 'run'} --sizes 9 4 9 "
    line += "--rule difference-target-propagation "
    line += "--schedule alternating --epochs 2 --batch-size 5 --test-size 7 --threads 1 --noise 0.1 --correction none "
    line += "--order sequential_first --train-size 20 --reduction batch --optimizer centred-rmsprop --local-loss post"
    status, out, err = call(line, capsys)
    assert (status, err) == (0, "")
    assert "mnist-autoencoder, 9-4-9 tanh units, difference-target-propagation (correction none, target step 1" in out
    assert f"reconstructions: {tmp_path / 'run' / 'reconstruction.png'}" in out
    assert "16 iterations" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["sizes"], config["epochs"], config["iterations"]) == ([9, 4, 9], 2, None)
    status, out, _ = call(f"{line} --resume", capsys)
    assert status == 0
    assert "complete already" in out
    status, _, err = call(f"{line} --resume --sizes 9 5 9", capsys)
    assert status == 1
    assert "sizes is (9, 4, 9) there, (9, 5, 9) was asked for" in err


def test_tied_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path / "data")
    line = f"train mnist-autoencoder --tied True --data-dir {tmp_path / 'data'} --sizes 9 4 9 --iterations 4 "
    line += f"--batch-size 5 --test-size 7 --threads 1 --out {tmp_path / 'run'}"
    status, out, err = call(line, capsys)
    assert (status, err) == (0, "")
    assert "mnist-autoencoder, 9-4-9 tanh units, tied, regularized-least-squares" in out
    status, _, err = call(f"{line.replace('--tied True', '--tied False')} --resume", capsys)
    assert status == 1
    assert "tied is True there, False was asked for" in err


def test_direct_weight_solves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path / "data")
    line = f"train mnist-mlp --rule kaczmarz --data-dir {tmp_path / 'data'} --batch-size 5 --test-size 7 --threads 1 "
    run = tmp_path / "run"
    options = "--preset faust --epochs 2 --sizes 9 --dx regularized --dx-reg 2 --update exact --batch-reg 1 --std 0.1"
    options += " --relaxation 0.5 --damping 1 --first weights --keep-norm True"
    status, out, err = call(f"{line} {options} --out {run}", capsys)
    assert (status, err) == (0, "")
    assert "mnist-mlp, 9 relu units, kaczmarz (dx regularized, update exact), sgd 1, batch 5, seed 1" in out
    assert "running training accuracy" in out
    assert json.loads((run / "config.json").read_text())["rule"] == {"name": "kaczmarz", "options": {
        "relaxation": 0.5, "damping": 1.0, "dx": "regularized", "dx_reg": 2.0, "update": "exact", "batch_reg": 1.0,
        "first": "weights", "std": 0.1, "sticky": 0.0, "keep_norm": True,
    }}  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["running_accuracy"] < 0.01
    status, _, err = call(f"{line} --dx mean --std 1e18 --epochs 20 --out {tmp_path / 'far'}", capsys)
    assert status == 3
    assert "another --out with --dx regularized, a larger --dx-reg, a larger --batch-reg, or a smaller --std." in err


def test_toy_run_draws_its_decision_regions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "train xor-full --rule constrained-least-squares --sizes 8 --iterations 20 --batch-size 5 --test-size 40"
    status, out, err = call(f"{line} --out {tmp_path}", capsys)
    assert (status, err) == (0, "")
    assert f"decision regions: {tmp_path / 'decision.png'}" in out


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(f"train temporal-order --rule backprop --seed 7 {SMALL}", capsys)[0] == 0
    assert (tmp_path / "runs" / "temporal-order-backprop-7" / "result.json").exists()


def test_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train temporal-order {SMALL} --rule learned-inverse --out {tmp_path / 'run'}"
    assert call(line, capsys)[0] == 0
    status, _, err = call(line, capsys)
    assert status == 1
    assert "already holds a run" in err
    status, out, _ = call(f"train temporal-order --resume --out {tmp_path / 'run'}", capsys)
    assert status == 0
    assert "complete already" in out
    status, _, err = call(f"{line} --resume --hidden-size 9 --noise 0.5", capsys)
    assert status == 1
    assert "hidden_size is 8 there, 9 was asked for" in err
    assert "noise is 0.0 there, 0.5 was asked for" in err


def test_the_folder_is_that_of_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for cell, name in (("rnn", "adding-backprop-1"), ("gru", "adding-gru-backprop-1")):
        status, _, err = call(f"train adding {SMALL} --rule backprop --cell {cell}", capsys)
        assert status == 0, err
        assert (Path("runs") / name / "result.json").exists()


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version", capsys)[:2] == (0, f"tpext {tpext.__version__}\n")


def test_inputs_that_saturate_units_are_told_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("beside.py").write_text("SCALE = 1e3\n")
    large = "class Large(Adding):\n    def sample(self, random, size):\n        batch = super().sample(random, size)\n"
    large += "        return batch._replace(input=SCALE * batch.input)\n"
    Path("mine.py").write_text(f"from beside import SCALE\nfrom tpext.tasks import Adding\n\n\n{large}")
    status, _, err = call("train mine.py:Large --slope inverse --iterations 2 --test-size 20", capsys)
    assert status == 3
    assert "--slope derivative, smaller rates (--lr, --head-lr), a larger --reg, or inputs scaled to numbers" in err
    assert call("train mine.py:Large --iterations 2 --out ok", capsys)[0] == 0


def test_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rule in ("backprop", "regularized-inverse"):
        line = f"train adding {SMALL} --rule {rule} --nonlinearity relu --lr 1e30 --out {tmp_path / rule}"
        status, _, err = call(line, capsys)
        assert status == 3
        assert "tpext: diverged at iteration" in err
        assert "Start a new run in another --out with smaller rates (--lr, --head-lr)" in err
        assert ("--reg" in err) == (rule == "regularized-inverse")
        assert (tmp_path / rule / "checkpoint.pt").exists()
    line = f"train xor --iterations 20 --optimizer sgd --lr 1e38 --out {tmp_path / 'xor'}"
    status, _, err = call(line, capsys)
    assert status == 3
    assert "smaller rates (--lr, --head-lr), or a larger --reg." in err


SEQUENCE, IMAGE = f"train adding {SMALL}", "train images --dataset digits --network mlp --rule backprop --channels 4"


@pytest.mark.parametrize("line", [SEQUENCE, IMAGE])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint(
    number: signal.Signals,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run: Any = train_module.TrainingRun if line == SEQUENCE else image_train._Run
    step = run._step

    def interrupted(self: Any, iteration: int) -> Iterator[Any]:
        for _ in range(1 if number == signal.SIGINT else 2):  # a terminal that closes sends two
            os.kill(os.getpid(), number)
        yield from step(self, iteration)

    monkeypatch.setattr(run, "_step", interrupted)
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)
    try:
        status, _, err = call(f"{line} --out {tmp_path}", capsys)
    finally:
        after = signal.signal(number, before)
    assert status == 128 + number
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert err == (
        f"tpext: interrupted{by}; a checkpoint is saved at iteration 1; "
        "the same command with --resume continues from the last checkpoint\n"
    )
    assert checkpoint(tmp_path)["iteration"] == 1
    assert after == default


def test_ctrl_c_before_a_run_begins_promises_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Any, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_module.TrainingRun, "__init__", interrupted)
    status, _, err = call(f"train adding {SMALL} --out {tmp_path / 'run'}", capsys)
    assert (status, err) == (130, "tpext: interrupted\n")
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_says_that_it_stopped_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Any, iteration: int) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C was not heard")
        yield

    monkeypatch.setattr(train_module.TrainingRun, "_step", interrupted)
    status, _, err = call(f"train adding {SMALL} --out {tmp_path / 'run'}", capsys)
    said = "interrupted; stopped at once; the same command with --resume continues from the last checkpoint"
    assert (status, err) == (130, f"tpext: {said}\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_where_no_run_is_says_that_one_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, folder = f"train adding {SMALL} --resume --out {tmp_path / 'run'}", tmp_path / "run"
    status, out, _ = call(line, capsys)
    assert (status, out.splitlines()[0]) == (0, f"{folder} holds no run to resume: a new one begins")
    status, out, _ = call(line, capsys)
    assert (status, "no run" in out) == (0, False)


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    step = train_module.TrainingRun._step

    def hung_up(self: Any, iteration: int) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGHUP)
        yield from step(self, iteration)

    monkeypatch.setattr(train_module.TrainingRun, "_step", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main([*SEQUENCE.split(), "--out", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_terminal_closes(tmp_path: Path) -> None:
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        options = "--iterations 1000000000 --eval-interval 1000000 --checkpoint-interval 1000000"
        line = [*SEQUENCE.split(), *options.split(), "--out", str(tmp_path)]
        os.chdir(tmp_path)  # in the checkout it would find the sources
        os.execve(sys.executable, [sys.executable, "-m", "tpext", *line], MODULE_ENVIRONMENT)
    seen = b""
    # the line of progress, once it has one: before, the run may not have begun
    while not re.search(rb"[1-9]\d* it/s", seen):
        seen += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert checkpoint(tmp_path)["iteration"] > 0


def test_a_full_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        status, _, err = call(f"train adding {SMALL} --out {tmp_path}", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert err == f"tpext: {tmp_path / 'checkpoint.pt'} cannot be written: File too large\n"
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_too_little_memory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--length 2000000000", "--hidden-size 3000000"):
        status, _, err = call(f"train adding {SMALL} {option} --out {tmp_path / 'run'}", capsys)
        assert status == 1
        assert err.startswith("tpext: out of memory: ")
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rule in ("regularized-inverse", "backprop"):
        assert call(f"train adding {SMALL} --rule {rule} --out {tmp_path / rule}", capsys)[0] == 0
    picture = tmp_path / "both.png"
    line = f"compare TP={tmp_path / 'regularized-inverse'} {tmp_path / 'backprop'} --out {picture}"
    assert call(line, capsys)[0] == 0
    assert picture.exists()
    assert call(f"compare all={tmp_path} --out {picture}", capsys)[0] == 0  # a folder of many
    (tmp_path / "lr=0.1").symlink_to(tmp_path / "regularized-inverse")
    assert call(f"compare {tmp_path / 'lr=0.1'} A=B={tmp_path / 'lr=0.1'} --out {picture}", capsys)[0] == 0
    (tmp_path / "backprop" / "metrics.csv").write_text("iteration,train_loss,test_loss,accuracy,seconds\n")
    (tmp_path / "none").mkdir()
    for arguments, message in (
        (str(tmp_path / "none"), "holds no run"),
        ("", "runs must name at least one folder"),
        ("A=nowhere", "A=nowhere: there is no such folder"),
        (str(tmp_path / "backprop"), "holds no run with an evaluation"),
        (f"{tmp_path / 'regularized-inverse'} --out y.xyz", "out must end in one of"),
    ):
        status, _, err = call(f"compare {arguments}", capsys)
        assert status == 1
        assert message in err
        assert err.count("\n") == 1


def test_only_seeds_of_one_method_share_a_default_label() -> None:
    first = make_config("adding")
    runs = [first, replace(first, seed=2, threads=3), make_config("adding", reg=100.0), make_config("adding", layers=2)]
    assert default_labels(runs[:2]) == ["regularized-inverse", "regularized-inverse"]
    assert default_labels(runs) == [
        "regularized-inverse, layers 1, reg 1.0",
        "regularized-inverse, layers 1, reg 1.0",
        "regularized-inverse, layers 1, reg 100.0",
        "regularized-inverse, layers 2, reg 1.0",
    ]
    labels = default_labels([first, make_config("adding", rule="backprop", lr=0.1)])
    assert labels == ["regularized-inverse, momentum 0.0, nesterov False", "backprop, momentum 0.9, nesterov True"]


def test_the_slope_of_a_cell_with_gates_is_not_shown_as_it_does_nothing() -> None:
    runs = [make_config("adding", cell=cell, slope="derivative", target_step=0.01) for cell in ("rnn", "gru", "lstm")]
    other = make_config("adding", cell="lstm", target_step=0.01)
    assert ["slope derivative" in describe(config) for config in runs] == [True, False, False]
    labels = default_labels([*runs, other, make_config("adding", cell="rnn", target_step=0.01)])
    assert ["slope" in label for label in labels] == [True, False, False, False, True]
    assert labels[2] == labels[3]


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("", 2, "train"),
        ("train", 2, "required"),
        ("train sorting", 1, "task must be one of"),
        ("train temporl-order", 1, "got 'temporl-order'; did you mean 'temporal-order'?"),
        ("train adding --rule regularised-inverse", 1, "did you mean 'regularized-inverse'?"),
        ("train images --rule lrdl", 1, "got 'lrdl'; did you mean 'ldrl'?"),
        ("train images --dataset cifer10", 1, "got 'cifer10'; did you mean 'cifar10'?"),
        ("reproduce convergence60", 1, "got 'convergence60'; did you mean 'convergence-60'?"),
        ("train adding --rule magic", 1, f"rule must be one of {', '.join(RULES)}, or module:Class or file.py:Class"),
        ("train adding --rule regularized", 1, "regularized is called regularized-inverse now"),
        ("train adding --rule nowhere:Rule", 1, "rule nowhere:Rule: nowhere cannot be imported: ModuleNotFoundError"),
        ("train adding --rule missing.py:Rule", 1, "missing.py cannot be imported: FileNotFoundError"),
        ("train adding --rule own_rules:torch", 1, "torch must be a class that subclasses tpext.rules.RecurrentRule"),
        ("train adding --rule own_rules:Signsymmetry", 1, "rule own_rules:Signsymmetry: own_rules has no Signsymmetry"),
        ("train adding --rule own_rules:PseudoInverseTargets", 1, "does not belong to adding"),
        ("train adding --rule own_rules:SignSymmetry --reg 1", 1, "reg does not belong to rule=own_rules:SignSymmetry"),
        ("train adding --rule own_rules:SignSymmetry --preset published", 1, "no settings were published"),
        ("train adding --rule own_rules:SignSymmetry --rule-options size=1", 1, "NAME=VALUE of credit, scale, got"),
        ("train adding --rule own_rules:SignSymmetry --rule-options scale=big", 1, "scale of rule own_rules:SignSymm"),
        ("train adding --rule own_rules:SignSymmetry --rule-options credit=all", 1, "credit must be one of"),
        ("train adding --rule-options reg=1", 1, "rule_options belong to a rule of your own"),
        ("train adding --lr fast", 2, "fast"),
        ("train adding --speed 3", 2, "--speed"),
        ("train adding --rule backprop --reg 1", 1, "tpext: reg does not belong to rule=backprop"),
        ("train adding --length 4000000000", 1, "length must be at most"),
        ("train adding --out /proc/nowhere/run", 1, "No such file"),
        ("train adding --out=", 1, "tpext: --out must not be empty\n"),
        ("train adding --length 3", 1, "length must be >= 10"),
        ("train sequential-mnist --chunk 5", 1, "chunk must divide 784"),
        ("train sequential-mnist --data-dir nowhere", 1, "--data-dir DIR"),
        ("train mnist-mlp --data-dir nowhere", 1, "--data-dir DIR"),
        ("train cifar-mlp --data-dir nowhere", 1, "--data-dir DIR"),
        ("train digits-mlp --data-dir nowhere", 1, "data_dir does not belong to digits-mlp"),
        ("train mnist-mlp --rule learned-inverse", 1, "rule=learned-inverse does not belong to mnist-mlp"),
        ("train adding --rule difference-target-propagation", 1, "target-propagation does not belong to adding"),
        ("train mnist-mlp --rule kaczmarz --optimizer adam", 1, "rule=kaczmarz needs optimizer=sgd"),
        ("train mnist-autoencoder --rule kaczmarz", 1, "rule=kaczmarz learns classes, which mnist-autoencoder has not"),
        ("train mnist-mlp --std 1", 1, "std does not belong to rule=regularized-least-squares"),
        ("train digits-mlp --rule kaczmarz --std 1 --init orthogonal", 1, "std is that of init=torch"),
        ("train spiral --reference-compat True", 1, "does not go with reference_compat=True, nonlinearity=leaky"),
        ("train mnist-mlp --tied True", 1, "tied ties the layers of an autoencoder, not of mnist-mlp"),
        ("train mnist-mlp --hidden-size 5", 1, "hidden_size does not belong to mnist-mlp"),
        ("train adding --sizes 5", 1, "sizes does not belong to adding"),
        ("train spiral --sizes big", 2, "big"),
        ("train spiral --epochs 5", 1, "epochs does not belong to spiral"),
        ("train mnist-mlp --preset lee", 1, "(presets there: default, seely)"),
        ("train mnist-mlp --epochs 2 --iterations 2", 1, "give epochs or iterations"),
        ("train random-permutation --preset published", 1, "no settings were published"),
        ("train adding --cell gru --preset published", 1, "task=adding, length=30, cell=gru, rule=regularized-inverse"),
    ],
)
def test_bad_options(
    line: str,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = call(line, capsys)
    assert got == status
    assert message in out + err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", "adding", "--out", ""], "--out"),
        (["train", "images", "--data-dir", ""], "--data-dir"),
        (["figure", "pool-indices", "--out", ""], "--out"),
        (["compare", ""], "an argument"),
        (["compare", "--title", "", "--out", ""], "--out"),
    ],
)
def test_no_argument_is_empty(
    arguments: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"tpext: {name} must not be empty\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"???"), ("utf-8", "\u8fd0\U0001f600?".encode())])
def test_neither_environment_nor_terminal_stops_a_run(encoding: str, shown: bytes, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode("\u8fd0\U0001f600".encode() + b"\xff")
    environment = {"MPLBACKEND": "module://a_notebook.backend", "COLUMNS": "0", "LINES": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tpext", *SEQUENCE.split(), "--iterations", "2", "--out", str(out)],
        env={**MODULE_ENVIRONMENT, **environment, "PYTHONIOENCODING": encoding},
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"/%s\n" % shown in done.stdout
    assert (out / "curve.png").exists()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tyro", "tasks"),
        ("rich", "tasks"),
        ("matplotlib", "compare runs/A"),
        ("pandas", "train adding"),
        ("matplotlib", "train images --dataset digits"),
        ("matplotlib", "figure pool-indices --dataset digits"),
    ],
)
def test_a_missing_extra_is_one_line(
    module: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a run that draws at its end begins."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("commands", "train", "figures", "progress"):
        monkeypatch.delitem(sys.modules, f"tpext.experiments.{name}", raising=False)
        monkeypatch.delattr(f"tpext.experiments.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    status, out, err = call(line, capsys)
    assert (status, out) == (1, "")
    assert not list(tmp_path.iterdir())
    assert err == f'tpext: {module} is not installed; the command line needs: pip install "tpext[experiments]"\n'


def test_help_loads_nothing_that_draws_and_makes_no_configuration(tmp_path: Path) -> None:
    code = (
        "import sys; from tpext.experiments.cli import main; from tpext.experiments import Config, ImageConfig\n"
        "Config.__post_init__ = ImageConfig.__post_init__ = None\n"
        "for line in ('train --help', 'train images --help', 'tasks'):\n"
        "    assert main(line.split()) == 0\n"
        "print({'matplotlib', 'pandas', 'tensorboard'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=MODULE_ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "set()\n")


def test_python_m_tpext(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tpext", "train", "adding", "--length", "3"],
        env=MODULE_ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "tpext: Adding: length must be >= 10, got 3\n"


@pytest.mark.parametrize("loading", ["torch", "tyro"])
@pytest.mark.parametrize("started_as", ["script", "module"])
def test_ctrl_c_while_loading_is_one_line(started_as: str, loading: str, tmp_path: Path) -> None:
    """Another module by the name of one that the command line imports gets a Ctrl-C then."""
    (tmp_path / f"{loading}.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    script = tmp_path / "tpext"
    script.write_text("from tpext.experiments.cli import main\nraise SystemExit(main())\n")
    path = f"{tmp_path}:{MODULE_ENVIRONMENT['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, *([str(script)] if started_as == "script" else ["-m", "tpext"]), "tasks"],
        env={**MODULE_ENVIRONMENT, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tpext: interrupted\n")


def test_ctrl_c_in_other_programs_is_theirs(tmp_path: Path) -> None:
    """Importing the package changes no handler, and the command line gives the interrupt back."""
    code = (
        "import signal, sys; import tpext; from tpext.experiments.cli import main\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "tpext._loading.arm()\n"
        "assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler\n"
        "main(['tasks'])\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=MODULE_ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


OWN = '''
from dataclasses import dataclass
from typing import Literal
import torch
from tpext.rules import LayerRule, LearnedInverse, RecurrentRule

@dataclass(frozen=True)
class Signs(RecurrentRule):
    """Feedback by the weights' signs.

    Args:
        scale, credit: factor of the signs
            in :meth:`~tpext.rules.RecurrentRule.feedback`. The rest is not shown.
    """

    slope = "derivative"
    scale: float = 0.1
    centred: bool = False
    "Whether they have mean 0. Not shown."

    def feedback(self, weight_hh, *owned):
        return self.scale * weight_hh.sign()

@dataclass(frozen=True)
class Gain(RecurrentRule):
    def parameter_shapes(self, input_size, hidden_size, gates):
        return {"gain": (hidden_size,)}

    def reset_parameter(self, name, parameter):
        torch.nn.init.constant_(parameter, 2.0)

    def feedback(self, weight_hh, *owned):
        return weight_hh * owned[0][:, None]

class Learned(LearnedInverse):
    pass

@dataclass(frozen=True)
class Noisy(LearnedInverse):
    extra: float = 0.0

@dataclass(frozen=True)
class Bounded(Gain):
    scale: float | None = None

@dataclass(frozen=True)
class Long(Gain):
    length: int = 3

@dataclass(frozen=True)
class Listed(Gain):
    sizes_of: tuple = (1, 2)
    side: Literal["left", "right"] = "left"
    steps: int = 1

@dataclass(frozen=True)
class Asks(Gain):
    gain: int
    share: float

@dataclass(frozen=True)
class Pseudo(LayerRule):
    target_step: float = 1.0

    def propagate(self, call, displacement):
        return call.activation.derivative(displacement, call.preactivation) @ torch.linalg.pinv(call.weight).T
'''


def test_a_rule_from_a_file_trains_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    line = (
        "train temporal-order --rule mine.py:Signs --rule-options scale=0.2 centred=true --length 12 --threads 1 "
        "--eval-interval 20"
    )
    status, _, err = call(f"{line} --iterations 20", capsys)
    assert status == 0, err
    folder = Path("runs/temporal-order-Signs-1")
    assert json.loads((folder / "config.json").read_text())["rule"] == {
        "name": "mine.py:Signs", "folder": str(tmp_path), "options": {"scale": 0.2, "centred": True}
    }  # fmt: skip
    status, out, err = call(f"{line} --iterations 20 --resume", capsys)
    assert (status, "complete already" in out) == (0, True), err
    status, out, _ = call("train spiral --rule mine.py:Pseudo --iterations 20 --threads 1 --eval-interval 20", capsys)
    assert status == 0
    assert "mine.py:Pseudo (target step 1)" in out


def test_an_error_in_ones_own_code_is_shown_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = "class Wrong(Pseudo):\n    def propagate(self, call, displacement):\n        raise"
    Path("mine.py").write_text(f"{OWN}\n{wrong}")
    status, _, err = call("train spiral --rule mine.py:Wrong --iterations 20 --threads 1", capsys)
    lines = err.splitlines()
    assert status == 1
    assert "mine.py" in lines[lines.index("Traceback (most recent call last):") + 1]
    assert "experiments/train.py" not in err
    assert lines[-2:] == [
        "RuntimeError: No active exception to reraise", "tpext: stopped by this error in code of your own"
    ]  # fmt: skip


def test_options_of_ones_own_show_their_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    Path("tasks.py").write_text(OWN_TASK)
    for line, shown in (
        (
            "adding --rule mine.py:Signs --rule-options help",
            "rule_options must be NAME=VALUE of scale, centred, got 'help'\n"
            "  scale: Factor of the signs in tpext.rules.RecurrentRule.feedback\n"
            "  centred: Whether they have mean 0\n",
        ),
        (
            "adding --rule mine.py:Noisy --rule-options help",
            "noise, extra, got 'help'\n  target_step: Size of the first displacement",
        ),
        ("adding --rule mine.py:Long --rule-options help", "NAME=VALUE of length, got 'help'\n"),
        ("tasks.py:Echo --task-options help", "of length, seed, got 'help'\n  length: Number of steps.\n"),
    ):
        status, _, err = call(f"train {line}", capsys)
        assert (status, shown in err) == (1, True), err
        assert "ot shown" not in err


def test_options_of_a_rule_of_ones_own_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as length, which is the task's as well."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    line = f"train adding {SMALL} --rule mine.py:Long --out run"
    status, _, err = call(f"{line} --rule-options length=5", capsys)
    assert status == 0, err
    config = RunFolder("run").read_config()
    assert config is not None
    assert (config.task.length, config.options()["length"]) == (10, 10)
    assert (config.rule.length, config.options()["rule_options.length"]) == (5, 5)  # type: ignore[attr-defined]
    status, _, err = call(f"{line} --rule-options length=6 --resume", capsys)
    assert (status, "rule_options.length is 5 there, 6 was asked for" in err) == (1, True), err
    status, _, err = call("train adding --rule mine.py:Long --credit local", capsys)
    assert (status, "rule=mine.py:Long (its own go into rule_options: length)" in err) == (1, True), err
    status, _, err = call("train adding --rule mine.py:Long --reg 1", capsys)
    assert (status, "reg does not belong to rule=mine.py:Long" in err) == (1, True), err


@pytest.mark.parametrize("path", ["mine.py", "mine_as_a_module"])
def test_a_run_with_ones_own_rule_resumes_in_another_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / f"{path.removesuffix('.py')}.py").write_text(OWN)
    line = f"train adding {SMALL} --rule {path}:Signs --iterations 10"

    def run(arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tpext", *arguments.split()]
        return subprocess.run(command, env=MODULE_ENVIRONMENT, cwd=folder, capture_output=True, text=True, check=False)

    assert run(f"{line} --out run", home).returncode == 0
    (home / "run" / "result.json").unlink()
    done = run(f"train adding --resume --out {home / 'run'}", elsewhere)
    assert done.returncode == 0, done.stderr
    assert "resuming after iteration 10" in done.stdout
    if path == "mine.py":  # named by its path from there, it is still the same rule
        done = run(f"train adding --rule ../home/mine.py:Signs --resume --out {home / 'run'}", elsewhere)
        assert (done.returncode, "complete already" in done.stdout) == (0, True), done.stderr
    # the folder of the rule is gone: what is here serves
    (home / "run").rename(elsewhere / "run")
    for file in home.glob("*.py"):
        file.rename(elsewhere / file.name)
    for left in home.rglob("*"):
        assert left.name == "__pycache__" or left.suffix == ".pyc"
    done = run("train adding --resume --out run", elsewhere)
    assert (done.returncode, "complete already" in done.stdout) == (0, True), done.stderr


OWN_TASK = """
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
import torch
from tpext.tasks import Batch, Criterion, SyntheticTask, option

@dataclass(frozen=True)
class Echo(SyntheticTask):
    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the first symbol comes back"
    defaults = {"hidden_size": 7, "iterations": 30, "lr": 0.05}
    length: int = option(4, "Number of steps.")
    seed: int = option(3, "Of the alphabet; a run has a seed too.")
    input_size = output_size = 3

    def sample(self, random, size):
        symbols = random.integers(3, size=(self.length, size))
        return Batch(torch.eye(3)[torch.from_numpy(symbols)], torch.from_numpy(symbols[0]))
"""


@pytest.mark.parametrize("rule", [*SEQUENCE_RULES])
def test_a_task_names_its_optimizer_for_every_rule(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = OWN_TASK.replace('"lr": 0.05', '"optimizer": "adam", "lr": 0.05, "slope": "derivative"')
    Path("tasks.py").write_text(own)
    config = make_config("tasks.py:Echo", rule=rule)
    typed = make_config("temporal-order", rule=rule, optimizer="adam", lr=0.05)
    assert (config.optimizer, config.lr, config.head_lr, config.momentum) == ("adam", 0.05, 0.05, 0.0)
    assert config.reverse_lr == typed.reverse_lr
    slope = {"slope": "derivative"} if rule == "regularized-inverse" else {}
    assert config.rule == SEQUENCE_RULES[rule](**slope)
    assert getattr(make_config("tasks.py:Echo", rule="regularized-inverse", slope="one").rule, "slope", "") == "one"


@pytest.mark.parametrize("rule", [*SEQUENCE_RULES])
def test_ones_own_task_does_not_start_from_what_is_published_for_another(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tasks.py").write_text(OWN_TASK.replace(', "lr": 0.05', ""))
    config = make_config("tasks.py:Echo", rule=rule)
    assert (config.optimizer, config.lr, config.head_lr, config.reverse_lr) == ("adam", 1e-3, 1e-3, 1e-3)
    if rule == "regularized-inverse":
        assert config.rule == RegularizedInverse(slope="derivative")
        assert make_config("tasks.py:Echo", rule=rule, cell="gru").rule == RegularizedInverse()
        assert make_config("temporal-order", rule=rule).rule.slope == "inverse"  # type: ignore[attr-defined]


def test_defaults_of_a_task_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tasks.py").write_text(OWN_TASK.replace('"lr": 0.05', '"hiden_size": 8'))
    with pytest.raises(
        ConfigError, match=r"defaults of task tasks\.py:Echo .* got 'hiden_size'; did you mean 'hidden_size'"
    ):
        make_config("tasks.py:Echo")


def test_a_task_from_a_file_trains_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tasks.py").write_text(OWN_TASK)
    line = "train tasks.py:Echo --task-options length=5 --optimizer adam --threads 1 --seed 2 --test-size 20"
    status, out, err = call(line, capsys)
    assert status == 0, err
    assert "tasks.py:Echo, T=5, 7 tanh units" in out
    assert "30 iterations" in out
    config = json.loads(Path("runs/Echo-regularized-inverse-2/config.json").read_text())
    assert config["task"] == {
        "name": "tasks.py:Echo", "folder": str(tmp_path), "options": {"length": 5, "seed": 3}
    }  # fmt: skip
    assert config["seed"] == 2
    status, out, err = call(f"{line} --resume", capsys)
    assert (status, "complete already" in out) == (0, True), err
    (tmp_path / "elsewhere").mkdir()
    out = f"--out {tmp_path / 'runs' / 'Echo-regularized-inverse-2'} --resume"
    done = subprocess.run(
        [sys.executable, "-m", "tpext", "train", "../tasks.py:Echo", *out.split()],
        env=MODULE_ENVIRONMENT, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "complete already" in done.stdout) == (0, True), done.stderr
    for more, message in (
        ("--resume --task-options length=6", "task_options.length is 5 there, 6 was asked for"),
        (
            "--length 6",
            "length does not belong to tasks.py:Echo, whose options are task_options: --task-options length",
        ),
        ("--task-options width=6", "task_options must be NAME=VALUE of length, seed, got 'width=6'"),
        ("--data-dir .", "data_dir does not belong to tasks.py:Echo"),
        ("--rule kaczmarz", "kaczmarz does not belong to tasks.py:Echo"),
    ):
        status, _, err = call(f"{line} {more}", capsys)
        assert (status, message in err) == (1, True), err
    hidden = OWN_TASK.replace("length: int", 'length: "Steps"')
    Path("hidden.py").write_text(hidden)
    status, _, err = call("train hidden.py:Echo", capsys)
    assert (status, "annotations of Echo cannot be read: name 'Steps' is not defined" in err) == (1, True), err
    Path("broken.py").write_text("import math\n\nmath.nothing\n")
    status, _, err = call("train broken.py:Echo", capsys)
    assert (status, "module 'math' has no attribute 'nothing' (line 3)" in err) == (1, True), err
    Path("plain.py").write_text(OWN_TASK.replace("@dataclass(frozen=True)\n", ""))
    status, _, err = call("train plain.py:Echo", capsys)
    assert (status, "Echo must be a dataclass: write @dataclass(frozen=True) above it" in err) == (1, True), err
    status, _, err = call("train tasks.py:np", capsys)
    assert (status, "np must be a dataclass that subclasses tpext.tasks.Task" in err) == (1, True), err


OWN_SET = """
import torch
from tpext.tasks.idx import Images
from tpext.tasks.image_sets import IMAGE_SETS, ImageSet

def load(data_dir):
    return Images(torch.zeros(40, 256).byte(), torch.arange(40) % 2, torch.zeros(4, 256).byte(), torch.arange(4) % 2)

IMAGE_SETS["blank"] = ImageSet(load, (1, 16, 16), {"standard": ((0.5,), (0.5,))}, n_classes=2, test_size=4)
"""

OWN_PRESET = """
from tpext.experiments.presets.base import Preset

PRESET = Preset("elman", "Finding Structure in Time", lambda case: {"hidden_size": 3} if case.name == "echo" else None)
"""


def test_a_task_a_data_set_and_a_preset_are_one_file_each(tmp_path: Path) -> None:
    """With the files in a copy of the package, all are on the command line and in its help."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(tpext.__file__).parent, tmp_path / "tpext", ignore=ignored)
    task = OWN_TASK.replace("from tpext.tasks import Batch, Criterion, SyntheticTask, option", "")
    for old, new in (
        ("import torch", "import torch\nfrom tpext.tasks.base import Batch, Criterion, SyntheticTask"),
        ("import torch", "import torch\nfrom tpext.tasks.registry import option, register"),
        ("@dataclass", '@register("echo", seed=3)\n@dataclass'),
        ("    length: int", '    delay: int = option(1, "Steps of silence.")\n    length: int'),
    ):
        task = task.replace(old, new)
    for name, text in (("tasks/echo", task), ("tasks/blank", OWN_SET), ("experiments/presets/elman", OWN_PRESET)):
        (tmp_path / "tpext" / f"{name}.py").write_text(text)
    images = "train images --dataset blank --channels 2 2 --hidden-size 3 --epochs 1 --batch-size 6 --threads 1"
    expected = (
        ("train --help", "Steps of silence. (echo)"),
        ("train --help", "elman: Finding Structure in Time"),
        ("tasks", f"the first symbol comes back {', '.join(f'{rule} (elman)' for rule in SEQUENCE_RULES)}"),
        ("train echo --length 6 --delay 2 --threads 1 --test-size 20", "echo, T=6, 7 tanh units"),
        ("train echo --preset elman --threads 1 --test-size 20 --out elman", "echo, T=4, 3 tanh units"),
        ("train images --help", "imagenet32,blank"),
        (images, "blank, lenet 2-2, ldrl"),
    )
    code = (
        "import sys; from tpext.experiments.cli import main; sys.exit(max(main(line.split()) for line in sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(line for line, _ in expected)],
        env={**MODULE_ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    output = " ".join(done.stdout.replace("│", " ").split())
    for _, shown in expected:
        assert shown in output


def test_what_a_rule_owns_stays_as_the_rule_initialises_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    config = make_config("adding", rule="mine.py:Gain", length=12)
    model = make_model(config, config.make_task())
    assert torch.equal(model.state_dict()["rnn.gain_l0"], torch.full((100,), 2.0))


def test_what_a_rule_learns_gets_an_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    config = make_config("adding", rule="mine.py:Learned", length=12, reverse_lr=0.25)
    assert (config.rule.learns, config.reverse_lr) == (True, 0.25)
    forward, _, own = split_parameters(make_model(config, config.make_task()))
    assert [tuple(parameter.shape) for parameter in own] == [(100, 100), (100,)]
    assert len(forward) == 3


def test_fields_of_a_rule_that_the_command_line_cannot_serve_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    for options, message in (
        ("mine.py:Listed --rule-options sizes_of=3", "is a tuple, which cannot be given as a text"),
        ("mine.py:Listed --rule-options side=up", "rule mine.py:Listed must be one of 'left', 'right', got 'up'"),
        ("mine.py:Listed --rule-options steps=1.5", "steps of rule mine.py:Listed must be an int, got '1.5'"),
        ("mine.py:Asks --rule-options gain=1", "must have a default or be in rule_options, got neither for share"),
        ("mine.py:Bounded", "rule mine.py:Bounded: Bounded: scale must be annotated float to be a number of a rule"),
    ):
        status, _, err = call(f"train adding --rule {options}", capsys)
        assert (status, message in err) == (1, True), err
