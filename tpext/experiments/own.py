"""What users wrote, by the path that names it on the command line: ``module:NAME`` or ``file.py:NAME``."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType, TracebackType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from tpext.experiments.field_help import help_of
from tpext.experiments.settings import ConfigError, of_text


class Place(NamedTuple):
    """Where something of a user's is: its path as it was typed, and the folder that it was typed in."""

    name: str
    folder: str


_FOUND: dict[tuple[str, str], Any] = {}
"""By file (or name) of the module, and by name in it, so that two ways to type a path lead to one class."""
_PLACES: dict[int, Place] = {}
"""By the ids of what was found, which stays."""
_HASHES: dict[str, str] = {}
"""SHA-256 by file of the modules, as they were when they were read."""


def is_path(name: object) -> bool:
    """Whether a name on the command line is a path to something of a user's."""
    place, separator, attribute = str(name).rpartition(":")
    return bool(place and separator and attribute)


def find_own(what: str, name: str, folder: str | None = None) -> Any:
    """Return what a path names.

    Args:
        what: for errors, what kind of thing it is.
        name: the path.
        folder: where it was typed; None, or one that is no longer there, is the working directory.

    Raises:
        ConfigError: the module cannot be imported, or has no such name.
    """
    place, _, attribute = name.rpartition(":")
    base = _base_of(folder)
    module = _module_of(what, name, base)
    key = (getattr(module, "__file__", None) or place, attribute)
    if key not in _FOUND:
        if not hasattr(module, attribute):
            raise ConfigError(f"{what} {name}: {place} has no {attribute}")
        found = getattr(module, attribute)
        _FOUND[key] = found
        _PLACES[id(found)] = Place(name, str(base))
    return _FOUND[key]


def hash_of(what: str, name: str, folder: str | None = None) -> str:
    """Return the SHA-256 of the file that a path names, as it was when this process ran it; "" if it is no file.

    A ``file.py`` is not run for it, a module is imported.

    Raises:
        ConfigError: the module cannot be imported.
    """
    base, place = _base_of(folder), name.rpartition(":")[0]
    if place.endswith(".py"):
        return _hash(str(_file_of(base, place)))
    file = getattr(_module_of(what, name, base), "__file__", None)
    return "" if file is None else _hash(file)


def _hash(file: str) -> str:
    if file not in _HASHES:
        try:
            _HASHES[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError:  # gone, or in an archive
            return ""
    return _HASHES[file]


def _base_of(folder: str | None) -> Path:
    return Path(folder) if folder is not None and Path(folder).is_dir() else Path.cwd()


def _module_of(what: str, name: str, base: Path) -> ModuleType:
    place = name.rpartition(":")[0]
    try:
        return _run_file(_file_of(base, place)) if place.endswith(".py") else _import(base, place)
    # whatever a user's file raises
    except Exception as error:
        why = f"{type(error).__name__}: {error}{_line_of(error, _file_of(base, place))}"
        raise ConfigError(f"{what} {name}: {place} cannot be imported: {why}") from error


def _file_of(base: Path, place: str) -> Path:
    path = (base / place).resolve()
    return path if path.exists() else Path(place).resolve()


def _line_of(error: BaseException, file: Path) -> str:
    """Where an error came from in the file that was imported."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f" (line {lines[-1]})" if lines else ""


def from_own_code(error: BaseException) -> TracebackType | None:
    """Return an error's traceback from where it enters a file that :func:`find_own` has read; None if it does not."""
    own = {file for file, _ in _FOUND}
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename not in own:
        trace = trace.tb_next
    return trace


@contextlib.contextmanager
def as_config_errors() -> Iterator[None]:
    """Make ValueErrors those of a setting; but one from a user's file stays, to be shown with its place there."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        if from_own_code(error) is not None:
            raise
        raise ConfigError(str(error)) from error


def place_of(found: object) -> Place | None:
    """Return where something of a user's is; None for what :func:`find_own` has not found."""
    return _PLACES.get(id(found))


def _import(base: Path, place: str) -> ModuleType:
    # A console script, other than `python -m`, does not look in the current folder.
    with _in_path(base):
        return importlib.import_module(place)


@contextlib.contextmanager
def _in_path(folder: Path) -> Iterator[None]:
    """Look for modules in a folder, for an import only: what stays in the path, processes started later inherit."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _run_file(path: Path) -> ModuleType:
    # where dataclasses and pickle look for it
    name = f"_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _hash(str(path))  # of what is run, whatever is written there later
    sys.modules[name] = module
    try:
        # other files beside it, as Python has it of a script
        with _in_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def hints_of(what: str, name: str, kind: type[Any]) -> dict[str, Any]:
    """Return the annotations of a user's class.

    Raises:
        ConfigError: they name what its module does not have.
    """
    try:
        return get_type_hints(kind)
    except NameError as error:
        raise ConfigError(f"{what} {name}: the annotations of {kind.__name__} cannot be read: {error}") from error


def parse_options(what: str, name: str, kind: type[Any], texts: Sequence[str]) -> dict[str, object]:
    """Return the values of fields of a user's dataclass that are given as ``NAME=VALUE``, by the fields' types.

    Args:
        what, name: for errors: "rule" or "task", and what it was named by.
        kind: the class.
        texts: what was given.

    Raises:
        ConfigError: no such field, with the help of those that there are, or a text that is no value of it.

    >>> from tpext.rules import RegularizedInverse
    >>> parse_options("rule", "mine.py:Mine", RegularizedInverse, ["reg=10", "normalize=false"])
    {'reg': 10.0, 'normalize': False}
    """
    hints = hints_of(what, name, kind)
    kinds = {field.name: of_text(hints[field.name]) for field in fields(kind) if field.init}
    values: dict[str, object] = {}
    for text in texts:
        option, separator, value = text.partition("=")
        if not separator or option not in kinds:
            lines = "".join(f"\n  {name}: {help}" for name in kinds if (help := help_of(kind, name)))
            raise ConfigError(f"{what}_options must be NAME=VALUE of {', '.join(kinds) or 'none'}, got {text!r}{lines}")
        hint = kinds[option]
        try:
            values[option] = _read(value, hint)
        except TypeError as error:
            raise ConfigError(
                f"{option} of {what} {name} is {_shown(hint)}, which cannot be given as a text"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{option} of {what} {name} must be {_shown(hint)}, got {value!r}") from error
    return values


def _shown(hint: Any) -> str:
    """Return what values of an annotation are.

    >>> _shown(int | None), _shown(tuple[int, ...]), _shown(Literal["pre", "post"])
    ('an int or None', 'a tuple', "one of 'pre', 'post'")
    """
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_shown, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if hint is type(None):
        return "None"
    name = getattr(hint, "__name__", None) or str(hint)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _read(text: str, hint: Any) -> object:
    """Return the value of a text; ValueError if it is none, TypeError if texts cannot be such values."""
    if get_origin(hint) in (Union, UnionType):
        wrong: Exception = ValueError()
        for one in get_args(hint):
            try:
                return _read(text, one)
            except (TypeError, ValueError) as error:
                wrong = error
        raise wrong
    choices: dict[str, object] = {}
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
    elif hint is bool:
        choices = {"true": True, "false": False}
        text = text.lower()
    elif hint is type(None):
        choices = {"none": None}
        text = text.lower()
    elif hint in (int, float, str):
        value: object = hint(text)
        return value
    else:
        raise TypeError
    if text not in choices:
        raise ValueError
    return choices[text]
