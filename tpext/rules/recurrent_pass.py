"""A recurrent layer of any cell as one autograd node: forward its scan, backward what the rule's sweep makes of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tpext.ops._library import are_plain, check_lengths, full_precision, on_cuda
from tpext.rules.base import PerMember, apply_node, check_members, of_member

if TYPE_CHECKING:
    from tpext.rules.gated_call import GatedCall
    from tpext.rules.recurrent import RecurrentRule
    from tpext.rules.recurrent_call import RecurrentCall

    CellCall: TypeAlias = RecurrentCall | GatedCall
    """A layer of a cell and what it is to run on. What differs from cell to cell is the call's: ``start``, ``weights``
    and ``on(...)``, the same layer on other tensors; ``forward``; ``composite``; which of the rule's sweeps is due."""

State: TypeAlias = tuple[Tensor, ...]
"""``(h,)``, of an LSTM ``(h, c)``, ``[S, B, H]`` each; or what a displacement or a credit says of them."""

StateOrNone: TypeAlias = tuple[Tensor | None, ...]
"""The same, None where it is zero."""

Gradients: TypeAlias = list[Tensor | None]
"""Of the input and of the layer's weights, in the order of the call."""


class Piece(NamedTuple):
    """A stretch of a layer's steps.

    Attributes:
        input: ``[S or 1, t, B, I]``.
        start: the state before it.
        states: ``[S, t, B, H]``.
        kept: what else the forward pass of the cell keeps, or None.
        lengths: how many of its steps are valid in each row, ``[B]``, or None for all.
    """

    input: Tensor
    start: State
    states: Tensor
    kept: Tensor | None
    lengths: Tensor | None


class Sweep(NamedTuple):
    """How a rule goes from the last step of a layer to the first.

    Attributes:
        run: takes a piece, the gradients of its states (None: zero) and the two things that come back from beyond its
            end, displacement and credit of each kind of state, and returns gradients and the same two things at the
            piece's beginning.
        unit: a displacement is this times a gradient, of all members or of each.
        fades: nothing comes of a piece at whose end nothing arrives.
    """

    run: Callable[[Piece, Tensor | None, StateOrNone, StateOrNone], tuple[Gradients, State, StateOrNone]]
    unit: PerMember
    fades: bool


def run_pass(rule: RecurrentRule, call: CellCall) -> tuple[Tensor, ...]:
    """Run a layer; its backward pass is the rule's.

    Under autocast it runs in float32, on CUDA in the autocast dtype, which its outputs get.

    Returns:
        States ``[S, T, B, H]``, zero beyond ``lengths`` (with ``checkpoint_every`` an empty tensor unless the call
        needs them), and the state after the last valid steps: one tensor ``[S, B, H]``, of an LSTM two.

    Raises:
        ValueError: arguments that do not fit each other.
        RuntimeError: a transform of ``torch.func``, unless the rule is exact; in the backward pass, ``create_graph``.
    """
    check_members(rule, call.weight_hh.shape[0])
    if torch._C._are_functorch_transforms_active():
        return rule.composite(call)
    if call.checkpoint_every is not None and len(set(call.reverse)) > 1:
        # One direction is in its last piece where the other is in its first.
        alone = [run_pass(of_member(rule, member), _member(call, member)) for member in range(len(call.reverse))]
        return tuple(torch.cat(parts) for parts in zip(*alone, strict=True))
    start = call.start
    if len(start) == 2 and start[0] is start[1]:
        # the compiler refuses a node that gets a tensor twice
        start = (start[0], start[1].view_as(start[1]))
    # Owned parameters are detached: a layer of which only they are trainable has no backward pass to run.
    owned = [parameter.detach() for parameter in call.owned]
    tensors = (call.input, *start, *call.weights, call.lengths, *owned)
    # nothing is kept where no gradient can be asked for
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    settings = (rule, _without_tensors(call), keep)
    return apply_node(_RecurrentPass, settings, tensors, low_precision=True)  # type: ignore[no-any-return]


def _member(call: CellCall, member: int) -> CellCall:
    """The call of one member of the stack alone."""
    one = slice(member, member + 1)
    start, owned = (tuple(tensor[one] for tensor in tensors) for tensors in (call.start, call.owned))
    weights = [None if weight is None else weight[one] for weight in call.weights]
    input = call.input if call.input.shape[0] == 1 else call.input[one]
    return call.on(input, start, weights, call.lengths, owned)._replace(reverse=call.reverse[one])


def _without_tensors(call: CellCall) -> CellCall:
    nothing: Any = None
    return call.on(nothing, (nothing,) * len(call.start), (nothing,) * len(call.weights), None, ())


def _with_tensors(call: CellCall, tensors: Sequence[Any]) -> CellCall:
    """The call on a node's tensors, in its order."""
    states, weights = 1 + len(call.start), 1 + len(call.start) + len(call.weights)
    return call.on(
        tensors[0],
        tuple(tensors[1:states]),
        tensors[states:weights],
        tensors[weights],
        tuple(tensors[weights + 1 :]),
    )


# What rearranges states on their way to the next call.
_REARRANGES = (
    *("View", "Unsqueeze", "Squeeze", "Split", "Unbind", "Select", "Slice", "Index", "Cat", "Stack", "Clone", "ToCopy"),
    *("Permute", "Transpose", "T0", "Expand"),
)


def comes_of_a_pass(state: Tensor, weight: Tensor | None) -> bool:
    """Whether ``state`` is one of a recorded pass on this weight_hh, rearranged perhaps, and still in its graph."""
    if weight is None:
        return False
    nodes = [state.grad_fn]
    # layers and directions are few, and so are the nodes that put them together
    for _ in range(64):
        if not nodes:
            break
        node = nodes.pop()
        if node is None:
            continue
        before = [earlier for earlier, _ in node.next_functions]
        if getattr(node, "_forward_cls", None) is _RecurrentPass:
            if any(_leads_to(edge, weight) for edge in before):
                return True
        elif node.name().startswith(_REARRANGES):
            nodes.extend(before)
    return False


def _leads_to(node: Any, leaf: Tensor) -> bool:
    """Whether a parameter gets what a node is given, itself or as a member of a stack."""
    if node is None:
        return False
    if node.name().startswith(("Unsqueeze", "Stack", "Slice")):
        return any(_leads_to(earlier, leaf) for earlier, _ in node.next_functions)
    return getattr(node, "variable", None) is leaf


class _RecurrentPass(torch.autograd.Function):
    """The node. Without ``checkpoint_every`` the whole sequence is one piece.

    With it, the node keeps only the state before each piece and the backward pass computes a piece's states anew:
    some ``T / K + K`` states in memory in place of ``T``, for one more forward pass. Where the states are an output,
    whoever reads them keeps them.

    Contexts are filled in ``forward``, not in a ``setup_context``: with one, torch looks up and binds the signature at
    every call, which takes as long as a small kernel. And without names for the arguments: torch's compiler takes a
    ``forward`` with as many parameters as arguments for one without a context.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        rule, settings, keep, *tensors = arguments
        ctx.rule, ctx.settings = rule, settings
        ctx.set_materialize_grads(False)
        call = _with_tensors(settings, tensors)
        if call.checkpoint_every is None:
            states, final, kept = call.forward(keep)
            ctx.save_for_backward(states, kept, *tensors)
        else:
            starts, states, final = _run_in_pieces(call, call.checkpoint_every)
            if not call.needs_states:
                ctx.mark_non_differentiable(states)
            ctx.save_for_backward(*starts, *tensors)
        return states, *final

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor | None, *grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        rule, settings, needs = ctx.rule, ctx.settings, ctx.needs_input_grad[3:]
        every, kinds = settings.checkpoint_every, len(settings.start)
        # read once: under activation checkpointing a second time is an error
        saved = ctx.saved_tensors
        before = 2 if every is None else kinds
        # Gradients are recorded inside a backward pass exactly when its result is to be differentiated again.
        if torch.is_grad_enabled():
            given = (grad_states, *grad_final)
            return None, None, None, *_differentiable(rule, settings, saved[before:], needs, given)
        call = _with_tensors(settings, saved[before:])
        with full_precision(call.weight_hh.device.type):
            sweep = call.start_sweep(rule, (needs[0], *needs[1 + kinds : 1 + kinds + len(call.weights)]))
            arriving = tuple(None if g is None else _of_members(operator.mul, g, sweep.unit) for g in grad_final)
            first: StateOrNone
            if every is None:
                piece = Piece(call.input, call.start, saved[0], saved[1], call.lengths)
                (of_input, *of_weights), first, _ = sweep.run(piece, grad_states, arriving, (None,) * kinds)
            else:
                # a compiler has a gradient of the empty tensor too
                wanted = grad_states if call.needs_states else None
                (of_input, *of_weights), first = _sweep_pieces(call, sweep, saved[:kinds], wanted, arriving, every)
            of_start = [
                _of_members(operator.truediv, d, sweep.unit) if need and d is not None else None
                for d, need in zip(first, needs[1:], strict=False)
            ]
        return None, None, None, of_input, *of_start, *of_weights, *[None] * (1 + len(call.owned))


def _of_members(change: Callable[[Tensor, float], Tensor], rows: Tensor, number: PerMember) -> Tensor:
    """``rows [S, B, H]`` times, or by, the number of all members or of each."""
    if not isinstance(number, tuple):
        return rows if number == 1 else change(rows, number)
    # a number at a time: on CUDA a quotient by a tensor has other bits
    return torch.cat([change(own, one) for own, one in zip(torch.split(rows, 1), number, strict=True)])


def _run_in_pieces(call: CellCall, every: int) -> tuple[list[Tensor], Tensor, State]:
    """The state before each piece of ``every`` steps (``[pieces, S, B, H]``), all states if needed, the final state."""
    if every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {every}")
    time = call.input.shape[1]
    # Each piece's lengths are cut to its size, which would hide those out of range.
    if are_plain((call.lengths,)):
        check_lengths(call.op, call.lengths, time)
    order = _pieces_of(time, every, call.reverse)
    starts = [kind.new_empty(len(order), *kind.shape) for kind in call.start]
    h0 = call.start[0]
    states = h0.new_empty((h0.shape[0], time, *h0.shape[1:]) if call.needs_states else 0)
    final = tuple(kind.clone() for kind in call.start)
    for index, piece in enumerate(order):
        start = tuple(kind[index].copy_(now) for kind, now in zip(starts, final, strict=True))
        found, reached, _ = _cut(call, piece, start).forward(keep=False)
        for now, new in zip(final, reached, strict=True):
            now.copy_(new)
        if call.needs_states:
            states[:, piece].copy_(found)
        del found, reached, new
    return starts, states, final


def _sweep_pieces(
    call: CellCall,
    sweep: Sweep,
    starts: Sequence[Tensor],
    grad_states: Tensor | None,
    arriving: StateOrNone,
    every: int,
) -> tuple[Gradients, StateOrNone]:
    """The sum of the pieces' gradients, the last piece first, and the displacement that arrives at the beginning."""
    # What goes from piece to piece stands in memory of its own. A small tensor that outlives its piece would lie in
    # the hole that the large ones leave, which then do not fit there again, and the heap would grow piece by piece.
    arrived = tuple(torch.zeros_like(kind[0]) for kind in starts)
    credited = tuple(torch.zeros_like(kind[0]) for kind in starts)
    inputs: Tensor | None = None
    sums: Gradients = [None] * len(call.weights)
    credit: StateOrNone = (None,) * len(starts)
    order = _pieces_of(call.input.shape[1], every, call.reverse)
    for index in range(len(order) - 1, -1, -1):
        part = _cut(call, order[index], tuple(kind[index] for kind in starts))
        states, _, kept = part.forward(keep=True)
        given = None if grad_states is None else grad_states[:, order[index]]
        piece = Piece(part.input, part.start, states, kept, part.lengths)
        (of_input, *of_weights), first, before = sweep.run(piece, given, arriving, credit)
        arriving = tuple(into.copy_(d) for into, d in zip(arrived, first, strict=True))
        credit = tuple(None if k is None else into.copy_(k) for into, k in zip(credited, before, strict=True))
        if of_input is not None:
            inputs = call.input.new_zeros(call.input.shape) if inputs is None else inputs
            inputs[:, order[index]].copy_(of_input)
        sums = [new if old is None or new is None else old.add_(new) for old, new in zip(sums, of_weights, strict=True)]
        del states, kept, piece, of_input, of_weights, first, before
        # What has faded leaves nothing to do further back, where nothing enters. A compiler or a fake tensor cannot
        # look, and on CUDA looking would wait for the device.
        looks = sweep.fades and grad_states is None and not on_cuda(arrived[0]) and are_plain((*arrived, *credited))
        if looks and not any(one.any() for one in (*arrived, *credited)):
            break
    return [inputs, *sums], arriving


def _pieces_of(time: int, every: int, reverse: Sequence[bool]) -> list[slice]:
    """The steps of each piece, in the order in which members that all run the same way come to them."""
    pieces = [slice(begin, min(begin + every, time)) for begin in range(0, max(time, 1), every)]
    return pieces[::-1] if any(reverse) else pieces


def _cut(call: CellCall, piece: slice, start: State) -> CellCall:
    """The call of a piece, from the state before it."""
    part = call.input[:, piece]
    lengths = None if call.lengths is None else (call.lengths - piece.start).clamp(0, part.shape[1])
    return call.on(part, start, call.weights, lengths, call.owned)


def _differentiable(
    rule: RecurrentRule,
    settings: CellCall,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """An exact rule's gradients by operations that have derivatives themselves (with all states in memory)."""
    # Views: where one of the tensors was computed from another, its gradient must not reach the other here too.
    views = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    outputs = rule.composite(_with_tensors(settings, views))
    given = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    wanted = [view for view, need in zip(views, needs, strict=True) if need and view is not None]
    found = iter(
        torch.autograd.grad([o for o, _ in given], wanted, [g for _, g in given], create_graph=True, allow_unused=True)
    )
    return [next(found) if need else None for need in needs]
