"""The parameters that a rule owns and a layer holds, those of a reverse layer, say: made, drawn and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpext.ops._library import LOW_PRECISION
from tpext.rules import LayerRule, RecurrentRule


class OwnedParameters(nn.Module):
    """A layer that holds parameters of its rule beside its own."""

    @property
    def owned_names(self) -> list[str]:
        """The names of the parameters that belong to the rule (those of a reverse layer, say)."""
        raise NotImplementedError

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        owned = {prefix + name for name in self.owned_names}
        # all of them: a checkpoint of torch's layer or of another rule; some of them: a damaged one
        if owned.issubset(missing):
            missing = [key for key in missing if key not in owned]
        missing_keys.extend(missing)


def register_owned(
    layer: nn.Module, rule: LayerRule | RecurrentRule, shapes: Mapping[str, Sequence[int]], like: Tensor
) -> None:
    """Give a layer the parameters of a rule, not yet drawn, in the dtype and on the device of ``like``."""
    for name, shape in shapes.items():
        if hasattr(layer, name):
            raise ValueError(
                f"{type(layer).__name__}: {rule} cannot own a parameter {name}, the layer has one of this name"
            )
        layer.register_parameter(name, nn.Parameter(like.new_empty(shape)))


def reset_owned(rule: LayerRule | RecurrentRule, name: str, parameter: Tensor) -> None:
    """Have a rule draw the parameter that it calls ``name``.

    In a 16-bit dtype, in which torch lacks a QR factorisation, say, it is drawn in float32 and then rounded.
    """
    if parameter.dtype not in LOW_PRECISION:
        rule.reset_parameter(name, parameter)
        return
    drawn = nn.Parameter(torch.empty_like(parameter, dtype=torch.float32), parameter.requires_grad)
    rule.reset_parameter(name, drawn)
    with torch.no_grad():
        parameter.copy_(drawn)
    parameter.requires_grad_(drawn.requires_grad)
