"""The recurrent network: ``torch.nn.RNN``'s interface, with a rule for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tpext.nn.recurrent import RecurrentLayers, owned_parameters, parameters_of, reverse_of, stack_members
from tpext.nn.recurrent_parameters import check_replaceable, sharing_parameters
from tpext.rules import RecurrentCall, RecurrentRule

_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "identity": "RNN_IDENTITY"}


class RNN(RecurrentLayers):
    r"""Elman RNN with ``torch.nn.RNN``'s interface, trained by the given rule.

    ``h_t = a(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)``, with ``a`` tanh, relu or the identity.

    The forward pass is ``torch.nn.RNN``'s. The rule decides what ``backward()`` computes: see
    :class:`tpext.RegularizedInverse` (the default), :class:`tpext.LearnedInverse` and :class:`tpext.Backprop`.
    Signature, parameter names, ``state_dict`` keys, initialisation (the same seed gives the same weights), shapes and
    errors are those of ``torch.nn.RNN``; with ``Backprop()`` so are outputs and gradients, to rounding.

    Two things differ. Changing ``output`` in place may make ``backward()`` raise (see :meth:`forward`). And
    derivatives by other ways than ``backward()`` and ``torch.autograd.grad``: the transforms of ``torch.func``
    (``grad``, ``vjp``, ``jacrev``, ``jvp``, ``vmap``, ...) work under ``Backprop()`` alone, step by step by torch's
    operations; ``torch.autograd.grad(..., is_grads_batched=True)`` and dual numbers of ``torch.autograd.forward_ad``
    are refused with an error: use the plain module of :meth:`to_torch`.

    Args:
        input_size: features I of the input, >= 1.
        hidden_size: units H of each layer and direction, >= 1.
        num_layers: layers, >= 1; each above the first reads the outputs of the one below.
        nonlinearity: "tanh", "relu" or "identity".
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: True takes and gives ``[B, T, ...]`` in place of ``[T, B, ...]`` (not for ``hx`` and ``h_n``).
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: True adds a second set of weights per layer that runs backwards in time.
        device, dtype: of the parameters; float32 or float64, on CUDA also bfloat16 or float16.
        rule: what the backward pass computes; None means ``RegularizedInverse()``.
        return_sequence: False returns ``(None, h_n)``: the outputs are not needed.
        checkpoint_every: K >= 1: for long sequences, keep of each layer and direction the state before every K-th step
            only and compute the others anew in the backward pass, K at a time, for at most one more forward pass. With
            one layer and ``return_sequence=False`` the memory of a step falls from about ``T`` to ``T / K + K`` states
            ``[B, H]`` a direction (least at ``K = sqrt(T)``). Outputs that something reads, the layer above or
            yourself, still stand in memory in full, ``[T, B, D*H]`` a layer, and in the backward pass so does their
            gradient. Gradients are summed piece by piece, equal to rounding; where the gradient has faded to nothing
            the rest is left out (on the CPU), and a NaN or infinity there goes unseen. None: keep all.

    Attributes:
        weight_ih_l[k], weight_hh_l[k], bias_ih_l[k], bias_hh_l[k]: of layer k, with ``_reverse`` appended for the
            second direction: ``[H, I or D*H]``, ``[H, H]``, ``[H]``, ``[H]``; drawn uniformly in ``+-1/sqrt(H)``.
        reverse_weight_hh_l[k], reverse_bias_l[k]: ``[H, H]`` and ``[H]``, under ``LearnedInverse`` only; initialised
            orthogonal and zero, as in every published run. A ``state_dict`` without them (``torch.nn.RNN``'s) leaves
            them as they are.

    Raises:
        ValueError, TypeError: as ``torch.nn.RNN`` for the same argument; ``ValueError`` for a rule that does not fit
            the nonlinearity.

    Source: Elman, "Finding Structure in Time", 1990, for the network; the rules name theirs.

    >>> import torch, tpext
    >>> rnn = tpext.nn.RNN(10, 20, num_layers=2, rule=tpext.RegularizedInverse(reg=10.0))
    >>> output, h_n = rnn(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    >>> output[-1].square().mean().backward()  # the gradients are target propagation's
    >>> rnn.weight_hh_l0.grad.shape
    torch.Size([20, 20])
    """

    _kind = "RNN"
    _made_with = (*RecurrentLayers._made_with, "nonlinearity")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
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
        if nonlinearity not in _MODES:
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh', 'relu' or 'identity'.")
        # before the rest, as torch does: the rule's check asks for it
        self.nonlinearity = nonlinearity
        super().__init__(
            _MODES[nonlinearity],
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

    def to_torch(self) -> nn.RNN:
        """Return a ``torch.nn.RNN`` that shares the parameters, for export or inference elsewhere.

        Reverse parameters (``LearnedInverse``) are left out, and the plain module returns its outputs in any case.

        Returns:
            The plain module, in the same training mode.

        Raises:
            ValueError: the nonlinearity is "identity", which ``torch.nn.RNN`` lacks; or this module carries hooks,
                parametrized or pruned weights, or members of its own, which the plain module would lose.

        >>> import tpext
        >>> tpext.nn.RNN(3, 4, batch_first=True).to_torch()
        RNN(3, 4, batch_first=True)
        """
        if self.nonlinearity == "identity":
            raise ValueError("RNN.to_torch: torch.nn.RNN has no nonlinearity 'identity'")
        check_replaceable(self, "RNN.to_torch: the module")
        return sharing_parameters(self, nn.RNN, self._made_with)

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
        """Run the network over a batch of sequences.

        Args:
            input: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]`` for a single sequence, or a
                ``PackedSequence``; the parameters' dtype, or any floating one under autocast.
            hx: initial states ``[num_layers * D, B, H]`` (``[num_layers * D, H]`` for a single sequence), D directions;
                None means zeros. Credit ``"through_time"`` ends here: for a later part of the same sequence hand on
                ``h_n.detach()``.
            lengths: ``[B]`` integers, a tensor or a list, 0..T: the valid steps of each row of a padded batch; None:
                all T. The result is that of the packed batch: outputs beyond are zero, the second direction starts at
                the last valid step, ``h_n`` is the state after the last valid step (``hx`` for a row of length 0).
                Unlike a ``PackedSequence`` it compiles. The padding may hold anything. For an input on a GPU it may be
                on the CPU, where its range is checked (but not while a CUDA graph is captured), or there too, where it
                is brought into range without a word.

        Returns:
            ``output``: ``[T, B, D*H]`` (as ``input``: batch first, single or packed), the last layer's states, or None
            with ``return_sequence=False``;
            ``h_n``: ``[num_layers * D, B, H]``, the final state of each layer and direction. With one direction
            ``output`` is the memory that the backward pass reads, not a copy: to change it in place (``mul_``, dropout
            or relu with ``inplace=True``) change ``output.clone()``. ``h_n`` is a copy. On Linux the storage of an
            output of 32 MiB or more cannot be resized (``untyped_storage().resize_``).

        Raises:
            ValueError, RuntimeError: as ``torch.nn.RNN`` for the same input. ``backward()`` raises ``RuntimeError``
                ("modified by an inplace operation") where ``output`` was changed in place.
        """
        output, (h_n,) = self._forward(input, None if hx is None else (hx,), lengths)
        return output, h_n  # type: ignore[return-value]

    def _call(
        self,
        members: Sequence[RecurrentLayers],
        layer: int,
        input: Tensor,
        starts: Sequence[Tensor],
        lengths: Tensor | None,
    ) -> RecurrentCall:
        weights = parameters_of(members, layer, input)
        if self.bias:
            # summed before they are stacked: of a sum of views both biases would get one tensor for a gradient
            weights = [[weight_ih, weight_hh, bias_ih + bias_hh] for weight_ih, weight_hh, bias_ih, bias_hh in weights]
        weight_ih, weight_hh, *biases = stack_members(weights)
        bias = biases[0] if self.bias else None
        owned = owned_parameters(members, layer, input)
        run = (lengths, reverse_of(members), self.nonlinearity, owned, self.checkpoint_every, self._has_readers(layer))
        return RecurrentCall(input, starts[0], weight_ih, weight_hh, bias, *run)
