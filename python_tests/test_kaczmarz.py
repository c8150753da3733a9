"""Direct weight solves: equal to published numbers and to the oracle; interpolation; the rule in networks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import DTYPES, pairwise
from kaczmarz_cases import MOVES, OUTPUTS, close
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

from tpext import Backprop, Kaczmarz, RegularizedLeastSquares
from tpext.diagnostics import layer_diagnostics
from tpext.nn import MLP, HotTargetLoss, TargetLinear
from tpext.ops import Units, kaczmarz_step, kaczmarz_train
from tpext.ops.kaczmarz import KaczmarzStep, _step_by_torch
from tpext.ops.kaczmarz_train import running_accuracy
from tpext.ops.units import hot_target, n_hot
from tpext.reference import kaczmarz as oracle
from tpext.tasks.idx import load_mnist


def published(file: str) -> dict[str, Tensor]:
    arrays = np.load(Path(__file__).parent / "data" / file)
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].ndim > 0}


# Published numbers


def test_published_maps_of_the_units() -> None:
    golden = published("C_layers.npz")
    z, y = golden["z"], golden["yt"]
    relu, first, doubled = Units("relu"), Units("relu", version="v0"), Units("doubled_relu")
    close(relu(z), golden["relu_f"])
    close(relu.input_target(y, z), golden["relu_back"])
    close(first.input_target(y, z), golden["relu_back_v0"])
    close(doubled(z), golden["tp2_relu_f"])
    close(doubled.input_target(y, z), golden["tp2_relu_back"])
    for output, key in zip(OUTPUTS, ("oh_back", "oh_back_swap_v0", "oh_back_direct_v1"), strict=True):
        close(hot_target(golden["oh_target"], z, output), golden[key])
    close(n_hot(z), golden["oh_f"])
    close(Units("n_hot", 2)(z), golden["nhot_f"])
    close(Units("n_hot", 2).input_target(golden["nhot_target"], z), golden["nhot_back"])
    binary, mean = Units("binary"), z.mean(-1, keepdim=True)
    close(binary(z), golden["bin_f"])
    # The published target is that of the centred z.
    close(binary.input_target(golden["bin_target"], z) - mean, golden["bin_back"], atol=1e-12)


def test_published_second_version_of_the_linear_layer() -> None:
    golden = published("C_layers.npz")
    x, weight = golden["z"], golden["tp2_W"]
    d = golden["tp2_yt"] - x @ weight.T
    step = kaczmarz_step(d, x, weight, False, Units("doubled_relu"), dx="wnorm", first="weights")
    close(weight + step.weight, golden["tp2_Wn"])
    close(step.input, golden["tp2_xprime"])


@pytest.mark.parametrize("file", ["C_net_B4_init0.001.npz", "C_net_B1_init0.01.npz"])
def test_published_network(file: str) -> None:
    """By the module: a loss's backward and a step of SGD are the published update."""
    golden = published(file)
    model = MLP([6, 5, 3], "relu", rule=Kaczmarz(), dtype=torch.float64)
    first, second = model
    for layer, key in ((first, "W1"), (second, "W2")):
        layer.weight.data, layer.bias.data = golden[key][:, :-1].clone(), golden[key][:, -1].clone()
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=1), HotTargetLoss()
    for step in range(3):
        expected = {key.removeprefix(f"s{step}_"): value for key, value in golden.items() if key.startswith(f"s{step}")}
        z1 = torch.nn.functional.linear(golden["x"], first.weight, first.bias).detach()
        h1 = first(golden["x"])
        z2 = second(h1)
        for tensor in (h1, z2):
            tensor.retain_grad()
        optimizer.zero_grad()
        loss(z2, golden["labels"]).backward()
        close(z1, expected["z1"])
        close(z2, expected["z2"])
        close(z2 - z2.grad, expected["yt2"])
        close(h1 - h1.grad, expected["xpp2"][:, :-1])
        close(Units("relu").input_target(h1 - h1.grad, z1), expected["yt1"])
        for layer, key in ((first, "1"), (second, "2")):
            close(-torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1), expected[f"dW{key}"])
        optimizer.step()
        for layer, key in ((first, "1"), (second, "2")):
            close(torch.cat([layer.weight, layer.bias[:, None]], 1), expected[f"W{key}"])
        close(model(golden["x"]), expected["z2_after"])
        if len(golden["x"]) == 1:
            close(second(expected["xpp2"][:, :-1]), expected["yt2"], rtol=1e-12)


@pytest.mark.parametrize("dx", MOVES)
def test_displacement_of_the_input_as_published(dx: str) -> None:
    """x' before it is made feasible: units of which everything is feasible."""
    golden = published("C_net_B4_init0.001.npz")
    weight = golden["W2"]
    x, d = torch.relu(golden["s0_z1"]), golden["s0_yt2"] - golden["s0_z2"]
    moved = kaczmarz_step(d, x, weight[:, :-1], True, Units("identity"), dx=dx).input
    if dx == "mean":
        close(moved, golden["s0_xp2"][:, :-1])
    close(moved, x.numpy() + oracle.move(d, weight[:, :-1], dx, 1.0))


# The oracle

GRID = pairwise(
    B=[1, 3, 17],
    N=[1, 2, 31, 64],
    M=[1, 2, 10, 33],
    relaxation=[1.0, 0.3, 1.7],
    damping=[0.0, 0.5],
    dx=MOVES,
    dx_reg=[0.5, 4.0],
    update=["average", "exact"],
    batch_reg=[0.5, 2.0],
    first=["input", "weights"],
    units=["data", "identity", "relu", "doubled_relu", "n_hot", "binary"],
    bias=[True, False],
    dtype=DTYPES,
)
WEIGHED = pairwise(
    B=[1, 3, 17],
    N=[1, 2, 31, 64],
    M=[1, 10, 33],
    relaxation=[1.0, 0.3],
    damping=[0.0, 0.5],
    dx=MOVES,
    dx_reg=[0.5],
    update=["average"],
    batch_reg=[0.0],
    first=["input", "weights"],
    sticky=[0.0, 0.5, 10.0],
    keep_norm=[True, False],
    units=["data", "identity", "relu", "doubled_relu"],
    bias=[True, False],
    dtype=DTYPES,
)


@pytest.mark.parametrize("case", [*GRID, *WEIGHED], ids=lambda case: "-".join(map(str, case.values())))
def test_step_equals_the_oracle(case: dict[str, Any]) -> None:
    case = dict(case)
    B, N, M, units, bias, dtype = (case.pop(key) for key in ("B", "N", "M", "units", "bias", "dtype"))
    d, x, weight = torch.randn(B, M, dtype=dtype), torch.randn(B, N, dtype=dtype), torch.randn(M, N, dtype=dtype)
    bias = torch.randn(M, dtype=dtype) if bias else None
    before = [tensor.clone() for tensor in (d, x, weight)]
    chosen = None if units == "data" else Units(units)
    expected = oracle.kaczmarz_step(d, x, weight, bias, **case, units=None if chosen is None else units, count=1)
    # Sums of at most 64 terms, twice over, and a system of condition at most some (64 + 0.5) / 0.5.
    tolerance = 2000 * torch.finfo(dtype).eps
    for run in (kaczmarz_step, _step_by_torch):
        assert_step(run(d, x, weight, bias is not None, chosen, **case), expected, tolerance, dtype)
    assert all(torch.equal(a, b) for a, b in zip((d, x, weight), before, strict=True))


def assert_step(step: KaczmarzStep, expected: Any, tolerance: float, dtype: torch.dtype) -> None:
    for actual, wanted in zip(step, (expected[0], expected[1], expected[2]), strict=True):
        if actual is not None:
            close(actual, wanted, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(wanted).max())))
            assert actual.dtype == dtype
            assert not actual.requires_grad


# Beyond a chunk of rows, a block of rows, the panels that registers hold; fewer columns than a vector has.
KERNEL = pairwise(
    B=[1, 5, 64, 130, 300],
    N=[1, 3, 15, 17, 48, 100, 785],
    M=[1, 7, 16, 33, 50],
    relaxation=[1.0, 1.5],
    damping=[0.0, 0.5],
    dx=["mean", "wnorm"],
    units=[None, Units("identity"), Units("relu"), Units("relu", version="v0"), Units("doubled_relu")],
    bias=[True, False],
    contiguous=[True, False],
    threads=[1, 2, 3],
    dtype=DTYPES,
)


@pytest.mark.parametrize("case", KERNEL, ids=lambda case: "-".join(map(str, case.values())))
def test_kernel_of_the_step_equals_the_oracle_and_torch(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    B, N, M, units, dtype = (case[name] for name in ("B", "N", "M", "units", "dtype"))
    options = {name: case[name] for name in ("relaxation", "damping", "dx")}
    rest = {"dx_reg": 1.0, "update": "average", "batch_reg": 0.0, "first": "input"}
    d, x = torch.randn(B, M, dtype=dtype), torch.rand(B, N, dtype=dtype)
    weight = torch.nn.Parameter(torch.randn(M, N, dtype=dtype) / N**0.5)
    if not case["contiguous"]:
        d, x, weight = (tensor.mT.contiguous().mT for tensor in (d, x, weight))
    bias = torch.zeros(M) if case["bias"] else None
    name = None if units is None else units.name
    expected = oracle.kaczmarz_step(d, x, weight.detach(), bias, **options, **rest, units=name, count=1)
    by_torch = _step_by_torch(d, x, weight.detach(), case["bias"], units, **options, **rest)
    # One sum over N and one over B, of at most 785 and 300 terms.
    tolerance = 1100 * torch.finfo(dtype).eps
    assert_step(by_torch, expected, tolerance, dtype)
    monkeypatch.setattr("tpext.ops.kaczmarz._step_by_torch", None)
    torch.set_num_threads(case["threads"])
    assert_step(kaczmarz_step(d, x, weight, case["bias"], units, **options), expected, tolerance, dtype)


@pytest.mark.parametrize("units", [None, Units("relu")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_step_has_the_same_bits_on_any_threads(units: Units | None, dtype: torch.dtype) -> None:
    d, x, weight = (torch.randn(size, dtype=dtype) for size in ((300, 33), (300, 211), (33, 211)))
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(kaczmarz_step(d, x, weight, True, units, dx="wnorm"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # Rows are moved by themselves.
    assert torch.equal(kaczmarz_step(d[7:20], x[7:20], weight, True, units, dx="wnorm").input, results[0].input[7:20])


@pytest.mark.parametrize("name", ["identity", "relu", "doubled_relu", "n_hot", "binary"])
@pytest.mark.parametrize("version", ["head", "v0"])
def test_units_equal_the_oracle(name: Any, version: Any) -> None:
    units = Units(name, 3, version)
    z, y = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    y[0, 0], z[0, 1] = 0.0, 0.0
    if name in ("n_hot", "binary"):
        y = units(y)
    flat_z, flat_y = z.view(10, 7), y.view(10, 7)
    close(units(z).view(10, 7), oracle.units_output(flat_z, name, 3))
    close(units.feasible(y).view(10, 7), oracle.feasible(flat_y, name, 3))
    close(units.input_target(y, z).view(10, 7), oracle.units_target(flat_y, flat_z, name, version))


def test_the_first_of_equals_are_hot() -> None:
    z = torch.randint(0, 2, (3, 400)).double()
    assert z.sum(-1).max() < 300
    for count in (1, 30, 300):
        close(n_hot(z, count), oracle.n_hot(z, count))


def test_soft_targets_are_taken_as_they_are() -> None:
    z, soft = torch.zeros(2, 2, requires_grad=True), torch.tensor([[0.1, 0.9], [0.5, 0.5]])
    HotTargetLoss("direct")(z, soft).backward()
    assert z.grad is not None
    assert torch.equal(z.grad, -soft)


# Properties


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", [None, Units("relu")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "update"), [(1, "average"), (1, "exact"), (7, "exact")])
def test_the_moved_input_then_has_the_target(
    dtype: torch.dtype, units: Units | None, bias: bool, size: int, update: Any
) -> None:
    x, weight = torch.rand(size, 20, dtype=dtype), torch.randn(4, 20, dtype=dtype)
    b = torch.randn(4, dtype=dtype) if bias else None
    d = torch.randn(size, 4, dtype=dtype)
    target = torch.nn.functional.linear(x, weight, b) + d
    step = kaczmarz_step(d, x, weight, bias, units, update=update)
    after = torch.nn.functional.linear(step.input, weight + step.weight, None if b is None else b + step.bias)
    torch.testing.assert_close(
        after, target, rtol=0, atol=(1e-3 if update == "exact" else 1e-5) if dtype.itemsize == 4 else 1e-10
    )


@pytest.mark.parametrize("relaxation", [0.25, 1.0, 1.75])
def test_relaxation_leaves_its_share_of_the_residual(relaxation: float) -> None:
    x, weight, d = torch.rand(1, 9).double(), torch.randn(3, 9).double(), torch.randn(1, 3).double()
    step = kaczmarz_step(d, x, weight, False, relaxation=relaxation)
    torch.testing.assert_close(d - x @ step.weight.T, (1 - relaxation) * d)


def test_the_update_is_the_least_one() -> None:
    """Of all changes that meet the targets the exact one has the least norm."""
    x, weight, d = torch.randn(4, 9).double(), torch.randn(3, 9).double(), torch.randn(4, 3).double()
    step = kaczmarz_step(d, x, weight, False, update="exact")
    torch.testing.assert_close(step.weight, (torch.linalg.pinv(x) @ d).T)


@pytest.mark.parametrize("bias", [True, False])
def test_a_sticky_update_meets_the_target_by_the_least_weighed_change(bias: bool) -> None:
    x, weight, d = torch.randn(1, 9).double(), torch.randn(3, 9).double(), torch.randn(1, 3).double()
    weight[1] = 0
    step = kaczmarz_step(d, x, weight, bias, sticky=2.0)
    torch.testing.assert_close(x @ step.weight.mT + (step.bias if bias else 0), d)
    plain = kaczmarz_step(d, x, weight, bias)
    torch.testing.assert_close(step.weight[1], plain.weight[1])
    size = weight[[0, 2]].abs()
    cost = 1 + 2 * size / size.mean(1, keepdim=True)
    # Its part in every direction that leaves the output as it is, weighed, is zero.
    rest = torch.randn(2, 9).double()
    rest -= (rest @ x.mT) * x / x.square().sum()
    torch.testing.assert_close((cost * step.weight[[0, 2]] * rest).sum(1), torch.zeros(2).double())
    assert not torch.allclose(step.weight, plain.weight)


@pytest.mark.parametrize("first", ["input", "weights"])
@pytest.mark.parametrize("update", ["average", "exact"])
@pytest.mark.parametrize("units", [Units("relu"), Units("identity"), Units("doubled_relu")])
def test_the_moved_input_keeps_its_norm(units: Units, update: Any, first: Any) -> None:
    x, weight, d = torch.rand(4, 9).double(), torch.randn(3, 9).double(), torch.randn(4, 3).double()
    options: dict[str, Any] = {"update": update, "batch_reg": 0.5, "first": first}
    step = kaczmarz_step(d, x, weight, True, units, **options, keep_norm=True)
    free = kaczmarz_step(d, x, weight, True, units, **options).input
    torch.testing.assert_close(step.input.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(step.input / step.input.norm(dim=1, keepdim=True), free / free.norm(dim=1, keepdim=True))
    # What is data stays, and so does an output that is all zeros.
    assert torch.equal(kaczmarz_step(d, x, weight, True, keep_norm=True).weight, kaczmarz_step(d, x, weight).weight)
    dead = kaczmarz_step(
        -torch.ones(1, 1), torch.full((1, 2), 0.1), torch.ones(1, 2), False, Units("relu"), keep_norm=True
    )
    assert torch.equal(dead.input, torch.zeros(1, 2))


@pytest.mark.parametrize("units", [Units("relu"), Units("identity")])
def test_an_input_of_kept_norm_then_has_the_target(units: Units) -> None:
    x, weight, b, d = torch.rand(1, 9).double(), torch.randn(3, 9).double(), torch.randn(3).double(), torch.randn(1, 3)
    step = kaczmarz_step(d.double(), x, weight, True, units, sticky=1.0, keep_norm=True)
    after = torch.nn.functional.linear(step.input, weight + step.weight, b + step.bias)
    torch.testing.assert_close(after, torch.nn.functional.linear(x, weight, b) + d.double())


def test_a_zero_row_asks_for_nothing() -> None:
    x, d, weight = torch.rand(3, 5).double(), torch.randn(3, 2).double(), torch.randn(2, 5).double()
    x[1] = 0
    step = kaczmarz_step(d, x, weight, False)
    alone = kaczmarz_step(d[[0, 2]], x[[0, 2]], weight, False)
    torch.testing.assert_close(step.weight, alone.weight * (2 / 3))
    # With a bias it has that one's input.
    torch.testing.assert_close(kaczmarz_step(d[1:2], x[1:2], weight).bias, d[1])
    weights, before = [torch.zeros(2, 5), torch.zeros(3, 2)], torch.zeros(3, 2)
    kaczmarz_train(torch.zeros(4, 5), torch.tensor([0, 1, 2, 0]), weights)
    assert torch.equal(weights[1], before)
    assert torch.equal(weights[0], torch.zeros(2, 5))


def test_a_zero_row_of_the_weights_moves_nothing() -> None:
    weight = torch.randn(3, 5).double()
    weight[1] = 0
    d = torch.randn(2, 3).double()
    moved = kaczmarz_step(d, torch.zeros(2, 5).double(), weight, False, Units("identity"), dx="wnorm").input
    close(moved, oracle.move(d, weight, "wnorm", 1.0))
    assert moved.isfinite().all()


def test_no_samples_change_nothing() -> None:
    step = kaczmarz_step(torch.zeros(0, 3), torch.zeros(0, 5), torch.randn(3, 5), True, Units("relu"))
    assert torch.equal(step.weight, torch.zeros(3, 5))
    assert torch.equal(step.bias, torch.zeros(3))
    weights = [torch.randn(3, 5)]
    before = weights[0].clone()
    assert kaczmarz_train(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), weights).shape == (0,)
    assert torch.equal(weights[0], before)


def test_nan_spreads_no_further_than_it_must() -> None:
    d, x, weight = torch.randn(3, 4), torch.randn(3, 5), torch.randn(4, 5)
    d[1, 2] = torch.nan
    step = kaczmarz_step(d, x, weight, False, Units("relu"))
    assert step.input.isnan().any(1).tolist() == [False, True, False]
    data = kaczmarz_step(d, x, weight, False)
    assert data.weight.isnan().any(1).tolist() == [False, False, True, False]
    relu = Units("relu")
    assert relu.input_target(torch.tensor([torch.nan]), torch.tensor([1.0])).isnan().all()


# Modules


def test_gradients_are_minus_the_step() -> None:
    layer = TargetLinear(6, 4, rule=Kaczmarz(std=1.0), reverse_activation="relu", dtype=torch.float64)
    x, d = torch.rand(2, 3, 6).double().requires_grad_(), torch.randn(2, 3, 4).double()
    layer(x).backward(-d)
    step = kaczmarz_step(d, x.detach(), layer.weight, True, Units("relu"))
    torch.testing.assert_close(layer.weight.grad, -step.weight)
    torch.testing.assert_close(layer.bias.grad, -step.bias)
    torch.testing.assert_close(x.grad, x.detach() - step.input)
    torch.testing.assert_close(layer.input_displacement(x, d), step.input - x.detach())
    data = TargetLinear(6, 4, bias=False, rule=Kaczmarz(std=1.0), dtype=torch.float64)
    data(x.detach()).backward(-d)
    torch.testing.assert_close(data.weight.grad, -kaczmarz_step(d, x.detach(), data.weight, False).weight)
    assert layer(x).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("others", "name", "value"),
    [
        ({}, "relaxation", 0.5),
        ({}, "damping", 0.3),
        ({}, "dx", "wnorm"),
        ({"dx": "regularized"}, "dx_reg", 5.0),
        ({}, "update", "exact"),
        ({"update": "exact"}, "batch_reg", 5.0),
        ({}, "first", "weights"),
        ({}, "sticky", 2.0),
        ({}, "keep_norm", True),
    ],
)
def test_every_option_of_the_rule_reaches_the_step(others: dict[str, Any], name: str, value: Any) -> None:
    """Each changes the gradients, to those of the step with that option."""
    layer = TargetLinear(6, 4, rule=Kaczmarz(**others, std=1.0), reverse_activation="relu", dtype=torch.float64)
    x, d = torch.rand(5, 6).double().requires_grad_(), torch.randn(5, 4).double()
    usual = torch.autograd.grad(layer(x), (x, layer.weight), -d)
    layer.rule = Kaczmarz(**{**others, name: value}, std=1.0)
    changed = torch.autograd.grad(layer(x), (x, layer.weight), -d)
    step = kaczmarz_step(d, x.detach(), layer.weight, True, Units("relu"), **{**others, name: value})
    torch.testing.assert_close(changed, (x.detach() - step.input, -step.weight))
    assert not all(map(torch.allclose, changed, usual))


@pytest.mark.parametrize("name", ["identity", "relu", "doubled_relu", "n_hot", "binary"])
def test_units_take_the_target_of_the_output_to_the_preactivation(name: Any) -> None:
    units = Units(name)
    layer = TargetLinear(6, 5, activation=units, rule=Kaczmarz(std=1.0), reverse_activation="relu", dtype=torch.float64)
    x = torch.rand(4, 6).double().requires_grad_()
    z = torch.nn.functional.linear(x, layer.weight, layer.bias).detach()
    output, target = layer(x), units.feasible(torch.randn(4, 5).double())
    assert torch.equal(output, units(z))
    output.backward(output.detach() - target)
    step = kaczmarz_step(units.input_target(target, z) - z, x.detach(), layer.weight, True, Units("relu"))
    torch.testing.assert_close(layer.weight.grad, -step.weight)
    torch.testing.assert_close(x.grad, x.detach() - step.input)
    if name in ("n_hot", "binary"):
        return
    # These ask for a distance between on and off, the others for nothing that the output has already.
    torch.testing.assert_close(layer.input_displacement(x, torch.zeros(4, 5).double()), torch.zeros(4, 6).double())


def test_weight_norm_of_torch_splits_the_update_into_length_and_direction() -> None:
    plain = TargetLinear(6, 4, rule=Kaczmarz(std=1.0), dtype=torch.float64)
    x, d = torch.rand(5, 6).double(), torch.randn(5, 4).double()
    plain(x).backward(-d)
    layer = weight_norm(copy.deepcopy(plain))
    layer(x).backward(-d)
    length, direction = (getattr(layer.parametrizations.weight, name) for name in ("original0", "original1"))
    unit = plain.weight / plain.weight.norm(dim=1, keepdim=True)
    along = (plain.weight.grad * unit).sum(1, keepdim=True)
    torch.testing.assert_close(length.grad, along)
    torch.testing.assert_close(direction.grad, plain.weight.grad - along * unit)


def test_a_head_of_codes_predicts_the_nearest() -> None:
    """Three clusters by two binary outputs."""
    codes, centers = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.randn(3, 10) * 3
    model = MLP([10, 12, 2], "relu", rule=Kaczmarz(std=1e-2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    for _ in range(200):
        labels = torch.randint(3, (16,))
        optimizer.zero_grad()
        HotTargetLoss()(model(centers[labels] + 0.1 * torch.randn(16, 10)), codes[labels]).backward()
        optimizer.step()
    assert torch.equal(torch.cdist(model(centers), codes).argmin(1), torch.arange(3))


def test_parameters_are_drawn_with_the_standard_deviation() -> None:
    first, second = MLP([300, 200, 100], "relu", rule=Kaczmarz(std=0.1))
    # Of K normal numbers the standard deviation is known to within some 1 / sqrt(2 K): four of them.
    for values in (first.weight, second.weight, torch.cat([first.bias, second.bias])):
        assert values.std().item() == pytest.approx(0.1, rel=4 / (2 * values.numel()) ** 0.5)


def test_the_rule_can_be_changed() -> None:
    model = MLP([6, 5, 3], "relu", rule=Kaczmarz(std=0.5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.rand(4, 6)
    output = model(x)
    model.rule = RegularizedLeastSquares()
    torch.testing.assert_close(model(x), output)
    model.rule = Kaczmarz(0.5)
    assert model.rule == Kaczmarz(0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"activation must be one of 'identity', .* under Kaczmarz, got .*tanh"):
        MLP([6, 5, 3]).rule = Kaczmarz()
    with pytest.raises(ValueError, match=r"activation=.*binary.* needs rule=tpext\.Kaczmarz\(\), the rule is Backprop"):
        MLP([6, 5, 3], "binary", rule=Kaczmarz()).rule = Backprop()


def test_diagnostics_compare_with_back_propagation() -> None:
    model, x = MLP([6, 5, 3], "relu", rule=Kaczmarz(std=0.5)), torch.rand(4, 6)
    labels = torch.tensor([0, 1, 2, 0])
    layers = layer_diagnostics(model, lambda net: HotTargetLoss()(net(x), labels))
    # The last layer's is minus the mean of c x'' where back-propagation's is minus the sum of d x.
    assert [layer.name for layer in layers] == ["0", "1"]
    assert all(0 < layer.angle < 90 and layer.norm_ratio > 0 for layer in layers)


@pytest.mark.parametrize("output", OUTPUTS)
def test_loss_asks_for_the_target(output: Any) -> None:
    z, labels = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    loss = HotTargetLoss(output)(z, labels)
    loss.backward()
    target = hot_target(torch.nn.functional.one_hot(labels, 3).float(), z.detach(), output)
    torch.testing.assert_close(z.detach() - z.grad, target)
    torch.testing.assert_close(loss.detach(), (z.detach() - target).square().sum() / 2)
    torch.testing.assert_close(HotTargetLoss(output)(z, torch.nn.functional.one_hot(labels, 3)), loss)


@pytest.mark.parametrize(
    ("rule", "units"),
    [
        (Kaczmarz(std=1e-2), "relu"),
        (Kaczmarz(dx="wnorm", first="weights", std=1e-2), "doubled_relu"),
        (Kaczmarz(dx="regularized", update="exact", batch_reg=1.0, std=1e-2), "relu"),
        (Kaczmarz(0.5, damping=1.0, std=1e-2), Units("n_hot", 4)),
        (Kaczmarz(std=1e-2), "binary"),
        (Kaczmarz(sticky=1.0, keep_norm=True, std=0.3), "relu"),
    ],
)
def test_a_network_learns(rule: Kaczmarz, units: Any) -> None:
    """Three well separated clusters, by the plain loop of any other PyTorch model."""
    centers = torch.randn(3, 10) * 3
    model = MLP([10, 12, 3], units, rule=rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    for _ in range(200):
        labels = torch.randint(3, (16,))
        optimizer.zero_grad()
        HotTargetLoss()(model(centers[labels] + 0.1 * torch.randn(16, 10)), labels).backward()
        optimizer.step()
    labels = torch.arange(3).repeat(20)
    accuracy = (model(centers[labels] + 0.1 * torch.randn(60, 10)).argmax(1) == labels).float().mean()
    assert accuracy > 0.95


def test_compiles_in_one_graph() -> None:
    model = MLP([6, 5, 3], "relu", rule=Kaczmarz(0.7, 0.1, dx="regularized", std=0.5))
    x, labels = torch.rand(4, 6), torch.tensor([0, 1, 2, 0])

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        HotTargetLoss()(run(x), labels).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(model)
    for actual, wanted in zip(
        gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_differentiating_twice_is_refused() -> None:
    model = MLP([4, 3, 2], "relu", rule=Kaczmarz())
    loss = HotTargetLoss()(model(torch.rand(2, 4)), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match=r"not a derivative.*rule=tpext\.Backprop\(\)"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_autocast_computes_in_float32() -> None:
    model = MLP([6, 5, 3], "relu", rule=Kaczmarz(std=0.5))
    x = torch.rand(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x.bfloat16())
    assert output.dtype == torch.bfloat16
    first, second = model
    torch.testing.assert_close(output, second(first(x.bfloat16().float()).bfloat16().float()).bfloat16())


def test_state_dict_is_that_of_other_rules_and_of_linear_layers() -> None:
    model, other = MLP([6, 5, 3], "relu", rule=Kaczmarz()), MLP([6, 5, 3], "relu", rule=Backprop())
    other.load_state_dict(model.state_dict())
    x = torch.rand(2, 6)
    assert torch.equal(other(x), model(x))
    torch.nn.Linear(6, 5).load_state_dict(model[0].state_dict())
    assert "activation='relu', rule=Kaczmarz()" in repr(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dx", MOVES)
def test_on_a_gpu_as_on_the_cpu(dx: Any) -> None:
    x, labels = torch.rand(20, 6).double(), torch.randint(3, (20,))
    weights, biases = (
        [torch.randn(5, 6).double(), torch.randn(3, 5).double()],
        [torch.zeros(5).double(), torch.zeros(3).double()],
    )
    there = [[tensor.cuda() for tensor in tensors] for tensors in (weights, biases)]
    expected = kaczmarz_train(x, labels, weights, biases, dx=dx)
    actual = kaczmarz_train(x.cuda(), labels.cuda(), *there, dx=dx)
    assert torch.equal(actual.cpu(), expected)
    for a, b in zip((*there[0], *there[1]), (*weights, *biases), strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_running_accuracy_is_a_running_mean() -> None:
    assert running_accuracy(torch.zeros(0, dtype=torch.bool), start=0.5) == 0.5
    assert running_accuracy(torch.ones(20000, dtype=torch.bool)) == pytest.approx(1, abs=1e-8)
    with pytest.raises(ValueError, match=r"running_accuracy: correct must be \[K\]"):
        running_accuracy(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"running_accuracy: decay must be >= 0 and < 1, got 1\.0"):
        running_accuracy(torch.zeros(2), decay=1.0)


def test_published_network_on_mnist(shared: Path) -> None:
    """Two epochs: 64 at a time with published initial weights; one at a time, the regularised move from great ones."""
    data = load_mnist(shared / "data")
    x, labels = data.train_images.float() / 255, data.train_labels
    test = data.test_images.float() / 255
    model = MLP([784, 32, 10], "relu", rule=Kaczmarz())
    optimizer, loss, batches = torch.optim.SGD(model.parameters(), lr=1), HotTargetLoss(), []
    for rows in torch.cat([torch.randperm(len(x)) for _ in range(2)]).split(64):
        z = model(x[rows])
        batches.append((z.argmax(1) == labels[rows]).float().mean())
        optimizer.zero_grad()
        loss(z, labels[rows]).backward()
        optimizer.step()
    assert torch.stack(batches[-500:]).mean() > 0.88
    assert (model(test).argmax(1) == data.test_labels).float().mean() > 0.88
    order = torch.randperm(len(x))
    diverging = MLP([784, 32, 10], "relu", rule=Kaczmarz(std=1.0))
    diverging.stream(x[order], labels[order])
    greatest = diverging[0].weight.abs().max()
    assert not greatest < 1e3
    regular = MLP([784, 32, 10], "relu", rule=Kaczmarz(dx="regularized", std=1.0))
    regular.stream(x[order], labels[order])
    assert regular[0].weight.abs().max() < 1e3
