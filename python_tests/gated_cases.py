"""Inputs of a gated layer, as arrays and as tensors, and the oracle's backward pass on them with arguments by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tpext import reference

CELLS = ["gru", "lstm"]
GATES = {"gru": 3, "lstm": 4}
CREDITS = ["local", "through_time"]

# Back-propagation is a rule with the weights for feedback; the others' feedback is a regularised inverse.
BACKPROP = {"inverse": "branch", "gate_slope": "derivative", "candidate_slope": "derivative"}
PUBLISHED = {"inverse": "branch", "gate_slope": "inverse", "candidate_slope": "derivative"}
INVERSES = {
    "published": PUBLISHED,
    "derivative": BACKPROP,
    "damped": {"inverse": "branch", "gate_slope": "inverse", "candidate_slope": "inverse", "slope_reg": 1.0},
    "one": {"inverse": "branch", "gate_slope": "one", "candidate_slope": "one"},
    "cell": {"inverse": "cell", "slope_reg": 0.2},
    "jacobian": {"inverse": "jacobian", "reg": 0.5},
    "chebyshev": {"inverse": "jacobian", "reg": 0.5, "chebyshev_steps": 3},
}


class Gated(NamedTuple):
    """A layer, what it is run on, and what reaches its end from beyond. Padding of input and gradients is NaN."""

    input: np.ndarray
    h0: np.ndarray
    c0: np.ndarray | None
    weight_ih: np.ndarray
    weight_hh: np.ndarray
    bias_ih: np.ndarray | None
    bias_hh: np.ndarray | None
    lengths: np.ndarray | None
    reverse: list[bool]
    cell: str
    grad_states: np.ndarray | None
    disp_h_n: np.ndarray | None
    disp_c_n: np.ndarray | None
    credit_h_n: np.ndarray | None
    credit_c_n: np.ndarray | None

    @property
    def layer(self) -> tuple[Any, ...]:
        """The arguments of the forward pass."""
        return self[:10]


def gated(
    cell: str,
    S: int = 2,
    T: int = 5,
    B: int = 3,
    I: int = 2,  # noqa: E741
    H: int = 4,
    *,
    ragged: bool | list[int] = True,
    reverse: list[bool] | None = None,
    own_inputs: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> Gated:
    """Random numbers of these sizes. ``ragged``: the lengths, or whether any, T and 0 among them when B allows."""
    chance = np.random.default_rng(seed)
    normal, G = chance.standard_normal, GATES[cell]
    lengths = None
    if isinstance(ragged, list):
        lengths = np.array(ragged)
    elif ragged:
        lengths = chance.integers(0, T + 1, B)
        lengths[:2] = [T, 0][:B]
    padded = np.zeros((T, B), bool) if lengths is None else np.arange(T)[:, None] >= lengths
    input, grad_states = normal((S if own_inputs else 1, T, B, I)), normal((S, T, B, H))
    input[:, padded], grad_states[:, padded] = np.nan, np.nan
    states = [normal((S, B, H)) if cell == "lstm" or of_h else None for of_h in (True, False) * 3]
    return Gated(
        input,
        *states[:2],
        normal((S, G * H, I)) / max(I, 1) ** 0.5,
        normal((S, G * H, H)) / max(H, 1) ** 0.5,
        *((normal((S, G * H)) / 2, normal((S, G * H)) / 2) if bias else (None, None)),
        lengths,
        [s % 2 == 1 for s in range(S)] if reverse is None else reverse,
        cell,
        grad_states,
        *states[2:],
    )


# How the memory of an input [S or 1, T, B, I] is laid out; "one row" repeats it along the batch with stride 0.
MEMORY = ["time first", "batch first", "features first", "wide rows", "one row"]


def laid_out(input: Tensor, memory: str) -> Tensor:
    """An input with another memory; the same numbers but for "one row"."""
    if memory == "batch first":
        return input.transpose(1, 2).contiguous().transpose(1, 2)
    if memory == "features first":
        return input.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if memory == "wide rows":
        gap = input.new_full((*input.shape[:3], 2), torch.nan)
        return torch.cat([gap, input, gap], dim=3)[..., 2 : 2 + input.shape[3]]
    return input[:, :, :1].expand(input.shape).nan_to_num() if memory == "one row" else input


def as_tensors(
    case: Gated, dtype: torch.dtype = torch.float64, memory: str = "time first", contiguous: bool = True
) -> Gated:
    """The same as tensors of a dtype; all of them with gaps unless ``contiguous``."""

    def tensor(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype == np.int64:
            return torch.from_numpy(value)
        made = torch.from_numpy(value).to(dtype)
        return made if contiguous else made.mT.contiguous().mT

    tensors = Gated(*map(tensor, case))
    return tensors._replace(input=laid_out(tensors.input, memory))


def feedback_of(weight_hh: np.ndarray, inverse: str, reg: float = 0.5) -> np.ndarray:
    """The feedback matrix of a rule of ``INVERSES``."""
    return reference.gated_feedback(weight_hh, reg, "cell" if inverse == "cell" else "branch")


def backward_arguments(case: Gated, kept: reference.GatedStates, **options: Any) -> dict[str, Any]:
    """The arguments of ``gated_layer_backward`` by name and in order; what is not among ``options`` is a default."""
    plain = {
        "grad_states": case.grad_states,
        "input": case.input,
        "states": kept.states,
        "h0": case.h0,
        "c0": case.c0,
        "kept": kept.kept,
        "weight_hh": case.weight_hh,
        "feedback": case.weight_hh,
        "input_feedback": case.weight_ih,
        "lengths": case.lengths,
        "reverse": case.reverse,
        "cell": case.cell,
        "inverse": "branch",
        "credit": "local",
        "target_step": 1.0,
        "margin": 1e-3,
        "gate_slope": "derivative",
        "candidate_slope": "derivative",
        "slope_reg": 0.0,
        "scale": 1.0,
        "input_scale": 1.0,
        "needs": [True] * 5,
        "disp_h_n": case.disp_h_n,
        "disp_c_n": case.disp_c_n,
        "credit_h_n": case.credit_h_n,
        "credit_c_n": case.credit_c_n,
    }
    assert set(options) <= {*plain, "reg", "chebyshev_steps"}
    return plain | options


def backward(case: Gated, kept: reference.GatedStates | None = None, **options: Any) -> reference.GatedPass:
    """The oracle's backward pass, with back-propagation's settings but for ``options``."""
    kept = reference.gated_scan(*case.layer) if kept is None else kept
    return reference.gated_target_pass(**backward_arguments(case, kept, **options))
