"""Image classification for convolutional networks: normalised, split and augmented as published."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tpext.tasks.augmentation import flip_and_crop
from tpext.tasks.base import (
    AUGMENTATION_STREAM,
    SPLIT_STREAM,
    Batch,
    Criterion,
    Task,
    epoch_batches,
    epoch_rows,
    random_generator,
)
from tpext.tasks.checks import as_tensor, finite, same_count, warn_of_gaps
from tpext.tasks.idx import Images, load_fashion_mnist, load_mnist
from tpext.tasks.imagenet32 import load_imagenet32
from tpext.tasks.images import load_cifar10, load_digits

Normalization = Literal["standard", "3xstd", "meulemans", "none"]
Split = Literal["train", "validation", "test"]

SPLIT_SEED = 42
"""Seed of the order of the training images whose first ones are the validation set, whatever a run's seed is."""


@dataclass(frozen=True)
class ImageSet:
    """A set of images with one class each: where it comes from, its sizes, how images are normalised and augmented.

    A new set is one file of this package that adds an ``ImageSet`` to :data:`IMAGE_SETS`; or one outside, which
    ``tpext train images --dataset file.py:NAME`` names. What ``load`` returns is checked when it is first asked for.

    Args:
        load: returns the images and their classes, :class:`tpext.tasks.idx.Images` of arrays or tensors, of the files
            in a folder; the folder is that of ``--data-dir``, None the cache folder. Images are ``[N, C, H, W]`` or
            ``[N, C * H * W]``, of one plane ``[N, H, W]`` too: bytes (uint8), or floating point. Classes are ``[N]``
            integers from 0.
        shape: planes C, height H and width W of an image, in pixels.
        scales: mean and standard deviation by the names of normalisations, each one number for all planes or one a
            plane. They are of pixels divided by ``largest``. The default of a run is the one named "standard".
        n_classes: number of classes, and of the network's outputs; None is the largest class + 1. Then the files are
            read wherever a network is built.
        test_size: number of test images; None is as many as there are. Another number than there are is refused.
        largest: the pixel value that becomes 1; None is 255 for bytes and 1 for floating point. Floating-point pixels
            that have been normalised already need it: 1.0 leaves them as they are.
        flip: probability that augmentation mirrors a training image left to right, 0 .. 1.
        padding: pixels by which augmentation moves a training image at most, up or down and left or right, >= 0. The
            border repeats. With ``flip`` and ``padding`` 0, the default, images are not augmented.
        held_out_per_class: images of each class in the validation set; None is a tenth of all training images.
        has_files: whether ``load`` reads a folder that ``--data-dir`` may name; without it ``--data-dir`` is refused.

    Raises:
        ValueError: an argument out of its range.
    """

    load: Callable[[Path | None], Images]
    shape: tuple[int, int, int]
    scales: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    n_classes: int | None = None
    test_size: int | None = None
    largest: float | None = None
    flip: float = 0.0
    padding: int = 0
    held_out_per_class: int | None = None
    has_files: bool = True

    def __post_init__(self) -> None:
        shape: object = self.shape
        if not isinstance(shape, tuple) or len(shape) != 3 or not all(_is_integer(size, 1) for size in shape):
            raise ValueError(
                f"ImageSet: shape must be a tuple of integers >= 1, (planes, height, width), got {shape!r}"
            )
        scales: object = self.scales
        if not isinstance(scales, dict) or not scales:
            raise ValueError(
                f'ImageSet: scales must be a dict such as {{"standard": ((0.5,), (0.5,))}}, got {scales!r}'
            )
        for name, scale in self.scales.items():
            self._check_scale(f"ImageSet: scales[{name!r}]", scale)
        for name, low in (("n_classes", 1), ("test_size", 1), ("held_out_per_class", 0)):
            value = getattr(self, name)
            if value is not None and not _is_integer(value, low):
                raise ValueError(f"ImageSet: {name} must be None or an integer >= {low}, got {value!r}")
        if self.largest is not None and not (isinstance(self.largest, numbers.Real) and 0 < self.largest < math.inf):
            raise ValueError(f"ImageSet: largest must be None or a finite number > 0, got {self.largest!r}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"ImageSet: flip must be a probability, 0 .. 1, got {self.flip!r}")
        if not _is_integer(self.padding, 0):
            raise ValueError(f"ImageSet: padding must be an integer >= 0, of pixels, got {self.padding!r}")

    def _check_scale(self, name: str, scale: object) -> None:
        planes = self.shape[0]
        try:
            mean, deviation = np.asarray(scale, dtype=float)
            right = mean.shape in ((1,), (planes,)) and bool(np.isfinite(mean).all() and (deviation > 0).all())
        except (TypeError, ValueError):
            right = False
        if not right:
            count = "1 number" if planes == 1 else f"1 or {planes} numbers"
            like = "such as ((0.5,), (0.5,))"
            raise ValueError(f"{name} must be a mean and a standard deviation > 0, {count} each, {like}, got {scale!r}")

    @property
    def augmentation(self) -> str | None:
        """What augmentation does to training images, in words; None if it leaves them as they are."""
        parts = ["mirrored"] if self.flip else []
        if self.padding:
            parts.append(f"moved by up to {self.padding} pixel{'s' * (self.padding != 1)}")
        return " and ".join(parts) or None

    def read(self, folder: Path | None, name: str) -> Images:
        """Return what ``load`` returns as tensors: images ``[N, C * H * W]``, classes ``[N]`` int64.

        Args:
            folder: of the files; None is the cache folder.
            name: of the set, for errors.

        Raises:
            ValueError: arrays that do not go together, or with the set's sizes, named.
        """
        loaded: object = self.load(folder)
        if not isinstance(loaded, Images):
            raise ValueError(f"{name}: load must return tpext.tasks.idx.Images, got {type(loaded).__name__}")
        parts = []
        for part in ("train", "test"):
            images = as_tensor(f"{name}: {part}_images", getattr(loaded, f"{part}_images"))
            labels = as_tensor(f"{name}: {part}_labels", getattr(loaded, f"{part}_labels"))
            same_count(f"{name}: {part}_images", images, f"{part}_labels", labels, "images")
            images = self._checked_images(f"{name}: {part}_images", images)
            parts += [images, _classes(f"{name}: {part}_labels", labels, self.n_classes)]
        found = Images(*parts)
        if found.train_images.dtype != found.test_images.dtype:
            kinds = found.train_images.dtype, found.test_images.dtype
            raise ValueError(f"{name}: test_images must be {kinds[0]} as train_images are, got {kinds[1]}")
        return found

    def _checked_images(self, name: str, images: Tensor) -> Tensor:
        planes, height, width = self.shape
        layouts = {"C, H, W": self.shape, "C * H * W": (math.prod(self.shape),)}
        if planes == 1:
            layouts["H, W"] = (height, width)
        if images.shape[1:] not in layouts.values():
            sizes = " or ".join(f"[N, {', '.join(map(str, sizes))}]" for sizes in layouts.values())
            more = ""
            if images.shape[1:] == (height, width, planes):
                more = "; the planes come first: images.transpose(0, 3, 1, 2) of an array, permute of a tensor"
            raise ValueError(
                f"{name} must be {sizes}, as the set's shape is {self.shape}, got {list(images.shape)}{more}"
            )
        if len(images) == 0:
            raise ValueError(f"{name} must be at least one image, got {list(images.shape)}")
        if images.dtype == torch.uint8:
            if self.largest is not None and self.largest < 255 and (high := int(images.max())) > self.largest:
                raise ValueError(f"{name} must be at most largest = {self.largest:g}, got {high}")
        elif images.is_floating_point():
            images = finite(name, images.to(torch.float32))
            lowest, highest = float(images.min()), float(images.max())
            # images that were resized go beyond by a little
            if self.largest is None and not (lowest >= -_BEYOND and highest <= 1 + _BEYOND):
                more = "; give the ImageSet largest=, the value that becomes 1"
                raise ValueError(f"{name} must be within 0 .. 1 if floating-point, got {lowest:g} .. {highest:g}{more}")
        else:
            raise ValueError(f"{name} must be bytes (uint8) or floating point, got {images.dtype}")
        return images.reshape(len(images), -1).contiguous()


_BEYOND = 0.5
"""How far beyond 0 .. 1 floating-point pixels may be that have not been normalised."""


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= low


def _classes(name: str, labels: Tensor, n_classes: int | None) -> Tensor:
    last = ".." if n_classes is None else f".. {n_classes - 1}"
    if labels.dim() != 1:
        more = ""
        if labels.dim() == 2:
            more = "; a column becomes that by ravel()" if labels.shape[1] == 1 else "; one-hot rows do by argmax(1)"
        raise ValueError(f"{name} must be classes [N], got {list(labels.shape)}{more}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        more = "; whole numbers become that by astype('int64')"
        raise ValueError(f"{name} must be classes 0 {last} as integers, got {labels.dtype}{more}")
    classes = labels.to(torch.int64)
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or (n_classes is not None and high >= n_classes):
        more = "; they count from 0: labels - 1" if low == 1 and high == n_classes else ""
        raise ValueError(f"{name} must be classes 0 {last}, got {low if low < 0 else high}{more}")
    return classes


_HALF = ((0.5,), (0.5,))
_UNCHANGED = ((0.0,), (1.0,))

IMAGE_SETS: dict[str, ImageSet] = {
    "cifar10": ImageSet(
        load_cifar10,
        (3, 32, 32),
        {
            "standard": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
            "3xstd": ((0.4914, 0.4822, 0.4465), (3 * 0.2023, 3 * 0.1994, 3 * 0.2010)),
            "meulemans": _HALF,
            "none": _UNCHANGED,
        },
        n_classes=10,
        test_size=10_000,
        flip=0.5,
        padding=4,
    ),
    "mnist": ImageSet(
        load_mnist,
        (1, 28, 28),
        {"standard": _HALF, "meulemans": ((0.1307,), (0.3081,)), "none": _UNCHANGED},
        n_classes=10,
        test_size=10_000,
        flip=0.5,
        padding=4,
    ),
    "fashion-mnist": ImageSet(
        load_fashion_mnist,
        (1, 28, 28),
        {"standard": _HALF, "meulemans": _UNCHANGED, "none": _UNCHANGED},
        n_classes=10,
        test_size=10_000,
        flip=0.5,
        padding=4,
    ),
    "digits": ImageSet(
        lambda data_dir: load_digits(),
        (1, 8, 8),
        {"standard": _HALF, "none": _UNCHANGED},
        n_classes=10,
        test_size=360,
        largest=16.0,
        padding=1,
        has_files=False,
    ),
    "imagenet32": ImageSet(
        load_imagenet32,
        (3, 32, 32),
        {"standard": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "none": _UNCHANGED},
        n_classes=1000,
        test_size=50_000,
        flip=0.5,
        padding=4,
        held_out_per_class=50,
    ),
}
"""Every set of images by its name."""


@dataclass(frozen=True)
class ImageClasses(Task):
    """Name the class of an image ``[C, H, W]``.

    ================  ===========  =======  =====================================================================
    ``dataset``       image        classes  files
    ================  ===========  =======  =====================================================================
    "cifar10"         3 x 32 x 32  10       those of :func:`tpext.tasks.load_cifar10`
    "mnist"           1 x 28 x 28  10       those of :func:`tpext.tasks.load_mnist`
    "fashion-mnist"   1 x 28 x 28  10       those of :func:`tpext.tasks.load_fashion_mnist`
    "digits"          1 x 8 x 8    10       none: they come with scikit-learn
    "imagenet32"      3 x 32 x 32  1000     those of :func:`tpext.tasks.load_imagenet32`
    ================  ===========  =======  =====================================================================

    Input ``[B, C, H, W]`` float32, ``(pixel / 255 - mean) / std`` (digits: ``pixel / 16``), mean and standard deviation
    of each colour by ``normalization``:

    =============  =========================================  ===================  ==============  =======
    ..             CIFAR-10                                   MNIST                Fashion-MNIST   digits
    =============  =========================================  ===================  ==============  =======
    "standard"     (125.3, 123.0, 113.9) / 255;               .5; .5               .5; .5          .5; .5
                   (63.0, 62.1, 66.7) / 255
    "3xstd"        (.4914, .4822, .4465);                     --                   --              --
                   3 (.2023, .1994, .2010)
    "meulemans"    .5; .5                                     .1307; .3081         0; 1            --
    "none"         0; 1                                       0; 1                 0; 1            0; 1
    =============  =========================================  ===================  ==============  =======

    ImageNet32 knows "standard", (.485, .456, .406); (.229, .224, .225), and "none".

    Training batches run through epochs, each in an order of its own fixed by (seed, epoch); images left over at an
    epoch's end are dropped. Augmentation is :func:`tpext.tasks.augmentation.flip_and_crop` with numbers drawn for each
    (seed, iteration), before normalisation: images are mirrored with probability 1/2 and moved by up to 4 pixels. As
    published digits of MNIST are mirrored too. The images of scikit-learn's digits, of no publication, move by at most
    1 pixel and are not mirrored. An :class:`ImageSet` of your own is augmented as its ``flip`` and ``padding`` say.

    The validation set is taken out of the training images, at random but the same for every seed and ``train_size``.
    All sets index the arrays that were read: pixels stay uint8 and are converted batch by batch.

    Args:
        dataset: see above; or an :class:`ImageSet` of your own.
        normalization: see above. "standard" is Ernoult's (2022), "3xstd" that of their older code.
        augment: change training images at random. Meulemans does not.
        validation: share of the training images that are kept for validation, 0 <= share < 1; None is as published: a
            tenth, of ImageNet32 50 images a class. (Meulemans keeps 5,000 images of MNIST too, which is 1 / 12.)
        train_size: number of the other images to train on, drawn at random, the same for every seed; None is all.
        data_dir: folder of the files, which are read when the first batch is asked for.

    Raises:
        ValueError: an argument out of its range, a normalisation that the set does not have.

    Source: Ernoult et al., "Towards Scaling Difference Target Propagation by Learning Backprop Targets", ICML 2022;
    Meulemans et al., "A Theoretical Framework for Target Propagation", NeurIPS 2020; and their code.

    >>> task = ImageClasses("digits")
    >>> task.shape, task.split_size("train"), task.split_size("validation"), task.split_size("test")
    ((1, 8, 8), 1293, 144, 360)
    >>> task.batch(seed=1, iteration=0, batch_size=20).input.shape
    torch.Size([20, 1, 8, 8])
    """

    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the class"

    dataset: str | ImageSet = "cifar10"
    normalization: Normalization = "standard"
    augment: bool = True
    validation: float | None = None
    train_size: int | None = None
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, ImageSet) and self.dataset not in IMAGE_SETS:
            raise ValueError(f"ImageClasses: dataset must be one of {', '.join(IMAGE_SETS)}, got {self.dataset!r}")
        if self.data_dir is not None and not self._set.has_files:
            raise ValueError(f"ImageClasses: data_dir does not belong to {self.name}, which has no files")
        if self.normalization not in self._set.scales:
            known = ", ".join(self._set.scales)
            raise ValueError(
                f"ImageClasses: normalization must be one of {known} for {self.name}, got {self.normalization!r}"
            )
        if self.validation is not None and not 0 <= self.validation < 1:
            raise ValueError(f"ImageClasses: validation must be None or in [0, 1), got {self.validation}")

    @property
    def name(self) -> str:
        """The set's name; of one of your own that of its ``load``."""
        if isinstance(self.dataset, str):
            return self.dataset
        return f"ImageSet({getattr(self.dataset.load, '__qualname__', 'load')})"

    @property
    def default_test_size(self) -> int:  # type: ignore[override]  # the whole test set
        size = self._set.test_size
        return len(self.data.test_labels) if size is None else size

    @property
    def augmentation(self) -> str | None:
        """What happens to training images at random, in words; None if nothing does."""
        return self._set.augmentation if self.augment else None

    @property
    def _set(self) -> ImageSet:
        return IMAGE_SETS[self.dataset] if isinstance(self.dataset, str) else self.dataset

    @property
    def shape(self) -> tuple[int, int, int]:
        """Planes, height and width of an image."""
        return self._set.shape

    @property
    def input_size(self) -> int:
        return math.prod(self.shape)

    @property
    def output_size(self) -> int:
        return _highest(self.data) + 1 if self._set.n_classes is None else self._set.n_classes

    @functools.cached_property
    def data(self) -> Images:
        """All images and labels, validation among the training ones, read and checked when first asked for.

        Raises:
            ValueError: they do not go together, or with the set's sizes.
        """
        own = self._set
        data = own.read(self.data_dir, self.name)
        # the package's sets are known, and tests have parts of them
        if isinstance(self.dataset, ImageSet):
            count = len(data.test_labels)
            if own.test_size not in (None, count):
                raise ValueError(
                    f"{self.name}: test_size must be {count} (the test images) or None, got {own.test_size}"
                )
            highest = _highest(data) if own.n_classes is None else own.n_classes - 1
            warn_of_gaps(f"{self.name}: train_labels", "image", data.train_labels, highest, own.load)
        return data

    @functools.cached_property
    def rows(self) -> dict[Split, Tensor]:
        """Which stored images are in each set: int64 indices, of the test images for "test"."""
        labels, size = self.data.train_labels, self.train_size
        order = torch.from_numpy(random_generator(SPLIT_SEED, SPLIT_STREAM).permutation(len(labels)))
        if self.validation is None and self._set.held_out_per_class is not None:
            held_out = _rank_in_class(labels[order]) < self._set.held_out_per_class
        else:
            share = 0.1 if self.validation is None else self.validation
            held_out = torch.arange(len(labels)) < round(share * len(labels))
        train = order[~held_out]
        if size is not None and not 1 <= size <= len(train):
            raise ValueError(f"train_size must be 1 .. {len(train)} (the training images), got {size}")
        return {
            "train": train[:size],
            "validation": order[held_out],
            "test": torch.arange(len(self.data.test_labels)),
        }

    def split_size(self, split: Split) -> int:
        """Return the number of images to train on, for validation or for the test.

        Raises:
            ValueError: an unknown name.
        """
        if split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
        return len(self.rows[split])

    def epoch_length(self, batch_size: int) -> int:
        return epoch_batches(batch_size, self.split_size("train"))

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        train = self.rows["train"]
        rows = train[epoch_rows(seed, iteration, batch_size, len(train))]
        images = self._images("train", rows)
        if self.augment:
            random = random_generator(seed, AUGMENTATION_STREAM, iteration)
            images = flip_and_crop(images, random, flip=self._set.flip, padding=self._set.padding)
        return Batch(self._normalised(images), self.data.train_labels[rows])

    def test_set(self, seed: int, size: int) -> Batch:
        return self._first("test", size)

    def validation_set(self, seed: int, size: int) -> Batch:
        """Return the first images of the validation set, not augmented.

        Args:
            seed: changes nothing, as in :meth:`test_set`.
            size: number of images, 1 .. ``split_size("validation")``.
        """
        return self._first("validation", size)

    def evaluation_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """Return an iterator over all images of a set, each once and not augmented, in memory one batch at a time.

        Args:
            split: "train", "validation" or "test".
            batch_size: images in a batch, >= 1; the last one has what is left.

        Raises:
            ValueError: an unknown set, a ``batch_size`` below 1.
        """
        size = self.split_size(split)
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        starts = range(0, size, batch_size)
        return (self._plain(split, slice(start, start + batch_size)) for start in starts)

    def _first(self, split: Split, size: int) -> Batch:
        if not 1 <= size <= self.split_size(split):
            raise ValueError(f"{split}_size must be 1 .. {self.split_size(split)} (the {split} images), got {size}")
        return self._plain(split, slice(size))

    def _plain(self, split: Split, part: slice) -> Batch:
        """Images of a set as they are, but for normalisation."""
        rows = self.rows[split][part]
        labels = self.data.test_labels if split == "test" else self.data.train_labels
        return Batch(self._normalised(self._images(split, rows)), labels[rows])

    def _images(self, split: Split, rows: Tensor) -> Tensor:
        images = self.data.test_images if split == "test" else self.data.train_images
        return images[rows].view(-1, *self.shape)

    def _normalised(self, images: Tensor) -> Tensor:
        largest = self._set.largest or (1.0 if images.is_floating_point() else 255.0)
        mean, deviation = (
            torch.tensor([largest * value for value in values]).view(-1, 1, 1)
            for values in self._set.scales[self.normalization]
        )
        return images.to(torch.float32).sub_(mean).div_(deviation)


def _highest(data: Images) -> int:
    """Return the largest class."""
    return int(max(data.train_labels.max(), data.test_labels.max()))


def _rank_in_class(labels: Tensor) -> Tensor:
    """Return how many labels before each are equal to it."""
    classes = labels.numpy()
    by_class = np.argsort(classes, kind="stable")
    counts = np.bincount(classes)
    ranks = np.empty_like(by_class)
    ranks[by_class] = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return torch.from_numpy(ranks)
