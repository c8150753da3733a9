"""The protocol of the rules of recurrent layers: a feedback matrix, a slope and a credit, on the fused sweep.

:mod:`tpext.rules` has the scheme that they share. A rule of your own subclasses :class:`RecurrentRule` and gives
:meth:`RecurrentRule.feedback`. Directions, packed sequences, checkpoints and the layer's gradients are the pass's
business (:mod:`tpext.rules.recurrent_pass`).
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from tpext.ops._library import (
    NOT_A_DERIVATIVE,
    PLAIN_RNN,
    are_plain,
    cast,
    check_choice,
    refuse_forward_mode,
)
from tpext.ops._members import as_list
from tpext.ops._rnn_products import input_projection
from tpext.rules.base import (
    Kind,
    PerMember,
    ResultError,
    Rule,
    check_flag,
    check_positive,
    of_each,
    require_result,
)
from tpext.rules.gated_call import GatedHowBack, GatedWeights, run_gated_backward
from tpext.rules.recurrent_call import HowBack, LayerWeights, run_backward
from tpext.rules.recurrent_pass import Gradients, Piece, State, StateOrNone, Sweep, run_pass

if TYPE_CHECKING:
    from tpext.rules.recurrent_pass import CellCall

Correction = Literal["linearized", "difference", "none"]
Credit = Literal["through_time", "local"]
InputRule = Literal["gradient", "target"]
Slope = Literal["inverse", "derivative", "one"]
GatedInverse = Literal["branch", "cell", "jacobian"]


class RecurrentRule(Rule, ABC):
    """A rule of recurrent layers: the base class of a rule of your own.

    With the feedback matrix ``P = feedback(W)`` (once a call) the displacement of the state before is, as
    :class:`RegularizedInverse` explains,

    ``d_{t-1} = z_t P - target_step g_{t-1}``, where ``z_t`` is ``d_t`` taken back through the activation

    Subclasses give :meth:`feedback`. What they do not say otherwise is as the class attributes have it; a subclass
    overrides them by constants of its own, or makes them fields for its users to set. Numbers may be tuples, with one
    for each member of the layer's stack (:data:`PerMember`). No method may change a tensor that it is given.

    Attributes:
        target_step: size of the first displacement, ``d_T = -target_step * g_T``, > 0.
        correction: how a displacement is taken back through the activation: see :class:`RegularizedInverse`.
        credit: whether a step's parameters learn from its own target alone, or from all later ones through the layer
            too.
        slope: by what the linearised correction multiplies: see :class:`RegularizedInverse`.
        slope_reg: regularisation of slope "inverse", >= 0.
        margin: distance kept from the edges of the activation's range before inverting it, 0 < margin < 1.
        normalize: whether parameter gradients are divided by ``target_step``, which gives them back-propagation's
            scale.
        input_rule: what the layer below receives: see :class:`RegularizedInverse`; "target" needs
            :meth:`input_feedback`.
        inverse: of cells with gates: whether a displacement goes back through each gate for itself ("branch") or
            through all together ("cell").
        gate_slope, candidate_slope: what ``slope`` is to the simple cell, of the sigmoids and of the tanh of a cell
            with gates; ``slope_reg`` and ``margin`` belong to them too.
        inverses: the choices of ``inverse`` that the class has.

    >>> from dataclasses import dataclass
    >>> import torch, tpext
    >>> @dataclass(frozen=True)
    ... class TransposedTargets(tpext.rules.RecurrentRule):
    ...     scale: float = 0.9
    ...
    ...     def feedback(self, weight_hh, *owned):
    ...         return weight_hh * self.scale
    >>> rnn = tpext.nn.RNN(3, 4, rule=TransposedTargets(scale=0.8))
    >>> rnn(torch.randn(7, 2, 3))[0].square().mean().backward()
    >>> rnn.weight_hh_l0.grad.shape
    torch.Size([4, 4])
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"recurrent"})

    target_step: PerMember = 1.0
    correction: Correction = "linearized"
    credit: Credit = "local"
    slope: Slope = "inverse"
    slope_reg: PerMember = 0.0
    margin: PerMember = 1e-3
    normalize: bool = True
    input_rule: InputRule = "gradient"
    inverse: GatedInverse = "branch"
    gate_slope: Slope = "derivative"
    candidate_slope: Slope = "derivative"
    inverses: ClassVar[tuple[GatedInverse, ...]] = ("branch", "cell")

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_choice(name, "correction", self.correction, get_args(Correction))
        check_choice(name, "credit", self.credit, get_args(Credit))
        for slope in ("slope", "gate_slope", "candidate_slope"):
            check_choice(name, slope, getattr(self, slope), get_args(Slope))
        check_choice(name, "inverse", self.inverse, self.inverses)
        if self.inverse != "branch" and (self.gate_slope != "derivative" or self.candidate_slope != "derivative"):
            raise ValueError(
                f"{name}: gate_slope and candidate_slope belong to inverse='branch', got inverse={self.inverse!r} with "
                f"gate_slope={self.gate_slope!r}, candidate_slope={self.candidate_slope!r}"
            )
        if self.inverse == "cell" and not all(as_list(self.slope_reg)):
            raise ValueError(f"{name}: slope_reg must be > 0 for inverse='cell', got {self.slope_reg!r}")
        check_flag(self, "normalize")
        check_choice(name, "input_rule", self.input_rule, get_args(InputRule))
        slope_regs = as_list(self.slope_reg)
        if not all(0 <= one < math.inf for one in slope_regs):
            raise ValueError(f"{name}: slope_reg must be a finite number >= 0, got {self.slope_reg!r}")
        if self.correction != "linearized" and (self.slope != "inverse" or any(slope_regs)):
            raise ValueError(
                f"{name}: slope and slope_reg belong to correction='linearized', got correction={self.correction!r} "
                f"with slope={self.slope!r}, slope_reg={', '.join(f'{one:g}' for one in slope_regs)}"
            )
        check_positive(self, "target_step")
        check_positive(self, "margin", high=1.0)

    def check(self, layer: nn.Module) -> None:
        super().check(layer)
        gates = getattr(layer, "gates", None)
        if gates is None:
            # no recurrent layer: a rule of several protocols
            return
        if gates == 1:
            if self.inverse != "branch":
                raise ValueError(f"RNN: rule must have inverse='branch', as one gate is all there is, got {self}")
            return
        kind = type(layer).__name__
        if layer.proj_size != 0:
            raise ValueError(
                f"{kind}: proj_size needs rule=tpext.Backprop(); targets of a projected state say nothing of what the "
                f"projection leaves out, got {self}"
            )
        goes_itself = self.learns or type(self).start_sweep is not RecurrentRule.start_sweep
        if goes_itself and type(self).start_gated_sweep is RecurrentRule.start_gated_sweep:
            raise ValueError(
                f"{kind}: rule must be a feedback matrix without a loss of its own, or have a method "
                f"start_gated_sweep; {type(self).__name__} is for the simple cell, tpext.nn.RNN"
            )
        if self.correction != "linearized" or self.input_rule != "gradient":
            raise ValueError(
                f"{kind}: rule must have correction='linearized' and input_rule='gradient', the only ones that there "
                f"are for a cell with gates, got {self}"
            )
        if not all(one < 0.5 for one in as_list(self.margin)):
            raise ValueError(f"{kind}: rule must have margin < 0.5, half the range of a gate, got {self}")

    @abstractmethod
    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        """Return the matrix ``P`` that brings displacements from a step to the one before.

        Args:
            weight_hh: W, ``[S, H, H]``, of a cell with G gates ``[S, G*H, H]``: ``h_t`` depends on ``h_{t-1} W^T``. Not
                to be differentiated.
            owned: the rule's own parameters, ``[S, ...]`` each, in the order of :meth:`parameter_shapes`.

        Returns:
            As ``weight_hh``, in shape, dtype and device: row vectors go ``z P``, so that ``P = W`` is the transpose of
            the forward map. That of a member depends on its own weights alone: with ``checkpoint_every`` directions
            run one at a time. Finite numbers: where they are not, the backward pass raises ValueError on the CPU
            (compiled: RuntimeError, from the forward pass if that computes the matrix). On CUDA, where looking would
            wait for the device, nothing raises, and gradients are NaN.
        """

    def input_feedback(self, weight_ih: Tensor) -> Tensor:
        """Return the matrix ``P_U [S, H, I]`` that brings displacements to the input, for ``input_rule="target"``."""
        raise NotImplementedError(f"{type(self).__name__}: input_rule='target' needs a method input_feedback")

    # What follows is what a rule that is not of this form overrides.

    def parameter_shapes(self, input_size: int, hidden_size: int, gates: int = 1) -> dict[str, tuple[int, ...]]:
        """Return name and shape of each parameter of the rule's own, of one layer and direction.

        ``gates`` is 1 for the simple cell, 3 for a GRU and 4 for an LSTM, whose ``weight_hh`` is ``[gates * H, H]``.
        The layer registers them, their names followed by ``_l0``, ``_l0_reverse`` and so on.
        """
        return {}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        """Initialise one of those parameters in place: one of float32 or float64, rounded later for a 16-bit layer."""
        raise NotImplementedError(f"{type(self).__name__}: reset_parameter must initialise {name}")

    def run_recurrent(self, call: CellCall) -> tuple[Tensor, ...]:
        """Run a layer of any cell (:class:`RecurrentCall`, :class:`GatedCall`) whose backward pass is this rule's.

        Returns:
            States ``[S, T, B, H]`` and the state after the last valid steps, one tensor ``[S, B, H]``, of an LSTM two.
        """
        return run_pass(self, call)

    def start_sweep(self, layer: LayerWeights) -> Sweep:
        """Return how this rule goes from the last step of a layer to the first; called once a backward pass."""
        # In float32 also where the weights came in a 16-bit dtype: an inverse's Gram matrix squares the condition.
        feedback = self._matrix("feedback", layer.weight_hh, *layer.owned)
        of_displacement = self.input_rule == "target" and layer.needs[0]
        input_feedback = self._matrix("input_feedback", layer.weight_ih) if of_displacement else layer.weight_ih
        step = self.target_step
        how = HowBack(self.correction, self.credit, step, self.margin, self.slope, self.slope_reg)
        of_parameters, of_input = self._scales()
        scales = of_parameters, of_each(of_input, operator.neg) if of_displacement else of_input

        def run(
            piece: Piece, grad_states: Tensor | None, arriving: StateOrNone, credit: StateOrNone
        ) -> tuple[Gradients, State, StateOrNone]:
            # Recomputing the projection is one product; keeping it would cost as much memory as the states.
            pre = None
            if self.correction == "none":
                pre = input_projection(piece.input, layer.weight_ih, layer.bias)
            back = (grad_states, arriving, credit)
            return run_backward(layer, piece, how, feedback, input_feedback, pre, scales, of_displacement, *back)

        return Sweep(run, of_each(step, operator.neg), self.correction != "none")

    def start_gated_sweep(self, layer: GatedWeights) -> Sweep:
        """Return what :meth:`start_sweep` does, of a layer of a cell with gates."""
        return self._gated_sweep(layer, None)

    def _gated_sweep(self, layer: GatedWeights, jacobian: tuple[PerMember, int | None] | None) -> Sweep:
        feedback = self._matrix("feedback", layer.weight_hh, *layer.owned)
        step = self.target_step
        slopes = (self.gate_slope, self.candidate_slope, self.slope_reg)
        how = GatedHowBack(self.inverse, self.credit, step, self.margin, *slopes, jacobian)
        scales = self._scales()

        def run(
            piece: Piece, grad_states: Tensor | None, arriving: StateOrNone, credit: StateOrNone
        ) -> tuple[Gradients, State, StateOrNone]:
            return run_gated_backward(layer, piece, how, feedback, scales, grad_states, arriving, credit)

        return Sweep(run, of_each(step, operator.neg), fades=True)

    def _scales(self) -> tuple[PerMember, PerMember]:
        """Of the parameters' gradients, and of the input's, which is in gradient units in any case."""
        of_input = of_each(self.target_step, lambda s: 1 / s)
        return of_input if self.normalize else 1.0, of_input

    def _matrix(self, method: str, weight: Tensor, *owned: Tensor) -> Tensor:
        """What ``feedback`` or ``input_feedback`` makes of a weight, checked, in the weight's dtype."""
        given = cast(weight, torch.float32)
        matrix = getattr(self, method)(given, *(cast(one, torch.float32) for one in owned))
        require_result(self, method, matrix, given)
        wrong = f"{type(self).__name__}.{method} must return finite numbers, got NaN or infinity"
        # on CUDA looking would wait for the device
        if weight.is_cpu and torch.compiler.is_compiling():
            # a graph cannot branch on data, but it can fail
            torch._assert_async(matrix.isfinite().all(), f"{wrong}, or the layer's weights are not finite")
        elif weight.is_cpu and are_plain((matrix,)) and not _is_finite(matrix):
            if not bool(given.isfinite().all()):
                raise ValueError(f"{type(self).__name__}: the layer's weights must be finite, got NaN or infinity")
            raise ResultError(wrong)
        return matrix.to(weight.dtype)  # type: ignore[no-any-return]

    def composite(self, call: CellCall) -> tuple[Tensor, ...]:
        """Run a layer by operations with derivatives of every order: where the backward pass is the chain rule."""
        if self.exact:
            return call.composite()
        refuse_forward_mode(call.op, PLAIN_RNN)
        raise RuntimeError(NOT_A_DERIVATIVE)

    def recurrent_loss(self, call: CellCall, noise: float | None) -> tuple[Tensor, Tensor]:
        """Return the loss that trains the rule's own parameters, summed over the batch, and the layer's states.

        Raises:
            RuntimeError: the rule has no such loss.
        """
        raise RuntimeError(
            "reconstruction_loss needs rule=tpext.LearnedInverse(), or a rule of your own with recurrent_loss, the "
            f"rule is {self}"
        )


def _is_finite(matrix: Tensor) -> bool:
    # A sum is one pass and finite, as a rule; where it is not, large numbers may have added up to infinity.
    return math.isfinite(matrix.sum().item()) or bool(matrix.isfinite().all())
