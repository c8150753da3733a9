"""A small case of each family of CUDA kernels in every regime and dtype, for compute-sanitizer (gpu_check.sh)."""

from __future__ import annotations

import itertools
import os

import torch
from gpu import REGIMES, cannot_run

import tpext

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# T, B, H: odd, so that tiles are cut in every direction; from less than one tile to several of rows and columns.
SIZES = ((3, 2, 7), (5, 3, 70), (2, 17, 257))
INVERSES = ((3, 5, 7), (2, 33, 20), (2, 100, 100))


def scans(device: str, dtype: torch.dtype, time: int, batch: int, hidden: int) -> list[torch.Tensor]:
    """Every output of the scans: two members, one reversed, rows of several lengths."""

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * scale).to(device, dtype)

    x_proj, gradients, h0 = randn(2, time, batch, hidden), randn(2, time, batch, hidden), randn(2, batch, hidden)
    # Small enough that displacements do not overflow float16.
    weight, inverse = (randn(2, hidden, hidden, scale=0.05 / hidden**0.5) for _ in range(2))
    lengths = torch.arange(time, time - batch, -1).clamp(min=0).to(device)
    reverse = [False, True]
    states = torch.ops.tpext.rnn_scan(x_proj, h0, weight, lengths, reverse, "tanh")
    found = [states, *torch.ops.tpext.rnn_scan_backward(gradients, states, weight, lengths, reverse, "tanh")]
    for credit in ("local", "through_time"):
        for correction in ("linearized", "none"):
            settings = (lengths, reverse, "tanh", correction, credit, 0.5, 1e-2, True, True)
            found += torch.ops.tpext.rnn_target_scan(gradients, states, h0, weight, inverse, x_proj, *settings)
        input, input_feedback = randn(1, time, batch, 5), randn(2, hidden, 5)
        matrices = (h0, weight, inverse, input_feedback, None, lengths, reverse, "tanh")
        numbers = ("linearized", credit, 0.5, 1e-2, "inverse", 0.0, 2.0, 2.0, False, [True] * 4)
        found += torch.ops.tpext.rnn_layer_backward(gradients, input, states, *matrices, *numbers)
    return found


def gated_passes(device: str, dtype: torch.dtype, time: int, batch: int, hidden: int) -> list[torch.Tensor]:
    """Every output of the passes of GRU and LSTM, as above."""

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * scale).to(device, dtype)

    input, gradients, h0 = randn(1, time, batch, 5), randn(2, time, batch, hidden), randn(2, batch, hidden)
    lengths, reverse = torch.arange(time, time - batch, -1).clamp(min=0).to(device), [False, True]
    found: list[torch.Tensor] = []
    for cell, gates in (("gru", 3), ("lstm", 4)):
        c0 = h0 if cell == "lstm" else None
        of_input, of_state = randn(2, gates * hidden, 5), randn(2, gates * hidden, hidden, scale=0.05 / hidden**0.5)
        layer = (input, h0, c0, of_input, of_state, None, None, lengths, reverse, cell, True)
        states, _, _, kept = gates_of = torch.ops.tpext.gated_layer(*layer)
        found += gates_of
        for credit in ("local", "through_time"):
            tensors = (gradients, input, states, h0, c0, kept, of_state, of_state, of_input, lengths, reverse, cell)
            numbers = ("branch", credit, 0.5, 1e-2, "derivative", "derivative", 0.0, 2.0, 2.0, [True] * 5)
            found += torch.ops.tpext.gated_layer_backward(*tensors, *numbers)
    return found


def gates_cannot_run(regime: str, dtype: torch.dtype, batch: int, hidden: int) -> str | None:
    """Why a pass of a cell with gates cannot run in this regime, or None."""
    if regime != "step":
        try:
            for cell, way in itertools.product(("gru", "lstm"), ("forward", "local", "through_time")):
                tpext._C.gated_plan(cell, way, str(dtype).removeprefix("torch."), 2, batch, hidden, 0, regime)
        except ValueError as error:
            return str(error)
    return None


def run(device: str = "cuda", dtypes: tuple[torch.dtype, ...] = DTYPES) -> int:
    """Run all; returns how many combinations of size, dtype and regime there were."""
    torch.manual_seed(0)
    count = 0
    for dtype in dtypes:
        for sizes in SIZES:
            for regime in REGIMES:
                reasons = [cannot_run(regime, products, dtype, *sizes[1:], stack=2) for products in (1, 2)]
                if any(reasons):
                    print(f"{dtype}, {sizes}, {regime}: {'; '.join(filter(None, reasons))}")
                    continue
                # Before it runs: should it never end, this is the last line.
                print(f"{dtype}, {sizes}, {regime}", flush=True)
                os.environ["TPEXT_CUDA_REGIME"] = regime
                outputs = scans(device, dtype, *sizes)
                assert all(output.isfinite().all() for output in outputs), (dtype, sizes, regime)
                count += 1
                if reason := gates_cannot_run(regime, dtype, *sizes[1:]):
                    print(f"gates, {dtype}, {sizes}, {regime}: {reason}")
                    continue
                outputs = gated_passes(device, dtype, *sizes)
                assert all(output.isfinite().all() for output in outputs), ("gates", dtype, sizes, regime)
                count += 1
        if dtype.itemsize >= 4:
            for sizes in INVERSES:
                inverse = torch.ops.tpext.regularized_inverse(torch.randn(sizes).to(device, dtype), 1.0)
                assert inverse.isfinite().all(), (dtype, sizes)
                count += 1
    return count


if __name__ == "__main__":
    print(f"{run()} combinations ran")
