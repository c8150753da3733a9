"""Synthetic long-memory tasks of the recurrent-network literature.

Positions and encodings are those of the code that the published curves come from (Pascanu et al. 2013, reused by
Manchev and Spratling 2020 and by Roulet and Harchaoui 2023); where these differ the class says which one it follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tpext.tasks.base import Batch, Criterion, SyntheticTask, one_hot
from tpext.tasks.registry import option, register

STEPS = "Number of steps."


@register("temporal-order-3bit", bits=3)
@register("temporal-order", bits=1)
@dataclass(frozen=True)
class TemporalOrder(SyntheticTask):
    """Name the order of two (or three) marked symbols far apart in noise.

    Input ``[T, B, 6]``, one-hot. Distractors are uniform over the symbols 2..5; the bits ``v_k`` in {0, 1} stand at

    ====  ================  =================
    bit   first position    number of places
    ====  ================  =================
    v0    floor(.1 T)       floor(.1 T)
    v1    floor(.5 T)       floor(.1 T)
    v2    floor(.6 T)       floor(.1 T)
    ====  ================  =================

    (v2 with ``bits=3`` only), each place equally likely. Class ``v0 + 2 v1 (+ 4 v2)``, cross-entropy.

    Args:
        length: number of steps T, >= 10.
        bits: 1 (4 classes) or 3 (8 classes). The names are the literature's: "1 bit" has two marked symbols.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, experiments 6a and 6b; positions as in Roulet
    and Harchaoui's code, whose 3-bit variant draws distractors up to symbol 9 and cannot run: they stay 2..5 here. The
    3-bit task of Pascanu et al. and of Manchev and Spratling has v1 at floor(.3 T) instead.
    """

    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the class"

    length: int = option(60, STEPS)
    bits: int = 1

    def __post_init__(self) -> None:
        if self.length < 10:
            raise ValueError(f"TemporalOrder: length must be >= 10, got {self.length}")
        if self.bits not in (1, 3):
            raise ValueError(f"TemporalOrder: bits must be 1 or 3, got {self.bits}")

    @property
    def input_size(self) -> int:
        return 6

    @property
    def output_size(self) -> int:
        return 4 if self.bits == 1 else 8

    @property
    def first_positions(self) -> tuple[int, ...]:
        """First position of each bit; each may stand at ``length // 10`` places from there."""
        tenths = (1, 5) if self.bits == 1 else (1, 5, 6)
        return tuple(self.length * tenth // 10 for tenth in tenths)

    def sample(self, random: np.random.Generator, size: int) -> Batch:
        first = np.array(self.first_positions)[:, None]
        symbols = random.integers(2, 6, size=(self.length, size))
        positions = first + random.integers(self.length // 10, size=(len(first), size))
        values = random.integers(2, size=positions.shape)
        symbols[positions, np.arange(size)] = values
        label = (values << np.arange(len(first))[:, None]).sum(axis=0)
        return Batch(one_hot(symbols, 6), torch.from_numpy(label))


@register("adding")
@dataclass(frozen=True)
class Adding(SyntheticTask):
    """Give the mean of two marked numbers.

    Input ``[T, B, 2]``: channel 0 marks two steps with 1, ``p0`` in ``[0, floor(.1 T))`` and ``p1`` from
    ``floor(.1 T)`` on, ``floor(.4 T)`` places; channel 1 is uniform on [0, 1). Target
    ``(x[p0, 1] + x[p1, 1]) / 2``, squared error; correct if the absolute error is below 0.04.

    Args:
        length: number of steps T, >= 10.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, experiment 4, as coded by Roulet and Harchaoui.
    """

    criterion: ClassVar[Criterion] = "mse"
    correct_when: ClassVar[str] = "|error| < 0.04"

    length: int = option(30, STEPS)

    def __post_init__(self) -> None:
        if self.length < 10:
            raise ValueError(f"Adding: length must be >= 10, got {self.length}")

    @property
    def input_size(self) -> int:
        return 2

    @property
    def output_size(self) -> int:
        return 1

    def sample(self, random: np.random.Generator, size: int) -> Batch:
        tenth = self.length // 10
        rows = np.arange(size)
        marked = (random.integers(tenth, size=size), tenth + random.integers(self.length * 4 // 10, size=size))
        values = np.zeros((self.length, size, 2), dtype=np.float32)
        values[:, :, 1] = random.random((self.length, size), dtype=np.float32)
        target = np.zeros(size, dtype=np.float32)
        for position in marked:
            values[position, rows, 0] = 1.0
            target += values[position, rows, 1] / 2
        return Batch(torch.from_numpy(values), torch.from_numpy(target[:, None]))

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().squeeze(1) < 0.04


@register("random-permutation")
@dataclass(frozen=True)
class RandomPermutation(SyntheticTask):
    """Recall the first symbol after noise that never tells it.

    Input ``[T, B, 100]``, one-hot. The first symbol is 0 or 1, equally likely; every later one is uniform over 2..99.
    The class, of 100, is the first symbol; cross-entropy on the last step.

    Args:
        length: number of steps T, >= 1.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, experiment 2b; encoding as in Pascanu, Mikolov
    and Bengio, "On the difficulty of training recurrent neural networks", 2013 (their permutation task), which Manchev
    and Spratling 2020 reuse.
    """

    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the class"

    length: int = option(30, STEPS)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"RandomPermutation: length must be >= 1, got {self.length}")

    @property
    def input_size(self) -> int:
        return 100

    @property
    def output_size(self) -> int:
        return 100

    def sample(self, random: np.random.Generator, size: int) -> Batch:
        symbols = random.integers(2, 100, size=(self.length, size))
        symbols[0] = random.integers(2, size=size)
        return Batch(one_hot(symbols, 100), torch.from_numpy(symbols[0].copy()))
