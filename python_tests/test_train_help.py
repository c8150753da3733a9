"""``tpext train TASK --help``: what one task takes, and the values that it starts from."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from runs import call

from tpext.experiments import ConfigError, make_config
from tpext.experiments.config import Config
from tpext.experiments.rule_names import LAYER_RULES, SEQUENCE_RULES
from tpext.experiments.run_folder import RunFolder
from tpext.experiments.train_command import Train
from tpext.experiments.train_help import command_for
from tpext.tasks import make_task

pytestmark = pytest.mark.usefixtures("unrendered")

# Those of runs that a task, or the machine, has values of its own for.
NOT_COMPARED = {"threads", "eval_interval"}
NOT_SHOWN = {"data_dir", "tensorboard", "preset", "task"}
CASES = [
    (task, rule)
    for task in ("adding", "temporal-order --length 120", "adding --cell lstm --optimizer adam", "spiral", "digits-mlp")
    for rule in (LAYER_RULES if make_task(task.split()[0]).length is None else SEQUENCE_RULES)
    if (task, rule) != ("adding --cell lstm --optimizer adam", "learned-inverse")
]


def shown(text: str) -> str:
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def defaults(command: Any) -> dict[str, str]:
    """The defaults that the help shows, by the options' names."""
    found = {}
    for field in fields(command):
        for note in getattr(field.type, "__metadata__", ()):
            if (hint := getattr(note, "help_behavior_hint", None)) is not None:
                found[field.name] = hint.removeprefix("(default: ").removesuffix(")")
    return found


def text_of(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("line", "rule"), CASES)
def test_the_defaults_are_those_of_a_run(line: str, rule: str) -> None:
    task, *words = line.split()
    given: dict[str, Any] = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}
    config = make_config(task, rule=rule, **{name: int(v) if v.isdigit() else v for name, v in given.items()})
    values = config.options()
    found = defaults(command_for([task, *words, "--rule", rule, "--help"]))
    other = "recurrent" if config.feed_forward else "feed-forward"
    left_out = {field.name for field in fields(Config) if field.metadata.get("network") == other} | NOT_SHOWN
    if not config.task.has_epochs:
        left_out |= {"epochs", "schedule"}
    assert values.keys() - found.keys() == left_out & values.keys() - found.keys(), "all others are shown"
    for name in found.keys() & values.keys() - NOT_COMPARED - NOT_SHOWN:
        value, text = values[name], found[name]
        same = float(text) == pytest.approx(value) if type(value) is float else text == text_of(value)
        assert same, (name, value, text)


@pytest.mark.parametrize("task", ["adding", "digits-mlp", "spiral"])
def test_what_it_leaves_out_is_refused_anyway(task: str) -> None:
    shown_there = {field.name for field in fields(command_for([task, "-h"])) if field.default is None}
    assert shown_there <= {field.name for field in fields(Train)}
    options = {
        "cell": "gru",
        "hidden_size": 3,
        "layers": 2,
        "sizes": (3,),
        "forget_bias": 1.0,
        "orthogonal": True,
        "reference_compat": True,
        "tied": True,
        "reduction": "batch",
        "schedule": "alternating",
        "epochs": 1,
        "gradients": True,
        "data_dir": "x",
        "chunk": 2,
        "level": "word",
        "dx": "mean",
    }
    for name in options.keys() - defaults(command_for([task, "-h"])).keys():
        with pytest.raises(ConfigError, match=f"^{name}(=alternating needs a task| does not belong to)"):
            make_config(task, **{name: options[name]})


def test_values_that_differ_between_rules_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call("train adding --help", capsys)
    text = shown(out)
    assert status == 0
    assert "(default: 0.1 (regularized-inverse); 0.001 (backprop); 0.0005 (learned-inverse))" in text
    assert "--rule {regularized-inverse,backprop,learned-inverse,FILE.py:CLASS}" in text
    assert "usage: tpext train adding [-h] [OPTIONS]" in text
    assert not {"--sizes", "--file", "--dx-reg", "--epochs", "--data-dir", "--task-options"} & {*text.split()}
    _, whole, _ = call("train --help", capsys)
    assert len(out.splitlines()) < len(whole.splitlines()) * 2 / 3
    _, of_one, _ = call("train adding --rule backprop --help", capsys)
    assert len(of_one.splitlines()) < len(out.splitlines()) * 2 / 3
    assert "(default: 0.001)" in of_one
    assert shown(call("train adding --help --rule=backprop", capsys)[1]) == shown(of_one)


OWN = '''
from dataclasses import dataclass
from tpext.rules import RecurrentRule
from tpext.tasks import Adding, option

@dataclass(frozen=True)
class Sums(Adding):
    defaults = {"lr": 0.25, "optimizer": "adam", "slope": "derivative"}
    terms: int = option(2, "Numbers to add.")

@dataclass(frozen=True)
class Half(RecurrentRule):
    """Half the weights.

    Args:
        share: of the weights.
    """
    share: float = 0.5

    def feedback(self, weight):
        return self.share * weight
'''


def test_ones_own_show_their_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    text = shown(call("train mine.py:Sums --rule mine.py:Half --help", capsys)[1])
    assert (
        "--task-options NAME=VALUE ... Options of Sums: length=30 (Number of steps); terms=2 (Numbers to add)." in text
    )
    assert "Options of Half:" in text
    assert "share=0.5 (Of the weights)" in text
    assert "--lr FLOAT Learning rate of the hidden layers" in text
    assert "(default: 0.25)" in text
    text = shown(call("train mine.py:Sums --rule regularized-inverse --help", capsys)[1])
    assert "--slope {inverse,derivative,one} How the linearised" in text
    assert "or not at all (rule regularized-inverse). (default: derivative)" in text
    assert "--rule-options" not in text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train mine.py:Sums --terms 3", ["terms is an option of task mine.py:Sums: --task-options terms=VALUE"]),
        ("train adding --rule mine.py:Half --share=1", ["rule mine.py:Half: --rule-options share=VALUE"]),
        ("train mine.py:Sums --rule=mine.py:Half --share 1 --terms 3", ["of task", "of rule"]),
        ("train mine.py:Sums --other 3 --length 4", []),
        ("train mine.py:None --terms 3", []),
    ],
)
def test_ones_own_options_typed_as_the_commands(
    line: str, says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    status, _, err = call(line, capsys)
    assert status == 2
    assert "Unrecognized options" in err
    hints = [text for text in err.splitlines() if text.startswith("tpext: ")]
    assert len(hints) == len(says)
    for hint, part in zip(hints, says, strict=True):
        assert part in hint


def test_ones_own_options_may_stand_apart_and_the_last_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    line = (
        "train mine.py:Sums --rule mine.py:Half --iterations 1 --task-options terms=2 length=12 --task-options terms=3"
    )
    status, _, err = call(f"{line} --rule-options share=0.25 --out run", capsys)
    assert status == 0, err
    config = RunFolder("run").read_config()
    assert config is not None
    assert (config.task.terms, config.task.length, config.rule.share) == (3, 12, 0.25)  # type: ignore[attr-defined]


def test_a_task_whose_data_is_not_there_shows_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asks = "    path: str = option(None, 'The file.')\n\n    def load(self):\n        return open(self.path)\n"
    head = "from dataclasses import dataclass\nfrom tpext.tasks import StoredTask, option\n\n"
    Path("mine.py").write_text(f"{head}@dataclass(frozen=True)\nclass Asks(StoredTask):\n{asks}")
    status, out, err = call("train mine.py:Asks --task-options path=none.npz --help", capsys)
    text = shown(out)
    assert status == 0, err
    assert "Options of Asks: path=None (The file)." in text
    assert "No such file or directory: 'none.npz'" in text


def test_help_of_rules_that_a_task_has_no_runs_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert ",kaczmarz," in shown(call("train mnist-mlp --help", capsys)[1])
    assert ",kaczmarz," not in shown(call("train mnist-autoencoder --help", capsys)[1])
    assert "--rule {backprop,learned-inverse," in shown(call("train adding --rule backprop -h", capsys)[1])


def test_help_for_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for line, says in (
        ("train addin --help", "did you mean 'adding'?"),
        ("train adding --rule kaczmarz --help", "rule=kaczmarz does not belong to adding"),
        ("train adding --rule kacmarz -h", "did you mean 'kaczmarz'?"),
    ):
        status, _, err = call(line, capsys)
        assert (status, says in err) == (1, True), err
