"""Small files of image sets in their official formats."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tpext.tasks.imagenet32 import TEST_FILE, TRAIN_FILES
from tpext.tasks.images import CIFAR_FILES

PARTS = {"train": 25, "t10k": 7}


def write_idx(path: Path, values: np.ndarray, *, compress: bool = False) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    data = header + values.astype(np.uint8).tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


def write_mnist(folder: Path, fill: int | None = None) -> dict[str, np.ndarray]:
    """Four small files, two of them compressed; returns what they hold. ``fill`` is the value of all pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in PARTS.items():
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(256, size=(count, 28, 28))
        if fill is not None:
            arrays[f"{part}-images-idx3-ubyte"][:] = fill
        arrays[f"{part}-labels-idx1-ubyte"] = random.integers(10, size=count)
    for stem, values in arrays.items():
        write_idx(folder / stem, values, compress="train" in stem)
    return arrays


def write_cifar10(folder: Path, fill: int | None = None) -> dict[str, np.ndarray]:
    """Six small files of 4 records; returns what they hold. ``fill`` is the value of all pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    arrays = {}
    for name in CIFAR_FILES:
        labels, pixels = random.integers(10, size=(4, 1)), random.integers(256, size=(4, 3072))
        arrays[name] = np.concatenate([labels, pixels], axis=1).astype(np.uint8)
        if fill is not None:
            arrays[name][:, 1:] = fill
        (folder / name).write_bytes(arrays[name].tobytes())
    return arrays


def write_imagenet32(folder: Path, fill: int | None = None) -> dict[str, dict[str, Any]]:
    """Eleven small files of 3 to 5 images with the official contents; returns those."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(2)
    contents = {}
    for name in (*TRAIN_FILES, TEST_FILE):
        count = int(random.integers(3, 6))
        pixels = random.integers(256, size=(count, 3072), dtype=np.uint8)
        if fill is not None:
            pixels[:] = fill
        contents[name] = {"data": pixels, "labels": random.integers(1, 1001, size=count).tolist()}
        if name != TEST_FILE:
            contents[name]["mean"] = pixels.mean(0)
        (folder / name).write_bytes(pickle.dumps(contents[name]))
    return contents
