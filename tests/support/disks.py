"""Disks and other users, for who may have them, and folders that go away."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534  # another user


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory at a folder. The test is skipped by who may not mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not ROOT or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def moved_away(path: Path) -> Iterator[None]:
    """While it is, something else may be at its place."""
    away = path.with_name(path.name + "-away")
    path.rename(away)
    try:
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(str(path))
        elif path.exists():
            path.unlink()
        away.rename(path)


# Holds a lock as another program does that may only read it, and ends with its input.
HOLDER = """
import fcntl, os, sys

if len(sys.argv) > 2:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
lock = open(sys.argv[1], "rb")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(path: Path, *user: Any) -> Iterator[None]:
    """Another process holds a lock. Raises AssertionError if it may not."""
    command = [sys.executable, "-c", HOLDER, str(path), *map(str, user)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n", holder.stderr.read().decode()
            yield
        finally:
            holder.stdin.close()
            holder.wait(30)


def modes_of(folder: Path) -> Dict[str, int]:
    """Of all that is in a folder, the folder too, but for what was installed."""
    paths = [folder, *folder.glob("**/*")]
    ours = [path for path in paths if not {"scripts", "install.py"} & set(path.relative_to(folder).parts)]
    return {str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in ours}


def private_jobs(folder: Path, text: str = "{\n}\n", mode: int = 0o600) -> Path:
    path = folder / "jobs.json"
    path.touch(mode=0o600)
    path.write_text(text)
    path.chmod(mode)
    return path
