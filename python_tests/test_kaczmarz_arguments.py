"""Direct weight solves: clear errors."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from kaczmarz_cases import op, streamed

from tpext import _C, Kaczmarz
from tpext.nn import MLP, HotTargetLoss, TargetLinear
from tpext.ops import Activation, SingularError, Units, kaczmarz_step, kaczmarz_train
from tpext.ops.units import hot_target, n_hot


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"displacement": torch.zeros(2, 3)}, r"displacement must be \[2, 4\], got \[2, 3\]"),
        ({"input": torch.zeros(2, 6)}, r"input must be \[\.\.\., N=5\], got \[2, 6\]"),
        ({"input": torch.zeros(2, 5).half()}, "input must be float32 or float64, got float16"),
        ({"weight": torch.zeros(4)}, r"weight must be \[M, N\], got \[4\]"),
        ({"weight": torch.zeros(4, 5).double()}, "weight must be float32 as input is, got float64"),
        ({"weight": torch.zeros(4, 5, device="meta")}, "weight must be on cpu as input is, got meta"),
        ({"relaxation": 2.0}, "relaxation must be a finite number > 0 and < 2, got 2.0"),
        ({"damping": -1.0}, "damping must be a finite number >= 0, got -1.0"),
        ({"dx_reg": float("inf")}, "dx_reg must be a finite number >= 0, got inf"),
        ({"batch_reg": "1"}, "batch_reg must be a finite number >= 0, got '1'"),
        ({"dx": "max"}, "dx must be one of 'mean', 'wnorm', 'regularized', got 'max'"),
        ({"update": "sum"}, "update must be one of 'average', 'exact', got 'sum'"),
        ({"first": "both"}, "first must be one of 'input', 'weights', got 'both'"),
        ({"sticky": -1.0}, "sticky must be a finite number >= 0, got -1.0"),
        ({"sticky": 1.0, "update": "exact"}, "sticky must be 0 with update='exact', got 1.0"),
        ({"keep_norm": 1}, "keep_norm must be True or False, got 1"),
        ({"keep_norm": True, "units": Units("n_hot")}, "keep_norm must be False for an input of n_hot units"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_step_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"displacement": torch.zeros(2, 4), "input": torch.zeros(2, 5), "weight": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match=f"kaczmarz_step: {message}"):
        kaczmarz_step(**{**arguments, **change})


def test_singular_systems_are_named() -> None:
    x = torch.ones(2, 5)
    for bias, rows in ((False, "x"), (True, r"\[x 1\]")):
        expected = f"kaczmarz_step: the batch's rows {rows} are not of full rank to .* float32.* and batch_reg=0.0; use"
        with pytest.raises(SingularError, match=expected):
            kaczmarz_step(torch.ones(2, 4), x, torch.randn(4, 5), bias, update="exact")
    with pytest.raises(SingularError, match=r"kaczmarz_step: weight is not of full rank .* and dx_reg=0\.0; use"):
        kaczmarz_step(torch.ones(2, 4), x, torch.ones(4, 5), True, Units("relu"), dx="regularized", dx_reg=0.0)


ARGUMENTS: dict[str, Any] = {
    "input": torch.zeros(2, 5),
    "labels": torch.zeros(2, dtype=torch.int64),
    "weights": [torch.zeros(4, 5), torch.zeros(3, 4)],
    "biases": [torch.zeros(4), torch.zeros(3)],
    "relaxation": 1.0,
    "damping": 0.0,
    "dx": "mean",
    "dx_reg": 1.0,
    "output": "clamp",
}
COMMON = [
    ({"input": torch.zeros(5)}, r"input must be \[K, N\], got \[5\]"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \[K=2\], got \[3\]"),
    ({"labels": torch.zeros(2, dtype=torch.int32)}, "labels must be int64, got int32"),
    ({"labels": torch.tensor([0, 3])}, r"labels must lie in 0\.\.2, got 3 at 1"),
    ({"labels": torch.tensor([-1, 0])}, r"labels must lie in 0\.\.2, got -1 at 0"),
    ({"weights": [], "biases": []}, "weights must have at least 1 tensor, got 0"),
    ({"biases": [torch.zeros(4)]}, "biases must have 0 or L=2 tensors, got 1"),
    ({"weights": [torch.zeros(4, 5), torch.zeros(3, 5)]}, r"weights\[1\] must be .*, got \[3, 5\]"),
    ({"weights": [torch.zeros(4, 5), torch.zeros(3)]}, r"weights\[1\] must be \[M.*, N\], got \[3\]"),
    ({"weights": [torch.zeros(4, 5).double(), torch.zeros(3, 4)]}, r"weights\[0\] must be float32.*, got float64"),
    ({"weights": [torch.zeros(4, 5), torch.zeros(0, 4)]}, r"weights\[1\] must .*M >= 1.*, got \[0, 4\]"),
    ({"biases": [torch.zeros(4), torch.zeros(4)]}, r"biases\[1\] must be .*, got \[4\]"),
    ({"relaxation": 2.0}, "relaxation must be a finite number > 0 and < 2, got 2"),
    ({"damping": -1.0}, "damping must be a finite number >= 0, got -1"),
    ({"dx_reg": float("nan")}, "dx_reg must be a finite number >= 0, got nan"),
    ({"dx": "max"}, "dx must be one of 'mean', 'wnorm', 'regularized', got 'max'"),
    ({"output": "softmax"}, "output must be one of 'clamp', 'swap', 'direct', got 'softmax'"),
]


@pytest.mark.parametrize(("change", "message"), COMMON, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_the_op_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"kaczmarz_train: {message}"):
        op(**ARGUMENTS | change)


@pytest.mark.parametrize("name", ["relaxation", "damping", "dx_reg"])
def test_truth_values_are_no_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"kaczmarz_train: {name} must be a finite number .*, got True"):
        kaczmarz_train(torch.zeros(2, 5), torch.zeros(2).long(), [torch.zeros(3, 5)], **{name: True})
    with pytest.raises(ValueError, match=f"kaczmarz_step: {name} must be a finite number .*, got True"):
        kaczmarz_step(torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(3, 5), **{name: True})


def test_labels_that_change_during_a_pass_do_not_matter() -> None:
    """The kernel runs without the interpreter's lock, after the labels were checked."""
    torch.manual_seed(0)
    x, labels, weight = torch.rand(20000, 8), torch.zeros(20000).long(), torch.zeros(2, 8)
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            labels.fill_(10**9)
            labels.zero_()

    other = threading.Thread(target=disturb)
    other.start()
    try:
        for _ in range(20):
            with contextlib.suppress(ValueError):  # where the check saw the others
                assert kaczmarz_train(x, labels, [weight]).max() <= 1
    finally:
        done.set()
        other.join()
    assert weight.isfinite().all()


STEP: dict[str, Any] = {
    "displacement": torch.zeros(2, 4),
    "input": torch.zeros(2, 5),
    "weight": torch.zeros(4, 5),
    "dx": "mean",
    "rectify": True,
    "relaxation": 1.0,
    "damping": 0.0,
    "weight_change": torch.zeros(4, 5),
    "bias_change": torch.zeros(4),
    "moved": torch.zeros(2, 5),
    "threads": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"displacement": torch.zeros(2, 3)}, r"displacement must be \[B=2, M=4\], got \[2, 3\]"),
        ({"displacement": torch.zeros(4, 2).mT}, "displacement must be contiguous"),
        ({"input": torch.zeros(5)}, r"input must be \[B, N\], got \[5\]"),
        ({"input": torch.zeros(2, 5).half()}, "input must be float32, got float16"),
        ({"input": torch.zeros(0, 5)}, r"input must have numbers, got \[0, 5\]"),
        ({"weight": torch.zeros(0, 5)}, r"weight must have M >= 1, got \[0, 5\]"),
        ({"weight": torch.zeros(4, 6)}, r"weight must be \[M=4, N=5\], got \[4, 6\]"),
        ({"weight": torch.zeros(4, 5).double()}, "weight must be float32, got float64"),
        ({"weight_change": torch.zeros(5, 4)}, r"weight_change must be \[M=4, N=5\], got \[5, 4\]"),
        ({"weight_change": torch.zeros(5, 4).mT}, "weight_change must be contiguous"),
        ({"bias_change": torch.zeros(5)}, r"bias_change must be \[M=4\], got \[5\]"),
        ({"moved": torch.zeros(2, 4)}, r"moved must be \[B=2, N=5\], got \[2, 4\]"),
        ({"dx": "regularized"}, "dx must be one of 'mean', 'wnorm', got 'regularized'"),
        ({"relaxation": 2.0}, "relaxation must be a finite number > 0 and < 2, got 2"),
        ({"damping": float("inf")}, "damping must be a finite number >= 0, got inf"),
        ({"threads": 0}, r"threads must lie in 1\.\.1024 threads on the CPU, got 0"),
        ({"threads": 1025}, r"threads must lie in 1\.\.1024 threads on the CPU, got 1025"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_kernel_of_the_step_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"kaczmarz_step: {message}"):
        _C.kaczmarz_step(**STEP | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *COMMON,
        ({"input": torch.zeros(2, 5).half()}, "input must be float32, got float16"),
        ({"predictions": torch.zeros(3, dtype=torch.int64)}, r"predictions must be \[K=2\], got \[3\]"),
        ({"weights": [torch.zeros(5, 4).mT, torch.zeros(3, 4)]}, r"weights\[0\] must be contiguous"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_kernel_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"kaczmarz_train: {message}"):
        _C.kaczmarz_train(**ARGUMENTS | {"predictions": torch.zeros(2, dtype=torch.int64)} | change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Units("gelu"), "Units: name must be one of 'identity', .*, got 'gelu'"),
        (lambda: Units("n_hot", 0), "Units: count must be an integer >= 1, got 0"),
        (lambda: Units("n_hot", 2.5), "Units: count must be an integer >= 1, got 2.5"),  # type: ignore[arg-type]
        (lambda: Units("relu", version="v1"), "Units: version must be one of 'head', 'v0', got 'v1'"),
        (lambda: n_hot(torch.zeros(2, 3), 4), r"n_hot: count must be an integer in 1\.\.M=3, got 4"),
        (lambda: hot_target(torch.zeros(2), torch.zeros(3)), r"hot_target: target must be \[3\], got \[2\]"),
        (lambda: HotTargetLoss("max"), "hot_target: output must be one of 'clamp', 'swap', 'direct', got 'max'"),
        (
            lambda: HotTargetLoss()(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
            r"HotTargetLoss: target must be \[2\] int64 classes, got \[3\] int64",
        ),
        (
            lambda: HotTargetLoss()(torch.zeros(2, 3), torch.tensor([0, 3])),
            r"HotTargetLoss: target must lie in 0\.\.M-1=2, got 3",
        ),
        (lambda: HotTargetLoss()(torch.zeros(3), torch.tensor(-1)), "HotTargetLoss: target must lie in .*, got -1"),
        (
            lambda: HotTargetLoss("swap")(torch.zeros(2), torch.tensor([0.1, 0.9])),
            "HotTargetLoss: target must be ones and zeros with output='swap', got",
        ),
        (
            lambda: TargetLinear(3, 2, activation="tanh", rule=Kaczmarz()),
            "TargetLinear: activation must be one of 'identity', 'relu', 'doubled_relu', 'n_hot', 'binary' under "
            r"Kaczmarz, got Activation\(name='tanh'",
        ),
        (
            lambda: TargetLinear(3, 2, rule=Kaczmarz(), reverse_activation="sigmoid"),
            "TargetLinear: reverse_activation must be one of",
        ),
        (
            lambda: TargetLinear(3, 2, activation=Activation("relu", reference_compat=True), rule=Kaczmarz()),
            "TargetLinear: activation must be one of",
        ),
        (
            lambda: MLP([3, 3, 2], "binary"),
            r"activation=Units\(name='binary'.* needs rule=tpext.Kaczmarz",
        ),
        (lambda: MLP([3, 3, 2], rule=Kaczmarz()), "activation must be one of .* under Kaczmarz, got .*'tanh'"),
        (lambda: streamed(activation="binary"), "MLP.stream: activation must be 'relu', got .*binary"),
        (lambda: streamed(sizes=[3, 2, 3], tied=True), "MLP.stream: layers must have weights of their own"),
        (lambda: streamed(output_activation="relu"), "MLP.stream: output_activation must be 'identity', got .*relu"),
        (lambda: streamed(rule=Kaczmarz(update="exact")), "MLP.stream: rule must have update='average', got 'exact'"),
        (lambda: streamed(rule=Kaczmarz(first="weights")), "MLP.stream: rule must have first='input', got 'weights'"),
        (lambda: streamed(rule=Kaczmarz(sticky=1.0)), "MLP.stream: rule must have sticky=0.0, got 1.0"),
        (lambda: streamed(rule=Kaczmarz(keep_norm=True)), "MLP.stream: rule must have keep_norm=False, got True"),
        (lambda: Kaczmarz(sticky=1.0, update="exact"), "Kaczmarz: sticky must be 0 with update='exact', got 1.0"),
        (
            lambda: MLP([3, 3, 2], "binary", rule=Kaczmarz(keep_norm=True)),
            "TargetLinear: keep_norm must be False for an input of binary units, ones and zeros, got True",
        ),
    ],
)
def test_the_rest_refuses_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
