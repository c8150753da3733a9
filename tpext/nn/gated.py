"""What the recurrent networks of cells with gates share: GRU and LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from tpext.nn.recurrent import RecurrentLayers, owned_parameters, parameters_of, reverse_of, stack_members
from tpext.rules import GatedCall


class GatedLayers(RecurrentLayers):
    """Layers of a cell with gates."""

    _cell: ClassVar[str]
    """What ``torch.ops.tpext.gated_layer`` calls the cell."""

    def _call(
        self,
        members: Sequence[RecurrentLayers],
        layer: int,
        input: Tensor,
        starts: Sequence[Tensor],
        lengths: Tensor | None,
    ) -> GatedCall:
        weight_ih, weight_hh, *biases = stack_members(parameters_of(members, layer, input))
        bias_ih, bias_hh = biases if self.bias else (None, None)
        owned = owned_parameters(members, layer, input)
        run = (lengths, reverse_of(members), self._cell, owned, self.checkpoint_every, self._has_readers(layer))
        return GatedCall(input, tuple(starts), weight_ih, weight_hh, bias_ih, bias_hh, *run)
