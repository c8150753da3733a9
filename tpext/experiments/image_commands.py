"""The command ``tpext train images``."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from tpext.experiments.feedback_presets import METHODS, find_network_rule
from tpext.experiments.image_defaults import make_image_config, shown_default
from tpext.experiments.image_folder import ImageFolder
from tpext.experiments.image_train import train_images
from tpext.experiments.images import ImageConfig, ImagePreset, NetworkName
from tpext.experiments.loop import DivergedError
from tpext.experiments.options import DataFolder, OwnOptions, Switch, command, option, options_of, report_divergence
from tpext.experiments.own import parse_options
from tpext.experiments.progress import say
from tpext.experiments.settings import ConfigError
from tpext.tasks import IMAGE_SETS

_METHODS = "\n".join(f"{name}: {method.summary}." for name, method in METHODS.items()) + (
    "\nOr a rule of your own, as module:Class or file.py:Class: a network rule, or a layer rule for the linear layers."
)


@dataclass(frozen=True)
class _TrainImages:
    """Train a network of any layers on images, by learned target propagation unless told otherwise.

    Options of the feedback are lists of one number for all layers that have feedback, or of one for each, from the
    input on; the first layer has none.
    """

    dataset: Annotated[str | None, option(f"{{{','.join(IMAGE_SETS)},FILE.py:NAME}}", "cifar10")] = None
    """What to learn; digits come with scikit-learn and take seconds, MNIST is downloaded, the others are read from
    --data-dir. Or one of your own, a tpext.tasks.ImageSet, as module:NAME or file.py:NAME."""
    network: Annotated[
        NetworkName | None,
        option("{simple-vgg,lenet,resnet18,resnet34,meulemans-convnet,mlp}", "simple-vgg; images below 32 x 32 lenet"),
    ] = None
    """The network."""
    rule: Annotated[str | None, option(f"{{{','.join(METHODS)},FILE.py:CLASS}}", "ldrl", _METHODS)] = None
    rule_options: OwnOptions = ()
    """Options of a rule of your own."""
    preset: Annotated[ImagePreset | None, option("{default,published}", "default")] = None
    """published: every setting as published, where there are any. default: those or the nearest, with a cosine that
    stays at its end, and 20 batches for the feedback alone first; back-propagation at the rates of L-DRL in its own
    units."""
    out: Annotated[Path | None, option("DIR", "runs/DATASET-NETWORK-RULE-SEED")] = None
    """Folder of the run."""
    resume: Switch = False
    """Continue the run in that folder, with its options, from its last checkpoint (or start it if there is none)."""

    augment: Switch = False
    """Change training images at random: mirrored and moved by up to 4 pixels, MNIST's too; digits moved by 1. The
    settings of Ernoult et al. do, those of Meulemans et al. do not. A set of your own does as its flip and
    padding say; without them its images stay as they are."""
    no_augment: Switch = False
    """Leave training images as they are."""
    data_dir: DataFolder = None
    """Folder with the data set's files."""

    def given(self) -> dict[str, Any]:
        """Return the options that were given, as :func:`make_image_config` takes them."""
        options = asdict(self)
        del options["out"], options["resume"]
        augment, no_augment = (options.pop(name) for name in ("augment", "no_augment"))
        if augment and no_augment:
            raise ConfigError("augment and no_augment exclude each other, got both")
        options["augment"] = True if augment else False if no_augment else None
        options["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        options["rule_options"] = for_rule = [*itertools.chain(*self.rule_options)] or None
        if for_rule and self.rule is not None and self.rule not in METHODS:
            options["rule_options"] = parse_options("rule", self.rule, find_network_rule(self.rule), for_rule)
        return {name: value for name, value in options.items() if value is not None}

    def carry_out(self, console: Console) -> int:
        given, out = self.given(), self.out
        if out is None:
            wanted = make_image_config(**given)
            out = Path("runs") / "-".join(
                [*(name.rpartition(":")[2] for name in (wanted.dataset, wanted.network, wanted.rule)), str(wanted.seed)]
            )
        folder = ImageFolder(out)
        config = (folder.continued(given) if self.resume else None) or make_image_config(**given)
        try:
            result = train_images(config, out, resume=self.resume, console=console)
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


TrainImages = command(
    "TrainImages",
    _TrainImages,
    options_of(ImageConfig, ("dataset", "network", "rule", "preset", "augment", "data_dir"), shown_default),
)
