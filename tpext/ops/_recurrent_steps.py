"""The steps of recurrent layers: the order of each member's run, and which of a row's steps are valid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def directions(reverse: Sequence[bool]) -> Iterator[tuple[slice, bool]]:
    """The stretches of members that run in the same direction, and whether that is backwards."""
    begin = 0
    for backwards, members in itertools.groupby(reverse):
        end = begin + len(list(members))
        yield slice(begin, end), backwards
        begin = end


def valid_steps(lengths: Tensor, time: int) -> Tensor:
    """``[T, B, 1]``: whether the step is one of the row's."""
    return (torch.arange(time, device=lengths.device).unsqueeze(1) < lengths).unsqueeze(2)


def at_last_valid(tensor: Tensor, lengths: Tensor) -> Tensor:
    """What ``tensor [S, T, B, H]`` holds at each row's last valid step (at step 0 without one), ``[S, B, H]``."""
    at = (lengths - 1).clamp(0, tensor.shape[1] - 1).view(1, 1, -1, 1)
    return tensor.gather(1, at.expand(tensor.shape[0], 1, -1, tensor.shape[3])).squeeze(1)


def where_valid(on: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """``new`` where the step is one of the row's, elsewhere ``old``; ``on`` None: all steps are."""
    return new if on is None else torch.where(on, new, old)


def over_time(steps: list[Tensor], like: Tensor) -> Tensor:
    """The steps one after another along axis 1; ``like`` one of them, where there is none."""
    return torch.stack(steps, 1) if steps else like.unsqueeze(1)[:, :0]


def of_run(tensor: Tensor, reverse: Sequence[bool], begin: int = 0, end: int | None = None) -> Tensor:
    """Steps ``begin`` to ``end`` of each member's run, in the order of the run, of ``tensor [S, T, ...]``.

    Of a whole run it is its own inverse.
    """
    time = tensor.shape[1]
    end = time if end is None else end
    parts = [
        tensor[members, time - end : time - begin].flip(1) if backwards else tensor[members, begin:end]
        for members, backwards in directions(reverse)
    ]
    # no member has no part
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else tensor[:, begin:end]


def final_states(states: Tensor, h0: Tensor, lengths: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    """State after the last valid step of each row and member, ``[S, B, H]``; ``h0`` without one."""
    if states.shape[1] == 0:
        return h0.clone()
    members = []
    for member, backwards in enumerate(reverse):
        if backwards or lengths is None:
            last = states[member, 0 if backwards else -1]
        else:
            last = at_last_valid(states[member : member + 1], lengths)[0]
        members.append(last if lengths is None else torch.where((lengths > 0).unsqueeze(1), last, h0[member]))
    return torch.stack(members)


def states_before(states: Tensor, h0: Tensor, lengths: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    """The state that each step started from, ``[S, T, B, H]``; unspecified beyond ``lengths``."""
    members = []
    for member, start, backwards in zip(states, h0, reverse, strict=True):
        first = start.unsqueeze(0)
        if not backwards:
            members.append(torch.cat((first, member[:-1])))
            continue
        before = torch.cat((member[1:], first))
        if lengths is not None:
            starts = torch.arange(member.size(0), device=lengths.device).unsqueeze(1) == lengths - 1
            before = torch.where(starts.unsqueeze(2), first, before)
        members.append(before)
    return torch.stack(members)
