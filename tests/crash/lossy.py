"""A file system that loses what was not synced: records what the script does to files, and makes every state that a
power cut could have left.

What counts as safe is the least that POSIX promises: bytes after an fsync of their file, names after an fsync of their
folder. Everything else may be there or not, each write and each name for itself, and of a write only some sectors.

jobs.json.index3 is written by SQLite, of which nothing is seen here. So its files are copied after each of its
transactions, and what a power cut leaves of them is a choice of its own: none, those of the newest or of any earlier
moment, or those of the newest with a log that lacks its end, as far as SQLite has not synced it: it does so only before
it copies the log into the database. As the index tells jobs.json by inode and time, both come along: a file has the
time of the last write that is left, and the inode of one that is gone may be that of a new one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import sqlite3
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

SECTOR = 512
INDEX = ("jobs.json.index3", "jobs.json.index3-wal")
NO_FILE = -1


class Op(NamedTuple):
    kind: str  # write, truncate, create, mkdir, rename, unlink, rmdir, sync, said, index
    place: Any  # the file, a number, or the folder, a path, that must be synced for it
    what: Tuple[Any, ...] = ()
    mtime: int = 0  # ns, of the file after it


class IndexFiles(NamedTuple):
    """What SQLite had written after a transaction. Pieces of the same bytes are kept once."""

    database: Tuple[bytes, ...]
    log: Tuple[bytes, ...]
    synced: int  # so many pieces of the log are on disk for certain
    file: int  # the number of the jobs.json that it is an index of
    state: Tuple[Any, ...]  # what it says of that


class Left(NamedTuple):
    """What a power cut has left."""

    files: Dict[str, bytes]
    folders: Set[str]
    numbers: Dict[str, int]  # of the files
    mtimes: Dict[str, int]


class RecordedSqlite:
    """Stands for the module `sqlite3` in the script. After each transaction, what is in the index's files is noted."""

    def __init__(self, recorder: "Recorder", checkpoint_every: int):
        self._recorder = recorder
        self._checkpoint_every = checkpoint_every  # pages in the log: then it is synced and goes into the database

    def __getattr__(self, name: str) -> Any:
        return getattr(sqlite3, name)

    def connect(self, path: str, **options: Any) -> sqlite3.Connection:
        recorder = self._recorder

        class Connection(sqlite3.Connection):
            def commit(self) -> None:
                with recorder.lock:
                    super().commit()
                    recorder.note_index(path)

            def close(self) -> None:
                with recorder.lock:
                    super().close()

        connection = sqlite3.connect(path, factory=Connection, **options)
        connection.execute(f"PRAGMA wal_autocheckpoint = {self._checkpoint_every}")
        return connection


class Recorder:
    """Stands for the module `os` in the script, does what it is asked and writes down what changes files."""

    def __init__(self) -> None:
        self.trace: List[Op] = []
        self.lock = threading.RLock()
        self._open: Dict[int, Any] = {}  # descriptor -> number of a file or path of a folder
        self._inodes: Dict[int, int] = {}  # inode -> number of the file that had it last
        self._pieces: Dict[bytes, bytes] = {}
        self._index: Optional[IndexFiles] = None
        self._stamps: Tuple[Any, ...] = ()
        self._names: Dict[str, int] = {}
        self._numbers = itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def said(self, word: str, job_id: str) -> None:
        with self.lock:
            self.trace.append(Op("said", None, (word, job_id)))

    def _note(self, kind: str, place: Any, *what: Any, mtime: int = 0) -> None:
        self.trace.append(Op(kind, place, what, mtime))

    def note_index(self, path: str) -> None:
        """Copies the index's files, as one transaction has left them."""
        with self.lock:
            names = [name for name in (path, f"{path}-wal") if os.path.exists(name)]
            stamps = tuple((os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in names)
            if stamps == self._stamps:
                return
            self._stamps, before = stamps, self._index
            with contextlib.closing(sqlite3.connect(path)) as connection:  # without this one, its last one checkpoints
                connection.execute("PRAGMA wal_autocheckpoint = 0")
                state = connection.execute("SELECT * FROM state").fetchone()
                database, log = (self._in_pieces(name) for name in (path, f"{path}-wal"))
            if before is None or before.database != database:
                synced = len(log)
            else:
                synced = before.synced if before.log[:1] == log[:1] else 0
            self._index = IndexFiles(database, log, synced, self._inodes.get(state[0], NO_FILE), tuple(state))
            self._note("index", None, self._index)

    def _in_pieces(self, path: str) -> Tuple[bytes, ...]:
        data = Path(path).read_bytes() if os.path.exists(path) else b""
        head, size = (32, 4096 + 24) if path.endswith("-wal") else (0, 4096)
        pieces = [data[:head], *(data[start : start + size] for start in range(head, len(data), size))]
        return tuple(self._pieces.setdefault(piece, piece) for piece in pieces)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        with self.lock:
            new = flags & os.O_CREAT and not os.path.lexists(path)
            descriptor = os.open(path, flags, mode)
            if os.path.isdir(path):
                self._open[descriptor] = path
                return descriptor
            if new:
                self._names[path] = next(self._numbers)
                self._note("create", os.path.dirname(path), path, self._names[path])
                self._inodes[os.fstat(descriptor).st_ino] = self._names[path]
            self._open[descriptor] = self._names[path]
            if flags & os.O_TRUNC:
                self._note("truncate", self._names[path], 0)
            return descriptor

    def close(self, descriptor: int) -> None:
        with self.lock:
            self._open.pop(descriptor, None)
            os.close(descriptor)

    def pwrite(self, descriptor: int, data: bytes, position: int) -> int:
        with self.lock:
            written = os.pwrite(descriptor, data, position)
            mtime = os.fstat(descriptor).st_mtime_ns
            self._note("write", self._open[descriptor], position, bytes(data[:written]), mtime=mtime)
            return written

    def ftruncate(self, descriptor: int, size: int) -> None:
        with self.lock:
            os.ftruncate(descriptor, size)
            self._note("truncate", self._open[descriptor], size, mtime=os.fstat(descriptor).st_mtime_ns)

    def fsync(self, descriptor: int) -> None:
        with self.lock:  # the disk is in memory: it costs nothing, and would change nothing
            self._note("sync", self._open[descriptor])

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        with self.lock:
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
        with self.lock:
            os.replace(source, target)
            self._names[target] = self._names.pop(source)
            self._note("rename", os.path.dirname(target), source, target, self._names[target])

    rename = replace

    def unlink(self, path: str) -> None:
        with self.lock:
            os.unlink(path)
            self._names.pop(path)
            self._note("unlink", os.path.dirname(path), path)

    def rmdir(self, path: str) -> None:
        with self.lock:
            os.rmdir(path)
            self._note("rmdir", os.path.dirname(path), path)


def unsynced(trace: List[Op], end: int) -> List[int]:
    """Which of the first operations a power cut may undo."""
    loose: List[int] = []
    for number, op in enumerate(trace[:end]):
        if op.kind == "sync":
            loose = [other for other in loose if trace[other].place != op.place]
        elif op.kind not in ("said", "index"):
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


def after_power_cut(trace: List[Op], end: int, lost: Set[int], torn: Optional[int], dice: random.Random) -> Left:
    names: Dict[str, int] = {}
    folders: Set[str] = set()
    bytes_of: Dict[int, bytearray] = {}
    mtimes: Dict[int, int] = {}
    for number, op in enumerate(trace[:end]):
        if number in lost:
            continue
        if op.mtime:
            mtimes[op.place] = op.mtime
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
    return Left(
        {path: bytes(bytes_of.get(file, b"")) for path, file in names.items() if _is_seen(path)},
        folders,
        {path: file for path, file in names.items() if _is_seen(path)},
        {path: mtimes[file] for path, file in names.items() if _is_seen(path) and file in mtimes},
    )


def _is_seen(path: str) -> bool:
    return not os.path.basename(path).startswith(INDEX[0])


def index_choices(trace: List[Op], end: int, dice: random.Random) -> Iterator[Optional[IndexFiles]]:
    """What may be left of the index's files, None if nothing."""
    known = [op.what[0] for op in trace[:end] if op.kind == "index"]
    yield None
    if not known:
        return
    newest, older = known[-1], dice.choice(known)
    yield newest
    yield older
    if newest.synced < len(newest.log):
        yield newest._replace(log=newest.log[: newest.synced])
        *log, last = newest.log[: dice.randrange(newest.synced, len(newest.log)) + 1]
        yield newest._replace(log=(*log, last[: dice.randrange(len(last) + 1)]))


def sectors(position: int, data: bytes) -> Iterator[Tuple[int, bytes]]:
    while data:
        length = SECTOR - position % SECTOR
        yield position, data[:length]
        position, data = position + length, data[length:]


def put_down(left: Left, index: Optional[IndexFiles], old: Path, new: Path, dice: random.Random) -> None:
    """Makes such a state below another folder. What is in a folder that was lost is lost."""
    new.mkdir()
    for folder in sorted(left.folders):
        target = new / os.path.relpath(folder, old)
        if target.parent.is_dir():
            target.mkdir(exist_ok=True)
    for path, data in left.files.items():
        target = new / os.path.relpath(path, old)
        if target.parent.is_dir():
            target.write_bytes(data)
            if path in left.mtimes:
                os.utime(str(target), ns=(left.mtimes[path], left.mtimes[path]))
    if index is not None:
        for name, pieces in zip(INDEX, (index.database, index.log)):
            if any(pieces):
                (new / name).write_bytes(b"".join(pieces))
        journal = new / "jobs.json"
        if journal.exists():
            is_its = left.numbers[str(old / "jobs.json")] == index.file
            is_reused = index.file not in left.numbers.values() and dice.random() < 0.5
            _tell_inode(new / INDEX[0], journal.stat().st_ino if is_its or is_reused else 1)


def _tell_inode(index: Path, inode: int) -> None:
    """Files that were copied have other inodes."""
    with contextlib.closing(sqlite3.connect(str(index))) as connection, contextlib.suppress(sqlite3.OperationalError):
        connection.execute("UPDATE state SET inode = ?", (inode,))
        connection.commit()
