"""Oracles of the regularised inverse of a linear map."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tpext.reference.rnn_scan import Array


def regularized_inverse(weight: ArrayLike, reg: ArrayLike) -> Array:
    """Regularised inverse ``(W'W + reg I)^-1 W'`` of each matrix.

    For fewer rows than columns it is ``W' (WW' + reg I)^-1``: the same for ``reg > 0``, and the pseudo-inverse for
    ``reg = 0``.

    Args:
        weight: ``W``, ``[..., M, N]``.
        reg: ridge, ``>= 0``, one for all or ``[...]``, one for each.

    Returns:
        ``[..., N, M]``, in float64.

    Raises:
        numpy.linalg.LinAlgError: ``reg`` is 0 and a matrix has not full rank.

    Source: Roulet and Harchaoui, "Target Propagation via Regularized Inversion for RNNs" (TMLR 2023).
    """
    weight = np.asarray(weight, np.float64)
    M, N = weight.shape[-2:]
    transpose, reg = np.swapaxes(weight, -1, -2), np.asarray(reg, np.float64)[..., None, None]
    if M >= N:
        inverse: Array = np.linalg.solve(transpose @ weight + reg * np.eye(N), transpose)
    else:
        inverse = np.swapaxes(np.linalg.solve(weight @ transpose + reg * np.eye(M), weight), -1, -2)
    return inverse


def regularized_solve(weight: ArrayLike, rhs: ArrayLike, reg: float) -> Array:
    """``argmin_x ||W x - y||^2 + reg ||x||^2 = (W'W + reg I)^-1 W'y`` for each row ``y``.

    For fewer rows than columns it is ``W' (WW' + reg I)^-1 y``: the same for ``reg > 0``, and the shortest of the
    solutions for ``reg = 0``.

    Args:
        weight: ``W``, ``[..., M, N]``.
        rhs: rows ``y``, ``[..., K, M]``.
        reg: ridge, ``>= 0``.

    Returns:
        Rows ``x``, ``[..., K, N]``, in float64.

    Raises:
        numpy.linalg.LinAlgError: ``reg`` is 0 and a matrix has not full rank.
    """
    weight, rhs = np.asarray(weight, np.float64), np.asarray(rhs, np.float64)
    M, N = weight.shape[-2:]
    transpose, columns = np.swapaxes(weight, -1, -2), np.swapaxes(rhs, -1, -2)
    if M >= N:
        solution = np.linalg.solve(transpose @ weight + reg * np.eye(N), transpose @ columns)
    else:
        solution = transpose @ np.linalg.solve(weight @ transpose + reg * np.eye(M), columns)
    return np.swapaxes(solution, -1, -2)
