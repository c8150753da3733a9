"""What a run asks of a task's samples before it begins."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import call
from torch import Tensor, nn

from tpext.experiments import ConfigError, make_config
from tpext.experiments.train import train
from tpext.tasks import Adding, Batch, ImageClasses, Task, TemporalOrder, make_task
from tpext.tasks.base import NOT_ASKED
from tpext.tasks.checks import check_samples

Change = Callable[[Batch], object]


def sample(task: Task, change: Change) -> object:
    return change(task.batch(1, 0, 5))


class EveryStep(TemporalOrder):
    every_step = True

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        input, target = super().batch(seed, iteration, batch_size)
        steps = torch.full(input.shape[:2], NOT_ASKED)
        steps[-1] = target
        return Batch(input, steps)


class Shares(Adding):
    criterion = "sigmoid_cross_entropy"


class OwnLoss(Adding):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).abs().mean()


ORDER, ADDING, STEPS, SHARES = TemporalOrder(length=12), Adding(length=12), EveryStep(length=12), Shares(length=12)
SPIRAL = make_task("spiral")


@pytest.mark.parametrize("task", [ORDER, ADDING, STEPS, SPIRAL], ids=lambda task: type(task).__name__)
def test_samples_as_a_task_says(task: Task) -> None:
    check_samples(task, "batch", sample(task, lambda batch: batch), size=5)
    check_samples(task, "batch", sample(task, lambda batch: batch))


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        (ORDER, tuple, "TemporalOrder: batch must return a Batch, got tuple"),
        (ORDER, lambda b: Batch(b.input.numpy(), b.target), "input of batch must be a tensor, got ndarray"),
        (ORDER, lambda b: Batch(b.input, b.target.tolist()), "target of batch must be a tensor, got list"),
        (
            ORDER,
            lambda b: Batch(b.input.transpose(0, 1), b.target),
            "input of batch must be [T, B, I] = [12, 5, 6], got [5, 12, 6]; the steps come first",
        ),
        (ORDER, lambda b: Batch(b.input[1:], b.target), "must be [T, B, I] = [12, 5, 6], got [11, 5, 6]"),
        (ORDER, lambda b: Batch(b.input[..., 1:], b.target), "must be [T, B, I] = [12, 5, 6], got [12, 5, 5]"),
        (ORDER, lambda b: Batch(b.input[0, 0, 0], b.target), "must be [T, B, I] = [12, 5, 6], got []"),
        (ORDER, lambda b: Batch(b.input.long(), b.target), "must be floating point, such as float32, got torch.int64"),
        (ORDER, lambda b: Batch(b.input / 0, b.target), "input of batch must be finite, got 360 numbers that are not"),
        (ORDER, lambda b: Batch(b.input, b.target + 4), "target of batch must be classes 0 .. 3, got "),
        (ORDER, lambda b: Batch(b.input, b.target - 4), "target of batch must be classes 0 .. 3, got -"),
        (ORDER, lambda b: Batch(b.input, b.target.int()), "in int64 for 'cross_entropy', got torch.int32"),
        (ORDER, lambda b: Batch(b.input, b.target[:, None]), "for 'cross_entropy', got [5, 1]; target.squeeze(-1) is"),
        (ORDER, lambda b: Batch(b.input, b.target[1:]), "must be [B] = [5] for 'cross_entropy', got [4]"),
        (STEPS, lambda b: Batch(b.input, b.target[-1]), "must be [T, B] = [12, 5] for 'cross_entropy', got [5]"),
        (STEPS, lambda b: Batch(b.input, b.target - 9), "target of batch must be classes 0 .. 3, got -"),
        (ADDING, lambda b: Batch(b.input, b.target[:, 0]), "= [5, 1] for 'mse', got [5]; target.unsqueeze(-1) is"),
        (ADDING, lambda b: Batch(b.input, b.target / 0), "target of batch must be finite, got 5 numbers that are not"),
        (SHARES, lambda b: Batch(b.input, b.target * 0 + 2), "in [0, 1] for 'sigmoid_cross_entropy', got 2 .. 2"),
        (SPIRAL, lambda b: Batch(b.input[0], b.target), "input of batch must be [B, I] = [5, 2], got [2]"),
    ],
)  # fmt: skip
def test_others_are_refused_by_name(task: Task, change: Change, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        check_samples(task, "batch", sample(task, change), size=5)


def test_a_loss_of_its_own_judges_its_targets() -> None:
    task = OwnLoss(length=12)
    check_samples(task, "batch", sample(task, lambda batch: Batch(batch.input, batch.target[:, 0])), size=5)


class Symbols(TemporalOrder):
    """Reads its six symbols as numbers of an embedding."""

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        input, target = super().batch(seed, iteration, batch_size)
        return Batch(input.argmax(dim=-1), target)

    def make_embedding(self) -> nn.Module:
        return nn.Embedding(6, self.input_size)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b.input.transpose(0, 1), "must be [T, B, ...] = [12, 5], got [5, 12]; the steps come first"),
        (lambda b: b.input + 1, "input of batch must go through make_embedding, got IndexError: index out of range"),
        (lambda b: b.input.float(), "must go through make_embedding, got RuntimeError: Expected tensor for"),
        (lambda b: b.input[..., None], "input of batch, embedded, must be [T, B, I] = [12, 5, 6], got [12, 5, 1, 6]"),
    ],
)  # fmt: skip
def test_inputs_go_through_the_embedding(change: Callable[[Batch], Tensor], says: str) -> None:
    task = Symbols(length=12)
    batch = task.batch(1, 0, 5)
    check_samples(task, "batch", batch, size=5, embed=task.make_embedding())
    check_samples(task, "test_set", batch)
    with pytest.raises(ValueError, match=re.escape(says)):
        check_samples(task, "batch", Batch(change(batch), batch.target), size=5, embed=task.make_embedding())


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        (ORDER, lambda b: Batch(b.input[:, :0], b.target[:0]), "of test_set must have at least one sample, got [0]"),
        (STEPS, lambda b: Batch(b.input, b.target * 0 + NOT_ASKED), "must ask for at least one output, got -100 every"),
        (ORDER, lambda b: Batch(b.input.transpose(0, 1), b.target), "= [12, 5, 6], got [5, 12, 6]; the steps come"),
        (SPIRAL, lambda b: Batch(b.input[None], b.target), "got [1, 5, 2]; ToySet has no length, so its network is"),
    ],
)  # fmt: skip
def test_sets_of_no_given_size(task: Task, change: Change, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        check_samples(task, "test_set", sample(task, change))


def test_images_keep_their_planes_where_they_are_asked_to() -> None:
    task = ImageClasses("digits")
    images = task.batch(1, 0, 5)
    check_samples(task, "batch", images, size=5, shape=task.shape)
    with pytest.raises(ValueError, match=r"input of batch must be \[B, I\] = \[5, 64\], got \[5, 1, 8, 8\]"):
        check_samples(task, "batch", images, size=5)


OWN = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from tpext.rules import RecurrentRule
from tpext.tasks import Batch, Criterion, SyntheticTask


@dataclass(frozen=True)
class Signs(SyntheticTask):
    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the class"
    change: str = ""
    length: int = 6
    input_size = output_size = 2

    def sample(self, random, size):
        input = torch.from_numpy(random.normal(size=(self.length, size, 2)))
        target = (input[0, :, 0] > 0).long()
        return Batch(input, eval(f"target{self.change}"))


@dataclass(frozen=True)
class OnlyTests(Signs):
    def test_set(self, seed, size):
        return super().test_set(seed, size)._replace(target=torch.full((size,), 2))


@dataclass(frozen=True)
class OnlyValidation(Signs):
    def validation_set(self, seed, size):
        return super().test_set(seed, size)._replace(target=torch.full((size,), 3))


@dataclass(frozen=True)
class Embedded(Signs):
    # numbers of numpy's float64 reach a module in float32
    def make_embedding(self):
        return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Flatten(2), torch.nn.Linear(4, 2))


@dataclass(frozen=True)
class Fails(Signs):
    has_epochs = True

    def epoch_length(self, batch_size):
        raise ValueError("my own trouble")


@dataclass(frozen=True)
class Second(Signs):
    def batch(self, seed, iteration, batch_size):
        input, target = super().batch(seed, iteration, batch_size)
        return Batch(input, target[: len(target) - (iteration == 1)])


class Halves(RecurrentRule):
    def feedback(self, weight):
        return weight / 2


class Row(RecurrentRule):
    def feedback(self, weight):
        return weight[0]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with what is a user's, in the folder that we are in."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    return file


def test_a_run_refuses_before_it_has_a_folder(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--iterations 2 --threads 1 --test-size 20 --out run"
    # numbers of numpy's float64 are converted
    assert call(f"train mine.py:Signs {small}", capsys)[0] == 0
    status, _, err = call(f"train mine.py:Embedded {small}2", capsys)
    assert status == 0, err
    for line, says in (
        ("Signs --task-options change=+1", "tpext: Signs: target of batch must be classes 0 .. 1, got 2\n"),
        ("OnlyTests", "tpext: OnlyTests: target of test_set must be classes 0 .. 1, got 2\n"),
        ("OnlyValidation", "tpext: OnlyValidation: target of validation_set must be classes 0 .. 1, got 3\n"),
    ):
        status, _, err = call(f"train mine.py:{line} {small}x", capsys)
        assert (status, err) == (1, says)
    assert not Path("runx").exists()


def test_an_error_in_code_of_a_user_is_shown_with_its_place(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call("train mine.py:Signs --task-options change=.numpy().reshape(3,7) --out run", capsys)
    assert status == 1
    assert "mine.py" in err.splitlines()[1]
    assert err.endswith("tpext: stopped by this error in code of your own\n")
    status, _, err = call("train mine.py:Fails --out run", capsys)
    assert status == 1
    assert "mine.py" in err.splitlines()[1]
    assert "ValueError: my own trouble" in err


def test_errors_of_a_task_are_not_blamed_on_a_rule(mine: Path) -> None:
    config = make_config("mine.py:Second", rule="mine.py:Halves", iterations=3, test_size=20)
    with pytest.raises(ValueError, match=r"^Expected input batch_size \(20\) to match target batch_size \(19\)"):
        train(config, mine.parent / "run")


def test_what_a_rule_must_not_return_is_one_line(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "train adding --length 12 --iterations 2 --threads 1 --test-size 20 --hidden-size 8 --rule mine.py:Row"
    status, _, err = call(line, capsys)
    assert (status, err) == (1, "tpext: rule mine.py:Row: Row.feedback must return [1, 8, 8], got [8, 8]\n")
    config = make_config("adding", rule="mine.py:Row", length=12, iterations=2, test_size=20, hidden_size=8)
    with pytest.raises(ConfigError, match=r"Row\.feedback must return") as error:
        train(config, mine.parent / "other")
    assert isinstance(error.value.__cause__, ValueError)
