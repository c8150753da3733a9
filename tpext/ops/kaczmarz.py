"""``kaczmarz_step``, ``kaczmarz_train``: direct weight solves, layers that are set to their targets by projections.

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

``torch.ops.tpext.kaczmarz_train(input, labels, weights, biases, relaxation, damping, dx, dx_reg, output)`` runs one
pass of such updates with ``B = 1`` over samples ``input [K, N]``, ``labels [K]`` int64, through all layers of a network
with relu between them, each sample seeing the weights that the one before left. ``weights`` (``[M, N]`` each) and
``biases`` (``[M]`` each, or an empty list) change in place; it returns the class predicted for each sample before its
update, ``[K]`` int64. ``output`` is the rule of :func:`hot_target`. On the CPU one kernel call, the weights in the
cache throughout, float32 or float64; elsewhere layer by layer with torch operations.

Source: ASFaust, "SLMfun", ``experiments/targetprop`` and ``experiments/targetprop2`` (``first="weights"``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    are_plain,
    check_choice,
    check_like,
    check_tensor,
    define,
    dense,
    dtype_name,
    full_precision,
    is_number,
    on_cuda,
    refuse_forward_mode,
)
from tpext.ops.regularized_inverse import SingularError, regularized_inverse, regularized_solve
from tpext.ops.units import Output, Units, hot_target

Move = Literal["mean", "wnorm", "regularized"]
Update = Literal["average", "exact"]
First = Literal["input", "weights"]


def _check_number(op: str, name: str, value: object) -> None:
    if is_number(value) and (0 < value < 2 if name == "relaxation" else 0 <= value < math.inf):
        return
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
    numbers = {"relaxation": relaxation, "damping": damping, "dx_reg": dx_reg, "batch_reg": batch_reg, "sticky": sticky}
    for name, value in numbers.items():
        _check_number("kaczmarz_step", name, value)
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


def _detached(name: str, tensors: Sequence[Tensor], shape: str) -> list[Tensor]:
    op = "kaczmarz_train"
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"{op}: {name} must be a sequence of tensors {shape}, got {type(tensors).__name__}")
    tensors = list(tensors)
    for i, tensor in enumerate(tensors):
        check_tensor(op, f"{name}[{i}]", tensor, shape)
    return [tensor.detach() for tensor in tensors]


def kaczmarz_train(
    input: Tensor,
    labels: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    relaxation: float = 1.0,
    damping: float = 0.0,
    dx: Move = "mean",
    dx_reg: float = 1.0,
    output: Output = "clamp",
) -> Tensor:
    """One pass over samples, the weights of all layers updated in place after each (the module's head).

    Args:
        input: ``[K, N]``, float32 or float64, in the order in which they are to be learnt.
        labels: ``[K]`` int64, the class of each.
        weights: of each layer from the first, ``[M, N]``, with relu between the layers.
        biases: of each layer, ``[M]``, or none at all.
        relaxation, damping, dx, dx_reg: as in :class:`tpext.Kaczmarz`. There is no ``update``, as of one sample "exact"
            differs from "average" by its regularisation only, and the input is moved first.
        output: the rule of :func:`hot_target` for the last layer.

    Returns:
        The classes predicted, each before its sample's update, ``[K]`` int64; NaN counts as the greatest. Weights that
        have overflowed give NaN, and no error.

    Raises:
        ValueError: a wrong shape, dtype, device, label, number or choice; the message names the argument.

    Cost: ``4 M N`` operations a sample for the first layer, ``8 M N`` for the others, of one thread, with each weight
    of the first layer read and written once; with "regularized" ``M^2 (N + M / 3)`` more for each layer but the first.
    """
    op = "kaczmarz_train"
    check_tensor(op, "input", input, "[K, N]")
    check_tensor(op, "labels", labels, "[K]")
    # here too: the op would take True for 1.0
    for name, value in (("relaxation", relaxation), ("damping", damping), ("dx_reg", dx_reg)):
        _check_number(op, name, value)
    with torch.no_grad():
        predictions: Tensor = torch.ops.tpext.kaczmarz_train(
            input.detach(),
            labels,
            _detached("weights", weights, "[M, N]"),
            _detached("biases", biases, "[M]"),
            relaxation,
            damping,
            dx,
            dx_reg,
            output,
        )
    return predictions


def _fake_train(
    input: Tensor,
    labels: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    relaxation: float,
    damping: float,
    dx: str,
    dx_reg: float,
    output: str,
) -> Tensor:
    """Check the arguments and return empty predictions."""
    op = "kaczmarz_train"
    refuse_forward_mode(op, "it has no derivative")
    if input.dim() != 2:
        raise ValueError(f"{op}: input must be [K, N], got {list(input.shape)}")
    if input.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: input must be float32 or float64, got {dtype_name(input.dtype)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"{op}: labels must be int64, got {dtype_name(labels.dtype)}")
    if labels.shape != input.shape[:1]:
        raise ValueError(f"{op}: labels must be [K={len(input)}], got {list(labels.shape)}")
    if labels.device != input.device:
        raise ValueError(f"{op}: labels must be on {input.device} as input is, got {labels.device}")
    if not weights:
        raise ValueError(f"{op}: weights must have at least 1 tensor, got 0")
    if biases and len(biases) != len(weights):
        raise ValueError(f"{op}: biases must have 0 or L={len(weights)} tensors, got {len(biases)}")
    below = input.shape[1]
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[0] == 0:
            raise ValueError(f"{op}: weights[{i}] must be [M >= 1, N], got {list(weight.shape)}")
        check_like(op, f"weights[{i}]", weight, input, (weight.shape[0], below))
        if biases:
            check_like(op, f"biases[{i}]", biases[i], input, weight.shape[:1])
        below = weight.shape[0]
    for name, value in (("relaxation", relaxation), ("damping", damping), ("dx_reg", dx_reg)):
        _check_number(op, name, value)
    check_choice(op, "dx", dx, get_args(Move))
    check_choice(op, "output", output, get_args(Output))
    return torch.empty_like(labels, memory_format=torch.contiguous_format)


def _train(
    input: Tensor,
    labels: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    relaxation: float,
    damping: float,
    dx: Move,
    dx_reg: float,
    output: Output,
) -> Tensor:
    predictions = _fake_train(input, labels, weights, biases, relaxation, damping, dx, dx_reg, output)
    if on_cuda(input):
        return _train_by_torch(input, labels, weights, biases, relaxation, damping, dx, dx_reg, output)
    changed = [*weights, *biases]
    buffers = [tensor.contiguous() for tensor in changed]
    _C.kaczmarz_train(
        dense(input),
        dense(labels),
        [dense(buffer) for buffer in buffers[: len(weights)]],
        [dense(buffer) for buffer in buffers[len(weights) :]],
        relaxation,
        damping,
        dx,
        dx_reg,
        output,
        dense(predictions),
    )
    for tensor, buffer in zip(changed, buffers, strict=True):
        if buffer is not tensor:
            tensor.copy_(buffer)
        else:
            torch.autograd.graph.increment_version(tensor)
    return predictions


def _train_by_torch(
    input: Tensor,
    labels: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    relaxation: float,
    damping: float,
    dx: Move,
    dx_reg: float,
    output: Output,
) -> Tensor:
    """What the kernel does, a sample and a layer at a time."""
    predictions = torch.empty_like(labels)
    relu = Units("relu")
    for k in range(len(input)):
        inputs, zs = [input[k : k + 1]], []
        for i, weight in enumerate(weights):
            zs.append(torch.nn.functional.linear(inputs[i], weight, biases[i] if biases else None))
            inputs.append(relu(zs[i]))
        predictions[k : k + 1] = zs[-1].argmax(-1)
        hot = torch.zeros_like(zs[-1]).scatter_(-1, labels[k : k + 1, None], 1.0)
        target = hot_target(hot, zs[-1], output)
        for i in reversed(range(len(weights))):
            step = kaczmarz_step(
                target - zs[i],
                inputs[i],
                weights[i],
                bool(biases),
                relu if i else None,
                relaxation=relaxation,
                damping=damping,
                dx=dx,
                dx_reg=dx_reg,
            )
            weights[i] += step.weight
            if step.bias is not None:
                biases[i] += step.bias
            if i:
                target = relu.input_target(step.input, zs[i - 1])
    return predictions


define(
    "kaczmarz_train(Tensor input, Tensor labels, Tensor(a!)[] weights, Tensor(b!)[] biases, float relaxation, "
    "float damping, str dx, float dx_reg, str output) -> Tensor",
    _train,
    _fake_train,
    cast_outputs=False,
)


def running_accuracy(correct: Tensor, decay: float = 0.999, start: float = 0.0) -> float:
    """The running mean ``a_k = decay a_(k-1) + (1 - decay) correct_k`` after the last of ``correct [K]``.

    Of a pass's predictions it is the accuracy on samples that were not yet learnt from in that pass, with a memory of
    ``1 / (1 - decay)`` samples (of mean accuracies of batches: batches). ``start`` is ``a_0``.

    >>> running_accuracy(torch.tensor([True, False]), decay=0.5)
    0.25
    """
    check_tensor("running_accuracy", "correct", correct, "[K]")
    if correct.dim() != 1:
        raise ValueError(f"running_accuracy: correct must be [K], got {list(correct.shape)}")
    if not 0 <= decay < 1:
        raise ValueError(f"running_accuracy: decay must be >= 0 and < 1, got {decay!r}")
    age = torch.arange(len(correct) - 1, -1, -1, dtype=torch.float64, device=correct.device)
    return float((correct.double() * (1 - decay) * decay**age).sum()) + start * decay ** len(correct)
