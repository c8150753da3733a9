"""Names that a user may have misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return what to add to an error about an unknown name: the nearest known one, or nothing where none is near.

    >>> did_you_mean("temporl-order", ["adding", "temporal-order"])
    "; did you mean 'temporal-order'?"
    """
    near = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
