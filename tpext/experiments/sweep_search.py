"""Searches: the runs of a sweep as draws from ranges, at random or by what earlier draws have shown, by Optuna.

Every draw is run with all seeds. Its score is the mean accuracy of the last iteration over them (zero for one that
diverged), or where the task has a validation set, minus the mean validation loss. Optuna's journal in the sweep's
folder holds the draws, so that a search that was stopped goes on with those that it had.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tpext.experiments.progress import say
from tpext.experiments.runs import AnyFolder, state_of
from tpext.experiments.settings import FREE_FIELDS, ConfigError
from tpext.experiments.sweep_folder import SweepFolder
from tpext.experiments.sweep_plan import (
    OWN,
    Words,
    grid_of_options,
    grid_of_table,
    identity,
    load_file,
    of_one_rule,
    options_of_arguments,
    options_of_file,
    options_of_rules,
    plan,
    takes_real,
)
from tpext.experiments.sweep_values import Range, read_range

DIGITS = 4
"""Significant ones of a drawn number, which folders have in their names."""


@dataclass(frozen=True)
class Space:
    """What a search draws from.

    Attributes:
        task: of ``tpext train``.
        fixed: what every run has, and the seeds, as a grid.
        ranges: numbers that are drawn between two ends.
        choices: what is drawn from a list.
    """

    task: str
    fixed: Mapping[str, Sequence[Words]]
    ranges: Mapping[str, Range]
    choices: Mapping[str, Sequence[Words]]

    def first(self) -> dict[str, Any]:
        """Return a draw, to try what cannot be a run before any is: the lower ends, the first choices."""
        ends = {name: int(span.low) if span.integer else span.low for name, span in self.ranges.items()}
        return {**ends, **dict.fromkeys(self.choices, 0)}

    def grid(self, drawn: Mapping[str, Any]) -> dict[str, Sequence[Words]]:
        """Return the grid of a draw: one value of each option, and all seeds."""
        own: dict[str, Sequence[Words]] = {}
        for name, value in drawn.items():
            if name in self.ranges:
                text = str(value) if self.ranges[name].integer else f"{value:.{DIGITS}g}"
                _, dot, option = name.partition(".")
                own[name] = [(f"{option}={text}" if dot else text,)]
            else:
                own[name] = [self.choices[name][value]]
        grid = {**self.fixed, **own}
        of_rules = options_of_rules(self.task, self.choices)
        return of_one_rule(grid["rule"][0][0], of_rules, grid) if of_rules else grid


def space_of(task: str, path: Path | None, arguments: Sequence[str]) -> Space:
    """Return what a command line, and a file if there is one, give to draw from.

    Raises:
        ConfigError: there is nothing to draw, or more than one grid.
    """
    table: dict[str, Any] = {}
    if path is not None:
        values = load_file(path)
        if len(values["grid"]) > 1:
            raise ConfigError(f"{path}: a search has one [[grid]], got {len(values['grid'])}")
        table = options_of_file({**values, **values["grid"][0]})
    given = options_of_arguments(arguments)
    named = grid_of_table({name: value for name, value in table.items() if name == "rule"})
    named |= grid_of_options([(name, words) for name, words in given if name == "rule"])
    rules = [words[0] for words in named.get("rule", [])]
    ranges: dict[str, Range] = {}
    rest: dict[str, Any] = {}
    for group, option, value in _each_of_table(table):
        name = f"{group}.{option}" if option else group
        if (found := _range(task, name, value, rules)) is not None:
            ranges[name] = found
        elif option:
            rest.setdefault(group, {})[option] = value
        else:
            rest[group] = value
    grid = grid_of_table(rest)
    options = []
    for group, option, words in _each_given(given):
        name = f"{group}.{option}" if option else group
        found = _range(task, name, words[0], rules) if len(words) == 1 else None
        if found is not None:
            ranges[name] = found
            grid.pop(name, None)
        else:
            options.append((group, [f"{option}={words[0]}"] if option else words))
            ranges.pop(name, None)
    grid |= grid_of_options(options)
    choices = {name: values for name, values in grid.items() if len(values) > 1 and name != "seed"}
    if not ranges and not choices:
        raise ConfigError("a search needs an option with a range or a list to draw from")
    fixed = {name: values for name, values in grid.items() if name not in choices}
    return Space(task, fixed, ranges, choices)


def _each_of_table(table: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The options of a file, those of a user's task or rule each, as their group, their name in it, and the value."""
    for group, value in table.items():
        if group in OWN and isinstance(value, Mapping):
            yield from ((group, option, of_it) for option, of_it in value.items())
        else:
            yield group, "", value


def _each_given(given: Sequence[tuple[str, list[str]]]) -> Iterator[tuple[str, str, list[str]]]:
    """The same of a command line, with the words."""
    for group, words in given:
        if group in OWN:
            yield from ((group, option, [value]) for option, _, value in (word.partition("=") for word in words))
        else:
            yield group, "", words


def _range(task: str, name: str, value: Any, rules: Sequence[str]) -> Range | None:
    """The range that an option's value is; seeds are all run."""
    if not isinstance(value, str) or name == "seed":
        return None
    return read_range(name, value, real=takes_real(task, name, rules))


def search(
    space: Space,
    folder: SweepFolder,
    command: Sequence[str],
    carry_out: Callable[[Sequence[AnyFolder]], None],
    *,
    count: int,
    sampler: str,
    batch: int,
    console: Console,
) -> list[AnyFolder]:
    """Draw, and carry the draws' runs out, until there are as many draws as asked for; return all runs.

    Args:
        space: what is drawn from.
        folder: of the sweep, locked.
        command: for its record.
        carry_out: carries out runs that have not ended.
        count: draws, those of an earlier call of the same search included.
        sampler: "random", or "tpe", the tree-structured Parzen estimator (Bergstra et al., 2011).
        batch: draws at a time, of "tpe".
        console: where the best draw is shown.

    Raises:
        ConfigError: Optuna is not installed, or the folder holds a search over other options.
    """
    try:
        optuna: Any = importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise ConfigError('a search needs optuna: pip install "tpext[search]"') from error
    optuna.logging.set_verbosity(logging.WARNING)
    backend = importlib.import_module("optuna.storages.journal").JournalFileBackend(str(folder.path / "search.log"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="search",
        direction="maximize",
        load_if_exists=True,
    )
    done = len(study.trials)
    # of a state of its own at each start: the same one would draw the same again
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    study.sampler = samplers[sampler](seed=done)
    distributions = _distributions(optuna.distributions, space)
    _check_same(space, study, folder)
    runs: list[AnyFolder] = []
    failed: set[int] = set()
    while True:
        asked = _open_trials(optuna, study, failed)
        more = min(count - len(study.trials), count if sampler == "random" else batch - len(asked))
        for _ in range(more):
            study.ask(distributions)
        asked = _open_trials(optuna, study, failed)
        planned, varied = plan(space.task, [space.grid(trial.params) for trial in study.trials])
        runs = folder.add(command, planned, varied)
        if not asked:
            return runs
        carry_out(runs)
        folders = {identity(run.config): of_it for run, of_it in zip(planned, runs, strict=True)}
        for trial in asked:
            own = [folders[identity(run.config)] for run in plan(space.task, [space.grid(trial.params)])[0]]
            value = _score(own)
            if value is None:
                failed.add(trial.number)  # it stays open: the next start tries it again
            else:
                study.tell(trial.number, value)
        if any(trial.value is not None for trial in study.trials):
            best = study.best_trial
            values = {name: words for name, words in space.grid(best.params).items() if name in best.params}
            label = ", ".join(
                " ".join(words[0] if "." in name else [name, *words[0]]) for name, words in values.items()
            )
            say(console, f"best of {len(study.trials)} draws: {best.value:.4g}  {label}")


def _open_trials(optuna: Any, study: Any, failed: Collection[int]) -> list[Any]:
    """Draws without a score, but for those that have failed in this call."""
    running = optuna.trial.TrialState.RUNNING
    return [trial for trial in study.trials if trial.state == running and trial.number not in failed]


def _check_same(space: Space, study: Any, folder: SweepFolder) -> None:
    """Draws are numbers of choices, and scores are of runs with all that is fixed: check that these are as before."""
    fixed = {name: list(map(list, values)) for name, values in space.fixed.items() if name not in FREE_FIELDS}
    choices = {name: list(map(list, values)) for name, values in space.choices.items()}
    ranges = {name: list(span) for name, span in space.ranges.items()}
    found = {"task": space.task, **fixed, **choices, **ranges}
    before = study.user_attrs.get("space")
    if before is None:
        study.set_user_attr("space", found)
    elif before != found:
        names = [name for name in dict.fromkeys([*before, *found]) if before.get(name) != found.get(name)]
        raise ConfigError(f"{folder.path} holds a search with other values of {', '.join(names)}: pass another --out")


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    """Optuna's, by options: numbers by ratios, integers that do not span a decade alike."""
    found: dict[str, Any] = {}
    for name, span in space.ranges.items():
        if span.integer:
            low, high = int(span.low), int(span.high)
            found[name] = optuna.IntDistribution(low, high, log=low >= 1 and high >= 10 * low)
        else:
            found[name] = optuna.FloatDistribution(span.low, span.high, log=True)
    return found | {
        name: optuna.CategoricalDistribution(list(range(len(values)))) for name, values in space.choices.items()
    }


def _score(runs: Sequence[AnyFolder]) -> float | None:
    """Of a draw; None where a run failed or has not ended."""
    scores: list[float | None] = []
    for run in runs:
        result = run.read_result()
        if result is None:
            if state_of(run) != "diverged":
                return None
            scores.append(None)
        else:
            loss = getattr(result, "validation_loss", None)
            scores.append(result.accuracy if loss is None else -loss)
    worst = -math.inf if any(score is not None and score < 0 for score in scores) else 0.0
    mean = math.fsum(worst if score is None else score for score in scores) / len(scores)
    return mean if math.isfinite(mean) else None
