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
