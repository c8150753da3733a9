"""The publications that tpext.citation names, against the docstrings and the README."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_origin

import pytest
import torch
from torch import nn

import tpext
from tpext.citations import _ENTRIES

ROOT = Path(__file__).resolve().parents[1]
WITH_SOURCES = [
    value
    for module in (tpext.rules, tpext.feedback)
    for value in vars(module).values()
    # to Python 3.10 a generic alias such as Callable[[int], int] is a type
    if isinstance(value, type) and get_origin(value) is None
    if issubclass(value, (tpext.rules.base.Rule, tpext.feedback.FeedbackTrainer))
]


def keys(entries: str) -> list[str]:
    return re.findall(r"^@\w+\{(\w+),$", entries, re.MULTILINE)


def field(entry: str, name: str) -> str:
    (value,) = re.findall(rf"^  {name} = \{{+(.*?)\}}+,?$", entry, re.MULTILINE | re.DOTALL)
    return " ".join(value.split())


@pytest.mark.parametrize("cls", WITH_SOURCES, ids=lambda cls: cls.__name__)
def test_sources_are_those_of_the_docstring(cls: type) -> None:
    """Every author that a class's own sources begin with is named there, and no publication there is left out."""
    named = re.findall(r"Source: (.*?)(?:\n\n|\n    >>>|\Z)", cls.__doc__ or "", re.DOTALL)
    source = " ".join(" ".join(named).split())
    of_class = cls.__dict__.get("sources", ())
    for key in of_class:
        assert field(_ENTRIES[key], "author").split(",")[0].strip("{}") in source
    publications = ("Roulet", "Manchev", "Lee", "Seely", "ASFaust", 'Bengio, "How', "Ernoult", "Meulemans", "Shibuya")
    assert len(of_class) == sum(name in source for name in publications)


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="no README beside the tests")
@pytest.mark.parametrize("key", _ENTRIES)
def test_an_entry_says_what_the_readme_says(key: str) -> None:
    entry, text = _ENTRIES[key], " ".join((ROOT / "README.md").read_text().split())
    assert keys(entry) == [key]
    assert entry.count("{") == entry.count("}")
    (line,) = [line for line in text.split(" - ") if f": {field(entry, 'title')}" in line]
    assert re.search(rf"\b{field(entry, 'year')}\b", line)
    for author in field(entry, "author").split(" and "):
        surname, _, initials = author.partition(", ")
        assert f"{initials} {surname}".strip() in line


def test_the_package_itself_is_as_in_the_citation_file() -> None:
    own = tpext.citation(tpext.Backprop())
    assert keys(own) == ["tpext"]
    assert tpext.__version__ in field(own, "note")
    file = ROOT / "CITATION.cff"
    if not file.is_file():
        pytest.skip("no CITATION.cff beside the tests")
    assert f'title: "{field(own, "title")}"' in file.read_text()


def test_a_network_cites_each_rule_in_it_once() -> None:
    net = nn.ModuleList(
        [
            tpext.nn.RNN(2, 3, num_layers=2),
            tpext.nn.GRU(2, 3),
            tpext.nn.MLP([2, 3, 2], "tanh", rule=tpext.RegularizedLeastSquares()),
            nn.Linear(2, 2),
        ]
    )
    assert keys(tpext.citation(net)) == ["tpext", "roulet2023", "seely2017"]
    tpext.nn.convert(net, tpext.LearnedInverse())
    assert keys(tpext.citation(net)) == ["tpext", "lee2015", "manchev2020", "seely2017"]
    assert keys(tpext.citation(nn.Linear(2, 2))) == ["tpext"]
    ensemble = tpext.nn.Ensemble(tpext.nn.RNN(2, 3) for _ in range(2))
    assert keys(tpext.citation(ensemble)) == ["tpext", "roulet2023"]


def test_a_trainer_cites_its_network_too() -> None:
    blocks = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)
    net = tpext.nn.TargetSequential(*blocks, rule=tpext.Targets())
    trainer = tpext.feedback.DifferenceReconstruction(net, lr=0.1, noise=0.1)
    assert keys(tpext.citation(net)) == ["tpext", "bengio2014"]
    assert keys(tpext.citation(trainer)) == ["tpext", "bengio2014", "meulemans2020"]


@dataclass(frozen=True)
class Own(tpext.rules.RecurrentRule):
    sources: ClassVar[tuple[str, ...]] = ("lee2015", "@misc{own,\n  title = {Mine}\n}")

    def feedback(self, weight_hh: torch.Tensor, *owned: torch.Tensor) -> torch.Tensor:
        return weight_hh


class Unknown(Own):
    sources = ("nobody1999",)


def test_a_rule_of_ones_own_gives_keys_or_entries() -> None:
    assert keys(tpext.citation(tpext.nn.RNN(2, 3, rule=Own()))) == ["tpext", "lee2015", "own"]
    with pytest.raises(ValueError, match=r"sources of Unknown must be .* got 'nobody1999'"):
        tpext.citation(Unknown())


@pytest.mark.parametrize(("of", "got"), [("lee2015", "str"), (tpext.Backprop, "a rule is an instance, not a class")])
def test_what_is_no_network_is_refused(of: object, got: str) -> None:
    with pytest.raises(TypeError, match=f"of must be a module, a rule or a trainer, got .*{got}"):
        tpext.citation(of)  # type: ignore[arg-type]
