"""The CUDA path of the recurrent ops: on a GPU, and on the CPU by the emulation of the same kernels.

Tests that take ``device`` run on both. Sizes are such that the emulation, where each thread of a kernel is a fiber,
ends in a few minutes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeAlias

import pytest
import torch
from comparison import (
    DTYPES,
    LAYOUTS,
    MEMORY,
    SIZES,
    Composite,
    Scan,
    as_exact,
    assert_close_to_oracle,
    assert_no_worse,
    assert_same_bits,
    is_possible,
    layer,
    moved,
    name,
    pairwise,
    run_on,
    scan,
    select,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_member_numbers import NUMBERS, STACK, assert_members_equal_calls_of_their_own, with_numbers
from test_rnn_layer import gradient_arguments
from test_rnn_layer_backward import EACH_PAIR_OF_OPTIONS, case_of, with_argument
from test_rnn_layer_backward import backward_arguments as layer_backward_arguments
from test_rnn_layer_backward import check as check_layer_backward
from test_rnn_scan import backward_arguments, forward_arguments
from test_rnn_target_scan import ENTERS, ORACLE_ERROR, PASSES, learned_arguments, target_arguments
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tpext
from tpext import Backprop, LearnedInverse, RegularizedInverse, reference
from tpext.ops import _library, rnn_layer, rnn_target_scan

gpu = pytest.mark.gpu
ops = torch.ops.tpext
LOW = [torch.bfloat16, torch.float16]
KERNELS = ["block", "cluster", "grid"]
REGIMES = ["auto", *KERNELS, "step"]
OPTIONS = {key: LAYOUTS[key] for key in ("nonlinearity", "ragged", "direction", "contiguous")}
RULES = [
    Backprop(),
    RegularizedInverse(),
    RegularizedInverse(correction="difference", credit="local"),
    RegularizedInverse(correction="none", target_step=0.1, input_rule="target"),
    LearnedInverse(),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=str)


# Demands a regime of the scans that follow. False where the device cannot run such a scan so, which then must raise.
Demand: TypeAlias = Callable[[str, Scan, int], bool]
SMALL = {"T": 3, "B": 4, "H": 5, "S": 2}


@pytest.fixture
def demand(monkeypatch: pytest.MonkeyPatch) -> Demand:
    def demand(regime: str, inputs: Scan, products: int) -> bool:
        monkeypatch.setenv("TPEXT_CUDA_REGIME", regime)
        S, _, B, H = inputs.states.shape
        dtype = str(inputs.states.dtype).removeprefix("torch.")
        plan = functools.partial(_library.rnn_plan, products, dtype, S, B, H, 0, regime)
        return is_possible(regime, plan, empty=0 in (S, B, H))

    return demand


def products(rule: tuple[str, str]) -> int:
    """Products of H x H a step of a target pass."""
    return 2 if rule[1] == "through_time" else 1


# Against the oracle, in low precision against torch's own operations.


def check_against_oracle(
    op: Any, oracle: Any, composite: Any, arguments: tuple[Any, ...], device: torch.device
) -> None:
    run = run_on(device, op)
    dtype = next(argument.dtype for argument in arguments if isinstance(argument, Tensor))
    if dtype in LOW:
        result = run(*arguments)
        outputs = list(result) if isinstance(result, tuple) else [result]
        assert_no_worse(outputs, composite(*arguments), as_exact(oracle, arguments), dtype)
    else:
        assert_close_to_oracle(run, oracle, arguments, oracle_error=ORACLE_ERROR)


def check_scans(inputs: Scan, device: torch.device) -> None:
    forward = (ops.rnn_scan, reference.rnn_scan, Composite.scan)
    backward = (ops.rnn_scan_backward, reference.rnn_scan_backward, Composite.scan_backward)
    check_against_oracle(*forward, forward_arguments(inputs), device)
    check_against_oracle(*backward, backward_arguments(inputs), device)


def pass_arguments(inputs: Scan, rule: tuple[str, str], **options: bool) -> tuple[Any, ...]:
    """The arguments of a target pass; ``options`` are those of ``target_arguments``."""
    correction, credit = rule
    dtype = inputs.states.dtype
    # Made of float64: the inverse is not taken in low precision.
    exact = inputs._replace(**{key: as_dtype(value, torch.float64) for key, value in inputs._asdict().items()})
    if correction == "learned":
        arguments = learned_arguments(exact, credit, options.get("return_norms", True))
    else:
        # The bounds 1 - margin must be numbers of the dtype, or the composite inverts tanh at 1.
        margin = {"margin": 2.0**-6} if dtype in LOW else {}
        arguments = target_arguments(exact, correction, credit, **options, **margin)
    return tuple(as_dtype(argument, dtype) for argument in arguments)


def check_pass(inputs: Scan, rule: tuple[str, str], device: torch.device, **options: bool) -> None:
    passes = (ops.rnn_target_scan, reference.rnn_target_scan, Composite.target_scan)
    if rule[0] == "learned":
        passes = (ops.rnn_learned_target_scan, reference.rnn_learned_target_scan, Composite.learned_target_scan)
    check_against_oracle(*passes, pass_arguments(inputs, rule, **options), device)


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("case", pairwise(**SIZES, **OPTIONS, dtype=DTYPES, enters=ENTERS, regime=REGIMES), ids=name)
def test_scans_equal_the_oracle(case: dict[str, Any], device: torch.device, demand: Demand) -> None:
    inputs = scan(**{key: value for key, value in case.items() if key != "regime"})
    if demand(case["regime"], inputs, 1):
        check_scans(inputs, device)


@pytest.mark.parametrize(
    "case",
    pairwise(
        **SIZES,
        **OPTIONS,
        dtype=DTYPES,
        enters=ENTERS,
        rule=PASSES,
        return_norms=[False, True],
        return_displacement=[False, True],
        regime=REGIMES,
    ),
    ids=name,
)
def test_target_passes_equal_the_oracle(case: dict[str, Any], device: torch.device, demand: Demand) -> None:
    regime, rule = case["regime"], case["rule"]
    outputs = {key: case[key] for key in ("return_norms", "return_displacement")}
    inputs = scan(**{key: value for key, value in case.items() if key not in ("regime", "rule", *outputs)})
    if demand(regime, inputs, products(rule)):
        check_pass(inputs, rule, device, **outputs)


# Beyond the grid of sizes: each depth of weights that a kernel keeps on the chip.
@pytest.mark.parametrize("H", [*SIZES["H"], 128, 200, 512, 700, 1024])
@pytest.mark.parametrize("dtype", [*DTYPES, *LOW])
@pytest.mark.parametrize("regime", KERNELS)
def test_every_regime_at_every_width(
    regime: str, dtype: torch.dtype, H: int, device: torch.device, demand: Demand
) -> None:
    inputs = scan(3, 5, H, 1, dtype, ragged=True, enters="both")
    if demand(regime, inputs, 1):
        check_scans(inputs, device)
    for rule in [("linearized", "through_time"), ("learned", "local")]:
        if demand(regime, inputs, products(rule)):
            check_pass(inputs, rule, device)


@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("H", [100, 300, 600, 1024])
def test_the_regime_does_not_depend_on_the_batch(products: int, dtype: str, H: int, device: torch.device) -> None:
    """Another regime would sum in another order: a batch that is split must give the same bits."""
    regimes = {_library.rnn_plan(products, dtype, S, B, H, 0, "auto")[0] for S in (1, 3) for B in (1, 16, 64, 4096)}
    assert len(regimes) == 1


@pytest.mark.parametrize(
    "case", pairwise(**SIZES, **OPTIONS, dtype=LOW, enters=ENTERS, rule=PASSES, regime=REGIMES), ids=name
)
def test_low_precision_is_no_worse_than_torch(case: dict[str, Any], device: torch.device, demand: Demand) -> None:
    regime, rule = case["regime"], case["rule"]
    inputs = scan(**{key: value for key, value in case.items() if key not in ("regime", "rule")})
    if demand(regime, inputs, 1):
        check_scans(inputs, device)
    if demand(regime, inputs, products(rule)):
        check_pass(inputs, rule, device)


@pytest.mark.parametrize(
    "case",
    pairwise(
        **SIZES,
        nonlinearity=LAYOUTS["nonlinearity"],
        ragged=[False, True],
        direction=LAYOUTS["direction"],
        dtype=DTYPES,
        I=[1, 3, 40],
        bias=[False, True],
        memory=MEMORY,
        regime=REGIMES,
    ),
    ids=name,
)
def test_layers_equal_the_oracle(case: dict[str, Any], device: torch.device, demand: Demand) -> None:
    arguments = layer(**{key: value for key, value in case.items() if key != "regime"})
    sizes = scan(**{key: case[key] for key in ("T", "B", "H", "S", "dtype")})
    if demand(case["regime"], sizes, 1):
        terms = case["T"] + case["H"] + case["I"] + 1
        assert_close_to_oracle(run_on(device, ops.rnn_layer), reference.rnn_layer, arguments, terms=terms)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(0, 12),
    B=st.integers(0, 40),
    H=st.integers(1, 140) | st.sampled_from([160, 192, 200, 256, 320, 512]),
    S=st.integers(1, 3),
    dtype=st.sampled_from([*DTYPES, *LOW]),
    nonlinearity=st.sampled_from(LAYOUTS["nonlinearity"]),
    ragged=st.booleans(),
    direction=st.sampled_from(LAYOUTS["direction"]),
    enters=st.sampled_from(ENTERS),
    rule=st.sampled_from(PASSES),
    regime=st.sampled_from(REGIMES),
    seed=st.integers(0, 2**16),
)
def test_sizes_at_random(rule: tuple[str, str], regime: str, device: torch.device, demand: Demand, **case: Any) -> None:
    inputs = scan(**case)
    if demand(regime, inputs, 1):
        check_scans(inputs, device)
    if demand(regime, inputs, products(rule)):
        check_pass(inputs, rule, device)


def test_sizes_beyond_every_kernel_take_a_product_a_step(device: torch.device, demand: Demand) -> None:
    inputs = scan(3, 2, 4100, 1, torch.float64)
    for regime in KERNELS:
        assert not demand(regime, inputs, 1)
    assert demand("auto", inputs, 1)
    assert _library.rnn_plan(1, "float64", 1, 2, 4100, 0, "auto")[0] == "step"
    expected = Composite.scan(*forward_arguments(inputs))
    actual = run_on(device, ops.rnn_scan)(*forward_arguments(inputs))
    torch.testing.assert_close(actual, expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "B", "H", "S"), [(7, 5, 33, 2), (1, 3, 8, 1), (700, 9, 12, 2), (650, 17, 31, 1)])
@pytest.mark.parametrize(("ragged", "direction"), [(False, "forward"), (True, "mixed"), (True, "reverse")])
def test_weight_gradients_equal_the_oracle(
    T: int, B: int, H: int, S: int, dtype: torch.dtype, ragged: bool, direction: str, device: torch.device
) -> None:
    """Sums short and long enough to be cut."""
    arguments = gradient_arguments(scan(T, B, H, S, dtype, ragged=ragged, direction=direction))
    run = run_on(device, ops.rnn_weight_gradients)
    assert_close_to_oracle(run, reference.rnn_weight_gradients, arguments, terms=T * B + 1)


@pytest.mark.parametrize("dtype", LOW)
def test_weight_gradients_in_low_precision(dtype: torch.dtype, device: torch.device) -> None:
    arguments = gradient_arguments(scan(700, 9, 12, 1, dtype))
    delta, states, h0, input, *_, scale = arguments
    delta, before = delta[0].flatten(0, 1), torch.cat([h0, states[0, :-1]]).flatten(0, 1)
    peer = [scale * (delta.mT @ input[0].flatten(0, 1)), scale * (delta.mT @ before), scale * delta.sum(0)]
    actual = run_on(device, ops.rnn_weight_gradients)(*arguments)
    exact = as_exact(reference.rnn_weight_gradients, arguments)
    assert_no_worse(actual, [gradient[None] for gradient in peer], exact, dtype)


@pytest.mark.parametrize("options", EACH_PAIR_OF_OPTIONS[::3], ids=name)
def test_layer_backward_equals_the_oracle(options: dict[str, Any], device: torch.device) -> None:
    options = {key: value for key, value in options.items() if key != "threads"}
    check_layer_backward(case_of(options, T=7, B=5, H=9), run_on(device, ops.rnn_layer_backward))


@pytest.mark.parametrize("empty", ["T", "B", "H", "S"])
@pytest.mark.parametrize("ragged", [False, True])
def test_size_zero(empty: str, ragged: bool, device: torch.device) -> None:
    inputs = scan(**SMALL | {empty: 0}, ragged=ragged, enters="end")
    check_scans(inputs, device)
    gradients = run_on(device, ops.rnn_weight_gradients)(*gradient_arguments(scan(**SMALL | {empty: 0}, ragged=ragged)))
    assert empty not in "TB" or not any(gradient.any() for gradient in gradients)
    if empty != "H":
        for rule in PASSES:
            check_pass(inputs, rule, device)


def test_scans_have_their_true_derivatives(device: torch.device) -> None:
    inputs = moved(scan(2, 2, 3, 2, direction="mixed", enters="both"), device)
    rest = (moved(torch.tensor([2, 1]), device), inputs.reverse, "tanh")

    def forward(*tensors: Tensor) -> Tensor:
        return ops.rnn_scan(*tensors, *rest)

    def backward(grad_states: Tensor, states: Tensor, weight_hh: Tensor, grad_h_n: Tensor) -> Tensor:
        return ops.rnn_scan_backward(grad_states, states, weight_hh, *rest, grad_h_n)

    variables = [inputs.x_proj, inputs.h0, inputs.weight_hh]
    assert torch.autograd.gradgradcheck(forward, [v.requires_grad_() for v in variables])
    variables = [inputs.grad_states, inputs.states, inputs.weight_hh, inputs.credit_at_end]
    assert torch.autograd.gradcheck(backward, [v.requires_grad_() for v in variables])


# The same bits.


def every_output(inputs: Scan, device: torch.device) -> list[Tensor]:
    """All outputs of the four scans, those without time as ``[S, 1, B, H]``, on the CPU."""
    states = run_on(device, ops.rnn_scan)(*forward_arguments(inputs))
    found = [states, *run_on(device, ops.rnn_scan_backward)(*backward_arguments(inputs))]
    found += run_on(device, ops.rnn_target_scan)(*pass_arguments(inputs, ("difference", "through_time")))
    found += run_on(device, ops.rnn_learned_target_scan)(*pass_arguments(inputs, ("learned", "through_time")))
    found += layer_backward(inputs, device)
    return [output.unsqueeze(1) if output.shape == inputs.h0.shape else output for output in found]


def layer_backward(inputs: Scan, device: torch.device) -> list[Tensor]:
    """What of a layer's backward pass belongs to a row, but the input's gradient: a product of torch's, whose bits may
    change with the number of rows."""
    exact = inputs._replace(**{key: as_dtype(value, torch.float64) for key, value in inputs._asdict().items()})
    exact = exact._replace(input=exact.input.expand(exact.states.shape[0], -1, -1, -1))
    arguments = layer_backward_arguments(exact, ("difference", "through_time", True))
    # a member's is to be the same where it is alone
    arguments = with_argument(arguments, input_feedback=exact.weight_hh[..., : exact.input.shape[-1]])
    arguments = tuple(as_dtype(argument, inputs.states.dtype) for argument in arguments)
    *_, disp_h0, credit_h0 = run_on(device, ops.rnn_layer_backward)(*arguments)
    return [disp_h0, credit_h0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("regime", KERNELS)
def test_repetition_and_batch_split(regime: str, dtype: torch.dtype, device: torch.device, demand: Demand) -> None:
    inputs = scan(5, 17, 33, 2, dtype, ragged=True, direction="mixed", enters="both")
    assert demand(regime, inputs, 2)
    expected = every_output(inputs, device)
    assert_same_bits(every_output(inputs, device), expected)
    for split in (1, 5, 16):
        parts = [every_output(select(inputs, rows=rows), device) for rows in (slice(split), slice(split, None))]
        assert_same_bits([torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)], expected)


@pytest.mark.parametrize("regime", KERNELS)
def test_stack_and_its_members_alone(regime: str, device: torch.device, demand: Demand) -> None:
    inputs = scan(5, 6, 31, 3, torch.float32, ragged=True, direction="mixed", enters="both")
    assert demand(regime, inputs, 2)
    shared = ("input", "lengths", "nonlinearity")
    members = [
        inputs._replace(**{key: value[s : s + 1] for key, value in inputs._asdict().items() if key not in shared})
        for s in range(3)
    ]
    parts = [every_output(member, device) for member in members]
    assert_same_bits([torch.cat(group) for group in zip(*parts, strict=True)], every_output(inputs, device))


@pytest.mark.parametrize("regime", ["auto", "step"])
@pytest.mark.parametrize("rule", PASSES[::3], ids=str)
def test_members_with_numbers_of_their_own(
    rule: tuple[str, str], regime: str, device: torch.device, demand: Demand
) -> None:
    """Kernels take one number for all: the members run one after another."""
    inputs = scan(5, 6, 31, STACK, torch.float32, ragged=True, direction="mixed", enters="both", own_inputs=True)
    assert demand(regime, inputs, 2)
    if rule[0] == "learned":
        call: Any = rnn_target_scan._Learned(*learned_arguments(inputs, rule[1]))
        op = ops.rnn_learned_target_scan
    else:
        call, op = rnn_target_scan._Target(*target_arguments(inputs, *rule)), ops.rnn_target_scan
    assert_members_equal_calls_of_their_own(run_on(device, op), with_numbers(call, NUMBERS))
    layers = rnn_layer._Backward(*layer_backward_arguments(inputs, (*rule, False)))
    assert_members_equal_calls_of_their_own(run_on(device, ops.rnn_layer_backward), with_numbers(layers, NUMBERS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (31, 32), (70, 60), (140, 130)])
def test_inverses_with_ridges_of_their_own(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    weight, reg = torch.randn(3, *shape, dtype=dtype), [0.5, 0.0, 3.0]
    inverse = run_on(device, ops.regularized_inverse)
    alone = [inverse(*pair) for pair in zip(weight.split(1), reg, strict=True)]
    assert_same_bits([inverse(weight, reg)], [torch.cat(alone)])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_lengths_out_of_range_are_clamped(regime: str, direction: str, device: torch.device, demand: Demand) -> None:
    inputs = scan(4, 5, 9, 2, torch.float32, direction=direction, enters="both")
    assert demand(regime, inputs, 2)
    far, near = torch.tensor([9, -3, 4, 2, 2**62]), torch.tensor([4, 0, 4, 2, 4])
    given, clamped = (inputs._replace(lengths=lengths) for lengths in (far, near))
    assert_same_bits(every_output(given, device), every_output(clamped, device))
    run = run_on(device, ops.rnn_weight_gradients)
    delta = inputs.grad_states.masked_fill((torch.arange(4)[:, None] >= near)[..., None], 0)
    gradients = [
        run(delta, inputs.states, inputs.h0, inputs.input, lengths, inputs.reverse, 1.0) for lengths in (far, near)
    ]
    assert_same_bits(*gradients)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN, or the greatest integer, before an op can write to it."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("enters", ["states", "end"])
def test_every_element_is_written(regime: str, enters: str, device: torch.device, demand: Demand) -> None:
    inputs = scan(4, 5, 33, 2, torch.float32, ragged=True, direction="mixed", enters=enters)
    assert demand(regime, inputs, 2)
    with poisoned():
        assert moved(torch.ones(3), device).new_empty(3).isnan().all()
        for output in every_output(inputs, device):
            assert output.isfinite().all()


# Whole networks.


def network(rule: tpext.rules.Rule, dtype: torch.dtype, device: torch.device, **options: Any) -> list[Tensor]:
    """Outputs and gradients of two layers in two directions on a ragged batch, on the CPU."""
    torch.manual_seed(3)
    rnn = tpext.nn.RNN(3, 19, 2, bidirectional=True, rule=rule, dtype=torch.float64, **options).to(device, dtype)
    input, hx = (torch.randn(*size).double().to(device, dtype).requires_grad_() for size in [(6, 4, 3), (4, 4, 19)])
    output, h_n = rnn(input, hx, lengths=torch.tensor([6, 0, 2, 5], device=device))
    ((output**2).sum() + h_n.sin().sum()).backward()
    gradients = [parameter.grad for parameter in rnn.parameters() if parameter.grad is not None]
    return [tensor.detach().cpu() for tensor in (output, h_n, input.grad, hx.grad, *gradients)]


@pytest.fixture(scope="module")
def on_the_cpu() -> dict[tuple[str, torch.dtype], list[Tensor]]:
    """What the CPU kernels give. A fixture of the module's is made before a test's emulation begins."""
    cpu = torch.device("cpu")
    return {(str(rule), dtype): network(rule, dtype, cpu) for rule in RULES for dtype in DTYPES}


@each_rule
@pytest.mark.parametrize("regime", ["auto", "step"])
def test_networks_equal_those_on_the_cpu(
    rule: tpext.rules.Rule,
    regime: str,
    on_the_cpu: dict[tuple[str, torch.dtype], list[Tensor]],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TPEXT_CUDA_REGIME", regime)
    exact = on_the_cpu[str(rule), torch.float64]
    for actual, expected in zip(network(rule, torch.float64, device), exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    peer = on_the_cpu[str(rule), torch.float32]
    arrays = [tensor.numpy() for tensor in exact]
    assert_no_worse(network(rule, torch.float32, device), peer, arrays, torch.float32, times=4)


@each_rule
def test_pieces_equal_the_whole(rule: tpext.rules.Rule, device: torch.device) -> None:
    found = []
    for every in (None, 3):
        torch.manual_seed(3)
        rnn = tpext.nn.RNN(
            3, 9, 2, bidirectional=True, rule=rule, dtype=torch.float64, checkpoint_every=every, device=device
        )
        input = torch.randn(8, 4, 3, dtype=torch.float64).to(device)
        output, h_n = rnn(input, lengths=torch.tensor([8, 0, 3, 5], device=device))
        (output.square().sum() + h_n.square().sum()).backward()
        found.append([h_n, *(p.grad for p in rnn.parameters() if p.grad is not None)])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-12)


def test_packed_sequence_is_the_padded_batch(device: torch.device) -> None:
    rnn = tpext.nn.RNN(3, 9, bidirectional=True, rule=Backprop(), device=device)
    input, lengths = torch.randn(6, 4, 3).to(device), torch.tensor([6, 1, 2, 5])
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    output, h_n = rnn(packed)
    padded = rnn(input, lengths=lengths.to(device))
    torch.testing.assert_close((pad_packed_sequence(output)[0], h_n), padded)


# What the emulation alone can show.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", KERNELS)
def test_no_schedule_changes_a_bit(regime: str, dtype: torch.dtype, emulation: ModuleType, demand: Demand) -> None:
    inputs = scan(4, 5, 70, 2, dtype, ragged=True, direction="mixed", enters="both")
    assert demand(regime, inputs, 2)
    cpu = torch.device("cpu")
    expected = every_output(inputs, cpu)
    try:
        for seed in (1, 2, 3):
            emulation.set_emulation_seed(seed)
            assert_same_bits(every_output(inputs, cpu), expected)
    finally:
        emulation.set_emulation_seed(int(os.environ.get("TPEXT_EMULATION_SEED", 0)))


def test_no_clusters_before_sm_90(emulation: ModuleType, demand: Demand) -> None:
    emulation.set_emulated_limits(capability=80, multiprocessors=108, shared_memory=166912)
    try:
        for H, dtype in itertools.product([16, 100, 256, 512, 1024], [*DTYPES, *LOW]):
            inputs = scan(1, 8, H, 1, dtype)
            assert not demand("cluster", inputs, 1)
            plan = _library.rnn_plan(1, str(dtype).removeprefix("torch."), 1, 8, H, 0, "auto")
            assert plan[0] in ("block", "grid", "step")
        for regime in ("auto", "grid"):
            inputs = scan(3, 5, 100, 1, torch.float32, enters="both")
            assert demand(regime, inputs, 2)
            check_scans(inputs, torch.device("cpu"))
            check_pass(inputs, ("linearized", "through_time"), torch.device("cpu"))
    finally:
        emulation.set_emulated_limits(capability=90, multiprocessors=132, shared_memory=232448)


# What a GPU alone can show.


def training_step(rnn: nn.Module, input: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """Gradients of one step, and its loss."""
    for parameter in rnn.parameters():
        parameter.grad = None
    output, h_n = rnn(input, lengths=lengths)
    loss = output.square().mean() + h_n.mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in rnn.parameters() if p.grad is not None)]


@gpu
@each_rule
@pytest.mark.parametrize("H", [32, 600])
def test_nothing_waits_for_the_device(rule: tpext.rules.Rule, H: int) -> None:
    rnn = tpext.nn.RNN(3, H, 2, bidirectional=True, rule=rule).cuda()
    input, lengths = torch.randn(7, 5, 3, device="cuda"), torch.tensor([7, 0, 3, 5, 1])
    packed = pack_padded_sequence(input, lengths.clamp(min=1), enforce_sorted=False)
    ragged = lengths.cuda()
    piecewise = tpext.nn.RNN(3, H, rule=rule, return_sequence=False, checkpoint_every=2).cuda()
    training_step(rnn, input)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in (None, lengths, ragged):
            training_step(rnn, input, given)
            piecewise(input, lengths=given)[1].sum().backward()
        rnn(packed)[0].data.sum().backward()
        if isinstance(rule, LearnedInverse):
            rnn.reconstruction_loss(input, lengths=ragged).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_lengths_on_the_cpu_are_checked_and_moved() -> None:
    rnn = tpext.nn.RNN(3, 8).cuda()
    input, lengths = torch.randn(7, 3, 3, device="cuda"), torch.tensor([7, 0, 3])
    assert_same_bits(rnn(input, lengths=lengths), rnn(input, lengths=lengths.cuda()))
    with pytest.raises(ValueError, match=r"lengths must lie in 0\.\.T=7"):
        rnn(input, lengths=torch.tensor([8, 0, 3]))


@gpu
@each_rule
@pytest.mark.parametrize("regime", REGIMES)
def test_runs_on_the_current_stream(rule: tpext.rules.Rule, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input comes late on a side stream: a kernel on another would read what stood there before."""
    monkeypatch.setenv("TPEXT_CUDA_REGIME", regime)
    rnn = tpext.nn.RNN(3, 100, rule=rule).cuda()
    late = torch.randn(9, 5, 3, device="cuda")
    expected = training_step(rnn, late)
    input, stream = torch.zeros_like(late), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        input.copy_(late)
        actual = training_step(rnn, input)
    stream.synchronize()
    assert_same_bits(actual, expected)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_rule
@pytest.mark.parametrize("regime", REGIMES)
def test_second_device(rule: tpext.rules.Rule, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPEXT_CUDA_REGIME", regime)
    rnn, input = tpext.nn.RNN(3, 100, 2, bidirectional=True, rule=rule), torch.randn(9, 5, 3)
    expected = [tensor.cpu() for tensor in training_step(rnn.cuda(), input.cuda())]
    actual = training_step(rnn.to("cuda:1"), input.to("cuda:1"))
    assert all(tensor.device == torch.device("cuda:1") for tensor in actual)
    assert_same_bits([tensor.cpu() for tensor in actual], expected)


@gpu
@each_rule
@pytest.mark.parametrize("regime", REGIMES)
def test_cuda_graph_of_a_training_step(rule: tpext.rules.Rule, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPEXT_CUDA_REGIME", regime)
    rnn = tpext.nn.RNN(3, 100, 2, bidirectional=True, rule=rule).cuda()
    lengths = torch.tensor([9, 0, 3, 5, 1], device="cuda")
    input = torch.randn(9, 5, 3, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training_step(rnn, input, lengths)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(rnn, input, lengths)
    for _ in range(3):
        input.copy_(torch.randn_like(input))
        lengths.copy_(torch.randint_like(lengths, 0, 10))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        eager = training_step(rnn, input.clone(), lengths.clone())
        assert_same_bits(replayed, eager)


@gpu
@each_rule
def test_compiled_with_cuda_graphs(rule: tpext.rules.Rule) -> None:
    pytest.importorskip("triton")
    rnn = tpext.nn.RNN(3, 64, rule=rule).cuda()
    compiled = torch.compile(rnn, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        input = torch.randn(9, 5, 3, device="cuda")
        actual = [tensor.clone() for tensor in training_step(compiled, input)]
        for a, b in zip(actual, training_step(rnn, input), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.parametrize("dtype", LOW)
@each_rule
def test_autocast_runs_in_its_dtype(rule: tpext.rules.Rule, dtype: torch.dtype) -> None:
    rnn = tpext.nn.RNN(3, 64, 2, bidirectional=True, rule=rule).cuda()
    input = torch.randn(9, 5, 3, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        output, h_n = rnn(input)
    assert (output.dtype, h_n.dtype) == (dtype, dtype)
    (output.float().square().mean() + h_n.float().mean()).backward()
    trained = [p.grad for p in rnn.parameters() if p.grad is not None]
    assert trained
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in trained)
    wide = tpext.nn.RNN(3, 64, dtype=torch.float64, rule=rule).cuda()
    with torch.autocast("cuda", dtype=dtype):
        assert wide(input.double())[0].dtype == torch.float64


@gpu
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("H", [64, 100, 512])
def test_autocast_is_no_worse_than_cudnn(dtype: torch.dtype, H: int) -> None:
    rnn = tpext.nn.RNN(3, H, rule=Backprop()).cuda()
    plain, exact = rnn.to_torch(), tpext.nn.RNN(3, H, rule=Backprop(), dtype=torch.float64)
    exact.load_state_dict(rnn.state_dict())
    input = torch.randn(20, 16, 3)

    def found(module: nn.Module, input: Tensor) -> list[Tensor]:
        for parameter in module.parameters():
            parameter.grad = None
        output, _ = module(input)
        (output.double().square().sum() / 100).backward()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        return [tensor.detach().cpu() for tensor in (output, *gradients)]

    want = [tensor.numpy() for tensor in found(exact, input.double())]
    with torch.autocast("cuda", dtype=dtype):
        ours, peer = found(rnn, input.cuda()), found(plain, input.cuda())
    assert_no_worse([tensor.to(dtype) for tensor in ours], peer, want, dtype)


@gpu
def test_gradient_scaler_with_a_linear_rule() -> None:
    rnn = tpext.nn.RNN(3, 64, rule=RegularizedInverse()).cuda()
    input = torch.randn(9, 5, 3, device="cuda")

    def gradients(scale: float) -> list[Tensor]:
        optimizer = torch.optim.SGD(rnn.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cuda", init_scale=scale)
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = rnn(input)[1].float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale, "a step with finite gradients must not be skipped"
        return [parameter.grad.clone() for parameter in rnn.parameters()]

    for a, b in zip(gradients(2.0**4), gradients(2.0**10), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-4)


@gpu
@pytest.mark.parametrize("dtype", [*DTYPES, *LOW])
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = scan(3, 3, 4, 2, torch.float64, direction="mixed", enters="both")
    arguments = {
        ops.rnn_scan: forward_arguments(inputs),
        ops.rnn_scan_backward: backward_arguments(inputs),
        ops.rnn_target_scan: target_arguments(inputs, "difference", "through_time"),
        ops.rnn_learned_target_scan: learned_arguments(inputs, "local"),
        ops.rnn_layer_backward: layer_backward_arguments(inputs, ("difference", "through_time", True)),
    }
    for op, exact in arguments.items():
        on_gpu = moved(tuple(as_dtype(argument, dtype) for argument in exact), torch.device("cuda"))
        torch.library.opcheck(op.default, on_gpu)
