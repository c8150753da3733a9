"""What every training run needs of a task's samples; errors say what to change."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tpext.tasks.base import NOT_ASKED, Batch, Task


def check_samples(
    task: Task,
    method: str,
    samples: object,
    *,
    size: int | None = None,
    shape: tuple[int, ...] | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Check that samples go with what the task says of itself: layout, kind of numbers, range of classes.

    Targets of a task with a ``loss`` of its own are that loss's to judge.

    Args:
        task: any task.
        method: the one of it that returned the samples, for errors.
        samples: a :class:`tpext.tasks.Batch`.
        size: number of samples; None takes that of the targets.
        shape: of the input of one sample, or of one step of it; None is ``(input_size,)``.
        embed: what :meth:`tpext.tasks.Task.make_embedding` made, applied to the input; None leaves out what that gives.

    Raises:
        ValueError: names the task, the method, what was expected and what came.
    """
    name = type(task).__name__
    if not isinstance(samples, Batch):
        raise ValueError(f"{name}: {method} must return a Batch, got {type(samples).__name__}")
    for part, one in zip(("input", "target"), samples, strict=True):
        if not isinstance(one, Tensor):
            raise ValueError(f"{name}: {part} of {method} must be a tensor, got {type(one).__name__}")
    target = samples.target
    if size is None:
        axis = 1 if task.every_step else 0
        size = target.shape[axis] if target.dim() > axis else 0
        if size == 0:
            raise ValueError(f"{name}: target of {method} must have at least one sample, got {list(target.shape)}")
    _check_input(task, f"{name}: input of {method}", samples.input, size, shape or (task.input_size,), embed)
    if task.criterion != "cross_entropy" and type(task).correct is Task.correct:
        layout = "[T, B]" if task.every_step else "[B]"
        raise ValueError(f"{name}: criterion {task.criterion!r} needs a method correct(output, target) -> {layout}")
    if type(task).loss is Task.loss:
        _check_target(task, f"{name}: target of {method}", target, size)
    if task.judged(target) == 0:
        raise ValueError(f"{name}: target of {method} must ask for at least one output, got {NOT_ASKED} everywhere")


def _check_input(
    task: Task,
    name: str,
    input: Tensor,
    size: int,
    shape: tuple[int, ...],
    embed: Callable[[Tensor], Tensor] | None,
) -> None:
    before = (size,) if task.length is None else (task.length, size)
    axes = ["B"] if task.length is None else ["T", "B"]
    finite(name, input)
    if type(task).make_embedding is not Task.make_embedding:
        _check_layout(task, name, input.shape[: len(before)], before, [*axes, "..."])
        if embed is None:
            return
        try:
            input = embed(input)
        except Exception as error:
            # of whatever module a user makes
            raise ValueError(f"{name} must go through make_embedding, got {type(error).__name__}: {error}") from error
        name = f"{name}, embedded,"
    axes += ["I"] if len(shape) == 1 else ["C", "H", "W"]
    _check_layout(task, name, input.shape, (*before, *shape), axes)
    if not input.is_floating_point():
        raise ValueError(f"{name} must be floating point, such as float32, got {input.dtype}")


def _check_layout(task: Task, name: str, found: torch.Size, expected: tuple[int, ...], axes: list[str]) -> None:
    if found == expected:
        return
    more = ""
    if task.length is None:
        if len(found) == len(expected) + 1:
            more = f"; {type(task).__name__} has no length, so its network is feed-forward"
    elif found == (expected[1], expected[0], *expected[2:]):
        more = "; the steps come first: input.transpose(0, 1)"
    raise ValueError(f"{name} must be [{', '.join(axes)}] = {list(expected)}, got {list(found)}{more}")


def _check_target(task: Task, name: str, target: Tensor, size: int) -> None:
    steps = (task.length or 1,) if task.every_step else ()
    judged = f"[{'T, ' * len(steps)}B"
    if task.criterion != "cross_entropy":
        # of another shape the loss would broadcast, and be another one
        _check_target_shape(name, f"{judged}, O]", target, (*steps, size, task.output_size), task.criterion)
        finite(name, target)
        if task.criterion == "sigmoid_cross_entropy" and not bool(((target >= 0) & (target <= 1)).all()):
            low, high = float(target.min()), float(target.max())
            raise ValueError(f"{name} must be in [0, 1] for {task.criterion!r}, got {low:g} .. {high:g}")
        return
    _check_target_shape(name, f"{judged}]", target, (*steps, size), task.criterion)
    if target.dtype != torch.int64:
        raise ValueError(f"{name} must be classes in int64 for {task.criterion!r}, got {target.dtype}")
    asked = target[target != NOT_ASKED] if task.every_step else target
    wrong = asked[(asked < 0) | (asked >= task.output_size)]
    if len(wrong):
        raise ValueError(f"{name} must be classes 0 .. {task.output_size - 1}, got {int(wrong[0])}")


def _check_target_shape(name: str, layout: str, target: Tensor, shape: tuple[int, ...], criterion: str) -> None:
    if target.shape == shape:
        return
    more = ""
    if target.shape == (*shape, 1):
        more = "; target.squeeze(-1) is"
    elif (*target.shape, 1) == shape:
        more = "; target.unsqueeze(-1) is"
    raise ValueError(f"{name} must be {layout} = {list(shape)} for {criterion!r}, got {list(target.shape)}{more}")


def finite(name: str, numbers: Tensor) -> Tensor:
    """Return numbers that are finite.

    Raises:
        ValueError: they are not; says where the first is.
    """
    wrong = ~numbers.isfinite()
    if bool(wrong.any()):
        first = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {int(wrong.sum())} numbers that are not, the first at {first}")
    return numbers


def as_tensor(name: str, value: ArrayLike | Tensor) -> Tensor:
    """Return an array's numbers as a tensor, which shares their memory where it can.

    Raises:
        ValueError: they are no numbers.
    """
    try:
        if isinstance(value, Tensor):
            return value
        array = np.asarray(value)
        if array.dtype.kind in "USO":
            raise TypeError(f"dtype {array.dtype}")
        # torch has no negative strides, which a reversed axis has
        return torch.as_tensor(array.copy() if any(stride < 0 for stride in array.strides) else array)
    except (TypeError, ValueError, RuntimeError) as error:
        more, first = "", value
        if isinstance(value, (list, tuple)) and value:
            first = value[0]
        elif isinstance(value, np.ndarray) and value.size:
            first = value.flat[0]
        if isinstance(first, str):
            more = "; names of classes become numbers by names, classes = np.unique(.., return_inverse=True)"
        elif isinstance(first, (list, tuple, np.ndarray)):
            more = "; sequences of several lengths are for a loop of your own, padded and with lengths"
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}: {error}{more}") from error


def same_count(first: str, inputs: Tensor, second: str, targets: Tensor, what: str = "samples") -> int:
    """Return the number of samples in two tensors.

    Raises:
        ValueError: it is not one.
    """
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
        raise ValueError(
            f"{first} and {second} must have the same number of {what} in front, "
            f"got {list(inputs.shape)} and {list(targets.shape)}"
        )
    return len(inputs)


_WARNED: dict[Any, Any] = {}
"""Of :func:`warn_at`, so that one process says the same once."""


def warn_at(load: Callable[..., object], text: str) -> None:
    """Warn at a user's function, which is no caller of this one."""
    place = getattr(load, "__code__", None)
    if place is None:  # a callable of another kind
        warnings.warn(text, UserWarning, stacklevel=3)
    else:
        warnings.warn_explicit(text, UserWarning, place.co_filename, place.co_firstlineno, registry=_WARNED)


def warn_of_gaps(name: str, what: str, classes: Tensor, highest: int, load: Callable[..., object]) -> None:
    """Warn of classes up to the highest that have no sample, as where they are counted from 1.

    Args:
        name: of the classes, for the text.
        what: a sample is, for the text.
        classes: of all samples.
        highest: the last class that the network has an output for.
        load: the user's function that returned them.
    """
    used = set(torch.unique(classes).tolist())
    # not all: a number that is no class may be large
    gaps = list(itertools.islice((one for one in range(highest + 1) if one not in used), 6))
    if gaps:
        shown = ", ".join(map(str, gaps[:5])) + ", .." * (len(gaps) > 5)
        warn_at(
            load,
            f"{name} has no {what} of class {shown}, of 0 .. {highest}; the network gets an output for each. "
            "Classes count from 0",
        )
