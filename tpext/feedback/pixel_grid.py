"""Noise on a grid of pixels before a convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tpext.feedback.taps import gradient_by_taps, range_inside


class PixelGrid(NamedTuple):
    """Of every ``k x k`` pixels before a convolution of stride 1 one, at one of its places.

    Each output then sees one pixel only. So what a draw of noise on the grid costs, ``L dx`` and the gradient of the
    weight, are dense products over one in ``k^2`` pixels. Noise of ``k`` times the standard deviation on the grid at
    all places in turn has the covariance of noise on all pixels, so for small noise the gradient has the same mean.

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
        """In how many places the grid can be: each pixel is in one of them. Mostly ``k^2``."""
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
        found = [range_inside(first - tap, kernel, self.output_size[dim], count) for tap in range(kernel)]
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
        return gradient_by_taps(noise, features.movedim(1, -1), rows, columns)
