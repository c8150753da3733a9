"""Sequential MNIST: images read pixel by pixel, in a fixed random order, or in chunks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tpext.tasks.base import (
    PERMUTATION_STREAM,
    Batch,
    Criterion,
    Task,
    epoch_batches,
    epoch_rows,
    random_generator,
)
from tpext.tasks.idx import PIXELS, Images, load_mnist
from tpext.tasks.registry import option, register


@functools.lru_cache(maxsize=2)
def _pixel_order(seed: int) -> Tensor:
    return torch.from_numpy(random_generator(seed, PERMUTATION_STREAM).permutation(PIXELS))


@register("permuted-mnist", permuted=True)
@register("sequential-mnist", permuted=False)
@dataclass(frozen=True)
class SequentialMnist(Task):
    """Name the digit of an image read ``chunk`` pixels at a time.

    Input ``[784 / chunk, B, chunk]``: pixels in [0, 1] (value / 255, not standardised), row by row; with ``permuted``
    in one random order, fixed by the seed. 10 classes, cross-entropy on the last step. Training batches run through
    epochs, each in an order of its own fixed by (seed, epoch); images left over at an epoch's end are dropped.

    Args:
        chunk: pixels per step, a divisor of 784. 1 is pixel by pixel (784 steps), 28 is by rows.
        permuted: read the pixels in a random order.
        data_dir: see :func:`load_mnist`; the files are read when the first batch is asked for.

    Source: Le, Jaitly and Hinton, "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units", 2015;
    unnormalised pixels as in Roulet and Harchaoui's code.
    """

    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the class"
    default_test_size: ClassVar[int] = 10_000
    defaults: ClassVar[Mapping[str, object]] = {"batch_size": 16, "iterations": 16_000, "eval_interval": 1_000}
    # the few rows of a batch do not keep more busy
    max_threads: ClassVar[int] = 4

    chunk: int = option(1, "Pixels per step, a divisor of 784: 1 is pixel by pixel, 28 is by rows.")
    permuted: bool = False
    data_dir: Path | None = None
    length: int = field(init=False, default=PIXELS)

    def __post_init__(self) -> None:
        if self.chunk < 1 or PIXELS % self.chunk:
            divisors = ", ".join(str(size) for size in range(1, PIXELS + 1) if PIXELS % size == 0)
            raise ValueError(f"SequentialMnist: chunk must divide 784 ({divisors}), got {self.chunk}")
        object.__setattr__(self, "length", PIXELS // self.chunk)

    @property
    def input_size(self) -> int:
        return self.chunk

    @property
    def output_size(self) -> int:
        return 10

    @functools.cached_property
    def data(self) -> Images:
        """The images and labels, read when first asked for."""
        return load_mnist(self.data_dir)

    def epoch_length(self, batch_size: int) -> int:
        return epoch_batches(batch_size, len(self.data.train_labels))

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        data = self.data
        rows = epoch_rows(seed, iteration, batch_size, len(data.train_labels))
        return Batch(self._sequence(data.train_images[rows], seed), data.train_labels[rows])

    def test_set(self, seed: int, size: int) -> Batch:
        data = self.data
        if not 1 <= size <= len(data.test_labels):
            raise ValueError(f"test_size must be 1 .. {len(data.test_labels)} (the test images), got {size}")
        return Batch(self._sequence(data.test_images[:size], seed), data.test_labels[:size])

    def _sequence(self, images: Tensor, seed: int) -> Tensor:
        """Images ``[B, 784]`` uint8 -> ``[T, B, chunk]`` float32 in [0, 1]."""
        if self.permuted:
            images = images[:, _pixel_order(seed)]
        steps = images.view(len(images), self.length, self.chunk).transpose(0, 1)
        return steps.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
