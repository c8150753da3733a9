"""What the docstrings of the package write for a terminal, as Markdown for the site: an extension of griffe.

Roles such as ``:class:`Name``` become links where the reference has the name. Tables of ``====`` and examples of
``>>>`` become blocks of code, and the double colon before a block a single one. Of what declares a field only its
default is left.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Attribute, ExprCall, Extension, Object

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`([\w.]+)`")

# What declares a field of a dataclass: its first argument is the default, but of the last.
DECLARATIONS = {"number", "option", "described"}
WITHOUT_DEFAULT = "described"


def documented() -> dict[str, str]:
    """The reference's names, by themselves and by their last parts."""
    pages = "\n".join(page.read_text() for page in sorted(REFERENCE.glob("*.md")))
    names = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    return {name.rpartition(".")[2]: name for name in reversed(names)} | {name: name for name in names}


def _block(line: str) -> str | None:
    """The language of the block of code that a line begins."""
    if line.startswith(">>> "):
        return "pycon"
    return "text" if re.match(r"=+( +=+)+$", line) else None


class Docstrings(Extension):
    """Rewrites every docstring as it is loaded."""

    def __init__(self) -> None:
        self.names = documented()

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = self.markdown(obj.docstring.value)

    def on_attribute_instance(self, *, attr: Attribute, **kwargs: Any) -> None:
        """Of a field with a range or a help text keep the default, if it has one."""
        value = attr.value
        if isinstance(value, ExprCall) and str(value.function) in DECLARATIONS and value.arguments:
            attr.value = value.arguments[0] if str(value.function) != WITHOUT_DEFAULT else None

    def markdown(self, text: str) -> str:
        text = ROLE.sub(self._link, text)
        # a description that begins with ">= 0" is no quotation
        text = re.sub(r"^(\s+[\w, ]+: )>", r"\1\\>", text, flags=re.MULTILINE)
        text = re.sub(r"^(.*\S)::$", r"\1:", text, flags=re.MULTILINE)
        lines: list[str] = []
        open_at: str | None = None  # the indent of the block that is open; an empty line ends it
        for line in text.splitlines():
            indent = line[: len(line) - len(line.lstrip())]
            if open_at is not None and not line.strip():
                lines.append(f"{open_at}```")
                open_at = None
            elif open_at is None and (kind := _block(line.strip())):
                lines += ["", f"{indent}```{kind}"]
                open_at = indent
            lines.append(line)
        return "\n".join(lines if open_at is None else [*lines, f"{open_at}```"])

    def _link(self, match: re.Match[str]) -> str:
        name = match[1]
        owner, _, member = name.rpartition(".")
        if name in self.names:
            return f"[`{name}`][{self.names[name]}]"
        if owner in self.names:
            # optional: an attribute may have no entry of its own
            return f'<autoref optional identifier="{self.names[owner]}.{member}"><code>{name}</code></autoref>'
        return f"`{name}`"
