"""The files of a run, written so that a kill at any moment leaves each of them whole.

====================  =====================================================================================
config.json           the configuration
metrics.csv           iteration, train_loss, test_loss, accuracy, seconds: one row per evaluation
checkpoint.pt         everything that continues the run bit for bit, the metrics so far included
result.json           final and best accuracy, losses, time, versions: present when the run is complete
curve.png             loss and accuracy over the iterations
====================  =====================================================================================
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tpext.experiments.config import Config

CHECKPOINT_FORMAT = 1


class Row(NamedTuple):
    """One evaluation. ``train_loss`` is the mean over the iterations since the row before, ``accuracy`` is in 0..1."""

    iteration: int
    train_loss: float
    test_loss: float
    accuracy: float
    seconds: float


class RunError(RuntimeError):
    """A run folder that cannot be used as asked."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.csv"
        self.checkpoint = self.path / "checkpoint.pt"
        self.result = self.path / "result.json"
        self.curve = self.path / "curve.png"

    def create(self, config: Config) -> None:
        """Start a run here.

        Raises:
            RunError: there is a run already, or the path is no folder.
        """
        for path in (self.config, self.metrics, self.checkpoint, self.result, self.curve):
            if path.exists():
                raise RunError(
                    f"{self.path} already holds a run ({path.name}): continue it with --resume, or choose another --out"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunError(f"{self.path} cannot be a run's folder: {error.strerror}") from error
        _write_whole(self.config, _json(config.to_dict()))

    def read_config(self) -> Config | None:
        """Return the configuration of the run here, None if there is none.

        Raises:
            RunError: it cannot be read.
        """
        if not self.config.exists():
            return None
        try:
            return Config.from_dict(json.loads(self.config.read_text()))
        except ValueError as error:
            raise RunError(f"{self.config}: {error}") from error

    def read_result(self) -> dict[str, Any] | None:
        """Return the result of the run here, None if it is not complete."""
        if not self.result.exists():
            return None
        result: dict[str, Any] = json.loads(self.result.read_text())
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Mark the run as complete."""
        _write_whole(self.result, _json(result))

    def append_row(self, row: Row) -> None:
        """Add a line to metrics.csv. A line cut short by a kill is mended by :meth:`write_rows` on resume."""
        with self.metrics.open("a", newline="") as file:
            csv.writer(file).writerow(row)

    def write_rows(self, rows: list[Row]) -> None:
        """Write metrics.csv anew."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(Row._fields)
        writer.writerows(rows)
        _write_whole(self.metrics, text.getvalue().encode())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace checkpoint.pt by a new one, whole or not at all."""
        buffer = io.BytesIO()
        torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
        _write_whole(self.checkpoint, buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the state last saved, on the CPU; None if none was.

        Raises:
            RunError: the checkpoint was written by another version.
        """
        if not self.checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state.get("format") != CHECKPOINT_FORMAT:
            raise RunError(f"{self.checkpoint}: format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}")
        return state


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file such that a kill, or a power cut, leaves the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
