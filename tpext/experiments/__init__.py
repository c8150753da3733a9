"""Training runs from a typed configuration: what ``tpext train`` stands on.

>>> from tpext.experiments import make_config
>>> config = make_config("temporal-order", length=60, seed=3)
>>> config.rule.reg, config.rule.target_step
(10.0, 0.01)

``tpext.experiments.train.train(config, "runs/mine")`` runs it; ``tpext.experiments.figures`` draws runs. Networks of any
layers on images have a configuration of their own, :func:`make_image_config`, and :func:`train_images` runs it. Runs and
figures need the extra: ``pip install "tpext[experiments]"``.
"""  # noqa: E501  (the doctest's output is one line)

from __future__ import annotations

from typing import TYPE_CHECKING

from tpext.experiments.config import Config, make_config
from tpext.experiments.image_defaults import make_image_config
from tpext.experiments.images import ImageConfig
from tpext.experiments.settings import ConfigError

if TYPE_CHECKING:
    from tpext.experiments.image_train import train_images

__all__ = [
    "Config",
    "ConfigError",
    "ImageConfig",
    "make_config",
    "make_image_config",
    "train_images",
]

if not TYPE_CHECKING:  # which would take every name for one that is here

    def __getattr__(name: str) -> object:
        """``train_images`` at its first use, as it needs the extra."""
        if name != "train_images":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from tpext.experiments import image_train

        return image_train.train_images
