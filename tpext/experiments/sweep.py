"""Many runs, several at a time: on this machine's cores, or on a Ray or Dask cluster, by joblib.

A run is a folder with its configuration, so that all that goes to a worker is its path. Workers go on for as long as
the sweep holds its lock: one that is interrupted or killed leaves runs with checkpoints, and the next goes on there.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
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


def default_jobs(runs: Sequence[RunFolder | ImageFolder]) -> int:
    """Return how many runs go side by side: as many as this process's cores carry, on a GPU one."""
    configs = [config for run in runs if (config := run.read_config()) is not None]
    if any(torch.device(config.device).type != "cpu" for config in configs):
        return 1
    cores: int = joblib.cpu_count()
    return max(1, cores // max(config.threads or 1 for config in configs))


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

    Args:
        folder: of the sweep.
        runs: the runs.
        lock: the sweep's, taken.
        jobs: how many go side by side; -1 is as many as the cluster has cores for.
        engine: what carries them out.
        address: of the cluster; None is one of this machine, for this call.
        console: where the progress goes.

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
            except Exception:
                if interrupts:  # it has reached a cluster's processes too
                    return
                raise
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
    with warnings.catch_warnings(), joblib.parallel_config(backend=backend, n_jobs=jobs):
        # the runs are hours long where that of joblib's tuning is seconds
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
        joblib.Parallel(batch_size=1)(tasks)


@contextlib.contextmanager
def _backend(engine: Engine, address: str | None, jobs: int) -> Iterator[str]:
    """The name of joblib's backend, with its cluster."""
    if engine == "processes":
        yield "loky"
        return
    name = {"ray": "ray", "dask": "distributed"}[engine]
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f'engine {engine} is not installed: pip install "tpext[{engine}]"') from error
    with _CLUSTERS[engine](package, address, jobs):
        yield engine


@contextlib.contextmanager
def _ray(ray: Any, address: str | None, jobs: int) -> Iterator[None]:
    local = {"num_cpus": jobs, "include_dashboard": False} if address is None else {"address": address}
    ray.init(**local, log_to_driver=False, logging_level=logging.ERROR)
    try:
        importlib.import_module("ray.util.joblib").register_ray()
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _dask(distributed: Any, address: str | None, jobs: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        where = address
        if where is None:
            # one run a process: torch's threads and random state are a process's
            local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
            where = stack.enter_context(distributed.LocalCluster(**local, silence_logs=logging.ERROR))
        stack.enter_context(distributed.Client(where))
        yield


_CLUSTERS = {"ray": _ray, "dask": _dask}
