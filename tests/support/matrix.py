"""Runs the tests with each host's packages on each Python of this machine."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import environment

SUMMARY = re.compile(r"^=* ?((?:\d+ [a-z]+(?:, )?)+) in [\d.]+")


class Cell(NamedTuple):
    result: str  # empty: there are no packages for this Python
    failed: bool = False


def run(at_once: int, pytest_arguments: list[str]) -> int:
    pythons = environment.pythons()
    print("Pythons found:", ", ".join(pythons))
    pairs = [(host, version) for host in environment.HOSTS for version in pythons]
    with ThreadPoolExecutor(at_once) as pool:
        cells = dict(zip(pairs, pool.map(lambda pair: _cell(*pair, pythons[pair[1]], pytest_arguments), pairs)))
    lines = [["packages of", *pythons], ["---"] * (1 + len(pythons))]
    lines += [[host, *(cells[host, version].result for version in pythons)] for host in environment.HOSTS]
    print("", *(f"| {' | '.join(line)} |" for line in lines), sep="\n")
    return int(any(cell.failed for cell in cells.values()))


def _cell(host: str, version: str, python: str, pytest_arguments: list[str]) -> Cell:
    if tuple(map(int, version.split("."))) < environment.OLDEST[host]:
        return Cell("")
    environment.FOLDER.mkdir(exist_ok=True)
    log = environment.FOLDER / f"{host}-{version}.tests.log"
    print(f"{host} on Python {version}: began, see {log}", flush=True)
    began = time.monotonic()
    with log.open("wb") as file:
        command = [python, "tests/run.py", "test", "--host", host, *pytest_arguments]
        status = subprocess.call(command, cwd=environment.PROJECT, stdout=file, stderr=subprocess.STDOUT)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    counts = next((match.group(1) for match in map(SUMMARY.match, reversed(lines)) if match), "did not run")
    result = ", ".join(
        count for count in counts.split(", ") if not count.endswith(("deselected", "warnings", "warning"))
    )
    if status not in (0, 1):
        result += f" (status {status})"
    print(f"{host} on Python {version}: {result}, after {time.monotonic() - began:.0f} s", flush=True)
    return Cell(result, status != 0)


if __name__ == "__main__":
    sys.exit(run(1, sys.argv[1:]))
