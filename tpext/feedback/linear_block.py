"""Blocks that begin with a linear map: what the fast ways of training their feedback compute with.

Such a block and its feedback are ``F(x) = psi(z)``, ``z = L x + b``, and ``G(y) = W^T phi(y) + c``; ``psi`` is an
activation, with or without pooling, ``phi`` the feedback of that. So changes need one product only: ``F(x + dx)`` is
``psi(z + L dx)``, and ``G(y') - G(y)`` is ``W^T (phi(y') - phi(y))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tpext.feedback.base import BlockCall, Code, Feedback, Indices, Step, Window
from tpext.feedback.linear_map import LinearCode, LinearMap
from tpext.feedback.modules import IdentityFeedback
from tpext.ops.pooled_difference import code_difference


class Slopes(NamedTuple):
    """Slopes of a block at a sample's feature positions, ``[B, *features]``: zero where no feedback arrives.

    Attributes:
        feedback: ``s_G``, that of ``phi`` at the block's output.
        both: ``s_F s_G``, that of ``phi`` after ``psi``.
    """

    feedback: Tensor
    both: Tensor


class Fused(NamedTuple):
    """An activation and a max-pooling (or none), as :func:`tpext.ops.code_difference` takes them."""

    activation: str
    alpha: float
    window: Window | None
    indices: Tensor | None

    def options(self) -> dict[str, Any]:
        """Return the kernels' arguments."""
        size, stride, padding = self.window or (0, 0, 0)
        options = {"kernel": size, "stride": stride, "padding": padding}
        return {"activation": self.activation, "alpha": self.alpha, **(options if size else {})}


class LinearBlock(NamedTuple):
    """A block of this form in one forward pass.

    Attributes:
        module: ``L``, a linear layer or a convolution.
        head: its feedback, which has ``W``.
        views: what changes the input's shape before ``L``.
        tail: ``psi`` and ``phi``, module by module.
        input: of the block.
        input_shape: of ``L``'s input, without the batch.
        preactivation: ``z``.
        output: ``y``.
    """

    module: nn.Module
    head: LinearMap
    views: Sequence[Step]
    tail: Sequence[Step]
    input: Tensor
    input_shape: torch.Size
    preactivation: Tensor
    output: Tensor

    @property
    def elementwise(self) -> bool:
        """Whether ``phi`` and ``phi psi`` are diagonal, so that slopes say all of them near the clean pass."""
        return all(step.feedback.elementwise for step in self.tail)

    def view(self, input: Tensor) -> Tensor:
        """Return something in the shape of the block's input in that of ``L``'s input."""
        for step in self.views:
            input = step.module(input)
        return input

    def psi(self, preactivation: Tensor) -> tuple[Tensor, list[Code]]:
        """Return ``psi`` of noisy pre-activations, and the code of that pass."""
        codes = []
        for step in self.tail:
            preactivation, code = step.feedback.encode(step.module, preactivation, step.code)
            codes.append(code)
        return preactivation, codes

    def phi(self, output: Tensor, codes: Sequence[Code] | None = None) -> Tensor:
        """Return ``phi(y)``, by the codes of the clean pass or by others."""
        codes = [step.code for step in self.tail] if codes is None else codes
        for step, code in zip(reversed(self.tail), reversed(codes), strict=True):
            output = step.feedback(output, code)
        return output

    def input_change(self, noise: Tensor, indices: Indices) -> Tensor:
        """Return ``A' - A = phi(psi(z + L dx)) - phi(y)`` for draws of noise.

        Args:
            noise: ``dx [K, B, ...]``, in the shape of ``L``'s input.
            indices: places of maxima of ``A'``, those of the "noisy" or of the "clean" pass.

        Returns:
            ``[K, B, *features]``.
        """
        change = self.head.block_map(self.module, noise.flatten(0, 1))
        change = change.view(*noise.shape[:2], *self.preactivation.shape[1:])
        fused = self.fused
        if fused is not None:
            return code_difference(
                self.preactivation, change, self.output, fused.indices, noisy=indices == "noisy", **fused.options()
            )
        clean = self.phi(self.output)
        moved = []
        for one in change:
            output, codes = self.psi(self.preactivation + one)
            moved.append(self.phi(output, codes if indices == "noisy" else None) - clean)
        return torch.stack(moved)

    def output_change(self, noise: Tensor) -> Tensor:
        """Return ``A'' - A = phi(y + dy) - phi(y)`` for noise ``dy [B, ...]``."""
        return self.phi(self.output + noise) - self.phi(self.output)

    @property
    def fused(self) -> Fused | None:
        """What follows ``L`` as the kernels know it: an activation, or none, and a max-pooling, or none."""
        steps = [step for step in self.tail if not isinstance(step.feedback, IdentityFeedback)]
        activation: tuple[str, float] = ("identity", 1.0)
        if steps and steps[0].feedback.kernel is not None:
            activation = steps.pop(0).feedback.kernel or activation
        if not steps:
            return Fused(*activation, None, None)
        window, code = steps[0].feedback.window, steps[0].code
        if len(steps) > 1 or window is None:
            return None
        return Fused(*activation, window, code.indices)

    def slopes(self) -> Slopes:
        """Return the slopes at the clean pass; needs :attr:`elementwise`."""
        feedback = torch.func.jvp(self.phi, (self.output,), (torch.ones_like(self.output),))[1]
        # a diagonal matrix is its own transpose
        with torch.enable_grad():
            at = self.preactivation.detach().requires_grad_()
            output = at
            for step in self.tail:
                output, _ = step.feedback.encode(step.module, output, step.code)
            (both,) = torch.autograd.grad(self.phi(output).sum(), at)
        return Slopes(feedback, both)


def linear_block(call: BlockCall) -> LinearBlock | None:
    """Return a block's call in this form, None if it has another."""
    if call.feedback is None:
        return None
    steps = linear_steps(call.block, call.feedback, call.code)
    if steps is None:
        return None
    views, (module, head, code), tail = steps
    assert isinstance(head, LinearMap)
    assert isinstance(code, LinearCode)
    return LinearBlock(module, head, views, tail, call.input, code.input_shape, code.preactivation, call.output)


def linear_steps(
    block: nn.Module, feedback: Feedback, code: Code | None = None
) -> tuple[list[Step], Step, list[Step]] | None:
    """Return what a block does before its linear map, the map, and what comes after; None without one at the start."""
    steps = feedback.steps(block, code)
    start = next((index for index, step in enumerate(steps) if not step.feedback.is_view), len(steps))
    if start == len(steps) or not isinstance(steps[start].feedback, LinearMap):
        return None
    # what has parameters of its own needs their gradients too
    if any(True for step in steps[start + 1 :] for _ in step.feedback.parameters()):
        return None
    return steps[:start], steps[start], steps[start + 1 :]


# Draws of noise are taken together up to this many numbers, so that small layers fill the cores and large ones stay in
# the cache.
DRAWN_TOGETHER = 2**19


def input_changes(
    block: LinearBlock, noise: Callable[[int], Tensor], draws: int, indices: Indices
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``dx`` and ``A' - A`` (:meth:`LinearBlock.input_change`) of one draw after another.

    Args:
        noise: returns ``dx`` of a draw, of the shape of the block's input.
        draws: how many.
    """
    together = max(1, DRAWN_TOGETHER // max(1, block.input.numel(), block.preactivation.numel()))
    for start in range(0, draws, together):
        drawn = torch.stack([block.view(noise(draw)) for draw in range(start, min(start + together, draws))])
        yield from zip(drawn, block.input_change(drawn, indices), strict=True)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors put together along the batch."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def feedback_power(block: LinearBlock) -> Tensor:
    """Return ``D = sum_b s_G^2`` over the features that an element of ``W`` acts on, so that it broadcasts to ``W``."""
    return block.head.sum_over_uses(block.slopes().feedback.square().sum(0), block.input_shape)
