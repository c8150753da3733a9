"""gradients.csv: what it says of a run is what the model of each evaluation gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import small

from tpext.diagnostics import displacement_norms
from tpext.experiments import ConfigError
from tpext.experiments.figures import draw_gradients
from tpext.experiments.gradients import read_gradients
from tpext.experiments.loop import Interrupted
from tpext.experiments.run_folder import Failure, Row, RunError, RunFolder
from tpext.experiments.train import train

pytestmark = pytest.mark.usefixtures("unrendered")

MEASURED: dict[str, Any] = {"precision": "64", "lr": 0.1, "gradients": True}


@pytest.mark.parametrize("rule", ["backprop", "regularized-inverse"])
def test_measures_are_those_of_the_next_batch(rule: str, tmp_path: Path) -> None:
    config = small(rule=rule, layers=2, **MEASURED)
    task, expected = config.make_task(), []

    def callback(row: Row, model: torch.nn.Module) -> None:
        input, target = task.batch(config.seed, row.iteration, config.batch_size)

        def loss(model: torch.nn.Module) -> torch.Tensor:
            return task.loss(model(input.double()), target)

        norms = displacement_norms(model, loss)
        step = 1.0 if rule == "backprop" else model.rnn.rule.target_step  # type: ignore[union-attr]
        for layer, (name, of_layer) in enumerate(norms.items()):
            own = [p for key, p in model.rnn.named_parameters() if key.endswith(f"_l{layer}") and p.requires_grad]  # type: ignore[union-attr]
            squares = sum(float(grad.square().sum()) for grad in torch.autograd.grad(loss(model), own))
            spectral = float(torch.linalg.svdvals(model.get_parameter(name).detach())[0])
            expected.append([row.iteration, name, squares**0.5 / step, spectral, *of_layer.tolist()])

    train(config, tmp_path / "run", callback=callback)
    table = read_gradients(tmp_path / "run" / "gradients.csv")
    assert list(table.iteration) == [0, 0, 6, 6, 12, 12, 18, 18, 20, 20]
    assert list(table.columns[4:]) == [str(step) for step in range(11)]
    assert list(table.weight) == [row[1] for row in expected]
    found = table.drop(columns="weight").to_numpy(dtype=float)
    np.testing.assert_allclose(found, np.array([[row[0], *row[2:]] for row in expected], dtype=float), rtol=1e-7)


def test_measuring_changes_no_run_and_a_stop_no_measure(tmp_path: Path) -> None:
    config = small(rule="learned-inverse", **MEASURED)
    whole = train(config, tmp_path / "whole")
    assert train(small(rule="learned-inverse", precision="64", lr=0.1), tmp_path / "plain").test_loss == whole.test_loss
    calls = iter(range(1, 100))
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", stop=lambda: next(calls) == 7)
    table = tmp_path / "parts" / "gradients.csv"
    # as if killed after an evaluation, before its checkpoint
    last = table.read_text().splitlines()[-1]
    table.write_text(table.read_text() + last.replace("6,", "12,", 1) + "\n")
    train(config, tmp_path / "parts", resume=True)
    assert table.read_text() == (tmp_path / "whole" / "gradients.csv").read_text()


@pytest.mark.renders
def test_gradients_are_drawn(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(small(**MEASURED), tmp_path / name)
    # what overflowed, and what faded to nothing
    table = read_gradients(tmp_path / "two" / "gradients.csv")
    table.loc[1, ["0", "1"]] = [np.inf, 0.0]
    table.to_csv(tmp_path / "two" / "gradients.csv", index=False)
    runs = {name: tmp_path / name for name in ("one", "two")}
    assert draw_gradients(runs, tmp_path / "deep" / "a.png", title="Two").read_bytes().startswith(b"\x89PNG")
    table.head(1).to_csv(tmp_path / "two" / "gradients.csv", index=False)
    RunFolder(tmp_path / "two").write_failure(Failure(diverged=True, message="at once"))
    (tmp_path / "two" / "result.json").unlink()
    draw_gradients(runs, tmp_path / "b.png")
    with pytest.raises(ConfigError, match="runs must name at least one folder, got none"):
        draw_gradients({}, tmp_path / "a.png")
    (tmp_path / "one" / "gradients.csv").write_text("iteration,accuracy\n0,1\n")
    with pytest.raises(RunError, match="not a table of gradients, its columns are iteration, accuracy"):
        draw_gradients(runs, tmp_path / "a.png")


def test_feed_forward_networks_have_no_steps() -> None:
    with pytest.raises(ConfigError, match="gradients does not belong to mnist-mlp, got True"):
        small("mnist-mlp", gradients=True, length=None, hidden_size=None, iterations=None)
