"""The rule of recurrent layers that takes their regularised inverse, computed from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tpext._warnings import warn_user
from tpext.ops._library import is_integer
from tpext.ops._members import as_list
from tpext.ops.regularized_inverse import regularized_inverse
from tpext.rules.base import Kind, PerMember, check_flag, number
from tpext.rules.gated_call import GatedWeights
from tpext.rules.recurrent import Correction, Credit, GatedInverse, InputRule, RecurrentRule, Slope
from tpext.rules.recurrent_pass import Sweep


@dataclass(frozen=True)
class RegularizedInverse(RecurrentRule):
    """Target propagation through the regularised inverse of the recurrent layer.

    With ``P = W (W^T W + reg I)^-1`` (once a call), the displacement of the state before is, by ``correction``,

    ====================  ============================================================================================
    ``"linearized"``      ``d_{t-1} = (d_t * D(h_t)) P - target_step g_{t-1}``; ``D(h)`` is by ``slope``
    ``"difference"``      ``d_{t-1} = (a^-1(h_t + d_t) - a^-1(h_t)) P - target_step g_{t-1}``
    ``"none"``            ``d_{t-1} = (a^-1(h_t + d_t) - x_t U^T - b) P - h_{t-1} - target_step g_{t-1}``
    ====================  ============================================================================================

    where ``a^-1`` is ``atanh(clip(.))``, ``max(., 0)`` or the identity. For tanh the corrections agree to first order
    in the displacement; for relu "difference" lets an inactive unit move up, "linearized" does not. The module's head
    explains ``credit`` and which corrections are linear in the gradient.

    ``reg``, ``target_step``, ``margin`` and ``slope_reg`` are numbers of all members of a layer's stack, or tuples with
    one for each: under ``bidirectional=True`` one a direction, ``reg=(10.0, 1.0)``. Every layer has the same.

    Args:
        reg: regularisation of the inverse, >= 0. It penalises the size of the inverse's result; as it grows the
            targets reach fewer steps back, and with ``credit="through_time"`` the weight gradients tend to
            back-propagation's (of gates under "jacobian" alone, under "cell" as ``slope_reg`` grows: under "branch" a
            displacement also goes back along the cell's own path, which ``reg`` does not weigh). 0 asks for the plain
            inverse, and singular weights raise ``tpext.SingularError``.
        target_step: size of the first displacement, ``d_T = -target_step * g_T``, > 0. With the linearised correction
            and ``normalize=True`` it cancels.
        correction: how displacements pass through the inverse, "linearized", "difference" or "none".
        credit: local losses back-propagated through the unrolled layer ("through_time"), or each alone ("local").
        margin: distance kept from the edges of the activation's range before inverting it (tanh: ``|h| <= 1 -
            margin``), 0 < margin < 1. The slope ``a'`` of the weight gradients is not clipped.
        normalize: True divides the parameter gradients by ``target_step``, which gives them back-propagation's scale,
            so that a learning rate carries over; False gives the published scaling.
        input_rule: what the layer below receives, always in gradient units. "gradient" gives ``e_t U / target_step``,
            "target" the displacement that the regularised inverse of ``U`` asks of the input,
            ``-(z_t P_U) / target_step`` with ``P_U = U (U^T U + reg I)^-1`` and ``z_t`` the factor before ``P`` above
            ("none" uses the ``z_t`` of "difference").
        slope: how the linearised correction passes the activation: by its inverse slope as published, its derivative,
            or not at all. ``D`` is for "inverse" ``a' / (a'^2 + slope_reg)``, as published ``1 / a'``, with ``a' = 1 -
            clip(h)^2`` for tanh, ``1[h > 0]`` for relu (where it is 0, ``D`` is 0), 1 for identity; for "derivative"
            ``a'`` of the state itself, as in back-propagation; for "one" 1. Cells with gates have slopes of their own;
            they take "derivative" where it is what theirs are, so that one rule serves a model with both.
        slope_reg: regularisation of slope "inverse", >= 0, as ``reg`` is the matrix's. Units near the edges of the
            range, whose exact inverse explodes, pass little. ``inverse="cell"`` needs it > 0.
        unit_gain: True scales the inverses such that what is orthogonal, and units of slope 1, pass displacements at
            their size, whatever the regularisation: ``P = (1 + reg) W (W^T W + reg I)^-1`` and ``D = (1 + slope_reg) a'
            / (a'^2 + slope_reg)``. Each regularised step shrinks a displacement otherwise, and local targets are gone
            after a few. As ``reg`` and ``slope_reg`` grow it becomes back-propagation, under either credit. With the
            linearised correction; of gates under "branch" with slopes "derivative".
        inverse: how a displacement goes back through a cell with gates (GRU, LSTM): "branch", "cell" or "jacobian".
            "branch": each gate k takes it back for itself, by its slope and ``M_k = W_k (W_k^T W_k + reg I)^-1``, and
            what the gates find is added up (:mod:`tpext.ops.gated_layer` has the equations). "cell": the move of least
            norm by which the gates and the state before follow the displacement together, unit by unit, with
            ``slope_reg`` (1 trains) added to its normal equations, then one inverse of the stacked weights. "jacobian",
            for research: the regularised inverse of the whole step's Jacobian, of each row and step, by torch's
            operations, 70 to 600 times the products of "branch".
        gate_slope: what ``slope`` is to the simple cell, of the sigmoids of a cell with gates under "branch".
            "derivative", and so for the tanh, makes it back-propagation with every ``W_k`` replaced by ``M_k``: nothing
            explodes. "inverse" is as published, in torch's equations (the published code exchanges ``z`` and
            ``1 - z``); its displacements explode over long sequences.
        candidate_slope: the same of the tanh.
        chebyshev_steps: of "jacobian": None solves exactly; K >= 1 takes as many steps of the Chebyshev iteration,
            ``G (2 K - 1)`` products a step.

    Raises:
        ValueError: an argument out of its range, named.

    Cost: a forward and backward pass as ``Backprop``'s, one more ``[B, H] x [H, H]`` product a step
    ("local" with ``input_rule="gradient"``: none more) and one ``H x H`` factorisation a call.

    Source: Roulet and Harchaoui, "Target Propagation via Regularized Inversion for Recurrent Neural Networks", 2023.

    >>> RegularizedInverse(reg=10.0, target_step=0.01).credit
    'through_time'
    """

    sources: ClassVar[tuple[str, ...]] = ("roulet2023",)

    kin: ClassVar[Mapping[Kind, str]] = {"layer": "RegularizedLeastSquares"}

    reg: PerMember = number(1.0, low=0.0, low_allowed=True)
    target_step: PerMember = number(1.0, low=0.0)
    correction: Correction = "linearized"
    credit: Credit = "through_time"
    margin: PerMember = number(1e-3, low=0.0, high=1.0)
    normalize: bool = True
    input_rule: InputRule = "gradient"
    slope: Slope = "inverse"
    slope_reg: PerMember = number(0.0, low=0.0, low_allowed=True)
    unit_gain: bool = False
    inverse: GatedInverse = "branch"
    gate_slope: Slope = "derivative"
    candidate_slope: Slope = "derivative"
    chebyshev_steps: int | None = None

    inverses: ClassVar[tuple[GatedInverse, ...]] = ("branch", "cell", "jacobian")

    def __post_init__(self) -> None:
        super().__post_init__()
        name, steps = type(self).__name__, self.chebyshev_steps
        check_flag(self, "unit_gain")
        if self.unit_gain and self.correction != "linearized":
            raise ValueError(f"{name}: unit_gain needs correction='linearized', got correction={self.correction!r}")
        if self.inverse == "jacobian" and not all(as_list(self.reg)):
            raise ValueError(f"{name}: reg must be > 0 for inverse='jacobian', got {self.reg!r}")
        if steps is not None and (not is_integer(steps) or steps < 1 or self.inverse != "jacobian"):
            raise ValueError(
                f"{name}: chebyshev_steps must be None, or an integer >= 1 with inverse='jacobian', got {steps!r} with "
                f"inverse={self.inverse!r}"
            )

    def check(self, layer: nn.Module) -> None:
        super().check(layer)
        gates = getattr(layer, "gates", None)
        if gates is None:
            return
        kind = type(layer).__name__
        derivatives = (self.inverse, self.gate_slope, self.candidate_slope) == ("branch", "derivative", "derivative")
        # slope="derivative" says of the simple cell what holds of these gates, so one rule serves a model with both
        slopes = {"slope": ("inverse", *["derivative"] * derivatives)}
        if gates == 1:
            slopes = {"gate_slope": ("derivative",), "candidate_slope": ("derivative",)}
        for name, allowed in slopes.items():
            if getattr(self, name) not in allowed:
                others = "gate_slope and candidate_slope" if gates > 1 else "slope"
                raise ValueError(
                    f"{kind}: {name} of a rule has no effect here, where there is {others}, got {self}; leave it out"
                )
        if gates == 1 and self.slope != "inverse" and any(as_list(self.slope_reg)):
            raise ValueError(f"{kind}: slope_reg of a rule belongs to slope='inverse', got {self}")
        if gates > 1 and self.unit_gain and not derivatives:
            raise ValueError(
                f"{kind}: unit_gain of a rule needs inverse='branch' and slopes 'derivative' here, got {self}"
            )
        has_reg = self.inverse == "cell" or "inverse" in (self.gate_slope, self.candidate_slope)
        if gates > 1 and any(as_list(self.slope_reg)) and not has_reg:
            raise ValueError(
                f"{kind}: slope_reg of a rule belongs to inverse='cell' and to slopes 'inverse', got {self}"
            )
        if gates > 1 and self.gate_slope == "inverse" and not all(as_list(self.slope_reg)):
            warn_user(
                f"{kind}: gate_slope='inverse', as published, divides by slopes of gates that are nearly shut; what "
                "goes back explodes, and in our trials what was learned was lost again (docs/results.md). "
                "gate_slope='derivative' learns."
            )

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        gates = weight_hh.shape[1] // max(weight_hh.shape[2], 1)
        if self.inverse == "jacobian":
            # made of the weights themselves
            return weight_hh
        if gates == 1 or self.inverse == "cell":
            return self._scaled(regularized_inverse(weight_hh, self.reg).mT, gates)
        of_gates = weight_hh.reshape(-1, weight_hh.shape[2], weight_hh.shape[2])
        reg = self.reg
        if isinstance(reg, tuple):
            reg = tuple(of_member for of_member in reg for _ in range(gates))
        return self._scaled(regularized_inverse(of_gates, reg).mT.reshape(weight_hh.shape), gates)

    def start_gated_sweep(self, layer: GatedWeights) -> Sweep:
        return self._gated_sweep(layer, (self.reg, self.chebyshev_steps) if self.inverse == "jacobian" else None)

    def input_feedback(self, weight_ih: Tensor) -> Tensor:
        return self._scaled(regularized_inverse(weight_ih, self.reg).mT, gates=1)

    def _scaled(self, inverses: Tensor, gates: int) -> Tensor:
        """The inverses of members, at unit gain if that is asked for, the slope's share of it included."""
        if not self.unit_gain:
            return inverses
        regs = as_list(self.reg)
        slope_regs = as_list(self.slope_reg) if gates == 1 and self.slope == "inverse" else [0.0]
        count = max(len(regs), len(slope_regs))
        each = zip(regs * (count // len(regs)), slope_regs * (count // len(slope_regs)), strict=True)
        gains = [(1 + reg) * (1 + slope_reg) for reg, slope_reg in each]
        return inverses * (gains[0] if count == 1 else inverses.new_tensor(gains).view(-1, 1, 1))
