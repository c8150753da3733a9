"""A whole training step by every rule against ``torch.nn.RNN`` with BPTT, and against an eager TP loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gpu import REGIMES, SCAN_DTYPES, TARGETS, cudnn_tf32, kernels, name_dtype, name_sizes

import tpext

SIZES = [
    (6, 100, 20, 60),
    (6, 100, 20, 120),
    (1, 100, 16, 784),
    (1, 128, 512, 784),
    (1, 256, 64, 784),
    (56, 512, 512, 14),
]
LOOP = (1, 100, 16, 784)
SWEEP = [(1, 100, 16, time) for time in (30, 100, 300, 1000, 3000)]
SWEEP += [(1, hidden, 16, 200) for hidden in (16, 32, 64, 128, 256, 512)]

RULES = {
    "local": tpext.RegularizedInverse(credit="local"),
    "through_time": tpext.RegularizedInverse(credit="through_time"),
    "backprop": tpext.Backprop(),
}


class Case(NamedTuple):
    """The same training step for ``torch.nn.RNN`` and ours, with orthogonal weights and a linear head."""

    module: torch.nn.Module
    reference: torch.nn.Module
    head: torch.nn.Module
    x: torch.Tensor
    labels: torch.Tensor
    loss: str

    def step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
        """Forward, target pass or back-propagation, weight gradients; cross-entropy; an update if one is given."""

        def run() -> None:
            model.zero_grad()
            self.head.zero_grad()
            output, last = model(self.x)
            features = last[0] if self.loss == "last" else output.flatten(0, 1)
            torch.nn.functional.cross_entropy(self.head(features), self.labels).backward()
            if optimizer is not None:
                optimizer.step()

        return run

    def training_step(self, model: torch.nn.Module) -> Callable[[], None]:
        # Steps too small to change what is timed.
        parameters = [*model.parameters(), *self.head.parameters()]
        return self.step(model, torch.optim.SGD(parameters, lr=1e-9, foreach=True))


def make_case(
    sizes: tuple[int, int, int, int], rule: str, loss: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Case:
    """The loss stands on the last step or on every one: with the first, most incoming gradients are zero."""
    inputs, hidden, batch, time = sizes
    torch.manual_seed(0)
    reference = torch.nn.RNN(inputs, hidden)
    for weight in (reference.weight_ih_l0, reference.weight_hh_l0):
        torch.nn.init.orthogonal_(weight)
    head = torch.nn.Linear(hidden, 10).to(device, dtype)
    x = torch.rand(time, batch, inputs).to(device, dtype)
    labels = torch.randint(10, (batch,) if loss == "last" else (time * batch,)).to(device)
    reference.to(device, dtype)
    return Case(tpext.nn.convert(reference, rule=RULES[rule]), reference, head, x, labels, loss)


def compare_step(
    against: Callable[..., None], sizes: tuple[int, int, int, int], rule: str, loss: str, seconds: float
) -> None:
    inputs, hidden, batch, time = sizes
    case = make_case(sizes, rule, loss)
    # The products with W_hh or its inverse, those of the inputs with W_ih and of their gradients, and the inverse.
    products = 4 if rule == "through_time" else 3
    inverse = 0 if rule == "backprop" else 10 / 3 * hidden**3
    against(
        case.step(case.module),
        case.step(case.reference),
        flops=2 * time * batch * hidden * (products * hidden + 2 * inputs) + inverse,
        peer_name="torch.nn.RNN with BPTT",
        I=inputs,
        H=hidden,
        B=batch,
        T=time,
        rule=rule,
        loss=loss,
        seconds=seconds,
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", ["last", "every"])
@pytest.mark.parametrize("sizes", SIZES, ids=name_sizes)
def test_step(against, threads, sizes, loss, rule):
    compare_step(against, sizes, rule, loss, seconds=1.2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", SWEEP, ids=name_sizes)
@pytest.mark.parametrize("threads", [2], indirect=True, ids=["threads2"])
def test_sweep(against, threads, sizes, rule):
    """The ratio over T and over H, for the picture."""
    compare_step(against, sizes, rule, "last", seconds=0.7)


def published_style(module, head, x, labels, reg):
    """One step as the published codes write it: autograd graphs of single steps, a loop for the targets."""
    batch, hidden = x.shape[1], module.hidden_size
    states = [x.new_zeros(batch, hidden)]
    for x_t in x:
        states.append(
            torch.tanh(
                torch.nn.functional.linear(x_t, module.weight_ih_l0, module.bias_ih_l0)
                + torch.nn.functional.linear(states[-1].detach(), module.weight_hh_l0, module.bias_hh_l0)
            )
        )
    last = states[-1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(head(last), labels), last)
    weight = module.weight_hh_l0.detach()
    inverse = torch.linalg.solve(weight.T @ weight + reg * torch.eye(hidden, device=x.device), weight.T).T
    targets = [last.detach() - gradient]
    for step in range(len(x), 1, -1):
        h = states[step].detach()
        moved = (targets[-1] - h) / (1 - h.clamp(-0.999, 0.999) ** 2) @ inverse
        targets.append(states[step - 1].detach() + moved)
    loss = sum(0.5 * ((h - v) ** 2).sum() for h, v in zip(states[1:], reversed(targets), strict=True))
    loss.backward()


@torch.no_grad()
def tuned(module, head, x, labels, reg):
    """One step as well as torch operations allow: large products outside the loops, closed-form weight gradients."""
    time, batch, _ = x.shape
    hidden = module.hidden_size
    weight, inputs = module.weight_hh_l0, x.flatten(0, 1)
    bias = module.bias_ih_l0 + module.bias_hh_l0
    projected = torch.addmm(bias, inputs, module.weight_ih_l0.T).view(time, batch, hidden)
    states = x.new_zeros(time + 1, batch, hidden)
    for step in range(time):
        torch.tanh(torch.addmm(projected[step], states[step], weight.T), out=states[step + 1])
    with torch.enable_grad():
        last = states[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(head(last), labels), last)
    gram = weight.T @ weight + reg * torch.eye(hidden, device=x.device)
    inverse = torch.cholesky_solve(weight.T, torch.linalg.cholesky(gram)).T.contiguous()
    slope = 1 / (1 - states[1:].clamp(-0.999, 0.999) ** 2)
    moves = x.new_empty(time, batch, hidden)
    moves[-1] = -gradient
    for step in range(time - 1, 0, -1):
        torch.mm(moves[step] * slope[step], inverse, out=moves[step - 1])
    delta = (-moves * (1 - states[1:] ** 2)).flatten(0, 1)
    module.weight_hh_l0.grad = delta.T @ states[:-1].flatten(0, 1)
    module.weight_ih_l0.grad = delta.T @ inputs
    module.bias_ih_l0.grad = module.bias_hh_l0.grad = delta.sum(0)


def eager_loop_steps(loop, device="cpu"):
    """The same local-credit step by ours and as a loop of torch operations over time, and what rows say of it."""
    (inputs, hidden, batch, time), reg = LOOP, 1.0
    torch.manual_seed(0)
    module = tpext.nn.RNN(inputs, hidden, rule=tpext.RegularizedInverse(reg=reg, credit="local"))
    head = torch.nn.Linear(hidden, 10).to(device)
    torch.nn.init.orthogonal_(module.weight_hh_l0)
    module.to(device)
    x = torch.rand(time, batch, inputs).to(device)
    labels = torch.randint(10, (batch,)).to(device)

    def ours():
        module.zero_grad()
        torch.nn.functional.cross_entropy(head(module(x)[1][0]), labels).backward()

    def peer():
        module.zero_grad()
        loop(module, head, x, labels, reg)

    ours()
    expected = module.weight_hh_l0.grad.clone()
    peer()
    assert torch.allclose(module.weight_hh_l0.grad, expected, rtol=1e-2, atol=1e-4 * expected.abs().max())
    return ours, peer, {"I": inputs, "H": hidden, "B": batch, "T": time, "rule": "local"}


@pytest.mark.parametrize("loop", [published_style, tuned], ids=lambda loop: loop.__name__)
def test_eager_loop(against, threads, loop):
    ours, peer, said = eager_loop_steps(loop)
    against(ours, peer, peer_name=f"eager loop, {loop.__name__}", **said)


# On a GPU


def sizes_of(sizes: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip("IHBT", sizes, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("sizes", "loss"), [(sizes, "last") for sizes in TARGETS] + [(next(iter(TARGETS)), "every")], ids=name_sizes
)
def test_gpu_step(gpu, sizes, loss, rule):
    """Float32 with an optimizer's update, against cuDNN without TF32; with it, cuDNN's default, beside that."""
    case = make_case(sizes, rule, loss, gpu.device.name)
    reference = case.training_step(case.reference)

    def with_tf32():
        with cudnn_tf32(True):
            reference()

    ratio, seconds = TARGETS.get(sizes, (None, None))
    gpu.against(
        case.training_step(case.module),
        {"cuDNN": reference},
        others={"cuDNN, TF32": with_tf32},
        target_ratio=ratio,
        target_seconds=seconds,
        **sizes_of(sizes),
        rule=rule,
        loss=loss,
    )


def relative_errors(case: Case, model: torch.nn.Module) -> dict[str, list[float]]:
    """Root-mean-square and largest error of states and gradients of a step against the same step in float64."""
    exact = case._replace(head=copy.deepcopy(case.head).double(), x=case.x.double())
    found = []
    for which, network in ((case, model), (exact, copy.deepcopy(model).double())):
        which.step(network)()
        with torch.no_grad():
            tensors = {"states": network(which.x)[0], "weight_hh": network.weight_hh_l0.grad}
        found.append({name: tensor.double() for name, tensor in tensors.items()})
    errors = {}
    for name, truth in found[1].items():
        error = found[0][name] - truth
        errors[name] = [float(error.norm() / truth.norm()), float(error.abs().max() / truth.abs().max())]
    return errors


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", TARGETS, ids=name_sizes)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=name_dtype)
def test_gpu_low_precision(gpu, dtype, sizes, rule):
    """Against cuDNN in the same precision, and ours in float32; errors against float64, beside cuDNN's own."""
    case, full = (make_case(sizes, rule, "last", gpu.device.name, d) for d in (dtype, torch.float32))
    ours, theirs = relative_errors(case, case.module), relative_errors(case, case.reference)
    ratios = [o / max(p, 1e-12) for name in ours for o, p in zip(ours[name], theirs[name], strict=True)]
    gpu.against(
        case.training_step(case.module),
        {"cuDNN": case.training_step(case.reference)},
        others={"ours, float32": full.training_step(full.module)},
        seconds=0.5,
        **sizes_of(sizes),
        rule=rule,
        dtype=name_dtype(dtype),
        errors=ours,
        peer_errors=theirs,
        error_ratio=float(torch.tensor(ratios).amax()),  # unlike Python's, NaN if any is
    )


@pytest.mark.gpu
@pytest.mark.parametrize("loop", [published_style, tuned], ids=lambda loop: loop.__name__)
def test_gpu_eager_loop(gpu, loop):
    ours, peer, said = eager_loop_steps(loop, gpu.device.name)
    name = f"eager loop, {loop.__name__}"
    gpu.against(ours, {name: peer}, peers_in_graph=False, target_ratio=100, **said)


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("credit", ["local", "through_time"])
@pytest.mark.parametrize("dtype", SCAN_DTYPES, ids=name_dtype)
@pytest.mark.parametrize("sizes", TARGETS, ids=name_sizes)
def test_gpu_target_scan(gpu, monkeypatch, sizes, dtype, credit, regime):
    """The kernel alone, in every regime that can run the size; a gradient at every step, so that nothing is skipped."""
    _, hidden, batch, time = sizes
    products = 2 if credit == "through_time" else 1
    gpu.force(monkeypatch, regime, products, dtype, batch, hidden)
    states = torch.tanh(gpu.randn(1, time, batch, hidden, dtype=dtype))
    gradients = gpu.randn(1, time, batch, hidden, dtype=dtype)
    h0 = gpu.randn(1, batch, hidden, dtype=dtype)
    weight, inverse = ((gpu.randn(1, hidden, hidden) * (0.2 / hidden**0.5)).to(dtype) for _ in range(2))
    settings = (None, None, [False], "tanh", "linearized", credit, 1.0, 1e-2, False, False)

    def call():
        return torch.ops.tpext.rnn_target_scan(gradients, states, h0, weight, inverse, *settings)

    op = f"rnn_target_scan, {credit}"
    gpu.alone(call, time=time, products=products, dtype=dtype, H=hidden, B=batch, op=op, regime=regime)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SCAN_DTYPES, ids=name_dtype)
@pytest.mark.parametrize("sizes", TARGETS, ids=name_sizes)
def test_gpu_kernels_of_a_step(gpu, benchmark, sizes, dtype):
    """Which kernels a step launches, cuDNN's and ours: by their names one sees the algorithm that torch picked."""
    case = make_case(sizes, "through_time", "last", gpu.device.name, dtype)
    steps = {"cuDNN": case.step(case.reference), "ours": case.step(case.module)}
    traced = {name: kernels(gpu.device, step) for name, step in steps.items()}
    benchmark.pedantic(steps["ours"])
    benchmark.extra_info.update(sizes_of(sizes), dtype=name_dtype(dtype), kernels=traced)
