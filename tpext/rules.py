"""The rules: which quantity a layer sends backwards in place of the chain rule.

Recurrent layers (:class:`tpext.nn.RNN`) take ``Backprop``, ``RegularizedInverse`` and ``LearnedInverse``. A recurrent
layer computes ``h_t = a(x_t U^T + b + h_{t-1} W^T)`` and receives the gradients ``g_t = dL/dh_t``. Every rule below is
a small immutable value; the layer that holds it turns ``loss.backward()`` into that rule's backward pass. Row vectors
throughout: ``h_t`` is ``[B, H]``, ``W = weight_hh`` is ``[H, H]``, ``U = weight_ih`` is ``[H, I]``.

Their target rules share one scheme. A displacement ``d_t`` says by how much ``h_t`` should move::

    d_t = -target_step * g_t + inverse(d_{t+1})            (g_t: the loss's own gradient at step t)

and the parameters receive the gradient of the local losses ``1/2 sum_t ||h_t - v_t||^2`` with the targets
``v_t = h_t + d_t`` held constant. What ``inverse`` is distinguishes the rules; what "gradient of the local losses"
means is the rule's ``credit``:

``"local"``
    each step alone, ``e_t = -d_t * a'(h_t)``: the published equation.
``"through_time"``
    the sum of the local losses, back-propagated through the whole unrolled layer,
    ``e_t = (-d_t + e_{t+1} W) * a'(h_t)``: what the published code computes. It stays inside one layer and one
    direction.

They differ a lot. On temporal order (T=60, 100 units, published settings), ``through_time`` reached 100 % within 1,200
iterations on each of five seeds; ``local`` stood at 43 to 78 % after 40,000 on three. Plain back-propagation through
time at the same effective learning rate solves that task as fast, so such a run alone is no evidence for the targets.

The size of the gradient. ``RegularizedInverse(correction="linearized")`` and ``Backprop`` are linear in ``g``: scaling
the loss (a gradient scaler), accumulating micro-batches and averaging over processes (``DistributedDataParallel``) do
what they do with back-propagation. The corrections "difference" and "none" and the learned inverse are not linear, so
with them the size of ``g`` matters: with a loss averaged over the batch, each sample's displacement is
``target_step / B`` times its own gradient, and float16 training with ``GradScaler`` is not supported.

Feed-forward layers (:class:`tpext.nn.TargetLinear`, :class:`tpext.nn.MLP`) take ``Backprop``,
``ConstrainedLeastSquares``, ``RegularizedLeastSquares`` and ``DifferenceTargetPropagation``. Such a layer computes
``h = a(x W^T + b)`` with ``x [B, N]``, ``W [M, N]``, receives ``g = dL/dh [B, M]`` and takes the displacement
``d = -target_step * g``. Its inverse turns that into a displacement ``d_x`` of its input, and it hands ``-d_x /
target_step`` down, which the layer below takes for its own ``g``; so equal target steps make one chain of targets ``h +
d``. Its parameters receive the gradient of its local loss, summed over the batch, by ``local_loss``::

    "pre"     1/2 ||x W^T + b - t||^2,   t = x W^T + b + z,  z by how much the inverse moves the pre-activation
    "post"    1/2 ||a(x W^T + b) - (h + d)||^2               so its gradient is g * a' times target_step

Where an activation is flat, "pre" asks for large moves and "post" for small ones: with "pre" and a small regularisation
a few saturated units can dominate, so "post" is the default. Published codes average local losses: over the batch and
the units of the layer (Seely: divide by ``B M``), or over the batch without the half (Lee et al.: multiply by ``2 /
B``). None of the target rules is linear in ``g`` (the identity activation apart), so what is said above of "difference"
and "none" holds for them, and accumulating micro-batches gives the whole batch's gradient only if each loss is scaled
as its part of the whole: a sum over the batch, or a mean times the part's share. ``RegularizedLeastSquares(form=
"proximal")`` keeps the digits of the smallest displacement. ``ConstrainedLeastSquares``, ``form="ridge"`` and ``gamma =
0`` take differences of outputs, so that a displacement below the rounding of the output is lost; with a mean over a
large batch and float32, a ``target_step`` of some ``B`` keeps it well above.

Feed-forward layers also take ``Kaczmarz``, which knows neither a step nor a learning rate: ``g`` is taken for ``h``
minus its target, and the parameters receive minus the change that gives the layer's moved input that target. So the
loss must be a sum over the batch whose gradient is such a difference (:class:`tpext.nn.HotTargetLoss`), the optimizer
``torch.optim.SGD(lr=1)``, and the gradients of ``k`` micro-batches add up to ``k`` times the averaged update.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Correction = Literal["linearized", "difference", "none"]
Credit = Literal["through_time", "local"]
InputRule = Literal["gradient", "target"]
LocalLoss = Literal["pre", "post"]
Form = Literal["proximal", "ridge"]
ReverseCorrection = Literal["difference", "none"]
Move = Literal["mean", "wnorm", "regularized"]
Update = Literal["average", "exact"]
First = Literal["input", "weights"]


def _set_number(rule: object, name: str, *, low: float, low_allowed: bool = False, high: float = math.inf) -> None:
    """Check one number of a frozen rule and store it as a float, and as text for ``exact_number``."""
    value = getattr(rule, name)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if low < number < high or (low_allowed and number == low):
            object.__setattr__(rule, name, number)
            object.__setattr__(rule, f"_{name}", repr(number))
            return
    bounds = f"{'>=' if low_allowed else '>'} {low:g}" + (f" and < {high:g}" if math.isfinite(high) else "")
    raise ValueError(f"{type(rule).__name__}: {name} must be a finite number {bounds}, got {value!r}")


def exact_number(rule: object, name: str) -> float:
    """Return a number of a rule, as a constant to ``torch.compile``.

    The compiler may turn a float attribute into a symbol, which it then fails to hand to the second layer's
    ``autograd.Function``; a text attribute stays a (guarded) constant.
    """
    return float(getattr(rule, f"_{name}"))


def _check_choice(rule: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(rule, name)
    if not isinstance(value, str) or value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{type(rule).__name__}: {name} must be {expected}, got {value!r}")


def _check_flag(rule: object, name: str) -> None:
    value = getattr(rule, name)
    if not isinstance(value, bool):
        raise ValueError(f"{type(rule).__name__}: {name} must be True or False, got {value!r}")


@dataclass(frozen=True)
class Backprop:
    """Exact gradients (back-propagation through time) on the same fused kernels.

    ``e_t = (g_t + e_{t+1} W) * a'(h_t)``

    Equals ``torch.nn.RNN`` to rounding, supports double backward, works with every nonlinearity. A feed-forward layer
    under this rule is torch's own operations.

    >>> Backprop()
    Backprop()
    """


@dataclass(frozen=True)
class RegularizedInverse:
    """Target propagation through the regularised inverse of the recurrent layer.

    With ``P = W (W^T W + reg I)^-1`` (once a call), the displacement of the state before is, by ``correction``,

    ====================  ============================================================================================
    ``"linearized"``      ``d_{t-1} = (d_t * D(h_t)) P - target_step g_{t-1}``; ``D(h)`` is ``1 / (1 - clip(h)^2)`` for
                          tanh, ``1[h > 0]`` for relu, 1 for identity
    ``"difference"``      ``d_{t-1} = (a^-1(h_t + d_t) - a^-1(h_t)) P - target_step g_{t-1}``
    ``"none"``            ``d_{t-1} = (a^-1(h_t + d_t) - x_t U^T - b) P - h_{t-1} - target_step g_{t-1}``
    ====================  ============================================================================================

    where ``a^-1`` is ``atanh(clip(.))``, ``max(., 0)`` or the identity. For tanh the corrections agree to first order
    in the displacement; for relu "difference" lets an inactive unit move up, "linearized" does not. The module's head
    explains ``credit`` and which corrections are linear in the gradient.

    Args:
        reg: regularisation of the inverse, >= 0. It penalises the size of the inverse's result; as it grows the
            targets reach fewer steps back, and with ``credit="through_time"`` the weight gradients tend to
            back-propagation's. 0 asks for the plain inverse, and singular weights raise ``tpext.SingularError``.
        target_step: size of the first displacement, ``d_T = -target_step * g_T``, > 0. With the linearised correction
            and ``normalize=True`` it cancels.
        correction: "linearized", "difference" or "none".
        credit: "through_time" or "local".
        clip: distance kept from the edges of the activation's range before inverting it (tanh: ``|h| <= 1 - clip``),
            0 < clip < 1. The slope ``a'`` of the weight gradients is not clipped.
        normalize: True divides the parameter gradients by ``target_step``, which gives them back-propagation's scale,
            so that a learning rate carries over; False gives the published scaling.
        input_rule: what the layer below receives, always in gradient units: "gradient" gives ``e_t U / target_step``,
            "target" the displacement that the regularised inverse of ``U`` asks of the input,
            ``-(z_t P_U) / target_step`` with ``P_U = U (U^T U + reg I)^-1`` and ``z_t`` the factor before ``P`` above
            ("none" uses the ``z_t`` of "difference").

    Raises:
        ValueError: an argument out of its range, named.

    Cost: a forward and backward pass as ``Backprop``'s, one more ``[B, H] x [H, H]`` product a step
    ("local" with ``input_rule="gradient"``: none more) and one ``H x H`` factorisation a call.

    Source: Roulet and Harchaoui, "Target Propagation via Regularized Inversion for Recurrent Neural Networks", 2023.

    >>> RegularizedInverse(reg=10.0, target_step=0.01).credit
    'through_time'
    """

    reg: float = 1.0
    target_step: float = 1.0
    correction: Correction = "linearized"
    credit: Credit = "through_time"
    clip: float = 1e-3
    normalize: bool = True
    input_rule: InputRule = "gradient"

    def __post_init__(self) -> None:
        _set_number(self, "reg", low=0.0, low_allowed=True)
        _set_number(self, "target_step", low=0.0)
        _check_choice(self, "correction", get_args(Correction))
        _check_choice(self, "credit", get_args(Credit))
        _set_number(self, "clip", low=0.0, high=1.0)
        _check_flag(self, "normalize")
        _check_choice(self, "input_rule", get_args(InputRule))


@dataclass(frozen=True)
class LearnedInverse:
    """Target propagation through a learned reverse layer (an auto-encoder of each step).

    With ``G(x_t, h) = tanh(h V^T + c + x_t U^T)``, which shares ``U`` with the layer,

    ``d_{t-1} = G(x_t, h_t + d_t) - G(x_t, h_t) - target_step g_{t-1}``

    The reverse weights ``V`` and biases ``c`` are parameters of the module, present only under this rule. The loss's
    backward pass leaves them without a gradient; they learn from :meth:`tpext.nn.RNN.reconstruction_loss`, stepped
    before the target pass. Needs the tanh nonlinearity. Not linear in the gradient (see the module's head).

    Under ``DistributedDataParallel`` compute the reconstruction loss in the wrapped module's ``forward``, by a flag,
    and pass ``find_unused_parameters=True``, with no other forward pass between a loss's forward and its backward: then
    both losses' gradients are averaged.

    Args:
        target_step: size of the first displacement, ``d_T = -target_step * g_T``, > 0.
        credit: "through_time" or "local" (see the module's head).
        normalize: True divides the parameter gradients by ``target_step``.
        noise: standard deviation, >= 0, of the noise that the reconstruction loss adds to the states by default.

    Raises:
        ValueError: an argument out of its range, named.

    Source: Lee et al., "Difference Target Propagation", 2015; Manchev and Spratling, "Target Propagation in Recurrent
    Neural Networks", JMLR 21(7), 2020.

    >>> LearnedInverse(noise=0.1)
    LearnedInverse(target_step=1.0, credit='through_time', normalize=True, noise=0.1)
    """

    target_step: float = 1.0
    credit: Credit = "through_time"
    normalize: bool = True
    noise: float = 0.0

    def __post_init__(self) -> None:
        _set_number(self, "target_step", low=0.0)
        _check_choice(self, "credit", get_args(Credit))
        _check_flag(self, "normalize")
        _set_number(self, "noise", low=0.0, low_allowed=True)


Rule: TypeAlias = Backprop | RegularizedInverse | LearnedInverse


@dataclass(frozen=True)
class ConstrainedLeastSquares:
    """Target propagation through the exact inverses of a feed-forward layer's maps, the last one first.

    With ``t2(v) = a^-1(v)``, the constrained least squares inverse of the activation at the pre-activation
    (:meth:`tpext.ops.Activation.inverse`), and the pseudo-inverse ``W^+``::

        z = t2(h + d) - t2(h),    d_x = z (W^+)^T

    The published code has the pre-activation itself for ``t2(h)``. They differ for units of tanh and sigmoid within
    ``clip`` of the edges of their range, which there move without a displacement; here no displacement hands down
    exactly zero. ``Activation(name, reference_compat=True)`` gives the published numbers.

    Args:
        target_step: size of the displacement, ``d = -target_step * g``, > 0.
        clip: distance kept from the edges of the range of tanh and sigmoid before inverting them, 0 < clip < 0.5.
        normalize: True divides the parameter gradients by ``target_step``.
        local_loss: "post", or "pre" as published (see the module's head).

    Raises:
        ValueError: an argument out of its range, named.

    Weights must have full rank, or the backward pass raises ``tpext.SingularError`` (on CUDA: gives NaN).

    Source: J. Seely, "tensorflow-target-prop", ``tprop_train.py``, error algorithm 1.

    >>> ConstrainedLeastSquares(target_step=0.5)
    ConstrainedLeastSquares(target_step=0.5, clip=0.01, normalize=True, local_loss='post')
    """

    target_step: float = 1.0
    clip: float = 1e-2
    normalize: bool = True
    local_loss: LocalLoss = "post"

    def __post_init__(self) -> None:
        _set_number(self, "target_step", low=0.0)
        _set_number(self, "clip", low=0.0, high=0.5)
        _check_flag(self, "normalize")
        _check_choice(self, "local_loss", get_args(LocalLoss))


@dataclass(frozen=True)
class RegularizedLeastSquares:
    """Target propagation through the regularised inverses of a feed-forward layer's maps, the last one first.

    With ``t2(v) = argmin_u ||a(u) - v||^2 + gamma ||u - c||^2`` at the pre-activation
    (:meth:`tpext.ops.Activation.regularized_inverse`)::

        z = t2(h + d) - t2(h),    d_x = z W (W^T W + gamma I)^-1 / (1 + gamma)       (without a bias not / (1 + gamma))

    ``c`` is the pre-activation ("proximal") or zero ("ridge"); the linear maps' inverses differ by that in an offset
    only, which the difference removes. For "proximal" ``t2(h)`` is ``c``, and ``z`` is solved for itself, not taken as
    a difference, so that its digits do not depend on its size. The published code has ``c`` for ``t2(h)`` too, but does
    not solve the problem for tanh, sigmoid and the identity (:mod:`tpext.ops.layer_inverse`); ``Activation(name,
    reference_compat=True)`` gives the published numbers.

    Args:
        gamma: weight of the second term, >= 0. As it grows ``d_x`` shrinks and turns into back-propagation's direction,
            to ``(d * a') W / (gamma^2 (1 + gamma))`` ("proximal"; without a bias ``/ gamma^2``); with
            ``local_loss="post"`` the layer's own gradients stay as they are. Published are 1e-2 (the operation) and
            1e-3 (the training), which do not settle at the published rates. 0 is
            ``ConstrainedLeastSquares(clip=clip)``, in form "ridge" about zero.
        form: "proximal" or "ridge".
        target_step: size of the displacement, ``d = -target_step * g``, > 0.
        clip: for ``gamma = 0`` alone: as in ``ConstrainedLeastSquares``.
        normalize: True divides the parameter gradients by ``target_step``.
        local_loss: "post", or "pre" as published (see the module's head).

    Raises:
        ValueError: an argument out of its range, named.

    Source: J. Seely, "tensorflow-target-prop", ``tprop_train.py``, error algorithm 2.

    >>> RegularizedLeastSquares(gamma=0.1).form
    'proximal'
    """

    gamma: float = 1.0
    form: Form = "proximal"
    target_step: float = 1.0
    clip: float = 1e-2
    normalize: bool = True
    local_loss: LocalLoss = "post"

    def __post_init__(self) -> None:
        _set_number(self, "gamma", low=0.0, low_allowed=True)
        _check_choice(self, "form", get_args(Form))
        _set_number(self, "target_step", low=0.0)
        _set_number(self, "clip", low=0.0, high=0.5)
        _check_flag(self, "normalize")
        _check_choice(self, "local_loss", get_args(LocalLoss))


@dataclass(frozen=True)
class DifferenceTargetPropagation:
    """Target propagation through learned inverses of feed-forward layers.

    With the reverse layer ``G(v) = a_r(v V^T + c)`` of a layer::

        "difference"    d_x = G(h + d) - G(h)
        "none"          d_x = G(h + d) - x        plain target propagation

    The reverse weights ``V [N, M]`` and biases ``c [N]`` are parameters of the module, present only under this rule.
    The loss's backward pass leaves them without a gradient; they learn from ``reconstruction_loss``, so when to step
    them (every batch, or an epoch before) is the caller's choice.

    Under ``DistributedDataParallel`` compute the reconstruction loss in the wrapped module's ``forward``, by a flag,
    and pass ``find_unused_parameters=True``, with no other forward pass between a loss's forward and its backward: then
    both losses' gradients are averaged.

    Args:
        target_step: size of the displacement, ``d = -target_step * g``, > 0.
        noise: standard deviation, >= 0, of the noise that the reconstruction loss adds to the input by default.
        correction: "difference" or "none".
        normalize: True divides the parameter gradients by ``target_step``.
        local_loss: "post" (see the module's head), the only one that needs no inverse of the activation.

    Raises:
        ValueError: an argument out of its range, named.

    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation", 2015, and its code, ``conti_dtp.py``; J.
    Seely, "tensorflow-target-prop", error algorithm 3.

    >>> DifferenceTargetPropagation(noise=0.36).correction
    'difference'
    """

    target_step: float = 1.0
    noise: float = 0.0
    correction: ReverseCorrection = "difference"
    normalize: bool = True
    local_loss: Literal["post"] = "post"

    def __post_init__(self) -> None:
        _set_number(self, "target_step", low=0.0)
        _set_number(self, "noise", low=0.0, low_allowed=True)
        _check_choice(self, "correction", get_args(ReverseCorrection))
        _check_flag(self, "normalize")
        _check_choice(self, "local_loss", ("post",))


@dataclass(frozen=True)
class Kaczmarz:
    """Direct weight solves: a feed-forward layer is set to its target by projections, averaged over the batch.

    The gradient that arrives is ``h - h'``, ``h'`` the target of the output, from which the activation gives ``d``, the
    displacement of the pre-activation (:class:`tpext.ops.Units`). The input is moved, then each sample takes the least
    change of the weights that gives the moved input ``x''`` the target::

        x'  = x + dx(d)        "mean"         dx = d W / M
                               "wnorm"        dx = (1/M) sum_k d_k w_k / ||w_k||^2, w_k the rows of W
                               "regularized"  dx = d (WW' + dx_reg I)^-1 W
        x'' = feasible(x')     what the layer below can put out that is like x'; x where the input needs no gradient
        r   = d - (x'' - x) W'
        dW  = relaxation (1/B) sum_i r_i' x''_i / (||x''_i||^2 + 1 + damping)           "average"
        [dW db] = relaxation R' (X X' + batch_reg I)^-1 X,   X = [x'' 1]                "exact"

    The parameters' gradients are ``-dW`` and ``-db``, and ``x - x''`` is handed down. Activations are those of
    :class:`tpext.ops.Units`: relu and the identity, and three that other rules do not have.

    Args:
        relaxation: factor of every update, > 0 and < 2, the range in which repeated projections converge; 1 projects.
        damping: added to the squared norms of "average", >= 0.
        dx: how the input moves: "mean" (published; diverges where the weights are large: beyond ``s_max(W)^2 > 2 M`` it
            moves the output away from the target; small weights hardly move it, so that with more than one hidden layer
            the lower ones learn late), "wnorm" or "regularized".
        dx_reg: regularisation of "regularized", >= 0.
        update: "average" or "exact".
        batch_reg: regularisation of "exact", >= 0; 0 needs linearly independent rows ``[x'' 1]``.
        first: "input"; or "weights", the published second version: first the weights by the input as it is, then the
            input is moved by the updated weights for what is left of ``d``.
        std: standard deviation, >= 0, of the weights and biases that a layer made with this rule draws, normal with
            mean 0.

    Raises:
        ValueError: an argument out of its range, named.

    Source: ASFaust, "SLMfun", ``experiments/targetprop`` and ``experiments/targetprop2``.

    >>> Kaczmarz(dx="regularized").dx_reg
    1.0
    """

    relaxation: float = 1.0
    damping: float = 0.0
    dx: Move = "mean"
    dx_reg: float = 1.0
    update: Update = "average"
    batch_reg: float = 0.0
    first: First = "input"
    std: float = 1e-3

    def __post_init__(self) -> None:
        _set_number(self, "relaxation", low=0.0, high=2.0)
        _check_choice(self, "dx", get_args(Move))
        _check_choice(self, "update", get_args(Update))
        _check_choice(self, "first", get_args(First))
        for name in ("damping", "dx_reg", "batch_reg", "std"):
            _set_number(self, name, low=0.0, low_allowed=True)


LayerRule: TypeAlias = (
    Backprop | ConstrainedLeastSquares | RegularizedLeastSquares | DifferenceTargetPropagation | Kaczmarz
)
