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


class Row(NamedTuple):
    host: str
    version: str
    result: str
    failed: bool = False


def run(at_once: int, pytest_arguments: list[str]) -> int:
    pythons = environment.pythons()
    print("Pythons found:", ", ".join(pythons))
    pairs = [(host, version) for host in environment.HOSTS for version in pythons]
    with ThreadPoolExecutor(at_once) as pool:
        rows = list(pool.map(lambda pair: _row(*pair, pythons[pair[1]], pytest_arguments), pairs))
    print(f"\n| {'host':6} | Python | result\n| ------ | ------ | ------")
    for row in rows:
        print(f"| {row.host:6} | {row.version:6} | {row.result}")
    return int(any(row.failed for row in rows))


def _row(host: str, version: str, python: str, pytest_arguments: list[str]) -> Row:
    if tuple(map(int, version.split("."))) < environment.OLDEST[host]:
        return Row(host, version, "no packages for this Python")
    environment.FOLDER.mkdir(exist_ok=True)
    log = environment.FOLDER / f"{host}-{version}.tests.log"
    print(f"{host} on Python {version}: began, see {log}", flush=True)
    began = time.monotonic()
    with log.open("wb") as file:
        command = [python, "tests/run.py", "test", "--host", host, *pytest_arguments]
        status = subprocess.call(command, cwd=environment.PROJECT, stdout=file, stderr=subprocess.STDOUT)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    result = next((match.group(1) for match in map(SUMMARY.match, reversed(lines)) if match), "did not run")
    if status not in (0, 1):
        result += f" (status {status})"
    print(f"{host} on Python {version}: {result}, after {time.monotonic() - began:.0f} s", flush=True)
    return Row(host, version, result, status != 0)


if __name__ == "__main__":
    sys.exit(run(1, sys.argv[1:]))
