"""Learned feedback on images: convolutions with pools, whose feedback learns by the loss L-DRL beside the network.

Prints each epoch's test accuracy and the angles between the feedback's weights and the forward ones; without a folder
of MNIST's files the images are bars in four directions under noise.

Run: python examples/ldrl_images.py [EPOCHS] [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tpext
from tpext.feedback import LDRL
from tpext.tasks import load_mnist


def make_bars(count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Images ``[count, 1, size, size]`` of one bar each, and the number of its direction."""
    classes = torch.randint(4, (count,))
    angle, offset = classes * (torch.pi / 4), torch.rand(count, 1, 1) * 6 - 3
    y, x = torch.meshgrid(torch.arange(size) - (size - 1) / 2, torch.arange(size) - (size - 1) / 2, indexing="ij")
    distance = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None] - offset
    images = (distance.abs() < 1).float() + 0.5 * torch.randn(count, size, size)
    return images[:, None], classes


def main(epochs: int, folder: str | None = None) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if folder is None:
        images, labels = make_bars(1536)
        train, test = slice(0, 1024), slice(1024, None)
    else:
        mnist = load_mnist(Path(folder))  # some of it, for seconds an epoch
        images = torch.cat([mnist.train_images[:2048], mnist.test_images[:1000]]).view(-1, 1, 28, 28) / 255.0
        labels = torch.cat([mnist.train_labels[:2048], mnist.test_labels[:1000]])
        count = len(mnist.train_labels[:2048])
        train, test = slice(0, count), slice(count, None)
    features = 32 * (images.shape[-1] // 4) ** 2
    net = tpext.nn.TargetSequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(features, int(labels.max()) + 1)),
        rule=tpext.DifferenceTargets(target_step=0.7),
    )
    trainer = LDRL(net, lr=[1e-3, 1e-2], noise=[0.4, 0.2], iterations=5, momentum=0.9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for rows in torch.randint(train.stop, (50, 64)):  # random feedback would lead the first steps astray
        trainer.step(images[rows])
    accuracy = 0.0
    for epoch in range(epochs):
        for rows in torch.randperm(len(labels[train])).split(64):
            trace = net.trace(images[rows])
            records = trainer.step(trace, record=True)
            optimizer.zero_grad()
            cross_entropy(trace.output, labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (net(images[test]).argmax(1) == labels[test]).float().mean().item()
        angles = ", ".join(f"{angle:.0f}" for angle in {record.layer: record.angle for record in records}.values())
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}, angles {angles} degrees")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, *sys.argv[2:3])
