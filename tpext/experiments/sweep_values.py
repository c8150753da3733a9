"""What an option takes over a sweep: a list of values, or a range."""

from __future__ import annotations

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from tpext.experiments.settings import ConfigError

MOST = 10_000
"""Values of a range: more is a slip."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?::(\d+))?")


def expand(name: str, text: str) -> list[str]:
    """Return the values of an option, as ``tpext train`` reads each.

    ==================  ====================================================================
    ``a,b,c``           these, each a value or a range
    ``1..5``            the integers from 1 to 5
    ``1e-4..1e-1``      a value each decade, the ends included
    ``1e-4..1e-1:7``    7 values at equal ratios, the ends included, to 6 significant digits
    ==================  ====================================================================

    Raises:
        ConfigError: a range that goes nowhere; names the option.

    >>> expand("lr", "1e-4..1e-1"), expand("reg", "1..100:5"), expand("seed", "1..3,7")
    (['0.0001', '0.001', '0.01', '0.1'], ['1', '3.16228', '10', '31.6228', '100'], ['1', '2', '3', '7'])
    """
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise ConfigError(f"{name} must be a list of values with commas in between, got {text!r}")
    values = [value for part in parts for value in _part(name, part)]
    twice = [value for value, of_it in itertools.groupby(sorted(values)) if len(list(of_it)) > 1]
    if twice:
        raise ConfigError(f"{name} must be a list of different values, got {twice[0]} twice in {text!r}")
    return values


class Range(NamedTuple):
    """Numbers between two ends, the ends included."""

    low: float
    high: float
    integer: bool


def read_range(name: str, text: str, *, real: bool = False) -> Range | None:
    """Return the range that a text is, of which a search draws; None if it is none, or has a number of values.

    Args:
        name: of the option, for errors.
        text: its value.
        real: whether the option takes numbers with a fraction; else two integers are a range of integers.

    Raises:
        ConfigError: it goes nowhere; names the option.

    >>> read_range("lr", "1e-4..1e-1"), read_range("lr", "1e-4..1e-1:4")
    (Range(low=0.0001, high=0.1, integer=False), None)
    """
    matched = _RANGE.fullmatch(text.strip())
    if matched is None or matched[3] is not None:
        return None
    low, high = float(matched[1]), float(matched[2])
    integer = not real and _is_integer(matched[1]) and _is_integer(matched[2])
    if low >= high or not (integer or low > 0):
        raise ConfigError(f"{name} must be a range that goes up{'' if integer else ' from above 0'}, got {text}")
    return Range(low, high, integer)


def _part(name: str, text: str) -> list[str]:
    matched = _RANGE.fullmatch(text)
    if matched is None:
        return [text]
    first, last, count = matched.groups()
    if count is None and _is_integer(first) and _is_integer(last):
        low, high = int(first), int(last)
        if low > high:
            raise ConfigError(f"{name} must be a range that goes up, got {text}")
        if high - low >= MOST:
            raise ConfigError(f"{name} must be a range of at most {MOST} integers, got {text}")
        return [str(value) for value in range(low, high + 1)]
    begin, end = float(first), float(last)
    if not 0 < begin < end:
        raise ConfigError(f"{name} must be a range that goes up from above 0, as it goes by ratios, got {text}")
    decades = math.log10(end / begin)
    if count is None and abs(decades - round(decades)) > 1e-9:
        raise ConfigError(f"{name} must be a range of whole decades, or have a number of values (:N), got {text}")
    number = round(decades) + 1 if count is None else int(count)
    if number < 2:
        raise ConfigError(f"{name} must be a range of at least 2 values, got {text}")
    return [format(value, ".6g") for value in np.geomspace(begin, end, number)]


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"[-+]?\d+", text) is not None
