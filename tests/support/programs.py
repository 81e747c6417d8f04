"""Programs of others that tests start, and the README's own clients. A test is skipped where one is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict

import pytest

from harness import TESTS

CLIENTS = TESTS / "clients"


def need(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not on this machine")
    return path


def node() -> str:
    """One that has fetch."""
    found = need("node")
    version = subprocess.run([found, "--version"], stdout=subprocess.PIPE, check=True).stdout.decode()
    if int(version[1:].split(".")[0]) < 18:
        pytest.skip(f"node {version.strip()} is older than 18")
    return found


def npm_install(folder: Path, packages: Dict[str, Any]) -> Path:
    """Makes it a folder with packages from npm."""
    node()
    npm = need("npm")
    (folder / "package.json").write_text(json.dumps(packages))
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--cache", str(folder / "cache")]
    done = subprocess.run(
        command, cwd=str(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "CI": "1"}
    )
    if done.returncode:
        pytest.skip(f"npm cannot install the packages: {done.stdout.decode()[-300:]}")
    return folder
