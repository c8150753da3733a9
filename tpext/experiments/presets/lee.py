"""Lee, Zhang, Fischer and Bengio, "Difference Target Propagation", 2015: ``conti_dtp.py`` and its baseline.

Seven hidden layers of 240 units; batches of 100 of the first 50,000 images, never shuffled, 100 epochs; semi-orthogonal
weights; centred RMSProp with momentum; an epoch of inverses, then an epoch of forward weights. The published code never
updates the weights of the sixth layer and the biases of the fifth; here all learn. For difference target propagation,
and back-propagation as its baseline.
"""

from __future__ import annotations

from typing import Any

from tpext.experiments.presets.base import Case, Preset
from tpext.rules import Backprop, DifferenceTargetPropagation, Rule

RULES: dict[type[Rule], dict[str, Any]] = {
    Backprop: {"rule": Backprop(), "lr": 0.000804436870084},
    DifferenceTargetPropagation: {
        "rule": DifferenceTargetPropagation(target_step=0.327736332653, noise=0.359829566008, normalize=False),
        "lr": 0.0148893490317,
        "reverse_lr": 0.00501149118237,
        "reduction": "batch",
        "schedule": "alternating",
    },
}


def values(case: Case) -> dict[str, Any] | None:
    """Return what is published for MNIST."""
    if case.name != "mnist-mlp" or case.rule not in RULES:
        return None
    return {
        "sizes": (240,) * 7,
        "init": "orthogonal",
        "optimizer": "centred-rmsprop",
        "momentum": 0.9,
        "epochs": 100,
        "train_size": 50_000,
        "order": "sequential",
        **RULES[case.rule],
    }


PRESET = Preset("lee", "as in Lee's code, for mnist-mlp", values)
