"""The gated recurrent unit: ``torch.nn.GRU``'s interface, with a rule for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tpext.nn.gated import GatedLayers
from tpext.nn.recurrent_parameters import check_replaceable, sharing_parameters
from tpext.rules import RecurrentRule


class GRU(GatedLayers):
    r"""Gated recurrent unit with ``torch.nn.GRU``'s interface, trained by the given rule.

    With the logistic function ``s`` and elementwise products::

        r_t = s(x_t W_ir^T + b_ir + h_{t-1} W_hr^T + b_hr)
        z_t = s(x_t W_iz^T + b_iz + h_{t-1} W_hz^T + b_hz)
        n_t = tanh(x_t W_in^T + b_in + r_t * (h_{t-1} W_hn^T + b_hn))
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    The forward pass is ``torch.nn.GRU``'s. The rule decides what ``backward()`` computes: ``rule=tpext.Backprop()`` is
    back-propagation through time, with exact second derivatives; :class:`tpext.RegularizedInverse` (the default) says
    what it is for gates. Signature, parameter names, ``state_dict`` keys, initialisation (the same seed gives the same
    weights), shapes and errors are those of ``torch.nn.GRU``; with ``Backprop()`` so are outputs and gradients, to
    rounding. What differs from torch's module is as :class:`tpext.nn.RNN` says of its own.

    Args:
        input_size: features I of the input, >= 1.
        hidden_size: units H of each layer and direction, >= 1.
        num_layers: layers, >= 1; each above the first reads the outputs of the one below.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: True takes and gives ``[B, T, ...]`` in place of ``[T, B, ...]`` (not for ``hx`` and ``h_n``).
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: True adds a second set of weights per layer that runs backwards in time.
        device, dtype: of the parameters; float32 or float64.
        rule: what the backward pass computes; None means ``RegularizedInverse()``.
        return_sequence, checkpoint_every: as of :class:`tpext.nn.RNN`. With ``checkpoint_every`` the gates, four times
            the states, are kept of K steps only.

    Attributes:
        weight_ih_l[k], weight_hh_l[k], bias_ih_l[k], bias_hh_l[k]: of layer k, with ``_reverse`` appended for the
            second direction: ``[3H, I or D*H]``, ``[3H, H]``, ``[3H]``, ``[3H]``, the gates in the order r, z, n;
            drawn uniformly in ``+-1/sqrt(H)``.

    Raises:
        ValueError, TypeError: as ``torch.nn.GRU`` for the same argument; ``ValueError`` for a rule that does not serve
            a cell with gates.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, in the variant of cuDNN.

    >>> import torch, tpext
    >>> gru = tpext.nn.GRU(10, 20, num_layers=2, rule=tpext.Backprop())
    >>> output, h_n = gru(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    >>> output.square().mean().backward()
    >>> gru.weight_hh_l0.grad.shape
    torch.Size([60, 20])
    """

    _kind = "GRU"
    _cell = "gru"
    gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        rule: RecurrentRule | None = None,
        return_sequence: bool = True,
        checkpoint_every: int | None = None,
        **unsupported: object,
    ) -> None:
        self._refuse(unsupported)
        super().__init__(
            "GRU",
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
        )

    def to_torch(self) -> nn.GRU:
        """Return a ``torch.nn.GRU`` that shares the parameters, for export or inference elsewhere.

        Raises:
            ValueError: this module carries hooks, parametrized or pruned weights, or members of its own, which the
                plain module would lose.

        >>> import tpext
        >>> tpext.nn.GRU(3, 4, batch_first=True).to_torch()
        GRU(3, 4, batch_first=True)
        """
        check_replaceable(self, "GRU.to_torch: the module")
        return sharing_parameters(self, nn.GRU, self._made_with)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, lengths: None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the network over a batch of sequences; arguments, results and errors are :meth:`tpext.nn.RNN.forward`'s.

        Args:
            input: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]`` for a single sequence, or a
                ``PackedSequence``.
            hx: initial states ``[num_layers * D, B, H]``; None means zeros.
            lengths: ``[B]`` integers, a tensor or a list: the valid steps of each row of a padded batch; None: all T.

        Returns:
            ``output [T, B, D*H]``, or None with ``return_sequence=False``, and ``h_n [num_layers * D, B, H]``.
        """
        output, (h_n,) = self._forward(input, None if hx is None else (hx,), lengths)
        return output, h_n  # type: ignore[return-value]
