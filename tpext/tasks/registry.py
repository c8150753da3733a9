"""The names of the tasks, and what each lets a run set.

A task is one file: a frozen dataclass that subclasses :class:`Task` and gives itself a name. Every module of this
package is loaded with it, so no list of tasks has to learn of a new file.

    @register("echo")
    @dataclass(frozen=True)
    class Echo(SyntheticTask):
        length: int = option(20, "Number of steps.")
        ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tpext._names import did_you_mean
from tpext.tasks.base import Task

TaskT = TypeVar("TaskT", bound=Task)


class Entry(NamedTuple):
    """A task as it is registered: its class, and the fields that the name sets."""

    kind: type[Task]
    fixed: Mapping[str, object]

    def __str__(self) -> str:
        """Where the class is, with the fields that are set."""
        fixed = ", ".join(f"{name}={value!r}" for name, value in self.fixed.items())
        return f"{self.kind.__module__}.{self.kind.__qualname__}({fixed})"

    @property
    def options(self) -> dict[str, dataclasses.Field[Any]]:
        """The fields that a run may set, by their names."""
        assert dataclasses.is_dataclass(self.kind)
        return {one.name: one for one in dataclasses.fields(self.kind) if one.init and one.name not in self.fixed}

    def make(self, name: str, options: Mapping[str, Any]) -> Task:
        """Return the task with these options; None leaves one as it is.

        Raises:
            ValueError: an option that the task does not have, or one out of its range.
        """
        given = {option: value for option, value in options.items() if value is not None}
        for option in given:
            if option not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{option} does not belong to {name} (options of that task: {known})")
        if "data_dir" in given:
            given["data_dir"] = Path(given["data_dir"])
        return self.kind(**self.fixed, **given)


TASKS: dict[str, Entry] = {}
"""Every task of the package by its name."""

FORMER_NAMES = {"mnist": "sequential-mnist"}
"""What tasks were called in earlier versions."""


def option(default: Any, help: str) -> Any:
    """Declare a field of a task that a run may set: its default, and its line of ``tpext train --help``."""
    return dataclasses.field(default=default, metadata={"help": help})


def register(name: str, /, **fixed: object) -> Callable[[type[TaskT]], type[TaskT]]:
    """Give a task a name, for :func:`make_task` and the command line.

    Args:
        name: a class may have several.
        fixed: fields that the name sets, so that a run does not.

    Raises:
        ValueError: another class, or the same one with other fields, has the name.
    """

    def add(kind: type[TaskT]) -> type[TaskT]:
        new = Entry(kind, fixed)
        known = TASKS.get(name)
        # a module that is loaded again, as notebooks do, defines its classes again
        if known is not None and str(known) != str(new):
            raise ValueError(f"register: name must be one that no task has, got {name!r} for {new}, it is {known}'s")
        TASKS[name] = new
        return kind

    return add


def find_task(name: str) -> Entry:
    """Return the task of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        near = did_you_mean(name, TASKS, FORMER_NAMES)
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}{near}")
    return TASKS[name]


def name_of(task: Task) -> str | None:
    """Return the name of a task, None for one that has none."""
    for name, (kind, fixed) in TASKS.items():
        if type(task) is kind and all(getattr(task, field) == value for field, value in fixed.items()):
            return name
    return None


def make_task(name: str, **options: Any) -> Task:
    """Return the task of that name.

    Args:
        name: one of :data:`TASKS`.
        options: those of its class. None means the class's default.

    Raises:
        ValueError: an unknown name, an option that the task does not have, or one out of its range.

    >>> make_task("sequential-mnist", chunk=28).length
    28
    """
    return find_task(name).make(name, options)
