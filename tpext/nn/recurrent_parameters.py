"""What recurrent layers are made with and hold: options, parameters by torch's names, the rule and those it owns."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tpext._warnings import warn_user
from tpext.nn.owned import OwnedParameters, register_owned, reset_owned
from tpext.rules import RecurrentRule, RegularizedInverse
from tpext.rules.base import check_members, require_rule

_Layers = TypeVar("_Layers", bound="nn.RNNBase | RecurrentParameters")

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class RecurrentParameters(OwnedParameters):
    """Options, parameters and rule of recurrent layers; names, initialisation and errors are torch's.

    Of each layer and direction there are ``weight_ih [G*H, I or D*H]``, ``weight_hh [G*H, H]`` and, with ``bias``,
    ``bias_ih`` and ``bias_hh [G*H]``, where G is the number of gates of the cell and D that of directions. The
    arguments are those of :class:`tpext.nn.RNN`, after torch's name for what the layers compute (``mode``).
    """

    _kind: ClassVar[str]
    """What errors call the module: the name of torch's."""
    gates: ClassVar[int] = 1
    """G: how many rows of the weights a unit has."""
    _kinds_of_state: ClassVar[int] = 1
    """2 for a cell that has ``c`` beside ``h``."""
    _made_with: ClassVar[tuple[str, ...]] = (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "bidirectional",
    )
    """The arguments that this module and torch's share, ``dropout`` apart."""
    weight_ih_l0: Tensor

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        rule: RecurrentRule | None,
        return_sequence: bool,
        checkpoint_every: int | None,
        proj_size: int = 0,
    ) -> None:
        rule = RegularizedInverse() if rule is None else rule
        require_rule(self._kind, rule, "recurrent")
        super().__init__()
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.return_sequence = return_sequence
        self.checkpoint_every = checkpoint_every
        self._check_sizes(dropout)
        self._check_checkpointing()
        self._check_rule(rule)
        self._rule: RecurrentRule = rule
        self._reverse = [False, True] if bidirectional else [False]
        self._all_weights: list[list[str]] = []

        directions, rows = len(self._reverse), self.gates * hidden_size
        for layer in range(num_layers):
            layer_input = input_size if layer == 0 else directions * self.output_size
            shapes: list[tuple[int, ...]] = [(rows, layer_input), (rows, self.output_size)]
            shapes += [(rows,), (rows,)] if bias else []
            for reverse in self._reverse:
                suffix = f"_l{layer}{'_reverse' if reverse else ''}"
                stems = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: len(shapes)]
                of_member = {stem + suffix: shape for stem, shape in zip(stems, shapes, strict=True)}
                if proj_size > 0:
                    of_member["weight_hr" + suffix] = (proj_size, hidden_size)
                for name, shape in of_member.items():
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._all_weights.append(list(of_member))
        self._register_owned_parameters()
        self.reset_parameters()

    @classmethod
    def _refuse(cls, unsupported: Mapping[str, object]) -> None:
        """Raise for keyword arguments that the constructor has no use for."""
        if "proj_size" in unsupported:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if unsupported:
            raise TypeError(f"{cls._kind}.__init__() got an unexpected keyword argument {next(iter(unsupported))!r}")

    def _check_sizes(self, dropout: object) -> None:
        if not isinstance(dropout, numbers.Number) or isinstance(dropout, bool) or not 0 <= self.dropout <= 1:
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
            )
        if self.dropout > 0 and self.num_layers == 1:
            warn_user(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers={self.num_layers}"
            )
        for name in ("bias", "batch_first"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        for name in ("input_size", "hidden_size", "num_layers"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
            if value <= 0:
                raise ValueError(f"{name} must be greater than zero")

    def _check_checkpointing(self) -> None:
        if not isinstance(self.return_sequence, bool):
            raise TypeError(f"return_sequence should be of type bool, got: {type(self.return_sequence).__name__}")
        every = self.checkpoint_every
        if every is None:
            return
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"checkpoint_every should be of type int or None, got: {type(every).__name__}")
        if every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {every}")

    @property
    def output_size(self) -> int:
        """The size of ``h``: H, or that of an LSTM's projection."""
        return self.proj_size or self.hidden_size

    # Parameters

    def _owned_shapes(self, rule: RecurrentRule) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes of the parameters that a rule owns, of each layer and direction."""
        shapes = []
        for names in self._all_weights:
            suffix, input_size = names[0].removeprefix("weight_ih"), getattr(self, names[0]).shape[1]
            owned = rule.parameter_shapes(input_size, self.hidden_size, self.gates)
            shapes.append({name + suffix: shape for name, shape in owned.items()})
        return shapes

    def _register_owned_parameters(self) -> None:
        shapes = self._owned_shapes(self._rule)
        self._owned_names = [list(of_member) for of_member in shapes]
        for names, of_member in zip(self._all_weights, shapes, strict=True):
            register_owned(self, self._rule, of_member, getattr(self, names[1]))

    def _reset_owned_parameters(self) -> None:
        for name in self.owned_names:
            reset_owned(self._rule, name.rsplit("_l", 1)[0], getattr(self, name))

    def reset_parameters(self) -> None:
        """Draw all parameters anew: uniform in ``+-1/sqrt(H)``; those that the rule owns as the rule does."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for names in self._all_weights:
            for name in names:
                nn.init.uniform_(getattr(self, name), -bound, bound)
        self._reset_owned_parameters()

    @property
    def owned_names(self) -> list[str]:
        return list(itertools.chain(*self._owned_names))

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of torch's module, one list a layer and direction (none of the rule's own)."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def flatten_parameters(self) -> None:
        """Do nothing: there is no layout to restore. Kept for code written for torch's modules."""

    # The rule

    @property
    def rule(self) -> RecurrentRule:
        """The rule of the backward pass; assignable, unless that changes the set of parameters (see ``convert``)."""
        return self._rule

    @rule.setter
    def rule(self, rule: RecurrentRule) -> None:
        require_rule(self._kind, rule, "recurrent")
        self._check_rule(rule)
        if self._owned_shapes(rule) != self._owned_shapes(self._rule):
            raise ValueError(
                f"{self._kind}: changing rule from {self._rule} to {rule} changes which parameters the rule owns; "
                "use tpext.nn.convert(module, rule), then make the optimizer anew"
            )
        self._rule = rule

    def _check_rule(self, rule: RecurrentRule) -> None:
        """Raise ValueError if a rule of recurrent layers cannot serve this module."""
        check_members(rule, 2 if self.bidirectional else 1)
        rule.check(self)

    def _check_replace_rule(self, rule: RecurrentRule) -> None:
        """Raise if ``_replace_rule`` would fail half-way."""
        require_rule(self._kind, rule, "recurrent")
        self._check_rule(rule)
        shapes = self._owned_shapes(rule)
        if shapes == self._owned_shapes(self._rule):
            return
        had = self.owned_names
        changed = [name for name in had if name not in self._parameters]
        if changed:
            raise ValueError(
                f"{self._kind}: {', '.join(changed)} cannot be removed, being no plain parameters (parametrized or "
                f"pruned); undo that before changing rule from {self._rule} to {rule}"
            )
        taken = [name for name in itertools.chain(*shapes) if name not in had and hasattr(self, name)]
        if taken:
            raise ValueError(
                f"{self._kind}: {', '.join(taken)} cannot be added, the module has other attributes of these names; "
                f"delete them before changing rule from {self._rule} to {rule}"
            )

    def _new_parameters(self, rule: RecurrentRule) -> dict[str, nn.Parameter] | None:
        """Those that a rule owns, initialised; None if they are the ones that the module has."""
        shapes = self._owned_shapes(rule)
        if shapes == self._owned_shapes(self._rule):
            return None
        made = {}
        for names, of_member in zip(self._all_weights, shapes, strict=True):
            for name, shape in of_member.items():
                made[name] = nn.Parameter(getattr(self, names[1]).new_empty(shape))
                reset_owned(rule, name.rsplit("_l", 1)[0], made[name])
        return made

    def _replace_rule(self, rule: RecurrentRule, parameters: dict[str, nn.Parameter] | None) -> None:
        """Change the rule, and the parameters that it owns to those of ``_new_parameters``.

        An optimizer made before does not know of added parameters.
        """
        self._rule = rule
        if parameters is None:
            return
        for name in self.owned_names:
            delattr(self, name)
        self._owned_names = [list(of_member) for of_member in self._owned_shapes(rule)]
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


# Between torch's modules and these


def check_replaceable(module: nn.RNNBase | RecurrentParameters, where: str) -> None:
    """Raise if a replacement, which takes over the parameters alone, would silently lose a part of ``module``."""
    own = {name for row in module._all_weights for name in row}
    if isinstance(module, RecurrentParameters):
        own.update(module.owned_names)
    members = {*module._parameters, *module._buffers, *module._modules}
    # parametrizing or pruning a weight puts other members in its place
    lost = [hook for hook in _HOOKS if getattr(module, hook)]
    lost += [f"no parameter {name}" for name in sorted(own - members)]
    lost += [f"a member {name}" for name in sorted(members - own)]
    if lost:
        raise ValueError(
            f"{where} has {', '.join(lost)}, which a replacement would lose; remove hooks, parametrizations, pruning "
            "and members of your own before and apply them to the replacement"
        )


def sharing_parameters(
    module: nn.RNNBase | RecurrentParameters, made: type[_Layers], names: tuple[str, ...], **options: object
) -> _Layers:
    """A module of the class ``made``, with the arguments called ``names``, parameters and mode of another."""
    arguments: dict[str, Any] = {name: getattr(module, name) for name in names} | options
    # on the meta device there are no random draws and no memory for parameters about to be replaced
    new = made(**arguments, device="meta", dtype=module.all_weights[0][0].dtype)
    # set afterwards: the constructor would repeat the warning about a dropout without effect
    new.dropout = module.dropout
    for name in itertools.chain(*module._all_weights):
        setattr(new, name, getattr(module, name))
    new.train(module.training)
    return new
