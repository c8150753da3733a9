"""Training steps of 48 small networks: together in ``tpext.nn.Ensemble``, against one after another.

A step is a forward and a backward pass from the last states, of the default rule, with numbers of each member's own.
"""

from __future__ import annotations

import pytest
import torch
from gpu import name_sizes

import tpext

MEMBERS = 48
# What a step together is to be faster by on two threads, at I, H, B, T.
TARGETS = {(1, 32, 16, 30): 3.0, (1, 100, 20, 60): 1.2, (1, 100, 16, 784): 1.2}


@pytest.mark.parametrize("sizes", TARGETS, ids=name_sizes)
def test_ensemble_step(against, threads, sizes):
    inputs, hidden, batch, time = sizes
    torch.manual_seed(0)
    rules = [tpext.RegularizedInverse(reg=0.5 + member / MEMBERS) for member in range(MEMBERS)]
    members = [tpext.nn.RNN(inputs, hidden, rule=rule, return_sequence=False) for rule in rules]
    ensemble = tpext.nn.Ensemble(members)
    input, gradient = torch.rand(MEMBERS, time, batch, inputs), torch.randn(MEMBERS, 1, batch, hidden)

    def together():
        ensemble.zero_grad()
        ensemble(input)[1].backward(gradient)

    def apart():
        for member, own, of_state in zip(members, input, gradient, strict=True):
            member.zero_grad()
            member(own)[1].backward(of_state)

    apart()
    expected = [parameter.grad for parameter in ensemble.parameters()]
    together()
    for parameter, alone in zip(ensemble.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, alone, rtol=0, atol=0)
    against(
        together,
        apart,
        # forward, back, the credit through time, and the weights' gradient
        flops=2 * MEMBERS * time * batch * (4 * hidden * hidden + 2 * hidden * inputs),
        peer_name=f"{MEMBERS} calls",
        **({"target_ratio": TARGETS[sizes]} if threads == 2 else {}),
        members=MEMBERS,
        **dict(zip("IHBT", sizes, strict=True)),
    )
