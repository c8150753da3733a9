"""Diagnostics: numbers derived by hand, and a model that stays as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tpext
from tpext import Backprop, ConstrainedLeastSquares, DifferenceTargetPropagation, Kaczmarz, RegularizedLeastSquares
from tpext.diagnostics import displacement_norms, layer_diagnostics, recurrent_angles
from tpext.nn import MLP, TargetLinear
from tpext.reference import regularized_inverse, rnn_scan, rnn_target_scan

DOUBLE = torch.float64


def square(x: torch.Tensor) -> Any:
    return lambda model: model(x).square().mean()


def test_backprop_agrees_with_itself() -> None:
    net = MLP([5, 4, 3], rule=Backprop(), dtype=DOUBLE)
    for layer in layer_diagnostics(net, square(torch.randn(7, 5, dtype=DOUBLE))):
        assert layer.angle < 1e-6
        assert layer.norm_ratio == pytest.approx(1)


def test_angle_and_norm_ratio() -> None:
    """Those of the gradients that the passes themselves leave."""
    net = MLP([5, 4, 3], rule=RegularizedLeastSquares(reg=0.1), dtype=DOUBLE)
    loss = square(torch.randn(7, 5, dtype=DOUBLE))
    vectors = []
    for rule in (net.rule, Backprop()):
        one = copy.deepcopy(net)
        one.rule = rule
        loss(one).backward()
        vectors.append([torch.cat([p.grad.flatten() for p in layer.parameters()]).numpy() for layer in one])
    for layer, a, b in zip(layer_diagnostics(net, loss), *vectors, strict=True):
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        # an arc cosine near 1 has half of the digits
        assert layer.angle == pytest.approx(math.degrees(math.acos(min(cosine, 1.0))), abs=1e-5)
        assert layer.norm_ratio == pytest.approx(np.linalg.norm(a) / np.linalg.norm(b))


def test_inverse_residual() -> None:
    """A square layer's exact inverse reaches its target, a strongly regularised one stays."""
    x = torch.randn(7, 4, dtype=DOUBLE)
    exact = MLP([4, 4, 4], rule=ConstrainedLeastSquares(target_step=1e-3), dtype=DOUBLE)
    assert all(layer.inverse_residual < 1e-6 for layer in layer_diagnostics(exact, square(x)))
    stays = MLP([4, 4], rule=RegularizedLeastSquares(reg=1e9), dtype=DOUBLE)
    assert layer_diagnostics(stays, square(x))[0].inverse_residual == pytest.approx(1)
    # Of one linear unit y = w x without a bias, d_x = d w / (w^2 + reg).
    one = TargetLinear(1, 1, False, rule=RegularizedLeastSquares(reg=0.5), dtype=DOUBLE)
    nn.init.constant_(one.weight, 2.0)
    layer = layer_diagnostics(one, square(x[:, :1]))[0]
    # reg also counts in the activation's inverse, here the identity's: d / (1 + reg)
    assert layer.inverse_residual == pytest.approx(1 - 4 / 4.5 / 1.5)
    assert layer.condition == 1.0


@pytest.mark.parametrize(("rule", "reg"), [(RegularizedLeastSquares(reg=0.3), 0.3), (DifferenceTargetPropagation(), 0)])
@pytest.mark.parametrize("sizes", [[5, 3], [3, 5], [4, 4]])
def test_condition_number(rule: Any, reg: float, sizes: list[int]) -> None:
    net = MLP(sizes, rule=rule, dtype=DOUBLE)
    W = net[0].weight.detach().numpy()
    gram = W.T @ W if sizes[0] <= sizes[1] else W @ W.T
    expected = np.linalg.cond(gram + reg * np.eye(len(gram)))
    layer = layer_diagnostics(net, square(torch.randn(7, sizes[0], dtype=DOUBLE)))[0]
    assert layer.condition == pytest.approx(expected, rel=1e-9)


def test_nothing_to_measure() -> None:
    net = MLP([5, 4, 3], "identity", dtype=DOUBLE)
    nn.init.zeros_(net[1].weight)
    below, above = layer_diagnostics(net, lambda model: 0 * model(torch.ones(2, 5, dtype=DOUBLE)).sum())
    assert math.isnan(below.angle)
    assert math.isnan(above.norm_ratio)
    assert math.isnan(above.inverse_residual)
    zero = copy.deepcopy(net)
    zero.rule = ConstrainedLeastSquares()
    nn.init.zeros_(zero[0].weight)
    with pytest.raises(Exception, match="singular"):
        layer_diagnostics(zero, square(torch.ones(2, 5, dtype=DOUBLE)))


def test_model_and_random_state_stay() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), MLP([4, 4, 3]))
    net(torch.randn(7, 5)).sum().backward()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    layers = layer_diagnostics(net, square(torch.randn(7, 5, generator=torch.Generator().manual_seed(0))))
    assert [layer.name for layer in layers] == ["3.0", "3.1"]
    # The same dropout in both passes: the linear last layer's own gradient has the direction of back-propagation's.
    assert layers[1].angle < 1
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads, strict=True))
    assert not any(module._forward_hooks for module in net.modules())


def test_layers_used_twice_and_not_at_all() -> None:
    net = nn.ModuleDict({"used": TargetLinear(4, 4, dtype=DOUBLE), "unused": TargetLinear(4, 4, dtype=DOUBLE)})
    x = torch.randn(7, 4, dtype=DOUBLE)
    layers = layer_diagnostics(net, lambda model: model["used"](model["used"](x)).square().mean())
    assert [layer.name for layer in layers] == ["used"]


def test_needs_a_layer() -> None:
    with pytest.raises(ValueError, match=r"model must have a tpext\.nn\.TargetLinear, got Linear"):
        layer_diagnostics(nn.Linear(3, 2), square(torch.ones(1, 3)))


def test_frozen_layers_and_no_grad() -> None:
    """The gradients of a frozen model, asked for where none are recorded, are those of a trainable one."""
    net = MLP([5, 4, 3], "tanh", rule=RegularizedLeastSquares(reg=0.1, target_step=5.0), dtype=DOUBLE)
    loss = square(torch.randn(7, 5, dtype=DOUBLE))
    expected = layer_diagnostics(net, loss)
    net.requires_grad_(False)
    with torch.no_grad():
        assert layer_diagnostics(net, loss) == expected


def test_residual_is_of_the_rules_own_displacement() -> None:
    """``d = -target_step g``, which for a bent activation matters."""
    x = torch.randn(7, 4, dtype=DOUBLE)
    net = MLP([4, 4], output_activation="tanh", rule=RegularizedLeastSquares(reg=0.1, target_step=20.0), dtype=DOUBLE)
    (layer,), h = layer_diagnostics(net, square(x)), net(x).detach()
    d = -20.0 * 2 * h / h.numel()
    missed = net(x + net[0].input_displacement(x, d)) - h - d
    assert layer.inverse_residual == pytest.approx(float((missed.norm() / d.norm()).detach()))


def test_hooks_and_keywords() -> None:
    """Layers called by keyword, and a hook of the model's that changes an output: the layer's own output counts."""
    x = torch.randn(7, 4, dtype=DOUBLE)
    net = MLP([4, 4, 4], rule=RegularizedLeastSquares(reg=0.1), dtype=DOUBLE)
    plain = layer_diagnostics(net, lambda model: (model[1](input=model[0](input=x)) + 1).square().mean())
    net[1].register_forward_hook(lambda module, args, output: output + 1)
    hooked = layer_diagnostics(net, square(x))
    assert [layer.inverse_residual for layer in hooked] == pytest.approx([layer.inverse_residual for layer in plain])


def test_random_numbers_are_the_same_in_both_passes() -> None:
    net = nn.Sequential(
        MLP([5, 4], rule=Backprop(), dtype=DOUBLE), nn.Dropout(), MLP([4, 3], rule=Backprop(), dtype=DOUBLE)
    )
    state = torch.get_rng_state()
    layers = layer_diagnostics(net, square(torch.ones(7, 5, dtype=DOUBLE)))
    assert all(layer.angle < 1e-6 for layer in layers)
    assert torch.equal(torch.get_rng_state(), state)


def test_loss_must_use_the_model_that_it_is_given() -> None:
    net = MLP([5, 4, 3])
    x = torch.randn(7, 5)
    with pytest.raises(ValueError, match="layer_diagnostics: loss must call the model that it is given"):
        layer_diagnostics(net, lambda model: net(x).sum())


def test_units_without_a_slope_are_refused() -> None:
    net = MLP([4, 6, 3], "n_hot", rule=Kaczmarz())
    with pytest.raises(ValueError, match="layer_diagnostics: back-propagation does not pass the units of layer '0'"):
        layer_diagnostics(net, square(torch.randn(7, 4)))


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_recurrent_angles_are_those_of_the_gradients(cell: str) -> None:
    rule = tpext.RegularizedInverse(reg=0.5, credit="local")
    rnn = getattr(tpext.nn, cell)(3, 4, 2, dropout=0.3, rule=rule)
    model = nn.Sequential(rnn)
    input = torch.randn(6, 5, 3, dtype=torch.float64)

    def loss(model: nn.Module) -> Tensor:
        return model(input)[0].square().sum()

    state = torch.get_rng_state()
    angles = recurrent_angles(model, loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert rnn.rule is rule
    gradients = []
    for of in (rule, tpext.Backprop()):
        net = copy.deepcopy(model).double()
        net[0].rule = of
        torch.set_rng_state(state)
        loss(net).backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    assert list(angles) == [name for name, _ in model.named_parameters()]
    for name, exact in gradients[1].items():
        ours = gradients[0][name]
        cosine = float((ours * exact).sum() / ours.norm() / exact.norm())
        assert angles[name].angle == pytest.approx(math.degrees(math.acos(min(1.0, cosine))), abs=1e-5)
        assert angles[name].distance == pytest.approx(float((ours - exact).norm() / exact.norm()))


def test_recurrent_angles_need_a_recurrent_layer() -> None:
    with pytest.raises(ValueError, match=r"recurrent_angles: model must have a tpext\.nn\.RNN, GRU or LSTM"):
        recurrent_angles(nn.Linear(2, 2), lambda net: torch.zeros(()))
    with pytest.raises(TypeError, match=r"recurrent_angles: model must be a torch\.nn\.Module, got int"):
        recurrent_angles(3, lambda net: torch.zeros(()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="recurrent_angles: the value of loss must be a tensor, got float"):
        recurrent_angles(tpext.nn.RNN(2, 2), lambda net: 1.0)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("correction", ["linearized", "difference"])
@pytest.mark.parametrize("every_step", [False, True])
def test_displacement_norms_are_the_oracles(correction: Any, every_step: bool) -> None:
    """Of rows of several lengths, in both directions."""
    rule = tpext.RegularizedInverse(reg=0.7, target_step=0.1, correction=correction)
    rnn = tpext.nn.RNN(3, 4, bidirectional=True, rule=rule).double()
    input, lengths = torch.randn(6, 3, 3, dtype=DOUBLE), torch.tensor([6, 4, 0])
    found = displacement_norms(rnn, lambda rnn: rnn(input, lengths=lengths)[0 if every_step else 1].square().sum() / 2)
    assert list(found) == ["weight_hh_l0", "weight_hh_l0_reverse"]
    weights = {name: parameter.detach().numpy() for name, parameter in rnn.named_parameters()}
    for end, reverse in (("", False), ("_reverse", True)):
        U, W, b, c = (weights[f"{name}_l0{end}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        x_proj, h0 = (input.numpy() @ U.T + b + c)[None], np.zeros((1, 3, 4))
        states = np.asarray(rnn_scan(x_proj, h0, W[None], lengths.numpy(), [reverse], "tanh"))
        last = np.zeros((1, 3, 4)) if reverse else h0.copy()
        for row, length in enumerate(lengths):
            if length > 0:
                last[0, row] = states[0, 0 if reverse else length - 1, row]
        inverse = regularized_inverse(W[None], 0.7)
        _, first, norms, *_ = rnn_target_scan(
            states if every_step else None, states, h0, W[None], inverse, None, lengths.numpy(), [reverse], "tanh",
            correction, "local", 0.1, rule.margin, True, False, disp_n=None if every_step else -0.1 * last,
        )  # fmt: skip
        steps = np.linalg.norm(np.asarray(norms)[0], axis=1)
        expected = [np.linalg.norm(first), *(steps[::-1] if reverse else steps)]
        np.testing.assert_allclose(found[f"weight_hh_l0{end}"].numpy(), np.array(expected) / 0.1, rtol=1e-10)


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("rule", [tpext.Backprop(), tpext.RegularizedInverse(reg=0.5, credit="local", target_step=0.2)])
def test_displacement_norms_are_what_single_steps_hand_back(cell: str, rule: Any) -> None:
    rnn = getattr(tpext.nn, cell)(3, 4, rule=rule).double()
    input = torch.randn(5, 2, 3, dtype=DOUBLE)
    model, before = nn.Sequential(rnn), torch.get_rng_state()

    def loss(output: Tensor) -> Tensor:
        return (output.square() * torch.rand(5, 1, 1, generator=torch.Generator().manual_seed(0)).double()).sum()

    found = displacement_norms(model, lambda model: loss(model(input)[0]))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert rnn.rule is rule
    kinds = 2 if cell == "LSTM" else 1
    states = [tuple(torch.zeros(1, 2, 4, dtype=DOUBLE, requires_grad=True) for _ in range(kinds))]
    outputs = []
    for step in input.split(1):
        _, state = rnn(step, states[-1] if kinds == 2 else states[-1][0])
        # one h for the loss and for the next step
        h, *rest = state if kinds == 2 else (state,)
        outputs.append(h)
        states.append((h, *rest))
    wanted = [kind for state in states for kind in state]
    grads = torch.autograd.grad(loss(torch.cat(outputs)), wanted, materialize_grads=True, allow_unused=True)
    norms = [torch.cat(grads[i : i + kinds]).norm() for i in range(0, len(grads), kinds)]
    torch.testing.assert_close(found["0.weight_hh_l0"], torch.stack(norms), rtol=1e-10, atol=0)


def test_displacement_norms_need_one_call_of_a_recurrent_layer() -> None:
    with pytest.raises(ValueError, match=r"displacement_norms: model must have a tpext\.nn\.RNN, GRU or LSTM"):
        displacement_norms(nn.Linear(2, 2), lambda net: torch.zeros(()))
    ensemble = tpext.nn.Ensemble([tpext.nn.RNN(2, 2), tpext.nn.RNN(2, 2)])
    with pytest.raises(ValueError, match="displacement_norms: model must have no Ensemble, got one as '0'"):
        displacement_norms(nn.Sequential(ensemble), lambda net: torch.zeros(()))
    input = torch.randn(3, 2, 2, dtype=DOUBLE)
    with pytest.raises(ValueError, match="displacement_norms: loss must call each recurrent module once"):
        displacement_norms(tpext.nn.RNN(2, 2), lambda rnn: rnn(rnn(input)[0])[0].sum())
