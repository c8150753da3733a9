"""The losses that train feedback, as plain differentiable functions of a block's call and of noise.

Each is differentiable for the feedback's parameters, once these require gradients; nothing reaches the blocks. The
trainers of :mod:`tpext.feedback` have faster ways to the same gradients where a block allows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, get_args

import torch
from torch import Tensor

from tpext.feedback.base import BlockCall, Code, Feedback, Indices, require_fit
from tpext.ops._library import check_choice, check_tensor, is_integer


class Recursion(Protocol):
    """What a loss through the blocks above needs of a rule."""

    def first_displacement(self, calls: Sequence[BlockCall], displacement: Tensor) -> Tensor:
        """See :class:`tpext.rules.NetworkRule`."""


def _feedback(op: str, call: BlockCall, name: str = "call") -> Feedback:
    if not isinstance(call, BlockCall):
        raise TypeError(f"{op}: {name} must be a BlockCall of TargetSequential.trace, got {type(call).__name__}")
    if call.feedback is None:
        raise ValueError(f"{op}: {name} must be one of a block with feedback, got one without")
    return call.feedback


def _check_noise(op: str, name: str, noise: Tensor, like: Tensor) -> None:
    check_tensor(op, name, noise)
    if noise.shape != like.shape:
        raise ValueError(f"{op}: {name} must be {list(like.shape)}, got {list(noise.shape)}")


@torch.no_grad()
def _noisy(op: str, call: BlockCall, input: Tensor, indices: Indices) -> tuple[Tensor, Code]:
    check_choice(op, "indices", indices, get_args(Indices))
    output, code = _feedback(op, call).encode(call.block, input, call.code)
    return output, code if indices == "noisy" else call.code


def ldrl_loss(call: BlockCall, input_noise: Tensor, output_noise: Tensor, indices: Indices = "noisy") -> Tensor:
    r"""Local difference reconstruction loss of a block.

    With ``x`` and ``y`` the input and output of the call, ``dx`` and ``dy`` the noise::

        (1/B) sum_b  -2 <dx, G(F(x + dx)) - G(y)> + ||G(y + dy) - G(y)||^2

    For linear blocks and noise of standard deviation ``sigma`` its mean is ``sigma^2 (||J_G - J_F^T||^2 - ||J_F||^2)``,
    least where the feedback is the transposed of the block: the Jacobian matching condition. It is usually negative. A
    bias at the end of ``G`` cancels and gets no gradient.

    Args:
        call: of a block with feedback, from :meth:`tpext.nn.TargetSequential.trace`.
        input_noise: ``dx``, of ``x``'s shape.
        output_noise: ``dy``, of ``y``'s shape.
        indices: which places of maxima ``G(F(x + dx))`` unpools to: those of the noisy pass, as published, or of the
            clean one. Where maxima switch places, the noisy ones leave a term of the loss's own order at every size of
            noise, so that its minimum is not the transposed block; the clean ones do not.

    Returns:
        The loss, a scalar, a sum over features and a mean over the batch.

    Source: Ernoult et al., "Towards Scaling Difference Target Propagation by Learning Backprop Targets", ICML 2022.
    """
    feedback = _feedback("ldrl_loss", call)
    _check_noise("ldrl_loss", "input_noise", input_noise, call.input)
    _check_noise("ldrl_loss", "output_noise", output_noise, call.output)
    noisy, code = _noisy("ldrl_loss", call, call.input + input_noise, indices)
    clean: Tensor = feedback(call.output, call.code)
    first = (input_noise * (feedback(noisy, code) - clean)).sum()
    second: Tensor = (feedback(call.output + output_noise, call.code) - clean).square().sum()
    loss: Tensor = (second - 2 * first) / len(call.input)
    return loss


def reconstruction_loss(call: BlockCall, input_noise: Tensor, indices: Indices = "noisy") -> Tensor:
    """Reconstruction loss of a noisy auto-encoder, ``(1/B) sum_b ||x + dx - G(F(x + dx))||^2``.

    Args, returns: as :func:`ldrl_loss`.

    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation", 2015.
    """
    feedback = _feedback("reconstruction_loss", call)
    _check_noise("reconstruction_loss", "input_noise", input_noise, call.input)
    noisy_input = call.input + input_noise
    output, code = _noisy("reconstruction_loss", call, noisy_input, indices)
    rebuilt: Tensor = feedback(output, code)
    return (noisy_input - rebuilt).square().sum() / len(call.input)


def difference_reconstruction_loss(
    calls: Sequence[BlockCall], index: int, rule: Recursion, input_noise: Tensor, difference: bool = True
) -> Tensor:
    """Difference reconstruction loss of a block's feedback through all blocks above.

    The input ``x`` of block ``index`` is moved by ``dx``, the network's output moves with it, and the rule's recursion
    takes the output's displacement back down to ``x``::

        (1 / BN) sum ||move(x) - dx||^2,                  N the number of features of x
        (1 / BN) sum ||G(output(x + dx)) - (x + dx)||^2,  difference=False, for direct feedback (DDTP-control)

    Meulemans et al. divide by the variance of ``dx`` besides; the trainer does. Differentiate it for the parameters of
    block ``index``'s feedback only.

    Args:
        calls: of the whole network.
        index: of the block, >= 1.
        rule: the network's rule.
        input_noise: ``dx``, of the shape of ``calls[index].input``.

    Source: Meulemans et al., "A Theoretical Framework for Target Propagation", NeurIPS 2020.
    """
    op = "difference_reconstruction_loss"
    if not is_integer(index) or not 1 <= index < len(calls):
        raise ValueError(f"{op}: index must be in 1 .. {len(calls) - 1}, got {index!r}")
    call = calls[index]
    feedback = _feedback(op, call, f"calls[{index}]")
    _check_noise(op, "input_noise", input_noise, call.input)
    noisy_input = state = call.input + input_noise
    with torch.no_grad():
        for above in calls[index:]:
            state, _ = _feedback(op, above, f"calls[{above.name}]").encode(above.block, state, above.code)
    if not difference:
        rebuilt: Tensor = feedback(state, call.code)
        return (rebuilt - noisy_input).square().mean()
    move = rule.first_displacement(calls[index - 1 :], state - calls[-1].output)
    require_fit(rule, calls[index - 1], move)
    return (move - input_noise).square().mean()
