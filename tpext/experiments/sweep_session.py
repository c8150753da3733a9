"""What ``tpext sweep`` does with its options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from tpext.experiments.loop import check_device
from tpext.experiments.progress import say
from tpext.experiments.run_folder import RunError
from tpext.experiments.runs import OPEN, AnyFolder, state_of
from tpext.experiments.settings import ConfigError
from tpext.experiments.sweep import carry_out, default_jobs
from tpext.experiments.sweep_command import Sweep
from tpext.experiments.sweep_folder import Lock, SweepFolder
from tpext.experiments.sweep_plan import (
    FILES,
    IMAGES,
    Planned,
    grid_of_arguments,
    load_file,
    plan,
    read_file,
    with_options,
)
from tpext.experiments.sweep_progress import summarize
from tpext.experiments.sweep_search import search, space_of
from tpext.tasks import TASKS


class Session:
    """One call of the command.

    Args:
        options: its options.
        console: where it tells what it does.
    """

    def __init__(self, options: Sweep, console: Console) -> None:
        self.options = options
        self.console = console
        self.command = [options.what, *options.arguments]
        self.file = Path(options.what) if Path(options.what).suffix in FILES else None

    def carry_out(self) -> int:
        """Carry it out, and return its exit status."""
        options = self.options
        if options.jobs is not None and options.jobs < 1:
            raise ConfigError(f"jobs must be an integer >= 1, got {options.jobs}")
        if options.stack is not None and options.stack < 1:
            raise ConfigError(f"stack must be an integer >= 1, got {options.stack}")
        if options.address is not None and options.engine == "processes":
            raise ConfigError("address belongs to --engine ray and dask, got engine=processes")
        if options.search is not None:
            return self._search(options.search)
        folder, planned, varied = self._planned()
        self._check_devices(planned)
        self._tell_of_optimizers(planned, varied)
        if options.dry_run:
            for run in planned:
                say(self.console, run.name)
            say(self.console, f"{len(planned)} runs in {folder.path}")
            return 0
        with folder.locked() as lock:
            runs = folder.add(self.command, planned, varied) if planned else folder.folders()
            if not runs:
                raise RunError(f"{folder.path} holds no run")
            self._tell_of_changes(runs)
            try:
                self._carry_out_runs(folder, lock, runs)
            finally:
                table = folder.write_table()
        return self._report(folder, runs, table)

    def _search(self, count: int) -> int:
        if count < 1:
            raise ConfigError(f"search must be an integer >= 1, got {count}")
        if self.options.dry_run:
            raise ConfigError("dry_run does not go with a search, whose runs depend on one another")
        task = self.options.what if self.file is None else load_file(self.file)["task"]
        space = space_of(task, self.file, self.options.arguments)
        self._check_devices(plan(task, [space.grid(space.first())])[0])
        folder = self._folder()
        with folder.locked() as lock:
            runs: list[AnyFolder] = []
            self._tell_of_changes(folder.folders())
            try:
                runs = search(
                    space,
                    folder,
                    self.command,
                    lambda some: self._carry_out_runs(folder, lock, some),
                    count=count,
                    sampler=self.options.sampler,
                    batch=self.options.jobs or 2,
                    console=self.console,
                )
            finally:
                table = folder.write_table() if folder.folders() else pd.DataFrame()
        return self._report(folder, runs, table)

    def _carry_out_runs(self, folder: SweepFolder, lock: Lock, runs: Sequence[AnyFolder]) -> None:
        options = self.options
        jobs = options.jobs or (-1 if options.address is not None else default_jobs(runs))
        carry_out(
            folder,
            runs,
            lock,
            jobs=jobs,
            engine=options.engine,
            address=options.address,
            # what is measured here says nothing of the machines of a cluster
            stack=options.stack or (None if options.address is None else 1),
            console=self.console,
        )

    def _report(self, folder: SweepFolder, runs: Sequence[AnyFolder], table: pd.DataFrame) -> int:
        summarize(self.console, table, folder.varied())
        say(self.console, f"table: {folder.table}")
        failed = [run.failure for run in runs if state_of(run) == "failed"]
        for failure in failed:
            say(self.console, f"failed: {failure}")
        left = ", ".join(str(run.path) for run in runs if state_of(run) in OPEN)
        if left:
            say(self.console, f"not ended, for a process that was stopped, or a folder removed: {left}")
        return 1 if failed or left else 0

    def _planned(self) -> tuple[SweepFolder, list[Planned], list[str]]:
        """The sweep's folder, its runs, and what varies; nothing where the folder says them."""
        options, arguments = self.options, self.options.arguments
        is_task = options.what in (*TASKS, IMAGES)  # whatever folder has that name
        if not is_task and SweepFolder(options.what).record.exists():
            if options.out is not None:
                raise ConfigError(f"out does not go with the folder of a sweep, got {options.out}")
            if arguments:
                raise ConfigError(f"options of runs do not go with the folder of a sweep, got {arguments[0]}")
            return SweepFolder(options.what), [], []
        given = grid_of_arguments(arguments)
        task, grids = (options.what, [{}]) if self.file is None else read_file(self.file)
        planned, varied = plan(task, with_options(task, grids, given))
        return self._folder(), planned, varied

    def _folder(self) -> SweepFolder:
        """The folder that the options name, which by default holds no other sweep."""
        name = self.options.what.rpartition(":")[2] if self.file is None else self.file.stem
        folder = SweepFolder(self.options.out or Path("sweeps") / name)
        commands = folder.commands()
        if self.options.out is None and commands and self.command not in commands:
            raise RunError(
                f"{folder.path} holds the sweep {' '.join(commands[0])}: pass --out {folder.path} to add to it, or "
                "another --out"
            )
        return folder

    def _tell_of_optimizers(self, planned: Sequence[Planned], varied: Sequence[str]) -> None:
        """Say so where the rules of a sweep start from other optimizers, so that their rates are not alike."""
        found: dict[str, dict[str, None]] = {}
        for run in planned:
            options = run.config.options()
            found.setdefault(str(options.get("optimizer")), {})[str(options["rule"])] = None
        if len(found) > 1 and "optimizer" not in varied:
            shown = "; ".join(f"{optimizer}: {', '.join(rules)}" for optimizer, rules in found.items())
            say(self.console, f"optimizers differ ({shown}); with --optimizer all runs have the same")

    def _tell_of_changes(self, runs: Sequence[AnyFolder]) -> None:
        """Say so where runs were made with a user's file as it no longer is: their results stay."""
        for file, count in Counter(file for run in runs for file in run.changed_files()).items():
            say(
                self.console,
                f"{file} has changed since {count} of these runs were made; take another --out to run them anew",
            )

    def _check_devices(self, planned: Sequence[Planned]) -> None:
        if self.options.address is None:
            for device in dict.fromkeys(run.config.device for run in planned):
                check_device(device)
