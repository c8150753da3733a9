"""gated_layer: the forward pass of GRU and LSTM, equal to the oracle and to torch, the same bits each time."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from comparison import (
    DTYPES,
    LAYOUTS,
    MEMORY,
    SIZES,
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

from tpext import _C, reference

gated_layer = torch.ops.tpext.gated_layer

CELLS = ["gru", "lstm"]
GATES = {"gru": 3, "lstm": 4}
KEPT = {"gru": 4, "lstm": 5}
INPUTS = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 130]
# The last panel of columns overlaps the one before unless the size is a multiple of a vector.
NEAR_A_VECTOR = sorted({lanes * k + d for lanes, k, d in itertools.product([4, 8, 16], [1, 2, 3], [-1, 0, 1])})
OPTIONS: dict[str, list[Any]] = {
    "cell": CELLS,
    "dtype": DTYPES,
    "ragged": [False, True],
    "direction": LAYOUTS["direction"],
    "bias": [True, False],
    "memory": MEMORY,
    "own_inputs": [False, True],
    "contiguous": [True, False],
}


class Gated(NamedTuple):
    """One random input of a gated layer; ``input`` holds NaN past a row's length."""

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


def gated(
    T: int,
    B: int,
    I: int,  # noqa: E741
    H: int,
    S: int,
    cell: str,
    bias: bool = True,
    keep: bool = True,
    seed: int = 0,
    **options: Any,
) -> Gated:
    """Random inputs of these sizes; ``options`` are those of ``layer``."""
    like = layer(T, B, I, H, S, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 2)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(like.h0.dtype)

    rows = GATES[cell] * H
    return Gated(
        like.input,
        like.h0,
        normal(S, B, H) if cell == "lstm" else None,
        normal(S, rows, I) / max(I, 1) ** 0.5,
        normal(S, rows, H) / max(H, 1) ** 0.5,
        normal(S, rows) / 2 if bias else None,
        normal(S, rows) / 2 if bias else None,
        like.lengths,
        like.reverse,
        cell,
        keep,
    )


def oracle(*arguments: Any) -> tuple[Any, ...]:
    """The reference, without the outputs that the op leaves empty."""
    *rest, keep = arguments
    found = reference.gated_scan(*rest)
    return found.states, found.h_n, found.c_n, found.kept if keep else None


def check(arguments: Gated) -> None:
    terms = arguments.input.shape[1] + arguments.weight_ih.shape[2] + arguments.weight_hh.shape[2] + 2
    assert_close_to_oracle(gated_layer, oracle, arguments, terms=terms)


# Against the oracle.


@pytest.mark.parametrize(
    "case", pairwise(**SIZES, **OPTIONS, I=[1, 3, 16, 17, 200], keep=[True, False], threads=[1, 2]), ids=name
)
def test_equals_the_oracle(case: dict[str, Any]) -> None:
    torch.set_num_threads(case.pop("threads"))
    check(gated(**case))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 12),
    B=st.integers(0, 19),
    I=st.sampled_from(INPUTS),
    H=st.integers(1, 50) | st.sampled_from(NEAR_A_VECTOR),
    S=st.integers(1, 3),
    keep=st.booleans(),
    seed=st.integers(0, 2**16),
    **{key: st.sampled_from(values) for key, values in OPTIONS.items()},
)
def test_equals_the_oracle_at_random_sizes(**case: Any) -> None:
    check(gated(**case))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_of_the_state(cell: str, dtype: torch.dtype) -> None:
    for H, I in itertools.product(NEAR_A_VECTOR, (1, 4)):  # noqa: E741
        check(gated(3, 7, I, H, 1, cell, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_any_size(cell: str, dtype: torch.dtype) -> None:
    """Gates that are nearly closed keep their digits, and beyond what exponentials reach they are 0 or 1."""
    case = gated(2, 3, 1, 40, 1, cell, dtype=dtype)
    sizes = torch.linspace(-200, 200, 40 * GATES[cell], dtype=dtype)
    zeros = torch.zeros_like(case.weight_ih), torch.zeros_like(case.weight_hh)
    case = case._replace(weight_ih=zeros[0], weight_hh=zeros[1], bias_ih=sizes[None], bias_hh=0 * sizes[None])
    *_, kept = gated_layer(*case)
    expected = oracle(*(a.double().numpy() if isinstance(a, Tensor) else a for a in case))[-1]
    gates = [0, 1] if cell == "gru" else [0, 1, 3]
    least = torch.finfo(dtype).tiny * 4
    for gate in gates:
        got, want = kept[0, 0, :, gate].double(), torch.from_numpy(expected[0, 0, :, gate])
        assert ((got - want).abs() <= 3 * torch.finfo(dtype).eps * want + least).all()


@pytest.mark.parametrize("empty", ["T", "B", "I", "H", "S"])
@pytest.mark.parametrize("cell", CELLS)
def test_size_zero_gives_empty_or_initial_outputs(empty: str, cell: str) -> None:
    sizes = {"T": 3, "B": 4, "I": 2, "H": 5, "S": 2} | {empty: 0}
    case = gated(**sizes, cell=cell, ragged=True)
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
    case = gated(6, 4, 3, 9, 2, cell, ragged=True, direction="mixed")
    case = case._replace(input=case.input.nan_to_num(), lengths=case.lengths.clamp(min=1))
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    parameters = {key: torch.stack([getattr(peer, f"{key}_l0{s}").detach() for s in ("", "_reverse")]) for key in names}
    input = torch.nn.utils.rnn.pack_padded_sequence(case.input[0], case.lengths, enforce_sorted=False)
    packed, final = peer(input, case.h0 if cell == "gru" else (case.h0, case.c0))
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=6)
    states, h_n, c_n, _ = gated_layer(*case._replace(**parameters))
    finals = [h_n] if cell == "gru" else [h_n, c_n]
    torch.testing.assert_close(states.permute(1, 2, 0, 3).flatten(2), output, rtol=1e-13, atol=1e-13)
    for actual, want in zip(finals, [final] if cell == "gru" else final, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-13, atol=1e-13)


# The same bits.


def of_scan(inputs: Scan, cell: str) -> Gated:
    """The arguments for an input of a scan, all of them its own: so it can be cut."""
    W = inputs.weight_hh
    weight_hh = torch.cat([W.roll(i, -1) for i in range(GATES[cell])], 1)
    weight_ih = weight_hh[..., : inputs.input.shape[-1]]
    c0 = inputs.h0.flip(-1) if cell == "lstm" else None
    bias = weight_hh[..., 0]
    run = (inputs.lengths, inputs.reverse, cell, True)
    return Gated(inputs.input, inputs.h0, c0, weight_ih, weight_hh, bias, bias.flip(-1), *run)


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
    case = gated(7, 9, 3, 33, 2, cell, dtype=dtype, ragged=True, direction="mixed")
    whole, inference = gated_layer(*case), gated_layer(*case._replace(keep=False))
    assert inference[3].shape == (0,)
    assert_same_bits(inference[:3], whole[:3])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_two_pieces_are_the_whole(cell: str, direction: str) -> None:
    case = gated(9, 7, 3, 33, 2, cell, ragged=True, direction=direction)
    states, h_n, c_n, kept = gated_layer(*case)
    cut, reverse = 4, direction == "reverse"
    early = case._replace(input=case.input[:, :cut], lengths=case.lengths.clamp(max=cut))
    late = case._replace(input=case.input[:, cut:], lengths=(case.lengths - cut).clamp(min=0))
    first, second = (late, early) if reverse else (early, late)
    begun = gated_layer(*first)
    ended = gated_layer(*second._replace(h0=begun[1], c0=begun[2] if cell == "lstm" else None))
    in_time = (ended, begun) if reverse else (begun, ended)
    actual = [torch.cat([piece[i] for piece in in_time], dim=1) for i in (0, 3)]
    assert_same_bits([actual[0], *ended[1:3], actual[1]], [states, h_n, c_n, kept])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY[1:4])
def test_memory_of_the_input_changes_no_bit(cell: str, dtype: torch.dtype, memory: str) -> None:
    other = gated(7, 9, 6, 33, 2, cell, dtype=dtype, direction="mixed", memory=memory)
    assert not other.input.is_contiguous()
    plain = other._replace(input=other.input.contiguous())
    assert_same_bits(gated_layer(*other), gated_layer(*plain))


def test_nan_in_the_padding_of_the_input_reaches_no_output() -> None:
    for cell, I in itertools.product(CELLS, (3, 130)):  # noqa: E741
        case = gated(7, 9, I, 33, 2, cell, ragged=True, direction="mixed")
        assert case.input.isnan().any()
        found = gated_layer(*case)
        assert all(output.isfinite().all() for output in found)
        assert_same_bits(found, gated_layer(*case._replace(input=case.input.nan_to_num())))


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_where_it_belongs(cell: str) -> None:
    case = gated(4, 3, 3, 33, 1, cell)
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
    torch.library.opcheck(gated_layer.default, gated(3, 3, 2, 4, 2, direction="mixed", **case))


def test_refuses_to_be_differentiated() -> None:
    case = gated(3, 2, 2, 4, 1, "lstm")
    tensors = [field for field, value in case._asdict().items() if isinstance(value, Tensor)]
    assert len(tensors) == 7
    for field in tensors:
        variable = getattr(case, field).clone().requires_grad_()
        states, *_ = gated_layer(*case._replace(**{field: variable}))
        with pytest.raises(RuntimeError, match="gated_layer .* has no derivative of its own"):
            torch.autograd.grad(states.sum(), variable)


def test_autocast_computes_in_float32_and_casts_the_outputs() -> None:
    case = gated(5, 3, 2, 33, 1, "lstm", dtype=torch.float32)
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
    case = gated(5, 4, 6, 7, 2, "lstm", dtype=torch.float32)
    gated_layer(*case)
    with pytest.raises(ValueError, match=f"^gated_layer: {text}"):
        gated_layer(*case._replace(**change))


def test_a_gru_takes_no_second_state() -> None:
    case = gated(5, 4, 6, 7, 2, "gru")
    with pytest.raises(ValueError, match=r"^gated_layer: c0 must be None for cell 'gru', got a tensor"):
        gated_layer(*case._replace(c0=case.h0))
