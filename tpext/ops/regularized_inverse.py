"""``regularized_inverse``: ridge inverses of a batch of matrices.

``torch.ops.tpext.regularized_inverse(weight, reg)`` maps ``W [..., M, N]`` to ``R = (W'W + reg I)^-1 W' = W'(WW' +
reg I)^-1  [..., N, M]``, the map ``y -> argmin_x ||W x - y||^2 + reg ||x||^2``, by a Cholesky factorisation of the
smaller Gram matrix. ``reg`` is one number for all matrices, or one for each (as many as the product of the leading
sizes, in their order): a matrix gets the bits that it gets alone with its number. Float32 or float64; low precision is
computed in float32 under autocast. Exact: it has first and second derivatives. Cost: ``k^2 (3 m + k / 3)`` operations a
matrix, ``k = min(M, N)``, ``m = max(M, N)``; the result is bitwise the same on any number of threads.

The Gram matrix squares the condition number: the relative error is some ``eps (s_max^2 + reg) / (s_min^2 + reg)`` with
the extreme singular values of ``W``, so a small ``reg`` and nearly singular weights ask for float64. Without
regularisation (``reg = 0``) float32 weights are inverted in float64, and a matrix counts as singular if the trace of
``R W`` (or ``W R``), which is ``k``, comes out different by more than 0.1: that of a singular matrix falls short by 1,
however its pivots were rounded, and that of another by about the relative error of ``R``. It costs ``k^2 m`` operations
more.

On CUDA a kernel inverts all matrices with ``max(M, N) <= 128`` in one launch, each with the same bits in any batch; for
larger ones it is torch's factorisation and triangular solves, in whatever precision torch's products are set to
(TF32 is the caller's choice). Where ridges differ the matrices go one by one. Nothing waits for the device, so that an
inverse can be captured in a CUDA graph, and failures do not raise: the inverse of a matrix that has none is NaN, the
others are as they would be without it. To have the errors below raised on CUDA too, which waits for the device, switch
on torch's anomaly mode (``torch.autograd.set_detect_anomaly``).

Many small matrices (``k <= 48``, ``m <= 128``) are inverted together, one in each lane of the vector registers, to the
bits that each gives alone. A matrix without an inverse fails the call but spoils no other.

``torch.ops.tpext.regularized_solve(weight, rhs, reg)`` applies the inverse to rows: ``X = Y R' = Y W (W'W + reg I)^-1
[..., K, N]`` for ``Y [..., K, M]``, each row of ``X`` the ``argmin_x ||W x - y||^2 + reg ||x||^2`` of its row of ``Y``.
``weight`` and ``rhs`` have the same leading dimensions. On the CPU, with ``K <= m``, ``R`` is not formed: one
factorisation, two substitutions a row, ``k^2 (m + k / 3) + 2 K k (m + k)`` operations, each matrix with the same bits
on any number of threads and, of finite rows, in any place of any batch. Elsewhere it is a product with ``R``, by torch.
NaN or infinity in a row of ``rhs`` stays in that row. Exact as well, with first and second derivatives.

:func:`regularized_inverse` and :func:`regularized_solve` are the same ops for a plain call, past torch's dispatcher.

Raises:
    ValueError: ``weight`` has NaN or infinite elements (the message says which matrix), a wrong rank or dtype;
    ``rhs`` does not fit it; ``reg`` < 0. SingularError: a Gram matrix plus ``reg`` is singular to working precision, or
    overflows (the message says which).

Source: Roulet and Harchaoui, "Target Propagation via Regularized Inversion" (2021), section 3: the inverse of the
linear part of a recurrent layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    LIBRARY,
    check_tensor,
    define,
    dense,
    dtype_name,
    execution,
    full_precision,
    on_cuda,
    refuse_forward_mode,
)
from tpext.ops._members import Numbers, as_list, differ, numbers_of

# The kernel's status of a matrix whose elements are not finite (csrc/core/regularized_inverse.h).
_NOT_FINITE = 1
_SINGULAR = 2

# By how much the trace of the product of a matrix and its inverse without a ridge may differ from its rank (likewise).
_GREATEST_LOSS = 0.1

# The greatest M and N of the CUDA kernel (csrc/cuda/kernels.h).
_LARGEST_ON_CUDA = 128


class SingularError(torch.linalg.LinAlgError):  # type: ignore[name-defined,misc]
    """A matrix whose inverse was asked for is singular to working precision; the message says which of the batch."""


def _check(weight: Tensor, reg: Numbers, op: str = "regularized_inverse") -> list[float]:
    """Raise ValueError unless matrices and ridges are such as have an inverse; return the ridges, 1 or one each."""
    refuse_forward_mode(op)
    if weight.dim() < 2:
        raise ValueError(f"{op}: weight must be [..., M, N], got {list(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.float64):
        dtype = dtype_name(weight.dtype)
        raise ValueError(f"{op}: weight must be float32 or float64, got {dtype}")
    regs = numbers_of(op, "reg", reg, math.prod(weight.shape[:-2]), "batch")
    for one in regs:
        if not (0 <= one < math.inf):
            raise ValueError(f"{op}: reg must be a finite number >= 0, got {one}")
    return regs


def _first(failed: Tensor) -> str:
    """The first failing matrix of a batch, for an error message."""
    if failed.dim() == 0:
        return "weight"
    index = failed.nonzero()[0].tolist()
    return f"weight{index}" if len(index) > 1 else f"weight[{index[0]}]"


def _regularized_inverse(weight: Tensor, reg: Numbers, op: str = "regularized_inverse") -> Tensor:
    regs = _check(weight, reg, op)
    inverse, status = _invert(weight, regs)
    if status is not None:
        _raise_error(status, weight.dtype, regs, op)
    return inverse


def _invert(weight: Tensor, regs: list[float]) -> tuple[Tensor, Tensor | None]:
    """The inverses and, if one of them has failed and that is to raise, the status of each matrix."""
    *batch, rows, columns = weight.shape
    in_double = weight.dtype == torch.float32 and 0 in regs
    if differ(regs) and (in_double or on_cuda(weight)):
        return _invert_each(weight, regs)
    if in_double:
        inverse, status = _invert(weight.double(), regs)
        return inverse.float(), status
    inverse = weight.new_empty(*batch, columns, rows)
    if not on_cuda(weight):
        threads = torch.get_num_threads()
        if not _C.regularized_inverse(dense(weight), regs, dense(inverse), None, threads):
            return inverse, None
        # once more, to learn which
        status = weight.new_empty(batch, dtype=torch.int64)
        _C.regularized_inverse(dense(weight), regs, dense(inverse), dense(status.view(-1)), threads)
        return inverse, status
    if inverse.numel() == 0:
        return inverse, None
    reg = regs[0]
    if max(rows, columns) > _LARGEST_ON_CUDA:
        with full_precision(weight.device.type):
            status = _invert_by_torch(weight, reg, inverse)
    else:
        status = weight.new_empty(batch, dtype=torch.int64)
        _C.regularized_inverse(dense(weight), [reg], dense(inverse), dense(status.view(-1)), execution(weight))
    if reg == 0:
        status = _refuse_low_rank(weight, inverse, status)
    # Only the device knows of failures.
    return inverse, status if torch.is_anomaly_enabled() and bool(status.any()) else None


def _invert_each(weight: Tensor, regs: list[float]) -> tuple[Tensor, Tensor | None]:
    """The same, one matrix after another."""
    *batch, rows, columns = weight.shape
    found = [
        _invert(*one)
        for one in zip(torch.split(weight.reshape(-1, rows, columns), 1), [[r] for r in regs], strict=True)
    ]
    inverse = torch.cat([inverse for inverse, _ in found]).view(*batch, columns, rows)
    if all(status is None for _, status in found):
        return inverse, None
    fine = weight.new_zeros(1, dtype=torch.int64)
    return inverse, torch.cat([fine if status is None else status for _, status in found]).view(batch)


def _invert_by_torch(weight: Tensor, reg: float, inverse: Tensor) -> Tensor:
    """What the CUDA kernel does, for matrices of any size. Returns the status of each matrix."""
    factor, info = torch.linalg.cholesky_ex(_gram(weight, reg))
    wide = weight.shape[-2] < weight.shape[-1]
    solution = _solve(factor, weight if wide else weight.mT)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    # Comparisons are written to fail for NaN.
    regular = (info == 0) & ((pivots > 0) & (pivots <= torch.finfo(weight.dtype).max)).all(-1)
    inverse.copy_(torch.where(regular[..., None, None], solution.mT if wide else solution, math.nan))
    status = torch.where(weight.isfinite().all(-1).all(-1), _SINGULAR, _NOT_FINITE)
    return torch.where(regular, 0, status)


def _refuse_low_rank(weight: Tensor, inverse: Tensor, status: Tensor) -> Tensor:
    """Fill the inverses without a ridge that lost a dimension with NaN. Returns the status of each matrix."""
    loss = min(weight.shape[-2:]) - (inverse * weight.mT).sum((-2, -1))
    low_rank = loss.abs() > _GREATEST_LOSS
    inverse.masked_fill_(low_rank[..., None, None], math.nan)
    return torch.where((status == 0) & low_rank, _SINGULAR, status)


def _gram(weight: Tensor, *regs: float) -> Tensor:
    """The smaller of ``W'W + reg I`` and ``WW' + reg I``, with one ridge for all matrices or one for each."""
    rows, columns = weight.shape[-2:]
    identity = torch.eye(min(rows, columns), dtype=weight.dtype, device=weight.device)
    ridge = regs[0] if len(regs) == 1 else weight.new_tensor(regs).view(*weight.shape[:-2], 1, 1)
    return (weight.mT @ weight if columns <= rows else weight @ weight.mT) + ridge * identity


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """``(L L')^-1 right``. Not ``torch.cholesky_solve``, which waits for the device."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution


def _raise_error(status: Tensor, dtype: torch.dtype, regs: list[float], op: str) -> None:
    """Raise the error that the kernel's status of each matrix stands for."""
    unusable = status == _NOT_FINITE
    if unusable.any():
        raise ValueError(f"{op}: {_first(unusable)} has NaN or infinite elements")
    failed = status != 0
    reg = regs[int(failed.view(-1).nonzero()[0]) if len(regs) > 1 else 0]
    raise SingularError(
        f"{op}: the Gram matrix of {_first(failed)} plus reg={reg} is singular to the precision of "
        f"{dtype_name(torch.float64 if reg == 0 else dtype)}, or overflows it; use a larger reg or smaller weights"
    )


def _fake(weight: Tensor, reg: Numbers) -> Tensor:
    _check(weight, reg)
    return weight.new_empty(*weight.shape[:-2], weight.shape[-1], weight.shape[-2])


def _setup_context(ctx: Any, inputs: tuple[Tensor, list[float]], output: Tensor) -> None:
    weight, ctx.reg = inputs
    ctx.save_for_backward(weight, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    # Differentiable torch operations, so that the second derivative comes by itself. With G = dL/dR:
    #   R = A^-1 W', A = W'W + rI, K = A^-1 G:  dL/dW = K' - W R K' - W K R'
    #   R = W' B^-1, B = WW' + rI, K = G B^-1:  dL/dW = K' - R' K W - K' R W
    weight, inverse = ctx.saved_tensors
    dtype = weight.dtype
    if 0 in ctx.reg:
        weight, inverse, grad = weight.double(), inverse.double(), grad.double()
    # A matrix that failed on CUDA has a gradient of NaN by its inverse.
    factor = torch.linalg.cholesky_ex(_gram(weight, *ctx.reg), check_errors=not on_cuda(weight)).L
    if weight.shape[-1] <= weight.shape[-2]:
        k = _solve(factor, grad)
        return (k.mT - weight @ (inverse @ k.mT + k @ inverse.mT)).to(dtype), None
    k_transposed = _solve(factor, grad.mT)
    return (k_transposed - (inverse.mT @ k_transposed.mT + k_transposed @ inverse) @ weight).to(dtype), None


_inverse = define(
    "regularized_inverse(Tensor weight, float[1] reg) -> Tensor", _regularized_inverse, _fake, cast_outputs=False
)
torch.library.register_autograd("tpext::regularized_inverse", _backward, setup_context=_setup_context, lib=LIBRARY)


def _check_solve(weight: Tensor, rhs: Tensor, reg: float) -> None:
    _check(weight, reg, "regularized_solve")
    batch, rows = weight.shape[:-2], weight.shape[-2]
    if rhs.dim() != weight.dim() or rhs.shape[:-2] != batch or rhs.shape[-1] != rows:
        expected = "".join(f"{size}, " for size in batch)
        raise ValueError(f"regularized_solve: rhs must be [{expected}K, M={rows}], got {list(rhs.shape)}")
    if rhs.dtype != weight.dtype:
        dtypes = [dtype_name(tensor.dtype) for tensor in (weight, rhs)]
        raise ValueError(f"regularized_solve: rhs must be {dtypes[0]} as weight is, got {dtypes[1]}")
    if rhs.device != weight.device:
        raise ValueError(f"regularized_solve: rhs must be on {weight.device} as weight is, got {rhs.device}")


def _regularized_solve(weight: Tensor, rhs: Tensor, reg: float) -> Tensor:
    _check_solve(weight, rhs, reg)
    if reg == 0 and weight.dtype == torch.float32:
        return _regularized_solve(weight.double(), rhs.double(), reg).float()
    *batch, rows, columns = weight.shape
    count = rhs.shape[-2]
    # Counting operations: a substitution for every row, or for the max(M, N) of the inverse.
    if on_cuda(weight) or count > max(rows, columns):
        return rhs @ _regularized_inverse(weight, reg, "regularized_solve").mT
    solution = weight.new_empty(*batch, count, columns)
    if weight.numel() == 0 or rhs.numel() == 0:
        return solution.zero_()
    threads = torch.get_num_threads()
    if _C.regularized_solve(dense(weight), dense(rhs), reg, dense(solution), None, threads):
        status = weight.new_empty(batch, dtype=torch.int64)
        _C.regularized_solve(dense(weight), dense(rhs), reg, dense(solution), dense(status.view(-1)), threads)
        _raise_error(status, weight.dtype, [reg], "regularized_solve")
    return solution


def _fake_solve(weight: Tensor, rhs: Tensor, reg: float) -> Tensor:
    _check_solve(weight, rhs, reg)
    return rhs.new_empty(*rhs.shape[:-1], weight.shape[-1])


def _setup_solve_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    weight, rhs, ctx.reg = inputs
    ctx.save_for_backward(weight, rhs, output)


def _solve_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    # Of the equation X A = Y W, with G = dL/dX, dL/dY = G R and A, B as above:
    #   S = G A^-1:  dL/dY = S W',       dL/dW = (Y - X W')' S - (dL/dY)' X
    #   V = Y B^-1:  dL/dY = G W' B^-1,  dL/dW = V' (G - dL/dY W) - (dL/dY)' X
    # The second is the first by Y - X W' = r V and G - dL/dY W = r S, and holds for r = 0 too.
    weight, rhs, solution = ctx.saved_tensors
    dtype = weight.dtype
    if ctx.reg == 0:
        weight, rhs, solution, grad = weight.double(), rhs.double(), solution.double(), grad.double()
    factor = torch.linalg.cholesky_ex(_gram(weight, ctx.reg), check_errors=not on_cuda(weight)).L
    if weight.shape[-1] <= weight.shape[-2]:
        s = _solve(factor, grad.mT).mT
        grad_rhs = s @ weight.mT
        grad_weight = (rhs - solution @ weight.mT).mT @ s - grad_rhs.mT @ solution
    else:
        v = _solve(factor, rhs.mT).mT
        grad_rhs = _solve(factor, weight @ grad.mT).mT
        grad_weight = v.mT @ (grad - grad_rhs @ weight) - grad_rhs.mT @ solution
    return grad_weight.to(dtype), grad_rhs.to(dtype), None


_solution = define(
    "regularized_solve(Tensor weight, Tensor rhs, float reg) -> Tensor",
    _regularized_solve,
    _fake_solve,
    cast_outputs=False,
)
torch.library.register_autograd(
    "tpext::regularized_solve", _solve_backward, setup_context=_setup_solve_context, lib=LIBRARY
)


def regularized_inverse(weight: Tensor, reg: float | Sequence[float]) -> Tensor:
    """The ridge inverse of each matrix of a batch: ``R = (W'W + reg I)^-1 W' = W' (WW' + reg I)^-1``.

    The op ``torch.ops.tpext.regularized_inverse``, past torch's dispatcher where nothing but the kernel has to see the
    call: derivatives, autocast and compilation work as with the op.

    Args:
        weight: ``W [..., M, N]``, float32 or float64.
        reg: >= 0, of all matrices; or a list or tuple with one for each, in the order of the leading sizes.

    Returns:
        ``R [..., N, M]``.

    Raises:
        ValueError: NaN or infinite elements, a wrong rank or dtype, ``reg`` out of range. SingularError: a matrix is
        singular to working precision, or overflows; the message says which. (The module's head: on CUDA.)

    Cost: ``k^2 (3 m + k / 3)`` operations a matrix, ``k = min(M, N)``, ``m = max(M, N)``.

    Source: Roulet and Harchaoui (2021), section 3.

    >>> import torch, tpext
    >>> tpext.ops.regularized_inverse(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 1.0)
    tensor([[0.4000, 0.0000],
            [0.0000, 0.5000]])
    """
    check_tensor("regularized_inverse", "weight", weight, "[..., M, N]")
    return _inverse(weight, as_list(reg))  # type: ignore[no-any-return]


def regularized_solve(weight: Tensor, rhs: Tensor, reg: float) -> Tensor:
    """The ridge inverse applied to rows: ``X = Y R' = Y W (W'W + reg I)^-1``.

    Each row of ``X`` is the ``argmin_x ||W x - y||^2 + reg ||x||^2`` of its row of ``Y``. The op
    ``torch.ops.tpext.regularized_solve``, as :func:`regularized_inverse` is the other.

    Args:
        weight: ``W [..., M, N]``, float32 or float64.
        rhs: ``Y [..., K, M]``, with the leading dimensions and the dtype of ``weight``.
        reg: >= 0.

    Returns:
        ``X [..., K, N]``.

    Raises:
        ValueError, SingularError: as :func:`regularized_inverse`; ``rhs`` does not fit ``weight``.

    Cost: ``k^2 (m + k / 3) + 2 K k (m + k)`` operations a matrix, ``k = min(M, N)``, ``m = max(M, N)``; for ``K > m``
    the inverse and a product, ``k^2 (3 m + k / 3) + 2 K k m``.

    Source: Roulet and Harchaoui (2021), section 3.

    >>> import torch, tpext
    >>> tpext.ops.regularized_solve(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.ones(1, 2), 1.0)
    tensor([[0.4000, 0.5000]])
    """
    check_tensor("regularized_solve", "weight", weight, "[..., M, N]")
    check_tensor("regularized_solve", "rhs", rhs, "[..., K, M]")
    return _solution(weight, rhs, reg)  # type: ignore[no-any-return]
