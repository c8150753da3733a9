"""Numbers of an op that the members of a stack have in common, or each its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Numbers: TypeAlias = float | Sequence[float]
"""One number for all members, or one for each. In schemas ``float[1]``, which takes a plain float too."""


_NAMES = ("target_step", "margin", "slope_reg", "scale", "input_scale")


def as_list(value: Numbers) -> list[float]:
    """One number or several, as schemas have them."""
    return list(value) if isinstance(value, (list, tuple)) else [value]  # type: ignore[list-item]


def numbers_of(op: str, name: str, value: Numbers, members: int, symbol: str = "S") -> list[float]:
    """The number of all members, or of each, as a list; ValueError if these are not as many as there are members."""
    numbers = as_list(value)
    if len(numbers) not in (1, members):
        raise ValueError(f"{op}: {name} must be one number or {symbol}={members} of them, got {len(numbers)}")
    return numbers


def differ(*numbers: Sequence[float]) -> bool:
    """Whether members have numbers of their own: what a kernel of CUDA, whose numbers are all members', cannot take."""
    return any(one != of_all[0] for of_all in numbers for one in of_all)


def by_numbers(run: Callable[[Any], Any], call: Any) -> Any:
    """``run(call)``, a layer's gradients, that of the input first, by kernels that take one number.

    Members with numbers of their own go one after another; to the gradient of an input that they share they add.
    """
    if not differ(*(as_list(value) for name, value in call._asdict().items() if name in _NAMES)):
        return run(call)
    of_input, *others = each_alone(lambda *own: run(type(call)(*own)), call)
    if call.needs[0] and call.input.shape[0] != call.states.shape[0]:
        of_input = of_input.sum(0, keepdim=True)
    return of_input, *others


def each_alone(run: Callable[..., tuple[Tensor, ...]], call: Any) -> Any:
    """``run(*call)`` of each member of a stack for itself, with its own numbers; its outputs put together.

    ``call`` is a named tuple. Its tensors are the stack's (but ``lengths``, and an input that all members share), its
    list ``reverse`` and its numbers have one for each member, or one for all.
    """
    parts = []
    for member, backwards in enumerate(call.reverse):
        own: dict[str, Any] = {"reverse": [backwards]}
        for name, value in call._asdict().items():
            if isinstance(value, Tensor) and name != "lengths":
                own[name] = value[member : member + 1] if value.shape[0] > 1 else value
            elif name in _NAMES:
                numbers = as_list(value)
                own[name] = [numbers[member if len(numbers) > 1 else 0]]
        parts.append(run(*call._replace(**own)))
    return tuple(map(torch.cat, zip(*parts, strict=True)))
