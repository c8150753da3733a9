"""J. Seely, "tensorflow-target-prop", ``tprop_train.py`` and its sweeps (``wrapper.py``).

Four hidden layers of 240 units, or the autoencoder 784-200-100-5-100-200-784; batches of 100 of the first 50,000 images
(published: of the last), as stored in the first epoch, 20,000 iterations; Xavier-uniform weights, zero biases;
TensorFlow's RMSProp at 3e-3; ``reg`` 1e-3, ``target_step`` 0.1, local losses before the activation, averaged over batch
and units; the published two steps for the activation's inverse (``reference_compat``); gradients bounded by a norm of
100 (there each by itself). For the least squares rules, and back-propagation in their loop.

It drew reg, step and rates at random and stored no best ones: these are the defaults of its ``train_net``.
"""

from __future__ import annotations

from typing import Any

from tpext.experiments.presets.base import Case, Preset
from tpext.rules import Backprop, ConstrainedLeastSquares, RegularizedLeastSquares, Rule

RULES: dict[type[Rule], Rule] = {
    Backprop: Backprop(),
    ConstrainedLeastSquares: ConstrainedLeastSquares(target_step=0.1, margin=1e-2, normalize=False, local_loss="pre"),
    RegularizedLeastSquares: RegularizedLeastSquares(
        reg=1e-3, form="proximal", target_step=0.1, normalize=False, local_loss="pre"
    ),
}


def values(case: Case) -> dict[str, Any] | None:
    """Return what is published for the two tasks of these networks."""
    if case.name not in ("mnist-mlp", "mnist-autoencoder") or case.rule not in RULES:
        return None
    return {
        "rule": RULES[case.rule],
        "init": "xavier",
        "reference_compat": True,
        "optimizer": "tf-rmsprop",
        "lr": 3e-3,
        "clip_grad_norm": 100.0,
        "reduction": "element",
        "iterations": 20_000,
        "epochs": None,
        "train_size": 50_000,
        "order": "sequential_first",
    }


PRESET = Preset("seely", "as in Seely's code, for mnist-mlp and mnist-autoencoder", values)
