"""Image classification for convolutional networks: normalised, split and augmented as published."""

from __future__ import annotations

import functools
import math
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
from tpext.tasks.idx import Images, load_fashion_mnist, load_mnist
from tpext.tasks.imagenet32 import load_imagenet32
from tpext.tasks.images import load_cifar10, load_digits

Normalization = Literal["standard", "3xstd", "meulemans", "none"]
Split = Literal["train", "validation", "test"]

SPLIT_SEED = 42
"""Seed of the order of the training images whose first ones are the validation set, whatever a run's seed is."""


@dataclass(frozen=True)
class ImageSet:
    """What is fixed about a set: sizes, mean and standard deviation of each plane, augmentation, split.

    A new set is one file of this package that adds an ``ImageSet`` to :data:`IMAGE_SETS`; or one outside, which
    ``tpext train images --dataset file.py:NAME`` names.

    Args:
        load: returns the images, of the files in a folder; None is the cache folder.
        shape: planes, height and width of an image.
        scales: by the names of normalisations, mean and standard deviation of each plane, of pixels in [0, 1].
    """

    load: Callable[[Path | None], Images]
    shape: tuple[int, int, int]
    scales: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    n_classes: int = 10
    test_size: int = 10_000
    largest: float = 255.0
    """The pixel value that becomes 1."""
    flip: float = 0.5
    padding: int = 4
    held_out_per_class: int | None = None
    """Images of each class in the published validation set; None is a tenth of all."""
    has_files: bool = True
    """Whether ``load`` reads a folder."""


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
    ),
    "mnist": ImageSet(
        load_mnist, (1, 28, 28), {"standard": _HALF, "meulemans": ((0.1307,), (0.3081,)), "none": _UNCHANGED}
    ),
    "fashion-mnist": ImageSet(
        load_fashion_mnist, (1, 28, 28), {"standard": _HALF, "meulemans": _UNCHANGED, "none": _UNCHANGED}
    ),
    "digits": ImageSet(
        lambda data_dir: load_digits(),
        (1, 8, 8),
        {"standard": _HALF, "none": _UNCHANGED},
        test_size=360,
        largest=16.0,
        flip=0.0,
        padding=1,
        has_files=False,
    ),
    "imagenet32": ImageSet(
        load_imagenet32,
        (3, 32, 32),
        {"standard": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "none": _UNCHANGED},
        n_classes=1000,
        test_size=50_000,
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
    (seed, iteration), before normalisation; as published digits of MNIST are mirrored too. The images of scikit-learn's
    digits, of no publication, move by at most 1 pixel and are not mirrored.

    The validation set is taken out of the training images, at random but the same for every seed and ``train_size``.
    All sets index the arrays that were read: pixels stay uint8 and are converted batch by batch.

    Args:
        dataset: see above.
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
            raise ValueError(f"ImageClasses: data_dir does not belong to {self.dataset}, which has no files")
        if self.normalization not in self._set.scales:
            known = ", ".join(self._set.scales)
            raise ValueError(
                f"ImageClasses: normalization must be one of {known} for {self.dataset}, got {self.normalization!r}"
            )
        if self.validation is not None and not 0 <= self.validation < 1:
            raise ValueError(f"ImageClasses: validation must be None or in [0, 1), got {self.validation}")
        # the whole official test set
        object.__setattr__(self, "default_test_size", self._set.test_size)

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
        return self._set.n_classes

    @functools.cached_property
    def data(self) -> Images:
        """All images and labels, validation among the training ones, read when first asked for."""
        return self._set.load(self.data_dir)

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
        mean, deviation = (
            torch.tensor([self._set.largest * value for value in values]).view(-1, 1, 1)
            for values in self._set.scales[self.normalization]
        )
        return images.to(torch.float32).sub_(mean).div_(deviation)


def _rank_in_class(labels: Tensor) -> Tensor:
    """Return how many labels before each are equal to it."""
    classes = labels.numpy()
    by_class = np.argsort(classes, kind="stable")
    counts = np.bincount(classes)
    ranks = np.empty_like(by_class)
    ranks[by_class] = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return torch.from_numpy(ranks)
