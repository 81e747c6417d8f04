"""Disks and other users, for who may have them, and folders that go away."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Iterator

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
