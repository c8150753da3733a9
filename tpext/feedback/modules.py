"""The feedback of activations, pools, normalisations, shapes and sequences."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import batchnorm, pooling

from tpext.feedback.base import Code, Feedback, Step, Window, find_builder, make_feedback, register_feedback
from tpext.ops.pooled_difference import max_unpool

_KERNELS: dict[type[nn.Module], str] = {nn.ELU: "elu", nn.ReLU: "relu", nn.Tanh: "tanh"}
"""The activations that the fused kernels know."""


class ActivationFeedback(Feedback):
    """The feedback of an activation: the same activation once more, as published, not its inverse function.

    Attributes:
        skipped: True makes the feedback the identity, see :class:`LayeredFeedback`.
    """

    elementwise = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.skipped = False
        activation: Any = copy.deepcopy(block)
        if hasattr(activation, "inplace"):
            activation.inplace = False
        self.activation: nn.Module = activation
        if type(block) in _KERNELS:
            self.kernel = _KERNELS[type(block)], float(getattr(block, "alpha", 1.0))

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, Code]:
        if type(block) is not type(self.activation):
            raise ValueError(
                f"ActivationFeedback: block must be {type(self.activation).__name__}, of which it was made, got "
                f"{type(block).__name__}; make the network anew with it"
            )
        # in place it would overwrite the code of the module before
        return block(input.clone() if getattr(block, "inplace", False) else input), None

    def forward(self, output: Tensor, code: Code) -> Tensor:
        return output if self.skipped else self.activation(output)


class PoolCode(NamedTuple):
    """The code of a max-pooling: where the maxima are in the flattened plane, and the size of that plane."""

    indices: Tensor
    plane: torch.Size


class UnpoolFeedback(Feedback):
    """The feedback of a max-pooling: each value goes back to where its maximum was, all else is zero.

    Where windows overlap, one place may be the maximum of several. It gets the value of the last of them in raster
    order, on every device.
    """

    elementwise = True

    def __init__(self, block: pooling._MaxPoolNd) -> None:
        super().__init__()
        if block.return_indices:
            raise ValueError(f"make_feedback: {block} must have return_indices=False, got True")
        sizes = list(zip(*map(_each, (block.kernel_size, block.stride, block.padding, block.dilation)), strict=False))
        self.overlapping = any(kernel > stride or dilation > 1 for kernel, stride, _, dilation in sizes)
        # what the kernels know: square windows in a plane
        if isinstance(block, nn.MaxPool2d) and len({*sizes[:2]}) == 1 and sizes[0][3] == 1 and not block.ceil_mode:
            self.window = Window(*sizes[0][:3])

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, PoolCode]:
        assert isinstance(block, pooling._MaxPoolNd)
        dims = 1 if isinstance(block, nn.MaxPool1d) else 2 if isinstance(block, nn.MaxPool2d) else 3
        pool: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[dims - 1]
        window = (block.kernel_size, block.stride, block.padding, block.dilation, block.ceil_mode)
        output, indices = pool(input, *window, return_indices=True)
        return output, PoolCode(indices, input.shape[2:])

    def forward(self, output: Tensor, code: PoolCode) -> Tensor:
        # a plane of any number of dimensions as one of two
        values, indices = output.flatten(2)[:, :, None], code.indices.flatten(2)[:, :, None]
        flat = max_unpool(values, indices, 1, code.plane.numel(), overlapping=self.overlapping)
        return flat.view(*output.shape[:2], *code.plane)


class UpsampleFeedback(Feedback):
    """The feedback of an average pooling: adaptive average pooling up to the input's size, which repeats values."""

    is_linear = True

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, torch.Size]:
        return block(input), input.shape[2:]

    def forward(self, output: Tensor, code: torch.Size) -> Tensor:
        pool = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
        result: Tensor = pool[len(code) - 1](output, list(code))  # type: ignore[arg-type]
        return result

    def difference(self, output: Tensor, displacement: Tensor, code: Code) -> Tensor:
        return self(displacement, code)  # type: ignore[no-any-return]


class ReshapeFeedback(Feedback):
    """The feedback of a module that only changes the shape of a sample: the shape back."""

    elementwise = True
    is_view = True
    is_linear = True

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, torch.Size]:
        return block(input), input.shape[1:]

    def forward(self, output: Tensor, code: torch.Size) -> Tensor:
        return output.reshape(-1, *code)

    def difference(self, output: Tensor, displacement: Tensor, code: Code) -> Tensor:
        return self(displacement, code)  # type: ignore[no-any-return]


class BatchNormFeedback(Feedback):
    """The feedback of a batch normalisation: one of its own, by the statistics of the batch; it has no running ones.

    A noisy pass through the block takes that batch's statistics too, but leaves the running ones alone. So targets need
    more than one value a channel, in evaluation mode too.
    """

    def __init__(self, block: batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = block.eps
        self.weight = None if block.weight is None else nn.Parameter(torch.ones_like(block.weight))
        self.bias = None if block.bias is None else nn.Parameter(torch.zeros_like(block.bias))

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, Code]:
        assert isinstance(block, batchnorm._BatchNorm)
        if clean is None or not block.training:
            return block(input), True
        return functional.batch_norm(input, None, None, block.weight, block.bias, True, 0.0, block.eps), True

    def forward(self, output: Tensor, code: Code) -> Tensor:
        if output.numel() == output.shape[1]:
            raise ValueError(
                "BatchNormFeedback: output must have more than one value a channel, as feedback is normalised by the "
                f"batch in evaluation mode too, got {list(output.shape)}"
            )
        return functional.batch_norm(output, None, None, self.weight, self.bias, True, 0.0, self.eps)


class DropoutFeedback(Feedback):
    """The feedback of dropout: multiplication by the same mask, which noisy passes share too."""

    elementwise = True
    is_linear = True

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, Tensor]:
        mask = block(torch.ones_like(input)) if clean is None else clean
        return input * mask, mask

    def forward(self, output: Tensor, code: Tensor) -> Tensor:
        return output * code

    def difference(self, output: Tensor, displacement: Tensor, code: Code) -> Tensor:
        return self(displacement, code)  # type: ignore[no-any-return]


class IdentityFeedback(Feedback):
    """The feedback of the identity."""

    elementwise = True
    is_view = True
    is_linear = True

    def forward(self, output: Tensor, code: Code) -> Tensor:
        return output

    def difference(self, output: Tensor, displacement: Tensor, code: Code) -> Tensor:
        return self(displacement, code)  # type: ignore[no-any-return]


class SequentialFeedback(Feedback):
    """The feedback of ``torch.nn.Sequential``: that of each of its modules, the last one first, by the same names."""

    def __init__(self, block: nn.Sequential) -> None:
        super().__init__()
        made = [(name, make_feedback(module)) for name, module in _children(block)]
        self.parts = nn.ModuleDict(OrderedDict(reversed(made)))
        self.elementwise = all(part.elementwise for _, part in made)
        self.is_linear = all(part.is_linear for _, part in made)

    def pairs(self, block: nn.Module) -> list[tuple[nn.Module, Feedback]]:
        """Return the modules of the block with their feedback, the first one first."""
        return [(module, self.parts[name]) for name, module in _children(block)]  # type: ignore[misc]

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, tuple[Code, ...]]:
        codes = []
        for index, (module, part) in enumerate(self.pairs(block)):
            input, code = part.encode(module, input, None if clean is None else clean[index])
            codes.append(code)
        return input, tuple(codes)

    def forward(self, output: Tensor, code: tuple[Code, ...]) -> Tensor:
        for part, known in zip(self.parts.values(), reversed(code), strict=True):
            output = part(output, known)
        return output

    def difference(self, output: Tensor, displacement: Tensor, code: tuple[Code, ...]) -> Tensor:
        parts = list(zip(self.parts.values(), reversed(code), strict=True))
        # from here on all is linear: the difference goes on alone
        nonlinear = max([0, *(index + 1 for index, (part, _) in enumerate(parts) if not part.is_linear)])
        if nonlinear:
            moved = output + displacement
            for part, known in parts[:nonlinear]:
                output, moved = part(output, known), part(moved, known)
            displacement = moved - output
        for part, known in parts[nonlinear:]:
            displacement = part.difference(displacement, displacement, known)  # type: ignore[operator]
        return displacement

    def steps(self, block: nn.Module, code: tuple[Code, ...] | None = None) -> list[Step]:
        codes = [None] * len(self.parts) if code is None else code
        return [
            step
            for (module, part), known in zip(self.pairs(block), codes, strict=True)
            for step in part.steps(module, known)
        ]

    def copy_weights(self, block: nn.Module) -> None:
        for module, part in self.pairs(block):
            part.copy_weights(module)

    def tie(self, block: nn.Module) -> None:
        for module, part in self.pairs(block):
            part.tie(module)


class LayeredFeedback(Feedback):
    """The feedback ``G(y) = a(W^T y + b)``, ``a`` the activation of the layer below: see :func:`layered_feedback`."""

    def __init__(self, block: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.mirrored = make_feedback(block)
        self.activation = activation
        for module in self.mirrored.modules():
            if isinstance(module, ActivationFeedback):
                module.skipped = True

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, Code]:
        return self.mirrored.encode(block, input, clean)

    def forward(self, output: Tensor, code: Code) -> Tensor:
        return self.activation(self.mirrored(output, code))  # type: ignore[no-any-return]

    def copy_weights(self, block: nn.Module) -> None:
        self.mirrored.copy_weights(block)

    def tie(self, block: nn.Module) -> None:
        self.mirrored.tie(block)


def layered_feedback(blocks: Sequence[nn.Module]) -> list[Feedback | None]:
    """Return feedback with its activation last, ``G_i(y) = a_{i-1}(W_i^T y + b_i)``, for each block but the first.

    So inverse layers were built before Ernoult et al.: the activation is the one that made the state to reconstruct,
    the last module below but for pools, dropout and changes of shape; there is none where that is another module, a
    linear layer say. Hand the result to ``TargetSequential(feedback=...)``.

    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation", 2015; Meulemans et al., "A Theoretical
    Framework for Target Propagation", NeurIPS 2020.

    >>> import torch
    >>> blocks = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), torch.nn.Linear(3, 2)]
    >>> layered_feedback(blocks)[1].activation
    Tanh()
    """
    made: list[Feedback | None] = [None]
    for index, block in enumerate(blocks[1:], 1):
        made.append(LayeredFeedback(block, _last_activation(blocks[:index])))
    return made


def _last_activation(modules: Iterable[nn.Module]) -> nn.Module:
    """A copy of the activation that made the output of a chain, the identity if another module did."""
    for module in _backwards(modules):
        builder = find_builder(module)
        if isinstance(builder, type) and issubclass(builder, ActivationFeedback):
            return builder(module).activation
        if not isinstance(module, _KEEPERS):
            break
    return nn.Identity()


def _backwards(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules of a chain, those of sequences one by one, the last one first."""
    for module in reversed(list(modules)):
        if find_builder(module) is SequentialFeedback:
            yield from _backwards(module for _, module in _children(module))
        else:
            yield module


def _children(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a sequence in order, one that comes twice twice, which ``named_children`` does not give."""
    return [(name, module) for name, module in block._modules.items() if module is not None]


def _each(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """A size for each of up to three dimensions."""
    return value if isinstance(value, tuple) else (value,) * 3


register_feedback(
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
)(ActivationFeedback)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE_POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_SHAPES = (nn.Flatten, nn.Unflatten)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_KEEPERS = (*_MAX_POOLS, *_AVERAGE_POOLS, *_SHAPES, *_DROPOUTS, nn.Identity)
"""What leaves values in the range of the activation before it, dropout's factor apart."""

register_feedback(*_MAX_POOLS)(UnpoolFeedback)
register_feedback(*_AVERAGE_POOLS)(lambda block: UpsampleFeedback())
register_feedback(*_SHAPES)(lambda block: ReshapeFeedback())
register_feedback(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)(BatchNormFeedback)
register_feedback(*_DROPOUTS)(lambda block: DropoutFeedback())
register_feedback(nn.Identity)(lambda block: IdentityFeedback())
register_feedback(nn.Sequential)(SequentialFeedback)
