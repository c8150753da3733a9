"""Recipes: each can be planned, and what one makes is its runs' table and picture."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes
from runs import SMALL

from tpext.experiments import ConfigError
from tpext.experiments.commands import run as tpext_command
from tpext.experiments.figures import draw_heatmaps
from tpext.experiments.recipes import RECIPES, Recipe, read_recipe
from tpext.experiments.reproduce import RESULTS, runs_of
from tpext.experiments.runs import load_runs
from tpext.experiments.sweep_plan import plan

DOCS = Path(__file__).resolve().parents[1] / "docs"

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
layers = 2
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.toml").write_text(RECIPE)
    return tmp_path


def recipe_of(name: str, folder: Path, *, quick: bool = False) -> Recipe:
    """A recipe of the package; one that learns a text has a short one, by the name of the documents'."""
    text = folder / "tinyshakespeare.txt"
    text.write_text("to be or not to be, that is the question. " * 100)
    return read_recipe(RECIPES[name], {"file": [(str(text),)]} if name == "text-cells" else {}, quick=quick)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_runs(name: str, quick: bool, tmp_path: Path) -> None:
    recipe = recipe_of(name, tmp_path, quick=quick)
    runs, _ = plan(recipe.task, [methods.grid for methods in recipe.grids])
    assert len(runs) >= max(2, len(recipe.grids))
    for methods in recipe.grids:
        if methods.select is not None:
            of_it, _ = plan(recipe.task, [methods.grid])
            assert len({run.config.options()[methods.select] for run in of_it}) > 1


NO_ROWS = {
    "feedback-mnist-lenet": 5,
    "feedback-mnist-mlp": 8,
    "feedback-training": 27,
    "kaczmarz-init": 27,
}
"""Runs of recipes of which docs/results.csv has no row: they ran before it was made of recipes, or ran reduced."""


@pytest.mark.skipif(not DOCS.is_dir(), reason="no folder docs beside the tests")
def test_every_result_of_the_documents_has_a_recipe(tmp_path: Path) -> None:
    makers = {
        name: {(place["task"], place["name"], run.config.seed) for place, run in runs_of(recipe_of(name, tmp_path))}
        for name in RECIPES
    }
    methods = [{(task, name) for task, name, _ in runs} for runs in makers.values()]
    made = set().union(*methods)
    assert len(made) == sum(map(len, methods))  # one writes over another's rows otherwise
    table = pd.read_csv(DOCS / "results.csv")
    assert tuple(table.columns) == RESULTS
    assert set(zip(table.task, table.method, strict=True)) - made == set()
    rows = set(zip(table.task, table.method, table.seed, strict=True))
    missing = {name: sum(run not in rows for run in runs) for name, runs in makers.items()}
    assert {name: number for name, number in missing.items() if number} == NO_ROWS
    commands = set(re.findall(r"tpext reproduce\s+([a-z0-9-]+)(?![a-z0-9.-])", (DOCS / "results.md").read_text()))
    assert commands == set(RECIPES)


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


def test_a_packaged_recipe_shows_what_the_documents_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tpext_command(["reproduce", "spiral", "--quick", "--jobs", "1", "--out", "spiral"]) == 0
    assert "picture: spiral/curves.png" in capsys.readouterr().out
    methods = pd.read_csv("spiral/methods.csv").set_index("method")
    assert set(methods.index) == {"BP", "regularised least squares", "constrained least squares", "DTP"}
    assert (methods.accuracy[["BP", "regularised least squares"]] > 0.98).all()
    assert (methods.greatest > 0.5).all()
    assert set(pd.read_csv("spiral/results.csv").method) == set(methods.index)


def test_results_take_the_place_of_those_of_the_same_methods(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = '"temporal-order, T=10","{}",1,9,0.12345,0.5,,0.1\n'
    name = "second, lr 0.001"
    methods = ["other", name, "between", name, "last"]
    Path("all.csv").write_text(",".join(RESULTS) + "\n" + "".join(old.format(one) for one in methods))
    assert tpext_command(["reproduce", "two.toml", "--jobs", "1", "--out", "made", "--results", "all.csv"]) == 0
    table = pd.read_csv("all.csv")
    new = ["first, lr 0.001"] * 2 + ["first, lr 0.01"] * 2 + [name] * 2 + ["second, lr 1e+30"] * 2
    assert list(table.method) == ["other", *new, "between", "last"]
    runs = pd.read_csv("made/table.csv").set_index(["rule", "lr", "seed"])
    for _, row in table[table.method == name].iterrows():
        run = runs.loc["regularized-inverse", 1e-3, row.seed]
        assert row.iterations == SMALL["iterations"]
        for column in ("accuracy", "best_accuracy", "test_loss"):
            assert row[column] == pytest.approx(run[column], abs=1e-5)
    assert table[table.method == "second, lr 1e+30"][list(RESULTS[3:])].isna().all(axis=None)
    Path("all.csv").write_text("task,seed\n")
    assert tpext_command(["reproduce", "two.toml", "--out", "made", "--results", "all.csv"]) == 1
    assert "all.csv must have the columns task, method" in capsys.readouterr().err
    assert tpext_command(["reproduce", "two.toml", "--quick", "--results", "all.csv"]) == 1
    assert "results does not go with quick" in capsys.readouterr().err


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
    assert lines[-3:] == ["runs: made/results.csv", "picture: made/curves.png", "picture: made/gradients.png"]


def test_the_quick_version_has_options_of_its_own(here: Path) -> None:
    assert tpext_command(["reproduce", "two.toml", "--quick", "--jobs", "1"]) == 0
    assert list(pd.read_csv("reproduced/two-quick/methods.csv").runs) == [1] * 4
    runs = load_runs("reproduced/two-quick")
    assert set(runs.layers) == {2}


def test_other_seeds_than_the_recipes(here: Path) -> None:
    assert tpext_command(["reproduce", "two.toml", "--quick", "--seed", "2..3", "--jobs", "1"]) == 0
    assert list(pd.read_csv("reproduced/two-quick/methods.csv").runs) == [2] * 4
    assert set(load_runs("reproduced/two-quick").seed) == {2, 3}


def test_a_quick_option_of_other_grids_is_left_out(here: Path) -> None:
    text = RECIPE.replace('rule = "regularized-inverse"', 'rule = "regularized-inverse"\nreg = 1') + "reg = 2"
    Path("two.toml").write_text(text)
    first, second = read_recipe(Path("two.toml"), quick=True).grids
    assert "reg" not in first.grid
    assert second.grid["reg"] == [("2",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace("title", "name"), "must have a title, and a label in each"),
        (RECIPE.replace('label = "first"', ""), "must have a title, and a label in each"),
        (RECIPE.replace("second", "first"), "must have a label of its own in each"),
        (RECIPE.replace('select = "lr"', 'axes = ["lr"]'), "axes must be the names of two options"),
        (
            RECIPE.replace('select = "lr"', 'axes = "lr"'),
            "axes must be the names of two options of its grids, got 'lr'",
        ),
        (
            RECIPE.replace('select = "lr"', 'axes = ["lr", "rate"]'),
            "axes must be the names of two options of its grids",
        ),
        (RECIPE.replace('select = "lr"', 'select = "rate"'), "select must be the name of an option of its grids"),
        (RECIPE.replace('select = "lr"', 'select = ["lr"]'), r"select must be the name of .*, got \['lr'\]"),
        (RECIPE.replace('label = "first"', 'label = "first"\npanel = "a/b"'), "panel must be a text without a slash"),
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
    *listed, where = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(RECIPES)
    folder = Path(where.removeprefix("their files are in "))
    assert {path.stem for path in folder.glob("*.toml")} == {*RECIPES}
    assert tpext_command(["reproduce", "nothing"]) == 1
    assert f"recipe must be one of {', '.join(RECIPES)}, or a file, got 'nothing'" in capsys.readouterr().err
