"""What a task is, and where its random numbers come from."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tpext.ops._library import check_choice

Criterion = Literal["cross_entropy", "mse", "sigmoid_cross_entropy"]
Picture = Literal["decision", "reconstruction"]
"""Decision regions of points in the plane, or images beside what the network makes of them."""
Order = Literal["shuffled", "sequential_first", "sequential"]
"""In which order an epoch takes its samples: shuffled, as stored in the first epoch only, or as stored in every one."""

# Independent streams of random numbers of one seed: what is drawn for one purpose never moves the others.
(
    TRAIN_STREAM,
    TEST_STREAM,
    SHUFFLE_STREAM,
    PERMUTATION_STREAM,
    SPLIT_STREAM,
    AUGMENTATION_STREAM,
    GENERATION_STREAM,
) = range(7)

NOT_ASKED = -100
"""The class of a step whose output is not judged; torch's cross-entropy passes over it."""


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

    ``input`` is ``[T, B, I]`` float32, ``[B, I]`` for a feed-forward task, ``[B, C, H, W]`` for a convolutional one, or
    ``[T, B, ...]`` of what the task's own embedding reads (:meth:`Task.make_embedding`). ``target`` is ``[B]`` int64
    classes, ``[B, 1]`` float32 for "mse", ``[B, output_size]`` float32 in [0, 1] for "sigmoid_cross_entropy"; of a task
    that judges every step each has T in front, and the class of a step that is not judged is :data:`NOT_ASKED`.
    """

    input: Tensor
    target: Tensor


class Task(ABC):
    """A problem with one output a sample: that after the last step of a sequence, or that of a feed-forward network;
    or, with ``every_step``, with one after every step.

    Subclasses say the sizes and produce the data. The two methods that do are pure functions of their arguments.
    """

    criterion: ClassVar[Criterion]
    """The loss, which says of what kind targets are too: see :meth:`loss` and :class:`Batch`."""
    correct_when: ClassVar[str]
    """How an output counts as correct, in words."""

    every_step: ClassVar[bool] = False
    """Whether the output after every step is judged; else the one after the last."""

    default_test_size: ClassVar[int] = 1000

    defaults: ClassVar[Mapping[str, object]] = MappingProxyType({})
    """Where options of ``tpext train`` start, if elsewhere than for all tasks, by their names: ``{"lr": 3e-3}``. Those
    of a rule count for that rule; an optimizer does what the option does, published rates and momentum go."""
    max_threads: ClassVar[int] = 1
    """Most CPU threads of a run that names none. A step of a synthetic task takes a few milliseconds: a second thread
    gains little there on an idle machine, and on a busy one the waits for it made such a run four times slower."""

    free_options: ClassVar[tuple[str, ...]] = ()
    """Options that say where data are, not what they are: a resumed run may change them."""

    length: int | None = None
    """Number of steps T; None for a feed-forward task, whose input has no dimension T."""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        criterion = vars(cls).get("criterion")
        if isinstance(criterion, str):
            check_choice(cls.__name__, "criterion", criterion, get_args(Criterion))

    @property
    def picture(self) -> Picture | None:
        """What a run draws of what it has learned."""
        return None

    @property
    def subject(self) -> str | None:
        """What a task that may be about several things is about: runs share a figure only where it is the same."""
        return None

    @property
    def has_epochs(self) -> bool:
        """Whether batches run through stored samples; others draw theirs."""
        return type(self).epoch_length is not Task.epoch_length

    @property
    @abstractmethod
    def input_size(self) -> int:
        """Size I of one step's input."""

    @property
    @abstractmethod
    def output_size(self) -> int:
        """Number of classes, or of values with "mse"."""

    def epoch_length(self, batch_size: int) -> int | None:
        """Return the number of batches in an epoch, None for a task that draws its samples.

        Raises:
            ValueError: fewer training samples than a batch has.
        """
        return None

    def fingerprint(self) -> str:
        """Return what tells a user's data from others, such as a hash: a run resumes on the same data only."""
        return ""

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

    def validation_set(self, seed: int, size: int) -> Batch | None:
        """Return the fixed validation set, as :meth:`test_set`; None for a task that has none."""
        return None

    def make_embedding(self) -> nn.Module:
        """Return the module that turns an input into the numbers ``[T, B, input_size]`` that a recurrent layer reads.

        Parameters of it that are to be trained learn by plain gradients, as the output layer's do. The inputs of most
        tasks are such numbers.
        """
        return nn.Identity()

    def generate(self, network: Callable[[Tensor], Tensor], seed: int) -> str | None:
        """Return a text by a trained network, for ``sample.txt``; None for a task that is not about texts.

        Args:
            network: returns the outputs for an input of a :class:`Batch`.
            seed: of the random numbers.
        """
        return None

    def measures(self, loss: float) -> dict[str, float]:
        """Return the figures, by their names, in which the field reports a mean loss, if it does not report that."""
        return {}

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of outputs ``[B, output_size]`` or ``[T, B, output_size]``, a scalar, by the criterion.

        ================================  ==================================================================
        ``"cross_entropy"``               of the softmax of the outputs, mean over those that are judged
        ``"mse"``                         squared error, mean over ``B * output_size``, and ``T``
        ``"sigmoid_cross_entropy"``       of the sigmoid of each output, mean over ``B * output_size``, and ``T``
        ================================  ==================================================================
        """
        if self.criterion == "mse":
            return torch.nn.functional.mse_loss(output, target.to(output.dtype))
        if self.criterion == "sigmoid_cross_entropy":
            return torch.nn.functional.binary_cross_entropy_with_logits(output, target.to(output.dtype))
        return torch.nn.functional.cross_entropy(output.flatten(0, -2), target.flatten(), ignore_index=NOT_ASKED)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Return which outputs ``[B, output_size]`` or ``[T, B, output_size]`` are correct, ``[B]`` or ``[T, B]`` bool,
        or which share of each; one that is not judged is not.

        By default those whose largest value is the class; a task of another criterion than "cross_entropy" says which.
        """
        if self.criterion != "cross_entropy":
            raise NotImplementedError(f"{type(self).__name__}: criterion {self.criterion!r} needs a method correct")
        return output.argmax(dim=-1) == target

    def judged(self, target: Tensor) -> int:
        """Return how many outputs targets judge: what mean losses and shares of correct outputs are means over."""
        if self.criterion == "cross_entropy":
            return int((target != NOT_ASKED).sum())
        return target.shape[:-1].numel()


class SyntheticTask(Task):
    """A task whose samples are drawn afresh for every batch."""

    @abstractmethod
    def sample(self, random: np.random.Generator, size: int) -> Batch:
        """Draw ``size`` samples."""

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        return self.sample(random_generator(seed, TRAIN_STREAM, iteration), batch_size)

    def test_set(self, seed: int, size: int) -> Batch:
        return self.sample(random_generator(seed, TEST_STREAM), size)


@functools.lru_cache(maxsize=16)  # of as many runs side by side
def _shuffled(seed: int, epoch: int, size: int) -> Tensor:
    return torch.from_numpy(random_generator(seed, SHUFFLE_STREAM, epoch).permutation(size))


def epoch_rows(seed: int, iteration: int, batch_size: int, size: int, order: Order = "shuffled") -> Tensor | slice:
    """Return which of ``size`` stored samples the batch of an iteration takes.

    Iterations run through epochs; samples left over at an epoch's end are dropped. A shuffled epoch has an order of its
    own, fixed by (seed, epoch).

    Raises:
        ValueError: ``batch_size`` is above ``size``.
    """
    epoch, index = divmod(iteration, epoch_batches(batch_size, size))
    rows = slice(index * batch_size, (index + 1) * batch_size)
    if order == "sequential" or (order == "sequential_first" and epoch == 0):
        return rows
    return _shuffled(seed, epoch, size)[rows]


def epoch_batches(batch_size: int, size: int) -> int:
    """Return how many whole batches ``size`` stored samples make.

    Raises:
        ValueError: they make none.
    """
    if batch_size > size:
        raise ValueError(f"batch_size must be at most {size} (the training samples), got {batch_size}")
    return size // batch_size


def one_hot(symbols: np.ndarray, size: int) -> Tensor:
    """Return float32 ``[*symbols.shape, size]`` with a one at each symbol."""
    flat = np.zeros((symbols.size, size), dtype=np.float32)
    flat[np.arange(symbols.size), symbols.ravel()] = 1.0
    return torch.from_numpy(flat.reshape(*symbols.shape, size))
