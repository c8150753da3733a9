"""Noise on a grid of pixels against torch's convolutions on whole images, and against noise on all pixels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from target_networks import DOUBLE, assert_equal, degrees
from torch import Tensor, nn
from torch.nn import functional

from tpext.feedback import LDRL, ClosedForm, ConvFeedback, Draw, LinearMap, RunningLDRL
from tpext.feedback.pixel_grid import PixelGrid
from tpext.nn import TargetSequential

KERNELS = [((3, 3), (1, 1)), ((3, 3), (0, 0)), ((5, 5), (2, 2)), ((3, 2), (2, 0)), ((1, 1), (0, 0)), ((2, 2), (3, 1))]
SIZES = [(7, 8), (6, 9), (3, 5)]
cases = pytest.mark.parametrize(
    ("kernel", "padding", "size"),
    [
        (kernel, padding, size)
        for (kernel, padding), size in itertools.product(KERNELS, SIZES)
        if all(k <= n + 2 * p for k, n, p in zip(kernel, size, padding, strict=True))
    ],
)


def grid_of(kernel: tuple[int, int], padding: tuple[int, int], size: tuple[int, int]) -> tuple[nn.Conv2d, PixelGrid]:
    conv = nn.Conv2d(2, 3, kernel, padding=padding, dtype=DOUBLE)
    input = torch.zeros(2, *size, dtype=DOUBLE)
    grid = ConvFeedback(conv).pixel_grid(input.shape, conv(input).shape)
    assert grid is not None
    return conv, grid


def on_grid(grid: PixelGrid, image: Tensor) -> Tensor:
    """The image with zeros off the grid."""
    (row, column), (height, width) = grid.first, grid.kernel
    masked = torch.zeros_like(image)
    masked[:, :, row::height, column::width] = image[:, :, row::height, column::width]
    return masked


@cases
def test_map_and_gradient_are_those_of_an_image_that_is_zero_elsewhere(kernel: Any, padding: Any, size: Any) -> None:
    conv, grid = grid_of(kernel, padding, size)
    image, taps = torch.randn(2, 2, *size, dtype=DOUBLE), conv.weight.detach().permute(2, 3, 0, 1)
    for number in range(grid.places):
        placed = grid.at(number)
        masked, pixels = on_grid(placed, image), placed.pixels(image)
        weight = conv.weight.detach().requires_grad_()
        expected = functional.conv2d(masked, weight, padding=padding)
        features = torch.randn_like(expected)
        assert_equal(placed.map(taps, pixels), expected, 1e-12)
        (gradient,) = torch.autograd.grad((expected * features).sum(), weight)
        assert_equal(placed.weight_gradient(pixels, features), gradient, 1e-12)


@cases
def test_each_pixel_is_in_one_place(kernel: Any, padding: Any, size: Any) -> None:
    _, grid = grid_of(kernel, padding, size)
    numbers = torch.arange(size[0] * size[1]).view(1, 1, *size)
    seen = torch.cat([grid.at(number).pixels(numbers).flatten() for number in range(grid.places)])
    assert seen.sort().values.tolist() == list(range(size[0] * size[1]))
    assert grid.at(grid.places + 1) == grid.at(1)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 4),
        nn.Conv1d(2, 2, 3),
        nn.Conv2d(2, 2, 3, stride=2),
        nn.Conv2d(2, 2, 3, dilation=2),
        nn.Conv2d(2, 2, 3, groups=2),
    ],
    ids=str,
)
def test_modules_without_a_grid(module: nn.Module) -> None:
    """They have noise on all inputs, and are refused where no other has a grid."""
    net = TargetSequential(nn.Identity(), module)
    for make in (LDRL, RunningLDRL):
        options: Any = {"lr": 0.1, "second_term": "expected"} if make is LDRL else {}
        with pytest.raises(ValueError, match=f"^{make.__name__}: pixels='grid' needs a block .* net has none"):
            make(net, noise=0.1, pixels="grid", **options)


def test_layers_with_and_without_a_grid_go_together() -> None:
    blocks = [nn.Conv2d(2, 2, 3), nn.Conv2d(2, 3, 3), nn.Sequential(nn.Flatten(), nn.Linear(12, 4))]
    net = TargetSequential(*blocks)
    before = [parameter.clone() for parameter in net.feedback.parameters() if parameter.dim() > 1]
    RunningLDRL(net, noise=0.1, pixels="grid").step(torch.randn(2, 2, 6, 6))
    after = [parameter for parameter in net.feedback.parameters() if parameter.dim() > 1]
    assert len(before) == 2
    assert not any(map(torch.equal, before, after))


def block(pool: nn.Module | None = None) -> TargetSequential:
    parts = [nn.Conv2d(2, 3, 3, padding=1), *([] if pool is None else [nn.ELU(), pool])]
    return TargetSequential(nn.Identity(), nn.Sequential(*parts)).double()


def weight_of(net: TargetSequential) -> Tensor:
    (head,) = [module for module in net.feedback.modules() if isinstance(module, LinearMap)]
    return head.current_weight().detach().clone()


def pixel_basis(size: int) -> Any:
    """A noise source: of each of 9 places the draws are a whole basis of its ``size`` numbers, of either sign."""

    def noise(draw: Draw, like: Tensor) -> Tensor:
        rows = torch.zeros(len(like), like[0].numel(), dtype=like.dtype)
        number = draw.draw // 9
        rows[:, number % size] = (1 if number < size else -1) * size**0.5
        return rows.reshape(like.shape)

    return noise


def test_mean_over_the_places_is_the_closed_form() -> None:
    """Exact second moments of noise: ``R / D`` with ``R`` from the grid is ``R / D`` with the Jacobian itself."""
    net = block(nn.MaxPool2d(2))
    trace = net.trace(torch.randn(3, 2, 6, 6, dtype=DOUBLE))
    size = 2 * 2 * 2  # channels and pixels of a place
    RunningLDRL(
        net,
        noise=1e-4,
        draws=9 * 2 * size,
        decay=0.0,
        indices="clean",
        pixels="grid",
        noise_source=pixel_basis(size),
    ).step(trace)
    found = weight_of(net)
    ClosedForm(net).step(trace)
    assert_equal(found, weight_of(net), 1e-5)


def test_gradient_of_a_draw_is_that_of_noise_on_the_grid() -> None:
    """Against autograd through the loss's first term: ``-2 <dx, G(F(x + dx)) - G(F(x))>``, ``dx`` zero off the grid.

    On it noise has ``k`` times the standard deviation, so that over the places its covariance is that of all pixels.
    """
    net, sigma = block(nn.MaxPool2d(3, 2, 1)), 0.3
    input = torch.randn(3, 2, 6, 6, dtype=DOUBLE)
    trace = net.trace(input)
    call, before = trace.calls[1], weight_of(net)
    grid = PixelGrid((3, 3), (1, 1), (6, 6), (6, 6))
    noise = torch.randn_like(input)

    def source(draw: Draw, like: Tensor) -> Tensor:
        return grid.at(draw.draw).pixels(noise)

    def trainer(second: Any, pixels: Any, source: Any) -> LDRL:
        return LDRL(net, lr=1.0, noise=sigma, samples=4, second_term=second, pixels=pixels, noise_source=source)

    # the second term alone
    trainer("expected", "all", lambda draw, like: torch.zeros_like(like)).step(trace)
    second = before - weight_of(net)
    (head,) = [module for module in net.feedback.modules() if isinstance(module, LinearMap)]
    assert head.weight is not None
    head.weight.data.copy_(before)
    trainer("expected", "grid", source).step(trace)
    first = before - weight_of(net) - second
    head.weight.data.copy_(before)
    head.weight.requires_grad_(True)
    loss = torch.zeros((), dtype=DOUBLE)
    for number in range(4):
        dx = 3 * sigma * on_grid(grid.at(number), noise)
        output, code = call.feedback.encode(call.block, call.input + dx)
        moved = call.feedback(output, code) - call.feedback(call.output, call.code)
        loss = loss - 2 * (dx * moved).sum() / (4 * 3)
    (expected,) = torch.autograd.grad(loss, head.weight)
    assert_equal(first, expected, 1e-10)


def test_iterations_and_steps_move_the_grid_on() -> None:
    net = block()
    seen: list[tuple[int, ...]] = []

    def source(draw: Draw, like: Tensor) -> Tensor:
        seen.append(tuple(like.shape))
        return torch.ones_like(like)

    input = torch.randn(1, 2, 4, 4, dtype=DOUBLE)
    trainer = LDRL(net, lr=1e-3, noise=0.1, iterations=2, second_term="expected", pixels="grid", noise_source=source)
    for _ in range(5):
        trainer.step(input)
    grid = PixelGrid((3, 3), (1, 1), (4, 4), (4, 4))
    assert seen == [tuple(grid.at(number).pixels(input).shape) for number in range(10)]


def test_large_noise_has_about_the_least_point_of_noise_on_all_pixels() -> None:
    """Nearer than that of ``k`` times less noise, which the same standard deviation on the grid would come to."""
    torch.manual_seed(0)
    net = TargetSequential(nn.Identity(), nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)))
    input = torch.randn(16, 4, 8, 8)

    def least(noise: float, pixels: Any) -> Tensor:
        RunningLDRL(net, noise=noise, draws=450, decay=0.0, indices="clean", pixels=pixels).step(input)
        return weight_of(net)

    grid, same, less = least(1.0, "grid"), least(1.0, "all"), least(1 / 3, "all")
    assert degrees(grid, same) < 0.6 * degrees(grid, less)
    assert degrees(grid, same) < 0.6 * degrees(same, less)


def test_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"^LDRL: pixels must be one of 'all', 'grid', got 'some'"):
        LDRL(block(), lr=0.1, noise=0.1, second_term="expected", pixels="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^LDRL: pixels='grid' needs second_term='expected', got 'drawn'"):
        LDRL(block(), lr=0.1, noise=0.1, pixels="grid")
    with pytest.raises(ValueError, match=r"^RunningLDRL: pixels must be one of 'all', 'grid', got 1"):
        RunningLDRL(block(), noise=0.1, pixels=1)  # type: ignore[arg-type]
