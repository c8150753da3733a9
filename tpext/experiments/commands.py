"""The commands ``tpext train``, ``compare``, ``figure``, ``tasks`` and ``info``."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
import tyro
from rich.console import Console

import tpext
from tpext.experiments.config import Config, make_config
from tpext.experiments.defaults import shown_default
from tpext.experiments.feedback_figures import FigureCommand
from tpext.experiments.field_help import help_of
from tpext.experiments.image_commands import TrainImages
from tpext.experiments.image_folder import open_folder
from tpext.experiments.loop import DivergedError, Interrupted
from tpext.experiments.options import (
    DEFAULT,
    DataFolder,
    Option,
    OwnOptions,
    Switch,
    option,
    options_of,
    report_divergence,
)
from tpext.experiments.options import (
    command as make_command,
)
from tpext.experiments.own import parse_options
from tpext.experiments.presets import PRESETS, Case, presets_of
from tpext.experiments.progress import say
from tpext.experiments.rule_names import (
    DEFAULT_LAYER_RULE,
    DEFAULT_RULE,
    LAYER_RULES,
    RULES,
    SEQUENCE_RULES,
    find_rule,
)
from tpext.experiments.run_folder import HasOptions, RunError, RunFolder
from tpext.experiments.settings import FREE_FIELDS, ConfigError, choices_of, of_text
from tpext.experiments.task_names import NOT_OPTIONS, find_task, task_options
from tpext.experiments.train import train
from tpext.rules import Rule
from tpext.tasks import IMAGE_SETS, TASKS, MissingDataError, Task, make_task

_PRESETS = "; ".join(
    [
        "default: published rates (those of the nearest task or length where there are none), fewer iterations",
        *(f"{name}: {preset.summary}" for name, preset in PRESETS.items()),
    ]
)

REMEDIES = {
    "reg": "a larger --reg",
    "dx": "--dx regularized",
    "dx_reg": "a larger --dx-reg",
    "batch_reg": "a larger --batch-reg",
    "std": "a smaller --std",
}
"""What helps a run that diverged, by the options that its rule has."""


def _rule_options() -> dict[str, Option]:
    kinds: dict[str, list[type[Rule]]] = {}
    for kind in RULES.values():
        for field in fields(kind):
            kinds.setdefault(field.name, []).append(kind)
    found = {}
    for name, those in kinds.items():
        hints = list(dict.fromkeys(of_text(get_type_hints(kind)[name]) for kind in those))
        defaults = {field.default for kind in those for field in fields(kind) if field.name == name}
        # of the numbers presets have their own
        default = str(*defaults) if len(defaults) == 1 and all(map(choices_of, hints)) else DEFAULT
        names = ", ".join(rule for rule, kind in RULES.items() if kind in those)
        found[name] = Option(hints, f"{help_of(those[0], name) or 'Of the rule'} (rules {names}).", default)
    return found


def _task_options() -> dict[str, Option]:
    found = {}
    for name, tasks in task_options().items():
        entries = [TASKS[task] for task in tasks]
        hints = list(dict.fromkeys(get_type_hints(entry.kind)[name] for entry in entries))
        defaults = dict.fromkeys(str(entry.options[name].default) for entry in entries)
        help = entries[0].options[name].metadata.get("help", "Of the task.")
        found[name] = Option(hints, f"{help} ({', '.join(tasks)})", " or ".join(defaults))
    return found


@dataclass(frozen=True)
class _Train:
    """Train a network, recurrent for sequences, else feed-forward; by target propagation unless told otherwise.

    `tpext train images` trains convolutional and other networks on images; it has options of its own.
    """

    task: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="TASK",
            help=f"What to learn: {', '.join(TASKS)}; `tpext tasks` describes them. Or a task of your own, as "
            "module:Class or file.py:Class.",
        ),
    ]
    rule: Annotated[
        str | None,
        option(
            f"{{{','.join(RULES)},FILE.py:CLASS}}",
            f"{DEFAULT_RULE}; feed-forward {DEFAULT_LAYER_RULE}",
            f"What the backward pass is. Recurrent: {', '.join(SEQUENCE_RULES)}. Feed-forward: "
            f"{', '.join(LAYER_RULES)}. Or a rule of your own, as module:Class or file.py:Class (docs/own-rules.md).",
        ),
    ] = None
    task_options: OwnOptions = None
    """Options of a task of your own."""
    rule_options: OwnOptions = None
    """Options of a rule of your own."""
    preset: Annotated[str | None, option(f"{{default,{','.join(PRESETS)}}}", "default", f"{_PRESETS}.")] = None
    out: Annotated[Path | None, option("DIR", "runs/TASK-RULE-SEED")] = None
    """Folder of the run."""
    resume: Switch = False
    """Continue the run in that folder, with its options, from its last checkpoint (or start it if there is none)."""
    data_dir: DataFolder = None
    """Folder with the image task's files; without it MNIST is downloaded once."""
    tensorboard: Switch = False
    """Write TensorBoard events too."""

    def _given(self) -> dict[str, Any]:
        """The options that were given, as :func:`make_config` takes them."""
        options: dict[str, Any] = {**asdict(self), "tensorboard": self.tensorboard or None}
        del options["out"], options["resume"]
        options["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        if options.get("file") is not None:
            # a run resumes from any folder
            options["file"] = str(Path(options["file"]).absolute())
        if self.task_options and self.task not in TASKS:
            options["task_options"] = parse_options("task", self.task, find_task(self.task).kind, self.task_options)
        if self.rule_options and self.rule is not None and self.rule not in RULES:
            options["rule_options"] = parse_options("rule", self.rule, find_rule(self.rule), self.rule_options)
        return {name: value for name, value in options.items() if value is not None}

    def carry_out(self, console: Console) -> int:
        given = self._given()
        out = self.out
        if out is None:
            wanted = make_config(**given)
            names = (name.rpartition(":")[2] for name in (wanted.task_name, wanted.rule_name))
            out = Path("runs") / "-".join([*names, str(wanted.seed)])
        folder = RunFolder(out)
        config = (folder.continued(given) if self.resume else None) or make_config(**given)
        try:
            result = train(config, out, resume=self.resume, console=console)
        except DivergedError as error:
            return report_divergence(error, _remedy(config))
        running = (
            "" if (mean := result.running_accuracy) is None else f"running training accuracy (from zero) {mean:.2%}, "
        )
        measures = "".join(f"{name} {value:.4g}, " for name, value in result.measures.items())
        say(
            console,
            f"accuracy {result.accuracy:.2%} (best {result.best_accuracy:.2%} at iteration {result.best_iteration}), "
            f"{running}{measures}test loss {result.test_loss:.4g}, {result.iterations} iterations "
            f"in {result.seconds:.1f} s",
        )
        for name, picture in (
            ("curve", folder.curve),
            ("decision regions", folder.decision),
            ("reconstructions", folder.reconstruction),
            ("text", folder.sample),
        ):
            if picture.exists():
                say(console, f"{name}: {picture}")
        return 0


# The options of tasks, rules and runs are fields of the command; each says of itself what it is.
Train = make_command(
    "Train",
    _Train,
    {
        **_task_options(),
        **_rule_options(),
        **options_of(Config, ("task", "rule", "preset", *NOT_OPTIONS, "tensorboard"), shown_default),
    },
)


def _remedy(config: Config) -> str:
    """What helps a run that diverged."""
    own = {field.name for field in fields(config.rule)}
    found = [text for name, text in REMEDIES.items() if name in own]
    if not config.rule.solves_weights:
        rates = "--lr, --head-lr, --reverse-lr" if config.rule.learns else "--lr, --head-lr"
        found.insert(0, f"smaller rates ({rates})")
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])}, or {found[-1]}"


@dataclass(frozen=True)
class Compare:
    """Draw runs of one task side by side; runs with the same label are seeds of one method."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, each as DIR or LABEL=DIR; without a label, the rule and the settings in which the runs differ."""
    out: Path = Path("comparison.png")
    """The picture."""
    title: str = ""
    """Its title; empty: the task."""

    def carry_out(self, console: Console) -> int:
        # here, as matplotlib and pandas take longer to load than a help text to print
        from tpext.experiments.figures import draw_comparison

        runs = [_split(run) for run in self.runs]
        configs: list[HasOptions] = []
        for _, path in runs:
            config = open_folder(path).read_config()
            if config is None:
                raise RunError(f"{path} holds no run")
            configs.append(config)
        groups: dict[str, list[str | Path]] = {}
        for (label, path), default in zip(runs, default_labels(configs), strict=True):
            groups.setdefault(label or default, []).append(path)
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

    Runs have the same label only if they have the same configuration, seeds and free fields apart.
    """
    methods = [config.options() for config in configs]
    names = dict.fromkeys(name for method in methods for name in method if name not in ("rule", "seed", *FREE_FIELDS))
    differing = [name for name in names if len({method[name] for method in methods if name in method}) > 1]
    return [
        ", ".join([method["rule"], *(f"{name} {method[name]}" for name in differing if name in method)])
        for method in methods
    ]


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
    command: Any
    try:
        if list(arguments[:2]) == ["train", "images"]:
            command = tyro.cli(TrainImages, args=list(arguments[2:]), prog="tpext train images")
        else:
            command = tyro.cli(
                Command,
                args=list(arguments),
                prog="tpext",
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:  # tyro has shown its help or the error
        return stop.code if isinstance(stop.code, int) else 2
    try:
        _check_not_empty(arguments)
        status: int = command.carry_out(Console())
        return status
    except BrokenPipeError:
        raise  # for the caller, who knows that nothing is left to say
    except (ConfigError, RunError, tpext.SingularError, OSError) as error:
        print(f"tpext: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for an allocation that failed on the CPU.
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        print(f"tpext: out of memory: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        more = "; the same command with --resume continues from the last checkpoint"
        _last_words(f"tpext: {interrupt or 'interrupted'}{more * isinstance(command, (Train, TrainImages))}")
        return 128 + (interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT)


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
