"""Progress of a sweep: a live line in a terminal, one line a finished run elsewhere, with the time that is left."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from tpext.experiments.images import ImageConfig
from tpext.experiments.progress import LiveLine, say
from tpext.experiments.run_folder import RunError
from tpext.experiments.runs import AnyFolder, State, state_of
from tpext.experiments.sweep_plan import AnyConfig

SHOWN = 10
"""Methods in the summary."""
ENDED: tuple[State, ...] = ("complete", "diverged", "failed")
QUIET_SECONDS = 60.0
"""After which a pipe gets a line though no run has ended: those of a stack end together, and late."""


class SweepProgress(LiveLine):
    """Shows how the runs of a sweep get on, by what is in their folders; a context manager.

    Args:
        console: where.
        runs: their folders.
        jobs: how many go side by side; -1 where a cluster says it.
    """

    def __init__(self, console: Console, runs: Sequence[AnyFolder], jobs: int) -> None:
        self.console = console
        self.runs = runs
        self.states: dict[str, State] = {run.path.name: state_of(run) for run in runs}
        self.configs: dict[str, AnyConfig | None] = {}
        """Of the runs that are under way; reading one may read a task's data."""
        self.sizes: dict[str, int] = {}
        """Of the files metrics.csv that shares were read of."""
        self.shares: dict[str, float] = {}
        for run in runs:
            self._read_share(run)
        self.before = sum(self.shares.values())
        self.started = self.told = time.monotonic()
        counts = Counter(self.states.values())
        known = ", ".join(f"{number} {state}" for state, number in counts.items() if state != "waiting")
        say(
            console,
            f"{len(runs)} runs{f' ({known} already)' if known else ''}{f', {jobs} at a time' if jobs > 0 else ''}",
        )
        if console.is_terminal and not console.quiet:
            self.bar = Bar(
                TextColumn("{task.fields[ended]}/{task.total:.0f} runs"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self.line = self.bar.add_task("", total=len(runs), ended=self._ended(), numbers="")

    def look(self) -> bool:
        """Look at the folders, show what is new, and return whether a run has ended or begun."""
        changed = False
        for run in self.runs:
            name = run.path.name
            if self.states[name] in ENDED:
                continue
            state = state_of(run)
            if state != self.states[name]:
                self.states[name] = state
                changed = True
            self._read_share(run)
            if state in ENDED:
                self._tell(run, state)
        begun = f"{sum(state == 'started' for state in self.states.values())} begun"
        if self.bar is not None:
            numbers = f"{begun}  {self.left()}"
            self.bar.update(self.line, completed=sum(self.shares.values()), ended=self._ended(), numbers=numbers)
        elif time.monotonic() - self.told >= QUIET_SECONDS:
            self._say(f"{begun}  {self.left()}")
        return changed

    def say_that_one_died(self, suspects: int) -> None:
        """Say that a process was killed, and that runs which it may have been at are tried anew, one by one."""
        self._say(f"a process was killed (out of memory?): {suspects} runs that were begun go on one by one")

    def left(self) -> str:
        """Return the time that is left, at the pace of this sweep so far; nothing is known before an evaluation."""
        done = sum(self.shares.values())
        if done <= self.before or self._ended() == len(self.runs):
            return ""
        seconds = (time.monotonic() - self.started) / (done - self.before) * (len(self.runs) - done)
        if seconds < 90:
            return f"about {seconds:.0f} s left"
        return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"

    def _read_share(self, run: AnyFolder) -> None:
        """Keep how much of a run is done."""
        name, state = run.path.name, self.states[run.path.name]
        self.shares.setdefault(name, 0.0)
        if state != "started":
            self.shares[name] = float(state in ENDED)
            return
        with contextlib.suppress(OSError, RunError):  # its folder is gone, or it has no evaluation yet
            size = run.metrics.stat().st_size
            if name not in self.configs:
                self.configs[name] = run.read_config()
            if size != self.sizes.get(name):
                self.shares[name], self.sizes[name] = share_done(run, self.configs[name]), size

    def _ended(self) -> int:
        return sum(state in ENDED for state in self.states.values())

    def _tell(self, run: AnyFolder, state: State) -> None:
        result, failure = run.read_result(), run.read_failure()
        if result is not None:
            outcome = f"accuracy {result.accuracy:.2%}, {result.seconds:.1f} s"
        else:
            message = "" if failure is None else failure.message
            outcome = message if state == "diverged" else f"{state}: {message}"
        self._say(f"{run.path.name}: {outcome}  {self.left()}")

    def _say(self, text: str) -> None:
        self.told = time.monotonic()
        say(self.console, f"{self._ended():>5}/{len(self.runs)}  {text}".rstrip())


def share_done(run: AnyFolder, config: AnyConfig | None) -> float:
    """Return how much of a run is done, 0..1, by its last evaluation; 0 where its options do not say."""
    rows = run.read_rows()
    if config is None or not rows:
        return 0.0
    if isinstance(config, ImageConfig):
        return rows[-1].epoch / config.epochs  # type: ignore[union-attr]  # an evaluation of images has it
    if config.iterations is not None:
        return rows[-1].iteration / config.iterations
    # without an interval there is an evaluation before the first epoch, and one after each
    return (len(rows) - 1) / config.epochs if config.epochs and config.eval_interval is None else 0.0


def summarize(console: Console, table: pd.DataFrame, options: Sequence[str]) -> None:
    """Print the mean over seeds of what the options are, the best first; a run that diverged counts as zero.

    Equal accuracies are sorted by test loss.

    Args:
        console: where.
        table: of :func:`tpext.experiments.runs.write_table`.
        options: those that vary.
    """
    counts = table.state.value_counts()
    say(console, ", ".join(f"{number} {state}" for state, number in counts.items()))
    names = [name for name in options if name in table and name != "seed"]
    if "accuracy" not in table or len(table) < 2 or not (table.state == "complete").any():
        return
    counted = table.assign(accuracy=table.accuracy.mask(table.state == "diverged", 0.0))
    groups = counted.groupby(names or counted.state.map(lambda state: ""), sort=False, dropna=False)
    means = groups.accuracy.agg(["mean", "min", "max", "count", "size"])
    means["loss"] = groups.test_loss.mean() if "test_loss" in table else float("nan")
    means = means.sort_values(["mean", "loss"], ascending=[False, True])
    for key, row in means.head(SHOWN).iterrows():
        values = zip(names, key if isinstance(key, tuple) else (key,), strict=bool(names))
        label = ", ".join(f"{name} {value}" for name, value in values if not pd.isna(value))
        mean = f"{row['mean']:.2%}" if row["count"] else "-"
        spread = f" ({row['min']:.2%} to {row['max']:.2%})" if row["count"] > 1 else ""
        loss = "" if pd.isna(row["loss"]) else f"  test loss {row['loss']:.4g}"
        of_all = f", {row['count']:.0f} of {row['size']:.0f} runs" if row["count"] < row["size"] else ""
        say(console, f"{mean:>9}{spread}{loss}  {label}{of_all}")
    if len(means) > SHOWN:
        say(console, f"{'':>9}  and {len(means) - SHOWN} more")
