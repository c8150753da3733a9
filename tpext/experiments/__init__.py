"""Training runs from a typed configuration: what ``tpext train`` stands on.

>>> from tpext.experiments import make_config
>>> config = make_config("temporal-order", length=60, seed=3)
>>> config.rule
RegularizedInverse(reg=10.0, target_step=0.01, correction='linearized', credit='through_time', clip=0.001, normalize=False, input_rule='gradient')

``tpext.experiments.train.train(config, "runs/mine")`` runs it; ``tpext.experiments.figures`` draws runs. These two need
the extra: ``pip install "tpext[experiments]"``.
"""  # noqa: E501  (the doctest's output is one line)

from __future__ import annotations

from tpext.experiments.config import Config, ConfigError, make_config, published

__all__ = ["Config", "ConfigError", "make_config", "published"]
