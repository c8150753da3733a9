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
``tpext.nn.RNN(rule=Backprop())``, which is made of them, has, of every order. Where ``grad_states`` is None and the
gradient has faded to nothing, the sweep may end, and does on the CPU; it then does not read the states further back.

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
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    LIBRARY,
    LOW_PRECISION,
    Execution,
    check_lengths,
    check_scan,
    check_tensor,
    compute_dtype,
    define,
    dense,
    dense_rows,
    execution,
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
        input = torch.where(valid_steps(lengths, input.shape[0]), input, 0)
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
    check_tensor("input_projection", "input", input, "[T, B, I]")
    check_tensor("input_projection", "weight_ih", weight_ih, "[S, H, I]")
    if bias is not None:
        check_tensor("input_projection", "bias", bias, "[S, H]")
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


def valid_steps(lengths: Tensor, time: int) -> Tensor:
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
