"""Drives CMake. Sources and compiler flags stand in CMakeLists.txt, metadata in pyproject.toml."""

from __future__ import annotations

import os
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


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        ninja = shutil.which("ninja")
        if ninja is None:
            raise SystemExit("tpext: no ninja in PATH, which the build needs")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            # Given each time: pip's isolated environment is gone by the next build, CMake's cache of it is not.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DTPEXT_VERSION={self.distribution.get_version()}",
            f"-DTPEXT_COMMIT={commit()}",
            f"-DTPEXT_CUDA={os.environ.get('TPEXT_CUDA') or 'auto'}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["cmake", "--build", str(build), *(["--parallel", jobs] if jobs else [])], check=True)


setup(ext_modules=[Extension("tpext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
