"""The rule of feed-forward layers that learns their inverse: a reverse layer, trained as an auto-encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from tpext.ops._library import check_choice
from tpext.rules.base import Kind, number
from tpext.rules.layer import LayerCall, LayerRule

ReverseCorrection = Literal["difference", "none"]


@dataclass(frozen=True)
class DifferenceTargetPropagation(LayerRule):
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
        correction: how displacements pass through the inverse, "difference" or "none".
        normalize: True divides the parameter gradients by ``target_step``.
        local_loss: local losses after the activation, the only ones that need no inverse of it. See the module's head.

    Raises:
        ValueError: an argument out of its range, named.

    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation", 2015, and its code, ``conti_dtp.py``; J.
    Seely, "tensorflow-target-prop", error algorithm 3.

    >>> DifferenceTargetPropagation(noise=0.36).correction
    'difference'
    """

    sources: ClassVar[tuple[str, ...]] = ("lee2015", "seely2017")

    kin: ClassVar[Mapping[Kind, str]] = {"recurrent": "LearnedInverse", "network": "DifferenceTargets"}

    learns: ClassVar[bool] = True
    ordinary_head: ClassVar[bool] = True

    target_step: float = number(1.0, low=0.0)
    noise: float = number(0.0, low=0.0, low_allowed=True)
    correction: ReverseCorrection = "difference"
    normalize: bool = True
    local_loss: Literal["post"] = "post"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, "correction", self.correction, get_args(ReverseCorrection))
        check_choice(type(self).__name__, "local_loss", self.local_loss, ("post",))

    def parameter_shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        return {"reverse_weight": (in_features, out_features), "reverse_bias": (in_features,)}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        if name == "reverse_weight":
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        weight, bias = call.owned
        current = functional.linear(call.output, weight, bias)
        target = call.reverse_activation(current + displacement @ weight.mT)
        return target - (call.reverse_activation(current) if self.correction == "difference" else call.input)

    def layer_loss(self, call: LayerCall, noise: float | None) -> Tensor:
        std = self.noise if noise is None else replace(self, noise=noise).noise
        with torch.no_grad():
            # detached too where there is no noise: what made the input has a loss of its own
            target = call.input.detach()
            if std > 0:
                target = target + std * torch.randn_like(target)
            reached = call.activation(functional.linear(target, call.weight, call.bias))
        rebuilt = call.reverse_activation(functional.linear(reached, *call.owned))
        return (rebuilt - target).square().sum() / max(1, math.prod(call.input.shape[:-1]))
