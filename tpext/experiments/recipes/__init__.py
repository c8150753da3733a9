"""Recipes of results: the runs behind a table and a picture of the documents, one file a result.

A recipe is a file of ``tpext sweep`` that has, besides, a ``title``, a ``label`` in each ``[[grid]]`` (the method) and
the options of a ``[quick]`` version that takes minutes. An option that a grid varies makes several methods of it, but
for the seed, and the option to ``select`` each method's best value of. The picture has curves, those of grids with the
same ``panel`` together; or with ``axes = ["reg", "lr"]`` a heatmap of each label over these two options, x and y.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpext.experiments.settings import ConfigError
from tpext.experiments.sweep_plan import OF_RECIPES, grid_of_table, load_file, options_of_file

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}
"""By the names of ``tpext reproduce``; a new one is a new file."""


@dataclass(frozen=True)
class Methods:
    """A grid of a recipe.

    Attributes:
        panel: the picture that it is in, "" where there is one.
        label: what its methods have in common.
        select: the option of which each method's best value is shown, None where there is none to choose.
        grid: of :mod:`tpext.experiments.sweep_plan`.
    """

    panel: str
    label: str
    select: str | None
    grid: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """The runs of a result.

    Attributes:
        title: what it shows, in one line.
        task: of ``tpext train``.
        grids: what is run.
        axes: the options that a heatmap goes over, none for curves.
    """

    title: str
    task: str
    grids: tuple[Methods, ...]
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
    shared = options_of_file(values)
    of_grids = {name for table in tables for name in table}
    known = grid_of_table({**shared, **{name: value for table in tables for name, value in table.items()}})
    _check_places(path, values, tables, known)
    axes = tuple(values.get("axes", ()))
    grids = []
    for table in tables:
        own = {name: value for name, value in table.items() if name not in OF_RECIPES}
        # of the options of a quick version, those that other grids have are not this one's
        fewer = short if quick and isinstance(short, Mapping) else {}
        fewer = {name: value for name, value in fewer.items() if name in {*shared, *own} or name not in of_grids}
        grid = {**grid_of_table({**shared, **own, **fewer}), **(given or {})}
        select = table.get("select", values.get("select"))
        grids.append(Methods(table.get("panel", ""), table["label"], select, grid))
    names = [(one.panel, one.label) for one in grids]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path} must have a label of its own in each [[grid]] of a panel")
    return Recipe(values["title"], values["task"], tuple(grids), axes)


def _check_places(path: Path, values: Mapping[str, Any], tables: list[Any], options: Collection[str]) -> None:
    """Check what says where runs show: the axes, the options to select of, the panels."""
    axes = values.get("axes", [])
    if axes and not (isinstance(axes, list) and len(axes) == 2 and all(name in options for name in axes)):
        raise ConfigError(f"{path}: axes must be the names of two options of its grids, got {axes!r}")
    for table in (values, *tables):
        select, panel = table.get("select"), table.get("panel", "")
        if select is not None and not (isinstance(select, str) and select in options):
            raise ConfigError(f"{path}: select must be the name of an option of its grids, got {select!r}")
        if not isinstance(panel, str) or "/" in panel:
            raise ConfigError(f"{path}: panel must be a text without a slash, for the picture's name, got {panel!r}")
