"""The names that rules have on the command line: those of our classes, and the import path of a user's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

import tpext.rules
from tpext._names import did_you_mean
from tpext.experiments.own import find_own, is_path, place_of
from tpext.experiments.settings import ConfigError
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


def find_rule(name: str, folder: str | None = None) -> type[Rule]:
    """Return the class of a rule.

    Args:
        name: one of :data:`RULES`, or where a rule of a user's own stands: ``module:Class`` or ``file.py:Class``.
        folder: where that was typed; None is the working directory.

    Raises:
        ConfigError: there is none, or it cannot be imported.

    >>> find_rule("tpext.rules:RegularizedInverse").__name__
    'RegularizedInverse'
    """
    if name in RULES:
        return RULES[name]
    if not is_path(name):
        raise ConfigError(
            f"rule must be one of {', '.join(RULES)}, or module:Class or file.py:Class for one of your own, "
            f"got {name!r}{did_you_mean(name, RULES, FORMER_NAMES)}"
        )
    return find_own_rule(name, {"recurrent": "RecurrentRule", "layer": "LayerRule"}, folder)


def find_own_rule(name: str, bases: Mapping[Kind, str], folder: str | None = None) -> type[Rule]:
    """Return the class of a user's rule.

    Args:
        name: where it stands.
        bases: the kinds that it may be for, and the protocols of these, for errors.
        folder: see :func:`find_rule`.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    kind = find_own("rule", name, folder)
    if not isinstance(kind, type) or not issubclass(kind, Rule) or not kind.kinds & set(bases):
        raise ConfigError(
            f"rule {name}: {name.rpartition(':')[2]} must be a class that subclasses "
            f"tpext.rules.{' or '.join(bases.values())}, got {kind!r}"
        )
    return kind


def name_of(kind: type[Rule]) -> str:
    """Return the name under which a rule is found.

    Raises:
        ConfigError: it was not found by a name.
    """
    for name, one in RULES.items():
        if one is kind:
            return name
    place = place_of(kind)
    if place is None:
        raise ConfigError(f"rule {kind.__name__} has no name here: find_rule must find it first")
    return place.name


def is_own(kind: type[Rule]) -> bool:
    """Whether a rule is a user's, whose options have a name space of their own."""
    return kind not in RULES.values()


def rule_options(name: str) -> tuple[str, ...]:
    """Return the options of a rule that stand among those of a run: its fields, and ``reverse_lr`` if it learns."""
    kind = find_rule(name)
    own = () if is_own(kind) else tuple(field.name for field in fields(kind))
    return (*own, "reverse_lr") if kind.learns else own


def make_rule(kind: type[Rule], options: Mapping[str, object]) -> Any:
    """Return a user's rule.

    Raises:
        ConfigError: an option that it does not have, one out of its range, or a field without a default.
    """
    name, known = name_of(kind), [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise ConfigError(f"{option} does not belong to rule={name} (rule_options: {', '.join(known) or 'none'})")
    needed = [field.name for field in fields(kind) if field.default is field.default_factory is MISSING and field.init]
    if missing := [field for field in needed if field not in options]:
        raise ConfigError(
            f"rule {name}: every field must have a default or be in rule_options, got neither for {', '.join(missing)}"
        )
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"rule {name}: {error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Return plain values, as config.json holds them."""
    place = place_of(type(rule))
    return {"name": name_of(type(rule)), "options": asdict(rule), **({} if place is None else {"folder": place.folder})}


def rule_from_dict(values: Mapping[str, Any]) -> Any:
    """Return the rule that :func:`rule_to_dict` wrote.

    Raises:
        ConfigError: there is no such rule.
        KeyError, TypeError, ValueError: other values than were written.
    """
    return find_rule(values["name"], values.get("folder"))(**values["options"])
