"""Drop-in modules that train by target propagation, and conversion to and from ``torch.nn``."""

from typing import TYPE_CHECKING

from torch import nn as _torch_nn

from tpext.nn import networks
from tpext.nn.convert import convert
from tpext.nn.ensemble import Ensemble
from tpext.nn.gru import GRU
from tpext.nn.kaczmarz import HotTargetLoss, StreamResult
from tpext.nn.linear import TargetLinear
from tpext.nn.lstm import LSTM
from tpext.nn.mlp import MLP
from tpext.nn.rnn import RNN
from tpext.nn.sequential import TargetSequential, blocks_of

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "RNN",
    "Ensemble",
    "HotTargetLoss",
    "StreamResult",
    "TargetLinear",
    "TargetSequential",
    "blocks_of",
    "convert",
    "networks",
]

_INSTEAD = {
    "Linear": "TargetLinear is a linear layer with its activation, which trains by a rule",
    "Sequential": "TargetSequential trains a sequence of modules by targets, block by block (blocks_of)",
    "RNNCell": "RNN takes a whole sequence, of one step too",
    "GRUCell": "GRU takes a whole sequence, of one step too",
    "LSTMCell": "LSTM takes a whole sequence, of one step too",
}

if not TYPE_CHECKING:  # which would take every name for one that is here

    def __getattr__(name: str) -> None:
        """Say of names of ``torch.nn`` what to take in their place."""
        missing = f"module {__name__!r} has no attribute {name!r}"
        if name.startswith("_") or not hasattr(_torch_nn, name):
            raise AttributeError(missing)
        raise AttributeError(f"{missing}: {_INSTEAD.get(name, f'take torch.nn.{name} beside its layers')}")
