"""What the tests of feed-forward networks share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tpext.nn import TargetLinear

DOUBLE = torch.float64


def published(file: str) -> dict[str, Tensor]:
    arrays = np.load(Path(__file__).parent / "data" / file)
    return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def assert_equal(actual: Tensor | None, expected: Tensor, rtol: float = 1e-9) -> None:
    """Equal relative to the largest element."""
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def keep_outputs(net: nn.Module) -> list[Tensor]:
    """The outputs of the layers, with their gradients after a backward pass."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for module in net.modules():
        if isinstance(module, TargetLinear):
            module.register_forward_hook(keep)
    return outputs
