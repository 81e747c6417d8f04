"""What README.md shows: its snippets of code and its tables."""

from __future__ import annotations

import re
from typing import List, NamedTuple

from harness import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:7860"


class Snippet(NamedTuple):
    """A block of code in README.md."""

    line: int
    language: str
    text: str


def snippets() -> List[Snippet]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [Snippet(README.count("\n", 0, it.start()) + 2, it.group(1), it.group(2)) for it in found]


def tables() -> List[List[List[str]]]:
    """The cells of each table's rows, without its head."""
    found = re.findall(r"^\|[^\n]*\|\n\|[ |-]+\|\n((?:\|[^\n]*\|\n)+)", README, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split(" | ")] for row in it.splitlines()] for it in found]


def table(first: str) -> List[List[str]]:
    """The rows of the table whose first cell has a text."""
    (rows,) = [it for it in tables() if first in it[0][0]]
    return rows


def names(cell: str) -> List[str]:
    """What stands in a cell as code."""
    return re.findall(r"`([^`]+)`", cell)


# The receivers of webhooks, by their languages
RECEIVERS = {it.language: it.text for it in snippets() if "standardwebhooks" in it.text}
