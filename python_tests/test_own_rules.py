"""The house is open: rules from outside run wherever ours do, and tpext.testing tells good ones from bad ones."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_rules import BROKEN, Broken, DividesByTheSlope
from image_files import write_mnist
from own_rules import (
    FeedbackAlignment,
    PseudoInverseTargets,
    SignSymmetry,
    TransposedEverywhere,
    TruncatedInverse,
    Wrong,
    WrongLayer,
    exported_rules,
)
from torch import Tensor, nn

import tpext
from tpext.nn.owned import reset_owned
from tpext.rules import LayerRule, RecurrentRule, number
from tpext.tasks import Adding, ImageClasses, make_task
from tpext.tasks.base import Batch, Task
from tpext.testing import _rule_checks, check_rule, check_task

OWN = [FeedbackAlignment(), SignSymmetry(), TruncatedInverse(), PseudoInverseTargets(), TransposedEverywhere()]
OURS = [
    tpext.Backprop(),
    tpext.RegularizedInverse(),
    tpext.RegularizedInverse(correction="none", credit="local", input_rule="target"),
    tpext.RegularizedInverse(slope="derivative"),
    tpext.LearnedInverse(),
    tpext.ConstrainedLeastSquares(),
    tpext.RegularizedLeastSquares(local_loss="pre"),
    tpext.DifferenceTargetPropagation(),
    tpext.Kaczmarz(),
    tpext.DifferenceTargets(),
    tpext.Targets(),
    tpext.DirectTargets(),
    tpext.GaussNewtonTargets(damping=0.1),
]


@pytest.mark.parametrize("rule", [*OWN, *OURS], ids=repr)
def test_rules_pass_their_check(rule: tpext.rules.Rule) -> None:
    check_rule(rule)


class Misspelt(PseudoInverseTargets):
    takes_unit = True
    share = 0.5

    def propagates(self) -> None:
        """Nothing calls it."""


def test_a_name_that_no_layer_asks_for_is_told() -> None:
    with pytest.warns(UserWarning, match=r"Misspelt\.\w+ is a name that no layer asks for") as told:
        Misspelt()
    assert [str(one.message).partition("; ")[2] for one in told if one.category is UserWarning] == [
        "takes_units is one",
        "propagate is one",
    ]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize(
    "rule",
    [
        FeedbackAlignment(),
        tpext.Backprop(),
        tpext.RegularizedInverse(),
        tpext.RegularizedInverse(inverse="cell", slope_reg=1.0),
    ],
    ids=repr,
)
def test_rules_pass_their_check_with_gates(rule: tpext.rules.Rule, cell: str) -> None:
    check_rule(rule, cell=cell)


def test_a_learned_rule_passes_its_check_with_gates() -> None:
    check_rule(tpext.LearnedInverse(), cell="gru")


def test_every_rule_of_the_package_is_checked() -> None:
    assert {type(rule) for rule in OURS} == set(exported_rules())


# What is to be found wrong, and what the error must say of it.
WRONG = {
    "shape": "must return [",
    "dtype": "must return torch.float",
    "device": "on cpu, got torch.float",
    "type": "must return a tensor, got NoneType",
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(("rule", "method"), [(Wrong, "feedback"), (WrongLayer, "propagate")])
def test_what_a_method_returns_is_checked_where_it_is_used(rule: Any, method: str, kind: str) -> None:
    net = tpext.nn.RNN(3, 4, rule=Wrong(kind)) if rule is Wrong else tpext.nn.MLP([3, 4, 2], rule=WrongLayer(kind))
    output = net(torch.randn(5, 2, 3))
    loss = (output[0] if rule is Wrong else output).sum()
    with pytest.raises((TypeError, ValueError), match=re.escape(WRONG[kind])) as error:
        loss.backward()
    assert str(error.value).startswith(f"{rule.__name__}.{method} must return ")


def test_a_feedback_matrix_that_is_not_finite_is_named() -> None:
    output, _ = tpext.nn.RNN(3, 4, rule=Wrong("value"))(torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match=r"^Wrong.feedback must return finite numbers, got NaN or infinity$"):
        output.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_feedback_matrix_that_is_not_finite_is_named_in_a_compiled_layer(backend: str) -> None:
    def train(rule: RecurrentRule) -> None:
        # of a compiled network the forward graph may compute the matrix already
        rnn = torch.compile(tpext.nn.RNN(3, 4, rule=rule), fullgraph=True, backend=backend)
        rnn(torch.randn(5, 2, 3))[0].sum().backward()

    torch._dynamo.reset()
    train(SignSymmetry())
    with pytest.raises(RuntimeError, match=r"^Wrong\.feedback must return finite numbers, got NaN or infinity"):
        train(Wrong("value"))
    torch._dynamo.reset()


def test_a_propagated_displacement_that_is_not_finite_fails_the_check() -> None:
    with pytest.raises(AssertionError, match=r"expected a finite gradient of the input, got NaN or infinity"):
        check_rule(WrongLayer("value"))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: type(broken.rule).__name__)
def test_a_rule_that_is_broken_in_one_way_fails_that_check(broken: Broken) -> None:
    with pytest.raises(AssertionError) as error:
        check_rule(broken.rule)
    found = str(error.value)
    assert found.startswith(f"{broken.rule}: {broken.check}: expected ")
    assert broken.says in found
    assert ", got " in found
    if "expected no error" in found:
        assert type(error.value.__cause__).__name__ in found
    for name, check in _rule_checks(broken.rule):
        # gradients are checked in float32 and in float64
        if broken.alone and name.split(" (")[0] != broken.check.split(" (")[0]:
            check()


def test_the_caller_chooses_the_activation() -> None:
    check_rule(DividesByTheSlope(), activation="tanh")
    with pytest.raises(AssertionError, match=r"gradients \(layer.*expected a finite gradient of the input, got NaN"):
        check_rule(DividesByTheSlope(), activation="relu")
    check_rule(SignSymmetry(), nonlinearity="relu")
    with pytest.raises(AssertionError, match=r"gradients \(recurrent.*needs nonlinearity='tanh', got 'relu'") as error:
        check_rule(tpext.LearnedInverse(), nonlinearity="relu")
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="check_rule: nonlinearity must be one of 'tanh', 'relu', 'identity', got 'g"):
        check_rule(SignSymmetry(), nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"nonlinearity belongs to rules of recurrent layers, got PseudoInverseTarg"):
        check_rule(PseudoInverseTargets(), nonlinearity="relu")
    with pytest.raises(ValueError, match="check_rule: nonlinearity belongs to cell 'rnn', got cell 'gru'"):
        check_rule(SignSymmetry(), cell="gru", nonlinearity="relu")
    with pytest.raises(ValueError, match="check_rule: cell must be one of 'rnn', 'gru', 'lstm', got 'mlp'"):
        check_rule(SignSymmetry(), cell="mlp")
    with pytest.raises(ValueError, match=r"check_rule: activation belongs to rules of feed-forward layers, got Sign"):
        check_rule(SignSymmetry(), activation="relu")


def test_a_check_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    check_rule(SignSymmetry())
    assert torch.equal(torch.rand(3), expected)


def test_rules_that_are_no_values_fail_the_check() -> None:
    @dataclasses.dataclass(frozen=True)
    class Local(RecurrentRule):
        def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
            return weight_hh

    with pytest.raises(AssertionError, match=r"Local.*: value: expected .* a class that stands in a module, got "):
        check_rule(Local())
    with pytest.raises(TypeError, match=r"check_rule: rule must be a tpext.rules.Rule, got 'dtp'"):
        check_rule("dtp")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tpext.rules.Rule, got <class .*>; a rule is an instance, not a class$"):
        check_rule(SignSymmetry)  # type: ignore[arg-type]


def test_a_class_with_fields_needs_the_decorator() -> None:
    class Plain(LayerRule):
        scale: float = 1.0

        def propagate(self, call: tpext.rules.LayerCall, displacement: Tensor) -> Tensor:
            return displacement @ call.weight

    with pytest.raises(TypeError, match=r"Plain: .* decorated with @dataclasses.dataclass\(frozen=True\).* scale"):
        Plain()


@dataclasses.dataclass(frozen=True)
class Ranged(RecurrentRule):
    scale: float = number(0.5, low=0.0, high=1.0)
    target_step: float = 2.0
    margin: float = 0.5

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return weight_hh * self.scale


def test_numbers_of_a_rule_are_checked_by_their_declaration() -> None:
    assert Ranged() == Ranged(0.5)
    assert Ranged.scale == 0.5
    assert repr(Ranged(scale=1 / 3)) == f"Ranged(scale={1 / 3!r})"  # what is at its default is left out
    for wrong in (0, 1, -1.0, math.nan, math.inf, True, "0.5", None):
        with pytest.raises(ValueError, match=r"^Ranged: scale must be a finite number > 0 and < 1, got "):
            Ranged(scale=wrong)
    for name, wrong in (("target_step", 0), ("target_step", math.inf), ("margin", 1), ("margin", 0)):
        with pytest.raises(ValueError, match=rf"^Ranged: {name} must be a finite number"):
            Ranged(**{name: wrong})


def test_a_rule_of_two_protocols_is_for_both_kinds_of_layers() -> None:
    class Narrowed(TransposedEverywhere):
        kinds = frozenset({"layer"})

    class Below(Narrowed):
        pass

    rule = TransposedEverywhere()
    assert rule.kinds == {"recurrent", "layer"}
    assert Narrowed.kinds == Below.kinds == {"layer"}
    assert tpext.Backprop.kinds == {"recurrent", "layer", "network"}
    with pytest.raises(TypeError, match="RNN: rule must be for recurrent layers"):
        tpext.nn.RNN(3, 4, rule=Below())
    with pytest.raises(TypeError, match="TargetSequential: rule must be for networks of blocks"):
        tpext.nn.TargetSequential(nn.Linear(3, 4), nn.Linear(4, 2), rule=rule)
    net = nn.Sequential(
        tpext.nn.MLP([3, 4], output_activation="tanh", rule=rule), tpext.nn.RNN(4, 5, rule=rule)
    ).double()
    x, found = torch.randn(6, 2, 3, dtype=torch.float64), []
    for one in (rule, tpext.Backprop()):
        net[0].rule = net[1].rule = one
        net.zero_grad()
        net(x)[0].square().sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_rule_from_outside_equals_ours_where_it_should() -> None:
    """Back-propagation as a feedback matrix and a slope, the regularised inverse as a user's inverse."""

    @dataclasses.dataclass(frozen=True)
    class Transposed(RecurrentRule):
        slope = "derivative"

        def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
            return weight_hh

    @dataclasses.dataclass(frozen=True)
    class Inverse(RecurrentRule):
        credit = "through_time"

        def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
            eye = torch.eye(weight_hh.shape[-1], dtype=weight_hh.dtype)
            return weight_hh @ torch.linalg.inv(weight_hh.mT @ weight_hh + eye)

    for own, ours in ((Transposed(), tpext.Backprop()), (Inverse(), tpext.RegularizedInverse())):
        found = []
        for rule in (own, ours):
            torch.manual_seed(1)
            rnn = tpext.nn.RNN(3, 6, num_layers=2, bidirectional=True, rule=rule, dtype=torch.float64)
            x = torch.randn(9, 4, 3, dtype=torch.float64, requires_grad=True)
            output, h_n = rnn(x)
            (output.sin().sum() + h_n.cos().sum()).backward()
            found.append([x.grad, *(parameter.grad for parameter in rnn.parameters())])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_own_parameters_follow_the_rule() -> None:
    rnn = tpext.nn.RNN(3, 4, bidirectional=True, rule=FeedbackAlignment())
    assert {"feedback_weight_l0", "feedback_weight_l0_reverse"} <= rnn.state_dict().keys()
    plain = nn.RNN(3, 4, bidirectional=True)
    before = rnn.feedback_weight_l0.clone()
    rnn.load_state_dict(plain.state_dict())
    assert torch.equal(rnn.feedback_weight_l0, before)
    with pytest.raises(ValueError, match="changes which parameters the rule owns"):
        rnn.rule = tpext.Backprop()
    tpext.nn.convert(rnn, tpext.LearnedInverse())
    assert not hasattr(rnn, "feedback_weight_l0")
    assert rnn.reverse_weight_hh_l0_reverse.shape == (4, 4)


@dataclasses.dataclass(frozen=True)
class OwnedOfLayers(PseudoInverseTargets):
    """Owns a parameter that does not learn and one that does."""

    def parameter_shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        return {"fixed": (in_features, out_features), "learnt": (in_features,)}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        nn.init.normal_(parameter)
        parameter.requires_grad_(name == "learnt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [FeedbackAlignment(), tpext.LearnedInverse(), OwnedOfLayers()], ids=repr)
def test_own_parameters_of_16_bit_layers_are_drawn_in_float32(rule: Any, dtype: torch.dtype) -> None:
    kind: Any = tpext.nn.RNN if isinstance(rule, RecurrentRule) else tpext.nn.TargetLinear
    single, half = (kind(3, 4, rule=rule, dtype=one) for one in (torch.float32, dtype))
    assert len(half.owned_names) == len(rule.parameter_shapes(3, 4))
    for name in half.owned_names:
        for layer in (single, half):
            torch.manual_seed(5)
            reset_owned(rule, name.removesuffix("_l0"), layer.get_parameter(name))
        drawn, rounded = single.get_parameter(name), half.get_parameter(name)
        assert torch.equal(rounded, drawn.to(dtype))
        assert rounded.requires_grad is drawn.requires_grad


def test_feedback_of_16_bit_layers_is_computed_in_float32() -> None:
    given: list[Tensor] = []

    class Recording(FeedbackAlignment):
        def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
            given.extend([weight_hh, *owned])
            return owned[0] / 3

    rnn = tpext.nn.RNN(3, 4, rule=Recording(), dtype=torch.bfloat16)
    weights = [rnn.weight_hh_l0[None], rnn.feedback_weight_l0[None]]
    matrix = rnn.rule._matrix("feedback", *weights)
    assert all(torch.equal(one, weight.float()) for one, weight in zip(given, weights, strict=True))
    assert [one.dtype for one in given] == [torch.float32] * 2
    assert torch.equal(matrix, (weights[1].float() / 3).bfloat16())


@dataclasses.dataclass(frozen=True)
class Taken(RecurrentRule):
    """Owns a parameter of the layer's name."""

    def parameter_shapes(self, input_size: int, hidden_size: int, gates: int) -> dict[str, tuple[int, ...]]:
        return {"weight_hh": (hidden_size, hidden_size)}

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return weight_hh


@dataclasses.dataclass(frozen=True)
class Unset(FeedbackAlignment):
    """Cannot initialise what it owns."""

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        raise NotImplementedError("unset")


def test_names_that_the_layer_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RNN: Taken\(\) cannot own a parameter weight_hh_l0, the layer has one"):
        tpext.nn.RNN(3, 4, rule=Taken())
    with pytest.raises(ValueError, match="RNN: weight_hh_l0 cannot be added"):
        tpext.nn.convert(tpext.nn.RNN(3, 4), Taken())


def test_a_conversion_that_fails_changes_nothing() -> None:
    model = nn.ModuleDict({"a": tpext.nn.RNN(3, 4, rule=tpext.LearnedInverse()), "b": tpext.nn.RNN(3, 4)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotImplementedError, match="unset"):
        tpext.nn.convert(model, Unset())
    assert model["a"].rule == tpext.LearnedInverse()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_constants_in_place_of_fields_are_refused() -> None:
    """An inherited constructor would overwrite them."""

    class Difference(tpext.RegularizedInverse):
        correction = "difference"

    class Half(tpext.rules.NetworkRule):
        target_step = 0.5

        def propagate(self, call: Any, displacement: Tensor) -> Tensor:
            return displacement

    for kind, name in ((Difference, "correction"), (Half, "target_step")):
        with pytest.raises(TypeError, match=f"^{kind.__name__}: {name} is a field of the class above"):
            kind()


def test_numbers_of_another_annotation_are_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Maybe(RecurrentRule):
        scale: float | None = 0.5

        def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
            return weight_hh

    with pytest.raises(TypeError, match="Maybe: scale must be annotated float to be a number of a rule"):
        Maybe()


def test_a_network_refuses_rules_of_other_layers_when_they_are_assigned() -> None:
    net = tpext.nn.TargetSequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"TargetSequential: rule must be for networks of blocks"):
        net.rule = tpext.Kaczmarz()
    assert net.rule == tpext.DifferenceTargets()


class Twice(Adding):
    """Returns the same batch at every iteration."""

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        return super().batch(seed, 0, batch_size)


class Changed(Adding):
    """Returns its samples with something changed."""

    def sample(self, random: np.random.Generator, size: int) -> Batch:
        return self.change(super().sample(random, size))

    def change(self, batch: Batch) -> Batch:
        raise NotImplementedError("unset")


class FlatTargets(Changed):
    """Of one value a sample: against outputs ``[B, 1]`` the squared error would broadcast to ``[B, B]``."""

    def change(self, batch: Batch) -> Batch:
        return batch._replace(target=batch.target.squeeze(1))


class DoubleTargets(Changed):
    def change(self, batch: Batch) -> Batch:
        return batch._replace(target=batch.target.double())


class BatchFirst(Changed):
    def change(self, batch: Batch) -> Batch:
        return batch._replace(input=batch.input.transpose(0, 1))


class Unjudged(Adding):
    """Leaves open which numbers are near enough."""

    correct = Task.correct


class FlatImages(ImageClasses):
    """Forgets the planes."""

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        images, target = super().batch(seed, iteration, batch_size)
        return Batch(images.flatten(1), target)


def test_tasks_pass_their_check(tmp_path: Path) -> None:
    for name in ("temporal-order", "adding", "random-permutation", "spiral", "digits-mlp"):
        check_task(make_task(name))
    write_mnist(tmp_path)
    for name in ("sequential-mnist", "mnist-mlp", "mnist-autoencoder"):
        check_task(make_task(name, data_dir=tmp_path))
    check_task(ImageClasses("digits"))
    check_task(ImageClasses("mnist", data_dir=tmp_path))


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (Twice(), "batch: expected other samples for another iteration, got the same"),
        (FlatTargets(), "batch: FlatTargets: target of batch must be [B, O] = [4, 1] for 'mse', got [4]"),
        (DoubleTargets(), "batch: expected target in torch.float32, got torch.float64"),
        (
            BatchFirst(length=30),
            "batch: BatchFirst: input of batch must be [T, B, I] = [30, 4, 2], got [4, 30, 2]",
        ),
        (Changed(), "batch: expected no error, got NotImplementedError: unset"),
        (Unjudged(), "batch: Unjudged: criterion 'mse' needs a method correct(output, target) -> [B]"),
        (FlatImages("digits"), "batch: FlatImages: input of batch must be [B, C, H, W] = [4, 1, 8, 8], got [4, 64]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bad_tasks_do_not(task: tpext.tasks.Task, says: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(f"{task}: {says}")) as error:
        check_task(task)
    assert (error.value.__cause__ is None) is ("no error" not in says)


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(TypeError, match=r"check_task: task must be a tpext.tasks.Task, got 'adding'"):
        check_task("adding")  # type: ignore[arg-type]
