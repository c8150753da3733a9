"""Sequence tasks, synthetic long-memory problems, images read as sequences and texts; and feed-forward ones, image and
toy sets.

Images for convolutional networks are :class:`ImageClasses`, made without :func:`make_task`. A new task is one file: see
:mod:`tpext.tasks.registry`.

A :class:`Task` is a small immutable value. It says what goes in and out (``length``, ``input_size``, ``output_size``),
how an output is judged (``loss``, ``correct``) and produces the data: ``batch(seed, iteration, batch_size)`` and
``test_set(seed, size)`` are pure functions of their arguments, so a run that resumes at iteration ``i`` sees what a run
that never stopped sees.

>>> from tpext.tasks import make_task
>>> task = make_task("temporal-order", length=60)
>>> task.batch(seed=1, iteration=0, batch_size=20).input.shape
torch.Size([60, 20, 6])
>>> make_task("spiral").batch(seed=1, iteration=0, batch_size=20).input.shape
torch.Size([20, 2])
"""

from __future__ import annotations

import importlib
import pkgutil

from tpext.tasks.base import Batch, Criterion, Order, SyntheticTask, Task
from tpext.tasks.idx import MissingDataError, load_fashion_mnist, load_mnist
from tpext.tasks.image_sets import IMAGE_SETS, ImageClasses, ImageSet, Normalization, Split
from tpext.tasks.imagenet32 import load_imagenet32
from tpext.tasks.images import Digits, FlatCifar10, FlatMnist, ImageTask, MnistAutoencoder, load_cifar10, load_digits
from tpext.tasks.registry import TASKS, find_task, make_task, option, register
from tpext.tasks.sequential_images import SequentialCifar10, SequentialImages, SequentialMnist
from tpext.tasks.stored import Samples, StoredTask
from tpext.tasks.synthetic import Adding, RandomPermutation, TemporalOrder
from tpext.tasks.text import Text
from tpext.tasks.toys import ToySet

# A new file registers its tasks and data sets by being here.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "IMAGE_SETS",
    "TASKS",
    "Adding",
    "Batch",
    "Criterion",
    "Digits",
    "FlatCifar10",
    "FlatMnist",
    "ImageClasses",
    "ImageSet",
    "ImageTask",
    "MissingDataError",
    "MnistAutoencoder",
    "Normalization",
    "Order",
    "RandomPermutation",
    "Samples",
    "SequentialCifar10",
    "SequentialImages",
    "SequentialMnist",
    "Split",
    "StoredTask",
    "SyntheticTask",
    "Task",
    "TemporalOrder",
    "Text",
    "ToySet",
    "find_task",
    "load_cifar10",
    "load_digits",
    "load_fashion_mnist",
    "load_imagenet32",
    "load_mnist",
    "make_task",
    "option",
    "register",
]
