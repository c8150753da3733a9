"""The rule of recurrent layers that learns their inverse: a reverse layer, trained as an auto-encoder of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from tpext.ops._rnn_products import input_projection, valid_steps
from tpext.rules.base import Kind, PerMember, number, of_each
from tpext.rules.recurrent import Credit, RecurrentRule
from tpext.rules.recurrent_call import HowBack, LayerWeights, RecurrentCall, run_backward
from tpext.rules.recurrent_pass import Gradients, Piece, State, StateOrNone, Sweep


@dataclass(frozen=True)
class LearnedInverse(RecurrentRule):
    """Target propagation through a learned reverse layer (an auto-encoder of each step).

    With ``G(x_t, h) = tanh(h V^T + c + x_t U^T)``, which shares ``U`` with the layer,

    ``d_{t-1} = G(x_t, h_t + d_t) - G(x_t, h_t) - target_step g_{t-1}``

    The reverse weights ``V`` and biases ``c`` are parameters of the module, present only under this rule. The loss's
    backward pass leaves them without a gradient; they learn from :meth:`tpext.nn.RNN.reconstruction_loss`, stepped
    before the target pass. Needs the tanh nonlinearity. Not linear in the gradient (see the module's head).

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
    LearnedInverse(target_step=1.0, credit='through_time', normalize=True, noise=0.1)
    """

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
        if layer.gates != 1:
            raise ValueError(
                f"{type(layer).__name__}: rule=LearnedInverse is for the simple cell (tpext.nn.RNN); use "
                "rule=tpext.RegularizedInverse() or rule=tpext.Backprop() with gates"
            )
        if layer.nonlinearity != "tanh":
            raise ValueError(
                f"RNN: rule=LearnedInverse needs nonlinearity='tanh', got '{layer.nonlinearity}'; "
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
        reverse_weight, reverse_bias = layer.owned
        step = self.target_step
        how = HowBack("learned", self.credit, step, 1e-3, "inverse", 0.0)
        inverse = of_each(step, lambda s: 1 / s)
        scales = (inverse if self.normalize else 1.0, inverse)

        def run(
            piece: Piece, grad_states: Tensor | None, arriving: StateOrNone, credit: StateOrNone
        ) -> tuple[Gradients, State, StateOrNone]:
            from_input = input_projection(piece.input, layer.weight_ih, reverse_bias).flatten(1, 2)
            pre = torch.baddbmm(from_input, piece.states.flatten(1, 2), reverse_weight.mT).view(piece.states.shape)
            feedback, back = reverse_weight.mT, (grad_states, arriving, credit)
            return run_backward(layer, piece, how, feedback, layer.weight_ih, pre, scales, False, *back)

        return Sweep(run, of_each(step, lambda s: -s), fades=True)

    def recurrent_loss(self, call: RecurrentCall, noise: float | None) -> tuple[Tensor, Tensor]:
        std = self.noise if noise is None else replace(self, noise=noise).noise
        reverse_weight, reverse_bias = call.owned
        with torch.no_grad():
            shared = input_projection(call.input, call.weight_ih, None)
            x_proj = shared if call.bias is None else shared + call.bias[:, None, None]
            states: Tensor = torch.ops.tpext.rnn_scan(
                x_proj, call.h0, call.weight_hh, call.lengths, call.reverse, call.nonlinearity
            )
            target = _previous_states(states, call.h0, call.lengths, call.reverse)
            if std > 0:
                target = target + std * torch.randn_like(target)
            reached = torch.tanh(x_proj + _rows_times(target, call.weight_hh))
        rebuilt = torch.tanh(_rows_times(reached, reverse_weight) + (shared + reverse_bias[:, None, None]))
        residual = rebuilt - target
        if call.lengths is not None:
            residual = residual * valid_steps(call.lengths, residual.size(1))
        return residual.square().sum() / 2, states


def _rows_times(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows W^T`` for ``[S, T, B, H]`` and ``[S, H, H]`` as one product a member (matmul would make T of them)."""
    return torch.bmm(rows.flatten(1, 2), weight.mT).view_as(rows)


def _previous_states(states: Tensor, h0: Tensor, lengths: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    """The state that each step started from, ``[S, T, B, H]``; unspecified beyond ``lengths``."""
    members = []
    for member, start, runs_back in zip(states, h0, reverse, strict=True):
        first = start.unsqueeze(0)
        if not runs_back:
            members.append(torch.cat((first, member[:-1])))
            continue
        previous = torch.cat((member[1:], first))
        if lengths is not None:
            starts = torch.arange(member.size(0), device=lengths.device).unsqueeze(1) == lengths - 1
            previous = torch.where(starts.unsqueeze(2), first, previous)
        members.append(previous)
    return torch.stack(members)
