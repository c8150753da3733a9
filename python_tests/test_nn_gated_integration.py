"""``tpext.nn.GRU`` and ``tpext.nn.LSTM`` with what else torch offers: export, checkpointing, transforms, DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_integration import REVERSE_TRANSFORMS, gradients, join_processes, leave_with, task
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tpext
from tpext import Backprop, RegularizedInverse

T, B, I, H = 5, 3, 4, 6  # noqa: E741
CELLS = ["GRU", "LSTM"]
RULES = [Backprop(), RegularizedInverse(), RegularizedInverse(inverse="cell", slope_reg=1.0, credit="local")]

every_cell = pytest.mark.parametrize("cell", CELLS)
every_rule = pytest.mark.parametrize("rule", RULES, ids=["backprop", "branch", "cell"])


def make(cell: str, *arguments: Any, **options: Any) -> Any:
    return getattr(tpext.nn, cell)(I, H, *arguments, **options)


@every_cell
@every_rule
def test_export(cell, rule):
    module, x = make(cell, 2, rule=rule), torch.randn(T, B, I)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_cell
def test_torchscript_names_the_way_out(cell):
    module = make(cell)
    for jit in (torch.jit.script, lambda inner: torch.jit.trace(inner, torch.randn(T, B, I))):
        with pytest.raises(RuntimeError, match=rf"{cell}: torch.jit.\w+ is not supported; use torch.export.*to_torch"):
            jit(module)


@every_cell
@every_rule
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(cell, rule, use_reentrant):
    module = make(cell, 2, bidirectional=True, rule=rule)
    x = torch.randn(T, B, I)
    found = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)):
        module.zero_grad()
        of_run = x.clone().requires_grad_()
        run(of_run)[0].square().sum().backward()
        found.append([of_run.grad, *gradients(module).values()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@every_cell
def test_vmap_of_backprop(cell):
    module = make(cell, 2, bidirectional=True, dtype=torch.float64, rule=Backprop())
    x = torch.randn(3, T, B, I, dtype=torch.float64, requires_grad=True)
    found = []
    for output in (torch.func.vmap(lambda x: module(x)[0])(x), torch.stack([module(part)[0] for part in x])):
        found.append([output, *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@every_cell
def test_function_transforms_of_backprop(cell):
    module = make(cell, 2, dtype=torch.float64, rule=Backprop())
    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)

    def loss(x):
        return module(x)[0].square().sum()

    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    torch.testing.assert_close(torch.func.grad(loss)(x), gradient, rtol=1e-10, atol=1e-12)
    change = torch.func.jvp(loss, (x,), (tangent,))[1]
    torch.testing.assert_close(change, (gradient * tangent).sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES[:2], ids=["backprop", "branch"])
@pytest.mark.parametrize("cell", ["RNN", *CELLS])
def test_batches_of_gradients_are_refused(cell, rule):
    module, x = make(cell, rule=rule), torch.randn(T, B, I, requires_grad=True)
    output = module(x)[0]
    with pytest.raises(RuntimeError, match=r"is_grads_batched=True.*one gradient at a time"):
        torch.autograd.grad(output, x, torch.ones(2, *output.shape), is_grads_batched=True)


@every_cell
@pytest.mark.parametrize("transform", REVERSE_TRANSFORMS)
def test_function_transforms_of_a_target_rule_are_refused(cell, transform):
    module = make(cell)
    with pytest.raises(RuntimeError, match=r"rule=tpext\.Backprop\(\)"):
        REVERSE_TRANSFORMS[transform](lambda x: module(x)[0].sum())(torch.randn(T, B, I))


@every_cell
@every_rule
def test_forward_mode_is_refused(cell, rule):
    module, x = make(cell, rule=rule), torch.randn(T, B, I)
    if not rule.exact:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        module(torch.autograd.forward_ad.make_dual(x, x))


@every_cell
@every_rule
def test_functional_call(cell, rule):
    module, other = make(cell, rule=rule), make(cell, rule=rule)
    x = torch.randn(T, B, I)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    output, _ = torch.func.functional_call(module, parameters, (x,))
    output.square().sum().backward()
    other(x)[0].square().sum().backward()
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(parameters[name].grad, gradient)
    assert not gradients(module)


@every_cell
@every_rule
def test_frozen_parameters_and_inputs(cell, rule):
    module = make(cell, rule=rule)
    everything = {name: None for name, _ in module.named_parameters()}
    module(torch.randn(T, B, I))[0].sum().backward()
    assert gradients(module).keys() == everything.keys()
    module.zero_grad()
    module.weight_hh_l0.requires_grad_(False)
    module.bias_ih_l0.requires_grad_(False)
    module(torch.randn(T, B, I))[0].sum().backward()
    assert set(gradients(module)) == {"weight_ih_l0", "bias_hh_l0"}
    module.requires_grad_(False)
    assert not module(torch.randn(T, B, I))[0].requires_grad
    with torch.inference_mode():
        assert module(torch.randn(T, B, I))[0].is_inference()


class Classifier(nn.Module):
    """A recurrent network, and a head on its last output."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.rnn = getattr(tpext.nn, cell)(task()[0].shape[2], H, num_layers=2)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


def ddp_worker(rank: int, folder: str, cell: str) -> None:
    join_processes(rank, folder, "gloo")
    model = Classifier(cell).double()
    model.load_state_dict(torch.load(f"{folder}/model.pt"))
    parallel = DistributedDataParallel(model)
    x, label = task()
    half = slice(16 * rank, 16 * (rank + 1))
    nn.functional.cross_entropy(parallel(x[:, half].double()), label[half]).backward()
    leave_with(gradients(model), rank, folder)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@every_cell
def test_distributed_data_parallel_equals_one_process(tmp_path, cell):
    model = Classifier(cell).double()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path), cell), nprocs=2)
    x, label = task()
    nn.functional.cross_entropy(model(x.double()), label).backward()
    expected = gradients(model)
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13)
