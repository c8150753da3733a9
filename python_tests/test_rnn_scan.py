"""rnn_scan and rnn_scan_backward: equal to the float64 oracle, truly differentiable, repeatable to the bit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from comparison import (
    DTYPES,
    LAYOUTS,
    NONLINEARITIES,
    SIZES,
    SameBits,
    Scan,
    assert_close_to_oracle,
    assert_same_bits,
    name,
    pairwise,
    pieces,
    scan,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpext import _C, reference
from tpext.ops import input_projection

rnn_scan = torch.ops.tpext.rnn_scan
rnn_scan_backward = torch.ops.tpext.rnn_scan_backward


def forward_arguments(inputs: Scan) -> tuple[Any, ...]:
    return (
        inputs.x_proj,
        inputs.h0,
        inputs.weight_hh,
        inputs.lengths,
        inputs.reverse,
        inputs.nonlinearity,
    )


def backward_arguments(inputs: Scan) -> tuple[Any, ...]:
    return (
        inputs.grad_states,
        inputs.states,
        inputs.weight_hh,
        inputs.lengths,
        inputs.reverse,
        inputs.nonlinearity,
        inputs.credit_at_end,
    )


ENTERS = ["states", "end", "both"]


def check_both(inputs: Scan) -> None:
    assert_close_to_oracle(rnn_scan, reference.rnn_scan, forward_arguments(inputs))
    assert_close_to_oracle(rnn_scan_backward, reference.rnn_scan_backward, backward_arguments(inputs))


def both(inputs: Scan) -> list[Tensor]:
    """All outputs of both ops, ``grad_h0`` as ``[S, 1, B, H]``."""
    grad_x_proj, grad_h0 = rnn_scan_backward(*backward_arguments(inputs))
    return [rnn_scan(*forward_arguments(inputs)), grad_x_proj, grad_h0.unsqueeze(1)]


class TestSameBits(SameBits):
    run = staticmethod(both)


# Against the oracle.


@pytest.mark.parametrize("case", pairwise(**SIZES, **LAYOUTS, enters=ENTERS), ids=name)
def test_equals_the_oracle(case: dict[str, Any]) -> None:
    torch.set_num_threads(case.pop("threads"))
    check_both(scan(**case))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 12),
    B=st.integers(0, 19),
    H=st.integers(1, 50),
    S=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    nonlinearity=st.sampled_from(NONLINEARITIES),
    ragged=st.booleans(),
    direction=st.sampled_from(LAYOUTS["direction"]),
    enters=st.sampled_from(ENTERS),
    seed=st.integers(0, 2**16),
)
def test_equals_the_oracle_at_random_sizes(**case: Any) -> None:
    check_both(scan(**case))


@pytest.mark.parametrize("empty", ["T", "B", "H", "S"])
@pytest.mark.parametrize("ragged", [False, True])
def test_size_zero_gives_empty_or_zero_outputs(empty: str, ragged: bool) -> None:
    inputs = scan(**{"T": 3, "B": 4, "H": 5, "S": 2} | {empty: 0}, ragged=ragged)
    states, grad_x_proj, grad_h0 = both(inputs)
    assert states.shape == grad_x_proj.shape == inputs.x_proj.shape
    assert grad_h0.shape == inputs.h0.unsqueeze(1).shape
    assert not grad_h0.any()
    variables = differentiable(inputs.x_proj, inputs.h0, inputs.weight_hh)
    gradients = torch.autograd.grad(rnn_scan(*variables, *inputs[-3:]).sum(), variables)
    assert all(gradient.shape == variable.shape for gradient, variable in zip(gradients, variables, strict=True))
    if empty in "TB":
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("enters", ["end", "both"])
def test_rows_without_steps_pass_the_final_gradient_on(direction: str, enters: str) -> None:
    for T in (0, 3):
        inputs = scan(T, 5, 9, 2, direction=direction, enters=enters)
        inputs = inputs._replace(lengths=torch.tensor([T, 0, T, 0, 0]))
        grad_h0 = rnn_scan_backward(*backward_arguments(inputs))[1]
        empty = inputs.lengths == 0
        assert torch.equal(grad_h0[:, empty], inputs.credit_at_end[:, empty])


def test_no_gradient_at_all_gives_zeros() -> None:
    inputs = scan(5, 4, 9, 2, ragged=True, direction="mixed")._replace(grad_states=None)
    assert not any(output.any() for output in rnn_scan_backward(*backward_arguments(inputs)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("enters", ["end", "both"])
def test_backward_in_two_pieces_is_the_whole(dtype: torch.dtype, direction: str, ragged: bool, enters: str) -> None:
    inputs = scan(9, 7, 33, 2, dtype, ragged=ragged, direction=direction, enters=enters)
    expected = rnn_scan_backward(*backward_arguments(inputs))
    for cut in (1, 4, 8):
        first, second = pieces(inputs, cut)
        later, between = rnn_scan_backward(*backward_arguments(first))
        earlier, grad_h0 = rnn_scan_backward(*backward_arguments(second._replace(credit_at_end=between)))
        in_time = [later, earlier] if direction == "reverse" else [earlier, later]
        assert_same_bits([torch.cat(in_time, dim=1), grad_h0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("place", ["nowhere", "states", "weight_hh"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_fades_leaves_what_zeros_would(
    dtype: torch.dtype, direction: str, place: str, value: float
) -> None:
    """Without ``grad_states`` the kernel stops where a gradient has died out; with zeros it goes to the end."""
    T = 200
    inputs = scan(T, 7, 9, 2, dtype, direction=direction, enters="end")
    inputs = inputs._replace(weight_hh=inputs.weight_hh * (1e-3 if dtype == torch.float32 else 1e-9))
    if place == "states":
        inputs.states[1, 1 if direction == "reverse" else T - 2, 3, 5] = value
    if place == "weight_hh":
        inputs.weight_hh[1, 3, 5] = value
    expected = rnn_scan_backward(*backward_arguments(inputs._replace(grad_states=torch.zeros_like(inputs.states))))
    assert not expected[0][0, T // 2].any(), "the gradient must die out on the way"
    assert place != "weight_hh" or not expected[0].isfinite().all()
    assert_same_bits(rnn_scan_backward(*backward_arguments(inputs)), expected)


def test_input_projection_is_the_affine_map_of_each_member() -> None:
    weight_ih, bias = torch.randn(5, 6, 2).double(), torch.randn(5, 6).double()
    for members, b in itertools.product((1, 5), (bias, None)):
        input = torch.randn(members, 4, 3, 2).double()
        own = input.expand(5, -1, -1, -1)
        expected = torch.einsum("stbi,shi->stbh", own, weight_ih) + (0 if b is None else b[:, None, None])
        torch.testing.assert_close(input_projection(input, weight_ih, b), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("implementation", ["oracle", "op"])
def test_layer_gradients_equal_those_of_torch(nonlinearity: str, implementation: str) -> None:
    rnn = torch.nn.RNN(3, 5, nonlinearity=nonlinearity, bidirectional=True, dtype=torch.float64)
    input, h0, grad_states = (torch.randn(*size).double() for size in [(6, 4, 3), (2, 4, 5), (6, 4, 10)])
    both_ways = [torch.stack([getattr(rnn, name + suffix) for suffix in ("_l0", "_l0_reverse")]) for name in PARAMETERS]
    variables = [tensor.detach().requires_grad_() for tensor in (input, h0, *both_ways)]
    output, _ = torch.func.functional_call(rnn, parameters_of(variables[2:]), tuple(variables[:2]))
    expected = torch.autograd.grad(output, variables, grad_states)
    input, h0, weight_ih, weight_hh, bias_ih, bias_hh = variables
    by_member = grad_states.unflatten(-1, (2, 5)).permute(2, 0, 1, 3)
    if implementation == "op":
        x_proj = input_projection(input.unsqueeze(0), weight_ih, bias_ih + bias_hh)
        states = rnn_scan(x_proj, h0, weight_hh, None, [False, True], nonlinearity)
        actual = torch.autograd.grad(states, variables, by_member)
    else:
        tensors = (by_member, input.unsqueeze(0), h0, weight_ih, weight_hh, bias_ih + bias_hh)
        arrays = [tensor.detach().numpy() for tensor in tensors]
        gradients = reference.rnn_gradients(*arrays, None, [False, True], nonlinearity)
        gradients = gradients._replace(input=gradients.input[0])
        actual = [torch.from_numpy(gradient) for gradient in (*gradients, gradients.bias)]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


PARAMETERS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


def parameters_of(stacked: list[Tensor]) -> dict[str, Tensor]:
    """Parameters of a bidirectional `torch.nn.RNN` by name, from those of the ops with their stack dimension."""
    pairs = zip(PARAMETERS, stacked, strict=True)
    return {key + suffix: tensor[s] for key, tensor in pairs for s, suffix in enumerate(("_l0", "_l0_reverse"))}


# tanh, seen through a scan whose recurrent weights are zero.


def tanh_by_op(z: Tensor) -> Tensor:
    H = 64
    padded = torch.cat([z, z.new_zeros(-len(z) % H)]).view(1, 1, -1, H)
    states = rnn_scan(padded, z.new_zeros(1, padded.shape[2], H), z.new_zeros(1, H, H), None, [False], "tanh")
    return states.view(-1)[: len(z)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_is_within_two_units_in_the_last_place(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    spread = np.geomspace(limits.tiny, 100, 200_000)
    values = np.concatenate([spread, -spread, np.linspace(-20, 20, 400_001), [limits.max, -limits.max]])
    z = torch.from_numpy(values).to(dtype)
    z = z[(z == 0) | (z.abs() >= limits.tiny)]
    exact = np.tanh(z.numpy().astype(np.longdouble))
    rounded = exact.astype(z.numpy().dtype)
    error = np.abs(tanh_by_op(z).numpy().astype(np.longdouble) - exact) / np.spacing(np.abs(rounded))
    # A rounding more an operation where the instruction set has no fused multiply-add.
    bound = 2.25 if _C.cpu_capability() == "baseline" else 2
    assert error.max() <= bound, f"{error.max():.3f} units in the last place at {z[error.argmax()].item()!r}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_at_the_ends_of_the_number_line(dtype: torch.dtype) -> None:
    below_normal = torch.finfo(dtype).tiny / 4
    z = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, below_normal], dtype=dtype)
    one, minus_one, nan, zero, tiny = tanh_by_op(z).tolist()
    assert (one, minus_one, zero) == (1, -1, 0)
    assert np.isnan(nan)
    assert 0 <= tiny <= below_normal, "a subnormal may be flushed to zero, not more"


def test_nan_stays_in_its_row() -> None:
    inputs = scan(5, 20, 33, 2)
    expected = rnn_scan(*forward_arguments(inputs))
    inputs.x_proj[1, 2, 7, 4] = torch.nan
    states = rnn_scan(*forward_arguments(inputs))
    assert states[1, 3:, 7].isnan().all()
    untouched = torch.ones_like(states, dtype=torch.bool)
    untouched[1, 2:, 7] = False
    assert torch.equal(states[untouched], expected[untouched])


# Autograd, fakes, autocast.


def differentiable(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def small(nonlinearity: str = "tanh", dtype: torch.dtype = torch.float64) -> Scan:
    """A ragged, two-way input without NaN, which numerical differentiation cannot pass."""
    inputs = scan(3, 3, 4, 2, dtype, nonlinearity, ragged=True, direction="mixed", enters="both")
    return inputs._replace(x_proj=inputs.x_proj.nan_to_num(), grad_states=inputs.grad_states.nan_to_num())


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_scan_has_its_true_first_and_second_derivatives(nonlinearity: str) -> None:
    inputs = small(nonlinearity)

    def run(x_proj: Tensor, h0: Tensor, weight_hh: Tensor) -> Tensor:
        return rnn_scan(x_proj, h0, weight_hh, inputs.lengths, inputs.reverse, nonlinearity)

    variables = differentiable(inputs.x_proj, inputs.h0, inputs.weight_hh)
    assert torch.autograd.gradcheck(run, variables)
    assert torch.autograd.gradgradcheck(run, variables)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("enters", ENTERS)
def test_backward_has_its_true_derivatives(nonlinearity: str, enters: str) -> None:
    inputs = small(nonlinearity)
    # relu's slope jumps at 0: numerical differences are taken away from it.
    states = inputs.states + 0.1 if nonlinearity == "relu" else inputs.states

    def run(states: Tensor, weight_hh: Tensor, *entering: Tensor) -> tuple[Tensor, Tensor]:
        grad_states = entering[0] if enters != "end" else None
        grad_h_n = entering[-1] if enters != "states" else None
        return rnn_scan_backward(grad_states, states, weight_hh, inputs.lengths, inputs.reverse, nonlinearity, grad_h_n)

    entering = {"states": [inputs.grad_states], "end": [inputs.credit_at_end]}
    entering["both"] = entering["states"] + entering["end"]
    variables = differentiable(states, inputs.weight_hh, *entering[enters])
    assert torch.autograd.gradcheck(run, variables)
    assert torch.autograd.gradgradcheck(run, variables)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...]) -> None:
    inputs = small()
    everything = differentiable(inputs.x_proj, inputs.h0, inputs.weight_hh)
    some = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(everything)]
    rest = (inputs.lengths, inputs.reverse, "tanh")
    rnn_scan(*everything, *rest).sin().sum().backward()
    rnn_scan(*some, *rest).sin().sum().backward()
    for i in range(3):
        assert (some[i].grad is None) == (i not in wanted)
        if i in wanted:
            assert torch.equal(some[i].grad, everything[i].grad)


@pytest.mark.parametrize(
    "case",
    pairwise(dtype=DTYPES, requires_grad=[False, True], ragged=[False, True], contiguous=[False, True], enters=ENTERS),
    ids=name,
)
def test_opcheck(case: dict[str, Any]) -> None:
    options = {key: case[key] for key in ("dtype", "contiguous", "enters")}
    inputs = scan(3, 3, 4, 2, direction="mixed", **options)
    inputs = inputs._replace(lengths=torch.tensor([3, 0, 2]) if case["ragged"] else None)

    def prepared(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            argument.requires_grad_(case["requires_grad"])
            if isinstance(argument, Tensor) and argument.is_floating_point()
            else argument
            for argument in arguments
        )

    torch.library.opcheck(rnn_scan.default, prepared(forward_arguments(inputs)))
    torch.library.opcheck(rnn_scan_backward.default, prepared(backward_arguments(inputs)))


@pytest.mark.parametrize("empty", ["T", "B"])
def test_opcheck_of_empty_inputs(empty: str) -> None:
    inputs = scan(**{"T": 3, "B": 4, "H": 5, "S": 2} | {empty: 0})
    torch.library.opcheck(rnn_scan.default, forward_arguments(inputs))
    torch.library.opcheck(rnn_scan_backward.default, backward_arguments(inputs))


def test_compiles_whole() -> None:
    inputs = small()

    def loss(x_proj: Tensor, h0: Tensor, weight_hh: Tensor) -> Tensor:
        return rnn_scan(x_proj, h0, weight_hh, inputs.lengths, inputs.reverse, "tanh").square().sum()

    eager, compiled = (differentiable(inputs.x_proj, inputs.h0, inputs.weight_hh) for _ in range(2))
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_float32_and_rounds_the_result(input_dtype: torch.dtype) -> None:
    inputs = scan(7, 3, 33, 2, torch.float32)
    arguments = forward_arguments(inputs._replace(x_proj=inputs.x_proj.to(input_dtype)))
    expected = rnn_scan(*forward_arguments(inputs._replace(x_proj=inputs.x_proj.to(input_dtype).float())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = rnn_scan(*arguments)
    assert states.dtype == torch.bfloat16
    assert torch.equal(states, expected.bfloat16())


def test_autocast_has_a_backward() -> None:
    inputs = scan(7, 3, 33, 2, torch.float32)
    variables = differentiable(inputs.x_proj, inputs.h0, inputs.weight_hh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = rnn_scan(*variables, None, inputs.reverse, "tanh")
    gradients = torch.autograd.grad(states, variables, inputs.grad_states.bfloat16())
    plain = rnn_scan(*variables, None, inputs.reverse, "tanh")
    expected = torch.autograd.grad(plain, variables, inputs.grad_states.bfloat16().float())
    for a, b in zip(gradients, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("nonlinearity", ["identity", "relu"])
def test_infinite_weight_does_not_reach_back_from_the_padding(nonlinearity: str) -> None:
    grad, states = torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1)
    weight = torch.full((1, 1, 1), torch.inf)
    padded = torch.ops.tpext.rnn_scan_backward(grad, states, weight, torch.tensor([2]), [False], nonlinearity)
    unpadded = torch.ops.tpext.rnn_scan_backward(grad[:, :2], states[:, :2], weight, None, [False], nonlinearity)
    assert torch.equal(padded[0][:, :2], unpadded[0])
    assert torch.equal(padded[0][:, 2:], torch.zeros(1, 2, 1, 1))
    assert torch.equal(padded[1], unpadded[1])
