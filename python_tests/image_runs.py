"""Small runs on images, and what a user may have written for them."""

from __future__ import annotations

from typing import Any

from tpext.experiments import ImageConfig, make_image_config
from tpext.experiments.feedback_presets import METHODS

SMALL: dict[str, Any] = {
    "channels": (4, 4),
    "epochs": 2,
    "train_size": 60,
    "batch_size": 20,
    "validation": 0.02,
    "checkpoint_interval": 2,
    "threads": 1,
}
HIDDEN = {"hidden_size": 8}


def small(rule: str = "ldrl", network: str = "lenet", **options: Any) -> ImageConfig:
    hidden = HIDDEN if network in ("lenet", "meulemans-convnet") else {}
    method = METHODS[rule].options
    start = {"feedback_start": 2} if "feedback_start" in method else {}
    start |= {"feedback_epochs": 0} if "feedback_epochs" in method else {}
    return make_image_config("digits", network, rule=rule, **{**SMALL, **hidden, **start, **options})


OWN = """
from dataclasses import dataclass
import torch
from tpext.rules import DifferenceTargets, LayerRule, LearnedInverse, NetworkRule
from tpext.tasks import ImageSet
from tpext.tasks.idx import Images

@dataclass(frozen=True)
class Signs(NetworkRule):
    scale: float = 1.0
    noise: float = 0.5

    def make_feedback(self, blocks, shapes):
        return [None] * len(blocks)

    def propagate(self, call, displacement):
        signs = call.block.get_submodule("linear").weight.sign() * self.scale
        return (displacement @ signs).reshape(call.input.shape)

class Halved(DifferenceTargets):
    def propagate(self, call, displacement):
        return super().propagate(call, displacement) / 2

@dataclass(frozen=True)
class Pseudo(LayerRule):
    target_step: float = 0.5
    rtol: float = 0.1

    def propagate(self, call, displacement):
        moved = call.activation.derivative(displacement, call.preactivation)
        return moved @ torch.linalg.pinv(call.weight, rtol=self.rtol).mT

class Learned(LearnedInverse):
    pass

def load(data_dir):
    pixels = torch.arange(60 * 2 * 20 * 20).remainder(251).to(torch.uint8).view(60, 800)
    return Images(pixels[:50], torch.arange(50) % 3, pixels[50:], torch.arange(10) % 3)

HALF = ((0.5, 0.5), (0.5, 0.5))
stripes = ImageSet(load, (2, 20, 20), {"standard": HALF}, n_classes=3, test_size=10, has_files=False)
bare = ImageSet(load, (2, 20, 20), {"standard": HALF})
moved = ImageSet(load, (2, 20, 20), {"standard": HALF}, flip=0.5, padding=2)
wrong = ImageSet(load, (2, 10, 10), {"standard": HALF}, n_classes=3)

def broken(data_dir):
    raise ValueError("no such folder")

unread = ImageSet(broken, (2, 20, 20), {"standard": HALF})
unread_classes = ImageSet(broken, (2, 20, 20), {"standard": HALF}, n_classes=3)
"""
"""A user's file with rules for networks of images, and sets of images."""
