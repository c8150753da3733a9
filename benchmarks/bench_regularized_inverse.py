"""Ridge inverses against what torch.linalg offers for them.

On the CPU ours are the calls that a user makes, ``tpext.ops.regularized_inverse`` and ``regularized_solve``, which go
past torch's dispatcher; ``torch.ops.tpext.*`` takes some 4 us a call more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tpext.ops import regularized_inverse, regularized_solve

# What torch has for (W'W + I)^-1 W': from the Gram matrix, or by factors of W on top of an identity.
INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky_ex, cholesky_solve": lambda w: torch.cholesky_solve(w.mT, torch.linalg.cholesky_ex(gram(w))[0]),
    "solve": lambda w: torch.linalg.solve(gram(w), w.mT),
    "inv_ex": lambda w: torch.linalg.inv_ex(gram(w))[0] @ w.mT,
    "lstsq": lambda w: torch.linalg.lstsq(stacked(w), identities(w, w.shape[-2], 2 * w.shape[-1])).solution,
    "pinv": lambda w: torch.linalg.pinv(stacked(w))[..., : w.shape[-2]],
}
SOLUTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cholesky_ex, cholesky_solve": lambda w, y: (
        torch.cholesky_solve(w.mT @ y.mT, torch.linalg.cholesky_ex(gram(w))[0]).mT
    ),
    "solve": lambda w, y: torch.linalg.solve(gram(w), w.mT @ y.mT).mT,
    "lstsq": lambda w, y: torch.linalg.lstsq(stacked(w), torch.cat([y.mT, torch.zeros_like(y.mT)], -2)).solution.mT,
}


# By how much many small inverses are to be faster than the best of these, up to each size.
TARGETS = {16: 8, 32: 5, 64: 3}


def identities(w: Tensor, columns: int, rows: int) -> Tensor:
    return torch.eye(rows, columns).expand(len(w), rows, columns)


def gram(w: Tensor) -> Tensor:
    return w.mT @ w + torch.eye(w.shape[-1])


def stacked(w: Tensor) -> Tensor:
    return torch.cat([w, identities(w, w.shape[-1], w.shape[-1])], -2)


def fastest(peers: dict[str, Callable[..., Tensor]], *args: Tensor) -> str:
    """The name of the peer that takes least on these batches, among those within 3 times the least on 64 of each."""

    def seconds(name: str, *args: Tensor) -> float:
        least = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            peers[name](*args)
            least = min(least, time.perf_counter() - start)
        return least

    few = {name: seconds(name, *(arg[:64] for arg in args)) for name in peers}
    near = [name for name in peers if few[name] < 3 * min(few.values())]
    return min(near, key=lambda name: seconds(name, *args))


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("size", [16, 100, 256, 512])
def test_inverse(against, threads, size, batch):
    if size * batch > 6400:
        pytest.skip("a batch of large matrices runs one thread a matrix, as the small ones show")
    torch.manual_seed(0)
    weight = torch.randn(batch, size, size)
    identity = torch.eye(size)

    def ours():
        return regularized_inverse(weight, 1.0)

    def peer():
        gram = weight.mT @ weight + identity
        return torch.cholesky_solve(weight.mT, torch.linalg.cholesky(gram))

    assert torch.allclose(ours(), peer(), atol=1e-3)
    against(ours, peer, peer_name="torch.linalg.cholesky, cholesky_solve", n=size, batch=batch)


@pytest.mark.parametrize("batch", [64, 1024, 16384])
@pytest.mark.parametrize("size", [4, 8, 16, 32, 64])
def test_small_inverses(against, size, batch):
    """On two threads against the fastest of all that torch.linalg has for the task, found out for each row."""
    if size * batch > 32 * 16384:
        pytest.skip("a round would take seconds, and smaller batches show the same")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    weight = torch.randn(batch, size, size)
    expected = regularized_inverse(weight, 1.0)
    for peer in INVERSES.values():
        assert torch.allclose(peer(weight[:64]), expected[:64], atol=1e-3)
    name = fastest(INVERSES, weight)
    against(
        lambda: regularized_inverse(weight, 1.0),
        lambda: INVERSES[name](weight),
        peer_name=name,
        flops=batch * size**3 * 10 / 3,
        target_ratio=next(target for largest, target in TARGETS.items() if size <= largest),
        n=size,
        batch=batch,
    )


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("size", [8, 32, 64])
def test_small_solutions(against, size, count):
    torch.set_num_threads(2)
    torch.manual_seed(0)
    batch = 1024
    weight, rhs = torch.randn(batch, size, size), torch.randn(batch, count, size)
    expected = regularized_solve(weight, rhs, 1.0)
    for peer in SOLUTIONS.values():
        assert torch.allclose(peer(weight, rhs), expected, atol=1e-3)
    name = fastest(SOLUTIONS, weight, rhs)
    against(
        lambda: regularized_solve(weight, rhs, 1.0),
        lambda: SOLUTIONS[name](weight, rhs),
        peer_name=name,
        flops=batch * size**2 * (size * 4 / 3 + 4 * count),
        n=size,
        batch=batch,
        count=count,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64, 4096])
@pytest.mark.parametrize("size", [8, 16, 32, 64, 100])
def test_gpu_inverse(gpu, size, batch):
    weight = gpu.randn(batch, size, size)
    identity = torch.eye(size, device=weight.device)

    def gram():
        return weight.mT @ weight + identity

    def ours():
        return torch.ops.tpext.regularized_inverse(weight, 1.0)

    # A way that cannot be captured in a graph has its eager time.
    peers = {
        "torch.linalg.solve_ex": lambda: torch.linalg.solve_ex(gram(), weight.mT)[0],
        "torch.linalg.cholesky_ex, cholesky_solve": lambda: torch.cholesky_solve(
            weight.mT, torch.linalg.cholesky_ex(gram())[0]
        ),
        "torch.linalg.inv_ex": lambda: torch.linalg.inv_ex(gram())[0] @ weight.mT,
    }
    for peer in peers.values():
        assert torch.allclose(ours(), peer(), atol=1e-3)
    gpu.against(ours, peers, target_ratio=3, seconds=0.4, n=size, batch=batch)
