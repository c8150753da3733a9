"""What a task is, and where its random numbers come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Criterion = Literal["cross_entropy", "mse"]

# Independent streams of random numbers of one seed: what is drawn for one purpose never moves the others.
TRAIN_STREAM, TEST_STREAM, SHUFFLE_STREAM, PERMUTATION_STREAM = range(4)


def random_generator(seed: int, stream: int, index: int = 0) -> np.random.Generator:
    """Return the random generator number ``index`` of a stream of a seed.

    Philox is counter based: the key is (seed, stream), the counter starts at ``index`` in its second word, so no two
    indices share numbers and none has to be stepped through. (torch's CPU generator keeps 32 bits of its seed only:
    seeds made from pairs would collide.)

    Args:
        seed: 0 .. 2^64 - 1.
        stream: which purpose the numbers are for.
        index: iteration or epoch, >= 0.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0 .. 2^64 - 1, got {seed}")
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=np.array([0, index, 0, 0], np.uint64))
    )


class Batch(NamedTuple):
    """Samples of a task.

    ``input`` is ``[T, B, I]`` float32. ``target`` is ``[B]`` int64 classes, or ``[B, 1]`` float32 for "mse".
    """

    input: Tensor
    target: Tensor


class Task(ABC):
    """A sequence problem with the loss on the last step's output.

    Subclasses say the sizes and produce the data. The two methods that do are pure functions of their arguments.
    """

    criterion: ClassVar[Criterion]
    correct_when: ClassVar[str]
    """How an output counts as correct, in words."""

    default_test_size: ClassVar[int] = 1000

    length: int
    """Number of steps T."""

    @property
    @abstractmethod
    def input_size(self) -> int:
        """Size I of one step's input."""

    @property
    @abstractmethod
    def output_size(self) -> int:
        """Number of classes, or of values with "mse"."""

    @abstractmethod
    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        """Return the training batch of an iteration.

        Args:
            seed: 0 .. 2^64 - 1.
            iteration: number of the batch, >= 0.
            batch_size: number of samples B, >= 1.
        """

    @abstractmethod
    def test_set(self, seed: int, size: int) -> Batch:
        """Return the fixed test set, which shares no random number with the training batches.

        Args:
            seed: 0 .. 2^64 - 1.
            size: number of samples, >= 1.
        """

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of outputs ``[B, output_size]``: cross-entropy or squared error, a scalar."""
        if self.criterion == "mse":
            return torch.nn.functional.mse_loss(output, target.to(output.dtype))
        return torch.nn.functional.cross_entropy(output, target)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Return which outputs ``[B, output_size]`` are correct, ``[B]`` bool."""
        return output.argmax(dim=1) == target


class SyntheticTask(Task):
    """A task whose samples are drawn afresh for every batch."""

    @abstractmethod
    def sample(self, random: np.random.Generator, size: int) -> Batch:
        """Draw ``size`` samples."""

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        return self.sample(random_generator(seed, TRAIN_STREAM, iteration), batch_size)

    def test_set(self, seed: int, size: int) -> Batch:
        return self.sample(random_generator(seed, TEST_STREAM), size)


def one_hot(symbols: np.ndarray, size: int) -> Tensor:
    """Return float32 ``[*symbols.shape, size]`` with a one at each symbol."""
    flat = np.zeros((symbols.size, size), dtype=np.float32)
    flat[np.arange(symbols.size), symbols.ravel()] = 1.0
    return torch.from_numpy(flat.reshape(*symbols.shape, size))
