"""Inverses of feed-forward layers against the torch operations whose place they take.

``test_act_inverse``: the published code's gradient steps leave the regularised inverse of an activation unsolved, so
the peer is torch's cheapest way to the same numbers. For displacements as small as those of a training step these are
plain Newton steps from the current input, for any others the safeguarded search that CUDA runs, as Newton's steps
need not find the global minimum.

``test_linear_inverse``, ``test_layer``: as published, by an explicit ``N x N`` inverse, or constrained by a
pseudo-inverse, which is formed in each call as ours is. The published activation, two gradient steps, is less work
than ours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tpext.ops import Activation, layer_displacement, layer_inverse, linear_inverse
from tpext.ops.act_inverse import _minimizer

REG, MARGIN = 0.1, 1e-2
EPS = torch.finfo(torch.float32).eps
# Targets of each activation, some of them beyond its range.
BEYOND = {"tanh": (-1.2, 1.2), "sigmoid": (-0.1, 1.1)}
# A layer's outputs for a batch, and many.
SHAPES = [(100, 240), (1000, 240)]
# Inputs and outputs of the published networks' layers.
B, LAYERS = 100, [(784, 240), (240, 240)]
REGS = {"regularized": REG, "constrained": 0.0}


def newton(y: Tensor, c: Tensor, activation: str) -> Tensor:
    """Three steps from ``c``: enough for float32 after a displacement of 0.01."""
    x = c
    for _ in range(3):
        output = getattr(torch, activation)(x)
        gap, twice = y - output, 2 * output
        slope, bend = (1 - output * output, twice) if activation == "tanh" else (output - output * output, twice - 1)
        x = x + (gap * slope - REG * (x - c)) / (slope * (slope + bend * gap) + REG)
    return x


def search(y: Tensor, c: Tensor, activation: str) -> Tensor:
    return _minimizer(y, c, activation, REG)


@pytest.mark.parametrize("displacement", ["small", "any"])
@pytest.mark.parametrize("activation", BEYOND)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("op", ["act_inverse", "act_displacement"])
def test_act_inverse(
    against: Any, threads: int, op: str, shape: tuple[int, int], activation: str, displacement: str
) -> None:
    """Of outputs moved by some 0.01, or of targets anywhere in the range and a little beyond it."""
    torch.manual_seed(0)
    c = torch.randn(shape)
    output = getattr(torch, activation)(c)
    if displacement == "small":
        d, solve, name = 0.01 * torch.randn(shape), newton, "Newton's steps"
    else:
        d, solve, name = torch.empty(shape).uniform_(*BEYOND[activation]) - output, search, "safeguarded search"
    y, moves = output + d, op == "act_displacement"

    def ours() -> Tensor:
        if moves:
            return torch.ops.tpext.act_displacement(d, c, activation, 0.0, REG)
        return torch.ops.tpext.act_inverse(y, c, activation, 0.0, REG, EPS)

    def peer() -> Tensor:
        return solve(y, c, activation) - c if moves else solve(y, c, activation)

    # Where two minima cost the same to rounding, either is right.
    near = (ours() - peer()).abs() < (1e-5 if displacement == "small" else 1e-3)
    assert near.float().mean() > 0.999
    against(
        ours,
        peer,
        peer_name=f"{name} in torch operations",
        seconds=0.6,
        rows=shape[0],
        M=shape[1],
        op=op,
        activation=activation,
        displacement=displacement,
    )


def published_linear(target: Tensor, x: Tensor, weight: Tensor, reg: float) -> Tensor:
    if reg == 0:
        inverse = torch.linalg.pinv(weight.T)
        return x - x @ weight.T @ inverse + target @ inverse
    gram = weight.T @ weight + reg * torch.eye(weight.shape[1])
    return (target @ weight + reg * x) @ torch.linalg.inv(gram)


def published_tanh(target: Tensor, z: Tensor, reg: float, margin: float = MARGIN) -> Tensor:
    moved = torch.atanh(target.clamp(margin - 1, 1 - margin))
    if reg > 0:
        for _ in range(2):
            output = torch.tanh(moved)
            gradient = (output - target) * (1 - output**2) + reg * (moved - z)
            moved = moved - 0.1 * 2 / z.numel() * gradient
    return moved


def published_layer(target: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reg: float) -> Tensor:
    product = x @ weight.T
    moved = published_tanh(target, product + bias, reg)
    return published_linear((moved - bias + reg * product) / (1 + reg), x, weight, reg)


def layer(N: int, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch and a layer's parameters; of orthogonal weights the pseudo-inverse is exact in float32, too."""
    torch.manual_seed(0)
    return torch.rand(B, N) * 0.1, torch.nn.init.orthogonal_(torch.empty(M, N)), 0.1 * torch.randn(M)


def factor_flops(N: int, M: int) -> float:
    small, large = min(N, M), max(N, M)
    return small**2 * (3 * large + small / 3)


def peer_name(method: str) -> str:
    return "explicit N x N inverse" if method == "regularized" else "pseudo-inverse"


@pytest.mark.parametrize("method", REGS)
@pytest.mark.parametrize(("N", "M"), LAYERS)
def test_linear_inverse(against: Any, threads: int, N: int, M: int, method: str) -> None:
    x, weight, _ = layer(N, M)
    args = (x @ weight.T + 0.01 * torch.randn(B, M), x, weight, REGS[method])
    assert torch.allclose(linear_inverse(*args), published_linear(*args), atol=1e-4)
    against(
        lambda: linear_inverse(*args),
        lambda: published_linear(*args),
        peer_name=peer_name(method),
        flops=factor_flops(N, M) + 4 * B * N * M,
        seconds=0.6,
        N=N,
        M=M,
        B=B,
        method=method,
    )


@pytest.mark.parametrize("op", [layer_inverse, layer_displacement], ids=lambda op: op.__name__)
@pytest.mark.parametrize("method", REGS)
@pytest.mark.parametrize(("N", "M"), LAYERS)
def test_layer(against: Any, threads: int, N: int, M: int, method: Any, op: Any) -> None:
    """Of a tanh layer, the target of its input, or its displacement."""
    x, weight, bias = layer(N, M)
    d, reg = 0.01 * torch.randn(B, M), REGS[method]
    target = torch.tanh(x @ weight.T + bias) + d
    moves = op is layer_displacement

    def ours(activation: Activation) -> Tensor:
        return op(d if moves else target, x, weight, bias, activation, method=method, reg=reg, margin=MARGIN)

    def peer() -> Tensor:
        moved = published_layer(target, x, weight, bias, reg)
        return moved - x if moves else moved

    tanh, published = Activation("tanh"), Activation("tanh", reference_compat=True)
    assert torch.allclose(ours(published), peer(), atol=1e-4)
    against(
        lambda: ours(tanh),
        peer,
        peer_name=peer_name(method),
        flops=factor_flops(N, M) + (4 if moves else 6) * B * N * M,
        seconds=0.6,
        N=N,
        M=M,
        B=B,
        method=method,
        op=op.__name__,
    )
