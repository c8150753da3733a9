"""Oracle of counter-based normal noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tpext.reference.rnn_scan import Array

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint64]:
    """Philox4x32-10, ten rounds of a multiplicative Feistel network on four words of 32 bits.

    Args:
        counter: ``[..., 4]``, words.
        key: ``[..., 2]``, words.

    Returns:
        ``[..., 4]``, words.

    Source: Salmon, Moraes, Dror and Shaw (SC 2011), section 3.3; the constants of Random123.
    """
    words = [np.asarray(counter, np.uint64)[..., i] for i in range(4)]
    keys = [np.asarray(key, np.uint64)[..., i] for i in range(2)]
    for _ in range(10):
        first, second = (np.uint64(m) * w for m, w in zip(_MULTIPLIERS, (words[0], words[2]), strict=True))
        low, high = [p & np.uint64(_LOW) for p in (first, second)], [p >> np.uint64(32) for p in (first, second)]
        words = [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
        keys = [(k + np.uint64(w)) & np.uint64(_LOW) for k, w in zip(keys, _WEYL, strict=True)]
    return np.stack(np.broadcast_arrays(*words), axis=-1)


def counter_normal(
    shape: Sequence[int], seed: int, step: int, stream: int, scale: float = 1.0, first_row: int = 0
) -> Array:
    """Normal noise: elements ``4 g .. 4 g + 3`` of row ``b`` from Philox at ``(g, first_row + b, stream, step)``.

    Of words ``w0, w1, w2, w3``, for each pair ``w, w'`` of them, ``r cos(2 pi w' / 2^32)`` and ``r sin(2 pi w' /
    2^32)`` with ``r = sqrt(-2 log((w + 1) / 2^32))``.

    Args:
        shape: ``[B, ...]``.
        seed: the key, its low 32 bits first.
        step, stream, first_row: of the counter.
        scale: factor.

    Returns:
        ``[B, ...]``, in float64.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    groups = -(-columns // 4)
    counter = np.empty((rows, groups, 4), np.uint64)
    counter[..., 0] = np.arange(groups)
    counter[..., 1] = first_row + np.arange(rows)[:, None]
    counter[..., 2] = stream
    counter[..., 3] = step
    words = philox4x32(counter, [seed & _LOW, seed >> 32]).astype(np.float64)
    radius = np.sqrt(-2 * np.log((words[..., ::2] + 1) / 2**32))
    angle = 2 * np.pi * words[..., 1::2] / 2**32
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return scale * pairs.reshape(rows, 4 * groups)[:, :columns].reshape(shape)
