"""Conversion of models made with ``torch.nn.RNN``."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from tpext.nn.rnn import RNN, check_replaceable
from tpext.rules import RecurrentRule, RegularizedInverse
from tpext.rules.base import require_rule

_Module = TypeVar("_Module", bound=nn.Module)


def convert(model: _Module, rule: RecurrentRule | None = None) -> _Module | RNN:
    """Make every recurrent network inside ``model`` train by ``rule``, in place, sharing its parameters.

    Each ``torch.nn.RNN`` (that type itself, not its subclasses) among the registered submodules is replaced by a
    :class:`tpext.nn.RNN` that holds the same ``Parameter`` objects, so optimizers stay valid and checkpoints keep their
    keys. A module registered in several places stays shared, the training flag is kept, parameters may be on the meta
    device. Each ``tpext.nn.RNN`` found keeps its place and takes the new rule. Going to a rule with parameters of
    its own (``LearnedInverse``) adds them, freshly initialised, going away from it removes them: make the optimizer
    afterwards. Convert before
    wrapping or compiling. Plain attributes set on a ``torch.nn.RNN`` from outside are not carried over.

    Args:
        model: any module; a recurrent network itself also serves.
        rule: for all of them; None means ``tpext.RegularizedInverse()``.

    Returns:
        ``model``, or the new module where ``model`` itself is a ``torch.nn.RNN``.

    Raises:
        ValueError: a ``torch.nn.RNN`` carries hooks, parametrized or pruned weights or members of its own, which a
            replacement would lose; the reverse parameters of a ``tpext.nn.RNN`` cannot be removed, being parametrized
            or pruned; the rule does not fit a nonlinearity. The model is then unchanged.
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
    replacements: dict[nn.Module, RNN] = {}
    kept: dict[RNN, dict[str, nn.Parameter] | None] = {}
    # everything that can fail comes before the first change
    for name, module in model.named_modules():
        if isinstance(module, RNN):
            module._check_replace_rule(rule)
            kept[module] = module._new_parameters(rule)
        # a parametrized module has a class of its own and would otherwise pass for a subclass, to be left alone
        elif type(module) is nn.RNN or (isinstance(module, nn.RNN) and parametrize.is_parametrized(module)):
            check_replaceable(module, f"convert: module {name!r}" if name else "convert: the module")
            replacements[module] = _from_torch(module, rule)
    for module, parameters in kept.items():
        module._replace_rule(rule, parameters)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


def _from_torch(module: nn.RNN, rule: RecurrentRule) -> RNN:
    # on the meta device there are no random draws and no memory for parameters about to be replaced
    rnn = RNN(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.nonlinearity,
        module.bias,
        module.batch_first,
        bidirectional=module.bidirectional,
        device="meta",
        dtype=module.all_weights[0][0].dtype,
    )
    # set afterwards: the constructor would repeat torch's warning about a dropout without effect
    rnn.dropout = module.dropout
    for names in module._all_weights:
        for name in names:
            setattr(rnn, name, getattr(module, name))
    rnn._check_replace_rule(rule)
    rnn._replace_rule(rule, rnn._new_parameters(rule))
    return rnn.train(module.training)
