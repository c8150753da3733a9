"""Many runs, several at a time: on this machine's cores, or on a Ray or Dask cluster, by joblib.

A run is a folder with its configuration, so that all that goes to a worker is its path. Workers go on for as long as
the sweep holds its lock: one that is interrupted or killed leaves runs with checkpoints, and the next goes on there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib
import torch
from joblib.externals.loky.process_executor import BrokenProcessPool
from rich.console import Console

from tpext.experiments.image_folder import ImageFolder, open_folder
from tpext.experiments.image_train import train_images
from tpext.experiments.loop import DivergedError, Interrupted, catch_interrupts
from tpext.experiments.run_folder import BusyError, Failure, RunFolder
from tpext.experiments.runs import State, state_of, write_table
from tpext.experiments.settings import ConfigError
from tpext.experiments.sweep_command import Engine
from tpext.experiments.sweep_folder import Lock, SweepFolder, is_held
from tpext.experiments.sweep_progress import SweepProgress
from tpext.experiments.train import train

OPEN: tuple[State, ...] = ("waiting", "started")
"""States of runs that have not ended."""
POLL_SECONDS = 0.25
"""How often workers look whether they are still wanted, and the sweep at what they do."""
BUSY_SECONDS = 60.0
"""How long a worker waits for one of an earlier sweep to leave the run."""
DIED = "its process was killed while no other run was beside it: out of memory?"


def carry_out_run(path: str, lock: str, word: str, parent: int | None) -> None:
    """Carry out one run to its end, its failure, or the end of the sweep; what came of it is in its folder.

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

    if not is_held(Path(lock), word):
        return
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    folder = open_folder(path)
    try:
        _train(folder, lambda: not wanted.is_set())
    except KeyboardInterrupt:  # a checkpoint is saved, and the sweep knows why
        pass
    except DivergedError as error:
        folder.write_failure(Failure(diverged=True, message=str(error)))
    # one run must not take the others with it
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        folder.write_failure(Failure(diverged=False, message=message, details=traceback.format_exc()))
    finally:
        ended.set()
        watcher.join()
        if parent is not None and os.getppid() != parent:
            os._exit(0)  # joblib's would wait for more for minutes


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
            if time.monotonic() - begin > BUSY_SECONDS or stop():
                raise
            time.sleep(POLL_SECONDS)


def default_jobs(threads: int, device: str) -> int:
    """Return how many runs go side by side: as many as this process's cores carry, on a GPU one."""
    return max(1, joblib.cpu_count() // threads) if torch.device(device).type == "cpu" else 1


def carry_out(
    folder: SweepFolder,
    runs: Sequence[RunFolder | ImageFolder],
    lock: Lock,
    *,
    jobs: int,
    engine: Engine = "processes",
    address: str | None = None,
    console: Console,
) -> None:
    """Carry out runs in their folders, those apart that are complete or have diverged.

    Raises:
        ConfigError: the engine is not installed or not there.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP: all runs stop with a checkpoint.
    """
    for run in runs:
        if state_of(run) == "failed":
            run.failure.unlink()  # the cause may be gone
    waiting = [run for run in runs if state_of(run) in OPEN]
    with (
        catch_interrupts() as interrupts,
        SweepProgress(console, runs, jobs) as progress,
        _watching(folder, runs, lock, interrupts, progress),
    ):
        _carry_out_all(waiting, lock, jobs, engine, address, interrupts)
    if interrupts:
        raise Interrupted(interrupts[0], "runs that were begun have a checkpoint; the same command goes on from there")


@contextlib.contextmanager
def _watching(
    folder: SweepFolder,
    runs: Sequence[RunFolder | ImageFolder],
    lock: Lock,
    interrupts: list[int],
    progress: SweepProgress,
) -> Iterator[None]:
    """Keep table and progress up to date, and let go of the lock when a signal comes in, all from a thread."""
    ended = threading.Event()

    def look() -> None:
        if interrupts:
            lock.release()
        if progress.look():
            write_table(folder.table, runs, folder.varied())

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            look()

    write_table(folder.table, runs, folder.varied())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        look()


def _carry_out_all(
    runs: Sequence[RunFolder | ImageFolder],
    lock: Lock,
    jobs: int,
    engine: Engine,
    address: str | None,
    interrupts: list[int],
) -> None:
    with _backend(engine, address, jobs) as backend:
        while runs and not interrupts:
            try:
                _parallel(runs, lock, jobs, backend)
                return
            except BrokenProcessPool:
                if interrupts:
                    return
            # One process died and took the others with it. Which one shows where each is alone.
            suspects = [run for run in runs if state_of(run) in OPEN and _was_left(run)]
            for run in suspects:
                try:
                    _parallel([run], lock, 2, backend)
                except BrokenProcessPool:
                    run.write_failure(Failure(diverged=False, message=DIED))
                if interrupts:
                    return
            runs = [run for run in runs if state_of(run) in OPEN and run not in suspects]


def _was_left(run: RunFolder | ImageFolder) -> bool:
    """Whether the process that was last at a run has not ended it."""
    return run.lock.exists() and run.lock.stat().st_size > 0


def _parallel(runs: Sequence[RunFolder | ImageFolder], lock: Lock, jobs: int, backend: str) -> None:
    where = str(lock.path.absolute())
    parent = os.getpid() if backend == "loky" and jobs > 1 else None
    tasks = (joblib.delayed(carry_out_run)(str(run.path.absolute()), where, lock.word, parent) for run in runs)
    with warnings.catch_warnings():
        # the runs are hours long where that of joblib's tuning is seconds
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
        joblib.Parallel(n_jobs=jobs, backend=backend, batch_size=1)(tasks)


@contextlib.contextmanager
def _backend(engine: Engine, address: str | None, jobs: int) -> Iterator[str]:
    """The name of joblib's backend, with its cluster."""
    if engine == "processes":
        yield "loky"
    elif engine == "ray":
        with _ray(address, jobs):
            yield "ray"
    else:
        with _dask(address, jobs):
            yield "dask"


@contextlib.contextmanager
def _ray(address: str | None, jobs: int) -> Iterator[None]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ModuleNotFoundError as error:
        raise ConfigError('engine ray is not installed: pip install "tpext[ray]"') from error
    local: dict[str, Any] = {"num_cpus": jobs} if address is None else {"address": address}
    ray.init(**local, log_to_driver=False, ignore_reinit_error=True)
    register_ray()
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _dask(address: str | None, jobs: int) -> Iterator[None]:
    try:
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise ConfigError('engine dask is not installed: pip install "tpext[dask]"') from error
    if address is not None:
        with Client(address):
            yield
        return
    # one run a process: torch's threads and random state are a process's
    with LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
        yield
