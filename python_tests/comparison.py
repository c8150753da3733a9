"""Inputs for the ops, and the comparison of what they give with their oracles."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64]
NONLINEARITIES = ["tanh", "relu", "identity"]
SIZES: dict[str, list[Any]] = {
    "T": [1, 2, 7, 33],
    "B": [1, 3, 17],
    "H": [1, 2, 31, 32, 33, 64, 100, 257],
    "S": [1, 2, 5],
}
LAYOUTS: dict[str, list[Any]] = {
    "dtype": DTYPES,
    "nonlinearity": NONLINEARITIES,
    "ragged": [False, True],
    "direction": ["forward", "reverse", "mixed"],
    "threads": [1, 2],
    "contiguous": [True, False],
}


def pairwise(**axes: list[Any]) -> list[dict[str, Any]]:
    """Cases in which any two values of two axes meet at least once: far fewer, and smaller, than the whole product."""
    chance = random.Random(0)
    pairs = itertools.combinations(axes, 2)
    missing = {(a, x, b, y) for a, b in pairs for x in map(repr, axes[a]) for y in map(repr, axes[b])}

    def covered(case: dict[str, Any]) -> set[tuple[str, str, str, str]]:
        return {(a, repr(case[a]), b, repr(case[b])) for a, b in itertools.combinations(axes, 2)} & missing

    def size(case: dict[str, Any]) -> int:
        return math.prod(value for value in case.values() if type(value) is int)

    cases = []
    while missing:
        a, x, b, y = min(missing)
        wanted = {a: x, b: y}
        candidates = [
            {
                axis: chance.choice([v for v in values if repr(v) == wanted.get(axis, repr(v))])
                for axis, values in axes.items()
            }
            for _ in range(30)
        ]
        best = max(candidates, key=lambda case: (len(covered(case)), -size(case)))
        missing -= covered(best)
        cases.append(best)
    return cases


def name(case: dict[str, Any]) -> str:
    """A readable test id: ``T=7-B=3-...``."""
    return "-".join(f"{axis}={value}".replace("torch.", "") for axis, value in case.items())


class Scan(NamedTuple):
    """One random input of every scan. Time steps past a row's length hold NaN wherever ops must ignore them."""

    x_proj: Tensor
    h0: Tensor
    weight_hh: Tensor
    states: Tensor
    grad_states: Tensor
    lengths: Tensor | None
    reverse: list[bool]
    nonlinearity: str


def scan(
    T: int,
    B: int,
    H: int,
    S: int,
    dtype: torch.dtype = torch.float64,
    nonlinearity: str = "tanh",
    ragged: bool = False,
    direction: str = "forward",
    contiguous: bool = True,
    last_step_only: bool = False,
    seed: int = 0,
) -> Scan:
    """Random inputs of these sizes.

    ``ragged`` gives lengths, 0 and T among them when B allows. The states are drawn by themselves, within the range of
    the nonlinearity and, for tanh, clear of its edges: the backward passes must be right for any. ``last_step_only``
    leaves a gradient at the last step of each run alone, as a loss on the final state does.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    lengths = None
    if ragged:
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        lengths[:2] = torch.tensor([T, 0])[:B]
    reverse = [{"forward": False, "reverse": True, "mixed": s % 2 == 1}[direction] for s in range(S)]
    time = torch.arange(T)[:, None]
    valid = torch.ones(T, B, dtype=torch.bool) if lengths is None else time < lengths
    padded = ~valid[None, :, :, None].expand(S, T, B, H)
    x_proj, grad_states = normal(S, T, B, H), normal(S, T, B, H)
    if last_step_only:
        final = torch.stack([time == (0 * valid.sum(0) if r else valid.sum(0) - 1) for r in reverse])
        grad_states = grad_states * final[..., None]
    states = {"tanh": torch.tanh, "relu": torch.relu, "identity": torch.clone}[nonlinearity](normal(S, T, B, H))
    states = states.clamp(-0.95, 0.95) if nonlinearity == "tanh" else states
    tensors = [
        x_proj.masked_fill(padded, torch.nan),
        normal(S, B, H),
        normal(S, H, H) / max(H, 1) ** 0.5,
        states.masked_fill(padded, 0),
        grad_states.masked_fill(padded, torch.nan),
    ]
    tensors = [tensor.to(dtype) for tensor in tensors]
    if not contiguous:
        tensors = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in tensors]
    return Scan(*tensors, lengths, reverse, nonlinearity)


def assert_close_to_oracle(
    op: Callable[..., Any], oracle: Callable[..., Any], arguments: Sequence[Any], *, oracle_error: float = 0.0
) -> None:
    """Assert that ``op`` gives what ``oracle`` gives for the same arguments, up to derived rounding.

    The oracle runs in longdouble on the same numbers. Allowed is, for each vector along the last axis of each output::

        4 * eps * sqrt(H + T) * growth

    The growth is measured: the greatest size of the vector, plus its change divided by ``eps`` when every element of
    every input is off by ``eps``, at worst of four tries. Rounding errors inside a scan act like such errors, except
    that those of a sum over H terms, and of T steps, add up; at random, hence the root. The bound is relative to each
    vector, so a displacement that has decayed by many orders is held to the same accuracy as a large one. A plain NumPy
    composite in the op's own type stays below 0.8 instead of 4 over the grid, where nothing cancels. ``oracle_error``,
    absolute, is added where something cancels in the oracle itself.
    """
    dtype = next(argument.dtype for argument in arguments if isinstance(argument, Tensor))
    eps = torch.finfo(dtype).eps
    chance = np.random.default_rng(0)

    def widened(argument: Any, error: float) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        array = argument.numpy()
        if not argument.is_floating_point():
            return array
        return array.astype(np.longdouble) * (1 + error * chance.choice([-1, 1], array.shape))

    def outputs(result: Any) -> list[Any]:
        return list(result) if isinstance(result, tuple) else [result]

    actual = outputs(op(*arguments))
    expected = outputs(oracle(*(widened(argument, 0) for argument in arguments)))
    disturbed = [outputs(oracle(*(widened(argument, eps) for argument in arguments))) for _ in range(4)]
    steps = max(argument.shape[1] for argument in arguments if isinstance(argument, Tensor) and argument.dim() == 4)
    width = max(argument.shape[-1] for argument in arguments if isinstance(argument, Tensor) and argument.dim() == 4)
    for index, (got, want, *others) in enumerate(zip(actual, expected, *disturbed, strict=True)):
        if want is None:
            assert got.shape == (0,), f"output {index} was not asked for and must be empty, got {list(got.shape)}"
            continue
        assert got.shape == want.shape, f"output {index}: got {list(got.shape)}, expected {list(want.shape)}"
        assert got.dtype == dtype, f"output {index}: got {got.dtype}, expected {dtype}"
        if want.size == 0:
            continue
        change = np.max([np.abs(other - want) for other in others], axis=0)
        growth = np.max(np.abs(want) + change / eps, axis=-1, keepdims=True)
        allowed = 4 * eps * np.sqrt(steps + width) * growth + width * torch.finfo(dtype).tiny + oracle_error
        error = np.abs(got.numpy().astype(np.longdouble) - want)
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error / allowed)), error.shape)
        assert error[worst] <= allowed_at(allowed, worst), (
            f"output {index} at {[int(i) for i in worst]}: got {got[worst].item()!r}, expected {float(want[worst])!r}, "
            f"allowed error {float(allowed_at(allowed, worst))!r}"
        )


def allowed_at(allowed: np.ndarray, index: tuple[Any, ...]) -> Any:
    """The bound of the vector that holds the element at ``index``."""
    return allowed[(*index[:-1], 0)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"output {index} differs by up to {(a - b).abs().max().item()!r}"


def batch_rows(inputs: Scan, rows: slice) -> Scan:
    """The same input for some rows of the batch."""
    return inputs._replace(
        x_proj=inputs.x_proj[:, :, rows],
        h0=inputs.h0[:, rows],
        states=inputs.states[:, :, rows],
        grad_states=inputs.grad_states[:, :, rows],
        lengths=None if inputs.lengths is None else inputs.lengths[rows],
    )


class SameBits:
    """Tests for each family of scans: outputs are the same to the bit, however the work is cut.

    A subclass gives ``run``: all outputs for an input, each as ``[S, T, B, ...]`` or, without time, ``[S, 1, B, ...]``.
    """

    @staticmethod
    def run(inputs: Scan) -> list[Tensor]:
        raise NotImplementedError

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("H", [33, 100])
    def test_thread_count_and_repetition(self, dtype: torch.dtype, H: int) -> None:
        inputs = scan(17, 37, H, 2, dtype, ragged=True, direction="mixed")
        torch.set_num_threads(1)
        expected = self.run(inputs)
        assert_same_bits(self.run(inputs), expected)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(self.run(inputs), expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("split", [1, 5, 6, 16])
    def test_batch_split(self, dtype: torch.dtype, split: int) -> None:
        inputs = scan(7, 17, 33, 2, dtype, ragged=True, direction="mixed")
        parts = [self.run(batch_rows(inputs, rows)) for rows in (slice(0, split), slice(split, None))]
        assert_same_bits([torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)], self.run(inputs))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_stack_and_its_members_alone(self, dtype: torch.dtype) -> None:
        inputs = scan(7, 9, 31, 5, dtype, ragged=True, direction="mixed")
        tensors, (lengths, reverse, nonlinearity) = inputs[:5], inputs[5:]
        parts = [
            self.run(Scan(*(tensor[s : s + 1] for tensor in tensors), lengths, [reverse[s]], nonlinearity))
            for s in range(5)
        ]
        assert_same_bits([torch.cat(members) for members in zip(*parts, strict=True)], self.run(inputs))

    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_padded_row_and_its_unpadded_run(self, direction: str) -> None:
        T = 7
        inputs = scan(T, 9, 33, 2, ragged=True, direction=direction)
        padded = self.run(inputs)
        for b, length in enumerate(inputs.lengths.tolist()):
            row = batch_rows(inputs, slice(b, b + 1))
            alone = row._replace(
                x_proj=row.x_proj[:, :length],
                states=row.states[:, :length],
                grad_states=row.grad_states[:, :length],
                lengths=None,
            )
            valid = [output[:, : length if output.shape[1] == T else 1, b : b + 1] for output in padded]
            assert_same_bits(valid, self.run(alone))
            assert not any(output[:, length:, b].any() for output in padded if output.shape[1] == T)

    def test_reverse_and_a_flipped_run(self) -> None:
        inputs = scan(7, 9, 33, 2, direction="reverse")
        flipped = inputs._replace(
            x_proj=inputs.x_proj.flip(1),
            states=inputs.states.flip(1),
            grad_states=inputs.grad_states.flip(1),
            reverse=[False, False],
        )
        assert_same_bits(self.run(inputs), [output.flip(1) for output in self.run(flipped)])
