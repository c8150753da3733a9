"""One step of a gated layer backward: its derivatives, and what its rules want of the states before.

Notation: as in :mod:`tpext.reference.gated_scan`. From step to step goes ``h``, and behind it the LSTM's ``c``: n = 1
or 2 states; ``d`` are their displacements, ``[n, H]``. The new states of a unit depend on its G pre-activations ``u =
h_{t-1} W_hh' + b_hh``, and directly on its last state before, ``h_{t-1}`` in the GRU and ``c_{t-1}`` in the LSTM.
:func:`tpext.reference.gated_target_pass` has the equations in one place. Each function is for one row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tpext.reference.rnn_scan import Array
from tpext.reference.rnn_target_scan import backward_slope


class Derivatives(NamedTuple):
    """Derivatives of one step of one row, unit by unit."""

    by_gate: Array
    """``[n, G, H]``: of each new state with respect to ``u``."""
    by_input: Array
    """The same with respect to ``x``; it differs where the GRU's r stands between."""
    direct: Array
    """``[n, H]``: with respect to the last state before, ``u`` held fixed."""


class Way(NamedTuple):
    """How a member goes back by one step, see :func:`tpext.reference.gated_target_pass`."""

    inverse: str
    gate_slope: str
    candidate_slope: str
    margin: float
    slope_reg: float
    reg: float
    chebyshev_steps: int | None

    def of_gate(self, value: Array) -> Array:
        """``S_s`` of a sigmoid's value."""
        if self.gate_slope == "one":
            return np.ones_like(value)
        if self.gate_slope == "derivative":
            return value * (1 - value)
        if self.gate_slope != "inverse":
            raise ValueError(f"gate_slope must be 'inverse', 'derivative' or 'one', got {self.gate_slope!r}")
        value = np.clip(value, self.margin, 1 - self.margin)
        derivative = value * (1 - value)
        inverse: Array = derivative / (derivative**2 + self.slope_reg)
        return inverse

    def of_candidate(self, value: Array) -> Array:
        """``S_t`` of a tanh's value."""
        return backward_slope(value, "tanh", self.margin, self.candidate_slope, self.slope_reg)


def gru_derivatives(kept: Array, h: Array) -> Derivatives:
    """Of ``h_t = (1 - z) n + z h``, with ``h`` the state before."""
    r, z, n, a = kept
    c_r = (1 - z) * (1 - n**2) * a * r * (1 - r)
    c_z = (h - n) * z * (1 - z)
    x_n = (1 - z) * (1 - n**2)
    return Derivatives(np.stack([[c_r, c_z, x_n * r]]), np.stack([[c_r, c_z, x_n]]), z[None])


def lstm_derivatives(kept: Array, c: Array) -> Derivatives:
    """Of ``h_t = o tanh(c_t)`` and ``c_t = f c + i g``, with ``c`` the one before."""
    i, f, g, o, new = kept
    of_c = np.stack([g * i * (1 - i), c * f * (1 - f), i * (1 - g**2), np.zeros_like(c)])
    h_by_c = o * (1 - np.tanh(new) ** 2)
    of_h = h_by_c * of_c
    of_h[3] = np.tanh(new) * o * (1 - o)
    by_gate = np.stack([of_h, of_c])
    return Derivatives(by_gate, by_gate, np.stack([h_by_c * f, f]))


def gru_branches(d: Array, kept: Array, h: Array, way: Way) -> tuple[Array, Array]:
    """``m [G, H]`` and ``direct [H]``, by the inverse of each branch on its own."""
    r, z, n, a = kept
    (d_h,) = d
    wanted = d_h * (1 - z) * way.of_candidate(n)
    m = [wanted * a * way.of_gate(r), d_h * (h - n) * way.of_gate(z), wanted * r]
    return np.stack(m), z * d_h


def lstm_branches(d: Array, kept: Array, c: Array, way: Way) -> tuple[Array, Array]:
    """The same for an LSTM, where ``c_t`` has to move for its own target and for that of ``h_t``."""
    i, f, g, o, new = kept
    d_h, d_c = d
    wanted = d_c + d_h * o * way.of_candidate(np.tanh(new))
    m = [
        wanted * g * way.of_gate(i),
        wanted * c * way.of_gate(f),
        wanted * i * way.of_candidate(g),
        d_h * np.tanh(new) * way.of_gate(o),
    ]
    return np.stack(m), f * wanted


def elementwise(derivatives: Derivatives) -> Array:
    """``A [n, G + 1, H]``: how a unit's new states depend on its pre-activations and its last state before."""
    return np.concatenate([derivatives.by_gate, derivatives.direct[:, None]], axis=1)


def cell_inverse(d: Array, derivatives: Derivatives, slope_reg: float) -> tuple[Array, Array]:
    """``m [G, H]`` and ``direct [H]``, by the regularised inverse of a unit as a whole.

    ``A' (A A' + slope_reg I)^-1 d``, the smallest moves that reach all targets of the unit.
    """
    A = elementwise(derivatives)
    if len(A) == 1:
        moves = A[0] * d[0] / (np.sum(A[0] ** 2, axis=0) + slope_reg)
    else:
        E, C = A
        aa, bb, ab = np.sum(E**2, axis=0) + slope_reg, np.sum(C**2, axis=0) + slope_reg, np.sum(E * C, axis=0)
        det = aa * bb - ab**2
        moves = E * (bb * d[0] - ab * d[1]) / det + C * (aa * d[1] - ab * d[0]) / det
    return moves[:-1], moves[-1]


def step_jacobian(derivatives: Derivatives, weight_hh: Array) -> Array:
    """``J [n H, n H]``: of the new states with respect to those before, through ``u`` and directly."""
    n, G, H = derivatives.by_gate.shape
    gates = weight_hh.reshape(G, H, H)
    J = np.zeros((n, H, n, H), weight_hh.dtype)
    J[:, :, 0] = np.einsum("ngh,ghj->nhj", derivatives.by_gate, gates)
    for state in range(n):
        J[state, :, -1] += np.diag(derivatives.direct[state])
    return J.reshape(n * H, n * H)


def squared_norm_bound(derivatives: Derivatives, weight_hh: Array) -> float:
    """A bound of ``|J|^2`` by one norm of the weights, ``w = |W_hh|``, and what single units have.

    With a unit's derivatives ``c_k`` by its gates and ``z`` direct::

        GRU    (w + 1) max over units of  w sum_k c_k^2 + z^2            as J h = [c, z w^-1/2] (W h, w^1/2 h)
        LSTM   max over units of  |w^2 sum_k c_k c_k' + z z'|            as J (h, c) = [c, z w^-1] (W h, w c)

    where the LSTM's ``c_k`` and ``z`` have two elements, of h and c.
    """
    w = np.linalg.norm(weight_hh.astype(np.float64), 2)
    c, z = derivatives.by_gate.astype(np.float64), derivatives.direct.astype(np.float64)
    if len(z) == 1:
        return float((w + 1) * (w * np.sum(c[0] ** 2, axis=0) + z[0] ** 2).max())
    gram = w**2 * np.einsum("nkh,mkh->hnm", c, c) + np.einsum("nh,mh->hnm", z, z)
    return float(np.linalg.eigvalsh(gram).max())


def jacobian_inverse(d: Array, J: Array, reg: float) -> Array:
    """``(J'J + reg I)^-1 J' d``, solved in float64."""
    J, d = J.astype(np.float64), d.astype(np.float64)
    solution: Array = np.linalg.solve(J.T @ J + reg * np.eye(len(J)), J.T @ d)
    return solution


def chebyshev_inverse(d: Array, J: Array, reg: float, bound: float, steps: int) -> Array:
    """``steps`` steps of the Chebyshev iteration for ``(J'J + reg I) y = J' d`` from ``y = 0``.

    The error is at most ``1 / T_K(1 + 2 reg / bound)`` of the solution, with ``bound >= |J|^2`` and ``T_K`` the
    polynomial of degree ``K = steps``; ``y`` is linear in ``d``.

    Source: Golub and Varga, "Chebyshev semi-iterative methods" (1961), in the form of Saad, "Iterative Methods for
    Sparse Linear Systems" (2003), algorithm 12.1, without its divisions by ``bound``.
    """
    center, radius = reg + bound / 2, bound / 2
    residual: Array = J.T @ d
    change: Array = residual / center
    ratio = radius**2 / center
    y = change
    for _ in range(steps - 1):
        residual = residual - (J.T @ (J @ change) + reg * change)
        change = (ratio * change + 2 * residual) / (2 * center - ratio)
        ratio = radius**2 / (2 * center - ratio)
        y = y + change
    return y


def move_before(
    d: Array, kept: Array, before: Array, derivatives: Derivatives, weight_hh: Array, feedback: Array, way: Way
) -> Array:
    """What a step whose states are to move by ``d`` wants of the states before, ``[n, H]``."""
    if way.inverse == "jacobian":
        J = step_jacobian(derivatives, weight_hh)
        if way.chebyshev_steps is None:
            moved = jacobian_inverse(d.reshape(-1), J, way.reg)
        else:
            bound = squared_norm_bound(derivatives, weight_hh)
            moved = chebyshev_inverse(d.reshape(-1), J, way.reg, bound, way.chebyshev_steps)
        return moved.reshape(d.shape)
    if way.inverse == "cell":
        m, direct = cell_inverse(d, derivatives, way.slope_reg)
    elif way.inverse == "branch":
        m, direct = (gru_branches if len(d) == 1 else lstm_branches)(d, kept, before[-1], way)
    else:
        raise ValueError(f"inverse must be 'branch', 'cell' or 'jacobian', got {way.inverse!r}")
    return through_cell(m, direct, feedback, len(d))


def through_cell(of_gates: Array, direct: Array, matrix: Array, states: int) -> Array:
    """``of_gates [G, H]`` times ``matrix [G H, H]`` for ``h``, ``direct [H]`` for the last state: ``[n, H]``."""
    found = np.zeros((states, *direct.shape), direct.dtype)
    found[0] = of_gates.reshape(-1) @ matrix
    found[-1] += direct
    return found
