"""The training loop of networks on images: feedback and blocks learn side by side, batch by batch."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch.nn import functional

import tpext
from tpext.diagnostics import feedback_angles, gradient_angles
from tpext.experiments.config import ConfigError
from tpext.experiments.figures import draw_image_run
from tpext.experiments.image_folder import ImageFolder, ImageResult, ImageRow
from tpext.experiments.images import STEP_FACTOR, EvaluationSet, ImageConfig
from tpext.experiments.loop import DivergedError, catch_interrupts, check_device, torch_state, versions
from tpext.experiments.progress import Progress, say
from tpext.experiments.run_folder import RunError
from tpext.nn import TargetSequential
from tpext.tasks import Batch, ImageClasses

EVALUATION_BATCH = 500
TOP = 5


class Scores(NamedTuple):
    """Mean loss, accuracy and top-5 accuracy on a set; the last is None for up to 5 classes."""

    loss: float
    accuracy: float
    top5: float | None


class Step(NamedTuple):
    """What an iteration does: the number of its batch, and whether the blocks learn or the feedback alone."""

    batch: int
    trains_blocks: bool


class ImagePlan(NamedTuple):
    """The iterations of a run, counted from 0: the feedback's alone, then epochs of ``batches`` for all.

    After each epoch but the last the feedback may pass through its batches ``extra`` more times, alone.
    """

    start: int
    batches: int
    epochs: int
    extra: int

    @classmethod
    def of(cls, config: ImageConfig, task: ImageClasses) -> ImagePlan:
        """Return the plan of a configuration; reads the task's data.

        Raises:
            ConfigError: a batch is larger than the training set.
            MissingDataError: the task's data is not there.
        """
        try:
            batches = task.epoch_length(config.batch_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        start = (config.feedback_start or 0) + (config.feedback_epochs or 0) * batches
        return cls(start, batches, config.epochs, config.extra_feedback_epochs or 0)

    @property
    def iterations(self) -> int:
        """Their number."""
        return self.start + self.batches * (self.epochs + (self.epochs - 1) * self.extra)

    def step(self, iteration: int) -> Step:
        """Return what an iteration does."""
        if iteration < self.start:
            return Step(iteration, False)
        epoch, index = divmod(iteration - self.start, self.batches * (1 + self.extra))
        return Step(epoch * self.batches + index % self.batches, index < self.batches)


def learning_rate(config: ImageConfig, rate: float, epoch: int) -> float:
    """Return a learning rate in an epoch, counted from 0.

    "cosine" goes down to ``lr_min`` in ``schedule_epochs`` and stays there; "cosine-torch" is torch's
    ``CosineAnnealingLR``, which rises again, as in the published runs of 90 epochs with ``T_max`` 85. "step" divides by
    ten every ``schedule_epochs``.
    """
    if config.schedule == "constant":
        return rate
    assert config.schedule_epochs is not None
    if config.schedule == "step":
        return rate * STEP_FACTOR ** (epoch // config.schedule_epochs)
    if config.schedule == "cosine":
        epoch = min(epoch, config.schedule_epochs)
    wave = (1 + math.cos(math.pi * epoch / config.schedule_epochs)) / 2
    return config.lr_min + (rate - config.lr_min) * wave


def make_optimizer(config: ImageConfig, net: TargetSequential) -> torch.optim.Optimizer:
    """Return the optimizer of the blocks, a group of parameters for each."""
    count = len(net.blocks)
    groups: list[dict[str, Any]] = [
        {"params": list(block.parameters()), "lr": rate}
        for block, rate in zip(net.blocks, _each(config.lr, count), strict=True)
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    assert config.betas is not None
    for group, eps in zip(groups, _each(config.eps or (), count), strict=True):
        group["eps"] = eps
    return torch.optim.Adam(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _each(values: tuple[float, ...], count: int) -> list[float]:
    return list(values) * count if len(values) == 1 else list(values)


def train_images(
    config: ImageConfig, out: str | Path, *, resume: bool = False, console: Console | None = None
) -> ImageResult:
    """Run a configuration in a folder, to its last iteration.

    A batch runs through the network once; the trainer of the feedback and the backward pass share that pass. With
    ``feedback_first`` the targets go through the feedback as this batch left it, else as the one before did. A run that
    is killed and resumed ends with the same parameters, bit for bit, and the same metrics, times apart (on the same
    device, threads and versions). Evaluations draw no random numbers and train nothing.

    Args, raises: as :func:`tpext.experiments.train.train`.
    """
    folder = ImageFolder(out)
    console = console or Console(quiet=True)
    saved = folder.continued(config.options()) if resume else None
    if saved is None:
        folder.check_empty()
    else:
        result = folder.read_result()
        if result is not None:
            say(console, f"{folder.path} is complete already")
            return result
    check_device(config.device)
    task = config.make_task()
    plan = ImagePlan.of(config, task)
    with torch_state(config.seed, config.threads or default_threads(config)):
        run = _Run(config, task, plan, folder, console)
        with folder.locked(), catch_interrupts() as interrupts:
            if saved is None:
                folder.create(config)
            return run.carry_out(interrupts)


def default_threads(config: ImageConfig) -> int:
    """Return the CPU threads of a run that names none: 1 for digits, else torch's up to 4."""
    return 1 if config.dataset == "digits" else min(torch.get_num_threads(), 4)


def describe(config: ImageConfig) -> str:
    """Return a run's settings on one line.

    >>> from tpext.experiments.images import make_image_config
    >>> describe(make_image_config("cifar10", rule="backprop"))
    'cifar10, simple-vgg 128-128-256-256-512, backprop, sgd 0.035 momentum 0.9, batch 128, 90 epochs, seed 1'
    """
    details = [] if config.target_step is None else [f"target step {config.target_step:g}"]
    if config.iterations is not None:
        details.append(f"{'-'.join(map(str, config.counts))} iterations of the feedback")
    rates = "-".join(f"{rate:g}" for rate in config.lr)
    parts = [
        config.dataset,
        f"{config.network} {'-'.join(map(str, config.channels))}",
        config.rule + (f" ({', '.join(details)})" if details else ""),
        f"{config.optimizer} {rates}" + (f" momentum {config.momentum:g}" if config.momentum else ""),
        f"batch {config.batch_size}",
        f"{config.epochs} epochs",
        f"seed {config.seed}",
    ]
    return ", ".join(parts)


class _Run:
    """A run's parts and its loop."""

    def __init__(
        self, config: ImageConfig, task: ImageClasses, plan: ImagePlan, folder: ImageFolder, console: Console
    ) -> None:
        self.config, self.task, self.plan, self.folder, self.console = config, task, plan, folder, console
        self.device = torch.device(config.device)
        self.dtype = torch.float64 if config.precision == "64" else torch.float32
        if config.validation != 0 and task.split_size("validation") == 0:
            raise ConfigError(f"validation must be 0 or leave at least one image, got {config.validation}")

        self.net = config.make_network().to(self.device)
        self.trainer = config.make_trainer(self.net)
        self.optimizer = make_optimizer(config, self.net)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

        self.iteration = 0
        self.rows: list[ImageRow] = []
        self.losses: list[float] = []  # since the last row
        self.seconds_before = 0.0
        self.started = time.perf_counter()

    def carry_out(self, interrupts: list[int]) -> ImageResult:
        config, plan = self.config, self.plan
        state = self.folder.load_checkpoint()
        if state is not None:
            self._restore(state)
        self.folder.write_rows(self.rows)
        self.started = time.perf_counter()
        interval = config.eval_interval or plan.batches
        try:
            with Progress(
                self.console,
                describe(config),
                self.folder.path,
                self.iteration,
                plan.iterations,
                self.rows,
                self.config.evaluated,
            ) as progress:
                if not self.rows:
                    self._add_row(progress)
                    self._checkpoint()
                for iteration in range(self.iteration + 1, plan.iterations + 1):
                    step = plan.step(iteration - 1)
                    self._step(iteration, step)
                    last = iteration == plan.iterations
                    if last or (step.trains_blocks and (step.batch + 1) % interval == 0):
                        self._add_row(progress)
                        self.losses.clear()
                    if iteration % config.checkpoint_interval == 0 or last or interrupts:
                        self._checkpoint()
                    if interrupts and not last:
                        raise KeyboardInterrupt(f"interrupted; a checkpoint is saved at iteration {iteration}")
                    progress.advance(iteration, self.losses[-1] if self.losses else self.rows[-1].train_loss)
        except DivergedError:
            if self.rows:
                draw_image_run(self.folder.path)
            raise
        result = self._result()
        draw_image_run(self.folder.path)
        self.folder.write_result(result)
        return result

    def _batch(self, number: int) -> Batch:
        return self._move(self.task.batch(self.config.seed, number, self.config.batch_size))

    def _move(self, batch: Batch) -> Batch:
        return Batch(batch.input.to(self.device, self.dtype), batch.target.to(self.device))

    def _step(self, iteration: int, step: Step) -> None:
        input, target = self._batch(step.batch)
        self.iteration = iteration
        if not step.trains_blocks:
            assert self.trainer is not None
            self.trainer.step(input)
            return
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = learning_rate(self.config, rate, step.batch // self.plan.batches)
        try:
            trace = self.net.trace(input)
            loss = functional.cross_entropy(trace.output, target)
            if not math.isfinite(value := loss.item()):
                raise DivergedError(iteration, f"the training loss is {value}")
            first = self.config.feedback_first is not False
            if self.trainer is not None and first:
                self.trainer.step(trace)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            if self.trainer is not None and not first:
                self.trainer.step(trace)
            self.optimizer.step()
        except (tpext.SingularError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise DivergedError(iteration, str(error)) from error
        self.losses.append(value)

    @torch.no_grad()
    def _evaluate(self, split: EvaluationSet) -> Scores:
        classes = self.task.output_size
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.net.eval()
        for batch in self.task.evaluation_batches(split, EVALUATION_BATCH):
            input, target = self._move(batch)
            output = self.net(input)
            sums[0] += functional.cross_entropy(output, target, reduction="sum")
            found = output.topk(min(TOP, classes), dim=1).indices == target[:, None]
            sums[1] += found[:, 0].sum()
            sums[2] += found.sum()
        self.net.train()
        loss, accuracy, top5 = (sums / self.task.split_size(split)).tolist()
        return Scores(loss, accuracy, top5 if classes > TOP else None)

    def _add_row(self, progress: Progress) -> None:
        number = max(0, self.plan.step(max(0, self.iteration - 1)).batch)
        input, target = self._batch(number)
        if self.losses:
            train_loss = math.fsum(self.losses) / len(self.losses)
        elif self.rows:  # the feedback alone learned since
            train_loss = self.rows[-1].train_loss
        else:
            with torch.no_grad():
                train_loss = functional.cross_entropy(self.net.eval()(input), target).item()
            self.net.train()
        scores = self._evaluate(self.config.evaluated)
        if not math.isfinite(scores.loss):
            raise DivergedError(self.iteration, f"the {self.config.evaluated} loss is {scores.loss}")
        names = self.config.block_names
        feedback = feedback_angles(self.net, input[:1]) if self.trainer is not None else {}
        exact = self.net.rule.exact
        gradients = {} if exact else gradient_angles(self.net, input, target)
        seen = number + 1 if self.iteration > self.plan.start else 0
        row = ImageRow(
            self.iteration,
            seen / self.plan.batches,
            train_loss,
            *scores,
            self.optimizer.param_groups[0]["lr"],
            round(self._seconds(), 3),
            tuple(feedback.get(name) for name in names),
            tuple(gradients[name].angle if name in gradients else None for name in names),
        )
        if self.iteration and all(row.accuracy > other.accuracy for other in self.rows[1:]):
            self.folder.save_best(
                {"iteration": self.iteration, "accuracy": row.accuracy, "network": self.net.state_dict()}
            )
        self.rows.append(row)
        self.folder.append_row(row)
        progress.row(row)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _checkpoint(self) -> None:
        for name, parameter in self.net.named_parameters():
            if not torch.isfinite(parameter).all():
                raise DivergedError(self.iteration, f"{name} holds NaN or infinite values")
        self.folder.save_checkpoint(
            {
                "iteration": self.iteration,
                "network": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "trainer": None if self.trainer is None else self.trainer.state_dict(),
                "random_state": torch.get_rng_state(),
                "rows": [list(row) for row in self.rows],
                "losses": list(self.losses),
                "seconds": self._seconds(),
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.iteration = state["iteration"]
            self.net.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.trainer is not None:
                self.trainer.load_state_dict(state["trainer"])
            torch.set_rng_state(state["random_state"])
            self.rows = [ImageRow(*row) for row in state["rows"]]
            self.losses = state["losses"]
            self.seconds_before = state["seconds"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(
                f"{self.folder.checkpoint}: not a checkpoint of this run ({type(error).__name__})"
            ) from error

    def _result(self) -> ImageResult:
        config, last = self.config, self.rows[-1]
        test = self._evaluate("test")
        best = max(self.rows[1:], key=lambda row: row.accuracy)
        # The network's last use: it becomes the best one.
        self.net.load_state_dict(self.folder.load_best()["network"])
        best_test = self._evaluate("test")
        return ImageResult(
            dataset=config.dataset,
            network=config.network,
            rule=config.rule,
            seed=config.seed,
            epochs=config.epochs,
            iterations=last.iteration,
            accuracy=test.accuracy,
            top5=test.top5,
            test_loss=test.loss,
            error=1 - test.accuracy,
            best_accuracy=best_test.accuracy,
            best_top5=best_test.top5,
            best_iteration=best.iteration,
            best_evaluation=best.accuracy,
            evaluated_on=self.config.evaluated,
            train_loss=last.train_loss,
            seconds=self._seconds(),
            parameters=sum(parameter.numel() for parameter in self.net.blocks.parameters()),
            device=str(self.device),
            threads=torch.get_num_threads(),
            versions=versions(),
        )
