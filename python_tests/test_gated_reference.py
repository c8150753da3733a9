"""The oracle of GRU and LSTM: published numbers, torch's autograd, and identities that its equations must obey."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gated_cases import (
    BACKPROP,
    CELLS,
    CREDITS,
    GATES,
    INVERSES,
    PUBLISHED,
    Gated,
    backward,
    feedback_of,
    gated,
)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tpext import reference
from tpext.reference import gated_inverses
from tpext.reference.gated_scan import sigmoid

DATA = Path(__file__).parent / "data"
EPS = np.finfo(np.float64).eps


def assert_equal(actual: Any, expected: Any, terms: int = 100) -> None:
    """Equal but for the rounding of sums of so many terms, relative to the greatest number of the array."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    error, scale = np.abs(actual - expected).max(initial=0), np.abs(expected).max(initial=0)
    assert error <= 4 * EPS * terms * scale, f"error {error:.3g}, allowed {4 * EPS * terms * scale:.3g}"


def assert_same_pass(actual: reference.GatedPass, expected: reference.GatedPass, terms: int = 100) -> None:
    for field, a, b in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (b is None), field
        if b is not None:
            assert_equal(a, b, terms)


# The published numbers: two programs independent of this one, and of each other, wrote them.

GOLDEN: dict[str, dict[str, Any]] = {
    "bptt": {},
    "published_local": PUBLISHED | {"reg": 1.0, "target_step": 0.1},
    "published_through_time": PUBLISHED | {"reg": 1.0, "target_step": 0.1, "credit": "through_time"},
    "derivative_local": BACKPROP | {"reg": 0.5, "target_step": 0.1},
    "damped_local": INVERSES["damped"] | {"reg": 0.3, "target_step": 0.1},
    "one_local": INVERSES["one"] | {"reg": 2.0, "target_step": 0.05},
    "cell_local": {"inverse": "cell", "slope_reg": 0.2, "reg": 0.5, "target_step": 0.1},
    "jacobian_local": {"inverse": "jacobian", "reg": 0.5, "target_step": 0.1},
}
GOLDEN["branch_local"], GOLDEN["branch_through_time"] = GOLDEN["published_local"], GOLDEN["published_through_time"]
for rule in ("cell", "jacobian"):
    GOLDEN[f"{rule}_through_time"] = GOLDEN[f"{rule}_local"] | {"credit": "through_time"}
FIRST = ["bptt", "published_local", "published_through_time", "derivative_local", "damped_local", "one_local"]
SECOND = ["bptt", *(f"{rule}_{credit}" for rule in ("branch", "cell", "jacobian") for credit in CREDITS)]
FILES = {"small": FIRST, "ragged": FIRST, "second": SECOND, "second_reverse": SECOND}


def published(cell: str, file: str) -> tuple[dict[str, np.ndarray], Gated]:
    """The arrays of a file, and its layer, a stack of one."""
    arrays = dict(np.load(DATA / f"gated_{cell}_{file}.npz"))
    names = ("x", "h0", "c0", "Wi", "Wh", "bi", "bh")
    inputs = [arrays[key][None] if key in arrays else None for key in names]
    run = (arrays["lengths"], [bool(arrays.get("reverse", False))], cell)
    return arrays, Gated(*inputs, *run, arrays["g_out"][None], None, None, None, None)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("cell", CELLS)
def test_states_of_the_golden_files(cell: str, file: str) -> None:
    golden, case = published(cell, file)
    assert {key.split(".")[0] for key in golden if "." in key} == set(FILES[file])
    found = reference.gated_scan(*case.layer)
    for array, name in ((found.states, "out"), (found.h_n, "h_n"), (found.c_n, "c_n")):
        assert (array is None) == (name not in golden)
        if array is not None:
            np.testing.assert_allclose(array[0], golden[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("cell", "file", "rule"), [(cell, file, rule) for cell in CELLS for file, rules in FILES.items() for rule in rules]
)
def test_backward_pass_of_the_golden_files(cell: str, file: str, rule: str) -> None:
    golden, case = published(cell, file)
    options = {"target_step": 1.0, **GOLDEN[rule]}
    step = options["target_step"]
    if rule != "bptt":
        reg = options["reg"] if options["inverse"] == "jacobian" else options.pop("reg")
        options["feedback"] = feedback_of(case.weight_hh, options["inverse"], reg)
    options["disp_h_n"] = -step * golden["g_hn"][None]
    if cell == "lstm":
        options["disp_c_n"] = -step * golden["g_cn"][None]
    found = backward(case, scale=1 / step, input_scale=1 / step, **options)
    arrays = {"x": found.input, "h0": -found.disp_h0 / step, "d_h": found.d_h}
    arrays |= {field: getattr(found, field) for field in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    if cell == "lstm":
        arrays |= {"c0": -found.disp_c0 / step, "d_c": found.d_c}
    expected = {key.split(".")[1]: value for key, value in golden.items() if key.startswith(f"{rule}.")}
    assert set(arrays) == set(expected)
    for name, want in expected.items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(arrays[name][0], want, rtol=0, atol=1e-9 * scale, err_msg=name)


# torch


def torch_layer(case: Gated) -> nn.GRU | nn.LSTM:
    """torch's module of two directions with this case's weights."""
    S, _, I = case.weight_ih.shape  # noqa: E741
    assert S == 2
    module = {"gru": nn.GRU, "lstm": nn.LSTM}[case.cell](
        I, case.h0.shape[-1], bias=case.bias_ih is not None, bidirectional=True, dtype=torch.float64
    )
    for s, suffix in enumerate(("", "_reverse")):
        for field in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if getattr(case, field) is not None:
                getattr(module, f"{field}_l0{suffix}").data.copy_(torch.from_numpy(getattr(case, field)[s]))
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_back_propagation_is_that_of_torch(cell: str, ragged: bool, bias: bool) -> None:
    """Outputs and all gradients, of packed sequences too, both directions at once."""
    T, B, H = 6, 4, 3
    # torch packs no empty row
    case = gated(cell, T=T, B=B, H=H, ragged=[T, 1, 4, 3] if ragged else False, bias=bias)
    lengths = torch.full((B,), T) if case.lengths is None else torch.from_numpy(case.lengths)
    grad_states = torch.from_numpy(case.grad_states).nan_to_num()
    ours = reference.gated_scan(*case.layer)
    found = backward(case, ours, disp_h_n=-case.disp_h_n, disp_c_n=None if cell == "gru" else -case.disp_c_n)

    layer = torch_layer(case)
    input = torch.from_numpy(case.input[0]).nan_to_num().requires_grad_()
    start = [torch.from_numpy(array).requires_grad_() for array in (case.h0, case.c0) if array is not None]
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    output, final = layer(packed, start[0] if cell == "gru" else tuple(start))
    states = pad_packed_sequence(output, total_length=T)[0].unflatten(2, (2, H)).permute(2, 0, 1, 3)
    final = (final,) if cell == "gru" else final
    ends = [torch.from_numpy(array) for array in (case.disp_h_n, case.disp_c_n) if array is not None]
    loss = (states * grad_states).sum()
    (loss + sum((state * g).sum() for state, g in zip(final, ends, strict=True))).backward()

    def gradient(field: str) -> np.ndarray:
        return np.stack([getattr(layer, f"{field}_l0{suffix}").grad.numpy() for suffix in ("", "_reverse")])

    terms = T * (GATES[cell] * H + B)
    assert_equal(ours.states, states.detach().numpy(), terms)
    assert_equal(ours.h_n, final[0].detach().numpy(), terms)
    assert_equal(found.input[0], input.grad.numpy(), terms)
    assert_equal(found.weight_ih, gradient("weight_ih"), terms)
    assert_equal(found.weight_hh, gradient("weight_hh"), terms)
    assert_equal(-found.disp_h0, start[0].grad.numpy(), terms)
    if bias:
        assert_equal(found.bias_ih, gradient("bias_ih"), terms)
        assert_equal(found.bias_hh, gradient("bias_hh"), terms)
    if cell == "lstm":
        assert_equal(ours.c_n, final[1].detach().numpy(), terms)
        assert_equal(-found.disp_c0, start[1].grad.numpy(), terms)


@pytest.mark.parametrize("cell", CELLS)
def test_the_jacobian_is_that_of_autograd(cell: str) -> None:
    """A displacement along each axis gives the rows of the regularised inverse of torch's own Jacobian."""
    H, reg = 5, 0.3
    n = CELLS.index(cell) + 1
    # each row of the batch is the same step, asked to move along one axis
    one = gated(cell, S=1, T=1, B=1, H=H, ragged=False)
    axes = np.eye(n * H).reshape(1, n * H, n, H)
    case = one._replace(
        input=np.repeat(one.input, n * H, 2),
        h0=np.repeat(one.h0, n * H, 1),
        c0=None if n == 1 else np.repeat(one.c0, n * H, 1),
        grad_states=None,
        disp_h_n=axes[:, :, 0],
        disp_c_n=axes[:, :, -1] if n == 2 else None,
    )
    found = backward(case, inverse="jacobian", reg=reg, credit_h_n=None, credit_c_n=None)
    inverse = np.concatenate([found.disp_h0[0], found.disp_c0[0]], 1) if n == 2 else found.disp_h0[0]

    step = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[cell](one.input.shape[-1], H, dtype=torch.float64)
    for field in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(step, field).data.copy_(torch.from_numpy(getattr(one, field)[0]))

    def next_state(state: torch.Tensor) -> torch.Tensor:
        states = state.unflatten(0, (n, H)).unsqueeze(1)
        new = step(torch.from_numpy(one.input[0, 0]), states[0] if n == 1 else tuple(states))
        return new.flatten() if n == 1 else torch.cat(new, 1).flatten()

    start = np.concatenate([array[0, 0] for array in (one.h0, one.c0)[:n]])
    J = torch.autograd.functional.jacobian(next_state, torch.from_numpy(start)).numpy()
    condition = 1 + np.linalg.norm(J, 2) ** 2 / reg
    assert_equal(inverse, np.linalg.solve(J.T @ J + reg * np.eye(n * H), J.T).T, int(n * H * condition))


# Limits


@pytest.mark.parametrize(
    "options", [{"inverse": "jacobian", "reg": 1e14}, {"inverse": "cell", "slope_reg": 1e14}], ids=["jacobian", "cell"]
)
@pytest.mark.parametrize("cell", CELLS)
def test_no_inverse_and_credit_through_time_is_back_propagation(cell: str, options: dict[str, Any]) -> None:
    """As the ridge grows, targets reach no step but their own, and credit alone does all; h0 and c0 get nothing."""
    case = gated(cell)._replace(disp_h_n=None, disp_c_n=None, credit_h_n=None, credit_c_n=None)
    exact = backward(case)
    feedback = feedback_of(case.weight_hh, options["inverse"])
    found = backward(case, credit="through_time", feedback=feedback, **options)
    for actual, expected in zip(found[:5], exact[:5], strict=True):
        # what is left of a displacement is at most |J| / reg < 1e-12 of it
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    for first in (found.disp_h0, found.disp_c0)[: CELLS.index(cell) + 1]:
        assert 0 < np.abs(first).max() < 1e-12 * np.abs(case.grad_states[~np.isnan(case.grad_states)]).max()


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("cell", CELLS)
def test_without_feedback_the_branches_still_hand_down_directly(cell: str, credit: str) -> None:
    """P = 0: d_{t-1} = z d_t - step g in the GRU; in the LSTM c is moved by f D_t, and h by nothing but its g."""
    case = gated(cell, S=1, B=1, ragged=False)
    kept = reference.gated_scan(*case.layer)
    options = PUBLISHED | {"target_step": 0.3, "credit": credit}
    found = backward(case, kept, feedback=0 * case.weight_hh, **options)
    d, d_c = case.disp_h_n[0, 0], None if cell == "gru" else case.disp_c_n[0, 0]
    for t in reversed(range(5)):
        gates = kept.kept[0, t, 0]
        d = d - 0.3 * case.grad_states[0, t, 0]
        assert_equal(found.d_h[0, t, 0], d)
        if cell == "gru":
            d = gates[1] * d
        else:
            assert_equal(found.d_c[0, t, 0], d_c)
            _, f, _, o, c = gates
            d, d_c = np.zeros_like(d), f * (d_c + d * o * (1 - np.tanh(c) ** 2))
    assert_equal(found.disp_h0[0, 0], d)
    if cell == "lstm":
        assert_equal(found.disp_c0[0, 0], d_c)


@pytest.mark.parametrize("cell", CELLS)
def test_a_large_ridge_times_the_jacobian_rule_is_back_propagation(cell: str) -> None:
    """reg (J'J + reg I)^-1 J' tends to J': step by step, each result times reg, h0 and c0 too."""
    T, reg = 5, 1e14
    case = gated(cell, S=1, T=T, ragged=False)
    kept = reference.gated_scan(*case.layer)
    exact = backward(case, kept)
    disp = [case.disp_h_n, case.disp_c_n]
    total: list[Any] = [0.0] * 4
    for t in reversed(range(T)):
        one = slice(t, t + 1)
        step = case._replace(
            grad_states=case.grad_states[:, one],
            input=case.input[:, one],
            h0=kept.states[:, t - 1] if t else case.h0,
            c0=None if cell == "gru" else kept.kept[:, t - 1, :, 4] if t else case.c0,
            disp_h_n=disp[0],
            disp_c_n=disp[1],
        )
        found = backward(step, inverse="jacobian", reg=reg)
        disp = [None if d is None else reg * d for d in (found.disp_h0, found.disp_c0)]
        total = [sum_ + g for sum_, g in zip(total, found[1:5], strict=True)]
        np.testing.assert_allclose(found.input[:, 0], exact.input[:, t], rtol=0, atol=1e-11 * np.abs(exact.input).max())
    for actual, expected in zip([*total, *disp], exact[1:7], strict=True):
        if expected is not None:
            # each step leaves |J'J| / reg < 1e-12
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def simple_cell(**sizes: int) -> Gated:
    """A GRU with r = 1, z = 0 and no weights of these gates: ``h_t = tanh(U_n x_t + W_n h_{t-1} + b)``."""
    case = gated("gru", **sizes)
    H = case.h0.shape[-1]
    weight_hh, bias = case.weight_hh.copy(), case.bias_ih.copy()
    weight_hh[:, : 2 * H] = 0
    weight_ih = case.weight_ih.copy()
    weight_ih[:, : 2 * H] = 0
    bias[:, :H], bias[:, H : 2 * H] = 1000, -1000
    return case._replace(weight_hh=weight_hh, weight_ih=weight_ih, bias_ih=bias)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("inverse", ["branch", "cell", "jacobian"])
def test_a_gru_without_gates_is_the_simple_cell(inverse: str, credit: str) -> None:
    """That with slope "derivative" by "branch", "inverse" by "cell"; its Gauss-Newton inverse by "jacobian"."""
    case = simple_cell()
    H, reg = case.h0.shape[-1], 0.5
    candidate = slice(2 * H, None)
    found = backward(
        case,
        feedback=feedback_of(case.weight_hh, inverse, reg),
        inverse=inverse,
        reg=reg,
        credit=credit,
        target_step=0.2,
        scale=3.0,
        input_scale=2.0,
    )
    W, U = case.weight_hh[:, candidate], case.weight_ih[:, candidate]
    bias = case.bias_ih[:, candidate] + case.bias_hh[:, candidate]
    run = (case.lengths, case.reverse, "tanh")
    states, h_n = reference.rnn_layer(case.input, case.h0, U, W, bias, *run)
    ours = reference.gated_scan(*case.layer)
    assert_equal(ours.states, states)
    assert_equal(ours.h_n, h_n)
    simple = reference.rnn_layer_backward(
        case.grad_states,
        case.input,
        states,
        case.h0,
        W,
        np.swapaxes(reference.regularized_inverse(W, reg), 1, 2),
        U,
        None,
        *run,
        "linearized",
        credit,
        0.2,
        1e-9,  # within it no state lies
        {"branch": "derivative", "cell": "inverse"}.get(inverse, "derivative"),
        0.0,
        3.0,
        2.0,
        False,
        case.disp_h_n,
        case.credit_h_n,
    )
    if inverse == "jacobian":
        expected = gauss_newton(case, states, W, reg, 0.2)
        assert_equal(found.d_h, expected[0], 10_000)
        assert_equal(found.disp_h0, expected[1], 10_000)
        return
    expected = [array[:, candidate] if array.shape[1] == 3 * H else array for array in found[1:5] if array is not None]
    # the inverse's slope amplifies rounding by as much as it does displacements
    terms = 100_000 if inverse == "cell" else 1000
    assert_equal(found.input, simple[0], terms)
    for actual, want in zip(expected, (*simple[1:4], simple[3]), strict=True):
        assert_equal(actual, want, terms)
    assert_equal(found.disp_h0, simple[4], terms)
    if credit == "through_time":
        assert_equal(found.credit_h0, simple[5], terms)


def gauss_newton(case: Gated, states: np.ndarray, W: np.ndarray, reg: float, step: float) -> tuple[np.ndarray, ...]:
    """Displacements of the simple cell by ``(J'J + reg I)^-1 J' d``, ``J = diag(1 - h^2) W``, and those of h0."""
    d_h, d_0 = np.zeros_like(states), case.disp_h_n.copy()
    for s, b in itertools.product(range(len(states)), range(states.shape[2])):
        times = range(case.lengths[b])
        for t in times if case.reverse[s] else reversed(times):
            d_h[s, t, b] = d_0[s, b] - step * case.grad_states[s, t, b]
            J = (1 - states[s, t, b] ** 2)[:, None] * W[s]
            d_0[s, b] = np.linalg.solve(J.T @ J + reg * np.eye(len(J)), J.T @ d_h[s, t, b])
    return d_h, d_0


@pytest.mark.parametrize("inverse", ["branch", "cell"])
@pytest.mark.parametrize(("cell", "gates"), [("gru", {1: 1000}), ("lstm", {0: -1000, 1: 1000})])
def test_a_state_that_is_carried_hands_its_displacement_down(cell: str, gates: dict[int, float], inverse: str) -> None:
    """Unchanged where z = 1; and where i = 0 and f = 1, in an LSTM without recurrent weights and a target for c."""
    case = gated(cell)._replace(grad_states=None)
    H = case.h0.shape[-1]
    bias = case.bias_ih.copy()
    for gate, value in gates.items():
        bias[:, gate * H : (gate + 1) * H] = value
    case = case._replace(bias_ih=bias)
    if cell == "lstm":
        case = case._replace(weight_hh=0 * case.weight_hh, disp_h_n=None)
    found = backward(case, inverse=inverse, feedback=feedback_of(case.weight_hh, inverse))
    if cell == "gru":
        assert_equal(found.disp_h0, case.disp_h_n)
    else:
        assert_equal(found.disp_c0, case.disp_c_n)


# The inverses of one step


def moves(case: Gated, kept: reference.GatedStates | None = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """``m [B, G, H]`` and ``direct [B, H]`` of a layer of one member and one step, by feedback of single gates."""
    G, H = GATES[case.cell], case.h0.shape[-1]
    found = []
    for gate in range(G + 1):
        feedback = np.zeros((1, G, H, H))
        if gate < G:
            feedback[0, gate] = np.eye(H)
        first = backward(case, kept, feedback=feedback.reshape(1, G * H, H), **options)
        found.append(first.disp_h0[0])
        direct = first.disp_h0[0] if case.cell == "gru" else first.disp_c0[0]
    # the last call had no feedback: what is left is the GRU's direct part
    return np.stack([of_gate - found[G] for of_gate in found[:G]], 1), direct


def new_states(cell: str, u: np.ndarray, x: np.ndarray, h: np.ndarray, c: np.ndarray | None) -> list[np.ndarray]:
    """torch's equations again, for complex numbers."""

    def logistic(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    if cell == "gru":
        r, z = logistic(u[:, 0] + x[:, 0]), logistic(u[:, 1] + x[:, 1])
        return [(1 - z) * np.tanh(x[:, 2] + r * u[:, 2]) + z * h]
    i, f, o = (logistic((u + x)[:, gate]) for gate in (0, 1, 3))
    new = f * c + i * np.tanh((u + x)[:, 2])
    return [o * np.tanh(new), new]


@pytest.mark.parametrize("cell", CELLS)
def test_the_cells_inverse_meets_all_targets(cell: str) -> None:
    """slope_reg = 0: to first order the moves bring both states to their targets, and no others are shorter."""
    case = gated(cell, S=1, T=1, B=6, ragged=False)
    G, H = GATES[cell], case.h0.shape[-1]
    m, direct = moves(case, inverse="cell", slope_reg=0.0)
    x = (case.input[0, 0] @ case.weight_ih[0].T + case.bias_ih[0]).reshape(-1, G, H)
    u = (case.h0[0] @ case.weight_hh[0].T + case.bias_hh[0]).reshape(-1, G, H)
    h, c = case.h0[0], None if cell == "gru" else case.c0[0]

    def change(m: np.ndarray, direct: np.ndarray) -> np.ndarray:
        """Of the new states, to first order: the derivative by a complex step, exact to rounding."""
        tiny = 1e-40j
        moved = (h + tiny * direct, None) if cell == "gru" else (h, c + tiny * direct)
        return np.stack(new_states(cell, u + tiny * m, x, *moved)).imag / 1e-40

    d = [case.disp_h_n[0] - case.grad_states[0, 0], *([] if cell == "gru" else [case.disp_c_n[0]])]
    # a unit's 2 x 2 matrix has a condition up to some 1e4 here
    assert_equal(change(m, direct), np.stack(d), 100_000)
    # moves that change nothing, from any others; the shortest are orthogonal to them
    chance = np.random.default_rng(0)
    all_moves = np.concatenate([m, direct[:, None]], 1)
    other = chance.normal(size=all_moves.shape)
    excess = change(other[:, :G], other[:, G])
    again = case._replace(grad_states=None, disp_h_n=excess[:1], disp_c_n=None if cell == "gru" else excess[1:])
    needed = np.concatenate([part if part.ndim == 3 else part[:, None] for part in moves(again, inverse="cell")], 1)
    useless = other - needed
    overlap = np.sum(useless * all_moves, 1)
    size = np.linalg.norm(useless, axis=1) * np.linalg.norm(all_moves, axis=1)
    assert np.abs(overlap / size).max() < 100_000 * EPS


@pytest.mark.parametrize("cell", CELLS)
def test_a_ridge_of_the_cell_is_that_of_its_least_squares(cell: str) -> None:
    """The moves minimise |A m - d|^2 + slope_reg |m|^2: with A by back-propagation of unit displacements."""
    slope_reg = 0.3
    case = gated(cell, S=1, T=1, B=2, H=3, ragged=False)._replace(grad_states=None)
    m, direct = moves(case, inverse="cell", slope_reg=slope_reg)
    d = [case.disp_h_n[0], *([] if cell == "gru" else [case.disp_c_n[0]])]
    columns = []
    for state in range(len(d)):
        unit = [np.ones((1, 2, 3)) if state == place else np.zeros((1, 2, 3)) for place in range(2)]
        by_gate, by_last = moves(case._replace(disp_h_n=unit[0], disp_c_n=unit[1]))
        columns.append(np.concatenate([by_gate, by_last[:, None]], 1))
    A = np.stack(columns)
    moved = np.concatenate([m, direct[:, None]], 1)
    left = np.einsum("nbkh,bkh->nbh", A, moved) - np.stack(d)
    gradient = np.einsum("nbkh,nbh->bkh", A, left) + slope_reg * moved
    assert np.abs(gradient).max() < 100 * EPS * np.abs(moved).max()


SLOPE_KINDS = ["inverse", "derivative", "one"]


@pytest.mark.parametrize(("gate", "candidate"), list(itertools.product(SLOPE_KINDS, SLOPE_KINDS)))
@pytest.mark.parametrize("cell", CELLS)
def test_slopes_within_margin_and_beyond(cell: str, gate: str, candidate: str) -> None:
    """Each branch at gates well inside and at the very edges, where "inverse" takes the value at the margin."""
    margin, slope_reg = 0.05, 0.1
    edges = np.array([0.0, 1.0, 0.01, 0.97, 0.3])
    tanh = np.array([-1.0, 1.0, 0.96, -0.99, 0.3])
    case = gated(cell, S=1, T=1, B=1, H=5, ragged=False)
    h, a = case.h0[0, 0], np.array([0.4, -2.0, 1.5, 0.7, -0.3])
    c, new = np.array([0.5, -0.4, 2.0, 1.0, -1.2]), np.array([0.2, 30.0, -3.0, 2.0, -0.6])
    rows = [edges, edges[::-1], tanh, a] if cell == "gru" else [edges, edges[::-1], tanh, np.roll(edges, 1), new]
    if cell == "lstm":
        case = case._replace(c0=c[None, None])
    kept = reference.gated_scan(*case.layer)._replace(kept=np.stack(rows)[None, None, None])
    options = {"gate_slope": gate, "candidate_slope": candidate, "margin": margin, "slope_reg": slope_reg}
    m, direct = moves(case, kept, **options)

    def s(value: np.ndarray) -> np.ndarray:
        inside = np.minimum(np.maximum(value, margin), 1 - margin) if gate == "inverse" else value
        slope = inside * (1 - inside)
        return {"inverse": slope / (slope * slope + slope_reg), "derivative": slope, "one": 1 + 0 * slope}[gate]

    def t(value: np.ndarray) -> np.ndarray:
        inside = np.minimum(np.maximum(value, margin - 1), 1 - margin) if candidate == "inverse" else value
        slope = 1 - inside * inside
        return {"inverse": slope / (slope * slope + slope_reg), "derivative": slope, "one": 1 + 0 * slope}[candidate]

    d = case.disp_h_n[0, 0] - case.grad_states[0, 0, 0]
    if cell == "gru":
        r, z, n, a = rows
        expected = [d * (1 - z) * t(n) * a * s(r), d * (h - n) * s(z), d * (1 - z) * t(n) * r]
        passed = z * d
    else:
        i, f, g, o, new = rows
        D = case.disp_c_n[0, 0] + d * o * t(np.tanh(new))
        expected = [D * g * s(i), D * c * s(f), D * i * t(g), d * np.tanh(new) * s(o)]
        passed = f * D
    for found, want in ((m[0], np.stack(expected)), (direct[0], passed)):
        np.testing.assert_allclose(found, want, rtol=0, atol=100 * EPS * np.abs(want).max())


# The jacobian by Chebyshev steps


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 8])
def test_chebyshev_steps_leave_chebyshevs_polynomial(steps: int) -> None:
    """The error is ``T_K((c - a) / r) / T_K(c / r)`` of the solution at ``a``; c, r: centre and radius of the range."""
    reg, bound = 0.7, 7.0
    polynomial = np.polynomial.Chebyshev.basis(steps)
    center, radius = reg + bound / 2, bound / 2
    for square in np.linspace(0.01, bound, 9):
        found = gated_inverses.chebyshev_inverse(np.array([2.0]), np.array([[square**0.5]]), reg, bound, steps)
        exact = 2 * square**0.5 / (square + reg)
        left = polynomial((center - square - reg) / radius) / polynomial(center / radius)
        np.testing.assert_allclose(found, [exact * (1 - left)], rtol=0, atol=100 * EPS * abs(exact))


@pytest.mark.parametrize(("steps", "error"), [(2, 0.31), (4, 0.06), (6, 0.015), (8, 0.003)])
def test_error_of_chebyshev_steps(steps: int, error: float) -> None:
    """The table for reg 1 and |J|^2 = 7, from matrices of another seed: within a half of it, and within the bound."""
    reg, square, H = 1.0, 7.0, 48
    chance = np.random.default_rng(0)
    errors = []
    for _ in range(10):
        J = chance.normal(size=(H, H))
        J *= square**0.5 / np.linalg.norm(J, 2)
        d = chance.normal(size=H)
        exact = gated_inverses.jacobian_inverse(d, J, reg)
        found = gated_inverses.chebyshev_inverse(d, J, reg, square, steps)
        errors.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert max(errors) <= 1 / np.polynomial.Chebyshev.basis(steps)(1 + 2 * reg / square)
    assert error / 1.5 < np.mean(errors) < error * 1.5


@pytest.mark.parametrize("cell", CELLS)
def test_the_bound_of_the_jacobian_holds(cell: str) -> None:
    of_step = {"gru": gated_inverses.gru_derivatives, "lstm": gated_inverses.lstm_derivatives}[cell]
    for seed in range(20):
        case = gated(cell, S=1, T=1, B=1, H=8, ragged=False, seed=seed)
        kept = reference.gated_scan(*case.layer).kept[0, 0, 0]
        derivatives = of_step(kept, case.h0[0, 0] if cell == "gru" else case.c0[0, 0])
        for size in (0.01, 1.0, 10.0):
            weight_hh = size * case.weight_hh[0]
            square = np.linalg.norm(gated_inverses.step_jacobian(derivatives, weight_hh), 2) ** 2
            assert gated_inverses.squared_norm_bound(derivatives, weight_hh) >= square


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_to_be_gained_from_the_bound_of_the_jacobian(cell: str) -> None:
    """It is |J|^2 itself for one unit whose derivatives by its gates are as its weights (and as z in a GRU)."""
    chance = np.random.default_rng(0)
    weight_hh = chance.normal(size=(GATES[cell], 1))
    direction = np.ones(1) if cell == "gru" else chance.normal(size=2)
    by_gate = 0.3 * direction[:, None, None] * weight_hh
    z = np.linalg.norm(by_gate)[None, None] if cell == "gru" else chance.normal(size=(2, 1))
    derivatives = gated_inverses.Derivatives(by_gate, by_gate, z)
    square = np.linalg.norm(gated_inverses.step_jacobian(derivatives, weight_hh), 2) ** 2
    assert gated_inverses.squared_norm_bound(derivatives, weight_hh) == pytest.approx(square, rel=1e-13)


@pytest.mark.parametrize("cell", CELLS)
def test_many_chebyshev_steps_are_the_exact_jacobian(cell: str) -> None:
    case = gated(cell)
    options: dict[str, Any] = {"inverse": "jacobian", "reg": 0.5, "credit": "through_time"}
    exact = backward(case, **options)
    # bounds of |J|^2 stay below 9 here, so that a step divides the error by 1.5 at least
    assert_same_pass(backward(case, chebyshev_steps=100, **options), exact, 1000)
    few = backward(case, chebyshev_steps=3, **options)
    assert np.abs(few.disp_h0 - exact.disp_h0).max() > 1e-3 * np.abs(exact.disp_h0).max()


# What every rule obeys

EVERY_RULE = pytest.mark.parametrize(
    ("cell", "inverse", "credit"), list(itertools.product(CELLS, INVERSES, CREDITS)), ids=str
)


def rule(case: Gated, inverse: str, credit: str, **options: Any) -> dict[str, Any]:
    """The options of one of the rules, with numbers that are no special case."""
    feedback = feedback_of(case.weight_hh, INVERSES[inverse]["inverse"])
    numbers = {"target_step": 0.3, "margin": 0.1, "scale": 0.7, "input_scale": -1.3}
    return numbers | INVERSES[inverse] | {"feedback": feedback, "credit": credit} | options


@EVERY_RULE
def test_linear_in_what_comes_in(cell: str, inverse: str, credit: str) -> None:
    """Gradients scale with the loss; what comes along the states and what comes from beyond just add."""
    case = gated(cell)
    options = rule(case, inverse, credit)
    whole = backward(case, **options)
    beyond = ("disp_h_n", "disp_c_n", "credit_h_n", "credit_c_n")
    along = backward(case._replace(**dict.fromkeys(beyond)), **options)
    doubled = case._replace(
        grad_states=None, **{field: None if (a := getattr(case, field)) is None else 2 * a for field in beyond}
    )
    for all_of_it, one, twice in zip(whole, along, backward(doubled, **options), strict=True):
        if all_of_it is not None:
            assert_equal(one + twice / 2, all_of_it, 1000)


@EVERY_RULE
def test_a_padded_row_is_its_unpadded_run(cell: str, inverse: str, credit: str) -> None:
    case = gated(cell, S=2, T=5, B=4)
    options = rule(case, inverse, credit)
    kept, whole = reference.gated_scan(*case.layer), backward(case, **options)
    parts = []
    for b, length in enumerate(case.lengths):
        row, steps = slice(b, b + 1), slice(length)
        alone = case._replace(
            input=case.input[:, steps, row],
            grad_states=case.grad_states[:, steps, row],
            lengths=None,
            **{
                field: None if (a := getattr(case, field)) is None else a[:, row]
                for field in ("h0", "c0", "disp_h_n", "disp_c_n", "credit_h_n", "credit_c_n")
            },
        )
        parts.append(backward(alone, **options))
        forward = reference.gated_scan(*alone.layer)
        for ours, padded in zip(forward, kept, strict=True):
            if ours is not None:
                beyond = padded[:, length:, row] if padded.ndim > 3 else np.zeros(0)
                np.testing.assert_array_equal(ours, padded[:, steps, row] if padded.ndim > 3 else padded[:, row])
                assert not beyond.any()
        for field in ("input", "disp_h0", "disp_c0", "credit_h0", "credit_c0", "d_h", "d_c"):
            ours, padded = getattr(parts[-1], field), getattr(whole, field)
            if ours is not None:
                beyond = padded[:, length:, row] if padded.ndim > 3 else np.zeros(0)
                np.testing.assert_array_equal(ours, padded[:, steps, row] if padded.ndim > 3 else padded[:, row])
                assert not beyond.any()
    for field in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        assert_equal(sum(getattr(part, field) for part in parts), getattr(whole, field))
    # a row without a step passes on what came from beyond
    (empty,) = np.flatnonzero(case.lengths == 0)[:1]
    np.testing.assert_array_equal(whole.disp_h0[:, empty], case.disp_h_n[:, empty])
    np.testing.assert_array_equal(kept.h_n[:, empty], case.h0[:, empty])
    if credit == "through_time":
        np.testing.assert_array_equal(whole.credit_h0[:, empty], case.credit_h_n[:, empty])
    if cell == "lstm":
        np.testing.assert_array_equal(whole.disp_c0[:, empty], case.disp_c_n[:, empty])
        np.testing.assert_array_equal(kept.c_n[:, empty], case.c0[:, empty])


@EVERY_RULE
def test_a_run_is_its_pieces_and_backwards_a_flipped_one(cell: str, inverse: str, credit: str) -> None:
    """What reaches the beginning of the later steps is what comes from beyond to the earlier ones."""
    T, cut = 5, 2
    case = gated(cell, S=1, T=T, ragged=False)
    options = rule(case, inverse, credit)
    kept, whole = reference.gated_scan(*case.layer), backward(case, **options)

    late = case._replace(
        input=case.input[:, cut:],
        grad_states=case.grad_states[:, cut:],
        h0=kept.states[:, cut - 1],
        c0=None if cell == "gru" else kept.kept[:, cut - 1, :, 4],
    )
    second = backward(late, **options)
    early = case._replace(
        input=case.input[:, :cut],
        grad_states=case.grad_states[:, :cut],
        disp_h_n=second.disp_h0,
        disp_c_n=second.disp_c0,
        credit_h_n=second.credit_h0,
        credit_c_n=second.credit_c0,
    )
    first = backward(early, **options)
    for field in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        assert_equal(getattr(first, field) + getattr(second, field), getattr(whole, field))
    for field in ("input", "d_h", "d_c")[: CELLS.index(cell) + 2]:
        assert_equal(np.concatenate([getattr(first, field), getattr(second, field)], 1), getattr(whole, field))
    for a, b in zip(first[5:9], whole[5:9], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_equal(a, b)

    flipped = case._replace(
        input=case.input[:, ::-1], grad_states=case.grad_states[:, ::-1], reverse=[not case.reverse[0]]
    )
    found = backward(flipped, **options)
    for field in found._fields:
        a, b = getattr(found, field), getattr(whole, field)
        if b is not None:
            assert_equal(a[:, ::-1] if b.ndim == 4 else a, b)


@pytest.mark.parametrize("own_inputs", [False, True])
@EVERY_RULE
def test_members_of_a_stack_are_their_own_runs(cell: str, inverse: str, credit: str, own_inputs: bool) -> None:
    """Each with numbers of its own; a shared input gets the sum of what its members hand down."""
    case = gated(cell, S=3, own_inputs=own_inputs)
    given = rule(case, inverse, credit)
    numbers = ("target_step", "margin", "slope_reg", "scale", "input_scale", "reg")
    ways = [{key: given.get(key, 0.5) * factor for key in numbers} for factor in (1.0, 0.5, 0.25)]
    options = given | {key: [way[key] for way in ways] for key in numbers}
    whole = backward(case, **options)
    parts = []
    for s in range(3):
        member = slice(s, s + 1)
        layered = ("lengths", "reverse", "cell", *([] if own_inputs else ["input"]))
        alone = case._replace(
            reverse=case.reverse[member],
            **{f: a[member] for f, a in case._asdict().items() if f not in layered and a is not None},
        )
        parts.append(backward(alone, **given | ways[s] | {"feedback": given["feedback"][member]}))
    for field in whole._fields:
        if getattr(whole, field) is None:
            continue
        arrays = [getattr(part, field) for part in parts]
        shared = field == "input" and not own_inputs
        assert_equal(getattr(whole, field), sum(arrays) if shared else np.concatenate(arrays))


@pytest.mark.parametrize("cell", CELLS)
def test_only_what_is_needed(cell: str) -> None:
    case = gated(cell)
    whole = backward(case)
    for place in range(5):
        needs = [index == place for index in range(5)]
        found = backward(case, needs=needs, **({} if place == 0 else {"input_feedback": None}))
        assert [array is not None for array in found[:5]] == needs
        np.testing.assert_array_equal(found[place], whole[place])
    assert whole.credit_h0 is None
    assert (whole.disp_c0 is None) == (cell == "gru")


def test_unknown_names() -> None:
    case = gated("gru")
    with pytest.raises(ValueError, match="cell must be 'gru' or 'lstm', got 'rnn'"):
        reference.gated_scan(*case._replace(cell="rnn").layer)
    kept = reference.gated_scan(*case.layer)
    for field, message in {
        "inverse": "inverse must be 'branch', 'cell' or 'jacobian', got 'none'",
        "credit": "credit must be 'local' or 'through_time', got 'none'",
        "gate_slope": "gate_slope must be 'inverse', 'derivative' or 'one', got 'none'",
        "candidate_slope": "slope must be 'inverse', 'derivative' or 'one', got 'none'",
    }.items():
        with pytest.raises(ValueError, match=message):
            backward(case, kept, **{field: "none"})


def test_sigmoid_is_exact_relative_to_itself() -> None:
    x = np.array([-1000.0, -700.0, -30.0, -1.0, 0.0, 1.0, 40.0, 1000.0])
    exact = 1 / (1 + np.exp(-x.astype(np.longdouble)))
    with np.errstate(over="raise"):
        np.testing.assert_allclose(sigmoid(x), exact.astype(np.float64), rtol=4 * EPS)
