"""What every rule shares: how its values are checked and kept, and back-propagation, the rule of every layer."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import ClassVar


def set_number(rule: object, name: str, *, low: float, low_allowed: bool = False, high: float = math.inf) -> None:
    """Check one number of a frozen rule and store it as a float, and as text for ``exact_number``."""
    value = getattr(rule, name)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if low < number < high or (low_allowed and number == low):
            object.__setattr__(rule, name, number)
            object.__setattr__(rule, f"_{name}", repr(number))
            return
    bounds = f"{'>=' if low_allowed else '>'} {low:g}" + (f" and < {high:g}" if math.isfinite(high) else "")
    raise ValueError(f"{type(rule).__name__}: {name} must be a finite number {bounds}, got {value!r}")


def exact_number(rule: object, name: str) -> float:
    """Return a number of a rule, as a constant to ``torch.compile``.

    The compiler may turn a float attribute into a symbol, which it then fails to hand to the second layer's
    ``autograd.Function``; a text attribute stays a (guarded) constant.
    """
    return float(getattr(rule, f"_{name}"))


def check_flag(rule: object, name: str) -> None:
    value = getattr(rule, name)
    if not isinstance(value, bool):
        raise ValueError(f"{type(rule).__name__}: {name} must be True or False, got {value!r}")


@dataclass(frozen=True)
class Backprop:
    """Exact gradients (back-propagation through time) on the same fused kernels.

    ``e_t = (g_t + e_{t+1} W) * a'(h_t)``

    Equals ``torch.nn.RNN`` to rounding, supports double backward, works with every nonlinearity. A feed-forward layer
    under this rule is torch's own operations.

    >>> Backprop()
    Backprop()
    """

    exact: ClassVar[bool] = True
    """Whether the backward pass is the chain rule."""
