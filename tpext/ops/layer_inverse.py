"""``act_inverse``, ``act_displacement``, ``layer_inverse``: the inputs that would give a layer a certain output.

A layer ``y = a(x W' + b)`` is three maps, linear, bias and activation. Each map ``f`` is inverted by itself, the last
one first, as ``argmin_x ||f(x) - y||^2 + reg ||x - c||^2``, where ``c`` is the current input of the map (``form=
"proximal"``) or zero (``form="ridge"``); ``method="constrained"`` is the limit ``reg -> 0``, the solution of ``f(x) =
y`` nearest to ``c`` (least squares where there is none). So a layer has three separate proximity terms, and its inverse
is not the regularised inverse of the composed map. All minimisers are global and exact to rounding::

    linear    x = c + (y - c W') R',  R = (W'W + reg I)^-1 W' = W' (WW' + reg I)^-1       the smaller Gram matrix
    bias      x = (y - b + reg c) / (1 + reg)
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
them, and so through a layer's inverse, raises RuntimeError. Inputs are never changed. Cost of ``act_inverse``: some 20
operations an element, that often for each step of tanh and sigmoid with ``reg > 0``.

Source: J. Seely, "tensorflow-target-prop", ``operations.py``, its four functions an operation. It differs in that its
regularised inverses of tanh and sigmoid are ``num_steps`` gradient steps from the clipped constrained inverse, on a
cost averaged over all elements, so that by default they hardly leave it; that its inverse of the identity ignores
``reg``; that its leaky relu has none; and that its linear map solves an ``N x N`` system. ``Activation`` gives its
numbers with ``reference_compat=True``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    LOW_PRECISION,
    NOT_A_DERIVATIVE,
    autocasts,
    cast,
    check_choice,
    check_like,
    check_tensor,
    define,
    dense,
    dtype_name,
    execution,
    full_precision,
    is_integer,
    is_number,
    on_cuda,
    refuse_derivative,
    refuse_forward_mode,
)
from tpext.ops.regularized_inverse import regularized_inverse

ActivationName = Literal["tanh", "sigmoid", "relu", "leaky_relu", "identity"]
Form = Literal["proximal", "ridge"]
Method = Literal["regularized", "constrained"]

# Below zero.
_SLOPES = {"relu": 0.0, "identity": 1.0}
# Halvings of each bracket, which leave Halley's steps a hundredth of a unit, and those steps; steps for a displacement.
_BISECTIONS, _HALLEY_STEPS, _NEWTON_STEPS = 10, 8, 6
# The displacement up to which the latter are taken.
_MOST_SMALL = 0.375


def _check(op: str, name: str, target: Tensor, input: Tensor) -> None:
    refuse_forward_mode(op, "it has no derivative")
    if input.dtype not in (torch.float32, torch.float64):
        hint = "; for lower precision use torch.autocast" if input.dtype in LOW_PRECISION else ""
        raise ValueError(f"{op}: input must be float32 or float64, got {dtype_name(input.dtype)}{hint}")
    check_like(op, name, target, input, input.shape)


def _check_reg(op: str, reg: float) -> None:
    if not 0 <= reg < math.inf:
        raise ValueError(f"{op}: reg must be a finite number >= 0, got {reg}")


def _check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != tuple(shape):
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def _check_product(op: str, input: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [M, N], got {list(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: input must be [..., N={weight.shape[1]}], got {list(input.shape)}")


def _check_activation(op: str, activation: str, slope: float) -> None:
    check_choice(op, "activation", activation, get_args(ActivationName))
    if activation == "leaky_relu" and not 0 < slope < math.inf:
        raise ValueError(f"{op}: slope must be a finite number > 0, got {slope}")


def _fake(target: Tensor, input: Tensor, activation: str, slope: float, reg: float, margin: float) -> Tensor:
    """Check the arguments and return an empty output."""
    op = "act_inverse"
    _check(op, "target", target, input)
    _check_activation(op, activation, slope)
    _check_reg(op, reg)
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
    _check(op, "displacement", displacement, input)
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


def _center(input: Tensor, form: str) -> Tensor:
    """What the regularisation draws the solution to."""
    return input if form == "proximal" else torch.zeros_like(input)


@dataclass(frozen=True)
class Activation:
    """An elementwise activation ``a`` with its derivative and its inverses: what target propagation asks of it.

    Args:
        name: "tanh", "sigmoid", "relu", "leaky_relu" or "identity".
        slope: of leaky relu below zero, > 0; the others ignore it.
        reference_compat: make ``regularized_inverse`` give the numbers of the published code (see the module's head):
            for tanh and sigmoid ``x <- x - learning_rate (2 / n) ((a(x) - y) a'(x) + reg (x - c))``, ``num_steps``
            times from ``x = inverse(y)``, ``n`` the number of elements; for the identity ``y``.
        learning_rate: of these steps.
        num_steps: their number, >= 0.

    Raises:
        ValueError: an argument out of its range, named.

    Source: J. Seely, "tensorflow-target-prop", ``operations.py``.

    >>> import torch
    >>> relu = Activation("relu")
    >>> relu.inverse(torch.tensor([3.0, -1.0, -1.0]), torch.tensor([1.0, 1.0, -2.0]))
    tensor([ 3.,  0., -2.])
    >>> relu.regularized_inverse(torch.tensor([3.0, -1.0, -1.0]), torch.tensor([1.0, 1.5, -2.0]), reg=1.0)
    tensor([ 2.0000,  0.2500, -2.0000])
    """

    name: ActivationName
    slope: float = 0.01
    reference_compat: bool = False
    learning_rate: float = 0.1
    num_steps: int = 2

    def __post_init__(self) -> None:
        check_choice("Activation", "name", self.name, get_args(ActivationName))
        for name in ("slope", "learning_rate"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"Activation: {name} must be a finite number > 0, got {value!r}")
        if not isinstance(self.reference_compat, bool):
            raise ValueError(f"Activation: reference_compat must be True or False, got {self.reference_compat!r}")
        if not is_integer(self.num_steps) or self.num_steps < 0:
            raise ValueError(f"Activation: num_steps must be an integer >= 0, got {self.num_steps!r}")

    def __call__(self, input: Tensor) -> Tensor:
        """``a(x)``, an ordinary differentiable function of a tensor of any shape and floating-point dtype."""
        check_tensor("Activation", "input", input)
        if self.name == "tanh":
            return torch.tanh(input)
        if self.name == "sigmoid":
            return torch.sigmoid(input)
        if self.name == "relu":
            return torch.relu(input)
        if self.name == "leaky_relu":
            return torch.nn.functional.leaky_relu(input, self.slope)
        return input

    def derivative(self, grad: Tensor, input: Tensor) -> Tensor:
        """``g * a'(x)``: a gradient of the output taken to the input, one step of the chain rule.

        Args:
            grad: ``g``, of the shape of ``input``.
            input: ``x``; at 0 the slopes of relu and leaky relu are those from below, as torch's are.
        """
        check_tensor("Activation.derivative", "grad", grad)
        check_tensor("Activation.derivative", "input", input)
        if self.name == "tanh":
            return grad * (1 - torch.tanh(input) ** 2)
        if self.name == "sigmoid":
            output = torch.sigmoid(input)
            return grad * output * (1 - output)
        if self.name == "identity":
            return grad
        return torch.where(input > 0, grad, grad * (0.0 if self.name == "relu" else self.slope))

    def inverse(self, target: Tensor, input: Tensor, margin: float = 1e-2) -> Tensor:
        """The constrained least squares inverse: of the points whose image is nearest to the target, that nearest to x.

        ``atanh(y)`` and ``log(y / (1 - y))``, with ``y`` first brought ``margin`` inside the range; relu: ``y`` if
        ``y > 0``, else ``min(x, 0)``; leaky relu: ``y`` or ``y / slope``; identity: ``y``.

        Args:
            target: ``y``, float32 or float64, of the shape of ``input``.
            input: ``x``, the current input of the activation.
            margin: distance kept from the edges of the range of tanh and sigmoid, < 0.5 and at least the dtype's eps. A
                unit whose output is nearer to an edge than this moves even if its target is its output.

        Returns:
            The target of the input, of its shape.

        Raises:
            ValueError: a wrong shape, dtype, device or ``margin``, named. RuntimeError: when differentiated.
        """
        return act_inverse(target, input, self.name, self.slope, 0.0, margin)

    def regularized_inverse(self, target: Tensor, input: Tensor, reg: float = 1e-2, form: Form = "proximal") -> Tensor:
        """The regularised inverse ``argmin_z ||a(z) - y||^2 + reg ||z - x||^2``, or with ``||z||^2`` for "ridge".

        As reg grows it tends to ``x`` (to zero), and as it falls to :meth:`inverse` where the target is in the range.

        Args:
            target: ``y``, float32 or float64, of the shape of ``input``; need not lie in the range.
            input: ``x``, the current input of the activation.
            reg: weight of the second term, >= 0. 0 gives the limit; tanh and sigmoid have none beyond their range,
                and the target is then first brought the dtype's eps inside it.
            form: "proximal" or "ridge".

        Returns:
            The target of the input, of its shape.

        Raises:
            ValueError: a wrong shape, dtype, device, ``reg`` or ``form``, named; ``reference_compat`` with leaky
            relu, of which the published code has no regularised inverse. RuntimeError: when differentiated.
        """
        check_tensor("regularized_inverse", "target", target)
        check_tensor("regularized_inverse", "input", input)
        check_choice("regularized_inverse", "form", form, get_args(Form))
        center = _center(input, form)
        if self.reference_compat:
            _check_reg("regularized_inverse", reg)
            if self.name == "leaky_relu":
                raise ValueError("regularized_inverse: reference_compat has none of leaky_relu; set it to False")
            if self.name == "identity":
                return self.inverse(target, center)
            if self.name in ("tanh", "sigmoid"):
                return self._published_steps(target, center, reg)
        eps = torch.finfo(input.dtype).eps if input.is_floating_point() else 0.0
        return act_inverse(target, center, self.name, self.slope, reg, eps)

    def _published_steps(self, target: Tensor, center: Tensor, reg: float) -> Tensor:
        x = self.inverse(target, center)
        rate = self.learning_rate * 2 / max(1, x.numel())
        for _ in range(self.num_steps):
            x = x - rate * (self.derivative(self(x) - target, x) + reg * (x - center))
        return x


def bias_inverse(target: Tensor, input: Tensor, bias: Tensor, reg: float = 0.0, form: Form = "proximal") -> Tensor:
    """The inverse of ``y = x + b``: ``(y - b + reg c) / (1 + reg)``, ``c = x`` or for ``form="ridge"`` 0.

    An ordinary differentiable function, of any floating-point dtype.

    Args:
        target: ``y``, ``[..., M]``.
        input: ``x``, ``[..., M]``.
        bias: ``b``, ``[M]``.
        reg: weight of ``||x - c||^2``, >= 0; 0 is the exact inverse.
        form: "proximal" or "ridge".

    Returns:
        The target of the input, ``[..., M]``.

    Raises:
        ValueError: a wrong shape, ``reg`` or ``form`` out of range; the message names the argument.
    """
    check_tensor("bias_inverse", "target", target, "[..., M]")
    check_tensor("bias_inverse", "input", input, "[..., M]")
    check_tensor("bias_inverse", "bias", bias, "[M]")
    check_choice("bias_inverse", "form", form, get_args(Form))
    _check_reg("bias_inverse", reg)
    if input.dim() == 0:
        raise ValueError("bias_inverse: input must be [..., M], got []")
    _check_shape("bias_inverse", "bias", bias, input.shape[-1:])
    _check_shape("bias_inverse", "target", target, input.shape)
    exact = target - bias
    if form == "ridge":
        return exact / (1 + reg)
    return exact + (input - exact) * (reg / (1 + reg))


def linear_inverse(
    target: Tensor,
    input: Tensor,
    weight: Tensor,
    reg: float = 0.0,
    form: Form = "proximal",
    inverse: Tensor | None = None,
) -> Tensor:
    """The inverse of ``y = x W'``: ``c + (y - c W') R'``, ``R = (W'W + reg I)^-1 W'``, ``c = x`` or 0 for "ridge".

    An ordinary differentiable function. For ``reg > 0`` it equals ``(y W + reg c) (W'W + reg I)^-1``, without
    a system larger than the smaller of ``M`` and ``N``.

    Args:
        target: ``y``, ``[..., M]``.
        input: ``x``, ``[..., N]``.
        weight: ``W``, ``[M, N]``, float32 or float64, in ``torch.nn.Linear``'s layout.
        reg: weight of ``||x - c||^2``, >= 0. 0 is the limit, with the pseudo-inverse for ``R``: the least squares
            solution nearest to ``c``.
        form: "proximal" or "ridge".
        inverse: ``R``, ``[N, M]``, if it is known: ``tpext.ops.regularized_inverse(weight, reg)``, once a
            change of the weights. ``reg`` is then not used.

    Returns:
        The target of the input, ``[..., N]``.

    Raises:
        SingularError: ``reg`` is 0 and the weights have not full rank to working precision. A small ``reg``, or
        ``inverse=torch.linalg.pinv(weight)``, answers there.
        ValueError: weights with NaN or infinite elements; a wrong shape, ``reg`` or ``form`` out of range; the
        message names the argument.

    Cost: ``k^2 (3 m + k / 3)`` operations for ``R``, ``k = min(M, N)``, ``m = max(M, N)``, if it is not given; a row
    ``4 M N`` ("ridge": ``2 M N``).
    """
    op = "linear_inverse"
    check_tensor(op, "target", target, "[..., M]")
    check_tensor(op, "input", input, "[..., N]")
    check_tensor(op, "weight", weight, "[M, N]")
    if inverse is not None:
        check_tensor(op, "inverse", inverse, "[N, M]")
    check_choice(op, "form", form, get_args(Form))
    _check_reg(op, reg)
    _check_product(op, input, weight)
    _check_shape(op, "target", target, (*input.shape[:-1], weight.shape[0]))
    if inverse is not None:
        _check_shape(op, "inverse", inverse, (weight.shape[1], weight.shape[0]))
    operator = regularized_inverse(weight, reg) if inverse is None else inverse
    if form == "ridge":
        return target @ operator.mT
    return input + (target - input @ weight.mT) @ operator.mT


@dataclass(frozen=True)
class _Layer:
    """The arguments of a layer's inverse, checked, and its current values."""

    input: Tensor
    bias: Tensor | None
    activation: Activation
    method: Method
    reg: float
    form: Form
    margin: float
    operator: Tensor
    product: Tensor

    @classmethod
    def of(
        cls,
        op: str,
        moved: tuple[str, Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: ActivationName | Activation,
        method: Method,
        reg: float,
        form: Form,
        margin: float,
        inverse: Tensor | None,
    ) -> _Layer:
        check_choice(op, "method", method, get_args(Method))
        check_choice(op, "form", form, get_args(Form))
        _check_reg(op, reg)
        _check(op, "input", input, input)
        _check_product(op, input, weight)
        outputs, inputs = weight.shape
        leading = input.shape[:-1]
        check_like(op, "weight", weight, input, (outputs, inputs))
        check_like(op, *moved, input, (*leading, outputs))
        if bias is not None:
            check_like(op, "bias", bias, input, (outputs,))
        if inverse is not None:
            check_like(op, "inverse", inverse, input, (inputs, outputs))
        else:
            inverse = regularized_inverse(weight, reg if method == "regularized" else 0.0)
        activation = activation if isinstance(activation, Activation) else Activation(activation)
        return cls(input, bias, activation, method, reg, form, margin, inverse, input @ weight.mT)

    @property
    def preactivation(self) -> Tensor:
        return self.product if self.bias is None else self.product + self.bias

    def product_target(self, target: Tensor) -> Tensor:
        """The target of ``x W'``, that of the output taken through activation and bias."""
        if self.method == "constrained":
            center = _center(self.preactivation, self.form)
            target = self.activation.inverse(target, center, self.margin)
        else:
            target = self.activation.regularized_inverse(target, self.preactivation, self.reg, self.form)
        if self.bias is None:
            return target
        reg = self.reg if self.method == "regularized" else 0.0
        return bias_inverse(target, self.product, self.bias, reg, self.form)

    def product_displacement(self, displacement: Tensor) -> Tensor:
        """By how much ``x W'`` should move for the output to move by this."""
        act, center = self.activation, self.preactivation
        if self.method == "constrained" or self.reg == 0 or self.form == "ridge" or act.reference_compat:
            output = act(center)
            return self.product_target(output + displacement) - self.product_target(output)
        moved = act_displacement(displacement, center, act.name, act.slope, self.reg)
        return moved if self.bias is None else moved / (1 + self.reg)


def _check_layer(
    op: str, moved: tuple[str, object], input: object, weight: object, bias: object, inverse: object
) -> None:
    """Raise TypeError unless a layer's arguments are tensors."""
    check_tensor(op, *moved, "[..., M]")
    check_tensor(op, "input", input, "[..., N]")
    check_tensor(op, "weight", weight, "[M, N]")
    if bias is not None:
        check_tensor(op, "bias", bias, "[M]")
    if inverse is not None:
        check_tensor(op, "inverse", inverse, "[N, M]")


def _cast_under_autocast(target: Tensor, input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The arguments of a layer's inverse: under autocast in float32, as those of the ops."""
    tensors = (target, input, *others)
    return tuple(cast(tensor, torch.float32) for tensor in tensors) if autocasts(input.device.type) else tensors


def layer_inverse(
    target: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: ActivationName | Activation,
    *,
    method: Method = "regularized",
    reg: float = 1e-2,
    form: Form = "proximal",
    margin: float = 1e-2,
    inverse: Tensor | None = None,
) -> Tensor:
    """The target of the input of a layer ``y = a(x W' + b)``, given that of its output.

    With ``x1 = x W'`` and ``x2 = x1 + b``, and the inverses of the module's head, each with its own proximity term::

        t2 = act_inverse(target, x2),   t1 = bias_inverse(t2, x1),   result = linear_inverse(t1, x)

    Regularised and proximal, a target that is the layer's output gives back ``x``; constrained, only where no unit is
    within ``margin`` of the edges of its range.

    Args:
        target: ``[..., M]``.
        input: ``x``, ``[..., N]``, float32 or float64.
        weight: ``W``, ``[M, N]``, in ``torch.nn.Linear``'s layout.
        bias: ``b``, ``[M]``, or None.
        activation: its name, or an :class:`Activation`.
        method: "regularized", or "constrained": the limit ``reg -> 0``.
        reg: weight of the proximity terms, >= 0; "constrained" does not use it.
        form: "proximal": near to ``x``, ``x1`` and ``x2``; "ridge": near to zero.
        margin: for "constrained": as in :meth:`Activation.inverse`.
        inverse: ``[N, M]``, the regularised inverse of the weights if it is known, for ``reg``, or for 0 if
            constrained: ``tpext.ops.regularized_inverse(weight, reg)``, once a change of the weights.

    Returns:
        ``[..., N]``; under autocast computed in float32 and returned in it, as by the ops.

    Raises:
        ValueError: a wrong shape, dtype or device, an option out of range; the message names the argument.
        SingularError: as :func:`linear_inverse`. RuntimeError: when differentiated.

    Cost: that of ``R`` if it is not given, ``6 M N`` operations a row ("ridge": ``4 M N``) and ``act_inverse``.

    Source: J. Seely, "tensorflow-target-prop", ``tprop_train.py``: error algorithms 1 ("constrained") and 2.

    >>> import torch
    >>> x, weight, bias = torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2)
    >>> target = torch.tanh(x @ weight.T + bias)
    >>> torch.allclose(layer_inverse(target, x, weight, bias, "tanh"), x)
    True
    """
    op = "layer_inverse"
    _check_layer(op, ("target", target), input, weight, bias, inverse)
    target, input, weight, bias, inverse = _cast_under_autocast(target, input, weight, bias, inverse)
    with full_precision(input.device.type):
        layer = _Layer.of(op, ("target", target), input, weight, bias, activation, method, reg, form, margin, inverse)
        target = layer.product_target(target)
        if form == "ridge":
            return target @ layer.operator.mT
        return input + (target - layer.product) @ layer.operator.mT


def layer_displacement(
    displacement: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: ActivationName | Activation,
    *,
    method: Method = "regularized",
    reg: float = 1e-2,
    form: Form = "proximal",
    margin: float = 1e-2,
    inverse: Tensor | None = None,
) -> Tensor:
    """By how much the input of a layer ``y = a(x W' + b)`` should move for its output to move by ``displacement``.

    ``layer_inverse(y + d) - layer_inverse(y)``, computed as one difference before the linear map, ``(t1(y + d) - t1(y))
    R'``: no displacement of the output gives none of the input, with any method, and in a regularised identity layer it
    is ``d (W'W + reg I)^-1 W'`` over ``(1 + reg)^2``. Regularised and proximal, with ``reg > 0``, the difference
    is ``act_displacement / (1 + reg)`` (without a bias not ``/ (1 + reg)``), precise for the smallest ``d``; else a
    displacement below the rounding of the output is lost.

    Args:
        displacement: ``d``, ``[..., M]``.
        input, weight, bias, activation, method, reg, form, margin, inverse: as in :func:`layer_inverse`.

    Returns:
        ``[..., N]``.

    Raises, cost: as :func:`layer_inverse`, with ``act_displacement`` for ``act_inverse``, or the latter twice.

    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation" (2015): the difference correction.
    """
    op = "layer_displacement"
    _check_layer(op, ("displacement", displacement), input, weight, bias, inverse)
    displacement, input, weight, bias, inverse = _cast_under_autocast(displacement, input, weight, bias, inverse)
    with full_precision(input.device.type):
        layer = _Layer.of(
            op, ("displacement", displacement), input, weight, bias, activation, method, reg, form, margin, inverse
        )
        return layer.product_displacement(displacement) @ layer.operator.mT
