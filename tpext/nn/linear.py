"""A feed-forward layer whose backward pass is target propagation.

It is one ``autograd.Function``: forward a linear map and an activation, backward it takes the gradient that arrives for
a wish to move its output and passes the wish on through its inverse (:mod:`tpext.rules`). So the layers compose with
anything that autograd runs through.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tpext.nn.owned import OwnedParameters, register_owned, reset_owned
from tpext.nn.torchscript import refuse_script
from tpext.ops._library import LOW_PRECISION, autocasts, check_tensor, full_precision
from tpext.ops.act_inverse import ActivationName
from tpext.ops.activation import Activation
from tpext.ops.units import Units, UnitsName
from tpext.rules import LayerCall, LayerRule, RegularizedLeastSquares
from tpext.rules.base import require_rule


def as_activation(activation: ActivationName | UnitsName | Activation | Units) -> Activation | Units:
    """An activation given by name or as it is."""
    if isinstance(activation, (Activation, Units)):
        return activation
    if activation == "doubled_relu" or activation == "n_hot" or activation == "binary":
        return Units(activation)
    return Activation(activation)


class TargetLinear(OwnedParameters):
    r"""A fully connected layer with its activation, trained by the given rule.

    ``h = a(x W^T + b)``

    Forward it is ``torch.nn.Linear`` and the activation; the rule decides what ``backward()`` computes: see
    :mod:`tpext.rules`. It composes with ordinary modules: from below it hands down what autograd takes for a gradient,
    from above it takes one. So the head of a network is any torch module and loss, and the target of the layer below it
    is one gradient step of that loss; a loss averaged over the batch makes each sample's displacement ``target_step /
    B`` times its own gradient. Under autocast a target rule computes in float32 and its output gets the autocast dtype;
    ``Backprop`` does what torch does.

    Args:
        in_features: N, >= 1.
        out_features: M, >= 1.
        bias: False leaves out ``b``.
        activation: "tanh", "sigmoid", "relu", "leaky_relu" or "identity", or a :class:`tpext.ops.Activation`, which
            holds their options; with ``reference_compat=True`` the least squares rules propagate the published numbers.
            Under ``Kaczmarz`` "relu", "identity", "doubled_relu", "n_hot" or "binary", or a :class:`tpext.ops.Units`.
        rule: what the backward pass computes; None means ``RegularizedLeastSquares()``.
        reverse_activation: that of the layer below: ``a_r`` of a learned inverse, and under ``Kaczmarz`` what decides
            which input is feasible; None means ``activation``.
        device, dtype: of the parameters; float32 or float64 for a target rule.

    Attributes:
        weight, bias: ``[M, N]`` and ``[M]``, drawn as ``torch.nn.Linear`` draws them, whose ``state_dict`` fits; made
            with a ``Kaczmarz`` normal with its ``std``.
        transposed: whether ``weight`` is ``W^T [N, M]``, the parameter of another layer: see :meth:`tie`.
        reverse_weight, reverse_bias: ``[N, M]`` and ``[N]``, under ``DifferenceTargetPropagation`` only, initialised
            orthogonal and zero. A ``state_dict`` without them leaves them as they are.

    Raises:
        TypeError: sizes that are no integers, a bias that is no bool, or a rule that is none of feed-forward layers.
        ValueError: another argument out of its range, named.

    Cost: backward a least squares rule factors the weights once, ``k^2 (m + k / 3)`` operations with ``k = min(M, N)``,
    ``m = max(M, N)``, substitutes for ``B <= m`` rows, ``2 B k^2`` (for more it inverts, ``2 m k^2``), and has the
    products of back-propagation; the learned inverse has one product more. If the input needs no gradient nothing is
    factored for it.

    Source: the rules name theirs.

    >>> import torch, tpext
    >>> layer = tpext.nn.TargetLinear(4, 3, activation="tanh", rule=tpext.RegularizedLeastSquares(reg=0.1))
    >>> net = torch.nn.Sequential(torch.nn.Linear(5, 4), layer, torch.nn.Linear(3, 2))
    >>> torch.nn.functional.cross_entropy(net(torch.randn(7, 5)), torch.zeros(7).long()).backward()
    >>> layer.weight.grad.shape
    torch.Size([3, 4])
    """

    weight: Tensor
    bias: Tensor | None
    reverse_weight: Tensor
    reverse_bias: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: ActivationName | UnitsName | Activation | Units = "identity",
        rule: LayerRule | None = None,
        reverse_activation: ActivationName | UnitsName | Activation | Units | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"TargetLinear: {name} must be an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"TargetLinear: {name} must be at least 1, got {size}")
        if not isinstance(bias, bool):
            raise TypeError(
                f"TargetLinear: bias must be True or False, got {bias!r} (an activation is given as activation=...)"
            )
        rule = RegularizedLeastSquares() if rule is None else rule
        self.in_features, self.out_features = in_features, out_features
        self.activation = as_activation(activation)
        self.reverse_activation = self.activation if reverse_activation is None else as_activation(reverse_activation)
        self._check_rule(rule)
        self._rule: LayerRule = rule
        self.transposed = False
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)
        register_owned(self, rule, self._owned_shapes(rule), self.weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: uniform in ``+-1/sqrt(N)``, or normal with the rule's ``init_std``.

        Those that the rule owns are drawn as the rule does.
        """
        if self._rule.init_std is not None:
            for parameter in (self.weight, self.bias):
                if parameter is not None:
                    nn.init.normal_(parameter, std=self._rule.init_std)
        else:
            # torch.nn.Linear's own calls, so that one seed gives both the same parameters
            nn.init.kaiming_uniform_(self._matrix(), a=math.sqrt(5))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                nn.init.uniform_(self.bias, -bound, bound)
        for name in self._owned_shapes(self._rule):
            reset_owned(self._rule, name, getattr(self, name))

    def tie(self, encoder: TargetLinear) -> None:
        """Share the weights of the layer that this one mirrors, ``W = W_encoder^T``, in one parameter.

        Its gradient is then the sum of both layers' local gradients. Biases and reverse layers stay each layer's own. A
        model that loads the ``state_dict`` of one with tied layers ties them first: of square layers a mistake there
        cannot be seen from the sizes.

        Args:
            encoder: a layer from M to N features, itself not tied to another, now or later.

        Raises:
            TypeError: ``encoder`` is no such layer.
            ValueError: sizes that do not mirror this layer's, a tied layer, this layer itself, another dtype or device.

        >>> import tpext
        >>> encoder, decoder = tpext.nn.TargetLinear(8, 3), tpext.nn.TargetLinear(3, 8)
        >>> decoder.tie(encoder)
        >>> decoder.weight is encoder.weight
        True
        """
        if not isinstance(encoder, TargetLinear):
            raise TypeError(f"TargetLinear.tie: encoder must be a TargetLinear, got {type(encoder).__name__}")
        if encoder is self:
            raise ValueError("TargetLinear.tie: encoder must be another layer, got this one")
        for name in ("dtype", "device"):
            if getattr(encoder.weight, name) != getattr(self.weight, name):
                raise ValueError(
                    f"TargetLinear.tie: encoder must have weights of this layer's {name}, "
                    f"{getattr(self.weight, name)}, got {getattr(encoder.weight, name)}"
                )
        mirrored = (self.out_features, self.in_features)
        if (encoder.in_features, encoder.out_features) != mirrored or encoder.transposed:
            raise ValueError(
                f"TargetLinear.tie: encoder must be a layer of its own weights from M={mirrored[0]} to N={mirrored[1]} "
                f"features, got one from {encoder.in_features} to {encoder.out_features}"
                + (" that is tied itself" if encoder.transposed else "")
            )
        self.transposed = True
        self.weight = encoder.weight

    def _matrix(self) -> Tensor:
        """``W [M, N]``."""
        return self.weight.mT if self.transposed else self.weight

    @property
    def rule(self) -> LayerRule:
        """The rule of the backward pass; assignable, unless that changes the set of parameters."""
        return self._rule

    @rule.setter
    def rule(self, rule: LayerRule) -> None:
        self._check_change(rule)
        self._rule = rule

    def _check_rule(self, rule: LayerRule) -> None:
        require_rule("TargetLinear", rule, "layer")
        if not rule.takes_units:
            for name in ("activation", "reverse_activation"):
                value = getattr(self, name)
                if isinstance(value, Units):
                    raise ValueError(f"TargetLinear: {name}={value} needs rule=tpext.Kaczmarz(), the rule is {rule}")
        rule.check(self)

    def _check_change(self, rule: LayerRule) -> None:
        self._check_rule(rule)
        if self._owned_shapes(rule) != self._owned_shapes(self._rule):
            raise ValueError(
                f"TargetLinear: changing rule from {self._rule} to {rule} changes which parameters the rule owns; make "
                "a layer with the rule and load this one's state_dict with strict=False"
            )

    @property
    def owned_names(self) -> list[str]:
        return list(self._owned_shapes(self._rule))

    def _owned_shapes(self, rule: LayerRule) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters that a rule owns."""
        return rule.parameter_shapes(self.in_features, self.out_features)

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer.

        Args:
            input: ``x [..., N]``, of the parameters' dtype, or any floating one under autocast.

        Returns:
            ``h [..., M]``.

        Raises:
            ValueError: a wrong shape, dtype or device, named. In the backward pass: ``tpext.SingularError`` for weights
            without an inverse, RuntimeError for ``create_graph=True`` under a target rule.
        """
        self._check_input(input)
        return self._rule.run_layer(self._call(input))

    def _call(self, input: Tensor) -> LayerCall:
        owned = tuple(getattr(self, name) for name in self._owned_shapes(self._rule))
        return LayerCall(input, self._matrix(), self.bias, self.activation, self.reverse_activation, owned)

    def _check_input(self, input: Tensor) -> None:
        check_tensor("TargetLinear", "input", input, "[..., N]")
        weight = self.weight
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"TargetLinear: input must be [..., N={self.in_features}], got {list(input.shape)}")
        if input.device != weight.device:
            raise ValueError(f"TargetLinear: input must be on {weight.device} as weight is, got {input.device}")
        if not self._rule.exact and weight.dtype in LOW_PRECISION:
            raise ValueError(
                f"TargetLinear: parameters must be float32 or float64 under {type(self._rule).__name__}, got "
                f"{weight.dtype}; keep them in float32 and run under torch.autocast"
            )
        if input.dtype != weight.dtype and not autocasts(input.device.type):
            raise ValueError(f"TargetLinear: input must be {weight.dtype} as weight is, got {input.dtype}")

    @torch.no_grad()
    def input_displacement(self, input: Tensor, displacement: Tensor) -> Tensor:
        """By how much the rule asks the input to move for the output to move by ``displacement``.

        What the backward pass hands down is ``-1 / target_step`` times this, for ``displacement = -target_step * g``
        (``Kaczmarz``: with 1 for the step). Under ``Backprop`` it is the chain rule's ``(d * a') W``. Computed in the
        parameters' dtype.

        Args:
            input: ``x [..., N]``.
            displacement: ``d [..., M]``.

        Returns:
            ``d_x [..., N]``.

        Raises:
            ValueError: a wrong shape, dtype or device, named. SingularError: weights without an inverse.

        >>> import torch, tpext
        >>> layer = tpext.nn.TargetLinear(4, 3, activation="tanh")
        >>> layer.input_displacement(torch.randn(2, 4), torch.zeros(2, 3)).abs().max()
        tensor(0.)
        """
        check_tensor("TargetLinear", "displacement", displacement, "[..., M]")
        self._check_input(input)
        weight = self._matrix()
        with full_precision(input.device.type):
            input, displacement = input.to(weight.dtype), displacement.to(weight.dtype)
            preactivation = functional.linear(input, weight, self.bias)
            output = self.activation(preactivation)
            if displacement.shape != output.shape:
                raise ValueError(
                    f"TargetLinear: displacement must be {list(output.shape)}, got {list(displacement.shape)}"
                )
            call = self._call(input)._replace(preactivation=preactivation, output=output)
            return self._rule.propagate(call, displacement)

    def reconstruction_loss(self, input: Tensor, *, noise: float | None = None) -> Tensor:
        """Loss that trains the reverse layer of ``DifferenceTargetPropagation``.

        ``1/B sum ||G(a((x + n) W^T + b)) - (x + n)||^2``, with Gaussian noise ``n``: the mean over the batch of the sum
        over the features, as in the code of Lee et al. Seely's is this times ``1 / (2 N)`` (a mean over both, and a
        half), with ``reverse_activation`` also for the forward map of a linear output layer, which is not offered. Only
        the reverse parameters receive gradients. Computed in their dtype, autocast or not.

        Args:
            input: ``x [..., N]``.
            noise: standard deviation of ``n``, >= 0; None means the rule's.

        Returns:
            The scalar loss.

        Raises:
            RuntimeError: the rule is not ``DifferenceTargetPropagation``.
            ValueError: noise is not a finite number >= 0; else as the forward pass.

        Source: Lee et al., "Difference Target Propagation", 2015, equation 13, and ``conti_dtp.py``.

        >>> import torch, tpext
        >>> layer = tpext.nn.TargetLinear(4, 3, activation="tanh", rule=tpext.DifferenceTargetPropagation(noise=0.1))
        >>> layer.reconstruction_loss(torch.randn(7, 4)).backward()
        >>> layer.reverse_weight.grad.shape, layer.weight.grad
        (torch.Size([4, 3]), None)
        """
        self._check_input(input)
        with full_precision(input.device.type):
            return self._rule.layer_loss(self._call(input.to(self.weight.dtype)), noise)

    def extra_repr(self) -> str:
        """Sizes, activation, rule."""
        activation = self.activation
        shown = f"'{activation.name}'" if activation == as_activation(activation.name) else repr(activation)
        tied = ", tied" if self.transposed else ""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, activation={shown}, "
            f"rule={self._rule}{tied}"
        )
