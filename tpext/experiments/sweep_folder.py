"""The folder of a sweep.

============  ========================================================================================================
runs/NAME     one folder a run (:mod:`tpext.experiments.run_folder`); its config.json is there from the start
table.csv     one row a run: its state, the options that vary, the outcome
sweep.json    the command lines that the runs come from, and the options that vary
lock          held by the process that is at the sweep, with a word of its own; workers stop once it is no longer held
============  ========================================================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tpext.experiments.image_folder import ImageFolder, open_folder
from tpext.experiments.images import ImageConfig
from tpext.experiments.run_folder import BusyError, RunError, RunFolder, as_json, write_whole
from tpext.experiments.runs import AnyFolder, write_table
from tpext.experiments.settings import FREE_FIELDS
from tpext.experiments.sweep_plan import AnyConfig, Planned, identity

LOCK_SECONDS = 1.0
"""How long a sweep asks for its lock, which a worker of an earlier one may try for a moment."""


class SweepFolder:
    """The folder of one sweep."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.runs = self.path / "runs"
        self.table = self.path / "table.csv"
        self.record = self.path / "sweep.json"
        self.lock = self.path / "lock"

    def commands(self) -> list[list[str]]:
        """Return the command lines that the runs come from, none if there is no sweep yet.

        Raises:
            RunError: they cannot be read.
        """
        return self._record()[0]

    def varied(self) -> list[str]:
        """Return the options that the runs differ in.

        Raises:
            RunError: they cannot be read.
        """
        return self._record()[1]

    def _record(self) -> tuple[list[list[str]], list[str]]:
        if not self.record.exists():
            return [], []
        try:
            record = json.loads(self.record.read_text())
            return [list(map(str, command)) for command in record["commands"]], list(map(str, record["varied"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.record}: not the record of a sweep: {error}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        """Keep other sweeps off; makes the folder.

        Raises:
            RunError: another process is at the sweep, or the path is no folder.
        """
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunError(f"{self.path} cannot be a sweep's folder: {error.strerror}") from error
        lock = Lock(self.lock)
        lock.take()
        try:
            yield lock
        finally:
            lock.release()

    def add(self, command: Sequence[str], planned: Sequence[Planned], varied: Sequence[str]) -> list[AnyFolder]:
        """Return the folders of planned runs, made where there are none of the same configuration.

        Raises:
            RunError: a folder cannot be read or made.
        """
        present, options = {}, []
        for folder in self.folders():
            config = folder.read_config()
            if config is not None:
                present[identity(config)] = folder
                options.append(config.options())
        folders = []
        for run in planned:
            found = present.get(identity(run.config))
            if found is not None and not found.result.exists():
                _carry_out_differently(found, run.config)
            if found is None:
                options.append(run.config.options())
            folders.append(found or self._create(run))
        commands, before = self._record()
        record = {
            "commands": [*commands, *([] if list(command) in commands else [list(command)])],
            # what one command varies does not tell its runs from those of another
            "varied": _telling_apart(options, dict.fromkeys([*before, *varied])),
        }
        write_whole(self.record, as_json(record))
        return folders

    def _create(self, run: Planned) -> AnyFolder:
        number, path = 1, self.runs / run.name
        while path.exists() and (path / "config.json").exists():  # another run's, which an earlier command has named so
            number += 1
            path = self.runs / f"{run.name}-{number}"
        folder: AnyFolder
        if isinstance(run.config, ImageConfig):
            folder = ImageFolder(path)
            with folder.locked():
                folder.create(run.config)
        else:
            folder = RunFolder(path)
            with folder.locked():
                folder.create(run.config)
        return folder

    def folders(self) -> list[AnyFolder]:
        """Return the folders of all runs, by name, and by the numbers in it."""
        paths = [path.parent for path in self.runs.glob("*/config.json")]
        return [open_folder(path) for path in sorted(paths, key=_by_numbers)]

    def write_table(self) -> pd.DataFrame:
        """Write table.csv and return it.

        Raises:
            RunError: a run cannot be read, or the table not be written.
        """
        folders = self.folders()
        if not folders:
            raise RunError(f"{self.path} holds no run")
        return write_table(self.table, folders, self.varied())


def _telling_apart(runs: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """Return options by which all runs differ: those named, and others in which runs that are alike in these differ."""
    found = list(names)
    for name in dict.fromkeys(itertools.chain.from_iterable(runs)):
        if name in found or name in FREE_FIELDS:
            continue
        values: dict[tuple[str, ...], set[str]] = {}
        for run in runs:
            values.setdefault(tuple(str(run.get(known)) for known in found), set()).add(str(run.get(name)))
        if any(len(several) > 1 for several in values.values()):
            found.append(name)
    return found


def _by_numbers(path: Path) -> list[str | int]:
    """What sorts ``seed=10`` after ``seed=2``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def _carry_out_differently(folder: AnyFolder, config: AnyConfig) -> None:
    """Write what a run may change of how it is carried out: device, threads, where its data is."""
    saved = json.loads(folder.config.read_text())
    changed = {**saved, **{name: getattr(config, name) for name in FREE_FIELDS if hasattr(config, name)}}
    if changed != saved:
        write_whole(folder.config, as_json(changed))


class Lock:
    """The lock of a sweep's folder, which says to its workers that they are still wanted.

    A process that dies, however it does, loses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.word = uuid.uuid4().hex
        self._file: int | None = None

    def take(self) -> None:
        """Take the lock, or raise RunError if another process has it."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() - begin > LOCK_SECONDS:
                    os.close(file)
                    raise BusyError(f"{self.path.parent}: another process is at this sweep") from error
                time.sleep(0.05)
        os.ftruncate(file, 0)
        os.write(file, self.word.encode())
        self._file = file

    def release(self) -> None:
        """Let it go, if it is held."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


def is_held(path: Path, word: str) -> bool:
    """Whether the process that wrote the word still holds a lock."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if os.read(file, len(word) + 1) != word.encode():
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
    finally:
        os.close(file)
