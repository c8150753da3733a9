"""Searches: what they draw from, that a stopped one goes on, and that none draws twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from runs import SMALL

from tpext.experiments import ConfigError
from tpext.experiments.commands import run as tpext_command
from tpext.experiments.sweep_plan import plan
from tpext.experiments.sweep_search import space_of
from tpext.experiments.sweep_values import Range

pytest.importorskip("optuna")
pytestmark = pytest.mark.usefixtures("unrendered")

FIXED = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
DRAWN = ["--lr", "1e-4..1e-1", "--credit", "local,through_time", "--seed", "1..2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def search(count: int, *more: str) -> int:
    words = [*FIXED, *DRAWN, "--search", str(count), "--jobs", "1", "--out", "found", *more]
    return tpext_command(["sweep", "temporal-order", *words])


def test_what_is_drawn_and_what_is_fixed(here: Path) -> None:
    space = space_of(
        "adding", None, ["--lr", "1e-4..1e-1", "--hidden-size", "8..64", "--reg", "1..100:3", "--seed=1..3"]
    )
    assert space.ranges == {"lr": Range(1e-4, 1e-1, False), "hidden_size": Range(8, 64, True)}
    assert space.choices == {"reg": [("1",), ("10",), ("100",)]}
    assert space.fixed == {"seed": [("1",), ("2",), ("3",)]}
    grid = space.grid({"lr": 0.00123456, "hidden_size": 13, "reg": 2})
    assert grid == {**space.fixed, "lr": [("0.001235",)], "hidden_size": [("13",)], "reg": [("100",)]}
    Path("a.toml").write_text('task = "adding"\nlr = "1e-4..1e-1"\nreg = [1, 2]\nlength = 12')
    assert space_of("adding", None, ["--lr", "1..10"]).ranges == {"lr": Range(1.0, 10.0, False)}
    space = space_of("adding", Path("a.toml"), ["--reg", "1e-1..1e1"])
    assert set(space.ranges) == {"lr", "reg"}
    assert space.choices == {}


OWN_RULE = """
from dataclasses import dataclass

from tpext.rules import RecurrentRule


@dataclass(frozen=True)
class Scaled(RecurrentRule):
    scale: float = 0.5
    kind: str = "a"
    parts: int = 1

    def feedback(self, weight_hh):
        return self.scale * weight_hh
"""


def test_options_of_ones_own_are_drawn_too(here: Path) -> None:
    Path("mine.py").write_text(OWN_RULE)
    fixed = ["--rule", "mine.py:Scaled", "--lr", "1e-3"]
    space = space_of("adding", None, [*fixed, "--rule-options", "scale=0.2..1.5", "kind=a,b", "parts=1..3"])
    assert space.ranges == {
        "rule_options.scale": Range(0.2, 1.5, False), "rule_options.parts": Range(1, 3, True)
    }  # fmt: skip
    assert space.choices == {"rule_options.kind": [("kind=a",), ("kind=b",)]}
    drawn = {"rule_options.scale": 0.123456, "rule_options.parts": 2, "rule_options.kind": 1}
    (run,) = plan("adding", [space.grid(drawn)])[0]
    rule: Any = run.config.rule
    assert (rule.scale, rule.kind, rule.parts) == (0.1235, "b", 2)
    assert space_of("adding", None, [*fixed, "--rule-options", "scale=1..2"]).ranges == {
        "rule_options.scale": Range(1, 2, False)
    }  # fmt: skip
    table = 'task = "adding"\nrule = "mine.py:Scaled"\nrule_options = {scale = "0.1..1", kind = "b"}\n'
    Path("a.toml").write_text(table)
    space = space_of("adding", Path("a.toml"), [])
    assert space.ranges == {"rule_options.scale": Range(0.1, 1, False)}
    assert space.fixed["rule_options.kind"] == [("kind=b",)]
    space = space_of("adding", Path("a.toml"), ["--rule-options", "scale=2", "--lr", "1e-3..1e-1"])
    assert (set(space.ranges), space.fixed["rule_options.scale"]) == ({"lr"}, [("scale=2",)])


def test_rules_on_images_have_names_of_their_own(here: Path) -> None:
    words = ["--rule", "mine.py:Net", "--rule-options", "scale=0.1..1", "--lr", "1e-3..1e-1"]
    assert space_of("images", None, words).ranges == {
        "rule_options.scale": Range(0.1, 1, False), "lr": Range(1e-3, 1e-1, False)
    }  # fmt: skip


def test_a_draw_has_the_options_of_its_rule() -> None:
    words = ["--rule", "backprop,regularized-inverse", "--reg", "0.1..10", "--credit", "local", "--lr", "1e-3"]
    space = space_of("temporal-order", None, words)
    runs = [plan("temporal-order", [space.grid({"rule": rule, "reg": 2.0})])[0] for rule in range(2)]
    (first,), (second,) = runs
    assert first.config.options()["rule"] == "backprop"
    assert {name: second.config.options()[name] for name in ("rule", "reg", "credit")} == {
        "rule": "regularized-inverse", "reg": 2.0, "credit": "local"
    }  # fmt: skip


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_draws_and_goes_on(here: Path, sampler: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(3, "--sampler", sampler) == 0
    first = pd.read_csv("found/table.csv")
    assert len(first) == 3 * 2
    assert "best of 3 draws" in capsys.readouterr().out
    assert search(3, "--sampler", sampler) == 0
    assert len(pd.read_csv("found/table.csv")) == 3 * 2
    assert search(5, "--sampler", sampler) == 0
    table = pd.read_csv("found/table.csv")
    assert len(table) == 5 * 2
    assert set(first.run) <= set(table.run)
    assert table.lr.nunique() == 5
    assert table.lr.between(1e-4, 1e-1).all()
    assert set(table.credit) <= {"local", "through_time"}
    assert (table.groupby("lr").seed.nunique() == 2).all()


def test_draws_of_a_stopped_search_are_carried_out_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tpext.experiments.sweep_session.carry_out", stop)
        assert search(3, "--sampler", "random") == 130
    before = {path.name for path in Path("found/runs").iterdir()}
    assert len(before) == 6
    assert search(3, "--sampler", "random") == 0
    assert {path.name for path in Path("found/runs").iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search", "0", "--lr", "1e-3..1e-1"], "search must be an integer >= 1, got 0"),
        (["--search", "3"], "a search needs an option with a range or a list to draw from"),
        (["--search", "3", "--lr", "1e-1..1e-3"], "lr must be a range that goes up from above 0, got 1e-1..1e-3"),
        (["--search", "3", "--reg", "1e-1..1e1", "--rule", "backprop"], "reg does not belong to rule=backprop"),
        (["--search", "3", "--lr", "1e-3..1e-1", "--dry-run"], "dry_run does not go with a search"),
    ],
)
def test_what_cannot_be_searched_is_named(
    here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tpext_command(["sweep", "temporal-order", *FIXED, *words]) == 1
    assert message in capsys.readouterr().err
    assert not Path("sweeps").exists()


def test_a_search_of_several_grids_is_refused(here: Path) -> None:
    Path("a.toml").write_text('task = "adding"\n[[grid]]\nlr = "1e-4..1e-1"\n[[grid]]\nreg = [1, 2]')
    with pytest.raises(ConfigError, match=r"a search has one \[\[grid\]\], got 2"):
        space_of("adding", Path("a.toml"), [])


RULE = """
import os
from dataclasses import dataclass
from tpext.rules import RegularizedInverse

@dataclass(frozen=True)
class Troubled(RegularizedInverse):
    def feedback(self, weight_hh, *owned):
        if not os.path.exists("mended"):
            raise RuntimeError("the disk is full")
        return super().feedback(weight_hh, *owned)
"""


def test_draws_that_failed_are_tried_again_and_scored(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text(RULE)
    words = ["sweep", "temporal-order", *FIXED, "--rule", "own.py:Troubled", "--lr", "1e-4..1e-1", "--jobs", "1"]
    assert tpext_command([*words, "--search", "2", "--out", "found"]) == 1
    assert list(pd.read_csv("found/table.csv").state) == ["failed"] * 2
    assert "best of" not in capsys.readouterr().out
    Path("mended").touch()
    assert tpext_command([*words, "--search", "2", "--out", "found"]) == 0
    table = pd.read_csv("found/table.csv")
    assert list(table.state) == ["complete"] * 2
    assert f"best of 2 draws: {table.accuracy.max():.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--lr", "1e-4..1e-1", "--credit", "through_time,local"], "credit"),
        (["--lr", "1e-4..1e-1"], "credit"),
        (["--lr", "1e-3..1e-1", "--credit", "local,through_time", "--reg", "2"], "lr, reg"),
    ],
)
def test_a_search_over_other_options_is_refused(
    here: Path, words: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["sweep", "temporal-order", *FIXED, "--search", "1", "--jobs", "1", "--out", "found"]
    assert tpext_command([*common, "--lr", "1e-4..1e-1", "--credit", "local,through_time"]) == 0
    before = sorted((here / "found/runs").iterdir())
    assert tpext_command([*common, *words]) == 1
    assert f"found holds a search with other values of {names}: pass another --out" in capsys.readouterr().err
    assert sorted((here / "found/runs").iterdir()) == before
