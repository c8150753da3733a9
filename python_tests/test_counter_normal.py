"""counter_normal: Philox's published words, equal to the oracle, the same bits in any part, normal by its moments.

Tests that take ``device`` run on a GPU, and on the CPU by the emulation of the CUDA kernels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from comparison import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpext import _C, reference
from tpext.ops import counter_normal

COUNTER = {"seed": 2**40 + 12345, "step": 17, "stream": 3}
LAST = {"seed": 2**63 - 1, "step": 2**32 - 1, "stream": 2**32 - 1, "first_row": 2**32 - 3}
# Around groups of four, blocks of vectors of each instruction set, and the number that is worth a second thread.
SHAPES = [(1, 1), (3, 5), (2, 3, 1, 7), (3, 4), (2, 63), (2, 64), (2, 65), (5, 130), (1, 9001), (130, 64), (7,)]
CPU = torch.device("cpu")


def check(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU, **options: Any) -> None:
    """Equality with the oracle: 6 roundings of a number, and of 1 where rounding the oracle's angle is what differs."""
    actual = counter_normal(shape, dtype=dtype, device=device, **options).cpu()
    assert actual.dtype == dtype
    assert actual.shape == shape
    expected = reference.counter_normal(shape, **options)
    eps = torch.finfo(dtype).eps
    oracle_error = 32 * abs(options.get("scale", 1)) * torch.finfo(torch.float64).eps
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=6 * eps, atol=oracle_error)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_oracle_gives_random123_s_words(counter: list[int], key: list[int], words: list[int]) -> None:
    assert reference.philox4x32(counter, key).tolist() == words


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_numbers_are_those_of_random123_s_words(dtype: torch.dtype) -> None:
    w = [(word + 1) / 2**32 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]
    angle = [2 * math.pi * (u - 2**-32) for u in w]
    radius = [math.sqrt(-2 * math.log(u)) for u in w]
    expected = [f(angle[i + 1]) * radius[i] for i in (0, 2) for f in (math.cos, math.sin)]
    actual = counter_normal([1, 4], seed=0, step=0, stream=0, dtype=dtype)[0]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle_at_block_edges(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype, **COUNTER)
    check(shape, dtype, **COUNTER, scale=-0.125, first_row=1000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_counter_equals_the_oracle_to_the_bit_of_its_words(dtype: torch.dtype) -> None:
    check((3, 70), dtype, **LAST)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**63 - 1),
    words=st.tuples(*[st.integers(0, 2**32 - 41)] * 3),
    scale=st.floats(-4, 4, width=32),
)
def test_equals_the_oracle_at_random_sizes(
    shape: list[int], dtype: torch.dtype, seed: int, words: tuple[int, int, int], scale: float
) -> None:
    step, stream, first_row = words
    check(tuple(shape), dtype, seed=seed, step=step, stream=stream, first_row=first_row, scale=scale)


@pytest.mark.parametrize("shape", [(3, 70), (40, 1001), (1, 70000), (70000, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads_and_in_any_part(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    whole = counter_normal(shape, **COUNTER, dtype=dtype)
    rows = shape[0]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(counter_normal(shape, **COUNTER, dtype=dtype), whole)
        for first, last in ((0, rows // 3), (rows // 3, rows)):
            part = counter_normal([last - first, shape[1]], **COUNTER, dtype=dtype, first_row=first)
            assert torch.equal(part, whole[first:last])
    # A row's beginning does not depend on its length either.
    assert torch.equal(counter_normal([rows, 1], **COUNTER, dtype=dtype), whole[:, :1])


def test_both_precisions_are_the_same_noise() -> None:
    single, double = (counter_normal([64, 4096], **COUNTER, dtype=dtype).double() for dtype in DTYPES)
    torch.testing.assert_close(single, double, rtol=6 * torch.finfo(torch.float32).eps, atol=0)


def test_every_word_of_the_counter_counts() -> None:
    first = counter_normal([2, 64], **COUNTER)
    changes = ({"seed": 1}, {"seed": COUNTER["seed"] + 2**32}, {"step": 18}, {"stream": 4}, {"first_row": 2})
    for change in changes:
        assert not torch.isclose(counter_normal([2, 64], **COUNTER | change), first).all(dim=1).any()
    assert torch.equal(counter_normal([2, 64], **COUNTER, first_row=1)[0], first[1])


def test_moments_tails_and_correlations_are_normal() -> None:
    n = 2**20
    noise = [counter_normal([2**6, 2**14], seed=1, step=0, stream=s, dtype=torch.float64).flatten() for s in range(3)]
    for z in noise:
        # Five standard errors each.
        for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
            assert abs(float((z**power).mean()) - moment) < 5 * math.sqrt(variance / n)
        for bound in (0.1, 1.0, 2.0, 3.0, 4.0):
            share = math.erfc(bound / math.sqrt(2))
            assert abs(float((z.abs() > bound).double().mean()) - share) < 5 * math.sqrt(share / n)
        assert z.abs().max() < 6.67
        for lag in (1, 2, 3, 4, 2**14):
            assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 / math.sqrt(n - lag)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((noise[a] * noise[b]).mean())) < 5 / math.sqrt(n)


def test_empty_shapes_and_strided_results() -> None:
    for shape in ((0, 3), (3, 0), (0,), (2, 0, 4)):
        assert counter_normal(shape, **COUNTER).shape == shape
    assert counter_normal([4, 2, 3], **COUNTER).is_contiguous()


def sample(like: Tensor, step: int = 17) -> tuple[Any, ...]:
    return (like, [3, 5], 1, step, 3, 0.5, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.tpext.counter_normal.default, sample(torch.empty((), dtype=dtype)))


def test_compiles_in_one_graph_for_all_steps() -> None:
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def run(x: Tensor, step: int) -> Tensor:
        return x + counter_normal(x.shape, seed=5, step=step, stream=1)

    x = torch.zeros(3, 7)
    for step in range(5):
        assert torch.equal(run(x, step), counter_normal(x.shape, seed=5, step=step, stream=1))
    # one for step 0, which is special to the compiler, and those that it needs to see that the step changes
    assert graphs <= 3


def test_autocast_leaves_it_in_float32() -> None:
    expected = counter_normal([3, 5], **COUNTER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(counter_normal([3, 5], **COUNTER), expected)


def test_it_has_no_derivative() -> None:
    with pytest.raises(RuntimeError, match="counter_normal: noise has no derivative"):
        torch.ops.tpext.counter_normal(*sample(torch.empty((), requires_grad=True))).sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="counter_normal: forward-"):
        counter_normal([2], **COUNTER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed must lie in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, r"seed must lie in \[0, 2\^63\)"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"step": 2**32}, r"step must lie in \[0, 2\^32\), got 4294967296"),
        ({"stream": -3}, r"stream must lie in \[0, 2\^32\), got -3"),
        ({"first_row": 2**32 - 1}, r"first_row \+ B must be at most 2\^32, got 4294967295 \+ 2"),
        ({"first_row": True}, "first_row must be an integer, got True"),
        ({"shape": []}, r"shape must be \[B, \.\.\.\] of sizes >= 0, got \[\]"),
        ({"shape": [2, -1]}, r"shape must be .*, got \[2, -1\]"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"dtype": torch.float16}, "dtype must be float32 or float64, got float16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"counter_normal: {message}"):
        counter_normal(**{"shape": [2, 3], **COUNTER, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(3)}, r"output must be \[B, N\], got \[3\]"),
        ({"output": torch.zeros(2, 3).half()}, "output must be float32"),
        ({"output": torch.zeros(3, 2).mT}, "output must be contiguous"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"step": 2**32}, r"step must lie in \[0, 2\^32\), got 4294967296"),
        ({"stream": -1}, r"stream must lie in \[0, 2\^32\), got -1"),
        ({"first_row": 2**32 - 1}, r"first_row \+ B must be at most 2\^32"),
        ({"execution": 0}, r"execution must lie in 1\.\.1024 threads"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_kernel_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"output": torch.zeros(2, 3), **COUNTER, "first_row": 0, "scale": 1.0, "execution": 1}
    with pytest.raises(ValueError, match=f"counter_normal: {message}"):
        _C.counter_normal(**arguments | change)


@pytest.mark.parametrize("shape", [(3, 5), (2, 64), (40, 9), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_the_oracle(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(shape, dtype, device, **COUNTER, scale=2.0, first_row=5)
    check((3, 9), dtype, device, **LAST)


def test_cuda_same_bits_in_any_part(device: torch.device) -> None:
    whole = counter_normal([6, 10], **COUNTER, device=device)
    assert torch.equal(counter_normal([4, 10], **COUNTER, device=device, first_row=2), whole[2:])
