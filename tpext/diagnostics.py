"""What a rule does to a feed-forward network, layer by layer, beside back-propagation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpext.nn.mlp import TargetLinear
from tpext.rules import Backprop, Kaczmarz, RegularizedLeastSquares, exact_number

# A layer's gradient, as one vector, and its (input, output, gradient of the output) at each of its calls.
_Layers = dict[str, tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]]


@dataclass(frozen=True)
class LayerDiagnostics:
    """One layer's numbers, as :func:`layer_diagnostics` gives them.

    Attributes:
        name: of the module in the model.
        angle: in degrees, between the rule's gradient of weight and bias and back-propagation's; nan if one is zero.
        norm_ratio: the rule's gradient's norm by back-propagation's.
        inverse_residual: ``||f(x + d_x) - t|| / ||t - h||`` over the batch, for the target ``t = h + d`` of the layer's
            output ``h = f(x)``: 0 if the input's target gives the output's, 1 for an input that stays, nan if ``d`` is
            zero.
        condition: the condition number of the Gram matrix that the inverse of the weights factors, the smaller of
            ``W'W + gamma I`` and ``WW' + gamma I``; ``gamma`` is 0 for rules without one.
    """

    name: str
    angle: float
    norm_ratio: float
    inverse_residual: float
    condition: float


def layer_diagnostics(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[LayerDiagnostics]:
    """Compare the gradients of a model's layers with back-propagation's, and measure the layers' inverses.

    The passes run on copies of the model, with the same random numbers: model, gradients and random state stay as they
    are. Back-propagation takes the place of the rule in every :class:`tpext.nn.TargetLinear`; a layer's gradient
    depends on the rules of all layers above it. Tied layers share that of their weights.

    Args:
        model: any model with layers of this kind.
        loss: takes a model and returns the scalar loss; it must use the model that it is given.

    Returns:
        One value a layer that the loss depends on, in the order of ``model.named_modules()``.

    Raises:
        ValueError: the model has no such layer, or one of units "n_hot" or "binary", or the loss calls none of those of
        the model that it is given.

    Cost: two passes forward and backward, an inverse and a singular value decomposition a layer.

    >>> import torch, tpext
    >>> net, x = tpext.nn.MLP([8, 6, 4], rule=tpext.Backprop()), torch.randn(5, 8)
    >>> [round(layer.norm_ratio, 3) for layer in layer_diagnostics(net, lambda model: model(x).square().mean())]
    [1.0, 1.0]
    """
    by_rule = copy.deepcopy(model)
    layers = {name: module for name, module in by_rule.named_modules() if isinstance(module, TargetLinear)}
    if not layers:
        raise ValueError(f"layer_diagnostics: model must have a tpext.nn.TargetLinear, got {type(model).__name__}")
    for name, layer in layers.items():
        if layer.activation.name in ("n_hot", "binary"):
            raise ValueError(
                f"layer_diagnostics: back-propagation does not pass the units of layer {name!r}, "
                f"{layer.activation.name!r}, whose slope is zero"
            )
    by_backprop = copy.deepcopy(model)
    for module in by_backprop.modules():
        if isinstance(module, TargetLinear):
            # past the setter, which guards the parameters that an optimizer has
            module._rule = Backprop()
    # Forked twice, from the same state of every device's generator.
    with torch.random.fork_rng():
        rule_layers = _gradients(by_rule, loss)
    with torch.random.fork_rng():
        exact_layers = _gradients(by_backprop, loss)
    if not rule_layers:
        raise ValueError("layer_diagnostics: loss must call the model that it is given, and called none of its layers")
    return [
        _compare(name, layers[name], gradient, exact_layers[name][0], calls)
        for name, (gradient, calls) in rule_layers.items()
    ]


def _gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> _Layers:
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TargetLinear)}
    for name, module in layers.items():

        def record(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor, name: str = name
        ) -> None:
            input = args[0] if args else kwargs["input"]
            calls.setdefault(name, []).append((input.detach(), output))

        # before the model's own hooks, which may change the output
        module.register_forward_hook(record, with_kwargs=True, prepend=True)
        module.requires_grad_(True)
    with torch.enable_grad():
        value = loss(model)
    found: _Layers = {}
    for name, module in layers.items():
        if name not in calls:
            continue
        parameters = [module.weight] if module.bias is None else [module.weight, module.bias]
        outputs = [output for _, output in calls[name]]
        wanted = [*parameters, *outputs]
        grads = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
        dense = [torch.zeros_like(of) if grad is None else grad for of, grad in zip(wanted, grads, strict=True)]
        gradient = torch.cat([grad.flatten() for grad in dense[: len(parameters)]])
        triples = zip(calls[name], dense[len(parameters) :], strict=True)
        found[name] = (gradient, [(input, output.detach(), grad) for (input, output), grad in triples])
    return found


@torch.no_grad()
def _compare(
    name: str, layer: TargetLinear, gradient: Tensor, exact: Tensor, calls: list[tuple[Tensor, Tensor, Tensor]]
) -> LayerDiagnostics:
    gradient, exact = gradient.double(), exact.double()
    norm, exact_norm = float(gradient.norm()), float(exact.norm())
    angle = math.nan
    if norm > 0 and exact_norm > 0:
        # Of the unit vectors, as the angle's cosine loses half the digits of a small one.
        one, other = gradient / norm, exact / exact_norm
        angle = math.degrees(2 * math.atan2(float((one - other).norm()), float((one + other).norm())))
    step = 1.0 if isinstance(layer.rule, (Backprop, Kaczmarz)) else exact_number(layer.rule, "target_step")
    missed = wished = 0.0
    for input, output, grad in calls:
        displacement = -step * grad
        # forward itself, past the model's hooks
        reached = layer.forward(input + layer.input_displacement(input, displacement))
        missed += float((reached - output - displacement).double().square().sum())
        wished += float(displacement.double().square().sum())
    gamma = exact_number(layer.rule, "gamma") if isinstance(layer.rule, RegularizedLeastSquares) else 0.0
    values = torch.linalg.svdvals(layer.weight.double())
    least = float(values[-1]) ** 2 + gamma
    return LayerDiagnostics(
        name,
        angle,
        norm / exact_norm if exact_norm > 0 else math.nan,
        math.sqrt(missed / wished) if wished > 0 else math.nan,
        (float(values[0]) ** 2 + gamma) / least if least > 0 else math.inf,
    )
