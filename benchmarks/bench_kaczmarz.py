"""Direct weight solves: the pass over single samples against a loop of torch operations, products against broadcasting.

Peers are the published algorithm, without autograd. ``test_stream``: a layer and a sample at a time, in as few torch
operations as it can be said in (the bias a column, one-hot targets and the samples' ones made beforehand), and as
published. ``test_layer_step`` and ``test_network``: as published, by tensors ``B x M x N``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tpext import Kaczmarz
from tpext.nn import MLP, HotTargetLoss
from tpext.ops import Units, kaczmarz_step

# A pass takes long enough that the cold caches after the peer's turn do not matter, as in an epoch of 60,000.
SAMPLES = 2000
# MNIST through 32 hidden units is the published network.
NETWORKS = [(784, 32, 10), (784, 128, 10), (784, 100, 100, 10)]
LAYERS = [(64, 784, 32), (64, 784, 100), (64, 784, 256)]
# By how much ours is to be faster: single samples through that network, a batch through a layer of its size.
STREAM_TARGET, UPDATE_TARGET = 30, 5


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def columns_of(model: MLP) -> list[Tensor]:
    """The weights of each layer with the bias for the last column."""
    values = [parameter.detach() for parameter in model.parameters()]
    return [torch.cat([w, b[:, None]], 1) for w, b in zip(values[::2], values[1::2], strict=True)]


def data(samples: int, inputs: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of which four fifths of the numbers are zero, as MNIST's are; their classes, as numbers and one-hot."""
    torch.manual_seed(0)
    x = torch.rand(samples, inputs) * (torch.rand(samples, inputs) < 0.2)
    labels = torch.randint(classes, (samples,))
    return x, labels, torch.nn.functional.one_hot(labels, classes).float()


def forward(x: Tensor, hot: Tensor, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs and outputs of the layers, and the target of the last output."""
    inputs, zs = [x], []
    for weight in weights:
        zs.append(inputs[-1] @ weight.T)
        inputs.append(with_ones(zs[-1].relu()))
    return inputs, zs, torch.where(hot == 1, zs[-1].clamp(min=1), zs[-1].clamp(max=0))


def update_by_products(x: Tensor, hot: Tensor, weights: list[Tensor]) -> None:
    """The updates of one sample ``[1, N + 1]``, for each layer the fewest torch operations."""
    inputs, zs, target = forward(x, hot, weights)
    for i in range(len(weights) - 1, -1, -1):
        weight, moved, residual = weights[i], inputs[i], target - zs[i]
        if i:
            moved = torch.addmm(moved, residual, weight, alpha=1 / len(weight)).relu_()
            moved[:, -1] = 1
            residual = target - moved @ weight.T
            target = torch.where(moved > 0, moved, with_ones(zs[i - 1].clamp(max=0)))[:, :-1]
        weight.addmm_((residual / moved.square().sum()).T, moved)


def update_by_broadcasting(x: Tensor, hot: Tensor, weights: list[Tensor]) -> None:
    """The updates of a batch ``[B, N + 1]`` as published: displacements and updates of each sample, then their mean."""
    inputs, zs, target = forward(x, hot, weights)
    for i in range(len(weights) - 1, -1, -1):
        # Published is a displacement of the data too, which is of no use.
        moved, change = broadcast_step(target, zs[i], inputs[i], weights[i], data=i == 0)
        weights[i] += change
        if i:
            target = torch.where(moved > 0, moved, with_ones(zs[i - 1].clamp(max=0)))[:, :-1]


def broadcast_step(target: Tensor, z: Tensor, x: Tensor, weight: Tensor, data: bool) -> tuple[Tensor, Tensor]:
    moved = x
    if not data:
        moved = x + ((target - z)[:, :, None] * weight).mean(1)
        moved = torch.cat([moved[:, :-1].relu(), moved.new_ones(len(moved), 1)], 1)
    scaled = (target - moved @ weight.T) / moved.square().sum(1, keepdim=True)
    return moved, (scaled[:, :, None] * moved[:, None, :]).mean(0)


PEERS: dict[str, Callable[[Tensor, Tensor, list[Tensor]], None]] = {
    "products": update_by_products,
    "broadcasting": update_by_broadcasting,
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("sizes", NETWORKS, ids=lambda sizes: "-".join(map(str, sizes)))
def test_stream(against: Any, threads: int, sizes: tuple[int, ...], peer: str) -> None:
    """One pass over samples, ours in one call."""
    if threads != 1:
        pytest.skip("a sample has too little work for a second thread, ours and the peer's")
    x, labels, hot = data(SAMPLES, sizes[0], sizes[-1])
    model = MLP(sizes, "relu", rule=Kaczmarz())
    weights, rows = columns_of(model), list(zip(with_ones(x).split(1), hot.split(1), strict=True))

    def by_torch() -> None:
        for row, one in rows:
            PEERS[peer](row, one, weights)

    products = [m * n for n, m in itertools.pairwise(sizes)]
    flops = SAMPLES * (4 * products[0] + 8 * sum(products[1:]))
    against(
        lambda: model.stream(x, labels),
        by_torch,
        peer_name=f"a layer at a time in torch, {peer}",
        flops=flops,
        sizes=list(sizes),
        samples=SAMPLES,
        target_ratio=STREAM_TARGET if sizes == NETWORKS[0] else None,
    )


@pytest.mark.parametrize(("B", "N", "M"), LAYERS)
def test_layer_step(against: Any, threads: int, B: int, N: int, M: int) -> None:
    """A layer's update and its input's target for a batch: three products."""
    x, weight, bias, d = torch.rand(B, N), torch.randn(M, N) * 0.01, torch.randn(M), torch.randn(B, M)
    columns, ones = torch.cat([weight, bias[:, None]], 1), with_ones(x)
    z = ones @ columns.T
    relu = Units("relu")
    against(
        lambda: kaczmarz_step(d, x, weight, True, relu),
        lambda: broadcast_step(z + d, z, ones, columns, data=False),
        peer_name="tensors B x M x N",
        flops=6 * B * N * M,
        B=B,
        N=N,
        M=M,
        target_ratio=UPDATE_TARGET if M == 32 else None,
    )


@pytest.mark.parametrize("B", [64, 256])
def test_network(against: Any, threads: int, B: int) -> None:
    """The published network's training step, ours by modules, autograd and SGD."""
    sizes = NETWORKS[0]
    x, labels, hot = data(B, sizes[0], sizes[-1])
    model = MLP(sizes, "relu", rule=Kaczmarz())
    sgd, loss = torch.optim.SGD(model.parameters(), lr=1), HotTargetLoss()
    weights, ones = columns_of(model), with_ones(x)

    def ours() -> None:
        sgd.zero_grad()
        loss(model(x), labels).backward()
        sgd.step()

    products = [m * n for n, m in itertools.pairwise(sizes)]
    against(
        ours,
        lambda: update_by_broadcasting(ones, hot, weights),
        peer_name="tensors B x M x N",
        flops=B * (4 * products[0] + 8 * sum(products[1:])),
        sizes=list(sizes),
        B=B,
    )
