"""Oracles of the inverses of a feed-forward layer, op by op.

Every regularised inverse is the global minimiser of ``||f(x) - y||^2 + reg ||x - c||^2``. That of an activation is
found here by search: the cost on a fine grid, then its stationary points by bisection of the derivative between grid
points; for the piecewise linear ones by trying every candidate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tpext.reference.rnn_scan import Array, promote

SLOPES = {"relu": 0.0, "identity": 1.0}


def activation_and_slope(x: Array, activation: str, slope: float) -> tuple[Array, Array]:
    """``a(x)`` and ``a'(x)``; for the piecewise linear ones the slope at 0 is that from below."""
    if activation == "tanh":
        return np.tanh(x), _sech(x) ** 2
    if activation == "sigmoid":
        return (1 + np.tanh(x / 2)) / 2, _sech(x / 2) ** 2 / 4
    slope = SLOPES.get(activation, slope)
    return np.where(x > 0, x, slope * x), np.where(x > 0, 1, slope).astype(x.dtype)


def _sech(x: Array) -> Array:
    """``1 / cosh x``, which is finite where ``cosh x`` is not."""
    sech: Array = 2 * np.exp(-np.abs(x)) / (1 + np.exp(-2 * np.abs(x)))
    return sech


def activation_cost(x: Array, target: Array, center: Array, activation: str, slope: float, reg: float) -> Array:
    """``(a(x) - y)^2 + reg (x - c)^2``, elementwise."""
    cost: Array = (activation_and_slope(x, activation, slope)[0] - target) ** 2 + reg * (x - center) ** 2
    return cost


def act_inverse(target: ArrayLike, input: ArrayLike, activation: str, slope: float, reg: float, margin: float) -> Array:
    """The inverse of an activation.

    ``reg > 0``: the global minimiser of ``(a(x) - y)^2 + reg (x - c)^2``. ``reg = 0``: of the points whose image
    is nearest to ``y`` that nearest to ``c``; for tanh and sigmoid ``y`` is first brought ``margin`` inside the range.

    Args:
        target: ``y``, of any shape.
        input: ``c``, of the same shape.
        activation: "tanh", "sigmoid", "relu", "leaky_relu" or "identity".
        slope: of leaky relu below zero.
        reg: ``>= 0``.
        margin: used with ``reg = 0``.

    Returns:
        An array of that shape.

    Source: J. Seely, "tensorflow-target-prop", ``operations.py``: ``f_inv`` and the problem stated for ``f_rinv``.
    """
    y, c = promote(target, input)
    if activation in ("tanh", "sigmoid"):
        if reg > 0:
            return _search(y, c, activation, reg)
        edges = (margin - 1, 1 - margin) if activation == "tanh" else (margin, 1 - margin)
        y = np.clip(y, *edges)
        return np.arctanh(y) if activation == "tanh" else np.log(y / (1 - y))
    return _best_of_branches(y, c, SLOPES.get(activation, slope), reg)


def _best_of_branches(y: Array, c: Array, slope: float, reg: float) -> Array:
    """The least of the kink and of each branch's vertex, where it lies on its side; the right one at a tie."""

    def vertex(k: float) -> Array:
        return (k * y + reg * c) / (k * k + reg) if k * k + reg > 0 else c

    def cost(x: Array) -> Array:
        return activation_cost(x, y, c, "leaky_relu", slope, reg)

    best = np.maximum(vertex(1.0), 0)
    left = np.minimum(vertex(slope), 0)
    # Without reg the solutions of f(x) = y may be many: the nearest to c.
    nearer = np.abs(left - c) < np.abs(best - c) if reg == 0 else np.zeros(y.shape, bool)
    return np.where((cost(left) < cost(best)) | ((cost(left) == cost(best)) & nearer), left, best)


def _search(y: Array, c: Array, activation: str, reg: float) -> Array:
    """The cheapest stationary point of ``(a(x) - y)^2 + reg (x - c)^2``.

    The minimiser lies between ``c`` and the side of it on which ``a`` comes nearer to ``y``, no further off than the
    second term alone costs what ``c`` does.
    """

    def half_slope(x: Array, y: Array, c: Array) -> Array:
        value, slope = activation_and_slope(x, activation, 0.0)
        return (value - y) * slope + reg * (x - c)

    value, _ = activation_and_slope(c, activation, 0.0)
    reach = (y - value) / np.sqrt(np.asarray(reg, y.dtype))
    solution: Array = c.copy()
    for index in np.ndindex(y.shape):
        end = c[index] + reach[index]
        edges = [c[index], end]
        # Evenly in all, more densely where the activation bends, and near c, where one of the minima can be.
        near = c[index] + np.sign(reach[index]) * np.geomspace(1e-18, 4, 200)
        grid = np.concatenate([np.linspace(edges[0], edges[1], 400), np.linspace(-45, 45, 1801), near])
        grid = np.unique(np.clip(grid, min(edges), max(edges)))
        slopes = half_slope(grid, y[index], c[index])
        turns = np.nonzero((slopes[:-1] <= 0) & (slopes[1:] >= 0))[0]
        low, high = grid[turns], grid[turns + 1]
        for _ in range(80):
            middle = (low + high) / 2
            right = half_slope(middle, y[index], c[index]) < 0
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        minima = np.concatenate([(low + high) / 2, edges])
        costs = activation_cost(minima, y[index], c[index], activation, 0.0, reg)
        solution[index] = minima[np.argmin(costs)]
    return solution


def act_displacement(displacement: ArrayLike, input: ArrayLike, activation: str, slope: float, reg: float) -> Array:
    """``argmin_u (a(c + u) - a(c) - d)^2 + reg u^2``: the inverse of ``a(c) + d``, as a displacement from ``c``.

    Every difference is written out, so that the result has all its digits however small it is.

    Args:
        displacement: ``d``, of any shape.
        input: ``c``, of the same shape.
        activation: "tanh", "sigmoid", "relu", "leaky_relu" or "identity".
        slope: of leaky relu below zero.
        reg: ``> 0``.

    Returns:
        An array of that shape.
    """
    d, c = promote(displacement, input)
    if activation in ("tanh", "sigmoid"):
        solution: Array = np.zeros_like(c)
        for index in np.ndindex(c.shape):
            solution[index] = _least_move(d[index], c[index], 2.0 if activation == "sigmoid" else 1.0, reg)
        return solution
    kink = SLOPES.get(activation, slope)
    here = np.where(c > 0, 1.0, kink).astype(c.dtype)

    def vertex(k: float) -> Array:
        # on that branch a(c + u) - a(c) - d = k u - offset
        offset = d + (here - k) * c
        return k * offset / (k * k + reg)

    def cost(k: float, u: Array) -> Array:
        return (k * u - d - (here - k) * c) ** 2 + reg * u**2

    right, left = np.maximum(vertex(1.0), -c), np.minimum(vertex(kink), -c)
    return np.where(cost(kink, left) < cost(1.0, right), left, right)


def activation_change(u: Array, c: Array, scale: float) -> Array:
    """``a(c + u) - a(c)``, all digits: ``sinh(v) / (cosh(b) cosh(b + v))`` for tanh of ``b = c / scale``.

    ``scale`` is 1 for tanh, 2 for sigmoid, which is ``(1 + tanh(x / 2)) / 2``.
    """
    moved, change = (c + u) / scale, u / scale
    # e^|v| in sinh alone would overflow
    numerator = -np.expm1(-2 * np.abs(change)) * 2 * np.exp(np.abs(change) - np.abs(moved) - np.abs(c / scale))
    result: Array = np.sign(u) * numerator / ((1 + np.exp(-2 * np.abs(moved))) * (1 + np.exp(-2 * np.abs(c / scale))))
    return result / scale


def _least_move(d: Array, c: Array, scale: float, reg: float) -> Array:
    """The cheapest stationary ``u`` from 0 to ``d / sqrt(reg)``, beyond which the second term costs more than 0."""
    if d == 0:
        return d
    reach = d / np.sqrt(np.asarray(reg, c.dtype))
    # Every order of magnitude, for a small u; evenly where the activation bends.
    even = np.concatenate([np.linspace(-45 * scale, 45 * scale, 901) - c, reach * np.linspace(0, 1, 200)])
    grid = np.concatenate(
        [reach * np.geomspace(1e-40, 1, 300), np.clip(even, np.minimum(reach, 0), np.maximum(reach, 0))]
    )
    grid = np.unique(np.append(grid, 0))

    def half_slope(u: Array) -> Array:
        slope = _sech((c + u) / scale) ** 2 / scale**2
        result: Array = (activation_change(u, c, scale) - d) * slope + reg * u
        return result

    slopes = half_slope(grid)
    turns = np.nonzero((slopes[:-1] <= 0) & (slopes[1:] >= 0))[0]
    low, high = grid[turns], grid[turns + 1]
    for _ in range(90):
        middle = (low + high) / 2
        right = half_slope(middle) < 0
        low, high = np.where(right, middle, low), np.where(right, high, middle)
    minima = (low + high) / 2
    costs = (activation_change(minima, c, scale) - d) ** 2 + reg * minima**2
    best: Array = minima[np.argmin(costs)]
    return best


def bias_inverse(target: ArrayLike, input: ArrayLike, bias: ArrayLike, reg: float = 0.0) -> Array:
    """``argmin_x ||x + b - y||^2 + reg ||x - c||^2 = (y - b + reg c) / (1 + reg)``.

    Args:
        target: ``y``, ``[..., M]``.
        input: ``c``, ``[..., M]``.
        bias: ``b``, ``[M]``.
        reg: ``>= 0``.

    Returns:
        ``[..., M]``.
    """
    target, input, bias = promote(target, input, bias)
    solution: Array = (target - bias + reg * input) / (1 + reg)
    return solution


def linear_inverse(target: ArrayLike, input: ArrayLike, weight: ArrayLike, reg: float = 0.0) -> Array:
    """``argmin_x ||x W' - y||^2 + reg ||x - c||^2 = (y W + reg c) (W'W + reg I)^-1``; its limit for reg = 0.

    Args:
        target: ``y``, ``[..., M]``.
        input: ``c``, ``[..., N]``.
        weight: ``W``, ``[M, N]``.
        reg: ``>= 0``.

    Returns:
        ``[..., N]``, in float64.

    Source: J. Seely, "tensorflow-target-prop", ``operations.py``, with ``A = W'``.
    """
    target, input, weight = (np.asarray(array, np.float64) for array in (target, input, weight))
    if reg == 0:
        solution: Array = input + (target - input @ weight.T) @ np.linalg.pinv(weight).T
        return solution
    system = weight.T @ weight + reg * np.eye(weight.shape[1])
    solution = np.linalg.solve(system, (target @ weight + reg * input)[..., None])[..., 0]
    return solution


def layer_inverse(
    target: ArrayLike,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike,
    activation: str,
    slope: float,
    *,
    method: str,
    reg: float,
    form: str,
    margin: float,
) -> Array:
    """The target of the input of a layer ``y = a(x W' + b)``: activation, bias and linear map inverted in this order.

    Args:
        target: ``[..., M]``.
        input: ``x``, ``[..., N]``.
        weight: ``W``, ``[M, N]``.
        bias: ``b``, ``[M]``.
        activation, slope, margin: as in :func:`act_inverse`.
        method: "regularized", or "constrained": ``reg = 0``.
        reg: ``> 0`` where it is used.
        form: "proximal", every ``c`` the current value, or "ridge", every ``c`` zero.

    Returns:
        ``[..., N]``.

    Source: J. Seely, "tensorflow-target-prop", ``tprop_train.py``.
    """
    target, input, weight, bias = (np.asarray(array, np.float64) for array in (target, input, weight, bias))
    reg = reg if method == "regularized" else 0.0
    near = 1.0 if form == "proximal" else 0.0
    product = input @ weight.T
    target = act_inverse(target, near * (product + bias), activation, slope, reg, margin)
    target = bias_inverse(target, near * product, bias, reg)
    return linear_inverse(target, near * input, weight, reg)
