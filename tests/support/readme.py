"""What README.md and tests/README.md show: snippets of code, tables, and the programs that are files."""

from __future__ import annotations

import re
from typing import List, NamedTuple

from harness import PROJECT, TESTS

README = (PROJECT / "README.md").read_text(encoding="utf-8")
OF_TESTS = (TESTS / "README.md").read_text(encoding="utf-8")
EXAMPLES = TESTS / "examples"
ADDRESS = "http://127.0.0.1:7860"  # the webui's, in all of them


class Snippet(NamedTuple):
    """A block of code in README.md."""

    line: int
    language: str
    text: str


def snippets() -> List[Snippet]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [Snippet(README.count("\n", 0, it.start()) + 2, it.group(1), it.group(2)) for it in found]


def example(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def tables(text: str) -> List[List[List[str]]]:
    """The cells of each table's rows, without its head."""
    found = re.findall(r"^\|[^\n]*\|\n\|[ |-]+\|\n((?:\|[^\n]*\|\n)+)", text, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split(" | ")] for row in it.splitlines()] for it in found]


def table(first: str, text: str = README) -> List[List[str]]:
    """The rows of the table whose first cell has a text."""
    (rows,) = [it for it in tables(text) if first in it[0][0]]
    return rows


def names(cell: str) -> List[str]:
    """What stands in a cell as code."""
    return re.findall(r"`([^`]+)`", cell)


RECEIVERS = {"python": example("receiver.py"), "javascript": example("receiver.mjs")}
