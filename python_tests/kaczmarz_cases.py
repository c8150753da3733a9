"""What the tests of direct weight solves share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpext import Kaczmarz
from tpext.nn import MLP

op = torch.ops.tpext.kaczmarz_train
OUTPUTS = ["clamp", "swap", "direct"]
MOVES = ["mean", "wnorm", "regularized"]


def close(actual: Tensor, expected: Any, rtol: float = 1e-9, atol: float = 1e-14) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(np.asarray(expected)), rtol=rtol, atol=atol, check_dtype=False)


def streamed(**options: Any) -> Any:
    model = MLP(**{"sizes": [3, 2, 2], "activation": "relu", "rule": Kaczmarz(), **options})
    return model.stream(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
