"""Runs: what they compute, that they resume bit for bit, that they fail loudly."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from runs import DELETED, Killed, assert_edits_are_named, assert_same_run, checkpoint, kill_after, metrics
from test_tasks import write_cifar10, write_mnist

import tpext
from tpext.experiments import Config, ConfigError, make_config
from tpext.experiments import run_folder as run_folder_module
from tpext.experiments import train as train_module
from tpext.experiments.figures import draw_comparison, draw_run, draw_task
from tpext.experiments.model import FeedForwardModel, Model, SequenceModel, make_model
from tpext.experiments.plan import Plan
from tpext.experiments.presets import Case, presets_of
from tpext.experiments.rule_names import LAYER_RULES, RULES, SEQUENCE_RULES
from tpext.experiments.run_folder import RunError, RunFolder, differences
from tpext.experiments.train import DivergedError, train
from tpext.reference import kaczmarz as oracle
from tpext.tasks import TASKS, make_task
from tpext.tasks.toys import ToyName

pytestmark = pytest.mark.usefixtures("unrendered")

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

TOYS = get_args(ToyName)
FEED_FORWARD = [name for name in TASKS if make_task(name).length is None]
DTP = "difference-target-propagation"


def small(task: str = "temporal-order", **options: Any) -> Config:
    return make_config(task, **{**SMALL, **options})


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
            "rule must be one of backprop, learned-inverse, regularized-inverse, constrained-.*, got 'magic'",
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
            "learned-inverse does not go with nonlinearity=relu: ",
        ),
        ({"device": "toaster"}, "device must be a torch device"),
        ({"device": "meta"}, "device must be cpu or cuda"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be a number > 0, got 0"),
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
        ({"preset": "best"}, "preset must be one of default, faust, lee, published, seely, got 'best'"),
        ({"preset": "lee"}, r"preset=lee, task=temporal-order, length=60, .* \(presets there: default, published\)"),
        (
            {"rule": DTP},
            rf"rule={DTP} does not belong to temporal-order \(rules of that task: backprop, learned-inverse, r",
        ),
        ({"sizes": (3,)}, r"sizes does not belong to temporal-order, got \(3,\)"),
        ({"reduction": "batch"}, "reduction does not belong to temporal-order, got 'batch'"),
        ({"reference_compat": True}, "reference_compat does not belong to temporal-order, got True"),
        ({"nonlinearity": "sigmoid"}, "nonlinearity of temporal-order must be tanh, relu or identity, got sigmoid"),
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
            r"rule=learned-inverse does not belong to mnist-mlp \(rules .*: backprop, constr",
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
    assert Config.from_dict(json.loads(json.dumps(values))) == config


def test_lengths_in_between_start_from_the_nearest_published_one() -> None:
    assert make_config("temporal-order", length=119).rule == make_config("temporal-order", length=60).rule
    assert make_config("temporal-order", length=300).lr == make_config("temporal-order", length=120).lr == 1e-2
    assert make_config("adding", length=60).rule == make_config("adding").rule


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
    assert differences(saved, same_options) == []
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
    """Every parameter left where it started, but for the second bias, which stays zero."""
    torch.manual_seed(config.seed)
    start, trained = SequenceModel(config, config.make_task()).state_dict(), checkpoint(folder)["model"]
    assert start.keys() == trained.keys()
    for name, value in start.items():
        moved = not torch.equal(trained[name].to(value.dtype), value)
        assert moved == ("bias_hh" not in name), name


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
    assert list(rows[0]) == ["iteration", "train_loss", "test_loss", "accuracy", "running_accuracy"]
    assert {row["running_accuracy"] for row in rows} == {""}
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


# --- feed-forward networks -------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "sizes": (9, 7),
    "batch_size": 5,
    "test_size": 7,
    "epochs": 4,
    "eval_interval": 6,
    "checkpoint_interval": 4,
    "threads": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of MNIST (25 images to train, 7 to test) and CIFAR-10 (20 and 4)."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder)
    write_cifar10(folder)
    return folder


def tiny(data: Path, task: str = "mnist-mlp", **options: Any) -> Config:
    """A run of 20 iterations, or for the alternating schedule 40."""
    values = {**TINY, **options}
    if task in TOYS:
        del values["epochs"]
        values["iterations"] = 20
    elif task == "digits-mlp":
        values |= {"train_size": 25}
    else:
        values |= {"data_dir": str(data)}
    if task == "cifar-mlp":
        values |= {"test_size": 4}
    return make_config(task, **values)


def test_settings_of_seely() -> None:
    for rule, expected in (
        (
            "constrained-least-squares",
            tpext.ConstrainedLeastSquares(target_step=0.1, normalize=False, local_loss="pre", margin=1e-2),
        ),
        (
            "regularized-least-squares",
            tpext.RegularizedLeastSquares(reg=1e-3, target_step=0.1, normalize=False, local_loss="pre"),
        ),
        ("backprop", tpext.Backprop()),
    ):
        config = make_config("mnist-mlp", rule=rule, preset="seely")  # type: ignore[arg-type]
        assert config.rule == expected
        assert (config.sizes, config.nonlinearity, config.init) == ((240,) * 4, "tanh", "xavier")
        assert (config.optimizer, config.lr, config.head_lr, config.momentum) == ("tf-rmsprop", 3e-3, 3e-3, 0)
        assert (config.batch_size, config.iterations, config.epochs) == (100, 20_000, None)
        assert (config.task.train_size, config.task.order, config.reduction) == (50_000, "sequential_first", "element")
        assert (config.clip_grad_norm, config.reference_compat) == (100, True)
    autoencoder = make_config("mnist-autoencoder", rule="constrained-least-squares", preset="seely")
    assert autoencoder.sizes == (200, 100, 5, 100, 200)


def test_settings_of_lee() -> None:
    config = make_config("mnist-mlp", rule=DTP, preset="lee")
    step, noise = 0.327736332653, 0.359829566008
    assert config.rule == tpext.DifferenceTargetPropagation(target_step=step, noise=noise, normalize=False)
    assert (config.lr, config.head_lr, config.reverse_lr) == (0.0148893490317, 0.0148893490317, 0.00501149118237)
    assert (config.reduction, config.schedule) == ("batch", "alternating")
    baseline = make_config("mnist-mlp", rule="backprop", preset="lee")
    assert (baseline.lr, baseline.head_lr) == (0.000804436870084, 0.000804436870084)
    assert (baseline.reduction, baseline.schedule) == ("sum", "parallel")
    for each in (config, baseline):
        assert (each.sizes, each.nonlinearity, each.init) == ((240,) * 7, "tanh", "orthogonal")
        assert (each.optimizer, each.momentum, each.reference_compat) == ("centred-rmsprop", 0.9, False)
        assert (each.batch_size, each.epochs, each.task.train_size, each.task.order) == (100, 100, 50_000, "sequential")


def test_settings_of_faust() -> None:
    config = make_config("mnist-mlp", rule="kaczmarz", preset="faust")
    assert config.rule == tpext.Kaczmarz(relaxation=1.0, damping=0.0, dx="mean", update="average", std=1e-3)
    assert (config.sizes, config.nonlinearity, config.init) == ((32,), "relu", "torch")
    assert (config.optimizer, config.lr, config.head_lr, config.momentum) == ("sgd", 1, 1, 0)
    assert (config.batch_size, config.epochs, config.iterations, config.task.order) == (64, 10, None, "shuffled")


def test_rules_have_the_names_of_their_classes() -> None:
    names = {name.replace("-", ""): kind.__name__ for name, kind in RULES.items()}
    assert names == {kind.__name__.lower(): kind.__name__ for kind in RULES.values()}
    assert {"regularized-inverse", "learned-inverse", "backprop"} <= set(SEQUENCE_RULES)
    assert {"regularized-least-squares", "constrained-least-squares", DTP, "kaczmarz", "backprop"} <= set(LAYER_RULES)


def test_the_former_name_of_a_task_or_a_rule_in_a_saved_run_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(small())
    for old, new, message in (
        ('"temporal-order"', '"mnist"', "mnist is called sequential-mnist now"),
        ('"regularized-inverse"', '"regularized"', "regularized is called regularized-inverse now"),
    ):
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace(old, new))
        with pytest.raises(RunError, match=f"config.json: .*{message}"):
            RunFolder(tmp_path).read_config()
        (tmp_path / "config.json").write_text(text)


def test_where_there_are_presets() -> None:
    found = {
        (task, rule): presets_of(Case(task, make_task(task), kind))
        for task in FEED_FORWARD
        for rule, kind in LAYER_RULES.items()
    }
    assert {key: value for key, value in found.items() if value} == {
        ("mnist-mlp", "regularized-least-squares"): ["seely"],
        ("mnist-mlp", "constrained-least-squares"): ["seely"],
        ("mnist-mlp", DTP): ["lee"],
        ("mnist-mlp", "kaczmarz"): ["faust"],
        ("mnist-mlp", "backprop"): ["lee", "seely"],
        ("mnist-autoencoder", "regularized-least-squares"): ["seely"],
        ("mnist-autoencoder", "constrained-least-squares"): ["seely"],
        ("mnist-autoencoder", "backprop"): ["seely"],
    }


def test_another_optimizer_or_duration_than_the_presets() -> None:
    config = make_config("mnist-mlp", rule=DTP, preset="lee", optimizer="sgd", momentum=0.5, iterations=70)
    assert (config.lr, config.head_lr, config.reverse_lr, config.momentum) == (1e-3, 1e-3, 1e-3, 0.5)
    assert config.nesterov
    assert (config.epochs, config.iterations) == (None, 70)
    config = make_config("mnist-mlp", optimizer="centred-rmsprop", epochs=3)
    assert (config.lr, config.momentum, config.epochs, config.iterations) == (1e-3, 0.9, 3, None)
    config = make_config("sequential-mnist", epochs=3)
    assert (config.epochs, config.iterations) == (3, None)


def rms_step(state: dict[str, torch.Tensor], gradient: torch.Tensor, lr: float) -> torch.Tensor:
    """The centred RMSProp of Lee et al.: by how much a parameter moves."""
    state["m"] = 0.95 * state.get("m", 0) + 0.05 * gradient
    state["v"] = 0.95 * state.get("v", 0) + 0.05 * gradient**2
    state["u"] = 0.9 * state.get("u", 0) - lr * gradient / (state["v"] - state["m"] ** 2 + 1e-3).sqrt()
    return state["u"]


def test_a_run_is_difference_target_propagation_as_published(data: Path, tmp_path: Path) -> None:
    """Two epochs of the alternating schedule, written from the published code's equations with plain autograd."""
    options = {"sizes": (9, 8, 7), "precision": "64", "epochs": 2, "noise": 0.0, "train_size": 25}
    config = tiny(data, rule=DTP, preset="lee", **options)
    torch.manual_seed(config.seed)
    task = config.make_task()
    start = make_model(config, task).double().state_dict()
    values = {name: value.clone().requires_grad_() for name, value in start.items()}
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in values}

    def layer(index: int, below: torch.Tensor) -> torch.Tensor:
        return torch.tanh(below @ values[f"layers.{index}.weight"].T + values[f"layers.{index}.bias"])

    def back(index: int, above: torch.Tensor) -> torch.Tensor:
        return torch.tanh(above @ values[f"layers.{index}.reverse_weight"].T + values[f"layers.{index}.reverse_bias"])

    def mse(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return ((left - right) ** 2).sum(1).mean()

    def move(loss: torch.Tensor, names: list[str], lr: float) -> None:
        gradients = torch.autograd.grad(loss, [values[name] for name in names])
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                values[name] += rms_step(states[name], gradient, lr)

    for epoch in range(2):
        for phase in ("reverse", "forward"):
            for index in range(5):
                batch = task.batch(config.seed, 5 * epoch + index, 5)
                assert torch.equal(batch.input, task.data.train_images[5 * index : 5 * index + 5].float() / 255)
                h = [batch.input.double()]
                for number in range(3):
                    h.append(layer(number, h[-1]).detach())
                if phase == "reverse":
                    loss = sum(mse(back(number, layer(number, h[number]).detach()), h[number]) for number in (1, 2))
                    move(
                        loss, [f"layers.{n}.reverse_{p}" for n in (1, 2) for p in ("weight", "bias")], config.reverse_lr
                    )
                    continue
                top = h[3].requires_grad_()
                nll = torch.nn.functional.cross_entropy(
                    top @ values["head.weight"].T + values["head.bias"], batch.target
                )
                (gradient,) = torch.autograd.grad(nll, top, retain_graph=True)
                targets = {3: top.detach() - config.rule.target_step * gradient}  # type: ignore[union-attr]
                for number in (2, 1):
                    targets[number] = (
                        h[number] - back(number, h[number + 1]) + back(number, targets[number + 1])
                    ).detach()
                loss = nll + sum(mse(layer(number, h[number].detach()), targets[number + 1]) for number in range(3))
                move(loss, [name for name in values if "reverse" not in name], config.lr)
    train(config, tmp_path)
    trained = checkpoint(tmp_path)["model"]
    for name, value in values.items():
        moved = (value.detach() - start[name]).norm()
        assert (moved > 0) == (not name.startswith("layers.0.reverse")), name
        torch.testing.assert_close(trained[name], value.detach(), rtol=1e-10, atol=1e-10 * moved.item())


@pytest.mark.parametrize("rule", ["constrained-least-squares", "regularized-least-squares", "backprop"])
def test_a_run_takes_the_means_of_seely(rule: Any, data: Path, tmp_path: Path) -> None:
    """One step of TensorFlow's RMSProp on the rule's gradients divided by batch and units."""
    config = tiny(data, rule=rule, preset="seely", precision="64", epochs=None, iterations=1, train_size=25)
    torch.manual_seed(config.seed)
    task = config.make_task()
    model = make_model(config, task).double()
    input, target = task.batch(config.seed, 0, 5)
    assert torch.equal(input, task.data.train_images[:5].float() / 255)
    torch.nn.functional.cross_entropy(model(input.double()), target).backward()
    train(config, tmp_path)
    trained = checkpoint(tmp_path)["model"]
    for name, value in model.named_parameters():
        assert value.grad is not None
        gradient = value.grad / (5 * value.size(0))
        moved = config.lr * gradient / (0.9 + 0.1 * gradient**2 + 1e-10).sqrt()
        torch.testing.assert_close(trained[name], value.detach() - moved, rtol=0, atol=1e-12)


def test_inverses_learn_by_the_means_of_seely(data: Path, tmp_path: Path) -> None:
    """A step of gradient descent on half the mean of the squared errors over batch and units, a layer a loss."""
    options = {"rule": DTP, "reduction": "element", "optimizer": "sgd", "noise": 0.0, "reverse_lr": 0.3}
    config = tiny(data, **options, precision="64", epochs=None, iterations=1)
    torch.manual_seed(config.seed)
    task = config.make_task()
    model = make_model(config, task).double()
    assert isinstance(model, FeedForwardModel)
    h = task.batch(config.seed, 0, 5).input.double()
    train(config, tmp_path)
    trained = checkpoint(tmp_path)["model"]
    for index, layer in enumerate(model.layers):
        below, h = h, torch.tanh(h @ layer.weight.T + layer.bias).detach()
        if index == 0:
            continue
        reverse = (layer.reverse_weight, layer.reverse_bias)
        error = torch.tanh(h @ reverse[0].T + reverse[1]) - below
        for name, value, gradient in zip(
            ("weight", "bias"), reverse, torch.autograd.grad(error.square().mean() / 2, reverse), strict=True
        ):
            expected = value.detach() - 0.3 * gradient
            torch.testing.assert_close(trained[f"layers.{index}.reverse_{name}"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "dx"), [(5, "mean"), (5, "regularized"), (1, "wnorm")])
def test_a_run_is_the_published_direct_weight_solve(size: int, dx: Any, data: Path, tmp_path: Path) -> None:
    """Two epochs by the oracle, with the running accuracy of the batches before their steps."""
    options = {"sizes": (9,), "dx": dx, "std": 0.1, "batch_size": size, "precision": "64", "epochs": 2}
    config = tiny(data, rule="kaczmarz", **options)
    assert isinstance(config.rule, tpext.Kaczmarz)
    torch.manual_seed(config.seed)
    task = config.make_task()
    start = [value.numpy() for value in make_model(config, task).state_dict().values()]
    first, first_bias, second, second_bias = start
    names = ("relaxation", "damping", "dx", "dx_reg", "update", "batch_reg", "first")
    solve = functools.partial(oracle.kaczmarz_step, **{name: getattr(config.rule, name) for name in names}, count=1)
    running = 0.0
    for iteration in range(2 * 25 // size):
        input, labels = task.batch(config.seed, iteration, size)
        x = input.double().numpy()
        z = x @ first.T + first_bias
        h = np.maximum(z, 0)
        output = h @ second.T + second_bias
        running = 0.999 * running + 0.001 * (output.argmax(1) == labels.numpy()).mean()
        d = oracle.hot_target(np.eye(10)[labels.numpy()], output, "clamp") - output
        weight, bias, moved = solve(d, h, second, second_bias, units="relu")
        second, second_bias = second + weight, second_bias + bias
        d = oracle.units_target(moved, z, "relu", "head") - z
        weight, bias, _ = solve(d, x, first, first_bias, units=None)
        first, first_bias = first + weight, first_bias + bias
    result = train(config, tmp_path)
    assert result.running_accuracy == pytest.approx(running, rel=1e-12)
    assert float(metrics(tmp_path)[-1]["running_accuracy"]) == result.running_accuracy
    for actual, value in zip(
        checkpoint(tmp_path)["model"].values(), (first, first_bias, second, second_bias), strict=True
    ):
        torch.testing.assert_close(actual, torch.from_numpy(value), rtol=1e-9, atol=1e-12)


def test_initializations_of_feed_forward_networks(data: Path) -> None:
    def model(**options: Any) -> Model:
        config = tiny(data, **options)
        return make_model(config, config.make_task())

    for init, gain in (("orthogonal", 1.0), ("xavier", 0.95)):
        for name, parameter in model(rule=DTP, init=init).named_parameters():
            if parameter.ndim != 2:
                assert not parameter.any(), name
            elif init == "orthogonal" or "reverse" in name:
                ones = torch.full((min(parameter.shape),), gain)
                torch.testing.assert_close(torch.linalg.svdvals(parameter.detach()), ones, msg=name)
            else:
                bound = (6 / sum(parameter.shape)) ** 0.5
                assert 0.8 * bound < parameter.abs().max() <= bound
    plain = model(init="torch")
    assert isinstance(plain, FeedForwardModel)
    assert plain.layers[0].bias.any()
    assert [layer.activation.reference_compat for layer in model(reference_compat=True).local_layers()] == [True] * 3


@pytest.mark.parametrize("rule", ["regularized-least-squares", "constrained-least-squares", "backprop"])
@pytest.mark.parametrize("init", ["orthogonal", "torch", "xavier"])
def test_tied_layers_share_one_parameter(rule: Any, init: Any, data: Path, tmp_path: Path) -> None:
    """One step of SGD: a shared matrix moves by both layers' gradients, once, at ``lr``; the head's bias at its own."""
    options = {"sizes": (9, 5, 9), "tied": True, "init": init, "precision": "64", "epochs": None, "iterations": 1}
    config = tiny(data, "mnist-autoencoder", rule=rule, optimizer="sgd", lr=1e-3, head_lr=1e-2, **options)
    torch.manual_seed(config.seed)
    task = config.make_task()
    model = make_model(config, task).double()
    assert isinstance(model, FeedForwardModel)
    one, two, three, four = layers = model.local_layers()
    assert four.weight is one.weight
    assert three.weight is two.weight
    result = train(config, tmp_path)
    assert result.parameters == 784 * 9 + 9 * 5 + 9 + 5 + 9 + 784
    input, target = task.batch(config.seed, 0, 5)
    output = input.double()
    for layer in layers:
        # the encoder's matrix once more, so that each layer has a gradient of its own
        weight = torch.nn.Parameter(layer.weight.detach().mT if layer.transposed else layer.weight.detach())
        layer.transposed, layer.weight = False, weight
        output = layer(output)
    task.loss(output, target.double()).backward()
    trained = checkpoint(tmp_path)["model"]
    for name, encoder, decoder in (("layers.0", one, four), ("layers.1", two, three)):
        assert encoder.weight.grad is not None
        assert decoder.weight.grad is not None
        expected = encoder.weight.detach() - 1e-3 * (encoder.weight.grad + decoder.weight.grad.mT)
        torch.testing.assert_close(trained[f"{name}.weight"], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(trained["head.weight"], trained["layers.0.weight"])
    assert torch.equal(trained["layers.2.weight"], trained["layers.1.weight"])
    for name, layer, lr in (("layers.2", three, 1e-3), ("head", four, 1e-2)):
        assert layer.bias is not None
        assert layer.bias.grad is not None
        expected = layer.bias.detach() - lr * layer.bias.grad
        torch.testing.assert_close(trained[f"{name}.bias"], expected, rtol=1e-9, atol=1e-12)


def assert_layers_moved(config: Config, folder: Path) -> None:
    """Every parameter left where it started, but for the inverse of the first layer, which has none to teach it."""
    torch.manual_seed(config.seed)
    start, trained = make_model(config, config.make_task()).state_dict(), checkpoint(folder)["model"]
    assert start.keys() == trained.keys()
    for name, value in start.items():
        moved = not torch.equal(trained[name].to(value.dtype), value)
        assert moved == (not name.startswith("layers.0.reverse")), name


@pytest.mark.parametrize(
    ("task", "rule"),
    [
        (task, rule)
        for task in FEED_FORWARD
        for rule in LAYER_RULES
        if (task, rule) != ("mnist-autoencoder", "kaczmarz")
    ],
)
def test_every_feed_forward_task_trains(task: str, rule: Any, data: Path, tmp_path: Path) -> None:
    if task == "digits-mlp":
        pytest.importorskip("sklearn")
    config = tiny(data, task, rule=rule)
    result = train(config, tmp_path)
    assert result.iterations == (16 if task == "cifar-mlp" else 20)
    assert 0 <= result.accuracy <= result.best_accuracy <= 1
    assert json.loads((tmp_path / "result.json").read_text())["error"] == 1 - result.accuracy
    assert_layers_moved(config, tmp_path)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    plane = task in TOYS and task not in ("sphere", "torus")
    extra = {"decision.png"} if plane else {"reconstruction.png"} if task == "mnist-autoencoder" else set()
    assert pictures == {"curve.png"} | extra


@pytest.mark.parametrize(
    ("optimizer", "nonlinearity"),
    [
        ("sgd", "tanh"),
        ("tf-rmsprop", "sigmoid"),
        ("centred-rmsprop", "relu"),
        ("rmsprop", "leaky_relu"),
        ("adamw", "identity"),
    ],
)
def test_options_of_feed_forward_runs(optimizer: Any, nonlinearity: Any, data: Path, tmp_path: Path) -> None:
    momentum = 0.5 if "rmsprop" in optimizer else None
    options = {"nonlinearity": nonlinearity, "optimizer": optimizer, "momentum": momentum, "precision": "64"}
    config = tiny(data, "xor", clip_grad_norm=1.0, reduction="element", **options)
    assert train(config, tmp_path).iterations == 20


@pytest.mark.parametrize("rule", [rule for rule in LAYER_RULES if rule != "kaczmarz"])
def test_feed_forward_rules_lower_the_loss(rule: Any, data: Path, tmp_path: Path) -> None:
    options = {"sizes": (20, 20), "batch_size": 50, "test_size": 200, "iterations": 300, "eval_interval": 300}
    config = make_config("xor", rule=rule, lr=1e-2, threads=1, **options)
    result = train(config, tmp_path)
    assert result.test_loss < 0.5 * float(metrics(tmp_path)[0]["test_loss"])


def test_an_epoch_is_evaluated_at_its_end(data: Path, tmp_path: Path) -> None:
    options = {"epochs": 3, "batch_size": 10, "test_size": 7, "sizes": (6,), "threads": 1, "data_dir": str(data)}
    train(make_config("mnist-mlp", **options), tmp_path / "parallel")
    assert [int(row["iteration"]) for row in metrics(tmp_path / "parallel")] == [0, 2, 4, 6]
    train(make_config("mnist-mlp", rule=DTP, schedule="alternating", **options), tmp_path / "alternating")
    assert [int(row["iteration"]) for row in metrics(tmp_path / "alternating")] == [0, 4, 8, 12]


def test_plan_of_the_alternating_schedule(data: Path) -> None:
    config = tiny(data, rule=DTP, schedule="alternating", epochs=2, eval_interval=None)
    plan = Plan.of(config, config.make_task())
    assert (plan.iterations, plan.eval_interval) == (20, 10)
    steps = range(20)
    assert [plan.batch(step) for step in steps] == [0, 1, 2, 3, 4] * 2 + [5, 6, 7, 8, 9] * 2
    assert [plan.trains_reverse(step) for step in steps] == ([True] * 5 + [False] * 5) * 2
    assert [plan.trains_forward(step) for step in steps] == ([False] * 5 + [True] * 5) * 2
    plan = Plan.of(replace(config, schedule="parallel"), config.make_task())
    assert plan.iterations == 10
    assert all(plan.batch(step) == step and plan.trains_reverse(step) and plan.trains_forward(step) for step in steps)


def test_phases_train_what_they_say(data: Path, tmp_path: Path) -> None:
    config = tiny(data, rule=DTP, schedule="alternating", epochs=None, iterations=5, eval_interval=3)
    torch.manual_seed(config.seed)
    start = make_model(config, config.make_task()).state_dict()
    train(config, tmp_path / "reverse")
    for name, value in checkpoint(tmp_path / "reverse")["model"].items():
        assert torch.equal(value, start[name]) == ("reverse" not in name or name.startswith("layers.0")), name
    rows = metrics(tmp_path / "reverse")
    assert len({row["train_loss"] for row in rows}) == 1, "no iteration had a loss"
    train(replace(config, iterations=10), tmp_path / "both")
    after = checkpoint(tmp_path / "both")["model"]
    for name, value in checkpoint(tmp_path / "reverse")["model"].items():
        assert torch.equal(value, after[name]) == ("reverse" in name), name


def test_a_sequence_of_images_runs_by_epochs_too(data: Path, tmp_path: Path) -> None:
    options = {"chunk": 196, "epochs": 2, "batch_size": 5, "test_size": 7, "hidden_size": 6, "threads": 1}
    config = make_config(
        "sequential-mnist", rule="learned-inverse", schedule="alternating", data_dir=str(data), **options
    )
    assert train(config, tmp_path).iterations == 20


def test_feed_forward_data_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"batch_size": 26}, "batch_size must be at most 25"),
        ({"train_size": 4}, "batch_size must be at most 4"),
        ({"train_size": 26}, r"train_size must be 1 \.\. 25"),
        ({"test_size": 8}, r"test_size must be 1 \.\. 7"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(tiny(data, **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["layers.1.bias", "layers.0.weight", "head.bias", "layers.1.reverse_weight"])
def test_divergence_of_a_feed_forward_network(
    where: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = train_module._Run._step

    def poisoned(run: Any, iteration: int) -> None:
        if iteration == 11:
            run.model.get_parameter(where).data[0] = float("nan")
        step(run, iteration)

    monkeypatch.setattr(train_module._Run, "_step", poisoned)
    with pytest.raises(DivergedError, match=r"at iteration 11: the .* loss is nan"):
        train(tiny(data, rule=DTP), tmp_path)
    assert_last_good(tmp_path, 8)


@pytest.mark.parametrize("rule", ["constrained-least-squares", "regularized-least-squares", "backprop"])
def test_feed_forward_rates_that_are_too_large(rule: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"diverged at iteration [123456]: "):
        train(tiny(data, rule=rule, optimizer="sgd", lr=1e38), tmp_path)
    assert_last_good(tmp_path, checkpoint(tmp_path)["iteration"])


@pytest.mark.renders
def test_pictures_are_drawn_again_from_the_folder(data: Path, tmp_path: Path) -> None:
    for task, name in (("spiral", "decision.png"), ("mnist-autoencoder", "reconstruction.png")):
        folder = tmp_path / task
        train(tiny(data, task), folder)
        (folder / name).unlink()
        assert draw_task(folder) == folder / name
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        (folder / "checkpoint.pt").unlink()
        (folder / "metrics.csv").unlink()
        with pytest.raises(RunError, match="holds no run with a checkpoint"):
            draw_task(folder)
    train(tiny(data), tmp_path / "none")
    assert draw_task(tmp_path / "none") is None
    with pytest.raises(RunError, match="holds no run"):
        draw_task(tmp_path / "nowhere")


@pytest.mark.renders
def test_feed_forward_runs_share_a_figure(data: Path, tmp_path: Path) -> None:
    runs = {}
    for rule in (DTP, "constrained-least-squares"):
        train(tiny(data, rule=rule), tmp_path / rule)
        runs[rule] = [tmp_path / rule]
    assert draw_comparison(runs, tmp_path / "both.png").exists()


# --- resuming --------------------------------------------------------------------------------------------------------


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

    kill_after(stop, train_module._Run, monkeypatch)
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "result.json").exists()
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("task", "options", "stops"),
    [
        # Iterations of an epoch: 5; of the alternating schedule's: 5 for the inverses, then 5 for the rest. Checkpoints
        # come every 4, so the runs resume in the middle of an epoch, in the middle of a phase and between two phases.
        ("mnist-mlp", {"rule": DTP, "schedule": "alternating", "noise": 0.3}, (2, 5, 8, 9, 10, 13, 27)),
        ("mnist-mlp", {"rule": DTP, "preset": "lee", "train_size": 25, "checkpoint_interval": 5}, (5, 7, 10, 12)),
        ("mnist-mlp", {"rule": "constrained-least-squares", "order": "sequential_first"}, (3, 5, 9)),
        ("mnist-autoencoder", {"rule": "regularized-least-squares", "optimizer": "tf-rmsprop"}, (6, 11)),
        ("mnist-autoencoder", {"sizes": (9, 5, 9), "tied": True}, (3, 11)),
        ("cifar-mlp", {"rule": DTP, "noise": 0.1, "optimizer": "centred-rmsprop"}, (3, 7)),
        ("spiral", {"rule": DTP, "noise": 0.1}, (1, 9, 18)),
        ("mnist-mlp", {"rule": "kaczmarz", "preset": "faust", "sizes": (9,)}, (3, 7, 18)),
        ("mnist-mlp", {"rule": "kaczmarz", "batch_size": 1, "epochs": 1, "update": "exact"}, (2, 13)),
    ],
)
def test_resuming_a_feed_forward_run_changes_nothing(
    task: str,
    options: dict[str, Any],
    stops: tuple[int, ...],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(data, task, **options)
    train(config, tmp_path / "whole")
    for stop in stops:
        kill_after(stop, train_module._Run, monkeypatch)
        with pytest.raises(Killed):
            train(config, tmp_path / f"stopped{stop}")
        monkeypatch.undo()
        train(config, tmp_path / f"stopped{stop}", resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / f"stopped{stop}")


def test_kill_9_in_mid_run_changes_nothing(tmp_path: Path) -> None:
    """Two kills at arbitrary moments of a process that checkpoints at every iteration, many of them while it writes."""
    options = {**SMALL, "iterations": 1000, "eval_interval": 10, "checkpoint_interval": 1, "noise": 0.1}
    train(make_config("temporal-order", rule="learned-inverse", **options), tmp_path / "whole")

    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tpext", "train", "temporal-order", "--rule", "learned-inverse", "--resume"]
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
    config = small(rule="learned-inverse", noise=0.1)
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


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Without the running accuracy."""
    result = train(small(), tmp_path)
    folder = RunFolder(tmp_path)
    lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("".join(line.rpartition(",")[0] + "\n" for line in lines))
    stored = json.loads(folder.result.read_text())
    del stored["running_accuracy"]
    folder.result.write_text(json.dumps(stored))
    assert folder.read_result() == result
    assert [row.accuracy for row in folder.read_rows()][-1] == result.accuracy
    state = checkpoint(tmp_path)
    del state["format"]
    folder.save_checkpoint({**state, "rows": [row[:-1] for row in state["rows"]]})
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


def test_an_edited_running_accuracy_is_named(data: Path, tmp_path: Path) -> None:
    config = tiny(data, rule="kaczmarz")
    train(config, tmp_path)
    (tmp_path / "result.json").unlink()
    edits = [('["running_accuracy"]', None, "running_accuracy must be of type float, got None")]
    assert_edits_are_named(tmp_path, edits, lambda: train(config, tmp_path, resume=True))


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


# --- divergence ------------------------------------------------------------------------------------------------------


def assert_last_good(folder: Path, iteration: int) -> None:
    state = checkpoint(folder)
    assert state["iteration"] == iteration
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not (folder / "result.json").exists()
    assert all(float(row["test_loss"]) < float("inf") for row in metrics(folder))


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
        train(small(rule="learned-inverse" if what == "reconstruction" else "regularized-inverse"), tmp_path)
    assert_last_good(tmp_path, 8)


def test_divergence_before_the_first_row_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module._Run, "_evaluate", lambda run: (float("nan"), 0.0))
    with pytest.raises(DivergedError, match="at iteration 0: the test loss is nan"):
        train(small(), tmp_path)
    assert metrics(tmp_path) == []


# --- figures and progress --------------------------------------------------------------------------------------------


@pytest.mark.renders
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
        folder = tmp_path / f"{other.task_name}-{other.task.length}"
        train(other, folder)
        with pytest.raises(ConfigError, match="runs of different tasks cannot share a figure: temporal-order, T=10; "):
            draw_comparison({**runs, "other": [folder]}, tmp_path / "y.png")


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
