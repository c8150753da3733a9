"""A convolution as a matrix product for each tap of its kernel, of the positions whose tap is inside the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


def inside(offset: int, stride: int, size: int, count: int) -> tuple[slice, slice]:
    """Return which ``i`` of ``0 .. count - 1`` have ``i * stride + offset`` in ``0 .. size - 1``, and these places."""
    first = max(0, -(offset // stride))
    stop = max(first, min(count, (size - 1 - offset) // stride + 1))
    start = first * stride + offset
    return slice(first, stop), slice(start, start + (stop - first) * stride, stride)


Ranges = Sequence[tuple[slice, slice]]
"""For each tap along one dimension the outputs that have it inside the image, and their inputs."""


def weight_gradient(inputs: Tensor, outputs: Tensor, rows: Ranges, columns: Ranges) -> Tensor:
    """Return for each tap the product of outputs and inputs, ``[D, C, k, k]`` in the memory format channels_last.

    Args:
        inputs: ``[B, H, W, C]``.
        outputs: ``[B, H', W', D]``.
        rows, columns: which go together.
    """
    size = outputs.shape[-1], inputs.shape[-1], len(rows), len(columns)
    # channels last, so that each product writes rows of the result
    result = outputs.new_empty(size).contiguous(memory_format=torch.channels_last).permute(2, 3, 0, 1)
    for i, (out_rows, in_rows) in enumerate(rows):
        for j, (out_columns, in_columns) in enumerate(columns):
            left = outputs[:, out_rows, out_columns].reshape(-1, outputs.shape[-1])
            right = inputs[:, in_rows, in_columns].reshape(-1, inputs.shape[-1])
            torch.mm(left.mT, right, out=result[i, j])
    return result.permute(2, 3, 0, 1)


class PixelGrid(NamedTuple):
    """Of every ``k x k`` pixels before a convolution of stride 1 one, at one of its places.

    Each output then sees one pixel only. So what a draw of noise on the grid costs, ``L dx`` and the gradient of the
    weight, are dense products over one in ``k^2`` pixels. Times the number of places that gradient has the mean, over
    all of them, that noise on all pixels has, and less noise in it from other pixels in reach.

    Attributes:
        kernel, padding: of the convolution ``[C, H, W] -> [D, H', W']``, in rows and columns.
        input_size, output_size: ``(H, W)`` and ``(H', W')``.
        first: row and column of the first pixel.
    """

    kernel: tuple[int, int]
    padding: tuple[int, int]
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    first: tuple[int, int] = (0, 0)

    @property
    def places(self) -> int:
        """In how many places the grid can be: each pixel is in one of them."""
        return min(self.kernel[0], self.input_size[0]) * min(self.kernel[1], self.input_size[1])

    def at(self, number: int) -> PixelGrid:
        """Return the grid at its place ``number``, counted around."""
        return self._replace(first=divmod(number % self.places, min(self.kernel[1], self.input_size[1])))

    def pixels(self, input: Tensor) -> Tensor:
        """Return the grid's pixels of ``[B, C, H, W]`` as ``[B, n, m, C]``."""
        (row, column), (height, width) = self.first, self.kernel
        return input[:, :, row::height, column::width].movedim(1, -1)

    def _ranges(self, dim: int, count: int) -> list[tuple[slice, slice]]:
        """For each tap along a dimension the outputs of the ``count`` pixels, and these."""
        kernel, first = self.kernel[dim], self.first[dim] + self.padding[dim]
        found = [inside(first - tap, kernel, self.output_size[dim], count) for tap in range(kernel)]
        return [(outputs, pixels) for pixels, outputs in found]

    def map(self, taps: Tensor, noise: Tensor) -> Tensor:
        """Return the convolution, without bias, of pixels between zeros: ``[B, D, H', W']``.

        Args:
            taps: its weight as ``[k, k, D, C]``.
            noise: the pixels ``[B, n, m, C]``.
        """
        result = noise.new_zeros(len(noise), taps.shape[2], *self.output_size)
        by_channel, columns = noise.movedim(-1, 0), self._ranges(1, noise.shape[2])
        for i, (out_rows, in_rows) in enumerate(self._ranges(0, noise.shape[1])):
            for j, (out_columns, in_columns) in enumerate(columns):
                taken = by_channel[:, :, in_rows, in_columns]
                moved = (taps[i, j] @ taken.flatten(1)).view(len(taps[i, j]), *taken.shape[1:])
                result[:, :, out_rows, out_columns] = moved.movedim(1, 0)
        return result

    def weight_gradient(self, noise: Tensor, features: Tensor) -> Tensor:
        """Return the gradient of ``<noise, W^T f>``, summed over the batch, for ``W [D, C, k, k]``.

        Args:
            noise: the pixels ``[B, n, m, C]``.
            features: ``f [B, D, H', W']``.
        """
        rows, columns = self._ranges(0, noise.shape[1]), self._ranges(1, noise.shape[2])
        return weight_gradient(noise, features.movedim(1, -1), rows, columns)


def pixel_grid(module: nn.Module, input_size: Sequence[int], output_size: Sequence[int]) -> PixelGrid | None:
    """Return the grid of a convolution between images of these sizes.

    None for anything but a ``Conv2d`` of stride 1 without dilation and groups.
    """
    if not isinstance(module, nn.Conv2d) or (module.stride, module.dilation, module.groups) != ((1, 1), (1, 1), 1):
        return None
    both = module._reversed_padding_repeated_twice
    (kernel_height, kernel_width), (height, width), (out_height, out_width) = (
        module.kernel_size,
        input_size,
        output_size,
    )
    return PixelGrid((kernel_height, kernel_width), (both[2], both[0]), (height, width), (out_height, out_width))
