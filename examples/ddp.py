"""Several processes: ``DistributedDataParallel`` averages the gradients of target propagation as it does any others.

Each process trains on batches of its own; the first one prints the test accuracy and whether all hold the same weights.

Run: torchrun --nproc-per-node 2 examples/ddp.py [ITERATIONS]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import tpext
from tpext.tasks import make_task


class Net(nn.Module):
    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        rule = tpext.RegularizedInverse(slope="derivative")
        self.rnn = tpext.nn.RNN(input_size, 64, rule=rule, return_sequence=False)
        self.head = nn.Linear(64, output_size)
        nn.init.orthogonal_(self.rnn.weight_hh_l0)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.rnn(input)[1][-1])


def main(iterations: int) -> None:
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task = make_task("temporal-order", length=12)
    net = DistributedDataParallel(Net(task.input_size, task.output_size))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for iteration in range(iterations):
        input, target = task.batch(seed=1 + rank, iteration=iteration, batch_size=32 // count)
        optimizer.zero_grad()
        task.loss(net(input), target).backward()
        optimizer.step()
    test = task.test_set(seed=1, size=1000)
    with torch.no_grad():
        accuracy = task.correct(net.module(test.input), test.target).float().mean().item()
    weights = [torch.empty_like(net.module.rnn.weight_hh_l0) for _ in range(count)]
    distributed.all_gather(weights, net.module.rnn.weight_hh_l0.detach())
    if rank == 0:
        same = all(torch.equal(one, weights[0]) for one in weights)
        print(f"{count} processes, the same weights: {same}, test accuracy {accuracy:.3f}, chance 0.25")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
