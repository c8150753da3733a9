"""Settings of publications for ``tpext train TASK``, one file a publication.

A file has a :class:`Preset` by the name ``PRESET``. Every module of this package is loaded with it, so no list of
presets has to learn of a new file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import cast

from tpext.experiments.presets.base import Case, Preset

PRESETS: dict[str, Preset] = {}
"""By the names of ``--preset``, "default" apart."""

for _module in pkgutil.iter_modules(__path__):
    _preset = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "PRESET", None)
    if _preset is not None:
        PRESETS[_preset.name] = cast(Preset, _preset)


def presets_of(case: Case) -> list[str]:
    """Return which presets there are for a task and a rule."""
    return [name for name, preset in PRESETS.items() if preset.values(case) is not None]


__all__ = ["PRESETS", "Case", "Preset", "presets_of"]
