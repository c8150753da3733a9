"""The rules of whole networks, :class:`tpext.nn.TargetSequential`: how targets come down from block to block.

A network is a chain of blocks ``s_i = F_i(s_{i-1})``, ``i = 0 .. L-1``, any modules. It receives the gradient ``g`` of
the loss for its output and gives each block's output a displacement, the output's own first::

    d_{L-1} = -target_step * N * g        N = B for a loss averaged over the batch, 1 for a sum: ``reduction``

so that with either each sample moves by ``target_step`` times its own gradient. The parameters of block ``i`` receive
the gradient of its local loss alone, its input held constant::

    (1 / N) sum_b 1/2 ||F_i(s_{i-1}) - (s_i + d_i)||^2,    divided by ``target_step`` if ``normalize``

and what is below the network receives that gradient of the first block for its input. So gradients have
back-propagation's size with ``normalize``, and the published one, ``target_step`` times it, without.

The rules differ in how the displacements below the output are made, most of them by feedback modules
(:mod:`tpext.feedback`). How these are trained is the business of a second object, a trainer. None of the rules is
linear in ``g``: accumulating micro-batches needs each loss averaged over its own micro-batch, and ``GradScaler`` is not
supported. Source of a rule of your own: subclass :class:`NetworkRule` and give ``propagate``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from tpext.feedback.base import BlockCall, Feedback, Source, in_full_precision, make_feedback, require_fit
from tpext.feedback.direct import HiddenLayer, make_direct_feedback
from tpext.ops._library import LOW_PRECISION, check_choice, full_precision
from tpext.ops.regularized_inverse import regularized_inverse
from tpext.rules.base import Kind, Rule, check_flag, number

Reduction = Literal["mean", "sum"]
Direct = Literal["linear", "hidden"]


@dataclass(frozen=True)
class NetworkRule(Rule, ABC):
    """A target recursion through a network of blocks; the base class of a rule of your own.

    Subclasses give :meth:`propagate`, one block at a time, or :meth:`displacements`, all blocks at once. The size of
    the first displacement and the gradients' scale are this class's business.

    Args:
        target_step: size of the output's displacement as a multiple of each sample's gradient, > 0.
        normalize: True divides the local gradients by ``target_step``, so that a learning rate carries over from
            back-propagation; False gives the published scaling.
        reduction: what the loss does with the batch, "mean" or "sum".
    """

    target_step: float = number(1.0, low=0.0)
    normalize: bool = True
    reduction: Reduction = "mean"

    kinds: ClassVar[frozenset[Kind]] = frozenset({"network"})
    exact: ClassVar[Literal[False]] = False
    needs_shapes: ClassVar[bool] = False
    """Whether :meth:`make_feedback` has to know the shapes of the states."""

    def __post_init__(self) -> None:
        check_flag(self, "normalize")
        check_choice(type(self).__name__, "reduction", self.reduction, get_args(Reduction))

    def make_feedback(
        self, blocks: Sequence[nn.Module], shapes: Sequence[torch.Size] | None
    ) -> Sequence[Feedback | None]:
        """Return the feedback module of each block, which gives the displacement of the block's *input*.

        Args:
            blocks: ``F_0 .. F_{L-1}``. The first one's input has no target.
            shapes: of ``s_0 .. s_{L-1}`` without the batch, None unless ``needs_shapes``.
        """
        return [None, *map(make_feedback, blocks[1:])]

    def feedback(self, call: BlockCall, source: Source | None = None) -> Feedback:
        """Return the feedback of a call.

        Args:
            source: whose output it must map from, see :class:`tpext.feedback.Feedback`; None: either's.

        Raises:
            ValueError: there is none, or it maps from another output.
        """
        if call.feedback is None:
            raise ValueError(
                f"{type(self).__name__}: every block but the first needs feedback, block {call.name} has none"
            )
        if source is not None and call.feedback.source != source:
            raise ValueError(
                f"{type(self).__name__}: feedback must map from the output of the {source}, that of block {call.name} "
                f"maps from the {call.feedback.source}'s; make the network with this rule"
            )
        return call.feedback

    @abstractmethod
    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        """Return by how much a block's input should move.

        Args:
            call: the block, its feedback, input, output and code.
            displacement: ``d_i``, by how much its output should move, ``[B, ...]``.

        Returns:
            ``d_{i-1}``, in the shape of ``call.input``.
        """

    def displacements(self, calls: Sequence[BlockCall], displacement: Tensor) -> list[Tensor]:
        """Return ``d_0 .. d_{L-1}``, the displacement of each block's output; the last one is given."""
        moves = [displacement]
        for below, call in reversed(list(pairwise(calls))):
            move = self.propagate(call, moves[-1])
            # before the next block takes it
            require_fit(self, below, move)
            moves.append(move)
        return moves[::-1]

    def first_displacement(self, calls: Sequence[BlockCall], displacement: Tensor) -> Tensor:
        """Return ``d_0`` of two or more blocks; a rule that does not need the others for it saves them here."""
        return self.displacements(calls, displacement)[0]

    def local_gradients(self, calls: Sequence[BlockCall], grad: Tensor) -> list[Tensor]:
        """Return the gradient of each block's local loss for its output, given the loss's for the last.

        Raises:
            ValueError: a displacement that does not fit its state, or another number of them than of blocks; names the
                rule and the block.
        """
        step = self.target_step
        count = grad.shape[0] if self.reduction == "mean" else 1
        # blocks under autocast, of which some may have put out float32
        low = any(call.output.dtype in LOW_PRECISION for call in calls)
        with full_precision(grad.device.type):
            known, grad = (in_full_precision(calls), grad.float()) if low else (calls, grad)
            moves = self.displacements(known, grad * (-step * count))
            if len(moves) != len(known):
                raise ValueError(
                    f"{type(self).__name__}: displacements must be one for each of the {len(known)} blocks, got "
                    f"{len(moves)}"
                )
            for call, move in zip(known, moves, strict=True):
                require_fit(self, call, move)
            scale = -1 / (count * (step if self.normalize else 1.0)) if count else 0.0
            return [(move * scale).to(call.output.dtype) for call, move in zip(calls, moves, strict=True)]


@dataclass(frozen=True)
class DifferenceTargets(NetworkRule):
    """Difference target propagation: ``d_{i-1} = G_i(s_i + d_i) - G_i(s_i)``.

    Args:
        target_step, normalize, reduction: see :class:`NetworkRule`; published is ``target_step`` 0.7 (SimpleVGG).

    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation", 2015; Ernoult et al., "Towards Scaling
    Difference Target Propagation by Learning Backprop Targets", ICML 2022.

    >>> DifferenceTargets(target_step=0.7)
    DifferenceTargets(target_step=0.7)
    """

    sources: ClassVar[tuple[str, ...]] = ("lee2015", "ernoult2022")

    kin: ClassVar[Mapping[Kind, str]] = {"recurrent": "LearnedInverse", "layer": "DifferenceTargetPropagation"}

    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        return self.feedback(call, "block").difference(call.output, displacement, call.code)


@dataclass(frozen=True)
class Targets(NetworkRule):
    """Plain target propagation: ``s_{i-1} + d_{i-1} = G_i(s_i + d_i)``, reconstruction errors included.

    Source: Bengio, "How Auto-Encoders Could Provide Credit Assignment in Deep Networks via Target Propagation", 2014.

    >>> Targets(target_step=0.7).reduction
    'mean'
    """

    sources: ClassVar[tuple[str, ...]] = ("bengio2014",)

    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        target: Tensor = self.feedback(call, "block")(call.output + displacement, call.code)
        return target - call.input


@dataclass(frozen=True)
class DirectTargets(NetworkRule):
    """Direct feedback from the output to each block: ``d_i = Q_i(s_{L-1} + d_{L-1}) - Q_i(s_{L-1})``.

    ==============================  ===================================================================================
    ``hidden=None``                 ``Q_i`` is linear (DDTP-linear, DDTP-control; direct feedback alignment if fixed)
    ``hidden=n``                    ``Q_i(y) = psi(Q u + c)``, ``u = psi_h(R y + r)`` with ``n`` fixed random units
                                    shared by all blocks but the last hidden one, which gets ``y`` itself (DDTP-RHL)
    ==============================  ===================================================================================

    Args:
        hidden: number of units of the shared hidden layer, or None.
        activation: ``psi``, "identity" or "tanh".
        hidden_activation: ``psi_h``, "identity" or "tanh".
        recurrent_input: True gives each ``Q_i`` the state ``s_i`` besides.
        target_step, normalize, reduction: see :class:`NetworkRule`.

    Source: Meulemans et al., "A Theoretical Framework for Target Propagation", NeurIPS 2020.

    >>> DirectTargets(hidden=1024, activation="tanh").hidden_activation
    'tanh'
    """

    sources: ClassVar[tuple[str, ...]] = ("meulemans2020",)

    hidden: int | None = None
    activation: Literal["identity", "tanh"] = "identity"
    hidden_activation: Literal["identity", "tanh"] = "tanh"
    recurrent_input: bool = False

    needs_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden is not None and (
            not isinstance(self.hidden, int) or isinstance(self.hidden, bool) or self.hidden < 1
        ):
            raise ValueError(f"DirectTargets: hidden must be an integer >= 1 or None, got {self.hidden!r}")
        check_choice(type(self).__name__, "activation", self.activation, ("identity", "tanh"))
        check_choice(type(self).__name__, "hidden_activation", self.hidden_activation, ("identity", "tanh"))
        check_flag(self, "recurrent_input")

    def make_feedback(
        self, blocks: Sequence[nn.Module], shapes: Sequence[torch.Size] | None
    ) -> Sequence[Feedback | None]:
        assert shapes is not None
        like = next(blocks[-1].parameters(), torch.empty(0))
        return make_direct_feedback(
            shapes,
            HiddenLayer(shapes[-1].numel(), self.hidden, self.hidden_activation, like) if self.hidden else None,
            self.activation,
            self.recurrent_input,
            like,
        )

    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        raise RuntimeError("DirectTargets: displacements come from the output, not from the block above")

    def displacements(self, calls: Sequence[BlockCall], displacement: Tensor) -> list[Tensor]:
        output = calls[-1].output
        return [*(self._direct(call, output, displacement) for call in calls[1:]), displacement]

    def first_displacement(self, calls: Sequence[BlockCall], displacement: Tensor) -> Tensor:
        return self._direct(calls[1], calls[-1].output, displacement)

    def _direct(self, call: BlockCall, output: Tensor, displacement: Tensor) -> Tensor:
        return self.feedback(call, "network").difference(output, displacement, call.code)


@dataclass(frozen=True)
class GaussNewtonTargets(NetworkRule):
    """Gauss-Newton targets: ``d_i = J_i^T (J_i J_i^T + damping I)^-1 d_{L-1}``, ``J_i`` a sample's Jacobian.

    ``J_i = d s_{L-1} / d s_i`` of each sample by itself, so blocks that mix samples (batch normalisation in training)
    or draw random numbers (dropout) are refused.

    Args:
        damping: >= 0; 0 takes the pseudo-inverse.
        target_step, normalize, reduction: see :class:`NetworkRule`.

    Cost: a backward pass through the network for each element of the output.

    Source: Meulemans et al., "A Theoretical Framework for Target Propagation", NeurIPS 2020.

    >>> GaussNewtonTargets(damping=0.1).damping
    0.1
    """

    sources: ClassVar[tuple[str, ...]] = ("meulemans2020",)

    damping: float = number(0.0, low=0.0, low_allowed=True)

    def check(self, layer: nn.Module) -> None:
        for block in layer.blocks.children():  # type: ignore[union-attr]
            for module in block.modules():
                if module.training and isinstance(module, (_BatchNorm, _DropoutNd)):
                    raise ValueError(
                        "GaussNewtonTargets: no block may mix samples or draw random numbers, got "
                        f"{type(module).__name__} in training mode"
                    )

    def make_feedback(
        self, blocks: Sequence[nn.Module], shapes: Sequence[torch.Size] | None
    ) -> Sequence[Feedback | None]:
        return [None] * len(blocks)

    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        raise RuntimeError("GaussNewtonTargets: displacements come from the output, not from the block above")

    def displacements(self, calls: Sequence[BlockCall], displacement: Tensor) -> list[Tensor]:
        output = calls[-1].output
        batch, size = output.shape[0], output[0].numel() if len(output) else 0
        # rows of each sample's Jacobian: the output's element first, then the batch
        rows = torch.eye(size, dtype=output.dtype, device=output.device)
        rows = rows[:, None].expand(size, batch, size).reshape(size, *output.shape)
        wanted = displacement.reshape(batch, size, 1)
        moves = [displacement]
        for call in reversed(calls[1:]):
            pull_back: Any = torch.func.vjp(call.block, call.input)[1]
            rows = torch.func.vmap(pull_back)(rows)[0]
            jacobian = rows.flatten(2).transpose(0, 1)
            damping = self.damping
            inverse = regularized_inverse(jacobian, damping) if damping else torch.linalg.pinv(jacobian)
            moves.append((inverse @ wanted).reshape(call.input.shape))
        return moves[::-1]
