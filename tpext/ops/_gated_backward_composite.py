"""The backward pass of GRU and LSTM by torch's operations alone: on any device, in any dtype, and by the Jacobian.

:func:`gated_backward_composite` is ``gated_layer_backward`` of :mod:`tpext.ops.gated_layer`, which has the equations,
where no kernel serves, and its ``gated_jacobian_backward``. Arguments are not checked here: they do that.
Bits may depend on batch and threads, as those of torch's products do.

All members run side by side, each in its own order of steps. The pass goes by stretches of time, as the kernels do:
what is elementwise in a stretch is done at once, and neither its coefficients nor delta stand in memory for all steps.

A layer carries n states, h and in an LSTM c; the last of them is what a step depends on directly. What a unit is asked
to move by are its G pre-activations and, behind them, that last state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tpext.ops._library import compute_dtype
from tpext.ops._members import Numbers, as_list
from tpext.ops._recurrent_steps import directions, of_run, valid_steps, where_valid

if TYPE_CHECKING:
    from tpext.ops.gated_layer import _Backward, _Gradients

Number: TypeAlias = float | Tensor
"""The same for all members, or one for each, ``[S, 1, ...]``."""

# Steps whose elementwise work is done at once.
_STRETCH = 32


class _Stretch(NamedTuple):
    """What the backward pass reads of some steps, in the order of each member's run."""

    kept: Sequence[Tensor]
    """r, z, n, a or i, f, g, o, c, ``[S, t, B, H]`` each."""
    h: Tensor
    """The state before each step, ``[S, t, B, H]``."""
    last: Tensor
    """The last of the states before each step: ``h`` again, or ``c``."""
    own: Tensor | None
    """``-target_step g`` of each state, ``[S, t, B, n, H]``."""
    on: Tensor | None
    """Which steps are valid, ``[S, t, B, 1, 1]``; None: all."""


class _Matrices(NamedTuple):
    """What moves of pre-activations are multiplied by, in the dtype of the computation."""

    weight: Tensor
    """``[S, G H, H]``."""
    feedback: Tensor
    """``[S, G H, H]``."""
    norm: Tensor | None
    """``|weight|``, ``[S]``, where Chebyshev's iteration needs it."""


def gated_backward_composite(
    call: _Backward, reg: Sequence[float] = (1.0,), chebyshev_steps: int | None = None
) -> _Gradients:
    """``gated_layer_backward``; for ``inverse="jacobian"`` also ``gated_jacobian_backward``, with its two numbers."""
    through_time, n = call.credit == "through_time", 1 if call.c0 is None else 2
    dtype = compute_dtype(call.states)
    weight = call.weight_hh.to(dtype)
    norm = None if chebyshev_steps is None else torch.linalg.matrix_norm(weight, 2)
    matrices = _Matrices(weight, call.feedback.to(dtype), norm)
    arriving, credited = (
        torch.stack([torch.zeros_like(call.h0) if state is None else state for state in states[:n]], 2).to(dtype)
        for states in ((call.disp_h_n, call.disp_c_n), (call.credit_h_n, call.credit_c_n))
    )
    sums = _Sums(call)
    for end in range(call.states.shape[1], 0, -_STRETCH):
        begin = max(end - _STRETCH, 0)
        stretch = _read(call, begin, end)
        derivatives = _branches(stretch, "derivative", "derivative", 0.0, 0.0)
        wanted = _way_back(call, stretch, derivatives, matrices, reg, chebyshev_steps)
        credits = []
        for step in range(end - begin - 1, -1, -1):
            d = arriving if stretch.own is None else arriving + stretch.own[:, step]
            k = credited - d if through_time else -d
            on = None if stretch.on is None else stretch.on[:, step]
            arriving = where_valid(on, wanted(step, d), arriving)
            if through_time:
                credited = where_valid(on, _of_states_before(derivatives[:, step], k, weight), credited)
            credits.append(k)
        sums.add(begin, stretch, derivatives, torch.stack(credits[::-1], 1))
    nothing = call.states.new_empty(0)
    carried = [
        tensor[:, :, state].to(nothing.dtype).contiguous() if state < n and given else nothing
        for tensor, given in ((arriving, True), (credited, through_time))
        for state in range(2)
    ]
    return *sums.found(), *carried  # type: ignore[return-value]


def _read(call: _Backward, begin: int, end: int) -> _Stretch:
    """Steps ``begin`` to ``end`` of the run."""
    dtype, time = compute_dtype(call.states), call.states.shape[1]
    on = was_on = None
    if call.lengths is not None:
        valid = valid_steps(call.lengths, time).expand(call.states.shape[0], -1, -1, -1)
        on = of_run(valid, call.reverse, begin, end)
        was_on = of_run(valid, call.reverse, max(begin - 1, 0), end - 1)

    def before(states: Tensor, start: Tensor) -> Tensor:
        # a member that runs backwards comes out of its padding with nothing but its start
        found = where_valid(was_on, of_run(states, call.reverse, max(begin - 1, 0), end - 1), start.unsqueeze(1))
        return (found if begin > 0 else torch.cat([start.unsqueeze(1), found], 1)).to(dtype)

    own = None
    if call.grad_states is not None:
        # the padding may hold NaN, which goes no further than its row and step
        g = of_run(call.grad_states, call.reverse, begin, end).to(dtype)
        own = -_number(call.target_step, g) * g
        own = torch.stack([own] if call.c0 is None else [own, torch.zeros_like(own)], 3)
    h = before(call.states, call.h0)
    return _Stretch(
        of_run(call.kept, call.reverse, begin, end).to(dtype).unbind(3),
        h,
        h if call.c0 is None else before(call.kept[:, :, :, 4], call.c0),
        own,
        None if on is None else on.unsqueeze(4),
    )


def _number(given: Numbers, like: Tensor) -> Number:
    """A number for all members, or one for each as a tensor that goes with ``like [S, ...]``."""
    numbers = as_list(given)
    if len(numbers) == 1:
        return numbers[0]
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.dim() - 1))


def _slope(
    kind: str, value: Tensor, edges: tuple[Number, Number], derivative: Callable[[Tensor], Tensor], reg: Number
) -> Tensor:
    """What a displacement is multiplied by on its way back through a sigmoid or tanh."""
    if kind == "one":
        return torch.ones_like(value)
    if kind == "derivative":
        return derivative(value)
    slope = derivative(torch.clamp(value, *edges))  # type: ignore[arg-type]
    return slope / (slope * slope + reg)


def _of_sigmoid(value: Tensor) -> Tensor:
    return value * (1 - value)


def _of_tanh(value: Tensor) -> Tensor:
    return 1 - value * value


def _branches(stretch: _Stretch, gate: str, candidate: str, margin: Number, reg: Number) -> Tensor:
    """What each state asks of each move, branch by branch, ``[S, t, B, n, G + 1, H]``.

    With slopes "derivative" it is the derivative of the state by that pre-activation, or by the last state before.
    """

    def s(value: Tensor) -> Tensor:
        return _slope(gate, value, (margin, 1 - margin), _of_sigmoid, reg)

    def t(value: Tensor) -> Tensor:
        return _slope(candidate, value, (margin - 1, 1 - margin), _of_tanh, reg)

    if len(stretch.kept) == 4:
        r, z, n, a = stretch.kept
        of_n = (1 - z) * t(n)
        return torch.stack([of_n * a * s(r), (stretch.h - n) * s(z), of_n * r, z], 3).unsqueeze(3)
    i, f, g, o, c = stretch.kept
    seen = torch.tanh(c)
    of_c = torch.stack([g * s(i), stretch.last * s(f), i * t(g), torch.zeros_like(o), f], 3)
    of_h = (o * t(seen)).unsqueeze(3) * of_c
    of_h[:, :, :, 3] = seen * s(o)
    return torch.stack([of_h, of_c], 3)


def _of_cell(stretch: _Stretch, derivatives: Tensor, reg: Number) -> Tensor:
    """The same by the regularised inverse of a unit as a whole: ``(A A' + reg I)^-1 A`` with A the derivatives.

    Of an LSTM A has the rows ``[u C, w]`` for h and ``[C, 0]`` for c, where the output gate stands last: written so,
    nothing cancels in the determinant of the 2 x 2 matrix.
    """
    of_last = derivatives[:, :, :, -1]
    squares = (of_last * of_last).sum(3)
    if len(stretch.kept) == 4:
        return derivatives / (squares + reg).unsqueeze(3).unsqueeze(3)
    o, c = stretch.kept[3:]
    seen = torch.tanh(c)
    u, w = o * _of_tanh(seen), seen * _of_sigmoid(o)
    det = (w * w + reg) * (squares + reg) + u * u * squares * reg
    by_h, by_c = (of_last * factor.unsqueeze(3) for factor in (u * reg / det, (w * w + reg) / det))
    by_h[:, :, :, 3], by_c[:, :, :, 3] = w * (squares + reg) / det, -u * w * squares / det
    return torch.stack([by_h, by_c], 3)


def _way_back(
    call: _Backward,
    stretch: _Stretch,
    derivatives: Tensor,
    matrices: _Matrices,
    reg: Sequence[float],
    chebyshev_steps: int | None,
) -> Callable[[int, Tensor], Tensor]:
    """What the displacement ``[S, B, n, H]`` of a step of the stretch asks of the states before, as a function."""
    if call.inverse == "jacobian":
        ridge = _number(reg, stretch.h)
        if matrices.norm is None:
            return lambda step, d: _solve(derivatives[:, step], d, matrices.weight, ridge)
        bound, steps = _squared_norm_bound(derivatives, matrices.norm), chebyshev_steps or 0
        return lambda step, d: _iterate(derivatives[:, step], d, matrices.weight, ridge, bound[:, step], steps)
    numbers = [_number(given, stretch.h) for given in (call.margin, call.slope_reg)]
    if call.inverse == "cell":
        moves = _of_cell(stretch, derivatives, numbers[1])
    elif call.gate_slope == call.candidate_slope == "derivative":
        moves = derivatives
    else:
        moves = _branches(stretch, call.gate_slope, call.candidate_slope, *numbers)
    return lambda step, d: _of_states_before(moves[:, step], d, matrices.feedback)


def _of_states_before(moves: Tensor, d: Tensor, matrix: Tensor) -> Tensor:
    """What the states before are asked for, ``[S, B, n, H]``, by the ``moves [S, B, n, G + 1, H]`` that d asks for."""
    asked = (moves * d.unsqueeze(3)).sum(2)
    of_h, of_last = torch.bmm(asked[:, :, :-1].flatten(2), matrix), asked[:, :, -1]
    return (of_h + of_last).unsqueeze(2) if d.shape[2] == 1 else torch.stack([of_h, of_last], 2)


def _of_new_states(derivatives: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """``J y``: by how much a step's states move, ``[S, B, n, H]``, when those before move by ``y``."""
    gates = torch.bmm(y[:, :, 0], weight.mT).view(*y.shape[:2], derivatives.shape[3] - 1, y.shape[3])
    return (derivatives * torch.cat([gates, y[:, :, -1:]], 2).unsqueeze(2)).sum(3)


def _solve(derivatives: Tensor, d: Tensor, weight: Tensor, reg: Number) -> Tensor:
    """``(J'J + reg I)^-1 J' d`` of each row."""
    gates = weight.reshape(weight.shape[0], -1, d.shape[3], d.shape[3])
    J = torch.einsum("sbngh,sghj->sbnhj", derivatives[:, :, :, :-1], gates)
    direct = torch.diag_embed(derivatives[:, :, :, -1])
    J = (J + direct if d.shape[2] == 1 else torch.cat([J, direct], 4)).flatten(2, 3)
    gram = J.mT @ J + reg * torch.eye(J.shape[3], dtype=J.dtype, device=J.device)
    moved: Tensor = torch.linalg.solve(gram, J.mT @ d.flatten(2).unsqueeze(3))
    return moved.view(d.shape)


def _squared_norm_bound(derivatives: Tensor, norm: Tensor) -> Tensor:
    """A bound of ``|J|^2`` of each row and step, ``[S, t, B, 1, 1]``, by ``w = |W|`` and derivatives of single units.

    With a unit's derivatives ``c_k`` by its gates and ``z`` by the last state::

        GRU    (w + 1) max over units of  w sum_k c_k^2 + z^2            as J h = [c, z w^-1/2] (W h, w^1/2 h)
        LSTM   max over units of  |w^2 sum_k c_k c_k' + z z'|            as J (h, c) = [c, z w^-1] (W h, w c)
    """
    w = norm.view(-1, 1, 1, 1)

    def product(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
        terms = first * second
        return factor * terms[:, :, :, :-1].sum(3) + terms[:, :, :, -1]

    if derivatives.shape[3] == 1:
        c = derivatives[:, :, :, 0]
        return ((w + 1) * product(c, c, w)).amax(3, keepdim=True).unsqueeze(4)
    h, c = derivatives.unbind(3)
    hh, cc, hc = (product(first, second, w * w) for first, second in ((h, h), (c, c), (h, c)))
    largest = (hh + cc) / 2 + torch.hypot((hh - cc) / 2, hc)
    return largest.amax(3, keepdim=True).unsqueeze(4)


def _iterate(derivatives: Tensor, d: Tensor, weight: Tensor, reg: Number, bound: Tensor, steps: int) -> Tensor:
    """So many steps of the Chebyshev iteration for ``(J'J + reg I) y = J' d`` from ``y = 0``.

    Source: Saad, "Iterative Methods for Sparse Linear Systems" (2003), algorithm 12.1, without divisions by ``bound``.
    """
    center, radius = reg + bound / 2, bound / 2
    residual = _of_states_before(derivatives, d, weight)
    change, ratio = residual / center, radius * radius / center
    y = change
    for _ in range(steps - 1):
        moved = _of_states_before(derivatives, _of_new_states(derivatives, change, weight), weight)
        residual = residual - moved - reg * change
        following = 2 * center - ratio
        change, ratio = (ratio * change + 2 * residual) / following, radius * radius / following
        y = y + change
    return y


class _Sums:
    """The gradients of input, weight_ih, weight_hh, bias_ih and bias_hh, added up stretch by stretch."""

    def __init__(self, call: _Backward) -> None:
        self.call = call
        stack, gates, hidden = call.weight_hh.shape
        shapes = ((stack, gates, call.input.shape[3]), (stack, gates, hidden), (stack, gates), (stack, gates))
        new = call.states.new_zeros
        dtype = compute_dtype(call.states)
        self.of_input = call.input.new_zeros(call.input.shape if call.needs[0] else 0, dtype=dtype)
        self.of_parameters = [
            new(shape if need else 0, dtype=dtype) for shape, need in zip(shapes, call.needs[1:], strict=True)
        ]

    def add(self, begin: int, stretch: _Stretch, derivatives: Tensor, k: Tensor) -> None:
        """Add what the chain rule gives of ``k [S, t, B, n, H]``, for the steps from ``begin`` on."""
        call, needs = self.call, self.call.needs
        asked = where_valid(stretch.on, (derivatives[:, :, :, :, :-1] * k.unsqueeze(4)).sum(3), 0)
        e = asked.flatten(3).flatten(1, 2)
        f = e
        if len(stretch.kept) == 4:
            _, z, n, _ = stretch.kept
            of_x = where_valid(stretch.on, ((1 - z) * _of_tanh(n) * k[:, :, :, 0]).unsqueeze(3), 0)
            f = torch.cat([asked[:, :, :, :2], of_x], 3).flatten(3).flatten(1, 2)
        end = begin + k.shape[1]
        if needs[0]:
            self._add_of_input(begin, end, f)
        if needs[1]:
            x = of_run(call.input.expand(k.shape[0], -1, -1, -1), call.reverse, begin, end)
            x = where_valid(None if stretch.on is None else stretch.on.squeeze(4), x, 0).to(f.dtype)
            self.of_parameters[0] += torch.bmm(f.mT, x.flatten(1, 2))
        if needs[2]:
            self.of_parameters[1] += torch.bmm(e.mT, stretch.h.flatten(1, 2))
        if needs[3]:
            self.of_parameters[2] += f.sum(1)
        if needs[4]:
            self.of_parameters[3] += e.sum(1)

    def _add_of_input(self, begin: int, end: int, f: Tensor) -> None:
        call, time = self.call, self.call.input.shape[1]
        assert call.input_feedback is not None
        matrix = call.input_feedback.to(f.dtype)
        rows = torch.bmm(f, matrix * _number(call.input_scale, matrix))
        rows = rows.view(rows.shape[0], end - begin, call.input.shape[2], rows.shape[2])
        for members, backwards in directions(call.reverse):
            steps = slice(time - end, time - begin) if backwards else slice(begin, end)
            found = rows[members].flip(1) if backwards else rows[members]
            if call.input.shape[0] == len(call.reverse):
                self.of_input[members, steps] = found
            else:
                self.of_input[:, steps] += found.sum(0, keepdim=True)

    def found(self) -> list[Tensor]:
        """The gradients, empty where not needed."""
        scaled = (
            total * _number(self.call.scale, total) if need else total
            for total, need in zip(self.of_parameters, self.call.needs[1:], strict=True)
        )
        return [total.to(self.call.states.dtype) for total in (self.of_input, *scaled)]
