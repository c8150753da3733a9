"""Sequence tasks: synthetic long-memory problems and sequential MNIST.

A :class:`Task` is a small immutable value. It says what goes in and out (``length``, ``input_size``, ``output_size``),
how an output is judged (``loss``, ``correct``) and produces the data: ``batch(seed, iteration, batch_size)`` and
``test_set(seed, size)`` are pure functions of their arguments, so a run that resumes at iteration ``i`` sees what a run
that never stopped sees.

>>> from tpext.tasks import make_task
>>> task = make_task("temporal-order", length=60)
>>> task.batch(seed=1, iteration=0, batch_size=20).input.shape
torch.Size([60, 20, 6])
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from tpext.tasks.base import Batch, Criterion, Task
from tpext.tasks.mnist import MissingDataError, SequentialMnist, load_mnist
from tpext.tasks.synthetic import Adding, RandomPermutation, TemporalOrder

SyntheticName = Literal["temporal-order", "temporal-order-3bit", "adding", "random-permutation"]
ImageName = Literal["mnist", "permuted-mnist"]
TaskName = Literal[SyntheticName, ImageName]

SYNTHETIC: tuple[str, ...] = get_args(SyntheticName)
"""Names of the tasks whose length is free and whose samples are drawn, not read."""

IMAGES: tuple[str, ...] = get_args(ImageName)
"""Names of the tasks that read images, in chunks of ``chunk`` pixels."""

TASKS: tuple[str, ...] = get_args(TaskName)
"""Every name that :func:`make_task` knows."""


def make_task(
    name: str, *, length: int | None = None, chunk: int | None = None, data_dir: str | Path | None = None
) -> Task:
    """Return the task of that name.

    Args:
        name: one of :data:`TASKS`.
        length: number of steps T of a synthetic task; None is its default (60, adding 30, random permutation 30).
        chunk: pixels per step of an image task, a divisor of 784: 1 (default) is pixel by pixel, 28 is by rows.
        data_dir: folder of an image task's files; None means the cache folder, filled by a download when needed.

    Raises:
        ValueError: an unknown name, an argument that the task does not have, or one out of its range.

    >>> make_task("mnist", chunk=28).length
    28
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    if name in IMAGES:
        if length is not None:
            raise ValueError(f"length does not belong to {name}: it is 784 / chunk")
        folder = None if data_dir is None else Path(data_dir)
        return SequentialMnist(chunk=1 if chunk is None else chunk, permuted=name == "permuted-mnist", data_dir=folder)
    for option, value in (("chunk", chunk), ("data_dir", data_dir)):
        if value is not None:
            raise ValueError(f"{option} does not belong to {name}, which draws its samples")
    if name == "adding":
        return Adding() if length is None else Adding(length)
    if name == "random-permutation":
        return RandomPermutation() if length is None else RandomPermutation(length)
    bits = 3 if name == "temporal-order-3bit" else 1
    return TemporalOrder(bits=bits) if length is None else TemporalOrder(length, bits=bits)


__all__ = [
    "IMAGES",
    "SYNTHETIC",
    "TASKS",
    "Adding",
    "Batch",
    "Criterion",
    "MissingDataError",
    "RandomPermutation",
    "SequentialMnist",
    "Task",
    "TaskName",
    "TemporalOrder",
    "load_mnist",
    "make_task",
]
