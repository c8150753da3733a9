"""Learned feedback: the numbers of the original codes of Ernoult et al. (2022) and Meulemans et al. (2020)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from target_networks import DOUBLE, assert_equal, degrees, normal_noise, published, simple_vgg
from torch import Tensor, nn
from torch.nn import functional

import tpext
from tpext.feedback import LDRL, DifferenceReconstruction, Draw, Reconstruction, layered_feedback
from tpext.nn import TargetSequential

# Ernoult et al.: SimpleVGG


def named_weights(net: TargetSequential) -> dict[str, Tensor]:
    """The parameters of a SimpleVGG by their published names: ``F`` of the blocks, ``G`` of their feedback."""
    found = {f"F.{name}": p for name, p in net.blocks.named_parameters()}
    return found | {"G." + name.replace(".parts", ""): p for name, p in net.feedback.named_parameters()}


def load(net: TargetSequential, golden: dict[str, Tensor]) -> None:
    for name, parameter in named_weights(net).items():
        parameter.data.copy_(golden[f"{name}@0"])


@pytest.mark.parametrize(
    ("file", "rule", "trainer", "lr"),
    [
        ("ldrl", tpext.DifferenceTargets, LDRL, 0.05),
        ("vanilla_dtp", tpext.DifferenceTargets, Reconstruction, 1e-3),
        ("target_prop", tpext.Targets, Reconstruction, 1e-3),
    ],
)
def test_two_steps_are_the_published_ones(file: str, rule: Any, trainer: Any, lr: float) -> None:
    golden = published(f"{file}_simplevgg_tiny.npz")
    iterations, sides = [2, 3], 2 if trainer is LDRL else 1

    def noise(draw: Draw, like: Tensor) -> Tensor:
        before = iterations[0] if draw.layer == 2 else 0
        return golden[f"step{draw.step + 1}.noise{(before + draw.draw) * sides + draw.output}"]

    net = TargetSequential(simple_vgg([4, 6], 5, 8), rule=rule(target_step=0.7, normalize=False))
    load(net, golden)
    feedback = trainer(net, lr=[0.01, 0.05], noise=[0.4, 0.2], iterations=iterations, momentum=0.9, noise_source=noise)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    for step in (1, 2):
        trace = net.trace(golden["x"])
        records = feedback.step(trace, record=True)
        loss = functional.cross_entropy(trace.output, golden["y"])
        optimizer.zero_grad()
        loss.backward()
        assert_equal(trace.output, golden[f"step{step}.logits"])
        for layer in (1, 2):
            found = [record for record in records if record.layer == layer]
            assert_equal(torch.stack([r.loss for r in found]), golden[f"step{step}.fb_losses.layer{layer}"])
            # published is a cosine with 1e-8 beside a product of norms of 1 to 10
            angles = torch.stack([r.angle for r in found])
            assert_equal(angles, golden[f"step{step}.fb_angles.layer{layer}"], 2e-8)
            assert_equal(torch.stack([r.distance for r in found]), golden[f"step{step}.fb_dists.layer{layer}"])
        grad = torch.softmax(trace.output.detach(), 1) - functional.one_hot(golden["y"], 5)
        moves = net.rule.displacements(trace.calls, -0.7 * grad)
        losses = torch.stack([move.square().sum() / (2 * len(move)) for move in moves])
        assert_equal(losses, golden[f"step{step}.fw_losses"])
        for name, parameter in net.blocks.named_parameters():
            assert_equal(parameter.grad, golden[f"step{step}.grad.F.{name}"])
        optimizer.step()
        for name, parameter in named_weights(net).items():
            assert_equal(parameter, golden[f"{name}@{step}"])


def deterministic(shape: torch.Size, k: int, scale: float) -> Tensor:
    """``det`` of the golden files' README."""
    j = np.arange(shape.numel())
    return torch.from_numpy(scale * np.sin(0.7 * j + 1.3 * k + 0.11 * j * (j % 7))).reshape(shape)


def gradients_beside_back_propagation(net: TargetSequential, x: Tensor, y: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Name, gradient by the rule and by the chain rule of each parameter."""
    parameters = dict(net.blocks.named_parameters())
    ours, exact = (
        torch.autograd.grad(functional.cross_entropy(run(x), y), list(parameters.values())) for run in (net, net.blocks)
    )
    return list(zip(parameters, ours, exact, strict=True))


@pytest.mark.parametrize("beta", [0.7, 0.05, 0.005, 0.0001])
@pytest.mark.parametrize("tied", [0, 1])
def test_angles_to_back_propagation_are_the_published_ones(beta: float, tied: int) -> None:
    golden = published("bp_vs_dtp_angles_tiny.npz")
    net = TargetSequential(
        simple_vgg([8, 8, 8], 5, 16, bias=False),
        rule=tpext.DifferenceTargets(target_step=beta),
        feedback_init="tied" if tied else "random",
    )
    weights = [*enumerate(net.blocks.parameters()), *enumerate(reversed(list(net.feedback.parameters())), 50)]
    for k, weight in weights:
        weight.data.copy_(deterministic(weight.shape, k, 1.5 / weight[0].numel() ** 0.5))
    x, y = deterministic(torch.Size([4, 3, 16, 16]), 7, 0.8), torch.tensor([0, 3, 1, 4])
    for name, ours, exact in gradients_beside_back_propagation(net, x, y):
        key = f"beta{beta:g}.sym{tied}.{name}"
        # 1e-16 of the outputs moves such a cosine by that over beta; a displacement's rounding the distance
        torch.testing.assert_close(
            torch.tensor(degrees(ours, exact, eps=1e-8), dtype=DOUBLE), golden[f"{key}.angle"], rtol=1e-6, atol=0
        )
        torch.testing.assert_close((ours - exact).norm() / ours.norm(), golden[f"{key}.dist"], rtol=1e-8, atol=1e-11)


def test_relu_is_far_from_back_propagation_even_with_tied_weights() -> None:
    """39.3 and 36.9 degrees where ELU has 2.2 and 1.0: units at zero let targets through."""
    blocks = simple_vgg([8, 8, 8], 5, 16, bias=False)
    for block in list(blocks.values())[:3]:
        block.rho = nn.ReLU()
    for k, weight in enumerate(nn.Sequential(blocks).parameters()):
        weight.data.copy_(deterministic(weight.shape, k, 1.5 / weight[0].numel() ** 0.5))
    with pytest.warns(UserWarning, match="with ReLU even tied feedback stays some 40 degrees"):
        net = TargetSequential(blocks, rule=tpext.DifferenceTargets(target_step=1e-4), feedback_init="tied")
    x, y = deterministic(torch.Size([4, 3, 16, 16]), 7, 0.8), torch.tensor([0, 3, 1, 4])
    angles = [degrees(ours, exact) for _, ours, exact in gradients_beside_back_propagation(net, x, y)]
    np.testing.assert_allclose(angles[:2], [39.3, 36.9], atol=0.05)


# Meulemans et al.: a network of three layers


def meulemans_network(golden: dict[str, Tensor], direct: bool) -> TargetSequential:
    """[6, 5, 5, 3] with tanh; with direct feedback the last hidden layer has no bias in their code."""
    hidden = [nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 5, bias=not direct), nn.Tanh())]
    blocks = [block.double() for block in (*hidden, nn.Sequential(nn.Linear(5, 3)))]
    options: dict[str, Any] = {"target_step": 0.3, "normalize": False, "reduction": "sum"}
    if direct:
        net = TargetSequential(*blocks, rule=tpext.DirectTargets(**options), input_shape=(6,))
    else:
        net = TargetSequential(*blocks, rule=tpext.DifferenceTargets(**options), feedback=layered_feedback(blocks))
    for index, block in enumerate(blocks):
        block[0].weight.data.copy_(golden[f"p._layers.{index}._weights"])
        if block[0].bias is not None:
            block[0].bias.data.copy_(golden[f"p._layers.{index}._bias"])
    for key, parameter in meulemans_feedback(net, direct).items():
        parameter.data.copy_(golden.get(f"p.{key}", torch.zeros(())))
    return net


def meulemans_feedback(net: TargetSequential, direct: bool) -> dict[str, Tensor]:
    """The feedback's parameters by their published names."""
    named = {}
    for index in (1, 2):
        feedback: Any = net.feedback[str(index)]
        linear = feedback.linear if direct else feedback.mirrored.parts["0"]
        part = f"_layers.{index - 1}._fb_mlp.layers.0." if direct else f"_layers.{index}._feedback"
        named |= {f"{part}weight" + "s" * (not direct): linear.weight, f"{part}bias": linear.bias}
    return named


@pytest.mark.parametrize(
    ("file", "trainer", "options"),
    [
        ("dtp", Reconstruction, {"reduction": "element"}),
        ("dtpdrl", DifferenceReconstruction, {}),
        ("ddtp_linear", DifferenceReconstruction, {}),
    ],
)
def test_step_of_meulemans(file: str, trainer: Any, options: dict[str, Any]) -> None:
    golden = published(f"meul_{file}.npz")
    direct = file == "ddtp_linear"
    net = meulemans_network(golden, direct)
    trace = net.trace(golden["x"])
    assert_equal(trace.output, golden["pred"])
    loss = functional.cross_entropy(trace.output, golden["y"])
    assert_equal(loss, golden["loss"])
    (grad,) = torch.autograd.grad(loss, trace.output, retain_graph=True)
    moves = net.rule.displacements(trace.calls, -0.3 * grad)
    loss.backward()
    for index, (call, move) in enumerate(zip(trace.calls, moves, strict=True)):
        assert_equal(call.output, golden[f"act{index}"])
        assert_equal(call.output + move, golden[f"target{index}"])
        # their local loss is a mean without the half
        scale = 2 / len(golden["x"])
        linear = net.blocks[index][0]
        assert_equal(linear.weight.grad * scale, golden[f"gradW{index}"])
        if linear.bias is not None:
            assert_equal(linear.bias.grad * scale, golden[f"gradb{index}"])
    feedback = meulemans_feedback(net, direct)
    before = {key: parameter.clone() for key, parameter in feedback.items()}
    records = trainer(
        net, noise=0.1, lr=1.0, noise_source=lambda draw, like: golden[f"noise{draw.layer - 1}"], **options
    ).step(trace, record=True)
    losses = [value for key, value in sorted(golden.items()) if key.startswith("recloss")]
    assert losses
    assert_equal(torch.stack([record.loss for record in records]), torch.stack(losses).flatten())
    compared = 0
    for key, parameter in feedback.items():
        if f"fbgrad.{key}" in golden:
            assert_equal(before[key] - parameter, golden[f"fbgrad.{key}"])
            compared += 1
    assert compared == len([key for key in golden if key.startswith("fbgrad.")]) > 0


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_damped_gauss_newton_update(damping: float) -> None:
    """Of a linear network whose Jacobian for the hidden state is the matrix."""
    golden = published("damped_gn_update.npz")
    net = TargetSequential(
        nn.Linear(2, 5, dtype=DOUBLE),
        nn.Linear(5, 3, dtype=DOUBLE),
        rule=tpext.GaussNewtonTargets(damping=damping),
    )
    net.blocks[1].weight.data.copy_(golden["J"])
    calls = net.trace(torch.ones(1, 2, dtype=DOUBLE)).calls
    hidden = net.rule.displacements(calls, golden["e"].reshape(1, 3))[0]
    assert_equal(hidden[0], golden[f"upd_{damping}"].flatten())


def test_training_curve_of_the_feedback(shared: Path) -> None:
    """Angles to the weights, whose noise was not kept, and to back-propagation before and after."""
    golden = published(shared / "golden" / "dtp" / "feedback_training_curve_tiny.npz")
    blocks = simple_vgg([16, 16, 16], 5, 16, bias=False)
    net = TargetSequential(blocks, rule=tpext.DifferenceTargets(target_step=0.7))
    load(net, golden)

    def angles(net: TargetSequential) -> list[float]:
        return [degrees(a, b, 1e-8) for _, a, b in gradients_beside_back_propagation(net, golden["x"], golden["y"])]

    np.testing.assert_allclose(angles(net), golden["bp_angle_before"], rtol=1e-6)
    symmetric = TargetSequential(blocks, rule=net.rule, feedback_init="symmetric")
    np.testing.assert_allclose(angles(symmetric), golden["bp_angle_sym"], rtol=1e-6)
    records = LDRL(
        net,
        lr=[0.005, 0.005, 0.03],
        noise=[0.4, 0.4, 0.2],
        iterations=300,
        momentum=0.9,
        noise_source=normal_noise,
    ).step(golden["x"], record=True)
    for layer in (1, 2, 3):
        found = torch.stack([record.angle for record in records if record.layer == layer])
        for at in (slice(0, 10), slice(20, 30), slice(50, 60), slice(100, 120), slice(250, 300)):
            assert abs(found[at].mean() - golden[f"angle{layer}"][at].mean()) < 4, (layer, at)
    np.testing.assert_allclose(angles(net), golden["bp_angle_after"], atol=3)
