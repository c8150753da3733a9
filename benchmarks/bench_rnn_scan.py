"""The forward scan alone: its share of the machine's sgemm rate, and its time against a loop of torch operations."""

from __future__ import annotations

import pytest
import torch
from gpu import REGIMES, SCAN_DTYPES, TARGETS, name_dtype

SIZES = [(100, 16, 784), (128, 32, 256), (128, 64, 256), (256, 64, 256), (512, 64, 128)]
# One row: two threads can only share it by columns.
SIZES += [(hidden, 1, 784) for hidden in (64, 128, 256, 512)]
GPU_SIZES = [sizes[1:] for sizes in TARGETS]


def name_sizes(sizes: object) -> str | None:
    return "H{}-B{}-T{}".format(*sizes) if isinstance(sizes, tuple) else None


@pytest.mark.parametrize("sizes", SIZES, ids=name_sizes)
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


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("op", ["rnn_scan", "rnn_scan_backward"])
@pytest.mark.parametrize("dtype", SCAN_DTYPES, ids=name_dtype)
@pytest.mark.parametrize("sizes", GPU_SIZES, ids=name_sizes)
def test_gpu_scan(gpu, monkeypatch, sizes, dtype, op, regime):
    """The kernel alone, in every regime that can run the size."""
    hidden, batch, time = sizes
    gpu.force(monkeypatch, regime, 1, dtype, batch, hidden)
    x_proj = gpu.randn(1, time, batch, hidden, dtype=dtype)
    h0 = gpu.randn(1, batch, hidden, dtype=dtype)
    weight = (gpu.randn(1, hidden, hidden) * (0.5 / hidden**0.5)).to(dtype)

    def forward():
        return torch.ops.tpext.rnn_scan(x_proj, h0, weight, None, [False], "tanh")

    states = forward()

    def backward():
        return torch.ops.tpext.rnn_scan_backward(x_proj, states, weight, None, [False], "tanh")

    call = forward if op == "rnn_scan" else backward
    gpu.alone(call, time=time, products=1, dtype=dtype, H=hidden, B=batch, op=op, regime=regime)
