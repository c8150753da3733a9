"""One recurrent layer as one autograd node: forward the scan, backward what the rule's sweep makes of each piece."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tpext.ops._library import are_plain, check_lengths, full_precision, on_cuda
from tpext.ops._members import as_list
from tpext.ops.rnn_layer import rnn_layer, rnn_layer_backward
from tpext.rules.base import PerMember, apply_node, check_members, of_member

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

    def run(self, rule: RecurrentRule) -> tuple[Tensor, ...]:
        return rule.run_recurrent(self)


class Piece(NamedTuple):
    """A stretch of a layer's steps.

    Attributes:
        input: ``[S or 1, t, B, I]``.
        h0: the states before it, ``[S, B, H]``.
        states: ``[S, t, B, H]``.
        lengths: how many of its steps are valid in each row, ``[B]``, or None for all.
    """

    input: Tensor
    h0: Tensor
    states: Tensor
    lengths: Tensor | None


class LayerWeights(NamedTuple):
    """What a rule may read of a layer in its backward pass.

    Attributes:
        weight_ih, weight_hh, bias, owned, reverse, nonlinearity: as in :class:`RecurrentCall`.
        needs: whether the gradient of input, h0, weight_ih, weight_hh and bias is wanted.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    owned: tuple[Tensor, ...]
    reverse: Sequence[bool]
    nonlinearity: str
    needs: Sequence[bool]


Gradients: TypeAlias = list[Tensor | None]
"""Of input, h0, weight_ih, weight_hh and bias."""


class Sweep(NamedTuple):
    """How a rule goes from the last step of a layer to the first.

    Attributes:
        run: takes a piece, the gradients of its states (None: zero) and the two things that come back from beyond its
            end, displacement and credit (``[S, B, H]`` or None), and returns gradients and the same two things at the
            piece's beginning. It leaves the gradient of ``h0`` to the caller.
        unit: a displacement is this times a gradient, of all members or of each.
        fades: nothing comes of a piece at whose end nothing arrives.
    """

    run: Callable[[Piece, Tensor | None, Tensor | None, Tensor | None], tuple[Gradients, Tensor, Tensor | None]]
    unit: PerMember
    fades: bool


def run_pass(rule: RecurrentRule, call: RecurrentCall) -> tuple[Tensor, Tensor]:
    """Run a layer; its backward pass is the rule's.

    Under autocast it runs in float32, on CUDA in the autocast dtype, which its outputs get.

    Returns:
        States ``[S, T, B, H]``, zero beyond ``lengths`` (with ``checkpoint_every`` an empty tensor unless the call
        needs them), and the states after the last valid steps ``[S, B, H]``.

    Raises:
        ValueError: arguments that do not fit each other.
        RuntimeError: a transform of ``torch.func``, unless the rule is exact; in the backward pass, ``create_graph``.
    """
    check_members(rule, call.h0.shape[0])
    if torch._C._are_functorch_transforms_active():
        return rule.composite(call)
    if call.checkpoint_every is not None and len(set(call.reverse)) > 1:
        # One direction is in its last piece where the other is in its first.
        alone = [run_pass(of_member(rule, member), _member(call, member)) for member in range(len(call.reverse))]
        states, h_n = zip(*alone, strict=True)
        return torch.cat(states), torch.cat(h_n)
    # Owned parameters are detached: a layer of which only they are trainable has no backward pass to run.
    tensors = (*call[:6], *(parameter.detach() for parameter in call.owned))
    settings = (list(call.reverse), call.nonlinearity, call.checkpoint_every, call.needs_states, rule)
    return apply_node(_RecurrentPass, settings, tensors, low_precision=True)  # type: ignore[no-any-return]


def _member(call: RecurrentCall, member: int) -> RecurrentCall:
    """The call of one member of the stack alone."""
    one = slice(member, member + 1)
    return call._replace(
        input=call.input if call.input.shape[0] == 1 else call.input[one],
        h0=call.h0[one],
        weight_ih=call.weight_ih[one],
        weight_hh=call.weight_hh[one],
        bias=None if call.bias is None else call.bias[one],
        reverse=call.reverse[one],
        owned=tuple(parameter[one] for parameter in call.owned),
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
        if issubclass(getattr(node, "_forward_cls", object), LayerNode):
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


class LayerNode(torch.autograd.Function):
    """A recurrent layer's node, of any cell."""


class _RecurrentPass(LayerNode):
    """The node. Without ``checkpoint_every`` the whole sequence is one piece.

    With it, the node keeps only the state before each piece and the backward pass computes a piece's states anew:
    some ``T / K + K`` states in memory in place of ``T``, for one more forward pass. Where the states are an output,
    whoever reads them keeps them.

    Contexts are filled in ``forward``, not in a ``setup_context``: with one, torch looks up and binds the signature at
    every call, which takes as long as a small kernel. And without names for the arguments: torch's compiler takes a
    ``forward`` with as many parameters as arguments for one without a context.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        reverse, nonlinearity, checkpoint_every, needs_states, rule = arguments[:5]
        input, h0, weight_ih, weight_hh, bias, lengths, *owned = arguments[5:]
        ctx.reverse, ctx.nonlinearity, ctx.rule = reverse, nonlinearity, rule
        ctx.checkpoint_every, ctx.needs_states = checkpoint_every, needs_states
        ctx.set_materialize_grads(False)
        if checkpoint_every is None:
            states, h_n = rnn_layer(input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity)
            kept = states
        else:
            kept, states, h_n = _run_in_pieces(
                input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity, checkpoint_every, needs_states
            )
            if not needs_states:
                ctx.mark_non_differentiable(states)
        ctx.save_for_backward(input, h0, weight_ih, weight_hh, bias, lengths, kept, *owned)
        return states, h_n

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        # read once: under activation checkpointing a second time is an error
        saved = ctx.saved_tensors
        input, h0, weight_ih, weight_hh, bias, lengths, kept = saved[:7]
        needs = ctx.needs_input_grad[5:10]
        rest = [None] * (1 + len(saved) - 7)
        # Gradients are recorded inside a backward pass exactly when its result is to be differentiated again.
        if torch.is_grad_enabled():
            run = (ctx.reverse, ctx.nonlinearity, tuple(saved[7:]))
            call = RecurrentCall(input, h0, weight_ih, weight_hh, bias, lengths, *run)
            grads = _differentiable(ctx.rule, call, needs, grad_states, grad_h_n)
            return *[None] * 5, *grads, *rest
        with full_precision(weight_hh.device.type):
            layer = LayerWeights(weight_ih, weight_hh, bias, saved[7:], ctx.reverse, ctx.nonlinearity, needs)
            sweep = ctx.rule.start_sweep(layer)
            arriving = None if grad_h_n is None else of_members(operator.mul, grad_h_n, sweep.unit)
            if ctx.checkpoint_every is None:
                grads, first, _ = sweep.run(Piece(input, h0, kept, lengths), grad_states, arriving, None)
            else:
                # a compiler has a gradient of the empty tensor too
                given = grad_states if ctx.needs_states else None
                grads, first = _sweep_pieces(layer, sweep, input, lengths, kept, given, arriving, ctx.checkpoint_every)
            if needs[1] and first is not None:
                grads[1] = of_members(operator.truediv, first, sweep.unit)
            return *[None] * 5, *grads, *rest


def of_members(change: Callable[[Tensor, float], Tensor], rows: Tensor, number: PerMember) -> Tensor:
    """``rows [S, B, H]`` times, or by, the number of all members or of each."""
    if not isinstance(number, tuple):
        return rows if number == 1 else change(rows, number)
    # a number at a time: on CUDA a quotient by a tensor has other bits
    return torch.cat([change(own, one) for own, one in zip(torch.split(rows, 1), number, strict=True)])


def _run_in_pieces(
    input: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    every: int,
    needs_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The state before each piece of ``every`` steps, ``[pieces, S, B, H]``, all states if needed, the final ones."""
    if every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {every}")
    time = input.shape[1]
    # Each piece's lengths are cut to its size, which would hide those out of range.
    if are_plain((lengths,)):
        check_lengths("rnn_layer", lengths, time)
    order = pieces_of(time, every, reverse)
    kept = h0.new_empty(len(order), *h0.shape)
    states = h0.new_empty(h0.shape[0], time, *h0.shape[1:]) if needs_states else h0.new_empty(0)
    h_n = h0.clone()
    for index, piece in enumerate(order):
        part, valid = cut(input, lengths, piece)
        before = kept[index].copy_(h_n)
        found, last = rnn_layer(part, before, weight_ih, weight_hh, bias, valid, reverse, nonlinearity)
        h_n.copy_(last)
        if needs_states:
            states[:, piece].copy_(found)
        del found, last
    return kept, states, h_n


def _sweep_pieces(
    layer: LayerWeights,
    sweep: Sweep,
    input: Tensor,
    lengths: Tensor | None,
    kept: Tensor,
    grad_states: Tensor | None,
    arriving: Tensor | None,
    every: int,
) -> tuple[Gradients, Tensor | None]:
    """The sum of the pieces' gradients, the last piece first, and what arrives at the beginning."""
    sums: Gradients = [None] * 5
    inputs = input.new_zeros(input.shape) if layer.needs[0] else None
    # What goes from piece to piece stands in memory of its own. A small tensor that outlives its piece would lie in
    # the hole that the large ones leave, which then do not fit there again, and the heap would grow piece by piece.
    arrived, credited = torch.zeros_like(kept[0]), torch.zeros_like(kept[0])
    credit: Tensor | None = None
    order = pieces_of(input.shape[1], every, layer.reverse)
    for index in range(len(order) - 1, -1, -1):
        piece, before = order[index], kept[index]
        part, valid = cut(input, lengths, piece)
        states = rnn_layer(
            part, before, layer.weight_ih, layer.weight_hh, layer.bias, valid, layer.reverse, layer.nonlinearity
        )[0]
        given = None if grad_states is None else grad_states[:, piece]
        grads, first, first_credit = sweep.run(Piece(part, before, states, valid), given, arriving, credit)
        arriving = arrived.copy_(first)
        credit = None if first_credit is None else credited.copy_(first_credit)
        if inputs is not None:
            inputs[:, piece].copy_(grads[0])  # type: ignore[arg-type]
        for place in (2, 3, 4):
            new, old = grads[place], sums[place]
            sums[place] = new if old is None or new is None else old.add_(new)
        del states, grads, first, first_credit, new
        # What has faded leaves nothing to do further back, where nothing enters. A compiler or a fake tensor cannot
        # look, and on CUDA looking would wait for the device.
        looks = sweep.fades and grad_states is None and not on_cuda(arrived) and are_plain((arrived, credited))
        if looks and not arrived.any() and not credited.any():
            break
    sums[0] = inputs
    return sums, arriving


def pieces_of(time: int, every: int, reverse: Sequence[bool]) -> list[slice]:
    """The steps of each piece, in the order in which members that all run the same way come to them."""
    pieces = [slice(begin, min(begin + every, time)) for begin in range(0, max(time, 1), every)]
    return pieces[::-1] if any(reverse) else pieces


def cut(input: Tensor, lengths: Tensor | None, piece: slice) -> tuple[Tensor, Tensor | None]:
    """The input of a piece, and how many of its steps are valid in each row."""
    part = input[:, piece]
    return part, None if lengths is None else (lengths - piece.start).clamp(0, part.shape[1])


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
    arriving: Tensor | None,
    credit: Tensor | None,
) -> tuple[Gradients, Tensor, Tensor | None]:
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
        piece.h0,
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
        [layer.needs[0], *layer.needs[2:5]],
        arriving,
        credit,
    )
    grads: Gradients = [None] * 5
    for place, gradient in zip((0, 2, 3, 4), found, strict=True):
        grads[place] = gradient if layer.needs[place] else None
    return grads, first, first_credit if how.credit == "through_time" else None


def _differentiable(
    rule: RecurrentRule,
    call: RecurrentCall,
    needs: Sequence[bool],
    grad_states: Tensor | None,
    grad_h_n: Tensor | None,
) -> Gradients:
    """An exact rule's gradients by operations that have derivatives themselves (with all states in memory)."""
    # Views: where one of the tensors was computed from another, its gradient must not reach the other here too.
    tensors: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in call[:5]]
    rest: tuple[Any, ...] = call[5:]
    outputs = rule.composite(RecurrentCall(*tensors, *rest))
    given = [(o, g) for o, g in zip(outputs, (grad_states, grad_h_n), strict=True) if g is not None]
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad([o for o, _ in given], wanted, [g for _, g in given], create_graph=True, allow_unused=True)
    )
    return [next(found) if need else None for need in needs]
