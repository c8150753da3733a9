"""Networks of blocks trained by targets: gradients by their equations, and the tools that people train with."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from target_networks import (
    ALL_RULES,
    DOUBLE,
    assert_equal,
    assert_same,
    degrees,
    each_rule,
    each_target_rule,
    gradients,
    make_batch,
    make_blocks,
    make_net,
)
from test_integration import join_processes, leave_with
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tpext import Backprop, DifferenceTargets, DirectTargets, GaussNewtonTargets
from tpext.feedback import LDRL, BlockCall, ClosedForm, DifferenceReconstruction, RunningLDRL
from tpext.nn import TargetSequential


def backward(run: Callable[[Tensor], Tensor], net: nn.Module, size: int = 4) -> dict[str, Tensor]:
    net.zero_grad()
    x, labels = make_batch(size)
    functional.cross_entropy(run(x.to(next(net.parameters()).dtype)), labels).backward()
    return gradients(net)


# Gradients by their equations


def wanted_displacements(net: TargetSequential, calls: Sequence[BlockCall], d: Tensor) -> list[Tensor]:
    """Each rule's displacements by its equation, with the feedback as a black box."""
    rule, output = net.rule, calls[-1].output
    moves = [d]
    for index in reversed(range(1, len(calls))):
        call = calls[index]
        if isinstance(rule, GaussNewtonTargets):
            moves.append(gauss_newton(net.blocks[index:], call.input, d, rule.damping))
        elif isinstance(rule, DirectTargets):
            moves.append(call.feedback(output + d, call.input) - call.feedback(output, call.input))
        else:
            target = call.feedback(call.output + moves[-1], call.code)
            corrected = isinstance(rule, DifferenceTargets)
            moves.append(target - (call.feedback(call.output, call.code) if corrected else call.input))
    return moves[::-1]


def gauss_newton(above: nn.Module, state: Tensor, d: Tensor, damping: float) -> Tensor:
    """The least of ``||J m - d||^2 + damping ||m||^2`` sample by sample."""
    moves = []
    for one, wish in zip(state, d, strict=True):
        jacobian = torch.func.jacrev(lambda s: above(s[None])[0])(one).reshape(wish.numel(), -1)
        eye = damping**0.5 * torch.eye(jacobian.shape[1], dtype=DOUBLE)
        stacked = torch.cat([jacobian, eye]) if damping else jacobian
        aim = torch.cat([wish, eye.new_zeros(len(eye))]) if damping else wish
        moves.append(torch.linalg.lstsq(stacked, aim[:, None], driver="gelsd").solution.reshape(one.shape))
    return torch.stack(moves)


@each_target_rule
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_the_local_losses(rule: Any, normalize: bool, reduction: Any) -> None:
    """``1/N sum 1/2 ||F_i(s_{i-1}) - (s_i + d_i)||^2``, over ``target_step`` where normalised."""
    net = make_net(dataclasses.replace(rule, normalize=normalize, reduction=reduction))
    x, labels = make_batch()
    x.requires_grad_()
    trace = net.trace(x)
    loss = functional.cross_entropy(trace.output, labels, reduction=reduction)
    loss.backward()
    (grad,) = torch.autograd.grad(functional.cross_entropy(net.blocks(x), labels, reduction="sum"), x)
    logits = trace.output.detach()
    error = torch.softmax(logits, 1) - functional.one_hot(labels, 3)
    with torch.no_grad():
        moves = wanted_displacements(net, trace.calls, -rule.target_step * error)
    found, found_input = gradients(net.blocks), x.grad
    net.zero_grad()
    count = len(x) if reduction == "mean" else 1
    scale = 1 / (count * (rule.target_step if normalize else 1))
    for index, (call, move) in enumerate(zip(trace.calls, moves, strict=True)):
        state = x if index == 0 else call.input
        local = 0.5 * (call.block(state) - (call.output + move)).square().sum() * scale
        if index == 0:
            (grad,) = torch.autograd.grad(local, x, retain_graph=True)
            # what is below receives the first local loss's gradient
            assert_equal(found_input, grad, 1e-10)
        local.backward()
    for name, gradient in gradients(net.blocks).items():
        assert_equal(found[name], gradient, 1e-10)


@each_target_rule
def test_output_layer_learns_as_by_back_propagation(rule: Any) -> None:
    net = make_net(rule)
    exact = backward(net.blocks, net)
    ours = backward(net, net)
    for name in ("blocks.3.weight", "blocks.3.bias"):
        assert_equal(ours[name], exact[name], 1e-12)
    assert degrees(ours["blocks.0.0.weight"], exact["blocks.0.0.weight"]) > 1


@pytest.mark.parametrize("target_step", [1e-3, 1.0, 100.0])
def test_tied_linear_top_hands_down_back_propagations_gradient(target_step: float) -> None:
    net = make_net(DifferenceTargets(target_step=target_step), feedback_init="tied")
    exact = backward(net.blocks, net)
    ours = backward(net, net)
    for name in ("blocks.2.1.weight", "blocks.2.1.bias"):
        assert_equal(ours[name], exact[name], 1e-12)


def test_backprop_is_torch() -> None:
    net = make_net(Backprop())
    x, labels = make_batch()
    found = []
    for run in (net, net.blocks):
        net.zero_grad()
        x.grad = None
        x.requires_grad_()
        loss = functional.cross_entropy(run(x), labels)
        (penalty,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + penalty.square().sum()).backward()
        found.append([x.grad, *gradients(net).values()])
    assert len(found[0]) == 9
    assert all(map(torch.equal, *found))
    assert torch.equal(torch.func.vmap(net)(x.detach()[None]), net.blocks(x)[None])


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_undamped_gauss_newton_targets_reach_the_output_target(damping: float) -> None:
    """``J m = d`` where the Jacobian has full row rank, and the shortest such ``m``."""
    net = make_net(GaussNewtonTargets(damping=damping))
    calls = net.trace(make_batch()[0]).calls
    d = torch.randn_like(calls[-1].output)
    for index, move in enumerate(net.rule.displacements(calls, d)[:-1], 1):
        assert_equal(move, gauss_newton(net.blocks[index:], calls[index].input, d, damping), 1e-9)
        if damping == 0:
            pushed = torch.func.jvp(net.blocks[index:], (calls[index].input,), (move,))[1]
            assert_equal(pushed, d, 1e-9)


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("hidden_activation", ["identity", "tanh"])
@pytest.mark.parametrize("recurrent_input", [False, True])
def test_direct_feedback_by_its_equation(
    hidden: Any, activation: Any, hidden_activation: Any, recurrent_input: bool
) -> None:
    """``psi([u s] Q^T + c)``, ``u`` a shared hidden layer of the output, which the last hidden block skips."""
    rule = DirectTargets(
        hidden=hidden,
        activation=activation,
        hidden_activation=hidden_activation,
        recurrent_input=recurrent_input,
    )
    net = make_net(rule)
    calls = net.trace(make_batch()[0]).calls
    functions: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "tanh": torch.tanh}
    y = torch.randn_like(calls[-1].output)
    shared = {id(call.feedback.hidden[0]) for call in calls[1:3]}
    assert len(shared) == 1
    for index, call in enumerate(calls[1:], 1):
        u = y
        if hidden and index < 3:
            layer = call.feedback.hidden[0]
            u = functions[hidden_activation](y @ layer.weight.T + layer.bias)
        if recurrent_input:
            u = torch.cat([u, call.input.flatten(1)], 1)
        linear = call.feedback.linear
        expected = functions[activation](u @ linear.weight.T + linear.bias).view_as(call.input)
        assert_equal(call.feedback(y, call.code), expected, 1e-12)


@pytest.mark.parametrize(
    "change", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), nn.Module.float]
)
def test_shared_hidden_layer_is_stored_once_and_stays_shared(change: Any) -> None:
    net = change(make_net(DirectTargets(hidden=6)))
    first, second, last = (feedback.hidden[0] for feedback in net.feedback.values())
    assert first is second
    assert last is None
    assert first.weight.dtype == net.blocks[3].weight.dtype
    assert len([name for name, p in net.feedback.state_dict().items() if p.shape == (6, 3)]) == 1


# Modules around the network


def test_modules_above_and_below_learn() -> None:
    """The head by the chain rule, the stem by that from the first block's local gradient."""
    net = make_net(DifferenceTargets(target_step=0.7))
    stem, head = nn.Conv2d(2, 2, 1).double(), nn.Linear(3, 3).double()
    x, labels = make_batch()
    functional.cross_entropy(head(net(stem(x))), labels).backward()
    below = stem(x)
    trace = net.trace(below.detach().requires_grad_())
    output = trace.output.detach().requires_grad_()
    (at_output, *at_head) = torch.autograd.grad(
        functional.cross_entropy(head(output), labels), [output, *head.parameters()]
    )
    for parameter, gradient in zip(head.parameters(), at_head, strict=True):
        assert_equal(parameter.grad, gradient, 1e-12)
    local = net.rule.local_gradients(trace.calls, at_output)[0]
    fresh = below.detach().requires_grad_()
    (at_stem,) = torch.autograd.grad(net.blocks[0](fresh), fresh, local)
    for parameter, gradient in zip(
        stem.parameters(), torch.autograd.grad(below, stem.parameters(), at_stem), strict=True
    ):
        assert_equal(parameter.grad, gradient, 1e-12)


@each_rule
def test_next_module_may_work_in_place(rule: Any) -> None:
    net = make_net(rule)
    found = [backward(lambda x, inplace=inplace: nn.ReLU(inplace)(net(x)), net) for inplace in (False, True)]
    assert_same(*found)


@each_rule
def test_activations_inside_blocks_may_work_in_place(rule: Any) -> None:
    net = make_net(rule)
    assert net.blocks[1][1].inplace
    inplace = backward(net, net)
    net.blocks[1][1].inplace = False
    assert_same(inplace, backward(net, net), 1e-12)


@each_target_rule
def test_block_that_changes_its_input_in_place_is_named(rule: Any) -> None:
    """It would change the state that the block below is to learn from."""
    net = TargetSequential(
        nn.Linear(4, 4), nn.Sequential(nn.ELU(inplace=True), nn.Linear(4, 3)), rule=rule, input_shape=(4,)
    )
    x = torch.randn(5, 4)
    try:
        net(x).square().sum().backward()
    except ValueError as error:
        assert "block 1 must leave its input as it is" in str(error)  # noqa: PT017
        return
    found = gradients(net)
    net.zero_grad()
    net.blocks[1][0].inplace = False
    net(x).square().sum().backward()
    assert_same(found, gradients(net))


@each_rule
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(rule: Any, use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), make_net(rule)).double()
    expected = backward(model, model)
    found = backward(lambda x: checkpoint(model[1], model[0](x), use_reentrant=use_reentrant), model)
    assert_same(found, expected)


@each_rule
def test_hooks_and_clipping_see_the_parameters(rule: Any) -> None:
    net = make_net(rule)
    seen: list[str] = []
    for name, parameter in net.blocks.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    grads = backward(net, net)
    assert sorted(seen) == sorted(name for name, _ in net.blocks.named_parameters())
    total = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert_equal(total, torch.cat([grad.flatten() for grad in grads.values()]).norm(), 1e-12)
    clipped = torch.cat([grad.flatten() for grad in gradients(net).values()]).norm()
    assert 0.99e-3 < clipped <= 1e-3


@each_target_rule
def test_frozen_blocks_receive_nothing(rule: Any) -> None:
    net = make_net(rule)
    expected = backward(net, net)
    net.blocks[0].requires_grad_(False)
    net.blocks[3].requires_grad_(False)
    assert_same(backward(net, net), {name: grad for name, grad in expected.items() if name.split(".")[1] in "12"})
    net.requires_grad_(False)
    assert not net(make_batch()[0]).requires_grad


@each_rule
def test_parameters_of_a_functional_call_receive_gradients(rule: Any) -> None:
    net = make_net(rule)
    expected = backward(net, net)
    net.zero_grad()
    x, labels = make_batch()
    parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in net.named_parameters()}
    functional.cross_entropy(torch.func.functional_call(net, parameters, (x,)), labels).backward()
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert_same(found, expected, 1e-12)
    assert not gradients(net)


@each_rule
def test_parametrized_weights_learn(rule: Any) -> None:
    net = make_net(rule)
    expected = backward(net, net)["blocks.1.0.weight"]

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(net.blocks[1][0], "weight", Doubled())
    net.blocks[1][0].parametrizations.weight.original.data /= 2
    found = backward(net, net)["blocks.1.0.parametrizations.weight.original"]
    assert_equal(found, 2 * expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_rule
def test_autocast(rule: Any, dtype: torch.dtype) -> None:
    """Backward outside of it too, as is usual; near the numbers of float32."""
    net = make_net(rule).float()
    exact = backward(net, net)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return net(x).float()

    found = backward(run, net)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm(), name


# Evaluation


@each_rule
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_its_blocks(rule: Any, context: Any) -> None:
    net = make_net(rule)
    x = make_batch()[0]
    expected, random_state = net.blocks(x), torch.get_rng_state()
    with context():
        found = net(x)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert torch.equal(net(x), expected)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_evaluation_after_training_mode() -> None:
    """Dropout and batch normalisation: by the mode, as in torch."""
    net = TargetSequential(
        nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ELU(), nn.Dropout(0.5)), nn.Linear(5, 3)
    )
    x = torch.randn(8, 4)
    torch.manual_seed(3)
    expected = copy.deepcopy(net.blocks)(x)
    torch.manual_seed(3)
    assert torch.equal(net(x), expected)
    net.eval()
    kept, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert torch.equal(net(x), net.blocks(x))
    net(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(net.state_dict(), kept)
    assert all(p.grad.isfinite().all() for p in net.blocks.parameters())


# Sizes of batches


@each_rule
@pytest.mark.parametrize("size", [1, 0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_small_batches(rule: Any, size: int, reduction: Any) -> None:
    rule = rule if isinstance(rule, Backprop) else dataclasses.replace(rule, reduction=reduction)
    net = make_net(rule)
    x, labels = make_batch(size)
    functional.cross_entropy(net(x), labels, reduction="sum").backward()
    found = gradients(net)
    assert len(found) == 8
    if size == 0:
        assert not any(gradient.any() for gradient in found.values())
        return
    # in a batch of two of the same, each as alone
    net.zero_grad()
    loss = functional.cross_entropy(net(x.repeat(2, 1, 1, 1)), labels.repeat(2), reduction=reduction)
    loss.backward()
    times = 2 if reduction == "sum" else 1
    assert_same(gradients(net), {name: times * gradient for name, gradient in found.items()}, 1e-10)


@each_target_rule
def test_samples_are_alike_in_any_batch(rule: Any) -> None:
    """A mean over the batch of what each sample alone gives."""
    net = make_net(rule)
    whole = backward(net, net)
    x, labels = make_batch()
    alone = []
    for one, label in zip(x.split(1), labels.split(1), strict=True):
        net.zero_grad()
        functional.cross_entropy(net(one), label).backward()
        alone.append(gradients(net))
    assert_same(whole, {name: sum(part[name] for part in alone) / 4 for name in whole}, 1e-10)


# torch.compile


def make_trainer(net: TargetSequential) -> Any:
    if isinstance(net.rule, DirectTargets):
        return DifferenceReconstruction(net, lr=0.01, noise=0.1)
    return LDRL(net, lr=0.01, noise=0.2, iterations=2) if len(net.feedback) else None


def run_steps(run: Callable[[Tensor], Tensor], net: TargetSequential, steps: int = 3) -> dict[str, Tensor]:
    trainer, optimizer = make_trainer(net), torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x, labels = make_batch()
    for _ in range(steps):
        if trainer is not None:
            trainer.step(x)
        optimizer.zero_grad()
        functional.cross_entropy(run(x), labels).backward()
        optimizer.step()
    return {name: value.clone() for name, value in net.state_dict().items()}


@each_rule
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole(rule: Any) -> None:
    net = make_net(rule)
    other = copy.deepcopy(net)
    expected = run_steps(net, net)
    found = run_steps(torch.compile(other, fullgraph=True, backend="aot_eager"), other)
    assert_same(found, expected, 1e-11)


@pytest.mark.parametrize("init", ["symmetric", "tied"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_feedback_follows_its_weights(init: Any) -> None:
    """Tied weights are the blocks' of the moment."""
    net = make_net(DifferenceTargets(target_step=0.7), feedback_init=init)
    other = copy.deepcopy(net)
    found = []
    for model, run in ((net, net), (other, torch.compile(other, fullgraph=True, backend="aot_eager"))):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(3):
            backward(run, model)
            optimizer.step()
        found.append(model.state_dict())
    assert_same(found[1], found[0], 1e-11)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_network_follows_its_rule() -> None:
    net = make_net(DifferenceTargets())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = []
    for rule in (DifferenceTargets(), DifferenceTargets(target_step=3.0), DifferenceTargets(2.0, normalize=False)):
        net.rule = rule
        found.append(backward(compiled, net))
        assert_same(found[-1], backward(net, net), 1e-11)
    assert not torch.equal(found[0]["blocks.0.0.weight"], found[1]["blocks.0.0.weight"])


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_changing_batches_and_without_gradients() -> None:
    net = make_net(DifferenceTargets(target_step=0.7))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (4, 3):
        assert_same(backward(compiled, net, size), backward(net, net, size), 1e-11)
        with torch.no_grad():
            assert_equal(compiled(make_batch(size)[0]), net(make_batch(size)[0]), 1e-12)


@pytest.mark.usefixtures("fresh_compiler")
def test_overlapping_pools_compile() -> None:
    blocks = [nn.Conv2d(2, 3, 3), nn.Sequential(nn.Conv2d(3, 3, 3), nn.MaxPool2d(3, 2, padding=1), nn.Flatten())]
    net = TargetSequential(*blocks, nn.Linear(3, 3)).double()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same(backward(compiled, net), backward(net, net), 1e-11)


# Not a derivative


NAMES_BACKPROP = r"rule=tpext\.Backprop\(\)"


@each_target_rule
def test_double_backward_is_refused(rule: Any) -> None:
    net = make_net(rule)
    x = make_batch()[0].requires_grad_()
    for inputs in (x, net.blocks[3].weight):
        with pytest.raises(RuntimeError, match=NAMES_BACKPROP):
            torch.autograd.grad(net(x).square().sum(), inputs, create_graph=True)


TRANSFORMS: dict[str, Any] = {
    "grad": lambda net: torch.func.grad(lambda x: net(x).sum()),
    "jacrev": torch.func.jacrev,
    "vjp": lambda net: lambda x: torch.func.vjp(net, x),
    "vmap": lambda net: lambda x: torch.func.vmap(net)(x[None]),
}


@each_target_rule
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_are_refused(rule: Any, transform: str) -> None:
    net = make_net(rule)
    with pytest.raises(RuntimeError, match=NAMES_BACKPROP):
        TRANSFORMS[transform](net)(make_batch()[0])


@each_target_rule
def test_forward_mode_is_refused(rule: Any) -> None:
    net, x = make_net(rule), make_batch()[0]
    with pytest.raises(NotImplementedError, match=r"TargetSequential: .*forward-mode"):
        torch.func.jvp(net, (x,), (x,))


# Other processes, Lightning, checkpoints

TRAINERS: dict[str, Any] = {
    "LDRL": lambda net: LDRL(net, lr=0.01, noise=0.2, iterations=2, momentum=0.9),
    "LDRL by autograd": lambda net: LDRL(net, lr=0.01, noise=0.2),
    "RunningLDRL": lambda net: RunningLDRL(net, noise=0.2, draws=2),
    "RunningLDRL, grid": lambda net: RunningLDRL(net, noise=0.2, draws=2, pixels="grid"),
    "ClosedForm": ClosedForm,
    "DifferenceReconstruction": lambda net: DifferenceReconstruction(net, lr=0.01, noise=0.2),
}


def distributed_net(name: str) -> TargetSequential:
    torch.manual_seed(5)
    if name != "LDRL by autograd":
        return make_net(DifferenceTargets(target_step=0.7))
    blocks = make_blocks()
    return TargetSequential(blocks[0], nn.Sequential(nn.Tanh(), *blocks[1:3]), blocks[3]).double()


def learn(model: nn.Module, trainer: Any, x: Tensor, labels: Tensor, traced: bool = False) -> None:
    """Two steps; the feedback's on the batch itself, or on a trace of the bare network."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        trainer.step(trainer.net.trace(x) if traced else x)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


def worker(rank: int, folder: str) -> None:
    join_processes(rank, folder, "gloo")
    found = {}
    x, labels = make_batch()
    half = slice(2 * rank, 2 * rank + 2)
    for name, make in TRAINERS.items():
        for traced in (False, True):
            net = distributed_net(name)
            learn(DistributedDataParallel(net), make(net), x[half], labels[half], traced)
            found |= {f"{name}.{traced}.{key}": value for key, value in net.state_dict().items()}
    leave_with(found, rank, folder)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_two_processes_equal_one_on_the_joint_batch(tmp_path: Path) -> None:
    """Blocks and feedback, on batches and on traces: the noise is that of the row in the joint batch."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    expected = {}
    for name, make in TRAINERS.items():
        net = distributed_net(name)
        before = copy.deepcopy(net.feedback.state_dict())
        learn(net, make(net), *make_batch())
        assert any(not torch.equal(before[key], value) for key, value in net.feedback.state_dict().items())
        for traced in (False, True):
            expected |= {f"{name}.{traced}.{key}": value for key, value in net.state_dict().items()}
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"found{rank}.pt"), expected, 1e-10)


def test_lightning_epoch(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net(DifferenceTargets(target_step=0.7))
            self.trainer_of_feedback = make_trainer(self.net)

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, labels = batch
            trace = self.net.trace(x)
            self.trainer_of_feedback.step(trace)
            return functional.cross_entropy(trace.output, labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    module = Lit()
    other = copy.deepcopy(module.net)
    x, labels = make_batch(12)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=4))
    # the same by hand
    feedback, optimizer = make_trainer(other), torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    for part, part_labels in zip(x.split(4), labels.split(4), strict=True):
        feedback.step(part)
        optimizer.zero_grad()
        functional.cross_entropy(other(part), part_labels).backward()
        optimizer.step()
    assert_same(module.net.state_dict(), other.state_dict(), 1e-12)


@pytest.mark.parametrize(
    ("rule", "init"),
    [*((rule, "random") for rule in ALL_RULES), (DifferenceTargets(target_step=0.7), "tied")],
    ids=repr,
)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "module"])
def test_saved_network_goes_on_alike(rule: Any, init: Any, way: str) -> None:
    net = make_net(rule, feedback_init=init)
    stored = io.BytesIO()
    if way == "state_dict":
        torch.save(net.state_dict(), stored)
        stored.seek(0)
        other = make_net(rule, feedback_init=init)
        assert other.load_state_dict(torch.load(stored)) == ([], [])
    elif way == "module":
        torch.save(net, stored)
        stored.seek(0)
        other = torch.load(stored, weights_only=False)
    else:
        other = copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert other.rule == net.rule
    for model in (net, other):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            backward(model, model)
            optimizer.step()
    assert_same(other.state_dict(), net.state_dict())
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in other.parameters()}


def test_network_learns() -> None:
    """An exclusive or of two signs, which no linear map finds, its feedback learned beside."""
    x = torch.randn(256, 2)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    net = TargetSequential(
        nn.Sequential(nn.Linear(2, 24), nn.ELU()), nn.Sequential(nn.Linear(24, 24), nn.ELU()), nn.Linear(24, 2)
    )
    trainer = LDRL(net, lr=0.05, noise=0.1, iterations=3)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(200):
        trace = net.trace(x)
        trainer.step(trace)
        optimizer.zero_grad()
        functional.cross_entropy(trace.output, labels).backward()
        optimizer.step()
    assert (net(x).argmax(1) == labels).float().mean() > 0.95
