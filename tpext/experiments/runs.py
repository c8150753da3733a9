"""What runs leave: tables of one row a run, or one row an evaluation, and their trained networks.

>>> frame = load_runs("sweeps/adding")  # doctest: +SKIP
>>> frame.groupby(["rule", "lr"]).accuracy.agg(["mean", "min", "max"])  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import pandas as pd
import torch
from torch import nn

from tpext.experiments.config import Config
from tpext.experiments.image_folder import ImageFolder, open_folder
from tpext.experiments.images import ImageConfig
from tpext.experiments.model import make_model
from tpext.experiments.run_folder import RunError, RunFolder, write_whole
from tpext.experiments.saved_state import field, load
from tpext.experiments.settings import FREE_FIELDS
from tpext.nn import TargetSequential
from tpext.tasks import Task

State = Literal["waiting", "started", "complete", "diverged", "failed"]
OPEN: tuple[State, ...] = ("waiting", "started")
"""States of runs that have not ended."""
AnyFolder: TypeAlias = RunFolder | ImageFolder

OUTCOME = (
    "accuracy",
    "best_accuracy",
    "best_iteration",
    "running_accuracy",
    "test_loss",
    "train_loss",
    "iterations",
    "seconds",
)
"""What a table says of a complete run, where its result has it."""

PLACE = ("run", "folder", "state", "message")
"""What a table has besides options and outcome."""


def state_of(folder: AnyFolder) -> State:
    """Return how far a run is."""
    if folder.result.exists():
        return "complete"
    failure = folder.read_failure()
    if failure is not None:
        return "diverged" if failure.diverged else "failed"
    return "started" if folder.checkpoint.exists() or folder.metrics.exists() else "waiting"


def load_runs(*paths: str | Path) -> pd.DataFrame:
    """Return one row for each run in folders, which may be runs' own, or hold any number of them at any depth.

    Neither code of your own nor data is needed for it, here and in :func:`load_metrics`.

    Columns: ``folder``; ``state`` ("waiting", "started", "complete", "diverged" or "failed"); every option, as
    :meth:`tpext.experiments.Config.options` names them; what result.json has, with ``measures`` by their names; and
    ``message``, of a failure. Where a run has no such value the cell is missing.

    Raises:
        RunError: there is no run, or one cannot be read.
    """
    return _table(folders_of(*paths))


def load_metrics(*paths: str | Path) -> pd.DataFrame:
    """Return one row for each evaluation of runs in folders: ``folder``, the columns of metrics.csv, the options.

    Those columns are ``iteration``; ``train_loss``, the mean since the row before; ``test_loss``; ``accuracy`` in 0..1;
    ``seconds`` since the start of the run; ``running_accuracy`` of the training batches, of rule "kaczmarz" alone;
    ``validation_loss`` of a task that has a validation set. Of ``tpext train images`` they are those of its
    metrics.csv, where angles are tuples with one for each block, in degrees.

    Raises:
        RunError: there is no run, or one cannot be read.
    """
    frames = []
    for folder in folders_of(*paths):
        rows = pd.DataFrame([row._asdict() for row in folder.read_rows()])
        for name, value in folder.read_saved().options().items():
            if name not in rows:
                rows[name] = [value] * len(rows)
        rows.insert(0, "folder", str(folder.path))
        frames.append(rows)
    table: pd.DataFrame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return table


def differing(frame: pd.DataFrame) -> list[str]:
    """Return the options in which the runs of :func:`load_runs` differ, but for how they are carried out.

    What some of the runs do not have counts among the others alone: ``groupby(..., dropna=False)`` keeps these runs.
    """
    # tables that were put together, or read from a file, have lost what load_runs knew
    known = frame.attrs.get("options", [name for name in frame.columns if name not in (*PLACE, *OUTCOME)])
    return [
        name for name in known if name not in FREE_FIELDS and len({str(value) for value in frame[name].dropna()}) > 1
    ]


def write_table(path: Path, folders: Sequence[AnyFolder], options: Sequence[str]) -> pd.DataFrame:
    """Write a table of runs with some of their options, several numbers as on a command line, and return it."""
    frame = _table(folders)
    for name in options:
        if name in frame:
            frame[name] = list(map(in_one, frame[name]))
    outcome = [name for name in OUTCOME if name in frame and frame[name].notna().any()]
    known = [*(name for name in options if name in frame), *outcome]
    table: pd.DataFrame = frame[["state", *known, *frame.attrs["measures"], "message"]].convert_dtypes()
    table.insert(0, "run", [folder.path.name for folder in folders])
    write_whole(path, table.to_csv(index=False).encode())
    return table


def in_one(value: Any) -> Any:
    """Return an option's value with several numbers as one text, as on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def load_model(folder: str | Path) -> tuple[nn.Module, Task]:
    """Return the network of a run as its last checkpoint has it, on the CPU in eval mode, and the task that it is for.

    ``network(input)`` are the outputs for an input of ``task.test_set(seed, size)``. A model of your own loads the same
    weights by ``load_state_dict(network.state_dict())``.

    Args:
        folder: of one run.

    Raises:
        RunError: it holds no run, or none with a checkpoint of this version.
        MissingDataError: the task's data is not there, and says the network's sizes.
    """
    return read_trained(folder)[:2]


class Trained(NamedTuple):
    """What a run's last checkpoint holds of its network."""

    network: nn.Module
    task: Task
    iteration: int


def read_trained(folder: str | Path) -> Trained:
    """Return what :func:`load_model` does, and the iteration."""
    run = open_folder(Path(folder))
    config = run.read_config()
    if config is None:
        raise RunError(f"{folder} holds no run")
    task = config.make_task()
    state = run.load_checkpoint()
    if state is None:
        raise RunError(f"{folder} holds no run with a checkpoint")
    with torch.random.fork_rng(devices=[]):
        name, network = (
            ("model", make_model(config, task)) if isinstance(config, Config) else ("network", _image_network(config))
        )
    try:
        load(state, name, network)
        iteration = field(state, "iteration")
    except ValueError as error:
        raise RunError(f"{run.checkpoint}: not a checkpoint of this run: {error}") from error
    return Trained(network.eval(), task, iteration)


def _image_network(config: ImageConfig) -> TargetSequential:
    """A run's network, as its trainer leaves it: a tied one has no weights of its own in the feedback."""
    network = config.make_network()
    config.make_trainer(network)
    return network


def folders_of(*paths: str | Path) -> list[AnyFolder]:
    """Return the runs in folders, which may be runs' own, or hold any number of them at any depth.

    Raises:
        RunError: there is no run.
    """
    found: dict[Path, AnyFolder] = {}
    for path in paths:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"folders must be paths, each an argument of its own, got a {type(path).__name__}")
        path = Path(path)
        inside = sorted(file.parent for file in path.rglob("config.json"))
        if not inside:
            raise RunError(f"{path} holds no run")
        for folder in inside:
            found.setdefault(folder.resolve(), open_folder(folder))
    return list(found.values())


def _table(folders: Sequence[AnyFolder]) -> pd.DataFrame:
    rows, options, measures = [], dict[str, None](), dict[str, None]()
    for folder in folders:
        row = folder.read_saved().options()
        options |= dict.fromkeys(row)
        result = folder.read_result()
        if result is not None:
            outcome = asdict(result)
            of_it = outcome.pop("measures", {})
            measures |= dict.fromkeys(of_it)
            row |= {name: value for name, value in {**outcome, **of_it}.items() if name not in row}
            row |= {name: outcome[name] for name in OUTCOME if name in outcome}
        failure = folder.read_failure()
        rows.append(
            {
                "folder": str(folder.path),
                "state": state_of(folder),
                **row,
                "message": None if failure is None else failure.message,
            }
        )
    frame: pd.DataFrame = pd.DataFrame(rows)
    frame.attrs = {"options": list(options), "measures": list(measures)}
    return frame
