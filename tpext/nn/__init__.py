"""Drop-in modules that train by target propagation, and conversion to and from ``torch.nn``."""

from tpext.nn import networks
from tpext.nn.convert import convert
from tpext.nn.ensemble import Ensemble
from tpext.nn.gru import GRU
from tpext.nn.kaczmarz import HotTargetLoss, StreamResult
from tpext.nn.linear import TargetLinear
from tpext.nn.lstm import LSTM
from tpext.nn.mlp import MLP
from tpext.nn.rnn import RNN
from tpext.nn.sequential import TargetSequential

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
    "convert",
    "networks",
]
