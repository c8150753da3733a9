"""The names that rules have on the command line: those of our classes, and the import path of a user's."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import tpext.rules
from tpext.experiments.checks import ConfigError
from tpext.rules import Rule
from tpext.rules.base import Kind


def _kebab(name: str) -> str:
    """Return a class's name as it is on the command line.

    >>> _kebab("RegularizedInverse")
    'regularized-inverse'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def _named(kind: Kind) -> dict[str, type[Rule]]:
    """All rules of the package for a kind of layer, by their names."""
    classes: list[Any] = [getattr(tpext.rules, name) for name in tpext.rules.__all__]
    rules = [one for one in classes if inspect.isclass(one) and issubclass(one, Rule) and not inspect.isabstract(one)]
    return {_kebab(one.__name__): one for one in rules if kind in one.kinds}


SEQUENCE_RULES = _named("recurrent")
"""The rules of the sequence tasks."""

LAYER_RULES = _named("layer")
"""The rules of the feed-forward tasks."""

DEFAULT_RULE, DEFAULT_LAYER_RULE = "regularized-inverse", "regularized-least-squares"

RULES = {**SEQUENCE_RULES, **LAYER_RULES}

FORMER_NAMES = {
    "regularized": "regularized-inverse",
    "learned": "learned-inverse",
    "constrained": "constrained-least-squares",
    "dtp": "difference-target-propagation",
}
"""What rules were called in earlier versions."""

# Rules of users, by the import path they were named by.
_OWN: dict[str, type[Rule]] = {}


def find_rule(name: str) -> type[Rule]:
    """Return the class of a rule.

    Args:
        name: one of :data:`RULES`, or where a rule of a user's own stands: ``module:Class`` or ``file.py:Class``.

    Raises:
        ConfigError: there is none, or it cannot be imported.

    >>> find_rule("tpext.rules:RegularizedInverse").__name__
    'RegularizedInverse'
    """
    if name in RULES:
        return RULES[name]
    if name not in _OWN:
        place, _, attribute = str(name).rpartition(":")
        if not place or not attribute:
            former = f"; {name} is called {FORMER_NAMES[name]} now" if name in FORMER_NAMES else ""
            raise ConfigError(
                f"rule must be one of {', '.join(RULES)}, or module:Class or file.py:Class for one of your own, "
                f"got {name!r}{former}"
            )
        kind = getattr(_import(name, place), attribute, None)
        if not isinstance(kind, type) or not issubclass(kind, Rule) or not kind.kinds & {"recurrent", "layer"}:
            raise ConfigError(
                f"rule {name}: {attribute} must be a class that subclasses tpext.rules.RecurrentRule or LayerRule, "
                f"got {kind!r}"
            )
        _OWN[name] = kind
    return _OWN[name]


def _import(name: str, place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            # A console script, other than `python -m`, does not look in the current folder. Only for this import: what
            # stays in the path, processes that are started later inherit.
            sys.path.insert(0, str(Path.cwd()))
            try:
                return importlib.import_module(place)
            finally:
                sys.path.remove(str(Path.cwd()))
        path = Path(place).resolve()
        spec = importlib.util.spec_from_file_location(f"_rule_of_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses and pickle look for it
        spec.loader.exec_module(module)
        return module
    # whatever a user's file raises
    except Exception as error:
        raise ConfigError(f"rule {name}: {place} cannot be imported: {type(error).__name__}: {error}") from error


def name_of(kind: type[Rule]) -> str:
    """Return the name under which a rule is found.

    Raises:
        ConfigError: it was not found by a name.
    """
    for names in (RULES, _OWN):
        for name, one in names.items():
            if one is kind:
                return name
    raise ConfigError(f"rule {kind.__name__} has no name here: find_rule must find it first")


def rule_options(name: str) -> tuple[str, ...]:
    """Return the options that a rule has: its fields, and ``reverse_lr`` if it learns."""
    kind = find_rule(name)
    own = tuple(field.name for field in fields(kind))
    return (*own, "reverse_lr") if kind.learns else own


def parse_options(name: str, texts: tuple[str, ...]) -> dict[str, object]:
    """Return the values of options of a user's rule that are given as ``NAME=VALUE``, by the types of its fields.

    Raises:
        ConfigError: no such option, or a text that is no value of it.

    >>> parse_options("regularized-inverse", ("reg=10", "normalize=false"))
    {'reg': 10.0, 'normalize': False}
    """
    kinds = {field.name: str(getattr(field.type, "__name__", field.type)) for field in fields(find_rule(name))}
    readers: dict[str, Callable[[str], object]] = {
        "float": float,
        "int": int,
        "str": str,
        "bool": lambda value: {"true": True, "false": False}[value.lower()],
    }
    values: dict[str, object] = {}
    for text in texts:
        option, separator, value = text.partition("=")
        if not separator or option not in kinds:
            raise ConfigError(f"rule_options must be NAME=VALUE of {', '.join(kinds) or 'none'}, got {text!r}")
        if kinds[option] not in readers:
            raise ConfigError(f"{option} of rule {name} is a {kinds[option]}, which cannot be given as a text")
        try:
            values[option] = readers[kinds[option]](value)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{option} of rule {name} must be a {kinds[option]}, got {value!r}") from error
    return values
