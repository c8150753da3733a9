"""A long sequence in bounded memory: ``checkpoint_every`` keeps one state in so many, and computes the others anew.

Prints how many numbers stand in memory until the backward pass with it and without, how far the gradients differ, and
how often the network then tells which way 10,000 steps of noise drift.

Run: python examples/long_sequence.py [ITERATIONS]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

import tpext

STEPS = 10_000


def make_noise(count: int) -> tuple[Tensor, Tensor]:
    """Noise ``[STEPS, count, 1]`` with mean -0.3 or 0.3, and which of them each has."""
    classes = torch.randint(2, (count,))
    return (torch.randn(STEPS, count) + 0.6 * classes - 0.3)[..., None], classes


def numbers_kept(net: nn.Module, head: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[int, Tensor]:
    """Run both passes; return how many numbers were saved in between, parameters apart, and a gradient."""
    kept: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in [*net.parameters(), *head.parameters()]}

    def pack(tensor: Tensor) -> Tensor:
        kept.update({} if tensor.data_ptr() in parameters else {tensor.data_ptr(): tensor.numel()})
        return tensor

    net.zero_grad()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(head(net(batch[0])[1][-1]), batch[1])
    loss.backward()
    return sum(kept.values()), net.weight_hh_l0.grad.clone()


def main(iterations: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rule = tpext.RegularizedInverse(slope="derivative")
    net = tpext.nn.RNN(1, 32, rule=rule, return_sequence=False, checkpoint_every=100)
    nn.init.orthogonal_(net.weight_hh_l0)
    whole = tpext.nn.RNN(1, 32, rule=rule, return_sequence=False)
    whole.load_state_dict(net.state_dict())
    head = nn.Linear(32, 2)
    batch = make_noise(8)
    (few, gradient), (all_of_them, expected) = (numbers_kept(one, head, batch) for one in (net, whole))
    distance = ((gradient - expected).norm() / expected.norm()).item()
    print(f"numbers kept: {few:,} in place of {all_of_them:,}; the gradients differ by {distance:.0e}")
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(iterations):
        input, classes = make_noise(8)
        optimizer.zero_grad()
        cross_entropy(head(net(input)[1][-1]), classes).backward()
        optimizer.step()
    with torch.no_grad():
        input, classes = make_noise(200)
        accuracy = (head(net(input)[1][-1]).argmax(1) == classes).float().mean().item()
    print(f"test accuracy {accuracy:.3f}, chance 0.5")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
