"""GRU and LSTM against ``torch.nn.GRU`` and ``LSTM``: whole training steps under each rule, and inference.

A step is a forward and a backward pass with a loss on every step and gradients of all parameters, of the modules as a
training loop has them.
"""

from __future__ import annotations

import pytest
import torch
from gpu import TARGETS as GPU_TARGETS
from gpu import cudnn_tf32, name_sizes

import tpext

# What a step of ours under back-propagation is to be faster by, at I, H, B, T.
TARGETS = {
    (6, 100, 20, 120): {"GRU": 6.0, "LSTM": 1.6},
    (1, 100, 16, 784): {"GRU": 8.0, "LSTM": 2.6},
    (28, 128, 64, 28): {"GRU": 2.5, "LSTM": 1.5},
    (512, 256, 64, 64): {"GRU": 1.5, "LSTM": 1.5},
    (56, 512, 512, 14): {"GRU": 1.6, "LSTM": 1.5},
    (1, 128, 512, 784): {"GRU": 3.5, "LSTM": 3.0},
}
GATES = {"GRU": 3, "LSTM": 4}
# Each rule, and which part of that target it is to reach.
RULES = {
    "local": (tpext.RegularizedInverse(credit="local"), 0.9),
    "through_time": (tpext.RegularizedInverse(), 0.7),
    "backprop": (tpext.Backprop(), 1.0),
}

two_threads = pytest.mark.parametrize("threads", [2], indirect=True, ids=["threads2"])
every_cell = pytest.mark.parametrize("cell", GATES)
every_size = pytest.mark.parametrize("sizes", TARGETS, ids=name_sizes)


def products(cell: str, sizes: tuple[int, int, int, int], of_state: int, of_input: int) -> int:
    """Operations of so many products of each step's rows with ``weight_hh``, and with ``weight_ih``."""
    inputs, hidden, batch, time = sizes
    return 2 * time * batch * GATES[cell] * hidden * (of_state * hidden + of_input * inputs)


@two_threads
@every_cell
@every_size
@pytest.mark.parametrize("rule", RULES)
def test_gated_step(against, threads, sizes, cell, rule):
    inputs, hidden, batch, time = sizes
    torch.manual_seed(0)
    peer = getattr(torch.nn, cell)(inputs, hidden)
    module = getattr(tpext.nn, cell)(inputs, hidden, rule=RULES[rule][0])
    module.load_state_dict(peer.state_dict())
    x, gradient = torch.rand(time, batch, inputs), torch.randn(time, batch, hidden)

    def step(network):
        network.zero_grad()
        network(x)[0].backward(gradient)

    step(peer)
    step(module)
    if module.rule.exact:
        for ours, theirs in zip(module.parameters(), peer.parameters(), strict=True):
            atol = 1e-3 * float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=atol)
    against(
        lambda: step(module),
        lambda: step(peer),
        # forward, back and the weights' gradient; the credit through time is one more
        flops=products(cell, sizes, 4 if rule == "through_time" else 3, 2),
        peer_name=f"torch.nn.{cell}",
        target_ratio=TARGETS[sizes][cell] * RULES[rule][1],
        **named(sizes),
        cell=cell,
        rule=rule,
    )


@two_threads
@every_cell
@every_size
def test_gated_inference(against, threads, sizes, cell):
    inputs, hidden, batch, time = sizes
    torch.manual_seed(0)
    peer = getattr(torch.nn, cell)(inputs, hidden)
    module = getattr(tpext.nn, cell)(inputs, hidden, rule=tpext.Backprop())
    module.load_state_dict(peer.state_dict())
    x = torch.rand(time, batch, inputs)
    with torch.inference_mode():
        torch.testing.assert_close(module(x)[0], peer(x)[0], rtol=1e-4, atol=1e-5)
        against(
            lambda: module(x),
            lambda: peer(x),
            flops=products(cell, sizes, 1, 1),
            peer_name=f"torch.nn.{cell}",
            target_ratio=1.0,
            **named(sizes),
            cell=cell,
        )


def named(sizes: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip("IHBT", sizes, strict=True))


# On a GPU


@pytest.mark.gpu
@every_cell
@pytest.mark.parametrize("sizes", GPU_TARGETS, ids=name_sizes)
@pytest.mark.parametrize("rule", RULES)
def test_gpu_gated_step(gpu, sizes, cell, rule):
    """Float32 against cuDNN without TF32; with it, cuDNN's default, beside that."""
    inputs, hidden, batch, time = sizes
    peer = getattr(torch.nn, cell)(inputs, hidden).to(gpu.device.name)
    module = getattr(tpext.nn, cell)(inputs, hidden, rule=RULES[rule][0]).to(gpu.device.name)
    module.load_state_dict(peer.state_dict())
    x, gradient = gpu.randn(time, batch, inputs), gpu.randn(time, batch, hidden)

    def step(network):
        network.zero_grad()
        network(x)[0].backward(gradient)

    def with_tf32():
        with cudnn_tf32(True):
            step(peer)

    gpu.against(
        lambda: step(module),
        {"cuDNN": lambda: step(peer)},
        others={"cuDNN, TF32": with_tf32},
        target_ratio=1.0,
        seconds=0.4,
        **named(sizes),
        cell=cell,
        rule=rule,
    )
