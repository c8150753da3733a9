"""Rules as users write them, in a module of their own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tpext
from tpext.rules import LayerCall, LayerRule, RecurrentRule, Rule


def exported_rules() -> list[type[Rule]]:
    """Every rule of the package, so that a test over them cannot forget a new one."""
    members = [getattr(tpext.rules, name) for name in tpext.rules.__all__]
    rules = [one for one in members if inspect.isclass(one) and issubclass(one, Rule) and one.kinds]
    return [rule for rule in rules if not inspect.isabstract(rule)]


@dataclass(frozen=True)
class FeedbackAlignment(RecurrentRule):
    slope = "derivative"

    def parameter_shapes(self, input_size: int, hidden_size: int, gates: int = 1) -> dict[str, tuple[int, ...]]:
        return {"feedback_weight": (gates * hidden_size, hidden_size)}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        nn.init.orthogonal_(parameter)
        parameter.requires_grad_(False)

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return owned[0]


@dataclass(frozen=True)
class SignSymmetry(RecurrentRule):
    slope = "derivative"
    credit: str = "through_time"
    scale: float = 0.5

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return self.scale * weight_hh.sign()


@dataclass(frozen=True)
class TruncatedInverse(RecurrentRule):
    rtol: float = 0.1

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return torch.linalg.pinv(weight_hh, rtol=self.rtol).mT


@dataclass(frozen=True)
class PseudoInverseTargets(LayerRule):
    target_step: float = 0.5

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        return call.activation.derivative(displacement, call.preactivation) @ torch.linalg.pinv(call.weight).mT


@dataclass(frozen=True)
class TransposedEverywhere(RecurrentRule, LayerRule):
    """Back-propagation's directions, for recurrent and feed-forward layers."""

    slope = "derivative"

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return weight_hh

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        return call.activation.derivative(displacement, call.preactivation) @ call.weight


@dataclass(frozen=True)
class Wrong(RecurrentRule):
    """Makes of the weights what ``kind`` says."""

    kind: str = "shape"

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return {
            "shape": weight_hh[0],
            "dtype": weight_hh.half(),
            "device": weight_hh.to("meta"),
            "value": weight_hh / 0,
            "type": None,
        }[self.kind]  # type: ignore[return-value]


@dataclass(frozen=True)
class WrongLayer(LayerRule):
    kind: str = "shape"

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        right = displacement @ call.weight
        return {
            "shape": right[..., :-1],
            "dtype": right.half(),
            "device": right.to("meta"),
            "value": right / 0,
            "type": None,
        }[self.kind]  # type: ignore[return-value]
