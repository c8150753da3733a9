"""The rules of feed-forward layers. :mod:`tpext.rules` has the scheme that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from tpext.ops._library import check_choice
from tpext.rules.base import Backprop, check_flag, set_number

LocalLoss = Literal["pre", "post"]
Form = Literal["proximal", "ridge"]
ReverseCorrection = Literal["difference", "none"]
Move = Literal["mean", "wnorm", "regularized"]
Update = Literal["average", "exact"]
First = Literal["input", "weights"]


@dataclass(frozen=True)
class ConstrainedLeastSquares:
    """Target propagation through the exact inverses of a feed-forward layer's maps, the last one first.

    With ``t2(v) = a^-1(v)``, the constrained least squares inverse of the activation at the pre-activation
    (:meth:`tpext.ops.Activation.inverse`), and the pseudo-inverse ``W^+``::

        z = t2(h + d) - t2(h),    d_x = z (W^+)^T

    The published code has the pre-activation itself for ``t2(h)``. They differ for units of tanh and sigmoid within
    ``clip`` of the edges of their range, which there move without a displacement; here no displacement hands down
    exactly zero. ``Activation(name, reference_compat=True)`` gives the published numbers.

    Args:
        target_step: size of the displacement, ``d = -target_step * g``, > 0.
        clip: distance kept from the edges of the range of tanh and sigmoid before inverting them, 0 < clip < 0.5.
        normalize: True divides the parameter gradients by ``target_step``.
        local_loss: "post", or "pre" as published (see the module's head).

    Raises:
        ValueError: an argument out of its range, named.

    Weights must have full rank, or the backward pass raises ``tpext.SingularError`` (on CUDA: gives NaN).

    Source: J. Seely, "tensorflow-target-prop", ``tprop_train.py``, error algorithm 1.

    >>> ConstrainedLeastSquares(target_step=0.5)
    ConstrainedLeastSquares(target_step=0.5, clip=0.01, normalize=True, local_loss='post')
    """

    target_step: float = 1.0
    clip: float = 1e-2
    normalize: bool = True
    local_loss: LocalLoss = "post"

    def __post_init__(self) -> None:
        set_number(self, "target_step", low=0.0)
        set_number(self, "clip", low=0.0, high=0.5)
        check_flag(self, "normalize")
        check_choice(type(self).__name__, "local_loss", self.local_loss, get_args(LocalLoss))


@dataclass(frozen=True)
class RegularizedLeastSquares:
    """Target propagation through the regularised inverses of a feed-forward layer's maps, the last one first.

    With ``t2(v) = argmin_u ||a(u) - v||^2 + gamma ||u - c||^2`` at the pre-activation
    (:meth:`tpext.ops.Activation.regularized_inverse`)::

        z = t2(h + d) - t2(h),    d_x = z W (W^T W + gamma I)^-1 / (1 + gamma)       (without a bias not / (1 + gamma))

    ``c`` is the pre-activation ("proximal") or zero ("ridge"); the linear maps' inverses differ by that in an offset
    only, which the difference removes. For "proximal" ``t2(h)`` is ``c``, and ``z`` is solved for itself, not taken as
    a difference, so that its digits do not depend on its size. The published code has ``c`` for ``t2(h)`` too, but does
    not solve the problem for tanh, sigmoid and the identity (:mod:`tpext.ops.layer_inverse`); ``Activation(name,
    reference_compat=True)`` gives the published numbers.

    Args:
        gamma: weight of the second term, >= 0. As it grows ``d_x`` shrinks and turns into back-propagation's direction,
            to ``(d * a') W / (gamma^2 (1 + gamma))`` ("proximal"; without a bias ``/ gamma^2``); with
            ``local_loss="post"`` the layer's own gradients stay as they are. Published are 1e-2 (the operation) and
            1e-3 (the training), which do not settle at the published rates. 0 is
            ``ConstrainedLeastSquares(clip=clip)``, in form "ridge" about zero.
        form: "proximal" or "ridge".
        target_step: size of the displacement, ``d = -target_step * g``, > 0.
        clip: for ``gamma = 0`` alone: as in ``ConstrainedLeastSquares``.
        normalize: True divides the parameter gradients by ``target_step``.
        local_loss: "post", or "pre" as published (see the module's head).

    Raises:
        ValueError: an argument out of its range, named.

    Source: J. Seely, "tensorflow-target-prop", ``tprop_train.py``, error algorithm 2.

    >>> RegularizedLeastSquares(gamma=0.1).form
    'proximal'
    """

    gamma: float = 1.0
    form: Form = "proximal"
    target_step: float = 1.0
    clip: float = 1e-2
    normalize: bool = True
    local_loss: LocalLoss = "post"

    def __post_init__(self) -> None:
        set_number(self, "gamma", low=0.0, low_allowed=True)
        check_choice(type(self).__name__, "form", self.form, get_args(Form))
        set_number(self, "target_step", low=0.0)
        set_number(self, "clip", low=0.0, high=0.5)
        check_flag(self, "normalize")
        check_choice(type(self).__name__, "local_loss", self.local_loss, get_args(LocalLoss))


@dataclass(frozen=True)
class DifferenceTargetPropagation:
    """Target propagation through learned inverses of feed-forward layers.

    With the reverse layer ``G(v) = a_r(v V^T + c)`` of a layer::

        "difference"    d_x = G(h + d) - G(h)
        "none"          d_x = G(h + d) - x        plain target propagation

    The reverse weights ``V [N, M]`` and biases ``c [N]`` are parameters of the module, present only under this rule.
    The loss's backward pass leaves them without a gradient; they learn from ``reconstruction_loss``, so when to step
    them (every batch, or an epoch before) is the caller's choice.

    Under ``DistributedDataParallel`` compute the reconstruction loss in the wrapped module's ``forward``, by a flag,
    and pass ``find_unused_parameters=True``, with no other forward pass between a loss's forward and its backward: then
    both losses' gradients are averaged.

    Args:
        target_step: size of the displacement, ``d = -target_step * g``, > 0.
        noise: standard deviation, >= 0, of the noise that the reconstruction loss adds to the input by default.
        correction: "difference" or "none".
        normalize: True divides the parameter gradients by ``target_step``.
        local_loss: "post" (see the module's head), the only one that needs no inverse of the activation.

    Raises:
        ValueError: an argument out of its range, named.

    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation", 2015, and its code, ``conti_dtp.py``; J.
    Seely, "tensorflow-target-prop", error algorithm 3.

    >>> DifferenceTargetPropagation(noise=0.36).correction
    'difference'
    """

    target_step: float = 1.0
    noise: float = 0.0
    correction: ReverseCorrection = "difference"
    normalize: bool = True
    local_loss: Literal["post"] = "post"

    def __post_init__(self) -> None:
        set_number(self, "target_step", low=0.0)
        set_number(self, "noise", low=0.0, low_allowed=True)
        check_choice(type(self).__name__, "correction", self.correction, get_args(ReverseCorrection))
        check_flag(self, "normalize")
        check_choice(type(self).__name__, "local_loss", self.local_loss, ("post",))


@dataclass(frozen=True)
class Kaczmarz:
    """Direct weight solves: a feed-forward layer is set to its target by projections, averaged over the batch.

    The gradient that arrives is ``h - h'``, ``h'`` the target of the output, from which the activation gives ``d``, the
    displacement of the pre-activation (:class:`tpext.ops.Units`). The input is moved, then each sample takes the least
    change of the weights that gives the moved input ``x''`` the target::

        x'  = x + dx(d)        "mean"         dx = d W / M
                               "wnorm"        dx = (1/M) sum_k d_k w_k / ||w_k||^2, w_k the rows of W
                               "regularized"  dx = d (WW' + dx_reg I)^-1 W
        x'' = feasible(x')     what the layer below can put out that is like x'; x where the input needs no gradient
        r   = d - (x'' - x) W'
        dW  = relaxation (1/B) sum_i r_i' x''_i / (||x''_i||^2 + 1 + damping)           "average"
        [dW db] = relaxation R' (X X' + batch_reg I)^-1 X,   X = [x'' 1]                "exact"

    The parameters' gradients are ``-dW`` and ``-db``, and ``x - x''`` is handed down. Activations are those of
    :class:`tpext.ops.Units`: relu and the identity, and three that other rules do not have.

    Args:
        relaxation: factor of every update, > 0 and < 2, the range in which repeated projections converge; 1 projects.
        damping: added to the squared norms of "average", >= 0.
        dx: how the input moves: "mean" (published; diverges where the weights are large: beyond ``s_max(W)^2 > 2 M`` it
            moves the output away from the target; small weights hardly move it, so that with more than one hidden layer
            the lower ones learn late), "wnorm" or "regularized".
        dx_reg: regularisation of "regularized", >= 0.
        update: "average" or "exact".
        batch_reg: regularisation of "exact", >= 0; 0 needs linearly independent rows ``[x'' 1]``.
        first: "input"; or "weights", the published second version: first the weights by the input as it is, then the
            input is moved by the updated weights for what is left of ``d``.
        std: standard deviation, >= 0, of the weights and biases that a layer made with this rule draws, normal with
            mean 0.

    Raises:
        ValueError: an argument out of its range, named.

    Source: ASFaust, "SLMfun", ``experiments/targetprop`` and ``experiments/targetprop2``.

    >>> Kaczmarz(dx="regularized").dx_reg
    1.0
    """

    relaxation: float = 1.0
    damping: float = 0.0
    dx: Move = "mean"
    dx_reg: float = 1.0
    update: Update = "average"
    batch_reg: float = 0.0
    first: First = "input"
    std: float = 1e-3

    def __post_init__(self) -> None:
        set_number(self, "relaxation", low=0.0, high=2.0)
        check_choice(type(self).__name__, "dx", self.dx, get_args(Move))
        check_choice(type(self).__name__, "update", self.update, get_args(Update))
        check_choice(type(self).__name__, "first", self.first, get_args(First))
        for name in ("damping", "dx_reg", "batch_reg", "std"):
            set_number(self, name, low=0.0, low_allowed=True)


LayerRule: TypeAlias = (
    Backprop | ConstrainedLeastSquares | RegularizedLeastSquares | DifferenceTargetPropagation | Kaczmarz
)
