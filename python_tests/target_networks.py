"""What the tests of networks of blocks share: networks, noise that is known beforehand, explicit Jacobians."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tpext import Backprop, DifferenceTargets, DirectTargets, GaussNewtonTargets, Targets
from tpext.feedback import Draw
from tpext.nn import TargetSequential

DOUBLE = torch.float64

RULES: list[Any] = [
    DifferenceTargets(target_step=0.7),
    Targets(target_step=0.3),
    DirectTargets(),
    DirectTargets(hidden=6, activation="tanh", recurrent_input=True),
    GaussNewtonTargets(damping=0.1),
]
ALL_RULES = [*RULES, Backprop()]
each_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
each_target_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def make_blocks() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ELU(inplace=True)),
        nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh()),
        nn.Linear(5, 3),
    ]


def make_net(rule: Any, **options: Any) -> TargetSequential:
    return TargetSequential(*make_blocks(), rule=rule, input_shape=(2, 6, 6), **options).double()


def make_batch(size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(size, 2, 6, 6, dtype=DOUBLE, generator=generator),
        torch.randint(3, (size,), generator=generator),
    )


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


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 0.0) -> None:
    """Tensors of the same names, equal to the bit or relative to each one's largest element."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(found[name], tensor, rtol)


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
