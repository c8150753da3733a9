"""What every trainer of feedback shares: which layers there are, their noise, and averages over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, distributed, nn

from tpext.feedback.base import BlockCall, Feedback, Indices, Trace, in_full_precision, still_statistics
from tpext.feedback.linear_block import LinearBlock, Pixels, Probe, linear_steps, probes
from tpext.feedback.linear_map import LinearMap
from tpext.feedback.modules import LayeredFeedback
from tpext.ops._library import check_choice, check_tensor, full_precision, is_integer, is_number
from tpext.ops.counter_normal import counter_normal


class Draw(NamedTuple):
    """Which noise: that of an iteration of a layer, for the input or the output.

    Attributes:
        step: number of the trainer's step.
        layer: number of the block.
        draw: number of the draw within the step, counted over iterations and samples.
        output: whether for the block's output.
    """

    step: int
    layer: int
    draw: int
    output: bool


NoiseSource: TypeAlias = Callable[[Draw, Tensor], Tensor]
"""Returns standard normal noise for a draw, in the shape, dtype and place of a tensor.

That is the layer's input or output, or with ``pixels="grid"`` the pixels of the draw's grid, ``[B, n, m, C]``.
"""


class CounterNoise(NamedTuple):
    """Noise from a counter-based generator: a function of seed, draw and row of the global batch alone.

    Neither the order of the layers nor threads nor the split of a batch over processes changes it.
    """

    seed: int

    def __call__(self, draw: Draw, like: Tensor, scale: float = 1.0) -> Tensor:
        place = self.place(draw, like)
        return counter_normal(like.shape, scale=scale, dtype=like.dtype, device=like.device, **place)

    def place(self, draw: Draw, like: Tensor) -> dict[str, int]:
        """Return where in the generator's sequence a draw's noise is, as :func:`tpext.ops.counter_normal` takes it.

        A stream's number has 12 bits for the layer, 19 for the draw and one for the side.
        """
        if draw.layer >= 2**12 or draw.draw >= 2**19:
            raise ValueError(f"CounterNoise: layer must be below 2^12 and draw below 2^19, got {draw}")
        stream = (draw.layer << 20) + 2 * draw.draw + draw.output
        return {"seed": self.seed, "step": draw.step, "stream": stream, "first_row": _rank() * like.shape[0]}


class Record(NamedTuple):
    """One iteration of one layer, before its update: scalars on the network's device.

    Attributes:
        layer: number of the block.
        loss: of the trainer; under ``torch.distributed`` that of this process's part of the batch, of
            :class:`RunningLDRL` that of the whole.
        angle: between the feedback's weight and the block's, in degrees; None where they have no common shape.
        distance: of these, relative to the block's, or None.
    """

    layer: int
    loss: Tensor
    angle: Tensor | None
    distance: Tensor | None


class FeedbackTrainer(ABC):
    """Trains the feedback modules of a :class:`tpext.nn.TargetSequential`, beside the optimizer of its blocks.

    ``step`` does what is due for one batch. Under ``torch.distributed`` every process calls it with its part of the
    batch, in equal parts, and gradients (or sums) are averaged, so the result is that of the joint batch; batch
    normalisation apart, which takes the statistics of each part.

    For a trainer of your own subclass it and give :meth:`update`, what one batch does to the feedback; for a loss of
    your own that is trained by gradients subclass :class:`GradientTrainer` instead. A whole one is
    ``examples/own_feedback_trainer.py``. Where it has a state, extend :meth:`state_dict` and :meth:`load_state_dict`.

    Args:
        net: whose feedback to train.
        seed: of the noise, 0 .. 2^63 - 1.
        noise_source: draws the noise; None: :class:`CounterNoise`, a function of the seed, step, layer, draw and row.

    Attributes:
        net: the network.
        layers: number of the block and feedback of each layer with something to train, the first one first.
        steps: number of steps done.
        changes_weights: of the class: whether it changes the feedback's weights, so that it refuses tied ones, which
            are the blocks' own.
        sources: of the class: its publications for :func:`tpext.citation`, keys or whole BibTeX entries.

    Raises:
        TypeError: a network of another class, or a noise source that is no function.
        ValueError: a seed out of its range, or a network with no feedback to train or with tied feedback.

    >>> import torch, tpext
    >>> net = tpext.nn.TargetSequential(
    ...     torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ELU()), torch.nn.Linear(8, 3)
    ... )
    >>> trainer = tpext.feedback.LDRL(net, lr=0.1, noise=0.1, iterations=5)
    >>> trace = net.trace(torch.randn(16, 4))
    >>> trainer.step(trace)
    >>> torch.nn.functional.cross_entropy(trace.output, torch.arange(16) % 3).backward()
    """

    changes_weights: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ()

    def __init__(self, net: nn.Module, *, seed: int = 0, noise_source: NoiseSource | None = None) -> None:
        pairs = getattr(net, "pairs", None)
        if pairs is None:
            raise TypeError(f"{type(self).__name__}: net must be a tpext.nn.TargetSequential, got {type(net).__name__}")
        if not is_integer(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"{type(self).__name__}: seed must be in 0 .. 2^63 - 1, got {seed!r}")
        if noise_source is not None and not callable(noise_source):
            raise TypeError(
                f"{type(self).__name__}: noise_source must be a function of a Draw and a tensor, or None, got "
                f"{type(noise_source).__name__}"
            )
        self.net: Any = net
        # of a pool or a reshape there is nothing to train
        self.layers: list[tuple[int, Feedback]] = [
            (index, feedback)
            for index, (_, feedback) in enumerate(pairs())
            if feedback is not None and (_is_tied(feedback) or any(True for _ in feedback.parameters()))
        ]
        if not self.layers:
            raise ValueError(f"{type(self).__name__}: net has no feedback to train; its rule is {self.net.rule}")
        self._require_own_weights()
        self.noise_source: NoiseSource | CounterNoise = CounterNoise(seed) if noise_source is None else noise_source
        self.steps = 0

    def step(self, input: Tensor | Trace, record: bool = False) -> list[Record] | None:
        """Train the feedback on one batch.

        Args:
            input: the batch ``[B, ...]``; or the trace of the network's own forward pass on it, which saves that.
            record: True returns a record of every iteration, which costs each one a loss; False returns None.

        Raises:
            RuntimeError: under ``torch.inference_mode()``, or on a trace made under it; ``torch.no_grad()`` is fine.
            ValueError: a batch without samples, a trace of another network, or feedback that was tied after this
                trainer was made.
        """
        self._require_own_weights()
        if torch.is_inference_mode_enabled() or (isinstance(input, Trace) and input.output.is_inference()):
            raise RuntimeError(
                f"{type(self).__name__}: feedback cannot be trained under torch.inference_mode(), nor on a trace made "
                "under it; use torch.no_grad()"
            )
        if not isinstance(input, Trace):
            check_tensor(type(self).__name__, "input", input, "[B, ...], or a Trace")
        if len(input.output if isinstance(input, Trace) else input) == 0:
            raise ValueError(f"{type(self).__name__}: input must have at least one sample, got a batch of none")
        records: list[Record] | None = [] if record else None
        with torch.no_grad(), still_statistics(self.net.blocks):
            trace = input if isinstance(input, Trace) else self.net.trace(input)
            for index, feedback in self.layers:
                if index >= len(trace.calls) or trace.calls[index].feedback is not feedback:
                    raise ValueError(
                        f"{type(self).__name__}: input must be a trace of the trainer's net, got another's"
                    )
            with full_precision(trace.output.device.type):
                self.update(in_full_precision(trace.calls), records)
        self.steps += 1
        return records

    @abstractmethod
    def update(self, calls: Sequence[BlockCall], records: list[Record] | None) -> None:
        """Change the feedback as one batch asks for; what a subclass gives.

        It runs without recorded gradients, without autocast and with running statistics left alone. Noise comes from
        :meth:`draw_noise`. What the batch's samples add up to goes through :func:`average_over_processes`, so that all
        processes do the same.

        Args:
            calls: of all blocks in the batch's forward pass; ``self.layers`` says which have feedback to train.
            records: where it is a list, append a :class:`Record` an iteration and layer.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the network's own state."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        steps = state["steps"]
        if not is_integer(steps) or steps < 0:
            raise ValueError(f"{type(self).__name__}: steps must be an integer >= 0, got {steps!r}")
        self.steps = steps

    def _per_layer(self, name: str, value: object, check: Callable[[Any], bool], expected: str) -> list[Any]:
        """One value for each layer with feedback, of one for all or one for each."""
        values = list(value) if isinstance(value, (list, tuple)) else [value] * len(self.layers)
        if len(values) != len(self.layers):
            raise ValueError(
                f"{type(self).__name__}: {name} must have one value for each of the {len(self.layers)} layers with "
                f"feedback, got {len(values)}"
            )
        for one in values:
            if not check(one):
                raise ValueError(f"{type(self).__name__}: {name} must be {expected}, got {one!r}")
        return values

    def _positive(self, name: str, value: object) -> list[float]:
        return [
            float(one)
            for one in self._per_layer(name, value, lambda v: is_number(v) and 0 < v < float("inf"), "a number > 0")
        ]

    def _counts(self, name: str, value: object, low: int = 1) -> list[int]:
        return self._per_layer(name, value, lambda v: is_integer(v) and v >= low, f"an integer >= {low}")

    def _require_own_weights(self) -> None:
        """Raise ValueError where the feedback uses the blocks' own weights, which are not a trainer's to change."""
        if not self.changes_weights:
            return
        for index, feedback in self.layers:
            if _is_tied(feedback):
                raise ValueError(
                    f"{type(self).__name__}: net must have feedback with weights of its own, got block {index}'s tied"
                )

    def _require_source(self, source: str) -> None:
        """Raise ValueError unless all feedback maps from the output of its block, or of the network."""
        for index, feedback in self.layers:
            if feedback.source != source:
                raise ValueError(
                    f"{type(self).__name__}: net must have feedback from the output of each {source}, that of block "
                    f"{index} is from the {feedback.source}'s; its rule is {self.net.rule}"
                )

    def _require_elementwise(self, what: str) -> None:
        """Raise ValueError unless every layer begins with a linear map and what follows acts element by element."""
        blocks = [block for block, _ in self.net.pairs()]
        for index, feedback in self.layers:
            block = blocks[index]
            steps = linear_steps(block, feedback)
            if steps is None or not all(step.feedback.elementwise for step in steps[2]):
                inside = ", ".join(type(one).__name__ for one in block.children())
                kind = f"{type(block).__name__}({inside})" if inside else type(block).__name__
                raise ValueError(
                    f"{type(self).__name__}: {what} needs blocks of a linear layer or convolution, then activations "
                    f"and max-pooling; block {index} is another, a {kind}"
                )

    def _choose_pixels(self, pixels: Pixels) -> Pixels:
        """Return where noise is; raise ValueError for another choice, or a grid that no layer has."""
        check_choice(type(self).__name__, "pixels", pixels, get_args(Pixels))
        maps = (module for _, feedback in self.layers for module in feedback.modules())
        if pixels == "grid" and not any(isinstance(module, LinearMap) and module.has_pixel_grid for module in maps):
            raise ValueError(
                f"{type(self).__name__}: pixels='grid' needs a block with feedback that begins with a convolution in "
                "two dimensions of stride 1, without dilation and groups; net has none"
            )
        return pixels

    def _probes(
        self, block: LinearBlock, number: int, sigma: float, draws: int, indices: Indices, pixels: Pixels
    ) -> Iterator[Probe]:
        """Yield this step's draws of noise before layer ``number`` of those with feedback."""

        def noise(draw: int, like: Tensor) -> Tensor:
            return self.draw_noise(self.layers[number][0], draw, sigma, like)

        return probes(block, noise, draws, indices, pixels, self.steps * draws)

    def draw_noise(self, layer: int, draw: int, sigma: float, like: Tensor, output: bool = False) -> Tensor:
        """Return normal noise of this step from the noise source.

        Args:
            layer: number of the block.
            draw: number of the draw within the step, counted over all iterations.
            sigma: standard deviation.
            like: gives shape, dtype and device.
            output: whether the noise is for the block's output; another draw than that for its input.

        Raises:
            ValueError: the noise source returned something of another shape or dtype.
        """
        wanted = Draw(self.steps, layer, draw, output)
        if isinstance(self.noise_source, CounterNoise):
            return self.noise_source(wanted, like, sigma)
        noise = self.noise_source(wanted, like)
        if not isinstance(noise, Tensor) or noise.shape != like.shape or noise.dtype != like.dtype:
            got = f"{list(noise.shape)} {noise.dtype}" if isinstance(noise, Tensor) else type(noise).__name__
            raise ValueError(
                f"{type(self).__name__}: noise_source must return a tensor {list(like.shape)} {like.dtype} for "
                f"{wanted}, got {got}"
            )
        return noise * sigma


def _is_tied(feedback: Feedback) -> bool:
    return any(isinstance(module, LinearMap) and module.weight is None for module in feedback.modules())


def weight_alignment(call: BlockCall) -> tuple[Tensor | None, Tensor | None]:
    """Return angle in degrees and relative distance between a feedback's weight and its block's, in float64.

    None for both where the block does not begin with a linear map, or the feedback has none of the transposed shape.
    """
    # what comes after the map in the feedback does not matter here
    feedback = call.feedback.mirrored if isinstance(call.feedback, LayeredFeedback) else call.feedback
    steps = None if feedback is None else linear_steps(call.block, feedback)
    if steps is None:
        return None, None
    module, head, _ = steps[1]
    assert isinstance(head, LinearMap)
    forward = head.transported(module).double().flatten()
    backward = head.current_weight().detach().double().flatten()
    cosine = torch.dot(forward, backward) / (forward.norm() * backward.norm())
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1))), (forward - backward).norm() / forward.norm()


def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the processes, if there are several."""
    if distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor /= count


def _rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
