"""The command ``tpext train``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from rich.console import Console

from tpext.experiments.config import Config, make_config
from tpext.experiments.defaults import SEQUENCE, shown_default
from tpext.experiments.field_help import help_of
from tpext.experiments.loop import DivergedError
from tpext.experiments.options import (
    DEFAULT,
    DataFolder,
    Option,
    OwnOptions,
    Switch,
    option,
    options_of,
    report_divergence,
)
from tpext.experiments.options import (
    command as make_command,
)
from tpext.experiments.own import parse_options
from tpext.experiments.presets import PRESETS
from tpext.experiments.progress import say
from tpext.experiments.rule_names import (
    DEFAULT_LAYER_RULE,
    DEFAULT_RULE,
    LAYER_RULES,
    RULES,
    SEQUENCE_RULES,
    find_rule,
)
from tpext.experiments.run_folder import RunFolder
from tpext.experiments.settings import choices_of, of_text
from tpext.experiments.task_names import NOT_OPTIONS, find_task, is_own, task_options
from tpext.experiments.train import train
from tpext.tasks import TASKS

_PRESETS = "; ".join(
    [
        "default: published rates (those of the nearest task or length where there are none), fewer iterations",
        *(f"{name}: {preset.summary}" for name, preset in PRESETS.items()),
    ]
)

REMEDIES = {
    "reg": "a larger --reg",
    "dx": "--dx regularized",
    "dx_reg": "a larger --dx-reg",
    "batch_reg": "a larger --batch-reg",
    "std": "a smaller --std",
}
"""What helps a run that diverged, by the options that its rule has."""


def rule_option_of(name: str, rules: Sequence[str], default: str | None = None) -> Option:
    """Return the option of a field that some of the package's rules have.

    Args:
        name: of the field.
        rules: their names.
        default: what is shown; None: what they share, if presets have no numbers of their own.
    """
    kinds = [RULES[rule] for rule in rules]
    hints = list(dict.fromkeys(of_text(get_type_hints(kind)[name]) for kind in kinds))
    if default is None:
        defaults = {field.default for kind in kinds for field in fields(kind) if field.name == name}
        # of the numbers presets have their own
        default = str(*defaults) if len(defaults) == 1 and all(map(choices_of, hints)) else DEFAULT
    having = f"{'rule' if len(rules) == 1 else 'rules'} {', '.join(rules)}"
    return Option(hints, f"{help_of(kinds[0], name) or 'Of the rule'} ({having}).", default)


def task_option_of(name: str, tasks: Sequence[str], default: str | None = None) -> Option:
    """Return the option of a field that some of the package's tasks have; arguments as for :func:`rule_option_of`."""
    entries = [TASKS[task] for task in tasks]
    hints = list(dict.fromkeys(get_type_hints(entry.kind)[name] for entry in entries))
    if default is None:
        default = " or ".join(dict.fromkeys(str(entry.options[name].default) for entry in entries))
    help = entries[0].options[name].metadata.get("help", "Of the task.")
    return Option(hints, f"{help} ({', '.join(tasks)})", default)


def _rules_by_option() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rule, kind in RULES.items():
        for field in fields(kind):
            found.setdefault(field.name, []).append(rule)
    return found


@dataclass(frozen=True)
class BaseTrain:
    """Train a network, recurrent for sequences, else feed-forward; by target propagation unless told otherwise.

    `tpext train images` trains convolutional and other networks on images; it has options of its own.
    """

    task: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="TASK",
            help=f"What to learn: {', '.join(TASKS)}; `tpext tasks` describes them. Or a task of your own, as "
            "module:Class or file.py:Class.",
        ),
    ]
    rule: Annotated[
        str | None,
        option(
            f"{{{','.join(RULES)},FILE.py:CLASS}}",
            f"{DEFAULT_RULE}; feed-forward {DEFAULT_LAYER_RULE}",
            f"What the backward pass is. Recurrent: {', '.join(SEQUENCE_RULES)}. Feed-forward: "
            f"{', '.join(LAYER_RULES)}. Or a rule of your own, as module:Class or file.py:Class (docs/own-rules.md).",
        ),
    ] = None
    task_options: OwnOptions = ()
    """Options of a task of your own."""
    rule_options: OwnOptions = ()
    """Options of a rule of your own."""
    preset: Annotated[str | None, option(f"{{default,{','.join(PRESETS)}}}", "default", f"{_PRESETS}.")] = None
    out: Annotated[Path | None, option("DIR", "runs/TASK-RULE-SEED, of a cell with gates TASK-CELL-RULE-SEED")] = None
    """Folder of the run."""
    resume: Switch = False
    """Continue the run in that folder, with its options, from its last checkpoint (or start it if there is none)."""
    data_dir: DataFolder = None
    """Folder with the image task's files; without it MNIST is downloaded once."""
    tensorboard: Switch = False
    """Write TensorBoard events too."""

    def given(self) -> dict[str, Any]:
        """Return the options that were given, as :func:`make_config` takes them."""
        options: dict[str, Any] = {**asdict(self), "tensorboard": self.tensorboard or None}
        del options["out"], options["resume"]
        options["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        if options.get("file") is not None:
            # a run resumes from any folder
            options["file"] = str(Path(options["file"]).absolute())
        for_task, for_rule = ([*itertools.chain(*words)] or None for words in (self.task_options, self.rule_options))
        options |= {"task_options": for_task, "rule_options": for_rule}
        if for_task and self.task not in TASKS:
            options["task_options"] = parse_options("task", self.task, find_task(self.task).kind, for_task)
        if for_rule and self.rule is not None and self.rule not in RULES:
            options["rule_options"] = parse_options("rule", self.rule, find_rule(self.rule), for_rule)
        return {name: value for name, value in options.items() if value is not None}

    def carry_out(self, console: Console) -> int:
        given = self.given()
        out = self.out
        if out is None:
            wanted = make_config(**given)
            cells = [] if wanted.cell in (None, SEQUENCE["cell"]) else [wanted.cell]
            names = (name.rpartition(":")[2] for name in (wanted.task_name, *cells, wanted.rule_name))
            out = Path("runs") / "-".join([*names, str(wanted.seed)])
        folder = RunFolder(out)
        config = (folder.continued(given) if self.resume else None) or make_config(**given)
        try:
            result = train(config, out, resume=self.resume, console=console)
        except DivergedError as error:
            return report_divergence(error, _remedy(config))
        running = (
            "" if (mean := result.running_accuracy) is None else f"running training accuracy (from zero) {mean:.2%}, "
        )
        measures = "".join(f"{name} {value:.4g}, " for name, value in result.measures.items())
        say(
            console,
            f"accuracy {result.accuracy:.2%} (best {result.best_accuracy:.2%} at iteration {result.best_iteration}), "
            f"{running}{measures}test loss {result.test_loss:.4g}, {result.iterations} iterations "
            f"in {result.seconds:.1f} s",
        )
        for name, picture in (
            ("curve", folder.curve),
            ("decision regions", folder.decision),
            ("reconstructions", folder.reconstruction),
            ("text", folder.sample),
        ):
            if picture.exists():
                say(console, f"{name}: {picture}")
        return 0


# The options of tasks, rules and runs are fields of the command; each says of itself what it is.
Train = make_command(
    "Train",
    BaseTrain,
    {
        **{name: task_option_of(name, tasks) for name, tasks in task_options().items()},
        **{name: rule_option_of(name, rules) for name, rules in _rules_by_option().items()},
        **options_of(Config, ("task", "rule", "preset", *NOT_OPTIONS, "tensorboard"), shown_default),
    },
)


def _remedy(config: Config) -> str:
    """What helps a run that diverged."""
    own = {field.name for field in fields(config.rule)}
    found = []
    if (config.cell, config.nonlinearity, getattr(config.rule, "slope", None)) == ("rnn", "tanh", "inverse"):
        # saturated units have slopes of nearly zero
        found.append("--slope derivative")
    if not config.rule.solves_weights:
        rates = "--lr, --head-lr, --reverse-lr" if config.rule.learns else "--lr, --head-lr"
        found.append(f"smaller rates ({rates})")
    found += [text for name, text in REMEDIES.items() if name in own]
    if is_own(config.task):
        found.append("inputs scaled to numbers around 1")
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])}, or {found[-1]}"
