"""Paired timing: each row runs its peer right before every round of ours, so that drift of the machine hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import tpext


@pytest.fixture(params=[1, 2], ids=lambda n: f"threads={n}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads, for torch and the kernels alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def sgemm_peak(rounds: int = 15) -> float:
    """The best float32 rate in FLOP/s that torch.mm reaches on this machine now, 1024 x 1024."""
    a, b, c = (torch.randn(1024, 1024) for _ in range(3))
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


@pytest.fixture
def against(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``against(ours, peer, peer_name=..., flops=None, **extra)`` times both in turns and records their ratio."""

    def run(
        ours: Callable[[], object],
        peer: Callable[[], object],
        *,
        peer_name: str,
        flops: float | None = None,
        **extra: object,
    ) -> None:
        ours(), peer()
        start = time.perf_counter()
        peer()
        ours()
        # About three seconds a row, within 7 and 200 rounds.
        rounds = max(7, min(200, int(3 / (time.perf_counter() - start))))
        peer_seconds: list[float] = []

        def time_peer() -> None:
            start = time.perf_counter()
            peer()
            peer_seconds.append(time.perf_counter() - start)

        benchmark.pedantic(ours, setup=time_peer, rounds=rounds, iterations=1)
        median = statistics.median(peer_seconds)
        quartiles = statistics.quantiles(peer_seconds, n=4)
        seconds = benchmark.stats.stats.median
        info = {
            **extra,
            "peer": peer_name,
            "peer_median": median,
            "peer_iqr": quartiles[2] - quartiles[0],
            "ratio": median / seconds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cpu_capability": tpext._C.cpu_capability(),
            "commit": tpext.build_info()["commit"],
        }
        if flops is not None:
            info["gflops"] = flops / seconds / 1e9
            info["fraction_of_sgemm"] = flops / seconds / sgemm_peak()
        benchmark.extra_info.update(info)
        print(f"\n{request.node.name}: {seconds * 1e3:.3f} ms, peer {median * 1e3:.3f} ms, ratio {info['ratio']:.2f}")

    return run
