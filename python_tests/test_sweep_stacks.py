"""Runs of a sweep that go together: each has the bits of a run of its own, whatever becomes of the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, small
from test_sweep import words_of

import tpext.experiments.train as train_module
from tpext.experiments import passes, sweep_stacks
from tpext.experiments.commands import run as tpext_command
from tpext.experiments.loop import DivergedError
from tpext.experiments.run_folder import BusyError, RunFolder
from tpext.experiments.sweep_stacks import can_stack, measured_gain
from tpext.experiments.train import train, train_together

pytestmark = pytest.mark.usefixtures("unrendered")


def three(**options: Any) -> list[Any]:
    """Configurations that differ in seed, rates and numbers of the rule."""
    return [
        small(seed=seed, lr=lr, reg=reg, **options)
        for seed, lr, reg in ((1, 1e-3, 1.0), (2, 1e-2, 0.3), (3, 1e-3, 5.0))
    ]


def together(configs: list[Any], folders: list[Path], stop: Callable[[], bool] = lambda: False) -> list[Any]:
    """What each has returned or raised."""
    outcomes: dict[int, Any] = {}
    train_together(configs, list(map(RunFolder, folders)), stop=stop, ended=outcomes.__setitem__)
    return [outcomes[place] for place in range(len(configs))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cell": "gru", "layers": 2, "optimizer": "adam"},
        {"rule": "backprop"},
        # of a state that is not aligned torch's products have other bits
        {"hidden_size": 6, "batch_size": 35},
    ],
    ids=str,
)
def test_members_are_runs_of_their_own(options: dict[str, Any], tmp_path: Path) -> None:
    configs = three(**options) if "rule" not in options else [small(seed=seed, **options) for seed in (1, 2, 3)]
    folders = [tmp_path / f"stacked-{place}" for place in range(3)]
    results = together(configs, folders)
    for place, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        assert results[place].accuracy == train(config, tmp_path / f"alone-{place}").accuracy
        assert_same_run(folder, tmp_path / f"alone-{place}")


def test_a_stopped_stack_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    configs, folders = three(), [tmp_path / f"stacked-{place}" for place in range(3)]
    asked = itertools.count()
    outcomes = together(configs, folders, lambda: next(asked) >= 20)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Interrupted"] * 3
    # one of them goes on alone, and ends before the others do
    train(configs[1], folders[1], resume=True)
    assert all(outcome.iterations > 0 for outcome in together(configs, folders))
    for place, (config, folder) in enumerate(zip(configs, folders, strict=True)):
        train(config, tmp_path / f"alone-{place}")
        assert_same_run(folder, tmp_path / f"alone-{place}")


@pytest.mark.parametrize("where", ["weight", "head"])
def test_one_that_diverges_leaves_the_others_alone(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a weight the pass of all fails, by the head its loss alone does."""
    step = train_module.TrainingRun._step

    def poisoned(run: Any, iteration: int) -> Iterator[Any]:
        if iteration == 11 and run.config.seed == 2:
            if where == "weight":
                run.model.rnn.weight_hh_l0.register_hook(lambda gradient: _raise())
            else:
                run.model.head.bias.data[0] = float("nan")
        yield from step(run, iteration)

    def _raise() -> None:
        raise DivergedError(11, "the hook")

    configs, folders = three(), [tmp_path / f"stacked-{place}" for place in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(train_module.TrainingRun, "_step", poisoned)
        outcomes = together(configs, folders)
    assert isinstance(outcomes[1], DivergedError)
    assert outcomes[1].iteration == 11
    for place in (0, 2):
        train(configs[place], tmp_path / f"alone-{place}")
        assert_same_run(folders[place], tmp_path / f"alone-{place}")


def test_a_run_that_another_process_has_is_told(tmp_path: Path) -> None:
    configs, folders = three(), [tmp_path / f"stacked-{place}" for place in range(3)]
    with RunFolder(folders[0]).locked():
        outcomes = together(configs, folders)
    assert isinstance(outcomes[0], BusyError)
    assert all(outcome.accuracy >= 0 for outcome in outcomes[1:])


def test_ctrl_c_that_nobody_catches_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = train_module.TrainingRun._step

    def interrupted(run: Any, iteration: int) -> Iterator[Any]:
        if iteration == 5 and run.config.seed == 2:
            raise KeyboardInterrupt
        yield from step(run, iteration)

    monkeypatch.setattr(train_module.TrainingRun, "_step", interrupted)
    configs, folders = three(), [tmp_path / f"stacked-{place}" for place in range(3)]
    with pytest.raises(KeyboardInterrupt):
        together(configs, folders)
    for folder in folders:
        with RunFolder(folder).locked():
            pass


def test_random_states_are_each_run_s_own(tmp_path: Path) -> None:
    """Another order of the same runs has the same checkpoints, random states included."""
    configs = three()
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        together([configs[place] for place in order], [tmp_path / f"{name}-{place}" for place in order])
    before = torch.get_rng_state()
    for place in range(3):
        assert_same_run(tmp_path / f"a-{place}", tmp_path / f"b-{place}")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_pass_draws_is_each_run_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the pass of all fails, and each is carried out alone."""
    loss = train_module.TrainingRun._loss
    monkeypatch.setattr("tpext.tasks.TemporalOrder.make_embedding", lambda task: torch.nn.Dropout(0.3))
    monkeypatch.setattr(train_module.TrainingRun, "_loss", lambda run, *given: loss(run, *given) * (1 + torch.rand(())))
    configs, asked = three(), itertools.count()
    make = passes.outputs_together

    def fails_once(*arguments: Any) -> Any:
        if next(asked) == 5:
            raise RuntimeError("out of memory")
        return make(*arguments)

    monkeypatch.setattr(passes, "outputs_together", fails_once)
    together(configs, [tmp_path / f"stacked-{place}" for place in range(3)])
    assert next(asked) == 20
    for place, config in enumerate(configs):
        train(config, tmp_path / f"alone-{place}")
        assert_same_run(tmp_path / f"stacked-{place}", tmp_path / f"alone-{place}")


def test_which_runs_can_go_together() -> None:
    """Those that the kernels carry out alone: of a stack torch's products have other bits."""
    assert can_stack(small())
    assert can_stack(small(rule="backprop", cell="lstm"))
    assert not can_stack(small(rule="learned-inverse"))
    assert not can_stack(small(correction="none"))
    assert not can_stack(small(device="cuda"))
    assert not can_stack(small(rule="own_rules:SignSymmetry"))


def test_runs_of_a_stack_have_the_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []
    batch = train_module.TrainingRun._batch
    monkeypatch.setattr(
        train_module.TrainingRun, "_batch", lambda run, number: tasks.append(run.task) or batch(run, number)
    )
    measured_gain(three())
    assert len(set(map(id, tasks))) == 1
    tasks.clear()
    together(three(), [tmp_path / f"stacked-{place}" for place in range(3)])
    assert len(set(map(id, tasks))) == 1


def test_slow_runs_are_measured_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations apart and two together, however long they take."""
    monkeypatch.setattr(sweep_stacks, "SECONDS", 0.0)
    seen = []
    step = train_module.TrainingRun._step

    def counted(run: Any, iteration: int) -> Iterator[Any]:
        seen.append(iteration)
        yield from step(run, iteration)

    monkeypatch.setattr(train_module.TrainingRun, "_step", counted)
    measured_gain(three())
    assert seen == [1] * 6 + [2] * 6


def test_the_sweep_measures_and_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured_gain(three()) > 0
    monkeypatch.chdir(tmp_path)
    seen: list[int] = []

    def watched(*arguments: Any) -> Any:
        stacks = sweep_stacks.stacks_of(*arguments)
        seen.extend(map(len, stacks))
        return stacks

    monkeypatch.setattr("tpext.experiments.sweep.stacks_of", watched)
    words = [*words_of(), "--reg", "0.5,2", "--seed", "1..3", "--jobs", "1"]
    for gain, told, sizes in ((2.0, "in stacks of up to 6", [6]), (0.9, "each alone", [1] * 6)):
        monkeypatch.setattr(sweep_stacks, "measured_gain", lambda configs, gain=gain: gain)
        assert tpext_command(["sweep", "temporal-order", *words, "--out", f"by-{gain}"]) == 0
        assert f"6 runs together are {gain:.2f} times as fast as one after another: {told}" in capsys.readouterr().out
        assert seen == sizes
        seen.clear()
    assert tpext_command(["sweep", "temporal-order", *words, "--out", "of-4", "--stack", "4"]) == 0
    assert seen == [3, 3]
    for run in Path("by-0.9/runs").iterdir():
        for other in ("by-2.0", "of-4"):
            assert_same_run(run, Path(other) / "runs" / run.name)
    assert tpext_command(["sweep", "temporal-order", *words, "--out", "of-0", "--stack", "0"]) == 1
    assert "stack must be an integer >= 1, got 0" in capsys.readouterr().err
