"""Rules of your own for recurrent layers: three ways to send displacements back through time, each a few lines.

A rule of a recurrent layer gives the matrix that takes a displacement from a step to the one before it; the fused
sweep does the rest. Needs nothing but tpext; some seconds.

Run: python examples/own_recurrent_rule.py [ITERATIONS]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tpext
from tpext.tasks import make_task


@dataclass(frozen=True)
class FeedbackAlignment(tpext.rules.RecurrentRule):
    """Back-propagation through time with a fixed random matrix in place of the transposed weights.

    After Lillicrap et al., "Random synaptic feedback weights support error backpropagation for deep learning", 2016.
    """

    slope = "derivative"

    def parameter_shapes(self, input_size: int, hidden_size: int, gates: int) -> dict[str, tuple[int, ...]]:
        return {"feedback_weight": (gates * hidden_size, hidden_size)}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        nn.init.orthogonal_(parameter)
        parameter.requires_grad_(False)

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return owned[0]


@dataclass(frozen=True)
class SignSymmetry(tpext.rules.RecurrentRule):
    """The signs of the weights, at the size of their mean.

    After Liao, Leibo and Poggio, "How important is weight symmetry in backpropagation?", 2016.
    """

    slope = "derivative"
    scale: float = 1.0

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return self.scale * weight_hh.sign() * weight_hh.abs().mean((1, 2), keepdim=True)


@dataclass(frozen=True)
class TruncatedInverse(tpext.rules.RecurrentRule):
    """The pseudo-inverse without the directions in which the weights are small."""

    slope = "derivative"
    rtol: float = 0.1

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        return torch.linalg.pinv(weight_hh, rtol=self.rtol).mT


RULES = [FeedbackAlignment(), SignSymmetry(), TruncatedInverse()]


def train(rule: tpext.rules.RecurrentRule, iterations: int) -> float:
    """Learn which of two marked symbols came first in 12 steps, and return the test accuracy."""
    torch.manual_seed(0)
    task = make_task("temporal-order", length=12)
    rnn, head = tpext.nn.RNN(task.input_size, 64, rule=rule, return_sequence=False), nn.Linear(64, task.output_size)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=3e-3)
    for iteration in range(iterations):
        batch = task.batch(seed=1, iteration=iteration, batch_size=32)
        optimizer.zero_grad()
        task.loss(head(rnn(batch.input)[1][-1]), batch.target).backward()
        optimizer.step()
    test = task.test_set(seed=1, size=1000)
    return task.correct(head(rnn(test.input)[1][-1]), test.target).float().mean().item()


def main(iterations: int) -> float:
    torch.set_num_threads(1)
    accuracies = []
    for rule in RULES:
        accuracies.append(train(rule, iterations))
        print(f"{type(rule).__name__}: {accuracies[-1]:.3f}")
    return min(accuracies)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
