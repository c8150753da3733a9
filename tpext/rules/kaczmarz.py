"""The rule of feed-forward layers that solves for the weights: Kaczmarz projections, without a step or a rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from tpext.ops._library import check_choice
from tpext.ops.activation import Activation
from tpext.ops.kaczmarz import KaczmarzStep, check_options, kaczmarz_step
from tpext.ops.kaczmarz_train import kaczmarz_train
from tpext.ops.units import Output, Units, UnitsName
from tpext.rules.base import number
from tpext.rules.layer import LayerCall, LayerRule

Move = Literal["mean", "wnorm", "regularized"]
Update = Literal["average", "exact"]
First = Literal["input", "weights"]


@dataclass(frozen=True)
class Kaczmarz(LayerRule):
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

    With ``sticky > 0`` the change is least in ``sum_j s_kj dW_kj^2 + db_k^2``: weights that start at nearly zero have
    moved by ``|w|``, and the more one has moved, the less it moves now. A single sample still gets its target exactly::

        s_kj = 1 + sticky |w_kj| / mean_j |w_kj|
        dW_k = relaxation (1/B) sum_i r_ik (x''_i / s_k) / (sum_j x''_ij^2 / s_kj + 1 + damping)

    The parameters' gradients are ``-dW`` and ``-db``, and ``x - x''`` is handed down. Activations are those of
    :class:`tpext.ops.Units`: relu and the identity, and three that other rules do not have.

    Args:
        relaxation: factor of every update, > 0 and < 2, the range in which repeated projections converge; 1 projects.
        damping: added to the inputs' squared norms that divide the updates of "average", >= 0.
        dx: how the input moves towards its target, "mean" (published), "wnorm" or "regularized". "mean" diverges where
            the weights are large: beyond ``s_max(W)^2 > 2 M`` it moves the output away from the target; small weights
            hardly move it, so that with more than one hidden layer the lower ones learn late.
        dx_reg: regularisation of ``dx="regularized"``, >= 0.
        update: each sample's least update, averaged over the batch ("average"), or that of the batch as a whole
            ("exact").
        batch_reg: regularisation of ``update="exact"``, >= 0; 0 needs linearly independent rows ``[x'' 1]``.
        first: what moves first, the input or the weights. "weights" is the published second version: first the weights
            by the input as it is, then the input is moved by the updated weights for what is left of ``d``.
        std: standard deviation, >= 0, of the weights and biases that a layer made with this rule draws, normal with
            mean 0.
        sticky: how much more a weight of its row's mean size resists change than a zero one, >= 0. Only 0 with
            ``update="exact"``.
        keep_norm: True brings ``x''`` to the norm of ``x``, ``x'' = ||x|| f / ||f||`` with ``f = feasible(x')``. Not
            above "n_hot" and "binary" units.

    Raises:
        ValueError: an argument out of its range, named.

    Source: ASFaust, "SLMfun", ``experiments/targetprop`` and ``experiments/targetprop2``. Of ``sticky`` and
    ``keep_norm`` it has the idea, without equation or code.

    >>> Kaczmarz(dx="regularized").dx_reg
    1.0
    """

    sources: ClassVar[tuple[str, ...]] = ("slmfun2024",)

    reads_identity: ClassVar[bool] = False
    takes_units: ClassVar[bool] = True
    solves_weights: ClassVar[bool] = True

    relaxation: float = number(1.0, low=0.0, high=2.0)
    damping: float = number(0.0, low=0.0, low_allowed=True)
    dx: Move = "mean"
    dx_reg: float = number(1.0, low=0.0, low_allowed=True)
    update: Update = "average"
    batch_reg: float = number(0.0, low=0.0, low_allowed=True)
    first: First = "input"
    std: float = number(1e-3, low=0.0, low_allowed=True)
    sticky: float = number(0.0, low=0.0, low_allowed=True)
    keep_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, "dx", self.dx, get_args(Move))
        check_choice(type(self).__name__, "update", self.update, get_args(Update))
        check_choice(type(self).__name__, "first", self.first, get_args(First))
        check_options(type(self).__name__, self.update, self.sticky, self.keep_norm, None)

    @property
    def init_std(self) -> float:
        return self.std

    def check(self, layer: nn.Module) -> None:
        for name in ("activation", "reverse_activation"):
            value = getattr(layer, name)
            if as_units(value) is None:
                allowed = ", ".join(map(repr, get_args(UnitsName)))
                raise ValueError(f"TargetLinear: {name} must be one of {allowed} under Kaczmarz, got {value}")
        below: Any = layer.reverse_activation
        check_options("TargetLinear", self.update, self.sticky, self.keep_norm, as_units(below))

    def run_layer(self, call: LayerCall) -> Tensor:
        units, below = as_units(call.activation), as_units(call.reverse_activation)
        assert units is not None
        assert below is not None
        return super().run_layer(call._replace(activation=units, reverse_activation=below))

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        return self._step(call, displacement).input - call.input

    def gradients(self, call: LayerCall, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        step = self._step(call, -grad)
        needs_input, needs_weight, needs_bias = call.needs
        return (
            call.input - step.input if needs_input else None,
            -step.weight if needs_weight else None,
            -step.bias if needs_bias and step.bias is not None else None,
        )

    def learn_stream(self, layers: Sequence[Any], input: Tensor, labels: Tensor, output: Output) -> Tensor:
        for name, only in (("update", "average"), ("first", "input"), ("sticky", 0.0), ("keep_norm", False)):
            if getattr(self, name) != only:
                raise ValueError(f"MLP.stream: rule must have {name}={only!r}, got {getattr(self, name)!r}")
        for layer in layers:
            which, units = (
                ("output_activation", Units("identity")) if layer is layers[-1] else ("activation", Units("relu"))
            )
            if as_units(layer.activation) != units:
                raise ValueError(f"MLP.stream: {which} must be {units.name!r}, got {layer.activation}")
        return kaczmarz_train(
            input,
            labels,
            [layer.weight for layer in layers],
            [layer.bias for layer in layers if layer.bias is not None],
            relaxation=self.relaxation,
            damping=self.damping,
            dx=self.dx,
            dx_reg=self.dx_reg,
            output=output,
        )

    def _step(self, call: LayerCall, displacement: Tensor) -> KaczmarzStep:
        units = as_units(call.activation)
        assert units is not None
        moved = displacement
        # of the identity not by a difference of outputs, next to which a displacement may be small
        if units.name != "identity":
            moved = units.input_target(call.output + displacement, call.preactivation) - call.preactivation
        below = as_units(call.reverse_activation) if call.needs[0] else None
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("relaxation", "damping", "dx_reg", "batch_reg", "dx", "update", "first", "sticky", "keep_norm")
        }
        return kaczmarz_step(moved, call.input, call.weight, call.bias is not None, below, **options)


def as_units(activation: Activation | Units) -> Units | None:
    """The units that are this activation, None if there are none."""
    if isinstance(activation, Units):
        return activation
    if activation.name in ("relu", "identity") and not activation.reference_compat:
        return Units(activation.name)
    return None
