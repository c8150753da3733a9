"""``Activation``: an elementwise activation with its derivative and its inverses.

The inverses are ``argmin_x ||a(x) - y||^2 + reg ||x - c||^2``, where ``c`` is the current input (``form="proximal"``)
or zero (``form="ridge"``); :mod:`tpext.ops.act_inverse` computes them.

Source: J. Seely, "tensorflow-target-prop", ``operations.py``, its functions of each activation. It differs in that its
regularised inverses of tanh and sigmoid are ``num_steps`` gradient steps from the clipped constrained inverse, on a
cost averaged over all elements, so that by default they hardly leave it; that its inverse of the identity ignores
``reg``; and that its leaky relu has none. ``Activation`` gives its numbers with ``reference_compat=True``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tpext.ops._library import check_choice, check_tensor, is_integer, is_number
from tpext.ops.act_inverse import ActivationName, act_inverse, check_reg

Form = Literal["proximal", "ridge"]


def regularization_center(input: Tensor, form: str) -> Tensor:
    """What the regularisation draws the solution to."""
    return input if form == "proximal" else torch.zeros_like(input)


@dataclass(frozen=True)
class Activation:
    """An elementwise activation ``a`` with its derivative and its inverses: what target propagation asks of it.

    Args:
        name: "tanh", "sigmoid", "relu", "leaky_relu" or "identity".
        slope: of leaky relu below zero, > 0; the others ignore it.
        reference_compat: make ``regularized_inverse`` give the numbers of the published code (see the module's head):
            for tanh and sigmoid ``x <- x - learning_rate (2 / n) ((a(x) - y) a'(x) + reg (x - c))``, ``num_steps``
            times from ``x = inverse(y)``, ``n`` the number of elements; for the identity ``y``.
        learning_rate: of these steps.
        num_steps: their number, >= 0.

    Raises:
        ValueError: an argument out of its range, named.

    Source: J. Seely, "tensorflow-target-prop", ``operations.py``.

    >>> import torch
    >>> relu = Activation("relu")
    >>> relu.inverse(torch.tensor([3.0, -1.0, -1.0]), torch.tensor([1.0, 1.0, -2.0]))
    tensor([ 3.,  0., -2.])
    >>> relu.regularized_inverse(torch.tensor([3.0, -1.0, -1.0]), torch.tensor([1.0, 1.5, -2.0]), reg=1.0)
    tensor([ 2.0000,  0.2500, -2.0000])
    """

    name: ActivationName
    slope: float = 0.01
    reference_compat: bool = False
    learning_rate: float = 0.1
    num_steps: int = 2

    def __post_init__(self) -> None:
        check_choice("Activation", "name", self.name, get_args(ActivationName))
        for name in ("slope", "learning_rate"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"Activation: {name} must be a finite number > 0, got {value!r}")
        if not isinstance(self.reference_compat, bool):
            raise ValueError(f"Activation: reference_compat must be True or False, got {self.reference_compat!r}")
        if not is_integer(self.num_steps) or self.num_steps < 0:
            raise ValueError(f"Activation: num_steps must be an integer >= 0, got {self.num_steps!r}")

    def __call__(self, input: Tensor) -> Tensor:
        """``a(x)``, an ordinary differentiable function of a tensor of any shape and floating-point dtype."""
        check_tensor("Activation", "input", input)
        if self.name == "tanh":
            return torch.tanh(input)
        if self.name == "sigmoid":
            return torch.sigmoid(input)
        if self.name == "relu":
            return torch.relu(input)
        if self.name == "leaky_relu":
            return torch.nn.functional.leaky_relu(input, self.slope)
        return input

    def derivative(self, grad: Tensor, input: Tensor) -> Tensor:
        """``g * a'(x)``: a gradient of the output taken to the input, one step of the chain rule.

        Args:
            grad: ``g``, of the shape of ``input``.
            input: ``x``; at 0 the slopes of relu and leaky relu are those from below, as torch's are.
        """
        check_tensor("Activation.derivative", "grad", grad)
        check_tensor("Activation.derivative", "input", input)
        if self.name == "tanh":
            return grad * (1 - torch.tanh(input) ** 2)
        if self.name == "sigmoid":
            output = torch.sigmoid(input)
            return grad * output * (1 - output)
        if self.name == "identity":
            return grad
        return torch.where(input > 0, grad, grad * (0.0 if self.name == "relu" else self.slope))

    def inverse(self, target: Tensor, input: Tensor, margin: float = 1e-2) -> Tensor:
        """The constrained least squares inverse: of the points whose image is nearest to the target, that nearest to x.

        ``atanh(y)`` and ``log(y / (1 - y))``, with ``y`` first brought ``margin`` inside the range; relu: ``y`` if
        ``y > 0``, else ``min(x, 0)``; leaky relu: ``y`` or ``y / slope``; identity: ``y``.

        Args:
            target: ``y``, float32 or float64, of the shape of ``input``.
            input: ``x``, the current input of the activation.
            margin: distance kept from the edges of the range of tanh and sigmoid, < 0.5 and at least the dtype's eps. A
                unit whose output is nearer to an edge than this moves even if its target is its output.

        Returns:
            The target of the input, of its shape.

        Raises:
            ValueError: a wrong shape, dtype, device or ``margin``, named. RuntimeError: when differentiated.
        """
        return act_inverse(target, input, self.name, self.slope, 0.0, margin)

    def regularized_inverse(self, target: Tensor, input: Tensor, reg: float = 1e-2, form: Form = "proximal") -> Tensor:
        """The regularised inverse ``argmin_z ||a(z) - y||^2 + reg ||z - x||^2``, or with ``||z||^2`` for "ridge".

        As reg grows it tends to ``x`` (to zero), and as it falls to :meth:`inverse` where the target is in the range.

        Args:
            target: ``y``, float32 or float64, of the shape of ``input``; need not lie in the range.
            input: ``x``, the current input of the activation.
            reg: weight of the second term, >= 0. 0 gives the limit; tanh and sigmoid have none beyond their range,
                and the target is then first brought the dtype's eps inside it.
            form: "proximal" or "ridge".

        Returns:
            The target of the input, of its shape.

        Raises:
            ValueError: a wrong shape, dtype, device, ``reg`` or ``form``, named; ``reference_compat`` with leaky
            relu, of which the published code has no regularised inverse. RuntimeError: when differentiated.
        """
        check_tensor("regularized_inverse", "target", target)
        check_tensor("regularized_inverse", "input", input)
        check_choice("regularized_inverse", "form", form, get_args(Form))
        center = regularization_center(input, form)
        if self.reference_compat:
            check_reg("regularized_inverse", reg)
            if self.name == "leaky_relu":
                raise ValueError("regularized_inverse: reference_compat has none of leaky_relu; set it to False")
            if self.name == "identity":
                return self.inverse(target, center)
            if self.name in ("tanh", "sigmoid"):
                return self._published_steps(target, center, reg)
        eps = torch.finfo(input.dtype).eps if input.is_floating_point() else 0.0
        return act_inverse(target, center, self.name, self.slope, reg, eps)

    def _published_steps(self, target: Tensor, center: Tensor, reg: float) -> Tensor:
        x = self.inverse(target, center)
        rate = self.learning_rate * 2 / max(1, x.numel())
        for _ in range(self.num_steps):
            x = x - rate * (self.derivative(self(x) - target, x) + reg * (x - center))
        return x
