"""What is read of a run's configuration without a user's code and data, and compared with what is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tpext.experiments.own import find_own, hash_of, is_path, place_of
from tpext.tasks import MissingDataError, Task


@dataclass(frozen=True)
class SavedConfig:
    """What tables and figures need of a run's configuration, read without a user's code and data.

    Attributes:
        title: what runs must share to be compared.
        description: its settings on one line.
        chance: accuracy of a guess; None where it is not known, or one class is more frequent than another.
        values: see :meth:`options`.
        evaluated: name of the set that evaluations are on.
        unit: what they are counted in.
    """

    title: str
    description: str
    chance: float | None
    values: Mapping[str, Any]
    evaluated: str = "test"
    unit: str = "iteration"

    def options(self) -> dict[str, Any]:
        """Return the value of every option by its name, as the configuration does."""
        return dict(self.values)


def chance_of(task: Task) -> float | None:
    """Return the accuracy of a guess of a task with few classes."""
    # of the classes of steps none is as frequent as another
    if task.criterion != "cross_entropy" or task.every_step:
        return None
    with contextlib.suppress(MissingDataError):
        return 1 / task.output_size if task.output_size <= 10 else None
    return None


class OwnCode(NamedTuple):
    """What a configuration names of a user's: "task" or another option, its path, and where that was typed."""

    what: str
    name: str
    folder: str | None

    @property
    def file(self) -> str:
        """The file, as it was typed."""
        return self.name.rpartition(":")[0]

    def hash(self) -> str:
        """The SHA-256 of the file."""
        return hash_of(*self)


class HasOptions(Protocol):
    """A configuration, as far as :func:`differences` looks at it."""

    def options(self) -> dict[str, Any]:
        """Return the value of every option by its name."""


def differences(saved: HasOptions, asked: Mapping[str, object]) -> list[str]:
    """Return how options asked for differ from a saved configuration, one sentence each."""
    present, flat = saved.options(), dict(asked)
    for group in ("task_options", "rule_options"):
        own = flat.pop(group, None)
        if isinstance(own, Mapping):
            flat |= {f"{group}.{name}": value for name, value in own.items()}
    found = []
    for name, value in flat.items():
        if present.get(name) == value:
            continue
        if is_path(value) and name in ("task", "rule", "dataset"):
            # one class may be named by several paths; the saved one was found first
            place = place_of(find_own(name, str(value)))
            value = value if place is None else place.name
        if present.get(name) != value:
            found.append(f"{name} is {present.get(name)} there, {value} was asked for")
    return found
