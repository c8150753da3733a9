"""Oracles of the recurrent target passes, and of the layers whose backward they are.

Notation: as in :mod:`tpext.reference.rnn_scan`; ``d_t`` is the displacement of the state ``h_t``, so ``h_t + d_t`` is
its target. "Previous" and "next" follow the order of the run, so a member with ``reverse[s]`` passes ``d`` from time
``t`` to ``t + 1``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from tpext.reference.regularized_inverse import regularized_inverse
from tpext.reference.rnn_scan import (
    Array,
    RNNGradients,
    given_or_zeros,
    input_gradient,
    input_projection,
    promote,
    rnn_scan,
    rnn_weight_gradients,
    rows,
    slope,
)


def activation_inverse(h: Array, nonlinearity: str, margin: float) -> Array:
    """``a^-1(h)``, with ``h`` first brought into the range of ``a``; for tanh ``margin`` away from its edges."""
    if nonlinearity == "tanh":
        return np.arctanh(np.clip(h, margin - 1, 1 - margin))
    if nonlinearity == "relu":
        return np.maximum(h, 0)
    if nonlinearity == "identity":
        return h
    raise ValueError(f"nonlinearity must be 'tanh', 'relu' or 'identity', got {nonlinearity!r}")


def backward_slope(h: Array, nonlinearity: str, margin: float, kind: str, slope_reg: float) -> Array:
    """What a displacement is multiplied by on its way back through the activation.

    inverse: ``a' / (a'^2 + slope_reg)`` at the clipped ``h``, for ``slope_reg = 0`` the derivative of ``a^-1``, and 0
    where relu is flat; derivative: ``a'`` at ``h``; one: 1.
    """
    if kind == "one":
        return np.ones_like(h)
    if kind == "derivative":
        return slope(h, nonlinearity)
    if kind != "inverse":
        raise ValueError(f"slope must be 'inverse', 'derivative' or 'one', got {kind!r}")
    derivative = slope(np.clip(h, margin - 1, 1 - margin) if nonlinearity == "tanh" else h, nonlinearity)
    flat = derivative == 0
    return np.where(flat, 0, derivative / np.where(flat, 1, derivative**2 + slope_reg))


def displacement_before_activation(
    h: Array,
    d: Array,
    nonlinearity: str,
    correction: str,
    margin: float,
    kind: str = "inverse",
    slope_reg: float = 0.0,
) -> Array:
    """``z_t``: the displacement ``d_t`` of the state taken back through the activation.

    linearized: ``z = d * slope(h)``; difference: ``z = a^-1(h + d) - a^-1(h)``.
    """
    if correction == "linearized":
        return d * backward_slope(h, nonlinearity, margin, kind, slope_reg)
    if correction == "difference":
        return activation_inverse(h + d, nonlinearity, margin) - activation_inverse(h, nonlinearity, margin)
    raise ValueError(f"correction must be 'linearized' or 'difference' here, got {correction!r}")


def local_residual(d: Array, from_next: Array, h: Array, nonlinearity: str, credit: str) -> Array:
    """``e_t``: gradient of the local losses at the input of the activation.

    local: ``e_t = -d_t * a'(h_t)``, of ``1/2 ||h_t - v_t||^2`` alone; through_time: ``e_t = (-d_t + e_{t+1} W) *
    a'(h_t)``, of the sum of these losses, the targets held fixed. ``from_next`` is ``e_{t+1} W``.
    """
    if credit == "local":
        return -d * slope(h, nonlinearity)
    if credit == "through_time":
        return (-d + from_next) * slope(h, nonlinearity)
    raise ValueError(f"credit must be 'local' or 'through_time', got {credit!r}")


def rnn_target_scan(
    grad_states: ArrayLike | None,
    states: ArrayLike,
    h0: ArrayLike,
    weight_hh: ArrayLike,
    inverse: ArrayLike,
    x_proj: ArrayLike | None,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    correction: str,
    credit: str,
    target_step: float,
    margin: float,
    return_norms: bool,
    return_displacement: bool,
    disp_n: ArrayLike | None = None,
    credit_n: ArrayLike | None = None,
    slope: str = "inverse",
    slope_reg: float = 0.0,
) -> tuple[Array, Array, Array | None, Array | None, Array | None]:
    """Target pass with the regularised inverse, from the last step of the run to the first.

    With ``P = R'`` and ``d = -target_step * g + disp_n`` at the last step::

        linearized, difference:  d_{t-1} = -target_step * g_{t-1} + z_t P
        none:                    d_{t-1} = -target_step * g_{t-1} + (a^-1(h_t + d_t) - x_proj_t) P - h_{t-1}

    where the state before the first step is ``h0`` and has no ``g``.

    Args:
        grad_states: ``g``, ``[S, T, B, H]``, ignored at ``t >= lengths[b]``; None: zero.
        states: ``h``, ``[S, T, B, H]``.
        h0: ``[S, B, H]``.
        weight_hh: ``W``, ``[S, H, H]``.
        inverse: ``R = (W'W + rI)^-1 W'``, ``[S, H, H]``.
        x_proj: ``[S, T, B, H]``, used by "none" only.
        lengths, reverse, nonlinearity: as in :func:`tpext.reference.rnn_scan`.
        correction: "linearized", "difference" or "none".
        credit: "local" or "through_time".
        target_step: scale of the displacements, > 0.
        margin: distance kept from the edges of tanh's range, in (0, 1).
        return_norms: whether to return the norms of ``d_t``.
        return_displacement: whether to return ``z_t``.
        disp_n: displacement that reaches the last valid step of the run from beyond, ``[S, B, H]``; None: zero.
        credit_n: ``e_{t+1} W`` there, ``[S, B, H]``, which "local" ignores; None: zero.
        slope, slope_reg: of "linearized": see :func:`backward_slope`.

    Returns:
        ``delta = e``, ``[S, T, B, H]``; ``disp_h0 = d_0``, ``[S, B, H]``; ``||d_t||``, ``[S, T, B]``, or None; ``z_t``,
        ``[S, T, B, H]``, or None (for "none", that of "difference"); ``credit_h0 = e_1 W``, ``[S, B, H]``, or None for
        "local". A row without a valid step passes ``disp_n`` and ``credit_n`` on.

    Source: Roulet and Harchaoui, "Target Propagation via Regularized Inversion for RNNs" (TMLR 2023).
    """
    states, h0, weight_hh, inverse = promote(states, h0, weight_hh, inverse)
    S, T, B, H = states.shape
    g = given_or_zeros(grad_states, states.shape)
    disp_at_end, credit_at_end = given_or_zeros(disp_n, (S, B, H)), given_or_zeros(credit_n, (S, B, H))
    delta = np.zeros_like(states)
    disp_h0, credit_h0 = np.zeros((S, B, H), states.dtype), np.zeros((S, B, H), states.dtype)
    norms = np.zeros((S, T, B), states.dtype)
    displacement = np.zeros_like(states)
    for s, b, times in rows(states.shape, lengths, reverse):
        from_next_state, from_next_residual = disp_at_end[s, b], credit_at_end[s, b]
        for position in reversed(range(len(times))):
            t = times[position]
            h = states[s, t, b]
            d = -target_step * g[s, t, b] + from_next_state
            norms[s, t, b] = np.sqrt(np.sum(d**2))
            if correction == "none":
                before = states[s, times[position - 1], b] if position > 0 else h0[s, b]
                preimage = activation_inverse(h + d, nonlinearity, margin) - np.asarray(x_proj)[s, t, b]
                from_next_state = preimage @ inverse[s].T - before
                displacement[s, t, b] = displacement_before_activation(h, d, nonlinearity, "difference", margin)
            else:
                z = displacement_before_activation(h, d, nonlinearity, correction, margin, slope, slope_reg)
                from_next_state = z @ inverse[s].T
                displacement[s, t, b] = z
            e = local_residual(d, from_next_residual, h, nonlinearity, credit)
            delta[s, t, b] = e
            from_next_residual = e @ weight_hh[s]
        disp_h0[s, b], credit_h0[s, b] = from_next_state, from_next_residual
    return (
        delta,
        disp_h0,
        norms if return_norms else None,
        displacement if return_displacement else None,
        credit_h0 if credit == "through_time" else None,
    )


def rnn_learned_target_scan(
    grad_states: ArrayLike | None,
    states: ArrayLike,
    weight_hh: ArrayLike,
    reverse_weight: ArrayLike,
    reverse_pre: ArrayLike,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    credit: str,
    target_step: float,
    return_norms: bool,
    disp_n: ArrayLike | None = None,
    credit_n: ArrayLike | None = None,
) -> tuple[Array, Array, Array | None, Array | None]:
    """Target pass with a learned reverse layer ``G(x_t, h) = tanh(h V' + c + x_t U')``.

    With ``q_t = h_t V' + c + x_t U'`` and ``d = -target_step * g + disp_n`` at the last step::

        d_{t-1} = -target_step * g_{t-1} + tanh(q_t + d_t V') - tanh(q_t)

    Args:
        grad_states, states, weight_hh, lengths, reverse, nonlinearity, credit, target_step, return_norms, disp_n,
            credit_n: as in :func:`rnn_target_scan`.
        reverse_weight: ``V``, ``[S, H, H]``.
        reverse_pre: ``q``, ``[S, T, B, H]``.

    Returns:
        ``delta``, ``disp_h0``, norms (or None) and ``credit_h0`` (or None), as :func:`rnn_target_scan`.

    Source: Manchev and Spratling, "Target Propagation in Recurrent Neural Networks" (JMLR 21, 2020).
    """
    states, weight_hh, reverse_weight, reverse_pre = promote(states, weight_hh, reverse_weight, reverse_pre)
    S, T, B, H = states.shape
    g = given_or_zeros(grad_states, states.shape)
    disp_at_end, credit_at_end = given_or_zeros(disp_n, (S, B, H)), given_or_zeros(credit_n, (S, B, H))
    delta = np.zeros_like(states)
    disp_h0, credit_h0 = np.zeros((S, B, H), states.dtype), np.zeros((S, B, H), states.dtype)
    norms = np.zeros((S, T, B), states.dtype)
    for s, b, times in rows(states.shape, lengths, reverse):
        from_next_state, from_next_residual = disp_at_end[s, b], credit_at_end[s, b]
        for t in reversed(times):
            d = -target_step * g[s, t, b] + from_next_state
            norms[s, t, b] = np.sqrt(np.sum(d**2))
            q = reverse_pre[s, t, b]
            from_next_state = np.tanh(q + d @ reverse_weight[s].T) - np.tanh(q)
            e = local_residual(d, from_next_residual, states[s, t, b], nonlinearity, credit)
            delta[s, t, b] = e
            from_next_residual = e @ weight_hh[s]
        disp_h0[s, b], credit_h0[s, b] = from_next_state, from_next_residual
    return delta, disp_h0, norms if return_norms else None, credit_h0 if credit == "through_time" else None


def target_rnn_gradients(
    grad_states: ArrayLike,
    input: ArrayLike,
    h0: ArrayLike,
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    bias: ArrayLike | None,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    *,
    reg: float,
    target_step: float,
    correction: str,
    credit: str,
    margin: float,
    normalize: bool,
    input_rule: str,
    slope: str = "inverse",
    slope_reg: float = 0.0,
    grad_h_n: ArrayLike | None = None,
) -> RNNGradients:
    """What a whole layer's backward gives under target propagation with the regularised inverse.

    The weights get the gradients of the local losses, ``sum_t e_t' (input_t, h_{t-1}, 1)``, divided by ``target_step``
    if ``normalize``. The layer below gets gradient units whatever ``normalize``: ``e_t U / target_step`` by input_rule
    "gradient", ``-z_t P_U / target_step`` with ``P_U = U (U'U + reg I)^-1`` by "target"; ``h0`` gets
    ``-d_0 / target_step``.

    Args:
        grad_states, input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity: as in
            :func:`tpext.reference.rnn_gradients`.
        reg: ridge of the inverses of ``weight_hh`` and, by input_rule "target", ``weight_ih``.
        correction, credit, target_step, margin: as in :func:`rnn_target_scan`.
        normalize: divide the weights' gradients by ``target_step``.
        input_rule: "gradient" or "target".
        slope, slope_reg: as in :func:`rnn_target_scan`.
        grad_h_n: gradient of the state after the last valid step of the run, ``[S, B, H]``, or None.

    Returns:
        What each input of the layer receives.
    """
    x_proj = input_projection(input, weight_ih, bias)
    states = rnn_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)
    input, h0, weight_ih = promote(input, h0, weight_ih)
    inverse = regularized_inverse(weight_hh, reg)
    delta, disp_h0, _, displacement, _ = rnn_target_scan(
        grad_states,
        states,
        h0,
        weight_hh,
        inverse,
        x_proj,
        lengths,
        reverse,
        nonlinearity,
        correction,
        credit,
        target_step,
        margin,
        False,
        True,
        None if grad_h_n is None else -target_step * np.asarray(grad_h_n),
        None,
        slope,
        slope_reg,
    )
    if input_rule == "gradient":
        grad_input = input_gradient(delta, weight_ih, input) / target_step
    elif input_rule == "target":
        assert displacement is not None
        feedback = np.swapaxes(regularized_inverse(weight_ih, reg), 1, 2)
        grad_input = -input_gradient(displacement, feedback, input) / target_step
    else:
        raise ValueError(f"input_rule must be 'gradient' or 'target', got {input_rule!r}")
    scale = 1 / target_step if normalize else 1.0
    weights = rnn_weight_gradients(delta, states, h0, input, lengths, reverse, scale)
    return RNNGradients(grad_input, -disp_h0 / target_step, *weights)


def learned_target_rnn_gradients(
    grad_states: ArrayLike,
    input: ArrayLike,
    h0: ArrayLike,
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    bias: ArrayLike | None,
    reverse_weight: ArrayLike,
    reverse_bias: ArrayLike,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    *,
    target_step: float,
    credit: str,
    normalize: bool,
    grad_h_n: ArrayLike | None = None,
) -> RNNGradients:
    """What a whole layer's backward gives under target propagation with a learned reverse layer.

    Args:
        grad_states, input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity: as in
            :func:`tpext.reference.rnn_gradients`.
        reverse_weight: ``V``, ``[S, H, H]``.
        reverse_bias: ``c``, ``[S, H]``.
        target_step, credit, normalize, grad_h_n: as in :func:`target_rnn_gradients`.

    Returns:
        What each input of the layer receives; the reverse layer's own parameters receive nothing from this pass.
    """
    x_proj = input_projection(input, weight_ih, bias)
    states = rnn_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)
    input, h0, weight_ih, reverse_weight, reverse_bias = promote(input, h0, weight_ih, reverse_weight, reverse_bias)
    reverse_pre = np.einsum("stbh,sgh->stbg", states, reverse_weight) + input_projection(input, weight_ih, reverse_bias)
    delta, disp_h0, _, _ = rnn_learned_target_scan(
        grad_states,
        states,
        weight_hh,
        reverse_weight,
        reverse_pre,
        lengths,
        reverse,
        nonlinearity,
        credit,
        target_step,
        False,
        None if grad_h_n is None else -target_step * np.asarray(grad_h_n),
    )
    grad_input = input_gradient(delta, weight_ih, input) / target_step
    scale = 1 / target_step if normalize else 1.0
    weights = rnn_weight_gradients(delta, states, h0, input, lengths, reverse, scale)
    return RNNGradients(grad_input, -disp_h0 / target_step, *weights)


def rnn_layer_backward(
    grad_states: ArrayLike | None,
    input: ArrayLike,
    states: ArrayLike,
    h0: ArrayLike,
    weight_hh: ArrayLike,
    feedback: ArrayLike,
    input_feedback: ArrayLike,
    pre: ArrayLike | None,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    correction: str,
    credit: str,
    target_step: float,
    margin: float,
    slope: str,
    slope_reg: float,
    scale: float,
    input_scale: float,
    of_displacement: bool,
    disp_n: ArrayLike | None = None,
    credit_n: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array, Array, Array | None]:
    """A target pass and the gradients that its delta gives: :mod:`tpext.ops.rnn_layer` has the equations.

    Args:
        grad_states, states, h0, weight_hh, lengths, reverse, nonlinearity, correction, credit, target_step, margin,
            slope, slope_reg, disp_n, credit_n: as in :func:`rnn_target_scan`; correction may be "learned".
        input: ``[S or 1, T, B, I]``.
        feedback: ``P``, ``[S, H, H]``; for correction "learned" ``V'``.
        input_feedback: ``F``, ``[S, H, I]``.
        pre: ``x_proj`` for correction "none", ``reverse_pre`` for "learned".
        scale: factor of the parameters' gradients.
        input_scale: factor of the input's.
        of_displacement: the input's gradient comes of ``z_t`` in place of ``delta_t``.

    Returns:
        Gradients of input, weight_ih, weight_hh and bias, ``disp_h0`` and ``credit_h0`` (None under "local").
    """
    run = (lengths, reverse, nonlinearity)
    back = np.swapaxes(np.asarray(feedback), 1, 2)
    if correction == "learned":
        assert pre is not None
        delta, disp_h0, _, credit_h0 = rnn_learned_target_scan(
            grad_states, states, weight_hh, back, pre, *run, credit, target_step, False, disp_n, credit_n
        )
        displacement = None
    else:
        delta, disp_h0, _, displacement, credit_h0 = rnn_target_scan(
            grad_states,
            states,
            h0,
            weight_hh,
            back,
            pre,
            *run,
            correction,
            credit,
            target_step,
            margin,
            False,
            True,
            disp_n,
            credit_n,
            slope,
            slope_reg,
        )
    rows = displacement if of_displacement else delta
    assert rows is not None
    parameters = rnn_weight_gradients(delta, states, h0, input, lengths, reverse, scale)
    return input_scale * input_gradient(rows, input_feedback, input), *parameters, disp_h0, credit_h0
