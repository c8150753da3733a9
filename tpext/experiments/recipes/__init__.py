"""Recipes of results: the runs behind a table and a picture of the documents, one file a result.

A recipe is a file of ``tpext sweep`` that has, besides, a ``title``, a ``label`` in each ``[[grid]]`` (the method), the
option to ``select`` each method's best value of, and the options of a ``[quick]`` version that takes minutes. Its
picture has curves, or with ``axes = ["reg", "lr"]`` a heatmap of each method over these two options, x and y.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpext.experiments.settings import ConfigError
from tpext.experiments.sweep_plan import OF_RECIPES, grid_of_table, load_file

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}
"""By the names of ``tpext reproduce``; a new one is a new file."""


@dataclass(frozen=True)
class Recipe:
    """The runs of a result.

    Attributes:
        title: what it shows, in one line.
        task: of ``tpext train``.
        grids: by their labels.
        select: the option of which each method's best value is shown, None where there is none to choose.
        axes: the options that a heatmap goes over, none for curves.
    """

    title: str
    task: str
    grids: Mapping[str, Mapping[str, Any]]
    select: str | None
    axes: tuple[str, ...] = ()


def read_recipe(path: Path, given: Mapping[str, Any] | None = None, *, quick: bool = False) -> Recipe:
    """Return a recipe, with some options in place of its own.

    Args:
        path: of its file.
        given: options as :func:`tpext.experiments.sweep_plan.grid_of_arguments` returns them.
        quick: whether in the quick version.

    Raises:
        ConfigError: it cannot be read, or lacks what a recipe has.
    """
    values = load_file(path)
    tables, short = values["grid"], values.get("quick")
    if not isinstance(values.get("title"), str) or not all(isinstance(table.get("label"), str) for table in tables):
        raise ConfigError(f"{path} must have a title, and a label in each [[grid]]")
    if quick and not isinstance(short, Mapping):
        raise ConfigError(f"{path} has no [quick] version")
    shared = {name: value for name, value in values.items() if name not in ("task", "grid", *OF_RECIPES)}
    grids: dict[str, Mapping[str, Any]] = {}
    for table in tables:
        own = {name: value for name, value in table.items() if name != "label"}
        grid = {**shared, **own, **(short if quick and isinstance(short, Mapping) else {})}
        grids[table["label"]] = {**grid_of_table(grid), **(given or {})}
    if len(grids) < len(tables):
        raise ConfigError(f"{path} must have a label of its own in each [[grid]]")
    axes = tuple(values.get("axes", ()))
    if axes and (len(axes) != 2 or not all(isinstance(name, str) for name in axes)):
        raise ConfigError(f"{path}: axes must be the names of two options, got {list(axes)}")
    return Recipe(values["title"], values["task"], grids, values.get("select"), axes)
