"""The recurrent network: ``torch.nn.RNN``'s interface, with a rule for the backward pass.

The layer loop is Python; each layer is one call forward and one backward, both directions in one through the leading
stack axis S of the ops.
"""

from __future__ import annotations

import itertools
import math
import numbers
import warnings
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tpext.nn.owned import OwnedParameters, register_owned, reset_owned
from tpext.nn.torchscript import refuse_script, refuse_trace
from tpext.ops._library import are_plain, autocasts, check_lengths, check_tensor, full_precision
from tpext.rules import RecurrentCall, RecurrentRule, RegularizedInverse
from tpext.rules.base import require_rule
from tpext.rules.recurrent_pass import comes_of_a_pass

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOST_CREDIT = (
    "RNN: hx comes of an earlier call of this layer, with its graph. Under credit='through_time' the credit of a call "
    "ends at its hx, so the earlier call's steps learn of this one through its displacements alone. Run the sequence "
    "in one call (checkpoint_every bounds the memory), detach hx, or use credit='local', whose parts add up."
)
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "identity": "RNN_IDENTITY"}


def check_replaceable(module: nn.RNN | RNN, where: str) -> None:
    """Raise if a replacement, which takes over the parameters alone, would silently lose a part of ``module``."""
    own = {name for row in module._all_weights for name in row}
    if isinstance(module, RNN):
        own.update(module.owned_names)
    members = {*module._parameters, *module._buffers, *module._modules}
    # parametrizing or pruning a weight puts other members in its place
    lost = [hook for hook in _HOOKS if getattr(module, hook)]
    lost += [f"no parameter {name}" for name in sorted(own - members)]
    lost += [f"a member {name}" for name in sorted(members - own)]
    if lost:
        raise ValueError(
            f"{where} has {', '.join(lost)}, which a replacement would lose; remove hooks, parametrizations, pruning "
            "and members of your own before and apply them to the replacement"
        )


class RNN(OwnedParameters):
    r"""Elman RNN with ``torch.nn.RNN``'s interface, trained by the given rule.

    ``h_t = a(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)``, with ``a`` tanh, relu or the identity.

    The forward pass is ``torch.nn.RNN``'s. The rule decides what ``backward()`` computes: see
    :class:`tpext.RegularizedInverse` (the default), :class:`tpext.LearnedInverse` and :class:`tpext.Backprop`.
    Signature, parameter names, ``state_dict`` keys, initialisation (the same seed gives the same weights), shapes and
    errors are those of ``torch.nn.RNN``; with ``Backprop()`` so are outputs and gradients, to rounding.

    Two things differ. Changing ``output`` in place may make ``backward()`` raise (see :meth:`forward`). And the
    transforms of ``torch.func`` (``grad``, ``vjp``, ``jacrev``, ``jvp``, ...) and ``torch.autograd.grad(...,
    is_grads_batched=True)`` are refused with an error, except
    ``vmap`` under ``Backprop()``: use ``torch.autograd.grad``, or the plain module of :meth:`to_torch`.

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
        checkpoint_every: K >= 1: for long sequences with ``return_sequence=False``, one layer and one direction, keep
            the state before every K-th step only and compute the others anew in the backward pass, K at a time. The
            memory of a step falls from about ``T`` to ``T / K + K`` states ``[B, H]`` (least at ``K = sqrt(T)``), for
            at most one more forward pass. Gradients are summed piece by piece, equal to rounding; where
            the gradient has faded to nothing the rest is left out (on the CPU), and a NaN or infinity there goes
            unseen. None: keep all.

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

    weight_ih_l0: Tensor

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
        if "proj_size" in unsupported:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if unsupported:
            raise TypeError(f"RNN.__init__() got an unexpected keyword argument {next(iter(unsupported))!r}")
        if nonlinearity not in _MODES:
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh', 'relu' or 'identity'.")
        rule = RegularizedInverse() if rule is None else rule
        require_rule("RNN", rule, "recurrent")
        super().__init__()
        self.mode = _MODES[nonlinearity]
        self.nonlinearity = nonlinearity
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = 0
        self.return_sequence = return_sequence
        self.checkpoint_every = checkpoint_every
        self._check_sizes(dropout)
        self._check_checkpointing()
        rule.check(self)
        self._rule: RecurrentRule = rule
        self._reverse = [False, True] if bidirectional else [False]
        self._all_weights: list[list[str]] = []

        directions = len(self._reverse)
        for layer in range(num_layers):
            layer_input = input_size if layer == 0 else directions * hidden_size
            shapes: list[tuple[int, ...]] = [(hidden_size, layer_input), (hidden_size, hidden_size)]
            shapes += [(hidden_size,), (hidden_size,)] if bias else []
            for reverse in self._reverse:
                suffix = f"_l{layer}{'_reverse' if reverse else ''}"
                stems = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: len(shapes)]
                names = [stem + suffix for stem in stems]
                for name, shape in zip(names, shapes, strict=True):
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._all_weights.append(names)
        self._register_owned_parameters()
        self.reset_parameters()

    def _check_sizes(self, dropout: object) -> None:
        if not isinstance(dropout, numbers.Number) or isinstance(dropout, bool) or not 0 <= self.dropout <= 1:
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
            )
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers={self.num_layers}",
                stacklevel=3,
            )
        for name in ("bias", "batch_first"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        for name in ("input_size", "hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
            if value <= 0:
                raise ValueError(f"{name} must be greater than zero")
        if self.num_layers <= 0:
            raise ValueError("num_layers must be greater than zero")

    def _check_checkpointing(self) -> None:
        if not isinstance(self.return_sequence, bool):
            raise TypeError(f"return_sequence should be of type bool, got: {type(self.return_sequence).__name__}")
        every = self.checkpoint_every
        if every is None:
            return
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"checkpoint_every should be of type int or None, got: {type(every).__name__}")
        if every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {every}")
        if self.return_sequence or self.num_layers != 1 or self.bidirectional:
            raise ValueError(
                "checkpoint_every needs return_sequence=False, num_layers=1 and bidirectional=False, got "
                f"return_sequence={self.return_sequence}, num_layers={self.num_layers}, "
                f"bidirectional={self.bidirectional}"
            )

    # Parameters

    def _owned_shapes(self, rule: RecurrentRule) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes of the parameters that a rule owns, of each layer and direction."""
        shapes = []
        for names in self._all_weights:
            suffix, input_size = names[0].removeprefix("weight_ih"), getattr(self, names[0]).shape[1]
            owned = rule.parameter_shapes(input_size, self.hidden_size)
            shapes.append({name + suffix: shape for name, shape in owned.items()})
        return shapes

    def _register_owned_parameters(self) -> None:
        shapes = self._owned_shapes(self._rule)
        self._owned_names = [list(of_member) for of_member in shapes]
        for names, of_member in zip(self._all_weights, shapes, strict=True):
            register_owned(self, self._rule, of_member, getattr(self, names[1]))

    def _reset_owned_parameters(self) -> None:
        for name in self.owned_names:
            reset_owned(self._rule, name.rsplit("_l", 1)[0], getattr(self, name))

    def reset_parameters(self) -> None:
        """Draw all parameters anew: uniform in ``+-1/sqrt(H)``; those that the rule owns as the rule does."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for names in self._all_weights:
            for name in names:
                nn.init.uniform_(getattr(self, name), -bound, bound)
        self._reset_owned_parameters()

    @property
    def owned_names(self) -> list[str]:
        return list(itertools.chain(*self._owned_names))

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of ``torch.nn.RNN``, one list a layer and direction (none of the rule's own)."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def flatten_parameters(self) -> None:
        """Do nothing: there is no layout to restore. Kept for code written for ``torch.nn.RNN``."""

    @property
    def rule(self) -> RecurrentRule:
        """The rule of the backward pass; assignable, unless that changes the set of parameters (see ``convert``)."""
        return self._rule

    @rule.setter
    def rule(self, rule: RecurrentRule) -> None:
        require_rule("RNN", rule, "recurrent")
        rule.check(self)
        if self._owned_shapes(rule) != self._owned_shapes(self._rule):
            raise ValueError(
                f"RNN: changing rule from {self._rule} to {rule} changes which parameters the rule owns; "
                "use tpext.nn.convert(module, rule), then make the optimizer anew"
            )
        self._rule = rule

    def _check_replace_rule(self, rule: RecurrentRule) -> None:
        """Raise if ``_replace_rule`` would fail half-way."""
        require_rule("RNN", rule, "recurrent")
        rule.check(self)
        shapes = self._owned_shapes(rule)
        if shapes == self._owned_shapes(self._rule):
            return
        had = self.owned_names
        changed = [name for name in had if name not in self._parameters]
        if changed:
            raise ValueError(
                f"RNN: {', '.join(changed)} cannot be removed, being no plain parameters (parametrized or pruned); "
                f"undo that before changing rule from {self._rule} to {rule}"
            )
        taken = [name for name in itertools.chain(*shapes) if name not in had and hasattr(self, name)]
        if taken:
            raise ValueError(
                f"RNN: {', '.join(taken)} cannot be added, the module has other attributes of these names; "
                f"delete them before changing rule from {self._rule} to {rule}"
            )

    def _new_parameters(self, rule: RecurrentRule) -> dict[str, nn.Parameter] | None:
        """Those that a rule owns, initialised; None if they are the ones that the module has."""
        shapes = self._owned_shapes(rule)
        if shapes == self._owned_shapes(self._rule):
            return None
        made = {}
        for names, of_member in zip(self._all_weights, shapes, strict=True):
            for name, shape in of_member.items():
                made[name] = nn.Parameter(getattr(self, names[1]).new_empty(shape))
                reset_owned(rule, name.rsplit("_l", 1)[0], made[name])
        return made

    def _replace_rule(self, rule: RecurrentRule, parameters: dict[str, nn.Parameter] | None) -> None:
        """Change the rule, and the parameters that it owns to those of ``_new_parameters``.

        An optimizer made before does not know of added parameters.
        """
        self._rule = rule
        if parameters is None:
            return
        for name in self.owned_names:
            delattr(self, name)
        self._owned_names = [list(of_member) for of_member in self._owned_shapes(rule)]
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

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
        plain = nn.RNN(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.nonlinearity,
            self.bias,
            self.batch_first,
            bidirectional=self.bidirectional,
            device="meta",
            dtype=self.weight_ih_l0.dtype,
        )
        # set afterwards: the constructor would repeat this module's warning about a dropout without effect
        plain.dropout = self.dropout
        for names in self._all_weights:
            for name in names:
                setattr(plain, name, getattr(self, name))
        return plain.train(self.training)

    # Forward

    __prepare_scriptable__ = refuse_script

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, lengths: None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the network over a batch of sequences.

        Args:
            input: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]`` for a single sequence, or a
                ``PackedSequence``; the parameters' dtype, or any floating one under autocast.
            hx: initial states ``[num_layers * D, B, H]`` (``[num_layers * D, H]`` for a single sequence), D directions;
                None means zeros. Credit ``"through_time"`` ends here: for a later part of the same sequence hand on
                ``h_n.detach()``.
            lengths: ``[B]`` int64, 0..T: the valid steps of each row of a padded batch; None: all T. The result is
                that of the packed batch: outputs beyond are zero, the second direction starts at the last valid step,
                ``h_n`` is the state after the last valid step (``hx`` for a row of length 0). Unlike a
                ``PackedSequence`` it compiles. The padding may hold anything. For an input on a GPU it may be on the
                CPU, where its range is checked (but not while a CUDA graph is captured), or there too, where it is
                brought into range without a word.

        Returns:
            ``output``: ``[T, B, D*H]`` (as ``input``: batch first, single or packed), the last layer's states, or None
            with ``return_sequence=False``;
            ``h_n``: ``[num_layers * D, B, H]``, the final state of each layer and direction. With one direction
            ``output`` is the memory that the backward pass reads, not a copy: to change it in place (``mul_``, dropout
            or relu with ``inplace=True``) change ``output.clone()``. ``h_n`` is a copy.

        Raises:
            ValueError, RuntimeError: as ``torch.nn.RNN`` for the same input. ``backward()`` raises ``RuntimeError``
                ("modified by an inplace operation") where ``output`` was changed in place.
        """
        refuse_trace(self)
        self._check_checkpointing()
        self._warn_of_lost_credit(hx)
        rows, hx, steps = self._time_major(input, hx, lengths)
        output, h_n = self._run(rows, hx, steps)
        if isinstance(input, PackedSequence) and input.unsorted_indices is not None:
            h_n = h_n.index_select(1, input.unsorted_indices)
        if not self.return_sequence:
            return None, h_n.squeeze(1) if isinstance(input, Tensor) and input.dim() == 2 else h_n  # type: ignore[return-value]
        if isinstance(input, PackedSequence):
            data = pack_padded_sequence(output, _packed_lengths(input)).data
            return PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices), h_n
        if input.dim() == 2:
            return output.squeeze(1), h_n.squeeze(1)
        return (output.transpose(0, 1) if self.batch_first else output), h_n

    def _time_major(
        self, input: Tensor | PackedSequence, hx: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Check the arguments of ``forward``; return input ``[T, B, I]``, hx ``[L*D, B, H]`` and lengths ``[B]``."""
        if not isinstance(input, PackedSequence):
            check_tensor("RNN", "input", input, "[T, B, I] or [T, I], or a PackedSequence")
        for name, value, shape in (("hx", hx, "[num_layers * D, B, H]"), ("lengths", lengths, "[B]")):
            if value is not None:
                check_tensor("RNN", name, value, shape)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("RNN: lengths must be None with a PackedSequence, which has its own")
            self._check_input(input.data, dim=2)
            # without the indices, the rows stay in the sorted order of the packed data
            padded, lengths = pad_packed_sequence(PackedSequence(input.data, input.batch_sizes))
            lengths = lengths.to(padded.device, non_blocking=True)
            if hx is not None and input.sorted_indices is not None:
                hx = hx.index_select(1, input.sorted_indices)
        else:
            dim = input.dim()
            if dim not in (2, 3):
                raise ValueError(f"RNN: Expected input to be 2D or 3D, got {dim}D tensor instead")
            if hx is not None and hx.dim() != dim:
                kind = "unbatched" if dim == 2 else "batched"
                raise RuntimeError(f"For {kind} {dim}-D input, hx should also be {dim}-D but got {hx.dim()}-D tensor")
            if dim == 2:
                if lengths is not None:
                    raise ValueError("RNN: lengths needs batched 3-D input; cut an unbatched sequence instead")
                padded = input.unsqueeze(1)
                hx = None if hx is None else hx.unsqueeze(1)
            else:
                padded = input.transpose(0, 1) if self.batch_first else input
            self._check_input(padded, dim=3)

        steps, batch, _ = padded.shape
        if hx is not None:
            expected = (len(self._all_weights), batch, self.hidden_size)
            if hx.shape != expected:
                raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
            self._check_device("hidden", hx, padded)
            if hx.dtype != padded.dtype and not autocasts(padded.device.type):
                raise RuntimeError(f"RNN: hx must have the dtype of input, {padded.dtype}, got {hx.dtype}")
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            if lengths.dtype != torch.int64 or lengths.shape != (batch,):
                raise ValueError(f"RNN: lengths must be int64 [B={batch}], got {lengths.dtype} {list(lengths.shape)}")
            if lengths.is_cpu and padded.is_cuda:
                if are_plain((lengths,)):
                    check_lengths("RNN", lengths, steps)
                lengths = lengths.to(padded.device, non_blocking=True)
            self._check_device("lengths", lengths, padded)
        return padded, hx, lengths

    def _check_input(self, input: Tensor, dim: int) -> None:
        dtype = self.weight_ih_l0.dtype
        if dtype not in (torch.float32, torch.float64) and input.device.type == "cpu":
            raise ValueError(
                f"RNN: parameters on the CPU must be float32 or float64, got {dtype}; keep them in float32 "
                f"and run under torch.autocast('cpu', dtype={dtype})"
            )
        if input.dtype != dtype and not autocasts(input.device.type):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        if input.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    @staticmethod
    def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
        # explicit, because the dispatcher lets a CPU tensor with a meta one through
        if tensor.device != input.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at {input.device} "
                f"and {name} tensor at {tensor.device}"
            )

    def _layer_parameters(self, layer: int, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stacked ``weight_ih`` [S, H, I], ``weight_hh`` [S, H, H] and the sum of both biases [S, H] of one layer."""
        directions = len(self._reverse)
        columns: list[list[Tensor]] = [[], [], []]
        for names in self._all_weights[layer * directions : (layer + 1) * directions]:
            parameters = [getattr(self, name) for name in names]
            for parameter in parameters:
                self._check_device("parameter", parameter, input)
            columns[0].append(parameters[0])
            columns[1].append(parameters[1])
            if self.bias:
                columns[2].append(parameters[2] + parameters[3])
        return _stack(columns[0]), _stack(columns[1]), _stack(columns[2]) if self.bias else None

    def _owned_parameters(self, layer: int, input: Tensor) -> tuple[Tensor, ...]:
        """The rule's own parameters of one layer, stacked ``[S, ...]``."""
        directions = len(self._reverse)
        members = self._owned_names[layer * directions : (layer + 1) * directions]
        owned = []
        for names in zip(*members, strict=True):
            parameters = [getattr(self, name) for name in names]
            for parameter in parameters:
                self._check_device("parameter", parameter, input)
            owned.append(_stack(parameters))
        return tuple(owned)

    def _call(self, layer: int, input: Tensor, h0: Tensor, lengths: Tensor | None) -> RecurrentCall:
        weights = self._layer_parameters(layer, input)
        owned = self._owned_parameters(layer, input)
        return RecurrentCall(
            input.unsqueeze(0), h0, *weights, lengths, self._reverse, self.nonlinearity, owned, self.checkpoint_every
        )

    def _initial_states(self, hx: Tensor | None, input: Tensor) -> Sequence[Tensor]:
        """The initial states ``[S, B, H]`` of each layer."""
        directions = len(self._reverse)
        if hx is None:
            return [input.new_zeros(directions, input.size(1), self.hidden_size)] * self.num_layers
        return [hx] if self.num_layers == 1 else torch.split(hx, directions)

    def _warn_of_lost_credit(self, hx: Tensor | None) -> None:
        """Warn where a sequence is fed in parts, with the graph, under a credit that ends with each part."""
        if torch.compiler.is_compiling() or not isinstance(hx, Tensor) or hx.grad_fn is None:
            return
        if self._rule.credit != "through_time" or not torch.is_grad_enabled():
            return
        if comes_of_a_pass(hx, self.get_parameter("weight_hh_l0")):
            # the line of the user's that called the module
            warnings.warn(_LOST_CREDIT, stacklevel=5)

    def _run(self, input: Tensor, hx: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        output, finals = input, []
        for layer, h0 in enumerate(self._initial_states(hx, input)):
            if layer > 0:
                output = self._between_layers(output)
            states, h_n = self._rule.run_recurrent(self._call(layer, output, h0, lengths))
            output = states if self.checkpoint_every is not None else _join_directions(states)
            finals.append(h_n)
        return output, finals[0] if len(finals) == 1 else torch.cat(finals)

    def _between_layers(self, output: Tensor) -> Tensor:
        return functional.dropout(output, self.dropout) if self.training and self.dropout > 0 else output

    def reconstruction_loss(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        noise: float | None = None,
    ) -> Tensor:
        """Loss that trains the reverse layers of ``LearnedInverse``.

        ``1/(2B) sum_t ||G(x_t, f(x_t, h_{t-1} + n_t)) - (h_{t-1} + n_t)||^2``, summed over layers and directions, with
        the layer ``f``, its reverse ``G(x, h) = tanh(h V^T + c + x U^T)`` and Gaussian noise ``n_t``, drawn anew for
        each entry. Only ``V`` and ``c`` receive gradients. Call it, and step an optimizer of the reverse parameters,
        before the target pass of the same batch. Steps beyond ``lengths`` do not count. Computed in the parameters'
        dtype, autocast or not. Under ``DistributedDataParallel`` call it inside the wrapped module's ``forward``: see
        :class:`tpext.LearnedInverse`.

        Args:
            input, hx, lengths: as in the forward pass.
            noise: standard deviation of ``n_t``, >= 0; None means the rule's.

        Returns:
            The scalar loss.

        Raises:
            RuntimeError: the rule is not ``LearnedInverse``; else as the forward pass.
            ValueError: noise is not a finite number >= 0; else as the forward pass.

        Cost: a forward pass and 3 (with its backward 4) more products of ``T*B`` rows with an ``H x H`` matrix.

        Source: Lee et al., "Difference Target Propagation", 2015, equation 13; Manchev and Spratling, JMLR 21(7), 2020.

        >>> import torch, tpext
        >>> rnn = tpext.nn.RNN(3, 4, rule=tpext.LearnedInverse(noise=0.1))
        >>> rnn.reconstruction_loss(torch.randn(7, 2, 3)).backward()
        >>> rnn.reverse_weight_hh_l0.grad.shape, rnn.weight_hh_l0.grad
        (torch.Size([4, 4]), None)
        """
        rows, hx, lengths = self._time_major(input, hx, lengths)
        with full_precision(rows.device.type):
            output = rows.to(self.weight_ih_l0.dtype)
            hx = None if hx is None else hx.to(output.dtype)
            loss = output.new_zeros(())
            for layer, h0 in enumerate(self._initial_states(hx, output)):
                with torch.no_grad():
                    output = self._between_layers(output) if layer > 0 else output
                of_layer, states = self._rule.recurrent_loss(self._call(layer, output, h0, lengths), noise)
                loss = loss + of_layer
                output = _join_directions(states)
        return loss / max(rows.size(1), 1)

    def extra_repr(self) -> str:
        """Sizes and every option that differs from its default."""
        parts = [str(self.input_size), str(self.hidden_size)]
        options: dict[str, object] = {
            "num_layers": 1,
            "nonlinearity": "tanh",
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "rule": RegularizedInverse(),
            "return_sequence": True,
            "checkpoint_every": None,
        }
        for name, default in options.items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)


def _stack(members: list[Tensor]) -> Tensor:
    return members[0].unsqueeze(0) if len(members) == 1 else torch.stack(members)


def _packed_lengths(packed: PackedSequence) -> Tensor:
    """The lengths of the rows in packed order, on the CPU as the batch sizes are."""
    rows = torch.arange(int(packed.batch_sizes[0])).unsqueeze(1)
    return (rows < packed.batch_sizes).sum(1)


def _join_directions(states: Tensor) -> Tensor:
    """``[S, T, B, H] -> [T, B, S*H]``."""
    return states.squeeze(0) if states.size(0) == 1 else states.permute(1, 2, 0, 3).flatten(2)
