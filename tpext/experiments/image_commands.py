"""The command ``tpext train images``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from tpext.experiments.checks import ConfigError
from tpext.experiments.feedback_presets import METHODS
from tpext.experiments.image_folder import ImageFolder
from tpext.experiments.image_train import train_images
from tpext.experiments.images import (
    ImageOptimizer,
    ImagePrecision,
    ImagePreset,
    ImageSchedule,
    NetworkName,
    make_image_config,
)
from tpext.experiments.loop import DivergedError
from tpext.experiments.options import (
    DataFolder,
    Flag,
    Integer,
    Integers,
    Number,
    Numbers,
    Pair,
    Switch,
    option,
    report_divergence,
)
from tpext.experiments.progress import say
from tpext.feedback import Indices, Pixels
from tpext.feedback.gradient import SecondTerm
from tpext.rules import Reduction
from tpext.tasks import ImageSetName, Normalization

_METHODS = "\n".join(f"{name}: {method.summary}." for name, method in METHODS.items())


@dataclass(frozen=True)
class TrainImages:
    """Train a network of any layers on images, by learned target propagation unless told otherwise.

    Options of the feedback are lists of one number for all layers that have feedback, or of one for each, from the
    input on; the first layer has none.
    """

    dataset: Annotated[ImageSetName | None, option("{cifar10,mnist,fashion-mnist,digits,imagenet32}", "cifar10")] = None
    """What to learn; digits come with scikit-learn and take seconds, MNIST is downloaded, the others are read from
    --data-dir."""
    network: Annotated[
        NetworkName | None,
        option("{simple-vgg,lenet,resnet18,resnet34,meulemans-convnet,mlp}", "simple-vgg; images below 32 x 32 lenet"),
    ] = None
    """The network."""
    rule: Annotated[str | None, option(f"{{{','.join(METHODS)}}}", "ldrl"), tyro.conf.arg(help=_METHODS)] = None
    preset: Annotated[ImagePreset | None, option("{default,published}", "default")] = None
    """published: every setting as published, where there are any. default: those or the nearest, with a cosine that
    stays at its end, and 20 batches for the feedback alone first; back-propagation at the rates of L-DRL in its own
    units."""
    out: Annotated[Path | None, option("DIR", "runs/DATASET-NETWORK-RULE-SEED")] = None
    """Folder of the run."""
    resume: Switch = False
    """Continue the run in that folder, with its options, from its last checkpoint (or start it if there is none)."""

    channels: Integers = None
    """Channels of each convolution (of each stage of a resnet); units of each hidden layer of the mlp."""
    hidden_size: Integer = None
    """Units of the hidden linear layer (lenet, meulemans-convnet)."""
    batchnorm: Flag = None
    """Batch normalisation; by default in rule fw-dtp alone."""

    target_step: Number = None
    """Size of the first displacement, -target_step * gradient (all rules but backprop)."""
    normalize: Flag = None
    """Divide the local gradients by target_step; published: False (all rules but backprop)."""
    reduction: Annotated[Reduction | None, option("{mean,sum}")] = None
    """sum: displacements are target_step times the gradient of the mean loss, as Meulemans et al. have it, not of each
    sample's own loss (all rules but backprop)."""
    damping: Number = None
    """Of the pseudo-inverse of the Jacobian (rule gnt)."""
    feedback_units: Integer = None
    """Units of the fixed hidden layer (rule ddtp-rhl)."""
    iterations: Integers = None
    """Steps of the feedback a batch; of rule running-ldrl, draws of noise."""
    feedback_scale: Number = None
    """Factor of --iterations, such as 0.1; the results are rounded up."""
    noise: Numbers = None
    """Standard deviation of the noise that trains the feedback."""
    feedback_lr: Numbers = None
    """Learning rate of the feedback."""
    samples: Integer = None
    """Draws of noise that a step of the feedback averages."""
    feedback_optimizer: Annotated[ImageOptimizer | None, option("{sgd,adam}")] = None
    """Optimizer of the feedback."""
    feedback_momentum: Number = None
    """Its momentum (sgd)."""
    feedback_weight_decay: Number = None
    """Its weight decay."""
    feedback_betas: Pair = None
    """Its decay rates (adam)."""
    feedback_eps: Number = None
    """Its small number (adam)."""
    second_term: Annotated[SecondTerm | None, option("{drawn,expected}")] = None
    """The loss's second term by noise, as published, or in expectation (rules ldrl, parallel-ldrl)."""
    indices: Annotated[Indices | None, option("{noisy,clean}")] = None
    """Places of maxima of the noisy pass, as published, or of the clean one (local losses)."""
    pixels: Annotated[Pixels | None, option("{all,grid}")] = None
    """Noise before convolutions on all pixels, or on a grid of one in every k x k, which costs less (second term
    expected, or rule running-ldrl)."""
    decay: Number = None
    """Of the running means (rule running-ldrl)."""
    feedback_first: Flag = None
    """Whether the feedback learns from a batch before the blocks do, or after."""
    feedback_start: Integer = None
    """Batches that train the feedback alone, before the first step of the blocks."""
    feedback_epochs: Integer = None
    """Epochs of that, besides."""
    extra_feedback_epochs: Integer = None
    """Epochs that train the feedback alone after each epoch."""

    optimizer: Annotated[ImageOptimizer | None, option("{sgd,adam}")] = None
    """Optimizer of the blocks."""
    lr: Numbers = None
    """Its learning rate, one for all blocks or one for each."""
    momentum: Number = None
    """Its momentum (sgd)."""
    weight_decay: Number = None
    """Its weight decay."""
    betas: Pair = None
    """Its decay rates (adam)."""
    eps: Numbers = None
    """Its small number, one for all blocks or one for each (adam)."""
    schedule: Annotated[ImageSchedule | None, option("{constant,cosine,cosine-torch,step}")] = None
    """Of the learning rate, epoch by epoch. cosine-torch rises again after --schedule-epochs, as the published runs do;
    step divides by ten every --schedule-epochs."""
    schedule_epochs: Integer = None
    """Epochs of the cosine down to --lr-min, by default 85 / 90 of all; or of a step."""
    lr_min: Number = None
    """Where the cosine ends."""

    epochs: Integer = None
    """Passes through the training images."""
    batch_size: Integer = None
    """Images per step."""
    normalization: Annotated[Normalization | None, option("{standard,3xstd,meulemans,none}")] = None
    """Mean and standard deviation that images are brought to."""
    augment: Switch = False
    """Change training images at random: mirrored, moved."""
    no_augment: Switch = False
    """Leave them as they are. Neither: as in the preset."""
    validation: Annotated[float | None, option("FLOAT", "as published: 0.1; imagenet32 50 images a class")] = None
    """Share of the training images that evaluations are on; with 0 they are on the test set."""
    train_size: Annotated[int | None, option("INT", "all")] = None
    """Number of training images."""
    eval_interval: Annotated[int | None, option("INT", "an epoch")] = None
    """Steps of the blocks between evaluations."""
    checkpoint_interval: Annotated[int | None, option("INT", "500")] = None
    """Steps between checkpoints."""
    seed: Annotated[int | None, option("INT", "1")] = None
    """Seed of the initialization, the data and the noise."""
    precision: Annotated[ImagePrecision | None, option("{32,64}")] = None
    """Float type."""
    device: Annotated[str | None, option("NAME", "cpu")] = None
    """A torch device."""
    threads: Annotated[int | None, option("INT", "1 for digits, else up to 4")] = None
    """CPU threads."""
    data_dir: DataFolder = None
    """Folder with the data set's files."""

    def carry_out(self, console: Console) -> int:
        options = asdict(self)
        out, resume = options.pop("out"), options.pop("resume")
        augment, no_augment = options.pop("augment"), options.pop("no_augment")
        if augment and no_augment:
            raise ConfigError("augment and no_augment exclude each other, got both")
        options["augment"] = True if augment else False if no_augment else None
        options["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        given = {name: value for name, value in options.items() if value is not None}
        if out is None:
            wanted = make_image_config(**given)
            out = Path("runs") / f"{wanted.dataset}-{wanted.network}-{wanted.rule}-{wanted.seed}"
        folder = ImageFolder(out)
        config = (folder.continued(given) if resume else None) or make_image_config(**given)
        try:
            result = train_images(config, out, resume=resume, console=console)
        except DivergedError as error:
            rates = "smaller rates (--lr, --feedback-lr)" if config.feedback_lr is not None else "a smaller --lr"
            start = ", or a larger --feedback-start" if config.feedback_start is not None else ""
            return report_divergence(error, f"{rates}{start}")
        top5 = "" if result.top5 is None else f", top 5 {result.top5:.2%}"
        say(
            console,
            f"test accuracy {result.accuracy:.2%}{top5}; of the best {result.evaluated_on} accuracy "
            f"({result.best_evaluation:.2%} at iteration {result.best_iteration}) {result.best_accuracy:.2%}; "
            f"{result.iterations} iterations in {result.seconds:.1f} s",
        )
        say(console, f"curve: {folder.curve}")
        say(console, f"angles: {folder.angles}")
        return 0
