"""The commands ``tpext train``, ``compare``, ``tasks`` and ``info``."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console

import tpext
from tpext.experiments.config import (
    FREE_FIELDS,
    RULES,
    Config,
    ConfigError,
    Initialization,
    Nonlinearity,
    Optimizer,
    Precision,
    Preset,
    RuleName,
    differences,
    make_config,
    published,
)
from tpext.experiments.figures import draw_comparison
from tpext.experiments.run_folder import RunError, RunFolder
from tpext.experiments.train import DivergedError, resumed_config, train
from tpext.rules import Correction, Credit, InputRule
from tpext.tasks import IMAGES, TASKS, MissingDataError, TaskName, make_task


def _value(metavar: str, default: str = "the preset's") -> object:
    """How an option that may be left out shows in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


_Integer = Annotated[int | None, _value("INT")]
_Number = Annotated[float | None, _value("FLOAT")]
_Flag = Annotated[bool | None, _value("{True,False}")]


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Train:
    """Train a recurrent network; with no option but the task, by target propagation with its published settings."""

    task: tyro.conf.Positional[TaskName]
    """What to learn; `tpext tasks` describes them."""

    rule: Annotated[RuleName | None, _value("{regularized,learned,backprop}", "regularized")] = None
    """Target propagation through regularized inverses or learned ones, or back-propagation."""
    preset: Annotated[Preset | None, _value("{default,published}", "default")] = None
    """default: published rates (the nearest task's where there are none), fewer iterations. published: as published."""
    out: Annotated[Path | None, _value("DIR", "runs/TASK-RULE-SEED")] = None
    """Folder of the run."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in that folder, with its options, from its last checkpoint (or start it if there is none)."""

    length: _Integer = None
    """Number of steps of a synthetic task."""
    chunk: _Integer = None
    """Pixels per step of an image task, a divisor of 784: 1 is pixel by pixel, 28 is by rows."""

    reg: _Number = None
    """Regularization of the inverse (rule regularized)."""
    target_step: _Number = None
    """Size of the first displacement, -target_step * gradient (rules regularized, learned)."""
    correction: Annotated[Correction | None, _value("{linearized,difference,none}")] = None
    """How displacements pass through the inverse (rule regularized)."""
    credit: Annotated[Credit | None, _value("{through_time,local}")] = None
    """Local losses back-propagated through the unrolled layer, or each alone (rules regularized, learned)."""
    clip: _Number = None
    """Distance kept from the edges of the activation's range (rule regularized)."""
    normalize: _Flag = None
    """Divide the recurrent layer's gradients by target_step; published: False (rules regularized, learned)."""
    input_rule: Annotated[InputRule | None, _value("{gradient,target}")] = None
    """What the layer below gets, where there are several (rule regularized)."""
    noise: _Number = None
    """Standard deviation of the noise in the reconstruction loss (rule learned)."""
    reverse_lr: _Number = None
    """Learning rate of the reverse layer (rule learned)."""

    hidden_size: _Integer = None
    """Units of a recurrent layer."""
    layers: _Integer = None
    """Number of recurrent layers."""
    nonlinearity: Annotated[Nonlinearity | None, _value("{tanh,relu,identity}")] = None
    """Activation of the recurrent layers."""
    init: Annotated[Initialization | None, _value("{orthogonal,torch}")] = None
    """orthogonal: matrices with singular values 1, biases 0, as published. torch: PyTorch's own."""

    optimizer: Annotated[Optimizer | None, _value("{sgd,adam,adamw,rmsprop,adagrad}")] = None
    """Published settings use sgd; with another optimizer, rates start at 1e-3."""
    lr: _Number = None
    """Learning rate of the recurrent layers, and of the head unless --head-lr is given."""
    head_lr: _Number = None
    """Learning rate of the output layer, which learns by plain gradients."""
    momentum: _Number = None
    """Momentum (sgd, rmsprop)."""
    nesterov: _Flag = None
    """Nesterov's momentum (sgd); True unless said otherwise."""
    clip_grad_norm: _Number = None
    """Bound on the norm of all gradients together."""

    iterations: _Integer = None
    """Number of training steps."""
    batch_size: _Integer = None
    """Samples per step."""
    test_size: _Integer = None
    """Samples of the test set."""
    eval_interval: _Integer = None
    """Iterations between evaluations."""
    checkpoint_interval: _Integer = None
    """Iterations between checkpoints."""
    seed: _Integer = None
    """Seed of the initialization, the data and the noise."""
    precision: Annotated[Precision | None, _value("{32,64,bf16}")] = None
    """Float type; bf16 is mixed precision."""
    device: Annotated[str | None, _value("NAME", "cpu")] = None
    """A torch device."""
    threads: Annotated[int | None, _value("INT", "1 for a synthetic task, up to 4 for images")] = None
    """CPU threads."""
    data_dir: Annotated[Path | None, _value("DIR", "$TPEXT_DATA or the cache folder")] = None
    """Folder with the image task's files; without it they are downloaded once."""
    tensorboard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write TensorBoard events too."""

    def carry_out(self, console: Console) -> None:
        options = asdict(self)
        out, resume = options.pop("out"), options.pop("resume")
        options["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        options["tensorboard"] = self.tensorboard or None
        folder = RunFolder(
            out or Path("runs") / f"{self.task}-{self.rule or 'regularized'}-{1 if self.seed is None else self.seed}"
        )
        saved = folder.read_config() if resume else None
        if saved is None:
            given = {name: value for name, value in options.items() if value is not None}
            config = make_config(given.pop("task"), **given)
        else:
            found = differences(saved, **options)
            if found:
                raise RunError(f"{folder.path} holds another run: {'; '.join(found)}")
            config = resumed_config(saved, **{name: options[name] for name in FREE_FIELDS})
        result = train(config, folder.path, resume=resume, console=console)
        _say(
            console,
            f"accuracy {result.accuracy:.2%} (best {result.best_accuracy:.2%} at iteration {result.best_iteration}), "
            f"test loss {result.test_loss:.4g}, {result.iterations} iterations in {result.seconds:.1f} s",
        )
        _say(console, f"curve: {folder.curve}")


@dataclass(frozen=True)
class Compare:
    """Draw several runs side by side; runs with the same label are seeds of one method."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, each as DIR or LABEL=DIR; without a label, the rule and its credit."""
    out: Path = Path("comparison.png")
    """The picture."""
    title: str = ""
    """Its title; empty: the task."""

    def carry_out(self, console: Console) -> None:
        groups: dict[str, list[str | Path]] = {}
        for run in self.runs:
            label, _, path = run.rpartition("=")
            folder = RunFolder(path)
            config = folder.read_config()
            if config is None or not folder.metrics.exists():
                raise RunError(f"{path} holds no run (no {folder.config.name} or no {folder.metrics.name})")
            groups.setdefault(label or _label(config), []).append(path)
        _say(console, f"written: {draw_comparison(groups, self.out, title=self.title)}")


def _label(config: Config) -> str:
    credit = getattr(config.rule, "credit", None)
    return config.rule_name + (f", {credit}" if credit else f", lr {config.lr:g}")


@dataclass(frozen=True)
class Tasks:
    """Describe the tasks."""

    def carry_out(self, console: Console) -> None:
        lines = [("task", "input", "output", "correct when", "published settings for")]
        for name in TASKS:
            task = make_task(name)
            steps = "784 / chunk steps of chunk" if name in IMAGES else f"{task.length} steps of {task.input_size}"
            output = f"{task.output_size} classes" if task.criterion == "cross_entropy" else "a number"
            known = [rule for rule in RULES if published(name, rule) is not None]
            lines.append((name, steps, output, task.correct_when, ", ".join(known) or "-"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            text = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
            _say(console, text.rstrip())


@dataclass(frozen=True)
class Info:
    """Show the build, the machine and the versions."""

    def carry_out(self, console: Console) -> None:
        build = tpext.build_info()
        devices = ["cpu"] + [
            f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())
        ]
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
            _say(console, f"{name:<{width}}  {shown}")


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; return 0, 1 for an error, 3 for a run that diverged, 130 for an interrupted one."""
    try:
        command: Train | Compare | Tasks | Info = tyro.cli(Command, args=list(arguments), prog="tpext")
    except SystemExit as stop:  # tyro has shown its help or the error
        return stop.code if isinstance(stop.code, int) else 2
    try:
        command.carry_out(Console())
    except DivergedError as error:
        print(
            f"tpext: {error}. The last good checkpoint is kept. Smaller rates or a larger --reg may help.",
            file=sys.stderr,
        )
        return 3
    except (ConfigError, RunError, MissingDataError, tpext.SingularError) as error:
        print(f"tpext: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tpext: interrupted; the same command with --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0
