"""Every script in examples/ runs and learns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# What each is to reach in how many epochs or steps; chance is a half at most.
LEAST = {
    "own_feedback_trainer": (200, 0.9),
    "own_layer_rule": (200, 0.9),
    "own_module_feedback": (5, 0.8),
    "own_network_rule": (200, 0.9),
    "own_recurrent_rule": (400, 0.9),
}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="no folder examples beside the tests")
def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(LEAST)


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="no folder examples beside the tests")
@pytest.mark.parametrize("name", LEAST)
def test_example(name: str) -> None:
    if name == "own_module_feedback":
        pytest.importorskip("sklearn")
    duration, accuracy = LEAST[name]
    assert load(name).main(duration) >= accuracy
