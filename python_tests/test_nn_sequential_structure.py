"""Networks of blocks: what they are made of, rules of users, and errors."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from target_networks import (
    DOUBLE,
    assert_equal,
    assert_same,
    each_rule,
    gradients,
    make_batch,
    make_blocks,
    make_net,
)
from torch import Tensor, nn
from torch.nn import functional

import tpext
from tpext import Backprop, DifferenceTargets, DirectTargets, GaussNewtonTargets, Targets
from tpext.feedback import BlockCall, DifferenceReconstruction, Feedback, Tied
from tpext.nn import TargetSequential
from tpext.nn.networks import resnet18
from tpext.rules import NetworkRule

# Structure


def test_blocks_may_have_names() -> None:
    net = TargetSequential(OrderedDict(first=nn.Linear(4, 3), top=nn.Linear(3, 2)))
    assert list(net.feedback) == ["top"]
    assert [block for block, _ in net.pairs()] == [net.blocks.first, net.blocks.top]
    assert set(net.state_dict()) == {
        *("blocks.first.weight", "blocks.first.bias", "blocks.top.weight", "blocks.top.bias"),
        *("feedback.top.weight", "feedback.top.bias"),
    }


@each_rule
def test_trace_is_the_forward_pass(rule: Any) -> None:
    net = make_net(rule)
    x = make_batch()[0]
    trace = net.trace(x)
    state = x
    for block, call in zip(net.blocks, trace.calls, strict=True):
        assert call.block is block
        assert torch.equal(call.input, state)
        state = block(state)
        assert torch.equal(call.output, state)
        assert not call.output.requires_grad
    assert torch.equal(trace.output, state)
    assert trace.output.requires_grad


def test_one_block_is_back_propagation() -> None:
    net = TargetSequential(nn.Sequential(nn.Linear(4, 3), nn.ELU()), rule=DifferenceTargets(target_step=0.3))
    assert not len(net.feedback)
    x = torch.randn(5, 4)
    found = []
    for run in (net, net.blocks):
        net.zero_grad()
        run(x).square().sum().backward()
        found.append(gradients(net))
    assert_same(*found, 1e-6)


def test_a_whole_network_as_one_block_is_refused() -> None:
    """Inside a block the chain rule holds, so it would be back-propagation without a word."""
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(
        ValueError, match=r"blocks must be given one by one, as in TargetSequential\(\*blocks_of\(net\)\), .* 2 lay"
    ):
        TargetSequential(layers)
    assert len(TargetSequential(*layers).feedback) == 2
    # where it is meant, and where it is the same
    assert not TargetSequential({"all": layers}).feedback
    assert not TargetSequential(layers, rule=Backprop()).feedback


def test_blocks_may_be_a_plain_dict() -> None:
    net = TargetSequential({"first": nn.Linear(4, 3), "top": nn.Linear(3, 2)})
    assert list(net.feedback) == ["top"]


class Pair(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(*sizes)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        output = self.linear(input)
        return output, output


def test_block_that_returns_several_tensors_is_named() -> None:
    blocks = OrderedDict(pair=Pair(4, 3), top=nn.Linear(3, 2))
    message = "^TargetSequential: block pair, a Pair, must return one tensor, got tuple"
    with pytest.raises(TypeError, match=message):
        TargetSequential(blocks)(torch.ones(2, 4))
    with pytest.raises(TypeError, match=message):
        TargetSequential(blocks, rule=DirectTargets(), input_shape=(4,))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (4, "input_shape must be the sizes of one sample, such as (3, 32, 32), got 4"),
        ((), "input_shape must be the sizes of one sample, such as (3, 32, 32), got ()"),
        ((2, 6.0, 6), "input_shape must be the sizes of one sample, such as (3, 32, 32), got (2, 6.0, 6)"),
        ((2, 0, 6), "input_shape must be the sizes of one sample, such as (3, 32, 32), got (2, 0, 6)"),
        ((3, 6, 6), "input_shape [3, 6, 6] does not fit block 0: "),
        ((2, 8, 8), "input_shape [2, 8, 8] does not fit block 2: "),
    ],
)
def test_bad_input_shapes_are_named(shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape("TargetSequential: " + message)):
        TargetSequential(*make_blocks(), rule=DirectTargets(), input_shape=shape)


def test_shapes_are_found_without_a_trace_in_the_network() -> None:
    """Direct feedback needs all sizes: a pass that leaves statistics and modes alone."""
    norm, drop = nn.BatchNorm1d(5), nn.Dropout(0.5)
    blocks = [nn.Sequential(nn.Linear(4, 5), norm, drop), nn.Linear(5, 3)]
    drop.eval()
    TargetSequential(*blocks, rule=DirectTargets(), input_shape=(4,))
    assert norm.num_batches_tracked == 0
    assert (norm.training, drop.training) == (True, False)


@pytest.mark.parametrize("init", ["symmetric", "tied"])
def test_feedback_without_the_blocks_weights_is_not_tied_silently(init: Any) -> None:
    with pytest.raises(ValueError, match=r"^DirectFeedback: its weights cannot be those of"):
        make_net(DirectTargets(), feedback_init=init)


def test_warning_of_relu_says_what_to_use() -> None:
    blocks = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.ReLU())]
    for init in ("symmetric", "tied"):
        with pytest.warns(UserWarning, match=r"^TargetSequential: with ReLU .* ELU is within a few") as caught:
            TargetSequential(*blocks, feedback_init=init)
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"^Tied: with ReLU") as caught:
        Tied(TargetSequential(*blocks))
    assert caught[0].filename == __file__


def test_warning_of_relu_in_residual_blocks() -> None:
    with pytest.warns(UserWarning, match="with ReLU even tied feedback stays"):
        TargetSequential(resnet18((3, 8, 8), channels=(2, 2)), feedback_init="tied")


@pytest.mark.filterwarnings("error")
def test_no_warning_without_relu_or_with_random_feedback() -> None:
    TargetSequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    TargetSequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.ELU()), feedback_init="tied")


# A rule of one's own


@dataclass(frozen=True)
class SignSymmetry(NetworkRule):
    """Targets by the signs of the transposed weights: no feedback to learn."""

    gain: float = 0.5

    def make_feedback(self, blocks: Any, shapes: Any) -> list[Feedback | None]:
        return [None] * len(blocks)

    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        linear: Any = call.block
        return self.gain * displacement @ linear.weight.detach().sign()


@dataclass(frozen=True)
class BadShape(SignSymmetry):
    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        return displacement


@dataclass(frozen=True)
class BadValue(SignSymmetry):
    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        return None  # type: ignore[return-value]


@dataclass(frozen=True)
class BadCount(SignSymmetry):
    def displacements(self, calls: Sequence[BlockCall], displacement: Tensor) -> list[Tensor]:
        return super().displacements(calls, displacement)[1:]


@dataclass(frozen=True)
class BadMove(SignSymmetry):
    """All at once, one of them in another type."""

    def displacements(self, calls: Sequence[BlockCall], displacement: Tensor) -> list[Tensor]:
        return [move.float() for move in super().displacements(calls, displacement)]


@dataclass(frozen=True)
class BadType(SignSymmetry):
    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        return super().propagate(call, displacement).float()


@pytest.mark.usefixtures("fresh_compiler")
def test_rule_of_ones_own() -> None:
    net = TargetSequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3), rule=SignSymmetry(target_step=0.3))
    net.double()
    x, labels = torch.randn(7, 4, dtype=DOUBLE), torch.arange(7) % 3
    output = net(x)
    functional.cross_entropy(output, labels).backward()
    error = (torch.softmax(output.detach(), 1) - functional.one_hot(labels, 3)) / 7
    first = net.blocks[0](x).detach()
    second = net.blocks[1](first).detach()
    at_second = 0.5 * error @ net.blocks[2].weight.sign()
    at_first = 0.5 * at_second @ net.blocks[1].weight.sign()
    for block, below, gradient in zip(net.blocks, (x, first, second), (at_first, at_second, error), strict=True):
        assert_equal(block.weight.grad, gradient.T @ below, 1e-12)
        assert_equal(block.bias.grad, gradient.sum(0), 1e-12)
    eager = gradients(net)
    net.zero_grad()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    functional.cross_entropy(compiled(x), labels).backward()
    assert_same(gradients(net), eager, 1e-12)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            BadShape(),
            "BadShape: the displacement of block middle's output must be [7, 6] torch.float64 on cpu, got [7, 3] "
            "torch.float64 on cpu",
        ),
        (
            BadType(),
            "BadType: the displacement of block middle's output must be [7, 6] torch.float64 on cpu, got [7, 6] "
            "torch.float32 on cpu",
        ),
        (
            BadValue(),
            "BadValue: the displacement of block middle's output must be [7, 6] torch.float64 on cpu, got NoneType",
        ),
        (
            BadMove(),
            "BadMove: the displacement of block first's output must be [7, 5] torch.float64 on cpu, got [7, 5] "
            "torch.float32 on cpu",
        ),
        (BadCount(), "BadCount: displacements must be one for each of the 3 blocks, got 2"),
    ],
    ids=["shape", "dtype", "value", "all", "count"],
)
def test_displacements_that_do_not_fit_are_named(rule: NetworkRule, message: str) -> None:
    """Before the rule sees them again at the next block, where they would not fit either."""
    blocks = OrderedDict(first=nn.Linear(4, 5), middle=nn.Linear(5, 6), top=nn.Linear(6, 3))
    net = TargetSequential(blocks, rule=rule).double()
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        net(torch.randn(7, 4, dtype=DOUBLE)).sum().backward()


def test_a_trainer_through_the_rule_names_them_too() -> None:
    class Thin(DifferenceTargets):
        def first_displacement(self, calls: Sequence[BlockCall], displacement: Tensor) -> Tensor:
            return displacement[:, :1]

    net = TargetSequential(nn.Linear(4, 5), nn.Linear(5, 3), rule=Thin())
    with pytest.raises(ValueError, match=r"^Thin: the displacement of block 0's output must be \[7, 5\] .* \[7, 1\]"):
        DifferenceReconstruction(net, lr=0.1, noise=0.1).step(torch.randn(7, 4))


# Errors


@pytest.mark.parametrize(
    ("blocks", "options", "error", "message"),
    [
        ((), {}, ValueError, "TargetSequential: blocks must be at least one module, got none"),
        ((OrderedDict(),), {}, ValueError, "TargetSequential: blocks must be at least one module, got none"),
        (
            (nn.Linear(3, 3), torch.tanh),
            {},
            TypeError,
            "TargetSequential: block 1 must be a torch.nn.Module, got builtin_function_or_method",
        ),
        (
            ({"first": nn.Linear(3, 3), "top": 3},),
            {},
            TypeError,
            "TargetSequential: block top must be a torch.nn.Module, got int",
        ),
        (
            ({"first": nn.Linear(3, 3), 1: nn.Linear(3, 3)},),
            {},
            ValueError,
            "TargetSequential: names of blocks must be text without dots, got 1",
        ),
        (
            ({"first.one": nn.Linear(3, 3)},),
            {},
            ValueError,
            "TargetSequential: names of blocks must be text without dots, got 'first.one'",
        ),
        (
            (nn.Linear(3, 3), nn.Linear(3, 3)),
            {"feedback": [None, nn.Linear(3, 3)]},
            TypeError,
            "TargetSequential: feedback must be tpext.feedback.Feedback modules, or None for a block, got Linear",
        ),
        (
            (nn.Linear(3, 3),),
            {"rule": "difference"},
            TypeError,
            "TargetSequential: rule must be for networks of blocks (tpext.rules.NetworkRule), such as "
            "tpext.DifferenceTargets(), or tpext.Backprop(), got 'difference'",
        ),
        (
            (nn.Linear(3, 3),),
            {"rule": tpext.RegularizedInverse()},
            TypeError,
            "TargetSequential: rule must be for networks of blocks (tpext.rules.NetworkRule)",
        ),
        (
            (nn.Linear(3, 3),),
            {"feedback_init": "zero"},
            ValueError,
            "TargetSequential: feedback_init must be one of 'random', 'symmetric', 'tied', got 'zero'",
        ),
        (
            (nn.Linear(3, 3), nn.Linear(3, 3)),
            {"feedback": [None]},
            ValueError,
            "TargetSequential: feedback must be one module for each of the 2 blocks, None for the first, got "
            "['NoneType']",
        ),
        (
            (nn.Linear(3, 3), nn.Linear(3, 3)),
            {"rule": DirectTargets()},
            ValueError,
            "TargetSequential: DirectTargets needs input_shape, the shape of one sample",
        ),
        (
            (nn.Linear(3, 3), nn.Dropout(0.5)),
            {"rule": GaussNewtonTargets()},
            ValueError,
            "GaussNewtonTargets: no block may mix samples or draw random numbers, got Dropout in training mode",
        ),
    ],
)
def test_bad_arguments_are_named(blocks: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        TargetSequential(*blocks, **options)


def test_feedback_of_the_first_block_is_refused() -> None:
    blocks = [nn.Linear(3, 3), nn.Linear(3, 3)]
    made = [tpext.feedback.make_feedback(block) for block in blocks]
    with pytest.raises(ValueError, match="feedback must be one module for each of the 2 blocks, None for the first"):
        TargetSequential(*blocks, feedback=made)


@pytest.mark.parametrize("rule", [DifferenceTargets(), Targets(), DirectTargets()], ids=repr)
def test_missing_feedback_is_named(rule: Any) -> None:
    net = TargetSequential(nn.Linear(3, 3), nn.Linear(3, 3), rule=rule, feedback=[None, None])
    with pytest.raises(
        ValueError, match=f"^{type(rule).__name__}: every block but the first needs feedback, block 1 has"
    ):
        net(torch.ones(2, 3)).sum().backward()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DifferenceTargets(target_step=0.0), "DifferenceTargets: target_step must be"),
        (lambda: Targets(target_step=float("inf")), "Targets: target_step must be"),
        (lambda: DifferenceTargets(reduction="none"), "DifferenceTargets: reduction must be"),
        (lambda: DifferenceTargets(normalize=1), "DifferenceTargets: normalize must be"),
        (lambda: GaussNewtonTargets(damping=-1.0), "GaussNewtonTargets: damping must be"),
        (lambda: DirectTargets(hidden=0), "DirectTargets: hidden must be an integer >= 1 or None, got 0"),
        (lambda: DirectTargets(hidden=True), "DirectTargets: hidden must be an integer >= 1 or None, got True"),
        (lambda: DirectTargets(activation="relu"), "DirectTargets: activation must be"),
        (lambda: DirectTargets(hidden_activation="relu"), "DirectTargets: hidden_activation must be"),
        (lambda: DirectTargets(recurrent_input=1), "DirectTargets: recurrent_input must be"),
    ],
)
def test_bad_arguments_of_rules_are_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        make()


def test_gauss_newton_serves_normalisation_in_evaluation_only() -> None:
    norm = nn.BatchNorm1d(3).eval()
    net = TargetSequential(nn.Linear(4, 3), nn.Sequential(norm, nn.Linear(3, 2)), rule=GaussNewtonTargets())
    net.eval()
    net(torch.randn(5, 4)).sum().backward()
    net.train()
    with pytest.raises(ValueError, match="got BatchNorm1d in training mode"):
        net(torch.randn(5, 4))


def kinds(blocks: list[nn.Sequential]) -> list[str]:
    return [" ".join(type(module).__name__ for module in block) for block in blocks]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (
            nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
            ),
            ["Conv2d BatchNorm2d ELU MaxPool2d", "Flatten Linear"],
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Dropout(), nn.Linear(3, 2)),
            ["Flatten Linear Tanh Dropout", "Linear"],
        ),
        (nn.Sequential(nn.BatchNorm1d(4), nn.ELU(), nn.Linear(4, 3), nn.Flatten()), ["BatchNorm1d ELU Linear Flatten"]),
        (nn.Sequential(nn.Flatten()), ["Flatten"]),
        (
            nn.Sequential(nn.LazyLinear(3), nn.LayerNorm((3, 3)), nn.LazyLinear(2)),
            ["LazyLinear LayerNorm", "LazyLinear"],
        ),
    ],
)
def test_blocks_of_a_plain_chain(network: nn.Sequential, expected: list[str]) -> None:
    assert kinds(tpext.nn.blocks_of(network)) == expected


def test_blocks_compute_what_the_chain_does_and_share_its_parameters() -> None:
    layers = nn.Sequential(nn.Linear(4, 3), nn.ELU(), nn.Linear(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = TargetSequential(*tpext.nn.blocks_of(layers))
    x = torch.randn(5, 4)
    assert torch.equal(net(x), layers(x))
    assert {*map(id, net.parameters())} >= {*map(id, layers.parameters())}
    with pytest.raises(TypeError, match=r"^blocks_of: network must be a .* without hooks, got Linear$"):
        tpext.nn.blocks_of(layers[0])  # type: ignore[arg-type]


class Doubled(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_sequence_that_does_more_than_its_modules_stays_whole() -> None:
    inner = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    inner.register_forward_hook(lambda module, input, output: 100 * output)
    for part in (inner, Doubled(nn.Linear(4, 3), nn.Tanh())):
        with pytest.raises(TypeError, match="without hooks"):
            tpext.nn.blocks_of(part)
        blocks = tpext.nn.blocks_of(nn.Sequential(part, nn.Linear(3, 2)))
        assert [len(block) for block in blocks] == [1, 1]
        assert blocks[0][0] is part


def test_activations_that_are_blocks_are_told_of() -> None:
    layers = [nn.Sequential(nn.Flatten()), nn.Linear(4, 3), nn.ELU(), nn.Linear(3, 2), nn.Dropout()]
    with pytest.warns(UserWarning, match=r"blocks without parameters learn worse .*, got 2, 4; tpext\.nn\.blocks_of"):
        TargetSequential(*layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TargetSequential(*layers, rule=Backprop())
