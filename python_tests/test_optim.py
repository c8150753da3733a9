"""The optimizers of published codes: equal to the formulas, ordinary members of torch.optim."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch

import tpext
from tpext.optim import CentredRMSprop, TensorFlowRMSprop, keep_orthogonal, orthogonalize_

OPTIMIZERS = [TensorFlowRMSprop, CentredRMSprop]


def tensorflow(
    p: np.ndarray, grads: np.ndarray, rates: list[float], alpha: float, momentum: float, eps: float
) -> np.ndarray:
    squares, update = np.ones_like(p), np.zeros_like(p)
    for grad, lr in zip(grads, rates, strict=True):
        squares = alpha * squares + (1 - alpha) * grad**2
        update = momentum * update + lr * grad / np.sqrt(squares + eps)
        p = p - update
    return p


def centred(
    p: np.ndarray, grads: np.ndarray, rates: list[float], alpha: float, momentum: float, eps: float
) -> np.ndarray:
    mean, squares, update = (np.zeros_like(p) for _ in range(3))
    for grad, lr in zip(grads, rates, strict=True):
        mean = alpha * mean + (1 - alpha) * grad
        squares = alpha * squares + (1 - alpha) * grad**2
        update = momentum * update - lr * grad / np.sqrt(squares - mean**2 + eps)
        p = p + update
    return p


FORMULAS = {TensorFlowRMSprop: tensorflow, CentredRMSprop: centred}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("eps", [1e-3, 1e-10])
def test_equals_the_formula(optimizer: Any, momentum: float, eps: float) -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((4, 3)), rng.standard_normal((6, 4, 3))
    options = {"alpha": 0.8, "momentum": momentum, "eps": eps}
    # a rate that falls belongs to its own gradient alone
    rates = [0.02, 0.02, 0.02, 0.005, 0.005, 0.001]
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    steps = optimizer([parameter], **options)
    for grad, rate in zip(grads, rates, strict=True):
        parameter.grad = torch.from_numpy(grad)
        steps.param_groups[0]["lr"] = rate
        steps.step()
    expected = FORMULAS[optimizer](start, grads, rates, **options)
    # After one gradient the variance is (1 - alpha) alpha g^2: differences of averages lose few digits.
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_defaults_are_the_published() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert {"alpha": 0.9, "momentum": 0.0, "eps": 1e-10}.items() <= TensorFlowRMSprop([parameter]).defaults.items()
    assert {"alpha": 0.95, "momentum": 0.9, "eps": 1e-3}.items() <= CentredRMSprop([parameter]).defaults.items()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_dict_round_trip(optimizer: Any) -> None:
    grads = torch.randn(6, 3)

    def run(steps: Any, parameter: torch.Tensor, grads: torch.Tensor) -> None:
        for grad in grads:
            parameter.grad = grad.clone()
            steps.step()

    straight = torch.nn.Parameter(torch.ones(3))
    run(optimizer([straight], lr=0.1, momentum=0.5), straight, grads)
    first = torch.nn.Parameter(torch.ones(3))
    before = optimizer([first], lr=0.1, momentum=0.5)
    run(before, first, grads[:3])
    second = torch.nn.Parameter(first.detach().clone())
    after = optimizer([second], lr=0.7)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    run(after, second, grads[3:])
    assert torch.equal(second, straight)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_groups_closures_schedulers(optimizer: Any) -> None:
    one, other, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    steps = optimizer([{"params": [one]}, {"params": [other, unused], "lr": 0.0}], lr=0.1, momentum=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(steps, 1, gamma=0.5)

    def closure() -> torch.Tensor:
        steps.zero_grad()
        loss = (one + other).square().sum()
        loss.backward()
        return loss

    assert steps.step(closure).item() == 8.0
    schedule.step()
    assert steps.param_groups[0]["lr"] == 0.05
    assert (one < 1).all()
    assert torch.equal(other, torch.ones(2))
    assert torch.equal(unused, torch.ones(2))
    assert unused not in steps.state
    for group in steps.param_groups:
        group["momentum"] = 0.9
    assert steps.step(closure).item() < 8.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bad_options_are_named(optimizer: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, value in itertools.product(("lr", "alpha", "momentum", "eps"), (-0.1, float("nan"), float("inf"))):
        bound = " and < 1" if name in ("alpha", "momentum") else ""
        text = f"{optimizer.__name__}: {name} must be a finite number >= 0{bound}, got {value!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            optimizer([parameter], **{name: value})
    with pytest.raises(ValueError, match=r"alpha must be a finite number >= 0 and < 1, got 1\.0"):
        optimizer([parameter], alpha=1.0)
    for name, value in (("lr", -1.0), ("momentum", 1.0), ("eps", float("nan"))):
        group = {"params": [torch.nn.Parameter(torch.zeros(1))], name: value}
        with pytest.raises(ValueError, match=f"^{optimizer.__name__}: {name} must be a finite number >= 0"):
            optimizer([{"params": [parameter]}, group])
        steps = optimizer([parameter])
        with pytest.raises(ValueError, match=f"^{optimizer.__name__}: {name} must be a finite number >= 0"):
            steps.add_param_group(group)
        assert len(steps.param_groups) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sparse_gradients_are_refused(optimizer: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        optimizer([parameter]).step()


def test_constant_gradients_stay_finite() -> None:
    """Of a constant gradient the variance is rounding, which must not become a root of a negative number."""
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = CentredRMSprop([parameter], lr=1e-3)
    gradient = torch.linspace(30, 300, 1000)
    for _ in range(400):
        parameter.grad = gradient.clone()
        optimizer.step()
    assert parameter.isfinite().all()


@pytest.mark.parametrize("gates", [1, 3])
def test_newton_schulz_steps_go_to_the_nearest_orthogonal_matrices(gates: int) -> None:
    weight = torch.cat([torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] for _ in range(gates)])
    weight += 0.01 * torch.randn_like(weight)
    nearest = []
    for gate in weight.split(6):
        left, _, right = torch.linalg.svd(gate)
        nearest.append(left @ right)
    errors = []
    for _ in range(4):
        errors.append((weight - torch.cat(nearest)).abs().max().item())
        assert orthogonalize_(weight, 1) is weight
    assert errors[0] > 0.005
    # each step squares the error
    for before, after in itertools.pairwise(errors):
        assert after < 10 * before**2 + 1e-14


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
        lambda parameters: CentredRMSprop(parameters, lr=1e-3),
    ],
    ids=["SGD", "Adam", "CentredRMSprop"],
)
def test_weights_stay_orthogonal_under_any_optimizer(make: Any) -> None:
    random = torch.Generator().manual_seed(1)
    gru = tpext.nn.GRU(3, 8, rule=tpext.Backprop())
    for gate in gru.weight_hh_l0.data.split(8):
        torch.nn.init.orthogonal_(gate)
    before, other = gru.weight_hh_l0.detach().clone(), gru.weight_ih_l0.detach().clone()
    optimizer = make(gru.parameters())
    handle = keep_orthogonal(optimizer, [gru.weight_hh_l0])

    def step() -> float:
        optimizer.zero_grad()
        gru(torch.randn(5, 4, 3, generator=random))[0].square().sum().backward()
        optimizer.step()
        gates = gru.weight_hh_l0.detach().view(3, 8, 8)
        return float((gates.mT @ gates - torch.eye(8)).abs().max())

    assert max(step() for _ in range(20)) < 1e-3
    for weight, then in ((gru.weight_hh_l0, before), (gru.weight_ih_l0, other)):
        assert (weight - then).abs().max() > 0.02
    handle.remove()
    assert max(step() for _ in range(20)) > 0.01


def test_what_cannot_be_orthogonal_is_named() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 3))], lr=0.1)
    for weight, steps, message in (
        (torch.zeros(2, 3), 2, r"weight must be \[G H, H\], got \[2, 3\]"),
        (torch.zeros(3, 3, dtype=torch.float16), 2, "weight must be of float32 or float64, got torch.float16"),
        (torch.zeros(3, 3), 0, "steps must be an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            keep_orthogonal(optimizer, [weight], steps)
    for weights, got in ((torch.zeros(3, 3), r"a tensor \[3, 3\]"), ([], "none")):
        with pytest.raises(ValueError, match=f"weights must be a list of at least one tensor, got {got}"):
            keep_orthogonal(optimizer, weights)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got list"):
        keep_orthogonal([], [torch.zeros(3, 3)])  # type: ignore[arg-type]
