"""Recipes: each can be planned, and what one makes is its runs' table and picture."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes
from runs import SMALL

from tpext.experiments import ConfigError
from tpext.experiments.commands import run as tpext_command
from tpext.experiments.figures import draw_heatmaps
from tpext.experiments.recipes import RECIPES, read_recipe
from tpext.experiments.sweep_plan import plan

pytestmark = pytest.mark.usefixtures("unrendered")

RECIPE = f"""
title = "Two methods"
task = "temporal-order"
{chr(10).join(f"{name} = {value}" for name, value in SMALL.items())}
lr = [1e-3, 1e-2]
seed = "1..2"
select = "lr"

[[grid]]
label = "first"
rule = "backprop"

[[grid]]
label = "second"
rule = "regularized-inverse"
lr = [1e-3, 1e30]

[quick]
seed = 1
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.toml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_runs(name: str, quick: bool, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 100)
    given = {"file": [(str(text),)]} if name == "text-cells" else {}
    recipe = read_recipe(RECIPES[name], given, quick=quick)
    runs, _ = plan(recipe.task, [methods.grid for methods in recipe.grids])
    assert len(runs) >= max(2, len(recipe.grids))
    for methods in recipe.grids:
        if methods.select is not None:
            of_it, _ = plan(recipe.task, [methods.grid])
            assert len({run.config.options()[methods.select] for run in of_it}) > 1


def test_a_recipe_makes_a_table_and_a_picture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "two.toml", "--jobs", "1", "--out", "made"]
    assert tpext_command(command) == 0
    assert "picture: made/curves.png" in capsys.readouterr().out
    assert Path("made/curves.png").exists()
    table = pd.read_csv("made/methods.csv")
    assert list(table.method) == ["first", "first", "second", "second"]
    assert list(table.selected) == [1e-3, 1e-2, 1e-3, 1e30]
    assert list(table.runs) == [2] * 4
    assert list(table.diverged) == [0, 0, 0, 2]
    assert table.groupby("method").best.sum().to_dict() == {"first": 1, "second": 1}
    runs = pd.read_csv("made/table.csv")
    for _, row in table[table.diverged == 0].iterrows():
        rule = {"first": "backprop", "second": "regularized-inverse"}[row.method]
        same = runs[(runs.rule == rule) & (runs.lr == row.selected)]
        assert row.accuracy == pytest.approx(same.accuracy.mean(), rel=1e-5)
    before = {path: path.stat().st_mtime_ns for path in here.glob("made/runs/*/result.json")}
    assert len(before) == 6
    assert tpext_command(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_a_grid_varies_makes_methods_in_panels(here: Path) -> None:
    text = RECIPE.replace('select = "lr"', "").replace('label = "second"', 'label = "second"\npanel = "other"')
    Path("two.toml").write_text(text)
    assert tpext_command(["reproduce", "two.toml", "--quick", "--jobs", "1", "--out", "made"]) == 0
    table = pd.read_csv("made/methods.csv")
    assert list(table.method) == ["first, lr 0.001", "first, lr 0.01", "second, lr 0.001", "second, lr 1e+30"]
    assert list(table.panel.fillna("")) == ["", "", "other", "other"]
    assert {path.name for path in Path("made").glob("*.png")} == {"curves.png", "curves-other.png"}


def test_gradients_of_a_recipe_are_drawn_beside_its_curves(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("two.toml").write_text(RECIPE.replace('select = "lr"', 'select = "lr"\ngradients = true'))
    assert tpext_command(["reproduce", "two.toml", "--quick", "--jobs", "1", "--out", "made"]) == 0
    assert {path.name for path in Path("made").glob("*.png")} == {"curves.png", "gradients.png"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["table: made/methods.csv", "picture: made/curves.png", "picture: made/gradients.png"]


def test_the_quick_version_has_options_of_its_own(here: Path) -> None:
    assert tpext_command(["reproduce", "two.toml", "--quick", "--jobs", "1"]) == 0
    assert list(pd.read_csv("reproduced/two-quick/methods.csv").runs) == [1] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace("title", "name"), "must have a title, and a label in each"),
        (RECIPE.replace('label = "first"', ""), "must have a title, and a label in each"),
        (RECIPE.replace("second", "first"), "must have a label of its own in each"),
        (RECIPE.replace('select = "lr"', 'axes = ["lr"]'), "axes must be the names of two options"),
        (RECIPE[: RECIPE.index("[quick]")], r"has no \[quick\] version"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(here: Path, text: str, message: str) -> None:
    Path("two.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(Path("two.toml"), quick=True)


def test_a_heatmap_goes_over_two_options(here: Path) -> None:
    text = RECIPE.replace('select = "lr"', 'axes = ["hidden_size", "lr"]').replace(
        "hidden_size = 8", "hidden_size = [4, 8]"
    )
    Path("two.toml").write_text(text)
    assert tpext_command(["reproduce", "two.toml", "--quick", "--jobs", "1"]) == 0
    assert Path("reproduced/two-quick/heatmap.png").exists()
    table = pd.read_csv("reproduced/two-quick/methods.csv")
    assert len(table) == 8
    assert table.best.all()


@pytest.mark.renders
def test_cells_of_a_heatmap_say_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame([[0.25, math.nan], [1.0, 0.5]], index=[0.1, 1.0], columns=[4, 8])
    table.index.name, table.columns.name = "lr", "reg"
    texts = []
    draw = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, text, **look: (texts.append((x, y, text)), draw(self, x, y, text, **look))[1]
    )
    assert draw_heatmaps({"one": table, "two": table}, tmp_path / "deep" / "a.png", title="Title").exists()
    assert texts == [(0, 0, "25"), (1, 0, "x"), (0, 1, "100"), (1, 1, "50")] * 2


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert tpext_command(["reproduce"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)
    assert tpext_command(["reproduce", "nothing"]) == 1
    assert f"recipe must be one of {', '.join(RECIPES)}, or a file, got 'nothing'" in capsys.readouterr().err
