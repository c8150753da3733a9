"""Training steps of a recurrent layer in this checkout, in another one and in torch.nn.RNN, round by round.

``python benchmarks/paired.py OTHER [--threads N] [--json FILE]``: OTHER is a checkout with its native module built, of
an earlier commit, say. Each runs in a process of its own; they take turns, so that drift of the machine hits all alike.
Prints medians of a whole step, the ratio to the other checkout, and the share of the machine's limit: the step's
operations at the rate of multiply-adds in registers, and its bytes (states written and read, the incoming gradient
read) at the rate of reading, both measured in the same run by ``peak.cpp``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = [(1, 128, 512, 784), (1, 256, 64, 784), (1, 100, 16, 784), (6, 100, 20, 60)]
RULES = ["local", "through_time", "backprop"]
LOSSES = ["every step", "last step"]
ROOT = Path(__file__).resolve().parent.parent


def work(threads: int) -> None:
    """A process that takes steps as it is told on standard input, a line each, and answers with seconds."""
    import torch

    import tpext

    torch.set_num_threads(threads)
    rules = {
        "local": tpext.RegularizedInverse(credit="local"),
        "through_time": tpext.RegularizedInverse(),
        "backprop": tpext.Backprop(),
    }
    for line in sys.stdin:
        rule, loss, rounds, *sizes = json.loads(line)
        inputs, hidden, batch, steps = sizes
        torch.manual_seed(0)
        net = torch.nn.RNN(inputs, hidden) if rule == "torch" else tpext.nn.RNN(inputs, hidden, rule=rules[rule])
        x, gradient = torch.randn(steps, batch, inputs), torch.randn(steps, batch, hidden) / (steps * batch)
        taken = []
        for _ in range(rounds):
            begin = time.perf_counter()
            output, last = net(x)
            output.backward(gradient) if loss == "every step" else last.backward(gradient[:1])
            taken.append(time.perf_counter() - begin)
            del output, last
            net.zero_grad()
        print(json.dumps(taken), flush=True)


class Worker:
    def __init__(self, checkout: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--work", str(threads)]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
        )

    def take(self, rule: str, loss: str, rounds: int, sizes: tuple[int, ...]) -> list[float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([rule, loss, rounds, *sizes]), file=self.process.stdin, flush=True)
        taken: list[float] = json.loads(self.process.stdout.readline())
        return taken


def peak(threads: int) -> tuple[float, float]:
    """GFLOP/s of multiply-adds in registers, by the instruction set that the kernels use, and GB/s of reading."""
    import tpext

    flags = {"avx512": ["-mavx512f", "-mfma"], "avx2": ["-mavx2", "-mfma"]}.get(tpext._C.cpu_capability(), [])
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "-O3", *flags, "-fopenmp", source, "-o", program], check=True)
        flops, bandwidth = subprocess.run(
            [program, str(threads)], check=True, capture_output=True, text=True
        ).stdout.split()
    return float(flops), float(bandwidth)


def limit(rule: str, loss: str, sizes: tuple[int, ...], flops: float, bandwidth: float) -> float:
    """Seconds of a step at the machine's rates; where a displacement fades, less is to do than is counted here."""
    inputs, hidden, batch, steps = sizes
    products = 2 if rule == "through_time" else 1
    operations = 2 * steps * batch * hidden * ((2 + products) * hidden + 2 * inputs + 1)
    arrays = 2 + (loss == "every step")
    return operations / (flops * 1e9) + 4 * arrays * steps * batch * hidden / (bandwidth * 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        return work(options.work)
    if options.other is None:
        parser.error("OTHER must be a checkout with a built native module")
    flops, bandwidth = peak(options.threads)
    print(f"multiply-adds in registers {flops:.0f} GFLOP/s, reading {bandwidth:.1f} GB/s, {options.threads} threads")
    here, other = Worker(ROOT, options.threads), Worker(options.other.resolve(), options.threads)
    rows: list[dict[str, Any]] = []
    for sizes in SIZES:
        small = sizes[1] * sizes[2] * sizes[3] < 1e7
        for loss in LOSSES:
            reference = statistics.median(here.take("torch", loss, 9 if small else 3, sizes)[1:])
            for rule in RULES:
                ours, theirs = [], []
                for _ in range(4):
                    rounds = 20 if small else 3
                    theirs += other.take(rule, loss, rounds, sizes)[1:]
                    ours += here.take(rule, loss, rounds, sizes)[1:]
                mine, old = statistics.median(ours), statistics.median(theirs)
                share = limit(rule, loss, sizes, flops, bandwidth) / mine
                shape = dict(zip("IHBT", sizes, strict=True))
                rows.append(
                    {
                        **shape,
                        "loss": loss,
                        "rule": rule,
                        "seconds": mine,
                        "other": old,
                        "torch": reference,
                        "limit": share,
                    }
                )
                print(
                    f"{sizes} {loss:10} {rule:12} {1e3 * mine:8.2f} ms, other {1e3 * old:8.2f} ({old / mine:.2f}), "
                    f"torch {1e3 * reference:8.2f} ({reference / mine:.1f}), {share:.0%} of the limit"
                )
    if options.json:
        about = {"machine": platform.processor() or platform.machine(), "threads": options.threads}
        options.json.write_text(
            json.dumps({**about, "gflops": flops, "gbytes": bandwidth, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
