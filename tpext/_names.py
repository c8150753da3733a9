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
    near = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
