"""Oracles of the recurrent scan and of its back-propagation.

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
    grad_states: ArrayLike,
    states: ArrayLike,
    weight_hh: ArrayLike,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> tuple[Array, Array]:
    """Back-propagation through time: ``e_t = (g_t + e_{t+1} W) * a'(h_t)``.

    Args:
        grad_states: ``g``, ``[S, T, B, H]``, ignored at ``t >= lengths[b]``.
        states: ``h``, ``[S, T, B, H]``.
        weight_hh, lengths, reverse, nonlinearity: as in :func:`rnn_scan`.

    Returns:
        ``grad_x_proj = e``, ``[S, T, B, H]``, and ``grad_h0 = e_1 W``, ``[S, B, H]``.
    """
    grad_states, states, weight_hh = promote(grad_states, states, weight_hh)
    S, _, B, H = states.shape
    grad_x_proj = np.zeros_like(states)
    grad_h0 = np.zeros((S, B, H), states.dtype)
    for s, b, times in rows(states.shape, lengths, reverse):
        from_above = np.zeros(H, states.dtype)
        for t in reversed(times):
            e = (grad_states[s, t, b] + from_above) * slope(states[s, t, b], nonlinearity)
            grad_x_proj[s, t, b] = e
            from_above = e @ weight_hh[s]
        grad_h0[s, b] = from_above
    return grad_x_proj, grad_h0


def input_projection(input: ArrayLike, weight_ih: ArrayLike, bias: ArrayLike | None) -> Array:
    """``x_proj = input U' + bias`` of each member, ``[S, T, B, H]``, with ``U = weight_ih``."""
    input, weight_ih = promote(input, weight_ih)
    x_proj: Array = np.einsum("tbi,shi->stbh", input, weight_ih)
    return x_proj if bias is None else x_proj + np.asarray(bias)[:, None, None, :]


def weight_gradients(
    delta: Array,
    input: Array,
    h0: Array,
    states: Array,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
) -> tuple[Array, Array, Array]:
    """Sums over time and rows of ``delta_t' input_t``, ``delta_t' h_{t-1}`` and ``delta_t``."""
    S, _, _, H = delta.shape
    weight_ih = np.zeros((S, H, input.shape[-1]), delta.dtype)
    weight_hh = np.zeros((S, H, H), delta.dtype)
    bias = np.zeros((S, H), delta.dtype)
    for s, b, times in rows(delta.shape, lengths, reverse):
        previous = h0[s, b]
        for t in times:
            weight_ih[s] += np.outer(delta[s, t, b], input[t, b])
            weight_hh[s] += np.outer(delta[s, t, b], previous)
            bias[s] += delta[s, t, b]
            previous = states[s, t, b]
    return weight_ih, weight_hh, bias


def rnn_gradients(
    grad_states: ArrayLike,
    input: ArrayLike,
    h0: ArrayLike,
    weight_ih: ArrayLike,
    weight_hh: ArrayLike,
    bias: ArrayLike | None,
    lengths: ArrayLike | None,
    reverse: Sequence[bool],
    nonlinearity: str,
) -> RNNGradients:
    """Gradients of a whole layer by back-propagation, given those of its states.

    Args:
        grad_states: ``[S, T, B, H]``.
        input: ``[T, B, I]``, shared by the members of the stack.
        h0: ``[S, B, H]``.
        weight_ih: ``[S, H, I]``.
        weight_hh: ``[S, H, H]``.
        bias: ``[S, H]`` or None (its gradient is returned all the same).
        lengths, reverse, nonlinearity: as in :func:`rnn_scan`.

    Returns:
        The gradient of each input.
    """
    states = rnn_scan(input_projection(input, weight_ih, bias), h0, weight_hh, lengths, reverse, nonlinearity)
    input, h0, weight_ih = promote(input, h0, weight_ih)
    delta, grad_h0 = rnn_scan_backward(grad_states, states, weight_hh, lengths, reverse, nonlinearity)
    grad_input = np.einsum("stbh,shi->tbi", delta, weight_ih)
    return RNNGradients(grad_input, grad_h0, *weight_gradients(delta, input, h0, states, lengths, reverse))
