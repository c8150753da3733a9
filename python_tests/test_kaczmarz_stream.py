"""The stream of direct weight solves: equal to the oracle and to steps of single samples, on any threads."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import DTYPES, pairwise
from kaczmarz_cases import MOVES, OUTPUTS, close, op, streamed
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

from tpext import Backprop, Kaczmarz, RegularizedLeastSquares
from tpext.nn import MLP, HotTargetLoss
from tpext.ops import kaczmarz_train
from tpext.ops.kaczmarz_train import _train_by_torch
from tpext.reference import kaczmarz as oracle
from tpext.rules import LayerCall, LayerRule

STREAMS = pairwise(
    sizes=[(5, 3), (1, 1), (20, 7, 3), (17, 33, 9, 4), (64, 32, 10), (3, 16, 2)],
    samples=[1, 2, 40],
    dx=MOVES,
    relaxation=[1.0, 0.6, 1.5],
    damping=[0.0, 0.3],
    output=OUTPUTS,
    bias=[True, False],
    dtype=DTYPES,
    contiguous=[True, False],
)


def stream(case: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    sizes, dtype = case["sizes"], case["dtype"]
    x = torch.rand(case["samples"], sizes[0], dtype=dtype)
    labels = torch.randint(sizes[-1], (case["samples"],))
    weights = [torch.randn(m, n, dtype=dtype) * 0.3 for n, m in itertools.pairwise(sizes)]
    biases = [torch.randn(m, dtype=dtype) * 0.1 for m in sizes[1:]] if case["bias"] else []
    if not case["contiguous"]:
        x, weights = x.mT.contiguous().mT, [weight.mT.contiguous().mT for weight in weights]
    return x, labels, weights, biases


@pytest.mark.parametrize("case", STREAMS, ids=lambda case: "-".join(map(str, case.values())))
def test_stream_equals_the_oracle_and_torch(case: dict[str, Any]) -> None:
    x, labels, weights, biases = stream(case)
    options = {**{name: case[name] for name in ("relaxation", "damping", "dx", "output")}, "dx_reg": 0.5}
    expected = oracle.kaczmarz_train(x, labels, weights, biases, **options)
    by_torch = [tensor.clone() for tensor in (*weights, *biases)]
    _train_by_torch(x, labels, by_torch[: len(weights)], by_torch[len(weights) :], **options)
    versions = [tensor._version for tensor in weights]
    predictions = kaczmarz_train(x, labels, weights, biases, **options)
    # Rounding of every sample's sums, carried through at most 40 of them.
    tolerance = 2e4 * torch.finfo(case["dtype"]).eps
    assert predictions.tolist() == expected[0].tolist()
    for actual, wanted, torch_one in zip((*weights, *biases), (*expected[1], *expected[2]), by_torch, strict=True):
        size = max(1.0, float(np.abs(wanted).max()))
        close(actual, wanted, rtol=tolerance, atol=tolerance * size)
        close(torch_one, wanted, rtol=tolerance, atol=tolerance * size)
    assert all(tensor._version > version for tensor, version in zip(weights, versions, strict=True))


def test_stream_equals_steps_of_single_samples() -> None:
    model, other = (MLP([12, 8, 4], "relu", rule=Kaczmarz(std=0.1), dtype=torch.float64) for _ in range(2))
    other.load_state_dict(model.state_dict())
    x, labels = torch.rand(50, 12).double(), torch.randint(4, (50,))
    optimizer, correct = torch.optim.SGD(other.parameters(), lr=1), []
    for row, label in zip(x, labels, strict=True):
        optimizer.zero_grad()
        z = other(row[None])
        correct.append(bool(z.argmax() == label))
        HotTargetLoss()(z, label[None]).backward()
        optimizer.step()
    result = model.stream(x, labels, start=0.25)
    for actual, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)
    assert (result.predictions == labels).tolist() == correct
    mean = 0.25
    for one in correct:
        mean = 0.999 * mean + 0.001 * one
    assert result.running_accuracy == pytest.approx(mean, rel=1e-12)


def test_stream_goes_on_where_it_stopped() -> None:
    x, labels = torch.rand(31, 19), torch.randint(5, (31,))
    whole, parts = (MLP([19, 6, 5], "relu", rule=Kaczmarz(std=0.3)) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    expected = whole.stream(x, labels)
    first = parts.stream(x[:13], labels[:13])
    second = parts.stream(x[13:], labels[13:], start=first.running_accuracy)
    assert torch.equal(torch.cat([first.predictions, second.predictions]), expected.predictions)
    assert second.running_accuracy == pytest.approx(expected.running_accuracy)
    for actual, wanted in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_stream_has_the_same_bits_on_any_threads_and_again() -> None:
    x, labels = torch.rand(100, 50), torch.randint(5, (100,))
    weights = [torch.randn(20, 50), torch.randn(5, 20)]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        copies = [weight.clone() for weight in weights]
        kaczmarz_train(x, labels, copies)
        results.append(copies)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


PROGRAM = """
import torch
from tpext.ops import Units, kaczmarz_step, kaczmarz_train
def trained(dtype):
    torch.manual_seed(0)
    x, labels = torch.rand(20, 37, dtype=dtype), torch.randint(5, (20,))
    weights = [torch.randn(18, 37, dtype=dtype) * 0.3, torch.randn(5, 18, dtype=dtype) * 0.3]
    kaczmarz_train(x, labels, weights)
    for rows in (3, 150):
        d, x, weight = (torch.randn(size, dtype=dtype) for size in ((rows, 21), (rows, 53), (21, 53)))
        weights += kaczmarz_step(d, x, weight, True, Units("relu"), dx="wnorm")
    return [float(w) for weight in weights for w in weight.flatten()]
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_to_rounding(capability: str, tmp_path: Path) -> None:
    """In a process of its own, for the choice is made when the module is loaded."""
    command = f"{PROGRAM}\nprint([trained(dtype) for dtype in (torch.float32, torch.float64)])"
    environment = {**os.environ, "TPEXT_CPU_CAPABILITY": capability}
    # Outside the checkout, where Python would find the sources.
    run = [sys.executable, "-c", command]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    if "does not support it" in done.stderr or "must be one of" in done.stderr:
        pytest.skip(f"no {capability} here")
    assert done.returncode == 0, done.stderr
    here: dict[str, Any] = {}
    exec(PROGRAM, here)
    for actual, dtype in zip(json.loads(done.stdout), DTYPES, strict=True):
        tolerance = 2e4 * torch.finfo(dtype).eps
        close(torch.tensor(actual, dtype=torch.float64), here["trained"](dtype), rtol=tolerance, atol=tolerance)


def test_stream_of_nan_neither_hangs_nor_raises() -> None:
    x, labels = torch.rand(6, 9), torch.randint(3, (6,))
    x[2, 4] = torch.nan
    weights = [torch.randn(5, 9), torch.randn(3, 5)]
    predictions = kaczmarz_train(x, labels, weights)
    assert weights[0].isnan().all()
    assert predictions[3:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    x, labels = torch.rand(4, 6), torch.randint(3, (4,))
    weights, biases = [torch.randn(5, 6), torch.randn(3, 5)], [torch.randn(5), torch.randn(3)]
    torch.library.opcheck(op.default, (x, labels, weights, biases, 1.0, 0.0, "mean", 1.0, "clamp"))
    if requires_grad:
        model = MLP([6, 5, 3], "relu", rule=Kaczmarz())
        model.stream(x, labels)
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_a_graph_from_before_the_pass_is_refused() -> None:
    model = MLP([6, 5, 3], "relu", rule=Kaczmarz())
    x, labels = torch.rand(4, 6), torch.randint(3, (4,))
    loss = HotTargetLoss()(model(x), labels)
    model.stream(x, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rule", [None, Backprop(), RegularizedLeastSquares()])
def test_only_this_rule_of_ours_has_a_stream(rule: Any) -> None:
    with pytest.raises(RuntimeError, match=r"MLP\.stream needs rule=tpext\.Kaczmarz\(\), or .* with learn_stream"):
        streamed(rule=rule)
    mixed = MLP([3, 2, 2], "relu", rule=Kaczmarz())
    mixed[1].rule = Kaczmarz(0.5)
    with pytest.raises(RuntimeError, match="one rule for all layers"):
        mixed.stream(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))


def test_a_stream_changes_no_parametrized_weights() -> None:
    model = MLP([3, 2, 2], "relu", rule=Kaczmarz())
    weight_norm(model[1])
    with pytest.raises(ValueError, match=r"MLP\.stream: layer 1 must have plain weights, got parametrized ones"):
        model.stream(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))


@dataclass(frozen=True)
class Counting(LayerRule):
    """Adds to the biases how often each class came, and predicts the class that came before."""

    def propagate(self, call: LayerCall, displacement: Tensor) -> Tensor:
        return displacement @ call.weight

    def learn_stream(self, layers: Sequence[Any], input: Tensor, labels: Tensor, output: str) -> Tensor:
        with torch.no_grad():
            for layer in layers:
                layer.bias += labels.bincount(minlength=len(layer.bias))
        return labels.roll(1)


def test_a_rule_of_ones_own_may_have_a_stream() -> None:
    model = MLP([3, 2, 2], rule=Counting())
    before = [layer.bias.detach().clone() for layer in model]
    result = model.stream(torch.zeros(4, 3), torch.tensor([0, 1, 1, 1]))
    assert torch.equal(result.predictions, torch.tensor([1, 0, 1, 1]))
    for layer, old in zip(model, before, strict=True):
        torch.testing.assert_close(layer.bias, old + torch.tensor([1.0, 3.0]))
