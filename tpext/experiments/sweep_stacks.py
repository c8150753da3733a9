"""Which runs of a sweep go together in stacks, and whether they should: that is measured."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from tpext.experiments.config import Config
from tpext.experiments.loop import torch_state
from tpext.experiments.passes import carry_out, carry_out_together
from tpext.experiments.progress import say
from tpext.experiments.rule_names import is_own
from tpext.experiments.run_folder import RunFolder
from tpext.experiments.runs import AnyFolder
from tpext.experiments.train import TrainingRun, default_threads
from tpext.rules import RecurrentRule
from tpext.rules.base import shared_part

LARGEST = 16
"""Runs of a stack, unless the sweep says how many."""
LEAST_GAIN = 1.1
"""What a stack must be faster by than its runs one after another: they end and are looked at less evenly."""
SECONDS = 0.5
"""How long both are timed, unless two iterations of all take longer."""
ITERATIONS = 4
"""Of small networks so many are timed at once: beginning a stack takes time too."""
STILL = 1e-30


def stacks_of(runs: Sequence[AnyFolder], jobs: int, size: int | None, console: Console) -> list[Sequence[AnyFolder]]:
    """Return runs in stacks, with those that cannot go together alone.

    Args:
        runs: the runs.
        jobs: how many stacks go side by side; a stack is no larger than leaves each of them one.
        size: the largest stack; 1 is every run alone; None is what a measurement says, of each shape.
        console: where that is told.
    """
    if size == 1:
        return [[run] for run in runs]
    groups: dict[object, list[tuple[AnyFolder, Config]]] = {}
    stacks: list[Sequence[AnyFolder]] = []
    for run in runs:
        config = run.read_config()
        if isinstance(config, Config) and can_stack(config):
            groups.setdefault(_shape(config), []).append((run, config))
        else:
            stacks.append([run])
    for group in groups.values():
        most = min(size or LARGEST, math.ceil(len(group) / max(jobs, 1)))
        if size is None and most > 1:
            most = _measured(group[:most], console)
        stacks += [[run for run, _ in part] for part in _evenly(group, most)]
    return stacks


def _measured(stack: Sequence[tuple[AnyFolder, Config]], console: Console) -> int:
    """How many runs are to go together, all of these or one."""
    try:
        gain = measured_gain([config for _, config in stack])
    # such as of data that is not there: the run says it
    except Exception:
        return 1
    chosen = len(stack) if gain >= LEAST_GAIN else 1
    how = f"in stacks of up to {chosen}" if chosen > 1 else "each alone"
    say(console, f"{len(stack)} runs together are {gain:.2f} times as fast as one after another: {how}")
    return chosen


def can_stack(config: Config) -> bool:
    """Return whether runs of such a configuration can go together: recurrent ones that the kernels carry out alone.

    Torch's products of a stack, on a GPU and in some rules, have other bits than those of each member.
    """
    rule, on_cpu = config.rule, torch.device(config.device).type == "cpu"
    by_kernels = isinstance(rule, RecurrentRule) and not rule.learns and rule.correction != "none"
    return config.task.length is not None and on_cpu and by_kernels and not is_own(type(rule))


def _shape(config: Config) -> object:
    """What runs that go together have in common."""
    sizes = (config.cell, config.hidden_size, config.layers, config.nonlinearity, config.batch_size)
    return (
        repr(config.task),
        config.data_dir,
        *sizes,
        config.precision,
        config.device,
        config.threads,
        repr(shared_part(config.rule)),
    )


def _evenly(group: Sequence[tuple[AnyFolder, Config]], most: int) -> Iterable[Sequence[tuple[AnyFolder, Config]]]:
    """Parts of nearly one size, none above ``most``."""
    count = math.ceil(len(group) / most)
    bounds = [len(group) * place // count for place in range(count + 1)]
    return [group[begin:end] for begin, end in itertools.pairwise(bounds)]


def measured_gain(configs: Sequence[Config]) -> float:
    """Return how many times as fast iterations of runs are together as one after another; nothing is written."""
    with torch_state(configs[0].seed, configs[0].threads or default_threads(configs[0])):
        # at rates that move nothing, so that nothing diverges
        still = [replace(config, lr=STILL, head_lr=STILL) for config in configs]
        task = configs[0].make_task()
        runs = [TrainingRun(config, RunFolder(Path()), Console(quiet=True), task) for config in still]

        def apart(iterations: range) -> None:
            for run in runs:
                carry_out(run.rehearse(iterations))

        def together(iterations: range) -> None:
            courses = [run.rehearse(iterations) for run in runs]
            carry_out_together(courses, [config.seed for config in configs], lambda *ended: None)

        seconds, first, size, spent = [math.inf, math.inf], 1, 1, 0.0
        begin = time.perf_counter()
        while first <= 2 or spent < SECONDS:
            for place, way in enumerate((apart, together)):
                start = time.perf_counter()
                way(range(first, first + size))
                seconds[place] = min(seconds[place], (time.perf_counter() - start) / size)
            spent = time.perf_counter() - begin
            first += size
            size = ITERATIONS if spent * ITERATIONS < SECONDS else 1
    return seconds[0] / seconds[1]
