"""The options of the training commands, derived from the fields of configurations, tasks and rules."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from tpext.experiments.loop import DivergedError
from tpext.experiments.settings import choices_of

DEFAULT = "the preset's"


def option(metavar: str, default: str = DEFAULT, help: str | None = None) -> Any:
    """How an option that may be left out shows in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})", help=help)


Integer = Annotated[int | None, option("INT")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
DataFolder = Annotated[Path | None, option("DIR", "$TPEXT_DATA or the cache folder")]
OwnOptions = Annotated[
    tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, option("NAME=VALUE ...", "its own defaults")
]
"""Of a user's task or rule, several times or together."""


def metavar(hint: Any) -> str:
    """Return how the values of an annotation show.

    >>> from typing import Literal
    >>> metavar(Literal["pre", "post"] | None), metavar(tuple[int, ...] | None), metavar(tuple[float, float])
    ('{pre,post}', 'INT [INT ...]', 'FLOAT FLOAT')
    """
    if choices := choices_of(hint):
        return f"{{{','.join(map(str, choices))}}}"
    kind = next(one for one in get_args(hint) if one is not NoneType) if NoneType in get_args(hint) else hint
    if get_origin(kind) is tuple:
        one, *more = map(metavar, (part for part in get_args(kind) if part is not ...))
        return " ".join([one, *more]) if more else f"{one} [{one} ...]"
    return {bool: "{True,False}", int: "INT", float: "FLOAT"}.get(kind, "TEXT")


class Option:
    """An option of a command, from fields of one or more classes that have it.

    Args:
        hints: the annotations of the fields; choices are put together.
        help: its line of help.
        default: what is shown.
        values: how its values show, if not as the annotations have it.
    """

    def __init__(self, hints: Iterable[Any], help: str, default: str, values: str | None = None) -> None:
        self.hint = functools.reduce(operator.or_, hints) | None
        self.help, self.default, self.values = help, default, values

    def field(self, name: str) -> tuple[str, Any, Any]:
        """Return it as a field of a command's dataclass."""
        shown = option(self.values or metavar(self.hint), self.default, self.help)
        return name, Annotated[self.hint, shown], field(default=None)


def options_of(
    config: type[Any], skipped: Iterable[str], default: Callable[[str], str | None] = lambda name: None
) -> dict[str, Option]:
    """Return the options that are the fields of a configuration.

    Args:
        config: its class, whose fields have their help.
        skipped: fields that are not options, or options of another form.
        default: returns what is shown as the default of a field that does not say it; None is "the preset's".
    """
    hints = get_type_hints(config)
    return {
        one.name: Option(
            [hints[one.name]], one.metadata["help"], one.metadata["default"] or default(one.name) or DEFAULT
        )
        for one in fields(config)
        if one.name not in skipped and one.metadata
    }


def command(name: str, base: type[Any], options: Mapping[str, Option], hidden: Iterable[str] = ()) -> Any:
    """Return a command's dataclass: the fields of ``base``, then the options.

    Args:
        name: of the class.
        base: its fields that are no options.
        options: those of the same name take a field's place.
        hidden: fields that the help does not show.
    """
    own: list[tuple[str, Any, Any]] = [(one, Annotated[Any, tyro.conf.Suppress], field(default=None)) for one in hidden]
    own += [one.field(key) for key, one in options.items()]
    made = make_dataclass(name, own, bases=(base,), frozen=True)
    made.__doc__ = base.__doc__
    return made


def report_divergence(error: DivergedError, remedy: str) -> int:
    """Say what a run that diverged needs, and return its exit status."""
    print(
        f"tpext: {error}. The last good checkpoint is kept. Start a new run in another --out with {remedy}.",
        file=sys.stderr,
    )
    return 3
