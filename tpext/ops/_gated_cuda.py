"""GRU and LSTM on CUDA: sweeps over time by the kernels, everything else by torch's large products.

The forward pass is a product of all inputs, then a sweep; the backward pass a sweep that leaves delta, by blocks of H
(csrc/core/gated.h), then the products that make of it the gradients. Equations and arguments are those of
:mod:`tpext.ops.gated_layer`, whose ops come here; arguments are not checked here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import PLAIN_RNN, Execution, dense, gated_plan, refuse_forward_mode, run_scan
from tpext.ops._members import as_list, by_numbers
from tpext.ops._rnn_products import WeightSums, input_gradient, input_projection, weight_gradients

if TYPE_CHECKING:
    from tpext.ops.gated_layer import _Backward, _Forward, _Gradients


def layer_on_cuda(
    call: _Forward, outputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``gated_layer``, into ``outputs``."""
    states, h_n, c_n, kept = outputs
    bias, bias_n = call.bias_ih, None
    if bias is not None and call.bias_hh is not None:
        if call.cell == "lstm":
            bias = bias + call.bias_hh
        else:
            # the candidate's stands inside the product with r
            of_gates = 2 * call.h0.shape[2]
            bias_n = call.bias_hh[:, of_gates:]
            bias = torch.cat([bias[:, :of_gates] + call.bias_hh[:, :of_gates], bias[:, of_gates:]], 1)
    x_proj = input_projection(call.input, call.weight_ih, bias)

    def run(how: Execution) -> None:
        _C.gated_projected_scan(
            dense(x_proj),
            dense(bias_n),
            dense(call.h0),
            dense(call.c0),
            dense(call.weight_hh),
            dense(call.lengths),
            list(call.reverse),
            call.cell,
            dense(states),
            dense(h_n),
            dense(c_n) if call.cell == "lstm" else None,
            dense(kept) if call.keep else None,
            how,
        )

    plan = functools.partial(gated_plan, call.cell, "forward")
    run_scan("gated_layer", run, states, ((call.weight_hh, True),), call.h0, plan)
    return outputs


def backward_on_cuda(call: _Backward) -> _Gradients:
    """``gated_layer_backward``."""
    refuse_forward_mode("gated_layer_backward", PLAIN_RNN)
    return by_numbers(_by_products, call)  # type: ignore[no-any-return]


def _by_products(call: _Backward) -> _Gradients:
    states, needs = call.states, call.needs
    delta, *first = _target_scan(call)
    hidden = delta.shape[4]
    rows = delta.flatten(3)
    # of a GRU (a, r, z) meet the state, (r, z, n) the input
    of_state, of_input = (rows, rows) if call.cell == "lstm" else (rows[..., : 3 * hidden], rows[..., hidden:])
    grad_input = delta.new_empty(0)
    if needs[0]:
        assert call.input_feedback is not None
        grad_input = input_gradient(of_input, call.input_feedback, as_list(call.input_scale)[0], call.input)
    run = (states, call.h0, call.input, call.lengths, call.reverse, as_list(call.scale)[0])
    grad_weight_ih, _, grad_bias_ih = weight_gradients(WeightSums(of_input, *run), (needs[1], False, needs[3]))
    _, grad_weight_hh, grad_bias_hh = weight_gradients(WeightSums(of_state, *run), (False, needs[2], needs[4]))
    if call.cell == "gru":
        # from (a, r, z) to the order of gates
        grad_weight_hh = torch.roll(grad_weight_hh, -hidden, 1) if needs[2] else grad_weight_hh
        grad_bias_hh = torch.roll(grad_bias_hh, -hidden, 1) if needs[4] else grad_bias_hh
    return grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, *first  # type: ignore[return-value]


def _target_scan(call: _Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Delta ``[S, T, B, D, H]``, and displacements and credits that reach the initial states, empty where not asked."""
    states, has_cell, through_time = call.states, call.cell == "lstm", call.credit == "through_time"
    stack, time, batch, hidden = states.shape
    delta = states.new_empty(stack, time, batch, 4, hidden)
    wanted = (True, has_cell, through_time, has_cell and through_time)
    first = tuple(states.new_empty((stack, batch, hidden) if want else 0) for want in wanted)

    def run(how: Execution) -> None:
        disp_h, disp_c, credit_h, credit_c = (
            dense(state) if want else None for state, want in zip(first, wanted, strict=True)
        )
        _C.gated_target_scan(
            dense(call.grad_states),
            dense(states),
            dense(call.h0),
            dense(call.c0),
            dense(call.kept),
            dense(call.weight_hh),
            dense(call.feedback),
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
            dense(call.disp_h_n),
            dense(call.disp_c_n),
            dense(call.credit_h_n),
            dense(call.credit_c_n),
            dense(delta),
            disp_h,
            disp_c,
            credit_h,
            credit_c,
            how,
        )

    products = ((call.feedback, False), (call.weight_hh, False))
    plan = functools.partial(gated_plan, call.cell, call.credit)
    run_scan("gated_layer_backward", run, states, products if through_time else products[:1], None, plan)
    return delta, *first  # type: ignore[return-value]
