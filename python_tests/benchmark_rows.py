"""Made-up rows of result files, and of the suite as its benchmarks say them."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def timed(name: str, *, seconds: float = 1e-3, ratio: float = 4.0, spread: float = 0.1, **extra: Any) -> dict[str, Any]:
    """A row of a result file as the suite writes it; the peer took ``seconds * ratio``."""
    info = {
        "peer": "torch.nn.RNN with BPTT",
        "seconds": seconds,
        "iqr": 0.01 * seconds,
        "peer_median": seconds * ratio,
        "peer_iqr": 0.02 * seconds,
        "ratio": ratio,
        "ratio_quartiles": [ratio - spread, ratio, ratio + spread],
        "threads": 2,
        "torch": "2.99",
        "cpu_capability": "avx2",
        **extra,
    }
    return {"name": name, "extra_info": info}


def peak(model: str, bytes: int, *sizes: int) -> dict[str, Any]:
    info = dict(zip("IHBT", sizes, strict=True), model=model, peak_bytes=bytes, peak_arrays=2.0)
    return {"name": f"test_peak[{model}-T{sizes[-1]}]", "extra_info": info}


def write(path: Path, rows: list[dict[str, Any]], **machine: Any) -> Path:
    path.write_text(json.dumps({"benchmarks": rows, "machine_info": {"cpu": {"brand_raw": "Abacus 9"}, **machine}}))
    return path


LIMITS = {"limit_seconds": 5e-4, "limit_ratio": 8.0, "fraction_of_sgemm": 0.5}


def step(test: str, rule: str, sizes: tuple[int, int, int, int], *, threads: int = 2, **extra: Any) -> dict[str, Any]:
    limits = {"sgemm_gflops": 90.0 * threads, **LIMITS}
    named = {**dict(zip("IHBT", sizes, strict=True)), "rule": rule, "loss": "last", "threads": threads, **limits}
    return timed(f"{test}[{threads}-{rule}-{sizes}]", **{**named, **extra})


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """``load(name)`` imports a module of the folder ``benchmarks``, which is no package."""
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("no folder benchmarks beside the tests")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="module")
def feed_forward() -> list[dict[str, Any]]:
    """Rows of feed-forward networks as their benchmarks say them, for made-up times."""
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("no folder benchmarks beside the tests")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        rows = run_feed_forward()
    torch.set_num_threads(threads)
    return rows


def run_feed_forward() -> list[dict[str, Any]]:
    names = ("regularized_inverse", "layer_inverse", "mlp", "kaczmarz", "counter_normal", "pooled_difference")
    inverse, layers, mlp, kaczmarz, noise, pooled = (importlib.import_module(f"bench_{name}") for name in names)
    rows: list[dict[str, Any]] = []

    def run(test: Callable[..., None], *args: Any, threads: int = 2, ratio: float = 4.0) -> None:
        def against(
            ours: Any, peer: Any, *, peer_name: str, seconds: float = 0.0, flops: Any = None, **extra: Any
        ) -> None:
            limits = {} if flops is None else LIMITS
            rows.append(
                timed(f"{test.__name__}[{len(rows)}]", ratio=ratio, peer=peer_name, threads=threads, **extra, **limits)
            )

        test(against, *args)

    for size, batch, ratio in [(4, 64, 9.0), (4, 1024, 12.0), (8, 64, 7.0), (8, 1024, 11.0)]:
        run(inverse.test_small_inverses, size, batch, ratio=ratio)
    run(inverse.test_small_solutions, 8, 1)
    for op, activation, displacement in (("act_inverse", "tanh", "small"), ("act_displacement", "sigmoid", "any")):
        run(layers.test_act_inverse, 2, op, (4, 5), activation, displacement)
    for method in layers.REGS:
        run(layers.test_linear_inverse, 2, 8, 5, method)
        for op in (layers.layer_inverse, layers.layer_displacement):
            run(layers.test_layer, 2, 8, 5, method, op)
    for rule, ratio in zip(mlp.RULES, (0.625, 0.5, 0.4, 1.25), strict=True):
        for optimizer in mlp.OPTIMIZERS:
            run(mlp.test_mlp_step, 2, optimizer, rule, ratio=ratio)
    for first_layer, ratio in ((True, 7.25), (False, 2.5)):
        run(mlp.test_published_step, 2, "regularized", first_layer, ratio=ratio)
    for peer in kaczmarz.PEERS:
        run(kaczmarz.test_stream, 1, kaczmarz.NETWORKS[0], peer, threads=1, ratio=31.0)
    run(kaczmarz.test_layer_step, 2, *kaczmarz.LAYERS[0])
    run(kaczmarz.test_network, 2, 64, ratio=1.5)
    for peer in ("torch.randn", "normal_"):
        run(noise.test_noise, 2, (4, 300), torch.float32, peer)
    for op in pooled.OPS:
        run(pooled.test_difference, 2, op, (2, 3, 4), 2, 2, 3)
        run(pooled.test_difference, 2, op, (2, 8, 1), 0, 1, 1)
    return json.loads(json.dumps(rows))


@pytest.fixture
def suite(feed_forward: list[dict[str, Any]]) -> list[dict[str, Any]]:
    long = (1, 128, 16, 10_000)
    rows = [step("test_step", rule, (6, 100, 20, 60)) for rule in ("local", "through_time", "backprop")]
    rows[1]["extra_info"].update(ratio=3.0, limit_ratio=6.0)
    rows.append(step("test_step", "local", (6, 100, 20, 60), threads=1, ratio=1.25))
    flagship = (1, 100, 16, 784)
    for number, rule in enumerate(("local", "through_time", "backprop")):
        rows += [step("test_step", rule, flagship, loss=loss, ratio=9.0 - number) for loss in ("last", "every")]
    for loop, ratio in (("published_style", 51.0), ("tuned", 7.0)):
        rows.append(step("test_eager_loop", "local", flagship, ratio=ratio, peer=f"eager loop, {loop}"))
    for rule in ("local", "through_time", "backprop"):
        rows += [step("test_sweep", rule, (1, 100, 16, time)) for time in (30, 100, 300)]
        rows += [step("test_sweep", rule, (1, hidden, 16, 200)) for hidden in (16, 64)]
    rows += [peak("torch.nn.RNN", 900 << 20, 1, 128, 512, 784), peak("local", 500 << 20, 1, 128, 512, 784)]
    rows += [peak("through_time", 300 << 20, *long), peak("checkpointed", 20 << 20, *long)]
    chunked = {**dict(zip("IHBT", long, strict=True)), "checkpoint_every": 316}
    return [*rows, timed("test_long_sequence[a]", seconds=0.125, ratio=0.8, **chunked), *copy.deepcopy(feed_forward)]
