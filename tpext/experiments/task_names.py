"""The names that tasks have on the command line: those they are registered by, and the import path of a user's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tpext._names import did_you_mean
from tpext.experiments.own import as_config_errors, find_own, hints_of, is_path, place_of
from tpext.experiments.settings import ConfigError, choices_of
from tpext.tasks import TASKS, Task, registry
from tpext.tasks.registry import Entry

# A run's own, as a resumed one may change it.
NOT_OPTIONS = ("data_dir",)


def find_task(name: str, folder: str | None = None) -> Entry:
    """Return the entry of a task.

    Args:
        name: one of :data:`tpext.tasks.TASKS`, or where a task of a user's own stands: ``module:Class`` or
            ``file.py:Class``.
        folder: where that was typed; None is the working directory.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in TASKS or not is_path(name):
        try:
            return registry.find_task(name)
        except ValueError as error:
            near = did_you_mean(name, TASKS, registry.FORMER_NAMES)
            more = "" if near else "; or module:Class or file.py:Class for one of your own"
            raise ConfigError(f"{error}{more}") from error
    kind = find_own("task", name, folder)
    what = f"task {name}: {name.rpartition(':')[2]}"
    if not isinstance(kind, type) or not issubclass(kind, Task):
        raise ConfigError(f"{what} must be a dataclass that subclasses tpext.tasks.Task, got {kind!r}")
    if not dataclasses.is_dataclass(kind):
        raise ConfigError(f"{what} must be a dataclass: write @dataclass(frozen=True) above it")
    return Entry(kind, {})


_shared: dict[object, Task] | None = None


@contextlib.contextmanager
def shared_tasks() -> Iterator[None]:
    """Let configurations of equal tasks, made or read meanwhile in any thread, have one: a user's arrays are read once.

    It is for what lasts as long as a command: arrays that change in between are not read again.
    """
    global _shared
    before = _shared
    _shared = {} if before is None else before
    try:
        yield
    finally:
        _shared = before


def _as_shared(task: Task) -> Task:
    """The task, or one like it that has been shared."""
    known = _shared
    if known is None:
        return task
    options = {name: getattr(task, name) for name in entry_of(task).options}
    return known.setdefault((type(task), repr(options)), task)


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """Return a task with its options; None leaves one as it is.

    Raises:
        ConfigError: there is no such task, an option that it does not have, or one out of its range.
    """
    entry = find_task(name)
    try:
        task = _as_shared(entry.make(name, options))
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    with as_config_errors():
        _ = task.length  # that of a task from arrays is theirs, which are read and checked
    check_types(task)
    return task


def check_types(task: Task) -> None:
    """Raise ConfigError for an option that is not of its type, as a file may have it."""
    hints = hints_of("task", name_of(task), type(task))
    for name, value in options_of(task).items():
        kinds, choices = str(hints[name]), choices_of(hints[name])
        if choices and value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        if "int" in kinds and "float" not in kinds and isinstance(value, (int, float)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
            if value > 2**31 - 1:
                raise ConfigError(f"{name} must be at most {2**31 - 1}, got {value}")


def name_of(task: Task) -> str:
    """Return the name under which a task is found.

    Raises:
        ConfigError: it was not found by a name.
    """
    place = place_of(type(task))
    name = registry.name_of(task) or (None if place is None else place.name)
    if name is None:
        raise ConfigError(f"task {type(task).__name__} has no name here: find_task must find it first")
    return name


def is_own(task: Task) -> bool:
    """Whether a task is a user's, whose options have a name space of their own."""
    return registry.name_of(task) is None


def entry_of(task: Task) -> Entry:
    """Return the entry of a task."""
    name = registry.name_of(task)
    return Entry(type(task), {}) if name is None else TASKS[name]


def options_of(task: Task) -> dict[str, Any]:
    """Return the options of a task, its data folder apart."""
    return {name: getattr(task, name) for name in entry_of(task).options if name not in NOT_OPTIONS}


def task_options() -> dict[str, list[str]]:
    """Return the options that stand among those of a run, and the names of the tasks that have each."""
    found: dict[str, list[str]] = {}
    for name, entry in TASKS.items():
        for option in entry.options:
            if option not in NOT_OPTIONS:
                found.setdefault(option, []).append(name)
    return found


def with_data(task: Task, data_dir: str | None) -> Task:
    """Return a task with its data folder.

    Raises:
        ConfigError: it has none.
    """
    if data_dir is None:
        return task
    if "data_dir" not in entry_of(task).options:
        raise ConfigError(f"data_dir does not belong to {name_of(task)}")
    return _as_shared(dataclasses.replace(task, data_dir=Path(data_dir)))  # type: ignore[type-var]


def task_to_dict(task: Task) -> dict[str, Any]:
    """Return plain values, as config.json holds them."""
    place = place_of(type(task))
    found = {"name": name_of(task), "options": options_of(task)}
    return found if place is None else {**found, "folder": place.folder}


def task_from_dict(values: Mapping[str, Any]) -> Task:
    """Return the task that :func:`task_to_dict` wrote.

    Raises:
        ConfigError: there is no such task.
        KeyError, TypeError, ValueError: other values than were written.
    """
    name = values["name"]
    task = _as_shared(find_task(name, values.get("folder")).make(name, values["options"]))
    check_types(task)
    return task
