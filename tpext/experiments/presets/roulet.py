"""Roulet and Harchaoui, "Target Propagation via Regularized Inversion for Recurrent Neural Networks", 2023; its code.

100 tanh units (256 for text), one layer, orthogonal initialisation, zero biases, SGD:

============================  =============================  ====================  ============================
task                          regularized: lr, step, reg     backprop: lr          learned: lr, step, reverse lr
============================  =============================  ====================  ============================
temporal-order, T = 60        1e-1, 1e-2, 10                 1e-5, momentum .9     1e-2, 1e-1, 1e-3
temporal-order, T = 120       1e-2, 1e-2, 1                  1e-5, momentum .9     1e-2, 1e-1, 1e-3
adding, T = 30                1e-1, 1e-1, 1                  1e-3, momentum .9     1e-2, 1e-1, 1e-3
sequential-mnist              1e-1, 1e-4, 1                  1e-5                  1e-2, 1e-7, 1e-8, noise .1
permuted-mnist                1e-1, 1e-4, 1                  1e-4                  none
sequential-cifar              1e-2, 1e-2, 10                 1e-3                  none
text, words, T = 64           1e-1, 1e-3, 1                  1e-2                  none
============================  =============================  ====================  ============================

The published step is ``lr`` times the plain sum of the local gradients, so the rules here have ``normalize=False``:
with the linearised correction, the recurrent layer moves at ``lr * target_step`` in back-propagation's units. The
output layer is in the same optimizer, with the loss's own gradient: it moves at ``lr``, ``1 / target_step`` times
faster. For the learned inverse the published code divides the local losses by the batch size once more; here that is
``lr = 1e-2 / batch_size`` beside ``head_lr = 1e-2``. The momentum, where there is any, is Nesterov's.

The windows of the text come in its order, and of its first 40,000 words only: 77 batches of 512, over and over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tpext.experiments.presets.base import Case, Preset
from tpext.rules import Backprop, LearnedInverse, RegularizedInverse
from tpext.tasks import SequentialMnist, Text


class _Learned(NamedTuple):
    """Settings of the learned inverse."""

    target_step: float
    reverse_lr: float
    noise: float = 0.0


class _Settings(NamedTuple):
    """What was published for a task: rate, step and regularisation, back-propagation's rate and momentum."""

    lr: float
    target_step: float
    reg: float
    backprop_lr: float
    momentum: float
    iterations: int
    batch_size: int
    learned: _Learned | None = None


_SETTINGS = {
    "temporal-order": _Settings(1e-1, 1e-2, 10.0, 1e-5, 0.9, 40_000, 20, _Learned(1e-1, 1e-3)),
    "temporal-order-120": _Settings(1e-2, 1e-2, 1.0, 1e-5, 0.9, 48_000, 20, _Learned(1e-1, 1e-3)),
    "adding": _Settings(1e-1, 1e-1, 1.0, 1e-3, 0.9, 24_000, 20, _Learned(1e-1, 1e-3)),
    "sequential-mnist": _Settings(1e-1, 1e-4, 1.0, 1e-5, 0.0, 40_000, 16, _Learned(1e-7, 1e-8, 0.1)),
    "permuted-mnist": _Settings(1e-1, 1e-4, 1.0, 1e-4, 0.0, 40_000, 16),
    "sequential-cifar": _Settings(1e-2, 1e-2, 10.0, 1e-3, 0.0, 8_000, 16),
    "text": _Settings(1e-1, 1e-3, 1.0, 1e-2, 0.0, 24_000, 512),
}

_TEXT = {"hidden_size": 256, "order": "sequential", "train_size": 39_999}
"""What else is set for a text; with the 40,000th word there were a 78th batch, which the code's windows do not make."""


def values(case: Case) -> dict[str, Any] | None:
    """Return what was published: for numbers of steps, pixels a step and embeddings as there."""
    name, task = case.name, case.task
    if case.cell != "rnn":
        return None
    if isinstance(task, Text):
        known = (task.level, task.length, task.embedding, task.input_size) == ("word", 64, "frozen", 1024)
    elif name in ("temporal-order", "adding"):
        known = task.length in ((60, 120) if name == "temporal-order" else (30,))
    else:
        known = name in _SETTINGS and task.input_size == 1 and not _is_fashion(case)
    if not known or (case.rule is LearnedInverse and _SETTINGS[name].learned is None):
        return None
    found = nearest(case)
    return found if found is None or not isinstance(task, Text) else {**found, **_TEXT}


def nearest(case: Case) -> dict[str, Any] | None:
    """Return the published settings of the nearest task and length; those of T = 60 hold below T = 120."""
    task, learned = case.task, case.rule is LearnedInverse
    name = case.name if case.name in _SETTINGS else "temporal-order"
    if name == "permuted-mnist" and task.input_size != 1:
        name = "sequential-mnist"
    if name == "temporal-order" and (task.length or 0) >= 120:
        name = "temporal-order-120"
    settings = _SETTINGS[name]
    if learned and settings.learned is None:
        settings = _SETTINGS["sequential-mnist"]
    batch_size = case.batch_size or settings.batch_size
    found = {"optimizer": "sgd", "batch_size": batch_size, "iterations": settings.iterations}
    if case.rule is RegularizedInverse:
        rule = RegularizedInverse(reg=settings.reg, target_step=settings.target_step, normalize=False)
        return {**found, "rule": rule, "lr": settings.lr}
    if case.rule is Backprop:
        return {**found, "rule": Backprop(), "lr": settings.backprop_lr, "momentum": settings.momentum}
    if learned and settings.learned is not None:
        step, reverse_lr, noise = settings.learned
        reverse = LearnedInverse(target_step=step, normalize=False, noise=noise)
        return {**found, "rule": reverse, "lr": 1e-2 / batch_size, "head_lr": 1e-2, "reverse_lr": reverse_lr}
    return None


def _is_fashion(case: Case) -> bool:
    return isinstance(case.task, SequentialMnist) and case.task.dataset != "mnist"


PRESET = Preset(
    "published",
    "as in Roulet and Harchaoui's code, for temporal-order with 60 or 120 steps, adding with 30, images pixel by "
    "pixel, text by words",
    values,
)
