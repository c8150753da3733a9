"""GRU and LSTM on CUDA: sweeps in every regime, on a GPU and by the emulation of the same kernels.

The ops are kernels and torch's products, held to the oracles that the CPU's kernels are held to.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from comparison import (
    DTYPES,
    as_exact,
    assert_close_to_oracle,
    assert_no_worse,
    assert_same_bits,
    is_possible,
    name,
    pairwise,
    run_on,
)
from gated_cases import CELLS, CREDITS, GATES, Gated, as_tensors, gated
from test_gated_layer import Forward
from test_gated_layer import oracle as forward_oracle
from test_gated_layer_backward import WAYS, Backward, arguments_of
from test_gated_layer_backward import oracle as backward_oracle
from test_member_numbers import assert_members_equal_calls_of_their_own
from torch import Tensor

import tpext
from tpext import _C, Backprop, RegularizedInverse
from tpext.ops import _library
from tpext.ops import gated_layer as module
from tpext.ops._gated_backward_composite import gated_backward_composite
from tpext.ops._gated_composite import gated_layer_composite

ops = torch.ops.tpext
gpu = pytest.mark.gpu
KERNELS = ["block", "cluster", "grid"]
REGIMES = ["auto", *KERNELS, "step"]
LOW = [torch.bfloat16, torch.float16]

# Demands a regime of the passes that follow. False where the device cannot run this one so, which then must raise.
Demand = Callable[[str, Gated, str], bool]


@pytest.fixture
def demand(monkeypatch: pytest.MonkeyPatch) -> Demand:
    def demand(regime: str, case: Gated, way: str) -> bool:
        monkeypatch.setenv("TPEXT_CUDA_REGIME", regime)
        S, B, H = case.h0.shape
        dtype = _library.dtype_name(case.h0.dtype)
        return is_possible(regime, functools.partial(_library.gated_plan, case.cell, way, dtype, S, B, H, 0, regime))

    return demand


def check_forward(case: Gated, device: torch.device, keep: bool = True) -> None:
    arguments, run = Forward(*case.layer, keep), run_on(device, ops.gated_layer)
    if case.h0.dtype in LOW:
        peer = gated_layer_composite(*arguments)
        return assert_no_worse(run(*arguments), peer, as_exact(forward_oracle, arguments), case.h0.dtype)
    terms = case.input.shape[1] + case.weight_ih.shape[2] + case.h0.shape[2] + 2
    return assert_close_to_oracle(run, forward_oracle, arguments, terms=terms)


def back_arguments(case: Gated, way: str, credit: str, **options: Any) -> Backward:
    """Of float64 numbers, rounded to the case's dtype; what is kept is made of them in no regime that was demanded."""
    exact = Gated(*(as_dtype(value, torch.float64) for value in case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPEXT_CUDA_REGIME", "step")
        arguments = arguments_of(exact, way, credit, **options)
    # products on CUDA go over padding, where states are zero as the forward pass leaves them
    arguments = arguments._replace(states=arguments.states.nan_to_num())
    return Backward(*(as_dtype(value, case.h0.dtype) for value in arguments))


def check_backward(case: Gated, way: str, credit: str, device: torch.device, **options: Any) -> None:
    arguments, run = back_arguments(case, way, credit, **options), run_on(device, ops.gated_layer_backward)
    S, T, B, H = arguments.states.shape
    if case.h0.dtype in LOW:
        # the peer carries float32 from step to step
        peer = gated_backward_composite(module._Backward(*arguments))
        return assert_no_worse(run(*arguments), peer, as_exact(backward_oracle, arguments), case.h0.dtype, times=8)
    terms = T * B + 2 * GATES[case.cell] * H + T + S
    return assert_close_to_oracle(run, backward_oracle, arguments, terms=terms)


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def case_of(cell: str, dtype: torch.dtype = torch.float64, direction: str = "mixed", **sizes: Any) -> Gated:
    reverse = [{"forward": False, "reverse": True, "mixed": s % 2 == 1}[direction] for s in range(sizes.get("S", 2))]
    return as_tensors(gated(cell, **sizes, reverse=reverse), dtype)


# Against the oracle.

OPTIONS: dict[str, list[Any]] = {
    "cell": CELLS,
    "way": WAYS,
    "credit": CREDITS,
    "regime": REGIMES,
    "dtype": [*DTYPES, torch.bfloat16],
    "direction": ["forward", "reverse", "mixed"],
    "S": [1, 2],
    "T": [1, 4],
    "B": [1, 3, 9],
    "H": [1, 9, 33],
    "ragged": [False, True],
    "bias": [False, True],
    "own_inputs": [False, True],
    "keep": [False, True],
    "enters": ["states", "end", "both"],
    "needs": [[True] * 5, [False, True, False, True, False]],
}


@pytest.mark.parametrize("options", pairwise(**OPTIONS), ids=name)
def test_passes_equal_the_oracle(options: dict[str, Any], device: torch.device, demand: Demand) -> None:
    back = {key: options.pop(key) for key in ("way", "credit", "enters", "needs")}
    regime, keep = options.pop("regime"), options.pop("keep")
    case = case_of(**options)
    if demand(regime, case, "forward"):
        check_forward(case, device, keep)
    if demand(regime, case, back["credit"]):
        check_backward(case, **back, device=device)


# Each depth of weights that a kernel keeps on the chip, and so each way of sharing the columns.
@pytest.mark.parametrize("H", [40, 100, 200, 300])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_every_width(cell: str, dtype: torch.dtype, H: int, device: torch.device, demand: Demand) -> None:
    case = case_of(cell, dtype, S=1, T=2, B=4, I=16, H=H, ragged=False)
    regime = {40: "block", 100: "cluster", 200: "grid", 300: "grid"}[H]
    if demand(regime, case, "forward"):
        check_forward(case, device)
    for credit in CREDITS:
        if demand(regime, case, credit):
            check_backward(case, "published", credit, device)


@pytest.mark.parametrize("way", ["forward", *CREDITS])
@pytest.mark.parametrize("cell", CELLS)
def test_the_regime_does_not_depend_on_the_batch(cell: str, way: str, device: torch.device) -> None:
    for H, dtype in itertools.product([64, 100, 300, 1024], ["float32", "float64", "bfloat16"]):
        assert (
            len({_library.gated_plan(cell, way, dtype, S, B, H, 0, "auto")[0] for S in (1, 3) for B in (1, 64, 4096)})
            == 1
        )


@pytest.mark.parametrize("empty", ["S", "T", "B", "I", "H"])
@pytest.mark.parametrize("cell", CELLS)
def test_size_zero(cell: str, empty: str, device: torch.device) -> None:
    sizes = {"T": 3, "B": 4, "I": 2, "H": 5, "S": 2} | {empty: 0}
    case = as_tensors(gated(cell, own_inputs=True, reverse=[False] * sizes["S"], **sizes))
    check_forward(case, device)
    if empty != "H":
        check_backward(case, "derivative", "through_time", device)


# The same bits.


def every_output(case: Gated, device: torch.device) -> list[Tensor]:
    """What of both passes belongs to a row, as ``[S, B, ...]``: sums over rows do not."""
    case = case._replace(input=case.input.nan_to_num())
    states, *final, kept = run_on(device, ops.gated_layer)(*case.layer, True)
    found = [states.transpose(1, 2), kept.transpose(1, 2), *(state for state in final if state.numel())]
    arguments = back_arguments(case, "published", "through_time", needs=[False] * 5)
    found += run_on(device, ops.gated_layer_backward)(*arguments)[5:]
    return [output for output in found if output.dim() > 1]


def rows_of(case: Gated, rows: slice) -> Gated:
    index = {
        **dict.fromkeys(("input", "grad_states"), (slice(None), slice(None), rows)),
        **dict.fromkeys(("h0", "c0", "disp_h_n", "disp_c_n", "credit_h_n", "credit_c_n"), (slice(None), rows)),
        "lengths": (rows,),
    }
    values = {key: getattr(case, key) for key in index}
    return case._replace(**{key: None if value is None else value[index[key]] for key, value in values.items()})


# one feature, whose products are the same whatever the number of rows
def of_one_feature(cell: str, dtype: torch.dtype, **sizes: int) -> Gated:
    return case_of(cell, dtype, I=1, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_repetition_and_batch_split(
    cell: str, regime: str, dtype: torch.dtype, device: torch.device, demand: Demand
) -> None:
    case = of_one_feature(cell, dtype, T=3, B=9, H=17)
    assert demand(regime, case, "through_time")
    expected = every_output(case, device)
    assert_same_bits(every_output(case, device), expected)
    parts = [every_output(rows_of(case, rows), device) for rows in (slice(5), slice(5, None))]
    assert_same_bits([torch.cat(pair, 1) for pair in zip(*parts, strict=True)], expected)


@pytest.mark.parametrize("regime", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_no_schedule_changes_a_bit(cell: str, regime: str, emulation: ModuleType, demand: Demand) -> None:
    case = of_one_feature(cell, torch.bfloat16, T=3, B=3, H=65)
    if not demand(regime, case, "through_time"):
        return
    cpu = torch.device("cpu")
    expected = every_output(case, cpu)
    try:
        emulation.set_emulation_seed(1)
        assert_same_bits(every_output(case, cpu), expected)
    finally:
        emulation.set_emulation_seed(int(os.environ.get("TPEXT_EMULATION_SEED", 0)))


@pytest.mark.parametrize("regime", ["auto", "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_members_with_numbers_of_their_own(cell: str, regime: str, device: torch.device, demand: Demand) -> None:
    """Kernels take one number for all: the members run one after another."""
    case = case_of(cell, torch.float32, S=3, T=3, B=3, H=9, own_inputs=True)
    assert demand(regime, case, "through_time")
    arguments = back_arguments(case, "damped", "through_time", numbers="of each member")
    assert_members_equal_calls_of_their_own(run_on(device, ops.gated_layer_backward), module._Backward(*arguments))


# Whole networks.


@pytest.mark.parametrize("rule", [Backprop(), RegularizedInverse(), RegularizedInverse(credit="local")], ids=str)
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_networks_equal_those_of_the_composites(
    cell: str, rule: tpext.rules.Rule, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network() -> list[Tensor]:
        torch.manual_seed(3)
        layers = getattr(tpext.nn, cell)(3, 9, 2, bidirectional=True, rule=rule, dtype=torch.float64).to(device)
        input = torch.randn(5, 4, 3).double().to(device).requires_grad_()
        output, final = layers(input, lengths=torch.tensor([5, 0, 2, 4], device=device))
        states = final if isinstance(final, tuple) else (final,)
        (output.square().sum() + sum(state.sin().sum() for state in states)).backward()
        return [t.detach().cpu() for t in (output, *states, input.grad, *(p.grad for p in layers.parameters()))]

    found = network()
    monkeypatch.setattr(module, "layer_on_cuda", lambda call, outputs: gated_layer_composite(*call))
    monkeypatch.setattr(module, "backward_on_cuda", gated_backward_composite)
    for a, b in zip(found, network(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# The entries.


def test_the_entries_are_for_cuda() -> None:
    case = as_tensors(gated("gru"), torch.float32)
    S, T, B, H = case.grad_states.shape
    states, x_proj = torch.zeros(S, T, B, H), torch.zeros(S, T, B, 3 * H)
    with pytest.raises(ValueError, match=r"gated_projected_scan: states must be on a CUDA device"):
        _C.gated_projected_scan(
            *map(_library.dense, (x_proj, None, case.h0, None, case.weight_hh, None)),
            [False] * S,
            "gru",
            *map(_library.dense, (states, case.h0.clone(), None, None)),
            1,
        )
    if not tpext.build_info()["cuda_architectures"]:
        with pytest.raises(RuntimeError, match="built without CUDA kernels"):
            _C.gated_plan("gru", "forward", "float32", 1, 1, 1, 0, "auto")


# What a GPU alone can show.


@gpu
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_cuda_graph_of_a_training_step(cell: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the device, and a replay has the bits of a call."""
    monkeypatch.setenv("TPEXT_CUDA_REGIME", regime)
    layers = getattr(tpext.nn, cell)(3, 60, 2, bidirectional=True, rule=RegularizedInverse(credit="local")).cuda()
    lengths, input = torch.tensor([9, 0, 3, 5, 1], device="cuda"), torch.randn(9, 5, 3, device="cuda")

    def step() -> list[Tensor]:
        for parameter in layers.parameters():
            parameter.grad = None
        output, _ = layers(input, lengths=lengths)
        output.square().mean().backward()
        return [output.detach(), *(parameter.grad for parameter in layers.parameters())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    input.copy_(torch.randn_like(input))
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    assert_same_bits(replayed, step())


@gpu
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_autocast_runs_in_its_dtype(cell: str, dtype: torch.dtype) -> None:
    layers = getattr(tpext.nn, cell)(3, 64, bidirectional=True, rule=Backprop()).cuda()
    with torch.autocast("cuda", dtype=dtype):
        output, _ = layers(torch.randn(9, 5, 3, device="cuda"))
    assert output.dtype == dtype
    output.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layers.parameters())
