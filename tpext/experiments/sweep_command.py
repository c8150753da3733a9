"""The command ``tpext sweep``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from tpext.experiments.options import Switch, option

Engine = Literal["processes", "ray", "dask"]


@dataclass(frozen=True)
class Sweep:
    """Carry out many runs, several at a time: every option of `tpext train` may be a list or a range.

    tpext sweep adding --length 30 --lr 1e-4..1e-1 --reg 0.1,1,10 --seed 1..5

    A list is a,b,c; 1..5 are integers; 1e-4..1e-1 is a value each decade, 1e-4..1e-1:7 are 7 values. All combinations
    are run, each in a folder of its own. The same command goes on where it was stopped, and reports again once all is
    done.
    """

    what: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="TASK",
            help="A task, as of `tpext train`, or images. Or a file, .toml or .yaml, with task and options, whose "
            "lists are varied; tables [[grid]] add their options to these, each a grid of its own. Or the folder of a "
            "sweep, to go on with it.",
        ),
    ]
    out: Annotated[Path | None, option("DIR", "sweeps/TASK, or the file's name")] = None
    """Folder of the sweep. Where it holds one, the runs are added."""
    jobs: Annotated[int | None, option("INT", "as many as there are cores for; on a GPU 1")] = None
    """Runs side by side. Each has one thread unless --threads says otherwise."""
    stack: Annotated[int | None, option("INT", "as measured before the runs begin")] = None
    """Runs of one shape that go together in a process, their recurrent layers in one call, to the same bits: many small
    networks take less time so. 1 carries out each alone."""
    engine: Engine = "processes"
    """What carries them out: processes of this machine, or the workers of a Ray or Dask cluster."""
    address: Annotated[str | None, option("ADDRESS", "a cluster on this machine, for this sweep")] = None
    """Of the cluster. Its workers need the sweep's folder under the same path."""
    search: Annotated[int | None, option("N", "all combinations")] = None
    """Carry out N draws, each with all seeds, in place of all combinations: of a range (1e-4..1e-1) any number, by
    ratios; of a list one of its values. The best has the greatest test accuracy, of a text the least validation loss.
    Needs pip install "tpext[search]"."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How a search draws: near what was good so far, or at random."""
    dry_run: Switch = False
    """Print the runs, and carry out none."""

    arguments: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Options of the runs, as they were given."""

    def carry_out(self, console: Console) -> int:
        # here, as pandas and joblib take longer to load than a help text to print
        from tpext.experiments.sweep_session import Session

        return Session(self, console).carry_out()


OWN_OPTIONS = tuple(field.name for field in fields(Sweep) if field.name not in ("what", "arguments"))
"""Options that are the sweep's; all others are its runs'."""


def parse_sweep(arguments: Sequence[str]) -> Sweep:
    """Return the command of a command line, whose options are its own and those of its runs.

    Raises:
        SystemExit: tyro has shown its help, or an error.
    """
    own: list[str] = []
    of_runs: list[str] = []
    target = own
    for argument in arguments:
        if re.match(r"--?[a-zA-Z]", argument):
            name = argument.lstrip("-").partition("=")[0].replace("-", "_")
            target = own if name in (*OWN_OPTIONS, "help", "h") else of_runs
        target.append(argument)
    return replace(tyro.cli(Sweep, args=own, prog="tpext sweep"), arguments=tuple(of_runs))
