"""Images for convolutional networks: files, normalisation, split, augmentation; batches as a pure function."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
import torch
from image_files import PARTS, write_cifar10, write_imagenet32, write_mnist

from tpext.tasks import (
    IMAGE_SETS,
    ImageClasses,
    ImageSet,
    MissingDataError,
    load_fashion_mnist,
    load_imagenet32,
    load_mnist,
)
from tpext.tasks.augmentation import flip_and_crop
from tpext.tasks.idx import STEMS, Images
from tpext.tasks.imagenet32 import TEST_FILE, TRAIN_FILES, _PickledArray, read_batch
from tpext.testing import check_task

DATASETS = ("cifar10", "mnist", "fashion-mnist", "digits", "imagenet32")
SHAPES = {"cifar10": (3, 32, 32), "imagenet32": (3, 32, 32), "digits": (1, 8, 8)}


def write_set(dataset: str, folder: Path, fill: int | None = None) -> Path | None:
    """Write a small set; return the data folder that has it, None for the one without files."""
    if dataset == "digits":
        pytest.importorskip("sklearn")
        return None
    if dataset == "cifar10":
        write_cifar10(folder, fill)
    elif dataset == "imagenet32":
        write_imagenet32(folder / "imagenet32", fill)
    else:
        write_mnist(folder / ("fashion-mnist" if dataset == "fashion-mnist" else "."), fill)
    return folder


def made(dataset: str, folder: Path, **options: object) -> ImageClasses:
    """A task on a small set, of which a quarter is for validation."""
    return ImageClasses(dataset, data_dir=write_set(dataset, folder), **{"validation": 0.25, **options})


# --- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "normalization", "pixel", "expected"),
    [
        # (pixel - 125.3) / 63.0, (pixel - 123.0) / 62.1, (pixel - 113.9) / 66.7
        ("cifar10", "standard", 0, (-1.988889, -1.980676, -1.707646)),
        ("cifar10", "standard", 255, (2.058730, 2.125604, 2.115442)),
        # (1 - .4914) / .6069, (1 - .4822) / .5982, (1 - .4465) / .6030
        ("cifar10", "3xstd", 255, (0.838029, 0.865597, 0.917910)),
        # 51 / 255 = .2
        ("cifar10", "3xstd", 51, (-0.480145, -0.471749, -0.408789)),
        ("cifar10", "meulemans", 51, (-0.6, -0.6, -0.6)),
        ("cifar10", "none", 51, (0.2, 0.2, 0.2)),
        ("mnist", "standard", 0, (-1.0,)),
        ("mnist", "standard", 51, (-0.6,)),
        # -.1307 / .3081 and .8693 / .3081
        ("mnist", "meulemans", 0, (-0.424213,)),
        ("mnist", "meulemans", 255, (2.821487,)),
        ("mnist", "none", 255, (1.0,)),
        ("fashion-mnist", "standard", 255, (1.0,)),
        ("fashion-mnist", "meulemans", 51, (0.2,)),
        # -.485 / .229 ...; (1 - .485) / .229 ...
        ("imagenet32", "standard", 0, (-2.117904, -2.035714, -1.804444)),
        ("imagenet32", "standard", 255, (2.248908, 2.428571, 2.640000)),
    ],
)
def test_published_normalisations(
    dataset: str, normalization: str, pixel: int, expected: tuple[float, ...], tmp_path: Path
) -> None:
    task = ImageClasses(dataset, normalization, data_dir=write_set(dataset, tmp_path, pixel), validation=0.25)
    for batch in (task.batch(1, 0, 4), task.validation_set(1, 3), task.test_set(1, 3)):
        planes = torch.tensor(expected).view(-1, 1, 1).expand(len(batch.input), *task.shape)
        torch.testing.assert_close(batch.input, planes, rtol=0, atol=2e-6)


def test_digits_are_scaled_by_sixteen() -> None:
    pytest.importorskip("sklearn")
    raw = ImageClasses("digits").data.test_images.view(-1, 1, 8, 8).float()
    torch.testing.assert_close(ImageClasses("digits", "none").test_set(1, 360).input, raw / 16, rtol=0, atol=0)
    torch.testing.assert_close(ImageClasses("digits").test_set(1, 360).input, raw / 8 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dataset", DATASETS)
def test_sizes_agree_with_the_data(dataset: str, tmp_path: Path) -> None:
    task = made(dataset, tmp_path)
    assert task.shape == SHAPES.get(dataset, (1, 28, 28))
    assert task.input_size == np.prod(task.shape)
    assert task.output_size == (1000 if dataset == "imagenet32" else 10)
    assert task.length is None
    assert task.default_test_size == {"digits": 360, "imagenet32": 50_000}.get(dataset, 10_000)
    for batch in (task.batch(1, 0, 4), task.validation_set(1, 4), task.test_set(1, 3)):
        assert batch.input.shape == (len(batch.target), *task.shape)
        assert (batch.input.dtype, batch.target.dtype) == (torch.float32, torch.int64)
        assert batch.input.is_contiguous()
        output = torch.zeros(len(batch.target), task.output_size)
        assert task.loss(output, batch.target).item() == pytest.approx(np.log(task.output_size))
        assert task.correct(output, batch.target).shape == batch.target.shape


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet32"])
def test_planes_rows_and_columns_are_those_of_the_file(dataset: str, tmp_path: Path) -> None:
    task = made(dataset, tmp_path, normalization="none")
    stored = task.data.test_images[1].numpy()
    image = task.test_set(1, 3).input[1]
    for plane, row, column in ((0, 0, 1), (1, 5, 7), (2, 31, 30)):
        assert image[plane, row, column].item() == pytest.approx(stored[1024 * plane + 32 * row + column] / 255)


# --- split -----------------------------------------------------------------------------------------------------------


def without_pixels(task: ImageClasses, labels: torch.Tensor, tests: int = 10) -> ImageClasses:
    """Give a task labels of its own, and black images that take no memory."""
    black = torch.zeros(1, 1, dtype=torch.uint8).expand(-1, task.input_size)
    task.__dict__["data"] = Images(
        black.expand(len(labels), -1), labels, black.expand(tests, -1), torch.zeros(tests, dtype=torch.int64)
    )
    return task


@pytest.mark.parametrize(
    ("dataset", "images", "train", "validation"),
    [("cifar10", 50_000, 45_000, 5_000), ("mnist", 60_000, 54_000, 6_000), ("fashion-mnist", 60_000, 54_000, 6_000)],
)
def test_published_sizes_of_the_split(dataset: str, images: int, train: int, validation: int) -> None:
    task = without_pixels(ImageClasses(dataset), torch.zeros(images, dtype=torch.int64))
    assert (task.split_size("train"), task.split_size("validation")) == (train, validation)
    # a random tenth: the mean index lies within five standard errors of the middle
    rows = task.rows["validation"].double()
    assert abs(rows.mean().item() / images - 0.5) < 5 / (12 * validation) ** 0.5
    # Meulemans' split of MNIST
    assert without_pixels(ImageClasses(validation=1 / 12), torch.zeros(60_000).long()).split_size("validation") == 5000


def test_fifty_images_of_each_class_of_imagenet32() -> None:
    labels = torch.tensor([0, 1, 5]).repeat_interleave(torch.tensor([60, 51, 90]))
    task = without_pixels(ImageClasses("imagenet32"), labels)
    assert labels[task.rows["validation"]].bincount().tolist() == [50, 50, 0, 0, 0, 50]
    assert labels[task.rows["train"]].bincount().tolist() == [10, 1, 0, 0, 0, 40]
    held_out = task.rows["validation"]
    assert sorted(held_out.tolist() + task.rows["train"].tolist()) == list(range(len(labels)))
    assert held_out[labels[held_out] == 5].sort().values.tolist() != list(range(111, 161)), "drawn at random"
    # a share is a share of all images
    share = without_pixels(ImageClasses("imagenet32", validation=0.5), labels)
    assert share.split_size("validation") == 100


@pytest.mark.parametrize("dataset", DATASETS)
def test_training_and_validation_images_share_none(dataset: str, tmp_path: Path) -> None:
    task = made(dataset, tmp_path)
    train, validation = task.rows["train"].tolist(), task.rows["validation"].tolist()
    assert sorted(train + validation) == list(range(len(task.data.train_labels)))
    assert len(validation) == round(0.25 * len(task.data.train_labels))
    assert sorted(validation) != list(range(len(validation)))
    again = replace(task)
    assert torch.equal(again.rows["validation"], task.rows["validation"])
    smaller = replace(task, train_size=4)
    assert torch.equal(smaller.rows["validation"], task.rows["validation"])
    assert smaller.rows["train"].tolist() == train[:4]
    everything = replace(task, validation=0.0)
    assert sorted(everything.rows["train"].tolist()) == list(range(len(task.data.train_labels)))


def found(images: torch.Tensor, task: ImageClasses) -> list[int]:
    """Which stored training images these are."""
    stored = task.data.train_images.view(-1, *task.shape).float() / 255
    return [int((stored == image).flatten(1).all(1).nonzero().item()) for image in images]


def test_epochs_run_through_the_training_images(tmp_path: Path) -> None:
    task = made("cifar10", tmp_path, normalization="none", augment=False)
    assert task.epoch_length(5) == 3
    epochs = [[row for at in range(3) for row in found(task.batch(1, 3 * e + at, 5).input, task)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(task.rows["train"].tolist())
    assert epochs[0] != epochs[1]
    assert sorted(found(task.validation_set(9, 5).input, task)) == sorted(task.rows["validation"].tolist())
    labels = task.data.train_labels
    batch = task.batch(1, 1, 5)
    assert torch.equal(batch.target, labels[found(batch.input, task)])
    few = replace(task, train_size=6)
    assert few.epoch_length(3) == 2
    assert set(found(few.batch(2, 7, 6).input, few)) == set(few.rows["train"].tolist())


def test_the_arrays_that_were_read_are_indexed_not_copied(tmp_path: Path) -> None:
    task = made("cifar10", tmp_path)
    images, before = task.data.train_images, task.data.train_images.clone()
    address = images.data_ptr()
    task.batch(1, 0, 5)
    task.validation_set(1, 5)
    assert task.data.train_images.data_ptr() == address
    assert images.dtype == torch.uint8
    assert torch.equal(images, before)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("dataset", DATASETS)
def test_batches_are_a_function_of_seed_and_iteration(dataset: str, augment: bool, tmp_path: Path) -> None:
    task = made(dataset, tmp_path, augment=augment)
    before = torch.get_rng_state()
    first = task.batch(7, 3, 6)
    task.batch(7, 4, 6)
    again = replace(task).batch(7, 3, 6)
    assert torch.equal(first.input, again.input)
    assert torch.equal(first.target, again.target)
    for other in (task.batch(7, 4, 6), task.batch(8, 3, 6)):
        assert not torch.equal(first.input, other.input)
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_changes_images_and_not_their_choice(tmp_path: Path) -> None:
    plain = made("cifar10", tmp_path, augment=False)
    changed = replace(plain, augment=True)
    for iteration in range(4):
        a, b = plain.batch(1, iteration, 5), changed.batch(1, iteration, 5)
        assert torch.equal(a.target, b.target)
        assert not torch.equal(a.input, b.input)
    assert torch.equal(plain.validation_set(1, 5).input, changed.validation_set(1, 5).input)
    assert torch.equal(plain.test_set(1, 4).input, changed.test_set(1, 4).input)
    # the same images in another epoch are changed otherwise
    one = replace(changed, train_size=1)
    assert len({one.batch(1, iteration, 1).input.numpy().tobytes() for iteration in range(20)}) > 10


def test_batches_are_normalised_after_padding(tmp_path: Path) -> None:
    """Published order: what is padded is pixels, so every value of a batch is that of some pixel."""
    task = made("cifar10", tmp_path, normalization="standard")
    raw = replace(task, normalization="none").batch(1, 0, 8).input.double()
    mean = torch.tensor([125.3, 123.0, 113.9]).double().view(3, 1, 1)
    std = torch.tensor([63.0, 62.1, 66.7]).double().view(3, 1, 1)
    expected = (raw * 255 - mean) / std
    torch.testing.assert_close(task.batch(1, 0, 8).input.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_evaluation_batches_run_once_through_a_set(split: str, batch_size: int, tmp_path: Path) -> None:
    task = made("mnist", tmp_path)
    batches = list(task.evaluation_batches(split, batch_size))
    size = {"train": 19, "validation": 6, "test": PARTS["t10k"]}[split]
    assert [len(batch.target) for batch in batches[:-1]] == [batch_size] * ((size - 1) // batch_size)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    stored = task.data.test_images if split == "test" else task.data.train_images
    classes = task.data.test_labels if split == "test" else task.data.train_labels
    rows = list(range(size)) if split == "test" else task.rows[split].tolist()
    torch.testing.assert_close(images, stored[rows].view(-1, 1, 28, 28).float() / 127.5 - 1, rtol=0, atol=1e-6)
    assert torch.equal(labels, classes[rows])
    if split != "train":
        whole = task.test_set(1, size) if split == "test" else task.validation_set(1, size)
        assert torch.equal(images, whole.input)


# --- augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flip", "padding"), [(0.5, 4), (0.0, 1), (1.0, 0), (0.3, 9)])
@pytest.mark.parametrize("shape", [(40, 3, 32, 32), (40, 1, 5, 8)])
def test_augmentation_equals_one_image_after_another(flip: float, padding: int, shape: tuple[int, ...]) -> None:
    images = torch.from_numpy(np.random.default_rng(1).integers(256, size=shape, dtype=np.uint8))
    random = np.random.default_rng(2)
    mirrored = random.random(len(images)) < flip
    shifts = random.integers(-padding, padding + 1, size=(2, len(images)))
    expected = np.empty(shape, dtype=np.uint8)
    height, width = shape[2:]
    for index, image in enumerate(images.numpy()):
        source = image[:, :, ::-1] if mirrored[index] else image
        padded = np.pad(source, ((0, 0), (padding, padding), (padding, padding)), mode="edge")
        top, left = shifts[:, index] + padding
        expected[index] = padded[:, top : top + height, left : left + width]
    assert np.array_equal(flip_and_crop(images, np.random.default_rng(2), flip=flip, padding=padding), expected)


def test_augmentation_is_uniform_over_flips_and_places() -> None:
    """Every output is one of the 2 x 5 x 5 possible ones, each as often as chance has it."""
    image = np.arange(2 * 6 * 7, dtype=np.uint8).reshape(2, 6, 7)
    outcomes = {}
    for flip in (0, 1):
        padded = np.pad(image[:, :, ::-1] if flip else image, ((0, 0), (2, 2), (2, 2)), mode="edge")
        for top in range(5):
            for left in range(5):
                outcomes[padded[:, top : top + 6, left : left + 7].tobytes()] = (flip, top, left)
    assert len(outcomes) == 50
    count = 10_000
    images = torch.from_numpy(image).expand(count, -1, -1, -1)
    output = flip_and_crop(images, np.random.default_rng(3), padding=2).numpy()
    drawn = [outcomes[one.tobytes()] for one in output]
    frequency = np.array([drawn.count(outcome) for outcome in outcomes.values()])
    assert np.abs(frequency - count / 50).max() < 5 * (count / 50) ** 0.5
    # neither the draws of an image nor those of two images hang together
    columns = np.array(drawn, dtype=float).T
    pairs = np.corrcoef(np.concatenate([columns[:, :-1], columns[:, 1:]]))
    assert np.abs(pairs - np.eye(6)).max() < 5 / count**0.5


def test_scikit_learns_digits_move_little_and_are_not_mirrored() -> None:
    pytest.importorskip("sklearn")
    task = ImageClasses("digits", "none", train_size=1)
    image = task.data.train_images[task.rows["train"][0]].view(8, 8).numpy() / 16
    padded = np.pad(image, 1, mode="edge")
    possible = {
        padded[top : top + 8, left : left + 8].astype(np.float32).tobytes() for top in (0, 1, 2) for left in (0, 1, 2)
    }
    drawn = {task.batch(1, iteration, 1).input.numpy().tobytes() for iteration in range(200)}
    assert drawn == possible


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_files(layout: str, tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path / layout)
    data = load_fashion_mnist(tmp_path)
    assert np.array_equal(data.train_images, arrays["train-images-idx3-ubyte"].reshape(-1, 784))
    assert np.array_equal(data.test_labels, arrays["t10k-labels-idx1-ubyte"])


def test_fashion_mnist_is_never_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_mnist(tmp_path / "fashion-mnist", fill=7)
    assert load_fashion_mnist(tmp_path).train_images.unique().tolist() == [7]
    assert len(load_mnist(tmp_path).train_images.unique()) == 256
    for stem in STEMS:
        for name in (stem, f"{stem}.gz"):
            (tmp_path / "fashion-mnist" / name).unlink(missing_ok=True)
    with pytest.raises(MissingDataError, match=r"Fashion-MNIST: .*lacks train-im.*in its folder fashion-mnist.*--data"):
        load_fashion_mnist(tmp_path)


def test_fashion_mnist_is_downloaded_into_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_mnist(tmp_path / "origin")
    asked = []

    def fetch(url: str, known_hash: str, fname: str, path: Path) -> None:
        asked.append((url, known_hash))
        values = arrays[fname.removesuffix(".gz")].astype(np.uint8)
        path.mkdir(parents=True, exist_ok=True)
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (path / fname).write_bytes(gzip.compress(header + values.tobytes()))

    monkeypatch.setenv("TPEXT_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(pooch, "retrieve", fetch)
    write_mnist(tmp_path / "cache")
    assert len(load_fashion_mnist().train_labels) == PARTS["train"]
    server = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    assert asked == [
        (server + "train-images-idx3-ubyte.gz", "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        (server + "train-labels-idx1-ubyte.gz", "md5:25c81989df183df01b3e8a0aad5dffbe"),
        (server + "t10k-images-idx3-ubyte.gz", "md5:bef4ecab320f06d8554ea6380940ec79"),
        (server + "t10k-labels-idx1-ubyte.gz", "md5:bb300cfdad3c16e7a12a480ee83cd310"),
    ]
    assert len(list((tmp_path / "cache" / "fashion-mnist").iterdir())) == 4
    load_fashion_mnist()
    assert len(asked) == 4


@pytest.mark.parametrize("place", [".", "imagenet32"])
def test_imagenet32_files(place: str, tmp_path: Path) -> None:
    contents = write_imagenet32(tmp_path / place)
    data = load_imagenet32(tmp_path)
    assert np.array_equal(data.train_images, np.concatenate([contents[name]["data"] for name in TRAIN_FILES]))
    expected = np.concatenate([contents[name]["labels"] for name in TRAIN_FILES]) - 1
    assert np.array_equal(data.train_labels, expected)
    assert np.array_equal(data.test_images, contents[TEST_FILE]["data"])
    assert np.array_equal(data.test_labels, np.array(contents[TEST_FILE]["labels"]) - 1)
    assert (data.train_images.dtype, data.train_labels.dtype) == (torch.uint8, torch.int64)


def test_missing_imagenet32_files_are_named(tmp_path: Path) -> None:
    write_imagenet32(tmp_path)
    (tmp_path / "train_data_batch_10").unlink()
    with pytest.raises(MissingDataError, match=r"ImageNet32: .*lacks train_data_batch_10\. .*--data-dir DIR"):
        load_imagenet32(tmp_path)


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did: as bytes with no encoding, NumPy's modules by their old names."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    def save_string(self, value: str) -> None:
        self.save_bytes(value.encode("latin1"))

    dispatch[bytes] = save_bytes
    dispatch[str] = save_string


def python2_pickle(value: object, path: Path) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


IMAGES = np.random.default_rng(5).integers(256, size=(3, 3072), dtype=np.uint8)


@pytest.mark.parametrize("version", [*range(pickle.HIGHEST_PROTOCOL + 1), "python 2"])
@pytest.mark.parametrize("labels", ["list", "array", "big-endian array"])
@pytest.mark.parametrize("memory", ["rows", "columns"])
def test_every_pickle_protocol(version: int | str, labels: str, memory: str, tmp_path: Path) -> None:
    classes: object = [1, 1000, 7]
    if labels != "list":
        classes = np.array(classes, dtype=">i4" if labels == "big-endian array" else "<i8")
    images = np.asfortranarray(IMAGES) if memory == "columns" else IMAGES
    content = {"data": images, "labels": classes, "mean": IMAGES.mean(0)}
    if version == "python 2":
        python2_pickle(content, tmp_path / "batch")
    else:
        (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=version))
    data, numbers = read_batch(tmp_path / "batch")
    assert np.array_equal(data, IMAGES)
    assert numbers.tolist() == [0, 999, 6]
    assert (data.dtype, numbers.dtype) == (np.uint8, np.int64)


def test_bytes_as_keys(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps({b"data": IMAGES, b"labels": [1, 2, 3]}))
    assert read_batch(tmp_path / "batch")[1].tolist() == [0, 1, 2]


class Call:
    """Unpickled, calls a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["labels", "other key", "instead"])
@pytest.mark.parametrize("function", [os.mkdir, exec, getattr, np.load, np.fromfile])
def test_a_malicious_pickle_is_refused(protocol: int, place: str, function: object, tmp_path: Path) -> None:
    target = str(tmp_path / "made by the pickle")
    arguments = {
        os.mkdir: (target,),
        exec: (f"import os; os.mkdir({target!r})",),
        getattr: (IMAGES, "tofile"),
    }.get(function, (target,))
    call = Call(function, *arguments)
    content = {
        "labels": {"data": IMAGES, "labels": call},
        "other key": {"data": IMAGES, "labels": [1, 2, 3], "mean": call},
        "instead": call,
    }[place]
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(
        ValueError, match=rf"batch: refused: it names .*{function.__name__}, for which a file of images"
    ):
        read_batch(tmp_path / "batch")
    assert not Path(target).exists()


@pytest.mark.parametrize(
    "content",
    [
        # attributes of what is allowed
        b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
        b"c_codecs\nencode.__class__\n.",
        # a method put onto what is allowed, or onto what was made of it
        b"cnumpy\nndarray\n(N}S'array'\nI1\nstb.",
        b"c_codecs\nencode\n(N}S'__doc__'\nI1\nstb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR}S'array'\nI1\nsb.",
        # a dtype of Python objects, of fields, of no known name
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
        b"cnumpy\ndtype\n(S'u1,O8'\nI0\nI1\ntR.",
        # an array over bytes that it does not have
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I4\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS'abc'\ntb.",
    ],
)
def test_what_is_allowed_cannot_be_misused(content: bytes, tmp_path: Path) -> None:
    attributes = set(vars(_PickledArray))
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"batch: "):
        read_batch(tmp_path / "batch")
    assert set(vars(_PickledArray)) == attributes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([IMAGES], "must hold a dictionary with data and labels, got list"),
        ({"data": IMAGES}, "must hold a dictionary with data and labels, got one with ['data']"),
        (
            {"data": IMAGES.astype(np.int16), "labels": [1, 2, 3]},
            "data must be uint8 [N > 0, 3072], got int16 [3, 3072]",
        ),
        ({"data": IMAGES[:, 1:], "labels": [1, 2, 3]}, "data must be uint8 [N > 0, 3072], got uint8 [3, 3071]"),
        ({"data": IMAGES[:0], "labels": []}, "data must be uint8 [N > 0, 3072], got uint8 [0, 3072]"),
        ({"data": IMAGES, "labels": [1, 2]}, "labels must be N=3 integers, got int64 [2]"),
        ({"data": IMAGES, "labels": [1, 2, 3.0]}, "labels must be N=3 integers, got float64 [3]"),
        ({"data": IMAGES, "labels": [0, 2, 3]}, "labels must be 1..1000, got 0..3"),
        ({"data": IMAGES, "labels": [1, 2, 1001]}, "labels must be 1..1000, got 1..1001"),
        ({"data": IMAGES, "labels": np.array([1, 2, 3], dtype=object)}, "arrays must be of integers or floating-point"),
    ],
)
def test_wrong_imagenet32_contents_are_named(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=re.escape("batch: " + message)):
        read_batch(tmp_path / "batch")


def test_broken_imagenet32_files_are_named(tmp_path: Path) -> None:
    whole = pickle.dumps({"data": IMAGES, "labels": [1, 2, 3]})
    for content in (b"", b"PK\x03\x04", whole[:-1], whole[:100], whole[:5000]):
        (tmp_path / "batch").write_bytes(content)
        with pytest.raises(ValueError, match=r"batch: ."):
            read_batch(tmp_path / "batch")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "cifar"}, "dataset must be one of cifar10, mnist, fashion-mnist, digits, imagenet32, got 'cifar'"),
        ({"normalization": "batch"}, "normalization must be one of standard, 3xstd, meulemans, none for cifar10"),
        ({"dataset": "mnist", "normalization": "3xstd"}, "one of standard, meulemans, none for mnist, got '3xstd'"),
        ({"dataset": "imagenet32", "normalization": "meulemans"}, "one of standard, none for imagenet32"),
        ({"validation": 1.0}, "validation must be None or in [0, 1), got 1.0"),
        ({"validation": -0.1}, "validation must be None or in [0, 1), got -0.1"),
        ({"validation": float("nan")}, "validation must be None or in [0, 1), got nan"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageClasses(**arguments)


def test_sizes_out_of_range_are_named(tmp_path: Path) -> None:
    task = made("cifar10", tmp_path)
    for call, message in (
        (lambda: task.test_set(1, 5), "test_size must be 1 .. 4 (the test images), got 5"),
        (lambda: task.validation_set(1, 6), "validation_size must be 1 .. 5 (the validation images), got 6"),
        (lambda: task.batch(1, 0, 16), "batch_size must be at most 15 (the training samples), got 16"),
        (lambda: task.split_size("dev"), "split must be one of train, validation, test, got 'dev'"),
        (lambda: task.evaluation_batches("dev", 2), "split must be one of train, validation, test, got 'dev'"),
        (lambda: task.evaluation_batches("test", 0), "batch_size must be >= 1, got 0"),
        (
            lambda: replace(task, train_size=16).batch(1, 0, 1),
            "train_size must be 1 .. 15 (the training images), got 16",
        ),
        (lambda: replace(task, train_size=0).batch(1, 0, 1), "train_size must be 1 .. 15 (the training images), got 0"),
        (lambda: ImageClasses("digits", data_dir=tmp_path).data, "data_dir does not belong to digits"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


# --- sets of one's own ------------------------------------------------------------------------------------------------

SHAPE = (2, 3, 4)
SCALES = {"standard": ((0.5,), (0.5,)), "none": ((0.0,), (1.0,))}
PIXELS = np.random.default_rng(1).integers(256, size=(30, *SHAPE)).astype("uint8")
PIXELS[:, 0, 0, :2] = 0, 255
LABELS = np.arange(30) % 3


def own(images: Any = PIXELS, labels: Any = LABELS, shape: tuple[int, ...] = SHAPE, **options: Any) -> ImageClasses:
    """A task on a set of one's own, of 20 images to train on and 10 for the test."""

    def load(folder: Path | None) -> Images:
        return Images(images[:20], labels[:20], images[20:], labels[20:])

    return ImageClasses(ImageSet(load, shape, SCALES, **options), "none")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "images",
    [
        PIXELS,
        torch.from_numpy(PIXELS),
        PIXELS.reshape(30, 24),
        np.asfortranarray(PIXELS.reshape(30, 24)),
        PIXELS[:, :, :, ::-1].copy()[:, :, :, ::-1],
        PIXELS / 255,
        (PIXELS / 255).astype("float16"),
    ],
    ids=["array", "tensor", "flat", "columns", "reversed", "float64", "float16"],
)
@pytest.mark.parametrize("labels", [LABELS, torch.from_numpy(LABELS), LABELS.astype("int32"), LABELS.astype("uint8")])
def test_a_set_of_ones_own_is_arrays_or_tensors(images: Any, labels: Any) -> None:
    task = own(images, labels)
    assert (task.output_size, task.default_test_size, task.split_size("test")) == (3, 10, 10)
    input, target = task.test_set(1, 10)
    expected = torch.from_numpy(PIXELS[20:] / 255).float()
    torch.testing.assert_close(input, expected, rtol=0, atol=1e-3 if images.dtype == np.float16 else 1e-6)
    assert target.tolist() == LABELS[20:].tolist()
    assert {tuple(image.flatten().tolist()) for image in task.batch(1, 0, 18).input} <= {
        tuple(image.flatten().tolist()) for image in ImageClasses.evaluation_batches(task, "train", 18).__next__().input
    }, "not augmented unless the set says so"


def test_one_plane_needs_no_axis_of_its_own() -> None:
    plane = PIXELS[:, 0]
    task = own(plane, shape=(1, 3, 4))
    torch.testing.assert_close(task.test_set(1, 10).input, torch.from_numpy(plane[20:, None] / 255).float())


@pytest.mark.parametrize(("largest", "divisor"), [(None, 255), (300.0, 300)])
def test_the_largest_pixel_becomes_one(largest: float | None, divisor: float) -> None:
    expected = torch.from_numpy(PIXELS[20:] / divisor).float()
    torch.testing.assert_close(own(largest=largest).test_set(1, 10).input, expected)


def test_pixels_that_were_normalised_stay_as_they_are_with_largest_one() -> None:
    normal = np.random.default_rng(1).normal(size=(30, *SHAPE))
    torch.testing.assert_close(own(normal, largest=1.0).test_set(1, 10).input, torch.from_numpy(normal[20:]).float())


ONE_HOT = np.eye(3, dtype="int64")[LABELS]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: own(PIXELS.transpose(0, 2, 3, 1)),
            "train_images must be [N, 2, 3, 4] or [N, 24], as the set's shape is (2, 3, 4), got [20, 3, 4, 2]; the "
            "planes come first: images.transpose(0, 3, 1, 2)",
        ),
        (lambda: own(PIXELS[:, :1]), "train_images must be [N, 2, 3, 4] or [N, 24], as the set's shape is"),
        (
            lambda: own(PIXELS[:, 0], shape=(1, 4, 4)),
            "must be [N, 1, 4, 4] or [N, 16] or [N, 4, 4], as the set's shape",
        ),
        (lambda: own(PIXELS.astype("int64")), "train_images must be bytes (uint8) or floating point, got torch.int64"),
        (lambda: own(PIXELS.astype(float)), "train_images must be within 0 .. 1 if floating-point, got 0 .. 255; give"),
        (
            lambda: own(PIXELS / 127.5 - 1),
            "train_images must be within 0 .. 1 if floating-point, got -1 .. 1; give the",
        ),
        (lambda: own(PIXELS / 255 * np.nan), "train_images must be finite, got 480 numbers that are not"),
        (lambda: own(largest=1.0), "train_images must be at most largest = 1, got 255"),
        (lambda: own(PIXELS.astype(str)), "train_images must be an array of numbers, got ndarray: dtype <U3"),
        (
            lambda: own(PIXELS[:20]),
            "test_images and test_labels must have the same number of images in front, got [0, 2",
        ),
        (lambda: own(PIXELS[:20], LABELS[:20]), "test_images must be at least one image, got [0, 2, 3, 4]"),
        (lambda: own(labels=LABELS[:-1]), "test_images and test_labels must have the same number of images in front"),
        (lambda: own(labels=ONE_HOT), "train_labels must be classes [N], got [20, 3]; one-hot rows do by argmax(1)"),
        (lambda: own(labels=LABELS[:, None]), "must be classes [N], got [20, 1]; a column becomes that by ravel()"),
        (lambda: own(labels=LABELS.astype(float)), "classes 0 .. as integers, got torch.float64; whole numbers become"),
        (
            lambda: own(labels=LABELS.astype(str)),
            "train_labels must be an array of numbers, got ndarray: dtype <U21; names of classes ",
        ),
        (lambda: own(labels=LABELS - 1), "train_labels must be classes 0 .., got -1"),
        (lambda: own(labels=LABELS + 1, n_classes=3), "must be classes 0 .. 2, got 3; they count from 0: labels - 1"),
        (lambda: own(n_classes=2), "train_labels must be classes 0 .. 1, got 2"),
        (lambda: own(test_size=9), "test_size must be 10 (the test images) or None, got 9"),
    ],
)
def test_arrays_that_do_not_fit_are_named(make: Callable[[], ImageClasses], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make().split_size("train")
    assert str(error.value).startswith("ImageSet(own.<locals>.load): ")


def test_parts_of_two_kinds_and_what_is_no_images_are_refused() -> None:
    mixed = Images(PIXELS[:20], LABELS[:20], PIXELS[20:] / 255, LABELS[20:])
    for loaded, message in (
        (mixed, "test_images must be torch.uint8 as train_images are, got torch.float32"),
        (tuple(vars(mixed).values()), "load must return tpext.tasks.idx.Images, got tuple"),
    ):
        task = ImageClasses(ImageSet(lambda folder, loaded=loaded: loaded, SHAPE, SCALES))
        with pytest.raises(ValueError, match=re.escape(message)):
            _ = task.data


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        (LABELS, {}, None),
        (LABELS + 1, {}, "train_labels has no image of class 0, of 0 .. 3; the network gets an output for each"),
        (LABELS, {"n_classes": 5}, "train_labels has no image of class 3, 4, of 0 .. 4;"),
    ],
)
def test_a_class_without_training_images_brings_a_warning(labels: Any, options: Any, says: str | None) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _ = own(labels=labels, **options).data
    assert [says in str(one.message) for one in seen] == ([] if says is None else [True])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": [1, 8, 8]}, "shape must be a tuple of integers >= 1"),
        ({"largest": "255"}, "largest must be None or a finite number > 0, got '255'"),
        ({"shape": (3, 4)}, "shape must be a tuple of integers >= 1, (planes, height, width), got (3, 4)"),
        ({"shape": (2, 3, 0)}, "shape must be a tuple of integers >= 1, (planes, height, width), got (2, 3, 0)"),
        ({"scales": {}}, "scales must be a dict such as"),
        (
            {"scales": {"standard": (0.5, 0.5)}},
            "scales['standard'] must be a mean and a standard deviation > 0, 1 or 2",
        ),
        ({"scales": {"none": ((0.0,) * 3, (1.0,) * 3)}}, "scales['none'] must be a mean and a standard deviation > 0"),
        ({"scales": {"none": ((0.0,), (0.0,))}}, "scales['none'] must be a mean and a standard deviation > 0"),
        ({"n_classes": 0}, "n_classes must be None or an integer >= 1, got 0"),
        ({"test_size": 2.5}, "test_size must be None or an integer >= 1, got 2.5"),
        ({"held_out_per_class": -1}, "held_out_per_class must be None or an integer >= 0, got -1"),
        ({"largest": 0.0}, "largest must be None or a finite number > 0, got 0.0"),
        ({"flip": 1.5}, "flip must be a probability, 0 .. 1, got 1.5"),
        ({"padding": -1}, "padding must be an integer >= 0, of pixels, got -1"),
    ],
)
def test_fields_of_a_set_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"ImageSet: {message}")):
        ImageSet(**{"load": load_mnist, "shape": SHAPE, "scales": SCALES, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, None),
        ({"flip": 0.5}, "mirrored"),
        ({"padding": 1}, "moved by up to 1 pixel"),
        ({"flip": 0.1, "padding": 3}, "mirrored and moved by up to 3 pixels"),
    ],
)
def test_augmentation_in_words(options: dict[str, Any], says: str | None) -> None:
    task = own(**options)
    assert task.augmentation == says
    assert replace(task, augment=False).augmentation is None


def test_augmentation_of_the_packages_sets_is_as_published() -> None:
    found = {name: (images.flip, images.padding) for name, images in IMAGE_SETS.items()}
    assert found == {**dict.fromkeys(("cifar10", "mnist", "fashion-mnist", "imagenet32"), (0.5, 4)), "digits": (0.0, 1)}


def test_check_task_takes_a_set_of_ones_own() -> None:
    check_task(own())
    check_task(own(flip=0.5, padding=1, largest=255.0))
    with pytest.raises(AssertionError, match=r"train_labels must be classes \[N\], got \[20, 3\]"):
        check_task(own(labels=ONE_HOT))
    with pytest.raises(TypeError, match=r"an ImageSet is checked as ImageClasses\(dataset=..\)"):
        check_task(own().dataset)  # type: ignore[arg-type]


# --- the real sets ---------------------------------------------------------------------------------------------------


def test_real_mnist_has_mean_zero_and_deviation_one(shared: Path) -> None:
    """Meulemans' numbers are MNIST's own mean and deviation, of all 60,000 images."""
    task = ImageClasses("mnist", "meulemans", validation=0.0, data_dir=shared / "data")
    total = squares = 0.0
    for batch in task.evaluation_batches("train", 10_000):
        total += batch.input.double().mean().item() / 6
        squares += batch.input.double().square().mean().item() / 6
    assert abs(total) < 3e-4
    assert abs(squares**0.5 - 1) < 3e-4
    whole = ImageClasses("mnist", data_dir=shared / "data")
    assert [whole.split_size(split) for split in ("train", "validation", "test")] == [54_000, 6_000, 10_000]
