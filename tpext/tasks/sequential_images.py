"""Images read as sequences, number by number, by rows or in a fixed random order: MNIST, Fashion-MNIST, CIFAR-10."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args

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
from tpext.tasks.idx import PIXELS, Images, load_fashion_mnist, load_mnist
from tpext.tasks.images import CIFAR_PIXELS, load_cifar10
from tpext.tasks.registry import option, register

MnistName = Literal["mnist", "fashion-mnist"]


class _Source(NamedTuple):
    """How images are read, and mean and standard deviation of each plane's pixels, in [0, 1], as published."""

    load: Callable[[Path | None], Images]
    pixels: int
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)


_SOURCES: dict[str, _Source] = {
    "mnist": _Source(load_mnist, PIXELS),
    "fashion-mnist": _Source(load_fashion_mnist, PIXELS, (0.2860,), (0.3202,)),
    "cifar10": _Source(load_cifar10, CIFAR_PIXELS, (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
}


@functools.lru_cache(maxsize=2)
def _pixel_order(seed: int, pixels: int) -> Tensor:
    return torch.from_numpy(random_generator(seed, PERMUTATION_STREAM).permutation(pixels))


@dataclass(frozen=True)
class SequentialImages(Task):
    """Name the class of an image read ``chunk`` numbers at a time.

    Input ``[pixels / chunk, B, chunk]``, row by row, with colours one plane after another; with ``permuted`` in one
    random order, fixed by the seed. 10 classes, cross-entropy on the last step. Training batches run through epochs,
    each in an order of its own fixed by (seed, epoch); images left over at an epoch's end are dropped.

    Args:
        chunk: numbers per step, a divisor of those of an image.
        permuted: read them in a random order.
        data_dir: folder of the files, which are read when the first batch is asked for.
    """

    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the class"
    default_test_size: ClassVar[int] = 10_000
    # the few rows of a batch do not keep more busy
    max_threads: ClassVar[int] = 4

    chunk: int = option(1, "Pixels per step, a divisor of 784 (CIFAR-10: numbers, of 3072): 28 is MNIST by rows.")
    permuted: bool = False
    data_dir: Path | None = None
    length: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        pixels = self._source.pixels
        if self.chunk < 1 or pixels % self.chunk:
            divisors = ", ".join(str(size) for size in range(1, pixels + 1) if pixels % size == 0)
            raise ValueError(f"{type(self).__name__}: chunk must divide {pixels} ({divisors}), got {self.chunk}")
        object.__setattr__(self, "length", pixels // self.chunk)

    @property
    @abstractmethod
    def _source(self) -> _Source:
        """Where the images come from."""

    @property
    def input_size(self) -> int:
        return self.chunk

    @property
    def output_size(self) -> int:
        return 10

    @functools.cached_property
    def data(self) -> Images:
        """The images and labels, read when first asked for."""
        return self._source.load(self.data_dir)

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
        """Images ``[B, pixels]`` uint8 -> ``[T, B, chunk]`` float32."""
        source = self._source
        mean, deviation = (
            torch.tensor(values).repeat_interleave(source.pixels // len(values))
            for values in (source.mean, source.deviation)
        )
        numbers = images.to(torch.float32).div_(255).sub_(mean).div_(deviation)
        if self.permuted:
            numbers = numbers[:, _pixel_order(seed, source.pixels)]
        return numbers.view(len(images), self.length, self.chunk).transpose(0, 1).contiguous()


@register("permuted-mnist", permuted=True)
@register("sequential-mnist", permuted=False)
@dataclass(frozen=True)
class SequentialMnist(SequentialImages):
    """Name the digit, or the piece of clothing, of an image of 28 x 28 pixels.

    Pixels of MNIST are in [0, 1] (value / 255, not standardised); those of Fashion-MNIST are ``(value / 255 - .2860) /
    .3202``.

    Args:
        chunk: pixels per step, a divisor of 784. 1 is pixel by pixel (784 steps), 28 is by rows.
        permuted: see :class:`SequentialImages`.
        data_dir: see :func:`tpext.tasks.load_mnist` and :func:`tpext.tasks.load_fashion_mnist`.
        dataset: "mnist" or "fashion-mnist".

    Source: Le, Jaitly and Hinton, "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units", 2015;
    pixels as in Roulet and Harchaoui's code.
    """

    defaults: ClassVar[Mapping[str, object]] = {"batch_size": 16, "iterations": 16_000, "eval_interval": 1_000}

    dataset: MnistName = option("mnist", "Digits, or clothes: their files in the folder fashion-mnist of --data-dir.")

    def __post_init__(self) -> None:
        if self.dataset not in get_args(MnistName):
            raise ValueError(f"SequentialMnist: dataset must be mnist or fashion-mnist, got {self.dataset!r}")
        super().__post_init__()

    @property
    def _source(self) -> _Source:
        return _SOURCES[self.dataset]

    @property
    def subject(self) -> str | None:
        return None if self.dataset == "mnist" else self.dataset


@register("sequential-cifar", permuted=False)
@dataclass(frozen=True)
class SequentialCifar10(SequentialImages):
    """Name the class of a colour image of 32 x 32 pixels, read one number at a time: all of red, then green, then blue.

    Numbers are ``(value / 255 - mean) / deviation``, mean (.4914, .4822, .4465) and deviation (.247, .243, .261) of the
    planes. The files are those of :func:`tpext.tasks.load_cifar10`.

    Args:
        chunk: numbers per step, a divisor of 3072. 1 is one by one (3072 steps), 32 is a row of one colour.

    Source: Roulet and Harchaoui's code, whose CIFAR-10 this is.
    """

    defaults: ClassVar[Mapping[str, object]] = {"batch_size": 16, "iterations": 8_000, "eval_interval": 1_000}

    @property
    def _source(self) -> _Source:
        return _SOURCES["cifar10"]
