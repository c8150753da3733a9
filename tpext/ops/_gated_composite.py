"""The forward pass of GRU and LSTM by torch's operations alone: on any device, in any dtype, of every derivative.

:func:`gated_layer_composite` is :mod:`tpext.ops.gated_layer`'s op, which has the equations, where no kernel serves:
where a derivative is differentiated, under torch.func's transforms, on a device without kernels. Arguments are not
checked here: the op does. Bits may depend on batch and threads, as those of torch's products do. All members run side
by side, each in its own order of steps, so that both directions share a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpext.ops._library import autocast_outputs, autocasts, cast, full_precision
from tpext.ops._recurrent_steps import of_run, over_time, where_valid
from tpext.ops._rnn_products import projected_run


def gated_layer_composite(
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    cell: str,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``gated_layer`` with derivatives: ``states, h_n, c_n, kept``, arguments and results as it has them.

    Under autocast it runs in float32, and its outputs get the autocast dtype, as the op's do.
    """
    device = input.device.type
    if autocasts(device):
        tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
        arguments: list[Any] = [*(cast(tensor, torch.float32) for tensor in tensors), lengths, reverse, cell, keep]
        with full_precision(device):
            return autocast_outputs(gated_layer_composite(*arguments), device)  # type: ignore[no-any-return]
    x_proj, valid = projected_run(input, weight_ih, bias_ih, lengths, reverse)
    matrix, bias = weight_hh.mT, None if bias_hh is None else bias_hh.unsqueeze(1)
    h, c = h0.clone(), None if c0 is None else c0.clone()
    states, kept = [], []
    for step in range(input.shape[1]):
        u = torch.bmm(h, matrix) if bias is None else torch.baddbmm(bias, h, matrix)
        new, gates = _gru_step(x_proj[:, step], u, h) if c is None else _lstm_step(x_proj[:, step], u, c)
        on = None if valid is None else valid[:, step]
        h = where_valid(on, new, h)
        c = None if c is None else where_valid(on, gates[4], c)
        states.append(where_valid(on, new, 0))
        if keep:
            kept.append(where_valid(None if on is None else on.unsqueeze(2), torch.stack(gates, 2), 0))
    gates_kept = 4 if c is None else 5
    return (
        of_run(over_time(states, h0), reverse),
        h,
        h0.new_empty(0) if c is None else c,
        of_run(over_time(kept, h0.unsqueeze(2).expand(-1, -1, gates_kept, -1)), reverse) if keep else h0.new_empty(0),
    )


def _gru_step(x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The state, and r, z, n, a."""
    x_r, x_z, x_n = x.chunk(3, -1)
    u_r, u_z, a = u.chunk(3, -1)
    r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
    n = torch.tanh(x_n + r * a)
    return n + z * (h - n), (r, z, n, a)


def _lstm_step(x: Tensor, u: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The state h, and i, f, g, o, c."""
    i, f, g, o = (x + u).chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    return o * torch.tanh(c), (i, f, g, o, c)
