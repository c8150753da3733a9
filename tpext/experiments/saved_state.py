"""Taking over the state of a checkpoint, which may have been edited, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from tpext.experiments.settings import check_integer, check_number

RowT = TypeVar("RowT", bound=NamedTuple)

_MISFITS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What torch raises for a state that is not of its object."""


def field(state: Mapping[str, Any], name: str) -> Any:
    """Return a field; ValueError if there is none."""
    if name not in state:
        raise ValueError(f"{name} is missing")
    return state[name]


def load(state: Mapping[str, Any], name: str, part: Any) -> None:
    """Let a module, an optimizer or a trainer take over the field ``name``.

    Raises:
        ValueError: the field is missing, or not the state of such an object.
    """
    saved = field(state, name)
    optimizers = {name: part} if isinstance(part, torch.optim.Optimizer) else {}
    for index, optimizer in enumerate(getattr(part, "optimizers", ())):
        optimizers[f"{name}.optimizers[{index}]"] = optimizer
    groups = {path: [dict(group) for group in optimizer.param_groups] for path, optimizer in optimizers.items()}
    try:
        part.load_state_dict(saved)
    except _MISFITS as error:
        raise ValueError(
            f"{name} must be the state of this run's {type(part).__name__}, got another: {type(error).__name__}: "
            + " ".join(str(error).split())
        ) from error
    for path, optimizer in optimizers.items():
        _check_groups(path, optimizer, groups[path])
        _check_averages(path, optimizer)


def _check_groups(path: str, optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]) -> None:
    """Check the options, of which torch takes over any value to fail in the next step."""
    for index, (group, expected) in enumerate(zip(optimizer.param_groups, before, strict=True)):
        for key, value in expected.items():
            name = f"{path}.param_groups[{index}].{key}"
            if key not in group:
                raise ValueError(f"{name} is missing")
            if isinstance(value, tuple):
                check_type(name, group[key], tuple[float, ...])
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                check_number(name, group[key])


def _check_averages(path: str, optimizer: torch.optim.Optimizer) -> None:
    """Check what is kept for each parameter, tensors of its shape and its steps, of which it does the same."""
    keys: list[str] | None = None
    for number, (parameter, values) in enumerate(optimizer.state.items()):
        name = f"{path}.state[{number}]"
        if not isinstance(values, Mapping):
            raise ValueError(f"{name} must be a dict, got {shown(values)}")
        keys = keys or list(values)
        if list(values) != keys:
            raise ValueError(f"{name} must have the keys {', '.join(keys)}, got {', '.join(values)}")
        for key, value in values.items():
            shape = torch.Size() if key == "step" else parameter.shape
            if value is not None and not (isinstance(value, Tensor) and value.shape == shape):
                raise ValueError(f"{name}.{key} must be a tensor {list(shape)}, got {shown(value)}")


def read_rows(saved: object, row_class: type[RowT], last: int) -> list[RowT]:
    """Return the evaluations of a checkpoint, the first one at iteration 0, none after ``last``.

    Raises:
        ValueError: there are none, or one has other fields.
    """
    if not isinstance(saved, list) or not saved:
        raise ValueError(f"rows must be a list of at least one evaluation, got {shown(saved)}")
    rows: list[RowT] = []
    for index, cells in enumerate(saved):
        name = f"rows[{index}]"
        hints = {key: hint for key, hint in get_type_hints(row_class).items() if key in row_class._fields}
        least = len(hints) - len(row_class._field_defaults)
        if not isinstance(cells, (list, tuple)) or not least <= len(cells) <= len(hints):
            raise ValueError(f"{name} must be a list of {', '.join(hints)}, got {shown(cells)}")
        for (key, hint), value in zip(hints.items(), cells, strict=False):
            check_type(f"{name}.{key}", value, hint)
        check_integer(f"{name}.iteration", cells[0], rows[-1][0] + 1 if rows else 0, last if rows else 0)
        rows.append(row_class(*cells))
    return rows


def check_type(name: str, value: object, hint: Any) -> None:
    """Raise ValueError unless a value is of the type of an annotation: int, float, None, unions, lists, tuples."""
    if not _is_of(value, hint):
        kind = hint if get_args(hint) else hint.__name__
        raise ValueError(f"{name} must be of type {kind}, got {shown(value)}")


def _is_of(value: object, hint: Any) -> bool:
    if (kind := get_origin(hint)) in (list, tuple):
        return isinstance(value, kind) and all(_is_of(one, get_args(hint)[0]) for one in value)
    kinds = get_args(hint) or (hint,)
    return any(isinstance(value, (int, float) if kind is float else kind) for kind in kinds) and value is not True


def shown(value: object) -> str:
    """Return how an error shows a value, on one line."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
