"""Fixtures of all tests, and the marker ``gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The assertions of this module explain themselves as those in tests do.
pytest.register_assert_rewrite("comparison")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
NO_GPU = "needs a CUDA device, and torch sees none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_GPU in str(report.longrepr)]
    terminalreporter.write_line(f"gpu tests skipped: {len(skipped)}" + (f" ({NO_GPU})" if skipped else ""))


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


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and figures kept beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder 'shared' is not beside the repository")
    return SHARED
