"""A character model: an LSTM that learns by target propagation to name the next character of a text.

Prints the accuracy on the last tenth of the text, which is not trained on, and that of naming the most frequent one;
without a file the text is made of random sentences.

Run: python examples/lstm_text.py [ITERATIONS] [FILE]
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tpext


def make_text(sentences: int = 1000) -> str:
    draw = random.Random(0)
    nouns, verbs = ["a bird", "the river", "my neighbour", "every tree"], ["sees", "follows", "remembers"]
    return "".join(f"{draw.choice(nouns)} {draw.choice(verbs)} {draw.choice(nouns)}.\n" for _ in range(sentences))


class CharacterModel(nn.Module):
    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        self.lstm = tpext.nn.LSTM(32, 64, rule=tpext.RegularizedInverse())
        self.head = nn.Linear(64, symbols)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(input))[0])


def main(iterations: int, file: str | None = None, length: int = 32) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text = make_text() if file is None else Path(file).read_text()
    symbols = sorted(set(text))
    numbers = torch.tensor([symbols.index(one) for one in text])
    windows = numbers.unfold(0, length + 1, 1).mT  # [length + 1, number of windows]
    train, test = windows[:, : len(text) * 9 // 10 - length], windows[:, len(text) * 9 // 10 :: length]
    net = CharacterModel(len(symbols))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for iteration in range(iterations):
        batch = train[:, torch.randint(train.shape[1], (16,))]
        optimizer.zero_grad()
        loss = cross_entropy(net(batch[:-1]).flatten(0, 1), batch[1:].flatten())
        loss.backward()
        optimizer.step()
        if iteration % 50 == 49:
            print(f"iteration {iteration + 1}: loss {loss.item():.3f}")
    with torch.no_grad():
        accuracy = (net(test[:-1]).argmax(-1) == test[1:]).float().mean().item()
    most_frequent = (test[1:] == numbers.mode().values).float().mean().item()
    print(f"next character right: {accuracy:.3f}, the most frequent one would be: {most_frequent:.3f}")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300, *sys.argv[2:3])
