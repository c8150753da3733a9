"""gated_layer_backward: a target pass of GRU or LSTM with all gradients, equal to the oracle, the same bits always."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from comparison import DTYPES, assert_close_to_oracle, assert_same_bits, name, pairwise
from gated_cases import BACKPROP, CELLS, CREDITS, GATES, INVERSES, MEMORY, Gated, as_tensors, feedback_of, gated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpext import reference
from tpext.ops import gated_layer as module

gated_layer = torch.ops.tpext.gated_layer
gated_layer_backward = torch.ops.tpext.gated_layer_backward

OUTPUTS = (
    *("grad_input", "grad_weight_ih", "grad_weight_hh", "grad_bias_ih", "grad_bias_hh"),
    *("disp_h0", "disp_c0", "credit_h0", "credit_c0"),
)
WAYS = [key for key in INVERSES if key not in ("jacobian", "chebyshev")]
NEEDS = [list(needs) for needs in itertools.product([True, False], repeat=5)]
ALL = [True] * 5
SOME_NEEDS = [needs for needs in NEEDS if sum(needs) in (0, 1, 5)]
# Where gradients and credit come from.
ENTERS = ["states", "end", "both"]
OPTIONS: dict[str, list[Any]] = {
    "cell": CELLS,
    "S": [1, 2, 3],
    "I": [0, 1, 3, 17, 130],
    "dtype": DTYPES,
    "way": WAYS,
    "credit": CREDITS,
    "enters": ENTERS,
    "needs": SOME_NEEDS,
    "ragged": [False, True],
    "own_inputs": [False, True],
    "memory": MEMORY,
    "contiguous": [True, False],
    "numbers": ["one", "of each member"],
    "threads": [1, 2, 3],
}
PAIRS = pairwise(**OPTIONS)


class Backward(NamedTuple):
    """The arguments of the op."""

    grad_states: Tensor | None
    input: Tensor
    states: Tensor
    h0: Tensor
    c0: Tensor | None
    kept: Tensor
    weight_hh: Tensor
    feedback: Tensor
    input_feedback: Tensor | None
    lengths: Tensor | None
    reverse: list[bool]
    cell: str
    inverse: str
    credit: str
    target_step: list[float]
    margin: list[float]
    gate_slope: str
    candidate_slope: str
    slope_reg: list[float]
    scale: list[float]
    input_scale: list[float]
    needs: list[bool]
    disp_h_n: Tensor | None
    disp_c_n: Tensor | None
    credit_h_n: Tensor | None
    credit_c_n: Tensor | None


def arguments_of(
    case: Gated,
    way: str = "derivative",
    credit: str = "local",
    enters: str = "both",
    needs: Sequence[bool] = ALL,
    numbers: str = "one",
) -> Backward:
    """Of tensors. Numbers are such as float32 holds exactly: the oracle then sees the same ones."""
    rule = {"gate_slope": "derivative", "candidate_slope": "derivative", "slope_reg": 0.0} | INVERSES[way]
    states, _, _, kept = gated_layer(*case.layer, True)
    feedback = case.weight_hh
    if feedback.numel():
        feedback = torch.from_numpy(feedback_of(case.weight_hh.double().numpy(), str(rule["inverse"])))
    if case.lengths is not None:
        padded = (torch.arange(states.shape[1])[:, None] >= case.lengths)[..., None]
        states, kept = states.masked_fill(padded, torch.nan), kept.masked_fill(padded[..., None], torch.nan)
    members = states.shape[0] if numbers == "of each member" else 1

    def number(value: float) -> list[float]:
        return [value * 2.0**s for s in range(members)]

    at_end = (case.disp_h_n, case.disp_c_n, case.credit_h_n, case.credit_c_n)
    return Backward(
        None if enters == "end" else case.grad_states,
        case.input,
        states,
        case.h0,
        case.c0,
        kept,
        case.weight_hh,
        feedback.to(states.dtype),
        case.weight_ih,
        case.lengths,
        case.reverse,
        case.cell,
        str(rule["inverse"]),
        credit,
        number(0.25),
        number(1 / 64),
        str(rule["gate_slope"]),
        str(rule["candidate_slope"]),
        number(float(rule["slope_reg"])),
        number(0.75),
        number(-2.0),
        list(needs),
        *((None,) * 4 if enters == "states" else at_end),
    )


def backprop(arguments: Backward) -> Backward:
    """The same under back-propagation."""
    return arguments._replace(
        feedback=arguments.weight_hh, **BACKPROP, credit="local", target_step=[1.0], scale=[1.0], input_scale=[1.0]
    )


def oracle(*arguments: Any) -> tuple[Any, ...]:
    return reference.gated_target_pass(*arguments)[:9]


def check(arguments: Backward, op: Any = gated_layer_backward) -> None:
    S, T, B, H = arguments.states.shape
    # In an element's longest sum: over steps and rows of delta, itself T sums of G H; over members.
    terms = T * B + 2 * GATES[arguments.cell] * H + T + S
    assert_close_to_oracle(op, oracle, arguments, terms=terms)


def case_of(options: dict[str, Any], **sizes: int) -> Backward:
    options = options | sizes
    rule = {key: options.pop(key) for key in ("way", "credit", "enters", "needs", "numbers")}
    tensors = {key: options.pop(key) for key in ("dtype", "memory", "contiguous")}
    arguments = arguments_of(as_tensors(gated(**options), **tensors), **rule)
    # Inverse slopes are up to 1 / margin: in a hundred steps a displacement is not to overflow.
    return arguments._replace(feedback=arguments.feedback / 256) if options["T"] > 33 else arguments


# Against the oracle.


def pairs_of_sizes() -> list[dict[str, int]]:
    """Any two of the sizes of two axes meet, and the third one is small: the oracle goes row by row."""
    axes = {"T": [1, 2, 7, 33, 150], "B": [1, 3, 17, 40], "H": [1, 2, 31, 33, 64, 100]}
    found = []
    for (a, xs), (b, ys) in itertools.combinations(axes.items(), 2):
        (c, zs) = next((axis, sizes) for axis, sizes in axes.items() if axis not in (a, b))
        found += [{a: x, b: y, c: zs[i % 2]} for i, (x, y) in enumerate(itertools.product(xs, ys))]
    return [dict(zip("TBH", sizes, strict=True)) for sizes in sorted({(s["T"], s["B"], s["H"]) for s in found})]


@pytest.mark.parametrize(
    ("sizes", "options"), list(zip(pairs_of_sizes(), itertools.cycle(PAIRS), strict=False)), ids=name
)
def test_equals_the_oracle(sizes: dict[str, int], options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    options = {key: value for key, value in options.items() if key != "threads"}
    many = sizes["T"] * sizes["B"] > 1000
    check(case_of(options | ({"S": 1} if many else {}), **sizes))


@pytest.mark.parametrize("options", PAIRS, ids=name)
def test_every_combination_of_two_options(options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    check(case_of({key: value for key, value in options.items() if key != "threads"}, T=11, B=5, H=17))


@pytest.mark.parametrize(("cell", "way", "credit"), list(itertools.product(CELLS, WAYS, CREDITS)))
def test_every_rule_equals_the_oracle(cell: str, way: str, credit: str) -> None:
    for dtype, enters in itertools.product(DTYPES, ENTERS):
        check(arguments_of(as_tensors(gated(cell, T=9, B=7, H=19, I=5), dtype), way, credit, enters))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 20),
    B=st.integers(0, 19),
    H=st.integers(1, 50),
    seed=st.integers(0, 2**16),
    reverse=st.lists(st.booleans(), min_size=3, max_size=3),
    **{key: st.sampled_from(values) for key, values in OPTIONS.items() if key != "threads"},
)
def test_equals_the_oracle_at_random_sizes(S: int, reverse: list[bool], **options: Any) -> None:
    check(case_of(options | {"S": S, "reverse": reverse[:S]}))


# Several groups of rows, several tiles of time, cuts that leave a rest; the last two by whole arrays.
LARGE = [
    {"T": 150, "B": 100, "H": 100, "I": 17},
    {"T": 61, "B": 64, "H": 257, "I": 3},
    {"T": 200, "B": 45, "H": 33, "I": 130},
    {"T": 700, "B": 5, "H": 64, "I": 1},
    {"T": 20, "B": 700, "H": 128, "I": 5},
    {"T": 3, "B": 600, "H": 100, "I": 130},
]


@pytest.mark.parametrize("sizes", LARGE, ids=name)
@pytest.mark.parametrize("cell", CELLS)
def test_back_propagation_of_large_layers_equals_torch(cell: str, sizes: dict[str, int]) -> None:
    torch.set_num_threads(2)
    case = as_tensors(gated(cell, S=1, ragged=False, **sizes))
    peer = (torch.nn.GRU if cell == "gru" else torch.nn.LSTM)(sizes["I"], sizes["H"], dtype=torch.float64)
    parameters = [getattr(peer, f"{key}_l0") for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    with torch.no_grad():
        for parameter, value in zip(parameters, case[3:7], strict=True):
            parameter.copy_(value[0])
    start = [case.h0, case.c0][: 1 if cell == "gru" else 2]
    variables = [case.input, *start]
    for variable in variables:
        variable.requires_grad_()
    output, final = peer(case.input[0], tuple(start) if cell == "lstm" else case.h0)
    at_end = [-case.disp_h_n, None if case.disp_c_n is None else -case.disp_c_n][: len(start)]
    outputs = [output, *(final if cell == "lstm" else [final])]
    expected = torch.autograd.grad(outputs, [*variables, *parameters], [case.grad_states[0], *at_end])
    detached = Gated(*(value.detach() if isinstance(value, Tensor) else value for value in case))
    found = gated_layer_backward(*backprop(arguments_of(detached)))
    of_states = [-found[5], -found[6]][: len(start)]
    actual = [found[0][None, 0], *of_states, *(gradient[0] for gradient in found[1:5])]
    for a, b in zip(actual, expected, strict=True):
        assert ((a - b).abs().max() <= 1e-11 * b.abs().max()).all()


@pytest.mark.parametrize("empty", ["T", "B", "I", "H", "S"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("credit", CREDITS)
def test_size_zero_gives_empty_or_zero_outputs(empty: str, cell: str, credit: str) -> None:
    sizes = {"T": 3, "B": 4, "I": 2, "H": 5, "S": 2} | {empty: 0}
    S, T, B, H, I = (sizes[symbol] for symbol in "STBHI")  # noqa: E741
    G, through_time = GATES[cell], credit == "through_time"
    case = as_tensors(gated(cell, own_inputs=True, **sizes))
    outputs = gated_layer_backward(*arguments_of(case, "derivative", credit, "states"))
    of_state = [(S, B, H) if there else (0,) for there in (True, cell == "lstm", through_time)]
    of_state += [(S, B, H) if cell == "lstm" and through_time else (0,)]
    shapes = [(S, T, B, I), (S, G * H, I), (S, G * H, H), (S, G * H), (S, G * H), *of_state]
    assert [output.shape for output in outputs] == shapes
    if empty in "TBSH":
        assert not any(output.any() for output in outputs)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("way", WAYS)
def test_rows_without_steps_pass_on_what_comes_from_beyond(cell: str, way: str) -> None:
    case = as_tensors(gated(cell, T=3, B=5, H=9, ragged=[3, 0, 2, 0, 0]))
    found = gated_layer_backward(*arguments_of(case, way, "through_time"))
    beyond = (case.disp_h_n, case.disp_c_n, case.credit_h_n, case.credit_c_n)
    for actual, expected in zip(found[5:], beyond, strict=True):
        if expected is not None:
            assert torch.equal(actual[:, case.lengths == 0], expected[:, case.lengths == 0])


def test_no_gradient_at_all_gives_zeros() -> None:
    for cell, way, credit in itertools.product(CELLS, WAYS, CREDITS):
        arguments = arguments_of(as_tensors(gated(cell, T=40, B=4, H=9)), way, credit, "states")
        assert not any(output.any() for output in gated_layer_backward(*arguments._replace(grad_states=None)))


# The same bits.


def every_output(case: Gated, needs: Sequence[bool] = ALL, enters: str = "both") -> list[tuple[Tensor, ...]]:
    ways = [("derivative", "local"), ("derivative", "through_time"), ("cell", "local"), ("published", "through_time")]
    return [gated_layer_backward(*arguments_of(case, *way, enters, needs)) for way in ways]


# Sizes of one group of rows and of several, by tiles of time, and by whole arrays.
SEVERAL = [
    {"T": 40, "B": 9, "H": 33, "S": 1, "I": 5},
    {"T": 90, "B": 37, "H": 33, "S": 2, "I": 3},
    {"T": 130, "B": 3, "H": 100, "S": 1, "I": 130},
    {"T": 2, "B": 300, "H": 64, "S": 1, "I": 5},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SEVERAL, ids=name)
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_on_any_number_of_threads(cell: str, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    case = as_tensors(gated(cell, **sizes, ragged=sizes["B"] == 37, own_inputs=True), dtype)
    torch.set_num_threads(1)
    expected = every_output(case)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for actual, want in zip(every_output(case), expected, strict=True):
            assert_same_bits(actual, want)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("B", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_the_same_bits_by_a_team_of_threads(cell: str, B: int) -> None:
    """With fewer groups of rows than threads a team takes one: each some of its rows, or some columns of the only one.

    Over several tiles of time.
    """
    for dtype, H in [(torch.float32, 265), (torch.float64, 128)]:
        case = as_tensors(gated(cell, S=1, T=300 // B, B=B, H=H, ragged=B == 2, reverse=[B == 1]), dtype)
        for enters in ("both", "end"):
            torch.set_num_threads(1)
            expected = every_output(case, enters=enters)
            for threads in (2, 3, 4):
                torch.set_num_threads(threads)
                for actual, want in zip(every_output(case, enters=enters), expected, strict=True):
                    assert_same_bits(actual, want)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [1, 5, 9])
def test_a_row_has_the_same_bits_in_any_batch(cell: str, dtype: torch.dtype, split: int) -> None:
    """What belongs to a row; a sum over rows is taken by groups of them, which depend on how many there are."""
    case = as_tensors(gated(cell, T=20, B=17, H=33, own_inputs=True), dtype)

    def part(rows: slice) -> Gated:
        of_rows = {"h0", "c0", "disp_h_n", "disp_c_n", "credit_h_n", "credit_c_n"}
        index = {field: (slice(None), rows) for field in of_rows} | {"lengths": (rows,)}
        index |= {field: (slice(None), slice(None), rows) for field in ("input", "grad_states")}
        return case._replace(
            **{key: getattr(case, key)[at] for key, at in index.items() if getattr(case, key) is not None}
        )

    pieces = [every_output(part(rows)) for rows in (slice(split), slice(split, None))]
    for whole, *parts in zip(every_output(case), *pieces, strict=True):
        for i in (0, 5, 6, 7, 8):
            if whole[i].numel():
                assert_same_bits([torch.cat([p[i] for p in parts], dim=2 if i == 0 else 1)], [whole[i]])


@pytest.mark.parametrize("cell", CELLS)
def test_a_member_has_the_same_bits_alone(cell: str) -> None:
    case = as_tensors(gated(cell, S=3, T=20, B=7, H=33, own_inputs=True))
    for way, credit in itertools.product(WAYS, CREDITS):
        together = arguments_of(case, way, credit, numbers="of each member")
        whole = gated_layer_backward(*together)
        for s in range(3):
            alone = together._replace(
                **{
                    key: value[s : s + 1]
                    for key, value in together._asdict().items()
                    if (isinstance(value, Tensor) and key != "lengths") or (isinstance(value, list) and key != "needs")
                }
            )
            assert_same_bits(gated_layer_backward(*alone), [output[s : s + 1] for output in whole])


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_needed_changes_no_bit_of_the_rest(cell: str) -> None:
    """In one group of rows: how many there are depends on the size of the sums, and so on which are wanted."""
    case = as_tensors(gated(cell, T=20, B=7, H=33), torch.float32)
    whole = every_output(case)
    for needs in NEEDS:
        for outputs, expected in zip(every_output(case, needs), whole, strict=True):
            assert all(output.shape == (0,) for output, need in zip(outputs, needs, strict=False) if not need)
            wanted = [i for i in range(9) if i > 4 or needs[i]]
            assert_same_bits([outputs[i] for i in wanted], [expected[i] for i in wanted])


@pytest.mark.parametrize("cell", CELLS)
def test_factors_that_are_powers_of_two_scale_to_the_bit(cell: str) -> None:
    arguments = arguments_of(as_tensors(gated(cell, T=20, B=7, H=33), torch.float32))
    once = gated_layer_backward(*arguments._replace(scale=[1.0], input_scale=[1.0]))
    other = gated_layer_backward(*arguments._replace(scale=[8.0], input_scale=[-0.5]))
    factors = (-0.5, 8.0, 8.0, 8.0, 8.0, 1.0, 1.0, 1.0, 1.0)
    assert_same_bits(other, [factor * output for factor, output in zip(factors, once, strict=True)])


@pytest.mark.parametrize("cell", CELLS)
def test_a_shared_input_gets_the_sum_of_its_members_gradients(cell: str) -> None:
    shared = arguments_of(as_tensors(gated(cell, S=3, T=20, B=7, H=17)))
    own = shared._replace(input=shared.input.expand(3, -1, -1, -1))
    grad_input, *rest = gated_layer_backward(*own)
    assert_same_bits(gated_layer_backward(*shared), [grad_input.sum(0, keepdim=True), *rest])


# A displacement that fades.


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_displacement_that_fades_leaves_what_zeros_would(cell: str, threads: int) -> None:
    """Without ``grad_states`` the kernel stops where a displacement has died out; with zeros it goes to the end."""
    torch.set_num_threads(threads)
    for dtype, way, credit in itertools.product(DTYPES, ["derivative", "published"], CREDITS):
        case = as_tensors(gated(cell, T=300, B=5, H=17, ragged=False, own_inputs=True), dtype)
        # Gates so nearly closed that nothing is handed on, and recurrent weights as small.
        closed = case.bias_ih - 12.0
        closed[:, 2 * 17 : 3 * 17] += 12.0
        case = case._replace(weight_hh=case.weight_hh * 1e-3, bias_ih=closed)
        arguments = arguments_of(case, way, credit, "end")
        arguments = arguments._replace(feedback=arguments.weight_hh, gate_slope="derivative")
        expected = gated_layer_backward(*arguments._replace(grad_states=torch.zeros_like(arguments.states)))
        assert_same_bits(gated_layer_backward(*arguments), expected)
        # Steps that no displacement reaches are not read.
        unread = arguments.input.clone()
        for s, reverse in enumerate(arguments.reverse):
            unread[s, -1 if reverse else 0] = torch.nan
        assert_same_bits(gated_layer_backward(*arguments._replace(input=unread)), expected)


# What is not finite.


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("T", "B"), [(20, 9), (2, 60)])
def test_padding_reaches_no_gradient(cell: str, value: float, T: int, B: int) -> None:
    for way, credit, dtype in itertools.product(["derivative", "cell"], CREDITS, DTYPES):
        arguments = arguments_of(as_tensors(gated(cell, T=T, B=B, H=17), dtype), way, credit)
        padded = (torch.arange(T)[:, None] >= arguments.lengths)[..., None]
        fields = ("grad_states", "input", "states", "kept")
        filled, zero = (
            arguments._replace(
                **{
                    field: getattr(arguments, field).masked_fill(padded[..., None] if field == "kept" else padded, v)
                    for field in fields
                }
            )
            for v in (value, 0.0)
        )
        expected = gated_layer_backward(*zero)
        assert all(output.isfinite().all() for output in expected)
        assert_same_bits(gated_layer_backward(*filled), expected)
        assert not expected[0].masked_select(padded).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "place", ["input", "h0", "c0", "grad_states", "weight_hh", "feedback", "input_feedback", "disp_h_n", "disp_c_n"]
)
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite_arrives_where_the_oracles_does(cell: str, place: str, value: float) -> None:
    if cell == "gru" and place in ("c0", "disp_c_n"):
        pytest.skip("of the LSTM alone")
    for way, dtype, (T, B) in itertools.product(["derivative", "one"], DTYPES, [(20, 5), (2, 60)]):
        case = as_tensors(gated(cell, T=T, B=B, H=9, ragged=False, own_inputs=True), dtype)
        arguments = arguments_of(case, way, "through_time")
        tensor = getattr(arguments, place).clone()
        tensor[(1, *(size // 2 for size in tensor.shape[1:]))] = value
        arguments = arguments._replace(**{place: tensor})
        arrays = (a.double().numpy() if isinstance(a, Tensor) else a for a in arguments)
        with np.errstate(invalid="ignore"):
            expected = oracle(*arrays)
        for field, got, want in zip(OUTPUTS, gated_layer_backward(*arguments), expected, strict=True):
            if want is not None:
                np.testing.assert_array_equal(got.isfinite().numpy(), np.isfinite(want), err_msg=f"{field}, {way}")
        assert any(want is not None and not np.isfinite(want).all() for want in expected)


@pytest.mark.parametrize("place", ["input", "h0"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("T", "B"), [(300, 2), (3, 100)])
def test_what_is_not_finite_next_to_a_zero_delta_is_not_lost(cell: str, place: str, T: int, B: int) -> None:
    """Where delta is zero for a whole chunk of the sum, the kernel leaves the chunk out."""
    case = as_tensors(gated(cell, S=1, T=T, B=B, H=9, ragged=False))
    arguments = arguments_of(case, enters="states")
    arguments = arguments._replace(grad_states=torch.zeros_like(arguments.grad_states))
    assert not any(output.any() for output in gated_layer_backward(*arguments))
    tensor = getattr(arguments, place).clone()
    tensor[(0, 0, 1, 1) if place == "input" else (0, 1, 3)] = torch.inf
    _, weight_ih, weight_hh, *_ = gated_layer_backward(*arguments._replace(**{place: tensor}))
    assert (weight_ih[0, :, 1] if place == "input" else weight_hh[0, :, 3]).isnan().all()


# An op like the others.


@pytest.mark.parametrize(
    "case",
    pairwise(
        cell=CELLS, dtype=DTYPES, ragged=[False, True], way=WAYS, credit=CREDITS, enters=ENTERS,
        own_inputs=[False, True], needs=SOME_NEEDS,
    ),
    ids=name,
)  # fmt: skip
def test_opcheck(case: dict[str, Any]) -> None:
    rule = {key: case.pop(key) for key in ("way", "credit", "enters", "needs")}
    dtype = case.pop("dtype")
    torch.library.opcheck(gated_layer_backward.default, arguments_of(as_tensors(gated(T=3, **case), dtype), **rule))


def test_refuses_to_be_differentiated() -> None:
    arguments = arguments_of(as_tensors(gated("lstm")), "published", "through_time")
    tensors = [
        field for field, value in arguments._asdict().items() if isinstance(value, Tensor) and field != "lengths"
    ]
    assert len(tensors) == 13
    for field in tensors:
        variable = getattr(arguments, field).detach().clone().requires_grad_()
        outputs = gated_layer_backward(*arguments._replace(**{field: variable}))
        with pytest.raises(RuntimeError, match=r"gated_layer_backward .* no derivative of its own"):
            torch.autograd.grad(outputs[1].sum(), variable)


def test_autocast_leaves_gradients_in_float32() -> None:
    arguments = arguments_of(as_tensors(gated("gru", H=33), torch.float32))
    low = arguments._replace(grad_states=arguments.grad_states.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gated_layer_backward(*low)
    assert all(output.dtype == torch.float32 for output in actual)
    assert_same_bits(actual, gated_layer_backward(*low._replace(grad_states=low.grad_states.float())))


def test_fields_of_the_op() -> None:
    assert Backward._fields == module._Backward._fields


zeros = torch.zeros
WRONG = [
    ({"input": zeros(3, 5, 4, 6)}, r"input must be \[S=2 or 1, T=5, B=4, I=6\], got \[3, 5, 4, 6\]"),
    ({"input": zeros(1, 4, 4, 6)}, r"input must be \[N=1, T=5, B=4, I=6\], got \[1, 4, 4, 6\]"),
    ({"kept": zeros(2, 5, 4, 4, 7)}, r"kept must be \[S=2, T=5, B=4, 5, H=7\], got \[2, 5, 4, 4, 7\]"),
    ({"kept": zeros(2, 5, 4, 7)}, r"kept must be \[S=2, T=5, B=4, 5, H=7\], got \[2, 5, 4, 7\]"),
    ({"weight_hh": zeros(2, 21, 7)}, r"weight_hh must be \[S=2, 4H=28, H=7\], got \[2, 21, 7\]"),
    ({"feedback": zeros(2, 28, 6)}, r"feedback must be \[S=2, 4H=28, H=7\], got \[2, 28, 6\]"),
    ({"input_feedback": zeros(2, 28, 5)}, r"input_feedback must be \[S=2, 4H=28, I=6\], got \[2, 28, 5\]"),
    ({"c0": zeros(2, 4, 8)}, r"c0 must be \[S=2, B=4, H=7\], got \[2, 4, 8\]"),
    ({"c0": None}, "c0 must be given for cell 'lstm', got None"),
    ({"disp_c_n": zeros(2, 4)}, r"disp_c_n must be \[S=2, B=4, H=7\], got \[2, 4\]"),
    ({"credit_h_n": zeros(2, 4)}, r"credit_h_n must be \[S=2, B=4, H=7\], got \[2, 4\]"),
    ({"grad_states": zeros(2, 5, 4, 6)}, r"grad_states must be \[S=2, T=5, B=4, H=7\], got \[2, 5, 4, 6\]"),
    ({"lengths": torch.tensor([1, 2, 3, 6])}, r"lengths must lie in 0\.\.T=5, got "),
    ({"reverse": [True]}, "reverse must have S=2 values, got 1"),
    ({"needs": [True] * 4}, "needs must have 5 values, got 4"),
    ({"input_feedback": None}, "input_feedback must be given for a gradient of the input, got None"),
    ({"inverse": "jacobian"}, "inverse must be one of 'branch', 'cell', got 'jacobian'"),
    (
        {"inverse": "cell", "gate_slope": "one"},
        "gate_slope and candidate_slope must be .derivative. for ",
    ),
    ({"credit": "global"}, "credit must be one of .*, got 'global'"),
    ({"gate_slope": "steep"}, "gate_slope must be one of .*, got 'steep'"),
    ({"candidate_slope": "steep"}, "candidate_slope must be one of .*, got 'steep'"),
    ({"target_step": [0.0]}, r"target_step must be a finite number > 0, got 0\.0"),
    ({"margin": [0.5]}, r"margin must be at least .* and below 0\.5, got 0\.5"),
    ({"slope_reg": [0.0, -1.0]}, r"slope_reg must be a finite number >= 0, got -1\.0"),
    ({"scale": [1.0, 2.0, 3.0]}, "scale must be one number or S=2 of them, got 3"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_arguments_are_refused_by_name(change: dict[str, Any], text: str) -> None:
    arguments = arguments_of(as_tensors(gated("lstm", S=2, T=5, B=4, I=6, H=7), torch.float32))
    gated_layer_backward(*arguments)
    with pytest.raises(ValueError, match=f"^gated_layer_backward: {text}"):
        gated_layer_backward(*arguments._replace(**change))


@pytest.mark.parametrize("field", ["c0", "disp_c_n", "credit_c_n"])
def test_a_gru_takes_no_second_state(field: str) -> None:
    arguments = arguments_of(as_tensors(gated("gru")))
    with pytest.raises(ValueError, match=f"^gated_layer_backward: {field} must be None for cell 'gru', got a tensor"):
        gated_layer_backward(*arguments._replace(**{field: arguments.h0}))
