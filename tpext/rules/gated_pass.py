"""One layer of a cell with gates (GRU, LSTM) as one autograd node: what ``recurrent_pass`` is to the simple cell."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tpext.ops._library import are_plain, check_lengths, full_precision, on_cuda
from tpext.ops._members import as_list
from tpext.ops.gated_layer import gated_jacobian_backward, gated_layer, gated_layer_backward
from tpext.rules.base import PerMember, apply_node, check_members, of_each, of_member
from tpext.rules.recurrent_pass import LayerNode, cut, of_members, pieces_of

if TYPE_CHECKING:
    from tpext.rules.recurrent import RecurrentRule

State: TypeAlias = tuple[Tensor, ...]
"""``(h,)`` of a GRU, ``(h, c)`` of an LSTM, ``[S, B, H]`` each."""


class GatedCall(NamedTuple):
    """A layer of a cell with gates and what it is to run on; S directions or members run side by side.

    Attributes:
        input: ``[S or 1, T, B, I]``, of each member or shared by all, float32 or float64.
        start: the initial state.
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

    def run(self, rule: RecurrentRule) -> tuple[Tensor, ...]:
        return rule.run_gated(self)


class GatedWay(NamedTuple):
    """How a rule goes back through a layer with gates, as ``torch.ops.tpext.gated_layer_backward`` explains it.

    Attributes:
        feedback: P, ``[S, G*H, H]``.
        inverse: "branch", "cell" or "jacobian".
        credit, target_step, margin, gate_slope, candidate_slope, slope_reg: as of the op.
        normalize: whether parameters' gradients are divided by ``target_step``.
        jacobian: of "jacobian", the regularisation and the steps of ``gated_jacobian_backward``.
    """

    feedback: Tensor
    inverse: str
    credit: str
    target_step: PerMember
    margin: PerMember
    gate_slope: str
    candidate_slope: str
    slope_reg: PerMember
    normalize: bool
    jacobian: tuple[PerMember, int | None] | None = None


class _Settings(NamedTuple):
    """What of a call is no tensor."""

    rule: RecurrentRule
    reverse: Sequence[bool]
    cell: str
    checkpoint_every: int | None
    needs_states: bool
    keep: bool

    @property
    def kinds_of_state(self) -> int:
        return 2 if self.cell == "lstm" else 1


def run_gated(rule: RecurrentRule, call: GatedCall) -> tuple[Tensor, ...]:
    """Run a layer; its backward pass is the rule's.

    Under autocast it runs in float32, on CUDA in the autocast dtype, which its outputs get.

    Returns:
        States ``[S, T, B, H]``, zero beyond ``lengths`` (with ``checkpoint_every`` an empty tensor unless the call
        needs them), and the state after the last valid steps: one tensor ``[S, B, H]``, or two.

    Raises:
        ValueError: arguments that do not fit each other.
        RuntimeError: a transform of ``torch.func``, unless the rule is exact; in the backward pass, ``create_graph``.
    """
    check_members(rule, call.weight_hh.shape[0])
    if torch._C._are_functorch_transforms_active():
        return rule.gated_composite(call)
    if call.checkpoint_every is not None and len(set(call.reverse)) > 1:
        # One direction is in its last piece where the other is in its first.
        alone = [run_gated(of_member(rule, member), _member(call, member)) for member in range(len(call.reverse))]
        return tuple(torch.cat(parts) for parts in zip(*alone, strict=True))
    weights = (call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh)
    # Owned parameters are detached: a layer of which only they are trainable has no backward pass to run.
    owned = (parameter.detach() for parameter in call.owned)
    start = call.start
    if len(start) == 2 and start[0] is start[1]:
        # the compiler refuses a node that gets a tensor twice
        start = (start[0], start[1].view_as(start[1]))
    tensors = (call.input, *start, *weights, call.lengths, *owned)
    # nothing is kept where no gradient can be asked for
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    run = (list(call.reverse), call.cell, call.checkpoint_every, call.needs_states)
    settings = _Settings(rule, *run, keep=keep)
    return apply_node(_GatedPass, (settings,), tensors, low_precision=True)  # type: ignore[no-any-return]


def _member(call: GatedCall, member: int) -> GatedCall:
    """The call of one member of the stack alone."""
    one = slice(member, member + 1)
    return call._replace(
        input=call.input if call.input.shape[0] == 1 else call.input[one],
        start=tuple(kind[one] for kind in call.start),
        weight_ih=call.weight_ih[one],
        weight_hh=call.weight_hh[one],
        bias_ih=None if call.bias_ih is None else call.bias_ih[one],
        bias_hh=None if call.bias_hh is None else call.bias_hh[one],
        reverse=call.reverse[one],
        owned=tuple(parameter[one] for parameter in call.owned),
    )


class _Layer(NamedTuple):
    """The tensors of a node, in its order."""

    input: Tensor
    start: State
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    lengths: Tensor | None
    owned: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Sequence[Any], kinds_of_state: int) -> _Layer:
        input, *rest = tensors
        start, rest = tuple(rest[:kinds_of_state]), rest[kinds_of_state:]
        weight_ih, weight_hh, bias_ih, bias_hh, lengths, *owned = rest
        return cls(input, start, weight_ih, weight_hh, bias_ih, bias_hh, lengths, tuple(owned))

    def forward(self, settings: _Settings, keep: bool) -> tuple[Tensor, State, Tensor]:
        """States, the final state and what the backward pass reads."""
        h0, c0 = (*self.start, None)[:2]
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        states, h_n, c_n, kept = gated_layer(
            self.input, h0, c0, *weights, self.lengths, settings.reverse, settings.cell, keep
        )
        return states, (h_n, c_n)[: settings.kinds_of_state], kept


class _GatedPass(LayerNode):
    """The node. Without ``checkpoint_every`` the whole sequence is one piece; see ``recurrent_pass``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        settings, *tensors = arguments
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        layer = _Layer.of(tensors, settings.kinds_of_state)
        if settings.checkpoint_every is None:
            states, final, kept = layer.forward(settings, settings.keep)
            ctx.save_for_backward(states, kept, *tensors)
        else:
            starts, states, final = _run_in_pieces(layer, settings)
            if not settings.needs_states:
                ctx.mark_non_differentiable(states)
            ctx.save_for_backward(*starts, *tensors)
        return states, *final

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor | None, *grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        kinds = settings.kinds_of_state
        # read once: under activation checkpointing a second time is an error
        saved = ctx.saved_tensors
        before = 2 if settings.checkpoint_every is None else kinds
        layer, needs = _Layer.of(saved[before:], kinds), ctx.needs_input_grad[1:]
        # Gradients are recorded inside a backward pass exactly when its result is to be differentiated again.
        if torch.is_grad_enabled():
            return None, *_differentiable(settings, saved[before:], needs, (grad_states, *grad_final))
        with full_precision(layer.weight_hh.device.type):
            back = _Back(settings.rule.gated_way(layer.weight_hh, layer.owned), settings, layer, needs)
            arriving = back.displacements(grad_final)
            if settings.checkpoint_every is None:
                states, kept = saved[:2]
                gradients, first, _ = back.run(layer, states, kept, grad_states, arriving, (None,) * kinds)
            else:
                # a compiler has a gradient of the empty tensor too
                given = grad_states if settings.needs_states else None
                gradients, first = _sweep_pieces(back, saved[:kinds], given, arriving)
            of_input, *of_weights = gradients
            of_start = back.gradients(first, needs[1 : 1 + kinds])
        return None, of_input, *of_start, *of_weights, *[None] * (1 + len(layer.owned))


_Credit: TypeAlias = "tuple[Tensor | None, ...]"


class _Back(NamedTuple):
    """A backward pass of a layer."""

    way: GatedWay
    settings: _Settings
    layer: _Layer
    needs: Sequence[bool]

    @property
    def unit(self) -> PerMember:
        """A displacement is this times a gradient."""
        return of_each(self.way.target_step, operator.neg)

    def displacements(self, gradients: _Credit) -> _Credit:
        return tuple(None if g is None else of_members(operator.mul, g, self.unit) for g in gradients)

    def gradients(self, displacements: State, needs: Sequence[bool]) -> list[Tensor | None]:
        return [
            of_members(operator.truediv, d, self.unit) if need else None
            for d, need in zip(displacements, needs, strict=True)
        ]

    def run(
        self,
        piece: _Layer,
        states: Tensor,
        kept: Tensor,
        grad_states: Tensor | None,
        arriving: _Credit,
        credit: _Credit,
    ) -> tuple[list[Tensor | None], State, _Credit]:
        """Gradients of input, weights and biases, and the displacement and credit before a piece."""
        way, settings, kinds = self.way, self.settings, self.settings.kinds_of_state
        h0, c0 = (*piece.start, None)[:2]
        inverse = of_each(way.target_step, lambda step: 1 / step)
        scale: PerMember = inverse if way.normalize else 1.0
        wanted = [self.needs[0], *self.needs[1 + kinds : 5 + kinds]]
        arguments = (
            grad_states,
            piece.input,
            states,
            h0,
            c0,
            kept,
            piece.weight_hh,
            way.feedback,
            piece.weight_ih if wanted[0] else None,
            piece.lengths,
            settings.reverse,
            settings.cell,
            way.inverse,
            way.credit,
            as_list(way.target_step),
            as_list(way.margin),
            way.gate_slope,
            way.candidate_slope,
            as_list(way.slope_reg),
            as_list(scale),
            as_list(inverse),
            wanted,
            *_pair(arriving),
            *_pair(credit),
        )
        if way.jacobian is None:
            *found, disp_h0, disp_c0, credit_h0, credit_c0 = gated_layer_backward(*arguments)
        else:
            reg, steps = way.jacobian
            *found, disp_h0, disp_c0, credit_h0, credit_c0 = gated_jacobian_backward(
                *arguments, reg=reg, chebyshev_steps=steps
            )
        before: _Credit = (credit_h0, credit_c0)[:kinds] if way.credit == "through_time" else (None,) * kinds
        gradients = [gradient if need else None for gradient, need in zip(found, wanted, strict=True)]
        return gradients, (disp_h0, disp_c0)[:kinds], before


def _pair(state: _Credit) -> _Credit:
    return (*state, None)[:2]


def _run_in_pieces(layer: _Layer, settings: _Settings) -> tuple[list[Tensor], Tensor, State]:
    """The state before each piece, ``[pieces, S, B, H]`` of each kind, all states if needed, and the final one."""
    every, time = settings.checkpoint_every, layer.input.shape[1]
    assert every is not None
    if every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {every}")
    # Each piece's lengths are cut to its size, which would hide those out of range.
    if are_plain((layer.lengths,)):
        check_lengths("gated_layer", layer.lengths, time)
    order = pieces_of(time, every, settings.reverse)
    starts = [kind.new_empty(len(order), *kind.shape) for kind in layer.start]
    h0 = layer.start[0]
    states = h0.new_empty((h0.shape[0], time, *h0.shape[1:]) if settings.needs_states else 0)
    final = tuple(kind.clone() for kind in layer.start)
    for index, piece in enumerate(order):
        part, valid = cut(layer.input, layer.lengths, piece)
        start = tuple(kind[index].copy_(now) for kind, now in zip(starts, final, strict=True))
        found, reached, _ = layer._replace(input=part, start=start, lengths=valid).forward(settings, keep=False)
        for now, new in zip(final, reached, strict=True):
            now.copy_(new)
        if settings.needs_states:
            states[:, piece].copy_(found)
        del found, reached, new
    return starts, states, final


def _sweep_pieces(
    back: _Back, starts: Sequence[Tensor], grad_states: Tensor | None, arriving: _Credit
) -> tuple[list[Tensor | None], State]:
    """The sum of the pieces' gradients, the last piece first, and the displacement that arrives at the beginning."""
    layer, settings, every = back.layer, back.settings, back.settings.checkpoint_every
    assert every is not None
    inputs = layer.input.new_zeros(layer.input.shape) if back.needs[0] else None
    sums: list[Tensor | None] = [None] * 5
    # What goes from piece to piece stands in memory of its own: see recurrent_pass.
    arrived = tuple(torch.zeros_like(kind[0]) for kind in starts)
    credited = tuple(torch.zeros_like(kind[0]) for kind in starts)
    credit: _Credit = (None,) * len(starts)
    order = pieces_of(layer.input.shape[1], every, settings.reverse)
    for index in range(len(order) - 1, -1, -1):
        part, valid = cut(layer.input, layer.lengths, order[index])
        piece = layer._replace(input=part, start=tuple(kind[index] for kind in starts), lengths=valid)
        states, _, kept = piece.forward(settings, keep=True)
        given = None if grad_states is None else grad_states[:, order[index]]
        gradients, first, before = back.run(piece, states, kept, given, arriving, credit)
        arriving = tuple(into.copy_(d) for into, d in zip(arrived, first, strict=True))
        credit = tuple(None if k is None else into.copy_(k) for into, k in zip(credited, before, strict=True))
        if inputs is not None:
            inputs[:, order[index]].copy_(gradients[0])  # type: ignore[arg-type]
        for place in range(1, 5):
            new, old = gradients[place], sums[place]
            sums[place] = new if old is None or new is None else old.add_(new)
        del states, kept, gradients, first, before, new
        # What has faded leaves nothing to do further back, where nothing enters. A compiler or a fake tensor cannot
        # look, and on CUDA looking would wait for the device.
        looks = grad_states is None and not on_cuda(arrived[0]) and are_plain((*arrived, *credited))
        if looks and not any(one.any() for one in (*arrived, *credited)):
            break
    sums[0] = inputs
    return sums, arrived


def _differentiable(
    settings: _Settings, tensors: Sequence[Tensor | None], needs: Sequence[bool], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """An exact rule's gradients by operations that have derivatives themselves (with all states in memory)."""
    # Views: where one of the tensors was computed from another, its gradient must not reach the other here too.
    views: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    layer = _Layer.of(views, settings.kinds_of_state)
    call = GatedCall(*layer[:7], settings.reverse, settings.cell, layer.owned)
    outputs = settings.rule.gated_composite(call)
    given = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    wanted = [view for view, need in zip(views, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad([o for o, _ in given], wanted, [g for _, g in given], create_graph=True, allow_unused=True)
    )
    return [next(found) if need else None for need in needs]
