"""Races of the kernels, and memory beside arrays in random calls of the bindings, by sanitizers and fences."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import fuzz_bindings
import pytest
from loading import load_module

from tpext import _C

ROOT = Path(__file__).parents[1]
# Threads and S, T, B, H: teams of several threads for each row, which share its columns; rows for each thread; a stack
# of both directions; teams that go through tiles of time; a backward pass by whole arrays.
CALLS = [
    (2, (1, 60, 1, 128)),
    (4, (1, 60, 1, 128)),
    (3, (1, 40, 3, 130)),
    (4, (2, 24, 19, 100)),
    (3, (3, 7, 90, 33)),
    (2, (1, 150, 2, 96)),
    (4, (1, 150, 2, 96)),
    (3, (1, 2, 200, 160)),
]
REPORTED = 66


# Those of the program that counts instructions, which is the one that runs here.
KERNELS = load_module("instructions", ROOT / "benchmarks" / "instructions.py").KERNELS
RECURRENT = [kernel for kernel in KERNELS if re.match("gru|lstm|rnn", kernel) and kernel != "rnn_weight_gradients"]
WITH_BARRIERS = [*RECURRENT, "kaczmarz_step", "regularized_inverse"]
ON_ONE_THREAD = ["kaczmarz_train"]


def built(sanitizers: str, *options: str) -> Path:
    """The folder of a build of the kernels with sanitizers, or a skip where this machine cannot run one."""
    compiler = shutil.which("g++")
    if sys.platform != "linux" or not (compiler and shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("needs Linux, g++, cmake and ninja")
    folder = ROOT / "build" / sanitizers.replace(",", "_")
    folder.mkdir(parents=True, exist_ok=True)
    # Workers of pytest -n share the folder, its first program too: what runs while another writes it looks like a skip.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(str(compiler), folder, sanitizers, *options)
    return folder


def build(compiler: str, folder: Path, sanitizers: str, *options: str) -> None:
    flags = [f"-fsanitize={sanitizers}", "-x", "c++", "-", "-o", str(folder / "empty")]
    empty = subprocess.run([compiler, *flags], input="int main() {}", capture_output=True, text=True, timeout=60)
    if empty.returncode != 0:
        pytest.skip(f"g++ has no -fsanitize={sanitizers}: {empty.stderr}")
    if (empty := run([str(folder / "empty")])).returncode != 0:
        pytest.skip(f"programs with -fsanitize={sanitizers} do not run here: {empty.stderr}")
    # As setup.py does: an earlier build may have been for another Python.
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-U*Python*", "-U*PYTHON*"]
    configure += [f"-DTPEXT_SANITIZERS={sanitizers}"]
    for command in ([*configure, "-DCMAKE_CXX_COMPILER=g++", *options], ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stdout + done.stderr


@functools.cache
def unrandomised() -> list[str]:
    """What runs a program where memory lies as sanitizers expect it: they refuse some random layouts."""
    works = shutil.which("setarch") and subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0
    return ["setarch", "-R"] if works else []


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*unrandomised(), *command]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="session")
def driver() -> Path:
    """The kernels' driver of benchmarks/instructions.cpp under ThreadSanitizer."""
    return built("thread", "-DTPEXT_KERNEL_DRIVER=ON") / "kernel_driver"


def report(driver: Path, kernel: str, threads: int, shape: tuple[int, ...], **environment: str) -> tuple[str, int]:
    """What ThreadSanitizer says of a call, nothing where it found no race; and on how many threads the call ran."""
    command = [str(driver), kernel, str(threads), *map(str, shape)]
    options = f"halt_on_error=1:exitcode={REPORTED}"
    finished = run(command, TSAN_OPTIONS=options, TPEXT_CPU_CAPABILITY="", **environment)
    assert finished.returncode in (0, REPORTED), finished.stderr
    if finished.returncode == REPORTED:
        assert "ThreadSanitizer: data race" in finished.stderr
        return finished.stderr, 0
    return "", int(re.findall(r"up to (\d+) threads", finished.stderr)[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_have_no_race(driver: Path, kernel: str) -> None:
    most = 0
    for threads, shape in CALLS:
        race, used = report(driver, kernel, threads, shape)
        assert race == "", f"{threads} threads, S, T, B, H = {shape}"
        most = max(most, used)
    assert (most > 1) == (kernel not in ON_ONE_THREAD), "a call on one thread has no race to show"


@pytest.mark.parametrize("kernel", WITH_BARRIERS)
def test_a_missing_barrier_is_reported(driver: Path, kernel: str) -> None:
    assert any(report(driver, kernel, *call, TPEXT_UNORDERED="barriers")[0] for call in reversed(CALLS))


@pytest.mark.skipif(
    _C.quota_processors("/proc/self/cgroup", "/sys/fs/cgroup", 2) < 2, reason="no team on one processor"
)
@pytest.mark.parametrize("kernel", RECURRENT)
def test_a_missing_order_within_a_team_is_reported(driver: Path, kernel: str) -> None:
    assert any(report(driver, kernel, *call, TPEXT_UNORDERED="teams")[0] for call in CALLS)


def fuzz(module: Path, calls: int, *options: str, **environment: str) -> None:
    """Random calls of a module's entries: none ends the process, and of each entry for the CPU some return."""
    program = [sys.executable, "-W", "ignore", str(ROOT / "python_tests" / "fuzz_bindings.py")]
    finished = run([*program, str(module), "0", str(calls), *options], **environment)
    last = finished.stdout.strip().rpartition("\n")[2]
    assert finished.returncode == 0, f"the call of entry and seed {last}: {finished.stderr[-8000:]}"
    outcomes = json.loads(last)
    elsewhere = {entry for entry in outcomes if entry.endswith("plan")} | {"gated_projected_scan", "gated_target_scan"}
    for entry in outcomes.keys() - elsewhere:
        assert outcomes[entry].get("returned", 0) > 0, f"{entry}: nothing but errors"


def test_every_entry_is_called() -> None:
    assert {*fuzz_bindings.TENSORS, *fuzz_bindings.PLAIN} == {name for name in dir(_C) if not name.startswith("_")}


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by Linux's mprotect")
def test_random_calls_end_in_a_result_or_an_error() -> None:
    fuzz(Path(_C.__file__), 3000, "fences")


@pytest.mark.slow
def test_random_calls_touch_nothing_beside_their_arrays() -> None:
    """Nor is any of their behaviour undefined."""
    pytest.importorskip("pybind11")
    folder = built("address,undefined", "-DTPEXT_CUDA=off", f"-DPython_EXECUTABLE={sys.executable}")
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    fuzz(
        folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}",
        20000,
        LD_PRELOAD=":".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONMALLOC="malloc",
        TPEXT_CPU_CAPABILITY="",
    )
