"""Oracles of the differences of a layer's codes behind an activation and a max pool."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tpext.reference.counter_normal import counter_normal
from tpext.reference.rnn_scan import Array

Indices = NDArray[np.int64]


def activate(v: ArrayLike, activation: str, alpha: float) -> Array:
    """Elu (``v`` for ``v > 0``, else ``alpha (e^v - 1)``), relu, tanh or the identity."""
    v = np.asarray(v, np.float64)
    if activation == "elu":
        return np.where(v < 0, alpha * np.expm1(np.minimum(v, 0)), v)
    if activation == "relu":
        return np.where(v < 0, 0.0, v)
    return np.tanh(v) if activation == "tanh" else v


def max_pool(v: ArrayLike, kernel: int, stride: int, padding: int) -> tuple[Array, Indices]:
    """The maximum of each window of each plane and its index: the first one, or the last NaN if there is any.

    Args:
        v: ``[..., H, W]``.
        kernel, stride, padding: of the square windows; what they cover outside the plane does not count.

    Returns:
        Maxima and indices, ``[..., h, w]``.
    """
    v = np.asarray(v, np.float64)
    H, W = v.shape[-2:]
    h, w = ((size + 2 * padding - kernel) // stride + 1 for size in (H, W))
    planes = v.reshape(math.prod(v.shape[:-2]), H, W)
    maxima, indices = np.empty((len(planes), h, w)), np.empty((len(planes), h, w), np.int64)
    for p, i, j in np.ndindex(maxima.shape):
        rows = range(max(i * stride - padding, 0), min(i * stride - padding + kernel, H))
        columns = range(max(j * stride - padding, 0), min(j * stride - padding + kernel, W))
        places = [(r, c) for r in rows for c in columns]
        values = [planes[p, r, c] for r, c in places]
        nans = [n for n, value in enumerate(values) if np.isnan(value)]
        best = nans[-1] if nans else int(np.argmax(values))
        maxima[p, i, j] = values[best]
        indices[p, i, j] = places[best][0] * W + places[best][1]
    shape = (*v.shape[:-2], h, w)
    return maxima.reshape(shape), indices.reshape(shape)


def max_unpool(values: ArrayLike, indices: ArrayLike, height: int, width: int) -> Array:
    """Planes of zeros with each value at its index; windows in raster order, so that the last one stays.

    Args:
        values, indices: ``[..., h, w]``.
        height, width: ``H, W``.

    Returns:
        ``[..., H, W]``.
    """
    values = np.asarray(values, np.float64)
    count = math.prod(values.shape[:-2])
    planes = np.zeros((count, height * width))
    flat, places = (np.asarray(a).reshape(count, math.prod(values.shape[-2:])) for a in (values, indices))
    for p, window in np.ndindex(flat.shape):
        planes[p, places[p, window]] = flat[p, window]
    return planes.reshape(*values.shape[:-2], height, width)


def code_difference(
    preactivation: ArrayLike,
    change: ArrayLike,
    output: ArrayLike,
    indices: ArrayLike | None,
    activation: str,
    alpha: float,
    kernel: int,
    stride: int,
    padding: int,
    noisy: bool,
) -> Array:
    """``unpool(a(y_k), i_k) - unpool(a(y), i)`` for ``(y_k, i_k) = max_pool(a(z + dz_k))``.

    Args:
        preactivation: ``z [B, C, H, W]``.
        change: ``dz [K, B, C, H, W]``.
        output, indices: ``y, i [B, C, h, w]``.
        activation, alpha: ``a``.
        kernel, stride, padding: the pool's; kernel 0: no pool, and ``a(a(z + dz_k)) - a(y)``.
        noisy: else ``i_k`` is ``i``.

    Returns:
        ``[K, B, C, H, W]``.
    """
    z, change = np.asarray(preactivation, np.float64), np.asarray(change, np.float64)
    clean = activate(output, activation, alpha)
    moved = activate(z + change, activation, alpha)
    if kernel == 0:
        return activate(moved, activation, alpha) - clean
    assert indices is not None
    H, W = z.shape[-2:]
    difference = np.empty(change.shape)
    for k in range(len(change)):
        y, own = max_pool(moved[k], kernel, stride, padding)
        code = max_unpool(activate(y, activation, alpha), own if noisy else indices, H, W)
        difference[k] = code - max_unpool(clean, indices, H, W)
    return difference


def probe_difference(
    output: ArrayLike,
    indices: ArrayLike | None,
    activation: str,
    alpha: float,
    kernel: int,
    stride: int,
    padding: int,
    height: int,
    width: int,
    sigma: float,
    seed: int,
    step: int,
    stream: int,
    stream_stride: int,
    first_row: int,
    draws: int,
) -> Array:
    """``unpool(a(y + sigma n_k) - a(y), indices)`` with ``n_k`` the noise of stream ``stream + k stream_stride``.

    Args:
        output, indices: ``[B, C, h, w]``.
        activation, alpha: ``a``.
        kernel: 0: no pool, and no unpooling.
        stride, padding: not needed.
        height, width: ``H, W``.
        sigma: scale of the noise.
        seed, step, stream, first_row: as :func:`counter_normal`.
        stream_stride: from one draw to the next.
        draws: ``K``.

    Returns:
        ``[K, B, C, H, W]``.
    """
    y = np.asarray(output, np.float64)
    clean = activate(y, activation, alpha)
    found: list[Array] = []
    for k in range(draws):
        noise = counter_normal(y.shape, seed, step, stream + k * stream_stride, sigma, first_row)
        moved: Array = activate(y + noise, activation, alpha) - clean
        if kernel == 0:
            found.append(moved)
        else:
            assert indices is not None
            found.append(max_unpool(moved, indices, height, width))
    shape = y.shape if kernel == 0 else (*y.shape[:2], height, width)
    return np.stack(found) if found else np.empty((0, *shape))
