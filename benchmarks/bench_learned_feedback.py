"""A whole training batch with learned feedback, in units of a step of back-propagation on the same network.

Ours is a batch: forward pass, feedback phase, targets, update. The peer is a step of back-propagation in torch alone.
The cost in such steps is one over the ratio. ``published`` is the published formulation in torch operations: each
iteration runs the block on the noisy and again on the clean input, the feedback three times and its backward pass, and
reads the loss, an angle and a distance from the device.

Run as a script, this file takes one batch and prints by how many bytes the peak of resident memory exceeds what was
resident before: ``python bench_learned_feedback.py NETWORK METHOD``.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bench_memory import resident
from torch import nn
from torch.nn.functional import cross_entropy

import tpext
from tpext.feedback import LDRL, ClosedForm, Fixed, RunningLDRL, Trace, ldrl_loss
from tpext.nn import TargetSequential, networks

B, GPU_B = 32, 128


class Setting(NamedTuple):
    """Published settings of a network on CIFAR-10, and the most steps of back-propagation that a method may cost."""

    blocks: Callable[[], Any]
    iterations: tuple[int, ...]
    noise: tuple[float, ...]
    lr: tuple[float, ...]
    target_step: float


NETWORKS = {
    "simple-vgg": Setting(
        networks.simple_vgg, (20, 30, 35, 55, 20), (0.4, 0.4, 0.2, 0.2, 0.08), (1e-4, 3.5e-4, 8e-3, 8e-3, 0.18), 0.7
    ),
    "lenet": Setting(
        networks.lenet,
        (41, 51, 24),
        (0.41640228838517584, 0.3826261146623929, 0.1395382069358601),
        (0.0007188427494432325, 0.00012510321884615596, 0.03541466958291287),
        0.4655,
    ),
}
METHODS = (
    "backprop",
    "targets",
    "closed-form",
    "running-grid",
    "running",
    "tenth",
    "expected-grid",
    "expected",
    "exact",
    "published",
)
# The most steps of back-propagation that a batch may cost.
MOST = {"targets": 2.2, "closed-form": 2.2, "running": 4, "tenth": 4, "expected": 12, "exact": 22}


class Published:
    """The feedback phase as the published code runs it: everything anew in each iteration, by autograd."""

    def __init__(self, net: TargetSequential, setting: Setting) -> None:
        self.net, self.setting = net, setting
        self.optimizers = [
            torch.optim.SGD(feedback.parameters(), lr, momentum=0.9)
            for feedback, lr in zip(net.feedback.values(), setting.lr, strict=True)
        ]

    def step(self, trace: Trace) -> None:
        self.net.feedback.requires_grad_()
        for call, optimizer, iterations, sigma in zip(
            trace.calls[1:], self.optimizers, self.setting.iterations, self.setting.noise, strict=True
        ):
            assert call.feedback is not None
            forward, backward = next(call.block.parameters()), next(call.feedback.parameters())
            for _ in range(iterations):
                input_noise, output_noise = (sigma * torch.randn_like(s) for s in (call.input, call.output))
                loss = ldrl_loss(call, input_noise, output_noise)
                with torch.no_grad():
                    # which restores the places of the maxima there
                    call.feedback.encode(call.block, call.input, call.code)
                    other = backward if backward.shape == forward.shape else backward.T
                    cosine = (forward * other).sum() / (forward.norm() * other.norm() + 1e-8)
                    math.degrees(math.acos(cosine.clamp(-1, 1).item()))
                    ((forward - other).norm() / forward.norm()).item()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
        self.net.feedback.requires_grad_(False)


def make_batch(batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)


def make_step(network: str, method: str, batch: int = B, device: str = "cpu") -> Callable[[], None]:
    """Return what runs one batch of a method."""
    setting = NETWORKS[network]
    torch.manual_seed(0)
    rule = tpext.Backprop() if method == "backprop" else tpext.DifferenceTargets(setting.target_step, normalize=False)
    net = TargetSequential(setting.blocks(), rule=rule).to(device)
    optimizer = torch.optim.SGD(net.blocks.parameters(), 1e-6, momentum=0.9)
    x, labels = make_batch(batch, device)
    options: dict[str, Any] = {"noise": setting.noise, "lr": setting.lr, "momentum": 0.9}
    counts: dict[str, Any] = {"iterations": setting.iterations}
    trainers: dict[str, Callable[[], Any]] = {
        "backprop": lambda: None,
        "targets": lambda: Fixed(net),
        "closed-form": lambda: ClosedForm(net),
        "running-grid": lambda: RunningLDRL(net, noise=setting.noise, pixels="grid"),
        "running": lambda: RunningLDRL(net, noise=setting.noise),
        "tenth": lambda: LDRL(net, iterations=[math.ceil(k / 10) for k in setting.iterations], **options),
        "expected-grid": lambda: LDRL(net, second_term="expected", pixels="grid", **counts, **options),
        "expected": lambda: LDRL(net, second_term="expected", **counts, **options),
        "exact": lambda: LDRL(net, **counts, **options),
        "published": lambda: Published(net, setting),
    }
    trainer = trainers[method]()

    def step() -> None:
        trace = net.trace(x)
        if trainer is not None:
            trainer.step(trace)
        optimizer.zero_grad()
        cross_entropy(trace.output, labels).backward()
        optimizer.step()

    return step


def back_propagation(network: str, batch: int = B, device: str = "cpu") -> Callable[[], None]:
    """Return a step of back-propagation in torch alone."""
    torch.manual_seed(0)
    net = nn.Sequential(NETWORKS[network].blocks()).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 1e-6, momentum=0.9)
    x, labels = make_batch(batch, device)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), labels).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_batch(against: Any, threads: int, network: str, method: str) -> None:
    against(
        make_step(network, method),
        back_propagation(network),
        peer_name="back-propagation in torch",
        network_name=network,
        B=B,
        method=method,
        target_ratio=1 / MOST[method] if method in MOST else None,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_gpu_training_batch(gpu: Any, network: str, method: str) -> None:
    """Eagerly: the trainers count their draws of noise on the host."""
    gpu.against(
        make_step(network, method, GPU_B, gpu.device.name),
        {"back-propagation": back_propagation(network, GPU_B, gpu.device.name)},
        in_graph=False,
        network_name=network,
        B=GPU_B,
        method=method,
        target_ratio=1 / MOST[method] if method in MOST else None,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_batch_memory(benchmark: Any, network: str, method: str) -> None:
    peaks: list[int] = []

    def run() -> None:
        command = [sys.executable, __file__, network, method]
        peaks.append(int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(network_name=network, method=method, B=B, peak_bytes=peaks[0])
    print(f"\n{network}, {method}: {peaks[0] / 2**20:.0f} MiB")


if __name__ == "__main__":
    torch.set_num_threads(2)
    one_batch = make_step(*sys.argv[1:])
    # What is loaded once, by a network of another size.
    back_propagation("lenet")()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before = resident("VmRSS")
    one_batch()
    print(resident("VmHWM") - before)
