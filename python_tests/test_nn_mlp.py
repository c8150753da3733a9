"""Feed-forward target propagation: the rules' equations, identities with back-propagation, module behaviour, errors."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mlp_cases import DOUBLE, assert_equal
from torch import Tensor, nn
from torch.nn import functional

import tpext
from tpext import (
    Backprop,
    ConstrainedLeastSquares,
    DifferenceTargetPropagation,
    RegularizedInverse,
    RegularizedLeastSquares,
)
from tpext.nn import MLP, TargetLinear
from tpext.ops import Activation, layer_displacement

NAMES = ["tanh", "sigmoid", "relu", "leaky_relu", "identity"]
TARGET_RULES = [
    ConstrainedLeastSquares(target_step=0.25, local_loss="pre"),
    ConstrainedLeastSquares(target_step=0.25),
    RegularizedLeastSquares(reg=0.1, target_step=0.5, local_loss="pre"),
    RegularizedLeastSquares(reg=0.1, target_step=0.5, form="ridge"),
    DifferenceTargetPropagation(target_step=0.5, noise=0.1),
    DifferenceTargetPropagation(correction="none"),
]
RULES = [Backprop(), *TARGET_RULES]


# The rules' equations


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "rule",
    [
        ConstrainedLeastSquares(target_step=0.25),
        RegularizedLeastSquares(reg=0.1, target_step=0.5),
        RegularizedLeastSquares(reg=0.1, target_step=0.5, form="ridge"),
        RegularizedLeastSquares(reg=0.0, target_step=0.25, margin=0.05),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(5, 4), (4,), (2, 3, 4), (0, 4)])
def test_hands_down_the_layers_inverse(name: Any, bias: bool, rule: Any, shape: tuple[int, ...]) -> None:
    layer = TargetLinear(4, 3, bias, activation=name, rule=rule, dtype=DOUBLE)
    x = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    output = layer(x)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    step = rule.target_step
    reg = getattr(rule, "reg", 0.0)
    moved = layer_displacement(
        -step * cotangent,
        x.detach(),
        layer.weight.detach(),
        None if layer.bias is None else layer.bias.detach(),
        name,
        method="regularized" if reg > 0 else "constrained",
        reg=reg,
        form=getattr(rule, "form", "proximal"),
        margin=rule.margin,
    )
    # Near the edges the activation's inverse amplifies rounding by up to 1 / margin.
    torch.testing.assert_close(x.grad, -moved / step, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.input_displacement(x, -step * cotangent), moved, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("correction", ["difference", "none"])
def test_hands_down_the_learned_inverse(correction: Any) -> None:
    rule = DifferenceTargetPropagation(target_step=0.5, correction=correction)
    layer = TargetLinear(4, 3, activation="tanh", rule=rule, reverse_activation="sigmoid", dtype=DOUBLE)
    nn.init.normal_(layer.reverse_bias)
    x = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    output = layer(x)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    V, c, h, d = layer.reverse_weight.detach(), layer.reverse_bias.detach(), output.detach(), -0.5 * cotangent

    def reverse(v: Tensor) -> Tensor:
        return torch.sigmoid(v @ V.T + c)

    moved = reverse(h + d) - (reverse(h) if correction == "difference" else x.detach())
    assert_equal(x.grad, -moved / 0.5)
    assert_equal(layer.input_displacement(x, d), moved)
    assert layer.reverse_weight.grad is None
    assert layer.reverse_bias.grad is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("local_loss", ["pre", "post"])
@pytest.mark.parametrize("kind", [ConstrainedLeastSquares, RegularizedLeastSquares])
def test_parameters_get_the_gradient_of_the_local_loss(name: Any, normalize: bool, local_loss: Any, kind: Any) -> None:
    rule = kind(target_step=0.5, normalize=normalize, local_loss=local_loss)
    layer = TargetLinear(4, 3, activation=name, rule=rule, dtype=DOUBLE)
    x = torch.randn(5, 4, dtype=DOUBLE)
    output = layer(x)
    d = 0.1 * torch.randn_like(output)
    output.backward(d / -rule.target_step)
    weight, bias = (p.detach().clone().requires_grad_(True) for p in (layer.weight, layer.bias))
    before = functional.linear(x, weight, bias)
    if local_loss == "post":
        loss = 0.5 * (layer.activation(before) - (output + d).detach()).square().sum()
    else:
        center, reached = before.detach(), output.detach()
        if kind is ConstrainedLeastSquares:
            z = [layer.activation.inverse(v, center, rule.margin) for v in (reached + d, reached)]
        else:
            z = [layer.activation.regularized_inverse(v, center, rule.reg) for v in (reached + d, reached)]
        loss = 0.5 * (before - (center + z[0] - z[1])).square().sum()
    loss.backward()
    scale = 1 / rule.target_step if normalize else 1.0
    assert_equal(layer.weight.grad, weight.grad * scale)
    assert_equal(layer.bias.grad, bias.grad * scale)


# Identities


@pytest.mark.parametrize("name", NAMES)
def test_backprop_equals_torch_exactly(name: Any) -> None:
    ours = MLP([6, 5, 4, 3], name, rule=Backprop())
    activation = {
        "tanh": nn.Tanh(),
        "sigmoid": nn.Sigmoid(),
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(),
        "identity": nn.Identity(),
    }[name]
    torch.manual_seed(7)
    ours.apply(lambda module: module.reset_parameters() if isinstance(module, TargetLinear) else None)
    torch.manual_seed(7)
    linears = [nn.Linear(n, m) for n, m in itertools.pairwise([6, 5, 4, 3])]
    theirs = nn.Sequential(linears[0], activation, linears[1], activation, linears[2])
    x = torch.randn(7, 6, requires_grad=True)
    grads = []
    for net in (ours, theirs):
        assert torch.equal(net(x), ours(x))
        grads.append(torch.autograd.grad(net(x).square().mean(), [x, *net.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_backprop_has_second_derivatives() -> None:
    layer = TargetLinear(3, 2, activation="tanh", rule=Backprop(), dtype=DOUBLE)
    assert torch.autograd.gradgradcheck(layer, (torch.randn(4, 3, dtype=DOUBLE, requires_grad=True),))


@pytest.mark.parametrize("local_loss", ["pre", "post"])
@pytest.mark.parametrize(
    "rule", [ConstrainedLeastSquares(target_step=0.3), RegularizedLeastSquares(reg=0.0, target_step=0.3)], ids=repr
)
def test_orthogonal_linear_networks_back_propagate(rule: Any, local_loss: Any) -> None:
    """The inverse of an orthogonal matrix is its transpose."""
    rule = dataclasses.replace(rule, local_loss=local_loss)
    net = MLP([5, 5, 5, 5], "identity", rule=rule, dtype=DOUBLE)
    for layer in net:
        nn.init.orthogonal_(layer.weight)
    exact = copy.deepcopy(net)
    exact.rule = Backprop()
    x = torch.randn(7, 5, dtype=DOUBLE, requires_grad=True)
    grads = [torch.autograd.grad(n(x).pow(4).mean(), [x, *n.parameters()]) for n in (net, exact)]
    for actual, expected in zip(*grads, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_large_reg_leaves_the_layers_own_gradient(name: Any) -> None:
    rule = RegularizedLeastSquares(reg=1e12, target_step=0.5, local_loss="post")
    layer = TargetLinear(4, 3, activation=name, rule=rule, dtype=DOUBLE)
    exact = TargetLinear(4, 3, activation=name, rule=Backprop(), dtype=DOUBLE)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    grads = [torch.autograd.grad(n(x).square().mean(), [x, *n.parameters()]) for n in (layer, exact)]
    assert grads[0][0].abs().max() < 1e-20 < grads[1][0].abs().max()
    for actual, expected in zip(grads[0][1:], grads[1][1:], strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("rule", TARGET_RULES[:-1], ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_no_displacement_hands_down_exactly_zero(rule: Any, name: Any) -> None:
    """Even of saturated units, and in float32."""
    layer = TargetLinear(4, 3, activation=name, rule=rule)
    x = (10 * torch.randn(50, 4)).requires_grad_(True)
    layer(x).backward(torch.zeros(50, 3))
    assert x.grad is not None
    assert not x.grad.any()
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()


@pytest.mark.parametrize("local_loss", ["pre", "post"])
@pytest.mark.parametrize("name", NAMES)
def test_a_displacement_below_the_rounding_of_the_output_is_not_lost(name: Any, local_loss: Any) -> None:
    """In float32 it hands down what it is to first order, and twice the displacement twice that."""
    layer = TargetLinear(4, 3, activation=name, rule=RegularizedLeastSquares(reg=0.1, local_loss=local_loss))
    x, cotangent = torch.randn(50, 4, requires_grad=True), torch.randn(50, 3)
    inputs = [x, layer.weight, layer.bias]
    grads = [torch.autograd.grad(layer(x), inputs, scale * cotangent) for scale in (1e-12, 2e-12)]
    weight, before = layer.weight.detach(), functional.linear(x, layer.weight, layer.bias).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(layer.activation(before).sum(), before)
    moved = 1e-12 * cotangent * slope / (slope**2 + 0.1)
    expected = moved.double() @ torch.ops.tpext.regularized_inverse(weight.double(), 0.1).mT / 1.1
    assert_equal(grads[0][0].double(), expected, rtol=1e-5)
    for one, two in zip(*grads, strict=True):
        assert_equal(two, 2 * one, rtol=1e-5)


@pytest.mark.parametrize("rule", TARGET_RULES[:5], ids=repr)
def test_gradients_of_a_linear_network_scale_with_the_loss(rule: Any) -> None:
    net = MLP([5, 4, 3], "identity", rule=rule, dtype=DOUBLE)
    x = torch.randn(7, 5, dtype=DOUBLE)
    parameters = [p for name, p in net.named_parameters() if "reverse" not in name]
    grads = [torch.autograd.grad(s * net(x).square().mean(), parameters) for s in (1.0, 8.0)]
    for once, scaled in zip(*grads, strict=True):
        assert_equal(scaled, 8 * once)


@pytest.mark.parametrize("rule", TARGET_RULES, ids=repr)
def test_normalize_divides_by_the_step(rule: Any) -> None:
    net = MLP([5, 4, 3], rule=rule, dtype=DOUBLE)
    plain = copy.deepcopy(net)
    plain.rule = dataclasses.replace(rule, normalize=False)
    x = torch.randn(7, 5, dtype=DOUBLE)
    for one in (net, plain):
        one(x).square().mean().backward()
    for a, b in zip(net, plain, strict=True):
        assert_equal(b.weight.grad, rule.target_step * a.weight.grad)


@pytest.mark.parametrize("rule", TARGET_RULES, ids=repr)
def test_parts_of_a_batch_accumulate(rule: Any) -> None:
    """With a loss summed over the batch, and with a mean scaled by the part's share."""
    net, x = MLP([5, 4, 3], rule=rule, dtype=DOUBLE), torch.randn(8, 5, dtype=DOUBLE)
    net(x).square().mean().backward()
    whole = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    for part, share in ((x[:2], 0.25), (x[2:], 0.75)):
        (net(part).square().mean() * share).backward()
    for name, expected in whole.items():
        assert_equal(net.get_parameter(name).grad, expected)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_leading_dimensions_are_rows(rule: Any) -> None:
    layer = TargetLinear(4, 3, activation="tanh", rule=rule, dtype=DOUBLE)
    x, cotangent = torch.randn(2, 5, 4, dtype=DOUBLE), torch.randn(2, 5, 3, dtype=DOUBLE)
    grads = []
    for shape in ((2, 5), (10,), (5, 2)):
        rows = x.reshape(*shape, 4).requires_grad_(True)
        wanted = [rows, layer.weight, layer.bias]
        grads.append(torch.autograd.grad(layer(rows), wanted, cotangent.reshape(*shape, 3)))
    for one in grads[1:]:
        for actual, expected in zip(one, grads[0], strict=True):
            assert_equal(actual.reshape(expected.shape), expected)


@pytest.mark.parametrize("rule", TARGET_RULES[:4], ids=repr)
def test_small_displacements_of_large_outputs(rule: Any) -> None:
    """A linear layer's targets do not drown in the rounding of its outputs."""
    layer = TargetLinear(4, 3, rule=rule)
    x = (1e4 * torch.randn(5, 4)).requires_grad_(True)
    layer(x).backward(torch.full((5, 3), 1e-6))
    exact = TargetLinear(4, 3, rule=rule, dtype=DOUBLE)
    exact.load_state_dict(layer.state_dict())
    wide = x.detach().double().requires_grad_(True)
    exact(wide).backward(torch.full((5, 3), 1e-6, dtype=DOUBLE))
    assert_equal(x.grad.double(), wide.grad, rtol=1e-4)
    assert_equal(layer.bias.grad.double(), exact.bias.grad, rtol=1e-4)


# Learned inverses


def test_reconstruction_loss_refuses_another_dtype() -> None:
    net = MLP([6, 5, 4], "tanh", rule=DifferenceTargetPropagation())
    for of in (net, net[0]):
        with pytest.raises(ValueError, match=r"input must be torch\.float32 as weight is, got torch\.float64"):
            of.reconstruction_loss(torch.randn(7, 6, dtype=DOUBLE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net.reconstruction_loss(torch.randn(7, 6, dtype=torch.bfloat16)).dtype == torch.float32


def test_backward_of_the_loss_leaves_hooks_of_the_reverse_parameters_alone() -> None:
    net = MLP([6, 5, 4], "tanh", rule=DifferenceTargetPropagation())
    called: list[str] = []
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: called.append(name))
    net(torch.randn(7, 6)).square().sum().backward()
    assert sorted(called) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    called.clear()
    net.reconstruction_loss(torch.randn(7, 6)).backward()
    assert sorted(called) == ["1.reverse_bias", "1.reverse_weight"]


def test_reconstruction_loss() -> None:
    net = MLP([6, 5, 4], "tanh", rule=DifferenceTargetPropagation(noise=0.3), dtype=DOUBLE)
    x = torch.randn(7, 6, dtype=DOUBLE)
    torch.manual_seed(3)
    loss = net.reconstruction_loss(x)
    torch.manual_seed(3)
    h = net[0](x).detach()
    corrupted = h + 0.3 * torch.randn_like(h)
    reached = functional.linear(corrupted, net[1].weight, net[1].bias).detach()
    rebuilt = torch.tanh(functional.linear(reached, net[1].reverse_weight, net[1].reverse_bias))
    assert_equal(loss.detach(), ((rebuilt - corrupted) ** 2).sum(1).mean(0).detach())
    loss.backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {"1.reverse_weight", "1.reverse_bias"}
    expected = torch.autograd.grad(((rebuilt - corrupted) ** 2).sum(1).mean(0), [net[1].reverse_weight])[0]
    assert_equal(net[1].reverse_weight.grad, expected)


def test_reconstruction_loss_of_the_first_layer_only_where_its_inverse_is_used() -> None:
    net = MLP([6, 5, 4], rule=DifferenceTargetPropagation())
    net.reconstruction_loss(torch.randn(7, 6, requires_grad=True)).backward()
    assert net[0].reverse_weight.grad is not None
    single = MLP([6, 5], rule=DifferenceTargetPropagation())
    single.reconstruction_loss(torch.randn(7, 6)).backward()
    assert single[0].reverse_weight.grad is not None


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_reconstruction_loss_gives_nothing_to_what_made_its_input(noise: float) -> None:
    below, layer = nn.Linear(6, 5), TargetLinear(5, 4, activation="tanh", rule=DifferenceTargetPropagation())
    layer.reconstruction_loss(below(torch.randn(7, 6)), noise=noise).backward()
    assert below.weight.grad is None
    assert layer.reverse_weight.grad is not None


def test_reconstruction_loss_falls_and_the_inverse_gets_better() -> None:
    net = MLP([4, 4, 4], rule=DifferenceTargetPropagation(noise=0.1), dtype=DOUBLE)
    x = torch.randn(64, 4, dtype=DOUBLE)
    optimizer = torch.optim.Adam([p for name, p in net.named_parameters() if "reverse" in name], lr=1e-2)
    before = net.reconstruction_loss(x, noise=0.0).item()
    for _ in range(300):
        optimizer.zero_grad()
        net.reconstruction_loss(x).backward()
        optimizer.step()
    assert net.reconstruction_loss(x, noise=0.0).item() < before / 4


@pytest.mark.parametrize("noise", [-1.0, math.nan, "1"])
def test_reconstruction_loss_refuses_bad_noise(noise: Any) -> None:
    net = MLP([4, 3, 2], rule=DifferenceTargetPropagation())
    with pytest.raises(ValueError, match="noise must be a finite number >= 0"):
        net.reconstruction_loss(torch.randn(5, 4), noise=noise)


def test_reconstruction_loss_needs_its_rule() -> None:
    with pytest.raises(RuntimeError, match=r"needs rule=tpext.DifferenceTargetPropagation\(\)"):
        MLP([4, 3, 2]).reconstruction_loss(torch.randn(5, 4))


# Modules


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_composes_with_ordinary_modules(rule: Any) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Flatten(),
        TargetLinear(32, 8, activation="tanh", rule=rule),
        nn.BatchNorm1d(8),
        TargetLinear(8, 6, activation="sigmoid", rule=rule),
        nn.Dropout(0.1),
        nn.Linear(6, 3),
    )
    optimizer = torch.optim.Adam(net.parameters())
    before = copy.deepcopy(net.state_dict())
    functional.cross_entropy(net(torch.randn(9, 1, 6, 6)), torch.arange(9) % 3).backward()
    optimizer.step()
    for name, parameter in net.named_parameters():
        if "reverse" not in name:
            assert not torch.equal(parameter, before[name]), name
    copy.deepcopy(net)(torch.randn(2, 1, 6, 6)).sum().backward()


def test_state_dict_interchanges_with_linear() -> None:
    linear = nn.Linear(4, 3)
    for rule in RULES:
        layer = TargetLinear(4, 3, rule=rule)
        reverse = {k: v.clone() for k, v in layer.state_dict().items() if "reverse" in k}
        layer.load_state_dict(linear.state_dict())
        assert torch.equal(layer(torch.ones(2, 4)), linear(torch.ones(2, 4)))
        assert all(torch.equal(layer.state_dict()[k], v) for k, v in reverse.items())
    plain = TargetLinear(4, 3)
    linear.load_state_dict(plain.state_dict())
    assert list(plain.state_dict()) == list(linear.state_dict()) == ["weight", "bias"]
    damaged = TargetLinear(4, 3, rule=DifferenceTargetPropagation()).state_dict()
    del damaged["reverse_bias"]
    with pytest.raises(RuntimeError, match="reverse_bias"):
        TargetLinear(4, 3, rule=DifferenceTargetPropagation()).load_state_dict(damaged)


def test_same_seed_same_parameters_as_linear() -> None:
    torch.manual_seed(1)
    layer = TargetLinear(40, 30)
    torch.manual_seed(1)
    linear = nn.Linear(40, 30)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


def test_mlp() -> None:
    net = MLP([5, 4, 3], "relu", bias=False, output_activation=Activation("leaky_relu", slope=0.2))
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "1.weight"]
    assert [layer.activation for layer in net] == [Activation("relu"), Activation("leaky_relu", slope=0.2)]
    assert net.rule == RegularizedLeastSquares()
    net.rule = ConstrainedLeastSquares()
    assert {layer.rule for layer in net} == {ConstrainedLeastSquares()}
    assert type(net[:1]) is nn.Sequential
    assert net[:1][0] is net[0]
    assert type(MLP([5, 4, 3], device="meta")(torch.empty(2, 5, device="meta"))) is Tensor
    learned = MLP([5, 4, 3], rule=DifferenceTargetPropagation())
    assert [layer.reverse_activation.name for layer in learned] == ["identity", "tanh"]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_pickles_and_copies(rule: Any) -> None:
    net, x = MLP([5, 4, 3], rule=rule), torch.randn(2, 5)
    for other in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert other.rule == rule
        assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_tied_layers_share_one_parameter(rule: Any) -> None:
    """An autoencoder with tied weights: the same as free layers of equal weights, whose gradients are added up."""
    torch.manual_seed(0)
    options: Any = {"rule": rule, "dtype": torch.float64}
    tied = tpext.nn.MLP([6, 5, 3, 5, 6], tied=True, **options)
    free = tpext.nn.MLP([6, 5, 3, 5, 6], **options)
    for one, other in zip(tied, free, strict=True):
        values = {
            name: value.mT if name == "weight" and one.transposed else value for name, value in one.state_dict().items()
        }
        other.load_state_dict(values)
    x = torch.randn(7, 6, dtype=torch.float64)
    for net in (tied, free):
        (net(x) - x).square().sum().backward()
    assert len({id(layer.weight) for layer in tied}) == 2
    for layer, mirror in ((0, 3), (1, 2)):
        expected = free[layer].weight.grad + free[mirror].weight.grad.mT
        torch.testing.assert_close(tied[layer].weight.grad, expected)
        torch.testing.assert_close(tied[mirror].bias.grad, free[mirror].bias.grad)
    displacement = torch.randn(7, 6, dtype=torch.float64)
    hidden = x[:, :5]
    torch.testing.assert_close(
        tied[3].input_displacement(hidden, displacement), free[3].input_displacement(hidden, displacement)
    )
    copied = copy.deepcopy(tied)
    assert copied[3].weight is copied[0].weight
    again = tpext.nn.MLP([6, 5, 3, 5, 6], tied=True, **options)
    again.load_state_dict(tied.state_dict())
    assert torch.equal(again(x), tied(x))
    assert repr(tied[3]).endswith(", tied)")


def test_tie_needs_mirrored_sizes() -> None:
    encoder, decoder = tpext.nn.TargetLinear(4, 3), tpext.nn.TargetLinear(3, 4)
    with pytest.raises(ValueError, match="encoder must be a layer of its own weights from M=3 to N=4 features, got"):
        tpext.nn.TargetLinear(4, 3).tie(encoder)
    decoder.tie(encoder)
    with pytest.raises(ValueError, match="that is tied itself"):
        tpext.nn.TargetLinear(4, 3).tie(decoder)
    square = tpext.nn.TargetLinear(3, 3)
    with pytest.raises(ValueError, match="encoder must be another layer"):
        square.tie(square)
    with pytest.raises(ValueError, match=r"encoder must have weights of this layer's dtype, torch.float32, got torch"):
        square.tie(tpext.nn.TargetLinear(3, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="encoder must be a TargetLinear, got Linear"):
        square.tie(nn.Linear(3, 3))
    for sizes in ([4, 3, 3, 4], [4, 3, 5]):
        with pytest.raises(ValueError, match="MLP: sizes must be an odd number of sizes, the same from both ends"):
            tpext.nn.MLP(sizes, tied=True)


def test_repr() -> None:
    layer = TargetLinear(4, 3, activation="tanh", rule=Backprop())
    assert repr(layer) == "TargetLinear(4, 3, bias=True, activation='tanh', rule=Backprop())"
    slope = TargetLinear(4, 3, False, activation=Activation("leaky_relu", slope=0.5), rule=Backprop())
    assert "bias=False, activation=Activation(name='leaky_relu', slope=0.5" in repr(slope)


# Autograd, compiler, autocast


@pytest.mark.parametrize("rule", TARGET_RULES, ids=repr)
def test_is_not_differentiable_twice(rule: Any) -> None:
    layer = TargetLinear(4, 3, rule=rule)
    with pytest.raises(RuntimeError, match=r"not a derivative.*rule=tpext.Backprop\(\)"):
        torch.autograd.grad(layer(torch.randn(2, 4)).sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="not a derivative"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(4))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(layer, (torch.randn(2, 4),), (torch.randn(2, 4),))


def parameters_without_gradients(net: nn.Module) -> Iterator[str]:
    return (name for name, p in net.named_parameters() if p.grad is None)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_only_what_is_asked_for(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen parameters get nothing, and a layer whose input needs nothing inverts nothing."""
    from tpext.rules import least_squares

    inverses = []
    inner = least_squares.regularized_solve
    monkeypatch.setattr(least_squares, "regularized_solve", lambda *args: inverses.append(args) or inner(*args))
    net = MLP([5, 4, 3], rule=rule)
    net[1].bias.requires_grad_(False)
    net(torch.randn(2, 5)).sum().backward()
    assert {n for n in parameters_without_gradients(net) if "reverse" not in n} == {"1.bias"}
    expected = 1 if isinstance(rule, ConstrainedLeastSquares | RegularizedLeastSquares) else 0
    assert len(inverses) == expected


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_compiles_whole(rule: Any) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(5, 5), MLP([5, 4, 3], rule=rule))
    x = torch.randn(7, 5)
    net(x).square().mean().backward()
    eager = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    torch.compile(net, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    compiled = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert compiled.keys() == eager.keys()
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected, rtol=1e-4, atol=1e-6)


def test_compiles_with_different_settings() -> None:
    """The compiler makes symbols of numbers that differ from layer to layer."""
    torch._dynamo.reset()
    net = nn.Sequential(
        *(
            TargetLinear(
                4,
                4,
                activation=Activation("leaky_relu", slope=0.1 * k),
                rule=RegularizedLeastSquares(reg=0.1 * k, target_step=0.5 / k, local_loss="pre" if k % 2 else "post"),
            )
            for k in range(1, 5)
        ),
        *(TargetLinear(4, 4, activation="tanh", rule=ConstrainedLeastSquares(margin=0.01 * k)) for k in (1, 2, 3)),
        *(TargetLinear(4, 4, rule=DifferenceTargetPropagation(target_step=0.1 * k)) for k in (1, 2, 3)),
    )
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    wanted = [p for name, p in net.named_parameters() if "reverse" not in name]
    for x in (torch.randn(7, 4), torch.randn(5, 4)):
        grads = [torch.autograd.grad(n(x).square().mean(), wanted) for n in (net, compiled)]
        for expected, actual in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", TARGET_RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(rule: Any, dtype: torch.dtype) -> None:
    layer = TargetLinear(5, 4, activation="tanh", rule=rule)
    x = torch.randn(7, 5).to(dtype).requires_grad_(True)
    wide = x.detach().float().requires_grad_(True)
    cotangent = torch.randn(7, 4).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        output = layer(x)
    output.backward(cotangent)
    grads = [layer.weight.grad.clone(), layer.bias.grad.clone(), x.grad]
    layer.zero_grad()
    expected = layer(wide)
    expected.backward(cotangent.float())
    assert output.dtype == dtype
    assert torch.equal(output, expected.to(dtype))
    for actual, wanted in zip(grads, [layer.weight.grad, layer.bias.grad, wide.grad.to(dtype)], strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("rule", TARGET_RULES[2:5], ids=repr)
def test_trains(rule: Any) -> None:
    """An exclusive or of two signs, which no linear map finds, by regularised and by corrected learned inverses."""
    x = torch.randn(200, 2, dtype=DOUBLE)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    net = nn.Sequential(MLP([2, 16, 16], "tanh", output_activation="tanh", rule=rule), nn.Linear(16, 2)).double()
    forward = [p for name, p in net.named_parameters() if "reverse" not in name]
    reverse = [p for name, p in net.named_parameters() if "reverse" in name]
    optimizer = torch.optim.Adam(forward, lr=1e-2)
    inverse_optimizer = torch.optim.Adam(reverse, lr=1e-2) if reverse else None
    for _ in range(200):
        if inverse_optimizer is not None:
            inverse_optimizer.zero_grad()
            net[0].reconstruction_loss(x).backward()
            inverse_optimizer.step()
        optimizer.zero_grad()
        functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    assert (net(x).argmax(1) == labels).double().mean() > 0.9


# Errors


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 3), {}, ValueError, "TargetLinear: in_features must be at least 1, got 0"),
        ((3, -1), {}, ValueError, "TargetLinear: out_features must be at least 1, got -1"),
        ((3.0, 2), {}, TypeError, "TargetLinear: in_features must be an int, got float"),
        ((3, 2, "relu"), {}, TypeError, "TargetLinear: bias must be True or False, got 'relu' (an activation"),
        ((3, 2), {"activation": "gelu"}, ValueError, "Activation: name must be one of"),
        ((3, 2), {"rule": RegularizedInverse()}, TypeError, "TargetLinear: rule must be for feed-forward layers "),
        (
            (3, 2),
            {"activation": Activation("tanh", reference_compat=True), "rule": RegularizedLeastSquares(form="ridge")},
            ValueError,
            "TargetLinear: an activation with reference_compat needs form='proximal'",
        ),
        (
            (3, 2),
            {"activation": Activation("leaky_relu", reference_compat=True)},
            ValueError,
            "TargetLinear: RegularizedLeastSquares needs reference_compat=False for leaky_relu",
        ),
    ],
)
def test_bad_arguments_are_named(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        TargetLinear(*arguments, **options)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(TypeError, match=r"^MLP: sizes must be a list of integers, such as \[784, 240, 10\], got 5$"):
        MLP(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^MLP: sizes must be two or more, got \[5\]$"):
        MLP([5])


def test_rules_of_other_layers_are_named_with_the_network() -> None:
    expected = "^MLP: rule must be for feed-forward layers "
    for sizes in ([3, 2], [3, 4, 2]):
        with pytest.raises(TypeError, match=expected):
            MLP(sizes, rule=RegularizedInverse())  # type: ignore[arg-type]
    net = MLP([3, 4, 2])
    with pytest.raises(TypeError, match=expected):
        net.rule = RegularizedInverse()  # type: ignore[assignment]
    assert [layer.rule for layer in net] == [RegularizedLeastSquares()] * 2


def test_bad_inputs_are_named() -> None:
    layer = TargetLinear(4, 3, activation="tanh")
    for x, message in [
        (torch.ones(2, 5), "input must be [..., N=4], got [2, 5]"),
        (torch.ones(()), "input must be [..., N=4], got []"),
        (torch.ones(2, 4).double(), "input must be torch.float32 as weight is, got torch.float64"),
        (torch.ones(2, 4, device="meta"), "input must be on cpu as weight is, got meta"),
    ]:
        with pytest.raises(ValueError, match=re.escape(f"TargetLinear: {message}")):
            layer(x)
    with pytest.raises(ValueError, match=r"parameters must be float32 or float64 under RegularizedLeastSquares"):
        layer.bfloat16()(torch.ones(2, 4).bfloat16())
    with pytest.raises(ValueError, match=r"displacement must be \[2, 3\], got \[3\]"):
        TargetLinear(4, 3).input_displacement(torch.ones(2, 4), torch.ones(3))


def test_singular_weights_raise() -> None:
    layer = TargetLinear(4, 3, rule=ConstrainedLeastSquares())
    nn.init.zeros_(layer.weight)
    with pytest.raises(tpext.SingularError):
        layer(torch.ones(2, 4, requires_grad=True)).sum().backward()


def test_rule_setter_guards_the_parameters() -> None:
    layer = TargetLinear(4, 3)
    layer.rule = Backprop()
    with pytest.raises(ValueError, match="changes which parameters the rule owns"):
        layer.rule = DifferenceTargetPropagation()
    with pytest.raises(TypeError, match="rule must be"):
        layer.rule = "bp"


@pytest.mark.parametrize("rule", [*TARGET_RULES, tpext.Kaczmarz()], ids=lambda rule: type(rule).__name__)
def test_the_next_module_may_work_in_place(rule: Any) -> None:
    """As after ``torch.nn.Linear``: of an identity layer nothing is kept that ``nn.ReLU(inplace=True)`` would spoil."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, requires_grad=True)
    first, second = TargetLinear(4, 4, rule=rule), TargetLinear(4, 2, rule=rule)
    grads = []
    for inplace in (False, True):
        nn.Sequential(first, nn.ReLU(inplace), second)(x).square().sum().backward()
        grads.append([value.grad for value in (x, first.weight, second.weight)])
        for value in (x, first.weight, first.bias, second.weight, second.bias):
            value.grad = None
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["tanh", "relu", "leaky_relu"])
def test_ridge_without_regularisation_is_its_limit(name: Any) -> None:
    x, d = torch.randn(5, 4, dtype=DOUBLE), 0.1 * torch.randn(5, 3, dtype=DOUBLE)
    layer = TargetLinear(4, 3, activation=name, rule=RegularizedLeastSquares(0.0, "ridge", margin=1e-9), dtype=DOUBLE)
    at_zero = layer.input_displacement(x, d)
    layer.rule = RegularizedLeastSquares(1e-11, "ridge")
    torch.testing.assert_close(at_zero, layer.input_displacement(x, d), rtol=1e-5, atol=1e-6)


def test_rule_of_a_network_changes_everywhere_or_nowhere() -> None:
    net = MLP([4, 3, 2], rule=tpext.ConstrainedLeastSquares())
    net.append(TargetLinear(2, 2, rule=DifferenceTargetPropagation()))
    with pytest.raises(ValueError, match="strict=False"):
        net.rule = Backprop()
    assert [type(layer.rule) for layer in net[:2]] == [tpext.ConstrainedLeastSquares] * 2


def test_reconstruction_loss_of_a_network_ignores_autocast() -> None:
    torch.manual_seed(0)
    net, x = MLP([8, 6, 4], rule=DifferenceTargetPropagation()), torch.randn(7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = net.reconstruction_loss(x)
    assert torch.equal(under_autocast, net.reconstruction_loss(x))


def test_stream_refuses_what_it_would_not_do() -> None:
    x, labels = torch.rand(3, 4), torch.tensor([0, 1, 0])
    net = MLP([4, 3, 2], "relu", rule=tpext.Kaczmarz())
    net[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"MLP.stream: 0.bias must require grad"):
        net.stream(x, labels)
    net = MLP([4, 3, 2], "relu", rule=tpext.Kaczmarz()).append(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="got a Linear in it"):
        net.stream(x, labels)


def test_unused_activation_is_checked_too() -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        MLP([3, 2], activation="nope")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "identity"])
def test_a_large_reg_hands_down_back_propagations_direction(name: Any, bias: bool) -> None:
    reg = 1e6
    layer = TargetLinear(5, 4, bias, activation=name, rule=RegularizedLeastSquares(reg), dtype=DOUBLE)
    x, d = torch.randn(7, 5, dtype=DOUBLE), torch.randn(7, 4, dtype=DOUBLE)
    moved = layer.input_displacement(x, d) * reg**2 * (1 + reg if bias else 1)
    layer.rule = Backprop()
    exact = layer.input_displacement(x, d)
    torch.testing.assert_close(moved, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("module", "kind"),
    [("nn.mlp", TargetLinear), ("ops.layer_inverse", Activation), ("ops.kaczmarz", tpext.ops.Units)],
)
def test_pickles_that_name_the_modules_of_before_load(module: str, kind: type) -> None:
    assert pickle.loads(f"ctpext.{module}\n{kind.__name__}\n.".encode()) is kind
