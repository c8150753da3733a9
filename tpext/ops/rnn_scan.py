"""``rnn_scan`` and ``rnn_scan_backward``: the recurrence of a simple (Elman) RNN and its back-propagation.

``torch.ops.tpext.rnn_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)``::

    h_t = a(x_proj_t + h_{t-1} W')          x_proj [S, T, B, H], h0 [S, B, H], W = weight_hh [S, H, H] -> h [S, T, B, H]

``torch.ops.tpext.rnn_scan_backward(grad_states, states, weight_hh, lengths, reverse, nonlinearity, grad_h_n=None)``::

    e_t = (g_t + e_{t+1} W) * a'(h_t)       -> e = dL/dx_proj [S, T, B, H],   dL/dh0 = e_1 W [S, B, H]

``grad_states`` may be None (zero); ``grad_h_n [S, B, H]`` enters at each row's last valid step, as ``e_{T+1} W``.

Where ``grad_states`` is None and the gradient has faded to nothing, the sweep may end, and does on the CPU; it then
does not read the states further back, so states must be such as a forward pass leaves, where NaN reaches the last one
(:mod:`tpext.ops.rnn_target_scan`). The layer around the scan stands in :mod:`tpext.ops.rnn_layer`.

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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    LIBRARY,
    Execution,
    check_lengths,
    check_scan,
    define,
    dense,
    run_scan,
)
from tpext.ops._rnn_products import recurrent_weight_gradient
from tpext.ops.rnn_target_scan import rnn_target_scan


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
    scan_projected(x_proj, h0, weight_hh, lengths, reverse, nonlinearity, states, None)
    return states


def scan_projected(
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


def _check_scan_backward(
    grad_states: Tensor | None,
    states: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    grad_h_n: Tensor | None = None,
) -> Tensor:
    """Check the arguments and return an empty ``grad_h0``."""
    tensors = {
        "states": (states, "STBH"),
        "grad_states": (grad_states, "STBH"),
        "weight_hh": (weight_hh, "SHH"),
        "grad_h_n": (grad_h_n, "SBH"),
    }
    check_scan("rnn_scan_backward", "states", tensors, lengths, reverse, nonlinearity)
    stack, _, batch, hidden = states.shape
    return states.new_empty(stack, batch, hidden)


def _rnn_scan_backward(
    grad_states: Tensor | None,
    states: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    grad_h_n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad_h0 = _check_scan_backward(grad_states, states, weight_hh, lengths, reverse, nonlinearity, grad_h_n)
    check_lengths("rnn_scan_backward", lengths, states.shape[1])
    # Back-propagation is the target pass with P = W, slope a' and a step of 1: d is minus the gradient.
    back = (weight_hh, weight_hh.mT, None, lengths, reverse, nonlinearity, "linearized", "local")
    at_end = None if grad_h_n is None else -grad_h_n
    # in the place of h0, which this correction does not read, stands what has its shape
    grad_x_proj, disp_h0, *_ = rnn_target_scan(
        grad_states, states, grad_h0, *back, 1.0, 0.5, False, False, at_end, None, "derivative"
    )
    return grad_x_proj, torch.neg(disp_h0, out=grad_h0)


def _rnn_scan_backward_fake(grad_states: Tensor | None, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return states.new_empty(states.shape), _check_scan_backward(grad_states, states, *rest)


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
    _rnn_scan_backward_fake,
    cast_outputs=True,
    low_precision=True,
)
torch.library.register_autograd(
    "tpext::rnn_scan_backward", _backward_gradient, setup_context=_backward_setup_context, lib=LIBRARY
)
