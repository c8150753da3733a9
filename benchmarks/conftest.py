"""Paired timing: each row runs its peer right before every round of ours, so that drift of the machine hits both.

Rows on a GPU are marked ``gpu`` and timed by gpu.py; without one they are skipped.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import gpu as gpu_timing
import pytest
import torch

import tpext

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
# A round runs each side as often in a row as fills this many seconds. In a training loop a step follows its like; one
# of half a millisecond between two of the peer's would spend a third of its time refilling caches.
ROUND_SECONDS = 0.02
NO_GPU = "needs a CUDA device, and torch sees none"
START = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A profiler may slow down what runs after it.
    items.sort(key=lambda item: "kernels_of_a_step" in item.name)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where TPEXT_BENCHMARK_SECONDS are up, skip what is left, so that the result file is written in time."""
    limit = float(os.environ.get("TPEXT_BENCHMARK_SECONDS", "inf"))
    if time.monotonic() - START > limit:
        pytest.skip(f"the {limit:g} s of TPEXT_BENCHMARK_SECONDS are up")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_GPU in str(report.longrepr)]
    terminalreporter.write_line(f"gpu rows skipped: {len(skipped)}" + (f" ({NO_GPU})" if skipped else ""))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    # The result files are published; the host's name is nobody's business.
    machine_info.pop("node", None)
    if gpu_timing.machine.cache_info().currsize:
        machine_info["gpu"] = gpu_timing.machine()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    # Single rounds would make nine tenths of the file; what is needed of them is in the quartiles. The parameters are
    # in the row's name.
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        for field in ("options", "params", "param"):
            row.pop(field, None)


@pytest.fixture
def gpu(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[gpu_timing.Timer]:
    """Timing on the GPU, TF32 off."""
    if not benchmark.disabled:
        gpu_timing.machine()
    with gpu_timing.cudnn_tf32(False):
        yield gpu_timing.Timer(benchmark, gpu_timing.Gpu(), request.node.name)


@pytest.fixture(params=[1, 2], ids=lambda n: f"threads{n}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads, for torch and the kernels alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def sgemm_peak(rounds: int = 5) -> float:
    """The best float32 rate in FLOP/s that torch.mm reaches now on torch's threads, 1024 x 1024."""
    a, b, c = (torch.randn(1024, 1024) for _ in range(3))
    torch.mm(a, b, out=c)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def environment() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": tpext._C.cpu_capability(),
        "commit": tpext.build_info()["commit"],
    }


@pytest.fixture
def against(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``against(ours, peer, peer_name=..., flops=None, seconds=1.2, **extra)`` times both in turns.

    A round is a timing of the peer and one of ours, each of as many calls in a row as fill 20 ms together. Recorded:
    median and interquartile range of a call of either, ``ratio`` of the medians (peer by ours), quartiles of the ratio
    of single rounds, and with ``flops``, the operations of ours that cannot be saved, the sgemm peak measured right
    before, what they cost at it (``limit_seconds``), the ratio that this would be (``limit_ratio``), and the fraction
    of the peak that ours reaches. A row takes about ``seconds``, but at least 5 rounds. Without ``--benchmark-enable``
    both run once.
    """

    def run(
        ours: Callable[[], object],
        peer: Callable[[], object],
        *,
        peer_name: str,
        flops: float | None = None,
        seconds: float = 1.2,
        **extra: object,
    ) -> None:
        def once() -> float:
            start = time.perf_counter()
            peer()
            ours()
            return time.perf_counter() - start

        if benchmark.disabled:
            peer()
            benchmark.pedantic(ours)
            return
        pair = once()
        if pair < seconds / LEAST_ROUNDS:
            # First calls allocate and load; the row of a small size is judged by its second.
            pair = once()
        peak = None if flops is None else sgemm_peak()
        repeats = max(1, round(ROUND_SECONDS / pair))
        peer_seconds: list[float] = []

        def time_peer() -> None:
            start = time.perf_counter()
            for _ in range(repeats):
                peer()
            peer_seconds.append((time.perf_counter() - start) / repeats)

        def repeated() -> None:
            for _ in range(repeats):
                ours()

        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / pair / repeats)))
        benchmark.pedantic(repeated, setup=time_peer, rounds=rounds, iterations=1)
        # pytest-benchmark's own table and statistics are to be of one call too.
        benchmark.stats.stats.data[:] = our_seconds = [d / repeats for d in benchmark.stats.stats.data]
        our_quartiles, peer_quartiles = (statistics.quantiles(values, n=4) for values in (our_seconds, peer_seconds))
        median = our_quartiles[1]
        ratios = [p / o for p, o in zip(peer_seconds, our_seconds, strict=True)]
        info = {
            **extra,
            "seconds": median,
            "iqr": our_quartiles[2] - our_quartiles[0],
            "repeats": repeats,
            "rounds": rounds,
            "peer": peer_name,
            "peer_median": peer_quartiles[1],
            "peer_iqr": peer_quartiles[2] - peer_quartiles[0],
            "ratio": peer_quartiles[1] / median,
            "ratio_quartiles": statistics.quantiles(ratios, n=4),
            **environment(),
        }
        if flops is not None and peak is not None:
            info["sgemm_gflops"] = peak / 1e9
            info["limit_seconds"] = flops / peak
            info["limit_ratio"] = peer_quartiles[1] * peak / flops
            info["fraction_of_sgemm"] = flops / peak / median
        benchmark.extra_info.update(info)
        fraction = f", {info['fraction_of_sgemm']:.0%} of sgemm" if flops is not None else ""
        print(
            f"\n{request.node.name}: {median * 1e3:.3f} ms, peer {peer_quartiles[1] * 1e3:.3f} ms, "
            f"ratio {info['ratio']:.2f}{fraction}"
        )

    return run
