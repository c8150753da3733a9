"""What the bindings say of arrays on a GPU, without one: arguments that only claim to be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bindings_cases import (
    CPU,
    CUDA,
    ENTRIES,
    LEADING,
    MANAGED,
    ON_CPU_ALONE,
    PINNED,
    SIZES,
    Arguments,
    Claimed,
    call_entry,
    each_entry,
    each_tensor_of_an_entry,
    entry_arguments,
    entry_error,
)
from torch import Tensor

import tpext
from tpext import _C

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
