"""Every example in a docstring of the package runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import tpext

MODULES = sorted(m.name for m in pkgutil.walk_packages(tpext.__path__, "tpext.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", ["tpext", *(name for name in MODULES if name != "tpext._C")])
def test_examples(name):
    module = importlib.import_module(name)
    outcome = doctest.testmod(module, extraglobs={"tpext": tpext})
    assert outcome.failed == 0, f"{outcome.failed} of {outcome.attempted} examples failed, see the output"


def test_public_names_have_examples_or_descriptions():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES if name.startswith("tpext.rules.")]
    with_examples = {t.name.rpartition(".")[2] for module in modules for t in finder.find(module) if t.examples}
    assert {"Backprop", "RegularizedInverse", "LearnedInverse", "DifferenceTargets", "Targets"} <= with_examples
    assert all(getattr(tpext, name).__doc__ for name in tpext.__all__ if name != "__version__")
    assert all(getattr(tpext.ops, name).__doc__ for name in tpext.ops.__all__)
    assert {"act_inverse", "act_displacement", "hot_target", "n_hot", "running_accuracy"} <= set(tpext.ops.__all__)
