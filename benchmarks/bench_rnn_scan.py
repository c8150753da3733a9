"""The forward scan and its back-propagation alone, against torch's own RNN kernels and a loop of torch operations."""

from __future__ import annotations

import pytest
import torch

import tpext

SIZES = [(100, 16, 784), (128, 64, 256), (256, 64, 256), (512, 64, 128)]


@pytest.mark.parametrize(("hidden", "batch", "time"), SIZES)
def test_forward(against, threads, hidden, batch, time):
    torch.manual_seed(0)
    x_proj = torch.randn(1, time, batch, hidden)
    h0 = torch.zeros(1, batch, hidden)
    weight = torch.nn.init.orthogonal_(torch.empty(hidden, hidden)).unsqueeze(0)

    def peer():
        states, h = [], h0[0]
        for x in x_proj[0]:
            h = torch.tanh(torch.addmm(x, h, weight[0].T))
            states.append(h)
        return torch.stack(states)

    def ours():
        return torch.ops.tpext.rnn_scan(x_proj, h0, weight, None, [False], "tanh")

    with torch.no_grad():
        assert torch.allclose(ours()[0], peer(), atol=1e-4)
        against(ours, peer, flops=2 * time * batch * hidden**2, peer_name="torch loop", H=hidden, B=batch, T=time)


@pytest.mark.parametrize(("hidden", "batch", "time"), SIZES)
def test_backprop_step(against, threads, hidden, batch, time):
    """``Backprop()``: forward, backward and weight gradients against ``torch.nn.RNN`` on the same weights."""
    torch.manual_seed(0)
    reference = torch.nn.RNN(1, hidden)
    module = tpext.nn.convert(reference, rule=tpext.Backprop())
    x = torch.randn(time, batch, 1)

    def step(model):
        def run():
            model.zero_grad()
            model(x)[1].sum().backward()

        return run

    against(step(module), step(reference), peer_name="torch.nn.RNN", I=1, H=hidden, B=batch, T=time)
