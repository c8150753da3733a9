"""The feedback of linear layers and convolutions, and what trainers compute with it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import conv

from tpext.feedback.base import Code, Feedback, register_feedback
from tpext.feedback.pixel_grid import PixelGrid
from tpext.feedback.taps import gradient_by_taps, range_inside

# Up to this many rows and columns of outputs the weight's gradient is a matrix product for each tap. On 4 x 4 and 2 x 2
# that takes half and a quarter of the time of torch's convolution, which multiplies the padding too and fills the cores
# badly there; from 8 x 8 on torch's is faster (Xeon with AVX-512, one thread, 256 channels, 32 samples).
SMALL_PLANE = 4


class LinearCode(NamedTuple):
    """The code of a linear map: its input's shape without the batch, and its output, the pre-activation."""

    input_shape: torch.Size
    preactivation: Tensor


class LinearMap(Feedback):
    """The feedback of a linear map, itself one: ``G(y) = W^T y + b``, ``W`` laid out so that symmetric is ``W = F``.

    Trainers compute with its parts: the maps without bias, in both directions, and the gradient of the weight.

    Attributes:
        weight: ``W``; None where it is tied to the block's.
        bias: ``b``, one a channel of the block's input, or None.
        channel_dims: number of dimensions of the input behind the channel.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    channel_dims: int
    is_linear = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        # In a list the block is no submodule, yet deepcopy and pickle keep the reference.
        self._tied: list[nn.Module] = []

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, LinearCode]:
        output = block(input)
        return output, LinearCode(input.shape[1:], output.detach())

    def forward(self, output: Tensor, code: LinearCode) -> Tensor:
        result = self.map(output, code.input_shape)
        return result if self.bias is None else result + self.bias.reshape(-1, *[1] * self.channel_dims)

    def difference(self, output: Tensor, displacement: Tensor, code: LinearCode) -> Tensor:
        return self.map(displacement, code.input_shape)

    def current_weight(self) -> Tensor:
        """Return ``W``: the parameter, or the tied block's weight."""
        if self.weight is not None:
            return self.weight
        return self.transported(self._tied[0]).detach()

    @torch.no_grad()
    def copy_weights(self, block: nn.Module) -> None:
        if self.weight is not None:
            self.weight.copy_(self.transported(block))
        if self.bias is not None:
            self.bias.zero_()

    def tie(self, block: nn.Module) -> None:
        self.copy_weights(block)
        self.weight = None
        self._tied = [block]

    def arrange(self, output_shape: torch.Size) -> None:
        """Lay the weight out in memory as :meth:`weight_gradient` does its result for outputs of this shape."""

    @property
    def has_pixel_grid(self) -> bool:
        """Whether :meth:`pixel_grid` gives one."""
        return False

    def pixel_grid(self, input_shape: torch.Size, output_shape: torch.Size) -> PixelGrid | None:
        """Return the grid of pixels for noise before the block, shapes without the batch; None where there is none."""
        return None

    @abstractmethod
    def map(self, features: Tensor, input_shape: torch.Size) -> Tensor:
        """Return ``W^T f``, ``[B, *input_shape]``, without the bias."""

    @abstractmethod
    def block_map(self, block: nn.Module, change: Tensor) -> Tensor:
        """Return by how much the block's output changes with its input, without the bias."""

    @abstractmethod
    def weight_gradient(self, grad: Tensor, features: Tensor) -> Tensor:
        """Return the gradient of ``<grad, W^T f>``, summed over the batch, for ``W``."""

    @abstractmethod
    def sum_over_uses(self, per_feature: Tensor, input_shape: torch.Size) -> Tensor:
        """Return for each element of ``W``, so that it broadcasts, the sum over the features that it acts on.

        At the edge of an image some taps of a convolution fall outside; those are not counted.

        Args:
            per_feature: one value a feature, ``[*features]`` without the batch.
            input_shape: of the block's input, without the batch.
        """

    @abstractmethod
    def transported(self, block: nn.Module) -> Tensor:
        """Return the block's weight in the layout of this one's."""


class LinearFeedback(LinearMap):
    """The feedback of ``torch.nn.Linear(N, M)``: ``G(y) = y W^T + b``, ``W [N, M]``, ``b [N]``."""

    channel_dims = 0

    def __init__(self, block: nn.Linear) -> None:
        made = nn.Linear(
            block.out_features,
            block.in_features,
            block.bias is not None,
            device=block.weight.device,
            dtype=block.weight.dtype,
        )
        super().__init__(made.weight.detach(), None if made.bias is None else made.bias.detach())

    def map(self, features: Tensor, input_shape: torch.Size) -> Tensor:
        return functional.linear(features, self.current_weight())

    def block_map(self, block: nn.Module, change: Tensor) -> Tensor:
        return functional.linear(change, _tensor(block.weight))

    def weight_gradient(self, grad: Tensor, features: Tensor) -> Tensor:
        return grad.flatten(0, -2).mT @ features.flatten(0, -2)

    def sum_over_uses(self, per_feature: Tensor, input_shape: torch.Size) -> Tensor:
        return per_feature.reshape(-1, per_feature.shape[-1]).sum(0, keepdim=True)

    def transported(self, block: nn.Module) -> Tensor:
        return _tensor(block.weight).mT


class ConvFeedback(LinearMap):
    """The feedback of a convolution, a transposed one: ``W [C_out, C_in / groups, *kernel]``, ``b [C_in]``.

    Its output has the size that the convolution's input had; for a size that the stride divides this is torch's
    transposed convolution with ``output_padding = stride - 1``.
    """

    def __init__(self, block: conv._ConvNd) -> None:
        if block.padding_mode != "zeros":
            raise ValueError(f"make_feedback: {block} must have padding_mode='zeros', got {block.padding_mode!r}")
        both = block._reversed_padding_repeated_twice
        if isinstance(block.padding, str) and both[::2] != both[1::2]:
            raise ValueError(f"make_feedback: {block} must have the same padding on both sides, got {block.padding!r}")
        weight = torch.empty_like(block.weight)
        # as torch initialises the transposed convolution
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        bias = None
        if block.bias is not None:
            bound = 1 / math.sqrt(weight[0].numel())
            bias = weight.new_empty(block.in_channels).uniform_(-bound, bound)
        super().__init__(weight.detach(), bias)
        self.channel_dims = weight.dim() - 2
        self.stride, self.dilation, self.groups = list(block.stride), list(block.dilation), block.groups
        self.padding = list(both[::-2]) if isinstance(block.padding, str) else list(block.padding)

    def map(self, features: Tensor, input_shape: torch.Size) -> Tensor:
        weight = self.current_weight()
        padding = [
            size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, out, s, p, d, k in zip(
                input_shape[1:],
                features.shape[2:],
                self.stride,
                self.padding,
                self.dilation,
                weight.shape[2:],
                strict=True,
            )
        ]
        return torch.convolution(
            features, weight, None, self.stride, self.padding, self.dilation, True, padding, self.groups
        )

    def _convolve(self, input: Tensor, weight: Tensor) -> Tensor:
        zero = [0] * self.channel_dims
        return torch.convolution(
            input, weight, None, self.stride, self.padding, self.dilation, False, zero, self.groups
        )

    def block_map(self, block: nn.Module, change: Tensor) -> Tensor:
        return self._convolve(change, _tensor(block.weight))

    def _weight_gradient(self, grad: Tensor, features: Tensor, weight: Tensor, groups: int) -> Tensor:
        zero, mask = [0] * self.channel_dims, (False, True, False)
        result: Tensor = torch.ops.aten.convolution_backward(
            features, grad, weight, None, self.stride, self.padding, self.dilation, False, zero, groups, mask
        )[1]
        return result

    def weight_gradient(self, grad: Tensor, features: Tensor) -> Tensor:
        if self._is_small(features.shape[2:]):
            return self._weight_gradient_by_taps(grad, features)
        return self._weight_gradient(grad, features, self.current_weight(), self.groups)

    def _is_small(self, plane: Sequence[int]) -> bool:
        return self.groups == 1 and self.channel_dims == 2 and max(plane) <= SMALL_PLANE

    def arrange(self, output_shape: torch.Size) -> None:
        # the layout of the gradients by taps
        if self.weight is not None and self._is_small(output_shape[1:]):
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    @property
    def has_pixel_grid(self) -> bool:
        return self.groups == 1 and self.stride == self.dilation == [1, 1]

    def pixel_grid(self, input_shape: torch.Size, output_shape: torch.Size) -> PixelGrid | None:
        if not self.has_pixel_grid:
            return None
        height, width = self.current_weight().shape[2:]
        (rows, columns), (above, left) = input_shape[1:], self.padding
        out_rows, out_columns = output_shape[1:]
        return PixelGrid((height, width), (above, left), (rows, columns), (out_rows, out_columns))

    def _weight_gradient_by_taps(self, grad: Tensor, features: Tensor) -> Tensor:
        """The gradient as a product a tap, of the positions whose tap is inside the image."""
        rows, columns = (
            [range_inside(tap * d - p, s, size, out) for tap in range(k)]
            for k, d, p, s, size, out in zip(
                self.current_weight().shape[2:],
                self.dilation,
                self.padding,
                self.stride,
                grad.shape[2:],
                features.shape[2:],
                strict=True,
            )
        )
        inputs, outputs = (tensor.movedim(1, -1).contiguous() for tensor in (grad, features))
        return gradient_by_taps(inputs, outputs, rows, columns)

    def sum_over_uses(self, per_feature: Tensor, input_shape: torch.Size) -> Tensor:
        ones = per_feature.new_ones(1, 1, *input_shape[1:])
        weight = per_feature.new_empty(per_feature.shape[0], 1, *self.current_weight().shape[2:])
        return self._weight_gradient(ones, per_feature[None], weight, 1)

    def transported(self, block: nn.Module) -> Tensor:
        return _tensor(block.weight)


def _tensor(value: Tensor | nn.Module) -> Tensor:
    """The weight of a module, which torch declares as a tensor or a module."""
    assert isinstance(value, Tensor)
    return value.detach()


register_feedback(nn.Linear)(LinearFeedback)
register_feedback(nn.Conv1d, nn.Conv2d, nn.Conv3d)(ConvFeedback)
