"""Fixtures of all tests, and the marker ``gpu``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

# Before torch loads OpenMP: threads of several workers (pytest -n) wait without keeping the others from the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from benchmark_rows import ROOT, feed_forward, load, suite  # noqa: F401  (fixtures)
from loading import load_module

from tpext.ops import _library

# The assertions of these modules explain themselves as those in tests do.
pytest.register_assert_rewrite("bindings_cases", "comparison", "mlp_cases", "runs", "target_networks")

SHARED = ROOT.parent / "shared"
NO_GPU = "needs a CUDA device, and torch sees none"
NO_EMULATION = "needs TPEXT_EMULATED_MODULE, the path of the module that TPEXT_CUDA_EMULATION=ON builds"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_GPU in str(report.longrepr)]
    terminalreporter.write_line(f"gpu tests skipped: {len(skipped)}" + (f" ({NO_GPU})" if skipped else ""))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Hide the variable that names the test: the processes of a sweep serve the next one only with equal variables."""
    name = os.environ.pop("PYTEST_CURRENT_TEST", None)
    try:
        return (yield)  # type: ignore[return-value]
    finally:
        if name is not None:
            os.environ["PYTEST_CURRENT_TEST"] = name


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state of torch, so that its outcome does not depend on the others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_thread_count() -> Iterator[None]:
    """Undo what a test does to torch's thread count."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates and does not write shows: torch fills it with NaN, integers with their maximum."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def unrendered(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures are made but not rendered, most of the time of a small run, except in tests marked ``renders``."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("renders"):
            patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(b"\x89PNG"))
        yield


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """The native module whose CUDA kernels run on the CPU, on tensors there."""
    path = os.environ.get("TPEXT_EMULATED_MODULE")
    if not path:
        pytest.skip(NO_EMULATION)
    with pytest.MonkeyPatch.context() as patch:
        # It has one instruction set, whichever the CPU's kernels are tested with.
        patch.delenv("TPEXT_CPU_CAPABILITY", raising=False)
        return load_module("_C_emulated", path)


@pytest.fixture
def emulation(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Tensors on the CPU take the ops' CUDA path, down to the kernels of the emulated module."""
    for module in [module for name, module in sys.modules.items() if name.startswith("tpext.")]:
        for name, replacement in [
            ("_C", emulated_module),
            ("on_cuda", lambda tensor: True),
            ("stream_of", lambda tensor: 0),
        ]:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    plans = (_library.rnn_plan, _library.gated_plan)
    for plan in plans:
        plan.cache_clear()
    yield emulated_module
    for plan in plans:
        plan.cache_clear()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "emulated"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device whose tensors take the CUDA path: a GPU, or the CPU under ``emulation``."""
    if request.param == "cuda":
        return torch.device("cuda")
    request.getfixturevalue("emulation")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and figures kept beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder 'shared' is not beside the repository")
    return SHARED
