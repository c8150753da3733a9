"""``rnn_scan`` and its kin: the recurrence of a simple (Elman) RNN, its back-propagation, its weight gradients.

``torch.ops.tpext.rnn_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)``::

    h_t = a(x_proj_t + h_{t-1} W')          x_proj [S, T, B, H], h0 [S, B, H], W = weight_hh [S, H, H] -> h [S, T, B, H]

``torch.ops.tpext.rnn_scan_backward(grad_states, states, weight_hh, lengths, reverse, nonlinearity, grad_h_n=None)``::

    e_t = (g_t + e_{t+1} W) * a'(h_t)       -> e = dL/dx_proj [S, T, B, H],   dL/dh0 = e_1 W [S, B, H]

``grad_states`` may be None (zero); ``grad_h_n [S, B, H]`` enters at each row's last valid step, as ``e_{T+1} W``.

The layer around the scan, which training steps are made of::

    torch.ops.tpext.rnn_layer(input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity) -> (h, h_n)
    h_t = a(x_t U' + b + h_{t-1} W')        input [T, B, I], U = weight_ih [S, H, I], b = bias [S, H] or None

    torch.ops.tpext.rnn_weight_gradients(delta, states, h0, input, lengths, reverse, scale) -> (dU, dW, db)
    dU = scale sum_t delta_t' x_t,   dW = scale sum_t delta_t' h_{t-1},   db = scale sum_t delta_t

On the CPU the projection of the input is computed inside the scan, and the three gradients are one product with
``[h_{t-1}, x_t, 1]``; neither it nor the projection ever stands in memory. On CUDA they are torch's products, and the
projection ``[S, T, B, H]`` stands in memory during the scan. ``h_n [S, B, H]`` is the state after each row's last valid
step, ``h0`` without one; ``delta`` must be zero beyond ``lengths``. These two have no derivative of their own:
``backprop_rnn``, which is made of them, has, of every order. Where ``grad_states`` is None and the gradient has faded
to nothing, the sweep may end, and does on the CPU; it then does not read the states further back.

``S`` members with weights of their own run side by side (directions, ensembles); where ``reverse[s]`` is set, a
member runs from its last valid step to its first, and ``states[s, t]`` belongs to input step ``t`` all the same.
``nonlinearity`` is "tanh", "relu" or "identity". ``lengths [B]`` (int64, None: all T) are the valid steps of each
row: beyond them states and gradients are zero, and inputs and incoming gradients are ignored. On CUDA their range is
not checked, which would wait for the device: values outside 0..T are brought into it.

Dtypes: float32 and float64, on CUDA also bfloat16 and float16, with products accumulated and all else computed in
float32. Under CPU autocast computed in float32, output in the autocast dtype. Under CUDA autocast, as by cuDNN, all
arguments are cast to the autocast dtype, and outputs have it; a layer's backward pass then runs in it too. Float64
stays float64 under either.

``rnn_scan`` and ``rnn_scan_backward`` are exact and have derivatives of every order (from the second on by plain torch
operations). ``2 S T B H^2`` operations each; the result is bitwise the same on any number of threads, and on CUDA the
same at every call. On the CPU numbers below the smallest normal one count as zero.

Raises:
    ValueError: a wrong size, dtype or device, lengths outside 0..T on the CPU, an unknown nonlinearity; the message
    names the argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    LIBRARY,
    LOW_PRECISION,
    Execution,
    are_plain,
    autocast_outputs,
    autocasts,
    cast,
    check_lengths,
    check_scan,
    compute_dtype,
    define,
    dense,
    dense_rows,
    execution,
    full_precision,
    on_cuda,
    refuse_derivative,
    run_scan,
)


def _check_scan(
    x_proj: Tensor, h0: Tensor, weight_hh: Tensor, lengths: Tensor | None, reverse: Sequence[bool], nonlinearity: str
) -> None:
    tensors = {"x_proj": (x_proj, "STBH"), "h0": (h0, "SBH"), "weight_hh": (weight_hh, "SHH")}
    check_scan("rnn_scan", "x_proj", tensors, lengths, reverse, nonlinearity)


def _rnn_scan(
    x_proj: Tensor, h0: Tensor, weight_hh: Tensor, lengths: Tensor | None, reverse: Sequence[bool], nonlinearity: str
) -> Tensor:
    _check_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)
    check_lengths("rnn_scan", lengths, x_proj.shape[1])
    states = x_proj.new_empty(x_proj.shape)
    _scan_projected(x_proj, h0, weight_hh, lengths, reverse, nonlinearity, states, None)
    return states


def _scan_projected(
    x_proj: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    states: Tensor,
    h_n: Tensor | None,
) -> None:
    """Fill ``states``, and ``h_n`` where it is given."""

    def run(how: Execution) -> None:
        _C.rnn_scan(
            dense(x_proj),
            None,
            None,
            None,
            dense(h0),
            dense(weight_hh),
            dense(lengths),
            list(reverse),
            nonlinearity,
            dense(states),
            dense(h_n),
            how,
        )

    run_scan("rnn_scan", run, states, ((weight_hh, True),), h0)


def _rnn_scan_fake(
    x_proj: Tensor, h0: Tensor, weight_hh: Tensor, lengths: Tensor | None, reverse: Sequence[bool], nonlinearity: str
) -> Tensor:
    _check_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)
    return x_proj.new_empty(x_proj.shape)


def _prepare_layer(
    input: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """Check the arguments and return empty outputs: all that the fake implementation does."""
    tensors = {
        "input": (input, "TBI"),
        "h0": (h0, "SBH"),
        "weight_ih": (weight_ih, "SHI"),
        "weight_hh": (weight_hh, "SHH"),
        "bias": (bias, "SH"),
    }
    check_scan("rnn_layer", "input", tensors, lengths, reverse, nonlinearity)
    stack, batch, hidden = h0.shape
    return h0.new_empty(stack, input.shape[0], batch, hidden), h0.new_empty(h0.shape)


def _rnn_layer(
    input: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    states, h_n = _prepare_layer(input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity)
    check_lengths("rnn_layer", lengths, input.shape[0])
    if on_cuda(states):
        x_proj = input_projection(input, weight_ih, bias)
        _scan_projected(x_proj, h0, weight_hh, lengths, reverse, nonlinearity, states, h_n)
        return states, h_n
    _C.rnn_scan(
        None,
        dense_rows(input),
        dense(weight_ih),
        dense(bias),
        dense(h0),
        dense(weight_hh),
        dense(lengths),
        list(reverse),
        nonlinearity,
        dense(states),
        dense(h_n),
        execution(states),
    )
    return states, h_n


def _prepare_scan_backward(
    grad_states: Tensor | None,
    states: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    grad_h_n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Check the arguments and return empty outputs: all that the fake implementation does."""
    tensors = {
        "states": (states, "STBH"),
        "grad_states": (grad_states, "STBH"),
        "weight_hh": (weight_hh, "SHH"),
        "grad_h_n": (grad_h_n, "SBH"),
    }
    check_scan("rnn_scan_backward", "states", tensors, lengths, reverse, nonlinearity)
    stack, _, batch, hidden = states.shape
    return states.new_empty(states.shape), states.new_empty(stack, batch, hidden)


def _rnn_scan_backward(
    grad_states: Tensor | None,
    states: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    grad_h_n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad_x_proj, grad_h0 = _prepare_scan_backward(
        grad_states, states, weight_hh, lengths, reverse, nonlinearity, grad_h_n
    )
    check_lengths("rnn_scan_backward", lengths, states.shape[1])

    def run(how: Execution) -> None:
        _C.rnn_scan_backward(
            dense(grad_states),
            dense(grad_h_n),
            dense(states),
            dense(weight_hh),
            dense(lengths),
            list(reverse),
            nonlinearity,
            dense(grad_x_proj),
            dense(grad_h0),
            how,
        )

    run_scan("rnn_scan_backward", run, states, ((weight_hh, False),))
    return grad_x_proj, grad_h0


def _prepare_weight_gradients(
    delta: Tensor,
    states: Tensor,
    h0: Tensor,
    input: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments and return empty outputs: all that the fake implementation does."""
    tensors = {"delta": (delta, "STBH"), "states": (states, "STBH"), "h0": (h0, "SBH"), "input": (input, "TBI")}
    check_scan("rnn_weight_gradients", "delta", tensors, lengths, reverse)
    stack, _, _, hidden = delta.shape
    return (
        delta.new_empty(stack, hidden, input.shape[2]),
        delta.new_empty(stack, hidden, hidden),
        delta.new_empty(stack, hidden),
    )


def _rnn_weight_gradients(
    delta: Tensor,
    states: Tensor,
    h0: Tensor,
    input: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight_ih, grad_weight_hh, grad_bias = _prepare_weight_gradients(
        delta, states, h0, input, lengths, reverse, scale
    )
    check_lengths("rnn_weight_gradients", lengths, states.shape[1])
    if on_cuda(delta):
        return _weight_gradients_on_cuda(delta, states, h0, input, lengths, reverse, scale)
    _C.rnn_weight_gradients(
        dense(delta),
        dense(states),
        dense(h0),
        dense_rows(input),
        dense(lengths),
        list(reverse),
        scale,
        dense(grad_weight_ih),
        dense(grad_weight_hh),
        dense(grad_bias),
        execution(delta),
    )
    return grad_weight_ih, grad_weight_hh, grad_bias


def _weight_gradients_on_cuda(
    delta: Tensor,
    states: Tensor,
    h0: Tensor,
    input: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if lengths is not None:
        # The padding may hold NaN, which times the zeros of delta is no zero.
        input = torch.where(_valid_steps(lengths, input.shape[0]), input, 0)
    rows = input.flatten(0, 1).expand(delta.shape[0], -1, -1)
    grads = (
        _sum_over_rows(delta.flatten(1, 2), rows),
        recurrent_weight_gradient(delta, states, h0, lengths, reverse),
        delta.sum((1, 2), dtype=compute_dtype(delta)),
    )
    du, dw, db = (grad if scale == 1 else grad * scale for grad in grads)
    return du.to(delta.dtype), dw.to(delta.dtype), db.to(delta.dtype)


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


def input_projection(input: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """What the input adds to each pre-activation: ``x_proj[s, t] = input[t] weight_ih[s]' + bias[s]``, as one product.

    Args:
        input: ``[T, B, I]``, shared by the members of the stack.
        weight_ih: ``[S, H, I]``.
        bias: ``[S, H]`` or None.

    Returns:
        ``x_proj [S, T, B, H]``.
    """
    time, batch, _ = input.shape
    stack, hidden, _ = weight_ih.shape
    rows = input.flatten(0, 1).expand(stack, -1, -1)
    weight = weight_ih.mT
    projected = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return projected.view(stack, time, batch, hidden)


def recurrent_weight_gradient(
    delta: Tensor, states: Tensor, h0: Tensor, lengths: Tensor | None, reverse: Sequence[bool]
) -> Tensor:
    """Gradient of the recurrent weights, ``sum_t delta_t' h_{t-1}``, by large products, at least in float32.

    Args:
        delta: ``[S, T, B, H]`` gradient with respect to the pre-activations, zero beyond ``lengths``.
        states: ``[S, T, B, H]``.
        h0: ``[S, B, H]``.
        lengths: ``[B]`` valid steps, or None for all T.
        reverse: S flags: the member runs from the last valid step to the first.

    Returns:
        ``[S, H, H]``.
    """
    if delta.shape[0] == 0 or delta.shape[1] == 0:
        return delta.new_zeros(h0.shape[0], h0.shape[2], h0.shape[2])
    gradients = []
    for members, backwards in _directions(reverse):
        d, h = delta[members], states[members]
        if not backwards:
            first, later, before = d[:, 0], d[:, 1:], h[:, :-1]
        else:
            later, before = d[:, :-1], h[:, 1:]
            first = d[:, -1] if lengths is None else _at_last_valid(d, lengths)
        # Beyond a row's length both delta and the state are zero, so padding adds nothing here.
        over_time = _sum_over_rows(later.flatten(1, 2), before.flatten(1, 2))
        gradients.append(over_time + _bmm(first.mT, h0[members]))
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients)


def _directions(reverse: Sequence[bool]) -> Iterator[tuple[slice, bool]]:
    """The stretches of members that run in the same direction, and whether that is backwards."""
    begin = 0
    for backwards, members in itertools.groupby(reverse):
        end = begin + len(list(members))
        yield slice(begin, end), backwards
        begin = end


def _valid_steps(lengths: Tensor, time: int) -> Tensor:
    """``[T, B, 1]``: whether the step is one of the row's."""
    return (torch.arange(time, device=lengths.device).unsqueeze(1) < lengths).unsqueeze(2)


def _at_last_valid(tensor: Tensor, lengths: Tensor) -> Tensor:
    """What ``tensor [S, T, B, H]`` holds at each row's last valid step (at step 0 without one), ``[S, B, H]``."""
    at = (lengths - 1).clamp(0, tensor.shape[1] - 1).view(1, 1, -1, 1)
    return tensor.gather(1, at.expand(tensor.shape[0], 1, -1, tensor.shape[3])).squeeze(1)


def _scan_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, h0, weight_hh, lengths, ctx.reverse, ctx.nonlinearity = inputs
    ctx.save_for_backward(h0, weight_hh, lengths, output)


def _scan_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h0, weight_hh, lengths, states = ctx.saved_tensors
    delta, grad_h0 = torch.ops.tpext.rnn_scan_backward(grad, states, weight_hh, lengths, ctx.reverse, ctx.nonlinearity)
    grad_weight = None
    if ctx.needs_input_grad[2]:
        grad_weight = recurrent_weight_gradient(delta, states, h0, lengths, ctx.reverse).to(delta.dtype)
    return delta, grad_h0, grad_weight, None, None, None


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_states, states, weight_hh, lengths, ctx.reverse, ctx.nonlinearity, grad_h_n = inputs
    ctx.save_for_backward(grad_states, states, weight_hh, lengths, grad_h_n, output[0])


def _backward_gradient(ctx: Any, u: Tensor, u0: Tensor) -> tuple[Tensor | None, ...]:
    """Derivative of ``rnn_scan_backward``, in torch operations: its adjoint runs forward in time.

    With ``m_t = g_t + e_{t+1} W`` and cotangents ``u`` of ``e`` and ``u0`` of ``e_1 W``: ``p_t = u_t + s_{t-1} W',
    s_t = p_t * a'(h_t), s_0 = u0``; then ``dg_t = s_t``, ``dh_t = p_t * m_t * a''(h_t)`` (as a function of ``h``),
    ``dW = sum_t e_t' s_{t-1}``, and the gradient of ``grad_h_n`` is ``s`` after the last valid step.
    """
    grad_states, states, weight_hh, lengths, grad_h_n, e = ctx.saved_tensors
    grads: list[list[Tensor]] = [[], [], [], []]
    for member, backwards in enumerate(ctx.reverse):
        weight, h = weight_hh[member], states[member]
        steps = torch.arange(h.shape[0], device=h.device).unsqueeze(1)
        order = range(h.shape[0] - 1, -1, -1) if backwards else range(h.shape[0])
        valid = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        if lengths is not None:
            valid = steps < lengths
        slope = {"tanh": 1 - h * h, "relu": (h > 0).to(h.dtype), "identity": torch.ones_like(h)}[ctx.nonlinearity]
        # e_{t+1} in the member's own order of steps.
        none = torch.zeros_like(h[:1])
        later = torch.cat([none, e[member][:-1]]) if backwards else torch.cat([e[member][1:], none])
        m = later @ weight
        if grad_states is not None:
            m = m + grad_states[member]
        if grad_h_n is not None:
            last = valid & (steps == 0 if backwards else steps == valid.sum(0) - 1)
            m = m + last.unsqueeze(2) * grad_h_n[member]
        s, weight_sum = u0[member], torch.zeros_like(weight)
        grad_g, grad_h = [none[0]] * h.shape[0], [none[0]] * h.shape[0]
        for t in order:
            on = valid[t].unsqueeze(1)
            weight_sum = weight_sum + e[member][t].mT @ s
            p = torch.where(on, u[member][t] + s @ weight.mT, 0)
            grad_g[t] = p * slope[t]
            if ctx.nonlinearity == "tanh":
                grad_h[t] = -2 * h[t] * p * m[t]
            s = torch.where(on, grad_g[t], s)
        grads[0].append(torch.stack(grad_g) if grad_g else torch.zeros_like(h))
        grads[1].append(torch.stack(grad_h) if grad_h else torch.zeros_like(h))
        grads[2].append(weight_sum)
        grads[3].append(s)
    grad_grad, grad_h_n_grad = (
        None if of is None else torch.stack(members) for of, members in ((grad_states, grads[0]), (grad_h_n, grads[3]))
    )
    return grad_grad, torch.stack(grads[1]), torch.stack(grads[2]), None, None, None, grad_h_n_grad


define(
    "rnn_scan(Tensor x_proj, Tensor h0, Tensor weight_hh, Tensor? lengths, bool[] reverse, str nonlinearity) -> Tensor",
    _rnn_scan,
    _rnn_scan_fake,
    cast_outputs=True,
    low_precision=True,
)
torch.library.register_autograd("tpext::rnn_scan", _scan_gradient, setup_context=_scan_setup_context, lib=LIBRARY)

rnn_scan_backward = define(
    "rnn_scan_backward(Tensor? grad_states, Tensor states, Tensor weight_hh, Tensor? lengths, bool[] reverse, "
    "str nonlinearity, Tensor? grad_h_n=None) -> (Tensor grad_x_proj, Tensor grad_h0)",
    _rnn_scan_backward,
    _prepare_scan_backward,
    cast_outputs=True,
    low_precision=True,
)
torch.library.register_autograd(
    "tpext::rnn_scan_backward", _backward_gradient, setup_context=_backward_setup_context, lib=LIBRARY
)

_HAS_NO_DERIVATIVE = (
    "is a part of a layer's forward or backward pass and has no derivative of its own; differentiate "
    "tpext.nn.RNN(rule=tpext.Backprop()), or torch.ops.tpext.rnn_scan"
)
rnn_layer = define(
    "rnn_layer(Tensor input, Tensor h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor? lengths, "
    "bool[] reverse, str nonlinearity) -> (Tensor states, Tensor h_n)",
    _rnn_layer,
    _prepare_layer,
    cast_outputs=True,
    low_precision=True,
)
refuse_derivative("rnn_layer", f"rnn_layer {_HAS_NO_DERIVATIVE}")

rnn_weight_gradients = define(
    "rnn_weight_gradients(Tensor delta, Tensor states, Tensor h0, Tensor input, Tensor? lengths, bool[] reverse, "
    "float scale) -> (Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias)",
    _rnn_weight_gradients,
    _prepare_weight_gradients,
    cast_outputs=False,
    low_precision=True,
)
refuse_derivative("rnn_weight_gradients", f"rnn_weight_gradients {_HAS_NO_DERIVATIVE}")


def final_states(states: Tensor, h0: Tensor, lengths: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    """State after the last valid step of each row and member, ``[S, B, H]``; ``h0`` without one."""
    if states.shape[1] == 0:
        return h0.clone()
    members = []
    for member, backwards in enumerate(reverse):
        if backwards or lengths is None:
            last = states[member, 0 if backwards else -1]
        else:
            last = _at_last_valid(states[member : member + 1], lengths)[0]
        members.append(last if lengths is None else torch.where((lengths > 0).unsqueeze(1), last, h0[member]))
    return torch.stack(members)


def _composite_layer(
    input: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """``rnn_layer`` by operations that have derivatives of every order."""
    x_proj = input_projection(input, weight_ih, bias)
    states = torch.ops.tpext.rnn_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)
    return states, final_states(states, h0, lengths, reverse)


# A stretch of a layer's steps: its input [t, B, I], the states before it [S, B, H], its states [S, t, B, H], and how
# many of its steps are valid in each row.
Piece: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]
Gradients: TypeAlias = list[Tensor | None]
Sweep: TypeAlias = Callable[
    [Piece, Tensor | None, Tensor | None, Tensor | None], tuple[Gradients, Tensor, Tensor | None]
]


class Layer(torch.autograd.Function):
    """What the layers of all rules share: the forward pass, and the backward pass piece by piece.

    A rule's class defines ``forward``, which calls ``run_forward``, and ``backward``, which calls ``run_backward`` with
    a function that does one piece. ``backward`` reads ``ctx.saved_tensors`` once: under activation checkpointing a
    second time is an error. Without ``checkpoint_every`` the whole sequence is one piece. With it, ``forward``
    keeps only the state before each piece and the backward pass computes a piece's states anew: with ``delta`` some
    ``T / K + 2 K`` states in memory in place of ``2 T``, for one more forward pass.

    Contexts are filled in ``forward``, not in a ``setup_context``: with one, torch looks up and binds the signature at
    every call, which takes as long as a small kernel. ``forward`` takes what only ``backward`` needs by name: torch's
    compiler counts the signature's parameters.
    """

    @staticmethod
    def run_forward(
        ctx: Any,
        input: Tensor,
        h0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        lengths: Tensor | None,
        reverse: Sequence[bool],
        nonlinearity: str,
        checkpoint_every: int | None,
        *others: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """States (empty with ``checkpoint_every``) and ``h_n``; saves what ``run_backward`` needs, and ``others``."""
        ctx.reverse, ctx.nonlinearity, ctx.checkpoint_every = reverse, nonlinearity, checkpoint_every
        ctx.set_materialize_grads(False)
        if checkpoint_every is None:
            states, h_n = rnn_layer(input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity)
            kept = states
        else:
            if checkpoint_every < 1 or any(reverse):
                raise ValueError(
                    "checkpoint_every must be at least 1 and its members must run forward, got "
                    f"checkpoint_every={checkpoint_every}, reverse={list(reverse)}"
                )
            # Each piece's lengths are cut to its size, which would hide those out of range.
            if are_plain((lengths,)):
                check_lengths("rnn_layer", lengths, input.shape[0])
            pieces = max(1, -(-input.shape[0] // checkpoint_every))
            kept = h0.new_empty(pieces, *h0.shape)
            h_n = h0.clone()
            for index in range(pieces):
                piece, valid = _cut(input, lengths, index * checkpoint_every, checkpoint_every)
                kept[index].copy_(h_n)
                h_n.copy_(rnn_layer(piece, kept[index], weight_ih, weight_hh, bias, valid, reverse, nonlinearity)[1])
            states = h_n.new_empty(0)
            ctx.mark_non_differentiable(states)
        ctx.save_for_backward(input, h0, weight_ih, weight_hh, bias, lengths, kept, *others)
        return states, h_n

    @staticmethod
    def run_backward(
        ctx: Any,
        saved: Sequence[Tensor],
        sweep: Sweep,
        grad_states: Tensor | None,
        arriving: Tensor | None,
        zero_stays_zero: bool,
    ) -> Gradients:
        """Gradients of input, h0, weight_ih, weight_hh and bias, of h0 as ``sweep`` leaves it.

        Args:
            ctx: the layer's context.
            saved: its saved tensors, the first 7 as ``run_forward`` saves them.
            sweep: takes a piece, the gradients of its states (or None: zero) and the two things that come back from
                beyond its end (``[S, B, H]`` or None), returns gradients in the order above and the same two things at
                its beginning.
            grad_states: gradients of the states; with ``checkpoint_every`` there are none.
            arriving: the first of those two at the end of the sequence.
            zero_stays_zero: nothing comes of a piece at whose end nothing arrives.
        """
        input, h0, weight_ih, weight_hh, bias, lengths, kept = saved[:7]
        if ctx.checkpoint_every is None:
            grads, first, _ = sweep((input, h0, kept, lengths), grad_states, arriving, None)
            grads[1] = first if ctx.needs_input_grad[1] else None
            return grads
        every = ctx.checkpoint_every
        sums: Gradients = [None] * 5
        inputs = input.new_zeros(input.shape) if ctx.needs_input_grad[0] else None
        # What goes from piece to piece stands in memory of its own. A small tensor that outlives its piece would lie in
        # the hole that the large ones leave, which then do not fit there again, and the heap would grow piece by piece.
        arrived, credited = torch.zeros_like(h0), torch.zeros_like(h0)
        credit: Tensor | None = None
        for index in range(kept.shape[0] - 1, -1, -1):
            part, valid = _cut(input, lengths, index * every, every)
            states = rnn_layer(part, kept[index], weight_ih, weight_hh, bias, valid, ctx.reverse, ctx.nonlinearity)[0]
            grads, first, first_credit = sweep((part, kept[index], states, valid), None, arriving, credit)
            arriving = arrived.copy_(first)
            credit = None if first_credit is None else credited.copy_(first_credit)
            if inputs is not None:
                inputs[index * every : index * every + part.shape[0]].copy_(grads[0])  # type: ignore[arg-type]
            for place in (2, 3, 4):
                new, old = grads[place], sums[place]
                sums[place] = new if old is None or new is None else old.add_(new)
            del states, grads, first, first_credit, new
            # What has faded leaves nothing to do further back. A compiler or a fake tensor cannot look, and on CUDA
            # looking would wait for the device.
            looks = zero_stays_zero and not on_cuda(arrived) and are_plain((arrived, credited))
            if looks and not arrived.any() and not credited.any():
                break
        sums[0], sums[1] = inputs, arriving if ctx.needs_input_grad[1] else None
        return sums

    @staticmethod
    def gradients(
        ctx: Any, piece: Piece, delta: Tensor, weight_ih: Tensor, parameter_scale: float, input_scale: float
    ) -> Gradients:
        """Gradients of input, h0 (left None), weight_ih, weight_hh and bias, from those of the pre-activations."""
        input, h0, states, lengths = piece
        grads: Gradients = [None] * 5
        if ctx.needs_input_grad[0]:
            weight = weight_ih if input_scale == 1 else weight_ih * input_scale
            grads[0] = sum_members(torch.bmm(delta.flatten(1, 2), weight)).view(input.shape)
        if any(ctx.needs_input_grad[2:5]):
            of_parameters = rnn_weight_gradients(delta, states, h0, input, lengths, ctx.reverse, parameter_scale)
            for place, grad in enumerate(of_parameters, start=2):
                grads[place] = grad if ctx.needs_input_grad[place] else None
        return grads


def _cut(input: Tensor, lengths: Tensor | None, begin: int, size: int) -> tuple[Tensor, Tensor | None]:
    """The steps from ``begin`` on, at most ``size``, and how many of them are valid in each row."""
    part = input[begin : begin + size]
    return part, None if lengths is None else (lengths - begin).clamp(0, part.shape[0])


def sum_members(stacked: Tensor) -> Tensor:
    """Sum over the stack axis, without a copy where there is one member."""
    return stacked.squeeze(0) if stacked.shape[0] == 1 else stacked.sum(0)


class _BackpropLayer(Layer):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        h0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        lengths: Tensor | None,
        reverse: Sequence[bool],
        nonlinearity: str,
        checkpoint_every: int | None,
    ) -> tuple[Tensor, Tensor]:
        return Layer.run_forward(
            ctx, input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity, checkpoint_every
        )

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_BackpropLayer.differentiable(ctx, saved, grad_states, grad_h_n), *[None] * 4
        weight_ih, weight_hh = saved[2:4]

        def sweep(
            piece: Piece, grad_states: Tensor | None, arriving: Tensor | None, credit: Tensor | None
        ) -> tuple[Gradients, Tensor, Tensor | None]:
            _, _, states, lengths = piece
            delta, first = rnn_scan_backward(
                grad_states, states, weight_hh, lengths, ctx.reverse, ctx.nonlinearity, arriving
            )
            return Layer.gradients(ctx, piece, delta, weight_ih, 1.0, 1.0), first, None

        with full_precision(weight_hh.device.type):
            return *Layer.run_backward(ctx, saved, sweep, grad_states, grad_h_n, True), *[None] * 4

    @staticmethod
    def differentiable(
        ctx: Any, saved: Sequence[Tensor], grad_states: Tensor | None, grad_h_n: Tensor | None
    ) -> Gradients:
        """The same gradients through operations that have derivatives themselves (with all states in memory)."""
        # Views: where one of the tensors was computed from another, its gradient must not reach the other here too.
        tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in saved[:5]]
        input, h0, weight_ih, weight_hh, bias = tensors
        outputs = _composite_layer(input, h0, weight_ih, weight_hh, bias, saved[5], ctx.reverse, ctx.nonlinearity)
        given = [(o, g) for o, g in zip(outputs, (grad_states, grad_h_n), strict=True) if g is not None]
        needed = ctx.needs_input_grad[:5]
        wanted = [tensor for tensor, needs in zip(tensors, needed, strict=True) if needs]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in given], wanted, [g for _, g in given], create_graph=True, allow_unused=True
            )
        )
        return [next(found) if needs else None for needs in needed]


def run_layer(layer: type[Layer], tensors: tuple[Tensor | None, ...], *settings: Any) -> tuple[Tensor, Tensor]:
    """Apply a layer; under autocast it runs in float32, on CUDA in the autocast dtype, which its outputs get."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if not autocasts(device):
        return layer.apply(*tensors, *settings)  # type: ignore[no-any-return,no-untyped-call]
    dtype = torch.get_autocast_dtype(device) if on_cuda(first) else torch.float32
    with torch.autocast(device, enabled=False):
        outputs = layer.apply(*(cast(tensor, dtype) for tensor in tensors), *settings)  # type: ignore[no-untyped-call]
    return autocast_outputs(outputs, device)  # type: ignore[no-any-return]


def backprop_rnn(
    input: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    *,
    checkpoint_every: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of simple recurrent layers with exact gradients of every order.

    ``h_t = a(x_t U' + b + h_{t-1} W')``

    Args:
        input: ``[T, B, I]``, float32 or float64, on CUDA also bfloat16 or float16; on the CPU batch-first memory is
            read in place.
        h0: ``[S, B, H]``.
        weight_ih: U, ``[S, H, I]``.
        weight_hh: W, ``[S, H, H]``.
        bias: b, ``[S, H]`` or None.
        lengths: ``[B]`` int64 valid steps of each row, or None for all T.
        reverse: S flags: the member runs from the last valid step to the first.
        nonlinearity: "tanh", "relu" or "identity".
        checkpoint_every: K >= 1 steps a piece, see ``Layer``; for members that run forward. None: no pieces.

    Returns:
        States ``[S, T, B, H]``, zero beyond ``lengths`` (an empty tensor with ``checkpoint_every``), and the states
        after the last valid steps ``[S, B, H]``.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    tensors = (input, h0, weight_ih, weight_hh, bias, lengths)
    if torch._C._are_functorch_transforms_active():
        return _composite_layer(*tensors, reverse, nonlinearity)
    return run_layer(_BackpropLayer, tensors, list(reverse), nonlinearity, checkpoint_every)
