"""The rules of feed-forward layers that take the layer's least squares inverse, exact or regularised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from tpext.ops._library import check_choice
from tpext.ops.act_inverse import act_displacement
from tpext.ops.activation import Activation, Form
from tpext.ops.regularized_inverse import regularized_solve
from tpext.rules.base import Kind, number
from tpext.rules.layer import LayerCall, LayerRule, parameter_gradients, through_activation

LocalLoss = Literal["pre", "post"]


class _LeastSquares(LayerRule):
    """What both share: the inverse of the activation, then that of the affine map."""

    form: Form = "proximal"
    margin: float
    local_loss: LocalLoss

    reads_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, "local_loss", self.local_loss, get_args(LocalLoss))

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        return self._move_input(call, self._move_preactivation(call, displacement), 1.0)

    def gradients(self, call: LayerCall, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        step, by_output = self.target_step, self.local_loss == "post"
        grad_input = None
        if call.needs[0] or not by_output:
            moved = self._move_preactivation(call, grad * -step)
            if call.needs[0]:
                grad_input = self._move_input(call, moved, -1 / step)
            if not by_output:
                error = moved.mul_(-1 / step if self.normalize else -1.0)
        if by_output:
            error = through_activation(grad if self.normalize else grad * step, call.output, call.activation)
        return grad_input, *parameter_gradients(call, error)

    def _move_preactivation(self, call: LayerCall, displacement: Tensor) -> Tensor:
        """``z``: by how much the pre-activation should move for the output to move by ``displacement``."""
        activation, preactivation, reg = call.activation, call.preactivation, self.reg
        assert isinstance(activation, Activation)
        # where there is a way, not by a difference of outputs, next to which a displacement may be small
        if activation.name == "identity":
            # the published inverse ignores reg
            return displacement if activation.reference_compat else displacement / (1 + reg)
        if reg > 0 and self.form == "proximal" and not activation.reference_compat:
            return act_displacement(displacement, preactivation, activation.name, activation.slope, reg)

        def inverse(target: Tensor) -> Tensor:
            if reg > 0:
                return activation.regularized_inverse(target, preactivation, reg, self.form)
            center = preactivation if self.form == "proximal" else torch.zeros_like(preactivation)
            return activation.inverse(target, center, self.margin)

        moved = inverse(call.output + displacement)
        return moved - preactivation if activation.reference_compat else moved.sub_(inverse(call.output))

    def _move_input(self, call: LayerCall, moved: Tensor, scale: float) -> Tensor:
        """``d_x`` times ``scale``: by how much the input should move for the pre-activation to move by ``moved``."""
        reg = self.reg
        scale = scale if call.bias is None else scale / (1 + reg)
        input = regularized_solve(call.weight, moved.reshape(-1, moved.shape[-1]), reg).mul_(scale)
        return input.view(*moved.shape[:-1], call.weight.shape[1])


@dataclass(frozen=True)
class ConstrainedLeastSquares(_LeastSquares):
    """Target propagation through the exact inverses of a feed-forward layer's maps, the last one first.

    With ``t2(v) = a^-1(v)``, the constrained least squares inverse of the activation at the pre-activation
    (:meth:`tpext.ops.Activation.inverse`), and the pseudo-inverse ``W^+``::

        z = t2(h + d) - t2(h),    d_x = z (W^+)^T

    The published code has the pre-activation itself for ``t2(h)``. They differ for units of tanh and sigmoid within
    ``margin`` of the edges of their range, which there move without a displacement; here no displacement hands down
    exactly zero. ``Activation(name, reference_compat=True)`` gives the published numbers.

    Args:
        target_step: size of the displacement, ``d = -target_step * g``, > 0.
        margin: distance kept from the edges of the range of tanh and sigmoid before inverting them, 0 < margin < 0.5.
        normalize: True divides the parameter gradients by ``target_step``.
        local_loss: local losses after the activation ("post"), or before it ("pre", as published). See the module's
            head.

    Raises:
        ValueError: an argument out of its range, named.

    Weights must have full rank, or the backward pass raises ``tpext.SingularError`` (on CUDA: gives NaN).

    Source: J. Seely, "tensorflow-target-prop", ``tprop_train.py``, error algorithm 1.

    >>> ConstrainedLeastSquares(target_step=0.5)
    ConstrainedLeastSquares(target_step=0.5)
    """

    sources: ClassVar[tuple[str, ...]] = ("seely2017",)

    target_step: float = number(1.0, low=0.0)
    margin: float = number(1e-2, low=0.0, high=0.5)
    normalize: bool = True
    local_loss: LocalLoss = "post"


@dataclass(frozen=True)
class RegularizedLeastSquares(_LeastSquares):
    """Target propagation through the regularised inverses of a feed-forward layer's maps, the last one first.

    With ``t2(v) = argmin_u ||a(u) - v||^2 + reg ||u - c||^2`` at the pre-activation
    (:meth:`tpext.ops.Activation.regularized_inverse`)::

        z = t2(h + d) - t2(h),    d_x = z W (W^T W + reg I)^-1 / (1 + reg)       (without a bias not / (1 + reg))

    ``c`` is the pre-activation ("proximal") or zero ("ridge"); the linear maps' inverses differ by that in an offset
    only, which the difference removes. For "proximal" ``t2(h)`` is ``c``, and ``z`` is solved for itself, not taken as
    a difference, so that its digits do not depend on its size. The published code has ``c`` for ``t2(h)`` too, but does
    not solve the problem for tanh, sigmoid and the identity (:mod:`tpext.ops.activation`); ``Activation(name,
    reference_compat=True)`` gives the published numbers.

    Args:
        reg: weight of the second term, >= 0. As it grows ``d_x`` shrinks and turns into back-propagation's direction,
            to ``(d * a') W / (reg^2 (1 + reg))`` ("proximal"; without a bias ``/ reg^2``); with
            ``local_loss="post"`` the layer's own gradients stay as they are. Published are 1e-2 (the operation) and
            1e-3 (the training), which do not settle at the published rates. 0 is
            ``ConstrainedLeastSquares(margin=margin)``, in form "ridge" about zero.
        form: which distance ``reg`` weighs, from the current input ("proximal") or from zero ("ridge").
        target_step: size of the displacement, ``d = -target_step * g``, > 0.
        margin: for ``reg = 0`` alone: as in ``ConstrainedLeastSquares``.
        normalize: True divides the parameter gradients by ``target_step``.
        local_loss: local losses after the activation ("post"), or before it ("pre", as published). See the module's
            head.

    Raises:
        ValueError: an argument out of its range, named.

    Source: J. Seely, "tensorflow-target-prop", ``tprop_train.py``, error algorithm 2.

    >>> RegularizedLeastSquares(reg=0.1).form
    'proximal'
    """

    sources: ClassVar[tuple[str, ...]] = ("seely2017",)

    kin: ClassVar[Mapping[Kind, str]] = {"recurrent": "RegularizedInverse"}

    reg: float = number(1.0, low=0.0, low_allowed=True)
    form: Form = "proximal"
    target_step: float = number(1.0, low=0.0)
    margin: float = number(1e-2, low=0.0, high=0.5)
    normalize: bool = True
    local_loss: LocalLoss = "post"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, "form", self.form, get_args(Form))

    def check(self, layer: nn.Module) -> None:
        activation = layer.activation
        if not isinstance(activation, Activation) or not activation.reference_compat:
            return
        if self.form == "ridge":
            raise ValueError(
                "TargetLinear: an activation with reference_compat needs form='proximal' of RegularizedLeastSquares, "
                "the published code has no other, got form='ridge'"
            )
        if activation.name == "leaky_relu" and self.reg > 0:
            raise ValueError(
                "TargetLinear: RegularizedLeastSquares needs reference_compat=False for leaky_relu, of which the "
                "published code has no regularised inverse"
            )
