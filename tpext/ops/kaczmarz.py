"""``kaczmarz_step``: direct weight solves, layers that are set to their targets by projections.

A linear layer ``y = x W' + b`` is given a target ``y' = y + d`` of its output. It moves its input, then takes for each
sample the least change of its weights that gives the moved input the target, and averages these over the batch::

    x'  = x + dx(d)           "mean"         dx = d W / M
                              "wnorm"        dx = (1/M) sum_k d_k w_k / ||w_k||^2, w_k the rows of W; of a zero row 0
                              "regularized"  dx = d (WW' + dx_reg I)^-1 W
    x'' = feasible(x')        what the units below can put out that is like x'; x'' = x where the input is data
    r   = d - (x'' - x) W'    y' - (x'' W' + b): what is left to the weights
    dW  = relaxation (1/B) sum_i r_i' x''_i / (||x''_i||^2 + 1 + damping),   db the same with 1 for x''       "average"
    [dW db] = relaxation R' (X X' + batch_reg I)^-1 X,   X = [x'' 1], the whole batch at once                   "exact"

without the ones in a layer without bias. "average" is normalised least mean squares (Kaczmarz's projection for ``B =
1``, Cimmino's averaged ones above); a sample with ``X = 0`` asks for nothing. Of ``k`` micro-batches, accumulated
gradients are the sum of ``k`` updates: ``k`` times the averaged one. With ``B = 1``, ``relaxation = 1`` and ``damping =
0`` the layer then maps ``x''`` to ``y'`` to rounding, and so it does any batch of linearly independent rows with
"exact" and ``batch_reg = 0``. The layer below gets ``x''`` for its target. ``keep_norm`` brings ``x''`` to the norm of
``x``, and ``sticky`` weighs the change of each weight: equations in :class:`tpext.Kaczmarz`.

Every update is three products, and nothing of size ``B x M x N`` is formed. That is ``first="input"``; with
``"weights"`` (the published second version) the weights are solved for first, by the input as it is, ``x'' = x``, then
the input is moved by the updated weights for what is left of ``d``.

Source: ASFaust, "SLMfun", ``experiments/targetprop`` and ``experiments/targetprop2`` (``first="weights"``).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    are_plain,
    check_choice,
    check_like,
    check_tensor,
    dense,
    dtype_name,
    full_precision,
    is_number,
    on_cuda,
)
from tpext.ops.regularized_inverse import SingularError, regularized_inverse, regularized_solve
from tpext.ops.units import Units

Move = Literal["mean", "wnorm", "regularized"]
Update = Literal["average", "exact"]
First = Literal["input", "weights"]


def check_numbers(op: str, **numbers: object) -> None:
    """Raise ValueError for one out of its range, by its name."""
    for name, value in numbers.items():
        if not (is_number(value) and (0 < value < 2 if name == "relaxation" else 0 <= value < math.inf)):
            expected = "> 0 and < 2" if name == "relaxation" else ">= 0"
            raise ValueError(f"{op}: {name} must be a finite number {expected}, got {value!r}")


class KaczmarzStep(NamedTuple):
    """What a layer is to become: ``weight`` ``dW [M, N]``, ``bias`` ``db [M]`` or None, ``input`` ``x'' [..., N]``."""

    weight: Tensor
    bias: Tensor | None
    input: Tensor


def kaczmarz_step(
    displacement: Tensor,
    input: Tensor,
    weight: Tensor,
    has_bias: bool = True,
    units: Units | None = None,
    *,
    relaxation: float = 1.0,
    damping: float = 0.0,
    dx: Move = "mean",
    dx_reg: float = 1.0,
    update: Update = "average",
    batch_reg: float = 0.0,
    first: First = "input",
    sticky: float = 0.0,
    keep_norm: bool = False,
) -> KaczmarzStep:
    """The update of a linear layer for a displacement of its output, and the target of its input (the module's head).

    Args:
        displacement: ``d = y' - y``, ``[..., M]``.
        input: ``x``, ``[..., N]``, float32 or float64; the leading dimensions are the batch.
        weight: ``W``, ``[M, N]``.
        has_bias: whether the layer has one.
        units: what made the input; None: it is data, and stays.
        relaxation, damping, dx, dx_reg, update, batch_reg, first, sticky, keep_norm: as in :class:`tpext.Kaczmarz`.

    Returns:
        ``dW``, ``db`` (None without a bias) and ``x''``. They are detached.

    Raises:
        ValueError: a wrong shape, dtype, device, number or choice; the message names the argument. SingularError:
        ``batch_reg`` or ``dx_reg`` is 0 and the rows ``[x'' 1]``, or those of ``W``, are linearly dependent.

    Cost: ``6 B M N`` operations, ``2 B M N`` where the input is data; "regularized" and "exact" beside that an inverse,
    ``k^2 (3 m + k / 3)`` with ``k`` and ``m`` the smaller and the larger size of ``W`` or ``X``. On the CPU one kernel
    call for "average", units of which each stands alone, ``dx`` "mean" or "wnorm", ``first="input"`` and neither
    ``sticky`` nor ``keep_norm``; for the rest, and elsewhere, torch operations.

    >>> x, weight, d = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.tensor([[3.0]])
    >>> kaczmarz_step(d, x, weight).weight
    tensor([[0.5000, 1.0000]])
    """
    check_tensor("kaczmarz_step", "displacement", displacement, "[..., M]")
    check_tensor("kaczmarz_step", "input", input, "[..., N]")
    check_tensor("kaczmarz_step", "weight", weight, "[M, N]")
    _check_step(displacement, input, weight)
    check_numbers(
        "kaczmarz_step", relaxation=relaxation, damping=damping, dx_reg=dx_reg, batch_reg=batch_reg, sticky=sticky
    )
    for name, choice, choices in (("dx", dx, Move), ("update", update, Update), ("first", first, First)):
        check_choice("kaczmarz_step", name, choice, get_args(choices))
    check_options("kaczmarz_step", update, sticky, keep_norm, units)
    d, x = displacement, input
    if x.dim() != 2:
        d, x = d.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    has_kernel = (update == "average" and sticky == 0) and (
        units is None or (units.name in _RECTIFIES and dx != "regularized" and first == "input" and not keep_norm)
    )
    if has_kernel and not on_cuda(x) and d.numel() > 0 and x.numel() > 0 and are_plain((d, x, weight)):
        step = _step(d, x, weight, has_bias, units, relaxation, damping, dx)
    else:
        with torch.no_grad(), full_precision(input.device.type):
            step = _step_by_torch(
                d,
                x,
                weight,
                has_bias,
                units,
                relaxation,
                damping,
                dx,
                dx_reg,
                update,
                batch_reg,
                first,
                sticky,
                keep_norm,
            )
    return step if input.dim() == 2 else step._replace(input=step.input.view_as(input))


# Units whose output for a number depends on that number alone, and whether it is never negative.
_RECTIFIES = {"identity": False, "doubled_relu": False, "relu": True}


def _step(
    d: Tensor,
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    units: Units | None,
    relaxation: float,
    damping: float,
    dx: Move,
) -> KaczmarzStep:
    grown = torch.empty_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
    db = x.new_empty(weight.shape[0]) if has_bias else None
    moved = None if units is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.kaczmarz_step(
        dense(d),
        dense(x),
        dense(weight),
        dx if units is not None else "mean",
        units is not None and _RECTIFIES[units.name],
        relaxation,
        damping,
        dense(grown),
        dense(db),
        dense(moved),
        torch.get_num_threads(),
    )
    return KaczmarzStep(grown, db, x.detach() if moved is None else moved)


def _step_by_torch(
    d: Tensor,
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    units: Units | None,
    relaxation: float,
    damping: float,
    dx: Move,
    dx_reg: float,
    update: Update,
    batch_reg: float,
    first: First,
    sticky: float = 0.0,
    keep_norm: bool = False,
) -> KaczmarzStep:
    """What the kernel does, and the choices that it lacks."""
    ease = _ease(weight, sticky) if sticky > 0 else None
    if units is None:
        return KaczmarzStep(*_solve(d, x, has_bias, relaxation, damping, update, batch_reg, ease), x.detach())
    if first == "weights":
        grown, db = _solve(d, x, has_bias, relaxation, damping, update, batch_reg, ease)
        left = torch.addmm(d if db is None else d - db, x, grown.mT, alpha=-1)
        moved = units.feasible(_moved(x, left, weight + grown, dx, dx_reg))
        return KaczmarzStep(grown, db, _of_norm(moved, x) if keep_norm else moved)
    moved = units.feasible(_moved(x, d, weight, dx, dx_reg))
    if keep_norm:
        moved = _of_norm(moved, x)
    residual = torch.addmm(d, moved - x, weight.mT, alpha=-1)
    return KaczmarzStep(*_solve(residual, moved, has_bias, relaxation, damping, update, batch_reg, ease), moved)


def _of_norm(input: Tensor, like: Tensor) -> Tensor:
    """``input`` with the norms of the rows of ``like``; zero rows stay."""
    norms = torch.linalg.vector_norm(like, dim=-1, keepdim=True)
    scaled: Tensor = input * (norms * _reciprocal(torch.linalg.vector_norm(input, dim=-1, keepdim=True)))
    return scaled


def _ease(weight: Tensor, sticky: float) -> Tensor:
    """``1 / s [M, N]``."""
    size = weight.abs()
    return (1 + sticky * size * _reciprocal(size.mean(-1, keepdim=True))).reciprocal()


def _moved(x: Tensor, d: Tensor, weight: Tensor, dx: Move, dx_reg: float) -> Tensor:
    """``x'``."""
    if dx == "regularized":
        try:
            return torch.addmm(x, d, regularized_inverse(weight, dx_reg).mT)
        except SingularError as error:
            raise SingularError(
                f"kaczmarz_step: weight is not of full rank to the precision of {dtype_name(x.dtype)}, or overflows "
                f"it, with dx='regularized' and dx_reg={dx_reg}; use a larger dx_reg"
            ) from error
    if dx == "wnorm":
        d = d * _reciprocal(weight.square().sum(-1))
    return torch.addmm(x, d, weight, alpha=1 / max(1, weight.shape[0]))


def _solve(
    residual: Tensor,
    x: Tensor,
    has_bias: bool,
    relaxation: float,
    damping: float,
    update: Update,
    batch_reg: float,
    ease: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``dW`` and ``db``."""
    if update == "exact":
        rows = torch.cat([x, x.new_ones(len(x), 1)], 1) if has_bias else x
        try:
            solution = regularized_solve(rows, residual.mT.contiguous(), batch_reg) * relaxation
        except SingularError as error:
            raise SingularError(
                f"kaczmarz_step: the batch's rows {'[x 1]' if has_bias else 'x'} are not of full rank to the precision "
                f"of {dtype_name(x.dtype)}, or overflow it, with update='exact' and batch_reg={batch_reg}; use a "
                "larger batch_reg"
            ) from error
        return (solution[:, :-1], solution[:, -1]) if has_bias else (solution, None)
    norms = x.square().sum(-1, keepdim=True) if ease is None else x.square() @ ease.mT
    step = residual * (_reciprocal(norms + (float(has_bias) + damping)) * (relaxation / max(1, x.shape[0])))
    grown = step.mT @ x
    return grown if ease is None else grown * ease, step.sum(0) if has_bias else None


def _reciprocal(norms: Tensor) -> Tensor:
    """``1 / n``; of zero, zero: what has no length asks for nothing."""
    reciprocal: Tensor = torch.where(norms == 0, 0.0, norms.reciprocal())
    return reciprocal


def check_options(where: str, update: str, sticky: float, keep_norm: object, units: Units | None) -> None:
    """Raise ValueError for ``sticky`` or ``keep_norm`` where they have no meaning."""
    if not isinstance(keep_norm, bool):
        raise ValueError(f"{where}: keep_norm must be True or False, got {keep_norm!r}")
    if sticky > 0 and update != "average":
        raise ValueError(f"{where}: sticky must be 0 with update={update!r}, got {sticky!r}")
    if keep_norm and units is not None and units.name in ("n_hot", "binary"):
        raise ValueError(
            f"{where}: keep_norm must be False for an input of {units.name} units, ones and zeros, got True"
        )


def _check_step(displacement: Tensor, input: Tensor, weight: Tensor) -> None:
    op = "kaczmarz_step"
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [M, N], got {list(weight.shape)}")
    if input.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: input must be float32 or float64, got {dtype_name(input.dtype)}")
    outputs, inputs = weight.shape
    if input.dim() == 0 or input.shape[-1] != inputs:
        raise ValueError(f"{op}: input must be [..., N={inputs}], got {list(input.shape)}")
    check_like(op, "weight", weight, input, (outputs, inputs))
    check_like(op, "displacement", displacement, input, (*input.shape[:-1], outputs))
