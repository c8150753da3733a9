"""What a rule does to a network, layer by layer, beside back-propagation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from tpext.feedback.trainer import weight_alignment
from tpext.nn.ensemble import Ensemble
from tpext.nn.linear import TargetLinear
from tpext.nn.recurrent import RecurrentLayers
from tpext.nn.sequential import TargetSequential
from tpext.ops._library import check_tensor
from tpext.ops._members import as_list
from tpext.rules import Backprop, RecurrentRule
from tpext.rules.gated_call import GatedWeights
from tpext.rules.recurrent_call import LayerWeights
from tpext.rules.recurrent_pass import Gradients, Piece, State, StateOrNone, Sweep

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
            ``W'W + reg I`` and ``WW' + reg I``; ``reg`` is 0 for rules without one.
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
    if not isinstance(model, nn.Module):
        raise TypeError(f"layer_diagnostics: model must be a torch.nn.Module, got {type(model).__name__}")
    by_rule = copy.deepcopy(model)
    layers = {name: module for name, module in by_rule.named_modules() if isinstance(module, TargetLinear)}
    if not layers:
        raise ValueError(
            f"layer_diagnostics: model must have a tpext.nn.TargetLinear, got {type(model).__name__}; recurrent layers "
            "have recurrent_angles, a TargetSequential gradient_angles"
        )
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
    check_tensor("layer_diagnostics", "the value of loss", value)
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
    angle = _angle(gradient, exact, norm, exact_norm)
    step = layer.rule.target_step
    missed = wished = 0.0
    for input, output, grad in calls:
        displacement = -step * grad
        # forward itself, past the model's hooks
        reached = layer.forward(input + layer.input_displacement(input, displacement))
        missed += float((reached - output - displacement).double().square().sum())
        wished += float(displacement.double().square().sum())
    reg = layer.rule.reg
    values = torch.linalg.svdvals(layer.weight.double())
    least = float(values[-1]) ** 2 + reg
    return LayerDiagnostics(
        name,
        angle,
        norm / exact_norm if exact_norm > 0 else math.nan,
        math.sqrt(missed / wished) if wished > 0 else math.nan,
        (float(values[0]) ** 2 + reg) / least if least > 0 else math.inf,
    )


@dataclass(frozen=True)
class GradientAngle:
    """How a gradient compares with back-propagation's, as :func:`gradient_angles` and :func:`recurrent_angles` give it.

    Attributes:
        angle: between the two, in degrees; nan if one is zero.
        distance: norm of their difference by that of back-propagation's; nan if that is zero.
    """

    angle: float
    distance: float


def gradient_angles(
    net: TargetSequential,
    input: Tensor,
    target: Tensor,
    *,
    target_step: float | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> dict[str, GradientAngle]:
    """Compare the gradients of a network's blocks with back-propagation's on one batch.

    A block's gradient is that of its weights as one vector; biases and other parameters of one dimension are left out,
    as published. The rule's gradients are divided by its ``target_step``. All is computed in float64 on a copy, so
    parameters, gradients, statistics and random state of the network stay as they are.

    Args:
        net: the network.
        input: ``[B, ...]``.
        target: what the loss takes besides, ``[B]`` classes by default.
        target_step: instead of the rule's; a small one (published: 0.005) shows the targets' linear part.
        loss: takes output and target.

    Returns:
        By the names of the blocks, the first one first; blocks without weights are left out.

    Cost: two passes forward and backward in float64, and a copy of the network.

    Source: Ernoult et al., "Towards Scaling Difference Target Propagation by Learning Backprop Targets", ICML 2022, the
    callback of their code and figure 4.3.

    >>> import torch, tpext
    >>> net = tpext.nn.TargetSequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3), feedback_init="tied")
    >>> angles = gradient_angles(net, torch.randn(5, 4), torch.arange(5) % 3)
    >>> {name: round(one.angle, 6) for name, one in angles.items()}
    {'0': 0.0, '1': 0.0}
    """
    _check_network("gradient_angles", net, input)
    by_rule = _double(net)
    if not net.rule.exact:
        step = net.rule.target_step if target_step is None else target_step
        by_rule.rule = replace(net.rule, normalize=True, target_step=step)
    by_backprop = copy.deepcopy(by_rule)
    by_backprop.rule = Backprop()
    found = []
    for one in (by_rule, by_backprop):
        # Forked twice, from the same state of every device's generator.
        with torch.random.fork_rng(), torch.enable_grad():
            found.append(_block_gradients(one, input.double(), target, loss))
    return {name: _gradient_angle(found[0][name], exact) for name, exact in found[1].items()}


def recurrent_angles(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, GradientAngle]:
    """Compare the gradients of a model's recurrent layers with back-propagation's.

    The passes run on copies of the model in float64, with the same random numbers: model, gradients and random state
    stay as they are. Back-propagation takes the place of the rule in every layer, so what a layer's rule hands to the
    layers below it shows in theirs.

    Args:
        model: any model with :class:`tpext.nn.RNN`, :class:`tpext.nn.GRU` or :class:`tpext.nn.LSTM` in it, or one of
            them.
        loss: takes a model, in float64, and returns the scalar loss; it must use the model that it is given.

    Returns:
        By the names of the layers' parameters, those of a rule's own apart; in their order.

    Raises:
        ValueError: the model has no such layer.
        TypeError: ``model`` is no module.

    >>> import tpext
    >>> rnn = tpext.nn.RNN(3, 8, rule=tpext.RegularizedInverse(reg=1e9))  # back-propagation, nearly
    >>> input = torch.randn(5, 2, 3, dtype=torch.float64)
    >>> angles = recurrent_angles(rnn, lambda rnn: rnn(input)[0].sum())
    >>> list(angles), angles["weight_hh_l0"].angle < 1e-3
    (['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'bias_hh_l0'], True)
    """
    by_rule, by_backprop = (_recurrent_copy("recurrent_angles", model) for _ in range(2))
    for module in by_backprop.modules():
        if isinstance(module, RecurrentLayers):
            # past the setter, which guards the parameters that an optimizer has
            module._rule = Backprop()
    found = []
    for net in (by_rule, by_backprop):
        with torch.random.fork_rng():
            found.append(_recurrent_gradients("recurrent_angles", net, loss))
    gradients, exact = found
    return {name: _gradient_angle(gradient, exact[name]) for name, gradient in gradients.items() if name in exact}


def displacement_norms(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Measure by how much a rule displaces each state of a model's recurrent layers on one batch.

    ``||d_t|| / target_step`` over batch and units, where ``h_t + d_t`` is the target of the state ``h_t``; the state of
    an LSTM is ``(h, c)``. Under back-propagation that is the norm of the loss's gradient with respect to ``h_t``. Steps
    beyond ``lengths`` count as zero. The pass runs on a copy of the model in float64, step by step: model, gradients
    and random state stay as they are.

    Args:
        model: any model with :class:`tpext.nn.RNN`, :class:`tpext.nn.GRU` or :class:`tpext.nn.LSTM` in it, or one of
            them.
        loss: takes a model, in float64, and returns the scalar loss; it must use the model that it is given, and call
            each of its recurrent modules once.

    Returns:
        A float64 vector ``[T + 1]`` for each layer and direction that the loss depends on, by the names of their
        ``weight_hh``: of the initial state, and of the state after each step in the order in which they are run.

    Raises:
        ValueError: the model has no such layer, or an Ensemble of them, or one is called twice.
        TypeError: ``model`` is no module.

    Cost: a backward pass in T calls.

    Source: V. Roulet and Z. Harchaoui, "Target Propagation via Regularized Inversion for Recurrent Neural Networks",
    TMLR 2023, the norms of displacements over time.

    >>> import tpext
    >>> rnn = tpext.nn.RNN(3, 8, rule=tpext.RegularizedInverse(reg=1))
    >>> input = torch.randn(5, 2, 3, dtype=torch.float64)
    >>> norms = displacement_norms(rnn, lambda rnn: rnn(input)[1].sum())["weight_hh_l0"]
    >>> norms.shape, round(norms[-1].item(), 3)
    (torch.Size([6]), 4.0)
    """
    copied = _recurrent_copy("displacement_norms", model)
    found: dict[str, list[Tensor]] = {}
    for name, module in copied.named_modules():
        if isinstance(module, Ensemble):
            raise ValueError(f"displacement_norms: model must have no Ensemble, got one as {name!r}; give it a member")
        if isinstance(module, RecurrentLayers):
            module.checkpoint_every = 1
            # past the setter, as above
            module._rule = _recording(module, f"{name}." if name else "", found)
    with torch.random.fork_rng():
        _recurrent_gradients("displacement_norms", copied, loss)
    return {name: torch.stack(found[name][::-1]) for name in reversed(found)}


def _recording(module: RecurrentLayers, prefix: str, found: dict[str, list[Tensor]]) -> RecurrentRule:
    """A module's rule, which also leaves in ``found`` the norms of the displacements, the last state's first."""
    kind: type[RecurrentRule] = type(module.rule)

    class Recording(kind):  # type: ignore[misc,valid-type]
        def start_sweep(self, layer: LayerWeights) -> Sweep:
            return _recorded(kind.start_sweep(self, layer), norms_of(layer.weight_hh))

        def start_gated_sweep(self, layer: GatedWeights) -> Sweep:
            return _recorded(kind.start_gated_sweep(self, layer), norms_of(layer.weight_hh))

    def norms_of(weight_hh: Tensor) -> list[Tensor]:
        # pieces go through one direction at a time, the last layer's first
        for key in reversed([name for names in module._all_weights for name in names if "weight_hh" in name]):
            if prefix + key not in found and torch.equal(weight_hh[0], getattr(module, key)):
                return found.setdefault(prefix + key, [])
        raise ValueError("displacement_norms: loss must call each recurrent module once")

    return Recording(**{field.name: getattr(module.rule, field.name) for field in fields(module.rule)})


def _recorded(sweep: Sweep, norms: list[Tensor]) -> Sweep:
    """A sweep over pieces of one step that leaves the norms of the displacements at both ends of each."""
    (unit,) = as_list(sweep.unit)

    def norm(state: StateOrNone, valid: Tensor | None) -> Tensor:
        # unstacked, a row for each sample
        kinds = [kind[0] if valid is None else kind[0] * valid[:, None] for kind in state if kind is not None]
        size: Tensor = torch.linalg.vector_norm(torch.cat(kinds, dim=-1))
        return size / abs(unit)

    def run(
        piece: Piece, grad_states: Tensor | None, arriving: StateOrNone, credit: StateOrNone
    ) -> tuple[Gradients, State, StateOrNone]:
        after = arriving
        if grad_states is not None:
            own = unit * grad_states[:, 0]
            after = (own if arriving[0] is None else own + arriving[0], *arriving[1:])
        gradients, before, credit = sweep.run(piece, grad_states, arriving, credit)
        # the state before one step is that after another, whose own gradient it lacks here
        norms[-1:] = [norm(after, piece.lengths), norm(before, None)]
        return gradients, before, credit

    return Sweep(run, sweep.unit, fades=False)


def _recurrent_copy(op: str, model: nn.Module) -> nn.Module:
    """A model with recurrent layers, in float64."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    copied = copy.deepcopy(model).double()
    if not any(isinstance(module, RecurrentLayers) for module in copied.modules()):
        raise ValueError(f"{op}: model must have a tpext.nn.RNN, GRU or LSTM, got {type(model).__name__}")
    return copied


def _recurrent_gradients(op: str, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    named = {
        f"{name}.{key}" if name else key: parameter.requires_grad_()
        for name, module in model.named_modules()
        if isinstance(module, RecurrentLayers)
        for key, parameter in module.named_parameters()
        if key not in module.owned_names
    }
    with torch.enable_grad():
        value = loss(model)
    check_tensor(op, "the value of loss", value)
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def feedback_angles(net: TargetSequential, input: Tensor) -> dict[str, float]:
    """Return the angle in degrees between each block's weight and that of its feedback, transposed.

    Args:
        net: the network; it stays as it is.
        input: a batch ``[B, ...]``, which may be of one sample.

    Returns:
        By the names of the blocks that begin with a linear map and have feedback with one of the transposed shape, in
        their order.

    >>> import torch, tpext
    >>> net = tpext.nn.TargetSequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3), feedback_init="symmetric")
    >>> {name: round(angle, 4) for name, angle in feedback_angles(net, torch.zeros(1, 4)).items()}
    {'1': 0.0}
    """
    _check_network("feedback_angles", net, input)
    with torch.random.fork_rng(), torch.no_grad():
        calls = _double(net).eval().trace(input.double()).calls
    angles = {}
    for (name, _), call in zip(net.blocks.named_children(), calls, strict=True):
        angle, _ = weight_alignment(call)
        if angle is not None:
            angles[name] = float(angle)
    return angles


def _check_network(op: str, net: object, input: object) -> None:
    if not isinstance(net, TargetSequential):
        raise TypeError(f"{op}: net must be a TargetSequential, got {type(net).__name__}")
    check_tensor(op, "input", input, "[B, ...]")


def _double(net: TargetSequential) -> TargetSequential:
    return copy.deepcopy(net).double()


def _block_gradients(
    net: TargetSequential, input: Tensor, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    weights = {
        name: [parameter.requires_grad_() for parameter in block.parameters() if parameter.dim() > 1]
        for name, block in net.blocks.named_children()
    }
    value = loss(net(input), target)
    check_tensor("gradient_angles", "the value of loss", value)
    wanted = [weight for block in weights.values() for weight in block]
    gradients = iter(torch.autograd.grad(value, wanted))
    return {name: torch.cat([next(gradients).flatten() for _ in block]) for name, block in weights.items() if block}


def _gradient_angle(gradient: Tensor, exact: Tensor) -> GradientAngle:
    norm, exact_norm = float(gradient.norm()), float(exact.norm())
    distance = float((gradient - exact).norm()) / exact_norm if exact_norm > 0 else math.nan
    return GradientAngle(_angle(gradient, exact, norm, exact_norm), distance)


def _angle(one: Tensor, other: Tensor, norm: float, other_norm: float) -> float:
    """The angle in degrees between two vectors of known norms, nan if one is zero."""
    if not (norm > 0 and other_norm > 0):
        return math.nan
    # Of the unit vectors, as the angle's cosine loses half the digits of a small one.
    one, other = one / norm, other / other_norm
    return math.degrees(2 * math.atan2(float((one - other).norm()), float((one + other).norm())))
