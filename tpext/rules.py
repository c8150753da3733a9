"""The rules: which quantity a recurrent layer sends backwards in place of the chain rule.

A layer computes ``h_t = a(x_t U^T + b + h_{t-1} W^T)`` and receives the gradients ``g_t = dL/dh_t``. Every rule below
is a small immutable value; the layer that holds it turns ``loss.backward()`` into that rule's backward pass. Row
vectors throughout: ``h_t`` is ``[B, H]``, ``W = weight_hh`` is ``[H, H]``, ``U = weight_ih`` is ``[H, I]``.

All target rules share one scheme. A displacement ``d_t`` says by how much ``h_t`` should move::

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
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Correction = Literal["linearized", "difference", "none"]
Credit = Literal["through_time", "local"]
InputRule = Literal["gradient", "target"]


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

    Equals ``torch.nn.RNN`` to rounding, supports double backward, works with every nonlinearity.

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
