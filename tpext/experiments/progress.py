"""Progress of a run: a live line in a terminal, one line an evaluation elsewhere."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tpext.experiments import rule_names, task_names
from tpext.experiments.cells import CELLS
from tpext.experiments.config import Config
from tpext.experiments.field_help import default_of

if TYPE_CHECKING:
    from typing_extensions import Self

REDRAW_SECONDS = 0.1
ALWAYS_SHOWN = ("credit", "correction", "dx", "update", "reg", "target_step", "noise")
SHOWN_IF_CHANGED = ("normalize", "slope", "slope_reg", "unit_gain", "inverse", "gate_slope", "candidate_slope")
"""What a line says of one of our rules only where it is not as it is by default; of a user's it says all such."""


class ShownRow(Protocol):
    """What is shown of an evaluation."""

    @property
    def iteration(self) -> int:
        """Number of the step that it came after."""

    @property
    def train_loss(self) -> float:
        """Mean since the evaluation before."""

    @property
    def test_loss(self) -> float:
        """Loss on the set of the evaluation."""

    @property
    def accuracy(self) -> float:
        """Accuracy there, in 0..1."""


class LiveLine:
    """A context manager in which a bar is drawn live, if there is one.

    Attributes:
        bar: rich's; None where nothing is drawn live, as in a pipe.
    """

    bar: Bar | None = None

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


class Progress(LiveLine):
    """Shows how a run gets on; a context manager.

    Args:
        console: where.
        description: of the run, in one line.
        folder: of the run.
        iteration, last: the one to go on after, and the last one.
        rows: the evaluations so far.
        evaluated: name of the set that the rows' ``test_loss`` and ``accuracy`` are of.
    """

    def __init__(
        self,
        console: Console,
        description: str,
        folder: Path,
        iteration: int,
        last: int,
        rows: Sequence[ShownRow],
        evaluated: str = "test",
    ) -> None:
        self.console = console
        self.first = self.iteration = iteration
        self.last = last
        self.started = self.drawn = time.perf_counter()
        self.last_row: ShownRow | None = rows[-1] if rows else None
        say(self.console, description)
        say(
            self.console,
            f"{'resuming after iteration ' + str(iteration) + ' in' if iteration else 'writing to'} {folder}",
        )
        loss = f"{evaluated} loss"
        self.width = max(10, len(loss))
        if console.is_terminal and not console.quiet:
            self.bar = Bar(
                TextColumn("{task.completed:>6.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self.line = self.bar.add_task("", total=last, completed=iteration, numbers="")
        else:
            say(
                self.console,
                f"{'iteration':>9}  {'train loss':>10}  {loss:>{self.width}}  {'accuracy':>8}  {'it/s':>7}",
            )

    def row(self, row: ShownRow) -> None:
        """Show an evaluation."""
        self.last_row = row
        if self.bar is None:
            self.iteration = row.iteration
            numbers = f"{row.train_loss:>10.5f}  {row.test_loss:>{self.width}.5f}  {row.accuracy:>8.2%}"
            say(self.console, f"{row.iteration:>9}  {numbers}  {self._rate():>7.0f}")

    def advance(self, iteration: int, train_loss: float) -> None:
        """Show an iteration: the last, and before it one every tenth of a second."""
        if self.bar is None:
            return
        now = time.perf_counter()
        if now - self.drawn < REDRAW_SECONDS and iteration < self.last:
            return
        self.drawn = now
        self.iteration = iteration
        accuracy = "" if self.last_row is None else f"  accuracy {self.last_row.accuracy:.2%}"
        self.bar.update(
            self.line, completed=iteration, numbers=f"loss {train_loss:.4f}{accuracy}  {self._rate():.0f} it/s"
        )

    def _rate(self) -> float:
        """Iterations per second since the start, evaluations included."""
        return (self.iteration - self.first) / max(time.perf_counter() - self.started, 1e-9)


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def describe(config: Config) -> str:
    """Return a run's settings on one line.

    >>> from tpext.experiments import make_config
    >>> describe(make_config("adding", rule="backprop"))
    'adding, T=30, 100 tanh units, backprop, sgd 0.001 momentum 0.9, batch 20, seed 1'
    >>> describe(make_config("spiral", rule="constrained-least-squares"))
    'spiral, 64-64-64 leaky_relu units, constrained-least-squares (target step 1), adam 0.003, batch 100, seed 1'
    >>> describe(make_config("adding", preset="long-range")).partition("units, ")[2]  # doctest: +ELLIPSIS
    'orthogonal weights, regularized-inverse (credit local, ... target step 1, slope reg 3.0, unit gain True), adam ...'
    """
    rule = config.rule_name
    fields = {field.name for field in dataclasses.fields(config.rule)}
    gated = config.cell is not None and CELLS[config.cell].gated
    options = [
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, 'g')}"
        for name in ALWAYS_SHOWN
        if name in fields and (value := getattr(config.rule, name)) is not None
    ]
    options += [
        f"{name.replace('_', ' ')} {value}"
        for name, value in _changed(config.rule).items()
        if name not in ALWAYS_SHOWN
        if name in SHOWN_IF_CHANGED or rule_names.is_own(type(config.rule))
        if not (gated and name == "slope")
    ]
    own = _changed(config.task) if task_names.is_own(config.task) else {}
    of_task = task_names.options_of(config.task)
    rates = f"{config.lr:g}" if config.lr == config.head_lr else f"{config.lr:g} (head {config.head_lr:g})"
    if config.sizes is None:
        layers = f" x {config.layers} layers" if config.layers != 1 else ""
        units = config.cell if gated else config.nonlinearity
        constraint = ", orthogonal weights" if config.orthogonal else ""
        network = [f"T={config.task.length}", f"{config.hidden_size} {units} units{layers}{constraint}"]
    else:
        tied = ", tied" if config.tied else ""
        network = [f"{'-'.join(map(str, config.sizes))} {config.nonlinearity} units{tied}"]
    parts = [
        config.task_name,
        *([config.task.subject] if config.task.subject else []),
        # T says the length
        *(f"{name.replace('_', ' ')} {value}" for name, value in own.items() if name in of_task and name != "length"),
        *network,
        rule + (f" ({', '.join(options)})" if options else ""),
        f"{config.optimizer} {rates}" + (f" momentum {config.momentum:g}" if config.momentum else ""),
        f"batch {config.batch_size}",
        f"seed {config.seed}",
    ]
    return ", ".join(parts)


def _changed(of: Any) -> dict[str, Any]:
    """The fields of a rule or a task that are not as they are by default; what it keeps beside its options is none."""
    found = {}
    for field in dataclasses.fields(of):
        if not (field.init and field.compare):
            continue
        if (value := getattr(of, field.name)) != default_of(field):
            found[field.name] = value
    return found
