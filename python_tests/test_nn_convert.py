"""``convert()`` and ``to_torch()``: the same parameters under another module."""

from __future__ import annotations

import copy
import itertools
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tpext
from tpext import Backprop, LearnedInverse, RegularizedInverse
from tpext.nn import convert

I, H = 3, 5  # noqa: E741


class Classifier(nn.Module):
    """Two recurrent layers at different depths, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.RNN(I, I, batch_first=True)
        self.inner = nn.ModuleDict({"rnn": nn.RNN(I, H, 2, "relu", False, True, 0.1, True)})
        self.stack = nn.Sequential(nn.Linear(I, I), self.first)
        self.again = self.first

    def forward(self, x):
        x, _ = self.first(x)
        x, _ = self.stack(x)
        return self.inner["rnn"](x)[0]


@pytest.mark.parametrize("rule", [None, Backprop(), RegularizedInverse(reg=3.0)])
def test_replaces_every_rnn_and_shares_parameters(rule):
    model = Classifier().eval()
    state, parameters = model.state_dict(keep_vars=True), list(model.parameters())
    x = torch.randn(2, 7, I)
    expected = model(x)
    inner = model.inner["rnn"]
    assert convert(model, rule) is model
    assert type(model.first) is tpext.nn.RNN
    assert type(model.inner["rnn"]) is tpext.nn.RNN
    assert model.first is model.again is model.stack[1]
    assert model.first.rule == model.inner["rnn"].rule == (rule or RegularizedInverse())
    for name, parameter in model.state_dict(keep_vars=True).items():
        assert parameter is state[name]
    assert list(state) == list(model.state_dict())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for name in [
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "nonlinearity",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    ]:
        assert getattr(model.inner["rnn"], name) == getattr(inner, name)
    torch.testing.assert_close(model(x), expected)


def test_bare_module():
    rnn = nn.RNN(I, H).eval()
    ours = convert(rnn, Backprop())
    assert type(ours) is tpext.nn.RNN
    assert ours.rule == Backprop()
    assert not ours.training
    assert ours.weight_hh_l0 is rnn.weight_hh_l0
    assert convert(ours, RegularizedInverse()) is ours
    assert ours.rule == RegularizedInverse()


def test_each_module_keeps_its_training_flag_and_frozen_parameters():
    model = nn.ModuleList([nn.RNN(I, H).eval(), nn.RNN(I, H).requires_grad_(False)])
    convert(model)
    assert [m.training for m in model] == [False, True]
    assert [m.weight_hh_l0.requires_grad for m in model] == [True, False]


def test_tied_parameters_stay_tied():
    model = nn.ModuleList([nn.RNN(I, I), nn.RNN(I, I)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    convert(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0


def test_an_optimizer_made_before_still_steps():
    model = nn.Sequential(nn.RNN(I, H))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(7, 2, I))[0].sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_no_random_draws_and_no_second_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rnn = nn.RNN(I, H, dropout=0.5)
        state = torch.get_rng_state()
        back = convert(rnn).to_torch()
    assert len(caught) == 1
    assert back.dropout == 0.5
    assert torch.equal(state, torch.get_rng_state())


def test_changes_the_rule_of_our_own_modules_in_place():
    model = nn.Sequential(tpext.nn.RNN(I, H), nn.RNN(H, H))
    ours = model[0]
    calls = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    convert(model, LearnedInverse(noise=0.25))
    assert model[0] is ours
    assert all(m.rule == LearnedInverse(noise=0.25) for m in model)
    for module in model:
        weight = module.reverse_weight_hh_l0
        torch.testing.assert_close(weight @ weight.T, torch.eye(H), atol=1e-5, rtol=0)
    reverse = ours.reverse_weight_hh_l0
    convert(model, LearnedInverse())
    assert ours.reverse_weight_hh_l0 is reverse, "reverse parameters are kept between learned rules"
    convert(model, Backprop())
    assert [name for name, _ in model.named_parameters() if "reverse_" in name] == []
    ours(torch.randn(4, 2, I))
    assert calls == [1]


def test_meta_device():
    model = convert(nn.Sequential(nn.RNN(I, H, device="meta")), LearnedInverse())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    output, h_n = model[0](torch.empty(7, 2, I, device="meta"))
    assert output.shape == (7, 2, H)
    assert h_n.shape == (1, 2, H)
    assert output.device.type == "meta"


def hooked(rnn: nn.Module, register: str) -> nn.Module:
    getattr(rnn, register)(lambda *arguments: None)
    return rnn


def with_buffer(rnn: nn.Module) -> nn.Module:
    rnn.register_buffer("steps", torch.zeros(()))
    return rnn


def pruned(rnn: nn.Module) -> nn.Module:
    prune.l1_unstructured(rnn, "weight_hh_l0", 0.5)
    # the hook that recomputes the weight is not all that pruning adds
    rnn._forward_pre_hooks.clear()
    return rnn


class Subclass(nn.RNN):
    """A user's own extension."""


# what makes a module irreplaceable, and what the error must name
NOT_REPLACEABLE = {
    "forward hook": (partial(hooked, register="register_forward_hook"), "_forward_hooks"),
    "forward pre-hook": (partial(hooked, register="register_forward_pre_hook"), "_forward_pre_hooks"),
    "backward hook": (partial(hooked, register="register_full_backward_hook"), "_backward_hooks"),
    "backward pre-hook": (partial(hooked, register="register_full_backward_pre_hook"), "_backward_pre_hooks"),
    "state_dict hook": (partial(hooked, register="register_state_dict_post_hook"), "_state_dict_hooks"),
    "state_dict pre-hook": (partial(hooked, register="register_state_dict_pre_hook"), "_state_dict_pre_hooks"),
    "load_state_dict pre-hook": (
        partial(hooked, register="register_load_state_dict_pre_hook"),
        "_load_state_dict_pre_hooks",
    ),
    "load_state_dict post-hook": (
        partial(hooked, register="register_load_state_dict_post_hook"),
        "_load_state_dict_post_hooks",
    ),
    "parametrization": (partial(parametrizations.orthogonal, name="weight_hh_l0"), "no parameter weight_hh_l0"),
    "pruning": (pruned, "no parameter weight_hh_l0, a member weight_hh_l0_mask, a member weight_hh_l0_orig"),
    "buffer": (with_buffer, "a member steps"),
}


@pytest.mark.parametrize("case", NOT_REPLACEABLE)
def test_refuses_to_lose_anything(case):
    change, text = NOT_REPLACEABLE[case]
    model = nn.Sequential(nn.RNN(I, I), change(nn.RNN(I, H)))
    before = list(model)
    with pytest.raises(ValueError, match=rf"convert: module '1' has .*{text}.* which a replacement would lose"):
        convert(model)
    assert list(model) == before, "a refused conversion leaves the model alone"
    with pytest.raises(ValueError, match=f"convert: the module has .*{text}"):
        convert(model[1])
    for rule in (RegularizedInverse(), LearnedInverse()):
        ours = change(tpext.nn.RNN(I, H, rule=rule))
        with pytest.raises(ValueError, match=rf"RNN\.to_torch: the module has .*{text}.* would lose"):
            ours.to_torch()


def test_what_was_undone_is_no_obstacle():
    for make in (nn.RNN, tpext.nn.RNN):
        rnn = make(I, H)
        prune.l1_unstructured(rnn, "weight_hh_l0", 0.5)
        prune.remove(rnn, "weight_hh_l0")
        parametrizations.orthogonal(rnn, "weight_ih_l0")
        parametrize.remove_parametrizations(rnn, "weight_ih_l0")
        rnn.register_forward_hook(print).remove()
        other = convert(rnn) if make is nn.RNN else rnn.to_torch()
        assert type(other) is (tpext.nn.RNN if make is nn.RNN else nn.RNN)
        assert all(getattr(other, name) is p for name, p in rnn.named_parameters())


@pytest.mark.parametrize("name", ["reverse_weight_hh_l0", "reverse_bias_l1"])
@pytest.mark.parametrize("change", ["parametrize", "prune"])
def test_reverse_parameters_that_cannot_be_removed_leave_the_model_alone(name, change):
    model = nn.Sequential(nn.RNN(I, I), tpext.nn.RNN(I, I), tpext.nn.RNN(I, I, 2, rule=LearnedInverse()))
    if change == "parametrize":
        parametrize.register_parametrization(model[2], name, nn.Identity())
    else:
        prune.l1_unstructured(model[2], name, 0.5)
    before, state = list(model), list(model.state_dict())
    with pytest.raises(ValueError, match=f"RNN: {name} cannot be removed"):
        convert(model, Backprop())
    assert list(model) == before
    assert list(model.state_dict()) == state
    assert [model[1].rule, model[2].rule] == [RegularizedInverse(), LearnedInverse()]
    convert(model, LearnedInverse(noise=0.5))
    assert all(module.rule == LearnedInverse(noise=0.5) for module in model)


def test_reverse_parameters_whose_names_are_taken_leave_the_model_alone():
    model = nn.Sequential(nn.RNN(I, I), tpext.nn.RNN(I, I), tpext.nn.RNN(I, I))
    model[2].register_buffer("reverse_bias_l0", torch.zeros(I))
    before, state = list(model), list(model.state_dict())
    with pytest.raises(ValueError, match="RNN: reverse_bias_l0 cannot be added"):
        convert(model, LearnedInverse())
    assert list(model) == before
    assert list(model.state_dict()) == state
    assert [model[1].rule, model[2].rule] == [RegularizedInverse()] * 2


def test_subclasses_are_left_alone():
    model = nn.Sequential(Subclass(I, H), nn.Linear(H, H))
    before = list(model)
    with pytest.warns(UserWarning, match=r"convert: the model has no torch\.nn\.RNN, GRU or LSTM .* nothing was"):
        assert list(convert(model)) == before


def test_a_rule_that_does_not_fit_leaves_the_model_alone():
    for second in (nn.RNN(I, H, nonlinearity="relu"), tpext.nn.RNN(I, H, nonlinearity="relu")):
        model = nn.Sequential(nn.RNN(I, I), tpext.nn.RNN(I, I), second)
        before = list(model)
        with pytest.raises(ValueError, match="LearnedInverse needs nonlinearity='tanh'"):
            convert(model, LearnedInverse())
        assert list(model) == before
        assert model[1].rule == RegularizedInverse()
    with pytest.raises(TypeError, match="rule must be"):
        convert(nn.Sequential(nn.RNN(I, H)), "backprop")


# to_torch


@pytest.mark.parametrize("rule", [Backprop(), RegularizedInverse(), LearnedInverse()])
def test_to_torch_gives_the_plain_module_back(rule):
    for layers, nonlinearity, bias, batch_first, bidirectional in itertools.product(
        [1, 2], ["tanh", "relu"], [True, False], [True, False], [True, False]
    ):
        if isinstance(rule, LearnedInverse) and nonlinearity == "relu":
            continue
        ours = tpext.nn.RNN(I, H, layers, nonlinearity, bias, batch_first, 0.0, bidirectional, rule=rule)
        plain = ours.to_torch()
        assert type(plain) is nn.RNN
        assert plain.training
        x = torch.randn(4, 7, I)
        torch.testing.assert_close(plain(x), ours(x))
        assert [name for name in ours.state_dict() if not name.startswith("reverse_")] == list(plain.state_dict())
        for row, theirs in zip(ours.all_weights, plain.all_weights, strict=True):
            assert all(a is b for a, b in zip(row, theirs, strict=True))
    # the plain module is whole: it reads changed weights, copies, moves and converts back
    with torch.no_grad():
        ours.weight_hh_l0.mul_(0.5)
    torch.testing.assert_close(plain(x), ours(x))
    torch.testing.assert_close(copy.deepcopy(plain)(x), ours(x))
    assert convert(plain).weight_hh_l0 is ours.weight_hh_l0
    torch.testing.assert_close(plain.double()(x.double()), ours(x.double()))


def test_to_torch_keeps_mode_and_refuses_identity():
    assert not tpext.nn.RNN(I, H).eval().to_torch().training
    with pytest.raises(ValueError, match="no nonlinearity 'identity'"):
        tpext.nn.RNN(I, H, nonlinearity="identity").to_torch()


def test_a_rule_of_feed_forward_layers_is_refused_even_where_nothing_is_to_convert():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    expected = r"convert: rule must be for recurrent layers .* its kin here is tpext.RegularizedInverse"
    with pytest.raises(TypeError, match=expected):
        tpext.nn.convert(model, tpext.RegularizedLeastSquares())


@pytest.mark.parametrize(
    "name", ["RNNCell", "GRUCell", "LSTMCell", "Linear", "Sequential", "Conv2d", "Transformer", "Parameter"]
)
def test_names_of_torch_that_are_not_here_say_what_to_take(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"module 'tpext.nn' has no attribute '{name}': .*(torch\.nn\.{name}|a )"):
        getattr(tpext.nn, name)


@pytest.mark.parametrize("name", ["Perceptron", "__wrapped__", "_reduction"])
def test_names_of_nothing_are_missing_as_python_says(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"module 'tpext.nn' has no attribute '{name}'$"):
        getattr(tpext.nn, name)
