"""What the author of a rule or a task runs over it, in a test of their own.

>>> import tpext
>>> from tpext.testing import check_rule
>>> check_rule(tpext.RegularizedInverse(reg=10.0))

What does not hold is an AssertionError with the rule or task, the name of the check, what was expected and what came.
An error from inside the rule is its cause.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tpext.nn import GRU, LSTM, MLP, RNN, TargetSequential
from tpext.nn.linear import as_activation
from tpext.ops import Activation, Units
from tpext.ops._library import NONLINEARITIES, check_choice
from tpext.ops.act_inverse import ActivationName
from tpext.ops.units import UnitsName
from tpext.rules import Backprop, LayerRule, RecurrentRule
from tpext.rules.base import Kind, Rule, not_an_instance, of_each
from tpext.tasks import ImageClasses, ImageSet
from tpext.tasks.base import Batch, Task
from tpext.tasks.checks import check_samples

_STEPS, _BATCH = 7, 4
_CELLS: dict[str, Any] = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


def check_rule(
    rule: Rule,
    *,
    cell: str | None = None,
    nonlinearity: str | None = None,
    activation: ActivationName | UnitsName | Activation | Units | None = None,
) -> None:
    """Check that a rule does what every layer of its kind relies on.

    On small networks on the CPU, for each kind of layer that the rule is for:

    ====================  ==================================================================================
    "value"               copies, pickled ones too, equal the rule; its fields cannot be assigned
    "gradients"           come for all but the rule's own parameters, finite, in float32 and float64
    "given tensors"       stay as they are, and a second backward pass gives the same
    "second derivative"   is refused; of an ``exact`` rule it is back-propagation's
    "saving"              a copied network, and one that loads the ``state_dict``, give the same gradients
    "autocast"            puts out bfloat16; gradients are those without it, in their parameters' dtype
    "lengths"             give for a padded batch what its sequences give alone (recurrent layers)
    "checkpoint_every"    gives the same gradients (recurrent layers)
    "own loss"            of a rule that ``learns`` gives gradients to all that it owns, and to nothing else
    "compile"             ``torch.compile(fullgraph=True)`` gives the same, also after a number has changed
    ====================  ==================================================================================

    Args:
        rule: of recurrent layers, of feed-forward layers or of networks.
        cell: of the recurrent layers, "rnn", "gru" or "lstm"; None means "rnn".
        nonlinearity: of the simple recurrent cell, None means "tanh".
        activation: of the feed-forward layers, None means "tanh" ("relu" for a rule that ``takes_units``).

    Raises:
        AssertionError: what does not hold. TypeError: ``rule`` is none. ValueError: another argument that is none, or
        does not belong to the rule.

    Cost: seconds, most of them the compiler's.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"check_rule: rule must be a tpext.rules.Rule, got {rule!r}{not_an_instance(rule)}")
    for name, value, choices in (("cell", cell, tuple(_CELLS)), ("nonlinearity", nonlinearity, NONLINEARITIES)):
        if value is not None:
            if "recurrent" not in rule.kinds:
                raise ValueError(f"check_rule: {name} belongs to rules of recurrent layers, got {rule}")
            check_choice("check_rule", name, value, choices)
    recurrent = _CELLS[cell or "rnn"]
    if nonlinearity is not None:
        if recurrent is not RNN:
            raise ValueError(f"check_rule: nonlinearity belongs to cell 'rnn', got cell {cell!r}")
        recurrent = partial(RNN, nonlinearity=nonlinearity)
    if activation is not None:
        if "layer" not in rule.kinds:
            raise ValueError(f"check_rule: activation belongs to rules of feed-forward layers, got {rule}")
        activation = as_activation(activation)
    with torch.random.fork_rng(devices=[]):
        for name, check in _rule_checks(rule, recurrent, activation):
            _run(rule, name, check)


class _MismatchError(Exception):
    """What a check found."""


def _expect(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise _MismatchError(f"expected {expected}, got {got}")


def _run(subject: object, name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except _MismatchError as error:
        raise AssertionError(f"{subject}: {name}: {error}") from error.__cause__
    except Exception as error:
        raise AssertionError(f"{subject}: {name}: expected no error, got {type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Case:
    """A rule, the kind of layer it is to be checked in, and what such layers are made of."""

    rule: Any
    kind: Kind
    recurrent: Callable[..., Any]
    activation: Any

    def network(self, dtype: torch.dtype = torch.float64, rule: Rule | None = None) -> tuple[Any, Tensor]:
        """A small network under the rule, or another one, and an input."""
        torch.manual_seed(0)
        one: Any = self.rule if rule is None else rule
        if self.kind == "recurrent":
            sizes: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
            return self.recurrent(3, 5, rule=one, dtype=dtype, **sizes), _sequences(dtype)
        if self.kind == "layer":
            return MLP([6, 5, 4], self._activation, rule=one, dtype=dtype), torch.randn(_BATCH, 6, dtype=dtype)
        blocks = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in ((6, 5), (5, 4), (4, 3))]
        net = TargetSequential(*blocks, rule=one, input_shape=(6,)).to(dtype)
        return net, torch.randn(_BATCH, 6, dtype=dtype)

    def layer(self, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Tensor]:
        """One layer, whose weights the rule is given themselves; a network where the kind is that."""
        torch.manual_seed(0)
        if self.kind == "recurrent":
            return self.recurrent(3, 5, rule=self.rule, dtype=dtype, **options), _sequences(dtype)
        if self.kind == "layer":
            mlp = MLP([6, 5], rule=self.rule, output_activation=self._activation, dtype=dtype)
            return mlp, torch.randn(_BATCH, 6, dtype=dtype)
        return self.network(dtype)

    @property
    def _activation(self) -> Any:
        return self.activation or ("relu" if self.rule.takes_units else "tanh")


def _sequences(dtype: torch.dtype) -> Tensor:
    return torch.randn(_STEPS, _BATCH, 3, dtype=dtype)


def _rule_checks(
    rule: Rule, recurrent: Callable[..., Any] = RNN, activation: Any = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "value", partial(_check_value, rule)
    for kind in sorted(rule.kinds):
        case = _Case(rule, kind, recurrent, activation)
        for dtype in (torch.float32, torch.float64):
            yield f"gradients ({kind}, {dtype})", partial(_check_gradients, case, dtype)
        yield f"given tensors ({kind})", partial(_check_given, case)
        yield f"second derivative ({kind})", partial(_check_second_derivative, case)
        yield f"saving ({kind})", partial(_check_saving, case)
        yield f"autocast ({kind})", partial(_check_autocast, case)
        if kind == "recurrent":
            yield f"lengths ({kind})", partial(_check_lengths, case)
            yield f"checkpoint_every ({kind})", partial(_check_checkpoints, case)
        if kind != "network":
            yield f"own loss ({kind})", partial(_check_own_loss, case)
        yield f"compile ({kind})", partial(_check_compiled, case)


def _check_value(rule: Rule) -> None:
    _expect(bool(rule.kinds), "a class below RecurrentRule, LayerRule or NetworkRule", "none of them")
    try:
        copies = [copy.deepcopy(rule), pickle.loads(pickle.dumps(rule)), dataclasses.replace(rule)]
    except Exception as error:
        raise _MismatchError(
            "expected a rule that can be copied and pickled, so a class that stands in a module, got "
            f"{type(error).__name__}: {error}"
        ) from error
    for one in copies:
        _expect(one == rule and hash(one) == hash(rule), "a copy that equals the rule", one)
    for field in dataclasses.fields(rule):
        try:
            setattr(rule, field.name, getattr(rule, field.name))
        except dataclasses.FrozenInstanceError:
            continue
        raise _MismatchError(f"expected a frozen dataclass, got an assignment of {field.name}")


def _output(model: Callable[..., Any], input: Tensor, **options: Any) -> Tensor:
    output = model(input, **options)
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _gradients(model: Any, input: Tensor, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """What a backward pass gives to the input and each parameter."""
    input = input.clone().requires_grad_()
    model.zero_grad()
    _output(model if run is None else run, input).square().sum().backward()  # type: ignore[no-untyped-call]
    grads = {"the input": input.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], where: str, tolerance: float = 1e-8) -> None:
    _expect(found.keys() == expected.keys(), f"gradients of {', '.join(expected)} {where}", ", ".join(found) or "none")
    for name, grad in expected.items():
        size = max(float(grad.abs().max()), 1e-12)
        error = float((found[name] - grad).abs().max()) / size
        _expect(error < tolerance, f"the same gradient of {name} {where}", f"a difference of {error:.1e} of its size")


def _owned(model: nn.Module) -> list[str]:
    """The names of the parameters that rules in the network own."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "owned_names", ())
    ]


def _leaves(model: nn.Module, input: Tensor) -> dict[str, Tensor]:
    """The tensors that are to get a gradient."""
    owned = _owned(model)
    named = {name: one for name, one in model.named_parameters() if one.requires_grad and name not in owned}
    return {"the input": input.requires_grad_(), **named}


def _check_gradients(case: _Case, dtype: torch.dtype) -> None:
    model, input = case.network(dtype)
    found = _gradients(model, input)
    for name in _leaves(model, input):
        _expect(name in found, f"a gradient of {name}", "none")
    for name in _owned(model):
        _expect(name not in found, f"no gradient of {name}, which the rule owns", "one")
    for name, grad in found.items():
        _expect(bool(grad.isfinite().all()), f"a finite gradient of {name}", "NaN or infinity")


def _check_given(case: _Case) -> None:
    unchanged = "that the tensors that the rule is given stay as they are"
    model, input = case.layer()
    leaves = _leaves(model, input)
    given = {"the input": input, **dict(model.named_parameters())}
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    output = _output(model, input)
    gradient = torch.randn_like(output)
    given |= {"the output": output, "its gradient": gradient}
    before |= {"the output": output.detach().clone(), "its gradient": gradient.clone()}
    passes = []
    for retain in (True, False):
        try:
            grads = torch.autograd.grad(output, list(leaves.values()), gradient, retain_graph=retain)
        except RuntimeError as error:
            # autograd's own watch over what was saved
            if "modified by an inplace operation" not in str(error):
                raise
            raise _MismatchError(f"expected {unchanged}, got {error}") from error
        passes.append(dict(zip(leaves, grads, strict=True)))
        changed = [name for name, tensor in given.items() if not torch.equal(tensor.detach(), before[name])]
        _expect(not changed, unchanged, f"a change of {', '.join(changed)}")
    _compare(passes[1], passes[0], "from a second backward pass")
    if case.kind == "layer":
        kept = gradient.clone()
        model[0].input_displacement(input.detach(), gradient)
        _expect(torch.equal(gradient, kept), unchanged, "a change of the displacement")


def _check_second_derivative(case: _Case) -> None:
    model, input = case.network()
    if case.rule.exact:
        exact = case.network(rule=Backprop())[0]
        exact.load_state_dict(model.state_dict(), strict=False)
        _compare(_second(model, input), _second(exact, input), "twice, as the rule is exact")
        return
    try:
        _second(model, input)
    except RuntimeError as error:
        _expect("not a derivative" in str(error), "the error that says that there is none", error)
    else:
        raise _MismatchError("expected create_graph=True to be refused, as the rule is not exact, got a derivative")


def _second(model: nn.Module, input: Tensor) -> dict[str, Tensor]:
    """The gradients of the squared gradients."""
    leaves = _leaves(model, input)
    first = torch.autograd.grad(_output(model, input).square().sum(), list(leaves.values()), create_graph=True)
    total = torch.stack([grad.square().sum() for grad in first]).sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def _check_saving(case: _Case) -> None:
    model, input = case.network()
    expected = _gradients(model, input)
    copied = copy.deepcopy(model)
    loaded = case.network()[0]
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    loaded.load_state_dict(model.state_dict())
    for what, one in (("deepcopy", copied), ("load_state_dict", loaded)):
        _compare(_gradients(one, input), expected, f"after {what} of the network")


def _check_autocast(case: _Case) -> None:
    model, input = case.layer(torch.float32)
    leaves = _leaves(model, input)
    with torch.autocast("cpu", torch.bfloat16):
        output = _output(model, input)
    _expect(output.dtype == torch.bfloat16, "an output in bfloat16", output.dtype)
    gradient = torch.randn(output.shape).bfloat16()
    found = torch.autograd.grad(output, list(leaves.values()), gradient)
    expected = torch.autograd.grad(_output(model, input), list(leaves.values()), gradient.float())
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        _expect(grad.dtype == leaf.dtype, f"a gradient of {name} in {leaf.dtype}", grad.dtype)
    # One layer computes in float32; torch's own operations, and blocks, in bfloat16.
    tolerance = 0.1 if case.kind == "network" or case.rule.exact else 1e-5
    first, second = (dict(zip(leaves, one, strict=True)) for one in (found, expected))
    _compare(first, second, "as without autocast", tolerance)


def _check_compiled(case: _Case) -> None:
    rule = case.rule
    changed = [rule]
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if isinstance(value, float) or (isinstance(value, tuple) and all(isinstance(one, float) for one in value)):
            try:
                changed.append(dataclasses.replace(rule, **{field.name: of_each(value, lambda v: 0.75 * v + 0.0625)}))
            except ValueError:
                continue
    model, input = case.network()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for one in changed:
            try:
                model.rule = one
            except ValueError:
                # the layer refuses a number that has no effect there
                continue
            _compare(_gradients(model, input, compiled), _gradients(model, input), f"compiled, with {one}")
    finally:
        torch._dynamo.reset()


_LENGTHS = (_STEPS, 1, _STEPS - 2, 3)


def _check_lengths(case: _Case) -> None:
    model, input = case.network()

    def padded(x: Tensor) -> Tensor:
        return _output(model, x, lengths=torch.tensor(_LENGTHS))

    def alone(x: Tensor) -> Tensor:
        rows = [_output(model, x[:length, row : row + 1]) for row, length in enumerate(_LENGTHS)]
        return torch.cat([row.flatten() for row in rows])

    _compare(_gradients(model, input, padded), _gradients(model, input, alone), "with lengths as without padding")


def _check_checkpoints(case: _Case) -> None:
    for model, input in (case.layer(return_sequence=False), case.network()):
        for lengths in (None, torch.tensor(_LENGTHS)):

            def final(x: Tensor, model: Any = model, lengths: Tensor | None = lengths) -> Tensor:
                states = model(x, lengths=lengths)[1]
                return torch.cat(states) if isinstance(states, tuple) else states

            model.checkpoint_every = None
            expected = _gradients(model, input, final)
            for every in (1, 3):
                model.checkpoint_every = every
                where = f"with checkpoint_every={every}, where each direction of [S, H, H] is alone, as without"
                _compare(_gradients(model, input, final), expected, where)


def _check_own_loss(case: _Case) -> None:
    name, base = ("recurrent_loss", RecurrentRule) if case.kind == "recurrent" else ("layer_loss", LayerRule)
    has_loss = getattr(type(case.rule), name) is not getattr(base, name)
    if not case.rule.learns:
        _expect(not has_loss, f"learns = True of a rule with {name}", "False")
        return
    # a rule of several kinds may learn in one of them
    if not has_loss and len(case.rule.kinds) > 1:
        return
    model, input = case.network()
    owned = _owned(model)
    _expect(bool(owned), "parameters of the rule's own, as it learns", "none")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for noise in (0.0, 0.1):
        input = input.detach().requires_grad_()
        model.zero_grad()
        loss = model.reconstruction_loss(input, noise=noise)
        _expect(loss.dim() == 0 and bool(loss.isfinite()), "a finite scalar", loss)
        loss.backward()
        for name, tensor in (("the input", input), *model.named_parameters()):
            if name in owned and tensor.requires_grad:
                _expect(tensor.grad is not None, f"a gradient of {name}", "none")
                _expect(bool(tensor.grad.isfinite().all()), f"a finite gradient of {name}", "NaN or infinity")
            else:
                _expect(tensor.grad is None, f"no gradient of {name}", "one")
    for name, parameter in model.named_parameters():
        _expect(torch.equal(parameter, before[name]), f"that {name} stays as it is", "a change in place")


def check_task(task: Task) -> None:
    """Check that a task does what a training run relies on.

    Batches and test sets are pure functions of their arguments, have the stated shapes and dtypes, and the loss and the
    share of correct outputs can be taken of them; inputs of sequences have these as the task's own module embeds them.
    Images of :class:`tpext.tasks.ImageClasses`, which are read where they are not yet, keep their planes.

    Args:
        task: any task; a set of images of your own as ``ImageClasses(dataset=my_set)``.

    Raises:
        AssertionError: what does not hold. TypeError: ``task`` is none.

    >>> from tpext.tasks import make_task
    >>> from tpext.testing import check_task
    >>> check_task(make_task("adding", length=30))
    """
    if not isinstance(task, Task):
        more = "; an ImageSet is checked as ImageClasses(dataset=..)" if isinstance(task, ImageSet) else ""
        raise TypeError(f"check_task: task must be a tpext.tasks.Task, got {task!r}{more}")
    draws: dict[str, Callable[[int], Batch]] = {
        "batch": lambda iteration: task.batch(1, iteration, _BATCH),
        "test_set": lambda iteration: task.test_set(1, _BATCH),
    }
    _run(task, "value", partial(_check_task_value, task))
    for name, draw in draws.items():
        _run(task, name, partial(_check_samples, task, name, draw))


def _check_task_value(task: Task) -> None:
    # a set of one's own is found by its path again: its load may be made by a function, which pickle refuses
    own = isinstance(task, ImageClasses) and isinstance(task.dataset, ImageSet)
    copied = copy.copy(task) if own else pickle.loads(pickle.dumps(task))
    _expect(copied == task, f"a {'' if own else 'pickled '}copy that equals the task", copied)


def _check_samples(task: Task, method: str, draw: Callable[[int], Batch]) -> None:
    first = draw(3)
    shape = task.shape if isinstance(task, ImageClasses) else None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            check_samples(task, method, first, size=_BATCH, shape=shape, embed=task.make_embedding().eval())
        except ValueError as error:
            raise _MismatchError(str(error)) from None
    same = all(torch.equal(a, b) for a, b in zip(first, draw(3), strict=True))
    _expect(same, "the same samples for the same arguments", "others")
    if method == "batch":
        _expect(not torch.equal(draw(4).input, first.input), "other samples for another iteration", "the same")
    # a run converts numbers, a loop of one's own may not
    for name, one in zip(("input", "target"), first, strict=True):
        exact = torch.float32 if one.is_floating_point() else torch.int64
        _expect(one.dtype == exact, f"{name} in {exact}", one.dtype)
    steps = (task.length or 1,) if task.every_step else ()
    output = torch.zeros(*steps, _BATCH, task.output_size)
    loss, correct = task.loss(output, first.target), task.correct(output, first.target)
    _expect(loss.dim() == 0 and bool(loss.isfinite()), "a finite scalar for loss", loss)
    _expect(tuple(correct.shape) == (*steps, _BATCH), f"correct {[*steps, _BATCH]}", list(correct.shape))
