"""Results from their recipes: the runs, the table of methods, the picture of each method at its best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.console import Console

from tpext.experiments.figures import as_text, draw_comparison, draw_gradients, draw_heatmaps
from tpext.experiments.recipes import Recipe
from tpext.experiments.run_folder import RunError, RunFolder, write_whole
from tpext.experiments.runs import AnyFolder, in_one, state_of
from tpext.experiments.sweep import carry_out, default_jobs
from tpext.experiments.sweep_folder import SweepFolder
from tpext.experiments.sweep_plan import Planned, identity, plan

SOLVED = 0.99
"""The accuracy from which on a task counts as solved: when a method first gets there is in the table."""
RESULTS = ("task", "method", "seed", "iterations", "accuracy", "best_accuracy", "solved_at", "test_loss")
"""The columns of results.csv; ``solved_at`` is the iteration of the first evaluation with at least 99 %."""


class Product(NamedTuple):
    """What came of a recipe: the tables' and the pictures' files; of curves one for each length of sequences."""

    table: Path
    results: Path
    pictures: list[Path]


def reproduce(
    recipe: Recipe, out: str | Path, *, results: str | Path | None = None, jobs: int | None = None, console: Console
) -> Product:
    """Carry out the runs of a recipe in the folder of a sweep, and write its tables and its pictures there.

    What is complete is not run again. The table has a row for each method and value of the selected option: how many
    runs, the test accuracy of the last iteration (mean, least, greatest), and after how many iterations the accuracy
    was first at least 99 %, the mean of the runs that got there. A method's best value is that of the greatest mean
    accuracy over all evaluations of its runs, the area under its curve. A run that diverged counts as zero.

    Args:
        recipe: of :func:`tpext.experiments.recipes.read_recipe`.
        out: the folder; where a sweep was stopped in it, it goes on.
        results: the table of :func:`write_results`; None is results.csv in the folder.
        jobs: runs side by side; None is as many as there are cores for.
        console: where the progress goes.

    Raises:
        ConfigError: a combination of options is no run.
        RunError: the folder cannot be used; or a run failed, for another reason than that its numbers diverged.
        MissingDataError: the task's data is not there.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP: the same call goes on from there.
    """
    folder = SweepFolder(out)
    planned, varied = plan(recipe.task, [methods.grid for methods in recipe.grids])
    with folder.locked() as lock:
        runs = folder.add([recipe.title], planned, varied)
        carry_out(folder, runs, lock, jobs=jobs or default_jobs(runs), stack=None, console=console)
    failed = [run for run in runs if state_of(run) == "failed"]
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed, see {failed[0].failure} first")
    folders = {identity(run.config): of_it for run, of_it in zip(planned, runs, strict=True)}
    frame = pd.DataFrame(_rows(recipe, folders))
    path = folder.path / "results.csv" if results is None else Path(results)
    write_results(path, frame)
    table, pictures = _write_methods(recipe, folder.path, frame)
    return Product(table, path, pictures)


def write_results(path: Path, frame: pd.DataFrame) -> None:
    """Write a row for each finished run to a table, in place of its rows of the same tasks and methods.

    Raises:
        RunError: there is another table.
    """
    rows = frame.assign(method=frame.name, accuracy=frame.accuracy.mask(frame.diverged))[list(RESULTS)]
    rows = rows.astype({"iterations": "Int64", "solved_at": "Int64"}).round(5)
    if path.exists():
        try:
            before = pd.read_csv(path, dtype=str)
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        if tuple(before.columns) != RESULTS:
            raise RunError(f"{path} must have the columns {', '.join(RESULTS)}, got {', '.join(before.columns)}")
        known = set(zip(rows.task, rows.method, strict=True))
        kept = pd.Series([pair not in known for pair in zip(before.task, before.method, strict=True)], dtype=bool)
        place = len(before) if kept.all() else int(kept.argmin())
        rows = pd.concat([before[:place], rows.astype(object), before[place:][kept[place:]]])
    write_whole(path, rows.to_csv(index=False).encode())


def _write_methods(recipe: Recipe, out: Path, frame: pd.DataFrame) -> tuple[Path, list[Path]]:
    """Write methods.csv and the pictures of finished runs, of which the table has a row each."""
    place = ["panel", "task", "method", *recipe.axes]
    table = (
        frame.groupby([*place, "select", "selected"], sort=False, dropna=False)
        .agg(
            runs=("accuracy", "size"),
            diverged=("diverged", "sum"),
            accuracy=("accuracy", "mean"),
            least=("accuracy", "min"),
            greatest=("accuracy", "max"),
            area=("area", "mean"),
            solved=("solved_at", "count"),
            solved_at=("solved_at", "mean"),
            seconds=("seconds", "mean"),
        )
        .reset_index()
    )
    best = table.loc[table.groupby(place, sort=False, dropna=False).area.idxmax()]
    table["best"] = table.index.isin(best.index)
    path = out / "methods.csv"
    write_whole(path, table.to_csv(index=False, float_format="%.6g").encode())
    if recipe.axes:
        return path, [_draw_heatmap(recipe, best, out)]
    pictures: list[Path] = []
    for (panel, task), chosen in best.groupby(["panel", "task"], sort=False):
        shown: dict[str, list[str | Path]] = {}
        for _, row in chosen.iterrows():
            same = [*place, "selected"]
            value = f", {row.select} {as_text(row.selected)}" if row.select else ""
            shown[f"{row.method}{value}"] = list(frame.folder[(frame[same] == row[same]).all(axis=1)])
        name = f"curves-{panel}" if panel else "curves"
        before = sum(picture.stem.rstrip("0123456789").rstrip("-") == name for picture in pictures)
        name = f"{name}-{before + 1}" if before else name
        title = f"{recipe.title}: {', '.join(part for part in (panel, task) if part)}"
        pictures.append(draw_comparison(shown, out / f"{name}.png", title=title))
        first = {label: RunFolder(folders[0]) for label, folders in shown.items()}
        measured = {label: run.path for label, run in first.items() if run.gradients.exists()}
        if measured:
            beside = out / f"{name.replace('curves', 'gradients', 1)}.png"
            pictures.append(draw_gradients(measured, beside, title=title))
    return path, pictures


def _draw_heatmap(recipe: Recipe, best: pd.DataFrame, out: Path) -> Path:
    x, y = recipe.axes
    panels = {}
    for method, rows in best.groupby("method", sort=False):
        # what diverged at every seed has no accuracy
        values = rows.assign(accuracy=rows.accuracy.where(rows.diverged < rows.runs))
        panels[str(method)] = values.pivot(index=y, columns=x, values="accuracy").sort_index().sort_index(axis=1)
    return draw_heatmaps(panels, out / "heatmap.png", title=recipe.title)


def runs_of(recipe: Recipe) -> Iterator[tuple[dict[str, Any], Planned]]:
    """A recipe's runs, each with what the tables call it: ``name`` is its method in results.csv."""
    for methods in recipe.grids:
        runs, varied = plan(recipe.task, [methods.grid])
        several = [name for name in varied if name not in ("seed", methods.select, *recipe.axes)]
        for planned in runs:
            options = planned.config.options()
            method = [methods.label, *(f"{name} {as_text(options[name])}" for name in several)]
            selected = None if methods.select is None else in_one(options.get(methods.select))
            value = "" if selected is None else f"{methods.select} {as_text(selected)}"
            at = [f"{name} {as_text(options[name])}" for name in recipe.axes if name in options]
            place = {
                "panel": methods.panel,
                # a heatmap may go over lengths, which titles have
                "task": recipe.task if recipe.axes else planned.config.title,
                "method": ", ".join(method),
                **{name: in_one(options.get(name)) for name in recipe.axes},
                "select": methods.select or "",
                "selected": 0.0 if selected is None else selected,
                "name": ", ".join(part for part in (methods.panel, *method, *at, value) if part),
            }
            yield place, planned


def _rows(recipe: Recipe, folders: Mapping[str, AnyFolder]) -> Iterator[dict[str, Any]]:
    """A row for each run."""
    for place, planned in runs_of(recipe):
        run = folders[identity(planned.config)]
        rows, diverged = run.read_rows(), state_of(run) == "diverged"
        result = None if diverged else run.read_result()
        if not rows or (result is None and not diverged):
            raise RunError(f"{run.path} holds no run that has ended, with an evaluation")
        later = rows[1:] or rows
        reached = [row.iteration for row in later if row.accuracy >= SOLVED]
        yield {
            **place,
            "folder": run.path,
            "seed": planned.config.seed,
            "diverged": diverged,
            # a run that diverged has learned nothing, whatever it had before
            "accuracy": 0.0 if result is None else result.accuracy,
            "area": 0.0 if diverged else sum(row.accuracy for row in later) / len(later),
            "solved_at": None if diverged or not reached else reached[0],
            "seconds": rows[-1].seconds,
            **{name: getattr(result, name, None) for name in ("iterations", "best_accuracy", "test_loss")},
        }
