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
stays in the cache: neither the projection nor delta ever stands in memory. On CUDA they do, and the large products are
torch's. ``h_n [S, B, H]`` is the state after each row's last valid step, ``h0`` without one.

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
    check_lengths,
    check_scan,
    define,
    dense,
    dense_rows,
    execution,
    on_cuda,
    refuse_derivative,
)
from tpext.ops._members import Numbers, as_list, differ, each_alone, numbers_of
from tpext.ops.rnn_products import input_projection, weight_gradients
from tpext.ops.rnn_scan import scan_projected
from tpext.ops.rnn_target_scan import check_pass, rnn_learned_target_scan, rnn_target_scan


def _check_members(op: str, input: Tensor, stack: int) -> None:
    if input.shape[0] not in (1, stack):
        time, batch, size = input.shape[1:]
        raise ValueError(
            f"{op}: input must be [S={stack} or 1, T={time}, B={batch}, I={size}], got {list(input.shape)}"
        )


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
        "input": (input, "NTBI"),
        "h0": (h0, "SBH"),
        "weight_ih": (weight_ih, "SHI"),
        "weight_hh": (weight_hh, "SHH"),
        "bias": (bias, "SH"),
    }
    check_scan("rnn_layer", "input", tensors, lengths, reverse, nonlinearity)
    stack, batch, hidden = h0.shape
    _check_members("rnn_layer", input, stack)
    return h0.new_empty(stack, input.shape[1], batch, hidden), h0.new_empty(h0.shape)


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
    check_lengths("rnn_layer", lengths, input.shape[1])
    if on_cuda(states):
        x_proj = input_projection(input, weight_ih, bias)
        scan_projected(x_proj, h0, weight_hh, lengths, reverse, nonlinearity, states, h_n)
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


def _prepare_backward(*args: Any, **kwargs: Any) -> _Gradients:
    """Check the arguments and return empty outputs: all that the fake implementation does."""
    op, call = "rnn_layer_backward", _Backward(*args, **kwargs)
    states, input, needs = call.states, call.input, call.needs
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
    stack, _, batch, hidden = states.shape
    _check_members(op, input, stack)
    how = (call.correction, call.credit, call.target_step, call.margin, call.slope, call.slope_reg)
    check_pass(op, states, *how, learned=True)
    numbers_of(op, "scale", call.scale, stack)
    numbers_of(op, "input_scale", call.input_scale, stack)
    if len(needs) != 4:
        raise ValueError(f"{op}: needs must have 4 values, got {len(needs)}")
    if needs[0] and call.input_feedback is None:
        raise ValueError(f"{op}: input_feedback must be given for a gradient of the input, got None")
    if call.of_displacement and call.correction == "learned":
        raise ValueError(f"{op}: of_displacement must be False for correction 'learned', which has no z, got True")
    if call.correction in ("none", "learned") and call.pre is None:
        raise ValueError(f"{op}: pre must be given for correction '{call.correction}', got None")
    return (
        input.new_empty(input.shape if needs[0] else 0),
        states.new_empty((stack, hidden, input.shape[3]) if needs[1] else 0),
        states.new_empty((stack, hidden, hidden) if needs[2] else 0),
        states.new_empty((stack, hidden) if needs[3] else 0),
        states.new_empty(stack, batch, hidden),
        states.new_empty((stack, batch, hidden) if call.credit == "through_time" else 0),
    )


def _rnn_layer_backward(*args: Any) -> _Gradients:
    call = _Backward(*args)
    outputs = _prepare_backward(*call)
    check_lengths("rnn_layer_backward", call.lengths, call.states.shape[1])
    if on_cuda(call.states):
        return _backward_on_cuda(call)
    of_input, of_weight_ih, of_weight_hh, of_bias, disp_h0, credit_h0 = outputs
    input, feedback, needs = call.input, call.feedback, call.needs
    # what each member adds, where all share one input
    shared = needs[0] and input.shape[0] != call.states.shape[0]
    of_member = input.new_empty(call.states.shape[0], *input.shape[1:]) if shared else of_input
    # the kernel takes either orientation, so a matrix that came as a transpose is not copied
    transposed = feedback.mT.is_contiguous()
    _C.rnn_layer_backward(
        dense(call.grad_states),
        dense(call.disp_n),
        dense(call.credit_n),
        dense_rows(input),
        dense(call.states),
        dense(call.h0),
        dense(call.weight_hh),
        dense(feedback.mT if transposed else feedback),
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
        execution(call.states),
    )
    if shared:
        torch.sum(of_member, 0, keepdim=True, out=of_input)
    return outputs


def _backward_on_cuda(call: _Backward) -> _Gradients:
    """The same where kernels take one number: members with numbers of their own go one after another."""
    numbers = (call.target_step, call.margin, call.slope_reg, call.scale, call.input_scale)
    if not differ(*map(as_list, numbers)):
        return _backward_by_products(call)
    of_input, *others = each_alone(_backward_by_products, call)
    if call.needs[0] and call.input.shape[0] != call.states.shape[0]:
        of_input = of_input.sum(0, keepdim=True)
    return of_input, *others


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
    nothing = delta.new_empty(0)
    of_input, of_parameters = nothing, (nothing, nothing, nothing)
    if needs[0]:
        assert call.input_feedback is not None
        scale = as_list(call.input_scale)[0]
        matrix = call.input_feedback if scale == 1 else call.input_feedback * scale
        of_member = torch.bmm((displacement if call.of_displacement else delta).flatten(1, 2), matrix)
        of_input = of_member.view(states.shape[0], *input.shape[1:])
        if input.shape[0] != states.shape[0]:
            of_input = of_input.sum(0, keepdim=True)
    if any(needs[1:]):
        found = weight_gradients(delta, states, call.h0, input, call.lengths, call.reverse, as_list(call.scale)[0])
        weight_ih, weight_hh, bias = (g if need else nothing for g, need in zip(found, needs[1:], strict=True))
        of_parameters = (weight_ih, weight_hh, bias)
    return of_input, *of_parameters, first, credited


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
    tensors = {"delta": (delta, "STBH"), "states": (states, "STBH"), "h0": (h0, "SBH"), "input": (input, "NTBI")}
    check_scan("rnn_weight_gradients", "delta", tensors, lengths, reverse)
    stack, _, _, hidden = delta.shape
    _check_members("rnn_weight_gradients", input, stack)
    return (
        delta.new_empty(stack, hidden, input.shape[3]),
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
        return weight_gradients(delta, states, h0, input, lengths, reverse, scale)
    _C.rnn_weight_gradients(
        dense(delta),
        dense(states),
        dense(h0),
        dense_rows(input),
        dense(lengths),
        list(reverse),
        [scale],
        dense(grad_weight_ih),
        dense(grad_weight_hh),
        dense(grad_bias),
        execution(delta),
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
    _prepare_layer,
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
    _prepare_backward,
    cast_outputs=False,
    low_precision=True,
)
refuse_derivative("rnn_layer_backward", f"rnn_layer_backward {_HAS_NO_DERIVATIVE}")

rnn_weight_gradients = define(
    "rnn_weight_gradients(Tensor delta, Tensor states, Tensor h0, Tensor input, Tensor? lengths, bool[] reverse, "
    "float scale) -> (Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias)",
    _rnn_weight_gradients,
    _prepare_weight_gradients,
    cast_outputs=False,
    low_precision=True,
)
refuse_derivative("rnn_weight_gradients", f"rnn_weight_gradients {_HAS_NO_DERIVATIVE}")
