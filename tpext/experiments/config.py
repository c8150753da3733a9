"""The configuration of a run.

A :class:`Config` holds every number of a run, none left to a default elsewhere; :func:`make_config` makes one from a
preset and the values that differ from it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from tpext._names import did_you_mean
from tpext.experiments import rule_names, task_names
from tpext.experiments.cells import CELLS
from tpext.experiments.defaults import FEED_FORWARD, RUN, SEQUENCE, starting_values, with_optimizer
from tpext.experiments.presets import PRESETS, Case, presets_of
from tpext.experiments.rule_names import DEFAULT_LAYER_RULE, DEFAULT_RULE, LAYER_RULES, RULES, SEQUENCE_RULES, find_rule
from tpext.experiments.settings import (
    ConfigError,
    check_device_name,
    check_integer,
    check_number,
    choices_of,
    described,
    free_fields,
)
from tpext.nn import TargetLinear
from tpext.ops import Activation
from tpext.ops._members import as_list
from tpext.rules import Rule
from tpext.tasks import TASKS, StoredTask, Task

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad", "tf-rmsprop", "centred-rmsprop"]
Nonlinearity = Literal["tanh", "relu", "identity", "sigmoid", "leaky_relu"]
Initialization = Literal["orthogonal", "torch", "xavier"]
Reduction = Literal["sum", "batch", "element"]
Schedule = Literal["parallel", "alternating"]
Precision = Literal["32", "64", "bf16"]
OptionValue: TypeAlias = int | float | str | bool | tuple[int, ...] | Mapping[str, Any] | None

WITH_MOMENTUM = ("sgd", "rmsprop", "tf-rmsprop", "centred-rmsprop")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. :func:`make_config` fills it."""

    task: Task
    rule: Rule
    preset: str
    cell: str | None = described(f"What recurrent layers are made of: {', '.join(CELLS)}.", network="recurrent")
    hidden_size: int | None = described("Units of a recurrent layer.", network="recurrent")
    layers: int | None = described("Number of recurrent layers.", network="recurrent")
    sizes: tuple[int, ...] | None = described(
        "Units of each hidden layer of a feed-forward network.", network="feed-forward"
    )
    nonlinearity: Nonlinearity = described(
        "Activation of the hidden layers; sigmoid and leaky_relu are feed-forward only."
    )
    init: Initialization = described(
        "orthogonal: matrices with singular values 1, biases 0, as published. torch: PyTorch's own (rule kaczmarz: "
        "normal, see --std). xavier: uniform (feed-forward)."
    )
    forget_bias: float | None = described(
        "Bias that forget gates start with, in place of what --init gives; 1 keeps them open (cell lstm).",
        network="recurrent",
    )
    orthogonal: bool = described(
        "Keep recurrent weights orthogonal, those of each gate by themselves: two Newton-Schulz steps after each step "
        "(init orthogonal).",
        network="recurrent",
    )
    reference_compat: bool = described(
        "Inverses of activations as in Seely's code, which does not solve for them (feed-forward).",
        network="feed-forward",
    )
    tied: bool = described(
        "Tie the decoder's weights to the encoder's, the last layer's to the first's and so on; they learn at --lr "
        "(mnist-autoencoder; not under rules with an ordinary head, --reduction sum only).",
        network="feed-forward",
    )
    optimizer: Optimizer = described(
        "With another optimizer than the preset's, rates start at 1e-3, and of sequences --normalize at True. Rule "
        "kaczmarz has sgd at rate 1 only."
    )
    lr: float = described(
        "Learning rate of the hidden layers, and of the head unless --head-lr is given. For rule learned-inverse the "
        "preset's is the published 1e-2 divided by the batch size."
    )
    head_lr: float = described(
        "Learning rate of the output layer, and of a trained embedding, which learn by plain gradients (not under the "
        "least squares rules)."
    )
    reverse_lr: float = described("Learning rate of what a rule learns, such as reverse layers.")
    momentum: float = described("Momentum (sgd and the three rmsprop).")
    nesterov: bool = described("Nesterov's momentum (sgd).", "True where sgd has a momentum")
    clip_grad_norm: float | None = described("Bound on the norm of all gradients together, above 0.")
    reduction: Reduction = described(
        "How local losses are averaged (feed-forward): sum: half the sum of squares; batch: their mean over the batch, "
        "as in Lee's code; element: half their mean over batch and units, as in Seely's.",
        network="feed-forward",
    )
    schedule: Schedule = described(
        "Reverse layers learn at every step, or an epoch before the others (rules that learn)."
    )
    epochs: int | None = described("Passes through the training samples, in place of --iterations.")
    iterations: int | None = described("Number of training steps.")
    batch_size: int = described("Samples per step.")
    test_size: int = described("Samples of the test set, and of the validation set of a text.", "the task's")
    eval_interval: int | None = described("Iterations between evaluations.", "100, or the task's; with epochs an epoch")
    checkpoint_interval: int = described("Iterations between checkpoints.")
    seed: int = described("Seed of the initialization, the data and the noise.")
    precision: Precision = described("Float type; bf16 is mixed precision.")
    device: str = described("A torch device.")
    threads: int | None = described("CPU threads.", "1 for digits and drawn samples, up to 4 for images")
    data_dir: str | None = described("Folder with the image task's files; without it MNIST is downloaded once.")
    gradients: bool = described(
        "Write gradients.csv too: at each evaluation, on one batch, norms of gradients and displacements (recurrent).",
        network="recurrent",
    )
    tensorboard: bool = described("Write TensorBoard events too.")

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task) or not isinstance(self.rule, Rule):
            raise ConfigError(f"task and rule must be a Task and a Rule, got {self.task!r}, {self.rule!r}")
        if self.preset not in ("default", *PRESETS):
            raise ConfigError(f"preset must be one of default, {', '.join(PRESETS)}, got {self.preset!r}")
        self._check_types()
        # with its folder of data, which arrays of a user's may need for their sizes
        object.__setattr__(self, "task", task_names.with_data(self.task, self.data_dir))
        self._check_optimizer()
        margin, least = getattr(self.rule, "margin", 1.0), 2.0**-52 if self.precision == "64" else 2.0**-23
        if min(as_list(margin)) < least:
            raise ConfigError(f"margin must be at least {least:.3g} with precision={self.precision}, got {margin}")
        _check_rule(self.task_name, self.task, type(self.rule))
        self._check_network()
        self._check_layer()
        if self.rule.solves_weights:
            self._check_weight_solves()
        self._check_duration()

    def _check_types(self) -> None:
        for name, hint in get_type_hints(Config).items():
            value, choices, kinds = getattr(self, name), choices_of(hint), (hint, *get_args(hint))
            if value is None and NoneType in kinds:
                continue
            if choices and value not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            for kind in (bool, str):
                if kind in kinds and not isinstance(value, kind):
                    raise ConfigError(f"{name} must be a {kind.__name__}, got {value!r}")
            if int in kinds:
                high = {"seed": 2**64 - 1, "threads": 1024}.get(name, 2**31 - 1)
                check_integer(name, value, 0 if name == "seed" else 1, high)
            if float in kinds:
                check_number(name, value, above=name == "clip_grad_norm")
        check_device_name(self.device)

    def _check_optimizer(self) -> None:
        if self.momentum and self.optimizer not in WITH_MOMENTUM:
            raise ConfigError(
                f"momentum does not belong to optimizer={self.optimizer}, only to {', '.join(WITH_MOMENTUM)}"
            )
        if self.optimizer in WITH_MOMENTUM[1:] and self.momentum >= 1:
            raise ConfigError(f"momentum must be below 1 with optimizer={self.optimizer}, got {self.momentum:g}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ConfigError("nesterov needs optimizer=sgd and a momentum above 0")

    def _check_network(self) -> None:
        """Check the options that one kind of network has and the other has not."""
        values, other = (FEED_FORWARD, "recurrent") if self.feed_forward else (SEQUENCE, "feed-forward")
        why = _why_feed_forward(self.task)
        for field in fields(self):
            if field.metadata.get("network") == other:
                self._check_belongs(field.name, {**RUN, **values}[field.name], why)
        if self.feed_forward:
            if not isinstance(self.sizes, tuple) or not self.sizes:
                raise ConfigError(f"sizes must be the sizes of at least one hidden layer, got {self.sizes!r}")
            for size in self.sizes:
                check_integer("sizes", size, 1)
            if self.precision == "bf16":
                raise ConfigError(f"precision of {self.task_name} must be 32 or 64, got bf16")
            if self.tied:
                self._check_tied()
            return
        for name in ("hidden_size", "layers"):
            check_integer(name, getattr(self, name), 1)
        if self.cell not in CELLS:
            raise ConfigError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        known = CELLS[self.cell].nonlinearities
        if self.nonlinearity not in known:
            raise ConfigError(
                f"nonlinearity must be one of {', '.join(known)} with cell={self.cell}, got {self.nonlinearity}"
            )
        if self.forget_bias is not None and CELLS[self.cell].forget_gate is None:
            raise ConfigError(f"forget_bias belongs to a cell with a forget gate, which cell={self.cell} has not")
        if self.orthogonal and self.init != "orthogonal":
            raise ConfigError(f"orthogonal needs init=orthogonal, to begin with, got init={self.init}")
        if self.init == "xavier":
            raise ConfigError(f"init of {self.task_name} must be orthogonal or torch, got xavier")

    def _check_belongs(self, name: str, only: object, why: str = "") -> None:
        if getattr(self, name) != only:
            raise ConfigError(f"{name} does not belong to {self.task_name}, got {getattr(self, name)!r}{why}")

    def _check_layer(self) -> None:
        """Let the rule say whether it can serve such a layer."""
        rule: Any = self.rule  # for layers of this kind, as has been checked
        try:
            if self.feed_forward:
                activation = Activation(self.nonlinearity, reference_compat=self.reference_compat)
                TargetLinear(1, 1, activation=activation, rule=rule, device="meta")
            elif self.cell is not None:
                CELLS[self.cell].make(1, 1, 1, nonlinearity=self.nonlinearity, rule=rule, device="meta")
        except ValueError as error:
            compat = "reference_compat=True, " if self.reference_compat else ""
            cell = "" if self.feed_forward else f"cell={self.cell}, "
            raise ConfigError(
                f"rule={self.rule_name} does not go with {compat}{cell}nonlinearity={self.nonlinearity}: "
                + re.sub(r"^\w+: ", "", str(error))
            ) from error

    def _check_tied(self) -> None:
        assert self.sizes is not None
        if self.task.input_size != self.task.output_size:
            raise ConfigError(f"tied ties the layers of an autoencoder, not of {self.task_name}")
        if getattr(self.rule, "ordinary_head", False):
            raise ConfigError(f"tied does not belong to rule={self.rule_name}, whose head is an ordinary layer")
        if len(self.sizes) % 2 == 0 or self.sizes != self.sizes[::-1]:
            raise ConfigError(
                f"sizes must be an odd number of sizes, the same from both ends, with tied=True, got {self.sizes}"
            )
        if self.reduction != "sum":
            raise ConfigError(
                f"reduction must be sum with tied=True, as one parameter has two local losses, got {self.reduction}"
            )

    def _check_weight_solves(self) -> None:
        if self.task.criterion != "cross_entropy":
            raise ConfigError(f"rule={self.rule_name} learns classes, which {self.task_name} has not")
        for name, only in (
            ("optimizer", "sgd"),
            ("lr", 1),
            ("head_lr", 1),
            ("momentum", 0),
            ("clip_grad_norm", None),
            ("reduction", "sum"),
        ):
            if getattr(self, name) != only:
                raise ConfigError(
                    f"rule={self.rule_name} needs {name}={only}, as its update is a plain step of sgd at rate 1, "
                    f"got {getattr(self, name)}"
                )

    def _check_duration(self) -> None:
        if (self.epochs is None) == (self.iterations is None):
            raise ConfigError(f"give epochs or iterations, got epochs={self.epochs}, iterations={self.iterations}")
        if not self.task.has_epochs:
            self._check_belongs("epochs", None)
            check_integer("eval_interval", self.eval_interval, 1)
        if self.schedule == "alternating" and not (self.task.has_epochs and self.rule.learns):
            raise ConfigError(
                "schedule=alternating needs a task with epochs and a rule that learns, "
                f"got task={self.task_name}, rule={self.rule_name}"
            )

    @property
    def feed_forward(self) -> bool:
        """Whether the network is feed-forward, else recurrent."""
        return self.task.length is None

    @property
    def task_name(self) -> str:
        """The task's name on the command line."""
        return task_names.name_of(self.task)

    @property
    def rule_name(self) -> str:
        """The rule's name on the command line."""
        return rule_names.name_of(type(self.rule))

    @property
    def title(self) -> str:
        """The task, what it is about and, for sequences, its length: what runs must share to be compared."""
        return title_of(self.task_name, self.task)

    def make_task(self) -> Task:
        """Return the task, with its data folder."""
        return self.task

    def options(self) -> dict[str, Any]:
        """Return the value of every option of :func:`make_config` by its name, the task's and the rule's beside the
        others; those of a user's task or rule after ``task_options.`` and ``rule_options.``.
        """
        return options_in(self.to_dict(), learns=self.rule.learns)

    def carried_out(self, asked: Mapping[str, Any]) -> Config:
        """Return the configuration with those of the options asked for that a resumed run may change."""
        of_task = {name: asked[name] for name in self.task.free_options if name in asked}
        task: Any = self.task
        return replace(self, task=replace(task, **of_task) if of_task else task, **free_fields(asked))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as config.json holds them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "task": task_names.task_to_dict(self.task), "rule": rule_names.rule_to_dict(self.rule)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Return the configuration that :meth:`to_dict` wrote.

        Raises:
            ConfigError: a field is missing, unknown or out of its range.
        """
        try:
            values = in_this_version(values)
            task, rule = task_names.task_from_dict(values["task"]), rule_names.rule_from_dict(values["rule"])
            return cls(**{**values, "task": task, "rule": rule})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not the configuration of a run of this version: {error}") from error


def _why_feed_forward(task: Task) -> str:
    if task.length is not None:
        return ""
    if isinstance(task, StoredTask):
        shape = f"[N, {task.input_size}]"
        return (
            f"; its inputs are {shape}, so the network is feed-forward; a series of one number a step is x[:, :, None]"
        )
    return "; the task has no length, so the network is feed-forward"


def title_of(name: str, task: Task) -> str:
    """Return a task's name, what it is about and, for sequences, its length."""
    parts = [name, task.subject, None if task.length is None else f"T={task.length}"]
    return ", ".join(part for part in parts if part)


def in_this_version(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json as :meth:`Config.to_dict` has them, of whichever version they are.

    Raises:
        KeyError, TypeError, ValueError: other values than were written.
    """
    values = dict(values)
    for name, value in (("forget_bias", None), ("orthogonal", False), ("gradients", False)):
        values.setdefault(name, value)
    if isinstance(values["task"], str):  # as earlier versions had it: the tasks' options among the others
        if values["task"] not in TASKS:
            # a path would be imported; no earlier version wrote one there
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {values['task']!r}")
        flat = {name: values.pop(name) for name in ("length", "chunk", "train_size", "order")}
        known = task_names.find_task(values["task"]).options
        options = {name: value for name, value in flat.items() if name in known}
        values["task"] = {"name": values["task"], "options": options}
    if "options" not in values["rule"]:  # they stood beside the name
        options = {name: value for name, value in values["rule"].items() if name != "name"}
        values["rule"] = {"name": values["rule"]["name"], "options": options}
    if "cell" not in values:  # earlier versions had one
        values["cell"] = None if values["hidden_size"] is None else "rnn"
    return {**values, "sizes": None if values["sizes"] is None else tuple(values["sizes"])}


def options_in(values: Mapping[str, Any], *, learns: bool) -> dict[str, Any]:
    """Return what :meth:`Config.options` does, of the values of :meth:`Config.to_dict`.

    Args:
        values: they may be of a user's task and rule that are not there.
        learns: whether the rule learns something.
    """
    found = {name: value for name, value in values.items() if learns or name != "reverse_lr"}
    for what, ours in (("task", TASKS), ("rule", RULES)):
        name, of_it = values[what]["name"], values[what]["options"]
        found[what] = name
        found |= of_it if name in ours else {f"{what}_options.{option}": value for option, value in of_it.items()}
    return found


def make_config(
    task: str,
    *,
    rule: str | None = None,
    preset: str = "default",
    task_options: Mapping[str, Any] | None = None,
    rule_options: Mapping[str, Any] | None = None,
    **options: OptionValue,
) -> Config:
    """Return the configuration of a run: a preset, and the options that differ from it.

    Args:
        task: one of :data:`tpext.tasks.TASKS`; or the import path of a task of your own, "module:Class" or
            "file.py:Class".
        rule: the name of a rule's class in kebab case, one of :data:`tpext.experiments.rule_names.RULES` (default for a
            sequence "regularized-inverse", for a feed-forward task "regularized-least-squares"); or the import path of
            a rule of your own.
        preset: one of :data:`tpext.experiments.presets.PRESETS`, all settings as published, and a ConfigError where
            none were; or "default": for a sequence the published rates, or the nearest, for fewer iterations; else what
            :mod:`tpext.experiments.defaults` has.
        task_options, rule_options: of a task and a rule of your own.
        options: any field of :class:`Config`, of a task or of a rule; None means "as in the preset". ``lr`` alone sets
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
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for_task = _of_task(task, given, task_options)
    made = task_names.make_task(task, for_task)
    if rule is None:
        rule = DEFAULT_RULE if made.length is not None else DEFAULT_LAYER_RULE
    kind = find_rule(rule)
    _check_rule(task, made, kind)
    for_rule = {**_defaults_of_rule(task, made, rule), **_of_rule(rule, given, rule_options)}
    batch_size = given.get("batch_size", 0)
    check_integer("batch_size", batch_size, 0)
    case = Case(task, made, kind, int(batch_size), str(given.get("cell", SEQUENCE["cell"])))
    of_rules = _only_of_rules()
    values = {name: value for name, value in starting_values(case).items() if name not in of_rules}
    if preset != "default":
        values |= _preset(preset, case)
    of_preset = {name: values.pop(name) for name in task_names.task_options() if name in values}
    if of_preset:
        made = task_names.make_task(task, {**of_preset, **for_task})
    values = _merged(with_optimizer(values, given.get("optimizer"), case), given)
    if "std" in for_rule and values["init"] != "torch":
        raise ConfigError(f"std is that of init=torch, got std={for_rule['std']}, init={values['init']}")
    start = values.pop("rule", None)
    try:
        values["rule"] = rule_names.make_rule(kind, for_rule) if start is None else replace(start, **for_rule)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Config(**{**values, "task": made, "preset": preset})


def _merged(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return a preset's values with those given, and what follows from them."""
    rates = {name: values.get(name, values["lr"]) for name in ("head_lr", "reverse_lr")}
    if "lr" in given:
        rates["head_lr"] = given["lr"]
    duration: dict[str, Any] = {}
    if "epochs" in given:
        duration["iterations"] = None
    elif "iterations" in given:
        duration["epochs"] = None
    merged = {**values, **rates, **duration, **given}
    return {"nesterov": merged["optimizer"] == "sgd" and merged["momentum"] != 0, **merged}


def _of_task(task: str, given: dict[str, Any], own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Take the options of the task out of those given."""
    if own and task in TASKS:
        raise ConfigError("task_options belong to a task of your own, ours have options of their own names")
    found = {name: given.pop(name) for name in task_names.task_options() if name in given}
    if found and task not in TASKS:
        task_names.find_task(task)  # a name that is none comes first
        name, value = next(iter(found.items()))
        raise ConfigError(
            f"{name} does not belong to {task}, whose options are task_options: --task-options {name}={value}"
        )
    if "data_dir" in given and "data_dir" in task_names.find_task(task).options:
        found["data_dir"] = given["data_dir"]
    return {**found, **(own or {})}


def _defaults_of_rule(name: str, task: Task, rule: str) -> dict[str, Any]:
    """Return what a task's defaults say of this rule's options; those of other rules are passed over."""
    of_rules = _only_of_rules()
    known = of_rules | get_type_hints(Config).keys() - {"task", "rule", "preset"}
    for option in task.defaults:
        if option not in known:
            near = did_you_mean(option, known)
            raise ConfigError(f"defaults of task {name} must be of options of a run or a rule, got {option!r}{near}")
    of_it = of_rules & {*rule_names.rule_options(rule)} if rule in RULES else set()
    return {option: value for option, value in task.defaults.items() if option in of_it}


@functools.cache
def _only_of_rules() -> frozenset[str]:
    """The options of the package's rules that are no fields of a configuration."""
    return frozenset(one for rule in RULES for one in rule_names.rule_options(rule)) - get_type_hints(Config).keys()


def _of_rule(rule: str, given: dict[str, Any], own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Take the options of the rule out of those given."""
    if own and rule in RULES:
        raise ConfigError("rule_options belong to a rule of your own, ours have options of their own names")
    known = rule_names.rule_options(rule)
    of_rules = {option for name in RULES for option in rule_names.rule_options(name)}
    for name in given:
        if name not in of_rules and name not in get_type_hints(Config):
            raise ConfigError(f"unknown option {name}{did_you_mean(name, {*of_rules, *get_type_hints(Config)})}")
        if name in of_rules and name not in known:
            if rule in RULES:
                options = f"options of that rule: {', '.join(known) or 'none'}"
            else:
                own_fields = ", ".join(field.name for field in fields(find_rule(rule)))
                options = f"its own go into rule_options: {own_fields or 'it has none'}"
            raise ConfigError(f"{name} does not belong to rule={rule} ({options})")
    return {**{name: given.pop(name) for name in known if name in given and name != "reverse_lr"}, **(own or {})}


def _preset(name: str, case: Case) -> dict[str, Any]:
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of default, {', '.join(PRESETS)}, got {name!r}")
    found = PRESETS[name].values(case)
    if found is None:
        options = "".join(f", {option}={value}" for option, value in task_names.options_of(case.task).items())
        known = ", ".join(["default", *presets_of(case)])
        cell = f", cell={case.cell}" if case.task.length is not None else ""
        raise ConfigError(
            f"no settings were published for preset={name}, task={case.name}{options}{cell}, "
            f"rule={rule_names.name_of(case.rule)} (presets there: {known})"
        )
    return found


def _check_rule(name: str, task: Task, kind: type[Rule]) -> None:
    """Raise ConfigError unless a rule is for the network of a task."""
    sequence = task.length is not None
    base, rules = ("RecurrentRule", SEQUENCE_RULES) if sequence else ("LayerRule", LAYER_RULES)
    if ("recurrent" if sequence else "layer") not in kind.kinds:
        raise ConfigError(
            f"rule={rule_names.name_of(kind)} does not belong to {name} (rules of that task: {', '.join(rules)}; one "
            f"of your own subclasses tpext.rules.{base}){_why_feed_forward(task)}"
        )
