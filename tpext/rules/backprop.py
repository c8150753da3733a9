"""Back-propagation, the rule of every kind of layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from tpext.rules.base import Kind
from tpext.rules.gated_call import GatedWeights, chain_rule, run_gated_backward
from tpext.rules.layer import LayerCall, LayerRule, through_activation
from tpext.rules.recurrent import RecurrentRule
from tpext.rules.recurrent_call import HowBack, LayerWeights, run_backward
from tpext.rules.recurrent_pass import Gradients, Piece, State, StateOrNone, Sweep


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
            piece: Piece, grad_states: Tensor | None, arriving: StateOrNone, credit: StateOrNone
        ) -> tuple[Gradients, State, StateOrNone]:
            # W is its own feedback, and a displacement minus a gradient; nothing is clipped by a'
            how = HowBack("linearized", "local", 1.0, 0.5, "derivative", 0.0)
            matrices, back = (layer.weight_hh, layer.weight_ih, None), (grad_states, arriving, credit)
            return run_backward(layer, piece, how, *matrices, (1.0, 1.0), False, *back)

        return Sweep(run, unit=-1.0, fades=True)

    def start_gated_sweep(self, layer: GatedWeights) -> Sweep:
        def run(
            piece: Piece, grad_states: Tensor | None, arriving: StateOrNone, credit: StateOrNone
        ) -> tuple[Gradients, State, StateOrNone]:
            back = (grad_states, arriving, credit)
            return run_gated_backward(layer, piece, chain_rule(), layer.weight_hh, (1.0, 1.0), *back)

        return Sweep(run, unit=-1.0, fades=True)

    def run_layer(self, call: LayerCall) -> Tensor:
        output: Tensor = call.activation(functional.linear(call.input, call.weight, call.bias))
        return output

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        return through_activation(displacement, call.output, call.activation) @ call.weight
