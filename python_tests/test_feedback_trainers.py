"""Trainers of feedback: gradients against autograd, expectations and fixed points against explicit Jacobians."""

from __future__ import annotations

import copy
import inspect
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from target_networks import DOUBLE, assert_equal, degrees, normal_noise
from torch import Tensor, nn
from torch.nn import functional

import tpext
from tpext.feedback import (
    LDRL,
    BlockCall,
    ClosedForm,
    CounterNoise,
    DifferenceReconstruction,
    Draw,
    Feedback,
    Fixed,
    LinearMap,
    Reconstruction,
    RunningLDRL,
    Tied,
    Trace,
    layered_feedback,
    ldrl_loss,
    register_feedback,
)
from tpext.nn import TargetSequential
from tpext.nn.networks import BasicBlock


class Residual(nn.Module):
    """A block that is no chain: ``x + tanh(L x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        return input + torch.tanh(self.linear(input))


@register_feedback(Residual)
class ResidualFeedback(Feedback):
    def __init__(self, block: Residual) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, output: Tensor, code: Any) -> Tensor:
        return output + self.linear(torch.tanh(output))


Build = Callable[[], nn.Module]
PLANES: dict[str, Build] = {
    "pool": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
    "overlapping pool": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ELU(0.5), nn.MaxPool2d(3, 2, padding=1)),
    "oblong pool": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d((1, 2), (2, 1))),
    "dilated pool": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ELU(), nn.MaxPool2d(2, 1, dilation=(1, 2))),
    "ceil pool": lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ELU(), nn.MaxPool2d(2, ceil_mode=True)),
    "no activation": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)),
    "pool first": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.ReLU()),
    "strided": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2, 2, groups=2, bias=False), nn.Tanh()),
    "pixels": lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU()),
    "convolution": lambda: nn.Conv2d(2, 3, 3, padding=1),
    "to vectors": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ELU(), nn.MaxPool2d(2), nn.Flatten()),
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Tanh()),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 3)), nn.Sequential(nn.ELU(), nn.GELU())
    ),
    "smooth": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.MaxPool2d(2)),
}
VECTORS: dict[str, Build] = {
    "linear": lambda: nn.Linear(4, 3),
    "linear, elu": lambda: nn.Sequential(nn.Linear(4, 3), nn.ELU()),
    "linear, relu": lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU()),
    "linear, sigmoid": lambda: nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()),
}
SERIES: dict[str, Build] = {
    "conv1d": lambda: nn.Sequential(nn.Conv1d(2, 3, 3, 2), nn.ELU(), nn.MaxPool1d(2)),
    "linear of series": lambda: nn.Sequential(nn.Linear(9, 4), nn.Tanh()),
}
AUTOGRAD: dict[str, Build] = {
    "residual": Residual,
    "not first": lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 3)),
    "normalised": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ELU()),
}
SHAPES = [(PLANES, (2, 6, 6)), (VECTORS, (4,)), (SERIES, (2, 9)), (AUTOGRAD, (4,))]
LINEAR = [(kind, build, shape) for group, shape in SHAPES[:3] for kind, build in group.items()]
BLOCKS = [*LINEAR, *((kind, build, (4,)) for kind, build in AUTOGRAD.items())]
BLOCKS.append(("basic block", lambda: BasicBlock(2, 3, stride=2), (2, 6, 6)))


def of_blocks(blocks: Sequence[tuple[str, Build, tuple[int, ...]]]) -> Any:
    return pytest.mark.parametrize(("build", "shape"), [b[1:] for b in blocks], ids=[b[0] for b in blocks])


def one_block(build: Build, shape: tuple[int, ...], batch: int = 3) -> tuple[TargetSequential, Trace]:
    """A network whose one block with feedback is this one, and its trace."""
    net = TargetSequential(nn.Identity(), build()).double()
    return net, net.trace(torch.randn(batch, *shape, dtype=DOUBLE))


def head_of(net: TargetSequential) -> LinearMap:
    (head,) = [module for module in net.feedback.modules() if isinstance(module, LinearMap)]
    return head


def weights(net: TargetSequential) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.feedback.named_parameters()}


def by_autograd(net: TargetSequential, loss: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss, and its gradients for the feedback's parameters."""
    parameters = dict(net.feedback.named_parameters())
    net.feedback.requires_grad_(True)
    value = loss()
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    net.feedback.requires_grad_(False)
    return value.detach(), dict(zip(parameters, grads, strict=True))


def assert_step_is(trainer: Any, trace: Trace, loss: Callable[[], Tensor], rtol: float = 1e-12) -> None:
    """One step with ``lr=1`` records the loss and subtracts its gradient."""
    value, expected = by_autograd(trainer.net, loss)
    before = weights(trainer.net)
    (record,) = trainer.step(trace, record=True)
    assert_equal(record.loss, value, rtol)
    scale = max([1.0, *(float(grad.abs().max()) for grad in expected.values())])
    assert any(grad.any() for grad in expected.values())
    for name, after in weights(trainer.net).items():
        torch.testing.assert_close(before[name] - after, expected[name], rtol=0, atol=rtol * scale)


# The local difference reconstruction loss


@of_blocks(BLOCKS)
@pytest.mark.parametrize("indices", ["noisy", "clean"])
@pytest.mark.parametrize(("samples", "source"), [(1, None), (3, normal_noise)])
def test_gradient_is_that_of_the_loss(
    build: Build, shape: tuple[int, ...], indices: Any, samples: int, source: Any
) -> None:
    net, trace = one_block(build, shape)
    noise, sigma, call = source or CounterNoise(0), 0.3, trace.calls[1]

    def loss() -> Tensor:
        return torch.stack(
            [
                ldrl_loss(
                    call,
                    sigma * noise(Draw(0, 1, draw, False), call.input),
                    sigma * noise(Draw(0, 1, draw, True), call.output),
                    indices,
                )
                for draw in range(samples)
            ]
        ).mean()

    trainer = LDRL(net, lr=1.0, noise=sigma, samples=samples, indices=indices, noise_source=source)
    assert_step_is(trainer, trace, loss)


def test_loss_by_its_equation() -> None:
    _, trace = one_block(PLANES["pool"], (2, 6, 6))
    block, feedback, x, y, code, _ = trace.calls[1]
    dx, dy = torch.randn_like(x), torch.randn_like(y)
    noisy, noisy_code = feedback.encode(block, x + dx)
    for indices, used in (("noisy", noisy_code), ("clean", code)):
        moved = feedback(noisy, used) - feedback(y, code)
        back = feedback(y + dy, code) - feedback(y, code)
        per_sample = [-2 * torch.dot(dx[b].flatten(), moved[b].flatten()) + back[b].norm() ** 2 for b in range(3)]
        assert_equal(ldrl_loss(trace.calls[1], dx, dy, indices), sum(per_sample) / 3, 1e-12)


def test_indices_differ_where_maxima_switch() -> None:
    _, trace = one_block(PLANES["pool"], (2, 6, 6))
    call = trace.calls[1]
    dx, dy = torch.randn_like(call.input), torch.randn_like(call.output)
    assert ldrl_loss(call, dx, dy, "noisy") != ldrl_loss(call, dx, dy, "clean")


@of_blocks(LINEAR)
def test_bias_gets_no_gradient(build: Build, shape: tuple[int, ...]) -> None:
    net, trace = one_block(build, shape)
    before = weights(net)
    LDRL(net, lr=0.1, noise=0.3, iterations=3, momentum=0.9).step(trace)
    for name, after in weights(net).items():
        assert torch.equal(after, before[name]) == name.endswith("bias"), name


def orthogonal(size: int, signs: bool = False) -> Any:
    """A noise source whose draws ``0 .. size - 1`` are a whole basis: exact means of quadratic forms.

    With signs, ``2 size`` draws of either sign: the third derivatives' terms cancel too.
    """

    def noise(draw: Draw, like: Tensor) -> Tensor:
        rows = torch.zeros(len(like), size, dtype=like.dtype)
        sign = -1 if signs and draw.draw % (2 * size) >= size else 1
        rows[:, draw.draw % size] = sign * size**0.5
        return rows.reshape(like.shape)

    return noise


@pytest.mark.parametrize(
    ("block", "shape"),
    [(nn.Linear(5, 5), (5,)), (nn.Conv2d(2, 2, 3, padding=1), (2, 3, 3))],
    ids=["linear", "convolution"],
)
@pytest.mark.parametrize("second_term", ["drawn", "expected"])
def test_mean_loss_of_a_linear_block(block: nn.Module, shape: tuple[int, ...], second_term: Any) -> None:
    """``sigma^2 (||J_G - J_F^T||^2 - ||J_F||^2)``, whose gradient is what a step subtracts."""
    net, trace = one_block(lambda: copy.deepcopy(block), shape)
    size, sigma = trace.calls[1].output[0].numel(), 0.7
    forward, feedback = net.blocks[1], net.feedback["1"]
    zero = torch.zeros(1, *shape, dtype=DOUBLE)
    j_forward = torch.func.jacrev(forward)(zero).reshape(size, size)
    code = feedback.encode(forward, zero)[1]

    def loss() -> Tensor:
        j_feedback = torch.autograd.functional.jacobian(lambda y: feedback(y, code), zero, create_graph=True)
        return sigma**2 * ((j_feedback.reshape(size, size) - j_forward.T).square().sum() - j_forward.square().sum())

    trainer = LDRL(net, lr=1.0, noise=sigma, samples=size, second_term=second_term, noise_source=orthogonal(size))
    assert_step_is(trainer, trace, loss)


# Fixed points, by explicit Jacobians


def feedback_jacobians(call: BlockCall) -> Tensor:
    """``J_G [B, outputs, B, inputs]`` transposed to ``[B, x, B, y]``, at the clean code; zero between samples."""
    jacobian = torch.autograd.functional.jacobian(lambda y: call.feedback(y, call.code), call.output, create_graph=True)
    return jacobian.reshape(call.input.numel(), call.output.numel())


def block_jacobians(call: BlockCall) -> Tensor:
    return torch.func.jacrev(call.block)(call.input).reshape(call.output.numel(), call.input.numel())


@of_blocks(LINEAR)
def test_expected_second_term_is_the_feedbacks_jacobian(build: Build, shape: tuple[int, ...]) -> None:
    """``sigma^2`` times the mean over the batch of ``||J_G||^2``, borders and shared places included."""
    net, trace = one_block(build, shape, batch=2)
    trainer = LDRL(
        net, lr=1.0, noise=0.5, second_term="expected", noise_source=lambda draw, like: torch.zeros_like(like)
    )
    assert_step_is(trainer, trace, lambda: 0.25 * feedback_jacobians(trace.calls[1]).square().sum() / 2)


def mismatch(call: BlockCall) -> Tensor:
    return (feedback_jacobians(call) - block_jacobians(call).T).square().sum() / len(call.input)


@of_blocks(LINEAR)
def test_closed_form_is_stationary(build: Build, shape: tuple[int, ...]) -> None:
    """Least ``||J_G - J_F^T||^2``, a quadratic form of the weight."""
    net, trace = one_block(build, shape, batch=2)
    call = trace.calls[1]
    scale = by_autograd(net, lambda: mismatch(call))[1]
    ClosedForm(net).step(trace)
    for name, grad in by_autograd(net, lambda: mismatch(call))[1].items():
        assert float(grad.abs().max()) <= 1e-10 * max(float(scale[name].abs().max()), 1.0), name
    assert head_of(net).current_weight().any()


@of_blocks(LINEAR)
def test_running_solution_of_exact_noise_is_the_closed_form(build: Build, shape: tuple[int, ...]) -> None:
    net, trace = one_block(build, shape)
    size = trace.calls[1].input[0].numel()
    noise = orthogonal(size, signs=True)
    RunningLDRL(net, noise=1e-4, draws=2 * size, decay=0.0, indices="clean", noise_source=noise).step(trace)
    running = weights(net)
    ClosedForm(net).step(trace)
    for name, expected in weights(net).items():
        assert_equal(running[name], expected, 1e-5)


def test_closed_form_of_a_linear_block_is_its_weight() -> None:
    for build, shape in ((VECTORS["linear"], (4,)), (PLANES["convolution"], (2, 6, 6))):
        net, trace = one_block(build, shape)
        ClosedForm(net).step(trace)
        assert_equal(head_of(net).current_weight(), head_of(net).transported(net.blocks[1]), 1e-12)


def test_expected_second_term_leaves_out_units_at_zero() -> None:
    """Behind a ReLU a unit at zero has no slope, and lets half the noise through."""
    net, _ = one_block(VECTORS["linear, relu"], (4,))
    net.blocks[1][0].weight.data.fill_(-1)
    x, losses = torch.ones(50, 4, dtype=DOUBLE), {}
    for term in ("drawn", "expected"):
        trainer = LDRL(copy.deepcopy(net), lr=1.0, noise=1e-3, samples=50, second_term=term)
        (losses[term],) = (record.loss for record in trainer.step(x, record=True))
    # E[relu(d)^2] = sigma^2 / 2, and of two units sigma^2 / (2 pi)
    square = head_of(net).current_weight().mT @ head_of(net).current_weight()
    off = square.sum() - square.trace()
    assert losses["expected"] == 0
    assert_equal(losses["drawn"], 1e-6 * (square.trace() / 2 + off / (2 * torch.pi)), 0.1)


def test_closed_form_is_zero_where_nothing_passes() -> None:
    net, _ = one_block(VECTORS["linear, relu"], (4,))
    net.blocks[1][0].weight.data[1] = -1
    ClosedForm(net).step(torch.ones(3, 4, dtype=DOUBLE))
    weight = head_of(net).current_weight()
    assert not weight[:, 1].any()
    assert weight.isfinite().all()


@pytest.mark.parametrize("make", [ClosedForm, lambda net: RunningLDRL(net, noise=0.1)], ids=["closed", "running"])
def test_a_batch_with_nan_shows_in_the_solution(make: Any) -> None:
    """Not as weights of zero, which look like a layer that nothing passes."""
    net, _ = one_block(PLANES["pool"], (2, 6, 6))
    make(net).step(torch.full((3, 2, 6, 6), torch.nan, dtype=DOUBLE))
    assert head_of(net).current_weight().isnan().all()


def test_running_means_over_two_batches() -> None:
    """``W = sum of R / sum of D``, older batches times ``decay``, both means over the batch."""
    net, _ = one_block(VECTORS["linear, elu"], (4,))
    linear, decay, sigma, batches = net.blocks[1][0], 0.6, 0.2, torch.randn(2, 7, 4, dtype=DOUBLE)
    trainer = RunningLDRL(net, noise=sigma, draws=2, decay=decay, noise_source=normal_noise)
    numerator, denominator = torch.zeros(4, 3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    for step, x in enumerate(batches):
        numerator, denominator = decay * numerator, decay * denominator
        y, before = functional.elu(linear(x)).detach(), head_of(net).weight.clone()
        power = torch.where(y > 0, 1, y.exp()).square().mean(0)
        loss = sigma**2 * (power * before.square()).sum()
        for draw in range(2):
            dx = sigma * normal_noise(Draw(step, 1, draw, False), x)
            moved = (functional.elu(functional.elu(linear(x + dx))) - functional.elu(y)).detach()
            numerator += dx.T @ moved / (sigma**2 * 2 * 7)
            loss -= 2 * (dx * (moved @ before.T)).sum() / (2 * 7)
        denominator += power
        (record,) = trainer.step(x, record=True)
        # of the weights before, on this batch: ldrl_loss with the expectation of its second term
        assert_equal(record.loss, loss, 1e-12)
        assert_equal(head_of(net).weight, numerator / denominator, 1e-12)


def test_running_solution_needs_no_weights_of_the_block() -> None:
    """From noise alone, many batches: near the transposed weight of a linear block."""
    net, _ = one_block(VECTORS["linear"], (4,))
    trainer = RunningLDRL(net, noise=0.1, draws=4, decay=0.98)
    for _ in range(100):
        trainer.step(torch.randn(32, 4, dtype=DOUBLE))
    assert degrees(head_of(net).weight, net.blocks[1].weight.T.detach()) < 3


# Reconstruction


@of_blocks(BLOCKS)
@pytest.mark.parametrize("indices", ["noisy", "clean"])
@pytest.mark.parametrize(("reduction", "sigma"), [("sample", 0.3), ("element", 0.3), ("element", 0.001)])
def test_reconstruction_by_its_equation(
    build: Build, shape: tuple[int, ...], indices: Any, reduction: Any, sigma: float
) -> None:
    """Sums over features; or means over all elements, divided by the variance but at most by 0.02^2."""
    net, trace = one_block(build, shape)
    block, feedback, x, _, code, _ = trace.calls[1]

    def loss() -> Tensor:
        noisy = x + sigma * normal_noise(Draw(0, 1, 0, False), x)
        output, noisy_code = feedback.encode(block, noisy, code)
        rebuilt = feedback(output.detach(), noisy_code if indices == "noisy" else code)
        if reduction == "sample":
            return (rebuilt - noisy).square().sum() / len(x)
        return functional.mse_loss(rebuilt, noisy) / max(sigma, 0.02) ** 2

    trainer = Reconstruction(net, lr=1.0, noise=sigma, indices=indices, reduction=reduction, noise_source=normal_noise)
    assert_step_is(trainer, trace, loss, 1e-11)


DIRECT: dict[str, dict[str, Any]] = {
    "linear": {},
    "hidden": {"hidden": 6, "activation": "tanh"},
    "recurrent": {"recurrent_input": True},
    "hidden recurrent": {"hidden": 6, "hidden_activation": "identity", "recurrent_input": True},
}


def deep_blocks() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(n, 5), nn.Tanh()) for n in (4, 5, 5)] + [nn.Linear(5, 3)]


@pytest.mark.parametrize("kind", DIRECT)
@pytest.mark.parametrize("difference", [True, False])
def test_direct_feedback_learns_by_its_equation(kind: str, difference: bool) -> None:
    """DDTP: ``Q(a(h + e)) + h - Q(a(h))`` is ``h + e``; DDTP-control without difference and variance."""
    net = TargetSequential(*deep_blocks(), rule=tpext.DirectTargets(**DIRECT[kind]), input_shape=(4,)).double()
    trace, sigma = net.trace(torch.randn(7, 4, dtype=DOUBLE)), 0.3
    output = trace.calls[-1].output
    expected: dict[str, Tensor] = {}
    losses = []
    for index in (1, 2, 3):
        feedback = net.feedback[str(index)]
        h = trace.calls[index].input
        noisy = h + sigma * normal_noise(Draw(0, index, 0, False), h)

        def loss(index: int = index, feedback: Any = feedback, h: Tensor = h, noisy: Tensor = noisy) -> Tensor:
            far = net.blocks[index:](noisy).detach()
            if not difference:
                return functional.mse_loss(feedback(far, h), noisy)
            return functional.mse_loss(feedback(far, h) + h - feedback(output, h), noisy) / sigma**2

        value, grads = by_autograd(net, loss)
        losses.append(value)
        expected |= {n: g for n, g in grads.items() if n.startswith(f"{index}.linear.")}
    before = weights(net)
    trainer = DifferenceReconstruction(net, lr=1.0, noise=sigma, difference=difference, noise_source=normal_noise)
    records = trainer.step(trace, record=True)
    assert_equal(torch.stack([record.loss for record in records]), torch.stack(losses), 1e-12)
    for name, after in weights(net).items():
        # the hidden layer, if there is one, is not trained
        torch.testing.assert_close(
            before[name] - after, expected.get(name, torch.zeros_like(after)), rtol=0, atol=1e-12, msg=name
        )


@pytest.mark.parametrize("kind", DIRECT)
@pytest.mark.parametrize("layers", [3, 12])
def test_step_of_direct_feedback_runs_each_layers_feedback_alone(kind: str, layers: int) -> None:
    """Twice a layer, moved and still: work that grows with the number of layers, not with its square."""
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(layers)]
    net = TargetSequential(*blocks, rule=tpext.DirectTargets(**DIRECT[kind]), input_shape=(4,))
    trace, ran = net.trace(torch.randn(5, 4)), []
    for feedback in net.feedback.values():
        feedback.register_forward_hook(lambda *call: ran.append(call[0]))
    DifferenceReconstruction(net, lr=0.1, noise=0.1).step(trace)
    assert len(ran) == 2 * (layers - 1)


def test_difference_reconstruction_goes_through_all_blocks_above() -> None:
    """Down with the feedback above, then one step that is trained; conv, pool and flatten included."""
    blocks = [
        nn.Conv2d(2, 2, 3),
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ELU()),
        nn.Linear(4, 3),
    ]
    net = TargetSequential(*blocks).double()
    trace, sigma = net.trace(torch.randn(5, 2, 6, 6, dtype=DOUBLE)), 0.2
    calls, before = trace.calls, weights(net)
    expected: dict[str, Tensor] = {}
    for index in (1, 2, 3):
        h = calls[index].input
        noisy = h + sigma * normal_noise(Draw(0, index, 0, False), h)

        def loss(index: int = index, h: Tensor = h, noisy: Tensor = noisy) -> Tensor:
            target = net.blocks[index:](noisy).detach()
            for call in reversed(calls[index:]):
                target = call.input + call.feedback(target, call.code) - call.feedback(call.output, call.code)
            return functional.mse_loss(target, noisy) / sigma**2

        expected |= {n: g for n, g in by_autograd(net, loss)[1].items() if n.startswith(f"{index}.")}
    DifferenceReconstruction(net, lr=1.0, noise=sigma, noise_source=normal_noise).step(trace)
    for name, after in weights(net).items():
        torch.testing.assert_close(before[name] - after, expected[name], rtol=0, atol=1e-12)


# What every trainer keeps to

TRAINERS: dict[str, Callable[[TargetSequential], Any]] = {
    "LDRL": lambda net: LDRL(net, lr=0.01, noise=0.3, iterations=[2, 3], momentum=0.9),
    "LDRL, expected": lambda net: LDRL(net, lr=0.01, noise=0.3, second_term="expected", weight_decay=0.1),
    "LDRL, grid": lambda net: LDRL(net, lr=0.01, noise=0.3, iterations=2, second_term="expected", pixels="grid"),
    "LDRL, Adam": lambda net: LDRL(net, noise=0.3, samples=3, optimizer=lambda p: torch.optim.Adam(p, 1e-2)),
    "RunningLDRL": lambda net: RunningLDRL(net, noise=[0.1, 0.2], draws=[1, 2]),
    "RunningLDRL, grid": lambda net: RunningLDRL(net, noise=0.1, draws=9, pixels="grid"),
    "ClosedForm": ClosedForm,
    "Reconstruction": lambda net: Reconstruction(net, lr=0.01, noise=0.1, iterations=2, momentum=0.9),
    "DifferenceReconstruction": lambda net: DifferenceReconstruction(net, lr=0.01, noise=0.1, momentum=0.9),
    "Tied": Tied,
    "Fixed": Fixed,
}
MOVING = [name for name in TRAINERS if name not in ("Tied", "Fixed")]


def small_net() -> TargetSequential:
    return TargetSequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 2, 8, 8, generator=generator), torch.randint(3, (5,), generator=generator)


def train(net: TargetSequential, trainer: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, labels = batch(step)
        trace = net.trace(x)
        trainer.step(trace)
        optimizer.zero_grad()
        functional.cross_entropy(trace.output, labels).backward()
        optimizer.step()


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("name", TRAINERS)
def test_resumed_run_has_the_same_bits(name: str) -> None:
    def fresh() -> tuple[TargetSequential, Any, torch.optim.Optimizer]:
        net = small_net()
        return net, TRAINERS[name](net), torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)

    whole, first, second = (fresh() for _ in range(3))
    first[0].load_state_dict(whole[0].state_dict())
    train(*whole, range(4))
    train(*first, range(2))
    stored = io.BytesIO()
    torch.save([part.state_dict() for part in first], stored)
    # what goes on must not change what was saved
    train(*first, range(2, 3))
    stored.seek(0)
    for part, state in zip(second, torch.load(stored), strict=True):
        part.load_state_dict(state)
    train(*second, range(2, 4))
    assert_same_state(second[0], whole[0])


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_the_feedback_only(name: str) -> None:
    net = small_net()
    trainer = TRAINERS[name](net)
    blocks, before = copy.deepcopy(net.blocks), weights(net)
    random_state = torch.get_rng_state()
    trainer.step(batch(0)[0])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_state(net.blocks, blocks)
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [True] * 6 + [False] * len(before)
    moved = {key for key, after in weights(net).items() if not torch.equal(after, before[key])}
    assert {key.split(".")[0] for key in moved} == ({"1", "2"} if name in MOVING else set())


@pytest.mark.parametrize("name", TRAINERS)
def test_loss_and_optimizer_train_the_blocks_only(name: str) -> None:
    net = small_net()
    trainer = TRAINERS[name](net)
    trainer.step(batch(0)[0])
    before, blocks = weights(net), copy.deepcopy(net.blocks)
    x, labels = batch(1)
    functional.cross_entropy(net(x), labels).backward()
    assert all(p.grad is None for p in net.feedback.parameters())
    torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1).step()
    assert all(torch.equal(after, before[key]) for key, after in weights(net).items())
    assert not any(map(torch.equal, net.blocks.parameters(), blocks.parameters()))


@pytest.mark.parametrize("name", TRAINERS)
def test_batch_and_its_trace_are_the_same_step(name: str) -> None:
    net = small_net()
    other = copy.deepcopy(net)
    x = batch(0)[0]
    TRAINERS[name](net).step(x)
    TRAINERS[name](other).step(other.trace(x))
    assert_same_state(net, other)


@pytest.mark.parametrize("name", MOVING)
def test_order_of_the_layers_does_not_matter(name: str) -> None:
    net = small_net()
    other = copy.deepcopy(net)
    forwards, backwards = TRAINERS[name](net), TRAINERS[name](other)
    for values in vars(backwards).values():
        if isinstance(values, list):
            values.reverse()
    for step in range(2):
        forwards.step(batch(step)[0])
        backwards.step(batch(step)[0])
    if name == "DifferenceReconstruction":
        # whose loss is that of the feedback above too
        with pytest.raises(AssertionError):
            assert_same_state(other, net)
    else:
        assert_same_state(other, net)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("inside", [True, False])
def test_step_on_a_trace_under_autocast(name: str, inside: bool) -> None:
    """Near the step of float32; Adam's first step has the size of its rate, and a small gradient may turn its sign."""
    most = 0.3 if "Adam" in name else 0.1
    net = small_net()
    before, exact = weights(net), copy.deepcopy(net)
    TRAINERS[name](exact).step(batch(0)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace = net.trace(batch(0)[0])
        if inside:
            TRAINERS[name](net).step(trace)
    if not inside:
        TRAINERS[name](net).step(trace)
    for key, after in weights(net).items():
        wanted = weights(exact)[key] - before[key]
        assert (after - before[key] - wanted).norm() <= most * wanted.norm(), key


def test_gradients_of_a_sum_of_losses_are_those_of_each_layer() -> None:
    net = small_net()
    calls = net.trace(batch(0)[0]).calls[1:]
    noise = [(torch.randn_like(call.input), torch.randn_like(call.output)) for call in calls]
    losses = [lambda call=call, pair=pair: ldrl_loss(call, *pair) for call, pair in zip(calls, noise, strict=True)]
    _, joint = by_autograd(net, lambda: sum(loss() for loss in losses))
    for call, loss in zip(calls, losses, strict=True):
        for name, grad in by_autograd(net, loss)[1].items():
            own = name.startswith(f"{call.name}.")
            assert torch.equal(grad, joint[name] if own else torch.zeros_like(grad)), name


def test_parallel_form_is_adam_on_the_mean_of_the_losses() -> None:
    """ParallelDTP: ten draws together, one step of Adam for all layers."""
    net, sigma = small_net().double(), 0.3
    trace = net.trace(batch(0)[0].double())
    other = copy.deepcopy(net)

    def loss() -> Tensor:
        losses = [
            ldrl_loss(
                call,
                sigma * normal_noise(Draw(0, index, draw, False), call.input),
                sigma * normal_noise(Draw(0, index, draw, True), call.output),
            )
            for index, call in enumerate(trace.calls)
            for draw in range(10)
            if index
        ]
        return sum(losses) / 10

    _, grads = by_autograd(net, loss)
    for name, parameter in other.feedback.named_parameters():
        # biases get no gradient, so the published weight decay alone would move them
        parameter.grad = grads[name] if name.endswith("weight") else None
    torch.optim.Adam(other.feedback.parameters(), lr=3e-4, weight_decay=1e-4).step()
    trainer = LDRL(
        net,
        noise=sigma,
        samples=10,
        optimizer=lambda p: torch.optim.Adam(p, lr=3e-4, weight_decay=1e-4),
        noise_source=normal_noise,
    )
    trainer.step(trace)
    for name, after in weights(net).items():
        assert_equal(after, other.feedback.get_parameter(name), 1e-12)


# Noise


def test_default_noise_is_a_function_of_seed_step_layer_draw_and_side() -> None:
    like = torch.empty(3, 4)
    places = [Draw(0, 1, 0, False), Draw(1, 1, 0, False), Draw(0, 2, 0, False), Draw(0, 1, 1, False)]
    places.append(Draw(0, 1, 0, True))
    drawn = [CounterNoise(seed)(place, like) for seed in (0, 1) for place in places]
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == len(drawn)
    assert torch.equal(CounterNoise(1)(places[2], like), drawn[7])


def test_every_iteration_has_draws_of_its_own() -> None:
    drawn: dict[int, list[int]] = {1: [], 2: []}

    def noise(place: Draw, like: Tensor) -> Tensor:
        drawn[place.layer].append(place.draw)
        return normal_noise(place, like)

    trainer = Reconstruction(small_net(), lr=0.01, noise=0.1, iterations=[2, 3], samples=2, noise_source=noise)
    trainer.step(batch(0)[0])
    assert drawn == {1: [0, 1, 2, 3], 2: [0, 1, 2, 3, 4, 5]}


def test_seeds_give_other_runs() -> None:
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        net = small_net()
        LDRL(net, lr=0.1, noise=0.2, seed=seed).step(batch(0)[0])
        found.append(weights(net)["1.parts.0.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_same_numbers_on_any_number_of_threads() -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        net = small_net()
        LDRL(net, lr=0.1, noise=0.2).step(batch(0)[0])
        found.append(net)
    for name, after in weights(found[0]).items():
        torch.testing.assert_close(after, weights(found[1])[name], rtol=1e-6, atol=1e-7)


# Records


@pytest.mark.parametrize("name", [name for name in MOVING if name != "ClosedForm"])
def test_records_have_one_entry_an_iteration_before_its_update(name: str) -> None:
    net = small_net()
    trainer = TRAINERS[name](net)
    heads = {1: net.feedback["1"].parts["0"], 2: net.feedback["2"].parts["1"]}
    linears = {1: net.blocks[1][0], 2: net.blocks[2][1]}
    before = {layer: head.weight.clone() for layer, head in heads.items()}
    records = trainer.step(batch(0)[0], record=True)
    iterations = {"LDRL": [2, 3], "LDRL, grid": [2, 2], "Reconstruction": [2, 2]}.get(name, [1, 1])
    assert [record.layer for record in records] == [1] * iterations[0] + [2] * iterations[1]
    for layer, record in ((1, records[0]), (2, records[iterations[0]])):
        forward = linears[layer].weight if layer == 1 else linears[layer].weight.T
        assert abs(float(record.angle) - degrees(before[layer].double(), forward.detach().double())) < 1e-4
        distance = (before[layer] - forward).norm() / forward.norm()
        assert_equal(record.distance.float(), distance.detach(), 1e-5)
        assert record.loss.shape == ()
        assert not record.loss.requires_grad
    assert trainer.step(batch(0)[0]) is None


def test_records_of_layered_feedback_compare_its_linear_map() -> None:
    """Its activation comes last, the linear map before it is of the transposed shape all the same."""
    blocks = [
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 6), nn.Tanh()),
        nn.Sequential(nn.Tanh(), nn.Linear(6, 3)),
    ]
    net = TargetSequential(*blocks, feedback=layered_feedback(blocks))
    forward, backward = blocks[1][0].weight.detach(), net.feedback["1"].mirrored.parts["0"].weight.clone()
    first, second = Reconstruction(net, lr=0.1, noise=0.1).step(torch.randn(7, 4), record=True)
    assert abs(float(first.angle) - degrees(backward.double(), forward.T.double())) < 1e-4
    assert_equal(first.distance.float(), (backward - forward.T).norm() / forward.norm(), 1e-5)
    assert second.angle is None  # it begins with an activation
    assert tpext.diagnostics.feedback_angles(net, torch.randn(2, 4)).keys() == {"1"}


def test_records_of_blocks_without_a_common_weight() -> None:
    net, trace = one_block(Residual, (4,))
    (record,) = LDRL(net, lr=0.1, noise=0.1).step(trace, record=True)
    assert record.angle is None
    assert record.distance is None


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: LDRL(net, lr=0.1, noise=[0.1]), "LDRL: noise must have one value for each of the 2 layers"),
        (lambda net: LDRL(net, lr=[0.1] * 3, noise=0.1), "LDRL: lr must have one value for each of the 2 layers"),
        (lambda net: LDRL(net, lr=0.1, noise=0.1, iterations=[1, 2, 3]), "LDRL: iterations must have one value for"),
        (lambda net: LDRL(net, lr=0.0, noise=0.1), "LDRL: lr must be a number > 0, got 0.0"),
        (lambda net: LDRL(net, lr=0.1, noise=-1), "LDRL: noise must be a number > 0, got -1"),
        (lambda net: LDRL(net, lr=0.1, noise=float("nan")), "LDRL: noise must be a number > 0, got nan"),
        (lambda net: LDRL(net, lr=0.1, noise="0.1"), "LDRL: noise must be a number > 0, got '0.1'"),
        (lambda net: LDRL(net, lr=0.1, noise=0.1, iterations=0), "LDRL: iterations must be an integer >= 1, got 0"),
        (lambda net: LDRL(net, lr=0.1, noise=0.1, iterations=1.5), "LDRL: iterations must be an integer >= 1, got 1.5"),
        (lambda net: LDRL(net, lr=0.1, noise=0.1, samples=0), "LDRL: samples must be an integer >= 1, got 0"),
        (lambda net: LDRL(net, noise=0.1), "LDRL: give lr or optimizer, got lr=None, optimizer=None"),
        (
            lambda net: LDRL(net, lr=0.1, noise=0.1, optimizer=torch.optim.Adam),
            "LDRL: give lr or optimizer, got lr=0.1",
        ),
        (lambda net: LDRL(net, lr=0.1, noise=0.1, seed=-1), "LDRL: seed must be in 0 .. 2^63 - 1, got -1"),
        (
            lambda net: LDRL(net, lr=0.1, noise=0.1, indices="old"),
            "LDRL: indices must be one of 'noisy', 'clean', got 'old'",
        ),
        (
            lambda net: LDRL(net, lr=0.1, noise=0.1, second_term="none"),
            "LDRL: second_term must be one of 'drawn', 'expected', got 'none'",
        ),
        (lambda net: Reconstruction(net, lr=0.1, noise=0.1, reduction="sum"), "Reconstruction: reduction must be"),
        (
            lambda net: DifferenceReconstruction(net, lr=0.1, noise=0.1, difference=1),
            "DifferenceReconstruction: difference must be True or False, got 1",
        ),
        (lambda net: RunningLDRL(net, noise=0.1, decay=1.0), "RunningLDRL: decay must be a number >= 0 and < 1, got 1"),
        (lambda net: RunningLDRL(net, noise=0.1, draws=0), "RunningLDRL: draws must be an integer >= 1, got 0"),
        (lambda net: RunningLDRL(net, noise=0.0), "RunningLDRL: noise must be a number > 0, got 0.0"),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make(small_net())


GRADIENT_TRAINERS: list[Any] = [LDRL, Reconstruction, DifferenceReconstruction]


@pytest.mark.parametrize("trainer", GRADIENT_TRAINERS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": -0.1}, ValueError, "momentum must be a number >= 0, got -0.1"),
        ({"momentum": "0.9"}, ValueError, "momentum must be a number >= 0, got '0.9'"),
        ({"momentum": [0.9, 0.9]}, ValueError, "momentum must be a number >= 0, got [0.9, 0.9]"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be a number >= 0, got nan"),
        ({"weight_decay": None}, ValueError, "weight_decay must be a number >= 0, got None"),
        (
            {"lr": None, "optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)},
            TypeError,
            "optimizer must be a function of parameters, such as lambda p: torch.optim.Adam(p, lr=3e-4), got SGD",
        ),
        (
            {"lr": None, "optimizer": lambda p: None},
            TypeError,
            "optimizer must return a torch.optim.Optimizer, got NoneType",
        ),
        (
            {"noise_source": torch.Generator()},
            TypeError,
            "noise_source must be a function of a Draw and a tensor, or None, got Generator",
        ),
    ],
)
def test_bad_options_are_named(trainer: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(f"{trainer.__name__}: {message}")):
        trainer(small_net(), **{"lr": 0.1, "noise": 0.1, **options})


@pytest.mark.parametrize("trainer", GRADIENT_TRAINERS)
def test_signatures_list_every_argument(trainer: Any) -> None:
    """As ``help`` shows them, with the base class's defaults."""
    shared = inspect.signature(tpext.feedback.GradientTrainer).parameters
    own = inspect.signature(trainer).parameters
    assert {name: own[name] for name in shared} == dict(shared)
    assert all(name in trainer.__doc__ for name in own)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        trainer(small_net(), rate=0.1, noise=0.1)


@pytest.mark.parametrize(
    ("source", "got"),
    [
        (lambda draw, like: torch.zeros(()), "[] torch.float32"),
        (lambda draw, like: like.double(), "[5, 3, 4, 4] torch.float64"),
        (lambda draw, like: 0.0, "float"),
    ],
)
def test_noise_of_another_shape_is_refused(source: Any, got: str) -> None:
    message = "noise_source must return a tensor [5, 3, 4, 4] torch.float32 for Draw(step=0, layer=1, draw=0, "
    with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape(f"got {got}")):
        LDRL(small_net(), lr=0.1, noise=0.1, noise_source=source).step(batch(0)[0])


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.1, "momentum": -1.0}, {"lr": 0.1, "weight_decay": -1.0}, {"lr": 0.1, "samples": [1, 2]}]
    + [{"optimizer": torch.optim.Adam, name: 0.9} for name in ("momentum", "weight_decay")],
    ids=str,
)
def test_options_that_would_have_no_effect_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(options)[1]):
        LDRL(small_net(), noise=0.1, **options)


SOLVERS: dict[str, Any] = {
    "LDRL": lambda net: LDRL(net, lr=0.1, noise=0.1),
    "RunningLDRL": lambda net: RunningLDRL(net, noise=0.1),
    "ClosedForm": ClosedForm,
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bias", [True, False])
def test_tied_feedback_is_not_trained(name: str, bias: bool) -> None:
    net = TargetSequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3, bias), nn.ELU()), feedback_init="tied")
    with pytest.raises(ValueError, match=f"^{name}: net must have feedback with weights of its own, .*block 1.* tied"):
        SOLVERS[name](net)


@pytest.mark.parametrize("rule", [tpext.Backprop(), tpext.GaussNewtonTargets()], ids=str)
def test_networks_without_feedback_are_refused(rule: Any) -> None:
    net = TargetSequential(nn.Linear(4, 4), nn.Linear(4, 3), rule=rule)
    with pytest.raises(ValueError, match="^LDRL: net has no feedback to train; its rule is " + type(rule).__name__):
        LDRL(net, lr=0.1, noise=0.1)


def test_other_networks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^LDRL: net must be a tpext\.nn\.TargetSequential, got Sequential"):
        LDRL(nn.Sequential(nn.Linear(3, 3)), lr=0.1, noise=0.1)


@pytest.mark.parametrize(
    "build", [AUTOGRAD["not first"], AUTOGRAD["normalised"], Residual], ids=["not first", "normalised", "Residual"]
)
@pytest.mark.parametrize(
    "make",
    [ClosedForm, lambda net: RunningLDRL(net, noise=0.1), lambda net: LDRL(net, lr=1, noise=1, second_term="expected")],
)
def test_blocks_that_a_solution_does_not_know_are_refused(make: Any, build: Build) -> None:
    net, _ = one_block(build, (4,))
    kind = "Residual" if build is Residual else "Sequential"
    message = rf"needs blocks of a linear layer or convolution, .*; block 1 is another, a {kind}\(\w+(, \w+)*\)$"
    with pytest.raises(ValueError, match=message):
        make(net)


def test_wrong_indices_of_a_loss_are_named() -> None:
    _, trace = one_block(VECTORS["linear"], (4,))
    with pytest.raises(ValueError, match=r"^ldrl_loss: indices must be one of 'noisy', 'clean', got 'old'"):
        ldrl_loss(trace.calls[1], torch.zeros(3, 4), torch.zeros(3, 3), "old")
    with pytest.raises(ValueError, match=r"^ldrl_loss: call must be one of a block with feedback"):
        ldrl_loss(trace.calls[0], torch.zeros(3, 4), torch.zeros(3, 4))


class Loss(LDRL):
    """A trainer whose loss is what it is given."""

    value: Any = None

    def loss(self, calls: Sequence[BlockCall], layer: int, sigma: float, draw: int) -> Any:
        return self.value

    def _layer(self, *args: Any) -> Any:
        return super(LDRL, self)._layer(*args)


@pytest.mark.parametrize(
    ("value", "got"),
    [(0.5, "float"), (torch.zeros(()), "[] without a graph"), (torch.zeros(3, requires_grad=True), "[3]")],
    ids=["number", "constant", "vector"],
)
def test_losses_that_are_no_scalars_of_the_feedback_are_named(value: Any, got: str) -> None:
    trainer = Loss(small_net(), lr=0.1, noise=0.1)
    trainer.value = value
    message = f"Loss: loss must return a scalar that depends on the feedback of block 1, got {got}"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        trainer.step(batch(0)[0])


@pytest.mark.parametrize("name", ["LDRL", "RunningLDRL"])
def test_state_of_another_network_changes_nothing(name: str) -> None:
    other = TargetSequential(nn.Linear(2, 2), nn.Linear(2, 2))
    make: Any = {"LDRL": lambda net: LDRL(net, lr=0.1, noise=0.1), "RunningLDRL": lambda net: RunningLDRL(net, noise=1)}
    state = make[name](other).state_dict() | {"steps": 7}
    trainer = make[name](small_net())
    with pytest.raises(ValueError, match=rf"^{name}: state must have \w+ of 2 layers, got 1"):
        trainer.load_state_dict(state)
    assert trainer.steps == 0
