"""Recurrent networks of one shape, run together: a call of all of them for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tpext.nn.recurrent import RecurrentLayers, loss_of_members, run_members, zero_states
from tpext.nn.recurrent_input import time_major
from tpext.nn.torchscript import refuse_script, refuse_trace
from tpext.ops._library import check_tensor, full_precision
from tpext.rules import RecurrentRule
from tpext.rules.base import joined

_ALIKE = (
    *(
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    ),
    *("return_sequence", "checkpoint_every", "training", "dtype"),
)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Ensemble(nn.Module):
    r"""N recurrent networks of one shape that run together, each layer of all of them in one call of the kernels.

    Many small networks, the runs of a search say, take less time together than one after another: a call has a fixed
    cost, and a small network leaves cores and vector units idle. Each member stays a module of its own, with its
    weights, its rule, its optimizer and its ``state_dict``. It receives the outputs and gradients that a call of its
    own would give it (with ``dropout`` the random draws are others). On the CPU they are the same to the bit, except
    where torch's products take part (``correction="none"``, :class:`tpext.LearnedInverse`, a rule of your own that
    has some), under autocast with two directions, and where members differ in which of their parameters are
    trainable (all or none apart).

    ``h^n_t = a(x^n_t U_n' + b_n + h^n_{t-1} W_n')``, ``n = 1..N``

    A layer's weights are stacked in each call, ``[N*D, ...]``, D directions; that is a copy of the parameters.

    Args:
        members: the networks, all :class:`tpext.nn.RNN`, all :class:`tpext.nn.GRU` or all :class:`tpext.nn.LSTM`, of
            one shape, dtype, device and set of options. Their rules may differ in numbers (``reg``, ``target_step``,
            ``slope_reg``, ``margin``; what a rule annotates :data:`tpext.rules.PerMember`).

    Attributes:
        members: ``torch.nn.ModuleList`` of the networks; parameters are ``members.0.weight_hh_l0`` and so on.

    Raises:
        TypeError: a member is not such a network.
        ValueError: there is none; they differ in more than weights and numbers of rules; an LSTM has projections; one
            has hooks.

    >>> import torch, tpext
    >>> regs = (0.1, 1.0, 10.0)
    >>> ensemble = Ensemble(tpext.nn.RNN(2, 8, rule=tpext.RegularizedInverse(reg=reg)) for reg in regs)
    >>> output, h_n = ensemble(torch.randn(5, 4, 2))  # one batch for all; or one of each, [3, 5, 4, 2]
    >>> output.shape, h_n.shape
    (torch.Size([3, 5, 4, 8]), torch.Size([3, 1, 4, 8]))
    >>> losses = h_n.square().mean((1, 2, 3))  # of each member
    >>> losses.sum().backward()  # gradients of each are those of its own loss
    >>> ensemble.members[2].weight_hh_l0.grad.shape
    torch.Size([8, 8])
    """

    __prepare_scriptable__ = refuse_script

    members: nn.ModuleList

    def __init__(self, members: Iterable[RecurrentLayers]) -> None:
        super().__init__()
        given = list(members)
        if not given:
            raise ValueError("Ensemble: members must be at least one network, got none")
        for member in given:
            if not isinstance(member, RecurrentLayers):
                raise TypeError(f"Ensemble: members must be tpext.nn.RNN, GRU or LSTM, got {type(member).__name__}")
        if len({id(member) for member in given}) < len(given):
            raise ValueError("Ensemble: members must be different modules, got one of them twice")
        self.members = nn.ModuleList(given)
        self._joined: tuple[list[RecurrentRule], RecurrentRule] | None = None
        self._check_alike()
        self._rule()

    def _check_alike(self) -> None:
        first, *others = self._layers()
        first._check_checkpointing()
        if first.proj_size > 0:
            raise ValueError(f"Ensemble: proj_size of members must be 0, got {first.proj_size}")
        for other in others:
            for name, own, theirs in zip(_ALIKE, _options(first), _options(other), strict=True):
                if own != theirs:
                    raise ValueError(
                        f"Ensemble: members must be alike, got {name}={own!r} of the first and {theirs!r} of another"
                    )
        for member in self._layers():
            hooks = [name for name in _HOOKS if getattr(member, name)]
            # among them those by which torch.nn.utils.prune makes the weight
            if hooks:
                raise ValueError(
                    f"Ensemble: members must have no hooks, as their own forward is not called, got {', '.join(hooks)}"
                )

    def _layers(self) -> list[RecurrentLayers]:
        return list(self.members)  # type: ignore[arg-type]

    def _rule(self) -> RecurrentRule:
        """The members' rules in one, made anew when one of them has changed."""
        rules = [member.rule for member in self._layers()]
        before = [] if self._joined is None else self._joined[0]
        if len(rules) != len(before) or any(one is not other for one, other in zip(rules, before, strict=True)):
            try:
                self._joined = rules, joined(rules, len(self._layers()[0]._reverse))
            except ValueError as error:
                raise ValueError(f"Ensemble: {error}") from None
        assert self._joined is not None
        return self._joined[1]

    def forward(
        self,
        input: Tensor,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | None, Tensor | tuple[Tensor, Tensor]]:
        """Run the networks.

        Args:
            input: ``[T, B, I]`` for all members, or ``[N, T, B, I]``, of each its own; with ``batch_first``
                ``[B, T, I]`` or ``[N, B, T, I]``. The parameters' dtype, or any floating one under autocast. To the
                gradient of a shared input every member adds.
            hx: initial states ``[N, num_layers * D, B, H]``, for LSTMs a pair of these; None means zeros.
            lengths: ``[B]`` integers, a tensor or a list, 0..T: the valid steps of each row, the same for all members;
                None: all T.

        Returns:
            ``output [N, T, B, D*H]`` (batch first ``[N, B, T, D*H]``), None with ``return_sequence=False``, and
            ``h_n [N, num_layers * D, B, H]``, for LSTMs the pair ``(h_n, c_n)``.

        Raises:
            ValueError, TypeError, RuntimeError: as the members' ``forward`` for the same argument; members that are no
                longer alike; ``backward()`` as theirs.
        """
        refuse_trace(self)
        self._check_alike()
        layers = self._layers()
        given = None if hx is None else hx if isinstance(hx, tuple) else (hx,)
        layers[0]._warn_of_lost_credit(given)
        rows, starts, lengths = self._time_major(input, given, lengths)
        output, finals = run_members(layers, self._rule(), rows, starts, lengths)
        shape = (len(layers), len(layers[0]._reverse))
        final = tuple(
            torch.cat([of_layer.view(*shape, *of_layer.shape[1:]) for of_layer in kind], 1) for kind in finals
        )
        output = output.transpose(1, 2) if layers[0].batch_first and layers[0].return_sequence else output
        return output if layers[0].return_sequence else None, final[0] if len(final) == 1 else final  # type: ignore[return-value]

    def reconstruction_loss(
        self,
        input: Tensor,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        noise: float | None = None,
    ) -> Tensor:
        """The sum of the members' losses of their reverse layers: see :meth:`tpext.nn.RNN.reconstruction_loss`.

        Arguments as those of ``forward``. Each member's reverse parameters receive the gradient of its own loss; the
        random draws of noise are not those of its own call.
        """
        self._check_alike()
        layers = self._layers()
        given = None if hx is None else hx if isinstance(hx, tuple) else (hx,)
        rows, starts, lengths = self._time_major(input, given, lengths)
        dtype = layers[0].weight_ih_l0.dtype
        with full_precision(rows.device.type):
            starts = [tuple(state.to(dtype) for state in of_layer) for of_layer in starts]
            return loss_of_members(layers, self._rule(), rows.to(dtype), starts, lengths, noise)

    def _time_major(
        self, input: Tensor, states: tuple[Tensor, ...] | None, lengths: Tensor | Sequence[int] | None
    ) -> tuple[Tensor, Sequence[tuple[Tensor, ...]], Tensor | None]:
        """Rows ``[N or 1, T, B, I]``, each layer's initial states ``[N*D, B, H]``, and the lengths; checked."""
        first, count = self._layers()[0], len(self.members)
        shapes = "[B, T, I] or [N, B, T, I]" if first.batch_first else "[T, B, I] or [N, T, B, I]"
        check_tensor("Ensemble", "input", input, f"{shapes}, N={count}")
        if input.dim() not in (3, 4) or (input.dim() == 4 and input.size(0) != count):
            raise ValueError(f"Ensemble: input must be {shapes}, N={count}, got {list(input.shape)}")
        if states is not None and len(states) != first._kinds_of_state:
            expected = "a tensor" if first._kinds_of_state == 1 else "a pair (h_0, c_0) of tensors"
            raise TypeError(f"Ensemble: hx must be {expected}, got {len(states)}")
        for state in states or ():
            check_tensor("Ensemble", "hx", state, "[N, num_layers * D, B, H]")
            if state.dim() != 4 or state.size(0) != count:
                raise ValueError(f"Ensemble: hx must be [N={count}, num_layers * D, B, H], got {list(state.shape)}")
        # what one member says of its part goes for all: they are alike, and so are the parts of a tensor
        of_first = input if input.dim() == 3 else input[0]
        own = None if states is None else tuple(state[0] for state in states)
        rows, _, lengths = time_major(first, of_first, own, lengths)
        of_all = input.transpose(1, 2) if first.batch_first else input
        rows = of_all if input.dim() == 4 else rows.unsqueeze(0)
        if states is None:
            return rows, zero_states(first, rows, count), lengths
        directions = len(first._reverse)
        split = [[part.flatten(0, 1) for part in torch.split(state, directions, 1)] for state in states]
        return rows, list(zip(*split, strict=True)), lengths


def _options(layers: RecurrentLayers) -> list[object]:
    """What members have in common, in the order of ``_ALIKE``."""
    return [*(getattr(layers, name) for name in _ALIKE[:-1]), layers.weight_ih_l0.dtype]
