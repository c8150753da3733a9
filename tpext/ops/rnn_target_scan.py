"""``rnn_target_scan``, ``rnn_learned_target_scan``: target propagation through a simple RNN, and the layers made of it.

``torch.ops.tpext.rnn_target_scan(grad_states, states, h0, weight_hh, inverse, x_proj, lengths, reverse, nonlinearity,
correction, credit, target_step, clip, return_norms, return_displacement) -> (delta, disp_h0, norms, displacement)``
goes once from the last step to the first. With ``g`` the gradient of the loss with respect to each state, ``s =
target_step``, ``R = inverse = regularized_inverse(W, reg) [S, H, H]``, ``P = R'`` and ``clip(v)`` = ``v`` kept within
``+-(1 - clip)``::

    "linearized"  d_{t-1} = -s g_{t-1} + z_t P             z_t = d_t / a'(u_t), a' of clip(h_t) for tanh
    "difference"  d_{t-1} = -s g_{t-1} + z_t P             z_t = a^-1(h_t + d_t) - a^-1(h_t)
    "none"        d_{t-1} = -s g_{t-1} + z_t P - h_{t-1}   z_t = a^-1(h_t + d_t) - x_proj_t

from ``d_T = -s g_T``; the target of step ``t`` is ``h_t + d_t``. ``a^-1(v)`` is ``atanh(clip(v))``, ``max(v, 0)`` or
``v`` for tanh, relu and identity; an inactive relu unit passes nothing in "linearized".

``torch.ops.tpext.rnn_learned_target_scan(grad_states, states, weight_hh, reverse_weight, reverse_pre, lengths,
reverse, nonlinearity, credit, target_step, return_norms) -> (delta, disp_h0, norms)`` takes a learned reverse layer
``G`` instead, with ``q_t = h_t V' + c + x_t U'`` (``reverse_pre [S, T, B, H]``) and ``V = reverse_weight [S, H,
H]``::

    d_{t-1} = -s g_{t-1} + G(x_t, h_t + d_t) - G(x_t, h_t) = -s g_{t-1} + tanh(q_t + d_t V') - tanh(q_t)

Both return ``delta [S, T, B, H]``, the gradient of the local losses ``1/2 ||h_t - (h_t + d_t)||^2`` (targets held
constant) with respect to the pre-activations, ``disp_h0 = d_0 [S, B, H]``, ``norms [S, T, B]`` of each row of ``d_t``
if asked for and ``displacement [S, T, B, H]`` = ``z_t`` if asked for (with "none" the ``z_t`` of "difference"), else
empty tensors::

    credit "local"         delta_t = -d_t * a'(h_t)                      each step's own loss alone
    credit "through_time"  delta_t = (-d_t + delta_{t+1} W) * a'(h_t)    their sum through the unrolled layer

Stack, ``reverse``, ``lengths``, dtypes, determinism and errors are those of ``rnn_scan``; under autocast they compute
and return float32. These are no derivatives of anything: differentiating through them raises RuntimeError. Cost:
``2 S T B H^2`` operations, twice that through time.

Sources: Roulet and Harchaoui (2021), "Target Propagation via Regularized Inversion": section 3 (the inverse,
"difference" and "linearized"); Manchev and Spratling (JMLR 21(7), 2020), "Target Propagation in Recurrent Neural
Networks": the learned inverse; Lee, Zhang, Fischer and Bengio (2015), "Difference Target Propagation".
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    CREDITS,
    LIBRARY,
    autocast_outputs,
    autocasts,
    check_choice,
    check_lengths,
    check_scan,
    define,
    dense,
    to_float32,
)
from tpext.ops.rnn_scan import input_projection, recurrent_weight_gradient

CORRECTIONS = ("linearized", "difference", "none")
INPUT_RULES = ("gradient", "target")

NOT_A_DERIVATIVE = (
    "target propagation's backward pass is not a derivative, so it cannot be differentiated (create_graph=True, double "
    "backward) or transformed (torch.func); for second derivatives use rule=tpext.Backprop()"
)


def _empty(grad_states: Tensor, wanted: bool, *shape: int) -> Tensor:
    """An output to fill, or an empty stand-in for one that is not wanted (an op cannot return None)."""
    return grad_states.new_empty(shape if wanted else 0)


def _outputs(grad_states: Tensor, return_norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty ``delta``, ``disp_h0`` and ``norms``."""
    stack, time, batch, hidden = grad_states.shape
    return (
        grad_states.new_empty(grad_states.shape),
        grad_states.new_empty(stack, batch, hidden),
        _empty(grad_states, return_norms, stack, time, batch),
    )


def _check_step(op: str, target_step: float) -> None:
    if not 0 < target_step < math.inf:
        raise ValueError(f"{op}: target_step must be a finite number > 0, got {target_step}")


def _prepare_target(
    grad_states: Tensor,
    states: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    inverse: Tensor,
    x_proj: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    correction: str,
    credit: str,
    target_step: float,
    clip: float,
    return_norms: bool,
    return_displacement: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check the arguments and return empty outputs: all that the fake implementation does."""
    op = "rnn_target_scan"
    tensors = {
        "grad_states": (grad_states, "STBH"),
        "states": (states, "STBH"),
        "h0": (h0, "SBH"),
        "weight_hh": (weight_hh, "SHH"),
        "inverse": (inverse, "SHH"),
    }
    if x_proj is not None:
        tensors["x_proj"] = (x_proj, "STBH")
    check_scan(op, "grad_states", tensors, lengths, reverse, nonlinearity)
    check_choice(op, "correction", correction, CORRECTIONS)
    check_choice(op, "credit", credit, CREDITS)
    if correction == "none" and x_proj is None:
        raise ValueError(f"{op}: x_proj must be given for correction 'none', got None")
    least = torch.finfo(grad_states.dtype).eps
    if not least <= clip < 1:
        raise ValueError(
            f"{op}: clip must be at least {least:.2g}, the precision of {grad_states.dtype}, and below 1, got {clip}"
        )
    _check_step(op, target_step)
    displacement = _empty(grad_states, return_displacement, *grad_states.shape)
    return *_outputs(grad_states, return_norms), displacement


def _rnn_target_scan(
    grad_states: Tensor,
    states: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    inverse: Tensor,
    x_proj: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    correction: str,
    credit: str,
    target_step: float,
    clip: float,
    return_norms: bool,
    return_displacement: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    delta, disp_h0, norms, displacement = _prepare_target(
        grad_states,
        states,
        h0,
        weight_hh,
        inverse,
        x_proj,
        lengths,
        reverse,
        nonlinearity,
        correction,
        credit,
        target_step,
        clip,
        return_norms,
        return_displacement,
    )
    check_lengths("rnn_target_scan", lengths, states.shape[1])
    _C.rnn_target_scan(
        dense(grad_states),
        dense(states),
        dense(h0),
        dense(weight_hh),
        dense(inverse),
        dense(x_proj),
        dense(lengths),
        list(reverse),
        nonlinearity,
        correction,
        credit,
        target_step,
        clip,
        dense(delta),
        dense(disp_h0),
        dense(norms) if return_norms else None,
        dense(displacement) if return_displacement else None,
        torch.get_num_threads(),
    )
    return delta, disp_h0, norms, displacement


def _prepare_learned(
    grad_states: Tensor,
    states: Tensor,
    weight_hh: Tensor,
    reverse_weight: Tensor,
    reverse_pre: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    credit: str,
    target_step: float,
    return_norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments and return empty outputs: all that the fake implementation does."""
    op = "rnn_learned_target_scan"
    tensors = {
        "grad_states": (grad_states, "STBH"),
        "states": (states, "STBH"),
        "weight_hh": (weight_hh, "SHH"),
        "reverse_weight": (reverse_weight, "SHH"),
        "reverse_pre": (reverse_pre, "STBH"),
    }
    check_scan(op, "grad_states", tensors, lengths, reverse, nonlinearity)
    check_choice(op, "credit", credit, CREDITS)
    _check_step(op, target_step)
    return _outputs(grad_states, return_norms)


def _rnn_learned_target_scan(
    grad_states: Tensor,
    states: Tensor,
    weight_hh: Tensor,
    reverse_weight: Tensor,
    reverse_pre: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    credit: str,
    target_step: float,
    return_norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    delta, disp_h0, norms = _prepare_learned(
        grad_states,
        states,
        weight_hh,
        reverse_weight,
        reverse_pre,
        lengths,
        reverse,
        nonlinearity,
        credit,
        target_step,
        return_norms,
    )
    check_lengths("rnn_learned_target_scan", lengths, states.shape[1])
    _C.rnn_learned_target_scan(
        dense(grad_states),
        dense(states),
        dense(weight_hh),
        dense(reverse_weight),
        dense(reverse_pre),
        dense(lengths),
        list(reverse),
        nonlinearity,
        credit,
        target_step,
        dense(delta),
        dense(disp_h0),
        dense(norms) if return_norms else None,
        torch.get_num_threads(),
    )
    return delta, disp_h0, norms


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(NOT_A_DERIVATIVE)


define(
    "rnn_target_scan(Tensor grad_states, Tensor states, Tensor h0, Tensor weight_hh, Tensor inverse, Tensor? x_proj, "
    "Tensor? lengths, bool[] reverse, str nonlinearity, str correction, str credit, float target_step, float clip, "
    "bool return_norms, bool return_displacement) -> (Tensor delta, Tensor disp_h0, Tensor norms, Tensor displacement)",
    _rnn_target_scan,
    _prepare_target,
    cast_outputs=False,
)
define(
    "rnn_learned_target_scan(Tensor grad_states, Tensor states, Tensor weight_hh, Tensor reverse_weight, "
    "Tensor reverse_pre, Tensor? lengths, bool[] reverse, str nonlinearity, str credit, float target_step, "
    "bool return_norms) -> (Tensor delta, Tensor disp_h0, Tensor norms)",
    _rnn_learned_target_scan,
    _prepare_learned,
    cast_outputs=False,
)
for _name in ("rnn_target_scan", "rnn_learned_target_scan"):
    torch.library.register_autograd(f"tpext::{_name}", _refuse, lib=LIBRARY)


def _sum_members(stacked: Tensor) -> Tensor:
    """Sum over the stack axis, without a copy where there is one member."""
    return stacked.squeeze(0) if stacked.shape[0] == 1 else stacked.sum(0)


class _TargetLayer(torch.autograd.Function):
    """What the layers below share: a backward pass that hands out what a target pass found instead of derivatives.

    Their ``forward`` takes what only ``backward`` needs by name: torch's compiler counts the signature's parameters.
    """

    @staticmethod
    def vmap(*args: Any) -> Any:
        raise RuntimeError(NOT_A_DERIVATIVE)

    @staticmethod
    def gradients(
        ctx: Any,
        delta: Tensor,
        disp_h0: Tensor,
        input: Tensor,
        h0: Tensor,
        states: Tensor,
        lengths: Tensor | None,
        below: Callable[[], Tensor],
    ) -> list[Tensor | None]:
        """Gradients of input, h0, weight_ih, weight_hh and bias.

        Parameters get the local gradient, divided by ``target_step`` if it is to be normalised. The layer below and
        ``h0`` always get gradient units: minus what they are to move by, ``below() [T * B, I]`` and ``disp_h0``, over
        the step.
        """
        scale = 1 / ctx.target_step if ctx.normalize else 1.0
        grads: list[Tensor | None] = [None] * 5
        rows = delta.flatten(1, 2)
        if ctx.needs_input_grad[0]:
            grads[0] = below().view(input.shape) / -ctx.target_step
        if ctx.needs_input_grad[1]:
            grads[1] = disp_h0 / -ctx.target_step
        if ctx.needs_input_grad[2]:
            grads[2] = torch.bmm(rows.mT, input.flatten(0, 1).expand(rows.shape[0], -1, -1)) * scale
        if ctx.needs_input_grad[3]:
            grads[3] = recurrent_weight_gradient(delta, states, h0, lengths, ctx.reverse) * scale
        if ctx.needs_input_grad[4]:
            grads[4] = rows.sum(1) * scale
        return grads


def _check_target_backward() -> None:
    # Gradients are recorded inside a backward pass exactly when its result is to be differentiated again.
    if torch.is_grad_enabled():
        raise RuntimeError(NOT_A_DERIVATIVE)


class _RegularizedTargetLayer(_TargetLayer):
    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        lengths: Tensor | None,
        reverse: Sequence[bool],
        nonlinearity: str,
        reg: float,
        target_step: float,
        correction: str,
        credit: str,
        clip: float,
        normalize: bool,
        input_rule: str,
    ) -> Tensor:
        x_proj = input_projection(input, weight_ih, bias)
        states: Tensor = torch.ops.tpext.rnn_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reverse, ctx.nonlinearity, ctx.reg, ctx.target_step = inputs[:10]
        ctx.correction, ctx.credit, ctx.clip, ctx.normalize, ctx.input_rule = inputs[10:]
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_target_backward()
        input, h0, weight_ih, weight_hh, bias, lengths, states = ctx.saved_tensors
        by_target = ctx.input_rule == "target" and ctx.needs_input_grad[0]
        # Recomputing the projection is one product; keeping it would cost as much memory as the states.
        x_proj = input_projection(input, weight_ih, bias) if ctx.correction == "none" else None
        delta, disp_h0, _, displacement = torch.ops.tpext.rnn_target_scan(
            grad,
            states,
            h0,
            weight_hh,
            torch.ops.tpext.regularized_inverse(weight_hh, ctx.reg),
            x_proj,
            lengths,
            ctx.reverse,
            ctx.nonlinearity,
            ctx.correction,
            ctx.credit,
            ctx.target_step,
            ctx.clip,
            False,
            by_target,
        )

        def below() -> Tensor:
            if by_target:
                inverse = torch.ops.tpext.regularized_inverse(weight_ih, ctx.reg)
                return _sum_members(torch.bmm(displacement.flatten(1, 2), inverse.mT))
            return -_sum_members(torch.bmm(delta.flatten(1, 2), weight_ih))

        return *_TargetLayer.gradients(ctx, delta, disp_h0, input, h0, states, lengths, below), *[None] * 10


class _LearnedTargetLayer(_TargetLayer):
    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        reverse_weight: Tensor,
        reverse_bias: Tensor,
        lengths: Tensor | None,
        reverse: Sequence[bool],
        nonlinearity: str,
        target_step: float,
        credit: str,
        normalize: bool,
    ) -> Tensor:
        x_proj = input_projection(input, weight_ih, bias)
        states: Tensor = torch.ops.tpext.rnn_scan(x_proj, h0, weight_hh, lengths, reverse, nonlinearity)
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, h0, weight_ih, weight_hh, _, reverse_weight, reverse_bias, lengths = inputs[:8]
        ctx.reverse, ctx.nonlinearity, ctx.target_step, ctx.credit, ctx.normalize = inputs[8:]
        ctx.save_for_backward(input, h0, weight_ih, weight_hh, reverse_weight, reverse_bias, lengths, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_target_backward()
        input, h0, weight_ih, weight_hh, reverse_weight, reverse_bias, lengths, states = ctx.saved_tensors
        from_input = input_projection(input, weight_ih, reverse_bias).flatten(1, 2)
        reverse_pre = torch.baddbmm(from_input, states.flatten(1, 2), reverse_weight.mT).view(states.shape)
        delta, disp_h0, _ = torch.ops.tpext.rnn_learned_target_scan(
            grad,
            states,
            weight_hh,
            reverse_weight,
            reverse_pre,
            lengths,
            ctx.reverse,
            ctx.nonlinearity,
            ctx.credit,
            ctx.target_step,
            False,
        )

        def below() -> Tensor:
            return -_sum_members(torch.bmm(delta.flatten(1, 2), weight_ih))

        return *_TargetLayer.gradients(ctx, delta, disp_h0, input, h0, states, lengths, below), *[None] * 8


for _layer in (_RegularizedTargetLayer, _LearnedTargetLayer):
    # torch looks the signature up at every call, which costs as much as a small kernel unless it is stored.
    _layer.forward.__signature__ = inspect.signature(_layer.forward)  # type: ignore[union-attr]


def _run_layer(layer: type[_TargetLayer], tensors: tuple[Tensor | None, ...], *settings: Any) -> Tensor:
    """Apply a layer; under autocast in float32, with the states in the autocast dtype."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not autocasts(device):
        return layer.apply(*tensors, *settings)  # type: ignore[no-any-return,no-untyped-call]
    with torch.autocast(device, enabled=False):
        states = layer.apply(*(to_float32(tensor) for tensor in tensors), *settings)  # type: ignore[no-untyped-call]
    return autocast_outputs(states, device)  # type: ignore[no-any-return]


def target_rnn(
    input: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    *,
    reg: float,
    target_step: float,
    correction: str,
    credit: str,
    clip: float,
    normalize: bool,
    input_rule: str,
) -> Tensor:
    """A stack of simple recurrent layers whose backward pass is target propagation by regularised inverses.

    ``h_t = a(x_t U' + b + h_{t-1} W')``; backward, with ``delta``, ``z`` and ``d`` of ``rnn_target_scan`` and
    ``P_U = U (U'U + reg I)^-1``::

        dU = c sum_t delta_t' x_t,  dW = c sum_t delta_t' h_{t-1},  db = c sum_t delta_t,   dh0 = -d_0 / target_step
        dx_t = delta_t U / target_step (input_rule "gradient")  or  -z_t P_U / target_step ("target")
        c = 1 / target_step if normalize else 1

    Args:
        input: ``[T, B, I]``, float32 or float64.
        h0: ``[S, B, H]``.
        weight_ih: U, ``[S, H, I]``.
        weight_hh: W, ``[S, H, H]``.
        bias: b, ``[S, H]`` or None.
        lengths: ``[B]`` int64 valid steps of each row, or None for all T.
        reverse: S flags: the member runs from the last valid step to the first.
        nonlinearity: "tanh", "relu" or "identity".
        reg, target_step, correction, credit, clip, normalize, input_rule: see ``tpext.RegularizedInverse``.

    Returns:
        States ``[S, T, B, H]``, zero beyond ``lengths``.

    Raises:
        ValueError: arguments that do not fit each other.
        SingularError: in the backward pass, if ``W'W + reg I`` is singular to working precision.
        RuntimeError: in the backward pass, if its result is to be differentiated.
    """
    check_choice("target_rnn", "correction", correction, CORRECTIONS)
    check_choice("target_rnn", "credit", credit, CREDITS)
    check_choice("target_rnn", "input_rule", input_rule, INPUT_RULES)
    tensors = (input, h0, weight_ih, weight_hh, bias, lengths)
    settings = (list(reverse), nonlinearity, reg, target_step, correction, credit, clip, normalize, input_rule)
    return _run_layer(_RegularizedTargetLayer, tensors, *settings)


def learned_target_rnn(
    input: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    reverse_weight: Tensor,
    reverse_bias: Tensor,
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str,
    *,
    target_step: float,
    credit: str,
    normalize: bool,
) -> Tensor:
    """A stack of simple recurrent layers whose backward pass is target propagation by a learned reverse layer.

    As ``target_rnn``, with displacements from ``rnn_learned_target_scan`` and ``G(x, h) = tanh(h V' + c + x U')``. The
    backward pass leaves ``V`` and ``c`` alone; their own loss trains them.

    Args:
        input, h0, weight_ih, weight_hh, bias, lengths, reverse, nonlinearity: as in ``target_rnn``.
        reverse_weight: V, ``[S, H, H]``.
        reverse_bias: c, ``[S, H]``.
        target_step, credit, normalize: see ``tpext.LearnedInverse``.

    Returns:
        States ``[S, T, B, H]``, zero beyond ``lengths``.

    Raises:
        ValueError: arguments that do not fit each other.
        RuntimeError: in the backward pass, if its result is to be differentiated.
    """
    check_choice("learned_target_rnn", "credit", credit, CREDITS)
    # Detached: a layer whose only trainable parameters are the reverse ones has no backward pass to run.
    tensors = (input, h0, weight_ih, weight_hh, bias, reverse_weight.detach(), reverse_bias.detach(), lengths)
    settings = (list(reverse), nonlinearity, target_step, credit, normalize)
    return _run_layer(_LearnedTargetLayer, tensors, *settings)
