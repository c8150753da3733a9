"""The models of the runs: recurrent layers or feed-forward ones, and a linear output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tpext.experiments.cells import CELLS
from tpext.experiments.config import Config
from tpext.nn import MLP, Ensemble, TargetLinear
from tpext.ops import Activation
from tpext.tasks import Task


class SequenceModel(nn.Module):
    """``output = h_T W_head^T + b_head``, with ``h_T`` the last state of a stack of recurrent layers.

    The target of ``h_T`` is made from the loss's gradient, through the head; the head itself learns by that gradient.
    A task that judges every step has such an output, and such a target, of each state.
    """

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__()
        rule: Any = config.rule  # for recurrent layers, as the configuration has checked
        assert config.hidden_size is not None
        assert config.layers is not None
        assert config.cell is not None
        self.every_step = task.every_step
        self.embedding = task.make_embedding()
        cell = CELLS[config.cell]
        self.rnn = cell.make(
            task.input_size, config.hidden_size, config.layers, nonlinearity=config.nonlinearity, rule=rule
        )
        # The layer has two biases that only ever act as their sum, the published model one. Training both would move
        # the sum at twice the rate, so one of them stays zero.
        for name, parameter in self.rnn.named_parameters():
            if name.startswith("bias_hh") and not cell.both_biases:
                nn.init.zeros_(parameter).requires_grad_(False)
        self.head = nn.Linear(config.hidden_size, task.output_size)
        initialize(self.rnn, config, rows=config.hidden_size)
        if config.forget_bias is not None and cell.forget_gate is not None:
            for name, parameter in self.rnn.named_parameters():
                if name.startswith("bias_"):
                    own = config.forget_bias if name.startswith("bias_ih") else 0.0
                    nn.init.constant_(parameter.split(config.hidden_size)[cell.forget_gate], own)
        initialize(self.head, config)

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs ``[B, output_size]``, or ``[T, B, output_size]``, of sequences ``[T, B, I]``."""
        states, last = self.rnn(self.embedding(input))
        return self.output_of(self.read(states, last))

    def read(self, states: Tensor, last: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Return what the head reads: all states of the last layer, or the last h of every layer."""
        if self.every_step:
            return states
        return last[0] if isinstance(last, tuple) else last

    def output_of(self, read: Tensor) -> Tensor:
        """Return the outputs of what the head reads, ``[T, B, H]`` or ``[layers, B, H]``."""
        output: Tensor = self.head(read if self.every_step else read[-1])
        return output

    def reconstruction_loss(self, input: Tensor) -> Tensor:
        """Return the loss of the reverse layers."""
        loss: Tensor = self.rnn.reconstruction_loss(self.embedding(input))
        return loss

    def outer(self) -> list[nn.Module]:
        """Return the modules around the hidden layers, which learn by plain gradients."""
        return [self.head, self.embedding]

    def local_layers(self) -> list[TargetLinear]:
        """Return no layer: no recurrent layer's gradients are averaged by ``reduction``."""
        return []


def ensemble_of(models: Sequence[SequenceModel]) -> Ensemble:
    """Return the recurrent layers of models in one."""
    return Ensemble(model.rnn for model in models)


def outputs_together(ensemble: Ensemble, models: Sequence[SequenceModel], embedded: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of models, each of its own embedded input of one shape, with their recurrent layers in one."""
    read = models[0].read(*ensemble(torch.stack([*embedded])))
    # in memory of its own, as alone: of rows that begin anywhere torch's products have other bits
    return [model.output_of(own.clone()) for model, own in zip(models, read.unbind(), strict=True)]


class FeedForwardModel(nn.Module):
    """``output = h_L W_head^T + b_head``, with ``h_L`` the output of the last hidden layer.

    Under difference target propagation the head is an ordinary layer that learns by the loss's own gradient, and
    ``h_L`` moves by that gradient too, as published; under the other rules the head is a layer of the rule. Tied, the
    last layer shares the first one's weights, and so on.
    """

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__()
        rule: Any = config.rule  # for feed-forward layers, as the configuration has checked
        assert config.sizes is not None
        compat = config.reference_compat
        activation = Activation(config.nonlinearity, reference_compat=compat)
        self.layers = MLP([task.input_size, *config.sizes], activation, output_activation=activation, rule=rule)
        width = config.sizes[-1]
        self.head: nn.Module
        if rule.ordinary_head:
            self.head = nn.Linear(width, task.output_size)
        else:
            identity = Activation("identity", reference_compat=compat)
            self.head = TargetLinear(
                width, task.output_size, activation=identity, rule=rule, reverse_activation=activation
            )
        if config.tied:
            layers = self.local_layers()
            half = len(layers) // 2
            for encoder, decoder in zip(layers[:half], reversed(layers[half:]), strict=True):
                decoder.tie(encoder)
        initialize(self, config)

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs ``[B, output_size]`` of vectors ``[B, I]``."""
        output: Tensor = self.head(self.layers(input))
        return output

    def reconstruction_loss(self, input: Tensor) -> Tensor:
        """Return the loss of the reverse layers."""
        return self.layers.reconstruction_loss(input)

    def outer(self) -> list[nn.Module]:
        """Return the modules around the hidden layers."""
        return [self.head]

    def local_layers(self) -> list[TargetLinear]:
        """Return the layers that have local losses."""
        return [module for module in self.modules() if isinstance(module, TargetLinear)]


Model: TypeAlias = SequenceModel | FeedForwardModel


def make_model(config: Config, task: Task) -> Model:
    """Return the model of a configuration, initialised from torch's random state."""
    return FeedForwardModel(config, task) if task.length is None else SequenceModel(config, task)


@torch.no_grad()
def initialize(model: nn.Module, config: Config, rows: int | None = None) -> None:
    """Draw all parameters anew, unless ``init`` is "torch" (what the layers draw themselves): matrices by ``init``,
    each ``rows`` rows (those of a gate) by themselves, biases 0.

    "orthogonal": singular values 1 (semi-orthogonal), reverse layers included. It matters: with torch's default
    initialisation, temporal order at T=60 stays at chance for 4,000 iterations under the published settings.
    "xavier": uniform in ``+-sqrt(6 / (M + N))``, reverse layers orthogonal times 0.95 (Seely).
    """
    if config.init == "torch":
        return
    own = {name for name in owned_names(model) if "reverse_" not in name}
    for name, parameter in model.named_parameters():
        if name in own:
            continue  # as the user's rule has initialised it
        if parameter.ndim != 2:
            nn.init.zeros_(parameter)
        elif config.init == "orthogonal":
            for gate in torch.split(parameter, rows or len(parameter)):
                nn.init.orthogonal_(gate)
        elif "reverse_" in name:
            nn.init.orthogonal_(parameter, gain=0.95)
        else:
            nn.init.xavier_uniform_(parameter)


def owned_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters in a model that belong to rules."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "owned_names", ())
    }


def split_parameters(model: Model) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained parameters of the hidden layers, of the modules around these (the head, and an embedding), and
    of the rule (those of reverse layers, say).

    Weights that the head shares with a hidden layer are the hidden layer's.
    """
    hidden = model.rnn if isinstance(model, SequenceModel) else model.layers
    named = [(name, parameter) for name, parameter in hidden.named_parameters() if parameter.requires_grad]
    owned = owned_names(hidden)
    reverse = [parameter for name, parameter in named if name in owned]
    forward = [parameter for name, parameter in named if name not in owned]
    shared = {id(parameter) for parameter in forward}
    outer = [parameter for module in model.outer() for parameter in module.parameters() if parameter.requires_grad]
    return forward, [parameter for parameter in outer if id(parameter) not in shared], reverse


def local_scales(model: Model, config: Config) -> list[tuple[nn.Parameter, float]]:
    """Return by what ``reduction`` multiplies the gradients that the rule gives, for each parameter that it does.

    ============  ==========================================  =======================  =======================
    reduction     a layer's local loss                        forward                  reverse
    ============  ==========================================  =======================  =======================
    ``sum``       1/2 sum over batch and units                1                        1
    ``batch``     mean over the batch of the sum over units   2 / B                    1
    ``element``   1/2 mean over batch and units               1 / (B M)                1 / (2 N)
    ============  ==========================================  =======================  =======================

    Tied layers have ``sum`` only: their gradients arrive already added up.
    """
    scales: list[tuple[nn.Parameter, float]] = []
    if config.reduction == "sum":
        return scales
    for layer in model.local_layers():
        for name, parameter in layer.named_parameters():
            if config.reduction == "batch":
                scale = 1.0 if name in layer.owned_names else 2 / config.batch_size
            elif name in layer.owned_names:
                scale = 1 / (2 * layer.in_features)
            else:
                scale = 1 / (config.batch_size * layer.out_features)
            scales.append((parameter, scale))
    return scales
