"""``tpext.nn.RNN``: the interface of ``torch.nn.RNN``, its results and its errors."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from rnn_cases import DOUBLE, LENGTHS, B, H, I, T, assert_same, sequences
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import tpext
from tpext import Backprop, LearnedInverse, RegularizedInverse


def pair(**options) -> tuple[nn.RNN, tpext.nn.RNN]:
    """The two modules with the same weights, ours with exact gradients."""
    theirs = nn.RNN(I, H, dtype=DOUBLE, **options)
    ours = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=Backprop(), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


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
        (
            torch.tensor([3, 6, 1]),
            r"RNN: lengths must be \[B=4\] as input \(\[T, B, I\], without batch_first\), got \[3\]",
        ),
        (torch.tensor([[3, 6, 1, 4]]), r"RNN: lengths must be \[B=4\] as input.*, got \[1, 4\]"),
        (torch.tensor([3.0, 6.0, 1.0, 4.0]), r"RNN: lengths must be integers, got torch.float32 \[4\]"),
        (torch.ones(4, dtype=torch.bool), r"RNN: lengths must be integers, got torch.bool \[4\]"),
        (torch.tensor([3, 7, 1, 4]), r"RNN: lengths must lie in 0..T=6, got \[3, 7, 1, 4\]"),
        ([3, 6, -1, 4], r"RNN: lengths must lie in 0..T=6, got \[3, 6, -1, 4\]"),
    ],
)
@pytest.mark.parametrize("rule", [Backprop(), RegularizedInverse(), LearnedInverse()])
def test_bad_lengths(rule, lengths, text):
    with pytest.raises(ValueError, match=text):
        tpext.nn.RNN(I, H, rule=rule)(torch.randn(T, B, I), None, lengths)


@pytest.mark.parametrize("as_given", [list, tuple, lambda lengths: torch.tensor(lengths, dtype=torch.int32)])
def test_lengths_are_integers_in_any_form(as_given):
    rnn, x = tpext.nn.RNN(I, H), torch.randn(T, B, I)
    expected, expected_final = rnn(x, None, torch.tensor(LENGTHS))
    output, final = rnn(x, None, as_given(LENGTHS))
    assert torch.equal(output, expected)
    assert torch.equal(final, expected_final)
    for wrong, got in (("four", "str"), ([3, 6, None, 4], "list"), ([True] * 4, "list of torch.bool")):
        with pytest.raises(TypeError, match=rf"RNN: lengths must be a tensor \[B\] or a list of integers, got {got}$"):
            rnn(x, None, wrong)


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
    with pytest.raises(TypeError, match="num_layers should be of type int, got: Backprop"):
        tpext.nn.RNN(I, H, Backprop())


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
    assert repr(tpext.nn.RNN(3, 4)) == "RNN(3, 4, rule=RegularizedInverse())"
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
