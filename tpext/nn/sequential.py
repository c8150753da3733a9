"""Networks of any modules whose backward pass is target propagation."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tpext.feedback.base import BlockCall, Feedback, Trace, detach_tensors, warn_of_relu
from tpext.nn.torchscript import refuse_script, refuse_trace
from tpext.ops._library import (
    LOW_PRECISION,
    NOT_A_DERIVATIVE,
    check_choice,
    check_tensor,
    is_integer,
    refuse_forward_mode,
)
from tpext.rules import Backprop, DifferenceTargets, NetworkRule
from tpext.rules.base import require_rule

FeedbackInit = Literal["random", "symmetric", "tied"]


class _TargetsFunction(torch.autograd.Function):
    """The identity of the last block's output, whose backward pass gives every block's output its local gradient.

    Each output has a graph of its own, which ends at that block's detached input; so autograd itself takes the local
    gradients on to the parameters, with their hooks.
    """

    @staticmethod
    def forward(ctx: Any, rule: NetworkRule, calls: Sequence[BlockCall], *outputs: Tensor) -> Tensor:
        ctx.rule, ctx.calls = rule, calls
        if not torch.compiler.is_compiling():
            # kept by autograd, which frees them after the backward pass
            tensors, ctx.calls = detach_tensors(calls)
            ctx.save_for_backward(*tensors)
        # not the tensor itself, which the next module might change in place
        return outputs[-1].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients are recorded inside a backward pass exactly when its result is to be differentiated again.
        if torch.is_grad_enabled():
            raise RuntimeError(NOT_A_DERIVATIVE)
        calls = ctx.calls if torch.compiler.is_compiling() else ctx.calls(ctx.saved_tensors)
        return None, None, *ctx.rule.local_gradients(calls, grad)


class TargetSequential(nn.Module):
    """A chain of blocks, any modules, trained by target propagation.

    ``s_i = F_i(s_{i-1})``; ``loss.backward()`` gives each block's output a displacement, by the rule, and each block's
    parameters the gradient of its local loss: see :mod:`tpext.rules.network`. It composes with modules above (a loss, a
    head) and below, which receives a gradient through the first block.

    The feedback modules of the rule are made from the blocks and belong to the network, but not to its loss: their
    parameters do not require gradients, so neither the loss nor an optimizer of ``net.parameters()`` nor
    ``DistributedDataParallel`` touches them. A trainer of :mod:`tpext.feedback` trains them.

    Under ``DistributedDataParallel`` and ``torch.compile`` call the wrapped network after ``trainer.step(x)``:
    :meth:`trace` is a method of the bare network, past them both. In training, forward hooks of a block's sequence and
    of its max-pools do not run.

    Args:
        blocks: the modules one by one, or one dict of them by names; :func:`blocks_of` makes them from a plain chain.
            A block may be anything that takes and returns one tensor: a convolution with activation and pooling, a
            whole stage of a residual network. Inside a block the chain rule holds. A block that comes twice shares its
            weights; each time it has feedback of its own.
        rule: what the backward pass computes; None means ``DifferenceTargets()``.
        input_shape: of one sample, ``(C, H, W)`` say; needed by ``DirectTargets``, whose feedback has to know the sizes
            of all states.
        feedback: the feedback modules, one a block, None for the first (and all others that have none); None makes them
            as the rule does.
        feedback_init: "random": as torch initialises; "symmetric": the blocks' own weights transposed, biases zero, to
            start with; "tied": these weights for good.

    Attributes:
        blocks: the network itself, a ``torch.nn.Sequential``.
        feedback: a ``torch.nn.ModuleDict``, by the blocks' names; the first block has none.

    Raises:
        TypeError: a block that is no module, or returns no tensor, a rule of another kind of layer, a module without
            feedback, or feedback that is no :class:`tpext.feedback.Feedback`.
        ValueError: another argument out of its range, named; a whole ``torch.nn.Sequential`` as the one block.

    Cost: backward as back-propagation, and the feedback of each block once or, where it does not end in a linear map,
    twice.

    >>> import torch, tpext
    >>> net = tpext.nn.TargetSequential(
    ...     torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ELU(), torch.nn.MaxPool2d(2)),
    ...     torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 4 * 4, 10)),
    ...     rule=tpext.DifferenceTargets(target_step=0.7),
    ... )
    >>> torch.nn.functional.cross_entropy(net(torch.randn(5, 3, 8, 8)), torch.arange(5)).backward()
    >>> net.blocks[0][0].weight.grad.shape
    torch.Size([8, 3, 3, 3])
    """

    def __init__(
        self,
        *blocks: nn.Module | dict[str, nn.Module],
        rule: NetworkRule | Backprop | None = None,
        input_shape: Sequence[int] | None = None,
        feedback: Sequence[Feedback | None] | None = None,
        feedback_init: FeedbackInit = "random",
    ) -> None:
        super().__init__()
        rule = DifferenceTargets() if rule is None else rule
        require_rule("TargetSequential", rule, "network")
        check_choice("TargetSequential", "feedback_init", feedback_init, get_args(FeedbackInit))
        self.blocks = _sequential(blocks)
        if not rule.exact:
            _require_several(blocks)
            _warn_of_no_layer(self.blocks)
        self._rule: NetworkRule | Backprop = rule
        self.feedback_init = feedback_init
        self.feedback = nn.ModuleDict()
        if rule.exact and (feedback is not None or feedback_init != "random"):
            raise ValueError(
                "TargetSequential: feedback and feedback_init do not belong to rule=Backprop(), which has none"
            )
        if not rule.exact:
            self._add_feedback(self._make_feedback(rule, input_shape) if feedback is None else feedback)

    def _make_feedback(self, rule: NetworkRule, input_shape: Sequence[int] | None) -> Sequence[Feedback | None]:
        rule.check(self)
        shapes = None
        if rule.needs_shapes:
            if input_shape is None:
                raise ValueError(f"TargetSequential: {type(rule).__name__} needs input_shape, the shape of one sample")
            shapes = self._shapes(input_shape)
        return rule.make_feedback(list(self.blocks), shapes)

    def _add_feedback(self, made: Sequence[Feedback | None]) -> None:
        for one in made:
            if one is not None and not isinstance(one, Feedback):
                raise TypeError(
                    "TargetSequential: feedback must be tpext.feedback.Feedback modules, or None for a block, got "
                    f"{type(one).__name__}"
                )
        if len(made) != len(self.blocks) or made[0] is not None:
            raise ValueError(
                f"TargetSequential: feedback must be one module for each of the {len(self.blocks)} blocks, None for "
                f"the first, got {[type(one).__name__ for one in made]}"
            )
        for (name, block), feedback in zip(self._named(), made, strict=True):
            if feedback is None:
                continue
            if self.feedback_init == "symmetric":
                feedback.copy_weights(block)
            elif self.feedback_init == "tied":
                feedback.tie(block)
            self.feedback[name] = feedback
        self.feedback.requires_grad_(False)
        if self.feedback_init != "random":
            warn_of_relu("TargetSequential", self.feedback)

    @torch.no_grad()
    def _shapes(self, input_shape: Sequence[int]) -> list[torch.Size]:
        """The shapes of the states, by a pass that leaves statistics and random numbers alone."""
        sizes = list(input_shape) if isinstance(input_shape, Sequence) else input_shape
        if not isinstance(sizes, list) or not sizes or not all(is_integer(size) and size > 0 for size in sizes):
            raise ValueError(
                "TargetSequential: input_shape must be the sizes of one sample, such as (3, 32, 32), got "
                f"{input_shape!r}"
            )
        like = next(self.blocks.parameters(), torch.empty(0))
        state = torch.zeros(1, *sizes, device=like.device, dtype=like.dtype)
        modes = {module: module.training for module in self.blocks.modules()}
        self.blocks.eval()
        try:
            shapes = []
            for name, block in self._named():
                try:
                    state = block(state)
                except (RuntimeError, ValueError) as error:
                    raise ValueError(
                        f"TargetSequential: input_shape {sizes} does not fit block {name}: {error}"
                    ) from error
                _require_tensor(state, name, block)
                shapes.append(state.shape[1:])
            return shapes
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _named(self) -> list[tuple[str, nn.Module]]:
        # not named_children, which leaves out a block that comes a second time
        return [(name, block) for name, block in self.blocks._modules.items() if block is not None]

    def pairs(self) -> list[tuple[nn.Module, Feedback | None]]:
        """Return each block with its feedback, the first one first."""
        feedback: Any = self.feedback
        names = set(feedback.keys())
        return [(block, feedback[name] if name in names else None) for name, block in self._named()]

    def trace(self, input: Tensor) -> Trace:
        """Run the network and return its output with what each block did, for a trainer of the feedback to share.

        >>> import torch, tpext
        >>> net = tpext.nn.TargetSequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> trace = net.trace(torch.ones(5, 4))
        >>> [tuple(call.output.shape) for call in trace.calls]
        [(5, 3), (5, 2)]
        """
        check_tensor("TargetSequential", "input", input, "[B, ...]")
        if not self.rule.exact:
            self._check_precision()
            self.rule.check(self)
        if torch._C._are_functorch_transforms_active():
            refuse_forward_mode("TargetSequential")
            raise RuntimeError(NOT_A_DERIVATIVE)
        outputs, calls = [], []
        state = input
        names = [name for name, _ in self._named()]
        for index, (block, feedback) in enumerate(self.pairs()):
            # The first block's input keeps its graph: what is below learns by the first local loss.
            source = state if index == 0 or self.rule.exact else state.detach()
            watched = index > 0 and not torch.compiler.is_compiling() and not source.is_inference()
            version = source._version if watched else 0
            if feedback is None:
                state, code = block(source), None
            else:
                state, code = feedback.encode(block, source)
            _require_tensor(state, names[index], block)
            if watched and source._version != version:
                raise ValueError(
                    f"TargetSequential: block {names[index]} must leave its input as it is, got a change in place"
                )
            outputs.append(state)
            calls.append(BlockCall(block, feedback, source.detach(), state.detach(), code, names[index]))
        if self.rule.exact:
            return Trace(state, tuple(calls))
        return Trace(_TargetsFunction.apply(self.rule, tuple(calls), *outputs), tuple(calls))  # type: ignore[no-untyped-call]

    def _check_precision(self) -> None:
        for name, parameter in self.blocks.named_parameters():
            if parameter.dtype in LOW_PRECISION:
                raise ValueError(
                    f"TargetSequential: {name} must be float32 or float64, got {parameter.dtype}; for lower "
                    "precision use torch.autocast"
                )

    def forward(self, input: Tensor) -> Tensor:
        """Return ``s_{L-1}`` of inputs ``[B, ...]``."""
        check_tensor("TargetSequential", "input", input, "[B, ...]")
        if self.rule.exact or not torch.is_grad_enabled():
            return self.blocks(input)  # type: ignore[no-any-return]
        refuse_trace(self)
        return self.trace(input).output

    __prepare_scriptable__ = refuse_script

    @property
    def rule(self) -> NetworkRule | Backprop:
        """The rule of the backward pass; assigning one keeps the feedback modules as they are."""
        return self._rule

    @rule.setter
    def rule(self, rule: NetworkRule | Backprop) -> None:
        require_rule("TargetSequential", rule, "network")
        self._rule = rule

    def extra_repr(self) -> str:
        return f"rule={self.rule}"


def blocks_of(network: nn.Sequential) -> list[nn.Sequential]:
    """Return the modules of a plain chain in blocks of one layer each, as :class:`TargetSequential` trains them best.

    A block begins at each module that has a weight matrix or kernel, or at the ``Flatten`` right before it. It goes on
    with the normalisations, activations, pools and dropouts behind it. The modules are shared with the network; those
    of sequences inside it count one by one.

    Args:
        network: a chain of modules.

    Raises:
        TypeError: something else.

    >>> import torch, tpext
    >>> layers = torch.nn.Sequential(
    ...     torch.nn.Conv2d(1, 4, 3), torch.nn.ELU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(36, 2)
    ... )
    >>> [[type(module).__name__ for module in block] for block in tpext.nn.blocks_of(layers)]
    [['Conv2d', 'ELU', 'MaxPool2d'], ['Flatten', 'Linear']]
    """
    if not isinstance(network, nn.Sequential) or not _is_plain(network):
        raise TypeError(f"blocks_of: network must be a torch.nn.Sequential without hooks, got {type(network).__name__}")
    blocks: list[list[nn.Module]] = []
    shapes: list[nn.Module] = []
    for module in _modules_of(network):
        if isinstance(module, (nn.Flatten, nn.Unflatten)):
            shapes.append(module)
            continue
        if not blocks or (_has_weights(module) and any(map(_has_weights, blocks[-1]))):
            blocks.append([])
        blocks[-1] += [*shapes, module]
        shapes = []
    if shapes:
        blocks = blocks or [[]]
        blocks[-1] += shapes
    return [nn.Sequential(*block) for block in blocks]


def _modules_of(chain: nn.Sequential) -> Iterator[nn.Module]:
    for module in chain:
        if isinstance(module, nn.Sequential) and _is_plain(module):
            yield from _modules_of(module)
        else:
            yield module


def _is_plain(chain: nn.Sequential) -> bool:
    """Whether a sequence computes what its modules do, and no more."""
    hooks = (chain._forward_pre_hooks, chain._forward_hooks, chain._backward_pre_hooks, chain._backward_hooks)
    return type(chain).forward is nn.Sequential.forward and not any(hooks)


def _has_weights(module: nn.Module) -> bool:
    if isinstance(module, nn.LayerNorm):
        return False
    return any(is_lazy(parameter) or parameter.dim() > 1 for parameter in module.parameters())


def _warn_of_no_layer(blocks: nn.Sequential) -> None:
    """Warn of an activation or a pool by itself, whose targets are one more inverse on the way down."""
    shapes = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Sequential)
    alone = [
        name
        for name, block in blocks.named_children()
        if not any(True for _ in block.parameters())
        and not all(isinstance(module, shapes) for module in block.modules())
    ]
    if alone:
        warnings.warn(
            f"TargetSequential: blocks without parameters learn worse than as the ends of those before, got "
            f"{', '.join(alone)}; tpext.nn.blocks_of(network) joins them",
            stacklevel=3,
        )


def _sequential(blocks: tuple[nn.Module | dict[str, nn.Module], ...]) -> nn.Sequential:
    named: dict[Any, Any] = {str(index): block for index, block in enumerate(blocks)}
    if len(blocks) == 1 and isinstance(blocks[0], dict):
        named = blocks[0]
    if not named:
        raise ValueError("TargetSequential: blocks must be at least one module, got none")
    for name, block in named.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"TargetSequential: names of blocks must be text without dots, got {name!r}")
        if not isinstance(block, nn.Module):
            raise TypeError(f"TargetSequential: block {name} must be a torch.nn.Module, got {type(block).__name__}")
    return nn.Sequential(OrderedDict(named))


def _require_several(blocks: tuple[nn.Module | dict[str, nn.Module], ...]) -> None:
    """Refuse a whole network as the one block, inside of which the chain rule would hold."""
    one = blocks[0]
    if len(blocks) > 1 or not isinstance(one, nn.Sequential):
        return
    while len(one) == 1 and isinstance(one[0], nn.Sequential):
        one = one[0]
    layers = sum(any(True for _ in module.parameters()) for module in one)
    if layers > 1:
        raise ValueError(
            "TargetSequential: blocks must be given one by one, as in TargetSequential(*blocks_of(net)), got one "
            f"Sequential with {layers} layers, inside of which back-propagation would hold; a dict of one block says "
            "that it is meant"
        )


def _require_tensor(output: object, name: str, block: nn.Module) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"TargetSequential: block {name}, a {type(block).__name__}, must return one tensor, got "
            f"{type(output).__name__}"
        )
