"""What the tests of ``tpext.nn.RNN`` share: sizes, inputs in every form, a comparison by name."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

T, B, I, H = 6, 4, 3, 5  # noqa: E741
LENGTHS = [3, 6, 1, 4]
DOUBLE = torch.float64


def sequences(form: str, batch_first: bool) -> Tensor | PackedSequence:
    """One random input in the given form; reseeded, so that two calls give equal inputs of their own."""
    torch.manual_seed(1)
    x = torch.randn(T, I, dtype=DOUBLE) if form == "unbatched" else torch.randn(T, B, I, dtype=DOUBLE)
    if batch_first and form != "unbatched":
        x = x.transpose(0, 1)
    x.requires_grad_()
    if not form.startswith("packed"):
        return x
    lengths = torch.tensor(LENGTHS if form == "packed" else sorted(LENGTHS, reverse=True))
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=form == "packed sorted")
    packed.data.retain_grad()
    return packed


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
