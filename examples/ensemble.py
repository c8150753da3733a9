"""An ensemble: networks with different regularisations run together, one call a layer, under a single optimizer.

Prints the test accuracy of each; every member learns from its own loss alone, to the bit as if it ran by itself.

Run: python examples/ensemble.py [ITERATIONS]
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import tpext
from tpext.tasks import make_task

REGS = (0.3, 1.0, 3.0, 10.0)


def main(iterations: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task = make_task("temporal-order", length=12)
    ensemble = tpext.nn.Ensemble(
        tpext.nn.RNN(task.input_size, 64, rule=rule, return_sequence=False)
        for rule in (tpext.RegularizedInverse(reg=reg, slope="derivative") for reg in REGS)
    )
    for member in ensemble.members:
        nn.init.orthogonal_(member.weight_hh_l0)
    head = nn.Parameter(torch.randn(len(REGS), 64, task.output_size) / 8)  # an output layer of each
    optimizer = torch.optim.Adam([*ensemble.parameters(), head], lr=3e-3)
    for iteration in range(iterations):
        input, target = task.batch(seed=1, iteration=iteration, batch_size=32)
        optimizer.zero_grad()
        outputs = ensemble(input)[1][:, -1] @ head  # [members, batch, classes]
        torch.stack([cross_entropy(output, target) for output in outputs]).sum().backward()
        optimizer.step()
    test = task.test_set(seed=1, size=1000)
    with torch.no_grad():
        outputs = ensemble(test.input)[1][:, -1] @ head
    accuracies = (outputs.argmax(-1) == test.target).float().mean(1).tolist()
    for reg, accuracy in zip(REGS, accuracies, strict=True):
        print(f"reg {reg:g}: test accuracy {accuracy:.3f}, chance 0.25")
    return min(accuracies)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
