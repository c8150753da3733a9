"""The forms in which recurrent layers take sequences and states, brought to one and back.

Batches may be padded or packed, single or batch first; inside, all of them are time-major padded batches with lengths.
Errors are those of ``torch.nn``'s modules where these have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tpext.nn.recurrent_parameters import RecurrentParameters
from tpext.ops._library import are_plain, autocasts, check_lengths, check_tensor

# What errors call the states of a cell, which has the first of them or both.
_STATES = ("hx", "cx")


class TimeMajor(NamedTuple):
    """What the layers run on.

    Attributes:
        rows: ``[T, B, I]``.
        states: the initial states ``[L*D, B, H]``, of each kind that the cell has, or None for zeros.
        lengths: ``[B]`` or None.
    """

    rows: Tensor
    states: tuple[Tensor, ...] | None
    lengths: Tensor | None


def time_major(
    layers: RecurrentParameters,
    input: Tensor | PackedSequence,
    states: tuple[Tensor, ...] | None,
    lengths: Tensor | Sequence[int] | None,
) -> TimeMajor:
    """Check the arguments of a forward pass and bring them to the form that the layers run on."""
    kind = layers._kind
    if not isinstance(input, PackedSequence):
        check_tensor(kind, "input", input, "[T, B, I] or [T, I], or a PackedSequence")
    for name, state in zip(_STATES, states or (), strict=False):
        check_tensor(kind, name, state, "[num_layers * D, B, H]")
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError(f"{kind}: lengths must be None with a PackedSequence, which has its own")
        _check_input(layers, input.data, dim=2)
        # without the indices, the rows stay in the sorted order of the packed data
        padded, of_rows = pad_packed_sequence(PackedSequence(input.data, input.batch_sizes))
        valid: Tensor | None = of_rows.to(padded.device, non_blocking=True)
        if states is not None and input.sorted_indices is not None:
            states = _select_rows(states, input.sorted_indices)
    else:
        valid = None if lengths is None else _as_integers(kind, lengths)
        padded, states = _batched(layers, input, states, valid)
        _check_input(layers, padded, dim=3)
    _check_states(layers, padded, states)
    if padded.size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None and valid is not None:
        valid = _beside(layers, valid, padded)
    return TimeMajor(padded, states, valid)


def _beside(layers: RecurrentParameters, lengths: Tensor, padded: Tensor) -> Tensor:
    """A user's lengths on the input's device, checked; those of a packed batch are right."""
    steps, batch, _ = padded.shape
    if lengths.shape != (batch,):
        first = "" if layers.batch_first else " ([T, B, I], without batch_first)"
        raise ValueError(f"{layers._kind}: lengths must be [B={batch}] as input{first}, got {list(lengths.shape)}")
    if lengths.is_cpu and are_plain((lengths,)):
        check_lengths(layers._kind, lengths, steps)
    if lengths.is_cpu and padded.is_cuda:
        lengths = lengths.to(padded.device, non_blocking=True)
    check_device("lengths", lengths, padded)
    return lengths


def _as_integers(kind: str, lengths: Tensor | Sequence[int]) -> Tensor:
    """The lengths as int64; a list is as good as a tensor."""
    if not isinstance(lengths, Tensor):
        expected = f"{kind}: lengths must be a tensor [B] or a list of integers, got {type(lengths).__name__}"
        try:
            lengths = torch.tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(expected) from error
        if not _are_integers(lengths):
            raise TypeError(f"{expected} of {lengths.dtype}")
    if not _are_integers(lengths):
        raise ValueError(f"{kind}: lengths must be integers, got {lengths.dtype} {list(lengths.shape)}")
    return lengths.to(torch.int64)


def _are_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def as_given(
    layers: RecurrentParameters, input: Tensor | PackedSequence, output: Tensor, finals: tuple[Tensor, ...]
) -> tuple[Tensor | PackedSequence | None, tuple[Tensor, ...]]:
    """Bring outputs ``[T, B, D*H]`` (to None unless wanted) and final states ``[L*D, B, H]`` to the input's form."""
    if isinstance(input, PackedSequence):
        if input.unsorted_indices is not None:
            finals = _select_rows(finals, input.unsorted_indices)
        if not layers.return_sequence:
            return None, finals
        data = pack_padded_sequence(output, _packed_lengths(input)).data
        return PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices), finals
    unbatched = input.dim() == 2
    if unbatched:
        finals = tuple(state.squeeze(1) for state in finals)
    if not layers.return_sequence:
        return None, finals
    if unbatched:
        return output.squeeze(1), finals
    return (output.transpose(0, 1) if layers.batch_first else output), finals


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    # explicit, because the dispatcher lets a CPU tensor with a meta one through
    if tensor.device != input.device:
        raise RuntimeError(
            f"Input and {name} tensors are not at the same device, found input tensor at {input.device} "
            f"and {name} tensor at {tensor.device}"
        )


def _batched(
    layers: RecurrentParameters, input: Tensor, states: tuple[Tensor, ...] | None, lengths: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """A padded batch, or a single sequence as a batch of one, and its initial states."""
    dim = input.dim()
    if dim not in (2, 3):
        # as torch's modules have it, word by word
        noun = " tensor" if layers._kind == "RNN" else ""
        raise ValueError(f"{layers._kind}: Expected input to be 2D or 3D, got {dim}D{noun} instead")
    if states is not None and any(state.dim() != dim for state in states):
        batching = "unbatched" if dim == 2 else "batched"
        dims = [f"{state.dim()}-D" for state in states]
        names, got = ("hx", f"{dims[0]} tensor") if len(dims) == 1 else ("hx and cx", f"({', '.join(dims)}) tensors")
        raise RuntimeError(f"For {batching} {dim}-D input, {names} should also be {dim}-D but got {got}")
    if dim == 3:
        return input.transpose(0, 1) if layers.batch_first else input, states
    if lengths is not None:
        raise ValueError(f"{layers._kind}: lengths needs batched 3-D input; cut an unbatched sequence instead")
    return input.unsqueeze(1), None if states is None else tuple(state.unsqueeze(1) for state in states)


def _check_input(layers: RecurrentParameters, input: Tensor, dim: int) -> None:
    dtype = layers.weight_ih_l0.dtype
    if dtype not in (torch.float32, torch.float64) and input.device.type == "cpu":
        raise ValueError(
            f"{layers._kind}: parameters on the CPU must be float32 or float64, got {dtype}; keep them in float32 "
            f"and run under torch.autocast('cpu', dtype={dtype})"
        )
    if input.dtype != dtype and not autocasts(input.device.type):
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
            f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
        )
    if input.dim() != dim:
        raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
    if input.size(-1) != layers.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layers.input_size}, got {input.size(-1)}"
        )


def _check_states(layers: RecurrentParameters, padded: Tensor, states: tuple[Tensor, ...] | None) -> None:
    for place, state in enumerate(states or ()):
        size = layers.output_size if place == 0 else layers.hidden_size
        expected = (len(layers._all_weights), padded.size(1), size)
        if state.shape != expected:
            name = "hidden" if states is None or len(states) == 1 else f"hidden[{place}]"
            raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")
        check_device("hidden", state, padded)
        if state.dtype != padded.dtype and not autocasts(padded.device.type):
            raise RuntimeError(
                f"{layers._kind}: {_STATES[place]} must have the dtype of input, {padded.dtype}, got {state.dtype}"
            )


def _select_rows(states: tuple[Tensor, ...], indices: Tensor) -> tuple[Tensor, ...]:
    return tuple(state.index_select(1, indices) for state in states)


def _packed_lengths(packed: PackedSequence) -> Tensor:
    """The lengths of the rows in packed order, on the CPU as the batch sizes are."""
    rows = torch.arange(int(packed.batch_sizes[0])).unsqueeze(1)
    return (rows < packed.batch_sizes).sum(1)
