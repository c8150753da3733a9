"""Timing on a GPU: by events, sides in turns, each eagerly and captured in a CUDA graph; ceilings and predictions."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import pytest
import torch

import tpext

Step = Callable[[], object]
Key = tuple[str, str]  # name of a side, "eager" or "graph"

# I, H, B, T of whole steps -> what is asked of them in float32: the ratio to cuDNN, and seconds.
TARGETS: dict[tuple[int, int, int, int], tuple[float, float | None]] = {
    (1, 100, 16, 784): (8, 0.6e-3),
    (1, 128, 512, 784): (4, 2.5e-3),
    (6, 100, 20, 120): (6, 0.15e-3),
    (64, 512, 64, 512): (2, None),
    (64, 1024, 64, 512): (1.5, None),
    (56, 512, 512, 14): (1.2, None),
}
REGIMES = ("block", "cluster", "grid", "step")
SCAN_DTYPES = (torch.float32, torch.bfloat16)

LEAST_ROUNDS, MOST_ROUNDS = 5, 100
# A round runs each side as often in a row as fills this many seconds.
ROUND_SECONDS = 0.005


def name_sizes(sizes: object) -> str | None:
    return "I{}-H{}-B{}-T{}".format(*sizes) if isinstance(sizes, tuple) else None


def name_dtype(dtype: object) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


class Event(Protocol):
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class Device(Protocol):
    """What timing needs of a device; tests have one without a GPU."""

    name: str

    def event(self) -> Event: ...
    def synchronize(self) -> None: ...
    def capture(self, step: Step) -> Step: ...
    def clock_ghz(self) -> float: ...


class Gpu:
    name = "cuda"

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, step: Step) -> Step:
        """A call that replays ``step``, captured after three calls on a side stream. Raises RuntimeError."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        # This context, not that of the capture, gives the caller's stream back where the capture fails.
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
            with torch.cuda.graph(graph, stream=stream):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def clock_ghz(self) -> float:
        """The multiprocessors' clock now, by a kernel that waits for a number of cycles; low on an idle device."""
        cycles = 4_000_000
        return cycles / min(seconds_of(self, lambda: torch.cuda._sleep(cycles)) for _ in range(3)) / 1e9

    def multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(0).multi_processor_count


def seconds_of(device: Device, step: Step, calls: int = 1) -> float:
    """Seconds of a call by events around ``calls`` of them in a row, from an idle device on."""
    start, end = device.event(), device.event()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def in_turns(device: Device, sides: Mapping[Key, Step], seconds: float) -> dict[Key, list[float]]:
    """Seconds of a call of each side in every round; all rounds together take about ``seconds``."""
    device.synchronize()
    # First calls allocate and load.
    once = {key: min(seconds_of(device, step) for _ in range(2)) for key, step in sides.items()}
    repeats = {key: max(1, min(1000, round(ROUND_SECONDS / max(took, 1e-9)))) for key, took in once.items()}
    rounds = int(seconds / max(1e-9, sum(once[key] * repeats[key] for key in sides)))
    found: dict[Key, list[float]] = {key: [] for key in sides}
    for _ in range(max(LEAST_ROUNDS, min(MOST_ROUNDS, rounds))):
        for key, step in sides.items():
            found[key].append(seconds_of(device, step, repeats[key]))
    return found


def host_seconds(device: Device, step: Step, calls: int = 5) -> float:
    """Median time until a call returns, the device being idle before it: Python and launches."""
    found = []
    for _ in range(calls):
        device.synchronize()
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    device.synchronize()
    return statistics.median(found)


@contextmanager
def cudnn_tf32(allowed: bool) -> Iterator[None]:
    """cuDNN with or without TF32; torch's matrix products without, as is their default."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    backends[0].allow_tf32, backends[1].allow_tf32 = allowed, False
    try:
        yield
    finally:
        backends[0].allow_tf32, backends[1].allow_tf32 = before


def ceilings(device: Device, copied: int = 2**30, size: int = 8192) -> dict[str, float]:
    """What this device reaches: clock, a copy on the device (bytes read and written), products of random matrices."""

    def best(step: Step) -> float:
        step()
        return min(seconds_of(device, step, 3) for _ in range(3))

    source = torch.ones(copied, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    found = {"copy_gbs": 2 * copied / best(lambda: target.copy_(source)) / 1e9}
    for name, dtype in (("fp32_tflops", torch.float32), ("bf16_tflops", torch.bfloat16)):
        matrix = torch.randn(size, size, generator=torch.Generator(device.name), device=device.name).to(dtype)
        out = torch.empty_like(matrix)
        found[name] = 2 * size**3 / best(functools.partial(torch.mm, matrix, matrix, out=out)) / 1e12
    found["clock_ghz"] = device.clock_ghz()
    return found


@functools.cache
def machine() -> dict[str, object]:
    """The GPU, the versions of what runs on it, and its ceilings."""
    with cudnn_tf32(False):
        measured = ceilings(Gpu())
    return {
        "name": torch.cuda.get_device_name(0),
        "multiprocessors": Gpu().multiprocessors(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "architectures": tpext.build_info()["cuda_architectures"],
        **measured,
    }


def kernels(device: Device, step: Step, most: int = 6) -> dict[str, object]:
    """The kernels that a call launches: how many, and those that take longest. Empty where they cannot be traced."""
    step()
    device.synchronize()
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        step()
        device.synchronize()
    # Those of the CPU carry the time of the kernels that they launch a second time.
    events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: -event.self_device_time_total)
    longest = [{"name": e.key[:120], "calls": e.count, "us": e.self_device_time_total} for e in events[:most]]
    return {"launches": sum(event.count for event in events), "longest": longest}


class Timer:
    """What the fixture ``gpu`` gives to a row."""

    def __init__(self, benchmark: Any, device: Device, name: str) -> None:
        self.benchmark, self.device, self.name = benchmark, device, name
        # Of its own: a capture that fails leaves torch's in a state in which it refuses to draw.
        self.generator = torch.Generator(device.name).manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device.name).to(dtype)

    def force(
        self, monkeypatch: pytest.MonkeyPatch, regime: str, products: int, dtype: torch.dtype, batch: int, hidden: int
    ) -> None:
        """Make the scans run in this regime, or skip the row where it cannot."""
        reason = cannot_run(regime, products, dtype, batch, hidden)
        if reason:
            pytest.skip(reason)
        monkeypatch.setenv("TPEXT_CUDA_REGIME", regime)

    def against(
        self,
        ours: Step,
        peers: Mapping[str, Step],
        *,
        others: Mapping[str, Step] | None = None,
        peers_in_graph: bool = True,
        in_graph: bool = True,
        target_ratio: float | None = None,
        target_seconds: float | None = None,
        seconds: float = 0.8,
        **extra: object,
    ) -> None:
        """Time ours, the peers and ``others`` (reported, not counted) in turns, eagerly and each captured in a graph.

        The time is ours in the graph; the peer's is the best of all peers, eagerly or in the graph; the ratio is the
        latter by the former. Recorded too: quartiles of every side and the host's time of an eager call. A side
        that cannot be captured has its eager time alone; ours then fails the row after recording it. ``in_graph=False``
        is for steps that count on the host: eager times alone.
        """
        steps = {"ours": ours, **peers, **(others or {})}
        if self.benchmark.disabled:
            for step in steps.values():
                step()
            self.benchmark.pedantic(ours)
            return
        sides: dict[Key, Step] = {}
        errors: dict[str, str] = {}
        for name, step in steps.items():
            step()
            sides[name, "eager"] = step
            if not in_graph or (name in peers and not peers_in_graph):
                continue
            try:
                sides[name, "graph"] = self.device.capture(step)
            except RuntimeError as error:
                errors[name] = str(error).partition("\n")[0]
        times: dict[Key, list[float]] = {}
        self.benchmark.pedantic(lambda: times.update(in_turns(self.device, sides, seconds)))
        quartiles = {key: statistics.quantiles(values, n=4) for key, values in times.items()}
        mine = ("ours", "graph" if ("ours", "graph") in sides else "eager")
        best = min((key for key in times if key[0] in peers), key=lambda key: quartiles[key][1])
        ratios = [p / o for p, o in zip(times[best], times[mine], strict=True)]
        recorded: dict[str, dict[str, object]] = {name: {} for name in steps}
        for (name, mode), values in quartiles.items():
            recorded[name][mode] = values
        for name, step in steps.items():
            recorded[name]["host"] = host_seconds(self.device, step)
        ratio = quartiles[best][1] / quartiles[mine][1]
        self.record(
            times[mine],
            **extra,
            **self.environment(),
            peer=", ".join(best),
            peer_median=quartiles[best][1],
            peer_iqr=quartiles[best][2] - quartiles[best][0],
            ratio=ratio,
            ratio_quartiles=statistics.quantiles(ratios, n=4),
            sides=recorded,
            graph_errors=errors,
            target_ratio=target_ratio,
            target_seconds=target_seconds,
        )
        print(f", {best[0]} {quartiles[best][1] * 1e3:.3f} ms ({best[1]}), ratio {ratio:.2f}", end="")
        assert "ours" not in errors, f"ours cannot be captured in a graph: {errors['ours']}"

    def alone(
        self, call: Step, *, time: int, products: int, dtype: torch.dtype, seconds: float = 0.06, **extra: Any
    ) -> None:
        """Time a scan by itself, several in one graph where it is short; beside it what the model predicts."""
        if self.benchmark.disabled:
            self.benchmark.pedantic(call)
            return
        call()
        calls = max(1, min(20, round(1e-3 / max(1e-9, seconds_of(self.device, call)))))
        replay = self.device.capture(lambda: [call() for _ in range(calls)])
        times: list[float] = []
        key = ("ours", "graph")
        self.benchmark.pedantic(lambda: times.extend(in_turns(self.device, {key: replay}, seconds)[key]))
        environment = self.environment()
        cycles = 0.0
        if extra["regime"] != "step":
            cycles = plan(extra["regime"], products, dtype, extra["B"], extra["H"])[2]
        predicted = cycles / environment["clock_ghz"] / 1e3 or None
        median = statistics.median(times) / calls * 1e6 / time
        self.record(
            [value / calls for value in times],
            **extra,
            **environment,
            T=time,
            dtype=name_dtype(dtype),
            us_per_step=median,
            predicted_us_per_step=predicted,
        )
        said = "" if predicted is None else f", predicted {predicted:.3f}"
        print(f", {median:.3f} us a step{said}", end="")

    def environment(self) -> dict[str, Any]:
        """To be called right after timing, for the clock."""
        return {
            "torch": torch.__version__,
            "commit": tpext.build_info()["commit"],
            "clock_ghz": self.device.clock_ghz(),
        }

    def record(self, times: list[float], **info: object) -> None:
        """Put the row into the result file: pytest-benchmark's own statistics are to be of a call too."""
        self.benchmark.stats.stats.data[:] = times
        low, median, high = statistics.quantiles(times, n=4)
        self.benchmark.extra_info.update(info, seconds=median, iqr=high - low, rounds=len(times))
        print(f"\n{self.name}: {median * 1e3:.4f} ms", end="")


def plan(
    regime: str, products: int, dtype: torch.dtype, batch: int, hidden: int, stack: int = 1
) -> tuple[str, int, float]:
    """How a scan with so many products of H x H a step runs: regime, bytes of workspace, predicted cycles a step."""
    return tpext._C.rnn_plan(products, str(name_dtype(dtype)), stack, batch, hidden, 0, regime)


def cannot_run(regime: str, products: int, dtype: torch.dtype, batch: int, hidden: int, stack: int = 1) -> str | None:
    """Why such scans cannot run in this regime, or None."""
    if regime != "step":
        try:
            plan(regime, products, dtype, batch, hidden, stack)
        except ValueError as error:
            return str(error)
    return None
