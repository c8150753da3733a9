"""A training step of GRU and LSTM by the ops alone, back-propagation, against ``torch.nn.GRU`` and ``LSTM``."""

from __future__ import annotations

import pytest
import torch
from gpu import name_sizes

# What a step of ours is to be faster by.
TARGETS = {
    (6, 100, 20, 120): {"gru": 6.0, "lstm": 1.6},
    (1, 100, 16, 784): {"gru": 8.0, "lstm": 2.6},
    (28, 128, 64, 28): {"gru": 2.5, "lstm": 1.5},
    (512, 256, 64, 64): {"gru": 1.5, "lstm": 1.5},
    (56, 512, 512, 14): {"gru": 1.6, "lstm": 1.5},
    (1, 128, 512, 784): {"gru": 3.5, "lstm": 3.0},
}
CELLS = {"gru": (torch.nn.GRU, 3), "lstm": (torch.nn.LSTM, 4)}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("loss", ["last", "every"])
@pytest.mark.parametrize("sizes", TARGETS, ids=name_sizes)
def test_gated_step(against, threads, sizes, loss, cell):
    """Forward and backward, with gradients of all parameters; the loss stands on the last step or on every one."""
    inputs, hidden, batch, time = sizes
    torch.manual_seed(0)
    make, gates = CELLS[cell]
    peer = make(inputs, hidden)
    x = torch.rand(time, batch, inputs)
    every, last = torch.randn(time, batch, hidden), torch.randn(1, batch, hidden)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weight_ih, weight_hh, bias_ih, bias_hh = (getattr(peer, f"{name}_l0").detach().unsqueeze(0) for name in names)
    h0 = torch.zeros(1, batch, hidden)
    c0 = h0 if cell == "lstm" else None
    rule = (cell, "branch", "local", [1.0], [1e-3], "derivative", "derivative", [0.0], [1.0], [1.0])
    needs = [False, True, True, True, True]
    grad_states, disp_h_n = (every.unsqueeze(0), None) if loss == "every" else (None, -last)

    def ours():
        states, _, _, kept = torch.ops.tpext.gated_layer(
            x.unsqueeze(0), h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, None, [False], cell, True
        )
        return torch.ops.tpext.gated_layer_backward(
            grad_states, x.unsqueeze(0), states, h0, c0, kept, weight_hh, weight_hh, None, None, [False], *rule, needs,
            disp_h_n,
        )[1:5]  # fmt: skip

    def theirs():
        peer.zero_grad()
        output, _ = peer(x)
        output.backward(every) if loss == "every" else output[-1].backward(last[0])

    theirs()
    for name, found in zip(names, ours(), strict=True):
        expected = getattr(peer, f"{name}_l0").grad
        torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    against(
        ours,
        theirs,
        # the products with W_hh forward and back and its gradient, those with the input
        flops=2 * time * batch * gates * hidden * (3 * hidden + 2 * inputs),
        peer_name=f"torch.nn.{make.__name__}",
        target_ratio=TARGETS[sizes][cell],
        I=inputs,
        H=hidden,
        B=batch,
        T=time,
        cell=cell,
        loss=loss,
        seconds=1.2,
    )
