"""Runs on images: the published settings of each method, and what cannot be set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_runs import small

from tpext.experiments import ConfigError, ImageConfig, make_image_config, train_images
from tpext.experiments.feedback_presets import METHODS
from tpext.experiments.image_train import ImagePlan, Step, learning_rate

pytestmark = pytest.mark.usefixtures("unrendered")


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


@pytest.mark.parametrize(
    ("rule", "digits", "own"),
    [
        ("ldrl", ((0.02,), (0.02,)), ((0.01,), (0.02,))),
        ("dtp", ((0.01,), (5e-3,)), ((2.5e-3,), (2e-4,))),
        ("tp", ((0.01,), (5e-3,)), ((2.5e-3,), (2e-4,))),
        ("backprop", ((0.014,), None), ((0.007,), None)),
    ],
)
def test_small_images_of_ones_own_start_at_smaller_rates_than_the_digits(
    rule: str, digits: Any, own: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from tpext.tasks import ImageSet\n"
        'tiny = ImageSet(lambda folder: None, (1, 14, 14), {"standard": ((0.5,), (0.5,))})\n'
    )
    for dataset, (lr, feedback_lr) in (("digits", digits), (f"{tmp_path / 'mine.py'}:tiny", own)):
        config = make_image_config(dataset, rule=rule)
        assert config.lr == pytest.approx(lr)
        assert config.feedback_lr == feedback_lr


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
