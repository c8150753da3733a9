"""``rnn_target_scan``, ``rnn_learned_target_scan``: target propagation through a simple RNN.

``torch.ops.tpext.rnn_target_scan(grad_states, states, h0, weight_hh, inverse, x_proj, lengths, reverse, nonlinearity,
correction, credit, target_step, margin, return_norms, return_displacement, disp_n=None, credit_n=None, slope="inverse",
slope_reg=0.0) -> (delta, disp_h0, norms, displacement, credit_h0)`` goes once from the last step to the first. With
``g`` the gradient of the loss with respect to each state, ``s = target_step``, ``R = inverse = regularized_inverse(W,
reg) [S, H, H]``, ``P = R'`` and ``clip(v)`` = ``v`` kept within ``+-(1 - margin)``::

    "linearized"  d_{t-1} = -s g_{t-1} + z_t P             z_t = d_t * slope(h_t)
    "difference"  d_{t-1} = -s g_{t-1} + z_t P             z_t = a^-1(h_t + d_t) - a^-1(h_t)
    "none"        d_{t-1} = -s g_{t-1} + z_t P - h_{t-1}   z_t = a^-1(h_t + d_t) - x_proj_t

from ``d_T = -s g_T``; the target of step ``t`` is ``h_t + d_t``. ``a^-1(v)`` is ``atanh(clip(v))``, ``max(v, 0)`` or
``v`` for tanh, relu and identity. ``slope`` is "inverse", ``a' / (a'^2 + slope_reg)`` with ``a'`` of ``clip(h_t)`` for
tanh, by default ``1 / a'``; "derivative", ``a'``; or "one". An inactive relu unit passes nothing under the first two.
With any matrix ``P`` in place of the inverse's this is every rule that is linear in what it carries; ``P = W``, slope
"derivative", credit "local" and ``s = 1`` is back-propagation through time, with minus its gradients for ``d``.

``torch.ops.tpext.rnn_learned_target_scan(grad_states, states, weight_hh, reverse_weight, reverse_pre, lengths,
reverse, nonlinearity, credit, target_step, return_norms, disp_n=None, credit_n=None) -> (delta, disp_h0, norms,
credit_h0)`` takes a learned reverse layer ``G`` instead, with ``q_t = h_t V' + c + x_t U'`` (``reverse_pre [S, T, B,
H]``) and ``V = reverse_weight [S, H, H]``::

    d_{t-1} = -s g_{t-1} + G(x_t, h_t + d_t) - G(x_t, h_t) = -s g_{t-1} + tanh(q_t + d_t V') - tanh(q_t)

Both return ``delta [S, T, B, H]``, the gradient of the local losses ``1/2 ||h_t - (h_t + d_t)||^2`` (targets held
constant) with respect to the pre-activations, ``disp_h0 = d_0 [S, B, H]``, ``norms [S, T, B]`` of each row of ``d_t``
if asked for and ``displacement [S, T, B, H]`` = ``z_t`` if asked for (with "none" the ``z_t`` of "difference"), else
empty tensors::

    credit "local"         delta_t = -d_t * a'(h_t)                      each step's own loss alone
    credit "through_time"  delta_t = (-d_t + delta_{t+1} W) * a'(h_t)    their sum through the unrolled layer

``grad_states`` may be None (zero). What comes back from beyond the last valid step enters there: ``disp_n [S, B, H]``
is added to ``d_T`` and ``credit_n [S, B, H]`` stands for ``delta_{T+1} W``; ``disp_h0`` and ``credit_h0`` = ``delta_1
W`` ``[S, B, H]`` (empty under "local") are the same at the other end. So a displacement of the final state alone is
``disp_n``, and a long sequence can be taken in pieces, the last one first. Without ``grad_states`` a displacement that
has faded to nothing may end the work, and does on the CPU; states further back are then not read, so that a NaN there
goes unseen if it has not reached the last state, which one from a forward pass has. Of states with other NaNs nothing
is promised, the same bits on any number of threads included.

``target_step``, ``margin`` and ``slope_reg`` are numbers of all members of the stack, or lists with one for each: a
member then gets the bits of a call of its own. (On CUDA, where kernels take one number, members with numbers of their
own run one after another.)

Stack, ``reverse``, ``lengths``, dtypes, determinism and errors are those of ``rnn_scan``; under CPU autocast they
compute and return float32, under CUDA autocast its dtype. The layers take regularised inverses in float32 at least and
round them to the dtype of their pass. These are no derivatives of anything: differentiating through them raises
RuntimeError. Cost: ``2 S T B H^2`` operations, twice that through time.

Sources: Roulet and Harchaoui (2021), "Target Propagation via Regularized Inversion": section 3 (the inverse,
"difference" and "linearized"); Manchev and Spratling (JMLR 21(7), 2020), "Target Propagation in Recurrent Neural
Networks": the learned inverse; Lee, Zhang, Fischer and Bengio (2015), "Difference Target Propagation".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    CREDITS,
    NOT_A_DERIVATIVE,
    Execution,
    check_choice,
    check_lengths,
    check_scan,
    compute_dtype,
    define,
    dense,
    on_cuda,
    refuse_derivative,
    run_scan,
)
from tpext.ops._members import Numbers, as_list, differ, each_alone, numbers_of

CORRECTIONS = ("linearized", "difference", "none")
SLOPES = ("inverse", "derivative", "one")


def _outputs(states: Tensor, return_norms: bool, credit: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty ``delta``, ``disp_h0``, ``norms`` and ``credit_h0``; an op cannot return None for those not wanted."""
    stack, time, batch, hidden = states.shape
    return (
        states.new_empty(states.shape),
        states.new_empty(stack, batch, hidden),
        states.new_empty((stack, time, batch) if return_norms else 0),
        states.new_empty((stack, batch, hidden) if credit == "through_time" else 0),
    )


def check_pass(
    op: str,
    states: Tensor,
    correction: str,
    credit: str,
    target_step: Numbers,
    margin: Numbers,
    slope: str,
    slope_reg: Numbers,
    learned: bool = False,
) -> None:
    """Raise ValueError unless the options of a pass are known and in range; ``learned``: a reverse layer is too."""
    check_choice(op, "correction", correction, (*CORRECTIONS, "learned") if learned else CORRECTIONS)
    check_choice(op, "credit", credit, CREDITS)
    check_choice(op, "slope", slope, SLOPES)
    slope_regs = numbers_of(op, "slope_reg", slope_reg, states.shape[0])
    for one in slope_regs:
        if not 0 <= one < math.inf:
            raise ValueError(f"{op}: slope_reg must be a finite number >= 0, got {one}")
    if correction != "linearized" and (slope != "inverse" or any(slope_regs)):
        raise ValueError(
            f"{op}: slope and slope_reg belong to correction 'linearized', got {correction!r} with {slope!r} and "
            f"{', '.join(map(str, slope_regs))}"
        )
    computed_in = compute_dtype(states)
    least = torch.finfo(computed_in).eps
    for one in numbers_of(op, "margin", margin, states.shape[0]):
        if not least <= one < 1:
            raise ValueError(
                f"{op}: margin must be at least {least:.2g}, the precision of {computed_in}, and below 1, got {one}"
            )
    _check_step(op, states, target_step)


def _check_step(op: str, states: Tensor, target_step: Numbers) -> None:
    for one in numbers_of(op, "target_step", target_step, states.shape[0]):
        if not 0 < one < math.inf:
            raise ValueError(f"{op}: target_step must be a finite number > 0, got {one}")


class _Target(NamedTuple):
    """The arguments of ``rnn_target_scan``."""

    grad_states: Tensor | None
    states: Tensor
    h0: Tensor
    weight_hh: Tensor
    inverse: Tensor
    x_proj: Tensor | None
    lengths: Tensor | None
    reverse: Sequence[bool]
    nonlinearity: str
    correction: str
    credit: str
    target_step: Numbers
    margin: Numbers
    return_norms: bool
    return_displacement: bool
    disp_n: Tensor | None = None
    credit_n: Tensor | None = None
    slope: str = "inverse"
    slope_reg: Numbers = 0.0


def _prepare_target(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Check the arguments and return empty outputs: all that the fake implementation does."""
    op, call = "rnn_target_scan", _Target(*args, **kwargs)
    states = call.states
    tensors = {
        "states": (states, "STBH"),
        "grad_states": (call.grad_states, "STBH"),
        "h0": (call.h0, "SBH"),
        "weight_hh": (call.weight_hh, "SHH"),
        "inverse": (call.inverse, "SHH"),
        "x_proj": (call.x_proj, "STBH"),
        "disp_n": (call.disp_n, "SBH"),
        "credit_n": (call.credit_n, "SBH"),
    }
    check_scan(op, "states", tensors, call.lengths, call.reverse, call.nonlinearity)
    numbers = (call.target_step, call.margin, call.slope, call.slope_reg)
    check_pass(op, states, call.correction, call.credit, *numbers)
    if call.correction == "none" and call.x_proj is None:
        raise ValueError(f"{op}: x_proj must be given for correction 'none', got None")
    delta, disp_h0, norms, credit_h0 = _outputs(states, call.return_norms, call.credit)
    return delta, disp_h0, norms, states.new_empty(states.shape if call.return_displacement else 0), credit_h0


def _rnn_target_scan(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Target(*args, **kwargs)
    outputs = _prepare_target(*call)
    check_lengths("rnn_target_scan", call.lengths, call.states.shape[1])
    target_step, margin, slope_reg = map(as_list, (call.target_step, call.margin, call.slope_reg))
    if on_cuda(call.states) and differ(target_step, margin, slope_reg):
        return each_alone(_rnn_target_scan, call)  # type: ignore[no-any-return]
    delta, disp_h0, norms, displacement, credit_h0 = outputs
    state_displacement = _state_displacement(call.states, call.return_norms)
    through_time = call.credit == "through_time"

    def run(how: Execution) -> None:
        _C.rnn_target_scan(
            dense(call.grad_states),
            dense(call.disp_n),
            dense(call.credit_n),
            dense(call.states),
            dense(call.h0),
            dense(call.weight_hh),
            dense(call.inverse),
            dense(call.x_proj),
            dense(call.lengths),
            list(call.reverse),
            call.nonlinearity,
            call.correction,
            call.credit,
            target_step,
            margin,
            call.slope,
            slope_reg,
            dense(delta),
            dense(disp_h0),
            dense(credit_h0) if through_time else None,
            dense(norms) if call.return_norms and state_displacement is None else None,
            dense(displacement) if call.return_displacement else None,
            dense(state_displacement),
            how,
        )

    products = ((call.inverse, True), (call.weight_hh, False))
    run_scan("rnn_target_scan", run, call.states, products if through_time else products[:1])
    if state_displacement is not None:
        torch.linalg.vector_norm(state_displacement, dim=-1, out=norms)
    return outputs


def _state_displacement(states: Tensor, return_norms: bool) -> Tensor | None:
    """Where a pass on CUDA is to leave every ``d_t`` if norms are asked for; the CPU's kernel gives them itself."""
    return states.new_empty(states.shape) if return_norms and on_cuda(states) else None


class _Learned(NamedTuple):
    """The arguments of ``rnn_learned_target_scan``."""

    grad_states: Tensor | None
    states: Tensor
    weight_hh: Tensor
    reverse_weight: Tensor
    reverse_pre: Tensor
    lengths: Tensor | None
    reverse: Sequence[bool]
    nonlinearity: str
    credit: str
    target_step: Numbers
    return_norms: bool
    disp_n: Tensor | None = None
    credit_n: Tensor | None = None


def _prepare_learned(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check the arguments and return empty outputs: all that the fake implementation does."""
    op, call = "rnn_learned_target_scan", _Learned(*args, **kwargs)
    tensors = {
        "states": (call.states, "STBH"),
        "grad_states": (call.grad_states, "STBH"),
        "weight_hh": (call.weight_hh, "SHH"),
        "reverse_weight": (call.reverse_weight, "SHH"),
        "reverse_pre": (call.reverse_pre, "STBH"),
        "disp_n": (call.disp_n, "SBH"),
        "credit_n": (call.credit_n, "SBH"),
    }
    check_scan(op, "states", tensors, call.lengths, call.reverse, call.nonlinearity)
    check_choice(op, "credit", call.credit, CREDITS)
    _check_step(op, call.states, call.target_step)
    return _outputs(call.states, call.return_norms, call.credit)


def _rnn_learned_target_scan(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Learned(*args, **kwargs)
    outputs = _prepare_learned(*call)
    check_lengths("rnn_learned_target_scan", call.lengths, call.states.shape[1])
    target_step = as_list(call.target_step)
    if on_cuda(call.states) and differ(target_step):
        return each_alone(_rnn_learned_target_scan, call)  # type: ignore[no-any-return]
    delta, disp_h0, norms, credit_h0 = outputs
    state_displacement = _state_displacement(call.states, call.return_norms)
    through_time = call.credit == "through_time"

    def run(how: Execution) -> None:
        _C.rnn_learned_target_scan(
            dense(call.grad_states),
            dense(call.disp_n),
            dense(call.credit_n),
            dense(call.states),
            dense(call.weight_hh),
            dense(call.reverse_weight),
            dense(call.reverse_pre),
            dense(call.lengths),
            list(call.reverse),
            call.nonlinearity,
            call.credit,
            target_step,
            dense(delta),
            dense(disp_h0),
            dense(credit_h0) if through_time else None,
            dense(norms) if call.return_norms and state_displacement is None else None,
            dense(state_displacement),
            how,
        )

    products = ((call.reverse_weight, True), (call.weight_hh, False))
    run_scan("rnn_learned_target_scan", run, call.states, products if through_time else products[:1])
    if state_displacement is not None:
        torch.linalg.vector_norm(state_displacement, dim=-1, out=norms)
    return outputs


rnn_target_scan = define(
    "rnn_target_scan(Tensor? grad_states, Tensor states, Tensor h0, Tensor weight_hh, Tensor inverse, Tensor? x_proj, "
    "Tensor? lengths, bool[] reverse, str nonlinearity, str correction, str credit, float[1] target_step, "
    "float[1] margin, bool return_norms, bool return_displacement, Tensor? disp_n=None, Tensor? credit_n=None, "
    "str slope='inverse', float[1] slope_reg=0.0) -> "
    "(Tensor delta, Tensor disp_h0, Tensor norms, Tensor displacement, Tensor credit_h0)",
    _rnn_target_scan,
    _prepare_target,
    cast_outputs=False,
    low_precision=True,
)
refuse_derivative("rnn_target_scan", NOT_A_DERIVATIVE)

rnn_learned_target_scan = define(
    "rnn_learned_target_scan(Tensor? grad_states, Tensor states, Tensor weight_hh, Tensor reverse_weight, "
    "Tensor reverse_pre, Tensor? lengths, bool[] reverse, str nonlinearity, str credit, float[1] target_step, "
    "bool return_norms, Tensor? disp_n=None, Tensor? credit_n=None) -> "
    "(Tensor delta, Tensor disp_h0, Tensor norms, Tensor credit_h0)",
    _rnn_learned_target_scan,
    _prepare_learned,
    cast_outputs=False,
    low_precision=True,
)
refuse_derivative("rnn_learned_target_scan", NOT_A_DERIVATIVE)
