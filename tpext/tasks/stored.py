"""Samples of one's own, kept in arrays: sequences, or points for feed-forward networks."""

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tpext.tasks.base import (
    NOT_ASKED,
    SPLIT_STREAM,
    Batch,
    Criterion,
    Order,
    Task,
    epoch_batches,
    epoch_rows,
    random_generator,
)
from tpext.tasks.checks import as_tensor, finite, same_count, warn_at, warn_of_gaps


class Samples(NamedTuple):
    """Training and test samples, each with the number of samples ``N`` in front.

    Inputs are ``[N, T, I]`` for sequences, ``[N, I]`` for feed-forward networks. Targets are ``[N]`` classes 0, 1, ..;
    ``[N, O]`` numbers, or ``[N]`` for one number, with the criterion "mse"; ``[N, O]`` in [0, 1] with
    "sigmoid_cross_entropy". Of a task that judges every step they are ``[N, T]`` and ``[N, T, O]``.
    """

    train_input: ArrayLike | Tensor
    train_target: ArrayLike | Tensor
    test_input: ArrayLike | Tensor
    test_target: ArrayLike | Tensor

    @classmethod
    def split(cls, input: ArrayLike | Tensor, target: ArrayLike | Tensor, test_share: float = 0.2) -> Samples:
        """Return samples of which a share, drawn at random but always the same, is kept for the test.

        Args:
            input, target: all samples.
            test_share: 0 < share < 1.

        Raises:
            ValueError: another number of targets than of inputs, one that is not finite, or one of both parts is empty.

        >>> import numpy as np
        >>> samples = Samples.split(np.zeros((50, 8, 3)), np.arange(50) % 2)
        >>> samples.train_input.shape, samples.test_input.shape
        (torch.Size([40, 8, 3]), torch.Size([10, 8, 3]))
        """
        # before the order changes, so that an error's positions are those of the arrays
        inputs, targets = (
            finite(f"Samples.split: {name}", as_tensor(f"Samples.split: {name}", value))
            for name, value in (("input", input), ("target", target))
        )
        count = same_count("Samples.split: input", inputs, "target", targets)
        if not 0 < test_share < 1 or not 0 < (tests := round(test_share * count)) < count:
            raise ValueError(f"Samples.split: test_share must leave both parts a sample of {count}, got {test_share}")
        order = torch.from_numpy(random_generator(0, SPLIT_STREAM).permutation(count))
        kept, test = order[tests:], order[:tests]
        return cls(inputs[kept], targets[kept], inputs[test], targets[test])

    def standardized(self) -> Samples:
        """Return samples whose inputs have mean 0 and variance 1, each of the ``I`` numbers by itself.

        Both are those of the training samples, and the test samples change by the same numbers, so that nothing is
        learned from the test. A number that never changes becomes 0. Targets stay as they are.

        Raises:
            ValueError: an input is no array of numbers, or the two have other numbers of them.

        >>> import numpy as np
        >>> samples = Samples.split(np.random.default_rng(1).normal(120, 30, size=(50, 8, 3)), np.arange(50) % 2)
        >>> train = samples.standardized().train_input
        >>> train.mean(dim=(0, 1)).abs().max() < 1e-6, train.std(dim=(0, 1), correction=0)
        (tensor(True), tensor([1., 1., 1.]))
        """
        train, test = (
            as_tensor(f"Samples.standardized: {name}", getattr(self, name)).to(torch.float64)
            for name in ("train_input", "test_input")
        )
        if train.dim() == 0 or test.dim() == 0 or 0 in train.shape or train.size(-1) != test.size(-1):
            raise ValueError(
                "Samples.standardized: train_input and test_input must have the same I >= 1 numbers at the end, got "
                f"{list(train.shape)} and {list(test.shape)}"
            )
        mean, deviation = _moments(train)
        # rounding leaves a constant some deviation
        scale = torch.where(deviation > 1e-12 * mean.abs(), deviation, 1.0)
        inputs = (((one - mean) / scale).to(torch.float32) for one in (train, test))
        return self._replace(**dict(zip(("train_input", "test_input"), inputs, strict=True)))


LARGE = 10.0
"""Root mean square beyond which numbers are told to be far from those that train well."""


class StoredTask(Task):
    """A task whose samples are arrays: a subclass says how to load them, and nothing else if they have classes.

    Training batches run through epochs, each in an order of its own, fixed by (seed, epoch); samples left over at an
    epoch's end are dropped. Sizes, and whether the network is recurrent, are those of the arrays. A run resumes on the
    same numbers only. The test set is the first ``size`` test samples, all if there are no more.

    Args:
        order: see :data:`tpext.tasks.Order`; a subclass that makes it a field lets runs choose.

    Raises (when data is first asked for):
        ValueError: arrays that do not go together, or with the criterion, named.

    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> @dataclass(frozen=True)
    ... class Parity(StoredTask):
    ...     def load(self):
    ...         bits = np.random.default_rng(1).integers(2, size=(100, 6, 1))
    ...         return Samples.split(bits, bits.sum(axis=(1, 2)) % 2)
    >>> task = Parity()
    >>> task.length, task.input_size, task.output_size, task.epoch_length(20)
    (6, 1, 2, 4)
    >>> task.batch(seed=1, iteration=0, batch_size=20).input.shape
    torch.Size([6, 20, 1])
    """

    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the class"
    order: Order = "shuffled"

    @abstractmethod
    def load(self) -> Samples:
        """Return the samples; called once, when data is first asked for."""

    @functools.cached_property
    def data(self) -> tuple[Batch, Batch]:
        """Training and test samples as tensors, each with the number of samples in front."""
        loaded: object = self.load()
        if not isinstance(loaded, tuple) or len(loaded) != 4:
            raise ValueError(f"{type(self).__name__}: load must return Samples, got {type(loaded).__name__}")
        samples = Samples(*loaded)
        train = self._part("train", samples.train_input, samples.train_target)
        test = self._part("test", samples.test_input, samples.test_target)
        for name, first, second in (("input", train.input, test.input), ("target", train.target, test.target)):
            if first.shape[1:] != second.shape[1:]:
                shape = ", ".join(map(str, first.shape[1:]))
                raise ValueError(
                    f"{type(self).__name__}: test_{name} must be [N, {shape}] as train_{name}, got {list(second.shape)}"
                )
        if self.criterion == "cross_entropy":
            highest = max(int(train.target.max()), int(test.target.max()))
            warn_of_gaps(f"{type(self).__name__}: train_target", "sample", train.target, highest, self.load)
        elif self.criterion == "mse":
            self._warn_of_scale(
                "target", train.target, "outputs start near 0: scale the targets, and correct with them"
            )
        # those of an embedding are symbols
        if type(self).make_embedding is Task.make_embedding:
            more = "inputs with mean 0 and variance 1 train well, as Samples.split(..).standardized() has them"
            self._warn_of_scale("input", train.input, more)
        return train, test

    def _warn_of_scale(self, what: str, numbers: Tensor, more: str) -> None:
        mean, deviation = _moments(numbers)
        size = (mean**2 + deviation**2).sqrt()
        one = int(size.argmax())
        if float(size[one]) > LARGE:
            moments = f"mean {float(mean[one]):.3g} and standard deviation {float(deviation[one]):.3g}"
            text = f"train_{what} has large numbers: number {one} of {len(size)} has {moments}; {more}"
            warn_at(self.load, f"{type(self).__name__}: {text}")

    def _part(self, part: str, input: ArrayLike | Tensor, target: ArrayLike | Tensor) -> Batch:
        """Training or test samples as tensors that go with the criterion."""
        names = tuple(f"{type(self).__name__}: {part}_{what}" for what in ("input", "target"))
        inputs, targets = (as_tensor(name, value) for name, value in zip(names, (input, target), strict=True))
        same_count(names[0], inputs, f"{part}_target", targets)
        inputs = finite(names[0], inputs.to(torch.float32))
        if inputs.dim() not in ((3,) if self.every_step else (2, 3)) or 0 in inputs.shape:
            others = "" if self.every_step else ", or [N, I] for feed-forward networks"
            images = "; images for convolutional networks are an ImageSet" if inputs.dim() == 4 else ""
            raise ValueError(
                f"{names[0]} must be [N, T, I] for sequences{others}, no size 0, got {list(inputs.shape)}{images}"
            )
        outputs = inputs.shape[:2] if self.every_step else inputs.shape[:1]
        if self.criterion == "cross_entropy":
            return Batch(inputs, _classes(names[1], targets, outputs, inputs.shape[1:-1]))
        if targets.shape == outputs:
            targets = targets.unsqueeze(-1)
        if targets.shape[:-1] != outputs or 0 in targets.shape:
            sizes = ", ".join(map(str, outputs))
            raise ValueError(f"{names[1]} must be [{sizes}, O] for {self.criterion!r}, got {list(targets.shape)}")
        return Batch(inputs, finite(names[1], targets.to(torch.float32)))

    @property
    def input_size(self) -> int:
        return self.data[0].input.shape[-1]

    @property
    def output_size(self) -> int:
        targets = [part.target for part in self.data]
        if self.criterion != "cross_entropy":
            return targets[0].shape[-1]
        return max(int(one.max()) for one in targets) + 1

    @property
    def default_test_size(self) -> int:  # type: ignore[override]  # all of them
        return len(self.data[1].input)

    @property
    def length(self) -> int | None:  # type: ignore[override]  # of the arrays, where others have a field
        return self.data[0].input.shape[1] if self.data[0].input.dim() == 3 else None

    @property
    def subject(self) -> str:
        train, test = self.data
        outputs = "classes" if self.criterion == "cross_entropy" else "numbers"
        step = "" if self.length is None else " a step"
        numbers = f"{self.input_size} number{'s' * (self.input_size != 1)}"
        sizes = f"{len(train.input)} + {len(test.input)} samples of {numbers}{step}"
        return f"{sizes}, {self.output_size} {outputs}"

    def fingerprint(self) -> str:
        """Return the SHA-256 of all samples."""
        digest = hashlib.sha256()
        for tensor in (*self.data[0], *self.data[1]):
            digest.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def epoch_length(self, batch_size: int) -> int:
        return epoch_batches(batch_size, len(self.data[0].input))

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        train = self.data[0]
        return self._in_steps(train, epoch_rows(seed, iteration, batch_size, len(train.input), self.order))

    def test_set(self, seed: int, size: int) -> Batch:
        return self._in_steps(self.data[1], slice(size))

    def _in_steps(self, samples: Batch, rows: Tensor | slice) -> Batch:
        """Take rows; those of sequences get the steps in front."""
        input, target = samples.input[rows], samples.target[rows]
        if self.length is not None:
            input = input.transpose(0, 1).contiguous()
        return Batch(input, target.transpose(0, 1).contiguous() if self.every_step else target)


def _moments(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each number of the last axis."""
    rows = numbers.reshape(-1, numbers.size(-1)) if numbers.dim() > 1 else numbers.reshape(-1, 1)
    return rows.mean(dim=0), rows.std(dim=0, correction=0)


def _classes(name: str, targets: Tensor, shape: torch.Size, steps: Sequence[int]) -> Tensor:
    """Classes of that shape; ``steps`` is ``[T]`` of sequences, else empty."""
    every_step = len(shape) == 2
    more = ""
    if targets.dim() == len(shape) + 1 and targets.shape[:-1] == shape:
        if targets.size(-1) == 1:
            more = "; take target[..., 0]"
        elif bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(dim=-1) == 1).all()):
            more = "; one-hot targets become classes by target.argmax(-1)"
        elif [*targets.shape[1:]] == [*steps]:
            more = "; for one of every step set every_step = True"
    if targets.shape != shape:
        raise ValueError(f"{name} must be classes {list(shape)}, got {list(targets.shape)}{more}")
    if targets.is_floating_point() or targets.is_complex():
        more = 'for numbers the criterion is "mse"'
        raise ValueError(f"{name} must be classes 0, 1, .. as integers, got {targets.dtype}; {more}")
    classes = targets.to(torch.int64)
    wrong = classes[(classes < 0) & (classes != NOT_ASKED)] if every_step else classes[classes < 0]
    if len(wrong):
        raise ValueError(f"{name} must be classes 0, 1, .., got {int(wrong[0])}")
    return classes
