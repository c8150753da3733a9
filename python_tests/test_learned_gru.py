"""``LearnedInverse`` on a GRU: against its oracle, the loss of its reverse layer, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tpext
from tpext import reference

T, B, I, H = 6, 3, 2, 4  # noqa: E741
DOUBLE = torch.float64
LENGTHS = torch.tensor([6, 0, 3])
STEMS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def gru(directions: int, dtype: torch.dtype = DOUBLE, **rule: Any) -> tpext.nn.GRU:
    module = tpext.nn.GRU(I, H, bidirectional=directions == 2, dtype=dtype, rule=tpext.LearnedInverse(**rule))
    for name in module.owned_names:
        torch.nn.init.normal_(getattr(module, name), std=0.5)
    return module


def stacked(module: tpext.nn.GRU, stem: str) -> np.ndarray:
    members = [parameter for name, parameter in module.named_parameters() if name.startswith(stem)]
    return torch.stack(members).detach().numpy()


@pytest.mark.parametrize("credit", ["local", "through_time"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
@pytest.mark.parametrize("checkpoint_every", [None, 4])
def test_gradients_are_the_oracle_s(credit, directions, lengths, checkpoint_every):
    module = gru(directions, credit=credit, target_step=0.3)
    module.checkpoint_every = checkpoint_every
    x, h0 = torch.randn(T, B, I, dtype=DOUBLE), torch.randn(directions, B, H, dtype=DOUBLE)
    g = torch.randn(T, B, directions * H, dtype=DOUBLE)
    if lengths is not None:
        x[torch.arange(T)[:, None] >= lengths] = torch.nan
    x.requires_grad_()
    h0.requires_grad_()
    module(x, h0, lengths)[0].mul(g).sum().backward()

    expected = reference.gru_learned_gradients(
        g.view(T, B, directions, H).permute(2, 0, 1, 3).numpy(),
        x.detach().unsqueeze(0).numpy(),
        h0.detach().numpy(),
        *(stacked(module, stem) for stem in (*STEMS, "reverse_weight", "reverse_bias")),
        None if lengths is None else lengths.numpy(),
        [False, True][:directions],
        credit,
        0.3,
    )
    found: dict[str, Any] = {"input": x.grad.unsqueeze(0), "h0": h0.grad}
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == name.startswith("reverse")
        if parameter.grad is not None:
            found.setdefault(name.rsplit("_l", 1)[0], []).append(parameter.grad)
    assert set(found) == set(expected)
    for name, value in found.items():
        value = torch.stack(value) if isinstance(value, list) else value
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
def test_the_reverse_layer_s_loss(lengths):
    module = gru(2)
    x, h0 = torch.randn(T, B, I, dtype=DOUBLE), torch.randn(2, B, H, dtype=DOUBLE)
    loss = module.reconstruction_loss(x, h0, lengths, noise=0.0)
    expected = torch.zeros((), dtype=DOUBLE)
    for member, suffix in enumerate(("_l0", "_l0_reverse")):
        weights = [getattr(module, stem + suffix) for stem in STEMS]
        V, c = (getattr(module, stem + suffix) for stem in ("reverse_weight_hh", "reverse_bias"))
        for b in range(B):
            steps = range(T if lengths is None else int(lengths[b]))
            h = h0[member, b : b + 1]
            for t in reversed(steps) if member else steps:
                row = x[t, b : b + 1]
                reached = torch.gru_cell(row, h, *weights).detach()
                rebuilt = torch.tanh(reached @ V.T + c + row @ weights[0].detach()[2 * H :].T)
                expected = expected + (rebuilt - h).square().sum() / (2 * B)
                h = reached
    torch.testing.assert_close(loss, expected)
    owned = [getattr(module, name) for name in module.owned_names]
    loss.backward()
    for parameter, gradient in zip(owned, torch.autograd.grad(expected, owned), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.grad is None for name, p in module.named_parameters() if name not in module.owned_names)


def test_the_reverse_layer_learns():
    module = tpext.nn.GRU(I, H, rule=tpext.LearnedInverse(noise=0.1))
    optimizer = torch.optim.Adam([getattr(module, name) for name in module.owned_names], lr=0.02)
    x = torch.randn(T, 16, I)
    before = module.reconstruction_loss(x, noise=0.0).item()
    for _ in range(100):
        optimizer.zero_grad()
        module.reconstruction_loss(x).backward()
        optimizer.step()
    assert module.reconstruction_loss(x, noise=0.0).item() < 0.5 * before


def test_it_compiles_whole():
    module = gru(2, dtype=torch.float32)
    x = torch.randn(T, B, I)

    def gradients(run: Any, loss: Any) -> list[Tensor]:
        module.zero_grad()
        (run(x, None, LENGTHS)[0].square().mean() + loss(x, None, LENGTHS)).backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    compiled = [torch.compile(one, fullgraph=True, backend="aot_eager") for one in (module, module.reconstruction_loss)]
    for found, eager in zip(gradients(*compiled), gradients(module, module.reconstruction_loss), strict=True):
        torch.testing.assert_close(found, eager)


def test_a_cell_of_two_states_is_refused():
    with pytest.raises(ValueError, match="LSTM: rule=LearnedInverse has a reverse layer of h, which says nothing of c"):
        tpext.nn.LSTM(I, H, rule=tpext.LearnedInverse())
    with pytest.raises(RuntimeError, match=r"reconstruction_loss needs rule=tpext\.LearnedInverse"):
        tpext.nn.LSTM(I, H).reconstruction_loss(torch.randn(T, B, I))
