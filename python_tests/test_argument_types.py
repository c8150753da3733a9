"""What is no tensor is refused by every public function with the op's and the argument's name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import tpext
from tpext import diagnostics, feedback, nn, ops

COUNTER = {"seed": 0, "step": 0, "stream": 0}
X, Y, W, B = torch.rand(5, 4), torch.rand(5, 3), torch.rand(3, 4), torch.rand(3)
Z, DZ, P = torch.rand(1, 1, 2, 2), torch.rand(2, 1, 1, 2, 2), torch.rand(1, 1, 1, 1)
INDEX = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
STACK = {
    "input": torch.rand(2, 5, 4),
    "h0": torch.rand(1, 5, 3),
    "weight_ih": torch.rand(1, 3, 4),
    "weight_hh": torch.eye(3)[None],
    "bias": torch.rand(1, 3),
    "lengths": torch.tensor([2, 1, 2, 0, 2]),
}


@dataclass
class Case:
    """A call of ``function`` with ``tensors`` and ``others`` for arguments; those of ``optional`` may be None."""

    name: str
    function: Callable[..., Any]
    tensors: dict[str, Any]
    others: dict[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


def ops_cases() -> list[Case]:
    layer = {"input": X, "weight": W, "bias": B, "inverse": torch.rand(4, 3)}
    activation, units = {"activation": "tanh"}, ops.Units("relu")
    tanh = ops.Activation("tanh")
    return [
        Case(
            "act_displacement",
            ops.act_displacement,
            {"displacement": X, "input": X},
            activation | {"slope": 0.0, "reg": 1.0},
        ),
        Case(
            "act_inverse",
            ops.act_inverse,
            {"target": X, "input": X},
            activation | {"slope": 0.0, "reg": 1.0, "margin": 0.1},
        ),
        Case("Activation", tanh, {"input": X}),
        Case("Activation", tanh.derivative, {"grad": X, "input": X}),
        Case("act_inverse", tanh.inverse, {"target": X, "input": X}),
        Case("regularized_inverse", tanh.regularized_inverse, {"target": X, "input": X}),
        Case("regularized_inverse", tanh.regularized_inverse, {"target": X, "input": X}, {"form": "ridge"}),
        Case("bias_inverse", ops.bias_inverse, {"target": Y, "input": Y, "bias": B}),
        Case(
            "linear_inverse",
            ops.linear_inverse,
            {"target": Y, "input": X, "weight": W, "inverse": torch.rand(4, 3)},
            {},
            ("inverse",),
        ),
        Case("layer_inverse", ops.layer_inverse, {"target": Y} | layer, activation, ("bias", "inverse")),
        Case(
            "layer_displacement", ops.layer_displacement, {"displacement": Y} | layer, activation, ("bias", "inverse")
        ),
        Case(
            "code_difference",
            ops.code_difference,
            {"preactivation": Z, "change": DZ, "output": P, "indices": INDEX},
            {"kernel": 2},
            ("indices",),
        ),
        Case(
            "probe_difference",
            ops.probe_difference,
            {"output": P, "indices": INDEX},
            COUNTER | {"kernel": 2, "sigma": 1.0, "height": 2, "width": 2},
            ("indices",),
        ),
        Case("max_unpool", ops.max_unpool, {"values": P, "indices": INDEX}, {"height": 2, "width": 2}),
        Case("regularized_inverse", ops.regularized_inverse, {"weight": W}, {"reg": 1.0}),
        Case("regularized_solve", ops.regularized_solve, {"weight": W, "rhs": Y}, {"reg": 1.0}),
        Case(
            "input_projection",
            ops.input_projection,
            {"input": STACK["input"][None], "weight_ih": STACK["weight_ih"], "bias": STACK["bias"]},
            {},
            ("bias",),
        ),
        Case("hot_target", ops.hot_target, {"target": Y, "input": Y}),
        Case("n_hot", ops.n_hot, {"input": Y}),
        Case("Units", units, {"input": Y}),
        Case("Units", units.feasible, {"target": Y}),
        Case("Units", units.input_target, {"target": Y, "input": Y}),
        Case("kaczmarz_step", ops.kaczmarz_step, {"displacement": Y, "input": X, "weight": W}),
        Case(
            "kaczmarz_train",
            ops.kaczmarz_train,
            {"input": X, "labels": torch.arange(5) % 3},
            {"weights": [W.clone()], "biases": [B.clone()]},
        ),
        Case("running_accuracy", ops.running_accuracy, {"correct": torch.ones(5)}),
    ]


def module_cases() -> list[Case]:
    torch.manual_seed(0)
    layer = nn.TargetLinear(4, 3, rule=tpext.DifferenceTargetPropagation())
    net = nn.MLP([4, 3], rule=tpext.DifferenceTargetPropagation())
    streaming = nn.MLP([4, 3], rule=tpext.Kaczmarz())
    rnn = nn.RNN(4, 3, nonlinearity="tanh", rule=tpext.LearnedInverse())
    sequence = {"input": STACK["input"], "hx": STACK["h0"], "lengths": STACK["lengths"]}
    blocks = nn.TargetSequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    image = torch.rand(1, 2, 4, 4)
    return [
        Case("TargetLinear", layer, {"input": X}),
        Case("TargetLinear", layer.input_displacement, {"input": X, "displacement": Y}),
        Case("TargetLinear", layer.reconstruction_loss, {"input": X}),
        Case("TargetLinear", net, {"input": X}),
        Case("MLP", net.reconstruction_loss, {"input": X}),
        Case("MLP.stream", streaming.stream, {"input": X, "labels": torch.arange(5) % 3}),
        Case("RNN", rnn, sequence, {}, ("hx", "lengths")),
        Case("RNN", rnn.reconstruction_loss, sequence, {}, ("hx", "lengths")),
        Case("TargetSequential", blocks, {"input": X}),
        Case("TargetSequential", blocks.trace, {"input": X}),
        Case("HotTargetLoss", nn.HotTargetLoss(), {"input": Y, "target": torch.arange(5) % 3}),
        Case("BasicBlock", nn.networks.BasicBlock(2, 2), {"input": image}),
    ]


def other_cases() -> list[Case]:
    torch.manual_seed(0)
    blocks = nn.TargetSequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    calls = blocks.trace(X).calls
    noise = {"input_noise": torch.rand(5, 3)}
    through = {"calls": calls, "index": 1, "rule": blocks.rule}
    return [
        Case(
            "gradient_angles", diagnostics.gradient_angles, {"input": X}, {"net": blocks, "target": torch.arange(5) % 2}
        ),
        Case("feedback_angles", diagnostics.feedback_angles, {"input": X}, {"net": blocks}),
        Case("ldrl_loss", feedback.ldrl_loss, noise | {"output_noise": torch.rand(5, 2)}, {"call": calls[1]}),
        Case("reconstruction_loss", feedback.reconstruction_loss, noise, {"call": calls[1]}),
        Case("difference_reconstruction_loss", feedback.difference_reconstruction_loss, noise, through),
        Case("LDRL", feedback.LDRL(blocks, noise=0.1, lr=0.1).step, {"input": X}),
    ]


CASES = [*ops_cases(), *module_cases(), *other_cases()]


def call(case: Case, **changed: Any) -> Any:
    return case.function(**case.tensors | changed, **case.others)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_no_tensor_is_refused_by_name(case: Case) -> None:
    call(case)
    for name in case.tensors:
        for value in (None, [1.0], np.ones((5, 4), np.float32)):
            if value is None and name in case.optional:
                continue
            expected = rf"{case.name}.*: {name} must be a tensor.*got {type(value).__name__}"
            with pytest.raises(TypeError, match=expected):
                call(case, **{name: value})


def test_every_public_op_is_walked_over() -> None:
    walked = {case.name for case in ops_cases()}
    # a NamedTuple of results, an error, and what makes its own tensors
    without = {"KaczmarzStep", "SingularError", "counter_normal"}
    public = {name for name in ops.__all__ if callable(getattr(ops, name))}
    assert public - without <= walked
    # and of each, every argument that is annotated as a tensor
    for case in ops_cases():
        tensors = {
            name
            for name, parameter in inspect.signature(case.function).parameters.items()
            if re.fullmatch(r"Tensor( \| None)?", str(parameter.annotation))
        }
        assert tensors == set(case.tensors), case.name


@pytest.mark.parametrize("name", ["weights", "biases"])
def test_the_tensors_of_a_list_are_refused_by_their_place(name: str) -> None:
    arguments = {"input": X, "labels": torch.arange(5) % 3, "weights": [W.clone()], "biases": [B.clone()]}
    with pytest.raises(TypeError, match=rf"kaczmarz_train: {name}\[0\] must be a tensor \[M.*\], got list"):
        ops.kaczmarz_train(**arguments | {name: [[1.0]]})
    with pytest.raises(TypeError, match=rf"kaczmarz_train: {name} must be a sequence of tensors.*got NoneType"):
        ops.kaczmarz_train(**arguments | {name: None})


def test_other_arguments_than_tensors_are_refused_by_name() -> None:
    net = nn.TargetSequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    with pytest.raises(TypeError, match="gradient_angles: net must be a TargetSequential, got NoneType"):
        diagnostics.gradient_angles(None, X, torch.arange(5) % 2)
    with pytest.raises(TypeError, match="feedback_angles: net must be a TargetSequential, got Linear"):
        diagnostics.feedback_angles(torch.nn.Linear(4, 3), X)
    with pytest.raises(TypeError, match=r"layer_diagnostics: model must be a torch\.nn\.Module, got NoneType"):
        diagnostics.layer_diagnostics(None, lambda model: model(X).sum())
    with pytest.raises(TypeError, match=r"convert: model must be a torch\.nn\.Module, got list"):
        nn.convert([torch.nn.RNN(3, 4)])
    with pytest.raises(TypeError, match="layer_diagnostics: the value of loss must be a tensor, got float"):
        diagnostics.layer_diagnostics(nn.MLP([4, 3]), lambda model: float(model(X).sum()))
    with pytest.raises(TypeError, match="gradient_angles: the value of loss must be a tensor, got float"):
        diagnostics.gradient_angles(net, X, X, loss=lambda output, target: 1.0)
    for loss in (feedback.reconstruction_loss, lambda call, noise: feedback.ldrl_loss(call, noise, noise)):
        with pytest.raises(TypeError, match=r"loss: call must be a BlockCall of TargetSequential.trace, got NoneType"):
            loss(None, X)


def test_checks_do_not_break_compilation() -> None:
    for call_ in (
        lambda x: ops.regularized_inverse(x, 1.0),
        lambda x: ops.layer_inverse(x @ W.mT, x, W, B, "tanh"),
        lambda x: ops.hot_target(x, x),
    ):
        compiled = torch.compile(call_, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), call_(X))
