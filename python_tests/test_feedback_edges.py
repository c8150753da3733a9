"""What a reading of learned feedback found: networks and calls that went wrong without a word."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import tpext
from tpext.feedback import (
    LDRL,
    ClosedForm,
    CounterNoise,
    DifferenceReconstruction,
    Draw,
    Feedback,
    Fixed,
    Reconstruction,
    RunningLDRL,
    Tied,
    difference_reconstruction_loss,
    ldrl_loss,
    reconstruction_loss,
    register_feedback,
)
from tpext.nn import TargetSequential


def small_net(**options: Any) -> TargetSequential:
    return TargetSequential(nn.Sequential(nn.Linear(4, 5), nn.ELU()), nn.Linear(5, 3), **options)


def test_a_module_that_comes_twice_runs_twice() -> None:
    act, linear = nn.Tanh(), nn.Linear(5, 5)
    net = TargetSequential(nn.Linear(4, 5), nn.Sequential(linear, act, nn.Linear(5, 5), act), act, linear, act)
    x = torch.randn(2, 4)
    assert torch.equal(net(x), net.blocks(x))
    assert len(net.pairs()) == 5
    net(x).sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_the_blocks_own_activations_run_in_training(inplace: bool) -> None:
    """With their hooks, as in evaluation."""
    act = nn.ELU(inplace=inplace)
    net = TargetSequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), act), nn.Linear(5, 3))
    act.register_forward_hook(lambda module, args, output: 3 * output)
    x = torch.randn(2, 4)
    assert torch.equal(net(x), net.blocks(x))


def test_an_activation_in_place_of_another_is_refused() -> None:
    """The feedback is still that of the one before."""
    net = TargetSequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.ELU()), nn.Linear(5, 3))
    net.blocks[1][1] = nn.Tanh()
    with pytest.raises(ValueError, match="block must be ELU, of which it was made, got Tanh"):
        net(torch.randn(2, 4))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("sizes", list(itertools.product((8, 4), repeat=3)))
def test_sizes_of_images_may_change(optimizer: str, sizes: tuple[int, ...]) -> None:
    """The layout of the weights depends on the size; an optimizer that works element by element does not."""
    blocks = [nn.Conv2d(2, 3, 3, padding=1), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ELU())]
    nets = [TargetSequential(*copy.deepcopy(blocks)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    make = {
        "momentum": lambda fused: lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=fused),
        "adam": lambda fused: lambda p: torch.optim.Adam(p, 0.01, fused=fused),
    }[optimizer]
    trainers = [
        LDRL(net, noise=0.3, iterations=2, optimizer=make(fused))
        for net, fused in zip(nets, (True, False), strict=True)
    ]
    for size in sizes:
        x = torch.randn(3, 2, size, size)
        for trainer in trainers:
            trainer.step(x)
    fused, plain = (net.feedback["1"].parts["0"].weight for net in nets)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_a_backward_pass_frees_the_states() -> None:
    net = small_net()
    trace = net.trace(torch.randn(7, 4))
    state = weakref.ref(trace.calls[0].output)
    loss = trace.output.sum()
    del trace
    loss.backward()
    gc.collect()
    assert state() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_blocks_without_parameters_are_left_out() -> None:
    net = TargetSequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Sequential(nn.Flatten(), nn.Linear(18, 3)))
    x = torch.randn(4, 1, 8, 8)
    for trainer in (LDRL(net, lr=[0.1], noise=[0.1]), RunningLDRL(net, noise=0.1), ClosedForm(net)):
        assert [index for index, _ in trainer.layers] == [2]
        trainer.step(x)
    net(x).sum().backward()


DIRECT: Any = {"rule": tpext.DirectTargets(), "input_shape": (4,)}
MISFITS: list[tuple[Any, dict[str, Any]]] = [
    (lambda net: LDRL(net, lr=0.1, noise=0.1), DIRECT),
    (lambda net: Reconstruction(net, lr=0.1, noise=0.1), DIRECT),
    (lambda net: RunningLDRL(net, noise=0.1), DIRECT),
    (ClosedForm, DIRECT),
    (lambda net: DifferenceReconstruction(net, lr=0.1, noise=0.1, difference=False), {}),
]


@pytest.mark.parametrize(("make", "options"), MISFITS)
def test_a_trainer_of_other_feedback_is_refused(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="net must have feedback from the output of each"):
        make(small_net(**options))


def test_the_trace_of_another_network_is_refused() -> None:
    net = small_net()
    for other in (copy.deepcopy(net), TargetSequential(nn.Linear(4, 3))):
        with pytest.raises(ValueError, match="input must be a trace of the trainer's net"):
            LDRL(net, lr=0.1, noise=0.1).step(other.trace(torch.randn(2, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_low_precision_are_refused(dtype: torch.dtype) -> None:
    net = small_net().to(dtype)
    with pytest.raises(ValueError, match=r"TargetSequential: 0\.0\.weight must be float32 or float64"):
        net(torch.randn(2, 4, dtype=dtype))


@pytest.mark.parametrize("options", [{"feedback_init": "tied"}, {"feedback": [None, None]}])
def test_back_propagation_takes_no_feedback(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="do not belong to rule=Backprop"):
        small_net(rule=tpext.Backprop(), **options)


STEPS: dict[str, Any] = {
    "LDRL": lambda net: LDRL(net, lr=0.1, noise=0.1),
    "LDRL, Adam": lambda net: LDRL(net, noise=0.1, optimizer=lambda p: torch.optim.Adam(p, 0.1)),
    "Reconstruction": lambda net: Reconstruction(net, lr=0.1, noise=0.1),
    "DifferenceReconstruction": lambda net: DifferenceReconstruction(net, lr=0.1, noise=0.1),
    "RunningLDRL": lambda net: RunningLDRL(net, noise=0.1),
    "ClosedForm": ClosedForm,
}
each_trainer = pytest.mark.parametrize("name", STEPS)


@each_trainer
def test_inference_mode_is_refused_and_no_grad_is_not(name: str) -> None:
    net, x = small_net(), torch.randn(2, 4)
    trainer, message = STEPS[name](net), r": feedback cannot be trained under torch\.inference_mode\(\)"
    before = copy.deepcopy(net.state_dict())
    for input in (x, net.trace(x)):
        with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
            trainer.step(input)
    with torch.inference_mode():
        trace = net.trace(x)
    with pytest.raises(RuntimeError, match=message):
        trainer.step(trace)
    assert trainer.steps == 0
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with torch.inference_mode():
        features = 2 * x
    with torch.no_grad():
        trainer.step(features)
    assert any(
        not torch.equal(value, before[key]) for key, value in net.feedback.state_dict(prefix="feedback.").items()
    )


@each_trainer
@pytest.mark.parametrize("traced", [True, False])
def test_a_batch_without_samples_is_refused(name: str, traced: bool) -> None:
    net, x = small_net(), torch.zeros(0, 4)
    trainer = STEPS[name](net)
    with pytest.raises(ValueError, match="input must have at least one sample, got a batch of none"):
        trainer.step(net.trace(x) if traced else x)
    assert all(value.isfinite().all() for value in net.state_dict().values())


@each_trainer
def test_feedback_that_was_tied_afterwards_is_not_trained(name: str) -> None:
    net = small_net()
    trainer = STEPS[name](net)
    Tied(net)
    before = copy.deepcopy(net.state_dict())
    for act in (lambda: trainer.step(torch.randn(2, 4)), lambda: STEPS[name](net)):
        with pytest.raises(ValueError, match="feedback with weights of its own, got block 1's tied"):
            act()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    # these leave the weights alone
    Tied(net).step(torch.randn(2, 4))
    Fixed(net).step(torch.randn(2, 4))


def test_feedback_is_tied_wholly_or_not_at_all() -> None:
    net = TargetSequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    names = list(net.state_dict())
    with pytest.raises(ValueError, match="BatchNormFeedback: its weights cannot be those of BatchNorm1d"):
        Tied(net)
    assert list(net.state_dict()) == names
    # still of its own weights, which a step changes
    before = net.feedback["1"].weight.clone()
    LDRL(net, lr=0.1, noise=0.1).step(torch.randn(6, 4))
    assert not torch.equal(net.feedback["1"].weight, before)


def test_saved_sums_of_another_network_are_refused() -> None:
    trainer = RunningLDRL(small_net(), noise=0.1)
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="sums of 1 layers, got 0"):
        trainer.load_state_dict({**state, "sums": []})


def test_feedback_of_another_rule_is_named() -> None:
    """All sizes would fit."""
    blocks = [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)]
    for made, other, source in (
        (tpext.DifferenceTargets(), tpext.DirectTargets(), "network"),
        (tpext.DirectTargets(), tpext.DifferenceTargets(), "block"),
        (tpext.DirectTargets(), tpext.Targets(), "block"),
    ):
        net = TargetSequential(*blocks, rule=made, input_shape=(3,))
        net.rule = other
        with pytest.raises(ValueError, match=rf"feedback must map from the output of the {source}, that of block \d"):
            net(torch.randn(2, 3)).sum().backward()


def test_noise_that_would_be_broadcast_is_refused() -> None:
    calls = small_net().trace(torch.randn(2, 4)).calls
    one, rule = torch.randn(1, 5), tpext.DifferenceTargets()
    for loss in (
        lambda: ldrl_loss(calls[1], one, torch.randn(2, 3)),
        lambda: reconstruction_loss(calls[1], one),
        lambda: difference_reconstruction_loss(calls, 1, rule, one),
    ):
        with pytest.raises(ValueError, match=r"_loss: input_noise must be \[2, 5\], got \[1, 5\]"):
            loss()
    with pytest.raises(ValueError, match=r"ldrl_loss: output_noise must be \[2, 3\], got \[1, 3\]"):
        ldrl_loss(calls[1], torch.randn(2, 5), torch.randn(1, 3))
    for index in (0, 2, -1):
        with pytest.raises(ValueError, match=rf"index must be in 1 \.\. 1, got {index}"):
            difference_reconstruction_loss(calls, index, rule, one)


def test_draws_without_a_stream_of_their_own_are_refused() -> None:
    """Noise of the layer above would come again."""
    like = torch.zeros(1, 1)
    CounterNoise(0)(Draw(0, 1, 2**19 - 1, True), like)
    for draw in (Draw(0, 1, 2**19, False), Draw(0, 2**12, 0, False)):
        with pytest.raises(ValueError, match=r"layer must be below 2\^12 and draw below 2\^19"):
            CounterNoise(0)(draw, like)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_lazy_modules_are_named() -> None:
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="make_feedback: LazyLinear must know its sizes"):
        TargetSequential(nn.Linear(4, 5), lazy)
    lazy(torch.zeros(1, 5))
    TargetSequential(nn.Linear(4, 5), lazy)(torch.randn(2, 4)).sum().backward()


class Through(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


class ThroughFeedback(Feedback):
    def forward(self, output: torch.Tensor, code: Any) -> torch.Tensor:
        return output


@pytest.mark.parametrize("kinds", [("Through",), (), (ThroughFeedback,), (Through(),)])
def test_only_classes_of_blocks_are_registered(kinds: Any) -> None:
    with pytest.raises(TypeError, match="register_feedback: kinds must be"):
        register_feedback(*kinds)


@pytest.mark.parametrize("made", [None, nn.Linear(5, 5)])
def test_what_is_registered_must_return_feedback(made: Any) -> None:
    register_feedback(Through)(lambda block: made)
    for block in (Through(), nn.Sequential(nn.Linear(5, 5), Through())):
        with pytest.raises(TypeError, match=r"for Through must return a tpext\.feedback\.Feedback, got"):
            TargetSequential(nn.Linear(4, 5), block)


def test_one_value_a_channel_is_not_normalised() -> None:
    block = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    net = TargetSequential(nn.Linear(4, 5), block, nn.Linear(5, 3)).eval()
    with pytest.raises(
        ValueError, match=r"BatchNormFeedback: output must have more than one value a channel.*\[1, 5\]"
    ):
        net(torch.randn(1, 4)).sum().backward()
    net(torch.randn(2, 4)).sum().backward()
