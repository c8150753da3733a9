"""rnn_layer_backward: a target pass and the gradients of its delta, equal to the oracle, the same bits each time."""

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
    SameBits,
    Scan,
    as_exact,
    assert_close_to_oracle,
    assert_same_bits,
    layer,
    name,
    pairwise,
    scan,
    select,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rnn_target_scan import CREDITS, ENTERS, MARGIN, ORACLE_ERROR, PASSES, PLACES, SLOPES, STEP, inverse
from torch import Tensor

from tpext import reference
from tpext.ops import rnn_layer as module

rnn_layer_backward = torch.ops.tpext.rnn_layer_backward

Arguments = tuple[Any, ...]

OUTPUTS = ("grad_input", "grad_weight_ih", "grad_weight_hh", "grad_bias", "disp_h0", "credit_h0")
# Every choice of the first four outputs.
NEEDS = [list(needs) for needs in itertools.product([True, False], repeat=4)]
ALL = [True] * 4
SOME_NEEDS = [needs for needs in NEEDS if sum(needs) in (0, 1, 4)]
# Which of what comes from beyond is left out, where it comes at all.
WITHOUT = ["nothing", "at_end", "credit_at_end"]
# By name, as those of rnn_target_scan.
WAYS = [(*way, of_displacement) for way in PASSES for of_displacement in (False, True) if way[0] != "learned"]
WAYS += [("learned", credit, False) for credit in CREDITS]
# Each correction and credit at least once: what does not depend on the equations is tried on these.
SOME_WAYS = [
    ("linearized", "local", False),
    ("derivative", "through_time", True),
    ("difference", "through_time", False),
    ("none", "local", True),
    *WAYS[-2:],
]
# Factors that float32 holds exactly: the oracle then sees the same numbers.
SCALE, INPUT_SCALE = 0.75, -2.0


def backward_arguments(
    inputs: Scan,
    way: tuple[str, str, bool] = ("linearized", "through_time", False),
    needs: Sequence[bool] = ALL,
    memory: str = "time first",
) -> Arguments:
    """The arguments of an op for an input of a scan. ``way``: correction or a name of SLOPES, credit, of_displacement.

    A feedback of a learned pass, and its pre-activations, are taken from tensors at hand: any will do.
    """
    correction, credit, of_displacement = way
    N, T, B, I = inputs.input.shape  # noqa: E741
    S, _, _, H = inputs.states.shape
    dtype = inputs.states.dtype
    input = inputs.input
    if memory != "time first":
        input = layer(T, B, I, 1, N, memory=memory, dtype=dtype, own_inputs=True).input
    if inputs.lengths is not None and memory != "one row":
        input = input.masked_fill((torch.arange(T)[:, None] >= inputs.lengths)[..., None], torch.nan)
    feedback = inputs.weight_hh if correction == "learned" else inverse(inputs.weight_hh).mT
    input_feedback = torch.randn(S, H, I, generator=torch.Generator().manual_seed(1)).to(dtype)
    return (
        inputs.grad_states,
        input,
        inputs.states,
        inputs.h0,
        inputs.weight_hh,
        feedback,
        input_feedback,
        inputs.x_proj if correction in ("none", "learned") else None,
        inputs.lengths,
        inputs.reverse,
        inputs.nonlinearity,
        "linearized" if correction in SLOPES else correction,
        credit,
        STEP,
        MARGIN,
        *SLOPES.get(correction, ("inverse", 0.0)),
        SCALE,
        INPUT_SCALE,
        of_displacement,
        list(needs),
        inputs.at_end,
        inputs.credit_at_end,
    )


FIELDS = module._Backward._fields


def with_argument(arguments: Arguments, **changes: Any) -> Arguments:
    """The same but for some arguments, by name."""
    return tuple(changes.get(field, value) for field, value in zip(FIELDS, arguments, strict=True))


def argument(arguments: Arguments, field: str) -> Any:
    return arguments[FIELDS.index(field)]


def oracle(*arguments: Any) -> tuple[Any, ...]:
    """The reference, without the outputs that are not asked for."""
    needs = argument(arguments, "needs")
    rest = (value for field, value in zip(FIELDS, arguments, strict=True) if field != "needs")
    found = reference.rnn_layer_backward(*rest)
    return (*(array if need else None for array, need in zip(found, needs, strict=False)), *found[4:])


def terms_of(arguments: Arguments) -> int:
    """The products in an element's longest sum: over steps and rows of delta, itself T sums of H; over members."""
    S, T, B, H = argument(arguments, "states").shape
    return T * B + 2 * H + T + S


def check(arguments: Arguments, op: Any = rnn_layer_backward, expected: Any = oracle) -> None:
    _, T, B, _ = argument(arguments, "states").shape
    # Every row of a sum brings what the oracle's differences lose.
    error = 0.0 if argument(arguments, "correction") == "linearized" else ORACLE_ERROR * max(1, T * B)
    assert_close_to_oracle(op, expected, arguments, terms=terms_of(arguments), oracle_error=error)


def tamed(inputs: Scan) -> Scan:
    """With recurrent weights so small that in hundreds of steps nothing overflows.

    No step makes a displacement greater: the inverse's norm is at most the weight's, the slope at most that at 0.95.
    """
    steepest = 1 / (1 - 0.95**2) if inputs.nonlinearity == "tanh" else 1.0
    norm = torch.linalg.matrix_norm(inputs.weight_hh.double(), 2)
    return inputs._replace(weight_hh=(inputs.weight_hh.double() / (norm * steepest)[:, None, None]).to(inputs.h0.dtype))


def case_of(options: dict[str, Any], **sizes: int) -> Arguments:
    """The arguments for a case of ``OPTIONS``."""
    options = options | sizes
    way, needs, memory, without = (options.pop(key) for key in ("way", "needs", "memory", "without"))
    inputs = scan(**options)
    if inputs.states.shape[1] > 33:
        inputs = tamed(inputs)
    if without != "nothing":
        inputs = inputs._replace(**{without: None})
    return backward_arguments(inputs, way, needs, memory)


OPTIONS: dict[str, list[Any]] = {
    "S": [1, 2, 3],
    "I": [0, 1, 3, 17, 130],
    "dtype": DTYPES,
    "nonlinearity": NONLINEARITIES,
    "way": WAYS,
    "enters": ENTERS,
    "without": WITHOUT,
    "needs": SOME_NEEDS,
    "ragged": [False, True],
    "direction": LAYOUTS["direction"],
    "own_inputs": [False, True],
    "memory": MEMORY,
    "contiguous": [True, False],
    "threads": [1, 2, 3],
}
EACH_PAIR_OF_OPTIONS = pairwise(**OPTIONS)


def pairs_of_sizes() -> list[dict[str, int]]:
    """Any two of the sizes of two axes meet, and the third one is small: the oracle goes row by row."""
    axes = {"T": [1, 2, 7, 33, 300], "B": [1, 3, 17, 64, 100], "H": [1, 2, 31, 32, 33, 100]}
    found = []
    for (a, xs), (b, ys) in itertools.combinations(axes.items(), 2):
        (c, zs) = next((axis, sizes) for axis, sizes in axes.items() if axis not in (a, b))
        found += [{a: x, b: y, c: zs[i % 2]} for i, (x, y) in enumerate(itertools.product(xs, ys))]
    return [dict(zip("TBH", sizes, strict=True)) for sizes in sorted({(s["T"], s["B"], s["H"]) for s in found})]


# Against the oracle.


@pytest.mark.parametrize(
    ("sizes", "options"), list(zip(pairs_of_sizes(), itertools.cycle(EACH_PAIR_OF_OPTIONS), strict=False)), ids=name
)
def test_equals_the_oracle(sizes: dict[str, int], options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    options = {key: value for key, value in options.items() if key != "threads"}
    many = sizes["T"] * sizes["B"] > 2000
    check(case_of(options | ({"S": 1} if many else {}), **sizes))


@pytest.mark.parametrize("options", EACH_PAIR_OF_OPTIONS, ids=name)
def test_every_combination_of_two_options(options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    check(case_of({key: value for key, value in options.items() if key != "threads"}, T=19, B=9, H=17))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 30),
    B=st.integers(0, 19),
    H=st.integers(1, 50),
    seed=st.integers(0, 2**16),
    **{key: st.sampled_from(values) for key, values in OPTIONS.items() if key != "threads"},
)
def test_equals_the_oracle_at_random_sizes(T: int, B: int, H: int, **options: Any) -> None:
    check(case_of(options, T=T, B=B, H=H))


def in_double(*arguments: Any) -> tuple[Any, ...]:
    """What the ops that leave delta in memory give in float64: for sizes at which the oracle would take minutes."""
    call = module._Backward(
        *(torch.from_numpy(a.astype(a.dtype if a.dtype == np.int64 else np.float64)) if isinstance(a, np.ndarray) else a
          for a in arguments)
    )  # fmt: skip
    found = module._backward_by_products(call)
    return tuple(None if output.shape == (0,) else output.numpy() for output in found)


# Several groups of rows, several tiles of time, cuts that leave a rest; the last ones by whole arrays.
LARGE = [
    {"T": 150, "B": 100, "H": 100, "S": 1, "I": 17},
    {"T": 61, "B": 64, "H": 257, "S": 1, "I": 3},
    {"T": 200, "B": 45, "H": 33, "S": 3, "I": 130},
    {"T": 150, "B": 256, "H": 31, "S": 1, "I": 0},
    {"T": 700, "B": 5, "H": 64, "S": 2, "I": 1},
    {"T": 20, "B": 700, "H": 128, "S": 1, "I": 5},
    {"T": 3, "B": 900, "H": 100, "S": 2, "I": 130},
]


@pytest.mark.parametrize("sizes", LARGE, ids=name)
@pytest.mark.parametrize("way", [("linearized", "through_time", False), ("difference", "local", True)], ids=str)
@pytest.mark.parametrize("ragged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_large_layers_equal_a_pass_and_its_products(
    sizes: dict[str, int], way: tuple[str, str, bool], ragged: bool
) -> None:
    dtype = torch.float64 if ragged else torch.float32
    inputs = tamed(scan(**sizes, dtype=dtype, ragged=ragged, direction="mixed", enters="both", own_inputs=ragged))
    check(backward_arguments(inputs, way), expected=in_double)


@pytest.mark.parametrize(
    "T", [1, 2, pytest.param(7, marks=pytest.mark.slow), 12, pytest.param(14, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("options", EACH_PAIR_OF_OPTIONS[::17], ids=name)
def test_a_large_batch_of_short_sequences_equals_the_oracle(T: int, options: dict[str, Any]) -> None:
    """Sums for each group of rows would take more memory than the states: from some T on they do not."""
    torch.set_num_threads(options["threads"])
    options = {key: value for key, value in options.items() if key != "threads"}
    check(case_of(options | {"S": 1}, T=T, B=300, H=64 if T == 2 else 19))


@pytest.mark.parametrize("options", EACH_PAIR_OF_OPTIONS, ids=name)
def test_the_composite_equals_the_oracle(options: dict[str, Any]) -> None:
    """What CUDA runs."""
    options = {key: value for key, value in options.items() if key != "threads"}
    arguments = case_of(options, T=7, B=5, H=9)
    check(arguments, lambda *arguments: module._backward_by_products(module._Backward(*arguments)))


@pytest.mark.parametrize("empty", ["T", "B", "I", "H", "S"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("way", SOME_WAYS, ids=str)
def test_size_zero_gives_empty_or_zero_outputs(
    empty: str, ragged: bool, own_inputs: bool, way: tuple[str, str, bool]
) -> None:
    sizes = {"T": 3, "B": 4, "I": 2, "H": 5, "S": 2} | {empty: 0}
    S, T, B, H, I = (sizes[symbol] for symbol in "STBHI")  # noqa: E741
    arguments = backward_arguments(scan(**sizes, ragged=ragged, own_inputs=own_inputs), way)
    outputs = rnn_layer_backward(*arguments)
    shapes = [(S if own_inputs else 1, T, B, I), (S, H, I), (S, H, H), (S, H), (S, B, H)]
    assert [output.shape for output in outputs[:5]] == shapes
    assert outputs[5].shape == ((S, B, H) if way[1] == "through_time" else (0,))
    if empty in "TBSH":
        assert not any(output.any() for output in outputs)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("enters", ["end", "both"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_without_steps_pass_on_what_comes_from_beyond(
    direction: str, enters: str, way: tuple[str, str, bool]
) -> None:
    for T in (0, 3):
        inputs = scan(T, 5, 9, 2, direction=direction, enters=enters)._replace(lengths=torch.tensor([T, 0, T, 0, 0]))
        *_, disp_h0, credit_h0 = rnn_layer_backward(*backward_arguments(inputs, way))
        empty = inputs.lengths == 0
        assert torch.equal(disp_h0[:, empty], inputs.at_end[:, empty])
        if way[1] == "through_time":
            assert torch.equal(credit_h0[:, empty], inputs.credit_at_end[:, empty])


def test_no_gradient_at_all_gives_zeros() -> None:
    inputs = scan(40, 4, 9, 2, ragged=True, direction="mixed")._replace(grad_states=None)
    for way in WAYS:
        if way[0] != "none":
            assert not any(output.any() for output in rnn_layer_backward(*backward_arguments(inputs, way)))


# The same bits.


def every_output(inputs: Scan, needs: Sequence[bool] = ALL) -> list[tuple[Tensor, ...]]:
    return [rnn_layer_backward(*backward_arguments(inputs, way, needs)) for way in SOME_WAYS]


class TestSameBits(SameBits):
    """Of what belongs to a row. A sum over rows is taken by groups of them, which depend on how many there are."""

    @staticmethod
    def run(inputs: Scan) -> list[Tensor]:
        own = inputs._replace(input=inputs.input.expand(inputs.states.shape[0], -1, -1, -1))
        # a member's is to be the same where it is alone
        input_feedback, found = inputs.weight_hh[..., : inputs.input.shape[-1]], []
        for way in SOME_WAYS:
            arguments = with_argument(backward_arguments(own, way), input_feedback=input_feedback)
            grad_input, *_, disp_h0, credit_h0 = rnn_layer_backward(*arguments)
            found += [grad_input, disp_h0.unsqueeze(1)]
            found += [credit_h0.unsqueeze(1)] if way[1] == "through_time" else []
        return found


# Sizes of one group of rows and of several, by tiles of time, and by whole arrays.
SEVERAL = [
    {"T": 40, "B": 9, "H": 33, "S": 1, "I": 5},
    {"T": 90, "B": 37, "H": 33, "S": 2, "I": 3},
    {"T": 130, "B": 3, "H": 100, "S": 1, "I": 130},
    {"T": 2, "B": 300, "H": 64, "S": 1, "I": 5},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SEVERAL, ids=name)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, sizes: dict[str, int], ragged: bool) -> None:
    options = {"ragged": True, "direction": "mixed", "own_inputs": True} if ragged else {}
    inputs = tamed(scan(**sizes, dtype=dtype, enters="both", **options))
    torch.set_num_threads(1)
    expected = every_output(inputs)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for actual, want in zip(every_output(inputs), expected, strict=True):
            assert_same_bits(actual, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", range(1, 9))
@pytest.mark.parametrize(("H", "enters"), [(256, "both"), (265, "end")])
def test_the_same_bits_by_a_team_of_threads(dtype: torch.dtype, B: int, H: int, enters: str) -> None:
    """With fewer groups of rows than threads a team takes one: each some of its rows, or some columns of the only one.

    Over several tiles of time.
    """
    T = 300 // B
    inputs = tamed(scan(T, B, H, 1, dtype, ragged=B in (2, 5), direction="reverse" if B % 2 else "forward"))
    if enters == "end":
        inputs = inputs._replace(grad_states=None, at_end=torch.randn(1, B, H, dtype=dtype))
    for way in [("linearized", "through_time", False), ("none", "local", True)]:
        arguments = backward_arguments(inputs, way)
        torch.set_num_threads(1)
        expected = rnn_layer_backward(*arguments)
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            assert_same_bits(rnn_layer_backward(*arguments), expected)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("B", [1, 3])
def test_a_team_of_threads_equals_the_oracle(B: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for way in [("linearized", "through_time", False), ("difference", "local", True)]:
        check(
            backward_arguments(tamed(scan(140, B, 256, 1, direction="reverse", enters="both")), way), expected=in_double
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_needed_changes_no_bit_of_the_rest(dtype: torch.dtype) -> None:
    """In one group of rows: how many there are depends on the size of the sums, and so on which are wanted."""
    inputs = scan(40, 7, 33, 2, dtype, ragged=True, direction="mixed", enters="both")
    whole = every_output(inputs)
    for needs in NEEDS:
        for outputs, expected in zip(every_output(inputs, needs), whole, strict=True):
            assert all(output.shape == (0,) for output, need in zip(outputs, needs, strict=False) if not need)
            wanted = [i for i in range(6) if i > 3 or needs[i]]
            assert_same_bits([outputs[i] for i in wanted], [expected[i] for i in wanted])


@pytest.mark.parametrize("split", [1, 9, 30])
def test_sums_over_a_batch_in_two_parts_differ_by_rounding(split: int) -> None:
    """Rows are summed by groups, whose number depends on the batch: no promise of bits, as there is for each row."""
    inputs = tamed(scan(50, 37, 33, 2, ragged=True, direction="mixed", enters="both"))

    def added(*arguments: Any) -> tuple[Tensor, ...]:
        parts = [
            rnn_layer_backward(*backward_arguments(select(inputs, rows=rows)))
            for rows in (slice(split), slice(split, None))
        ]
        grad_input, *sums, disp_h0, credit_h0 = zip(*parts, strict=True)
        of_rows = (torch.cat(pair, dim=1) for pair in (disp_h0, credit_h0))
        return torch.cat(grad_input, dim=2), *(a + b for a, b in sums), *of_rows

    check(backward_arguments(inputs), added)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY[1:4])
@pytest.mark.parametrize("own_inputs", [False, True])
def test_memory_of_the_input_changes_no_bit(dtype: torch.dtype, memory: str, own_inputs: bool) -> None:
    inputs = scan(30, 9, 33, 2, dtype, direction="mixed", enters="both", I=6, own_inputs=own_inputs)
    for way in WAYS:
        other = backward_arguments(inputs, way, memory=memory)
        assert not argument(other, "input").is_contiguous()
        plain = with_argument(other, input=argument(other, "input").contiguous())
        assert_same_bits(rnn_layer_backward(*other), rnn_layer_backward(*plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [1, 9, 33])
def test_a_feedback_that_comes_as_a_transpose_changes_no_bit(dtype: torch.dtype, H: int) -> None:
    inputs = scan(30, 9, H, 2, dtype, enters="both")
    for way in WAYS:
        arguments = backward_arguments(inputs, way)
        dense = argument(arguments, "feedback").contiguous()
        transposed = dense.mT.contiguous().mT
        gaps = torch.stack([dense, dense], dim=-1)[..., 0]
        expected = rnn_layer_backward(*with_argument(arguments, feedback=dense))
        for feedback in (transposed, gaps):
            assert_same_bits(rnn_layer_backward(*with_argument(arguments, feedback=feedback)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_that_are_powers_of_two_scale_to_the_bit(dtype: torch.dtype) -> None:
    arguments = backward_arguments(scan(30, 9, 33, 2, dtype, ragged=True, direction="mixed", enters="both"))
    once = rnn_layer_backward(*with_argument(arguments, scale=1.0, input_scale=1.0))
    other = rnn_layer_backward(*with_argument(arguments, scale=8.0, input_scale=-0.5))
    factors = (-0.5, 8.0, 8.0, 8.0, 1.0, 1.0)
    assert_same_bits(other, [factor * output for factor, output in zip(factors, once, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", SOME_WAYS, ids=str)
def test_a_shared_input_gets_the_sum_of_its_members_gradients(dtype: torch.dtype, way: tuple[str, str, bool]) -> None:
    inputs = scan(30, 9, 17, 3, dtype, ragged=True, direction="mixed", enters="both")
    shared = backward_arguments(inputs, way)
    own = with_argument(shared, input=argument(shared, "input").expand(3, -1, -1, -1))
    grad_input, *rest = rnn_layer_backward(*own)
    assert_same_bits(rnn_layer_backward(*shared), [grad_input.sum(0, keepdim=True), *rest])


# A displacement that fades.


def fading(dtype: torch.dtype, nonlinearity: str, direction: str, B: int, H: int) -> Scan:
    """A long input whose displacement and credit, from the end alone, die out on the way."""
    inputs = scan(400, B, H, 2, dtype, nonlinearity, direction=direction, enters="end", own_inputs=True)
    return inputs._replace(weight_hh=inputs.weight_hh * (1e-3 if dtype == torch.float32 else 1e-9))


@pytest.mark.parametrize("place", [*PLACES, "input"])
@pytest.mark.parametrize("way", SOME_WAYS, ids=str)
def test_a_displacement_that_fades_leaves_what_zeros_would(place: str, way: tuple[str, str, bool]) -> None:
    """Without ``grad_states`` the kernel stops where a displacement has died out; with zeros it goes to the end."""
    values = [torch.nan] if place == "nowhere" else [torch.nan, torch.inf]
    for dtype, (nonlinearity, direction), value in itertools.product(
        DTYPES, zip(NONLINEARITIES, ("forward", "reverse", "mixed"), strict=True), values
    ):
        inputs = fading(dtype, nonlinearity, direction, 7, 9)
        tensor = None if place == "nowhere" else getattr(inputs, place)
        last = [0 if reverse else 399 for reverse in inputs.reverse]
        if tensor is not None and tensor.dim() == 4:
            tensor[-1, last[-1] + (1 if inputs.reverse[-1] else -1), 3, 4] = value
        elif tensor is not None:
            tensor[-1, 3, 4] = value
        arguments = backward_arguments(inputs, way)
        expected = rnn_layer_backward(*with_argument(arguments, grad_states=torch.zeros_like(inputs.states)))
        if way[0] != "none":
            assert not expected[4][0].any(), "the displacement must die out on the way"
            assert expected[3][0].any(), "it must have been there"
        torch.set_num_threads(1)
        assert_same_bits(rnn_layer_backward(*arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "threads"), [(1, 256, 2), (4, 256, 2), (8, 265, 3), (45, 9, 2), (64, 33, 3)])
def test_a_displacement_that_fades_for_a_team_of_threads(dtype: torch.dtype, B: int, H: int, threads: int) -> None:
    """Where the rows of one thread fade, those of another go on."""
    inputs = fading(dtype, "tanh", "mixed", B, H)
    inputs.at_end[:, B // 2 :] *= 1e-30 if dtype == torch.float32 else 1e-300
    zeros = torch.zeros_like(inputs.states)
    for way in [
        ("linearized", "through_time", False),
        ("difference", "local", True),
        ("learned", "through_time", False),
    ]:
        arguments = backward_arguments(inputs, way)
        torch.set_num_threads(1)
        expected = rnn_layer_backward(*with_argument(arguments, grad_states=zeros))
        torch.set_num_threads(threads)
        assert_same_bits(rnn_layer_backward(*arguments), expected)


# What is not finite.


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("T", "B"), [(40, 9), (2, 60)])
def test_padding_reaches_no_gradient(direction: str, value: float, T: int, B: int) -> None:
    for way, dtype, own_inputs in itertools.product(WAYS, DTYPES, [False, True]):
        inputs = scan(T, B, 17, 2, dtype, ragged=True, direction=direction, enters="both", own_inputs=own_inputs)
        arguments = backward_arguments(inputs, way)
        padded = (torch.arange(T)[:, None] >= inputs.lengths)[..., None]
        fields = [
            field for field in ("grad_states", "input", "states", "pre") if argument(arguments, field) is not None
        ]
        filled, zero = (
            with_argument(arguments, **{field: argument(arguments, field).masked_fill(padded, v) for field in fields})
            for v in (value, 0.0)
        )
        expected = rnn_layer_backward(*zero)
        assert all(output.isfinite().all() for output in expected)
        assert_same_bits(rnn_layer_backward(*filled), expected)
        assert not expected[0].masked_select(padded).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["input", "h0", "grad_states", "weight_hh", "feedback", "input_feedback", "disp_n"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_arrives_where_the_oracles_does(place: str, value: float, dtype: torch.dtype) -> None:
    for way, (T, B) in itertools.product(
        [("linearized", "through_time", False), ("derivative", "through_time", True)], [(40, 5), (2, 60)]
    ):
        inputs = scan(T, B, 9, 2, dtype, "identity", direction="mixed", enters="both", own_inputs=True)
        arguments = backward_arguments(tamed(inputs), way)
        tensor = argument(arguments, place).clone()
        tensor[(1, *(size // 2 for size in tensor.shape[1:]))] = value
        arguments = with_argument(arguments, **{place: tensor})
        with np.errstate(invalid="ignore"):
            expected = as_exact(oracle, arguments)
        for field, got, want in zip(OUTPUTS, rnn_layer_backward(*arguments), expected, strict=True):
            if want is not None:
                np.testing.assert_array_equal(got.isfinite().numpy(), np.isfinite(want), err_msg=f"{field}, {way}")
        assert any(want is not None and not np.isfinite(want).all() for want in expected)


@pytest.mark.parametrize("place", ["input", "h0"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("T", "B"), [(300, 2), (3, 100)])
def test_what_is_not_finite_next_to_a_zero_delta_is_not_lost(place: str, value: float, T: int, B: int) -> None:
    """Where delta is zero for a whole chunk of the sum, the kernel leaves the chunk out."""
    for dtype in DTYPES:
        inputs = scan(T, B, 9, 1, dtype)
        inputs.grad_states[:, : T - 1] = 0
        inputs = inputs._replace(weight_hh=torch.zeros_like(inputs.weight_hh))
        arguments = backward_arguments(inputs)
        assert all(output.isfinite().all() for output in rnn_layer_backward(*arguments))
        tensor = argument(arguments, place).clone()
        tensor[(0, 0, 1, 3) if place == "input" else (0, 1, 3)] = value
        _, weight_ih, weight_hh, *_ = rnn_layer_backward(*with_argument(arguments, **{place: tensor}))
        assert (weight_ih if place == "input" else weight_hh)[0, :, 3].isnan().all()


# An op like the others.


@pytest.mark.parametrize(
    "case",
    pairwise(
        dtype=DTYPES, ragged=[False, True], way=SOME_WAYS, enters=ENTERS, memory=MEMORY, own_inputs=[False, True],
        needs=SOME_NEEDS, I=[1, 30],
    ),
    ids=name,
)  # fmt: skip
def test_opcheck(case: dict[str, Any]) -> None:
    lengths = torch.tensor([3, 0, 2]) if case["ragged"] else None
    options = {key: case[key] for key in ("dtype", "enters", "own_inputs", "I")}
    inputs = scan(3, 3, 4, 2, direction="mixed", **options)._replace(lengths=lengths)
    torch.library.opcheck(
        rnn_layer_backward.default, backward_arguments(inputs, case["way"], case["needs"], case["memory"])
    )


@pytest.mark.parametrize("empty", ["T", "B", "I"])
def test_opcheck_of_empty_inputs(empty: str) -> None:
    inputs = scan(**{"T": 3, "B": 4, "H": 5, "S": 2, "I": 2} | {empty: 0})
    torch.library.opcheck(rnn_layer_backward.default, backward_arguments(inputs, ("none", "through_time", True)))


def test_refuses_to_be_differentiated() -> None:
    arguments = backward_arguments(scan(3, 2, 4, 1, enters="both"), ("none", "through_time", False))
    tensors = [field for field, value in zip(FIELDS, arguments, strict=True) if isinstance(value, Tensor)]
    assert len(tensors) == 10
    for field in tensors:
        variable = argument(arguments, field).detach().clone().requires_grad_()
        outputs = rnn_layer_backward(*with_argument(arguments, **{field: variable}))
        with pytest.raises(
            RuntimeError, match=r"rnn_layer_backward .* no derivative of its own; .*tpext\.Backprop\(\)"
        ):
            torch.autograd.grad(outputs[1].sum(), variable)


def test_autocast_leaves_gradients_in_float32() -> None:
    arguments = backward_arguments(scan(7, 3, 33, 2, torch.float32))
    low = argument(arguments, "grad_states").bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rnn_layer_backward(*with_argument(arguments, grad_states=low))
    assert all(output.dtype == torch.float32 for output in actual)
    assert_same_bits(actual, rnn_layer_backward(*with_argument(arguments, grad_states=low.float())))


WRONG = [
    ({"input": torch.zeros(3, 5, 4, 6)}, r"input must be \[S=2 or 1, T=5, B=4, I=6\], got \[3, 5, 4, 6\]"),
    ({"input": torch.zeros(5, 4, 6)}, r"input must be \[.*T=5, B=4, I.*\], got \[5, 4, 6\]"),
    ({"input": torch.zeros(1, 4, 4, 6)}, r"input must be \[.*T=5, B=4, I.*\], got \[1, 4, 4, 6\]"),
    ({"input_feedback": torch.zeros(2, 7, 5)}, r"input_feedback must be \[S=2, H=7, I=6\], got \[2, 7, 5\]"),
    ({"feedback": torch.zeros(2, 7, 6)}, r"feedback must be \[S=2, H=7, H=7\], got \[2, 7, 6\]"),
    ({"weight_hh": torch.zeros(1, 7, 7)}, r"weight_hh must be \[S=2, H=7, H=7\], got \[1, 7, 7\]"),
    ({"h0": torch.zeros(2, 4, 8)}, r"h0 must be \[S=2, B=4, H=7\], got \[2, 4, 8\]"),
    ({"grad_states": torch.zeros(2, 5, 4, 6)}, r"grad_states must be \[S=2, T=5, B=4, H=7\], got \[2, 5, 4, 6\]"),
    ({"pre": torch.zeros(2, 5, 4, 6)}, r"pre must be \[S=2, T=5, B=4, H=7\], got \[2, 5, 4, 6\]"),
    ({"disp_n": torch.zeros(2, 4)}, r"disp_n must be \[S=2, B=4, H=7\], got \[2, 4\]"),
    ({"credit_n": torch.zeros(2, 4)}, r"credit_n must be \[S=2, B=4, H=7\], got \[2, 4\]"),
    ({"lengths": torch.tensor([1, 2, 3, 6])}, r"lengths must lie in 0\.\.T=5, got "),
    ({"reverse": [True]}, "reverse must have S=2 values, got 1"),
    ({"needs": [True] * 3}, "needs must have 4 values, got 3"),
    ({"input_feedback": None}, "input_feedback must be given for a gradient of the input, got None"),
    ({"correction": "none", "pre": None}, "pre must be given for correction 'none', got None"),
    ({"correction": "learned", "pre": None}, "pre must be given for correction 'learned', got None"),
    ({"correction": "quadratic"}, "correction must be one of .*'learned'.*, got 'quadratic'"),
    (
        {"correction": "learned", "of_displacement": True},
        "of_displacement must be False for correction 'learned'.*, got True",
    ),
    ({"correction": "learned", "nonlinearity": "cube"}, "nonlinearity must be one of .*, got 'cube'"),
    ({"correction": "difference", "slope": "one"}, "slope and slope_reg belong to correction 'linearized', got "),
    ({"credit": "global"}, "credit must be one of .*, got 'global'"),
    ({"target_step": 0.0}, r"target_step must be a finite number > 0, got 0\.0"),
    ({"margin": 1.0}, r"margin must be at least .* and below 1, got 1\.0"),
    ({"slope": "steep"}, "slope must be one of .*, got 'steep'"),
    ({"slope_reg": -1.0}, r"slope_reg must be a finite number >= 0, got -1\.0"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_arguments_are_refused_by_name(change: dict[str, Any], text: str) -> None:
    arguments = with_argument(
        backward_arguments(scan(5, 4, 7, 2, torch.float32, I=6), ("linearized", "local", False)),
        pre=torch.zeros(2, 5, 4, 7),
    )
    rnn_layer_backward(*arguments)
    with pytest.raises(ValueError, match=f"^rnn_layer_backward: {text}"):
        rnn_layer_backward(*with_argument(arguments, **change))


def test_an_input_without_a_gradient_needs_no_feedback() -> None:
    arguments = backward_arguments(scan(5, 4, 7, 2, enters="both"), needs=[False, True, True, True])
    given, absent = (rnn_layer_backward(*arguments), rnn_layer_backward(*with_argument(arguments, input_feedback=None)))
    assert_same_bits(absent, given)
