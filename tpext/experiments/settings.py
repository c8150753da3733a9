"""What all settings share: how they are declared, and checks whose errors name them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import torch

from tpext.rules import PerMember

FREE_FIELDS = ("device", "threads", "data_dir", "tensorboard")
"""Fields that say how a run is carried out, not what it computes: a resumed run may change them."""


def free_fields(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options asked for that are :data:`FREE_FIELDS`."""
    return {name: asked[name] for name in FREE_FIELDS if name in asked}


Network = Literal["recurrent", "feed-forward"]


class ConfigError(ValueError):
    """A setting that is unknown, out of its range, or in conflict with another."""


def described(help: str, default: str | None = None, network: Network | None = None) -> Any:
    """Declare a field of a configuration by its line of the command line's help.

    Args:
        help: the line.
        default: what it shows as the default, where that is no value of the tables.
        network: which networks have it, where others have not.
    """
    return dataclasses.field(metadata={"help": help, "default": default, "network": network})


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the choices of an annotation, that of None apart; none if it is no ``Literal``."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    literals = [one for one in get_args(hint) if get_origin(one) is Literal]
    # two of them may share choices
    return tuple(dict.fromkeys(choice for one in literals for choice in get_args(one)))


def of_text(hint: Any) -> Any:
    """Return the annotation of what a text stands for: of numbers that may be one for each member, one for all."""
    return float if hint == PerMember else hint


def check_integer(name: str, value: object, low: int, high: int = 2**31 - 1) -> None:
    """Raise ConfigError unless a value is an integer in ``low .. high``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an integer >= {low}, got {value!r}")
    if value > high:
        raise ConfigError(f"{name} must be at most {high}, got {value}")


def check_number(name: str, value: object, *, above: bool = False) -> None:
    """Raise ConfigError unless a value is a finite number >= 0, or > 0 with ``above``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not number or (above and value == 0):
        raise ConfigError(f"{name} must be a number {'>' if above else '>='} 0, got {value!r}")


def check_device_name(name: str) -> None:
    """Raise ConfigError for what is no device that runs go on."""
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigError(f"device must be a torch device such as cpu or cuda:0, got {name!r}") from error
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, got {name!r}")
