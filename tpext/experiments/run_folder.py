"""The files of a run. A kill at any moment leaves each whole, but for a last line of metrics.csv, which is passed over.

====================  =====================================================================================
config.json           the configuration; under ``own``, of a user's code what is read of it without that code
metrics.csv           iteration, train_loss, test_loss, accuracy, seconds, running_accuracy, validation_loss: one row
                      per evaluation
checkpoint.pt         everything that continues the run bit for bit, the metrics so far included
result.json           final and best accuracy, losses, time, versions: present when the run is complete
curve.png             loss and accuracy over the iterations
decision.png          decision regions of a toy set in the plane
reconstruction.png    test images and what an autoencoder makes of them
sample.txt            a text by a language model, at the end of its run
gradients.csv         with ``gradients``, a row for each evaluation and recurrent layer, on the batch of the iteration
                      after: norm of the layer's gradient, spectral norm of its weight_hh, and of steps 0 to T
                      the norm of the displacement, all in back-propagation's units
failure.json          how a run of a sweep failed, if it did
begun                 there while a process of a sweep is at the run; one that is killed leaves it
lock                  held by the process that is at the run, whose number it has; empty after
====================  =====================================================================================
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, get_origin, get_type_hints

import torch

from tpext.experiments.config import Config, in_this_version, options_in, title_of
from tpext.experiments.own import is_path
from tpext.experiments.progress import describe
from tpext.experiments.rule_names import RULES
from tpext.experiments.saved_config import OwnCode, SavedConfig, chance_of, differences
from tpext.experiments.settings import ConfigError
from tpext.experiments.task_names import task_from_dict
from tpext.tasks import TASKS, Task

CHECKPOINT_FORMAT = 1


class Row(NamedTuple):
    """One evaluation on the test set; ``accuracy`` is in 0..1.

    ``train_loss`` is the mean over the iterations since the row before. Those that train reverse layers alone have
    none; if no other came, it is that row's. ``running_accuracy`` is that of the training batches, each before its
    step, as :func:`tpext.ops.kaczmarz_train.running_accuracy` averages it from zero; under rule kaczmarz only.
    ``validation_loss`` is there where the task has a validation set.
    """

    iteration: int
    train_loss: float
    test_loss: float
    accuracy: float
    seconds: float
    running_accuracy: float | None = None
    validation_loss: float | None = None


def _optional(cell: str) -> float | None:
    return float(cell) if cell else None


_READ: tuple[Callable[[str], Any], ...] = (int, *[float] * 4, *[_optional] * 2)
"""How each cell of a row is read."""


@dataclass(frozen=True)
class Result:
    """The outcome of a complete run, as result.json holds it.

    Accuracies are in 0..1, on the test set; ``error`` is ``1 - accuracy``. ``best_accuracy`` is the maximum over the
    evaluations after iteration 0: a choice made on the test set, so it flatters; ``accuracy`` is that of the last
    iteration. ``running_accuracy`` and ``validation_loss`` are those of the last :class:`Row`; ``measures`` has what
    the field reports in place of losses, by names such as "test perplexity".
    """

    task: str
    rule: str
    seed: int
    iterations: int
    accuracy: float
    error: float
    best_accuracy: float
    best_iteration: int
    train_loss: float
    test_loss: float
    seconds: float
    parameters: int
    device: str
    threads: int
    versions: dict[str, str]
    running_accuracy: float | None = None
    validation_loss: float | None = None
    measures: dict[str, float] = field(default_factory=dict)


class RunError(RuntimeError):
    """A run folder that cannot be used as asked."""


class BusyError(RunError):
    """Another process is at the run."""


@dataclass(frozen=True)
class Failure:
    """How a run failed, as failure.json holds it.

    Attributes:
        diverged: whether its numbers did, as they would again; else the machine or the program failed.
        message: in one line.
        details: where in the program.
    """

    diverged: bool
    message: str
    details: str = ""


class RunConfig(Protocol):
    """What a folder needs of a run's configuration, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as config.json holds them."""

    @classmethod
    def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
        """Return the configuration that :meth:`to_dict` wrote, or raise ConfigError."""

    def options(self) -> dict[str, Any]:
        """Return the value of every option by its name."""

    def carried_out(self: ConfigT, asked: Mapping[str, Any]) -> ConfigT:
        """Return the configuration with those of the options asked for that a resumed run may change."""

    def make_task(self) -> Task:
        """Return the task."""

    @property
    def title(self) -> str:
        """What runs must share to be compared."""


class RunRow(Protocol):
    """What a folder needs of an evaluation."""

    @property
    def iteration(self) -> int:
        """Number of the step that it came after."""


ConfigT = TypeVar("ConfigT", bound=RunConfig)
RowT = TypeVar("RowT", bound=RunRow)
ResultT = TypeVar("ResultT")


class AnyRunFolder(Generic[ConfigT, RowT, ResultT], ABC):
    """The folder of one run, of whichever kind: subclasses name its configuration and its result, and read its rows.

    Attributes:
        config_class, result_class: dataclasses, of config.json and result.json.
    """

    config_class: type[ConfigT]
    result_class: type[ResultT]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.csv"
        self.checkpoint = self.path / "checkpoint.pt"
        self.result = self.path / "result.json"
        self.curve = self.path / "curve.png"
        self.failure = self.path / "failure.json"
        self.begun = self.path / "begun"
        self.lock = self.path / "lock"

    @abstractmethod
    def _header(self) -> Sequence[str]:
        """The columns of metrics.csv."""

    @abstractmethod
    def _cells(self, row: RowT) -> Sequence[object]:
        """The cells of a row."""

    @abstractmethod
    def _rows(self, header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[RowT]:
        """The rows of a table's cells; ValueError if it is another table."""

    @abstractmethod
    def _own_code(self, values: Mapping[str, Any]) -> list[OwnCode]:
        """What the values of config.json name of a user's."""

    @abstractmethod
    def _about(self, config: ConfigT) -> SavedConfig:
        """What tables and figures need of a configuration."""

    @abstractmethod
    def _saved(self, values: Mapping[str, Any], own: Mapping[str, Any]) -> SavedConfig:
        """The same of the values of config.json, with what :meth:`write_config` adds of a user's code."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes off the run; makes the folder.

        Raises:
            BusyError: another process is at it.
            RunError: the path is no folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunError(f"{self.path} cannot be a run's folder: {error.strerror}") from error
        with self.lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(f"{self.path}: another process is running this run") from error
            file.truncate(0)
            print(os.getpid(), file=file, flush=True)
            try:
                yield
            finally:
                file.truncate(0)

    def check_empty(self) -> None:
        """Raise RunError if there is a run already, or a part of one."""
        for path in (self.config, self.metrics, self.checkpoint, self.result, self.curve):
            if path.exists() and self.config.exists():
                raise RunError(
                    f"{self.path} already holds a run: take another folder (--out) for a new run, or resume=True "
                    "(--resume) to continue it"
                )
            if path.exists():
                raise RunError(
                    f"{self.path} holds {path.name} but no {self.config.name}, so it cannot be continued: "
                    "pass another --out for a new run"
                )

    def create(self, config: ConfigT) -> None:
        """Start a run here, in the locked folder.

        Raises:
            RunError: there is a run already, or a part of one.
        """
        self.check_empty()
        self.write_config(config)

    def discard(self) -> None:
        """Remove what keeps a run from this folder; other files stay, such as those of TensorBoard."""
        for path in (self.metrics, self.checkpoint, self.config):
            path.unlink(missing_ok=True)

    def write_config(self, config: ConfigT) -> None:
        """Write config.json: the configuration, and ``own``, of a user's code what is read of it without that code."""
        values = config.to_dict()
        code = self._own_code(values)
        if code:
            about = self._about(config)
            values["own"] = {
                "title": about.title,
                "description": about.description,
                "chance": about.chance,
                "learns": "reverse_lr" in about.values,
                "sha256": {one.what: one.hash() for one in code},
            }
        write_whole(self.config, as_json(values))

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values of config.json, and what it has of a user's code, which runs of earlier versions have not."""
        values = dict(json.loads(self.config.read_text()))
        return values, values.pop("own", {})

    def read_config(self) -> ConfigT | None:
        """Return the configuration of the run here, None if there is none.

        Raises:
            RunError: it cannot be read.
        """
        if not self.config.exists():
            return None
        try:
            return self.config_class.from_dict(self._read()[0])
        except ConfigError as error:
            raise RunError(f"{self.config}: {error}") from error
        except (OSError, TypeError, ValueError) as error:
            raise RunError(f"{self.config}: not the configuration of a run: {error}") from error

    def read_saved(self) -> SavedConfig:
        """Return what tables and figures need of the configuration of the run here, without a user's code and data.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        if not self.config.exists():
            raise RunError(f"{self.path} holds no run")
        try:
            values, own = self._read()
            if self._own_code(values):
                return self._saved(values, own)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise RunError(f"{self.config}: not the configuration of a run: {error}") from error
        config = self.read_config()
        assert config is not None
        return self._about(config)

    def has_own_code(self) -> bool:
        """Whether the run needs code of a user's, or cannot be read."""
        try:
            return bool(self._own_code(self._read()[0]))
        except (AttributeError, KeyError, OSError, TypeError, ValueError):
            return True

    def changed_files(self) -> list[str]:
        """Return the files of a user's that have changed since the run here was made; none if that is not known.

        A run that has not trained yet will be made with them as they are.

        Raises:
            RunError: the run cannot be read.
        """
        try:
            values, own = self._read()
            before, code = dict(own.get("sha256", {})), self._own_code(values)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise RunError(f"{self.config}: not the configuration of a run: {error}") from error
        changed: dict[str, None] = {}
        for one in code if before and self._has_trained() else ():
            # what cannot be imported is told where a run needs it
            with contextlib.suppress(ConfigError):
                now = one.hash()
                if now and before.get(one.what) != now:
                    changed[one.file] = None
        return list(changed)

    def _has_trained(self) -> bool:
        """Whether the run has ended, or an evaluation says that it has trained."""
        failure, rows = self.read_failure(), self.read_rows()
        ended = self.result.exists() or (failure is not None and failure.diverged)
        return ended or (bool(rows) and rows[-1].iteration > 0)

    def continued(self, asked: Mapping[str, Any]) -> ConfigT | None:
        """Return the configuration of the run here with the free fields asked for, None if there is no run.

        Raises:
            RunError: it cannot be read, or another option was asked for than is there: names each.
        """
        saved = self.read_config()
        if saved is None:
            return None
        saved = saved.carried_out(asked)
        found = differences(saved, asked)
        if found:
            raise RunError(f"{self.path} holds another run: {'; '.join(found)}. Pass another --out for a new run")
        return saved

    def read_result(self) -> ResultT | None:
        """Return the result of the run here, None if it is not complete.

        Raises:
            RunError: it cannot be read.
        """
        if not self.result.exists():
            return None
        try:
            values = json.loads(self.result.read_text())
            result = self.result_class(**values)
        except (OSError, TypeError, ValueError) as error:
            raise RunError(f"{self.result}: not the result of a run of this version: {error}") from error
        for name, kind in get_type_hints(self.result_class).items():
            if not isinstance(getattr(result, name), kind if isinstance(kind, UnionType) else get_origin(kind) or kind):
                raise RunError(f"{self.result}: {name} must be of type {kind}, got {getattr(result, name)!r}")
        return result

    def read_failure(self) -> Failure | None:
        """Return how the run here failed, None if it has not, or not in a sweep.

        Raises:
            RunError: it cannot be read.
        """
        if not self.failure.exists() or self.result.exists():
            return None
        try:
            return Failure(**json.loads(self.failure.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise RunError(f"{self.failure}: not the failure of a run: {error}") from error

    def write_failure(self, failure: Failure) -> None:
        """Say how the run failed."""
        write_whole(self.failure, as_json(asdict(failure)))

    def write_result(self, result: ResultT) -> None:
        """Mark the run as complete."""
        write_whole(self.result, as_json(asdict(result)))  # type: ignore[call-overload]

    def read_rows(self) -> list[RowT]:
        """Return the evaluations in metrics.csv, none if there is no such file.

        Raises:
            RunError: it cannot be read.
        """
        if not self.metrics.exists():
            return []
        try:
            # What a kill cut short has no end of line.
            header, *lines = csv.reader(self.metrics.read_text().split("\n")[:-1])
            return self._rows(header, lines)
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{self.metrics}: not the metrics of a run: {error}") from error

    def append_row(self, row: RowT) -> None:
        """Add a line to metrics.csv. A line cut short by a kill is mended by :meth:`write_rows` on resume."""
        with self.metrics.open("a", newline="") as file:
            csv.writer(file).writerow(self._cells(row))

    def write_rows(self, rows: list[RowT]) -> None:
        """Write metrics.csv anew."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(self._header())
        writer.writerows(map(self._cells, rows))
        write_whole(self.metrics, text.getvalue().encode())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace checkpoint.pt by a new one, whole or not at all."""
        buffer = io.BytesIO()
        torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
        write_whole(self.checkpoint, buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the state last saved, on the CPU; None if none was.

        Raises:
            RunError: the checkpoint cannot be read, was written by another version, or is gone.
        """
        if not self.checkpoint.exists():
            rows = self.read_rows()
            if rows and rows[-1].iteration > 0:
                raise RunError(
                    f"{self.checkpoint} is missing, and {self.metrics.name} goes to iteration {rows[-1].iteration}: "
                    "this run cannot be continued; pass another --out for a new run"
                )
            return None
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            found = state.get("format")
        except MemoryError:
            raise
        except Exception as error:  # a broken archive can raise anything
            raise RunError(f"{self.checkpoint}: not a readable checkpoint ({type(error).__name__})") from error
        if found != CHECKPOINT_FORMAT:
            raise RunError(f"{self.checkpoint}: format {found}, this version reads {CHECKPOINT_FORMAT}")
        return state


class RunFolder(AnyRunFolder[Config, Row, Result]):
    """The folder of one run of :func:`tpext.experiments.train.train`."""

    config_class = Config
    result_class = Result

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.decision = self.path / "decision.png"
        self.reconstruction = self.path / "reconstruction.png"
        self.sample = self.path / "sample.txt"
        self.gradients = self.path / "gradients.csv"

    def _own_code(self, values: Mapping[str, Any]) -> list[OwnCode]:
        values = in_this_version(values)
        parts = {what: values[what] for what in ("task", "rule")}
        return [
            OwnCode(what, of_it["name"], of_it.get("folder")) for what, of_it in parts.items() if is_path(of_it["name"])
        ]

    def _about(self, config: Config) -> SavedConfig:
        return SavedConfig(config.title, describe(config), chance_of(config.task), config.options())

    def _saved(self, values: Mapping[str, Any], own: Mapping[str, Any]) -> SavedConfig:
        values = in_this_version(values)
        name = values["task"]["name"]
        task = task_from_dict(values["task"]) if name in TASKS else None
        title = name if task is None else title_of(name, task)
        rule = values["rule"]["name"]
        # a rate too much in a table, of what an earlier version has not told of, misleads nobody
        learns = RULES[rule].learns if rule in RULES else own.get("learns", True)
        options = options_in(values, learns=learns)
        description = f"{title}, {values['rule']['name']}, seed {values['seed']}"
        chance = None if task is None else chance_of(task)
        return SavedConfig(
            own.get("title", title), own.get("description", description), own.get("chance", chance), options
        )

    def _header(self) -> Sequence[str]:
        return Row._fields

    def _cells(self, row: Row) -> Sequence[object]:
        return row

    def _rows(self, header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[Row]:
        # Earlier versions had no validation loss, and before that no running accuracy.
        if tuple(header) not in (Row._fields, Row._fields[:-1], Row._fields[:-2]):
            raise ValueError(f"its columns are {', '.join(header)}")
        kinds = _READ[: len(header)]
        return [Row(*(kind(cell) for kind, cell in zip(kinds, line, strict=True))) for line in lines]


def as_json(values: Mapping[str, Any]) -> bytes:
    """Return plain values as the content of a .json file."""
    return (json.dumps(values, indent=2) + "\n").encode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file such that a kill, or a power cut, leaves the old content or the new, never a part.

    Raises:
        RunError: it cannot be written, for want of space or rights; the old content stays.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
