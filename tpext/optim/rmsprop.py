"""Two variants of RMSProp, of published target propagation codes.

Both divide by ``sqrt(v + eps)``, the small number inside the root, where ``torch.optim.RMSprop`` divides by ``sqrt(v) +
eps``; both keep the learning rate inside the momentum's sum. Everything else is ``torch.optim.Optimizer``'s: parameter
groups, ``state_dict``, learning rate schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


def _check_number(optimizer: str, name: str, value: float, below: float = math.inf) -> None:
    if not 0 <= value < below:
        bound = f" and < {below:g}" if math.isfinite(below) else ""
        raise ValueError(f"{optimizer}: {name} must be a finite number >= 0{bound}, got {value!r}")


class _RMSprop(torch.optim.Optimizer):
    """What both variants share: options, the loop over parameters, a step along the momentum's sum."""

    def __init__(self, params: Iterable[Any], **options: float) -> None:
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; ValueError for an option out of its range, as when the optimizer is made."""
        for option, value in {**self.defaults, **param_group}.items():
            if option in self.defaults:
                bound = 1.0 if option in ("alpha", "momentum") else math.inf
                _check_number(type(self).__name__, option, value, bound)
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step; parameters without a gradient stay as they are.

        Args:
            closure: computes the loss anew and returns it, or None.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__}: gradients must be dense, got a sparse one")
                state = self.state[parameter]
                if not state:
                    self._initialize(state, parameter)
                increment = parameter.grad / self._root(state, parameter.grad, group)
                if group["momentum"] > 0:
                    # here, as a scheduler may switch the momentum on later
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    increment = state["momentum_buffer"].mul_(group["momentum"]).add_(increment, alpha=group["lr"])
                    parameter.sub_(increment)
                else:
                    parameter.sub_(increment, alpha=group["lr"])
        return loss

    def _initialize(self, state: dict[str, Tensor], parameter: Tensor) -> None:
        """Set the averages before the first step."""
        raise NotImplementedError

    def _root(self, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> Tensor:
        """Update the averages by a gradient and return the root to divide it by."""
        raise NotImplementedError


class TensorFlowRMSprop(_RMSprop):
    """RMSProp as in TensorFlow 1: the average of squares starts at one.

    ``v = alpha v + (1 - alpha) g^2,  u = momentum u + lr g / sqrt(v + eps),  p = p - u``, from ``v = 1``, ``u = 0``.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, >= 0.
        alpha: weight of the past in the average of squares, 0 <= alpha < 1.
        momentum: 0 <= momentum < 1.
        eps: >= 0.

    Raises:
        ValueError: an option out of its range, named.

    Source: TensorFlow 1, ``tf.train.RMSPropOptimizer``, the optimizer of J. Seely, "tensorflow-target-prop".

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([3.0])
    >>> TensorFlowRMSprop([p], lr=0.1).step()  # v = 0.9 + 0.1 * 9
    >>> p.data
    tensor([0.7764])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        alpha: float = 0.9,
        momentum: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        super().__init__(params, lr=lr, alpha=alpha, momentum=momentum, eps=eps)

    def _initialize(self, state: dict[str, Tensor], parameter: Tensor) -> None:
        state["square_avg"] = torch.ones_like(parameter)

    def _root(self, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> Tensor:
        alpha, eps = float(group["alpha"]), float(group["eps"])
        return state["square_avg"].mul_(alpha).addcmul_(grad, grad, value=1 - alpha).add(eps).sqrt_()


class CentredRMSprop(_RMSprop):
    """RMSProp by an estimate of the variance, with momentum.

    ``m = alpha m + (1 - alpha) g``, ``v = alpha v + (1 - alpha) g^2``, ``u = momentum u + lr g / sqrt(v - m^2 + eps)``,
    ``p = p - u``, all from zero.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, >= 0.
        alpha: weight of the past in both averages, 0 <= alpha < 1.
        momentum: 0 <= momentum < 1.
        eps: >= 0; where it is not far above the rounding of ``v - m^2``, that decides the steps of nearly constant
            gradients (a variance that rounding makes negative counts as zero).

    Raises:
        ValueError: an option out of its range, named.

    Source: A. Graves, "Generating Sequences with Recurrent Neural Networks" (2013), equations 38 to 45; the settings
    are those of ``conti_dtp.py``, the code of Lee et al., "Difference Target Propagation" (2015).

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([2.0])
    >>> CentredRMSprop([p], lr=0.1).step()  # m = 0.1, v = 0.2
    >>> p.data
    tensor([0.5424])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        alpha: float = 0.95,
        momentum: float = 0.9,
        eps: float = 1e-3,
    ) -> None:
        super().__init__(params, lr=lr, alpha=alpha, momentum=momentum, eps=eps)

    def _initialize(self, state: dict[str, Tensor], parameter: Tensor) -> None:
        state["grad_avg"], state["square_avg"] = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def _root(self, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> Tensor:
        alpha, eps = float(group["alpha"]), float(group["eps"])
        mean = state["grad_avg"].mul_(alpha).add_(grad, alpha=1 - alpha)
        squares = state["square_avg"].mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
        return (squares - mean * mean).clamp_(min=0).add_(eps).sqrt_()
