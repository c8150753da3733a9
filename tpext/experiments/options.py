"""What the options of all training commands have in common."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from tpext.experiments.loop import DivergedError


def option(metavar: str, default: str = "the preset's") -> object:
    """How an option that may be left out shows in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


Integer = Annotated[int | None, option("INT")]
Integers = Annotated[tuple[int, ...] | None, option("INT [INT ...]")]
Number = Annotated[float | None, option("FLOAT")]
Numbers = Annotated[tuple[float, ...] | None, option("FLOAT [FLOAT ...]")]
Pair = Annotated[tuple[float, float] | None, option("FLOAT FLOAT")]
Flag = Annotated[bool | None, option("{True,False}")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
DataFolder = Annotated[Path | None, option("DIR", "$TPEXT_DATA or the cache folder")]


def report_divergence(error: DivergedError, remedy: str) -> int:
    """Say what a run that diverged needs, and return its exit status."""
    print(
        f"tpext: {error}. The last good checkpoint is kept. Start a new run in another --out with {remedy}.",
        file=sys.stderr,
    )
    return 3
