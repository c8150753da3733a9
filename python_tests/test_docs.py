"""The code in README.md and on the pages of docs/ runs as it stands, and the reference has every public name."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tpext
from tpext.experiments import make_config
from tpext.experiments.commands import Compare, Info, Tasks
from tpext.experiments.commands import run as tpext_command
from tpext.experiments.feedback_figures import FigureCommand
from tpext.experiments.image_commands import TrainImages
from tpext.experiments.image_defaults import make_image_config
from tpext.experiments.recipes import RECIPES
from tpext.experiments.reproduce_command import Reproduce
from tpext.experiments.sweep_command import Sweep
from tpext.experiments.sweep_plan import grid_of_arguments, plan, read_file
from tpext.experiments.sweep_search import space_of
from tpext.experiments.train_command import Train

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
REFERENCE = {
    "nn": ["tpext.nn", "tpext.nn.networks"],
    "rules": ["tpext.rules"],
    "feedback": ["tpext.feedback"],
    "ops": ["tpext.ops"],
    "optim": ["tpext.optim"],
    "diagnostics": ["tpext.diagnostics"],
    "tasks": ["tpext.tasks"],
    "experiments": ["tpext.experiments"],
    "testing": ["tpext.testing"],
}

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="no folder docs beside the tests")


def blocks_of(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


WITH_CODE = [page for page in PAGES if page.is_file() and blocks_of(page, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "sweeps.md":  # it reads what its first command makes, here of fewer runs
        small = ["--length", "12", "--iterations", "3", "--hidden-size", "4", "--test-size", "50", "--jobs", "1"]
        assert tpext_command(["sweep", "adding", "--rule", "backprop", "--lr", "1e-3,1e-2", *small]) == 0
    # as a module: classes that stand in it can be pickled
    name = "page_" + page.stem.replace("-", "_")
    (tmp_path / f"{name}.py").write_text("\n\n".join(blocks_of(page, "python")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module(name)


@pytest.mark.slow
def test_the_script_for_several_processes_runs_in_two(tmp_path: Path) -> None:
    (script,) = blocks_of(DOCS / "distributed.md", "python")
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tpext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_sweeps_of_a_page_are_sweeps(tmp_path: Path) -> None:
    """The file of docs/sweeps.md, and its commands that need no file."""
    file = tmp_path / "mine.toml"
    file.write_text(blocks_of(DOCS / "sweeps.md", "toml")[0])
    task, grids = read_file(file)
    assert len(plan(task, grids)[0]) == 5 * (2 + 3)
    command = blocks_of(DOCS / "sweeps.md", "")[0].split()
    assert command[:3] == ["tpext", "sweep", "adding"]
    assert len(plan("adding", [grid_of_arguments(command[3:])])[0]) == 5 * 4 * (1 + 3)


def commands_of(page: Path) -> list[str]:
    """Its command lines ``tpext ...``; those of a table of options are what stands above it, with each option."""
    text = page.read_text()
    lines = "".join(FENCE.findall(text)).replace("\\\n", " ")
    found = re.findall(r"(?:^|&& )(tpext .*)", lines, re.MULTILINE)
    found += re.findall(r"`!?(tpext [a-z][^`]*)`", FENCE.sub("", text))
    for section in text.split("\n## "):
        for above in re.findall(r"By `(tpext train [^`]*)`", section):
            found.remove(above)  # without an option it need not be a run
            for line in re.findall(r"^\| .*\|$", section, re.MULTILINE):
                base = above.replace(" --preset published", "") if "without a published preset" in line else above
                found += [f"{base} {options}" for options in re.findall(r"`(--(?:rule|network) [^`]*)`", line)]
    # a command's name and a part of a command are no command lines
    part = re.compile(r"tpext (?:train|sweep|compare|figure)(?: --.*)?|.*\.\.\. ?.*")
    return [line for line in dict.fromkeys(found) if not part.fullmatch(line.partition("#")[0].strip())]


PLACEHOLDERS = {"TASK": "temporal-order", "DIR": ".", "FILE": "text.txt", "NAME": "long-range", "N": "1"}
COMMANDS = (Train, TrainImages, Sweep, Reproduce, Compare, FigureCommand, Tasks, Info)
OF_THE_PAGE = {"recall"}
"""Tasks that are nowhere but on a page, which says how to make them."""
WITH_COMMANDS = [page for page in [PAGES[0], *sorted(DOCS.rglob("*.md"))] if page.is_file() and commands_of(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own parser reads them, and what they ask for can be; nothing is carried out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    read: list[Any] = []
    for kind in COMMANDS:
        monkeypatch.setattr(kind, "carry_out", lambda self, console: read.append(self) or 0)
    for line in commands_of(page):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        if OF_THE_PAGE & set(words):
            continue
        assert tpext_command(words) == 0, line
        if "--help" not in words and not re.search(r"\.py:|\.toml\b", line):  # files that are not there
            check_asked(read.pop())


def check_asked(command: Any) -> None:
    """Raise if no recipe, run or sweep is what a command asks for."""
    if isinstance(command, Reproduce):
        assert command.recipe in {None, *RECIPES}
    elif isinstance(command, Train):
        make_config(**command.given())
    elif isinstance(command, TrainImages):
        make_image_config(**command.given())
    elif isinstance(command, Sweep) and "/" not in command.what:
        if command.search is None:
            grid = grid_of_arguments(command.arguments)
        else:
            space = space_of(command.what, None, command.arguments)
            grid = space.grid(space.first())
        assert plan(command.what, [grid])[0]


# The reference


def entries(page: str) -> list[str]:
    return re.findall(r"^::: (\S+)$", (DOCS / "reference" / f"{page}.md").read_text(), re.MULTILINE)


def public_names(module: ModuleType) -> set[str]:
    """What ``__all__`` says, or the functions and classes that a module without it defines; no modules."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    ]
    names = getattr(module, "__all__", own)
    return {f"{module.__name__}.{name}" for name in names if not inspect.ismodule(getattr(module, name))}


@pytest.mark.parametrize("page", REFERENCE)
def test_the_reference_has_every_public_name_once(page: str) -> None:
    modules = [importlib.import_module(name) for name in REFERENCE[page]]
    found = entries(page)
    assert len(found) == len(set(found))
    assert set().union(*map(public_names, modules)) - set(found) == set()
    for name in found:  # what is no longer there
        owner, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(owner), last), name


def test_the_reference_has_every_name_of_the_package() -> None:
    text = (DOCS / "reference" / "tpext.md").read_text()
    rows = dict(re.findall(r"^\| `(tpext\.\w+)` \| \[([\w.]+)\]\[\] \|$", text, re.MULTILINE))
    for name, canonical in rows.items():
        owner, _, last = canonical.rpartition(".")
        assert getattr(tpext, name.rpartition(".")[2]) is getattr(importlib.import_module(owner), last)
    assert public_names(tpext) - {"tpext.__version__"} == {*rows, *entries("tpext")}


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_the_links_of_what_is_not_on_the_site_resolve(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / path if path else page
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{name}: {link}"


def test_the_page_of_environment_variables_has_them_all() -> None:
    """Those that the sources read and that are the package's own."""
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    for folder in ("tpext", "csrc", "benchmarks", "python_tests"):
        sources += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".sh")]
    read = r"(?:environ(?:\.get\(|\[)|getenv\(|ENV\{)[\"']?(TPEXT_\w+|CUDA\w+|MAX_JOBS|CXX)"
    found = {name for path in sources for name in re.findall(read, path.read_text())}
    assert {"TPEXT_CUDA", "TPEXT_CPU_CAPABILITY", "TPEXT_CUDA_REGIME", "CUDAARCHS"} <= found
    documented = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "environment.md").read_text(), re.MULTILINE))
    assert found - documented == set()
