"""Figures of runs: one run's curves, and several runs side by side."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tpext.experiments.config import Config
from tpext.experiments.gradients import PLACE, read_gradients
from tpext.experiments.image_folder import ImageFolder
from tpext.experiments.model import Model
from tpext.experiments.progress import describe
from tpext.experiments.run_folder import Row, RunError, RunFolder, write_whole
from tpext.experiments.runs import AnyFolder, folders_of, read_trained, state_of
from tpext.experiments.saved_config import SavedConfig
from tpext.experiments.settings import ConfigError
from tpext.tasks import Task

# Colours that stay apart in print and for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOOKS = cycler(ls=["-", "--", "-.", ":"]) * cycler(color=COLOURS)
"""Of curves side by side: the colours, then again with every other style of lines."""
INK = "#333333"
CHANCE_LABEL = "chance"
WIDE = 55
"""Characters of a label beyond which a legend has one column."""
FADED = 1e-12
"""Of the largest displacement: below it all have one colour."""


def draw_run(folder: str | Path) -> Path:
    """Draw a run's losses and test accuracy over its iterations as curve.png in its folder.

    Args:
        folder: a run's folder, complete or not; its config.json and metrics.csv are read.

    Returns:
        The path of the picture.

    Raises:
        RunError: the folder holds no run with an evaluation.
    """
    folder = Path(folder)
    config, metrics = _read(RunFolder(folder))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    title, _, settings = config.description.partition(", ")
    figure.suptitle(f"{title}: test accuracy {metrics.accuracy.iloc[-1]:.1%}", fontsize=13, color=INK)

    losses.plot(metrics.iteration, metrics.train_loss, color=COLOURS[1], lw=1.2, alpha=0.8, label="training")
    losses.plot(metrics.iteration, metrics.test_loss, color=COLOURS[0], lw=1.8, label="test")
    if metrics.validation_loss.notna().any():
        losses.plot(metrics.iteration, metrics.validation_loss, color=COLOURS[2], lw=1.2, ls="--", label="validation")
    _style_loss(losses, "loss")
    losses.legend(frameon=False)
    accuracy.plot(metrics.iteration, metrics.accuracy, color=COLOURS[0], lw=1.8)
    accuracy.fill_between(metrics.iteration, metrics.accuracy, color=COLOURS[0], alpha=0.08)
    _style_accuracy(accuracy, config.chance)
    figure.supxlabel(_wrap(settings), fontsize=8, color="#777777")
    return save(figure, folder / "curve.png")


def draw_task(folder: str | Path) -> Path | None:
    """Draw what a run has learned, from its last checkpoint, where its task has a picture.

    A toy set in the plane: decision.png, the probability of class 1 over the plane and test points. An autoencoder:
    reconstruction.png, test images above what the network makes of them.

    Args:
        folder: a run's folder, complete or not; its config.json and checkpoint.pt are read, and the task's data.

    Returns:
        The path of the picture, None if the task has none.

    Raises:
        RunError: the folder holds no run with a checkpoint of this version.
        MissingDataError: the images are not there.
    """
    run = RunFolder(folder)
    config = run.read_config()
    if config is None:
        raise RunError(f"{folder} holds no run")
    if config.make_task().picture is None:
        return None
    model: Any
    model, task, iteration = read_trained(folder)
    images = task.picture == "reconstruction"
    title, _, settings = describe(config).partition(", ")
    figure = Figure(figsize=(10, 2.1) if images else (6, 5.6), layout="constrained")
    figure.suptitle(f"{title}, iteration {iteration}", fontsize=13, color=INK)
    if images:
        _draw_reconstructions(figure, model, task, config)
    else:
        _draw_plane(figure, model, task, config)
    figure.supxlabel(_wrap(settings, 150 if images else 80), fontsize=8, color="#777777")
    return save(figure, run.reconstruction if images else run.decision)


@torch.no_grad()
def _draw_plane(figure: Figure, model: Model, task: Task, config: Config) -> None:
    input, target = task.test_set(config.seed, min(config.test_size, 500))
    points, classes = input.numpy(), target.numpy()
    edge = 1.15 * float(np.abs(points).max())
    line = torch.linspace(-edge, edge, 240)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).reshape(-1, 2)
    share = model(grid).softmax(dim=1)[:, 1].reshape(240, 240).numpy()
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("classes", [COLOURS[0], "#FFFFFF", COLOURS[1]])
    extent = (-edge, edge, -edge, edge)
    axes.imshow(share, origin="lower", extent=extent, cmap=colours, vmin=0, vmax=1, alpha=0.55)
    if share.min() < 0.5 < share.max():
        axes.contour(share, levels=[0.5], extent=extent, colors=INK, linewidths=1)
    for index in (0, 1):
        chosen = points[classes == index]
        x, y, label = chosen[:, 0], chosen[:, 1], f"class {index}"
        axes.scatter(x, y, s=9, color=COLOURS[index], edgecolors="white", linewidths=0.3, label=label)
    axes.legend(loc="upper right", fontsize=8)
    axes.tick_params(colors=INK, labelsize=9)


@torch.no_grad()
def _draw_reconstructions(figure: Figure, model: Model, task: Task, config: Config, count: int = 20) -> None:
    input = task.test_set(config.seed, min(config.test_size, count)).input
    made = model(input).sigmoid()
    shape = getattr(task, "shape", (1, -1))
    rows = figure.subplots(2, len(input), squeeze=False)
    for images, axes, label in ((input, rows[0], "image"), (made, rows[1], "made")):
        for image, place in zip(images, axes, strict=True):
            place.imshow(image.reshape(shape).numpy(), cmap="gray_r", vmin=0, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
        axes[0].set_ylabel(label, color=INK, fontsize=9)


def draw_comparison(runs: Mapping[str, str | Path | Iterable[str | Path]], out: str | Path, *, title: str = "") -> Path:
    """Draw the test losses and accuracies of several groups of runs.

    Args:
        runs: label -> the folder of its run, or of many, such as a sweep's; or several such folders. Each run is a thin
            line, the group's mean over the iterations that all its runs evaluated a thick one.
        out: path of the picture; its suffix says the format.
        title: the picture's title; empty: the task.

    Returns:
        The path of the picture.

    Raises:
        TypeError: ``runs`` is no mapping.
        ConfigError: no run, runs of different tasks or lengths, or a format that cannot be drawn.
        RunError: a folder holds no run with an evaluation.
    """
    if not isinstance(runs, Mapping):
        raise TypeError(f"runs must be a mapping of labels to folders, got a {type(runs).__name__}")
    groups = {
        label: [
            (*_read(run), state_of(run)) for run in folders_of(*([those] if isinstance(those, (str, Path)) else those))
        ]
        for label, those in runs.items()
    }
    empty = [label for label, members in groups.items() if not members]
    if empty or not groups:
        raise ConfigError(f"runs must name at least one folder{f' for {empty[0]!r}' if empty else ''}, got none")
    tasks = {config.title: config for members in groups.values() for config, _, _ in members}
    # of a user's task earlier versions kept the name alone
    bare = {title.partition(", ")[0] for title in tasks}
    if len(tasks) == 2 and len(bare) == 1:
        tasks = {title: config for title, config in tasks.items() if title not in bare}
    if len(tasks) > 1:
        raise ConfigError(f"runs of different tasks cannot share a figure: {'; '.join(tasks)}")
    ((name, config),) = tasks.items()
    # beyond the third line the legend gets room of its own
    columns = 2 if max(map(len, groups)) <= WIDE else 1
    figure = Figure(figsize=(10, 4.4 + 0.2 * max(0, -(-len(groups) // columns) - 3)), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for look, (label, members) in zip(LOOKS(), groups.items(), strict=False):
        mean = pd.concat([metrics for _, metrics, _ in members]).groupby("iteration").mean()
        counts = pd.concat([metrics for _, metrics, _ in members]).groupby("iteration").size()
        mean = mean[counts == len(members)]
        diverged = sum(state == "diverged" for _, _, state in members)
        ends = [0.0 if state == "diverged" else metrics.accuracy.iloc[-1] for _, metrics, state in members]
        outcome = f"{sum(ends) / len(ends):.1%}" + (f", {diverged} of {len(members)} diverged" if diverged else "")
        outcome = "diverged" if diverged == len(members) else outcome
        for axes, column in ((losses, "test_loss"), (accuracy, "accuracy")):
            if len(members) > 1:
                for _, metrics, _ in members:
                    axes.plot(metrics.iteration, metrics[column], **look, lw=0.7, alpha=0.4)
            axes.plot(mean.index, mean[column], **look, lw=2, label=f"{label} ({outcome})")
    _style_loss(losses, f"{config.evaluated} loss")
    _style_accuracy(accuracy, config.chance, config.evaluated)
    for axes in (losses, accuracy):
        axes.set_xlabel(config.unit, color=INK)
    figure.suptitle(title or name, fontsize=13, color=INK)
    handles, labels = accuracy.get_legend_handles_labels()
    kept = [(handle, label) for handle, label in zip(handles, labels, strict=True) if label != CHANCE_LABEL]
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False, "handlelength": 3}
    figure.legend([handle for handle, _ in kept], [label for _, label in kept], **place)
    return save(figure, out)


def draw_heatmaps(panels: Mapping[str, pd.DataFrame], out: str | Path, *, title: str = "") -> Path:
    """Draw tables of accuracies side by side, each value in its cell; a cross where there is none.

    Args:
        panels: label -> a table of accuracies in 0..1, with named index (y) and columns (x).
        out: path of the picture; its suffix says the format.
        title: the picture's title.

    Returns:
        The path of the picture.

    Raises:
        ConfigError: no table, or a format that cannot be drawn.
    """
    tables = list(panels.values())
    if not tables:
        raise ConfigError("panels must have at least one table, got none")
    columns, rows = max(len(table.columns) for table in tables), max(len(table) for table in tables)
    figure = Figure(figsize=(1.5 + len(tables) * (0.62 * columns + 0.9), 1.6 + 0.5 * rows), layout="constrained")
    for axes, (label, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], panels.items(), strict=True):
        image = axes.imshow(table, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(table.to_numpy(dtype=float)):
            text = "x" if np.isnan(value) else f"{100 * value:.0f}"
            colour = INK if np.isnan(value) or value > 0.6 else "white"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(table.columns)), [as_text(value) for value in table.columns], fontsize=8)
        axes.set_yticks(range(len(table)), [as_text(value) for value in table.index], fontsize=8)
        axes.set_xlabel(str(table.columns.name), color=INK)
        axes.set_ylabel(str(table.index.name), color=INK)
        axes.set_title(label, fontsize=10, color=INK)
    bar = figure.colorbar(image, ax=figure.axes, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("test accuracy", color=INK)
    figure.suptitle(title, fontsize=13, color=INK)
    return save(figure, out)


def draw_gradients(runs: Mapping[str, str | Path], out: str | Path, *, title: str = "") -> Path:
    """Draw what ``gradients`` measured in runs, of their last recurrent layer.

    Above, the displacement of each state over steps and iterations, all runs in the same colours; below, over the
    iterations, the norm of the layer's gradient and the spectral norm of its weight_hh.

    Args:
        runs: label -> the folder of a run.
        out: path of the picture; its suffix says the format.
        title: the picture's title.

    Returns:
        The path of the picture.

    Raises:
        ConfigError: no run, or a format that cannot be drawn.
        RunError: a folder holds no gradients.csv.
    """
    if not runs:
        raise ConfigError("runs must name at least one folder, got none")
    tables = {}
    for label, folder in runs.items():
        run = RunFolder(folder)
        table = read_gradients(run.gradients)
        label = f"{label} (diverged)" if state_of(run) == "diverged" else label
        tables[label] = table[table.weight == table.weight.iloc[-1]].set_index("iteration")
    displaced = {label: table.drop(columns=[*PLACE[1:]]) for label, table in tables.items()}
    # what faded altogether, or overflowed, has the first or last colour
    largest = max(table[np.isfinite(table)].max(axis=None) for table in displaced.values())
    colours = LogNorm(max(FADED * largest, np.finfo(float).tiny), max(largest, np.finfo(float).tiny / FADED))
    figure = Figure(figsize=(max(9.0, 1 + 2.6 * len(tables)), 7), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    panels = above.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (label, table) in zip(panels, displaced.items(), strict=True):
        steps = table.columns.astype(int)
        if len(table) == 1:  # of one evaluation: a row has no height else
            table = pd.concat([table, table.set_axis(table.index + 1)])
        image = axes.pcolormesh(
            steps, table.index, table.clip(*(colours.vmin, colours.vmax)), norm=colours, cmap="cividis", rasterized=True
        )
        axes.set_title(label, fontsize=9, color=INK)
        axes.set_xlabel("time step", color=INK)
        axes.tick_params(colors=INK, labelsize=9)
    panels[0].set_ylabel("iteration", color=INK)
    above.colorbar(image, ax=panels).set_label("norm of the displacement", color=INK)
    plots = below.subplots(1, 2)
    for axes, column, name in zip(
        plots, PLACE[2:], ("norm of the recurrent layer's gradient", "spectral norm of weight_hh"), strict=True
    ):
        for look, (label, table) in zip(LOOKS(), tables.items(), strict=False):
            point = {"marker": "o"} if len(table) == 1 else {}
            axes.plot(table.index, table[column], **look, **point, lw=1.6, label=label)
        style(axes)
        axes.set_ylabel(name, color=INK)
    plots[0].set_yscale("log")
    handles, labels = plots[0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, handlelength=3)
    figure.suptitle(title, fontsize=13, color=INK)
    return save(figure, out)


def as_text(value: object) -> str:
    """Return an option's value as pictures and tables show it.

    >>> as_text(1e-3), as_text((64, 32)), as_text(True), as_text(None)
    ('0.001', '64 32', 'True', 'None')
    """
    if isinstance(value, (tuple, list)):
        return " ".join(map(as_text, value))
    return f"{value:g}" if isinstance(value, Real) and not isinstance(value, bool) else str(value)


def draw_image_run(folder: str | Path) -> tuple[Path, Path]:
    """Draw a run on images: curve.png, losses and accuracies, and angles.png, of feedback and gradients by block.

    Args:
        folder: a run's folder, complete or not; its config.json and metrics.csv are read.

    Returns:
        The paths of the pictures.

    Raises:
        RunError: the folder holds no run with an evaluation.
    """
    run = ImageFolder(folder)
    config, rows = run.read_config(), run.read_rows()
    if config is None or not rows:
        raise RunError(f"{folder} holds no run with an evaluation")
    title = f"{config.dataset}, {config.network}, {config.rule}, seed {config.seed}"
    epochs = [row.epoch for row in rows]
    evaluated = config.evaluated
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"{title}: {evaluated} accuracy {rows[-1].accuracy:.1%}", fontsize=13, color=INK)
    losses, accuracy = figure.subplots(1, 2)
    losses.plot(epochs, [row.train_loss for row in rows], color=COLOURS[1], lw=1.2, alpha=0.8, label="training")
    losses.plot(epochs, [row.loss for row in rows], color=COLOURS[0], lw=1.8, label=evaluated)
    _style_loss(losses, "loss")
    losses.legend(frameon=False)
    accuracy.plot(epochs, [row.accuracy for row in rows], color=COLOURS[0], lw=1.8, label="top 1")
    if rows[-1].top5 is not None:
        accuracy.plot(epochs, [row.top5 for row in rows], color=COLOURS[0], lw=1.2, ls="--", label="top 5")
        accuracy.legend(frameon=False)
    style(accuracy)
    accuracy.set_ylim(0, 1.03)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    accuracy.set_ylabel(f"{evaluated} accuracy", color=INK)
    for axes in (losses, accuracy):
        axes.set_xlabel("epoch", color=INK)
    curve = save(figure, run.curve)

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=13, color=INK)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, label, angles in (
        (panels[0], "feedback to the block's transposed weights", [row.feedback_angles for row in rows]),
        (panels[1], "gradient to back-propagation's", [row.gradient_angles for row in rows]),
    ):
        blocks = zip(config.block_names, zip(*angles, strict=True), strict=True)
        for look, (name, line) in zip(LOOKS(), blocks, strict=False):
            if any(angle is not None for angle in line):
                values = [np.nan if angle is None else angle for angle in line]
                axes.plot(epochs, values, **look, lw=1.6, label=name)
        style(axes)
        axes.set_title(label, fontsize=10, color=INK)
        axes.set_xlabel("epoch", color=INK)
        if axes.get_lines():
            axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("angle in degrees", color=INK)
    return curve, save(figure, run.angles)


def _read(run: AnyFolder) -> tuple[SavedConfig, pd.DataFrame]:
    """Configuration and evaluations of a run of either kind; those on images by epoch."""
    rows = run.read_rows() if run.config.exists() else []
    if not rows:
        raise RunError(f"{run.path} holds no run with an evaluation")
    if isinstance(run, RunFolder):
        return run.read_saved(), pd.DataFrame(rows, columns=list(Row._fields))
    columns = {"iteration": "epoch", "test_loss": "loss", "accuracy": "accuracy"}
    table = pd.DataFrame({name: [getattr(row, of) for row in rows] for name, of in columns.items()})
    return run.read_saved(), table


def save(figure: Figure, out: str | Path) -> Path:
    """Write a figure, whole or not at all, and its folder if there is none; its path's suffix says the format.

    Raises:
        ConfigError: the format cannot be drawn.
    """
    path = Path(out)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ConfigError(f"out must end in one of .{', .'.join(formats)}, got {str(out)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, format=path.suffix[1:].lower())
    write_whole(path, picture.getvalue())
    return path


def style(axes: Axes) -> None:
    """Give axes the look of all figures, over iterations."""
    axes.set_xlabel("iteration", color=INK)
    axes.grid(visible=True, color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    axes.tick_params(colors=INK, labelsize=9)


def _style_loss(axes: Axes, label: str) -> None:
    """A logarithmic axis where the losses span more than a decade, else a linear one with its plainer ticks."""
    style(axes)
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()])
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
    axes.set_ylabel(label, color=INK)


def _style_accuracy(axes: Axes, chance: float | None, evaluated: str = "test") -> None:
    style(axes)
    if chance is not None:
        axes.axhline(chance, color="#999999", lw=1, ls=(0, (4, 3)), label=CHANCE_LABEL)
        axes.text(
            0.99, chance, CHANCE_LABEL, color="#777777", fontsize=8, va="bottom", ha="right",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(f"{evaluated} accuracy", color=INK)


def _wrap(text: str, width: int = 150) -> str:
    """Break a list of settings after a comma where it is longer than a line."""
    lines = [""]
    for part in text.split(", "):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part + ", "
    return "\n".join(lines).rstrip(", ")
