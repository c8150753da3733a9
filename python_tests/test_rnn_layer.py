"""rnn_layer, rnn_weight_gradients and the layer under Backprop: equal to the oracle, exact, the same bits each time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from comparison import (
    DTYPES,
    LAYOUTS,
    MEMORY,
    NONLINEARITIES,
    SIZES,
    Layer,
    SameBits,
    Scan,
    assert_close_to_oracle,
    assert_same_bits,
    layer,
    name,
    pairwise,
    scan,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tpext
from tpext import reference
from tpext.rules import Backprop, RecurrentCall

rnn_layer = torch.ops.tpext.rnn_layer
rnn_weight_gradients = torch.ops.tpext.rnn_weight_gradients


def backprop_rnn(*arguments: Any, **how: Any) -> tuple[Tensor, Tensor]:
    return Backprop().run_recurrent(RecurrentCall(*arguments, **how))


# Around the widths of vectors, and where the projection moves out of the scan.
INPUTS = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 130]
# The last panel of columns overlaps the one before unless the size is a multiple of a vector.
NEAR_A_VECTOR = sorted({lanes * k + d for lanes, k, d in itertools.product([4, 8, 16], [1, 2, 3], [-1, 0, 1])})
FREE = {key: values for key, values in LAYOUTS.items() if key != "contiguous"}


def check_layer(arguments: Layer) -> None:
    terms = arguments.input.shape[1] + arguments.weight_ih.shape[2] + arguments.weight_ih.shape[1] + 1
    assert_close_to_oracle(rnn_layer, reference.rnn_layer, arguments, terms=terms)


def gradient_arguments(inputs: Scan, memory: str = "time first", scale: float = 0.75) -> tuple[Any, ...]:
    """``delta`` is zero in the padding, as every pass leaves it."""
    N, T, B, I = inputs.input.shape  # noqa: E741
    delta = inputs.grad_states.nan_to_num()
    input = layer(T, B, I, 1, N, memory=memory, dtype=delta.dtype, own_inputs=True).input
    if inputs.lengths is not None and memory != "one row":
        input = input.masked_fill((torch.arange(T)[:, None] >= inputs.lengths)[..., None], torch.nan)
    return delta, inputs.states, inputs.h0, input, inputs.lengths, inputs.reverse, scale


def check_gradients(arguments: tuple[Any, ...]) -> None:
    steps, rows = arguments[3].shape[1:3]
    assert_close_to_oracle(rnn_weight_gradients, reference.rnn_weight_gradients, arguments, terms=steps * rows + 1)


class TestSameBits(SameBits):
    @staticmethod
    def run(inputs: Scan) -> list[Tensor]:
        """The weights of the input are taken from those at hand: any will do."""
        W = inputs.weight_hh
        weight_ih = W[..., : inputs.input.shape[-1]]
        states, h_n = rnn_layer(inputs.input, inputs.h0, weight_ih, W, W[..., 0], *inputs[-3:])
        return [states, h_n.unsqueeze(1)]


# Against the oracle.


@pytest.mark.parametrize(
    "case",
    pairwise(**SIZES, **FREE, I=[1, 3, 16, 17, 200], bias=[False, True], memory=MEMORY, own_inputs=[False, True]),
    ids=name,
)
def test_equals_the_oracle(case: dict[str, Any]) -> None:
    torch.set_num_threads(case.pop("threads"))
    check_layer(layer(**case))


sizes = {
    "T": st.integers(0, 12),
    "B": st.integers(0, 19),
    "H": st.integers(1, 50) | st.sampled_from(NEAR_A_VECTOR),
    "S": st.integers(1, 3),
    "I": st.sampled_from(INPUTS),
    "dtype": st.sampled_from(DTYPES),
    "ragged": st.booleans(),
    "direction": st.sampled_from(LAYOUTS["direction"]),
    "memory": st.sampled_from(MEMORY),
    "own_inputs": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(**sizes, nonlinearity=st.sampled_from(NONLINEARITIES), bias=st.booleans())
def test_equals_the_oracle_at_random_sizes(**case: Any) -> None:
    check_layer(layer(**case))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(**sizes, last_step_only=st.booleans())
def test_weight_gradients_equal_the_oracle_at_random_sizes(memory: str, **case: Any) -> None:
    check_gradients(gradient_arguments(scan(**case), memory))


@pytest.mark.parametrize("I", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_of_the_input(I: int, dtype: torch.dtype) -> None:  # noqa: E741
    for H, bias in [(1, True), (15, False), (16, True), (17, True)]:
        check_layer(layer(3, 5, I, H, 2, bias, "batch first", dtype=dtype, ragged=True, direction="mixed"))
        check_gradients(gradient_arguments(scan(3, 5, H, 2, dtype, ragged=True, direction="mixed", I=I), "batch first"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", NEAR_A_VECTOR)
def test_every_width_of_the_state(H: int, dtype: torch.dtype) -> None:
    for I in (1, 4):  # noqa: E741
        check_layer(layer(3, 7, I, H, 1, dtype=dtype))
        check_gradients(gradient_arguments(scan(3, 7, H, 1, dtype, I=I)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "B"), [(127, 1), (128, 1), (129, 1), (16, 8), (43, 3), (255, 1), (256, 1), (257, 1), (32, 8), (37, 7)]
)
def test_weight_gradients_of_sums_about_a_chunk_long(T: int, B: int, dtype: torch.dtype) -> None:
    for ragged, direction in [(False, "mixed"), (True, "mixed")]:
        check_gradients(gradient_arguments(scan(T, B, 9, 2, dtype, ragged=ragged, direction=direction)))


@pytest.mark.parametrize("empty", ["T", "B", "I", "H", "S"])
@pytest.mark.parametrize("ragged", [False, True])
def test_size_zero_gives_empty_or_zero_outputs(empty: str, ragged: bool) -> None:
    sizes = {"T": 3, "B": 4, "I": 2, "H": 5, "S": 2} | {empty: 0}
    case = layer(**sizes, ragged=ragged)
    S, T, B, H, I = (sizes[symbol] for symbol in "STBHI")  # noqa: E741
    states, h_n = rnn_layer(*case)
    assert states.shape == (S, T, B, H)
    assert h_n.shape == (S, B, H)
    if empty == "T":
        assert torch.equal(h_n, case.h0)
    gradients = rnn_weight_gradients(*gradient_arguments(scan(**sizes, ragged=ragged)))
    assert [gradient.shape for gradient in gradients] == [(S, H, I), (S, H, H), (S, H)]
    assert empty not in "TB" or not any(gradient.any() for gradient in gradients)


# What counts, and what does not.


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("I", [3, 130])
def test_two_pieces_are_the_whole(direction: str, I: int) -> None:  # noqa: E741
    case = layer(9, 7, I, 33, 2, ragged=True, direction=direction)
    states, h_n = rnn_layer(*case)
    cut, reverse = 4, direction == "reverse"
    early = case._replace(input=case.input[:, :cut], lengths=case.lengths.clamp(max=cut))
    late = case._replace(input=case.input[:, cut:], lengths=(case.lengths - cut).clamp(min=0))
    first, second = (late, early) if reverse else (early, late)
    begun, between = rnn_layer(*first)
    ended, final = rnn_layer(*second._replace(h0=between))
    actual = [torch.cat([ended, begun] if reverse else [begun, ended], dim=1), final]
    assert_same_bits(actual, [states, h_n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY[1:4])
def test_memory_of_the_input_changes_no_bit(dtype: torch.dtype, memory: str) -> None:
    plain, other = (layer(7, 9, 6, 33, 2, dtype=dtype, direction="mixed", memory=m) for m in ("time first", memory))
    assert other.input.stride() != plain.input.stride()
    assert torch.equal(other.input, plain.input)
    other = plain._replace(input=other.input)
    assert_same_bits(rnn_layer(*other), rnn_layer(*plain))
    inputs = scan(7, 9, 33, 2, dtype, direction="mixed", I=6)
    assert_same_bits(
        rnn_weight_gradients(*gradient_arguments(inputs, memory)), rnn_weight_gradients(*gradient_arguments(inputs))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(33, 17, 100, 2, 7), (129, 5, 265, 1, 1), (40, 9, 3, 1, 150)])
def test_weight_gradients_are_the_same_on_any_number_of_threads(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    T, B, H, S, I = sizes  # noqa: E741
    arguments = gradient_arguments(scan(T, B, H, S, dtype, ragged=True, direction="mixed", I=I))
    torch.set_num_threads(1)
    expected = rnn_weight_gradients(*arguments)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits(rnn_weight_gradients(*arguments), expected)


def test_weight_gradients_are_proportional_to_the_scale() -> None:
    inputs = scan(7, 9, 33, 2, ragged=True, direction="mixed")
    once, eight = (rnn_weight_gradients(*gradient_arguments(inputs, scale=scale)) for scale in (1.0, 8.0))
    assert all(torch.equal(a, 8 * b) for a, b in zip(eight, once, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_padding_of_input_and_states_reaches_no_weight_gradient(
    dtype: torch.dtype, direction: str, value: float
) -> None:
    inputs = scan(40, 9, 17, 2, dtype, ragged=True, direction=direction)
    padded = (torch.arange(40)[:, None] >= inputs.lengths)[..., None]
    delta, states, h0, input, *rest = gradient_arguments(inputs)
    expected = rnn_weight_gradients(delta, states, h0, input.nan_to_num(), *rest)
    filled = states.masked_fill(padded, value), h0, input.masked_fill(padded, value)
    assert_same_bits(rnn_weight_gradients(delta, *filled, *rest), expected)
    assert all(gradient.isfinite().all() for gradient in expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["states", "h0", "input", "delta"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_next_to_a_zero_delta_is_not_lost(dtype: torch.dtype, place: str, value: float) -> None:
    """Where delta is zero for a whole chunk of the sum, the kernel leaves the chunk out."""
    inputs = scan(300, 2, 9, 1, dtype)
    inputs.grad_states[:, :290] = 0
    places = {"states": inputs.states[0], "h0": inputs.h0, "input": inputs.input[0], "delta": inputs.grad_states[0]}
    arguments = inputs.grad_states, inputs.states, inputs.h0, inputs.input, None, inputs.reverse, 1.0
    assert all(gradient.isfinite().all() for gradient in rnn_weight_gradients(*arguments))
    places[place][0, 1, 3] = value
    weight_ih, weight_hh, bias = rnn_weight_gradients(*arguments)
    if place == "input":
        assert weight_ih[0, :, 3].isnan().all()
    elif place == "delta":
        assert not any(row.isfinite().any() for row in (weight_ih[0, 3], weight_hh[0, 3], bias[0, 3]))
    else:
        assert weight_hh[0, :, 3].isnan().all()


def test_nan_in_the_padding_of_the_input_reaches_no_state() -> None:
    for I in (3, 130):  # noqa: E741
        case = layer(7, 9, I, 33, 2, ragged=True, direction="mixed")
        assert case.input.isnan().any()
        assert_same_bits(rnn_layer(*case), rnn_layer(*case._replace(input=case.input.nan_to_num())))
        assert all(output.isfinite().all() for output in rnn_layer(*case))


def test_weight_gradients_of_torch() -> None:
    rnn = torch.nn.RNN(3, 5, bidirectional=True, dtype=torch.float64)
    case = layer(6, 4, 3, 5, 2, direction="mixed")
    parameters = [[getattr(rnn, f"{name}_l0{suffix}") for suffix in ("", "_reverse")] for name in PARAMETERS]
    weight_ih, weight_hh, bias_ih, bias_hh = (torch.stack(pair).detach() for pair in parameters)
    output, h_n = rnn(case.input[0], case.h0)
    variables = [case.input, case.h0, weight_ih, weight_hh, bias_ih + bias_hh]
    for variable in variables:
        variable.requires_grad_()
    states, final = backprop_rnn(*variables, None, [False, True], "tanh")
    torch.testing.assert_close(states.permute(1, 2, 0, 3).flatten(2), output, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(final, h_n, rtol=1e-13, atol=1e-13)
    (output.sin().sum() + h_n.cos().sum()).backward()
    (states.sin().sum() + final.cos().sum()).backward()
    for variable, pair in zip(variables[2:], parameters[:3], strict=True):
        expected = torch.stack([parameter.grad for parameter in pair])
        torch.testing.assert_close(variable.grad, expected, rtol=1e-12, atol=1e-12)


PARAMETERS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


# backprop_rnn: derivatives.


def variables_of(case: Layer) -> list[Tensor]:
    """Everything that has a gradient, without NaN, which numerical differentiation cannot pass."""
    return [t.nan_to_num().clone().requires_grad_() for t in case[:5] if t is not None]


def run(case: Layer, variables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    bias = variables[4] if case.bias is not None else None
    return backprop_rnn(*variables[:4], bias, *case[-3:])


# Which of the outputs, states and final states, the loss is made of.
USED = {"states": slice(1), "h_n": slice(1, 2), "both": slice(2)}


@pytest.mark.parametrize(
    "case",
    pairwise(
        nonlinearity=NONLINEARITIES,
        ragged=[False, True],
        direction=LAYOUTS["direction"],
        bias=[False, True],
        memory=MEMORY[:3],
        used=list(USED),
        I=[1, 6, 130],
    ),
    ids=name,
)
def test_gradients_equal_the_oracle(case: dict[str, Any]) -> None:
    used = case.pop("used")
    inputs = layer(7, 5, H=9, S=2, **case)
    variables = variables_of(inputs)
    outputs = run(inputs, variables)[USED[used]]
    gradients = [torch.randn_like(output) for output in outputs]
    actual = torch.autograd.grad(outputs, variables, gradients, retain_graph=True)
    differentiable = torch.autograd.grad(outputs, variables, gradients, create_graph=True)
    grad_states = None if used == "h_n" else gradients[0].numpy()
    grad_h_n = None if used == "states" else gradients[-1].numpy()
    arrays = [value.detach().nan_to_num().numpy() if isinstance(value, Tensor) else value for value in inputs[:5]]
    expected = reference.rnn_gradients(
        grad_states, *arrays, inputs.lengths, inputs.reverse, inputs.nonlinearity, grad_h_n
    )
    for a, d, b in zip(actual, differentiable, expected, strict=False):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(d.detach().numpy(), b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("used", USED)
def test_first_and_second_derivatives_are_true(nonlinearity: str, ragged: bool, used: str) -> None:
    case = layer(3, 3, 2, 4, 2, nonlinearity=nonlinearity, ragged=ragged, direction="mixed")

    def function(*variables: Tensor) -> tuple[Tensor, ...]:
        return run(case, variables)[USED[used]]

    assert torch.autograd.gradcheck(function, variables_of(case))
    assert torch.autograd.gradgradcheck(function, variables_of(case))


@pytest.mark.parametrize("every", [1, 3, 7, 8])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "mixed"])
@pytest.mark.parametrize("needs_states", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_in_pieces(every: int, ragged: bool, direction: str, needs_states: bool, create_graph: bool) -> None:
    case = layer(7, 5, 6, 9, 2, ragged=ragged, direction=direction)
    found = []
    for checkpoint_every in (every, None):
        variables = variables_of(case)
        how = {"checkpoint_every": checkpoint_every, "needs_states": needs_states}
        states, h_n = backprop_rnn(*variables, *case[-3:], **how)
        assert states.shape == ((2, 7, 5, 9) if needs_states or checkpoint_every is None else (0,))
        loss = h_n.sin().sum() + (states.cos().sum() if needs_states else 0)
        gradients = torch.autograd.grad(loss, variables, create_graph=create_graph)
        if create_graph:
            gradients += torch.autograd.grad(sum(g.square().sum() for g in gradients), variables)
        found.append([states if needs_states else h_n, h_n, *gradients])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 2, 4)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...], create_graph: bool) -> None:
    case = layer(3, 3, 2, 4, 2, ragged=True, direction="mixed")
    everything = variables_of(case)
    some = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(everything)]
    for variables in (everything, some):
        states, h_n = run(case, variables)
        (states.sin().sum() + h_n.cos().sum()).backward(create_graph=create_graph)
    for i in range(5):
        assert (some[i].grad is None) == (i not in wanted)
        if i in wanted:
            torch.testing.assert_close(some[i].grad, everything[i].grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("shared", ["state between pieces", "layers with the same weights", "h0 from the input"])
def test_an_input_that_depends_on_another_is_counted_once(create_graph: bool, shared: str) -> None:
    """An input of a call may itself come from the weights of that call, or from another input."""
    case = layer(6, 3, 4, 4, 1)
    found = []
    for function in (backprop_rnn, by_composite):
        input, h0, *weights = variables_of(case)
        rest = (None, [False], "tanh")
        if shared == "state between pieces":
            _, between = function(input[:, :3], h0, *weights, *rest)
            states, _ = function(input[:, 3:], between, *weights, *rest)
        elif shared == "layers with the same weights":
            below, _ = function(input, h0, *weights, *rest)
            states, _ = function(below, h0, *weights, *rest)
        else:
            states, _ = function(input, input[:, 0] * h0, *weights, *rest)
        found.append(torch.autograd.grad(states.square().sum(), [input, h0, *weights], create_graph=create_graph))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def by_composite(
    input: Tensor, h0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """One forward member with tanh and full rows, in torch operations."""
    h, states = h0[0], []
    for x in input[0]:
        h = torch.tanh(x @ weight_ih[0].T + bias[0] + h @ weight_hh[0].T)
        states.append(h)
    return torch.stack(states).unsqueeze(0), h.unsqueeze(0)


class Forgets(torch.autograd.Function):
    """Has no gradient at all, not even a zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_no_gradient_from_above_gives_none_or_zeros(create_graph: bool) -> None:
    case = layer(3, 3, 2, 4, 2, ragged=True, direction="mixed")
    variables = variables_of(case)
    states, _ = run(case, variables)
    options = {"allow_unused": True, "create_graph": create_graph}
    for gradient in torch.autograd.grad(Forgets.apply(states).sum(), variables, **options):
        assert gradient is None or not gradient.any()


def test_final_state_may_be_changed_in_place() -> None:
    case = layer(3, 3, 2, 4, 1)
    found = []
    for change in (torch.Tensor.mul_, torch.Tensor.mul):
        variables = variables_of(case)
        states, h_n = run(case, variables)
        found.append(torch.autograd.grad(states.sum() + change(h_n, 2).sum(), variables))
    assert_same_bits(*found)


@pytest.mark.parametrize("op", [rnn_layer, rnn_weight_gradients])
def test_parts_of_a_pass_refuse_to_be_differentiated(op: Any) -> None:
    arguments = layer(3, 2, 2, 4, 1) if op is rnn_layer else gradient_arguments(scan(3, 2, 4, 1))
    for index, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            continue
        variable = argument.detach().clone().requires_grad_()
        outputs = op(*arguments[:index], variable, *arguments[index + 1 :])
        with pytest.raises(RuntimeError, match=r"no derivative of its own; differentiate .*tpext\.Backprop\(\)"):
            torch.autograd.grad(outputs[0].sum(), variable)


# Fakes, the compiler, checkpointing, autocast.


@pytest.mark.parametrize(
    "case",
    pairwise(dtype=DTYPES, ragged=[False, True], bias=[False, True], memory=MEMORY, I=[1, 130]),
    ids=name,
)
def test_opcheck(case: dict[str, Any]) -> None:
    lengths = torch.tensor([3, 0, 2]) if case.pop("ragged") else None
    bias, memory = case.pop("bias"), case["memory"]
    torch.library.opcheck(
        rnn_layer.default, layer(3, 3, H=4, S=2, direction="mixed", bias=bias, **case)._replace(lengths=lengths)
    )
    del case["memory"]
    inputs = scan(3, 3, 4, 2, direction="mixed", **case)._replace(lengths=lengths)
    torch.library.opcheck(rnn_weight_gradients.default, gradient_arguments(inputs, memory))


@pytest.mark.parametrize("empty", ["T", "B", "I"])
def test_opcheck_of_empty_inputs(empty: str) -> None:
    sizes = {"T": 3, "B": 4, "I": 2, "H": 5, "S": 2} | {empty: 0}
    torch.library.opcheck(rnn_layer.default, layer(**sizes))
    torch.library.opcheck(rnn_weight_gradients.default, gradient_arguments(scan(**sizes)))


@pytest.mark.parametrize("used", USED)
def test_compiles_whole(used: str) -> None:
    torch._dynamo.reset()
    case = layer(3, 3, 2, 4, 2, ragged=True, direction="mixed")

    def loss(*variables: Tensor) -> Tensor:
        return sum(output.square().sum() for output in run(case, variables)[USED[used]])

    eager, compiled = variables_of(case), variables_of(case)
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize(("use_reentrant", "create_graph"), [(False, False), (False, True), (True, False)])
def test_under_checkpointing(use_reentrant: bool, create_graph: bool) -> None:
    case = layer(3, 3, 2, 4, 2, ragged=True, direction="mixed")
    found = []
    for checkpointed in (False, True):
        variables = variables_of(case)
        if checkpointed:
            states, h_n = checkpoint(lambda *variables: run(case, variables), *variables, use_reentrant=use_reentrant)
        else:
            states, h_n = run(case, variables)
        (states.sin().sum() + h_n.cos().sum()).backward(create_graph=create_graph)
        found.append([variable.grad for variable in variables])
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_float32_and_rounds_the_result(input_dtype: torch.dtype) -> None:
    case = layer(7, 3, 6, 33, 2, dtype=torch.float32)
    case = case._replace(input=case.input.to(input_dtype))
    expected = rnn_layer(*case._replace(input=case.input.float()))
    for function in (rnn_layer, backprop_rnn):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = function(*case)
        for a, b in zip(outputs, expected, strict=True):
            assert a.dtype == torch.bfloat16
            assert torch.equal(a, b.bfloat16())


def test_autocast_leaves_weight_gradients_in_float32() -> None:
    arguments = gradient_arguments(scan(7, 3, 33, 2, torch.float32))
    low = arguments[0].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rnn_weight_gradients(low, *arguments[1:])
    assert all(gradient.dtype == torch.float32 for gradient in actual)
    assert_same_bits(actual, rnn_weight_gradients(low.float(), *arguments[1:]))


# What is not a plain tensor goes by way of the dispatcher


def test_a_lazily_negated_input_is_negated() -> None:
    rnn = tpext.nn.RNN(3, 4, rule=tpext.Backprop())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(rnn(torch._neg_view(x))[0], rnn(-x)[0])


@pytest.mark.parametrize("rule", [tpext.Backprop(), tpext.RegularizedInverse()], ids=repr)
def test_vmap_over_a_backward_pass(rule: tpext.Rule) -> None:
    rnn = tpext.nn.RNN(3, 4, rule=rule)
    h_n = rnn(torch.randn(5, 2, 3))[1]
    vectors = torch.randn(6, *h_n.shape)

    def gradient(vector: Tensor) -> Tensor:
        return torch.autograd.grad(h_n, rnn.weight_hh_l0, vector, retain_graph=True)[0]

    expected = torch.stack([gradient(vector) for vector in vectors])
    torch.testing.assert_close(torch.func.vmap(gradient)(vectors), expected)


# Pieces where they cannot be


@pytest.mark.parametrize("lengths", [[6, 1], [2, -1]])
def test_checkpoints_do_not_hide_lengths_out_of_range(lengths: list[int]) -> None:
    rnn = tpext.nn.RNN(3, 4, return_sequence=False, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"RNN: lengths must lie in 0\.\.T=5, got "):
        rnn(torch.randn(5, 2, 3), lengths=torch.tensor(lengths))


def test_checkpoints_of_no_step_are_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        backprop_rnn(*layer(5, 2, 3, 4, 1), checkpoint_every=0)
    rnn = tpext.nn.RNN(3, 4)
    rnn.checkpoint_every = 0
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        rnn(torch.randn(5, 2, 3))


@pytest.mark.parametrize("rule", [tpext.Backprop(), tpext.RegularizedInverse(), tpext.LearnedInverse()], ids=repr)
def test_checkpoints_on_the_meta_device(rule: tpext.Rule) -> None:
    rnn = tpext.nn.RNN(3, 4, rule=rule, return_sequence=False, checkpoint_every=2, device="meta")
    rnn(torch.randn(5, 2, 3, device="meta"))[1].sum().backward()
    assert rnn.weight_hh_l0.grad is not None
    assert rnn.weight_hh_l0.grad.shape == (4, 4)
