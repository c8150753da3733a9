"""A trainer of your own: a weight mirror, which learns the forward weights' transposed from noise.

A trainer says what one batch does to the feedback; the class does the rest (the forward pass, noise, saving). Each
layer is sent noise and answers ``L dx``; the correlation of the two is the transposed weight, on average. After Akrout
et al., "Deep Learning without Weight Transport", NeurIPS 2019. Needs nothing but tpext; a few seconds.

Run: python examples/own_feedback_trainer.py [STEPS]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import tpext
from tpext.feedback import BlockCall, FeedbackTrainer, Record, average_over_processes, weight_alignment


class WeightMirror(FeedbackTrainer):
    """``W <- (1 - rate) W + rate dx^T (L dx)``, a mean over the batch; for blocks that begin with a linear layer."""

    def __init__(self, net: nn.Module, *, rate: float, seed: int = 0) -> None:
        super().__init__(net, seed=seed)
        self.rate = rate

    def update(self, calls: Sequence[BlockCall], records: list[Record] | None) -> None:
        for layer, feedback in self.layers:
            call = calls[layer]
            linear, head, _ = feedback.steps(call.block)[0]
            noise = self.draw_noise(layer, 0, 1.0, call.input)
            mirrored = noise.T @ (noise @ linear.weight.T) / len(noise)
            average_over_processes([mirrored])
            if records is not None:
                records.append(Record(layer, (head.weight - mirrored).square().sum(), *weight_alignment(call)))
            head.weight.lerp_(mirrored, self.rate)


def main(steps: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [nn.Sequential(nn.Linear(n, m), nn.ELU()) for n, m in ((2, 64), (64, 64))]
    net = tpext.nn.TargetSequential(*layers, nn.Linear(64, 2), rule=tpext.DifferenceTargets(target_step=0.3))
    trainer = WeightMirror(net, rate=0.05)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    points = torch.randn(512, 2)
    classes = (points.norm(dim=1) > 1.2).long()  # inside or outside a circle
    accuracy = 0.0
    for step in range(steps):
        trace = net.trace(points)
        records = trainer.step(trace, record=step % 50 == 49)
        optimizer.zero_grad()
        cross_entropy(trace.output, classes).backward()
        optimizer.step()
        accuracy = (trace.output.argmax(1) == classes).float().mean().item()
        if records:
            angles = ", ".join(f"{record.angle:.0f}" for record in records)
            print(f"step {step + 1}: accuracy {accuracy:.3f}, feedback at {angles} degrees")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
