"""Small runs on images."""

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
