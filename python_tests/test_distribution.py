"""What is distributed: the source archive, its metadata, and that nothing in it runs code from files of data."""

from __future__ import annotations

import ast
import dataclasses
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch

import tpext
from tpext.experiments.image_folder import ImageFolder
from tpext.experiments.run_folder import CHECKPOINT_FORMAT, RunError, RunFolder
from tpext.tasks import MissingDataError
from tpext.tasks.idx import MNIST, STEMS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(tpext.__file__).parent
VERSION = tpext.__version__.partition("+")[0]

needs_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no checkout around the tests")


@needs_checkout
def test_the_source_archive_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    unwanted = shutil.ignore_patterns(
        ".git*", ".nox", ".*_cache", ".*venv*", "build", "*.egg-info", "*.so", "__pycache__", "runs", "site"
    )
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=unwanted)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=tmp_path / "source",
        capture_output=True,
        text=True,
        check=True,
    )
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        metadata = archive.extractfile(f"tpext-{VERSION}/PKG-INFO").read().decode()
    for folder in ("tpext", "csrc", "python_tests", "benchmarks", "docs", "examples", ".ci"):
        for path in (source / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and "egg-info" not in str(path):
                assert str(path.relative_to(source)) in names
    assert {"LICENSE", "README.md", "CMakeLists.txt", "setup.py", "pyproject.toml", "CITATION.cff"} <= names
    # what CONTRIBUTING.md tells to use
    assert {"CONTRIBUTING.md", "noxfile.py", "mkdocs.yml", ".pre-commit-config.yaml", ".clang-format"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]
    assert {"License-File: LICENSE", "Author: The tpext developers"} <= set(metadata.splitlines())
    # an index page has no files beside it
    assert "# tpext" in metadata
    assert not re.findall(r"!\[|\]\((?!https?:)", metadata)


@needs_checkout
def test_the_citation_has_the_version() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert str(citation["version"]) == VERSION


REFUSED = {
    *("eval", "exec", "os.system", "joblib.load", "marshal.load", "marshal.loads", "pandas.read_pickle", "shelve.open"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.full_load", "yaml.unsafe_load"),
}
"""What runs code that a file or a text has."""
REFUSED_METHODS = {"extractall", "exec_module", "read_pickle"}
"""The same, of an object that the sources do not name."""
ALLOWED = {
    ("tpext/testing.py", "pickle.loads"): "of a rule or a task that it has pickled itself, to see whether it can be",
    ("tpext/tasks/imagenet32.py", "pickle.Unpickler"): "its subclass there refuses all names but those of numbers",
    ("tpext/experiments/own.py", "exec_module"): "of a file that the user names as his rule, task or data set",
}
"""File and what it uses: why it may."""


def unsafe_uses(source: str) -> set[str]:
    """What of the source is refused; names are followed through imports, and a mention counts as a call."""
    nodes = list(ast.walk(ast.parse(source)))
    imported: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def name_of(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{name_of(node.value)}.{node.attr}"
        return imported.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    found = {name_of(node) for node in nodes} & REFUSED
    found |= {node.attr for node in nodes if isinstance(node, ast.Attribute)} & REFUSED_METHODS
    for call in [node for node in nodes if isinstance(node, ast.Call)]:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name_of(call.func) == "torch.load" and given.get("weights_only") != "True":
            found.add("torch.load")
        found |= {f"{name}=" for name in ("allow_pickle", "shell") if given.get(name, "False") != "False"}
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch.load(file, weights_only=True)", set()),
        ("import torch\ntorch.load(file, weights_only=False)", {"torch.load"}),
        ("from torch import load\nload(file)", {"torch.load"}),
        ("import pickle as p\nread = p.load", {"pickle.load"}),
        ("import subprocess\nsubprocess.run(command, shell=True)", {"shell="}),
        ("import numpy as np\nnp.load(file, allow_pickle=mode)", {"allow_pickle="}),
        ("import yaml\nyaml.safe_load(file)\nyaml.load(file)", {"yaml.load"}),
        ("net.eval()\nwith open(file) as archive:\n    archive.extractall()", {"extractall"}),
        ("eval(text)", {"eval"}),
    ],
)
def test_unsafe_uses_are_found(source: str, found: set[str]) -> None:
    assert unsafe_uses(source) == found


def test_no_file_of_data_runs_code() -> None:
    """Checkpoints are loaded as weights alone, pickles by the restricted unpickler, no archive is unpacked."""
    folders = [PACKAGE, ROOT / "benchmarks", ROOT / "examples"]
    files = {path.relative_to(folder.parent): path for folder in folders for path in folder.rglob("*.py")}
    assert len(files) > 100
    found = {(name.as_posix(), use) for name, path in files.items() for use in unsafe_uses(path.read_text())}
    assert found == set(ALLOWED)


@needs_checkout
def test_all_lists_of_pythons_are_the_same() -> None:
    """Classifiers, the wheels of the public CI and those of .ci/wheels; the oldest is ``requires-python``."""
    project = (ROOT / "pyproject.toml").read_text()
    classifiers = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', project)
    (cibuildwheel,) = re.findall(r'^build = "cp3\{([\d,]+)\}-', project, re.MULTILINE)
    (wheels,) = re.findall(r"^  for minor in ([\d ]+); do$", (ROOT / ".ci" / "wheels").read_text(), re.MULTILINE)
    assert classifiers == cibuildwheel.split(",") == wheels.split()
    assert f'requires-python = ">=3.{classifiers[0]}"' in project


class MakeFolder:
    """Unpickled without a guard, makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "made"
    state = {"format": CHECKPOINT_FORMAT, "iteration": MakeFolder(made)}
    for name, read in (
        ("checkpoint.pt", RunFolder(tmp_path).load_checkpoint),
        ("best.pt", ImageFolder(tmp_path).load_best),
    ):
        torch.save(state, tmp_path / name)
        with pytest.raises(RunError, match=rf"{name}: not a readable checkpoint \(UnpicklingError\)"):
            read()
        assert not made.exists()
    torch.load(tmp_path / "best.pt", weights_only=False)
    assert made.exists(), "the file would have made it"


def test_a_download_with_a_wrong_sum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin, cache = tmp_path / "origin", tmp_path / "cache"
    origin.mkdir()
    (origin / f"{STEMS[0]}.gz").write_bytes(b"another file")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(origin))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *message: None)
    monkeypatch.setenv("TPEXT_DATA", str(cache))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            mirror = f"http://127.0.0.1:{server.server_port}/"
            with pytest.raises(MissingDataError, match=rf"download failed \({mirror}{STEMS[0]}\.gz: ValueError\)"):
                dataclasses.replace(MNIST, mirrors=(mirror,)).load(None)
        finally:
            server.shutdown()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_one_openmp_runtime(tmp_path: Path) -> None:
    script = Path(__file__).with_name("openmp_runtimes.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_checkout
def test_what_is_run_for_contributors_is_there() -> None:
    """Workflows, hooks and forms are valid YAML, and name sessions and programs that there are."""
    yaml = pytest.importorskip("yaml")
    if not (ROOT / ".github").exists():
        pytest.skip("a source archive")
    files = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").rglob("*.yml")}
    for name in ("bug.yml", "idea.yml"):
        assert {"name", "description", "body"} <= set(files[name])
    sessions = set(re.findall(r"@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text()))
    assert len(sessions) == 6
    steps = [step for job in files["ci.yml"]["jobs"].values() for step in job["steps"]]
    asked = [run.split()[2:] for run in (step.get("run", "") for step in steps) if run.startswith("nox -s ")]
    assert len(asked) == 4
    assert {name for names in asked for name in names} <= sessions
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lint = re.search(r"^lint = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert {hook["entry"].split()[0] for hook in hooks["hooks"]} == {"clang-format", "mypy", "ruff"}
    assert all(f'"{program}==' in lint for program in ("clang-format", "mypy", "ruff", "pre-commit"))
