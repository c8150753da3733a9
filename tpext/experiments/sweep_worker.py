"""What a sweep's worker does: one run, for as long as the sweep wants it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tpext.experiments.image_folder import ImageFolder, open_folder
from tpext.experiments.image_train import train_images
from tpext.experiments.loop import DivergedError
from tpext.experiments.run_folder import BusyError, Failure, RunError, RunFolder
from tpext.experiments.sweep_folder import is_held
from tpext.experiments.train import train
from tpext.tasks import MissingDataError

POLL_SECONDS = 0.25
"""How often workers look whether they are still wanted, and the sweep at what they do."""
BUSY_SECONDS = 60.0
"""How long a worker waits for one of an earlier sweep to leave the run."""


def carry_out_run(path: str, lock: str, word: str, parent: int | None) -> str | None:
    """Carry out one run to its end, its failure, or the end of the sweep; what came of it is in its folder.

    Returns what data is missing, for which the run waits; else None.

    Args:
        path: of the run's folder.
        lock, word: of the sweep.
        parent: the sweep's process, where it is this one's parent; without it, this one ends too.
    """
    wanted = threading.Event()
    wanted.set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if not is_held(Path(lock), word):
                wanted.clear()
                return

    folder = open_folder(path)
    if not is_held(Path(lock), word) or not folder.config.exists():
        return None
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep has the terminal's Ctrl-C too, and lets the lock go
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    failure: Failure | None = None
    missing: str | None = None
    folder.begun.touch()
    try:
        _train(folder, lambda: not wanted.is_set())
    except KeyboardInterrupt:  # a checkpoint is saved
        pass
    except DivergedError as error:
        failure = Failure(diverged=True, message=str(error))
    except MissingDataError as error:
        missing = str(error)
    # one run must not take the others with it
    except Exception as error:
        failure = Failure(diverged=False, message=in_one_line(error), details=traceback.format_exc())
    finally:
        if failure is not None:
            with contextlib.suppress(RunError):  # the disk is full, or the folder gone: the sweep sees a run not ended
                folder.write_failure(failure)
        folder.begun.unlink(missing_ok=True)
        ended.set()
        watcher.join()
        if parent is not None and os.getppid() != parent:
            os._exit(0)  # joblib's would wait for more for minutes
    return missing


def _train(folder: RunFolder | ImageFolder, stop: Callable[[], bool]) -> None:
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
