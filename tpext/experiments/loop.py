"""What all training loops share."""

from __future__ import annotations

import contextlib
import importlib
import math
import platform
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FrameType, MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import tpext
from tpext.experiments import passes
from tpext.experiments.config import Config
from tpext.experiments.image_folder import ImageResult, ImageRow
from tpext.experiments.images import ImageConfig
from tpext.experiments.passes import Course
from tpext.experiments.progress import Progress, say
from tpext.experiments.run_folder import AnyRunFolder, Result, Row, RunError
from tpext.experiments.saved_state import check_type, field, load, read_rows, shown
from tpext.experiments.settings import ConfigError, check_device_name, check_integer, check_number
from tpext.tasks import Batch, Task


class DivergedError(RuntimeError):
    """A loss, gradient or parameter became NaN or infinite."""

    def __init__(self, iteration: int, what: str) -> None:
        super().__init__(f"diverged at iteration {iteration}: {what}")
        self.iteration = iteration


def require_figures() -> None:
    """Load what draws, before a run that draws at its end; a command that draws nothing does without the second.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    importlib.import_module("tpext.experiments.figures")


def check_device(name: str) -> None:
    """Raise ConfigError for what is no device, or one that is not there."""
    check_device_name(name)
    if torch.device(name).type == "cuda":
        if not tpext.build_info()["cuda_architectures"]:
            raise ConfigError("device must be cpu: this build of tpext has no CUDA kernels")
        if not torch.cuda.is_available():
            raise ConfigError(f"device must be cpu: torch sees no CUDA device, got {name}")


@contextlib.contextmanager
def torch_state(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and set its threads, for the run only."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class Interrupted(KeyboardInterrupt):
    """A signal ended a run, after the iteration that it came in and a checkpoint, or a sweep of such runs."""

    def __init__(self, number: int, saved: str) -> None:
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        super().__init__(f"interrupted{by}; {saved}")
        self.number = number


_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
"""What ends a run, with the handlers that say that nobody else takes care of it, as nohup does."""


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number, "stopped at once")


@contextlib.contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP in a list, for the loop to stop between two iterations.

    A Ctrl-C that is not the first of them stops it at once; the other two come twice where a terminal closes. Only the
    main thread can catch signals, and only where nobody else handles them.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    taken = {number: handler for number, handler in _HANDLERS.items() if signal.getsignal(number) == handler}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if signal.SIGINT in taken:
            signal.signal(signal.SIGINT, _stop_at_once)

    for number in taken:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "tpext": str(tpext.build_info()["version"]),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


ConfigT = TypeVar("ConfigT", bound=Config | ImageConfig)
RowT = TypeVar("RowT", bound=Row | ImageRow)
ResultT = TypeVar("ResultT", bound=Result | ImageResult)


class Run(ABC, Generic[ConfigT, RowT, ResultT]):
    """A run and its loop; subclasses make its parts, and say what an iteration and an evaluation do.

    Attributes:
        row_class: of an evaluation.
        saved: the plain attributes that a checkpoint holds, and their types.
        parts: what else it holds, by name: the model, its optimizer, and what each kind of run adds.
        iterations: their number.
        losses: those since the last evaluation; iterations that train feedback alone have none.
        evaluated: name of the set that evaluations are on.
        task: where the batches come from.
    """

    row_class: type[RowT]
    saved: Mapping[str, Any] = MappingProxyType({"iteration": int, "losses": list[float]})
    parts: dict[str, Any]
    model: nn.Module
    task: Task
    iterations: int
    description: str
    evaluated: str = "test"

    def __init__(self, config: ConfigT, folder: AnyRunFolder[ConfigT, RowT, ResultT], console: Console) -> None:
        self.config = config
        self.folder = folder
        self.console = console
        self.device = torch.device(config.device)
        self.dtype = torch.float64 if config.precision == "64" else torch.float32
        self.iteration = 0
        self.rows: list[RowT] = []
        self.losses: list[float] = []
        self.seconds_before = 0.0
        self.started = time.perf_counter()
        self.callback: Callable[[RowT, nn.Module], None] | None = None

    @abstractmethod
    def _step(self, iteration: int) -> Course[None]:
        """Carry out an iteration, counted from 1; passes that those of other runs may join are yielded."""

    @abstractmethod
    def _evaluates(self, iteration: int) -> bool:
        """Whether an evaluation comes after an iteration that is not the last."""

    @abstractmethod
    def _first_loss(self) -> float:
        """Training loss before any step, so that the curve starts at iteration 0."""

    @abstractmethod
    def _row(self, train_loss: float) -> RowT:
        """Evaluate."""

    @abstractmethod
    def _draw(self) -> None:
        """Draw the curves."""

    @abstractmethod
    def _result(self) -> ResultT:
        """Return the outcome of the complete run."""

    def course(self, interrupts: list[int], stop: Callable[[], bool]) -> Course[ResultT]:
        """Run to the last iteration, from the folder's checkpoint if it has one.

        Args:
            interrupts: numbers of signals; one that comes in ends the run after its iteration, with a checkpoint.
            stop: ends it like SIGTERM once it returns True.
        """
        state = self.folder.load_checkpoint()
        if state is not None:
            self._restore(state)
        if self.iteration == 0:
            self.folder.write_config(self.config)  # with a user's code as it is now
        self.folder.write_rows(self.rows)
        self.started = time.perf_counter()
        try:
            shown = self.description, self.folder.path, self.iteration, self.iterations, self.rows, self.evaluated
            with Progress(self.console, *shown) as progress:
                if not self.rows:
                    self._add_row(progress)
                    self._checkpoint()
                for iteration in range(self.iteration + 1, self.iterations + 1):
                    self.iteration = iteration
                    try:
                        yield from self._step(iteration)
                    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                        raise DivergedError(iteration, str(error)) from error
                    if stop():
                        interrupts.append(signal.SIGTERM)
                    if signal.SIGHUP in interrupts:
                        self.console.quiet = True  # the terminal is gone, and writing to it an error
                    last = iteration == self.iterations
                    if last or self._evaluates(iteration):
                        self._add_row(progress)
                        self.losses.clear()
                    if iteration % self.config.checkpoint_interval == 0 or last or interrupts:
                        self._checkpoint()
                    if interrupts and not last:
                        raise Interrupted(interrupts[0], f"a checkpoint is saved at iteration {iteration}")
                    progress.advance(iteration, self.losses[-1] if self.losses else self.rows[-1].train_loss)
        except DivergedError:
            if self.rows:
                self._draw()
            raise
        result = self._result()
        self._draw()
        self.folder.write_result(result)
        return result

    def rehearse(self, iterations: Iterable[int]) -> Course[None]:
        """Carry out iterations and nothing else, for a measurement of their time."""
        for self.iteration in iterations:
            yield from self._step(self.iteration)

    def _batch(self, number: int) -> Batch:
        return self._move(self.task.batch(self.config.seed, number, self.config.batch_size))

    def _best_row(self) -> RowT:
        """The evaluation with the largest accuracy, that before any step apart."""
        return max(self.rows[1:], key=lambda row: row.accuracy)

    def _outcome(self) -> dict[str, Any]:
        """What the results of all runs have."""
        return {
            "seed": self.config.seed,
            "iterations": self.rows[-1].iteration,
            "train_loss": self.rows[-1].train_loss,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def _move(self, batch: Batch) -> Batch:
        dtype = self.dtype if batch.input.is_floating_point() else None
        return Batch(batch.input.to(self.device, dtype), batch.target.to(self.device))

    def _add_row(self, progress: Progress) -> None:
        if self.losses:
            train_loss = math.fsum(self.losses) / len(self.losses)
        else:  # iterations that train feedback alone have no loss
            train_loss = self.rows[-1].train_loss if self.rows else self._first_loss()
        row = self._row(train_loss)
        self.rows.append(row)
        self.folder.append_row(row)
        progress.row(row)
        if self.callback is not None:
            # it may draw random numbers, or leave the model in another mode
            with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
                self.callback(row, self.model)
            self.model.train()

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _watch(self, value: float, what: str) -> float:
        """Return a loss; stop before one that is not finite moves any parameter."""
        if not math.isfinite(value):
            raise DivergedError(self.iteration, f"the {what} is {value}")
        return value

    def _check_parameters(self, cause: Exception | None = None) -> None:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise DivergedError(self.iteration, f"{name} holds NaN or infinite values") from cause

    def _checkpoint(self) -> None:
        self._check_parameters()
        state = {name: getattr(self, name) for name in self.saved}
        state |= {name: None if part is None else part.state_dict() for name, part in self.parts.items()}
        rows = [[*row] for row in self.rows]
        state |= {"random_state": torch.get_rng_state(), "rows": rows, "seconds": self._seconds()}
        if self.device.type == "cuda":  # where noise is drawn
            state["device_random_state"] = torch.cuda.get_rng_state(self.device)
        self.folder.save_checkpoint(state)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self._take_over(state)
        except ValueError as error:
            raise RunError(f"{self.folder.checkpoint}: not a checkpoint of this run: {error}") from error

    def _take_over(self, state: dict[str, Any]) -> None:
        for name, kind in self.saved.items():
            check_type(name, field(state, name), kind)
            setattr(self, name, state[name])
        check_integer("iteration", self.iteration, 0, self.iterations)
        for name, part in self.parts.items():
            if part is not None:
                load(state, name, part)
        self.rows = read_rows(field(state, "rows"), self.row_class, self.iteration)
        if self.iteration == self.iterations:
            check_integer("iteration of the last of rows", self.rows[-1].iteration, self.iteration)
        check_number("seconds", field(state, "seconds"))
        self.seconds_before = state["seconds"]
        random: dict[str, Callable[[Tensor], None]] = {"random_state": torch.set_rng_state}
        if self.device.type == "cuda":
            random["device_random_state"] = partial(torch.cuda.set_rng_state, device=self.device)
        for name, put in random.items():
            value = field(state, name)
            try:
                put(value)
            except (AttributeError, RuntimeError, TypeError) as error:
                raise ValueError(f"{name} must be a state of torch's generator, got {shown(value)}") from error


def carry_out(
    make: Callable[[ConfigT, AnyRunFolder[ConfigT, RowT, ResultT], Console], Run[ConfigT, RowT, ResultT]],
    config: ConfigT,
    folder: AnyRunFolder[ConfigT, RowT, ResultT],
    *,
    threads: int,
    resume: bool,
    console: Console | None,
    stop: Callable[[], bool] | None,
    callback: Callable[[RowT, nn.Module], None] | None,
) -> ResultT:
    """Make a run and carry it out in its folder, which is there only once the run could be made."""
    course = begin(make, config, folder, resume=resume, console=console, stop=stop, callback=callback)
    with torch_state(config.seed, threads):
        return passes.carry_out(course)


def begin(
    make: Callable[[ConfigT, AnyRunFolder[ConfigT, RowT, ResultT], Console], Run[ConfigT, RowT, ResultT]],
    config: ConfigT,
    folder: AnyRunFolder[ConfigT, RowT, ResultT],
    *,
    resume: bool,
    console: Console | None = None,
    stop: Callable[[], bool] | None = None,
    callback: Callable[[RowT, nn.Module], None] | None = None,
    interrupts: list[int] | None = None,
) -> Course[ResultT]:
    """Make a run, and carry it out from pass to pass, in torch's state as it is.

    Args:
        interrupts: of signals that somebody else catches, for all runs of a stack; None: catch them here.
    """
    require_figures()
    console = Console(quiet=True) if console is None else console
    if not isinstance(console, Console):
        raise TypeError(f"console must be a rich.console.Console or None, got {type(console).__name__}")
    saved = folder.continued(config.options()) if resume else None
    if saved is None:
        folder.check_empty()
        if resume:
            say(console, f"{folder.path} holds no run to resume: a new one begins")
    else:
        for file in folder.changed_files():
            say(console, f"{file} has changed since this run was made; take another --out to run it anew")
        result = folder.read_result()
        if result is not None:
            say(console, f"{folder.path} is complete already")
            return result
    check_device(config.device)
    run = make(config, folder, console)
    run.callback = callback
    catch = catch_interrupts() if interrupts is None else contextlib.nullcontext(interrupts)
    with folder.locked(), catch as caught:
        if saved is None:
            folder.create(config)
        try:
            return (yield from run.course(caught, stop or (lambda: False)))
        except DivergedError:
            raise
        except Exception:
            # such as one in a user's rule, whose next version wants the folder
            if saved is None and run.iteration <= 1 and len(run.rows) <= 1:
                folder.discard()
            raise
