"""Wrong input to kernels and ops: an error that names op and argument, or a result; never a crash."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import layer, scan
from gated_cases import as_tensors, gated
from native_memory import DLTensor, Exporter, Fenced, consumed, foreign_capsule, misaligned
from torch import Tensor
from torch.utils.dlpack import to_dlpack

import tpext
from tpext import _C

Arguments = dict[str, Any]

SIZES = {"S": 2, "T": 3, "B": 4, "H": 5, "I": 3}
CAPABILITIES = ["baseline", "avx2", "avx512"]


def gated_arguments(op: str, **sizes: int) -> Arguments:
    """Those of the ops of an LSTM."""
    case = as_tensors(gated("lstm", **SIZES | sizes, own_inputs=op == "gated_layer_backward"), torch.float32)._asdict()
    of_layer = dict(itertools.islice(case.items(), 10))
    if op == "gated_layer":
        return of_layer
    states, _, _, kept = torch.ops.tpext.gated_layer(**of_layer, keep=True)
    weight_ih = case.pop("weight_ih")
    del case["bias_ih"], case["bias_hh"]
    return {
        **case,
        "states": states,
        "kept": kept,
        "feedback": case["weight_hh"].clone(),
        "input_feedback": weight_ih,
        "inverse": "branch",
        "credit": "through_time",
        "target_step": 0.5,
        "margin": 0.01,
        "gate_slope": "inverse",
        "candidate_slope": "one",
        "slope_reg": 0.0,
        "scale": 0.5,
        "input_scale": 2.0,
    }


def op_arguments(op: str, **sizes: int) -> Arguments:
    """Arguments that ``torch.ops.tpext.<op>`` accepts, by name."""
    if op.startswith("gated"):
        return gated_arguments(op, **sizes)
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
            "margin": 0.01,
            **beyond,
            "slope": "inverse",
            "slope_reg": 0.0,
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
        "rnn_layer_backward": {
            **backward,
            "input": scan(**sizes, **options, own_inputs=True).input,
            "h0": inputs.h0,
            "weight_hh": inputs.weight_hh,
            "feedback": inputs.weight_hh.clone(),
            "input_feedback": layer(**sizes, **options).weight_ih,
            "pre": inputs.x_proj,
            **run,
            "correction": "none",
            "credit": "through_time",
            "target_step": 0.5,
            "margin": 0.01,
            "slope": "inverse",
            "slope_reg": 0.0,
            "scale": 0.5,
            "input_scale": 2.0,
            "of_displacement": False,
            **beyond,
        },
    }[op]


OPTIONAL_OUTPUTS = {
    "rnn_target_scan": {"return_norms": True, "return_displacement": True},
    "rnn_learned_target_scan": {"return_norms": True},
    "rnn_layer_backward": {"needs": [True] * 4},
    "gated_layer": {"keep": True},
    "gated_layer_backward": {"needs": [True] * 5},
}
# Each op, and the argument that gives sizes and precision: where it is changed, another is found not to fit it.
OPS = {
    "rnn_scan": "x_proj",
    "rnn_layer": "input",
    "rnn_scan_backward": "states",
    "rnn_target_scan": "states",
    "rnn_learned_target_scan": "states",
    "rnn_weight_gradients": "delta",
    "rnn_layer_backward": "states",
    "gated_layer": "input",
    "gated_layer_backward": "states",
}
# Each entry of `_C` with what it writes, in the order of the op's outputs, of an LSTM where there are gates.
# "rnn_layer" is `_C.rnn_scan` with an input.
ENTRIES = {
    "rnn_scan": {"states": "STBH"},
    "rnn_layer": {"states": "STBH", "h_n": "SBH"},
    "rnn_target_scan": {
        "delta": "STBH",
        "disp_h0": "SBH",
        "norms": "STB",
        "displacement": "STBH",
        "credit_h0": "SBH",
    },
    "rnn_learned_target_scan": {"delta": "STBH", "disp_h0": "SBH", "norms": "STB", "credit_h0": "SBH"},
    "rnn_weight_gradients": {"grad_weight_ih": "SHI", "grad_weight_hh": "SHH", "grad_bias": "SH"},
    "rnn_layer_backward": {
        "grad_input": "STBI",
        "grad_weight_ih": "SHI",
        "grad_weight_hh": "SHH",
        "grad_bias": "SH",
        "disp_h0": "SBH",
        "credit_h0": "SBH",
    },
    "gated_layer": {"states": "STBH", "h_n": "SBH", "c_n": "SBH", "kept": "STBKH"},
    "gated_layer_backward": {
        "grad_input": "STBI",
        "grad_weight_ih": "SGI",
        "grad_weight_hh": "SGH",
        "grad_bias_ih": "SG",
        "grad_bias_hh": "SG",
        "disp_h0": "SBH",
        "disp_c0": "SBH",
        "credit_h0": "SBH",
        "credit_c0": "SBH",
    },
}
ENTRY_OF = {"rnn_layer": "rnn_scan", "gated_layer": "gated_scan"}
LEADING = OPS | {"rnn_scan": "states", "rnn_layer": "states", "gated_layer": "states"}
# What an entry does without.
OPTIONAL = {
    "rnn_scan": {"lengths"},
    "rnn_layer": {"bias", "lengths", "h_n"},
    "rnn_target_scan": {"grad_states", "disp_n", "credit_n", "lengths", "credit_h0", "norms", "displacement"},
    "rnn_learned_target_scan": {"grad_states", "disp_n", "credit_n", "lengths", "credit_h0", "norms"},
    "rnn_weight_gradients": {"lengths", "grad_weight_ih", "grad_weight_hh", "grad_bias"},
    "rnn_layer_backward": {
        *("grad_states", "disp_n", "credit_n", "lengths", "credit_h0"),
        *("grad_input", "grad_weight_ih", "grad_weight_hh", "grad_bias"),
    },
    "gated_layer": {"lengths", "kept"},
    "gated_layer_backward": {
        *("grad_states", "disp_h_n", "disp_c_n", "credit_h_n", "credit_c_n", "lengths", "disp_c0", "credit_h0"),
        *("credit_c0", "grad_input", "grad_weight_ih", "grad_weight_hh", "grad_bias_ih", "grad_bias_hh"),
    },
}
# What is one number or one for each member.
NUMBERS = ("target_step", "margin", "slope_reg", "scale", "input_scale")
# The entries of what torch's operations do on CUDA.
ON_CPU_ALONE = ("rnn_weight_gradients", "rnn_layer_backward", "gated_layer", "gated_layer_backward")


def entry_arguments(op: str, **sizes: int) -> Arguments:
    """Arguments that the op's entry in ``_C`` accepts: those of the op, outputs to write into, and two threads."""
    size = SIZES | sizes
    size |= {"G": 4 * size["H"], "K": 5}
    written = {
        output: torch.full([size[symbol] for symbol in symbols], torch.nan) for output, symbols in ENTRIES[op].items()
    }
    absent = {
        "rnn_scan": {"input": None, "weight_ih": None, "bias": None, "h_n": None},
        "rnn_layer": {"x_proj": None},
        "rnn_target_scan": {"displacement_of_state": None},
        "rnn_learned_target_scan": {"displacement_of_state": None},
        "rnn_layer_backward": {"transposed": False},
    }.get(op, {})
    of_op = op_arguments(op, **sizes)
    numbers = {key: [of_op[key]] for key in NUMBERS if key in of_op}
    return of_op | numbers | absent | written | {"execution": 2}


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


CPU, CUDA, PINNED, MANAGED = 1, 2, 3, 13
CODES = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
}


class Claimed:
    """Stands for a tensor in what it says of itself: of another device than its memory's, or larger than that."""

    def __init__(self, tensor: Tensor, device: int = CUDA, index: int = 0, shape: Sequence[int] | None = None) -> None:
        sizes = tensor.shape if shape is None else shape
        self.shape = (ctypes.c_int64 * len(sizes))(*sizes)
        self.memory = tensor
        self.tensor = DLTensor(
            tensor.data_ptr(), device, index, len(sizes), *CODES[tensor.dtype], 1, self.shape, None, 0, None, None
        )

    def __dlpack__(self, **_: object) -> object:
        return foreign_capsule(ctypes.addressof(self.tensor), b"dltensor")


CUDA_EXECUTION = (0, "auto", None)
WITHOUT_CUDA = "tpext was built without CUDA kernels; rebuild where nvcc is found, or with TPEXT_CUDA=on"
needs_cuda_build = pytest.mark.skipif(not tpext.build_info()["cuda_architectures"], reason="a build without CUDA")


def cuda_arguments(op: str, dtype: torch.dtype = torch.float32, index: int = 0) -> Arguments:
    """Arguments that the op's entry would take, were their memory where they say it is: on a CUDA device."""

    def claimed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return Claimed(value.to(dtype) if value.is_floating_point() else value, index=index)

    arguments = entry_arguments(op)
    if op not in ON_CPU_ALONE:
        arguments |= dict.fromkeys(("input", "weight_ih", "bias", "norms") & arguments.keys())
    return {key: claimed(value) for key, value in arguments.items()} | {"execution": CUDA_EXECUTION}


def claimed_of(arguments: Arguments) -> list[str]:
    return [key for key, value in arguments.items() if isinstance(value, Claimed)]


def inverse_arguments() -> Arguments:
    weight, inverse, status = torch.zeros(2, 3, 4), torch.zeros(2, 4, 3), torch.zeros(2).long()
    tensors = {"weight": weight, "inverse": inverse, "status": status}
    return {key: Claimed(tensor) for key, tensor in tensors.items()} | {"reg": [1.0], "execution": CUDA_EXECUTION}


@each_tensor_of_an_entry
def test_entry_refuses_another_device(op: str, argument: str) -> None:
    arguments = entry_arguments(op)
    devices = {
        "CUDA device 1": (CUDA, 1),
        r"pinned memory of CUDA \(DLPack device type 3\)": (PINNED, 0),
        r"managed memory of CUDA \(DLPack device type 13\)": (MANAGED, 0),
        "DLPack device type 10": (10, 0),
    }
    leading = LEADING[op]
    for name, (device, index) in devices.items():
        value = Claimed(arguments[argument], device, index)
        expected = f"on the CPU as {leading} is" if argument != leading else "on the CPU or a CUDA device"
        error, text = ValueError, f"{entry_error(op)}{argument} must be {expected}, got {name}"
        if argument == leading and device == CUDA:
            with_cuda = tpext.build_info()["cuda_architectures"]
            error = TypeError if with_cuda else RuntimeError
            text = f"{entry_error(op)}execution must be .* where {leading} is on {name}" if with_cuda else WITHOUT_CUDA
        with pytest.raises(error, match=f"^{text}"):
            call_entry(op, arguments | {argument: value})


@pytest.mark.parametrize("op", [*ENTRIES, "regularized_inverse"])
def test_an_execution_suits_the_device(op: str) -> None:
    is_scan = op != "regularized_inverse"
    on_cpu = (
        entry_arguments(op)
        if is_scan
        else {k: v.memory if isinstance(v, Claimed) else v for k, v in inverse_arguments().items()}
    )
    for value in (CUDA_EXECUTION, [2], None):
        with pytest.raises(TypeError, match=r"execution must be a number of threads where \w+ is on the CPU, got "):
            call_entry(op, on_cpu | {"execution": value})


@needs_cuda_build
@pytest.mark.parametrize("op", [*ENTRIES, "regularized_inverse"])
def test_an_execution_on_cuda_is_whole(op: str) -> None:
    arguments = cuda_arguments(op) if op in ENTRIES else inverse_arguments()
    step = (0, "step", None, 1, None, None)
    for value in (
        2,
        None,
        (0, "auto"),
        ("0", "auto", None),
        (0, 1, None),
        [0, "auto", None],
        (*step[:3], "1", None, None),
    ):
        with pytest.raises(TypeError, match=r"execution must be \(stream: int, regime: str, workspace\) or .* where "):
            call_entry(op, arguments | {"execution": value})
    for value in (step[:3], (0, "auto", *step[2:])):
        with pytest.raises(
            ValueError, match='execution must have six parts for regime "step" and three for the others'
        ):
            call_entry(op, arguments | {"execution": value})
    with pytest.raises(ValueError, match="regime must be one of 'auto', 'block', 'cluster', 'grid', 'step', got 'row'"):
        call_entry(op, arguments | {"execution": (0, "row", None)})
    workspaces = {
        "must be a DLPack capsule": 5,
        r"must be \[bytes\], got \[2, 2\]": Claimed(torch.zeros(2, 2, dtype=torch.uint8)),
        "must be uint8, got float32": Claimed(torch.zeros(4)),
        "must be on CUDA device 0 as .* is, got the CPU": Claimed(torch.zeros(4, dtype=torch.uint8), CPU),
        "must be on CUDA device 0 as .* is, got CUDA device 1": Claimed(torch.zeros(4, dtype=torch.uint8), CUDA, 1),
    }
    for text, workspace in workspaces.items():
        with pytest.raises((TypeError, ValueError), match=f"workspace {text}"):
            call_entry(op, arguments | {"execution": (0, "auto", workspace)})


@needs_cuda_build
@pytest.mark.parametrize("op", ["rnn_scan", "rnn_target_scan", "rnn_learned_target_scan"])
def test_a_single_step_is_whole(op: str) -> None:
    products = 2 if "target" in op else 1
    right = torch.zeros(products, *(SIZES[symbol] for symbol in "SBH"))
    wrong = {
        rf"must be \[P={products}, S=2, B=4, H=5\], got ": Claimed(right[:, :, :, 1:].clone()),
        "must be float32, got float64": Claimed(right.double()),
        "must be on CUDA device 0 as .* is, got the CPU": Claimed(right, CPU),
        "must be a tensor, got None": None,
    }
    for text, value in wrong.items():
        for name, pair in {"sums": (value, Claimed(right)), "carried": (Claimed(right), value)}.items():
            with pytest.raises((TypeError, ValueError), match=f"{op}: {name} {text}"):
                call_entry(op, cuda_arguments(op) | {"execution": (0, "step", None, 1, *pair)})
    for step in (-1, SIZES["T"] + 1):
        execution = (0, "step", None, step, Claimed(right), Claimed(right))
        with pytest.raises(ValueError, match=rf"{op}: .* step must lie in 0\.\.T, got {step}"):
            call_entry(op, cuda_arguments(op) | {"execution": execution})


@needs_cuda_build
@each_entry
def test_every_tensor_is_on_the_leading_ones_device(op: str) -> None:
    arguments, leading = cuda_arguments(op), LEADING[op]
    if op == "rnn_layer":
        arguments |= {"x_proj": Claimed(torch.zeros_like(arguments["states"].memory))}
    for argument in claimed_of(arguments):
        if argument == leading or op in ON_CPU_ALONE:
            continue
        memory = arguments[argument].memory
        elsewhere = {"the CPU": memory, "CUDA device 1": Claimed(memory, CUDA, 1)}
        for name, value in elsewhere.items():
            text = f"{entry_error(op)}{argument} must be on CUDA device 0 as {leading} is, got {name}"
            with pytest.raises(ValueError, match=text):
                call_entry(op, arguments | {argument: value})


@needs_cuda_build
def test_what_cuda_computes_otherwise_is_refused_there() -> None:
    refused = {
        "rnn_scan": {"input": "STBI", "weight_ih": "SHI", "bias": "SH"},
        "rnn_target_scan": {"norms": "STB"},
        "rnn_learned_target_scan": {"norms": "STB"},
    }
    for op, arguments in refused.items():
        for argument, symbols in arguments.items():
            value = Claimed(torch.zeros([SIZES[symbol] for symbol in symbols]))
            with pytest.raises(ValueError, match=f"{op}: {argument} must be None on CUDA, got a tensor"):
                call_entry(op, cuda_arguments(op) | {argument: value})
    with pytest.raises(TypeError, match="rnn_scan: x_proj must be a tensor, got None"):
        call_entry("rnn_scan", cuda_arguments("rnn_scan") | {"x_proj": None})
    with pytest.raises(ValueError, match=r"rnn_weight_gradients: .* on CUDA torch's matrix products"):
        call_entry("rnn_weight_gradients", cuda_arguments("rnn_weight_gradients"))
    with pytest.raises(
        ValueError, match=r"rnn_layer_backward: .* on CUDA a pass that leaves delta and torch's products"
    ):
        call_entry("rnn_layer_backward", cuda_arguments("rnn_layer_backward"))


@pytest.mark.parametrize("op", ["rnn_target_scan", "rnn_learned_target_scan"])
def test_the_displacement_of_the_state_is_for_cuda(op: str) -> None:
    arguments = entry_arguments(op)
    given = arguments | {"displacement_of_state": torch.zeros_like(arguments["states"])}
    with pytest.raises(ValueError, match=f"{op}: displacement_of_state must be None on the CPU, got a tensor"):
        call_entry(op, given)


@needs_cuda_build
def test_dtypes_of_cuda() -> None:
    """The scans take the 16-bit formats, and all tensors of a call are of one; the inverse does not."""
    for op in ("rnn_scan", "rnn_target_scan", "rnn_learned_target_scan"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            arguments = cuda_arguments(op, dtype)
            name = str(dtype).removeprefix("torch.")
            other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
            weight = Claimed(arguments["weight_hh"].memory.to(other))
            with pytest.raises(ValueError, match=f"{op}: weight_hh must be {name}, got b?float16"):
                call_entry(op, arguments | {"weight_hh": weight})
    half = Claimed(torch.zeros(2, 3, 4).half())
    with pytest.raises(ValueError, match="regularized_inverse: weight must be float32, got float16"):
        call_entry("regularized_inverse", inverse_arguments() | {"weight": half})


@needs_cuda_build
def test_sizes_beyond_the_kernels_of_cuda_are_refused() -> None:
    states = torch.zeros(1)
    for shape in ([1, 1, 2**16, 2**15], [1, 2**31, 1, 1], [2**31, 1, 1, 1]):
        value = Claimed(states, shape=shape)
        with pytest.raises(ValueError, match=r"rnn_scan: states must have S, T and B \* H below 2\^31 on CUDA, got "):
            call_entry("rnn_scan", cuda_arguments("rnn_scan") | {"states": value})
    large = {"weight": Claimed(torch.zeros(1, 129, 4)), "inverse": Claimed(torch.zeros(1, 4, 129))}
    status = {"status": Claimed(torch.zeros(1).long())}
    with pytest.raises(ValueError, match=r"regularized_inverse: weight must have M and N of at most 128 on CUDA, got "):
        call_entry("regularized_inverse", inverse_arguments() | large | status)


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
    with pytest.raises(ValueError, match=f"{entry_error(op)}{LEADING[op]} must have sizes for less than 2\\^48 bytes"):
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


PLAN = {"products": 1, "dtype": "float32", "stack": 1, "batch": 16, "hidden": 100, "device": 0, "regime": "auto"}


def test_a_build_without_cuda_says_so() -> None:
    if tpext.build_info()["cuda_architectures"]:
        pytest.skip("a build with CUDA")
    for op in ENTRIES:
        with pytest.raises(RuntimeError, match=WITHOUT_CUDA):
            call_entry(op, cuda_arguments(op))
    with pytest.raises(RuntimeError, match=WITHOUT_CUDA):
        call_entry("regularized_inverse", inverse_arguments())
    with pytest.raises(RuntimeError, match=WITHOUT_CUDA):
        _C.rnn_plan(**PLAN)


@needs_cuda_build
def test_a_plan_refuses_wrong_arguments() -> None:
    wrong = {
        "products must be 1 or 2, got": {"products": 3},
        "dtype must be one of 'float32', 'float64', 'bfloat16', 'float16', got 'int8'": {"dtype": "int8"},
        "stack must lie in": {"stack": -1},
        "batch must lie in": {"batch": 2**31},
        "hidden must lie in": {"hidden": -5},
        r"batch \* hidden must be below 2\^31, got 65536 \* 32768": {"batch": 2**16, "hidden": 2**15},
        "device must be >= 0, got -1": {"device": -1},
        "regime must be one of 'auto', 'block', 'cluster', 'grid', 'step', got 'row'": {"regime": "row"},
    }
    for text, change in wrong.items():
        with pytest.raises(ValueError, match=f"rnn_plan: {text}"):
            _C.rnn_plan(**PLAN | change)


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_a_plan_needs_a_gpu() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)cuda"):
        _C.rnn_plan(**PLAN)


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
