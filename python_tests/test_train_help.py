"""``tpext train TASK --help``: what one task takes, and the values that it starts from."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from runs import call

from tpext.experiments import make_config
from tpext.experiments.config import Config
from tpext.experiments.rule_names import LAYER_RULES, SEQUENCE_RULES
from tpext.experiments.train_command import Train
from tpext.experiments.train_help import command_for
from tpext.tasks import make_task

pytestmark = pytest.mark.usefixtures("unrendered")

# Those of runs that a task, or the machine, has values of its own for.
NOT_COMPARED = {"threads", "data_dir", "eval_interval", "epochs", "iterations"}
CASES = [
    (task, rule)
    for task in ("adding", "temporal-order", "spiral", "digits-mlp")
    for rule in (LAYER_RULES if make_task(task).length is None else SEQUENCE_RULES)
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


@pytest.mark.parametrize(("task", "rule"), CASES)
def test_the_defaults_are_those_of_a_run(task: str, rule: str) -> None:
    config = make_config(task, rule=rule)
    values = config.options()
    found = defaults(command_for(task, rule))
    compared = [name for name in found if name in values and name not in NOT_COMPARED]
    assert {"rule", "lr", "optimizer", "batch_size", "seed"} <= {*compared}
    assert {field.name for field in fields(config.rule)} <= {*compared}
    for name in compared:
        value, text = values[name], found[name]
        same = float(text) == pytest.approx(value) if type(value) is float else text == text_of(value)
        assert same, (name, value, text)


@pytest.mark.parametrize("task", ["adding", "digits-mlp", "spiral", "text", "mnist-autoencoder"])
def test_what_it_leaves_out_is_refused_anyway(task: str) -> None:
    """A task without options of another kind of network; every option that stays is one of the whole help."""
    kept = {field.name for field in fields(command_for(task)) if field.default is None}
    options = {field.name for field in fields(Train)}
    assert kept <= options
    other = "recurrent" if make_task(task).length is None else "feed-forward"
    for field in fields(Config):
        assert (field.metadata.get("network") == other) <= (field.name not in defaults(command_for(task)))


def test_values_that_differ_between_rules_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call("train adding --help", capsys)
    text = shown(out)
    assert status == 0
    assert "(default: 0.001 (backprop); 0.0005 (learned-inverse); 0.1 (regularized-inverse))" in text
    assert "--rule {backprop,learned-inverse,regularized-inverse,FILE.py:CLASS}" in text
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
        "--task-options NAME=VALUE ... Options of Sums: length=30 (Number of steps.); terms=2 (Numbers to add.)."
        in text
    )
    assert "Options of Half:" in text
    assert "share=0.5 (Of the weights)" in text
    assert "--lr FLOAT Learning rate of the hidden layers" in text
    assert "(default: 0.25)" in text
    text = shown(call("train mine.py:Sums --rule regularized-inverse --help", capsys)[1])
    assert "--slope {inverse,derivative,one} How the linearised" in text
    assert "or not at all. (default: derivative)" in text
    assert "--rule-options" not in text


def test_help_for_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for line, says in (
        ("train addin --help", "did you mean 'adding'?"),
        ("train adding --rule kaczmarz --help", "rule=kaczmarz does not belong to adding"),
        ("train adding --rule kacmarz -h", "did you mean 'kaczmarz'?"),
    ):
        status, _, err = call(line, capsys)
        assert (status, says in err) == (1, True), err
