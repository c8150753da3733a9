"""The code on the pages of docs/ runs as it stands."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from tpext.experiments.commands import run as tpext_command
from tpext.experiments.sweep_plan import grid_of_arguments, plan, read_file

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ["own-rules.md", "own-tasks.md", "sweeps.md"]


def blocks_of(page: str, language: str) -> list[str]:
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    return blocks


@pytest.mark.skipif(not DOCS.is_dir(), reason="no folder docs beside the tests")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page, "python")
    monkeypatch.chdir(tmp_path)
    if page == "sweeps.md":  # it reads what its first command makes, here of fewer runs
        small = ["--length", "12", "--iterations", "3", "--hidden-size", "4", "--test-size", "50", "--jobs", "1"]
        assert tpext_command(["sweep", "adding", "--rule", "backprop", "--lr", "1e-3,1e-2", *small]) == 0
    # as a module: classes that stand in it can be pickled
    name = "page_" + Path(page).stem.replace("-", "_")
    (tmp_path / f"{name}.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module(name)


@pytest.mark.skipif(not DOCS.is_dir(), reason="no folder docs beside the tests")
def test_the_sweeps_of_a_page_are_sweeps(tmp_path: Path) -> None:
    """The file of docs/sweeps.md, and its commands that need no file."""
    file = tmp_path / "mine.toml"
    file.write_text(blocks_of("sweeps.md", "toml")[0])
    task, grids = read_file(file)
    assert len(plan(task, grids)[0]) == 5 * (2 + 3)
    command = blocks_of("sweeps.md", "")[0].split()
    assert command[:3] == ["tpext", "sweep", "adding"]
    assert len(plan("adding", [grid_of_arguments(command[3:])])[0]) == 5 * 4 * (1 + 3)
