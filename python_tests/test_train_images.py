"""Runs on images: the methods' settings, what a run computes, that it resumes bit for bit, the command line."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import DELETED, Killed, assert_edits_are_named, assert_same_run, checkpoint, kill_after, metrics, same

import tpext
from tpext.diagnostics import feedback_angles, gradient_angles
from tpext.experiments import ConfigError, ImageConfig, make_image_config, train_images
from tpext.experiments import image_train as module
from tpext.experiments.cli import main
from tpext.experiments.feedback_presets import METHODS
from tpext.experiments.figures import draw_image_run
from tpext.experiments.image_folder import ImageFolder
from tpext.experiments.image_train import ImagePlan, Step, learning_rate, make_optimizer
from tpext.experiments.loop import DivergedError
from tpext.experiments.run_folder import RunError
from tpext.feedback import LDRL, DifferenceReconstruction, FeedbackTrainer, GradientTrainer

pytestmark = pytest.mark.usefixtures("unrendered")

SMALL: dict[str, Any] = {
    "channels": (4, 4),
    "epochs": 2,
    "train_size": 60,
    "batch_size": 20,
    "validation": 0.02,
    "checkpoint_interval": 2,
    "threads": 1,
}
HIDDEN = {"hidden_size": 8}


def small(rule: str = "ldrl", network: str = "lenet", **options: Any) -> ImageConfig:
    hidden = HIDDEN if network in ("lenet", "meulemans-convnet") else {}
    method = METHODS[rule].options
    start = {"feedback_start": 2} if "feedback_start" in method else {}
    start |= {"feedback_epochs": 0} if "feedback_epochs" in method else {}
    return make_image_config("digits", network, rule=rule, **{**SMALL, **hidden, **start, **options})


# --- settings --------------------------------------------------------------------------------------------------------

VGG = ((20, 30, 35, 55, 20), (0.4, 0.4, 0.2, 0.2, 0.08), (1e-4, 3.5e-4, 8e-3, 8e-3, 0.18))


@pytest.mark.parametrize(
    ("dataset", "network", "lists", "lr", "step", "batch_size"),
    [
        ("cifar10", "simple-vgg", VGG, 0.05, 0.7, 128),
        ("imagenet32", "simple-vgg", ((25, 35, 40, 60, 25), *VGG[1:]), 0.01, 0.7, 256),
        (
            "cifar10",
            "lenet",
            (
                (41, 51, 24),
                (0.41640228838517584, 0.3826261146623929, 0.1395382069358601),
                (0.0007188427494432325, 0.00012510321884615596, 0.03541466958291287),
            ),
            0.03618,
            0.4655,
            256,
        ),
    ],
)
def test_published_ldrl(dataset: str, network: str, lists: Any, lr: float, step: float, batch_size: int) -> None:
    config = make_image_config(dataset, network, preset="published")
    assert (config.iterations, config.noise, config.feedback_lr) == lists
    assert (config.lr, config.target_step, config.batch_size) == ((lr,), step, batch_size)
    assert (config.momentum, config.weight_decay, config.feedback_momentum, config.epochs) == (0.9, 1e-4, 0.9, 90)
    assert (config.schedule, config.schedule_epochs, config.lr_min) == ("cosine-torch", 85, 1e-5)
    assert (config.normalize, config.feedback_start, config.feedback_first) == (False, 0, True)
    assert (config.second_term, config.indices, config.samples) == ("drawn", "noisy", 1)
    default = make_image_config(dataset, network)
    assert (default.iterations, default.noise, default.feedback_lr) == lists
    assert (default.schedule, default.schedule_epochs, default.feedback_start) == ("cosine", 85, 20)
    # the fair baseline: rate and weight decay of exact feedback
    fair = make_image_config(dataset, network, rule="backprop")
    assert fair.lr == pytest.approx((lr * step,))
    assert fair.lr[0] * fair.weight_decay == pytest.approx(lr * 1e-4)
    for rule in ("dtp", "tp"):
        vanilla = make_image_config(dataset, network, rule=rule, preset="published")
        assert (vanilla.lr, vanilla.iterations, vanilla.weight_decay) == ((1e-3,), lists[0], 1e-4)
    parallel = make_image_config(dataset, network, rule="parallel-ldrl", preset="published")
    assert (parallel.samples, parallel.iterations, parallel.feedback_optimizer) == (10, (1,), "adam")
    assert (parallel.lr, parallel.feedback_lr, parallel.schedule) == ((3e-4,), (3e-4,), "constant")
    assert (parallel.weight_decay, parallel.feedback_weight_decay) == (1e-4, 1e-4)


def test_published_backprop() -> None:
    vgg = make_image_config("cifar10", "simple-vgg", rule="backprop", preset="published")
    assert (vgg.lr, vgg.momentum, vgg.weight_decay, vgg.batch_size) == ((0.05,), 0.9, 0.0, 128)
    imagenet = make_image_config("imagenet32", "simple-vgg", rule="backprop", preset="published")
    assert (imagenet.lr, imagenet.schedule, imagenet.schedule_epochs) == ((0.01,), "step", 30)
    mlp = make_image_config("mnist", "mlp", rule="backprop", preset="published")
    assert (mlp.lr, mlp.betas, mlp.eps, mlp.optimizer) == ((2.970e-4,), (0.99, 0.999), (6.9e-8,), "adam")


# method -> lr before its division by the step, step, feedback lr, noise, feedback weight decay, betas, eps, the
# feedback's betas and eps
MNIST = {
    "dtp-pretrained": (8.755e-5, 0.29588, 4.635e-4, 0.17295, 2.19e-3, (0.9, 0.99), 1.354e-7, (0.9, 0.9), 4.37e-7),
    "dtp": (6.185e-5, 0.21951, 1.9585e-3, 0.083725, 0.0, (0.9, 0.999), 1.017e-8, (0.9, 0.999), 7.54e-6),
    "drl": (2.9689e-5, 0.068589, 2.0123e-5, 0.056879, 5.385e-6, (0.9, 0.99), 1e-8, (0.99, 0.999), 5.08e-8),
    "ddtp-linear":
        (2.0354e-5, 0.060969, 1.6378e-4, 0.090752, 5.836e-7, (0.9, 0.999), 1.255e-8, (0.999, 0.999), 2.84e-4),
    "ddtp-rhl": (2.8048e-5, 0.043516, 3.0245e-4, 0.041623, 1.621e-3, (0.9, 0.99), 3.98e-8, (0.9, 0.999), 3.40e-6),
    "ddtp-control": (8.8827e-5, 0.094167, 1.8713e-4, 0.00872, 4.02e-4, (0.9, 0.999), 5.55e-8, (0.9, 0.999), 1.23e-8),
}  # fmt: skip


@pytest.mark.parametrize("rule", MNIST)
def test_published_meulemans(rule: str) -> None:
    config = make_image_config("mnist", "mlp", rule=rule, preset="published")
    lr, step, feedback_lr, noise, decay, betas, eps, feedback_betas, feedback_eps = MNIST[rule]
    assert config.lr == pytest.approx((lr / step,))
    assert (config.target_step, config.feedback_lr, config.noise) == (step, (feedback_lr,), (noise,))
    assert (config.feedback_weight_decay, config.betas, config.feedback_betas) == (decay, betas, feedback_betas)
    assert (config.eps, config.feedback_eps) == (pytest.approx((eps * 64,)), feedback_eps)
    assert (config.channels, config.epochs, config.batch_size, config.precision) == ((256,) * 5, 100, 128, "64")
    assert (config.normalization, config.augment, config.validation) == ("meulemans", False, 1 / 12)
    assert (config.feedback_first, config.reduction, config.normalize) == (False, "sum", False)
    assert (config.feedback_epochs, config.extra_feedback_epochs) == ((0, 0) if rule == "dtp" else (6, 1))
    half = make_image_config("mnist", "mlp", rule=rule, preset="published", batch_size=64)
    assert half.eps == pytest.approx((eps * 32,))


def test_published_convolutions_of_meulemans() -> None:
    config = make_image_config("cifar10", "meulemans-convnet", rule="ddtp-linear", preset="published")
    assert config.lr == pytest.approx([rate / 0.015962 for rate in (2.5936e-4, 8.8550e-4, 1.42305e-4, 3.3871e-6)])
    scales = (64 * 32 * 16 * 16, 64 * 64 * 8 * 8, 64, 64)
    expected = [eps * scale for eps, scale in zip((2.79e-8, 1.99e-8, 4.52e-6, 4.05e-5), scales, strict=True)]
    assert config.eps == pytest.approx(expected)
    assert make_image_config("cifar10", "mlp", rule="ddtp-rhl").feedback_units == 2048


def test_the_two_ways_to_train_ddtp_on_convolutions() -> None:
    options = make_image_config("cifar10", "meulemans-convnet", rule="ddtp-linear", preset="published").options()
    sequential = make_image_config("cifar10", "meulemans-convnet", rule="s-ddtp", preset="published")
    assert sequential.options() == {**options, "rule": "s-ddtp", "epochs": 90}
    assert (sequential.feedback_epochs, sequential.extra_feedback_epochs, sequential.counts) == (10, 1, (1,))
    parallel = make_image_config("cifar10", "meulemans-convnet", rule="p-ddtp")
    assert (parallel.feedback_epochs, parallel.extra_feedback_epochs, parallel.counts) == (0, 0, (30,))
    for rule, network in (("s-ddtp", "mlp"), ("p-ddtp", "meulemans-convnet")):
        with pytest.raises(ConfigError, match=f"no settings were published for rule={rule}"):
            make_image_config("cifar10", network, rule=rule, preset="published")


def test_adam_takes_the_published_steps() -> None:
    """The step of the blocks is that of the published local losses: ||h - t||^2, eta times the mean loss's gradient."""
    config = small("ddtp-linear", "mlp", precision="64", normalize=False, reduction="sum", target_step=0.1, eps=1e-3)
    net = config.make_network()
    torch.manual_seed(1)
    input, target = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.arange(20) % 10
    calls = net.trace(input).calls
    output = calls[-1].output.requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(output, target), output)
    moves = net.rule.displacements(calls, -0.1 * grad)  # type: ignore[union-attr]
    block, weight = calls[0].block, next(iter(calls[0].block.parameters()))
    published = (block(calls[0].input) - (calls[0].output + moves[0])).square().sum(1).mean()
    (expected,) = torch.autograd.grad(published, weight)
    torch.nn.functional.cross_entropy(net(input), target).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected * 20 / 2, rtol=1e-9, atol=0)


def test_other_networks_take_the_nearest_settings() -> None:
    config = make_image_config("mnist", "simple-vgg")
    assert config.iterations == (20, 30, 35, 20)
    assert config.noise == (0.4, 0.4, 0.2, 0.08)
    for network in ("simple-vgg", "lenet", "resnet18", "resnet34", "meulemans-convnet", "mlp"):
        for dataset in ("cifar10", "mnist", "fashion-mnist", "imagenet32", "digits"):
            for rule in METHODS:
                config = make_image_config(dataset, network, rule=rule)
                if dataset == "digits":
                    assert ImageConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "svhn"}, "dataset must be one of cifar10, mnist"),
        ({"network": "vit"}, "network must be one of simple-vgg, lenet"),
        ({"rule": "magic"}, "rule must be one of ldrl, parallel-ldrl"),
        ({"preset": "best"}, "preset must be one of default, published, got 'best'"),
        ({"width": 3}, "unknown option width"),
        ({"rule": "backprop", "noise": 0.1}, r"noise does not belong to rule=backprop \(options of that rule: none\)"),
        ({"pixels": "grid"}, "pixels=grid needs second_term=expected, got drawn"),
        ({"pixels": "some"}, "pixels must be one of all, grid, got 'some'"),
        ({"rule": "dtp", "second_term": "expected"}, "second_term does not belong to rule=dtp"),
        ({"iterations": (1, 2)}, r"iterations must be one number or one for each of the 3 layers .*fc2\), got 2"),
        ({"lr": (1.0, 2.0, 3.0)}, r"lr must be one number or one for each of the 4 layers \(conv_0.*\), got 3"),
        ({"iterations": 0}, "iterations must be an integer >= 1, got 0"),
        ({"noise": -1.0}, "noise must be a number > 0, got -1"),
        ({"feedback_scale": 0.0}, "feedback_scale must be a number > 0"),
        ({"target_step": 0.0}, "target_step must be a number > 0"),
        ({"rule": "running-ldrl", "decay": 1.0}, "decay must be below 1"),
        ({"second_term": "some"}, "second_term must be one of drawn, expected, got 'some'"),
        ({"feedback_optimizer": "adam", "feedback_lr": (1.0, 1.0, 1.0)}, "feedback_lr must be one number with"),
        ({"betas": (0.9, 0.99)}, "betas does not belong to optimizer=sgd"),
        ({"schedule": "constant", "schedule_epochs": 3}, "schedule_epochs does not belong to schedule=constant"),
        ({"optimizer": "adam", "momentum": 0.5}, "momentum does not belong to optimizer=adam"),
        ({"hidden_size": 3, "network": "mlp"}, "hidden_size does not belong to network=mlp"),
        ({"channels": (4, 4, 4, 4), "network": "simple-vgg"}, "cannot be built for digits: .*at least 16 x 16"),
        ({"data_dir": "x"}, "data_dir does not belong to digits"),
        ({"validation": 1.0}, "validation must be None or in"),
        ({"normalization": "3xstd"}, "normalization must be one of standard, none for digits"),
        ({"preset": "published"}, "no settings were published for rule=ldrl, dataset=digits, network=lenet"),
        ({"device": "tpu9"}, "device must be a torch device"),
        ({"precision": "16"}, "precision must be one of 32, 64"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_image_config(**{"dataset": "digits", "network": "lenet", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "network", "message"),
    [
        ("running-ldrl", "resnet18", ".* block 1"),
        ("closed-form", "resnet18", ".* block 1"),
        ("gnt", "simple-vgg", "GaussNewtonTargets: no block may mix samples .*, got BatchNorm2d"),
        ("running-ldrl", "lenet", "RunningLDRL: .* block 1"),
    ],
)
def test_methods_that_cannot_serve_a_network(rule: str, network: str, message: str, tmp_path: Path) -> None:
    batchnorm = network != "resnet18"
    config = make_image_config("digits", network, rule=rule, channels=(4,), batchnorm=batchnorm)
    structure = f"network={network}" + (" and batchnorm=True" if batchnorm else "")
    with pytest.raises(ConfigError, match=rf"rule={rule} does not go with {structure}: {message}"):
        train_images(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_feedback_scale_rounds_up() -> None:
    assert make_image_config("cifar10", "simple-vgg", feedback_scale=0.1).counts == (2, 3, 4, 6, 2)
    assert make_image_config("cifar10", "simple-vgg", feedback_scale=1e-3).counts == (1,) * 5


def test_schedules() -> None:
    def rates(schedule: str, epochs: int) -> list[float]:
        config = make_image_config("cifar10", "simple-vgg", schedule=schedule, schedule_epochs=epochs)
        return [learning_rate(config, 0.05, epoch) for epoch in range(90)]

    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, kind, options in (
        ("cosine-torch", torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 85, "eta_min": 1e-5}),
        ("step", torch.optim.lr_scheduler.StepLR, {"step_size": 30, "gamma": 0.1}),
    ):
        optimizer = torch.optim.SGD([parameter], lr=0.05)
        scheduler: Any = kind(optimizer, **options)
        expected = []
        for _ in range(90):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates(name, 85 if name == "cosine-torch" else 30) == pytest.approx(expected)
    ours = rates("cosine", 85)
    assert ours[:86] == rates("cosine-torch", 85)[:86]
    assert ours[85:] == [1e-5] * 5
    assert make_image_config("cifar10", epochs=18).schedule_epochs == 17


def test_plan() -> None:
    plan = ImagePlan(start=2, batches=3, epochs=2, extra=1)
    steps = [plan.step(iteration) for iteration in range(plan.iterations)]
    assert steps == [
        *(Step(number, False) for number in (0, 1)),
        *(Step(number, True) for number in (0, 1, 2)),
        *(Step(number, False) for number in (0, 1, 2)),
        *(Step(number, True) for number in (3, 4, 5)),
    ]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", METHODS)
@pytest.mark.parametrize("network", ["lenet", "mlp"])
def test_every_method_runs(rule: str, network: str, tmp_path: Path) -> None:
    config = small(rule, network, epochs=1)
    result = train_images(config, tmp_path)
    read = metrics(tmp_path)
    start = config.feedback_start or 0
    assert [row["iteration"] for row in read] == ["0", str(start + 3)]
    for row in read:
        assert all(math.isfinite(float(row[name])) for name in ("train_loss", "loss", "accuracy", "top5"))
        for name in config.block_names:
            assert (row[f"gradient_angle_{name}"] == "") == (rule == "backprop")
    # the output layer learns by the loss's own gradient
    if rule != "backprop":
        assert float(read[-1][f"gradient_angle_{config.block_names[-1]}"]) < 1e-5
    assert read[0]["feedback_angle_" + config.block_names[0]] == ""
    if rule in ("ldrl", "parallel-ldrl", "running-ldrl", "closed-form", "tied", "fw-dtp"):
        assert all(row["feedback_angle_" + name] for row in read for name in config.block_names[1:])
    assert (result.iterations, result.rule, result.evaluated_on) == (start + 3, rule, "validation")
    assert 0 <= result.accuracy <= (result.top5 or 0) <= 1
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"curve.png", "angles.png"}
    assert names == {"config.json", "metrics.csv", "result.json", "checkpoint.pt", "best.pt", "lock"} | pictures


@pytest.mark.parametrize(("network", "rule"), [("simple-vgg", "ldrl"), ("resnet18", "ldrl"), ("resnet18", "fw-dtp")])
def test_other_networks_run(network: str, rule: str, tmp_path: Path) -> None:
    """All blocks learn, feedback by its trainer alone, statistics by the batches; the numbers recorded are sane."""
    options = {"iterations": 1, "feedback_lr": 1e-5} if rule == "ldrl" else {}
    config = small(rule, network, epochs=1, lr=1e-3, **options)
    torch.manual_seed(config.seed)
    before = config.make_network().state_dict()
    result = train_images(config, tmp_path)
    first, last = metrics(tmp_path)
    start = config.feedback_start or 0
    assert (first["iteration"], last["iteration"], result.iterations) == ("0", str(start + 3), start + 3)
    for row in (first, last):
        assert all(math.isfinite(float(row[name])) for name in ("train_loss", "loss", "accuracy", "top5"))
        # the output layer learns by the loss's own gradient, the others by targets
        angles = [float(row[f"gradient_angle_{name}"]) for name in config.block_names]
        assert angles[-1] < 1e-5 < min(angles[:-1])
    after = checkpoint(tmp_path)["network"]
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in after if name.startswith("blocks.")} == {n for n in moved if n.startswith("blocks.")}
    feedback = {name for name in after if name.startswith("feedback.") and name.endswith("weight")}
    assert feedback
    assert {name for name in moved if name.startswith("feedback.")} == (feedback if rule == "ldrl" else set())
    counts = [int(value) for name, value in after.items() if name.endswith("num_batches_tracked")]
    assert counts == ([3] * len(counts) if rule == "fw-dtp" else [])
    assert bool(counts) == (rule == "fw-dtp")


def test_it_learns(tmp_path: Path) -> None:
    config = make_image_config("digits", "lenet", rule="closed-form", epochs=4, lr=0.05)
    result = train_images(config, tmp_path)
    assert result.accuracy > 0.8
    read = metrics(tmp_path)
    assert [float(row["epoch"]) for row in read] == [0, 1, 2, 3, 4]
    assert float(read[-1]["gradient_angle_fc1"]) < 5
    best = ImageFolder(tmp_path).load_best()
    assert best["iteration"] == result.best_iteration
    assert best["accuracy"] == result.best_evaluation == max(float(row["accuracy"]) for row in read[1:])


def test_the_best_network_is_the_first_of_equals(tmp_path: Path) -> None:
    """In the result and in best.pt alike; at this rate no output changes enough for another class."""
    result = train_images(small("backprop", "mlp", lr=1e-12, epochs=3), tmp_path)
    rows = metrics(tmp_path)
    assert len({row["accuracy"] for row in rows}) == 1
    assert ImageFolder(tmp_path).load_best()["iteration"] == result.best_iteration == int(rows[1]["iteration"])


@pytest.mark.parametrize("rule", ["ldrl", "running-ldrl"])
def test_the_default_settings_learn(rule: str, tmp_path: Path) -> None:
    """What the README's command runs; at higher rates these runs diverge in the middle."""
    assert train_images(make_image_config("digits", rule=rule), tmp_path).accuracy > 0.7


@pytest.mark.parametrize("network", ["simple-vgg", "lenet", "mlp"])
def test_fixed_random_feedback_learns_with_batch_normalisation(network: str, tmp_path: Path) -> None:
    config = make_image_config("digits", network, rule="fw-dtp", epochs=3)
    assert config.batchnorm
    assert train_images(config, tmp_path).accuracy > 0.6


def test_an_evaluation_in_parts_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 100 images of each set, the last of fewer."""
    monkeypatch.setattr(module, "EVALUATION_BATCH", 100)
    config = small("backprop", "mlp", precision="64", validation=0.2, train_size=None, epochs=1)
    result = train_images(config, tmp_path)
    net, task = config.make_network().eval(), config.make_task()
    net.load_state_dict(checkpoint(tmp_path)["network"])
    row = {name: float(cell) for name, cell in metrics(tmp_path)[-1].items() if cell}
    found = {
        "test": (result.test_loss, result.accuracy, result.top5),
        "validation": (row["loss"], row["accuracy"], row["top5"]),
    }
    counts = [task.split_size("test"), task.split_size("validation")]
    assert counts[0] != counts[1]
    assert all(count > 100 and count % 100 for count in counts)
    for split, scores in found.items():
        ((input, target),) = task.evaluation_batches(split, max(counts))  # type: ignore[arg-type]
        with torch.no_grad():
            output = net(input.double())
        loss = torch.nn.functional.cross_entropy(output, target).item()
        places = (output > output.gather(1, target[:, None])).sum(1)
        shares = [(places < top).double().mean().item() for top in (1, 5)]
        assert scores == pytest.approx((loss, *shares), rel=1e-12)


def test_the_best_network_has_an_accuracy_of_its_own(tmp_path: Path) -> None:
    """Another network put into best.pt changes what is said of the best, and nothing else."""
    config = small("backprop", "mlp", precision="64")
    before = train_images(config, tmp_path)
    (tmp_path / "result.json").unlink()
    folder, net, task = ImageFolder(tmp_path), config.make_network().eval(), config.make_task()
    folder.save_best({**folder.load_best(), "network": net.state_dict()})
    after = train_images(config, tmp_path, resume=True)
    ((input, target),) = task.evaluation_batches("test", task.split_size("test"))
    with torch.no_grad():
        accuracy = (net(input.double()).argmax(1) == target).double().mean().item()
    assert accuracy not in (before.best_accuracy, before.accuracy)
    assert after.best_accuracy == pytest.approx(accuracy, rel=1e-12)
    assert (after.accuracy, after.error) == (before.accuracy, 1 - before.accuracy)


def test_feedback_turns_towards_the_blocks(tmp_path: Path) -> None:
    config = make_image_config(
        "digits", "simple-vgg", indices="clean", noise=0.1, feedback_lr=0.1, iterations=5, epochs=1
    )
    train_images(config, tmp_path)
    first, last = metrics(tmp_path)
    for name in config.block_names[1:]:
        assert float(last[f"feedback_angle_{name}"]) < 0.6 * float(first[f"feedback_angle_{name}"])


@pytest.mark.parametrize("rule", ["ldrl", "parallel-ldrl", "running-ldrl", "ddtp-rhl", "dtp", "backprop"])
def test_an_interrupted_run_resumes_to_the_bit(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(rule, "simple-vgg" if rule == "ldrl" else "lenet", eval_interval=2)
    whole = train_images(config, tmp_path / "whole")
    for stop in (1, 5):
        parts = tmp_path / str(stop)
        kill_after(stop, module._Run, monkeypatch)
        with pytest.raises(Killed):
            train_images(config, parts)
        monkeypatch.undo()
        resumed = train_images(config, parts, resume=True)
        assert_same_run(tmp_path / "whole", parts)
        assert (resumed.accuracy, resumed.best_accuracy) == (whole.accuracy, whole.best_accuracy)
        assert train_images(config, parts, resume=True) == resumed
    with pytest.raises(RunError, match="already holds a run"):
        train_images(config, parts)
    with pytest.raises(RunError, match="batch_size is 20 there, 10 was asked for"):
        train_images(small(rule, config.network, eval_interval=2, batch_size=10), parts, resume=True)


def test_an_edited_field_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    config = small(feedback_optimizer="adam")
    train_images(config, tmp_path)
    (tmp_path / "result.json").unlink()
    ours = '["trainer"]["optimizers"][0]'
    edits = [
        ('["iteration"]', -3, "iteration must be an integer >= 0, got -3"),
        ('["iteration"]', "x", "iteration must be of type int, got 'x'"),
        ('["rows"]', [], "rows must be a list of at least one evaluation, got []"),
        ('["rows"][1]', [1], "rows[1] must be a list of iteration, epoch, train_loss, loss, accuracy, top5"),
        ('["rows"][1][5]', "x", "rows[1].top5 must be of type float | None, got 'x'"),
        ('["rows"][1][8]', (None,), "rows[1].feedback_angles must be 4 angles, got (None,)"),
        ('["rows"][1][9]', 3.0, "rows[1].gradient_angles must be of type tuple"),
        ('["network"]', DELETED, "network is missing"),
        ('["network"]["blocks.conv_1.conv.bias"]', torch.zeros(1), "size mismatch for blocks.conv_1.conv.bias"),
        ('["optimizer"]["param_groups"][0]["momentum"]', "x", "optimizer.param_groups[0].momentum must be a number"),
        ('["optimizer"]["state"][1]', [3], "optimizer.state[1] must be a dict, got [3]"),
        ('["trainer"]', DELETED, "trainer is missing"),
        ('["trainer"]', 3, "trainer must be the state of this run's LDRL, got another"),
        ('["trainer"]["steps"]', "x", "LDRL: steps must be an integer >= 0, got 'x'"),
        ('["trainer"]["optimizers"]', DELETED, "trainer must be the state of this run's LDRL"),
        (f'{ours}["param_groups"][0]["lr"]', "x", "trainer.optimizers[0].param_groups[0].lr must be a number"),
        (f'{ours}["state"][0]["exp_avg"]', "x", "trainer.optimizers[0].state[0].exp_avg must be a tensor"),
    ]
    assert_edits_are_named(tmp_path, edits, lambda: train_images(config, tmp_path, resume=True))
    best = [
        ('["network"]', DELETED, "network is missing"),
        ('["network"]["blocks.conv_1.conv.bias"]', torch.zeros(1), "size mismatch for blocks.conv_1.conv.bias"),
    ]
    assert_edits_are_named(tmp_path, best, lambda: train_images(config, tmp_path, resume=True), "best.pt")


def test_edited_running_means_are_named(tmp_path: Path) -> None:
    config = small("running-ldrl", epochs=1)
    train_images(config, tmp_path)
    (tmp_path / "result.json").unlink()
    edits = [
        ('["trainer"]["sums"]', [], "state must have sums of 3 layers, got 0"),
        ('["trainer"]["sums"][0]', 3, "sums must be two tensors or None for each layer, got 3"),
    ]
    assert_edits_are_named(tmp_path, edits, lambda: train_images(config, tmp_path, resume=True))


def test_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = module._Run._step

    def interrupted(run: module._Run, iteration: int) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        yield from step(run, iteration)

    monkeypatch.setattr(module._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="a checkpoint is saved at iteration 1"):
        train_images(small(), tmp_path)
    assert checkpoint(tmp_path)["iteration"] == 1


def test_divergence(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="diverged at iteration"):
        train_images(small("backprop", lr=1e30), tmp_path)
    for value in checkpoint(tmp_path)["network"].values():
        assert torch.isfinite(value).all()
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    "options",
    [{}, {"network": "resnet18", "batchnorm": True, "channels": (4, 4), "iterations": 1, "feedback_lr": 1e-5}],
    ids=["lenet", "normalised"],
)
def test_evaluation_draws_no_random_numbers(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More evaluations change nothing; none trains the feedback or moves the generators or the statistics."""
    seen = []
    add_row = module._Run._add_row

    def watched(run: module._Run, progress: Any) -> None:
        assert run.trainer is not None
        before = torch.get_rng_state(), run.trainer.steps, copy.deepcopy(run.model.state_dict())
        add_row(run, progress)
        assert torch.equal(before[0], torch.get_rng_state())
        assert run.trainer.steps == before[1]
        assert any(name.endswith("running_mean") for name in before[2]) == ("batchnorm" in options)
        assert same(dict(run.model.state_dict()), dict(before[2]))
        assert run.model.training
        assert all(parameter.grad is None or parameter in dict.fromkeys(run.model.blocks.parameters())
                   for parameter in run.model.parameters())  # fmt: skip
        seen.append(run.iteration)

    monkeypatch.setattr(module._Run, "_add_row", watched)
    train_images(small(**options), tmp_path / "few")
    train_images(small(**options, eval_interval=1), tmp_path / "many")
    assert seen == [0, 5, 8, 0, 3, 4, 5, 6, 7, 8]
    assert same(checkpoint(tmp_path / "few")["network"], checkpoint(tmp_path / "many")["network"])


@pytest.mark.parametrize(("rule", "first"), [("ldrl", True), ("ldrl", False), ("closed-form", None)])
def test_feedback_before_or_after(rule: str, first: bool | None, tmp_path: Path) -> None:
    """The order decides which feedback the first batch's targets go through; without a choice that of this batch."""
    options = {} if first is None else {"feedback_first": first, "feedback_start": 0}
    config = small(rule, **options, train_size=20, epochs=1, precision="64")
    task = config.make_task()
    torch.manual_seed(config.seed)
    net = config.make_network()
    trainer = config.make_trainer(net)
    assert isinstance(trainer, FeedbackTrainer)
    optimizer = make_optimizer(config, net)
    batch = task.batch(config.seed, 0, config.batch_size)
    trace = net.trace(batch.input.double())
    loss = torch.nn.functional.cross_entropy(trace.output, batch.target)
    if first is False:
        loss.backward()
        trainer.step(trace)
    else:
        trainer.step(trace)
        loss.backward()
    optimizer.step()
    train_images(config, tmp_path)
    assert same(checkpoint(tmp_path)["network"], net.state_dict())


def test_without_validation_set(tmp_path: Path) -> None:
    result = train_images(small("backprop", validation=0.0), tmp_path)
    assert result.evaluated_on == "test"
    assert result.accuracy == float(metrics(tmp_path)[-1]["accuracy"])


def test_trainers_have_their_settings() -> None:
    config = small(
        "ldrl", iterations=(3, 4, 5), noise=(0.1, 0.2, 0.3), feedback_lr=(1.0, 2.0, 3.0), second_term="expected"
    )
    trainer = config.make_trainer(config.make_network())
    assert isinstance(trainer, LDRL)
    assert (trainer.iterations, trainer.noise, trainer.second_term) == ([3, 4, 5], [0.1, 0.2, 0.3], "expected")
    assert [one.param_groups[0]["lr"] for one in trainer.optimizers] == [1.0, 2.0, 3.0]
    control = small("ddtp-control")
    trainer = control.make_trainer(control.make_network())
    assert isinstance(trainer, DifferenceReconstruction)
    assert not trainer.difference
    assert isinstance(trainer, GradientTrainer)
    assert isinstance(trainer.optimizers[0], torch.optim.Adam)
    rates = make_optimizer(small("backprop", lr=(1.0, 2.0, 3.0, 4.0)), control.make_network()).param_groups
    assert [group["lr"] for group in rates] == [1.0, 2.0, 3.0, 4.0]


def test_figures_need_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        draw_image_run(tmp_path)


# --- angles ----------------------------------------------------------------------------------------------------------


def test_gradient_angles_leave_the_network_alone() -> None:
    net = tpext.nn.TargetSequential(
        torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ELU(), torch.nn.Dropout()),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5), torch.nn.Tanh()),
        torch.nn.Linear(5, 3),
        rule=tpext.DifferenceTargets(target_step=0.5, normalize=False),
    )
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    torch.nn.functional.cross_entropy(net(x), y).backward()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()]
    random, rule = torch.get_rng_state(), net.rule
    angles = gradient_angles(net, x, y)
    feedback_angles(net, x)
    assert same(net.state_dict(), state)
    assert all(
        same(a.grad, b) if b is not None else a.grad is None for a, b in zip(net.parameters(), grads, strict=True)
    )
    assert torch.equal(random, torch.get_rng_state())
    assert net.rule is rule
    assert net.training
    assert list(angles) == ["0", "1", "2"]
    assert angles["2"].angle < 1e-6
    assert angles["2"].distance < 1e-6
    assert angles["0"].angle > 10


def test_one_sample_gives_the_feedback_angles_of_a_normalised_network() -> None:
    net = tpext.nn.TargetSequential(
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)),
        torch.nn.Linear(6, 3),
        feedback_init="symmetric",
    )
    assert feedback_angles(net, torch.ones(1, 4)) == {"1": pytest.approx(0, abs=1e-6)}
    assert net.training


def test_gradient_angles_by_hand() -> None:
    net = tpext.nn.TargetSequential(
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh()),
        # its feedback bends, so that the step matters
        torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Tanh()),
    ).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    found = gradient_angles(net, x, y, target_step=0.005)["0"]
    assert found.distance != pytest.approx(gradient_angles(net, x, y)["0"].distance)
    net.rule = tpext.DifferenceTargets(target_step=0.005)
    torch.nn.functional.cross_entropy(net(x), y).backward()
    rule = net.blocks[0][0].weight.grad  # type: ignore[index, union-attr]
    (exact,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(net.blocks(x), y),
        [net.blocks[0][0].weight],  # type: ignore[index, union-attr]
    )
    cosine = (rule * exact).sum() / (rule.norm() * exact.norm())
    assert found.angle == pytest.approx(math.degrees(math.acos(float(cosine))))
    assert found.distance == pytest.approx(float((rule - exact).norm() / exact.norm()))


# --- published figures -----------------------------------------------------------------------------------------------

FIGURE = "--dataset digits --channels 4 4 --hidden-size 8 --batch-size 16"


@pytest.mark.renders
def test_figure_of_the_feedback_angle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(f"figure feedback-angle {FIGURE} --iterations 60 --out {tmp_path}", capsys)
    assert (status, err) == (0, "")
    assert "written:" in out
    with (tmp_path / "feedback_angle.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["iteration"]) for row in table] == list(range(60))
    assert float(table[-1]["angle"]) < 0.8 * float(table[0]["angle"])
    assert (tmp_path / "feedback_angle.png").exists()


@pytest.mark.renders
def test_figure_of_the_gradient_angles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lr = "--lr 0.01 0.05 0.05 --indices clean --second-term expected"
    line = f"figure gradient-angles {FIGURE} --iterations 100 {lr} --seeds 1 2 --out {tmp_path}"
    assert call(line, capsys)[::2] == (0, "")
    with (tmp_path / "gradient_angles.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 * 2 * 4
    angles: dict[tuple[str, str], float] = {}
    for row in table:
        key = row["scheme"], row["layer"]
        angles[key] = angles.get(key, 0.0) + float(row["angle"]) / 2
    for layer in ("conv_0", "conv_1", "fc1"):
        assert angles["symmetric", layer] < angles["L-DRL", layer] < 0.8 * angles["random", layer]
    assert all(angles[scheme, "fc2"] < 1e-5 for scheme in ("random", "DRL", "L-DRL", "symmetric"))
    assert (tmp_path / "gradient_angles.png").exists()


@pytest.mark.renders
def test_figure_of_the_pool_indices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the places of the clean pass less noise brings the least point nearer to the weights; not with the noisy."""
    options = "--batch-size 64 --channels 8 8 --noise 0.5 0.05 --draws 90"
    status, out, err = call(f"figure pool-indices --dataset digits {options} --out {tmp_path}", capsys)
    assert (status, err) == (0, "")
    assert "written:" in out
    with (tmp_path / "pool_indices.csv").open() as file:
        table = list(csv.DictReader(file))
    angles = {(row["noise"], row["indices"]): float(row["angle"]) for row in table}
    assert {row["layer"] for row in table} == {"conv_1"}
    assert len(table) == len(angles) == 4
    assert angles["0.05", "clean"] < angles["0.5", "clean"]
    assert angles["0.05", "clean"] < 0.7 * angles["0.05", "noisy"]
    assert (tmp_path / "pool_indices.png").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pool-indices --channels 4", "channels must be at least two numbers, got (4,)"),
        ("pool-indices --channels 4 4 4 4 4", "channels: "),
        ("pool-indices --noise", "noise must be at least one number, got none"),
        ("pool-indices --noise 0.1 0", "noise must be a number > 0, got 0.0"),
        ("pool-indices --draws 0", "draws must be an integer >= 1, got 0"),
        ("gradient-angles --pixels grid", "pixels=grid needs second_term=expected, got drawn"),
        ("feedback-angle --iterations 0", "iterations must be an integer >= 1, got 0"),
        ("feedback-angle --batch-size 5000", "batch_size must be at most 1293"),
        ("feedback-angle --lr 0", "lr must be a number > 0, got 0.0"),
        ("feedback-angle --noise nan", "noise must be a number > 0, got nan"),
        ("feedback-angle --seed -1", "seed must be an integer >= 0, got -1"),
        ("feedback-angle --channels", "channels must be at least one number, got none"),
        ("feedback-angle --channels 4 0", "channels must be an integer >= 1, got 0"),
        ("feedback-angle --hidden-size 0", "hidden_size must be an integer >= 1, got 0"),
        ("feedback-angle --device tpu9", "device must be a torch device such as cpu or cuda:0, got 'tpu9'"),
        ("feedback-angle --data-dir x", "data_dir does not belong to digits"),
        ("gradient-angles --noise 1 1", "noise must be one number or one for each of the 3 layers with feedback"),
        ("gradient-angles --lr 1 1 1 1", "lr must be one number or one for each of the 3 layers with feedback"),
        ("gradient-angles --lr 1 1 -1", "lr must be a number > 0, got -1.0"),
        ("gradient-angles --drl-lr 0", "drl_lr must be a number > 0, got 0.0"),
        ("gradient-angles --seeds 1 -2", "seeds must be an integer >= 0, got -2"),
        ("gradient-angles --seeds", "seeds must be at least one, got none"),
        ("gradient-angles --schemes", "schemes must be at least one, got none"),
    ],
)
def test_bad_figures(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before anything is computed, which would take hours at the published sizes."""
    name, options = line.split(" ", 1)
    status, out, err = call(f"figure {name} --dataset digits {options} --out {tmp_path / 'out'}", capsys)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_figures_that_fail_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    status, _, err = call(f"figure gradient-angles --dataset digits --out {file / 'out'}", capsys)
    assert (status, err) == (1, f"tpext: out must be a folder, got {file / 'out'}, where {file} is a file\n")
    for line in ("feedback-angle", "gradient-angles --schemes L-DRL"):
        status, out, err = call(f"figure {line} {FIGURE} --iterations 9 --lr 1e30 --out {tmp_path}", capsys)
        assert (status, out) == (3, "")
        assert err.startswith("tpext: diverged at iteration 9: the feedback holds NaN or infinite values.")


# --- the command line ------------------------------------------------------------------------------------------------


def call(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(line.split())
    captured = capsys.readouterr()
    return status, captured.out, captured.err


LINE = "train images --dataset digits --network lenet --channels 4 4 --hidden-size 8 --epochs 1 --train-size 60"


@pytest.mark.renders
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{LINE} --rule ldrl --feedback-scale 0.1 --noise 0.1 0.2 0.3 --no-augment --batch-size 20 --out {tmp_path}"
    status, out, err = call(line, capsys)
    assert (status, err) == (0, "")
    assert "digits, lenet 4-4, ldrl (target step 0.7, 1 iterations of the feedback), sgd 0.02" in out
    assert "validation loss" in out
    assert f"angles: {tmp_path / 'angles.png'}" in out
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["noise"], config["augment"], config["iterations"]) == ([0.1, 0.2, 0.3], False, [2])
    status, out, _ = call(f"train images --out {tmp_path} --resume", capsys)
    assert status == 0
    assert "complete already" in out
    status, _, err = call(f"{line} --resume --rule backprop", capsys)
    assert status == 1
    assert "rule is ldrl there, backprop was asked for" in err


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rule in ("tied", "backprop"):
        train_images(small(rule), tmp_path / rule)
    picture = tmp_path / "both.png"
    runs = f"{tmp_path / 'tied'} BP={tmp_path / 'backprop'}"
    assert call(f"compare {runs} --out {picture}", capsys)[0] == 0
    assert picture.exists()
    train_images(small("backprop", "mlp"), tmp_path / "mlp")
    status, _, err = call(f"compare {runs} {tmp_path / 'mlp'} --out {picture}", capsys)
    assert status == 1
    assert "runs of different tasks cannot share a figure: digits, lenet; digits, mlp" in err


def test_help_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call("train images --help", capsys)
    assert status == 0
    for name in (*METHODS, "--feedback-start", "--second-term", "fashion-mnist", "meulemans-convnet"):
        assert name in out
    # an option without a text of its own has its default there
    assert not re.search(r"--[\w-]+[^│]*│ *\n? *│? *\(default", out), out
    assert "tpext train images" in " ".join(call("train --help", capsys)[1].split())
    assert "imagenet32" in call("tasks", capsys)[1]


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("--rule magic", 1, "rule must be one of ldrl"),
        ("--rule backprop --noise 1", 1, "noise does not belong to rule=backprop"),
        ("--iterations 1 2", 1, "iterations must be one number or one for each of the 3 layers"),
        ("--augment --no-augment", 1, "augment and no_augment exclude each other"),
        ("--speed 3", 2, "--speed"),
        ("--batch-size 5000", 1, "batch_size must be at most 60"),
        ("--validation 0.0001", 1, "validation must be 0 or leave at least one image"),
        ("--lr 1e30 --rule backprop --batch-size 20", 3, "with a smaller --lr."),
        ("--lr 1e30 --batch-size 20", 3, "with smaller rates (--lr, --feedback-lr), or a larger --feedback-start."),
    ],
)
def test_bad_command_lines(
    line: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got, out, err = call(f"{LINE} {line} --out {tmp_path / 'run'}", capsys)
    assert got == status
    assert message in out + err
    assert "Traceback" not in out + err
    assert (tmp_path / "run").exists() == (status == 3)


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet32"])
def test_missing_files(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(f"train images --dataset {dataset} --data-dir {tmp_path} --out {tmp_path / 'run'}", capsys)
    assert status == 1
    assert "--data-dir DIR" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- rules and data sets of users ------------------------------------------------------------------------------------

OWN = """
from dataclasses import dataclass
import torch
from tpext.rules import DifferenceTargets, LayerRule, LearnedInverse, NetworkRule
from tpext.tasks import ImageSet
from tpext.tasks.idx import Images

@dataclass(frozen=True)
class Signs(NetworkRule):
    scale: float = 1.0
    noise: float = 0.5

    def make_feedback(self, blocks, shapes):
        return [None] * len(blocks)

    def propagate(self, call, displacement):
        signs = call.block.get_submodule("linear").weight.sign() * self.scale
        return (displacement @ signs).reshape(call.input.shape)

class Halved(DifferenceTargets):
    def propagate(self, call, displacement):
        return super().propagate(call, displacement) / 2

@dataclass(frozen=True)
class Pseudo(LayerRule):
    target_step: float = 0.5
    rtol: float = 0.1

    def propagate(self, call, displacement):
        moved = call.activation.derivative(displacement, call.preactivation)
        return moved @ torch.linalg.pinv(call.weight, rtol=self.rtol).mT

class Learned(LearnedInverse):
    pass

def load(data_dir):
    pixels = torch.arange(60 * 2 * 20 * 20).remainder(251).to(torch.uint8).view(60, 800)
    return Images(pixels[:50], torch.arange(50) % 3, pixels[50:], torch.arange(10) % 3)

HALF = ((0.5, 0.5), (0.5, 0.5))
stripes = ImageSet(load, (2, 20, 20), {"standard": HALF}, n_classes=3, test_size=10, has_files=False)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MLP_LINE = "train images --dataset digits --network mlp --channels 8 6 --epochs 2 --train-size 60 --batch-size 20"


def test_a_network_rule_of_ones_own_trains(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{MLP_LINE} --rule mine.py:Signs --rule-options scale=0.1 noise=0.25"
    status, out, err = call(line, capsys)
    assert (status, err) == (0, "")
    assert "digits, mlp 8-6, mine.py:Signs (5 iterations of the feedback), adam 0.0003" in out
    assert "6 iterations" in out, "none trains feedback alone, as there is none"
    folder = own / "runs" / "digits-mlp-Signs-1"
    config = ImageFolder(folder).read_config()
    assert config is not None
    # noise is a field of the rule and an option of the run
    assert config.rule_options == {
        "target_step": 1.0, "normalize": True, "reduction": "mean", "scale": 0.1, "noise": 0.25
    }  # fmt: skip
    assert (config.noise, config.rule_folder) == ((0.2,), str(own))
    assert checkpoint(folder)["trainer"] is None
    status, _, err = call(f"{line} --resume --rule-options scale=0.2", capsys)
    assert (status, "rule_options.scale is 0.1 there, 0.2 was asked for" in err) == (1, True), err


def test_feedback_of_a_rule_of_ones_own_learns_as_under_ldrl(own: Path) -> None:
    options: Any = {**SMALL, **HIDDEN, "feedback_start": 2, "lr": 0.02, "weight_decay": 0.0}
    mine = make_image_config("digits", "lenet", rule="mine.py:Halved", **options)
    ldrl = make_image_config("digits", "lenet", rule="ldrl", **options)
    for name in ("iterations", "noise", "feedback_lr", "second_term", "samples"):
        assert getattr(mine, name) == getattr(ldrl, name)
    train_images(mine, own / "mine")
    train_images(ldrl, own / "ldrl")
    before = [module.ImagePlan.of(config, config.make_task()).iterations for config in (mine, ldrl)]
    assert before == [2 + 6, 2 + 6]
    left, right = (checkpoint(own / name)["network"] for name in ("mine", "ldrl"))
    assert left.keys() == right.keys()
    assert not torch.equal(left["blocks.conv_0.conv.weight"], right["blocks.conv_0.conv.weight"])


def test_a_layer_rule_of_ones_own_is_that_of_the_linear_layers(own: Path) -> None:
    config = make_image_config("digits", "mlp", rule="mine.py:Pseudo", rule_options={"rtol": 0.2}, **SMALL)
    config_bp = make_image_config("digits", "mlp", rule="backprop", **SMALL)
    torch.manual_seed(0)
    net = config.make_network()
    torch.manual_seed(0)
    plain = config_bp.make_network()
    rule = net.blocks[0].get_submodule("linear").rule
    assert (type(rule).__name__, rule.rtol) == ("Pseudo", 0.2)
    mlp = tpext.nn.MLP([64, 4, 4, 10], "tanh", rule=rule)
    weights = [block.get_submodule("linear").weight for block in plain.blocks]
    for layer, weight in zip(mlp, weights, strict=True):
        layer.weight.data = weight.detach().clone()
        layer.bias.data.zero_()
    input, target = config.make_task().batch(1, 0, 20)
    for model, x in ((net, input), (mlp, input.flatten(1)), (plain, input)):
        torch.nn.functional.cross_entropy(model(x), target).backward()
    for block, layer, other in zip(net.blocks, mlp, plain.blocks, strict=True):
        found = block.get_submodule("linear").weight.grad
        torch.testing.assert_close(found, layer.weight.grad)
        assert block is net.blocks[-1] or not torch.allclose(found, other.get_submodule("linear").weight.grad)
    result = train_images(make_image_config("digits", "lenet", rule="mine.py:Pseudo", **SMALL, **HIDDEN), own / "run")
    assert result.iterations == 6


def test_what_images_cannot_train_is_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ("--rule mine.py:Learned", "must be a class that subclasses tpext.rules.NetworkRule or LayerRule"),
        ("--rule tpext:DifferenceTargetPropagation", "layer rules that learn or solve for weights are for"),
        ("--rule mine.py:Pseudo --noise 1", "noise does not belong to rule=mine.py:Pseudo"),
        ("--rule mine.py:Signs --rule-options size=1", "rule_options must be NAME=VALUE of target_step,"),
        ("--rule mine.py:Signs --rule-options target_step=0", "target_step must be a finite number > 0"),
        ("--rule mine.py:Signs --preset published", "no settings were published for rule=mine.py:Signs"),
        ("--rule ldrl --rule-options scale=1", "rule_options belong to a rule of your own"),
        ("--dataset mine.py:load", "load must be a tpext.tasks.ImageSet"),
        ("--dataset svhn", "dataset must be one of cifar10, mnist"),
    ):
        status, _, err = call(f"{MLP_LINE} {options}", capsys)
        assert (status, message in err) == (1, True), err
    assert not (own / "runs").exists()


def test_a_data_set_from_a_file(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = "train images --dataset mine.py:stripes --channels 3 4 --hidden-size 5 --epochs 1 --batch-size 5 --threads 1"
    status, out, err = call(f"{line} --rule tied --out run", capsys)
    assert (status, err) == (0, "")
    assert "mine.py:stripes, lenet 3-4, tied" in out
    (own / "elsewhere").mkdir()
    monkeypatch.chdir(own / "elsewhere")
    config = ImageFolder(own / "run").read_config()
    assert config is not None
    task = config.make_task()
    assert (task.shape, task.output_size, task.split_size("train")) == ((2, 20, 20), 3, 45)
