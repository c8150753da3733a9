"""What every recurrent network shares: it runs layer by layer, the rule's backward pass in each.

The layer loop is Python; each layer is one call forward and one backward, both directions in one through the leading
stack axis S of the ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from tpext._warnings import warn_user
from tpext.nn.recurrent_input import as_given, check_device, time_major
from tpext.nn.recurrent_parameters import RecurrentParameters
from tpext.nn.torchscript import refuse_script, refuse_trace
from tpext.ops._library import full_precision
from tpext.rules import GatedCall, RecurrentCall, RecurrentRule
from tpext.rules.recurrent_pass import comes_of_a_pass


class RecurrentLayers(RecurrentParameters):
    """Layers and directions of a recurrent cell, with the interface of ``torch.nn``'s recurrent modules.

    A subclass is one cell: it has the constructor and the docstrings of torch's module, hands the arguments on, and
    says what a layer is to the rule (:meth:`_call`). Between them states are a tuple: ``(h,)``, or ``(h, c)`` for a
    cell of two.
    """

    def _call(
        self,
        members: Sequence[RecurrentLayers],
        layer: int,
        input: Tensor,
        starts: Sequence[Tensor],
        lengths: Tensor | None,
    ) -> RecurrentCall | GatedCall:
        """One layer of this module, or of all members of an ensemble that are like it.

        Args:
            members: the modules whose parameters it has, this one alone or those of the ensemble.
            layer: its number.
            input: ``[S or 1, T, B, I]``; S is the number of members times that of directions.
            starts: the initial states, ``[S, B, H]`` each.
            lengths: ``[B]`` or None.
        """
        raise NotImplementedError

    __prepare_scriptable__ = refuse_script

    def _forward(
        self, input: Tensor | PackedSequence, states: tuple[Tensor, ...] | None, lengths: Tensor | Sequence[int] | None
    ) -> tuple[Tensor | PackedSequence | None, tuple[Tensor, ...]]:
        """What ``forward`` does: outputs (None unless wanted) and final states, in the form of the input."""
        refuse_trace(self)
        self._check_checkpointing()
        self._warn_of_lost_credit(states)
        output, finals = self._run(*time_major(self, input, states, lengths))
        return as_given(self, input, output, finals)

    def _warn_of_lost_credit(self, states: tuple[Tensor, ...] | None) -> None:
        """Warn where a sequence is fed in parts, with the graph, under a credit that ends with each part."""
        if states is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self._rule.credit != "through_time":
            return
        given = [state for state in states if isinstance(state, Tensor) and state.grad_fn is not None]
        # of a parametrized or pruned weight nothing says in a graph whose it is
        if any(comes_of_a_pass(state, self._parameters.get("weight_hh_l0")) for state in given):
            warn_user(
                f"{self._kind}: hx comes of an earlier call of this layer, with its graph. Under credit='through_time' "
                "the credit of a call ends at its hx, so the earlier call's steps learn of this one through its "
                "displacements alone. Run the sequence in one call (checkpoint_every bounds the memory), detach hx, or "
                "use credit='local', whose parts add up."
            )

    def _parameters_of(self, names: Sequence[Sequence[str]], layer: int, input: Tensor) -> list[list[Tensor]]:
        """Those of a layer, a list each direction; ``names``: ``_all_weights`` or ``_owned_names``."""
        directions = len(self._reverse)
        members = []
        for of_member in names[layer * directions : (layer + 1) * directions]:
            parameters = [getattr(self, name) for name in of_member]
            for parameter in parameters:
                check_device("parameter", parameter, input)
            members.append(parameters)
        return members

    def _initial_states(self, states: tuple[Tensor, ...] | None, rows: Tensor) -> Sequence[tuple[Tensor, ...]]:
        """The initial states of each layer, ``[D, B, H]`` of each kind, for rows ``[T, B, I]``."""
        if states is None:
            return zero_states(self, rows, 1)
        if self.num_layers == 1:
            return [states]
        return list(zip(*(torch.split(state, len(self._reverse)) for state in states), strict=True))

    def _run(
        self, input: Tensor, states: tuple[Tensor, ...] | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all layers: the outputs ``[T, B, D*H]`` of the last, if wanted, and the final states ``[L*D, B, H]``."""
        starts = self._initial_states(states, input)
        output, finals = run_members([self], self._rule, input.unsqueeze(0), starts, lengths)
        return output.squeeze(0), tuple(kind[0] if len(kind) == 1 else torch.cat(kind) for kind in finals)

    def _has_readers(self, layer: int) -> bool:
        """Whether anything reads the outputs of a layer: the layer above, or the user."""
        return self.return_sequence or layer + 1 < self.num_layers

    def _between_layers(self, output: Tensor) -> Tensor:
        return functional.dropout(output, self.dropout) if self.training and self.dropout > 0 else output

    def reconstruction_loss(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, ...] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        noise: float | None = None,
    ) -> Tensor:
        """Loss that trains the reverse layers of :class:`tpext.LearnedInverse`, of an RNN or a GRU.

        ``1/(2B) sum_t ||G(x_t, f(x_t, h_{t-1} + n_t)) - (h_{t-1} + n_t)||^2``, summed over layers and directions, with
        a step ``f`` of the layer, its reverse ``G(x, h) = tanh(h V^T + c + x U^T)`` and Gaussian noise ``n_t``, drawn
        anew for each entry. Only ``V`` and ``c`` receive gradients. Call it, and step an optimizer of the reverse
        parameters, before the target pass of the same batch. Steps beyond ``lengths`` do not count. Computed in the
        parameters' dtype, autocast or not. Under ``DistributedDataParallel`` call it inside the wrapped module's
        ``forward``: see :class:`tpext.LearnedInverse`.

        Args:
            input, hx, lengths: as in the forward pass.
            noise: standard deviation of ``n_t``, >= 0; None means the rule's.

        Returns:
            The scalar loss.

        Raises:
            RuntimeError: the rule is not ``LearnedInverse``; else as the forward pass.
            ValueError: noise is not a finite number >= 0; else as the forward pass.

        Cost: two forward passes, the second of all steps at once, and a product (with the backward pass 2) of ``T*B``
        rows with an ``H x H`` matrix, beside the input's projection.

        Source: Lee et al., "Difference Target Propagation", 2015, equation 13; Manchev and Spratling, JMLR 21(7), 2020.

        >>> import torch, tpext
        >>> rnn = tpext.nn.RNN(3, 4, rule=tpext.LearnedInverse(noise=0.1))
        >>> rnn.reconstruction_loss(torch.randn(7, 2, 3)).backward()
        >>> rnn.reverse_weight_hh_l0.grad.shape, rnn.weight_hh_l0.grad
        (torch.Size([4, 4]), None)
        """
        given = hx if hx is None or isinstance(hx, tuple) else (hx,)
        rows, states, lengths = time_major(self, input, given, lengths)
        dtype = self.weight_ih_l0.dtype
        states = None if states is None else tuple(state.to(dtype) for state in states)
        with full_precision(rows.device.type):
            rows = rows.to(dtype)
            starts = self._initial_states(states, rows)
            return loss_of_members([self], self._rule, rows.unsqueeze(0), starts, lengths, noise)

    def extra_repr(self) -> str:
        """Sizes, every option that differs from its default, and the rule, which tells it from torch.nn's."""
        parts = [str(self.input_size), str(self.hidden_size)]
        options: dict[str, object] = {
            "num_layers": 1,
            "nonlinearity": "tanh",
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "proj_size": 0,
            "return_sequence": True,
            "checkpoint_every": None,
        }
        for name, default in options.items():
            # a cell with gates has no nonlinearity to choose
            value = getattr(self, name, default)
            if value != default:
                parts.append(f"{name}={value}")
        return ", ".join([*parts, f"rule={self._rule}"])


def zero_states(layers: RecurrentLayers, rows: Tensor, count: int) -> list[tuple[Tensor, ...]]:
    """Initial states of zeros, ``[count*D, B, H]`` of each kind, of each layer, for rows ``[..., B, I]``."""
    # each of its own: the compiler refuses a node that gets a tensor twice
    shape = (count * len(layers._reverse), rows.size(-2), layers.hidden_size)
    return [tuple(rows.new_zeros(shape) for _ in range(layers._kinds_of_state))] * layers.num_layers


def run_members(
    members: Sequence[RecurrentLayers],
    rule: RecurrentRule,
    input: Tensor,
    starts: Sequence[Sequence[Tensor]],
    lengths: Tensor | None,
) -> tuple[Tensor, Iterator[tuple[Tensor, ...]]]:
    """Run modules that are alike in one call a layer, N of them with D directions each.

    Args:
        members: the modules.
        rule: of all of them together.
        input: ``[N or 1, T, B, I]``, of each or shared by all.
        starts: of each layer the initial states, ``[N*D, B, H]`` of each kind.
        lengths: ``[B]`` or None.

    Returns:
        The last layer's outputs ``[N, T, B, D*H]``, if they are wanted, and of each kind of state the final ones of
        each layer, ``[N*D, B, H]``.
    """
    first, output, finals = members[0], input, []
    for layer, start in enumerate(starts):
        if layer > 0:
            output = first._between_layers(output)
        call = first._call(members, layer, for_directions(output, first), start, lengths)
        states, *last = rule.run_recurrent(call)
        output = join_directions(states, len(members)) if first._has_readers(layer) else states
        finals.append(last)
    return output, zip(*finals, strict=True)


def loss_of_members(
    members: Sequence[RecurrentLayers],
    rule: RecurrentRule,
    input: Tensor,
    starts: Sequence[Sequence[Tensor]],
    lengths: Tensor | None,
    noise: float | None,
) -> Tensor:
    """The sum of the members' losses of their reverse layers; arguments as those of :func:`run_members`."""
    first, output, loss = members[0], input, input.new_zeros(())
    for layer, start in enumerate(starts):
        with torch.no_grad():
            output = first._between_layers(output) if layer > 0 else output
        call = first._call(members, layer, for_directions(output, first), start, lengths)
        of_layer, reached = rule.recurrent_loss(call, noise)
        loss = loss + of_layer
        output = join_directions(reached, len(members))
    return loss / max(input.size(2), 1)


def parameters_of(members: Sequence[RecurrentLayers], layer: int, input: Tensor) -> list[list[Tensor]]:
    """Those of a layer that torch's module has too, a list for each member and direction."""
    return [weights for one in members for weights in one._parameters_of(one._all_weights, layer, input)]


def owned_parameters(members: Sequence[RecurrentLayers], layer: int, input: Tensor) -> tuple[Tensor, ...]:
    """The rule's own parameters of one layer, stacked ``[S, ...]``."""
    return stack_members([own for one in members for own in one._parameters_of(one._owned_names, layer, input)])


def reverse_of(members: Sequence[RecurrentLayers]) -> list[bool]:
    """Whether the member of the stack runs backwards."""
    return [backwards for one in members for backwards in one._reverse]


def stack_members(members: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Tensors of each direction side by side, ``[S, ...]`` each."""
    if len(members) == 1:
        return tuple(tensor.unsqueeze(0) for tensor in members[0])
    return tuple(map(torch.stack, zip(*members, strict=True)))


def for_directions(rows: Tensor, layers: RecurrentLayers) -> Tensor:
    """``[N or 1, T, B, I]`` for the stack of N members with the directions of ``layers``."""
    directions = len(layers._reverse)
    return rows if rows.size(0) == 1 or directions == 1 else rows.repeat_interleave(directions, 0)


def join_directions(states: Tensor, count: int) -> Tensor:
    """``[N*D, T, B, H] -> [N, T, B, D*H]``, N the count of members."""
    if states.size(0) == count:
        return states
    return states.view(count, states.size(0) // count, *states.shape[1:]).permute(0, 2, 3, 1, 4).flatten(3)
