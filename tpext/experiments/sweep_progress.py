"""Progress of a sweep: a live line in a terminal, one line a finished run elsewhere, with the time that is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from tpext.experiments.progress import LiveLine, say
from tpext.experiments.runs import AnyFolder, State, state_of

SHOWN = 10
"""Methods in the summary."""
ENDED: tuple[State, ...] = ("complete", "diverged", "failed")


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
        self.before = self._ended()
        self.started = time.monotonic()
        counts = Counter(self.states.values())
        known = ", ".join(f"{number} {state}" for state, number in counts.items() if state != "waiting")
        say(
            console,
            f"{len(runs)} runs{f' ({known} already)' if known else ''}{f', {jobs} at a time' if jobs > 0 else ''}",
        )
        if console.is_terminal and not console.quiet:
            self.bar = Bar(
                TextColumn("{task.completed:.0f}/{task.total:.0f} runs"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self.line = self.bar.add_task("", total=len(runs), completed=self.before, numbers="")

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
                if state in ENDED:
                    self._tell(run, state)
        if self.bar is not None:
            busy = sum(state == "started" for state in self.states.values())
            text = f"{busy} begun  {self.left()}"
            self.bar.update(self.line, completed=self._ended(), numbers=text)
        return changed

    def left(self) -> str:
        """Return the time that is left, at the pace of this sweep's ended runs so far; nothing is known before one."""
        all_ended = self._ended()
        ended, left = all_ended - self.before, len(self.runs) - all_ended
        if ended == 0 or left == 0:
            return ""
        seconds = (time.monotonic() - self.started) / ended * left
        if seconds < 90:
            return f"about {seconds:.0f} s left"
        return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"

    def _ended(self) -> int:
        return sum(state in ENDED for state in self.states.values())

    def _tell(self, run: AnyFolder, state: State) -> None:
        result, failure = run.read_result(), run.read_failure()
        if result is not None:
            outcome = f"accuracy {result.accuracy:.2%}, {result.seconds:.1f} s"
        else:
            message = "" if failure is None else failure.message
            outcome = message if state == "diverged" else f"{state}: {message}"
        say(self.console, f"{self._ended():>5}/{len(self.runs)}  {run.path.name}: {outcome}  {self.left()}".rstrip())


def summarize(console: Console, table: pd.DataFrame, options: Sequence[str]) -> None:
    """Print the mean over seeds of what the options are, the best first; a run that diverged counts as zero.

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
    means = groups.accuracy.agg(["mean", "min", "max", "count", "size"]).sort_values("mean", ascending=False)
    for key, row in means.head(SHOWN).iterrows():
        values = zip(names, key if isinstance(key, tuple) else (key,), strict=bool(names))
        label = ", ".join(f"{name} {value}" for name, value in values if not pd.isna(value))
        mean = f"{row['mean']:.2%}" if row["count"] else "-"
        spread = f" ({row['min']:.2%} to {row['max']:.2%})" if row["count"] > 1 else ""
        of_all = f", {row['count']:.0f} of {row['size']:.0f} runs" if row["count"] < row["size"] else ""
        say(console, f"{mean:>9}{spread}  {label}{of_all}")
    if len(means) > SHOWN:
        say(console, f"{'':>9}  and {len(means) - SHOWN} more")
