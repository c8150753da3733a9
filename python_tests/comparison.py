"""Inputs for the ops, and the comparison of what they give with their oracles."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tpext.ops import _library

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
    grad_states: Tensor | None
    at_end: Tensor | None
    credit_at_end: Tensor | None
    input: Tensor
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
    enters: str = "states",
    last_step_only: bool = False,
    I: int = 5,  # noqa: E741
    own_inputs: bool = False,
    seed: int = 0,
) -> Scan:
    """Random inputs of these sizes.

    ``ragged`` gives lengths, 0 and T among them when B allows. The states are drawn by themselves, within the range of
    the nonlinearity and, for tanh, clear of its edges: the backward passes must be right for any. ``enters`` says where
    a backward pass gets its gradients: at the "states", at the "end" of each run (``at_end`` and ``credit_at_end``
    ``[S, B, H]``, and no ``grad_states``), or at "both". ``last_step_only`` leaves a gradient at the last step of each
    run alone, as a loss on the final state does. ``own_inputs`` gives each member an input of its own.
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
        None if enters == "end" else grad_states.masked_fill(padded, torch.nan),
        None if enters == "states" else normal(S, B, H),
        None if enters == "states" else normal(S, B, H),
        normal(S if own_inputs else 1, T, B, I).masked_fill(~valid[..., None], torch.nan),
    ]
    if not contiguous:
        tensors = [None if t is None else t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    return Scan(*(None if t is None else t.to(dtype) for t in tensors), lengths, reverse, nonlinearity)


class Layer(NamedTuple):
    """One random input of a whole layer; the input holds NaN past a row's length."""

    input: Tensor
    h0: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    lengths: Tensor | None
    reverse: list[bool]
    nonlinearity: str


# How the memory of an input [S or 1, T, B, I] is laid out; "one row" repeats it along the batch with stride 0.
MEMORY = ["time first", "batch first", "features first", "wide rows", "one row"]


def layer(
    T: int,
    B: int,
    I: int,  # noqa: E741
    H: int,
    S: int,
    bias: bool = True,
    memory: str = "time first",
    seed: int = 0,
    **options: Any,
) -> Layer:
    """Random inputs of a layer, of these sizes; ``options`` are those of ``scan``."""
    inputs = scan(T, B, H, S, I=I, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(inputs.h0.dtype)

    input = inputs.input
    if memory == "batch first":
        input = input.transpose(1, 2).contiguous().transpose(1, 2)
    elif memory == "features first":
        input = input.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif memory == "wide rows":
        N = input.shape[0]
        input = torch.cat([normal(N, T, B, 2), input, normal(N, T, B, 3)], dim=3)[..., 2 : 2 + I]
    elif memory == "one row":
        input = normal(input.shape[0], T, 1, I).expand(-1, T, B, I)
    weight_ih, b = normal(S, H, I) / max(I, 1) ** 0.5, normal(S, H) / 2 if bias else None
    return Layer(input, inputs.h0, weight_ih, inputs.weight_hh, b, *inputs[-3:])


def assert_close_to_oracle(
    op: Callable[..., Any],
    oracle: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    terms: int | None = None,
    oracle_error: float = 0.0,
) -> None:
    """Assert that ``op`` gives what ``oracle`` gives for the same arguments, up to derived rounding.

    The oracle runs in longdouble on the same numbers. Allowed is, for each vector along the last axis of each output::

        4 * eps * sqrt(terms) * growth,   terms = H + T unless given

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
    if terms is None:
        terms = max(a.shape[1] + a.shape[3] for a in arguments if isinstance(a, Tensor) and a.dim() == 4)
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
        allowed = 4 * eps * np.sqrt(terms) * growth + terms * torch.finfo(dtype).tiny + oracle_error
        error = np.abs(got.numpy().astype(np.longdouble) - want)
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error / allowed)), error.shape)
        assert error[worst] <= allowed_at(allowed, worst), (
            f"output {index} at {[int(i) for i in worst]}: got {got[worst].item()!r}, expected {float(want[worst])!r}, "
            f"allowed error {float(allowed_at(allowed, worst))!r}"
        )


def allowed_at(allowed: np.ndarray, index: tuple[Any, ...]) -> Any:
    """The bound of the vector that holds the element at ``index``."""
    return allowed[(*index[:-1], 0)]


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same numbers; NaN where there is NaN."""
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, f"output {index}: got {list(a.shape)}, expected {list(b.shape)}"
        same = (a == b) | (a.isnan() & b.isnan())
        assert same.all(), f"output {index} differs at {same.logical_not().nonzero()[0].tolist()}"


def select(inputs: Scan, steps: slice = slice(None), rows: slice = slice(None)) -> Scan:
    """The same input for some steps and some rows of the batch."""

    index = {
        **dict.fromkeys(("x_proj", "states", "grad_states"), (slice(None), steps, rows)),
        **dict.fromkeys(("h0", "at_end", "credit_at_end"), (slice(None), rows)),
        "input": (slice(None), steps, rows),
        "lengths": (rows,),
    }
    tensors = {key: getattr(inputs, key) for key in index}
    return inputs._replace(**{key: None if t is None else t[index[key]] for key, t in tensors.items()})


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
        inputs = scan(17, 37, H, 2, dtype, ragged=True, direction="mixed", enters="both")
        torch.set_num_threads(1)
        expected = self.run(inputs)
        assert_same_bits(self.run(inputs), expected)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(self.run(inputs), expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("B", "H", "threads", "direction"),
        [
            (1, 256, 2, "forward"),
            (1, 265, 3, "reverse"),
            (1, 300, 4, "forward"),
            (2, 281, 4, "reverse"),
            (3, 256, 4, "forward"),
        ],
    )
    def test_threads_that_share_a_row(self, dtype: torch.dtype, B: int, H: int, threads: int, direction: str) -> None:
        """With fewer rows than threads each computes some columns of a row, and meets the others at every step."""
        inputs = scan(19, B, H, 1, dtype, ragged=B == 2, direction=direction, enters="end")
        torch.set_num_threads(1)
        expected = self.run(inputs)
        torch.set_num_threads(threads)
        assert_same_bits(self.run(inputs), expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_by_a_team_and_rows_by_one_thread(self, dtype: torch.dtype) -> None:
        inputs = scan(19, 3, 257, 1, dtype, enters="both")
        expected = self.run(inputs)
        torch.set_num_threads(3)
        parts = [self.run(select(inputs, rows=rows)) for rows in (slice(1), slice(1, 3))]
        assert_same_bits([torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)], expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("split", [1, 5, 6, 16])
    @pytest.mark.parametrize("enters", ["both", "end"])
    def test_batch_split(self, dtype: torch.dtype, split: int, enters: str) -> None:
        inputs = scan(7, 17, 33, 2, dtype, ragged=True, direction="mixed", enters=enters)
        parts = [self.run(select(inputs, rows=rows)) for rows in (slice(0, split), slice(split, None))]
        assert_same_bits([torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)], self.run(inputs))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_stack_and_its_members_alone(self, dtype: torch.dtype) -> None:
        inputs = scan(7, 9, 31, 5, dtype, ragged=True, direction="mixed", enters="both")
        shared = ("input", "lengths", "nonlinearity")
        members = [
            inputs._replace(**{key: value[s : s + 1] for key, value in inputs._asdict().items() if key not in shared})
            for s in range(5)
        ]
        parts = [self.run(member) for member in members]
        assert_same_bits([torch.cat(members) for members in zip(*parts, strict=True)], self.run(inputs))

    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_padded_row_and_its_unpadded_run(self, direction: str) -> None:
        T = 7
        inputs = scan(T, 9, 33, 2, ragged=True, direction=direction, enters="both")
        padded = self.run(inputs)
        for b, length in enumerate(inputs.lengths.tolist()):
            alone = select(inputs, slice(length), slice(b, b + 1))._replace(lengths=None)
            valid = [output[:, : length if output.shape[1] == T else 1, b : b + 1] for output in padded]
            assert_same_bits(valid, self.run(alone))
            assert not any(output[:, length:, b].any() for output in padded if output.shape[1] == T)

    def test_reverse_and_a_flipped_run(self) -> None:
        inputs = scan(7, 9, 33, 2, direction="reverse", enters="both")
        flipped = inputs._replace(
            x_proj=inputs.x_proj.flip(1),
            states=inputs.states.flip(1),
            grad_states=inputs.grad_states.flip(1),
            input=inputs.input.flip(1),
            reverse=[False, False],
        )
        assert_same_bits(self.run(inputs), [output.flip(1) for output in self.run(flipped)])


def pieces(inputs: Scan, cut: int) -> list[Scan]:
    """The steps before and from ``cut`` on as inputs of their own, the one where each run ends first.

    All members must run in one direction. What reaches the second piece at its end is what the first one finds.
    """
    T, reverse = inputs.states.shape[1], inputs.reverse[0]
    early, late = select(inputs, slice(cut)), select(inputs, slice(cut, T))
    if inputs.lengths is not None:
        early, late = (
            early._replace(lengths=inputs.lengths.clamp(max=cut)),
            late._replace(lengths=(inputs.lengths - cut).clamp(min=0)),
        )
    if not reverse:
        return [late._replace(h0=inputs.states[:, cut - 1]), early]
    start = inputs.states[:, cut]
    if inputs.lengths is not None:
        start = torch.where((inputs.lengths > cut)[:, None], start, inputs.h0)
    return [early._replace(h0=start), late]


# Low precision, and devices.


def moved(value: Any, device: torch.device) -> Any:
    """The same with every tensor on ``device``; tuples by element."""
    if isinstance(value, tuple):
        values = [moved(element, device) for element in value]
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
    return value.to(device) if isinstance(value, Tensor) else value


def run_on(device: torch.device, op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` as a function of tensors on the CPU, which runs on ``device``."""
    return lambda *arguments: moved(op(*moved(arguments, device)), torch.device("cpu"))


def is_possible(regime: str, plan: Callable[[], tuple[str, int, float]], *, empty: bool = False) -> bool:
    """Whether the device can run a sweep so, as ``plan`` says, once TPEXT_CUDA_REGIME demands it.

    ``empty``: nothing is to be done, so that any other regime serves too.
    """
    if regime in ("auto", "step"):
        return True
    on_gpu = _library.on_cuda(torch.empty(0)) is False
    if on_gpu and regime == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need sm_90")
    try:
        planned = plan()
    except ValueError as error:
        assert regime in str(error)  # noqa: PT017
        return False
    assert planned[0] == regime or empty
    return True


def assert_no_worse(
    actual: Sequence[Tensor], peer: Sequence[Tensor], exact: Sequence[Any], dtype: torch.dtype, times: float = 2
) -> None:
    """Assert that the error of each output is at most so many ``times`` the peer's, and one rounding to ``dtype``.

    The error of an element is relative to the greatest exact value in its vector along the last axis. Compared is the
    root mean square over an output, and, at twice as many times, the greatest: which of two like computations has the
    unluckier element is chance.
    """

    def errors(found: Tensor, want: np.ndarray) -> tuple[float, float]:
        scale = np.abs(want).max(axis=-1, keepdims=True, initial=0)
        relative = (found.double().numpy() - want) / np.where(scale == 0, 1, scale)
        return float(np.sqrt(np.mean(relative**2))), float(np.abs(relative).max())

    for index, (a, b, want) in enumerate(zip(actual, peer, exact, strict=True)):
        if want is None or want.size == 0:
            continue
        assert a.dtype == dtype, f"output {index}: got {a.dtype}, expected {dtype}"
        assert a.shape == want.shape, f"output {index}: got {list(a.shape)}, expected {list(want.shape)}"
        for found, others, factor in zip(errors(a, want), errors(b, want), (times, 2 * times), strict=True):
            if np.isnan(others):
                continue  # the composite's own numbers overflow
            allowed = factor * others + torch.finfo(dtype).eps
            assert found <= allowed, f"output {index}: error {found:.3g}, allowed {allowed:.3g}"


def as_exact(oracle: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    """What a float64 oracle gives for the very numbers of these arguments, as a list."""
    arrays = [
        argument.double().numpy()
        if isinstance(argument, Tensor) and argument.is_floating_point()
        else argument.numpy()
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    ]
    result = oracle(*arrays)
    return list(result) if isinstance(result, tuple) else [result]


class Composite:
    """The scans as loops over time of torch's operations in the dtype of the arguments: what anyone would write.

    Each method takes an op's arguments and gives its outputs; those not asked for are left out of consideration by
    ``assert_no_worse``.
    """

    @staticmethod
    def times(
        shape: Sequence[int], lengths: Tensor | None, reverse: Sequence[bool], from_the_end: bool
    ) -> Iterator[tuple[int, Iterator[tuple[int, Tensor]]]]:
        """Each member with its steps in order, and with each step the rows ``[B, 1]`` that have it."""
        S, T, B = shape[:3]
        valid = torch.ones(T, B, dtype=torch.bool) if lengths is None else torch.arange(T)[:, None] < lengths
        for s in range(S):
            order = range(T) if reverse[s] == from_the_end else reversed(range(T))
            yield s, ((t, valid[t][:, None]) for t in order)

    @staticmethod
    def slope(h: Tensor, nonlinearity: str) -> Tensor:
        return {"tanh": 1 - h * h, "relu": (h > 0).to(h.dtype), "identity": torch.ones_like(h)}[nonlinearity]

    @classmethod
    def scan(
        cls,
        x_proj: Tensor,
        h0: Tensor,
        weight_hh: Tensor,
        lengths: Tensor | None,
        reverse: list[bool],
        nonlinearity: str,
    ) -> list[Tensor]:
        activate = {"tanh": torch.tanh, "relu": torch.relu, "identity": torch.clone}[nonlinearity]
        states = torch.zeros_like(x_proj)
        for s, steps in cls.times(x_proj.shape, lengths, reverse, from_the_end=False):
            h = h0[s]
            for t, on in steps:
                new = activate(x_proj[s, t] + h @ weight_hh[s].mT)
                h, states[s, t] = torch.where(on, new, h), torch.where(on, new, 0)
        return [states]

    @classmethod
    def scan_backward(
        cls,
        grad_states: Tensor | None,
        states: Tensor,
        weight_hh: Tensor,
        lengths: Tensor | None,
        reverse: list[bool],
        nonlinearity: str,
        grad_h_n: Tensor | None,
    ) -> list[Tensor]:
        g = torch.zeros_like(states) if grad_states is None else grad_states
        delta, grad_h0 = torch.zeros_like(states), torch.zeros_like(states[:, 0])
        for s, steps in cls.times(states.shape, lengths, reverse, from_the_end=True):
            m = grad_h0[s] if grad_h_n is None else grad_h_n[s]
            for t, on in steps:
                e = (g[s, t] + m) * cls.slope(states[s, t], nonlinearity)
                m, delta[s, t] = torch.where(on, e @ weight_hh[s], m), torch.where(on, e, 0)
            grad_h0[s] = m
        return [delta, grad_h0]

    @classmethod
    def target_scan(
        cls,
        grad_states: Tensor | None,
        states: Tensor,
        h0: Tensor,
        weight_hh: Tensor,
        inverse: Tensor,
        x_proj: Tensor | None,
        lengths: Tensor | None,
        reverse: list[bool],
        nonlinearity: str,
        correction: str,
        credit: str,
        target_step: float,
        margin: float,
        return_norms: bool,
        return_displacement: bool,
        disp_n: Tensor | None,
        credit_n: Tensor | None,
        slope: str,
        slope_reg: float,
    ) -> list[Tensor]:
        def invert(v: Tensor) -> Tensor:
            if nonlinearity == "tanh":
                return torch.atanh(v.clamp(margin - 1, 1 - margin))
            return torch.relu(v) if nonlinearity == "relu" else v

        def pull(s: int, t: int, h: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
            if correction == "linearized":
                kept = h.clamp(margin - 1, 1 - margin) if nonlinearity == "tanh" and slope == "inverse" else h
                derivative = cls.slope(kept, nonlinearity)
                by = {"derivative": derivative, "one": torch.ones_like(h)}.get(slope)
                if by is None:
                    by = torch.where(derivative == 0, 0, derivative / (derivative.square() + slope_reg))
                z = d * by
            else:
                z = invert(h + d) - invert(h)
            if correction != "none":
                return z @ inverse[s].mT, z
            assert x_proj is not None
            return (invert(h + d) - x_proj[s, t]) @ inverse[s].mT - before[s, t], z

        before = cls.states_before(states, h0, lengths, reverse)
        return cls.sweep(
            pull, grad_states, states, weight_hh, lengths, reverse, nonlinearity, credit, target_step, disp_n, credit_n
        )

    @classmethod
    def learned_target_scan(
        cls,
        grad_states: Tensor | None,
        states: Tensor,
        weight_hh: Tensor,
        reverse_weight: Tensor,
        reverse_pre: Tensor,
        lengths: Tensor | None,
        reverse: list[bool],
        nonlinearity: str,
        credit: str,
        target_step: float,
        return_norms: bool,
        disp_n: Tensor | None,
        credit_n: Tensor | None,
    ) -> list[Tensor]:
        def pull(s: int, t: int, h: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
            q = reverse_pre[s, t]
            return torch.tanh(q + d @ reverse_weight[s].mT) - torch.tanh(q), d

        delta, disp_h0, norms, _, credit_h0 = cls.sweep(
            pull, grad_states, states, weight_hh, lengths, reverse, nonlinearity, credit, target_step, disp_n, credit_n
        )
        return [delta, disp_h0, norms, credit_h0]

    @staticmethod
    def states_before(states: Tensor, h0: Tensor, lengths: Tensor | None, reverse: list[bool]) -> Tensor:
        """The state that each step of each run started from."""
        found = []
        for member, start, backwards in zip(states, h0, reverse, strict=True):
            if not backwards:
                found.append(torch.cat([start[None], member[:-1]]))
                continue
            previous = torch.cat([member[1:], start[None]])
            if lengths is not None:
                starts = torch.arange(len(member))[:, None] == lengths - 1
                previous = torch.where(starts[..., None], start, previous)
            found.append(previous)
        return torch.stack(found)

    @classmethod
    def sweep(
        cls,
        pull: Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor]],
        grad_states: Tensor | None,
        states: Tensor,
        weight_hh: Tensor,
        lengths: Tensor | None,
        reverse: list[bool],
        nonlinearity: str,
        credit: str,
        target_step: float,
        disp_n: Tensor | None,
        credit_n: Tensor | None,
    ) -> list[Tensor]:
        g = torch.zeros_like(states) if grad_states is None else grad_states
        delta, norms, displacement = (
            torch.zeros_like(states),
            torch.zeros_like(states[..., 0]),
            torch.zeros_like(states),
        )
        disp_h0, credit_h0 = torch.zeros_like(states[:, 0]), torch.zeros_like(states[:, 0])
        for s, steps in cls.times(states.shape, lengths, reverse, from_the_end=True):
            arriving = disp_h0[s] if disp_n is None else disp_n[s]
            credited = credit_h0[s] if credit_n is None else credit_n[s]
            for t, on in steps:
                h, d = states[s, t], arriving - target_step * g[s, t]
                passed, z = pull(s, t, h, d)
                e = (credited - d if credit == "through_time" else -d) * cls.slope(h, nonlinearity)
                delta[s, t], displacement[s, t] = torch.where(on, e, 0), torch.where(on, z, 0)
                norms[s, t] = torch.where(on, d, 0).norm(dim=-1)
                arriving = torch.where(on, passed, arriving)
                credited = torch.where(on, e @ weight_hh[s], credited)
            disp_h0[s], credit_h0[s] = arriving, credited
        return [delta, disp_h0, norms, displacement, credit_h0]
