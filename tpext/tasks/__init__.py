"""Sequence tasks, synthetic long-memory problems and sequential MNIST; and feed-forward ones, image and toy sets.

Images for convolutional networks are :class:`ImageClasses`, made without :func:`make_task`.

A :class:`Task` is a small immutable value. It says what goes in and out (``length``, ``input_size``, ``output_size``),
how an output is judged (``loss``, ``correct``) and produces the data: ``batch(seed, iteration, batch_size)`` and
``test_set(seed, size)`` are pure functions of their arguments, so a run that resumes at iteration ``i`` sees what a run
that never stopped sees.

>>> from tpext.tasks import make_task
>>> task = make_task("temporal-order", length=60)
>>> task.batch(seed=1, iteration=0, batch_size=20).input.shape
torch.Size([60, 20, 6])
>>> make_task("spiral").batch(seed=1, iteration=0, batch_size=20).input.shape
torch.Size([20, 2])
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast, get_args

from tpext.tasks.base import Batch, Criterion, Order, Task
from tpext.tasks.idx import MissingDataError, load_fashion_mnist, load_mnist
from tpext.tasks.image_sets import ImageClasses, ImageSetName, Normalization, Split
from tpext.tasks.imagenet32 import load_imagenet32
from tpext.tasks.images import Digits, FlatCifar10, FlatMnist, ImageTask, MnistAutoencoder, load_cifar10, load_digits
from tpext.tasks.mnist import SequentialMnist
from tpext.tasks.synthetic import Adding, RandomPermutation, TemporalOrder
from tpext.tasks.toys import ToyName, ToySet

SyntheticName = Literal["temporal-order", "temporal-order-3bit", "adding", "random-permutation"]
ImageName = Literal["sequential-mnist", "permuted-mnist"]
VectorName = Literal["digits-mlp", "mnist-mlp", "cifar-mlp", "mnist-autoencoder"]
TaskName = Literal[SyntheticName, ImageName, VectorName, ToyName]

SYNTHETIC: tuple[str, ...] = get_args(SyntheticName)
"""Names of the sequence tasks whose length is free and whose samples are drawn, not read."""

IMAGES: tuple[str, ...] = get_args(ImageName)
"""Names of the sequence tasks that read images, in chunks of ``chunk`` pixels."""

VECTORS: tuple[str, ...] = get_args(VectorName)
"""Names of the feed-forward tasks that read images, each as a vector."""

TOYS: tuple[str, ...] = get_args(ToyName)
"""Names of the feed-forward tasks that draw points in two or three dimensions."""

FEED_FORWARD = VECTORS + TOYS
"""Names of the feed-forward tasks."""

TASKS: tuple[str, ...] = get_args(TaskName)
"""Every name that :func:`make_task` knows."""

_VECTOR_TASKS: dict[str, type[ImageTask]] = {
    "digits-mlp": Digits,
    "mnist-mlp": FlatMnist,
    "cifar-mlp": FlatCifar10,
    "mnist-autoencoder": MnistAutoencoder,
}


FORMER_NAMES = {"mnist": "sequential-mnist"}
"""What tasks were called in earlier versions."""


def check_task_name(name: str) -> None:
    """Raise ValueError unless there is a task of that name."""
    if name not in TASKS:
        former = f"; {name} is called {FORMER_NAMES[name]} now" if name in FORMER_NAMES else ""
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}{former}")


def make_task(
    name: str,
    *,
    length: int | None = None,
    chunk: int | None = None,
    data_dir: str | Path | None = None,
    train_size: int | None = None,
    order: Order | None = None,
) -> Task:
    """Return the task of that name.

    Args:
        name: one of :data:`TASKS`.
        length: number of steps T of a synthetic task; None is its default (60, adding 30, random permutation 30).
        chunk: pixels per step of a sequence of images, a divisor of 784: 1 (default) is pixel by pixel, 28 is by rows.
        data_dir: folder of an image task's files; None means the cache folder, filled by a download when needed
            (MNIST). ``digits-mlp`` has no files.
        train_size, order: of a feed-forward image task: see :class:`ImageTask`.

    Raises:
        ValueError: an unknown name, an argument that the task does not have, or one out of its range.

    >>> make_task("sequential-mnist", chunk=28).length
    28
    """
    check_task_name(name)
    if name in IMAGES and length is not None:
        raise ValueError(f"length does not belong to {name}: it is 784 / chunk")
    reads_files = name in IMAGES or (name in VECTORS and name != "digits-mlp")
    for option, value, belongs in (
        ("length", length, name in SYNTHETIC),
        ("chunk", chunk, name in IMAGES),
        ("data_dir", data_dir, reads_files),
        ("train_size", train_size, name in VECTORS),
        ("order", order, name in VECTORS),
    ):
        if value is not None and not belongs:
            raise ValueError(f"{option} does not belong to {name}")
    folder = None if data_dir is None else Path(data_dir)
    if name in IMAGES:
        return SequentialMnist(chunk=1 if chunk is None else chunk, permuted=name == "permuted-mnist", data_dir=folder)
    if name in VECTORS:
        return _VECTOR_TASKS[name](train_size=train_size, order="shuffled" if order is None else order, data_dir=folder)
    if name in TOYS:
        return ToySet(cast(ToyName, name))
    if name == "adding":
        return Adding() if length is None else Adding(length)
    if name == "random-permutation":
        return RandomPermutation() if length is None else RandomPermutation(length)
    bits = 3 if name == "temporal-order-3bit" else 1
    return TemporalOrder(bits=bits) if length is None else TemporalOrder(length, bits=bits)


__all__ = [
    "FEED_FORWARD",
    "IMAGES",
    "SYNTHETIC",
    "TASKS",
    "TOYS",
    "VECTORS",
    "Adding",
    "Batch",
    "Criterion",
    "Digits",
    "FlatCifar10",
    "FlatMnist",
    "ImageClasses",
    "ImageSetName",
    "ImageTask",
    "MissingDataError",
    "MnistAutoencoder",
    "Normalization",
    "Order",
    "RandomPermutation",
    "SequentialMnist",
    "Split",
    "Task",
    "TaskName",
    "TemporalOrder",
    "ToySet",
    "check_task_name",
    "load_cifar10",
    "load_digits",
    "load_fashion_mnist",
    "load_imagenet32",
    "load_mnist",
    "make_task",
]
