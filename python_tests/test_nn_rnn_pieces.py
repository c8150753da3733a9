"""``tpext.nn.RNN`` without the sequence of its outputs, and in pieces: what it keeps, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from rnn_cases import DOUBLE, B, H, I, T, assert_same, sequences
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import tpext
from tpext import Backprop, LearnedInverse, RegularizedInverse

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
    assert repr(rnn) == "RNN(3, 5, return_sequence=False, checkpoint_every=4, rule=RegularizedInverse())"
    x = torch.randn(T, B, I)
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), tpext.nn.convert(rnn, RegularizedInverse())):
        assert repr(twin) == repr(rnn)
        assert twin(x)[0] is None
        assert torch.equal(twin(x)[1], rnn(x)[1])
    torch.testing.assert_close(rnn.to_torch()(x)[1], rnn(x)[1])
