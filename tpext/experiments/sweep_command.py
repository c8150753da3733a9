"""The command ``tpext sweep``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from tpext.experiments.options import Switch, option
from tpext.experiments.progress import say
from tpext.experiments.run_folder import RunError
from tpext.experiments.settings import ConfigError
from tpext.tasks import TASKS

if TYPE_CHECKING:
    from tpext.experiments.sweep_folder import SweepFolder
    from tpext.experiments.sweep_plan import Planned

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
    engine: Engine = "processes"
    """What carries them out: processes of this machine, or the workers of a Ray or Dask cluster."""
    address: Annotated[str | None, option("ADDRESS", "a cluster on this machine, for this sweep")] = None
    """Of the cluster. Its workers need the sweep's folder under the same path."""
    dry_run: Switch = False
    """Print the runs, and carry out none."""

    arguments: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Options of the runs, as they were given."""

    def carry_out(self, console: Console) -> int:
        # here, as pandas and joblib take longer to load than a help text to print
        from tpext.experiments.loop import check_device
        from tpext.experiments.runs import OPEN, state_of
        from tpext.experiments.sweep import carry_out, default_jobs
        from tpext.experiments.sweep_progress import summarize

        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"jobs must be an integer >= 1, got {self.jobs}")
        if self.address is not None and self.engine == "processes":
            raise ConfigError("address belongs to --engine ray and dask, got engine=processes")
        folder, planned, varied = self._planned()
        if self.address is None:
            for device in dict.fromkeys(run.config.device for run in planned):
                check_device(device)
        if self.dry_run:
            for run in planned:
                say(console, run.name)
            say(console, f"{len(planned)} runs in {folder.path}")
            return 0
        with folder.locked() as lock:
            runs = folder.add([self.what, *self.arguments], planned, varied) if planned else folder.folders()
            if not runs:
                raise RunError(f"{folder.path} holds no run")
            jobs = self.jobs or (-1 if self.address is not None else default_jobs(runs))
            try:
                carry_out(folder, runs, lock, jobs=jobs, engine=self.engine, address=self.address, console=console)
            finally:
                table = folder.write_table()
        summarize(console, table, folder.varied())
        say(console, f"table: {folder.table}")
        failed = [run.failure for run in runs if state_of(run) == "failed"]
        for failure in failed:
            say(console, f"failed: {failure}")
        left = [run.path for run in runs if state_of(run) in OPEN]
        if left:
            say(console, f"not ended, for a process that was stopped, or a folder removed: {', '.join(map(str, left))}")
        return 1 if failed or left else 0

    def _planned(self) -> tuple[SweepFolder, list[Planned], list[str]]:
        """The sweep's folder, its runs, and what varies; nothing where the folder says them."""
        from tpext.experiments.sweep_folder import SweepFolder
        from tpext.experiments.sweep_plan import IMAGES, grid_of_arguments, plan, read_file

        path, arguments = Path(self.what), self.arguments
        is_task = self.what in (*TASKS, IMAGES)  # whatever folder has that name
        if not is_task and SweepFolder(path).record.exists():
            if self.out is not None:
                raise ConfigError(f"out does not go with the folder of a sweep, got {self.out}")
            if arguments:
                raise ConfigError(f"options of runs do not go with the folder of a sweep, got {arguments[0]}")
            return SweepFolder(path), [], []
        if path.suffix in (".toml", ".yaml", ".yml"):
            task, grids = read_file(path)
            given = grid_of_arguments(arguments)
            grids = [{**grid, **given} for grid in grids]
            name = path.stem
        else:
            task, grids, name = self.what, [grid_of_arguments(arguments)], self.what.rpartition(":")[2]
        planned, varied = plan(task, grids)
        folder = SweepFolder(self.out or Path("sweeps") / name)
        commands = folder.commands()
        if self.out is None and commands and [self.what, *self.arguments] not in commands:
            raise RunError(
                f"{folder.path} holds the sweep {' '.join(commands[0])}: pass --out {folder.path} to add to it, or "
                "another --out"
            )
        return folder, planned, varied


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
