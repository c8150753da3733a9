"""``rnn_scan``, ``rnn_scan_backward``: the recurrence of a simple (Elman) RNN and its back-propagation through time.

``torch.ops.tpext.rnn_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)``::

    h_t = a(x_proj_t + h_{t-1} W')          x_proj [S, T, B, H], h0 [S, B, H], W = weight_hh [S, H, H] -> h [S, T, B, H]

``torch.ops.tpext.rnn_scan_backward(grad_states, states, weight_hh, lengths, reverse, nonlinearity)``::

    e_t = (g_t + e_{t+1} W) * a'(h_t)       -> e = dL/dx_proj [S, T, B, H],   dL/dh0 = e_1 W [S, B, H]

``S`` members with weights of their own run side by side (directions, ensembles); where ``reverse[s]`` is set, a
member runs from its last valid step to its first, and ``states[s, t]`` belongs to input step ``t`` all the same.
``nonlinearity`` is "tanh", "relu" or "identity". ``lengths [B]`` (int64, None: all T) are the valid steps of each
row: beyond them states and gradients are zero, and incoming gradients are ignored. Float32 and float64; under CPU
autocast computed in float32, output in the autocast dtype.

Both are exact and have derivatives of every order (from the second on by plain torch operations). ``2 S T B H^2``
operations each; the result is bitwise the same on any number of threads. Numbers below the smallest normal one count
as zero.

Raises:
    ValueError: a wrong size, dtype or device, lengths outside 0..T, an unknown nonlinearity; the message names the
    argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import LIBRARY, check_lengths, check_scan, define, dense


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
    _C.rnn_scan(
        dense(x_proj),
        dense(h0),
        dense(weight_hh),
        dense(lengths),
        list(reverse),
        nonlinearity,
        dense(states),
        torch.get_num_threads(),
    )
    return states


def _rnn_scan_fake(
    x_proj: Tensor, h0: Tensor, weight_hh: Tensor, lengths: Tensor | None, reverse: Sequence[bool], nonlinearity: str
) -> Tensor:
    _check_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)
    return x_proj.new_empty(x_proj.shape)


def _check_scan_backward(
    grad_states: Tensor,
    states: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> None:
    tensors = {"grad_states": (grad_states, "STBH"), "states": (states, "STBH"), "weight_hh": (weight_hh, "SHH")}
    check_scan("rnn_scan_backward", "grad_states", tensors, lengths, reverse, nonlinearity)


def _initial_like(states: Tensor) -> Tensor:
    """An empty ``[S, B, H]`` tensor for states ``[S, T, B, H]``."""
    stack, _, batch, hidden = states.shape
    return states.new_empty(stack, batch, hidden)


def _rnn_scan_backward(
    grad_states: Tensor,
    states: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    _check_scan_backward(grad_states, states, weight_hh, lengths, reverse, nonlinearity)
    check_lengths("rnn_scan_backward", lengths, states.shape[1])
    grad_x_proj, grad_h0 = states.new_empty(states.shape), _initial_like(states)
    _C.rnn_scan_backward(
        dense(grad_states),
        dense(states),
        dense(weight_hh),
        dense(lengths),
        list(reverse),
        nonlinearity,
        dense(grad_x_proj),
        dense(grad_h0),
        torch.get_num_threads(),
    )
    return grad_x_proj, grad_h0


def _rnn_scan_backward_fake(
    grad_states: Tensor,
    states: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    _check_scan_backward(grad_states, states, weight_hh, lengths, reverse, nonlinearity)
    return states.new_empty(states.shape), _initial_like(states)


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
    """Gradient of the recurrent weights, ``sum_t delta_t' h_{t-1}``, one large product a member.

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
    for member, backwards in enumerate(reverse):
        d, h = delta[member], states[member]
        if not backwards:
            first, later, before = d[0], d[1:], h[:-1]
        else:
            later, before = d[:-1], h[1:]
            if lengths is None:
                first = d[-1]
            else:
                last_valid = (lengths - 1).clamp(min=0).view(1, -1, 1).expand(1, -1, d.shape[-1])
                first = d.gather(0, last_valid)[0]
        # Beyond a row's length both delta and the state are zero, so padding adds nothing here.
        gradients.append(torch.addmm(first.mT @ h0[member], later.flatten(0, 1).mT, before.flatten(0, 1)))
    return gradients[0].unsqueeze(0) if len(gradients) == 1 else torch.stack(gradients)


def _scan_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, h0, weight_hh, lengths, ctx.reverse, ctx.nonlinearity = inputs
    ctx.save_for_backward(h0, weight_hh, lengths, output)


def _scan_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h0, weight_hh, lengths, states = ctx.saved_tensors
    delta, grad_h0 = torch.ops.tpext.rnn_scan_backward(grad, states, weight_hh, lengths, ctx.reverse, ctx.nonlinearity)
    grad_weight = None
    if ctx.needs_input_grad[2]:
        grad_weight = recurrent_weight_gradient(delta, states, h0, lengths, ctx.reverse)
    return delta, grad_h0, grad_weight, None, None, None


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_states, states, weight_hh, lengths, ctx.reverse, ctx.nonlinearity = inputs
    ctx.save_for_backward(grad_states, states, weight_hh, lengths, output[0])


def _backward_gradient(ctx: Any, u: Tensor, u0: Tensor) -> tuple[Tensor | None, ...]:
    """Derivative of ``rnn_scan_backward``, in torch operations: its adjoint runs forward in time.

    With ``m_t = g_t + e_{t+1} W`` and cotangents ``u`` of ``e`` and ``u0`` of ``e_1 W``: ``p_t = u_t + s_{t-1} W',
    s_t = p_t * a'(h_t), s_0 = u0``; then ``dg_t = s_t``, ``dh_t = p_t * m_t * a''(h_t)`` (as a function of ``h``) and
    ``dW = sum_t e_t' s_{t-1}``.
    """
    grad_states, states, weight_hh, lengths, e = ctx.saved_tensors
    grads: list[list[Tensor]] = [[], [], []]
    for member, backwards in enumerate(ctx.reverse):
        weight, h = weight_hh[member], states[member]
        order = range(h.shape[0] - 1, -1, -1) if backwards else range(h.shape[0])
        valid = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        if lengths is not None:
            valid = torch.arange(h.shape[0], device=h.device).unsqueeze(1) < lengths
        slope = {"tanh": 1 - h * h, "relu": (h > 0).to(h.dtype), "identity": torch.ones_like(h)}[ctx.nonlinearity]
        # e_{t+1} in the member's own order of steps.
        none = torch.zeros_like(h[:1])
        later = torch.cat([none, e[member][:-1]]) if backwards else torch.cat([e[member][1:], none])
        m = grad_states[member] + later @ weight
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
    return torch.stack(grads[0]), torch.stack(grads[1]), torch.stack(grads[2]), None, None, None


define(
    "rnn_scan(Tensor x_proj, Tensor h0, Tensor weight_hh, Tensor? lengths, bool[] reverse, str nonlinearity) -> Tensor",
    _rnn_scan,
    _rnn_scan_fake,
    cast_outputs=True,
)
torch.library.register_autograd("tpext::rnn_scan", _scan_gradient, setup_context=_scan_setup_context, lib=LIBRARY)

define(
    "rnn_scan_backward(Tensor grad_states, Tensor states, Tensor weight_hh, Tensor? lengths, bool[] reverse, "
    "str nonlinearity) -> (Tensor grad_x_proj, Tensor grad_h0)",
    _rnn_scan_backward,
    _rnn_scan_backward_fake,
    cast_outputs=True,
)
torch.library.register_autograd(
    "tpext::rnn_scan_backward", _backward_gradient, setup_context=_backward_setup_context, lib=LIBRARY
)
