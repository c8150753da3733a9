"""Feed-forward layers that solve for their weights directly: averaged Kaczmarz, or normalised least mean squares.

``loss.backward()`` sends targets down, ``torch.optim.SGD(lr=1)`` makes the updates; :meth:`KaczmarzMLP.stream` does a
whole pass of single samples in one call. The equations stand in :mod:`tpext.ops.kaczmarz`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tpext.ops.kaczmarz import (
    Kaczmarz,
    Output,
    Units,
    UnitsName,
    hot_target,
    kaczmarz_linear,
    kaczmarz_train,
    kaczmarz_units,
    running_accuracy,
)

__all__ = ["HotTargetLoss", "Kaczmarz", "KaczmarzLinear", "KaczmarzMLP", "KaczmarzUnits", "StreamResult"]


class KaczmarzLinear(torch.nn.Module):
    """``y = x W' + b`` whose gradients are minus the update that gives the (moved) input the target of the output.

    The gradient that arrives is taken for ``y - y'``, the one that leaves is ``x - x''``. An input that does not
    require grad is data and is not moved. Parameters are ``torch.nn.Linear``'s: ``weight [M, N]``, ``bias [M]``.

    Args:
        in_features: N.
        out_features: M.
        bias: whether there is one; it is a weight of a constant input 1.
        rule: a :class:`Kaczmarz`; None is the published one.
        inputs: the :class:`Units` below, or their name, which say what input is feasible.
        std: standard deviation of the initial weights and biases, which are normal with mean 0.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument out of its range, named. RuntimeError: on backward with ``create_graph=True``.

    Source: ASFaust, "SLMfun", ``experiments/targetprop/layers/linear.py``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rule: Kaczmarz | None = None,
        inputs: UnitsName | Units = "identity",
        std: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"KaczmarzLinear: {name} must be >= 1, got {size}")
        if rule is not None and not isinstance(rule, Kaczmarz):
            raise ValueError(f"KaczmarzLinear: rule must be a Kaczmarz or None, got {type(rule).__name__}")
        if not std >= 0:
            raise ValueError(f"KaczmarzLinear: std must be >= 0, got {std!r}")
        self.in_features, self.out_features, self.std = in_features, out_features, std
        self.rule = rule or Kaczmarz()
        self.inputs = inputs if isinstance(inputs, Units) else Units(inputs)
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias: torch.nn.Parameter | None = torch.nn.Parameter(
                torch.empty(out_features, device=device, dtype=dtype)
            )
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases anew."""
        torch.nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            torch.nn.init.normal_(self.bias, std=self.std)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., N] -> [..., M]``."""
        return kaczmarz_linear(input, self.weight, self.bias, self.rule, self.inputs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"inputs={self.inputs.name!r}, rule={self.rule}"
        )


class KaczmarzUnits(torch.nn.Module):
    """Units between two :class:`KaczmarzLinear`: their output forward, the target of their input backward.

    Args:
        units: :class:`Units`, or their name.
    """

    def __init__(self, units: UnitsName | Units = "relu") -> None:
        super().__init__()
        self.units = units if isinstance(units, Units) else Units(units)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., M] -> [..., M]``."""
        return kaczmarz_units(input, self.units)

    def extra_repr(self) -> str:
        return str(self.units)


class HotTargetLoss(torch.nn.Module):
    """``1/2 sum ||z - t||^2``, ``t`` the target of :func:`tpext.ops.kaczmarz.hot_target`, held constant.

    Its gradient is ``z - t``, what a :class:`KaczmarzLinear` takes. A sum: that layer averages over the batch itself.

    Args:
        output: "clamp", "swap" or "direct".

    Source: ASFaust, "SLMfun", ``experiments/targetprop/layers/onehot.py``, at HEAD, first version, and README's.

    >>> z = torch.tensor([[0.5, 0.25]], requires_grad=True)
    >>> HotTargetLoss()(z, torch.tensor([1])).backward()
    >>> z.grad
    tensor([[ 0.5000, -0.7500]])
    """

    def __init__(self, output: Output = "clamp") -> None:
        super().__init__()
        self.output: Output = output
        hot_target(torch.ones(1), torch.ones(1), output)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            input: ``z``, ``[..., M]``.
            target: classes, ``[...]`` int64; or ones and zeros, ``[..., M]`` (n-hot and binary outputs).
        """
        if target.dim() < input.dim():
            if target.shape != input.shape[:-1] or target.dtype != torch.int64:
                raise ValueError(
                    f"HotTargetLoss: target must be {list(input.shape[:-1])} int64 classes, got {list(target.shape)} "
                    f"{str(target.dtype).removeprefix('torch.')}"
                )
            target = torch.zeros_like(input).scatter(-1, target[..., None], 1.0)
        return 0.5 * (input - hot_target(target, input.detach(), self.output)).square().sum()


class StreamResult(NamedTuple):
    """Of a pass: ``predictions [K]``, each before its sample's update; the running accuracy after the last."""

    predictions: Tensor
    running_accuracy: float


class KaczmarzMLP(torch.nn.Sequential):
    """``KaczmarzLinear`` layers with units between them.

    Args:
        sizes: of the input, each hidden layer and the output.
        units: the units between the layers, or their name.
        rule: a :class:`Kaczmarz` for all layers; None is the published one.
        bias, std, device, dtype: as in :class:`KaczmarzLinear`.

    Raises:
        ValueError: an argument out of its range, named.

    >>> model = KaczmarzMLP([4, 8, 3])
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1)
    >>> HotTargetLoss()(model(torch.rand(5, 4)), torch.tensor([0, 1, 2, 0, 1])).backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        sizes: Sequence[int],
        units: UnitsName | Units = "relu",
        *,
        rule: Kaczmarz | None = None,
        bias: bool = True,
        std: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(sizes) < 2:
            raise ValueError(f"KaczmarzMLP: sizes must have at least 2 values, got {list(sizes)}")
        units = units if isinstance(units, Units) else Units(units)
        layers: list[torch.nn.Module] = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            if i:
                layers.append(KaczmarzUnits(units))
            below = units if i else Units("identity")
            layers.append(
                KaczmarzLinear(inputs, outputs, bias, rule=rule, inputs=below, std=std, device=device, dtype=dtype)
            )
        super().__init__(*layers)
        self.rule = rule or Kaczmarz()
        self.units = units

    def stream(self, input: Tensor, labels: Tensor, output: Output = "clamp", start: float = 0.0) -> StreamResult:
        """Learn samples one after another in a single call, the parameters updated in place after each.

        The same as ``B = 1`` steps of :class:`HotTargetLoss` and ``SGD(lr=1)``, to rounding.

        Args:
            input: ``[K, N]``, in the order in which they are to be learnt.
            labels: ``[K]`` int64.
            output: as in :class:`HotTargetLoss`.
            start: running accuracy before the first sample.

        Returns:
            Predictions and the running accuracy, of decay 0.999 (:func:`tpext.ops.kaczmarz.running_accuracy`).

        Raises:
            ValueError: units other than relu; a rule, shape, dtype, device or label that
            :func:`tpext.ops.kaczmarz.kaczmarz_train` does not take, named.
        """
        if len(self) > 1 and self.units != Units("relu"):
            raise ValueError(f"KaczmarzMLP.stream: units must be Units('relu'), got {self.units}")
        layers = [layer for layer in self if isinstance(layer, KaczmarzLinear)]
        weights = [layer.weight for layer in layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        predictions = kaczmarz_train(input, labels, weights, biases, self.rule, output)
        return StreamResult(predictions, running_accuracy(predictions == labels, start=start))
