"""A module for Lightning: target propagation is in the layer, so that the trainer, its clipping and loaders stay.

Prints the accuracy on sequences that were not trained on; needs Lightning, ``pip install pytorch-lightning``.

Run: python examples/lightning_module.py [EPOCHS]
"""

from __future__ import annotations

import sys

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tpext
from tpext.tasks import make_task

TASK = make_task("temporal-order", length=12)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        rule = tpext.RegularizedInverse(slope="derivative")
        self.rnn = tpext.nn.RNN(TASK.input_size, 64, batch_first=True, rule=rule, return_sequence=False)
        self.head = nn.Linear(64, TASK.output_size)
        nn.init.orthogonal_(self.rnn.weight_hh_l0)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.rnn(input)[1][-1])

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return TASK.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(epochs: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, test = TASK.batch(seed=1, iteration=0, batch_size=2048), TASK.test_set(seed=1, size=1000)
    loader = DataLoader(TensorDataset(train.input.transpose(0, 1), train.target), batch_size=32, shuffle=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", gradient_clip_val=1.0, **quiet)
    net = Classifier()
    trainer.fit(net, loader)
    with torch.no_grad():
        accuracy = TASK.correct(net(test.input.transpose(0, 1)), test.target).float().mean().item()
    print(f"test accuracy {accuracy:.3f}, chance 0.25")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
