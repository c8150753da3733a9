"""GRU and LSTM by torch's operations: the oracle's numbers in both passes, and derivatives of the forward one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from comparison import DTYPES, assert_close_to_oracle, assert_no_worse, name, pairwise
from gated_cases import CELLS, CREDITS, GATES, INVERSES, Gated, backward_arguments, feedback_of, gated
from torch import Tensor

from tpext import reference
from tpext.ops import _gated_backward_composite
from tpext.ops._gated_backward_composite import gated_backward_composite
from tpext.ops._gated_composite import gated_layer_composite
from tpext.ops.gated_layer import _Backward, gated_jacobian_backward

JACOBIAN = [inverse for inverse, options in INVERSES.items() if options["inverse"] == "jacobian"]
DIRECTIONS = {"forward": [False, False], "reverse": [True, True], "mixed": [False, True]}


def tensors(arguments: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """NumPy's arrays as tensors, floating-point ones of this dtype; numbers as lists of one."""

    def converted(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(value)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor
        return [value] if isinstance(value, float) else value

    return [converted(value) for value in arguments]


def oracle(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A reference as a plain tuple, without the displacements of the states."""
    return lambda *arguments: tuple(function(*arguments, **options))[:9]


def rule(case: Gated, inverse: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a rule of ``INVERSES``, and those that only the composite has."""
    options = dict(INVERSES[inverse])
    extra = {key: options.pop(key) for key in ("reg", "chebyshev_steps") if key in options}
    numbers = {"target_step": 0.25, "margin": 0.125, "scale": 0.75, "input_scale": -1.5}
    return numbers | options | {"feedback": feedback_of(case.weight_hh, options["inverse"])}, extra


def backward_composite(*arguments: Any) -> tuple[Tensor, ...]:
    return gated_backward_composite(_Backward(*arguments))


def check_backward(case: Gated, inverse: str, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    """The composite's backward pass is the oracle's for the very same numbers."""
    given, extra = rule(case, inverse)
    arrays = backward_arguments(case, reference.gated_scan(*case.layer), **given | options)
    arguments = tensors(list(arrays.values()), dtype)
    composite = functools.partial(gated_jacobian_backward, **extra) if extra else backward_composite
    _, T, B, H = arrays["states"].shape
    terms = T * B + T * GATES[case.cell] * H
    assert_close_to_oracle(composite, oracle(reference.gated_target_pass, **extra), arguments, terms=terms)


# Forward

FORWARD: dict[str, list[Any]] = {
    "cell": CELLS,
    "T": [1, 2, 7],
    "B": [1, 3, 5],
    "I": [0, 1, 4],
    "H": [1, 2, 9],
    "ragged": [False, True],
    "direction": list(DIRECTIONS),
    "own_inputs": [False, True],
    "bias": [False, True],
    "dtype": DTYPES,
}


@pytest.mark.parametrize("options", pairwise(**FORWARD), ids=name)
def test_states_are_the_oracles(options: dict[str, Any]) -> None:
    dtype, direction = options.pop("dtype"), options.pop("direction")
    case = gated(**options, reverse=DIRECTIONS[direction])
    arguments = tensors(case.layer, dtype)
    terms = options["T"] * GATES[case.cell] * (options["H"] + options["I"])
    keeping = functools.partial(gated_layer_composite, keep=True)
    assert_close_to_oracle(keeping, oracle(reference.gated_scan), arguments, terms=terms)
    *plain, kept = gated_layer_composite(*arguments)
    assert kept.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(plain, keeping(*arguments), strict=False))


def leaves(case: Gated) -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """What can be differentiated of a layer, and the composite as a function of it."""
    arguments = tensors(case.layer, torch.float64)
    places = [place for place, value in enumerate(arguments) if isinstance(value, Tensor) and value.is_floating_point()]

    def layer(*given: Tensor) -> tuple[Tensor, ...]:
        called = list(arguments)
        for place, tensor in zip(places, given, strict=True):
            called[place] = tensor
        states, h_n, c_n, _ = gated_layer_composite(*called)
        return (states, h_n, c_n) if case.cell == "lstm" else (states, h_n)

    # gradcheck compares with finite differences, for which NaN in the padding is none
    return [arguments[place].nan_to_num().requires_grad_() for place in places], layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_derivatives_of_first_and_second_order(cell: str, ragged: bool, bias: bool) -> None:
    inputs, layer = leaves(gated(cell, T=3, B=2, I=2, H=2, ragged=[3, 2] if ragged else False, bias=bias))
    assert torch.autograd.gradcheck(layer, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize("cell", CELLS)
def test_transforms(cell: str) -> None:
    """torch.func: the Jacobian of the last state by h0, in either mode and row by row, is autograd's."""
    inputs, layer = leaves(gated(cell, T=3, ragged=False))
    place = 1

    def last(h0: Tensor) -> Tensor:
        return layer(*inputs[:place], h0, *inputs[place + 1 :])[1]

    expected = torch.autograd.functional.jacobian(last, inputs[place])
    torch.testing.assert_close(torch.func.jacrev(last)(inputs[place]), expected)
    torch.testing.assert_close(torch.func.jacfwd(last)(inputs[place]), expected)
    several = torch.stack([inputs[place], 2 * inputs[place]])
    torch.testing.assert_close(torch.func.vmap(last)(several), torch.stack([last(h0) for h0 in several]))


@pytest.mark.parametrize("cell", CELLS)
def test_what_the_padding_holds_reaches_no_gradient(cell: str) -> None:
    case = gated(cell)
    assert np.isnan(case.input).any()
    arguments = tensors(case.layer, torch.float64)
    wanted = [value.requires_grad_() for value in arguments if isinstance(value, Tensor) and value.is_floating_point()]
    outputs = [output for output in gated_layer_composite(*arguments)[:3] if output.numel()]
    first = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs], create_graph=True)
    second = torch.autograd.grad([g.square().sum() for g in first], wanted)
    assert all(gradient.isfinite().all() for gradient in (*first, *second))


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: str) -> None:
    """In float32, and the outputs in the autocast dtype; float64 stays as it is."""
    case = gated(cell)
    wide = tensors(case.layer, torch.float32)
    mixed = [wide[0].bfloat16(), *wide[1:]]
    expected = gated_layer_composite(mixed[0].float(), *wide[1:], keep=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gated_layer_composite(*mixed, keep=True)
        exact = gated_layer_composite(*tensors(case.layer, torch.float64))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.to(torch.bfloat16))
    assert exact[0].dtype == torch.float64


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_torch(cell: str, dtype: torch.dtype) -> None:
    case = gated(cell, S=1, T=7, B=5, I=3, H=16, ragged=False, reverse=[False])
    arguments = tensors(case.layer, dtype)
    exact = [a.double().numpy() if isinstance(a, Tensor) else a for a in arguments]
    expected = reference.gated_scan(*exact)
    kind = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell]
    peer = kind(3, 16, dtype=dtype)
    for place, field in zip((3, 4, 5, 6), ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), strict=True):
        getattr(peer, f"{field}_l0").data.copy_(arguments[place][0])
    start = arguments[1] if cell == "gru" else tuple(arguments[1:3])
    output, final = peer(arguments[0][0], start)
    states = [output.unsqueeze(0).detach(), *(f.detach() for f in (final if cell == "lstm" else [final]))]
    ours = gated_layer_composite(*arguments)[: len(states)]
    assert_no_worse(ours, states, expected[: len(states)], dtype, times=3)


# Backward


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_pass_is_the_oracles(cell: str, inverse: str, credit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches of two steps, and so several of them in each row's run."""
    monkeypatch.setattr(_gated_backward_composite, "_STRETCH", 2)
    check_backward(gated(cell, S=3, T=7, B=4, reverse=[False, True, True]), inverse, credit=credit)


BACKWARD: dict[str, list[Any]] = {
    "cell": CELLS,
    "S": [1, 2],
    "T": [1, 2, 33, 70],
    "B": [1, 3],
    "I": [0, 1, 4],
    "H": [1, 2, 9],
    "ragged": [False, True],
    "backwards": [False, True],
    "own_inputs": [False, True],
    "dtype": DTYPES,
    "inverse": [inverse for inverse in INVERSES if inverse != "one"],
    "credit": CREDITS,
    "without": ["nothing", "grad_states", "disp", "credit"],
}


@pytest.mark.parametrize("options", pairwise(**BACKWARD), ids=name)
def test_backward_pass_of_any_sizes(options: dict[str, Any]) -> None:
    backwards, dtype, inverse, credit, without = (
        options.pop(key) for key in ("backwards", "dtype", "inverse", "credit", "without")
    )
    # weights by which no displacement grows over many steps
    case = gated(**options, reverse=[backwards] * options["S"])
    case = case._replace(weight_hh=case.weight_hh / 2)
    left_out = {"grad_states": ["grad_states"], "nothing": []}.get(without, [f"{without}_h_n", f"{without}_c_n"])
    check_backward(case._replace(**dict.fromkeys(left_out)), inverse, dtype, credit=credit)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("slopes", list(itertools.permutations(["inverse", "derivative", "one"], 2)))
def test_slopes_of_gates_and_of_candidates(cell: str, slopes: tuple[str, str]) -> None:
    gate, candidate = slopes
    check_backward(gated(cell), "published", gate_slope=gate, candidate_slope=candidate, slope_reg=0.125)


@pytest.mark.parametrize("inverse", ["damped", "cell", "jacobian", "chebyshev"])
@pytest.mark.parametrize("cell", CELLS)
def test_numbers_of_each_member(cell: str, inverse: str) -> None:
    case = gated(cell, S=3)
    given, extra = rule(case, inverse)
    numbers = ("target_step", "margin", "slope_reg", "scale", "input_scale")
    lists = {key: [given.get(key, 0.5) * factor for factor in (1.0, 0.5, 0.25)] for key in numbers}
    if inverse in JACOBIAN:
        extra["reg"] = [0.5, 0.25, 1.0]
    arrays = backward_arguments(case, reference.gated_scan(*case.layer), credit="through_time", **given | lists)
    assert_close_to_oracle(
        functools.partial(gated_jacobian_backward, **extra) if inverse in JACOBIAN else backward_composite,
        oracle(reference.gated_target_pass, **extra),
        tensors(list(arrays.values()), torch.float64),
        terms=200,
    )


@pytest.mark.parametrize("cell", CELLS)
def test_only_what_is_needed(cell: str) -> None:
    for needs in itertools.product([True, False], repeat=5):
        check_backward(gated(cell), "cell", needs=list(needs), **({} if needs[0] else {"input_feedback": None}))


@pytest.mark.parametrize("cell", CELLS)
def test_the_cells_inverse_does_not_cancel(cell: str) -> None:
    """In float32 and without a ridge it is as exact as the numbers themselves allow, where a gate is nearly shut."""
    case = gated(cell, S=1, T=1, B=16, H=8, ragged=False)
    bias = case.bias_ih.copy()
    bias[:, -8:] += 8.0  # the output gate, and the GRU's candidate
    check_backward(case._replace(bias_ih=bias), "cell", torch.float32, slope_reg=0.0)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_not_read(cell: str) -> None:
    """NaN beyond a row's length, in everything that has a time: the same numbers."""
    case = gated(cell, S=2)
    given, _ = rule(case, "published")
    arrays = backward_arguments(case, reference.gated_scan(*case.layer), credit="through_time", **given)
    padded = np.arange(5)[:, None] >= case.lengths
    clean = tensors(list(arrays.values()), torch.float64)
    for field in ("states", "kept"):
        arrays[field] = arrays[field].copy()
        arrays[field][:, padded] = np.nan
    for a, b in zip(
        backward_composite(*tensors(list(arrays.values()), torch.float64)),
        backward_composite(*clean),
        strict=True,
    ):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", ["S", "T", "B", "I", "H"])
def test_sizes_of_zero(cell: str, size: str) -> None:
    case = gated(cell, **{size: 0}, reverse=[] if size == "S" else None)
    arguments = tensors(case.layer, torch.float64)
    forward = gated_layer_composite(*arguments, keep=True)
    # no output of an op may be one of its arguments
    assert all(given is not found for given in arguments for found in forward)
    for a, b in zip(forward, reference.gated_scan(*case.layer), strict=True):
        assert a.shape == ((0,) if b is None else b.shape)
    # of no units or members a step has no inverse
    for inverse in ("cell", *(("jacobian", "chebyshev") if size in "TBI" else ())):
        check_backward(case, inverse, credit="through_time")


# The ops


@pytest.mark.parametrize("cell", CELLS)
def test_low_precision_of_the_backward_pass(cell: str) -> None:
    """Sums are made in float32: from the same 16-bit numbers its results but for one rounding."""
    case = gated(cell, T=40)
    given, _ = rule(case, "damped")
    arrays = backward_arguments(case, reference.gated_scan(*case.layer), credit="through_time", **given)
    arguments = tensors(list(arrays.values()), torch.bfloat16)
    wide = [value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments]
    for a, b in zip(backward_composite(*arguments), backward_composite(*wide), strict=True):
        torch.testing.assert_close(a, b.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "extra", "text"),
    [
        ({"inverse": "cell"}, {}, "inverse must be one of 'jacobian', got 'cell'"),
        ({}, {"reg": 0.0}, "reg must be a finite number > 0, got 0.0"),
        ({}, {"reg": [1.0, 2.0, 3.0]}, "reg must be one number or S=2 of them, got 3"),
        ({}, {"chebyshev_steps": 0}, "chebyshev_steps must be None or an integer >= 1, got 0"),
        ({}, {"chebyshev_steps": 1.5}, "chebyshev_steps must be None or an integer >= 1, got 1.5"),
        ({"gate_slope": "one"}, {}, "gate_slope and candidate_slope must be 'derivative'"),
        ({"lengths": np.array([9, 0, 0])}, {}, r"lengths must lie in 0\.\.T=5, got "),
        ({"h0": np.zeros((2, 3, 5))}, {}, r"h0 must be \[S=2, B=3, H=4\], got "),
    ],
)
def test_wrong_arguments_of_the_jacobian_are_refused(change: dict[str, Any], extra: dict[str, Any], text: str) -> None:
    case = gated("gru")
    given, _ = rule(case, "jacobian")
    arrays = backward_arguments(case, reference.gated_scan(*case.layer), **given)
    gated_jacobian_backward(*tensors(list(arrays.values()), torch.float64), reg=1.0)
    with pytest.raises(ValueError, match=text):
        gated_jacobian_backward(*tensors(list((arrays | change).values()), torch.float64), **{"reg": 1.0, **extra})
