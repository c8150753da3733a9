"""Modules that no package has, by the paths of their files."""

from __future__ import annotations

import importlib.util
import sys
from os import PathLike
from types import ModuleType


def load_module(name: str, path: str | PathLike[str], *, keep: bool = False) -> ModuleType:
    """Import the file at ``path``, compiled or not; ``keep`` puts it where dataclasses look for it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if keep:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
