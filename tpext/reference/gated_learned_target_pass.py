"""Oracle of a GRU's backward pass through a learned reverse layer.

Notation: as in :mod:`tpext.reference.gated_target_pass`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from tpext.reference.gated_inverses import gru_derivatives, through_cell
from tpext.reference.gated_scan import gated_scan
from tpext.reference.gated_target_pass import states_before
from tpext.reference.rnn_scan import Array, each_member, input_gradient, promote, rows


def gru_learned_gradients(
    grad_states: ArrayLike,
    input: ArrayLike,
    h0: ArrayLike,
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    bias_ih: ArrayLike,
    bias_hh: ArrayLike,
    reverse_weight: ArrayLike,
    reverse_bias: ArrayLike,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    credit: str,
    target_step: float,
) -> dict[str, Array]:
    """Gradients of :class:`tpext.LearnedInverse` on a GRU, divided by ``target_step``.

    With ``U_n`` the candidate's rows of ``weight_ih`` and ``g`` the gradient of ``h_t``::

        G(x, h) = tanh(h V' + c + x U_n')
        d_{t-1} = -target_step g_{t-1} + G(x_t, h_t + d_t) - G(x_t, h_t),    d_T = -target_step g_T

    Parameters and input get the chain rule of ``k_t``: "local" ``-d_t``; "through_time" ``-d_t`` and the derivative of
    step ``t + 1`` applied to ``k_{t+1}``.

    Args:
        grad_states: ``[S, T, B, H]``, ignored at ``t >= lengths[b]``.
        input: ``[S or 1, T, B, I]``, ignored at ``t >= lengths[b]``.
        h0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse: as in :func:`tpext.reference.gated_scan`.
        reverse_weight: V, ``[S, H, H]``.
        reverse_bias: c, ``[S, H]``.
        credit: "local" or "through_time".
        target_step: > 0.

    Returns:
        ``input``, ``h0`` (of its displacement, ``-d_0 / target_step``), ``weight_ih``, ``weight_hh``, ``bias_ih`` and
        ``bias_hh`` by name.
    """
    grad_states, input, h0, weight_ih, weight_hh = promote(grad_states, input, h0, weight_ih, weight_hh)
    V, c = promote(reverse_weight, reverse_bias)
    layer = gated_scan(input, h0, None, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, "gru")
    assert layer.kept is not None
    S, T, B, H = layer.states.shape
    before = states_before(layer.states, h0, lengths, reverse)
    e, f = np.zeros((2, S, T, B, 3 * H))
    x = np.zeros((S, T, B, input.shape[-1]))
    arriving, credited = np.zeros((2, S, B, H))
    for s, b, times in rows(layer.states.shape, lengths, reverse):
        for t in reversed(times):
            x[s, t, b] = each_member(input, S)[s, t, b]
            derivatives = gru_derivatives(layer.kept[s, t, b], before[s, t, b])
            d = arriving[s, b] - target_step * grad_states[s, t, b]
            k = -d if credit == "local" else credited[s, b] - d
            of_u = np.einsum("ngh,nh->gh", derivatives.by_gate, k[None])
            of_x = np.einsum("ngh,nh->gh", derivatives.by_input, k[None])
            e[s, t, b], f[s, t, b] = of_u.reshape(-1), of_x.reshape(-1)
            credited[s, b] = through_cell(of_u, derivatives.direct[0] * k, weight_hh[s], 1)[0]
            q = layer.states[s, t, b] @ V[s].T + c[s] + x[s, t, b] @ weight_ih[s, 2 * H :].T
            arriving[s, b] = np.tanh(q + d @ V[s].T) - np.tanh(q)
    e, f = e / target_step, f / target_step
    return {
        "input": input_gradient(f, weight_ih, input),
        "h0": -arriving / target_step,
        "weight_ih": np.einsum("stbg,stbi->sgi", f, x),
        "weight_hh": np.einsum("stbg,stbh->sgh", e, before),
        "bias_ih": f.sum((1, 2)),
        "bias_hh": e.sum((1, 2)),
    }
