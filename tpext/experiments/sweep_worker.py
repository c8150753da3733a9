"""What a sweep's worker does: a run, or a stack of runs together, for as long as the sweep wants it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tpext.experiments.image_folder import ImageFolder, open_folder
from tpext.experiments.image_train import train_images
from tpext.experiments.loop import DivergedError
from tpext.experiments.run_folder import BusyError, Failure, RunError, RunFolder
from tpext.experiments.runs import AnyFolder
from tpext.experiments.sweep_folder import is_held
from tpext.experiments.task_names import shared_tasks
from tpext.experiments.train import train, train_together
from tpext.tasks import MissingDataError

POLL_SECONDS = 0.25
"""How often workers look whether they are still wanted, and the sweep at what they do."""
BUSY_SECONDS = 60.0
"""How long a worker waits for one of an earlier sweep to leave the run."""


class Parent(NamedTuple):
    """A sweep's process, to one that it has started."""

    pid: int
    folder: str


def carry_out_runs(paths: Sequence[str], lock: str, word: str, parent: Parent | None) -> list[str]:
    """Carry out runs to their ends, their failures, or the end of the sweep; what came of them is in their folders.

    Returns what data is missing, for each run that waits for some.

    Args:
        paths: of the runs' folders; several are a stack, and run together.
        lock, word: of the sweep.
        parent: the sweep's process, where it is this one's parent: its working directory is this one's too, and without
            it this one ends.
    """
    wanted = threading.Event()
    wanted.set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if not is_held(Path(lock), word):
                wanted.clear()
                return

    folders = [folder for folder in map(open_folder, paths) if folder.config.exists()]
    if not is_held(Path(lock), word) or not folders:
        return []
    if parent is not None:
        os.chdir(parent.folder)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep has the terminal's Ctrl-C too, and lets the lock go
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    missing: list[str] = []
    for folder in folders:
        folder.begun.touch()
    try:
        with shared_tasks():
            alone = folders if len(folders) == 1 else _carry_out_stack(folders, lambda: not wanted.is_set(), missing)
            for folder in alone:
                _carry_out_alone(folder, lambda: not wanted.is_set(), missing)
    finally:
        for folder in folders:
            folder.begun.unlink(missing_ok=True)
        ended.set()
        watcher.join()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(0)  # joblib's would wait for more for minutes
    return missing


def _carry_out_stack(folders: Sequence[AnyFolder], stop: Callable[[], bool], missing: list[str]) -> list[AnyFolder]:
    """Carry out runs together, and return those at which another process still is."""
    busy = []
    stack = [(folder, folder.read_config()) for folder in folders if isinstance(folder, RunFolder)]
    members = [(folder, config) for folder, config in stack if config is not None]

    def ended(place: int, outcome: object) -> None:
        folder = members[place][0]
        if isinstance(outcome, BusyError):
            busy.append(folder)
        else:
            _write_failure(folder, outcome, missing)
            folder.begun.unlink(missing_ok=True)

    train_together([config for _, config in members], [folder for folder, _ in members], stop=stop, ended=ended)
    return [*busy]


def _carry_out_alone(folder: AnyFolder, stop: Callable[[], bool], missing: list[str]) -> None:
    try:
        _train(folder, stop)
    # one run must not take the others with it; where it was interrupted a checkpoint is saved
    except (Exception, KeyboardInterrupt) as error:
        _write_failure(folder, error, missing)


def _write_failure(folder: AnyFolder, outcome: object, missing: list[str]) -> None:
    """Write what a run has raised, unless it has not, or was interrupted, or its data is missing."""
    if isinstance(outcome, MissingDataError):
        missing.append(str(outcome))
        return
    if not isinstance(outcome, Exception):
        return
    if isinstance(outcome, DivergedError):
        failure = Failure(diverged=True, message=str(outcome))
    else:
        details = "".join(traceback.format_exception(outcome))
        failure = Failure(diverged=False, message=in_one_line(outcome), details=details)
    with contextlib.suppress(RunError):  # the disk is full, or the folder gone: the sweep sees a run not ended
        folder.write_failure(failure)


def _train(folder: AnyFolder, stop: Callable[[], bool]) -> None:
    begin = time.monotonic()
    while True:
        try:
            if isinstance(folder, ImageFolder):
                images = folder.read_config()
                if images is not None:
                    train_images(images, folder.path, resume=True, stop=stop)
            else:
                config = folder.read_config()
                if config is not None:
                    train(config, folder.path, resume=True, stop=stop)
            return
        except BusyError:
            # a worker of a sweep that was killed, which has not seen it yet
            if stop():
                return
            if time.monotonic() - begin > BUSY_SECONDS:
                raise
            time.sleep(POLL_SECONDS)


def in_one_line(error: Exception) -> str:
    """Return an error as one line of text."""
    return " ".join(f"{type(error).__name__}: {error}".split())
