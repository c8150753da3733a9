"""Networks of feed-forward layers whose backward pass is target propagation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tpext.nn.kaczmarz import StreamResult
from tpext.nn.linear import TargetLinear, as_activation
from tpext.nn.torchscript import refuse_script
from tpext.ops._library import autocasts, check_tensor, full_precision
from tpext.ops.act_inverse import ActivationName
from tpext.ops.activation import Activation
from tpext.ops.kaczmarz_train import running_accuracy
from tpext.ops.units import Output, Units, UnitsName
from tpext.rules import LayerRule
from tpext.rules.base import require_rule


class MLP(nn.Sequential):
    """A network of :class:`TargetLinear` layers, one rule for all.

    ``h_l = a(h_{l-1} W_l^T + b_l)``; the last layer has ``output_activation``, by default none: what a loss such as
    cross-entropy takes. A layer's ``reverse_activation`` is the activation of the layer below, that of the first none.
    A last layer trained by its own gradient, as in difference target propagation's code, is an ordinary one on top::

        nn.Sequential(tpext.nn.MLP([784] + 7 * [240], output_activation="tanh", rule=rule), nn.Linear(240, 10))

    Args:
        sizes: features of the input, of each layer in between, and of the output; two or more.
        activation: of the layers in between: a name, a :class:`tpext.ops.Activation` or a :class:`tpext.ops.Units`.
        rule: what the backward pass computes; None means ``RegularizedLeastSquares()``.
        output_activation: activation of the last layer.
        bias: False leaves out all ``b_l``.
        tied: True ties the layers of an autoencoder, the last to the first and so on (:meth:`TargetLinear.tie`);
            ``sizes`` must be an odd number of sizes, the same from both ends.
        device, dtype: of the parameters.

    Raises:
        ValueError: fewer than two sizes, or sizes that cannot be tied. TypeError: sizes are no sequence; else
            TypeError, ValueError as :class:`TargetLinear`.

    A slice of the network is a plain ``torch.nn.Sequential`` of its layers.

    >>> import torch, tpext
    >>> net = tpext.nn.MLP([64, 32, 10], "tanh", rule=tpext.RegularizedLeastSquares(reg=0.1, target_step=0.5))
    >>> loss = torch.nn.functional.cross_entropy(net(torch.randn(20, 64)), torch.arange(20) % 10)
    >>> loss.backward()
    >>> net[0].weight.grad.shape
    torch.Size([32, 64])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: ActivationName | UnitsName | Activation | Units = "tanh",
        *,
        rule: LayerRule | None = None,
        output_activation: ActivationName | UnitsName | Activation | Units = "identity",
        bias: bool = True,
        tied: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(sizes, Sequence):
            raise TypeError(f"MLP: sizes must be a list of integers, such as [784, 240, 10], got {sizes!r}")
        if len(sizes) < 2:
            raise ValueError(f"MLP: sizes must be two or more, got {list(sizes)}")
        if rule is not None:
            require_rule("MLP", rule, "layer")
        # checked even if there is no layer in between
        activation = as_activation(activation)
        if tied and (len(sizes) % 2 == 0 or list(sizes) != list(sizes)[::-1]):
            raise ValueError(
                f"MLP: sizes must be an odd number of sizes, the same from both ends, for tied=True, got {list(sizes)}"
            )
        last = len(sizes) - 2
        super().__init__(
            *(
                TargetLinear(
                    sizes[layer],
                    sizes[layer + 1],
                    bias,
                    activation=output_activation if layer == last else activation,
                    rule=rule,
                    reverse_activation="identity" if layer == 0 else activation,
                    device=device,
                    dtype=dtype,
                )
                for layer in range(last + 1)
            )
        )
        if tied:
            layers = list(self._layers())
            half = len(layers) // 2
            for encoder, decoder in zip(layers[:half], reversed(layers[half:]), strict=True):
                decoder.tie(encoder)

    __prepare_scriptable__ = refuse_script

    def __getitem__(self, index: slice | int) -> Any:
        """A layer, or a plain ``torch.nn.Sequential`` of some."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def _layers(self) -> Iterator[TargetLinear]:
        return (layer for layer in self if isinstance(layer, TargetLinear))

    @property
    def rule(self) -> LayerRule:
        """The rule of the first layer; assigning sets that of every layer, as :attr:`TargetLinear.rule` allows."""
        return next(self._layers()).rule

    @rule.setter
    def rule(self, rule: LayerRule) -> None:
        require_rule("MLP", rule, "layer")
        layers = list(self._layers())
        # none is changed if one of them refuses
        for layer in layers:
            layer._check_change(rule)
        for layer in layers:
            layer.rule = rule

    def reconstruction_loss(self, input: Tensor, *, noise: float | None = None) -> Tensor:
        """The sum of the layers' reconstruction losses, each at the layer's input in a forward pass without noise.

        The first of several layers takes part only if ``input`` requires a gradient, as only then its inverse is used.
        Under ``DistributedDataParallel`` call it inside the wrapped module's ``forward``: see
        :class:`tpext.DifferenceTargetPropagation`.

        Args:
            input: ``x [..., N]``.
            noise: standard deviation, >= 0; None means the rule's.

        Returns:
            The scalar loss.

        Raises:
            RuntimeError, ValueError: as :meth:`TargetLinear.reconstruction_loss`.

        >>> import torch, tpext
        >>> net = tpext.nn.MLP([8, 6, 4], rule=tpext.DifferenceTargetPropagation(noise=0.1))
        >>> net.reconstruction_loss(torch.randn(7, 8)).backward()
        >>> net[1].reverse_weight.grad.shape, net[0].reverse_weight.grad
        (torch.Size([6, 4]), None)
        """
        check_tensor("MLP", "input", input, "[..., N]")
        losses = []
        casts = autocasts(input.device.type)
        with full_precision(input.device.type):
            # Without autocast the layers refuse another dtype, as they do in the forward pass.
            output = input.to(next(self._layers()).weight.dtype) if casts else input
            for index, layer in enumerate(self):
                if isinstance(layer, TargetLinear) and (index > 0 or input.requires_grad or len(self) == 1):
                    losses.append(layer.reconstruction_loss(output, noise=noise))
                if index < len(self) - 1:
                    with torch.no_grad():
                        output = layer(output)
            return torch.stack(losses).sum()

    def stream(self, input: Tensor, labels: Tensor, output: Output = "clamp", start: float = 0.0) -> StreamResult:
        """Learn samples one after another in a single call, the parameters updated in place after each.

        The same as ``B = 1`` steps of :class:`HotTargetLoss` and ``torch.optim.SGD(lr=1)``, to rounding. For rules with
        a call of their own for it (:meth:`tpext.rules.LayerRule.learn_stream`).

        Args:
            input: ``[K, N]``, in the order in which they are to be learnt.
            labels: ``[K]`` int64.
            output: as in :class:`HotTargetLoss`.
            start: running accuracy before the first sample.

        Returns:
            Predictions and the running accuracy, of decay 0.999 (:func:`tpext.ops.running_accuracy`).

        Raises:
            RuntimeError: the layers' rule is not one for all, or has no such call, as only :class:`tpext.Kaczmarz` of
            ours has; or there are other modules among the layers.
            ValueError: tied layers, frozen or parametrized parameters. Under ``Kaczmarz``: it has not
            ``update="average"``, ``first="input"``, ``sticky=0`` and ``keep_norm=False``; activations other than relu,
            and the identity for the last; a shape, dtype, device or label that :func:`tpext.ops.kaczmarz_train` does
            not take. Weights that overflow, or have no inverse where ``dx="regularized"`` and ``dx_reg=0`` ask for one,
            become NaN without an error.

        >>> import torch, tpext
        >>> net = tpext.nn.MLP([4, 8, 3], "relu", rule=tpext.Kaczmarz())
        >>> net.stream(torch.rand(100, 4), torch.arange(100) % 3).predictions.shape
        torch.Size([100])
        """
        check_tensor("MLP.stream", "input", input, "[K, N]")
        check_tensor("MLP.stream", "labels", labels, "[K]")
        layers = list(self._layers())
        rule = layers[0].rule
        if any(layer.rule != rule for layer in layers):
            raise RuntimeError(f"MLP.stream needs one rule for all layers, got {[layer.rule for layer in layers]}")
        if len(layers) < len(self):
            other = next(module for module in self if not isinstance(module, TargetLinear))
            raise RuntimeError(f"MLP.stream needs a network of TargetLinear alone, got a {type(other).__name__} in it")
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                raise ValueError(f"MLP.stream: {name} must require grad, as it is changed, got a frozen parameter")
        if any(layer.transposed for layer in layers):
            raise ValueError("MLP.stream: layers must have weights of their own, got tied ones")
        for name, layer in self.named_children():
            if parametrize.is_parametrized(layer):
                raise ValueError(f"MLP.stream: layer {name} must have plain weights, got parametrized ones")
        predictions = rule.learn_stream(layers, input, labels, output)
        return StreamResult(predictions, running_accuracy(predictions == labels, start=start))
