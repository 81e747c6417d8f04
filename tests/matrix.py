"""Runs the tests with each host's packages on each Python of this machine, one after the other."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import environment

SUMMARY = re.compile(r"^=* ?((?:\d+ [a-z]+(?:, )?)+) in [\d.]+")


def run(pytest_arguments: list[str]) -> int:
    pythons = environment.pythons()
    print("Pythons found:", ", ".join(pythons))
    rows, failed = [], False
    for host in environment.HOSTS:
        for version, python in pythons.items():
            if tuple(map(int, version.split("."))) < environment.OLDEST[host]:
                rows.append((host, version, "no packages for this Python", ""))
                continue
            started = time.monotonic()
            print(f"{host} on Python {version} ...", flush=True)
            log = environment.FOLDER / f"{host}-{version}.tests.log"
            with log.open("wb") as file:
                command = [python, "tests/run.py", "test", "--host", host, *pytest_arguments]
                status = subprocess.call(command, cwd=environment.PROJECT, stdout=file, stderr=subprocess.STDOUT)
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            result = next((match.group(1) for match in map(SUMMARY.match, reversed(lines)) if match), "did not run")
            rows.append((host, version, result if status in (0, 1) else f"{result} (status {status})", str(log)))
            failed = failed or status != 0
            print(f"  {result}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"\n| {'host':6} | Python | result\n| ------ | ------ | ------")
    for host, version, result, log in rows:
        where = f"  ({log})" if "failed" in result or "error" in result else ""
        print(f"| {host:6} | {version:6} | {result}{where}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
