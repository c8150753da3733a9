"""``layer_inverse``, ``layer_displacement``: the inputs that would give a layer a certain output.

A layer ``y = a(x W' + b)`` is three maps, linear, bias and activation. Each map ``f`` is inverted by itself, the last
one first, as ``argmin_x ||f(x) - y||^2 + reg ||x - c||^2``, where ``c`` is the current input of the map (``form=
"proximal"``) or zero (``form="ridge"``); ``method="constrained"`` is the limit ``reg -> 0``, the solution of ``f(x) =
y`` nearest to ``c`` (least squares where there is none). So a layer has three separate proximity terms, and its inverse
is not the regularised inverse of the composed map. All minimisers are global and exact to rounding::

    linear    x = c + (y - c W') R',  R = (W'W + reg I)^-1 W' = W' (WW' + reg I)^-1       the smaller Gram matrix
    bias      x = (y - b + reg c) / (1 + reg)
    others    of the activations: :mod:`tpext.ops.act_inverse`

As the activation's, so a layer's inverse is no derivative: differentiating through it raises RuntimeError. Inputs are
never changed.

Source: J. Seely, "tensorflow-target-prop", ``operations.py``, its functions of each operation. It differs as
:mod:`tpext.ops.activation` says of activations, and in that its linear map solves an ``N x N`` system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tpext.ops._library import autocasts, cast, check_choice, check_like, check_tensor, full_precision
from tpext.ops.act_inverse import ActivationName, act_displacement, check_input, check_reg
from tpext.ops.activation import Activation, Form, regularization_center
from tpext.ops.regularized_inverse import regularized_inverse

Method = Literal["regularized", "constrained"]


def _check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != tuple(shape):
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def _check_product(op: str, input: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [M, N], got {list(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: input must be [..., N={weight.shape[1]}], got {list(input.shape)}")


def bias_inverse(target: Tensor, input: Tensor, bias: Tensor, reg: float = 0.0, form: Form = "proximal") -> Tensor:
    """The inverse of ``y = x + b``: ``(y - b + reg c) / (1 + reg)``, ``c = x`` or for ``form="ridge"`` 0.

    An ordinary differentiable function, of any floating-point dtype.

    Args:
        target: ``y``, ``[..., M]``.
        input: ``x``, ``[..., M]``.
        bias: ``b``, ``[M]``.
        reg: weight of ``||x - c||^2``, >= 0; 0 is the exact inverse.
        form: "proximal" or "ridge".

    Returns:
        The target of the input, ``[..., M]``.

    Raises:
        ValueError: a wrong shape, ``reg`` or ``form`` out of range; the message names the argument.
    """
    check_tensor("bias_inverse", "target", target, "[..., M]")
    check_tensor("bias_inverse", "input", input, "[..., M]")
    check_tensor("bias_inverse", "bias", bias, "[M]")
    check_choice("bias_inverse", "form", form, get_args(Form))
    check_reg("bias_inverse", reg)
    if input.dim() == 0:
        raise ValueError("bias_inverse: input must be [..., M], got []")
    _check_shape("bias_inverse", "bias", bias, input.shape[-1:])
    _check_shape("bias_inverse", "target", target, input.shape)
    exact = target - bias
    if form == "ridge":
        return exact / (1 + reg)
    return exact + (input - exact) * (reg / (1 + reg))


def linear_inverse(
    target: Tensor,
    input: Tensor,
    weight: Tensor,
    reg: float = 0.0,
    form: Form = "proximal",
    inverse: Tensor | None = None,
) -> Tensor:
    """The inverse of ``y = x W'``: ``c + (y - c W') R'``, ``R = (W'W + reg I)^-1 W'``, ``c = x`` or 0 for "ridge".

    An ordinary differentiable function. For ``reg > 0`` it equals ``(y W + reg c) (W'W + reg I)^-1``, without
    a system larger than the smaller of ``M`` and ``N``.

    Args:
        target: ``y``, ``[..., M]``.
        input: ``x``, ``[..., N]``.
        weight: ``W``, ``[M, N]``, float32 or float64, in ``torch.nn.Linear``'s layout.
        reg: weight of ``||x - c||^2``, >= 0. 0 is the limit, with the pseudo-inverse for ``R``: the least squares
            solution nearest to ``c``.
        form: "proximal" or "ridge".
        inverse: ``R``, ``[N, M]``, if it is known: ``tpext.ops.regularized_inverse(weight, reg)``, once a
            change of the weights. ``reg`` is then not used.

    Returns:
        The target of the input, ``[..., N]``.

    Raises:
        SingularError: ``reg`` is 0 and the weights have not full rank to working precision. A small ``reg``, or
        ``inverse=torch.linalg.pinv(weight)``, answers there.
        ValueError: weights with NaN or infinite elements; a wrong shape, ``reg`` or ``form`` out of range; the
        message names the argument.

    Cost: ``k^2 (3 m + k / 3)`` operations for ``R``, ``k = min(M, N)``, ``m = max(M, N)``, if it is not given; a row
    ``4 M N`` ("ridge": ``2 M N``).
    """
    op = "linear_inverse"
    check_tensor(op, "target", target, "[..., M]")
    check_tensor(op, "input", input, "[..., N]")
    check_tensor(op, "weight", weight, "[M, N]")
    if inverse is not None:
        check_tensor(op, "inverse", inverse, "[N, M]")
    check_choice(op, "form", form, get_args(Form))
    check_reg(op, reg)
    _check_product(op, input, weight)
    _check_shape(op, "target", target, (*input.shape[:-1], weight.shape[0]))
    if inverse is not None:
        _check_shape(op, "inverse", inverse, (weight.shape[1], weight.shape[0]))
    operator = regularized_inverse(weight, reg) if inverse is None else inverse
    if form == "ridge":
        return target @ operator.mT
    return input + (target - input @ weight.mT) @ operator.mT


@dataclass(frozen=True)
class _Layer:
    """The arguments of a layer's inverse, checked, and its current values."""

    input: Tensor
    bias: Tensor | None
    activation: Activation
    method: Method
    reg: float
    form: Form
    margin: float
    operator: Tensor
    product: Tensor

    @classmethod
    def of(
        cls,
        op: str,
        moved: tuple[str, Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: ActivationName | Activation,
        method: Method,
        reg: float,
        form: Form,
        margin: float,
        inverse: Tensor | None,
    ) -> _Layer:
        check_choice(op, "method", method, get_args(Method))
        check_choice(op, "form", form, get_args(Form))
        check_reg(op, reg)
        check_input(op, "input", input, input)
        _check_product(op, input, weight)
        outputs, inputs = weight.shape
        leading = input.shape[:-1]
        check_like(op, "weight", weight, input, (outputs, inputs))
        check_like(op, *moved, input, (*leading, outputs))
        if bias is not None:
            check_like(op, "bias", bias, input, (outputs,))
        if inverse is not None:
            check_like(op, "inverse", inverse, input, (inputs, outputs))
        else:
            inverse = regularized_inverse(weight, reg if method == "regularized" else 0.0)
        activation = activation if isinstance(activation, Activation) else Activation(activation)
        return cls(input, bias, activation, method, reg, form, margin, inverse, input @ weight.mT)

    @property
    def preactivation(self) -> Tensor:
        return self.product if self.bias is None else self.product + self.bias

    def product_target(self, target: Tensor) -> Tensor:
        """The target of ``x W'``, that of the output taken through activation and bias."""
        if self.method == "constrained":
            center = regularization_center(self.preactivation, self.form)
            target = self.activation.inverse(target, center, self.margin)
        else:
            target = self.activation.regularized_inverse(target, self.preactivation, self.reg, self.form)
        if self.bias is None:
            return target
        reg = self.reg if self.method == "regularized" else 0.0
        return bias_inverse(target, self.product, self.bias, reg, self.form)

    def product_displacement(self, displacement: Tensor) -> Tensor:
        """By how much ``x W'`` should move for the output to move by this."""
        act, center = self.activation, self.preactivation
        if self.method == "constrained" or self.reg == 0 or self.form == "ridge" or act.reference_compat:
            output = act(center)
            return self.product_target(output + displacement) - self.product_target(output)
        moved = act_displacement(displacement, center, act.name, act.slope, self.reg)
        return moved if self.bias is None else moved / (1 + self.reg)


def _check_layer(
    op: str, moved: tuple[str, object], input: object, weight: object, bias: object, inverse: object
) -> None:
    """Raise TypeError unless a layer's arguments are tensors."""
    check_tensor(op, *moved, "[..., M]")
    check_tensor(op, "input", input, "[..., N]")
    check_tensor(op, "weight", weight, "[M, N]")
    if bias is not None:
        check_tensor(op, "bias", bias, "[M]")
    if inverse is not None:
        check_tensor(op, "inverse", inverse, "[N, M]")


def _cast_under_autocast(target: Tensor, input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The arguments of a layer's inverse: under autocast in float32, as those of the ops."""
    tensors = (target, input, *others)
    return tuple(cast(tensor, torch.float32) for tensor in tensors) if autocasts(input.device.type) else tensors


def layer_inverse(
    target: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: ActivationName | Activation,
    *,
    method: Method = "regularized",
    reg: float = 1e-2,
    form: Form = "proximal",
    margin: float = 1e-2,
    inverse: Tensor | None = None,
) -> Tensor:
    """The target of the input of a layer ``y = a(x W' + b)``, given that of its output.

    With ``x1 = x W'`` and ``x2 = x1 + b``, and the inverses of the module's head, each with its own proximity term::

        t2 = act_inverse(target, x2),   t1 = bias_inverse(t2, x1),   result = linear_inverse(t1, x)

    Regularised and proximal, a target that is the layer's output gives back ``x``; constrained, only where no unit is
    within ``margin`` of the edges of its range.

    Args:
        target: ``[..., M]``.
        input: ``x``, ``[..., N]``, float32 or float64.
        weight: ``W``, ``[M, N]``, in ``torch.nn.Linear``'s layout.
        bias: ``b``, ``[M]``, or None.
        activation: its name, or an :class:`Activation`.
        method: "regularized", or "constrained": the limit ``reg -> 0``.
        reg: weight of the proximity terms, >= 0; "constrained" does not use it.
        form: "proximal": near to ``x``, ``x1`` and ``x2``; "ridge": near to zero.
        margin: for "constrained": as in :meth:`Activation.inverse`.
        inverse: ``[N, M]``, the regularised inverse of the weights if it is known, for ``reg``, or for 0 if
            constrained: ``tpext.ops.regularized_inverse(weight, reg)``, once a change of the weights.

    Returns:
        ``[..., N]``; under autocast computed in float32 and returned in it, as by the ops.

    Raises:
        ValueError: a wrong shape, dtype or device, an option out of range; the message names the argument.
        SingularError: as :func:`linear_inverse`. RuntimeError: when differentiated.

    Cost: that of ``R`` if it is not given, ``6 M N`` operations a row ("ridge": ``4 M N``) and ``act_inverse``.

    Source: J. Seely, "tensorflow-target-prop", ``tprop_train.py``: error algorithms 1 ("constrained") and 2.

    >>> import torch
    >>> x, weight, bias = torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2)
    >>> target = torch.tanh(x @ weight.T + bias)
    >>> torch.allclose(layer_inverse(target, x, weight, bias, "tanh"), x)
    True
    """
    op = "layer_inverse"
    _check_layer(op, ("target", target), input, weight, bias, inverse)
    target, input, weight, bias, inverse = _cast_under_autocast(target, input, weight, bias, inverse)
    with full_precision(input.device.type):
        layer = _Layer.of(op, ("target", target), input, weight, bias, activation, method, reg, form, margin, inverse)
        target = layer.product_target(target)
        if form == "ridge":
            return target @ layer.operator.mT
        return input + (target - layer.product) @ layer.operator.mT


def layer_displacement(
    displacement: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: ActivationName | Activation,
    *,
    method: Method = "regularized",
    reg: float = 1e-2,
    form: Form = "proximal",
    margin: float = 1e-2,
    inverse: Tensor | None = None,
) -> Tensor:
    """By how much the input of a layer ``y = a(x W' + b)`` should move for its output to move by ``displacement``.

    ``layer_inverse(y + d) - layer_inverse(y)``, computed as one difference before the linear map, ``(t1(y + d) - t1(y))
    R'``: no displacement of the output gives none of the input, with any method, and in a regularised identity layer it
    is ``d (W'W + reg I)^-1 W'`` over ``(1 + reg)^2``. Regularised and proximal, with ``reg > 0``, the difference
    is ``act_displacement / (1 + reg)`` (without a bias not ``/ (1 + reg)``), precise for the smallest ``d``; else a
    displacement below the rounding of the output is lost.

    Args:
        displacement: ``d``, ``[..., M]``.
        input, weight, bias, activation, method, reg, form, margin, inverse: as in :func:`layer_inverse`.

    Returns:
        ``[..., N]``.

    Raises, cost: as :func:`layer_inverse`, with ``act_displacement`` for ``act_inverse``, or the latter twice.

    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation" (2015): the difference correction.
    """
    op = "layer_displacement"
    _check_layer(op, ("displacement", displacement), input, weight, bias, inverse)
    displacement, input, weight, bias, inverse = _cast_under_autocast(displacement, input, weight, bias, inverse)
    with full_precision(input.device.type):
        layer = _Layer.of(
            op, ("displacement", displacement), input, weight, bias, activation, method, reg, form, margin, inverse
        )
        return layer.product_displacement(displacement) @ layer.operator.mT
