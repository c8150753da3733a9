"""The cells that the recurrent layers of runs are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tpext.nn import GRU, LSTM, RNN
from tpext.rules import RecurrentRule


class Cell(NamedTuple):
    """A kind of recurrent layer.

    Attributes:
        layer: its class, with the signature of torch's and ``rule=``.
        nonlinearities: what its ``nonlinearity=`` may be; of a layer that has no such argument, the one that it is.
        both_biases: whether its two biases do not only ever act as their sum, so that both are trained.
        gated: whether it has gates, whose slopes are options of their own, so that a rule's ``slope`` does nothing.
        forget_gate: which of its gates, in the order of its parameters' rows, keeps the cell's own state; None: none.
    """

    layer: Callable[..., Any]
    nonlinearities: tuple[str, ...]
    both_biases: bool = False
    gated: bool = False
    forget_gate: int | None = None

    def make(
        self,
        input_size: int,
        hidden_size: int,
        layers: int,
        *,
        nonlinearity: str,
        rule: RecurrentRule,
        device: torch.device | str | None = None,
    ) -> Any:
        """Return a layer.

        Raises:
            ValueError: the rule cannot serve it.
        """
        options = {"nonlinearity": nonlinearity} if len(self.nonlinearities) > 1 else {}
        return self.layer(input_size, hidden_size, layers, rule=rule, device=device, **options)


CELLS = {
    "rnn": Cell(RNN, ("tanh", "relu", "identity")),
    "gru": Cell(GRU, ("tanh",), both_biases=True, gated=True),
    "lstm": Cell(LSTM, ("tanh",), gated=True, forget_gate=1),
}
"""By the names of ``--cell``; a new one is one line."""
