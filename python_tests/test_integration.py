"""``tpext.nn.RNN`` inside the tools that people train with."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import itertools
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from own_rules import FeedbackAlignment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import tpext
from tpext import Backprop, LearnedInverse, RegularizedInverse

T, B, I, H = 5, 4, 3, 6  # noqa: E741
LENGTHS = [3, 5, 1, 4]
RULES = [
    Backprop(),
    RegularizedInverse(),
    RegularizedInverse(correction="difference", credit="local"),
    RegularizedInverse(correction="none", target_step=0.1, input_rule="target"),
    LearnedInverse(),
]
TARGET_RULES = RULES[1:]
# One of each class, where the options of a rule change nothing in what is traced; test_compiles_whole has them all.
KINDS = [pytest.param(rule, marks=[pytest.mark.slow] * (rule in RULES[2:4])) for rule in RULES]


class Classifier(nn.Module):
    """A recurrent layer, and a head on its last state."""

    def __init__(self, rule=None, **options):
        super().__init__()
        self.rnn = tpext.nn.RNN(I, H, rule=rule, **options)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[1][-1])


def task() -> tuple[Tensor, Tensor]:
    """Which of two marks came first: a few sequences to fit."""
    generator = torch.Generator().manual_seed(4)
    x = 0.1 * torch.randn(T, 32, I, generator=generator)
    label = torch.randint(0, 2, (32,), generator=generator)
    x[0, :, 0] += 2.0 * label - 1
    return x, label


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Optimizers


@pytest.mark.parametrize(
    "name",
    [
        "SGD",
        "Adam",
        "AdamW",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adagrad",
        "Adadelta",
        "RMSprop",
        "Rprop",
        "ASGD",
        "LBFGS",
        "Muon",
    ],
)
def test_any_torch_optimizer(name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no optimizer {name}")
    model = Classifier()
    x, label = task()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rate = {"SGD": 1.0, "ASGD": 1.0, "Adadelta": 3.0, "LBFGS": 0.1, "RAdam": 0.1, "Adagrad": 0.03, "Muon": 0.05}.get(
        name, 0.02
    )
    optimizer = getattr(torch.optim, name)(matrices if name == "Muon" else model.parameters(), lr=rate)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), label)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    losses = [optimizer.step(closure).item() for _ in range(40)]
    assert min(losses) < 0.5 * losses[0]


def test_gradient_clipping():
    model = Classifier()
    x, label = task()
    (1e3 * nn.functional.cross_entropy(model(x), label)).backward()
    total = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert total > 0.5
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients(model).values()]))
    torch.testing.assert_close(norm, torch.tensor(0.5))
    nn.utils.clip_grad_value_(model.parameters(), 0.01)
    assert max(g.abs().max() for g in gradients(model).values()) <= 0.01


def test_accumulated_micro_batches_and_scaled_losses():
    """The linearised correction is linear in the gradient, so both are exact for it, as for back-propagation."""
    for rule in RULES[:2]:
        model = Classifier(rule).double()
        x, label = task()
        x = x.double()
        nn.functional.cross_entropy(model(x), label, reduction="sum").backward()
        whole = gradients(model)
        model.zero_grad()
        for part, part_label in zip(x.split(8, dim=1), label.split(8), strict=True):
            loss = nn.functional.cross_entropy(model(part), part_label, reduction="sum")
            (2.0**16 * loss).backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient / 2.0**16, whole[name], rtol=1e-10, atol=1e-12)


def test_grad_scaler_steps():
    model, x, label = Classifier(), *task()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reference = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(nn.functional.cross_entropy(model(x), label)).backward()
    scaler.step(optimizer)
    nn.functional.cross_entropy(reference(x), label).backward()
    torch.optim.SGD(reference.parameters(), 0.1).step()
    for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


# torch.compile and friends


def run(rnn, module: tpext.nn.RNN, lengths: Tensor | None) -> dict[str, Tensor]:
    """Outputs and gradients of ``rnn`` (which may be ``module`` compiled)."""
    module.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(T, B, I, requires_grad=True)
    hx = torch.randn(module.num_layers * (1 + module.bidirectional), B, H, requires_grad=True)
    output, h_n = rnn(x, hx, lengths)
    ((output * torch.randn_like(output)).sum() + (h_n * torch.randn_like(h_n)).sum()).backward()
    return {"output": output, "h_n": h_n, "x": x.grad, "hx": hx.grad} | gradients(module)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole(rule):
    rnn = tpext.nn.RNN(I, H, 2, bidirectional=True, rule=rule)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for lengths in (None, torch.tensor(LENGTHS)):
        assert_same(run(compiled, rnn, lengths), run(rnn, rnn, lengths))


@pytest.mark.parametrize("rule", KINDS, ids=repr)
@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize(
    "layers", [pytest.param({}, marks=pytest.mark.slow), {"num_layers": 2, "bidirectional": True}], ids=repr
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole_without_outputs(rule, every, layers):
    rnn = tpext.nn.RNN(I, H, rule=rule, return_sequence=False, checkpoint_every=every, **layers)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for lengths in (None, torch.tensor(LENGTHS)):
        found = []
        for module in (compiled, rnn):
            rnn.zero_grad()
            x = torch.ones(T, B, I, requires_grad=True)
            output, h_n = module(x, None, lengths)
            assert output is None
            h_n.square().sum().backward()
            found.append({"h_n": h_n, "x": x.grad} | gradients(rnn))
        assert_same(*found)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_the_default_backend():
    rnn = tpext.nn.RNN(I, H, batch_first=False)
    compiled = torch.compile(rnn, fullgraph=True)
    lengths = torch.tensor(LENGTHS)
    assert_same(run(compiled, rnn, lengths), run(rnn, rnn, lengths))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_module_follows_its_rule():
    rnn = tpext.nn.RNN(I, H)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for rule in (RegularizedInverse(), RegularizedInverse(reg=5.0), Backprop(), RegularizedInverse(credit="local")):
        rnn.rule = rule
        assert_same(run(compiled, rnn, None), run(rnn, rnn, None))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_changing_sizes():
    rnn = tpext.nn.RNN(I, H, batch_first=True)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in [(2, 7, I), (3, 9, I), (5, 4, I)]:
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), rnn(x))
        compiled(x)[0].sum().backward()


@pytest.mark.parametrize("rule", KINDS, ids=repr)
@pytest.mark.parametrize(
    "mode", ["no_grad", pytest.param("inference_mode", marks=pytest.mark.slow), "frozen", "eval after training"]
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_gradients(rule, mode):
    rnn = tpext.nn.RNN(I, H, rule=rule)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, nullcontext)
    if mode == "frozen":
        rnn.requires_grad_(False)
    elif mode == "eval after training":
        assert_same(run(compiled, rnn, None), run(rnn, rnn, None))
        rnn.eval()
        context = torch.no_grad
    with context():
        x = torch.randn(T, B, I)
        for lengths in (None, torch.tensor(LENGTHS)):
            found = compiled(x, None, lengths)
            assert not found[0].requires_grad
            torch.testing.assert_close(found, rnn(x, None, lengths))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_stacked_with_changing_sizes_and_rule(rule):
    rnn = tpext.nn.RNN(I, H, 2, bidirectional=True, rule=rule)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager", dynamic=True)
    changes = {RegularizedInverse: {"reg": 3.0, "margin": 0.01}, LearnedInverse: {"target_step": 0.5}}
    changed = dataclasses.replace(rule, **changes.get(type(rule), {}))
    for rnn.rule in (rule, changed):
        for steps, batch in [(5, 4), (7, 3)]:
            x = torch.randn(steps, batch, I)
            found = []
            for module in (compiled, rnn):
                rnn.zero_grad()
                output, h_n = module(x)
                (output.square().sum() + h_n.sum()).backward()
                found.append({"output": output, "h_n": h_n} | gradients(rnn))
            assert_same(*found)


@pytest.mark.usefixtures("fresh_compiler")
def test_reconstruction_loss_compiles():
    rnn = tpext.nn.RNN(I, H, bidirectional=True, rule=LearnedInverse())
    x, lengths = torch.randn(T, B, I), torch.tensor(LENGTHS)
    compiled = torch.compile(rnn.reconstruction_loss, fullgraph=True, backend="aot_eager")
    found = []
    for loss in (compiled(x, None, lengths), rnn.reconstruction_loss(x, None, lengths)):
        rnn.zero_grad()
        loss.backward()
        found.append({"loss": loss.detach()} | gradients(rnn))
    assert_same(*found)


@pytest.mark.parametrize("rule", RULES[:2], ids=repr)
def test_export(rule):
    rnn = tpext.nn.RNN(I, H, 2, rule=rule)
    x = torch.randn(T, B, I)
    exported = torch.export.export(rnn, (x,)).module()
    torch.testing.assert_close(exported(x), rnn(x))


TORCHSCRIPT_MODULES = {
    "RNN": tpext.nn.RNN(I, H),
    "MLP": tpext.nn.MLP([I, H, 2]),
    "TargetLinear": tpext.nn.TargetLinear(I, H),
    "TargetSequential": tpext.nn.TargetSequential(nn.Sequential(nn.Linear(I, H), nn.Tanh()), nn.Linear(H, 2)),
    "HotTargetLoss": tpext.nn.HotTargetLoss(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TORCHSCRIPT_MODULES)
def test_torchscript_names_the_way_out(name):
    module = TORCHSCRIPT_MODULES[name]
    calls = [(torch.jit.script, module), (torch.jit.script, nn.Sequential(module))]
    if name in ("RNN", "TargetSequential"):  # a trace of the others works
        calls += [(lambda inner: torch.jit.trace(inner, torch.randn(T, B, I)), one) for _, one in calls]
    for jit, given in calls:
        with pytest.raises(RuntimeError, match=rf"{name}: torch.jit.\w+ is not supported; use torch.export") as caught:
            jit(given)
        assert ("to_torch()" in str(caught.value)) == hasattr(module, "to_torch")


# Autocast


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=repr)
def test_autocast_bfloat16(rule, options):
    theirs = nn.RNN(I, H, **options)
    ours = tpext.nn.RNN(I, H, rule=rule, **options)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    stack = ours.num_layers * (1 + ours.bidirectional)
    x, hx = torch.randn(T, B, I, requires_grad=True), torch.randn(stack, B, H)
    packed = pack_padded_sequence(x, torch.tensor([5, 4, 3, 1]))
    exact = ours(x, hx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for arguments in [(x,), (x, hx), (x.bfloat16(), hx), (x, hx.bfloat16()), (packed, hx)]:
            found, expected = ours(*arguments), theirs(*arguments)
            assert found[0].data.dtype == expected[0].data.dtype == torch.bfloat16
            assert found[1].dtype == expected[1].dtype == torch.bfloat16
        output, h_n = ours(x, hx, torch.tensor(LENGTHS))
        assert output.dtype == h_n.dtype == torch.bfloat16
        output, h_n = ours(x, hx)
        loss = output.float().square().mean()
    # float32 inside: one rounding of the output a layer, none a step
    torch.testing.assert_close(output.float(), exact[0], rtol=2**-6, atol=2**-7)
    ours.zero_grad()
    loss.backward()
    assert x.grad.dtype == torch.float32
    assert x.grad.isfinite().all()
    found = gradients(ours)
    ours.zero_grad()
    ours(x, hx)[0].square().mean().backward()
    for name, expected in gradients(ours).items():
        assert found[name].dtype == torch.float32
        assert (found[name] - expected).norm() <= 0.05 * expected.norm(), name


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("options", [{}, {"return_sequence": False, "checkpoint_every": 2}], ids=repr)
def test_backward_inside_autocast_is_that_outside(rule, options):
    rnn = tpext.nn.RNN(I, H, rule=rule, **options)
    found = []
    for inside in (False, True):
        rnn.zero_grad()
        x = torch.ones(T, B, I, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = rnn(x)[1].float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append({"x": x.grad} | gradients(rnn))
    assert_same(*found)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(T, B, I, dtype=torch.float64)
        assert {t.dtype for t in nn.RNN(I, H, dtype=torch.float64)(x)} == {torch.float64}
        for rule in RULES:
            assert {t.dtype for t in tpext.nn.RNN(I, H, dtype=torch.float64, rule=rule)(x)} == {torch.float64}


def test_reconstruction_loss_ignores_autocast():
    rnn = tpext.nn.RNN(I, H, 2, rule=LearnedInverse())
    x = torch.randn(T, B, I)
    expected = rnn.reconstruction_loss(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rnn.reconstruction_loss(x), expected)
        rnn.reconstruction_loss(x).backward()


# DistributedDataParallel


def join_processes(rank: int, folder: str, backend: str) -> torch.device:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.manual_seed(rank)
    return device


def leave_with(found: dict[str, Tensor], rank: int, folder: str) -> None:
    """Save what this process found, and leave together with the other."""
    torch.save({name: tensor.cpu() for name, tensor in found.items()}, f"{folder}/found{rank}.pt")
    # Without the interpreter's teardown: gloo's threads race with it and now and then abort.
    while not all(Path(folder, f"found{other}.pt").exists() for other in range(2)):
        time.sleep(0.02)
    os._exit(0)


def ddp_worker(rank: int, folder: str, backend: str, rule: tpext.rules.RecurrentRule) -> None:
    device = join_processes(rank, folder, backend)
    model = Classifier(num_layers=2, rule=rule).double()
    model.load_state_dict(torch.load(f"{folder}/model.pt"))
    parallel = DistributedDataParallel(model.to(device))
    x, label = (tensor.to(device) for tensor in task())
    half = slice(16 * rank, 16 * (rank + 1))
    nn.functional.cross_entropy(parallel(x[:, half].double()), label[half]).backward()
    leave_with(gradients(model), rank, folder)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, two_gpus])])
@pytest.mark.parametrize("rule", [tpext.RegularizedInverse(), FeedbackAlignment()], ids=repr)
def test_distributed_data_parallel_equals_one_process(tmp_path, rule, backend):
    model = Classifier(num_layers=2, rule=rule).double()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path), backend, rule), nprocs=2)
    x, label = task()
    nn.functional.cross_entropy(model(x.double()), label).backward()
    expected = gradients(model)
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13)


class Learner(nn.Module):
    """Layers with learned inverses and a head; ``forward`` gives the inverses' loss too."""

    def __init__(self, recurrent: bool, target_step: float) -> None:
        super().__init__()
        self.layers: nn.Module
        if recurrent:
            self.layers = tpext.nn.RNN(I, H, rule=LearnedInverse(target_step=target_step))
        else:
            rule = tpext.DifferenceTargetPropagation(target_step=target_step)
            self.layers = tpext.nn.MLP([I, H, H], output_activation="tanh", rule=rule)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor, reconstruct: bool = False) -> Tensor:
        if reconstruct:
            return self.layers.reconstruction_loss(x)
        output = self.layers(x)
        return self.head(output if isinstance(output, Tensor) else output[1][-1])


def learn(run: nn.Module, x: Tensor, label: Tensor) -> None:
    """Two iterations: the inverses, then all else."""
    optimizer = torch.optim.SGD(run.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run(x, reconstruct=True).backward()
        optimizer.step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), label).backward()
        optimizer.step()


def inverse_worker(rank: int, folder: str, recurrent: bool) -> None:
    join_processes(rank, folder, "gloo")
    # a mean over half the batch has twice the gradient, to which half the step gives the same displacement
    model = Learner(recurrent, 0.5).double()
    model.load_state_dict(torch.load(f"{folder}/model.pt"))
    x, label = task()
    half = slice(16 * rank, 16 * (rank + 1))
    x = x[:, half] if recurrent else x[0, half]
    learn(DistributedDataParallel(model, find_unused_parameters=True), x.double(), label[half])
    leave_with(model.state_dict(), rank, folder)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("recurrent", [True, False])
def test_learned_inverses_in_two_processes_equal_those_in_one(recurrent, tmp_path):
    model = Learner(recurrent, 1.0).double()
    start = copy.deepcopy(model.state_dict())
    torch.save(start, tmp_path / "model.pt")
    torch.multiprocessing.spawn(inverse_worker, (str(tmp_path), recurrent), nprocs=2)
    x, label = task()
    learn(model, (x if recurrent else x[0]).double(), label)
    untaught = {"layers.0.reverse_weight", "layers.0.reverse_bias"}
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        for name, expected in model.state_dict().items():
            assert torch.equal(expected, start[name]) == (name in untaught and not recurrent), name
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-13)


# Lightning


def test_lightning_trainer(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Classifier()
            self.losses = []

        def training_step(self, batch, _):
            x, label = batch
            loss = nn.functional.cross_entropy(self.model(x.transpose(0, 1)), label)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.02)

    x, label = task()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.transpose(0, 1), label), batch_size=16)
    lit = Lit()
    trainer = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(lit, data)
    assert len(lit.losses) == 40
    assert lit.losses[-1] < 0.5 * lit.losses[0]


# Checkpoints


def test_checkpoints_cross_between_torch_and_ours(tmp_path: Path):
    x = torch.randn(T, B, I)
    for layers, bidirectional, bias in itertools.product([1, 2], [False, True], [True, False]):
        options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
        for source, target in [(nn.RNN, tpext.nn.RNN), (tpext.nn.RNN, nn.RNN)]:
            saved, loaded = source(I, H, **options), target(I, H, **options)
            torch.save(saved.state_dict(), tmp_path / "state.pt")
            loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
            torch.testing.assert_close(loaded(x), saved(x))
    rnn = tpext.nn.RNN(I, H, rule=LearnedInverse(noise=0.5))
    torch.save(rnn, tmp_path / "module.pt")
    whole = torch.load(tmp_path / "module.pt", weights_only=False)
    assert whole.rule == rnn.rule
    assert torch.equal(whole(x)[0], rnn(x)[0])


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(rule, use_reentrant):
    rnn = tpext.nn.RNN(I, H, 2, bidirectional=True, rule=rule)

    def recomputed(*arguments):
        return checkpoint(rnn, *arguments, use_reentrant=use_reentrant)

    for lengths in (None, torch.tensor(LENGTHS)):
        assert_same(run(recomputed, rnn, lengths), run(rnn, rnn, lengths))


# Second derivatives and function transforms


@pytest.mark.parametrize("nonlinearity", ["tanh", "identity"])
def test_double_backward_under_backprop(nonlinearity):
    rnn = tpext.nn.RNN(2, 3, 2, nonlinearity, bidirectional=True, dtype=torch.float64, rule=Backprop())
    names = [name for name, _ in rnn.named_parameters()]

    def function(x, hx, *parameters):
        return torch.func.functional_call(rnn, dict(zip(names, parameters, strict=True)), (x, hx))

    inputs = [torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)]
    inputs += [parameter.detach().clone() for parameter in rnn.parameters()]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_double_backward_with_lengths_and_relu_equals_torch():
    """A gradient penalty, through the packed batch and its padded equivalent."""
    theirs = nn.RNN(I, H, nonlinearity="relu", dtype=torch.float64)
    ours = tpext.nn.RNN(I, H, nonlinearity="relu", dtype=torch.float64, rule=Backprop())
    ours.load_state_dict(theirs.state_dict())
    found = []
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor(LENGTHS)
    for module in (theirs, ours):
        padded = module is ours
        _, h_n = module(x, None, lengths) if padded else module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        (gradient,) = torch.autograd.grad(h_n.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append(gradients(module))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-12)


NAMES_BACKPROP = r"rule=tpext\.Backprop\(\)"


@pytest.mark.parametrize("rule", TARGET_RULES, ids=repr)
def test_double_backward_through_a_target_rule_is_refused(rule):
    rnn = tpext.nn.RNN(I, H, rule=rule)
    x = torch.randn(T, B, I, requires_grad=True)
    for inputs in (x, rnn.weight_hh_l0):
        with pytest.raises(RuntimeError, match=NAMES_BACKPROP):
            torch.autograd.grad(rnn(x)[0].square().sum(), inputs, create_graph=True)
    # also when the incoming gradient needs none itself
    with pytest.raises(RuntimeError, match=NAMES_BACKPROP):
        torch.autograd.grad(rnn(x)[0].sum(), x, create_graph=True)


@pytest.mark.parametrize("rule", TARGET_RULES, ids=repr)
def test_function_transforms_of_a_target_rule_are_refused(rule):
    rnn = tpext.nn.RNN(I, H, rule=rule)
    x = torch.randn(T, B, I)
    with pytest.raises(RuntimeError, match=NAMES_BACKPROP):
        torch.func.grad(lambda x: rnn(x)[0].sum())(x)
    with pytest.raises(RuntimeError, match=NAMES_BACKPROP):
        torch.func.vmap(lambda x: rnn(x)[0])(torch.randn(2, T, B, I))


REVERSE_TRANSFORMS = {
    "grad": torch.func.grad,
    "vjp": lambda function: lambda x: torch.func.vjp(function, x)[1](torch.ones(())),
    "jacrev": torch.func.jacrev,
    "vmap of grad": lambda function: lambda x: torch.func.vmap(torch.func.grad(function))(x.unsqueeze(0)),
}


@pytest.mark.parametrize("rule", TARGET_RULES, ids=repr)
@pytest.mark.parametrize("transform", REVERSE_TRANSFORMS)
def test_reverse_mode_transforms_raise_rather_than_give_wrong_numbers(rule, transform):
    rnn = tpext.nn.RNN(I, H, rule=rule)
    x = torch.randn(T, B, I)
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}
    with pytest.raises(RuntimeError, match=NAMES_BACKPROP):
        REVERSE_TRANSFORMS[transform](lambda x: rnn(x)[0].sum())(x)
    with pytest.raises(RuntimeError, match=NAMES_BACKPROP):
        REVERSE_TRANSFORMS[transform](
            lambda weight: torch.func.functional_call(rnn, parameters | {"weight_hh_l0": weight}, (x,))[0].sum()
        )(parameters["weight_hh_l0"])


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("lengths", [None, torch.tensor(LENGTHS)], ids=["all", "lengths"])
def test_function_transforms_of_backprop(nonlinearity, lengths):
    rnn = tpext.nn.RNN(I, H, 2, nonlinearity, bidirectional=True, dtype=torch.float64, rule=Backprop())
    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}

    def loss(parameters, x):
        output, h_n = torch.func.functional_call(rnn, parameters, (x, None, lengths))
        return output.square().sum() + h_n.sum()

    output, h_n = rnn(x.requires_grad_(), None, lengths)
    expected = torch.autograd.grad(output.square().sum() + h_n.sum(), [*rnn.parameters(), x])
    of_parameters, of_x = torch.func.grad(loss, (0, 1))(parameters, x.detach())
    torch.testing.assert_close([*of_parameters.values(), of_x], list(expected), rtol=1e-10, atol=1e-12)
    moved = torch.func.jvp(lambda x: loss(parameters, x), (x.detach(),), (tangent,))[1]
    torch.testing.assert_close(moved, (of_x * tangent).sum(), rtol=1e-10, atol=1e-12)


def test_gradients_of_each_sample():
    """``vmap`` of ``grad``: of a batch, those of each row alone."""
    rnn = tpext.nn.RNN(I, H, dtype=torch.float64, rule=Backprop())
    x = torch.randn(T, B, I, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(rnn, parameters, (row.unsqueeze(1),))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)
    for row in range(B):
        rnn.zero_grad()
        rnn(x[:, row : row + 1])[0].square().sum().backward()
        for name, gradient in gradients(rnn).items():
            torch.testing.assert_close(each[name][row], gradient, rtol=1e-10, atol=1e-12)


def test_vmap_of_backprop():
    rnn = tpext.nn.RNN(I, H, 2, bidirectional=True, dtype=torch.float64, rule=Backprop())
    x = torch.randn(3, T, B, I, dtype=torch.float64, requires_grad=True)
    found = []
    for output in (torch.func.vmap(lambda x: rnn(x)[0])(x), torch.stack([rnn(part)[0] for part in x])):
        found.append([output, *torch.autograd.grad(output.square().sum(), [x, *rnn.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_forward_mode_is_refused(rule):
    """Rather than a zero tangent, which torch's fallback for ops without the formula gives."""
    rnn = tpext.nn.RNN(I, H, rule=rule)
    x = torch.randn(T, B, I)
    if not rule.exact:
        with pytest.raises(
            NotImplementedError, match=r"forward-mode .* or torch\.nn\.RNN, which tpext\.nn\.RNN\.to_torch"
        ):
            torch.func.jvp(lambda x: rnn(x)[0], (x,), (x,))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jacfwd(lambda x: rnn(x)[0])(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        rnn(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_functional_call(rule):
    rnn, other = tpext.nn.RNN(I, H, rule=rule), tpext.nn.RNN(I, H, rule=rule)
    x = torch.randn(T, B, I)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    output, h_n = torch.func.functional_call(rnn, parameters, (x,))
    torch.testing.assert_close((output, h_n), other(x))
    output.square().sum().backward()
    other(x)[0].square().sum().backward()
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(parameters[name].grad, gradient)
    assert not gradients(rnn)


def test_parametrized_weights():
    rnn = tpext.nn.RNN(I, H)
    nn.utils.parametrizations.orthogonal(rnn, "weight_hh_l0")
    torch.testing.assert_close(rnn.weight_hh_l0 @ rnn.weight_hh_l0.T, torch.eye(H), atol=1e-5, rtol=0)
    rnn(torch.randn(T, B, I))[0].sum().backward()
    assert rnn.parametrizations.weight_hh_l0.original.grad.abs().sum() > 0


def test_frozen_parameters_and_inputs():
    for rule in RULES:
        rnn = tpext.nn.RNN(I, H, rule=rule)
        rnn.weight_hh_l0.requires_grad_(False)
        rnn.bias_ih_l0.requires_grad_(False)
        rnn(torch.randn(T, B, I))[0].sum().backward()
        assert set(gradients(rnn)) == {"weight_ih_l0", "bias_hh_l0"}
        rnn.requires_grad_(False)
        assert not rnn(torch.randn(T, B, I))[0].requires_grad
        with torch.inference_mode():
            assert rnn(torch.randn(T, B, I))[0].is_inference()


WORKERS = """
import sys

import torch

import tpext


class Gradients(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, seed):
        torch.manual_seed(seed)
        rnn = tpext.nn.RNN(3, 64)
        rnn(torch.randn(40, 32, 3))[0].square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in rnn.parameters()])


def two_threads(worker):
    torch.set_num_threads(2)


if __name__ == "__main__":
    two_threads(None)
    expected = torch.stack([Gradients()[seed] for seed in range(2)])
    torch.randn(400, 400) @ torch.randn(400, 400)
    context, worker_init_fn = {"spawn": ("spawn", two_threads), "fork": ("fork", None)}[sys.argv[1]]
    options = {"num_workers": 1, "batch_size": 2, "multiprocessing_context": context}
    (found,) = torch.utils.data.DataLoader(Gradients(), worker_init_fn=worker_init_fn, **options)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)
"""


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_compute_after_the_parent_has_on_several_threads(tmp_path: Path, start: str) -> None:
    """Spawned they may have several threads, forked one, which is what a worker has by itself (docs/faq.md)."""
    (tmp_path / "script.py").write_text(WORKERS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_WAIT_POLICY": "passive"}
    subprocess.run([sys.executable, "script.py", start], cwd=tmp_path, env=environment, check=True, timeout=180)
