"""``_C.pyi`` says what the module's entries are called, take and return, as pybind11 writes it in their docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tpext
from tpext import _C

STUB = {
    node.name: node
    for node in ast.parse((Path(tpext.__file__).parent / "_C.pyi").read_text()).body
    if isinstance(node, ast.FunctionDef)
}
# Types of the stub by what the module says; what it says of a tensor, or of nothing in its place, is "object".
NAMES = {
    "typing.SupportsInt": "int",
    "typing.SupportsFloat": "float",
    "collections.abc.Sequence": "list",
    "List": "list",
    " | typing.SupportsIndex": "",
}
OBJECTS = {"object", "object | None", "Execution"}


def of_module(annotation: str) -> str:
    for name, plain in NAMES.items():
        annotation = annotation.replace(name, plain)
    return annotation


def of_stub(node: ast.expr | None) -> str:
    text = "" if node is None else ast.unparse(node)
    if text in OBJECTS:
        return "object"
    return {"BuildInfo": "dict", "list[object]": "list", "tuple[str, int, float]": "tuple"}.get(text, text)


def entries() -> list[str]:
    return [name for name in dir(_C) if not name.startswith("_")]


def test_the_stub_has_every_entry() -> None:
    assert set(entries()) == set(STUB)


@pytest.mark.parametrize("name", entries())
def test_the_stub_has_the_entry_as_it_is(name: str) -> None:
    signature = re.match(rf"{name}\((.*)\) -> (.*)", getattr(_C, name).__doc__.strip())
    assert signature is not None
    said = [parameter.split(": ") for parameter in signature[1].split(", ") if parameter]
    arguments = STUB[name].args
    assert not arguments.defaults
    expected = [[argument.arg, of_stub(argument.annotation)] for argument in arguments.args]
    assert [[parameter, of_module(annotation)] for parameter, annotation in said] == expected
    assert of_module(signature[2]) == of_stub(STUB[name].returns)
