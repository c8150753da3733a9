"""gated_layer: the forward pass of GRU and LSTM, equal to the oracle and to torch, the same bits each time."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from comparison import (
    DTYPES,
    SIZES,
    SameBits,
    Scan,
    assert_close_to_oracle,
    assert_same_bits,
    name,
    pairwise,
)
from gated_cases import CELLS, GATES, MEMORY, as_tensors, gated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpext import reference

gated_layer = torch.ops.tpext.gated_layer

KEPT = {"gru": 4, "lstm": 5}
INPUTS = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 130]
# The last panel of columns overlaps the one before unless the size is a multiple of a vector.
NEAR_A_VECTOR = sorted({lanes * k + d for lanes, k, d in itertools.product([4, 8, 16], [1, 2, 3], [-1, 0, 1])})
OPTIONS: dict[str, list[Any]] = {
    "cell": CELLS,
    "dtype": DTYPES,
    "ragged": [False, True],
    "bias": [True, False],
    "memory": MEMORY,
    "own_inputs": [False, True],
    "contiguous": [True, False],
}


class Forward(NamedTuple):
    """The arguments of the op."""

    input: Tensor
    h0: Tensor
    c0: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    lengths: Tensor | None
    reverse: list[bool]
    cell: str
    keep: bool


def arguments_of(
    cell: str,
    *,
    dtype: torch.dtype = torch.float64,
    memory: str = "time first",
    contiguous: bool = True,
    keep: bool = True,
    **sizes: Any,
) -> Forward:
    return Forward(*as_tensors(gated(cell, **sizes), dtype, memory, contiguous).layer, keep)


def oracle(*arguments: Any) -> tuple[Any, ...]:
    """The reference, without the outputs that the op leaves empty."""
    *rest, keep = arguments
    found = reference.gated_scan(*rest)
    return found.states, found.h_n, found.c_n, found.kept if keep else None


def check(arguments: Forward) -> None:
    terms = arguments.input.shape[1] + arguments.weight_ih.shape[2] + arguments.weight_hh.shape[2] + 2
    assert_close_to_oracle(gated_layer, oracle, arguments, terms=terms)


# Against the oracle.


@pytest.mark.parametrize(
    "case", pairwise(**SIZES, **OPTIONS, I=[1, 3, 16, 17, 200], keep=[True, False], threads=[1, 2]), ids=name
)
def test_equals_the_oracle(case: dict[str, Any]) -> None:
    torch.set_num_threads(case.pop("threads"))
    check(arguments_of(**case))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 12),
    B=st.integers(0, 19),
    I=st.sampled_from(INPUTS),
    H=st.integers(1, 50) | st.sampled_from(NEAR_A_VECTOR),
    S=st.integers(1, 3),
    keep=st.booleans(),
    seed=st.integers(0, 2**16),
    reverse=st.lists(st.booleans(), min_size=3, max_size=3),
    **{key: st.sampled_from(values) for key, values in OPTIONS.items()},
)
def test_equals_the_oracle_at_random_sizes(S: int, reverse: list[bool], **case: Any) -> None:
    check(arguments_of(S=S, reverse=reverse[:S], **case))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_of_the_state(cell: str, dtype: torch.dtype) -> None:
    for H, I in itertools.product(NEAR_A_VECTOR, (1, 4)):  # noqa: E741
        check(arguments_of(cell, S=1, T=3, B=7, I=I, H=H, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_any_size(cell: str, dtype: torch.dtype) -> None:
    """Gates that are nearly closed keep their digits; where the exponential underflows they are 0, or 1."""
    case = arguments_of(cell, S=1, T=1, B=2, I=1, H=40, dtype=dtype)
    sums = torch.linspace(-200, 200, 40 * GATES[cell], dtype=dtype)
    no_weights = {name: torch.zeros_like(getattr(case, name)) for name in ("weight_ih", "weight_hh", "bias_hh")}
    case = case._replace(**no_weights, bias_ih=sums[None], lengths=None)
    *_, kept = gated_layer(*case)
    for gate in (0, 1) if cell == "gru" else (0, 1, 3):
        want = torch.sigmoid(sums.view(-1, 40)[gate].double())
        error = (kept[0, 0, 0, gate].double() - want).abs()
        assert (error <= 3 * torch.finfo(dtype).eps * want + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("empty", ["T", "B", "I", "H", "S"])
@pytest.mark.parametrize("cell", CELLS)
def test_size_zero_gives_empty_or_initial_outputs(empty: str, cell: str) -> None:
    sizes = {"T": 3, "B": 4, "I": 2, "H": 5, "S": 2} | {empty: 0}
    case = arguments_of(cell, **sizes)
    S, T, B, H = (sizes[symbol] for symbol in "STBH")
    states, h_n, c_n, kept = gated_layer(*case)
    assert states.shape == (S, T, B, H)
    assert kept.shape == (S, T, B, KEPT[cell], H)
    if empty == "T":
        assert torch.equal(h_n, case.h0)
        assert cell == "gru" or torch.equal(c_n, case.c0)


@pytest.mark.parametrize("cell", CELLS)
def test_equals_torch(cell: str) -> None:
    """Both directions, packed."""
    module = torch.nn.GRU if cell == "gru" else torch.nn.LSTM
    peer = module(3, 9, bidirectional=True, dtype=torch.float64)
    case = arguments_of(cell, S=2, T=6, B=4, I=3, H=9, ragged=[6, 1, 4, 3])
    case = case._replace(input=case.input.nan_to_num())
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    parameters = {key: torch.stack([getattr(peer, f"{key}_l0{s}").detach() for s in ("", "_reverse")]) for key in names}
    input = torch.nn.utils.rnn.pack_padded_sequence(case.input[0], case.lengths, enforce_sorted=False)
    packed, final = peer(input, case.h0 if cell == "gru" else (case.h0, case.c0))
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=6)
    states, *finals, _ = gated_layer(*case._replace(**parameters))
    torch.testing.assert_close(states.permute(1, 2, 0, 3).flatten(2), output, rtol=1e-13, atol=1e-13)
    for actual, want in zip(finals, [final] if cell == "gru" else final, strict=cell == "lstm"):
        torch.testing.assert_close(actual, want, rtol=1e-13, atol=1e-13)


# The same bits.


def of_scan(inputs: Scan, cell: str) -> Forward:
    """The arguments for an input of a scan, all of which are its own, so that it can be cut."""
    W = inputs.weight_hh
    weight_hh = torch.cat([W.roll(i, -1) for i in range(GATES[cell])], 1)
    c0 = inputs.h0.flip(-1) if cell == "lstm" else None
    bias = weight_hh[..., 0]
    weights = weight_hh[..., : inputs.input.shape[-1]], weight_hh, bias, bias.flip(-1)
    return Forward(inputs.input, inputs.h0, c0, *weights, inputs.lengths, inputs.reverse, cell, True)


class TestSameBits(SameBits):
    @staticmethod
    def run(inputs: Scan) -> list[Tensor]:
        found = []
        for cell in CELLS:
            states, h_n, c_n, kept = gated_layer(*of_scan(inputs, cell))
            found += [states, h_n.unsqueeze(1), kept.flatten(3)]
            found += [c_n.unsqueeze(1)] if cell == "lstm" else []
        return found


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_changes_no_bit_of_the_rest(cell: str, dtype: torch.dtype) -> None:
    case = arguments_of(cell, T=7, B=9, H=33, dtype=dtype)
    whole, inference = gated_layer(*case), gated_layer(*case._replace(keep=False))
    assert inference[3].shape == (0,)
    assert_same_bits(inference[:3], whole[:3])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_two_pieces_are_the_whole(cell: str, reverse: bool) -> None:
    case = arguments_of(cell, T=9, B=7, H=33, reverse=[reverse] * 2)
    states, h_n, c_n, kept = gated_layer(*case)
    cut = 4
    early = case._replace(input=case.input[:, :cut], lengths=case.lengths.clamp(max=cut))
    late = case._replace(input=case.input[:, cut:], lengths=(case.lengths - cut).clamp(min=0))
    first, second = (late, early) if reverse else (early, late)
    begun = gated_layer(*first)
    ended = gated_layer(*second._replace(h0=begun[1], c0=begun[2] if cell == "lstm" else None))
    in_time = (ended, begun) if reverse else (begun, ended)
    of_steps = [torch.cat([piece[i] for piece in in_time], dim=1) for i in (0, 3)]
    assert_same_bits([of_steps[0], *ended[1:3], of_steps[1]], [states, h_n, c_n, kept])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY[1:4])
def test_memory_of_the_input_changes_no_bit(cell: str, dtype: torch.dtype, memory: str) -> None:
    other = arguments_of(cell, T=7, B=9, I=6, H=33, dtype=dtype, memory=memory)
    assert not other.input.is_contiguous()
    assert_same_bits(gated_layer(*other), gated_layer(*other._replace(input=other.input.contiguous())))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("I", [3, 130])
def test_nan_in_the_padding_of_the_input_reaches_no_output(cell: str, I: int) -> None:  # noqa: E741
    case = arguments_of(cell, T=7, B=9, I=I, H=33)
    assert case.input.isnan().any()
    found = gated_layer(*case)
    assert all(output.isfinite().all() for output in found)
    assert_same_bits(found, gated_layer(*case._replace(input=case.input.nan_to_num())))


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row(cell: str) -> None:
    case = arguments_of(cell, S=1, T=4, I=3, H=33, ragged=False)
    case.input[0, 1, 2, 0] = torch.nan
    states, h_n, c_n, kept = gated_layer(*case)
    for output in (states[0, 1:], h_n, kept[0, 1:], *([c_n] if cell == "lstm" else [])):
        assert output[:, 2].isnan().any()
        assert output[:, :2].isfinite().all()


# An op like the others.


@pytest.mark.parametrize(
    "case", pairwise(cell=CELLS, dtype=DTYPES, ragged=[False, True], bias=[False, True], keep=[False, True]), ids=name
)
def test_opcheck(case: dict[str, Any]) -> None:
    torch.library.opcheck(gated_layer.default, arguments_of(**case))


def test_refuses_to_be_differentiated() -> None:
    case = arguments_of("lstm")
    tensors = [field for field, value in case._asdict().items() if isinstance(value, Tensor) and field != "lengths"]
    assert len(tensors) == 7
    for field in tensors:
        variable = getattr(case, field).clone().requires_grad_()
        states, *_ = gated_layer(*case._replace(**{field: variable}))
        with pytest.raises(RuntimeError, match=r"gated_layer .* has no derivative of its own"):
            torch.autograd.grad(states.sum(), variable)


def test_autocast_computes_in_float32_and_casts_the_outputs() -> None:
    case = arguments_of("lstm", H=33, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gated_layer(*case._replace(input=case.input.bfloat16()))
    expected = gated_layer(*case._replace(input=case.input.bfloat16().float()))
    assert_same_bits(actual, [output.bfloat16() for output in expected])


zeros = torch.zeros
WRONG = [
    ({"input": zeros(3, 5, 4, 6)}, r"input must be \[S=2 or 1, T=5, B=4, I=6\], got \[3, 5, 4, 6\]"),
    ({"input": zeros(5, 4, 6)}, r"input must be \[N, T, B, I\], got \[5, 4, 6\]"),
    ({"h0": zeros(2, 3, 7)}, r"h0 must be \[S=2, B=4, H=7\], got \[2, 3, 7\]"),
    ({"c0": zeros(2, 4, 8)}, r"c0 must be \[S=2, B=4, H=7\], got \[2, 4, 8\]"),
    ({"weight_ih": zeros(2, 21, 6)}, r"weight_ih must be \[S=2, 4H=28, I=6\], got \[2, 21, 6\]"),
    ({"weight_hh": zeros(2, 21, 7)}, r"weight_hh must be \[S=2, 4H=28, H=7\], got \[2, 21, 7\]"),
    ({"bias_ih": zeros(2, 27)}, r"bias_ih must be \[S=2, 4H=28\], got \[2, 27\]"),
    ({"bias_hh": zeros(1, 28)}, r"bias_hh must be \[S=2, 4H=28\], got \[1, 28\]"),
    ({"bias_hh": None}, "bias_ih and bias_hh must both be given or both be None, got None for bias_hh"),
    ({"c0": None}, "c0 must be given for cell 'lstm', got None"),
    ({"cell": "gru"}, r"weight_hh must be \[S=2, 3H=21, H=7\], got \[2, 28, 7\]"),
    ({"cell": "elman"}, "cell must be one of 'gru', 'lstm', got 'elman'"),
    ({"lengths": torch.tensor([1, 2, 3, 6])}, r"lengths must lie in 0\.\.T=5, got "),
    ({"reverse": [True]}, "reverse must have S=2 values, got 1"),
    ({"h0": zeros(2, 4, 7, dtype=torch.float64)}, "h0 must be float32 as input is, got float64"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_arguments_are_refused_by_name(change: dict[str, Any], text: str) -> None:
    case = arguments_of("lstm", S=2, T=5, B=4, I=6, H=7, dtype=torch.float32)
    gated_layer(*case)
    with pytest.raises(ValueError, match=f"^gated_layer: {text}"):
        gated_layer(*case._replace(**change))


def test_a_gru_takes_no_second_state() -> None:
    case = arguments_of("gru")
    with pytest.raises(ValueError, match=r"^gated_layer: c0 must be None for cell 'gru', got a tensor"):
        gated_layer(*case._replace(c0=case.h0))
