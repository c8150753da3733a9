"""The rules of recurrent layers. :mod:`tpext.rules` has the scheme that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from tpext.ops._library import check_choice
from tpext.rules.base import Backprop, check_flag, set_number

Correction = Literal["linearized", "difference", "none"]
Credit = Literal["through_time", "local"]
InputRule = Literal["gradient", "target"]


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
        set_number(self, "reg", low=0.0, low_allowed=True)
        set_number(self, "target_step", low=0.0)
        check_choice(type(self).__name__, "correction", self.correction, get_args(Correction))
        check_choice(type(self).__name__, "credit", self.credit, get_args(Credit))
        set_number(self, "clip", low=0.0, high=1.0)
        check_flag(self, "normalize")
        check_choice(type(self).__name__, "input_rule", self.input_rule, get_args(InputRule))


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
        set_number(self, "target_step", low=0.0)
        check_choice(type(self).__name__, "credit", self.credit, get_args(Credit))
        check_flag(self, "normalize")
        set_number(self, "noise", low=0.0, low_allowed=True)


Rule: TypeAlias = Backprop | RegularizedInverse | LearnedInverse
