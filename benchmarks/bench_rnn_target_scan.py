"""A whole training step by every rule against ``torch.nn.RNN`` with BPTT, and against an eager TP loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tpext

SIZES = [
    (6, 100, 20, 60),
    (6, 100, 20, 120),
    (1, 100, 16, 784),
    (1, 128, 512, 784),
    (1, 256, 64, 784),
    (56, 512, 512, 14),
]
SWEEP = [(1, 100, 16, time) for time in (30, 100, 300, 1000, 3000)]
SWEEP += [(1, hidden, 16, 200) for hidden in (16, 32, 64, 128, 256, 512)]

RULES = {
    "local": tpext.RegularizedInverse(credit="local"),
    "through_time": tpext.RegularizedInverse(credit="through_time"),
    "backprop": tpext.Backprop(),
}


def name_sizes(sizes: object) -> str | None:
    return "I{}-H{}-B{}-T{}".format(*sizes) if isinstance(sizes, tuple) else None


def compare_step(
    against: Callable[..., None], sizes: tuple[int, int, int, int], rule: str, loss: str, seconds: float
) -> None:
    """Forward, target pass or back-propagation, weight gradients; orthogonal weights, cross-entropy of a linear head.

    The loss stands on the last step or on every one: with the first, most incoming gradients are zero.
    """
    inputs, hidden, batch, time = sizes
    torch.manual_seed(0)
    reference = torch.nn.RNN(inputs, hidden)
    for weight in (reference.weight_ih_l0, reference.weight_hh_l0):
        torch.nn.init.orthogonal_(weight)
    head = torch.nn.Linear(hidden, 10)
    module = tpext.nn.convert(reference, rule=RULES[rule])
    x = torch.rand(time, batch, inputs)
    labels = torch.randint(10, (batch,) if loss == "last" else (time * batch,))

    def step(model: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            head.zero_grad()
            output, last = model(x)
            features = last[0] if loss == "last" else output.flatten(0, 1)
            torch.nn.functional.cross_entropy(head(features), labels).backward()

        return run

    # The products with W_hh or its inverse, those of the inputs with W_ih and of their gradients, and the inverse.
    products = 4 if rule == "through_time" else 3
    inverse = 0 if rule == "backprop" else 10 / 3 * hidden**3
    against(
        step(module),
        step(reference),
        flops=2 * time * batch * hidden * (products * hidden + 2 * inputs) + inverse,
        peer_name="torch.nn.RNN with BPTT",
        I=inputs,
        H=hidden,
        B=batch,
        T=time,
        rule=rule,
        loss=loss,
        seconds=seconds,
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", ["last", "every"])
@pytest.mark.parametrize("sizes", SIZES, ids=name_sizes)
def test_step(against, threads, sizes, loss, rule):
    compare_step(against, sizes, rule, loss, seconds=1.2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", SWEEP, ids=name_sizes)
@pytest.mark.parametrize("threads", [2], indirect=True, ids=["threads2"])
def test_sweep(against, threads, sizes, rule):
    """The ratio over T and over H, for the picture."""
    compare_step(against, sizes, rule, "last", seconds=0.7)


def published_style(module, head, x, labels, reg):
    """One step as the published codes write it: autograd graphs of single steps, a loop for the targets."""
    batch, hidden = x.shape[1], module.hidden_size
    states = [torch.zeros(batch, hidden)]
    for x_t in x:
        states.append(
            torch.tanh(
                torch.nn.functional.linear(x_t, module.weight_ih_l0, module.bias_ih_l0)
                + torch.nn.functional.linear(states[-1].detach(), module.weight_hh_l0, module.bias_hh_l0)
            )
        )
    last = states[-1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(head(last), labels), last)
    weight = module.weight_hh_l0.detach()
    inverse = torch.linalg.solve(weight.T @ weight + reg * torch.eye(hidden), weight.T).T
    targets = [last.detach() - gradient]
    for step in range(len(x), 1, -1):
        h = states[step].detach()
        moved = (targets[-1] - h) / (1 - h.clamp(-0.999, 0.999) ** 2) @ inverse
        targets.append(states[step - 1].detach() + moved)
    loss = sum(0.5 * ((h - v) ** 2).sum() for h, v in zip(states[1:], reversed(targets), strict=True))
    loss.backward()


@torch.no_grad()
def tuned(module, head, x, labels, reg):
    """One step as well as torch operations allow: large products outside the loops, closed-form weight gradients."""
    time, batch, _ = x.shape
    hidden = module.hidden_size
    weight, inputs = module.weight_hh_l0, x.flatten(0, 1)
    bias = module.bias_ih_l0 + module.bias_hh_l0
    projected = torch.addmm(bias, inputs, module.weight_ih_l0.T).view(time, batch, hidden)
    states = torch.zeros(time + 1, batch, hidden)
    for step in range(time):
        torch.tanh(torch.addmm(projected[step], states[step], weight.T), out=states[step + 1])
    with torch.enable_grad():
        last = states[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(head(last), labels), last)
    gram = weight.T @ weight + reg * torch.eye(hidden)
    inverse = torch.cholesky_solve(weight.T, torch.linalg.cholesky(gram)).T.contiguous()
    slope = 1 / (1 - states[1:].clamp(-0.999, 0.999) ** 2)
    moves = torch.empty(time, batch, hidden)
    moves[-1] = -gradient
    for step in range(time - 1, 0, -1):
        torch.mm(moves[step] * slope[step], inverse, out=moves[step - 1])
    delta = (-moves * (1 - states[1:] ** 2)).flatten(0, 1)
    module.weight_hh_l0.grad = delta.T @ states[:-1].flatten(0, 1)
    module.weight_ih_l0.grad = delta.T @ inputs
    module.bias_ih_l0.grad = module.bias_hh_l0.grad = delta.sum(0)


@pytest.mark.parametrize("loop", [published_style, tuned], ids=lambda loop: loop.__name__)
def test_eager_loop(against, threads, loop):
    """The same local-credit step as a loop of torch operations over time."""
    inputs, hidden, batch, time, reg = 1, 100, 16, 784, 1.0
    torch.manual_seed(0)
    module = tpext.nn.RNN(inputs, hidden, rule=tpext.RegularizedInverse(reg=reg, credit="local"))
    head = torch.nn.Linear(hidden, 10)
    torch.nn.init.orthogonal_(module.weight_hh_l0)
    x = torch.rand(time, batch, inputs)
    labels = torch.randint(10, (batch,))

    def ours():
        module.zero_grad()
        torch.nn.functional.cross_entropy(head(module(x)[1][0]), labels).backward()

    def peer():
        module.zero_grad()
        loop(module, head, x, labels, reg)

    ours()
    expected = module.weight_hh_l0.grad.clone()
    peer()
    assert torch.allclose(module.weight_hh_l0.grad, expected, rtol=1e-2, atol=1e-4 * expected.abs().max())
    against(ours, peer, peer_name=f"eager loop, {loop.__name__}", I=inputs, H=hidden, B=batch, T=time, rule="local")
