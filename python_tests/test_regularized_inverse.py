"""regularized_inverse and regularized_solve: equal to the oracles, the same to the bit on any threads, differentiable
twice, clear errors.

Tests that take ``device`` run on a GPU, and on the CPU by the emulation of the CUDA kernels.
"""

from __future__ import annotations

import itertools
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

regularized_inverse, regularized_solve = torch.ops.tpext.regularized_inverse, torch.ops.tpext.regularized_solve

# Around the kernel's vectors, blocks of rows, groups of panels, blocks of pivots and slices of the depth.
EDGES = [3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 48, 49, 64, 65, 97, 128, 129, 193, 260]
SHAPES = [(1, 1), (2, 2), (5, 3), (3, 5), (32, 32), (100, 64), (31, 257), (4, 6, 6), (3, 17, 9), (2, 3, 4, 5)]


CPU = torch.device("cpu")


def check(weight: Tensor, reg: float, device: torch.device = CPU) -> None:
    """Equality with the oracle on a device, up to the error of a solve with the Gram matrix ``W'W + reg I``.

    That is ``8 * eps * root of the size * condition``, relative to the greatest element of the inverse.
    """
    expected = reference.regularized_inverse(weight.double().numpy(), reg)
    singular_values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    condition = (singular_values.max(-1) ** 2 + reg) / (singular_values.min(-1) ** 2 + reg)
    greatest = np.abs(expected).max((-1, -2))
    allowed = 8 * torch.finfo(weight.dtype).eps * max(weight.shape[-2:]) ** 0.5 * condition * greatest
    actual = regularized_inverse(weight.to(device), reg).cpu()
    assert actual.dtype == weight.dtype
    assert actual.shape == expected.shape
    error = np.abs(actual.double().numpy() - expected).max((-1, -2))
    assert (error <= allowed).all(), f"error {error}, allowed {allowed}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reg", [1e-3, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle(shape: tuple[int, ...], reg: float, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    check(weight, reg)
    check(weight.mT.contiguous().mT, reg)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    M=st.integers(1, 40),
    N=st.integers(1, 40),
    reg=st.floats(1e-2, 1e3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_equals_the_oracle_at_random_sizes(
    batch: list[int], M: int, N: int, reg: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    check(torch.randn(*batch, M, N, dtype=torch.float64, generator=generator).to(dtype), reg)


@pytest.mark.parametrize("shape", [(3, 3), (6, 3), (3, 6), (2, 4, 7)], ids=str)
def test_without_ridge_it_is_the_pseudo_inverse(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(regularized_inverse(weight, 0.0), torch.linalg.pinv(weight), rtol=1e-10, atol=1e-10)


def test_with_a_great_ridge_it_is_the_transpose_over_the_ridge() -> None:
    weight = torch.randn(3, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(1e12 * regularized_inverse(weight, 1e12), weight.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle_at_block_edges(size: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    for shape in [(size, size), (size, 40), (40, size), (2, size, size + 1)]:
        check(torch.randn(shape, dtype=torch.float64).to(dtype), 1.0)


@pytest.mark.parametrize(
    "shape", [(64, 64), (1, 100, 100), (131, 131), (3, 140, 70), (5, 60, 200), (40, 20, 20)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    torch.set_num_threads(1)
    expected = regularized_inverse(weight, 0.1)
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        assert torch.equal(regularized_inverse(weight, 0.1), expected), f"{threads} threads"


@pytest.mark.parametrize("shape", [(1, 1), (9, 9), (30, 7), (7, 30), (150, 150)], ids=str)
@pytest.mark.parametrize("batch", [2, 5])
def test_same_bits_for_a_batch_and_its_matrices_alone(batch: int, shape: tuple[int, int]) -> None:
    torch.set_num_threads(2)
    weight = torch.randn(batch, *shape)
    alone = torch.stack([regularized_inverse(matrix, 1.0) for matrix in weight])
    assert torch.equal(regularized_inverse(weight, 1.0), alone)


@pytest.mark.parametrize("n", [5, 60, 130, 200])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_status_of_each_matrix_and_no_harm_to_its_neighbours(n: int, threads: int, dtype: torch.dtype) -> None:
    weight = torch.randn(7, n, n, dtype=dtype) + 3 * n**0.5 * torch.eye(n, dtype=dtype)
    weight[1, -1, 0] = torch.nan
    weight[2, 0, -1] = torch.inf
    weight[4, :, n // 2] = 0
    weight[5] *= torch.finfo(dtype).max ** 0.75
    inverse, status = torch.full_like(weight, 7.0), torch.full((7,), -1)
    assert _C.regularized_inverse(weight, [0.0], inverse, status, threads) == 4
    assert status.tolist() == [0, 1, 1, 0, 2, 2, 0]
    assert (inverse[status != 0] == 7).all(), "the inverse of a matrix that has none is left as it was"
    alone, usable = torch.empty_like(weight[:1]), torch.zeros(1, dtype=torch.int64)
    for i in (0, 3, 6):
        assert _C.regularized_inverse(weight[i : i + 1], [0.0], alone, usable, 1) == 0
        assert torch.equal(inverse[i], alone[0])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 3, 4), (2, 0, 4), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_matrices_have_empty_inverses(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inverse = regularized_inverse(torch.zeros(shape, dtype=dtype), 1.0)
    assert inverse.shape == (*shape[:-2], shape[-1], shape[-2])
    assert inverse.dtype == dtype


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (2, 2, 2)], ids=str)
def test_true_first_and_second_derivatives(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: regularized_inverse(w, 0.5), weight)
    assert torch.autograd.gradgradcheck(lambda w: regularized_inverse(w, 0.5), weight)


@pytest.mark.parametrize(
    ("requires_grad", "dtype", "shape"),
    [
        (False, torch.float32, (4, 3)),
        (True, torch.float64, (4, 3)),
        (True, torch.float32, (3, 4)),
        (True, torch.float64, (2, 3, 3)),
        (False, torch.float64, (0, 3, 4)),
    ],
    ids=str,
)
def test_opcheck(requires_grad: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=dtype, requires_grad=requires_grad)
    torch.library.opcheck(regularized_inverse.default, (weight, 1.0))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_float32(weight_dtype: torch.dtype) -> None:
    weight = torch.randn(2, 6, 6).to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inverse = regularized_inverse(weight, 1.0)
    torch.testing.assert_close(inverse.float(), regularized_inverse(weight.float(), 1.0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_matrix_is_named(dtype: torch.dtype) -> None:
    weight = torch.eye(3, dtype=dtype).repeat(4, 1, 1)
    weight[2, :, 1] = 0
    with pytest.raises(tpext.SingularError, match=r"regularized_inverse.*\b2\b"):
        regularized_inverse(weight, 0.0)
    assert issubclass(tpext.SingularError, torch.linalg.LinAlgError)


def test_a_singular_matrix_without_a_batch() -> None:
    with pytest.raises(tpext.SingularError, match="regularized_inverse"):
        regularized_inverse(torch.zeros(3, 3), 0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    weight = torch.eye(3).repeat(4, 1, 1)
    weight[1, 0, 2] = value
    with pytest.raises(ValueError, match=r"regularized_inverse: weight.*\b1\b"):
        regularized_inverse(weight, 1.0)


def test_elements_that_are_not_finite_are_reported_before_singular_matrices() -> None:
    weight = torch.eye(3).repeat(2, 2, 1, 1)
    weight[0, 0] = 0
    weight[1, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"weight\[1, 0\] has NaN"):
        regularized_inverse(weight, 0.0)


@pytest.mark.parametrize("n", [2, 65, 150])
def test_a_matrix_of_low_rank_is_refused_without_a_ridge_and_inverted_with_one(n: int) -> None:
    weight = torch.randn(n, n - 1, dtype=torch.float64) @ torch.randn(n - 1, n, dtype=torch.float64)
    with pytest.raises(tpext.SingularError, match=r"reg=0\.0 is singular"):
        regularized_inverse(weight, 0.0)
    check(weight, 1e-2)


def with_equal_rows(count: int, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Matrices two of whose rows (columns where they are fewer) are equal: singular whatever the rounding."""
    weight = torch.randn(count, m, n, dtype=dtype)
    for matrix in weight:
        lines = matrix if m <= n else matrix.mT
        i, j = torch.randperm(min(m, n))[:2]
        lines[i] = lines[j]
    return weight


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (9, 4), (32, 32), (40, 70), (100, 100), (130, 130)], ids=str)
def test_equal_rows_are_refused_without_a_ridge(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    weight = with_equal_rows(20, *shape, dtype) * scale
    rhs = torch.ones(20, 1, shape[0], dtype=dtype)
    calls = (lambda w, y: regularized_inverse(w, 0.0)), (lambda w, y: regularized_solve(w, y, 0.0))
    for call in calls:
        for i in range(20):
            with pytest.raises(tpext.SingularError, match=r"reg=0\.0 is singular"):
                call(weight[i], rhs[i])
        # In the lanes of vectors beside others, each is named.
        among = torch.randn(20, *shape, dtype=dtype)
        among[7] = weight[7]
        with pytest.raises(tpext.SingularError, match=r"weight\[7\]"):
            call(among, rhs)


def test_equal_rows_of_sevenths_are_refused() -> None:
    with pytest.raises(tpext.SingularError, match=r"reg=0\.0 is singular"):
        regularized_inverse(torch.tensor([[1 / 7, 3 / 7]] * 2), 0.0)


@pytest.mark.parametrize("shape", [(2, 2), (9, 4), (32, 32), (40, 70), (130, 130)], ids=str)
def test_no_scale_of_rows_or_condition_that_can_be_borne_is_refused(shape: tuple[int, int]) -> None:
    size = min(shape)
    u, v = (torch.linalg.qr(torch.randn(5, n, size, dtype=torch.float64)).Q for n in shape)
    # Float64 of a Gram matrix bears conditions up to some 1e7.
    ill = (u * torch.logspace(0, -6, size, dtype=torch.float64)) @ v.mT
    lines = torch.logspace(0, -12, size, dtype=torch.float64)
    scaled = u @ v.mT
    scaled = scaled * lines if shape[1] == size else lines[:, None] * scaled
    for weight in (u @ v.mT, ill, scaled):
        product = regularized_inverse(weight, 0.0) @ weight
        assert torch.allclose(product.diagonal(dim1=-2, dim2=-1).sum(-1), torch.tensor(size).double(), atol=1e-2)
        regularized_solve(weight, torch.ones(5, 1, shape[0], dtype=torch.float64), 0.0)


def test_overflow_is_refused() -> None:
    with pytest.raises(tpext.SingularError, match="overflows"):
        regularized_inverse(torch.full((3, 3), 1e30), 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3)}, r"weight must be \[\.\.\., M, N\], got \[3\]"),
        ({"weight": torch.zeros(2, 3, 4).half()}, "weight must be float32"),
        ({"weight": torch.zeros(2, 4, 3).mT}, "weight must be contiguous"),
        ({"inverse": torch.zeros(2, 3, 4)}, r"inverse must be \[batch=2, N=4, M=3\], got \[2, 3, 4\]"),
        ({"inverse": torch.zeros(2, 4, 3).double()}, "inverse must be float32, got float64"),
        (
            {"inverse": torch.zeros(2, 1, 4, 3), "weight": torch.zeros(3, 3, 4)},
            r"inverse must be .* got \[2, 1, 4, 3\]",
        ),
        ({"status": torch.zeros(3).long()}, r"status must be \[batch=2\], got \[3\]"),
        ({"status": torch.zeros(2)}, "status must be int64, got float32"),
        ({"reg": [-1.0]}, "reg must be >= 0"),
        ({"reg": [1.0] * 3}, "reg must have 1 or batch=2 values, got 3"),
        ({"reg": [float("nan")]}, "reg must be >= 0"),
        ({"execution": 0}, r"execution must lie in 1\.\.1024 threads on the CPU, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_kernel_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "weight": torch.zeros(2, 3, 4),
        "reg": [1.0],
        "inverse": torch.zeros(2, 4, 3),
        "status": torch.zeros(2).long(),
        "execution": 1,
    }
    with pytest.raises(ValueError, match=f"regularized_inverse: {message}"):
        _C.regularized_inverse(**arguments | change)


@pytest.mark.parametrize("reg", [-1.0, -1e-30, float("nan"), float("inf"), -float("inf")])
def test_a_ridge_out_of_range_is_refused(reg: float) -> None:
    with pytest.raises(ValueError, match="regularized_inverse: reg"):
        regularized_inverse(torch.eye(3), reg)


@pytest.mark.parametrize("weight", [torch.tensor(1.0), torch.ones(3)], ids=["no dimension", "one dimension"])
def test_a_weight_of_too_few_dimensions_is_refused(weight: Tensor) -> None:
    with pytest.raises((ValueError, RuntimeError), match="regularized_inverse: weight"):
        regularized_inverse(weight, 1.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float16])
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match="regularized_inverse: weight"):
        regularized_inverse(torch.eye(3).to(dtype), 1.0)


# Small matrices, one a lane of a vector: around the lanes, the blocks and their halves, and the sizes up to which they
# are taken together, the batch around the lanes too.
SMALL = [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64]
BATCHES = [1, 2, 15, 16, 17, 70]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SMALL)
def test_small_batches_equal_the_oracle_at_block_edges(n: int, dtype: torch.dtype) -> None:
    for shape, batch, threads in itertools.product([(n, n), (2 * n + 1, n), (n, n + 3)], BATCHES, (1, 2)):
        torch.set_num_threads(threads)
        check(torch.randn(batch, *shape, dtype=torch.float64).to(dtype), 1.0)
    weight = torch.randn(5, n, 7, n + 1, dtype=dtype).transpose(1, 2)
    check(weight, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*[(n, n) for n in SMALL], (5, 3), (3, 5), (47, 20), (20, 47), (128, 9), (9, 129)], ids=str
)
def test_same_bits_in_any_place_of_any_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Neither the kernel for single matrices, which inverts those alone, nor lanes, neighbours and threads show."""
    weight = torch.randn(70, *shape, dtype=dtype)
    alone = torch.stack([regularized_inverse(matrix, 0.1) for matrix in weight])
    for threads, part in itertools.product((1, 2, 3), (slice(None), slice(1, None), slice(5, 40), slice(None, 17))):
        torch.set_num_threads(threads)
        assert torch.equal(regularized_inverse(weight[part], 0.1), alone[part])
    order = torch.randperm(70)
    assert torch.equal(regularized_inverse(weight[order], 0.1), alone[order])


def failing_batch(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """51 matrices, and the status of each without a ridge: failures next to each other, first, last, in every lane."""
    weight = torch.randn(51, n, n, dtype=dtype) + 3 * n**0.5 * torch.eye(n, dtype=dtype)
    status = torch.zeros(51, dtype=torch.int64)
    for i in [0, 3, 4, 5, 9, 14, 18, 23, 28, 29, 34, 41, 42, 43, 44, 50]:
        if i % 4 == 0:
            weight[i, -1, 0] = torch.nan
        elif i % 4 == 1:
            weight[i, 0, -1] = torch.inf
        elif i % 4 == 2:
            weight[i, :, n // 2] = 0
        else:
            weight[i] *= torch.finfo(dtype).max ** 0.75
        status[i] = 1 if i % 4 < 2 else 2
    return weight, status


@pytest.mark.parametrize("n", [2, 5, 8, 17, 33, 48])
@pytest.mark.parametrize("dtype", DTYPES)
def test_status_of_each_of_many_small_matrices(n: int, dtype: torch.dtype) -> None:
    weight, expected = failing_batch(n, dtype)
    usable = expected == 0
    for threads in (1, 2):
        inverse, status = torch.full_like(weight, 7.0), torch.full((51,), -1)
        assert _C.regularized_inverse(weight, [0.0], inverse, status, threads) == 16
        assert torch.equal(status, expected)
        assert (inverse[~usable] == 7).all()
        unasked = torch.full_like(weight, 7.0)
        assert _C.regularized_inverse(weight, [0.0], unasked, None, threads) == 16
        assert torch.equal(unasked, inverse)
        alone, one = torch.empty_like(weight[:1]), torch.zeros(1, dtype=torch.int64)
        for i in usable.nonzero().flatten().tolist():
            assert _C.regularized_inverse(weight[i : i + 1], [0.0], alone, one, 1) == 0
            assert torch.equal(inverse[i], alone[0])


# Solving without the inverse.


def check_solve(weight: Tensor, rhs: Tensor, reg: float, device: torch.device = CPU) -> None:
    """Equality with the oracle, each row up to what ``check`` allows the inverse, times the sum of the row's sizes."""
    rows, matrices = rhs.double().numpy(), weight.double().numpy()
    expected = reference.regularized_solve(matrices, rows, reg)
    singular_values = np.linalg.svd(matrices, compute_uv=False)
    condition = (singular_values.max(-1) ** 2 + reg) / (singular_values.min(-1) ** 2 + reg)
    greatest = np.abs(reference.regularized_inverse(matrices, reg)).max((-1, -2))
    error_of_inverse = 8 * torch.finfo(weight.dtype).eps * max(weight.shape[-2:]) ** 0.5 * condition * greatest
    allowed = error_of_inverse[..., None] * np.abs(rows).sum(-1)
    actual = regularized_solve(weight.to(device), rhs.to(device), reg).cpu()
    assert actual.dtype == weight.dtype
    assert actual.shape == expected.shape
    error = np.abs(actual.double().numpy() - expected).max(-1)
    assert (error <= allowed).all(), f"error {error.max()}, allowed {allowed.min()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SMALL)
def test_solutions_equal_the_oracle_at_block_edges(n: int, dtype: torch.dtype) -> None:
    for shape, batch in itertools.product([(n, n), (2 * n - 1, n), (n, n + 3)], BATCHES):
        torch.set_num_threads(1 + batch % 2)
        for count in {1, min(9, n), n, n + 5}:
            weight, rhs = torch.randn(batch, *shape, dtype=dtype), torch.randn(batch, count, shape[0], dtype=dtype)
            check_solve(weight, rhs, 1.0)
    weight, rhs = torch.randn(5, n, 3, n + 1, dtype=dtype), torch.randn(5, n, 3, 2, dtype=dtype)
    check_solve(weight.transpose(1, 2), rhs.permute(0, 2, 3, 1), 0.5)


# One after another: around lanes, blocks of rows, groups of panels, blocks of pivots and slices of the depth, beside
# those of the inverse; tall, wide, square.
LARGE = [
    (65, 65),
    (65, 100),
    (100, 65),
    (240, 240),
    (300, 100),
    (100, 300),
    (129, 257),
    (257, 129),
    (130, 20),
    (9, 200),
]


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_solutions_of_larger_matrices_equal_the_oracle(shape: tuple[int, int], batch: int, dtype: torch.dtype) -> None:
    weight = torch.randn(batch, *shape, dtype=torch.float64).to(dtype)
    for count, threads in [(1, 1), (15, 2), (16, 1), (17, 3), (100, 2), (max(shape), 1), (max(shape) + 1, 2)]:
        torch.set_num_threads(threads)
        rhs = torch.randn(batch, count, shape[0], dtype=torch.float64).to(dtype)
        check_solve(weight, rhs, 0.3)
        check_solve(weight[0], rhs[0].mT.contiguous().mT, 0.3)


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_solutions_of_one_matrix_equal_the_oracle_at_block_edges(size: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    for shape, count in itertools.product([(size, size), (size, 40), (40, size)], (1, 17, 48)):
        weight = torch.randn(shape, dtype=torch.float64).to(dtype)
        check_solve(weight, torch.randn(count, shape[0], dtype=torch.float64).to(dtype), 1.0)


@pytest.mark.parametrize("shape", [(64, 64), (100, 100), (240, 240), (140, 70), (60, 200), (300, 129)], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_of_solutions_on_any_number_of_threads(
    shape: tuple[int, int], batch: int, dtype: torch.dtype
) -> None:
    weight, rhs = torch.randn(batch, *shape, dtype=dtype), torch.randn(batch, 50, shape[0], dtype=dtype)
    torch.set_num_threads(1)
    expected = torch.stack([regularized_solve(*pair, 0.1) for pair in zip(weight, rhs, strict=True)])
    by_rows = torch.cat([regularized_solve(weight, rhs[:, i : i + 7], 0.1) for i in range(0, 50, 7)], 1)
    assert torch.equal(by_rows, expected), "a row's solution does not depend on the others"
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        assert torch.equal(regularized_solve(weight, rhs, 0.1), expected), f"{threads} threads"


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 40, 33)], ids=str)
@pytest.mark.parametrize("reg", [0.0, 1e-4, 2.0])
def test_solutions_are_regularised_least_squares(shape: tuple[int, ...], reg: float) -> None:
    weight, rhs = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-2], 3, shape[-2], dtype=torch.float64)
    N = shape[-1]
    system = torch.cat([weight, reg**0.5 * torch.eye(N, dtype=torch.float64).expand(*shape[:-2], N, N)], -2)
    targets = torch.cat([rhs, rhs.new_zeros(*shape[:-2], 3, N)], -1).mT
    expected = torch.linalg.lstsq(system, targets, driver="gelsd").solution.mT
    torch.testing.assert_close(regularized_solve(weight, rhs, reg), expected, rtol=1e-9, atol=1e-9)
    through_inverse = rhs @ regularized_inverse(weight, reg).mT
    torch.testing.assert_close(regularized_solve(weight, rhs, reg), through_inverse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (4, 4), (9, 5), (5, 9), (16, 16), (32, 32), (31, 70), (48, 48), (64, 64)], ids=str
)
def test_same_bits_of_solutions_in_any_place_of_any_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, rhs = torch.randn(70, *shape, dtype=dtype), torch.randn(70, 3, shape[0], dtype=dtype)
    rhs = rhs[:, : max(shape)]
    together = regularized_solve(weight, rhs, 0.1)
    parts = [slice(1, None), slice(5, 40), slice(None, 17), *(slice(i, i + 1) for i in range(70))]
    for threads, part in itertools.product((1, 2, 3), parts):
        torch.set_num_threads(threads)
        assert torch.equal(regularized_solve(weight[part], rhs[part], 0.1), together[part])


@pytest.mark.parametrize("n", [2, 5, 8, 17, 33, 64, 100, 140])
@pytest.mark.parametrize("dtype", DTYPES)
def test_status_of_each_matrix_of_a_solve_and_no_harm_to_its_neighbours(n: int, dtype: torch.dtype) -> None:
    weight, expected = failing_batch(n, dtype)
    rhs, usable = torch.randn(51, 11, n, dtype=dtype), expected == 0
    good = torch.where(usable[:, None, None], weight, torch.eye(n, dtype=dtype))
    for part in (slice(None), slice(0, 1), slice(3, 6)):
        solution, status = torch.full_like(rhs, 7.0)[part], torch.full((51,), -1)[part]
        arguments = (weight[part], rhs[part], 0.0, solution, status)
        assert _C.regularized_solve(*arguments, 2) == (expected[part] != 0).sum()
        assert torch.equal(status, expected[part])
        assert (solution[~usable[part]] == 7).all()
        without_failures = torch.empty_like(solution)
        assert _C.regularized_solve(good[part], rhs[part], 0.0, without_failures, torch.empty_like(status), 1) == 0
        assert torch.equal(solution[usable[part]], without_failures[usable[part]])
        assert _C.regularized_solve(*arguments[:3], without_failures, None, 1) == (expected[part] != 0).sum()
        assert torch.equal(solution[usable[part]], without_failures[usable[part]])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (7, 7), (100, 65), (65, 100)], ids=str)
def test_a_row_that_is_not_finite_harms_no_other(shape: tuple[int, int], value: float) -> None:
    weight, rhs = torch.randn(20, *shape), torch.randn(20, 3, shape[0])
    expected = regularized_solve(weight, rhs, 1.0)
    rhs[4, 1, 2] = value
    solution = regularized_solve(weight, rhs, 1.0)
    assert not solution[4, 1].isfinite().any()
    expected[4, 1] = solution[4, 1] = 0
    assert torch.equal(solution, expected)


@pytest.mark.parametrize(
    ("shape", "count"), [((0, 3, 4), 2), ((2, 0, 4), 2), ((2, 4, 0), 2), ((2, 3, 4), 0), ((0, 3), 1), ((3, 0), 5)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_solutions_of_zero_size(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    weight, rhs = torch.zeros(shape, dtype=dtype), torch.ones(*shape[:-2], count, shape[-2], dtype=dtype)
    solution = regularized_solve(weight, rhs, 1.0)
    assert torch.equal(solution, torch.zeros(*shape[:-2], count, shape[-1], dtype=dtype))


@pytest.mark.parametrize(("shape", "count"), [((3, 2), 2), ((2, 3), 3), ((2, 2, 2), 1), ((1, 4, 2), 5)])
@pytest.mark.parametrize("reg", [0.0, 0.5])
def test_true_first_and_second_derivatives_of_solutions(shape: tuple[int, ...], count: int, reg: float) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rhs = torch.randn(*shape[:-2], count, shape[-2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, y: regularized_solve(w, y, reg), (weight, rhs))
    assert torch.autograd.gradgradcheck(lambda w, y: regularized_solve(w, y, reg), (weight, rhs))


@pytest.mark.parametrize(
    ("requires_grad", "dtype", "shape", "count"),
    [
        (False, torch.float32, (4, 3), 2),
        (True, torch.float64, (4, 3), 9),
        (True, torch.float32, (3, 4), 1),
        (True, torch.float64, (2, 70, 65), 3),
        (False, torch.float64, (0, 3, 4), 2),
    ],
    ids=str,
)
def test_opcheck_of_the_solve(requires_grad: bool, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> None:
    weight = torch.randn(shape, dtype=dtype, requires_grad=requires_grad)
    rhs = torch.randn(*shape[:-2], count, shape[-2], dtype=dtype, requires_grad=requires_grad)
    torch.library.opcheck(regularized_solve.default, (weight, rhs, 1.0))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_autocast_solves_in_float32(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    weight, rhs = torch.randn(2, 6, 6).to(dtypes[0]), torch.randn(2, 3, 6).to(dtypes[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = regularized_solve(weight, rhs, 1.0)
    assert torch.equal(solution, regularized_solve(weight.float(), rhs.float(), 1.0))


def test_float32_without_a_ridge_is_solved_in_float64() -> None:
    weight, rhs = torch.linalg.qr(torch.randn(20, 20)).Q * torch.logspace(0, -4, 20), torch.randn(3, 20)
    expected = torch.linalg.solve(weight.double(), rhs.double().mT).mT.float()
    torch.testing.assert_close(regularized_solve(weight, rhs, 0.0), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("n", [3, 70])
def test_a_matrix_that_cannot_be_solved_is_named(n: int) -> None:
    weight, rhs = torch.eye(n).repeat(4, 1, 1), torch.ones(4, 2, n)
    weight[2, :, 1] = 0
    with pytest.raises(tpext.SingularError, match=r"regularized_solve: the Gram matrix of weight\[2\]"):
        regularized_solve(weight, rhs, 0.0)
    weight[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"regularized_solve: weight\[3\] has NaN"):
        regularized_solve(weight, rhs, 1.0)


@pytest.mark.parametrize(
    ("weight", "rhs", "reg", "message"),
    [
        (torch.ones(3), torch.ones(2, 3), 1.0, r"weight must be \[\.\.\., M, N\], got \[3\]"),
        (torch.ones(3, 2).half(), torch.ones(1, 3).half(), 1.0, "weight must be float32 or float64, got float16"),
        (torch.ones(3, 2), torch.ones(3), 1.0, r"rhs must be \[K, M=3\], got \[3\]"),
        (torch.ones(4, 3, 2), torch.ones(4, 5, 2), 1.0, r"rhs must be \[4, K, M=3\], got \[4, 5, 2\]"),
        (torch.ones(4, 3, 2), torch.ones(1, 5, 3), 1.0, r"rhs must be \[4, K, M=3\], got \[1, 5, 3\]"),
        (torch.ones(3, 2), torch.ones(5, 3).double(), 1.0, "rhs must be float32 as weight is, got float64"),
        (torch.ones(3, 2), torch.ones(5, 3, device="meta"), 1.0, "rhs must be on cpu as weight is, got meta"),
        (torch.ones(3, 2), torch.ones(5, 3), -1.0, "reg must be a finite number >= 0, got -1.0"),
    ],
    ids=str,
)
def test_a_solve_refuses_wrong_arguments(weight: Tensor, rhs: Tensor, reg: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"regularized_solve: {message}"):
        regularized_solve(weight, rhs, reg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3)}, r"weight must be \[\.\.\., M, N\], got \[3\]"),
        ({"weight": torch.zeros(2, 3, 4).half()}, "weight must be float32"),
        ({"weight": torch.zeros(2, 4, 3).mT}, "weight must be contiguous"),
        ({"rhs": torch.zeros(3)}, r"rhs must be \[batch=2, K=0, M=3\], got \[3\]"),
        ({"rhs": torch.zeros(5, 3)}, r"rhs must be \[batch=2, K=5, M=3\], got \[5, 3\]"),
        ({"rhs": torch.zeros(2, 5, 4)}, r"rhs must be \[batch=2, K=5, M=3\], got \[2, 5, 4\]"),
        ({"rhs": torch.zeros(2, 5, 3).double()}, "rhs must be float32, got float64"),
        ({"rhs": torch.zeros(2, 3, 5).mT}, "rhs must be contiguous"),
        ({"solution": torch.zeros(2, 5, 3)}, r"solution must be \[batch=2, K=5, N=4\], got \[2, 5, 3\]"),
        ({"solution": torch.zeros(2, 5, 4).double()}, "solution must be float32, got float64"),
        ({"status": torch.zeros(3).long()}, r"status must be \[batch=2\], got \[3\]"),
        ({"status": torch.zeros(2)}, "status must be int64, got float32"),
        ({"reg": -1.0}, "reg must be >= 0"),
        ({"execution": 0}, r"execution must lie in 1\.\.1024 threads on the CPU, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_kernel_of_the_solve_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "weight": torch.zeros(2, 3, 4),
        "rhs": torch.zeros(2, 5, 3),
        "reg": 1.0,
        "solution": torch.zeros(2, 5, 4),
        "status": torch.zeros(2).long(),
        "execution": 1,
    }
    with pytest.raises(ValueError, match=f"regularized_solve: {message}"):
        _C.regularized_solve(**arguments | change)


# The callables of tpext.ops, past torch's dispatcher.


# Each as a function of a weight and rows, and the op that it stands for.
CALLS = [
    (lambda w, y: tpext.ops.regularized_inverse(w, 0.5), lambda w, y: regularized_inverse(w, 0.5)),
    (lambda w, y: tpext.ops.regularized_solve(w, y, reg=0.5), lambda w, y: regularized_solve(w, y, 0.5)),
]


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2, 2, 70, 66)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_call_is_the_op(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, rhs = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-2], 3, shape[-2], dtype=dtype)
    for plain, op in CALLS:
        assert torch.equal(plain(weight, rhs), op(weight, rhs))
        parameter = torch.nn.Parameter(weight)
        with torch.no_grad():
            assert not plain(parameter, rhs).requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = plain(weight.bfloat16(), rhs.bfloat16())
        assert torch.equal(low.to(dtype), op(weight.bfloat16().float(), rhs.bfloat16().float()).to(dtype))
        plain(parameter, rhs).square().sum().backward()
        expected = torch.autograd.grad(op(parameter, rhs).square().sum(), parameter)[0]
        assert torch.equal(parameter.grad, expected)
    rows = rhs.requires_grad_()
    assert tpext.ops.regularized_solve(weight, rows, 1.0).requires_grad


def test_plain_calls_are_recorded_twice_compiled_and_faked() -> None:
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rhs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for plain, op in CALLS:
        assert torch.autograd.gradgradcheck(plain, (weight, rhs))
        torch._dynamo.reset()
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(weight, rhs), op(weight, rhs))
        assert plain(weight.detach().to("meta"), rhs.detach().to("meta")).is_meta
        with pytest.raises(ValueError, match="weight has NaN"):
            plain(torch.full_like(weight, torch.nan), rhs)


# On CUDA: sizes around the lanes of a small matrix, the groups of 32 rows and the width of a block, and beyond the
# kernel's greatest; tall, wide, and of one row or column.
CUDA_SHAPES = [
    *[(n, n) for n in (1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 95, 96, 97, 100, 112, 113, 127, 128)],
    *[(8, 1), (1, 8), (13, 5), (5, 13), (32, 20), (9, 32), (33, 8), (8, 33), (128, 1), (1, 128), (128, 64), (64, 128)],
    *[(100, 66), (66, 100), (128, 113), (113, 128), (129, 5), (20, 130), (150, 150)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_cuda_equals_the_oracle(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(2, *shape, dtype=torch.float64).to(dtype)
    check(weight, 1e-3, device)
    check(weight[0].mT.contiguous().mT, 1.0, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 0, 4), (2, 3, 5, 4), (70, 30, 30), (70, 10, 7), (33, 8, 8)], ids=str)
def test_cuda_takes_any_batch(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    if weight.numel() > 0:
        check(weight, 0.1, device)
    else:
        assert regularized_inverse(weight.to(device), 0.1).shape == (*shape[:-2], shape[-1], shape[-2])


@pytest.mark.parametrize("shape", [(8, 8), (12, 9), (20, 32), (70, 40), (100, 100), (66, 90)], ids=str)
def test_cuda_same_bits_for_a_batch_and_its_matrices_alone(device: torch.device, shape: tuple[int, int]) -> None:
    """Few matrices are split over several blocks each, many are not."""
    weight = torch.randn(40, *shape).to(device)
    together = regularized_inverse(weight, 1.0)
    assert torch.equal(regularized_inverse(weight, 1.0), together)
    for i in (0, 1, 17, 39):
        assert torch.equal(regularized_inverse(weight[i], 1.0), together[i])


def unusable(n: int, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """Eight matrices, and which of them have no inverse without a ridge."""
    weight = torch.randn(8, n, n, dtype=dtype) + 3 * n**0.5 * torch.eye(n, dtype=dtype)
    weight[1, -1, 0] = torch.nan
    weight[2, 0, -1] = torch.inf
    weight[4, :, n // 2] = 0
    if dtype == torch.float32:
        return weight, [1, 2, 4]
    weight[5] *= torch.finfo(dtype).max ** 0.75
    return weight, [1, 2, 4, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 16, 30, 60, 100, 130])
def test_cuda_failures_are_nan_and_harm_no_neighbour(device: torch.device, n: int, dtype: torch.dtype) -> None:
    weight, failing = unusable(n, dtype)
    inverse = regularized_inverse(weight.to(device), 0.0).cpu()
    usable = [i for i in range(len(weight)) if i not in failing]
    assert inverse[failing].isnan().all()
    expected = torch.linalg.inv(weight[usable].double()).to(dtype)
    torch.testing.assert_close(inverse[usable], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("n", [6, 40, 70, 140])
def test_cuda_raises_in_anomaly_mode_alone(device: torch.device, n: int) -> None:
    good = torch.eye(n, dtype=torch.float64).repeat(2, 2, 1, 1).to(device)
    singular, not_finite, overflowing = good.clone(), good.clone(), good.clone()
    singular[1, 0, :, 1] = 0
    not_finite[0, 1, 2, 2] = torch.inf
    not_finite[0, 0] = 0
    overflowing[1, 1] *= 1e200
    for weight in (good, singular, not_finite, overflowing):
        regularized_inverse(weight, 0.0)
    with torch.autograd.set_detect_anomaly(True):
        regularized_inverse(good, 0.0)
        with pytest.raises(tpext.SingularError, match=r"weight\[1, 0\] plus reg=0\.0 is singular"):
            regularized_inverse(singular, 0.0)
        with pytest.raises(ValueError, match=r"weight\[0, 1\] has NaN"):
            regularized_inverse(not_finite, 0.0)
        with pytest.raises(tpext.SingularError, match=r"weight\[1, 1\].*overflows"):
            regularized_inverse(overflowing, 0.0)


@pytest.mark.parametrize("n", [2, 65, 130])
def test_cuda_low_rank_fails_without_a_ridge_and_is_inverted_with_one(device: torch.device, n: int) -> None:
    weight = torch.randn(n, n - 1, dtype=torch.float64) @ torch.randn(n - 1, n, dtype=torch.float64)
    assert regularized_inverse(weight.to(device), 0.0).isnan().all()
    check(weight, 1e-2, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 2), (9, 4), (32, 32), (40, 70), (100, 100), (130, 130)], ids=str)
def test_cuda_equal_rows_fail_without_a_ridge(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = with_equal_rows(20, *shape, dtype)
    weight[7] = torch.randn(shape, dtype=dtype)
    solutions = regularized_solve(weight.to(device), torch.ones(20, 1, shape[0], dtype=dtype).to(device), 0.0)
    for result in (regularized_inverse(weight.to(device), 0.0), solutions):
        failed = result.isnan().all(-1).all(-1).cpu()
        assert not failed[7]
        assert failed.sum() == 19


def test_cuda_float32_without_a_ridge_is_inverted_in_float64(device: torch.device) -> None:
    scale = torch.logspace(0, -4, 20)
    weight = torch.linalg.qr(torch.randn(20, 20)).Q * scale
    expected = torch.linalg.inv(weight.double()).float()
    torch.testing.assert_close(regularized_inverse(weight.to(device), 0.0).cpu(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (2, 2, 2)], ids=str)
def test_cuda_true_first_and_second_derivatives(device: torch.device, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: regularized_inverse(w, 0.5), weight)
    assert torch.autograd.gradgradcheck(lambda w: regularized_inverse(w, 0.5), weight)


def test_cuda_a_failing_matrix_harms_no_neighbour_s_gradient(device: torch.device) -> None:
    weight = torch.randn(3, 4, 4, dtype=torch.float64) + 4 * torch.eye(4, dtype=torch.float64)
    weight[1, :, 2] = 0
    weight = weight.to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(regularized_inverse(weight, 0.0)[::2].sum(), weight)
    assert gradient[::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 8), (3, 12, 9), (20, 32), (2, 140, 60)], ids=str)
def test_cuda_solutions_equal_the_oracle(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for count in (1, 40):
        rhs = torch.randn(*shape[:-2], count, shape[-2], dtype=dtype)
        check_solve(torch.randn(shape, dtype=dtype), rhs, 0.1, device)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3)], ids=str)
def test_cuda_true_first_and_second_derivatives_of_solutions(device: torch.device, shape: tuple[int, int]) -> None:
    weight, rhs = torch.randn(shape, dtype=torch.float64), torch.randn(2, shape[0], dtype=torch.float64)
    inputs = weight.to(device).requires_grad_(), rhs.to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, y: regularized_solve(w, y, 0.5), inputs)
    assert torch.autograd.gradgradcheck(lambda w, y: regularized_solve(w, y, 0.5), inputs)


def test_cuda_a_failing_matrix_spoils_no_other_s_solution(device: torch.device) -> None:
    weight, failing = unusable(6, torch.float64)
    solution = regularized_solve(weight.to(device), torch.ones(8, 2, 6, dtype=torch.float64).to(device), 0.0).cpu()
    assert solution[failing].isnan().all()
    usable = [i for i in range(len(weight)) if i not in failing]
    assert solution[usable].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 8, 8), (100, 100), (300, 100, 90), (3, 200, 150)], ids=str)
def test_cuda_nothing_waits_and_a_graph_repeats_it(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, device="cuda")
    expected = regularized_inverse(weight, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        regularized_inverse(weight, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    fixed, graph = torch.zeros_like(weight), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inverse = regularized_inverse(fixed, 1.0)
    fixed.copy_(weight)
    graph.replay()
    assert torch.equal(inverse, expected)


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream_and_compiled() -> None:
    weight = torch.randn(3, 40, 40, device="cuda")
    expected = regularized_inverse(weight, 1.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inverse = regularized_inverse(weight * 1, 1.0)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(inverse, expected)
    compiled = torch.compile(lambda w: regularized_inverse(w, 1.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), expected)


def test_plain_calls_are_seen_by_tracers() -> None:
    """A traced function computes anew: where a tracer records, a call past the dispatcher would be lost."""
    for op in (tpext.ops.regularized_inverse, torch.ops.tpext.regularized_inverse):
        traced = torch.jit.trace(lambda w, op=op: op(w, 1.0) + 1, torch.randn(4, 3), check_trace=False)
        weight = torch.randn(4, 3)
        torch.testing.assert_close(traced(weight), op(weight, 1.0) + 1)
    graph = torch.fx.symbolic_trace(lambda w: tpext.ops.regularized_inverse(w, 1.0))
    torch.testing.assert_close(graph(weight), tpext.ops.regularized_inverse(weight, 1.0))


def test_plain_calls_refuse_what_the_op_refuses() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)) as error:
        tpext.ops.regularized_inverse(torch.eye(3).to_sparse(), 1.0)
    assert "tpext::regularized_inverse" in str(error.value)
