"""The ops ``torch.ops.tpext.*``: importing this package registers them.

One module an op family. Each op has a schema, a CPU implementation, a fake one (for ``torch.compile`` and meta
tensors), an autocast rule and an autograd formula, or an error that says why it has none.
"""

from tpext.ops import gated_layer as _gated_layer  # noqa: F401 - registers its ops
from tpext.ops import rnn_layer as _rnn_layer  # noqa: F401 - registers its ops
from tpext.ops._rnn_products import input_projection
from tpext.ops.act_inverse import act_displacement, act_inverse
from tpext.ops.activation import Activation
from tpext.ops.counter_normal import counter_normal
from tpext.ops.kaczmarz import KaczmarzStep, kaczmarz_step
from tpext.ops.kaczmarz_train import kaczmarz_train, running_accuracy
from tpext.ops.layer_inverse import bias_inverse, layer_displacement, layer_inverse, linear_inverse
from tpext.ops.pooled_difference import code_difference, max_unpool, probe_difference
from tpext.ops.regularized_inverse import SingularError, regularized_inverse, regularized_solve
from tpext.ops.units import Units, hot_target, n_hot

__all__ = [
    "Activation",
    "KaczmarzStep",
    "SingularError",
    "Units",
    "act_displacement",
    "act_inverse",
    "bias_inverse",
    "code_difference",
    "counter_normal",
    "hot_target",
    "input_projection",
    "kaczmarz_step",
    "kaczmarz_train",
    "layer_displacement",
    "layer_inverse",
    "linear_inverse",
    "max_unpool",
    "n_hot",
    "probe_difference",
    "regularized_inverse",
    "regularized_solve",
    "running_accuracy",
]
