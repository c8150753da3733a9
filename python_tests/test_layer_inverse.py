"""Layer inverses: equal to published numbers and to the oracle, globally minimal, exact identities, clear errors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tpext
from tpext import _C, reference
from tpext.ops import Activation, bias_inverse, layer_displacement, layer_inverse, linear_inverse
from tpext.ops.act_inverse import _displacement, _minimizer
from tpext.reference.layer_inverse import activation_and_slope, activation_change

act_displacement = torch.ops.tpext.act_displacement
act_inverse = torch.ops.tpext.act_inverse
regularized_inverse = torch.ops.tpext.regularized_inverse

NAMES = ["tanh", "sigmoid", "relu", "leaky_relu", "identity"]
SMOOTH = ["tanh", "sigmoid"]
METHODS = ["regularized", "constrained"]
FORMS = ["proximal", "ridge"]
REGS = [1e-8, 1e-4, 1e-2, 0.1, 0.3, 1.0, 10.0, 1e3]
SLOPE = 0.125
EDGE_TARGETS = [-1e4, -2.0, -1.001, -1.0, -0.999, -0.5, -1e-3, 0.0, 1e-3, 0.3, 0.5, 0.999, 1.0, 1.001, 1.3, 2.0, 1e4]
EDGE_INPUTS = [-50.0, -18.0, -8.0, -3.0, -1.5, -0.5, -1e-3, 0.0, 1e-3, 0.5, 1.5, 3.0, 8.0, 18.0, 50.0]
DISPLACEMENTS = [1e-30, 1e-12, 1e-6, 1e-4, 3e-3, 0.03, 0.1, 0.3, 1.0, 10.0]
MOVED_INPUTS = [-16.0, -3.0, -1.5, -0.5, -1e-3, 0.0, 0.7, 2.0, 8.0]


def published(file: str) -> dict[str, Tensor]:
    arrays = np.load(Path(__file__).parent / "data" / file)
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].ndim > 0}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """What the published code gives for its operations, in float64."""
    return published("A_ops.npz")


def minimizers(name: str, y: Tensor, c: Tensor, reg: float) -> list[Tensor]:
    """The regularised inverse by the op and, for tanh and sigmoid, by the torch operations that CUDA tensors take."""
    by_op = Activation(name, SLOPE).regularized_inverse(y, c, reg)
    return [by_op, _minimizer(y, c, name, reg)] if name in SMOOTH else [by_op]


def grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every target with every input, among them those at and beyond the edges of the ranges."""
    pairs = torch.tensor(list(itertools.product(EDGE_TARGETS, EDGE_INPUTS)), dtype=dtype)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def excess_cost(name: str, x: Tensor, best: np.ndarray, y: Tensor, c: Tensor, reg: float) -> np.ndarray:
    """By how much the cost at x exceeds that at ``best``, over what rounding y, c and x once changes it by."""
    X, Y, C = (a.numpy().astype(np.longdouble) for a in (x, y, c))
    cost = reference.activation_cost(X, Y, C, name, SLOPE, reg)
    eps = torch.finfo(x.dtype).eps
    value, slope = activation_and_slope(X, name, SLOPE)
    residual, moved = eps * (np.abs(value) + np.abs(Y) + slope * np.abs(X)), eps * (np.abs(X) + np.abs(C))
    rounding = residual * (np.abs(value - Y) + residual) + reg * moved * (np.abs(X - C) + moved)
    allowed = rounding + eps * cost + torch.finfo(x.dtype).tiny
    excess = cost - reference.activation_cost(best, Y, C, name, SLOPE, reg)
    return np.clip(excess / allowed, -1e300, 1e300).astype(float)


def assert_minimize(name: str, solutions: list[Tensor], y: Tensor, c: Tensor, reg: float) -> None:
    """The costs are the oracle's to rounding, and where the cost is curved the derivative is zero to rounding."""
    Y, C = (a.numpy().astype(np.longdouble) for a in (y, c))
    best = reference.act_inverse(Y, C, name, SLOPE, reg, 0.0)
    eps, tiny = torch.finfo(y.dtype).eps, torch.finfo(y.dtype).tiny
    for x in solutions:
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        excess = excess_cost(name, x, best, y, c, reg)
        worst = int(np.argmax(excess))
        where = f"target {y[worst].item()!r}, input {c[worst].item()!r}, reg {reg}: {x[worst].item()!r}"
        assert excess[worst] <= 8, f"{where}, {best[worst]!r} has a cost less by {excess[worst]} roundings"
        if name not in SMOOTH:
            continue
        X = x.numpy().astype(np.longdouble)
        value, slope = activation_and_slope(X, name, SLOPE)
        derivative = (value - Y) * slope + reg * (X - C)
        bend = -2 * value if name == "tanh" else 1 - 2 * value
        curvature = slope**2 + (value - Y) * slope * bend + reg
        terms = slope * (1 + np.abs(Y)) + reg * (np.abs(X) + np.abs(C))
        rounding = eps * (terms + np.abs(curvature * X)) + tiny
        curved = curvature > 1e-2 * (slope * (1 + np.abs(Y)) + reg)
        excess = np.where(curved, np.abs(derivative) / rounding, 0).astype(float)
        worst = int(np.argmax(excess))
        where = f"target {y[worst].item()!r}, input {c[worst].item()!r}, reg {reg}: {x[worst].item()!r}"
        assert excess[worst] <= 4, f"{where} is not stationary by {excess[worst]} roundings, {best[worst]!r} is best"


def slow(*values: float) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reg", REGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_regularized_equals_the_oracle(name: str, reg: float, dtype: torch.dtype) -> None:
    y, c = grid(dtype)
    assert_minimize(name, minimizers(name, y, c, reg), y, c, reg)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", [2.0**-7, 2.0**-20])
def test_constrained_equals_the_oracle(name: str, dtype: torch.dtype, margin: float) -> None:
    y, c = grid(dtype)
    expected = reference.act_inverse(y.numpy(), c.numpy(), name, SLOPE, 0.0, margin)
    actual = Activation(name, SLOPE).inverse(y, c, margin)
    # At the clipped edge rounding 1 - margin moves the result by eps / margin.
    rtol = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=rtol, atol=rtol / margin)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    y=st.one_of(st.floats(-1.5, 1.5), st.floats(-1e6, 1e6)),
    c=st.one_of(st.floats(-3, 3), st.floats(-60, 60)),
    log_reg=st.floats(-10, 4),
    dtype=st.sampled_from(DTYPES),
)
def test_regularized_is_a_global_minimum(name: str, y: float, c: float, log_reg: float, dtype: torch.dtype) -> None:
    target, input = torch.tensor([y], dtype=dtype), torch.tensor([c], dtype=dtype)
    reg = 10.0**log_reg
    points = np.concatenate([np.linspace(-60, 60, 4001), c + np.linspace(-2, 2, 2001), np.linspace(-8, 8, 2001)])
    solutions = minimizers(name, target, input, reg)
    for x in solutions:
        assert excess_cost(name, x, points.astype(np.longdouble), target, input, reg).max() <= 8
    assert_minimize(name, solutions, target, input, reg)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [-0.99, *slow(-0.5), 0.0, 0.5, *slow(1.0, 3.0)])
def test_where_two_minima_merge(name: str, dtype: torch.dtype, tail: float) -> None:
    """Around the reg and input at which the cost of tanh has a minimum of fourth order."""
    t = np.roots([-12, 6 * tail, 8, -2 * tail]).real.min()
    critical = (1 - t * t) * (3 * t * t - 2 * tail * t - 1)
    center = np.arctanh(t) - (tail - t) * (1 - t * t) / critical
    offsets = np.concatenate([[0.0], np.geomspace(1e-12, 0.1, 12), -np.geomspace(1e-12, 0.1, 12)])
    for change in (-1e-2, -1e-4, -1e-8, 0.0, 1e-8, 1e-4, 1e-2):
        y, c, reg = torch.full((len(offsets),), tail).double(), center + offsets, critical * (1 + change)
        if name == "sigmoid":
            y, c, reg = (y + 1) / 2, 2 * c, reg / 16
        y, c = y.to(dtype), torch.from_numpy(c).to(dtype)
        assert_minimize(name, minimizers(name, y, c, reg), y, c, reg)
        mirrored = 1 - y if name == "sigmoid" else -y
        assert_minimize(name, minimizers(name, mirrored, -c, reg), mirrored, -c, reg)


@pytest.mark.parametrize("name", SMOOTH)
def test_where_two_minima_cost_the_same(name: str) -> None:
    """A fine scan of inputs over the jump from the minimum near the input to that near the target's preimage."""
    y, c = torch.full((2001,), 0.9), torch.linspace(-8, 0, 2001)
    for dtype, reg in itertools.product(DTYPES, (1e-3, 1e-2, 3e-2)):
        y, c = y.to(dtype), c.to(dtype)
        solutions = minimizers(name, y, c, reg)
        for x in solutions:
            moved = x - c
            assert ((moved[1:] - moved[:-1]).abs() > 0.5).sum() <= 1
        some = slice(None, None, 40)
        assert_minimize(name, [x[some] for x in solutions], y[some], c[some], reg)


@pytest.mark.parametrize("slope", [0.0, 0.125, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("reg", [0.125, 1.0, 8.0])
def test_piecewise_linear_against_brute_force(slope: float, reg: float) -> None:
    activation = Activation("leaky_relu", slope) if slope else Activation("relu")
    y, c = torch.randn(500, dtype=torch.float64) * 3, torch.randn(500, dtype=torch.float64) * 3
    x = activation.regularized_inverse(y, c, reg)
    points = torch.linspace(-30, 30, 6001, dtype=torch.float64)[:, None]
    costs = (activation(points) - y) ** 2 + reg * (points - c) ** 2
    cost = (activation(x) - y) ** 2 + reg * (x - c) ** 2
    assert (cost <= costs.amin(0) * (1 + 1e-12)).all()
    assert (cost >= costs.amin(0) - (max(slope, 1) ** 2 + reg) * 0.01**2).all()


def test_relu_takes_the_active_side_at_a_tie() -> None:
    # reg / (1 + reg) (y - c)^2 = y^2 for reg = 1/3, y = 1, c = -1.
    assert Activation("relu").regularized_inverse(torch.ones(1), -torch.ones(1), 1 / 3).item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_great_reg_gives_the_input_or_zero(name: str, dtype: torch.dtype) -> None:
    y, c = torch.randn(50, dtype=dtype), torch.randn(50, dtype=dtype)
    for reg in (1e30, 1e300):
        x = Activation(name, SLOPE).regularized_inverse(y, c, reg)
        torch.testing.assert_close(x, c)
        ridge = Activation(name, SLOPE).regularized_inverse(y, c, reg, form="ridge")
        torch.testing.assert_close(ridge, torch.zeros_like(c))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_small_reg_gives_the_constrained_inverse_in_the_range(name: str, form: Any) -> None:
    c = torch.randn(200, dtype=torch.float64)
    activation = Activation(name, SLOPE)
    y = activation(torch.randn(200, dtype=torch.float64))
    expected = activation.inverse(y, c if form == "proximal" else torch.zeros_like(c), 1e-9)
    torch.testing.assert_close(activation.regularized_inverse(y, c, 0.0, form), expected)
    torch.testing.assert_close(activation.regularized_inverse(y, c, 1e-12, form), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_reg_a_target_beyond_the_range_is_brought_inside(name: str, dtype: torch.dtype) -> None:
    c = torch.zeros(2, dtype=dtype)
    x = Activation(name).regularized_inverse(torch.tensor([2.0, -2.0], dtype=dtype), c, 0.0)
    eps = torch.finfo(dtype).eps
    expected = np.arctanh(1 - eps) if name == "tanh" else np.log((1 - eps) / eps)
    torch.testing.assert_close(x, torch.tensor([expected, -expected], dtype=dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reg", [1e-3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_as_target_gives_the_input(name: str, reg: float, dtype: torch.dtype) -> None:
    activation, c = Activation(name, SLOPE), torch.randn(100, dtype=dtype) * 2
    eps = torch.finfo(dtype).eps
    x = activation.regularized_inverse(activation(c), c, reg)
    torch.testing.assert_close(x, c, rtol=8 * eps, atol=8 * eps / reg)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reg", [0.0, 0.1])
def test_nan_passes_through_and_stays_where_it_is(name: str, reg: float) -> None:
    y, c = torch.full((3,), 0.5), torch.full((3,), -0.25)
    y[1] = torch.nan
    x = Activation(name, SLOPE).regularized_inverse(y, c, reg)
    assert x.isnan().tolist() == [False, True, False]
    if reg > 0:
        c[2] = torch.nan
        x = Activation(name, SLOPE).regularized_inverse(y, c, reg)
        assert x.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_values_and_derivatives_of_activations(name: str) -> None:
    activation = Activation(name, SLOPE)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    (expected,) = torch.autograd.grad(activation(x), x, grad)
    torch.testing.assert_close(activation.derivative(grad, x.detach()), expected)
    modules = [torch.nn.Tanh(), torch.nn.Sigmoid(), torch.nn.ReLU(), torch.nn.LeakyReLU(SLOPE), torch.nn.Identity()]
    torch.testing.assert_close(activation(x), modules[NAMES.index(name)](x))


def test_published_numbers_of_activations(golden: dict[str, Tensor]) -> None:
    def check(key: str, actual: Tensor) -> None:
        torch.testing.assert_close(actual, golden[key], rtol=1e-9, atol=1e-12, msg=lambda m: f"{key}: {m}")

    def arguments(name: str) -> tuple[Tensor, Tensor, Tensor]:
        return golden[f"{name}_x0"], golden[f"{name}_y"], golden[f"{name}_ct"]

    for name in ("tanh", "sigmoid", "relu"):
        x0, y, grad = arguments(name)
        activation = Activation(name)
        check(f"{name}_f", activation(x0))
        check(f"{name}_df", activation.derivative(grad, x0))
        check(f"{name}_finv", activation.inverse(y, x0))
    x0, y, grad = arguments("relu")
    leaky = Activation("leaky_relu", 0.1)
    check("lrelu_f", leaky(x0))
    check("lrelu_df", leaky.derivative(grad, x0))
    check("lrelu_finv", leaky.inverse(y, x0))
    for reg in (0.01, 0.5, 5.0):
        for compat in (False, True):
            check(f"relu_frinv_g{reg}", Activation("relu", reference_compat=compat).regularized_inverse(y, x0, reg))
    for name, (reg, rate, steps) in itertools.product(SMOOTH, [(0.01, 0.1, 2), (0.5, 2.0, 25)]):
        x0, y, _ = arguments(name)
        activation = Activation(name, reference_compat=True, learning_rate=rate, num_steps=steps)
        check(f"{name}_frinv_g{reg}_lr{rate}_s{steps}", activation.regularized_inverse(y, x0, reg))
    identity = Activation("identity", reference_compat=True)
    check("id_frinv", identity.regularized_inverse(golden["id_y"], golden["add_x0"], 0.5))


def test_published_numbers_of_linear_maps_and_biases(golden: dict[str, Tensor]) -> None:
    def check(key: str, actual: Tensor) -> None:
        torch.testing.assert_close(actual, golden[key], rtol=1e-9, atol=1e-12, msg=lambda m: f"{key}: {m}")

    for shape in ("tall", "wide", "square"):
        A, x0, y = (golden[f"lin_{shape}_{key}"] for key in ("A", "x0", "y"))
        weight = A.mT
        check(f"lin_{shape}_f", x0 @ weight.mT)
        check(f"lin_{shape}_df", y @ weight)
        check(f"lin_{shape}_finv", linear_inverse(y, x0, weight))
        for reg in (0.01, 1.0):
            check(f"lin_{shape}_frinv_g{reg}", linear_inverse(y, x0, weight, reg))
    b, x0, y = (golden[f"add_{key}"] for key in ("b", "x0", "y"))
    check("add_f", x0 + b)
    b = b.view(-1)
    check("add_finv", bias_inverse(y, x0, b))
    check("add_frinv_g0p01", bias_inverse(y, x0, b, 0.01))


@pytest.mark.parametrize(("algorithm", "method"), [(1, "constrained"), (2, "regularized")])
def test_published_targets_of_whole_layers(algorithm: int, method: Any) -> None:
    """Two tanh layers and a linear one on top, with the published code's two gradient steps."""
    numbers = published("A_err_tanh.npz")
    for layer_number in (3, 2, 1):
        name: Any = "tanh" if layer_number < 3 else "identity"
        actual = layer_inverse(
            numbers[f"alg{algorithm}_t3_{layer_number}"],
            numbers[f"alg{algorithm}_x3_{layer_number - 1}"],
            numbers[f"W{layer_number}"].mT,
            numbers[f"b{layer_number}"].view(-1),
            Activation(name, reference_compat=True, learning_rate=0.1, num_steps=2),
            method=method,
            reg=0.05,
        )
        expected = numbers[f"alg{algorithm}_t3_{layer_number - 1}"]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (4, 4), (1, 7), (30, 20)], ids=str)
@pytest.mark.parametrize("reg", [0.0, 1e-3, 1.0, 1e3])
def test_linear_equals_the_larger_system(shape: tuple[int, int], reg: float) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    y, x0 = torch.randn(2, 5, shape[0], dtype=torch.float64), torch.randn(2, 5, shape[1], dtype=torch.float64)
    for center, form in ((x0, "proximal"), (torch.zeros_like(x0), "ridge")):
        expected = torch.from_numpy(reference.linear_inverse(y.numpy(), center.numpy(), weight.numpy(), reg))
        known = regularized_inverse(weight, reg)
        torch.testing.assert_close(linear_inverse(y, x0, weight, reg, form), expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            linear_inverse(y, x0, weight, form=form, inverse=known), expected, rtol=1e-8, atol=1e-8
        )


def test_linear_of_low_rank_is_refused_without_reg_unless_the_pseudo_inverse_is_given() -> None:
    weight = torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 4, dtype=torch.float64)
    y, x0 = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(tpext.SingularError, match="regularized_inverse"):
        linear_inverse(y, x0, weight)
    expected = reference.linear_inverse(y.numpy(), x0.numpy(), weight.numpy())
    actual = linear_inverse(y, x0, weight, inverse=torch.linalg.pinv(weight))
    torch.testing.assert_close(actual, torch.from_numpy(expected))
    torch.testing.assert_close(linear_inverse(y, x0, weight, 1e-9), actual, rtol=1e-5, atol=1e-5)


def test_linear_and_bias_inverses_are_differentiable() -> None:
    y, x, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4), (2, 3), (4, 3), (4,))
    )
    assert torch.autograd.gradcheck(lambda *a: linear_inverse(*a, 0.5), (y, x, weight))
    assert torch.autograd.gradcheck(lambda *a: bias_inverse(*a, 0.5), (y, y, bias))


def layer(M: int = 6, N: int = 4, B: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A target, and the input, weight and bias of a layer."""
    return [torch.randn(size, dtype=dtype) for size in ((B, M), (B, N), (M, N), (M,))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (5, 5)], ids=str)
def test_layer_equals_the_oracle(name: Any, method: Any, form: Any, sizes: tuple[int, int]) -> None:
    arguments = layer(*sizes)
    options = {"method": method, "reg": 0.25, "form": form, "margin": 0.0625}
    expected = reference.layer_inverse(*(a.numpy() for a in arguments), name, SLOPE, **options)
    activation = Activation(name, SLOPE)
    actual = layer_inverse(*arguments, activation, **options)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-8, atol=1e-8)
    known = regularized_inverse(arguments[2], 0.25 if method == "regularized" else 0.0)
    torch.testing.assert_close(layer_inverse(*arguments, activation, inverse=known, **options), actual)
    no_bias = layer_inverse(*arguments[:3], None, activation, **options)
    if method == "constrained":
        zero = layer_inverse(*arguments[:3], torch.zeros_like(arguments[3]), activation, **options)
        torch.testing.assert_close(no_bias, zero)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_displacement_is_the_difference_of_two_inverses(name: Any, method: Any, form: Any) -> None:
    displacement, x, weight, bias = layer()
    displacement = 0.1 * displacement
    options = {"method": method, "form": form, "reg": 0.25}
    output = Activation(name)(x @ weight.mT + bias)
    moved, still = (layer_inverse(y, x, weight, bias, name, **options) for y in (output + displacement, output))
    actual = layer_displacement(displacement, x, weight, bias, name, **options)
    torch.testing.assert_close(actual, moved - still)
    none = layer_displacement(torch.zeros_like(output), x, weight, bias, name, **options)
    assert (none == 0).all()


def test_displacement_of_an_identity_layer_is_the_reverse_layer_of_the_recurrent_nets() -> None:
    displacement, x, weight, _ = layer()
    actual = layer_displacement(displacement, x, weight, None, "identity", reg=0.5)
    torch.testing.assert_close(actual, displacement @ regularized_inverse(weight, 0.5).mT / 1.5)


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_output_as_target_gives_its_input(name: Any) -> None:
    _, x, weight, bias = layer()
    output = Activation(name)(x @ weight.mT + bias)
    torch.testing.assert_close(layer_inverse(output, x, weight, bias, name), x, rtol=1e-10, atol=1e-10)


def test_a_saturated_unit_moves_only_where_its_range_is_clipped() -> None:
    x, weight = torch.full((1, 1), 4.0), torch.ones(1, 1)
    output = torch.tanh(x)
    assert layer_inverse(output, x, weight, None, "tanh", method="constrained").item() == pytest.approx(
        np.arctanh(0.99)
    )
    still = layer_displacement(torch.zeros(1, 1), x, weight, None, "tanh", method="constrained")
    assert still.item() == 0


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads_and_in_any_company(name: str, dtype: torch.dtype) -> None:
    y, c = 1.5 * torch.randn(5003, dtype=dtype), 2 * torch.randn(5003, dtype=dtype)
    torch.set_num_threads(1)
    expected = Activation(name).regularized_inverse(y, c, 0.05)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(Activation(name).regularized_inverse(y, c, 0.05), expected)
    for first, last in ((0, 1), (3, 50), (2000, 2017), (4990, 5003)):
        part = slice(first, last)
        assert torch.equal(Activation(name).regularized_inverse(y[part], c[part], 0.05), expected[part])


def displacements(name: str, d: Tensor, c: Tensor, reg: float) -> list[Tensor]:
    """By the op and, for tanh and sigmoid, by the torch operations that CUDA tensors take."""
    by_op = act_displacement(d, c, name, SLOPE, reg)
    return [by_op, _displacement(d, c, name, reg)] if name in SMOOTH else [by_op]


def assert_moves(name: str, d: Tensor, c: Tensor, reg: float) -> None:
    """To a few roundings of the result where the cost is curved, and where it is small: 3/8 of tanh's input."""
    D, C = (a.numpy().astype(np.longdouble) for a in (d, c))
    expected = reference.act_displacement(D, C, name, SLOPE, reg)
    info = torch.finfo(d.dtype)
    checked = np.ones(d.shape, bool)
    if name in SMOOTH:
        scale = 2 if name == "sigmoid" else 1
        value, slope = activation_and_slope(C + expected, name, SLOPE)
        bend = (-2 * value if name == "tanh" else 1 - 2 * value) * slope
        gap = activation_change(expected, C, scale) - D
        curvature = slope**2 + gap * bend + reg
        checked = (curvature > 0.25 * (slope**2 + np.abs(gap * bend) + reg)) & (np.abs(expected) < 0.375 * scale)
        assert checked.sum() > 0.25 * len(d)
    # Products with the displacement that are no normal numbers count as zero.
    lost = info.tiny / (info.eps * min(reg, 1.0))
    for z in displacements(name, d, c, reg):
        assert z.dtype == d.dtype
        assert z.shape == d.shape
        error = np.abs(z.numpy() - expected) / (info.eps * (np.abs(expected) + lost))
        worst = int(np.argmax(np.where(checked, error, 0)))
        where = f"displacement {d[worst].item()!r}, input {c[worst].item()!r}, reg {reg}: {z[worst].item()!r}"
        assert error[worst] <= 12 or not checked[worst], f"{where} is not {expected[worst]!r}, by {error[worst]} eps"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reg", [1e-6, *slow(1e-3), 0.1, *slow(1.0), 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_displacements_keep_their_digits(name: str, reg: float, dtype: torch.dtype) -> None:
    sizes = [sign * size for size in DISPLACEMENTS for sign in (1, -1)]
    pairs = torch.tensor(list(itertools.product(sizes, MOVED_INPUTS)), dtype=dtype)
    assert_moves(name, pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), reg)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    log_d=st.floats(-12, 1),
    sign=st.sampled_from([-1, 1]),
    c=st.one_of(st.floats(-3, 3), st.floats(-12, 12)),
    log_reg=st.floats(-6, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_displacement_is_globally_the_best(
    name: str, log_d: float, sign: int, c: float, log_reg: float, dtype: torch.dtype
) -> None:
    d, input = torch.tensor([sign * 10.0**log_d], dtype=dtype), torch.tensor([c], dtype=dtype)
    reg = 10.0**log_reg
    y = Activation(name, SLOPE)(input) + d
    D, C = (a.numpy().astype(np.longdouble) for a in (d, input))
    points = np.concatenate([np.linspace(-60, 60, 4001) - C, np.linspace(-2, 2, 2001), [0.0]])

    def change(u: np.ndarray) -> np.ndarray:
        if name in SMOOTH:
            return activation_change(u, C, 2.0 if name == "sigmoid" else 1.0)
        return activation_and_slope(C + u, name, SLOPE)[0] - activation_and_slope(C, name, SLOPE)[0]

    eps = torch.finfo(dtype).eps
    for z in displacements(name, d, input, reg):
        u = z.numpy().astype(np.longdouble)
        cost, slope = (change(u) - D) ** 2 + reg * u**2, activation_and_slope(C + u, name, SLOPE)[1]
        # What rounding y = a(c) + d and x = c + u changes it by, as large moves may come from these.
        residual = eps * (abs(y.item()) + 1 + slope * (np.abs(C) + np.abs(u)))
        moved = eps * (np.abs(C) + np.abs(u))
        rounding = residual * (np.abs(change(u) - D) + residual) + reg * moved * (np.abs(u) + moved)
        allowed = 8 * (rounding + eps * cost)
        assert (cost - ((change(points) - D) ** 2 + reg * points**2)).max() <= allowed


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("reg", [1e-3, 0.1, 1.0])
def test_great_displacements_are_those_of_the_inverse(name: str, reg: float) -> None:
    d, c = 3 * torch.randn(2000, dtype=torch.float64), torch.randn(2000, dtype=torch.float64)
    expected = act_inverse(Activation(name)(c) + d, c, name, SLOPE, reg, 0.01) - c
    for z in displacements(name, d, c, reg):
        torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("reg", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_displacements_are_of_first_order(name: str, reg: float, dtype: torch.dtype) -> None:
    c = torch.linspace(-9, 9, 301, dtype=dtype)
    slope = torch.from_numpy(activation_and_slope(c.double().numpy(), name, SLOPE)[1])
    for d in (1e-22, -1e-25):
        expected = (d * slope / (slope**2 + reg)).to(dtype)
        for z in displacements(name, torch.full_like(c, d), c, reg):
            torch.testing.assert_close(z, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reg", [1e-300, 1e-38, 1e-12, 1e-4, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_displacement_moves_nothing(name: str, reg: float, dtype: torch.dtype) -> None:
    c = torch.cat([torch.linspace(-60, 60, 500, dtype=dtype), torch.zeros(1, dtype=dtype)])
    for z in displacements(name, torch.zeros_like(c), c, reg):
        assert torch.equal(z, torch.zeros_like(z))


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_where_it_is_in_displacements(name: str) -> None:
    d, c = torch.full((40,), 1e-3), torch.full((40,), -0.25)
    d[1], c[2], d[20] = torch.nan, torch.nan, 5.0
    for z in displacements(name, d, c, 0.1):
        assert z.isnan().nonzero().flatten().tolist() == [1, 2]


def test_displacement_of_tanh_is_odd() -> None:
    d, c = 0.3 * torch.randn(5000), 2 * torch.randn(5000)
    for reg in (1e-3, 0.1):
        z = act_displacement(d, c, "tanh", SLOPE, reg)
        assert torch.equal(act_displacement(-d, -c, "tanh", SLOPE, reg), -z)


@pytest.mark.parametrize("name", NAMES)
def test_small_displacements_of_a_layer_keep_their_digits(name: Any) -> None:
    """In float32, at the size that a mean over a great batch gives, they are the first-order ones."""
    _, x, weight, bias = layer(dtype=torch.float32)
    d = 1e-10 * torch.randn(5, 6)
    slope = torch.from_numpy(activation_and_slope((x @ weight.mT + bias).double().numpy(), name, SLOPE)[1])
    moved = d.double() * slope / (slope**2 + 0.25) / 1.25
    expected = moved @ regularized_inverse(weight.double(), 0.25).mT
    actual = layer_displacement(d, x, weight, bias, Activation(name, SLOPE), reg=0.25)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_displacements_have_the_same_bits_on_any_number_of_threads_and_in_any_company(
    name: str, dtype: torch.dtype
) -> None:
    d, c = 0.3 * torch.randn(5003, dtype=dtype), 2 * torch.randn(5003, dtype=dtype)
    d[::3] *= 1e-4
    torch.set_num_threads(1)
    expected = act_displacement(d, c, name, SLOPE, 0.05)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(act_displacement(d, c, name, SLOPE, 0.05), expected)
    for first, last in ((0, 1), (3, 50), (2000, 2017), (4990, 5003)):
        part = slice(first, last)
        assert torch.equal(act_displacement(d[part], c[part], name, SLOPE, 0.05), expected[part])
    order = torch.randperm(5003)
    assert torch.equal(act_displacement(d[order], c[order], name, SLOPE, 0.05), expected[order])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compat", [False, True])
def test_shapes(shape: tuple[int, ...], name: Any, compat: bool) -> None:
    y, c = torch.randn(shape), torch.randn(shape)
    activation = Activation(name, reference_compat=compat and name != "leaky_relu")
    assert activation.regularized_inverse(y, c).shape == shape
    assert activation.inverse(y, c).shape == shape
    assert act_displacement(y, c, name, SLOPE, 0.1).shape == shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_as_they_are_and_results_are_new(name: Any, method: Any) -> None:
    arguments = layer()
    before = [a.clone() for a in arguments]
    layer_inverse(*arguments, name, method=method)
    layer_displacement(*arguments, name, method=method)
    y = arguments[0]
    for x in (Activation(name).inverse(y, y), Activation(name).regularized_inverse(y, y)):
        assert x.data_ptr() != y.data_ptr()
    for a, b in zip(arguments, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reg", [0.0, 0.1])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name: str, reg: float, requires_grad: bool) -> None:
    y, c = torch.rand(4, 3), torch.randn(3, 4, requires_grad=requires_grad).mT
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    samples = [(act_inverse, (y, c, name, SLOPE, reg, 0.01))]
    if reg > 0:
        samples.append((act_displacement, (y, c, name, SLOPE, reg)))
        expected = act_displacement(y, c.detach().contiguous(), name, SLOPE, reg)
        assert torch.equal(act_displacement(y, c, name, SLOPE, reg), expected)
    for op, arguments in samples:
        torch.library.opcheck(op.default, arguments, test_utils=utilities)
        if not requires_grad:
            torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("method", METHODS)
def test_compiles_in_one_graph(method: Any) -> None:
    arguments = layer(dtype=torch.float32)

    def run(target: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = layer_displacement(target, x, weight, bias, "sigmoid", method=method)
        return layer_inverse(target, x, weight, bias, "tanh", method=method, reg=0.1) + moved

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), run(*arguments))


@pytest.mark.parametrize("name", NAMES)
def test_differentiating_is_refused(name: Any) -> None:
    target, x, weight, bias = layer()
    for index in range(4):
        arguments = [a.clone().requires_grad_(i == index) for i, a in enumerate((target, x, weight, bias))]
        with pytest.raises(RuntimeError, match="not a derivative"):
            layer_inverse(*arguments, name).sum().backward()
        with pytest.raises(RuntimeError, match="not a derivative"):
            layer_displacement(*arguments, name).sum().backward()
    for index in range(2):
        d, c = (torch.randn(3).requires_grad_(i == index) for i in range(2))
        with pytest.raises(RuntimeError, match="not a derivative"):
            act_displacement(d, c, name, SLOPE, 0.1).sum().backward()


def test_forward_mode_is_refused() -> None:
    y, c = torch.randn(3), torch.randn(3)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="act_inverse: forward-mode"):
        Activation("tanh").inverse(torch.autograd.forward_ad.make_dual(y, c), c)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"act_.* no derivative"):
        act_displacement(torch.autograd.forward_ad.make_dual(y, c), c, "tanh", SLOPE, 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_computes_in_float32(method: Any) -> None:
    arguments = layer(dtype=torch.float32)
    expected = layer_inverse(*arguments, "tanh", method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer_inverse(*arguments, "tanh", method=method)
        alone = Activation("tanh").regularized_inverse(arguments[0].bfloat16(), arguments[0])
        moved = act_displacement(arguments[0].bfloat16(), arguments[0], "tanh", SLOPE, 0.1)
    assert torch.equal(actual, expected)
    assert alone.dtype == moved.dtype == torch.float32
    # as the ops do: arguments of lower precision become float32
    lower = [argument.bfloat16() for argument in arguments]
    with pytest.raises(
        ValueError, match=r"must be float32 or float64, got bfloat16; for lower precision use torch\.auto"
    ):
        layer_inverse(*lower, "tanh", method=method)
    for function in (layer_inverse, layer_displacement):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = function(*lower, "tanh", method=method)
        assert torch.equal(actual, function(*(argument.float() for argument in lower), "tanh", method=method))


@pytest.mark.parametrize("reg", [0.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(name: str, reg: float) -> None:
    y, c = grid(torch.float64)
    keep = (y.abs() < 100) & (c.abs() < 20)
    y, c = y[keep], c[keep]
    expected = Activation(name).regularized_inverse(y, c, reg)
    torch.testing.assert_close(Activation(name).regularized_inverse(y.cuda(), c.cuda(), reg).cpu(), expected)
    if reg > 0:
        moved = act_displacement(1e-9 * y, c, name, SLOPE, reg)
        actual = act_displacement(1e-9 * y.cuda(), c.cuda(), name, SLOPE, reg).cpu()
        torch.testing.assert_close(actual, moved, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(3)}, r"act_inverse: target must be \[2\], got \[3\]"),
        ({"target": torch.zeros(2).double()}, "act_inverse: target must be float32 as input is, got float64"),
        ({"target": torch.zeros(2, device="meta")}, "act_inverse: target must be on cpu as input is, got meta"),
        ({"input": torch.zeros(2).half()}, "act_inverse: input must be float32 or float64, got float16; for lower"),
        ({"input": torch.zeros(2).long()}, "act_inverse: input must be float32 or float64, got int64"),
        ({"activation": "gelu"}, "act_inverse: activation must be one of 'tanh', .*, got 'gelu'"),
        ({"activation": "leaky_relu", "slope": 0.0}, "act_inverse: slope must be a finite number > 0, got 0.0"),
        ({"reg": -1.0}, "act_inverse: reg must be a finite number >= 0, got -1.0"),
        ({"reg": float("nan")}, "act_inverse: reg must be"),
        ({"margin": 0.0}, r"act_inverse: margin must lie in \[1.19e-07, 0.5\) for float32, got 0.0"),
        ({"margin": 0.5}, "act_inverse: margin must lie in"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_op_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"target": torch.zeros(2), "input": torch.zeros(2), "activation": "tanh"}
    with pytest.raises(ValueError, match=message):
        act_inverse(**arguments | {"slope": 0.1, "reg": 0.1, "margin": 0.01} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"displacement": torch.zeros(3)}, r"displacement must be \[2\], got \[3\]"),
        ({"displacement": torch.zeros(2).double()}, "displacement must be float32 as input is, got float64"),
        ({"input": torch.zeros(2).half()}, "input must be float32 or float64, got float16; for lower"),
        ({"activation": "gelu"}, "activation must be one of 'tanh', .*, got 'gelu'"),
        ({"activation": "leaky_relu", "slope": 0.0}, "slope must be a finite number > 0, got 0.0"),
        ({"reg": 0.0}, "reg must be a finite number > 0, got 0.0"),
        ({"reg": float("nan")}, "reg must be a finite number > 0, got nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_displacement_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"displacement": torch.zeros(2), "input": torch.zeros(2), "activation": "tanh"}
    with pytest.raises(ValueError, match=f"act_displacement: {message}"):
        act_displacement(**arguments | {"slope": 0.1, "reg": 0.1} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(2, 1)}, r"target must be \[N\], got \[2, 1\]"),
        ({"target": torch.zeros(2).half()}, "target must be float32"),
        ({"input": torch.zeros(3)}, r"input must be \[N=2\], got \[3\]"),
        ({"input": torch.zeros(2).double()}, "input must be float32, got float64"),
        ({"output": torch.zeros(4)[::2]}, "output must be contiguous"),
        ({"activation": "relu"}, "activation must be .*relu"),
        ({"reg": 0.0}, "reg must be a finite number > 0"),
        ({"reg": float("nan")}, "reg must be a finite number > 0"),
        ({"execution": 0}, r"execution must lie in 1\.\.1024 threads on the CPU, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_kernel_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"target": torch.zeros(2), "input": torch.zeros(2), "activation": "tanh", "reg": 1.0}
    with pytest.raises(ValueError, match=f"act_inverse: {message}"):
        _C.act_inverse(**arguments | {"output": torch.zeros(2), "execution": 1} | change)
    with pytest.raises(ValueError, match=r"act_displacement: displacement must be \[N\], got \[2, 1\]"):
        _C.act_displacement(torch.zeros(2, 1), torch.zeros(2), "tanh", 1.0, torch.zeros(2), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(5, 4)}, r"target must be \[5, 6\], got \[5, 4\]"),
        ({"input": torch.zeros(5, 3)}, r"input must be \[\.\.\., N=4\], got \[5, 3\]"),
        ({"input": torch.zeros(())}, r"input must be \[\.\.\., N=4\], got \[\]"),
        ({"weight": torch.zeros(6)}, r"weight must be \[M, N\], got \[6\]"),
        ({"weight": torch.zeros(6, 4).double()}, "weight must be float32 as input is, got float64"),
        ({"bias": torch.zeros(4)}, r"bias must be \[6\], got \[4\]"),
        ({"inverse": torch.zeros(6, 4)}, r"inverse must be \[4, 6\], got \[6, 4\]"),
        ({"method": "exact"}, "method must be one of 'regularized', 'constrained', got 'exact'"),
        ({"form": "tikhonov"}, "form must be one of 'proximal', 'ridge', got 'tikhonov'"),
        ({"reg": -0.5}, "reg must be a finite number >= 0, got -0.5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_layer_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = dict(zip(("target", "input", "weight", "bias"), layer(dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=f"layer_inverse: {message}"):
        layer_inverse(**arguments | {"activation": "tanh"} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(6)}, r"target must be \[5, 6\], got \[6\]"),
        ({"input": torch.zeros(5, 3)}, r"input must be \[\.\.\., N=4\], got \[5, 3\]"),
        ({"input": torch.zeros(())}, r"input must be \[\.\.\., N=4\], got \[\]"),
        ({"weight": torch.zeros(1, 6, 4)}, r"weight must be \[M, N\], got \[1, 6, 4\]"),
        ({"inverse": torch.zeros(6, 4)}, r"inverse must be \[4, 6\], got \[6, 4\]"),
        ({"reg": -1.0, "inverse": torch.zeros(4, 6)}, "reg must be a finite number >= 0, got -1.0"),
        ({"reg": float("nan"), "inverse": torch.zeros(4, 6)}, "reg must be a finite number >= 0, got nan"),
        ({"form": "tikhonov"}, "form must be one of 'proximal', 'ridge', got 'tikhonov'"),
    ],
    ids=str,
)
def test_the_linear_map_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"target": torch.zeros(5, 6), "input": torch.zeros(5, 4), "weight": torch.randn(6, 4)}
    with pytest.raises(ValueError, match=f"linear_inverse: {message}"):
        linear_inverse(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(1, 3)}, r"target must be \[2, 3\], got \[1, 3\]"),
        ({"input": torch.zeros(())}, r"input must be \[\.\.\., M\], got \[\]"),
        ({"bias": torch.zeros(3, 1)}, r"bias must be \[3\], got \[3, 1\]"),
        ({"reg": -1.0}, "reg must be a finite number >= 0, got -1.0"),
    ],
    ids=str,
)
def test_the_bias_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"target": torch.zeros(2, 3), "input": torch.zeros(2, 3), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=f"bias_inverse: {message}"):
        bias_inverse(**arguments | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gelu"}, "Activation: name must be one of"),
        ({"name": "tanh", "slope": 0.0}, "Activation: slope must be a finite number > 0"),
        ({"name": "tanh", "learning_rate": -1.0}, "Activation: learning_rate must be a finite number > 0"),
        ({"name": "tanh", "learning_rate": "x"}, "Activation: learning_rate must be a finite number > 0, got 'x'"),
        ({"name": "tanh", "slope": True}, "Activation: slope must be a finite number > 0, got True"),
        ({"name": "tanh", "num_steps": -1}, "Activation: num_steps must be an integer >= 0, got -1"),
        ({"name": "tanh", "num_steps": 1.5}, "Activation: num_steps must be an integer >= 0, got 1.5"),
        ({"name": "tanh", "reference_compat": "yes"}, "Activation: reference_compat must be True or False, got 'yes'"),
    ],
    ids=str,
)
def test_an_activation_refuses_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Activation(**arguments)


def test_the_published_code_has_no_regularized_inverse_of_leaky_relu() -> None:
    with pytest.raises(ValueError, match="reference_compat has none of leaky_relu"):
        Activation("leaky_relu", reference_compat=True).regularized_inverse(torch.zeros(1), torch.zeros(1))
