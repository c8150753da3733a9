"""Random calls of every entry of ``_C``: a program of its own, for a call may end it.

``python fuzz_bindings.py MODULE FIRST COUNT [fences]`` calls the module at that path with the seeds FIRST ..
FIRST + COUNT - 1, and names each call before it makes it: that of the last line is what ended the process. A call may
return, or raise one of ``ERRORS``, and leaves its inputs as they are. With ``fences`` every array lies between pages
that nobody may touch; a module built with sanitizers sees more by itself. The last line counts calls by entry and
outcome.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from loading import load_module
from native_memory import Exporter, Fenced, consumed, foreign_capsule, misaligned, tensor_of

Array = np.ndarray[Any, Any]

ERRORS = (TypeError, ValueError, RuntimeError)
STUB = Path(__file__).parents[1] / "tpext" / "_C.pyi"
# Each entry's tensors by their dims; ">" marks what it writes, "?" what it may do without, "i" integers. N is 1 or S, G
# the gates' rows, K and D what a cell keeps and hands back.
PASS = (
    "grad_states?STBH disp_n?SBH credit_n?SBH states:STBH h0:SBH weight_hh:SHH lengths?iB x_proj:STBH delta>STBH "
    "disp_h0>SBH credit_h0?>SBH norms?>STB displacement?>STBH displacement_of_state?>STBH "
)
GATED = (
    "grad_states?STBH states:STBH h0:SBH c0:SBH kept:STBKH weight_hh:SGH feedback:SGH lengths?iB disp_h_n?SBH "
    "disp_c_n?SBH credit_h_n?SBH credit_c_n?SBH disp_h0>SBH disp_c0?>SBH credit_h0?>SBH credit_c0?>SBH "
)
TENSORS = {
    "act_inverse": "target:N input:N output>N",
    "act_displacement": "displacement:N input:N output>N",
    "code_difference": "preactivation:PHW change:DPHW output:Phw indices?iPhw difference>DPHW",
    "probe_difference": "output:BChw indices?iBChw difference>DBCHW",
    "counter_normal": "output>BN",
    "kaczmarz_step": "displacement:BM input:BN weight:MN weight_change>MN bias_change?>M moved?>BN",
    "kaczmarz_train": "input:BN labels:iB predictions>iB",
    "regularized_inverse": "weight:BMN inverse>BNM status?>iB",
    "regularized_solve": "weight:BMN rhs:BDM solution>BDN status?>iB",
    "rnn_scan": "x_proj?STBH input:1TBI weight_ih:SHI bias?SH h0:SBH weight_hh:SHH lengths?iB states>STBH h_n?>SBH",
    "rnn_target_scan": PASS + "inverse:SHH",
    "rnn_learned_target_scan": PASS + "reverse_weight:SHH reverse_pre:STBH",
    "rnn_weight_gradients": "delta:STBH states:STBH h0:SBH input:1TBI lengths?iB grad_weight_ih?>SHI "
    "grad_weight_hh?>SHH grad_bias?>SH",
    "rnn_layer_backward": PASS + "input:1TBI feedback:SHH input_feedback:SHI pre:STBH grad_input?>STBI "
    "grad_weight_ih?>SHI grad_weight_hh?>SHH grad_bias?>SH",
    "gated_scan": "input:1TBI h0:SBH c0:SBH weight_ih:SGI weight_hh:SGH bias_ih:SG bias_hh:SG lengths?iB states>STBH "
    "h_n>SBH c_n>SBH kept?>STBKH",
    "gated_layer_backward": GATED + "input:1TBI input_feedback:SGI grad_input?>STBI grad_weight_ih?>SGI "
    "grad_weight_hh?>SGH grad_bias_ih?>SG grad_bias_hh?>SG",
    "gated_projected_scan": GATED + "x_proj:STBG bias_n?SH h_n>SBH c_n>SBH kept>STBKH states>STBH",
    "gated_target_scan": GATED + "delta>STBDH",
    "gated_plan": "",
    "large_array": "",
    "quota_processors": "",
    "rnn_plan": "",
}
# Without arguments.
PLAIN = ("build_info", "cpu_capability", "usable_processors")
CHOICES = {
    "activation": ("tanh", "sigmoid", "elu", "relu", "identity"),
    "cell": ("gru", "lstm"),
    "correction": ("linearized", "difference", "none", "learned"),
    "credit": ("local", "through_time"),
    "dtype": ("float32", "float64", "bfloat16"),
    "dx": ("mean", "wnorm", "regularized"),
    "inverse": ("branch", "cell"),
    "nonlinearity": ("tanh", "relu", "identity"),
    "output": ("clamp", "swap", "direct"),
    "regime": ("auto", "block", "step"),
    "way": ("forward", "local", "through_time"),
    "membership": ("/proc/self/cgroup", "/", ""),
    "mount": ("/sys/fs/cgroup", "/dev", ""),
}
SLOPES = ("inverse", "derivative", "one")
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 70)
NUMBERS = (0.0, -1.0, 1e-320, 1e-30, 1e30, 1e300, float("nan"), float("inf"), float("-inf"))
INTEGERS = (-1, 0, 2, 1025, 2**31 - 1, 2**32 - 1, 2**32, 2**62, 2**63 - 1, -(2**63), 2**64, 2**80)
WRONG = (None, "x", "", "\0", "\ud800", 1.5, [], (), {}, True, object(), [None], float("nan"))


class Dims:
    """A call's sizes by letter."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.sizes = draw, dict[str, int]()

    def __getitem__(self, letter: str) -> int:
        if letter not in self.sizes:
            few = letter in "STPCDK"
            self.sizes[letter] = self.draw.choice((1, 1, 2, 3, 5, 0) if few else SIZES)
        return self.sizes[letter]


class Call:
    """One entry's arguments: such as it takes, but for some that are wrong."""

    def __init__(self, module: ModuleType, op: str, seed: int, place: Callable[[Array], Array]) -> None:
        self.draw, self.dims, self.place = random.Random(seed), Dims(random.Random(seed + 1)), place
        self.numbers = np.random.default_rng(seed)
        self.entry, self.with_cuda = getattr(module, op), bool(module.build_info()["cuda_architectures"])
        self.dtype = np.dtype(self.draw.choice((np.float32, np.float64)))
        self.arrays: dict[str, Array] = {}
        self.outputs: set[str] = set()
        cell = self.draw.choice(CHOICES["cell"])
        self.chosen: dict[str, Any] = {"cell": cell, "kernel": self.draw.choice((0, 2, 2, 3, 5))}
        self.dims.sizes |= {
            "1": self.draw.choice((1, self.dims["S"])),
            "G": (3 if cell == "gru" else 4) * self.dims["H"],
        }
        if op.startswith("gated"):
            self.dims.sizes |= {"K": 4 if cell == "gru" else 5, "D": 4}
        tensors = {}
        for text in TENSORS[op].split():
            name = re.split("[:>?]", text)[0]
            tensors[name] = text[len(name) :]
        self.pool()
        self.arguments = {
            argument.arg: self.tensor(argument.arg, tensors[argument.arg])
            if argument.arg in tensors
            else self.other(argument.arg, ast.unparse(argument.annotation or ast.Constant(None)))
            for argument in ARGUMENTS[op]
        }
        if op.startswith("gated") and cell == "gru":
            self.arguments |= {name: None for name in self.arguments if name.split("_")[0] == "c" or "_c" in name}
            self.arguments |= {"c0": None} if "c0" in self.arguments else {}
        for _ in range(self.draw.choice((0, 0, 1, 1, 2))):
            self.spoil(self.draw.choice(list(self.arguments)))

    def pool(self) -> None:
        """The sizes behind a pool of these numbers, or a plane where it fits none."""
        kernel, stride = self.chosen["kernel"], self.draw.choice((1, 2, 2, 3))
        padding = self.draw.choice((0, 0, kernel // 2))
        self.chosen |= {"stride": stride, "padding": padding}
        for plane, pooled in ("Hh", "Ww"):
            size = self.dims[plane]
            fits = kernel == 0 or size + 2 * padding >= kernel
            self.dims.sizes[pooled] = size if kernel == 0 or not fits else (size + 2 * padding - kernel) // stride + 1

    def tensor(self, name: str, marks: str) -> Any:
        shape = [self.dims[letter] for letter in marks.strip(":>?i")]
        if "i" in marks:
            most = self.draw.choice((2, 8, 300))
            array = self.numbers.integers(0, most, shape)
            if self.draw.random() < 0.1:
                array = self.numbers.integers(-(2**63), 2**63 - 1, shape)
        else:
            scale = self.draw.choice((1.0, 1.0, 1.0, 1e-30, 1e30, 0.0))
            array = (scale * self.numbers.standard_normal(shape)).astype(self.dtype)
            if self.draw.random() < 0.1:
                array[self.numbers.random(shape) < 0.2] = self.draw.choice(NUMBERS)
        if "?" in marks and self.draw.random() < (0.9 if name == "displacement_of_state" else 0.2):
            return None
        self.arrays[name] = self.place(array)
        if ">" in marks:
            self.outputs.add(name)
        return self.arrays[name]

    def other(self, name: str, annotation: str) -> Any:
        if name in self.chosen and annotation != "list[bool]":
            return self.chosen[name]
        if annotation == "str":
            few = 2 if self.entry.__name__ in ("act_inverse", "act_displacement", "kaczmarz_step") else None
            return self.draw.choice(SLOPES if "slope" in name else CHOICES[name][:few])
        if annotation == "float":
            return self.draw.choice((0.1, 1.0, 1.0, 0.0))
        if annotation == "list[float]":
            return [self.draw.choice((0.01, 0.1, 0.5)) for _ in range(self.draw.choice((1, self.dims["S"])))]
        if annotation in ("Execution", "int") and name in ("execution", "threads"):
            return self.draw.choice((1, 1, 2, 3, 4))
        if annotation == "int":
            return 32 if name == "bits" else self.draw.choice((0, 1, 2, 7))
        if annotation == "bool":
            return self.draw.random() < 0.5
        if annotation == "list[bool]":
            return [self.draw.random() < 0.5 for _ in range(self.dims["S"])]
        if annotation == "list[int]":
            return [self.draw.choice((*SIZES, *INTEGERS)) for _ in range(self.draw.choice((0, 1, 2, 3)))]
        return self.layers(name)

    def layers(self, name: str) -> list[Array]:
        """Weights or biases of kaczmarz_train."""
        count = self.draw.choice((0, 2)) if name == "biases" else 2
        widths = [self.dims[letter] for letter in "NMC"]
        for layer in range(count):
            shape = [widths[layer + 1], widths[layer]] if name == "weights" else [widths[layer + 1]]
            self.arrays[f"{name}[{layer}]"] = self.place(self.numbers.standard_normal(shape).astype(self.dtype))
            self.outputs.add(f"{name}[{layer}]")
        return [self.arrays[f"{name}[{layer}]"] for layer in range(count)]

    def spoil(self, name: str) -> None:
        value = self.arguments[name]
        if isinstance(value, np.ndarray):
            self.arguments[name] = self.draw.choice(SPOILED)(self, value)
        elif isinstance(value, list) and value and self.draw.random() < 0.7:
            wrong = self.spoiled_item(value[0])
            self.arguments[name] = self.draw.choice((value[1:], [*value, value[0]], [wrong, *value[1:]]))
        else:
            self.arguments[name] = self.spoiled_item(value)

    def spoiled_item(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self.draw.choice(SPOILED)(self, value)
        executions = ((0, "auto", None), (0, "step", None, 1, None, None), (0, "auto", np.zeros(3, np.uint8)), (0,))
        like = NUMBERS if isinstance(value, float) else (*INTEGERS, *executions) if isinstance(value, int) else WRONG
        return self.draw.choice((*like, *like, *WRONG))

    def claim(self, array: Array) -> Any:
        """A capsule that says something else of itself than its memory does; nothing that a kernel would believe."""
        if array.ndim == 0 or not array.flags.c_contiguous:
            return None
        capsule = array.__dlpack__()
        tensor = tensor_of(capsule)
        axis = self.draw.randrange(array.ndim)
        kind = self.draw.choice(("negative", "device", "no memory", "lanes", "huge and empty"))
        if kind == "negative":
            tensor.shape[axis] = self.draw.choice((-1, -(2**63)))
        elif kind == "device":
            # what says that it is of CUDA is read there, where there is a GPU
            tensor.device_type = self.draw.choice((0, 3, 10, 13, -1) if self.with_cuda else (0, 2, 3, 10, 13))
            tensor.device_id = self.draw.choice((0, 1, -1))
        elif kind == "no memory":
            tensor.data = None
        elif kind == "lanes":
            tensor.code, tensor.bits, tensor.lanes = (self.draw.randrange(n) for n in (256, 256, 2**16))
        elif array.ndim > 1:
            for other in range(array.ndim):
                tensor.shape[other] = self.draw.choice((2**31, 2**62, 2**63 - 1))
            tensor.shape[axis] = 0
        return capsule

    def run(self) -> str:
        before = {name: array.tobytes() for name, array in self.arrays.items() if name not in self.outputs}
        try:
            self.entry(**self.arguments)
            outcome = "returned"
        except ERRORS as error:
            outcome = type(error).__name__
        for name, kept in before.items():
            assert self.arrays[name].tobytes() == kept, f"{name} was written to"
        return outcome


SPOILED: tuple[Callable[[Call, Array], Any], ...] = (
    lambda call, array: call.draw.choice(WRONG),
    lambda call, array: array.astype(call.draw.choice(("f2", "f4", "f8", "i4", "i8", "u1", "c8", "?", "O"))),
    lambda call, array: array[None].copy(),
    lambda call, array: array[0].copy() if array.ndim and array.shape[0] else array.ravel(),
    lambda call, array: np.concatenate([array, array], -1) if array.ndim else array,
    lambda call, array: array[..., :0].copy(),
    lambda call, array: array[..., ::-1],
    lambda call, array: np.swapaxes(array, 0, -1),
    lambda call, array: np.broadcast_to(array[..., :1], array.shape) if array.size else array,
    lambda call, array: np.full_like(
        array, call.draw.choice((np.nan, np.inf)) if array.dtype.kind == "f" else np.iinfo(array.dtype).max
    ),
    lambda call, array: misaligned(array),
    lambda call, array: call.claim(array),
    lambda call, array: call.claim(array),
    lambda call, array: consumed(array),
    lambda call, array: Exporter(call.draw.choice((None, 5, KeyError("x"), MemoryError()))),
    lambda call, array: foreign_capsule(1, b"dltensor_versioned"),
)
ARGUMENTS = {
    node.name: node.args.args for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)
}


def main(path: str, first: int, count: int, fences: bool) -> None:
    module, outcomes = load_module("_C", path), dict[str, Counter[str]]()
    for name in PLAIN:
        getattr(module, name)()
    for seed in range(first, first + count):
        op = list(TENSORS)[seed % len(TENSORS)]
        print(op, seed, flush=True)
        place = Fenced(against_end=seed % 2 == 0) if fences else lambda array: array
        outcomes.setdefault(op, Counter())[Call(module, op, seed, place).run()] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "fences" in sys.argv[4:])
