"""Runs on images: what a run computes, that it resumes bit for bit, how it diverges and is interrupted."""

from __future__ import annotations

import copy
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from image_runs import small
from runs import DELETED, Killed, assert_edits_are_named, assert_same_run, checkpoint, kill_after, metrics, same

from tpext.experiments import image_train as module
from tpext.experiments import make_image_config, train_images
from tpext.experiments.feedback_presets import METHODS
from tpext.experiments.image_folder import ImageFolder
from tpext.experiments.image_train import make_optimizer
from tpext.experiments.loop import DivergedError
from tpext.experiments.run_folder import RunError
from tpext.experiments.runs import load_model
from tpext.feedback import LDRL, DifferenceReconstruction, FeedbackTrainer, GradientTrainer

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.mark.parametrize("rule", METHODS)
@pytest.mark.parametrize("network", ["lenet", "mlp"])
def test_every_method_runs(rule: str, network: str, tmp_path: Path) -> None:
    config = small(rule, network, epochs=1)
    result = train_images(config, tmp_path)
    read = metrics(tmp_path)
    start = config.feedback_start or 0
    assert [row["iteration"] for row in read] == ["0", str(start + 3)]
    for row in read:
        assert all(math.isfinite(float(row[name])) for name in ("train_loss", "loss", "accuracy", "top5"))
        for name in config.block_names:
            assert (row[f"gradient_angle_{name}"] == "") == (rule == "backprop")
    # the output layer learns by the loss's own gradient
    if rule != "backprop":
        assert float(read[-1][f"gradient_angle_{config.block_names[-1]}"]) < 1e-5
    assert read[0]["feedback_angle_" + config.block_names[0]] == ""
    if rule in ("ldrl", "parallel-ldrl", "running-ldrl", "closed-form", "tied", "fw-dtp"):
        assert all(row["feedback_angle_" + name] for row in read for name in config.block_names[1:])
    assert (result.iterations, result.rule, result.evaluated_on) == (start + 3, rule, "validation")
    assert 0 <= result.accuracy <= (result.top5 or 0) <= 1
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"curve.png", "angles.png"}
    assert names == {"config.json", "metrics.csv", "result.json", "checkpoint.pt", "best.pt", "lock"} | pictures
    model, task = load_model(tmp_path)
    input, target = task.test_set(1, 360)
    found = model(input.to(next(model.parameters()).dtype)).argmax(1) == target
    assert float(found.double().mean()) == result.accuracy


@pytest.mark.parametrize(("network", "rule"), [("simple-vgg", "ldrl"), ("resnet18", "ldrl"), ("resnet18", "fw-dtp")])
def test_other_networks_run(network: str, rule: str, tmp_path: Path) -> None:
    """All blocks learn, feedback by its trainer alone, statistics by the batches; the numbers recorded are sane."""
    options = {"iterations": 1, "feedback_lr": 1e-5} if rule == "ldrl" else {}
    config = small(rule, network, epochs=1, lr=1e-3, **options)
    torch.manual_seed(config.seed)
    before = config.make_network().state_dict()
    result = train_images(config, tmp_path)
    first, last = metrics(tmp_path)
    start = config.feedback_start or 0
    assert (first["iteration"], last["iteration"], result.iterations) == ("0", str(start + 3), start + 3)
    for row in (first, last):
        assert all(math.isfinite(float(row[name])) for name in ("train_loss", "loss", "accuracy", "top5"))
        # the output layer learns by the loss's own gradient, the others by targets
        angles = [float(row[f"gradient_angle_{name}"]) for name in config.block_names]
        assert angles[-1] < 1e-5 < min(angles[:-1])
    after = checkpoint(tmp_path)["network"]
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in after if name.startswith("blocks.")} == {n for n in moved if n.startswith("blocks.")}
    feedback = {name for name in after if name.startswith("feedback.") and name.endswith("weight")}
    assert feedback
    assert {name for name in moved if name.startswith("feedback.")} == (feedback if rule == "ldrl" else set())
    counts = [int(value) for name, value in after.items() if name.endswith("num_batches_tracked")]
    assert counts == ([3] * len(counts) if rule == "fw-dtp" else [])
    assert bool(counts) == (rule == "fw-dtp")


def test_it_learns(tmp_path: Path) -> None:
    config = make_image_config("digits", "lenet", rule="closed-form", epochs=4, lr=0.05)
    result = train_images(config, tmp_path)
    assert result.accuracy > 0.8
    read = metrics(tmp_path)
    assert [float(row["epoch"]) for row in read] == [0, 1, 2, 3, 4]
    assert float(read[-1]["gradient_angle_fc1"]) < 5
    best = ImageFolder(tmp_path).load_best()
    network, task = load_model(tmp_path)
    input, target = task.test_set(1, task.split_size("test"))
    assert float((network(input).argmax(dim=1) == target).double().mean()) == result.accuracy
    assert best["iteration"] == result.best_iteration
    assert best["accuracy"] == result.best_evaluation == max(float(row["accuracy"]) for row in read[1:])


def test_the_best_network_is_the_first_of_equals(tmp_path: Path) -> None:
    """In the result and in best.pt alike; at this rate no output changes enough for another class."""
    result = train_images(small("backprop", "mlp", lr=1e-12, epochs=3), tmp_path)
    rows = metrics(tmp_path)
    assert len({row["accuracy"] for row in rows}) == 1
    assert ImageFolder(tmp_path).load_best()["iteration"] == result.best_iteration == int(rows[1]["iteration"])


@pytest.mark.parametrize("rule", ["ldrl", "running-ldrl"])
def test_the_default_settings_learn(rule: str, tmp_path: Path) -> None:
    """What the README's command runs; at higher rates these runs diverge in the middle."""
    assert train_images(make_image_config("digits", rule=rule), tmp_path).accuracy > 0.7


@pytest.mark.parametrize("network", ["simple-vgg", "lenet", "mlp"])
def test_fixed_random_feedback_learns_with_batch_normalisation(network: str, tmp_path: Path) -> None:
    config = make_image_config("digits", network, rule="fw-dtp", epochs=3)
    assert config.batchnorm
    assert train_images(config, tmp_path).accuracy > 0.6


def test_an_evaluation_in_parts_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 100 images of each set, the last of fewer."""
    monkeypatch.setattr(module, "EVALUATION_BATCH", 100)
    config = small("backprop", "mlp", precision="64", validation=0.2, train_size=None, epochs=1)
    result = train_images(config, tmp_path)
    net, task = config.make_network().eval(), config.make_task()
    net.load_state_dict(checkpoint(tmp_path)["network"])
    row = {name: float(cell) for name, cell in metrics(tmp_path)[-1].items() if cell}
    found = {
        "test": (result.test_loss, result.accuracy, result.top5),
        "validation": (row["loss"], row["accuracy"], row["top5"]),
    }
    counts = [task.split_size("test"), task.split_size("validation")]
    assert counts[0] != counts[1]
    assert all(count > 100 and count % 100 for count in counts)
    for split, scores in found.items():
        ((input, target),) = task.evaluation_batches(split, max(counts))  # type: ignore[arg-type]
        with torch.no_grad():
            output = net(input.double())
        loss = torch.nn.functional.cross_entropy(output, target).item()
        places = (output > output.gather(1, target[:, None])).sum(1)
        shares = [(places < top).double().mean().item() for top in (1, 5)]
        assert scores == pytest.approx((loss, *shares), rel=1e-12)


def test_the_best_network_has_an_accuracy_of_its_own(tmp_path: Path) -> None:
    """Another network put into best.pt changes what is said of the best, and nothing else."""
    config = small("backprop", "mlp", precision="64")
    before = train_images(config, tmp_path)
    (tmp_path / "result.json").unlink()
    folder, net, task = ImageFolder(tmp_path), config.make_network().eval(), config.make_task()
    folder.save_best({**folder.load_best(), "network": net.state_dict()})
    after = train_images(config, tmp_path, resume=True)
    ((input, target),) = task.evaluation_batches("test", task.split_size("test"))
    with torch.no_grad():
        accuracy = (net(input.double()).argmax(1) == target).double().mean().item()
    assert accuracy not in (before.best_accuracy, before.accuracy)
    assert after.best_accuracy == pytest.approx(accuracy, rel=1e-12)
    assert (after.accuracy, after.error) == (before.accuracy, 1 - before.accuracy)


def test_feedback_turns_towards_the_blocks(tmp_path: Path) -> None:
    config = make_image_config(
        "digits", "simple-vgg", indices="clean", noise=0.1, feedback_lr=0.1, iterations=5, epochs=1
    )
    train_images(config, tmp_path)
    first, last = metrics(tmp_path)
    for name in config.block_names[1:]:
        assert float(last[f"feedback_angle_{name}"]) < 0.6 * float(first[f"feedback_angle_{name}"])


@pytest.mark.parametrize("rule", ["ldrl", "parallel-ldrl", "running-ldrl", "ddtp-rhl", "dtp", "backprop"])
def test_an_interrupted_run_resumes_to_the_bit(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(rule, "simple-vgg" if rule == "ldrl" else "lenet", eval_interval=2)
    whole = train_images(config, tmp_path / "whole")
    for stop in (1, 5):
        parts = tmp_path / str(stop)
        kill_after(stop, module._Run, monkeypatch)
        with pytest.raises(Killed):
            train_images(config, parts)
        monkeypatch.undo()
        resumed = train_images(config, parts, resume=True)
        assert_same_run(tmp_path / "whole", parts)
        assert (resumed.accuracy, resumed.best_accuracy) == (whole.accuracy, whole.best_accuracy)
        assert train_images(config, parts, resume=True) == resumed
    with pytest.raises(RunError, match="already holds a run"):
        train_images(config, parts)
    with pytest.raises(RunError, match="batch_size is 20 there, 10 was asked for"):
        train_images(small(rule, config.network, eval_interval=2, batch_size=10), parts, resume=True)


def test_an_edited_field_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    config = small(feedback_optimizer="adam")
    train_images(config, tmp_path)
    (tmp_path / "result.json").unlink()
    ours = '["trainer"]["optimizers"][0]'
    edits = [
        ('["iteration"]', -3, "iteration must be an integer >= 0, got -3"),
        ('["iteration"]', "x", "iteration must be of type int, got 'x'"),
        ('["rows"]', [], "rows must be a list of at least one evaluation, got []"),
        ('["rows"][1]', [1], "rows[1] must be a list of iteration, epoch, train_loss, loss, accuracy, top5"),
        ('["rows"][1][5]', "x", "rows[1].top5 must be of type float | None, got 'x'"),
        ('["rows"][1][8]', (None,), "rows[1].feedback_angles must be 4 angles, got (None,)"),
        ('["rows"][1][9]', 3.0, "rows[1].gradient_angles must be of type tuple"),
        ('["network"]', DELETED, "network is missing"),
        ('["network"]["blocks.conv_1.conv.bias"]', torch.zeros(1), "size mismatch for blocks.conv_1.conv.bias"),
        ('["optimizer"]["param_groups"][0]["momentum"]', "x", "optimizer.param_groups[0].momentum must be a number"),
        ('["optimizer"]["state"][1]', [3], "optimizer.state[1] must be a dict, got [3]"),
        ('["trainer"]', DELETED, "trainer is missing"),
        ('["trainer"]', 3, "trainer must be the state of this run's LDRL, got another"),
        ('["trainer"]["steps"]', "x", "LDRL: steps must be an integer >= 0, got 'x'"),
        ('["trainer"]["optimizers"]', DELETED, "trainer must be the state of this run's LDRL"),
        (f'{ours}["param_groups"][0]["lr"]', "x", "trainer.optimizers[0].param_groups[0].lr must be a number"),
        (f'{ours}["state"][0]["exp_avg"]', "x", "trainer.optimizers[0].state[0].exp_avg must be a tensor"),
    ]
    assert_edits_are_named(tmp_path, edits, lambda: train_images(config, tmp_path, resume=True))
    best = [
        ('["network"]', DELETED, "network is missing"),
        ('["network"]["blocks.conv_1.conv.bias"]', torch.zeros(1), "size mismatch for blocks.conv_1.conv.bias"),
    ]
    assert_edits_are_named(tmp_path, best, lambda: train_images(config, tmp_path, resume=True), "best.pt")


def test_edited_running_means_are_named(tmp_path: Path) -> None:
    config = small("running-ldrl", epochs=1)
    train_images(config, tmp_path)
    (tmp_path / "result.json").unlink()
    edits = [
        ('["trainer"]["sums"]', [], "state must have sums of 3 layers, got 0"),
        ('["trainer"]["sums"][0]', 3, "sums must be two tensors or None for each layer, got 3"),
    ]
    assert_edits_are_named(tmp_path, edits, lambda: train_images(config, tmp_path, resume=True))


def test_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = module._Run._step

    def interrupted(run: module._Run, iteration: int) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        yield from step(run, iteration)

    monkeypatch.setattr(module._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="a checkpoint is saved at iteration 1"):
        train_images(small(), tmp_path)
    assert checkpoint(tmp_path)["iteration"] == 1


def test_divergence(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="diverged at iteration"):
        train_images(small("backprop", lr=1e30), tmp_path)
    for value in checkpoint(tmp_path)["network"].values():
        assert torch.isfinite(value).all()
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    "options",
    [{}, {"network": "resnet18", "batchnorm": True, "channels": (4, 4), "iterations": 1, "feedback_lr": 1e-5}],
    ids=["lenet", "normalised"],
)
def test_evaluation_draws_no_random_numbers(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More evaluations change nothing; none trains the feedback or moves the generators or the statistics."""
    seen = []
    add_row = module._Run._add_row

    def watched(run: module._Run, progress: Any) -> None:
        assert run.trainer is not None
        before = torch.get_rng_state(), run.trainer.steps, copy.deepcopy(run.model.state_dict())
        add_row(run, progress)
        assert torch.equal(before[0], torch.get_rng_state())
        assert run.trainer.steps == before[1]
        assert any(name.endswith("running_mean") for name in before[2]) == ("batchnorm" in options)
        assert same(dict(run.model.state_dict()), dict(before[2]))
        assert run.model.training
        assert all(parameter.grad is None or parameter in dict.fromkeys(run.model.blocks.parameters())
                   for parameter in run.model.parameters())  # fmt: skip
        seen.append(run.iteration)

    monkeypatch.setattr(module._Run, "_add_row", watched)
    train_images(small(**options), tmp_path / "few")
    train_images(small(**options, eval_interval=1), tmp_path / "many")
    assert seen == [0, 5, 8, 0, 3, 4, 5, 6, 7, 8]
    assert same(checkpoint(tmp_path / "few")["network"], checkpoint(tmp_path / "many")["network"])


@pytest.mark.parametrize(("rule", "first"), [("ldrl", True), ("ldrl", False), ("closed-form", None)])
def test_feedback_before_or_after(rule: str, first: bool | None, tmp_path: Path) -> None:
    """The order decides which feedback the first batch's targets go through; without a choice that of this batch."""
    options = {} if first is None else {"feedback_first": first, "feedback_start": 0}
    config = small(rule, **options, train_size=20, epochs=1, precision="64")
    task = config.make_task()
    torch.manual_seed(config.seed)
    net = config.make_network()
    trainer = config.make_trainer(net)
    assert isinstance(trainer, FeedbackTrainer)
    optimizer = make_optimizer(config, net)
    batch = task.batch(config.seed, 0, config.batch_size)
    trace = net.trace(batch.input.double())
    loss = torch.nn.functional.cross_entropy(trace.output, batch.target)
    if first is False:
        loss.backward()
        trainer.step(trace)
    else:
        trainer.step(trace)
        loss.backward()
    optimizer.step()
    train_images(config, tmp_path)
    assert same(checkpoint(tmp_path)["network"], net.state_dict())


def test_without_validation_set(tmp_path: Path) -> None:
    result = train_images(small("backprop", validation=0.0), tmp_path)
    assert result.evaluated_on == "test"
    assert result.accuracy == float(metrics(tmp_path)[-1]["accuracy"])


def test_trainers_have_their_settings() -> None:
    config = small(
        "ldrl", iterations=(3, 4, 5), noise=(0.1, 0.2, 0.3), feedback_lr=(1.0, 2.0, 3.0), second_term="expected"
    )
    trainer = config.make_trainer(config.make_network())
    assert isinstance(trainer, LDRL)
    assert (trainer.iterations, trainer.noise, trainer.second_term) == ([3, 4, 5], [0.1, 0.2, 0.3], "expected")
    assert [one.param_groups[0]["lr"] for one in trainer.optimizers] == [1.0, 2.0, 3.0]
    control = small("ddtp-control")
    trainer = control.make_trainer(control.make_network())
    assert isinstance(trainer, DifferenceReconstruction)
    assert not trainer.difference
    assert isinstance(trainer, GradientTrainer)
    assert isinstance(trainer.optimizers[0], torch.optim.Adam)
    rates = make_optimizer(small("backprop", lr=(1.0, 2.0, 3.0, 4.0)), control.make_network()).param_groups
    assert [group["lr"] for group in rates] == [1.0, 2.0, 3.0, 4.0]


QUARTERS = """
from pathlib import Path
import torch
from tpext.tasks import ImageSet, load_mnist
from tpext.tasks.idx import Images

def load(folder):
    whole = load_mnist(folder)
    images = whole.train_images[:2000].view(-1, 14, 2, 14, 2).float().mean((2, 4)).byte()
    labels = whole.train_labels[:2000]
    return Images(images[:1600], labels[:1600], images[1600:], labels[1600:])

quarters = ImageSet(load, (1, 14, 14), {"standard": ((0.13,), (0.31,))})
"""


@pytest.mark.parametrize(
    ("rule", "accuracy"),
    [
        ("ldrl", 0.8),
        pytest.param("running-ldrl", 0.8, marks=pytest.mark.slow),
        # above chance by three standard errors; the method learns slowly
        pytest.param("dtp", 0.15, marks=pytest.mark.slow),
    ],
)
def test_small_images_of_ones_own_train_from_the_defaults(
    rule: str, accuracy: float, tmp_path: Path, shared: Path
) -> None:
    """Digits of MNIST in 14 x 14 pixels, where the rates of the 8 x 8 digits diverge at iteration 175."""
    (tmp_path / "mine.py").write_text(QUARTERS)
    place = f"{tmp_path / 'mine.py'}:quarters"
    config = make_image_config(place, rule=rule, epochs=5, threads=1, data_dir=str(shared / "data"))
    assert train_images(config, tmp_path / "run").accuracy > accuracy
