"""The passes of runs through their networks: of a run alone, or of several whose recurrent layers run together.

A run is a generator that yields each iteration's pass and goes on when it is done. Whoever drives it may carry out the
passes of many in one call a layer (:class:`tpext.nn.Ensemble`): runs of one shape that differ in seeds, rates or
numbers of their rules. To a run it makes no difference, not in a bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from tpext.experiments.model import SequenceModel, ensemble_of, outputs_together
from tpext.nn import Ensemble

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass.

    Attributes:
        model: the network; its gradients are zero before.
        input: of the network.
        loss: of its output; it may raise, and then nothing goes back.
        context: in which the forward pass runs, such as autocast.
        dtype: of the output.
        gradient: of the loss, to begin with; None is one.
    """

    model: Any
    input: Tensor
    loss: Callable[[Tensor], Tensor]
    context: Callable[[], contextlib.AbstractContextManager[Any]]
    dtype: torch.dtype
    gradient: Tensor | None = None

    def output(self) -> Tensor:
        with self.context():
            output: Tensor = self.model(self.input)
        return output.to(self.dtype)

    def carry_out(self) -> Tensor:
        """Return the loss; gradients are those of the parameters."""
        loss = self.loss(self.output())
        torch.autograd.backward(loss, self.gradient)
        return loss


Course: TypeAlias = Generator[Pass, Tensor, ResultT]
"""A run, from pass to pass, each answered by its loss; what it returns is the outcome."""


@dataclass(frozen=True)
class _Answer:
    loss: Tensor | None = None
    error: BaseException | None = None


def carry_out(course: Course[ResultT]) -> ResultT:
    """Carry out a run alone."""
    answer = None
    while True:
        try:
            asked = next(course) if answer is None else _go_on(course, answer)
        except StopIteration as end:
            result: ResultT = end.value
            return result
        answer = _alone(asked)


def carry_out_together(
    courses: Sequence[Course[ResultT]],
    seeds: Sequence[int],
    ended: Callable[[int, ResultT | Exception | KeyboardInterrupt], None],
) -> None:
    """Carry out runs side by side in this thread, with a random state each. One that ends leaves the others alone.

    Args:
        courses: of runs with recurrent networks that an :class:`tpext.nn.Ensemble` takes.
        seeds: what each run's random state begins with.
        ended: is told the place of a run that ends, and what it has returned or raised.

    Raises:
        KeyboardInterrupt: Ctrl-C that no run has caught; all have ended.
    """
    answers: dict[int, _Answer | None] = dict.fromkeys(range(len(courses)))
    states = [_seeded(seed) for seed in seeds]
    ensembles: dict[tuple[int, ...], Ensemble] = {}
    with contextlib.ExitStack() as ends:
        for course in courses:
            ends.callback(course.close)
        while answers:
            asked = {}
            for place, answer in answers.items():
                try:
                    with _random_state(states, place):
                        course = courses[place]
                        asked[place] = next(course) if answer is None else _go_on(course, answer)
                except StopIteration as end:
                    ended(place, end.value)
                except (Exception, KeyboardInterrupt) as error:
                    if type(error) is KeyboardInterrupt:  # no run's own, which has saved a checkpoint
                        raise
                    ended(place, error)
            answers = _together(asked, states, ensembles)


def _go_on(course: Course[Any], answer: _Answer) -> Pass:
    return course.throw(answer.error) if answer.error is not None else course.send(answer.loss)  # type: ignore[arg-type]


def _alone(asked: Pass) -> _Answer:
    try:
        return _Answer(asked.carry_out())
    # it is the run's to see, which closes its files
    except BaseException as error:
        return _Answer(error=error)


def _together(
    asked: Mapping[int, Pass], states: list[Tensor], ensembles: dict[tuple[int, ...], Ensemble]
) -> dict[int, _Answer | None]:
    """Carry out passes in one, or where that fails each alone, which shows whose failure it is."""
    models: list[SequenceModel] = [one.model for one in asked.values()]
    before = list(states)
    if len(models) > 1:
        try:
            present = tuple(map(id, models))
            if present not in ensembles:
                ensembles.clear()
                ensembles[present] = ensemble_of(models)
            return _in_one(asked, states, ensembles[present])
        except Exception:
            states[:] = before
            for model in models:
                model.zero_grad()
    answers: dict[int, _Answer | None] = {}
    for place, one in asked.items():
        with _random_state(states, place):
            answers[place] = _alone(one)
    return answers


def _in_one(asked: Mapping[int, Pass], states: list[Tensor], ensemble: Ensemble) -> dict[int, _Answer | None]:
    models, embedded = [one.model for one in asked.values()], []
    with next(iter(asked.values())).context():
        for place, one in asked.items():
            with _random_state(states, place):
                embedded.append(one.model.embedding(one.input))
        outputs = outputs_together(ensemble, models, embedded)
    answers: dict[int, _Answer | None] = {}
    losses, gradients = [], []
    for (place, one), output in zip(asked.items(), outputs, strict=True):
        try:
            with _random_state(states, place):
                loss = one.loss(output.to(one.dtype))
        except Exception as error:
            answers[place] = _Answer(error=error)
            continue
        answers[place] = _Answer(loss)
        losses.append(loss)
        gradients.append(one.gradient)
    if losses:
        torch.autograd.backward(losses, gradients)
    return answers


def _seeded(seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.get_rng_state()


@contextlib.contextmanager
def _random_state(states: list[Tensor], place: int) -> Iterator[None]:
    torch.set_rng_state(states[place])
    try:
        yield
    finally:
        states[place] = torch.get_rng_state()
