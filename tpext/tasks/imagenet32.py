"""ImageNet32, ImageNet at 32 x 32 pixels, from its official pickled files."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tpext.tasks.idx import Images, MissingDataError, cache_folder

FOLDER = "imagenet32"
TRAIN_FILES = tuple(f"train_data_batch_{index}" for index in range(1, 11))
TEST_FILE = "val_data"
PIXELS = 3072
CLASSES = 1000


def load_imagenet32(data_dir: Path | None = None) -> Images:
    """Return ImageNet32 from its ten training files ``train_data_batch_1`` ... ``10`` and ``val_data``, the test set.

    Each is a pickled dictionary with ``data``, uint8 ``[N, 3072]``, and ``labels``, N integers 1..1000. Unpickling may
    run any code, so the files are read by :func:`read_batch`, which runs none.

    Args:
        data_dir: the files' folder, or the one that ``imagenet32`` is in; None means the cache folder.

    Returns:
        Images ``[N, 3072]``: the red, green and blue planes of 32 x 32 pixels, row by row; labels 0..999.

    Raises:
        MissingDataError: a file is missing; says how to get it.
        ValueError: a file holds something else; names it.

    Cost: 3.9 GB of memory for the 1.28 million training images, and 0.4 GB more while they are read.

    Source: Chrabaszcz, Loshchilov and Hutter, "A Downsampled Variant of ImageNet as an Alternative to the CIFAR
    datasets", 2017.
    """
    folder = cache_folder() if data_dir is None else data_dir
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    missing = ", ".join(name for name in (*TRAIN_FILES, TEST_FILE) if not (folder / name).is_file())
    if missing:
        raise MissingDataError(
            f"ImageNet32: {folder} lacks {missing}. Register at image-net.org, unpack Imagenet32_train.zip and "
            f"Imagenet32_val.zip into a folder {FOLDER} and name the folder that has it with --data-dir DIR (or the "
            "environment variable TPEXT_DATA)"
        )
    train_images, train_labels = _read_batches([folder / name for name in TRAIN_FILES])
    test_images, test_labels = _read_batches([folder / TEST_FILE])
    return Images(train_images, train_labels, test_images, test_labels)


def _read_batches(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Return images and labels of some files, one after another, with no more than one file in memory besides."""
    # a file is no smaller than its pixels; what is reserved and never written takes no memory
    images = np.empty((sum(path.stat().st_size for path in paths) // PIXELS, PIXELS), dtype=np.uint8)
    labels, size = [], 0
    for path in paths:
        data, numbers = read_batch(path)
        images[size : size + len(data)] = data
        size += len(data)
        labels.append(numbers)
    return torch.from_numpy(images[:size]), torch.from_numpy(np.concatenate(labels))


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[N, 3072]`` uint8 and classes ``[N]`` int64, 0..999, of one pickled file.

    Only dictionaries, lists, tuples, strings, numbers and NumPy arrays of numbers are unpickled, pickled by Python 2 or
    3. Whatever else a file names is refused before anything of it runs; the arrays too are made from their bytes here,
    not by the calls that the file asks for.

    Raises:
        ValueError: the file is broken, names something else, or holds other shapes, types or labels; names the file.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
        if not isinstance(content, dict):
            raise ValueError(f"must hold a dictionary with data and labels, got {type(content).__name__}")
        content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
        if not {"data", "labels"} <= content.keys():
            raise ValueError(f"must hold a dictionary with data and labels, got one with {list(content)}")
        images, labels = _as_array(content["data"]), _as_array(content["labels"])
    # A broken pickle raises what its wrong bytes happen to cause.
    except Exception as error:
        raise ValueError(f"{path}: {error or type(error).__name__}") from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != PIXELS or len(images) == 0:
        raise ValueError(f"{path}: data must be uint8 [N > 0, {PIXELS}], got {images.dtype} {list(images.shape)}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels must be N={len(images)} integers, got {labels.dtype} {list(labels.shape)}")
    if labels.min() < 1 or labels.max() > CLASSES:
        raise ValueError(f"{path}: labels must be 1..{CLASSES}, got {labels.min()}..{labels.max()}")
    return images, labels.astype(np.int64) - 1


def _as_array(value: object) -> np.ndarray:
    return value.array if isinstance(value, _PickledArray) else np.asarray(value)


class _PickledDtype:
    """What a pickle makes of a dtype: its name, and the byte order that comes after."""

    def __init__(self, name: str, align: object = False, copy: object = True) -> None:
        if not isinstance(name, str) or name not in {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)}:
            raise pickle.UnpicklingError(f"arrays must be of integers or floating-point numbers, got dtype {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """What a pickle makes of an array: an empty one, and the shape, dtype and bytes that come after."""

    array: np.ndarray

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], _PickledDtype, bool, bytes | str]) -> None:
        _, shape, dtype, column_major, data = state
        raw = data.encode("latin1") if isinstance(data, str) else data
        order = "F" if column_major else "C"
        self.array = np.frombuffer(raw, dtype=dtype.dtype).reshape(shape, order=order)  # type: ignore[call-overload]


class _PickledBuffer(_PickledArray):
    """An array of pickle's fifth protocol, whose bytes come at once."""

    def __init__(self, data: bytes, dtype: _PickledDtype, shape: tuple[int, ...], order: str) -> None:
        self.__setstate__((1, shape, dtype, order == "F", data))


class _Unpickler(pickle.Unpickler):
    """Reads numbers, strings, containers and arrays; refuses every other name before it is looked up."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        # Python 3's bytes in an old protocol
        ("_codecs", "encode"): str.encode,
        ("numpy", "dtype"): _PickledDtype,
        ("numpy", "ndarray"): _PickledArray,
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _PickledArray for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _PickledBuffer for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refused: it names {module}.{name}, for which a file of images has no use")
        return self._ALLOWED[module, name]
