"""What every op family needs: the library that they register in, argument checks, autocast, the way to the kernels."""

from __future__ import annotations

import functools
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, TypeGuard, TypeVar

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.autograd import forward_ad

from tpext import _C

LIBRARY = torch.library.Library("tpext", "DEF")  # type: ignore[no-untyped-call]

NONLINEARITIES = ("tanh", "relu", "identity")
# How a kernel is to run: CPU threads; or the CUDA stream, a scan's regime and the capsule of its workspace; or for a
# single step of a scan the stream, "step", None, the step's number and the capsules of sums and carried states.
Execution: TypeAlias = int | tuple[int, str, object | None] | tuple[int, str, None, int, object, object]

CREDITS = ("local", "through_time")
PLAIN_RNN = "use torch.autograd.grad, or torch.nn.RNN, which tpext.nn.RNN.to_torch() gives"

NOT_A_DERIVATIVE = (
    "target propagation's backward pass is not a derivative, so it cannot be differentiated (create_graph=True, double "
    "backward) or transformed (torch.func); for second derivatives use rule=tpext.Backprop()"
)

LOW_PRECISION = (torch.float16, torch.bfloat16)

PLAIN = (Tensor, torch.nn.Parameter)

_Call = TypeVar("_Call")
_Result = TypeVar("_Result")


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    cast_outputs: bool,
    low_precision: bool = False,
) -> Callable[..., Any]:
    """Register an op: ``schema`` with its implementation on CPU and CUDA, its fake one and its autocast rules.

    Under autocast the low-precision floating-point arguments become float32, and with ``cast_outputs`` the outputs
    get the autocast dtype. On CUDA the arguments of an op with ``low_precision`` kernels, of float32 or lower, become
    the autocast dtype, and so do its outputs. Float64 arguments stay as they are.

    Returns:
        The op for a plain call: with plain tensors, of which no gradient is recorded, and without autocast it goes
        straight to the kernel, past torch's dispatcher, which takes some 5 us a call; else it is the op.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"tpext::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.tpext, name).default

    def autocast(device: str, *args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device) if low_precision and device == "cuda" else torch.float32
        with torch.autocast(device, enabled=False):
            outputs = op(*(cast(arg, dtype) for arg in args))
        return autocast_outputs(outputs, device) if cast_outputs else outputs

    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        LIBRARY.impl(name, kernel, key)  # type: ignore[no-untyped-call]
        LIBRARY.impl(name, functools.partial(autocast, device), f"Autocast{key}")  # type: ignore[no-untyped-call]

    def call(*args: Any) -> Any:
        plain = (
            # not another object, such as a tracer's; a first argument that may be None has a tensor behind it
            isinstance(args[1] if args[0] is None else args[0], Tensor)
            and not torch._C._is_any_autocast_enabled()
            and are_plain(args, recorded=torch.is_grad_enabled())
        )
        return kernel(*args) if plain else op(*args)

    return call


def are_plain(args: Sequence[Any], recorded: bool = False) -> bool:
    """Whether nothing but the kernels has to see a call: no compiler, tracer, mode, transform, subclass or lazy tensor.

    Where gradients are ``recorded``, no tensor that requires one either.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_function_stack() != 0
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    # every small call comes through here, and a generator would take half a microsecond more
    for a in args:
        if isinstance(a, Tensor) and not (
            type(a) in PLAIN
            and (a.is_cpu or a.is_cuda)
            and a.layout is torch.strided
            and not a.is_nested
            and not a.is_neg()
            and not a._is_zerotensor()
            and not (recorded and a.requires_grad)
        ):
            return False
    return True


def explained(run: Callable[[_Call], _Result], check: Callable[[_Call], object], call: _Call) -> _Result:
    """``run(call)``; where it raises, ``check(call)`` has the first word.

    For kernels on the CPU, whose bindings check every tensor that they get: the checks in Python, which know the op's
    own names and take as long as a small kernel, then run for the text of an error alone.
    """
    try:
        return run(call)
    except Exception:
        try:
            check(call)
        except Exception as reason:
            raise reason from None
        raise


def refuse_derivative(name: str, message: str) -> None:
    """Make differentiating an op raise RuntimeError with this message."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(message)

    torch.library.register_autograd(f"tpext::{name}", refuse, lib=LIBRARY)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device. The meta device has none, and asking whether it is on raises."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def full_precision(device: str) -> AbstractContextManager[object]:
    """Autocast switched off, where it is on, for what runs on this type of device."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value``, in ``dtype`` if it is a tensor of float32 or lower precision."""
    if isinstance(value, Tensor) and (value.dtype == torch.float32 or value.dtype in LOW_PRECISION):
        return value.to(dtype)
    return value


def autocast_outputs(outputs: Any, device: str) -> Any:
    """Float32 outputs in the dtype of the surrounding autocast of this type of device."""
    if isinstance(outputs, Tensor):
        return outputs.to(torch.get_autocast_dtype(device)) if outputs.dtype == torch.float32 else outputs
    return tuple(autocast_outputs(output, device) for output in outputs)


def on_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels take ``tensor``: the one question by which the ops choose between the two backends."""
    return tensor.is_cuda


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which the kernels compute on the values of ``tensor``."""
    return torch.float32 if tensor.dtype in LOW_PRECISION else tensor.dtype


def stream_of(tensor: Tensor) -> int:
    """The current stream (a ``cudaStream_t``) of the tensor's device."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device())


def execution(tensor: Tensor) -> Execution:
    """How to run a kernel that needs nothing but threads or a stream, for the last argument of its call."""
    return (stream_of(tensor), "auto", None) if on_cuda(tensor) else torch.get_num_threads()


def run_scan(
    op: str,
    run: Callable[[Execution], None],
    states: Tensor,
    products: Sequence[tuple[Tensor, bool]],
    start: Tensor | None = None,
    plan: Callable[..., tuple[str, int, float]] | None = None,
) -> None:
    """Run a scan over ``states [S, T, B, H]``: ``run`` calls its kernel, with what it is given for last argument.

    On CUDA the regime (where the weights stay during the scan) follows from the sizes; the environment variable
    ``TPEXT_CUDA_REGIME`` ("block", "cluster", "grid" or "step") demands one. In regime "step", for weights that no
    kernel keeps on the chip, every step is a matrix product by torch and one call for all the rest.

    Args:
        op: name in error messages.
        run: the call.
        states: gives sizes, dtype and device.
        products: what a step multiplies by, ``[S, K, N]`` each, and whether transposed.
        start: what the first step multiplies, ``[S, B, K]``; None: zero.
        plan: from dtype, S, B, H, device and regime to what ``rnn_plan`` gives; None: that, of so many products.
    """
    if not on_cuda(states):
        return run(torch.get_num_threads())
    stack, time, batch, hidden = states.shape
    wanted = os.environ.get("TPEXT_CUDA_REGIME") or "auto"
    regime, size, dtype = wanted, 0, dtype_name(states.dtype)
    if wanted != "step":
        device = max(states.get_device(), 0)
        try:
            planned = plan or functools.partial(rnn_plan, len(products))
            regime, size, _ = planned(dtype, stack, batch, hidden, device, wanted)
        except ValueError as error:
            raise ValueError(
                f"{op}: TPEXT_CUDA_REGIME={wanted!r} is not possible for {dtype} [S={stack}, B={batch}, "
                f"H={hidden}] on {states.device}: {error}"
            ) from error
    stream = stream_of(states)
    if regime != "step":
        workspace = torch.zeros(size, dtype=torch.uint8, device=states.device) if size else None
        return run((stream, regime, dense(workspace)))
    matrices = [matrix.mT if transposed else matrix for matrix, transposed in products]
    count, (_, of_states, of_sums) = len(matrices), matrices[0].shape
    carried, sums = (states.new_zeros(count, stack, batch, size) for size in (of_states, of_sums))
    if start is not None:
        carried[0].copy_(start)
    for step in range(time + 1):
        for into, left, right in zip(sums, carried, matrices, strict=True):
            torch.bmm(left, right, out=into)
        run((stream, "step", None, step, dense(sums), dense(carried)))


@functools.lru_cache(maxsize=1024)
def rnn_plan(
    products: int, dtype: str, stack: int, batch: int, hidden: int, device: int, regime: str
) -> tuple[str, int, float]:
    """``_C.rnn_plan``, remembered: it asks the driver what fits on the device."""
    return _C.rnn_plan(products, dtype, stack, batch, hidden, device, regime)


@functools.lru_cache(maxsize=1024)
def gated_plan(
    cell: str, way: str, dtype: str, stack: int, batch: int, hidden: int, device: int, regime: str
) -> tuple[str, int, float]:
    """``_C.gated_plan``, remembered as ``rnn_plan`` is."""
    return _C.gated_plan(cell, way, dtype, stack, batch, hidden, device, regime)


# looked up once: a small call exports a dozen tensors
_capsule: Callable[[Tensor], object] = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]


def dense(tensor: Tensor | None) -> object:
    """A DLPack capsule of ``tensor``, made row-major if it is not, for the kernels; None stays None."""
    try:
        return None if tensor is None else _capsule(tensor.contiguous())
    except RuntimeError as error:
        raise _explained_export(tensor, error) from None


def dense_rows(tensor: Tensor) -> object:
    """As ``dense``, but only the last axis needs to be dense: a transposed view of whole rows is not copied."""
    try:
        return _capsule(tensor if tensor.stride(-1) == 1 else tensor.contiguous())
    except RuntimeError as error:
        raise _explained_export(tensor, error) from None


def _explained_export(tensor: Tensor | None, error: RuntimeError) -> RuntimeError:
    """What to raise where a kernel cannot have a tensor: torch's error, or what a user can do."""
    if tensor is None or torch._C._has_storage(tensor):
        return error
    return RuntimeError(
        "a kernel needs a tensor with memory of its own, and a batch of gradients at once has none "
        "(torch.autograd.grad(..., is_grads_batched=True), vectorize=True): compute one gradient at a time"
    )


def check_tensor(op: str, name: str, value: object, shape: str = "") -> None:
    """Raise TypeError unless ``value`` is a tensor, or stands for one as a tracer's does; ``shape`` is what it has."""
    # every call comes through here: the answer first
    if isinstance(value, Tensor) or hasattr(type(value), "__torch_function__"):
        return
    expected = f"a tensor {shape}" if shape else "a tensor"
    raise TypeError(f"{op}: {name} must be {expected}, got {type(value).__name__}")


def is_integer(value: object) -> bool:
    """Whether ``value`` is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number, and not a bool."""
    # float first, as the compiler knows nothing of abstract classes
    return isinstance(value, (float, numbers.Real)) and not isinstance(value, bool)


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_scan(
    op: str,
    leading: str,
    tensors: Mapping[str, tuple[Tensor | None, Sequence[str]]],
    lengths: Tensor | None,
    reverse: Sequence[bool],
    nonlinearity: str | None = None,
) -> None:
    """Check the arguments of a recurrent op: one dtype, one device, sizes that fit.

    Args:
        op: name in error messages.
        leading: the argument of ``tensors`` that defines the sizes.
        tensors: each tensor with its dimensions as symbols, such as ``{"x_proj": (x_proj, "STBH")}``. None is skipped;
            a symbol that the leading tensor lacks means the size that the first tensor with it has.
        lengths: ``[B]`` int64 on the same device, or None.
        reverse: S flags.
        nonlinearity: one of ``NONLINEARITIES``, or None for an op without.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    refuse_forward_mode(op, PLAIN_RNN)
    first, symbols = tensors[leading]
    assert first is not None
    if first.dim() != len(symbols):
        raise ValueError(f"{op}: {leading} must be [{', '.join(symbols)}], got {list(first.shape)}")
    dtype, device = first.dtype, first.device
    sizes = dict(zip(symbols, first.shape, strict=True))
    if dtype not in (torch.float32, torch.float64) and not (dtype in LOW_PRECISION and on_cuda(first)):
        raise ValueError(
            f"{op}: {leading} must be float32 or float64, got {dtype_name(dtype)}; "
            "for lower precision use torch.autocast"
        )
    for name, (tensor, dims) in tensors.items():
        if tensor is None:
            continue
        # Every call of every op comes through here: what follows the comparison is for the first tensor with a symbol.
        if tensor.shape != tuple(map(sizes.get, dims)):
            if tensor.dim() == len(dims):
                for symbol, size in zip(dims, tensor.shape, strict=True):
                    sizes.setdefault(symbol, size)
            if tensor.shape != tuple(map(sizes.get, dims)):
                expected = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in dims)
                raise ValueError(f"{op}: {name} must be [{expected}], got {list(tensor.shape)}")
        if tensor.dtype != dtype:
            expected = dtype_name(dtype)
            raise ValueError(f"{op}: {name} must be {expected} as {leading} is, got {dtype_name(tensor.dtype)}")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device} as {leading} is, got {tensor.device}")
    if lengths is not None:
        if lengths.dtype != torch.int64:
            raise ValueError(f"{op}: lengths must be int64, got {dtype_name(lengths.dtype)}")
        if lengths.shape != (sizes["B"],):
            raise ValueError(f"{op}: lengths must be [B={sizes['B']}], got {list(lengths.shape)}")
        if lengths.device != device:
            raise ValueError(f"{op}: lengths must be on {device} as {leading} is, got {lengths.device}")
    if len(reverse) != sizes["S"]:
        raise ValueError(f"{op}: reverse must have S={sizes['S']} values, got {len(reverse)}")
    if nonlinearity is not None:
        check_choice(op, "nonlinearity", nonlinearity, NONLINEARITIES)


def refuse_forward_mode(op: str, advice: str = "use torch.autograd.grad") -> None:
    """Raise NotImplementedError in a forward-mode context, where the op would drop tangents silently.

    Under ``torch.func.jvp`` the tangents themselves cannot be seen from inside an op.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{op}: forward-mode differentiation (torch.func.jvp, jacfwd) is not supported; {advice}"
        )


def check_lengths(op: str, lengths: Tensor | None, time: int) -> None:
    """Raise ValueError unless all of ``lengths`` lie in 0..T; on CUDA, where looking would wait, kernels clamp them."""
    if lengths is None or on_cuda(lengths):
        return
    if lengths.numel() and not bool(((lengths >= 0) & (lengths <= time)).all()):
        raise ValueError(f"{op}: lengths must lie in 0..T={time}, got {lengths.tolist()}")


def check_like(op: str, name: str, tensor: Tensor, input: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``tensor`` has this shape, and the dtype and device of ``input``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != input.dtype:
        expected = dtype_name(input.dtype)
        raise ValueError(f"{op}: {name} must be {expected} as input is, got {dtype_name(tensor.dtype)}")
    if tensor.device != input.device:
        raise ValueError(f"{op}: {name} must be on {input.device} as input is, got {tensor.device}")


def dtype_name(dtype: torch.dtype) -> str:
    """As error messages and the kernels' plans have it: "float32"."""
    return str(dtype).removeprefix("torch.")
