"""The target passes: equal to the published code's numbers, to the float64 oracle, and to what theory says of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import (
    DTYPES,
    LAYOUTS,
    NONLINEARITIES,
    SIZES,
    SameBits,
    Scan,
    assert_close_to_oracle,
    assert_same_bits,
    name,
    pairwise,
    pieces,
    scan,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpext import reference
from tpext.reference import RNNGradients
from tpext.rules import LearnedInverse, RecurrentCall, RecurrentRule, RegularizedInverse

rnn_target_scan = torch.ops.tpext.rnn_target_scan
rnn_learned_target_scan = torch.ops.tpext.rnn_learned_target_scan


def target_rnn(**arguments: Any) -> tuple[Tensor, Tensor]:
    """A layer under the regularised inverse, by the names of its arguments and of the rule's."""
    return run(RegularizedInverse, arguments)


def learned_target_rnn(*, reverse_weight: Tensor, reverse_bias: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return run(LearnedInverse, arguments | {"owned": (reverse_weight, reverse_bias)})


def run(kind: type[RecurrentRule], arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    of_layer = {name: value for name, value in arguments.items() if name in RecurrentCall._fields}
    rule = kind(**{name: value for name, value in arguments.items() if name not in of_layer})
    return rule.run_recurrent(RecurrentCall(**of_layer))


CORRECTIONS = ["linearized", "difference", "none"]
CREDITS = ["local", "through_time"]
RULES = list(itertools.product(CORRECTIONS, CREDITS))
# The linearised correction by another slope than 1 / a', as a name of its own: slope and slope_reg.
SLOPES = {"derivative": ("derivative", 0.0), "one": ("one", 0.0), "regularized": ("inverse", 0.125)}
ENTERS = ["states", "end", "both"]
# What the plain differences in the oracle can lose next to states of order one, in longdouble.
ORACLE_ERROR = 64 * float(np.finfo(np.longdouble).eps)
# Steps and margins that float32 holds exactly: the oracle then sees the same numbers.
STEP, MARGIN = 0.125, 2.0**-10


def inverse(weight_hh: Tensor, reg: float = 1.0) -> Tensor:
    return torch.from_numpy(reference.regularized_inverse(weight_hh.numpy(), reg)).to(weight_hh.dtype)


def target_arguments(
    inputs: Scan,
    correction: str,
    credit: str,
    return_norms: bool = True,
    return_displacement: bool = True,
    *,
    target_step: float = STEP,
    margin: float = MARGIN,
) -> tuple[Any, ...]:
    return (
        inputs.grad_states,
        inputs.states,
        inputs.h0,
        inputs.weight_hh,
        inverse(inputs.weight_hh),
        inputs.x_proj if correction == "none" else None,
        inputs.lengths,
        inputs.reverse,
        inputs.nonlinearity,
        "linearized" if correction in SLOPES else correction,
        credit,
        target_step,
        margin,
        return_norms,
        return_displacement,
        inputs.at_end,
        inputs.credit_at_end,
        *SLOPES.get(correction, ("inverse", 0.0)),
    )


def learned_arguments(inputs: Scan, credit: str, return_norms: bool = True) -> tuple[Any, ...]:
    """The reverse layer's weight and pre-activation are taken from tensors at hand: any will do."""
    return (
        inputs.grad_states,
        inputs.states,
        inputs.weight_hh,
        inputs.weight_hh.mT,
        inputs.x_proj,
        inputs.lengths,
        inputs.reverse,
        inputs.nonlinearity,
        credit,
        STEP,
        return_norms,
        inputs.at_end,
        inputs.credit_at_end,
    )


# Every target pass there is: its name, correction and credit for `target_pass`.
PASSES = list(itertools.product([*CORRECTIONS, *SLOPES, "learned"], CREDITS))
each_pass = pytest.mark.parametrize(("correction", "credit"), PASSES)


def target_pass(inputs: Scan, correction: str, credit: str) -> tuple[Tensor, ...]:
    """All outputs of one pass."""
    if correction == "learned":
        return rnn_learned_target_scan(*learned_arguments(inputs, credit))
    return rnn_target_scan(*target_arguments(inputs, correction, credit))


def every_output(inputs: Scan) -> list[Tensor]:
    """All outputs by all rules, those without time as ``[S, 1, B, H]``."""
    found = []
    for correction, credit in PASSES:
        delta, disp_h0, *rest, credit_h0 = target_pass(inputs, correction, credit)
        found += [delta, disp_h0.unsqueeze(1), *rest]
        found += [credit_h0.unsqueeze(1)] if credit == "through_time" else []
    return found


class TestSameBits(SameBits):
    run = staticmethod(every_output)


# A whole layer, by the oracle and by the ops.

Layer = dict[str, Any]


def layer(nonlinearity: str = "tanh", ragged: bool = True) -> Layer:
    """A random layer of two directions, with the gradients of its states and final states, in float64."""
    T, B, inputs, H, S = 7, 4, 3, 6, 2
    lengths = torch.tensor([T, 0, 1, 5]) if ragged else None
    return {
        "grad_states": torch.randn(S, T, B, H).double(),
        "input": torch.randn(1, T, B, inputs).double(),
        "h0": torch.randn(S, B, H).double() / 2,
        "weight_ih": torch.randn(S, H, inputs).double() / inputs**0.5,
        "weight_hh": torch.randn(S, H, H).double() / H**0.5,
        "bias": torch.randn(S, H).double() / 4,
        "lengths": lengths,
        "reverse": [s % 2 == 1 for s in range(S)],
        "nonlinearity": nonlinearity,
        "grad_h_n": torch.randn(S, B, H).double(),
    }


OPTIONS = {
    "reg": 1.0,
    "target_step": 0.1,
    "correction": "linearized",
    "credit": "local",
    "margin": 1e-3,
    "normalize": True,
    "input_rule": "gradient",
}


def by_oracle(layer: Layer, **options: Any) -> RNNGradients:
    arrays = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in layer.items()}
    return reference.target_rnn_gradients(**arrays, **OPTIONS | options)


def by_ops(layer: Layer, **options: Any) -> RNNGradients:
    return gradients(target_rnn, layer, **OPTIONS | options)


def gradients(function: Callable[..., tuple[Tensor, Tensor]], layer: Layer, **options: Any) -> RNNGradients:
    """What autograd hands to each input of a layer function."""
    variables = {key: layer[key].clone().requires_grad_() for key in RNNGradients._fields}
    rest = {key: layer[key] for key in ("lengths", "reverse", "nonlinearity")}
    outputs = function(**variables, **rest, **options)
    entering = [(o, layer[key]) for o, key in zip(outputs, GRADIENTS, strict=True) if layer[key] is not None]
    return RNNGradients(
        *(
            g.numpy()
            for g in torch.autograd.grad([o for o, _ in entering], list(variables.values()), [g for _, g in entering])
        )
    )


GRADIENTS = ("grad_states", "grad_h_n")


def by_learned_oracle(layer: Layer, **options: Any) -> RNNGradients:
    arrays = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in (layer | options).items()}
    return reference.learned_target_rnn_gradients(**arrays)


def by_learned_ops(layer: Layer, **options: Any) -> RNNGradients:
    return gradients(learned_target_rnn, layer, **options)


def backprop(layer: Layer) -> RNNGradients:
    arrays = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in layer.items()}
    return reference.rnn_gradients(**arrays)


def assert_equal_gradients(actual: RNNGradients, expected: RNNGradients, rtol: float) -> None:
    """Each gradient within ``rtol`` of the other, relative to its greatest element."""
    for field, a, b in zip(RNNGradients._fields, actual, expected, strict=True):
        error, size = np.abs(a - b).max(), np.abs(b).max()
        assert error <= rtol * size, f"{field}: relative error {error / size if size else error!r}"


both_implementations = pytest.mark.parametrize("gradients_of", [by_oracle, by_ops], ids=["oracle", "ops"])


# Against the published code.

HERE = Path(__file__).resolve().parent
# One case stands in the repository; any others kept beside it are run where they are.
OTHERS = (HERE.parents[1] / "shared" / "golden" / "mlp").glob("R_tpri_*.npz")
GOLDEN = [HERE / "data" / "R_tpri_small.npz", *sorted(path for path in OTHERS if path.name != "R_tpri_small.npz")]


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    with np.load(request.param) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def golden_layer(golden: dict[str, Tensor], enters: str = "states") -> Layer:
    """The layer of the file, and the gradient of the batch-mean cross-entropy of the last state's read-out.

    It comes as that of the last of all "states", or of the state at the "end".
    """
    final = golden["h"][:, -1].requires_grad_()
    loss = torch.nn.functional.cross_entropy(final @ golden["Wo"].T + golden["bo"], golden["labels"])
    B, T, H = (size - extra for size, extra in zip(golden["h"].shape, (0, 1, 0), strict=True))
    grad_h_n = torch.autograd.grad(loss, final)[0].unsqueeze(0)
    grad_states = torch.zeros(1, T, B, H, dtype=torch.float64)
    grad_states[:, -1] = grad_h_n
    return {
        "grad_states": grad_states if enters == "states" else None,
        "grad_h_n": grad_h_n if enters == "end" else None,
        "input": golden["x"].transpose(0, 1).unsqueeze(0),
        "h0": golden["h"][None, :, 0].detach(),
        "weight_ih": golden["Wi"][None],
        "weight_hh": golden["Wh"][None],
        "bias": golden["bh"][None],
        "lengths": None,
        "reverse": [False],
        "nonlinearity": "tanh",
    }


@pytest.mark.parametrize(("gradients_of", "rtol"), [(by_oracle, 1e-12), (by_ops, 1e-10)], ids=["oracle", "ops"])
@pytest.mark.parametrize(("credit", "suffix"), [("local", "local"), ("through_time", "bptt")])
@pytest.mark.parametrize("enters", ["states", "end"])
def test_gradients_equal_the_published_codes(
    golden: dict[str, Tensor],
    gradients_of: Callable[..., RNNGradients],
    rtol: float,
    credit: str,
    suffix: str,
    enters: str,
) -> None:
    published = {"reg": golden["r"].item(), "target_step": golden["lr_target"].item(), "margin": golden["clip"].item()}
    actual = gradients_of(golden_layer(golden, enters), credit=credit, normalize=False, **published)
    for gradient, key in [(actual.weight_hh, "gWh"), (actual.weight_ih, "gWi"), (actual.bias, "gb")]:
        expected = golden[f"{key}_{suffix}"].numpy()
        assert np.abs(gradient[0] - expected).max() <= rtol * np.abs(expected).max(), key


@pytest.mark.parametrize("implementation", ["oracle", "ops"])
def test_states_and_targets_equal_the_published_codes(golden: dict[str, Tensor], implementation: str) -> None:
    layer = golden_layer(golden)
    weights = layer["weight_hh"]
    R = torch.ops.tpext.regularized_inverse(weights, golden["r"].item())
    x_proj = torch.einsum("tbi,shi->stbh", layer["input"][0], layer["weight_ih"]) + layer["bias"][:, None, None]
    step, margin = golden["lr_target"].item(), golden["clip"].item()
    if implementation == "ops":
        scan, target_scan, rtol = torch.ops.tpext.rnn_scan, rnn_target_scan, 1e-10
    else:
        scan, target_scan, rtol = reference.rnn_scan, reference.rnn_target_scan, 1e-12
    run = (None, [False], "tanh")
    states = scan(x_proj, layer["h0"], weights, *run)
    result = target_scan(
        layer["grad_states"],
        states,
        layer["h0"],
        weights,
        R,
        None,
        *run,
        "linearized",
        "local",
        step,
        margin,
        False,
        True,
    )
    states, disp_h0, z = (torch.as_tensor(output) for output in (states, result[1], result[3]))
    np.testing.assert_allclose(states[0].transpose(0, 1), golden["h"][:, 1:].detach(), rtol=0, atol=rtol)
    # The linearisation is d_t = z_t (1 - clip(h_t)^2).
    displacement = z * (1 - states.clamp(margin - 1, 1 - margin) ** 2)
    targets = torch.cat([layer["h0"] + disp_h0, states[0] + displacement[0]]).transpose(0, 1)
    size = golden["v"].abs().amax(-1, keepdim=True)
    np.testing.assert_array_less((targets - golden["v"]).abs() / size, rtol)


# Against the oracle.


def check(arguments: tuple[Any, ...]) -> None:
    error = 0.0 if arguments[9] == "linearized" else ORACLE_ERROR
    assert_close_to_oracle(rnn_target_scan, reference.rnn_target_scan, arguments, oracle_error=error)


def check_learned(arguments: tuple[Any, ...]) -> None:
    reference_scan = reference.rnn_learned_target_scan
    assert_close_to_oracle(rnn_learned_target_scan, reference_scan, arguments, oracle_error=ORACLE_ERROR)


@pytest.mark.parametrize(
    "case",
    pairwise(
        **SIZES,
        **LAYOUTS,
        correction=[*CORRECTIONS, *SLOPES],
        credit=CREDITS,
        enters=ENTERS,
        last_step_only=[False, True],
        return_norms=[False, True],
        return_displacement=[False, True],
    ),
    ids=name,
)
def test_equals_the_oracle(case: dict[str, Any]) -> None:
    torch.set_num_threads(case.pop("threads"))
    options = [case.pop(key) for key in ("correction", "credit", "return_norms", "return_displacement")]
    check(target_arguments(scan(**case), *options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize(("correction", "credit"), [rule for rule in PASSES if rule[0] != "learned"])
def test_every_combination_of_options(dtype: torch.dtype, nonlinearity: str, correction: str, credit: str) -> None:
    for enters, norms, displacement in itertools.product(ENTERS, [False, True], [False, True]):
        inputs = scan(5, 7, 19, 2, dtype, nonlinearity, ragged=True, direction="mixed", enters=enters)
        arguments = target_arguments(inputs, correction, credit, norms, displacement)
        check(arguments)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 12),
    B=st.integers(0, 19),
    H=st.integers(1, 50),
    S=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    nonlinearity=st.sampled_from(NONLINEARITIES),
    ragged=st.booleans(),
    direction=st.sampled_from(LAYOUTS["direction"]),
    enters=st.sampled_from(ENTERS),
    rule=st.sampled_from([rule for rule in PASSES if rule[0] != "learned"]),
    target_step=st.sampled_from([2.0**-7, 0.5, 2.0]),
    margin=st.sampled_from([2.0**-10, 2.0**-4, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_oracle_at_random_sizes(
    rule: tuple[str, str], target_step: float, margin: float, **case: Any
) -> None:
    arguments = target_arguments(scan(**case), *rule, target_step=target_step, margin=margin)
    check(arguments)


@pytest.mark.parametrize(
    "case", pairwise(**SIZES, **LAYOUTS, enters=ENTERS, credit=CREDITS, return_norms=[False, True]), ids=name
)
def test_learned_pass_equals_the_oracle(case: dict[str, Any]) -> None:
    torch.set_num_threads(case.pop("threads"))
    options = [case.pop(key) for key in ("credit", "return_norms")]
    arguments = learned_arguments(scan(**case), *options)
    check_learned(arguments)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 12),
    B=st.integers(0, 19),
    H=st.integers(1, 50),
    S=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    nonlinearity=st.sampled_from(NONLINEARITIES),
    ragged=st.booleans(),
    direction=st.sampled_from(LAYOUTS["direction"]),
    enters=st.sampled_from(ENTERS),
    credit=st.sampled_from(CREDITS),
    seed=st.integers(0, 2**16),
)
def test_learned_pass_equals_the_oracle_at_random_sizes(credit: str, **case: Any) -> None:
    check_learned(learned_arguments(scan(**case), credit))


@pytest.mark.parametrize("empty", ["T", "B", "H", "S"])
@pytest.mark.parametrize("ragged", [False, True])
@each_pass
def test_size_zero_gives_empty_or_zero_outputs(empty: str, ragged: bool, correction: str, credit: str) -> None:
    inputs = scan(**{"T": 3, "B": 4, "H": 5, "S": 2} | {empty: 0}, ragged=ragged)
    delta, disp_h0, norms, *displacement, credit_h0 = target_pass(inputs, correction, credit)
    assert all(output.shape == inputs.states.shape for output in (delta, *displacement))
    assert norms.shape == inputs.states.shape[:3]
    assert disp_h0.shape == inputs.h0.shape
    assert credit_h0.shape == (inputs.h0.shape if credit == "through_time" else (0,))
    assert not disp_h0.any()
    assert not credit_h0.any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("enters", ["end", "both"])
@each_pass
def test_rows_without_steps_pass_on_what_comes_from_beyond(
    direction: str, enters: str, correction: str, credit: str
) -> None:
    for T in (0, 3):
        inputs = scan(T, 5, 9, 2, direction=direction, enters=enters)._replace(lengths=torch.tensor([T, 0, T, 0, 0]))
        _, disp_h0, *_, credit_h0 = target_pass(inputs, correction, credit)
        empty = inputs.lengths == 0
        assert torch.equal(disp_h0[:, empty], inputs.at_end[:, empty])
        if credit == "through_time":
            assert torch.equal(credit_h0[:, empty], inputs.credit_at_end[:, empty])


def in_pieces(inputs: Scan, cut: int, correction: str, credit: str) -> list[Tensor]:
    """All outputs of a pass in two pieces, the one where each run ends first."""
    first, second = pieces(inputs, cut)
    one = target_pass(first, correction, credit)
    between = one[-1] if credit == "through_time" else None
    two = target_pass(second._replace(at_end=one[1], credit_at_end=between), correction, credit)
    sequences = zip((one[0], *one[2:-1]), (two[0], *two[2:-1]), strict=True)
    joined = [torch.cat(pair if inputs.reverse[0] else pair[::-1], dim=1) for pair in sequences]
    return [joined[0], two[1], *joined[1:], two[-1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("correction", "credit"), [rule for rule in PASSES if rule[0] != "none"])
def test_two_pieces_without_a_gradient_between_are_the_whole_to_the_bit(
    dtype: torch.dtype, direction: str, ragged: bool, correction: str, credit: str
) -> None:
    inputs = scan(9, 7, 33, 2, dtype, ragged=ragged, direction=direction, enters="end")
    expected = target_pass(inputs, correction, credit)
    for cut in (1, 4, 8):
        assert_same_bits(in_pieces(inputs, cut, correction, credit), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("enters", ["end", "both"])
@each_pass
def test_two_pieces_are_the_whole(
    dtype: torch.dtype, direction: str, enters: str, correction: str, credit: str
) -> None:
    inputs = scan(5, 5, 9, 2, dtype, ragged=True, direction=direction, enters=enters)

    def op(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(in_pieces(inputs, 2, correction, credit))

    arguments, oracle = learned_arguments(inputs, credit), reference.rnn_learned_target_scan
    if correction != "learned":
        arguments, oracle = target_arguments(inputs, correction, credit), reference.rnn_target_scan
    assert_close_to_oracle(op, oracle, arguments, oracle_error=0.0 if correction == "linearized" else ORACLE_ERROR)


@pytest.mark.parametrize("dtype", DTYPES)
def test_atanh_is_within_four_units_in_the_last_place(dtype: torch.dtype) -> None:
    """The displacement of "difference" from a state of zero is ``atanh(d)``."""
    limits = torch.finfo(dtype)
    spread = np.geomspace(limits.tiny * 4, 0.999, 100_000)
    targets = torch.from_numpy(np.concatenate([spread, -spread, np.linspace(-0.999, 0.999, 200_001)])).to(dtype)
    targets = targets[targets != 0]
    grad, weight = (-targets).view(1, 1, -1, 1), torch.zeros(1, 1, 1, dtype=dtype)
    zeros, h0 = torch.zeros_like(grad), torch.zeros(1, targets.numel(), 1, dtype=dtype)
    options = ("tanh", "difference", "local", 1.0, 1e-3, False, True)
    found = rnn_target_scan(grad, zeros, h0, weight, weight, None, None, [False], *options)[3].flatten()
    exact = np.arctanh(targets.numpy().astype(np.longdouble))
    error = np.abs(found.numpy().astype(np.longdouble) - exact) / np.spacing(np.abs(exact.astype(found.numpy().dtype)))
    assert error.max() <= 4, f"{error.max():.3f} units in the last place at {targets[error.argmax()].item()!r}"


def fading(dtype: torch.dtype, nonlinearity: str, direction: str) -> Scan:
    """A long input whose displacement and credit, from the end alone, die out on the way."""
    inputs = scan(200, 7, 9, 2, dtype, nonlinearity, direction=direction, enters="end")
    return inputs._replace(weight_hh=inputs.weight_hh * (1e-3 if dtype == torch.float32 else 1e-9))


PLACES = ["nowhere", "states", "x_proj", "weight_hh", "at_end", "credit_at_end"]


@pytest.mark.parametrize("place", PLACES)
@each_pass
def test_a_displacement_that_fades_leaves_what_zeros_would(place: str, correction: str, credit: str) -> None:
    """Without ``grad_states`` the kernel stops where a displacement has died out; with zeros it goes to the end."""
    torch.set_num_threads(1)
    values = [torch.nan] if place == "nowhere" else [torch.nan, torch.inf]
    for dtype, nonlinearity, value in itertools.product(DTYPES, NONLINEARITIES, values):
        direction = "forward" if nonlinearity == "relu" else "reverse"
        inputs = fading(dtype, nonlinearity, direction)
        T = inputs.states.shape[1]
        tensor = None if place == "nowhere" else getattr(inputs, place)
        if tensor is not None and tensor.dim() == 4:
            tensor[1, 1 if direction == "reverse" else T - 2, 3, 5] = value
        elif tensor is not None:
            tensor[1, 3, 5] = value
        zeros = torch.zeros_like(inputs.states)
        expected = target_pass(inputs._replace(grad_states=zeros), correction, credit)
        if correction != "none":
            assert not expected[0][0, T // 2].any(), "the displacement must die out on the way"
        assert_same_bits(target_pass(inputs, correction, credit), expected)


def bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What tells zeros of different signs apart."""
    return [part for tensor in tensors for part in (tensor, tensor.signbit().to(tensor.dtype))]


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@each_pass
def test_states_beyond_the_range_give_the_same_bits_on_any_threads(
    nonlinearity: str, correction: str, credit: str
) -> None:
    """Rows stop being computed with those of their tile, so a row's company must not show in its zeros."""
    for dtype in DTYPES:
        # Large enough for four threads.
        inputs = scan(200, 16, 32, 1, dtype, nonlinearity, direction="forward", enters="end")
        states = 3 * torch.randn_like(inputs.states)
        # Relu's come to zero at steps whose states are in range, and would leave it again at others.
        states[:, ::2].abs_()
        scale = 1e-3 if dtype == torch.float32 else 1e-9
        inputs = inputs._replace(states=states, weight_hh=inputs.weight_hh * scale)
        # Rows of some threads die out at once, while their company, on one thread, stays alive.
        inputs.at_end[:, 8:] *= 1e-30 if dtype == torch.float32 else 1e-300
        zeros = torch.zeros_like(inputs.states)
        backward = (inputs.states, inputs.weight_hh, None, inputs.reverse, nonlinearity, inputs.at_end)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found = target_pass(inputs, correction, credit)
            back = torch.ops.tpext.rnn_scan_backward(None, *backward)
            if threads == 1:
                expected, expected_back = bits(found), bits(back)
                with_zeros = target_pass(inputs._replace(grad_states=zeros), correction, credit)
                assert_same_bits(with_zeros, found)
                assert_same_bits(torch.ops.tpext.rnn_scan_backward(zeros, *backward), back)
            assert_same_bits(bits(found), expected)
            assert_same_bits(bits(back), expected_back)


def test_relu_states_below_zero_count_as_zero() -> None:
    inputs = scan(6, 5, 9, 1, torch.float64, "relu", enters="both")
    inputs = inputs._replace(states=inputs.states - 0.3)
    check(target_arguments(inputs, "difference", "local"))


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("input_rule", ["gradient", "target"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("correction", "credit"), RULES)
def test_layer_hands_down_what_the_oracle_does(
    nonlinearity: str, input_rule: str, normalize: bool, correction: str, credit: str
) -> None:
    options = {"correction": correction, "credit": credit, "input_rule": input_rule, "normalize": normalize}
    case = layer(nonlinearity=nonlinearity)
    assert_equal_gradients(by_ops(case, **options), by_oracle(case, **options), 1e-10)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("name", SLOPES)
def test_layer_by_another_slope_hands_down_what_the_oracle_does(name: str, nonlinearity: str, credit: str) -> None:
    slope, slope_reg = SLOPES[name]
    options = {"credit": credit, "input_rule": "target", "slope": slope, "slope_reg": slope_reg}
    case = layer(nonlinearity=nonlinearity)
    assert_equal_gradients(by_ops(case, **options), by_oracle(case, **options), 1e-10)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("credit", CREDITS)
def test_learned_layer_hands_down_what_the_oracle_does(nonlinearity: str, normalize: bool, credit: str) -> None:
    case = layer(nonlinearity=nonlinearity)
    reverse_layer = {"reverse_weight": torch.randn(2, 6, 6).double() / 2, "reverse_bias": torch.randn(2, 6).double()}
    options = {**reverse_layer, "target_step": 0.1, "credit": credit, "normalize": normalize}
    assert_equal_gradients(by_learned_ops(case, **options), by_learned_oracle(case, **options), 1e-10)


@pytest.mark.parametrize("empty", ["T", "B"])
@pytest.mark.parametrize("ragged", [False, True])
def test_layer_without_steps_or_rows_has_zero_gradients(empty: str, ragged: bool) -> None:
    case = layer()
    case["grad_states"] = case["grad_states"][:, :0] if empty == "T" else case["grad_states"][:, :, :0]
    case["grad_h_n"] = None if empty == "T" else case["grad_h_n"][:, :0]
    case["input"] = case["input"][:, :0] if empty == "T" else case["input"][:, :, :0]
    case["h0"] = case["h0"] if empty == "T" else case["h0"][:, :0]
    case["lengths"] = torch.zeros(case["h0"].shape[1], dtype=torch.int64) if ragged else None
    reverse_layer = {"reverse_weight": torch.randn(2, 6, 6).double(), "reverse_bias": torch.randn(2, 6).double()}
    by_learned = gradients(learned_target_rnn, case, **reverse_layer, target_step=0.1, credit="local", normalize=True)
    for actual in (by_ops(case, correction="none"), by_learned):
        for key, gradient in actual._asdict().items():
            assert gradient.shape == case[key].shape
            assert not gradient.any()


@pytest.mark.parametrize("every", [1, 3, 7, 8])
@pytest.mark.parametrize("needs_states", [False, True])
@pytest.mark.parametrize("input_rule", ["gradient", "target"])
@pytest.mark.parametrize(("correction", "credit"), RULES)
def test_layer_in_pieces_hands_down_what_the_oracle_does(
    every: int, needs_states: bool, input_rule: str, correction: str, credit: str
) -> None:
    case = layer() | ({} if needs_states else {"grad_states": None})
    options = {"correction": correction, "credit": credit, "input_rule": input_rule}
    pieces = {"checkpoint_every": every, "needs_states": needs_states}
    assert_equal_gradients(by_ops(case, **pieces, **options), by_oracle(case, **options), 1e-10)


@pytest.mark.parametrize("every", [1, 3, 7, 8])
@pytest.mark.parametrize("needs_states", [False, True])
@pytest.mark.parametrize("credit", CREDITS)
def test_learned_layer_in_pieces_hands_down_what_the_oracle_does(every: int, needs_states: bool, credit: str) -> None:
    case = layer() | ({} if needs_states else {"grad_states": None})
    reverse_layer = {"reverse_weight": torch.randn(2, 6, 6).double() / 2, "reverse_bias": torch.randn(2, 6).double()}
    options = {**reverse_layer, "target_step": 0.1, "credit": credit, "normalize": True}
    assert_equal_gradients(
        by_learned_ops(case, checkpoint_every=every, needs_states=needs_states, **options),
        by_learned_oracle(case, **options),
        1e-10,
    )


@pytest.mark.parametrize("missing", GRADIENTS)
def test_layer_of_which_one_output_is_used(missing: str) -> None:
    case = layer() | {missing: None}
    assert_equal_gradients(by_ops(case), by_oracle(case), 1e-10)
    reverse_layer = {"reverse_weight": torch.randn(2, 6, 6).double() / 2, "reverse_bias": torch.randn(2, 6).double()}
    options = {**reverse_layer, "target_step": 0.1, "credit": "through_time", "normalize": True}
    assert_equal_gradients(by_learned_ops(case, **options), by_learned_oracle(case, **options), 1e-10)


def test_layer_returns_states_and_final_states() -> None:
    case = layer()
    case = {key: value for key, value in case.items() if key not in GRADIENTS}
    expected = reference.rnn_layer(**{k: v.numpy() if isinstance(v, Tensor) else v for k, v in case.items()})
    reverse_layer = {"reverse_weight": torch.randn(2, 6, 6).double(), "reverse_bias": torch.randn(2, 6).double()}
    options = {"target_step": 0.1, "credit": "local", "normalize": True}
    for outputs in (target_rnn(**case, **OPTIONS), learned_target_rnn(**case, **reverse_layer, **options)):
        for a, b in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("input_rule", ["gradient", "target"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_what_stands_in_the_padding_reaches_no_gradient(value: float, input_rule: str, correction: str) -> None:
    case = layer()
    padded = torch.arange(case["input"].shape[1])[:, None] >= case["lengths"]
    filled = case | {"input": case["input"].masked_fill(padded[..., None], value)}
    options = {"input_rule": input_rule, "correction": correction, "credit": "through_time"}
    actual, expected = by_ops(filled, **options), by_ops(case, **options)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not actual.input[0][padded.numpy()].any()
    reverse_layer = {"reverse_weight": torch.randn(2, 6, 6).double(), "reverse_bias": torch.randn(2, 6).double()}
    options = {**reverse_layer, "target_step": 0.1, "credit": "through_time", "normalize": True}
    for a, b in zip(by_learned_ops(filled, **options), by_learned_ops(case, **options), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layer_without_a_bias() -> None:
    case = layer()
    variables = {key: case[key].clone().requires_grad_() for key in ("input", "h0", "weight_ih", "weight_hh")}
    rest = {key: case[key] for key in ("lengths", "reverse", "nonlinearity")}
    outputs = target_rnn(**variables, bias=None, **rest, **OPTIONS)
    actual = torch.autograd.grad(outputs, list(variables.values()), [case[key] for key in GRADIENTS])
    expected = by_oracle(case | {"bias": torch.zeros(2, 6).double()})
    for a, b in zip(actual, expected[:4], strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-10, atol=1e-12)


# What theory says.


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_the_transpose_and_the_derivative_are_back_propagation(nonlinearity: str) -> None:
    inputs = scan(9, 5, 17, 2, torch.float64, nonlinearity, ragged=True, direction="mixed", enters="both")
    rest = (inputs.lengths, inputs.reverse, nonlinearity)
    delta, disp_h0, *_ = rnn_target_scan(
        inputs.grad_states, inputs.states, inputs.h0, inputs.weight_hh, inputs.weight_hh.mT.contiguous(), None, *rest,
        "linearized", "local", 1.0, MARGIN, False, False, -inputs.at_end, None, "derivative",
    )  # fmt: skip
    expected = torch.ops.tpext.rnn_scan_backward(
        inputs.grad_states, inputs.states, inputs.weight_hh, *rest, inputs.at_end
    )
    torch.testing.assert_close((delta, -disp_h0), expected, rtol=1e-13, atol=1e-14)


def local_losses(
    layer: Layer, inverse: Callable[..., Tensor], corrected: bool, step: float, credit: str
) -> list[Tensor]:
    """Gradients of ``sum_t 1/2 ||h_t - v_t||^2`` by torch's autograd, and ``h0``'s displacement, for one direction.

    Targets by definition: ``v_{t-1} = G(v_t) - step * g_{t-1}``, if corrected plus ``h_{t-1} - G(h_t)``, held fixed.
    """
    g, W, U, bias = (layer[key][0].clone() for key in ("grad_states", "weight_hh", "weight_ih", "bias"))
    g[-1] += layer["grad_h_n"][0]
    parameters = [parameter.requires_grad_() for parameter in (U, W, bias)]
    states = [layer["h0"][0]]
    for x in layer["input"][0]:
        states.append(torch.tanh(x @ U.T + bias + (states[-1].detach() if credit == "local" else states[-1]) @ W.T))
    with torch.no_grad():
        targets = [states[-1] - step * g[-1]]
        for t in range(len(g), 0, -1):
            before = inverse(layer["input"][0, t - 1], targets[0])
            if corrected:
                before += states[t - 1] - inverse(layer["input"][0, t - 1], states[t])
            targets.insert(0, before - step * g[t - 2] if t > 1 else before)
    loss = sum((h - v).square().sum() / 2 for h, v in zip(states[1:], targets[1:], strict=True))
    return [*torch.autograd.grad(loss, parameters), targets[0] - states[0]]


def assert_gradients_of_local_losses(actual: RNNGradients, expected: list[Tensor], step: float) -> None:
    for a, b in zip((actual.weight_ih, actual.weight_hh, actual.bias, -step * actual.h0), expected, strict=True):
        np.testing.assert_allclose(a[0], b.numpy(), rtol=1e-10, atol=1e-12)


def one_direction() -> Layer:
    whole = layer(ragged=False)
    return {key: value if key in ("input", "lengths", "nonlinearity") else value[:1] for key, value in whole.items()}


@both_implementations
@pytest.mark.parametrize("correction", ["difference", "none"])
@pytest.mark.parametrize("credit", CREDITS)
def test_gradients_are_those_of_the_local_losses(
    gradients_of: Callable[..., RNNGradients], correction: str, credit: str
) -> None:
    case, step, margin = one_direction(), 0.1, 1e-3
    R = torch.ops.tpext.regularized_inverse(case["weight_hh"][0], 1.0)

    def inverse(x: Tensor, h: Tensor) -> Tensor:
        return (h.clamp(margin - 1, 1 - margin).atanh() - x @ case["weight_ih"][0].T - case["bias"][0]) @ R.T

    options = {"reg": 1.0, "target_step": step, "margin": margin, "normalize": False}
    actual = gradients_of(case, correction=correction, credit=credit, **options)
    expected = local_losses(case, inverse, correction == "difference", step, credit)
    assert_gradients_of_local_losses(actual, expected, step)


@pytest.mark.parametrize("gradients_of", [by_learned_oracle, by_learned_ops], ids=["oracle", "ops"])
@pytest.mark.parametrize("credit", CREDITS)
def test_learned_gradients_are_those_of_the_local_losses(
    gradients_of: Callable[..., RNNGradients], credit: str
) -> None:
    case, step = one_direction(), 0.1
    V, c = torch.randn(1, 6, 6).double() / 2, torch.randn(1, 6).double()

    def inverse(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h @ V[0].T + c[0] + x @ case["weight_ih"][0].T)

    options = {"reverse_weight": V, "reverse_bias": c, "target_step": step, "credit": credit, "normalize": False}
    expected = local_losses(case, inverse, True, step, credit)
    assert_gradients_of_local_losses(gradients_of(case, **options), expected, step)


@both_implementations
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("correction", ["linearized", "difference"])
def test_a_great_ridge_through_time_is_backprop(
    gradients_of: Callable[..., RNNGradients], nonlinearity: str, correction: str
) -> None:
    """Targets then reach no earlier step, and the local losses' gradients through time are the loss's."""
    case = layer(nonlinearity=nonlinearity)
    actual = gradients_of(case, reg=1e16, credit="through_time", correction=correction)
    assert_equal_gradients(actual, backprop(case)._replace(h0=actual.h0), 1e-12)
    # A row without a step has its initial state for its final one.
    passed_on = case["grad_h_n"] * (case["lengths"] == 0)[:, None]
    assert np.abs(actual.h0 - passed_on.numpy()).max() < 1e-12


@both_implementations
def test_orthogonal_weights_without_ridge_are_backprop(gradients_of: Callable[..., RNNGradients]) -> None:
    """The inverse is then the transpose; with the identity and local credit nothing else differs."""
    case = layer(nonlinearity="identity")
    case["weight_hh"] = torch.linalg.qr(case["weight_hh"])[0]
    for correction in ("linearized", "difference"):
        assert_equal_gradients(gradients_of(case, reg=0.0, correction=correction), backprop(case), 1e-12)


@both_implementations
@pytest.mark.parametrize("credit", CREDITS)
def test_without_ridge_no_correction_is_the_difference(gradients_of: Callable[..., RNNGradients], credit: str) -> None:
    """An exact inverse needs no correction: it maps an undisplaced state to the state before."""
    case = layer()
    case["weight_hh"] = torch.linalg.qr(case["weight_hh"])[0] * 1.2
    case |= {key: case[key] / 4 for key in ("input", *GRADIENTS)}
    options = {"reg": 0.0, "credit": credit, "input_rule": "target"}
    plain, difference = (gradients_of(case, correction=correction, **options) for correction in ("none", "difference"))
    assert_equal_gradients(plain, difference, 1e-10)


@both_implementations
@pytest.mark.parametrize("input_rule", ["gradient", "target"])
@pytest.mark.parametrize("credit", CREDITS)
def test_linearized_needs_no_target_step(
    gradients_of: Callable[..., RNNGradients], input_rule: str, credit: str
) -> None:
    """With ``normalize`` it cancels; without, the parameters' gradients are proportional to it."""
    case, options = layer(), {"input_rule": input_rule, "credit": credit}
    one = gradients_of(case, target_step=1.0, **options)
    assert_equal_gradients(gradients_of(case, target_step=0.01, **options), one, 1e-12)
    scaled = gradients_of(case, target_step=0.01, normalize=False, **options)
    weights = {key: 0.01 * getattr(one, key) for key in ("weight_ih", "weight_hh", "bias")}
    assert_equal_gradients(scaled, one._replace(**weights), 1e-12)


@both_implementations
def test_corrections_agree_for_small_steps(gradients_of: Callable[..., RNNGradients]) -> None:
    case = layer()
    case["input"] = case["input"] / 4
    small = gradients_of(case, correction="difference", target_step=1e-8)
    assert_equal_gradients(small, gradients_of(case, correction="linearized"), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("credit", CREDITS)
def test_linearized_scales_with_the_gradient(dtype: torch.dtype, credit: str) -> None:
    """Exactly, for a power of two: so loss scaling and accumulation change nothing."""
    inputs = scan(7, 5, 33, 2, dtype, ragged=True, direction="mixed", enters="both")
    entering = ("grad_states", "at_end", "credit_at_end")
    scaled = inputs._replace(**{key: getattr(inputs, key) * 1024 for key in entering})
    for actual, expected in zip(
        rnn_target_scan(*target_arguments(scaled, "linearized", credit)),
        rnn_target_scan(*target_arguments(inputs, "linearized", credit)),
        strict=True,
    ):
        assert torch.equal(actual, expected * 1024)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_no_gradient_gives_exact_zeros(dtype: torch.dtype, nonlinearity: str) -> None:
    """Saturated units included, where a difference of inverses could leave rounding noise."""
    inputs = scan(7, 5, 33, 2, dtype, nonlinearity, ragged=True, direction="mixed")
    inputs.states[:, :, :, :4] = torch.tensor([1.0, 1 - MARGIN, 0.999, 0.0])
    for grad_states in (torch.zeros_like(inputs.grad_states), None):
        nothing = inputs._replace(grad_states=grad_states)
        for correction, credit in itertools.product(["linearized", "difference", "learned"], CREDITS):
            assert not any(output.any() for output in target_pass(nothing, correction, credit))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_saturated_states_stay_finite(dtype: torch.dtype, correction: str) -> None:
    inputs = scan(3, 5, 9, 2, dtype)
    inputs = inputs._replace(states=inputs.states.sign(), grad_states=inputs.grad_states * 100)
    arguments = target_arguments(inputs, correction, "through_time")
    assert all(output.isfinite().all() for output in rnn_target_scan(*arguments))
    check(arguments)


# Displacements far below the states' rounding.


@pytest.mark.parametrize("nonlinearity", ["tanh", "identity"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-20), (torch.float64, 1e-200)])
def test_tiny_differences_are_the_linearisation(dtype: torch.dtype, size: float, nonlinearity: str) -> None:
    """Next to displacements this small the second order is nothing, so the linearized oracle is the truth."""
    inputs = scan(7, 5, 33, 2, dtype, nonlinearity, ragged=True, direction="mixed")
    inputs = inputs._replace(grad_states=inputs.grad_states * size)

    arguments = target_arguments(inputs, "linearized", "through_time")

    def difference(*arguments: Any) -> tuple[Tensor, ...]:
        return rnn_target_scan(*arguments[:9], "difference", *arguments[10:])

    assert_close_to_oracle(difference, reference.rnn_target_scan, arguments)


@pytest.mark.parametrize("size", [1e-3, 1e-8])
@pytest.mark.parametrize("credit", CREDITS)
def test_small_differences_keep_their_digits(size: float, credit: str) -> None:
    inputs = scan(7, 5, 33, 2, torch.float32, ragged=True, direction="mixed")
    inputs = inputs._replace(grad_states=inputs.grad_states * size)
    arguments = target_arguments(inputs, "difference", credit)
    check(arguments)
    arguments = learned_arguments(inputs, credit)
    check_learned(arguments)


# Not a derivative, and not to be differentiated.


@pytest.mark.parametrize("variable", [0, 1, 2, 3, 4, 15, 16])
def test_differentiating_the_target_scan_raises(variable: int) -> None:
    arguments = list(target_arguments(scan(3, 2, 4, 1, enters="both"), "linearized", "local"))
    arguments[variable] = arguments[variable].requires_grad_()
    with pytest.raises(RuntimeError, match=r"tpext\.Backprop\(\)"):
        torch.autograd.grad(rnn_target_scan(*arguments)[0].sum(), arguments[variable])


@pytest.mark.parametrize("variable", [0, 1, 2, 3, 4, 11, 12])
def test_differentiating_the_learned_target_scan_raises(variable: int) -> None:
    arguments = list(learned_arguments(scan(3, 2, 4, 1, enters="both"), "local"))
    arguments[variable] = arguments[variable].requires_grad_()
    with pytest.raises(RuntimeError, match=r"tpext\.Backprop\(\)"):
        torch.autograd.grad(rnn_learned_target_scan(*arguments)[0].sum(), arguments[variable])


@pytest.mark.parametrize("grad_of", ["weight_hh", "input", "bias"])
def test_second_derivatives_of_a_layer_raise(grad_of: str) -> None:
    case = layer()
    case[grad_of].requires_grad_()
    arguments = {key: value for key, value in case.items() if key not in GRADIENTS}
    for output in target_rnn(**arguments, **OPTIONS):
        with pytest.raises(RuntimeError, match=r"tpext\.Backprop\(\)"):
            torch.autograd.grad(output.sum(), case[grad_of], create_graph=True)


def test_function_transforms_of_a_layer_raise() -> None:
    case = layer()
    arguments = {key: value for key, value in case.items() if key not in (*GRADIENTS, "input")}
    with pytest.raises(RuntimeError, match=r"tpext\.Backprop\(\)"):
        torch.func.grad(lambda input: target_rnn(input=input, **arguments, **OPTIONS)[0].sum())(case["input"])


# Fakes, checkpointing, autocast.


@pytest.mark.parametrize(
    "case",
    pairwise(
        dtype=DTYPES,
        ragged=[False, True],
        correction=CORRECTIONS,
        credit=CREDITS,
        norms=[False, True],
        moved=[False, True],
        enters=ENTERS,
    ),
    ids=name,
)
def test_opcheck(case: dict[str, Any]) -> None:
    inputs = scan(3, 3, 4, 2, case["dtype"], direction="mixed", enters=case["enters"])
    inputs = inputs._replace(lengths=torch.tensor([3, 0, 2]) if case["ragged"] else None)
    options = [case[key] for key in ("correction", "credit", "norms", "moved")]
    torch.library.opcheck(rnn_target_scan.default, target_arguments(inputs, *options))
    torch.library.opcheck(rnn_learned_target_scan.default, learned_arguments(inputs, case["credit"], case["norms"]))


@pytest.mark.parametrize("empty", ["T", "B"])
def test_opcheck_of_empty_inputs(empty: str) -> None:
    inputs = scan(**{"T": 3, "B": 4, "H": 5, "S": 2} | {empty: 0})
    torch.library.opcheck(rnn_target_scan.default, target_arguments(inputs, "none", "through_time"))
    torch.library.opcheck(rnn_learned_target_scan.default, learned_arguments(inputs, "local"))


def test_layer_under_checkpointing() -> None:
    def checkpointed(**arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.utils.checkpoint.checkpoint(target_rnn, use_reentrant=False, **arguments)

    case = layer()
    assert_equal_gradients(gradients(checkpointed, case, **OPTIONS), by_oracle(case), 1e-10)


def test_layer_under_autocast_works_in_float32() -> None:
    case = layer(ragged=False)
    case = {key: value.float() if isinstance(value, Tensor) else value for key, value in case.items()}
    entering = [case.pop(key) for key in GRADIENTS]
    variables = [case[key].requires_grad_() for key in RNNGradients._fields]
    expected_outputs = target_rnn(**case, **OPTIONS)
    expected = torch.autograd.grad(expected_outputs, variables, [g.bfloat16().float() for g in entering])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = target_rnn(**case, **OPTIONS)
    for a, b in zip(outputs, expected_outputs, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)
    for a, b in zip(torch.autograd.grad(outputs, variables, [g.bfloat16() for g in entering]), expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
