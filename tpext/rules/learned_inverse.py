"""The rule of recurrent layers that learns their inverse: a reverse layer, trained as an auto-encoder of each step."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from tpext.ops._members import as_list
from tpext.ops._recurrent_steps import valid_steps
from tpext.ops._rnn_products import input_projection
from tpext.ops.rnn_target_scan import rnn_learned_target_scan
from tpext.rules.base import Kind, PerMember, number, of_each
from tpext.rules.gated_call import GatedWeights, chain_rule, run_gated_backward, steps_apart
from tpext.rules.recurrent import Credit, RecurrentRule
from tpext.rules.recurrent_call import HowBack, LayerWeights, run_backward
from tpext.rules.recurrent_pass import Gradients, Piece, State, StateOrNone, Sweep

if TYPE_CHECKING:
    from tpext.rules.recurrent_pass import CellCall


@dataclass(frozen=True)
class LearnedInverse(RecurrentRule):
    """Target propagation through a learned reverse layer (an auto-encoder of each step).

    With ``G(x_t, h) = tanh(h V^T + c + x_t U^T)``, which shares ``U`` with the layer (of a GRU with its candidate),

    ``d_{t-1} = G(x_t, h_t + d_t) - G(x_t, h_t) - target_step g_{t-1}``

    The reverse weights ``V`` and biases ``c`` are parameters of the module, present only under this rule. The loss's
    backward pass leaves them without a gradient; they learn from :meth:`tpext.nn.RNN.reconstruction_loss`, stepped
    before the target pass. Not linear in the gradient (see the module's head).

    It serves the simple cell with tanh, and the GRU, whose state has tanh's range too. There ``G`` has to undo all
    gates at once, and is given the input but none of the gates; no publication has it. An LSTM's c is beyond a reverse
    layer of h.

    Under ``DistributedDataParallel`` compute the reconstruction loss in the wrapped module's ``forward``, by a flag,
    and pass ``find_unused_parameters=True``, with no other forward pass between a loss's forward and its backward: then
    both losses' gradients are averaged.

    Args:
        target_step: size of the first displacement, ``d_T = -target_step * g_T``, > 0; a tuple has one for each member
            (direction) of a layer.
        credit: local losses back-propagated through the unrolled layer ("through_time"), or each alone ("local"). See
            the module's head.
        normalize: True divides the parameter gradients by ``target_step``; False gives the published scaling.
        noise: standard deviation, >= 0, of the noise that the reconstruction loss adds to the states by default.

    Raises:
        ValueError: an argument out of its range, named.

    Source: Lee et al., "Difference Target Propagation", 2015; Manchev and Spratling, "Target Propagation in Recurrent
    Neural Networks", JMLR 21(7), 2020.

    >>> LearnedInverse(noise=0.1)
    LearnedInverse(noise=0.1)
    """

    sources: ClassVar[tuple[str, ...]] = ("lee2015", "manchev2020")

    kin: ClassVar[Mapping[Kind, str]] = {"layer": "DifferenceTargetPropagation", "network": "DifferenceTargets"}

    learns: ClassVar[bool] = True

    target_step: PerMember = number(1.0, low=0.0)
    credit: Credit = "through_time"
    normalize: bool = True
    noise: float = number(0.0, low=0.0, low_allowed=True)

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        raise RuntimeError("LearnedInverse: displacements go through the reverse layer, not through a matrix")

    def check(self, layer: nn.Module) -> None:
        super().check(layer)
        if layer.gates == 4:
            raise ValueError(
                f"{type(layer).__name__}: rule=LearnedInverse has a reverse layer of h, which says nothing of c; use "
                "tpext.nn.GRU, rule=tpext.RegularizedInverse() or rule=tpext.Backprop()"
            )
        # a cell with gates has no other
        nonlinearity = getattr(layer, "nonlinearity", "tanh")
        if nonlinearity != "tanh":
            raise ValueError(
                f"RNN: rule=LearnedInverse needs nonlinearity='tanh', got '{nonlinearity}'; "
                "use rule=tpext.RegularizedInverse() or rule=tpext.Backprop() with this nonlinearity"
            )

    def parameter_shapes(self, input_size: int, hidden_size: int, gates: int = 1) -> dict[str, tuple[int, ...]]:
        return {"reverse_weight_hh": (hidden_size, hidden_size), "reverse_bias": (hidden_size,)}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        if name == "reverse_bias":
            nn.init.zeros_(parameter)
        else:
            nn.init.orthogonal_(parameter)

    def start_sweep(self, layer: LayerWeights) -> Sweep:
        reverse_weight = layer.owned[0]
        step = self.target_step
        how = HowBack("learned", self.credit, step, 1e-3, "inverse", 0.0)
        scales = self._scales()

        def run(
            piece: Piece, grad_states: Tensor | None, arriving: StateOrNone, credit: StateOrNone
        ) -> tuple[Gradients, State, StateOrNone]:
            pre = _before_tanh(piece.states, piece.input, layer.weight_ih, layer.owned)
            feedback, back = reverse_weight.mT, (grad_states, arriving, credit)
            return run_backward(layer, piece, how, feedback, layer.weight_ih, pre, scales, False, *back)

        return Sweep(run, of_each(step, operator.neg), fades=True)

    def start_gated_sweep(self, layer: GatedWeights) -> Sweep:
        reverse_weight = layer.owned[0]
        step = self.target_step
        scales = self._scales()

        def run(
            piece: Piece, grad_states: Tensor | None, arriving: StateOrNone, credit: StateOrNone
        ) -> tuple[Gradients, State, StateOrNone]:
            pre = _before_tanh(piece.states, piece.input, layer.weight_ih, layer.owned)
            # with the identity for a slope delta is -d_t, the gradient of the state's local loss
            reverse_layer = (reverse_weight, reverse_weight, pre, piece.lengths, layer.reverse)
            of_states, first, _, _ = rnn_learned_target_scan(
                grad_states, piece.states, *reverse_layer, "identity", "local", as_list(step), False, arriving[0], None
            )
            # from there on it is the chain rule, whose displacement is minus the credit
            through_time = self.credit == "through_time"
            part = piece if through_time else steps_apart(piece, layer.reverse)
            beyond = None if credit[0] is None else -credit[0]
            given = of_states.view(part.states.shape)
            gradients, before, _ = run_gated_backward(
                layer, part, chain_rule(), layer.weight_hh, scales, given, (beyond,), (None,)
            )
            if gradients[0] is not None:
                gradients[0] = gradients[0].view(piece.input.shape)
            return gradients, (first,), (-before[0] if through_time else None,)

        return Sweep(run, of_each(step, operator.neg), fades=True)

    def recurrent_loss(self, call: CellCall, noise: float | None) -> tuple[Tensor, Tensor]:
        std = self.noise if noise is None else replace(self, noise=noise).noise

        def disturbed(before: Tensor) -> Tensor:
            return before + std * torch.randn_like(before) if std > 0 else before

        with torch.no_grad():
            states, target, reached = call.restarted(disturbed)
        residual = torch.tanh(_before_tanh(reached, call.input, call.weight_ih, call.owned)) - target
        if call.lengths is not None:
            residual = residual * valid_steps(call.lengths, residual.size(1))
        return residual.square().sum() / 2, states


def _before_tanh(states: Tensor, input: Tensor, weight_ih: Tensor, owned: Sequence[Tensor]) -> Tensor:
    """What the reverse layer makes of each state before its tanh, ``h V^T + c + x U^T [S, T, B, H]``."""
    reverse_weight, reverse_bias = owned
    # the layer's weights do not learn from the reverse layer's loss; a GRU's candidate is the last of its gates
    shared = weight_ih.detach()[:, -states.shape[3] :]
    from_input = input_projection(input.detach(), shared, reverse_bias).flatten(1, 2)
    return torch.baddbmm(from_input, states.flatten(1, 2), reverse_weight.mT).view(states.shape)
