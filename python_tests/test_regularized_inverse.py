"""regularized_inverse: equal to the oracle, the same to the bit on any threads, differentiable twice, clear errors.

Tests that take ``device`` run on a GPU, and on the CPU by the emulation of the CUDA kernels.
"""

from __future__ import annotations

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

regularized_inverse = torch.ops.tpext.regularized_inverse

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
    assert _C.regularized_inverse(weight, 0.0, inverse, status, threads) == 4
    assert status.tolist() == [0, 1, 1, 0, 2, 2, 0]
    assert (inverse[status != 0] == 7).all(), "the inverse of a matrix that has none is left as it was"
    alone, usable = torch.empty_like(weight[:1]), torch.zeros(1, dtype=torch.int64)
    for i in (0, 3, 6):
        assert _C.regularized_inverse(weight[i : i + 1], 0.0, alone, usable, 1) == 0
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


def test_overflow_is_refused() -> None:
    with pytest.raises(tpext.SingularError, match="overflows"):
        regularized_inverse(torch.full((3, 3), 1e30), 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 4)}, r"weight must be \[batch, M, N\], got \[3, 4\]"),
        ({"weight": torch.zeros(2, 3, 4).half()}, "weight must be float32"),
        ({"weight": torch.zeros(2, 4, 3).mT}, "weight must be contiguous"),
        ({"inverse": torch.zeros(2, 3, 4)}, r"inverse must be \[batch=2, N=4, M=3\], got \[2, 3, 4\]"),
        ({"inverse": torch.zeros(2, 4, 3).double()}, "inverse must be float32, got float64"),
        ({"status": torch.zeros(3).long()}, r"status must be \[batch=2\], got \[3\]"),
        ({"status": torch.zeros(2)}, "status must be int64, got float32"),
        ({"reg": -1.0}, "reg must be >= 0"),
        ({"reg": float("nan")}, "reg must be >= 0"),
        ({"execution": 0}, r"execution must lie in 1\.\.1024 threads on the CPU, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_kernel_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "weight": torch.zeros(2, 3, 4),
        "reg": 1.0,
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
