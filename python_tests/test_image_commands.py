"""Runs on images from the command line, with rules and data sets of users."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from image_runs import HIDDEN, OWN, SMALL, small
from runs import call, checkpoint

import tpext
from tpext.experiments import image_train as module
from tpext.experiments import make_image_config, train_images
from tpext.experiments.feedback_presets import METHODS
from tpext.experiments.image_folder import ImageFolder
from tpext.experiments.runs import load_model

pytestmark = pytest.mark.usefixtures("unrendered")


LINE = "train images --dataset digits --network lenet --channels 4 4 --hidden-size 8 --epochs 1 --train-size 60"


@pytest.mark.renders
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{LINE} --rule ldrl --feedback-scale 0.1 --noise 0.1 0.2 0.3 --no-augment --batch-size 20 --out {tmp_path}"
    status, out, err = call(line, capsys)
    assert (status, err) == (0, "")
    assert "digits, lenet 4-4, ldrl (target step 0.7, 1 iterations of the feedback), sgd 0.02" in out
    assert "validation loss" in out
    assert "images" not in out, "not augmented"
    assert f"angles: {tmp_path / 'angles.png'}" in out
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["noise"], config["augment"], config["iterations"]) == ([0.1, 0.2, 0.3], False, [2])
    status, out, _ = call(f"train images --out {tmp_path} --resume", capsys)
    assert status == 0
    assert "complete already" in out
    status, _, err = call(f"{line} --resume --rule backprop", capsys)
    assert status == 1
    assert "rule is ldrl there, backprop was asked for" in err


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rule in ("tied", "backprop"):
        train_images(small(rule), tmp_path / rule)
    picture = tmp_path / "both.png"
    runs = f"{tmp_path / 'tied'} BP={tmp_path / 'backprop'}"
    assert call(f"compare {runs} --out {picture}", capsys)[0] == 0
    assert picture.exists()
    train_images(small("backprop", "mlp"), tmp_path / "mlp")
    status, _, err = call(f"compare {runs} {tmp_path / 'mlp'} --out {picture}", capsys)
    assert status == 1
    assert "runs of different tasks cannot share a figure: digits, lenet; digits, mlp" in err


def test_help_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call("train images --help", capsys)
    assert status == 0
    for name in (*METHODS, "--feedback-start", "--second-term", "fashion-mnist", "meulemans-convnet"):
        assert name in out
    # an option without a text of its own has its default there
    assert not re.search(r"--[\w-]+[^│]*│ *\n? *│? *\(default", out), out
    assert "tpext train images" in " ".join(call("train --help", capsys)[1].split())
    assert "imagenet32" in call("tasks", capsys)[1]


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("--rule magic", 1, "rule must be one of ldrl"),
        ("--rule backprop --noise 1", 1, "noise does not belong to rule=backprop"),
        (
            "--rule backprop --iterations 9",
            1,
            "iterations does not belong to rule=backprop (options of",
        ),
        ("--rule backprop --iterations 9", 1, "how long a run takes is --epochs."),
        ("--iterations 1 2", 1, "iterations must be one number or one for each of the 3 layers"),
        ("--augment --no-augment", 1, "augment and no_augment exclude each other"),
        ("--speed 3", 2, "--speed"),
        ("--batch-size 5000", 1, "batch_size must be at most 60"),
        ("--train-size 5000", 1, "train_size must be 1 .. 1293 (the training images), got 5000"),
        ("--validation 0.0001", 1, "validation must be 0 or leave at least one image"),
        ("--lr 1e30 --rule backprop --batch-size 20", 3, "with a smaller --lr."),
        ("--lr 1e30 --batch-size 20", 3, "with smaller rates (--lr, --feedback-lr), or a larger --feedback-start."),
    ],
)
def test_bad_command_lines(
    line: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got, out, err = call(f"{LINE} {line} --out {tmp_path / 'run'}", capsys)
    assert got == status
    assert message in out + err
    assert "Traceback" not in out + err
    assert (tmp_path / "run").exists() == (status == 3)


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet32"])
def test_missing_files(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(f"train images --dataset {dataset} --data-dir {tmp_path} --out {tmp_path / 'run'}", capsys)
    assert status == 1
    assert "--data-dir DIR" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- rules and data sets of users ------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MLP_LINE = "train images --dataset digits --network mlp --channels 8 6 --epochs 2 --train-size 60 --batch-size 20"


def test_a_network_rule_of_ones_own_trains(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{MLP_LINE} --rule mine.py:Signs --rule-options scale=0.1 noise=0.25"
    status, out, err = call(line, capsys)
    assert (status, err) == (0, "")
    assert "digits, mlp 8-6, mine.py:Signs (5 iterations of the feedback), adam 0.0003" in out
    assert "6 iterations" in out, "none trains feedback alone, as there is none"
    folder = own / "runs" / "digits-mlp-Signs-1"
    config = ImageFolder(folder).read_config()
    assert config is not None
    # noise is a field of the rule and an option of the run
    assert config.rule_options == {
        "target_step": 1.0, "normalize": True, "reduction": "mean", "scale": 0.1, "noise": 0.25
    }  # fmt: skip
    assert (config.noise, config.rule_folder) == ((0.2,), str(own))
    assert checkpoint(folder)["trainer"] is None
    status, _, err = call(f"{line} --resume --rule-options scale=0.2", capsys)
    assert (status, "rule_options.scale is 0.1 there, 0.2 was asked for" in err) == (1, True), err


def test_feedback_of_a_rule_of_ones_own_learns_as_under_ldrl(own: Path) -> None:
    options: Any = {**SMALL, **HIDDEN, "feedback_start": 2, "lr": 0.02, "weight_decay": 0.0}
    mine = make_image_config("digits", "lenet", rule="mine.py:Halved", **options)
    ldrl = make_image_config("digits", "lenet", rule="ldrl", **options)
    for name in ("iterations", "noise", "feedback_lr", "second_term", "samples"):
        assert getattr(mine, name) == getattr(ldrl, name)
    train_images(mine, own / "mine")
    train_images(ldrl, own / "ldrl")
    before = [module.ImagePlan.of(config, config.make_task()).iterations for config in (mine, ldrl)]
    assert before == [2 + 6, 2 + 6]
    left, right = (checkpoint(own / name)["network"] for name in ("mine", "ldrl"))
    assert left.keys() == right.keys()
    assert not torch.equal(left["blocks.conv_0.conv.weight"], right["blocks.conv_0.conv.weight"])


def test_a_layer_rule_of_ones_own_is_that_of_the_linear_layers(own: Path) -> None:
    config = make_image_config("digits", "mlp", rule="mine.py:Pseudo", rule_options={"rtol": 0.2}, **SMALL)
    config_bp = make_image_config("digits", "mlp", rule="backprop", **SMALL)
    torch.manual_seed(0)
    net = config.make_network()
    torch.manual_seed(0)
    plain = config_bp.make_network()
    rule = net.blocks[0].get_submodule("linear").rule
    assert (type(rule).__name__, rule.rtol) == ("Pseudo", 0.2)
    mlp = tpext.nn.MLP([64, 4, 4, 10], "tanh", rule=rule)
    weights = [block.get_submodule("linear").weight for block in plain.blocks]
    for layer, weight in zip(mlp, weights, strict=True):
        layer.weight.data = weight.detach().clone()
        layer.bias.data.zero_()
    input, target = config.make_task().batch(1, 0, 20)
    for model, x in ((net, input), (mlp, input.flatten(1)), (plain, input)):
        torch.nn.functional.cross_entropy(model(x), target).backward()
    for block, layer, other in zip(net.blocks, mlp, plain.blocks, strict=True):
        found = block.get_submodule("linear").weight.grad
        torch.testing.assert_close(found, layer.weight.grad)
        assert block is net.blocks[-1] or not torch.allclose(found, other.get_submodule("linear").weight.grad)
    seen: list[int] = []
    result = train_images(
        make_image_config("digits", "lenet", rule="mine.py:Pseudo", **SMALL, **HIDDEN),
        own / "run",
        callback=lambda row, model: seen.append(row.iteration),
        stop=lambda: False,
    )
    assert result.iterations == 6 == seen[-1]


def test_what_images_cannot_train_is_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ("--rule mine.py:Learned", "must be a class that subclasses tpext.rules.NetworkRule or LayerRule"),
        ("--rule tpext:DifferenceTargetPropagation", "layer rules that learn or solve for weights are for"),
        ("--rule mine.py:Pseudo --noise 1", "noise does not belong to rule=mine.py:Pseudo"),
        ("--rule mine.py:Signs --rule-options size=1", "rule_options must be NAME=VALUE of target_step,"),
        ("--rule mine.py:Signs --rule-options target_step=0", "target_step must be a finite number > 0"),
        ("--rule mine.py:Signs --preset published", "no settings were published for rule=mine.py:Signs"),
        ("--rule ldrl --rule-options scale=1", "rule_options belong to a rule of your own"),
        ("--dataset mine.py:load", "load must be a tpext.tasks.ImageSet"),
        ("--dataset svhn", "dataset must be one of cifar10, mnist"),
    ):
        status, _, err = call(f"{MLP_LINE} {options}", capsys)
        assert (status, message in err) == (1, True), err
    assert not (own / "runs").exists()


def test_a_data_set_from_a_file(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = "train images --dataset mine.py:stripes --channels 3 4 --hidden-size 5 --epochs 1 --batch-size 5 --threads 1"
    status, out, err = call(f"{line} --rule tied --out run", capsys)
    assert (status, err) == (0, "")
    assert "mine.py:stripes, lenet 3-4, tied" in out
    (own / "elsewhere").mkdir()
    monkeypatch.chdir(own / "elsewhere")
    config = ImageFolder(own / "run").read_config()
    assert config is not None
    task = config.make_task()
    assert (task.shape, task.output_size, task.split_size("train")) == ((2, 20, 20), 3, 45)


BRIEF = "--channels 3 4 --hidden-size 5 --epochs 1 --batch-size 5 --threads 1 --rule tied"


def test_what_a_set_does_not_say_is_that_of_its_files(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("stripes", "bare"):
        status, _, err = call(f"train images --dataset mine.py:{name} {BRIEF} --out {name}", capsys)
        assert (status, err) == (0, "")
    left, right = (checkpoint(own / name)["network"] for name in ("stripes", "bare"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    status, out, _ = call("train images --resume --out bare", capsys)
    assert (status, "complete already" in out) == (0, True)
    model, task = load_model(own / "bare")
    assert model(task.test_set(1, 10).input).shape == (10, 3)


def test_a_configuration_reads_no_files(own: Path) -> None:
    for name in ("unread", "unread_classes"):
        config = make_image_config(f"mine.py:{name}", "lenet", rule="tied")
        assert config.block_names == ("conv_0", "conv_1", "fc1", "fc2")
        assert module.describe(config).startswith(f"mine.py:{name}, lenet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--dataset mine.py:wrong",
            "dataset mine.py:wrong: train_images must be [N, 2, 10, 10] or [N, 200], as the set",
        ),
        (
            "--dataset mine.py:bare --augment",
            "augment has no effect on dataset=mine.py:bare, whose flip and padding are 0",
        ),
        ("--dataset mine.py:bare --train-size 46", "train_size must be 1 .. 45 (the training images), got 46"),
    ],
)
def test_a_set_that_does_not_fit_ends_in_one_line(
    options: str, message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(f"train images {options} {BRIEF} --out run", capsys)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"tpext: {message}")
    assert not (own / "run").exists()


@pytest.mark.parametrize("name", ["unread", "unread_classes"])
def test_an_error_of_a_load_of_ones_own_has_its_place(name: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(f"train images --dataset mine.py:{name} {BRIEF} --out run", capsys)
    assert status == 1
    assert "in broken" in err
    assert "ValueError: no such folder\ntpext: stopped by this error in code of your own" in err


@pytest.mark.parametrize(
    ("options", "augment", "says"),
    [
        ("--dataset mine.py:bare", False, None),
        ("--dataset mine.py:bare --no-augment", False, None),
        ("--dataset mine.py:moved", True, "images mirrored and moved by up to 2 pixels"),
        ("--dataset mine.py:moved --no-augment", False, None),
        ("--dataset digits", True, "images moved by up to 1 pixel"),
    ],
)
def test_a_run_says_how_its_images_are_augmented(
    options: str, augment: bool, says: str | None, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(f"train images {options} {BRIEF} --train-size 20 --out run", capsys)
    assert (status, err) == (0, "")
    first = out.replace("\n", " ").partition(" writing to ")[0]
    assert first.partition("seed 1")[2] == ("" if says is None else f", {says}")
    config = ImageFolder(own / "run").read_config()
    assert config is not None
    assert config.augment == augment
