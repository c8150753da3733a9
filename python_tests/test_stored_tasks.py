"""Tasks whose samples are a user's arrays."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from runs import call
from torch import Tensor

from tpext.tasks import Criterion, Samples, StoredTask
from tpext.tasks.base import NOT_ASKED
from tpext.testing import check_task

N, T, SIZE = 50, 7, 3
RANDOM = np.random.default_rng(1)
STEPS = RANDOM.normal(size=(N, T, SIZE))
POINTS = RANDOM.normal(size=(N, SIZE))
CLASSES = np.arange(N) % 4


@dataclass(frozen=True)
class Given(StoredTask):
    """The arrays that it is made with."""

    samples: Any = field(compare=False)

    def load(self) -> Samples:
        return self.samples


@dataclass(frozen=True)
class Numbers(Given):
    criterion: ClassVar[Criterion] = "mse"
    correct_when: ClassVar[str] = "it is near"

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target).abs() < 0.1).all(dim=-1)


@dataclass(frozen=True)
class EveryStep(Given):
    every_step: ClassVar[bool] = True


@dataclass(frozen=True)
class NumbersOfEveryStep(Numbers):
    every_step: ClassVar[bool] = True


def sums(steps: np.ndarray) -> np.ndarray:
    return np.cumsum(steps[:, :, 0] > 0, axis=1) % 3


@pytest.mark.parametrize(
    ("kind", "input", "target", "sizes"),
    [
        (Given, STEPS, CLASSES, (T, SIZE, 4)),
        (Given, POINTS, CLASSES.astype(np.uint8), (None, SIZE, 4)),
        (Given, torch.tensor(STEPS), CLASSES.tolist(), (T, SIZE, 4)),
        (Given, POINTS, CLASSES > 1, (None, SIZE, 2)),
        (Numbers, STEPS, STEPS.sum(axis=(1, 2)), (T, SIZE, 1)),
        (Numbers, POINTS, POINTS[:, :2], (None, SIZE, 2)),
        (EveryStep, STEPS, sums(STEPS), (T, SIZE, 3)),
        (NumbersOfEveryStep, STEPS, STEPS[:, :, :1], (T, SIZE, 1)),
        (NumbersOfEveryStep, STEPS, STEPS[:, :, 0], (T, SIZE, 1)),
    ],
)
def test_sizes_are_those_of_the_arrays(kind: type[Given], input: Any, target: Any, sizes: tuple[Any, ...]) -> None:
    task = kind(Samples.split(input, target))
    assert (task.length, task.input_size, task.output_size) == sizes
    assert task.default_test_size == len(task.data[1].input)
    assert task.epoch_length(15) == 2  # of 40 training samples
    check_task(task)
    assert len(task.test_set(1, 1000).input if task.length is None else task.test_set(1, 1000).input[0]) == 10


def test_batches_run_through_epochs() -> None:
    train = Samples(STEPS[:40], np.arange(40), STEPS[40:], np.arange(10))
    task = Given(train)
    epochs = [[task.batch(3, 4 * epoch + index, 10) for index in range(4)] for epoch in range(2)]
    orders = [torch.cat([batch.target for batch in epoch]) for epoch in epochs]
    assert all(torch.equal(order.sort().values, torch.arange(40)) for order in orders)
    assert not torch.equal(*orders)
    for batch in epochs[0]:
        assert torch.equal(batch.input, torch.tensor(STEPS[batch.target]).float().transpose(0, 1))
    assert torch.equal(task.test_set(1, 4).input, torch.tensor(STEPS[40:44]).float().transpose(0, 1))

    @dataclass(frozen=True)
    class AsStored(Given):
        order = "sequential"

    assert torch.equal(AsStored(train).batch(3, 5, 10).target, torch.arange(10, 20))


def test_a_split_keeps_every_sample_once_and_is_always_the_same() -> None:
    numbers = np.arange(N)
    samples = Samples.split(POINTS, numbers, test_share=0.3)
    assert sorted([*samples.train_target.tolist(), *samples.test_target.tolist()]) == numbers.tolist()
    assert len(samples.test_target) == 15
    assert torch.equal(samples.train_input, torch.tensor(POINTS[samples.train_target]))
    again = Samples.split(POINTS, numbers, test_share=0.3)
    assert all(torch.equal(one, other) for one, other in zip(samples, again, strict=True))


def test_what_has_no_target_at_a_step_is_not_judged() -> None:
    target = sums(STEPS)
    target[:, 0] = NOT_ASKED
    task = EveryStep(Samples.split(STEPS, target))
    check_task(task)
    batch = task.batch(1, 0, 10)
    assert task.judged(batch.target) == 10 * (T - 1)


def test_a_run_knows_its_data_again() -> None:
    samples = Samples.split(POINTS, CLASSES)
    other = samples._replace(test_input=torch.as_tensor(samples.test_input) + 1)
    assert Given(samples).fingerprint() == Given(samples).fingerprint() != Given(other).fingerprint()


def parts(**changes: Any) -> Samples:
    return dataclasses.replace(_Parts(), **changes).samples()


@dataclass
class _Parts:
    train_input: Any = field(default_factory=lambda: STEPS[:40])
    train_target: Any = field(default_factory=lambda: CLASSES[:40])
    test_input: Any = field(default_factory=lambda: STEPS[40:])
    test_target: Any = field(default_factory=lambda: CLASSES[40:])

    def samples(self) -> Samples:
        return Samples(**vars(self))


@pytest.mark.parametrize(
    ("kind", "samples", "text"),
    [
        (Given, {"x": 1}, "Given: load must return Samples, got dict"),
        (Given, parts(train_input=STEPS), "Given: train_input and train_target must have the same number of samples"),
        (Given, parts(test_target=CLASSES), "Given: test_input and test_target must have the same number of samples"),
        (
            Given,
            parts(train_input="text"),
            "must be an array of numbers, got str: dtype <U4; names of classes become numbers by",
        ),
        (Given, parts(train_target=["a", "b"] * 20), "got list: dtype <U1; names of classes become numbers by"),
        (Given, parts(train_input=[np.zeros((3, 1)), np.zeros((4, 1))]), "got list: .*; sequences of several lengths"),
        (
            Given,
            parts(train_input=[np.zeros((2, 3)), np.zeros((2, 4))]),
            "train_input .*; sequences of several lengths",
        ),
        (Given, parts(train_input=np.array("abc")), "got ndarray: dtype <U3; names of classes"),
        (Numbers, parts(train_target=np.zeros((40, 0))), r"must be \[40, O\] for 'mse', got \[40, 0\]"),
        (Given, parts(train_input=None), "train_input must be an array of numbers, got NoneType: dtype object$"),
        (Given, parts(train_target=CLASSES[:40, None]), r"got \[40, 1\]; take target\[..., 0\]$"),
        (Given, parts(train_target=np.eye(4)[CLASSES[:40]]), r"got \[40, 4\]; one-hot targets become classes by"),
        (EveryStep, parts(train_target=np.zeros((40, 7, 1))), r"got \[40, 7, 1\]; take target\[..., 0\]$"),
        (Given, parts(train_input=np.zeros(40)), r"train_input must be \[N, T, I\] for sequences, or .*, got \[40\]"),
        (Given, parts(train_input=np.zeros((40, 1, 8, 8))), r"got \[40, 1, 8, 8\]; images for .* are an ImageSet"),
        (Given, parts(train_input=np.zeros((40, 0, 3))), r"no size 0, got \[40, 0, 3\]"),
        (Given, parts(train_input=STEPS[:40] * np.nan), "train_input must be finite, got 840 numbers that are not"),
        (Numbers, parts(test_target=np.full(10, np.inf)), "test_target must be finite, got 10 numbers that are not"),
        (Given, parts(train_target=CLASSES[:40] / 2), '; for numbers the criterion is "mse"'),
        (Given, parts(train_target=sums(STEPS[:40])), "; for one of every step set every_step = True"),
        (Given, parts(test_input=STEPS[40:, 1:]), r"test_input must be \[N, 7, 3\] as train_input, got \[10, 6, 3\]"),
        (
            Given,
            parts(train_target=CLASSES[:40] / 2),
            "train_target must be classes 0, 1, .. as integers, got .*float64",
        ),
        (Given, parts(train_target=CLASSES[:40] - 1), "train_target must be classes 0, 1, .., got -1"),
        (Given, parts(train_target=sums(STEPS[:40])), r"train_target must be classes \[40\], got \[40, 7\]"),
        (EveryStep, parts(), r"train_target must be classes \[40, 7\], got \[40\]"),
        (EveryStep, parts(train_input=POINTS[:40]), r"must be \[N, T, I\] for sequences, no size 0, got \[40, 3\]"),
        (Numbers, parts(train_target=np.zeros((40, 2, 2))), r"must be \[40, O\] for 'mse', got \[40, 2, 2\]"),
        (
            Numbers,
            parts(train_target=np.zeros((40, 2))),
            r"test_target must be \[N, 2\] as train_target, got \[10, 1\]",
        ),
    ],
)
def test_arrays_that_do_not_go_together(kind: type[Given], samples: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _ = kind(samples).data


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001, -0.2, float("nan")])
def test_a_split_leaves_both_parts_something(share: float) -> None:
    with pytest.raises(ValueError, match="test_share must leave both parts a sample of 50"):
        Samples.split(POINTS, CLASSES, test_share=share)


def test_positions_in_a_split_are_those_of_the_arrays() -> None:
    steps, numbers = STEPS.copy(), STEPS.sum(axis=(1, 2))
    steps[5, 2, 1], numbers[7] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"split: input must be finite, got 1 .*, the first at \[5, 2, 1\]$"):
        Samples.split(steps, CLASSES)
    with pytest.raises(ValueError, match=r"split: target must be finite, got 1 .*, the first at \[7\]$"):
        Samples.split(STEPS, numbers)


@pytest.mark.parametrize("input", [STEPS, POINTS], ids=["steps", "points"])
def test_inputs_are_standardized_by_the_training_samples(input: np.ndarray) -> None:
    raw = np.concatenate([1e3 + 50 * input[..., :2], np.full_like(input[..., :1], 0.1)], axis=-1)
    train, _, test, targets = made = Samples(raw[:40], CLASSES[:40], raw[40:], CLASSES[40:]).standardized()
    axes = tuple(range(input.ndim - 1))
    mean, deviation = raw[:40].mean(axis=axes), raw[:40].std(axis=axes)
    deviation[2] = 1
    for one, of_it in ((train, raw[:40]), (test, raw[40:])):
        assert isinstance(one, Tensor)
        torch.testing.assert_close(one, torch.tensor((of_it - mean) / deviation, dtype=torch.float32))
    assert isinstance(train, Tensor)
    assert train[..., 2].abs().max() < 1e-6
    assert targets is made.test_target
    assert np.array_equal(np.asarray(targets), CLASSES[40:])


@pytest.mark.parametrize("test", [STEPS[40:, :, :1], STEPS[40:, :, :2], np.zeros(10)])
def test_a_test_of_other_numbers_is_not_standardized(test: np.ndarray) -> None:
    with pytest.raises(ValueError, match="standardized: train_input and test_input must have the same I >= 1 numbers"):
        Samples(STEPS[:40], CLASSES[:40], test, CLASSES[40:]).standardized()


@dataclass(frozen=True)
class NeedsCorrect(Given):
    criterion: ClassVar[Criterion] = "mse"


def test_a_task_of_numbers_says_which_are_right() -> None:
    with pytest.raises(AssertionError, match=r"criterion 'mse' needs a method correct\(output, target\) -> \[B\]"):
        check_task(NeedsCorrect(Samples.split(POINTS, POINTS)))


@dataclass(frozen=True)
class Symbols(Given):
    def make_embedding(self) -> torch.nn.Module:
        return torch.nn.Embedding(50, 3)


def test_large_numbers_are_told_of() -> None:
    large = np.add(STEPS, [0, 120, 0])
    with pytest.warns(UserWarning, match="Given: train_input has large numbers: number 1 of 3 has mean 120 and"):
        _ = Given(Samples.split(large, CLASSES)).data
    with pytest.warns(UserWarning, match="Numbers: train_target has large numbers: number 0 of 1 has mean 30"):
        _ = Numbers(Samples.split(STEPS, 300 + STEPS[:, 0, 0])).data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = Given(Samples.split(large, CLASSES).standardized()).data
        _ = Symbols(Samples.split(np.full((N, T, 1), 40), CLASSES)).data
        _ = Given(Samples.split(STEPS, CLASSES)).data


OWN = """
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpext.tasks import Samples, StoredTask


@dataclass(frozen=True)
class Readings(StoredTask):
    def load(self):
        arrays = np.load(Path(__file__).parent / "readings.npz")
        return Samples.split(arrays["x"], arrays["y"])


@dataclass(frozen=True)
class Broadcasts(Readings):
    criterion = "mse"

    def correct(self, output, target):
        return (output[:, 0] - target).abs() < 0.5


class Floats(Readings):
    def load(self):
        return Samples.split(np.zeros((10, 3)), np.zeros(10))


class Empty(Readings):
    def epoch_length(self, batch_size):
        return 0
"""


def test_a_run_trains_on_arrays_and_resumes_on_them_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    x = np.random.default_rng(1).normal(size=(500, 3)).astype(np.float32)
    np.savez("readings.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    line = "train mine.py:Readings --batch-size 20 --threads 1 --sizes 10 --out run"
    status, _, err = call(f"{line} --epochs 20", capsys)
    assert status == 0, err
    assert json.loads(Path("run/result.json").read_text())["accuracy"] > 0.95
    Path("run/result.json").unlink()
    np.savez("readings.npz", x=x + 1, y=(x[:, 0] > 0).astype(np.int64))
    status, _, err = call(f"{line} --epochs 20 --resume", capsys)
    assert (status, "3 numbers, 2 classes) must be what the run began with" in err) == (1, True), err
    status, _, err = call("train mine.py:Readings --batch-size 401 --out other", capsys)
    assert (status, "batch_size must be at most 400 (the training samples), got 401" in err) == (1, True), err
    status, _, err = call("train mine.py:Empty --batch-size 20 --out other", capsys)
    assert (status, "epoch_length must be >= 1, the whole batches of 20 samples, got 0" in err) == (1, True), err
    status, _, err = call("train mine.py:Broadcasts --batch-size 20 --epochs 1 --out other", capsys)
    assert (status, "correct must return [100], one for each output, got [100, 100]" in err) == (1, True), err
    status, _, err = call("train mine.py:Floats --batch-size 20 --epochs 1 --out other", capsys)
    assert status == 1
    assert err.startswith("tpext: Floats: train_target must be classes 0, 1, .. as integers, got torch.float64")


def test_classes_without_a_sample_are_told_of() -> None:
    with pytest.warns(UserWarning, match=r"Given: train_target has no sample of class 0, of 0 \.\. 4; .*count from 0"):
        _ = Given(Samples.split(POINTS, CLASSES + 1)).data
    with pytest.warns(UserWarning, match=r"no sample of class 0, 1, 2, 3, 4, \.\., of 0 \.\. 1000000001;"):
        _ = Given(Samples.split(POINTS, CLASSES % 2 + 10**9)).data
    steps = np.where(sums(STEPS) == 1, NOT_ASKED, sums(STEPS))
    with pytest.warns(UserWarning, match=r"EveryStep: train_target has no sample of class 1, of 0 \.\. 2;"):
        _ = EveryStep(Samples.split(STEPS, steps)).data


def test_a_command_reads_arrays_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    count = "        with open('loads', 'a') as log:\n            log.write(f'{os.getpid()}\\n')\n"
    begin = "    def load(self):\n"
    Path("mine.py").write_text(f"import os\n{OWN.replace(begin, begin + count, 1)}")
    x = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    np.savez("readings.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    line = "mine.py:Readings --batch-size 20 --epochs 1 --threads 1 --sizes 10"
    status, _, err = call(f"train {line} --out run", capsys)
    assert (status, len(Path("loads").read_text().split())) == (0, 1), err
    # a process that is planning alone
    status, out, err = call(f"sweep {line} --seed 1..20 --dry-run", capsys)
    assert (status, len(Path("loads").read_text().split())) == (0, 2), err
    assert "seed=20" in out


IN_FOLDER = """
@dataclass(frozen=True)
class InFolder(Readings):
    data_dir: Path = Path("nowhere")

    def load(self):
        with open("loads", "a") as log:
            log.write(f"{self.data_dir}\\n")
        arrays = np.load(self.data_dir / "readings.npz")
        return Samples.split(arrays["x"], arrays["y"])
"""


def test_arrays_are_read_from_the_folder_that_a_run_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN + IN_FOLDER)
    x = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    for name in ("one", "two"):
        Path(name).mkdir()
        np.savez(f"{name}/readings.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    line = "train mine.py:InFolder --batch-size 20 --epochs 1 --threads 1 --sizes 10 --out run"
    status, out, err = call(f"{line} --data-dir one", capsys)
    assert (status, Path("loads").read_text().split()) == (0, ["one"]), err
    assert "mine.py:InFolder, 40 + 10 samples of 3 numbers, 2 classes, 10 tanh units" in out
    status, _, err = call(f"{line} --data-dir two --resume", capsys)
    assert status == 0, err
    assert "nowhere" not in Path("loads").read_text()


def test_a_criterion_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Wrong: criterion must be one of .*, got 'crossentropy'"):

        class Wrong(Given):
            criterion = "crossentropy"  # type: ignore[assignment]
