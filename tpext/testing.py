"""What the author of a rule or a task runs over it, in a test of their own.

>>> import tpext
>>> tpext.testing.check_rule(tpext.RegularizedInverse(reg=10.0))

Each check raises AssertionError with the rule or task, what was expected and what came.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tpext.nn import MLP, RNN, TargetSequential
from tpext.rules import Backprop
from tpext.rules.base import Kind, Rule
from tpext.tasks.base import Batch, Task

_STEPS, _BATCH = 7, 4


def check_rule(rule: Rule) -> None:
    """Check that a rule does what every layer of its kind relies on.

    On a small network, in float32 and float64: gradients of every parameter and of the input come, in their shapes, and
    are finite; ``torch.compile(fullgraph=True)`` gives the same, also after a number of the rule has changed; a second
    derivative is refused unless the rule is exact; rule and network survive copying and saving. A padded batch of
    sequences gives the sum of the gradients of the sequences alone.

    Args:
        rule: of recurrent layers, of feed-forward layers or of networks.

    Raises:
        AssertionError: what does not hold. TypeError: ``rule`` is none.

    Cost: seconds, most of them the compiler's.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"check_rule: rule must be a tpext.rules.Rule, got {rule!r}")
    _expect(bool(rule.kinds), rule, "must subclass RecurrentRule, LayerRule or NetworkRule")
    _check_value(rule)
    for kind in sorted(rule.kinds):
        for dtype in (torch.float32, torch.float64):
            _check_gradients(rule, kind, dtype)
        _check_second_derivative(rule, kind)
        _check_saving(rule, kind)
        _check_compiled(rule, kind)
        if kind == "recurrent":
            _check_lengths(rule)


def _expect(holds: bool, rule: object, message: str) -> None:
    if not holds:
        raise AssertionError(f"{rule}: {message}")


def _check_value(rule: Rule) -> None:
    """A rule is a value: equal copies, one hash, no assignment."""
    try:
        copies = [copy.deepcopy(rule), pickle.loads(pickle.dumps(rule)), dataclasses.replace(rule)]
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"{rule}: must be copied and pickled, so its class must stand in a module: {error}"
        ) from error
    for one in copies:
        _expect(one == rule and hash(one) == hash(rule), rule, f"a copy must equal it, got {one}")
    for field in dataclasses.fields(rule):
        try:
            setattr(rule, field.name, getattr(rule, field.name))
        except dataclasses.FrozenInstanceError:
            continue
        raise AssertionError(f"{rule}: must be a frozen dataclass, {field.name} was assigned")


def _network(rule: Any, kind: Kind, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A small network under the rule, and an input."""
    torch.manual_seed(0)
    if kind == "recurrent":
        rnn = RNN(3, 5, num_layers=2, bidirectional=True, rule=rule, dtype=dtype)
        return rnn, torch.randn(_STEPS, _BATCH, 3, dtype=dtype)
    if kind == "layer":
        mlp = MLP([6, 5, 4], "relu" if rule.takes_units else "tanh", rule=rule, dtype=dtype)
        return mlp, torch.randn(_BATCH, 6, dtype=dtype)
    layers = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in ((6, 5), (5, 4), (4, 3))]
    return TargetSequential(*layers, rule=rule, input_shape=(6,)).to(dtype), torch.randn(_BATCH, 6, dtype=dtype)


def _output(model: Callable[..., Any], input: Tensor, **options: Any) -> Tensor:
    output = model(input, **options)
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _gradients(model: Any, input: Tensor, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """What a backward pass gives to the input and each parameter."""
    input = input.clone().requires_grad_()
    model.zero_grad()
    loss = _output(model if run is None else run, input).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {"input": input.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


def _check_gradients(rule: Rule, kind: Kind, dtype: torch.dtype) -> None:
    model, input = _network(rule, kind, dtype)
    owned = set(dict(model.named_parameters())) - set(dict(_network(Backprop(), kind, dtype)[0].named_parameters()))
    found = _gradients(model, input)
    _expect("input" in found, rule, f"the input must get a gradient ({kind}, {dtype})")
    for name, parameter in model.named_parameters():
        if name not in owned and parameter.requires_grad:
            _expect(name in found, rule, f"{name} must get a gradient ({kind}, {dtype})")
    for name, grad in found.items():
        _expect(bool(grad.isfinite().all()), rule, f"the gradient of {name} must be finite ({kind}, {dtype})")


def _check_second_derivative(rule: Rule, kind: Kind) -> None:
    model, input = _network(rule, kind)
    input.requires_grad_()
    try:
        torch.autograd.grad(_output(model, input).square().sum(), input, create_graph=True)
    except RuntimeError as error:
        _expect(not rule.exact and "Backprop" in str(error), rule, f"create_graph=True must not fail, got: {error}")
    else:
        _expect(rule.exact, rule, "create_graph=True must be refused, as the rule's backward pass is no derivative")


def _check_saving(rule: Rule, kind: Kind) -> None:
    model, input = _network(rule, kind)
    expected = _gradients(model, input)
    copied = copy.deepcopy(model)
    loaded = _network(rule, kind)[0]
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    loaded.load_state_dict(model.state_dict())
    for what, one in (("deepcopy", copied), ("load_state_dict", loaded)):
        _compare(rule, _gradients(one, input), expected, f"after {what} of the network")


def _check_compiled(rule: Rule, kind: Kind) -> None:
    changed = [rule]
    for field in dataclasses.fields(rule):
        if isinstance(getattr(rule, field.name), float):
            try:
                changed.append(dataclasses.replace(rule, **{field.name: 0.75 * getattr(rule, field.name) + 0.0625}))
            except ValueError:
                continue
    model: Any
    model, input = _network(rule, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one in changed:
        model.rule = one
        _compare(rule, _gradients(model, input, compiled), _gradients(model, input), f"compiled, with {one}")
    torch._dynamo.reset()


def _check_lengths(rule: Rule) -> None:
    model, input = _network(rule, "recurrent")
    lengths = torch.tensor([_STEPS, 1, _STEPS - 2, 3])

    def padded(x: Tensor) -> Tensor:
        return _output(model, x, lengths=lengths)

    def alone(x: Tensor) -> Tensor:
        rows = [_output(model, x[:length, row : row + 1]) for row, length in enumerate(lengths.tolist())]
        return torch.cat([row.flatten() for row in rows])

    _compare(rule, _gradients(model, input, padded), _gradients(model, input, alone), "with lengths")


def _compare(rule: Rule, found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    _expect(found.keys() == expected.keys(), rule, f"{where}: gradients of {list(expected)}, got {list(found)}")
    for name, grad in expected.items():
        size = max(float(grad.abs().max()), 1e-12)
        error = float((found[name] - grad).abs().max()) / size
        _expect(error < 1e-8, rule, f"{where}: the gradient of {name} must be the same, differs by {error:.1e} of it")


def check_task(task: Task) -> None:
    """Check that a task does what a training run relies on.

    Batches and test sets are pure functions of their arguments, have the stated shapes and dtypes, and the loss and the
    share of correct outputs can be taken of them.

    Args:
        task: any task.

    Raises:
        AssertionError: what does not hold. TypeError: ``task`` is none.

    >>> import tpext
    >>> from tpext.tasks import make_task
    >>> tpext.testing.check_task(make_task("adding", length=30))
    """
    if not isinstance(task, Task):
        raise TypeError(f"check_task: task must be a tpext.tasks.Task, got {task!r}")
    draws: dict[str, Callable[[int], Batch]] = {
        "batch": lambda seed: task.batch(seed, 3, _BATCH),
        "test_set": lambda seed: task.test_set(seed, _BATCH),
    }
    for name, draw in draws.items():
        first, again = draw(1), draw(1)
        same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        _expect(same, task, f"{name} must return the same samples for the same arguments")
        _check_batch(task, name, first)
    other = task.batch(1, 4, _BATCH)
    moves = not torch.equal(other.input, task.batch(1, 3, _BATCH).input)
    _expect(moves, task, "batch must return other samples for another iteration")
    _expect(pickle.loads(pickle.dumps(task)) == task, task, "must be pickled to an equal task")


def _check_batch(task: Task, name: str, batch: Batch) -> None:
    input, target = batch
    shape = (_BATCH, task.input_size) if task.length is None else (task.length, _BATCH, task.input_size)
    _expect(tuple(input.shape) == shape, task, f"{name}: input must be {list(shape)}, got {list(input.shape)}")
    _expect(input.dtype == torch.float32, task, f"{name}: input must be float32, got {input.dtype}")
    if task.criterion == "cross_entropy":
        _expect(target.dtype == torch.int64, task, f"{name}: target must be int64 classes, got {target.dtype}")
        inside = bool(((target >= 0) & (target < task.output_size)).all())
        _expect(inside, task, f"{name}: classes must lie in 0..{task.output_size - 1}")
    output = torch.zeros(_BATCH, task.output_size)
    loss, correct = task.loss(output, target), task.correct(output, target)
    _expect(loss.dim() == 0 and bool(loss.isfinite()), task, f"loss must be a finite scalar, got {loss}")
    _expect(tuple(correct.shape) == (_BATCH,), task, f"correct must be [B={_BATCH}], got {list(correct.shape)}")
