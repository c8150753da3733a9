"""What training by direct weight solves (:class:`tpext.Kaczmarz`) needs beside the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tpext.ops._library import dtype_name
from tpext.ops.kaczmarz import Output, hot_target


class HotTargetLoss(torch.nn.Module):
    """``1/2 sum ||z - t||^2``, ``t`` the target of :func:`tpext.ops.kaczmarz.hot_target`, held constant.

    Its gradient is ``z - t``, what layers under :class:`tpext.Kaczmarz` take. A sum: they average over the batch
    themselves.

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
                    f"{dtype_name(target.dtype)}"
                )
            target = torch.zeros_like(input).scatter(-1, target[..., None], 1.0)
        return 0.5 * (input - hot_target(target, input.detach(), self.output)).square().sum()


class StreamResult(NamedTuple):
    """Of a pass: ``predictions [K]``, each before its sample's update; the running accuracy after the last."""

    predictions: Tensor
    running_accuracy: float
