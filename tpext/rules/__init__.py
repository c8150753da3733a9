"""The rules: which quantity a layer sends backwards in place of the chain rule.

Recurrent layers (:class:`tpext.nn.RNN`, :class:`tpext.nn.GRU`, :class:`tpext.nn.LSTM`) take ``Backprop``,
``RegularizedInverse`` and, but for the LSTM, ``LearnedInverse``. The simple one computes ``h_t = a(x_t U^T + b +
h_{t-1} W^T)`` and receives the gradients ``g_t = dL/dh_t``; what is said of it here holds for cells with gates, whose
equations :mod:`tpext.ops.gated_layer` has. Every rule below is a small immutable value; the layer that holds it turns
``loss.backward()`` into that rule's backward pass. Row vectors throughout: ``h_t`` is ``[B, H]``, ``W = weight_hh`` is
``[H, H]``, ``U = weight_ih`` is ``[H, I]``.

Their target rules share one scheme. A displacement ``d_t`` says by how much ``h_t`` should move::

    d_t = -target_step * g_t + inverse(d_{t+1})            (g_t: the loss's own gradient at step t)

and the parameters receive the gradient of the local losses ``1/2 sum_t ||h_t - v_t||^2`` with the targets
``v_t = h_t + d_t`` held constant. What ``inverse`` is distinguishes the rules; what "gradient of the local losses"
means is the rule's ``credit``:

``"local"``
    each step alone, ``e_t = -d_t * a'(h_t)``: the published equation.
``"through_time"``
    the sum of the local losses, back-propagated through the whole unrolled layer,
    ``e_t = (-d_t + e_{t+1} W) * a'(h_t)``: what the published code computes. It stays inside one layer and one
    direction, and inside one call: of a sequence that is fed in parts, ``h_n`` handed from call to call with its graph,
    the earlier parts get another gradient than in one call (the layer warns). ``checkpoint_every`` bounds the memory of
    one call; under ``"local"`` and back-propagation the parts add up to the whole.

They differ a lot. On temporal order (T=60, 100 units, published settings), ``through_time`` reached 100 % within 1,200
iterations on each of five seeds; ``local`` stood at 43 to 78 % after 40,000 on three. Plain back-propagation through
time at the same effective learning rate solves that task as fast, so such a run alone is no evidence for the targets.

The size of the gradient. ``RegularizedInverse(correction="linearized")`` and ``Backprop`` are linear in ``g``: scaling
the loss (a gradient scaler), accumulating micro-batches and averaging over processes (``DistributedDataParallel``) do
what they do with back-propagation. The corrections "difference" and "none" and the learned inverse are not linear, so
with them the size of ``g`` matters: with a loss averaged over the batch, each sample's displacement is
``target_step / B`` times its own gradient, and float16 training with ``GradScaler`` is not supported.

Feed-forward layers (:class:`tpext.nn.TargetLinear`, :class:`tpext.nn.MLP`) take ``Backprop``,
``ConstrainedLeastSquares``, ``RegularizedLeastSquares`` and ``DifferenceTargetPropagation``. Such a layer computes
``h = a(x W^T + b)`` with ``x [B, N]``, ``W [M, N]``, receives ``g = dL/dh [B, M]`` and takes the displacement
``d = -target_step * g``. Its inverse turns that into a displacement ``d_x`` of its input, and it hands ``-d_x /
target_step`` down, which the layer below takes for its own ``g``; so equal target steps make one chain of targets ``h +
d``. Its parameters receive the gradient of its local loss, summed over the batch, by ``local_loss``::

    "pre"     1/2 ||x W^T + b - t||^2,   t = x W^T + b + z,  z by how much the inverse moves the pre-activation
    "post"    1/2 ||a(x W^T + b) - (h + d)||^2               so its gradient is g * a' times target_step

Where an activation is flat, "pre" asks for large moves and "post" for small ones: with "pre" and a small regularisation
a few saturated units can dominate, so "post" is the default. Published codes average local losses: over the batch and
the units of the layer (Seely: divide by ``B M``), or over the batch without the half (Lee et al.: multiply by ``2 /
B``). None of the target rules is linear in ``g`` (the identity activation apart), so what is said above of "difference"
and "none" holds for them, and accumulating micro-batches gives the whole batch's gradient only if each loss is scaled
as its part of the whole: a sum over the batch, or a mean times the part's share. ``RegularizedLeastSquares(form=
"proximal")`` keeps the digits of the smallest displacement. ``ConstrainedLeastSquares``, ``form="ridge"`` and ``reg =
0`` take differences of outputs, so that a displacement below the rounding of the output is lost; with a mean over a
large batch and float32, a ``target_step`` of some ``B`` keeps it well above.

Feed-forward layers also take ``Kaczmarz``, which knows neither a step nor a learning rate: ``g`` is taken for ``h``
minus its target, and the parameters receive minus the change that gives the layer's moved input that target. So the
loss must be a sum over the batch whose gradient is such a difference (:class:`tpext.nn.HotTargetLoss`), the optimizer
``torch.optim.SGD(lr=1)``, and the gradients of ``k`` micro-batches add up to ``k`` times the averaged update.

A rule of your own subclasses :class:`RecurrentRule`, :class:`LayerRule` or :class:`NetworkRule`; docs/own-rules.md goes
from an equation to a trained network, and :func:`tpext.testing.check_rule` checks it.
"""

from __future__ import annotations

from tpext.ops.activation import Form
from tpext.rules.backprop import Backprop
from tpext.rules.base import PerMember, Rule, number
from tpext.rules.difference import DifferenceTargetPropagation, ReverseCorrection
from tpext.rules.gated_call import GatedCall, GatedHowBack, GatedWeights, run_gated_backward
from tpext.rules.kaczmarz import First, Kaczmarz, Move, Update
from tpext.rules.layer import LayerCall, LayerRule
from tpext.rules.learned_inverse import LearnedInverse
from tpext.rules.least_squares import ConstrainedLeastSquares, LocalLoss, RegularizedLeastSquares
from tpext.rules.network import DifferenceTargets, DirectTargets, GaussNewtonTargets, NetworkRule, Reduction, Targets
from tpext.rules.recurrent import Correction, Credit, InputRule, RecurrentRule, Slope
from tpext.rules.recurrent_call import HowBack, LayerWeights, RecurrentCall, run_backward
from tpext.rules.recurrent_pass import Piece, Sweep
from tpext.rules.regularized_inverse import RegularizedInverse

__all__ = [
    "Backprop",
    "ConstrainedLeastSquares",
    "Correction",
    "Credit",
    "DifferenceTargetPropagation",
    "DifferenceTargets",
    "DirectTargets",
    "First",
    "Form",
    "GatedCall",
    "GatedHowBack",
    "GatedWeights",
    "GaussNewtonTargets",
    "HowBack",
    "InputRule",
    "Kaczmarz",
    "LayerCall",
    "LayerRule",
    "LayerWeights",
    "LearnedInverse",
    "LocalLoss",
    "Move",
    "NetworkRule",
    "PerMember",
    "Piece",
    "RecurrentCall",
    "RecurrentRule",
    "Reduction",
    "RegularizedInverse",
    "RegularizedLeastSquares",
    "ReverseCorrection",
    "Rule",
    "Slope",
    "Sweep",
    "Targets",
    "Update",
    "number",
    "run_backward",
    "run_gated_backward",
]
