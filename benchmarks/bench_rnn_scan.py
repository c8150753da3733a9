"""The forward scan alone: its share of the machine's sgemm rate, and its time against a loop of torch operations."""

from __future__ import annotations

import pytest
import torch

SIZES = [(100, 16, 784), (128, 32, 256), (128, 64, 256), (256, 64, 256), (512, 64, 128)]
# One row: two threads can only share it by columns.
SIZES += [(hidden, 1, 784) for hidden in (64, 128, 256, 512)]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "H{}-B{}-T{}".format(*sizes))
def test_forward(against, threads, sizes):
    hidden, batch, time = sizes
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
        against(
            ours,
            peer,
            flops=2 * time * batch * hidden**2,
            seconds=1.0,
            peer_name="torch loop",
            H=hidden,
            B=batch,
            T=time,
        )
