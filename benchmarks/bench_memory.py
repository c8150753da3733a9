"""Peak memory of a training step, each in a process of its own; long sequences whole and by chunks.

Run as a script, this file is such a process: ``python bench_memory.py MODEL I H B T`` takes one step and prints the
bytes by which its peak of resident memory exceeds what was resident before it. MODEL may end in ", every step".
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tpext

CHECKPOINT_EVERY = 316
MODELS: dict[str, Callable[[int, int], torch.nn.Module]] = {
    "torch.nn.RNN": torch.nn.RNN,
    "local": lambda inputs, hidden: tpext.nn.RNN(inputs, hidden, rule=tpext.RegularizedInverse(credit="local")),
    "through_time": lambda inputs, hidden: tpext.nn.RNN(inputs, hidden),
    "backprop": lambda inputs, hidden: tpext.nn.RNN(inputs, hidden, rule=tpext.Backprop()),
    "checkpointed": lambda inputs, hidden: tpext.nn.RNN(
        inputs, hidden, return_sequence=False, checkpoint_every=CHECKPOINT_EVERY
    ),
    "two layers": lambda inputs, hidden: tpext.nn.RNN(inputs, hidden, 2),
    "two layers, checkpointed": lambda inputs, hidden: tpext.nn.RNN(
        inputs, hidden, 2, return_sequence=False, checkpoint_every=CHECKPOINT_EVERY
    ),
    "both directions": lambda inputs, hidden: tpext.nn.RNN(inputs, hidden, bidirectional=True),
    "both directions, checkpointed": lambda inputs, hidden: tpext.nn.RNN(
        inputs, hidden, bidirectional=True, return_sequence=False, checkpoint_every=CHECKPOINT_EVERY
    ),
}
EVERY_STEP = ", every step"
SIZES = (1, 128, 512, 784)
LONG = [(1, 128, 16, 10_000), (1, 128, 16, 100_000)]


def step(model: torch.nn.Module, x: torch.Tensor, every: bool = False) -> None:
    """A training step with a loss on the last state or on ``every``; ``output`` lives as long as in a user's code."""
    model.zero_grad()
    output, last = model(x)
    if every:
        output.backward(torch.full_like(output, 1e-6))
    else:
        last.square().mean().backward()
    del output


def resident(field: str) -> int:
    """Bytes resident in this process: now (``VmRSS``) or at most (``VmHWM``)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def peak_of_step(name: str, inputs: int, hidden: int, batch: int, time: int) -> int:
    torch.set_num_threads(2)
    every = name.endswith(EVERY_STEP)
    model = MODELS[name.removesuffix(EVERY_STEP)](inputs, hidden)
    x = torch.rand(time, batch, inputs)
    # What is loaded and allocated once, whatever the size.
    step(model, x[:4, :4], every)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before = resident("VmRSS")
    step(model, x, every)
    return resident("VmHWM") - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (name + loss, SIZES)
        for loss in ("", EVERY_STEP)
        for name in ("torch.nn.RNN", "local", "through_time", "backprop")
    ]
    + [(name, sizes) for sizes in LONG for name in ("through_time", "checkpointed")]
    + [(layers + pieces, LONG[0]) for layers in ("two layers", "both directions") for pieces in ("", ", checkpointed")],
    ids=lambda value: value if isinstance(value, str) else "I{}-H{}-B{}-T{}".format(*value),
)
def test_peak(benchmark, name, sizes):
    inputs, hidden, batch, time = sizes
    command = [sys.executable, __file__, name, *map(str, sizes)]
    peaks: list[int] = []

    def run() -> None:
        peaks.append(int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))

    # The time of this row is that of the whole process, and says nothing. torch's peak differs by a fifth between
    # processes; those of the long sequences are ours alone.
    benchmark.pedantic(run, rounds=1 if sizes in LONG else 3)
    peak = statistics.median_low(peaks)
    arrays = peak / (4 * time * batch * hidden)
    benchmark.extra_info.update(model=name, I=inputs, H=hidden, B=batch, T=time, peak_bytes=peak, peak_arrays=arrays)
    print(f"\n{name}, {sizes}: {peak / 2**20:.0f} MiB, {arrays:.2f} arrays [T, B, H]")


@pytest.mark.parametrize("sizes", LONG, ids=lambda sizes: "I{}-H{}-B{}-T{}".format(*sizes))
@pytest.mark.parametrize("threads", [2], indirect=True, ids=["threads2"])
def test_long_sequence(against, threads, sizes):
    """A step by chunks against the whole sequence at once: ours is the first, the peer the second."""
    inputs, hidden, batch, time = sizes
    torch.manual_seed(0)
    chunked, whole = MODELS["checkpointed"](inputs, hidden), MODELS["through_time"](inputs, hidden)
    x = torch.rand(time, batch, inputs)
    against(
        lambda: step(chunked, x),
        lambda: step(whole, x),
        peer_name="the whole sequence at once",
        I=inputs,
        H=hidden,
        B=batch,
        T=time,
        checkpoint_every=CHECKPOINT_EVERY,
    )


if __name__ == "__main__":
    print(peak_of_step(sys.argv[1], *map(int, sys.argv[2:])))
