"""``tpext.nn.RNN``: the interface of ``torch.nn.RNN``, the equations of each rule."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import tpext
from tpext import Backprop, LearnedInverse, RegularizedInverse

T, B, I, H = 6, 4, 3, 5  # noqa: E741
LENGTHS = [3, 6, 1, 4]
DOUBLE = torch.float64


def pair(**options) -> tuple[nn.RNN, tpext.nn.RNN]:
    """The two modules with the same weights, ours with exact gradients."""
    theirs = nn.RNN(I, H, dtype=DOUBLE, **options)
    ours = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=Backprop(), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def sequences(form: str, batch_first: bool) -> Tensor | PackedSequence:
    """One random input in the given form; reseeded, so that two calls give equal inputs of their own."""
    torch.manual_seed(1)
    x = torch.randn(T, I, dtype=DOUBLE) if form == "unbatched" else torch.randn(T, B, I, dtype=DOUBLE)
    if batch_first and form != "unbatched":
        x = x.transpose(0, 1)
    x.requires_grad_()
    if not form.startswith("packed"):
        return x
    lengths = torch.tensor(LENGTHS if form == "packed" else sorted(LENGTHS, reverse=True))
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=form == "packed sorted")
    packed.data.retain_grad()
    return packed


def results(module: nn.Module, form: str, with_hx: bool, double: bool = True) -> dict[str, Tensor]:
    """Outputs and all gradients of a random linear loss."""
    x = sequences(form, module.batch_first)
    stack = module.num_layers * (2 if module.bidirectional else 1)
    torch.manual_seed(2)
    hx = torch.randn(*((stack, H) if form == "unbatched" else (stack, B, H)), dtype=DOUBLE, requires_grad=True)
    output, h_n = module(x, hx) if with_hx else module(x)
    data = output.data if isinstance(output, PackedSequence) else output
    loss = (data * torch.randn_like(data)).sum() + (h_n * torch.randn_like(h_n)).sum()
    loss.backward()
    found = {"output": data, "h_n": h_n, "input.grad": x.data.grad if isinstance(x, PackedSequence) else x.grad}
    if isinstance(output, PackedSequence):
        found["batch_sizes"] = output.batch_sizes
        if output.sorted_indices is not None:
            found |= {"sorted_indices": output.sorted_indices, "unsorted_indices": output.unsorted_indices}
    if with_hx:
        found["hx.grad"] = hx.grad
    return found | {f"{name}.grad": parameter.grad for name, parameter in module.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


OPTIONS = [
    {
        "num_layers": layers,
        "nonlinearity": nonlinearity,
        "bias": bias,
        "batch_first": batch_first,
        "bidirectional": bidirectional,
    }
    for layers, nonlinearity, bias, batch_first, bidirectional in itertools.product(
        [1, 2, 3], ["tanh", "relu"], [True, False], [False, True], [False, True]
    )
]


@pytest.mark.parametrize("form", ["padded", "unbatched", "packed", "packed sorted"])
def test_backprop_equals_torch(form):
    for options in OPTIONS:
        theirs, ours = pair(**options)
        for with_hx in (False, True):
            assert_same(results(ours, form, with_hx), results(theirs, form, with_hx))
            ours.zero_grad()
            theirs.zero_grad()


@pytest.mark.parametrize("steps", [1, 2, 7, 33, 128, 300])
@pytest.mark.parametrize("batch", [1, 5, 70])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_backprop_equals_torch_at_any_length(steps, batch, num_layers, bidirectional, nonlinearity):
    """By one tile of time and by many, and where the sequence is too short for tiles."""
    theirs, ours = pair(num_layers=num_layers, bidirectional=bidirectional, nonlinearity=nonlinearity)
    x = torch.randn(steps, batch, I, dtype=DOUBLE)
    found = []
    for module in (ours, theirs):
        input = x.clone().requires_grad_()
        output, h_n = module(input)
        (output.sin().sum() + h_n.cos().sum()).backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        found.append({"output": output, "h_n": h_n, "input": input.grad, **gradients})
    assert_same(*found)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_what_torch_draws(bidirectional):
    theirs, ours = pair(num_layers=3, dropout=0.4, bidirectional=bidirectional)
    x = torch.randn(T, B, I, dtype=DOUBLE)
    for module in (theirs, ours):
        module.train()
    torch.manual_seed(5)
    expected = theirs(x)
    torch.manual_seed(5)
    dropped = ours(x)
    torch.testing.assert_close(dropped, expected)
    assert not torch.allclose(dropped[0], ours.eval()(x)[0])
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_same_seed_same_weights():
    for options in OPTIONS[::5]:
        for rule in (None, Backprop(), LearnedInverse()):
            if isinstance(rule, LearnedInverse) and options["nonlinearity"] == "relu":
                continue
            torch.manual_seed(3)
            theirs = nn.RNN(I, H, **options).state_dict()
            torch.manual_seed(3)
            ours = tpext.nn.RNN(I, H, rule=rule, **options).state_dict()
            assert [name for name in ours if not name.startswith("reverse_")] == list(theirs)
            for name, weight in theirs.items():
                assert torch.equal(ours[name], weight)
                assert ours[name].dtype == weight.dtype


def test_empty_batch_and_single_step():
    theirs, ours = pair(num_layers=2, bidirectional=True)
    for size in [(3, 0, I), (1, 1, I), (1, 2, I)]:
        x = torch.randn(size, dtype=DOUBLE)
        torch.testing.assert_close(ours(x), theirs(x))
    output, h_n = ours(torch.empty(3, 0, I, dtype=DOUBLE), torch.empty(4, 0, H, dtype=DOUBLE))
    (output.sum() + h_n.sum()).backward()
    assert all(parameter.grad.eq(0).all() for parameter in ours.parameters())


# Lengths


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_lengths_give_the_packed_result(batch_first, with_hx):
    for layers, bidirectional in itertools.product([1, 2], [False, True]):
        theirs, ours = pair(num_layers=layers, bidirectional=bidirectional, batch_first=batch_first)
        x = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=DOUBLE)
        lengths = torch.tensor(LENGTHS)
        hx = torch.randn(layers * (1 + bidirectional), B, H, dtype=DOUBLE) if with_hx else None
        packed, h_n = theirs(pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False), hx)
        expected, _ = pad_packed_sequence(packed, batch_first)
        torch.testing.assert_close(ours(x, hx, lengths), (expected, h_n))


@pytest.mark.parametrize(
    "rule", [Backprop(), RegularizedInverse(), RegularizedInverse(credit="local"), LearnedInverse()]
)
def test_rows_do_not_see_their_padding(rule):
    rnn = tpext.nn.RNN(I, H, 2, bidirectional=True, dtype=DOUBLE, rule=rule)
    x = torch.randn(T, B, I, dtype=DOUBLE)
    hx = torch.randn(4, B, H, dtype=DOUBLE)
    output_weight, h_n_weight = torch.randn(T, B, 2 * H, dtype=DOUBLE), torch.randn(4, B, H, dtype=DOUBLE)

    def gradients(rows: slice, steps: int, lengths: Tensor | None) -> dict[str, Tensor]:
        rnn.zero_grad()
        part, start = x[:steps, rows].clone().requires_grad_(), hx[:, rows].clone().requires_grad_()
        output, h_n = rnn(part, start, lengths)
        loss = (output * output_weight[:steps, rows]).sum() + (h_n * h_n_weight[:, rows]).sum()
        loss.backward()
        named = {name: p.grad.clone() for name, p in rnn.named_parameters() if p.grad is not None}
        return named | {"input": part.grad, "hx": start.grad}

    together = gradients(slice(None), T, torch.tensor(LENGTHS))
    alone = [gradients(slice(b, b + 1), length, None) for b, length in enumerate(LENGTHS)]
    for name in together.keys() - {"input", "hx"}:
        torch.testing.assert_close(together[name], sum(one[name] for one in alone), rtol=1e-10, atol=1e-12)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(together["input"][:length, b : b + 1], alone[b]["input"], rtol=1e-10, atol=1e-12)
        assert together["input"][length:, b].eq(0).all()
        torch.testing.assert_close(together["hx"][:, b : b + 1], alone[b]["hx"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "rule",
    [Backprop(), RegularizedInverse(), RegularizedInverse(correction="none", input_rule="target"), LearnedInverse()],
)
def test_padding_may_hold_anything(rule, value):
    rnn = tpext.nn.RNN(I, H, 2, bidirectional=True, dtype=DOUBLE, rule=rule)
    padded = (torch.arange(T)[:, None] >= torch.tensor(LENGTHS)).unsqueeze(2)
    plain = torch.randn(T, B, I, dtype=DOUBLE)
    found = []
    for x in (plain, plain.masked_fill(padded, value)):
        rnn.zero_grad()
        x.requires_grad_()
        output, h_n = rnn(x, None, torch.tensor(LENGTHS))
        (output.sin().sum() + h_n.cos().sum()).backward()
        gradients = {name: p.grad.clone() for name, p in rnn.named_parameters() if p.grad is not None}
        found.append({"output": output, "h_n": h_n, "x": x.grad} | gradients)
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name
    assert found[1]["x"].masked_select(padded).eq(0).all()


def test_a_row_of_length_zero_keeps_its_state():
    for rule in (Backprop(), RegularizedInverse()):
        rnn = tpext.nn.RNN(I, H, bidirectional=True, dtype=DOUBLE, rule=rule)
        x = torch.randn(T, B, I, dtype=DOUBLE)
        hx = torch.randn(2, B, H, dtype=DOUBLE, requires_grad=True)
        output, h_n = rnn(x, hx, torch.tensor([2, 0, 6, 0]))
        assert output[:, [1, 3]].eq(0).all()
        assert torch.equal(h_n[:, [1, 3]], hx[:, [1, 3]])
        h_n.sum().backward()
        assert hx.grad[:, [1, 3]].eq(1).all()
        assert rnn(x, None, torch.zeros(B, dtype=torch.int64))[1].eq(0).all()


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        (torch.tensor([3, 6, 1]), r"RNN: lengths must be int64 \[B=4\], got torch.int64 \[3\]"),
        (torch.tensor([[3, 6, 1, 4]]), r"RNN: lengths must be int64 \[B=4\], got torch.int64 \[1, 4\]"),
        (torch.tensor([3, 6, 1, 4], dtype=torch.int32), r"RNN: lengths must be int64 \[B=4\], got torch.int32 \[4\]"),
        (torch.tensor([3, 7, 1, 4]), r"lengths.*7"),
        (torch.tensor([3, 6, -1, 4]), r"lengths.*-1"),
    ],
)
@pytest.mark.parametrize("rule", [Backprop(), RegularizedInverse(), LearnedInverse()])
def test_bad_lengths(rule, lengths, text):
    with pytest.raises(ValueError, match=text):
        tpext.nn.RNN(I, H, rule=rule)(torch.randn(T, B, I), None, lengths)


def test_lengths_have_one_source():
    rnn = tpext.nn.RNN(I, H)
    packed = pack_padded_sequence(torch.randn(T, B, I), torch.tensor([6, 4, 3, 1]))
    with pytest.raises(ValueError, match="PackedSequence"):
        rnn(packed, None, torch.tensor(LENGTHS))
    with pytest.raises(ValueError, match="batched"):
        rnn(torch.randn(T, I), None, torch.tensor([3]))


# Errors, compared by running both modules on the same bad input


def error_of(call) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one is the caller's question)
        call()
    return caught.type, str(caught.value)


BAD_CONSTRUCTIONS = [
    {"hidden_size": 0},
    {"hidden_size": -2},
    {"hidden_size": 2.0},
    {"input_size": 0},
    {"input_size": "3"},
    {"num_layers": 0},
    {"num_layers": -1},
    {"dropout": -0.1},
    {"dropout": 1.1},
    {"dropout": True},
    {"dropout": "much"},
    {"dropout": None},
    {"bias": 1},
    {"bias": None},
    {"batch_first": 1},
    {"proj_size": 2},
    {"proj_size": 0},
]


@pytest.mark.parametrize("options", BAD_CONSTRUCTIONS, ids=repr)
def test_constructor_errors_are_torchs(options):
    options = {"input_size": I, "hidden_size": H} | options
    assert error_of(lambda: tpext.nn.RNN(**options)) == error_of(lambda: nn.RNN(**options))


def test_constructor_errors_of_our_own():
    kind, text = error_of(lambda: nn.RNN(I, H, nonlinearity="gelu"))
    ours = error_of(lambda: tpext.nn.RNN(I, H, nonlinearity="gelu"))
    assert ours == (kind, text.replace("'tanh' or 'relu'", "'tanh', 'relu' or 'identity'"))
    assert error_of(lambda: tpext.nn.RNN(I, H, units=3)) == (
        TypeError,
        "RNN.__init__() got an unexpected keyword argument 'units'",
    )
    with pytest.raises(TypeError, match=r"rule must be for recurrent layers .* got 'backprop'"):
        tpext.nn.RNN(I, H, rule="backprop")
    with pytest.raises(TypeError, match="rule must be"):
        tpext.nn.RNN(I, H, rule=RegularizedInverse)


def test_dropout_without_effect_warns_as_torch_does():
    found = []
    for module in (nn.RNN, tpext.nn.RNN):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module(I, H, dropout=0.5)
        found.append([(w.category, str(w.message)) for w in caught])
        if module is tpext.nn.RNN:
            assert Path(caught[0].filename) == Path(__file__), "the warning must point at the caller"
    assert found[0] == found[1]
    assert len(found[0]) == 1


def packed_double() -> PackedSequence:
    return sequences("packed", batch_first=False)


BAD_INPUTS = {
    "1-D": lambda: (torch.randn(I, dtype=DOUBLE),),
    "4-D": lambda: (torch.randn(1, T, B, I, dtype=DOUBLE),),
    "input size": lambda: (torch.randn(T, B, I + 1, dtype=DOUBLE),),
    "unbatched input size": lambda: (torch.randn(T, I + 1, dtype=DOUBLE),),
    "float32": lambda: (torch.randn(T, B, I),),
    "int64": lambda: (torch.ones(T, B, I, dtype=torch.int64),),
    "no steps": lambda: (torch.randn(0, 0, I, dtype=DOUBLE),),
    "no steps, unbatched": lambda: (torch.randn(0, I, dtype=DOUBLE),),
    "hx of another batch": lambda: (torch.randn(T, B, I, dtype=DOUBLE), torch.randn(1, B + 1, H, dtype=DOUBLE)),
    "hx of another size": lambda: (torch.randn(T, B, I, dtype=DOUBLE), torch.randn(1, B, H + 1, dtype=DOUBLE)),
    "hx of more layers": lambda: (torch.randn(T, B, I, dtype=DOUBLE), torch.randn(2, B, H, dtype=DOUBLE)),
    "unbatched hx for a batch": lambda: (torch.randn(T, B, I, dtype=DOUBLE), torch.randn(1, H, dtype=DOUBLE)),
    "batched hx for one": lambda: (torch.randn(T, I, dtype=DOUBLE), torch.randn(1, 1, H, dtype=DOUBLE)),
    "unbatched hx of another size": lambda: (torch.randn(T, I, dtype=DOUBLE), torch.randn(2, H, dtype=DOUBLE)),
    "input elsewhere": lambda: (torch.randn(T, B, I, dtype=DOUBLE, device="meta"),),
    "hx elsewhere": lambda: (
        torch.randn(T, B, I, dtype=DOUBLE),
        torch.randn(1, B, H, dtype=DOUBLE, device="meta"),
    ),
    "packed float32": lambda: (pack_padded_sequence(torch.randn(T, B, I), torch.tensor([6, 4, 3, 1])),),
    "packed input size": lambda: (
        pack_padded_sequence(torch.randn(T, B, I + 1, dtype=DOUBLE), torch.tensor([6, 4, 3, 1])),
    ),
    "packed dimensions": lambda: (
        pack_padded_sequence(torch.randn(T, B, I, 1, dtype=DOUBLE), torch.tensor([6, 4, 3, 1])),
    ),
    "packed, hx unbatched": lambda: (packed_double(), torch.randn(1, H, dtype=DOUBLE)),
    "packed, hx of another batch": lambda: (packed_double(), torch.randn(1, 1, H, dtype=DOUBLE)),
    "packed, hx of more layers": lambda: (packed_double(), torch.randn(2, B, H, dtype=DOUBLE)),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_forward_errors_are_torchs(case):
    for batch_first in (False, True):
        theirs, ours = pair(batch_first=batch_first)
        assert error_of(lambda: ours(*BAD_INPUTS[case]())) == error_of(lambda: theirs(*BAD_INPUTS[case]()))  # noqa: B023


def test_hx_of_another_dtype():
    theirs, ours = pair()
    arguments = torch.randn(T, B, I, dtype=DOUBLE), torch.randn(1, B, H)
    kind, text = error_of(lambda: ours(*arguments))
    assert kind is error_of(lambda: theirs(*arguments))[0]
    assert text == "RNN: hx must have the dtype of input, torch.float64, got torch.float32"


@pytest.mark.parametrize("rule", [Backprop(), RegularizedInverse(), LearnedInverse()])
def test_one_parameter_elsewhere(rule):
    rnn = tpext.nn.RNN(I, H, 2, rule=rule)
    rnn.bias_hh_l1 = nn.Parameter(torch.zeros(H, device="meta"))
    with pytest.raises(
        RuntimeError, match="not at the same device, found input tensor at cpu and parameter tensor at meta"
    ):
        rnn(torch.randn(T, B, I))
    with pytest.raises(RuntimeError, match="found input tensor at cpu and lengths tensor at meta"):
        rnn(torch.randn(T, B, I), None, torch.zeros(B, dtype=torch.int64, device="meta"))


def test_reverse_parameter_elsewhere():
    rnn = tpext.nn.RNN(I, H, rule=LearnedInverse())
    rnn.reverse_bias_l0 = nn.Parameter(torch.zeros(H, device="meta"))
    for call in (rnn, rnn.reconstruction_loss):
        with pytest.raises(RuntimeError, match="found input tensor at cpu and parameter tensor at meta"):
            call(torch.randn(T, B, I))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_on_the_cpu(dtype):
    for rule in (Backprop(), RegularizedInverse(), LearnedInverse()):
        rnn = tpext.nn.RNN(I, H, rule=rule, dtype=dtype)
        with pytest.raises(
            ValueError, match=rf"must be float32 or float64, got {dtype}; .*torch.autocast\('cpu', dtype={dtype}\)"
        ):
            rnn(torch.randn(T, B, I, dtype=dtype))


# Module


ATTRIBUTES = [
    "mode",
    "input_size",
    "hidden_size",
    "num_layers",
    "nonlinearity",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
]


def test_attributes():
    for options in OPTIONS:
        theirs, ours = pair(**options)
        for name in ATTRIBUTES:
            assert getattr(ours, name) == getattr(theirs, name), name
        assert [[w.shape for w in row] for row in ours.all_weights] == [
            [w.shape for w in r] for r in theirs.all_weights
        ]
        assert all(a is b for a, b in zip(itertools.chain(*ours.all_weights), ours.parameters(), strict=True))
        assert ours.flatten_parameters() is None
    assert not isinstance(ours, nn.RNNBase), "torch's compiler breaks the graph on its own recurrent modules"
    assert tpext.nn.RNN(I, H, nonlinearity="identity").mode == "RNN_IDENTITY"


def test_positional_order():
    rnn = tpext.nn.RNN(I, H, 2, "relu", False, True, 0.25, True, "meta", DOUBLE)
    assert (rnn.num_layers, rnn.nonlinearity, rnn.bias, rnn.batch_first) == (2, "relu", False, True)
    assert (rnn.dropout, rnn.bidirectional) == (0.25, True)
    assert rnn.weight_ih_l0.device.type == "meta"
    assert rnn.weight_ih_l0.dtype == DOUBLE
    with pytest.raises(TypeError):
        tpext.nn.RNN(I, H, 2, "relu", False, True, 0.25, True, "cpu", DOUBLE, Backprop())


def test_identity_nonlinearity():
    rnn = tpext.nn.RNN(I, H, nonlinearity="identity", dtype=DOUBLE, rule=Backprop())
    x = torch.randn(T, B, I, dtype=DOUBLE)
    h = torch.zeros(B, H, dtype=DOUBLE)
    for t in range(T):
        h = x[t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0
    torch.testing.assert_close(rnn(x)[0][-1], h)


def test_extra_repr():
    assert repr(tpext.nn.RNN(3, 4)) == "RNN(3, 4)"
    text = repr(tpext.nn.RNN(3, 4, 2, "relu", False, True, 0.5, True, rule=Backprop()))
    assert text == (
        "RNN(3, 4, num_layers=2, nonlinearity=relu, bias=False, batch_first=True, dropout=0.5, bidirectional=True, "
        "rule=Backprop())"
    )


@pytest.mark.parametrize("rule", [Backprop(), RegularizedInverse(reg=2.0), LearnedInverse()])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_independent_and_equal(rule, duplicate):
    rnn = tpext.nn.RNN(I, H, 2, bidirectional=True, rule=rule)
    twin = duplicate(rnn)
    x = torch.randn(T, B, I)
    for module in (rnn, twin):
        module(x)[0].square().sum().backward()
    assert twin.rule == rule
    assert repr(twin) == repr(rnn)
    assert list(twin.state_dict()) == list(rnn.state_dict())
    for a, b in zip(rnn.all_weights[3], twin.all_weights[3], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
        assert a is not b
    with torch.no_grad():
        twin.weight_hh_l0.add_(1)
    assert not torch.equal(rnn.weight_hh_l0, twin.weight_hh_l0)


def test_final_state_may_be_changed_in_place():
    for options in ({}, {"bidirectional": True}, {"num_layers": 2}):
        results_of = []
        for module in pair(**options):
            output, h_n = module(torch.ones(T, B, I, dtype=DOUBLE))
            before = output.detach().clone()
            h_n.mul_(0)
            assert torch.equal(output, before)
            output.sum().backward()
            results_of.append(module.weight_hh_l0.grad)
        torch.testing.assert_close(*results_of)


@pytest.mark.parametrize("rule", [Backprop(), RegularizedInverse(), LearnedInverse()])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"batch_first": True}], ids=repr)
@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda t: t.mul_(2), lambda t: 2 * t),
        (nn.functional.relu_, nn.functional.relu),
        (lambda t: nn.functional.dropout(t, 0.5, inplace=True), lambda t: nn.functional.dropout(t, 0.5)),
    ],
    ids=["mul_", "relu_", "dropout"],
)
def test_output_changed_in_place_is_a_loud_error_and_a_clone_serves(rule, options, change, changed):
    """With one direction the output is the saved states themselves; a copy would cost a pass over memory."""
    rnn = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule, **options)
    x = torch.randn(T, B, I, dtype=DOUBLE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        change(rnn(x)[0]).sum().backward()
    assert all(parameter.grad is None for parameter in rnn.parameters())
    found = []
    for function in (lambda output: change(output.clone()), changed):
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad(function(rnn(x)[0]).square().sum(), rnn.weight_hh_l0)
        found.append(gradient)
    assert torch.equal(*found)


def test_rule_is_assignable_within_a_parameter_set():
    rnn = tpext.nn.RNN(I, H)
    assert rnn.rule == RegularizedInverse()
    x = torch.randn(T, B, I)

    def gradient() -> Tensor:
        rnn.zero_grad()
        rnn(x)[0].sum().backward()
        return rnn.weight_hh_l0.grad.clone()

    target = gradient()
    rnn.rule = Backprop()
    assert rnn.rule == Backprop()
    exact = gradient()
    assert not torch.allclose(target, exact)
    rnn.rule = RegularizedInverse(reg=1e12)
    torch.testing.assert_close(gradient(), exact)
    with pytest.raises(ValueError, match=r"tpext.nn.convert\(module, rule\)"):
        rnn.rule = LearnedInverse()
    with pytest.raises(TypeError, match="rule must be"):
        rnn.rule = None
    learned = tpext.nn.RNN(I, H, rule=LearnedInverse())
    learned.rule = LearnedInverse(noise=0.5)
    with pytest.raises(ValueError, match=r"tpext.nn.convert\(module, rule\)"):
        learned.rule = Backprop()
    assert learned.rule == LearnedInverse(noise=0.5)


@pytest.mark.parametrize("nonlinearity", ["relu", "identity"])
def test_a_rule_that_does_not_fit_says_what_does(nonlinearity):
    with pytest.raises(
        ValueError, match=rf"needs nonlinearity='tanh', got '{nonlinearity}'; use rule=tpext.Regularized"
    ):
        tpext.nn.RNN(I, H, nonlinearity=nonlinearity, rule=LearnedInverse())
    for rule in (Backprop(), *(RegularizedInverse(correction=c) for c in ("linearized", "difference", "none"))):
        tpext.nn.RNN(I, H, nonlinearity=nonlinearity, rule=rule)(torch.randn(T, B, I))[0].sum().backward()


# Without the sequence of outputs, and in pieces

LAYERS = [
    {},
    {"batch_first": True, "bias": False},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]

FINAL_RULES = [
    Backprop(),
    RegularizedInverse(),
    RegularizedInverse(credit="local", correction="difference"),
    RegularizedInverse(correction="none", target_step=0.1, input_rule="target"),
    LearnedInverse(),
]


def final_results(
    module: tpext.nn.RNN, form: str, lengths: list[int] | None = None, of_outputs: bool = False
) -> dict[str, Tensor]:
    """What a module returns, and all gradients of a random linear loss of it."""
    module.zero_grad()
    x = sequences(form, module.batch_first)
    stack = module.num_layers * (2 if module.bidirectional else 1)
    torch.manual_seed(2)
    hx = torch.randn(*((stack, H) if form == "unbatched" else (stack, B, H)), dtype=DOUBLE, requires_grad=True)
    arguments = (x, hx) if lengths is None else (x, hx, torch.tensor(lengths))
    output, h_n = module(*arguments)
    assert (output is None) != module.return_sequence
    loss = (h_n * torch.randn_like(h_n)).sum()
    data = output.data if isinstance(output, PackedSequence) else output
    if of_outputs:
        loss = loss + (data * torch.randn_like(data)).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return (
        {
            "h_n": h_n.detach(),
            "input": x.data.grad if form.startswith("packed") else x.grad,
            "hx": hx.grad,
        }
        | ({"output": data.detach()} if of_outputs else {})
        | gradients
    )


@pytest.mark.parametrize("rule", FINAL_RULES, ids=repr)
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed", "packed sorted"])
def test_without_outputs_the_rest_is_the_same(rule, form):
    for options in ({}, {"num_layers": 2, "bidirectional": True, "batch_first": True}):
        whole = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule, **options)
        final = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule, return_sequence=False, **options)
        final.load_state_dict(whole.state_dict())
        assert_same(final_results(final, form), final_results(whole, form), 0.0)


@pytest.mark.parametrize("rule", FINAL_RULES, ids=repr)
@pytest.mark.parametrize("every", [1, 2, 4, T, T + 1])
@pytest.mark.parametrize("options", LAYERS, ids=repr)
def test_checkpoints_change_results_by_rounding_alone(rule, every, options):
    whole = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule, **options)
    for outputs in (False, True):
        pieces = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule, return_sequence=outputs, checkpoint_every=every, **options)
        pieces.load_state_dict(whole.state_dict())
        for form, lengths in (("padded", None), ("padded", [0, T, 1, 4]), ("packed", None), ("unbatched", None)):
            assert_same(*(final_results(module, form, lengths, outputs) for module in (pieces, whole)))


def test_checkpoints_draw_the_dropout_of_the_whole():
    whole = tpext.nn.RNN(I, H, 3, dropout=0.5, bidirectional=True, dtype=DOUBLE)
    pieces = copy.deepcopy(whole)
    pieces.checkpoint_every = 2
    assert_same(*(final_results(module, "padded", of_outputs=True) for module in (pieces, whole)))


@pytest.mark.parametrize("rule", FINAL_RULES, ids=repr)
def test_checkpoints_of_frozen_parts(rule):
    wholes, parts = [], []
    for frozen in ([], ["weight_ih_l0"], ["weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]):
        for found, options in ((wholes, {}), (parts, {"return_sequence": False, "checkpoint_every": 4})):
            torch.manual_seed(3)
            rnn = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule, **options)
            for name in frozen:
                getattr(rnn, name).requires_grad_(False)
            rnn(torch.ones(T, B, I, dtype=DOUBLE))[1].square().sum().backward()
            found.append({name: p.grad for name, p in rnn.named_parameters() if p.grad is not None})
    for part, whole in zip(parts, wholes, strict=True):
        assert_same(part, whole)


def test_a_gradient_that_fades_between_checkpoints():
    """What lies further back gets zeros, of its full size."""
    steps = 400
    for rule in (Backprop(), RegularizedInverse(reg=1e4), RegularizedInverse(reg=1e4, credit="local")):
        whole = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule)
        pieces = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule, return_sequence=False, checkpoint_every=16)
        with torch.no_grad():
            whole.weight_hh_l0.mul_(1e-4)
        pieces.load_state_dict(whole.state_dict())
        found = []
        for module in (pieces, whole):
            torch.manual_seed(1)
            x, hx = torch.randn(steps, B, I, dtype=DOUBLE), torch.randn(1, B, H, dtype=DOUBLE)
            x.requires_grad_(), hx.requires_grad_()
            module(x, hx)[1].square().sum().backward()
            found.append({"x": x.grad, "hx": hx.grad} | {name: p.grad for name, p in module.named_parameters()})
        assert found[1]["x"][-1].all()
        assert not found[1]["x"][0].any()
        assert_same(*found)


def kept_numbers(rnn: tpext.nn.RNN, x: Tensor) -> int:
    """How many numbers a forward pass keeps for its backward pass, apart from its input and parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *rnn.parameters())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rnn(x)
    return sum(count for pointer, count in kept.items() if pointer not in known)


@pytest.mark.parametrize("rule", FINAL_RULES, ids=repr)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_checkpoints_keep_one_state_a_piece_and_what_the_layer_above_reads(rule, num_layers, bidirectional):
    state, directions = 8 * 16, 2 if bidirectional else 1
    x = torch.randn(100, 8, I)
    whole, pieces = (
        kept_numbers(
            tpext.nn.RNN(
                I, 16, num_layers, bidirectional=bidirectional, rule=rule, return_sequence=False, checkpoint_every=every
            ),
            x,
        )
        for every in (None, 10)
    )
    # each layer's states; those of both directions once more where they stand side by side for the layer above
    assert whole >= directions * 100 * state * num_layers
    # of each layer and direction ten states and the first, and what a second layer reads; stacked weights are small
    weights = num_layers * directions * 16 * (2 * 16 + 16 + 2)
    small = num_layers * directions * 11 * state + 2 * weights
    assert pieces <= small + (num_layers - 1) * directions * 100 * state


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1, got 0"),
        ({"checkpoint_every": 2.0}, TypeError, "checkpoint_every should be of type int"),
        ({"checkpoint_every": True}, TypeError, "checkpoint_every should be of type int"),
        ({"return_sequence": 0}, TypeError, "return_sequence should be of type bool"),
    ],
)
def test_wrong_options_of_the_outputs(options, kind, text):
    with pytest.raises(kind, match=text):
        tpext.nn.RNN(I, H, **options)


def test_options_of_the_outputs_are_shown_and_copied():
    rnn = tpext.nn.RNN(I, H, return_sequence=False, checkpoint_every=4)
    assert repr(rnn) == "RNN(3, 5, return_sequence=False, checkpoint_every=4)"
    x = torch.randn(T, B, I)
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), tpext.nn.convert(rnn, RegularizedInverse())):
        assert repr(twin) == repr(rnn)
        assert twin(x)[0] is None
        assert torch.equal(twin(x)[1], rnn(x)[1])
    torch.testing.assert_close(rnn.to_torch()(x)[1], rnn(x)[1])


# Target propagation


def rule_gradients(rnn: tpext.nn.RNN, x: Tensor, hx: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
    rnn.zero_grad()
    x = x.clone().requires_grad_()
    hx = None if hx is None else hx.clone().requires_grad_()
    output, h_n = rnn(x, hx)
    torch.manual_seed(7)
    loss = (output * torch.randn_like(output)).sum() + (h_n * torch.randn_like(h_n)).sum()
    (scale * loss).backward()
    found = {name: p.grad.clone() for name, p in rnn.named_parameters() if p.grad is not None} | {"input": x.grad}
    return found if hx is None else found | {"hx": hx.grad}


@pytest.mark.parametrize(("credit", "suffix"), [("local", "local"), ("through_time", "bptt")])
def test_published_gradients(credit, suffix):
    golden = np.load(Path(__file__).parent / "data" / "R_tpri_small.npz")
    values = {name: torch.from_numpy(golden[name]) for name in golden.files}
    rule = RegularizedInverse(
        reg=float(values["r"]),
        target_step=float(values["lr_target"]),
        margin=float(values["clip"]),
        credit=credit,
        normalize=False,
    )
    rnn = tpext.nn.RNN(2, 5, batch_first=True, dtype=DOUBLE, rule=rule)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(values["Wh"])
        rnn.weight_ih_l0.copy_(values["Wi"])
        rnn.bias_ih_l0.copy_(values["bh"])
        rnn.bias_hh_l0.zero_()
    output, _ = rnn(values["x"])
    torch.testing.assert_close(output, values["h"][:, 1:], rtol=1e-10, atol=1e-14)
    logits = output[:, -1] @ values["Wo"].T + values["bo"]
    nn.functional.cross_entropy(logits, values["labels"]).backward()
    for name, key in [("weight_hh_l0", "gWh"), ("weight_ih_l0", "gWi"), ("bias_ih_l0", "gb"), ("bias_hh_l0", "gb")]:
        expected = values[f"{key}_{suffix}"]
        error = (getattr(rnn, name).grad - expected).norm() / expected.norm()
        assert error < 1e-10, f"{name}: {error:.1e}"


@pytest.mark.parametrize("correction", ["linearized", "difference"])
def test_infinite_regularisation_is_back_propagation(correction):
    rnn = tpext.nn.RNN(I, H, 2, bidirectional=True, dtype=DOUBLE, rule=Backprop())
    x, hx = torch.randn(T, B, I, dtype=DOUBLE), torch.randn(4, B, H, dtype=DOUBLE)
    exact = rule_gradients(rnn, x, hx)
    rnn.rule = RegularizedInverse(reg=1e14, correction=correction)
    ours = rule_gradients(rnn, x, hx)
    assert ours["hx"].abs().max() < 1e-10
    for name in exact.keys() - {"hx"}:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-9, atol=1e-11)


def test_orthogonal_linear_network_is_back_propagation():
    rnn = tpext.nn.RNN(I, H, 2, "identity", bidirectional=True, dtype=DOUBLE, rule=Backprop())
    for name, parameter in rnn.named_parameters():
        if name.startswith("weight_hh"):
            nn.init.orthogonal_(parameter)
    x, hx = torch.randn(T, B, I, dtype=DOUBLE), torch.randn(4, B, H, dtype=DOUBLE)
    exact = rule_gradients(rnn, x, hx)
    rnn.rule = RegularizedInverse(reg=0.0, credit="local")
    ours = rule_gradients(rnn, x, hx)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("credit", ["local", "through_time"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_linearized_gradients_scale_with_the_loss_and_not_with_the_step(credit, nonlinearity):
    rnn = tpext.nn.RNN(I, H, 2, nonlinearity, dtype=DOUBLE, rule=RegularizedInverse(credit=credit))
    x = torch.randn(T, B, I, dtype=DOUBLE)
    plain = rule_gradients(rnn, x)
    scaled = rule_gradients(rnn, x, scale=65536.0)
    rnn.rule = RegularizedInverse(credit=credit, target_step=0.03)
    stepped = rule_gradients(rnn, x)
    rnn.rule = RegularizedInverse(credit=credit, target_step=0.03, normalize=False)
    published = rule_gradients(rnn, x)
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name], 65536.0 * gradient, rtol=1e-10, atol=1e-8)
        torch.testing.assert_close(stepped[name], gradient, rtol=1e-10, atol=1e-12)
        # what goes to the layer below and to the input keeps gradient units, whatever the scaling of the parameters
        own = 1.0 if name == "input" else 0.03
        torch.testing.assert_close(published[name], own * gradient, rtol=1e-10, atol=1e-12)


def test_input_rule_changes_only_what_goes_down():
    rnn = tpext.nn.RNN(I, H, dtype=DOUBLE)
    x = torch.randn(T, B, I, dtype=DOUBLE)
    plain = rule_gradients(rnn, x)
    rnn.rule = RegularizedInverse(input_rule="target")
    target = rule_gradients(rnn, x)
    assert not torch.allclose(target["input"], plain["input"])
    for name in plain.keys() - {"input"}:
        assert torch.equal(target[name], plain[name])


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (
            RegularizedInverse(target_step=0.5, normalize=False),
            {
                "reg": 0.1,
                "target_step": 0.3,
                "correction": "difference",
                "credit": "local",
                "margin": 0.7,
                "normalize": True,
                "input_rule": "target",
                "slope": "derivative",
                "slope_reg": 0.5,
            },
        ),
        (LearnedInverse(target_step=0.5), {"target_step": 0.3, "credit": "local", "normalize": False}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_option_of_a_rule_reaches_the_layer(rule, changes):
    """Each changes the gradients; to what, the oracle says of the same options in test_rnn_target_scan."""
    of_gates = {"inverse", "gate_slope", "candidate_slope", "chebyshev_steps"}
    assert changes.keys() == {field.name for field in dataclasses.fields(rule)} - {"noise"} - of_gates
    rnn = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule)
    x = 2 * torch.randn(T, B, I, dtype=DOUBLE)
    usual = rule_gradients(rnn, x)
    for name, value in changes.items():
        rnn.rule = dataclasses.replace(rule, **{name: value})
        changed = rule_gradients(rnn, x)
        assert any(not torch.allclose(changed[key], usual[key]) for key in usual), name


# Learned inverse


def learned(**options) -> tpext.nn.RNN:
    rnn = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=LearnedInverse(), **options)
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            if name.startswith("reverse_bias"):
                parameter.normal_(std=0.3)
    return rnn


def test_reverse_parameters():
    rnn = tpext.nn.RNN(I, H, 2, bidirectional=True, rule=LearnedInverse())
    plain = list(tpext.nn.RNN(I, H, 2, bidirectional=True).state_dict())
    suffixes = ["l0", "l0_reverse", "l1", "l1_reverse"]
    reverse = [f"reverse_{stem}_{suffix}" for suffix in suffixes for stem in ("weight_hh", "bias")]
    assert list(rnn.state_dict()) == plain + reverse
    for suffix in suffixes:
        weight = getattr(rnn, f"reverse_weight_hh_{suffix}")
        torch.testing.assert_close(weight @ weight.T, torch.eye(H), atol=1e-5, rtol=0)
        bias = getattr(rnn, f"reverse_bias_{suffix}")
        assert bias.shape == (H,)
        assert bias.eq(0).all()
    assert sum(len(row) for row in rnn.all_weights) == len(plain)
    rnn(torch.randn(T, B, I))[0].sum().backward()
    assert all(getattr(rnn, name).grad is None for name in reverse)
    assert all(getattr(rnn, name).grad is not None for name in plain)


def test_reset_parameters_is_the_initialisation():
    torch.manual_seed(3)
    rnn = tpext.nn.RNN(I, H, 2, rule=LearnedInverse())
    before = copy.deepcopy(rnn.state_dict())
    torch.manual_seed(3)
    rnn.reset_parameters()
    assert all(torch.equal(before[name], value) for name, value in rnn.state_dict().items())


def test_parameters_made_on_the_meta_device_come_to_life():
    rnn = tpext.nn.RNN(I, H, rule=LearnedInverse(), device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    rnn.reset_parameters()
    torch.manual_seed(3)
    expected = tpext.nn.RNN(I, H, rule=LearnedInverse()).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in rnn.state_dict().items())


def loop_loss(
    rnn: tpext.nn.RNN, x: Tensor, hx: Tensor | None, lengths: list[int], noise: list[Tensor] | None
) -> Tensor:
    """The equation of ``reconstruction_loss``, row by row and step by step."""
    directions = 2 if rnn.bidirectional else 1
    steps, batch, _ = x.shape
    loss = torch.zeros((), dtype=x.dtype)
    for layer in range(rnn.num_layers):
        outputs = torch.zeros(steps, batch, directions * H, dtype=x.dtype)
        for direction in range(directions):
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            w_ih, w_hh = (getattr(rnn, f"weight_{kind}_{suffix}").detach() for kind in ("ih", "hh"))
            bias = (getattr(rnn, f"bias_ih_{suffix}") + getattr(rnn, f"bias_hh_{suffix}")).detach() if rnn.bias else 0
            v, c = getattr(rnn, f"reverse_weight_hh_{suffix}"), getattr(rnn, f"reverse_bias_{suffix}")
            for b in range(batch):
                h = torch.zeros(H, dtype=x.dtype) if hx is None else hx[layer * directions + direction, b]
                order = range(lengths[b])[::-1] if direction else range(lengths[b])
                for t in order:
                    start = h if noise is None else h + noise[layer][direction, t, b]
                    reached = torch.tanh(w_ih @ x[t, b] + bias + w_hh @ start)
                    rebuilt = torch.tanh(v @ reached + c + w_ih @ x[t, b])
                    loss = loss + 0.5 / batch * (rebuilt - start).square().sum()
                    h = torch.tanh(w_ih @ x[t, b] + bias + w_hh @ h)
                    outputs[t, b, direction * H : (direction + 1) * H] = h
        x = outputs
    return loss


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS, [0, 6, 2, 0]])
def test_reconstruction_loss_is_its_equation(bidirectional, with_hx, lengths):
    rnn = learned(num_layers=2, bidirectional=bidirectional, bias=not with_hx)
    stack = 4 if bidirectional else 2
    x = torch.randn(T, B, I, dtype=DOUBLE, requires_grad=True)
    hx = torch.randn(stack, B, H, dtype=DOUBLE, requires_grad=True) if with_hx else None
    given = None if lengths is None else torch.tensor(lengths)
    torch.manual_seed(11)
    draws = [torch.randn(stack // 2, T, B, H, dtype=DOUBLE) for _ in range(2)]
    for std in (0.0, 0.2):
        rnn.zero_grad()
        torch.manual_seed(11)
        loss = rnn.reconstruction_loss(x, hx, given, noise=std)
        expected = loop_loss(
            rnn, x.detach(), None if hx is None else hx.detach(), lengths or [T] * B, [std * draw for draw in draws]
        )
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        reverse = [p for name, p in rnn.named_parameters() if name.startswith("reverse_")]
        gradients = torch.autograd.grad(expected, reverse)
        loss.backward()
        for parameter, gradient in zip(reverse, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-13)
        assert x.grad is None
        assert hx is None or hx.grad is None
        assert all(p.grad is None for name, p in rnn.named_parameters() if not name.startswith("reverse_"))


def test_reconstruction_loss_takes_every_form_of_input():
    rnn = learned(batch_first=True)
    x = torch.randn(B, T, I, dtype=DOUBLE)
    lengths = torch.tensor(LENGTHS)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    torch.testing.assert_close(rnn.reconstruction_loss(packed), rnn.reconstruction_loss(x, None, lengths))
    torch.testing.assert_close(rnn.reconstruction_loss(x[0]), rnn.reconstruction_loss(x[:1]))
    assert rnn.reconstruction_loss(x[:0]) == 0


def test_reconstruction_loss_noise_defaults_to_the_rule():
    rnn = learned()
    x = torch.randn(T, B, I, dtype=DOUBLE)
    silent = rnn.reconstruction_loss(x)
    assert torch.equal(silent, rnn.reconstruction_loss(x, noise=0.0))
    rnn.rule = LearnedInverse(noise=0.5)
    torch.manual_seed(1)
    noisy = rnn.reconstruction_loss(x)
    torch.manual_seed(1)
    assert torch.equal(noisy, rnn.reconstruction_loss(x, noise=0.5))
    assert noisy != silent
    for noise in (-1.0, math.nan):
        with pytest.raises(ValueError, match="noise must be a finite number >= 0"):
            rnn.reconstruction_loss(x, noise=noise)


def test_reconstruction_loss_needs_its_rule():
    with pytest.raises(RuntimeError, match=r"needs rule=tpext.LearnedInverse\(\), .* the rule is Backprop\(\)"):
        tpext.nn.RNN(I, H, rule=Backprop()).reconstruction_loss(torch.randn(T, B, I))


def test_reverse_layers_learn():
    rnn = learned(num_layers=2)
    x = torch.randn(40, 16, I, dtype=DOUBLE)
    reverse = [p for name, p in rnn.named_parameters() if name.startswith("reverse_")]
    before = rnn.reconstruction_loss(x).item()
    optimizer = torch.optim.Adam(reverse, 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        rnn.reconstruction_loss(x, noise=0.05).backward()
        optimizer.step()
    assert rnn.reconstruction_loss(x).item() < before / 5


def test_learned_state_dicts():
    plain = nn.RNN(I, H, 2)
    rnn = tpext.nn.RNN(I, H, 2, rule=LearnedInverse())
    before = copy.deepcopy(rnn.state_dict())
    result = rnn.load_state_dict(plain.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, value in rnn.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("reverse_") else plain.state_dict()[name])

    model, twin = (nn.Sequential(tpext.nn.RNN(I, H, 2, rule=LearnedInverse())) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    # some of the reverse parameters without the others are a damaged checkpoint, ordinary ones are always needed
    for name in ("0.reverse_bias_l1", "0.weight_hh_l1"):
        state = model.state_dict()
        del state[name]
        with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
            twin.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*reverse_weight_hh_l0"):
        plain.load_state_dict(rnn.state_dict())
    plain.load_state_dict(rnn.to_torch().state_dict())


def lost_credit(run: Callable[[], object]) -> bool:
    """Whether ``run`` warns of credit that ends between calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return any("the credit of a call ends at its hx" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_warns_where_credit_ends_between_parts_of_a_sequence(bidirectional: bool, checkpoint_every: int | None) -> None:
    rnn = tpext.nn.RNN(3, 4, num_layers=2, bidirectional=bidirectional, checkpoint_every=checkpoint_every)
    x = torch.randn(5, 2, 3)
    output, h_n = rnn(x)
    assert lost_credit(lambda: rnn(x, h_n))
    assert lost_credit(lambda: rnn(x, torch.stack([h.clone() for h in h_n.unbind()])))
    if not bidirectional:
        assert lost_credit(lambda: rnn(x, torch.cat([h_n[:1], output[-1:]])))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rnn(x, h_n)
    assert caught[0].filename == __file__


def test_does_not_warn_where_no_credit_is_lost() -> None:
    rnn, decoder = tpext.nn.RNN(3, 4), tpext.nn.RNN(3, 4)
    x = torch.randn(5, 2, 3)
    h_n = rnn(x)[1]
    assert not lost_credit(lambda: decoder(x, h_n))
    assert not lost_credit(lambda: rnn(x, h_n.detach()))
    assert not lost_credit(lambda: rnn(x, torch.zeros(1, 2, 4, requires_grad=True)))
    with torch.no_grad():
        assert not lost_credit(lambda: rnn(x, h_n))
    for rule in (tpext.Backprop(), tpext.RegularizedInverse(credit="local")):
        other = tpext.nn.RNN(3, 4, rule=rule)
        handed_on = other(x)[1]
        assert not lost_credit(lambda other=other, handed_on=handed_on: other(x, handed_on))
