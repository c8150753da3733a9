"""Back-propagation, the rule of every kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tpext.ops._gated_composite import gated_layer_composite
from tpext.ops._rnn_products import final_states, input_projection
from tpext.rules.base import Kind
from tpext.rules.gated_pass import GatedCall, GatedWay
from tpext.rules.layer import LayerCall, LayerRule, through_activation
from tpext.rules.recurrent import RecurrentRule
from tpext.rules.recurrent_pass import Gradients, HowBack, LayerWeights, Piece, RecurrentCall, Sweep, run_backward


@dataclass(frozen=True)
class Backprop(RecurrentRule, LayerRule):  # type: ignore[misc]  # has none of the numbers that differ in kind
    """Exact gradients (back-propagation through time) on the same fused kernels.

    ``e_t = (g_t + e_{t+1} W) * a'(h_t)``

    Equals ``torch.nn.RNN`` to rounding, supports double backward, works with every nonlinearity. A feed-forward layer
    under this rule is torch's own operations.

    >>> Backprop()
    Backprop()
    """

    # of networks too, though no NetworkRule: there it is the network itself
    kinds: ClassVar[frozenset[Kind]] = frozenset({"recurrent", "layer", "network"})
    exact: ClassVar[Literal[True]] = True

    def check(self, layer: nn.Module) -> None:
        """It serves every layer."""

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return weight_hh

    def start_sweep(self, layer: LayerWeights) -> Sweep:
        def run(
            piece: Piece, grad_states: Tensor | None, arriving: Tensor | None, credit: Tensor | None
        ) -> tuple[Gradients, Tensor, Tensor | None]:
            # W is its own feedback, and a displacement minus a gradient; nothing is clipped by a'
            how = HowBack("linearized", "local", 1.0, 0.5, "derivative", 0.0)
            matrices, back = (layer.weight_hh, layer.weight_ih, None), (grad_states, arriving, credit)
            return run_backward(layer, piece, how, *matrices, (1.0, 1.0), False, *back)

        return Sweep(run, unit=-1.0, fades=True)

    def composite(self, call: RecurrentCall) -> tuple[Tensor, Tensor]:
        x_proj = input_projection(call.input, call.weight_ih, call.bias)
        states = torch.ops.tpext.rnn_scan(
            x_proj, call.h0, call.weight_hh, call.lengths, call.reverse, call.nonlinearity
        )
        return states, final_states(states, call.h0, call.lengths, call.reverse)

    def gated_way(self, weight_hh: Tensor, owned: Sequence[Tensor]) -> GatedWay:
        # nothing is clipped by a'
        return GatedWay(weight_hh, "branch", "local", 1.0, 0.25, "derivative", "derivative", 0.0, normalize=True)

    def gated_composite(self, call: GatedCall) -> tuple[Tensor, ...]:
        weights = (call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh)
        h0, c0 = call.start[0], call.start[1] if len(call.start) == 2 else None
        run = (call.lengths, call.reverse, call.cell)
        states, h_n, c_n, _ = gated_layer_composite(call.input, h0, c0, *weights, *run)
        return (states, h_n) if c0 is None else (states, h_n, c_n)

    def run_layer(self, call: LayerCall) -> Tensor:
        output: Tensor = call.activation(functional.linear(call.input, call.weight, call.bias))
        return output

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        return through_activation(displacement, call.output, call.activation) @ call.weight
