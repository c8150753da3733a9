"""What target propagation asks of optimizers and ``torch.optim`` lacks.

:class:`TensorFlowRMSprop` and :class:`CentredRMSprop` are the optimizers of published codes; :func:`keep_orthogonal`
keeps weights orthogonal under any optimizer.
"""

from tpext.optim.orthogonal import keep_orthogonal, orthogonalize_
from tpext.optim.rmsprop import CentredRMSprop, TensorFlowRMSprop

__all__ = ["CentredRMSprop", "TensorFlowRMSprop", "keep_orthogonal", "orthogonalize_"]
