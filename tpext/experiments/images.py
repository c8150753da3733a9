"""The configuration of ``tpext train images``: networks of any layers on images, by learned target propagation.

>>> from tpext.experiments import make_image_config
>>> config = make_image_config("cifar10", "simple-vgg", rule="ldrl", feedback_scale=0.1)
>>> config.counts
(2, 3, 4, 6, 2)
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from torch import nn

from tpext._names import did_you_mean
from tpext.experiments.feedback_presets import METHODS, Method, find_method, set_layer_rule
from tpext.experiments.feedback_settings import MEULEMANS_NETWORKS
from tpext.experiments.own import as_config_errors, find_own, is_path
from tpext.experiments.settings import (
    ConfigError,
    check_device_name,
    check_integer,
    check_number,
    choices_of,
    described,
    free_fields,
)
from tpext.feedback import FeedbackTrainer, Indices, Pixels, layered_feedback
from tpext.feedback.gradient import SecondTerm
from tpext.nn import TargetSequential
from tpext.nn.networks import Blocks, lenet, meulemans_convnet, meulemans_mlp, resnet18, resnet34, simple_vgg
from tpext.rules import Reduction
from tpext.tasks import IMAGE_SETS, ImageClasses, ImageSet, Normalization

NetworkName = Literal["simple-vgg", "lenet", "resnet18", "resnet34", "meulemans-convnet", "mlp"]
ImagePreset = Literal["default", "published"]
ImageOptimizer = Literal["sgd", "adam"]
ImageSchedule = Literal["constant", "cosine", "cosine-torch", "step"]
ImagePrecision = Literal["32", "64"]
EvaluationSet = Literal["validation", "test"]

HIDDEN_NETWORKS = ("lenet", "meulemans-convnet")
"""The networks with a hidden linear layer behind the convolutions."""
RESNETS = ("resnet18", "resnet34")
STEP_FACTOR = 0.1
"""What the step schedule multiplies the rates by."""


METHOD_OPTIONS = tuple(dict.fromkeys(option for method in METHODS.values() for option in method.options))
"""The options that some methods do not have."""


def find_image_set(name: str, folder: str | None = None) -> str | ImageSet:
    """Return the name of a data set of the package, or a user's own, by where it stands: ``file.py:NAME``.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in IMAGE_SETS:
        return name
    if not is_path(name):
        raise ConfigError(
            f"dataset must be one of {', '.join(IMAGE_SETS)}, or module:NAME or file.py:NAME for one of your own, "
            f"got {name!r}{did_you_mean(name, IMAGE_SETS)}"
        )
    found = find_own("dataset", name, folder)
    if not isinstance(found, ImageSet):
        raise ConfigError(f"dataset {name}: {name.rpartition(':')[2]} must be a tpext.tasks.ImageSet, got {found!r}")
    return found


@dataclass(frozen=True)
class ImageConfig:
    """Everything that a run depends on. :func:`make_image_config` fills it; ``tpext train images --help`` explains the
    fields. Those that the method does not have are None.
    """

    dataset: str
    network: NetworkName
    rule: str
    preset: ImagePreset
    channels: tuple[int, ...] = described(
        "Channels of each convolution (of each stage of a resnet); units of each hidden layer of the mlp."
    )
    hidden_size: int | None = described("Units of the hidden linear layer (lenet, meulemans-convnet).")
    batchnorm: bool = described("Batch normalisation; by default in rule fw-dtp alone.")
    target_step: float | None = described(
        "Size of the first displacement, -target_step * gradient (all rules but backprop)."
    )
    normalize: bool | None = described(
        "Divide the local gradients by target_step; published: False (all rules but backprop)."
    )
    reduction: Reduction | None = described(
        "sum: displacements are target_step times the gradient of the mean loss, as Meulemans et al. have it,"
        " not of each sample's own loss (all rules but backprop)."
    )
    damping: float | None = described("Of the pseudo-inverse of the Jacobian (rule gnt).")
    feedback_units: int | None = described("Units of the fixed hidden layer (rule ddtp-rhl).")
    iterations: tuple[int, ...] | None = described(
        "Steps of the feedback a batch (of rule running-ldrl, draws of noise); how long a run takes is --epochs."
    )
    feedback_scale: float | None = described("Factor of --iterations, such as 0.1; the results are rounded up.")
    noise: tuple[float, ...] | None = described("Standard deviation of the noise that trains the feedback.")
    feedback_lr: tuple[float, ...] | None = described("Learning rate of the feedback.")
    samples: int | None = described("Draws of noise that a step of the feedback averages.")
    feedback_optimizer: ImageOptimizer | None = described("Optimizer of the feedback.")
    feedback_momentum: float | None = described("Its momentum (sgd).")
    feedback_weight_decay: float | None = described("Its weight decay.")
    feedback_betas: tuple[float, float] | None = described("Its decay rates (adam).")
    feedback_eps: float | None = described("Its small number (adam).")
    second_term: SecondTerm | None = described(
        "The loss's second term by noise, as published, or in expectation (rules ldrl, parallel-ldrl)."
    )
    indices: Indices | None = described(
        "Places of maxima of the noisy pass, as published, or of the clean one (local losses)."
    )
    pixels: Pixels | None = described(
        "Noise before convolutions on all pixels, or on a grid of one in every k x k, which costs less "
        "(second term expected, or rule running-ldrl)."
    )
    decay: float | None = described("Of the running means (rule running-ldrl).")
    feedback_first: bool | None = described("Whether the feedback learns from a batch before the blocks do, or after.")
    feedback_start: int | None = described(
        "Batches that train the feedback alone, before the first step of the blocks."
    )
    feedback_epochs: int | None = described("Epochs of that, besides.")
    extra_feedback_epochs: int | None = described("Epochs that train the feedback alone after each epoch.")
    optimizer: ImageOptimizer = described("Optimizer of the blocks.")
    lr: tuple[float, ...] = described("Its learning rate, one for all blocks or one for each.")
    momentum: float = described("Its momentum (sgd).")
    weight_decay: float = described("Its weight decay.")
    betas: tuple[float, float] | None = described("Its decay rates (adam).")
    eps: tuple[float, ...] | None = described("Its small number, one for all blocks or one for each (adam).")
    schedule: ImageSchedule = described(
        "Of the learning rate, epoch by epoch. cosine-torch rises again after --schedule-epochs, as the "
        "published runs do; step divides by ten every --schedule-epochs."
    )
    schedule_epochs: int | None = described(
        "Epochs of the cosine down to --lr-min, by default 85 / 90 of all; or of a step."
    )
    lr_min: float = described("Where the cosine ends.")
    epochs: int = described("Passes through the training images.")
    batch_size: int = described("Images per step.")
    normalization: Normalization = described("Mean and standard deviation that images are brought to.")
    augment: bool = described("Change training images at random: mirrored, moved (as the data set says).")
    validation: float | None = described(
        "Share of the training images that evaluations are on; with 0 they are on the test set.",
        "as published: 0.1; imagenet32 50 images a class",
    )
    train_size: int | None = described("Number of training images.", "all")
    eval_interval: int | None = described("Steps of the blocks between evaluations.", "an epoch")
    checkpoint_interval: int = described("Steps between checkpoints.")
    seed: int = described("Seed of the initialization, the data and the noise.")
    precision: ImagePrecision = described("Float type.")
    device: str = described("A torch device.")
    threads: int | None = described("CPU threads.", "1 for digits, else up to 4")
    data_dir: str | None = described("Folder with the data set's files.")
    # of a user's own rule and data set: its options, and where their paths were typed
    rule_options: Mapping[str, Any] | None = None
    rule_folder: str | None = None
    dataset_folder: str | None = None

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("batch_size", "epochs", "checkpoint_interval"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0, 2**63 - 1)
        for name, low in (
            ("hidden_size", 1),
            ("feedback_units", 1),
            ("samples", 1),
            ("feedback_start", 0),
            ("feedback_epochs", 0),
            ("extra_feedback_epochs", 0),
            ("schedule_epochs", 1),
            ("train_size", 1),
            ("eval_interval", 1),
            ("threads", 1),
        ):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), low)
        for name in ("momentum", "weight_decay", "lr_min"):
            check_number(name, getattr(self, name))
        for name in ("target_step", "feedback_scale", "damping", "feedback_momentum", "feedback_weight_decay", "decay"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=name in ("target_step", "feedback_scale"))
        for name in ("decay", "momentum", "feedback_momentum"):
            if (getattr(self, name) or 0) >= 1:
                raise ConfigError(f"{name} must be below 1, got {getattr(self, name):g}")
        if self.pixels == "grid" and self.second_term not in (None, "expected"):
            raise ConfigError(f"pixels=grid needs second_term=expected, got {self.second_term}")
        self._check_network()
        self._check_lists()
        self._check_schedule()
        try:
            self.make_task()
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("ImageClasses: ")) from error

    def _check_network(self) -> None:
        for size in self.channels:
            check_integer("channels", size, 1)
        if (self.hidden_size is None) != (self.network not in HIDDEN_NETWORKS):
            raise ConfigError(f"hidden_size does not belong to network={self.network}, got {self.hidden_size!r}")
        try:
            names = self.block_names
        except ValueError as error:
            raise ConfigError(f"network={self.network} cannot be built for {self.dataset}: {error}") from error
        if len(names) < 2:
            raise ConfigError(f"channels must be at least one number, got {self.channels}")

    def _check_lists(self) -> None:
        layers = self.block_names[1:]
        for name, count, what in (
            ("iterations", len(layers), f"the {len(layers)} layers with feedback ({', '.join(layers)})"),
            ("noise", len(layers), f"the {len(layers)} layers with feedback ({', '.join(layers)})"),
            ("feedback_lr", len(layers), f"the {len(layers)} layers with feedback ({', '.join(layers)})"),
            ("lr", len(layers) + 1, f"the {len(layers) + 1} layers ({', '.join(self.block_names)})"),
            ("eps", len(layers) + 1, f"the {len(layers) + 1} layers ({', '.join(self.block_names)})"),
        ):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) not in (1, count):
                raise ConfigError(f"{name} must be one number or one for each of {what}, got {len(values)}")
            for value in values:
                if name == "iterations":
                    check_integer(name, value, 1)
                else:
                    check_number(name, value, above=name in ("noise", "feedback_lr"))
        for name in ("betas", "feedback_betas"):
            betas = getattr(self, name)
            if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
                raise ConfigError(f"{name} must be two numbers >= 0 and below 1, got {betas!r}")
        if self.feedback_optimizer == "adam" and self.feedback_lr is not None and len(self.feedback_lr) != 1:
            raise ConfigError(f"feedback_lr must be one number with feedback_optimizer=adam, got {self.feedback_lr}")

    def _check_schedule(self) -> None:
        for name, value, needed in (
            ("schedule_epochs", self.schedule_epochs, self.schedule != "constant"),
            ("betas", self.betas, self.optimizer == "adam"),
            ("eps", self.eps, self.optimizer == "adam"),
            ("feedback_betas", self.feedback_betas, self.feedback_optimizer == "adam"),
            ("feedback_eps", self.feedback_eps, self.feedback_optimizer == "adam"),
        ):
            if (value is not None) != needed:
                choice = "schedule" if name == "schedule_epochs" else "optimizer"
                choice = f"feedback_{choice}" if name.startswith("feedback_") else choice
                does = "is needed by" if needed else "does not belong to"
                raise ConfigError(f"{name} {does} {choice}={getattr(self, choice)}, got {value!r}")
        if self.momentum and self.optimizer == "adam":
            raise ConfigError(f"momentum does not belong to optimizer=adam, got {self.momentum:g}")

    @property
    def title(self) -> str:
        """Data set and network: what runs must share to be compared."""
        return f"{self.dataset}, {self.network}"

    @property
    def evaluated(self) -> EvaluationSet:
        """The set that evaluations are on."""
        return "test" if self.validation == 0 else "validation"

    @property
    def counts(self) -> tuple[int, ...]:
        """Iterations of the feedback (or draws) a batch, ``iterations`` times ``feedback_scale``, rounded up."""
        # rounded first, as 0.1 * 30 is above 3
        scale = self.feedback_scale or 1.0
        return tuple(max(1, math.ceil(round(count * scale, 9))) for count in self.iterations or ())

    @property
    def method(self) -> Method:
        """The method that the rule names."""
        return find_method(self.rule, self.rule_folder)

    @functools.cached_property
    def block_names(self) -> tuple[str, ...]:
        """Names of the network's blocks."""
        # the same for any number of classes, which may take the files to know
        return tuple(_blocks(self, self.make_task(), 1, "meta"))

    def make_task(self) -> ImageClasses:
        """Return the task, which reads no data yet."""
        folder = None if self.data_dir is None else Path(self.data_dir)
        images = find_image_set(self.dataset, self.dataset_folder)
        return ImageClasses(images, self.normalization, self.augment, self.validation, self.train_size, data_dir=folder)

    def make_blocks(self, device: str = "cpu", task: ImageClasses | None = None) -> Blocks:
        """Return the blocks of the network, initialised from torch's random state; see :meth:`make_network`."""
        task = task or self.make_task()
        with data_errors(self, task):
            classes = task.output_size
        return _blocks(self, task, classes, device)

    def make_network(self, task: ImageClasses | None = None) -> TargetSequential:
        """Return the network with its feedback, both initialised from torch's random state, the blocks first.

        Args:
            task: what :meth:`make_task` has returned. Of a set that does not say its number of classes the files are
                read, unless they were by this task.

        Raises:
            ConfigError: the method does not go with the network.
        """
        method = self.method
        task = task or self.make_task()
        blocks = self.make_blocks(task=task)
        if method.linear is not None:
            set_layer_rule(blocks, method.linear(self))
        meulemans = self.network in MEULEMANS_NETWORKS
        feedback = layered_feedback(list(blocks.values())) if method.layered and meulemans else None
        try:
            net = TargetSequential(blocks, rule=method.rule(self), input_shape=task.shape, feedback=feedback)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"rule={self.rule} does not go with {self._structure}: {error}") from error
        if meulemans:
            _initialize_feedback(net)
        return net.to(torch.float64 if self.precision == "64" else torch.float32)

    @property
    def _structure(self) -> str:
        return f"network={self.network}" + (" and batchnorm=True" if self.batchnorm else "")

    def make_trainer(self, net: TargetSequential) -> FeedbackTrainer | None:
        """Return the trainer of a network's feedback, None if the method has none.

        Raises:
            ConfigError: the method does not go with the network.
        """
        make = self.method.trainer
        try:
            return None if make is None else make(net, self)
        except ValueError as error:
            raise ConfigError(f"rule={self.rule} does not go with {self._structure}: {error}") from error

    def options(self) -> dict[str, Any]:
        """Return the value of every option of :func:`make_image_config` by its name; those of a user's rule after
        ``rule_options.``.
        """
        return options_in(self.to_dict())

    def carried_out(self, asked: Mapping[str, Any]) -> ImageConfig:
        """Return the configuration with those of the options asked for that a resumed run may change."""
        return replace(self, **free_fields(asked))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as config.json holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageConfig:
        """Return the configuration that :meth:`to_dict` wrote.

        Raises:
            ConfigError: a field is missing, unknown or out of its range.
        """
        try:
            read: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
            return cls(**read)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not the configuration of a run of this version: {error}") from error


@contextlib.contextmanager
def data_errors(config: ImageConfig, task: ImageClasses) -> Iterator[None]:
    """Make ValueErrors about a data set ConfigErrors, which name it as the user has; but one from a user's file stays,
    to be shown with its place there.
    """
    try:
        with as_config_errors():
            yield
    except ConfigError as error:
        text = str(error)
        named = text.removeprefix(f"{task.name}: ")
        raise ConfigError(text if named == text else f"dataset {config.dataset}: {named}") from error


def options_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what :meth:`ImageConfig.options` does, of the values of :meth:`ImageConfig.to_dict`."""
    apart = ("rule_options", "rule_folder", "dataset_folder")
    own = values.get("rule_options") or {}
    found = {name: value for name, value in values.items() if name not in apart}
    return {**found, **{f"rule_options.{name}": value for name, value in own.items()}}


def _blocks(config: ImageConfig, task: ImageClasses, n_classes: int, device: str) -> Blocks:
    common: dict[str, Any] = {"n_classes": n_classes, "use_batchnorm": config.batchnorm, "device": device}
    if config.network == "mlp":
        bias = config.method.last_hidden_bias
        return meulemans_mlp(task.input_size, config.channels, last_hidden_bias=bias, **common)
    if config.network in RESNETS:
        build: Any = resnet18 if config.network == "resnet18" else resnet34
    elif config.network == "simple-vgg":
        build = simple_vgg
    else:
        build = lenet if config.network == "lenet" else meulemans_convnet
        common["hidden_size"] = config.hidden_size
    blocks: Blocks = build(task.shape, channels=config.channels, **common)
    return blocks


@torch.no_grad()
def _initialize_feedback(net: TargetSequential) -> None:
    """Weights Xavier-normal and biases zero, as the blocks of these networks are."""
    for parameter in net.feedback.parameters():
        if parameter.dim() < 2:
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_normal_(parameter)


def _check_choices(config: ImageConfig) -> None:
    for name, hint in get_type_hints(ImageConfig).items():
        value, choices = getattr(config, name), choices_of(hint)
        if choices and value not in choices and not (name in METHOD_OPTIONS and value is None):
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    own = config.method.options
    for name in METHOD_OPTIONS:
        if name in own and getattr(config, name) is None and "_betas" not in name and "_eps" not in name:
            raise ConfigError(f"{name} is needed by rule={config.rule}, got None")
        if name not in own and getattr(config, name) is not None:
            raise ConfigError(f"{name} does not belong to rule={config.rule}, got {getattr(config, name)!r}")
    for name in ("batchnorm", "augment", "normalize", "feedback_first"):
        if not isinstance(getattr(config, name), bool) and not (name in METHOD_OPTIONS and name not in own):
            raise ConfigError(f"{name} must be True or False, got {getattr(config, name)!r}")
    check_device_name(config.device)
