"""Image sets in IDX files, MNIST and Fashion-MNIST: where they are looked for, downloaded to, and how they are read."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PIXELS = 784

STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class MissingDataError(FileNotFoundError):
    """A data set is neither there nor to be had; the message says how to get it."""


@dataclass(frozen=True)
class Images:
    """Images ``[N, pixels]`` uint8 and labels ``[N]`` int64 of both parts. The ``load`` of a set of your own may give
    them in the other forms that :class:`tpext.tasks.ImageSet` names.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class IdxSet:
    """Four official files of images of 28 x 28 pixels and labels 0..9.

    Args:
        name: for messages.
        places: the folders below a data folder in which the files are looked for, "." for itself. A download goes to
            the first.
        md5: of each gzip-compressed file, in the order of :data:`STEMS`.
        mirrors: addresses that the files are downloaded from.
    """

    name: str
    places: tuple[str, ...]
    md5: tuple[str, ...]
    mirrors: tuple[str, ...]

    def find(self, folder: Path) -> dict[str, Path]:
        """Return which of the four files are there, gzip-compressed or plain."""
        paths = ((stem, folder / place / name) for stem in STEMS for place in self.places for name in _names(stem))
        found: dict[str, Path] = {}
        for stem, path in paths:
            if stem not in found and path.is_file():
                found[stem] = path
        return found

    def load(self, data_dir: Path | None) -> Images:
        """Return the images of a folder, or of the cache folder, downloading what is missing there."""
        folder = cache_folder() if data_dir is None else data_dir
        if len(self.find(folder)) < len(STEMS):
            if data_dir is not None:
                raise MissingDataError(self._how_to_get(folder))
            self._download(folder)
        paths = self.find(folder)
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

    def _how_to_get(self, folder: Path) -> str:
        found = self.find(folder)
        missing = ", ".join(f"{stem}[.gz]" for stem in STEMS if stem not in found)
        place, what = ("there", "them") if self.places[0] == "." else (f"in its folder {self.places[0]}", "that")
        return (
            f"{self.name}: {folder} lacks {missing}. Put the four official files {place}, or name the folder that has "
            f"{what} with --data-dir DIR (or the environment variable TPEXT_DATA)"
        )

    def _download(self, folder: Path) -> None:
        """Fetch what is missing into a folder, checked against the official md5 sums."""
        try:
            import pooch  # type: ignore[import-untyped]  # it has no type hints
        except ModuleNotFoundError as error:
            raise MissingDataError(
                f'{self._how_to_get(folder)}; or let tpext download them after: pip install "tpext[experiments]"'
            ) from error
        found = self.find(folder)
        for stem, md5 in zip(STEMS, self.md5, strict=True):
            if stem in found:
                continue
            reasons = []
            for mirror in self.mirrors:
                name = f"{stem}.gz"
                try:
                    pooch.retrieve(mirror + name, f"md5:{md5}", fname=name, path=folder / self.places[0])
                    break
                except (OSError, ValueError) as error:  # no network, no such file; or a wrong checksum
                    reasons.append(f"{mirror}{name}: {type(error).__name__}")
            else:
                raise MissingDataError(f"{self._how_to_get(folder)}; the download failed ({'; '.join(reasons)})")


MNIST = IdxSet(
    name="MNIST",
    places=(".", "MNIST/raw"),
    md5=(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)

# Its files have the names of MNIST's: never looked for in the data folder itself, where those may be.
FASHION_MNIST = IdxSet(
    name="Fashion-MNIST",
    places=("fashion-mnist", "FashionMNIST/raw"),
    md5=(
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
)


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
    return MNIST.load(data_dir)


def load_fashion_mnist(data_dir: Path | None = None) -> Images:
    """Return Fashion-MNIST from a folder, or from the cache folder, downloading what is missing there.

    Its files have the names of MNIST's, so they are looked for in a folder ``fashion-mnist`` (or torchvision's
    ``FashionMNIST/raw``) of the data folder, never in that itself.

    Args:
        data_dir: folder that has ``fashion-mnist`` with the four official IDX files, gzip-compressed or plain; nothing
            is ever downloaded into it. None means the cache folder.

    Raises:
        MissingDataError, ValueError: as :func:`load_mnist`.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", 2017.
    """
    return FASHION_MNIST.load(data_dir)


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


def cache_folder() -> Path:
    """Return where data sets are kept: ``$TPEXT_DATA``, else the user's cache folder."""
    if os.environ.get("TPEXT_DATA"):
        return Path(os.environ["TPEXT_DATA"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpext"


def _names(stem: str) -> tuple[str, str]:
    return stem, f"{stem}.gz"
