"""Runs with code of a user's, read where that code and its data are not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import image_runs
import numpy as np
import pandas as pd
import pytest
from joblib.externals.loky import get_reusable_executor

from tpext.experiments import make_config, own
from tpext.experiments.cli import main as tpext_command
from tpext.experiments.figures import draw_comparison, draw_run
from tpext.experiments.image_folder import ImageFolder
from tpext.experiments.progress import describe
from tpext.experiments.run_folder import RunError, RunFolder
from tpext.experiments.runs import differing, load_metrics, load_model, load_runs
from tpext.experiments.saved_config import chance_of

MINE = """
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpext.tasks import Samples, StoredTask, option


@dataclass(frozen=True)
class Readings(StoredTask):
    file: str = option("readings.npz", "Where they are.")
    scale: float = 1.0

    def load(self):
        arrays = np.load(Path(__file__).parent / self.file)
        return Samples.split(self.scale * arrays["x"], arrays["y"])
"""

OWN = """
from dataclasses import dataclass

from tpext.rules import RecurrentRule


@dataclass(frozen=True)
class Leaky(RecurrentRule):
    slope = "derivative"
    leak: float = 0.2
    credit: str = "local"

    def feedback(self, weight_hh, *owned):
        return (1 - self.leak) * weight_hh
"""

FIXED = ["--hidden-size", "8", "--batch-size", "10", "--epochs", "1", "--threads", "1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    (folder / "own.py").write_text(OWN)
    x = np.random.default_rng(1).normal(size=(100, 5, 2)).astype(np.float32)
    np.savez(folder / "readings.npz", x=x, y=(x[:, 0, 0] > 0).astype(np.int64))
    monkeypatch.chdir(folder)
    return folder


def sweep(*arguments: str) -> None:
    rules = ["--rule", "own.py:Leaky,regularized-inverse", "--rule-options", "leak=0.1,0.3"]
    words = ["sweep", "mine.py:Readings", *rules, *FIXED, "--jobs", "1", "--stack", "1", "--out", "all"]
    assert tpext_command([*words, *arguments]) == 0


def move(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Move the runs to where nothing else is, as from a cluster to a laptop."""
    there = here.parent / "laptop"
    there.mkdir()
    shutil.move(here / "all", there / "all")
    shutil.rmtree(here)
    monkeypatch.chdir(there)
    return there


def test_tables_are_the_same_without_code_and_data(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep("--task-options", "scale=2")
    runs, metrics = load_runs("all"), load_metrics("all")
    for run in map(RunFolder, runs.folder):
        config = run.read_config()
        assert config is not None
        saved = run.read_saved()
        # of the code itself, which is here
        assert list(saved.options().items()) == list(config.options().items())
        assert (saved.title, saved.chance) == (config.title, chance_of(config.task)) == (config.title, 0.5)
    move(here, monkeypatch)
    pd.testing.assert_frame_equal(load_runs("all"), runs)
    pd.testing.assert_frame_equal(load_metrics("all"), metrics)
    assert set(runs["rule_options.leak"].dropna()) == {0.1, 0.3}
    assert set(runs["task_options.scale"]) == {2.0}
    assert {"rule", "rule_options.leak"} <= set(differing(runs))
    assert "reverse_lr" not in runs
    # a sweep that is complete needs neither
    table = Path("all/table.csv")
    before = table.read_text()
    table.unlink()
    assert tpext_command(["sweep", "all"]) == 0
    assert table.read_text() == before


def test_figures_are_the_same_without_code_and_data(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep()
    folders = sorted(path.parent for path in Path("all").rglob("config.json"))
    before = [folder / "curve.png" for folder in folders]
    pictures = [path.read_bytes() for path in before]
    compared = draw_comparison({"all": "all"}, here.parent / "before.png").read_bytes()
    assert tpext_command(["compare", "all", "--out", str(here.parent / "labels.png")]) == 0
    labels = (here.parent / "labels.png").read_bytes()
    move(here, monkeypatch)
    assert [draw_run(folder).read_bytes() for folder in folders] == pictures
    assert draw_comparison({"all": "all"}, "after.png").read_bytes() == compared
    assert tpext_command(["compare", "all", "--out", "labels.png"]) == 0
    assert Path("labels.png").read_bytes() == labels
    # a trained network needs both
    with pytest.raises(Exception, match=r"mine\.py"):
        load_model(folders[0])
    capsys.readouterr()


def test_tables_do_not_import_code(here: Path) -> None:
    sweep()
    for name in ("mine.py", "own.py"):
        Path(name).write_text("raise RuntimeError('imported')")
    runs = RunFolder(load_runs("all").folder[0])
    assert runs.read_saved().options()["task"] == "mine.py:Readings"


def test_a_path_in_place_of_an_old_name_is_not_imported(tmp_path: Path) -> None:
    config = make_config("adding").to_dict()
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    old = {"length": None, "chunk": None, "train_size": None, "order": None}
    config |= {"task": f"{tmp_path / 'evil.py'}:X", **old}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="not the configuration of a run"):
        load_runs(tmp_path / "run")
    assert tpext_command(["sweep", str(tmp_path)]) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("declared", ["default=None, init=False", "default=None, compare=False", "init=False"])
def test_what_a_task_keeps_beside_its_options_is_in_no_header(here: Path, declared: str) -> None:
    kept = f"    kept: object = field({declared})\n\n    def __post_init__(self):\n"
    kept += "        object.__setattr__(self, 'kept', np.ones(3))\n\n    def load"
    text = MINE.replace("import dataclass\n", "import dataclass, field\n").replace("    def load", kept)
    Path("kept.py").write_text(text)
    assert "kept" not in describe(make_config("kept.py:Readings")).removeprefix("kept.py:Readings")


def test_processes_of_a_sweep_import_from_their_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helped = OWN.replace("from dataclasses", "import helper\nfrom dataclasses", 1)
    helped = helped.replace("return ", "open('log', 'w').write(helper.NAME)\n        return ")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(helped)
        (tmp_path / name / "helper.py").write_text(f"NAME = {name!r}\n")
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.delitem(sys.modules, "helper", raising=False)
        words = ["--length", "10", "--iterations", "2", "--test-size", "20", *FIXED[:4]]
        rule = ["--rule", "own.py:Leaky", "--jobs", "1", "--out", "all"]
        assert tpext_command(["sweep", "temporal-order", *words, *rule]) == 0
        assert Path("log").read_text() == name


def test_runs_of_an_earlier_version_are_read_without_code(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They say nothing of the code, such as the number of steps."""
    sweep()
    runs = load_runs("all")
    for path in Path("all").rglob("config.json"):
        values: dict[str, Any] = json.loads(path.read_text())
        assert values.pop("own")["title"].endswith(" 2 classes, T=5")
        path.write_text(json.dumps(values))
    # beside one of this version
    shutil.copytree(runs.folder[0], "new")
    run = RunFolder("new")
    config = run.read_config()
    assert config is not None
    run.write_config(config)
    shutil.move("new", "all/new")
    move(here, monkeypatch)
    found = load_runs("all/runs")
    leaky = found.rule == "own.py:Leaky"
    # whether these learn is not known
    assert found.reverse_lr.notna().tolist() == leaky.tolist()
    pd.testing.assert_frame_equal(found.drop(columns="reverse_lr"), runs)
    saved = RunFolder(runs.folder[0]).read_saved()
    assert (saved.title, saved.chance) == ("mine.py:Readings", None)
    draw_comparison({"all": "all/runs"}, "after.png")
    draw_comparison({"all": "all"}, "both.png")


def test_a_run_of_an_own_rule_on_a_task_of_ours_is_compared_with_others(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--hidden-size", "8", "--iterations", "3", "--test-size", "20", "--threads", "1"]
    assert tpext_command(["train", "temporal-order", "--rule", "own.py:Leaky", *words, "--out", "all/own"]) == 0
    assert tpext_command(["train", "temporal-order", *words, "--out", "all/ours"]) == 0
    path = Path("all/own/config.json")
    whole = json.loads(path.read_text())
    for values in (whole, {name: value for name, value in whole.items() if name != "own"}):
        path.write_text(json.dumps(values))
        own, ours = (RunFolder(Path("all") / name).read_saved() for name in ("own", "ours"))
        assert (own.title, own.chance) == (ours.title, ours.chance) == ("temporal-order, T=60", 0.25)
    move(here, monkeypatch)
    draw_comparison({"all": "all"}, "after.png")


def test_a_file_that_is_not_there_has_no_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a user's own.py, as there is one in the package."""
    Path("own.py").unlink()
    assert tpext_command(["train", "adding", "--rule", "own.py:Leaky"]) == 1
    err = capsys.readouterr().err
    assert "own.py cannot be imported: FileNotFoundError" in err
    assert "(line" not in err
    Path("own.py").write_text("\n\n1 / 0\n")
    assert tpext_command(["train", "adding", "--rule", "own.py:Leaky"]) == 1
    assert "ZeroDivisionError: division by zero (line 3)" in capsys.readouterr().err


def test_own_images_and_rules_of_them_are_read_without_code(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own.py").write_text(image_runs.OWN)
    words = [
        "--dataset",
        "own.py:stripes",
        "--network",
        "mlp",
        "--channels",
        "4",
        "4",
        "--epochs",
        "1",
        "--batch-size",
        "5",
    ]
    command = [
        "train",
        "images",
        *words,
        "--rule",
        "own.py:Signs",
        "--rule-options",
        "target_step=0.5",
        "--out",
        "all/run",
    ]
    assert tpext_command(command) == 0
    runs, metrics = load_runs("all"), load_metrics("all")
    config = ImageFolder("all/run").read_config()
    assert config is not None
    assert list(ImageFolder("all/run").read_saved().options().items()) == list(config.options().items())
    draw_comparison({"all": "all"}, here.parent / "before.png")
    move(here, monkeypatch)
    pd.testing.assert_frame_equal(load_runs("all"), runs)
    pd.testing.assert_frame_equal(load_metrics("all"), metrics)
    draw_comparison({"all": "all"}, here.parent / "after.png")
    assert (here.parent / "after.png").read_bytes() == (here.parent / "before.png").read_bytes()
    saved = ImageFolder("all/run").read_saved()
    assert (saved.title, saved.evaluated, saved.chance) == ("own.py:stripes, mlp", "validation", 1 / 3)


def test_headers_have_options_of_ones_own_that_are_not_the_defaults(here: Path) -> None:
    plain = make_config("mine.py:Readings", rule="own.py:Leaky")
    changed = make_config(
        "mine.py:Readings", rule="own.py:Leaky", task_options={"scale": 2.0}, rule_options={"leak": 0.5}
    )
    assert "own.py:Leaky (credit local), " in describe(plain)
    assert "scale" not in describe(plain)
    assert "own.py:Leaky (credit local, leak 0.5), " in describe(changed)
    assert ", scale 2.0, T=5, " in describe(changed)


# --- files of a user's that change ------------------------------------------------------------------------------------


def again(text: str, file: str = "own.py") -> None:
    """Write a file anew, as the next command finds it in a process of its own."""
    Path(file).write_text(text)
    get_reusable_executor().shutdown()  # the sweeps' processes
    for name in [name for name in sys.modules if name.startswith(f"_own_{Path(file).stem}_")]:
        del sys.modules[name]
    for known in (own._HASHES, own._FOUND):
        for key in [key for key in known if file in str(key)]:
            del known[key]


CHANGED = "own.py has changed since"


def test_a_sweep_tells_of_a_rule_that_has_changed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep()
    sweep()
    assert CHANGED not in capsys.readouterr().out
    before = load_runs("all")
    again(OWN.replace("(1 - self.leak) * weight_hh", "0 * weight_hh"))
    sweep("--seed", "1,2")
    out = capsys.readouterr().out
    assert f"{CHANGED} 2 of these runs were made; take another --out to run them anew" in out
    # it is not what a run is: none is made again, and those of a new seed are of the file as it is
    after = load_runs("all")
    assert len(after) == 2 * len(before) == 6
    kept = after[after.seed == 1].sort_values("folder")
    assert list(kept.seconds) == list(before.sort_values("folder").seconds)
    sweep("--seed", "2")
    assert CHANGED not in capsys.readouterr().out
    assert tpext_command(["sweep", "all"]) == 0
    assert f"{CHANGED} 2 of these runs" in capsys.readouterr().out


def test_a_run_that_goes_on_tells_of_a_rule_that_has_changed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "mine.py:Readings", "--rule", "own.py:Leaky", *FIXED, "--out", "run", "--resume"]
    assert tpext_command(words) == 0
    assert tpext_command(words) == 0
    assert CHANGED not in capsys.readouterr().out
    again(OWN + "# a comment\n")
    assert tpext_command(words) == 0
    line = f"{CHANGED} this run was made; take another --out to run it anew"
    assert capsys.readouterr().out.splitlines()[:2] == [line, "run is complete already"]
    path = Path("run/config.json")
    values = json.loads(path.read_text())
    del values["own"]
    path.write_text(json.dumps(values))
    assert tpext_command(words) == 0
    assert CHANGED not in capsys.readouterr().out


def test_runs_that_failed_before_a_step_are_those_of_the_mended_rule(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = OWN.replace("return (1", "raise RuntimeError('broken')\n        return (1")
    again(broken)
    words = ["sweep", "mine.py:Readings", "--rule", "own.py:Leaky", *FIXED, "--jobs", "1", "--out", "all"]
    assert tpext_command(words) == 1
    again(OWN)
    assert tpext_command(words) == 0
    assert tpext_command(words) == 0
    assert CHANGED not in capsys.readouterr().out
    again(broken)
    assert tpext_command(words) == 0
    assert f"{CHANGED} 1 of these runs" in capsys.readouterr().out


# --- errors in code of a user's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("own.py", "return (1", "raise RuntimeError('broken')\n        return (1"),
        (
            "mine.py",
            "    def load",
            "    def correct(self, output, target):\n        raise RuntimeError('broken')\n\n    def load",
        ),
    ],
    ids=["backward", "correct"],
)
def test_a_command_that_failed_before_a_step_can_be_given_again(
    here: Path, file: str, before: str, after: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Path(file).read_text()
    assert before in right
    words = ["train", "mine.py:Readings", "--rule", "own.py:Leaky", *FIXED, "--out", "run"]
    again(right.replace(before, after), file)
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    assert tpext_command(words) == 1
    assert "RuntimeError: broken" in capsys.readouterr().err
    assert {path.name for path in Path("run").iterdir()} == {"notes.txt", "lock"}
    again(right, file)
    assert tpext_command(words) == 0
    assert Path("run/notes.txt").read_text() == "mine"


def test_an_error_after_a_step_leaves_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = "calls = []\n" + OWN.replace(
        "return (1",
        "calls.append(1)\n        if len(calls) > 3:\n            raise RuntimeError('late')\n        return (1",
    )
    again(count)
    words = ["train", "mine.py:Readings", "--rule", "own.py:Leaky", *FIXED, "--out", "run"]
    assert tpext_command([*words, "--checkpoint-interval", "1"]) == 1
    assert "RuntimeError: late" in capsys.readouterr().err
    assert RunFolder("run").config.exists()
    assert RunFolder("run").checkpoint.exists()
    assert tpext_command(words) == 1
    assert "already holds a run" in capsys.readouterr().err
