"""ASFaust, "SLMfun", ``experiments/targetprop``: direct weight solves.

One hidden layer of 32 relu units, weights and biases normal with a standard deviation of 0.001; batches of 64, 10
epochs; the one-hot output's target by its clamp.
"""

from __future__ import annotations

from typing import Any

from tpext.experiments.presets.base import Case, Preset
from tpext.rules import Kaczmarz


def values(case: Case) -> dict[str, Any] | None:
    """Return what is published for MNIST; the rest is where the rule starts."""
    if case.name != "mnist-mlp" or case.rule is not Kaczmarz:
        return None
    return {"rule": Kaczmarz(), "sizes": (32,), "epochs": 10}


PRESET = Preset("faust", "as in Faust's code, for mnist-mlp by rule kaczmarz", values)
