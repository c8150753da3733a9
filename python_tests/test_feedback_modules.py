"""Feedback modules: sizes, weights, tying, pools, normalisation, dropout, differences, and modules of one's own."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from target_networks import DOUBLE, assert_equal
from torch import Tensor, nn

import tpext
from tpext.feedback import Feedback, LinearMap, layered_feedback, make_feedback, register_feedback
from tpext.feedback.linear_map import SMALL_PLANE
from tpext.nn import TargetSequential

# A linear map, and the shape of its input with a batch of 3
MAPS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 4), (5,)),
    (nn.Linear(5, 4, bias=False), (6, 5)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1), (4, 4, 3)),
    (nn.Conv2d(4, 6, 3, padding=1), (4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), bias=False), (4, 7, 8)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), (4, 6, 7)),
    (nn.Conv2d(4, 6, 3, stride=3, groups=2), (4, 11, 10)),
    (nn.Conv2d(4, 6, 5, padding="same"), (4, 3, 3)),
    (nn.Conv2d(4, 6, 2, stride=3), (4, 10, 8)),
    (nn.Conv2d(4, 6, 1), (4, 2, 2)),
    (nn.Conv3d(2, 4, 3, stride=2, padding=1, groups=2), (2, 5, 4, 3)),
]
for _module, _ in MAPS:
    _module.double()
each_map = pytest.mark.parametrize(("block", "shape"), MAPS, ids=[f"{m}{list(s)}" for m, s in MAPS])


def made(block: nn.Module) -> Any:
    return make_feedback(block)


def call(block: nn.Module, shape: tuple[int, ...]) -> tuple[LinearMap, Tensor, Tensor, Any]:
    """Feedback, an input, the output for it and the code."""
    feedback = made(block)
    x = torch.randn(3, *shape, dtype=DOUBLE)
    output, code = feedback.encode(block, x)
    return feedback, x, output.detach(), code


# Linear layers and convolutions


@each_map
def test_linear_feedback_is_the_adjoint_of_symmetric_weights(block: nn.Module, shape: tuple[int, ...]) -> None:
    feedback, x, output, code = call(block, shape)
    assert_equal(output, block(x), 0)
    feedback.copy_weights(block)
    f = torch.randn_like(output)
    back = feedback(f, code)
    assert back.shape == x.shape
    # biases are zero
    (adjoint,) = torch.func.vjp(block, x)[1](f)
    assert_equal(back, adjoint, 1e-12)
    assert_equal((feedback.map(f, x.shape[1:]) * x).sum(), (f * feedback.block_map(block, x)).sum(), 1e-12)
    assert_equal(feedback.block_map(block, x), block(x) - block(torch.zeros_like(x)), 1e-12)


@each_map
def test_linear_feedback_has_weights_of_its_own(block: nn.Module, shape: tuple[int, ...]) -> None:
    """Another random draw, and a bias of each channel of the input that a difference does not see."""
    feedback, x, output, code = call(block, shape)
    own, theirs = feedback.current_weight(), feedback.transported(block)
    assert own.shape == theirs.shape
    assert not torch.equal(own, theirs)
    assert (feedback.bias is None) == (block.bias is None)
    f, d = torch.randn_like(output), torch.randn_like(output)
    if feedback.bias is not None:
        channels = x.shape[-1] if isinstance(block, nn.Linear) else x.shape[1]
        assert feedback.bias.shape == (channels,)
        dims = (-1,) if isinstance(block, nn.Linear) else (1,)
        constant = (feedback(f, code) - feedback.map(f, x.shape[1:])).movedim(dims[0], -1)
        assert_equal(constant, feedback.bias.expand_as(constant), 1e-12)
    assert_equal(feedback.difference(f, d, code), feedback(f + d, code) - feedback(f, code), 1e-12)


@each_map
def test_weight_gradient_is_that_of_autograd(block: nn.Module, shape: tuple[int, ...]) -> None:
    feedback, x, output, _ = call(block, shape)
    f, grad = torch.randn_like(output), torch.randn_like(x)
    weight = feedback.current_weight()
    (expected,) = torch.autograd.grad((feedback.map(f, x.shape[1:]) * grad).sum(), weight)
    feedback.arrange(output.shape[1:])
    assert_equal(feedback.weight_gradient(grad, f), expected, 1e-12)


def test_weight_gradient_by_taps_and_by_torch_are_both_tested() -> None:
    planes = [
        block(torch.zeros(1, *shape, dtype=DOUBLE)).shape[2:] for block, shape in MAPS if type(block) is nn.Conv2d
    ]
    assert any(max(plane) <= SMALL_PLANE for plane in planes)
    assert any(max(plane) > SMALL_PLANE for plane in planes)


@each_map
def test_sum_over_uses_by_brute_force(block: nn.Module, shape: tuple[int, ...]) -> None:
    """Element by element of the weight: the features of its row that it acts on, given an input of ones."""
    feedback, x, output, _ = call(block, shape)
    per_feature = torch.rand(output.shape[1:], dtype=DOUBLE)
    weight = feedback.current_weight()
    found = feedback.sum_over_uses(per_feature, x.shape[1:]).expand_as(weight)
    # one tap at a time, all channels alike: d output / d tap for an input of ones
    probe = copy.deepcopy(block).requires_grad_(True)
    ones = torch.ones(1, *shape, dtype=DOUBLE)
    channel = -1 if isinstance(block, nn.Linear) else 0
    (grad,) = torch.autograd.grad((probe(ones)[0] * per_feature).sum(), probe.weight)
    assert_equal(found, grad.T if channel == -1 else grad, 1e-12)


@pytest.mark.parametrize(
    ("conv", "transposed", "shape"),
    [
        (nn.Conv1d(3, 4, 3, 2, 1), nn.ConvTranspose1d(4, 3, 3, 2, 1, 1), (3, 8)),
        (nn.Conv2d(3, 4, 3, 1, 1), nn.ConvTranspose2d(4, 3, 3, 1, 1, 0), (3, 5, 7)),
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2), (4, 6, 8)),
        (nn.Conv2d(3, 4, 1, 2), nn.ConvTranspose2d(4, 3, 1, 2, 0, 1), (3, 6, 4)),
        (nn.Conv3d(2, 3, 3, 3, 1, 1), nn.ConvTranspose3d(3, 2, 3, 3, 1, 2), (2, 6, 3, 9)),
    ],
    ids=str,
)
def test_feedback_of_a_convolution_is_torchs_transposed_one(
    conv: nn.Module, transposed: nn.Module, shape: tuple[int, ...]
) -> None:
    """As published, with ``output_padding = stride - 1``, where the stride divides the size."""
    conv, transposed = conv.double(), transposed.double()
    feedback, _, output, code = call(conv, shape)
    transposed.weight.data, transposed.bias.data = feedback.weight.detach(), feedback.bias.detach()
    assert_equal(feedback(output, code), transposed(output), 1e-12)


@pytest.mark.parametrize("block", [nn.Linear(40, 900), nn.Conv2d(90, 40, 3), nn.Conv2d(80, 60, 3, groups=2)], ids=str)
def test_feedback_is_initialised_as_such_layers_of_torch(block: Any) -> None:
    """Uniform, within one over the root of torch's fan-in of the layer that the feedback is."""
    feedback = made(block)
    fan_in = feedback.weight.shape[1] if isinstance(block, nn.Linear) else feedback.weight[0].numel()
    for parameter in (feedback.weight, feedback.bias):
        peak = float(parameter.detach().abs().max()) * math.sqrt(fan_in)
        assert 0.9 < peak <= 1.0
    assert abs(float(feedback.weight.mean())) * math.sqrt(fan_in) < 0.05


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), "must have padding_mode='zeros', got 'circular'"),
        (nn.Conv2d(3, 4, 2, padding="same"), "must have the same padding on both sides, got 'same'"),
        (nn.MaxPool2d(2, return_indices=True), "must have return_indices=False, got True"),
    ],
    ids=str,
)
def test_options_that_feedback_does_not_know_are_refused(block: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match="^make_feedback: .*" + re.escape(message)):
        make_feedback(block)


# Symmetric and tied weights


def small_blocks() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ELU()),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    ]


def assert_symmetric(net: TargetSequential) -> None:
    """Each feedback's linear map is the transposed of its block's."""
    for block, feedback in net.pairs()[1:]:
        (linear,) = [m for m in block if isinstance(m, (nn.Linear, nn.Conv2d))]
        (head,) = [m for m in feedback.modules() if isinstance(m, LinearMap)]
        weight = head.current_weight()
        assert torch.equal(weight, linear.weight.mT if isinstance(linear, nn.Linear) else linear.weight)
        assert head.bias is None or not head.bias.any()


def sgd_step(net: TargetSequential) -> None:
    x = torch.randn(5, 2, 4, 4).to(next(net.parameters()))
    net(x).square().sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()


CHANGES: dict[str, Any] = {
    "nothing": lambda net: net,
    "double": lambda net: net.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "load_state_dict": lambda net: (
        net.load_state_dict(TargetSequential(*small_blocks(), feedback_init="tied").state_dict()) and net
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tied_weights_stay_tied(change: str) -> None:
    net = TargetSequential(*small_blocks(), feedback_init="tied")
    net = CHANGES[change](net)
    assert_symmetric(net)
    sgd_step(net)
    assert_symmetric(net)
    names = [name for name, _ in net.feedback.named_parameters()]
    assert all(name.endswith("bias") for name in names)


def test_symmetric_weights_part_when_the_blocks_learn() -> None:
    net = TargetSequential(*small_blocks(), feedback_init="symmetric")
    assert_symmetric(net)
    before = copy.deepcopy(net.feedback.state_dict())
    sgd_step(net)
    assert all(torch.equal(value, before[name]) for name, value in net.feedback.state_dict().items())
    with pytest.raises(AssertionError):
        assert_symmetric(net)


def test_copied_network_is_tied_to_its_own_blocks() -> None:
    net = TargetSequential(*small_blocks(), feedback_init="tied")
    other = copy.deepcopy(net)
    for parameter in other.blocks.parameters():
        parameter.data.zero_()
    assert_symmetric(net)
    assert_symmetric(other)
    assert next(net.blocks.parameters()).any()


# Pools


def test_last_window_wins_a_shared_place() -> None:
    """The example of the published code on the CPU."""
    values = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    pool = nn.MaxPool1d(3, 1)
    feedback = made(pool)
    code = tpext.feedback.PoolCode(torch.tensor([[[5, 5, 5, 0]]]), torch.Size([6]))
    assert feedback(values, code).tolist() == [[[4, 0, 0, 0, 0, 3]]]


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.MaxPool1d(3, 2, padding=1), (2, 9)),
        (nn.MaxPool1d(2), (2, 7)),
        (nn.MaxPool2d(2), (2, 4, 6)),
        (nn.MaxPool2d(2), (2, 5, 7)),
        (nn.MaxPool2d(3, 2, padding=1), (2, 8, 7)),
        (nn.MaxPool2d(3, 1), (2, 5, 5)),
        (nn.MaxPool2d(2, 2, ceil_mode=True), (2, 5, 7)),
        (nn.MaxPool2d(2, 2, dilation=2), (2, 7, 7)),
        (nn.MaxPool2d((2, 3), (2, 1), padding=(0, 1)), (2, 6, 5)),
        (nn.MaxPool2d(2, 3), (2, 9, 8)),
        (nn.MaxPool3d(3, 2, padding=1), (2, 5, 4, 6)),
        (nn.MaxPool3d((1, 2, 2)), (2, 3, 4, 6)),
    ],
    ids=str,
)
def test_unpooling_puts_values_at_the_maxima(pool: nn.Module, shape: tuple[int, ...]) -> None:
    """In a loop over windows in raster order; and its gradient reaches what was put last."""
    feedback = made(pool)
    x = torch.randn(3, *shape, dtype=DOUBLE)
    output, code = feedback.encode(pool, x)
    assert torch.equal(output, pool(x))
    values = torch.randn_like(output).requires_grad_()
    expected = torch.zeros(3, shape[0], math.prod(shape[1:]), dtype=DOUBLE)
    last = torch.full(expected.shape, -1)
    flat = x.flatten(2)
    for batch in range(3):
        for channel in range(shape[0]):
            for window, value in enumerate(output[batch, channel].flatten()):
                (place,) = (flat[batch, channel] == value).nonzero().flatten()
                expected[batch, channel, place] = values[batch, channel].flatten()[window].item()
                last[batch, channel, place] = window
    back = feedback(values, code)
    assert torch.equal(back, expected.view_as(x))
    weights = torch.randn_like(back)
    (grad,) = torch.autograd.grad((back * weights).sum(), values)
    wanted = torch.zeros_like(output).flatten(2)
    for place in (last >= 0).nonzero().tolist():
        batch, channel, at = place
        wanted[batch, channel, last[batch, channel, at]] = weights.flatten(2)[batch, channel, at]
    assert torch.equal(grad, wanted.view_as(grad))
    assert torch.autograd.gradcheck(lambda v: feedback(v, code), values)


@pytest.mark.parametrize(
    ("pool", "shape", "repeats"),
    [
        (nn.AvgPool1d(2), (2, 6), (2,)),
        (nn.AvgPool2d(2), (2, 4, 6), (2, 2)),
        (nn.AdaptiveAvgPool2d(1), (2, 3, 5), (3, 5)),
        (nn.AdaptiveAvgPool3d((1, 2, 1)), (2, 3, 4, 2), (3, 2, 2)),
    ],
    ids=str,
)
def test_feedback_of_average_pooling_repeats_values(
    pool: nn.Module, shape: tuple[int, ...], repeats: tuple[int, ...]
) -> None:
    """Without a factor of one over the area, as published."""
    feedback = made(pool)
    x = torch.randn(3, *shape)
    output, code = feedback.encode(pool, x)
    assert torch.equal(output, pool(x))
    expected = output
    for dim, count in enumerate(repeats, 2):
        expected = expected.repeat_interleave(count, dim)
    assert torch.equal(feedback(output, code), expected)


# Activations, shapes, normalisation, dropout


@pytest.mark.parametrize(
    "activation",
    [nn.ELU(0.7), nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.SELU(), nn.Sigmoid(), nn.Hardtanh(-2, 2), nn.ReLU(True)],
    ids=str,
)
def test_feedback_of_an_activation_is_the_activation(activation: nn.Module) -> None:
    x = torch.randn(3, 4)
    kept = x.clone()
    feedback = made(activation)
    output, code = feedback.encode(activation, x)
    expected = activation(kept.clone())
    assert torch.equal(output, expected)
    assert torch.equal(feedback(output, code), activation(expected.clone()))
    assert torch.equal(output, expected), "in place"
    assert torch.equal(x, kept), "in place"


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Flatten(), (2, 3, 4)), (nn.Flatten(2), (2, 3, 4)), (nn.Unflatten(1, (2, 3)), (6, 4)), (nn.Identity(), (5,))],
    ids=str,
)
def test_feedback_of_a_shape_is_the_shape_back(module: nn.Module, shape: tuple[int, ...]) -> None:
    feedback, x = made(module), torch.randn(3, *shape)
    output, code = feedback.encode(module, x)
    assert torch.equal(output, module(x))
    assert torch.equal(feedback(output, code), x)
    # of any batch size
    assert torch.equal(feedback(output[:1], code), x[:1])


@pytest.mark.parametrize("batches", [1, 2])
def test_running_statistics_take_clean_passes_only(batches: int) -> None:
    """Both trainers run noisy batches through the block; a trace counts once for each, as the module alone does."""
    norm = nn.BatchNorm2d(3)
    block = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), norm, nn.ELU())
    net = TargetSequential(nn.Conv2d(2, 2, 1), block, nn.Sequential(nn.Flatten(), nn.Linear(48, 2)))
    alone = copy.deepcopy(net.blocks)
    trainer = tpext.feedback.LDRL(net, lr=1e-3, noise=0.5, iterations=3)
    for _ in range(batches):
        x = torch.randn(5, 2, 4, 4)
        alone(x)
        trainer.step(net.trace(x))
        # a step on a batch is the feedback's business only
        trainer.step(x)
    for name, value in alone.state_dict().items():
        assert torch.equal(net.blocks.state_dict()[name], value), name
    assert norm.num_batches_tracked == batches


def test_noisy_pass_is_normalised_by_its_own_batch() -> None:
    norm = nn.BatchNorm1d(3).double()
    norm.weight.data.uniform_()
    norm.bias.data.uniform_()
    feedback = made(norm)
    x, noisy = torch.randn(2, 7, 3, dtype=DOUBLE)
    _, clean = feedback.encode(norm, x)
    statistics = copy.deepcopy(norm.state_dict())
    output, code = feedback.encode(norm, noisy, clean)
    assert all(torch.equal(value, statistics[name]) for name, value in norm.state_dict().items())
    expected = (noisy - noisy.mean(0)) / (noisy.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
    assert_equal(output, expected, 1e-12)
    # feedback: a normalisation of its own, which starts as torch's does
    centred = (output - output.mean(0)) / (output.var(0, correction=0) + norm.eps).sqrt()
    assert_equal(feedback(output, code), centred, 1e-12)
    norm.eval()
    evaluated = feedback.encode(norm, noisy, clean)[0]
    assert torch.equal(evaluated, norm(noisy))


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.Dropout1d(0.5), nn.Dropout2d(0.5), nn.Dropout3d(0.5)], ids=str)
def test_noisy_pass_and_feedback_share_the_mask(module: nn.Module) -> None:
    dims = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}[type(module)]
    feedback, x = made(module), torch.randn(8, 6, *[2] * dims).abs() + 1
    output, clean = feedback.encode(module, x)
    kept = output != 0
    assert kept.any()
    assert not kept.all()
    assert torch.equal(output, torch.where(kept, 2 * x, 0))
    noisy, code = feedback.encode(module, 3 * x, clean)
    assert torch.equal(noisy, 3 * output)
    assert torch.equal(feedback(torch.ones_like(x), code), 2.0 * kept)
    other, _ = feedback.encode(module, x)
    assert not torch.equal(other != 0, kept)
    module.eval()
    assert torch.equal(feedback.encode(module, x)[0], x)


# Sequences and differences

SEQUENCES: dict[str, Any] = {
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
    "linear end": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 4)),
    "linear only": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.3)),
    "nonlinear start": lambda: nn.Sequential(nn.Tanh(), nn.Conv2d(2, 3, 3)),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 1), nn.MaxPool2d(3, 2, padding=1)), nn.Identity()),
        nn.Sequential(nn.Flatten(), nn.Linear(18, 5), nn.ELU()),
    ),
    "nested linear": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2)), nn.Flatten(), nn.Sequential(nn.Linear(12, 4))
    ),
    "normalised": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ELU(), nn.AdaptiveAvgPool2d(1)),
    "activation": nn.ELU,
    "empty": nn.Sequential,
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_difference_is_that_of_two_passes(kind: str) -> None:
    block = SEQUENCES[kind]().double()
    feedback = made(block)
    x = torch.randn(3, 2, 6, 6, dtype=DOUBLE)
    output, code = feedback.encode(block, x)
    d = 0.3 * torch.randn_like(output)
    moved, still = feedback(output + d, code), feedback(output, code)
    assert still.shape == x.shape
    difference = feedback.difference(output, d, code)
    torch.testing.assert_close(difference, moved - still, rtol=0, atol=1e-13)
    assert difference.any()


def test_difference_of_a_linear_end_has_no_rounding_of_the_state() -> None:
    """As small a displacement as one likes: what is linear never adds it to the state."""
    block = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)).double()
    feedback = made(block)
    output, code = feedback.encode(block, torch.randn(5, 4, dtype=DOUBLE))
    d = torch.randn_like(output)
    assert_equal(feedback.difference(output, 1e-30 * d, code) * 1e30, feedback.difference(output, d, code), 1e-12)


def test_difference_runs_a_nested_linear_sequence_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence is as linear as its modules: the difference goes through it alone, not as two states."""
    block = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 3))), nn.Linear(3, 2)).double()
    feedback = made(block)
    output, code = feedback.encode(block, torch.randn(5, 4, dtype=DOUBLE))
    d = torch.randn_like(output)
    expected = feedback(output + d, code) - feedback(output, code)
    maps, apply = [], tpext.feedback.LinearFeedback.map
    monkeypatch.setattr(tpext.feedback.LinearFeedback, "map", lambda *args: maps.append(args[0]) or apply(*args))
    assert_equal(feedback.difference(output, d, code), expected, 1e-12)
    assert len(maps) == 3
    # as small as one likes, as it is never added to the state
    assert_equal(feedback.difference(output, 1e-30 * d, code) * 1e30, expected, 1e-12)
    nonlinear = made(nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Linear(3, 2)))
    assert not nonlinear.is_linear


def test_feedback_of_a_sequence_is_its_parts_in_reversed_order() -> None:
    block = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)).double()
    feedback = made(block)
    x = torch.randn(4, 2, 6, 6, dtype=DOUBLE)
    output, code = feedback.encode(block, x)
    y = torch.randn_like(output)
    _, indices = nn.functional.max_pool2d(block[1](block[0](x)), 2, return_indices=True)
    unpooled = nn.functional.max_unpool2d(y, indices, 2)
    head = feedback.parts["0"]
    expected = nn.functional.conv_transpose2d(nn.functional.elu(unpooled), head.weight, head.bias, padding=1)
    assert_equal(feedback(y, code), expected, 1e-12)


def test_code_is_of_its_own_pass() -> None:
    """Two passes, feedback in the other order: no module remembers the last one."""
    block = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)).double()
    feedback = made(block)
    inputs = [torch.randn(2, 2, *size, dtype=DOUBLE) for size in ((6, 6), (9, 8))]
    together = [feedback.encode(block, x) for x in inputs]
    for x, (output, code) in zip(reversed(inputs), reversed(together), strict=True):
        assert torch.equal(feedback(output, code), feedback(*feedback.encode(block, x)))


def test_layered_feedback_has_its_activation_last() -> None:
    blocks = [
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ELU()),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    ]
    blocks = [block.double() for block in blocks]
    none, second, third = layered_feedback(blocks)
    assert none is None
    state = blocks[0](torch.randn(5, 2, 6, 6, dtype=DOUBLE))
    output, code = second.encode(blocks[1], state)
    assert torch.equal(output, blocks[1](state))
    y = torch.randn_like(output)
    head = second.mirrored.parts["0"]
    assert_equal(second(y, code), torch.tanh(nn.functional.conv_transpose2d(y, head.weight, head.bias)), 1e-12)
    top, code = third.encode(blocks[2], output)
    head = third.mirrored.parts["1"]
    expected = nn.functional.elu(nn.functional.linear(top, head.weight, head.bias)).view_as(output)
    assert_equal(third(top, code), expected, 1e-12)


def test_layered_feedback_below_a_linear_block_ends_linear() -> None:
    blocks = [nn.Linear(4, 3), nn.Linear(3, 2)]
    (_, feedback) = layered_feedback(blocks)
    output, code = feedback.encode(blocks[1], torch.randn(5, 3))
    assert torch.equal(feedback(output, code), feedback.mirrored(output, code))


BELOW: dict[str, tuple[list[nn.Module], type[nn.Module]]] = {
    "a linear layer follows": ([nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))], nn.Identity),
    "a normalisation follows": ([nn.Sequential(nn.Linear(4, 3), nn.ELU(), nn.BatchNorm1d(3))], nn.Identity),
    "pools and shapes follow": (
        [nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), nn.Dropout(0.1))],
        nn.Tanh,
    ),
    "pools are a block": ([nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh()), nn.AvgPool2d(2), nn.Flatten()], nn.Tanh),
    "in another block": ([nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)], nn.Identity),
    "two": ([nn.Sequential(nn.Linear(4, 3), nn.ELU(), nn.Tanh())], nn.Tanh),
    "none": ([nn.Sequential(nn.Flatten(), nn.Identity())], nn.Identity),
    "not known": ([nn.Bilinear(3, 3, 3)], nn.Identity),
}


@pytest.mark.parametrize("case", BELOW)
def test_activation_of_layered_feedback_is_that_of_the_state(case: str) -> None:
    blocks, kind = BELOW[case]
    feedback = layered_feedback([*blocks, nn.Linear(3, 2)])[-1]
    assert type(feedback.activation) is kind


def test_layered_feedback_makes_no_feedback_of_the_first_block() -> None:
    """It needs none, so it may be of any kind, and takes no random numbers."""
    first, block = nn.Sequential(nn.Linear(4, 3), nn.Bilinear(3, 3, 3)), nn.Linear(3, 2)
    torch.manual_seed(1)
    (_, feedback) = layered_feedback([first, block])
    torch.manual_seed(1)
    assert torch.equal(feedback.mirrored.weight, made(block).weight)


@pytest.mark.parametrize("init", ["symmetric", "tied"])
def test_layered_feedback_takes_the_blocks_weights(init: Any) -> None:
    blocks = [nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Linear(3, 2)]
    net = TargetSequential(*blocks, feedback=layered_feedback(blocks), feedback_init=init)
    head = net.feedback["1"].mirrored
    assert torch.equal(head.current_weight(), blocks[1].weight.mT)


# Modules of one's own


class Scale(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * input


class NamedScale(Scale):
    """Keeps the forward of its base."""


class ShiftedScale(Scale):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class ScaleFeedback(Feedback):
    def forward(self, output: Tensor, code: Any) -> Tensor:
        return output / 2


@register_feedback(Scale)
def scale_feedback(module: Scale) -> Feedback:
    return ScaleFeedback()


def test_registered_modules_have_feedback() -> None:
    feedback = made(nn.Sequential(NamedScale(), nn.Linear(3, 2)))
    assert isinstance(feedback.parts["0"], ScaleFeedback)


@pytest.mark.parametrize("block", [ShiftedScale(), nn.Sequential(nn.Linear(3, 2), ShiftedScale())], ids=["alone", "in"])
def test_subclass_with_a_forward_of_its_own_is_refused(block: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"no feedback is known for ShiftedScale; .*register_feedback"):
        make_feedback(block)


def test_unknown_module_is_named() -> None:
    with pytest.raises(TypeError, match="no feedback is known for Bilinear"):
        TargetSequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Bilinear(3, 3, 2)))


@register_feedback(nn.Softsign)
class OneSign(Feedback):
    """A decorated class is registered too."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()

    def forward(self, output: Tensor, code: Any) -> Tensor:
        return output


def test_a_class_may_be_registered() -> None:
    assert isinstance(make_feedback(nn.Softsign()), OneSign)
