"""Checks of settings, whose errors name the setting."""

from __future__ import annotations

import math

import torch


class ConfigError(ValueError):
    """A setting that is unknown, out of its range, or in conflict with another."""


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
