"""What carries out the runs of a sweep: loky's processes, as joblib has them, a Ray or a Dask cluster."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, TypeAlias

import joblib
from joblib.externals import loky

from tpext.experiments.runs import AnyFolder
from tpext.experiments.settings import ConfigError
from tpext.experiments.sweep_command import Engine
from tpext.experiments.sweep_folder import Lock
from tpext.experiments.sweep_worker import Parent, carry_out_runs

Stack: TypeAlias = Sequence[AnyFolder]
"""Runs that go together; one alone is a stack too."""

CarryOut: TypeAlias = Callable[[Sequence[Stack]], list[list[str]]]
"""Carries out stacks by some engine, and returns what data runs of each are missing. An exception is of the engine:
runs keep theirs to themselves."""

IDLE_SECONDS = 300
"""After which a process ends that has nothing to do."""


def _by_processes(stacks: Sequence[Stack], lock: Lock, jobs: int) -> list[list[str]]:
    # the processes of an earlier call serve again, unless they have other variables
    env = dict(os.environ)
    if any(run.has_own_code() for stack in stacks for run in stack):
        # or another folder, where what a user's file imports may be another module of the same name
        env["PWD"] = os.getcwd()
    with warnings.catch_warnings():
        # the runs are hours long where that of joblib's tuning is seconds
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
        executor = loky.get_reusable_executor(max_workers=jobs, timeout=IDLE_SECONDS, env=env)
        # now, as its own start lets signals through again
        resource_tracker.ensure_running()
        # a terminal's Ctrl-C is the sweep's, from the processes' start on
        with _blocked(signal.SIGINT):
            parent = Parent(os.getpid(), os.getcwd())
            tasks = [executor.submit(carry_out_runs, *_arguments(stack, lock), parent) for stack in stacks]
        concurrent.futures.wait(tasks)
    return [task.result() for task in tasks]


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Let processes that are started meanwhile not hear of a signal; this one hears of it, if later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _by_joblib(stacks: Sequence[Stack], lock: Lock, jobs: int, backend: str) -> list[list[str]]:
    tasks = [joblib.delayed(carry_out_runs)(*_arguments(stack, lock), None) for stack in stacks]
    with joblib.parallel_config(backend=backend, n_jobs=jobs):
        missing: list[list[str]] = joblib.Parallel(batch_size=1)(tasks)
    return missing


def _arguments(stack: Stack, lock: Lock) -> tuple[list[str], str, str]:
    return [str(run.path.absolute()) for run in stack], str(lock.path.absolute()), lock.word


@contextlib.contextmanager
def _processes(address: str | None, jobs: int, lock: Lock) -> Iterator[CarryOut]:
    yield lambda stacks: _by_processes(stacks, lock, jobs)


@contextlib.contextmanager
def _ray(address: str | None, jobs: int, lock: Lock) -> Iterator[CarryOut]:
    ray = _package("ray", "ray")
    local = {"num_cpus": jobs, "include_dashboard": False} if address is None else {"address": address}
    with _handlers_kept():
        ray.init(**local, log_to_driver=False, logging_level=logging.ERROR)
    try:
        importlib.import_module("ray.util.joblib").register_ray()
        yield lambda stacks: _by_joblib(stacks, lock, jobs, "ray")
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _dask(address: str | None, jobs: int, lock: Lock) -> Iterator[CarryOut]:
    distributed = _package("dask", "distributed")

    def carry_out_several(stacks: Sequence[Stack]) -> list[list[str]]:
        # not by joblib, which waits for ever for a task whose process has died
        tasks = [client.submit(carry_out_runs, *_arguments(one, lock), None, pure=False) for one in stacks]
        distributed.wait(tasks)
        return [task.result() for task in tasks]

    with contextlib.ExitStack() as stack:
        where = address
        if where is None:
            # one stack a process: torch's threads and random state are a process's
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


ENGINES = {"processes": _processes, "ray": _ray, "dask": _dask}
"""By the names of ``--engine``: a context that takes address, jobs and the sweep's lock, and gives what carries out."""
