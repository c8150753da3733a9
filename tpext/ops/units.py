"""``Units``, ``n_hot``, ``hot_target``: the activations of layers that are solved for, and targets of their outputs.

Ordinary torch operations; :mod:`tpext.ops.kaczmarz` solves.

Source: ASFaust, "SLMfun", ``experiments/targetprop/layers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tpext.ops._library import check_choice, check_tensor, is_integer

UnitsName = Literal["identity", "relu", "doubled_relu", "n_hot", "binary"]
ReluVersion = Literal["head", "v0"]
Output = Literal["clamp", "swap", "direct"]


def n_hot(input: Tensor, count: int = 1) -> Tensor:
    """The indicator of the ``count`` greatest of each row ``[..., M]``, of equals the first; ``count = 1`` is one-hot.

    >>> n_hot(torch.tensor([[3.0, 1.0, 2.0]]), 2)
    tensor([[1., 0., 1.]])
    """
    check_tensor("n_hot", "input", input, "[..., M]")
    if not is_integer(count) or not 1 <= count <= input.shape[-1]:
        raise ValueError(f"n_hot: count must be an integer in 1..M={input.shape[-1]}, got {count!r}")
    chosen = input.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(input).scatter_(-1, chosen, 1.0)


def hot_target(target: Tensor, input: Tensor, output: Output = "clamp") -> Tensor:
    """The target of ``z [..., M]`` that asks for the outputs ``target``, ones and zeros of the same shape.

    Args:
        target: where the output is to be on (1) and off (0).
        input: ``z``, what the output is made of: the greatest are on (one-hot, n-hot), or the positive (binary units,
            with ``z`` centred).
        output: "clamp" raises ``z`` to at least 1 where it is to be on, lowers it to at most 0 elsewhere; "swap", for
            one class, exchanges the greatest ``z`` with that of the class; "direct" is ``target`` itself.

    Returns:
        ``[..., M]``.

    >>> hot_target(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 0.25, -2.0]))
    tensor([ 0.,  1., -2.])
    """
    check_tensor("hot_target", "target", target, "[..., M]")
    check_tensor("hot_target", "input", input, "[..., M]")
    check_choice("hot_target", "output", output, get_args(Output))
    if target.shape != input.shape:
        raise ValueError(f"hot_target: target must be {list(input.shape)}, got {list(target.shape)}")
    if output == "direct":
        return target.to(input.dtype)
    if output == "clamp":
        return torch.where(target == 1, input.clamp(min=1), input.clamp(max=0))
    greatest, wanted = input.argmax(-1, keepdim=True), target.argmax(-1, keepdim=True)
    # In this order, so that a row whose greatest is the class stays as it is.
    swapped = input.scatter(-1, wanted, input.gather(-1, greatest))
    return swapped.scatter(-1, greatest, input.gather(-1, wanted))


@dataclass(frozen=True)
class Units:
    """The units between two linear layers: what they put out, which outputs they can have, how they pass a target on.

    ================  =========================  ===================  =============================================
    name              output                     feasible(y')         target of z, given that of the output y'
    ================  =========================  ===================  =============================================
    "identity"        ``z``                      ``y'``               ``y'``
    "relu"            ``max(z, 0)``              ``max(y', 0)``       ``y'`` where it is > 0, else ``min(z, 0)``
    "doubled_relu"    ``z + max(z, 0)``          ``y'``               ``y' / 2`` where it is > 0, else ``y'``
    "n_hot"           the ``count`` greatest     the same of ``y'``   :func:`hot_target`, "clamp"
    "binary"          ``z - mean(z) > 0``        the same of ``y'``   the same for ``z - mean(z)``, plus ``mean(z)``
    ================  =========================  ===================  =============================================

    Args:
        name: one of the above.
        count: of "n_hot".
        version: of "relu": "head", or "v0": ``y'``, but ``z`` where ``z <= 0`` and ``y' = 0``. They differ for negative
            ``y'`` only.

    Raises:
        ValueError: an argument out of its range, named.

    Between two layers the published "n_hot" and "binary" forget ``z`` once they are asked for a feasible output, and
    clamp the ``y'`` asked for instead; that is not copied.
    """

    name: UnitsName = "relu"
    count: int = 1
    version: ReluVersion = "head"

    def __post_init__(self) -> None:
        check_choice("Units", "name", self.name, get_args(UnitsName))
        check_choice("Units", "version", self.version, get_args(ReluVersion))
        if not is_integer(self.count) or self.count < 1:
            raise ValueError(f"Units: count must be an integer >= 1, got {self.count!r}")

    def __call__(self, input: Tensor) -> Tensor:
        """The output for ``z [..., M]``."""
        check_tensor("Units", "input", input, "[..., M]")
        if self.name == "relu":
            return torch.relu(input)
        if self.name == "doubled_relu":
            return input + torch.relu(input)
        if self.name == "n_hot":
            return n_hot(input, self.count)
        if self.name == "binary":
            return (input > input.mean(-1, keepdim=True)).to(input.dtype)
        return input

    def feasible(self, target: Tensor) -> Tensor:
        """An output that the units can have, for the one asked for, ``[..., M]``."""
        check_tensor("Units.feasible", "target", target, "[..., M]")
        return target if self.name == "doubled_relu" else self(target)

    def input_target(self, target: Tensor, input: Tensor) -> Tensor:
        """The target of ``z``.

        Args:
            target: ``y'``, ``[..., M]``.
            input: ``z``, of the same shape.
        """
        check_tensor("Units.input_target", "target", target, "[..., M]")
        check_tensor("Units.input_target", "input", input, "[..., M]")
        if self.name == "relu":
            if self.version == "v0":
                return torch.where((input <= 0) & (target == 0), input, target)
            return torch.where(target <= 0, input.clamp(max=0), target)
        if self.name == "doubled_relu":
            return torch.where(target > 0, target / 2, target)
        if self.name == "n_hot":
            return hot_target(target, input)
        if self.name == "binary":
            mean = input.mean(-1, keepdim=True)
            return hot_target(target, input - mean) + mean
        return target
