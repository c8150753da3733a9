"""The commands ``tpext train``, ``sweep``, ``reproduce``, ``compare``, ``figure``, ``tasks`` and ``info``."""

from __future__ import annotations

import os
import platform
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console

import tpext
from tpext.experiments import train_help
from tpext.experiments.cells import CELLS
from tpext.experiments.feedback_figures import FigureCommand
from tpext.experiments.image_commands import TrainImages
from tpext.experiments.loop import Interrupted
from tpext.experiments.own import from_own_code
from tpext.experiments.presets import PRESETS, Case, presets_of
from tpext.experiments.progress import say
from tpext.experiments.reproduce_command import Reproduce
from tpext.experiments.rule_names import (
    LAYER_RULES,
    SEQUENCE_RULES,
)
from tpext.experiments.run_folder import RunError
from tpext.experiments.saved_config import HasOptions
from tpext.experiments.settings import FREE_FIELDS, ConfigError
from tpext.experiments.sweep_command import Sweep, parse_sweep
from tpext.experiments.task_names import shared_tasks
from tpext.experiments.train_command import Train
from tpext.tasks import IMAGE_SETS, TASKS, MissingDataError, Task, make_task


@dataclass(frozen=True)
class Compare:
    """Draw runs of one task side by side; runs with the same label are seeds of one method."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, or folders of many, such as a sweep's, each as DIR or LABEL=DIR; without a label, the rule and the
    settings in which the runs differ."""
    out: Path = Path("comparison.png")
    """The picture."""
    title: str = ""
    """Its title; empty: the task."""

    def carry_out(self, console: Console) -> int:
        # here, as matplotlib and pandas take longer to load than a help text to print
        from tpext.experiments.figures import draw_comparison
        from tpext.experiments.runs import folders_of

        runs = [(label, run) for label, path in map(_split, self.runs) for run in folders_of(path)]
        configs = [run.read_saved() for _, run in runs]
        groups: dict[str, list[str | Path]] = {}
        for (label, run), default in zip(runs, default_labels(configs), strict=True):
            groups.setdefault(label or default, []).append(run.path)
        say(console, f"written: {draw_comparison(groups, self.out, title=self.title)}")
        return 0


def _split(run: str) -> tuple[str, str]:
    """Return label and folder of an argument DIR or LABEL=DIR, each of which may hold ``=`` itself."""
    parts = run.split("=")
    for count in range(len(parts)):
        path = "=".join(parts[count:])
        if Path(path).is_dir():
            return "=".join(parts[:count]), path
    raise RunError(f"{run}: there is no such folder")


def default_labels(configs: Sequence[HasOptions]) -> list[str]:
    """Return a label for each run: its rule and the options in which the runs differ, seeds and free fields apart.

    Runs have the same label only if they compute the same, seeds apart.
    """
    methods = [_that_act(config.options()) for config in configs]
    names = dict.fromkeys(name for method in methods for name in method if name not in ("rule", "seed", *FREE_FIELDS))
    if all(method.get("head_lr") == method.get("lr") for method in methods):
        names.pop("head_lr", None)  # it goes with lr
    differing = [name for name in names if len({method[name] for method in methods if name in method}) > 1]
    return [
        ", ".join([method["rule"], *(f"{name} {method[name]}" for name in differing if name in method)])
        for method in methods
    ]


def _that_act(options: dict[str, Any]) -> dict[str, Any]:
    """Options without the slope of cells with gates, where it does nothing."""
    cell = CELLS.get(options.get("cell", ""))
    return {name: value for name, value in options.items() if not (name == "slope" and cell and cell.gated)}


@dataclass(frozen=True)
class Tasks:
    """Describe the tasks."""

    def carry_out(self, console: Console) -> int:
        lines = [("task", "input", "output", "correct when", "published settings for")]
        made = {name: make_task(name) for name in TASKS}
        for name, task in sorted(made.items(), key=lambda item: item[1].length is None):
            if "chunk" in TASKS[name].options:
                shown = f"{task.length} / chunk steps of chunk"
            else:
                size = task.input_size
                shown = f"{size} numbers" if task.length is None else f"{task.length} steps of {size}"
            known = [
                f"{rule} ({preset})"
                for rule, kind in (LAYER_RULES if task.length is None else SEQUENCE_RULES).items()
                for preset in presets_of(Case(name, task, kind))
                if PRESETS[preset].published
            ]
            lines.append((name, shown, _output(task), task.correct_when, ", ".join(known) or "-"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            text = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
            say(console, text.rstrip())
        sets = ", ".join(IMAGE_SETS)
        say(console, f"images: tpext train images --dataset NAME, for networks of any layers; NAME is one of {sets}")
        return 0


def _output(task: Task) -> str:
    try:
        size = task.output_size
    except MissingDataError:
        return "as the file has"
    if task.criterion == "cross_entropy":
        return f"{size} classes"
    return "a number" if size == 1 else f"{size} numbers"


@dataclass(frozen=True)
class Info:
    """Show the build, the machine and the versions."""

    def carry_out(self, console: Console) -> int:
        build = tpext.build_info()
        devices = ["cpu"]
        if build["cuda_architectures"]:
            count = torch.cuda.device_count()
            devices += [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)]
        else:
            devices += ["this build of tpext has no CUDA kernels"]
        lines = {f"build: {name.replace('_', ' ')}": value for name, value in build.items()}
        lines |= {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            "torch CPU capability": torch.backends.cpu.get_cpu_capability(),
            "torch threads": torch.get_num_threads(),
            "devices": devices,
        }
        width = max(map(len, lines))
        for name, value in lines.items():
            shown = (", ".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else value
            say(console, f"{name:<{width}}  {shown}")
        return 0


Command: Any = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[FigureCommand, tyro.conf.subcommand("figure")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line and return its exit status.

    That is 0, 1 for an error, 2 for wrong arguments, 3 for a run that diverged, and for an interrupted one 130 for
    Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    command: Any = None
    try:
        with shared_tasks():
            command = _parse(arguments)
            _check_not_empty(arguments)
            status: int = command.carry_out(Console())
        return status
    except SystemExit as stop:  # tyro has shown its help or the error, also of the options of a sweep's runs
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        raise  # for the caller, who knows that nothing is left to say
    except (ConfigError, RunError, tpext.SingularError, OSError) as error:
        print(f"tpext: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # torch has no type of its own for an allocation that failed on the CPU.
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
            print(f"tpext: out of memory: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        trace = from_own_code(error)
        if trace is None:
            raise
        traceback.print_exception(type(error), error, trace)
        print("tpext: stopped by this error in code of your own", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        why = str(interrupt)  # of a run that was under way
        if why and isinstance(command, (Train, TrainImages)):
            why += "; the same command with --resume continues from the last checkpoint"
        _last_words(f"tpext: {why or 'interrupted'}")
        return 128 + (interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT)


def _parse(arguments: Sequence[str]) -> Any:
    """Return the command that a command line asks for, or leave with its help."""
    words = list(arguments)
    if words == ["--version"]:
        print(f"tpext {tpext.__version__}")
        raise SystemExit(0)
    if words[:2] == ["train", "images"]:
        return tyro.cli(TrainImages, args=words[2:], prog="tpext train images")
    if words[:1] == ["sweep"]:
        return parse_sweep(words[1:])
    if words[:1] == ["train"] and train_help.asks(words[1:]):
        return tyro.cli(train_help.command_for(words[1:]), args=["--help"], prog=f"tpext train {words[1]}")
    try:
        return tyro.cli(
            Command, args=words, prog="tpext", config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
        )
    except SystemExit as stop:
        if stop.code and words[:1] == ["train"]:
            for line in train_help.typed_alone(words[1:]):
                print(f"tpext: {line}", file=sys.stderr)
        raise


def _check_not_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty argument, which is no name of a folder; as a path it would be the current one."""
    for index, argument in enumerate(arguments):
        before = arguments[index - 1] if index else ""
        name = before if before.startswith("--") else "an argument"
        if argument.startswith("--") and argument.endswith("="):
            name, argument = argument[:-1], ""
        if not argument and name != "--title":
            raise ConfigError(f"{name} must not be empty")


def _last_words(text: str) -> None:
    """Print to stderr, unless the terminal is gone; then the interpreter's own flush has nothing to say either."""
    try:
        print(text, file=sys.stderr)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
