"""``act_inverse``, ``act_displacement``: the inputs that would give an activation a certain output.

The proximal inverse of an activation ``a`` is ``argmin_x (a(x) - y)^2 + reg (x - c)^2``, ``c`` its current input; ``reg
= 0`` is the limit, the solution of ``a(x) = y`` nearest to ``c`` (least squares where there is none). All minimisers
are global and exact to rounding::

    identity, relu, leaky relu (slope s = 1, 0, s)
              p = max((y + reg c) / (1 + reg), 0) or q = min((s y + reg c) / (s^2 + reg), 0), whichever costs
              less; p at a tie
    tanh      a stationary point, ``(tanh x - y) (1 - tanh^2 x) + reg (x - c) = 0``: there are up to two minima
    sigmoid   2 u, with u that of tanh for ``2 y - 1``, ``c / 2`` and ``16 reg``

``torch.ops.tpext.act_inverse(target, input, activation, slope, reg, margin)`` is the proximal inverse of an
activation: ``target = y`` and ``input = c`` of any one shape, float32 or float64; ``slope`` is leaky relu's. With
``reg > 0`` it is regularised and any target has an answer, inside or outside the activation's range. With ``reg =
0`` it is constrained: the target of tanh and sigmoid is first brought ``margin`` inside the range, as beyond it no
minimiser exists, and a target below relu's range gives ``min(c, 0)``. NaN in the target, or in an input that
matters, gives NaN there; infinite targets and inputs have no defined result, nor have targets of tanh and sigmoid
beyond 1e18 in size (float64: 1e150), whose squares overflow.

For tanh and sigmoid each of the two possible minima has a bracket, searched by safeguarded Halley steps: on the CPU by
a kernel, each element until it has converged, for 128 steps at most; on CUDA by torch operations, 10 bisections and 8
Halley steps, without a branch on data. The cost is the least to rounding. So is the minimiser (for ``reg`` from
1e-12), except where minima merge or tie: there its own conditioning decides, and of two equal ones that nearer to the
target's preimage is taken. The CPU's result is bitwise the same on any number of threads; numbers below the smallest
normal one count as zero there.

``torch.ops.tpext.act_displacement(displacement, input, activation, slope, reg)`` is by how much the proximal inverse
at ``y = a(c) + d`` moves ``c``, with ``reg > 0``: ``argmin_u (a(c + u) - a(c) - d)^2 + reg u^2``. It is solved for
``u`` itself, so that ``u`` is precise relative to its own size, however small beside ``c`` (float32: for ``reg`` from
1e-6); tanh's from 3/8 on (sigmoid's from 3/4) is ``act_inverse(a(c) + d) - c``, and as precise as that. ``d = 0`` gives
exactly 0, and a small ``d`` tends to ``d s / (s^2 + reg)``, ``s = a'(c)``. Most displacements below that size take
one to four steps of Newton's instead of the search: all outward ones, and inward ones of tanh with ``|d tanh c| <= 3/4
sqrt(reg)``.

Under CPU autocast both compute in and return float32. They are target ops, no derivatives: differentiating through
them raises RuntimeError. Inputs are never changed. Cost of ``act_inverse``: some 20 operations an element, that often
for each step of tanh and sigmoid with ``reg > 0``.

Source: J. Seely, "tensorflow-target-prop", ``operations.py``; :mod:`tpext.ops.activation` has where it differs.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    LOW_PRECISION,
    NOT_A_DERIVATIVE,
    check_choice,
    check_like,
    check_tensor,
    define,
    dense,
    dtype_name,
    execution,
    on_cuda,
    refuse_derivative,
    refuse_forward_mode,
)

ActivationName = Literal["tanh", "sigmoid", "relu", "leaky_relu", "identity"]

# Below zero.
_SLOPES = {"relu": 0.0, "identity": 1.0}
# Halvings of each bracket, which leave Halley's steps a hundredth of a unit, and those steps; steps for a displacement.
_BISECTIONS, _HALLEY_STEPS, _NEWTON_STEPS = 10, 8, 6
# The displacement up to which the latter are taken.
_MOST_SMALL = 0.375


def check_input(op: str, name: str, target: Tensor, input: Tensor) -> None:
    """Refuse forward mode, an input of other dtypes, and a second tensor that is not like it."""
    refuse_forward_mode(op, "it has no derivative")
    if input.dtype not in (torch.float32, torch.float64):
        hint = "; for lower precision use torch.autocast" if input.dtype in LOW_PRECISION else ""
        raise ValueError(f"{op}: input must be float32 or float64, got {dtype_name(input.dtype)}{hint}")
    check_like(op, name, target, input, input.shape)


def check_reg(op: str, reg: float) -> None:
    """Raise ValueError unless ``reg`` is a finite number >= 0."""
    if not 0 <= reg < math.inf:
        raise ValueError(f"{op}: reg must be a finite number >= 0, got {reg}")


def _check_activation(op: str, activation: str, slope: float) -> None:
    check_choice(op, "activation", activation, get_args(ActivationName))
    if activation == "leaky_relu" and not 0 < slope < math.inf:
        raise ValueError(f"{op}: slope must be a finite number > 0, got {slope}")


def _fake(target: Tensor, input: Tensor, activation: str, slope: float, reg: float, margin: float) -> Tensor:
    """Check the arguments and return an empty output."""
    op = "act_inverse"
    check_input(op, "target", target, input)
    _check_activation(op, activation, slope)
    check_reg(op, reg)
    least = torch.finfo(input.dtype).eps
    if activation in ("tanh", "sigmoid") and not least <= margin < 0.5:
        raise ValueError(f"{op}: margin must lie in [{least:.3g}, 0.5) for {dtype_name(input.dtype)}, got {margin}")
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _act_inverse(target: Tensor, input: Tensor, activation: str, slope: float, reg: float, margin: float) -> Tensor:
    _fake(target, input, activation, slope, reg, margin)
    target, input = target.contiguous(), input.contiguous()
    if activation in ("tanh", "sigmoid") and reg > 0:
        if on_cuda(target):
            return _minimizer(target, input, activation, reg)
        output = torch.empty_like(input)
        flat = [dense(tensor.view(-1)) for tensor in (target, input, output)]
        _C.act_inverse(flat[0], flat[1], activation, reg, flat[2], execution(input))
        return output
    if activation == "tanh":
        return torch.atanh(target.clamp(margin - 1, 1 - margin))
    if activation == "sigmoid":
        return torch.logit(target.clamp(margin, 1 - margin))
    return _two_line_minimizer(target, input, _SLOPES.get(activation, slope), reg)


def _two_line_minimizer(y: Tensor, c: Tensor, slope: float, reg: float) -> Tensor:
    """The minimiser of ``(f(x) - y)^2 + reg (x - c)^2``, ``f(x) = x`` for ``x > 0`` and ``slope x`` below.

    On either side the cost is a parabola, whose least value, where its vertex lies on that side, is ``(y - k c)^2 reg
    / (k^2 + reg)`` with the slope ``k`` there; if only one vertex lies on its own side, that is the minimiser.
    """
    above = (y * (1 / (1 + reg)) + c * (reg / (1 + reg))).clamp(min=0)
    curvature = slope * slope + reg
    # Without a slope and reg only c says where below zero to go.
    weight_y, weight_c = (slope / curvature, reg / curvature) if curvature > 0 else (0.0, 1.0)
    below = (y * weight_y + c * weight_c).clamp(max=0)
    above_costs_more = (y - c).abs() * math.sqrt(curvature / (1 + reg)) > (y - slope * c).abs()
    return torch.where((below < 0) & ((above <= 0) | above_costs_more), below, above)


def _minimizer(target: Tensor, input: Tensor, activation: str, reg: float) -> Tensor:
    """What the kernel computes, ``reg > 0``, in a fixed number of torch operations."""
    if activation == "tanh":
        return _tanh_minimizer(target, input, reg)
    return 2 * _tanh_minimizer(2 * target - 1, input / 2, 16 * min(reg, 1e300))


def _tanh_minimizer(y: Tensor, c: Tensor, reg: float) -> Tensor:
    """The global minimiser of ``(tanh x - y)^2 + reg (x - c)^2``, ``reg > 0``.

    Let ``y >= tanh c``; the other case is its mirror image. To the left of ``c`` both terms grow, so the minimiser is a
    zero, right of ``c``, of half the descent ``d(x) = p(x) - reg (x - c)`` with the pull ``p = (y - t) s``, where
    ``t = tanh x``, ``s = 1 - t^2``, at which ``d`` falls. As ``p' = s k(t)`` with ``k(t) = 3 t^2 - 2 y t - 1``
    and ``p'' = s q'(t)`` with the quartic ``q(t) = (1 - t^2) k(t)``, whose roots are -1, 1 and those of ``k``, one of
    them in between and one beyond ``min(y, 1)``, the pull rises to one peak and then falls until ``t = min(y, 1)``, and
    before the peak it is convex up to one point, the fold, then concave. Hence ``d`` has at most one falling zero on
    either side of the fold:

    - Left of it ``d`` is convex and ``d(c) >= 0``; the zero is right of all points with ``d > 0 > d'``, and left of all
      others. It lies within 7/8 of ``c``: at the zero ``reg (x - c) = p`` and ``p' <= reg``, and left of the fold
      ``p' / p`` is at least that at the fold, 2 / sqrt(3) or more.
    - Right of it ``d``, once it falls, keeps falling; the zero is right of all points with ``d > 0`` or ``d' > 0``, and
      left of all others. It lies left of ``atanh y``; of ``c + (y - tanh c) / reg``, as ``s <= 1``; of ``c + (y -
      tanh c) / sqrt(reg)``, beyond which the second term alone costs more than ``c`` does; and of ``max(c + 1,
      log(4 (1 + y) / reg) / 2)``, beyond which ``p <= (1 + y) 4 exp(-2 x) <= reg``.

    Where a zero does not exist, its search ends at a point that costs more than the other.
    """
    # The descent, over max(1, reg), so that no reg overflows.
    pull_weight, spring = 1 / max(1.0, reg), reg / max(1.0, reg)
    sign = torch.where(y >= torch.tanh(c), 1.0, -1.0).to(y.dtype)
    y, c = sign * y, sign * c
    start = torch.tanh(c)

    # The fold: q' in terms of r = 1 + t and of 1 + y. Newton's steps rise to its first root, where all else is flat.
    above = 1 + y
    r = torch.zeros_like(y)
    for _ in range(5):
        value = ((-12 * r + 30 + 6 * above) * r - 16 - 12 * above) * r + 4 * above
        r = r - value / ((-36 * r + 60 + 12 * above) * r - 16 - 12 * above)
    fold = torch.maximum(c, 0.5 * torch.log(r / (2 - r)))

    last = torch.maximum(c + 1, 0.5 * (torch.log(4 * above) - math.log(reg)))
    last = torch.minimum(last, torch.atanh(y.clamp(max=1)))
    last = torch.maximum(torch.minimum(last, c + (y - start) / max(reg, math.sqrt(reg))), c)
    low = torch.stack([c, fold])
    high = torch.stack([torch.minimum(torch.minimum(c + 0.875, fold), last), torch.maximum(last, fold)])

    x = 0.5 * (low + high)
    for step in range(_BISECTIONS + _HALLEY_STEPS):
        t, s = _tanh_and_slope(x)
        gap = y - t
        descent = pull_weight * gap * s - spring * (x - c)
        slope = -pull_weight * s * (s + 2 * t * gap) - spring
        falls, rises = descent > 0, slope > 0
        is_left = torch.stack([falls[0] & ~rises[0], falls[1] | rises[1]])
        low, high = torch.where(is_left, x, low), torch.where(is_left, high, x)
        middle = 0.5 * (low + high)
        if step < _BISECTIONS:
            x = middle
            continue
        curvature = pull_weight * s * (6 * t * s + gap * (4 * t * t - 2 * s))
        newton = descent / slope
        halley = x - newton / (1 - 0.5 * newton * (curvature / slope))
        x = torch.where((halley >= low) & (halley <= high), halley, middle)

    # By how much the left one costs more, as differences, which keep their digits; c right of the fold leaves one.
    t, _ = _tanh_and_slope(x)
    gain = pull_weight * (t[1] - t[0]) * (2 * y - t[1] - t[0]) - spring * (x[1] - x[0]) * (x[1] + x[0] - 2 * c)
    return sign * torch.where((gain >= 0) | (fold <= c), x[1], x[0])


def _tanh_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """``tanh x`` and ``1 - tanh^2 x``, the latter with all its digits where it is small."""
    e = torch.exp(-2 * x.abs())
    return torch.tanh(x), 4 * e / (1 + e) ** 2


def _fake_displacement(displacement: Tensor, input: Tensor, activation: str, slope: float, reg: float) -> Tensor:
    """Check the arguments and return an empty output."""
    op = "act_displacement"
    check_input(op, "displacement", displacement, input)
    _check_activation(op, activation, slope)
    if not 0 < reg < math.inf:
        raise ValueError(f"{op}: reg must be a finite number > 0, got {reg}")
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _act_displacement(displacement: Tensor, input: Tensor, activation: str, slope: float, reg: float) -> Tensor:
    output = _fake_displacement(displacement, input, activation, slope, reg)
    displacement, input = displacement.contiguous(), input.contiguous()
    if activation not in ("tanh", "sigmoid"):
        return _two_line_displacement(displacement, input, _SLOPES.get(activation, slope), reg)
    if on_cuda(input):
        return _displacement(displacement, input, activation, reg)
    flat = [dense(tensor.view(-1)) for tensor in (displacement, input, output)]
    _C.act_displacement(flat[0], flat[1], activation, reg, flat[2], execution(input))
    return output


def _two_line_displacement(d: Tensor, c: Tensor, slope: float, reg: float) -> Tensor:
    """``_two_line_minimizer`` at ``y = f(c) + d``, less ``c``: the same steps, on differences from ``c``."""
    # y - c and y - slope c: d itself on the side of c
    from_above, from_below = d + (slope - 1) * c.clamp(max=0), d + (1 - slope) * c.clamp(min=0)
    above = torch.maximum(from_above * (1 / (1 + reg)), -c)
    below = torch.minimum(from_below * (slope / (slope * slope + reg)), -c)
    above_costs_more = from_above.abs() * math.sqrt((slope * slope + reg) / (1 + reg)) > from_below.abs()
    return torch.where((below < -c) & ((above <= -c) | above_costs_more), below, above)


def _displacement(displacement: Tensor, input: Tensor, activation: str, reg: float) -> Tensor:
    """What the kernel computes in a fixed number of torch operations."""
    if activation == "tanh":
        return _tanh_displacement(displacement, input, reg)
    return 2 * _tanh_displacement(2 * displacement, input / 2, 16 * min(reg, 1e300))


def _tanh_displacement(d: Tensor, c: Tensor, reg: float) -> Tensor:
    """The global minimiser of ``(tanh(c + u) - tanh c - d)^2 + reg u^2``: see ``csrc/cpu/act_inverse.cpp``."""
    weight, spring = 1 / max(1.0, reg), reg / max(1.0, reg)
    t, s = _tanh_and_slope(c)
    pull = weight * s
    value = pull * d
    fall, half_bend = pull * s + spring - value * t, 0.5 * value - 3 * spring * t
    near = value * fall / (fall * fall - value * half_bend)
    one_zero = d * t >= -(0.375 * s).clamp(min=0.75 * min(math.sqrt(reg), 1e30))
    one_zero &= near.abs() <= _MOST_SMALL
    far = _tanh_minimizer(t + d, c, reg) - c

    u = torch.where(one_zero, near, far)
    settled = one_zero
    for _ in range(_NEWTON_STEPS):
        sinh, cosh = torch.sinh(u), torch.cosh(u)
        k, slope = cosh + t * sinh, sinh + t * cosh
        fall = pull * (s * cosh - d * slope) + spring * k * k * (k + 3 * u * slope)
        move = (pull * (d * k - s * sinh) - spring * k * k * k * u) / fall
        u = u + move
        settled = (fall > 0) & (32 * move * move <= torch.finfo(u.dtype).eps * u.abs())
    settled &= (u.abs() <= _MOST_SMALL) & (one_zero | ((u - far).abs() <= 1 / 64))
    # Rounding may move a search's result past the input.
    return torch.where(settled, u, torch.where(d == 0, 0.0, torch.where(d > 0, far.clamp(min=0), far.clamp(max=0))))


_inverse = define(
    "act_inverse(Tensor target, Tensor input, str activation, float slope, float reg, float margin) -> Tensor",
    _act_inverse,
    _fake,
    cast_outputs=False,
)
refuse_derivative("act_inverse", NOT_A_DERIVATIVE)
_moved_input = define(
    "act_displacement(Tensor displacement, Tensor input, str activation, float slope, float reg) -> Tensor",
    _act_displacement,
    _fake_displacement,
    cast_outputs=False,
)
refuse_derivative("act_displacement", NOT_A_DERIVATIVE)


def act_inverse(
    target: Tensor, input: Tensor, activation: ActivationName, slope: float, reg: float, margin: float
) -> Tensor:
    """The proximal inverse of an activation, ``argmin_x (a(x) - y)^2 + reg (x - c)^2`` (the module's head).

    The op ``torch.ops.tpext.act_inverse``, past torch's dispatcher where nothing but the kernel has to see the call.
    :class:`Activation` has it with defaults, and for ``form="ridge"``.

    Args:
        target: ``y``, float32 or float64, of any shape.
        input: ``c``, of its shape.
        activation: "tanh", "sigmoid", "relu", "leaky_relu" or "identity".
        slope: of leaky relu below zero, > 0; the others ignore it.
        reg: >= 0; 0 is the constrained inverse.
        margin: distance kept from the edges of the range of tanh and sigmoid where ``reg`` is 0, < 0.5 and at least the
            dtype's eps.

    Returns:
        ``x``, of the shape of ``input``.

    Raises:
        ValueError: an argument that does not fit, named. RuntimeError: when differentiated.

    >>> import torch
    >>> act_inverse(torch.tensor([3.0]), torch.tensor([1.0]), "relu", 0.0, reg=1.0, margin=0.0)
    tensor([2.])
    """
    check_tensor("act_inverse", "target", target)
    check_tensor("act_inverse", "input", input)
    return _inverse(target, input, activation, slope, reg, margin)  # type: ignore[no-any-return]


def act_displacement(
    displacement: Tensor, input: Tensor, activation: ActivationName, slope: float, reg: float
) -> Tensor:
    """How far the proximal inverse moves ``c``: ``argmin_u (a(c + u) - a(c) - d)^2 + reg u^2`` (the module's head).

    The op ``torch.ops.tpext.act_displacement``, as :func:`act_inverse` is the other.

    Args:
        displacement: ``d``, float32 or float64, of any shape.
        input: ``c``, of its shape.
        activation, slope: as in :func:`act_inverse`.
        reg: > 0.

    Returns:
        ``u``, of the shape of ``input``.

    Raises:
        ValueError: an argument that does not fit, named. RuntimeError: when differentiated.

    >>> import torch
    >>> act_displacement(torch.tensor([2.0]), torch.tensor([1.0]), "relu", 0.0, reg=1.0)
    tensor([1.])
    """
    check_tensor("act_displacement", "displacement", displacement)
    check_tensor("act_displacement", "input", input)
    return _moved_input(displacement, input, activation, slope, reg)  # type: ignore[no-any-return]
