"""Roulet and Harchaoui, "Target Propagation via Regularized Inversion for Recurrent Neural Networks", 2023; its code.

100 tanh units, one layer, orthogonal initialisation, zero biases, SGD:

============================  =============================  ====================  ============================
task                          regularized: lr, step, reg     backprop: lr          learned: lr, step, reverse lr
============================  =============================  ====================  ============================
temporal-order, T = 60        1e-1, 1e-2, 10                 1e-5, momentum .9     1e-2, 1e-1, 1e-3
temporal-order, T = 120       1e-2, 1e-2, 1                  1e-5, momentum .9     1e-2, 1e-1, 1e-3
adding, T = 30                1e-1, 1e-1, 1                  1e-3, momentum .9     1e-2, 1e-1, 1e-3
sequential-mnist              1e-1, 1e-4, 1                  1e-5                  1e-2, 1e-7, 1e-8, noise .1
permuted-mnist                1e-1, 1e-4, 1                  1e-4                  none
============================  =============================  ====================  ============================

The published step is ``lr`` times the plain sum of the local gradients, so the rules here have ``normalize=False``:
with the linearised correction, the recurrent layer moves at ``lr * target_step`` in back-propagation's units. The
output layer is in the same optimizer, with the loss's own gradient: it moves at ``lr``, ``1 / target_step`` times
faster. For the learned inverse the published code divides the local losses by the batch size once more; here that is
``lr = 1e-2 / batch_size`` beside ``head_lr = 1e-2``. The momentum, where there is any, is Nesterov's.
"""

from __future__ import annotations

from typing import Any

from tpext.experiments.presets.base import Case, Preset
from tpext.rules import Backprop, LearnedInverse, RegularizedInverse

LENGTHS = {"temporal-order": (60, 120), "adding": (30,)}
"""Numbers of steps that settings were published for."""
IMAGES = ("sequential-mnist", "permuted-mnist")
RATES = {"temporal-order": 1e-5, "adding": 1e-3, "sequential-mnist": 1e-5, "permuted-mnist": 1e-4}
"""Of back-propagation."""


def values(case: Case) -> dict[str, Any] | None:
    """Return what was published, for one pixel a step."""
    known = case.task.input_size == 1 if case.name in IMAGES else case.task.length in LENGTHS.get(case.name, ())
    if not known or (case.name == "permuted-mnist" and case.rule is LearnedInverse):
        return None
    return nearest(case)


def nearest(case: Case) -> dict[str, Any] | None:
    """Return the published settings of the nearest task and length; those of T = 60 hold below T = 120."""
    task, rule = case.name, case.rule
    if task == "permuted-mnist" and (case.task.input_size != 1 or rule is LearnedInverse):
        task = "sequential-mnist"
    elif task not in RATES:
        task = "temporal-order"
    images = task in IMAGES
    batch_size = case.batch_size or (16 if images else 20)
    long = task == "temporal-order" and (case.task.length or 0) >= 120
    found = {"batch_size": batch_size, "iterations": 24_000 if task == "adding" else 48_000 if long else 40_000}
    if rule is RegularizedInverse:
        reg = 10.0 if task == "temporal-order" and not long else 1.0
        step = 1e-4 if images else 1e-1 if task == "adding" else 1e-2
        lr = 1e-2 if long else 1e-1
        return {**found, "rule": RegularizedInverse(reg=reg, target_step=step, normalize=False), "lr": lr}
    if rule is Backprop:
        return {**found, "rule": Backprop(), "lr": RATES[task], "momentum": 0.0 if images else 0.9}
    if rule is LearnedInverse:
        learned = LearnedInverse(target_step=1e-7 if images else 1e-1, normalize=False, noise=0.1 if images else 0.0)
        lr = 1e-2 / batch_size
        return {**found, "rule": learned, "lr": lr, "head_lr": 1e-2, "reverse_lr": 1e-8 if images else 1e-3}
    return None


PRESET = Preset(
    "published",
    "as in Roulet and Harchaoui's code, for temporal-order with 60 or 120 steps, adding with 30, images pixel by pixel",
    values,
)
