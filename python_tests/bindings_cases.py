"""Calls of the entries of `_C` and of the ops: their arguments, what they lead with, how their errors begin."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from comparison import layer, scan
from gated_cases import as_tensors, gated
from native_memory import DLTensor, foreign_capsule
from torch import Tensor
from torch.utils.dlpack import to_dlpack

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
