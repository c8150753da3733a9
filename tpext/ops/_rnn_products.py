"""What of a recurrent layer is large products of matrices: torch's, on any device and of every derivative.

The layer's ops take them where no kernel of ours does the same: on CUDA, and where a derivative is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tpext.ops._library import LOW_PRECISION, check_tensor, compute_dtype
from tpext.ops._recurrent_steps import at_last_valid, directions, of_run, valid_steps


def input_projection(input: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """What the input adds to each pre-activation: ``x_proj[s, t] = input[s, t] weight_ih[s]' + bias[s]``.

    Args:
        input: ``[S or 1, T, B, I]``, of each member or shared by all.
        weight_ih: ``[S, H, I]``.
        bias: ``[S, H]`` or None.

    Returns:
        ``x_proj [S, T, B, H]``.
    """
    check_tensor("input_projection", "input", input, "[S or 1, T, B, I]")
    check_tensor("input_projection", "weight_ih", weight_ih, "[S, H, I]")
    if bias is not None:
        check_tensor("input_projection", "bias", bias, "[S, H]")
    _, time, batch, _ = input.shape
    stack, hidden, _ = weight_ih.shape
    rows = input.flatten(1, 2).expand(stack, -1, -1)
    weight = weight_ih.mT
    projected = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return projected.view(stack, time, batch, hidden)


def projected_run(
    input: Tensor, weight_ih: Tensor, bias: Tensor | None, lengths: Tensor | None, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor | None]:
    """``input_projection`` and which steps are valid (None: all), of each member in the order of its run."""
    valid = None
    if lengths is not None:
        valid = valid_steps(lengths, input.shape[1])
        # The padding may hold NaN, which times the zeros of its gradient is no zero.
        input = torch.where(valid, input, 0)
        valid = of_run(valid.expand(weight_ih.shape[0], -1, -1, -1), reverse)
    return of_run(input_projection(input, weight_ih, bias), reverse), valid


def input_gradient(rows: Tensor, matrix: Tensor, scale: float, input: Tensor) -> Tensor:
    """``scale rows[s, t] matrix[s]``, the gradient of ``input [S or 1, T, B, I]``: members that share one add to it.

    Args:
        rows: ``[S, T, B, N]``.
        matrix: ``[S, N, I]``.
    """
    of_member = torch.bmm(rows.flatten(1, 2), matrix if scale == 1 else matrix * scale)
    gradient = of_member.view(rows.shape[0], *input.shape[1:])
    return gradient if input.shape[0] == rows.shape[0] else gradient.sum(0, keepdim=True)


class WeightSums(NamedTuple):
    """The arguments of ``rnn_weight_gradients``; of gates delta is ``[S, T, B, G H]``."""

    delta: Tensor
    states: Tensor
    h0: Tensor
    input: Tensor
    lengths: Tensor | None
    reverse: Sequence[bool]
    scale: float


def weight_gradients(call: WeightSums, needs: Sequence[bool] = (True, True, True)) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight_ih, weight_hh and bias, as ``rnn_weight_gradients`` defines them; empty where not needed."""
    delta, input, lengths = call.delta, call.input, call.lengths

    def scaled(gradient: Tensor) -> Tensor:
        return (gradient if call.scale == 1 else gradient * call.scale).to(delta.dtype)

    du, dw, db = (delta.new_empty(0) for _ in needs)
    if needs[0]:
        if lengths is not None:
            # The padding may hold NaN, which times the zeros of delta is no zero.
            input = torch.where(valid_steps(lengths, input.shape[1]), input, 0)
        rows = input.flatten(1, 2).expand(delta.shape[0], -1, -1)
        du = scaled(_sum_over_rows(delta.flatten(1, 2), rows))
    if needs[1]:
        dw = scaled(recurrent_weight_gradient(delta, call.states, call.h0, lengths, call.reverse))
    if needs[2]:
        db = scaled(delta.sum((1, 2), dtype=compute_dtype(delta)))
    return du, dw, db


def recurrent_weight_gradient(
    delta: Tensor, states: Tensor, h0: Tensor, lengths: Tensor | None, reverse: Sequence[bool]
) -> Tensor:
    """Gradient of the recurrent weights, ``sum_t delta_t' h_{t-1}``, by large products, at least in float32.

    Args:
        delta: ``[S, T, B, N]`` gradient with respect to the pre-activations, zero beyond ``lengths``.
        states: ``[S, T, B, H]``.
        h0: ``[S, B, H]``.
        lengths: ``[B]`` valid steps, or None for all T.
        reverse: S flags: the member runs from the last valid step to the first.

    Returns:
        ``[S, N, H]``.
    """
    if delta.shape[0] == 0 or delta.shape[1] == 0:
        return delta.new_zeros(h0.shape[0], delta.shape[3], h0.shape[2])
    gradients = []
    for members, backwards in directions(reverse):
        d, h = delta[members], states[members]
        if not backwards:
            first, later, before = d[:, 0], d[:, 1:], h[:, :-1]
        else:
            later, before = d[:, :-1], h[:, 1:]
            first = d[:, -1] if lengths is None else at_last_valid(d, lengths)
        # Beyond a row's length both delta and the state are zero, so padding adds nothing here.
        over_time = _sum_over_rows(later.flatten(1, 2), before.flatten(1, 2))
        gradients.append(over_time + _bmm(first.mT, h0[members]))
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients)


# Rows that one product of a long sum takes, and the size of a result from which on none is cut.
_CHUNK = 2048
_LARGE = 512 * 512


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left[s]' right[s]`` of each member, ``[S, R, M]`` and ``[S, R, N]`` to ``[S, M, N]``, at least in float32.

    A small result of a long sum would keep few of a GPU's multiprocessors busy: hundreds of thousands of rows, and a
    tile or two of 128 x 128. So the rows go in chunks, as one batch of products, whose results are then added. Where
    they are cut depends on sizes alone, so that the bits of the result do too.
    """
    chunks = left.shape[1] // _CHUNK
    if chunks < 2 or left.shape[2] * right.shape[2] >= _LARGE:
        return _bmm(left.mT, right)
    cut = chunks * _CHUNK
    sums = []
    for a, b in zip(left, right, strict=True):
        chunked_a, chunked_b = (rows[:cut].unflatten(0, (chunks, _CHUNK)) for rows in (a, b))
        parts = _bmm(chunked_a.mT, chunked_b)
        sums.append(parts.sum(0) + _bmm(a[None, cut:].mT, b[None, cut:])[0])
    return torch.stack(sums)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm``, of 16-bit factors in float32: a sum that is made of several must not be rounded in between."""
    if left.dtype not in LOW_PRECISION:
        return torch.bmm(left, right)
    if left.is_cuda and torch.__version__ >= "2.8" and not torch.is_grad_enabled():
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
