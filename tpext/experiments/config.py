"""The configuration of a run, and the published settings it starts from.

A :class:`Config` holds every number of a run, none left to a default elsewhere; :func:`make_config` makes one from a
preset and the values that differ from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeAlias, get_args

from tpext.experiments.checks import ConfigError, check_device_name, check_integer, check_number
from tpext.experiments.feed_forward import KACZMARZ_TASKS, feed_forward_values, published_presets
from tpext.experiments.rule_names import (
    DEFAULT_LAYER_RULE,
    DEFAULT_RULE,
    LAYER_RULES,
    RULES,
    SEQUENCE_RULES,
    find_rule,
    name_of,
    rule_options,
)
from tpext.nn import TargetLinear
from tpext.ops import Activation
from tpext.rules import Backprop, Kaczmarz, LayerRule, LearnedInverse, RegularizedInverse, Rule
from tpext.tasks import FEED_FORWARD, IMAGES, SYNTHETIC, VECTORS, Order, Task, check_task_name, make_task

Preset = Literal["default", "published", "seely", "lee", "faust"]
Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad", "tf-rmsprop", "centred-rmsprop"]
Nonlinearity = Literal["tanh", "relu", "identity", "sigmoid", "leaky_relu"]
Initialization = Literal["orthogonal", "torch", "xavier"]
Reduction = Literal["sum", "batch", "element"]
Schedule = Literal["parallel", "alternating"]
Precision = Literal["32", "64", "bf16"]
OptionValue: TypeAlias = int | float | str | bool | tuple[int, ...] | None


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
    task: str, rule: str, *, length: int | None = None, chunk: int = 1, batch_size: int = 0
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
    sequential-mnist              1e-1, 1e-4, 1                  1e-5                  1e-2, 1e-7, 1e-8, noise .1
    permuted-mnist                1e-1, 1e-4, 1                  1e-4                  none
    ============================  =============================  ====================  ============================

    The published step is ``lr`` times the plain sum of the local gradients, so the rules here have ``normalize=False``:
    with the linearised correction, the recurrent layer moves at ``lr * target_step`` in back-propagation's units. The
    output layer is in the same optimizer, with the loss's own gradient: it moves at ``lr``, ``1 / target_step`` times
    faster. For the learned inverse the published code divides the local losses by the batch size once more; here that
    is ``lr = 1e-2 / batch_size`` beside ``head_lr = 1e-2``.

    Args:
        task: a sequence task's name.
        rule: the name of a recurrent rule.
        length: number of steps of a synthetic task; None is the task's default.
        chunk: pixels per step of an image task; published is 1.
        batch_size: 0 means the published one (20, MNIST 16).
    """
    if task not in (*SYNTHETIC, *IMAGES) or rule not in SEQUENCE_RULES:
        return None
    if task in IMAGES:
        known = chunk == 1 and (task, rule) != ("permuted-mnist", "learned-inverse")
    else:
        lengths = PUBLISHED_LENGTHS.get(task, ())
        known = bool(lengths) if length is None else length in lengths
    return _starting_settings(task, rule, length or 0, chunk, batch_size) if known else None


def _starting_settings(task: str, rule: str, length: int, chunk: int, batch_size: int) -> Settings:
    """Published settings, or for what was never published the nearest: those of T = 60 hold below T = 120."""
    if task == "permuted-mnist" and (chunk != 1 or rule == "learned-inverse"):
        task = "sequential-mnist"
    elif task not in ("temporal-order", "adding", *IMAGES):
        task = "temporal-order"
    images = task in IMAGES
    batch_size = batch_size or (16 if images else 20)
    long = task == "temporal-order" and length >= 120
    iterations = 24_000 if task == "adding" else 48_000 if long else 40_000
    if rule == "regularized-inverse":
        reg = 10.0 if task == "temporal-order" and not long else 1.0
        step = 1e-4 if images else 1e-1 if task == "adding" else 1e-2
        lr = 1e-2 if long else 1e-1
        return Settings(RegularizedInverse(reg=reg, target_step=step, normalize=False), lr, lr, iterations, batch_size)
    if rule == "backprop":
        lr = {"temporal-order": 1e-5, "adding": 1e-3, "sequential-mnist": 1e-5, "permuted-mnist": 1e-4}[task]
        return Settings(Backprop(), lr, lr, iterations, batch_size, momentum=0.0 if images else 0.9)
    if rule != "learned-inverse":
        return Settings(_default(rule), 1e-3, 1e-3, iterations, batch_size)
    learned = LearnedInverse(target_step=1e-7 if images else 1e-1, normalize=False, noise=0.1 if images else 0.0)
    return Settings(learned, 1e-2 / batch_size, 1e-2, iterations, batch_size, reverse_lr=1e-8 if images else 1e-3)


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. :func:`make_config` fills it; ``tpext train --help`` explains the fields."""

    task: str
    length: int | None
    chunk: int | None
    rule: Rule
    preset: Preset
    hidden_size: int | None
    layers: int | None
    sizes: tuple[int, ...] | None
    nonlinearity: Nonlinearity
    init: Initialization
    reference_compat: bool
    tied: bool
    optimizer: Optimizer
    lr: float
    head_lr: float
    reverse_lr: float
    momentum: float
    nesterov: bool
    clip_grad_norm: float | None
    reduction: Reduction
    schedule: Schedule
    epochs: int | None
    iterations: int | None
    batch_size: int
    train_size: int | None
    order: Order | None
    test_size: int
    eval_interval: int | None
    checkpoint_interval: int
    seed: int
    precision: Precision
    device: str
    threads: int | None
    data_dir: str | None
    tensorboard: bool

    def __post_init__(self) -> None:
        for name in ("batch_size", "test_size", "checkpoint_interval"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        for name in ("chunk", "epochs", "iterations", "train_size", "eval_interval"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.threads is not None:
            check_integer("threads", self.threads, 1, 1024)
        for name in ("lr", "head_lr", "reverse_lr", "momentum"):
            check_number(name, getattr(self, name))
        if self.clip_grad_norm is not None:
            check_number("clip_grad_norm", self.clip_grad_norm, above=True)
        for name, kind in (
            ("nesterov", bool),
            ("tensorboard", bool),
            ("device", str),
            ("reference_compat", bool),
            ("tied", bool),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        if self.data_dir is not None and not isinstance(self.data_dir, str):
            raise ConfigError(f"data_dir must be a path or None, got {self.data_dir!r}")
        for name, choices in (
            ("preset", Preset),
            ("nonlinearity", Nonlinearity),
            ("init", Initialization),
            ("optimizer", Optimizer),
            ("reduction", Reduction),
            ("schedule", Schedule),
            ("precision", Precision),
        ):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise ConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        _check_task(self.task)
        check_device_name(self.device)
        if self.momentum and self.optimizer not in ("sgd", "rmsprop", "tf-rmsprop", "centred-rmsprop"):
            raise ConfigError(
                f"momentum does not belong to optimizer={self.optimizer}, only to sgd, rmsprop, tf-rmsprop and "
                "centred-rmsprop"
            )
        if self.optimizer in ("rmsprop", "tf-rmsprop", "centred-rmsprop") and self.momentum >= 1:
            raise ConfigError(f"momentum must be below 1 with optimizer={self.optimizer}, got {self.momentum:g}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ConfigError("nesterov needs optimizer=sgd and a momentum above 0")
        if isinstance(self.rule, LearnedInverse) and self.nonlinearity != "tanh":
            raise ConfigError(f"rule=learned-inverse needs nonlinearity=tanh, got {self.nonlinearity}")
        margin, least = getattr(self.rule, "margin", 1.0), 2.0**-52 if self.precision == "64" else 2.0**-23
        if margin < least:
            raise ConfigError(f"margin must be at least {least:.3g} with precision={self.precision}, got {margin:g}")
        if self.task in FEED_FORWARD:
            self._check_feed_forward()
        else:
            self._check_sequence()
        self._check_duration()
        try:
            task = self.make_task()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if task.length != self.length:
            raise ConfigError(f"length of {self.task} must be {task.length} = 784 / chunk, got {self.length}")

    def _check_sequence(self) -> None:
        for name in ("length", "hidden_size", "layers"):
            check_integer(name, getattr(self, name), 1)
        _check_rule(self.task, self.rule_name)
        for name, only in (
            ("sizes", None),
            ("reference_compat", False),
            ("tied", False),
            ("reduction", "sum"),
            ("train_size", None),
            ("order", None),
        ):
            _check_belongs(self.task, name, getattr(self, name), only)
        if self.nonlinearity not in ("tanh", "relu", "identity"):
            raise ConfigError(f"nonlinearity of {self.task} must be tanh, relu or identity, got {self.nonlinearity}")
        if self.init == "xavier":
            raise ConfigError(f"init of {self.task} must be orthogonal or torch, got xavier")

    def _check_feed_forward(self) -> None:
        for name in ("length", "chunk", "hidden_size", "layers"):
            _check_belongs(self.task, name, getattr(self, name), None)
        _check_rule(self.task, self.rule_name)
        if not isinstance(self.sizes, tuple) or not self.sizes:
            raise ConfigError(f"sizes must be the sizes of at least one hidden layer, got {self.sizes!r}")
        for size in self.sizes:
            check_integer("sizes", size, 1)
        if self.task not in VECTORS:
            _check_belongs(self.task, "order", self.order, None)
        elif self.order not in get_args(Order):
            raise ConfigError(f"order must be one of {', '.join(get_args(Order))}, got {self.order!r}")
        if self.precision == "bf16":
            raise ConfigError(f"precision of {self.task} must be 32 or 64, got bf16")
        if isinstance(self.rule, Kaczmarz):
            self._check_kaczmarz()
        if self.reference_compat:
            self._check_reference_compat()
        if self.tied:
            self._check_tied()

    def _check_reference_compat(self) -> None:
        assert isinstance(self.rule, LayerRule)
        activation = Activation(self.nonlinearity, reference_compat=True)
        try:
            TargetLinear(1, 1, activation=activation, rule=self.rule, device="meta")
        except ValueError as error:
            raise ConfigError(
                f"reference_compat=True does not go with nonlinearity={self.nonlinearity}, rule={self.rule_name}: "
                + str(error).removeprefix("TargetLinear: ")
            ) from error

    def _check_tied(self) -> None:
        assert self.sizes is not None
        if self.task != "mnist-autoencoder":
            raise ConfigError(f"tied ties the layers of mnist-autoencoder, not of {self.task}")
        if isinstance(self.rule, LayerRule) and self.rule.ordinary_head:
            raise ConfigError(f"tied does not belong to rule={self.rule_name}, whose head is an ordinary layer")
        if len(self.sizes) % 2 == 0 or self.sizes != self.sizes[::-1]:
            raise ConfigError(
                f"sizes must be an odd number of sizes, the same from both ends, with tied=True, got {self.sizes}"
            )
        if self.reduction != "sum":
            raise ConfigError(
                f"reduction must be sum with tied=True, as one parameter has two local losses, got {self.reduction}"
            )

    def _check_kaczmarz(self) -> None:
        if self.task not in KACZMARZ_TASKS:
            raise ConfigError(f"rule=kaczmarz learns classes of images: {', '.join(KACZMARZ_TASKS)}, not {self.task}")
        if self.nonlinearity not in ("relu", "identity"):
            raise ConfigError(f"rule=kaczmarz needs nonlinearity=relu or identity, got {self.nonlinearity}")
        for name, only in (
            ("optimizer", "sgd"),
            ("lr", 1),
            ("head_lr", 1),
            ("momentum", 0),
            ("clip_grad_norm", None),
            ("reduction", "sum"),
            ("reference_compat", False),
        ):
            if getattr(self, name) != only:
                raise ConfigError(
                    f"rule=kaczmarz needs {name}={only}, as its update is a plain step of sgd at rate 1, "
                    f"got {getattr(self, name)}"
                )

    def _check_duration(self) -> None:
        has_epochs = self.task in IMAGES or self.task in VECTORS
        if (self.epochs is None) == (self.iterations is None):
            raise ConfigError(f"give epochs or iterations, got epochs={self.epochs}, iterations={self.iterations}")
        if not has_epochs:
            _check_belongs(self.task, "epochs", self.epochs, None)
            check_integer("eval_interval", self.eval_interval, 1)
        if self.schedule == "alternating" and not (has_epochs and self.rule.learns):
            raise ConfigError(
                "schedule=alternating needs a task with epochs and a rule that learns, "
                f"got task={self.task}, rule={self.rule_name}"
            )

    @property
    def title(self) -> str:
        """The task and, for sequences, its length: what runs must share to be compared."""
        return self.task if self.length is None else f"{self.task}, T={self.length}"

    @property
    def rule_name(self) -> str:
        """The rule's name on the command line."""
        return name_of(type(self.rule))

    def make_task(self) -> Task:
        """Return the task, which reads no data yet."""
        if self.task in IMAGES:
            return make_task(self.task, chunk=self.chunk, data_dir=self.data_dir)
        if self.task in VECTORS:
            return make_task(self.task, data_dir=self.data_dir, train_size=self.train_size, order=self.order)
        return make_task(self.task, length=self.length)

    def options(self) -> dict[str, Any]:
        """Return the value of every option of :func:`make_config` by its name, the rule's beside the others."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.rule.learns:
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
            kind = find_rule(rule.pop("name"))
            sizes = None if values["sizes"] is None else tuple(values["sizes"])
            return cls(**{**values, "rule": kind(**rule), "sizes": sizes})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not the configuration of a run of this version: {error}") from error


FREE_FIELDS = ("device", "threads", "data_dir", "tensorboard")
"""Fields that say how a run is carried out, not what it computes: a resumed run may change them."""


def make_config(task: str, *, rule: str | None = None, preset: Preset = "default", **options: OptionValue) -> Config:
    """Return the configuration of a run: a preset, and the options that differ from it.

    Args:
        task: one of :data:`tpext.tasks.TASKS`.
        rule: the name of a rule's class in kebab case, one of :data:`tpext.experiments.rule_names.RULES` (default for a
            sequence "regularized-inverse", for a feed-forward task "regularized-least-squares"); or the import path of
            a rule of your own, "module:Class" or "file.py:Class".
        preset: for a sequence "published": the published settings (see :func:`published`), number of iterations
            included, and a ConfigError where none were published; or "default": the same rates and sizes for fewer
            iterations (4,000; MNIST 16,000), and those of the nearest published task or length where none were
            published. For a feed-forward task "seely", "lee" or "faust" (see
            :func:`tpext.experiments.feed_forward.published_presets`); or "default": Adam, for few epochs (kaczmarz:
            SGD at rate 1, its only optimizer).
        options: any field of :class:`Config` or of the rule; None means "as in the preset". ``lr`` alone sets
            ``head_lr`` too, ``iterations`` takes the place of ``epochs`` and the other way round. With an optimizer
            other than the preset's, rates start at 1e-3, and for a sequence ``normalize`` is True: gradients times
            ``target_step`` would be lost beside Adam's epsilon.

    Raises:
        ConfigError: an option is unknown, does not belong to the task or the rule, or is out of its range.

    >>> make_config("adding", rule="backprop", preset="published").lr
    0.001
    >>> make_config("mnist-mlp", rule="difference-target-propagation", preset="lee").reverse_lr
    0.00501149118237
    """
    _check_task(task)
    if rule is None:
        rule = DEFAULT_LAYER_RULE if task in FEED_FORWARD else DEFAULT_RULE
    own = rule_options(rule)
    taken = {field.name for field in fields(Config)} & set(own) - {"reverse_lr"}
    if taken:
        raise ConfigError(f"rule {rule}: fields of a rule must not have the names of options of a run, got {taken}")
    _check_rule(task, rule)
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    rule_fields = {option for name in RULES for option in rule_options(name)} | set(own)
    for name in given:
        if name not in rule_fields and name not in {field.name for field in fields(Config)}:
            raise ConfigError(f"unknown option {name}")
        if name in rule_fields and name not in own:
            known = ", ".join(own) or "none"
            raise ConfigError(f"{name} does not belong to rule={rule} (options of that rule: {known})")

    options_of_task = ("length", "chunk", "data_dir", "train_size", "order")
    try:
        made = make_task(task, **{name: given.get(name) for name in options_of_task})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if "lr" in given:
        given.setdefault("head_lr", given["lr"])
    if "epochs" in given:
        given.setdefault("iterations", None)
    elif "iterations" in given:
        given["epochs"] = None
    values = (
        _feed_forward(task, rule, preset, given) if task in FEED_FORWARD else _sequence(task, made, rule, preset, given)
    )
    if "std" in given and given.get("init", values["init"]) != "torch":
        raise ConfigError(
            f"std is that of init=torch, got std={given['std']}, init={given.get('init', values['init'])}"
        )
    of_rule = {name: given.pop(name) for name in own if name in given and name != "reverse_lr"}
    if not values.pop("keeps_normalize") and "normalize" in own:
        of_rule.setdefault("normalize", True)
    try:
        values["rule"] = replace(values["rule"], **of_rule)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    shared: dict[str, Any] = {
        "test_size": made.default_test_size,
        "checkpoint_interval": 500,
        "seed": 1,
        "precision": "32",
        "device": "cpu",
        "threads": None,
        "data_dir": None,
        "tensorboard": False,
    }
    return Config(**{**shared, **values, **given, "task": task, "preset": preset, "length": made.length})


def _sequence(task: str, made: Task, rule: str, preset: Preset, given: dict[str, Any]) -> dict[str, Any]:
    """The fields that the preset of a sequence sets, and whether the rule's ``normalize`` is to stay as it is."""
    if preset not in ("default", "published"):
        raise ConfigError(f"preset must be one of default, published for {task}, got {preset!r}")
    images = task in IMAGES
    chunk = made.input_size if images else 1
    batch_size = given.get("batch_size", 0)
    check_integer("batch_size", batch_size, 0)
    settings = _starting_settings(task, rule, made.length or 0, chunk, int(batch_size))
    if preset == "published" and published(task, rule, length=made.length, chunk=chunk) is None:
        raise ConfigError(
            f"no settings were published for task={task}, rule={rule}, "
            + (f"chunk={chunk}" if images else f"length={made.length}")
        )
    # nothing is known of a user's own rule: Adam at its usual rate
    optimizer = "sgd" if rule in RULES else "adam"
    sgd = given.get("optimizer", optimizer) == "sgd" and rule in RULES
    momentum = given.get("momentum", settings.momentum if sgd else 0.0)
    if images:
        given["chunk"] = chunk
    return {
        "rule": settings.rule,
        "keeps_normalize": sgd,
        "chunk": None,
        "hidden_size": 100,
        "layers": 1,
        "sizes": None,
        "nonlinearity": "tanh",
        "init": "orthogonal",
        "reference_compat": False,
        "tied": False,
        "optimizer": optimizer,
        "lr": settings.lr if sgd else 1e-3,
        "head_lr": settings.head_lr if sgd else 1e-3,
        "reverse_lr": settings.reverse_lr if sgd or not settings.rule.learns else 1e-3,
        "momentum": momentum,
        "nesterov": sgd and momentum != 0,
        "clip_grad_norm": None,
        "reduction": "sum",
        "schedule": "parallel",
        "epochs": None,
        "iterations": settings.iterations if preset == "published" else 16_000 if images else 4_000,
        "batch_size": settings.batch_size,
        "train_size": None,
        "order": None,
        "eval_interval": 1_000 if images else 100,
    }


def _feed_forward(task: str, rule: str, preset: Preset, given: dict[str, Any]) -> dict[str, Any]:
    """The fields that the preset of a feed-forward task sets, and that the rule's ``normalize`` is to stay as it is."""
    kind = find_rule(rule)
    known = ["default", *published_presets(task, kind)]
    if preset not in known:
        raise ConfigError(f"preset must be one of {', '.join(known)} for task={task}, rule={rule}, got {preset!r}")
    values = feed_forward_values(task, kind, preset)
    if rule not in RULES:
        values["rule"] = _default(rule)
    optimizer = given.get("optimizer", values["optimizer"])
    if optimizer != values["optimizer"]:
        momentum = 0.9 if optimizer == "centred-rmsprop" else 0.0
        values |= {"lr": 1e-3, "reverse_lr": 1e-3, "momentum": momentum}
    momentum = given.get("momentum", values["momentum"])
    return {
        **values,
        "keeps_normalize": True,
        "head_lr": values["lr"],
        "nesterov": optimizer == "sgd" and momentum != 0,
        "chunk": None,
        "hidden_size": None,
        "layers": None,
    }


def _default(rule: str) -> Any:
    """A user's own rule with the defaults of its fields."""
    try:
        return find_rule(rule)()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rule {rule}: every field must have a default: {error}") from error


class HasOptions(Protocol):
    """A configuration, as far as :func:`differences` looks at it."""

    def options(self) -> dict[str, Any]:
        """Return the value of every option by its name."""


def differences(saved: HasOptions, asked: Mapping[str, object]) -> list[str]:
    """Return how options asked for differ from a saved configuration, one sentence each, :data:`FREE_FIELDS` apart."""
    present = saved.options()
    return [
        f"{name} is {present.get(name)} there, {value} was asked for"
        for name, value in asked.items()
        if name not in FREE_FIELDS and present.get(name) != value
    ]


def _check_task(name: str) -> None:
    try:
        check_task_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_rule(task: str, rule: str) -> None:
    kind, own = ("layer", LAYER_RULES) if task in FEED_FORWARD else ("recurrent", SEQUENCE_RULES)
    if kind not in find_rule(rule).kinds:
        raise ConfigError(f"rule={rule} does not belong to {task} (rules of that task: {', '.join(own)})")


def _check_belongs(task: str, name: str, value: object, only: object) -> None:
    if value != only:
        raise ConfigError(f"{name} does not belong to {task}, got {value!r}")
