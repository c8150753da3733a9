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

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tpext.experiments.config import Config, make_config
from tpext.experiments.image_defaults import make_image_config
from tpext.experiments.images import ImageConfig
from tpext.experiments.settings import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from tpext.experiments.image_folder import ImageResult, ImageRow


def train_images(
    config: ImageConfig,
    out: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    stop: Callable[[], bool] | None = None,
    callback: Callable[[ImageRow, nn.Module], None] | None = None,
) -> ImageResult:
    """Run a configuration on images in a folder: see :func:`tpext.experiments.image_train.train_images`."""
    # here, as it needs the extra
    from tpext.experiments import image_train

    return image_train.train_images(config, out, resume=resume, console=console, stop=stop, callback=callback)


__all__ = [
    "Config",
    "ConfigError",
    "ImageConfig",
    "make_config",
    "make_image_config",
    "train_images",
]
