"""The long short-term memory: ``torch.nn.LSTM``'s interface, with a rule for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tpext.nn.gated import GatedLayers
from tpext.nn.recurrent_parameters import check_replaceable, sharing_parameters
from tpext.rules import RecurrentRule


class LSTM(GatedLayers):
    r"""Long short-term memory with ``torch.nn.LSTM``'s interface, trained by the given rule.

    With the logistic function ``s`` and elementwise products::

        i_t, f_t, o_t = s(x_t W_i.^T + b_i. + h_{t-1} W_h.^T + b_h.)        of the gates i, f, o
        g_t = tanh(x_t W_ig^T + b_ig + h_{t-1} W_hg^T + b_hg)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t)

    The forward pass is ``torch.nn.LSTM``'s. The rule decides what ``backward()`` computes: ``rule=tpext.Backprop()`` is
    back-propagation through time, with exact second derivatives; :class:`tpext.RegularizedInverse` (the default) says
    what it is for gates; the pair ``(h, c)`` carries the target. Signature, parameter names, ``state_dict`` keys,
    initialisation (the same seed gives the same weights), shapes and errors are those of ``torch.nn.LSTM``; with
    ``Backprop()`` so are outputs and gradients, to rounding. What differs from torch's module is as
    :class:`tpext.nn.RNN` says of its own.

    Args:
        input_size: features I of the input, >= 1.
        hidden_size: units H of each layer and direction, >= 1.
        num_layers: layers, >= 1; each above the first reads the outputs of the one below.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: True takes and gives ``[B, T, ...]`` in place of ``[T, B, ...]`` (not for states).
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: True adds a second set of weights per layer that runs backwards in time.
        proj_size: P < H: ``h_t`` is projected to P features, ``h_t W_hr^T``. Only under ``Backprop()``, where such a
            layer is torch's own, without ``checkpoint_every``; ``lengths`` are packed then, which the compiler cannot
            take in one graph.
        device, dtype: of the parameters; float32 or float64.
        rule: what the backward pass computes; None means ``RegularizedInverse()``.
        return_sequence, checkpoint_every: as of :class:`tpext.nn.RNN`. With ``checkpoint_every`` the gates, five times
            the states, are kept of K steps only.

    Attributes:
        weight_ih_l[k], weight_hh_l[k], bias_ih_l[k], bias_hh_l[k]: of layer k, with ``_reverse`` appended for the
            second direction: ``[4H, I or D*H]``, ``[4H, H]``, ``[4H]``, ``[4H]``, the gates in the order i, f, g, o;
            drawn uniformly in ``+-1/sqrt(H)``.
        weight_hr_l[k]: ``[P, H]``, with ``proj_size``.

    Raises:
        ValueError, TypeError: as ``torch.nn.LSTM`` for the same argument; ``ValueError`` for a rule that does not serve
            a cell with gates, or a projection.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, with the forget gate of Gers et al., 2000.

    >>> import torch, tpext
    >>> lstm = tpext.nn.LSTM(10, 20, num_layers=2, rule=tpext.Backprop())
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
    >>> output.square().mean().backward()
    >>> lstm.weight_hh_l0.grad.shape
    torch.Size([80, 20])
    """

    _kind = "LSTM"
    _made_with = (*GatedLayers._made_with, "proj_size")
    _cell = "lstm"
    gates = 4
    _kinds_of_state = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        rule: RecurrentRule | None = None,
        return_sequence: bool = True,
        checkpoint_every: int | None = None,
        **unsupported: object,
    ) -> None:
        self._refuse(unsupported)
        self._check_projection(proj_size, hidden_size)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            rule,
            return_sequence,
            checkpoint_every,
            proj_size,
        )

    @staticmethod
    def _check_projection(proj_size: object, hidden_size: object) -> None:
        if not isinstance(proj_size, int) or isinstance(proj_size, bool):
            raise TypeError(f"proj_size should be of type int, got: {type(proj_size).__name__}")
        if proj_size < 0:
            raise ValueError("proj_size should be a positive integer or zero to disable projections")
        if isinstance(hidden_size, int) and proj_size >= max(hidden_size, 1):
            raise ValueError("proj_size has to be smaller than hidden_size")

    def _check_checkpointing(self) -> None:
        super()._check_checkpointing()
        if self.checkpoint_every is not None and self.proj_size > 0:
            raise ValueError(f"LSTM: checkpoint_every needs proj_size=0, got proj_size={self.proj_size}")

    def _run(
        self, input: Tensor, states: tuple[Tensor, ...] | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return super()._run(input, states, lengths) if self.proj_size == 0 else self._project(input, states, lengths)

    def _project(
        self, input: Tensor, states: tuple[Tensor, ...] | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layers with projections, by torch."""
        if states is None:
            sizes = (self.output_size, self.hidden_size)
            states = tuple(input.new_zeros(len(self._all_weights), input.size(1), size) for size in sizes)
        weights: list[Tensor] = [weight for member in self.all_weights for weight in member]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if lengths is None:
            output, *final = torch.lstm(input, states, weights, *options, False)
            return output, tuple(final)
        if not bool((lengths > 0).all()):
            raise ValueError(f"LSTM: lengths must be at least 1 with proj_size, got {lengths.tolist()}")
        packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        assert order is not None
        assert back is not None
        sorted_states = tuple(state.index_select(1, order) for state in states)
        data, *final = torch.lstm(packed.data, packed.batch_sizes, sorted_states, weights, *options)
        output, _ = pad_packed_sequence(packed._replace(data=data), total_length=input.size(0))
        return output, tuple(state.index_select(1, back) for state in final)

    def to_torch(self) -> nn.LSTM:
        """Return a ``torch.nn.LSTM`` that shares the parameters, for export or inference elsewhere.

        Raises:
            ValueError: this module carries hooks, parametrized or pruned weights, or members of its own, which the
                plain module would lose.

        >>> import tpext
        >>> tpext.nn.LSTM(3, 4, batch_first=True).to_torch()
        LSTM(3, 4, batch_first=True)
        """
        check_replaceable(self, "LSTM.to_torch: the module")
        return sharing_parameters(self, nn.LSTM, self._made_with)

    @overload
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, lengths: None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the network over a batch of sequences; arguments, results and errors are :meth:`tpext.nn.RNN.forward`'s.

        Args:
            input: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]`` for a single sequence, or a
                ``PackedSequence``.
            hx: initial states ``(h_0, c_0)``, ``[num_layers * D, B, H]`` each (``h_0`` of a projection ``[.., P]``);
                None means zeros.
            lengths: ``[B]`` integers, a tensor or a list: the valid steps of each row of a padded batch; None: all T.

        Returns:
            ``output [T, B, D*H]``, or None with ``return_sequence=False``, and ``(h_n, c_n)``,
            ``[num_layers * D, B, H]`` each.
        """
        if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            got = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"LSTM: hx must be a pair (h_0, c_0) of tensors, got {got}")
        output, (h_n, c_n) = self._forward(input, None if hx is None else tuple(hx), lengths)
        return output, (h_n, c_n)  # type: ignore[return-value]
