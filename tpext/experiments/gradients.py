"""Norms of gradients and displacements along a run, gradients.csv."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tpext.diagnostics import displacement_norms
from tpext.experiments.model import SequenceModel
from tpext.experiments.run_folder import RunError, write_whole

PLACE = ("iteration", "weight", "gradient_norm", "spectral_norm")
"""The columns before the steps'."""


def add_gradients(path: Path, iteration: int, model: SequenceModel, loss: Callable[[nn.Module], Tensor]) -> None:
    """Add a row for each recurrent layer to a table, in the place of rows from this iteration on.

    The columns: ``iteration``; ``weight``, the name of the layer's weight_hh; ``gradient_norm``, that of the rule's
    gradient of all parameters of the layer, as one vector; ``spectral_norm`` of its weight_hh; and "0" to "T", the
    displacements of :func:`tpext.diagnostics.displacement_norms`. All are in back-propagation's units: what a rule
    multiplies by its ``target_step`` is divided by it.

    Args:
        path: of the table, which need not be there yet.
        iteration: after which the model is as it is.
        model: the model, which stays as it is.
        loss: takes a model in float64 and returns the scalar loss.

    Raises:
        RunError: the table cannot be written.
    """
    table = pd.DataFrame(_rows(iteration, model, loss))
    if path.exists():
        before = pd.read_csv(path)
        table = pd.concat([before[before.iteration < iteration], table])
    write_whole(path, table.to_csv(index=False, float_format="%.9g").encode())


def _rows(iteration: int, model: SequenceModel, loss: Callable[[nn.Module], Tensor]) -> Iterator[dict[str, Any]]:
    copied = copy.deepcopy(model).double()
    rule = copied.rnn.rule
    unit = 1.0 if rule.normalize else rule.target_step
    value = loss(copied)
    for name, norms in displacement_norms(model, loss).items():
        end = name.rpartition("weight_hh")[2]
        parameters = [
            parameter
            for key, parameter in copied.rnn.named_parameters()
            if key.endswith(end) and key not in copied.rnn.owned_names and parameter.requires_grad
        ]
        gradients = torch.autograd.grad(value, parameters, retain_graph=True)
        size = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
        weight = copied.get_parameter(name).detach()
        row = (iteration, name, float(size) / unit, float(torch.linalg.matrix_norm(weight, 2)))
        yield {**dict(zip(PLACE, row, strict=True)), **{str(step): float(one) for step, one in enumerate(norms)}}


def read_gradients(path: Path) -> pd.DataFrame:
    """Return such a table.

    Raises:
        RunError: it is none.
    """
    try:
        table: pd.DataFrame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if tuple(table.columns[: len(PLACE)]) != PLACE:
        raise RunError(f"{path}: not a table of gradients, its columns are {', '.join(table.columns[:8])}")
    return table
