"""Which iteration of a run takes which batch, and what it trains: a pure function of its number."""

from __future__ import annotations

from dataclasses import dataclass

from tpext.experiments.config import Config
from tpext.experiments.own import as_config_errors
from tpext.experiments.settings import ConfigError
from tpext.tasks import Task


@dataclass(frozen=True)
class Plan:
    """The iterations of a run, counted from 0.

    Alternating, the ``batches`` of an epoch come twice: first for the reverse layers alone, then for all others.
    """

    iterations: int
    eval_interval: int
    batches: int | None
    alternating: bool

    @classmethod
    def of(cls, config: Config, task: Task) -> Plan:
        """Return the plan of a configuration; reads the task's data if it has any.

        Raises:
            ConfigError: a batch is larger than the training set, or another option does not go with the data.
            MissingDataError: the task's data is not there.
        """
        with as_config_errors():
            batches = task.epoch_length(config.batch_size)
        if batches is not None and batches < 1:
            raise ConfigError(
                f"{config.task_name}: epoch_length must be >= 1, the whole batches of {config.batch_size} samples, "
                f"got {batches}"
            )
        alternating = config.schedule == "alternating"
        epoch = (batches or 0) * (2 if alternating else 1)
        iterations = config.iterations if config.epochs is None else config.epochs * epoch
        assert iterations is not None
        return cls(iterations, config.eval_interval or epoch, batches, alternating)

    def batch(self, iteration: int) -> int:
        """Number of the batch that an iteration takes."""
        if not self.alternating or self.batches is None:
            return iteration
        epoch, index = divmod(iteration, 2 * self.batches)
        return epoch * self.batches + index % self.batches

    def trains_reverse(self, iteration: int) -> bool:
        """Whether an iteration trains the reverse layers, if there are any."""
        return not self.alternating or self.batches is None or iteration % (2 * self.batches) < self.batches

    def trains_forward(self, iteration: int) -> bool:
        """Whether an iteration trains all but the reverse layers."""
        return not self.alternating or not self.trains_reverse(iteration)
