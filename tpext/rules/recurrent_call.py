"""A layer of the simple recurrent cell as rules see it, and the way back through it on the fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tpext.ops._members import as_list
from tpext.ops._recurrent_steps import final_states, states_before
from tpext.ops._rnn_composite import rnn_layer_composite
from tpext.ops._rnn_products import input_projection
from tpext.ops.rnn_layer import rnn_layer, rnn_layer_backward
from tpext.rules.base import PerMember
from tpext.rules.recurrent_pass import Gradients, Piece, State, StateOrNone, Sweep

if TYPE_CHECKING:
    from tpext.rules.recurrent import RecurrentRule


class RecurrentCall(NamedTuple):
    """A recurrent layer and what it is to run on; S directions run side by side, each with weights of its own.

    Attributes:
        input: ``[S or 1, T, B, I]``, of each member or shared by all, float32 or float64, on CUDA also bfloat16 or
            float16; on the CPU batch-first memory is read in place.
        h0: ``[S, B, H]``.
        weight_ih: U, ``[S, H, I]``.
        weight_hh: W, ``[S, H, H]``.
        bias: b, ``[S, H]`` or None.
        lengths: ``[B]`` int64 valid steps of each row, or None for all T.
        reverse: S flags: the member runs from the last valid step to the first.
        nonlinearity: "tanh", "relu" or "identity".
        owned: the rule's own parameters, ``[S, ...]`` each, in the order of its ``parameter_shapes``.
        checkpoint_every: K >= 1 steps a piece; None: the whole sequence is one piece.
        needs_states: whether the states of all steps are wanted, and not the last ones alone; with
            ``checkpoint_every`` False spares their memory.
    """

    input: Tensor
    h0: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    lengths: Tensor | None
    reverse: Sequence[bool]
    nonlinearity: str
    owned: tuple[Tensor, ...] = ()
    checkpoint_every: int | None = None
    needs_states: bool = True

    # What the pass asks of a layer of any cell (recurrent_pass.CellCall).

    @property
    def op(self) -> str:
        return "rnn_layer"

    @property
    def start(self) -> State:
        return (self.h0,)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.weight_ih, self.weight_hh, self.bias

    def on(
        self,
        input: Tensor,
        start: State,
        weights: Sequence[Tensor | None],
        lengths: Tensor | None,
        owned: tuple[Tensor, ...],
    ) -> RecurrentCall:
        """The same layer on other tensors."""
        weight_ih, weight_hh, bias = weights
        # the first two are there in every call
        tensors = (input, start[0], weight_ih, weight_hh, bias, lengths)
        return RecurrentCall(*tensors, *self[6:8], owned, *self[9:])  # type: ignore[arg-type]

    def forward(self, keep: bool) -> tuple[Tensor, State, Tensor | None]:
        """States, the final state, and what the backward pass reads beside: nothing."""
        states, h_n = rnn_layer(*self[:8])
        return states, (h_n,), None

    def composite(self) -> tuple[Tensor, ...]:
        """States and the final state, by operations with derivatives of every order."""
        if torch._C._are_functorch_transforms_active():
            # the scan's op has no derivative that these take
            return rnn_layer_composite(*self[:8])
        x_proj = input_projection(self.input, self.weight_ih, self.bias)
        states = torch.ops.tpext.rnn_scan(
            x_proj, self.h0, self.weight_hh, self.lengths, self.reverse, self.nonlinearity
        )
        return states, final_states(states, self.h0, self.lengths, self.reverse)

    def restarted(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer, then each of its steps again from a changed state before it.

        Returns:
            The states, ``change(states before each step)`` and what the steps reach from these, ``[S, T, B, H]`` each.
        """
        x_proj = input_projection(self.input, self.weight_ih, self.bias)
        states = torch.ops.tpext.rnn_scan(
            x_proj, self.h0, self.weight_hh, self.lengths, self.reverse, self.nonlinearity
        )
        before = change(states_before(states, self.h0, self.lengths, self.reverse))
        steps = (x_proj.flatten(1, 2).unsqueeze(1), before.flatten(1, 2), self.weight_hh)
        reached = torch.ops.tpext.rnn_scan(*steps, None, self.reverse, self.nonlinearity)
        return states, before, reached.view_as(states)

    def start_sweep(self, rule: RecurrentRule, needs: Sequence[bool]) -> Sweep:
        return rule.start_sweep(LayerWeights(*self.weights, self.owned, self.reverse, self.nonlinearity, needs))


class LayerWeights(NamedTuple):
    """What a rule may read of a layer in its backward pass.

    Attributes:
        weight_ih, weight_hh, bias, owned, reverse, nonlinearity: as in :class:`RecurrentCall`.
        needs: whether the gradient of input, weight_ih, weight_hh and bias is wanted.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    owned: tuple[Tensor, ...]
    reverse: Sequence[bool]
    nonlinearity: str
    needs: Sequence[bool]


class HowBack(NamedTuple):
    """How a pass goes back, as ``torch.ops.tpext.rnn_layer_backward`` (:mod:`tpext.ops.rnn_layer`) explains it.

    Without defaults: the compiler takes a float that it reads from a class for one that may change.

    Attributes:
        correction: "linearized", "difference", "none" or "learned".
        credit: "local" or "through_time".
        target_step: ``d_T = -target_step * g_T``, > 0. This and the other numbers are those of all members, or tuples
            with one for each.
        margin: distance kept from the edges of the activation's range, 0 < margin < 1.
        slope: "inverse", "derivative" or "one", of "linearized"; "inverse" with the others.
        slope_reg: regularisation of slope "inverse", >= 0; 0 with the others.
    """

    correction: str
    credit: str
    target_step: PerMember
    margin: PerMember
    slope: str
    slope_reg: PerMember


def run_backward(
    layer: LayerWeights,
    piece: Piece,
    how: HowBack,
    feedback: Tensor,
    input_feedback: Tensor | None,
    pre: Tensor | None,
    scales: tuple[PerMember, PerMember],
    of_displacement: bool,
    grad_states: Tensor | None,
    arriving: StateOrNone,
    credit: StateOrNone,
) -> tuple[Gradients, State, StateOrNone]:
    """Take a piece back by the fused kernels, one ``torch.ops.tpext.rnn_layer_backward``: for :attr:`Sweep.run`.

    Args:
        layer, piece: as the sweep gets them.
        how: what the displacement goes through.
        feedback: the matrix ``P [S, H, H]``; with correction "learned" the reverse layer's ``V^T``.
        input_feedback: F, ``[S, H, I]``, which makes the input's gradient: ``weight_ih``, or for ``of_displacement``
            what :meth:`RecurrentRule.input_feedback` returns. None if that gradient is not wanted.
        pre: ``[S, t, B, H]``: correction "none" takes the input's projection, "learned" what the reverse layer makes
            of the states before its tanh; None with the others.
        scales: of the parameters' gradients, and of the input's.
        of_displacement: whether the input's gradient is made of ``z_t`` rather than of ``e_t``.
        grad_states, arriving, credit: as the sweep gets them.

    Returns:
        What :attr:`Sweep.run` returns.

    Raises:
        ValueError: as the op does.
    """
    *found, first, first_credit = rnn_layer_backward(
        grad_states,
        piece.input,
        piece.states,
        piece.start[0],
        layer.weight_hh,
        feedback,
        input_feedback,
        pre,
        piece.lengths,
        layer.reverse,
        layer.nonlinearity,
        how.correction,
        how.credit,
        as_list(how.target_step),
        as_list(how.margin),
        how.slope,
        as_list(how.slope_reg),
        *map(as_list, scales),
        of_displacement,
        list(layer.needs),
        arriving[0],
        credit[0],
    )
    gradients = [gradient if need else None for gradient, need in zip(found, layer.needs, strict=True)]
    return gradients, (first,), (first_credit if how.credit == "through_time" else None,)
