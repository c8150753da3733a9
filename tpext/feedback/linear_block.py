"""Blocks that begin with a linear map: what the fast ways of training their feedback compute with.

Such a block and its feedback are ``F(x) = psi(z)``, ``z = L x + b``, and ``G(y) = W^T phi(y) + c``; ``psi`` is an
activation, with or without pooling, ``phi`` the feedback of that. So changes need one product only: ``F(x + dx)`` is
``psi(z + L dx)``, and ``G(y') - G(y)`` is ``W^T (phi(y') - phi(y))``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tpext.feedback.base import BlockCall, Code, Feedback, Indices, Step, Window
from tpext.feedback.linear_map import LinearCode, LinearMap
from tpext.feedback.modules import IdentityFeedback
from tpext.feedback.pixel_grid import PixelGrid
from tpext.ops.pooled_difference import code_difference

Pixels = Literal["all", "grid"]
"""Where noise before a convolution is: on all pixels, or on one of every ``k x k``."""


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

    def code_change(self, change: Tensor, indices: Indices) -> Tensor:
        """Return ``A' - A = phi(psi(z + dz)) - phi(y)``.

        Args:
            change: ``dz = L dx [K, B, *features]`` of K draws of noise.
            indices: places of maxima of ``A'``, those of the "noisy" or of the "clean" pass.

        Returns:
            ``[K, B, *features]``.
        """
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


class Probe(NamedTuple):
    """A draw of noise before a linear map, and by how much it changes the code behind.

    Attributes:
        noise: ``dx [B, ...]`` in the shape of ``L``'s input; of a grid its pixels ``[B, n, m, C]``.
        change: ``A' - A [B, *features]``.
        grid: which pixels; None: all inputs.
    """

    noise: Tensor
    change: Tensor
    grid: PixelGrid | None


# Draws of noise are taken together up to this many numbers, so that small layers fill the cores and large ones stay in
# the cache.
DRAWN_TOGETHER = 2**19


def probes(
    block: LinearBlock,
    noise: Callable[[int, Tensor], Tensor],
    draws: int,
    indices: Indices,
    pixels: Pixels,
    first_place: int,
) -> Iterator[Probe]:
    """Yield one draw of noise after another.

    Args:
        noise: returns the noise of a draw in the shape of a tensor.
        draws: how many.
        indices: see :meth:`LinearBlock.code_change`.
        pixels: "all", or those of a "grid" where ``L`` has one (:meth:`LinearMap.pixel_grid`).
        first_place: of the grid; each draw takes the next.
    """
    grid = None
    if pixels == "grid":
        grid = block.head.pixel_grid(block.input_shape, block.preactivation.shape[1:])
    if grid is not None:
        input = block.view(block.input)
        taps = block.head.transported(block.module).permute(2, 3, 0, 1).contiguous()
        for draw in range(draws):
            placed = grid.at(first_place + draw)
            # at all places together the covariance of noise on all pixels
            drawn = noise(draw, placed.pixels(input)) * math.sqrt(grid.places)
            (change,) = block.code_change(placed.map(taps, drawn)[None], indices)
            yield Probe(drawn, change, placed)
        return
    together = max(1, DRAWN_TOGETHER // max(1, block.input.numel(), block.preactivation.numel()))
    for start in range(0, draws, together):
        numbers = range(start, min(start + together, draws))
        drawn = torch.stack([block.view(noise(draw, block.input)) for draw in numbers])
        moved = block.head.block_map(block.module, drawn.flatten(0, 1))
        changes = block.code_change(moved.view(*drawn.shape[:2], *block.preactivation.shape[1:]), indices)
        yield from (Probe(one, change, None) for one, change in zip(drawn, changes, strict=True))


def correlation(block: LinearBlock, probes: Sequence[Probe], scale: float) -> Tensor:
    """Return ``scale sum wgrad(dx, A' - A)`` over draws of noise."""
    if probes[0].grid is None:
        noise = joined([probe.noise for probe in probes]) * scale
        return block.head.weight_gradient(noise, joined([probe.change for probe in probes]))
    parts = [p.grid.weight_gradient(p.noise * scale, p.change) for p in probes if p.grid is not None]
    return functools.reduce(Tensor.add_, parts)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors put together along the batch."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def feedback_power(block: LinearBlock) -> Tensor:
    """Return ``D = sum_b s_G^2`` over the features that an element of ``W`` acts on, so that it broadcasts to ``W``."""
    return block.head.sum_over_uses(block.slopes().feedback.square().sum(0), block.input_shape)
