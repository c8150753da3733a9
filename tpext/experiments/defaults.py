"""Where every option of ``tpext train TASK`` starts, each default once; the help prints from the same tables."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from tpext.experiments.presets import Case, roulet
from tpext.rules import (
    ConstrainedLeastSquares,
    DifferenceTargetPropagation,
    Kaczmarz,
    RegularizedInverse,
    RegularizedLeastSquares,
    Rule,
)
from tpext.tasks import TASKS

RATE = 1e-3
"""Learning rate of an optimizer that no preset speaks of."""

RUN: dict[str, Any] = {
    "nonlinearity": "tanh",
    "init": "orthogonal",
    "forget_bias": None,
    "orthogonal": False,
    "reference_compat": False,
    "tied": False,
    "lr": RATE,
    "momentum": 0.0,
    "clip_grad_norm": None,
    "reduction": "sum",
    "schedule": "parallel",
    "checkpoint_interval": 500,
    "seed": 1,
    "precision": "32",
    "device": "cpu",
    "threads": None,
    "data_dir": None,
    "gradients": False,
    "tensorboard": False,
}
"""Of all runs."""

SEQUENCE: dict[str, Any] = {
    "cell": "rnn",
    "hidden_size": 100,
    "layers": 1,
    "sizes": None,
    "optimizer": "sgd",
    "batch_size": 20,
    "epochs": None,
    "iterations": 4_000,
    "eval_interval": 100,
}
"""Of recurrent networks besides."""

FEED_FORWARD: dict[str, Any] = {
    "cell": None,
    "hidden_size": None,
    "layers": None,
    "sizes": (64, 64),
    "optimizer": "adam",
    "batch_size": 100,
    "epochs": 10,
    "iterations": None,
    "eval_interval": None,
}
"""Of feed-forward ones."""

OWN: dict[str, Any] = {"optimizer": "adam", "lr": RATE, "reverse_lr": RATE}
"""Of recurrent networks for a task of a user's own, of which nothing is published."""

EVERY_STEP: dict[str, Any] = {"optimizer": "adam", "lr": 3e-3}
"""Of those that are judged at every step. What was published for a text learns too slowly under back-propagation, and
diverges in the first iteration under the regularised inverse."""

# Inverse slopes of saturated units blow displacements up: from the last of 64 steps they overflow float32.
DERIVATIVE_SLOPE: dict[type[Rule], dict[str, Any]] = {
    RegularizedInverse: {"rule": RegularizedInverse(slope="derivative")},
}
"""Of both by their rules, with the simple cell: cells with gates go by slopes of their own, "derivative" anyway."""

DRAWN: dict[str, Any] = {"epochs": None, "iterations": 3_000, "eval_interval": 100}
"""Of feed-forward ones whose task draws its samples."""

# The best of a few tried on mnist-mlp and the spiral. Exact inverses blow up what saturated units and small singular
# values let through; a wide margin and a small rate keep such a run from collapsing.
RULES: dict[type[Rule], dict[str, Any]] = {
    ConstrainedLeastSquares: {"rule": ConstrainedLeastSquares(margin=0.4), "lr": 3e-4},
    RegularizedLeastSquares: {"rule": RegularizedLeastSquares(reg=1.0)},
    DifferenceTargetPropagation: {"rule": DifferenceTargetPropagation(noise=0.1)},
    Kaczmarz: {"rule": Kaczmarz(dx="regularized", batch_reg=1.0)},
}
"""Of feed-forward networks by their rules."""

SOLVES: dict[str, Any] = {
    "sizes": (100,),
    "nonlinearity": "relu",
    "init": "torch",
    "optimizer": "sgd",
    "lr": 1.0,
    "batch_size": 64,
}
"""Of rules whose gradients are whole updates, steps of SGD at the rate 1. More units or layers help little."""


def starting_values(case: Case) -> dict[str, Any]:
    """Return the fields of a configuration that the default preset sets, without ``rule`` if that is the rule's own.

    A sequence starts from the nearest published rates, for fewer iterations; but one of a user's own, or one that is
    judged at every step, for which these do not work, does not.
    """
    task = case.task
    of_rule = DERIVATIVE_SLOPE.get(case.rule, {}) if case.cell == "rnn" else {}
    if task.every_step:
        values = {**RUN, **SEQUENCE, **EVERY_STEP, **of_rule, **task.defaults}
    elif task.length is not None:
        published = (roulet.nearest(case) or {"optimizer": "adam"}) if case.name in TASKS else {**OWN, **of_rule}
        values = {**RUN, **SEQUENCE, **published}
        values["iterations"] = SEQUENCE["iterations"]
        own = task.defaults
        values = with_optimizer(values, own.get("optimizer"), case)
        values |= {"head_lr": own["lr"], **own} if "lr" in own else own
    else:
        values = {**RUN, **FEED_FORWARD, **({} if task.has_epochs else DRAWN), **RULES.get(case.rule, {})}
        values |= task.defaults
        if case.rule.solves_weights:
            values |= SOLVES
    return {**values, "test_size": task.default_test_size}


def with_optimizer(values: dict[str, Any], name: Any, case: Case) -> dict[str, Any]:
    """Return settings for an optimizer; None, or that which they are for, leaves them as they are.

    Rates start at :data:`RATE`, and the rule of a sequence has gradients of full size.
    """
    if name in (None, values["optimizer"]):
        return values
    momentum = 0.9 if name == "centred-rmsprop" else 0.0
    values = {**values, "optimizer": name, "lr": RATE, "head_lr": RATE, "reverse_lr": RATE, "momentum": momentum}
    if case.task.length is not None and "rule" in values and "normalize" in {one.name for one in fields(case.rule)}:
        values["rule"] = replace(values["rule"], normalize=True)
    return values


def shown_default(name: str) -> str | None:
    """Return how the default of an option shows in the help, None if presets or rules have their own."""
    if name == "lr" or not {name} & {*RUN, *SEQUENCE}:
        return None
    own = ", or the task's" if any(name in entry.kind.defaults for entry in TASKS.values()) else ""
    if name not in SEQUENCE:
        return value_text(RUN[name]) + own
    sequence, feed_forward = SEQUENCE[name], FEED_FORWARD[name]
    if sequence is None:
        return value_text(feed_forward) + own
    more = "" if feed_forward in (None, sequence) else f"; feed-forward {value_text(feed_forward)}"
    return f"{value_text(sequence)}{more}{own}"


def value_text(value: object) -> str:
    """Return a value as the help shows it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
