"""Many runs, several at a time: on this machine's cores, or on a Ray or Dask cluster, by joblib.

A run is a folder with its configuration, so that all that goes to a worker is its path. Workers go on for as long as
the sweep holds its lock: one that is interrupted or killed leaves runs with checkpoints, and the next goes on there.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import joblib
import torch
from rich.console import Console

from tpext.experiments.image_folder import ImageFolder, open_folder
from tpext.experiments.image_train import train_images
from tpext.experiments.loop import DivergedError, Interrupted, catch_interrupts
from tpext.experiments.run_folder import BusyError, Failure, RunError, RunFolder
from tpext.experiments.runs import OPEN, state_of
from tpext.experiments.settings import ConfigError
from tpext.experiments.sweep_command import Engine
from tpext.experiments.sweep_folder import Lock, SweepFolder, is_held
from tpext.experiments.sweep_progress import SweepProgress
from tpext.experiments.train import train

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

    folder = open_folder(path)
    if not is_held(Path(lock), word) or not folder.config.exists():
        return
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep has the terminal's Ctrl-C too, and lets the lock go
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    failure: Failure | None = None
    folder.begun.touch()
    try:
        _train(folder, lambda: not wanted.is_set())
    except KeyboardInterrupt:  # a checkpoint is saved
        pass
    except DivergedError as error:
        failure = Failure(diverged=True, message=str(error))
    # one run must not take the others with it
    except Exception as error:
        failure = Failure(diverged=False, message=_in_one_line(error), details=traceback.format_exc())
    finally:
        if failure is not None:
            with contextlib.suppress(RunError):  # the disk is full, or the folder gone: the sweep sees a run not ended
                folder.write_failure(failure)
        folder.begun.unlink(missing_ok=True)
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
            if stop():
                return
            if time.monotonic() - begin > BUSY_SECONDS:
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
        run.begun.unlink(missing_ok=True)
    waiting = [run for run in runs if state_of(run) in OPEN]
    if jobs > 2:  # one alone would be carried out in this process
        jobs = min(jobs, max(2, len(waiting)))
    with (
        catch_interrupts() as interrupts,
        SweepProgress(console, runs, jobs) as progress,
        _watching(folder, lock, interrupts, progress),
    ):
        _carry_out_all(waiting, lock, jobs, engine, address, interrupts)
    if interrupts:
        raise Interrupted(interrupts[0], "runs that were begun have a checkpoint; the same command goes on from there")


@contextlib.contextmanager
def _watching(folder: SweepFolder, lock: Lock, interrupts: list[int], progress: SweepProgress) -> Iterator[None]:
    """Keep table and progress up to date, and let go of the lock when a signal comes in, all from a thread.

    Raises:
        BaseException: that of the thread, such as of a full disk; it has let go of the lock.
    """
    ended = threading.Event()
    errors: list[BaseException] = []

    def look() -> None:
        if interrupts:
            lock.release()
        if signal.SIGHUP in interrupts:
            progress.console.quiet = True  # the terminal is gone, and writing to it an error
        if progress.look():
            folder.write_table()

    def watch() -> None:
        try:
            while not ended.wait(POLL_SECONDS):
                look()
        except BaseException as error:  # rich ends a thread whose reader is gone by SystemExit
            errors.append(error)
            lock.release()

    folder.write_table()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    if errors:
        raise errors[0]
    look()


def _carry_out_all(
    runs: Sequence[RunFolder | ImageFolder],
    lock: Lock,
    jobs: int,
    engine: Engine,
    address: str | None,
    interrupts: list[int],
) -> None:
    with _ENGINES[engine](address, jobs, lock) as carry_out_several:
        while runs and not interrupts:
            try:
                carry_out_several(runs)
                return
            except Exception as error:
                if interrupts:  # it has reached the workers too
                    return
                died = error
            # A process died, and may have taken others with it. Which one shows where each is alone.
            suspects = [run for run in runs if state_of(run) in OPEN and run.begun.exists()]
            if not suspects:
                raise RunError(f"a process died before it began a run: {_in_one_line(died)}") from died
            for run in suspects:
                try:
                    carry_out_several([run])
                except Exception as error:
                    if interrupts:
                        return
                    run.write_failure(Failure(diverged=False, message=DIED, details=str(error)))
            runs = [run for run in runs if state_of(run) in OPEN and run not in suspects]


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


CarryOut: TypeAlias = Callable[[Sequence[RunFolder | ImageFolder]], None]
"""Carries out runs by some engine. An exception is of the engine: runs keep theirs to themselves."""


def _by_joblib(runs: Sequence[RunFolder | ImageFolder], lock: Lock, jobs: int, backend: str) -> None:
    parent = os.getpid() if backend == "loky" and jobs > 1 else None
    tasks = [joblib.delayed(carry_out_run)(*_arguments(run, lock), parent) for run in runs]
    with warnings.catch_warnings(), joblib.parallel_config(backend=backend, n_jobs=jobs):
        # the runs are hours long where that of joblib's tuning is seconds
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
        joblib.Parallel(batch_size=1)(tasks)


def _arguments(run: RunFolder | ImageFolder, lock: Lock) -> tuple[str, str, str]:
    return str(run.path.absolute()), str(lock.path.absolute()), lock.word


@contextlib.contextmanager
def _processes(address: str | None, jobs: int, lock: Lock) -> Iterator[CarryOut]:
    yield lambda runs: _by_joblib(runs, lock, jobs, "loky")


@contextlib.contextmanager
def _ray(address: str | None, jobs: int, lock: Lock) -> Iterator[CarryOut]:
    ray = _package("ray", "ray")
    local = {"num_cpus": jobs, "include_dashboard": False} if address is None else {"address": address}
    with _handlers_kept():
        ray.init(**local, log_to_driver=False, logging_level=logging.ERROR)
    try:
        importlib.import_module("ray.util.joblib").register_ray()
        yield lambda runs: _by_joblib(runs, lock, jobs, "ray")
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _dask(address: str | None, jobs: int, lock: Lock) -> Iterator[CarryOut]:
    distributed = _package("dask", "distributed")

    def carry_out_several(runs: Sequence[RunFolder | ImageFolder]) -> None:
        # not by joblib, which waits for ever for a task whose process has died
        tasks = [client.submit(carry_out_run, *_arguments(run, lock), None, pure=False) for run in runs]
        distributed.wait(tasks)
        for task in tasks:
            if (error := task.exception()) is not None:
                raise error

    with contextlib.ExitStack() as stack:
        where = address
        if where is None:
            # one run a process: torch's threads and random state are a process's
            local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
            with _handlers_kept(ignored=signal.SIGINT):
                where = stack.enter_context(distributed.LocalCluster(**local, silence_logs=logging.ERROR))
        client = stack.enter_context(distributed.Client(where))
        yield carry_out_several


def _package(engine: Engine, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f'engine {engine} is not installed: pip install "tpext[{engine}]"') from error


@contextlib.contextmanager
def _handlers_kept(ignored: int | None = None) -> Iterator[None]:
    """Keep a cluster's start from handling this process's signals, and a terminal's Ctrl-C from its processes.

    Args:
        ignored: a signal that the processes that are started ignore; so does this one while they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


_ENGINES = {"processes": _processes, "ray": _ray, "dask": _dask}
