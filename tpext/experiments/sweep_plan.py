"""The runs of a sweep: all combinations of what its options take, each a configuration with a name.

A *grid* has by its option's name (``lr``) the words of each value, as they stand on the command line of ``tpext
train``: ``{"lr": [["0.001"], ["0.01"]], "sizes": [["64", "64"]]}``. That command's own parser reads them. Options of a
user's task or rule are ``rule_options.NAME``, with the word ``NAME=VALUE``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args, get_type_hints

import tyro
import yaml

from tpext.experiments import rule_names
from tpext.experiments.config import Config, make_config
from tpext.experiments.image_commands import TrainImages
from tpext.experiments.image_defaults import make_image_config
from tpext.experiments.images import ImageConfig
from tpext.experiments.options import Switch, metavar
from tpext.experiments.settings import FREE_FIELDS, ConfigError, of_text
from tpext.experiments.sweep_values import expand
from tpext.experiments.task_names import find_task
from tpext.experiments.train_command import Train

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Words: TypeAlias = tuple[str, ...]
Grid: TypeAlias = Mapping[str, Sequence[Words]]
AnyConfig: TypeAlias = Config | ImageConfig
T = TypeVar("T")

IMAGES = "images"
"""What stands in a task's place where ``tpext train images`` is swept."""
OWN = ("task_options", "rule_options")
PATHS = ("data_dir", "file")
"""Options whose commas and dots are a path's."""
NAMES = ("rule", "dataset")
"""Options that may hold paths among others: a space does not part them."""
NOT_SWEPT = ("out", "resume")
"""Options of ``tpext train`` that a sweep has no use for: each run has a folder of its own, and resumes."""
OF_RECIPES = ("title", "panel", "label", "select", "axes", "quick")
"""What a file may have besides, for ``tpext reproduce``."""
FILES = (".toml", ".yaml", ".yml")
"""Suffixes of the files of sweeps and recipes."""
NAME_LENGTH = 150


@dataclass(frozen=True)
class Planned:
    """A run of a sweep.

    Attributes:
        name: of its folder: the values of the options that the sweep varies.
        config: its configuration; of one thread, where the options say nothing of it.
    """

    name: str
    config: AnyConfig


def grid_of_arguments(arguments: Sequence[str]) -> dict[str, list[Words]]:
    """Return the grid of a command line's options.

    Raises:
        ConfigError: it is none, or an option stands there twice.

    >>> grid_of_arguments(["--lr", "1e-3,1e-2", "--sizes", "64", "64"])
    {'lr': [('1e-3',), ('1e-2',)], 'sizes': [('64', '64')]}
    """
    return grid_of_options(options_of_arguments(arguments))


def options_of_arguments(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the options of a command line, each with its words.

    Raises:
        ConfigError: a word stands before any option.
    """
    options: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if re.match(r"--[a-zA-Z]", argument):
            name, separator, value = argument[2:].partition("=")
            options.append((name.replace("-", "_"), [value] if separator else []))
        elif options:
            options[-1][1].append(argument)
        else:
            raise ConfigError(f"an option must come before {argument!r}")
    return options


def grid_of_options(options: Sequence[tuple[str, Sequence[str]]]) -> dict[str, list[Words]]:
    """Return the grid of options and their words.

    Raises:
        ConfigError: an option stands there twice, or is none of a sweep's runs.
    """
    grid: dict[str, list[Words]] = {}
    for name, words in options:
        _add(grid, name, words)
    return grid


def grid_of_table(table: Mapping[str, Any]) -> dict[str, list[Words]]:
    """Return the grid of a file's table: values, texts as on the command line, and lists of values to vary.

    Raises:
        ConfigError: a value is of no such kind.

    >>> grid_of_table({"lr": [1e-3, 1e-2], "seed": "1..3", "sizes": [[64, 64]]})
    {'lr': [('0.001',), ('0.01',)], 'seed': [('1',), ('2',), ('3',)], 'sizes': [('64', '64')]}
    """
    grid: dict[str, list[Words]] = {}
    for key, value in table.items():
        name = str(key).replace("-", "_")
        if name in OWN and isinstance(value, Mapping):
            for option, of_it in value.items():
                values = _words_of(f"{name}.{option}", of_it)
                grid[f"{name}.{option}"] = [(f"{option}={' '.join(words)}",) for words in values]
        elif isinstance(value, str):
            _add(grid, name, [value])
        else:
            _check_swept(name)
            grid[name] = _words_of(name, value)
    return grid


def read_file(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the task and the grids of a sweep's file.

    Raises:
        ConfigError: it cannot be read, or has no task.
    """
    values = load_file(path)
    grids = [{**values, **grid} for grid in values.pop("grid")]
    return values["task"], [grid_of_table(options_of_file(grid)) for grid in grids]


def options_of_file(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a file's values are options of its runs."""
    return {name: value for name, value in values.items() if name not in ("task", "grid", *OF_RECIPES)}


def load_file(path: Path) -> dict[str, Any]:
    """Return what a sweep's file has: a task, options, and ``grid``, at least one table of options.

    Raises:
        ConfigError: it cannot be read, or has no task.
    """
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping) or not isinstance(values.get("task"), str):
        raise ConfigError(f"{path} must have a task, and options beside it")
    tables = values.get("grid", [{}])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, Mapping) for table in tables):
        raise ConfigError(f"{path}: grid must be tables of options, [[grid]], got {tables!r}")
    return {**values, "grid": tables}


def _words_of(name: str, value: Any) -> list[Words]:
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"{name} must have a value, got an empty list")
        return [
            words for one in value for words in ([_row(name, one)] if isinstance(one, list) else _words_of(name, one))
        ]
    return _words_of_text(name, value) if isinstance(value, str) else [_row(name, [value])]


def _words_of_text(name: str, text: str) -> list[Words]:
    if name in PATHS:
        return [(text,)]
    whole = name in NAMES or "." in name
    return [(value,) if whole else tuple(value.split()) for value in expand(name, text)]


def _row(name: str, values: list[Any]) -> Words:
    for value in values:
        if not isinstance(value, (bool, int, float, str)):
            raise ConfigError(f"{name} must be numbers, texts, or lists of them, got {value!r}")
    return tuple(repr(value) if isinstance(value, float) else str(value) for value in values)


def _add(grid: dict[str, list[Words]], name: str, words: Sequence[str]) -> None:
    """Add an option to a grid, with all values that its words stand for."""
    _check_swept(name)
    if name in OWN:
        for word in words:
            option, _, value = word.partition("=")
            grid[f"{name}.{option}"] = [(f"{option}={one}",) for one in expand(f"{name}.{option}", value)]
        return
    if name in grid:
        raise ConfigError(f"{name} must be given once, with commas between its values")
    grid[name] = _words_of_text(name, " ".join(words)) if words else [()]


def _check_swept(name: str) -> None:
    if name in NOT_SWEPT:
        raise ConfigError(f"{name} is no option of a sweep's runs: each has a folder of its own, and resumes")


def plan(task: str, grids: Sequence[Grid]) -> tuple[list[Planned], list[str]]:
    """Return the runs of a sweep, those of the first grid first, each of them once, and the options that vary.

    An option of one rule is left out where another of the grid's rules has no such option.

    Args:
        task: as ``tpext train`` has it, or "images".
        grids: what is varied.

    Raises:
        ConfigError: a combination is no run; names it.
    """
    for grid in grids:
        for name in FREE_FIELDS:
            if len(grid.get(name, ())) > 1:
                raise ConfigError(f"{name} must be one value, as runs that differ in it alone compute the same")
    combined = [combination for grid in grids for combination in _combinations(task, grid)]
    varied = [
        name
        for name in dict.fromkeys(name for combination in combined for name in combination)
        if len({combination.get(name) for combination in combined}) > 1
    ]
    runs: dict[str, Planned] = {}
    made = set()
    for combination in combined:
        label = ",".join(_label(name, combination[name]) for name in varied if name in combination)
        try:
            config = _config(task, combination)
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}" if label else str(error)) from error
        key = identity(config)
        if key in made:  # the same numbers, written in two ways
            continue
        made.add(key)
        name = _folder_name(label or "run")
        if name in runs:
            name = _folder_name(f"{label} {key}", unique=True)
        runs[name] = Planned(name, config)
    return list(runs.values()), varied


def with_options(task: str, grids: Sequence[Grid], given: Grid) -> list[Grid]:
    """Return grids with options in place of their own, but for those that only rules of other grids have.

    Args:
        task: as ``tpext train`` has it, or "images".
        grids: of a file.
        given: of the command line.
    """
    rules = [options_of_rules(task, {**grid, **given}) for grid in grids]
    every = set().union(*(options for of_grid in rules for options in of_grid.values()))
    return [
        # a grid that names no rule leaves it to the task
        {**grid, **(_without(every - set().union(*of_grid.values()), given) if of_grid else given)}
        for grid, of_grid in zip(grids, rules, strict=True)
    ]


def options_of_rules(task: str, grid: Grid) -> dict[str, set[str]]:
    """Return the rules that a grid names, each with its options."""
    found: dict[str, set[str]] = {}
    if task != IMAGES:
        for name in [words[0] for words in grid.get("rule", ()) if words]:
            kind = rule_names.find_rule(name)
            own = {f"rule_options.{field.name}" for field in fields(kind)} if rule_names.is_own(kind) else set()
            found[name] = {*rule_names.rule_options(name), *own}
    return found


def of_one_rule(rule: str, of_rules: Mapping[str, set[str]], given: Mapping[str, T]) -> dict[str, T]:
    """Return options without those that others of the rules have, and this one does not."""
    return _without(set().union(*of_rules.values()) - of_rules[rule], given)


def _without(names: set[str], given: Mapping[str, T]) -> dict[str, T]:
    return {name: value for name, value in given.items() if name not in names}


def identity(config: AnyConfig) -> str:
    """Return what runs share only if they compute the same."""
    values = {name: value for name, value in config.to_dict().items() if name not in FREE_FIELDS}
    return json.dumps(values, sort_keys=True)


def _combinations(task: str, grid: Grid) -> Iterator[dict[str, Words]]:
    """All combinations, the last option's values fastest."""
    of_rules = options_of_rules(task, grid)
    seen = set()
    for values in itertools.product(*grid.values()):
        combination = dict(zip(grid, values, strict=True))
        if len(of_rules) > 1:
            combination = of_one_rule(combination["rule"][0], of_rules, combination)
        key = tuple(combination.items())
        if key not in seen:
            seen.add(key)
            yield combination


def _label(name: str, words: Words) -> str:
    """What a value is called in names of folders.

    >>> _label("lr", ("1e-3",)), _label("rule_options.scale", ("scale=2",)), _label("rule", ("mine.py:Mine",))
    ('lr=1e-3', 'scale=2', 'rule=Mine')
    """
    if "." in name:
        return words[0]
    return f"{name}={'-'.join(word.rpartition(':')[2] for word in words)}" if words else name


def _folder_name(label: str, unique: bool = False) -> str:
    """A label as a name that every file system takes, with a number of its own where it is long or must be unique."""
    name = re.sub(r"[^\w.,=+-]", "_", label, flags=re.ASCII)
    if len(name) <= NAME_LENGTH and not unique:
        return name
    return f"{name[:NAME_LENGTH]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _config(task: str, combination: Mapping[str, Words]) -> AnyConfig:
    given: dict[str, Any] = {}
    rule = combination.get("rule")
    for name, words in combination.items():
        group, dot, _ = name.partition(".")
        of_it = _given(task, group if dot else name, words, rule if group == "rule_options" else None)
        for key, value in of_it.items():
            given[key] = {**given.get(key, {}), **value} if isinstance(value, Mapping) else value
    config: AnyConfig = make_image_config(**given) if task == IMAGES else make_config(task, **given)
    # workers may run elsewhere, and share the cores
    data_dir = None if config.data_dir is None else str(Path(config.data_dir).absolute())
    return replace(config, data_dir=data_dir, threads=config.threads or 1)


@cache
def _given(task: str, name: str, words: Words, rule: Words | None) -> dict[str, Any]:
    """What the words of one option give, as the training command reads them."""
    command: Any = TrainImages() if task == IMAGES else Train(task=task)
    value = _read(task, name, words)
    if value is False:  # of a switch, which a command line leaves out
        return {name: False}
    of_rule = {} if rule is None else {"rule": rule[0]}
    given: dict[str, Any] = replace(command, **{name: value}, **of_rule).given()
    for other in {"task", *of_rule}:
        given.pop(other, None)
    return given


def _read(task: str, name: str, words: Words) -> Any:
    """The value of an option of the training command; only that option is parsed, as all of them take 100 ms."""
    command, prog, before = (
        (TrainImages, "tpext train images", []) if task == IMAGES else (Train, "tpext train", [task])
    )
    hint = _hints(command).get(name)
    if hint == Switch:
        hint, words = bool | None, words or ("True",)
    default: Any = field(default=() if name in OWN else None)
    parser = command if hint is None else make_dataclass(command.__name__, [(name, hint, default)])
    arguments = [*(before if hint is None else []), f"--{name.replace('_', '-')}", *words]
    return getattr(tyro.cli(parser, args=arguments, prog=prog), name)


def takes_real(task: str, name: str, rules: Sequence[str] = ()) -> bool:
    """Return whether an option of ``tpext train`` is known to take numbers with a fraction.

    Args:
        task: as ``tpext train`` has it, or "images".
        name: of the option; ``rule_options.NAME`` and ``task_options.NAME`` are those of a user's class.
        rules: which such options may belong to.
    """
    group, dot, option = name.partition(".")
    if dot and task == IMAGES:  # whose rules have names of their own
        return False
    if dot:
        kinds = [find_task(task).kind] if group == "task_options" else [rule_names.find_rule(rule) for rule in rules]
        return any(of_text(get_type_hints(kind).get(option)) in (float, float | None) for kind in kinds)
    hint = _hints(TrainImages if task == IMAGES else Train).get(name)
    return hint is not None and "FLOAT" in metavar(get_args(hint)[0])


@cache
def _hints(command: Any) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(command, include_extras=True).items() if name != "task"}
