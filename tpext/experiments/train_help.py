"""The help of ``tpext train TASK``: the options of that task and of its rules, with the values that they have there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from tpext.experiments import rule_names, task_names
from tpext.experiments.config import Config, check_rule
from tpext.experiments.defaults import starting_values
from tpext.experiments.field_help import help_of
from tpext.experiments.options import DEFAULT, Option, command
from tpext.experiments.presets import PRESETS, Case, presets_of
from tpext.experiments.rule_names import DEFAULT_LAYER_RULE, DEFAULT_RULE, LAYER_RULES, SEQUENCE_RULES
from tpext.experiments.settings import of_text
from tpext.experiments.train_command import BaseTrain
from tpext.rules import Rule
from tpext.tasks import Task

_WITH_EPOCHS = ("epochs", "schedule")


def asked_for(arguments: Sequence[str]) -> tuple[str, str | None] | None:
    """Return the task, and the rule if there is one, that ``tpext train`` is asked to help with; None if with none.

    >>> asked_for(["adding", "--rule", "backprop", "--help"])
    ('adding', 'backprop')
    >>> asked_for(["--help"])
    """
    if not arguments or arguments[0].startswith("-") or not {"-h", "--help"} & {*arguments}:
        return None
    words = [word for argument in arguments for word in argument.split("=", 1)]
    rule = words[words.index("--rule") + 1] if "--rule" in words[:-1] else None
    return arguments[0], rule


def command_for(name: str, rule: str | None = None) -> Any:
    """Return the command with the options of one task, and of one rule or of all that train it.

    Raises:
        ConfigError: there is no such task or rule, or they do not go together.
    """
    task = task_names.make_task(name, {})
    rules: Mapping[str, type[Rule]] = SEQUENCE_RULES if task.length is not None else LAYER_RULES
    default = DEFAULT_RULE if task.length is not None else DEFAULT_LAYER_RULE
    own = "FILE.py:CLASS"
    known = f"{{{','.join([*rules, own])}}}"
    if rule is not None:
        rules, default = {rule: rule_names.find_rule(rule)}, rule
        check_rule(name, task, rules[rule])
    of_rules = {one: _Start(name, task, one, kind) for one, kind in rules.items()}
    options = {
        "rule": Option([str], f"What the backward pass is; {own} is one of your own.", default, known),
        "preset": _preset_option(Case(name, task, one) for one in rules.values()),
        **_own("task", type(task), task_names.is_own(task)),
        **_own("rule", rules[default], rule_names.is_own(rules[default])),
        **_task_options(task),
        **_rule_options(of_rules),
        **_run_options(task, of_rules),
    }
    hidden = {"task"}
    if "data_dir" not in task_names.entry_of(task).options:
        hidden.add("data_dir")
    hidden |= {f"{what}_options" for what in ("task", "rule")} - options.keys()
    kind = "feed-forward" if task.length is None else "recurrent"
    made = command("Train", BaseTrain, options, hidden)
    made.__doc__ = (
        f"Train a {kind} network on {name}. An option that has another value under each rule shows these. "
        "`tpext train --help` has the options of all tasks."
    )
    return made


class _Start:
    """Where the options of a run of one task under one rule start."""

    def __init__(self, name: str, task: Task, rule: str, kind: type[Rule]) -> None:
        self.kind = kind
        self.own = rule_names.is_own(kind)
        self.values = starting_values(Case(name, task, kind))
        self.rule = self.values.pop("rule", None)
        self.values.setdefault("head_lr", self.values["lr"])
        if kind.learns:
            self.values.setdefault("reverse_lr", self.values["lr"])

    def rule_value(self, field: Field[Any]) -> object:
        """Of a field of the rule; MISSING where it has no default."""
        at_first = field.default if self.rule is None else getattr(self.rule, field.name)
        return self.values.get(field.name, at_first)


def _preset_option(cases: Iterable[Case]) -> Option:
    names = dict.fromkeys(name for case in cases for name in presets_of(case))
    known = "; ".join(f"{name}: {PRESETS[name].summary}" for name in names)
    help = f"Where the options start. {known}." if known else "Where the options start; none are published for this."
    return Option([str], help, "default", f"{{{','.join(['default', *names])}}}")


def _task_options(task: Task) -> dict[str, Option]:
    if task_names.is_own(task):
        return {}
    hints, entry = get_type_hints(type(task)), task_names.entry_of(task)
    return {
        name: Option([hints[name]], field.metadata.get("help", "Of the task."), _text(field.default))
        for name, field in entry.options.items()
        if name not in task_names.NOT_OPTIONS
    }


def _rule_options(starts: Mapping[str, _Start]) -> dict[str, Option]:
    having: dict[str, dict[str, tuple[_Start, Field[Any]]]] = {}
    for rule, start in starts.items():
        for field in () if start.own else fields(start.kind):
            having.setdefault(field.name, {})[rule] = start, field
    found = {}
    for name, those in having.items():
        hints = dict.fromkeys(of_text(get_type_hints(start.kind)[name]) for start, _ in those.values())
        first = next(iter(those.values()))[0].kind
        of_which = f" (rules {', '.join(those)})" if len(starts) > 1 else ""
        values = {rule: start.rule_value(field) for rule, (start, field) in those.items()}
        found[name] = Option(hints, f"{help_of(first, name) or 'Of the rule'}{of_which}.", _by_rule(values))
    return found


def _run_options(task: Task, starts: Mapping[str, _Start]) -> dict[str, Option]:
    hints = get_type_hints(Config)
    other = "recurrent" if task.length is None else "feed-forward"
    found = {}
    for field in fields(Config):
        name, metadata = field.name, field.metadata
        if name in BaseTrain.__dataclass_fields__ or not metadata or metadata["network"] == other:
            continue
        if name in _WITH_EPOCHS and not task.has_epochs:
            continue
        values = {rule: start.values[name] for rule, start in starts.items() if name in start.values}
        if not values:  # no rule learns
            continue
        shown = metadata["default"] if set(values.values()) == {None} else None
        found[name] = Option([hints[name]], metadata["help"], shown or _by_rule(values))
    return found


def _own(what: str, kind: type[Any], own: bool) -> dict[str, Option]:
    """The option that takes those of a user's task or rule."""
    if not own:
        return {}
    lines = [
        f"{field.name}={'' if field.default is MISSING else _text(field.default)}"
        + (f" ({help})" if (help := help_of(kind, field.name)) else "")
        for field in fields(kind)
        if field.init
    ]
    help = f"Options of {kind.__name__}: {'; '.join(lines) or 'none'}."
    return {f"{what}_options": Option([tuple[str, ...]], help, "its own defaults", "NAME=VALUE ...")}


def _by_rule(values: Mapping[str, object]) -> str:
    """The value under each rule, or the one that they share."""
    shared: dict[str, list[str]] = {}
    for rule, value in values.items():
        shared.setdefault(DEFAULT if value is MISSING else _text(value), []).append(rule)
    if len(shared) == 1:
        return next(iter(shared))
    return "; ".join(f"{text} ({', '.join(rules)})" for text, rules in shared.items())


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
