"""A plain training loop: a recurrent network of ``tpext.nn`` in the place of torch's, with any optimizer and loss.

Prints the loss and, at the end, how often the network names the order of two symbols that it saw within 20 steps.

Run: python examples/training_loop.py [ITERATIONS]
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import tpext
from tpext.tasks import make_task


def main(iterations: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task = make_task("temporal-order", length=20)
    rule = tpext.RegularizedInverse(slope="derivative")  # tpext.Backprop() would be torch's gradients
    rnn = tpext.nn.RNN(task.input_size, 64, rule=rule, return_sequence=False)
    head = nn.Linear(64, task.output_size)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=3e-3)
    for iteration in range(iterations):
        input, target = task.batch(seed=1, iteration=iteration, batch_size=32)
        optimizer.zero_grad()
        _, h_n = rnn(input)
        loss = task.loss(head(h_n[-1]), target)
        loss.backward()  # target propagation
        optimizer.step()
        if iteration % 100 == 99:
            print(f"iteration {iteration + 1}: loss {loss.item():.3f}")
    with torch.no_grad():
        input, target = task.test_set(seed=1, size=1000)
        accuracy = task.correct(head(rnn(input)[1][-1]), target).float().mean().item()
    print(f"test accuracy {accuracy:.3f}, chance 0.25")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
