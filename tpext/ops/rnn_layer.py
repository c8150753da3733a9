"""The simple recurrent layer around its scan: what training steps are made of.

``torch.ops.tpext.rnn_layer(input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity) -> (h, h_n)``::

    h_t = a(x_t U' + b + h_{t-1} W')        input [S or 1, T, B, I], U = weight_ih [S, H, I], b = bias [S, H] or None

``torch.ops.tpext.rnn_layer_backward(grad_states, input, states, h0, weight_hh, feedback, input_feedback, pre, lengths,
reverse, nonlinearity, correction, credit, target_step, margin, slope, slope_reg, scale, input_scale, of_displacement,
needs, disp_n=None, credit_n=None) -> (grad_input, grad_weight_ih, grad_weight_hh, grad_bias, disp_h0, credit_h0)`` is a
target pass, with ``P = feedback [S, H, H]``, as ``rnn_target_scan`` defines it, and the gradients that its ``delta``
gives (``target_step``, ``margin``, ``slope_reg``, ``scale`` and ``input_scale`` are numbers of all members, or lists
with one for each)::

    [dU, dW, db] = scale * sum_t delta_t' [x_t, h_{t-1}, 1]
    dx_t = input_scale * delta_t F    or, of_displacement, input_scale * z_t F        F = input_feedback [S, H, I]

``pre [S, T, B, H]`` is ``x_proj`` for correction "none" and ``reverse_pre`` for "learned", whose ``feedback`` is the
reverse layer's ``V'``; else None. ``needs`` says which of the first four outputs are wanted; the others are empty, as
``credit_h0`` is under "local". ``grad_input`` has the input's shape: members that share an input add to it.

``torch.ops.tpext.rnn_weight_gradients(delta, states, h0, input, lengths, reverse, scale) -> (dU, dW, db)`` is the sum
alone, for a delta that stands in memory, where it must be zero beyond ``lengths``.

On the CPU the projection of the input is computed inside the scan. The backward pass goes by tiles of time, whose delta
stays in the cache: neither the projection nor delta stands in memory, but for delta where rows are many and steps few
(B 512, T 64, H 256, say), which would need sums as large. On CUDA they do, and the large products are torch's.
``h_n [S, B, H]`` is the state after each row's last valid step, ``h0`` without one.

Stack, ``reverse``, ``lengths``, dtypes and determinism are those of ``rnn_scan``. These ops have no derivative of
their own: ``tpext.nn.RNN(rule=Backprop())``, which is made of them, has, of every order. Where ``grad_states`` is None
and the displacement has faded to nothing, the pass may end, and does on the CPU without ``lengths`` (correction "none"
never fades); it then does not read states and inputs further back, so that what is not finite there goes unseen.

Cost, of a row and step: ``2 H (H + I)`` operations forward, ``2 H (2 H + I)`` backward, ``2 H^2`` more through time
and ``2 H I`` for the input's gradient.

Raises:
    ValueError: as ``rnn_scan`` and ``rnn_target_scan`` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    PLAIN_RNN,
    check_lengths,
    check_scan,
    define,
    dense,
    dense_rows,
    execution,
    explained,
    on_cuda,
    refuse_derivative,
    refuse_forward_mode,
)
from tpext.ops._members import Numbers, as_list, by_numbers, numbers_of
from tpext.ops._memory import new_empty
from tpext.ops._rnn_products import WeightSums, input_gradient, input_projection, weight_gradients
from tpext.ops.rnn_scan import scan_projected
from tpext.ops.rnn_target_scan import check_pass, rnn_learned_target_scan, rnn_target_scan


def _check_members(op: str, input: Tensor, stack: int) -> None:
    if input.shape[0] not in (1, stack):
        time, batch, size = input.shape[1:]
        raise ValueError(
            f"{op}: input must be [S={stack} or 1, T={time}, B={batch}, I={size}], got {list(input.shape)}"
        )


class RnnLayer(NamedTuple):
    """The arguments of ``rnn_layer``."""

    input: Tensor
    h0: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    lengths: Tensor | None
    reverse: Sequence[bool]
    nonlinearity: str


def _check_layer(call: RnnLayer) -> None:
    tensors = {
        "input": (call.input, "NTBI"),
        "h0": (call.h0, "SBH"),
        "weight_ih": (call.weight_ih, "SHI"),
        "weight_hh": (call.weight_hh, "SHH"),
        "bias": (call.bias, "SH"),
    }
    check_scan("rnn_layer", "input", tensors, call.lengths, call.reverse, call.nonlinearity)
    _check_members("rnn_layer", call.input, call.h0.shape[0])


def _empty_states(call: RnnLayer) -> tuple[Tensor, Tensor]:
    stack, batch, hidden = call.h0.shape
    states = new_empty(call.h0, (stack, call.input.shape[1], batch, hidden))
    return states, call.h0.new_empty(stack, batch, hidden)


def _fake_layer(*args: Any) -> tuple[Tensor, Tensor]:
    call = RnnLayer(*args)
    _check_layer(call)
    return _empty_states(call)


def _rnn_layer(*args: Any) -> tuple[Tensor, Tensor]:
    call = RnnLayer(*args)
    if not on_cuda(call.h0):
        return explained(_layer_on_cpu, _check_layer, call)
    _check_layer(call)
    states, h_n = _empty_states(call)
    x_proj = input_projection(call.input, call.weight_ih, call.bias)
    run = (call.lengths, call.reverse, call.nonlinearity)
    scan_projected(x_proj, call.h0, call.weight_hh, *run, states, h_n)
    return states, h_n


def _layer_on_cpu(call: RnnLayer) -> tuple[Tensor, Tensor]:
    refuse_forward_mode("rnn_layer", PLAIN_RNN)
    check_lengths("rnn_layer", call.lengths, call.input.shape[1])
    states, h_n = _empty_states(call)
    _C.rnn_scan(
        None,
        dense_rows(call.input),
        dense(call.weight_ih),
        dense(call.bias),
        dense(call.h0),
        dense(call.weight_hh),
        dense(call.lengths),
        list(call.reverse),
        call.nonlinearity,
        dense(states),
        dense(h_n),
        execution(states),
    )
    return states, h_n


class _Backward(NamedTuple):
    """The arguments of ``rnn_layer_backward``."""

    grad_states: Tensor | None
    input: Tensor
    states: Tensor
    h0: Tensor
    weight_hh: Tensor
    feedback: Tensor
    input_feedback: Tensor | None
    pre: Tensor | None
    lengths: Tensor | None
    reverse: Sequence[bool]
    nonlinearity: str
    correction: str
    credit: str
    target_step: Numbers
    margin: Numbers
    slope: str
    slope_reg: Numbers
    scale: Numbers
    input_scale: Numbers
    of_displacement: bool
    needs: Sequence[bool]
    disp_n: Tensor | None = None
    credit_n: Tensor | None = None


_Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_backward(call: _Backward) -> None:
    op, states, input = "rnn_layer_backward", call.states, call.input
    tensors = {
        "states": (states, "STBH"),
        "input": (input, "NTBI"),
        "grad_states": (call.grad_states, "STBH"),
        "h0": (call.h0, "SBH"),
        "weight_hh": (call.weight_hh, "SHH"),
        "feedback": (call.feedback, "SHH"),
        "input_feedback": (call.input_feedback, "SHI"),
        "pre": (call.pre, "STBH"),
        "disp_n": (call.disp_n, "SBH"),
        "credit_n": (call.credit_n, "SBH"),
    }
    check_scan(op, "states", tensors, call.lengths, call.reverse, call.nonlinearity)
    _check_members(op, input, states.shape[0])
    _check_options(call)
    if len(call.needs) != 4:
        raise ValueError(f"{op}: needs must have 4 values, got {len(call.needs)}")
    if call.needs[0] and call.input_feedback is None:
        raise ValueError(f"{op}: input_feedback must be given for a gradient of the input, got None")
    if call.correction in ("none", "learned") and call.pre is None:
        raise ValueError(f"{op}: pre must be given for correction '{call.correction}', got None")


def _check_options(call: _Backward) -> None:
    """What of the arguments no binding checks."""
    op, members = "rnn_layer_backward", call.states.shape[0]
    how = (call.correction, call.credit, call.target_step, call.margin, call.slope, call.slope_reg)
    check_pass(op, call.states, *how, learned=True)
    numbers_of(op, "scale", call.scale, members)
    numbers_of(op, "input_scale", call.input_scale, members)
    if call.of_displacement and call.correction == "learned":
        raise ValueError(f"{op}: of_displacement must be False for correction 'learned', which has no z, got True")


def _empty_gradients(call: _Backward) -> _Gradients:
    input, states = call.input, call.states
    stack, _, batch, hidden = states.shape
    of_input, of_weight_ih, of_weight_hh, of_bias = call.needs
    return (
        new_empty(input, input.shape) if of_input else input.new_empty(0),
        states.new_empty((stack, hidden, input.shape[3]) if of_weight_ih else 0),
        states.new_empty((stack, hidden, hidden) if of_weight_hh else 0),
        states.new_empty((stack, hidden) if of_bias else 0),
        states.new_empty(stack, batch, hidden),
        states.new_empty((stack, batch, hidden) if call.credit == "through_time" else 0),
    )


def _fake_backward(*args: Any, **kwargs: Any) -> _Gradients:
    call = _Backward(*args, **kwargs)
    _check_backward(call)
    return _empty_gradients(call)


def _rnn_layer_backward(*args: Any) -> _Gradients:
    call = _Backward(*args)
    if not on_cuda(call.states):
        return explained(_backward_on_cpu, _check_backward, call)
    _check_backward(call)
    return by_numbers(_backward_by_products, call)  # type: ignore[no-any-return]


def _backward_on_cpu(call: _Backward) -> _Gradients:
    refuse_forward_mode("rnn_layer_backward", PLAIN_RNN)
    _check_options(call)
    if call.pre is not None and call.correction not in ("none", "learned"):
        # no kernel reads it, nor looks at it
        _check_backward(call)
    input, states, feedback, needs = call.input, call.states, call.feedback, call.needs
    check_lengths("rnn_layer_backward", call.lengths, states.shape[1])
    outputs = _empty_gradients(call)
    of_input, of_weight_ih, of_weight_hh, of_bias, disp_h0, credit_h0 = outputs
    # what each member adds, where all share one input
    shared = needs[0] and input.shape[0] != states.shape[0]
    of_member = new_empty(input, (states.shape[0], *input.shape[1:])) if shared else of_input
    # the kernel takes either orientation, so a matrix that came as a transpose is not copied
    turned = feedback.transpose(1, 2)
    transposed = turned.is_contiguous()
    _C.rnn_layer_backward(
        dense(call.grad_states),
        dense(call.disp_n),
        dense(call.credit_n),
        dense_rows(input),
        dense(states),
        dense(call.h0),
        dense(call.weight_hh),
        dense(turned if transposed else feedback),
        transposed,
        dense(call.input_feedback) if needs[0] else None,
        dense(call.pre),
        dense(call.lengths),
        list(call.reverse),
        call.nonlinearity,
        call.correction,
        call.credit,
        as_list(call.target_step),
        as_list(call.margin),
        call.slope,
        as_list(call.slope_reg),
        as_list(call.scale),
        as_list(call.input_scale),
        call.of_displacement,
        dense(of_member) if needs[0] else None,
        dense(of_weight_ih) if needs[1] else None,
        dense(of_weight_hh) if needs[2] else None,
        dense(of_bias) if needs[3] else None,
        dense(disp_h0),
        dense(credit_h0) if call.credit == "through_time" else None,
        execution(states),
    )
    if shared:
        torch.sum(of_member, 0, keepdim=True, out=of_input)
    return outputs


def _backward_by_products(call: _Backward) -> _Gradients:
    """The same by a pass that leaves delta in memory, then torch's products."""
    states, input, needs = call.states, call.input, call.needs
    run = (call.lengths, call.reverse, call.nonlinearity)
    if call.correction == "learned":
        delta, first, _, credited = rnn_learned_target_scan(
            call.grad_states,
            states,
            call.weight_hh,
            call.feedback.mT,
            call.pre,
            *run,
            call.credit,
            call.target_step,
            False,
            call.disp_n,
            call.credit_n,
        )
        displacement = delta
    else:
        delta, first, _, displacement, credited = rnn_target_scan(
            call.grad_states,
            states,
            call.h0,
            call.weight_hh,
            call.feedback.mT,
            call.pre,
            *run,
            call.correction,
            call.credit,
            call.target_step,
            call.margin,
            False,
            call.of_displacement,
            call.disp_n,
            call.credit_n,
            call.slope,
            call.slope_reg,
        )
    of_input = delta.new_empty(0)
    if needs[0]:
        assert call.input_feedback is not None
        rows = displacement if call.of_displacement else delta
        of_input = input_gradient(rows, call.input_feedback, as_list(call.input_scale)[0], input)
    sums = WeightSums(delta, states, call.h0, input, call.lengths, call.reverse, as_list(call.scale)[0])
    return of_input, *weight_gradients(sums, needs[1:]), first, credited


def _check_weight_gradients(call: WeightSums) -> None:
    delta, input = call.delta, call.input
    tensors = {
        "delta": (delta, "STBH"),
        "states": (call.states, "STBH"),
        "h0": (call.h0, "SBH"),
        "input": (input, "NTBI"),
    }
    check_scan("rnn_weight_gradients", "delta", tensors, call.lengths, call.reverse)
    _check_members("rnn_weight_gradients", input, delta.shape[0])


def _empty_weight_gradients(call: WeightSums) -> tuple[Tensor, Tensor, Tensor]:
    stack, _, _, hidden = call.delta.shape
    return (
        call.delta.new_empty(stack, hidden, call.input.shape[3]),
        call.delta.new_empty(stack, hidden, hidden),
        call.delta.new_empty(stack, hidden),
    )


def _fake_weight_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = WeightSums(*args)
    _check_weight_gradients(call)
    return _empty_weight_gradients(call)


def _rnn_weight_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = WeightSums(*args)
    _check_weight_gradients(call)
    if on_cuda(call.delta):
        return weight_gradients(call)
    check_lengths("rnn_weight_gradients", call.lengths, call.states.shape[1])
    grad_weight_ih, grad_weight_hh, grad_bias = _empty_weight_gradients(call)
    _C.rnn_weight_gradients(
        dense(call.delta),
        dense(call.states),
        dense(call.h0),
        dense_rows(call.input),
        dense(call.lengths),
        list(call.reverse),
        [call.scale],
        dense(grad_weight_ih),
        dense(grad_weight_hh),
        dense(grad_bias),
        execution(call.delta),
    )
    return grad_weight_ih, grad_weight_hh, grad_bias


_HAS_NO_DERIVATIVE = (
    "is a part of a layer's forward or backward pass and has no derivative of its own; differentiate "
    "tpext.nn.RNN(rule=tpext.Backprop()), or torch.ops.tpext.rnn_scan"
)
rnn_layer = define(
    "rnn_layer(Tensor input, Tensor h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor? lengths, "
    "bool[] reverse, str nonlinearity) -> (Tensor states, Tensor h_n)",
    _rnn_layer,
    _fake_layer,
    cast_outputs=True,
    low_precision=True,
)
refuse_derivative("rnn_layer", f"rnn_layer {_HAS_NO_DERIVATIVE}")

rnn_layer_backward = define(
    "rnn_layer_backward(Tensor? grad_states, Tensor input, Tensor states, Tensor h0, Tensor weight_hh, "
    "Tensor feedback, Tensor? input_feedback, Tensor? pre, Tensor? lengths, bool[] reverse, str nonlinearity, "
    "str correction, str credit, float[1] target_step, float[1] margin, str slope, float[1] slope_reg, float[1] scale, "
    "float[1] input_scale, bool of_displacement, bool[] needs, Tensor? disp_n=None, Tensor? credit_n=None) -> "
    "(Tensor grad_input, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias, Tensor disp_h0, "
    "Tensor credit_h0)",
    _rnn_layer_backward,
    _fake_backward,
    cast_outputs=False,
    low_precision=True,
)
refuse_derivative("rnn_layer_backward", f"rnn_layer_backward {_HAS_NO_DERIVATIVE}")

rnn_weight_gradients = define(
    "rnn_weight_gradients(Tensor delta, Tensor states, Tensor h0, Tensor input, Tensor? lengths, bool[] reverse, "
    "float scale) -> (Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias)",
    _rnn_weight_gradients,
    _fake_weight_gradients,
    cast_outputs=False,
    low_precision=True,
)
refuse_derivative("rnn_weight_gradients", f"rnn_weight_gradients {_HAS_NO_DERIVATIVE}")
