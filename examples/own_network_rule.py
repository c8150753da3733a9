"""A rule of your own: sign-symmetric targets, through feedback that shares only the signs of the forward weights.

A rule for a network says by how much a block's input should move for its output to move by ``d``; the class does the
rest (the first displacement, the local gradients, their scale). Needs nothing but tpext; a few seconds.

Run: python examples/own_network_rule.py [STEPS]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tpext
from tpext.feedback import BlockCall


@dataclass(frozen=True)
class SignSymmetricTargets(tpext.rules.NetworkRule):
    """``d_x = (d * a') S``, ``S`` the signs of the weights, scaled to their size; for ``Sequential(Linear, Tanh)``."""

    def make_feedback(self, blocks, shapes):
        return [None] * len(blocks)

    def propagate(self, call: BlockCall, displacement: Tensor) -> Tensor:
        weight = call.block[0].weight.detach()
        signs = weight.sign() * weight.abs().mean()
        return (displacement * (1 - call.output.square())) @ signs


def main(steps: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in ((2, 64), (64, 64), (64, 2))]
    net = tpext.nn.TargetSequential(*layers, rule=SignSymmetricTargets())
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    points = torch.randn(512, 2)
    classes = (points.norm(dim=1) > 1.2).long()  # inside or outside a circle
    accuracy = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        output = net(points)
        cross_entropy(4 * output, classes).backward()
        optimizer.step()
        accuracy = (output.argmax(1) == classes).float().mean().item()
        if step % 50 == 49:
            print(f"step {step + 1}: accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
