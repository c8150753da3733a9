"""A network with a module of your own: give it a feedback, and learned feedback trains like any other.

``ChannelScale`` multiplies each channel by a learned factor. Its feedback multiplies by a learned factor too, and the
difference reconstruction loss brings that to the forward one. Needs scikit-learn's digits only, ``pip install
'.[experiments]'`` in the checkout, and a few seconds.

Run: python examples/own_module_feedback.py [EPOCHS]
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tpext
from tpext.feedback import LDRL, Feedback, register_feedback


class ChannelScale(nn.Module):
    """``y = exp(s) x``, one ``s`` a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.log_scale.exp()[:, None, None]


@register_feedback(ChannelScale)
class ChannelScaleFeedback(Feedback):
    """``G(y) = exp(s') y``: what the module needs to know of a forward pass is nothing, so there is no ``encode``."""

    def __init__(self, block: ChannelScale) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros_like(block.log_scale))

    def forward(self, output: Tensor, code: object) -> Tensor:
        return output * self.log_scale.exp()[:, None, None]


def main(epochs: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().div(8).sub(1).view(-1, 1, 8, 8)
    y = torch.from_numpy(classes).long()
    train, test = slice(0, 1437), slice(1437, None)

    net = tpext.nn.TargetSequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), ChannelScale(16), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), ChannelScale(32), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
        rule=tpext.DifferenceTargets(target_step=0.7),
    )
    trainer = LDRL(net, lr=[1e-3, 1e-2], noise=[0.4, 0.2], iterations=5, momentum=0.9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(50):  # random feedback would lead the first steps astray
        trainer.step(x[train][:64])

    accuracy = 0.0
    for epoch in range(epochs):
        for rows in torch.randperm(1437).split(64):
            trace = net.trace(x[train][rows])
            trainer.step(trace)
            optimizer.zero_grad()
            cross_entropy(trace.output, y[train][rows]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (net(x[test]).argmax(1) == y[test]).float().mean().item()
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
