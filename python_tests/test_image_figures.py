"""Figures of runs on images: angles of gradients and of feedback, indices of pooling."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from runs import call, same

import tpext
from tpext.diagnostics import feedback_angles, gradient_angles
from tpext.experiments.figures import draw_image_run
from tpext.experiments.run_folder import RunError

pytestmark = pytest.mark.usefixtures("unrendered")


def test_figures_need_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        draw_image_run(tmp_path)


# --- angles ----------------------------------------------------------------------------------------------------------


def test_gradient_angles_leave_the_network_alone() -> None:
    net = tpext.nn.TargetSequential(
        torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ELU(), torch.nn.Dropout()),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5), torch.nn.Tanh()),
        torch.nn.Linear(5, 3),
        rule=tpext.DifferenceTargets(target_step=0.5, normalize=False),
    )
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    torch.nn.functional.cross_entropy(net(x), y).backward()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()]
    random, rule = torch.get_rng_state(), net.rule
    angles = gradient_angles(net, x, y)
    feedback_angles(net, x)
    assert same(net.state_dict(), state)
    assert all(
        same(a.grad, b) if b is not None else a.grad is None for a, b in zip(net.parameters(), grads, strict=True)
    )
    assert torch.equal(random, torch.get_rng_state())
    assert net.rule is rule
    assert net.training
    assert list(angles) == ["0", "1", "2"]
    assert angles["2"].angle < 1e-6
    assert angles["2"].distance < 1e-6
    assert angles["0"].angle > 10


def test_one_sample_gives_the_feedback_angles_of_a_normalised_network() -> None:
    net = tpext.nn.TargetSequential(
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)),
        torch.nn.Linear(6, 3),
        feedback_init="symmetric",
    )
    assert feedback_angles(net, torch.ones(1, 4)) == {"1": pytest.approx(0, abs=1e-6)}
    assert net.training


def test_gradient_angles_by_hand() -> None:
    net = tpext.nn.TargetSequential(
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh()),
        # its feedback bends, so that the step matters
        torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Tanh()),
    ).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    found = gradient_angles(net, x, y, target_step=0.005)["0"]
    assert found.distance != pytest.approx(gradient_angles(net, x, y)["0"].distance)
    net.rule = tpext.DifferenceTargets(target_step=0.005)
    torch.nn.functional.cross_entropy(net(x), y).backward()
    rule = net.blocks[0][0].weight.grad  # type: ignore[index, union-attr]
    (exact,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(net.blocks(x), y),
        [net.blocks[0][0].weight],  # type: ignore[index, union-attr]
    )
    cosine = (rule * exact).sum() / (rule.norm() * exact.norm())
    assert found.angle == pytest.approx(math.degrees(math.acos(float(cosine))))
    assert found.distance == pytest.approx(float((rule - exact).norm() / exact.norm()))


# --- published figures -----------------------------------------------------------------------------------------------

FIGURE = "--dataset digits --channels 4 4 --hidden-size 8 --batch-size 16"


@pytest.mark.renders
def test_figure_of_the_feedback_angle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(f"figure feedback-angle {FIGURE} --iterations 60 --out {tmp_path}", capsys)
    assert (status, err) == (0, "")
    assert "written:" in out
    with (tmp_path / "feedback_angle.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["iteration"]) for row in table] == list(range(60))
    assert float(table[-1]["angle"]) < 0.8 * float(table[0]["angle"])
    assert (tmp_path / "feedback_angle.png").exists()


@pytest.mark.renders
def test_figure_of_the_gradient_angles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lr = "--lr 0.01 0.05 0.05 --indices clean --second-term expected"
    line = f"figure gradient-angles {FIGURE} --iterations 100 {lr} --seeds 1 2 --out {tmp_path}"
    assert call(line, capsys)[::2] == (0, "")
    with (tmp_path / "gradient_angles.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 * 2 * 4
    angles: dict[tuple[str, str], float] = {}
    for row in table:
        key = row["scheme"], row["layer"]
        angles[key] = angles.get(key, 0.0) + float(row["angle"]) / 2
    for layer in ("conv_0", "conv_1", "fc1"):
        assert angles["symmetric", layer] < angles["L-DRL", layer] < 0.8 * angles["random", layer]
    assert all(angles[scheme, "fc2"] < 1e-5 for scheme in ("random", "DRL", "L-DRL", "symmetric"))
    assert (tmp_path / "gradient_angles.png").exists()


@pytest.mark.renders
def test_figure_of_the_pool_indices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the places of the clean pass less noise brings the least point nearer to the weights; not with the noisy."""
    options = "--batch-size 64 --channels 8 8 --noise 0.5 0.05 --draws 90"
    status, out, err = call(f"figure pool-indices --dataset digits {options} --out {tmp_path}", capsys)
    assert (status, err) == (0, "")
    assert "written:" in out
    with (tmp_path / "pool_indices.csv").open() as file:
        table = list(csv.DictReader(file))
    angles = {(row["noise"], row["indices"]): float(row["angle"]) for row in table}
    assert {row["layer"] for row in table} == {"conv_1"}
    assert len(table) == len(angles) == 4
    assert angles["0.05", "clean"] < angles["0.5", "clean"]
    assert angles["0.05", "clean"] < 0.7 * angles["0.05", "noisy"]
    assert (tmp_path / "pool_indices.png").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pool-indices --channels 4", "channels must be at least two numbers, got (4,)"),
        ("pool-indices --channels 4 4 4 4 4", "channels: "),
        ("pool-indices --noise", "noise must be at least one number, got none"),
        ("pool-indices --noise 0.1 0", "noise must be a number > 0, got 0.0"),
        ("pool-indices --draws 0", "draws must be an integer >= 1, got 0"),
        ("gradient-angles --pixels grid", "pixels=grid needs second_term=expected, got drawn"),
        ("feedback-angle --iterations 0", "iterations must be an integer >= 1, got 0"),
        ("feedback-angle --batch-size 5000", "batch_size must be at most 1293"),
        ("feedback-angle --lr 0", "lr must be a number > 0, got 0.0"),
        ("feedback-angle --noise nan", "noise must be a number > 0, got nan"),
        ("feedback-angle --seed -1", "seed must be an integer >= 0, got -1"),
        ("feedback-angle --channels", "channels must be at least one number, got none"),
        ("feedback-angle --channels 4 0", "channels must be an integer >= 1, got 0"),
        ("feedback-angle --hidden-size 0", "hidden_size must be an integer >= 1, got 0"),
        ("feedback-angle --device tpu9", "device must be a torch device such as cpu or cuda:0, got 'tpu9'"),
        ("feedback-angle --data-dir x", "data_dir does not belong to digits"),
        ("gradient-angles --noise 1 1", "noise must be one number or one for each of the 3 layers with feedback"),
        ("gradient-angles --lr 1 1 1 1", "lr must be one number or one for each of the 3 layers with feedback"),
        ("gradient-angles --lr 1 1 -1", "lr must be a number > 0, got -1.0"),
        ("gradient-angles --drl-lr 0", "drl_lr must be a number > 0, got 0.0"),
        ("gradient-angles --seeds 1 -2", "seeds must be an integer >= 0, got -2"),
        ("gradient-angles --seeds", "seeds must be at least one, got none"),
        ("gradient-angles --schemes", "schemes must be at least one, got none"),
    ],
)
def test_bad_figures(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before anything is computed, which would take hours at the published sizes."""
    name, options = line.split(" ", 1)
    status, out, err = call(f"figure {name} --dataset digits {options} --out {tmp_path / 'out'}", capsys)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_figures_that_fail_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    status, _, err = call(f"figure gradient-angles --dataset digits --out {file / 'out'}", capsys)
    assert (status, err) == (1, f"tpext: out must be a folder, got {file / 'out'}, where {file} is a file\n")
    for line in ("feedback-angle", "gradient-angles --schemes L-DRL"):
        status, out, err = call(f"figure {line} {FIGURE} --iterations 9 --lr 1e30 --out {tmp_path}", capsys)
        assert (status, out) == (3, "")
        assert err.startswith("tpext: diverged at iteration 9: the feedback holds NaN or infinite values.")
