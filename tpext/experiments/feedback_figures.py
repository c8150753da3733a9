"""The commands ``tpext figure``: how well feedback is learned.

Source of ``feedback-angle`` and ``gradient-angles``: Ernoult et al., "Towards Scaling Difference Target Propagation by
Learning Backprop Targets", ICML 2022, figures 4.2 and 4.3, and their code.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import nn

from tpext.diagnostics import gradient_angles
from tpext.experiments.feedback_presets import one_or_all
from tpext.experiments.loop import DivergedError, check_device, require_figures, torch_state
from tpext.experiments.progress import say
from tpext.experiments.run_folder import write_whole
from tpext.experiments.settings import ConfigError, check_integer, check_number
from tpext.feedback import (
    LDRL,
    DifferenceReconstruction,
    Indices,
    Pixels,
    RunningLDRL,
    layered_feedback,
    weight_alignment,
)
from tpext.feedback.gradient import SecondTerm
from tpext.nn import TargetSequential
from tpext.nn.networks import lenet, simple_vgg
from tpext.rules import DifferenceTargets
from tpext.tasks import IMAGE_SETS, Batch, ImageClasses

Scheme = Literal["random", "DRL", "L-DRL", "symmetric"]

SEEDS = (123, 124, 125, 126, 127)
MAX_SEED = 2**63 - 1
TARGET_STEP = 0.4655
DRL_LR = 1e-3
"""Ours, of Adam: that of the published figure is not known."""


@dataclass(frozen=True)
class _Setup:
    """What all figures have."""

    dataset: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(IMAGE_SETS)}}}")] = "cifar10"
    """The images; one batch of them."""
    out: Path = Path("figures")
    """Folder of the table and the picture."""
    batch_size: int = 256
    """Images in the batch."""
    device: str = "cpu"
    """A torch device."""
    threads: int = 1
    """CPU threads."""
    data_dir: Path | None = None
    """Folder with the data set's files."""

    def check(self) -> None:
        """Raise ConfigError for an option out of its range, before anything is computed."""
        for name in ("batch_size", "threads"):
            check_integer(name, getattr(self, name), 1)
        check_device(self.device)
        try:
            ImageClasses(self.dataset, data_dir=self.data_dir)
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("ImageClasses: ")) from error
        there = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"out must be a folder, got {self.out}, where {there} is a file")

    def batch(self, seed: int) -> Batch:
        """Return the batch, on the device."""
        try:
            found = ImageClasses(self.dataset, augment=False, data_dir=self.data_dir).batch(seed, 0, self.batch_size)
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("ImageClasses: ")) from error
        return Batch(found.input.to(self.device), found.target.to(self.device))


def _check_channels(channels: Sequence[int]) -> None:
    if not channels:
        raise ConfigError("channels must be at least one number, got none")
    for count in channels:
        check_integer("channels", count, 1)


@dataclass(frozen=True)
class _LeNet(_Setup):
    """What the published figures have: LeNet, whose feedback learns by steps."""

    iterations: int = 5000
    """Steps of the feedback of each layer."""
    channels: tuple[int, ...] = (32, 64)
    """Channels of LeNet's convolutions."""
    hidden_size: int = 512
    """Units of its hidden linear layer."""
    second_term: SecondTerm = "drawn"
    """The loss's second term by noise, as published, or in expectation."""

    def check(self) -> None:
        for name in ("iterations", "hidden_size"):
            check_integer(name, getattr(self, name), 1)
        _check_channels(self.channels)
        super().check()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of LeNet's layers."""
        return (*(f"conv_{index}" for index in range(len(self.channels))), "fc1", "fc2")

    def blocks(self, bias: bool) -> list[nn.Module]:
        """Return the blocks of LeNet, from torch's random state."""
        task = ImageClasses(self.dataset)
        made = lenet(task.shape, task.output_size, self.channels, self.hidden_size, bias=bias, device=self.device)
        return list(made.values())

    def ldrl(
        self, net: TargetSequential, noise: Sequence[float], lr: Sequence[float], seed: int, **options: Any
    ) -> LDRL:
        """Return the trainer of the published loss."""
        options |= {"momentum": 0.9, "second_term": self.second_term, "seed": seed}
        return LDRL(net, lr=one_or_all(lr), noise=one_or_all(noise), iterations=self.iterations, **options)


@dataclass(frozen=True)
class FeedbackAngle(_LeNet):
    """Figure 4.2: the angle between the output layer's weights and those of its feedback while that learns.

    LeNet at its initial weights, one batch; writes feedback_angle.csv and feedback_angle.png.
    """

    seed: int = SEEDS[0]
    """Seed of network, batch and noise."""
    noise: float = 0.1
    """Standard deviation of the noise."""
    lr: float = 0.03
    """Learning rate of the feedback."""

    def check(self) -> None:
        super().check()
        check_integer("seed", self.seed, 0, MAX_SEED)
        for name in ("noise", "lr"):
            check_number(name, getattr(self, name), above=True)

    def angles(self) -> list[float]:
        """Return the angle in degrees before each step."""
        self.check()
        batch = self.batch(self.seed)
        with torch_state(self.seed, self.threads):
            net = TargetSequential(*self.blocks(bias=True))
            with torch.no_grad():
                last = net.trace(batch.input).calls[-1]
            # that layer by itself: layers learn independently, given the forward pass
            alone = TargetSequential(nn.Identity(), last.block, feedback=[None, last.feedback])
            records = self.ldrl(alone, [self.noise], [self.lr], self.seed).step(last.input, record=True)
            check_finite(alone, self.iterations)
        assert records is not None
        return [float(record.angle) for record in records if record.angle is not None]

    def carry_out(self, console: Console) -> int:
        angles = self.angles()
        table = write_table(self.out / "feedback_angle.csv", ("iteration", "angle"), enumerate(angles))
        from matplotlib.figure import Figure

        from tpext.experiments.figures import COLOURS, INK, save, style

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(len(angles)), angles, color=COLOURS[0], lw=1.6)
        style(axes)
        axes.set_ylim(0, 95)
        axes.set_ylabel("angle of feedback and forward weights, degrees", color=INK)
        axes.set_title(f"LeNet's output layer, {self.dataset}: {angles[-1]:.1f} degrees at the end", color=INK)
        say(console, f"angle {angles[0]:.1f} degrees at first, {angles[-1]:.1f} in the end")
        say(console, f"written: {table}, {save(figure, self.out / 'feedback_angle.png')}")
        return 0


class Bar(NamedTuple):
    """One scheme, seed and layer of figure 4.3: angle in degrees, and relative distance, to back-propagation."""

    scheme: Scheme
    seed: int
    layer: str
    angle: float
    distance: float


@dataclass(frozen=True)
class GradientAngles(_LeNet):
    """Figure 4.3: the angle and the distance of the targets' gradients to back-propagation's, by layer.

    LeNet without biases at its initial weights, one batch a seed; feedback at random, learned by the difference
    reconstruction loss (DRL) and the local one (L-DRL), and symmetric. Gradients are divided by the target step. Writes
    gradient_angles.csv and gradient_angles.png.
    """

    seeds: tuple[int, ...] = SEEDS
    """Seeds of network, batch and noise."""
    schemes: tuple[Scheme, ...] = get_args(Scheme)
    """Which feedback."""
    indices: Indices = "noisy"
    """Places of maxima of the noisy pass (L-DRL), as published, or of the clean one."""
    pixels: Pixels = "all"
    """Noise on all pixels (L-DRL), as published, or on a grid of them, which needs the expected second term."""
    noise: tuple[float, ...] = (0.2, 0.2, 0.1)
    """Standard deviation of the noise, one for all layers with feedback or one for each."""
    lr: tuple[float, ...] = (1e-4, 2.5e-3, 0.01)
    """Learning rate of the feedback (L-DRL), one for all layers or one for each."""
    drl_lr: float = DRL_LR
    """Learning rate of the feedback (DRL), of Adam."""

    def check(self) -> None:
        super().check()
        if self.pixels == "grid" and self.second_term != "expected":
            raise ConfigError(f"pixels=grid needs second_term=expected, got {self.second_term}")
        for name in ("seeds", "schemes"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must be at least one, got none")
        for seed in self.seeds:
            check_integer("seeds", seed, 0, MAX_SEED)
        learned = self.layers[1:]
        for name in ("noise", "lr"):
            values = getattr(self, name)
            if len(values) not in (1, len(learned)):
                raise ConfigError(
                    f"{name} must be one number or one for each of the {len(learned)} layers with feedback "
                    f"({', '.join(learned)}), got {len(values)}"
                )
            for value in values:
                check_number(name, value, above=True)
        check_number("drl_lr", self.drl_lr, above=True)

    def bars(self) -> Iterator[Bar]:
        """Yield the bars of one scheme and seed after another."""
        self.check()
        for seed in self.seeds:
            batch = self.batch(seed)
            for scheme in self.schemes:
                with torch_state(seed, self.threads):
                    net = self._network(scheme, seed, batch)
                    check_finite(net, self.iterations)
                    found = gradient_angles(net, batch.input, batch.target)
                for name, one in zip(self.layers, found.values(), strict=True):
                    yield Bar(scheme, seed, name, one.angle, one.distance)

    def _network(self, scheme: Scheme, seed: int, batch: Batch) -> TargetSequential:
        blocks = self.blocks(bias=False)
        net = TargetSequential(
            *blocks,
            rule=DifferenceTargets(target_step=TARGET_STEP),
            feedback=layered_feedback(blocks) if scheme == "DRL" else None,
            feedback_init="symmetric" if scheme == "symmetric" else "random",
        )
        if scheme == "L-DRL":
            self.ldrl(net, self.noise, self.lr, seed).step(batch.input)
        elif scheme == "DRL":
            # all layers at every step, as each learns through the feedback above it
            adam: Any = lambda parameters: torch.optim.Adam(parameters, lr=self.drl_lr)  # noqa: E731
            trainer = DifferenceReconstruction(net, noise=one_or_all(self.noise), optimizer=adam, seed=seed)
            with torch.no_grad():
                trace = net.trace(batch.input)
            for _ in range(self.iterations):
                trainer.step(trace)
        return net

    def carry_out(self, console: Console) -> int:
        bars = []
        for bar in self.bars():
            bars.append(bar)
            where = f"{bar.scheme:>9}  seed {bar.seed}  {bar.layer:<7}"
            say(console, f"{where}{bar.angle:>9.3f} degrees  distance {bar.distance:.3f}")
        table = write_table(self.out / "gradient_angles.csv", Bar._fields, bars)
        say(console, f"written: {table}, {draw_bars(bars, self.out / 'gradient_angles.png')}")
        return 0


def check_finite(net: TargetSequential, iterations: int) -> None:
    """Raise DivergedError if the feedback holds NaN or infinite values after its iterations."""
    if not all(torch.isfinite(parameter).all() for parameter in net.feedback.parameters()):
        raise DivergedError(iterations, "the feedback holds NaN or infinite values")


def draw_bars(bars: Sequence[Bar], path: Path) -> Path:
    """Draw angles and distances: groups of bars by layer, one a scheme; the mean over the seeds and its spread."""
    layers, schemes = (list(dict.fromkeys(getattr(bar, name) for bar in bars)) for name in ("layer", "scheme"))
    from matplotlib.figure import Figure

    from tpext.experiments.figures import COLOURS, INK, save, style

    figure = Figure(figsize=(10, 4), layout="constrained")
    width = 0.8 / len(schemes)
    for axes, value, label in zip(
        figure.subplots(1, 2), ("angle", "distance"), ("angle in degrees", "relative distance"), strict=True
    ):
        for index, scheme in enumerate(schemes):
            groups = [
                [getattr(bar, value) for bar in bars if (bar.scheme, bar.layer) == (scheme, layer)] for layer in layers
            ]
            places = np.arange(len(layers)) + (index - (len(schemes) - 1) / 2) * width
            means, spreads = [np.mean(group) for group in groups], [np.std(group) for group in groups]
            axes.bar(places, means, width, yerr=spreads, color=COLOURS[index], label=scheme, error_kw={"lw": 0.8})
        style(axes)
        axes.set_xlabel("layer", color=INK)
        axes.set_xticks(range(len(layers)), layers)
        axes.set_ylabel(f"{label} to back-propagation", color=INK)
    figure.axes[0].legend(frameon=False)
    return save(figure, path)


@dataclass(frozen=True)
class PoolIndices(_Setup):
    """The angle between weights and feedback where the local loss is least, by the places of maxima that it takes.

    SimpleVGG at its initial weights, one batch, its layers with feedback and a pool; the feedback is set to the least
    point of the loss with its second term in expectation, from many draws of noise (RunningLDRL). Published are the
    places of the noisy pass. Writes pool_indices.csv and pool_indices.png.
    """

    batch_size: int = 32
    """Images in the batch."""
    channels: tuple[int, ...] = (128, 128, 256)
    """Channels of SimpleVGG's convolutions."""
    noise: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05, 0.02)
    """Standard deviations of the noise, the same in all layers."""
    draws: int = 900
    """Draws of noise."""
    pixels: Pixels = "all"
    """Noise on all pixels, as published, or on a grid of them, which takes a third of the time."""
    seed: int = SEEDS[0]
    """Seed of network, batch and noise."""

    def check(self) -> None:
        check_integer("draws", self.draws, 1)
        check_integer("seed", self.seed, 0, MAX_SEED)
        _check_channels(self.channels)
        if len(self.channels) < 2:
            raise ConfigError(f"channels must be at least two numbers, got {self.channels}")
        if not self.noise:
            raise ConfigError("noise must be at least one number, got none")
        for sigma in self.noise:
            check_number("noise", sigma, above=True)
        super().check()

    def points(self) -> Iterator[tuple[float, str, str, float]]:
        """Yield noise, indices, layer and angle in degrees."""
        self.check()
        batch, task = self.batch(self.seed), ImageClasses(self.dataset)
        with torch_state(self.seed, self.threads):
            try:
                blocks = simple_vgg(task.shape, task.output_size, self.channels, device=self.device)
            except ValueError as error:
                raise ConfigError(f"channels: {error}") from error
            net = TargetSequential(blocks)
            with torch.no_grad():
                trace = net.trace(batch.input)
            for sigma in self.noise:
                for indices in get_args(Indices):
                    options: Any = {"decay": 0.0, "pixels": self.pixels, "indices": indices, "seed": self.seed}
                    RunningLDRL(net, noise=sigma, draws=self.draws, **options).step(trace)
                    check_finite(net, self.draws)
                    # of the layers with feedback those that end in a pool
                    for name, call in list(zip(blocks, trace.calls, strict=True))[1:-1]:
                        angle, _ = weight_alignment(call)
                        assert angle is not None
                        yield sigma, indices, name, float(angle)

    def carry_out(self, console: Console) -> int:
        points = []
        for point in self.points():
            points.append(point)
            sigma, indices, layer, angle = point
            say(console, f"noise {sigma:<6g}{indices:<6} {layer:<7}{angle:>8.2f} degrees")
        table = write_table(self.out / "pool_indices.csv", ("noise", "indices", "layer", "angle"), points)
        from matplotlib.figure import Figure

        from tpext.experiments.figures import COLOURS, INK, save, style

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for number, layer in enumerate(dict.fromkeys(point[2] for point in points)):
            for indices, line in (("noisy", "--"), ("clean", "-")):
                drawn = sorted((p[0], p[3]) for p in points if p[1:3] == (indices, layer))
                axes.plot(
                    *zip(*drawn, strict=True), line, marker="o", color=COLOURS[number], label=f"{layer}, {indices}"
                )
        style(axes)
        axes.set_xscale("log")
        axes.set_xticks(self.noise, [f"{sigma:g}" for sigma in self.noise])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("standard deviation of the noise", color=INK)
        axes.set_ylabel("angle of feedback and forward weights, degrees", color=INK)
        axes.legend(frameon=False)
        say(console, f"written: {table}, {save(figure, self.out / 'pool_indices.png')}")
        return 0


def write_table(path: Path, header: Sequence[str], rows: Any) -> Path:
    """Write a CSV file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())
    return path


@dataclass(frozen=True)
class FigureCommand:
    """Draw a figure of how well feedback is learned: two published ones anew, and one of the package's own."""

    figure: (
        Annotated[FeedbackAngle, tyro.conf.subcommand("feedback-angle")]
        | Annotated[GradientAngles, tyro.conf.subcommand("gradient-angles")]
        | Annotated[PoolIndices, tyro.conf.subcommand("pool-indices")]
    )

    def carry_out(self, console: Console) -> int:
        require_figures()
        try:
            return self.figure.carry_out(console)
        except DivergedError as error:
            print(f"tpext: {error}. Try smaller rates of the feedback.", file=sys.stderr)
            return 3
