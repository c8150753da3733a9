"""The training loop of networks on images: feedback and blocks learn side by side, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

from tpext.diagnostics import feedback_angles, gradient_angles
from tpext.experiments.feedback_settings import is_small
from tpext.experiments.image_folder import ImageFolder, ImageResult, ImageRow
from tpext.experiments.images import STEP_FACTOR, EvaluationSet, ImageConfig, data_errors
from tpext.experiments.loop import Run, carry_out
from tpext.experiments.passes import Course
from tpext.experiments.run_folder import AnyRunFolder, RunError
from tpext.experiments.saved_state import load
from tpext.experiments.settings import ConfigError
from tpext.nn import TargetSequential
from tpext.tasks import ImageClasses

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
    def of(cls, config: ImageConfig, task: ImageClasses, trains_feedback: bool = True) -> ImagePlan:
        """Return the plan of a configuration; reads the task's data. Without feedback that is trained, the phases that
        train it alone are left out.

        Raises:
            ConfigError: a batch is larger than the training set.
            MissingDataError: the task's data is not there.
        """
        try:
            batches = task.epoch_length(config.batch_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if not trains_feedback:
            return cls(0, batches, config.epochs, 0)
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
    config: ImageConfig,
    out: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    stop: Callable[[], bool] | None = None,
    callback: Callable[[ImageRow, nn.Module], None] | None = None,
) -> ImageResult:
    """Run a configuration in a folder, to its last iteration.

    A batch runs through the network once; the trainer of the feedback and the backward pass share that pass. With
    ``feedback_first`` the targets go through the feedback as this batch left it, else as the one before did. A run that
    is killed and resumed ends with the same parameters, bit for bit, and the same metrics, times apart (on the same
    device, threads and versions). Evaluations draw no random numbers and train nothing.

    Args, raises: as :func:`tpext.experiments.train.train`.
    """
    threads = config.threads or default_threads(config)
    return carry_out(
        _Run,
        config,
        ImageFolder(out),
        threads=threads,
        resume=resume,
        console=console,
        stop=stop,
        callback=callback,
    )


def default_threads(config: ImageConfig) -> int:
    """Return the CPU threads of a run that names none: 1 for small images, else torch's up to 4."""
    return 1 if is_small(config.make_task().shape) else min(torch.get_num_threads(), 4)


def describe(config: ImageConfig) -> str:
    """Return a run's settings on one line.

    >>> from tpext.experiments import make_image_config
    >>> describe(make_image_config("cifar10", rule="backprop", augment=False))
    'cifar10, simple-vgg 128-128-256-256-512, backprop, sgd 0.035 momentum 0.9, batch 128, 90 epochs, seed 1'
    >>> describe(make_image_config("cifar10", rule="backprop")).partition("seed 1, ")[2]
    'images mirrored and moved by up to 4 pixels'
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
    if (augmentation := config.make_task().augmentation) is not None:
        parts.append(f"images {augmentation}")
    return ", ".join(parts)


class _Run(Run[ImageConfig, ImageRow, ImageResult]):
    row_class = ImageRow
    model: TargetSequential
    task: ImageClasses

    def __init__(
        self, config: ImageConfig, folder: AnyRunFolder[ImageConfig, ImageRow, ImageResult], console: Console
    ) -> None:
        super().__init__(config, folder, console)
        assert isinstance(folder, ImageFolder)
        self.best = folder
        self.task = config.make_task()
        self.description = describe(config)
        self.evaluated = config.evaluated
        with data_errors(config, self.task):
            held_out = self.task.split_size("validation")
        if config.validation != 0 and held_out == 0:
            raise ConfigError(f"validation must be 0 or leave at least one image, got {config.validation}")

        self.model = config.make_network(self.task).to(self.device)
        self.trainer = config.make_trainer(self.model)
        self.plan = ImagePlan.of(config, self.task, self.trainer is not None)
        self.iterations = self.plan.iterations
        self.optimizer = make_optimizer(config, self.model)
        self.parts = {"network": self.model, "optimizer": self.optimizer, "trainer": self.trainer}
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def _step(self, iteration: int) -> Course[None]:
        yield from ()  # nobody joins its passes
        step = self.plan.step(iteration - 1)
        input, target = self._batch(step.batch)
        if not step.trains_blocks:
            assert self.trainer is not None
            self.trainer.step(input)
            return
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = learning_rate(self.config, rate, step.batch // self.plan.batches)
        trace = self.model.trace(input)
        loss = functional.cross_entropy(trace.output, target)
        value = self._watch(loss.item(), "training loss")
        first = self.config.feedback_first is not False
        if self.trainer is not None and first:
            self.trainer.step(trace)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        if self.trainer is not None and not first:
            self.trainer.step(trace)
        self.optimizer.step()
        self.losses.append(value)

    def _evaluates(self, iteration: int) -> bool:
        step = self.plan.step(iteration - 1)
        return step.trains_blocks and (step.batch + 1) % (self.config.eval_interval or self.plan.batches) == 0

    @torch.no_grad()
    def _evaluate(self, split: EvaluationSet) -> Scores:
        classes = self.task.output_size
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.model.eval()
        for batch in self.task.evaluation_batches(split, EVALUATION_BATCH):
            input, target = self._move(batch)
            output = self.model(input)
            sums[0] += functional.cross_entropy(output, target, reduction="sum")
            found = output.topk(min(TOP, classes), dim=1).indices == target[:, None]
            sums[1] += found[:, 0].sum()
            sums[2] += found.sum()
        self.model.train()
        loss, accuracy, top5 = (sums / self.task.split_size(split)).tolist()
        return Scores(loss, accuracy, top5 if classes > TOP else None)

    @torch.no_grad()
    def _first_loss(self) -> float:
        input, target = self._batch(0)
        loss = functional.cross_entropy(self.model.eval()(input), target).item()
        self.model.train()
        return loss

    def _row(self, train_loss: float) -> ImageRow:
        number = self.plan.step(max(0, self.iteration - 1)).batch
        input, target = self._batch(number)
        scores = self._evaluate(self.config.evaluated)
        self._watch(scores.loss, f"{self.evaluated} loss")
        names = self.config.block_names
        feedback = feedback_angles(self.model, input[:1]) if self.trainer is not None else {}
        gradients = {} if self.model.rule.exact else gradient_angles(self.model, input, target)
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
            self.best.save_best(
                {"iteration": self.iteration, "accuracy": row.accuracy, "network": self.model.state_dict()}
            )
        return row

    def _take_over(self, state: dict[str, Any]) -> None:
        super()._take_over(state)
        count = len(self.config.block_names)
        for index, row in enumerate(self.rows):
            for name in ("feedback_angles", "gradient_angles"):
                if len(getattr(row, name)) != count:
                    raise ValueError(f"rows[{index}].{name} must be {count} angles, got {getattr(row, name)}")

    def _draw(self) -> None:
        from tpext.experiments.figures import draw_image_run

        draw_image_run(self.folder.path)

    def _result(self) -> ImageResult:
        config, best = self.config, self._best_row()
        test = self._evaluate("test")
        # The network's last use: it becomes the best one.
        try:
            load(self.best.load_best(), "network", self.model)
        except ValueError as error:
            raise RunError(f"{self.best.best}: not a checkpoint of this run: {error}") from error
        best_test = self._evaluate("test")
        return ImageResult(
            dataset=config.dataset,
            network=config.network,
            rule=config.rule,
            epochs=config.epochs,
            accuracy=test.accuracy,
            top5=test.top5,
            test_loss=test.loss,
            error=1 - test.accuracy,
            best_accuracy=best_test.accuracy,
            best_top5=best_test.top5,
            best_iteration=best.iteration,
            best_evaluation=best.accuracy,
            evaluated_on=config.evaluated,
            seconds=self._seconds(),
            parameters=sum(parameter.numel() for parameter in self.model.blocks.parameters()),
            **self._outcome(),
        )
