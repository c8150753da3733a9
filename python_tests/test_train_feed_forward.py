"""Runs of feed-forward networks: what they compute, their settings and data, that they resume bit for bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from runs import (
    Killed,
    assert_edits_are_named,
    assert_last_good,
    assert_same_run,
    checkpoint,
    kill_after,
    metrics,
    small,
)
from test_tasks import write_cifar10, write_mnist

import tpext
from tpext.experiments import Config, ConfigError, make_config
from tpext.experiments import train as train_module
from tpext.experiments.figures import draw_comparison, draw_task
from tpext.experiments.model import FeedForwardModel, Model, make_model
from tpext.experiments.plan import Plan
from tpext.experiments.presets import Case, presets_of
from tpext.experiments.rule_names import LAYER_RULES, RULES, SEQUENCE_RULES
from tpext.experiments.run_folder import RunError, RunFolder
from tpext.experiments.train import DivergedError, train
from tpext.reference import kaczmarz as oracle
from tpext.tasks import TASKS, make_task
from tpext.tasks.toys import ToyName

pytestmark = pytest.mark.usefixtures("unrendered")

TOYS = get_args(ToyName)
FEED_FORWARD = [name for name in TASKS if make_task(name).length is None]
DTP = "difference-target-propagation"

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
    step = train_module.TrainingRun._step

    def poisoned(run: Any, iteration: int) -> Iterator[Any]:
        if iteration == 11:
            run.model.get_parameter(where).data[0] = float("nan")
        yield from step(run, iteration)

    monkeypatch.setattr(train_module.TrainingRun, "_step", poisoned)
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
        kill_after(stop, train_module.TrainingRun, monkeypatch)
        with pytest.raises(Killed):
            train(config, tmp_path / f"stopped{stop}")
        monkeypatch.undo()
        train(config, tmp_path / f"stopped{stop}", resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / f"stopped{stop}")


def test_an_edited_running_accuracy_is_named(data: Path, tmp_path: Path) -> None:
    config = tiny(data, rule="kaczmarz")
    train(config, tmp_path)
    (tmp_path / "result.json").unlink()
    edits = [('["running_accuracy"]', None, "running_accuracy must be of type float, got None")]
    assert_edits_are_named(tmp_path, edits, lambda: train(config, tmp_path, resume=True))
