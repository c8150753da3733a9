"""The command ``tpext reproduce``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from tpext._names import did_you_mean
from tpext.experiments.options import DataFolder, Integer, Switch, option
from tpext.experiments.progress import say
from tpext.experiments.settings import ConfigError


@dataclass(frozen=True)
class Reproduce:
    """Make a result of the documents anew: its runs, the table of its methods, its picture.

    The same command goes on where it was stopped. Without a name, the recipes are listed.
    """

    recipe: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(metavar="NAME", help="Of a recipe, or the path of a file of your own, .toml or .yaml."),
    ] = None
    out: Annotated[Path | None, option("DIR", "reproduced/NAME, of the quick version NAME-quick")] = None
    """Folder of its sweep, tables and picture."""
    results: Annotated[Path | None, option("FILE", "results.csv in that folder")] = None
    """Table of runs, such as docs/results.csv, whose rows of the same tasks and methods are replaced."""
    quick: Switch = False
    """Fewer seeds and iterations, some minutes on two cores; what it shows is less."""
    seed: Annotated[str | None, option("SEEDS", "the recipe's")] = None
    """Seeds in place of its own, such as 1..10."""
    jobs: Annotated[Integer, option("INT", "as many as there are cores for")] = None
    """Runs side by side, of one thread each."""
    data_dir: DataFolder = None
    """Folder with the images' files."""
    file: Annotated[Path | None, option("FILE", "none")] = None
    """The text, of recipes that learn one."""

    def carry_out(self, console: Console) -> int:
        # here, as pandas and joblib take longer to load than a help text to print
        from tpext.experiments.recipes import RECIPES, read_recipe
        from tpext.experiments.reproduce import reproduce
        from tpext.experiments.sweep_plan import FILES
        from tpext.experiments.sweep_values import expand

        if self.recipe is None:
            width = max(map(len, RECIPES))
            for name, path in RECIPES.items():
                recipe = read_recipe(path)
                lengths = dict.fromkeys(one for methods in recipe.grids for one in methods.grid.get("length", ()))
                about = ", ".join([recipe.task, *(f"T={'/'.join(length)}" for length in lengths)])
                say(console, f"{name:<{width}}  {recipe.title} ({about})")
            say(console, f"their files are in {next(iter(RECIPES.values())).parent}")
            return 0
        path = RECIPES.get(self.recipe, Path(self.recipe))
        if path.suffix not in FILES:
            near = did_you_mean(self.recipe, RECIPES)
            raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, or a file, got {self.recipe!r}{near}")
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"jobs must be an integer >= 1, got {self.jobs}")
        if self.quick and self.results is not None:
            raise ConfigError(f"results does not go with quick, whose runs are others, got {self.results}")
        given: dict[str, Any] = {
            name: [(str(value.absolute()),)]
            for name, value in (("data_dir", self.data_dir), ("file", self.file))
            if value is not None
        }
        if self.seed is not None:
            given["seed"] = [(seed,) for seed in expand("seed", self.seed)]
        recipe = read_recipe(path, given, quick=self.quick)
        if self.quick:
            recipe = replace(recipe, title=f"{recipe.title} (quick)")
        out = self.out or Path("reproduced") / f"{path.stem}{'-quick' if self.quick else ''}"
        product = reproduce(recipe, out, results=self.results, jobs=self.jobs, console=console)
        say(console, f"table: {product.table}")
        say(console, f"runs: {product.results}")
        for picture in product.pictures:
            say(console, f"picture: {picture}")
        return 0
