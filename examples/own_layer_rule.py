"""A rule of your own for feed-forward layers: targets through a truncated inverse of each layer.

A rule of a feed-forward layer says by how much the layer's input should move for its output to move by ``d``; the class
does the rest. Needs nothing but tpext; a few seconds.

Run: python examples/own_layer_rule.py [STEPS]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import tpext
from tpext.rules import LayerCall


@dataclass(frozen=True)
class TruncatedInverseTargets(tpext.rules.LayerRule):
    """``d_x = (d * a') (W^+)^T``, the pseudo-inverse without the directions in which ``W`` is small."""

    target_step: float = 1.0
    rtol: float = 0.2

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        moved = call.activation.derivative(displacement, call.preactivation)
        return moved @ torch.linalg.pinv(call.weight, rtol=self.rtol).mT


def main(steps: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = tpext.nn.MLP([2, 64, 64, 2], "tanh", rule=TruncatedInverseTargets())
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    points = torch.randn(512, 2)
    classes = (points.norm(dim=1) > 1.2).long()  # inside or outside a circle
    accuracy = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        output = net(points)
        cross_entropy(output, classes).backward()
        optimizer.step()
        accuracy = (output.argmax(1) == classes).float().mean().item()
        if step % 50 == 49:
            print(f"step {step + 1}: accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
