"""Oracle of the gated layers' backward pass, under every rule that is linear in what it carries.

Notation: as in :mod:`tpext.reference.gated_scan` and, for one step, :mod:`tpext.reference.gated_inverses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tpext.reference.gated_inverses import Way, gru_derivatives, lstm_derivatives, move_before, through_cell
from tpext.reference.gated_scan import check_cell
from tpext.reference.regularized_inverse import regularized_inverse
from tpext.reference.rnn_scan import Array, each_member, given_or_zeros, input_gradient, promote, rows


class GatedPass(NamedTuple):
    """What a backward pass gives: the nine outputs of the op, None where it gives none, and the displacements."""

    input: Array | None
    weight_ih: Array | None
    weight_hh: Array | None
    bias_ih: Array | None
    bias_hh: Array | None
    disp_h0: Array
    disp_c0: Array | None
    credit_h0: Array | None
    credit_c0: Array | None
    d_h: Array
    """``d`` of ``h_t``, ``[S, T, B, H]``, 0 at ``t >= lengths[b]``."""
    d_c: Array | None
    """``d`` of ``c_t``, without what it has to move by for ``h_t``."""


def gated_feedback(weight_hh: ArrayLike, reg: float, inverse: str) -> Array:
    """``P [S, G H, H]`` by regularised inverses: of each gate's ``W_k`` for "branch", of ``W`` for "cell"."""
    W = np.asarray(weight_hh, np.float64)
    S, _, H = W.shape
    if inverse == "cell":
        return np.swapaxes(regularized_inverse(W, reg), 1, 2)
    return np.swapaxes(regularized_inverse(W.reshape(S, -1, H, H), reg), 2, 3).reshape(W.shape)


def states_before(states: Array, start: Array, lengths: ArrayLike | None, reverse: Sequence[bool]) -> Array:
    """The state before each step of the run, ``[S, T, B, H]``, 0 at ``t >= lengths[b]``."""
    found = np.zeros_like(states)
    for s, b, times in rows(states.shape, lengths, reverse):
        previous = start[s, b]
        for t in times:
            found[s, t, b], previous = previous, states[s, t, b]
    return found


def gated_target_pass(
    grad_states: ArrayLike | None,
    input: ArrayLike,
    states: ArrayLike,
    h0: ArrayLike,
    c0: ArrayLike | None,
    kept: ArrayLike,
    weight_hh: ArrayLike,
    feedback: ArrayLike,
    input_feedback: ArrayLike | None,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    cell: str,
    inverse: str,
    credit: str,
    target_step: float | Sequence[float],
    margin: float | Sequence[float],
    gate_slope: str,
    candidate_slope: str,
    slope_reg: float | Sequence[float],
    scale: float | Sequence[float],
    input_scale: float | Sequence[float],
    needs: Sequence[bool],
    disp_h_n: ArrayLike | None = None,
    disp_c_n: ArrayLike | None = None,
    credit_h_n: ArrayLike | None = None,
    credit_c_n: ArrayLike | None = None,
    *,
    reg: float | Sequence[float] = 1.0,
    chebyshev_steps: int | None = None,
) -> GatedPass:
    """Backward pass of a gated layer, from the last step of the run to the first.

    With ``g`` the gradient of ``h_t`` and ``P`` the feedback matrix, row vectors, ``m`` the moves wanted of ``u``::

        d_t = [-target_step g_t, 0] + what step t + 1 wants of step t
        GRU:   step t wants of h_{t-1}  m_t P + direct_t
        LSTM:  step t wants of h_{t-1}  m_t P,  of c_{t-1}  direct_t

    branch, GRU:    direct = z d,    m = [d (1-z) S_t(n) a S_s(r),  d (h_{t-1} - n) S_s(z),  d (1-z) S_t(n) r]
    branch, LSTM:   direct = f D,    m = [D g S_s(i),  D c_{t-1} S_s(f),  D i S_t(g),  d_h tanh(c_t) S_s(o)],
                    D = d_c + d_h o S_t(tanh(c_t))
    cell:           (m, direct) = A' (A A' + slope_reg I)^-1 d of each unit, A: derivatives of its states
    jacobian:       (J'J + reg I)^-1 J' d in place of ``m P`` and ``direct``, J of the whole step

    ``S_s``, ``S_t`` are the slopes of sigmoid and tanh: "derivative" is ``a'``; "inverse" ``a' / (a'^2 + slope_reg)``
    with the value first brought ``margin`` away from the edges of its range; "one" is 1.

    The parameters get the chain rule of ``k_t``: "local" ``-d_t``; "through_time" ``-d_t`` and the derivative of step
    ``t + 1`` applied to ``k_{t+1}``. With ``e_t`` that of ``u`` and ``f_t`` that of ``x``::

        [dW_hh, db_hh] = scale sum_t e_t' [h_{t-1}, 1],   [dW_ih, db_ih] = scale sum_t f_t' [x_t, 1]
        dx_t = input_scale f_t F

    Args:
        grad_states: ``g``, ``[S, T, B, H]``, ignored at ``t >= lengths[b]``; None: zero.
        input: ``x``, ``[S or 1, T, B, I]``, ignored at ``t >= lengths[b]``.
        states, kept: of :func:`tpext.reference.gated_scan`.
        h0, c0, lengths, reverse, cell: as there.
        weight_hh: ``[S, G H, H]``.
        feedback: ``P``, ``[S, G H, H]``; not read by "jacobian".
        input_feedback: ``F``, ``[S, G H, I]``; None without a gradient of the input.
        inverse: "branch", "cell" or "jacobian".
        credit: "local" or "through_time".
        target_step, margin, slope_reg, scale, input_scale, reg: a number for all members or one a member; ``slope_reg``
            of "cell" and of slope "inverse", ``margin`` of the latter, ``reg`` of "jacobian".
        gate_slope, candidate_slope: "inverse", "derivative" or "one", of "branch".
        needs: which of the first five outputs are wanted.
        disp_h_n, disp_c_n: displacements that reach the last valid step of the run from beyond, ``[S, B, H]``.
        credit_h_n, credit_c_n: the same of ``k``, which "local" ignores.
        chebyshev_steps: of "jacobian": so many steps of :func:`tpext.reference.gated_inverses.chebyshev_inverse`, each
            from a bound of ``|J|^2`` of its row and step; None: solved exactly.

    Returns:
        Gradients, what reaches ``h0`` and ``c0``, and the displacements. A row without a valid step passes on what
        came from beyond.

    Source: the branches with slopes "inverse" and "derivative": the code of Roulet and Harchaoui, "Target Propagation
    via Regularized Inversion for RNNs" (TMLR 2023), for torch's GRU, where z and 1 - z are exchanged.
    """
    check_cell(cell)
    if credit not in ("local", "through_time"):
        raise ValueError(f"credit must be 'local' or 'through_time', got {credit!r}")
    input, states, h0, kept, weight_hh, feedback = promote(input, states, h0, kept, weight_hh, feedback)
    S, T, B, H = states.shape
    g = given_or_zeros(grad_states, states.shape)
    # the n states that a step starts from: h, and the LSTM's c
    before = [states_before(states, h0, lengths, reverse)]
    if cell == "lstm":
        before.append(states_before(kept[..., 4, :], given_or_zeros(c0, h0.shape), lengths, reverse))
    n = len(before)
    arriving, credited = (
        np.stack([given_or_zeros(array, h0.shape) for array in arrays[:n]]).astype(states.dtype)
        for arrays in ((disp_h_n, disp_c_n), (credit_h_n, credit_c_n))
    )
    displacement = np.zeros((n, S, T, B, H), states.dtype)
    e, f = np.zeros((2, S, T, B, weight_hh.shape[1]), states.dtype)
    x = np.zeros((S, T, B, input.shape[-1]), states.dtype)
    steps, margins, slope_regs, scales, input_scales, regs = (
        np.broadcast_to(number, S) for number in (target_step, margin, slope_reg, scale, input_scale, reg)
    )
    for s, b, times in rows(states.shape, lengths, reverse):
        way = Way(inverse, gate_slope, candidate_slope, margins[s], slope_regs[s], regs[s], chebyshev_steps)
        for t in reversed(times):
            start = np.stack([array[s, t, b] for array in before])
            derivatives = (gru_derivatives if n == 1 else lstm_derivatives)(kept[s, t, b], start[-1])
            d = arriving[:, s, b].copy()
            d[0] -= steps[s] * g[s, t, b]
            k = -d if credit == "local" else credited[:, s, b] - d
            of_u = np.einsum("ngh,nh->gh", derivatives.by_gate, k)
            of_x = np.einsum("ngh,nh->gh", derivatives.by_input, k)
            direct = np.sum(derivatives.direct * k, axis=0)
            credited[:, s, b] = through_cell(of_u, direct, weight_hh[s], n)
            arriving[:, s, b] = move_before(d, kept[s, t, b], start, derivatives, weight_hh[s], feedback[s], way)
            displacement[:, s, t, b] = d
            e[s, t, b], f[s, t, b] = of_u.reshape(-1), of_x.reshape(-1)
            x[s, t, b] = each_member(input, S)[s, t, b]

    scaled_e, scaled_f = (scales[:, None, None, None] * delta for delta in (e, f))
    lstm, through_time = n == 2, credit == "through_time"
    return GatedPass(
        None
        if input_feedback is None or not needs[0]
        else input_gradient(input_scales[:, None, None, None] * f, input_feedback, input),
        np.einsum("stbg,stbi->sgi", scaled_f, x) if needs[1] else None,
        np.einsum("stbg,stbh->sgh", scaled_e, before[0]) if needs[2] else None,
        scaled_f.sum((1, 2)) if needs[3] else None,
        scaled_e.sum((1, 2)) if needs[4] else None,
        arriving[0],
        arriving[1] if lstm else None,
        credited[0] if through_time else None,
        credited[1] if through_time and lstm else None,
        displacement[0],
        displacement[1] if lstm else None,
    )
