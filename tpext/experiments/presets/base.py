"""What a preset is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tpext.rules import Rule
from tpext.tasks import Task


class Case(NamedTuple):
    """What the settings of a run depend on.

    Attributes:
        name: of the task.
        task: the task with its options.
        rule: the rule's class.
        batch_size: the one asked for, 0 if none was.
        cell: of recurrent layers.
    """

    name: str
    task: Task
    rule: type[Rule]
    batch_size: int = 0
    cell: str = "rnn"


@dataclass(frozen=True)
class Preset:
    """The settings of a publication, or of our own.

    Attributes:
        name: of ``--preset``.
        summary: for the help.
        values: returns what it sets for a case, by the names of the options, ``rule`` among them; None where it has
            nothing.
        published: whether a publication has them.
    """

    name: str
    summary: str
    values: Callable[[Case], dict[str, Any] | None]
    published: bool = True
