"""``tpext.nn.Ensemble``: members that run together get the bits of calls of their own."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from comparison import assert_same_bits
from torch import Tensor
from torch.nn.utils import prune

import tpext
from tpext.nn import Ensemble

T, B, I, H, N = 7, 5, 3, 6, 3  # noqa: E741

# Of the members, by what differs in their rules.
RULES = {
    "numbers": [
        tpext.RegularizedInverse(reg=reg, target_step=step, credit="local")
        for reg, step in ((0.1, 1.0), (1.0, 0.5), (10.0, 0.2))
    ],
    "nothing": [tpext.RegularizedInverse()] * N,
    "exact": [tpext.Backprop()] * N,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bias": False, "checkpoint_every": 3},
    {"bidirectional": True, "checkpoint_every": 2, "return_sequence": False},
]


def members(cell: str, rules: Sequence[Any], **options: Any) -> list[Any]:
    torch.manual_seed(3)
    return [getattr(tpext.nn, cell)(I, H, rule=rule, **options) for rule in rules]


def states_like(cell: str, modules: Sequence[Any]) -> Any:
    """Initial states of an ensemble."""
    of_each = len(modules[0].all_weights)
    drawn = [torch.randn(N, of_each, B, H, requires_grad=True) for _ in range(2)]
    return tuple(drawn) if cell == "LSTM" else drawn[0]


def as_tuple(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def of_member(states: Any, member: int) -> Any:
    return tuple(kind[member] for kind in states) if isinstance(states, tuple) else states[member]


@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_members_get_the_bits_of_calls_of_their_own(
    cell: str, rules: str, options: dict[str, Any], own_inputs: bool
) -> None:
    together = members(cell, RULES[rules], **options)
    apart = copy.deepcopy(together)
    input = torch.randn(N, T, B, I) if own_inputs else torch.randn(T, B, I)
    # of a shared input the ensemble adds up what the members ask for, in another order
    input.requires_grad_(own_inputs)
    alone = input.detach().clone().requires_grad_(own_inputs)
    lengths = torch.tensor([7, 3, 1, 0, 5])
    hx = states_like(cell, together)
    hx_alone = copy.deepcopy(hx)
    output, final = Ensemble(together)(input, hx, lengths)
    wanted = [one for one in (output, *as_tuple(final)) if one is not None]
    gradients = [torch.randn_like(one) for one in wanted]
    torch.autograd.backward(wanted, gradients)
    for member, module in enumerate(apart):
        found, last = module(alone[member] if own_inputs else alone, of_member(hx_alone, member), lengths)
        own = [one for one in (found, *as_tuple(last)) if one is not None]
        assert_same_bits([one[member] for one in wanted], own)
        torch.autograd.backward(own, [gradient[member] for gradient in gradients])
        assert_same_bits([p.grad for p in together[member].parameters()], [p.grad for p in module.parameters()])
    assert_same_bits([one.grad for one in as_tuple(hx)], [one.grad for one in as_tuple(hx_alone)])
    if own_inputs:
        assert_same_bits([input.grad], [alone.grad])


def test_a_shared_input_gets_the_gradient_of_all() -> None:
    together = [one.double() for one in members("RNN", RULES["numbers"], bidirectional=True)]
    input = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    output, _ = Ensemble(together)(input)
    output.square().sum().backward()
    shared = input.grad
    input.grad = None
    for module in together:
        module(input)[0].square().sum().backward()
    torch.testing.assert_close(shared, input.grad, rtol=1e-13, atol=1e-13)


def test_an_empty_batch() -> None:
    ensemble = Ensemble(members("LSTM", RULES["numbers"], num_layers=2, bidirectional=True))
    output, (h_n, c_n) = ensemble(torch.empty(T, 0, I))
    assert (output.shape, h_n.shape, c_n.shape) == ((N, T, 0, 2 * H), (N, 4, 0, H), (N, 4, 0, H))
    output.sum().backward()
    assert all(parameter.grad.eq(0).all() for parameter in ensemble.parameters())


def test_batch_first() -> None:
    """Inputs and outputs are those of time-major members, transposed."""
    time_major, batch_first = (members("GRU", RULES["numbers"], batch_first=flag) for flag in (False, True))
    for input in (torch.randn(T, B, I), torch.randn(N, T, B, I)):
        output, h_n = Ensemble(time_major)(input)
        transposed, same_h_n = Ensemble(batch_first)(input.transpose(-3, -2))
        assert_same_bits([transposed.transpose(1, 2), same_h_n], [output, h_n])


def test_reverse_layers_learn_as_alone() -> None:
    rules = [tpext.LearnedInverse(target_step=step) for step in (1.0, 0.1, 0.3)]
    together = [one.double() for one in members("RNN", rules, num_layers=2)]
    apart = copy.deepcopy(together)
    input = torch.randn(N, T, B, I, dtype=torch.float64)
    loss = Ensemble(together).reconstruction_loss(input)
    loss.backward()
    own = [module.reconstruction_loss(part) for module, part in zip(apart, input, strict=True)]
    torch.testing.assert_close(loss, sum(own))
    torch.autograd.backward(own)
    for one, other in zip(together, apart, strict=True):
        for name, parameter in other.named_parameters():
            assert (parameter.grad is not None) == name.startswith("reverse_")
            torch.testing.assert_close(one.get_parameter(name).grad, parameter.grad)


def test_a_rule_that_changes_takes_effect() -> None:
    ensemble = Ensemble(members("RNN", RULES["nothing"]))
    input = torch.randn(T, B, I)

    def gradient() -> Tensor:
        ensemble.zero_grad()
        ensemble(input)[1].sum().backward()
        return ensemble.members[1].weight_hh_l0.grad.clone()

    before = gradient()
    ensemble.members[1].rule = tpext.RegularizedInverse(reg=7.0)
    changed = gradient()
    assert not torch.equal(before, changed)
    ensemble.members[1].rule = RULES["nothing"][0]
    assert torch.equal(gradient(), before)
    ensemble.members[1].rule = tpext.Backprop()
    with pytest.raises(ValueError, match="Ensemble: rules must differ in their numbers alone, got <class"):
        ensemble(input)


def test_directions_keep_their_numbers() -> None:
    rules = [tpext.RegularizedInverse(reg=reg) for reg in (1.0, (0.1, 3.0), 2.0)]
    joined = Ensemble(members("RNN", rules, bidirectional=True))._rule()
    assert joined.reg == (1.0, 1.0, 0.1, 3.0, 2.0, 2.0)


def test_compiles_whole() -> None:
    ensemble = Ensemble(members("RNN", RULES["numbers"], num_layers=2))
    input = torch.randn(T, B, I)
    outputs, gradients = [], []
    for run in (ensemble, torch.compile(ensemble, fullgraph=True)):
        ensemble.zero_grad()
        output, h_n = run(input)
        (output.square().sum() + h_n.sum()).backward()
        outputs.append(output)
        gradients.append([parameter.grad.clone() for parameter in ensemble.parameters()])
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_state_dict_copies_and_pickles() -> None:
    ensemble = Ensemble(members("RNN", RULES["numbers"]))
    alone = ensemble.members[2]
    assert {name.removeprefix("members.2."): value for name, value in ensemble.state_dict().items() if ".2." in name}
    assert set(alone.state_dict()) == {name.split(".")[2] for name in ensemble.state_dict()}
    input = torch.randn(T, B, I)
    expected = ensemble(input)
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert_same_bits(other(input), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (list, "members must be at least one network, got none"),
        (lambda: [tpext.nn.RNN(I, H), tpext.nn.RNN(I, H + 1)], "got hidden_size=6 of the first and 7 of another"),
        (lambda: [tpext.nn.RNN(I, H), tpext.nn.GRU(I, H)], "got mode='RNN_TANH' of the first and 'GRU' of another"),
        (lambda: [tpext.nn.RNN(I, H), tpext.nn.RNN(I, H).double()], "got dtype=torch.float32 of the first and"),
        (lambda: [tpext.nn.RNN(I, H)] * 2, "must be different modules"),
        (lambda: [tpext.nn.LSTM(I, H, proj_size=2, rule=tpext.Backprop())], "proj_size of members must be 0, got 2"),
        (
            lambda: members("RNN", [tpext.RegularizedInverse(credit=credit) for credit in ("local", "through_time")]),
            "rules must differ in their numbers alone, got ('credit', 'local') and ('credit', 'through_time')",
        ),
    ],
)
def test_members_that_do_not_go_together(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Ensemble(change())


def test_pruned_members_are_refused() -> None:
    """Pruning makes the weight in a hook of forward, which the ensemble does not call."""
    ensemble = Ensemble(members("RNN", RULES["numbers"]))
    prune.random_unstructured(ensemble.members[1], "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match=r"members must have no hooks, .* got _forward_pre_hooks"):
        ensemble(torch.zeros(T, B, I))


def test_members_may_change_in_number() -> None:
    ensemble = Ensemble(members("RNN", RULES["numbers"]))
    del ensemble.members[0]
    assert ensemble._rule().reg == (1.0, 10.0)
    assert ensemble(torch.zeros(T, B, I))[1].shape == (2, 1, B, H)


def test_members_must_be_networks_of_ours() -> None:
    with pytest.raises(TypeError, match=re.escape("members must be tpext.nn.RNN, GRU or LSTM, got RNN")):
        Ensemble([torch.nn.RNN(I, H)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, T, B, I),), ValueError, "input must be [T, B, I] or [N, T, B, I], N=3, got [2, 7, 5, 3]"),
        ((torch.zeros(T, I),), ValueError, "input must be [T, B, I] or [N, T, B, I], N=3, got [7, 3]"),
        ((torch.zeros(T, B, I + 1),), RuntimeError, "Expected 3, got 4"),
        ((torch.zeros(T, B, I), (torch.zeros(N, 1, B, H),) * 2), TypeError, "hx must be a tensor, got 2"),
        ((torch.zeros(T, B, I), torch.zeros(1, B, H)), ValueError, "hx must be [N=3, num_layers * D, B, H]"),
        (
            (torch.zeros(T, B, I), torch.zeros(N, 2, B, H)),
            RuntimeError,
            "Expected hidden size (1, 5, 6), got [2, 5, 6]",
        ),
        ((torch.zeros(T, B, I), None, torch.ones(B)), ValueError, "lengths must be integers"),
        (([0.0],), TypeError, "Ensemble: input must be"),
    ],
)
def test_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Ensemble(members("RNN", RULES["numbers"]))(*arguments)
