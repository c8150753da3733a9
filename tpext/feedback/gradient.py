"""Trainers that take gradient steps on a loss of the feedback, several a batch."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tpext.feedback.base import BlockCall, Indices
from tpext.feedback.linear_block import (
    LinearBlock,
    Pixels,
    correlation,
    feedback_power,
    joined,
    linear_block,
)
from tpext.feedback.losses import difference_reconstruction_loss, ldrl_loss, reconstruction_loss
from tpext.feedback.trainer import (
    CounterNoise,
    Draw,
    FeedbackTrainer,
    NoiseSource,
    Record,
    average_over_processes,
    weight_alignment,
)
from tpext.ops._library import check_choice, is_integer, is_number
from tpext.ops.pooled_difference import probe_difference

Iteration: TypeAlias = tuple[dict[Tensor, Tensor], Tensor | None]
"""The gradients of an iteration by parameter, and its loss where it was asked for."""
MakeOptimizer: TypeAlias = Callable[[Iterable[Tensor]], Optimizer]
SecondTerm = Literal["drawn", "expected"]


class GradientTrainer(FeedbackTrainer):
    """A trainer that takes ``iterations`` gradient steps on each layer's own loss at every batch.

    Each layer has an optimizer of its own, so layers are independent given the forward pass. For a loss of your own
    subclass it and give :meth:`loss`; noise, iterations, records, processes and saving are this class's business.

    Args:
        net: whose feedback to train.
        lr: learning rate, > 0; one for all layers with feedback or a list, the first layer first.
        noise: standard deviation of the noise, > 0; one or a list.
        iterations: gradient steps a batch, >= 1; one or a list.
        samples: draws of noise that one gradient averages, >= 1.
        momentum, weight_decay: of SGD.
        optimizer: instead of SGD with these, a function of parameters, as ``lambda p: torch.optim.Adam(p, lr=3e-4)``;
            ``lr``, ``momentum`` and ``weight_decay`` must be left out then.
        seed: of the noise, 0 .. 2^63 - 1.
        noise_source: draws the noise; None: :class:`CounterNoise`, a function of the seed, step, layer, draw and row.

    Raises:
        TypeError: an optimizer or a noise source that is no function, or one that returns something else; named.
        ValueError: an argument out of its range, or a list of another length; named.

    >>> import torch, tpext
    >>> class Cosine(tpext.feedback.GradientTrainer):
    ...     def loss(self, calls, layer, sigma, draw):
    ...         call = calls[layer]
    ...         noise = self.draw_noise(layer, draw, sigma, call.input)
    ...         moved = call.block(call.input + noise).detach() - call.output
    ...         return -torch.cosine_similarity(call.feedback.difference(call.output, moved, call.code), noise).mean()
    >>> net = tpext.nn.TargetSequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> trainer = Cosine(net, lr=0.3, noise=0.1, iterations=200)
    >>> first, *_, last = trainer.step(torch.randn(16, 4), record=True)
    >>> bool(last.loss < first.loss)
    True
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        lr: float | Sequence[float] | None = None,
        noise: float | Sequence[float],
        iterations: int | Sequence[int] = 1,
        samples: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: MakeOptimizer | None = None,
        seed: int = 0,
        noise_source: NoiseSource | None = None,
    ) -> None:
        super().__init__(net, seed=seed, noise_source=noise_source)
        self.noise, self.iterations = self._positive("noise", noise), self._counts("iterations", iterations)
        if not is_integer(samples) or samples < 1:
            raise ValueError(f"{type(self).__name__}: samples must be an integer >= 1, got {samples!r}")
        self.samples = samples
        if (lr is None) == (optimizer is None):
            raise ValueError(f"{type(self).__name__}: give lr or optimizer, got lr={lr!r}, optimizer={optimizer!r}")
        for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            if not is_number(value) or not 0 <= value < float("inf"):
                raise ValueError(f"{type(self).__name__}: {name} must be a number >= 0, got {value!r}")
        if optimizer is not None and (momentum or weight_decay):
            raise ValueError(
                f"{type(self).__name__}: momentum and weight_decay are SGD's, leave them out with optimizer, got "
                f"momentum={momentum!r}, weight_decay={weight_decay!r}"
            )
        if optimizer is not None and not callable(optimizer):
            raise TypeError(
                f"{type(self).__name__}: optimizer must be a function of parameters, such as lambda p: "
                f"torch.optim.Adam(p, lr=3e-4), got {type(optimizer).__name__}"
            )
        self.optimizers: list[Optimizer] = []
        rates = self._positive("lr", lr) if optimizer is None else [0.0] * len(self.layers)
        for (_, feedback), rate in zip(self.layers, rates, strict=True):
            parameters = list(feedback.parameters())
            made = (
                torch.optim.SGD(parameters, rate, momentum, weight_decay=weight_decay, fused=True)
                if optimizer is None
                else optimizer(parameters)
            )
            if not isinstance(made, Optimizer):
                raise TypeError(
                    f"{type(self).__name__}: optimizer must return a torch.optim.Optimizer, got {type(made).__name__}"
                )
            self.optimizers.append(made)

    def update(self, calls: Sequence[BlockCall], records: list[Record] | None) -> None:
        for number, (index, feedback) in enumerate(self.layers):
            for gradients, loss in self._layer(calls, number, records is not None):
                if records is not None:
                    assert loss is not None
                    records.append(Record(index, loss, *weight_alignment(calls[index])))
                average_over_processes(list(gradients.values()))
                for parameter, gradient in gradients.items():
                    parameter.grad = _laid_out_as(parameter, gradient)
                    state = self.optimizers[number].state[parameter]
                    state.update({name: _laid_out_as(parameter, value) for name, value in state.items()})
                self.optimizers[number].step()
                for parameter in feedback.parameters():
                    parameter.grad = None

    def _layer(self, calls: Sequence[BlockCall], number: int, with_loss: bool) -> Iterator[Iteration]:
        """Yield the gradients of each iteration of layer ``number`` of those with feedback, and, if asked, its loss."""
        for iteration in range(self.iterations[number]):
            yield self._differentiate(calls, number, self._draws(iteration))

    @abstractmethod
    def loss(self, calls: Sequence[BlockCall], layer: int, sigma: float, draw: int) -> Tensor:
        """Return the loss of one layer's feedback for one draw of noise.

        Args:
            calls: of all blocks, without graphs; gradients are recorded for the parameters of this layer's feedback.
            layer: number of the block.
            sigma: the layer's standard deviation of the noise, for :meth:`draw_noise`.
            draw: number of the draw, for :meth:`draw_noise`.

        Returns:
            A scalar, a mean over the batch.
        """

    def _draws(self, iteration: int) -> range:
        """The numbers of the draws of an iteration."""
        return range(iteration * self.samples, (iteration + 1) * self.samples)

    def _differentiate(self, calls: Sequence[BlockCall], number: int, draws: Iterable[int]) -> Iteration:
        """Gradients of the mean of the losses of draws by autograd, and that mean."""
        index, feedback = self.layers[number]
        parameters = list(feedback.parameters())
        wanted = [parameter.requires_grad for parameter in parameters]
        try:
            with torch.enable_grad():
                for parameter in parameters:
                    parameter.requires_grad_()
                losses = [self.loss(calls, index, self.noise[number], draw) for draw in draws]
                for loss in losses:
                    self._require_scalar(calls[index], loss)
                mean = torch.stack(losses).mean()
                gradients = torch.autograd.grad(mean, parameters, allow_unused=True)
        finally:
            for parameter, want in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(want)
        named: dict[Tensor, Tensor] = {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}
        return named, mean.detach()

    def _require_scalar(self, call: BlockCall, loss: object) -> None:
        if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
            return
        got = type(loss).__name__
        if isinstance(loss, Tensor):
            got = f"{list(loss.shape)}{'' if loss.requires_grad else ' without a graph'}"
        raise ValueError(
            f"{type(self).__name__}: loss must return a scalar that depends on the feedback of block {call.name}, "
            f"got {got}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        count = len(state["optimizers"])
        if count != len(self.optimizers):
            raise ValueError(
                f"{type(self).__name__}: state must have optimizers of {len(self.optimizers)} layers, got {count}"
            )
        super().load_state_dict(state)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _laid_out_as(parameter: Tensor, value: Any) -> Any:
    """What goes with a parameter, in its layout: torch's fused optimizers take for granted that all have one."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter).copy_(value)


class LDRL(GradientTrainer):
    r"""Trains feedback by the local difference reconstruction loss (:func:`ldrl_loss`), towards ``J_G = J_F^T``.

    For a block that begins with a linear map and its feedback, which ends in one (``F(x) = psi(Lx + b)``, ``G(y) = W^T
    phi(y) + c``), an iteration is the same gradient with less work::

        A' - A = phi(psi(z + L dx)) - phi(y),    A'' - A = phi(y + dy) - phi(y)
        grad W = (1/B) sum_b  -2 wgrad(dx, A' - A) + 2 wgrad(W^T (A'' - A), A'' - A)

    one pass of ``F``, one of ``G`` and two weight gradients instead of eight such passes. With
    ``second_term="expected"`` the second term is its expectation over small noise, ``2 sigma^2 W_cp sum_b s_G^2``, the
    sum over the features that a tap acts on, ``s_G`` the slope of ``phi``: then one pass of ``F`` and one weight
    gradient are left. Other blocks take autograd through the whole loss.

    Args:
        second_term: "drawn" (published) or "expected", which needs such a block with an elementwise ``psi`` and
            ``phi`` (activations, max-pooling). Behind a ReLU the two differ at any size of noise: units at zero, whose
            slope counts as zero, let noise above zero through, and the drawn term makes weights smaller for it.
        indices: "noisy" (published) or "clean", see :func:`ldrl_loss`.
        pixels: "all" (published) or "grid", which needs the expected second term and a block with a convolution of
            stride 1: before such a convolution noise is on one of every ``k x k`` pixels, the next ones at each draw,
            with ``k`` times the standard deviation. Noise at all places together has the covariance of noise on all
            pixels, but a draw costs less; for small noise the gradient has the same mean.
        net, lr, noise, iterations, samples, momentum, weight_decay, optimizer, seed, noise_source: see
            :class:`GradientTrainer`. Published: SGD with momentum 0.9.

    Source: Ernoult et al., "Towards Scaling Difference Target Propagation by Learning Backprop Targets", ICML 2022.
    """

    sources: ClassVar[tuple[str, ...]] = ("ernoult2022",)

    def __init__(
        self,
        net: nn.Module,
        *,
        lr: float | Sequence[float] | None = None,
        noise: float | Sequence[float],
        iterations: int | Sequence[int] = 1,
        samples: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: MakeOptimizer | None = None,
        seed: int = 0,
        noise_source: NoiseSource | None = None,
        second_term: SecondTerm = "drawn",
        indices: Indices = "noisy",
        pixels: Pixels = "all",
    ) -> None:
        super().__init__(
            net,
            lr=lr,
            noise=noise,
            iterations=iterations,
            samples=samples,
            momentum=momentum,
            weight_decay=weight_decay,
            optimizer=optimizer,
            seed=seed,
            noise_source=noise_source,
        )
        self._require_source("block")
        check_choice(type(self).__name__, "second_term", second_term, ("drawn", "expected"))
        self.second_term = second_term
        if pixels == "grid" and second_term != "expected":
            raise ValueError(f"LDRL: pixels='grid' needs second_term='expected', got {second_term!r}")
        self.pixels = self._choose_pixels(pixels)
        check_choice(type(self).__name__, "indices", indices, get_args(Indices))
        self.indices: Indices = indices
        if second_term == "expected":
            self._require_elementwise("second_term='expected'")

    def loss(self, calls: Sequence[BlockCall], layer: int, sigma: float, draw: int) -> Tensor:
        call = calls[layer]
        input_noise = self.draw_noise(layer, draw, sigma, call.input)
        return ldrl_loss(call, input_noise, self.draw_noise(layer, draw, sigma, call.output, True), self.indices)

    def _layer(self, calls: Sequence[BlockCall], number: int, with_loss: bool) -> Iterator[Iteration]:
        block = linear_block(calls[self.layers[number][0]])
        if block is None:
            return super()._layer(calls, number, with_loss)
        return self._linear_layer(block, number, with_loss)

    def _output_change(self, block: LinearBlock, number: int, draw: int) -> Tensor:
        """``A'' - A`` of a draw, whose noise a kernel makes where it knows how."""
        index, sigma, fused = self.layers[number][0], self.noise[number], block.fused
        if fused is None or not isinstance(self.noise_source, CounterNoise):
            return block.output_change(self.draw_noise(index, draw, sigma, block.output, True))
        height, width = block.preactivation.shape[-2:] if fused.window else (0, 0)
        place: dict[str, Any] = self.noise_source.place(Draw(self.steps, index, draw, True), block.output)
        options = {**fused.options(), **place}
        return probe_difference(
            block.output, fused.indices, height=height, width=width, sigma=sigma, draws=1, **options
        )[0]

    def _linear_layer(self, block: LinearBlock, number: int, with_loss: bool) -> Iterator[Iteration]:
        """The iterations of a block that begins with a linear map."""
        sigma, head = self.noise[number], block.head
        head.arrange(block.preactivation.shape[1:])
        weight, batch = head.current_weight(), len(block.output)
        scale = 2 / (batch * self.samples)
        power = feedback_power(block).mul_(2 * sigma**2 / batch) if self.second_term == "expected" else None
        draws = self.iterations[number] * self.samples
        drawn = self._probes(block, number, sigma, draws, self.indices, self.pixels)
        for iteration in range(self.iterations[number]):
            of_iteration = list(itertools.islice(drawn, self.samples))
            quadratic = weight.new_zeros(())
            if power is not None:
                gradient = correlation(block, of_iteration, -scale).addcmul_(power, weight)
                if with_loss:
                    quadratic = (power * weight.square()).sum()
            else:
                # The gradients of both terms are one product: of what W^T takes, and of what it is to give.
                given, wanted = [], []
                for draw, probe in zip(self._draws(iteration), of_iteration, strict=True):
                    change = self._output_change(block, number, draw)
                    moved = head.map(change, block.input_shape)
                    if with_loss:
                        quadratic += moved.square().sum() * scale
                    given += [probe.change, change]
                    wanted += [probe.noise * -scale, moved.mul_(scale)]
                gradient = head.weight_gradient(joined(wanted), joined(given))
            # a quadratic form and a linear one: <gradient, W> has the first twice
            yield {weight: gradient}, (gradient * weight).sum() - quadratic / 2 if with_loss else None


class Reconstruction(GradientTrainer):
    """Trains feedback to reconstruct noisy inputs (:func:`reconstruction_loss`), as the first methods did.

    Args:
        indices: "noisy" (published) or "clean", see :func:`ldrl_loss`.
        reduction: "sample": the loss is a sum over features, as in Ernoult et al.'s code; "element": a mean, divided by
            the variance of the noise but at least by 0.02^2, as in Meulemans et al.'s.
        net, lr, noise, iterations, samples, momentum, weight_decay, optimizer, seed, noise_source: see
            :class:`GradientTrainer`.

    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation", 2015.
    """

    sources: ClassVar[tuple[str, ...]] = ("lee2015",)

    def __init__(
        self,
        net: nn.Module,
        *,
        lr: float | Sequence[float] | None = None,
        noise: float | Sequence[float],
        iterations: int | Sequence[int] = 1,
        samples: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: MakeOptimizer | None = None,
        seed: int = 0,
        noise_source: NoiseSource | None = None,
        indices: Indices = "noisy",
        reduction: Literal["sample", "element"] = "sample",
    ) -> None:
        super().__init__(
            net,
            lr=lr,
            noise=noise,
            iterations=iterations,
            samples=samples,
            momentum=momentum,
            weight_decay=weight_decay,
            optimizer=optimizer,
            seed=seed,
            noise_source=noise_source,
        )
        self._require_source("block")
        check_choice(type(self).__name__, "indices", indices, get_args(Indices))
        self.indices: Indices = indices
        check_choice(type(self).__name__, "reduction", reduction, ("sample", "element"))
        self.reduction = reduction

    def loss(self, calls: Sequence[BlockCall], layer: int, sigma: float, draw: int) -> Tensor:
        call = calls[layer]
        scale = 1.0 if self.reduction == "sample" else 1 / (max(sigma, 0.02) ** 2 * call.input[0].numel())
        return reconstruction_loss(call, self.draw_noise(layer, draw, sigma, call.input), self.indices) * scale


class DifferenceReconstruction(GradientTrainer):
    """Trains feedback through all blocks above (:func:`difference_reconstruction_loss`), towards Gauss-Newton targets.

    With ``DirectTargets`` this trains the direct feedback (DDTP-linear, DDTP-RHL). ``weight_decay`` acts as damping.

    Args:
        difference: False leaves out the difference correction, and the division of the loss by the variance of the
            noise (DDTP-control); for direct feedback.
        net, lr, noise, iterations, samples, momentum, weight_decay, optimizer, seed, noise_source: see
            :class:`GradientTrainer`. Published: Adam, one iteration a batch.

    Cost: an iteration of layer ``i`` runs blocks ``i .. L-1`` once and the feedback above as often as the rule does;
    with ``DirectTargets`` that is none, only the layer's own.

    Source: Meulemans et al., "A Theoretical Framework for Target Propagation", NeurIPS 2020.
    """

    sources: ClassVar[tuple[str, ...]] = ("meulemans2020",)

    def __init__(
        self,
        net: nn.Module,
        *,
        lr: float | Sequence[float] | None = None,
        noise: float | Sequence[float],
        iterations: int | Sequence[int] = 1,
        samples: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: MakeOptimizer | None = None,
        seed: int = 0,
        noise_source: NoiseSource | None = None,
        difference: bool = True,
    ) -> None:
        super().__init__(
            net,
            lr=lr,
            noise=noise,
            iterations=iterations,
            samples=samples,
            momentum=momentum,
            weight_decay=weight_decay,
            optimizer=optimizer,
            seed=seed,
            noise_source=noise_source,
        )
        if not isinstance(difference, bool):
            raise ValueError(f"DifferenceReconstruction: difference must be True or False, got {difference!r}")
        if not difference:
            self._require_source("network")
        self.difference = difference

    def loss(self, calls: Sequence[BlockCall], layer: int, sigma: float, draw: int) -> Tensor:
        noise = self.draw_noise(layer, draw, sigma, calls[layer].input)
        loss = difference_reconstruction_loss(calls, layer, self.net.rule, noise, self.difference)
        return loss * (sigma**-2 if self.difference else 1.0)
