"""The configuration of a run, and the published settings it starts from.

A :class:`Config` holds every number of a run, none left to a default elsewhere; :func:`make_config` makes one from a
preset and the values that differ from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias, get_args

import torch

from tpext.rules import Backprop, LearnedInverse, RegularizedInverse, Rule
from tpext.tasks import IMAGES, TASKS, Task, TaskName, make_task

RuleName = Literal["regularized", "learned", "backprop"]
Preset = Literal["default", "published"]
Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"]
Nonlinearity = Literal["tanh", "relu", "identity"]
Initialization = Literal["orthogonal", "torch"]
Precision = Literal["32", "64", "bf16"]
OptionValue: TypeAlias = int | float | str | bool | None

RULES: dict[RuleName, type[Rule]] = {
    "regularized": RegularizedInverse,
    "learned": LearnedInverse,
    "backprop": Backprop,
}


class ConfigError(ValueError):
    """A setting that is unknown, out of its range, or in conflict with another."""


@dataclass(frozen=True)
class Settings:
    """What a publication fixes for one task and one rule.

    ``lr`` is the rate of the recurrent layer, ``head_lr`` the output layer's, ``reverse_lr`` the reverse layer's. The
    optimizer is SGD; ``momentum``, where there is any, is Nesterov's.
    """

    rule: Rule
    lr: float
    head_lr: float
    iterations: int
    batch_size: int
    momentum: float = 0.0
    reverse_lr: float = 0.0


PUBLISHED_LENGTHS = {"temporal-order": (60, 120), "adding": (30,)}
"""Numbers of steps of the synthetic tasks that settings were published for, the tasks' defaults first."""


def published(
    task: str, rule: RuleName, *, length: int | None = None, chunk: int = 1, batch_size: int = 0
) -> Settings | None:
    """Return the published settings of a task for a rule, or None where none were published.

    They are Roulet and Harchaoui's ("Target Propagation via Regularized Inversion for Recurrent Neural Networks", 2023;
    their released code): 100 tanh units, one layer, orthogonal initialisation, zero biases, SGD.

    ============================  =============================  ====================  ============================
    task                          regularized: lr, step, reg     backprop: lr          learned: lr, step, reverse lr
    ============================  =============================  ====================  ============================
    temporal-order, T = 60        1e-1, 1e-2, 10                 1e-5, momentum .9     1e-2, 1e-1, 1e-3
    temporal-order, T = 120       1e-2, 1e-2, 1                  1e-5, momentum .9     1e-2, 1e-1, 1e-3
    adding, T = 30                1e-1, 1e-1, 1                  1e-3, momentum .9     1e-2, 1e-1, 1e-3
    mnist, pixel by pixel         1e-1, 1e-4, 1                  1e-5                  1e-2, 1e-7, 1e-8, noise .1
    permuted-mnist                1e-1, 1e-4, 1                  1e-4                  none
    ============================  =============================  ====================  ============================

    The published step is ``lr`` times the plain sum of the local gradients, so the rules here have ``normalize=False``:
    with the linearised correction, the recurrent layer moves at ``lr * target_step`` in back-propagation's units. The
    output layer is in the same optimizer, with the loss's own gradient: it moves at ``lr``, ``1 / target_step`` times
    faster. For the learned inverse the published code divides the local losses by the batch size once more; here that
    is ``lr = 1e-2 / batch_size`` beside ``head_lr = 1e-2``.

    Args:
        task: a task's name.
        rule: "regularized", "learned" or "backprop".
        length: number of steps of a synthetic task; None is the task's default.
        chunk: pixels per step of an image task; published is 1.
        batch_size: 0 means the published one (20, MNIST 16).
    """
    if task in IMAGES:
        known = chunk == 1 and (task, rule) != ("permuted-mnist", "learned")
    else:
        lengths = PUBLISHED_LENGTHS.get(task, ())
        known = bool(lengths) if length is None else length in lengths
    return _starting_settings(task, rule, length or 0, chunk, batch_size) if known else None


def _starting_settings(task: str, rule: RuleName, length: int, chunk: int, batch_size: int) -> Settings:
    """Published settings, or for what was never published the nearest: those of T = 60 hold below T = 120."""
    if task == "permuted-mnist" and (chunk != 1 or rule == "learned"):
        task = "mnist"
    elif task not in ("temporal-order", "adding", *IMAGES):
        task = "temporal-order"
    images = task in IMAGES
    batch_size = batch_size or (16 if images else 20)
    long = task == "temporal-order" and length >= 120
    iterations = 24_000 if task == "adding" else 48_000 if long else 40_000
    if rule == "regularized":
        reg = 10.0 if task == "temporal-order" and not long else 1.0
        step = 1e-4 if images else 1e-1 if task == "adding" else 1e-2
        lr = 1e-2 if long else 1e-1
        return Settings(RegularizedInverse(reg=reg, target_step=step, normalize=False), lr, lr, iterations, batch_size)
    if rule == "backprop":
        lr = {"temporal-order": 1e-5, "adding": 1e-3, "mnist": 1e-5, "permuted-mnist": 1e-4}[task]
        return Settings(Backprop(), lr, lr, iterations, batch_size, momentum=0.0 if images else 0.9)
    learned = LearnedInverse(target_step=1e-7 if images else 1e-1, normalize=False, noise=0.1 if images else 0.0)
    return Settings(learned, 1e-2 / batch_size, 1e-2, iterations, batch_size, reverse_lr=1e-8 if images else 1e-3)


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. :func:`make_config` fills it; ``tpext train --help`` explains the fields."""

    task: str
    length: int
    chunk: int | None
    rule: Rule
    preset: Preset
    hidden_size: int
    layers: int
    nonlinearity: Nonlinearity
    init: Initialization
    optimizer: Optimizer
    lr: float
    head_lr: float
    reverse_lr: float
    momentum: float
    nesterov: bool
    clip_grad_norm: float | None
    iterations: int
    batch_size: int
    test_size: int
    eval_interval: int
    checkpoint_interval: int
    seed: int
    precision: Precision
    device: str
    threads: int | None
    data_dir: str | None
    tensorboard: bool

    def __post_init__(self) -> None:
        for name in ("length", "hidden_size", "layers", "iterations", "batch_size", "test_size"):
            _check_integer(name, getattr(self, name), 1)
        for name in ("eval_interval", "checkpoint_interval"):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("seed", self.seed, 0, 2**64 - 1)
        if self.chunk is not None:
            _check_integer("chunk", self.chunk, 1)
        if self.threads is not None:
            _check_integer("threads", self.threads, 1, 1024)
        for name in ("lr", "head_lr", "reverse_lr", "momentum"):
            _check_number(name, getattr(self, name))
        if self.clip_grad_norm is not None:
            _check_number("clip_grad_norm", self.clip_grad_norm, above=True)
        for name, kind in (("nesterov", bool), ("tensorboard", bool), ("device", str)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        if self.data_dir is not None and not isinstance(self.data_dir, str):
            raise ConfigError(f"data_dir must be a path or None, got {self.data_dir!r}")
        for name, choices in (
            ("task", TaskName),
            ("preset", Preset),
            ("nonlinearity", Nonlinearity),
            ("init", Initialization),
            ("optimizer", Optimizer),
            ("precision", Precision),
        ):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise ConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        try:
            device = torch.device(self.device).type
        except RuntimeError as error:
            raise ConfigError(f"device must be a torch device such as cpu or cuda:0, got {self.device!r}") from error
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
        if self.momentum and self.optimizer not in ("sgd", "rmsprop"):
            raise ConfigError(f"momentum does not belong to optimizer={self.optimizer}, only to sgd and rmsprop")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ConfigError("nesterov needs optimizer=sgd and a momentum above 0")
        if isinstance(self.rule, LearnedInverse) and self.nonlinearity != "tanh":
            raise ConfigError(f"rule=learned needs nonlinearity=tanh, got {self.nonlinearity}")
        try:
            task = self.make_task()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if task.length != self.length:
            raise ConfigError(f"length of {self.task} must be {task.length} = 784 / chunk, got {self.length}")

    @property
    def rule_name(self) -> RuleName:
        """The rule's name on the command line."""
        return next(name for name, kind in RULES.items() if isinstance(self.rule, kind))

    def make_task(self) -> Task:
        """Return the task, which reads no data yet."""
        if self.task in IMAGES:
            return make_task(self.task, chunk=self.chunk, data_dir=self.data_dir)
        return make_task(self.task, length=self.length)

    def options(self) -> dict[str, Any]:
        """Return the value of every option of :func:`make_config` by its name, the rule's beside the others."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.rule_name != "learned":
            del values["reverse_lr"]
        return {**values, "rule": self.rule_name, **asdict(self.rule)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as config.json holds them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["rule"] = {"name": self.rule_name, **asdict(self.rule)}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Return the configuration that :meth:`to_dict` wrote.

        Raises:
            ConfigError: a field is missing, unknown or out of its range.
        """
        try:
            rule = dict(values["rule"])
            kind = RULES[rule.pop("name")]
            return cls(**{**values, "rule": kind(**rule)})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not the configuration of a run of this version: {error}") from error


FREE_FIELDS = ("device", "threads", "data_dir", "tensorboard")
"""Fields that say how a run is carried out, not what it computes: a resumed run may change them."""

RULE_OPTIONS: dict[RuleName, tuple[str, ...]] = {
    name: tuple(field.name for field in fields(kind)) + (("reverse_lr",) if name == "learned" else ())
    for name, kind in RULES.items()
}
"""The options that each rule has."""


def make_config(
    task: str, *, rule: RuleName = "regularized", preset: Preset = "default", **options: OptionValue
) -> Config:
    """Return the configuration of a run: a preset, and the options that differ from it.

    Args:
        task: one of :data:`tpext.tasks.TASKS`.
        rule: "regularized", "learned" or "backprop".
        preset: "published": the published settings (see :func:`published`), number of iterations included, and a
            ConfigError where none were published. "default": the same rates and sizes for fewer iterations (4,000;
            MNIST 16,000), and those of the nearest published task or length where none were published.
        options: any field of :class:`Config` or of the rule; None means "as in the preset". ``lr`` alone sets
            ``head_lr`` too. With an optimizer other than SGD, for which nothing was published, rates start at 1e-3 and
            ``normalize`` is True: gradients times ``target_step`` would be lost beside Adam's epsilon.

    Raises:
        ConfigError: an option is unknown, does not belong to the task or the rule, or is out of its range.

    >>> make_config("adding", rule="backprop", preset="published").lr
    0.001
    """
    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if rule not in RULES:
        raise ConfigError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    given = {name: value for name, value in options.items() if value is not None}
    rule_fields = {option for names in RULE_OPTIONS.values() for option in names}
    for name in given:
        if name not in rule_fields and name not in {field.name for field in fields(Config)}:
            raise ConfigError(f"unknown option {name}")
        if name in rule_fields and name not in RULE_OPTIONS[rule]:
            own = ", ".join(RULE_OPTIONS[rule]) or "none"
            raise ConfigError(f"{name} does not belong to rule={rule} (options of that rule: {own})")

    try:
        sequence = make_task(
            task,
            **{name: given.get(name) for name in ("length", "chunk", "data_dir")},  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    images = task in IMAGES
    chunk = sequence.input_size if images else 1
    batch_size = given.get("batch_size", 0)
    _check_integer("batch_size", batch_size, 0)
    settings = _starting_settings(task, rule, sequence.length, chunk, int(batch_size))
    if preset == "published" and published(task, rule, length=sequence.length, chunk=chunk) is None:
        raise ConfigError(
            f"no settings were published for task={task}, rule={rule}, "
            + (f"chunk={chunk}" if images else f"length={sequence.length}")
        )

    sgd = given.get("optimizer", "sgd") == "sgd"
    if "lr" in given:
        given.setdefault("head_lr", given["lr"])
    momentum = given.get("momentum", settings.momentum if sgd else 0.0)
    rule_options = {name: given.pop(name) for name in RULE_OPTIONS[rule] if name in given and name != "reverse_lr"}
    if not sgd and "normalize" in RULE_OPTIONS[rule]:
        rule_options.setdefault("normalize", True)
    try:
        chosen_rule = replace(settings.rule, **rule_options)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    values: dict[str, Any] = {
        "hidden_size": 100,
        "layers": 1,
        "nonlinearity": "tanh",
        "init": "orthogonal",
        "optimizer": "sgd",
        "lr": settings.lr if sgd else 1e-3,
        "head_lr": settings.head_lr if sgd else 1e-3,
        "reverse_lr": settings.reverse_lr if sgd or rule != "learned" else 1e-3,
        "momentum": momentum,
        "nesterov": sgd and momentum != 0,
        "clip_grad_norm": None,
        "iterations": settings.iterations if preset == "published" else 16_000 if images else 4_000,
        "batch_size": settings.batch_size,
        "test_size": sequence.default_test_size,
        "eval_interval": 1_000 if images else 100,
        "checkpoint_interval": 500,
        "seed": 1,
        "precision": "32",
        "device": "cpu",
        "threads": None,
        "data_dir": None,
        "tensorboard": False,
        **given,
        "length": sequence.length,
        "chunk": chunk if images else None,
    }
    return Config(task=task, rule=chosen_rule, preset=preset, **values)


def differences(saved: Config, asked: Mapping[str, object]) -> list[str]:
    """Return how options asked for differ from a saved configuration, one sentence each, :data:`FREE_FIELDS` apart."""
    present = saved.options()
    return [
        f"{name} is {present.get(name)} there, {value} was asked for"
        for name, value in asked.items()
        if name not in FREE_FIELDS and present.get(name) != value
    ]


def _check_integer(name: str, value: object, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an integer >= {low}, got {value!r}")
    if value > high:
        raise ConfigError(f"{name} must be at most {high}, got {value}")


def _check_number(name: str, value: object, *, above: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not number or (above and value == 0):
        raise ConfigError(f"{name} must be a number {'>' if above else '>='} 0, got {value!r}")
