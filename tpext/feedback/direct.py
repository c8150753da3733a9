"""Direct feedback: from the network's output to each block's input, past the blocks between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tpext.feedback.base import Code, Feedback


class HiddenLayer(nn.Module):
    """A fixed random layer ``u = psi_h(y R^T + r)`` before direct feedback."""

    def __init__(self, in_features: int, units: int, activation: str, like: Tensor) -> None:
        super().__init__()
        made = nn.Linear(in_features, units, device=like.device, dtype=like.dtype)
        # buffers, which no trainer moves
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", made.weight.detach())
        self.register_buffer("bias", made.bias.detach())
        self.units = units
        self.activation = _activation(activation)

    def forward(self, output: Tensor) -> Tensor:
        """Return ``u`` for outputs ``y [B, ...]``."""
        hidden = nn.functional.linear(output.flatten(1), self.weight, self.bias)
        return self.activation(hidden)  # type: ignore[no-any-return]


class DirectFeedback(Feedback):
    """``Q(y) = psi([u s] Q^T + c)`` in the shape of the state ``s``, the code; ``u`` is ``y`` or a hidden layer of it.

    Args:
        out_features: size of the network's output.
        shape: of the state, without the batch.
        hidden: a hidden layer that others may share, or None.
        activation: ``psi``, "identity" or "tanh".
        recurrent_input: whether ``s`` is an input.
        like: gives dtype and device.
    """

    source = "network"

    def __init__(
        self,
        out_features: int,
        shape: torch.Size,
        hidden: HiddenLayer | None,
        activation: str,
        recurrent_input: bool,
        like: Tensor,
    ) -> None:
        super().__init__()
        # In a tuple: a layer that others share is registered once, by the first of them.
        self.hidden = (hidden,)
        self.recurrent_input = recurrent_input
        width = out_features if hidden is None else hidden.units
        width += shape.numel() if recurrent_input else 0
        self.linear = nn.Linear(width, shape.numel(), device=like.device, dtype=like.dtype)
        self.activation = _activation(activation)

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, Tensor]:
        return block(input), input.detach()

    def features(self, output: Tensor, state: Tensor) -> Tensor:
        """Return what the trained layer takes, ``[B, ...]``."""
        hidden = self.hidden[0]
        features = output.flatten(1) if hidden is None else hidden(output)
        return torch.cat([features, state.flatten(1)], 1) if self.recurrent_input else features

    def forward(self, output: Tensor, code: Tensor) -> Tensor:
        return self.activation(self.linear(self.features(output, code))).reshape(code.shape)  # type: ignore[no-any-return]


def make_direct_feedback(
    shapes: Sequence[torch.Size], hidden: HiddenLayer | None, activation: str, recurrent_input: bool, like: Tensor
) -> list[Feedback | None]:
    """Return the feedback of each block, from the output to its input; the last one's skips the hidden layer."""
    count = shapes[-1].numel()
    made: list[Feedback | None] = [None]
    for index, shape in enumerate(shapes[:-1]):
        last = index == len(shapes) - 2
        feedback = DirectFeedback(count, shape, None if last else hidden, activation, recurrent_input, like)
        if index == 0 and hidden is not None and not last:
            feedback.shared = hidden
        made.append(feedback)
    return made


def _activation(name: str) -> nn.Module:
    return nn.Tanh() if name == "tanh" else nn.Identity()
