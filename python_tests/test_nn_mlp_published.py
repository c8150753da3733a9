"""Feed-forward target propagation: equal to the numbers and the equations of the published codes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from mlp_cases import DOUBLE, assert_equal, keep_outputs, published
from torch import Tensor, nn
from torch.nn import functional

from tpext import (
    Backprop,
    ConstrainedLeastSquares,
    DifferenceTargetPropagation,
    RegularizedLeastSquares,
)
from tpext.nn import MLP
from tpext.ops import Activation, bias_inverse
from tpext.optim import CentredRMSprop, TensorFlowRMSprop


def seely(data: dict[str, Any], algorithm: int, name: Any = "tanh") -> MLP:
    step = float(data["alpha"])
    rule = {
        0: Backprop(),
        1: ConstrainedLeastSquares(target_step=step, normalize=False, local_loss="pre"),
        2: RegularizedLeastSquares(float(data["gamma"]), target_step=step, normalize=False, local_loss="pre"),
        3: DifferenceTargetPropagation(target_step=step, normalize=False),
    }[algorithm]
    options: dict[str, Any] = {
        "reference_compat": True,
        "learning_rate": float(data["lr_rinv"]),
        "num_steps": int(data["num_steps_rinv"]),
    }
    activation, output = Activation(name, **options), Activation("identity", **options)
    sizes = [data["x"].shape[1]]
    while f"W{len(sizes)}" in data:
        sizes.append(data[f"W{len(sizes)}"].shape[1])
    net = MLP(sizes, activation, output_activation=output, rule=rule, dtype=DOUBLE)
    with torch.no_grad():
        for index, layer in enumerate(net, 1):
            layer.weight.copy_(data[f"W{index}"].T)
            layer.bias.copy_(data[f"b{index}"][0])
            if algorithm == 3 and index > 1:
                layer.reverse_weight.copy_(data[f"V{index}"].T)
                layer.reverse_bias.copy_(data[f"c{index}"][0])
    return net


def assert_equals_seely(data: dict[str, Any], algorithm: int, name: Any = "tanh") -> None:
    """Outputs, targets on either side of bias and activation, gradients and a step: those of ``data``."""
    net, step, reg = seely(data, algorithm, name), float(data["alpha"]), float(data["gamma"])
    outputs = keep_outputs(net)
    x = data["x"].clone().requires_grad_(algorithm in (1, 2))
    loss = functional.cross_entropy(net(x), data["y"])
    loss.backward()
    prefix = f"alg{algorithm}"
    assert_equal(loss.detach(), data[f"{prefix}_loss"])
    # The published back-propagation ignores the step.
    step = 1.0 if algorithm == 0 else step
    rates = TensorFlowRMSprop(net.parameters(), lr=3e-3)
    below = x.detach()
    for index, (layer, output) in enumerate(zip(net, outputs, strict=True), 1):
        assert_equal(output.detach(), data[f"{prefix}_x3_{index}"])
        target = (output - step * output.grad).detach()
        assert_equal(target, data[f"{prefix}_t3_{index}"])
        x1 = functional.linear(below, layer.weight.detach())
        x2 = x1 + layer.bias.detach()
        assert_equal(x2, data[f"{prefix}_x2_{index}"])
        if algorithm == 1:
            t2 = layer.activation.inverse(target, x2)
            assert_equal(t2, data[f"{prefix}_t2_{index}"])
            assert_equal(bias_inverse(t2, x1, layer.bias.detach()), data[f"{prefix}_t1_{index}"])
        elif algorithm == 2:
            t2 = layer.activation.regularized_inverse(target, x2, reg)
            assert_equal(t2, data[f"{prefix}_t2_{index}"])
            assert_equal(bias_inverse(t2, x1, layer.bias.detach(), reg), data[f"{prefix}_t1_{index}"])
        below = output.detach()
        # Published losses are means over the batch and the units.
        mean = output.numel()
        layer.weight.grad /= mean
        layer.bias.grad /= mean
        assert_equal(layer.weight.grad.T, data[f"{prefix}_gW_{index}"])
        assert_equal(layer.bias.grad, data[f"{prefix}_gb_{index}"][0])
    if x.requires_grad:
        assert_equal((x - step * x.grad).detach(), data[f"{prefix}_t3_0"])
    rates.step()
    for index, layer in enumerate(net, 1):
        assert_equal(layer.weight.detach().T, data[f"{prefix}_Wafter_{index}"])


@pytest.mark.parametrize("algorithm", [0, 1, 2, 3])
def test_equals_the_published_code_of_seely(algorithm: int) -> None:
    assert_equals_seely(published("A_err_tanh.npz"), algorithm)


def run_published(name: str, algorithm: int, sizes: list[int], batch: int) -> dict[str, Tensor]:
    """``tprop_train.py`` by its equations, in NumPy: a random network's data and numbers, named as the stored ones.

    The weights are large, so that units of tanh and sigmoid stand beyond the published margin.
    """
    random = np.random.default_rng(len(sizes) * batch + algorithm)
    alpha, reg, rate, steps, count = 0.5, 0.05, 0.1, 2, len(sizes) - 1
    functions: dict[str, Any] = {
        "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
        "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), lambda x: np.exp(-x) / (1 + np.exp(-x)) ** 2),
        "relu": (lambda x: x * (x > 0), lambda x: 1.0 * (x > 0)),
        "identity": (lambda x: x, np.ones_like),
    }

    def invert(name: str, y: Any, x0: Any) -> Any:
        if name == "tanh":
            return np.arctanh(np.clip(y, -0.99, 0.99))
        if name == "sigmoid":
            return -np.log(1 / np.clip(y, 0.01, 0.99) - 1)
        return np.where(y > 0, y, np.minimum(x0, 0)) if name == "relu" else y

    def invert_regularized(name: str, y: Any, x0: Any) -> Any:
        if name == "identity":
            return y
        if name == "relu":
            above = (reg * x0 + y) / (1 + reg)
            cheaper = reg / (1 + reg) * (y - x0) ** 2 <= y**2
            below_zero = np.where((above > 0) & cheaper, above, x0)
            return np.where(x0 >= 0, np.maximum(above, 0), below_zero)
        function, slope = functions[name]
        x = invert(name, y, x0)
        for _ in range(steps):
            x = x - rate * 2 / x.size * ((function(x) - y) * slope(x) + reg * (x - x0))
        return x

    data: dict[str, Any] = {"alpha": alpha, "gamma": reg, "lr_rinv": rate, "num_steps_rinv": steps}
    weights, biases, reverse, reverse_biases = [], [], [], []
    for inputs, outputs in itertools.pairwise(sizes):
        weights.append(2 * random.standard_normal((inputs, outputs)))
        biases.append(0.3 * random.standard_normal((1, outputs)))
        reverse.append(random.standard_normal((outputs, inputs)))
        reverse_biases.append(0.3 * random.standard_normal((1, inputs)))
    # for probabilities away from 0 and 1, next to which a loss has no digits left
    weights[-1] /= 100
    x, y = random.standard_normal((batch, sizes[0])), np.eye(sizes[-1])[random.integers(sizes[-1], size=batch)]
    data |= {"x": x, "y": y}
    for key, values in (("W", weights), ("b", biases), ("V", reverse), ("c", reverse_biases)):
        data |= {f"{key}{layer}": value for layer, value in enumerate(values, 1)}

    prefix, names = f"alg{algorithm}", [name] * (count - 1) + ["identity"]
    x1, x2, x3 = [], [], [x]
    for layer in range(count):
        x1.append(x3[-1] @ weights[layer])
        x2.append(x1[-1] + biases[layer])
        x3.append(functions[names[layer]][0](x2[-1]))
    share = np.exp(x3[-1] - x3[-1].max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    data[f"{prefix}_loss"] = -np.mean(np.log(share[y == 1]))
    wish = (share - y) / batch
    t3 = x3[-1] - (1.0 if algorithm == 0 else alpha) * wish
    for layer in reversed(range(count)):
        slope = functions[names[layer]][1]
        mean = batch * sizes[layer + 1]
        if algorithm == 0:
            wish = wish * slope(x2[layer])
            error, t2, t1 = wish, x2[layer] - wish, x1[layer] - wish
            wish = wish @ weights[layer].T
            t3_below = x3[layer] - wish
        elif algorithm == 3:
            error = (x3[layer + 1] - t3) * slope(x2[layer])
            reached, wanted = (
                functions[name][0](h @ reverse[layer] + reverse_biases[layer]) for h in (x3[layer + 1], t3)
            )
            t3_below = x3[layer] - reached + wanted
        else:
            w = weights[layer]
            if algorithm == 1:
                t2 = invert(names[layer], t3, x2[layer])
                t1, operator = t2 - biases[layer], np.linalg.pinv(w)
            else:
                t2 = invert_regularized(names[layer], t3, x2[layer])
                t1 = (t2 - biases[layer] + reg * x1[layer]) / (1 + reg)
                operator = w.T @ np.linalg.inv(w @ w.T + reg * np.eye(len(w)))
            error, t3_below = x2[layer] - t2, x3[layer] + (t1 - x1[layer]) @ operator
        gradient = x3[layer].T @ error / mean
        data[f"{prefix}_gW_{layer + 1}"] = gradient
        data[f"{prefix}_gb_{layer + 1}"] = error.sum(0, keepdims=True) / mean
        data[f"{prefix}_Wafter_{layer + 1}"] = weights[layer] - 3e-3 * gradient / np.sqrt(
            0.9 + 0.1 * gradient**2 + 1e-10
        )
        data |= {f"{prefix}_x2_{layer + 1}": x2[layer], f"{prefix}_x3_{layer + 1}": x3[layer + 1]}
        data[f"{prefix}_t3_{layer + 1}"] = t3
        if algorithm in (1, 2):
            data |= {f"{prefix}_t2_{layer + 1}": t2, f"{prefix}_t1_{layer + 1}": t1}
        t3 = t3_below
    data[f"{prefix}_t3_0"] = t3
    return {key: torch.from_numpy(np.asarray(value)) for key, value in data.items()}


@pytest.mark.parametrize("algorithm", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "identity"])
@pytest.mark.parametrize(("sizes", "batch"), [([6, 5, 4, 3], 7), ([3, 5, 7, 4, 3], 1)])
def test_equals_the_published_equations(name: Any, algorithm: int, sizes: list[int], batch: int) -> None:
    """Other activations and sizes, narrowing and widening, than those of the stored numbers; and saturated units."""
    data = run_published(name, algorithm, sizes, batch)
    beyond = {"tanh": math.atanh(0.99), "sigmoid": math.log(99), "relu": 0.0, "identity": 0.0}[name]
    assert batch == 1 or bool((data[f"alg{algorithm}_x2_1"].abs() > beyond).any())
    assert_equals_seely(data, algorithm, name)


def test_equals_the_published_code_of_lee() -> None:
    data = published("B_dtp.npz")
    step = float(data["lr0"])
    rule = DifferenceTargetPropagation(target_step=step, noise=float(data["noise_std"]), normalize=False)
    hidden, head = (
        MLP([8, 6, 6, 5], "tanh", output_activation="tanh", rule=rule, dtype=DOUBLE),
        nn.Linear(5, 4, dtype=DOUBLE),
    )
    with torch.no_grad():
        for index, layer in enumerate([*hidden, head], 1):
            layer.weight.copy_(data[f"W{index}"].T)
            layer.bias.zero_()
            if index in (2, 3):
                layer.reverse_weight.copy_(data[f"V{index}"].T)
                layer.reverse_bias.zero_()
    reverse = [p for name, p in hidden.named_parameters() if "reverse" in name]
    inverse_optimizer = CentredRMSprop(reverse, lr=float(data["lr_b"]))
    for index in (2, 3):
        layer = hidden[index - 1]
        # The stored inputs have their noise already.
        layer.reconstruction_loss(data[f"hc_{index - 1}"], noise=0.0).backward()
        assert_equal(layer.reverse_weight.grad.T, data[f"gV{index}"])
        assert_equal(layer.reverse_bias.grad, data[f"gc{index}"])
    inverse_optimizer.step()
    for index in (2, 3):
        assert_equal(hidden[index - 1].reverse_weight.detach().T, data[f"V{index}_after"])
        assert_equal(hidden[index - 1].reverse_bias.detach(), data[f"c{index}_after"])

    outputs = keep_outputs(hidden)
    loss = functional.cross_entropy(head(hidden(data["x"])), data["labels"])
    loss.backward()
    assert_equal(loss.detach(), data["nll"])
    for index, (layer, output) in enumerate(zip(hidden, outputs, strict=True), 1):
        assert_equal(output.detach(), data[f"h{index}"])
        assert_equal((output - step * output.grad).detach(), data[f"t{index}"])
        # The published local loss has no half and is a mean over the batch.
        layer.weight.grad *= 2 / len(output)
        layer.bias.grad *= 2 / len(output)
    forward = [p for name, p in nn.ModuleList([*hidden, head]).named_parameters() if "reverse" not in name]
    optimizer = CentredRMSprop(forward, lr=float(data["lr_f"]))
    for index, layer in enumerate([*hidden, head], 1):
        assert_equal(layer.weight.grad.T, data[f"gW{index}"])
        assert_equal(layer.bias.grad, data[f"gb{index}"])
    optimizer.step()
    for index, layer in enumerate([*hidden, head], 1):
        assert_equal(layer.weight.detach().T, data[f"W{index}_after"])
        if index <= 3:
            assert_equal(layer.bias.detach(), data[f"b{index}_after"])
