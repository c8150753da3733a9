"""What the tests of networks of blocks share: networks, noise that is known beforehand, explicit Jacobians."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tpext.feedback import Draw

DOUBLE = torch.float64


def published(file: str | Path) -> dict[str, Tensor]:
    """The arrays of a file of ``data``, or of any other where the path is absolute; only those of numbers."""
    arrays = np.load(Path(__file__).parent / "data" / file)
    return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files if arrays[key].dtype.kind in "fi"}


def assert_equal(actual: Tensor | None, expected: Any, rtol: float = 1e-9) -> None:
    """Equal relative to the largest element."""
    assert actual is not None
    expected = torch.as_tensor(expected).detach()
    atol = rtol * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=atol)


def normal_noise(draw: Draw, like: Tensor) -> Tensor:
    """A noise source: a function of the draw alone."""
    seed = ((draw.step * 64 + draw.layer) * 4096 + draw.draw) * 2 + draw.output
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def simple_vgg(channels: Sequence[int], classes: int, size: int, bias: bool = True) -> OrderedDict[str, nn.Module]:
    """Ernoult et al.'s SimpleVGG for images ``[3, size, size]``, in float64, under its published names."""
    blocks, inputs = OrderedDict[str, nn.Module](), 3
    for index, outputs in enumerate(channels):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias, dtype=DOUBLE)
        blocks[f"conv_{index}"] = nn.Sequential(OrderedDict(conv=conv, rho=nn.ELU(), pool=nn.MaxPool2d(2)))
        inputs, size = outputs, size // 2
    linear = nn.Linear(inputs * size**2, classes, bias, dtype=DOUBLE)
    blocks["fc"] = nn.Sequential(OrderedDict(reshape=nn.Flatten(), linear=linear))
    return blocks


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def degrees(first: Tensor, second: Tensor, eps: float = 0.0) -> float:
    first, second = first.flatten(), second.flatten()
    cosine = torch.dot(first, second) / (first.norm() * second.norm() + eps)
    return float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))
