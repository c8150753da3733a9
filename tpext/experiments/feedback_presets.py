"""The methods of ``tpext train images``, one entry each.

A method is a rule, a trainer of the feedback, the options that these two have, and where its settings start
(:mod:`tpext.experiments.feedback_settings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tpext._names import did_you_mean
from tpext.experiments.feedback_settings import (
    MEULEMANS_NETWORKS,
    Case,
    Values,
    backprop,
    changed,
    dtp,
    fixed,
    ldrl,
    nearest_meulemans,
    p_ddtp,
    parallel,
    published_backprop,
    published_dtp,
    published_ldrl,
    published_meulemans,
    published_s_ddtp,
    running,
    s_ddtp,
    unpublished,
    untrained,
    vanilla,
    vanilla_default,
)
from tpext.experiments.own import is_path
from tpext.experiments.rule_names import find_own_rule, make_rule
from tpext.experiments.settings import ConfigError
from tpext.feedback import (
    LDRL,
    ClosedForm,
    DifferenceReconstruction,
    FeedbackTrainer,
    Fixed,
    Reconstruction,
    RunningLDRL,
    Tied,
)
from tpext.nn import TargetLinear, TargetSequential
from tpext.nn.networks import Blocks
from tpext.rules import (
    Backprop,
    DifferenceTargets,
    DirectTargets,
    GaussNewtonTargets,
    LayerRule,
    NetworkRule,
    Rule,
    Targets,
)

if TYPE_CHECKING:
    from tpext.experiments.images import ImageConfig


@dataclass(frozen=True)
class Method:
    """A method: what ``--rule`` names.

    Attributes:
        summary: of the method, for the help.
        rule: makes the rule.
        trainer: makes the trainer of the feedback; None if there is nothing to train.
        options: the fields of a configuration that the method has besides those that all have.
        values: the fields that the default preset sets.
        published: those that the published one sets besides; None where none were published.
        linear: makes the rule of the linear layers, by which all else learns by back-propagation.
        layered: whether the networks of Meulemans et al. take feedback with its activation last
            (:func:`tpext.feedback.layered_feedback`).
        last_hidden_bias: whether the last hidden layer of Meulemans' network of linear layers has a bias.
    """

    summary: str
    rule: Callable[[ImageConfig], NetworkRule | Backprop]
    trainer: Callable[[TargetSequential, ImageConfig], FeedbackTrainer | None] | None
    options: tuple[str, ...]
    values: Callable[[Case], Values]
    published: Callable[[Case], Values | None]
    linear: Callable[[ImageConfig], LayerRule] | None = None
    layered: bool = False
    last_hidden_bias: bool = True


def _step(config: ImageConfig) -> Values:
    return {"target_step": config.target_step, "normalize": config.normalize, "reduction": config.reduction}


def _difference(config: ImageConfig) -> NetworkRule:
    return DifferenceTargets(**_step(config))


def _direct(config: ImageConfig) -> NetworkRule:
    return DirectTargets(**_step(config))


def one_or_all(values: Sequence[Any]) -> Any:
    """Return a trainer's argument: one number for all layers, or a list of one a layer."""
    return values[0] if len(values) == 1 else list(values)


def _gradient(config: ImageConfig) -> Values:
    """What all trainers that take gradient steps have."""
    assert config.noise is not None
    assert config.feedback_lr is not None
    options: Values = {
        "noise": one_or_all(config.noise),
        "iterations": one_or_all(config.counts),
        "samples": config.samples,
        "seed": config.seed,
    }
    if config.feedback_optimizer == "sgd":
        return {
            **options,
            "lr": one_or_all(config.feedback_lr),
            "momentum": config.feedback_momentum,
            "weight_decay": config.feedback_weight_decay,
        }
    adam: Values = {"lr": config.feedback_lr[0], "betas": config.feedback_betas, "eps": config.feedback_eps}
    adam["weight_decay"] = config.feedback_weight_decay
    return {**options, "optimizer": lambda parameters: torch.optim.Adam(parameters, **adam, fused=True)}


def _ldrl_trainer(net: TargetSequential, config: ImageConfig) -> FeedbackTrainer:
    options: Any = {name: getattr(config, name) for name in ("second_term", "indices", "pixels")}
    return LDRL(net, **options, **_gradient(config))


def _reconstruction(net: TargetSequential, config: ImageConfig) -> FeedbackTrainer:
    reduction: Any = "element" if config.network in MEULEMANS_NETWORKS else "sample"
    return Reconstruction(net, indices=config.indices, reduction=reduction, **_gradient(config))  # type: ignore[arg-type]


def _running_trainer(net: TargetSequential, config: ImageConfig) -> FeedbackTrainer:
    noise, draws = one_or_all(config.noise or ()), one_or_all(config.counts)
    options: Any = {name: getattr(config, name) for name in ("decay", "indices", "pixels", "seed")}
    return RunningLDRL(net, noise=noise, draws=draws, **options)


def _difference_reconstruction(net: TargetSequential, config: ImageConfig) -> FeedbackTrainer:
    return DifferenceReconstruction(net, **_gradient(config))


def _plain_reconstruction(net: TargetSequential, config: ImageConfig) -> FeedbackTrainer:
    return DifferenceReconstruction(net, difference=False, **_gradient(config))


TARGET = ("target_step", "normalize", "reduction")
PHASES = ("feedback_first", "feedback_start", "feedback_epochs", "extra_feedback_epochs")
DRAWS = (*TARGET, *PHASES, "iterations", "feedback_scale", "noise")
GRADIENT = (
    *DRAWS,
    "feedback_lr",
    "samples",
    "feedback_optimizer",
    "feedback_momentum",
    "feedback_weight_decay",
    "feedback_betas",
    "feedback_eps",
)

METHODS: dict[str, Method] = {
    "ldrl": Method(
        "difference targets; feedback by the local difference reconstruction loss (Ernoult 2022)",
        _difference, _ldrl_trainer, (*GRADIENT, "second_term", "indices", "pixels"), ldrl, published_ldrl,
    ),
    "parallel-ldrl": Method(
        "the same with one step of Adam a batch, on several draws of noise",
        _difference, _ldrl_trainer, (*GRADIENT, "second_term", "indices", "pixels"),
        lambda case: parallel(ldrl(case)), changed(parallel, published_ldrl),
    ),
    "running-ldrl": Method(
        "difference targets; that loss's minimum tracked from noise, without a feedback rate (ours)",
        _difference, _running_trainer, (*DRAWS, "decay", "indices", "pixels"), running, unpublished,
    ),
    "closed-form": Method(
        "difference targets; that loss's minimum from the blocks' own weights (weight transport)",
        _difference, lambda net, config: ClosedForm(net), TARGET, untrained, unpublished,
    ),
    "tied": Method(
        "difference targets; the blocks' own weights as feedback (weight transport)",
        _difference, lambda net, config: Tied(net), TARGET, untrained, unpublished,
    ),
    "dtp": Method(
        "difference targets; feedback by the reconstruction loss (Lee 2015; Ernoult 2022; Meulemans 2020)",
        _difference, _reconstruction, (*GRADIENT, "indices"), dtp, published_dtp, layered=True,
    ),
    "dtp-pretrained": Method(
        "dtp whose feedback is trained alone first, and after each epoch (Meulemans 2020)",
        _difference, _reconstruction, (*GRADIENT, "indices"),
        nearest_meulemans("dtp-pretrained"), published_meulemans("dtp-pretrained"), layered=True,
    ),
    "tp": Method(
        "plain targets; feedback by the reconstruction loss (Bengio 2014)",
        lambda config: Targets(**_step(config)), _reconstruction, (*GRADIENT, "indices"),
        vanilla_default, changed(vanilla, published_ldrl), layered=True,
    ),
    "drl": Method(
        "difference targets; feedback by the difference reconstruction loss through all blocks above (Meulemans 2020)",
        _difference, _difference_reconstruction, GRADIENT,
        nearest_meulemans("drl"), published_meulemans("drl"), layered=True,
    ),
    "ddtp-linear": Method(
        "direct linear feedback from the output, by that loss (Meulemans 2020)",
        _direct, _difference_reconstruction, GRADIENT,
        nearest_meulemans("ddtp-linear"), published_meulemans("ddtp-linear"), last_hidden_bias=False,
    ),
    "s-ddtp": Method(
        "ddtp-linear on meulemans-convnet, its feedback trained alone first, then a step a batch (in Ernoult 2022)",
        _direct, _difference_reconstruction, GRADIENT,
        s_ddtp, published_s_ddtp, last_hidden_bias=False,
    ),
    "p-ddtp": Method(
        "the same with many steps of the feedback a batch, and none alone",
        _direct, _difference_reconstruction, GRADIENT,
        p_ddtp, unpublished, last_hidden_bias=False,
    ),
    "ddtp-rhl": Method(
        "direct feedback through a fixed random hidden layer, by that loss (Meulemans 2020)",
        lambda config: DirectTargets(hidden=config.feedback_units, activation="tanh", **_step(config)),
        _difference_reconstruction, (*GRADIENT, "feedback_units"),
        nearest_meulemans("ddtp-rhl"), published_meulemans("ddtp-rhl"),
    ),
    "ddtp-control": Method(
        "direct linear feedback, trained to reconstruct, without difference (Meulemans 2020)",
        _direct, _plain_reconstruction, GRADIENT,
        nearest_meulemans("ddtp-control"), published_meulemans("ddtp-control"),
    ),
    "gnt": Method(
        "Gauss-Newton targets, computed (Meulemans 2020)",
        lambda config: GaussNewtonTargets(damping=config.damping or 0.0, **_step(config)), None,
        (*TARGET, "damping"), nearest_meulemans("gnt"), unpublished,
    ),
    "dfa": Method(
        "direct feedback alignment: direct linear feedback that stays as it is",
        _direct, lambda net, config: Fixed(net), TARGET, nearest_meulemans("dfa"), published_meulemans("dfa"),
    ),
    "fw-dtp": Method(
        "difference targets; random feedback that stays as it is, with batch normalisation (after Shibuya 2023)",
        _difference, lambda net, config: Fixed(net), TARGET, fixed, unpublished,
    ),
    "backprop": Method(
        "back-propagation", lambda config: Backprop(), None, (), backprop, published_backprop,
    ),
}  # fmt: skip
"""By the names of ``--rule``; a new method is one more entry."""


def find_network_rule(name: str, folder: str | None = None) -> type[Rule]:
    """Return the class of a user's rule for networks on images; see :func:`find_method`."""
    return find_own_rule(name, {"network": "NetworkRule", "layer": "LayerRule"}, folder)


def find_method(name: str, folder: str | None = None) -> Method:
    """Return a method, or what trains with a rule of a user's own.

    Args:
        name: one of :data:`METHODS`, or where the rule stands: ``module:Class`` or ``file.py:Class``.
        folder: where that was typed; None is the working directory.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    if not is_path(name):
        raise ConfigError(
            f"rule must be one of {', '.join(METHODS)}, or module:Class or file.py:Class for one of your own, "
            f"got {name!r}{did_you_mean(name, METHODS)}"
        )
    kind = find_network_rule(name, folder)

    def make(config: ImageConfig) -> Any:
        return make_rule(kind, config.rule_options or {})

    if "network" in kind.kinds:
        options = tuple(option for option in GRADIENT if option not in TARGET)
        return Method(
            "a rule of a user's own; its feedback, where it makes any, by the loss of ldrl",
            make, lambda net, config: _ldrl_trainer(net, config) if len(net.feedback) else None,
            (*options, "second_term", "indices", "pixels"), backprop, unpublished,
        )  # fmt: skip
    if kind.learns or kind.solves_weights:
        raise ConfigError(f"rule {name}: layer rules that learn or solve for weights are for tpext train TASK")
    return Method(
        "a layer rule of a user's own in the linear layers; convolutions learn by back-propagation",
        lambda config: Backprop(), None, (), backprop, unpublished, linear=make,
    )  # fmt: skip


def set_layer_rule(blocks: Blocks, rule: LayerRule) -> None:
    """Replace the linear layers of a network by layers of a rule, with the same weights, in place.

    A tanh or relu behind one becomes its activation, through which the rule's inverse goes too. The last layer stays an
    ordinary one where the rule asks for that.
    """
    below: Any = "identity"
    *_, last = blocks.values()
    for block in blocks.values():
        children = list(block.named_children())
        for (name, linear), (after, behind) in zip(children, [*children[1:], ("", None)], strict=True):
            if not isinstance(linear, nn.Linear) or (block is last and rule.ordinary_head):
                continue
            activation: Any = {nn.Tanh: "tanh", nn.ReLU: "relu"}.get(type(behind), "identity")
            layer = TargetLinear(
                linear.in_features, linear.out_features, linear.bias is not None, activation=activation, rule=rule,
                reverse_activation=below, device=linear.weight.device, dtype=linear.weight.dtype,
            )  # fmt: skip
            layer.weight, layer.bias = linear.weight, linear.bias
            setattr(block, name, layer)
            if activation != "identity":
                setattr(block, after, nn.Identity())
            below = activation
