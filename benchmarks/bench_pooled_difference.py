"""What learned feedback does around its convolutions, in one kernel, against torch's operations for the same numbers.

The peer is what anyone would write: ``elu``, ``max_pool2d``, ``max_unpool2d`` and ``randn_like``, the clean code once a
call and the rest once a draw. A pool of 3 by 2 overlaps: torch's unpooling then leaves open which window stays, so its
numbers are not compared there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tpext.ops import code_difference, probe_difference

OPS = ["code_difference", "probe_difference"]
B = 64
# Channels and the side of the planes; a network's layers after each other.
LAYERS = [(B, 128, 32), (B, 256, 16), (B, 512, 8), (B, 512, 4), (B, 512, 2)]
COUNTER = {"seed": 1, "step": 2, "stream": 3}
SIGMA = 0.1


def unpool(values: Tensor, indices: Tensor | None, kernel: int, stride: int, side: int) -> Tensor:
    if indices is None:
        return values
    padding = kernel // 2 if kernel > stride else 0
    return functional.max_unpool2d(values, indices, kernel, stride, padding, output_size=(side, side))


def sides(
    op: str, shape: tuple[int, int, int], kernel: int, stride: int, draws: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Ours and the peer."""
    batch, channels, side = shape
    pool = {"kernel": kernel, "stride": stride, "padding": kernel // 2 if kernel > stride else 0}
    torch.manual_seed(0)
    z = torch.randn(batch, channels, side, side)
    change = SIGMA * torch.randn(draws, *z.shape)

    def pooled(v: Tensor) -> tuple[Tensor, Tensor | None]:
        y = functional.elu(v)
        return functional.max_pool2d(y, *pool.values(), return_indices=True) if kernel else (y, None)

    y, indices = pooled(z)

    def code() -> Tensor:
        clean = unpool(functional.elu(y), indices, kernel, stride, side)
        found = []
        for dz in change:
            moved, own = pooled(z + dz)
            found.append(unpool(functional.elu(moved), own, kernel, stride, side) - clean)
        return torch.stack(found)

    def probe() -> Tensor:
        clean = functional.elu(y)
        probes = (functional.elu(y + SIGMA * torch.randn_like(y)) - clean for _ in range(draws))
        return torch.stack([unpool(values, indices, kernel, stride, side) for values in probes])

    if op == "code_difference":
        return lambda: code_difference(z, change, y, indices, **pool), code
    size = {"height": side, "width": side, "sigma": SIGMA}
    return lambda: probe_difference(y, indices, **pool, **size, **COUNTER, draws=draws), probe


@pytest.mark.parametrize("draws", [1, 3], ids=lambda K: f"K{K}")
@pytest.mark.parametrize(
    ("shape", "kernel", "stride"),
    [*((shape, 2, 2) for shape in LAYERS), ((B, 256, 16), 3, 2), ((B, 1024, 1), 0, 1)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
@pytest.mark.parametrize("op", OPS)
def test_difference(
    against: Any, threads: int, op: str, shape: tuple[int, int, int], kernel: int, stride: int, draws: int
) -> None:
    ours, peer = sides(op, shape, kernel, stride, draws)
    if op == "code_difference" and kernel <= stride:
        torch.testing.assert_close(ours(), peer(), rtol=0, atol=1e-5)
    against(
        ours,
        peer,
        peer_name="torch operations",
        seconds=0.6,
        op=op,
        B=shape[0],
        C=shape[1],
        H=shape[2],
        W=shape[2],
        kernel=kernel,
        stride=stride,
        K=draws,
    )
