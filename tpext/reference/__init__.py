"""NumPy oracles of the ops: one function an op, written from its equations, without regard to speed.

Each function takes the arguments of the op of the same name, in the same order, and returns what the op returns, with
None where the op returns an empty tensor because an output was not asked for. The arithmetic is float64, or
`numpy.longdouble` when an input is. The functions trust their inputs: checking them is the ops' business.
Nothing in here imports the rest of the package, and only tests and documentation import it.
"""

from tpext.reference.counter_normal import counter_normal, philox4x32
from tpext.reference.gated_learned_target_pass import gru_learned_gradients
from tpext.reference.gated_scan import GatedStates, gated_scan
from tpext.reference.gated_target_pass import GatedPass, gated_feedback, gated_target_pass
from tpext.reference.layer_inverse import (
    act_displacement,
    act_inverse,
    activation_cost,
    bias_inverse,
    layer_inverse,
    linear_inverse,
)
from tpext.reference.pooled_difference import (
    code_difference,
    max_pool,
    max_unpool,
    probe_difference,
)
from tpext.reference.regularized_inverse import regularized_inverse, regularized_solve
from tpext.reference.rnn_scan import (
    RNNGradients,
    rnn_gradients,
    rnn_layer,
    rnn_scan,
    rnn_scan_backward,
    rnn_weight_gradients,
)
from tpext.reference.rnn_target_scan import (
    learned_target_rnn_gradients,
    rnn_layer_backward,
    rnn_learned_target_scan,
    rnn_target_scan,
    target_rnn_gradients,
)

__all__ = [
    "GatedPass",
    "GatedStates",
    "RNNGradients",
    "act_displacement",
    "act_inverse",
    "activation_cost",
    "bias_inverse",
    "code_difference",
    "counter_normal",
    "gated_feedback",
    "gated_scan",
    "gated_target_pass",
    "gru_learned_gradients",
    "layer_inverse",
    "learned_target_rnn_gradients",
    "linear_inverse",
    "max_pool",
    "max_unpool",
    "philox4x32",
    "probe_difference",
    "regularized_inverse",
    "regularized_solve",
    "rnn_gradients",
    "rnn_layer",
    "rnn_layer_backward",
    "rnn_learned_target_scan",
    "rnn_scan",
    "rnn_scan_backward",
    "rnn_target_scan",
    "rnn_weight_gradients",
    "target_rnn_gradients",
]
