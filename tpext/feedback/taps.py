"""A convolution's weight gradient as a matrix product for each tap of its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Ranges: TypeAlias = Sequence[tuple[slice, slice]]
"""For each tap along one dimension the outputs that have it inside the image, and their inputs."""


def range_inside(offset: int, stride: int, size: int, count: int) -> tuple[slice, slice]:
    """Return which ``i`` of ``0 .. count - 1`` have ``i * stride + offset`` in ``0 .. size - 1``, and these places."""
    first = max(0, -(offset // stride))
    stop = max(first, min(count, (size - 1 - offset) // stride + 1))
    start = first * stride + offset
    return slice(first, stop), slice(start, start + (stop - first) * stride, stride)


def gradient_by_taps(inputs: Tensor, outputs: Tensor, rows: Ranges, columns: Ranges) -> Tensor:
    """Return for each tap the product of outputs and inputs, ``[D, C, k, k]`` in the memory format channels_last.

    Args:
        inputs: ``[B, H, W, C]``.
        outputs: ``[B, H', W', D]``.
        rows, columns: which go together.
    """
    # a product writes rows of this
    result = outputs.new_empty(outputs.shape[-1], len(rows), len(columns), inputs.shape[-1])
    for i, (out_rows, in_rows) in enumerate(rows):
        for j, (out_columns, in_columns) in enumerate(columns):
            left = outputs[:, out_rows, out_columns].reshape(-1, outputs.shape[-1])
            right = inputs[:, in_rows, in_columns].reshape(-1, inputs.shape[-1])
            torch.mm(left.mT, right, out=result[:, i, j])
    return result.movedim(-1, 1)
