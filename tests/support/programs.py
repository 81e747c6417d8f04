"""Programs of others that tests start, and the README's own clients. A test is skipped where one is missing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Dict

import pytest

NPM_SECONDS, NPM_TRIES = 80, 3  # for one try, which takes five seconds


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
    (folder / "package.json").write_text(json.dumps(packages))
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--fetch-timeout=20000"]
    command = [need("npm"), "install", *options, "--cache", str(folder / "cache")]
    said = b""
    for _ in range(NPM_TRIES):
        # npm waits for long for a registry that does not answer. With its children, which would go on.
        with subprocess.Popen(
            command,
            cwd=str(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CI": "1"},
            start_new_session=True,
        ) as process:
            try:
                said = process.communicate(timeout=NPM_SECONDS)[0]
                if process.returncode == 0:
                    return folder
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                said = b"it takes too long"
    pytest.skip(f"npm cannot install the packages: {said.decode()[-300:]}")
