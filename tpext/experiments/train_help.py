"""The help of ``tpext train TASK``: the options of that task and of its rules, with the values that they have there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import tyro

from tpext.experiments import rule_names, task_names
from tpext.experiments.config import Config, make_config
from tpext.experiments.defaults import value_text
from tpext.experiments.field_help import default_of, help_of
from tpext.experiments.options import Option, command
from tpext.experiments.own import is_path
from tpext.experiments.presets import PRESETS, Case, presets_of
from tpext.experiments.rule_names import DEFAULT_LAYER_RULE, DEFAULT_RULE, LAYER_RULES, SEQUENCE_RULES
from tpext.experiments.settings import ConfigError
from tpext.experiments.train_command import BaseTrain, Train, rule_option_of, task_option_of
from tpext.tasks import TASKS, MissingDataError

HELP = ("-h", "--help")
_WITH_EPOCHS = ("epochs", "schedule")
_OWN = "FILE.py:CLASS"
_RULES = dict.fromkeys([DEFAULT_RULE, DEFAULT_LAYER_RULE, *SEQUENCE_RULES, *LAYER_RULES])
"""By name, each kind's default first."""


def asks(arguments: Sequence[str]) -> bool:
    """Return whether ``tpext train`` is asked for help on a task.

    >>> asks(["adding", "--rule", "backprop", "--help"]), asks(["--help"])
    (True, False)
    """
    return bool(arguments) and not arguments[0].startswith("-") and any(word in HELP for word in arguments)


def command_for(arguments: Sequence[str]) -> Any:
    """Return the command with the options that go with a task and the other words of its command line.

    Args:
        arguments: those of ``tpext train``; the values that options start from are those that such a run has.

    Raises:
        ConfigError: there is no such task or rule, or no run has these options.
    """
    asked = tyro.cli(Train, args=[word for word in arguments if word not in HELP], prog="tpext train")
    entry = task_names.find_task(asked.task)  # before anything that says less
    try:
        configs = _configs(asked)
    except (MissingDataError, OSError, ConfigError) as error:
        # a user's data may not be there yet
        if asked.task in TASKS:
            raise
        made = command("Train", BaseTrain, _own("task", entry.kind), hidden={"task"})
        made.__doc__ = f"Train a network on {asked.task}, whose other options depend on its data: {error}."
        return made
    default, config = next(iter(configs.items()))
    rules = [*(configs if len(configs) > 1 else LAYER_RULES if config.feed_forward else SEQUENCE_RULES), _OWN]
    options = {
        "rule": Option([str], f"What the backward pass is; {_OWN} is one of your own.", default, _choices(rules)),
        "preset": _preset_option(asked.task, configs),
        **(_own("task", entry.kind) if task_names.is_own(config.task) else _task_options(config)),
        **(_own("rule", type(config.rule)) if rule_names.is_own(type(config.rule)) else _rule_options(configs)),
        **_run_options(configs),
    }
    hidden = {"task", *({"task_options", "rule_options"} - options.keys())}
    if "data_dir" not in entry.options:
        hidden.add("data_dir")
    made = command("Train", BaseTrain, options, hidden)
    kind = "feed-forward" if config.feed_forward else "recurrent"
    several = " An option that has another value under each rule shows these." * (len(configs) > 1)
    all_options = "`tpext train --help` has the options of all tasks."
    made.__doc__ = f"Train a {kind} network on {asked.task}.{several} {all_options}"
    return made


def typed_alone(arguments: Sequence[str]) -> list[str]:
    """Return what to say of options of a user's task or rule that were typed as if they were the command's.

    Args:
        arguments: those of ``tpext train``.
    """
    names = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")}
    known, lines = {field.name for field in fields(Train)}, []
    values = dict(itertools.pairwise(arguments))
    values |= dict(word.split("=", 1) for word in arguments if word.startswith("--rule="))
    for what, name in (("task", arguments[0] if arguments else ""), ("rule", values.get("--rule", ""))):
        if not is_path(name):
            continue
        with contextlib.suppress(ConfigError):
            kind: type[Any] = task_names.find_task(name).kind if what == "task" else rule_names.find_rule(name)
            own = [field.name for field in fields(kind) if field.init and field.name in names - known]
            lines += [f"{one} is an option of {what} {name}: --{what}-options {one}=VALUE" for one in own]
    return lines


def _configs(asked: Any) -> dict[str, Config]:
    """The runs that a command line may mean, by their rules, the default one first.

    Raises:
        ConfigError: there is none.
    """
    given = asked.given()
    found: dict[str, Config] = {}
    first = None
    for rule in [given.pop("rule")] if "rule" in given else _RULES:
        try:
            found[rule] = make_config(**given, rule=rule)
        except ConfigError as error:
            first = first or error
    if not found:
        assert first is not None
        raise first
    return found


def _choices(names: Sequence[str]) -> str:
    return f"{{{','.join(names)}}}"


def _preset_option(task: str, configs: Mapping[str, Config]) -> Option:
    names: dict[str, None] = {}
    for config in configs.values():
        case = Case(task, config.task, type(config.rule), config.batch_size, config.cell or "rnn")
        names |= dict.fromkeys(presets_of(case))
    known = "; ".join(f"{name}: {PRESETS[name].summary}" for name in names)
    help = f"Where the options start. {known}." if known else "Where the options start; none are published for this."
    return Option([str], help, "default", _choices(["default", *names]))


def _task_options(config: Config) -> dict[str, Option]:
    values = task_names.options_of(config.task)
    return {name: task_option_of(name, [config.task_name], _text(value)) for name, value in values.items()}


def _rule_options(configs: Mapping[str, Config]) -> dict[str, Option]:
    having: dict[str, dict[str, object]] = {}
    for rule, config in configs.items():
        for field in fields(config.rule):
            having.setdefault(field.name, {})[rule] = getattr(config.rule, field.name)
    return {name: rule_option_of(name, list(values), _by_rule(values)) for name, values in having.items()}


def _run_options(configs: Mapping[str, Config]) -> dict[str, Option]:
    config = next(iter(configs.values()))
    hints, shown = get_type_hints(Config), [one.options() for one in configs.values()]
    other = "recurrent" if config.feed_forward else "feed-forward"
    found = {}
    for field in fields(Config):
        name, metadata = field.name, field.metadata
        if name in BaseTrain.__dataclass_fields__ or not metadata or metadata["network"] == other:
            continue
        if name in _WITH_EPOCHS and not config.task.has_epochs:
            continue
        values = {rule: of_it[name] for rule, of_it in zip(configs, shown, strict=True) if name in of_it}
        # reverse_lr, where no rule learns
        if values:
            default = metadata["default"] if {*values.values()} == {None} else None
            found[name] = Option([hints[name]], metadata["help"], default or _by_rule(values))
    return found


def _own(what: str, kind: type[Any]) -> dict[str, Option]:
    """The option that takes those of a user's task or rule."""
    lines = []
    for field in fields(kind):
        if field.init:
            default = default_of(field)
            text = field.name if default is MISSING else f"{field.name}={_text(default)}"
            help = help_of(kind, field.name)
            lines.append(f"{text} ({help.rstrip('.')})" if help else text)
    help = f"Options of {kind.__name__}: {'; '.join(lines) or 'none'}."
    return {f"{what}_options": Option([tuple[str, ...]], help, "its own defaults", "NAME=VALUE ...")}


def _by_rule(values: Mapping[str, object]) -> str:
    """The value under each rule, or the one that they share."""
    shared: dict[str, list[str]] = {}
    for rule, value in values.items():
        shared.setdefault(_text(value), []).append(rule)
    if len(shared) == 1:
        return next(iter(shared))
    return "; ".join(f"{text} ({', '.join(rules)})" for text, rules in shared.items())


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else value_text(value)
