"""Made-up rows of result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
