"""Toy sets in two and three dimensions: is a point of the one class or of the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch

from tpext.tasks.base import Batch, Criterion, Picture, SyntheticTask
from tpext.tasks.registry import register

ToyName = Literal["sphere", "annulus", "torus", "xor", "xor-full", "spiral"]


@dataclass(frozen=True)
class ToySet(SyntheticTask):
    """Name the class, 0 or 1, of a point in two or three dimensions; both classes are equally likely.

    Input ``[B, 2]`` or ``[B, 3]``, cross-entropy. The sets are

    ==============  ==  ========================================  =================================================
    name            I   class 0                                   class 1
    ==============  ==  ========================================  =================================================
    ``"sphere"``    3   in the ball of radius 1/2                 on the sphere of radius 1
    ``"annulus"``   2   in the disc of radius 1/2                 in the annulus of radii 1 and 2
    ``"torus"``     3   in the ball of radius 1/2                 on the torus of radii 1 and 1/4 about it
    ``"xor"``       2   (1, 1) or (-1, -1)                        (1, -1) or (-1, 1)
    ``"xor-full"``  2   in a unit square, both signs the same     in a unit square, the signs differ
    ``"spiral"``    2   ``r (cos u, sin u)``, three turns         the same turned by half a turn
    ==============  ==  ========================================  =================================================

    each uniform (the torus in its two angles), the spiral with ``u = 6 pi sqrt(U)``, ``r = 2 sqrt(U)``, ``U`` uniform
    in [0, 1).

    Source: J. Seely, "tensorflow-target-prop", ``datasets.py``, for the points of the sphere, the annulus, the xor sets
    and the spiral. It has no labels for the sphere, the annulus and the torus, and its torus is a product of circles in
    four dimensions: the inner class, and the torus in three dimensions, are this package's.
    """

    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the class"

    # the best of a few tried on the spiral
    defaults: ClassVar[Mapping[str, object]] = {"sizes": (64, 64, 64), "nonlinearity": "leaky_relu", "lr": 3e-3}

    name: ToyName

    def __post_init__(self) -> None:
        if self.name not in get_args(ToyName):
            raise ValueError(f"ToySet: name must be one of {', '.join(get_args(ToyName))}, got {self.name!r}")

    @property
    def input_size(self) -> int:
        return 3 if self.name in ("sphere", "torus") else 2

    @property
    def output_size(self) -> int:
        return 2

    @property
    def picture(self) -> Picture | None:
        return "decision" if self.input_size == 2 else None

    def sample(self, random: np.random.Generator, size: int) -> Batch:
        classes = random.integers(2, size=size)
        outer = (classes == 1)[:, None]
        if self.name == "xor":
            first = random.choice([-1.0, 1.0], size=size)
            points = np.stack([first, first * (1 - 2 * classes)], axis=1)
        elif self.name == "xor-full":
            points = random.uniform(size=(size, 2)) * random.choice([-1.0, 1.0], size=(size, 1))
            points[:, 1] *= 1 - 2 * classes
        elif self.name == "spiral":
            root = np.sqrt(random.uniform(size=size))
            angle = 6 * math.pi * root + math.pi * classes
            points = 2 * root[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        else:
            dimensions = self.input_size
            direction = random.standard_normal((size, dimensions))
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            share = random.uniform(size=(size, 1))
            inner = 0.5 * share ** (1 / dimensions) * direction
            if self.name == "sphere":
                points = np.where(outer, direction, inner)
            elif self.name == "annulus":
                points = np.where(outer, np.sqrt(1 + 3 * share) * direction, inner)
            else:
                points = np.where(outer, _torus(random, size), inner)
        return Batch(torch.from_numpy(points.astype(np.float32)), torch.from_numpy(classes))


for _name in get_args(ToyName):
    register(_name, name=_name)(ToySet)


def _torus(random: np.random.Generator, size: int) -> np.ndarray:
    around, across = 2 * math.pi * random.uniform(size=(2, size))
    distance = 1 + np.cos(across) / 4
    return np.stack([distance * np.cos(around), distance * np.sin(around), np.sin(across) / 4], axis=1)
