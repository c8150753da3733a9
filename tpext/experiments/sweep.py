"""Many runs, several at a time: on this machine's cores, or on a Ray or Dask cluster.

A run is a folder with its configuration, so that all that goes to a worker is its path. Workers go on for as long as
the sweep holds its lock: one that is interrupted or killed leaves runs with checkpoints, and the next goes on there.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator, Sequence

import joblib
import torch
from rich.console import Console

from tpext.experiments.loop import Interrupted, catch_interrupts
from tpext.experiments.run_folder import Failure, RunError
from tpext.experiments.runs import OPEN, AnyFolder, state_of
from tpext.experiments.sweep_command import Engine
from tpext.experiments.sweep_engines import ENGINES, Stack
from tpext.experiments.sweep_folder import Lock, SweepFolder
from tpext.experiments.sweep_progress import SweepProgress
from tpext.experiments.sweep_stacks import stacks_of
from tpext.experiments.sweep_worker import POLL_SECONDS, in_one_line
from tpext.tasks import MissingDataError

DIED = "its process was killed while no other run was beside it: out of memory?"


def default_jobs(runs: Sequence[AnyFolder]) -> int:
    """Return how many runs go side by side: as many as this process's cores carry, on a GPU one."""
    options = [run.read_saved().options() for run in runs if run.config.exists()]
    if any(torch.device(of_it["device"]).type != "cpu" for of_it in options):
        return 1
    cores: int = joblib.cpu_count()
    return max(1, cores // max(of_it["threads"] or 1 for of_it in options))


def carry_out(
    folder: SweepFolder,
    runs: Sequence[AnyFolder],
    lock: Lock,
    *,
    jobs: int,
    engine: Engine = "processes",
    address: str | None = None,
    stack: int | None = 1,
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
        stack: how many runs of one shape go together at most; None is what a measurement says.
        console: where the progress goes.

    Raises:
        ConfigError: the engine is not installed or not there.
        MissingDataError: data of some runs is not there; they are left open, the others have ended.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP: all runs stop with a checkpoint.
    """
    for run in runs:
        if state_of(run) == "failed":
            run.failure.unlink()  # the cause may be gone
        run.begun.unlink(missing_ok=True)
    waiting = [run for run in runs if state_of(run) in OPEN]
    stacks = stacks_of(waiting, jobs, stack, console)
    if jobs > 2:  # one alone would be carried out in this process
        jobs = min(jobs, max(2, len(stacks)))
    with (
        catch_interrupts() as interrupts,
        SweepProgress(console, runs, jobs) as progress,
        _watching(folder, lock, interrupts, progress),
    ):
        missing = _carry_out_all(stacks, lock, jobs, engine, address, interrupts, progress)
    if interrupts:
        raise Interrupted(interrupts[0], "runs that were begun have a checkpoint; the same command goes on from there")
    if missing:
        raise MissingDataError(f"{missing[0]} ({len(missing)} of {len(runs)} runs wait for it)")


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
    stacks: Sequence[Stack],
    lock: Lock,
    jobs: int,
    engine: Engine,
    address: str | None,
    interrupts: list[int],
    progress: SweepProgress,
) -> list[str]:
    """Carry out runs, and return what data is missing, for each that waits for some."""
    missing: list[str] = []
    with ENGINES[engine](address, jobs, lock) as carry_out_several:
        while stacks and not interrupts:
            try:
                missing += itertools.chain.from_iterable(carry_out_several(stacks))
                break
            except Exception as error:
                if interrupts:  # it has reached the workers too
                    break
                died = error
            # A process died, and may have taken others with it. Which one shows where each is alone.
            runs = list(itertools.chain.from_iterable(stacks))
            suspects = [run for run in runs if state_of(run) in OPEN and run.begun.exists()]
            if not suspects:
                raise RunError(f"a process died before it began a run: {in_one_line(died)}") from died
            progress.say_that_one_died(len(suspects))
            for run in suspects:
                try:
                    missing += itertools.chain.from_iterable(carry_out_several([[run]]))
                except Exception as error:
                    if interrupts:
                        break
                    run.write_failure(Failure(diverged=False, message=DIED, details=str(error)))
            left = [[run for run in one if state_of(run) in OPEN and run not in suspects] for one in stacks]
            stacks = [one for one in left if one]
    return missing
