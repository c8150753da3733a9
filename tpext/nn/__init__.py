"""Drop-in modules that train by target propagation, and conversion to and from ``torch.nn``."""

from tpext.nn.convert import convert
from tpext.nn.rnn import RNN

__all__ = ["RNN", "convert"]
