"""``code_difference``, ``probe_difference``: how a layer's code moves, behind its activation and its max pooling.

The elementwise work around the convolutions of learned feedback. A layer with pre-activation ``z`` has the output ``(y,
indices) = max_pool(a(z))``, and feedback starts from its code ``unpool(a(y), indices)``: the activation once more, on
the output, and back to where the maxima came from. Of ``K`` moved layers the differences of the codes::

    code_difference    D_k = unpool(a(y_k), indices_k) - unpool(a(y), indices)
                       with (y_k, indices_k) = max_pool(a(z + dz_k)); or
                       with noisy=False, unpool(a(y_k), indices) - unpool(a(y), indices)
    probe_difference   D_k = unpool(a(y + sigma n_k) - a(y), indices)

where ``n_k`` is ``counter_normal(y.shape, stream=stream + k * stream_stride)``, made in the kernel and never stored:
``y + sigma n_k`` is one multiply-add, rounded once where the processor has a fused one. Without a pool (``kernel=0``)
``unpool`` is the identity and ``y = a(z)``.

``a`` is elu (``alpha > 0``), relu, tanh or the identity. ``max_pool`` is torch's ``max_pool2d`` with square windows: of
equal maxima the first in raster order counts, of NaN the last. The kernels find the maximum before ``a``, which rises;
ties that only the rounding of ``a`` makes, short of where it is flat, are told apart. ``unpool`` fills planes of zeros
with the windows' values at their indices, windows in raster order: where windows overlap and two name one position, the
last one stays. ``indices`` must be what ``max_pool2d`` gives; an index outside its own window puts its value nowhere or
elsewhere in the plane.

One pass over memory: ``z``, ``dz``, ``y`` and ``indices`` are read once, ``D`` is written once. Pools of 2 x 2 over
planes of even sizes are the fast case. Each sample's result is the same to the bit on any number of threads and in any
part of a batch. Under autocast both compute in float32. They are no derivatives and have none: differentiating raises
RuntimeError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpext import _C
from tpext.ops._library import (
    LOW_PRECISION,
    check_choice,
    check_tensor,
    define,
    dense,
    dtype_name,
    execution,
    is_integer,
    is_number,
    refuse_derivative,
    refuse_forward_mode,
)
from tpext.ops.counter_normal import check_counter

ACTIVATIONS = ("elu", "relu", "tanh", "identity")

_NO_DERIVATIVE = "{}: learned feedback is not a derivative and has none; to train it use tpext.feedback.ldrl_loss"


def _check(op: str, name: str, tensor: Tensor, activation: str, alpha: float) -> None:
    refuse_forward_mode(op, "it has no derivative")
    if tensor.dtype not in (torch.float32, torch.float64):
        hint = "; for lower precision use torch.autocast" if tensor.dtype in LOW_PRECISION else ""
        raise ValueError(f"{op}: {name} must be float32 or float64, got {dtype_name(tensor.dtype)}{hint}")
    check_choice(op, "activation", activation, ACTIVATIONS)
    if activation == "elu" and not 0 < alpha < math.inf:
        raise ValueError(f"{op}: alpha must be a finite number > 0, got {alpha}")


def _pooled(op: str, height: int, width: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """The sizes ``h, w`` of a pooled plane."""
    if kernel < 1:
        raise ValueError(f"{op}: kernel must be >= 0, got {kernel}")
    if stride < 1:
        raise ValueError(f"{op}: stride must be >= 1, got {stride}")
    if not 0 <= padding <= kernel // 2:
        raise ValueError(f"{op}: padding must lie in 0..kernel/2={kernel // 2}, got {padding}")
    if min(height, width) < kernel - 2 * padding:
        least = kernel - 2 * padding
        raise ValueError(f"{op}: H and W must be at least kernel - 2 padding = {least}, got {height} and {width}")
    return (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1


def _check_indices(op: str, output: Tensor, indices: Tensor | None, kernel: int) -> None:
    if (indices is None) != (kernel == 0):
        raise ValueError(f"{op}: indices must be given with a pool (kernel > 0) and only with one, got kernel={kernel}")
    if indices is None:
        return
    if indices.dtype != torch.int64:
        raise ValueError(f"{op}: indices must be int64, got {dtype_name(indices.dtype)}")
    if indices.shape != output.shape:
        raise ValueError(f"{op}: indices must be {list(output.shape)} as output is, got {list(indices.shape)}")
    if indices.device != output.device:
        raise ValueError(f"{op}: indices must be on {output.device} as output is, got {indices.device}")


def _check_tensor(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != like.dtype:
        expected = dtype_name(like.dtype)
        raise ValueError(f"{op}: {name} must be {expected} as {like_name} is, got {dtype_name(tensor.dtype)}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as {like_name} is, got {tensor.device}")


def _fake_code(
    preactivation: Tensor,
    change: Tensor,
    output: Tensor,
    indices: Tensor | None,
    activation: str,
    alpha: float,
    kernel: int,
    stride: int,
    padding: int,
    noisy: bool,
) -> Tensor:
    """Check the arguments and return an empty output."""
    op = "code_difference"
    _check(op, "preactivation", preactivation, activation, alpha)
    pooled = tuple(preactivation.shape)
    if kernel != 0:
        if preactivation.dim() != 4:
            raise ValueError(f"{op}: preactivation must be [B, C, H, W], got {list(preactivation.shape)}")
        pooled = (*pooled[:2], *_pooled(op, pooled[2], pooled[3], kernel, stride, padding))
    if change.dim() == 0:
        raise ValueError(f"{op}: change must be [K, *{list(preactivation.shape)}], got []")
    moved = (change.shape[0], *preactivation.shape)
    _check_tensor(op, "change", change, "preactivation", preactivation, moved)
    _check_tensor(op, "output", output, "preactivation", preactivation, pooled)
    _check_indices(op, output, indices, kernel)
    return preactivation.new_empty(moved)


def _planes(tensor: Tensor | None, kernel: int, leading: int = 0) -> Tensor | None:
    """``[..., B, C, H, W]`` as ``[..., B C, H, W]``, and what has no pool as ``[..., 1, 1, N]``; dense."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    if kernel:
        return tensor.flatten(leading, leading + 1)
    return tensor.view(*tensor.shape[:leading], 1, 1, math.prod(tensor.shape[leading:]))


def _code_difference(
    preactivation: Tensor,
    change: Tensor,
    output: Tensor,
    indices: Tensor | None,
    activation: str,
    alpha: float,
    kernel: int,
    stride: int,
    padding: int,
    noisy: bool,
) -> Tensor:
    difference = _fake_code(preactivation, change, output, indices, activation, alpha, kernel, stride, padding, noisy)
    if difference.numel():
        _C.code_difference(
            dense(_planes(preactivation, kernel)),
            dense(_planes(change, kernel, 1)),
            dense(_planes(output, kernel)),
            dense(_planes(indices, kernel)),
            activation,
            alpha,
            kernel,
            stride,
            padding,
            noisy,
            dense(_planes(difference, kernel, 1)),
            execution(preactivation),
        )
    return difference


_code = define(
    "code_difference(Tensor preactivation, Tensor change, Tensor output, Tensor? indices, str activation, float alpha, "
    "int kernel, int stride, int padding, bool noisy) -> Tensor",
    _code_difference,
    _fake_code,
    cast_outputs=False,
)
refuse_derivative("code_difference", _NO_DERIVATIVE.format("code_difference"))


def _fake_probe(
    output: Tensor,
    indices: Tensor | None,
    activation: str,
    alpha: float,
    kernel: int,
    stride: int,
    padding: int,
    height: int,
    width: int,
    sigma: float,
    seed: int,
    step: int,
    stream: int,
    stream_stride: int,
    first_row: int,
    draws: int,
) -> Tensor:
    """Check the arguments and return an empty output."""
    op = "probe_difference"
    _check(op, "output", output, activation, alpha)
    if output.dim() == 0:
        raise ValueError(f"{op}: output must be [B, ...], got []")
    moved = tuple(output.shape)
    if kernel != 0:
        if output.dim() != 4:
            raise ValueError(f"{op}: output must be [B, C, h, w], got {list(output.shape)}")
        pooled = (*output.shape[:2], *_pooled(op, height, width, kernel, stride, padding))
        if tuple(output.shape) != pooled:
            raise ValueError(
                f"{op}: output must be {list(pooled)} for planes [H={height}, W={width}], got {list(output.shape)}"
            )
        moved = (*output.shape[:2], height, width)
    _check_indices(op, output, indices, kernel)
    if not is_number(sigma) or not math.isfinite(sigma):
        raise ValueError(f"{op}: sigma must be a finite number, got {sigma!r}")
    if not is_integer(draws) or draws < 0:
        raise ValueError(f"{op}: draws must be an integer >= 0, got {draws!r}")
    if not is_integer(stream_stride) or not 0 <= stream_stride < 2**32:
        raise ValueError(f"{op}: stream_stride must lie in [0, 2^32), got {stream_stride!r}")
    check_counter(op, seed, step, stream, first_row, output.shape[0], math.prod(output.shape[1:]))
    if stream + max(draws - 1, 0) * stream_stride >= 2**32:
        raise ValueError(
            f"{op}: the last stream, stream + (draws - 1) stream_stride, must be less than 2^32, got "
            f"{stream} + {draws - 1} * {stream_stride}"
        )
    return output.new_empty((draws, *moved))


def _probe_difference(
    output: Tensor,
    indices: Tensor | None,
    activation: str,
    alpha: float,
    kernel: int,
    stride: int,
    padding: int,
    height: int,
    width: int,
    sigma: float,
    seed: int,
    step: int,
    stream: int,
    stream_stride: int,
    first_row: int,
    draws: int,
) -> Tensor:
    difference = _fake_probe(
        output, indices, activation, alpha, kernel, stride, padding, height, width, sigma, seed, step, stream,
        stream_stride, first_row, draws,
    )  # fmt: skip
    if difference.numel():
        flat, moved = output.contiguous(), difference
        if not kernel:
            rows, columns = output.shape[0], math.prod(output.shape[1:])
            flat, moved = flat.view(rows, 1, 1, columns), difference.view(draws, rows, 1, 1, columns)
        _C.probe_difference(
            dense(flat),
            dense(indices),
            activation,
            alpha,
            kernel,
            stride,
            padding,
            sigma,
            seed,
            step,
            stream,
            stream_stride,
            first_row,
            dense(moved),
            execution(output),
        )
    return difference


_probe = define(
    "probe_difference(Tensor output, Tensor? indices, str activation, float alpha, int kernel, int stride, "
    "int padding, SymInt height, SymInt width, float sigma, SymInt seed, SymInt step, SymInt stream, "
    "int stream_stride, SymInt first_row, int draws) -> Tensor",
    _probe_difference,
    _fake_probe,
    cast_outputs=False,
)
refuse_derivative("probe_difference", _NO_DERIVATIVE.format("probe_difference"))


def code_difference(
    preactivation: Tensor,
    change: Tensor,
    output: Tensor,
    indices: Tensor | None = None,
    *,
    activation: str = "elu",
    alpha: float = 1.0,
    kernel: int = 0,
    stride: int | None = None,
    padding: int = 0,
    noisy: bool = True,
) -> Tensor:
    """How far each change of a layer's pre-activation moves its code: ``unpool(a(y_k), i_k) - unpool(a(y), i)``.

    ``(y_k, i_k) = max_pool(a(z + dz_k))``. The module's head defines ``max_pool`` and ``unpool``.

    Args:
        preactivation: ``z [B, C, H, W]``, float32 or float64; without a pool of any shape.
        change: ``dz [K, B, C, H, W]``, of the same dtype.
        output: ``y [B, C, h, w]``, what the layer gave: ``max_pool(a(z))``.
        indices: ``i [B, C, h, w]`` int64, where in its plane each maximum was; None without a pool.
        activation: "elu", "relu", "tanh" or "identity".
        alpha: elu's, > 0.
        kernel: of the pool, whose windows are square; 0: there is none.
        stride: of the pool; None: ``kernel``.
        padding: of the pool, at most ``kernel / 2``.
        noisy: whether a moved output goes to its own indices rather than to ``indices``.

    Returns:
        ``D [K, B, C, H, W]``.

    Raises:
        ValueError: naming the argument, what was expected and what came. RuntimeError: on differentiating.

    Cost: one pass over the arguments and the result; two activations a window and draw, one more a window.

    >>> import torch, tpext
    >>> z, dz = torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]]), torch.tensor([[[[[2.0, 0.0], [0.0, 0.0]]]]])
    >>> y, indices = torch.nn.functional.max_pool2d(z, 2, return_indices=True)
    >>> tpext.ops.code_difference(z, dz, y, indices, activation="identity", kernel=2).squeeze()
    tensor([[ 3., -2.],
            [ 0.,  0.]])
    """
    check_tensor("code_difference", "preactivation", preactivation, "[B, C, H, W]")
    check_tensor("code_difference", "change", change, "[K, B, C, H, W]")
    check_tensor("code_difference", "output", output, "[B, C, h, w]")
    if indices is not None:
        check_tensor("code_difference", "indices", indices, "[B, C, h, w]")
    step = kernel if stride is None else stride
    return _code(  # type: ignore[no-any-return]
        preactivation, change, output, indices, activation, alpha, kernel, max(step, 1) if kernel == 0 else step,
        padding, noisy,
    )  # fmt: skip


def probe_difference(
    output: Tensor,
    indices: Tensor | None = None,
    *,
    activation: str = "elu",
    alpha: float = 1.0,
    kernel: int = 0,
    stride: int | None = None,
    padding: int = 0,
    height: int = 0,
    width: int = 0,
    sigma: float,
    seed: int,
    step: int,
    stream: int,
    stream_stride: int = 2,
    first_row: int = 0,
    draws: int = 1,
) -> Tensor:
    """How far noise on a layer's output moves its code: ``unpool(a(y + sigma n_k) - a(y), indices)``.

    ``n_k = counter_normal(y.shape, seed, step, stream + k * stream_stride, first_row)``, which no memory holds. The
    module's head defines ``unpool``.

    Args:
        output: ``y [B, C, h, w]``, float32 or float64; without a pool ``[B, ...]``.
        indices: ``[B, C, h, w]`` int64, where in its plane each maximum was; None without a pool.
        activation, alpha, kernel, stride, padding: as :func:`code_difference`.
        height, width: ``H, W`` of the planes; without a pool they do not matter.
        sigma: standard deviation of the noise.
        seed, step, stream, first_row: as :func:`tpext.ops.counter_normal`.
        stream_stride: from one draw's stream to the next one's. 2 leaves every other stream to a caller that draws a
            second noise with each.
        draws: ``K``.

    Returns:
        ``D [K, B, C, H, W]``, without a pool ``[K, B, ...]``.

    Raises:
        ValueError: naming the argument, what was expected and what came. RuntimeError: on differentiating.

    Cost: one pass over the arguments and the result; one normal number and one activation a window and draw.

    >>> import torch, tpext
    >>> y, counter = torch.zeros(2, 3), {"seed": 1, "step": 2, "stream": 0}
    >>> probes = tpext.ops.probe_difference(y, activation="identity", sigma=1.0, **counter)
    >>> torch.equal(probes[0], tpext.ops.counter_normal([2, 3], **counter))
    True
    """
    check_tensor("probe_difference", "output", output, "[B, C, h, w]")
    if indices is not None:
        check_tensor("probe_difference", "indices", indices, "[B, C, h, w]")
    pool_step = kernel if stride is None else stride
    return _probe(  # type: ignore[no-any-return]
        output, indices, activation, alpha, kernel, max(pool_step, 1) if kernel == 0 else pool_step, padding, height,
        width, sigma, seed, step, stream, stream_stride, first_row, draws,
    )  # fmt: skip


def max_unpool(values: Tensor, indices: Tensor, height: int, width: int, *, overlapping: bool = False) -> Tensor:
    """The inverse of max pooling, ``unpool`` of the module's head: planes of zeros with each value at its index.

    Differentiable with regard to ``values``, as often as wanted: a value that is overwritten has derivative zero. Torch
    operations, which ``torch.compile(fullgraph=True)`` takes.

    Args:
        values: ``[..., h, w]``.
        indices: ``[..., h, w]`` int64, positions in the plane, row-major.
        height, width: ``H, W`` of the planes.
        overlapping: whether two windows of a plane can name one position; the last one in raster order stays. Where
            they cannot, this costs three passes less.

    Returns:
        ``[..., H, W]``.

    Raises:
        ValueError: shapes, dtype or device that do not fit.

    >>> import torch, tpext
    >>> tpext.ops.max_unpool(torch.tensor([[5.0]]), torch.tensor([[2]]), 2, 2)
    tensor([[0., 0.],
            [5., 0.]])
    """
    op = "max_unpool"
    check_tensor(op, "values", values, "[..., h, w]")
    check_tensor(op, "indices", indices, "[..., h, w]")
    if values.dim() < 2:
        raise ValueError(f"{op}: values must be [..., h, w], got {list(values.shape)}")
    if indices.dtype != torch.int64:
        raise ValueError(f"{op}: indices must be int64, got {dtype_name(indices.dtype)}")
    if indices.shape != values.shape:
        raise ValueError(f"{op}: indices must be {list(values.shape)} as values is, got {list(indices.shape)}")
    if indices.device != values.device:
        raise ValueError(f"{op}: indices must be on {values.device} as values is, got {indices.device}")
    numbers, places = values.flatten(-2), indices.flatten(-2)
    planes = values.new_zeros(*values.shape[:-2], height * width)
    if overlapping:
        windows = torch.arange(numbers.shape[-1], device=values.device).expand_as(places)
        last = torch.full(planes.shape, -1, device=values.device).scatter_reduce(-1, places, windows, "amax")
        kept = torch.where(last.gather(-1, places) == windows, numbers, 0)
        planes = planes.scatter_add(-1, places, kept)
    else:
        planes = planes.scatter(-1, places, numbers)
    return planes.view(*values.shape[:-2], height, width)
