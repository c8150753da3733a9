"""Feedback modules: learned inverses made from forward modules.

The feedback ``G`` of a block ``F`` maps the space of the block's outputs to that of its inputs. It is made from the
block's own modules, the last one first (:func:`make_feedback`)::

    Linear, Conv         a linear map of the transposed shape, with weights of its own
    activation           the same activation once more (not its inverse function)
    MaxPool              unpooling to the places of the maxima
    AvgPool              adaptive average pooling up to the input's size
    Flatten, Unflatten   a reshape to the input's shape
    BatchNorm            a batch normalisation of its own, by the statistics of the batch
    Dropout              multiplication by the same mask
    Sequential           the inverses of its modules in reversed order

What the feedback has to know of a forward pass (sizes, places of maxima, masks) is that pass's *code*, a value that
:meth:`Feedback.encode` returns beside the output and :meth:`Feedback.forward` takes. No module keeps it, so it is never
that of another pass. A module of your own joins by :func:`register_feedback`.

Source: Ernoult et al., "Towards Scaling Difference Target Propagation by Learning Backprop Targets", ICML 2022.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tpext._warnings import warn_user
from tpext.ops._library import cast

Indices = Literal["noisy", "clean"]
"""Which places of maxima feedback of a noisy pass uses: those of that pass or of the clean one."""

Source = Literal["block", "network"]
"""Whose output feedback maps from."""

Code: TypeAlias = Any
"""What a feedback module has to know of a forward pass of its block: tensors and sizes, in nested tuples."""


class Window(NamedTuple):
    """The windows of a max-pooling: their size, step and padding, the same in height and width."""

    size: int
    stride: int
    padding: int


class Step(NamedTuple):
    """A module of a block, with its feedback and the code of one pass."""

    module: nn.Module
    feedback: Feedback
    code: Code


class Feedback(nn.Module, ABC):
    """The feedback of a block: ``r = G(y; code)``.

    Subclasses give :meth:`forward`, and :meth:`encode` if the feedback has to know more than the block's output.

    Attributes:
        elementwise: whether each element of ``G(F(x))`` depends on one element of ``x`` only, at a fixed code, and each
            element of ``G(y)`` on one of ``y``. It opens the expected and the closed forms of feedback training.
        is_linear: whether ``G`` is linear in ``y`` up to a constant at a fixed code. Then :meth:`difference` does not
            look at ``y``.
        is_view: whether block and feedback only change the shape.
        source: whose output it maps to the block's input: the "block"'s or the whole "network"'s.
        kernel: name and ``alpha`` of an activation that :func:`tpext.ops.code_difference` knows, if it is one.
        window: of a max-pooling that it knows, if it is one.
    """

    elementwise: bool = False
    is_linear: bool = False
    is_view: ClassVar[bool] = False
    source: ClassVar[Source] = "block"
    kernel: tuple[str, float] | None = None
    window: Window | None = None

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, Code]:
        """Run the block, and return its output and the code of this pass.

        Args:
            block: the module that this feedback was made from.
            input: ``[B, ...]``.
            clean: the code of the pass without noise when this is a noisy one. What is random in the block is taken
                from it, and no running statistics are updated. So the code of a block that draws random numbers must
                be what it drew; a code of None does not tell the passes apart.
        """
        return block(input), None

    @abstractmethod
    def forward(self, output: Tensor, code: Code) -> Tensor:
        """Return ``G(y; code)`` in the shape of the block's input."""

    def difference(self, output: Tensor, displacement: Tensor, code: Code) -> Tensor:
        """Return ``G(y + d; code) - G(y; code)``."""
        still: Tensor = self(output, code)
        moved: Tensor = self(output + displacement, code)
        return moved - still

    def steps(self, block: nn.Module, code: Code | None = None) -> list[Step]:
        """Return the chain of modules that the block is, the first one first: itself, unless it is a sequence."""
        return [Step(block, self, code)]

    def copy_weights(self, block: nn.Module) -> None:
        """Take over the block's weights, transposed (weight transport); biases become zero.

        Raises:
            ValueError: feedback with parameters that does not say how.
        """
        if any(True for _ in self.parameters()):
            raise ValueError(
                f"{type(self).__name__}: its weights cannot be those of {type(block).__name__}, transposed"
            )

    def tie(self, block: nn.Module) -> None:
        """Use the block's own weights, transposed, from now on instead of parameters of its own.

        Raises:
            ValueError: feedback with parameters that does not say how.
        """
        Feedback.copy_weights(self, block)


_Builder: TypeAlias = Callable[[Any], Feedback]
_BuilderT = TypeVar("_BuilderT", bound=_Builder)
_BUILDERS: dict[type[nn.Module], _Builder] = {}


def register_feedback(*kinds: type[nn.Module]) -> Callable[[_BuilderT], _BuilderT]:
    """Say how the feedback of modules of these classes is made, by a function of the module; a decorator.

    Subclasses that keep the ``forward`` of a registered class are served too.

    Raises:
        TypeError: something that is no class of modules, or a class of feedback.

    >>> import torch, tpext
    >>> class Double(torch.nn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> class Half(tpext.feedback.Feedback):
    ...     def forward(self, output, code):
    ...         return output / 2
    >>> @tpext.feedback.register_feedback(Double)
    ... def half(module):
    ...     return Half()
    >>> tpext.feedback.make_feedback(Double())
    Half()
    """
    if not kinds:
        raise TypeError("register_feedback: kinds must be one or more classes of modules, got none")
    for kind in kinds:
        if not isinstance(kind, type) or not issubclass(kind, nn.Module) or issubclass(kind, Feedback):
            raise TypeError(f"register_feedback: kinds must be classes of modules that are blocks, got {kind!r}")

    def register(builder: _BuilderT) -> _BuilderT:
        for kind in kinds:
            _BUILDERS[kind] = builder
        return builder

    return register


def make_feedback(block: nn.Module) -> Feedback:
    """Return the feedback module of a block, initialised as torch initialises such layers.

    Raises:
        TypeError: a module of a class that no feedback is registered for, or something else than feedback; names it.
        ValueError: a module with an option that its feedback does not know, or a lazy one before its first pass.
    """
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in block.parameters()):
        raise ValueError(f"make_feedback: {type(block).__name__} must know its sizes; call a lazy module once before")
    builder = find_builder(block)
    if builder is None:
        raise TypeError(
            f"make_feedback: no feedback is known for {type(block).__name__}; give one to the block with "
            "tpext.feedback.register_feedback"
        )
    made = builder(block)
    if not isinstance(made, Feedback):
        raise TypeError(
            f"make_feedback: what is registered for {type(block).__name__} must return a tpext.feedback.Feedback, got "
            f"{type(made).__name__}"
        )
    return made


def find_builder(block: nn.Module) -> _Builder | None:
    """Return what makes the feedback of such a module, None if nothing is registered."""
    for kind in type(block).__mro__:
        if kind in _BUILDERS and type(block).forward is kind.forward:
            return _BUILDERS[kind]
    return None


@contextlib.contextmanager
def still_statistics(blocks: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch normalisations alone; in training they go on by the batch's."""
    kept = [m for m in blocks.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for module in kept:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in kept:
            module.track_running_stats = True


def warn_of_relu(where: str, feedback: nn.Module) -> None:
    """Warn where feedback with the blocks' own weights has a ReLU."""
    if any(isinstance(module, nn.ReLU) for module in feedback.modules()):
        warn_user(
            f"{where}: with ReLU even tied feedback stays some 40 degrees from back-propagation, as units at zero let "
            "targets through; ELU is within a few"
        )


class BlockCall(NamedTuple):
    """One block in one forward pass of a network.

    Attributes:
        block: the module ``F_i``.
        feedback: what gives the displacement of the block's input, or None.
        input: ``s_{i-1}``, detached.
        output: ``s_i``, detached.
        code: of this pass, see :class:`Feedback`.
        name: of the block in the network.
    """

    block: nn.Module
    feedback: Feedback | None
    input: Tensor
    output: Tensor
    code: Code
    name: str


def detach_tensors(
    calls: Sequence[BlockCall],
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], tuple[BlockCall, ...]]]:
    """Return the tensors of calls, and what puts calls together again from such tensors."""
    leaves, form = tree_flatten([(call.input, call.output, call.code) for call in calls], is_leaf=_is_size)
    owners = [(call.block, call.feedback, call.name) for call in calls]
    others = [(True, None) if isinstance(leaf, Tensor) else (False, leaf) for leaf in leaves]

    def rebuilt(tensors: Sequence[Tensor]) -> tuple[BlockCall, ...]:
        given = iter(tensors)
        known = [next(given) if is_tensor else leaf for is_tensor, leaf in others]
        parts = tree_unflatten(known, form)
        return tuple(
            BlockCall(block, feedback, input, output, code, name)
            for (block, feedback, name), (input, output, code) in zip(owners, parts, strict=True)
        )

    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], rebuilt


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size)


def in_full_precision(calls: Sequence[BlockCall]) -> tuple[BlockCall, ...]:
    """Return calls with what autocast made float16 or bfloat16 in float32, as differences of outputs need it."""

    def raised(value: Any) -> Any:
        return cast(value, torch.float32)

    return tuple(
        call._replace(
            input=raised(call.input), output=raised(call.output), code=tree_map(raised, call.code, is_leaf=_is_size)
        )
        for call in calls
    )


class Trace(NamedTuple):
    """What a forward pass of a network leaves: its output, whose backward pass is the rule's, and its blocks' calls."""

    output: Tensor
    calls: tuple[BlockCall, ...]


def require_fit(rule: object, call: BlockCall, move: object) -> None:
    """Raise ValueError unless a displacement that a rule returned fits the output of a block."""
    want = call.output
    if isinstance(move, Tensor) and (move.shape, move.dtype, move.device) == (want.shape, want.dtype, want.device):
        return
    got = f"{list(move.shape)} {move.dtype} on {move.device}" if isinstance(move, Tensor) else type(move).__name__
    raise ValueError(
        f"{type(rule).__name__}: the displacement of block {call.name}'s output must be {list(want.shape)} "
        f"{want.dtype} on {want.device}, got {got}"
    )
