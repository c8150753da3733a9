"""The rules in ``tpext.nn.RNN``: published gradients, their identities, the learned inverse, where credit ends."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rnn_cases import DOUBLE, LENGTHS, B, H, I, T
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import tpext
from tpext import Backprop, LearnedInverse, RegularizedInverse

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


@pytest.mark.parametrize("input_rule", ["gradient", "target"])
@pytest.mark.parametrize("slope", ["inverse", "one"])
def test_local_targets_at_unit_gain(slope, input_rule):
    reg, slope_reg = 0.7, 0.3 if slope == "inverse" else 0.0
    rule = RegularizedInverse(
        reg=reg, slope=slope, slope_reg=slope_reg, unit_gain=True, credit="local", input_rule=input_rule
    )
    rnn = tpext.nn.RNN(I, H, dtype=DOUBLE, rule=rule)
    x = torch.randn(T, B, I, dtype=DOUBLE, requires_grad=True)
    states, _ = rnn(x)
    gradient = torch.randn_like(states)
    states.backward(gradient)

    def inverse(weight: Tensor) -> Tensor:
        gram = weight.mT @ weight + reg * torch.eye(weight.shape[1], dtype=DOUBLE)
        return (1 + reg) * weight @ torch.linalg.inv(gram)

    weight, into = rnn.weight_hh_l0.detach(), rnn.weight_ih_l0.detach()
    slopes = 1 - states.detach() ** 2
    passed = (1 + slope_reg) * slopes / (slopes**2 + slope_reg) if slope == "inverse" else torch.ones_like(slopes)
    d, db, dx = torch.zeros(B, H, dtype=DOUBLE), torch.zeros(H, dtype=DOUBLE), torch.zeros_like(x)
    for t in reversed(range(T)):
        d = d - gradient[t]
        local = -d * slopes[t]
        db += local.sum(0)
        dx[t] = local @ into if input_rule == "gradient" else -(d * passed[t]) @ inverse(into)
        d = d * passed[t] @ inverse(weight)
    torch.testing.assert_close(rnn.bias_ih_l0.grad, db)
    torch.testing.assert_close(x.grad, dx)


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_unit_gain_tends_to_back_propagation(cell):
    """Under either credit, where the regularised inverse alone tends to no credit at all."""
    net = getattr(tpext.nn, cell)(I, H, bidirectional=True, dtype=DOUBLE, rule=Backprop())
    x = torch.randn(T, B, I, dtype=DOUBLE)

    def gradients() -> dict[str, Tensor]:
        net.zero_grad()
        torch.manual_seed(7)
        output, _ = net(x)
        output.backward(torch.randn_like(output))
        return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}

    exact = gradients()
    regs = {"reg": (1e12, 2e12), **({"slope_reg": (1e12, 2e12)} if cell == "RNN" else {})}
    net.rule = RegularizedInverse(credit="local", unit_gain=True, **regs)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("RNN", {"unit_gain": "no"}, "unit_gain must be True or False, got 'no'"),
        ("RNN", {"correction": "difference"}, "unit_gain needs correction='linearized', got correction='difference'"),
        ("GRU", {"inverse": "cell", "slope_reg": 1.0}, "unit_gain of a rule needs inverse='branch' and slopes"),
        ("LSTM", {"candidate_slope": "one"}, "unit_gain of a rule needs inverse='branch' and slopes 'derivative'"),
    ],
)
def test_unit_gain_where_it_has_no_meaning_is_named(cell, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(tpext.nn, cell)(I, H, rule=RegularizedInverse(**{"unit_gain": True, **options}))


@pytest.mark.parametrize("slope", ["derivative", "one"])
def test_slope_reg_without_inverse_slopes_is_named(slope):
    with pytest.raises(ValueError, match="RNN: slope_reg of a rule belongs to slope='inverse', got "):
        tpext.nn.RNN(I, H, rule=RegularizedInverse(slope=slope, slope_reg=1.0))


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
                "unit_gain": True,
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


@pytest.mark.parametrize("options", [{"gate_slope": "one"}, {"candidate_slope": "inverse"}], ids=str)
def test_slopes_of_gates_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^RNN: {name} of a rule has no effect here, where there is slope, got"):
        tpext.nn.RNN(I, H, rule=RegularizedInverse(**options))


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
