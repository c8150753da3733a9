"""What every training run needs of a task's samples; errors say what to change."""

from __future__ import annotations

import torch
from torch import Tensor

from tpext.tasks.base import NOT_ASKED, Batch, Task
from tpext.tasks.image_sets import ImageClasses


def check_samples(task: Task, method: str, samples: object, size: int | None = None) -> None:
    """Check that samples go with what the task says of itself: layout, kind of numbers, range of classes.

    Targets of a task with a ``loss`` of its own are that loss's to judge.

    Args:
        task: any task.
        method: the one of it that returned the samples, for errors.
        samples: a :class:`tpext.tasks.Batch`.
        size: number of samples; None takes that of the input.

    Raises:
        ValueError: names the task, the method, what was expected and what came.
    """
    name = type(task).__name__
    if not isinstance(samples, Batch):
        raise ValueError(f"{name}: {method} must return a Batch, got {type(samples).__name__}")
    for part, one in zip(("input", "target"), samples, strict=True):
        if not isinstance(one, Tensor):
            raise ValueError(f"{name}: {part} of {method} must be a tensor, got {type(one).__name__}")
    input_name, target_name = (f"{name}: {part} of {method}" for part in ("input", "target"))
    count = _check_input(task, input_name, samples.input, size)
    if type(task).loss is Task.loss:
        _check_target(task, target_name, samples.target, count)


def _check_input(task: Task, name: str, input: Tensor, size: int | None) -> int:
    """Check an input and return its number of samples."""
    steps = task.length
    before = () if steps is None else (steps,)
    count = size if size is not None else input.shape[len(before)] if input.dim() > len(before) else 0
    if steps is not None and input.shape[:2] == (steps, count):
        # one sample says what the embedding makes of all; a run's random numbers stay as they are
        with torch.random.fork_rng(devices=[]):
            sample = task.make_embedding()(input[:, :1])
        found = (*sample.shape[:1], count, *sample.shape[2:])
    else:
        sample, found = input, tuple(input.shape)
    of_one = task.shape if isinstance(task, ImageClasses) else (task.input_size,)
    layout = "[T, B, I]" if steps is not None else "[B, C, H, W]" if isinstance(task, ImageClasses) else "[B, I]"
    expected = (*before, count, *of_one)
    if found != expected:
        turned = steps is not None and found == (count, steps, *of_one)
        more = "; the steps come first: input.transpose(0, 1)" if turned else ""
        raise ValueError(f"{name} must be {layout} = {list(expected)}, got {list(found)}{more}")
    if not sample.is_floating_point():
        raise ValueError(f"{name} must be floating point, such as float32, got {sample.dtype}")
    finite(name, input)
    return count


def _check_target(task: Task, name: str, target: Tensor, count: int) -> None:
    steps = (task.length or 1,) if task.every_step else ()
    judged = f"[{'T, ' * len(steps)}B"
    if task.criterion != "cross_entropy":
        # of another shape the loss would broadcast, and be another one
        _check_target_shape(name, f"{judged}, O]", target, (*steps, count, task.output_size), task.criterion)
        finite(name, target)
        if task.criterion == "sigmoid_cross_entropy" and not bool(((target >= 0) & (target <= 1)).all()):
            low, high = float(target.min()), float(target.max())
            raise ValueError(f"{name} must be in [0, 1] for {task.criterion!r}, got {low:g} .. {high:g}")
        return
    _check_target_shape(name, f"{judged}]", target, (*steps, count), task.criterion)
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
        ValueError: they are not.
    """
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {int((~numbers.isfinite()).sum())} numbers that are not")
    return numbers
