"""The rules are small immutable values that refuse nonsense by name."""

import copy
import dataclasses
import math
import pickle
import re

import numpy as np
import pytest
from own_rules import exported_rules
from torch import nn

import tpext
from tpext.rules import (
    Backprop,
    ConstrainedLeastSquares,
    DifferenceTargetPropagation,
    Kaczmarz,
    LayerRule,
    LearnedInverse,
    RecurrentRule,
    RegularizedInverse,
    RegularizedLeastSquares,
    Rule,
)

RULES = [Backprop(), RegularizedInverse(), LearnedInverse()]
LAYER_RULES = [
    Backprop(),
    ConstrainedLeastSquares(),
    RegularizedLeastSquares(),
    DifferenceTargetPropagation(),
    Kaczmarz(),
]

LAYERS = {
    "recurrent": [lambda rule: tpext.nn.RNN(3, 4, rule=rule), lambda rule: tpext.nn.convert(nn.RNN(3, 4), rule)],
    "layer": [lambda rule: tpext.nn.MLP([3, 4, 2], rule=rule), lambda rule: tpext.nn.TargetLinear(3, 4, rule=rule)],
    "network": [lambda rule: tpext.nn.TargetSequential(nn.Linear(3, 4), nn.Linear(4, 2), rule=rule)],
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", exported_rules(), ids=lambda rule: rule.__name__)
def test_a_layer_of_another_kind_names_the_rules_kin(rule, kind):
    assert getattr(tpext, rule.__name__) is rule
    if kind in rule.kinds:
        assert kind not in rule.kin
        return
    for make in LAYERS[kind]:
        with pytest.raises(TypeError, match="rule must be for ") as error:
            make(rule())
        hint = "; .* is for other layers, its kin here is tpext."
        if kind not in rule.kin:
            assert not re.search(hint, str(error.value))
            continue
        assert str(error.value).endswith(
            f"got {rule()!r}; {rule.__name__} is for other layers, its kin here is tpext.{rule.kin[kind]}()"
        )
    if kind in rule.kin:
        kin = getattr(tpext, rule.kin[kind])
        assert kind in kin.kinds
        assert [kin.kin[other] for other in rule.kinds] == [rule.__name__]


def test_defaults():
    assert dataclasses.asdict(RegularizedInverse()) == {
        "reg": 1.0,
        "target_step": 1.0,
        "correction": "linearized",
        "credit": "through_time",
        "margin": 1e-3,
        "normalize": True,
        "input_rule": "gradient",
        "slope": "inverse",
        "slope_reg": 0.0,
        "unit_gain": False,
        "inverse": "branch",
        "gate_slope": "derivative",
        "candidate_slope": "derivative",
        "chebyshev_steps": None,
    }
    assert dataclasses.asdict(LearnedInverse()) == {
        "target_step": 1.0,
        "credit": "through_time",
        "normalize": True,
        "noise": 0.0,
    }
    assert dataclasses.asdict(Backprop()) == {}
    least_squares = {"target_step": 1.0, "margin": 1e-2, "normalize": True, "local_loss": "post"}
    assert dataclasses.asdict(ConstrainedLeastSquares()) == least_squares
    assert dataclasses.asdict(RegularizedLeastSquares()) == {"reg": 1.0, "form": "proximal", **least_squares}
    assert dataclasses.asdict(DifferenceTargetPropagation()) == {
        "target_step": 1.0,
        "noise": 0.0,
        "correction": "difference",
        "normalize": True,
        "local_loss": "post",
    }
    assert dataclasses.asdict(Kaczmarz()) == {
        "relaxation": 1.0,
        "damping": 0.0,
        "dx": "mean",
        "dx_reg": 1.0,
        "update": "average",
        "batch_reg": 0.0,
        "first": "input",
        "std": 1e-3,
        "sticky": 0.0,
        "keep_norm": False,
    }


@pytest.mark.parametrize("rule", dict.fromkeys(RULES + LAYER_RULES), ids=repr)
def test_is_an_immutable_value(rule):
    assert isinstance(rule, Rule)
    assert isinstance(rule, RecurrentRule) is (rule in RULES)
    assert isinstance(rule, LayerRule) is (rule in LAYER_RULES)
    assert pickle.loads(pickle.dumps(rule)) == rule == copy.deepcopy(rule) == type(rule)()
    assert hash(rule) == hash(type(rule)())
    assert eval(repr(rule)) == rule
    assert repr(rule) == f"{type(rule).__name__}()"  # fields at their defaults are left out
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.reg = 2.0


def test_options_tell_rules_apart():
    assert RegularizedInverse(reg=2.0) != RegularizedInverse(reg=3.0)
    assert Backprop() != RegularizedInverse()


@pytest.mark.parametrize("value", [0, 3, 2.5, np.float32(0.5), np.int64(2)])
def test_numbers_become_floats(value):
    rule = RegularizedInverse(reg=value)
    assert type(rule.reg) is float
    assert rule.reg == value


NUMBERS = [
    (RegularizedInverse, "reg", "a finite number >= 0", [-1e-9, math.inf, math.nan, "1", None, True, 1j]),
    (RegularizedInverse, "target_step", "a finite number > 0", [0, -1.0, math.inf, math.nan, None]),
    (RegularizedInverse, "margin", "a finite number > 0 and < 1", [0, 1, -0.1, 1.5, math.nan, "a"]),
    (LearnedInverse, "target_step", "a finite number > 0", [0, -1.0, math.inf, math.nan]),
    (LearnedInverse, "noise", "a finite number >= 0", [-0.1, math.inf, math.nan, False]),
    (RegularizedInverse, "normalize", "True or False", [1, None, "yes"]),
    (LearnedInverse, "normalize", "True or False", [0]),
    (RegularizedInverse, "correction", "one of 'linearized', 'difference', 'none'", ["linear", None, 0]),
    (RegularizedInverse, "credit", "one of 'through_time', 'local'", ["global", ["local"]]),
    (LearnedInverse, "credit", "one of 'through_time', 'local'", [None]),
    (RegularizedInverse, "input_rule", "one of 'gradient', 'target'", ["both"]),
    (RegularizedInverse, "slope", "one of 'inverse', 'derivative', 'one'", ["exact", None]),
    (RegularizedInverse, "slope_reg", "a finite number >= 0", [-1.0, math.nan]),
    (ConstrainedLeastSquares, "target_step", "a finite number > 0", [0, math.nan, None]),
    (ConstrainedLeastSquares, "margin", "a finite number > 0 and < 0.5", [0, 0.5, -0.1, math.inf]),
    (ConstrainedLeastSquares, "normalize", "True or False", [1]),
    (ConstrainedLeastSquares, "local_loss", "one of 'pre', 'post'", ["both", None]),
    (RegularizedLeastSquares, "reg", "a finite number >= 0", [-1e-9, math.inf, math.nan, "1", True]),
    (RegularizedLeastSquares, "form", "one of 'proximal', 'ridge'", ["lasso", None]),
    (RegularizedLeastSquares, "target_step", "a finite number > 0", [0, -1.0]),
    (RegularizedLeastSquares, "margin", "a finite number > 0 and < 0.5", [0, 0.5]),
    (RegularizedLeastSquares, "normalize", "True or False", [0]),
    (RegularizedLeastSquares, "local_loss", "one of 'pre', 'post'", ["output"]),
    (DifferenceTargetPropagation, "target_step", "a finite number > 0", [0, math.inf]),
    (DifferenceTargetPropagation, "noise", "a finite number >= 0", [-0.1, math.nan]),
    (DifferenceTargetPropagation, "correction", "one of 'difference', 'none'", ["linearized", None]),
    (DifferenceTargetPropagation, "normalize", "True or False", ["yes"]),
    (DifferenceTargetPropagation, "local_loss", "one of 'post'", ["pre"]),
    (Kaczmarz, "relaxation", "a finite number > 0 and < 2", [0, 2.0, math.nan, "1", True]),
    *((Kaczmarz, name, "a finite number >= 0", [-1.0, math.inf, math.nan, "1"]) for name in ("damping", "dx_reg")),
    *((Kaczmarz, name, "a finite number >= 0", [-1.0, math.inf, None]) for name in ("batch_reg", "std", "sticky")),
    (Kaczmarz, "keep_norm", "True or False", [0, None, "yes"]),
    (Kaczmarz, "dx", "one of 'mean', 'wnorm', 'regularized'", ["max", None]),
    (Kaczmarz, "update", "one of 'average', 'exact'", ["sum"]),
    (Kaczmarz, "first", "one of 'input', 'weights'", ["both"]),
]


@pytest.mark.parametrize(
    ("rule", "name", "expected", "value"),
    [(rule, name, expected, value) for rule, name, expected, values in NUMBERS for value in values],
)
def test_bad_argument_is_named(rule, name, expected, value):
    text = f"{rule.__name__}: {name} must be {expected}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        rule(**{name: value})


@pytest.mark.parametrize("name", ["correction", "credit", "input_rule"])
def test_each_listed_choice_is_accepted(name):
    choices = {
        "correction": ["linearized", "difference", "none"],
        "credit": ["through_time", "local"],
        "input_rule": ["gradient", "target"],
    }
    for choice in choices[name]:
        assert getattr(RegularizedInverse(**{name: choice}), name) == choice


def test_edges_of_the_ranges_are_accepted():
    RegularizedInverse(reg=0, margin=1e-12, target_step=1e-30)
    LearnedInverse(noise=0)
