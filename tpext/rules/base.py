"""What all rules share: a small immutable object that a layer asks for its backward pass, and never for its name."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tpext._names import nearest
from tpext._warnings import warn_user
from tpext.ops._library import autocast_outputs, autocasts, cast, on_cuda
from tpext.ops._members import as_list

Kind = Literal["recurrent", "layer", "network"]
"""What a rule is for: recurrent layers, feed-forward layers, or a :class:`tpext.nn.TargetSequential`."""

PerMember: TypeAlias = float | tuple[float, ...]
"""A number of a rule of recurrent layers: one for all members of the layer's stack (the directions of a
:class:`tpext.nn.RNN`), or a tuple with one for each. A field is one where it is annotated so."""

_AnyRule = TypeVar("_AnyRule", bound="Rule")

_LAYERS: dict[Kind, str] = {
    "recurrent": "recurrent layers (tpext.rules.RecurrentRule), such as tpext.RegularizedInverse()",
    "layer": "feed-forward layers (tpext.rules.LayerRule), such as tpext.RegularizedLeastSquares()",
    "network": "networks of blocks (tpext.rules.NetworkRule), such as tpext.DifferenceTargets()",
}


def number(default: float, *, low: float = -math.inf, low_allowed: bool = False, high: float = math.inf) -> Any:
    """Declare a number of a rule with its range, to use as a dataclass field's default.

    Args:
        default: its value unless given.
        low: the value must be greater, or equal where ``low_allowed``.
        low_allowed: whether ``low`` itself is allowed.
        high: the value must be smaller.

    What else there is to check belongs into the rule's ``__post_init__``, which calls ``super().__post_init__()``.
    """
    return dataclasses.field(default=default, metadata={"low": low, "low_allowed": low_allowed, "high": high})


def of_each(number: PerMember, change: Callable[[float], float]) -> PerMember:
    """``change`` of the number of all members, or of each."""
    return tuple(map(change, number)) if isinstance(number, tuple) else change(number)


class _Number:
    """A number of a rule: checked when it is set, kept as text, read as a float or as a tuple of floats.

    The compiler may turn a float attribute into a symbol, which it then fails to hand to the second layer's
    ``autograd.Function``. A text attribute stays a constant, and a guarded one.
    """

    def __init__(self, field: dataclasses.Field[Any]) -> None:
        self.name, self.key, self.default = field.name, f"_{field.name}", field.default
        self.per_member = _is_per_member(field)
        self.low, self.high = field.metadata.get("low", -math.inf), field.metadata.get("high", math.inf)
        self.low_allowed = field.metadata.get("low_allowed", False)

    def __get__(self, rule: Rule | None, owner: type[Rule] | None = None) -> Any:
        if rule is not None:
            text = getattr(rule, self.key)
            # each number of a tuple has a comma behind it
            return float(text) if text[-1] != "," else tuple(map(float, text[:-1].split(",")))
        # the class's own attribute is the default, as dataclasses have it
        if self.default is dataclasses.MISSING:
            raise AttributeError(self.name)
        return self.default

    def __set__(self, rule: Rule, value: object) -> None:
        several = self.per_member and isinstance(value, (tuple, list)) and len(value) > 0
        given: Sequence[object] = value if several else (value,)  # type: ignore[assignment]
        if all(map(self._allows, given)):
            texts = [repr(float(one)) for one in given]  # type: ignore[arg-type]
            object.__setattr__(rule, self.key, "".join(f"{text}," for text in texts) if several else texts[0])
            if several:
                object.__setattr__(rule, "_tuples", (*rule._tuples, self.name))
            return
        above = f" {'>=' if self.low_allowed else '>'} {self.low:g}" if math.isfinite(self.low) else ""
        below = f"{' and' if above else ''} < {self.high:g}" if math.isfinite(self.high) else ""
        raise ValueError(f"{type(rule).__name__}: {self.name} must be a finite number{above}{below}, got {value!r}")

    def _allows(self, value: object) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        exact = float(value)
        return (self.low < exact < self.high or (self.low_allowed and exact == self.low)) and math.isfinite(exact)


@dataclass(frozen=True)
class Rule:
    """Which quantity a layer sends backwards in place of the chain rule: the base class of all rules.

    A rule of your own is a frozen dataclass that subclasses one of the three protocols, by what it is for:
    :class:`RecurrentRule`, :class:`LayerRule` or :class:`NetworkRule`. Its fields are its numbers and choices. Fields
    annotated ``float`` accept finite numbers, of the range that :func:`number` declares, and are constants to
    ``torch.compile``; those annotated :data:`PerMember` tuples of them too.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset()
    """What it is for: by default all that the classes above it are for."""
    kin: ClassVar[Mapping[Kind, str]] = {}
    """The rules of the same idea for other kinds of layers, for error texts."""
    sources: ClassVar[tuple[str, ...]] = ()
    """Its publications for :func:`tpext.citation`: keys of ``tpext/citations.py``, or whole BibTeX entries."""
    exact: ClassVar[bool] = False
    """Whether the backward pass is the chain rule."""
    learns: ClassVar[bool] = False
    """Whether the rule has a loss of its own, which trains parameters that it owns."""
    solves_weights: ClassVar[bool] = False
    """Whether its gradients are whole updates, for ``torch.optim.SGD(lr=1)``, made from a loss whose gradient is the
    output minus its target (:class:`tpext.nn.HotTargetLoss`)."""

    _tuples: ClassVar[tuple[str, ...]] = ()
    """The numbers of this rule that are tuples, with one for each member of a layer."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kinds" not in cls.__dict__:
            cls.kinds = frozenset().union(*(base.kinds for base in cls.__bases__ if issubclass(base, Rule)))

    def __post_init__(self) -> None:
        """Check what a field's own declaration cannot."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        """Prepare the class before its first instance, so that a rule's author needs no decorator but dataclass's."""
        if "_is_prepared" not in cls.__dict__:
            _prepare(cls)
            _warn_of_near_names(cls)
            cls._is_prepared = True
        return super().__new__(cls)

    def __repr__(self) -> str:
        """The class and the fields that differ from their defaults, as torch's modules show themselves."""
        shown = [(field.name, getattr(self, field.name), field) for field in dataclasses.fields(self) if field.repr]
        changed = (f"{name}={value!r}" for name, value, field in shown if value != _default(field))
        return f"{type(self).__name__}({', '.join(changed)})"

    def check(self, layer: nn.Module) -> None:
        """Raise ValueError if the rule cannot serve this layer of its kind, as it is."""


def _warn_of_near_names(kind: type[Rule]) -> None:
    """Warn of a name of a user's rule that looks like a slip of one that layers ask for."""
    own = vars(kind) if kind.__module__.partition(".")[0] != "tpext" else {}
    asked = {name for base in kind.__mro__[1:] for name in vars(base) if not name.startswith("_")}
    options = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for name in own:
        if name.startswith("_") or name in asked | options:
            continue
        if near := nearest(name, asked, cutoff=0.85):
            warn_user(f"{kind.__name__}.{name} is a name that no layer asks for; {near} is one")


def _prepare(cls: type[Rule]) -> None:
    """Check how a rule's class is written, and make its float fields constants to the compiler."""
    annotated = {name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)}
    if annotated and "__dataclass_fields__" not in cls.__dict__:
        raise TypeError(
            f"{cls.__name__}: a rule with fields must be decorated with @dataclasses.dataclass(frozen=True), got a "
            f"plain class with {', '.join(sorted(annotated))}"
        )
    if hasattr(cls.__dict__.get("__repr__"), "__wrapped__"):  # dataclass's, which shows every field; not an author's
        cls.__repr__ = Rule.__repr__  # type: ignore[method-assign]
    for field in dataclasses.fields(cls):
        own = cls.__dict__.get(field.name)
        if field.name not in annotated and field.name in cls.__dict__ and not isinstance(own, _Number):
            raise TypeError(
                f"{cls.__name__}: {field.name} is a field of the class above, so give its new default with a type, "
                f"{field.name}: {field.type} = {own!r}"
            )
        if _is_per_member(field) or field.type in (float, "float"):
            setattr(cls, field.name, _Number(field))
        elif field.metadata.get("low") is not None or "float" in str(field.type):
            raise TypeError(
                f"{cls.__name__}: {field.name} must be annotated float to be a number of a rule (or PerMember, to be "
                f"one for each member of a recurrent layer too), got {field.type}"
            )


def _default(field: dataclasses.Field[Any]) -> object:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _is_per_member(field: dataclasses.Field[Any]) -> bool:
    return field.type == PerMember or str(field.type).rsplit(".")[-1] == "PerMember"


def require_rule(where: str, rule: object, kind: Kind) -> None:
    """Raise TypeError unless ``rule`` is one for this kind of layer."""
    if isinstance(rule, Rule) and kind in rule.kinds:
        if kind != "recurrent":
            check_members(rule, None)
        return
    hint = not_an_instance(rule)
    if isinstance(rule, Rule) and kind in rule.kin:
        hint = f"; {type(rule).__name__} is for other layers, its kin here is tpext.{rule.kin[kind]}()"
    raise TypeError(f"{where}: rule must be for {_LAYERS[kind]}, or tpext.Backprop(), got {rule!r}{hint}")


def not_an_instance(rule: object) -> str:
    """Return what to add to an error where a rule's class was given in place of a rule."""
    return "; a rule is an instance, not a class" if isinstance(rule, type) and issubclass(rule, Rule) else ""


def check_members(rule: Rule, members: int | None) -> None:
    """Raise ValueError unless each number that is a tuple has one for each of so many members; None: there are none."""
    for name in rule._tuples:
        value = getattr(rule, name)
        if len(value) != members:
            each = " here" if members is None else f" or S={members}, one for each direction of the layer"
            raise ValueError(f"{type(rule).__name__}: {name} must be one number{each}, got {len(value)}: {value}")


def of_member(rule: _AnyRule, member: int) -> _AnyRule:
    """The rule of one member of a stack: as it is, with that member's number where there is one for each."""
    if not rule._tuples:
        return rule
    return dataclasses.replace(rule, **{name: getattr(rule, name)[member] for name in rule._tuples})


def joined(rules: Sequence[_AnyRule], directions: int) -> _AnyRule:
    """One rule for a stack of layers with so many directions each, which have a rule of their own each.

    Raises:
        ValueError: the rules differ in more than numbers that are one for each member of a layer.
    """
    first = rules[0]
    for other in rules[1:]:
        for own, theirs in zip(shared_part(first), shared_part(other), strict=False):
            if own != theirs:
                raise ValueError(
                    f"rules must differ in their numbers alone, got {own} and {theirs}; a field that each member may "
                    "have a number of its own for is annotated tpext.rules.PerMember"
                )
    changed: dict[str, tuple[float, ...]] = {}
    for field in filter(_is_per_member, dataclasses.fields(first)):
        values = [getattr(rule, field.name) for rule in rules]
        if isinstance(values[0], tuple) or any(value != values[0] for value in values):
            each = (value if isinstance(value, tuple) else (value,) * directions for value in values)
            changed[field.name] = tuple(itertools.chain.from_iterable(each))
    return dataclasses.replace(first, **changed) if changed else first


def shared_part(rule: Rule) -> tuple[object, ...]:
    """What rules have in common that :func:`joined` takes: the class, and all that is no number of each member."""
    names = [field.name for field in dataclasses.fields(rule) if not _is_per_member(field)]
    return type(rule), *((name, getattr(rule, name)) for name in names)


def check_flag(rule: object, name: str) -> None:
    value = getattr(rule, name)
    if not isinstance(value, bool):
        raise ValueError(f"{type(rule).__name__}: {name} must be True or False, got {value!r}")


def check_positive(rule: object, name: str, high: float = math.inf) -> None:
    """Check a number that a subclass may have as a constant or as a field without a range of its own."""
    value = getattr(rule, name)
    if not all(0 < one < high for one in as_list(value)):
        bound = "" if high == math.inf else f" and < {high:g}"
        raise ValueError(f"{type(rule).__name__}: {name} must be a finite number > 0{bound}, got {value!r}")


class ResultError(TypeError, ValueError):
    """What a method of a rule has returned is not what its layer needs."""


def require_result(rule: object, method: str, result: object, like: Tensor) -> None:
    """Raise ResultError unless what a rule's method returned is a tensor of the shape, dtype and device of ``like``."""
    where = f"{type(rule).__name__}.{method}"
    if not isinstance(result, Tensor):
        raise ResultError(f"{where} must return a tensor, got {type(result).__name__}")
    if result.shape != like.shape:
        raise ResultError(f"{where} must return {list(like.shape)}, got {list(result.shape)}")
    if result.dtype != like.dtype or result.device != like.device:
        raise ResultError(f"{where} must return {like.dtype} on {like.device}, got {result.dtype} on {result.device}")


def apply_node(
    node: type[torch.autograd.Function],
    settings: Sequence[object],
    tensors: Sequence[Tensor | None],
    low_precision: bool = False,
) -> Any:
    """Run a layer's autograd node; under autocast in float32, its outputs in the autocast dtype.

    Args:
        node: takes the settings, then the tensors.
        settings: what autocast does not concern.
        tensors: the layer's input and parameters.
        low_precision: whether on CUDA the node has kernels for the autocast dtype, and runs in it.
    """
    input = tensors[0]
    assert input is not None
    device = input.device.type
    if not autocasts(device):
        return node.apply(*settings, *tensors)  # type: ignore[no-untyped-call]
    dtype = torch.get_autocast_dtype(device) if low_precision and on_cuda(input) else torch.float32
    with torch.autocast(device, enabled=False):
        outputs = node.apply(*settings, *(cast(tensor, dtype) for tensor in tensors))  # type: ignore[no-untyped-call]
    return autocast_outputs(outputs, device)
