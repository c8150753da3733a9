"""What a field of a task or a rule is for, in a line of the command line's help, and where it starts."""

from __future__ import annotations

import functools
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import docstring_parser

_MARKUP = re.compile(r":\w+:`~?([^`]*)`|``")


def default_of(field: Field[Any]) -> Any:
    """Return what a field is by default, ``MISSING`` if it has to be given."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def help_of(kind: type[Any], name: str) -> str | None:
    """Return the help of a field, None if it has none.

    That is what its declaration says, or else the first sentence of what the docstring of its class says of it, or that
    of the next class above, under ``Args`` or below the field.

    Args:
        kind: a dataclass.
        name: of the field.

    >>> from tpext.rules import RegularizedInverse
    >>> help_of(RegularizedInverse, "input_rule")
    'What the layer below receives, always in gradient units'
    """
    declared = next(field for field in fields(kind) if field.name == name).metadata.get("help")
    if declared:
        return str(declared)
    for one in filter(is_dataclass, kind.__mro__):
        # what stands below the fields is in the source, which takes longer to read
        text = _arguments(one).get(name) or _attributes(one).get(name)
        if text:
            return text
    return None


@functools.cache
def _arguments(kind: type[Any]) -> dict[str, str]:
    return _first_sentences(docstring_parser.parse(kind.__doc__ or ""))


@functools.cache
def _attributes(kind: type[Any]) -> dict[str, str]:
    return _first_sentences(docstring_parser.parse_from_object(kind))


def _first_sentences(docstring: docstring_parser.Docstring) -> dict[str, str]:
    found = {}
    for entry in docstring.params:
        text = _MARKUP.sub(r"\1", " ".join((entry.description or "").split()))
        first = text.partition(". ")[0].removesuffix(".")
        found.update(dict.fromkeys(entry.arg_name.split(", "), first[:1].upper() + first[1:]))
    return found
