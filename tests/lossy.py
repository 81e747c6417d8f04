"""A file system that loses what was not synced: records what the script does to files, and makes every state that a
power cut could have left.

What counts as safe is the least that POSIX promises: bytes after an fsync of their file, names after an fsync of their
folder. Everything else may be there or not, each write and each name for itself, and of a write only some sectors.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

SECTOR = 512


class Op(NamedTuple):
    kind: str  # write, truncate, create, mkdir, rename, unlink, rmdir, sync, said
    place: Any  # the file, a number, or the folder, a path, that must be synced for it
    what: Tuple[Any, ...] = ()


class Recorder:
    """Stands for the module `os` in the script, does what it is asked and writes down what changes files."""

    def __init__(self) -> None:
        self.trace: List[Op] = []
        self._lock = threading.RLock()
        self._files: Dict[int, int] = {}  # inode -> number of the file
        self._open: Dict[int, Any] = {}  # descriptor -> number of a file or path of a folder
        self._names: Dict[str, int] = {}
        self._numbers = itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def said(self, word: str, job_id: str) -> None:
        with self._lock:
            self.trace.append(Op("said", None, (word, job_id)))

    def _note(self, kind: str, place: Any, *what: Any) -> None:
        self.trace.append(Op(kind, place, what))

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        with self._lock:
            new = flags & os.O_CREAT and not os.path.lexists(path)
            descriptor = os.open(path, flags, mode)
            if os.path.isdir(path):
                self._open[descriptor] = path
                return descriptor
            if new:
                self._names[path] = next(self._numbers)
                self._note("create", os.path.dirname(path), path, self._names[path])
            self._open[descriptor] = self._names[path]
            if flags & os.O_TRUNC:
                self._note("truncate", self._names[path], 0)
            return descriptor

    def close(self, descriptor: int) -> None:
        with self._lock:
            self._open.pop(descriptor, None)
            os.close(descriptor)

    def pwrite(self, descriptor: int, data: bytes, position: int) -> int:
        with self._lock:
            written = os.pwrite(descriptor, data, position)
            self._note("write", self._open[descriptor], position, bytes(data[:written]))
            return written

    def ftruncate(self, descriptor: int, size: int) -> None:
        with self._lock:
            os.ftruncate(descriptor, size)
            self._note("truncate", self._open[descriptor], size)

    def fsync(self, descriptor: int) -> None:
        with self._lock:  # the disk is in memory: it costs nothing, and would change nothing
            self._note("sync", self._open[descriptor])

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        with self._lock:
            os.mkdir(path, mode)
            self._note("mkdir", os.path.dirname(path), path)

    def makedirs(self, path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        try:
            self.mkdir(path, mode)
        except FileExistsError:
            if not exist_ok or not os.path.isdir(path):
                raise
        except FileNotFoundError:
            self.makedirs(os.path.dirname(path), mode, True)
            self.makedirs(path, mode, exist_ok)

    def replace(self, source: str, target: str) -> None:
        with self._lock:
            os.replace(source, target)
            self._names[target] = self._names.pop(source)
            self._note("rename", os.path.dirname(target), source, target, self._names[target])

    rename = replace

    def unlink(self, path: str) -> None:
        with self._lock:
            os.unlink(path)
            self._names.pop(path)
            self._note("unlink", os.path.dirname(path), path)

    def rmdir(self, path: str) -> None:
        with self._lock:
            os.rmdir(path)
            self._note("rmdir", os.path.dirname(path), path)


def unsynced(trace: List[Op], end: int) -> List[int]:
    """Which of the first operations a power cut may undo."""
    loose: List[int] = []
    for number, op in enumerate(trace[:end]):
        if op.kind == "sync":
            loose = [other for other in loose if trace[other].place != op.place]
        elif op.kind != "said":
            loose.append(number)
    return loose


def choices(trace: List[Op], end: int, dice: random.Random, bound: int) -> Iterator[Tuple[Set[int], Optional[int]]]:
    """Which loose operations are lost, and of which write only some sectors are there."""
    loose = unsynced(trace, end)
    if 1 << len(loose) <= bound:
        for size in range(len(loose) + 1):
            for lost in itertools.combinations(loose, size):
                yield set(lost), None
    else:
        yield set(), None
        yield set(loose), None
        for _ in range(bound // 4):
            yield {dice.choice(loose)}, None
            yield set(loose) - {dice.choice(loose)}, None
            yield set(dice.sample(loose, dice.randrange(len(loose)))), None
            yield set(loose[dice.randrange(len(loose)) :]), None
    writes = [number for number in loose if trace[number].kind == "write"]
    for torn in writes[-2:]:
        yield set(), torn
        yield set(dice.sample(loose, dice.randrange(len(loose)))) - {torn}, torn


def after_power_cut(
    trace: List[Op], end: int, lost: Set[int], torn: Optional[int], dice: random.Random
) -> Tuple[Dict[str, bytes], Set[str]]:
    """The files with their bytes, and the folders."""
    names: Dict[str, int] = {}
    folders: Set[str] = set()
    bytes_of: Dict[int, bytearray] = {}
    for number, op in enumerate(trace[:end]):
        if number in lost:
            continue
        if op.kind == "write":
            position, data = op.what
            content = bytes_of.setdefault(op.place, bytearray())
            for start, part in sectors(position, data):
                if number != torn or dice.random() < 0.5:
                    content.extend(bytes(max(0, start + len(part) - len(content))))
                    content[start : start + len(part)] = part
        elif op.kind == "truncate":
            content = bytes_of.setdefault(op.place, bytearray())
            content[op.what[0] :] = bytes(max(0, op.what[0] - len(content)))
        elif op.kind == "create":
            names[op.what[0]] = op.what[1]
        elif op.kind == "rename":
            names.pop(op.what[0], None)
            names[op.what[1]] = op.what[2]
        elif op.kind == "unlink":
            names.pop(op.what[0], None)
        elif op.kind == "mkdir":
            folders.add(op.what[0])
        elif op.kind == "rmdir":
            folders.discard(op.what[0])
    return {path: bytes(bytes_of.get(file, b"")) for path, file in names.items()}, folders


def sectors(position: int, data: bytes) -> Iterator[Tuple[int, bytes]]:
    while data:
        length = SECTOR - position % SECTOR
        yield position, data[:length]
        position, data = position + length, data[length:]


def put_down(files: Dict[str, bytes], folders: Set[str], old: Path, new: Path) -> None:
    """Makes such a state below another folder. What is in a folder that was lost is lost."""
    new.mkdir()
    for folder in sorted(folders):
        target = new / os.path.relpath(folder, old)
        if target.parent.is_dir():
            target.mkdir(exist_ok=True)
    for path, data in files.items():
        target = new / os.path.relpath(path, old)
        if target.parent.is_dir():
            target.write_bytes(data)
