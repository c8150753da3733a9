"""Warnings that show the user's line."""

from __future__ import annotations

import sys
import warnings


def warn_user(message: str) -> None:
    """Warn at the line outside this package that led here.

    A module is made, converted, called or given a rule by ways of different lengths, torch's own among them, so no
    fixed ``stacklevel`` is right. (``skip_file_prefixes`` does the same from Python 3.12 on.)
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("tpext", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
