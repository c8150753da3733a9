"""code_difference, probe_difference, max_unpool: equal to the oracle and to torch's pools, bits, derivatives, errors.

Tests that take ``device`` run on a GPU, and on the CPU by the emulation of the CUDA kernels.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from comparison import DTYPES, run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tpext import _C, reference
from tpext.ops import code_difference, counter_normal, max_unpool, probe_difference

ops = torch.ops.tpext
ACTIVATIONS = ["elu", "relu", "tanh", "identity"]
ALPHA, SIGMA = 1.25, 0.125
COUNTER = {"seed": 2**40 + 7, "step": 11, "stream": 5}
# kernel, stride, padding
EVEN, POOLS = (
    (2, 2, 0),
    [(2, 2, 0), (3, 2, 1), (3, 2, 0), (3, 1, 1), (2, 3, 1), (3, 3, 0), (1, 1, 0), (1, 2, 0), (4, 2, 2), (6, 3, 3)],
)
# Planes that go in vectors of windows of each instruction set, in rows of windows, and one element at a time.
PLANES = [(2, 2), (4, 4), (6, 2), (2, 8), (8, 8), (2, 16), (16, 16), (4, 32), (32, 32), (2, 64), (4, 64)]
OTHER_PLANES = [(2, 6), (4, 10), (14, 14), (28, 28), (2, 34), (2, 70), (3, 3), (7, 7), (5, 4), (4, 5), (9, 13)]
CPU = torch.device("cpu")


class Case(NamedTuple):
    """A layer's pre-activation, changes, output and indices, and its options."""

    preactivation: Tensor
    change: Tensor
    output: Tensor
    indices: Tensor | None
    activation: str
    pool: tuple[int, int, int]

    def code(self, noisy: bool = True) -> tuple[Any, ...]:
        """The arguments of the op code_difference."""
        return (*self[:4], self.activation, ALPHA, *self.pool, noisy)

    def probe(self, draws: int = 2, first_row: int = 3) -> tuple[Any, ...]:
        """The arguments of the op probe_difference."""
        size = self.preactivation.shape[-2:] if self.pool[0] else (0, 0)
        noise = (SIGMA, *COUNTER.values(), 2, first_row, draws)
        return (self.output, self.indices, self.activation, ALPHA, *self.pool, *size, *noise)


def activate(v: Tensor, activation: str) -> Tensor:
    if activation == "elu":
        return functional.elu(v, ALPHA)
    return {"relu": torch.relu, "tanh": torch.tanh, "identity": torch.clone}[activation](v)


def case(
    shape: tuple[int, ...],
    activation: str = "elu",
    pool: tuple[int, int, int] = EVEN,
    dtype: torch.dtype = torch.float32,
    draws: int = 2,
    tied: bool = False,
) -> Case:
    """Random numbers; ``tied``: small integers, so that most windows have equal maxima."""
    z, change = torch.randn(shape, dtype=torch.float64), 0.5 * torch.randn(draws, *shape, dtype=torch.float64)
    if tied:
        z, change = z.round(), change.round()
    z, change = z.to(dtype), change.to(dtype)
    if pool[0] == 0:
        return Case(z, change, activate(z, activation), None, activation, pool)
    output, indices = functional.max_pool2d(activate(z, activation), *pool, return_indices=True)
    return Case(z, change, output, indices, activation, pool)


def check(op: Any, oracle: Any, arguments: tuple[Any, ...], device: torch.device = CPU) -> None:
    """Equality with the oracle: 4 roundings of two activations, which are as large as the greatest output."""
    actual = run_on(device, op)(*arguments)
    exact = [a.double().numpy() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    expected = oracle(*(a.numpy() if isinstance(a, Tensor) else a for a in exact))
    assert actual.dtype == arguments[0].dtype
    assert actual.shape == expected.shape
    if actual.numel():
        # a(a(z + dz)) and a(y); z + dz is rounded itself.
        largest = max(3.0, float(np.nanmax(np.abs(expected))), float(arguments[0].abs().nan_to_num().max()))
        atol = 4 * torch.finfo(actual.dtype).eps * largest
        np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=atol)


def check_both(inputs: Case, device: torch.device = CPU, noisy: tuple[bool, ...] = (True, False)) -> None:
    for own in noisy:
        check(ops.code_difference, reference.code_difference, inputs.code(own), device)
    check(ops.probe_difference, reference.probe_difference, inputs.probe(), device)


@pytest.mark.parametrize("plane", PLANES + OTHER_PLANES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle_at_block_edges(plane: tuple[int, int], dtype: torch.dtype) -> None:
    for batch, channels in ((1, 1), (2, 3), (1, 17)):
        if batch * channels * plane[0] * plane[1] < 8192:
            check_both(case((batch, channels, *plane), dtype=dtype))


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle_for_every_combination(
    pool: tuple[int, int, int], activation: str, dtype: torch.dtype
) -> None:
    for plane in ((8, 8), (7, 9), (6, 6), (6, 70)):
        check_both(case((2, 3, *plane), activation, pool, dtype))


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (2, 40), (2, 3, 5, 5), (3, 1000)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_pool_equals_the_oracle_at_block_edges(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype
) -> None:
    check_both(case(shape, activation, (0, 1, 0), dtype))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)),
    pool=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2)),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    draws=st.sampled_from([1, 3]),
    tied=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_oracle_at_random_sizes(
    sizes: tuple[int, int, int, int],
    pool: tuple[int, int, int],
    activation: str,
    dtype: torch.dtype,
    draws: int,
    tied: bool,
    seed: int,
) -> None:
    kernel, stride, padding = pool[0], pool[1], min(pool[2], pool[0] // 2)
    batch, channels, height, width = (max(size, kernel) if i > 1 else size for i, size in enumerate(sizes))
    torch.manual_seed(seed)
    check_both(case((batch, channels, height, width), activation, (kernel, stride, padding), dtype, draws, tied))


def composite(inputs: Case, noisy: bool) -> Tensor:
    """code_difference in torch's operations, for windows that do not overlap."""
    z, change, output, indices, activation, pool = inputs
    unpool = {"kernel_size": pool[0], "stride": pool[1], "padding": pool[2], "output_size": z.shape[-2:]}
    clean = functional.max_unpool2d(activate(output, activation), indices, **unpool)
    found = []
    for dz in change:
        y, own = functional.max_pool2d(activate(z + dz, activation), *pool, return_indices=True)
        code = functional.max_unpool2d(activate(y, activation), own if noisy else indices, **unpool)
        found.append(code - clean)
    return torch.stack(found)


@pytest.mark.parametrize("plane", [(4, 4), (8, 8), (2, 6), (14, 14), (7, 5)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_torch_s_pools_ties_included(
    plane: tuple[int, int], activation: str, noisy: bool, dtype: torch.dtype
) -> None:
    inputs = case((3, 5, *plane), activation, dtype=dtype, tied=True)
    assert torch.equal(ops.code_difference(*inputs.code(noisy)), composite(inputs, noisy))


@pytest.mark.parametrize("plane", [(4, 4), (2, 6), (5, 5)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_flat_activations_tie_and_nan_and_infinity_go_where_torch_puts_them(
    plane: tuple[int, int], activation: str
) -> None:
    values = torch.tensor([-torch.inf, -60.0, -40.0, 40.0, 60.0, torch.inf, torch.nan])
    shape = (40, 2, *plane)
    z = values[torch.randint(len(values), shape)]
    output, indices = functional.max_pool2d(activate(z, activation), 2, return_indices=True)
    inputs = Case(z, torch.zeros(1, *shape), output, indices, activation, EVEN)
    for noisy in (True, False):
        expected, actual = composite(inputs, noisy), ops.code_difference(*inputs.code(noisy))
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pool", [(3, 2, 1), (3, 1, 1)], ids=str)
def test_the_last_of_overlapping_windows_stays(pool: tuple[int, int, int]) -> None:
    inputs = case((2, 3, 6, 7), "identity", pool, torch.float64, tied=True)
    assert inputs.indices is not None
    counts = max_unpool(torch.ones_like(inputs.output), inputs.indices, 6, 7, overlapping=True).sum()
    assert counts < inputs.output.numel(), "windows share maxima"
    # One rising number a window tells which of them stayed.
    numbers = torch.arange(inputs.output.numel(), dtype=torch.float64).view_as(inputs.output)
    expected = torch.from_numpy(reference.max_unpool(numbers.numpy(), inputs.indices.numpy(), 6, 7))
    still = torch.zeros(1, *inputs.preactivation.shape, dtype=torch.float64)
    code = ops.code_difference(inputs.preactivation, still, -numbers, inputs.indices, "identity", 1.0, *pool, False)
    own = ops.code_difference(
        inputs.preactivation, still, torch.zeros_like(numbers), inputs.indices, "identity", 1.0, *pool, False
    )
    assert torch.equal((code - own)[0], expected)
    assert torch.equal(max_unpool(numbers, inputs.indices, 6, 7, overlapping=True), expected)


@pytest.mark.parametrize("pool", [(3, 2**60, 1), (3, 2**40, 1), (2**40, 1, 2**39), (2**40, 3, 2**39)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_far_larger_than_the_plane(pool: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Neither time nor memory grow with them: each window has the whole plane, or there is one."""
    kernel, stride, padding = pool
    side = (5 + 2 * padding - kernel) // stride + 1
    z, change = torch.randn(1, 1, 5, 5, dtype=dtype), torch.randn(2, 1, 1, 5, 5, dtype=dtype)
    seen = slice(None) if kernel > 5 else slice(0, 2)  # of rows and columns
    largest = z[0, 0, seen, seen].max()
    indices = (z[0, 0] == largest).flatten().nonzero().expand(1, 1, side, side).contiguous()
    output = largest.expand(1, 1, side, side).contiguous()
    actual = ops.code_difference(z, change, output, indices, "identity", 1.0, *pool, True)
    expected = torch.zeros_like(change)
    for moved, to in zip(z + change, expected, strict=True):
        best = moved[0, 0, seen, seen].max()
        to[0, 0][moved[0, 0] == best] = best
        to[0, 0].view(-1)[indices[0, 0, 0, 0]] -= largest
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("shape", "pool"),
    [*(((*shape,), EVEN) for shape in ((5, 3, 8, 8), (5, 40, 2, 2), (4, 3, 14, 14), (7, 5, 32, 32), (5, 3, 9, 9)))]
    # enough elements for several threads in windows of any kind
    + [((7, 5, 33, 31), pool) for pool in ((3, 2, 1), (2, 2, 0), (3, 1, 1))],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads_and_in_any_part(
    shape: tuple[int, ...], pool: tuple[int, int, int], dtype: torch.dtype
) -> None:
    inputs = case(shape, pool=pool, dtype=dtype)
    code, probe = inputs.code(), inputs.probe(first_row=0)
    torch.set_num_threads(1)
    whole = [ops.code_difference(*code), ops.probe_difference(*probe)]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.code_difference(*code), whole[0])
        assert torch.equal(ops.probe_difference(*probe), whole[1])
        part = [code[0][2:], code[1][:, 2:], code[2][2:], code[3][2:], *code[4:]]
        assert torch.equal(ops.code_difference(*part), whole[0][:, 2:])
        part = [probe[0][2:], probe[1][2:], *probe[2:-2], 2, probe[-1]]
        assert torch.equal(ops.probe_difference(*part), whole[1][:, 2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", [(4, 4), (6, 6), (5, 5)], ids=str)
def test_the_probe_s_noise_is_counter_normal_to_the_bit(dtype: torch.dtype, plane: tuple[int, int]) -> None:
    inputs = case((3, 5, *plane), dtype=dtype)
    still = torch.zeros_like(inputs.output)
    pool = {"kernel": 2, "height": plane[0], "width": plane[1], "activation": "identity"}
    probes = probe_difference(still, inputs.indices, **pool, sigma=0.25, **COUNTER, first_row=9, draws=3)
    for k in range(3):
        stream = {"stream": COUNTER["stream"] + 2 * k}
        noise = counter_normal(still.shape, **COUNTER | stream, scale=0.25, first_row=9, dtype=dtype)
        assert torch.equal(probes[k], max_unpool(noise, inputs.indices, *plane))


def test_empty_batches_draws_and_channels() -> None:
    for shape, draws in (((0, 3, 4, 4), 2), ((2, 0, 4, 4), 2), ((2, 3, 4, 4), 0)):
        z, change = torch.zeros(shape), torch.zeros(draws, *shape)
        y = torch.zeros(*shape[:2], 2, 2)
        indices = torch.zeros(y.shape, dtype=torch.int64)
        assert code_difference(z, change, y, indices, kernel=2).shape == change.shape
        pool = {"kernel": 2, "height": 4, "width": 4}
        assert probe_difference(y, indices, **pool, sigma=1.0, **COUNTER, draws=draws).shape == change.shape
    assert code_difference(torch.zeros(0, 5), torch.zeros(2, 0, 5), torch.zeros(0, 5)).shape == (2, 0, 5)
    assert probe_difference(torch.zeros(3, 0), sigma=1.0, **COUNTER).shape == (1, 3, 0)


@pytest.mark.parametrize("plane", [(4, 4), (2, 32), (6, 6), (5, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_the_result_is_written_and_strange_indices_are_not_followed(
    plane: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = case((2, 3, *plane), dtype=dtype)
    assert inputs.indices is not None
    for pool, shift in itertools.product((EVEN, (3, 2, 1)), (0, 2**40, -(2**40), 7)):
        inputs = case((2, 3, *plane), pool=pool, dtype=dtype)
        indices = inputs.indices + shift
        size = inputs.change.numel()
        memory = torch.full((size + 200,), 7.0, dtype=dtype)
        difference = memory[100 : size + 100].view_as(inputs.change)
        z, change, output = inputs.preactivation.flatten(0, 1), inputs.change.flatten(1, 2), inputs.output.flatten(0, 1)
        arguments = (z, change, output, indices.flatten(0, 1), "elu", ALPHA, *pool, True)
        _C.code_difference(*arguments, difference.flatten(1, 2), 1)
        assert torch.equal(memory[:100], memory[size + 100 :])
        assert (memory[:100] == 7).all()
        noise = (SIGMA, *COUNTER.values(), 2, 0)
        _C.probe_difference(inputs.output, indices, "elu", ALPHA, *pool, *noise, difference, 1)
        assert (memory[:100] == 7).all()
        assert (memory[size + 100 :] == 7).all()


def test_strided_arguments_give_what_dense_ones_do() -> None:
    inputs = case((2, 3, 4, 6))
    strided = [a.to(memory_format=torch.channels_last) for a in (inputs.preactivation, inputs.output, inputs.indices)]
    change = inputs.change.mT.contiguous().mT
    expected = ops.code_difference(*inputs.code())
    assert torch.equal(ops.code_difference(strided[0], change, *strided[1:], *inputs.code()[4:]), expected)
    expected = ops.probe_difference(*inputs.probe())
    assert torch.equal(ops.probe_difference(*strided[1:], *inputs.probe()[2:]), expected)


@pytest.mark.parametrize("pool", [EVEN, (3, 2, 1), (0, 1, 0)], ids=str)
def test_opcheck(pool: tuple[int, int, int]) -> None:
    inputs = case((2, 3, 6, 6), pool=pool)
    torch.library.opcheck(ops.code_difference.default, inputs.code())
    torch.library.opcheck(ops.probe_difference.default, inputs.probe())


def test_compiles_in_one_graph() -> None:
    inputs = case((2, 3, 6, 6))
    pool = {"kernel": 2, "height": 6, "width": 6}

    def run(z: Tensor, change: Tensor, y: Tensor, indices: Tensor, step: int) -> Tensor:
        moved = code_difference(z, change, y, indices, kernel=2)
        probes = probe_difference(y, indices, **pool, sigma=SIGMA, seed=1, step=step, stream=0, draws=2)
        return moved + probes + max_unpool(y, indices, 6, 6) + max_unpool(y, indices, 6, 6, overlapping=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for step in range(3):
        torch.testing.assert_close(compiled(*inputs[:4], step), run(*inputs[:4], step))


@pytest.mark.parametrize("pool", [EVEN, (0, 1, 0)], ids=str)
def test_differentiating_is_refused(pool: tuple[int, int, int]) -> None:
    inputs = case((2, 3, 4, 4), pool=pool)
    for index in range(3):
        arguments = list(inputs.code())
        arguments[index] = arguments[index].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=r"code_difference: .* tpext\.feedback\.ldrl_loss"):
            ops.code_difference(*arguments).sum().backward()
    probe = [inputs.output.clone().requires_grad_(), *inputs.probe()[1:]]
    with pytest.raises(RuntimeError, match=r"probe_difference: .* tpext\.feedback\.ldrl_loss"):
        ops.probe_difference(*probe).sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="_difference: forward-mode"):
        ops.code_difference(torch.autograd.forward_ad.make_dual(inputs[0], inputs[0]), *inputs.code()[1:])


def test_autocast_computes_in_float32() -> None:
    inputs = case((2, 3, 4, 4))
    low = Case(*(a.bfloat16() for a in inputs[:3]), *inputs[3:])
    full = Case(*(a.float() for a in low[:3]), *inputs[3:])
    with pytest.raises(
        ValueError, match=r"preactivation must be .*, got bfloat16; for lower precision use torch\.auto"
    ):
        ops.code_difference(*low.code())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = [ops.code_difference(*low.code()), ops.probe_difference(*low.probe())]
    expected = [ops.code_difference(*full.code()), ops.probe_difference(*full.probe())]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# max_unpool


@pytest.mark.parametrize(
    ("pool", "overlapping"), [(EVEN, False), (EVEN, True), ((3, 2, 1), True), ((3, 1, 1), True)], ids=str
)
def test_max_unpool_equals_the_oracle_and_has_true_derivatives(pool: tuple[int, int, int], overlapping: bool) -> None:
    inputs = case((2, 3, 6, 6), "identity", pool, torch.float64, tied=True)
    values, indices = inputs.output.clone().requires_grad_(), inputs.indices
    assert indices is not None
    expected = reference.max_unpool(values.detach().numpy(), indices.numpy(), 6, 6)
    np.testing.assert_array_equal(max_unpool(values, indices, 6, 6, overlapping=overlapping).detach(), expected)

    def square(v: Tensor) -> Tensor:
        return max_unpool(v, indices, 6, 6, overlapping=overlapping) ** 2

    values = torch.randn_like(values).requires_grad_()
    assert torch.autograd.gradcheck(square, values)
    assert torch.autograd.gradgradcheck(square, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3)}, r"values must be \[\.\.\., h, w\], got \[3\]"),
        ({"indices": torch.zeros(2, 2, dtype=torch.int32)}, "indices must be int64, got int32"),
        ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, r"indices must be \[2, 2\] as values is, got \[2, 3\]"),
        ({"indices": torch.zeros(2, 2, dtype=torch.int64, device="meta")}, "indices must be on cpu as values is, got"),
    ],
)
def test_max_unpool_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"values": torch.zeros(2, 2), "indices": torch.zeros(2, 2, dtype=torch.int64), "height": 4, "width": 4}
    with pytest.raises(ValueError, match=f"max_unpool: {message}"):
        max_unpool(**arguments | change)


# Wrong arguments


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preactivation": torch.zeros(3, 4, 4)}, r"preactivation must be \[B, C, H, W\], got \[3, 4, 4\]"),
        ({"preactivation": torch.zeros(2, 3, 4, 4).half()}, "preactivation must be float32 or float64, got float16"),
        ({"change": torch.zeros(1, 2, 3, 4, 5)}, r"change must be \[1, 2, 3, 4, 4\], got \[1, 2, 3, 4, 5\]"),
        ({"change": torch.zeros(1, 2, 3, 4, 4).double()}, "change must be float32 as preactivation is, got float64"),
        ({"change": torch.zeros(1, 2, 3, 4, 4, device="meta")}, "change must be on cpu as preactivation is, got meta"),
        ({"change": torch.tensor(1.0)}, "change must be .*, got "),
        ({"output": torch.zeros(2, 3, 4, 4)}, r"output must be \[2, 3, 2, 2\], got \[2, 3, 4, 4\]"),
        ({"indices": None}, "indices must be given with a pool .*, got kernel=2"),
        ({"kernel": 0, "output": torch.zeros(2, 3, 4, 4)}, "indices must be given .* and only with one, got kernel=0"),
        ({"indices": ints(2, 3, 2, 3)}, r"indices must be \[2, 3, 2, 2\] as output is, got \[2, 3, 2, 3\]"),
        ({"indices": torch.zeros(2, 3, 2, 2)}, "indices must be int64, got float32"),
        ({"activation": "gelu"}, "activation must be one of 'elu', .*, got 'gelu'"),
        ({"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
        ({"kernel": -1}, "kernel must be >= 0, got -1"),
        ({"kernel": 5, "stride": 1}, "H and W must be at least kernel - 2 padding = 5, got 4 and 4"),
        ({"stride": 0}, "stride must be >= 1, got 0"),
        ({"padding": 2}, r"padding must lie in 0\.\.kernel/2=1, got 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_code_difference_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "preactivation": torch.zeros(2, 3, 4, 4),
        "change": torch.zeros(1, 2, 3, 4, 4),
        "output": torch.zeros(2, 3, 2, 2),
        "indices": ints(2, 3, 2, 2),
        "kernel": 2,
    }
    with pytest.raises(ValueError, match=f"code_difference: {message}"):
        code_difference(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(2, 3, 2)}, r"output must be \[B, C, h, w\], got \[2, 3, 2\]"),
        ({"output": torch.tensor(1.0), "kernel": 0}, r"output must be \[B, \.\.\.\], got \[\]"),
        ({"output": torch.zeros(2, 3, 2, 2).long()}, "output must be float32 or float64, got int64"),
        ({"height": 6}, r"output must be \[2, 3, 3, 2\] for planes \[H=6, W=4\], got \[2, 3, 2, 2\]"),
        ({"indices": None}, "indices must be given with a pool"),
        ({"sigma": float("inf")}, "sigma must be a finite number, got inf"),
        ({"draws": -1}, "draws must be an integer >= 0, got -1"),
        ({"stream_stride": -1}, r"stream_stride must lie in \[0, 2\^32\), got -1"),
        ({"step": 2**32}, r"step must lie in \[0, 2\^32\), got 4294967296"),
        ({"stream": 2**32 - 2, "draws": 2}, r"the last stream, .*, must be less than 2\^32, got 4294967294 \+ 1 \* 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_probe_difference_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"output": torch.zeros(2, 3, 2, 2), "indices": ints(2, 3, 2, 2), "kernel": 2, "height": 4, "width": 4}
    with pytest.raises(ValueError, match=f"probe_difference: {message}"):
        probe_difference(**{**arguments, "sigma": 1.0, **COUNTER, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preactivation": torch.zeros(6, 4)}, r"preactivation must be \[P, H, W\], got \[6, 4\]"),
        ({"change": torch.zeros(1, 6, 4, 5)}, r"change must be \[K=1, P=6, H=4, W=4\], got \[1, 6, 4, 5\]"),
        ({"output": torch.zeros(6, 2, 3)}, r"output must be \[P=6, h=2, w=2\], got \[6, 2, 3\]"),
        ({"indices": ints(6, 2, 2).int()}, "indices must be int64, got int32"),
        ({"indices": ints(6, 4, 2)[:, ::2]}, "indices must be contiguous"),
        ({"difference": torch.zeros(1, 6, 4, 4).double()}, "difference must be float32, got float64"),
        ({"activation": "gelu"}, "activation must be one of 'elu', .*, got 'gelu'"),
        ({"alpha": float("nan")}, "alpha must be a finite number > 0, got nan"),
        ({"kernel": -1}, "kernel must be >= 0, got -1"),
        ({"kernel": 5}, "H must be at least kernel - 2 padding = 5, got 4"),
        ({"stride": 0}, "stride must be >= 1, got 0"),
        ({"padding": 2}, r"padding must lie in 0\.\.kernel/2=1, got 2"),
        ({"execution": 0}, r"execution must lie in 1\.\.1024 threads"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_code_kernel_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "preactivation": torch.zeros(6, 4, 4),
        "change": torch.zeros(1, 6, 4, 4),
        "output": torch.zeros(6, 2, 2),
    }
    options = {"activation": "elu", "alpha": 1.0, "kernel": 2, "stride": 2, "padding": 0, "noisy": True}
    written = {"difference": torch.zeros(1, 6, 4, 4), "execution": 1}
    with pytest.raises(ValueError, match=f"code_difference: {message}"):
        _C.code_difference(**arguments | {"indices": ints(6, 2, 2)} | options | written | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(2, 3, 2)}, r"output must be \[B, C, h, w\], got \[2, 3, 2\]"),
        ({"output": torch.zeros(2, 3, 2, 3)}, r"output must be \[B=2, C=3, h=2, w=2\], got \[2, 3, 2, 3\]"),
        ({"indices": ints(2, 3, 2, 3)}, r"indices must be \[B=2, C=3, h=2, w=2\], got \[2, 3, 2, 3\]"),
        ({"difference": torch.zeros(3, 4, 4)}, r"difference must be \[K, B, C, H, W\], got \[3, 4, 4\]"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"stream": 2**32 - 1}, r"the last stream must lie in \[0, 2\^32\), got 4294967297"),
        ({"stream_stride": -1}, r"stream_stride must lie in \[0, 2\^32\), got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_probe_kernel_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"output": torch.zeros(2, 3, 2, 2), "indices": ints(2, 3, 2, 2), "activation": "elu", "alpha": 1.0}
    options = {"kernel": 2, "stride": 2, "padding": 0, "sigma": 1.0, **COUNTER, "stream_stride": 2, "first_row": 0}
    written = {"difference": torch.zeros(2, 2, 3, 4, 4), "execution": 1}
    with pytest.raises(ValueError, match=f"probe_difference: {message}"):
        _C.probe_difference(**arguments | options | written | change)


# CUDA


@pytest.mark.parametrize("pool", [EVEN, (3, 2, 1), (2, 3, 1), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_the_oracle(
    device: torch.device, pool: tuple[int, int, int], activation: str, dtype: torch.dtype
) -> None:
    for shape in ((2, 3, 4, 4), (1, 5, 6, 8), (2, 2, 5, 7)):
        check_both(case(shape, activation, pool, dtype), device)
        if pool[0]:
            check_both(case(shape, activation, pool, dtype, tied=True), device)


def test_the_cuda_entry_takes_planes_without_a_pool(emulated_module: ModuleType) -> None:
    """Which the op makes one plane of."""
    z, change = torch.randn(6, 4, 5), torch.randn(2, 6, 4, 5)
    written = []
    for module, execution in ((_C, 1), (emulated_module, (0, "auto", None))):
        difference = torch.full_like(change, torch.nan)
        module.code_difference(z, change, z.relu(), None, "relu", 1.0, 0, 1, 0, True, difference, execution)
        written.append(difference)
    assert torch.equal(*written)


def test_cuda_nan_and_infinity_go_where_the_cpu_puts_them(device: torch.device) -> None:
    values = torch.tensor([-torch.inf, -60.0, -40.0, 40.0, torch.inf, torch.nan])
    for pool, activation in itertools.product((EVEN, (3, 2, 1)), ACTIVATIONS):
        z = values[torch.randint(len(values), (4, 2, 6, 6))]
        output, indices = functional.max_pool2d(activate(z, activation), *pool, return_indices=True)
        arguments = Case(z, torch.zeros(1, *z.shape), output, indices, activation, pool).code()
        exact = [a.double().numpy() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        # infinity minus infinity is wanted
        with np.errstate(invalid="ignore"):
            expected = reference.code_difference(*(a.numpy() if isinstance(a, Tensor) else a for a in exact))
        actual = run_on(device, ops.code_difference)(*arguments)
        np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-6, atol=1e-6)
