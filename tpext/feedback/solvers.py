"""Trainers that set the feedback without gradient steps: running and closed-form solutions, tied and fixed weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from tpext.feedback.base import BlockCall, Indices, warn_of_relu
from tpext.feedback.linear_block import Pixels, correlation, feedback_power, linear_block
from tpext.feedback.trainer import FeedbackTrainer, NoiseSource, Record, average_over_processes, weight_alignment
from tpext.ops._library import check_choice, is_number


class RunningLDRL(FeedbackTrainer):
    """Tracks the fixed point of the local difference reconstruction loss: no learning rate, few draws a batch.

    The loss is quadratic in ``W`` (see :class:`LDRL`), least for small noise at ``W = R / D``::

        R = E[wgrad(dx, A' - A)] / sigma^2,    D = E[sum over the uses of s_G^2]

    ``D`` is known exactly for a batch, ``R`` is estimated from noise, without the block's weights; both are running
    means over batches. Noise of rows, not weights, is all that passes between block and feedback. It is the fixed point
    of ``second_term="expected"``, which behind a ReLU is another than that of the drawn term.

    Args:
        net: whose feedback to train: blocks of a linear layer or convolution, then activations and max-pooling.
        noise: standard deviation of the noise, > 0; one for all layers with feedback or a list.
        draws: of noise a batch, >= 1; one or a list.
        decay: of the running means, 0 <= decay < 1.
        indices: "noisy" or "clean", see :func:`ldrl_loss`.
        pixels: "all" or "grid", see :class:`LDRL`.
        seed, noise_source: see :class:`GradientTrainer`.

    Source: this package; the fixed point is that of Ernoult et al., ICML 2022, with the second term in expectation.
    """

    sources: ClassVar[tuple[str, ...]] = ("ernoult2022",)

    def __init__(
        self,
        net: nn.Module,
        *,
        noise: float | Sequence[float],
        draws: int | Sequence[int] = 1,
        decay: float = 0.95,
        indices: Indices = "noisy",
        pixels: Pixels = "all",
        seed: int = 0,
        noise_source: NoiseSource | None = None,
    ) -> None:
        super().__init__(net, seed=seed, noise_source=noise_source)
        self.noise, self.draws = self._positive("noise", noise), self._counts("draws", draws)
        if not is_number(decay) or not 0 <= decay < 1:
            raise ValueError(f"RunningLDRL: decay must be a number >= 0 and < 1, got {decay!r}")
        self.decay = float(decay)
        check_choice(type(self).__name__, "indices", indices, get_args(Indices))
        self.indices: Indices = indices
        self.pixels = self._choose_pixels(pixels)
        self._require_source("block")
        self._require_elementwise("it")
        self._sums: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)

    def update(self, calls: Sequence[BlockCall], records: list[Record] | None) -> None:
        for number, (index, _) in enumerate(self.layers):
            call, sigma = calls[index], self.noise[number]
            block = linear_block(call)
            assert block is not None
            weight = block.head.current_weight()
            block.head.arrange(block.preactivation.shape[1:])
            draws = self.draws[number]
            drawn = list(self._probes(block, number, sigma, draws, self.indices, self.pixels))
            correlated = correlation(block, drawn, 1 / (sigma**2 * draws * len(call.input)))
            power = feedback_power(block) / len(call.input)
            average_over_processes([correlated, power])
            if records is not None:
                loss = (power * weight.square() - 2 * correlated * weight).sum() * sigma**2
                records.append(Record(index, loss, *weight_alignment(call)))
            before = self._sums[number]
            if before is not None:
                # sums of weights decay^n; their common norm cancels in the quotient
                correlated.add_(before[0], alpha=self.decay)
                power.add_(before[1], alpha=self.decay)
            self._sums[number] = correlated, power
            weight.copy_(quotient(correlated, power))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sums": [sums and tuple(t.clone() for t in sums) for sums in self._sums]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sums = state["sums"]
        if len(sums) != len(self.layers):
            raise ValueError(f"RunningLDRL: state must have sums of {len(self.layers)} layers, got {len(sums)}")
        for pair in sums:
            if pair is not None and not (
                isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(one, Tensor) for one in pair)
            ):
                raise ValueError(f"RunningLDRL: sums must be two tensors or None for each layer, got {pair!r}")
        super().load_state_dict(state)
        places = [next(feedback.parameters()) for _, feedback in self.layers]
        self._sums = [
            pair and (pair[0].to(like, copy=True), pair[1].to(like, copy=True))
            for pair, like in zip(sums, places, strict=True)
        ]


class ClosedForm(FeedbackTrainer):
    """Sets the feedback to the minimiser of the local difference reconstruction loss for small noise, batch by batch.

    ``W = F <s_F s_G> / <s_G^2>``, means over the batch and the features that an element of ``W`` acts on, ``s_F`` and
    ``s_G`` the slopes of block and feedback. This is **weight transport** times a gain for each channel: it uses the
    block's own weights ``F``. Where there is max-pooling it is the minimiser with ``indices="clean"``; behind a ReLU
    that of the loss with ``second_term="expected"``.

    Args:
        net: whose feedback to set: blocks of a linear layer or convolution, then activations and max-pooling.

    Source: this package; for a solution in closed form see also the AAAI 2024 work on L-DRL.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self._require_source("block")
        self._require_elementwise("it")

    def update(self, calls: Sequence[BlockCall], records: list[Record] | None) -> None:
        for index, _ in self.layers:
            block = linear_block(calls[index])
            assert block is not None
            slopes = block.slopes()
            sums = torch.stack([slopes.both.sum(0), slopes.feedback.square().sum(0)])
            average_over_processes([sums])
            both, power = (block.head.sum_over_uses(one, block.input_shape) for one in sums)
            block.head.current_weight().copy_(block.head.transported(block.module) * quotient(both, power))


class Tied(FeedbackTrainer):
    """Ties the feedback to the blocks' own weights, transposed, from now on; there is nothing left to train.

    Trainers that change weights refuse such a network, and their next step if they had it before.

    Args:
        net: whose feedback to tie.

    Raises:
        ValueError: feedback that cannot be tied; then none of it is.
    """

    changes_weights = False

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        blocks = [block for block, _ in self.net.pairs()]
        # on copies first, as only trying says whether feedback can be tied, one of a user's own included
        for index, feedback in self.layers:
            copy.deepcopy(feedback).tie(blocks[index])
        for index, feedback in self.layers:
            feedback.tie(blocks[index])
        warn_of_relu("Tied", self.net.feedback)

    def update(self, calls: Sequence[BlockCall], records: list[Record] | None) -> None:
        pass


class Fixed(FeedbackTrainer):
    """Leaves the feedback as it is: fixed random feedback.

    Args:
        net: whose feedback stays.

    Source: Shibuya, Inoue, Kawakami and Sato, "Fixed-Weight Difference Target Propagation", AAAI 2023, whose networks
    normalise by the batch; without that random feedback diverges on the networks tried here.
    """

    sources: ClassVar[tuple[str, ...]] = ("shibuya2023",)

    changes_weights = False

    def update(self, calls: Sequence[BlockCall], records: list[Record] | None) -> None:
        pass


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, zero where the denominator is zero: where nothing passes, no weight matters."""
    # NaN passes, and stays one
    blocked = denominator == 0
    return torch.where(blocked, 0, numerator / torch.where(blocked, 1, denominator))
