"""Names that a user may have misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

_NONE: Mapping[str, str] = MappingProxyType({})


def did_you_mean(name: object, names: Iterable[str], former: Mapping[str, str] = _NONE) -> str:
    """Return what to add to an error about an unknown name: the nearest known one, or nothing where none is near.

    ``former`` has what former names are called now.

    >>> did_you_mean("temporl-order", ["adding", "temporal-order"])
    "; did you mean 'temporal-order'?"
    """
    if name in former:
        return f"; {name} is called {former[str(name)]} now"
    near = nearest(name, names) if isinstance(name, str) else None
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the nearest name, None if none is as near as ``cutoff``, of difflib's ratio."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), None)
