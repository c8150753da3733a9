"""``counter_normal``: normal noise that is a function of its place in a sequence, not of what was drawn before.

Row ``b`` of ``counter_normal([B, ...], seed, step, stream, first_row)`` depends on ``(seed, step, stream, first_row +
b)`` alone: the order of calls, threads, the split of a batch into parts and the ranks of a distributed run change no
bit of it. Elements ``4 g .. 4 g + 3`` of a row, counted over all its axes, come of the four 32-bit words of
Philox4x32-10 at::

    key = (seed mod 2^32, seed div 2^32)      counter = (g, first_row + b, stream, step)

by two Box-Muller pairs, words 0 and 1 and words 2 and 3. Of words ``w, w'``::

    r = sqrt(-2 log((w + 1) / 2^32))      r cos(2 pi w' / 2^32), r sin(2 pi w' / 2^32)

The logarithm's argument is never zero, so numbers end at 6.66. Float64 computes the same from the same words: the two
precisions agree to float32's rounding, the instruction sets and CUDA to rounding.

``torch.ops.tpext.counter_normal(like, shape, seed, step, stream, scale, first_row)`` takes dtype and device from a
tensor. It has no derivative. Under autocast it stays float32.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Box and Muller (1958).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    define,
    dense,
    dtype_name,
    execution,
    is_integer,
    is_number,
    refuse_derivative,
    refuse_forward_mode,
)

_WORDS = 2**32


def check_counter(op: str, seed: int, step: int, stream: int, first_row: int, rows: int, columns: int) -> None:
    """Raise ValueError unless the counter and ``rows`` rows of ``columns`` numbers fit Philox's words."""
    for name, value, end, text in (
        ("seed", seed, 2**63, "2^63"),
        ("step", step, _WORDS, "2^32"),
        ("stream", stream, _WORDS, "2^32"),
        ("first_row", first_row, _WORDS, "2^32"),
    ):
        if not (is_integer(value) or isinstance(value, torch.SymInt)):
            raise ValueError(f"{op}: {name} must be an integer, got {value!r}")
        if not 0 <= value < end:
            raise ValueError(f"{op}: {name} must lie in [0, {text}), got {value}")
    if first_row + rows > _WORDS:
        raise ValueError(f"{op}: first_row + B must be at most 2^32, got {first_row} + {rows}")
    if columns > 4 * _WORDS:
        raise ValueError(f"{op}: a row must have at most 2^34 numbers, got {columns}")


def _fake(
    like: Tensor, shape: Sequence[int], seed: int, step: int, stream: int, scale: float, first_row: int
) -> Tensor:
    """Check the arguments and return an empty output."""
    op = "counter_normal"
    refuse_forward_mode(op, "it has no derivative")
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: dtype must be float32 or float64, got {dtype_name(like.dtype)}")
    if len(shape) == 0 or any(size < 0 for size in shape):
        raise ValueError(f"{op}: shape must be [B, ...] of sizes >= 0, got {list(shape)}")
    if not is_number(scale) or not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be a finite number, got {scale!r}")
    check_counter(op, seed, step, stream, first_row, shape[0], math.prod(shape[1:]))
    return like.new_empty(shape)


def _counter_normal(
    like: Tensor, shape: Sequence[int], seed: int, step: int, stream: int, scale: float, first_row: int
) -> Tensor:
    output = _fake(like, shape, seed, step, stream, scale, first_row)
    if output.numel():
        rows = output.view(output.shape[0], -1)
        _C.counter_normal(dense(rows), seed, step, stream, first_row, scale, execution(output))
    return output


_noise = define(
    "counter_normal(Tensor like, SymInt[] shape, SymInt seed, SymInt step, SymInt stream, float scale, "
    "SymInt first_row) -> Tensor",
    _counter_normal,
    _fake,
    cast_outputs=False,
)
refuse_derivative("counter_normal", "counter_normal: noise has no derivative; detach what it is made like")


def counter_normal(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    stream: int,
    scale: float = 1.0,
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal noise, ``scale`` times standard, whose row ``b`` depends on ``(seed, step, stream, first_row + b)`` alone.

    Args:
        shape: ``[B, ...]``.
        seed: of the run, in ``[0, 2^63)``.
        step: of training, in ``[0, 2^32)``.
        stream: which of the noises of a step, in ``[0, 2^32)``.
        scale: standard deviation.
        first_row: number of the first row in the whole batch, for a part of it; ``first_row + B <= 2^32``.
        dtype: float32 or float64.
        device: CPU or CUDA.

    Returns:
        ``[B, ...]``.

    Raises:
        ValueError: an argument out of range; the message names it.

    Cost: some 20 operations an element and one pass over the output.

    Source: the module's head.

    >>> import torch, tpext
    >>> whole = tpext.ops.counter_normal([4, 3], seed=7, step=0, stream=1)
    >>> part = tpext.ops.counter_normal([2, 3], seed=7, step=0, stream=1, first_row=2)
    >>> torch.equal(whole[2:], part)
    True
    """
    like = torch.empty((), dtype=dtype, device=device)
    return _noise(like, shape, seed, step, stream, scale, first_row)  # type: ignore[no-any-return]
