"""What modules say to TorchScript, whose own errors name neither the cause nor a way out."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn


def refuse_script(module: nn.Module) -> NoReturn:
    """Raise RuntimeError for ``torch.jit.script``; as a class's ``__prepare_scriptable__`` it is what that calls."""
    _refuse(module, "torch.jit.script")


def refuse_trace(module: nn.Module) -> None:
    """Raise RuntimeError while ``torch.jit.trace`` runs the module."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        _refuse(module, "torch.jit.trace")


def _refuse(module: nn.Module, name: str) -> NoReturn:
    plain = ", or pass on the plain module that to_torch() gives" if hasattr(module, "to_torch") else ""
    raise RuntimeError(f"{type(module).__name__}: {name} is not supported; use torch.export.export{plain}")
