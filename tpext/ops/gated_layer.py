"""The gated recurrent layers, GRU and LSTM: what their training steps are made of.

``torch.ops.tpext.gated_layer(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, cell, keep) ->
(states, h_n, c_n, kept)`` is the forward pass, in torch's equations and order of gates. ``cell`` is "gru" (G = 3)::

    r = s(x_r + W_r h)    z = s(x_z + W_z h)    a = W_n h + b_hn    n = tanh(x_n + r a)    h' = (1 - z) n + z h

or "lstm" (G = 4)::

    i, f, o = s(x_. + W_. h)    g = tanh(x_g + W_g h)    c' = f c + i g    h' = o tanh(c')

with ``x_. = U_. x + b_i.`` and ``b_h.`` beside each ``W_.``::

    input [S or 1, T, B, I]             U = weight_ih [S, G H, I]    W = weight_hh [S, G H, H]
    h0 [S, B, H]                        b_i = bias_ih [S, G H] and b_h = bias_hh [S, G H]: both, or both None
    c0 [S, B, H] for "lstm", else None  lengths [B] int64 or None    reverse: S flags

``states [S, T, B, H]`` is zero beyond a row's length; ``h_n`` and ``c_n [S, B, H]`` are the states after its last valid
step, ``h0`` and ``c0`` without one; ``c_n`` is empty for "gru". With ``keep`` ``kept [S, T, B, K, H]`` is what the
backward pass reads: r, z, n, a (K = 4) or i, f, g, o, c (K = 5); else it is empty. ``a`` has no bound: where the dtype
cannot hold it (beyond 65504 in float16) it is infinite while the states stay finite, and the gradients are NaN.

``torch.ops.tpext.gated_layer_backward(grad_states, input, states, h0, c0, kept, weight_hh, feedback, input_feedback,
lengths, reverse, cell, inverse, credit, target_step, margin, gate_slope, candidate_slope, slope_reg, scale,
input_scale, needs, disp_h_n=None, disp_c_n=None, credit_h_n=None, credit_c_n=None) -> (grad_input, grad_weight_ih,
grad_weight_hh, grad_bias_ih, grad_bias_hh, disp_h0, disp_c0, credit_h0, credit_c0)`` is a target pass, from the last
step to the first, with ``P = feedback [S, G H, H]``, and all gradients::

    d_{t-1} = -target_step g_{t-1} + direct(d_t) + m_t P                    g = grad_states [S, T, B, H], None: zero
    GRU   direct(d) = z d     m = [d (1-z) S_t(n) a S_s(r),  d (h_{t-1} - n) S_s(z),  d (1-z) S_t(n) r]
    LSTM  D = d_c + d_h o S_t(tanh c)     of c direct(d) = f D, of h nothing
          m = [D g S_s(i),  D c_{t-1} S_s(f),  D i S_t(g),  d_h tanh(c) S_s(o)]

for ``inverse`` "branch". ``S_s`` and ``S_t`` are the slopes of sigmoid and tanh, ``gate_slope`` and
``candidate_slope``: "derivative" a', "inverse" a' / (a'^2 + slope_reg) with the value kept ``margin`` away from the
edges of its range, "one" 1. ``inverse`` "cell" is the move of least norm ``(m, direct)`` by which the cell, unit by
unit and all gates together, follows d, with ``slope_reg`` added to its normal equations; it has no slopes of choice,
which must be "derivative".

The parameters of a step get the chain rule's ``e_t``, that is m with all slopes derivatives and, in place of d, the
credit k: -d ("local"), or -d and what the chain rule brings of the steps after ("through_time")::

    [dW, db_h] = scale * sum_t e_t' [h_{t-1}, 1]      dx_t = input_scale * e_t F       F = input_feedback [S, G H, I]
    [dU, db_i] = scale * sum_t e_t' [x_t, 1]          of the GRU's candidate without the factor r

``disp_h_n``, ``disp_c_n``, ``credit_h_n`` and ``credit_c_n`` ``[S, B, H]`` are what comes from beyond the last valid
step, and ``disp_h0``, ... what reaches the initial states, of the credit what comes back alone; the second and the last
belong to "lstm", the last two to "through_time", and outputs without use are empty. ``needs`` says which of the first
five outputs are wanted; the others are empty. ``target_step``, ``margin``, ``slope_reg``, ``scale`` and ``input_scale``
are lists of one number, or of one for each member. ``grad_input`` has the input's shape: members that share an input
add to it. Back-propagation is P = W, "branch", slopes "derivative", "local" and target_step 1, with d minus its
gradient.

Where ``grad_states`` is None and the displacement has faded to nothing, the pass may end, as ``rnn_layer_backward``
does.

Float32 and float64, on CUDA bfloat16 and float16 too, computed in float32: there the sweeps over time are kernels,
which keep the weights on the chip where they fit, and what is left are torch's products
(:mod:`tpext.ops._gated_cuda`); members with numbers of their own run one after another. Stack, ``reverse`` and
``lengths`` are those of ``rnn_scan``, and so is determinism on the CPU. These ops have no derivative of their own;
:func:`tpext.ops._gated_composite.gated_layer_composite` has, of every order.

Cost, of a row and step: ``2 G H (H + I)`` operations forward, ``2 G H (2 H + I)`` backward, ``2 G H^2`` more through
time and ``2 G H I`` for the input's gradient.

Raises:
    ValueError: an argument does not fit, which is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._gated_backward_composite import gated_backward_composite
from tpext.ops._gated_cuda import backward_on_cuda, layer_on_cuda
from tpext.ops._library import (
    CREDITS,
    PLAIN_RNN,
    are_plain,
    check_choice,
    check_lengths,
    check_scan,
    compute_dtype,
    define,
    dense,
    dense_rows,
    execution,
    explained,
    is_integer,
    on_cuda,
    refuse_derivative,
    refuse_forward_mode,
)
from tpext.ops._members import Numbers, as_list, numbers_of
from tpext.ops._memory import new_empty

CELLS = ("gru", "lstm")
INVERSES = ("branch", "cell")
SLOPES = ("inverse", "derivative", "one")
GATES = {"gru": 3, "lstm": 4}
KEPT = {"gru": 4, "lstm": 5}


class _Forward(NamedTuple):
    """The arguments of ``gated_layer``."""

    input: Tensor
    h0: Tensor
    c0: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    lengths: Tensor | None
    reverse: Sequence[bool]
    cell: str
    keep: bool


class _Backward(NamedTuple):
    """The arguments of ``gated_layer_backward``."""

    grad_states: Tensor | None
    input: Tensor
    states: Tensor
    h0: Tensor
    c0: Tensor | None
    kept: Tensor
    weight_hh: Tensor
    feedback: Tensor
    input_feedback: Tensor | None
    lengths: Tensor | None
    reverse: Sequence[bool]
    cell: str
    inverse: str
    credit: str
    target_step: Numbers
    margin: Numbers
    gate_slope: str
    candidate_slope: str
    slope_reg: Numbers
    scale: Numbers
    input_scale: Numbers
    needs: Sequence[bool]
    disp_h_n: Tensor | None = None
    disp_c_n: Tensor | None = None
    credit_h_n: Tensor | None = None
    credit_c_n: Tensor | None = None


def _check_gated(
    op: str, leading: str, call: _Forward | _Backward, others: dict[str, tuple[Tensor | None, Sequence[str]]]
) -> None:
    """Check the cell and the tensors of a call: what both ops take, and ``others`` as ``check_scan`` takes them."""
    check_choice(op, "cell", call.cell, CELLS)
    rows = f"{GATES[call.cell]}H"
    # of all sizes this one alone follows from another
    if call.weight_hh.dim() == 3:
        stack, of_gates, hidden = call.weight_hh.shape
        if of_gates != GATES[call.cell] * hidden:
            expected = f"[S={stack}, {rows}={GATES[call.cell] * hidden}, H={hidden}]"
            raise ValueError(f"{op}: weight_hh must be {expected}, got {list(call.weight_hh.shape)}")
    tensors: dict[str, tuple[Tensor | None, Sequence[str]]] = {
        "input": (call.input, "NTBI"),
        "h0": (call.h0, "SBH"),
        "c0": (call.c0, "SBH"),
        "weight_hh": (call.weight_hh, ("S", rows, "H")),
        **others,
    }
    check_scan(op, leading, tensors, call.lengths, call.reverse)
    stack = call.h0.shape[0]
    if call.input.shape[0] not in (1, stack):
        time, batch, size = call.input.shape[1:]
        raise ValueError(
            f"{op}: input must be [S={stack} or 1, T={time}, B={batch}, I={size}], got {list(call.input.shape)}"
        )
    for name in ("c0", "disp_c_n", "credit_c_n"):
        if call.cell != "lstm" and tensors.get(name, (None,))[0] is not None:
            raise ValueError(f"{op}: {name} must be None for cell {call.cell!r}, got a tensor")
    if call.cell == "lstm" and call.c0 is None:
        raise ValueError(f"{op}: c0 must be given for cell 'lstm', got None")


def _check_layer(call: _Forward) -> None:
    op, rows = "gated_layer", f"{GATES.get(call.cell)}H"
    others: dict[str, tuple[Tensor | None, Sequence[str]]] = {
        "weight_ih": (call.weight_ih, ("S", rows, "I")),
        "bias_ih": (call.bias_ih, ("S", rows)),
        "bias_hh": (call.bias_hh, ("S", rows)),
    }
    _check_gated(op, "input", call, others)
    if (call.bias_ih is None) != (call.bias_hh is None):
        missing = "bias_ih" if call.bias_ih is None else "bias_hh"
        raise ValueError(f"{op}: bias_ih and bias_hh must both be given or both be None, got None for {missing}")


def _empty_states(call: _Forward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stack, batch, hidden = call.h0.shape
    time, new = call.input.shape[1], call.h0.new_empty
    return (
        new_empty(call.h0, (stack, time, batch, hidden)),
        new(stack, batch, hidden),
        new((stack, batch, hidden) if call.cell == "lstm" else 0),
        new_empty(call.h0, (stack, time, batch, KEPT[call.cell], hidden)) if call.keep else new(0),
    )


def _fake_layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Forward(*args)
    _check_layer(call)
    return _empty_states(call)


def _gated_layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Forward(*args)
    if not on_cuda(call.h0):
        return explained(_layer_on_cpu, _check_layer, call)
    _check_layer(call)
    return layer_on_cuda(call, _empty_states(call))


def _layer_on_cpu(call: _Forward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    refuse_forward_mode("gated_layer", PLAIN_RNN)
    check_lengths("gated_layer", call.lengths, call.input.shape[1])
    outputs = states, h_n, c_n, kept = _empty_states(call)
    _C.gated_scan(
        dense_rows(call.input),
        dense(call.h0),
        dense(call.c0),
        dense(call.weight_ih),
        dense(call.weight_hh),
        dense(call.bias_ih),
        dense(call.bias_hh),
        dense(call.lengths),
        list(call.reverse),
        call.cell,
        dense(states),
        dense(h_n),
        dense(c_n) if call.cell == "lstm" else None,
        dense(kept) if call.keep else None,
        execution(states),
    )
    return outputs


_Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_options(call: _Backward) -> None:
    """What of the arguments no binding checks, and which choices there are."""
    op, members = "gated_layer_backward", call.states.shape[0]
    check_choice(op, "inverse", call.inverse, INVERSES)
    check_choice(op, "credit", call.credit, CREDITS)
    check_choice(op, "gate_slope", call.gate_slope, SLOPES)
    check_choice(op, "candidate_slope", call.candidate_slope, SLOPES)
    if call.inverse == "cell" and (call.gate_slope, call.candidate_slope) != ("derivative", "derivative"):
        raise ValueError(
            f"{op}: gate_slope and candidate_slope must be 'derivative' for inverse 'cell', got {call.gate_slope!r} "
            f"and {call.candidate_slope!r}"
        )
    for step in numbers_of(op, "target_step", call.target_step, members):
        if not 0 < step < math.inf:
            raise ValueError(f"{op}: target_step must be a finite number > 0, got {step}")
    computed_in = compute_dtype(call.states)
    least = torch.finfo(computed_in).eps
    for margin in numbers_of(op, "margin", call.margin, members):
        if not least <= margin < 0.5:
            raise ValueError(
                f"{op}: margin must be at least {least:.2g}, the precision of {computed_in}, and below 0.5, "
                f"got {margin}"
            )
    for reg in numbers_of(op, "slope_reg", call.slope_reg, members):
        if not 0 <= reg < math.inf:
            raise ValueError(f"{op}: slope_reg must be a finite number >= 0, got {reg}")
        if reg == 0 and call.inverse == "cell":
            # a unit whose gates are all shut has no inverse
            raise ValueError(f"{op}: slope_reg must be > 0 for inverse 'cell', got {reg}")
    numbers_of(op, "scale", call.scale, members)
    numbers_of(op, "input_scale", call.input_scale, members)


def _check_backward(call: _Backward) -> None:
    op, rows, kept = "gated_layer_backward", f"{GATES.get(call.cell)}H", str(KEPT.get(call.cell))
    others: dict[str, tuple[Tensor | None, Sequence[str]]] = {
        "states": (call.states, "STBH"),
        "grad_states": (call.grad_states, "STBH"),
        "kept": (call.kept, ("S", "T", "B", kept, "H")),
        "feedback": (call.feedback, ("S", rows, "H")),
        "input_feedback": (call.input_feedback, ("S", rows, "I")),
        "disp_h_n": (call.disp_h_n, "SBH"),
        "disp_c_n": (call.disp_c_n, "SBH"),
        "credit_h_n": (call.credit_h_n, "SBH"),
        "credit_c_n": (call.credit_c_n, "SBH"),
    }
    _check_gated(op, "states", call, others)
    stack, time, batch, hidden = call.states.shape
    if call.kept.shape[3] != KEPT[call.cell]:
        raise ValueError(
            f"{op}: kept must be [S={stack}, T={time}, B={batch}, {kept}, H={hidden}], got {list(call.kept.shape)}"
        )
    _check_options(call)
    if len(call.needs) != 5:
        raise ValueError(f"{op}: needs must have 5 values, got {len(call.needs)}")
    if call.needs[0] and call.input_feedback is None:
        raise ValueError(f"{op}: input_feedback must be given for a gradient of the input, got None")


def _wanted(call: _Backward) -> tuple[bool, ...]:
    """Which of the outputs are not empty."""
    has_cell, through_time = call.cell == "lstm", call.credit == "through_time"
    return *call.needs, True, has_cell, through_time, has_cell and through_time


def _empty_gradients(call: _Backward) -> _Gradients:
    stack, _, batch, hidden = call.states.shape
    of_gates, of_states, new = GATES[call.cell] * hidden, (stack, batch, hidden), call.states.new_empty
    of_input, of_weight_ih, of_weight_hh, of_bias_ih, of_bias_hh, disp_h, disp_c, credit_h, credit_c = _wanted(call)
    return (
        new_empty(call.states, call.input.shape) if of_input else new(0),
        new((stack, of_gates, call.input.shape[3]) if of_weight_ih else 0),
        new((stack, of_gates, hidden) if of_weight_hh else 0),
        new((stack, of_gates) if of_bias_ih else 0),
        new((stack, of_gates) if of_bias_hh else 0),
        new(of_states if disp_h else 0),
        new(of_states if disp_c else 0),
        new(of_states if credit_h else 0),
        new(of_states if credit_c else 0),
    )


def _fake_backward(*args: Any, **kwargs: Any) -> _Gradients:
    call = _Backward(*args, **kwargs)
    _check_backward(call)
    return _empty_gradients(call)


def _gated_layer_backward(*args: Any) -> _Gradients:
    call = _Backward(*args)
    if not on_cuda(call.states):
        return explained(_backward_on_cpu, _check_backward, call)
    _check_backward(call)
    return backward_on_cuda(call)


def _backward_on_cpu(call: _Backward) -> _Gradients:
    refuse_forward_mode("gated_layer_backward", PLAIN_RNN)
    _check_options(call)
    input, states, needs = call.input, call.states, call.needs
    check_lengths("gated_layer_backward", call.lengths, states.shape[1])
    outputs = _empty_gradients(call)
    # what each member adds, where all share one input
    shared = needs[0] and input.shape[0] != states.shape[0]
    of_member = new_empty(input, (states.shape[0], *input.shape[1:])) if shared else outputs[0]
    of_input, of_weight_ih, of_weight_hh, of_bias_ih, of_bias_hh, disp_h, disp_c, credit_h, credit_c = (
        dense(output) if wanted else None
        for output, wanted in zip((of_member, *outputs[1:]), _wanted(call), strict=True)
    )
    _C.gated_layer_backward(
        dense(call.grad_states),
        dense_rows(input),
        dense(states),
        dense(call.h0),
        dense(call.c0),
        dense(call.kept),
        dense(call.weight_hh),
        dense(call.feedback),
        dense(call.input_feedback) if needs[0] else None,
        dense(call.lengths),
        list(call.reverse),
        call.cell,
        call.inverse,
        call.credit,
        as_list(call.target_step),
        as_list(call.margin),
        call.gate_slope,
        call.candidate_slope,
        as_list(call.slope_reg),
        as_list(call.scale),
        as_list(call.input_scale),
        dense(call.disp_h_n),
        dense(call.disp_c_n),
        dense(call.credit_h_n),
        dense(call.credit_c_n),
        of_input,
        of_weight_ih,
        of_weight_hh,
        of_bias_ih,
        of_bias_hh,
        disp_h,
        disp_c,
        credit_h,
        credit_c,
        execution(states),
    )
    if shared:
        torch.sum(of_member, 0, keepdim=True, out=outputs[0])
    return outputs


def gated_jacobian_backward(*args: Any, reg: Numbers, chebyshev_steps: int | None = None) -> _Gradients:
    """``gated_layer_backward`` by the regularised inverse of a whole step, of torch's operations on any device.

    With ``J`` the Jacobian of a row's step, ``[n H, n H]`` for its n states, h and in an LSTM c::

        d_{t-1} = -target_step g_{t-1} + (J'J + reg I)^-1 J' d_t

    Args:
        args: those of ``gated_layer_backward``, with ``inverse`` "jacobian" and both slopes "derivative". ``feedback``
            is not read: J is made of ``weight_hh``.
        reg: > 0, a number for all members or one a member.
        chebyshev_steps: None: J is formed and the system solved, ``O((n H)^3)`` a row and step. K >= 1: so many steps
            of the Chebyshev iteration, ``G (2 K - 1)`` products ``[B, H] x [H, H]`` a step, linear in ``d``. The error
            is at most ``1 / T_K(1 + 2 reg / b)`` of the solution, with Chebyshev's polynomial ``T_K`` and a bound
            ``b >= |J|^2`` from the norm of the weights; for ``b = 7 reg`` and K = 2, 4, 6, 8 it is some 0.3, 0.07,
            0.02, 0.004.

    Returns:
        The outputs of ``gated_layer_backward``.

    Raises:
        ValueError: an argument does not fit, which is named.
    """
    op, call = "gated_jacobian_backward", _Backward(*args)
    check_choice(op, "inverse", call.inverse, ("jacobian",))
    # the same choices of slopes as for a unit, whose inverse has none either
    _check_backward(call._replace(inverse="cell", slope_reg=1.0))
    if are_plain((call.lengths,)):
        check_lengths(op, call.lengths, call.states.shape[1])
    ridges = numbers_of(op, "reg", reg, call.states.shape[0])
    for ridge in ridges:
        if not 0 < ridge < math.inf:
            raise ValueError(f"{op}: reg must be a finite number > 0, got {ridge}")
    if chebyshev_steps is not None and not (is_integer(chebyshev_steps) and chebyshev_steps >= 1):
        raise ValueError(f"{op}: chebyshev_steps must be None or an integer >= 1, got {chebyshev_steps!r}")
    return gated_backward_composite(call, ridges, chebyshev_steps)


_HAS_NO_DERIVATIVE = "is a part of a layer's forward or backward pass and has no derivative of its own"
gated_layer = define(
    "gated_layer(Tensor input, Tensor h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
    "Tensor? bias_hh, Tensor? lengths, bool[] reverse, str cell, bool keep) -> "
    "(Tensor states, Tensor h_n, Tensor c_n, Tensor kept)",
    _gated_layer,
    _fake_layer,
    cast_outputs=True,
    low_precision=True,
)
refuse_derivative("gated_layer", f"gated_layer {_HAS_NO_DERIVATIVE}")

gated_layer_backward = define(
    "gated_layer_backward(Tensor? grad_states, Tensor input, Tensor states, Tensor h0, Tensor? c0, Tensor kept, "
    "Tensor weight_hh, Tensor feedback, Tensor? input_feedback, Tensor? lengths, bool[] reverse, str cell, "
    "str inverse, str credit, float[1] target_step, float[1] margin, str gate_slope, str candidate_slope, "
    "float[1] slope_reg, float[1] scale, float[1] input_scale, bool[] needs, Tensor? disp_h_n=None, "
    "Tensor? disp_c_n=None, Tensor? credit_h_n=None, Tensor? credit_c_n=None) -> (Tensor grad_input, "
    "Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh, Tensor disp_h0, "
    "Tensor disp_c0, Tensor credit_h0, Tensor credit_c0)",
    _gated_layer_backward,
    _fake_backward,
    cast_outputs=False,
    low_precision=True,
)
refuse_derivative("gated_layer_backward", f"gated_layer_backward {_HAS_NO_DERIVATIVE}")
