"""Oracle of the gated layers' forward pass: GRU and LSTM, in torch's equations, gate order and weight layout.

Notation: as in :mod:`tpext.reference.rnn_scan`, with G gates, 3 of a GRU (r z n) and 4 of an LSTM (i f g o); ``s`` is
the logistic function, ``u = h_{t-1} W_hh' + b_hh`` and ``x = x_t W_ih' + b_ih`` have a part for each gate::

    GRU    r = s(x_r + u_r)   z = s(x_z + u_z)   a = u_n   n = tanh(x_n + r a)    h_t = (1 - z) n + z h_{t-1}
    LSTM   i, f, o = s(x_k + u_k)   g = tanh(x_g + u_g)                           c_t = f c_{t-1} + i g
                                                                                  h_t = o tanh(c_t)

Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), in the variant of cuDNN and
torch; Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of Gers et al. (2000).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tpext.reference.rnn_scan import Array, given_or_zeros, input_projection, promote, rows


class GatedStates(NamedTuple):
    """What a forward pass gives."""

    states: Array
    """``h``, ``[S, T, B, H]``, 0 at ``t >= lengths[b]``."""
    h_n: Array
    """``h`` after the last valid step of the run, ``[S, B, H]``: ``h0`` for rows without one."""
    c_n: Array | None
    """The LSTM's ``c`` there."""
    kept: Array
    """What a backward pass reads, ``[S, T, B, K, H]``, 0 at ``t >= lengths[b]``: r, z, n, a or i, f, g, o, c."""


def check_cell(cell: str) -> None:
    """Raise ValueError unless there is such a cell."""
    if cell not in ("gru", "lstm"):
        raise ValueError(f"cell must be 'gru' or 'lstm', got {cell!r}")


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))``, to rounding relative to itself for any ``x``."""
    small = np.exp(-np.abs(x))
    logistic: Array = np.where(x >= 0, 1, small) / (1 + small)
    return logistic


def gru_step(x: Array, u: Array, h: Array) -> tuple[Array, Array]:
    """``h_t``, and r, z, n, a as ``[4, H]``."""
    x_r, x_z, x_n = x
    u_r, u_z, a = u
    r, z = sigmoid(x_r + u_r), sigmoid(x_z + u_z)
    n = np.tanh(x_n + r * a)
    return (1 - z) * n + z * h, np.stack([r, z, n, a])


def lstm_step(x: Array, u: Array, c: Array) -> tuple[Array, Array]:
    """``h_t``, and i, f, g, o, c_t as ``[5, H]``."""
    i, f, g, o = x + u
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    c = f * c + i * g
    return o * np.tanh(c), np.stack([i, f, g, o, c])


def gated_scan(
    input: ArrayLike,
    h0: ArrayLike,
    c0: ArrayLike | None,
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    bias_ih: ArrayLike | None,
    bias_hh: ArrayLike | None,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    cell: str,
) -> GatedStates:
    """States of a GRU or LSTM layer.

    Args:
        input: ``[S or 1, T, B, I]``, of each member or shared by all; ignored at ``t >= lengths[b]``.
        h0: state before the first step of the run, ``[S, B, H]``.
        c0: the LSTM's second state there, ``[S, B, H]``; None for a GRU.
        weight_ih: ``[S, G H, I]``.
        weight_hh: ``[S, G H, H]``.
        bias_ih, bias_hh: ``[S, G H]``, or None.
        lengths, reverse: as in :func:`tpext.reference.rnn_scan`.
        cell: "gru" or "lstm".

    Returns:
        The states, those after the last step, and what :func:`tpext.reference.gated_target_pass` reads.
    """
    check_cell(cell)
    x_proj, h0, weight_hh = promote(input_projection(input, weight_ih, bias_ih), h0, weight_hh)
    S, T, B = x_proj.shape[:3]
    G, H = 3 if cell == "gru" else 4, h0.shape[-1]
    bias = given_or_zeros(bias_hh, weight_hh.shape[:2])
    states = np.zeros((S, T, B, H), x_proj.dtype)
    kept = np.zeros((S, T, B, 4 if cell == "gru" else 5, H), x_proj.dtype)
    h_n = h0.copy()
    c_n = given_or_zeros(c0, h0.shape).astype(x_proj.dtype)
    for s, b, times in rows(states.shape, lengths, reverse):
        for t in times:
            x, u = x_proj[s, t, b].reshape(G, H), (weight_hh[s] @ h_n[s, b] + bias[s]).reshape(G, H)
            if cell == "gru":
                h_n[s, b], kept[s, t, b] = gru_step(x, u, h_n[s, b])
            else:
                h_n[s, b], kept[s, t, b] = lstm_step(x, u, c_n[s, b])
                c_n[s, b] = kept[s, t, b, 4]
            states[s, t, b] = h_n[s, b]
    return GatedStates(states, h_n, c_n if cell == "lstm" else None, kept)
