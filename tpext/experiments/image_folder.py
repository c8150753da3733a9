"""The files of a run on images: those of :mod:`tpext.experiments.run_folder`, and

====================  =====================================================================================
metrics.csv           one row per evaluation: :class:`ImageRow`, its angles in columns of their own,
                      ``feedback_angle_BLOCK`` and ``gradient_angle_BLOCK``
best.pt               network, iteration and accuracy at the best evaluation
angles.png            angles of feedback and gradients over the epochs
====================  =====================================================================================
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tpext.experiments.images import ImageConfig, options_in
from tpext.experiments.own import is_path
from tpext.experiments.run_folder import AnyRunFolder, RunError, RunFolder, write_whole
from tpext.experiments.saved_config import OwnCode, SavedConfig, chance_of


class ImageRow(NamedTuple):
    """One evaluation, on the validation set, or without one on the test set; accuracies are in 0..1.

    Attributes:
        iteration: steps so far, those that train feedback alone included.
        epoch: passes of the blocks through the training images.
        train_loss: mean over the steps of the blocks since the row before.
        loss, accuracy: of the evaluation.
        top5: share of the images whose class is among the five largest outputs; None for up to 5 classes.
        lr: of the first block, of the step before.
        seconds: since the start.
        feedback_angles: between the weights of each block and of its feedback, in degrees; None where they have no
            common shape. In the order of the blocks.
        gradient_angles: between the rule's gradient and back-propagation's on the batch of the step before, by
            :func:`tpext.diagnostics.gradient_angles`.
    """

    iteration: int
    epoch: float
    train_loss: float
    loss: float
    accuracy: float
    top5: float | None
    lr: float
    seconds: float
    feedback_angles: tuple[float | None, ...]
    gradient_angles: tuple[float | None, ...]

    @property
    def test_loss(self) -> float:
        """The loss, by the name that progress and comparisons know."""
        return self.loss


SCALARS = ImageRow._fields[:-2]


@dataclass(frozen=True)
class ImageResult:
    """The outcome of a complete run, as result.json holds it.

    Accuracies are in 0..1. Those called ``best`` are on the test set, with the network of the best evaluation after
    iteration 0; ``evaluated_on`` says on which set that choice was made. On "test" it flatters.
    """

    dataset: str
    network: str
    rule: str
    seed: int
    epochs: int
    iterations: int
    accuracy: float
    top5: float | None
    test_loss: float
    error: float
    best_accuracy: float
    best_top5: float | None
    best_iteration: int
    best_evaluation: float
    evaluated_on: str
    train_loss: float
    seconds: float
    parameters: int
    device: str
    threads: int
    versions: dict[str, str]


class ImageFolder(AnyRunFolder[ImageConfig, ImageRow, ImageResult]):
    """The folder of one run on images."""

    config_class = ImageConfig
    result_class = ImageResult

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.best = self.path / "best.pt"
        self.angles = self.path / "angles.png"

    def _own_code(self, values: Mapping[str, Any]) -> list[OwnCode]:
        names = {what: values[what] for what in ("dataset", "rule")}
        return [OwnCode(what, name, values.get(f"{what}_folder")) for what, name in names.items() if is_path(name)]

    def _about(self, config: ImageConfig) -> SavedConfig:
        title, chance = config.title, chance_of(config.make_task())
        return SavedConfig(title, title, chance, config.options(), config.evaluated, "epoch")

    def _saved(self, values: Mapping[str, Any], own: Mapping[str, Any]) -> SavedConfig:
        title = f"{values['dataset']}, {values['network']}"
        evaluated = "test" if values["validation"] == 0 else "validation"
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return SavedConfig(title, title, own.get("chance"), options_in(options), evaluated, "epoch")

    def _header(self) -> Sequence[str]:
        config = self.read_config()
        if config is None:
            raise RunError(f"{self.path} holds no run")
        return _columns(config.block_names)

    def _cells(self, row: ImageRow) -> Sequence[object]:
        return [*row[:-2], *row.feedback_angles, *row.gradient_angles]

    def _rows(self, header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[ImageRow]:
        blocks = header[len(SCALARS) : (len(SCALARS) + len(header)) // 2]
        if list(header) != _columns([name.removeprefix("feedback_angle_") for name in blocks]):
            raise ValueError(f"its columns are {', '.join(header)}")
        return [_row(cells, len(header)) for cells in lines]

    def save_best(self, state: dict[str, Any]) -> None:
        """Replace best.pt, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.best, buffer.getvalue())

    def load_best(self) -> dict[str, Any]:
        """Return what was last saved, on the CPU.

        Raises:
            RunError: it is not there, or cannot be read.
        """
        try:
            return dict(torch.load(self.best, map_location="cpu", weights_only=True))
        except MemoryError:
            raise
        except Exception as error:  # a broken archive can raise anything
            raise RunError(f"{self.best}: not a readable checkpoint ({type(error).__name__})") from error


def _columns(blocks: Sequence[str]) -> list[str]:
    """The columns of a table, with those of each block."""
    return [*SCALARS, *(f"{kind}_{name}" for kind in ("feedback_angle", "gradient_angle") for name in blocks)]


def _row(cells: Sequence[str], columns: int) -> ImageRow:
    if len(cells) != columns:
        raise ValueError(f"a row has {len(cells)} cells")
    numbers = [float(cell) if cell else None for cell in cells]
    values: dict[str, Any] = dict(zip(SCALARS, numbers, strict=False))
    values["iteration"] = int(cells[0])
    angles = numbers[len(SCALARS) :]
    half = len(angles) // 2
    return ImageRow(**values, feedback_angles=tuple(angles[:half]), gradient_angles=tuple(angles[half:]))


def open_folder(path: str | Path) -> RunFolder | ImageFolder:
    """Return the folder of a run of either kind, by its config.json; where that says nothing, of the other tasks'."""
    folder = ImageFolder(path)
    try:
        return folder if "dataset" in json.loads(folder.config.read_text()) else RunFolder(path)
    except (OSError, TypeError, ValueError):
        return RunFolder(path)
