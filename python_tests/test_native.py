"""The native code below the module's entries: its tools, the check of its objects, what it asks of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tpext import _C

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
@pytest.mark.parametrize("check", ["lanes_without_numbers", "columns_of_a_team", "rows_of_a_team", "barrier"])
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
        # CMake breaks lines where the length of a path has it
        assert message in " ".join(finished.stderr.split())


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_least_quota_of_a_process_s_groups_counts(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:memory:/job\n0::/job/worker\n")
    mount = tmp_path / "two"
    write(mount / "job" / "worker", cpu__max="max 100000")
    assert _C.quota_processors(str(membership), str(mount), 64) == 64
    (mount / "job" / "cpu.max").write_text("350000 100000\n")
    assert _C.quota_processors(str(membership), str(mount), 64) == 3
    (mount / "job" / "worker" / "cpu.max").write_text("20000 100000\n")
    assert _C.quota_processors(str(membership), str(mount), 64) == 1
    assert _C.quota_processors(str(tmp_path / "none"), str(mount), 64) == 64


def test_a_control_group_without_a_name_is_refused() -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.quota_processors(None, "/sys/fs/cgroup", 64)


def test_quotas_of_control_groups_of_version_1(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    # As within a container: the path is the host's, and the group is mounted as the root.
    membership.write_text("3:cpuacct,cpu:/docker/0123\n2:cpuset:/docker/0123\n")
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert _C.quota_processors(str(membership), str(tmp_path), 64) == 64
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    assert _C.quota_processors(str(membership), str(tmp_path), 64) == 2


@needs_linux
def test_processors_are_those_of_the_affinity_mask() -> None:
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert _C.usable_processors() == 1
    finally:
        os.sched_setaffinity(0, everything)
    assert 1 <= _C.usable_processors() <= len(everything)


@needs_linux
def test_a_team_gives_the_same_bits_on_a_busy_machine() -> None:
    """Members that wait for a processor dissolve their team in the middle of a scan."""
    hidden, time = 256, 300
    weight = torch.randn(1, hidden, hidden) / hidden**0.5
    x_proj, h0, grad = torch.randn(1, time, 1, hidden), torch.randn(1, 1, hidden), torch.randn(1, time, 1, hidden)

    def run() -> list[torch.Tensor]:
        states = torch.ops.tpext.rnn_scan(x_proj, h0, weight, None, [False], "tanh")
        back = torch.ops.tpext.rnn_scan_backward(grad, states, weight, None, [False], "tanh")
        # a team of which each computes some columns, and one of which each computes some rows
        found = [states, *back]
        for rows in (1, 4):
            arrays = (array.view(1, -1, rows, hidden) for array in (grad, x_proj, states))
            found += torch.ops.tpext.rnn_layer_backward(
                *arrays, torch.zeros(1, rows, hidden), weight, weight, weight, None, None, [False], "tanh",
                "linearized", "through_time", 1.0, 1e-3, "derivative", 0.0, 1.0, 1.0, False, [True] * 4,
            )  # fmt: skip
        return found

    threads = torch.get_num_threads()
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(4)
        for _ in range(20):
            assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(threads)
        for process in busy:
            process.kill()
            process.wait()


@needs_linux
@pytest.mark.parametrize("wanted", ["0", "1"])
def test_huge_pages_are_left_alone_on_demand(wanted: str, tmp_path: Path) -> None:
    program = (
        "import torch, tpext; result = tpext.ops.counter_normal([2048, 2048], seed=0, step=0, stream=0)\n"
        "print(sum('VmFlags' in line and ' hg' in line for line in open('/proc/self/smaps')))"
    )
    environment = os.environ | {"TPEXT_HUGE_PAGES": wanted}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    if wanted == "1" and int(finished.stdout) == 0:
        pytest.skip("this system takes no advice on huge pages")
    assert (int(finished.stdout) > 0) == (wanted == "1")
