"""Runs: what they compute, that they resume bit for bit, that they fail loudly."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_tasks import write_mnist

import tpext
from tpext.experiments import Config, ConfigError, make_config, published
from tpext.experiments import run_folder as run_folder_module
from tpext.experiments import train as train_module
from tpext.experiments.config import RULES, differences
from tpext.experiments.figures import draw_comparison, draw_run
from tpext.experiments.model import SequenceModel
from tpext.experiments.run_folder import RunError, RunFolder
from tpext.experiments.train import DivergedError, train

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
    state = RunFolder(folder).load_checkpoint()
    assert state is not None
    return state


def same(left: Any, right: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv as text, without the time."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) >= 0
    return rows


def assert_same_run(left: Path, right: Path) -> None:
    first, second = checkpoint(left), checkpoint(right)
    for key in ("iteration", "model", "optimizer", "reverse_optimizer", "random_state", "losses"):
        assert same(first[key], second[key]), f"{key} differs"
    assert metrics(left) == metrics(right)


# --- settings --------------------------------------------------------------------------------------------------------

# Published settings: rule, task, length -> lr, head_lr, momentum, target_step, reg, reverse_lr, noise, iterations, B.
PUBLISHED = [
    ("regularized", "temporal-order", 60, (1e-1, 1e-1, 0, 1e-2, 10, None, None, 40_000, 20)),
    ("regularized", "temporal-order", 120, (1e-2, 1e-2, 0, 1e-2, 1, None, None, 48_000, 20)),
    ("regularized", "adding", 30, (1e-1, 1e-1, 0, 1e-1, 1, None, None, 24_000, 20)),
    ("regularized", "mnist", None, (1e-1, 1e-1, 0, 1e-4, 1, None, None, 40_000, 16)),
    ("regularized", "permuted-mnist", None, (1e-1, 1e-1, 0, 1e-4, 1, None, None, 40_000, 16)),
    ("backprop", "temporal-order", 60, (1e-5, 1e-5, 0.9, None, None, None, None, 40_000, 20)),
    ("backprop", "temporal-order", 120, (1e-5, 1e-5, 0.9, None, None, None, None, 48_000, 20)),
    ("backprop", "adding", 30, (1e-3, 1e-3, 0.9, None, None, None, None, 24_000, 20)),
    ("backprop", "mnist", None, (1e-5, 1e-5, 0, None, None, None, None, 40_000, 16)),
    ("backprop", "permuted-mnist", None, (1e-4, 1e-4, 0, None, None, None, None, 40_000, 16)),
    ("learned", "temporal-order", 60, (1e-2 / 20, 1e-2, 0, 1e-1, None, 1e-3, 0, 40_000, 20)),
    ("learned", "temporal-order", 120, (1e-2 / 20, 1e-2, 0, 1e-1, None, 1e-3, 0, 48_000, 20)),
    ("learned", "adding", 30, (1e-2 / 20, 1e-2, 0, 1e-1, None, 1e-3, 0, 24_000, 20)),
    ("learned", "mnist", None, (1e-2 / 16, 1e-2, 0, 1e-7, None, 1e-8, 0.1, 40_000, 16)),
]


@pytest.mark.parametrize(("rule", "task", "length", "expected"), PUBLISHED)
def test_published_settings(rule: Any, task: str, length: int | None, expected: tuple[Any, ...]) -> None:
    config = make_config(task, rule=rule, preset="published", length=length)
    present = (config.lr, config.head_lr, config.momentum)
    present += tuple(getattr(config.rule, name, None) for name in ("target_step", "reg"))
    present += (config.reverse_lr if rule == "learned" else None, getattr(config.rule, "noise", None))
    assert (*present, config.iterations, config.batch_size) == expected
    assert isinstance(config.rule, RULES[rule])
    assert config.nesterov == (config.momentum > 0)
    assert (config.hidden_size, config.layers, config.nonlinearity) == (100, 1, "tanh")
    assert (config.init, config.optimizer, config.clip_grad_norm) == ("orthogonal", "sgd", None)
    assert getattr(config.rule, "normalize", False) is False
    assert getattr(config.rule, "credit", "through_time") == "through_time"
    assert getattr(config.rule, "correction", "linearized") == "linearized"


def test_default_preset_is_the_published_one_with_fewer_iterations() -> None:
    default, full = make_config("temporal-order"), make_config("temporal-order", preset="published")
    assert default == replace(full, preset="default", iterations=4_000)
    assert default.length == 60
    assert make_config("mnist").iterations == 16_000
    assert make_config("random-permutation").rule == default.rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sorting"}, "task must be one of temporal-order"),
        ({"rule": "magic"}, "rule must be one of regularized, learned, backprop, got 'magic'"),
        ({"rule": "backprop", "reg": 1.0}, r"reg does not belong to rule=backprop \(options of that rule: none\)"),
        ({"rule": "learned", "correction": "none"}, "correction does not belong to rule=learned"),
        ({"reverse_lr": 1.0}, "reverse_lr does not belong to rule=regularized"),
        ({"reg": -1.0}, r"reg must be a .*number.* >= 0, got -1"),
        ({"width": 3}, "unknown option width"),
        ({"length": 5}, "length must be >= 10"),
        ({"chunk": 7}, "chunk does not belong to temporal-order"),
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1, got 0"),
        ({"iterations": 1.5}, "iterations must be an integer >= 1, got 1.5"),
        ({"batch_size": -2}, "batch_size must be an integer"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"lr": float("nan")}, "lr must be a number >= 0, got nan"),
        ({"lr": -0.1}, "lr must be a number >= 0"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum does not belong to optimizer=adam"),
        ({"nesterov": True}, "nesterov needs optimizer=sgd and a momentum above 0"),
        ({"rule": "learned", "nonlinearity": "relu"}, "rule=learned needs nonlinearity=tanh"),
        ({"device": "toaster"}, "device must be a torch device"),
        ({"device": "meta"}, "device must be cpu or cuda"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be a number > 0, got 0"),
        ({"threads": 1025}, "threads must be at most 1024, got 1025"),
        ({"seed": 2**64}, "seed must be at most 18446744073709551615"),
        ({"length": 4_000_000_000}, "length must be at most 2147483647"),
        ({"task": "random-permutation", "preset": "published"}, "no settings were published for task=random-perm"),
        ({"length": 61, "preset": "published"}, "no settings were published .*length=61"),
        ({"task": "adding", "length": 60, "preset": "published"}, "no settings were published .*length=60"),
        ({"task": "mnist", "chunk": 28, "preset": "published"}, "no settings were published .*chunk=28"),
        ({"preset": "best"}, "preset must be one of default, published"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**{"task": "temporal-order", **options})


@pytest.mark.parametrize("rule", RULES)
def test_config_survives_json(rule: Any) -> None:
    config = make_config("temporal-order", rule=rule, seed=2**40, clip_grad_norm=1.0, data_dir=None, threads=3)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_lengths_in_between_start_from_the_nearest_published_one() -> None:
    assert make_config("temporal-order", length=119).rule == make_config("temporal-order", length=60).rule
    assert make_config("temporal-order", length=300).lr == make_config("temporal-order", length=120).lr == 1e-2
    assert make_config("adding", length=60).rule == make_config("adding").rule


@pytest.mark.parametrize("rule", ["regularized", "learned"])
def test_other_optimizers_get_gradients_of_full_size(rule: Any) -> None:
    assert make_config("temporal-order", rule=rule, optimizer="adam").rule.normalize is True
    assert make_config("temporal-order", rule=rule, optimizer="adam", normalize=False).rule.normalize is False
    assert make_config("temporal-order", rule=rule, momentum=0.5).rule.normalize is False


def test_rates_follow_what_is_given() -> None:
    config = make_config("temporal-order", rule="learned", lr=0.3)
    assert (config.lr, config.head_lr) == (0.3, 0.3)
    config = make_config("temporal-order", lr=0.3, head_lr=0.2, optimizer="sgd", momentum=0.5)
    assert (config.lr, config.head_lr, config.nesterov) == (0.3, 0.2, True)
    config = make_config("temporal-order", rule="backprop", optimizer="adam")
    assert (config.lr, config.head_lr, config.momentum, config.nesterov) == (1e-3, 1e-3, 0.0, False)
    settings = published("mnist", "learned", batch_size=8)
    assert settings is not None
    assert settings.lr == 1e-2 / 8


def test_differences_name_what_was_asked_for() -> None:
    saved = small(rule="learned", noise=0.1)
    same_options = {"task": "temporal-order", "rule": "learned", "noise": 0.1, "hidden_size": 8, "threads": 7}
    assert differences(saved, same_options) == []
    assert differences(saved, saved.options()) == []
    assert differences(saved, {"task": "adding", "rule": "backprop", "noise": 0.2, "reg": 1.0}) == [
        "task is temporal-order there, adding was asked for",
        "rule is learned there, backprop was asked for",
        "noise is 0.1 there, 0.2 was asked for",
        "reg is None there, 1.0 was asked for",
    ]


# --- what a run computes ---------------------------------------------------------------------------------------------


def published_step(parameters: dict[str, torch.Tensor], config: Config, input: Any, target: Any) -> None:
    """One iteration of the published algorithm, written from its equations with plain autograd, in place.

    Targets are constants; the sum of local losses is back-propagated through the unrolled network (the released code);
    head and recurrent layer share one SGD step.
    """
    weight, inputs = parameters["rnn.weight_hh_l0"], parameters["rnn.weight_ih_l0"]
    bias = parameters["rnn.bias_ih_l0"]
    states = [torch.zeros(input.size(1), weight.size(0), dtype=torch.float64)]
    for step in input:
        states.append(torch.tanh(step @ inputs.T + states[-1] @ weight.T + bias))
    learned = isinstance(config.rule, tpext.LearnedInverse)
    if learned:
        v, c = parameters["rnn.reverse_weight_hh_l0"], parameters["rnn.reverse_bias_l0"]
        fixed = [state.detach() for state in states]
        error = sum(
            0.5 * ((torch.tanh(after @ v.T + c + step @ inputs.detach().T) - before) ** 2).sum()
            for step, before, after in zip(input, fixed, fixed[1:], strict=False)
        ) / input.size(1)  # fmt: skip
        for parameter, gradient in zip((v, c), torch.autograd.grad(error, (v, c)), strict=True):
            parameter.data -= config.reverse_lr * gradient

    last = states[-1].detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(last @ parameters["head.weight"].T + parameters["head.bias"], target)
    loss.backward()
    assert last.grad is not None
    goal = (last - config.rule.target_step * last.grad).detach()
    eye = torch.eye(weight.size(0), dtype=torch.float64)
    local: Any = 0.0
    for index in range(len(input), 0, -1):
        local = local + 0.5 * ((states[index] - goal) ** 2).sum()
        with torch.no_grad():
            if learned:
                reverse = [torch.tanh(h @ v.T + c + input[index - 1] @ inputs.T) for h in (goal, states[index])]
                goal = states[index - 1] + reverse[0] - reverse[1]
            else:
                slope = 1 - states[index].clamp(-1 + 1e-3, 1 - 1e-3) ** 2
                move = (
                    torch.linalg.solve(weight.T @ weight + config.rule.reg * eye, weight.T)
                    @ ((goal - states[index]) / slope).T
                )
                goal = states[index - 1] + move.T
    if learned:
        local = local / input.size(1)
    local.backward()
    # For the learned inverse the published rate of every layer is 1e-2, the head's.
    rate = config.head_lr
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "reverse" not in name and "bias_hh" not in name:
                assert parameter.grad is not None
                parameter -= rate * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize("rule", ["regularized", "learned"])
def test_a_run_is_the_published_algorithm(rule: Any, tmp_path: Path) -> None:
    config = small(rule=rule, precision="64", length=20, iterations=6, checkpoint_interval=6, eval_interval=6)
    torch.manual_seed(config.seed)
    task = config.make_task()
    start = SequenceModel(config, task).double().state_dict()
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    for iteration in range(config.iterations):
        input, target = task.batch(config.seed, iteration, config.batch_size)
        published_step(parameters, config, input.double(), target)
    train(config, tmp_path)
    trained = checkpoint(tmp_path)["model"]
    for name, value in parameters.items():
        moved = (value.detach() - start[name]).norm()
        assert (moved > 0) == ("bias_hh" not in name), f"{name} moved by {moved}"
        torch.testing.assert_close(trained[name], value.detach(), rtol=1e-10, atol=1e-10 * moved.item())


def test_orthogonal_initialization(tmp_path: Path) -> None:
    config = small(rule="learned", layers=2)
    model = SequenceModel(config, config.make_task())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            ones = torch.ones(min(parameter.shape))
            torch.testing.assert_close(torch.linalg.svdvals(parameter.detach()), ones, msg=name)
        else:
            assert not parameter.any(), name
    plain = SequenceModel(replace(config, init="torch"), config.make_task())
    assert plain.rnn.bias_ih_l0.any()


def assert_everything_moved(config: Config, folder: Path) -> None:
    """Every parameter left where it started, but for the second bias, which stays zero."""
    torch.manual_seed(config.seed)
    start, trained = SequenceModel(config, config.make_task()).state_dict(), checkpoint(folder)["model"]
    assert start.keys() == trained.keys()
    for name, value in start.items():
        moved = not torch.equal(trained[name].to(value.dtype), value)
        assert moved == ("bias_hh" not in name), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("precision", ["32", "64", "bf16"])
def test_every_rule_trains(rule: Any, precision: Any, tmp_path: Path) -> None:
    config = small(rule=rule, precision=precision, layers=2, optimizer="rmsprop", momentum=0.5, clip_grad_norm=1.0)
    result = train(config, tmp_path)
    assert result.iterations == 20
    assert 0 <= result.accuracy <= result.best_accuracy <= 1
    state = checkpoint(tmp_path)["model"]
    expected = torch.float64 if precision == "64" else torch.float32
    assert all(value.dtype == expected for value in state.values())
    assert_everything_moved(config, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "adagrad"])
def test_training_lowers_the_loss(optimizer: Any, tmp_path: Path) -> None:
    options = {"rule": "backprop", "iterations": 60, "hidden_size": 20, "eval_interval": 60}
    config = small("random-permutation", optimizer=optimizer, lr=0.2 if optimizer == "sgd" else 1e-2, **options)
    result = train(config, tmp_path)
    first = float(metrics(tmp_path)[0]["test_loss"])
    assert result.test_loss < 0.9 * first


def test_image_task_trains(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    options = {**SMALL, "length": None, "chunk": 28, "test_size": 7, "data_dir": str(tmp_path / "data")}
    config = make_config("permuted-mnist", **options)
    assert train(config, tmp_path / "run").iterations == 20
    assert_everything_moved(config, tmp_path / "run")


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "data")
    options = {**SMALL, "length": None, "chunk": 28, "test_size": 7, "data_dir": str(tmp_path / "data")}
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for wrong, message in (
        ({"test_size": 8}, r"test_size must be 1 \.\. 7"),
        ({"batch_size": 26}, "batch_size must be at most 25"),
        ({"tensorboard": True}, r"tensorboard is not installed: pip install"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(make_config("mnist", **{**options, **wrong}), tmp_path / "run")
    monkeypatch.setattr(tpext, "build_info", lambda: {"version": "0", "cuda_architectures": []})
    with pytest.raises(ConfigError, match="this build of tpext has no CUDA kernels"):
        train(small(device="cuda"), tmp_path / "run")
    with pytest.raises(MemoryError):
        train(small(length=2_000_000_000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_of_a_run(tmp_path: Path) -> None:
    config = small(tensorboard=True)
    result = train(config, tmp_path / "a" / "run")
    folder = RunFolder(tmp_path / "a" / "run")
    assert folder.read_config() == config
    rows = metrics(folder.path)
    assert list(rows[0]) == ["iteration", "train_loss", "test_loss", "accuracy"]
    assert [int(row["iteration"]) for row in rows] == [0, 6, 12, 18, 20]
    stored = json.loads(folder.result.read_text())
    assert stored["accuracy"] == result.accuracy == float(rows[-1]["accuracy"])
    assert stored["best_accuracy"] == max(float(row["accuracy"]) for row in rows[1:])
    assert stored["iterations"] == 20
    assert stored["seconds"] > 0
    assert stored["versions"]["torch"] == torch.__version__
    assert folder.curve.read_bytes().startswith(b"\x89PNG")
    assert folder.read_result() == result
    assert [float(row["accuracy"]) for row in rows] == [row.accuracy for row in folder.read_rows()]
    assert list((folder.path / "tensorboard").iterdir())
    assert not list(folder.path.glob("*.new"))


def test_training_loss_is_the_mean_since_the_last_row(tmp_path: Path) -> None:
    train(small(eval_interval=1), tmp_path / "each")
    train(small(eval_interval=5), tmp_path / "fifth")
    each = [float(row["train_loss"]) for row in metrics(tmp_path / "each")]
    fifth = [float(row["train_loss"]) for row in metrics(tmp_path / "fifth")]
    assert fifth[0] == each[0]
    for index in range(4):
        assert fifth[index + 1] == pytest.approx(sum(each[5 * index + 1 : 5 * index + 6]) / 5, rel=1e-12)


def test_a_run_leaves_torch_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    assert train(small(threads=None), tmp_path).threads == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2


# --- resuming --------------------------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818  (it stands for a kill, not for an error)
    pass


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "learned", "noise": 0.1, "momentum": 0.9},
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

    step = train_module._Run._step

    def stopping(run: Any, iteration: int) -> None:
        step(run, iteration)
        if iteration == stop:
            raise Killed

    monkeypatch.setattr(train_module._Run, "_step", stopping)
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "result.json").exists()
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_kill_9_in_mid_run_changes_nothing(tmp_path: Path) -> None:
    """Two kills at arbitrary moments of a process that checkpoints at every iteration, many of them while it writes."""
    options = {**SMALL, "iterations": 1500, "eval_interval": 10, "checkpoint_interval": 1, "noise": 0.1}
    train(make_config("temporal-order", rule="learned", **options), tmp_path / "whole")

    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tpext", "train", "temporal-order", "--rule", "learned", "--resume"]
    command += ["--out", str(folder)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tpext.__file__).parents[1])}
    for rows in (20, 60):
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
    config = small(rule="learned", noise=0.1)
    train(config, tmp_path / "whole")
    step = train_module._Run._step

    def interrupted(run: Any, iteration: int) -> None:
        if iteration == 9:
            os.kill(os.getpid(), signal.SIGINT)
        step(run, iteration)

    monkeypatch.setattr(train_module._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="a checkpoint is saved at iteration 9"):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert checkpoint(tmp_path / "stopped")["iteration"] == 9
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Any, iteration: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C was not heard")

    monkeypatch.setattr(train_module._Run, "_step", interrupted)
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
    with pytest.raises(RunError, match=r"already holds a run: pass another --out .*--resume"):
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
        ("rule", "learned"),
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


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    config = small()
    train(config, tmp_path)
    (tmp_path / "result.json").unlink()
    torch.save({"format": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="format 99, this version reads 1"):
        train(config, tmp_path, resume=True)


# --- divergence ------------------------------------------------------------------------------------------------------


def assert_last_good(folder: Path, iteration: int) -> None:
    state = checkpoint(folder)
    assert state["iteration"] == iteration
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not (folder / "result.json").exists()
    assert all(float(row["test_loss"]) < float("inf") for row in metrics(folder))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", ["regularized", "backprop"])
def test_divergence_is_told_at_once(rule: Any, optimizer: Any, tmp_path: Path) -> None:
    config = small("adding", rule=rule, nonlinearity="relu", optimizer=optimizer, lr=1e30)
    with pytest.raises(DivergedError, match=r"diverged at iteration [234]: ") as caught:
        train(config, tmp_path)
    assert caught.value.iteration <= 4
    assert_last_good(tmp_path, 0)
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("what", ["loss", "gradient", "parameter", "reconstruction"])
def test_what_is_not_finite_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = train_module._Run._step

    def poisoned(run: Any, iteration: int) -> None:
        if iteration == 11:
            if what == "loss":
                run.model.head.bias.data[0] = float("nan")
            elif what == "gradient":
                run.model.rnn.bias_ih_l0.register_hook(lambda gradient: gradient / 0)
            elif what == "reconstruction":
                run.model.rnn.reverse_bias_l0.data[0] = float("inf")
                run.model.rnn.reverse_weight_hh_l0.data[0] = float("nan")
        step(run, iteration)
        if iteration == 12 and what == "parameter":
            run.model.rnn.weight_hh_l0.data[0, 0] = float("inf")

    monkeypatch.setattr(train_module._Run, "_step", poisoned)
    message = {
        "loss": "at iteration 11: the training loss is nan",
        "gradient": "at iteration 11: the gradient holds (nan|inf|-inf)",
        "parameter": "at iteration 12: (rnn.weight_hh_l0 holds NaN or infinite values|the test loss is nan)",
        "reconstruction": "at iteration 11: the reconstruction loss is nan",
    }[what]
    with pytest.raises(DivergedError, match=message):
        train(small(rule="learned" if what == "reconstruction" else "regularized"), tmp_path)
    assert_last_good(tmp_path, 8)


def test_divergence_before_the_first_row_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module._Run, "_evaluate", lambda run: (float("nan"), 0.0))
    with pytest.raises(DivergedError, match="at iteration 0: the test loss is nan"):
        train(small(), tmp_path)
    assert metrics(tmp_path) == []


# --- figures and progress --------------------------------------------------------------------------------------------


def test_figures(tmp_path: Path) -> None:
    for seed in (1, 2):
        train(small(seed=seed), tmp_path / f"tp{seed}")
    train(small(rule="backprop"), tmp_path / "bp")
    runs = {"target propagation": [tmp_path / "tp1", tmp_path / "tp2"], "backprop": [tmp_path / "bp"]}
    path = draw_comparison(runs, tmp_path / "new" / "all.png", title="three runs")
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bp" / "curve.png").unlink()
    assert draw_run(tmp_path / "bp").exists()
    with pytest.raises(ValueError, match="runs must name at least one folder"):
        draw_comparison({}, tmp_path / "none.png")
    for name in ("y.xyz", "y"):
        with pytest.raises(ConfigError, match=r"out must end in one of \..*\.png.*, got '.*y"):
            draw_comparison(runs, tmp_path / name)
    for other in (small("adding"), small(length=11)):
        train(other, tmp_path / f"{other.task}-{other.length}")
        with pytest.raises(ConfigError, match="runs of different tasks cannot share a figure: temporal-order, T=10; "):
            draw_comparison({**runs, "other": [tmp_path / f"{other.task}-{other.length}"]}, tmp_path / "y.png")


def test_a_figure_of_a_run_that_was_cut_short(tmp_path: Path) -> None:
    train(small(), tmp_path)
    table = tmp_path / "metrics.csv"
    table.write_bytes(table.read_bytes() + b"26,0.5,0.")
    assert [row.iteration for row in RunFolder(tmp_path).read_rows()] == [0, 6, 12, 18, 20]
    draw_run(tmp_path)
    table.write_text(table.read_text().splitlines()[0] + "\n")
    with pytest.raises(RunError, match="holds no run with an evaluation"):
        draw_run(tmp_path)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_numbers(terminal: bool, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as file:
        console = Console(file=file, force_terminal=terminal, width=160)
        train(small(), tmp_path / "run", console=console)
        file.seek(0)
        text = file.read()
    assert "temporal-order, T=10, 8 tanh units, regularized" in text
    assert ("20/20" in text) is terminal
    assert "it/s" in text
    shown = metrics(tmp_path / "run")
    for row in shown[-1:] if terminal else shown:
        assert f"{float(row['accuracy']):.2%}" in text
