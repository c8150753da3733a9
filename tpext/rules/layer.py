"""The protocol of the rules of feed-forward layers, and the autograd node in which they run.

:mod:`tpext.rules` has the scheme that they share. A rule of your own subclasses :class:`LayerRule` and gives
:meth:`LayerRule.propagate`; the four steps of a backward pass stand in :meth:`LayerRule.gradients`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tpext.ops._library import NOT_A_DERIVATIVE, full_precision, refuse_forward_mode
from tpext.ops.activation import Activation
from tpext.ops.units import Output, Units
from tpext.rules.base import Kind, Rule, apply_node, check_flag, check_positive, require_result


class LayerCall(NamedTuple):
    """What a rule may read of a feed-forward layer ``h = a(x W^T + b)`` and of one pass through it; row vectors.

    Attributes:
        input: ``x [..., N]``.
        weight: ``W [M, N]``.
        bias: ``b [M]`` or None.
        activation: ``a``; of :class:`tpext.ops.Activation`, with its derivative and inverses, unless ``takes_units``.
        reverse_activation: that of the layer below.
        owned: the rule's own parameters, in the order of its ``parameter_shapes``.
        preactivation, output: ``u = x W^T + b`` and ``h``, ``[..., M]``; in the backward pass both are None for a layer
            without activation under a rule with ``reads_identity=False``.
        needs: whether the gradient of input, weight and bias is wanted.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: Activation | Units
    reverse_activation: Activation | Units
    owned: tuple[Tensor, ...] = ()
    preactivation: Any = None
    output: Any = None
    needs: tuple[bool, bool, bool] = (True, True, True)


class LayerRule(Rule, ABC):
    """A rule of feed-forward layers: the base class of a rule of your own.

    The layer receives ``g = dL/dh``, takes the displacement ``d = -target_step * g``, asks :meth:`propagate` by how
    much its input should move for that, and hands ``-d_x / target_step`` down. Its parameters get
    :meth:`local_error`'s gradient. The class attributes are constants; a subclass overrides them, or makes them fields
    for its users to set. No method may change a tensor that it is given.

    Attributes:
        target_step: size of a displacement, ``d = -target_step * g``, > 0.
        normalize: whether parameter gradients are divided by ``target_step``, which gives them back-propagation's
            scale.
        reg: regularisation of its inverse of the weights, 0 without one.
        reads_identity: whether the backward pass reads pre-activation and output of a layer without activation, which
            costs a copy.
        ordinary_head: whether a network's output layer is, as published, an ordinary one that learns by its own
            gradient.
        takes_units: whether activations are :class:`tpext.ops.Units`.

    >>> from dataclasses import dataclass
    >>> import torch, tpext
    >>> @dataclass(frozen=True)
    ... class PseudoInverseTargets(tpext.rules.LayerRule):
    ...     def propagate(self, call, displacement):
    ...         return call.activation.derivative(displacement, call.preactivation) @ torch.linalg.pinv(call.weight).T
    >>> net = tpext.nn.MLP([8, 6, 4], rule=PseudoInverseTargets())
    >>> net(torch.randn(5, 8)).square().mean().backward()
    >>> net[0].weight.grad.shape
    torch.Size([6, 8])
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"layer"})

    target_step: float = 1.0
    normalize: bool = True
    reg: float = 0.0
    reads_identity: ClassVar[bool] = True
    ordinary_head: ClassVar[bool] = False
    takes_units: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_flag(self, "normalize")
        check_positive(self, "target_step")

    @abstractmethod
    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        """Return by how much the input should move for the output to move by ``displacement``.

        Args:
            call: the layer and the pass.
            displacement: ``d [..., M]``.

        Returns:
            ``d_x [..., N]``, of the dtype and on the device of ``displacement``.
        """

    def local_error(self, call: LayerCall, grad: Tensor) -> Tensor:
        """Return the gradient of the local loss for the pre-activation, ``[..., M]``.

        By default that of ``1/2 ||h - (h + d)||^2`` with the target held constant: one step of the chain rule.

        Args:
            call: the layer and the pass.
            grad: ``g [..., M]``.
        """
        scaled = grad if self.normalize else grad * self.target_step
        return through_activation(scaled, call.output, call.activation)

    # What follows is what a rule that is not of this form overrides.

    @property
    def init_std(self) -> float | None:
        """Standard deviation of the weights and biases that a layer made with the rule draws; None: torch's own."""
        return None

    def parameter_shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Return name and shape of each parameter of the rule's own, which the layer registers."""
        return {}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        """Initialise one of those parameters in place: one of float32 or float64, rounded later for a 16-bit layer."""
        raise NotImplementedError(f"{type(self).__name__}: reset_parameter must initialise {name}")

    def run_layer(self, call: LayerCall) -> Tensor:
        """Run a layer whose backward pass is this rule's; under autocast in float32, its output in the autocast dtype.

        Returns:
            ``h [..., M]``.
        """
        if torch._C._are_functorch_transforms_active():
            refuse_forward_mode("TargetLinear")
            raise RuntimeError(NOT_A_DERIVATIVE)
        # Owned parameters are detached: their own loss trains them.
        tensors = (call.input, call.weight, call.bias, *(parameter.detach() for parameter in call.owned))
        settings = (call.activation, call.reverse_activation, self)
        return apply_node(_LayerPass, settings, tensors)  # type: ignore[no-any-return]

    def gradients(self, call: LayerCall, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return what a backward pass gives for input, weight and bias, each of them where it is wanted."""
        grad_input = None
        if call.needs[0]:
            moved = self.propagate(call, grad * -self.target_step)
            require_result(self, "propagate", moved, call.input)
            grad_input = moved / -self.target_step
        if not any(call.needs[1:]):
            return grad_input, None, None
        error = self.local_error(call, grad)
        require_result(self, "local_error", error, grad)
        return grad_input, *parameter_gradients(call, error)

    def layer_loss(self, call: LayerCall, noise: float | None) -> Tensor:
        """Return the loss that trains the rule's own parameters, a mean over the batch.

        Raises:
            RuntimeError: the rule has no such loss.
        """
        raise RuntimeError(
            "TargetLinear.reconstruction_loss needs rule=tpext.DifferenceTargetPropagation(), or a rule of your own "
            f"with layer_loss, the rule is {self}"
        )

    def learn_stream(self, layers: Sequence[Any], input: Tensor, labels: Tensor, output: Output) -> Tensor:
        """Learn samples one after another in a single call: what :meth:`tpext.nn.MLP.stream` stands on.

        Args:
            layers: each a :class:`tpext.nn.TargetLinear` of weights of its own; to be updated in place.
            input, labels, output: as in :meth:`tpext.nn.MLP.stream`.

        Returns:
            The predictions ``[K]``, each before its sample's update.

        Raises:
            RuntimeError: the rule has no such call.
        """
        raise RuntimeError(
            "MLP.stream needs rule=tpext.Kaczmarz(), or a rule of your own with learn_stream, one for all layers, the "
            f"rule is {self}"
        )


class _LayerPass(torch.autograd.Function):
    """The node of one layer.

    Without names for its arguments: torch's compiler takes a ``forward`` with as many parameters as arguments for one
    without a context.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        activation, reverse_activation, rule, input, weight, bias, *owned = arguments
        preactivation = functional.linear(input, weight, bias)
        output: Tensor = activation(preactivation)
        kept: tuple[Tensor | None, ...] = (preactivation, output)
        if activation.name == "identity":
            # The next module may change this output in place, as after torch.nn.Linear.
            kept = (output.clone(), None) if rule.reads_identity else (None, None)
        ctx.save_for_backward(input, weight, bias, *kept, *owned)
        ctx.activation, ctx.reverse_activation, ctx.rule = activation, reverse_activation, rule
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients are recorded inside a backward pass exactly when its result is to be differentiated again.
        if torch.is_grad_enabled():
            raise RuntimeError(NOT_A_DERIVATIVE)
        input, weight, bias, preactivation, output, *owned = ctx.saved_tensors
        call = LayerCall(
            input,
            weight,
            bias,
            ctx.activation,
            ctx.reverse_activation,
            tuple(owned),
            preactivation,
            preactivation if ctx.activation.name == "identity" else output,
            ctx.needs_input_grad[3:6],
        )
        with full_precision(grad.device.type):
            return None, None, None, *ctx.rule.gradients(call, grad), *[None] * len(owned)


def parameter_gradients(call: LayerCall, error: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of weight and bias, ``error`` being the gradient of the local loss for each pre-activation."""
    rows = error.reshape(-1, error.shape[-1])
    weight = rows.mT @ call.input.reshape(-1, call.input.shape[-1]) if call.needs[1] else None
    return weight, rows.sum(0) if call.bias is not None and call.needs[2] else None


def through_activation(grad: Tensor, output: Tensor, activation: Activation | Units) -> Tensor:
    """``g * a'``, one step of the chain rule, from the activation's output, which needs no tanh anew."""
    if activation.name == "identity":
        return grad
    if activation.name == "tanh":
        return torch.ops.aten.tanh_backward(grad, output)  # type: ignore[no-any-return]
    if activation.name == "sigmoid":
        return torch.ops.aten.sigmoid_backward(grad, output)  # type: ignore[no-any-return]
    # what is left is the sign, which the output has from the pre-activation
    assert isinstance(activation, Activation)
    return activation.derivative(grad, output)
