"""The training loop."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from tpext.experiments.config import Config
from tpext.experiments.loop import DivergedError, Run, begin, carry_out, catch_interrupts, torch_state
from tpext.experiments.model import Model, SequenceModel, local_scales, make_model, split_parameters
from tpext.experiments.own import as_config_errors
from tpext.experiments.passes import Course, Pass, carry_out_together
from tpext.experiments.plan import Plan
from tpext.experiments.progress import describe
from tpext.experiments.run_folder import AnyRunFolder, Result, Row, RunFolder, write_whole
from tpext.experiments.settings import ConfigError
from tpext.nn import HotTargetLoss
from tpext.ops.kaczmarz_train import running_accuracy
from tpext.optim import CentredRMSprop, TensorFlowRMSprop, keep_orthogonal
from tpext.rules.base import ResultError
from tpext.tasks import Batch, Task
from tpext.tasks.checks import check_samples

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# An evaluation pass keeps its states below this many numbers.
EVALUATION_NUMBERS = 2**24


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    stop: Callable[[], bool] | None = None,
    callback: Callable[[Row, nn.Module], None] | None = None,
) -> Result:
    """Run a configuration in a folder, to its last iteration.

    Each iteration takes its batch, and what it trains, from (seed, iteration) alone; a checkpoint holds parameters,
    optimizer states, torch's random state and the metrics so far. A run that is killed and resumed therefore ends with
    the same parameters, bit for bit, and the same metrics, times apart (on the same device, threads and versions).

    Args:
        config: the configuration.
        out: the run's folder; it must not hold a run yet, or hold this one with ``resume``.
        resume: continue from the last checkpoint, or start if there is none. A complete run is left as it is.
        console: where the progress goes, such as ``rich.console.Console()``; None means nowhere.
        stop: asked after each iteration; True ends the run as SIGTERM does.
        callback: called after each evaluation with its row and the model, which it must leave as it is; its random
            numbers are not the run's.

    Raises:
        ConfigError: the data, the device or an installed package does not allow the run, and no folder is made; or what
            a method of the rule returns does not fit the layer. A ValueError from a user's task stays as it is.
            An error in the first step of a new run, or before it, leaves the folder free for another.
        RunError: the folder holds a run already, one that another process is at, or (with ``resume``) one that is
            broken or of another configuration: names the field.
        DivergedError: a non-finite loss, gradient or parameter; the last good checkpoint and the metrics stay.
        MissingDataError: the task's data is not there.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, or ``stop``. The first lets the iteration end and saves a
            checkpoint, another Ctrl-C stops at once.
    """
    threads = config.threads or default_threads(config)
    return carry_out(
        TrainingRun,
        config,
        RunFolder(out),
        threads=threads,
        resume=resume,
        console=console,
        stop=stop,
        callback=callback,
    )


def default_threads(config: Config) -> int:
    """Return the CPU threads of a run that names none: torch's up to the task's ``max_threads``."""
    return min(torch.get_num_threads(), config.task.max_threads)


def make_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the configured optimizer over parameter groups that have their ``lr``."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, momentum=config.momentum)
    if config.optimizer == "tf-rmsprop":
        return TensorFlowRMSprop(groups, momentum=config.momentum)
    if config.optimizer == "centred-rmsprop":
        return CentredRMSprop(groups, momentum=config.momentum)
    return torch.optim.Adagrad(groups)


def hot_target_loss(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared distance of outputs ``[B, M]`` to the targets that classes ``[B]`` ask for, mean over ``B``."""
    loss: Tensor = HotTargetLoss()(output, target)
    return loss / len(target)


def train_together(
    configs: Sequence[Config],
    folders: Sequence[RunFolder],
    *,
    stop: Callable[[], bool],
    ended: Callable[[int, Result | Exception | KeyboardInterrupt], None],
) -> None:
    """Run configurations in their folders side by side, the recurrent layers of all in one call each.

    Each run has the bits that :func:`train` gives it, times apart, and goes on from its checkpoint.

    Args:
        configs: of networks that :class:`tpext.nn.Ensemble` takes, with the same task, data, threads and precision.
        folders: of the runs.
        stop: as that of :func:`train`.
        ended: is told the place of a run that ends, and what it has returned or raised.
    """
    threads = configs[0].threads or default_threads(configs[0])
    make = partial(TrainingRun, task=configs[0].make_task())
    with torch_state(configs[0].seed, threads), catch_interrupts() as interrupts:
        courses = [
            begin(make, config, folder, resume=True, stop=stop, interrupts=interrupts)
            for config, folder in zip(configs, folders, strict=True)
        ]
        carry_out_together(courses, [config.seed for config in configs], ended)


class TrainingRun(Run[Config, Row, Result]):
    row_class = Row
    model: Model

    def __init__(
        self,
        config: Config,
        folder: AnyRunFolder[Config, Row, Result],
        console: Console,
        task: Task | None = None,
    ) -> None:
        """``task``: the configuration's, where runs share it with its data; None: make it."""
        super().__init__(config, folder, console)
        if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError('tensorboard is not installed: pip install "tpext[experiments]"')
        self.task = task = task or config.make_task()
        self.plan = Plan.of(config, task)
        self.iterations = self.plan.iterations
        self.description = describe(config)
        with as_config_errors():
            first = task.batch(config.seed, 0, config.batch_size)
            self.test_set = task.test_set(config.seed, config.test_size)
            self.validation_set = task.validation_set(config.seed, config.test_size)
        self.writer: SummaryWriter | None = None

        self.model = make_model(config, task).to(self.device, self.dtype)
        with as_config_errors():
            check_samples(task, "batch", first, size=config.batch_size, embed=self._embed)
            check_samples(task, "test_set", self.test_set)
            if self.validation_set is not None:
                check_samples(task, "validation_set", self.validation_set)
        hidden, head, reverse = split_parameters(self.model)
        self.trained = hidden + head
        self.scales = local_scales(self.model, config)
        groups = [{"params": hidden, "lr": config.lr}, {"params": head, "lr": config.head_lr}]
        self.optimizer = make_optimizer(config, groups)
        if config.orthogonal:
            names = (name for name, _ in self.model.named_parameters() if "weight_hh" in name)
            keep_orthogonal(self.optimizer, [self.model.get_parameter(name) for name in names])
        self.reverse_optimizer = (
            make_optimizer(config, [{"params": reverse, "lr": config.reverse_lr}]) if config.rule.learns else None
        )
        self.parts = {"model": self.model, "optimizer": self.optimizer, "reverse_optimizer": self.reverse_optimizer}
        by_targets = config.rule.solves_weights
        self.criterion = hot_target_loss if by_targets else task.loss
        # The layers of such a rule take the gradient of the sum over the batch, and average themselves.
        self.loss_gradient = (
            torch.tensor(float(config.batch_size), dtype=self.dtype, device=self.device) if by_targets else None
        )
        self.running_accuracy = 0.0 if by_targets else None
        if by_targets:
            self.saved = {**self.saved, "running_accuracy": float}
        self.data = task.fingerprint()
        self.saved = {**self.saved, "data": str}
        # Whatever is not finite in a backward pass reaches these: they sum it over time and batch.
        self.biases = [
            parameter for name, parameter in self.model.named_parameters() if "bias_ih" in name or ".bias" in name
        ]

    def _take_over(self, state: dict[str, Any]) -> None:
        own = self.data
        # checkpoints of earlier versions have none
        super()._take_over({"data": own, **state})
        if self.data != own:
            what = f" ({self.task.subject})" if self.task.subject else ""
            raise ValueError(f"the data{what} must be what the run began with, and has changed")

    def course(self, interrupts: list[int], stop: Callable[[], bool]) -> Course[Result]:
        try:
            return (yield from super().course(interrupts, stop))
        finally:
            if self.writer is not None:
                self.writer.close()

    def _step(self, iteration: int) -> Course[None]:
        plan = self.plan
        batch = self._batch(plan.batch(iteration - 1))
        try:
            if self.reverse_optimizer is not None and plan.trains_reverse(iteration - 1):
                self._train_reverse(self.reverse_optimizer, batch.input)
            if plan.trains_forward(iteration - 1):
                self.optimizer.zero_grad()
                loss = partial(self._loss, batch.target)
                value = yield Pass(self.model, batch.input, loss, self._autocast, self.dtype, self.loss_gradient)
                self._scale_gradients()
                self._check_gradients()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.losses.append(value.item())
        except ValueError as error:
            # The regularised inverse refuses NaN and infinite weights; any other refusal is the caller's to see.
            self._check_parameters(error)
            if isinstance(error, ResultError):
                raise ConfigError(f"rule {self.config.rule_name}: {error}") from error
            raise

    @torch.no_grad()
    def _embed(self, input: Tensor) -> Tensor:
        """What recurrent layers read of a batch's input."""
        moved = self._move(Batch(input, input)).input
        if not isinstance(self.model, SequenceModel):
            return moved
        self.model.eval()
        embedded: Tensor = self.model.embedding(moved)
        self.model.train()
        return embedded

    def _train_reverse(self, optimizer: torch.optim.Optimizer, input: Tensor) -> None:
        optimizer.zero_grad()
        with self._autocast():
            reconstruction = self.model.reconstruction_loss(input)
        self._watch(reconstruction.item(), "reconstruction loss")
        torch.autograd.backward(reconstruction)
        self._scale_gradients()
        optimizer.step()
        optimizer.zero_grad()

    def _loss(self, target: Tensor, output: Tensor) -> Tensor:
        loss = self.criterion(output, target)
        self._watch(loss.item(), "training loss")
        if self.running_accuracy is not None:
            share = self.task.correct(output.detach(), target).double().mean()
            self.running_accuracy = running_accuracy(share[None], start=self.running_accuracy)
        return loss

    def _evaluates(self, iteration: int) -> bool:
        return iteration % self.plan.eval_interval == 0

    def _scale_gradients(self) -> None:
        for parameter, scale in self.scales:
            if parameter.grad is not None:
                parameter.grad *= scale

    def _check_gradients(self) -> None:
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.config.clip_grad_norm)
        for bias in self.biases:
            if bias.grad is not None and not math.isfinite(value := bias.grad.sum().item()):
                raise DivergedError(self.iteration, f"the gradient holds {value}")

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _output(self, input: Tensor) -> Tensor:
        with self._autocast():
            output: Tensor = self.model(input)
        return output.to(self.dtype)

    @torch.no_grad()
    def _first_loss(self) -> float:
        input, target = self._batch(0)
        return self.criterion(self._output(input), target).item()

    @torch.no_grad()
    def _evaluate(self, samples: Batch) -> tuple[float, float]:
        """Return mean loss and accuracy on a set."""
        task, sequence, every = self.task, self.task.length is not None, self.task.every_step
        width = (self.config.hidden_size or 0) if sequence else sum(self.config.sizes or ())
        if every:
            width += task.input_size + task.output_size
        part = max(1, EVALUATION_NUMBERS // (width * (task.length or 1)))
        inputs = torch.split(samples.input, part, dim=1 if sequence else 0)
        targets = torch.split(samples.target, part, dim=1 if every else 0)
        loss = correct = judged = 0.0
        self.model.eval()
        for batch in map(Batch, inputs, targets):
            input, target = self._move(batch)
            output, count = self._output(input), task.judged(target)
            loss += self.criterion(output, target).item() * count
            right = task.correct(output, target)
            if right.shape != output.shape[:-1]:
                raise ConfigError(
                    f"{self.config.task_name}: correct must return {list(output.shape[:-1])}, one for each output, "
                    f"got {list(right.shape)}"
                )
            correct += right.sum().item()
            judged += count
        self.model.train()
        return loss / judged, correct / judged

    def _row(self, train_loss: float) -> Row:
        test_loss, accuracy = self._evaluate(self.test_set)
        self._watch(test_loss, "test loss")
        validation_loss = None
        if self.validation_set is not None:
            validation_loss = self._watch(self._evaluate(self.validation_set)[0], "validation loss")
        seconds = round(self._seconds(), 3)
        row = Row(self.iteration, train_loss, test_loss, accuracy, seconds, self.running_accuracy, validation_loss)
        if self.config.tensorboard:
            self._write_events(row)
        if self.config.gradients:
            self._write_gradients()
        return row

    def _write_gradients(self) -> None:
        """Measure the rule on the batch of the next iteration."""
        from tpext.experiments.gradients import add_gradients

        input, target = (
            one.double() if one.is_floating_point() else one for one in self._batch(self.plan.batch(self.iteration))
        )
        model = cast(SequenceModel, self.model)  # of no other kind, as the configuration has checked
        path = RunFolder(self.folder.path).gradients
        add_gradients(path, self.iteration, model, lambda model: self.criterion(model(input), target))

    def _write_events(self, row: Row) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run wrote after its last checkpoint comes again.
            self.writer = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=row.iteration)
        for name in ("train_loss", "test_loss", "accuracy", "running_accuracy", "validation_loss"):
            if (value := getattr(row, name)) is not None:
                self.writer.add_scalar(name, value, row.iteration)

    def _draw(self) -> None:
        from tpext.experiments.figures import draw_run

        draw_run(self.folder.path)

    def _result(self) -> Result:
        from tpext.experiments.figures import draw_task

        draw_task(self.folder.path)
        self._write_sample()
        last, best = self.rows[-1], self._best_row()
        losses = {"validation": last.validation_loss, "test": last.test_loss}
        return Result(
            task=self.config.task_name,
            rule=self.config.rule_name,
            accuracy=last.accuracy,
            error=1 - last.accuracy,
            best_accuracy=best.accuracy,
            best_iteration=best.iteration,
            test_loss=last.test_loss,
            seconds=last.seconds,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            running_accuracy=last.running_accuracy,
            validation_loss=last.validation_loss,
            measures={
                f"{part} {name}": value
                for part, loss in losses.items()
                if loss is not None
                for name, value in self.task.measures(loss).items()
            },
            **self._outcome(),
        )

    @torch.no_grad()
    def _write_sample(self) -> None:
        """Write a text by the trained network, if the task is about texts."""
        self.model.eval()
        text = self.task.generate(lambda input: self._output(input.to(self.device)), self.config.seed)
        self.model.train()
        if text is not None:
            write_whole(self.folder.path / "sample.txt", text.encode())
