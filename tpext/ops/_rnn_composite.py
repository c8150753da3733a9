"""The forward pass of a simple recurrent layer by torch's operations alone, which torch.func transforms.

:func:`rnn_layer_composite` is :mod:`tpext.ops.rnn_layer`'s op, which has the equation. What
:mod:`tpext.ops._gated_composite` says of its own is true of it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tpext.ops._library import autocast_outputs, autocasts, cast, full_precision
from tpext.ops._recurrent_steps import of_run, over_time, where_valid
from tpext.ops._rnn_products import projected_run

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda u: u,
}


def rnn_layer_composite(
    input: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """``rnn_layer`` with derivatives of every kind and order: ``states, h_n``, arguments and results as it has them.

    Under autocast it runs in float32, and its outputs get the autocast dtype, as the op's do.
    """
    device = input.device.type
    if autocasts(device):
        tensors = (input, h0, weight_ih, weight_hh, bias)
        arguments: list[Any] = [*(cast(tensor, torch.float32) for tensor in tensors), lengths, reverse, nonlinearity]
        with full_precision(device):
            return autocast_outputs(rnn_layer_composite(*arguments), device)  # type: ignore[no-any-return]
    x_proj, valid = projected_run(input, weight_ih, bias, lengths, reverse)
    activate, matrix, h = _ACTIVATIONS[nonlinearity], weight_hh.mT, h0.clone()
    states = []
    for step in range(input.shape[1]):
        new = activate(torch.baddbmm(x_proj[:, step], h, matrix))
        on = None if valid is None else valid[:, step]
        h = where_valid(on, new, h)
        states.append(where_valid(on, new, 0))
    return of_run(over_time(states, h0), reverse), h
