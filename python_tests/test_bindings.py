"""Wrong input to kernels and ops: an error that names op and argument, or a result; never a crash."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import layer, scan
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

import tpext
from tpext import _C

Arguments = dict[str, Any]

SIZES = {"S": 2, "T": 3, "B": 4, "H": 5, "I": 3}
CAPABILITIES = ["baseline", "avx2", "avx512"]


def op_arguments(op: str, **sizes: int) -> Arguments:
    """Arguments that ``torch.ops.tpext.<op>`` accepts, by name."""
    sizes = SIZES | sizes
    options = {"dtype": torch.float32, "ragged": True, "direction": "mixed"}
    inputs = scan(**sizes, **options, enters="both")
    run = {"lengths": inputs.lengths, "reverse": inputs.reverse, "nonlinearity": "tanh"}
    backward = {"grad_states": inputs.grad_states, "states": inputs.states}
    beyond = {"disp_n": inputs.at_end, "credit_n": inputs.credit_at_end}
    return {
        "rnn_scan": {"x_proj": inputs.x_proj, "h0": inputs.h0, "weight_hh": inputs.weight_hh, **run},
        "rnn_layer": layer(**sizes, **options)._asdict(),
        "rnn_scan_backward": {**backward, "weight_hh": inputs.weight_hh, **run, "grad_h_n": inputs.at_end},
        "rnn_target_scan": {
            **backward,
            "h0": inputs.h0,
            "weight_hh": inputs.weight_hh,
            "inverse": inputs.weight_hh.clone(),
            "x_proj": inputs.x_proj,
            **run,
            "correction": "none",
            "credit": "through_time",
            "target_step": 0.5,
            "clip": 0.01,
            **beyond,
        },
        "rnn_learned_target_scan": {
            **backward,
            "weight_hh": inputs.weight_hh,
            "reverse_weight": inputs.weight_hh.clone(),
            "reverse_pre": inputs.x_proj,
            **run,
            "credit": "through_time",
            "target_step": 0.5,
            **beyond,
        },
        "rnn_weight_gradients": {
            "delta": inputs.grad_states.nan_to_num(),
            "states": inputs.states,
            "h0": inputs.h0,
            "input": inputs.input,
            "lengths": inputs.lengths,
            "reverse": inputs.reverse,
            "scale": 0.5,
        },
    }[op]


OPTIONAL_OUTPUTS = {
    "rnn_target_scan": {"return_norms": True, "return_displacement": True},
    "rnn_learned_target_scan": {"return_norms": True},
}
# Each op, and the argument that gives sizes and precision: where it is changed, another is found not to fit it.
OPS = {
    "rnn_scan": "x_proj",
    "rnn_layer": "input",
    "rnn_scan_backward": "states",
    "rnn_target_scan": "states",
    "rnn_learned_target_scan": "states",
    "rnn_weight_gradients": "delta",
}
# Each entry of `_C` with what it writes, in the order of the op's outputs. "rnn_layer" is `_C.rnn_scan` with an input.
ENTRIES = {
    "rnn_scan": {"states": "STBH"},
    "rnn_layer": {"states": "STBH", "h_n": "SBH"},
    "rnn_scan_backward": {"grad_x_proj": "STBH", "grad_h0": "SBH"},
    "rnn_target_scan": {
        "delta": "STBH",
        "disp_h0": "SBH",
        "norms": "STB",
        "displacement": "STBH",
        "credit_h0": "SBH",
    },
    "rnn_learned_target_scan": {"delta": "STBH", "disp_h0": "SBH", "norms": "STB", "credit_h0": "SBH"},
    "rnn_weight_gradients": {"grad_weight_ih": "SHI", "grad_weight_hh": "SHH", "grad_bias": "SH"},
}
ENTRY_OF = {"rnn_layer": "rnn_scan"}
LEADING = OPS | {"rnn_scan": "states", "rnn_layer": "states"}
# What an entry does without.
OPTIONAL = {
    "rnn_scan": {"lengths"},
    "rnn_layer": {"bias", "lengths", "h_n"},
    "rnn_scan_backward": {"grad_states", "grad_h_n", "lengths"},
    "rnn_target_scan": {"grad_states", "disp_n", "credit_n", "lengths", "credit_h0", "norms", "displacement"},
    "rnn_learned_target_scan": {"grad_states", "disp_n", "credit_n", "lengths", "credit_h0", "norms"},
    "rnn_weight_gradients": {"lengths", "grad_weight_ih", "grad_weight_hh", "grad_bias"},
}


def entry_arguments(op: str, **sizes: int) -> Arguments:
    """Arguments that the op's entry in ``_C`` accepts: those of the op, outputs to write into, and a thread count."""
    size = SIZES | sizes
    written = {
        output: torch.full([size[symbol] for symbol in symbols], torch.nan) for output, symbols in ENTRIES[op].items()
    }
    absent = {
        "rnn_scan": {"input": None, "weight_ih": None, "bias": None, "h_n": None},
        "rnn_layer": {"x_proj": None},
    }.get(op, {})
    return op_arguments(op, **sizes) | absent | written | {"num_threads": 2}


class Unexported:
    """Marks what is to reach an entry as it is."""

    def __init__(self, value: object) -> None:
        self.value = value


def call_entry(op: str, arguments: Arguments) -> None:
    def exported(value: Any) -> Any:
        return (
            to_dlpack(value) if isinstance(value, Tensor) else value.value if isinstance(value, Unexported) else value
        )

    getattr(_C, ENTRY_OF.get(op, op))(**{key: exported(value) for key, value in arguments.items()})


def call_op(op: str, arguments: Arguments) -> Any:
    return getattr(torch.ops.tpext, op)(**arguments, **OPTIONAL_OUTPUTS.get(op, {}))


def tensors_of(arguments: Arguments) -> list[str]:
    return [key for key, value in arguments.items() if isinstance(value, Tensor)]


def error_of(call: Callable[[str, Arguments], Any], op: str, arguments: Arguments) -> str:
    """The text of the ValueError or TypeError that a call ends with. Another error, and a crash, end the test."""
    try:
        call(op, arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return "no error"


def assert_refused(
    call: Callable[[str, Arguments], Any], op: str, arguments: Arguments, argument: str, values: Arguments, pattern: str
) -> None:
    """Each of the values, by the name of its kind, gives an error whose text begins as the pattern says."""
    errors = {kind: error_of(call, op, arguments | {argument: value}) for kind, value in values.items()}
    others = {kind: error for kind, error in errors.items() if not re.match(pattern, error, re.DOTALL)}
    assert not others, f"expected {pattern!r}"


each_entry = pytest.mark.parametrize("op", ENTRIES)
each_tensor_of_an_entry = pytest.mark.parametrize(
    ("op", "argument"), [(op, argument) for op in ENTRIES for argument in tensors_of(entry_arguments(op))]
)
each_tensor_of_an_op = pytest.mark.parametrize(
    ("op", "argument"), [(op, argument) for op in OPS for argument in tensors_of(op_arguments(op))]
)


def entry_error(op: str) -> str:
    """How the errors of an op's entry begin."""
    return f"{ENTRY_OF.get(op, op)}: "


def spread(tensor: Tensor) -> Tensor:
    """The same numbers, with a gap after each along the last axis."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


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


@pytest.mark.parametrize("op", ["rnn_layer", "rnn_weight_gradients"])
def test_entry_reads_an_input_of_any_strides_in_place(op: str) -> None:
    plain = entry_arguments(op)
    call_entry(op, plain)
    input = plain["input"]
    T, B, I = input.shape  # noqa: E741
    gaps = torch.full((B, T + 2, 2 * I), torch.nan).transpose(0, 1)[1:-1, :, :I]
    for memory in (torch.empty_strided((T, B, I), (I, T * I, 1)), gaps):
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
    for op in ("rnn_target_scan", "rnn_learned_target_scan"):
        without = entry_arguments(op) | {"credit": "local", "credit_n": None, "credit_h0": None}
        given = entry_arguments(op) | {"credit": "local"}
        for arguments in (without, given):
            call_entry(op, arguments)
        assert given["credit_h0"].isnan().all(), "not written"
        for output in ENTRIES[op].keys() - {"credit_h0"}:
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


class Exporter:
    """Something with ``__dlpack__`` that returns what it was given."""

    def __init__(self, capsule: object) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: object) -> object:
        return self.capsule


def foreign_capsule(pointer: int, capsule_name: bytes) -> object:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(pointer, capsule_name, None)


def consumed_capsule(tensor: Tensor) -> object:
    capsule = to_dlpack(tensor)
    from_dlpack(capsule)
    return capsule


NOT_TENSORS = {
    "number": lambda tensor: 5,
    "text": lambda tensor: "x",
    "list": lambda tensor: tensor.tolist(),
    "exporter of a number": lambda tensor: Exporter(5),
    "exporter of None": lambda tensor: Exporter(None),
    "capsule of another name": lambda tensor: foreign_capsule(1, b"not a tensor"),
    "versioned capsule": lambda tensor: foreign_capsule(1, b"dltensor_versioned"),
    "consumed capsule": consumed_capsule,
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


class DLTensor(ctypes.Structure):
    """The C structure of DLPack's tensor, to make one that torch would not."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


@each_tensor_of_an_entry
def test_entry_refuses_another_device(op: str, argument: str) -> None:
    arguments = entry_arguments(op)
    tensor = arguments[argument]
    code, bits = (0, 64) if argument == "lengths" else (2, 32)
    shape = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
    cuda = DLTensor(0, 2, 0, tensor.dim(), code, bits, 1, shape, None, 0, None, None)
    value = foreign_capsule(ctypes.addressof(cuda), b"dltensor")
    with pytest.raises(ValueError, match=rf"^{entry_error(op)}{argument} must be on the CPU"):
        call_entry(op, arguments | {argument: value})


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
    "nonlinearity": ["sigmoid", "", None, 3],
    "correction": ["quadratic", None],
    "credit": ["global", None],
    "reverse": [[True], [True] * 3, "ab", None],
    "num_threads": [0, -1, 2**40, "two"],
    "target_step": ["large", None],
    "clip": ["small", None],
    "scale": ["large", None],
}


@each_entry
def test_entry_refuses_wrong_options(op: str) -> None:
    arguments = entry_arguments(op)
    for argument in WRONG_OPTIONS.keys() & arguments.keys():
        values = {repr(value): value for value in WRONG_OPTIONS[argument]}
        assert_refused(call_entry, op, arguments, argument, values, f"{ENTRY_OF.get(op, op)}.*{argument}")


@each_entry
def test_entry_with_more_threads_than_work(op: str) -> None:
    call_entry(op, entry_arguments(op) | {"num_threads": 1024})
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match=rf"{entry_error(op)}num_threads must lie in 1..1024, got {threads}"):
            call_entry(op, entry_arguments(op) | {"num_threads": threads})


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


class Fenced:
    """Copies of tensors, each between two pages of memory that nobody may touch: against the first or the second."""

    def __init__(self, against_end: bool) -> None:
        self.against_end = against_end
        self.maps: list[mmap.mmap] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        bytes_ = tensor.numel() * tensor.element_size()
        if bytes_ == 0:
            return tensor.clone()
        end = (bytes_ // mmap.PAGESIZE + 2) * mmap.PAGESIZE
        memory = mmap.mmap(-1, end + mmap.PAGESIZE)
        self.maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (0, end):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + fence), mmap.PAGESIZE, 0) == 0
        begin = end - bytes_ if self.against_end else mmap.PAGESIZE
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
        return copy.copy_(tensor)


def call_entries_between_fences() -> None:
    """Every entry with sizes around those of vectors; ends the process where one reads or writes beside an array."""
    sizes = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33]
    for op, H, dtype, against_end in itertools.product(ENTRIES, sizes, [torch.float32, torch.float64], [False, True]):
        for B, I in [(1, 17), (7, 1), (13, 8)]:  # noqa: E741
            fenced, arguments = Fenced(against_end), entry_arguments(op, H=H, B=B, I=I)
            for key in tensors_of(arguments):
                floating = arguments[key].is_floating_point()
                arguments[key] = fenced(arguments[key].to(dtype) if floating else arguments[key])
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
    # rnn_layer takes its hidden size from h0.
    named = r"\w+" if argument == OPS[op] or (op, argument) == ("rnn_layer", "h0") else argument
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
        "clip": [0.0, 1.0, -0.5, float("nan")],
    }
    for argument in wrong.keys() & arguments.keys():
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


def supported(capability: str) -> bool:
    """Whether this processor has the instruction set, by torch's account."""
    levels = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}
    return CAPABILITIES.index(capability) <= levels.get(torch.backends.cpu.get_cpu_capability(), 0)


def run_with(capability: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TPEXT_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
    # Not in the repository's root: `python -c` would import the package's sources there instead of the installed one.
    here = Path(__file__).parent
    command = (sys.executable, *command)
    return subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_equals_the_oracle(capability: str) -> None:
    if capability not in tpext.build_info()["cpu_capabilities"]:
        pytest.skip(f"{capability} kernels are not in this build")
    if not supported(capability):
        finished = run_with(capability, "-c", "import tpext")
        assert finished.returncode != 0
        assert f"TPEXT_CPU_CAPABILITY={capability}" in finished.stderr
        pytest.skip(f"this processor has no {capability}: refused with a clear error")
    active = run_with(capability, "-c", "import tpext; print(tpext._C.cpu_capability())")
    assert active.stdout.strip() == capability, active.stderr
    tests = Path(__file__).parent
    families = ("regularized_inverse", "rnn_scan", "rnn_target_scan", "rnn_layer")
    files = [str(tests / f"test_{family}.py") for family in families]
    selected = (
        "random_sizes or every_combination or keep_their_digits or tiny or units_in_the_last_place or batch_split "
        "or (share_a_row and 265) or every_width or chunk_long or to_the_bit or any_number_of_threads "
        "or block_edges or same_bits or status"
    )
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
