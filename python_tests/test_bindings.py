"""Wrong input to kernels and ops: an error that names op and argument, or a result; never a crash."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bindings_cases import (
    CAPABILITIES,
    CPU,
    ENTRIES,
    ENTRY_OF,
    LEADING,
    NUMBERS,
    OPS,
    OPTIONAL,
    SIZES,
    Claimed,
    Unexported,
    assert_refused,
    call_entry,
    call_op,
    each_entry,
    each_tensor_of_an_entry,
    each_tensor_of_an_op,
    entry_arguments,
    entry_error,
    op_arguments,
    spread,
    tensors_of,
)
from comparison import scan
from native_memory import Exporter, Fenced, consumed, foreign_capsule, misaligned
from torch import Tensor

import tpext
from tpext import _C

WRONG_TENSORS = {
    "integer": lambda tensor: tensor.to(torch.int32),
    "other precision": lambda tensor: tensor.to(torch.float64 if tensor.is_floating_point() else torch.int16),
    "half precision": lambda tensor: tensor.to(torch.bfloat16),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "no dimension": lambda tensor: tensor.flatten()[0].clone(),
    "rank too low": lambda tensor: tensor[0].clone(),
    "rank too high": lambda tensor: tensor[None].clone(),
    "another size": lambda tensor: torch.cat([tensor, tensor], dim=-1),
    "size zero": lambda tensor: tensor[..., :0].clone(),
    "gaps": spread,
    "repeated elements": lambda tensor: tensor[..., :1].expand(tensor.shape),
}


# The entries of `_C`.


@each_entry
def test_entry_gives_what_the_op_gives(op: str) -> None:
    arguments = entry_arguments(op)
    call_entry(op, arguments)
    expected = call_op(op, op_arguments(op))
    expected = [expected] if isinstance(expected, Tensor) else expected
    for output, b in zip(ENTRIES[op], expected, strict=True):
        assert torch.equal(arguments[output], b), output


@each_entry
def test_entry_writes_the_same_without_the_optional_outputs(op: str) -> None:
    whole = entry_arguments(op)
    call_entry(op, whole)
    for output in OPTIONAL[op] & ENTRIES[op].keys():
        arguments = entry_arguments(op) | {output: None}
        call_entry(op, arguments)
        for other in ENTRIES[op].keys() - {output}:
            assert torch.equal(arguments[other], whole[other]), f"{other} without {output}"


@each_entry
def test_entry_takes_what_is_absent_for_zero(op: str) -> None:
    for argument in OPTIONAL[op] - ENTRIES[op].keys() - {"lengths"}:
        absent, zero = entry_arguments(op), entry_arguments(op)
        absent[argument], zero[argument] = None, torch.zeros_like(zero[argument])
        for arguments in (absent, zero):
            call_entry(op, arguments)
        for output in ENTRIES[op]:
            assert torch.equal(absent[output], zero[output]), f"{output} without {argument}"


@pytest.mark.parametrize("op", [op for op in ENTRIES if "input" in entry_arguments(op) and op != "rnn_scan"])
@pytest.mark.parametrize("members", [1, SIZES["S"]])
def test_entry_reads_an_input_of_any_strides_in_place(op: str, members: int) -> None:
    input = scan(**SIZES, dtype=torch.float32, own_inputs=members > 1).input
    plain = entry_arguments(op) | {"input": input}
    call_entry(op, plain)
    N, T, B, I = input.shape  # noqa: E741
    batch_first = torch.empty(N, B, T, I).transpose(1, 2)
    members_last = torch.empty(T, B, N, I).permute(2, 0, 1, 3)
    gaps = torch.full((N + 1, B, T + 2, 2 * I), torch.nan).transpose(1, 2)[1:, 1:-1, :, :I]
    for memory in (batch_first, members_last, gaps):
        if memory is members_last and N == 1:
            continue
        arguments = entry_arguments(op) | {"input": memory.copy_(input)}
        assert not arguments["input"].is_contiguous()
        call_entry(op, arguments)
        for output in ENTRIES[op]:
            assert torch.equal(arguments[output], plain[output])


def test_entry_of_the_scan_needs_a_projection_or_an_input() -> None:
    arguments = entry_arguments("rnn_scan") | {"x_proj": None}
    with pytest.raises(TypeError, match=r"^rnn_scan: \w+ must be "):
        call_entry("rnn_scan", arguments)


def test_local_credit_ignores_what_is_for_the_other() -> None:
    for op in ("rnn_target_scan", "rnn_learned_target_scan", "rnn_layer_backward", "gated_layer_backward"):
        given = entry_arguments(op) | {"credit": "local"}
        credit = {argument for argument in given if argument.startswith("credit_")}
        without = entry_arguments(op) | {"credit": "local"} | dict.fromkeys(credit)
        for arguments in (without, given):
            call_entry(op, arguments)
        for output in ENTRIES[op].keys() & credit:
            assert given[output].isnan().all(), "not written"
        for output in ENTRIES[op].keys() - credit:
            assert torch.equal(without[output], given[output])


@each_entry
def test_entry_takes_arrays(op: str) -> None:
    arguments = entry_arguments(op)
    call_entry(op, {key: value.numpy() if isinstance(value, Tensor) else value for key, value in arguments.items()})


@each_tensor_of_an_entry
def test_entry_refuses_a_wrong_tensor(op: str, argument: str) -> None:
    arguments = entry_arguments(op)
    values = {kind: make(arguments[argument]) for kind, make in WRONG_TENSORS.items()}
    # The size that an input alone has is found wrong in another argument.
    named = r"\w+" if argument in (LEADING[op], "input") else argument
    assert_refused(call_entry, op, arguments, argument, values, f"{entry_error(op)}{named} must be ")


NOT_TENSORS = {
    "number": lambda tensor: 5,
    "text": lambda tensor: "x",
    "list": lambda tensor: tensor.tolist(),
    "exporter of a number": lambda tensor: Exporter(5),
    "exporter of None": lambda tensor: Exporter(None),
    "capsule of another name": lambda tensor: foreign_capsule(1, b"not a tensor"),
    "versioned capsule": lambda tensor: foreign_capsule(1, b"dltensor_versioned"),
    "consumed capsule": lambda tensor: consumed(tensor.numpy()),
}


@each_tensor_of_an_entry
def test_entry_refuses_what_is_no_tensor(op: str, argument: str) -> None:
    arguments = entry_arguments(op)
    values = {kind: make(arguments[argument]) for kind, make in NOT_TENSORS.items()}
    assert_refused(call_entry, op, arguments, argument, values, f"{entry_error(op)}{argument} must be ")


@each_tensor_of_an_entry
def test_entry_refuses_none_unless_optional(op: str, argument: str) -> None:
    arguments = entry_arguments(op) | {argument: None}
    if argument in OPTIONAL[op]:
        call_entry(op, arguments)
    else:
        # Without x_proj the scan looks for an input.
        named = r"\w+" if argument == "x_proj" and op == "rnn_scan" else argument
        with pytest.raises(TypeError, match=rf"^{entry_error(op)}{named} must be "):
            call_entry(op, arguments)


@each_entry
def test_entry_refuses_negative_sizes(op: str) -> None:
    leading = entry_arguments(op)[LEADING[op]]
    value = Claimed(leading, CPU, shape=[*leading.shape[:-1], -1])
    with pytest.raises(ValueError, match=f"{entry_error(op)}{LEADING[op]} must have sizes >= 0, got "):
        call_entry(op, entry_arguments(op) | {LEADING[op]: value})


@each_entry
@pytest.mark.parametrize("sizes", [(2**62, 2**62), (2**45, 1), (0, 2**62)])
def test_entry_refuses_sizes_that_no_memory_has(op: str, sizes: tuple[int, int]) -> None:
    leading = entry_arguments(op)[LEADING[op]]
    value = Claimed(leading, CPU, shape=[*leading.shape[:-2], *sizes])
    with pytest.raises(ValueError, match=f"{entry_error(op)}{LEADING[op]} must have sizes for at most 2\\^48 bytes"):
        call_entry(op, entry_arguments(op) | {LEADING[op]: value})


@each_tensor_of_an_entry
def test_entry_refuses_elements_between_two_places(op: str, argument: str) -> None:
    """NumPy exports arrays at any address; what a compiler makes of the kernels relies on whole multiples."""
    arguments = entry_arguments(op)
    moved = misaligned(arguments[argument].numpy())
    with pytest.raises(
        ValueError, match=f"{entry_error(op)}{argument} must have its elements at multiples of their size"
    ):
        call_entry(op, arguments | {argument: moved})


UNEXPORTABLE = {
    "on the meta device": lambda tensor: tensor.to("meta"),
    "requiring a gradient": lambda tensor: tensor.float().requires_grad_(),
    "conjugate": lambda tensor: tensor.to(torch.complex64).conj(),
    "a class": lambda tensor: Tensor,
}


@each_tensor_of_an_entry
def test_entry_refuses_what_cannot_be_exported(op: str, argument: str) -> None:
    """The error that ``__dlpack__`` itself raises is the cause, and is told with op and argument."""
    arguments = entry_arguments(op)
    values = {kind: Unexported(make(arguments[argument])) for kind, make in UNEXPORTABLE.items()}
    assert_refused(call_entry, op, arguments, argument, values, f"{entry_error(op)}{argument} ")


WRONG_OPTIONS = {
    **{number: [["large"], None, 1.0, [], [1.0] * 3] for number in NUMBERS},
    "nonlinearity": ["sigmoid", "", None, 3],
    "correction": ["quadratic", None],
    "credit": ["global", None],
    "slope": ["steep", None],
    "gate_slope": ["steep", None],
    "candidate_slope": ["steep", None],
    "inverse": ["jacobian", None],
    "cell": ["elman", None],
    "reverse": [[True], [True] * 3, "ab", None],
    "execution": [0, -1, 2**40, 2**80, 1.0, "two", None, (0, "auto", None)],
    "of_displacement": ["yes"],
    "transposed": ["yes"],
}


@each_entry
def test_entry_refuses_wrong_options(op: str) -> None:
    arguments = entry_arguments(op)
    for argument in WRONG_OPTIONS.keys() & arguments.keys():
        values = {repr(value): value for value in WRONG_OPTIONS[argument]}
        assert_refused(call_entry, op, arguments, argument, values, f"{ENTRY_OF.get(op, op)}.*{argument}")


@each_entry
def test_entry_with_more_threads_than_work(op: str) -> None:
    call_entry(op, entry_arguments(op) | {"execution": 1024})
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match=rf"{entry_error(op)}execution must lie in 1..1024 .*, got {threads}"):
            call_entry(op, entry_arguments(op) | {"execution": threads})


@each_entry
@pytest.mark.parametrize("lengths", [[-5, 0, 1, 100], [2**62, -(2**62), 3, 3]])
def test_entry_bounds_lengths_out_of_range(op: str, lengths: list[int]) -> None:
    """The ops refuse them; the kernels still read and write inside their arrays."""
    wild, bounded = entry_arguments(op), entry_arguments(op)
    wild["lengths"] = torch.tensor(lengths)
    bounded["lengths"] = wild["lengths"].clamp(0, SIZES["T"])
    for arguments in (wild, bounded):
        call_entry(op, arguments)
    for key in tensors_of(wild):
        if key != "lengths":
            assert torch.equal(wild[key].nan_to_num(), bounded[key].nan_to_num())


@each_entry
@pytest.mark.parametrize("empty", [("T",), ("B",), ("H",), ("S",), ("I",), ("S", "T", "B", "H")], ids="".join)
def test_entry_takes_empty_sizes(op: str, empty: tuple[str, ...]) -> None:
    arguments = entry_arguments(op, **dict.fromkeys(empty, 0))
    call_entry(op, arguments)


@each_tensor_of_an_entry
def test_entry_takes_numbers_that_are_not_finite(op: str, argument: str) -> None:
    arguments = entry_arguments(op)
    if arguments[argument].is_floating_point():
        for value in (torch.nan, torch.inf):
            call_entry(op, arguments | {argument: torch.full_like(arguments[argument], value)})


def test_nan_in_the_weights_reaches_the_outputs() -> None:
    for op in OPS.keys() - {"rnn_weight_gradients"}:
        arguments = op_arguments(op)
        finite = {key: v.nan_to_num() for key, v in arguments.items() if isinstance(v, Tensor)}
        finite["weight_hh"][:] = torch.nan
        outputs = call_op(op, arguments | finite | {"lengths": None})
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
        assert first.isnan().any(), op


@each_entry
def test_entry_refuses_missing_and_unknown_arguments(op: str) -> None:
    arguments = entry_arguments(op)
    with pytest.raises(TypeError, match=ENTRY_OF.get(op, op)):
        call_entry(op, arguments | {"dropout": 0.5})
    arguments.popitem()
    with pytest.raises(TypeError, match=ENTRY_OF.get(op, op)):
        call_entry(op, arguments)


def call_entries_between_fences() -> None:
    """Every entry with sizes around those of vectors; ends the process where one reads or writes beside an array."""
    widths = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33]
    for op, H, dtype, against_end in itertools.product(ENTRIES, widths, [torch.float32, torch.float64], [False, True]):
        calls = [({"B": 1, "I": 17}, {}), ({"B": 7, "I": 1}, {}), ({"B": 13, "I": 8}, {})]
        if op == "rnn_layer_backward":
            # several tiles of time, what is handed down, and a batch that is taken by whole arrays
            calls += [({"B": 13, "I": 8, "T": 33}, {"of_displacement": True}), ({"B": 150, "I": 3, "T": 2}, {})]
        if op == "gated_layer_backward":
            # the same, and the chain rule with local credit
            chain = {"gate_slope": "derivative", "candidate_slope": "derivative", "credit": "local"}
            calls += [({"B": 13, "I": 8, "T": 33}, chain), ({"B": 150, "I": 3, "T": 2}, {})]
        for sizes, options in calls:
            fenced, arguments = Fenced(against_end), entry_arguments(op, H=H, **sizes) | options
            for key in tensors_of(arguments):
                floating = arguments[key].is_floating_point()
                value = arguments[key].to(dtype) if floating else arguments[key]
                arguments[key] = torch.from_numpy(fenced(value.numpy()))
            call_entry(op, arguments)
    # The pages are still in use by tensors, and taken down with the process.
    os._exit(0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages by Linux's mprotect")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_touch_nothing_beside_their_arrays(capability: str) -> None:
    if capability not in tpext.build_info()["cpu_capabilities"] or not supported(capability):
        pytest.skip(f"no {capability} here")
    finished = run_with(capability, "-c", "import test_bindings; test_bindings.call_entries_between_fences()")
    assert finished.returncode == 0, finished.stderr[-4000:]


# torch.ops.tpext.


@each_tensor_of_an_op
def test_op_refuses_a_wrong_tensor(op: str, argument: str) -> None:
    arguments = op_arguments(op)
    values = {kind: make(arguments[argument]) for kind, make in WRONG_TENSORS.items()}
    # The ops make their inputs dense themselves.
    del values["gaps"], values["repeated elements"]
    values["on another device"] = arguments[argument].to("meta")
    if (op, argument) == ("rnn_weight_gradients", "input"):
        # Any number of inputs will do.
        del values["another size"], values["size zero"]
    # Layers take their hidden size from h0, their backward passes the number of inputs from the input.
    gives_a_size = {"rnn_layer": ["h0"], "rnn_layer_backward": ["input"]}
    gives_a_size |= {"gated_layer": ["h0"], "gated_layer_backward": ["h0", "input"]}
    named = r"\w+" if argument in [OPS[op], *gives_a_size.get(op, [])] else argument
    assert_refused(call_op, op, arguments, argument, values, f"{op}: {named} must ")


@pytest.mark.parametrize("op", OPS)
def test_op_refuses_lengths_out_of_range(op: str) -> None:
    values = {repr(lengths): torch.tensor(lengths) for lengths in ([0, 1, 2, 4], [-1, 1, 2, 3])}
    assert_refused(call_op, op, op_arguments(op), "lengths", values, rf"{op}: lengths must lie in 0\.\.T=3, got ")


@pytest.mark.parametrize("op", OPS)
def test_op_refuses_options_out_of_range(op: str) -> None:
    arguments = op_arguments(op)
    wrong = {
        "nonlinearity": ["sigmoid", ""],
        "correction": ["quadratic"],
        "credit": ["global"],
        "reverse": [[True], [True] * 3],
        "target_step": [0.0, -1.0, float("nan"), float("inf")],
        "margin": [0.0, 1.0, -0.5, float("nan")],
        "slope": ["steep", ""],
        "gate_slope": ["steep", ""],
        "candidate_slope": ["steep", ""],
        "inverse": ["jacobian", ""],
        "cell": ["elman", ""],
        "slope_reg": [-1.0, float("nan"), float("inf")],
    }
    for argument in wrong.keys() & arguments.keys() - set(tensors_of(arguments)):
        values = {repr(value): value for value in wrong[argument]}
        assert_refused(call_op, op, arguments, argument, values, f"{op}: {argument} must ")


def test_no_correction_needs_the_projection() -> None:
    with pytest.raises(ValueError, match="rnn_target_scan: x_proj must "):
        call_op("rnn_target_scan", op_arguments("rnn_target_scan") | {"x_proj": None})


@pytest.mark.parametrize("op", OPS)
def test_ops_do_not_write_into_their_inputs(op: str) -> None:
    arguments = op_arguments(op)
    call_op(op, arguments)
    for key, value in op_arguments(op).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(arguments[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_ops_take_tensors_at_any_offset(op: str) -> None:
    """A view may begin at an address that no vector load is aligned to."""

    def shifted(tensor: Tensor) -> Tensor:
        moved = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        assert moved.storage_offset() == 1
        return moved

    arguments = op_arguments(op)
    actual = call_op(op, {key: shifted(v) if isinstance(v, Tensor) else v for key, v in arguments.items()})
    expected = call_op(op, arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# The processor.


def test_kernels_leave_the_treatment_of_subnormals_alone() -> None:
    """On the calling thread and on the threads of the pool, which torch uses as well."""
    torch.set_num_threads(2)
    inputs = scan(33, 64, 64, 1, torch.float32)
    torch.ops.tpext.rnn_scan(inputs.x_proj, inputs.h0, inputs.weight_hh, None, [False], "tanh")
    below_normal = torch.full((2**20,), 1e-40)
    assert (below_normal * 1.0).min() > 0
    assert np.float32(1e-40) * np.float32(1) > 0


def test_numbers_beyond_float32_are_refused() -> None:
    weight = torch.eye(3).unsqueeze(0)
    with pytest.raises(ValueError, match=r"regularized_inverse: reg must be within the range of float32, got 1e\+39"):
        torch.ops.tpext.regularized_inverse(weight, 1e39)
    with pytest.raises(ValueError, match=r"regularized_solve: reg must be within the range of float32, got 1e\+39"):
        torch.ops.tpext.regularized_solve(weight, weight, 1e39)
    with pytest.raises(ValueError, match=r"counter_normal: scale must be within the range of float32, got -1e\+39"):
        _C.counter_normal(torch.empty(2, 3), 0, 0, 0, 0, -1e39, 1)
    assert torch.ops.tpext.regularized_inverse(weight.double(), 1e39).isfinite().all()


def supported(capability: str) -> bool:
    """Whether this processor has the instruction set, by torch's account."""
    levels = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}
    return CAPABILITIES.index(capability) <= levels.get(torch.backends.cpu.get_cpu_capability(), 0)


def run_with(capability: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TPEXT_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
    # Not in the repository's root: `python -c` would import the package's sources there instead of the installed one.
    here = Path(__file__).parent
    command = (sys.executable, *command)
    return subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_equals_the_oracle(capability: str) -> None:
    if capability not in tpext.build_info()["cpu_capabilities"]:
        pytest.skip(f"{capability} kernels are not in this build")
    if not supported(capability):
        finished = run_with(capability, "-c", "import tpext")
        assert finished.returncode != 0
        assert f"TPEXT_CPU_CAPABILITY={capability}" in finished.stderr
        pytest.skip(f"this processor has no {capability}: refused with a clear error")
    if capability == tpext._C.cpu_capability():
        pytest.skip(f"{capability} is what all other tests of this run use")
    active = run_with(capability, "-c", "import tpext; print(tpext._C.cpu_capability())")
    assert active.stdout.strip() == capability, active.stderr
    tests = Path(__file__).parent
    families = (
        *("counter_normal", "layer_inverse", "pooled_difference", "regularized_inverse"),
        *("rnn_scan", "rnn_target_scan", "rnn_layer", "gated_layer"),
    )
    files = [str(tests / f"test_{family}.py") for family in families]
    selected = (
        "random_sizes or every_combination or (keep_their_digits and (small or 0.1)) or tiny "
        "or units_in_the_last_place or batch_split or (share_a_row and 265) or every_width or chunk_long "
        "or to_the_bit or any_number_of_threads or block_edges or same_bits or status or equal_rows"
    )
    finished = run_with(capability, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected, *files)
    assert finished.returncode == 0, finished.stdout[-4000:]
    # the backward pass of a layer has too many options for all of them here
    families = ("rnn_layer_backward", "gated_layer_backward", "member_numbers")
    files = [str(tests / f"test_{family}.py") for family in families]
    selected = "random_sizes or test_passes or test_inverses or equal_numbers"
    finished = run_with(capability, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected, *files)
    assert finished.returncode == 0, finished.stdout[-4000:]


def test_an_unknown_instruction_set_is_refused() -> None:
    finished = run_with("sse9", "-c", "import tpext")
    assert finished.returncode != 0
    assert "TPEXT_CPU_CAPABILITY must be one of baseline" in finished.stderr


def test_freed_storage_is_refused() -> None:
    x_proj, h0, weight = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 4, 4)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="rnn_scan: weight_hh must have memory"):
        torch.ops.tpext.rnn_scan(x_proj, h0, weight, None, [False], "tanh")
