"""Random changes of training images, drawn for a whole batch at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def flip_and_crop(images: Tensor, random: np.random.Generator, *, flip: float = 0.5, padding: int = 4) -> Tensor:
    """Return images that are each mirrored with probability ``flip``, then cut out of a padded one at a random place.

    An image is padded on every side with ``padding`` copies of its border pixels, and a window of its own size taken
    out, whose corner is uniform over the ``(2 padding + 1)^2`` possible ones. So pixel (i, j) of the output is pixel
    (clamp(i + dy), clamp(j + dx)) of the (mirrored) image, with dy and dx uniform in -padding .. padding and clamping
    into the image. The draws are those of B flips, then of B vertical and B horizontal shifts.

    Args:
        images: ``[B, C, H, W]``, any dtype.
        random: where the draws come from.
        flip: probability that an image is mirrored left to right.
        padding: largest shift, in pixels, >= 0.

    Returns:
        ``[B, C, H, W]``, of the same dtype.

    Cost: one gather of B C H W values.

    Source: the training transform of Ernoult et al., ICML 2022: RandomHorizontalFlip(0.5), then RandomCrop(size,
    padding=4, padding_mode="edge") of torchvision.

    >>> image = torch.arange(9).reshape(1, 1, 3, 3)
    >>> flip_and_crop(image, np.random.default_rng(0), flip=1.0, padding=0)
    tensor([[[[2, 1, 0],
              [5, 4, 3],
              [8, 7, 6]]]])
    """
    batch, channels, height, width = images.shape
    mirrored = torch.from_numpy(random.random(batch) < flip)
    shifts = torch.from_numpy(random.integers(-padding, padding, size=(2, batch, 1), endpoint=True))
    rows = (torch.arange(height) + shifts[0]).clamp_(0, height - 1)
    columns = (torch.arange(width) + shifts[1]).clamp_(0, width - 1)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).reshape(batch, 1, height * width)
    moved = images.flatten(2).gather(2, pixels.expand(batch, channels, height * width))
    return moved.view_as(images)
