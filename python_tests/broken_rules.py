"""Rules that are each broken in one way, and the check of ``tpext.testing.check_rule`` that has to find it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from own_rules import FeedbackAlignment, PseudoInverseTargets, SignSymmetry, Wrong, WrongLayer
from torch import Tensor, nn
from torch.nn import functional

import tpext
from tpext.rules import LayerCall, RecurrentCall, RecurrentRule, Rule


class Unequal(SignSymmetry):
    """No value: equal to itself alone."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


class Unfrozen(SignSymmetry):
    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, f"_{name}", value)


class LeaksIntoOwned(PseudoInverseTargets):
    """The loss gives its own parameter a gradient, if only of zeros."""

    def parameter_shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        return {"shift": (out_features,)}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        nn.init.zeros_(parameter)

    def run_layer(self, call: LayerCall) -> Tensor:
        return super().run_layer(call) + 0 * call.owned[0].sum()


class ForgetsTheBias(PseudoInverseTargets):
    def gradients(self, call: LayerCall, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return *super().gradients(call, grad)[:2], None


class ScalesTheWeights(SignSymmetry):
    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return weight_hh.mul_(0.5)


class ClampsTheWeights(PseudoInverseTargets):
    """In the forward pass."""

    def run_layer(self, call: LayerCall) -> Tensor:
        with torch.no_grad():
            call.weight.clamp_(-0.1, 0.1)
        return super().run_layer(call)


class ScalesWhatItOwns(FeedbackAlignment):
    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return owned[0].mul_(0.5)


class ScalesThePreactivation(PseudoInverseTargets):
    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        call.preactivation.mul_(0.5)
        return super().propagate(call, displacement)


class ScalesTheOutput(PseudoInverseTargets):
    """Past autograd's watch over what it saved."""

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        call.output.data.mul_(0.5)
        return super().propagate(call, displacement)


class ScalesTheDisplacement(PseudoInverseTargets):
    """Which in a backward pass nobody else reads."""

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        return super().propagate(call, displacement.mul_(0.5))


@dataclass(frozen=True)
class Forgets(RecurrentRule):
    """Differs from call to call."""

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return torch.randn_like(weight_hh)


class IsADerivative(PseudoInverseTargets):
    """Torch's own operations, which do not refuse to be differentiated twice."""

    def run_layer(self, call: LayerCall) -> Tensor:
        casts = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            output: Tensor = call.activation(functional.linear(call.input, call.weight, call.bias))
        return output.bfloat16() if casts else output


class ClaimsToBeExact(PseudoInverseTargets):
    exact: ClassVar[bool] = True


class HalvesExactly(tpext.Backprop):
    """A derivative, but of another function."""

    kinds = frozenset({"layer"})

    def run_layer(self, call: LayerCall) -> Tensor:
        output = super().run_layer(call)
        return output / 2 + output.detach() / 2


class Counts(PseudoInverseTargets):
    """Depends on how many layers there have been, which no saved state tells."""

    served: ClassVar[list[int]] = [0]

    def check(self, layer: nn.Module) -> None:
        self.served[0] += 1

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        return super().propagate(call, displacement) * self.served[0]


class PutsOutFloat32(PseudoInverseTargets):
    def run_layer(self, call: LayerCall) -> Tensor:
        return super().run_layer(call).to(call.weight.dtype)


class RoundsUnderAutocast(PseudoInverseTargets):
    def run_layer(self, call: LayerCall) -> Tensor:
        rounded = call.input.bfloat16() if torch.is_autocast_enabled("cpu") else call.input
        return super().run_layer(call._replace(input=rounded))


class IgnoresLengths(SignSymmetry):
    def run_recurrent(self, call: RecurrentCall) -> tuple[Tensor, Tensor]:
        return super().run_recurrent(call._replace(lengths=None))


class KeepsOnePiece(SignSymmetry):
    """Goes back through the last piece alone."""

    def run_recurrent(self, call: RecurrentCall) -> tuple[Tensor, Tensor]:
        if call.checkpoint_every is not None:
            call = call._replace(input=call.input[:, -call.checkpoint_every :], checkpoint_every=None)
        return super().run_recurrent(call)


class TrainsTheWeights(tpext.DifferenceTargetPropagation):
    """Its own loss reaches the layer's weights."""

    def layer_loss(self, call: LayerCall, noise: float | None) -> Tensor:
        reached = call.activation(functional.linear(call.input.detach(), call.weight, call.bias))
        return functional.linear(reached, *call.owned).square().sum()


class TrainsTheRecurrentWeights(tpext.LearnedInverse):
    def recurrent_loss(self, call: RecurrentCall, noise: float | None) -> tuple[Tensor, Tensor]:
        loss, states = super().recurrent_loss(call, noise)
        return loss + call.weight_hh.square().sum(), states


class TrainsHalf(tpext.DifferenceTargetPropagation):
    """Its own loss leaves the reverse bias out."""

    def layer_loss(self, call: LayerCall, noise: float | None) -> Tensor:
        return call.owned[0].square().sum()


class HasNoLoss(FeedbackAlignment):
    learns: ClassVar[bool] = True


class HidesItsLoss(tpext.DifferenceTargetPropagation):
    learns: ClassVar[bool] = False


class HidesItsRecurrentLoss(tpext.LearnedInverse):
    learns: ClassVar[bool] = False


class BranchesOnData(SignSymmetry):
    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return weight_hh if weight_hh.isfinite().all() else -weight_hh


class MixesMembers(SignSymmetry):
    """The matrix of each direction depends on the weights of both."""

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return weight_hh.mean(0, keepdim=True).expand_as(weight_hh)


class DiffersCompiled(SignSymmetry):
    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return weight_hh * (2.0 if torch.compiler.is_compiling() else 1.0)


class DividesByTheSlope(PseudoInverseTargets):
    """Well for tanh, not where the slope is 0."""

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        slope = call.activation.derivative(torch.ones_like(displacement), call.preactivation)
        return (displacement / slope) @ call.weight


class Broken(NamedTuple):
    """A rule, the check that has to find it, what it has to say, and whether no other check would find it too."""

    rule: Rule
    check: str
    says: str
    alone: bool = True


BROKEN = [
    Broken(Unequal(), "value", "expected a copy that equals the rule, got Unequal("),
    Broken(Unfrozen(), "value", "expected a frozen dataclass, got an assignment of credit", alone=False),
    Broken(LeaksIntoOwned(), "gradients (layer, torch.float32)", "no gradient of 0.shift, which the rule owns"),
    Broken(ForgetsTheBias(), "gradients (layer, torch.float32)", "a gradient of 0.bias, got none", alone=False),
    Broken(Wrong("dtype"), "gradients (recurrent, torch.float32)", "no error, got ResultError: Wrong.fee", alone=False),
    Broken(WrongLayer("value"), "gradients (layer, torch.float32)", "finite gradient of the input, got ", alone=False),
    Broken(ScalesTheWeights(), "given tensors (recurrent)", "as they are, got a change of weight_hh_l0", alone=False),
    Broken(ClampsTheWeights(), "given tensors (layer)", "as they are, got a change of 0.weight", alone=False),
    Broken(ScalesWhatItOwns(), "given tensors (recurrent)", "got a change of feedback_weight_l0", alone=False),
    Broken(ScalesThePreactivation(), "given tensors (layer)", "modified by an inplace operation", alone=False),
    Broken(ScalesTheOutput(), "given tensors (layer)", "as they are, got a change of the output", alone=False),
    Broken(ScalesTheDisplacement(), "given tensors (layer)", "as they are, got a change of the displacement"),
    Broken(Forgets(), "given tensors (recurrent)", "from a second backward pass, got a difference of ", alone=False),
    Broken(IsADerivative(), "second derivative (layer)", "create_graph=True to be refused"),
    Broken(ClaimsToBeExact(), "second derivative (layer)", "expected no error, got RuntimeError: target propagation's"),
    Broken(HalvesExactly(), "second derivative (layer)", "twice, as the rule is exact, got a difference of "),
    Broken(Counts(), "saving (layer)", "after deepcopy of the network, got a difference of "),
    Broken(PutsOutFloat32(), "autocast (layer)", "expected an output in bfloat16, got torch.float32"),
    Broken(RoundsUnderAutocast(), "autocast (layer)", "gradient of the input as without autocast, got a "),
    Broken(IgnoresLengths(), "lengths (recurrent)", "with lengths as without padding, got a difference of "),
    Broken(KeepsOnePiece(), "checkpoint_every (recurrent)", "is alone, as without, got a difference of "),
    Broken(MixesMembers(), "checkpoint_every (recurrent)", "is alone, as without, got a difference of "),
    Broken(TrainsTheWeights(), "own loss (layer)", "expected no gradient of 0.weight, got one"),
    Broken(TrainsTheRecurrentWeights(), "own loss (recurrent)", "expected no gradient of weight_hh_l0, got one"),
    Broken(TrainsHalf(), "own loss (layer)", "expected a gradient of 0.reverse_bias, got none"),
    Broken(HasNoLoss(), "own loss (recurrent)", "expected no error, got RuntimeError: reconstruction_loss needs"),
    Broken(HidesItsLoss(), "own loss (layer)", "expected learns = True of a rule with layer_loss, got False"),
    Broken(HidesItsRecurrentLoss(), "own loss (recurrent)", "learns = True of a rule with recurrent_loss, got False"),
    Broken(BranchesOnData(), "compile (recurrent)", "expected no error, got "),
    Broken(DiffersCompiled(), "compile (recurrent)", "compiled, with DiffersCompiled("),
]
