"""Networks of the literature: sizes, names and parameter counts as published."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import tpext
from tpext.feedback import BlockCall, IdentityFeedback
from tpext.nn import TargetSequential, networks
from tpext.nn.networks import BasicBlock

IMAGE_NETWORKS = [
    networks.simple_vgg,
    networks.lenet,
    networks.resnet18,
    networks.resnet34,
    networks.meulemans_convnet,
]


def count(blocks: dict[str, nn.Module]) -> int:
    return sum(parameter.numel() for block in blocks.values() for parameter in block.parameters())


def shapes(blocks: dict[str, nn.Module], input: torch.Tensor) -> list[tuple[int, ...]]:
    """The shape of each block's output, without the batch."""
    found = []
    for block in blocks.values():
        input = block(input)
        found.append(tuple(input.shape[1:]))
    return found


# --- what the papers' code has ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "n_classes", "published"),
    [
        (networks.simple_vgg, 10, 2_221_706),
        (networks.simple_vgg, 1000, 2_729_576),
        (networks.lenet, 10, 2_156_490),
        (networks.resnet18, 10, 11_164_362),
        (networks.resnet34, 10, 21_265_098),
        # the same sizes as LeNet's
        (networks.meulemans_convnet, 10, 2_156_490),
    ],
)
def test_published_parameter_counts(build: Callable, n_classes: int, published: int) -> None:
    assert count(build(n_classes=n_classes, device="meta")) == published


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (networks.simple_vgg, [(128, 16, 16), (128, 8, 8), (256, 4, 4), (256, 2, 2), (512, 1, 1), (10,)]),
        (networks.lenet, [(32, 16, 16), (64, 8, 8), (512,), (10,)]),
        (networks.meulemans_convnet, [(32, 16, 16), (64, 8, 8), (512,), (10,)]),
        (networks.resnet18, [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (10,)]),
        (networks.resnet34, [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (10,)]),
    ],
)
def test_published_sizes_of_each_block(build: Callable, published: list[tuple[int, ...]]) -> None:
    blocks = build(device="meta")
    assert shapes(blocks, torch.empty(2, 3, 32, 32, device="meta")) == published


def test_names_of_parameters() -> None:
    def names(blocks: dict[str, nn.Module]) -> list[str]:
        return [name for name, _ in nn.Sequential(blocks).named_parameters()]

    pairs = [f"conv_{index}.conv.{kind}" for index in range(5) for kind in ("weight", "bias")]
    assert names(networks.simple_vgg(device="meta")) == [*pairs, "fc.linear.weight", "fc.linear.bias"]
    layers = ["conv_0.conv", "conv_1.conv", "fc1.linear", "fc2.linear"]
    expected = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert names(networks.lenet(device="meta")) == expected
    resnet = nn.Sequential(networks.resnet18(use_batchnorm=True, device="meta")).state_dict()
    for name in (
        "layer_0.conv.weight",
        "layer_0.bn.running_mean",
        "layer_1.block_1.conv1.weight",
        "layer_2.block_0.bn2.weight",
        "layer_2.block_0.shortcut.conv.weight",
        "layer_2.block_0.shortcut.bn.weight",
        "fc.linear.bias",
    ):
        assert name in resnet
    assert not any("shortcut" in name for name in resnet if "layer_1" in name or "block_1" in name)


def test_order_inside_the_blocks() -> None:
    vgg, lenet = networks.simple_vgg((1, 9, 9), channels=(4, 5)), networks.lenet((1, 9, 9))
    assert [name for name, _ in vgg["conv_0"].named_children()] == ["conv", "rho", "pool"]
    assert [name for name, _ in vgg["fc"].named_children()] == ["reshape", "linear"]
    assert [name for name, _ in lenet["fc1"].named_children()] == ["reshape", "linear", "rho"]
    assert [name for name, _ in lenet["fc2"].named_children()] == ["linear"]


def test_a_vgg_block_by_hand() -> None:
    block = networks.simple_vgg((2, 6, 8), channels=(3,), dtype=torch.float64)["conv_0"]
    input = torch.randn(4, 2, 6, 8, dtype=torch.float64)
    conv = functional.conv2d(input, block.conv.weight, block.conv.bias, padding=1)
    expected = functional.elu(conv).unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    torch.testing.assert_close(block(input), expected, rtol=1e-12, atol=1e-12)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", IMAGE_NETWORKS)
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 16, 20), (2, 8, 8)])
def test_any_size_of_image(build: Callable, image_shape: tuple[int, int, int]) -> None:
    options = {"channels": (4, 5, 6)} if build is networks.simple_vgg else {}
    blocks = build(image_shape, 7, **options, device="meta", dtype=torch.float64)
    output = nn.Sequential(blocks)(torch.empty(3, *image_shape, device="meta", dtype=torch.float64))
    assert output.shape == (3, 7)
    assert output.dtype == torch.float64


@pytest.mark.parametrize(
    ("build", "activation", "kind"),
    [
        (networks.simple_vgg, None, nn.ELU),
        (networks.simple_vgg, "relu", nn.ReLU),
        (networks.lenet, None, nn.ELU),
        (networks.lenet, "relu", nn.ReLU),
        (networks.meulemans_convnet, None, nn.Tanh),
        (networks.meulemans_mlp, None, nn.Tanh),
    ],
)
def test_activations(build: Callable, activation: str | None, kind: type[nn.Module]) -> None:
    blocks = build(device="meta", **({} if activation is None else {"activation": activation}))
    used = [module for block in blocks.values() for module in block if isinstance(module, (nn.ELU, nn.ReLU, nn.Tanh))]
    assert used
    assert {type(module) for module in used} == {kind}
    # target propagation still needs what an in-place activation would overwrite
    assert not any(getattr(module, "inplace", False) for module in used)


@pytest.mark.parametrize("build", [networks.simple_vgg, networks.lenet])
def test_networks_without_bias(build: Callable) -> None:
    names = [name for name, _ in nn.Sequential(build(bias=False, device="meta")).named_parameters()]
    assert names
    assert all(name.endswith("weight") for name in names)


def test_meulemans_weights_are_xavier_normal() -> None:
    blocks = networks.meulemans_mlp()
    assert [tuple(block.get_submodule("linear").weight.shape) for block in blocks.values()] == [
        (256, 784),
        *[(256, 256)] * 4,
        (10, 256),
    ]
    for block in (*blocks.values(), *networks.meulemans_convnet().values()):
        layer = block.conv if hasattr(block, "conv") else block.linear
        assert not layer.bias.any()
        weight = layer.weight.detach().double().flatten()
        taps = layer.weight[0, 0].numel()
        deviation = (2 / (taps * (layer.weight.shape[0] + layer.weight.shape[1]))) ** 0.5
        # five standard errors of a normal sample's deviation and kurtosis; a uniform one has kurtosis 1.8
        assert abs(weight.std() / deviation - 1) < 5 / (2 * len(weight)) ** 0.5
        assert abs((weight**4).mean() / weight.var() ** 2 - 3) < 5 * (24 / len(weight)) ** 0.5


def test_meulemans_mlp_takes_images_and_has_the_published_quirk() -> None:
    net = nn.Sequential(networks.meulemans_mlp(last_hidden_bias=False))
    assert net(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    biases = [name for name, _ in net.named_parameters() if name.endswith("bias")]
    assert biases == [f"fc_{index}.linear.bias" for index in (0, 1, 2, 3, 5)]


@pytest.mark.parametrize(
    "build",
    [networks.simple_vgg, networks.lenet, networks.meulemans_convnet, lambda shape, **options: networks.meulemans_mlp(
        128, (9, 7), **options)],
)  # fmt: skip
def test_batch_normalisation_ends_the_hidden_blocks(build: Callable) -> None:
    torch.manual_seed(1)
    plain = build((2, 8, 8), dtype=torch.float64, **({"channels": (4, 5)} if build is networks.simple_vgg else {}))
    torch.manual_seed(1)
    blocks = build(
        (2, 8, 8), dtype=torch.float64, use_batchnorm=True,
        **({"channels": (4, 5)} if build is networks.simple_vgg else {}),
    )  # fmt: skip
    named = dict(nn.Sequential(plain).named_parameters())
    # the same weights, none more
    for name, parameter in nn.Sequential(blocks).named_parameters():
        assert torch.equal(parameter, named.pop(name))
    assert not named
    output = torch.randn(50, 2, 8, 8, dtype=torch.float64)
    for name, block in blocks.items():
        if name == list(blocks)[-1]:
            assert torch.equal(block(output), plain[name](output))
            break
        before = plain[name](output)
        output = block(output)
        over = [0, *range(2, before.dim())]
        variance = before.var(over, unbiased=False, keepdim=True)
        expected = (before - before.mean(over, keepdim=True)) / (variance + 1e-5).sqrt()
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


# --- residual blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "stride"), [(3, 1), (4, 1), (3, 2), (4, 2)])
@pytest.mark.parametrize("use_batchnorm", [False, True])
def test_basic_block_by_hand(channels: int, stride: int, use_batchnorm: bool) -> None:
    block = BasicBlock(3, channels, stride, use_batchnorm=use_batchnorm, dtype=torch.float64).eval()
    if use_batchnorm:
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                    values.uniform_(0.5, 1.5)

    def normalised(values: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        if not use_batchnorm:
            return values
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (values - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

    input = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    hidden = normalised(functional.conv2d(input, block.conv1.weight, stride=stride, padding=1), block.bn1).clamp(min=0)
    hidden = normalised(functional.conv2d(hidden, block.conv2.weight, padding=1), block.bn2)
    shortcut = input
    if stride != 1 or channels != 3:
        kernel = block.shortcut.conv.weight[:, :, 0, 0]
        mapped = torch.einsum("oc,bchw->bohw", kernel, input[:, :, ::stride, ::stride])
        shortcut = normalised(mapped, block.shortcut.bn if use_batchnorm else nn.Identity())
    torch.testing.assert_close(block(input), (hidden + shortcut).clamp(min=0), rtol=1e-12, atol=1e-12)


def test_stages_of_a_resnet() -> None:
    blocks = networks.resnet34(channels=(4, 5, 6, 7))
    assert list(blocks) == ["layer_0", "layer_1", "layer_2", "layer_3", "layer_4", "fc"]
    for stage, (depth, stride) in enumerate(zip((3, 4, 6, 3), (1, 2, 2, 2), strict=True), start=1):
        members = list(blocks[f"layer_{stage}"])
        assert len(members) == depth
        assert [member.conv1.stride[0] for member in members] == [stride] + [1] * (depth - 1)
    norms = [module for block in blocks.values() for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not norms
    # a convolution, two a block, one a shortcut of stages 2 to 4
    blocks = networks.resnet18(channels=(4, 5, 6, 7), use_batchnorm=True)
    norms = [module for block in blocks.values() for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 1 + 2 * 8 + 3


def transposed(feedback: nn.Module, values: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """A feedback convolution by torch's transposed one."""
    padding = feedback.weight.shape[-1] // 2
    return functional.conv_transpose2d(
        values, feedback.weight, stride=stride, padding=padding, output_padding=stride - 1
    )


def batch_normalised(feedback: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """By the batch's mean and variance; the identity without normalisation."""
    if isinstance(feedback, IdentityFeedback):
        return values
    variance, mean = torch.var_mean(values, (0, 2, 3), correction=0, keepdim=True)
    scaled = (values - mean) / (variance + feedback.eps).sqrt()
    return scaled * feedback.weight[:, None, None] + feedback.bias[:, None, None]


def residual_feedback(feedback: nn.Module, stride: int, output: torch.Tensor) -> torch.Tensor:
    """``conv1T(bn1(relu(conv2T(bn2(r))))) + shortcutT(r)``, ``r = relu(y)``; ``shortcutT`` is convT after bn."""
    start = output.clamp(min=0)
    hidden = transposed(feedback.conv2, batch_normalised(feedback.bn2, start)).clamp(min=0)
    around = start
    if not isinstance(feedback.shortcut, IdentityFeedback):
        parts = feedback.shortcut.parts
        around = transposed(parts["conv"], batch_normalised(parts["bn"], start), stride)
    return transposed(feedback.conv1, batch_normalised(feedback.bn1, hidden), stride) + around


@pytest.mark.parametrize("use_batchnorm", [False, True])
def test_targets_of_a_resnet_by_hand(use_batchnorm: bool) -> None:
    blocks = networks.resnet18((3, 8, 8), 5, (4, 6, 5, 7), use_batchnorm=use_batchnorm, dtype=torch.float64)
    net = TargetSequential(blocks, rule=tpext.DifferenceTargets(target_step=0.7))
    for parameter in net.feedback.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    input, move = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    calls = net.trace(input).calls
    plain = nn.Sequential(blocks)
    torch.testing.assert_close(calls[-1].output, plain(input), rtol=1e-12, atol=1e-12)
    moves = [move, (move @ net.feedback["fc"].parts["linear"].weight.mT)[:, :, None, None]]
    for call in calls[-2:0:-1]:

        def stage(output: torch.Tensor, call: BlockCall = call) -> torch.Tensor:
            for name, block in reversed(list(call.block.named_children())):
                output = residual_feedback(call.feedback.parts[name], block.conv1.stride[0], output)
            return output

        # the last stage's one pixel is all that the average is over
        assert moves[-1].shape[2:] == call.output.shape[2:]
        moves.append(stage(call.output + moves[-1]) - stage(call.output))
    for found, expected in zip(net.rule.displacements(calls, move), reversed(moves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", IMAGE_NETWORKS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (32, 32)}, "image_shape must be (channels, height, width), got (32, 32)"),
        ({"image_shape": (3, 0, 32)}, "image_shape must be one or more whole numbers >= 1, got (3, 0, 32)"),
        ({"image_shape": (3, 32.0, 32)}, "image_shape must be one or more whole numbers >= 1, got (3, 32.0, 32)"),
        ({"n_classes": 0}, "n_classes must be a whole number >= 1, got 0"),
        ({"channels": ()}, "channels must be one or more whole numbers >= 1, got ()"),
        ({"channels": (8, -1)}, "channels must be one or more whole numbers >= 1, got (8, -1)"),
    ],
)
def test_wrong_arguments_are_named(build: Callable, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**arguments, device="meta")


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (networks.simple_vgg, {"activation": "gelu"}, "simple_vgg: activation must be one of 'elu', 'relu', 'tanh'"),
        (networks.lenet, {"activation": "gelu"}, "lenet: activation must be one of 'elu', 'relu', 'tanh', got 'gelu'"),
        (networks.lenet, {"hidden_size": 0}, "lenet: hidden_size must be a whole number >= 1, got 0"),
        (networks.simple_vgg, {"image_shape": (1, 28, 28)}, "at least 32 x 32 for 5 pools that halve it, got 28 x 28"),
        (networks.simple_vgg, {"image_shape": (1, 40, 31)}, "at least 32 x 32 for 5 pools that halve it, got 40 x 31"),
        (networks.resnet18, {"channels": (1, 2, 3, 4, 5)}, "resnet18: channels must be 1 .. 4 numbers, one a stage"),
        (networks.meulemans_mlp, {"input_size": 0}, "meulemans_mlp: input_size must be a whole number >= 1, got 0"),
        (networks.meulemans_mlp, {"hidden_sizes": ()}, "meulemans_mlp: hidden_sizes must be one or more whole"),
        (networks.meulemans_mlp, {"activation": "sine"}, "meulemans_mlp: activation must be one of"),
    ],
)
def test_wrong_arguments_of_one_network_are_named(build: Callable, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**arguments, device="meta")
