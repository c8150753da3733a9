"""The native code below the module's entries: its tools, the check of its objects, what it asks of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ on PATH")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux")


@pytest.fixture(scope="session")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of native_checks.cpp."""
    program = tmp_path_factory.mktemp("native") / "checks"
    flags = ["-std=c++20", "-O1", "-ffp-contract=fast", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-pthread"]
    source = [f"-I{ROOT / 'csrc'}", str(ROOT / "python_tests" / "native_checks.cpp")]
    subprocess.run([str(COMPILER), *flags, *source, "-o", str(program)], check=True, timeout=300)
    return program


@needs_compiler
@pytest.mark.parametrize("check", ["lanes_without_numbers"])
def test_tools(checks: Path, check: str) -> None:
    finished = subprocess.run([str(checks), check], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@needs_compiler
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("nm")), reason="no cmake or nm on PATH")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("namespace { template <class T> T twice(T x) { return x + x; } } float f(float x) { return twice(x); }", None),
        (
            "template <class T> [[gnu::noinline]] T twice(T x) { return x + x; } float f(float x) { return twice(x); }",
            "weak",
        ),
        ("namespace tpext { void g(); } void f() { tpext::g(); }", "uses what no source defines"),
    ],
    ids=["fine", "weak", "missing"],
)
def test_objects_with_shared_or_missing_functions_fail_the_build(
    source: str, message: str | None, tmp_path: Path
) -> None:
    (tmp_path / "source.cpp").write_text(source)
    object_, module = str(tmp_path / "source.o"), str(tmp_path / "module.so")
    subprocess.run([str(COMPILER), "-fPIC", "-c", str(tmp_path / "source.cpp"), "-o", object_], check=True, timeout=60)
    subprocess.run([str(COMPILER), "-shared", object_, "-o", module], check=True, timeout=60)
    script = str(ROOT / "csrc" / "check_symbols.cmake")
    command = ["cmake", "-DNM=nm", f"-DOBJECTS={object_}", f"-DMODULE={module}", "-P", script]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (finished.returncode == 0) == (message is None), finished.stderr
    if message is not None:
        assert message in finished.stderr


@needs_linux
@pytest.mark.parametrize("wanted", ["0", "1"])
def test_huge_pages_are_left_alone_on_demand(wanted: str) -> None:
    program = (
        "import torch, tpext; result = tpext.ops.counter_normal([2048, 2048], seed=0, step=0, stream=0)\n"
        "print(sum('VmFlags' in line and ' hg' in line for line in open('/proc/self/smaps')))"
    )
    environment = os.environ | {"TPEXT_HUGE_PAGES": wanted}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    if wanted == "1" and int(finished.stdout) == 0:
        pytest.skip("this system takes no advice on huge pages")
    assert (int(finished.stdout) > 0) == (wanted == "1")
