"""Target propagation through regularised inverses in plain torch: what ``tpext.nn.RNN`` computes, step by step.

It learns to recall the sign of a sequence's first number after ten steps of noise, and prints loss and accuracy.

Run: python examples/minimal.py [ITERATIONS]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def target_gradients(U, W, b, x, loss_of_states, reg=1.0, target_step=1.0, margin=1e-3) -> tuple[Tensor, ...]:
    """Gradients for U ``[H, I]``, W ``[H, H]``, b ``[H]``, and the loss; x ``[T, B, I]``, credit "through_time"."""
    h = [x.new_zeros(x.shape[1], len(W))]
    for x_t in x:
        h.append(torch.tanh(x_t @ U.T + b + h[-1] @ W.T))
    h0, states = h[0], torch.stack(h[1:]).requires_grad_()
    loss = loss_of_states(states)
    loss.backward()  # for what comes after the states, exact gradients
    h = states.detach()
    P = W @ torch.linalg.inv(W.T @ W + reg * torch.eye(len(W), dtype=W.dtype))
    inverse_slope = 1 / (1 - h.clamp(margin - 1, 1 - margin).square())
    d = -target_step * states.grad
    for t in reversed(range(1, len(x))):
        d[t - 1] += (d[t] * inverse_slope[t]) @ P  # what each state should move by
    error, errors = torch.zeros_like(h0), torch.empty_like(h)
    for t in reversed(range(len(x))):
        errors[t] = error = (-d[t] + error @ W) * (1 - h[t].square())
    before, errors = torch.cat([h0[None], h[:-1]]), errors / target_step
    return *(torch.einsum("tbh,tbi->hi", errors, of) for of in (x, before)), errors.sum((0, 1)), loss


def main(iterations: int, units: int = 32) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    U, W, b = torch.randn(units, 1) / 2, nn.init.orthogonal_(torch.empty(units, units)), torch.zeros(units)
    head = nn.Linear(units, 2)
    optimizer = torch.optim.Adam([U, W, b, *head.parameters()], lr=3e-3)
    correct = []
    for iteration in range(iterations):
        classes = torch.randint(2, (32,))
        x = torch.cat([2.0 * classes[None, :, None] - 1, 0.3 * torch.randn(10, 32, 1)])

        def loss_of_states(states: Tensor, classes: Tensor = classes) -> Tensor:
            output = head(states[-1])
            correct.append((output.argmax(1) == classes).float().mean())
            return nn.functional.cross_entropy(output, classes)

        optimizer.zero_grad()
        U.grad, W.grad, b.grad, loss = target_gradients(U, W, b, x, loss_of_states)
        optimizer.step()
        if iteration % 50 == 49:
            accuracy = torch.stack(correct[-20:]).mean().item()
            print(f"iteration {iteration + 1}: loss {loss.item():.3f}, accuracy of 20 batches {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
