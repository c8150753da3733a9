"""What the recurrent networks of cells with gates share: GRU and LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tpext.nn.recurrent import RecurrentLayers
from tpext.nn.recurrent_input import check_device
from tpext.rules import GatedCall


class GatedLayers(RecurrentLayers):
    """Layers of a cell with gates."""

    _cell: ClassVar[str]
    """What ``torch.ops.tpext.gated_layer`` calls the cell."""

    def _call(self, layer: int, input: Tensor, starts: Sequence[Tensor], lengths: Tensor | None) -> GatedCall:
        directions = len(self._reverse)
        stacks: list[Tensor | None] = []
        members = self._all_weights[layer * directions : (layer + 1) * directions]
        for names in zip(*members, strict=True):
            parameters = [getattr(self, name) for name in names]
            for parameter in parameters:
                check_device("parameter", parameter, input)
            stacks.append(parameters[0].unsqueeze(0) if directions == 1 else torch.stack(parameters))
        weight_ih, weight_hh, bias_ih, bias_hh = (*stacks, None, None)[:4]
        assert weight_ih is not None
        assert weight_hh is not None
        owned = self._owned_parameters(layer, input)
        run = (lengths, self._reverse, self._cell, owned, self.checkpoint_every, self._has_readers(layer))
        return GatedCall(input.unsqueeze(0), tuple(starts), weight_ih, weight_hh, bias_ih, bias_hh, *run)
