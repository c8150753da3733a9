"""Learned feedback of whole networks: feedback modules, the losses that train them, and the trainers that do.

A network of blocks (:class:`tpext.nn.TargetSequential`) takes its targets down through feedback modules, one a block.
Two things are chosen apart: the rule, how targets come down (:mod:`tpext.rules.network`), and the trainer, how the
feedback comes to be what it is:

=============================  ========================================================================================
:class:`LDRL`                  gradient steps on the local difference reconstruction loss (Ernoult et al.)
:class:`RunningLDRL`           the same fixed point, tracked from noise without learning rate or iterations
:class:`ClosedForm`            the same fixed point from the blocks' own weights (weight transport)
:class:`Reconstruction`        gradient steps on the reconstruction loss (Lee et al.)
:class:`DifferenceReconstruction`  gradient steps on the loss through all blocks above (Meulemans et al.)
:class:`Tied`                  the blocks' own weights
:class:`Fixed`                 random weights for good (Shibuya et al.)
=============================  ========================================================================================

Behind a ReLU that fixed point is the expected second term's; the drawn one has another (:class:`LDRL`).

A trainer of your own subclasses :class:`FeedbackTrainer`, or :class:`GradientTrainer` for a loss of your own.
"""

from tpext.feedback.base import (
    BlockCall,
    Code,
    Feedback,
    Indices,
    Step,
    Trace,
    Window,
    make_feedback,
    register_feedback,
)
from tpext.feedback.direct import DirectFeedback
from tpext.feedback.gradient import LDRL, DifferenceReconstruction, GradientTrainer, Reconstruction
from tpext.feedback.linear_block import Pixels
from tpext.feedback.linear_map import ConvFeedback, LinearCode, LinearFeedback, LinearMap
from tpext.feedback.losses import difference_reconstruction_loss, ldrl_loss, reconstruction_loss
from tpext.feedback.modules import (
    ActivationFeedback,
    BatchNormFeedback,
    DropoutFeedback,
    IdentityFeedback,
    LayeredFeedback,
    PoolCode,
    ReshapeFeedback,
    SequentialFeedback,
    UnpoolFeedback,
    UpsampleFeedback,
    layered_feedback,
)
from tpext.feedback.solvers import ClosedForm, Fixed, RunningLDRL, Tied
from tpext.feedback.trainer import (
    CounterNoise,
    Draw,
    FeedbackTrainer,
    NoiseSource,
    Record,
    average_over_processes,
    weight_alignment,
)

__all__ = [
    "LDRL",
    "ActivationFeedback",
    "BatchNormFeedback",
    "BlockCall",
    "ClosedForm",
    "Code",
    "ConvFeedback",
    "CounterNoise",
    "DifferenceReconstruction",
    "DirectFeedback",
    "Draw",
    "DropoutFeedback",
    "Feedback",
    "FeedbackTrainer",
    "Fixed",
    "GradientTrainer",
    "IdentityFeedback",
    "Indices",
    "LayeredFeedback",
    "LinearCode",
    "LinearFeedback",
    "LinearMap",
    "NoiseSource",
    "Pixels",
    "PoolCode",
    "Reconstruction",
    "Record",
    "ReshapeFeedback",
    "RunningLDRL",
    "SequentialFeedback",
    "Step",
    "Tied",
    "Trace",
    "UnpoolFeedback",
    "UpsampleFeedback",
    "Window",
    "average_over_processes",
    "difference_reconstruction_loss",
    "layered_feedback",
    "ldrl_loss",
    "make_feedback",
    "reconstruction_loss",
    "register_feedback",
    "weight_alignment",
]
