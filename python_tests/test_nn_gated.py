"""``tpext.nn.GRU`` and ``tpext.nn.LSTM``: the interface of torch's modules, the numbers of each rule."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import tpext
from tpext import Backprop, RegularizedInverse

T, B, I, H = 6, 4, 3, 5  # noqa: E741
LENGTHS = torch.tensor([3, 6, 1, 4])
DOUBLE = torch.float64
CELLS = ["GRU", "LSTM"]
DATA = Path(__file__).parent / "data"

pytestmark = [
    pytest.mark.parametrize("cell", CELLS),
    # of slopes that are here for their numbers, not to learn by
    pytest.mark.filterwarnings("ignore:.*gate_slope='inverse', as published"),
]


def pair(cell: str, **options: Any) -> tuple[Any, Any]:
    """torch's module and ours with the same weights and exact gradients."""
    theirs = getattr(nn, cell)(I, H, dtype=DOUBLE, **options)
    ours = getattr(tpext.nn, cell)(I, H, dtype=DOUBLE, rule=Backprop(), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def initial(module: Any, batch: tuple[int, ...] = (B,)) -> Any:
    """Random initial states, in the form that the module takes."""
    stack = module.num_layers * (2 if module.bidirectional else 1)
    torch.manual_seed(2)
    h, c = (
        torch.randn(stack, *batch, size, dtype=DOUBLE, requires_grad=True)
        for size in (module.proj_size or H, module.hidden_size)
    )
    return (h, c) if "LSTM" in type(module).__name__ else h


def as_tuple(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def results(module: Any, form: str, with_hx: bool, **arguments: Any) -> dict[Any, Tensor]:
    """Outputs and all gradients of a random linear loss, which of a padded and of a packed batch is the same."""
    torch.manual_seed(1)
    x = torch.randn(*((T, I) if form == "unbatched" else (T, B, I)), dtype=DOUBLE)
    if module.batch_first and form != "unbatched":
        x = x.transpose(0, 1)
    x.requires_grad_()
    input: Any = x
    if form == "packed":
        input = pack_padded_sequence(x, LENGTHS, module.batch_first, enforce_sorted=False)
    hx = initial(module, () if form == "unbatched" else (B,)) if with_hx else None
    output, final = module(input, hx, **arguments)
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, module.batch_first, total_length=T)
    found: dict[Any, Tensor] = dict(enumerate(as_tuple(final))) | ({} if output is None else {"output": output})
    torch.manual_seed(3)
    torch.stack([(one * torch.randn_like(one)).sum() for one in found.values()]).sum().backward()
    for place, state in enumerate(as_tuple(hx) if with_hx else ()):
        found[f"hx {place}"] = state.grad
    return found | {"input": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def assert_same(ours: dict[Any, Tensor], theirs: dict[Any, Tensor], tolerance: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed"])
def test_backprop_equals_torch(cell, form, bidirectional):
    for num_layers, bias, batch_first, with_hx in [
        (1, True, False, False),
        (1, False, True, True),
        (2, True, True, True),
        (3, False, False, True),
    ]:
        options = {"num_layers": num_layers, "bias": bias, "batch_first": batch_first}
        theirs, ours = pair(cell, bidirectional=bidirectional, **options)
        assert_same(results(ours, form, with_hx), results(theirs, form, with_hx))


def test_lengths_give_the_packed_result(cell):
    theirs, ours = pair(cell, num_layers=2, bidirectional=True)
    assert_same(results(ours, "padded", with_hx=True, lengths=LENGTHS), results(theirs, "packed", with_hx=True))


def test_second_derivatives(cell):
    _, ours = pair(cell, bidirectional=True)
    hx = initial(ours)

    def run(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        output, final = ours(x, states if cell == "LSTM" else states[0], LENGTHS.clamp(max=3))
        return output, *as_tuple(final)

    inputs = (torch.randn(3, B, I, dtype=DOUBLE, requires_grad=True), *as_tuple(hx))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_dropout_draws_what_torch_draws(cell):
    theirs, ours = pair(cell, num_layers=3, dropout=0.4)
    x = torch.randn(T, B, I, dtype=DOUBLE)
    torch.manual_seed(5)
    expected = theirs(x)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_same_seed_same_weights(cell):
    states = []
    for package in (nn, tpext.nn):
        torch.manual_seed(7)
        states.append(getattr(package, cell)(I, H, 2, bidirectional=True).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


# The rules: numbers of two independent programs


def golden_rules(credit: str) -> dict[str, RegularizedInverse]:
    published = RegularizedInverse(reg=1.0, target_step=0.1, credit=credit, gate_slope="inverse")
    return {
        f"published_{credit}": published,
        f"branch_{credit}": published,
        f"cell_{credit}": RegularizedInverse(0.5, 0.1, credit=credit, inverse="cell", slope_reg=0.2),
        f"jacobian_{credit}": RegularizedInverse(0.5, 0.1, credit=credit, inverse="jacobian"),
    }


GOLDEN_RULES = {
    "bptt": Backprop(),
    **golden_rules("local"),
    **golden_rules("through_time"),
    "derivative_local": RegularizedInverse(0.5, 0.1, credit="local"),
    "damped_local": RegularizedInverse(
        0.3, 0.1, credit="local", gate_slope="inverse", candidate_slope="inverse", slope_reg=1.0
    ),
    "one_local": RegularizedInverse(2.0, 0.05, credit="local", gate_slope="one", candidate_slope="one"),
}


@pytest.mark.parametrize("name", ["small", "ragged", "second", "second_reverse"])
def test_golden_numbers(cell, name):
    """Of each rule: outputs, and the gradients of parameters, input and initial states."""
    data = dict(np.load(DATA / f"gated_{cell.lower()}_{name}.npz"))
    tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in data.items()}
    rules = {key.split(".")[0] for key in data if "." in key}
    assert rules <= GOLDEN_RULES.keys()
    assert "bptt" in rules
    backwards = bool(data.get("reverse", 0))
    for rule in rules:
        module = getattr(tpext.nn, cell)(
            tensors["x"].shape[2],
            tensors["h0"].shape[1],
            bidirectional=backwards,
            dtype=DOUBLE,
            rule=GOLDEN_RULES[rule],
        )
        suffix = "_l0_reverse" if backwards else "_l0"
        with torch.no_grad():
            for ours, theirs in (("weight_ih", "Wi"), ("weight_hh", "Wh"), ("bias_ih", "bi"), ("bias_hh", "bh")):
                getattr(module, ours + suffix).copy_(tensors[theirs])
        x = tensors["x"].clone().requires_grad_()
        starts = [tensors[key].clone().requires_grad_() for key in ("h0", "c0")[: 1 if cell == "GRU" else 2]]
        # the other direction of a bidirectional layer gets no gradient
        hx = [torch.stack([torch.zeros_like(s), s] if backwards else [s]) for s in starts]
        output, final = module(x, tuple(hx) if cell == "LSTM" else hx[0], tensors["lengths"].long())
        half = output[..., -tensors["h0"].shape[1] :]
        torch.testing.assert_close(half, tensors["out"], rtol=1e-9, atol=1e-12)
        loss = (half * tensors["g_out"]).sum()
        for state, weights in zip(as_tuple(final), ("g_hn", "g_cn"), strict=False):
            loss = loss + (state[-1] * tensors[weights]).sum()
        loss.backward()
        found = {"x": x.grad} | {key: s.grad for key, s in zip(("h0", "c0"), starts, strict=False)}
        found |= {
            stem: getattr(module, stem + suffix).grad for stem in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        for key, gradient in found.items():
            expected = tensors[f"{rule}.{key}"]
            torch.testing.assert_close(
                gradient, expected, rtol=1e-9, atol=1e-12, msg=lambda text, key=key, rule=rule: f"{rule}.{key}: {text}"
            )


RULES = [
    Backprop(),
    RegularizedInverse(),
    RegularizedInverse(credit="local", inverse="cell", slope_reg=1.0, target_step=0.1),
    RegularizedInverse(inverse="jacobian", chebyshev_steps=2),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("every", [1, 2, 4, 9])
def test_checkpoints_change_results_by_rounding_alone(cell, rule, every):
    for lengths, layers, bidirectional, sequence in [
        (None, 1, False, False),
        (LENGTHS, 1, False, True),
        (LENGTHS, 2, True, False),
        (None, 2, True, True),
    ]:
        module = getattr(tpext.nn, cell)(
            I, H, layers, bidirectional=bidirectional, dtype=DOUBLE, rule=rule, return_sequence=sequence
        )
        whole = results(module, "padded", with_hx=True, lengths=lengths)
        again = copy.deepcopy(module)
        again.zero_grad()
        again.checkpoint_every = every
        assert_same(results(again, "padded", with_hx=True, lengths=lengths), whole)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_copies_are_equal_and_independent(cell, rule):
    module = getattr(tpext.nn, cell)(I, H, 2, dtype=DOUBLE, rule=rule)
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert str(duplicate) == str(module)
        assert_same(results(duplicate, "padded", with_hx=True), results(copy.deepcopy(module), "padded", with_hx=True))


@pytest.mark.parametrize("every", [None, 2])
def test_numbers_one_a_direction(cell, every):
    """Each direction of a layer learns as by a rule of its own numbers."""
    both = RegularizedInverse(reg=(0.3, 2.0), target_step=(1.0, 0.1), slope_reg=(0.5, 1.0), gate_slope="inverse")
    options: dict[str, Any] = {"bidirectional": True, "dtype": DOUBLE, "checkpoint_every": every}
    module = getattr(tpext.nn, cell)(I, H, rule=both, **options)
    found = results(module, "padded", with_hx=True, lengths=LENGTHS)
    for place, suffix in enumerate(("_l0", "_l0_reverse")):
        numbers = {name: getattr(both, name)[place] for name in ("reg", "target_step", "slope_reg")}
        alone = copy.deepcopy(module)
        alone.zero_grad()
        alone.rule = RegularizedInverse(gate_slope="inverse", **numbers)
        of_all = results(alone, "padded", with_hx=True, lengths=LENGTHS)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            torch.testing.assert_close(found[name + suffix], of_all[name + suffix], rtol=0, atol=0)


def test_what_was_published_is_warned_of(cell):
    rule, module = RegularizedInverse(gate_slope="inverse"), getattr(tpext.nn, cell)(I, H)
    for lead_there in (
        lambda: getattr(tpext.nn, cell)(I, H, rule=rule),
        lambda: setattr(module, "rule", rule),
        lambda: tpext.nn.convert(getattr(torch.nn, cell)(I, H), rule),
    ):
        with pytest.warns(UserWarning, match=rf"^{cell}: gate_slope='inverse', as published, .* learns\.$") as caught:
            lead_there()
        assert [one.filename for one in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(tpext.nn, cell)(I, H, rule=RegularizedInverse(gate_slope="inverse", slope_reg=0.1))


def test_every_option_of_a_rule_reaches_the_layer(cell):
    """Each changes the gradients; to what, the oracle says of the same options in test_gated_layer_backward."""
    rule = RegularizedInverse(target_step=0.5, normalize=False, gate_slope="inverse")
    changes: dict[str, Any] = {
        "reg": 0.1,
        "target_step": 0.3,
        "credit": "local",
        "margin": 0.4,
        "normalize": True,
        "slope_reg": 0.5,
        "gate_slope": "one",
        "candidate_slope": "one",
    }
    of_others = {"correction", "input_rule", "slope", "unit_gain", "inverse", "chebyshev_steps"}
    assert changes.keys() == {field.name for field in dataclasses.fields(rule)} - of_others
    module = getattr(tpext.nn, cell)(I, H, dtype=DOUBLE, rule=rule)

    def gradients(rule: RegularizedInverse) -> dict[Any, Tensor]:
        again = copy.deepcopy(module)
        again.rule = rule
        return results(again, "padded", with_hx=True)

    usual = gradients(rule)
    for name, value in changes.items():
        changed = gradients(dataclasses.replace(rule, **{name: value}))
        assert any(not torch.allclose(changed[key], usual[key]) for key in usual), name
    ways = [gradients(RegularizedInverse(inverse="jacobian", chebyshev_steps=steps)) for steps in (None, 1, 3)] + [
        gradients(RegularizedInverse()),
        gradients(RegularizedInverse(inverse="cell", slope_reg=1.0)),
    ]
    for one, other in itertools.combinations(ways, 2):
        assert any(not torch.allclose(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
def test_compiles_whole(cell, rule, with_hx):
    module = getattr(tpext.nn, cell)(I, H, 2, bidirectional=True, dtype=DOUBLE, rule=rule)
    compiled, lengths = copy.deepcopy(module), LENGTHS if with_hx else None
    expected = results(module, "padded", with_hx, lengths=lengths)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    assert_same(results_compiled(compiled, run, with_hx, lengths), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_tensor_for_both_states_compiles(cell):
    module = getattr(tpext.nn, cell)(I, H)
    h = torch.randn(1, B, H)
    hx = (h, h) if cell == "LSTM" else h
    x = torch.randn(T, B, I)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x, hx)[0], module(x, hx)[0])


def results_compiled(module: Any, run: Any, with_hx: bool, lengths: Tensor | None) -> dict[Any, Tensor]:
    class Compiled:
        batch_first, num_layers, bidirectional = module.batch_first, module.num_layers, module.bidirectional
        proj_size, hidden_size = module.proj_size, module.hidden_size
        named_parameters = staticmethod(module.named_parameters)
        __call__ = staticmethod(run)

    Compiled.__name__ = type(module).__name__
    return results(Compiled(), "padded", with_hx, lengths=lengths)


# The interface


class SweepsItself(tpext.rules.RecurrentRule):
    """A rule whose displacements go through no matrix."""

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        raise NotImplementedError

    def start_sweep(self, layer: tpext.rules.LayerWeights) -> tpext.rules.Sweep:
        raise NotImplementedError


def error_of(call: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one is the caller's question)
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 0},
        {"hidden_size": 2.0},
        {"input_size": "3"},
        {"num_layers": 0},
        {"dropout": 1.1},
        {"bias": 1},
        {"batch_first": None},
        {"proj_size": -1},
        {"proj_size": H},
    ],
    ids=repr,
)
def test_constructor_errors_are_torchs(cell, options):
    options = {"input_size": I, "hidden_size": H} | options
    ours = error_of(lambda: getattr(tpext.nn, cell)(**options))
    theirs = error_of(lambda: getattr(nn, cell)(**options))
    assert ours == theirs


def bad_inputs(cell: str) -> dict[str, tuple[Any, ...]]:
    x = torch.randn(T, B, I, dtype=DOUBLE)

    def state(*shape: int, **options: Any) -> Any:
        one = torch.randn(*shape, dtype=DOUBLE, **options)
        return (one, one) if cell == "LSTM" else one

    return {
        "1-D": (x[0, 0],),
        "input size": (x[..., 1:],),
        "float32": (x.float(),),
        "no steps": (x[:0],),
        "hx of another batch": (x, state(1, B + 1, H)),
        "hx of another size": (x, state(1, B, H + 1)),
        "hx of more layers": (x, state(2, B, H)),
        "unbatched hx for a batch": (x, state(1, H)),
        "batched hx for one": (x[:, 0], state(1, 1, H)),
        "hx elsewhere": (x, state(1, B, H, device="meta")),
    }


@pytest.mark.parametrize("case", bad_inputs("GRU"))
def test_forward_errors_are_torchs(cell, case):
    theirs, ours = pair(cell)
    arguments = bad_inputs(cell)[case]
    assert error_of(lambda: ours(*arguments)) == error_of(lambda: theirs(*arguments))


def test_a_wrong_form_of_hx(cell):
    _, ours = pair(cell)
    wrong = torch.randn(1, B, H, dtype=DOUBLE)
    hx: Any = wrong if cell == "LSTM" else (wrong, wrong)
    with pytest.raises(TypeError, match=r"hx must be"):
        ours(torch.randn(T, B, I, dtype=DOUBLE), hx)


def test_representation_and_the_way_to_torch_and_back(cell):
    module = getattr(tpext.nn, cell)(I, H, 2, batch_first=True, rule=Backprop())
    assert str(module) == f"{cell}(3, 5, num_layers=2, batch_first=True, rule=Backprop())"
    plain = module.to_torch()
    assert type(plain) is getattr(nn, cell)
    assert all(plain.get_parameter(name) is p for name, p in module.named_parameters())
    back = tpext.nn.convert(nn.Sequential(plain), RegularizedInverse())[0]
    assert type(back) is getattr(tpext.nn, cell)
    assert all(back.get_parameter(name) is p for name, p in module.named_parameters())
    x = torch.randn(B, T, I)
    torch.testing.assert_close(back(x)[0], plain(x)[0])


def test_one_rule_serves_a_model_with_both_kinds_of_cells(cell):
    rule = RegularizedInverse(slope="derivative")
    model = tpext.nn.convert(nn.Sequential(nn.RNN(I, H), getattr(nn, cell)(I, H)), rule)
    x, gradients = torch.randn(T, B, I), []
    for each in (rule, RegularizedInverse()):
        model[1].rule = each
        model.zero_grad()
        model[1](x)[0].square().sum().backward()
        gradients.append(model[1].weight_hh_l0.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (RegularizedInverse(correction="difference"), r"correction='linearized'"),
        (RegularizedInverse(input_rule="target"), r"input_rule='gradient'"),
        (RegularizedInverse(margin=0.5), r"margin < 0\.5"),
        (
            RegularizedInverse(slope="one"),
            "slope of a rule has no effect here, where there is gate_slope and candidate_s",
        ),
        (RegularizedInverse(slope="derivative", gate_slope="one"), "slope of a rule has no effect here"),
        (RegularizedInverse(slope="derivative", inverse="cell", slope_reg=1.0), "slope of a rule has no effect here"),
        (RegularizedInverse(slope_reg=0.1), "slope_reg of a rule belongs to inverse='cell' and to slopes 'inverse'"),
        (SweepsItself(), r"SweepsItself is for the simple cell"),
    ],
    ids=["correction", "input_rule", "margin", "slope", "slopes", "inverse", "slope_reg", "a sweep of its own"],
)
def test_rules_that_do_not_serve_gates(cell, rule, text):
    with pytest.raises(ValueError, match=rf"{cell}: .*{text}"):
        getattr(tpext.nn, cell)(I, H, rule=rule)


def test_no_derivative_of_targets(cell):
    module = getattr(tpext.nn, cell)(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"rule=tpext\.Backprop\(\)"):
        torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"rule=tpext\.Backprop\(\)"):
        torch.func.grad(lambda x: module(x)[0].sum())(x.detach())


def test_nothing_is_kept_without_a_gradient(cell, monkeypatch):
    """Inference does not write the gates, which are four or five times the states."""
    kept = []
    op = tpext.rules.gated_call.gated_layer

    def watched(*arguments: Any) -> Any:
        kept.append(arguments[-1])
        return op(*arguments)

    monkeypatch.setattr(tpext.rules.gated_call, "gated_layer", watched)
    module = getattr(tpext.nn, cell)(I, H)
    for mode, expected in ((torch.inference_mode, False), (torch.no_grad, False), (torch.enable_grad, True)):
        with mode():
            module(torch.randn(T, B, I))
        assert kept.pop() is expected
    module.requires_grad_(False)(torch.randn(T, B, I))
    assert kept.pop() is False


def test_warns_where_credit_ends_between_parts(cell):
    module = getattr(tpext.nn, cell)(I, H)
    _, state = module(torch.randn(T, B, I))
    with pytest.warns(UserWarning, match=f"{cell}: hx comes of an earlier call") as caught:
        module(torch.randn(T, B, I), state)
    assert Path(caught[0].filename) == Path(__file__)


def test_autocast(cell):
    module = getattr(tpext.nn, cell)(I, H)
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = module(x.bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    expected = module(x.bfloat16().float())[0]
    torch.testing.assert_close(output, expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_projections(cell, with_lengths):
    if cell == "GRU":
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            tpext.nn.GRU(I, H, proj_size=2)
        return
    theirs, ours = pair(cell, num_layers=2, bidirectional=True, proj_size=2)
    if with_lengths:
        assert_same(results(ours, "padded", with_hx=True, lengths=LENGTHS), results(theirs, "packed", with_hx=True))
        with pytest.raises(ValueError, match="lengths must be at least 1 with proj_size"):
            ours(torch.randn(T, B, I, dtype=DOUBLE), None, torch.tensor([3, 6, 0, 4]))
        with pytest.raises(ValueError, match=rf"LSTM: lengths must lie in 0\.\.T={T}, got"):
            ours(torch.randn(T, B, I, dtype=DOUBLE), None, torch.tensor([3, T + 1, 1, 4]))
    else:
        assert_same(results(ours, "padded", with_hx=True), results(theirs, "padded", with_hx=True))
    assert str(ours.to_torch()) == str(theirs)
    with pytest.raises(ValueError, match=r"LSTM: proj_size needs rule=tpext\.Backprop\(\)"):
        tpext.nn.LSTM(I, H, proj_size=2)
    with pytest.raises(ValueError, match="LSTM: checkpoint_every needs proj_size=0, got proj_size=2"):
        tpext.nn.LSTM(I, H, proj_size=2, checkpoint_every=3, rule=Backprop())


def test_conversion_of_every_form(cell):
    for options in ({"bias": False}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 2}):
        if "proj_size" in options and cell == "GRU":
            continue
        theirs = getattr(nn, cell)(I, H, **options)
        ours = tpext.nn.convert(nn.Sequential(theirs), Backprop())[0]
        assert type(ours) is getattr(tpext.nn, cell)
        assert all(ours.get_parameter(name) is p for name, p in theirs.named_parameters())
        assert ("proj_size=2" in str(ours)) == ("proj_size" in options)
        torch.testing.assert_close(ours(torch.ones(T, B, I))[0], theirs(torch.ones(T, B, I))[0])


def test_states_with_a_weight_that_is_no_parameter(cell):
    module = getattr(tpext.nn, cell)(I, H)
    _, state = module(torch.randn(T, B, I))
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    module(torch.randn(T, B, I), state)[0].sum().backward()
    assert module.parametrizations.weight_hh_l0.original1.grad is not None


def test_the_cells_inverse_needs_a_ridge(cell):
    with pytest.raises(ValueError, match=r"slope_reg must be > 0 for inverse='cell', got 0\.0"):
        RegularizedInverse(inverse="cell")
    module = getattr(tpext.nn, cell)(I, H, rule=RegularizedInverse(inverse="cell", slope_reg=1e-3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(30)
    module(10 * torch.randn(T, B, I))[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
