"""Where every option of ``tpext train images`` starts: the methods' settings, fitted to network and data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, get_args

from tpext.experiments.config import OptionValue
from tpext.experiments.feedback_presets import METHODS, Method, find_method, find_network_rule
from tpext.experiments.feedback_settings import Case, Values, is_small
from tpext.experiments.field_help import help_of
from tpext.experiments.images import (
    HIDDEN_NETWORKS,
    METHOD_OPTIONS,
    RESNETS,
    ImageConfig,
    ImagePreset,
    NetworkName,
    find_image_set,
)
from tpext.experiments.own import place_of
from tpext.experiments.rule_names import make_rule
from tpext.experiments.settings import ConfigError, check_integer
from tpext.tasks import IMAGE_SETS

COSINE_SHARE = 85 / 90
"""Share of the epochs after which the cosine has arrived at ``lr_min``, as published."""
SMALL_EPOCHS = 10


def make_image_config(
    dataset: str = "cifar10",
    network: str | None = None,
    *,
    rule: str = "ldrl",
    preset: ImagePreset = "default",
    rule_options: Mapping[str, Any] | None = None,
    **options: OptionValue | Sequence[int] | Sequence[float],
) -> ImageConfig:
    """Return the configuration of a run: a preset, and the options that differ from it.

    Args:
        dataset: one of :data:`tpext.tasks.IMAGE_SETS`; or the import path of one of your own, "module:NAME" or
            "file.py:NAME".
        network: a :data:`NetworkName`; None is "lenet" for images below 32 x 32, else "simple-vgg".
        rule: a method, one of :data:`tpext.experiments.feedback_presets.METHODS`; or the import path of a network rule
            or a layer rule of your own. Feedback that a network rule makes is trained as under "ldrl"; a layer rule is
            that of the linear layers, and all else learns by back-propagation.
        preset: "published": the settings of the publication, and a ConfigError where there are none. "default": the
            same where there are any, and the nearest where not, with what :mod:`tpext.experiments.feedback_settings`
            says it changes: the cosine stays at its end instead of rising again (as torch's does after ``T_max`` = 85
            of 90 epochs), the feedback trains alone for 20 batches first, and "backprop" takes the rates that L-DRL has
            in back-propagation's units, ``target_step`` times its own.
        rule_options: of a rule of your own.
        options: any field of :class:`ImageConfig`; None means "as in the preset". A list may be given as one number.

    Raises:
        ConfigError: an option is unknown, does not belong to the method, or is out of its range.

    >>> make_image_config("cifar10", "lenet", preset="published").target_step
    0.4655
    """
    given: Values = {name: value for name, value in options.items() if value is not None}
    for name, value, choices in (("network", network, NetworkName), ("preset", preset, ImagePreset)):
        if value not in get_args(choices) and not (name == "network" and value is None):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
    method = find_method(rule)
    if rule_options and rule in METHODS:
        raise ConfigError("rule_options belong to a rule of your own, ours have options of their own names")
    _check_given(given, rule, method)
    images = find_image_set(dataset)
    known_set = IMAGE_SETS[images] if isinstance(images, str) else images
    shape = known_set.shape
    if network is None:
        network = "lenet" if shape[1] < 32 else "simple-vgg"
    sizes = _sizes(shape, network)
    channels: tuple[int, ...] = (sizes | given)["channels"]
    layers = len(channels) + (1 if network in HIDDEN_NETWORKS or network in RESNETS else 0)
    case = Case(dataset, network, layers, shape, tuple(known_set.scales), channels, given.get("batch_size"))
    found = _settings(case, rule, method, preset, given)
    if known_set.augmentation is None:
        if given.get("augment"):
            raise ConfigError(f"augment has no effect on dataset={dataset}, whose flip and padding are 0")
        found["augment"] = False
    values: Values = {**dict.fromkeys(_KNOWN), **sizes, **_SHARED}
    values |= {name: value for name, value in found.items() if name not in METHOD_OPTIONS or name in method.options}
    values |= {**given, "dataset": dataset, "network": network, "rule": rule, "preset": preset}
    # what is a user's own has the name by which it was found first
    if (place := place_of(images)) is not None:
        values["dataset"], values["dataset_folder"] = place
    if rule not in METHODS:
        kind = find_network_rule(rule)
        values["rule"], values["rule_folder"] = place_of(kind) or (rule, None)
        values["rule_options"] = asdict(make_rule(kind, rule_options or {}))
    return ImageConfig(**values)


_KNOWN = {field.name for field in fields(ImageConfig)} - {"rule_options", "rule_folder", "dataset_folder"}
_TUPLES = ("channels", "iterations", "noise", "feedback_lr", "lr", "eps", "betas", "feedback_betas")


def _check_given(given: Values, rule: str, method: Method) -> None:
    """Check the names of options, and make tuples of lists and of single numbers, in place."""
    for name in given:
        if name not in _KNOWN:
            raise ConfigError(f"unknown option {name}")
        if name in METHOD_OPTIONS and name not in method.options:
            own = ", ".join(method.options) or "none"
            what = help_of(ImageConfig, name)
            raise ConfigError(f"{name} does not belong to rule={rule} (options of that rule: {own}). {name}: {what}")
    for name in _TUPLES:
        if name in given:
            given[name] = tuple(given[name]) if isinstance(given[name], (list, tuple)) else (given[name],)
    for name in ("batch_size", "epochs"):
        if name in given:
            check_integer(name, given[name], 1)


def _settings(case: Case, rule: str, method: Method, preset: ImagePreset, given: Values) -> Values:
    """Return the fields that the preset sets, fitted to the optimizers and the schedule given."""
    found = method.values(case)
    if case.small:
        found |= {"epochs": SMALL_EPOCHS, "batch_size": 32}
    if preset == "published":
        published = method.published(case)
        if published is None:
            raise ConfigError(
                f"no settings were published for rule={rule}, dataset={case.dataset}, network={case.network}"
            )
        found = published
    elif found["schedule"] == "cosine":
        found["schedule_epochs"] = max(1, round((found | given)["epochs"] * COSINE_SHARE))
    if "optimizer" in given and given["optimizer"] != found["optimizer"]:
        found |= _other_optimizer(given["optimizer"])
    if given.get("feedback_optimizer", found.get("feedback_optimizer")) != found.get("feedback_optimizer"):
        adam = given["feedback_optimizer"] == "adam"
        found |= {"feedback_betas": (0.9, 0.999) if adam else None, "feedback_eps": 1e-8 if adam else None}
        found |= {"feedback_lr": (1e-3,), "feedback_momentum": 0.0 if adam else 0.9}
    if given.get("schedule") == "constant":
        found["schedule_epochs"] = None
    return found


_SHARED: Values = {
    "batchnorm": False,
    "checkpoint_interval": 500,
    "seed": 1,
    "device": "cpu",
}


def shown_default(name: str) -> str | None:
    """Return how the default of an option shows in the help, None if the methods have their own."""
    return str(_SHARED[name]) if name in _SHARED else None


def _other_optimizer(name: str) -> Values:
    adam = name == "adam"
    return {
        "lr": (1e-3,) if adam else (0.01,),
        "momentum": 0.0 if adam else 0.9,
        "betas": (0.9, 0.999) if adam else None,
        "eps": (1e-8,) if adam else None,
    }


def _sizes(shape: tuple[int, int, int], network: str) -> Values:
    """Channels and hidden units: the published ones, small ones for small images."""
    small = is_small(shape)
    channels: tuple[int, ...]
    if network == "simple-vgg":
        channels = (16, 32) if small else (128, 128, 256, 256, 512)[: 5 if shape[1] >= 32 else 4]
    elif network in RESNETS:
        channels = (8, 16) if small else (64, 128, 256, 512)
    elif network == "mlp":
        channels = (64, 64) if small else (1024,) * 3 if shape[0] == 3 else (256,) * 5
    else:
        channels = (8, 16) if small else (32, 64)
    hidden = (64 if small else 512) if network in HIDDEN_NETWORKS else None
    return {"channels": channels, "hidden_size": hidden}
