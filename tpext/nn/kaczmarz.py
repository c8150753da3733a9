"""What training by direct weight solves (:class:`tpext.Kaczmarz`) needs beside the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tpext.nn.torchscript import refuse_script
from tpext.ops._library import are_plain, check_tensor, dtype_name, on_cuda
from tpext.ops.units import Output, hot_target


class HotTargetLoss(torch.nn.Module):
    """``1/2 sum ||z - t||^2``, ``t`` the target of :func:`tpext.ops.hot_target`, held constant.

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

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            input: ``z``, ``[..., M]``.
            target: classes, ``[...]`` int64; or ones and zeros, ``[..., M]`` (n-hot and binary outputs; "direct" takes
                any numbers).

        Raises:
            ValueError: a wrong shape or dtype, or a target of other values (not on CUDA, where looking would wait).
        """
        check_tensor("HotTargetLoss", "input", input, "[..., M]")
        check_tensor("HotTargetLoss", "target", target)
        looks = are_plain((target,)) and not on_cuda(target)
        if target.dim() < input.dim():
            if target.shape != input.shape[:-1] or target.dtype != torch.int64:
                raise ValueError(
                    f"HotTargetLoss: target must be {list(input.shape[:-1])} int64 classes, got {list(target.shape)} "
                    f"{dtype_name(target.dtype)}"
                )
            if looks:
                outside = (target < 0) | (target >= input.shape[-1])
                if bool(outside.any()):
                    raise ValueError(
                        f"HotTargetLoss: target must lie in 0..M-1={input.shape[-1] - 1}, got {int(target[outside][0])}"
                    )
            target = torch.zeros_like(input).scatter(-1, target[..., None], 1.0)
        elif looks and self.output != "direct":
            other = (target != 0) & (target != 1)
            if bool(other.any()):
                raise ValueError(
                    f"HotTargetLoss: target must be ones and zeros with output={self.output!r}, got "
                    f"{float(target[other][0]):g}"
                )
        return 0.5 * (input - hot_target(target, input.detach(), self.output)).square().sum()


class StreamResult(NamedTuple):
    """Of a pass: ``predictions [K]``, each before its sample's update; the running accuracy after the last."""

    predictions: Tensor
    running_accuracy: float
