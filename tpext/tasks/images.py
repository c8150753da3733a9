"""Images as vectors for feed-forward networks: scikit-learn's digits, MNIST and CIFAR-10."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
import torch
from torch import Tensor

from tpext.tasks.base import Batch, Criterion, Order, Picture, Task, epoch_batches, epoch_rows
from tpext.tasks.idx import PIXELS, Images, MissingDataError, cache_folder, load_mnist
from tpext.tasks.registry import option, register

CIFAR_PIXELS = 3072
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_FILES = (*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin")
DIGITS_TRAIN = 1437


@functools.lru_cache(maxsize=1)
def load_digits() -> Images:
    """Return scikit-learn's bundled digits: 8 x 8 pixels of 0..16, the first 1,437 to train, the last 360 to test.

    The images are stored by writer, so the test images are by other writers than most training images.

    Raises:
        MissingDataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # it has no type hints
    except ModuleNotFoundError as error:
        raise MissingDataError(
            'digits: they come with scikit-learn, which is not installed: pip install "tpext[experiments]"'
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    images, classes = torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels.astype(np.int64))
    return Images(images[:DIGITS_TRAIN], classes[:DIGITS_TRAIN], images[DIGITS_TRAIN:], classes[DIGITS_TRAIN:])


def load_cifar10(data_dir: Path | None = None) -> Images:
    """Return CIFAR-10 from the six files of its official binary version.

    Args:
        data_dir: their folder, or the one that ``cifar-10-batches-bin`` is in; None means the cache folder.

    Returns:
        Images ``[N, 3072]``: the red, green and blue planes of 32 x 32 pixels, row by row.

    Raises:
        MissingDataError: a file is missing; says how to get it.
        ValueError: a file is no whole number of records, or a label is above 9; names it.
    """
    folder = cache_folder() if data_dir is None else data_dir
    if (folder / CIFAR_FOLDER).is_dir():
        folder = folder / CIFAR_FOLDER
    missing = ", ".join(name for name in CIFAR_FILES if not (folder / name).is_file())
    if missing:
        raise MissingDataError(
            f"CIFAR-10: {folder} lacks {missing}. Unpack the official binary version (cifar-10-binary.tar.gz) and name "
            f"the folder that has {CIFAR_FOLDER} with --data-dir DIR (or the environment variable TPEXT_DATA)"
        )
    parts = []
    for names in (CIFAR_FILES[:-1], CIFAR_FILES[-1:]):
        records = np.concatenate([_read_records(folder / name) for name in names])
        parts += [torch.from_numpy(records[:, 1:].copy()), torch.from_numpy(records[:, 0].astype(np.int64))]
    return Images(*parts)


def _read_records(path: Path) -> np.ndarray:
    """Return ``[N, 1 + 3072]`` bytes: label and pixels."""
    data = np.fromfile(path, dtype=np.uint8)
    if data.size == 0 or data.size % (1 + CIFAR_PIXELS):
        raise ValueError(f"{path}: must hold records of {1 + CIFAR_PIXELS} bytes, got {data.size} bytes")
    records = data.reshape(-1, 1 + CIFAR_PIXELS)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path}: labels must be 0..9, got {records[:, 0].max()}")
    return records


@dataclass(frozen=True)
class ImageTask(Task):
    """Name the class of an image given as a vector.

    Input ``[B, pixels]`` in [0, 1], not standardised. 10 classes, cross-entropy. Training batches run through epochs;
    images left over at an epoch's end are dropped.

    Args:
        train_size: number of training images, the first ones; None takes all.
        order: "shuffled": each epoch in an order of its own, fixed by (seed, epoch); "sequential_first": the first
            epoch as stored, the others shuffled; "sequential": every epoch as stored.

    Tasks with files have a ``data_dir`` besides, their folder; they are read when the first batch is asked for.
    """

    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the class"
    default_test_size: ClassVar[int] = 10_000
    largest: ClassVar[float] = 255.0
    """The pixel value that becomes 1."""
    shape: ClassVar[tuple[int, ...]]
    """Height and width of an image, with 3 colour planes before them if it has colours."""

    max_threads: ClassVar[int] = 4

    train_size: int | None = option(None, "Number of training images (text: symbols), the first ones; by default all.")
    order: Order = option("shuffled", "Order of an epoch's samples: shuffled, as stored in the first epoch, or always.")

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {self.order!r}")

    @abstractmethod
    def load(self) -> Images:
        """Read the images."""

    @property
    def input_size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def output_size(self) -> int:
        return 10

    @functools.cached_property
    def data(self) -> Images:
        """The images and labels, read when first asked for."""
        data, size = self.load(), self.train_size
        if size is None:
            return data
        if not 1 <= size <= len(data.train_labels):
            raise ValueError(f"train_size must be 1 .. {len(data.train_labels)} (the training images), got {size}")
        return Images(data.train_images[:size], data.train_labels[:size], data.test_images, data.test_labels)

    def epoch_length(self, batch_size: int) -> int:
        return epoch_batches(batch_size, len(self.data.train_labels))

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        data = self.data
        rows = epoch_rows(seed, iteration, batch_size, len(data.train_labels), self.order)
        return self._batch(data.train_images[rows], data.train_labels[rows])

    def test_set(self, seed: int, size: int) -> Batch:
        data = self.data
        if not 1 <= size <= len(data.test_labels):
            raise ValueError(f"test_size must be 1 .. {len(data.test_labels)} (the test images), got {size}")
        return self._batch(data.test_images[:size], data.test_labels[:size])

    def _batch(self, images: Tensor, labels: Tensor) -> Batch:
        return Batch(images.to(torch.float32).div_(self.largest), labels)


@register("digits-mlp")
@dataclass(frozen=True)
class Digits(ImageTask):
    """Name the digit of an image of 8 x 8 pixels: see :func:`load_digits`.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, its test part.
    """

    defaults: ClassVar[Mapping[str, object]] = {"sizes": (64, 64), "epochs": 60}
    default_test_size: ClassVar[int] = 360
    largest: ClassVar[float] = 16.0
    max_threads: ClassVar[int] = 1
    shape: ClassVar[tuple[int, ...]] = (8, 8)

    def load(self) -> Images:
        return load_digits()


@register("mnist-mlp")
@dataclass(frozen=True)
class FlatMnist(ImageTask):
    """Name the digit of an image of 28 x 28 pixels; the files are those of :func:`tpext.tasks.load_mnist`."""

    defaults: ClassVar[Mapping[str, object]] = {"sizes": (240, 240, 240, 240)}
    shape: ClassVar[tuple[int, ...]] = (28, 28)

    data_dir: Path | None = None

    def load(self) -> Images:
        return load_mnist(self.data_dir)


@register("cifar-mlp")
@dataclass(frozen=True)
class FlatCifar10(ImageTask):
    """Name the class of a colour image of 32 x 32 pixels; the files are those of :func:`load_cifar10`.

    Source: the network 3072-1000-1000-1000-10 on inputs in [0, 1] of Lee, Zhang, Fischer and Bengio, "Difference Target
    Propagation", 2015.
    """

    defaults: ClassVar[Mapping[str, object]] = {"sizes": (1000, 1000, 1000)}
    shape: ClassVar[tuple[int, ...]] = (3, 32, 32)

    data_dir: Path | None = None

    def load(self) -> Images:
        return load_cifar10(self.data_dir)


@register("mnist-autoencoder")
@dataclass(frozen=True)
class MnistAutoencoder(FlatMnist):
    """Reconstruct an image of 28 x 28 pixels: the target is the input, the loss the sigmoid cross-entropy of a pixel.

    Source: J. Seely, "tensorflow-target-prop", the autoencoder mode.
    """

    defaults: ClassVar[Mapping[str, object]] = {"sizes": (200, 100, 5, 100, 200)}
    criterion: ClassVar[Criterion] = "sigmoid_cross_entropy"
    correct_when: ClassVar[str] = "share of pixels on the right side of 1/2"

    @property
    def output_size(self) -> int:
        return PIXELS

    @property
    def picture(self) -> Picture | None:
        return "reconstruction"

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output > 0) == (target > 0.5)).to(output.dtype).mean(dim=1)

    def _batch(self, images: Tensor, labels: Tensor) -> Batch:
        pixels = super()._batch(images, labels).input
        return Batch(pixels, pixels)
