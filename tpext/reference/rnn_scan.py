"""Oracles of the recurrent scan, of its back-propagation and of the layer around them.

Notation: S stack, T time, B batch, I input, H hidden; ``a`` the nonlinearity. Member ``s`` with ``reverse[s]`` runs
from the last valid step of each row to its first. Row ``b`` has ``lengths[b]`` valid steps (all ``T`` without
``lengths``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating[Any]]


class RNNGradients(NamedTuple):
    """What a layer's backward gives: an array of the shape of each of its inputs."""

    input: Array
    h0: Array
    weight_ih: Array
    weight_hh: Array
    bias: Array


def promote(*arrays: ArrayLike) -> tuple[Array, ...]:
    """The arrays in one dtype: float64, or longdouble when one of them is."""
    dtype = np.result_type(np.float64, *(np.asarray(array).dtype for array in arrays))
    return tuple(np.asarray(array, dtype) for array in arrays)


def rows(
    shape: Sequence[int], lengths: ArrayLike | None, reverse: Sequence[bool]
) -> Iterator[tuple[int, int, list[int]]]:
    """Each member and row of a ``[S, T, B, ...]`` array, with its valid times in the order of the run."""
    S, T, B = shape[:3]
    valid = [T] * B if lengths is None else [int(length) for length in np.asarray(lengths)]
    for s in range(S):
        for b in range(B):
            times = list(range(valid[b]))
            yield s, b, times[::-1] if reverse[s] else times


def activation(z: Array, nonlinearity: str) -> Array:
    """``a(z)``."""
    if nonlinearity == "tanh":
        return np.tanh(z)
    if nonlinearity == "relu":
        return np.maximum(z, 0)
    if nonlinearity == "identity":
        return z
    raise ValueError(f"nonlinearity must be 'tanh', 'relu' or 'identity', got {nonlinearity!r}")


def slope(h: Array, nonlinearity: str) -> Array:
    """``a'(z)`` in terms of ``h = a(z)``."""
    if nonlinearity == "tanh":
        return 1 - h**2
    if nonlinearity == "relu":
        return (h > 0).astype(h.dtype)
    if nonlinearity == "identity":
        return np.ones_like(h)
    raise ValueError(f"nonlinearity must be 'tanh', 'relu' or 'identity', got {nonlinearity!r}")


def given_or_zeros(array: ArrayLike | None, shape: Sequence[int]) -> Array:
    """The array in float64 or longdouble, or zeros where there is none."""
    return np.zeros(shape) if array is None else promote(array)[0]


def rnn_scan(
    x_proj: ArrayLike,
    h0: ArrayLike,
    weight_hh: ArrayLike,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> Array:
    """Hidden states ``h_t = a(x_proj_t + h_{t-1} W')``.

    Args:
        x_proj: ``[S, T, B, H]``.
        h0: state before the first step of the run, ``[S, B, H]``.
        weight_hh: ``W``, ``[S, H, H]``.
        lengths: ``[B]`` integers in ``0..T``, or None.
        reverse: ``S`` booleans.
        nonlinearity: "tanh", "relu" or "identity".

    Returns:
        States ``[S, T, B, H]``, 0 at ``t >= lengths[b]``.
    """
    x_proj, h0, weight_hh = promote(x_proj, h0, weight_hh)
    states = np.zeros_like(x_proj)
    for s, b, times in rows(x_proj.shape, lengths, reverse):
        h = h0[s, b]
        for t in times:
            h = activation(x_proj[s, t, b] + h @ weight_hh[s].T, nonlinearity)
            states[s, t, b] = h
    return states


def rnn_scan_backward(
    grad_states: ArrayLike | None,
    states: ArrayLike,
    weight_hh: ArrayLike,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    grad_h_n: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Back-propagation through time: ``e_t = (g_t + e_{t+1} W) * a'(h_t)``.

    Args:
        grad_states: ``g``, ``[S, T, B, H]``, ignored at ``t >= lengths[b]``; None: zero.
        states: ``h``, ``[S, T, B, H]``.
        weight_hh, lengths, reverse, nonlinearity: as in :func:`rnn_scan`.
        grad_h_n: gradient of the state after the last valid step of the run, ``[S, B, H]``, which stands for ``e_{t+1}
            W`` there; None: zero.

    Returns:
        ``grad_x_proj = e``, ``[S, T, B, H]``, and ``grad_h0 = e_1 W``, ``[S, B, H]``; ``grad_h_n`` for rows without a
        valid step.
    """
    states, weight_hh = promote(states, weight_hh)
    S, _, B, H = states.shape
    g, at_end = given_or_zeros(grad_states, states.shape), given_or_zeros(grad_h_n, (S, B, H))
    grad_x_proj = np.zeros_like(states)
    grad_h0 = np.zeros((S, B, H), states.dtype)
    for s, b, times in rows(states.shape, lengths, reverse):
        from_above = at_end[s, b]
        for t in reversed(times):
            e = (g[s, t, b] + from_above) * slope(states[s, t, b], nonlinearity)
            grad_x_proj[s, t, b] = e
            from_above = e @ weight_hh[s]
        grad_h0[s, b] = from_above
    return grad_x_proj, grad_h0


def each_member(input: Array, members: int) -> Array:
    """The input of each member, ``[S, T, B, I]``, where they may share one, ``[1, T, B, I]``."""
    return np.broadcast_to(input, (members, *input.shape[1:]))


def input_gradient(rows: Array, matrix: ArrayLike, input: ArrayLike) -> Array:
    """``rows F`` of each member, ``[S, T, B, H]`` and ``F [S, H, I]``; their sum where the members share the input."""
    of_member: Array = np.einsum("stbh,shi->stbi", rows, np.asarray(matrix))
    return of_member if len(np.asarray(input)) == len(rows) else of_member.sum(0, keepdims=True)


def input_projection(input: ArrayLike, weight_ih: ArrayLike, bias: ArrayLike | None) -> Array:
    """``x_proj = input U' + bias`` of each member, ``[S, T, B, H]``, with ``U = weight_ih``."""
    input, weight_ih = promote(input, weight_ih)
    x_proj: Array = np.einsum("stbi,shi->stbh", each_member(input, len(weight_ih)), weight_ih)
    return x_proj if bias is None else x_proj + np.asarray(bias)[:, None, None, :]


def rnn_layer(
    input: ArrayLike,
    h0: ArrayLike,
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    bias: ArrayLike | None,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> tuple[Array, Array]:
    """Hidden states of a layer, ``h_t = a(x_t U' + b + h_{t-1} W')``.

    Args:
        input: ``x``, ``[S or 1, T, B, I]``, of each member or shared by all.
        weight_ih: ``U``, ``[S, H, I]``.
        bias: ``b``, ``[S, H]``, or None.
        h0, weight_hh, lengths, reverse, nonlinearity: as in :func:`rnn_scan`.

    Returns:
        States ``[S, T, B, H]``, 0 at ``t >= lengths[b]``, and the state after the last valid step of the run,
        ``[S, B, H]``: ``h0`` for rows without one.
    """
    states = rnn_scan(input_projection(input, weight_ih, bias), h0, weight_hh, lengths, reverse, nonlinearity)
    h_n = np.array(h0, states.dtype)
    for s, b, times in rows(states.shape, lengths, reverse):
        if times:
            h_n[s, b] = states[s, times[-1], b]
    return states, h_n


def rnn_weight_gradients(
    delta: ArrayLike,
    states: ArrayLike,
    h0: ArrayLike,
    input: ArrayLike,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    scale: float,
) -> tuple[Array, Array, Array]:
    """Gradients of a layer's parameters from those of its pre-activations.

    ``dU = scale sum_t delta_t' x_t``, ``dW = scale sum_t delta_t' h_{t-1}`` and ``db = scale sum_t delta_t``, over the
    valid steps of all rows.

    Args:
        delta: ``[S, T, B, H]``, ignored at ``t >= lengths[b]``.
        states: ``h``, ``[S, T, B, H]``.
        h0: state before the first step of the run, ``[S, B, H]``.
        input: ``x``, ``[S or 1, T, B, I]``, of each member or shared by all; ignored at ``t >= lengths[b]``.
        lengths, reverse: as in :func:`rnn_scan`.
        scale: factor of all three.

    Returns:
        ``dU [S, H, I]``, ``dW [S, H, H]``, ``db [S, H]``.
    """
    delta, states, h0, input = promote(delta, states, h0, input)
    S, _, _, H = delta.shape
    input = each_member(input, S)
    weight_ih = np.zeros((S, H, input.shape[-1]), delta.dtype)
    weight_hh = np.zeros((S, H, H), delta.dtype)
    bias = np.zeros((S, H), delta.dtype)
    for s, b, times in rows(delta.shape, lengths, reverse):
        previous = h0[s, b]
        for t in times:
            weight_ih[s] += np.outer(delta[s, t, b], input[s, t, b])
            weight_hh[s] += np.outer(delta[s, t, b], previous)
            bias[s] += delta[s, t, b]
            previous = states[s, t, b]
    return scale * weight_ih, scale * weight_hh, scale * bias


def rnn_gradients(
    grad_states: ArrayLike | None,
    input: ArrayLike,
    h0: ArrayLike,
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    bias: ArrayLike | None,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    grad_h_n: ArrayLike | None = None,
) -> RNNGradients:
    """Gradients of a whole layer by back-propagation, given those of its states and of the final one.

    Args:
        grad_states: ``[S, T, B, H]``, or None.
        input: ``[S or 1, T, B, I]``, of each member or shared by all.
        h0: ``[S, B, H]``.
        weight_ih: ``[S, H, I]``.
        weight_hh: ``[S, H, H]``.
        bias: ``[S, H]`` or None (its gradient is returned all the same).
        lengths, reverse, nonlinearity: as in :func:`rnn_scan`.
        grad_h_n: ``[S, B, H]``, or None.

    Returns:
        The gradient of each input.
    """
    states, _ = rnn_layer(input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity)
    delta, grad_h0 = rnn_scan_backward(grad_states, states, weight_hh, lengths, reverse, nonlinearity, grad_h_n)
    grad_input = input_gradient(delta, weight_ih, input)
    return RNNGradients(grad_input, grad_h0, *rnn_weight_gradients(delta, states, h0, input, lengths, reverse, 1.0))
