"""What is distributed: the source archive, its metadata, and that nothing in it runs code from files of data."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import tpext

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(tpext.__file__).parent

needs_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no checkout around the tests")


@needs_checkout
def test_the_source_archive_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "runs", "site")
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
    for folder in ("tpext", "csrc", "python_tests", "benchmarks", "docs", "examples"):
        for path in (source / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and "egg-info" not in str(path):
                assert str(path.relative_to(source)) in names
    assert {"LICENSE", "README.md", "CMakeLists.txt", "setup.py", "pyproject.toml", "CITATION.cff"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@needs_checkout
def test_the_citation_has_the_version() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert str(citation["version"]) == tpext.__version__.partition("+")[0]


def test_no_file_of_data_runs_code() -> None:
    """Checkpoints are loaded as weights alone, pickles by the restricted unpickler, no archive is unpacked."""
    unsafe = re.compile(r"pickle\.loads?\(|Unpickler\((?!file|pickle\.Unpickler)|allow_pickle=True|extractall")
    loads = 0
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, path
            loads += 1
        assert not re.search(r"yaml\.(unsafe_|full_)?load\(", text), path
        # that module pickles rules itself, to see whether they can be
        assert path.name == "testing.py" or not unsafe.search(text), path
    assert loads >= 2
