"""Conversion of models made with ``torch.nn.RNN``, ``torch.nn.GRU`` and ``torch.nn.LSTM``."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from tpext._warnings import warn_user
from tpext.nn.gru import GRU
from tpext.nn.lstm import LSTM
from tpext.nn.recurrent import RecurrentLayers
from tpext.nn.recurrent_parameters import check_replaceable, sharing_parameters
from tpext.nn.rnn import RNN
from tpext.rules import Backprop, RecurrentRule, RegularizedInverse
from tpext.rules.base import require_rule

_Module = TypeVar("_Module", bound=nn.Module)

_OURS: dict[type[nn.RNNBase], type[RecurrentLayers]] = {nn.RNN: RNN, nn.GRU: GRU, nn.LSTM: LSTM}


def convert(model: _Module, rule: RecurrentRule | None = None) -> _Module | RecurrentLayers:
    """Make every recurrent network inside ``model`` train by ``rule``, in place, sharing its parameters.

    Each ``torch.nn.RNN``, ``GRU`` and ``LSTM`` (these types themselves, not their subclasses) among the registered
    submodules is replaced by the module of ``tpext.nn`` of its name, which holds the same ``Parameter`` objects, so
    optimizers stay valid and checkpoints keep their keys. A module registered in several places stays shared, the
    training flag is kept, parameters may be on the meta device. Each module of ``tpext.nn`` found keeps its place and
    takes the new rule. Going to a rule with parameters of its own (``LearnedInverse``) adds them, freshly initialised,
    going away from it removes them: make the optimizer afterwards. Convert before wrapping or compiling. Plain
    attributes set on one of torch's modules from outside are not carried over. A model without any of these modules is
    left as it is, with a warning.

    Args:
        model: any module; a recurrent network itself also serves.
        rule: for all of them; None means ``tpext.RegularizedInverse()``.

    Returns:
        ``model``, or the new module where ``model`` itself is one of torch's.

    Raises:
        ValueError: one of torch's modules carries hooks, parametrized or pruned weights or members of its own, which a
            replacement would lose; reverse parameters cannot be removed, being parametrized or pruned; the rule does
            not fit a cell or its nonlinearity. The model is then unchanged.
        TypeError: ``rule`` is none of recurrent layers.

    >>> import torch, tpext
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.RNN(3, 4), "head": torch.nn.Linear(4, 2)})
    >>> tpext.nn.convert(model, tpext.Backprop())["rnn"]
    RNN(3, 4, rule=Backprop())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    rule = RegularizedInverse() if rule is None else rule
    require_rule("convert", rule, "recurrent")
    replacements: dict[nn.Module, RecurrentLayers] = {}
    kept: dict[RecurrentLayers, dict[str, nn.Parameter] | None] = {}
    # everything that can fail comes before the first change
    for name, module in model.named_modules():
        if isinstance(module, RecurrentLayers):
            module._check_replace_rule(rule)
            kept[module] = module._new_parameters(rule)
        elif isinstance(module, nn.RNNBase) and (ours := _replacement(module)) is not None:
            check_replaceable(module, f"convert: module {name!r}" if name else "convert: the module")
            replacements[module] = _from_torch(module, ours, rule)
    if not kept and not replacements:
        warn_user("convert: the model has no torch.nn.RNN, GRU or LSTM (subclasses do not count), nothing was changed")
    for module, parameters in kept.items():
        module._replace_rule(rule, parameters)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


def _replacement(module: nn.Module) -> type[RecurrentLayers] | None:
    """The class of the module that takes the place of one of torch's; None for any other module."""
    for theirs, ours in _OURS.items():
        # a parametrized module has a class of its own and would otherwise pass for a subclass, to be left alone
        if type(module) is theirs or (isinstance(module, theirs) and parametrize.is_parametrized(module)):
            return ours
    return None


def _from_torch(module: nn.RNNBase, ours: type[RecurrentLayers], rule: RecurrentRule) -> RecurrentLayers:
    # a rule that serves every layer, and owns nothing
    layers = sharing_parameters(module, ours, ours._made_with, rule=Backprop())
    layers._check_replace_rule(rule)
    layers._replace_rule(rule, layers._new_parameters(rule))
    return layers
