"""The commands ``tpext train``, ``compare``, ``figure``, ``tasks`` and ``info``."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import torch
import tyro
from rich.console import Console

import tpext
from tpext.experiments.checks import ConfigError
from tpext.experiments.config import (
    FREE_FIELDS,
    HasOptions,
    Initialization,
    Nonlinearity,
    Optimizer,
    Precision,
    Preset,
    Reduction,
    Schedule,
    make_config,
    published,
)
from tpext.experiments.feed_forward import published_presets
from tpext.experiments.feedback_figures import FigureCommand
from tpext.experiments.figures import draw_comparison
from tpext.experiments.image_commands import TrainImages
from tpext.experiments.image_folder import open_folder
from tpext.experiments.loop import DivergedError, Interrupted
from tpext.experiments.options import DataFolder, Integer, Integers, Number, Switch, option, report_divergence
from tpext.experiments.progress import say
from tpext.experiments.rule_names import (
    DEFAULT_LAYER_RULE,
    DEFAULT_RULE,
    LAYER_RULES,
    RULES,
    SEQUENCE_RULES,
    parse_options,
    rule_options,
)
from tpext.experiments.run_folder import RunError, RunFolder
from tpext.experiments.train import train
from tpext.rules import Correction, Credit, First, Form, InputRule, LocalLoss, Move, Slope, Update
from tpext.tasks import FEED_FORWARD, IMAGES, TASKS, ImageSetName, Order, Task, TaskName, make_task


def _default(name: str, metavar: str) -> object:
    """How an option shows in the help whose default no preset of a sequence sets; images may have another there."""
    default, images = (str(make_config(task).options()[name]) for task in ("temporal-order", "sequential-mnist"))
    return option(metavar, default if images == default else f"{default}, images {images}")


def _layer_default(name: str, metavar: str) -> object:
    """The same of an option that only feed-forward tasks have."""
    return option(metavar, str(make_config("mnist-mlp").options()[name]))


@dataclass(frozen=True)
class Train:
    """Train a network, recurrent for sequences, else feed-forward; by target propagation unless told otherwise.

    `tpext train images` trains convolutional and other networks on images; it has options of its own.
    """

    task: tyro.conf.Positional[TaskName]
    """What to learn; `tpext tasks` describes them."""

    rule: Annotated[
        str | None,
        option(
            f"{{{','.join(RULES)},FILE.py:CLASS}}",
            f"{DEFAULT_RULE}; feed-forward {DEFAULT_LAYER_RULE}",
        ),
    ] = None
    """Target propagation through regularized inverses or learned ones, or back-propagation. Feed-forward: through least
    squares inverses or learned ones, or direct weight solves, or back-propagation. Or a rule of your own,
    as module:Class or file.py:Class (docs/own-rules.md)."""
    rule_options: Annotated[tuple[str, ...] | None, option("NAME=VALUE ...", "the rule's own defaults")] = None
    """Options of a rule of your own."""
    preset: Annotated[Preset | None, option("{default,published,seely,lee,faust}", "default")] = None
    """default: published rates (those of the nearest task or length where there are none), fewer iterations;
    feed-forward Adam. published: as published, for temporal-order with 60 or 120 steps, adding with 30, images pixel by
    pixel. seely, lee, faust: as in these authors' code, for mnist-mlp (seely also mnist-autoencoder; faust for rule
    kaczmarz)."""
    out: Annotated[Path | None, option("DIR", "runs/TASK-RULE-SEED")] = None
    """Folder of the run."""
    resume: Switch = False
    """Continue the run in that folder, with its options, from its last checkpoint (or start it if there is none)."""

    length: Annotated[int | None, option("INT", "60; adding, random-permutation 30")] = None
    """Number of steps of a synthetic task."""
    chunk: Annotated[int | None, option("INT", "1")] = None
    """Pixels per step of a sequence of images, a divisor of 784: 1 is pixel by pixel, 28 is by rows."""

    reg: Number = None
    """Regularization of the inverse (rules regularized-inverse, regularized-least-squares)."""
    target_step: Number = None
    """Size of the first displacement, -target_step * gradient (all rules but backprop and kaczmarz)."""
    correction: Annotated[Correction | None, _default("correction", "{linearized,difference,none}")] = None
    """How displacements pass through the inverse (rules regularized-inverse; difference-target-propagation: difference,
    by default, or none)."""
    credit: Annotated[Credit | None, _default("credit", "{through_time,local}")] = None
    """Local losses back-propagated through the unrolled layer, or each alone (rules regularized-inverse,
    learned-inverse)."""
    margin: Annotated[float | None, _default("margin", "FLOAT")] = None
    """Distance kept from the edges of the activation's range (rules regularized-inverse; least squares, there 0.01)."""
    normalize: Annotated[bool | None, option("{True,False}", "False with sgd, as published, else True")] = None
    """Divide the local gradients by target_step (all rules but backprop and kaczmarz)."""
    input_rule: Annotated[InputRule | None, _default("input_rule", "{gradient,target}")] = None
    """What the layer below gets, where there are several (rule regularized-inverse)."""
    slope: Annotated[Slope | None, _default("slope", "{inverse,derivative,one}")] = None
    """How the linearized correction passes the activation: by its inverse slope as published, its derivative, or not at
    all (rule regularized-inverse)."""
    slope_reg: Annotated[float | None, _default("slope_reg", "FLOAT")] = None
    """Regularization of slope inverse (rule regularized-inverse)."""
    noise: Number = None
    """Standard deviation of the noise in the reconstruction loss (rules learned-inverse,
    difference-target-propagation)."""
    reverse_lr: Number = None
    """Learning rate of the reverse layers (rules learned-inverse, difference-target-propagation)."""
    form: Annotated[Form | None, _layer_default("form", "{proximal,ridge}")] = None
    """Which distance: from the current input, or from zero (rule regularized-least-squares)."""
    local_loss: Annotated[LocalLoss | None, _layer_default("local_loss", "{pre,post}")] = None
    """Local losses before the activation or after it (rules constrained-least-squares, regularized-least-squares)."""
    relaxation: Number = None
    """Factor of every update, above 0 and below 2 (rule kaczmarz)."""
    damping: Number = None
    """Added to the squared norms of the inputs that divide an update (rule kaczmarz)."""
    dx: Annotated[Move | None, option("{mean,wnorm,regularized}")] = None
    """How a layer's input moves towards its target: mean is the published way (rule kaczmarz)."""
    dx_reg: Number = None
    """Regularization of --dx regularized (rule kaczmarz)."""
    update: Annotated[Update | None, option("{average,exact}")] = None
    """Each sample's least update, averaged over the batch, or that of the batch as a whole (rule kaczmarz)."""
    batch_reg: Number = None
    """Regularization of --update exact (rule kaczmarz)."""
    first: Annotated[First | None, option("{input,weights}")] = None
    """What moves first (rule kaczmarz)."""
    std: Number = None
    """Standard deviation of the initial weights and biases (rule kaczmarz, with --init torch)."""

    hidden_size: Annotated[int | None, _default("hidden_size", "INT")] = None
    """Units of a recurrent layer."""
    layers: Annotated[int | None, _default("layers", "INT")] = None
    """Number of recurrent layers."""
    sizes: Integers = None
    """Units of each hidden layer of a feed-forward network."""
    nonlinearity: Annotated[Nonlinearity | None, _default("nonlinearity", "{tanh,relu,identity,...}")] = None
    """Activation of the hidden layers; feed-forward also sigmoid and leaky_relu."""
    init: Annotated[Initialization | None, _default("init", "{orthogonal,torch,xavier}")] = None
    """orthogonal: matrices with singular values 1, biases 0, as published. torch: PyTorch's own (rule kaczmarz: normal,
    see --std). xavier: uniform (feed-forward)."""
    reference_compat: Annotated[bool | None, _layer_default("reference_compat", "{True,False}")] = None
    """Inverses of activations as in Seely's code, which does not solve for them (feed-forward)."""
    tied: Annotated[bool | None, _layer_default("tied", "{True,False}")] = None
    """Tie the decoder's weights to the encoder's, the last layer's to the first's and so on; they learn at --lr
    (mnist-autoencoder; not rule difference-target-propagation, --reduction sum only)."""

    optimizer: Annotated[
        Optimizer | None,
        option("{sgd,adam,adamw,rmsprop,adagrad,tf-rmsprop,centred-rmsprop}", "sgd; feed-forward adam"),
    ] = None
    """With another optimizer than the preset's, rates start at 1e-3. Rule kaczmarz has sgd at rate 1 only."""
    lr: Number = None
    """Learning rate of the hidden layers, and of the head unless --head-lr is given.
    For rule learned-inverse the preset's is the published 1e-2 divided by the batch size."""
    head_lr: Number = None
    """Learning rate of the output layer, which learns by plain gradients (not under the least squares rules)."""
    momentum: Number = None
    """Momentum (sgd and the three rmsprop)."""
    nesterov: Annotated[bool | None, option("{True,False}", "True where sgd has a momentum")] = None
    """Nesterov's momentum (sgd)."""
    clip_grad_norm: Annotated[float | None, _default("clip_grad_norm", "FLOAT")] = None
    """Bound on the norm of all gradients together, above 0."""
    reduction: Annotated[Reduction | None, _layer_default("reduction", "{sum,batch,element}")] = None
    """How local losses are averaged (feed-forward): sum: half the sum of squares; batch: their mean over the batch, as
    in Lee's code; element: half their mean over batch and units, as in Seely's."""
    schedule: Annotated[Schedule | None, _default("schedule", "{parallel,alternating}")] = None
    """Reverse layers learn at every step, or an epoch before the others (rules learned-inverse,
    difference-target-propagation)."""

    epochs: Integer = None
    """Passes through the training images, in place of --iterations."""
    iterations: Integer = None
    """Number of training steps."""
    batch_size: Integer = None
    """Samples per step."""
    train_size: Annotated[int | None, option("INT", "all")] = None
    """Number of training images, the first ones (feed-forward)."""
    order: Annotated[Order | None, _layer_default("order", "{shuffled,sequential_first,sequential}")] = None
    """Order of an epoch's images: shuffled, as stored in the first epoch, or always as stored (feed-forward)."""
    test_size: Annotated[int | None, _default("test_size", "INT")] = None
    """Samples of the test set."""
    eval_interval: Annotated[int | None, option("INT", "100, images 1000, as vectors an epoch")] = None
    """Iterations between evaluations."""
    checkpoint_interval: Annotated[int | None, _default("checkpoint_interval", "INT")] = None
    """Iterations between checkpoints."""
    seed: Annotated[int | None, _default("seed", "INT")] = None
    """Seed of the initialization, the data and the noise."""
    precision: Annotated[Precision | None, _default("precision", "{32,64,bf16}")] = None
    """Float type; bf16 is mixed precision."""
    device: Annotated[str | None, _default("device", "NAME")] = None
    """A torch device."""
    threads: Annotated[int | None, option("INT", "1 for digits and drawn samples, up to 4 for images")] = None
    """CPU threads."""
    data_dir: DataFolder = None
    """Folder with the image task's files; without it MNIST is downloaded once."""
    tensorboard: Switch = False
    """Write TensorBoard events too."""

    def carry_out(self, console: Console) -> int:
        options = asdict(self)
        out, resume = options.pop("out"), options.pop("resume")
        options["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        options["tensorboard"] = self.tensorboard or None
        texts = options.pop("rule_options") or ()
        given = {name: value for name, value in options.items() if value is not None}
        if texts:
            if self.rule is None or self.rule in RULES:
                raise ConfigError("rule_options belong to a rule of your own, ours have options of their own names")
            given |= parse_options(self.rule, tuple(texts))
        if out is None:
            wanted = make_config(**given)
            out = Path("runs") / f"{wanted.task}-{wanted.rule_name.rpartition(':')[2]}-{wanted.seed}"
        folder = RunFolder(out)
        config = (folder.continued(given) if resume else None) or make_config(**given)
        try:
            result = train(config, out, resume=resume, console=console)
        except DivergedError as error:
            rates = "--lr, --head-lr, --reverse-lr" if config.rule.learns else "--lr, --head-lr"
            reg = ", or a larger --reg" if "reg" in rule_options(config.rule_name) else ""
            remedy = f"smaller rates ({rates}){reg}"
            if config.rule_name == "kaczmarz":
                remedy = "--dx regularized, a larger --dx-reg or --batch-reg, or a smaller --std"
            return report_divergence(error, remedy)
        running = (
            "" if (mean := result.running_accuracy) is None else f"running training accuracy (from zero) {mean:.2%}, "
        )
        say(
            console,
            f"accuracy {result.accuracy:.2%} (best {result.best_accuracy:.2%} at iteration {result.best_iteration}), "
            f"{running}test loss {result.test_loss:.4g}, {result.iterations} iterations in {result.seconds:.1f} s",
        )
        for name, picture in (
            ("curve", folder.curve),
            ("decision regions", folder.decision),
            ("reconstructions", folder.reconstruction),
        ):
            if picture.exists():
                say(console, f"{name}: {picture}")
        return 0


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
        for name in TASKS:
            task = make_task(name)
            steps = "784 / chunk steps of chunk" if name in IMAGES else f"{task.length} steps of {task.input_size}"
            shown = f"{task.input_size} numbers" if name in FEED_FORWARD else steps
            known: list[str] = [rule for rule in SEQUENCE_RULES if published(name, rule) is not None]
            if name in FEED_FORWARD:
                known = [
                    f"{rule} ({preset})"
                    for rule, kind in LAYER_RULES.items()
                    for preset in published_presets(name, kind)
                ]
            lines.append((name, shown, _output(task), task.correct_when, ", ".join(known) or "-"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            text = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
            say(console, text.rstrip())
        sets = ", ".join(get_args(ImageSetName))
        say(console, f"images: tpext train images --dataset NAME, for networks of any layers; NAME is one of {sets}")
        return 0


def _output(task: Task) -> str:
    if task.criterion == "cross_entropy":
        return f"{task.output_size} classes"
    return "a number" if task.output_size == 1 else f"{task.output_size} numbers"


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


Command = (
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
    command: Train | TrainImages | Compare | FigureCommand | Tasks | Info
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
        return command.carry_out(Console())
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
