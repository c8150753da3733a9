"""A whole training step by target propagation against ``torch.nn.RNN`` with BPTT, and against an eager TP loop."""

from __future__ import annotations

import pytest
import torch

import tpext

SIZES = [(6, 100, 20, 60), (6, 100, 20, 120), (1, 100, 16, 784), (1, 256, 64, 784), (56, 512, 512, 14)]


@pytest.mark.parametrize("loss", ["last", "every"])
@pytest.mark.parametrize("credit", ["local", "through_time"])
@pytest.mark.parametrize(("inputs", "hidden", "batch", "time"), SIZES)
def test_step(against, threads, inputs, hidden, batch, time, credit, loss):
    """Forward, target pass and weight gradients; orthogonal weights, cross-entropy of a linear head.

    The loss stands on the last step or on every one: with the first, most incoming gradients are zero.
    """
    torch.manual_seed(0)
    reference = torch.nn.RNN(inputs, hidden)
    for weight in (reference.weight_ih_l0, reference.weight_hh_l0):
        torch.nn.init.orthogonal_(weight)
    head = torch.nn.Linear(hidden, 10)
    module = tpext.nn.convert(reference, rule=tpext.RegularizedInverse(credit=credit))
    x = torch.rand(time, batch, inputs)
    labels = torch.randint(10, (batch,) if loss == "last" else (time * batch,))

    def step(model):
        def run():
            model.zero_grad()
            head.zero_grad()
            output, last = model(x)
            features = last[0] if loss == "last" else output.flatten(0, 1)
            torch.nn.functional.cross_entropy(head(features), labels).backward()

        return run

    against(
        step(module),
        step(reference),
        flops=(3 if credit == "local" else 4) * 2 * time * batch * hidden**2,
        peer="torch.nn.RNN with BPTT",
        I=inputs,
        H=hidden,
        B=batch,
        T=time,
        credit=credit,
        loss=loss,
    )


def test_eager_loop(against, threads):
    """The same local-credit step as a loop of torch operations over time, as the published codes have it."""
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
        for h in reversed(states[1:]):
            h = h.detach()
            targets.append((targets[-1] - h) / (1 - h.clamp(-0.999, 0.999) ** 2) @ inverse)
            targets[-1] += states[len(states) - len(targets)].detach()
        loss = sum(0.5 * ((h - v) ** 2).sum() for h, v in zip(states[1:], reversed(targets[:-1]), strict=True))
        loss.backward()

    ours()
    expected = module.weight_hh_l0.grad.clone()
    peer()
    assert torch.allclose(module.weight_hh_l0.grad, expected, rtol=1e-2, atol=1e-4 * expected.abs().max())
    against(ours, peer, peer="eager loop of the same step", I=inputs, H=hidden, B=batch, T=time, credit="local")
