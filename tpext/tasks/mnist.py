"""Sequential MNIST: images read pixel by pixel, in a fixed random order, or in chunks."""

from __future__ import annotations

import functools
import gzip
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
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

PIXELS = 784

# File stem -> md5 of the official gzip file.
FILES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


class MissingDataError(FileNotFoundError):
    """A data set is neither there nor to be had; the message says how to get it."""


@dataclass(frozen=True)
class Images:
    """Images ``[N, pixels]`` uint8 and labels ``[N]`` int64 of both parts."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_idx(path: Path) -> np.ndarray:
    """Return the array of an IDX file of unsigned bytes, gzip-compressed (``.gz``) or plain.

    Raises:
        ValueError: a broken header, or more or fewer bytes than it announces; names the file.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip file ({error})") from error
    rank = data[3] if len(data) >= 4 else 0
    if data[:3] != b"\0\0\x08" or rank == 0 or len(data) < 4 + 4 * rank:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (it starts with {data[:4].hex(' ') or 'nothing'})")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    expected, got = int(np.prod(shape, dtype=np.uint64)), len(data) - 4 - 4 * rank
    if expected != got:
        raise ValueError(f"{path}: the header announces {list(shape)} = {expected} bytes, the file holds {got}")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def _find(folder: Path) -> dict[str, Path]:
    """Return which of the four files are in a folder, in torchvision's layout below it, or packed."""
    found = {}
    for stem in FILES:
        names = (folder / stem, folder / f"{stem}.gz")
        nested = (folder / "MNIST" / "raw" / stem, folder / "MNIST" / "raw" / f"{stem}.gz")
        for path in names + nested:
            if path.is_file():
                found[stem] = path
                break
    return found


def _how_to_get(folder: Path) -> str:
    missing = ", ".join(f"{stem}[.gz]" for stem in FILES if stem not in _find(folder))
    return (
        f"MNIST: {folder} lacks {missing}. Put the four official files there, or name the folder that has them with "
        "--data-dir DIR (or the environment variable TPEXT_DATA)"
    )


def _download(folder: Path) -> None:
    """Fetch what is missing into a folder, checked against the official md5 sums."""
    try:
        import pooch  # type: ignore[import-untyped]  # it has no type hints
    except ModuleNotFoundError as error:
        raise MissingDataError(
            f'{_how_to_get(folder)}; or let tpext download them after: pip install "tpext[experiments]"'
        ) from error
    for stem in [stem for stem in FILES if stem not in _find(folder)]:
        reasons = []
        for mirror in MIRRORS:
            name = f"{stem}.gz"
            try:
                pooch.retrieve(mirror + name, f"md5:{FILES[stem]}", fname=name, path=folder)
                break
            except (OSError, ValueError) as error:  # no network, no such file; or a wrong checksum
                reasons.append(f"{mirror}{name}: {type(error).__name__}")
        else:
            raise MissingDataError(f"{_how_to_get(folder)}; the download failed ({'; '.join(reasons)})")


def cache_folder() -> Path:
    """Return where data sets are kept: ``$TPEXT_DATA``, else the user's cache folder."""
    if os.environ.get("TPEXT_DATA"):
        return Path(os.environ["TPEXT_DATA"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpext"


def load_mnist(data_dir: Path | None = None) -> Images:
    """Return MNIST from a folder, or from the cache folder, downloading what is missing there.

    Args:
        data_dir: folder with the four official IDX files, gzip-compressed or plain (torchvision's ``MNIST/raw`` below
            it is found too); nothing is ever downloaded into it. None means the cache folder.

    Raises:
        MissingDataError: a file is missing (and cannot be downloaded); says how to get it.
        ValueError: a file is broken, its images are not 28 x 28, or its labels do not go with them; names it. Fewer
            images than MNIST's are taken as they are.
    """
    folder = cache_folder() if data_dir is None else data_dir
    if len(_find(folder)) < len(FILES):
        if data_dir is not None:
            raise MissingDataError(_how_to_get(folder))
        _download(folder)
    paths = _find(folder)
    parts = []
    for part in ("train", "t10k"):
        image_path, label_path = paths[f"{part}-images-idx3-ubyte"], paths[f"{part}-labels-idx1-ubyte"]
        images, labels = read_idx(image_path), read_idx(label_path)
        if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise ValueError(f"{image_path}: images must be [N > 0, 28, 28], got {list(images.shape)}")
        if labels.shape != (len(images),):
            raise ValueError(f"{label_path}: labels must be [N={len(images)}], got {list(labels.shape)}")
        if labels.max() > 9:
            raise ValueError(f"{label_path}: labels must be 0..9, got {labels.max()}")
        parts += [torch.from_numpy(images.reshape(-1, PIXELS).copy()), torch.from_numpy(labels.astype(np.int64))]
    return Images(*parts)


@functools.lru_cache(maxsize=2)
def _pixel_order(seed: int) -> Tensor:
    return torch.from_numpy(random_generator(seed, PERMUTATION_STREAM).permutation(PIXELS))


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

    chunk: int = 1
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
