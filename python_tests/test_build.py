"""What a build says that cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest
from loading import load_module

pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parents[1]
NEEDED = "tpext: the build needs a C++20 compiler, such as GCC 12, which CXX may name; "


@pytest.fixture
def build() -> ModuleType:
    """The module setup.py, which builds nothing when it is imported."""
    if not (ROOT / "setup.py").exists() or shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs a checkout, cmake and ninja")
    return load_module("tpext_setup", ROOT / "setup.py")


def refusal(build: ModuleType, folder: Path, *options: str) -> str:
    """The last line of a configuration that fails."""
    with pytest.raises(SystemExit) as caught:
        build.configure([build.find("cmake"), "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja", *options])
    return str(caught.value)


@pytest.mark.parametrize("name", ["/bin/false", "nonexistent"])
def test_a_wrong_compiler(name: str, build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", name)
    assert refusal(build, tmp_path) == f"{NEEDED}CXX={name} does not work"


def test_no_compiler(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("cmake", "ninja"):
        (tmp_path / program).symlink_to(build.find(program))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert refusal(build, tmp_path) == f"{NEEDED}none was found"


def test_a_compiler_without_cxx20(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a compiler")
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-std=*2[0a]*) exit 1;; esac\nexec {compiler} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    assert refusal(build, tmp_path).startswith(f"{NEEDED}got {old} (")


def test_what_cmake_alone_refuses(build: ModuleType, tmp_path: Path) -> None:
    wrong = refusal(build, tmp_path, "-DTPEXT_CUDA=perhaps")
    assert wrong == "tpext: TPEXT_CUDA must be auto, on or off, got 'perhaps'"
    missing = f"-DPython_EXECUTABLE={tmp_path / 'python'}"
    assert refusal(build, tmp_path, "-DTPEXT_CUDA=off", missing) == (
        "tpext: CMake could not configure the build; its error stands above"
    )


def test_a_missing_program(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="tpext: no ninja in PATH, which the build needs"):
        build.find("ninja")
