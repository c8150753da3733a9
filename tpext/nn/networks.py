"""Networks of the literature on learned target propagation, each as an ordered dictionary of its blocks.

A block is what target propagation takes for one layer: it has one target and one feedback module. Unpack a network into
``torch.nn.Sequential`` or ``tpext.nn.TargetSequential``, whose parameters then have the blocks' names in front.

=============================  =====================================================================================
:func:`simple_vgg`             3 x 3 convolutions, each with an activation and a max-pool, then one linear layer
:func:`lenet`                  two 5 x 5 convolutions with overlapping max-pools, then two linear layers
:func:`resnet18`, 34           a convolution, four stages of residual blocks, a linear layer; a stage is one block
:func:`meulemans_convnet`      LeNet with tanh and Xavier-normal weights
:func:`meulemans_mlp`          linear layers with tanh and Xavier-normal weights
=============================  =====================================================================================

Weights are initialised by torch's defaults, from its global random state, except where said. No activation works in
place. Sizes are found by arithmetic: images of any size will do that the pools do not shrink to nothing.

>>> import torch
>>> blocks = simple_vgg()
>>> list(blocks)
['conv_0', 'conv_1', 'conv_2', 'conv_3', 'conv_4', 'fc']
>>> net = torch.nn.Sequential(blocks)
>>> net(torch.zeros(2, 3, 32, 32)).shape
torch.Size([2, 10])
>>> [name for name, parameter in net.named_parameters()][:2]
['conv_0.conv.weight', 'conv_0.conv.bias']
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpext.feedback.base import Code, Feedback, make_feedback, register_feedback
from tpext.ops._library import check_choice, check_tensor, is_integer

NetworkActivation = Literal["elu", "relu", "tanh"]
"""Activations that the builders know. The published networks with learned inverses take "elu" (or "tanh")."""

Blocks = OrderedDict[str, nn.Module]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"elu": nn.ELU, "relu": nn.ReLU, "tanh": nn.Tanh}


def simple_vgg(
    image_shape: Sequence[int] = (3, 32, 32),
    n_classes: int = 10,
    channels: Sequence[int] = (128, 128, 256, 256, 512),
    *,
    activation: NetworkActivation = "elu",
    bias: bool = True,
    use_batchnorm: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Blocks:
    """Return the blocks ``conv_0`` ... and ``fc`` of a small VGG network.

    ``conv_i`` is ``pool(rho(conv(x)))``: a 3 x 3 convolution with padding 1, the activation, a 2 x 2 max-pool, which
    halves height and width, rounded down. ``fc`` is ``linear(reshape(x))``. By default 2,221,706 parameters.

    Args:
        image_shape: channels, height and width ``(C, H, W)`` of an image; H, W >= 2^n for n convolutions.
        n_classes: number of outputs, >= 1.
        channels: channels of each convolution's output, at least one convolution.
        activation: see :data:`NetworkActivation`.
        bias: whether convolutions and linear layers have one.
        use_batchnorm: batch normalisation at the end of each block but the last, without a learned scale and shift, as
            Shibuya et al., "Fixed-Weight Difference Target Propagation", AAAI 2023, have it.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument out of its range; an image too small for the pools.

    Source: Ernoult et al., "Towards Scaling Difference Target Propagation by Learning Backprop Targets", ICML 2022, and
    its code.

    >>> sum(parameter.numel() for block in simple_vgg(device="meta").values() for parameter in block.parameters())
    2221706
    >>> simple_vgg(image_shape=(1, 28, 28))
    Traceback (most recent call last):
    ValueError: simple_vgg: image_shape must be at least 32 x 32 for 5 pools that halve it, got 28 x 28
    """
    plane, height, width = _check("simple_vgg", image_shape, n_classes, activation, channels=channels)
    smallest = 2 ** len(channels)
    if min(height, width) < smallest:
        raise ValueError(
            f"simple_vgg: image_shape must be at least {smallest} x {smallest} for {len(channels)} pools that halve "
            f"it, got {height} x {width}"
        )
    factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
    blocks: Blocks = OrderedDict()
    for index, (inside, outside) in enumerate(pairwise((plane, *channels))):
        conv = nn.Conv2d(inside, outside, kernel_size=3, padding=1, **factory)
        blocks[f"conv_{index}"] = _block(conv=conv, rho=_ACTIVATIONS[activation](), pool=nn.MaxPool2d(2, 2))
    features = channels[-1] * (height // smallest) * (width // smallest)
    blocks["fc"] = _block(reshape=nn.Flatten(), linear=nn.Linear(features, n_classes, **factory))
    return _add_batchnorm(blocks) if use_batchnorm else blocks


def lenet(
    image_shape: Sequence[int] = (3, 32, 32),
    n_classes: int = 10,
    channels: Sequence[int] = (32, 64),
    hidden_size: int = 512,
    *,
    activation: NetworkActivation = "elu",
    bias: bool = True,
    use_batchnorm: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Blocks:
    """Return the blocks ``conv_0``, ``conv_1``, ``fc1`` and ``fc2`` of a LeNet.

    ``conv_i`` is ``pool(rho(conv(x)))``: a 5 x 5 convolution with padding 2, the activation, a 3 x 3 max-pool of stride
    2 and padding 1, whose windows overlap and which halves height and width, rounded up. ``fc1`` is
    ``rho(linear(reshape(x)))``, ``fc2`` is ``linear(x)``. By default 2,156,490 parameters.

    Args:
        image_shape: channels, height and width ``(C, H, W)`` of an image, any size.
        n_classes: number of outputs, >= 1.
        channels: channels of each convolution's output, at least one convolution.
        hidden_size: outputs of ``fc1``.
        activation: see :data:`NetworkActivation`.
        bias: whether convolutions and linear layers have one.
        use_batchnorm: see :func:`simple_vgg`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument out of its range.

    Source: as :func:`simple_vgg`; there 32 x 32 is the only size.

    >>> [tuple(block[1].weight.shape) for name, block in lenet((1, 28, 28)).items() if name == "fc1"]
    [(512, 3136)]
    """
    plane, height, width = _check(
        "lenet", image_shape, n_classes, activation, channels=channels, hidden_size=hidden_size
    )
    factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
    rho = _ACTIVATIONS[activation]
    blocks: Blocks = OrderedDict()
    for index, (inside, outside) in enumerate(pairwise((plane, *channels))):
        conv = nn.Conv2d(inside, outside, kernel_size=5, padding=2, **factory)
        blocks[f"conv_{index}"] = _block(conv=conv, rho=rho(), pool=nn.MaxPool2d(3, stride=2, padding=1))
        height, width = (height + 1) // 2, (width + 1) // 2
    linear = nn.Linear(channels[-1] * height * width, hidden_size, **factory)
    blocks["fc1"] = _block(reshape=nn.Flatten(), linear=linear, rho=rho())
    blocks["fc2"] = _block(linear=nn.Linear(hidden_size, n_classes, **factory))
    return _add_batchnorm(blocks) if use_batchnorm else blocks


class BasicBlock(nn.Module):
    """A residual block: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``.

    Both convolutions are 3 x 3 with padding 1 and no bias; ``conv1`` has the stride. ``shortcut`` is the identity where
    sizes stay, else a 1 x 1 convolution ``conv`` with the stride, followed by ``bn``.

    Args:
        in_channels, channels: channels of the input and of the output.
        stride: of the block; height and width are divided by it, rounded up.
        use_batchnorm: batch normalisation after each convolution; False puts the identity there.
        device, dtype: of the parameters.

    >>> BasicBlock(8, 16, stride=2)(torch.zeros(2, 8, 6, 6)).shape
    torch.Size([2, 16, 3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        use_batchnorm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False, **factory)
        self.bn1 = _normalisation(channels, use_batchnorm, factory)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **factory)
        self.bn2 = _normalisation(channels, use_batchnorm, factory)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False, **factory)
            self.shortcut = _block(conv=conv, bn=_normalisation(channels, use_batchnorm, factory))

    def forward(self, input: Tensor) -> Tensor:
        """Return the output ``[B, channels, ceil(H / stride), ceil(W / stride)]`` for ``[B, in_channels, H, W]``."""
        check_tensor("BasicBlock", "input", input, "[B, in_channels, H, W]")
        hidden = torch.relu(self.bn1(self.conv1(input)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(input))


@register_feedback(BasicBlock)
class InvertedBasicBlock(Feedback):
    """The feedback of a :class:`BasicBlock`: ``conv1T(bn1(relu(conv2T(bn2(r))))) + shortcutT(r)``, ``r = relu(y)``.

    ``T`` marks the feedback of a module; the two batch normalisations have the block's number of channels.

    Args:
        block: the block that it is made from.

    Source: as :func:`simple_vgg`.
    """

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.bn1 = make_feedback(block.conv1), make_feedback(block.bn1)
        self.conv2, self.bn2 = make_feedback(block.conv2), make_feedback(block.bn2)
        self.shortcut = make_feedback(block.shortcut)
        self.rho = nn.ReLU()

    def encode(self, block: nn.Module, input: Tensor, clean: Code | None = None) -> tuple[Tensor, Code]:
        assert isinstance(block, BasicBlock)
        known = [None] * 5 if clean is None else clean
        hidden, conv1 = self.conv1.encode(block.conv1, input, known[0])
        hidden, bn1 = self.bn1.encode(block.bn1, hidden, known[1])
        hidden, conv2 = self.conv2.encode(block.conv2, torch.relu(hidden), known[2])
        hidden, bn2 = self.bn2.encode(block.bn2, hidden, known[3])
        around, shortcut = self.shortcut.encode(block.shortcut, input, known[4])
        return torch.relu(hidden + around), (conv1, bn1, conv2, bn2, shortcut)

    def forward(self, output: Tensor, code: Code) -> Tensor:
        """Return ``G(y; code)`` in the shape of the block's input."""
        conv1, bn1, conv2, bn2, shortcut = code
        start = self.rho(output)
        hidden = self.rho(self.conv2(self.bn2(start, bn2), conv2))
        around: Tensor = self.shortcut(start, shortcut)
        back: Tensor = self.conv1(self.bn1(hidden, bn1), conv1)
        return back + around

    def _pairs(self, block: nn.Module) -> list[tuple[nn.Module, Feedback]]:
        parts = ((name, part) for name, part in self.named_children() if isinstance(part, Feedback))
        return [(block.get_submodule(name), part) for name, part in parts]

    def copy_weights(self, block: nn.Module) -> None:
        for module, part in self._pairs(block):
            part.copy_weights(module)

    def tie(self, block: nn.Module) -> None:
        for module, part in self._pairs(block):
            part.tie(module)


def resnet18(
    image_shape: Sequence[int] = (3, 32, 32),
    n_classes: int = 10,
    channels: Sequence[int] = (64, 128, 256, 512),
    *,
    use_batchnorm: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Blocks:
    """Return the blocks ``layer_0`` ... ``layer_4`` and ``fc`` of a ResNet18 for small images.

    ``layer_0`` is ``relu(bn(conv(x)))`` with a 3 x 3 convolution and neither stride nor pool. ``layer_1`` to
    ``layer_4`` are stages of two :class:`BasicBlock` each, the first of which has stride 1, 2, 2 and 2. ``fc`` averages
    over the pixels and is linear, with the network's only bias. By default 11,164,362 parameters.

    Args:
        image_shape: channels, height and width ``(C, H, W)`` of an image, any size.
        n_classes: number of outputs, >= 1.
        channels: channels of each stage, at least one; the first is that of ``layer_0`` too.
        use_batchnorm: batch normalisation after each convolution; the published networks have none.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument out of its range.

    Source: as :func:`simple_vgg`. The activation is always ReLU, as there.

    >>> net = torch.nn.Sequential(resnet18(channels=(4, 8)))
    >>> [tuple(block.shape) for block in (net[0](torch.zeros(2, 3, 9, 9)), net(torch.zeros(2, 3, 9, 9)))]
    [(2, 4, 9, 9), (2, 10)]
    """
    return _resnet("resnet18", (2, 2, 2, 2), image_shape, n_classes, channels, use_batchnorm, device, dtype)


def resnet34(
    image_shape: Sequence[int] = (3, 32, 32),
    n_classes: int = 10,
    channels: Sequence[int] = (64, 128, 256, 512),
    *,
    use_batchnorm: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Blocks:
    """Return the blocks ``layer_0`` ... ``layer_4`` and ``fc`` of a ResNet34 for small images.

    As :func:`resnet18`, with stages of 3, 4, 6 and 3 :class:`BasicBlock`. By default 21,265,098 parameters.

    >>> [len(block) for block in resnet34(device="meta").values()]
    [3, 3, 4, 6, 3, 3]
    """
    return _resnet("resnet34", (3, 4, 6, 3), image_shape, n_classes, channels, use_batchnorm, device, dtype)


def _resnet(
    op: str,
    depths: tuple[int, ...],
    image_shape: Sequence[int],
    n_classes: int,
    channels: Sequence[int],
    use_batchnorm: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Blocks:
    plane, _, _ = _check(op, image_shape, n_classes, "relu", channels=channels)
    if len(channels) > len(depths):
        raise ValueError(f"{op}: channels must be 1 .. {len(depths)} numbers, one a stage, got {list(channels)}")
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    blocks: Blocks = OrderedDict()
    blocks["layer_0"] = _block(
        conv=nn.Conv2d(plane, channels[0], 3, padding=1, bias=False, **factory),
        bn=_normalisation(channels[0], use_batchnorm, factory),
        rho=nn.ReLU(),
    )
    for stage, (inside, outside) in enumerate(pairwise((channels[0], *channels))):
        members = OrderedDict[str, nn.Module]()
        for index in range(depths[stage]):
            shape = (inside, outside, 1 if stage == 0 else 2) if index == 0 else (outside, outside, 1)
            members[f"block_{index}"] = BasicBlock(*shape, use_batchnorm=use_batchnorm, **factory)
        blocks[f"layer_{stage + 1}"] = nn.Sequential(members)
    linear = nn.Linear(channels[-1], n_classes, **factory)
    blocks["fc"] = _block(pool=nn.AdaptiveAvgPool2d(1), reshape=nn.Flatten(), linear=linear)
    return blocks


def meulemans_convnet(
    image_shape: Sequence[int] = (3, 32, 32),
    n_classes: int = 10,
    channels: Sequence[int] = (32, 64),
    hidden_size: int = 512,
    *,
    activation: NetworkActivation = "tanh",
    use_batchnorm: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Blocks:
    """Return the blocks ``conv_0``, ``conv_1``, ``fc1`` and ``fc2`` of Meulemans' convolutional network.

    :func:`lenet` with tanh; weights are Xavier-normal, biases zero.

    Source: Meulemans et al., "A Theoretical Framework for Target Propagation", NeurIPS 2020, and its code (CIFAR-10).

    >>> [name for name, parameter in torch.nn.Sequential(meulemans_convnet()).named_parameters() if parameter.any()]
    ['conv_0.conv.weight', 'conv_1.conv.weight', 'fc1.linear.weight', 'fc2.linear.weight']
    """
    options: dict[str, Any] = {"use_batchnorm": use_batchnorm, "device": device, "dtype": dtype}
    return _xavier_normal(lenet(image_shape, n_classes, channels, hidden_size, activation=activation, **options))


def meulemans_mlp(
    input_size: int = 784,
    hidden_sizes: Sequence[int] = (256,) * 5,
    n_classes: int = 10,
    *,
    activation: NetworkActivation = "tanh",
    last_hidden_bias: bool = True,
    use_batchnorm: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Blocks:
    """Return the blocks ``fc_0``, ``fc_1``, ... of Meulemans' network of linear layers.

    ``fc_i`` is ``rho(linear(x))``, the last one ``linear(x)``; ``fc_0`` first flattens its input, so images will do.
    Weights are Xavier-normal, biases zero.

    Args:
        input_size: numbers in an input: 784 (MNIST, Fashion-MNIST), 3072 (CIFAR-10).
        hidden_sizes: outputs of each hidden layer, at least one: published are five of 256, for CIFAR-10 three of 1024.
        n_classes: number of outputs, >= 1.
        activation: see :data:`NetworkActivation`.
        last_hidden_bias: False builds the last hidden layer without bias, as the published DDTP-linear does.
        use_batchnorm: see :func:`simple_vgg`.
        device, dtype: of the parameters; the published runs are float64.

    Raises:
        ValueError: an argument out of its range.

    Source: as :func:`meulemans_convnet`.

    >>> blocks = meulemans_mlp(3072, (1024,) * 3, last_hidden_bias=False)
    >>> [name for name, block in blocks.items() if block.get_submodule("linear").bias is None]
    ['fc_2']
    """
    op = "meulemans_mlp"
    check_choice(op, "activation", activation, get_args(NetworkActivation))
    _check_sizes(op, input_size=input_size, hidden_sizes=hidden_sizes, n_classes=n_classes)
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    blocks: Blocks = OrderedDict()
    for index, (inside, outside) in enumerate(pairwise((input_size, *hidden_sizes))):
        bias = last_hidden_bias or index < len(hidden_sizes) - 1
        first: dict[str, nn.Module] = {"reshape": nn.Flatten()} if index == 0 else {}
        linear = nn.Linear(inside, outside, bias=bias, **factory)
        blocks[f"fc_{index}"] = _block(**first, linear=linear, rho=_ACTIVATIONS[activation]())
    blocks[f"fc_{len(hidden_sizes)}"] = _block(linear=nn.Linear(hidden_sizes[-1], n_classes, **factory))
    return _xavier_normal(_add_batchnorm(blocks) if use_batchnorm else blocks)


def _block(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _normalisation(channels: int, use_batchnorm: bool, factory: dict[str, Any]) -> nn.Module:
    return nn.BatchNorm2d(channels, **factory) if use_batchnorm else nn.Identity()


def _add_batchnorm(blocks: Blocks) -> Blocks:
    """Put batch normalisation without a learned scale and shift at the end of each block but the last."""
    for block in list(blocks.values())[:-1]:
        layer = next(module for module in block.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
        kind = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
        weight = layer.weight
        block.add_module("bn", kind(len(weight), affine=False, device=weight.device, dtype=weight.dtype))
    return blocks


def _xavier_normal(blocks: Blocks) -> Blocks:
    for block in blocks.values():
        for name, parameter in block.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_normal_(parameter)
    return blocks


def _check(
    op: str, image_shape: Sequence[int], n_classes: int, activation: str, **sizes: int | Sequence[int]
) -> tuple[int, int, int]:
    """Check what most networks have in common; return channels, height and width of an image."""
    if len(image_shape) != 3:
        raise ValueError(f"{op}: image_shape must be (channels, height, width), got {tuple(image_shape)}")
    check_choice(op, "activation", activation, get_args(NetworkActivation))
    _check_sizes(op, image_shape=image_shape, n_classes=n_classes, **sizes)
    plane, height, width = image_shape
    return plane, height, width


def _check_sizes(op: str, **sizes: int | Sequence[int]) -> None:
    """Raise ValueError unless every number is whole and positive, and every sequence has one."""
    for name, value in sizes.items():
        numbers = value if isinstance(value, Sequence) else [value]
        if not numbers or any(not is_integer(number) or number < 1 for number in numbers):
            expected = "one or more whole numbers >= 1" if numbers is value else "a whole number >= 1"
            raise ValueError(f"{op}: {name} must be {expected}, got {value}")
