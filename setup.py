"""Drives CMake. Sources and compiler flags stand in CMakeLists.txt, metadata in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def commit() -> str:
    """The commit that is built, or "unknown" outside a git checkout."""
    if not (ROOT / ".git").exists():
        return "unknown"
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def configure(command: list[str]) -> None:
    """Run CMake's configuration; where it fails, end with a line that says what is needed."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    sys.stderr.write(done.stderr)
    if done.returncode == 0:
        return
    own = re.search(r"^  tpext: (.*?)\n\n", done.stderr, re.DOTALL | re.MULTILINE)
    if own:
        raise SystemExit("tpext: " + " ".join(own[1].split()))
    if re.search(r"CMAKE_CXX_COMPILER|C\+\+ compiler|environment variable CXX", done.stderr):
        given = f"CXX={os.environ['CXX']} does not work" if os.environ.get("CXX") else "none was found"
        raise SystemExit(f"tpext: the build needs a C++20 compiler, such as GCC 12, which CXX may name; {given}")
    raise SystemExit("tpext: CMake could not configure the build; its error stands above")


def find(program: str) -> str:
    """The path of a program that the build needs."""
    path = shutil.which(program)
    if path is None:
        raise SystemExit(f"tpext: no {program} in PATH, which the build needs")
    return path


def index_page() -> str:
    """README.md for a package index, which has none of the files that it shows and links to."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n?", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cmake = find("cmake")
        options = [
            "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            # What CMake has kept of an earlier Python, which another build in this folder may have been for.
            "-U*Python*", "-U*PYTHON*",
            # Given each time: pip's isolated environment is gone by the next build, CMake's cache of it is not.
            f"-DCMAKE_MAKE_PROGRAM={find('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DTPEXT_VERSION={self.distribution.get_version()}",
            f"-DTPEXT_COMMIT={commit()}",
            f"-DTPEXT_CUDA={os.environ.get('TPEXT_CUDA') or 'auto'}",
        ]  # fmt: skip
        configure([cmake, *options])
        jobs = os.environ.get("MAX_JOBS")
        if subprocess.run([cmake, "--build", str(build), *(["--parallel", jobs] if jobs else [])]).returncode:
            raise SystemExit("tpext: the build failed; the first error above says where")


if __name__ == "__main__":
    setup(
        long_description=index_page(),
        long_description_content_type="text/markdown",
        ext_modules=[Extension("tpext._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
