"""``kaczmarz_train``: direct weight solves over samples, all layers in one kernel call; ``running_accuracy``.

``torch.ops.tpext.kaczmarz_train(input, labels, weights, biases, relaxation, damping, dx, dx_reg, output)`` runs one
pass of the updates of :mod:`tpext.ops.kaczmarz` with ``B = 1`` over samples ``input [K, N]``, ``labels [K]`` int64,
through all layers of a network with relu between them, each sample seeing the weights that the one before left.
``weights`` (``[M, N]`` each) and ``biases`` (``[M]`` each, or an empty list) change in place; it returns the class
predicted for each sample before its update, ``[K]`` int64. ``output`` is the rule of :func:`hot_target`. On the CPU one
kernel call, the weights in the cache throughout, float32 or float64; elsewhere layer by layer with torch operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias, get_args

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    check_choice,
    check_like,
    check_tensor,
    define,
    dense,
    dtype_name,
    on_cuda,
    refuse_forward_mode,
)
from tpext.ops.kaczmarz import Move, check_numbers, kaczmarz_step
from tpext.ops.units import Output, Units, hot_target

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Options: TypeAlias = tuple[float, float, Move, float, Output]
"""``relaxation``, ``damping``, ``dx``, ``dx_reg``, ``output``, which go through as they are."""


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
    check_numbers(op, relaxation=relaxation, damping=damping, dx_reg=dx_reg)
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
    check_numbers(op, relaxation=relaxation, damping=damping, dx_reg=dx_reg)
    check_choice(op, "dx", dx, get_args(Move))
    check_choice(op, "output", output, get_args(Output))
    return torch.empty_like(labels, memory_format=torch.contiguous_format)


def _train(
    input: Tensor, labels: Tensor, weights: list[Tensor], biases: list[Tensor], *options: Unpack[_Options]
) -> Tensor:
    predictions = _fake_train(input, labels, weights, biases, *options)
    if on_cuda(input):
        return _train_by_torch(input, labels, weights, biases, *options)
    changed = [*weights, *biases]
    buffers = [tensor.contiguous() for tensor in changed]
    _C.kaczmarz_train(
        dense(input),
        dense(labels),
        [dense(buffer) for buffer in buffers[: len(weights)]],
        [dense(buffer) for buffer in buffers[len(weights) :]],
        *options,
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
