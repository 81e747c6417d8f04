"""The code is as ruff, by the settings in pyproject.toml, wants it, and asks for the system in one place only."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from inside import SCRIPT

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout.decode()


PLATFORM = re.compile(
    r"\bos\.name\b|\bsys\.platform\b|\bplatform\.|\b[hg]e?a?s?t?attr\((os|fcntl|socket)\b|\bfcntl\b|\bmsvcrt\b"
    r"|\bos\.(p?read|p?write|fsync|lseek|O_NOFOLLOW|O_DIRECTORY|O_NONBLOCK|O_BINARY)\b"
)


def test_what_differs_between_systems_is_in_one_place():
    source = SCRIPT.read_text(encoding="utf-8")
    begin, end = (source.index(f"\n# {name}: ") for name in ("Platform", "Settings"))
    assert PLATFORM.search(source[begin:end])
    elsewhere = source[:begin] + "\n" * source[begin:end].count("\n") + source[end:]
    found = [number for number, line in enumerate(elsewhere.split("\n"), 1) if PLATFORM.search(line)]
    assert not found, "lines of the script that ask for the system"
