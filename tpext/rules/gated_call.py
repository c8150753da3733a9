"""A layer of a cell with gates (GRU, LSTM) as rules see it, and the way back through it on the fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from tpext.ops._gated_composite import gated_layer_composite
from tpext.ops._members import as_list
from tpext.ops._recurrent_steps import states_before, valid_steps
from tpext.ops.gated_layer import gated_jacobian_backward, gated_layer, gated_layer_backward
from tpext.rules.base import PerMember
from tpext.rules.recurrent_pass import Gradients, Piece, State, StateOrNone, Sweep

if TYPE_CHECKING:
    from tpext.rules.recurrent import RecurrentRule


class GatedCall(NamedTuple):
    """A layer of a cell with gates and what it is to run on; S directions or members run side by side.

    Attributes:
        input: ``[S or 1, T, B, I]``, of each member or shared by all, float32 or float64.
        start: the initial state, ``(h,)`` of a GRU, ``(h, c)`` of an LSTM, ``[S, B, H]`` each.
        weight_ih: ``[S, G*H, I]``, G = 3 gates of a GRU (r, z, n), 4 of an LSTM (i, f, g, o).
        weight_hh: ``[S, G*H, H]``.
        bias_ih, bias_hh: ``[S, G*H]``, or None.
        lengths: ``[B]`` int64 valid steps of each row, or None for all T.
        reverse: S flags: the member runs from the last valid step to the first.
        cell: "gru" or "lstm".
        owned: the rule's own parameters, ``[S, ...]`` each.
        checkpoint_every: K >= 1 steps a piece; None: the whole sequence is one piece.
        needs_states: with ``checkpoint_every``, whether anything reads the layer's states.
    """

    input: Tensor
    start: State
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    lengths: Tensor | None
    reverse: Sequence[bool]
    cell: str
    owned: tuple[Tensor, ...] = ()
    checkpoint_every: int | None = None
    needs_states: bool = True

    # What the pass asks of a layer of any cell (recurrent_pass.CellCall).

    @property
    def op(self) -> str:
        return "gated_layer"

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def on(
        self,
        input: Tensor,
        start: State,
        weights: Sequence[Tensor | None],
        lengths: Tensor | None,
        owned: tuple[Tensor, ...],
    ) -> GatedCall:
        """The same layer on other tensors."""
        # the first two weights are there in every call
        return GatedCall(input, start, *weights, lengths, *self[7:9], owned, *self[10:])  # type: ignore[arg-type, call-arg]

    def forward(self, keep: bool) -> tuple[Tensor, State, Tensor | None]:
        """States, the final state, and what the backward pass reads beside: the gates, if kept."""
        h0, c0 = _two(self.start)
        states, h_n, c_n, kept = gated_layer(
            self.input, h0, c0, *self.weights, self.lengths, self.reverse, self.cell, keep
        )
        return states, (h_n, c_n)[: len(self.start)], kept

    def composite(self) -> tuple[Tensor, ...]:
        """States and the final state, by operations with derivatives of every order."""
        h0, c0 = self.start[0], _two(self.start)[1]
        states, h_n, c_n, _ = gated_layer_composite(
            self.input, h0, c0, *self.weights, self.lengths, self.reverse, self.cell
        )
        return states, *(h_n, c_n)[: len(self.start)]

    def restarted(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer, then each of its steps again from a changed h before it: see :class:`RecurrentCall`."""
        states, _, kept = self.forward(keep=len(self.start) > 1)
        piece = Piece(self.input, self.start, states, kept, self.lengths)
        h, *c = _before_steps(piece, self.reverse)
        before = change(h)
        start = (before.flatten(1, 2), *(kind.flatten(1, 2) for kind in c))
        steps = self.on(_rows(self.input), start, self.weights, None, self.owned)
        return states, before, steps.forward(keep=False)[0].view_as(states)

    def start_sweep(self, rule: RecurrentRule, needs: Sequence[bool]) -> Sweep:
        return rule.start_gated_sweep(GatedWeights(*self.weights, self.owned, self.reverse, self.cell, needs))


class GatedWeights(NamedTuple):
    """What a rule may read of a layer of a cell with gates in its backward pass.

    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh, owned, reverse, cell: as in :class:`GatedCall`.
        needs: whether the gradient of input, weight_ih, weight_hh, bias_ih and bias_hh is wanted.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    owned: tuple[Tensor, ...]
    reverse: Sequence[bool]
    cell: str
    needs: Sequence[bool]


class GatedHowBack(NamedTuple):
    """How a pass goes back through gates, as ``torch.ops.tpext.gated_layer_backward`` (:mod:`tpext.ops.gated_layer`)
    explains it.

    Without defaults: the compiler takes a float that it reads from a class for one that may change.

    Attributes:
        inverse: "branch", "cell" or "jacobian".
        credit: "local" or "through_time".
        target_step: ``d_T = -target_step * g_T``, > 0. This and the other numbers are those of all members, or tuples
            with one for each.
        margin: distance kept from the edges of a gate's range, 0 < margin < 0.5.
        gate_slope, candidate_slope: "inverse", "derivative" or "one".
        slope_reg: regularisation of slope "inverse" and of inverse "cell", >= 0.
        jacobian: of inverse "jacobian", the regularisation and the steps of ``gated_jacobian_backward``, or None.
    """

    inverse: str
    credit: str
    target_step: PerMember
    margin: PerMember
    gate_slope: str
    candidate_slope: str
    slope_reg: PerMember
    jacobian: tuple[PerMember, int | None] | None


def chain_rule() -> GatedHowBack:
    """Back-propagation, with W for the feedback matrix and minus a gradient for a displacement."""
    # nothing is clipped by a'
    return GatedHowBack("branch", "local", 1.0, 0.25, "derivative", "derivative", 0.0, None)


def run_gated_backward(
    layer: GatedWeights,
    piece: Piece,
    how: GatedHowBack,
    feedback: Tensor,
    scales: tuple[PerMember, PerMember],
    grad_states: Tensor | None,
    arriving: StateOrNone,
    credit: StateOrNone,
) -> tuple[Gradients, State, StateOrNone]:
    """Take a piece back by the fused kernels, one ``torch.ops.tpext.gated_layer_backward``: for :attr:`Sweep.run`.

    Args:
        layer, piece: as the sweep gets them.
        how: what the displacement goes through.
        feedback: the matrix ``P [S, G*H, H]``.
        scales: of the parameters' gradients, and of the input's.
        grad_states, arriving, credit: as the sweep gets them.

    Returns:
        What :attr:`Sweep.run` returns.

    Raises:
        ValueError: as the op does.
    """
    kinds, (h0, c0) = len(piece.start), _two(piece.start)
    arguments = (
        grad_states,
        piece.input,
        piece.states,
        h0,
        c0,
        piece.kept,
        layer.weight_hh,
        feedback,
        layer.weight_ih if layer.needs[0] else None,
        piece.lengths,
        layer.reverse,
        layer.cell,
        how.inverse,
        how.credit,
        as_list(how.target_step),
        as_list(how.margin),
        how.gate_slope,
        how.candidate_slope,
        as_list(how.slope_reg),
        *map(as_list, scales),
        list(layer.needs),
        *_two(arriving),
        *_two(credit),
    )
    if how.jacobian is None:
        *found, disp_h0, disp_c0, credit_h0, credit_c0 = gated_layer_backward(*arguments)
    else:
        reg, steps = how.jacobian
        *found, disp_h0, disp_c0, credit_h0, credit_c0 = gated_jacobian_backward(
            *arguments, reg=reg, chebyshev_steps=steps
        )
    gradients = [gradient if need else None for gradient, need in zip(found, layer.needs, strict=True)]
    before: StateOrNone = (credit_h0, credit_c0) if how.credit == "through_time" else (None, None)
    return gradients, (disp_h0, disp_c0)[:kinds], before[:kinds]


def _two(state: StateOrNone) -> StateOrNone:
    """Of h and of c, which a GRU has not."""
    return (*state, None)[:2]


def steps_apart(piece: Piece, reverse: Sequence[bool]) -> Piece:
    """The steps of a piece side by side, as rows ``[S, 1, t B, ...]`` of a single step.

    Nothing goes from one to another: taken back so, a gradient of the states gives the parameters each step's own.
    """
    assert piece.kept is not None
    start = tuple(kind.flatten(1, 2) for kind in _before_steps(piece, reverse))
    lengths = None if piece.lengths is None else valid_steps(piece.lengths, piece.states.shape[1]).flatten().long()
    return Piece(_rows(piece.input), start, _rows(piece.states), _rows(piece.kept), lengths)


def _before_steps(piece: Piece, reverse: Sequence[bool]) -> State:
    """The state that each step started from, ``[S, t, B, H]`` of each kind."""
    of_cell = [] if len(piece.start) == 1 or piece.kept is None else [piece.kept[:, :, :, 4]]
    kinds = zip((piece.states, *of_cell), piece.start, strict=True)
    return tuple(states_before(states, first, piece.lengths, reverse) for states, first in kinds)


def _rows(of_steps: Tensor) -> Tensor:
    return of_steps.flatten(1, 2).unsqueeze(1)
