"""A whole training step of feed-forward networks: forward, cross-entropy, backward, update.

``test_mlp_step``: each rule against the same network of torch's modules trained by back-propagation, with the same
optimizer. ``test_published_step``: the least squares rules against the published way in torch operations, without
autograd: layer by layer an explicit ``N x N`` inverse, or constrained a pseudo-inverse, with two gradient steps for the
activation. The published code also inverts the first layer, which is of no use and most of the work; the peer is timed
with that and without it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_layer_inverse import MARGIN, peer_name, published_linear, published_tanh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tpext
from tpext.ops import Activation

# The published network.
SIZES, B = (784, 240, 240, 240, 240, 10), 100
LAYERS = list(itertools.pairwise(SIZES))
REG = 0.1
RULES = {
    "regularized": tpext.RegularizedLeastSquares(reg=REG),
    "constrained": tpext.ConstrainedLeastSquares(margin=0.4),
    "dtp": tpext.DifferenceTargetPropagation(noise=0.36),
    "backprop": tpext.Backprop(),
}
# A regularised step is to take at most 1.5 times as long as back-propagation's.
TARGETS = {"regularized": 1 / 1.5}
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    # Steps too small to change what is timed.
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-9),
}


def data() -> tuple[Tensor, Tensor]:
    """Samples of which four fifths of the numbers are zero, as MNIST's are, and their classes."""
    x = torch.rand(B, SIZES[0]) * (torch.rand(B, SIZES[0]) < 0.2)
    return x, torch.randint(SIZES[-1], (B,))


def torch_network() -> nn.Sequential:
    """With orthogonal weights, as published; their pseudo-inverses are exact in float32, too."""
    torch.manual_seed(0)
    reference = nn.Sequential(*[module for N, M in LAYERS for module in (nn.Linear(N, M), nn.Tanh())][:-1])
    for linear in reference[::2]:
        nn.init.orthogonal_(linear.weight)
    return reference


def network(reference: nn.Sequential, rule: Any, activation: Any = "tanh", output: Any = "identity") -> tpext.nn.MLP:
    """Ours with the parameters of torch's."""
    ours = tpext.nn.MLP(SIZES, activation, rule=rule, output_activation=output)
    for layer, linear in zip(ours, reference[::2], strict=True):
        layer.load_state_dict(linear.state_dict())
    return ours


def training_step(model: nn.Module, optimizer: str, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """With a learned inverse both halves of the step, which share the backward pass and the update."""
    update = OPTIMIZERS[optimizer](model.parameters())
    learns = isinstance(model, tpext.nn.MLP) and isinstance(model.rule, tpext.DifferenceTargetPropagation)

    def run() -> None:
        update.zero_grad()
        loss = cross_entropy(model(x), labels)
        if learns:
            loss = loss + model.reconstruction_loss(x)
        loss.backward()
        update.step()

    return run


def least_flops(rule: str) -> float:
    """Those of the products: of back-propagation, without the gradient of the data, and what the rule has instead."""
    inner = LAYERS[1:]
    flops = 6 * B * sum(N * M for N, M in LAYERS) - 2 * B * SIZES[0] * SIZES[1]
    if rule in ("regularized", "constrained"):
        # The smaller Gram matrix, its factor, and a substitution for each row in place of its input gradient.
        sides = [(min(N, M), max(N, M)) for N, M in inner]
        return flops + sum(k * k * (m + k / 3) + 2 * B * k * (m + k) - 2 * B * k * m for k, m in sides)
    # The reverse layer twice; the layer, its reverse layer and the gradient of that for the reconstruction.
    return flops + (8 * B * sum(N * M for N, M in inner) if rule == "dtp" else 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_mlp_step(against: Any, threads: int, optimizer: str, rule: str) -> None:
    x, labels = data()
    reference = torch_network()
    ours = network(reference, RULES[rule])
    assert torch.allclose(ours(x), reference(x), atol=1e-5)
    against(
        training_step(ours, optimizer, x, labels),
        training_step(reference, optimizer, x, labels),
        peer_name="back-propagation in torch",
        flops=least_flops(rule),
        sizes=list(SIZES),
        B=B,
        optimizer=optimizer,
        rule=rule,
        target_ratio=TARGETS.get(rule),
    )


@torch.no_grad()
def published_gradients(
    linears: list[nn.Linear], x: Tensor, labels: Tensor, rule: str, first_layer: bool
) -> list[tuple[Tensor, Tensor]]:
    """Those of each layer's weight and bias, of its local loss before the activation."""
    reg, margin = (REG, MARGIN) if rule == "regularized" else (0.0, RULES["constrained"].margin)
    inputs, products = [x], []
    for linear in linears:
        products.append(inputs[-1] @ linear.weight.T)
        inputs.append(torch.tanh(products[-1] + linear.bias))
    logits = products[-1] + linears[-1].bias
    hot = torch.nn.functional.one_hot(labels, SIZES[-1])
    target = logits - (torch.softmax(logits, 1) - hot) / len(x)
    gradients = []
    for i in range(len(linears) - 1, -1, -1):
        weight, bias, product = linears[i].weight, linears[i].bias, products[i]
        z = product + bias
        moved = target if linears[i] is linears[-1] else published_tanh(target, z, reg, margin)
        error = z - moved
        gradients.append((error.T @ inputs[i], error.sum(0)))
        if i or first_layer:
            target = published_linear((moved - bias + reg * product) / (1 + reg), inputs[i], weight, reg)
    return gradients[::-1]


@pytest.mark.parametrize("first_layer", [True, False], ids=["all-layers", "but-the-first"])
@pytest.mark.parametrize("rule", ["regularized", "constrained"])
def test_published_step(against: Any, threads: int, rule: str, first_layer: bool) -> None:
    x, labels = data()
    reference = torch_network()
    linears = [module for module in reference if isinstance(module, nn.Linear)]
    update = OPTIMIZERS["SGD"](reference.parameters())

    def peer() -> None:
        gradients = published_gradients(linears, x, labels, rule, first_layer)
        for linear, (of_weight, of_bias) in zip(linears, gradients, strict=True):
            linear.weight.grad, linear.bias.grad = of_weight, of_bias
        update.step()

    check_published(reference, x, labels, rule, peer)
    which = "" if first_layer else ", none for the first layer"
    against(
        training_step(network(reference, RULES[rule]), "SGD", x, labels),
        peer,
        peer_name=f"{peer_name(rule)}{which}",
        flops=least_flops(rule),
        sizes=list(SIZES),
        B=B,
        optimizer="SGD",
        rule=rule,
        first_layer=first_layer,
    )


def check_published(reference: nn.Module, x: Tensor, labels: Tensor, rule: str, peer: Callable[[], None]) -> None:
    """Ours by the published activation and local loss gives the peer's gradients."""
    names = ("tanh", "identity")
    tanh, identity = (Activation(name, reference_compat=True) for name in names)
    ours = network(reference, dataclasses.replace(RULES[rule], local_loss="pre"), tanh, identity)
    cross_entropy(ours(x), labels).backward()
    peer()
    for parameter, published in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(parameter.grad, published.grad, rtol=1e-2, atol=1e-2 * float(published.grad.abs().max()))
