"""Runs: their settings, what they compute, that they fail loudly, their figures."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from runs import SMALL, assert_last_good, assert_same_run, checkpoint, metrics, small
from test_tasks import write_mnist

import tpext
from tpext.experiments import Config, ConfigError, make_config
from tpext.experiments import train as train_module
from tpext.experiments.figures import draw_comparison, draw_heatmaps, draw_run
from tpext.experiments.loop import Interrupted
from tpext.experiments.model import SequenceModel, make_model
from tpext.experiments.rule_names import LAYER_RULES, RULES, SEQUENCE_RULES
from tpext.experiments.run_folder import Failure, Row, RunError, RunFolder
from tpext.experiments.runs import load_model, load_runs
from tpext.experiments.saved_config import differences
from tpext.experiments.train import DivergedError, train
from tpext.tasks import make_task
from tpext.tasks.toys import ToyName

pytestmark = pytest.mark.usefixtures("unrendered")

TOYS = get_args(ToyName)
DTP = "difference-target-propagation"


# --- settings --------------------------------------------------------------------------------------------------------

# Published settings: rule, task, length -> lr, head_lr, momentum, target_step, reg, reverse_lr, noise, iterations, B.
PUBLISHED = [
    ("regularized-inverse", "temporal-order", 60, (1e-1, 1e-1, 0, 1e-2, 10, None, None, 40_000, 20)),
    ("regularized-inverse", "temporal-order", 120, (1e-2, 1e-2, 0, 1e-2, 1, None, None, 48_000, 20)),
    ("regularized-inverse", "adding", 30, (1e-1, 1e-1, 0, 1e-1, 1, None, None, 24_000, 20)),
    ("regularized-inverse", "sequential-mnist", None, (1e-1, 1e-1, 0, 1e-4, 1, None, None, 40_000, 16)),
    ("regularized-inverse", "permuted-mnist", None, (1e-1, 1e-1, 0, 1e-4, 1, None, None, 40_000, 16)),
    ("backprop", "temporal-order", 60, (1e-5, 1e-5, 0.9, None, None, None, None, 40_000, 20)),
    ("backprop", "temporal-order", 120, (1e-5, 1e-5, 0.9, None, None, None, None, 48_000, 20)),
    ("backprop", "adding", 30, (1e-3, 1e-3, 0.9, None, None, None, None, 24_000, 20)),
    ("backprop", "sequential-mnist", None, (1e-5, 1e-5, 0, None, None, None, None, 40_000, 16)),
    ("backprop", "permuted-mnist", None, (1e-4, 1e-4, 0, None, None, None, None, 40_000, 16)),
    ("regularized-inverse", "sequential-cifar", None, (1e-2, 1e-2, 0, 1e-2, 10, None, None, 8_000, 16)),
    ("backprop", "sequential-cifar", None, (1e-3, 1e-3, 0, None, None, None, None, 8_000, 16)),
    ("learned-inverse", "temporal-order", 60, (1e-2 / 20, 1e-2, 0, 1e-1, None, 1e-3, 0, 40_000, 20)),
    ("learned-inverse", "temporal-order", 120, (1e-2 / 20, 1e-2, 0, 1e-1, None, 1e-3, 0, 48_000, 20)),
    ("learned-inverse", "adding", 30, (1e-2 / 20, 1e-2, 0, 1e-1, None, 1e-3, 0, 24_000, 20)),
    ("learned-inverse", "sequential-mnist", None, (1e-2 / 16, 1e-2, 0, 1e-7, None, 1e-8, 0.1, 40_000, 16)),
]


@pytest.mark.parametrize(("rule", "task", "length", "expected"), PUBLISHED)
def test_published_settings(rule: Any, task: str, length: int | None, expected: tuple[Any, ...]) -> None:
    config = make_config(task, rule=rule, preset="published", length=length)
    present = (config.lr, config.head_lr, config.momentum)
    fields = dataclasses.asdict(config.rule)
    present += (fields.get("target_step"), fields.get("reg"))
    present += (config.reverse_lr if rule == "learned-inverse" else None, fields.get("noise"))
    assert (*present, config.iterations, config.batch_size) == expected
    assert isinstance(config.rule, RULES[rule])
    assert config.nesterov == (config.momentum > 0)
    assert (config.hidden_size, config.layers, config.nonlinearity) == (100, 1, "tanh")
    assert (config.init, config.optimizer, config.clip_grad_norm) == ("orthogonal", "sgd", None)
    assert fields.get("normalize", False) is False
    assert fields.get("credit", "through_time") == "through_time"
    assert fields.get("correction", "linearized") == "linearized"


def test_default_preset_is_the_published_one_with_fewer_iterations() -> None:
    default, full = make_config("temporal-order"), make_config("temporal-order", preset="published")
    assert default == replace(full, preset="default", iterations=4_000)
    assert default.task == make_task("temporal-order", length=60)
    assert make_config("sequential-mnist").iterations == 16_000
    assert make_config("random-permutation").rule == default.rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sorting"}, "task must be one of .*temporal-order.*, got 'sorting'; or module:Class"),
        (
            {"rule": "magic"},
            f"rule must be one of {', '.join(RULES)}, or module:Class or file.py:Class for one of .*, got 'magic'",
        ),
        ({"rule": "backprop", "reg": 1.0}, r"reg does not belong to rule=backprop \(options of that rule: none\)"),
        ({"rule": "learned-inverse", "correction": "none"}, "correction does not belong to rule=learned-inverse"),
        ({"reverse_lr": 1.0}, "reverse_lr does not belong to rule=regularized-inverse"),
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
        (
            {"rule": "learned-inverse", "nonlinearity": "relu"},
            "learned-inverse does not go with cell=rnn, nonlinearity=relu: ",
        ),
        ({"device": "toaster"}, "device must be a torch device"),
        ({"device": "meta"}, "device must be cpu or cuda"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be a number > 0, got 0"),
        (
            {"cell": "gru", "forget_bias": 1.0},
            "forget_bias belongs to a cell with a forget gate, which cell=gru has not",
        ),
        ({"init": "torch", "orthogonal": True}, "orthogonal needs init=orthogonal, to begin with, got init=torch"),
        ({"task": "mnist-mlp", "orthogonal": True}, "orthogonal does not belong to mnist-mlp, got True"),
        ({"task": "mnist-mlp", "forget_bias": 1.0}, "forget_bias does not belong to mnist-mlp, got 1"),
        ({"threads": 1025}, "threads must be at most 1024, got 1025"),
        ({"seed": 2**64}, "seed must be at most 18446744073709551615"),
        ({"length": 4_000_000_000}, "length must be at most 2147483647"),
        (
            {"task": "random-permutation", "preset": "published"},
            "no settings were published for preset=published, task=ran",
        ),
        ({"length": 61, "preset": "published"}, "no settings were published .*length=61"),
        ({"task": "adding", "length": 60, "preset": "published"}, "no settings were published .*length=60"),
        ({"task": "sequential-mnist", "chunk": 28, "preset": "published"}, "no settings were published .*chunk=28"),
        ({"preset": "best"}, "preset must be one of default, faust, lee, long-range, published, seely, got 'best'"),
        (
            {"preset": "lee"},
            r"preset=lee, task=temporal-order, length=60, .* \(presets there: default, long-range, published\)",
        ),
        (
            {"rule": DTP},
            rf"rule={DTP} does not belong to temporal-order \(rules of that task: {', '.join(SEQUENCE_RULES)}; one of "
            r"your own subclasses tpext\.rules\.RecurrentRule\)$",
        ),
        ({"sizes": (3,)}, r"sizes does not belong to temporal-order, got \(3,\)"),
        ({"reduction": "batch"}, "reduction does not belong to temporal-order, got 'batch'"),
        ({"reference_compat": True}, "reference_compat does not belong to temporal-order, got True"),
        ({"nonlinearity": "sigmoid"}, "nonlinearity must be one of tanh, relu, identity with cell=rnn, got sigmoid"),
        ({"init": "xavier"}, "init of temporal-order must be orthogonal or torch, got xavier"),
        ({"epochs": 3}, "epochs does not belong to temporal-order, got 3"),
        ({"epochs": 3, "iterations": 3}, "give epochs or iterations, got epochs=3, iterations=3"),
        (
            {"schedule": "alternating", "rule": "learned-inverse"},
            "schedule=alternating needs a task with epochs and a rule that learns, got task=temporal-order",
        ),
        ({"order": "shuffled"}, "order does not belong to temporal-order"),
        ({"optimizer": "centred-rmsprop", "momentum": 1.0}, "momentum must be below 1 with optimizer=centred-rmsprop"),
        (
            {"task": "mnist-mlp", "rule": "learned-inverse"},
            rf"rule=learned-inverse does not belong to mnist-mlp \(rules of that task: {', '.join(LAYER_RULES)}; one "
            r"of your own subclasses tpext\.rules\.LayerRule\); the task has no length, so the network is .*$",
        ),
        ({"task": "mnist-mlp", "preset": "lee"}, r"task=mnist-mlp, .* rule=reg.* \(presets there: default, seely\)"),
        ({"task": "spiral", "preset": "published"}, r"task=spiral, .* \(presets there: default\)"),
        ({"task": "mnist-mlp", "hidden_size": 3}, "hidden_size does not belong to mnist-mlp, got 3"),
        ({"task": "mnist-mlp", "layers": 3}, "layers does not belong to mnist-mlp, got 3"),
        ({"task": "mnist-mlp", "sizes": ()}, r"sizes must be the sizes of at least one hidden layer, got \(\)"),
        ({"task": "mnist-mlp", "sizes": (3, 0)}, "sizes must be an integer >= 1, got 0"),
        ({"task": "mnist-mlp", "order": "random"}, "order must be one of shuffled, sequential_first, sequential, got"),
        ({"task": "mnist-mlp", "rule": DTP, "reg": 1.0}, "reg does not belong to rule=difference-target-propagation"),
        ({"task": "mnist-mlp", "reg": -1.0}, "reg must be a .*number.* >= 0, got -1"),
        (
            {"task": "mnist-mlp", "rule": DTP, "correction": "linearized"},
            "correction must be one of 'difference', 'none'",
        ),
        ({"task": "mnist-mlp", "rule": DTP, "local_loss": "pre"}, "local_loss must be one of 'post', got 'pre'"),
        (
            {"task": "mnist-mlp", "schedule": "alternating"},
            "alternating needs .* a rule that learns, got task=mnist-mlp",
        ),
        ({"task": "mnist-mlp", "precision": "bf16"}, "precision of mnist-mlp must be 32 or 64, got bf16"),
        ({"task": "mnist-mlp", "reduction": "mean"}, "reduction must be one of sum, batch, element, got 'mean'"),
        ({"task": "spiral", "rule": DTP, "schedule": "alternating"}, "schedule=alternating needs a task with epochs"),
        ({"task": "spiral", "data_dir": "x"}, "data_dir does not belong to spiral"),
        ({"task": "mnist-mlp", "rule": "kaczmarz", "optimizer": "adam"}, "kaczmarz needs optimizer=sgd, .* got adam"),
        ({"task": "mnist-mlp", "rule": "kaczmarz", "lr": 0.5}, "kaczmarz needs lr=1, .* at rate 1, got 0.5"),
        ({"task": "mnist-mlp", "rule": "kaczmarz", "head_lr": 0.5}, "kaczmarz needs head_lr=1"),
        ({"task": "mnist-mlp", "rule": "kaczmarz", "momentum": 0.9}, "kaczmarz needs momentum=0"),
        ({"task": "mnist-mlp", "rule": "kaczmarz", "clip_grad_norm": 1.0}, "kaczmarz needs clip_grad_norm=None"),
        ({"task": "mnist-mlp", "rule": "kaczmarz", "reduction": "batch"}, "kaczmarz needs reduction=sum"),
        (
            {"task": "mnist-mlp", "rule": "kaczmarz", "reference_compat": True},
            "does not go with reference_compat",
        ),
        (
            {"task": "mnist-mlp", "rule": "kaczmarz", "nonlinearity": "tanh"},
            "does not go with nonlinearity=tanh: activation",
        ),
        (
            {"task": "mnist-mlp", "rule": "kaczmarz", "relaxation": 2.0},
            "relaxation must be a finite number > 0 and <",
        ),
        ({"task": "mnist-mlp", "rule": "kaczmarz", "dx": "max"}, "dx must be one of 'mean', 'wnorm', 'regularized'"),
        ({"task": "mnist-mlp", "rule": "kaczmarz", "target_step": 1.0}, "target_step does not belong to rule=kaczmarz"),
        ({"task": "mnist-mlp", "rule": DTP, "std": 1.0}, "std does not belong to rule=difference-target-propagation"),
        ({"task": "mnist-mlp", "rule": "kaczmarz", "preset": "lee"}, r"\(presets there: default, faust\)"),
        (
            {"task": "digits-mlp", "rule": "kaczmarz", "preset": "faust"},
            r"task=digits-mlp, .* \(presets there: default\)",
        ),
        ({"task": "mnist-autoencoder", "rule": "kaczmarz"}, "kaczmarz learns classes, which mnist-autoencoder has not"),
        (
            {"task": "mnist-mlp", "rule": "kaczmarz", "std": 0.1, "init": "xavier"},
            "std is that of init=torch, .*=xavier",
        ),
        (
            {"task": "spiral", "reference_compat": True},
            "regularized-least-squares does not go with reference_compat=True, nonlinearity=leaky_relu: Regular",
        ),
        (
            {"task": "digits-mlp", "nonlinearity": "leaky_relu", "reference_compat": True},
            "does not go with reference_compat=True, nonlinearity=leaky_relu",
        ),
        (
            {"task": "digits-mlp", "form": "ridge", "reference_compat": True},
            "needs form='proximal' .* got form='ridge'",
        ),
        ({"margin": 1e-9}, "margin must be at least 1.19e-07 with precision=32, got 1e-09"),
        ({"margin": (0.1, 1e-9)}, "margin must be at least 1.19e-07 with precision=32, got \\(0.1, 1e-09\\)"),
        (
            {"task": "spiral", "rule": "constrained-least-squares", "margin": 1e-17, "precision": "64"},
            "margin must be at least 2.22e-16 with precision=64, got 1e-17",
        ),
        ({"tied": True}, "tied does not belong to temporal-order, got True"),
        ({"task": "mnist-mlp", "tied": True}, "tied ties the layers of an autoencoder, not of mnist-mlp"),
        ({"task": "mnist-autoencoder", "tied": 1}, "tied must be a bool, got 1"),
        ({"task": "mnist-autoencoder", "rule": DTP, "tied": True}, f"tied does not belong to rule={DTP}, whose head"),
        (
            {"task": "mnist-autoencoder", "sizes": (9, 7, 8), "tied": True},
            r"sizes must be an odd number .* with tied=True, got \(9, 7, 8\)",
        ),
        ({"task": "mnist-autoencoder", "sizes": (9, 9), "tied": True}, r"sizes must be an odd number .*, got \(9, 9\)"),
        (
            {"task": "mnist-autoencoder", "reduction": "batch", "tied": True},
            "reduction must be sum with tied=True, .* got batch",
        ),
        ({"task": "spiral", "epochs": 2}, "epochs does not belong to spiral, got 2"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**{"task": "temporal-order", **options})


@pytest.mark.parametrize("rule", RULES)
def test_config_survives_json(rule: Any) -> None:
    task = "temporal-order" if rule in SEQUENCE_RULES else "mnist-mlp"
    margin = None if rule == "kaczmarz" else 1.0
    config = make_config(task, rule=rule, seed=2**40, clip_grad_norm=margin, data_dir=None, threads=3)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("adding", {"length": 12}),
        ("permuted-mnist", {"chunk": 28}),
        ("mnist-mlp", {"order": "sequential"}),
        ("xor", {}),
    ],
)
def test_a_configuration_of_an_earlier_version_is_read(task: str, options: dict[str, Any]) -> None:
    """It had the options of tasks among the others, and those of the rule beside its name."""
    config = make_config(task, **options)
    values = config.to_dict()
    for name in ("length", "chunk", "train_size", "order"):
        values[name] = values["task"]["options"].get(name)
    if task == "permuted-mnist":
        values["length"] = 28
    values |= {"task": task, "rule": {"name": values["rule"]["name"], **values["rule"]["options"]}}
    del values["forget_bias"], values["orthogonal"]
    assert Config.from_dict(json.loads(json.dumps(values))) == config


def test_lengths_in_between_start_from_the_nearest_published_one() -> None:
    assert make_config("temporal-order", length=119).rule == make_config("temporal-order", length=60).rule
    assert make_config("temporal-order", length=300).lr == make_config("temporal-order", length=120).lr == 1e-2
    assert make_config("adding", length=60).rule == make_config("adding").rule


@pytest.mark.parametrize("init", ["orthogonal", "torch"])
def test_forget_gates_start_with_their_bias(init: Any) -> None:
    H = 5
    config = make_config("temporal-order", cell="lstm", layers=2, hidden_size=H, forget_bias=1.5, init=init)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make_model(config, config.make_task())
        torch.manual_seed(1)
        plain = make_model(replace(config, forget_bias=None), config.make_task())
    assert isinstance(model, SequenceModel)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        expected = theirs.detach().clone()
        if name.startswith("rnn.bias_"):
            # torch's rows: i, f, g, o; both biases act as their sum
            expected[H : 2 * H] = 1.5 if "bias_ih" in name else 0.0
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize("rule", ["regularized-inverse", "backprop"])
def test_long_range_settings_keep_recurrent_weights_orthogonal(rule: Any, tmp_path: Path) -> None:
    config = small(rule=rule, preset="long-range", lr=0.02)
    assert (config.optimizer, config.momentum, config.orthogonal) == ("adam", 0.0, True)
    train(config, tmp_path)
    weight = checkpoint(tmp_path)["model"]["rnn.weight_hh_l0"]
    begin = make_model(config, config.make_task()).get_parameter("rnn.weight_hh_l0")
    assert (weight - begin).abs().max() > 0.03
    torch.testing.assert_close(weight.mT @ weight, torch.eye(len(weight)), rtol=0, atol=1e-3)


def test_a_callback_sees_each_evaluation_and_changes_nothing(tmp_path: Path) -> None:
    config = small(rule="learned-inverse", noise=0.1)
    seen = []

    def callback(row: Row, model: torch.nn.Module) -> None:
        torch.rand(3)  # of its own
        seen.append((row.iteration, model.training, sum(float(p.detach().sum()) for p in model.parameters())))
        model.eval()

    train(config, tmp_path / "watched", callback=callback)
    train(config, tmp_path / "alone")
    assert [iteration for iteration, *_ in seen] == [0, 6, 12, 18, 20]
    assert len({total for *_, total in seen}) == 5
    assert all(training for _, training, _ in seen)
    assert_same_run(tmp_path / "watched", tmp_path / "alone")


@pytest.mark.gpu
def test_noise_drawn_on_a_gpu_goes_on_after_a_stop(tmp_path: Path) -> None:
    config = small(rule="learned-inverse", noise=0.1, device="cuda")
    calls = iter(range(1, 100))
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", stop=lambda: next(calls) == 7)
    train(config, tmp_path / "parts", resume=True)
    train(config, tmp_path / "whole", callback=lambda row, model: torch.rand(3, device="cuda").sum().item())
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("rule", ["regularized-inverse", "learned-inverse"])
def test_other_optimizers_get_gradients_of_full_size(rule: Any) -> None:
    assert make_config("temporal-order", rule=rule, optimizer="adam").rule.normalize is True
    assert make_config("temporal-order", rule=rule, optimizer="adam", normalize=False).rule.normalize is False
    assert make_config("temporal-order", rule=rule, momentum=0.5).rule.normalize is False


def test_rates_follow_what_is_given() -> None:
    config = make_config("temporal-order", rule="learned-inverse", lr=0.3)
    assert (config.lr, config.head_lr) == (0.3, 0.3)
    config = make_config("temporal-order", lr=0.3, head_lr=0.2, optimizer="sgd", momentum=0.5)
    assert (config.lr, config.head_lr, config.nesterov) == (0.3, 0.2, True)
    config = make_config("temporal-order", rule="backprop", optimizer="adam")
    assert (config.lr, config.head_lr, config.momentum, config.nesterov) == (1e-3, 1e-3, 0.0, False)
    config = make_config("sequential-mnist", rule="learned-inverse", batch_size=8)
    assert (config.lr, config.head_lr) == (1e-2 / 8, 1e-2)


def test_differences_name_what_was_asked_for() -> None:
    saved = small(rule="learned-inverse", noise=0.1)
    same_options = {"task": "temporal-order", "rule": "learned-inverse", "noise": 0.1, "hidden_size": 8, "threads": 7}
    assert differences(saved.carried_out(same_options), same_options) == []
    assert differences(saved, same_options) == ["threads is 1 there, 7 was asked for"]
    assert differences(saved, saved.options()) == []
    assert differences(saved, {"task": "adding", "rule": "backprop", "noise": 0.2, "reg": 1.0}) == [
        "task is temporal-order there, adding was asked for",
        "rule is learned-inverse there, backprop was asked for",
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


@pytest.mark.parametrize("rule", ["regularized-inverse", "learned-inverse"])
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


@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_gradients_are_clipped_by_their_common_norm(bound: float, tmp_path: Path) -> None:
    """A step of gradient descent, the gradients of all layers shortened by one factor where their norm is too large."""
    options = {"rule": "backprop", "optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "head_lr": 0.3, "precision": "64"}
    config = small(**options, iterations=1)
    torch.manual_seed(config.seed)
    task = config.make_task()
    model = make_model(config, task).double()
    input, target = task.batch(config.seed, 0, config.batch_size)
    torch.nn.functional.cross_entropy(model(input.double()), target).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    train(replace(config, clip_grad_norm=bound * norm), tmp_path)
    trained = checkpoint(tmp_path)["model"]
    for name, value in model.named_parameters():
        if name in gradients:
            rate = config.head_lr if name.startswith("head") else config.lr
            moved = rate * min(1.0, bound) * gradients[name]
            # torch adds 1e-6 to the norm that it divides by
            torch.testing.assert_close(value.detach() - trained[name], moved, rtol=2e-6 / norm, atol=1e-15)


@pytest.mark.parametrize("task", ["temporal-order", "adding", "xor"])
def test_an_evaluation_in_parts_is_that_of_the_whole(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of three samples, of one the last."""
    vectors = task in TOYS
    network = {"length": None, "hidden_size": None, "sizes": (9, 7)} if vectors else {}
    config = small(task, precision="64", **network)
    monkeypatch.setattr(train_module, "EVALUATION_NUMBERS", 3 * (16 if vectors else 80))
    result = train(config, tmp_path)
    made = config.make_task()
    model = make_model(config, made).double()
    model.load_state_dict(checkpoint(tmp_path)["model"])
    input, target = made.test_set(config.seed, config.test_size)
    assert config.test_size % 3 == 1
    with torch.no_grad():
        output = model(input.double())
    assert result.test_loss == pytest.approx(made.loss(output, target).item(), rel=1e-12)
    assert result.accuracy == pytest.approx(made.correct(output, target).double().mean().item(), rel=1e-12)


def test_orthogonal_initialization(tmp_path: Path) -> None:
    config = small(rule="learned-inverse", layers=2)
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
    """Every parameter left where it started, but for those that do not learn and the second bias, which stays zero."""
    torch.manual_seed(config.seed)
    start, trained = dict(SequenceModel(config, config.make_task()).named_parameters()), checkpoint(folder)["model"]
    assert start.keys() == trained.keys()
    for name, value in start.items():
        moved = not torch.equal(trained[name].to(value.dtype), value)
        assert moved == (value.requires_grad and "bias_hh" not in name), name


def test_mixed_precision_rounds_the_outputs(tmp_path: Path) -> None:
    """To eight bits, so that the first evaluation is near that in float32 and not the same."""
    for precision in ("32", "bf16"):
        train(small(precision=precision), tmp_path / precision)  # type: ignore[arg-type]
    whole, rounded = (float(metrics(tmp_path / precision)[0]["test_loss"]) for precision in ("32", "bf16"))
    assert whole != rounded
    assert rounded == pytest.approx(whole, rel=2**-6)


@pytest.mark.parametrize("rule", SEQUENCE_RULES)
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
            train(make_config("sequential-mnist", **{**options, **wrong}), tmp_path / "run")
    monkeypatch.setattr(tpext, "build_info", lambda: {"version": "0", "cuda_architectures": []})
    with pytest.raises(ConfigError, match="this build of tpext has no CUDA kernels"):
        train(small(device="cuda"), tmp_path / "run")
    monkeypatch.setattr(tpext, "build_info", lambda: {"version": "0", "cuda_architectures": ["sm_90"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device must be cpu: torch sees no CUDA device, got cuda"):
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
    assert list(rows[0]) == [
        "iteration", "train_loss", "test_loss", "accuracy", "running_accuracy", "validation_loss",
    ]  # fmt: skip
    assert {(row["running_accuracy"], row["validation_loss"]) for row in rows} == {("", "")}
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


# --- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", ["regularized-inverse", "backprop"])
def test_divergence_is_told_at_once(rule: Any, optimizer: Any, tmp_path: Path) -> None:
    config = small("adding", rule=rule, nonlinearity="relu", optimizer=optimizer, lr=1e30)
    with pytest.raises(DivergedError, match=r"diverged at iteration [234]: ") as caught:
        train(config, tmp_path)
    assert caught.value.iteration <= 4
    assert_last_good(tmp_path, 0)
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("what", ["loss", "gradient", "parameter", "reconstruction"])
def test_what_is_not_finite_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = train_module.TrainingRun._step

    def poisoned(run: Any, iteration: int) -> Iterator[Any]:
        if iteration == 11:
            if what == "loss":
                run.model.head.bias.data[0] = float("nan")
            elif what == "gradient":
                run.model.rnn.bias_ih_l0.register_hook(lambda gradient: gradient / 0)
            elif what == "reconstruction":
                run.model.rnn.reverse_bias_l0.data[0] = float("inf")
                run.model.rnn.reverse_weight_hh_l0.data[0] = float("nan")
        yield from step(run, iteration)
        if iteration == 12 and what == "parameter":
            run.model.rnn.weight_hh_l0.data[0, 0] = float("inf")

    monkeypatch.setattr(train_module.TrainingRun, "_step", poisoned)
    message = {
        "loss": "at iteration 11: the training loss is nan",
        "gradient": "at iteration 11: the gradient holds (nan|inf|-inf)",
        "parameter": "at iteration 12: (rnn.weight_hh_l0 holds NaN or infinite values|the test loss is nan)",
        "reconstruction": "at iteration 11: the reconstruction loss is nan",
    }[what]
    with pytest.raises(DivergedError, match=message):
        train(small(rule="learned-inverse" if what == "reconstruction" else "regularized-inverse"), tmp_path)
    assert_last_good(tmp_path, 8)


def test_divergence_before_the_first_row_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module.TrainingRun, "_evaluate", lambda run, samples: (float("nan"), 0.0))
    with pytest.raises(DivergedError, match="at iteration 0: the test loss is nan"):
        train(small(), tmp_path)
    assert metrics(tmp_path) == []


# --- figures and progress --------------------------------------------------------------------------------------------


@pytest.mark.renders
def test_figures(tmp_path: Path) -> None:
    for seed in (1, 2):
        train(small(seed=seed), tmp_path / f"tp{seed}")
    train(small(rule="backprop"), tmp_path / "bp")
    assert draw_comparison({"all": tmp_path}, tmp_path / "all.png").exists(), "a folder of many"
    runs = {"target propagation": [tmp_path / "tp1", tmp_path / "tp2"], "backprop": [tmp_path / "bp"]}
    path = draw_comparison({**runs, "backprop": tmp_path / "bp"}, tmp_path / "new" / "all.png", title="three runs")
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bp" / "curve.png").unlink()
    assert draw_run(tmp_path / "bp").exists()
    with pytest.raises(ValueError, match="runs must name at least one folder"):
        draw_comparison({}, tmp_path / "none.png")
    with pytest.raises(ConfigError, match="runs must name at least one folder for 'nothing', got none"):
        draw_comparison({**runs, "nothing": []}, tmp_path / "none.png")
    with pytest.raises(ConfigError, match="panels must have at least one table, got none"):
        draw_heatmaps({}, tmp_path / "none.png")
    for name in ("y.xyz", "y"):
        with pytest.raises(ConfigError, match=r"out must end in one of \..*\.png.*, got '.*y"):
            draw_comparison(runs, tmp_path / name)
    for other in (small("adding"), small(length=11)):
        folder = tmp_path / f"{other.task_name}-{other.task.length}"
        train(other, folder)
        with pytest.raises(ConfigError, match="runs of different tasks cannot share a figure: temporal-order, T=10; "):
            draw_comparison({**runs, "other": [folder]}, tmp_path / "y.png")


def test_the_trained_network_is_loaded_with_its_task(tmp_path: Path) -> None:
    config = small(iterations=20)
    accuracy = train(config, tmp_path / "run").accuracy
    before = torch.get_rng_state()
    network, task = load_model(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training
    input, target = task.test_set(config.seed, config.test_size)
    assert float(task.correct(network(input), target).double().mean()) == accuracy
    with pytest.raises(RunError, match=r"holds no run$"):
        load_model(tmp_path)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(RunError, match=r"checkpoint\.pt is missing"):
        load_model(tmp_path / "run")


def test_folders_of_another_form(tmp_path: Path) -> None:
    folders: Any = [str(tmp_path)]
    with pytest.raises(TypeError, match="each an argument of its own, got a list"):
        load_runs(folders)
    with pytest.raises(TypeError, match="runs must be a mapping of labels to folders, got a list"):
        draw_comparison(folders, tmp_path / "all.png")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_diverged_is_drawn_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small(seed=1), tmp_path / "1")
    with pytest.raises(DivergedError):
        train(small(seed=2, lr=1e30), tmp_path / "2")
    RunFolder(tmp_path / "2").write_failure(Failure(diverged=True, message="NaN"))
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: drawn.append(figure))
    draw_comparison({"one": [tmp_path / "2"], "two": [tmp_path / "1", tmp_path / "2"]}, tmp_path / "all.png")
    (legend,) = drawn[0].legends
    half = float(metrics(tmp_path / "1")[-1]["accuracy"]) / 2
    assert [text.get_text() for text in legend.get_texts()] == ["one (diverged)", f"two ({half:.1%}, 1 of 2 diverged)"]


def test_28_curves_can_be_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        train(small(seed=seed), tmp_path / str(seed))
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: drawn.append(figure))
    draw_comparison({str(number): [tmp_path / "1", tmp_path / "2"] for number in range(28)}, tmp_path / "all.png")
    drawn[0].draw_without_rendering()  # lays the figure out
    for axes in drawn[0].axes:
        curves = [line for line in axes.get_lines() if line.get_linewidth() == 2]
        assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == len(curves) == 28
        assert {line.get_linestyle() for line in curves[:7]} == {"-"}
        assert axes.get_window_extent().height > 0.4 * drawn[0].bbox.height
    (legend,) = drawn[0].legends
    assert [text.get_text().split()[0] for text in legend.get_texts()] == [str(number) for number in range(28)]


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
    assert "temporal-order, T=10, 8 tanh units, regularized-inverse" in text
    assert ("20/20" in text) is terminal
    assert "it/s" in text
    shown = metrics(tmp_path / "run")
    for row in shown[-1:] if terminal else shown:
        assert f"{float(row['accuracy']):.2%}" in text
