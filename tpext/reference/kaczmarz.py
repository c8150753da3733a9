"""Oracles of the direct weight solves: every sample by itself, in the form of the equations.

Notation: B batch, N inputs, M outputs of a layer. ``W [M, N]``, ``y = x W' + b``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from tpext.reference.rnn_scan import Array, promote


def n_hot(input: ArrayLike, count: int) -> Array:
    """Ones at the ``count`` greatest of each row ``[B, M]``, zeros elsewhere."""
    (z,) = promote(input)
    output = np.zeros_like(z)
    for row, chosen in zip(output, np.argsort(-z, axis=-1, kind="stable"), strict=True):
        row[chosen[:count]] = 1
    return output


def hot_target(target: ArrayLike, input: ArrayLike, output: str) -> Array:
    """The target of ``z [B, M]`` for outputs ``target [B, M]`` of ones and zeros.

    Args:
        target: what is to be on.
        input: ``z``.
        output: "clamp": at least 1 where on, at most 0 where off; "swap": the greatest exchanged with the one that is
            to be on; "direct": ``target``.
    """
    wanted, z = promote(target, input)
    if output == "direct":
        return wanted
    result: Array = z.copy()
    for b in range(len(z)):
        if output == "swap":
            greatest, label = int(np.argmax(z[b])), int(np.argmax(wanted[b]))
            result[b, greatest], result[b, label] = z[b, label], z[b, greatest]
            continue
        for k in range(z.shape[1]):
            result[b, k] = max(z[b, k], 1) if wanted[b, k] == 1 else min(z[b, k], 0)
    return result


def units_output(input: ArrayLike, name: str, count: int) -> Array:
    """``a(z)`` for ``z [B, M]``."""
    (z,) = promote(input)
    if name == "n_hot":
        return n_hot(z, count)
    values: dict[str, Array] = {
        "identity": z,
        "relu": np.maximum(z, 0),
        "doubled_relu": z + np.maximum(z, 0),
        "binary": (z - z.mean(-1, keepdims=True) > 0).astype(z.dtype),
    }
    return values[name]


def feasible(target: ArrayLike, name: str, count: int) -> Array:
    """The output of units that is asked for by ``y' [B, M]``: ``a(y')``, or ``y'`` where every number is an output."""
    return promote(target)[0] if name == "doubled_relu" else units_output(target, name, count)


def units_target(target: ArrayLike, input: ArrayLike, name: str, version: str) -> Array:
    """The target of ``z [B, M]`` for that of the output, ``y' [B, M]``; "relu" has the versions "head" and "v0"."""
    y, z = promote(target, input)
    if name == "relu" and version == "v0":
        return np.where((z <= 0) & (y == 0), z, y)
    if name == "relu":
        return np.where(y > 0, y, np.minimum(z, 0))
    if name == "doubled_relu":
        return np.where(y > 0, y / 2, y)
    if name == "n_hot":
        return hot_target(y, z, "clamp")
    if name == "binary":
        mean: Array = z.mean(-1, keepdims=True)
        return hot_target(y, z - mean, "clamp") + mean
    return y


def move(displacement: ArrayLike, weight: ArrayLike, dx: str, dx_reg: float) -> Array:
    """The displacement of the input ``[B, N]`` for that of the output ``[B, M]``."""
    d, W = promote(displacement, weight)
    moved: Array = np.zeros((len(d), W.shape[1]))
    for b in range(len(d)):
        if dx == "regularized":
            moved[b] = np.linalg.solve(W.T @ W + dx_reg * np.eye(W.shape[1]), W.T @ d[b])
            continue
        for k in range(len(W)):
            norm = 1.0 if dx == "mean" else W[k] @ W[k]
            moved[b] += d[b, k] * W[k] / norm / len(W) if norm != 0 else 0
    return moved


def solve_weights(
    residual: ArrayLike,
    input: ArrayLike,
    stickiness: ArrayLike,
    biased: bool,
    relaxation: float,
    damping: float,
    update: str,
    reg: float,
) -> tuple[Array, Array]:
    """``dW [M, N]`` and ``db [M]`` for residuals ``[B, M]`` at inputs ``[B, N]``, weighted by ``s [M, N]``."""
    r, x, s = promote(residual, input, stickiness)
    X = np.concatenate([x, np.full((len(x), 1), float(biased))], 1)
    if update == "exact":
        change: Array = relaxation * r.T @ np.linalg.solve(X @ X.T + reg * np.eye(len(X)), X)
    else:
        # The broadcast form, B x M x (N + 1).
        eased = X[:, None, :] / np.concatenate([s, np.ones((len(s), 1))], 1)
        norms = (eased * X[:, None, :]).sum(2) + damping
        scaled = np.divide(relaxation, norms, out=np.zeros_like(norms), where=norms != 0)
        change = (r[:, :, None] * eased * scaled[:, :, None]).sum(0) / max(1, len(x))
    return change[:, :-1], change[:, -1]


def kaczmarz_step(
    displacement: ArrayLike,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    *,
    relaxation: float,
    damping: float,
    dx: str,
    dx_reg: float,
    update: str,
    batch_reg: float,
    first: str,
    units: str | None,
    count: int,
    sticky: float = 0.0,
    keep_norm: bool = False,
) -> tuple[Array, Array, Array]:
    """``dW [M, N]``, ``db [M]`` and the target of the input ``[B, N]`` of a linear layer.

    Args:
        displacement: ``y' - y``, ``[B, M]``.
        input: ``x``, ``[B, N]``.
        weight: ``W``, ``[M, N]``.
        bias: ``b``, ``[M]``, or None.
        relaxation, damping, update, batch_reg: of the weights' update.
        dx, dx_reg: of the input's displacement.
        first: what is changed first, "input" or "weights".
        units: what made the input, with their ``count``; None: it is data and stays.
        sticky: how much more a weight of its row's mean size resists change than a zero one.
        keep_norm: whether the moved input keeps its norm.

    Source: ASFaust, "SLMfun", ``experiments/targetprop/layers/linear.py`` and ``experiments/targetprop2``.
    """
    d, x, W = promote(displacement, input, weight)
    b = np.zeros(len(W)) if bias is None else promote(bias)[0]
    s = np.ones_like(W)
    for k in range(len(W)):
        if W[k].any():
            s[k] += sticky * np.abs(W[k]) / np.abs(W[k]).mean()
    options = (s, bias is not None, relaxation, damping, update, batch_reg)
    target = x @ W.T + b + d

    def put_out(asked: Array) -> Array:
        output = feasible(asked, str(units), count)
        for k in range(len(x)):
            if keep_norm and output[k].any():
                output[k] = output[k] * np.linalg.norm(x[k]) / np.linalg.norm(output[k])
        return output

    if units is None:
        return (*solve_weights(d, x, *options), x)
    if first == "weights":
        dW, db = solve_weights(d, x, *options)
        W, b = W + dW, b + db
        return dW, db, put_out(x + move(target - (x @ W.T + b), W, dx, dx_reg))
    moved = put_out(x + move(d, W, dx, dx_reg))
    return (*solve_weights(target - (moved @ W.T + b), moved, *options), moved)


def kaczmarz_train(
    input: ArrayLike,
    labels: ArrayLike,
    weights: Sequence[ArrayLike],
    biases: Sequence[ArrayLike],
    relaxation: float,
    damping: float,
    dx: str,
    dx_reg: float,
    output: str,
) -> tuple[Array, list[Array], list[Array]]:
    """A pass over samples ``[K, N]``, one at a time; returns the predictions and the new weights and biases."""
    (x,) = promote(input)
    W, b = [promote(w)[0].copy() for w in weights], [promote(v)[0].copy() for v in biases]
    options = {"relaxation": relaxation, "damping": damping, "dx": dx, "dx_reg": dx_reg, "update": "average"}
    predictions = []
    for row, label in zip(x, np.asarray(labels), strict=True):
        h, z = [row[None]], []
        for i in range(len(W)):
            z.append(h[i] @ W[i].T + (b[i] if b else 0))
            h.append(np.maximum(z[i], 0))
        predictions.append(int(np.argmax(z[-1])))
        target = hot_target(np.eye(len(W[-1]))[[label]], z[-1], output)
        for i in reversed(range(len(W))):
            dW, db, moved = kaczmarz_step(
                target - z[i],
                h[i],
                W[i],
                b[i] if b else None,
                **options,  # type: ignore[arg-type]  # one dict of numbers and names
                batch_reg=0.0,
                first="input",
                units="relu" if i else None,
                count=1,
            )
            W[i] += dW
            if b:
                b[i] += db
            if i:
                target = units_target(moved, z[i - 1], "relu", "head")
    return np.array(predictions), W, b
