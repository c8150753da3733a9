"""Counter-based normal noise against torch's generators, which know no place in a sequence.

``torch.randn`` is the peer of a new tensor, ``normal_`` of one that is there: what a training loop that keeps its noise
would call. Ours always makes a new one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpext.ops import counter_normal

SHAPES = [(64, 512), (64, 16384)]
COUNTER = {"seed": 1, "step": 2, "stream": 3}


def check_moments(shape: tuple[int, int], dtype: torch.dtype) -> None:
    noise = counter_normal(shape, **COUNTER, dtype=dtype)
    allowed = 5 / noise.numel() ** 0.5
    assert abs(noise.mean().item()) < allowed
    assert abs(noise.square().mean().item() - 1) < 2 * allowed


@pytest.mark.parametrize("peer", ["torch.randn", "normal_"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_noise(against: Any, threads: int, shape: tuple[int, int], dtype: torch.dtype, peer: str) -> None:
    check_moments(shape, dtype)
    there = torch.empty(shape, dtype=dtype)
    against(
        lambda: counter_normal(shape, **COUNTER, dtype=dtype),
        there.normal_ if peer == "normal_" else lambda: torch.randn(shape, dtype=dtype),
        peer_name=peer,
        seconds=0.6,
        rows=shape[0],
        M=shape[1],
        dtype=str(dtype).removeprefix("torch."),
    )
