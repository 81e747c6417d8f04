"""Job Tracker: no generation requested through the webui's API is lost.

Every `POST /sdapi/v1/txt2img` and `/sdapi/v1/img2img` becomes a job with an ID, which reaches the client in the
header `X-Job-ID` before generation starts. The job and its images are kept on disk and handed out later.

Of the webui's own work two things are wrapped, and all else of a generation stays as it is: the two routes, and the
lock that is the webui's queue. A request that asks for this lock has been checked by the webui. That makes it a job,
which is written to disk, and then the response's head is sent. The route runs in a task of its own, which does not end
with the client's connection. The part Generation tells this step by step.

The file reads in the order in which a request meets its parts, and every part knows only those above it:

    Platform      what differs between operating systems
    Settings      config.json and the environment's variables
    Job           the record, on disk and as JSON
    Journal       the lines of jobs.json
    Index         a view of them on SQLite, to find jobs by
    JobStore      the jobs, in both
    ImageStore    images/
    Fleet         the same two stores for many webuis, on PostgreSQL and a bucket
    Predecessor   the jobs of API-Job-Tracker-SD-WebUI
    Migration     the command that copies jobs into a fleet's stores, and back
    Tracker       a job's life, the only writer of both stores
    Webhooks      the ends of jobs, told to others
    Housekeeper   what is done now and then
    Http          what HTTP, browsers and servers ask for, whatever is sent
    Generation    the way of one generation request
    Events        what those are told who watch a job
    API           the routes under /sdapi/v1/job
    Tab           the page "Job Tracker" in the webui
    Host          the only part that knows the webui
"""

import argparse
import asyncio
import base64
import contextlib
import contextvars
import copy
import ctypes
import enum
import errno
import functools
import glob
import hashlib
import heapq
import hmac
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import shutil
import socket
import sqlite3
import ssl
import stat
import struct
import sys
import textwrap
import threading
import time
import traceback
import zlib
from collections import Counter, OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import wait as wait_for_futures
from datetime import datetime, timedelta, timezone
from string import Template
from types import TracebackType
from typing import (
    Any,
    AsyncIterator,
    BinaryIO,
    Callable,
    Collection,
    ContextManager,
    Coroutine,
    Dict,
    Iterable,
    Iterator,
    List,
    Literal,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakSet

import anyio.to_thread
import httpcore
import httpx
import jinja2
import PIL.Image
from fastapi import FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from markupsafe import Markup, escape
from pydantic import VERSION as PYDANTIC
from pydantic import BaseModel, Field
from starlette.datastructures import URL, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# anyio 3 imports it when a thread first needs it, and hands it half imported to the event loop of another thread that
# comes meanwhile. The webui has one, and we another.
with contextlib.suppress(ImportError):
    importlib.import_module("anyio._backends._asyncio")

log = logging.getLogger("job_tracker")

VERSION = "1.0.0"
EXTENSION_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ------------------------------------------------------------------------------------------------------------------
# Platform: what differs between operating systems
# ------------------------------------------------------------------------------------------------------------------

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None
    import msvcrt

BINARY = getattr(os, "O_BINARY", 0)
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
O_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # for a pipe where a file should be

LOCKS_OPEN_FILES = os.name == "nt"  # nobody can remove, rename or replace them
# The value of SO_LINGER with which a close drops what is unsent and resets the connection.
LINGER_RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.ENOTTY, errno.EINVAL)  # by a mount
IRREPLACEABLE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)  # a mounted file


@contextlib.contextmanager
def unsupported_ignored() -> Iterator[None]:
    """Passes over what a file system does not offer, as some network drives have no locks. Raises every other error."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def reason_of(error: BaseException) -> str:
    """Why something failed, for clients and pages: without the path that an OSError names. The log may have that."""
    if isinstance(error, OSError):
        # One without a number was given a text alone, or, by shutil, a list of paths.
        own = error.args[0] if len(error.args) == 1 and not isinstance(error, shutil.Error) else ""
        return error.strerror or (own if isinstance(own, str) and own else type(error).__name__)
    return str(error) or type(error).__name__


def escape_for_log(text: str) -> str:
    """Text from outside in a form that cannot forge a line of the log."""
    return text[:200].encode("unicode_escape").decode("ascii")


# Open files


def is_same_file(path: str, file: int) -> bool:
    """Whether a name stands for a file that is open. Raises OSError if the name cannot be looked up."""
    with contextlib.suppress(FileNotFoundError):  # then it stands for nothing
        found = os.stat(path)
        # The open file's disk may have been unmounted, with another in its place by now.
        with contextlib.suppress(OSError):
            return LOCKS_OPEN_FILES or os.path.samestat(found, os.fstat(file))
    return False


def open_files_limit() -> int:
    """How many files and connections this process may have open at once. Windows has no such limit that matters."""
    if resource is None:
        return 1 << 13
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


def close_file(file: Optional[int]) -> None:
    """Closes a file, if there is one."""
    if file is not None:
        # Even when this fails, the descriptor is free and may be another file's: it must never be closed twice.
        with contextlib.suppress(OSError):
            os.close(file)


def open_regular(path: str, flags: int = 0) -> int:
    """Opens a file for reading. Raises OSError, also for a folder, and for a pipe without waiting for its other end."""
    file = os.open(path, os.O_RDONLY | O_NONBLOCK | BINARY | flags)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no file", path)
    return file


seek_lock = threading.Lock()  # for Windows, where an open file has only one position, which all threads share


def read_at(file: int, length: int, position: int) -> bytes:
    """`length` bytes from `position`, fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(file, length, position)
    with seek_lock:
        os.lseek(file, position, os.SEEK_SET)
        return os.read(file, length)


def write_at(file: int, data: bytes, position: int) -> None:
    """All of `data` at `position`. Raises OSError; a part may then have been written."""
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(file, data, position)
        else:
            with seek_lock:
                os.lseek(file, position, os.SEEK_SET)
                written = os.write(file, data)
        data = data[written:]
        position += written


def sync_file(file: int) -> None:
    """Makes what was written survive a power cut. On macOS, `fsync` alone leaves it in the drive's own memory."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with unsupported_ignored():
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def sync_folder(path: str) -> None:
    """Makes the names in a folder survive a power cut. Windows has no such call and does it by itself."""
    if os.name == "nt":
        return
    folder = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        with unsupported_ignored():
            sync_file(folder)
    finally:
        os.close(folder)


NETWORK_DRIVES = re.compile(
    r"nfs|cifs|smb|9p|afs|ceph|lustre|vboxsf|virtiofs|prl_fs|fuse\.(sshfs|rclone|s3fs|gluster|grpc)"
)


def is_on_network(path: str) -> bool:
    """Whether a file lies on another machine, whose memory is not shared with ours. False where that cannot be told."""
    if hasattr(ctypes, "windll"):
        drive = os.path.splitdrive(os.path.abspath(path))[0] + "\\"
        return ctypes.windll.kernel32.GetDriveTypeW(drive) == 4  # DRIVE_REMOTE
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", errors="replace") as mounts:
        device = os.stat(path).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        for mount, _, kind in (line.partition(" - ") for line in mounts):
            if mount.split()[2] == number:
                return NETWORK_DRIVES.match(kind) is not None
    return False


# Access. What takes the place of a file, or is made from one, is for the same people. A new file is private until it
# has its true owner and group: whoever opens it in its first moment can read all that is written into it later.
# Without a file to follow, the umask decides. Windows has no such modes.

# The umask can only be read by setting it. A file that another thread makes in that moment is private, no more.
UMASK = os.umask(0o077)
os.umask(UMASK)

CREATE_NEW = os.O_CREAT | os.O_EXCL | BINARY


class Access(NamedTuple):
    """Owner, group and mode of a file."""

    owner: int  # as the system numbers them; -1 stands for whoever makes the file
    group: int  # the same
    mode: int


def group_as_others(mode: int) -> int:
    """The mode in which the group may do what everybody may."""
    return mode & ~0o070 | (mode & 0o007) << 3


def access_of(*paths: str) -> Access:
    """Access for those who may read all of the given files that exist, by the owner and group of the first.

    If none is there, the umask decides. Raises OSError if that cannot be told.
    """
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.append(os.stat(path))
    if not found:
        return Access(-1, -1, 0o666 & ~UMASK)
    owner, group, mode = found[0].st_uid, found[0].st_gid, 0o666
    for status in found:
        mode &= status.st_mode if status.st_gid == group else group_as_others(status.st_mode)
    return Access(owner, group, mode | 0o600)


def give_access(file: int, access: Access) -> None:
    """Gives an open file of ours an owner and a group, as far as that is allowed, and a mode. Never raises.

    If the group cannot be the wanted one, it may do no more than everybody.
    """
    if not hasattr(os, "fchown"):
        return
    # Only root can give a file to another owner. For others it is the group alone.
    for owner in (access.owner, -1):
        with contextlib.suppress(OSError):
            os.fchown(file, owner, access.group)
            break
    # A drive may have no modes, or be gone. The file stays as it was made, which is private.
    with contextlib.suppress(OSError):
        has_group = access.group in (-1, os.fstat(file).st_gid)
        os.fchmod(file, access.mode if has_group else group_as_others(access.mode))


def create_like(path: str, *others: str, flags: int = os.O_WRONLY, mask: int = 0) -> int:
    """Opens a new file for those who may read all of the others that exist, without the mode bits of `mask`."""
    access = access_of(*others)
    file = os.open(path, flags | CREATE_NEW, 0o600)
    give_access(file, access._replace(mode=access.mode & ~mask))
    return file


def narrow_access(path: str, other: str) -> None:
    """Hides a file of ours from those who may not read another. Does not open it. Never raises."""
    with contextlib.suppress(OSError):  # it is not there, or somebody else's
        os.chmod(path, access_of(path, other).mode)


def make_folder(path: str, like: str = "") -> None:
    """Makes a folder, and those above it, so that they survive a power cut.

    It is for those who may read the file `like`, if that exists, but for no more than the umask allows.
    """
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    if above != path:  # they are the same for the root of a drive that is not there
        make_folder(above)
    access = access_of(like)
    os.makedirs(path, mode=access.mode | (access.mode & 0o444) >> 2, exist_ok=True)
    if like and hasattr(os, "fchown"):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | NO_FOLLOW)
        try:
            give_access(folder, access._replace(mode=stat.S_IMODE(os.fstat(folder).st_mode)))
        finally:
            os.close(folder)
    sync_folder(above)


# Whole files


def fill_file(file: int, path: str, chunks: Iterable[bytes], name: str) -> int:
    """Writes a new file, which is open, renames it if it has not its true name yet, and returns its size in bytes.

    Removes it if that fails. The name is not safe from a power cut before the folder is synced.
    """
    size = 0
    try:
        try:
            for chunk in chunks:
                write_at(file, chunk, size)
                size += len(chunk)
            sync_file(file)
        finally:
            os.close(file)
        if name != path:
            os.replace(path, name)
    except BaseException:
        with contextlib.suppress(OSError):  # the disk may be gone
            os.unlink(path)
        raise
    return size


def create_file(path: str, data: bytes) -> None:
    """Makes a file that is not there, whole or not at all. Raises FileExistsError if somebody else has just made it."""
    fill_file(os.open(path, os.O_WRONLY | CREATE_NEW, 0o666), path, [data], path)
    sync_folder(os.path.dirname(path))


def replace_file(path: str, data: bytes, like: str = "") -> None:
    """Puts a new file in the place of an old one: after a crash there is the one or the other, whole.

    It is for those who may read the old one and the file `like`, where these exist.
    """
    part = f"{path}.{secrets.token_hex(4)}.part"
    fill_file(create_like(part, path, like), part, [data], path)
    sync_folder(os.path.dirname(path))


def overwrite_file(path: str, data: bytes) -> None:
    """Gives a file new content in place, for one that cannot be replaced. If that fails it has its old content again.

    A reader, or a crash, can meet a half-written file only where the new content is longer than the old.
    """
    file = os.open(path, os.O_RDWR | BINARY)
    try:
        old = read_at(file, os.fstat(file).st_size, 0)
        try:
            # Blanks over the rest of the old content: one write, after which the file is valid JSON already.
            write_at(file, data + b" " * (len(old) - len(data)), 0)
            os.ftruncate(file, len(data))
            sync_file(file)
        except OSError:
            write_at(file, old, 0)
            os.ftruncate(file, len(old))
            raise
    finally:
        os.close(file)


def write_file(path: str, data: bytes) -> None:
    """Gives a file new content, and in place where it cannot be replaced. Raises OSError."""
    try:
        replace_file(path, data)
    except OSError as error:
        if error.errno not in IRREPLACEABLE or not os.path.isfile(path):
            raise
        overwrite_file(path, data)


def copy_file(source: str, target: str) -> None:
    """Copies a file to a new name, for the same people, whole or not at all. Raises OSError."""
    with os.fdopen(open_regular(source), "rb") as original:
        fill_file(create_like(target, source), target, iter(lambda: original.read(1 << 20), b""), target)
    sync_folder(os.path.dirname(target))


def free_name(path: str) -> str:
    """A name that no file has yet: this one, or with a number behind it."""
    names = itertools.chain([path], (f"{path}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def quarantine_name(path: str) -> str:
    """A new name for what cannot be used: `<path>.damaged-<time>`."""
    return free_name(f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")


def quarantine(path: str) -> str:
    """Renames what cannot be used, and returns the new name."""
    name = quarantine_name(path)
    os.rename(path, name)
    return name


# The lock between processes


LOCK_SECONDS = 5.0  # how long a lock is waited for: no process that works as it should holds one for so long
LOCK_MOMENT = 0.1  # the same after a wait that failed
LOCK_PAUSE = 0.001  # seconds, at most, between two tries
LOCK_TURN = 0.05  # seconds for which one process may take a lock again and again before it lets others try
SIGNATURE_SIZE = 400  # bytes: a hundred characters, whichever they are


def try_lock(file: int) -> bool:
    """Locks an open file, False if another has done so. The system unlocks it when its holder ends, however it ends."""
    try:
        if fcntl:
            with unsupported_ignored():  # one webui alone is as safe as ever
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, 0, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock(file: int) -> None:
    with contextlib.suppress(OSError):  # it was not locked, or its disk is gone
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_UN)
        else:
            os.lseek(file, 0, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)


class FileLock:
    """A lock between processes. It also excludes other instances in the same one: it belongs to the open file.

    One instance is used by one thread at a time.

    `flock` also works on a file that is open for reading. So the lock can be opened only by those who may write the
    file that it is for: whoever else could hold it could bring every webui on the folder to a stop.
    """

    opened: "Set[FileLock]" = set()  # all of this process that have their file open

    def __init__(self, path: str, guarded: str = ""):
        """`guarded` is the file that the lock is for. Until there is one, the umask says who may write it."""
        self.path = path
        self._guarded = guarded
        self._file: Optional[int] = None
        self._signed = ""  # what stands in the file
        self._patience = LOCK_SECONDS
        # A turn is as long as the lock is taken again at once after each release.
        self._turn_began = self._released_at = -math.inf

    def acquire(self) -> None:
        """Takes the lock. Raises TimeoutError, an OSError, if another holds it.

        After such a failure it is waited for only a moment, until it can be had again. So callers wait long only once.
        """
        locked = self.try_acquire(self._patience)
        self._patience = LOCK_SECONDS if locked else LOCK_MOMENT
        if not locked:
            name = os.path.basename(self.path)
            raise TimeoutError(errno.ETIMEDOUT, f"another program holds the lock {name}", self.path)

    def try_acquire(self, seconds: float = 0) -> bool:
        """Takes the lock. False when another still holds it after some seconds; 0 is one try. Raises OSError."""
        self._yield_turn()
        until, pause = time.monotonic() + seconds, LOCK_PAUSE / 8
        while True:
            if self._file is None:
                self._open()
            try:
                locked = try_lock(self._file)
                is_current = is_same_file(self.path, self._file)
            except OSError:
                # Its disk may have been unmounted. The next try opens the file again.
                self.close()
                raise
            if not is_current:
                # Its folder was removed, or mounted anew: others lock another file of this name.
                self.close()
            elif locked or time.monotonic() >= until:
                return locked
            else:
                time.sleep(pause)
                pause = min(2 * pause, LOCK_PAUSE)

    def _yield_turn(self) -> None:
        """Pauses after a long turn. Others try only now and then, and would else find the lock free by chance alone."""
        now = time.monotonic()
        if now - self._released_at >= 2 * LOCK_PAUSE:
            self._turn_began = now
        elif now - self._turn_began >= LOCK_TURN:
            time.sleep(2 * LOCK_PAUSE)
            self._turn_began = time.monotonic()

    def _open(self) -> None:
        make_folder(os.path.dirname(self.path))
        access = access_of(self._guarded)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | O_NONBLOCK | BINARY, 0o600)
        self._signed = ""
        self.opened.add(self)
        with contextlib.suppress(OSError):  # it may just have been removed: `try_acquire` will see that
            found = os.fstat(self._file)
            # A link leads to somebody's file, whose mode is not ours to change.
            if not found.st_size and os.path.samestat(os.lstat(self.path), found):
                writers = access.mode & 0o022
                give_access(self._file, access._replace(mode=0o600 | writers | writers << 1))

    def sign(self, name: str) -> None:
        """Says in the file who holds the lock, for `holder`. Does not raise."""
        if self._file is not None and self._signed != name:
            with contextlib.suppress(OSError):  # it is a word for people
                # Windows lets nobody read the byte that is locked.
                write_at(self._file, name.encode("utf-8", "replace").ljust(SIGNATURE_SIZE)[:SIGNATURE_SIZE], 1)
                self._signed = name

    @staticmethod
    def holder(path: str) -> Optional[str]:
        """Who holds the lock at a path, if he signed it. None if nobody does. Makes no file. Raises OSError."""
        file = os.open(path, os.O_RDWR | O_NONBLOCK | BINARY)  # NFS locks no file that is open for reading only
        try:
            if try_lock(file):
                unlock(file)
                return None
            return read_at(file, SIGNATURE_SIZE, 1).decode("utf-8", "replace").strip()
        finally:
            close_file(file)

    def release(self) -> None:
        self._released_at = time.monotonic()
        unlock(self._file)

    def close(self) -> None:
        """Releases the lock, and closes the file."""
        if self._file is not None:
            # Closing alone is not enough: a child that is being forked just now may have a copy of the file.
            unlock(self._file)
            self._close_file()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        close_file(file)
        self.opened.discard(self)

    @classmethod
    def close_copies(cls) -> None:
        """In a forked child: closes its copies, by which it would hold the locks after its parent's end.

        Does not unlock them: a copy is the same open file, and the parent would lose its lock.
        """
        for lock in list(cls.opened):
            lock._close_file()

    def __enter__(self) -> "FileLock":
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FileLock.close_copies)


# ------------------------------------------------------------------------------------------------------------------
# Settings: config.json and the environment's variables
# ------------------------------------------------------------------------------------------------------------------

BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
NUMBER = re.compile(r"[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?\Z")  # Python's `float` takes more: 1_0
UNCHANGED = object()  # of an invalid value: what was in force stays so


def one_of(text: str, allowed: Iterable[str]) -> str:
    """That of the allowed words which a text is, case ignored. Raises ValueError that names them."""
    for word in allowed:
        if word.lower() == text.lower():
            return word
    raise ValueError("it must be one of " + ", ".join(allowed))


def parse_boolean(text: str) -> bool:
    return BOOLEANS[one_of(text, BOOLEANS)]


def check_boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it must be true or false")
    return value


def parse_amount(text: str, unit: str) -> Optional[float]:
    return check_amount(float(text) if NUMBER.match(text) else text, unit)


def check_amount(value: Any, unit: str) -> Optional[float]:
    """A number of something, None for off."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "off"):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"it must be a number of {unit} >= 0, or off")
    return value or None


def parse_count(text: str) -> Optional[int]:
    if text.lower() == "off":
        return None
    if not re.match(r"[0-9]{1,15}\Z", text):
        raise ValueError("it must be a whole number >= 0, or off")
    return int(text) or None


RESUMES = ("async", "all", "off")


def parse_folder(text: str) -> str:
    """A folder, as people write it into a shell script, a batch file or a list of variables. Empty for none."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    path = os.path.expanduser(text)
    if text and not os.path.isabs(path):
        log.warning("TRACKER_DATA_DIR=%r is not an absolute path: jobs are in %s", text, os.path.abspath(path))
    return os.path.abspath(path) if text else ""


URL_LIMIT = 2000  # characters
URL_FORM = re.compile(r"[!-~]+\Z")  # others are written with percent signs, RFC 3986, 2.1


def parse_webhook_url(text: str) -> str:
    """A URL to which webhooks can be sent. Raises ValueError."""
    if len(text) > URL_LIMIT or not URL_FORM.match(text):
        raise ValueError(f"it must be a URL of at most {URL_LIMIT:,} ASCII characters")
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")  # raises ValueError for what cannot be the name of a host
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError("it must be a URL that begins with http:// or https://")
    if parts.username is not None:  # it would be stored, and shown to others
        raise ValueError("it must not have a user or a password")
    return text


def parse_webhook_secret(text: str) -> bytes:
    """The key in a secret as Standard Webhooks writes them: base64 of 24 to 64 bytes. Raises ValueError."""
    try:
        key = base64.b64decode(text[len("whsec_") :] if text.startswith("whsec_") else text, validate=True)
    except ValueError:
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError("it must be whsec_ and the base64 of 24 to 64 bytes")
    return key


def parse_store_url(text: str) -> str:
    """Where jobs are kept that many webuis share: a PostgreSQL database, as libpq names it. Raises ValueError."""
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError("it must be a URL that begins with postgresql://")
    # Else a part of the password could be taken for the host, or the name of the database, and be shown.
    try:
        is_plain = "#" not in text and text.count("@") <= urlsplit(text).netloc.count("@") <= 1
    except ValueError:
        is_plain = False
    if not is_plain:
        raise ValueError("in a user or password, @ is written %40, / %2F, ? %3F, # %23, [ %5B and ] %5D")
    return text


BUCKETS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")  # schemes of object stores


def parse_images_url(text: str) -> str:
    """Where images are kept that many webuis share: a bucket and a prefix in it. Raises ValueError."""
    parts = urlsplit(text)
    if parts.scheme not in BUCKETS or not parts.netloc or parts.query or parts.fragment:
        raise ValueError("it must be a URL such as s3://bucket/prefix, gs://bucket/prefix or az://container/prefix")
    if "@" in parts.netloc and not parts.scheme.startswith("abfs"):  # a password would be shown
        raise ValueError("it must not have a key: keys come by the store's own variables, such as AWS_ACCESS_KEY_ID")
    return text.rstrip("/")


SERVER_LIMIT = 100  # characters


def parse_server(text: str) -> str:
    if len(text) > SERVER_LIMIT or not text.isprintable():
        raise ValueError(f"it must have at most {SERVER_LIMIT} characters that can be printed")
    return text


class Setting(NamedTuple):
    """All that there is to say about one setting."""

    name: str  # in config.json, and of the attribute of Settings
    default: Any
    variable: str  # of the environment, which overrides config.json
    parse: Callable[[str], Any]  # the variable's text; raises ValueError
    check: Optional[Callable[[Any], Any]] = None  # the same for a value in config.json; None: it has no place there
    until_read: Any = None  # in force until config.json can be read
    when_invalid: Tuple[Any, str] = UNCHANGED, "it is ignored"  # what is in force then, and how the log says it
    is_secret: bool = False  # the log does not say it


SETTINGS = (
    Setting("enabled", False, "TRACKER_ENABLED", parse_boolean, check_boolean, until_read=False),
    # Whoever meant something else is not given the default, which might remove what he wants to keep.
    Setting(
        "retention_days",
        30,
        "TRACKER_RETENTION",
        functools.partial(parse_amount, unit="days"),
        functools.partial(check_amount, unit="days"),
        when_invalid=(None, "retention is off"),
    ),
    Setting("data_folder", "", "TRACKER_DATA_DIR", parse_folder),
    Setting("resume", "async", "TRACKER_RESUME", functools.partial(one_of, allowed=RESUMES)),
    Setting("max_gb", None, "TRACKER_MAX_GB", functools.partial(parse_amount, unit="GB")),
    Setting("max_pending", None, "TRACKER_MAX_PENDING", parse_count),
    Setting("webhook_url", None, "TRACKER_WEBHOOK_URL", parse_webhook_url, is_secret=True),
    Setting("webhook_secret", None, "TRACKER_WEBHOOK_SECRET", parse_webhook_secret, is_secret=True),
    Setting("server", None, "TRACKER_SERVER", parse_server),
    Setting("store_url", None, "TRACKER_STORE", parse_store_url, is_secret=True),
    Setting("images_url", None, "TRACKER_IMAGES", parse_images_url, is_secret=True),
)
IN_CONFIG = {setting.name: setting for setting in SETTINGS if setting.check}
DEFAULT_CONFIG = {name: setting.default for name, setting in IN_CONFIG.items()}
NO_CONFIG = {name: setting.until_read for name, setting in IN_CONFIG.items()}


def value_in(config: Dict[str, Any], setting: Setting) -> Any:
    """The value that config.json gives a setting. Raises ValueError."""
    if setting.name in config:
        return setting.check(config[setting.name])
    unknown = [name for name in config if name not in IN_CONFIG]
    if unknown and setting.when_invalid[0] is not UNCHANGED:  # a slip of the pen may be meant by it
        raise ValueError(f"it is missing, and {unknown[0][:80]!a} is no setting")
    return setting.default


def with_our_names(config: Dict[str, Any]) -> Dict[str, Any]:
    """The settings of our predecessor, API-Job-Tracker-SD-WebUI, by our own names."""
    rest = dict(config)
    enabled = rest.pop("tracking_enabled", None)
    return {"enabled": enabled, **rest} if isinstance(enabled, bool) and "enabled" not in config else config


class Settings:
    """What the user decided: an attribute for each of SETTINGS, to be read from any thread at any time.

    A variable of the environment overrides config.json for the life of the process; `locked` maps the name of such a
    setting to its variable. Nothing here raises for what a file or a variable says: it warns and goes on.

    What cannot be read never deletes anything and never overwrites anything. While config.json is broken, empty,
    half-written or gone, what was known of it holds; until it can be read for the first time, tracking and retention
    are off.
    """

    enabled: bool
    retention_days: Optional[float]  # None: off
    data_folder: str  # where jobs.json and images/ lie
    resume: str  # one of RESUMES: which Pending jobs go on after a restart
    max_gb: Optional[float]  # 10^9 bytes that the files of ended jobs may have; None: off
    max_pending: Optional[int]  # jobs that may wait; None: off
    webhook_url: Optional[str]  # where the ends of jobs are told whose requests name no other URL
    webhook_secret: Optional[bytes]  # the key that webhooks are signed by
    server: Optional[str]  # what this webui is called among others; None: by its host and port
    store_url: Optional[str]  # the database that has the jobs, with its password; None: jobs.json
    images_url: Optional[str]  # the bucket that has the images; None: images/

    def __init__(self, folder: str, environ: Dict[str, str]):
        self.folder = folder  # the extension's
        self.path = os.path.join(folder, "config.json")
        self.locked: Dict[str, str] = {}
        self.trouble: Optional[str] = None  # what is wrong with config.json now, for users
        self._lock = threading.Lock()
        self._config = NO_CONFIG  # what config.json said when it was last understood, or written here
        self._data: Optional[bytes] = None  # the same as it stood there
        self._failure: Optional[Exception] = None  # why it cannot be read now
        self._is_started = False  # once it is, changes are logged
        for setting in SETTINGS:
            setattr(self, setting.name, setting.default)
            self._read_variable(setting, environ.get(setting.variable, "").strip())
        self.data_folder = self.data_folder or os.path.abspath(folder)
        self._apply(NO_CONFIG)
        self._read()
        self._is_started = True

    def _read_variable(self, setting: Setting, text: str) -> None:
        if not text:
            return
        try:
            value = setting.parse(text)
        except ValueError as error:
            value, consequence = setting.when_invalid
            shown = setting.variable if setting.is_secret else f"{setting.variable}={text[:80]!r}"
            log.warning("%s is invalid, so %s: %s", shown, consequence, error)
        if value is not UNCHANGED:
            setattr(self, setting.name, value)
            self.locked[setting.name] = setting.variable

    @property
    def retention_unknown(self) -> bool:
        """Whether the retention stands in a config.json that cannot be read now."""
        return self._failure is not None and "retention_days" not in self.locked

    def refresh(self) -> None:
        """Reads config.json again, and makes it if there never was one."""
        with self._lock:
            self._read()

    def save(self, **changes: Any) -> None:
        """Changes settings, at once and in config.json, which keeps what else stands in it.

        Of a file that is no valid JSON, a copy is kept. Raises ValueError for an unknown name, an invalid value, or a
        setting that a variable locks, and OSError if the file cannot be read or written; then nothing has changed.
        """
        for name, value in changes.items():
            if name not in IN_CONFIG:
                raise ValueError(f"there is no setting {name!r}")
            if name in self.locked:
                raise ValueError(f"{name} is set by {self.locked[name]}")
            IN_CONFIG[name].check(value)
        with self._lock:
            self._read()
            write = write_file
            if isinstance(self._failure, (ValueError, RecursionError)):
                copy = quarantine_name(self.path)
                copy_file(self.path, copy)
                log.warning("config.json was broken. It is written anew, what stood in it is in %s", copy)
                # It may be half of an upload, whose rest is not to go into a file that has lost its name.
                write = overwrite_file
            elif isinstance(self._failure, OSError) and not isinstance(self._failure, FileNotFoundError):
                raise self._failure
            self._write({**self._config, **changes}, write)

    def _read(self) -> None:
        try:
            with os.fdopen(open_regular(self.path), "rb") as file:
                data = file.read(1 << 20)
            if data == self._data and self._failure is None:
                return
            config = json.loads(data.decode("utf-8-sig"), parse_constant=str)
            if not isinstance(config, dict):
                raise ValueError("it is no JSON object")
            json.dumps(config, indent=4)  # what is too deep to be written again is broken, too
        except FileNotFoundError as error:
            # A link that leads nowhere is no first start: what it leads to may be on a drive that is not there yet.
            if self._config is NO_CONFIG and not os.path.islink(self.path):
                self._try_to_write(DEFAULT_CONFIG, create_file)
            else:
                self._set_failure(error)
        except (OSError, ValueError, RecursionError) as error:
            self._set_failure(error)
        else:
            if self._failure is not None:
                log.info("config.json can be read again")
            renamed = with_our_names(config)
            self._set_config(renamed, data)
            if renamed != config:
                log.info("config.json of API-Job-Tracker-SD-WebUI is taken over")
                self._try_to_write(renamed, write_file)

    def _set_failure(self, error: Exception) -> None:
        """The file cannot be read, or is no valid JSON."""
        self._failure = error
        state = "tracking and retention are off" if self._config is NO_CONFIG else "what was known of it holds"
        self._set_trouble(f"config.json cannot be read ({reason_of(error)}). Until it can be, {state}")

    def _set_config(self, config: Dict[str, Any], data: bytes) -> None:
        """What config.json holds is known now."""
        self._config, self._data, self._failure = config, data, None
        self._set_trouble(self._apply(config))

    def _apply(self, config: Dict[str, Any]) -> Optional[str]:
        """Puts in force what no variable locks. Returns what is invalid, in words."""
        troubles, was_enabled = [], self.enabled
        for name, setting in IN_CONFIG.items():
            try:
                value = value_in(config, setting)
            except ValueError as error:
                value, consequence = setting.when_invalid
                troubles.append(f"{name} is invalid, so {consequence}: {error}")
            if value is not UNCHANGED and name not in self.locked:
                setattr(self, name, value)
        if self._is_started and self.enabled != was_enabled:
            log.info("Tracking is %s now", "on" if self.enabled else "off")
        return f"config.json: {'. '.join(troubles)}" if troubles else None

    def _write(self, config: Dict[str, Any], write: Callable[[str, bytes], None]) -> None:
        data = json.dumps(config, indent=4).encode() + b"\n"
        write(os.path.realpath(self.path), data)
        self._set_config(config, data)

    def _try_to_write(self, config: Dict[str, Any], write: Callable[[str, bytes], None]) -> None:
        try:
            self._write(config, write)
        except FileExistsError as error:  # somebody has just made it: it is read at the next look
            self._set_failure(error)
        except OSError as error:
            self._apply(config)
            self._set_trouble(f"config.json cannot be written, settings will not be kept: {reason_of(error)}")

    def _set_trouble(self, trouble: Optional[str]) -> None:
        if trouble and trouble != self.trouble:
            log.warning("%s", trouble)
        self.trouble = trouble


# ------------------------------------------------------------------------------------------------------------------
# Job: the record, on disk and as JSON
# ------------------------------------------------------------------------------------------------------------------

PENDING, PROCESSING, COMPLETED, FAILED = STATUSES = ("Pending", "Processing", "Completed", "Failed")
ENDED = (COMPLETED, FAILED)
TYPES = ("txt2img", "img2img")
LEFT_BEHIND = "The webui ended before the generation did"  # the `error` of a job that its webui could not end
CANCELLED = "Cancelled"

ID_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
ID_FORM = re.compile(r"[A-Za-z0-9]{8}\Z")
IMAGE_FORM = re.compile(r"\d{4}-\d\d-\d\d/([A-Za-z0-9]{8})_(\d{1,6})\.([a-z]{3,4})\Z")
MEDIA_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "avif": "image/avif",
    "jxl": "image/jxl",
    "tiff": "image/tiff",
    "bmp": "image/bmp",
    "txt": "text/plain",  # starlette adds the charset
}
OTHER_MEDIA_TYPE = "application/octet-stream"
MEDIA_TYPE_FORM = re.compile(r"[a-z]+/[a-z0-9.+-]{1,100}\Z")

MAX_TIMESTAMP = 1 << 34  # Unix seconds, in the year 2514: Windows knows no day after 3000
SIZE_LIMIT = 1 << 50  # bytes, which no file has
PROMPT_LIMIT = 100_000  # characters kept in jobs.json; `parameters` has the whole prompt
IP_LIMIT = 100  # characters: a server that trusts a proxy takes what that says for an address
LABEL_LIMIT = 255  # characters
LEASE = 20.0  # seconds for which one process has a webhook to itself: longer than one try may take


class Image(NamedTuple):
    """An image of a job, with what lists need to know, so that no list opens its file."""

    name: str  # which the image store made and understands
    size: Optional[int]  # in bytes; None in a record of an earlier version
    media_type: str

    @property
    def file_name(self) -> str:
        """By which a client may keep it."""
        return self.name.rpartition("/")[2]


class Webhook(NamedTuple):
    """Whom to tell of a job's end, and how that stands."""

    url: str
    delivered: bool = False
    attempts: int = 0  # that have come to an end
    since: Optional[float] = None  # Unix seconds, when the job's end became known
    due: Optional[float] = None  # Unix seconds, from which on any process may try; None: not yet, or never again
    is_operators: bool = False  # the URL is that of TRACKER_WEBHOOK_URL, and follows it


class Job(NamedTuple):
    """A generation request that the host accepted. Immutable: a change is a new Job."""

    id: str
    type: str
    status: str
    timestamp: int  # Unix seconds, when it was accepted
    ip: Optional[str]
    prompt: str
    started: Optional[float] = None
    finished: Optional[float] = None
    error: Optional[str] = None
    images: Tuple[Image, ...] = ()  # in the host's order
    bytes: int = 0  # of their files and of the answer beside them
    owner: Optional[str] = None  # the process that runs it
    key: Optional[str] = None  # of its idempotency, hashed with user and path
    digest: Optional[str] = None  # of the request's body, for a job with a key
    has_brief: bool = False  # beside the answer lies a brief one, see brief_parameters
    ranges: Tuple[int, ...] = ()  # of a large answer, see ranges_of
    has_request: bool = False  # the request's body is kept, and counts in `bytes`
    promised: bool = False  # it was answered 202: while it is Pending, it outlives its webui
    parked: bool = False  # no request and no thread holds it, and the runner of any webui may start it
    retry_of: Optional[str] = None  # the job whose request it has
    cancel_wanted: bool = False  # its owner is to cancel it, as another process was asked to
    label: Optional[str] = None  # the client's own word for it
    server: Optional[str] = None  # the webui that generates it, by its name
    webhook: Optional[Webhook] = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


def ended_job(job: Job, status: str, now: float, lease: float = 0.0, **changes: Any) -> Job:
    """A job as it has ended. For `lease` seconds, only this process tells of that. `now` is the store's."""
    webhook = job.webhook and job.webhook._replace(since=now, due=now + lease)
    return job._replace(status=status, parked=False, webhook=webhook, **changes)


def new_id() -> str:
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(8))


def id_number(job_id: str) -> int:
    """One number for all spellings of an ID that differ in case only: they would name the same file on Windows."""
    return int(job_id, 36)


def id_numbers(ids: Iterable[str]) -> List[int]:
    """Those of all that are IDs."""
    return list(map(id_number, filter(ID_FORM.match, ids)))


def as_json(data: Any) -> bytes:
    """JSON as the host writes it, but in ASCII, so that a lone surrogate is no error."""
    return json.dumps(data, separators=(",", ":")).encode()


def as_host_json(data: Any) -> bytes:
    """JSON to the byte as the host writes it, for what it can write."""
    try:
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return as_json(data)


def without_surrogates(text: str) -> str:
    """Text with a sign in the place of each half of a character: jq refuses those."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def record_of(job: Job) -> bytes:
    """A job as it stands in jobs.json.

    What is known of its images stands beside their names. Earlier versions, which may share the folder, take a record
    whose `images` are no list of names for damage, and overlook fields that they do not know.
    """
    fields = job._asdict()
    fields["images"] = [image.name for image in job.images]
    if job.images:
        fields["image_details"] = [[image.size, image.media_type] for image in job.images]
    if job.webhook is not None:
        fields["webhook"] = job.webhook._asdict()
    values = fields.items()
    return as_json({name: without_surrogates(value) if isinstance(value, str) else value for name, value in values})


def images_from_record(record: Dict[str, Any]) -> Iterator[Image]:
    """The images of a record, see `record_of`. One without valid details is no worse than an earlier version's.

    Raises ValueError for a name that is none of the job's images.
    """
    names, details = record.get("images", []), record.get("image_details")
    if not isinstance(names, list):
        raise ValueError("images is no list")
    if not isinstance(details, list) or len(details) != len(names):
        details = [None] * len(names)
    for name, detail in zip(names, details):
        form = IMAGE_FORM.match(name) if isinstance(name, str) else None
        if form is None or form.group(1) != record.get("id"):
            raise ValueError("images has an invalid name")
        size, media_type = detail if isinstance(detail, list) and len(detail) == 2 else (None, None)
        if type(size) is not int or not 0 <= size < SIZE_LIMIT:
            size = None
        if not (isinstance(media_type, str) and MEDIA_TYPE_FORM.match(media_type)):
            media_type = MEDIA_TYPES.get(form.group(3), OTHER_MEDIA_TYPE)
        yield Image(name, size, media_type)


def is_time(moment: Any) -> bool:
    return type(moment) in (int, float) and 0 <= moment < MAX_TIMESTAMP


def webhook_from_record(record: Any) -> Optional[Webhook]:
    """None for what is invalid: the job is worth more."""
    try:
        webhook = Webhook(**record)
        parse_webhook_url(webhook.url)
    except (TypeError, ValueError):
        return None
    is_valid = all(isinstance(flag, bool) for flag in (webhook.delivered, webhook.is_operators))
    is_valid = is_valid and type(webhook.attempts) is int and webhook.attempts >= 0
    is_valid = is_valid and not (webhook.delivered and webhook.due is not None)  # it would be told for ever
    is_valid = is_valid and all(moment is None or is_time(moment) for moment in (webhook.since, webhook.due))
    return webhook if is_valid else None


def job_from_record(record: Any) -> Job:
    """A job from its JSON in jobs.json. Raises ValueError for anything that is no valid job."""
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    values = {name: record[name] for name in Job._fields if name in record}
    values["images"] = tuple(images_from_record(record))
    ranges = values.get("ranges", [])
    if not isinstance(ranges, list) or len(ranges) not in (0, 7):
        raise ValueError("ranges is no list of seven numbers, or of none")
    values["ranges"] = tuple(ranges)
    values["webhook"] = webhook_from_record(record.get("webhook"))
    try:
        job = Job(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if not (isinstance(job.id, str) and ID_FORM.match(job.id)):
        raise ValueError("id is no job ID")
    if job.status not in STATUSES or job.type not in TYPES:
        raise ValueError("status or type is unknown")
    for number in (job.timestamp, job.bytes, *ranges):
        if type(number) is not int or not 0 <= number < SIZE_LIMIT:
            raise ValueError("timestamp, bytes or a place in ranges is no valid number")
    for moment in (job.timestamp, job.started, job.finished):
        if moment is not None and not is_time(moment):
            raise ValueError("timestamp, started or finished is no valid time")
    if ranges and any(end != 0 and start >= end for start, end in (ranges[0:2], ranges[3:5])):
        raise ValueError("a range ends before it starts")
    flags = (job.has_brief, job.has_request, job.promised, job.parked, job.cancel_wanted)
    if not isinstance(job.prompt, str) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError("prompt is no text, or a flag neither true nor false")
    for text in (job.ip, job.error, job.owner, job.key, job.digest, job.retry_of, job.label, job.server):
        if text is not None and not isinstance(text, str):
            raise ValueError("ip, error, owner, key, digest, retry_of, label or server is no text")
    if job.retry_of is not None and not ID_FORM.match(job.retry_of):
        raise ValueError("retry_of is no job ID")
    if job.webhook is not None and not job.ended:  # nothing can have been told yet
        job = job._replace(webhook=Webhook(job.webhook.url, is_operators=job.webhook.is_operators))
    return job._replace(parked=job.parked and job.status == PENDING)


TEMPORARY_ERRNOS = (
    *(errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH),  # of mounts
)


class StoreError(Exception):
    """What a store could not do. The text is a reason for users and names no path."""

    def __init__(self, reason: str, temporary: bool = False):
        super().__init__(reason)
        # The same may go well in a moment: too many files are open, say, or a mount does not answer.
        self.temporary = temporary
        self.details = reason  # for the log, which may have the path

    def again(self) -> "StoreError":
        """The same, to be raised once more: an error remembers, and grows by, all that it was raised through."""
        copied = StoreError(str(self), self.temporary)
        copied.details, copied.__cause__ = self.details, self.__cause__
        return copied

    @classmethod
    def of(cls, error: Exception) -> "StoreError":
        """What a store says of a failure of its own."""
        if isinstance(error, StoreError):
            return error
        failure = cls(reason_of(error), isinstance(error, OSError) and error.errno in TEMPORARY_ERRNOS)
        failure.details, failure.__cause__ = str(error), error
        return failure


class KeyTaken(StoreError):
    """A new job was not stored: another webui was first with its idempotency key, in the same moment."""

    def __init__(self, job_id: str, digest: str):
        super().__init__("another request with the same Idempotency-Key was first")
        self.job_id = job_id  # of the first
        self.digest = digest  # of the first one's body


class Superseded(StoreError):
    """A change was not stored, for the job is no longer this process's: others took it for dead, and went on."""


class Glance(NamedTuple):
    """What only the webui that runs a job knows of it, for the others. The moment is the store's to judge."""

    progress: Optional[float]
    eta: Optional[float]  # seconds
    queue_position: Optional[int]
    preview: bytes = b""  # empty: there is none, nobody asks for it, or it is still that which was shown last
    preview_number: int = 0
    media_type: str = ""


class InvalidCursor(ValueError):
    """A store did not make this cursor."""


@contextlib.contextmanager
def raising_store_error() -> Iterator[None]:
    """Around what a store does for others: an OSError would tell them nothing."""
    try:
        yield
    except OSError as error:
        raise StoreError.of(error) from error


# ------------------------------------------------------------------------------------------------------------------
# Journal: the lines of jobs.json
# ------------------------------------------------------------------------------------------------------------------

# jobs.json is a JSON object from ID to record, a record a line. It is appended to in place, over its closing brace,
# and is valid JSON after every write. Later lines win, as they do for every reader of JSON with duplicate keys, and
# `null` ends a job. What follows are plain functions over the open file. Unless they say otherwise, they are called by
# who holds the lock between processes.

HEAD, TAIL, EMPTY = b"{", b"\n}\n", b"{\n}\n"
JOURNAL_CHUNK = 1 << 16  # bytes that are read at a time
ENTRY_LIMIT = 1 << 23  # bytes; a longer line is damage
CHECKED = 1 << 12  # bytes before `indexed_to` whose checksum the index keeps


class Entry(NamedTuple):
    """A line of jobs.json: what became of a job."""

    id: str
    job: Optional[Job]  # None: it was removed
    offset: int  # of the record in the file
    length: int


class Damage(NamedTuple):
    """A part of jobs.json that is no line of it."""

    offset: int
    length: int
    is_whitespace: bool  # nothing is lost with it


ENTRY = re.compile(rb'(,?)\n"([A-Za-z0-9]{8})": (null|\{[^\n]*\})(?=,?(?:\n|\Z))')
TORN_ENTRIES = re.compile(rb'(?:,?\n"[ -~]*\n)*\Z')  # what a crash leaves, or a few spoilt bytes
FOREIGN_ENTRY = re.compile(r'(?<!\\)"([A-Za-z0-9]{8})"\s*:\s*(?=null|\{)')
WHITESPACE = b" \t\r\n,{}\xef\xbb\xbf"


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def parse_int(digits: str) -> int:
    """Python before 3.10.7 reads a whole number in a time that grows with the square of its length."""
    if len(digits.lstrip("-")) > 4300:
        raise ValueError("a number is too long")
    return int(digits)


ENTRY_DECODER = json.JSONDecoder(parse_int=parse_int, parse_constant=refuse_constant)
HOST_DECODER = json.JSONDecoder(parse_constant=refuse_constant)  # for what the host wrote, and so reads
CANCEL_WANTED = b'"cancel_wanted":true'  # in a record. A text cannot have it, for its quotes are escaped there
REACH = 8  # keys in a damaged record that may look like another one's beginning: a later version may have such fields


def parse_entry(job_id: str, record: bytes, offset: int) -> Entry:
    """Raises ValueError, RecursionError."""
    job = None
    if record != b"null":
        job = job_from_record(ENTRY_DECODER.decode(record.decode()))
        if job.id != job_id:
            raise ValueError("the ID is not the key")
    return Entry(job_id, job, offset, len(record))


def parse_entries(data: bytes, base: int) -> Iterator[Union[Entry, Damage]]:
    """The entries, and the damage, in a part of jobs.json that begins at offset `base`, where an entry ends."""
    position = 0
    for match in ENTRY.finditer(data):
        if bool(match.group(1)) != (base + match.start() > len(HEAD)):
            continue
        try:
            entry = parse_entry(match.group(2).decode(), match.group(3), base + match.start(3))
        except (ValueError, RecursionError):
            continue
        if match.start() > position:
            yield from parse_damaged(data[position : match.start()], base + position)
        yield entry
        position = match.end()
    if position < len(data):
        yield from parse_damaged(data[position:], base + position)


def with_reach(matches: Iterable["re.Match[str]"], end: int) -> Iterator[Tuple["re.Match[str]", int]]:
    """Matches of what an entry of a damaged file begins with, each with where the entry ends at the latest.

    Otherwise each could be read on to the end of the file, and the time would grow with the square of its length.
    """
    ahead: "deque[re.Match[str]]" = deque()
    for match in matches:
        ahead.append(match)
        if len(ahead) > REACH:
            yield ahead.popleft(), match.start()
    yield from ((match, end) for match in ahead)


def parse_damaged(data: bytes, base: int) -> Iterator[Union[Entry, Damage]]:
    """The same for a part that is damaged, or laid out in another way, by an editor or jq."""
    text = data.decode("latin-1")  # a character a byte
    position, looked_at, blank = 0, 0, True
    matches = (match for match in FOREIGN_ENTRY.finditer(text) if match.group(1) not in Job._fields)
    for match, end in with_reach(matches, len(text)):
        start = match.end()
        try:
            # A part of the text, for an error costs as much as all that comes before it.
            _, length = ENTRY_DECODER.raw_decode(text[start:end])
            entry = parse_entry(match.group(1), data[start : start + length], base + start)
        except (ValueError, RecursionError):
            continue
        if match.start() < position:  # in a record that has lost its end, and so goes on
            if entry.job is not None:
                yield entry
            continue
        blank = blank and not data[looked_at : match.start()].strip(WHITESPACE)
        looked_at = match.start()
        if entry.job is not None or blank:  # otherwise it may be a field of a record that is cut here
            yield Damage(base + position, match.start() - position, blank)
            yield entry
            position = looked_at = start + length
            blank = True
    yield Damage(base + position, len(data) - position, blank and not data[looked_at:].strip(WHITESPACE))


def read_entries(file: int, start: int, end: int) -> Iterator[Tuple[List[Union[Entry, Damage]], int]]:
    """Entries and damage between two ends of entries, in chunks, each with the offset of its end. Needs no lock."""
    size = JOURNAL_CHUNK
    while start < end:
        data = read_at(file, min(size, end - start), start)
        if not data:
            return  # somebody cut the file
        found, position = list(parse_entries(data, start)), start + len(data)
        if isinstance(found[-1], Damage) and position < end:
            if found[-1].offset > start or size < ENTRY_LIMIT:
                position = found.pop().offset  # perhaps the beginning of an entry
        size = 2 * size if position == start else JOURNAL_CHUNK
        if position > start:
            yield found, position
        start = position


def find_last_entry(file: int, job_id: str) -> Optional[Entry]:
    """The last entry of a job in a file that no index knows yet. Needs no lock. Raises OSError.

    None also for one that an editor has laid out in another way.
    """
    key = b'\n"%s": ' % job_id.encode()
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - (1 << 20))
        data = read_at(file, end - start + len(key), start)
        position = data.rfind(key)
        while position >= 0:
            offset = start + position + len(key)
            record = read_at(file, ENTRY_LIMIT, offset).partition(b"\n")[0]
            with contextlib.suppress(ValueError, RecursionError):  # it is torn, or damaged
                return parse_entry(job_id, record[:-1] if record.endswith(b",") else record, offset)
            position = data.rfind(key, 0, position)
        end = start
    return None


def find_end(file: int, known: int) -> int:
    """Where the last entry ends; 0 if not even its first byte is ours. `known` is where an entry, or the head, ends."""
    size = os.fstat(file).st_size
    end = size - len(TAIL)
    if (end == len(HEAD) or end > 16) and read_at(file, len(TAIL), end) == TAIL:
        return end
    start, span = size, JOURNAL_CHUNK
    while start > known:
        start, span = max(known, size - span), 2 * span
        entries = [found for found in parse_entries(read_at(file, size - start, start), start) if type(found) is Entry]
        if entries:
            return entries[-1].offset + entries[-1].length
    return start if start > len(HEAD) else 0


def cut_end(file: int, end: int) -> int:
    """Makes the file end behind its last entry, and returns where the next one goes."""
    write_at(file, TAIL if end else EMPTY, end)
    end = end or len(HEAD)
    os.ftruncate(file, end + len(TAIL))
    return end


class NotUndone(OSError):
    """Entries could not be appended, and may stand in the file all the same."""


def cause_of(error: Exception) -> Exception:
    """Why entries could not be appended."""
    return error.__cause__ if isinstance(error, NotUndone) else error


def append_records(file: int, end: int, records: Dict[str, bytes]) -> Tuple[Dict[str, int], int]:
    """Writes entries where the last one ends. Returns where each record lies, by its ID, and where the last one ends.

    They are on disk only after `sync_file`. Raises OSError, NotUndone.
    """
    data, offsets = bytearray(), {}
    for job_id, record in records.items():
        data += (b',\n"%s": ' if end + len(data) > len(HEAD) else b'\n"%s": ') % job_id.encode()
        offsets[job_id] = end + len(data)
        data += record
    try:
        write_at(file, bytes(data) + TAIL, end)
    except OSError as error:
        try:
            cut_end(file, end)  # overwriting existing bytes works on a full disk, too
        except OSError:
            raise NotUndone(error.errno, error.strerror) from error
        raise
    return offsets, end + len(data)


def checksum_before(file: int, position: int) -> int:
    """CRC-32 of what stands right before a place."""
    length = min(CHECKED, position)
    return zlib.crc32(read_at(file, length, position - length))


class OpenJournal:
    """jobs.json as it is open now, or as nobody has opened it."""

    def __init__(self, file: Optional[int] = None):
        self.file = file
        self.inode = 0 if file is None else os.fstat(file).st_ino
        self.needs_reading = False  # somebody changed it where the index knows it
        self.access: Tuple[int, ...] = ()  # its mode, owner and group when the index was last made as private

    def close(self) -> None:
        file, self.file, self.inode = self.file, None, 0
        close_file(file)


class JournalCopy(OpenJournal):
    """A new file that is to replace jobs.json, for the same people. Its entries are those that are added."""

    def __init__(self, path: str, like: str, source_end: int):
        super().__init__(create_like(path, like, flags=os.O_RDWR))
        self.path = path
        self.source_end = source_end  # the old file was copied up to here
        self.end = self.entries = 0

    def add(self, records: Dict[str, bytes]) -> Dict[str, int]:
        """Returns the offsets of the records."""
        offsets, self.end = append_records(self.file, self.end, records)
        self.entries += len(records)
        return offsets

    def discard(self) -> None:
        """Removes the file, unless it has taken its place."""
        self.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)


def quarantine_damage(path: str, file: int, damages: List[Damage]) -> str:
    """Copies damaged parts to a file of their own, since people may be able to read them. Raises OSError."""

    def chunks() -> Iterator[bytes]:
        for damage in damages:
            end = damage.offset + damage.length
            for offset in range(damage.offset, end, JOURNAL_CHUNK):
                yield read_at(file, min(JOURNAL_CHUNK, end - offset), offset)
            yield b"\n"

    aside = quarantine_name(path)
    fill_file(create_like(aside, path), aside, chunks(), aside)
    return aside


# ------------------------------------------------------------------------------------------------------------------
# Index: a view of jobs.json on SQLite
# ------------------------------------------------------------------------------------------------------------------


def casefold_bytes(text: str) -> bytes:
    """Text in the form in which it is searched, without case."""
    return text.casefold().encode("utf-8", "surrogatepass")


def bindable(text: Optional[str]) -> Optional[str]:
    """Text in a form that SQLite takes: it refuses lone surrogates."""
    return None if text is None else without_surrogates(text)


class Filter(NamedTuple):
    """Which jobs to find; all that is not None must hold."""

    ip: Optional[str] = None
    status: Optional[str] = None  # one of STATUSES
    type: Optional[str] = None  # one of TYPES
    after: Optional[float] = None  # Unix seconds, exclusive
    before: Optional[float] = None
    label: Optional[str] = None
    q: Optional[str] = None  # text in the prompt, case ignored, at most LIMIT characters

    LIMIT = 500

    @property
    def text(self) -> bytes:
        return casefold_bytes(self.q or "")

    def fits(self, job: Job) -> bool:
        return (
            self.ip in (None, job.ip)
            and self.status in (None, job.status)
            and self.type in (None, job.type)
            and (self.after is None or job.timestamp > self.after)
            and (self.before is None or job.timestamp < self.before)
            and self.label in (None, job.label)
            and self.text in casefold_bytes(job.prompt)
        )


Abandoned = Optional[threading.Event]  # set once nobody waits for a search any more


class IndexState(NamedTuple):
    """How far an index has come, and in which file."""

    inode: int  # of jobs.json
    indexed_to: int  # where the last entry that it knows ends
    checksum: int  # CRC-32 of the bytes before that
    mtime: int  # ns, of the file when that was its end
    entries: int  # in the file, also those that later ones have replaced
    needs_rewrite: bool  # it holds what this program would have written in another way
    side: int  # 0 or 1: which of the two offsets of a row counts
    compactor: str  # the process that writes the other file, in which the other offsets count
    epoch: int  # another one after each rebuild, which numbers the rows afresh


class Place(NamedTuple):
    """Where a record lies."""

    row: int
    id: str
    timestamp: int
    offset: int
    length: int


class Index:
    """Where each job's record lies in jobs.json, and the fields that filters need, as an SQLite database.

    A view that can be rebuilt from jobs.json at any time: it holds nothing that is not there. It is a file beside
    jobs.json, shared by all processes on the folder, or lies in memory where SQLite cannot have a file. A job is a row,
    whose number counts up in order of acceptance. A transaction brings rows and state together from one end of an
    entry to another, so that a crash leaves the one or the other; what a power cut takes from it is read again.

    Reading needs no lock, and many threads may; one at a time writes. All methods raise sqlite3.Error.
    """

    VERSION = 3  # stands in the file's name, so that an earlier program on the same folder keeps its own
    FILES = ("", "-wal", "-shm")  # what SQLite adds to the name
    BUSY = 0.5  # seconds that another process may hold the database
    KEPT = 4  # connections that stay open while nobody needs them
    WAL_PAGES = 250  # in the write-ahead log, after which they go to the database
    FEW = 1000  # jobs that are quickly looked through
    COUNT_OLD = "UPDATE totals SET jobs = jobs - 1, bytes = bytes - old.bytes WHERE status = old.status"
    COUNT_NEW = "UPDATE totals SET jobs = jobs + 1, bytes = bytes + new.bytes WHERE status = new.status"
    SCHEMA = (
        "CREATE TABLE state (inode, indexed_to, checksum, mtime, entries, needs_rewrite, side, compactor, epoch)",
        "CREATE TABLE damages (offset, length)",
        "CREATE TABLE jobs (row INTEGER PRIMARY KEY, id, timestamp, type, ip, status, bytes, key, parked, label, due,"
        " offset0, offset1, length)",
        "CREATE TABLE texts (row INTEGER PRIMARY KEY, text)",
        "CREATE TABLE totals (status INTEGER PRIMARY KEY, jobs, bytes)",
        "CREATE INDEX by_id ON jobs (id COLLATE NOCASE)",
        *(f"CREATE INDEX by_{column} ON jobs ({column})" for column in ("timestamp", "status", "type", "ip")),
        *(
            f"CREATE INDEX by_{column} ON jobs ({column}) WHERE {column} IS NOT NULL"
            for column in ("key", "parked", "label", "due")
        ),
        f"CREATE TRIGGER removed AFTER DELETE ON jobs BEGIN {COUNT_OLD}; END",
        f"CREATE TRIGGER changed AFTER UPDATE OF status, bytes ON jobs BEGIN {COUNT_OLD}; {COUNT_NEW}; END",
    )

    def __init__(self, path: str = "", like: str = ""):
        """Opens or makes a database in a file that is for the same people as the file `like`; without, in memory."""
        self.path = path
        self._inode = 0
        self._free: "queue.SimpleQueue[sqlite3.Connection]" = queue.SimpleQueue()
        self._closed = False
        self.failure: Optional[Exception] = None  # because of which it must be reopened
        if path:
            try:
                close_file(create_like(path, like))
            except FileExistsError:
                if not stat.S_ISREG(os.lstat(path).st_mode):  # a link may lead to somebody's file
                    raise OSError(errno.EINVAL, "it is no file", path) from None
                self.narrow_access(like)
            self._inode = os.stat(path).st_ino
        self._owner, self._is_awaited = threading.get_ident(), False
        self._free.put(self._connect())
        with self.reading() as view:
            is_made = view.execute("PRAGMA user_version").fetchone()[0] == self.VERSION
        if not is_made:
            self.begin(0, 0, False)

    def _connect(self) -> sqlite3.Connection:
        # SQLite is to open the file that is there. Where that has just been removed, it would make one for all to read.
        there = f"file:{'//' * self.path.startswith('/')}{quote(os.fsencode(self.path))}?mode=rw"
        connection = sqlite3.connect(
            there if self.path else ":memory:",
            timeout=self.BUSY,
            isolation_level=None,
            check_same_thread=False,
            uri=bool(self.path),
        )
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA secure_delete = ON")  # a removed prompt is gone from here, too
        connection.execute("PRAGMA temp_store = MEMORY")  # no file of its own anywhere else
        connection.execute(f"PRAGMA wal_autocheckpoint = {self.WAL_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {self.WAL_PAGES << 12}")
        if self.path:
            if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise sqlite3.OperationalError("SQLite cannot have a write-ahead log there")
            if not self.is_in_place():
                raise sqlite3.OperationalError("its file was replaced")
        return connection

    def narrow_access(self, like: str) -> None:
        """Hides the files from those who may not read the file `like`."""
        for ending in self.FILES if self.path else ():
            narrow_access(self.path + ending, like)

    def is_in_place(self) -> bool:
        """Whether the name still stands for the file."""
        try:
            return not self.path or os.stat(self.path).st_ino == self._inode
        except OSError:  # of the disk, too, if it is away
            return False

    def close(self) -> None:
        """Closes the database, as soon as nobody reads. One in memory ends with its last user."""
        self._closed = True
        while self.path:
            try:
                self._free.get_nowait().close()
            except queue.Empty:
                return

    @contextlib.contextmanager
    def _transaction(self, kind: str) -> Iterator["IndexView"]:
        """Each thread has a connection while it needs one."""
        connection = self._borrow()
        try:
            connection.execute("BEGIN " + kind)
            try:
                yield IndexView(connection)
            except BaseException:
                connection.rollback()
                raise
            connection.commit()
        finally:
            if self.path and self._free.qsize() >= self.KEPT:
                connection.close()
            else:
                self._free.put(connection)
            if self._closed:
                self.close()

    def _borrow(self) -> sqlite3.Connection:
        if self.path:
            try:
                return self._free.get_nowait()
            except queue.Empty:
                return self._connect()
        # In memory there is but one. The thread that made the index, and writes, comes first.
        if threading.get_ident() == self._owner:
            self._is_awaited = True
            try:
                return self._free.get()
            finally:
                self._is_awaited = False
        while True:
            with contextlib.suppress(queue.Empty):
                if not self._is_awaited:
                    return self._free.get_nowait()
            time.sleep(0.001)

    def reading(self) -> ContextManager["IndexView"]:
        """The index as it is now, whatever is written meanwhile."""
        return self._transaction("DEFERRED")

    # Writing

    def begin(self, inode: int, start: int, needs_rewrite: bool) -> IndexState:
        """Empties the index: a file is to be read from its start."""
        with self._transaction("IMMEDIATE") as view:
            for (name,) in view.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                view.execute(f'DROP TABLE "{name}"')
            for statement in self.SCHEMA:
                view.execute(statement)
            for number in range(len(STATUSES)):
                view.execute("INSERT INTO totals VALUES (?, 0, 0)", (number,))
            values = (inode, start, needs_rewrite, secrets.randbits(62))
            view.execute("INSERT INTO state VALUES (?, ?, 0, 0, 0, ?, 0, '', ?)", values)
            view.execute(f"PRAGMA user_version = {self.VERSION}")
            return view.state

    def add(
        self, inode: int, start: int, found: List[Union[Entry, Damage]], end: int, checksum: int, mtime: int = 0
    ) -> bool:
        """Takes in what stands between two places of a file. False if another process has done that already."""
        with self._transaction("IMMEDIATE") as view:
            state = view.state
            if (state.inode, state.indexed_to) != (inode, start):
                return False
            entries = [item for item in found if isinstance(item, Entry)]
            for entry in {entry.id: entry for entry in entries}.values():
                view.set_entry(entry)
            for damage in found:
                if isinstance(damage, Damage) and not damage.is_whitespace:
                    view.execute("INSERT INTO damages VALUES (?, ?)", damage[:2])
            view.execute(
                "UPDATE state SET indexed_to = ?, checksum = ?, mtime = ?, entries = entries + ?, "
                "needs_rewrite = needs_rewrite OR ?",
                (end, checksum, mtime, len(entries), len(entries) < len(found)),
            )
            return True

    def update(self, **values: Any) -> None:
        """Changes some of the index's state."""
        with self._transaction("IMMEDIATE") as view:
            view.execute("UPDATE state SET " + ", ".join(f"{name} = ?" for name in values), (*values.values(),))

    def forget_damages(self) -> None:
        with self._transaction("IMMEDIATE") as view:
            view.execute("DELETE FROM damages")

    def abandon_move(self, compactor: str) -> None:
        """A process writes no new file any more."""
        with self._transaction("IMMEDIATE") as view:
            view.execute("UPDATE state SET compactor = '' WHERE compactor = ?", (compactor,))

    def move(self, compactor: str, offsets: Dict[str, int]) -> bool:
        """Notes where records, by their IDs, lie in the new file. False if the index was rebuilt since that began."""
        with self._transaction("IMMEDIATE") as view:
            if view.state.compactor != compactor:
                return False
            for job_id, offset in offsets.items():
                statement = f"UPDATE jobs SET offset{1 - view.state.side} = ? WHERE {view.IS_ID}"
                view.execute(statement, (offset, job_id, job_id))
            return True


class IndexView:
    """An index within one transaction, and so at one moment."""

    IS_ID = "id = ? COLLATE NOCASE AND id = ?"  # of which an index finds the first half

    def __init__(self, connection: sqlite3.Connection):
        self.connection = connection
        self.execute = connection.execute

    @functools.cached_property
    def state(self) -> IndexState:
        return IndexState(*self.execute("SELECT * FROM state").fetchone())

    def set_entry(self, entry: Entry) -> None:
        """Within a transaction that writes."""
        row, job = self.row_of(entry.id), entry.job
        if job is None:
            for table in ("jobs", "texts") if row is not None else ():
                self.execute(f"DELETE FROM {table} WHERE row = ?", (row,))
            return
        values = {
            "timestamp": job.timestamp,
            "type": TYPES.index(job.type),
            "ip": bindable(job.ip),
            "status": STATUSES.index(job.status),
            "bytes": job.bytes,
            "key": bindable(job.key),
            "parked": 1 if job.parked else None,
            "label": bindable(job.label),
            "due": job.webhook and job.webhook.due,
            f"offset{self.state.side}": entry.offset,
            "length": entry.length,
        }
        if row is None:
            statement = f"INSERT INTO jobs ({', '.join(values)}, id) VALUES ({'?, ' * len(values)}?)"
            row = self.execute(statement, (*values.values(), job.id)).lastrowid
            statement = "UPDATE totals SET jobs = jobs + 1, bytes = bytes + ? WHERE status = ?"
            self.execute(statement, (values["bytes"], values["status"]))
        else:
            statement = f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in values)} WHERE row = ?"
            self.execute(statement, (*values.values(), row))
        text = casefold_bytes(job.prompt)
        known = self.execute("SELECT text FROM texts WHERE row = ?", (row,)).fetchone()
        if text != (known[0] if known else b""):
            self.execute("INSERT OR REPLACE INTO texts VALUES (?, ?)", (row, text))

    def damages(self) -> List[Damage]:
        """What is still to be set aside."""
        found = self.execute("SELECT * FROM damages ORDER BY offset")
        return [Damage(*damage, is_whitespace=False) for damage in found]

    def totals(self) -> Dict[str, Tuple[int, int]]:
        """By status, the number of jobs and the bytes of their files."""
        found = self.execute("SELECT jobs, bytes FROM totals ORDER BY status")
        return dict(zip(STATUSES, found.fetchall()))

    def count(self) -> int:
        return sum(jobs for jobs, _ in self.totals().values())

    def row_of(self, job_id: str) -> Optional[int]:
        found = self.execute(f"SELECT row FROM jobs WHERE {self.IS_ID}", (job_id, job_id)).fetchone()
        return found and found[0]

    def has_spelling(self, job_id: str) -> bool:
        """Whether an ID is taken, in any spelling."""
        found = self.execute("SELECT 1 FROM jobs WHERE id = ? COLLATE NOCASE", (job_id,))
        return found.fetchone() is not None

    def place(self, job_id: str) -> Optional[Place]:
        found = self._places(f"WHERE {self.IS_ID}", job_id, job_id)
        return found[0] if found else None

    def with_key(self, key: str) -> Optional[str]:
        """The ID of the latest job with an idempotency key."""
        statement = "SELECT id FROM jobs WHERE key = ? ORDER BY row DESC LIMIT 1"
        found = self.execute(statement, (bindable(key),)).fetchone()
        return found and found[0]

    def unfinished(self, parked: bool) -> List[Place]:
        """Jobs that have not ended, oldest first, with those that are parked or without."""
        unfinished = map(STATUSES.index, (PENDING, PROCESSING))
        return self._places("WHERE status IN (?, ?) AND (? OR parked IS NULL) ORDER BY row", *unfinished, parked)

    def parked(self, count: int) -> List[Place]:
        """The oldest parked jobs, at most `count`, oldest first."""
        return self._places("WHERE parked = 1 ORDER BY row LIMIT ?", count)

    def count_parked(self, from_row: int, to_row: int) -> int:
        """How many parked jobs there are from one row to before another."""
        statement = "SELECT count(*) FROM jobs WHERE parked = 1 AND row >= ? AND row < ?"
        return self.execute(statement, (from_row, to_row)).fetchone()[0]

    def oldest(self, status: str, count: int) -> List[Place]:
        """The oldest jobs with a status, at most `count`, oldest first."""
        return self._places("WHERE status = ? ORDER BY row LIMIT ?", STATUSES.index(status), count)

    def due(self, after: float, before: float, count: int) -> List[Tuple[str, float]]:
        """IDs of jobs whose webhooks are due between two times (exclusive), and when: the first `count` of them."""
        statement = "SELECT id, due FROM jobs WHERE due > ? AND due < ? ORDER BY due LIMIT ?"
        return self.execute(statement, (after, before, count)).fetchall()

    def places(self, above: int, count: int) -> List[Place]:
        """The next `count` jobs above a row, oldest first."""
        return self._places("WHERE row > ? ORDER BY row LIMIT ?", above, count)

    def summary(self, job_id: str) -> Optional[Tuple[str, int]]:
        """A job's status and the bytes of its files."""
        statement = f"SELECT status, bytes FROM jobs WHERE {self.IS_ID}"
        found = self.execute(statement, (job_id, job_id)).fetchone()
        return found and (STATUSES[found[0]], found[1])

    def _places(self, where: str, *values: Any) -> List[Place]:
        side = self.state.side
        found = self.execute(f"SELECT row, id, timestamp, offset{side}, length FROM jobs {where}", values)
        return [Place(*place) for place in found]

    def top(self) -> int:
        """The row of the latest job, 0 if there is none."""
        return self.execute("SELECT max(row) FROM jobs").fetchone()[0] or 0

    def row_at(self, timestamp: int) -> int:
        """The row behind the latest job that is not newer than a time (Unix seconds)."""
        found = self.execute("SELECT max(row) FROM jobs WHERE timestamp <= ?", (timestamp,))
        return (found.fetchone()[0] or 0) + 1

    def expired(self, before: float, after: Optional[float]) -> List[str]:
        """IDs of ended jobs accepted before a time, and after another (Unix seconds), oldest first."""
        ended = tuple(map(STATUSES.index, ENDED))
        found = self.execute(
            "SELECT id FROM jobs INDEXED BY by_timestamp "
            "WHERE timestamp < ? AND timestamp > ? AND status IN (?, ?) ORDER BY row",
            (before, -1 if after is None else after, *ended),
        )
        return [job_id for (job_id,) in found]

    def ended(self) -> Iterator[Tuple[int, str, int]]:
        """Rows and IDs of all ended jobs, and the bytes of their files, oldest first, read as they are asked for."""
        statement = "SELECT row, id, bytes FROM jobs NOT INDEXED WHERE status IN (?, ?) ORDER BY row"
        yield from self.execute(statement, tuple(map(STATUSES.index, ENDED)))

    def find(
        self, filter_: Filter, below: int, limit: int, skip: int, without: List[int], abandoned: Abandoned
    ) -> List[Place]:
        """Of the jobs below a row that match, newest first: at most `limit`, without the first `skip` and some rows.

        Gives up, with none, once `abandoned` is set.
        """
        filters = {
            "jobs.row < ?": below,
            "type = ?": filter_.type and TYPES.index(filter_.type),
            "status = ?": filter_.status and STATUSES.index(filter_.status),
            "ip = ?": bindable(filter_.ip),
            "label = ?": bindable(filter_.label),
            "timestamp > ?": filter_.after,
            "timestamp < ?": filter_.before,
            "instr(text, ?)": filter_.text or None,
        }
        filters = {condition: value for condition, value in filters.items() if value is not None}
        conditions = [*filters, f"jobs.row NOT IN ({', '.join(map(str, without))})"]
        tables = [self._jobs_by_index(filter_) or "jobs NOT INDEXED"]
        if filter_.text:
            conditions.append("texts.row = jobs.row")
            # The text comes first where all jobs would have to be looked through.
            tables.insert(0 if tables == ["jobs NOT INDEXED"] else 1, "texts")
        statement = (
            f"SELECT jobs.row, id, timestamp, offset{self.state.side}, length FROM {' CROSS JOIN '.join(tables)} "
            f"WHERE {' AND '.join(conditions)} ORDER BY {tables[0].split()[0]}.row DESC LIMIT ? OFFSET ?"
        )
        self.connection.set_progress_handler(abandoned and abandoned.is_set, 1000)
        try:
            return [Place(*place) for place in self.execute(statement, (*filters.values(), limit, skip))]
        except sqlite3.OperationalError:
            if abandoned is None or not abandoned.is_set():
                raise
            return []
        finally:
            self.connection.set_progress_handler(None, 0)

    def _jobs_by_index(self, filter_: Filter) -> str:
        """The index that leaves least of the jobs; "" where looking through all of them is quicker."""
        given = [column for column in ("type", "status") if getattr(filter_, column) is not None]
        if filter_.label is not None:
            given = ["label"]
        elif filter_.ip is not None:
            given = ["ip"]
        elif filter_.after is not None or filter_.before is not None:
            after = -1 if filter_.after is None else filter_.after
            before = MAX_TIMESTAMP if filter_.before is None else filter_.before
            statement = "SELECT count(*) FROM (SELECT 1 FROM jobs WHERE timestamp > ? AND timestamp < ? LIMIT ?)"
            (count,) = self.execute(statement, (after, before, Index.FEW)).fetchone()
            given = ["timestamp"] if count < Index.FEW else []
        return f"jobs INDEXED BY by_{given[0]}" if len(given) == 1 else ""


# ------------------------------------------------------------------------------------------------------------------
# JobStore: the jobs, in jobs.json
# ------------------------------------------------------------------------------------------------------------------


class Page(NamedTuple):
    """Jobs that match, newest first, and a cursor for those after them; None when there are no more."""

    jobs: List[Job]
    cursor: Optional[str]


class Cursor(NamedTuple):
    """Where a page ended. Its text is opaque to all but the store."""

    epoch: int  # of the index, see IndexState
    row: int
    timestamp: int  # of the job in that row, in Unix seconds
    id: str

    FORM = re.compile(r"([0-9]{1,19})-([0-9]{1,15})-([0-9]{1,12})-([A-Za-z0-9]{8})\Z")

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        form = cls.FORM.match(text)
        if form is None:
            raise InvalidCursor("it must come from a page before")
        return cls(*map(int, form.groups()[:3]), form.group(4))

    def __str__(self) -> str:
        return "-".join(map(str, self))

    def row_in(self, view: IndexView) -> int:
        """The row below which the next page begins: the job's, or, if it was removed, where it or its time was."""
        row = view.row_of(self.id)
        if row is not None:
            return row
        return self.row if view.state.epoch == self.epoch else view.row_at(self.timestamp)


class Pending(NamedTuple):
    """A change that is not stored yet."""

    job: Optional[Job]  # None: it is removed
    shown: Optional[Job]  # how readers see it until then


Overlay = Dict[str, Pending]  # by the IDs of the jobs


class Change(NamedTuple):
    """What waits to be written to jobs.json."""

    jobs: Dict[str, Optional[Job]]  # None: it is removed
    is_new: bool
    is_patient: bool  # `written` ends only when it is on disk
    written: Future


class Decision(NamedTuple):
    """A change that depends on what jobs.json says."""

    ids: List[str]
    decide: Callable[[Job], Optional[Job]]  # what becomes of each; None: it stays as it is
    decided: Future  # the jobs that were changed
    is_lasting: bool = False  # it is tried again until it is written


def decision_to_undo(before: Dict[str, Job], changed: Dict[str, Job]) -> Decision:
    """Puts jobs back, where nobody has changed them since."""

    def undo(job: Job) -> Optional[Job]:
        return before[job.id] if job == changed[job.id] else None

    return Decision(list(changed), undo, uncancellable_future(), is_lasting=True)


def uncancellable_future() -> Future:
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future


def finished_future(result: Any) -> Future:
    future = uncancellable_future()
    future.set_result(result)
    return future


def failed_future(error: Exception) -> Future:
    future = uncancellable_future()
    future.set_exception(error)
    return future


def find_with_changes(
    view: IndexView, filter_: Filter, below: int, limit: int, skip: int, pending: Overlay, abandoned: Abandoned
) -> List[Tuple[Place, Optional[Job]]]:
    """As `IndexView.find`, but with pending changes in force; a job is there where one has changed."""
    places = {job_id: view.place(job_id) for job_id in pending}
    changed = {place: pending[job_id].shown for job_id, place in places.items() if place is not None}
    fitting = [(place, job) for place, job in changed.items() if job and place.row < below and filter_.fits(job)]
    fitting.sort(key=lambda one: one[0].row, reverse=True)
    # Where the rows lie that have changed is known only as the others are: so they are counted from a little before.
    first = max(0, skip - len(fitting))
    rows = [place.row for place in changed]
    found = [(place, None) for place in view.find(filter_, below, limit + len(fitting), first, rows, abandoned)]
    if first and not found:
        return []
    ahead = [one for one in fitting if first and one[0].row > found[0][0].row]
    merged = sorted([*found, *fitting[len(ahead) :]], key=lambda one: one[0].row, reverse=True)
    start = skip - first - len(ahead)
    return merged[start : start + limit]


def log_left_behind(jobs: Collection[Job]) -> None:
    """Says what has become of jobs of dead webuis."""
    statuses = Counter(job.status for job in jobs)
    counts = ", ".join(f"{statuses[status]} {status}" for status in STATUSES if status in statuses)
    log.warning("%d jobs that a webui left behind are now: %s", len(jobs), counts)


class QueuedStore:
    """What every store of jobs has: changes wait in a queue, and one thread, the store's own, writes all that wait.

    A store of a kind says how they are written, by `_store_changes` and `_store_decision`, and runs the thread. Any
    thread may call any method; none is for the event loop. What a Future of `put` or `remove` reports done survives a
    crash and a power cut.
    """

    # For those who use the store.
    is_shared = False  # among machines
    PATIENCE = 10.0  # seconds that a request waits for it before it goes on without, or is refused
    RECOVER_EVERY = 60.0  # seconds between two looks for dead processes
    FOLLOW_EVERY = 0.5  # seconds between two calls of `follow`

    PLACE = ""  # where the jobs are, for people
    RETRY = 5.0  # seconds until a write that failed is tried again
    SPARE_IDS = 100  # that are looked for ahead of time

    def __init__(self) -> None:
        self.owner = secrets.token_hex(4)  # this process, among those that share the jobs
        self._server = ""  # see `announce`
        self.removing = threading.Lock()  # for others, around a removal, and a change that must not meet it
        self.trouble = ""  # why records cannot be written now, for users; empty while they can
        self._lock = threading.Lock()  # guards these two; held for a moment, never for the disk
        self._pending: Overlay = {}
        self._spare_ids: List[str] = []
        self._work = threading.Condition()  # guards these five
        self._queue: List[Change] = []
        self._decisions: List[Decision] = []
        self._closing = self._closed = False
        self._is_busy = False
        # Used by the thread alone.
        self._retry: List[Change] = []  # that could not be written
        self._lasting: List[Decision] = []  # the same for decisions
        self._retry_at = 0.0
        self._troubles: Dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="job-tracker-store", daemon=True)

    # For any thread

    @staticmethod
    def now() -> float:
        """Unix seconds by the clock that all who share the store go by. Waits for nothing."""
        return time.time()

    def put(self, job: Job, new: bool = False, meanwhile: Optional[Job] = None) -> Future:
        """Keeps a job as it is now. The Future ends when that is on disk, or with StoreError.

        A new job that cannot be written is not kept. A change that cannot be written is in force all the same, and is
        tried again until it is written or the process ends. With `meanwhile`, the job is shown as that until its own
        record is on disk, and the Future ends only then, or with StoreError if the store is closed before.
        """
        return self._enqueue({job.id: Pending(job, meanwhile or job)}, new, meanwhile is not None)

    def remove(self, ids: List[str]) -> Future:
        """Removes jobs. The Future ends when that is on disk, or with StoreError; then it is tried again."""
        return self._enqueue(dict.fromkeys(ids, Pending(None, None)), False, False)

    def change(self, ids: Iterable[str], decide: Callable[[Job], Optional[Job]], until_written: bool = False) -> Future:
        """Changes jobs by what is on disk now: no other process can change them between that look and this change.

        `decide` is given each job that is there, and gives what becomes of it, or None if it is to stay as it is. It is
        not to wait for anything. The Future ends with the jobs that were changed, when that is on disk, or with
        StoreError: then all are as they were, and nothing is tried again. With `until_written`, it is tried again,
        each time by what is on disk then, until the process ends.
        """
        with self._work:
            if self._closed:
                return failed_future(StoreError("the store is closed"))
            decided = uncancellable_future()
            self._decisions.append(Decision(list(ids), decide, decided, until_written))
            self._work.notify_all()
            return decided

    def reserve_id(self) -> str:
        """An ID that no job has, in any spelling. Waits for nothing.

        Before the store is ready, and in a burst of more than `SPARE_IDS`, it is new by chance alone: that it is not,
        for a million jobs, is one case in three million.
        """
        with self._lock:
            taken = {job_id.lower() for job_id in self._pending}
            while True:
                job_id = self._spare_ids.pop() if self._spare_ids else new_id()
                if job_id.lower() not in taken:
                    return job_id

    def stats(self) -> Tuple[Dict[str, int], int]:
        """Jobs by status, and the bytes of all their files. Raises StoreError."""
        totals = self.totals()
        return {status: jobs for status, (jobs, _) in totals.items()}, sum(size for _, size in totals.values())

    def ended_bytes(self) -> int:
        """The bytes of the files of all jobs that have ended. Raises StoreError."""
        totals = self.totals()
        return sum(totals[status][1] for status in ENDED)

    def idle(self, seconds: float = 60.0) -> bool:
        """Waits until nothing is left to be written, read or compacted. False if that takes too long."""
        with self._work:
            return self._work.wait_for(
                lambda: self._closed or not (self._is_busy or self._retry or self._lasting or self._has_work()), seconds
            )

    def close(self) -> None:
        """Writes what waits to be written and ends the thread. Other work is given up."""
        with self._work:
            self._closing = True
            self._work.notify_all()
        self._thread.join()

    # For the store of a kind

    def totals(self) -> Dict[str, Tuple[int, int]]:
        """By status, the number of jobs and the bytes of their files. Raises StoreError."""
        raise NotImplementedError

    def _store_changes(self, jobs: Dict[str, Optional[Job]], new: Set[str]) -> Dict[str, StoreError]:
        """Writes jobs, None for those that are removed, and then shows what they say. `new` has the IDs of new ones.

        Returns those that are refused for good, with why. Raises NotUndone where any may be written all the same.
        """
        raise NotImplementedError

    def _store_decision(self, decision: Decision, changed: Dict[str, Job]) -> None:
        """Decides about jobs as they are now, writes those that it has changed, and puts them into `changed`."""
        raise NotImplementedError

    def _run(self) -> None:
        raise NotImplementedError

    def _has_work(self) -> bool:
        return bool(self._queue or self._decisions or self._closing)

    def _pending_now(self) -> Overlay:
        with self._lock:
            return dict(self._pending)

    def _enqueue(self, changes: Overlay, is_new: bool, is_patient: bool) -> Future:
        jobs = {job_id: change.job for job_id, change in changes.items()}
        with self._lock:
            self._pending.update(changes)
            with self._work:
                if self._closed:
                    return failed_future(StoreError("the store is closed"))
                written = uncancellable_future()
                self._queue.append(Change(jobs, is_new, is_patient, written))
                self._work.notify_all()
                return written

    # The store's thread

    def _write_waiting(self) -> None:
        with self._work:
            changes, self._queue = self._queue, []
            decisions, self._decisions = self._decisions, []
            self._closed = self._closing and not (changes or decisions)
        if changes or (self._retry and (self._closed or time.monotonic() >= self._retry_at)):
            self._write(changes)
        if self._lasting and (self._closed or time.monotonic() >= self._retry_at):
            decisions, self._lasting = [*self._lasting, *decisions], []
        for decision in decisions:
            self._decide(decision)

    def _write(self, changes: List[Change]) -> None:
        changes, self._retry = [*self._retry, *changes], []
        latest: Dict[str, Optional[Job]] = {}
        for change in changes:
            latest.update(change.jobs)
        new = {job_id for change in changes if change.is_new for job_id in change.jobs}
        try:
            refused = self._store_changes(latest, new)
        except Exception as error:
            self._fail(changes, error)
            return
        self._report("written", None)
        self.trouble = ""
        for change in changes:
            refusal = next((refused[job_id] for job_id in change.jobs if job_id in refused), None)
            if change.written.done():
                continue
            if refusal is None:
                change.written.set_result(None)
            else:
                change.written.set_exception(refusal)

    def _fail(self, changes: List[Change], error: Exception) -> None:
        """What could not be written is tried again, unless it is new."""
        cause = cause_of(error)
        self._report("written", cause)
        self.trouble = reason_of(cause)
        self._retry_at = time.monotonic() + self.RETRY
        for change in changes:
            if not change.is_new:
                self._retry.append(change)
            elif isinstance(error, NotUndone):  # it may be there all the same, and must go from there
                with self._lock:
                    self._pending.update(dict.fromkeys(change.jobs, Pending(None, None)))
                self._undo_new(change)
            else:
                self._forget_pending(change.jobs)
            if not (change.is_patient or change.written.done()):
                change.written.set_exception(StoreError.of(cause))

    def _undo_new(self, change: Change) -> None:
        """New jobs could not be written, and may be there all the same."""
        self._retry.append(change._replace(jobs=dict.fromkeys(change.jobs), is_new=False))

    def _forget_pending(self, jobs: Dict[str, Optional[Job]]) -> None:
        """Changes wait no longer to be written, unless others have come since: what is stored counts."""
        with self._lock:
            for job_id, job in jobs.items():
                if job_id in self._pending and self._pending[job_id].job is job:
                    del self._pending[job_id]

    def _decide(self, decision: Decision) -> None:
        changed: Dict[str, Job] = {}
        try:
            self._store_decision(decision, changed)
        except Exception as error:
            cause = cause_of(error)
            if not isinstance(cause, StoreError):
                self._report("written", cause)
            self._retry_at = time.monotonic() + self.RETRY
            if decision.is_lasting:
                self._lasting.append(decision)
            else:
                decision.decided.set_exception(StoreError.of(cause))
        else:
            self._report("written", None)
            decision.decided.set_result(list(changed.values()))

    def _report(self, what: str, error: Optional[BaseException]) -> None:
        """Logs a trouble when it begins and when it is over, not each time that it shows."""
        details = getattr(error, "details", None) or f"{type(error).__name__}: {error}"
        text = f"{self.PLACE} cannot be {what}: {details}" if error else ""
        if text != self._troubles.get(what, ""):
            self._troubles[what] = text
            log.error("%s", text or f"{self.PLACE} can be {what} again")


class JobStore(QueuedStore):
    """Jobs in jobs.json, which is the only truth, and found by an index beside it.

    One thread, the store's own, writes both. It writes all that waits to be written with one fsync, has the index learn
    what it does not know, and compacts. The last two go step by step, and between two steps it writes what waits: so
    neither the first start nor a compaction with a million jobs keeps a request waiting.

    Several processes may share the file: each holds `jobs.json.lock` while it writes, and follows what the others
    appended or replaced.
    """

    PLACE = "jobs.json"
    MIN_DEAD_ENTRIES = 1000  # dead ones that are not worth a compaction
    COMPACT_RETRY = 600.0  # seconds until a compaction that failed is tried again
    YIELD = 0.0005  # seconds between two steps of work that a caller waits for
    INDEX_FAILURES = 3  # after which the index is in memory
    LONG = 1 << 20  # bytes to be indexed, for which `get` does not wait
    FOLLOWED_AT_MOST = 1 << 26  # bytes of what others wrote, after which it is not read any more
    COPIED_AT_ONCE = 200  # records, in a compaction
    TAIL_ROUNDS = 4  # of copying what was appended during a compaction, before the rest is copied under the lock

    def __init__(self, folder: str, check: Callable[[], None] = lambda: None):
        """`check` raises OSError as long as jobs.json is not to be opened."""
        super().__init__()
        self.path = os.path.realpath(os.path.join(folder, "jobs.json"))
        self._check = check
        self._reading = threading.Lock()  # while it is held, the file is not closed
        self._journal = OpenJournal()
        self._index: Optional[Index] = None
        self._index_failures = 0
        self._followed = (0, 0)  # the file's inode, and up to where `follow` has read it
        self._counted: Tuple[Optional[IndexState], int, int] = (None, 0, 0)  # parked jobs before a row, at that state
        self._is_ready = False  # jobs that dead processes left have been looked for
        self._is_building = False  # the index has a long way to go
        self._unindexed: Set[str] = set()  # IDs of what this process has stored and the index may not know
        self._appends_at: Optional[int] = None  # what an index up to there lacks is this process's own, not shown yet
        self.progress = 0  # of the index, in bytes: it changes as long as jobs.json is read
        self._sync_requested: Optional[Future] = None
        self._recovery: Optional[Tuple[Callable[[Job], Job], Callable[[Job], None], bool]] = None  # see `recover`
        self._waiters = 0
        # Used by the thread alone, as is what follows. The second is held for as long as this process lives.
        self._process_lock = FileLock(self.path + ".lock", self.path)
        self._owner_lock = FileLock(f"{self.path}.owner-{self.owner}", self.path)
        self._compact_at = self._step_began = 0.0
        self._thread.start()

    # For any thread

    def _find_spare_ids(self, view: IndexView) -> None:
        """Looks for free IDs ahead of time, so that no request waits for the disk to get one."""
        while len(self._spare_ids) < self.SPARE_IDS:
            job_id = new_id()
            if not view.has_spelling(job_id):
                with self._lock:
                    self._spare_ids.append(job_id)

    def get(self, job_id: str) -> Optional[Job]:
        """A job, None if there is none. Raises StoreError."""
        if not ID_FORM.match(job_id):
            return None
        while True:
            with self._lock:
                pending = self._pending.get(job_id)
            if pending is not None:
                return pending.shown
            if not self._is_ready:
                self._wait_for_index(or_building=True)
            if self._is_building:
                entry = self._find_in_file(job_id)
                # Any other one that has not ended may be left by a dead process.
                if entry is not None and (entry.job is None or entry.job.ended or job_id in self._unindexed):
                    return entry.job
            state, place = self._look(lambda view, _: (view.state, view.place(job_id)))
            if place is None:
                return None
            entry = self._read(state, place)
            if entry is not None:
                return entry.job

    def get_many(self, ids: Iterable[str]) -> Dict[str, Job]:
        """Those of some jobs that are there, by ID. Raises StoreError."""
        found = ((job_id, self.get(job_id)) for job_id in ids)
        return {job_id: job for job_id, job in found if job is not None}

    def with_key(self, key: str) -> Optional[Job]:
        """The latest job with an idempotency key, None if there is none. Raises StoreError."""
        job_id = self._look(lambda view, _: view.with_key(key))
        job = None if job_id is None else self.get(job_id)
        return job if job is not None and job.key == key else None

    def query(
        self, filter_: Filter, limit: int, cursor: Optional[str] = None, skip: int = 0, abandoned: Abandoned = None
    ) -> Page:
        """The newest jobs that match: at most `limit`, without the first `skip`, or those that come after a page.

        Ends early, with none, once `abandoned` is set. Raises StoreError, InvalidCursor.
        """
        after = None if cursor is None else Cursor.parse(cursor)

        def find(view: IndexView, pending: Overlay) -> Tuple[IndexState, List[Tuple[Place, Optional[Job]]]]:
            below = view.top() + 1 if after is None else after.row_in(view)
            return view.state, find_with_changes(view, filter_, below, limit + 1, skip, pending, abandoned)

        state, found = self._look(find)
        jobs = []
        for place, job in found[:limit]:
            if job is None:
                entry = self._read(state, place)
                job = self.get(place.id) if entry is None else entry.job
            if job is not None and filter_.status in (None, job.status):  # it may have changed since
                jobs.append(job)
        last = found[limit - 1][0] if len(found) > limit else None
        return Page(jobs, last and str(Cursor(state.epoch, last.row, last.timestamp, last.id)))

    def totals(self) -> Dict[str, Tuple[int, int]]:
        """By status, the number of jobs and the bytes of their files. Raises StoreError."""

        def count(view: IndexView, pending: Overlay) -> Dict[str, Tuple[int, int]]:
            totals = view.totals()

            def add(sign: int, status: str, size: int) -> None:
                jobs, total = totals[status]
                totals[status] = jobs + sign, total + sign * size

            for job_id, change in pending.items():
                known = view.summary(job_id)
                if known is not None:  # what the index says of it is no longer true
                    add(-1, *known)
                    if change.shown is not None:
                        add(1, change.shown.status, change.shown.bytes)
            return totals

        return self._look(count)

    @property
    def is_ready(self) -> bool:
        """Whether looks at many jobs do not wait for a long jobs.json to be read, as at the first start."""
        return self._is_ready and not self._is_building

    def oldest_pending(self) -> Optional[Job]:
        """The Pending job that was accepted first, None if none is Pending. Raises StoreError."""

        def find(view: IndexView, pending: Overlay) -> Optional[str]:
            shown = [(view.row_of(job_id), change.shown) for job_id, change in pending.items()]
            waiting = [(row, job.id) for row, job in shown if row is not None and job and job.status == PENDING]
            others = (place for place in view.oldest(PENDING, len(pending) + 1) if place.id not in pending)
            waiting.extend((place.row, place.id) for place in itertools.islice(others, 1))
            return min(waiting)[1] if waiting else None

        job_id = self._look(find)
        job = None if job_id is None else self.get(job_id)
        return job if job is not None and job.status == PENDING else None

    def due_webhooks(self, before: float, count: int, after: float = -1.0) -> List[Job]:
        """Jobs whose webhooks are due between two times (Unix seconds, exclusive), in that order, at most `count`.

        Without those of which a change is not on disk yet. Raises StoreError.
        """
        jobs = map(self.get, [job_id for job_id, _ in self._due(after, before, count)])
        return [job for job in jobs if job and job.webhook and job.webhook.due is not None and job.webhook.due < before]

    def next_webhook(self) -> Optional[float]:
        """When the first of all webhooks is due (Unix seconds), as `due_webhooks` has them. Raises StoreError."""
        return next((due for _, due in self._due(-1.0, math.inf, 1)), None)

    def _due(self, after: float, before: float, count: int) -> List[Tuple[str, float]]:
        def find(view: IndexView, pending: Overlay) -> List[Tuple[str, float]]:
            return [one for one in view.due(after, before, count + len(pending)) if one[0] not in pending][:count]

        return self._look(find)

    def announce(self, server: str, images: str = "") -> None:
        """Tells other processes what the webui of this one is called. Waits for nothing."""
        self._server = server
        self._sync()

    def servers(self) -> List[str]:
        """What the webuis on the folder are called that live now. Raises StoreError."""
        folder, name = os.path.split(self.path)
        found = {self._server}
        with raising_store_error():
            names = os.listdir(folder)
        for entry in names:
            if entry.startswith(f"{name}.owner-"):
                with contextlib.suppress(OSError):  # it has just ended, or its lock is not ours to open
                    found.add(FileLock.holder(os.path.join(folder, entry)) or "")
        return sorted(found - {""})

    def oldest_parked(self, hold: bool = False, without: Collection[str] = ()) -> Optional[Job]:
        """The parked job that was accepted first, None if none is parked. Raises StoreError.

        `without` has the IDs of jobs that are passed over. With `hold`, other webuis may be kept for a moment from
        finding it: the caller is about to start it.
        """

        def find(view: IndexView, pending: Overlay) -> Optional[str]:
            taken = {job_id for job_id, change in pending.items() if not (change.shown and change.shown.parked)}
            taken.update(without)
            return next((place.id for place in view.parked(len(taken) + 1) if place.id not in taken), None)

        job_id = self._look(find)
        job = None if job_id is None else self.get(job_id)
        return job if job is not None and job.parked else None

    def queue_places(self, ids: Iterable[str]) -> Dict[str, int]:
        """For each of some parked jobs, how many of these were accepted before it. Raises StoreError."""

        def count(job_id: str, view: IndexView) -> int:
            row = view.row_of(job_id) or view.top() + 1
            # Counting from one to the next takes no time, while all before each of a page would be counted a thousand
            # times.
            state, near, known = self._counted
            if state != view.state:
                near = known = 0
            known += view.count_parked(near, row) - view.count_parked(row, near)
            self._counted = (view.state, row, known)
            return known

        wanted = list(ids)
        return self._look(lambda view, _: {job_id: count(job_id, view) for job_id in wanted})

    def oldest_ended(self, size: int, limit: int) -> List[Job]:
        """The oldest ended jobs, in order of acceptance: as many as it takes to have files of `size` bytes.

        At most `limit`, and never the newest one. Looks no further than to the last of them. Raises StoreError.
        """

        def find(view: IndexView, pending: Overlay) -> List[str]:
            shown = [(view.row_of(job_id), change.shown) for job_id, change in pending.items()]
            changed = sorted((row, job.id, job.bytes) for row, job in shown if row is not None and job and job.ended)
            others = (one for one in view.ended() if one[1] not in pending)
            found: List[str] = []
            left, last = size, None  # which is known not to be the newest once there is another
            for one in heapq.merge(changed, others):
                if last is not None:
                    found.append(last[1])
                    left -= last[2]
                    if left <= 0 or len(found) == limit:
                        break
                last = one
            return found

        jobs = map(self.get, self._look(find))
        return [job for job in jobs if job is not None and job.ended]

    def expired(self, before: float, after: Optional[float] = None) -> List[str]:
        """IDs of ended jobs accepted between two times (Unix seconds, exclusive), oldest first. Raises StoreError."""

        def find(view: IndexView, pending: Overlay) -> List[str]:
            kept = {job_id for job_id, change in pending.items() if change.shown is None or not change.shown.ended}
            return [job_id for job_id in view.expired(before, after) if job_id not in kept]

        return self._look(find)

    def quarantined_ids(self) -> Optional[Set[str]]:
        """IDs of jobs in quarantined parts of jobs.json; None if they cannot be told. Raises StoreError.

        A job whose record is damaged is among them before `get` says that there is no such job.
        """
        folder, name = os.path.split(self.path)
        found: Set[str] = set()
        if self._look(lambda view, _: view.damages()):
            return None
        try:
            for entry in os.listdir(folder):
                path = os.path.join(folder, entry)
                if entry.startswith(f"{name}.damaged-") and os.path.isfile(path):
                    with open(path, "rb") as file:
                        data = file.read(JOURNAL_CHUNK)
                    if not TORN_ENTRIES.match(data):
                        return None
                    found.update(job_id.decode() for job_id in re.findall(rb'"(\w{8})"', data))  # a key or an ID
        except OSError:
            return None
        return found

    def follow(self) -> Optional[Dict[str, bool]]:
        """The IDs of jobs that were changed since the last call, by whatever process. Waits for nothing but the disk.

        With each, whether its owner is asked to cancel it. None if it cannot be told what was changed. One thread may
        call this, again and again. What it says is a hint: it may come before the change can be seen by `get`.
        """
        with self._reading:
            journal, (inode, start) = self._journal, self._followed
            try:
                if journal.file is None or not is_same_file(self.path, journal.file):
                    self._sync()  # another process replaced it
                    return {}
                end = os.fstat(journal.file).st_size - len(TAIL)
                is_known = journal.inode == inode and start <= end <= start + self.FOLLOWED_AT_MOST
                data = read_at(journal.file, min(end - start, self.LONG), start) if is_known else b""
            except OSError:  # whoever needs the disk says so
                return {}
            is_cut = len(data) == self.LONG  # the rest is read the next time
            entries = list(ENTRY.finditer(data[: data.rfind(b"\n")] if is_cut else data))
            is_known = is_known and bool(entries or not is_cut)
            # An entry that is just being written is read the next time.
            self._followed = journal.inode, (start + entries[-1].end() if entries else start) if is_known else end
        if not is_known:
            return None
        changed = dict.fromkeys((entry.group(2).decode() for entry in entries), False)
        # Its owner may have written another line since, which does not say so.
        changed.update((entry.group(2).decode(), True) for entry in entries if CANCEL_WANTED in entry.group(3))
        return changed

    @contextlib.contextmanager
    def purging(self) -> Iterator[bool]:
        """Around a purge, of which there is one at a time among all who share the store.

        False if another is under way. Raises StoreError.
        """
        yield True  # of webuis on one folder, each may purge: what is gone already is no trouble

    def glances(self, jobs: Sequence[Job], with_previews: bool = False) -> Dict[str, Glance]:
        """What other processes last said of jobs that run there, by ID. Asks them to go on doing so for some seconds.

        Without those of which they have said nothing: where they tell each other nothing, as here, that is none of
        them. Raises StoreError.
        """
        return {}

    def glanced_at(self) -> Dict[str, bool]:
        """The IDs of this process's own jobs at which others glance now, with whether they want previews, too."""
        return {}

    def show(self, glances: Dict[str, Glance]) -> None:
        """Says what they glance at. Waits for nothing but the disk, and does not raise."""

    def recover(
        self, end: Callable[[Job], Job], ended: Callable[[Job], None] = lambda job: None, parked: bool = False
    ) -> Future:
        """Changes each unfinished job of a dead process by `end`, once among all processes that try.

        That is without those that it has parked, unless `parked` is set: for these no process is needed. The Future
        ends when that is done, or with StoreError if the file cannot be read. If this is called before anything else,
        nobody sees such a job unchanged, as long as the disk takes it. A change that cannot be written is tried again.
        `end` may raise StoreError for a job that cannot be judged now: it stays as it is. `ended` is called with each
        job that was changed so, once that is on disk, and is not to wait for anything.
        """
        with self._work:
            self._recovery = self._recovery or (end, ended, parked)
            return self._sync()

    # What is in force, and what is found

    def _look(self, question: Callable[[IndexView, Overlay], Any]) -> Any:
        """Asks an index that knows all that the file held when this was called. Raises StoreError.

        `question` is given the changes that the index may not have, too. They are asked for before, or it could miss
        what it has only since, and once more after, or it could see in it what `get` still keeps back.
        """
        failures = 0
        while True:
            index, before = self._index, self._pending_now()
            if index is not None and self._is_ready:
                try:
                    with index.reading() as view:
                        if self._is_current(view.state):
                            return question(view, {**before, **self._pending_now()})
                except sqlite3.Error as error:
                    index.failure = error
                    failures += 1
                    if failures > self.INDEX_FAILURES:  # not even one in memory can answer
                        raise StoreError.of(error) from error
            self._wait_for_index()

    def _wait_for_index(self, or_building: bool = False) -> None:
        """Until it knows what the file holds now, or until it is known that this takes long. Raises StoreError."""
        with self._work:
            synced = self._sync()
            self._waiters += 1
            self._work.wait_for(lambda: synced.done() or (or_building and self._is_building))
            self._waiters -= 1
        if synced.done():
            synced.result()

    def _is_current(self, state: IndexState) -> bool:
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        if not status.st_ino == state.inode == self._journal.inode or self._journal.needs_reading:
            return False
        length = status.st_size - len(TAIL)
        return length == state.indexed_to or (length > state.indexed_to == self._appends_at)

    def _read(self, state: IndexState, place: Place) -> Optional[Entry]:
        """None if jobs.json was replaced since, or its index must be rebuilt."""
        with self._reading:
            journal = self._journal
            if journal.file is None or journal.inode != state.inode:
                return None
            try:
                return parse_entry(place.id, read_at(journal.file, place.length, place.offset), place.offset)
            except OSError as error:
                raise StoreError.of(error) from None
            except (ValueError, RecursionError):
                log.error("jobs.json: the record of job %s is not where it was, all is read again", place.id)
                journal.needs_reading = True
                return None

    def _find_in_file(self, job_id: str) -> Optional[Entry]:
        """A job that the index does not know yet. By a descriptor of its own, for it may take long."""
        file: Optional[int] = None
        try:
            file = os.open(self.path, os.O_RDWR | BINARY)  # Windows syncs no file that is open for reading only
            entry = find_last_entry(file, job_id)
            if entry is not None:
                sync_file(file)  # nobody is shown what a power cut may take back
            return entry
        except OSError as error:
            raise StoreError.of(error) from None
        finally:
            close_file(file)

    # The store's thread

    def _sync(self) -> Future:
        """Has the index learn what it does not know yet. The Future ends when it does, or with StoreError."""
        with self._work:
            if self._sync_requested is None:
                self._sync_requested = uncancellable_future()
                self._work.notify_all()
            return self._sync_requested

    def _has_work(self) -> bool:
        return super()._has_work() or self._sync_requested is not None

    def _run(self) -> None:
        while not self._closed:
            with self._work:
                self._is_busy = False
                self._work.notify_all()
                pause = max(0, self._retry_at - time.monotonic()) if self._retry or self._lasting else None
                self._work.wait_for(self._has_work, pause)
                self._is_busy = True
            self._step_began = time.monotonic()
            try:
                self._write_waiting()
                self._catch_up_if_requested()
                if self._is_worth_compacting():
                    self._compact()
            except Exception:  # a bug of ours. All callers wait for this thread, so it goes on
                log.exception("The store failed")
        self._end()

    def _pause(self) -> None:
        """Between two steps of long work. Writes what waits, and raises StoreError if the store is to be closed.

        Gives other threads the interpreter, and for longer when nobody waits for this work.
        """
        with self._work:
            self._work.notify_all()
            if not (self._queue or self._decisions or self._closing):
                self._work.wait(self.YIELD if self._waiters else 2 * (time.monotonic() - self._step_began))
        self._write_waiting()
        if self._closing:
            raise StoreError("the store is closed")
        self._step_began = time.monotonic()

    def _with_index(self, work: Callable[..., None], *args: Any) -> None:
        """Repeats work after trouble with the index, which is reopened meanwhile, and in the end lies in memory."""
        while True:
            try:
                return work(*args)
            except sqlite3.Error as error:
                if self._index is None or not self._index.path:
                    raise
                self._index.failure = error

    def _end(self) -> None:
        for future in (self._sync(), *(change.written for change in self._retry)):  # the first stays for later callers
            if not future.done():
                future.set_exception(StoreError("the store is closed"))
        with self._work:
            self._work.notify_all()
        self._close_files()
        with contextlib.suppress(OSError):
            os.unlink(self._owner_lock.path)
        self._owner_lock.close()
        self._process_lock.close()

    # The file and its index

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[OpenJournal]:
        """Holds the lock between processes, with the file open that the name stands for now, and its index."""
        with self._process_lock:
            file, index = self._journal.file, self._index
            # Without an index, it was opened in part: its name may not be safe yet.
            if file is None or index is None or not is_same_file(self.path, file):
                self._open()
            elif index.failure is not None or not index.is_in_place():
                self._open_index()
            self._owner_lock.sign(self._server)
            yield self._journal

    def _open(self) -> None:
        self._close_files()
        self._check()
        self._owner_lock.close()  # the folder may be another one; nobody looks for this lock while we hold the other
        self._owner_lock.acquire()
        try:
            file = self._open_file()
        except PermissionError as error:
            aside = quarantine(self.path)
            with contextlib.suppress(OSError):
                copy_file(aside, self.path)
            log.warning("jobs.json cannot be opened for writing (%s), it was set aside as %s", error, aside)
            file = self._open_file()
        self._journal = OpenJournal(file)
        if not os.fstat(file).st_size:
            write_at(file, EMPTY, 0)
        sync_file(file)
        sync_folder(os.path.dirname(self.path))
        self._open_index()

    def _open_file(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)

    def _open_index(self) -> None:
        """Opens the index, makes one if there is none or it is broken, or one in memory where it cannot be a file."""
        path, failure = f"{self.path}.index{Index.VERSION}", None
        if self._index is not None:
            failure = self._index.failure
            self._index.close()
        while self._index_failures < self.INDEX_FAILURES and not is_on_network(self.path):
            self._index_failures += failure is not None
            try:
                if isinstance(failure, sqlite3.DatabaseError) and not isinstance(failure, sqlite3.OperationalError):
                    log.warning("The index of jobs.json is damaged, and is made anew: %s", failure)
                    self._remove_index(path)
                self._index = Index(path, self.path)
                return
            except (OSError, sqlite3.Error) as error:
                failure = error
        if failure is not None:
            log.warning("The index of jobs.json is in memory, since it cannot be a file: %s", failure)
            if "is full" in str(failure):  # jobs.json needs the room
                self._remove_index(path)
        self._index = Index()

    @staticmethod
    def _remove_index(path: str) -> None:
        for ending in Index.FILES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + ending)

    def _close_files(self) -> None:
        """Closes the file and the index."""
        with self._reading:
            self._journal.close()
        if self._index is not None:
            self._index.close()
            self._index = None

    def _find_end(self) -> Tuple[IndexState, int]:
        """The index's state, and where the next entry goes. Mends a file that does not end as it should.

        An index that does not belong to the file is emptied.
        """
        journal, index = self._journal, self._index
        with index.reading() as view:
            state = view.state
        status = os.fstat(journal.file)
        access = status.st_mode, status.st_uid, status.st_gid
        if access != journal.access:  # somebody may have made it private
            index.narrow_access(self.path)
            journal.access = access
        if journal.needs_reading or not self._belongs(state, status):
            is_foreign = read_at(journal.file, 1, 0) != HEAD
            state = index.begin(journal.inode, 0 if is_foreign else len(HEAD), is_foreign)
            journal.needs_reading = False
        end = find_end(journal.file, state.indexed_to)
        rest = read_at(journal.file, status.st_size - end, end)
        if rest != TAIL or not end:
            if rest.strip(WHITESPACE):
                self._quarantine([Damage(end, len(rest), False)])
            end = cut_end(journal.file, end)
            sync_file(journal.file)
        return state, end

    def _belongs(self, state: IndexState, status: os.stat_result) -> bool:
        """Whether the file still begins with what the index knows.

        By its time where nothing was appended, and else by the bytes before what was. So an edit in place is noticed.
        """
        if state.inode != status.st_ino or status.st_size < state.indexed_to:
            return False
        if state.mtime and self._index.path and status.st_size == state.indexed_to + len(TAIL):
            return state.mtime == status.st_mtime_ns
        return checksum_before(self._journal.file, state.indexed_to) == state.checksum

    def _note_time(self) -> None:
        """The file holds what the index knows, whatever its time says."""
        with contextlib.suppress(OSError, sqlite3.Error):
            self._index.update(mtime=os.fstat(self._journal.file).st_mtime_ns)

    def _quarantine(self, damages: List[Damage]) -> bool:
        """Sets damaged parts aside, if there is room."""
        try:
            aside = quarantine_damage(self.path, self._journal.file, damages)
        except OSError as error:
            self._report("set aside where it is damaged", error)
            return False
        self._report("set aside where it is damaged", None)
        count, first, size = len(damages), damages[0].offset, sum(damage.length for damage in damages)
        text = "jobs.json is damaged in %d places, from byte %d on: %d bytes set aside in %s"
        log.warning(text, count, first, size, aside)
        return True

    # Reading

    def _catch_up_if_requested(self) -> None:
        with self._work:
            synced, self._sync_requested = self._sync_requested, None
        if synced is None:
            return
        failure: Optional[Exception] = None
        try:
            self._with_index(self._catch_up)
        except Exception as error:
            failure = error
        if not self._closing:
            self._report("read", failure)
        if failure is None:
            synced.set_result(None)
        else:
            synced.set_exception(StoreError.of(failure))
        with self._work:
            self._work.notify_all()

    def _catch_up(self) -> None:
        """Brings the index to the end of the file, and recovers if that is due."""
        seconds = 0.0
        while True:
            with self._exclusive() as journal:
                state, end = self._find_end()
                if state.indexed_to == end:
                    self._finish_catching_up(journal, state)
                    break
                self._is_building = end - state.indexed_to > self.LONG
            began = time.monotonic()
            self._index_up_to(journal, state.indexed_to, end, self._pause)
            seconds += time.monotonic() - began
        if seconds > 1:
            log.info("jobs.json was indexed in %.1f s", seconds)

    def _index_up_to(self, journal: OpenJournal, start: int, end: int, pause: Callable[[], None]) -> None:
        """As far as nobody else does it."""
        sync_file(journal.file)  # another process may have died between writing and syncing what follows
        for found, position in read_entries(journal.file, start, end):
            if not self._index.add(journal.inode, start, found, position, checksum_before(journal.file, position)):
                return
            start = self.progress = position
            pause()
            if journal.file is None:
                return

    def _finish_catching_up(self, journal: OpenJournal, state: IndexState) -> None:
        with self._index.reading() as view:
            damages = view.damages()
        if damages and self._quarantine(damages):
            self._index.forget_damages()
        self._recover()
        if state.mtime != os.fstat(journal.file).st_mtime_ns:
            self._note_time()
        self._unindexed.clear()
        with self._index.reading() as view:
            self._find_spare_ids(view)
        self._index_failures = 0
        self._is_ready, self._is_building = True, False

    # Writing

    def _store_changes(self, jobs: Dict[str, Optional[Job]], new: Set[str]) -> Dict[str, StoreError]:
        self._with_index(self._append_all, jobs)
        return {}

    def _store_decision(self, decision: Decision, changed: Dict[str, Job]) -> None:
        self._with_index(self._append_decided, decision, changed)

    def _append_all(self, jobs: Dict[str, Optional[Job]]) -> None:
        """Appends changes to the file as it is now."""
        with self._exclusive():
            self._append(jobs)

    def _append_decided(self, decision: Decision, changed: Dict[str, Job]) -> None:
        """Decides about jobs as they are now, and puts those that it has changed into `changed`."""
        changed.clear()  # of a try before
        with self._exclusive() as journal:
            while True:
                state, end = self._find_end()
                if state.indexed_to == end:
                    break
                if end - state.indexed_to > self.LONG:
                    raise StoreError("jobs.json is being read", temporary=True)
                self._index_up_to(journal, state.indexed_to, end, lambda: None)
            before = {}
            for job in filter(None, map(self._current, decision.ids)):
                after = decision.decide(job)
                if after is not None:
                    before[job.id], changed[job.id] = job, after
            if not changed:
                return
            with self._lock:
                self._pending.update({job_id: Pending(job, before[job_id]) for job_id, job in changed.items()})
            try:
                self._append(changed)
            except Exception as error:
                if isinstance(error, NotUndone):  # it may stand in the file all the same, and must go from there
                    self._lasting.append(decision_to_undo(before, changed.copy()))
                self._forget_pending(changed)
                raise

    def _current(self, job_id: str) -> Optional[Job]:
        """A job as the file says, or what waits to be written to it. For who holds the lock, with a whole index."""
        with self._lock:
            pending = self._pending.get(job_id)
        if pending is not None:
            return pending.job
        with self._index.reading() as view:
            state, place = view.state, view.place(job_id)
        entry = None if place is None else self._read(state, place)
        return entry and entry.job

    def _append(self, jobs: Dict[str, Optional[Job]]) -> None:
        """Appends entries, has them written to disk, and then shows what they say. Raises OSError, NotUndone.

        The caller holds the lock until then: no other process shows what a power cut may take back. Readers of
        this process do not see them before.
        """
        state, end = self._find_end()
        is_indexed = state.indexed_to == end
        self._appends_at = end if is_indexed else None
        try:
            entries, end = self._write_entries(jobs, end)
            if is_indexed:
                is_indexed = self._index_own(entries, state, end)
        except OSError:
            self._note_time()
            raise
        finally:
            self._appends_at = None
        if not is_indexed:  # as what a neighbour has written before
            self._unindexed.update(jobs)
        self._forget_pending(jobs)
        if not is_indexed:
            self._sync()
        elif self._recovery is None:
            self._is_ready = True

    def _write_entries(self, jobs: Dict[str, Optional[Job]], end: int) -> Tuple[List[Entry], int]:
        """Returns the entries, and where the last one ends."""
        file = self._journal.file
        records = {job_id: b"null" if job is None else record_of(job) for job_id, job in jobs.items()}
        offsets, new_end = append_records(file, end, records)
        try:
            sync_file(file)
        except OSError as error:
            cut_end(file, end)
            raise NotUndone(error.errno, error.strerror) from error
        return [Entry(job_id, jobs[job_id], offsets[job_id], len(records[job_id])) for job_id in jobs], new_end

    def _index_own(self, entries: List[Entry], state: IndexState, end: int) -> bool:
        """Has the index know entries that are stored, whatever becomes of this: they are read again from the file."""
        file = self._journal.file
        try:
            mtime = os.fstat(file).st_mtime_ns
            return self._index.add(state.inode, state.indexed_to, entries, end, checksum_before(file, end), mtime)
        except Exception as error:
            self._index.failure = error
            return False

    # Compacting

    def _is_worth_compacting(self) -> bool:
        if self._index is None or self._closing or self._troubles.get("read") or self._troubles.get("written"):
            return False
        try:
            with self._index.reading() as view:
                self._find_spare_ids(view)
                state, live = view.state, view.count()
        except sqlite3.Error as error:
            self._index.failure = error
            return False
        is_worth = state.needs_rewrite or state.entries - live > live + self.MIN_DEAD_ENTRIES
        return is_worth and time.monotonic() >= self._compact_at

    def _compact(self) -> None:
        """Writes the live entries to a new file, step by step, and puts it in the place of the old."""
        self._compact_at = time.monotonic() + self.COMPACT_RETRY  # unless it succeeds
        copy: Optional[JournalCopy] = None
        try:
            self._catch_up()
            with self._exclusive() as journal:
                with self._index.reading() as view:
                    state, damages = view.state, view.damages()
                is_free = state.compactor in ("", self.owner) or self._is_gone(state.compactor)
                if damages or not is_free:  # what could not be set aside would be lost
                    return
                self._index.update(compactor=self.owner)
            if state.needs_rewrite:
                log.warning("jobs.json was not as this program writes it: it is written anew")
            copy = JournalCopy(f"{self.path}.{self.owner}.part", self.path, state.indexed_to)
            copy.end = cut_end(copy.file, 0)

            def pause() -> None:
                sync_file(copy.file)  # often, so that no sync takes long
                self._pause()
                self._catch_up_if_requested()
                if journal.file is None:
                    raise StoreError("it was replaced meanwhile")

            self._copy_live(journal, copy, pause)
            for _ in range(self.TAIL_ROUNDS):  # each leaves less, but there may be no end of it
                self._copy_tail(journal, copy, self._indexed_to(), pause)
            self._copy_rest(journal, copy)
            self._compact_at = 0.0
        except Exception as error:
            if not self._closing:
                log.warning("jobs.json could not be compacted, it will be tried again: %s", error)
        finally:
            if copy is not None:
                copy.discard()
            if self._index is not None:
                with contextlib.suppress(sqlite3.Error):  # whoever comes next looks whether this process lives
                    self._index.abandon_move(self.owner)

    def _indexed_to(self) -> int:
        with self._index.reading() as view:
            return view.state.indexed_to

    def _copy_live(self, journal: OpenJournal, copy: JournalCopy, pause: Callable[[], None]) -> None:
        """Copies the record of each job, in order of acceptance."""
        row = 0
        while True:
            with self._index.reading() as view:
                places = view.places(row, self.COPIED_AT_ONCE)
            if not places:
                return
            self._copy(journal, copy, places)
            row = places[-1].row
            pause()

    def _copy_tail(self, journal: OpenJournal, copy: JournalCopy, end: int, pause: Callable[[], None]) -> None:
        """Copies what was appended meanwhile."""
        for found, position in read_entries(journal.file, copy.source_end, end):
            self._copy(journal, copy, [entry for entry in found if isinstance(entry, Entry)])
            copy.source_end = position
            pause()

    def _copy_rest(self, journal: OpenJournal, copy: JournalCopy) -> None:
        """Copies what is left and replaces the file, while nobody can append to it."""
        with self._exclusive() as now:
            state, end = self._find_end()
            if now is not journal or state.compactor != self.owner:  # and all may have to be indexed anew
                raise StoreError("it was changed meanwhile")
            self._index_up_to(now, state.indexed_to, end, lambda: None)
            if self._indexed_to() != end:
                raise StoreError("another process indexes it")
            self._copy_tail(journal, copy, end, lambda: None)
            self._replace(copy, state)

    def _copy(self, journal: OpenJournal, copy: JournalCopy, entries: Sequence[Union[Entry, Place]]) -> None:
        """Raises StoreError if these are not entries any more, or the index was rebuilt."""
        records = {entry.id: read_at(journal.file, entry.length, entry.offset) for entry in entries}
        for job_id, record in records.items():
            try:
                parse_entry(job_id, record, 0)
            except (ValueError, RecursionError):
                journal.needs_reading = True
                raise StoreError("it was changed meanwhile") from None
            records[job_id] = record.replace(b"\n", b" ")  # it may have been laid out in another way
        if not self._index.move(self.owner, copy.add(records)):
            raise StoreError("its index was made anew meanwhile")

    def _replace(self, copy: JournalCopy, state: IndexState) -> None:
        """Puts the new file in the place of the old, and has the index know it."""
        give_access(copy.file, access_of(self.path))  # somebody may have made it private meanwhile
        sync_file(copy.file)
        with self._reading:
            # Windows replaces no open file. After a failure, the next write reopens jobs.json and syncs its folder.
            self._journal.close()
            copy.close()
            os.replace(copy.path, self.path)
            sync_folder(os.path.dirname(self.path))
            self._journal = OpenJournal(self._open_file())
        file = self._journal.file
        self._index.update(
            inode=self._journal.inode,
            indexed_to=copy.end,
            checksum=checksum_before(file, copy.end),
            mtime=os.fstat(file).st_mtime_ns,
            entries=copy.entries,
            needs_rewrite=False,
            side=1 - state.side,
            compactor="",
        )

    # Jobs of dead processes

    def _recover(self) -> None:
        """Ends them if that is due. Raises StoreError if they cannot be read."""
        with self._work:
            recovery, self._recovery = self._recovery, None
        if recovery is None:
            return
        try:
            self._end_left(*recovery)
        except Exception:
            with self._work:
                self._recovery = self._recovery or recovery
            raise

    def _end_left(self, end: Callable[[Job], Job], ended: Callable[[Job], None], parked: bool) -> None:
        left = self._left_behind(end, parked)
        with contextlib.suppress(OSError):
            self._remove_leftovers()
        if not left:
            return
        changed = {job_id: change.job for job_id, change in left.items()}
        known = {job_id: [change.shown] for job_id, change in left.items()}

        def change_known(job: Job) -> Optional[Job]:
            # Where this could not be written at first, another process may have done it, and have begun the job.
            return changed[job.id] if job in known[job.id] else None

        def tell(decided: Future) -> None:
            for job in decided.result():
                ended(job)

        decision = Decision(list(changed), change_known, uncancellable_future(), is_lasting=True)
        decision.decided.add_done_callback(tell)
        try:
            self._append(changed)
            log_left_behind(changed.values())
            decision.decided.set_result(list(changed.values()))
        except OSError as error:
            if isinstance(error, NotUndone):  # it may stand in the file all the same
                known.update((job_id, [change.shown, change.job]) for job_id, change in left.items())
            self._report("written", cause_of(error))
            self._retry_at = time.monotonic() + self.RETRY
            self._lasting.append(decision)

    def _left_behind(self, end: Callable[[Job], Job], parked: bool) -> Overlay:
        """The unfinished jobs of dead processes, each with its end."""
        with self._index.reading() as view:
            state, places = view.state, view.unfinished(parked)
        pending, is_gone = self._pending_now(), functools.lru_cache(maxsize=None)(self._is_gone)
        left: Overlay = {}
        failure: Optional[StoreError] = None
        postponed = {job_id for decision in self._lasting for job_id in decision.ids}
        for place in places:
            if place.id in postponed:
                continue
            entry = None if place.id in pending else self._read(state, place)
            job = pending[place.id].shown if place.id in pending else entry and entry.job
            try:
                if job is not None and not job.ended and is_gone(job.owner):
                    left[job.id] = Pending(end(job), job)
            except StoreError as error:  # it is temporary: it is tried again at the next look
                failure = error
        self._report("completed by what lies in images/", failure and (failure.__cause__ or failure))
        return left

    def _is_gone(self, owner: Optional[str]) -> bool:
        """Whether a process has ended: then its lock can be had."""
        if owner == self.owner:
            return False
        path = f"{self.path}.owner-{owner}"
        if owner is None or not re.match(r"[0-9a-f]{8}\Z", owner) or not os.path.exists(path):
            return True
        lock, failure = FileLock(path, self.path), None
        try:
            return lock.try_acquire()
        except OSError as error:
            failure = error
            return False
        finally:
            lock.close()
            self._report(f"searched for what process {owner} left", failure)

    def _remove_leftovers(self) -> None:
        """Removes the files of dead processes, and, where no other lives, the indexes of other versions."""
        folder, name = os.path.split(self.path)
        form = re.compile(re.escape(name) + r"\.(?:owner-([0-9a-f]{8})|([0-9a-f]{8})\.part|index(\d*)(?:-wal|-shm)?)\Z")
        matches = sorted(filter(None, map(form.match, os.listdir(folder))), key=lambda match: match.lastindex == 3)
        is_alone = True
        for match in matches:
            owner, version = match.group(1) or match.group(2), match.group(3)
            if owner is None:
                is_left = is_alone and version != str(Index.VERSION)
            else:
                is_left = self._is_gone(owner)
                is_alone = is_alone and (is_left or owner == self.owner)
            if is_left:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, match.string))


# ------------------------------------------------------------------------------------------------------------------
# ImageStore: images/
# ------------------------------------------------------------------------------------------------------------------

DAY_FORM = re.compile(r"\d{4}-\d\d-\d\d\Z")
OWN_FILE_FORM = re.compile(
    r"\d{4}-\d\d-\d\d/[A-Za-z0-9]{8}"
    r"((\.brief|\.request)?\.json|_\d{1,6}\.[a-z]{3,4}|\.thumb\.jpg"
    r"|(_\d{1,6}|\.brief|\.request|\.thumb)?\.[0-9a-f]{8}\.part)\Z"
)
IMAGE_STARTS = {  # ending -> how such a file begins
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpg": re.compile(rb"\xff\xd8\xff"),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "gif": re.compile(rb"GIF8[79]a"),
    "avif": re.compile(rb".{4}ftypavi[fs]", re.DOTALL),
    "jxl": re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n"),
    "tiff": re.compile(rb"II\*\x00|MM\x00\*"),
    "bmp": re.compile(rb"BM"),
}


def ending_of(data: bytes) -> Optional[str]:
    """The ending of a file that begins so, None if it is no image."""
    return next((ending for ending, form in IMAGE_STARTS.items() if form.match(data)), None)


class Contents(NamedTuple):
    """What an answer without its images says, which is read once."""

    parameters: Any
    places: Tuple[int, ...]  # where the values of `parameters` and `info` start and end in it; 0 for what is not there

    @property
    def prompt(self) -> str:
        """The one that the host used, also where the request named none."""
        prompt = self.parameters.get("prompt") if isinstance(self.parameters, dict) else None
        return prompt[:PROMPT_LIMIT] if isinstance(prompt, str) else ""


class Answer(NamedTuple):
    """What the host answered: its images as base64, and its JSON with an empty list in their place."""

    images: List[Union[bytes, memoryview]]
    rest: bytes
    contents: Optional[Contents] = None  # of `rest`, if that was read


IMAGES_START = re.compile(rb'\s*\{\s*"images"\s*:\s*\[')
IMAGE_START = re.compile(rb'\s*"')
IMAGE_END = re.compile(rb"\s*([,\]])")


def split_answer(body: bytes) -> Answer:
    """Takes the images out of the host's answer. Raises ValueError if it is no JSON object.

    The JSON reader would copy all images twice and hold the interpreter meanwhile, for 50 ms where they have 40 MB. So
    they are found by their quotes, where they come first and have no escapes, as base64 has none.
    """
    start = IMAGES_START.match(body)
    images: List[Union[bytes, memoryview]] = []
    view, position = memoryview(body), start.end() if start else 0
    while start:
        opening = IMAGE_START.match(body, position)
        closing = body.find(b'"', opening.end()) if opening else -1
        after = IMAGE_END.match(body, closing + 1) if closing >= 0 else None
        if not (opening and after) or body.find(b"\\", opening.end(), closing) >= 0:
            break
        images.append(view[opening.end() : closing])
        position = after.end()
        if after.group(1) == b"]":
            rest = body[: start.end()] + body[position - 1 :]
            return Answer(images, rest, contents_of(rest))
    data = json.loads(body.decode())
    if not isinstance(data, dict):
        raise ValueError("the answer is no JSON object")
    found = data.pop("images", None)
    images = [str(image).encode("utf-8", "surrogatepass") for image in found] if isinstance(found, list) else []
    rest = as_host_json({"images": [], **data})
    return Answer(images, rest, contents_of(rest))


LARGE = 1 << 18  # bytes of an answer without its images: what is larger is never again read as a whole
JSON_GAP = re.compile(r"[ \t\r\n]*([{:,}])[ \t\r\n]*")


def members(data: bytes) -> Iterator[Tuple[str, Any, int, int]]:
    """The members of a JSON object: each one's name and value, and where the bytes of its value start and end.

    Raises ValueError, RecursionError.
    """
    text, decode = data.decode(), json.JSONDecoder().raw_decode
    passed = size = 0  # characters, and their bytes

    def offset(position: int) -> int:
        nonlocal passed, size
        size += len(text[passed:position].encode())
        passed = position
        return size

    def skip(position: int, expected: str) -> "re.Match[str]":
        gap = JSON_GAP.match(text, position)
        if gap is None or gap.group(1) not in expected:
            raise ValueError("it is no JSON object")
        return gap

    gap = skip(0, "{")
    if text.startswith("}", gap.end()):
        gap = skip(gap.end(), "}")
    while gap.group(1) != "}":
        name, end = decode(text, gap.end())
        if not isinstance(name, str):
            raise ValueError("a name is missing")
        start = skip(end, ":").end()
        value, end = decode(text, start)
        yield name, value, offset(start), offset(end)
        gap = skip(end, ",}")
    if gap.end() < len(text):
        raise ValueError("it does not end with the object")


def contents_of(rest: bytes) -> Contents:
    """Reads an answer without its images. Raises ValueError, RecursionError."""
    found = {name: member for name, *member in members(rest)}
    parameters, start, end = found.get("parameters", (None, 0, 0))
    _, *info = found.get("info", (None, 0, 0))
    return Contents(parameters, (start, end, *info))


def ranges_of(rest: bytes, contents: Contents) -> Tuple[int, ...]:
    """What is kept of a large answer: where `parameters` and `info` start and end, each with the CRC of its bytes.

    The last is the CRC of all of it. So what is passed on without being read is known to be what was stored.
    """
    view, (start, end, info_start, info_end) = memoryview(rest), contents.places
    info = info_start, info_end, zlib.crc32(view[info_start:info_end])
    return (start, end, zlib.crc32(view[start:end]), *info, zlib.crc32(view))


def with_images_hidden(answer: Answer, send_images: Optional[bool]) -> Answer:
    """An answer whose parameters say, as the client did, that it does not want the images."""
    parameters, places = answer.contents
    if not isinstance(parameters, dict) or "send_images" not in parameters:
        return answer
    parameters = {**parameters, "send_images": send_images}
    start, end = places[:2]
    rest = b"".join((answer.rest[:start], as_host_json(parameters), answer.rest[end:]))
    moved = len(rest) - len(answer.rest)
    places = tuple(place + moved if place >= end else place for place in places)
    return answer._replace(rest=rest, contents=Contents(parameters, places))


BRIEF_TEXT = 1000  # characters that a text in `parameters` may have in a list
BRIEF_SIZE = 1 << 16  # bytes that they may have there together, about
BRIEF_DEPTH = 100  # lists and objects within one another


def brief_parameters(parameters: Any) -> Any:
    """A copy of `parameters` with a note in the place of what is large.

    That is each long text, and a list or an object that has no room even without those. What lies at the top and is no
    text, list or object always stays. The host gives a request's own pictures back in there, wherever its scripts take
    them.
    """
    return shorten(parameters, BRIEF_SIZE)[0]


def shorten(value: Any, room: float, depth: int = 0) -> Tuple[Any, int]:
    """A copy of a value that fits into `room` bytes of JSON, see `brief_parameters`, and its size as JSON."""
    if isinstance(value, str) and (len(value) > BRIEF_TEXT or len(as_json(value)) > room):
        value = f"({len(value):,} characters)"
    if not isinstance(value, (dict, list)):
        return value, len(as_json(value))
    note = f"({len(value):,} entries)"
    is_top = depth == 0 and isinstance(value, dict) and len(value) <= BRIEF_TEXT
    if not is_top and (depth > BRIEF_DEPTH or 2 * len(value) > room):
        return note, len(note) + 2
    is_dict = isinstance(value, dict)
    entries = value if is_dict else dict(enumerate(value))
    names = {name: shorten(name, math.inf) if is_dict else (name, 0) for name in entries}
    size = 2 + sum(length + 2 for _, length in names.values())
    short = {name: None for name, _ in names.values()}
    # Lists and objects come last: they have the room that all else leaves.
    for name in sorted(entries, key=lambda name: isinstance(entries[name], (dict, list))):
        short[names[name][0]], length = shorten(entries[name], room - size, depth + 1)
        size += length
        if size > room and not is_top:
            return note, len(note) + 2
    return short if is_dict else list(short.values()), size


def brief_answer_of(rest: bytes, contents: Contents) -> Optional[bytes]:
    """An answer with brief parameters, or None if its own are. Of a large one, nothing else is in it."""
    try:
        parameters = brief_parameters(contents.parameters)
        data = as_host_json(parameters)
    except RecursionError:  # Pythons differ in how deep they read and write, and that is not to cost the images
        return None
    if len(rest) >= LARGE:
        return b'{"images":[],"parameters":%s}' % data
    start, end = contents.places[:2]
    return None if parameters == contents.parameters else rest[:start] + data + rest[end:]


THUMBNAIL_SIDE = 128  # pixels, the longer one
THUMBNAIL_QUALITY = 80  # with which even noise has less than 20 kB
PIXEL_LIMIT = 64_000_000  # of an image of which a thumbnail is made: 4 to 16 bytes of memory each, for a while


def thumbnail_of(file: BinaryIO, ending: str) -> bytes:
    """A small JPEG of an image, without its metadata, on white where it is transparent.

    Only Pillow's reader for this ending has a look at the file, and no pixel is decoded before their number is known.
    Raises whatever Pillow raises for what it cannot read.
    """
    with PIL.Image.open(file, formats=["jpeg" if ending == "jpg" else ending]) as image:
        if image.width * image.height > PIXEL_LIMIT:
            raise ValueError("it has too many pixels")
        if image.mode[0] in "IF":  # 16 bits for each pixel, of which the upper 8 count
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        elif image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):  # the numbers of a palette cannot be averaged
            image = image.convert("RGBA")
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image = image.convert("RGBA")
    small = PIL.Image.new("RGB", image.size, "white")
    small.paste(image, mask=image.getchannel("A"))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=THUMBNAIL_QUALITY)
    return data.getvalue()


class Part(NamedTuple):
    """A value within a large answer. It is passed on in chunks, and never read as a whole."""

    images: "ImageStore"
    name: str
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def chunks(self) -> Iterator[bytes]:
        return self.images.read(self.name, self.start, self.end)


class ImageStore:
    """The files of jobs, in a folder for each day. Every method may block, and raises StoreError unless it says not to.

    What its files are called is its own. Records have the names of images, and everybody else only hands them on.

    A file is whole once it has its name, and it has its name before a record names it. No symbolic link below the
    folder is followed.
    """

    CHUNK = 3 << 16  # bytes, a multiple of 3: there base64 can be cut
    # For those who use the store.
    ORPHAN_AGE = 3600.0  # seconds; a younger file that no record names may belong to a job that is being stored
    is_shared = False  # what is stored is had by other machines only once it is published
    place = ""  # by which webuis that share the jobs know whether they share the files, too

    def __init__(self, folder: str):
        self.folder = folder
        # Whoever may not read these may read no image.
        self._sources = (os.path.join(os.path.dirname(folder), "jobs.json"),)
        with contextlib.suppress(OSError):
            self._make_folder(folder)

    def as_private_as(self, paths: Iterable[str]) -> "ImageStore":
        """The same store, whose new files are only for those who may also read the files at `paths`."""
        store = copy.copy(self)
        store._sources = (*self._sources, *paths)
        return store

    # Names

    @staticmethod
    def day_of(job: Job) -> str:
        """The folder of a job's files, in UTC: it must not move with the machine's time zone."""
        return time.strftime("%Y-%m-%d", time.gmtime(job.timestamp))

    @classmethod
    def answer_name(cls, job: Job) -> str:
        """The file with the host's answer without its images."""
        return f"{cls.day_of(job)}/{job.id}.json"

    @classmethod
    def brief_answer_name(cls, job: Job) -> str:
        """The file with brief parameters, or the answer itself if its own are brief."""
        return f"{cls.day_of(job)}/{job.id}.brief.json" if job.has_brief else cls.answer_name(job)

    @classmethod
    def request_name(cls, job: Job) -> str:
        """The file with the request's body."""
        return f"{cls.day_of(job)}/{job.id}.request.json"

    @classmethod
    def thumbnail_name(cls, job: Job) -> str:
        """The file with the thumbnail, if one was asked for."""
        return f"{cls.day_of(job)}/{job.id}.thumb.jpg"

    @classmethod
    def counted_files_of(cls, job: Job) -> List[str]:
        """The files that are there from the job's end on, whose bytes its record counts."""
        names = [*(image.name for image in job.images), cls.answer_name(job), cls.brief_answer_name(job)]
        return list(dict.fromkeys([*names, cls.request_name(job)] if job.has_request else names))

    @classmethod
    def files_of(cls, job: Job) -> List[str]:
        """All files that a record stands for, in the order in which they are to be removed."""
        names = cls.counted_files_of(job)
        return [*names, cls.thumbnail_name(job)] if job.images else names

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, *name.split("/"))

    # Storing

    @raising_store_error()
    def save(self, job: Job, answer: Answer) -> Job:
        """Stores an answer, safe from a power cut, and returns the job with what its record says of its files.

        A job without a prompt gets the one that the host used. The host's answer comes last, when all else is safe:
        where it is, all is, see `find`.
        """
        folder = self._make_day(job)
        contents = answer.contents or contents_of(answer.rest)
        brief = brief_answer_of(answer.rest, contents)
        ranges = ranges_of(answer.rest, contents) if len(answer.rest) >= LARGE else ()
        known = {"prompt": job.prompt or contents.prompt, "has_brief": brief is not None, "ranges": ranges}
        job = job._replace(images=(), bytes=0, has_request=False, **known)
        try:
            for number, data in enumerate(answer.images):
                image = self._save_image(f"{self.day_of(job)}/{job.id}_{number}", data)
                job = job._replace(images=(*job.images, image), bytes=job.bytes + image.size)
            if brief is not None:
                job = job._replace(bytes=job.bytes + self._write(self.brief_answer_name(job), [brief]))
            if job.bytes:
                sync_folder(folder)
            job = job._replace(bytes=job.bytes + self._write(self.answer_name(job), [answer.rest]))
            sync_folder(folder)
            sync_folder(self.folder)
        except BaseException:
            self._remove_files(self.files_of(job))
            raise
        return job

    @raising_store_error()
    def save_request(self, job: Job, body: bytes) -> None:
        """Keeps the body of a job's request, safe from a power cut."""
        folder = self._make_day(job)
        self._write(self.request_name(job), [body])
        sync_folder(folder)
        sync_folder(self.folder)

    def read_request(self, job: Job) -> Optional[bytes]:
        """The body of a job's request, None if it is no longer there. Raises only a temporary StoreError."""
        try:
            return b"".join(self.read(self.request_name(job)))
        except StoreError as error:
            if error.temporary:
                raise
            return None

    def has_request(self, job: Job) -> bool:
        """Whether a job's request is kept where every webui has it. Raises a temporary StoreError."""
        return self.size(self.request_name(job)) is not None

    def share_request(self, job: Job, in_haste: bool = False) -> bool:
        """The same, after it was brought there, if this webui has it. Raises a temporary StoreError.

        That may take as long as it makes progress, unless somebody waits for it `in_haste`.
        """
        return self.has_request(job)

    # Publishing, where the store is shared

    def publish(self, job: Job) -> None:
        """Brings the files of a job to where all webuis have them, as `save` returned it.

        Raises StoreError. It is temporary while others cannot be given the files, and may be so for hours.
        """

    @raising_store_error()
    def named_beside(self, ids: Set[str]) -> Set[str]:
        """Those of some jobs that a jobs.json beside the folder names, though the jobs are kept elsewhere by now.

        They may be copied from there yet. Raises StoreError.
        """
        found: Set[str] = set()
        with contextlib.suppress(FileNotFoundError), open(self._sources[0], "rb") as file:
            for line in file if ids else ():
                found.update(ids.intersection(text.decode() for text in re.findall(rb'"([A-Za-z0-9]{8})"', line)))
        return found

    def unpublished(self, job: Job) -> Optional[Job]:
        """The same as `find`, of what only this webui has. None if it has no whole answer of the job."""

    def local_files(self, before: float = math.inf) -> Iterator[Tuple[str, str]]:
        """The same as `older_than`, of what only this webui has."""
        return iter(())

    def remove_local(self, names: Iterable[str]) -> None:
        """Removes what only this webui has, after it was published. Does not raise."""

    # Copying from another store, see Migration

    @raising_store_error()
    def copy_from(self, job: Job, source: "ImageStore") -> List[str]:
        """Copies a job's files from another store, safe from a power cut, but for those that are here already.

        Returns the names of those that are not there either, or are damaged. The host's answer comes last, as in
        `save`. Raises StoreError.
        """
        names = [self.request_name(job)] if job.has_request or not job.ended else []
        if job.status == COMPLETED:
            answer = self.answer_name(job)
            names += [name for name in self.counted_files_of(job) if name not in (*names, answer)]
            names.append(answer)
        known, missing = self._known_sizes(job, names), []
        for name in names:
            size = source.size(name)
            if size is None:
                missing.append(name)
            elif known.get(name) != size:
                try:
                    self._take(job, name, source.read(name))
                except StoreError as error:
                    if error.temporary:
                        raise
                    missing.append(name)
        return missing

    def _known_sizes(self, job: Job, names: List[str]) -> Dict[str, Optional[int]]:
        """Sizes of those of a job's files that are here. Raises StoreError."""
        return {name: self.size(name) for name in names}

    def _take(self, job: Job, name: str, chunks: Iterable[bytes]) -> None:
        """Stores a file. A StoreError of `chunks` is raised, and what cannot be done here an OSError."""
        folder = self._make_day(job)
        self._write(name, chunks)
        sync_folder(folder)
        sync_folder(self.folder)

    def is_empty(self) -> bool:
        """Whether there are no files at all: then their disk may be away. Raises StoreError."""
        return not self._list(self.folder)

    def remove_request(self, job: Job) -> None:
        """Removes the body of a job's request, if it was kept. Does not raise."""
        self.remove([self.request_name(job)])

    def _make_day(self, job: Job) -> str:
        """The folder of a job's files."""
        folder = os.path.join(self.folder, self.day_of(job))
        self._make_folder(self.folder)
        self._again(lambda: self._make_folder(folder, links=False))
        return folder

    @staticmethod
    def _again(make: Callable[[], Any]) -> Any:
        """What a function returns that needs a folder, which may go at any moment, together with its last file."""
        for _ in range(99):
            with contextlib.suppress(FileNotFoundError):
                return make()
        return make()

    def _make_folder(self, path: str, links: bool = True) -> None:
        """Sets aside what stands where a folder should be."""
        if os.path.lexists(path) and (not os.path.isdir(path) or (os.path.islink(path) and not links)):
            log.warning("%s is no folder, it was set aside as %s", path, quarantine(path))
        make_folder(path, self._sources[0])

    def _save_image(self, base: str, image: Union[bytes, memoryview]) -> Image:
        if bytes(image[:5]) == b"data:":
            image = image[bytes(image[:100]).find(b",") + 1 :]
        try:
            name = f"{base}.{ending_of(next(self._decode(image[:64]))) or 'bin'}"
            return self._image(name, self._write(name, self._decode(image)))
        except ValueError:  # no base64: kept as it is
            name = f"{base}.txt"
            return self._image(name, self._write(name, [bytes(image)]))

    @staticmethod
    def _image(name: str, size: int) -> Image:
        return Image(name, size, MEDIA_TYPES.get(name.rpartition(".")[2], OTHER_MEDIA_TYPE))

    def _decode(self, image: Union[bytes, memoryview]) -> Iterator[bytes]:
        """Decodes chunk by chunk, since it holds the interpreter. Raises ValueError if encoding would not undo it."""
        if not image:
            raise ValueError("no base64")
        step = self.CHUNK // 3 * 4
        for position in range(0, len(image), step):
            chunk = bytes(image[position : position + step])
            data = base64.b64decode(chunk, validate=True)
            is_last = position + step >= len(image)
            if base64.b64encode(data) != chunk or not (is_last or len(data) == self.CHUNK):
                raise ValueError("not canonical")
            yield data

    def _write(self, name: str, chunks: Iterable[bytes]) -> int:
        """Makes a file, safe from a power cut once its folder is synced, and returns its size in bytes."""
        path = self._path(name)
        part = f"{os.path.splitext(path)[0]}.{secrets.token_hex(4)}.part"

        def create() -> int:
            try:
                return create_like(part, *self._sources, mask=UMASK)
            except FileNotFoundError:
                make_folder(os.path.dirname(part), self._sources[0])
                raise

        return fill_file(self._again(create), part, chunks, path)

    @raising_store_error()
    def find(self, job: Job) -> Optional[Job]:
        """A job that a crash left between `save` and its record, as `save` returned it.

        None if `save` did not come to its end. Raises StoreError if that cannot be told.
        """
        return self._as_saved(job, self._sizes(job))

    def _sizes(self, job: Job) -> Dict[str, int]:
        """The names of a job's files, with their sizes in bytes. None where there is no answer."""
        day = self.day_of(job)
        folder = os.path.join(self.folder, day)
        if os.path.islink(folder):
            return {}
        try:
            os.lstat(self._path(self.answer_name(job)))  # most jobs have none, and a folder takes long to list
        except (FileNotFoundError, NotADirectoryError):
            return {}
        names = [f"{day}/{entry}" for entry in os.listdir(folder) if entry.startswith(job.id)]
        return {name: os.lstat(self._path(name)).st_size for name in names}

    def _as_saved(self, job: Job, sizes: Dict[str, int]) -> Optional[Job]:
        """A job as `save` returned it, by the files that it has. None if they are not all."""
        answer = self.answer_name(job)
        numbers = {int(form.group(2)): form.group() for form in map(IMAGE_FORM.match, sizes) if form}
        if answer not in sizes or sorted(numbers) != list(range(len(numbers))):
            return None
        images = tuple(self._image(name, sizes[name]) for _, name in sorted(numbers.items()))
        brief = f"{self.day_of(job)}/{job.id}.brief.json"
        job = job._replace(images=images, has_brief=brief in sizes, has_request=False)
        if sizes[answer] >= LARGE or not job.prompt:
            with contextlib.suppress(ValueError, RecursionError):
                rest = b"".join(self.read(answer))
                contents = contents_of(rest)
                ranges = ranges_of(rest, contents) if len(rest) >= LARGE else ()
                job = job._replace(prompt=job.prompt or contents.prompt, ranges=ranges)
        return job._replace(bytes=sum(sizes[name] for name in self.counted_files_of(job)))

    # Reading

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """A file, open for reading. Raises StoreError for all that fails meanwhile."""
        path = self._path(name)
        with raising_store_error():
            if os.path.islink(os.path.dirname(path)) or os.path.islink(path):
                raise OSError(errno.ELOOP, "a symbolic link is not followed", path)
            file = open_regular(path, NO_FOLLOW)
            try:
                yield file
            finally:
                os.close(file)

    def size(self, name: str) -> Optional[int]:
        """In bytes; None if the file is not there or cannot be read. Raises only a temporary StoreError."""
        try:
            with self._opened(name) as file:
                return os.fstat(file).st_size
        except StoreError as error:
            if error.temporary:
                raise
            return None

    def image_sizes(self, job: Job) -> List[Optional[int]]:
        """The same as `size`, for all images of a job."""
        return [self.size(image.name) for image in job.images]

    def missing(self, job: Job) -> Set[int]:
        """The numbers of a job's images that are no longer there. Raises a temporary StoreError."""
        return {number for number, size in enumerate(self.image_sizes(job)) if size is None}

    def url(self, name: str) -> Optional[str]:
        """Where a client may fetch a file without this webui, for an hour. None if nowhere. Asks nobody."""

    def read(self, name: str, start: int = 0, end: Optional[int] = None) -> Iterator[bytes]:
        """A file's bytes, or a part of them, `CHUNK` at a time. The file is open from the first one on."""
        with self._opened(name) as file:
            end = os.fstat(file).st_size if end is None else end
            while start < end:
                data = read_at(file, min(self.CHUNK, end - start), start)
                if not data:
                    raise self._damaged(name)
                yield data
                start += len(data)

    @staticmethod
    def _damaged(name: str) -> StoreError:
        """What is raised for a file that is not as it was stored."""
        return StoreError.of(OSError(errno.EIO, "it is damaged", name))

    def _check(self, name: str, crc: int, start: int = 0, end: Optional[int] = None) -> None:
        """Reads a file, or a part of it. Raises StoreError if it is not as it was stored."""
        found = 0
        for data in self.read(name, start, end):
            found = zlib.crc32(data, found)
        if found != crc:
            raise self._damaged(name)

    @contextlib.contextmanager
    def _decoding(self, name: str) -> Iterator[None]:
        """Around what is made of a file's bytes. Raises StoreError if nothing can be made of them."""
        try:
            yield
        except (ValueError, RecursionError):
            raise self._damaged(name) from None

    def _read_json(self, name: str, start: int = 0, end: Optional[int] = None) -> Any:
        with self._decoding(name):
            return HOST_DECODER.decode(b"".join(self.read(name, start, end)).decode())

    def read_as_json(self, name: str) -> Iterator[bytes]:
        """The JSON string that the host answered for this file, a chunk at a time."""
        if name.endswith(".txt"):
            with self._decoding(name):
                yield as_host_json(b"".join(self.read(name)).decode("utf-8", "surrogatepass"))
            return
        chunks = self.read(name)
        yield b'"' + base64.b64encode(next(chunks, b""))  # the file is open from now on, and may be deleted
        for data in chunks:
            yield base64.b64encode(data)
        yield b'"'

    def images_as_json(self, job: Job, needed: bool = False) -> Iterator[bytes]:
        """A job's images as the items of a JSON array.

        One that is not there is null, or StoreError if it is needed or the trouble is temporary.
        """
        for number, image in enumerate(job.images):
            if number:
                yield b","
            chunks = self.read_as_json(image.name)
            try:
                first = next(chunks)
            except StoreError as error:
                if needed or error.temporary:
                    raise
                first = b"null"
            yield first
            yield from chunks

    def prepare(self, jobs: Iterable[Job]) -> None:
        """Some jobs are about to be listed, for which `read_values` reads the brief values of each. Does not raise."""

    def read_values(self, job: Job, whole: bool) -> Tuple[Any, Any]:
        """`parameters`, which are brief unless they are to be `whole`, and `info`, of a Completed job's answer.

        What is large is a Part, which is as it was stored. Raises StoreError for what is not.
        """
        if not job.ranges:
            answer = self._read_answer(self.answer_name(job) if whole else self.brief_answer_name(job))
            parameters = answer.get("parameters")
            return parameters if whole else brief_parameters(parameters), answer.get("info")
        info = self._part(job, *job.ranges[3:6])
        if info is not None and info.size <= LARGE:
            info = self._read_json(info.name, info.start, info.end)
        if whole:
            return self._part(job, *job.ranges[:3]), info
        return self._read_answer(self.brief_answer_name(job)).get("parameters"), info

    def _read_answer(self, name: str) -> Dict[str, Any]:
        answer = self._read_json(name)
        if not isinstance(answer, dict):
            raise self._damaged(name)
        return answer

    def _part(self, job: Job, start: int, end: int, crc: int) -> Optional[Part]:
        """A value within a large answer. None if that has no such value."""
        if start == end:
            return None
        name = self.answer_name(job)
        self._check(name, crc, start, end)
        return Part(self, name, start, end)

    def replay(self, job: Job) -> Iterator[bytes]:
        """The answer of a Completed job once more, with the images if the client wanted them, a chunk at a time."""
        name = self.answer_name(job)
        if job.ranges:
            self._check(name, job.ranges[6])
        # All that lies at the top of parameters is in the brief ones, too.
        parameters = self._read_answer(self.brief_answer_name(job) if job.ranges else name).get("parameters")
        wants_images = not isinstance(parameters, dict) or parameters.get("send_images", True)
        with contextlib.closing(self.read(name)) as chunks:
            rest = next(chunks, b"")
            start = IMAGES_START.match(rest)
            if start is None:
                raise self._damaged(name)
            yield rest[: start.end()]
            if wants_images:
                yield from self.images_as_json(job, needed=True)
            yield rest[start.end() :]
            yield from chunks

    # Thumbnails

    @staticmethod
    def may_have_thumbnail(job: Job) -> bool:
        """Whether a job has an image of which one could be made, as far as its record says. Opens no file."""
        return job.status == COMPLETED and bool(job.images) and job.images[0].media_type.startswith("image/")

    def read_thumbnail(self, job: Job) -> Optional[bytes]:
        """The thumbnail of a job's first image as a JPEG, None if none was made. Raises only a temporary StoreError."""
        try:
            data = b"".join(self.read(self.thumbnail_name(job)))
        except StoreError as error:
            if error.temporary:
                raise
            return None
        return data if data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9") else None

    def make_thumbnail(self, job: Job) -> Optional[bytes]:
        """The same, made and kept if none was. None if none can be made of that image, or if that is gone.

        Takes a second for a large image. A disk that does not take it is no trouble. Raises only a temporary
        StoreError.
        """
        made = self.read_thumbnail(job)
        if made is not None or not self.may_have_thumbnail(job):
            return made
        name = job.images[0].name
        try:
            with self._stream(name) as stream:
                made = thumbnail_of(stream, name.rpartition(".")[2])
        except StoreError as error:
            if error.temporary:
                raise
            return None
        except Exception:  # Pillow raises much for a file that is cut, damaged, or of a format that it does not know
            return None
        with contextlib.suppress(OSError, StoreError):
            self._keep_thumbnail(job, made)
        if self.size(name) is None:  # the job was removed meanwhile, and what was removed last was not there yet
            self.remove([self.thumbnail_name(job)])
            return None
        return made

    @contextlib.contextmanager
    def _stream(self, name: str) -> Iterator[BinaryIO]:
        """A file, for a reader that goes to and fro in it. Raises StoreError."""
        with self._opened(name) as file, os.fdopen(os.dup(file), "rb") as stream:
            yield stream

    def _keep_thumbnail(self, job: Job, data: bytes) -> None:
        self._write(self.thumbnail_name(job), [data])

    # Removing

    def remove(self, names: Iterable[str]) -> int:
        """Removes files, and folders that are empty then. Returns the bytes that it freed. Does not raise."""
        return self._remove_files(names)

    def _remove_files(self, names: Iterable[str]) -> int:
        freed = 0
        for name in names:
            path = self._path(name)
            folder = os.path.dirname(path)
            with contextlib.suppress(OSError):  # it is not there, or cannot be removed, or its folder is not empty
                if not os.path.islink(folder):
                    size = os.lstat(path).st_size
                    os.unlink(path)
                    freed += size
                    os.rmdir(folder)
        return freed

    def older_than(self, before: float) -> Iterator[Tuple[str, str]]:
        """All files that this program made and last changed before a time (Unix seconds): the job's ID, the name."""
        for day in sorted(filter(DAY_FORM.match, self._list(self.folder))):
            folder = os.path.join(self.folder, day)
            try:
                entries = [] if os.path.islink(folder) else self._list(folder)
            except StoreError as error:
                log.warning("%s cannot be searched for what no job names: %s", folder, error.details)
                continue
            for entry in entries:
                name = f"{day}/{entry}"
                with raising_store_error(), contextlib.suppress(FileNotFoundError):
                    if OWN_FILE_FORM.match(name) and os.lstat(self._path(name)).st_mtime < before:
                        yield entry[:8], name

    @staticmethod
    @raising_store_error()
    def _list(folder: str) -> List[str]:
        """The names in a folder; none if it does not exist."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.listdir(folder)
        return []


# ------------------------------------------------------------------------------------------------------------------
# Fleet: the two stores for many webuis on many machines
# ------------------------------------------------------------------------------------------------------------------


DEAD_AFTER = 45.0  # seconds of silence after which a webui is taken for dead
NUL_SIGN = "\uffff"  # in the place of NUL, which PostgreSQL refuses. It is no character, and no prompt has it
COLUMN_LIMIT = 300  # characters of a text that is indexed: PostgreSQL indexes no value of more than 2,700 bytes

# Each entry takes the schema one version further. A function has another search_path than who made it.
MIGRATIONS = (
    """
    CREATE TABLE job_tracker_jobs (
        folded bigint PRIMARY KEY, -- the ID, without case
        number bigint NOT NULL GENERATED ALWAYS AS IDENTITY, -- in order of acceptance
        id text COLLATE "C" NOT NULL,
        record text NOT NULL, -- JSON as in jobs.json. The other columns are for finding it
        timestamp bigint NOT NULL,
        status text COLLATE "C" NOT NULL,
        type text COLLATE "C" NOT NULL,
        ip text COLLATE "C",
        label text COLLATE "C",
        key text COLLATE "C",
        prompt text COLLATE "C" NOT NULL, -- without case
        bytes bigint NOT NULL,
        parked boolean NOT NULL,
        owner text COLLATE "C",
        due double precision,
        is_left boolean NOT NULL, -- Failed, since its webui was taken for dead
        held_by text COLLATE "C", -- a webui that is about to start it, see oldest_parked
        held_until timestamptz
    );
    CREATE UNIQUE INDEX job_tracker_jobs_first_with_key ON job_tracker_jobs (key)
        WHERE key IS NOT NULL AND status <> 'Failed';
    CREATE INDEX job_tracker_jobs_key ON job_tracker_jobs (key, number) WHERE key IS NOT NULL;
    CREATE INDEX job_tracker_jobs_time ON job_tracker_jobs (timestamp, number);
    CREATE INDEX job_tracker_jobs_status ON job_tracker_jobs (status, timestamp, number);
    CREATE INDEX job_tracker_jobs_type ON job_tracker_jobs (type, timestamp, number);
    CREATE INDEX job_tracker_jobs_ip ON job_tracker_jobs (ip, timestamp, number);
    CREATE INDEX job_tracker_jobs_label ON job_tracker_jobs (label, timestamp, number) WHERE label IS NOT NULL;
    CREATE INDEX job_tracker_jobs_parked ON job_tracker_jobs (timestamp, number) WHERE parked;
    CREATE INDEX job_tracker_jobs_ended ON job_tracker_jobs (timestamp, number)
        WHERE status IN ('Completed', 'Failed');
    CREATE INDEX job_tracker_jobs_unfinished ON job_tracker_jobs (timestamp, number)
        WHERE status IN ('Pending', 'Processing') AND NOT parked;
    CREATE INDEX job_tracker_jobs_due ON job_tracker_jobs (due) WHERE due IS NOT NULL;

    CREATE TABLE job_tracker_webuis (
        owner text COLLATE "C" PRIMARY KEY,
        server text NOT NULL, -- empty until it is known
        images text NOT NULL, -- where it keeps images
        seen timestamptz NOT NULL
    );

    -- Jobs and bytes by status: the sum over all webuis. Each has rows of its own, so that none waits for another.
    CREATE TABLE job_tracker_counts (
        owner text COLLATE "C",
        status text COLLATE "C",
        jobs bigint NOT NULL,
        bytes bigint NOT NULL,
        PRIMARY KEY (owner, status)
    );
    CREATE FUNCTION job_tracker_count() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO {schema}.job_tracker_counts AS counts (owner, status, jobs, bytes)
                SELECT coalesce(current_setting('job_tracker.owner', true), ''), status, count(*), sum(bytes)
                FROM added GROUP BY status
            ON CONFLICT (owner, status)
                DO UPDATE SET jobs = counts.jobs + excluded.jobs, bytes = counts.bytes + excluded.bytes;
        ELSIF TG_OP = 'DELETE' THEN
            INSERT INTO {schema}.job_tracker_counts AS counts (owner, status, jobs, bytes)
                SELECT coalesce(current_setting('job_tracker.owner', true), ''), status, -count(*), -sum(bytes)
                FROM removed GROUP BY status
            ON CONFLICT (owner, status)
                DO UPDATE SET jobs = counts.jobs + excluded.jobs, bytes = counts.bytes + excluded.bytes;
        ELSE
            INSERT INTO {schema}.job_tracker_counts AS counts (owner, status, jobs, bytes)
                SELECT coalesce(current_setting('job_tracker.owner', true), ''), status, sum(jobs), sum(bytes)
                FROM (
                    SELECT status, 1 AS jobs, bytes FROM added
                    UNION ALL SELECT status, -1, -bytes FROM removed
                ) AS changed GROUP BY status HAVING sum(jobs) <> 0 OR sum(bytes) <> 0
            ON CONFLICT (owner, status)
                DO UPDATE SET jobs = counts.jobs + excluded.jobs, bytes = counts.bytes + excluded.bytes;
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER job_tracker_added AFTER INSERT ON job_tracker_jobs
        REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION job_tracker_count();
    CREATE TRIGGER job_tracker_changed AFTER UPDATE ON job_tracker_jobs
        REFERENCING OLD TABLE AS removed NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION job_tracker_count();
    CREATE TRIGGER job_tracker_removed AFTER DELETE ON job_tracker_jobs
        REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION job_tracker_count();

    -- What webuis tell each other of the jobs that they run. Nobody misses it after a crash.
    CREATE UNLOGGED TABLE job_tracker_glances (
        id text COLLATE "C" PRIMARY KEY,
        progress double precision,
        eta double precision,
        queue_position integer,
        preview bytea NOT NULL,
        preview_number integer NOT NULL,
        media_type text NOT NULL,
        said timestamptz NOT NULL
    );
    """,
)
# Where it can be had, texts are found without a look at each.
TEXT_INDEX = """
    CREATE EXTENSION IF NOT EXISTS pg_trgm;
    CREATE INDEX job_tracker_jobs_prompt ON job_tracker_jobs USING gin (prompt gin_trgm_ops);
"""

# A webui has given no sign of life for so many seconds, or, where the database's clock was set back, none since then.
SILENT = "abs(extract(epoch FROM clock_timestamp() - seen)) > %(seconds)s"

# The columns of job_tracker_jobs that a job has, with their types.
JOB_COLUMNS = {
    "folded": "bigint",
    "id": "text",
    "record": "text",
    "timestamp": "bigint",
    "status": "text",
    "type": "text",
    "ip": "text",
    "label": "text",
    "key": "text",
    "prompt": "text",
    "bytes": "bigint",
    "parked": "boolean",
    "owner": "text",
    "due": "double precision",
    "is_left": "boolean",
}


def column_text(text: Optional[str]) -> Optional[str]:
    """Text as a column that is indexed has it. PostgreSQL refuses lone surrogates, too."""
    return None if text is None else without_surrogates(text).replace("\0", NUL_SIGN)[:COLUMN_LIMIT]


def searched_text(text: str) -> str:
    """Text in the form in which it is searched, without case."""
    return without_surrogates(text.casefold()).replace("\0", NUL_SIGN)


def like_pattern(text: str) -> str:
    """What LIKE takes for a text anywhere in another."""
    return "%" + re.sub(r"([%_\\])", r"\\\1", searched_text(text)) + "%"


def row_of(job: Job) -> Tuple[Any, ...]:
    """A job as the columns JOB_COLUMNS have it."""
    return (
        *(id_number(job.id), job.id, record_of(job).decode(), job.timestamp, job.status, job.type),
        *map(column_text, (job.ip, job.label, job.key)),
        *(searched_text(job.prompt), job.bytes, job.parked, column_text(job.owner)),
        float(job.webhook.due) if job.webhook and job.webhook.due is not None else None,
        job.status == FAILED and job.error == LEFT_BEHIND,
    )


def jobs_as_table(count: int) -> str:
    """Jobs as a table in SQL, whose values are those of `row_of`."""
    row = ", ".join(f"%s::{kind}" for kind in JOB_COLUMNS.values())
    return f"(VALUES {', '.join([f'({row})'] * count)}) AS new ({', '.join(JOB_COLUMNS)})"


@functools.lru_cache(maxsize=100)
def add_jobs(count: int) -> str:
    """What the unique indexes refuse is left out."""
    columns = ", ".join(JOB_COLUMNS)
    table = f"SELECT * FROM {jobs_as_table(count)}"
    return f"INSERT INTO job_tracker_jobs ({columns}) {table} ON CONFLICT DO NOTHING RETURNING id"


@functools.lru_cache(maxsize=100)
def change_jobs(count: int) -> str:
    columns = ", ".join(f"{name} = new.{name}" for name in JOB_COLUMNS)
    return f"UPDATE job_tracker_jobs AS jobs SET {columns} FROM {jobs_as_table(count)} WHERE jobs.folded = new.folded"


@functools.lru_cache(maxsize=100)
def change_own_jobs(count: int) -> str:
    """What belongs to another webui, or has ended for good, is left out.

    One that is written already, as it is tried again when nobody knows whether it was, counts as written.
    """
    return (
        f"{change_jobs(count)} AND jobs.id = new.id AND jobs.owner = %s AND (jobs.status IN ('Pending', 'Processing') "
        "OR (jobs.is_left AND new.status IN ('Completed', 'Failed')) OR jobs.record = new.record) RETURNING jobs.id"
    )


IMPORTING = threading.Lock()  # around what threads must not do at once: importlib fails where another was faster


def import_driver(module: str, requirement: str) -> Any:
    """A package that only a fleet needs, and that may be installed while the webui runs. Raises StoreError."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(module)
    try:
        with IMPORTING:
            importlib.invalidate_caches()
        return importlib.import_module(module)
    except ImportError as error:
        needs = " (it needs Python 3.9)" if module == "obstore" and sys.version_info < (3, 9) else ""
        reason = f'the package {module} is missing{needs}: python -m pip install "{requirement}"'
        failure = StoreError(reason, temporary=True)
        failure.details = f'{error}. To install it{needs}: "{sys.executable}" -m pip install "{requirement}"'
        raise failure from None


class NoAnswer(Exception):
    """The database has not answered in time."""


def is_lost(error: Optional[BaseException]) -> bool:
    """Whether an error of psycopg's tells of a connection, and not of what was asked."""
    if error is None:
        return False
    import psycopg  # without it, there is no such error

    state = getattr(error, "sqlstate", None)
    if state is not None:  # PostgreSQL, appendix A: the server, or the connection, goes down
        return state.startswith(("08", "57P", "25P03"))
    return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError, OSError))


@functools.lru_cache(maxsize=None)
def connection_class() -> Any:
    """psycopg's connection, but every wait of it ends at a deadline. Raises StoreError."""
    psycopg = import_driver("psycopg", "psycopg[binary]>=3.2")

    class Connection(psycopg.Connection):
        deadline = math.inf  # by time.monotonic()
        abandoned: Abandoned = None  # once it is set, nobody waits any more

        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            return super().wait(self._until_deadline(gen), *args, **kwargs)

        def _until_deadline(self, gen: Any) -> Any:
            try:
                wanted = next(gen)
                while True:  # psycopg comes by ten times a second, also when nothing has come
                    ready = yield wanted
                    if time.monotonic() > self.deadline or (self.abandoned is not None and self.abandoned.is_set()):
                        raise NoAnswer
                    wanted = gen.send(ready)
            except StopIteration as end:
                return end.value

    return Connection


class Connections:
    """Connections to a PostgreSQL database: a bounded number, each for one thread at a time.

    While the database is away, one caller in a moment tries to reach it, and all others are refused at once. All that
    is asked has a limit, whatever the network does: then its connection is closed, and nobody knows what became of it.
    """

    CONNECT_SECONDS = 2
    SET_UP_SECONDS = 5.0  # for what a new connection is told first
    MOMENT = 1.0  # seconds from one try to reach a database that is away to the next
    IDLE_SECONDS = 60.0  # after which a connection that nobody needs is closed
    SERVER_SECONDS = 30  # after which the server gives up what it was asked: nobody waits for it any more
    # The same for a transaction whose next statement does not come: others wait for what it has locked. Its webui may
    # be suspended, or its network cut, which the server would notice hours later.
    STALLED_SECONDS = 3
    KEEPALIVES = {"idle": 15, "interval": 5, "count": 3}  # by which the server finds out that nobody is there any more
    PREPARE_SECONDS = 600.0  # for a new schema, which may be long in the making

    def __init__(self, url: str, owner: str, limit: int = 1, is_durable: bool = False):
        """`limit` is how many there are at once. Unless they are durable, a crash of the server may lose a commit."""
        self._url = url
        self._owner = owner
        self._is_durable = is_durable
        self._lock = threading.Lock()  # guards the next four
        self._idle: List[Tuple[Any, float]] = []  # connections, and since when; the last used is the last
        self._failed_at = -math.inf
        self._failure: Optional[StoreError] = None
        self._is_trying = False
        self._room = threading.Semaphore(limit)
        self._preparing = threading.Lock()
        self._is_prepared = False  # the schema is there

    # Errors

    def error(self, cause: BaseException) -> StoreError:
        """What to say of a failure: to users without a name of a machine, to the log without a password."""
        if isinstance(cause, StoreError):
            return cause
        state = getattr(cause, "sqlstate", None)
        if isinstance(cause, NoAnswer):
            failure = StoreError("the database does not answer", temporary=True)
        elif is_lost(cause):
            failure = StoreError("the database cannot be reached", temporary=True)
        elif state is None:  # psycopg refuses it, before it is sent
            failure = StoreError(f"the database cannot take it ({type(cause).__name__})")
        else:
            failure = StoreError(
                f"the database refuses it ({type(cause).__name__})", temporary=state[:2] not in ("22", "23")
            )
        if str(cause):
            failure.details = self._without_password(f"{type(cause).__name__}: {cause}".strip())
        failure.__cause__ = cause
        return failure

    def _without_password(self, text: str) -> str:
        parts = urlsplit(self._url)
        secrets_ = [parts.netloc.rpartition("@")[0].partition(":")[2]]
        secrets_ += re.findall(r"(?:^|&)(?:ssl)?password=([^&]*)", parts.query)
        for secret in filter(None, secrets_):
            text = text.replace(secret, "***").replace(unquote(secret), "***")
        return text

    # Connections

    def _connect(self) -> Any:
        class_ = connection_class()
        options = {"connect_timeout": self.CONNECT_SECONDS, "application_name": f"job-tracker {self._owner}"}
        options["client_encoding"] = "UTF8"  # also where the server has none, as one that was made without a locale
        try:
            connection = class_.connect(self._url, autocommit=True, **options)
        except Exception as error:
            if type(error).__name__ == "ProgrammingError":  # which may cite the password
                failure = StoreError("TRACKER_STORE is no valid URL of a database", temporary=True)
                failure.details = f"{failure}: {self._without_password(str(error))}"
                raise failure from None
            raise
        try:
            connection.deadline = time.monotonic() + self.SET_UP_SECONDS
            encoding = connection.info.parameter_status("server_encoding") or ""
            if encoding not in ("", "UTF8", "SQL_ASCII"):
                raise StoreError(f"the database has the encoding {encoding}, and needs UTF8", temporary=True)
            settings = {
                "job_tracker.owner": self._owner,
                "statement_timeout": f"{self.SERVER_SECONDS}s",
                "idle_in_transaction_session_timeout": f"{self.STALLED_SECONDS}s",
                "synchronous_commit": "on" if self._is_durable else "off",
                # A machine without power leaves connections behind, and perhaps the lock of a purge: for half a minute.
                **{f"tcp_keepalives_{name}": f"{number}" for name, number in self.KEEPALIVES.items()},
            }
            calls = ", ".join(["set_config(%s, %s, false)"] * len(settings))
            connection.execute(f"SELECT {calls}", [*itertools.chain.from_iterable(settings.items())])
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: Any) -> None:
        """Makes the schema, or takes it to this version, once among all webuis."""
        with self._preparing:
            if self._is_prepared:
                return
            connection.deadline = time.monotonic() + self.PREPARE_SECONDS
            version = self._schema_version(connection)
            if version < len(MIGRATIONS):
                with connection.transaction():
                    connection.execute("SET LOCAL statement_timeout = 0")
                    connection.execute("SELECT pg_advisory_xact_lock(hashtext('job_tracker ' || current_schema()))")
                    version = self._schema_version(connection)  # another webui may have been first
                    (schema,) = connection.execute("SELECT quote_ident(current_schema())").fetchone()
                    for statements in MIGRATIONS[version:]:
                        connection.execute(statements.replace("{schema}", schema))
                    if version < len(MIGRATIONS):
                        connection.execute("CREATE TABLE IF NOT EXISTS job_tracker_schema (version integer NOT NULL)")
                        connection.execute("DELETE FROM job_tracker_schema")
                        connection.execute("INSERT INTO job_tracker_schema VALUES (%s)", (len(MIGRATIONS),))
                    if version == 0:
                        with contextlib.suppress(self._refusals()), connection.transaction():
                            connection.execute(TEXT_INDEX)
            self.check_version(version)
            self._is_prepared = True

    @staticmethod
    def check_version(version: int) -> None:
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the jobs are in the form of a later Job Tracker (schema {version}, this one knows "
                f"{len(MIGRATIONS)}): update this one",
                temporary=True,
            )

    def doubt_schema(self) -> None:
        """Has each new connection look at the schema once more, and closes those that nobody uses."""
        self._is_prepared = False
        self.close()

    @staticmethod
    def _refusals() -> Any:
        """What psycopg raises for what the server refuses."""
        import psycopg

        return psycopg.DatabaseError

    @staticmethod
    def _schema_version(connection: Any) -> int:
        """0 where there is none."""
        # Not by to_regclass, which may remember that there was none before another webui made it.
        where = "relname = 'job_tracker_schema' AND relnamespace = current_schema()::regnamespace"
        if connection.execute(f"SELECT FROM pg_class WHERE {where}").fetchone() is None:
            return 0
        found = connection.execute("SELECT version FROM job_tracker_schema").fetchone()
        return found[0] if found else 0

    @contextlib.contextmanager
    def use(self, seconds: float, abandoned: Abandoned = None) -> Iterator[Any]:
        """A connection for what takes so many seconds at most, or less once `abandoned` is set. Raises StoreError.

        It is in autocommit mode.
        """
        until = time.monotonic() + seconds
        if not self._room.acquire(timeout=seconds):
            raise StoreError("the database is busy", temporary=True)
        try:
            connection = self._take()
            try:
                connection.deadline, connection.abandoned = until, abandoned
                yield connection
            except BaseException as error:
                self._drop(connection, error)
                raise self.error(error) if isinstance(error, Exception) else error
            connection.abandoned = None
            with self._lock:
                self._idle.append((connection, time.monotonic()))
                unneeded = [one for one, since in self._idle if time.monotonic() - since > self.IDLE_SECONDS]
                self._idle = self._idle[len(unneeded) :]
            for one in unneeded:
                one.close()
        finally:
            self._room.release()

    def _take(self) -> Any:
        """A connection that was used before, or a new one."""
        while True:
            with self._lock:
                connection, since = self._idle.pop() if self._idle else (None, 0.0)
            if connection is None:
                return self.open()
            if time.monotonic() - since > self.IDLE_SECONDS:  # what lies between may have forgotten it, and tell nobody
                connection.close()
            if not connection.closed:
                return connection

    def open(self) -> Any:
        """A connection of the caller's own. Raises StoreError."""
        with self._lock:
            is_away = self._failure is not None
            if is_away and (self._is_trying or time.monotonic() - self._failed_at < self.MOMENT):
                raise self._failure.again()
            self._is_trying = True
        failure: Optional[StoreError] = None
        try:
            return self._connect()
        except Exception as error:
            failure = self.error(error)
            raise failure.again() from None
        finally:
            with self._lock:
                self._is_trying, self._failure, self._failed_at = False, failure, time.monotonic()

    def _drop(self, connection: Any, error: BaseException) -> None:
        """Closes a connection on which something failed, and what the server still does on it."""
        if isinstance(error, NoAnswer) and connection.abandoned is not None and connection.abandoned.is_set():
            connection.deadline, connection.abandoned = time.monotonic() + 1, None
            import psycopg

            # By an older libpq, it would hold the interpreter for as long as the network does not answer.
            if psycopg.capabilities.has_cancel_safe():
                with contextlib.suppress(Exception):
                    connection.cancel_safe(timeout=1)
        connection.close()
        if getattr(error, "sqlstate", None) in ("42P01", "3F000"):  # the schema was taken away
            self._is_prepared = False
        if getattr(error, "sqlstate", None) is None or connection.broken:  # the others are as it is, most likely
            self.close()

    def close(self) -> None:
        """Closes those that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()


class PostgresJobStore(QueuedStore):
    """Jobs in a PostgreSQL database, which many webuis share, each with a store of this kind.

    One thread, the store's own, writes all that waits with one transaction. Another, the pulse, listens to what the
    others write, and says that this webui lives. Nothing needs a restart: a database that was away is asked again.

    A job belongs to the webui that runs it, its owner. A webui that was silent for `DEAD_AFTER` seconds is dead to the
    others, who take over its jobs. It may wake up again: so a `put` is written only where the job is still its own and
    has not ended, or has ended only because others took it for dead. Otherwise the Future ends with Superseded.
    All times are the database's.
    """

    PATIENCE = 2.0
    RECOVER_EVERY = 5.0
    FOLLOW_EVERY = 0.0  # `follow` waits itself
    PLACE = "The database"
    RETRY = 1.0
    WRITE_SECONDS = 10.0  # that a transaction may take
    READ_SECONDS = 5.0  # the same for a look at jobs
    SEARCH_SECONDS = 25.0  # the same for a look at all their prompts
    READERS = 8  # connections for looks at jobs, beside one to write and one to listen
    TRIES = 3  # of a transaction that met another one
    BEAT_EVERY = 5.0  # seconds from one sign of life to the next
    GAP = 15.0  # seconds without one of our own after which nobody is judged by his silence for DEAD_AFTER seconds
    LOOK_EVERY = 5.0  # seconds from one `follow` that cannot tell what has changed to the next
    FOLLOW_SECONDS = 0.5  # that `follow` waits for news
    WORDS_AT_ONCE = 200  # in one message, which has at most 8,000 bytes
    UNTOLD_AT_MOST = 10_000  # words that wait to be told
    HOLD_SECONDS = 3  # that a parked job is held for the webui that is about to start it
    GLANCE_SECONDS = 6.0  # for which a webui goes on telling of a job at which another glances
    GLANCES_ASKED_EVERY = 2.0
    RECOVERED_AT_ONCE = 500
    JUDGED_AT_ONCE = 8
    WRITTEN_AT_ONCE = 1000
    is_shared = True
    is_ready = True
    progress = 0

    def __init__(self, url: str):
        super().__init__()
        self._readers = Connections(url, self.owner, self.READERS)
        self._writer = Connections(url, self.owner, is_durable=True)
        self._listeners = Connections(url, self.owner)
        self._clock: Optional[float] = None  # what is to be added to time.monotonic()
        self._beaten = (-math.inf, -math.inf)  # when the last sign of life was given, by both clocks of this machine
        self._beat_is_due = True  # whatever these say
        self._steady_since = math.inf  # when the first one was given after a gap, by time.monotonic()
        self._beating = threading.Lock()  # guards these three, and keeps the dead from giving a sign of life
        self._news_came = threading.Condition()  # guards these four
        self._news: Dict[str, bool] = {}  # see `follow`
        self._is_unsure = True  # something may have been missed
        self._look_at = -math.inf  # when the next `follow` is to say so, by time.monotonic()
        self._glanced_at: Dict[str, Tuple[float, bool]] = {}  # jobs, until when, and whether with previews
        self._asked: Dict[str, Tuple[float, bool]] = {}  # the same for jobs of others: when that was asked for
        self._recovering: Optional[Future] = None
        self._recovery = Threads(1, "recover")
        self._images = ""  # see `announce`
        self._channel = ""  # of NOTIFY, once it is known
        self._untold: List[str] = []  # what the others are to hear, see `_hear`
        self._doubtful: Dict[str, float] = {}  # new jobs that may have been written after all: from when on to remove
        self._thread.start()
        self._pulse = threading.Thread(target=self._listen, name="job-tracker-pulse", daemon=True)
        self._pulse.start()

    # For any thread

    def now(self) -> float:
        clock = self._clock
        return time.time() if clock is None else clock + time.monotonic()

    def get(self, job_id: str) -> Optional[Job]:
        """A job, None if there is none. Raises StoreError."""
        return self.get_many([job_id]).get(job_id)

    def get_many(self, ids: Iterable[str]) -> Dict[str, Job]:
        """Those of some jobs that are there, by ID. Raises StoreError."""
        pending, found, asked = self._pending_now(), {}, []
        for job_id in filter(ID_FORM.match, ids):
            if job_id not in pending:
                asked.append(job_id)
            elif pending[job_id].shown is not None:
                found[job_id] = pending[job_id].shown
        if asked:
            wanted = set(asked)
            for job in self._jobs("WHERE folded = ANY(%s::bigint[])", (id_numbers(asked),)):
                if job.id in wanted:
                    found[job.id] = job
        return found

    def with_key(self, key: str) -> Optional[Job]:
        """The latest job with an idempotency key, None if there is none. Raises StoreError."""
        where = "WHERE key = %s ORDER BY status = 'Failed', number DESC LIMIT 1"
        before = self._pending_now()
        for job in self._jobs(where, (column_text(key),)):
            pending = {**before, **self._pending_now()}
            return pending[job.id].shown if job.id in pending else job
        return None

    def query(
        self, filter_: Filter, limit: int, cursor: Optional[str] = None, skip: int = 0, abandoned: Abandoned = None
    ) -> Page:
        """The newest jobs that match: at most `limit`, without the first `skip`, or those that come after a page.

        Ends early, with none, once `abandoned` is set. Raises StoreError, InvalidCursor.
        """
        conditions, values = self._conditions(filter_)
        if filter_.q and without_surrogates(filter_.q) != filter_.q:  # no prompt that is kept has half a character
            conditions.append("false")
        if cursor is not None:
            form = re.match(r"([0-9]{1,12})-([0-9]{1,18})\Z", cursor)
            if form is None:
                raise InvalidCursor("it must come from a page before")
            conditions.append("(timestamp, number) < (%s, %s)")
            values.extend(map(int, form.groups()))
        seconds = self.SEARCH_SECONDS if filter_.q else self.READ_SECONDS
        statement = (
            f"SELECT record, timestamp, number FROM job_tracker_jobs WHERE {' AND '.join(conditions) or 'true'} "
            "ORDER BY timestamp DESC, number DESC LIMIT %s OFFSET %s"
        )
        before = self._pending_now()
        try:
            rows = self._read(statement, (*values, limit + 1, skip), seconds, abandoned)
        except StoreError:
            if abandoned is not None and abandoned.is_set():
                return Page([], None)
            raise
        pending, jobs = {**before, **self._pending_now()}, []
        for job in self._understood(record for record, _, _ in rows[:limit]):
            shown = pending[job.id].shown if job.id in pending else job
            if shown is not None and (shown is job or filter_.fits(shown)):
                jobs.append(shown)
        return Page(jobs, "-".join(map(str, rows[limit - 1][1:])) if len(rows) > limit else None)

    @staticmethod
    def _conditions(filter_: Filter) -> Tuple[List[str], List[Any]]:
        """A filter in SQL."""
        wanted = {
            "ip = %s": column_text(filter_.ip),
            "status = %s": filter_.status,
            "type = %s": filter_.type,
            # Times of jobs are whole, and an index of those is of no use for others.
            "timestamp > %s": None if filter_.after is None else math.floor(min(max(filter_.after, -1), MAX_TIMESTAMP)),
            "timestamp < %s": None if filter_.before is None else math.ceil(min(max(filter_.before, 0), MAX_TIMESTAMP)),
            "label = %s": column_text(filter_.label),
            "prompt LIKE %s": like_pattern(filter_.q) if filter_.q else None,
        }
        known = {condition: value for condition, value in wanted.items() if value is not None}
        return list(known), list(known.values())

    def totals(self) -> Dict[str, Tuple[int, int]]:
        """By status, the number of jobs and the bytes of their files. Raises StoreError."""
        pending, totals = self._pending_now(), dict.fromkeys(STATUSES, (0, 0))

        def add(status: str, count: int, size: int) -> None:
            known, known_size = totals[status]
            totals[status] = known + count, known_size + size

        statement = (
            "SELECT status, sum(jobs)::bigint, sum(bytes)::bigint, '' FROM job_tracker_counts GROUP BY status "
            "UNION ALL SELECT status, -1, -bytes, id FROM job_tracker_jobs WHERE folded = ANY(%s::bigint[])"
        )
        for status, count, size, job_id in self._read(statement, (id_numbers(pending),)):
            if not job_id or job_id in pending:
                add(status, count, size)
            shown = pending[job_id].shown if job_id in pending else None
            if shown is not None:
                add(shown.status, 1, shown.bytes)
        return totals

    def oldest_pending(self) -> Optional[Job]:
        """The Pending job that was accepted first, None if none is Pending. Raises StoreError."""
        where = "WHERE status = 'Pending' AND NOT folded = ANY(%s::bigint[]) ORDER BY timestamp, number LIMIT 1"
        return next(self._jobs(where, (self._changed_to(lambda job: job.status != PENDING),)), None)

    def _changed_to(self, condition: Callable[[Job], bool]) -> List[int]:
        """The numbers of jobs that are gone, or such by a change that is not written yet."""
        pending = self._pending_now().items()
        return [id_number(one) for one, change in pending if change.shown is None or condition(change.shown)]

    def due_webhooks(self, before: float, count: int, after: float = -1.0) -> List[Job]:
        """Jobs whose webhooks are due between two times (Unix seconds, exclusive), in that order, at most `count`.

        Without those of which a change is not written yet. Raises StoreError.
        """
        pending = self._pending_now()
        jobs = list(self._jobs("WHERE due > %s AND due < %s ORDER BY due LIMIT %s", (after, before, count)))
        pending.update(self._pending_now())
        return [job for job in jobs if job.id not in pending]

    def next_webhook(self) -> Optional[float]:
        """When the first of all webhooks is due (Unix seconds). Raises StoreError."""
        return self._read("SELECT min(due) FROM job_tracker_jobs WHERE due IS NOT NULL")[0][0]

    def announce(self, server: str, images: str = "") -> None:
        """Tells the others what this webui is called, and where it keeps images. Waits for nothing."""
        self._server = server.encode(errors="replace").decode().replace("\0", "?")
        self._images = images
        self._beat_is_due = True

    def has_other_images(self) -> bool:
        """Whether another webui that lives keeps its images elsewhere: what is not here may be there."""
        where = f"server <> '' AND images <> %(images)s AND NOT {SILENT}"
        statement = f"SELECT EXISTS (SELECT FROM job_tracker_webuis WHERE {where})"
        return self._read(statement, {"images": self._images, "seconds": DEAD_AFTER})[0][0]

    def servers(self) -> List[str]:
        """What the webuis are called that live now. Raises StoreError."""
        statement = f"SELECT server FROM job_tracker_webuis WHERE NOT {SILENT}"
        found = {server for (server,) in self._read(statement, {"seconds": DEAD_AFTER})}
        return sorted({*found, self._server} - {""})

    def oldest_parked(self, hold: bool = False, without: Collection[str] = ()) -> Optional[Job]:
        """The parked job that was accepted first, None if none is parked. Raises StoreError.

        `without` has the IDs of jobs that are passed over. With `hold`, it is kept for a moment from being found by
        other webuis: the caller is about to start it. Who starts it is decided only then, as with any change.
        """
        free = (
            "parked AND (held_until IS NULL OR held_by = %(owner)s OR held_until NOT BETWEEN clock_timestamp() "
            "AND clock_timestamp() + make_interval(secs => %(seconds)s)) "
            "AND NOT folded = ANY(%(without)s::bigint[]) ORDER BY timestamp, number LIMIT 1"
        )
        passed_over = [*id_numbers(without), *self._changed_to(lambda job: not job.parked)]
        values = {"owner": self.owner, "without": passed_over, "seconds": self.HOLD_SECONDS}
        if not hold:
            return next(self._jobs(f"WHERE {free}", values), None)
        statement = (
            "UPDATE job_tracker_jobs SET held_by = %(owner)s, "
            "held_until = clock_timestamp() + make_interval(secs => %(seconds)s) WHERE folded = "
            f"(SELECT folded FROM job_tracker_jobs WHERE {free} FOR UPDATE SKIP LOCKED) RETURNING record"
        )
        return next(self._understood(record for (record,) in self._read(statement, values)), None)

    def queue_places(self, ids: Iterable[str]) -> Dict[str, int]:
        """For each of some parked jobs, how many of these were accepted before it. Raises StoreError."""
        # Each from the one before it on, so that a page of a long queue is counted once.
        statement = (
            "WITH wanted AS (SELECT id, timestamp, number, lag(timestamp) OVER accepted AS after_time, "
            "lag(number) OVER accepted AS after_number FROM job_tracker_jobs "
            "WHERE folded = ANY(%s::bigint[]) AND parked "
            "WINDOW accepted AS (ORDER BY timestamp, number)), "
            "counted AS (SELECT id, timestamp, number, (SELECT count(*) FROM job_tracker_jobs AS others WHERE parked "
            "AND (others.timestamp, others.number) >= (coalesce(after_time, -1), coalesce(after_number, 0)) "
            "AND (others.timestamp, others.number) < (wanted.timestamp, wanted.number)) AS between_them FROM wanted) "
            "SELECT id, sum(between_them) OVER (ORDER BY timestamp, number)::bigint FROM counted"
        )
        return dict(self._read(statement, (id_numbers(ids),)))

    def oldest_ended(self, size: int, limit: int) -> List[Job]:
        """The oldest ended jobs, in order of acceptance: as many as it takes to have files of `size` bytes.

        At most `limit`, and never the newest one. Raises StoreError.
        """
        order = "WHERE status IN ('Completed', 'Failed') ORDER BY timestamp, number LIMIT %s"
        found: List[Job] = []
        for job in list(self._jobs(order, (limit + 1,)))[:-1]:
            if size <= 0:
                break
            found.append(job)
            size -= job.bytes
        return found

    def expired(self, before: float, after: Optional[float] = None) -> List[str]:
        """IDs of ended jobs accepted between two times (Unix seconds, exclusive), oldest first. Raises StoreError."""
        conditions, values = self._conditions(Filter(before=before, after=after))
        where = " AND ".join(["status IN ('Completed', 'Failed')", *conditions])
        statement = f"SELECT id FROM job_tracker_jobs WHERE {where} ORDER BY timestamp, number"
        return [job_id for (job_id,) in self._read(statement, values, self.SEARCH_SECONDS)]

    def quarantined_ids(self) -> Optional[Set[str]]:
        """None are: a database does not damage a record, and what cannot be understood stays where it is."""
        return set()

    @contextlib.contextmanager
    def purging(self) -> Iterator[bool]:
        """Around a purge, of which there is one at a time among all who share the store.

        False if another is under way. Raises StoreError.
        """
        lock = "hashtext('job_tracker purge ' || current_schema())"
        connection = self._readers.open()  # the lock is its own, and goes with it
        try:
            connection.deadline = time.monotonic() + self.READ_SECONDS
            try:
                is_free = connection.execute(f"SELECT pg_try_advisory_lock({lock})").fetchone()[0]
            except Exception as error:
                raise self._readers.error(error) from error
            yield is_free
        finally:
            connection.close()

    # Changes of others

    def follow(self) -> Optional[Dict[str, bool]]:
        """The IDs of jobs that were changed since the last call, by whatever process. Waits a moment for them.

        With each, whether its owner is asked to cancel it. None if it cannot be told what was changed. One thread may
        call this, again and again.
        """
        with self._news_came:
            self._news_came.wait_for(lambda: self._news or self._is_unsure, self.FOLLOW_SECONDS)
            news, self._news = self._news, {}
            is_unsure, self._is_unsure = self._is_unsure, False
        return None if is_unsure else news

    def glances(self, jobs: Sequence[Job], with_previews: bool = False) -> Dict[str, Glance]:
        """What other processes last said of jobs that run there, by ID. Asks them to go on doing so for some seconds.

        Without those of which they have said nothing. Raises StoreError.
        """
        now, asked = time.monotonic(), []
        with self._news_came:
            self._asked = {one: when for one, when in self._asked.items() if now - when[0] < self.GLANCES_ASKED_EVERY}
            for job in jobs:
                _, for_preview = self._asked.get(job.id, (0.0, False))
                if job.owner and (job.id not in self._asked or (with_previews and not for_preview)):
                    self._asked[job.id] = now, with_previews
                    asked.append(f"{job.owner}?{job.id}{'+' if with_previews else ''}")
        if asked:
            with contextlib.suppress(StoreError), self._readers.use(self.PATIENCE) as connection:
                self._tell(connection, asked)
        preview = "preview" if with_previews else "''::bytea"
        statement = (
            f"SELECT id, progress, eta, queue_position, {preview}, preview_number, media_type "
            "FROM job_tracker_glances WHERE id = ANY(%s) AND said > clock_timestamp() - make_interval(secs => %s)"
        )
        rows = self._read(statement, ([job.id for job in jobs], self.GLANCE_SECONDS / 2))
        return {row[0]: Glance(*row[1:4], bytes(row[4]), *row[5:]) for row in rows}

    def glanced_at(self) -> Dict[str, bool]:
        """The IDs of this process's own jobs at which others glance now, with whether they want previews, too."""
        with self._news_came:
            now = time.monotonic()
            self._glanced_at = {one: until for one, until in self._glanced_at.items() if until[0] > now}
            return {job_id: with_preview for job_id, (_, with_preview) in self._glanced_at.items()}

    def show(self, glances: Dict[str, Glance]) -> None:
        """Says what they glance at. Waits for nothing but the database, and does not raise.

        Without a picture, the last one stays.
        """
        statement = (
            "INSERT INTO job_tracker_glances AS known VALUES (%s, %s, %s, %s, %s, %s, %s, clock_timestamp()) "
            "ON CONFLICT (id) DO UPDATE SET progress = excluded.progress, eta = excluded.eta, "
            "queue_position = excluded.queue_position, said = excluded.said, "
            + ", ".join(
                f"{name} = CASE WHEN excluded.preview = '' THEN known.{name} ELSE excluded.{name} END"
                for name in ("preview", "preview_number", "media_type")
            )
        )
        with contextlib.suppress(StoreError), self._readers.use(self.PATIENCE) as connection:
            for job_id, glance in glances.items():
                connection.execute(statement, (job_id, *glance))

    # Dead webuis

    def recover(
        self, end: Callable[[Job], Job], ended: Callable[[Job], None] = lambda job: None, parked: bool = False
    ) -> Future:
        """Changes each unfinished job of a dead webui by `end`, once among all that try.

        That is without those that it has parked, unless `parked` is set. The Future ends when that is done, or with
        StoreError. `end` may raise StoreError for a job that cannot be judged now: it stays as it is. It may wait for
        the disk or a bucket, for it is called while nothing is held, and in several threads. `ended` is called with
        each job that was changed so, once that is written, and is not to wait for anything.
        """
        with self._work:
            if self._recovering is None or self._recovering.done():
                try:
                    self._recovering = self._recovery.submit(self._end_left, end, ended, parked)
                except StoreError as error:
                    return failed_future(error)
            return self._recovering

    def _end_left(self, end: Callable[[Job], Job], ended: Callable[[Job], None], parked: bool) -> None:
        # After a pause of ours, or of the database, or a leap of its clock, all may seem silent who only had nobody to
        # tell. A look may come before the sign of life that notices any of these.
        now = time.monotonic()
        is_steady = now - self._beaten[0] < self.GAP and now - self._steady_since >= DEAD_AFTER
        has_leapt = "abs(extract(epoch FROM clock_timestamp())::double precision - %(now)s) > %(gap)s"
        silent = f"({SILENT} AND NOT {has_leapt})" if is_steady else "false"
        lives = f"SELECT FROM job_tracker_webuis AS webuis WHERE webuis.owner = jobs.owner AND NOT {silent}"
        values = {"seconds": DEAD_AFTER, "owner": self.owner, "now": self.now(), "gap": self.GAP}
        where = (
            f"AND owner IS DISTINCT FROM %(owner)s AND NOT EXISTS ({lives}) "
            f"ORDER BY timestamp, number LIMIT {self.RECOVERED_AT_ONCE}"
        )
        # Each of the two has an index. By that of both, all that are parked would be looked at, or all that have ended.
        kinds = ["status IN ('Pending', 'Processing') AND NOT parked"] + ["parked"] * parked
        left = [job for kind in kinds for job in self._jobs(f"AS jobs WHERE {kind} {where}", values)]
        after, failure = self._judged(left, end)
        self._report("completed by what lies in images/", failure and (failure.__cause__ or failure))
        if after:
            known = {job.id: job for job in left}
            changing = self.change(list(after), lambda job: after[job.id] if job == known[job.id] else None)
            changed = changing.result()
            if changed:
                log_left_behind(changed)
            for job in changed:
                ended(job)
        if is_steady:
            self._forget_dead(values)

    def _judged(self, left: List[Job], end: Callable[[Job], Job]) -> Tuple[Dict[str, Job], Optional[StoreError]]:
        """What becomes of jobs, by ID, without those that cannot be judged now, and why these cannot."""
        after: Dict[str, Job] = {}
        failures: List[StoreError] = []

        def judge(job: Job) -> None:
            try:
                after[job.id] = end(job)
            except StoreError as error:  # it is temporary: it is tried again at the next look
                failures.append(error)

        if left:  # at once, for a bucket takes long for each
            with ThreadPoolExecutor(self.JUDGED_AT_ONCE, "job-tracker-judge") as threads:
                list(threads.map(judge, left))
        return after, failures[-1] if failures else None

    def _forget_dead(self, values: Dict[str, Any]) -> None:
        """Removes the rows of webuis that are dead and have left nothing. What they counted stays."""
        forget = (
            f"WITH gone AS (DELETE FROM job_tracker_webuis AS webuis WHERE {SILENT} AND owner <> %(owner)s "
            "RETURNING owner), "
            "counted AS (DELETE FROM job_tracker_counts WHERE owner <> '' AND owner NOT IN (SELECT owner "
            "FROM job_tracker_webuis WHERE owner NOT IN (SELECT owner FROM gone)) RETURNING status, jobs, bytes), "
            "old AS (DELETE FROM job_tracker_glances WHERE said < clock_timestamp() - interval '1 minute') "
            "INSERT INTO job_tracker_counts AS counts (owner, status, jobs, bytes) "
            "SELECT '', status, sum(jobs), sum(bytes) FROM counted GROUP BY status "
            "ON CONFLICT (owner, status) DO UPDATE SET jobs = counts.jobs + excluded.jobs, "
            "bytes = counts.bytes + excluded.bytes"
        )
        with self._readers.use(self.READ_SECONDS) as connection:
            connection.execute(forget, values)

    # Looks at the database

    def _read(
        self, statement: str, values: Any = (), seconds: Optional[float] = None, abandoned: Abandoned = None
    ) -> List[Tuple[Any, ...]]:
        """The rows that a statement gives. Raises StoreError."""

        def read() -> List[Tuple[Any, ...]]:
            with self._readers.use(seconds or self.READ_SECONDS, abandoned) as connection:
                return connection.execute(statement, values).fetchall()

        try:
            return read()
        except StoreError as error:
            if not is_lost(error.__cause__):
                raise
        return read()  # the server may have been restarted since the connection's last use

    def _jobs(self, where: str, values: Any = ()) -> Iterator[Job]:
        """Raises StoreError."""
        return self._understood(
            record for (record,) in self._read(f"SELECT record FROM job_tracker_jobs {where}", values)
        )

    def _understood(self, records: Iterable[str]) -> Iterator[Job]:
        """Jobs from their records. What is none is passed over: it stays where it is, and the log says so."""
        for record in records:
            try:
                yield job_from_record(json.loads(record))
            except (ValueError, RecursionError) as error:
                self._report("understood in one row", error)

    # The store's thread

    def _run(self) -> None:
        while not self._closed:
            with self._work:
                self._is_busy = False
                self._work.notify_all()
                is_late = self._retry or self._lasting or self._doubtful
                self._work.wait_for(self._has_work, max(0, self._retry_at - time.monotonic()) if is_late else None)
                self._is_busy = True
            try:
                self._write_waiting()
                self._remove_doubtful()
                with contextlib.suppress(StoreError):  # it is logged where more depends on it
                    self._tell_untold()
                    self._find_spare_ids()
            except Exception:  # a bug of ours. All callers wait for this thread, so it goes on
                log.exception("The store failed")
        for change in self._retry:
            if not change.written.done():
                change.written.set_exception(StoreError("the store is closed"))
        with contextlib.suppress(StoreError), self._beating, self._writer.use(self.PATIENCE) as connection:
            connection.execute("DELETE FROM job_tracker_webuis WHERE owner = %s", (self.owner,))
            self._tell(connection, [""])  # so that the pulse ends at once
        self._pulse.join(self.PATIENCE)
        self._recovery.shutdown(wait=False)
        self._writer.close()
        self._readers.close()

    def _store_changes(self, jobs: Dict[str, Optional[Job]], new: Set[str]) -> Dict[str, StoreError]:
        try:
            refused = self._write_rows(jobs, new)
        except StoreError as error:
            if error.temporary:
                raise
            refused = {next(iter(jobs)): error} if len(jobs) == 1 else self._store_one_by_one(jobs, new)
        self._forget_pending(jobs)
        return refused

    def _store_one_by_one(self, jobs: Dict[str, Optional[Job]], new: Set[str]) -> Dict[str, StoreError]:
        """After the database has refused one of them."""
        refused: Dict[str, StoreError] = {}
        try:
            for job_id, job in jobs.items():
                refused.update(self._store_changes({job_id: job}, new))
        except StoreError as error:  # those before are written
            raise NotUndone from error
        return refused

    def _write_rows(self, jobs: Dict[str, Optional[Job]], new: Set[str]) -> Dict[str, StoreError]:
        """Writes jobs with one transaction. Returns those that are refused, with why. Raises StoreError, NotUndone."""
        added = {job_id: job for job_id, job in jobs.items() if job is not None and job_id in new}
        changed = {job_id: job for job_id, job in jobs.items() if job is not None and job_id not in new}
        removed = [job_id for job_id, job in jobs.items() if job is None]
        refused: Dict[str, StoreError] = {}

        def write(connection: Any) -> None:
            refused.clear()
            written = set(removed)
            if removed:
                connection.execute("DELETE FROM job_tracker_jobs WHERE folded = ANY(%s)", (id_numbers(removed),))
            for jobs_at_once in self._in_parts(added.values()):
                written.update(self._write_part(connection, add_jobs, jobs_at_once))
            for jobs_at_once in self._in_parts(changed.values()):
                written.update(self._write_part(connection, change_own_jobs, jobs_at_once, self.owner))
            refused.update(
                self._why_refused(connection, {one: job for one, job in added.items() if one not in written})
            )
            gone = "another webui has taken over the job, or it has ended"
            refused.update((one, Superseded(gone)) for one in changed if one not in written)

        self._transact(write, is_single=len(jobs) == 1, is_repeatable=True)
        told = (job for one, job in jobs.items() if job is not None and one not in refused)
        self._note_untold([*removed, *(job.id for job in told if job.ended or job.parked)])
        return refused

    def _in_parts(self, jobs: Collection[Job]) -> Iterator[List[Job]]:
        """A statement has at most 65,535 values."""
        rest = list(jobs)
        for start in range(0, len(rest), self.WRITTEN_AT_ONCE):
            yield rest[start : start + self.WRITTEN_AT_ONCE]

    @staticmethod
    def _write_part(connection: Any, statement: Callable[[int], str], jobs: List[Job], *more: Any) -> List[str]:
        """Returns what the statement does: IDs of those that it has written."""
        values = itertools.chain.from_iterable(map(row_of, jobs))
        done = connection.execute(statement(len(jobs)), (*values, *more))
        return [job_id for (job_id,) in done] if done.description else []

    @staticmethod
    def _why_refused(connection: Any, jobs: Dict[str, Job]) -> Dict[str, StoreError]:
        """Why new jobs could not be added: their keys, or their IDs, are those of others, or they are there already."""
        if not jobs:
            return {}
        statement = "SELECT record FROM job_tracker_jobs WHERE folded = ANY(%s)"
        there = {record for (record,) in connection.execute(statement, (id_numbers(jobs),))}
        jobs = {job_id: job for job_id, job in jobs.items() if record_of(job).decode() not in there}
        keys = [column_text(job.key) for job in jobs.values() if job.key is not None]
        statement = "SELECT key, id, record FROM job_tracker_jobs WHERE key = ANY(%s) AND status <> 'Failed'"
        first = {key: (job_id, json.loads(record)) for key, job_id, record in connection.execute(statement, (keys,))}
        refused: Dict[str, StoreError] = {}
        for job in jobs.values():
            job_id, record = first.get(column_text(job.key), ("", {}))
            taken = StoreError("its ID, or its key, was taken in the same moment", temporary=True)
            refused[job.id] = KeyTaken(job_id, record.get("digest") or "") if job_id else taken
        return refused

    def _store_decision(self, decision: Decision, changed: Dict[str, Job]) -> None:
        before: Dict[str, Job] = {}

        def decide(connection: Any) -> None:
            before.clear()
            changed.clear()
            statement = (
                "SELECT record FROM job_tracker_jobs WHERE folded = ANY(%s::bigint[]) ORDER BY number FOR UPDATE"
            )
            rows = connection.execute(statement, (id_numbers(decision.ids),)).fetchall()
            for job in self._understood(record for (record,) in rows):
                after = decision.decide(job) if job.id in decision.ids else None
                if after is not None:
                    before[job.id], changed[job.id] = job, after
            for jobs_at_once in self._in_parts(changed.values()):
                self._write_part(connection, change_jobs, jobs_at_once)

        try:
            self._transact(decide)
        except NotUndone:
            self._lasting.append(decision_to_undo(before.copy(), changed.copy()))
            raise
        self._note_untold(f"{job.id}!" if job.cancel_wanted and not job.ended else job.id for job in changed.values())

    def _transact(self, work: Callable[[Any], None], is_single: bool = False, is_repeatable: bool = False) -> None:
        """Does work within one transaction, or as a statement of its own. Raises StoreError.

        Work that is repeatable may be done twice: the second time changes nothing, and comes to the same.

        Raises NotUndone if nobody knows whether it was committed: `StoreError` is then its cause.
        """
        if (
            time.monotonic() - self._beaten[0] > 2 * self.BEAT_EVERY
            or time.time() - self._beaten[1] > 2 * self.BEAT_EVERY
        ):
            with self._writer.use(self.PATIENCE) as connection:  # nobody is to take us for dead who sees this
                self._beat(connection)
        may_be_done = False
        for tries_left in range(self.TRIES - 1, -1, -1):
            is_committing = False
            try:
                with self._writer.use(self.WRITE_SECONDS) as connection:
                    is_committing = is_single
                    with contextlib.nullcontext() if is_single else connection.transaction():
                        work(connection)
                        is_committing = True
                return
            except StoreError as error:
                is_lost_now = is_lost(error.__cause__)
                may_be_done = may_be_done or (is_committing and (is_lost_now or isinstance(error.__cause__, NoAnswer)))
                has_met_another = getattr(error.__cause__, "sqlstate", None) in ("40001", "40P01")
                # The server may have been restarted since the connection's last use.
                is_worth = has_met_another or (is_lost_now and (is_repeatable or not may_be_done))
                if not (is_worth and tries_left):
                    if may_be_done:
                        raise NotUndone from error
                    raise

    def _undo_new(self, change: Change) -> None:
        """They are taken away as soon as the database answers, and once more when it has given up what it was asked."""
        until = time.monotonic() + Connections.SERVER_SECONDS + self.WRITE_SECONDS
        self._doubtful.update(dict.fromkeys(change.jobs, until))

    def _remove_doubtful(self) -> None:
        if not self._doubtful or time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + self.RETRY
        # By its owner and status: another webui may have begun to generate one that was parked.
        remove = "DELETE FROM job_tracker_jobs WHERE folded = ANY(%s) AND owner = %s AND status = 'Pending'"
        with contextlib.suppress(StoreError), self._writer.use(self.WRITE_SECONDS) as connection:
            connection.execute(remove, (id_numbers(self._doubtful), self.owner))
            settled = [job_id for job_id, until in self._doubtful.items() if time.monotonic() > until]
            with self._lock:
                for job_id in settled:
                    del self._doubtful[job_id]
                    self._pending.pop(job_id, None)

    def _find_spare_ids(self) -> None:
        if len(self._spare_ids) > self.SPARE_IDS // 2 or self.trouble:
            return
        made = {id_number(job_id): job_id for job_id in (new_id() for _ in range(self.SPARE_IDS))}
        statement = "SELECT folded FROM job_tracker_jobs WHERE folded = ANY(%s)"
        taken = self._read(statement, (list(made),), self.PATIENCE)
        for (number,) in taken:
            del made[number]
        with self._lock:
            self._spare_ids.extend(made.values())

    # The pulse: signs of life, and news of others

    def _listen(self) -> None:
        connection: Any = None
        while not self._closed:
            try:
                if connection is None:
                    connection = self._listeners.open()
                    self._begin_to_listen(connection)
                connection.deadline = time.monotonic() + self.READ_SECONDS
                if self._beat_is_due or time.monotonic() - self._beaten[0] > self.BEAT_EVERY:
                    self._beat(connection)
                    if not (self._retry or self._lasting):
                        self.trouble = ""
                self._report("used", None)
                for notify in connection.notifies(timeout=self.FOLLOW_SECONDS):
                    self._hear(notify.payload)
                    if self._closed:
                        break
            except Exception as error:
                failure = self._listeners.error(error)
                self.trouble = str(failure)
                self._report("used", failure)
                if connection is not None:
                    connection.close()
                    connection = None
                with self._work:
                    self._work.wait_for(lambda: self._closed, Connections.MOMENT)
            self._look_if_due(is_deaf=connection is None)
        if connection is not None:
            connection.close()

    def _begin_to_listen(self, connection: Any) -> None:
        connection.deadline = time.monotonic() + self.READ_SECONDS
        name = "'job_tracker_' || left(md5(current_schema()), 16)"  # a channel is the whole database's
        (self._channel,) = connection.execute(f"SELECT {name}").fetchone()
        connection.execute(f"LISTEN {self._channel}")
        self._look_at = -math.inf

    def _look_if_due(self, is_deaf: bool) -> None:
        """Has `follow` say now and then that it cannot tell what has changed: a message may be lost."""
        if not is_deaf and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + self.LOOK_EVERY
            with self._news_came:
                self._is_unsure = True
                self._news_came.notify_all()

    def _beat(self, connection: Any) -> None:
        """Gives a sign of life, and learns the database's time."""
        statement = (
            "INSERT INTO job_tracker_webuis VALUES (%s, %s, %s, clock_timestamp()) "
            "ON CONFLICT (owner) DO UPDATE "
            "SET server = excluded.server, images = excluded.images, seen = excluded.seen "
            "RETURNING extract(epoch FROM clock_timestamp())::double precision, "
            "(SELECT coalesce(max(version), 0) FROM job_tracker_schema)"
        )
        with self._beating:
            if self._closed:
                return
            self._beat_is_due = False
            before = time.monotonic()
            seconds, version = connection.execute(statement, (self.owner, self._server, self._images)).fetchone()
            now = time.monotonic()
            if version > len(MIGRATIONS):  # a webui that was updated has taken it further
                for connections in (self._readers, self._writer, self._listeners):
                    connections.doubt_schema()
                Connections.check_version(version)
            clock, self._clock = self._clock, seconds - (before + now) / 2
            last, last_by_clock = self._beaten
            self._beaten = now, time.time()
            has_leapt = clock is None or abs(self._clock - clock) > self.GAP
            if has_leapt or now - last > self.GAP or self._beaten[1] - last_by_clock > self.GAP:
                self._steady_since = now

    def _note_untold(self, words: Iterable[str]) -> None:
        self._untold.extend(words)
        del self._untold[: -self.UNTOLD_AT_MOST]  # as when messages do not get through, though all else does

    def _tell_untold(self) -> None:
        if self._untold and self._channel:
            with self._readers.use(self.PATIENCE) as connection:
                untold, self._untold = self._untold, []  # what is not heard is looked for, see `follow`
                self._tell(connection, untold)

    def _tell(self, connection: Any, words: List[str]) -> None:
        """Tells all webuis. Apart from what it is about: a NOTIFY makes one commit wait for another."""
        for start in range(0, len(words), self.WORDS_AT_ONCE):
            payload = " ".join(words[start : start + self.WORDS_AT_ONCE])
            connection.execute("SELECT pg_notify(%s, %s)", (self._channel, payload))

    def _hear(self, payload: str) -> None:
        """A word is the ID of a job that was changed, with a mark if its owner is to cancel it; or it is a wish.

        That is of a webui that glances at a job: the job's owner, the ID, a mark if it wants previews.
        """
        with self._news_came:
            for word in payload.split():
                owner, is_wish, job_id = word.rpartition("?")
                if not is_wish:
                    self._news[word[:8]] = word.endswith("!") or self._news.get(word[:8], False)
                elif owner == self.owner:
                    _, with_preview = self._glanced_at.get(job_id[:8], (0.0, False))
                    until = time.monotonic() + self.GLANCE_SECONDS
                    self._glanced_at[job_id[:8]] = until, with_preview or job_id.endswith("+")
            self._news_came.notify_all()


class Bucket:
    """A bucket of S3, Google or Azure, for any thread, none of them the event loop's. Every call to it has a limit.

    While it cannot be reached, one caller at a time finds out whether it is back, and all others fail at once, so that
    it holds up one thread at most.
    """

    CONNECT = 2.0  # seconds
    QUICK = 2.0  # seconds that a call may take altogether
    PART = 5 << 20  # bytes of a file that go in one call; S3 takes no smaller parts
    # The same for one that moves so many bytes, and may be slow: 25 to 50 kB/s.
    PATIENCE = ((1 << 17, 5.0), (1 << 20, 20.0), (PART, 120.0))
    ASK_AGAIN = 2.0  # seconds after a failure, in which nobody asks
    FRESH = 1.0  # seconds after an answer, in which a call that may be long is made without a short one before
    SIGNED_FOR = timedelta(hours=1)

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._root = f"{parts.scheme}://{parts.netloc}"
        self.prefix = parts.path.strip("/")  # of all keys: obstore's own prefix is not in what it signs
        self._lock = threading.Lock()  # guards these four
        self._clients: Dict[float, Any] = {}  # by their limits in seconds
        self._failure: Optional[StoreError] = None  # while it is away
        self._ask_at = 0.0
        self._heard_at = -math.inf  # when it last answered
        self._sign_at = 0.0

    def call(self, work: Callable[[Any, Any], Any], seconds: float = QUICK) -> Any:
        """The result of `work`, which is given the package obstore and a client that has a limit for each request.

        Raises FileNotFoundError for what is not there, and a temporary StoreError for all else.
        """
        is_unsure = self._must_probe() or time.monotonic() - self._heard_at > self.FRESH
        if is_unsure and seconds > self.QUICK:  # a long call takes long to fail
            with contextlib.suppress(FileNotFoundError):
                self._try(lambda obstore, client: obstore.head(client, f"{self.prefix}/probe"), self.QUICK)
        return self._try(work, seconds)

    @classmethod
    def patience(cls, size: int) -> float:
        """The seconds that a call may take which moves so many bytes, while nobody waits for its end."""
        return next((seconds for limit, seconds in cls.PATIENCE if size <= limit), cls.PATIENCE[-1][1])

    def sign(self, key: str) -> Optional[str]:
        """A URL by which anybody may read an object, for an hour. None if there can be none. Asks nobody.

        With keys of the cloud's own machine, obstore fetches these when they are due.
        """
        if time.monotonic() < self._sign_at:
            return None
        try:
            obstore = import_driver("obstore", "obstore")
            return obstore.sign(self._client(obstore, self.QUICK), "GET", key, self.SIGNED_FOR)
        except Exception:  # whoever reads through this webui learns why
            self._sign_at = time.monotonic() + self.ASK_AGAIN
            return None

    def _must_probe(self) -> bool:
        """Whether this caller is the one that finds out. Raises StoreError if it is another."""
        with self._lock:
            if self._failure is None:
                return False
            now = time.monotonic()
            if now < self._ask_at:
                raise self._failure.again()
            self._ask_at = now + self.CONNECT + self.ASK_AGAIN
            return True

    def _try(self, work: Callable[[Any, Any], Any], seconds: float) -> Any:
        try:
            obstore = import_driver("obstore", "obstore")
            result = work(obstore, self._client(obstore, seconds))
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._fail(error) from None
            self._set_failure(None)
            raise
        except Exception as error:
            raise self._fail(error) from None
        self._set_failure(None)
        return result

    def _client(self, obstore: Any, seconds: float) -> Any:
        """One whose requests take no longer, each with one more try where the connection was refused or stale."""
        with self._lock:
            if seconds not in self._clients:
                importlib.import_module("obstore.store")
                backoff = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=0.1), "base": 2}
                self._clients[seconds] = obstore.store.from_url(
                    self._root,
                    client_options={
                        "allow_http": True,  # where the endpoint's URL says http
                        "connect_timeout": timedelta(seconds=self.CONNECT),
                        "timeout": timedelta(seconds=seconds),
                    },
                    retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=1), "backoff": backoff},
                )
            return self._clients[seconds]

    def _set_failure(self, failure: Optional[StoreError]) -> None:
        with self._lock:
            self._failure, now = failure, time.monotonic()
            self._ask_at = now + self.ASK_AGAIN
            if failure is None:
                self._heard_at = now

    def _fail(self, error: Exception) -> StoreError:
        """What to raise for a failure of a call. One that is not an answer keeps others from asking for a while."""
        failure = error if isinstance(error, StoreError) else self._failure_of(error)
        status = BUCKET_STATUS.search(str(error))
        self._set_failure(None if status and status.group(1)[0] == "4" else failure)
        return failure.again()

    @staticmethod
    def _failure_of(error: Exception) -> StoreError:
        """Why a call failed, in words without what obstore adds: a URL may be signed, and an answer name a key."""
        text = str(error)
        status, code = BUCKET_STATUS.search(text), BUCKET_CODE.search(text)
        if status:
            reason = f"the bucket says {status.group()}" + (f", {code.group(1)}" if code else "")
        elif "Timeout" in text or "TimedOut" in text:
            reason = "the bucket does not answer"
        elif "kind: " in text:
            reason = "the bucket cannot be reached"
        else:
            reason = f"the bucket cannot be used: {without_queries(text)}"
        failure = StoreError(reason, temporary=True)
        failure.details = f"{reason} ({type(error).__name__}: {without_queries(text)})"
        return failure


BUCKET_STATUS = re.compile(r"(?<=status code: )([1-5][0-9][0-9])[A-Za-z ]*")
BUCKET_CODE = re.compile(r"<Code>(\w{1,60})</Code>")


BUCKET_TYPES = {**MEDIA_TYPES, "txt": "text/plain; charset=utf-8", "json": "application/json"}


def without_queries(text: str) -> str:
    """The first line of an error's text, its URLs without what may be secret in them."""
    return re.sub(r"(://)[^/@\s]*@|\?\S*", r"\1", text.partition("\n")[0])[:300]


class ObjectImageStore(ImageStore):
    """The files of jobs in a bucket that many webuis share.

    What is stored goes to the folder first, safe from a power cut, and `publish` brings it to the bucket, a job's
    answer last: where that is, all is. A file is read in the folder if it lies there, otherwise in the bucket. What
    the bucket refuses or does not answer is a temporary StoreError, whatever it is: somebody mends that.

    In the bucket, the files of a job have a common prefix, so that they can be listed. Their names are as in a folder.
    """

    BLOCK = 5 * ImageStore.CHUNK  # bytes that are read at once beyond the first chunk
    CACHED = 1 << 24  # bytes of answers that are kept in memory, for lists
    FETCHED_AT_ONCE = 8  # answers, for a list
    LISTING = 20.0  # seconds in which a thousand objects are listed or removed
    ORPHAN_AGE = 7 * 86400.0  # a webui that was cut off from the records may be about to store one
    is_shared = True

    def __init__(self, folder: str, url: str):
        super().__init__(folder)
        self.place = url
        self.bucket = Bucket(url)
        self._lock = threading.Lock()  # guards these three
        self._published: Set[str] = set()  # files that are in the bucket, and in the folder, too
        self._answers: "OrderedDict[str, bytes]" = OrderedDict()  # the last that were read
        self._cached = 0  # bytes of these

    # Names

    def _key(self, name: str) -> str:
        day, _, file_name = name.partition("/")
        return "/".join(filter(None, (self.bucket.prefix, day, file_name[:8], file_name)))

    def _name(self, key: str) -> str:
        """The file's name. Empty for an object that is none of these files."""
        day, _, rest = key[len(self.bucket.prefix) :].strip("/").partition("/")
        name = f"{day}/{rest.rpartition('/')[2]}"
        return name if OWN_FILE_FORM.match(name) and self._key(name) == key else ""

    def _is_local(self, name: str) -> bool:
        return os.path.lexists(self._path(name))

    # Storing

    def save_request(self, job: Job, body: bytes) -> None:
        """Keeps the body of a job's request: in the bucket where the client is told so, otherwise in the folder."""
        if job.promised or job.parked:
            self._put(self.request_name(job), body, self.bucket.QUICK)
        else:
            super().save_request(job, body)

    def has_request(self, job: Job) -> bool:
        name = self.request_name(job)
        if self._size_in_bucket(name) is not None:
            return True
        if self._is_local(name):
            raise StoreError("its request is not in the bucket yet", temporary=True)
        return False

    def share_request(self, job: Job, in_haste: bool = False) -> bool:
        name = self.request_name(job)
        if not self._is_local(name):
            return self._size_in_bucket(name) is not None
        try:
            body = b"".join(super().read(name))
        except StoreError as error:
            if error.temporary:
                raise
            return False
        self._put(name, body, self.bucket.QUICK if in_haste else self.bucket.patience(len(body)))
        self.remove_local([name])
        return True

    def remove_request(self, job: Job) -> None:
        name = self.request_name(job)
        self._remove_files([name])
        with contextlib.suppress(StoreError, FileNotFoundError):  # the housekeeper finds it
            self.bucket.call(lambda obstore, client: obstore.delete(client, self._key(name)))

    def publish(self, job: Job) -> None:
        answer = self.answer_name(job)
        for name in sorted(self.counted_files_of(job._replace(has_request=False)), key=answer.__eq__):
            if name not in self._published:
                self._upload(name)
                with self._lock:
                    self._published.add(name)

    def _upload(self, name: str) -> None:
        if not self._is_local(name) and self._size_in_bucket(name) is not None:
            return  # a crash took the local file away, which goes after it was published
        with self._opened(name) as file, os.fdopen(os.dup(file), "rb") as stream:
            self._put_file(name, stream, os.fstat(file).st_size)

    def _put_file(self, name: str, file: BinaryIO, size: int) -> None:
        seconds, part = self.bucket.patience(size), self.bucket.PART
        if size <= part:
            self._put(name, file.read(), seconds)
        else:
            self._put(name, file, seconds, chunk_size=part, max_concurrency=2)

    def _put(self, name: str, content: Any, seconds: float, **options: Any) -> None:
        attributes = {"Content-Type": BUCKET_TYPES.get(name.rpartition(".")[2], OTHER_MEDIA_TYPE)}
        if isinstance(content, bytes):
            options["use_multipart"] = False
        key = self._key(name)
        self.bucket.call(
            lambda obstore, client: obstore.put(client, key, content, attributes=attributes, **options), seconds
        )

    @raising_store_error()
    def unpublished(self, job: Job) -> Optional[Job]:
        return self._as_saved(job, super()._sizes(job))

    def local_files(self, before: float = math.inf) -> Iterator[Tuple[str, str]]:
        return super().older_than(before)

    def remove_local(self, names: Iterable[str]) -> None:
        # Without its answer, what is left by a crash is not taken for whole.
        names = sorted(names, key=lambda name: not name.endswith(".json"))
        self._remove_files(names)
        with self._lock:
            self._published.difference_update(names)

    def _known_sizes(self, job: Job, names: List[str]) -> Dict[str, Optional[int]]:
        return dict(self._sizes(job))

    def _take(self, job: Job, name: str, chunks: Iterable[bytes]) -> None:
        data = b"".join(chunks)
        self._put_file(name, io.BytesIO(data), len(data))

    # Reading

    def _sizes(self, job: Job) -> Dict[str, int]:
        return self._list_job(f"{self.day_of(job)}/{job.id}")

    def _list_job(self, name: str) -> Dict[str, int]:
        """All files in the bucket of the job that a file is of, with their sizes in bytes. Raises StoreError."""
        prefix = self._key(name).rpartition("/")[0]

        def work(obstore: Any, client: Any) -> Dict[str, int]:
            return {self._name(found["path"]): found["size"] for page in obstore.list(client, prefix) for found in page}

        return self.bucket.call(work)

    def _size_in_bucket(self, name: str) -> Optional[int]:
        try:
            return self.bucket.call(lambda obstore, client: obstore.head(client, self._key(name))["size"])
        except FileNotFoundError:
            return None

    def size(self, name: str) -> Optional[int]:
        found = super().size(name) if self._is_local(name) else None
        return self._size_in_bucket(name) if found is None else found

    def image_sizes(self, job: Job) -> List[Optional[int]]:
        names = [image.name for image in job.images]
        sizes = {name: super(ObjectImageStore, self).size(name) for name in filter(self._is_local, names)}
        found = {} if len(sizes) == len(names) else self._sizes(job)
        return [found.get(name) if sizes.get(name) is None else sizes[name] for name in names]

    def url(self, name: str) -> Optional[str]:
        return None if self._is_local(name) else self.bucket.sign(self._key(name))

    def is_empty(self) -> bool:
        prefix = self.bucket.prefix or None
        return self.bucket.call(lambda obstore, client: not any(obstore.list(client, prefix, chunk_size=1)))

    def read(self, name: str, start: int = 0, end: Optional[int] = None) -> Iterator[bytes]:
        """A file's bytes, or a part of them, `CHUNK` at a time. Holds no connection between two of them."""
        if self._is_local(name):
            chunks = super().read(name, start, end)
            try:
                first = next(chunks, None)
            except StoreError:
                if self._is_local(name):
                    raise  # otherwise it has just been published
            else:
                if first is not None:
                    yield first
                    yield from chunks
                return
        yield from self._read_in_bucket(name, start, end)

    def _read_in_bucket(self, name: str, start: int, end: Optional[int]) -> Iterator[bytes]:
        is_answer = end is None and name.endswith(".json") and not name.endswith(".request.json")
        known = self._cached_answer(name) if is_answer else None
        if known is not None:
            yield known
            return
        length, seconds = self.CHUNK, self.bucket.QUICK
        while end is None or start < end:
            until = start + length if end is None else min(start + length, end)
            data, size = self._get(name, start, until, seconds)
            if is_answer and len(data) == size:
                self._cache_answer(name, data)
            end = size if end is None else end
            if len(data) < min(until, end) - start:
                raise self._damaged(name)
            for position in range(0, len(data), self.CHUNK):
                yield data[position : position + self.CHUNK]
            start += len(data)
            length, seconds = self.BLOCK, self.bucket.patience(self.BLOCK)

    def _get(self, name: str, start: int, end: int, seconds: float) -> Tuple[bytes, int]:
        """A part of a file in the bucket, and the size of all of it. Raises StoreError."""

        def work(obstore: Any, client: Any) -> Tuple[bytes, int]:
            try:
                found = obstore.get(client, self._key(name), options={"range": (start, end)})
                return bytes(found.bytes()), found.meta["size"]
            except obstore.exceptions.BaseError as error:
                status = BUCKET_STATUS.search(str(error))
                if status is None or status.group(1) != "416":
                    raise
                return b"", obstore.head(client, self._key(name))["size"]  # nothing is there, as in an empty file

        try:
            return self.bucket.call(work, seconds)
        except FileNotFoundError:
            raise StoreError.of(FileNotFoundError(errno.ENOENT, "it is not in the bucket", name)) from None

    def prepare(self, jobs: Iterable[Job]) -> None:
        """Has the brief answers of some jobs at hand: a bucket takes long for one after another."""
        names = [self.brief_answer_name(job) for job in jobs if job.status == COMPLETED]
        lacking = [name for name in names if self._cached_answer(name) is None and not self._is_local(name)]

        def fetch(name: str) -> None:
            with contextlib.suppress(StoreError):  # whoever needs it meets the same
                next(self._read_in_bucket(name, 0, None), None)

        if len(lacking) > 1:
            with ThreadPoolExecutor(self.FETCHED_AT_ONCE, "job-tracker-fetch") as threads:
                list(threads.map(fetch, lacking))

    def _cached_answer(self, name: str) -> Optional[bytes]:
        with self._lock:
            if name in self._answers:
                self._answers.move_to_end(name)
            return self._answers.get(name)

    def _cache_answer(self, name: str, data: bytes) -> None:
        with self._lock:
            self._cached += len(data) - len(self._answers.pop(name, b""))
            self._answers[name] = data
            while self._cached > self.CACHED:
                self._cached -= len(self._answers.popitem(last=False)[1])

    # Thumbnails

    @contextlib.contextmanager
    def _stream(self, name: str) -> Iterator[BinaryIO]:
        yield io.BytesIO(b"".join(self.read(name)))

    def _keep_thumbnail(self, job: Job, data: bytes) -> None:
        self._put(self.thumbnail_name(job), data, self.bucket.QUICK)

    # Removing

    def remove(self, names: Iterable[str]) -> int:
        """Removes files, here and in the bucket. Returns the bytes that it freed. Does not raise.

        What the bucket does not remove now is found there by the housekeeper.
        """
        by_job: Dict[str, Set[str]] = {}
        for name in names:
            by_job.setdefault(name[: name.index("/") + 9], set()).add(name)
        freed, keys = 0, []
        for wanted in by_job.values():
            self._forget(wanted)
            there = self._remove_files(wanted)
            with contextlib.suppress(StoreError):
                # Google and Azure refuse to remove what is not there.
                in_bucket = self._list_job(min(wanted))
                found = {name: size for name, size in in_bucket.items() if name in wanted}
                keys.extend(map(self._key, found))
                there = max(there, sum(found.values()))
            freed += there
        with contextlib.suppress(StoreError, FileNotFoundError):
            if keys:
                self.bucket.call(lambda obstore, client: obstore.delete(client, keys), self.LISTING)
        return freed

    def _forget(self, names: Set[str]) -> None:
        with self._lock:
            self._published.difference_update(names)
            self._cached -= sum(len(self._answers.pop(name, b"")) for name in names)

    def older_than(self, before: float) -> Iterator[Tuple[str, str]]:
        """All files in the bucket that last changed before a time, by the bucket's clock (Unix seconds)."""
        prefix = self.bucket.prefix or None
        pages = self.bucket.call(lambda obstore, client: obstore.list(client, prefix, chunk_size=1000), self.LISTING)
        while True:
            page = self.bucket.call(lambda obstore, client: next(pages, None))
            if page is None:
                return
            for found in page:
                name = self._name(found["path"])
                if name and found["last_modified"].timestamp() < before:
                    yield name[11:19], name


def open_stores(settings: Settings, check: Callable[[], None] = lambda: None) -> Tuple[QueuedStore, ImageStore]:
    """The stores that the settings name. `check` is for the files, see `JobStore`."""
    store: QueuedStore = (
        JobStore(settings.data_folder, check) if settings.store_url is None else PostgresJobStore(settings.store_url)
    )
    folder = os.path.join(settings.data_folder, "images")
    images = ObjectImageStore(folder, settings.images_url) if settings.images_url else ImageStore(folder)
    return store, images


def places_of(settings: Settings) -> str:
    """Where jobs and images are, for the log: without the name of a user and a password."""
    jobs = settings.data_folder
    if settings.store_url is not None:
        url = urlsplit(settings.store_url)  # of which the query may have a password, too
        jobs = f"the database {url.netloc.rpartition('@')[2]}{url.path}"
    images = settings.images_url or settings.data_folder
    return f"jobs are in {jobs}" + ("" if images == jobs else f", images in {images}")


# ------------------------------------------------------------------------------------------------------------------
# Predecessor: the jobs of API-Job-Tracker-SD-WebUI
# ------------------------------------------------------------------------------------------------------------------


class LegacyJob(NamedTuple):
    """An entry of the predecessor's jobs.json."""

    job: Job  # with the predecessor's ID, its whole prompt, and the time 0 if that cannot be understood
    paths: List[str]  # of the images, in the webui's output folder


class LegacyFile(NamedTuple):
    """The predecessor's jobs.json."""

    jobs: List[LegacyJob]  # in order of acceptance
    unreadable: int  # entries that are no jobs


LEGACY_ENTRY_START = re.compile(r'\{\s*"id"\s*:')
LEGACY_DECODER = json.JSONDecoder(parse_int=parse_int)
SEED = re.compile(r"\bSeed: (\d{1,100})")
NO_IMAGES = "No images of it were kept"


def is_ours(path: str) -> bool:
    """Whether a jobs.json is one of ours, for all that its first byte says. Raises OSError."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(1) == HEAD


def read_legacy_file(path: str) -> Optional[LegacyFile]:
    """Reads a file as the predecessor's jobs.json. None if it is something else, or is not there. Raises OSError."""
    if not os.path.isfile(path) or is_ours(path):
        return None
    with open(path, "rb") as file:
        text = file.read().decode("utf-8-sig", "replace").strip()
    if not text.startswith("["):
        return None
    entries, damaged = read_legacy_entries(text)
    jobs = [job for job in map(parse_legacy_job, entries) if job is not None]
    unreadable = damaged + len(entries) - len(jobs)
    return LegacyFile(jobs, unreadable) if jobs or not unreadable else None


def read_legacy_entries(text: str) -> Tuple[List[Any], int]:
    """The entries of a JSON array, and how many are lost at least, where it is damaged."""
    with contextlib.suppress(ValueError, RecursionError):  # then each entry is read by itself
        return LEGACY_DECODER.decode(text), 0
    entries, failed, position = [], 0, 0
    for match, end in with_reach(LEGACY_ENTRY_START.finditer(text), len(text)):
        if match.start() < position:
            continue
        try:
            entry, length = LEGACY_DECODER.raw_decode(text[match.start() : end])
            entries.append(entry)
            position = match.start() + length
        except (ValueError, RecursionError):
            failed += 1
    return entries, max(failed, 1)


def parse_legacy_job(entry: Any) -> Optional[LegacyJob]:
    """An entry as a job whose images are still to be copied, None if it is none.

    A field that cannot be understood does not cost the others.
    """
    if not isinstance(entry, dict) or "status" not in entry:
        return None
    job_id, prompt, ip, status = (entry.get(name) for name in ("id", "prompt", "ip", "status"))
    if not (isinstance(job_id, str) and job_id):
        return None
    paths = entry.get("output_paths") or entry.get("output_path") or []  # the latter is of its first version
    paths = [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str) and path]
    is_completed = str(status).casefold() == COMPLETED.casefold()
    if is_completed:
        error = "Its images are still to be copied" if paths else NO_IMAGES
    elif str(status).casefold() == FAILED.casefold():
        error = "The generation failed, and it was not kept why"
    else:
        error = LEFT_BEHIND
    job = Job(
        id=job_id,
        type=TYPES[0],  # the predecessor did not keep which
        status=COMPLETED if is_completed else FAILED,
        timestamp=legacy_time(entry.get("timestamp")) or 0,
        ip=without_surrogates(ip)[:IP_LIMIT] if isinstance(ip, str) else None,
        prompt=without_surrogates(prompt) if isinstance(prompt, str) else "",
        error=error,
    )
    return LegacyJob(job, paths)


def legacy_time(value: Any) -> Optional[int]:
    """A time in Unix seconds, from a number, its text or an ISO date. None for everything else."""
    for parse in (float, lambda text: datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()):
        # That is all that these raise for whatever stands in a file.
        with contextlib.suppress(TypeError, ValueError, OverflowError, AttributeError, OSError):
            seconds = int(parse(value))
            return seconds if 0 < seconds < MAX_TIMESTAMP else None
    return None


def assign_ids(old_ids: Iterable[str], known: Dict[int, str]) -> List[str]:
    """An ID for each of the predecessor's jobs: its own, where that is an ID of ours and differs from every other.

    `known` has the IDs in jobs.json by their number. An ID that is known already belongs to the same job, taken over
    before a crash: so the answer must be, and is, the same each time.
    """
    ids: Dict[int, str] = {}
    for old_id in old_ids:
        job_id, attempt = old_id, 0
        while not ID_FORM.match(job_id) or id_number(job_id) in ids or known.get(id_number(job_id), job_id) != job_id:
            digest = hashlib.sha256(f"{old_id} {attempt}".encode("utf-8", "surrogatepass")).digest()
            job_id = "".join(ID_ALPHABET[byte % len(ID_ALPHABET)] for byte in digest[:8])
            attempt += 1
        ids[id_number(job_id)] = job_id
    return list(ids.values())


def error_with_id(note: Optional[str], job_id: str, legacy: LegacyJob) -> Optional[str]:
    """What a job says of itself, with its old ID if it has got another."""
    renamed = "" if job_id == legacy.job.id else f"Its ID was {without_surrogates(legacy.job.id[:100])}"
    return ". ".join(filter(None, (note, renamed))) or None


def legacy_answer(legacy: LegacyJob, pictures: List[bytes]) -> Answer:
    """What the host may have answered, as far as the predecessor's entry and the images tell."""
    infotexts = [text for text in map(infotext_of, pictures) if text is not None]
    seeds = [int(match.group(1)) for match in map(SEED.search, infotexts) if match]
    info = {"prompt": legacy.job.prompt, **({"seed": seeds[0]} if seeds else {}), "infotexts": infotexts}
    rest = {"images": [], "parameters": {"prompt": legacy.job.prompt}, "info": json.dumps(info)}
    return Answer(list(map(base64.b64encode, pictures)), as_host_json(rest))


def infotext_of(image: bytes) -> Optional[str]:
    """The text that the host writes into a PNG, None if there is none."""
    with contextlib.suppress(Exception):  # Pillow raises much for a file that is cut or damaged
        text = PIL.Image.open(io.BytesIO(image), formats=["PNG"]).info.get("parameters")
        return text if isinstance(text, str) else None
    return None


class Predecessor:
    """Takes over what API-Job-Tracker-SD-WebUI kept: first its jobs, then, in a thread of its own, their images.

    The name of the predecessor's jobs.json says how far this has come, so that a crash at any moment costs nothing
    and the next start goes on from there: `jobs.json` is found, `.predecessor` is to be merged into our jobs.json,
    `.predecessor-listed` has been, and its images are being copied, `.predecessor-done` is only kept. No file of the
    predecessor is removed or changed.

    Of several processes on one folder, one merges and one copies.
    """

    FOUND, LISTED, DONE = "predecessor", "predecessor-listed", "predecessor-done"
    RETRY = 600.0  # seconds until images that could not be copied are tried again
    LOOK_EVERY = 5.0  # seconds between two tries of all else
    MIN_FREE = 1 << 30  # bytes that copies leave free on the disk, or a twentieth of a smaller one
    # What says that there is no such file. Everything else may be different later, as with a drive that is not ready.
    MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO)

    def __init__(self, extension_folder: str, data_folder: str):
        paths = (os.path.realpath(os.path.join(folder, "jobs.json")) for folder in (data_folder, extension_folder))
        self.paths = list(dict.fromkeys(paths))  # where the predecessor's file, or what has become of it, may be
        self.path = self.paths[0]  # ours
        # A1111 shortens the path of an image in its own folder: it starts there, or where the extensions' folder lies.
        self.bases = (os.curdir, os.path.dirname(os.path.dirname(os.path.realpath(extension_folder))))
        self._trouble = ""

    def is_unfinished(self) -> bool:
        """Whether something is still to be found, merged or copied. Raises OSError."""
        return any(map(self._find, self.paths)) or bool(self._files(self.FOUND) or self._files(self.LISTED))

    def refuse_to_open(self) -> None:
        """Raises OSError while jobs.json is the predecessor's: the store would take it for a damaged one of ours."""
        if read_legacy_file(self.path) is not None:
            raise OSError(errno.EBUSY, "The predecessor's jobs.json cannot be taken over yet", self.path)

    def _find(self, path: str) -> Optional[str]:
        """The file that the predecessor would read: jobs.json, or the copy beside it if a power cut cost it that."""
        if is_ours(path):
            return None
        if read_legacy_file(path) is not None:
            return path
        # Once it has been taken over, so has the copy.
        began = any(map(self._files, (self.FOUND, self.LISTED, self.DONE)))
        return f"{path}.bak" if not began and read_legacy_file(f"{path}.bak") is not None else None

    def _files(self, stage: str) -> List[Tuple[str, str]]:
        """The predecessor's files that have come to a stage, each with the path of the jobs.json that it was."""
        found = []
        for path in self.paths:
            name = glob.escape(f"{path}.{stage}")
            found += [(path, source) for source in glob.glob(name) + sorted(glob.glob(f"{name}-[0-9]*"))]
        return found

    @staticmethod
    def _rename(source: str, path: str, stage: str) -> None:
        """Gives the predecessor's file the name of its next stage."""
        os.rename(source, free_name(f"{path}.{stage}"))
        sync_folder(os.path.dirname(path))

    # The jobs

    def merge_jobs(self) -> None:
        """Merges the predecessor's jobs into jobs.json, before those that are there. Copies no image.

        Does not raise. What cannot be done now is done later, and until then nobody takes the predecessor's file for
        a damaged one of ours. To be called before the JobStore opens its file.
        """
        try:
            if not any(map(self._find, self.paths)) and not self._files(self.FOUND):
                return  # and so never waits for the lock
            with contextlib.closing(FileLock(self.path + ".lock", self.path)) as lock, lock:
                for path in self.paths:
                    source = self._find(path)
                    if source is not None:
                        self._rename(source, path, self.FOUND)
                for path, source in self._files(self.FOUND):
                    self._merge(path, source)
        except Exception as error:
            self._log_once(f"The predecessor's jobs cannot be taken over yet: {type(error).__name__}: {error}")

    def _merge(self, path: str, source: str) -> None:
        """Writes the jobs of the predecessor's file, if they are not there yet, before our own."""
        ours = self._read_ours()
        if ours.strip() and not (ours.startswith(EMPTY[:2]) and ours.endswith(TAIL)):
            raise ValueError("jobs.json is damaged, and must be mended first")
        legacy_file, ids, known = self._read(source, ours)
        lines = []
        timestamp = min(max(int(os.stat(source).st_mtime), 0), MAX_TIMESTAMP - 1)
        for legacy, job_id in zip(legacy_file.jobs, ids):
            timestamp = legacy.job.timestamp or timestamp  # that of the job before
            if id_number(job_id) not in known:
                error = error_with_id(legacy.job.error, job_id, legacy)
                prompt = legacy.job.prompt[:PROMPT_LIMIT]
                job = legacy.job._replace(id=job_id, timestamp=timestamp, prompt=prompt, error=error)
                lines.append(b'\n"%s": %s' % (job_id.encode(), record_of(job)))
            if job_id != legacy.job.id:
                log.warning("Job %r of the predecessor has got the ID %s", legacy.job.id[:100], job_id)
        if lines:
            rest = ours[len(HEAD) : -len(TAIL)]
            replace_file(self.path, HEAD + b",".join([*lines, rest] if rest else lines) + TAIL, like=source)
        self._rename(source, path, self.LISTED)
        log.info("Taken over from the predecessor: %d jobs, whose images are being copied", len(legacy_file.jobs))

    def _read_ours(self) -> bytes:
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            return file.read()
        return b""

    @staticmethod
    def _read(source: str, ours: bytes) -> Tuple[LegacyFile, List[str], Dict[int, str]]:
        """The predecessor's file, the IDs of its jobs, and those in our jobs.json by number, of removed jobs too."""
        legacy_file = read_legacy_file(source)
        if legacy_file is None:
            raise ValueError(f"{source} is not as it was")
        known = {id_number(job_id): job_id for job_id in (match.group(2).decode() for match in ENTRY.finditer(ours))}
        return legacy_file, assign_ids((legacy.job.id for legacy in legacy_file.jobs), known), known

    # Their images

    def copy_images(self, store: JobStore, images: ImageStore, stop: threading.Event) -> None:
        """Copies the images of all jobs of the predecessor. Returns when that is done, or `stop` is set."""
        while not stop.is_set():
            pause = self.LOOK_EVERY
            try:
                self.merge_jobs()
                with contextlib.closing(FileLock(f"{self.path}.{self.FOUND}.lock", self.path)) as lock:
                    if lock.try_acquire():
                        for path, source in self._files(self.LISTED):
                            self._copy_file(path, source, store, images, stop)
                if not self.is_unfinished():
                    with contextlib.suppress(OSError):
                        os.unlink(lock.path)
                    return
            except Exception as error:
                pause = self.RETRY
                if not stop.is_set():  # the store may be closed then
                    self._log_once(f"Images of the predecessor's jobs cannot be copied yet: {error}")
            stop.wait(pause)

    def _copy_file(self, path: str, source: str, store: JobStore, images: ImageStore, stop: threading.Event) -> None:
        """Copies the images of one file's jobs, newest first. Raises OSError if some cannot be copied now."""
        legacy_file, ids, _ = self._read(source, self._read_ours())
        failure: Optional[OSError] = None
        for legacy, job_id in zip(reversed(legacy_file.jobs), reversed(ids)):
            if stop.is_set():
                return
            began = time.monotonic()
            failure = self._copy_job(legacy, job_id, store, images) or failure
            stop.wait(2 * (time.monotonic() - began))  # generations, and a webui that starts, come first
        if failure is not None:
            raise failure
        self._rename(source, path, self.DONE)
        kept = [(job, legacy.paths) for job, legacy in zip(map(store.get, ids), legacy_file.jobs) if job is not None]
        copied = sum(len(job.images) for job, _ in kept)
        log.info(
            "The predecessor's jobs are complete: %d jobs, %d images, %s bytes; %d images were no longer on disk, "
            "%d entries could not be read",
            len(kept),
            copied,
            f"{sum(job.bytes for job, _ in kept):,}",
            sum(len(paths) for job, paths in kept if job.status == COMPLETED) - copied,
            legacy_file.unreadable,
        )

    def _copy_job(self, legacy: LegacyJob, job_id: str, store: JobStore, images: ImageStore) -> Optional[OSError]:
        """Copies the images of a job. Returns why they cannot be read now: the others need not wait for them.

        Raises OSError and StoreError if they cannot be written.
        """
        job = store.get(job_id)
        if job is None or job.status != COMPLETED or job.images or (job.bytes and not legacy.paths):
            return None
        try:
            found = list(filter(None, map(self._read_image, legacy.paths)))
        except OSError as error:
            note = error_with_id(f"Its images cannot be copied yet: {reason_of(error)}", job_id, legacy)
            if job.error != note:
                self._put(store, job._replace(error=note))
            return error
        if found or not job.bytes:  # otherwise this was known already
            self._save(legacy, job, found, store, images)
        return None

    def _read_image(self, path: str) -> Optional[Tuple[str, bytes]]:
        """An image of the predecessor's, and where it lies; None if it is no longer there.

        Raises OSError if it cannot be read now.
        """
        for place in dict.fromkeys(os.path.join(base, path) for base in self.bases):
            try:
                with os.fdopen(open_regular(place), "rb") as file:
                    data = file.read()
            except ValueError:  # it is no path
                continue
            except OSError as error:
                if error.errno in self.MISSING or os.path.isdir(place):
                    continue
                raise
            if ending_of(data):
                return place, data
        return None

    def _save(
        self, legacy: LegacyJob, job: Job, found: List[Tuple[str, bytes]], store: JobStore, images: ImageStore
    ) -> None:
        """Stores the images that were found, unless the job was removed meanwhile. Raises OSError and StoreError."""
        pictures = [data for _, data in found]
        make_folder(images.folder)
        disk = shutil.disk_usage(images.folder)
        if disk.free - sum(map(len, pictures)) < min(self.MIN_FREE, disk.total // 20):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        answer = legacy_answer(legacy, pictures)
        kept = images.as_private_as(place for place, _ in found).save(job, answer)
        images.publish(kept)
        lost, note = len(legacy.paths) - len(found), "" if found else NO_IMAGES
        if lost:
            note = f"{lost} of {len(legacy.paths)} images were no longer on disk when the job was taken over"
        kept = kept._replace(error=error_with_id(note, job.id, legacy))
        written = self._put(store, kept)
        if written is None:
            images.remove(images.files_of(kept))
        else:
            written.result()

    def _put(self, store: JobStore, job: Job) -> Optional[Future]:
        """Changes a job, unless it was removed meanwhile. None then."""
        with store.removing:
            return None if store.get(job.id) is None else store.put(job)

    def _log_once(self, trouble: str) -> None:
        """Logs a trouble when it begins, not each time that it shows."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.error("%s", trouble)


# ------------------------------------------------------------------------------------------------------------------
# Migration: the command that copies jobs into a fleet's stores, and back
# ------------------------------------------------------------------------------------------------------------------


class Migration:
    """Copies jobs and their files from two stores to two others, oldest first. Either may be the same on both sides.

    A job that is there already stays as it is there, and a job's files are there before its record. So it may be run
    as often as one likes, and goes on where it was interrupted. Jobs keep their IDs and all that is known of them.
    Those that wait on disk are moved, for each is to be generated once. What a webui generates, or a client waits
    for, is left.
    """

    PAGE = 500  # jobs that are in memory
    THREADS = 8  # that copy files
    MOVING = "(being moved)"  # the server of a job that waits, while it is moved

    def __init__(
        self,
        source: QueuedStore,
        source_images: ImageStore,
        target: QueuedStore,
        images: ImageStore,
        settings: Settings,
    ):
        """The settings say which of the two stores are not the same."""
        self.source, self.source_images = source, source_images
        self.target, self.images = target, images
        self._has_other_jobs = settings.store_url is not None
        self._has_other_images = settings.images_url is not None
        self.counts: Counter = Counter()  # jobs by what became of them

    def run(self, progress: Callable[[int], None]) -> None:
        """Copies all jobs. `progress` is called with how many more were looked at. Raises StoreError."""
        with ThreadPoolExecutor(self.THREADS, "job-tracker-copy") as threads:
            for jobs in self._pages():
                self._copy(jobs, threads)
                progress(len(jobs))

    def _pages(self) -> Iterator[List[Job]]:
        """All jobs of the source, oldest first. Of the pages before the last, only the cursors are kept meanwhile."""
        page = newest = self.source.query(Filter(), self.PAGE)
        cursors = []
        while page.cursor is not None:
            cursors.append(page.cursor)
            page = self.source.query(Filter(), self.PAGE, page.cursor)
        for cursor in reversed(cursors):
            yield self.source.query(Filter(), self.PAGE, cursor).jobs[::-1]
        yield newest.jobs[::-1]

    def _copy(self, jobs: List[Job], threads: ThreadPoolExecutor) -> None:
        there: Collection[str] = self.target.get_many([job.id for job in jobs]) if self._has_other_jobs else ()
        wanted = []
        for job in jobs:
            is_waiting = job.status == PENDING and (job.parked or job.server == self.MOVING)
            if is_waiting and self._has_other_jobs:
                self._move(job, job.id in there)
            elif job.id in there:
                self.counts["there"] += 1
            elif job.ended or job.parked:
                wanted.append(job)
            else:
                self.counts["left"] += 1
        if self._has_other_images:
            for _ in threads.map(self._copy_files, wanted):
                pass
        written = [(job, self._put(job)) for job in wanted] if self._has_other_jobs else []
        for job, put in written:
            self._wait_for(job, put)
        self.counts["copied"] += len(wanted)

    def _copy_files(self, job: Job) -> None:
        missing = self.images.copy_from(job, self.source_images)
        if missing:
            self.counts["incomplete"] += 1
            log.warning("Job %s: no longer there, or damaged: %s", job.id, ", ".join(missing))

    def _put(self, job: Job) -> Future:
        return self.target.put(job._replace(owner=None), new=True)

    def _wait_for(self, job: Job, put: Future) -> None:
        try:
            put.result()
        except KeyTaken:  # the first of the two keeps it
            self._put(job._replace(key=None, digest=None)).result()

    def _move(self, job: Job, is_there: bool) -> None:
        """Moves a job that waits on disk. Before a webui on the target can start it, none on the source can."""

        def hold(job: Job) -> Optional[Job]:
            if job.status != PENDING or not (job.parked or job.server == self.MOVING):
                return None
            return job._replace(parked=False, owner=self.source.owner, server=self.MOVING)

        if not self.source.change([job.id], hold).result():  # a webui has just started it
            self.counts["left"] += 1
            return
        if not is_there:
            if self._has_other_images:
                self._copy_files(job)
            waiting = job._replace(parked=True, server=None)
            self._wait_for(waiting, self._put(waiting))
        self.source.remove([job.id]).result()
        self.counts["moved"] += 1

    def summary(self) -> str:
        """What became of the jobs, for who ran the command."""
        lines = [f"{self.counts['copied']:,} jobs were copied, {self.counts['there']:,} were there already."]
        if self.counts["moved"]:
            lines.append(f"{self.counts['moved']:,} that waited were moved, and are generated there.")
        if self.counts["incomplete"]:
            lines.append(f"Of {self.counts['incomplete']:,}, files were missing, see above.")
        if self.counts["left"]:
            left = f"{self.counts['left']:,} had not ended and were left."
            lines.append(f"{left} Run this again once a webui on the source has ended them.")
        return "\n".join(lines)


def parse_command(words: List[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "job_tracker.py",
        description="Copies jobs and images between the files of a webui and the stores of a fleet, which "
        "TRACKER_STORE and TRACKER_IMAGES name. What is there already is left as it is: run this as often as you like.",
    )
    copying = parser.add_subparsers(dest="command", metavar="copy", required=True).add_parser("copy")
    direction = copying.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to-fleet", action="store_true", help="from the files to the fleet's stores")
    direction.add_argument("--to-files", action="store_true", help="from the fleet's stores to the files")
    text = "the folder with jobs.json and images/ (default: TRACKER_DATA_DIR, or the extension's)"
    copying.add_argument("--data-dir", metavar="FOLDER", help=text)
    return parser.parse_args(words)


def run_command(words: List[str], environ: Mapping[str, str]) -> int:
    """The command `copy`, and its exit status.

    0: all jobs are there now. 1: it failed. 2: the command is invalid. 3: some had not ended. 130: Ctrl-C.
    """
    from tqdm import tqdm  # every webui ships it, and only this needs it

    arguments = parse_command(words)
    folder = {"TRACKER_DATA_DIR": os.path.abspath(arguments.data_dir)} if arguments.data_dir else {}
    settings = Settings(EXTENSION_FOLDER, {**environ, **folder})
    set_ = (name for name in ("TRACKER_STORE", "TRACKER_IMAGES") if environ.get(name, "").strip())
    invalid = [name for name in set_ if name not in settings.locked.values()]
    if invalid:  # and has been logged, with the reason
        print(f"Nothing was copied, since {' and '.join(invalid)} cannot be used.", file=sys.stderr)
        return 2
    if settings.store_url is None and settings.images_url is None:
        print("Set TRACKER_STORE, TRACKER_IMAGES or both: they name the stores of the fleet.", file=sys.stderr)
        return 2
    if arguments.to_fleet and not os.path.isfile(os.path.join(settings.data_folder, "jobs.json")):
        print(f"There is no jobs.json in {settings.data_folder}.", file=sys.stderr)
        return 2
    predecessor = Predecessor(settings.folder, settings.data_folder)
    fleet = open_stores(settings, predecessor.refuse_to_open)
    settings_of_files = copy.copy(settings)
    settings_of_files.store_url = settings_of_files.images_url = None
    files = open_stores(settings_of_files, predecessor.refuse_to_open)
    source, target = (files, fleet) if arguments.to_fleet else (fleet, files)
    migration = Migration(*source, *target, settings)
    try:
        total = sum(source[0].stats()[0].values())
        with tqdm(total=total, unit=" jobs", disable=None) as bar:  # only on a terminal
            migration.run(bar.update)
    except StoreError as error:
        print(f"Not all could be copied: {details_of(error)}. Run this again to go on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Run this again to go on.", file=sys.stderr)
        return 130
    finally:
        for store in (source[0], target[0]):
            store.close()
    print(migration.summary())
    return 3 if migration.counts["left"] else 0


# ------------------------------------------------------------------------------------------------------------------
# Tracker: a job's life
# ------------------------------------------------------------------------------------------------------------------


class Purged(NamedTuple):
    """What a purge removed."""

    jobs: int = 0
    images: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        counts = ((self.jobs, "job"), (self.images, "image"), (f"{self.bytes:,}", "byte"))
        return ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts)

    def plus(self, other: "Purged") -> "Purged":
        return Purged(*(one + two for one, two in zip(self, other)))


class Conflict(Exception):
    """The job's status does not allow what was asked for."""


class Gone(Exception):
    """The job's request is no longer kept."""


class TooMany(Exception):
    """So many jobs wait that no other is to be accepted."""

    RETRY_AFTER = 30  # seconds


class KeyReservation:
    """Reserves an idempotency key for the first request that uses it. Later requests wait for its job."""

    def __init__(self, digest: str, job_id: Optional[str] = None):
        self.digest = digest  # of the request's body
        self.outcome: Future = Future()  # the job's ID, or None if the request came to be no job
        if job_id is not None:
            self.outcome.set_result(job_id)


Progress = Optional[float]  # 0 to 1; None where unknown


def promised_job(job: Job) -> Optional[Job]:
    is_new = job.status == PENDING and job.has_request and not job.promised
    return job._replace(promised=True) if is_new else None


def is_left_behind(job: Job) -> bool:
    """Whether a job has failed only because its webui was taken for dead."""
    return job.status == FAILED and job.error == LEFT_BEHIND and not job.cancel_wanted


def is_elsewhere(job: Job, server: str) -> bool:
    """Whether a job was at another webui than that which is called so."""
    return job.server not in (None, server)


def details_of(error: BaseException) -> str:
    """What the log says of an error: with the path, where a StoreError has one."""
    return str(getattr(error, "details", error))


def description_as_json(description: Dict[str, Any]) -> Iterator[bytes]:
    """The JSON of what `Tracker.describe` says of a job, a chunk at a time, but for the brace at its end."""
    parts = {name: value for name, value in description.items() if isinstance(value, Part)}
    yield as_json({name: value for name, value in description.items() if name not in parts})[:-1]
    for name, part in parts.items():
        yield b',"%s":' % name.encode()
        yield from part.chunks()


class Clock:
    """Unix seconds, from now on by a clock that nobody sets: what differs by a second was a second apart."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` gives the time to begin with."""
        # A thread can be held up between the two readings, so the pair that lies closest together counts.
        pairs = [(time.monotonic(), now(), time.monotonic()) for _ in range(3)]
        before, moment, _ = min(pairs, key=lambda pair: pair[2] - pair[0])
        self._offset = moment - before

    def __call__(self) -> float:
        return self._offset + time.monotonic()


class LiveJob:
    """A job of this process from its acceptance until its end is on disk. Guarded by the tracker's lock."""

    def __init__(self, job: Job, accepted: Future, cancel: Callable[..., bool], clock: Clock):
        self.job = job  # as readers see it
        self.end: Optional[Job] = None  # as it has ended, which nobody sees before it is on disk
        self.end_given = False  # the store has its end
        self.clock = clock
        self.accepted = accepted  # done when it is on disk
        self.written = accepted  # the same for its last change
        self.kept = uncancellable_future()  # whether its request could be kept
        self.accepted_at = time.monotonic()
        self.cancel = cancel  # see `Tracker.accept`
        self.answered = False  # its client may have the answer, which is being stored
        self.generated_at: Optional[float] = None  # Unix seconds, once its images are safe here
        self.publishing_since = math.inf  # by time.monotonic(), when it came to wait for nothing but their publication


class Preview(NamedTuple):
    """How the pictures of a job look while they are generated, as the host shows it."""

    job_id: str
    number: int  # from 1 on, another for each picture
    data: bytes
    media_type: str


class Standing(NamedTuple):
    """What the records of some jobs do not say, and has to be asked for: at once for all that are shown together."""

    glances: Dict[str, Glance]  # of what runs or waits at other webuis
    places: Dict[str, int]  # how many parked jobs are before each that is parked


class Threads(ThreadPoolExecutor):
    """Threads for one kind of work, so that it holds up no other kind. They refuse work once too much of it waits."""

    def __init__(self, count: int, name: str, limit: int = 2_000):
        super().__init__(count, f"job-tracker-{name}")
        self._room = threading.Semaphore(limit)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """The result of a function that may block.

        Raises StoreError if too much waits, or the webui is being reloaded.
        """
        if not self._room.acquire(blocking=False):
            raise StoreError("too many wait already", temporary=True)
        try:
            work = super().submit(function, *args)
        except RuntimeError:
            self._room.release()
            raise StoreError("the webui is being reloaded", temporary=True) from None
        work.add_done_callback(lambda _: self._room.release())
        return work


class ToPublish(NamedTuple):
    """What only this webui has, and all are to have."""

    job: Job
    work: Callable[[Job], None]  # publishes it; raises StoreError


class Publisher:
    """Brings answers and kept requests from this webui to where all have them, in threads of its own.

    While that cannot be done, one of the threads tries it every few seconds, for hours if need be, and all else waits,
    in the local folder and not in memory. What a start finds in the folder is published like what came since. Where
    nothing is to be published, there are no threads.
    """

    COUNT = 2  # threads
    RETRY = 5.0  # seconds between two tries while none goes well
    TELL_EVERY = 60.0  # seconds between two words on a trouble in all jobs that wait, while its reason changes
    LOOK_EVERY = 60.0  # seconds between two looks into the folder
    LOOK_COST = 30.0  # times as long as a look took, at least
    LOOKED_UP_AT_ONCE = 500  # jobs
    LEFTOVER_AGE = 3600.0  # seconds, by this machine's clock, after which what nobody needs is removed there

    def __init__(self, tracker: "Tracker"):
        self._tracker = tracker
        self._images = tracker.images
        self._changed = threading.Condition()  # guards what follows
        self._answers: "deque[ToPublish]" = deque()
        self._requests: "deque[ToPublish]" = deque()  # which come after them
        self._at_work: Set[str] = set()  # the jobs of what a thread has taken
        self._trouble = ""  # why the last try failed
        self._ask_at = 0.0  # when the next is due
        self._told_at = -math.inf  # when all jobs that wait said so
        self._is_asking = False  # a thread tries again
        self._settled: Set[str] = set()  # jobs with files in the folder that are to stay there
        self._stopped = False
        if self._images.is_shared:
            for work in (*[self._run] * self.COUNT, self._look_around):
                threading.Thread(target=work, name="job-tracker-publish", daemon=True).start()

    def add_answer(self, stored: Job) -> None:
        """A job's answer was stored here. Waits for nothing but the store's queue."""
        self._add(self._answers, ToPublish(stored, self._publish_answer))

    def add_left(self, job: Job) -> None:
        """The same for one that a webui left behind, of which only the record is known."""
        self._add(self._answers, ToPublish(job, self._publish_left))

    def add_request(self, job: Job) -> None:
        """A job's request was stored here."""
        if self._images.is_shared:
            self._add(self._requests, ToPublish(job, self._publish_request))

    def stop(self) -> None:
        """Publishes no more. What is under way may come to its end, which the next start finds out."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _add(self, queue: "deque[ToPublish]", task: ToPublish) -> None:
        with self._changed:
            queue.append(task)
            trouble = self._trouble
            self._changed.notify()
        if trouble and queue is self._answers:
            self._tracker.wait_for_publishing(task.job.id, trouble)

    # In the threads

    def _run(self) -> None:
        while True:
            taken = self._take()
            if taken is None:
                return
            queue, task = taken
            failure: Optional[Exception] = None
            try:
                task.work(task.job)
            except Exception as error:
                failure = error
            self._settle(queue, task, failure)

    def _take(self) -> Optional[Tuple["deque[ToPublish]", ToPublish]]:
        """What is to be published next, once it is this thread's turn. None at the end."""
        with self._changed:
            while not self._stopped:
                queue, now = self._answers or self._requests, time.monotonic()
                is_due = not self._trouble or (not self._is_asking and now >= self._ask_at)
                if queue and is_due:
                    self._is_asking = bool(self._trouble)
                    task = queue.popleft()
                    self._at_work.add(task.job.id)
                    return queue, task
                self._changed.wait(self._ask_at - now if queue and not self._is_asking else None)
        return None

    def _settle(self, queue: "deque[ToPublish]", task: ToPublish, failure: Optional[Exception]) -> None:
        """What becomes of a task that went well, or of one that did not."""
        is_temporary = failure is not None and getattr(failure, "temporary", False)
        with self._changed:
            had_trouble, self._is_asking = self._trouble, False
            self._at_work.discard(task.job.id)
            if is_temporary:
                self._trouble, self._ask_at = str(failure), time.monotonic() + self.RETRY
                queue.append(task)
            elif failure is None:
                self._trouble = ""
            waiting = self._to_tell(task, is_new=not had_trouble) if is_temporary else []
            stopped = self._stopped
            self._changed.notify_all()
        if stopped:
            return
        if is_temporary:
            if not had_trouble:
                log.warning("Images and requests are kept here until the bucket takes them: %s", details_of(failure))
            for job_id in waiting:
                self._tracker.wait_for_publishing(job_id, str(failure))
        elif failure is not None:
            log.error("Job %s: what is stored here cannot be published: %s", task.job.id, details_of(failure))
            if queue is self._answers:
                self._tracker.fail(task.job.id, f"Generated, but the images could not be stored: {reason_of(failure)}")
        elif had_trouble:
            log.info("The bucket takes images and requests again")

    def _to_tell(self, failed: ToPublish, is_new: bool) -> List[str]:
        """The jobs that are to say why they wait. Called with the lock held."""
        now = time.monotonic()
        if not is_new and now - self._told_at < self.TELL_EVERY:
            return [failed.job.id]
        self._told_at = now
        return [task.job.id for task in self._answers]

    def _publish_answer(self, stored: Job) -> None:
        self._images.publish(stored)
        with self._changed:
            if self._stopped:
                return
        try:
            self._tracker.published(stored)
        except StoreError as error:  # which is no trouble of the bucket's: the next look finds it
            log.warning("Job %s cannot be Completed yet: %s", stored.id, error.details)

    def _publish_left(self, job: Job) -> None:
        stored = self._images.unpublished(job)
        if stored is not None:
            self._publish_answer(stored)
        else:
            self._tracker.fail(job.id, LEFT_BEHIND)

    def _publish_request(self, job: Job) -> None:
        if self._needs_request(job.id):
            self._images.share_request(job)
            if not self._needs_request(job.id):  # it was removed before it was there
                self._images.remove_request(job)

    def _needs_request(self, job_id: str) -> bool:
        with contextlib.suppress(StoreError):
            job = self._tracker.get(job_id)
            return job is not None and job.has_request and job.status != COMPLETED
        return True

    # What lies in the folder

    def _look_around(self) -> None:
        """Looks for what was left there: by a crash, or since others took this webui for dead."""
        trouble = ""
        while True:
            began = time.monotonic()
            try:
                self._look()
                trouble = ""
            except StoreError as error:
                if str(error) != trouble:
                    log.warning("What was left here cannot be published yet: %s", error.details)
                trouble = str(error)
            pause = max(self.LOOK_EVERY, self.LOOK_COST * (time.monotonic() - began))
            with self._changed:
                if self._changed.wait_for(lambda: self._stopped, pause):
                    return

    def _look(self) -> None:
        """Raises StoreError."""
        with self._changed:
            known = {task.job.id for task in (*self._answers, *self._requests)} | self._at_work | self._settled
        files: Dict[str, List[str]] = {}
        for job_id, name in self._images.local_files():
            if job_id not in known and self._tracker.running(job_id) is None:
                files.setdefault(job_id, []).append(name)
        if self._tracker.settings.store_url:  # they are as much those of the jobs in jobs.json
            kept = self._images.named_beside(set(files))
            self._settled |= kept
            files = {job_id: names for job_id, names in files.items() if job_id not in kept}
        ids = iter(files)
        for some in iter(lambda: list(itertools.islice(ids, self.LOOKED_UP_AT_ONCE)), []):
            jobs = self._tracker.store.get_many(some)
            leftovers = {name for job_id in jobs for name in self._sort_out(jobs[job_id], files[job_id])}
            self._remove_older(self.LEFTOVER_AGE, leftovers)
            # Whoever has lost the records may have them back in a week.
            unknown = [job_id for job_id in some if job_id not in jobs]
            self._remove_older(self._images.ORPHAN_AGE, {name for job_id in unknown for name in files[job_id]})
            if self._stopped:
                return

    def _remove_older(self, age: float, names: Set[str]) -> None:
        files = self._images.local_files(time.time() - age) if names else ()
        self._images.remove_local([name for _, name in files if name in names])

    def _sort_out(self, job: Job, names: List[str]) -> List[str]:
        """Has those files of a job published that it needs. Returns those that nobody needs. Raises StoreError."""
        if is_left_behind(job) and self._images.unpublished(job) is not None:
            self.add_left(job)
            return []
        if job.status == COMPLETED:
            if self._images.find(job) is not None:
                return names
            self._settled.add(job.id)  # it was stored before there was a bucket, and has no other place
            return []
        request = self._images.request_name(job)
        if request in names and job.has_request:
            self.add_request(job)
        return [name for name in names if name != request] if job.ended else []


class Tracker:
    """A job's life, and the only writer of both stores.

    `accept`, `start`, and `finish` or `fail` are called in this order, from any thread, and never raise for the disk:
    a trouble is logged and stands in the job. What the first two set is seen by `get` and by the store's queries at
    once. That a job has ended is seen by nobody before its record is on disk, so that no crash can take it back.

    A job that needs no client is parked: `park` takes the place of `accept`, and `start_parked` that of `start`. In
    between it is a record on disk, and belongs to nobody: the runner of any webui on the folder may start it.
    """

    MOMENT = 0.5  # seconds that a request waits for the disk while that does not answer
    UNSTORED_LIMIT = 1 << 29  # bytes of answers that wait for the disk: more could cost the webui its memory
    STORE_WAIT = 1.0  # seconds that `wait_until_stored` waits
    PUBLISH_WAIT = 5.0  # seconds for which a webui that ends waits for images to be published: the next start goes on
    REMOVED_AT_ONCE = 100  # jobs: a crash leaves the files of no more
    PREVIEW_EVERY = 0.4  # seconds, at least, from one preview to the next
    PREVIEW_PATIENCE = 10.0  # seconds that somebody waits for a preview
    SHOW_EVERY = 0.5  # seconds from one word on jobs here to the next, for other webuis that ask for it
    SHOWN_WITHIN = 3.0  # seconds that somebody waits for the preview of another webui
    SAVED_FIELDS = ("prompt", "images", "bytes", "has_brief", "ranges", "has_request")  # what `images.save` changes
    # Fields of the record that are shown as they are.
    PLAIN_FIELDS = (
        *("id", "type", "status", "prompt", "timestamp", "ip", "started", "finished", "retry_of", "label", "server"),
    )
    IMAGE_PATH = "/sdapi/v1/job/{id}/images/{n}"

    def __init__(self, settings: Settings, host: Any, store: JobStore, images: ImageStore):
        """`host` says what the generation does that has its queue lock, and can be told to end it.

        `host.begun()` is what it says of when its last generation began, and `host.progress(begun)` is given what it
        said when the job got the lock: as long as it says the same, its state is still that of the generation before.
        The same holds for `host.preview(begun, last)`, see there, which may take a second, while `host.has_previews()`
        says whether it is of use. `host.interrupt()` ends the generation, and `host.dequeue(task)` says that the task
        with an ID of the host's own will not begin.
        """
        self.settings = settings
        self.host = host
        self.store = store
        self.images = images
        # Threads by what they may have to wait for, so that no look at jobs holds up an answer, whatever the disk does.
        # A bucket takes long for one, and many at once.
        lookers, keepers = (16, 32) if images.is_shared else (4, 2)
        self.pool = Threads(lookers, "look")  # the disk, for whoever looks at jobs
        self.searchers = Threads(2, "search", limit=100)  # all prompts to be searched, which can take long
        self.bulk = Threads(1, "bulk", limit=100)  # many jobs to be cancelled or deleted, which can take longer
        self.key_readers = Threads(1, "key")  # the disk, for requests with an idempotency key, one after another
        self.storers = Threads(2, "store")  # the disk, to store answers on it
        self.keepers = Threads(keepers, "keep")  # the disk, to keep requests on it
        self.senders = Threads(2, "send")  # nothing: what is in memory goes to clients
        self.previewers = Threads(1, "preview")  # the host, to make a preview
        self.painters = Threads(1, "paint", limit=200)  # thumbnails to be made, each of which can take a second
        self.sending: "WeakSet[Any]" = WeakSet()  # what is on its way to clients, and needs the pool for its rest
        self.closing = threading.Event()  # set when the webui unloads its scripts
        self.stopping = threading.Event()  # set when no parked job is to begin here any more
        self.listener: Any = None  # asyncio's server, by which requests come, if that can be told
        self.drained = threading.Event()  # set when nothing runs here any more after that
        self.helpers: List[threading.Thread] = []  # which use the stores, and end soon after `closing`
        self.late_helpers: List[threading.Thread] = []  # the same after `drained`
        self._storing = threading.Lock()  # around this lock: jobs go to the store in the order of their changes
        self._lock = threading.Lock()  # held for a moment, never while the store is asked: the event loop takes it
        self._live: Dict[str, LiveJob] = {}  # in order of acceptance
        self._starting: Set[str] = set()  # parked jobs whose start is on its way to the disk
        self._lock_queue: Dict[str, None] = {}  # the jobs that ask for the host's queue lock, in that order
        self._waiting: Dict[str, Set["asyncio.Future[None]"]] = {}  # for the end of a job; cancelled when it has ended
        self._parking: Set[str] = set()  # the jobs that are being parked, and may still be given up
        self._admitting = threading.Lock()  # around a count of the jobs that wait
        self._admitted = 0  # requests that were let in, and are not on disk yet
        # Called from any thread, and not to wait for anything: when a job may have been parked, and when one has ended.
        self.on_parked: Callable[[], None] = lambda: None
        self.on_ended: Callable[[Job], None] = lambda job: None
        self.server = ""  # what this webui is called, see `announce`
        self.stored_at = time.monotonic()  # when the last answer was stored
        self._unstored = 0  # bytes of all answers that wait to be stored
        self._holder: Optional[str] = None  # the job that has the host's queue lock
        self._begun: Any = None  # what the host said when it got that
        self._preview: Optional[Preview] = None  # the last one, of the job that has the lock
        self._preview_place: Any = None  # where the generation stood in it, as the host says
        self._preview_failed: Optional[str] = None  # the job whose preview failed, which is logged once
        self._previewing = finished_future(None)  # the last look at the host for one
        self._previewing_since = ("", -math.inf)  # for which job, and since when
        self._reservations: Dict[str, KeyReservation] = {}  # by idempotency key
        self._hung: Optional[Future] = None  # the last work for a request that took too long
        # Parked jobs whose requests are not here; of so many, those are forgotten that are no longer parked.
        self._unreachable: Set[str] = set()
        self._unreachable_limit = self.REMOVED_AT_ONCE
        self._publisher = Publisher(self)
        self.recover()  # before anything else, so that nobody sees a job that was left behind
        follower = threading.Thread(target=self._follow, name="job-tracker-follow", daemon=True)
        self.late_helpers.append(follower)
        follower.start()
        if store.is_shared:
            shower = threading.Thread(target=self._show, name="job-tracker-show", daemon=True)
            self.late_helpers.append(shower)
            shower.start()

    def announce(self, server: str) -> None:
        """Says what this webui is called among those that share the jobs. Waits for nothing."""
        self.server = server
        self.store.announce(server, self.images.place)

    # A job's way, from a request whose client waits

    def admit(self) -> None:
        """Lets a request in that is to wait. Raises TooMany. Call `admitted` when it is on disk, or came to be no job.

        A disk that cannot be read lets everybody in.
        """
        limit = self.settings.max_pending
        with self._admitting:
            admitted, waiting = self._admitted, 0
            if limit is not None and self.store.is_ready and not self._has_hung():
                with contextlib.suppress(StoreError, FutureTimeout):
                    until = time.monotonic() + self.patience() / 4  # the rest is for the job itself
                    waiting = self._wait_for(self.pool.submit(self.store.stats), until)[0][PENDING]
                if admitted + waiting >= limit:
                    raise TooMany(f"{admitted + waiting:,} generations wait already")
            with self._lock:
                self._admitted += 1

    def admitted(self) -> None:
        with self._lock:
            self._admitted -= 1

    def accept(self, job: Job, cancel: Callable[..., bool], body: bytes) -> Future:
        """A new job. The Future ends when it is on disk, or with StoreError: then there is no job.

        `cancel` is called for a job that is to be cancelled; its generation then sees to it that the job fails, or
        returns False, since it has ended. Called with True, the job is not to begin here, since another webui has taken
        it. If the job has a request, its `body` is kept a little later, if possible.
        """
        job = job._replace(owner=self.store.owner, server=self.server or None)
        with self._storing:
            written = self.store.put(job, new=True)
            with self._lock:
                live = self._live[job.id] = LiveJob(job, written, cancel, Clock(self.store.now))
                self._lock_queue[job.id] = None

        to_keep = [body]  # which is large, and the Future keeps its callbacks

        def go_on(written: Future) -> None:
            body = to_keep.pop()
            failure = written.exception()
            if failure is None:
                self._keep_request(live, body)
                return
            if not isinstance(failure, KeyTaken):
                log.error("A generation is not tracked, since its job could not be stored")
            self._leave(job)

        written.add_done_callback(go_on)
        return written

    def _keep_request(self, live: LiveJob, body: bytes) -> None:
        """Keeps the request of a job that goes on, whether that can be done or not. Waits for nothing."""
        job = live.job
        if not job.has_request:
            live.kept.set_result(False)
            return

        def report(kept: Future) -> None:
            failure = kept.exception()
            if failure is not None:
                log.error("Job %s cannot be retried, for its request was not kept: %s", job.id, details_of(failure))
                self._change(job.id, has_request=False, bytes=0)
            else:
                self._publisher.add_request(job)
            live.kept.set_result(failure is None)

        self._save_request(job, body).add_done_callback(report)

    def _save_request(self, job: Job, body: bytes) -> Future:
        """Keeps a request, in a thread. The Future ends when it is on disk, or with StoreError."""
        if not self.reserve_memory(len(body)):
            return failed_future(StoreError("the disk does not take what waits for it", temporary=True))
        try:
            saving = self.keepers.submit(self.images.save_request, job, body)
        except StoreError as error:
            saving = failed_future(error)
        saving.add_done_callback(lambda _: self.free_memory(len(body)))
        return saving

    def promise(self, job_id: str) -> None:
        """Has a job outlive its webui while it is Pending: that is on disk when this returns. Raises StoreError."""
        live, until = self._live_job(job_id), time.monotonic() + self.patience()
        try:
            if live is None:
                self._promise_stored(job_id, until)
            elif live.job.status == PENDING and not live.job.promised:
                if not (self._wait_for(live.kept, until) and self.images.share_request(live.job, in_haste=True)):
                    raise StoreError("its request could not be kept")
                self._change(job_id, promised=True)
                self._wait_for(live.written, until)
        except FutureTimeout:
            raise self.no_answer() from None

    def _promise_stored(self, job_id: str, until: float) -> None:
        """The same for a job that is parked, or that another webui has: its record comes before its request."""
        while True:
            job = self.store.get(job_id)
            if job is None or job.status != PENDING or job.promised:
                return
            if not job.has_request or time.monotonic() > until:
                raise StoreError("its request could not be kept")
            if self.images.share_request(job, in_haste=True) or self._is_elsewhere(job):
                self._wait_for(self.store.change([job_id], promised_job), until)
            else:
                time.sleep(0.05)

    def _is_elsewhere(self, job: Job) -> bool:
        """Whether another webui may have files of a job that are not here: all share the jobs, but not the files.

        Raises StoreError.
        """
        if not self.store.is_shared or self.running(job.id) is not None:
            return False
        return not self.images.is_shared or self.store.has_other_images()

    def patience(self) -> float:
        """Seconds that a request waits for the disk now: a moment only after another has waited too long."""
        with self._lock:
            since = [live.accepted_at for live in self._live.values() if not live.accepted.done()]
        has_hung = since and time.monotonic() - min(since) >= self.store.PATIENCE
        return self.MOMENT if has_hung or self._has_hung() else self.store.PATIENCE

    def _has_hung(self) -> bool:
        """Whether a request has waited too long for work that is still not done."""
        return self._hung is not None and not self._hung.done()

    def _wait_for(self, work: Future, until: Optional[float] = None) -> Any:
        """The result of work that a request waits for. Raises FutureTimeout after `patience`: others wait less then.

        A request that waits for several pieces of work gives a time of `time.monotonic`, `until` which for all of them.
        """
        try:
            return work.result(self.patience() if until is None else max(until - time.monotonic(), 0.0))
        except FutureTimeout:
            self._hung = work
            raise

    def no_answer(self) -> StoreError:
        """What a request is told that has waited too long."""
        return StoreError(f"the {'database' if self.store.is_shared else 'disk'} does not answer", temporary=True)

    def ask_for_lock(self, job_id: str) -> None:
        """A parked job asks for the host's queue lock, as an accepted one does from its acceptance on."""
        with self._lock:
            self._lock_queue[job_id] = None

    def leave_lock_queue(self, job_id: str) -> None:
        with self._lock:
            self._lock_queue.pop(job_id, None)

    def start(self, job_id: str) -> bool:
        """The job has the queue lock. True if its generation begins, as it does unless another webui has the job.

        Otherwise the lock is to be given back, after `generated`. That it begins is on disk first for one that may have
        been promised, if the disk answers: it would be generated once more after a crash. One with a key may have been
        promised by another webui, which does not say so. In a fleet, one that is known to be promised does not begin
        without: others take it when they have not heard of this webui for a while.
        """
        live, until = self._live_job(job_id), time.monotonic() + self.patience()
        self._hold_lock(job_id)
        self.leave_lock_queue(job_id)
        self._change(job_id, "started", status=PROCESSING)
        if live is not None and (live.job.promised or live.job.key or self.settings.resume == "all"):
            given = uncancellable_future()
            live.accepted.add_done_callback(lambda _: given.set_result(None))  # after that by which `_change` writes
            try:
                self._wait_for(given, until)
                self._wait_for(live.written, until)
            except (KeyTaken, Superseded) as failure:
                self._leave(live.job, is_over=isinstance(failure, KeyTaken))
                return False
            except (FutureTimeout, StoreError):  # otherwise it goes on all the same
                if live.job.promised and self.store.is_shared:
                    log.warning("Job %s waits on, since the database cannot be told that it begins", job_id)
                    self._change(job_id, status=PENDING, started=None, server=None, parked=True)
                    self._leave(live.job, is_over=False)
                    return False
        return True

    def _hold_lock(self, job_id: str) -> None:
        """In this order: whoever reads that the job has the lock reads then what the host said when it got that."""
        self._begun = self.host.begun()
        self._holder = job_id

    def generated(self) -> None:
        """The job that has the queue lock is about to give it back."""
        self._holder = self._preview = None

    def answered(self, job_id: str) -> None:
        """The host answered, and the client may have that answer before it is stored."""
        with self._lock:
            if job_id in self._live:
                self._live[job_id].answered = True

    def reserve_memory(self, size: int) -> bool:
        """Counts an answer of a size in bytes that waits to be stored. False if there is no room for it yet."""
        with self._lock:
            has_room = not self._unstored or self._unstored + size <= self.UNSTORED_LIMIT
            self._unstored += size if has_room else 0
        return has_room

    def free_memory(self, size: int) -> None:
        """An answer that was counted has been stored, or given up."""
        with self._lock:
            self._unstored -= size

    def finish(self, job_id: str, answer: Answer, is_last: bool = True) -> bool:
        """The host answered with success. Stores the images; a job whose images cannot be stored has failed.

        False after a temporary failure, except at the last try: the job is Processing, its `error` says why, and the
        caller is to try again. A job whose images are to be published is Processing until they are, which is no longer
        the caller's business.
        """
        job = self.running(job_id)
        if job is None:
            return True
        try:
            stored = self.images.save(job, answer)
        except Exception as error:
            if is_last or not getattr(error, "temporary", False):
                details = getattr(error, "details", error)
                log.error("Job %s was generated, but its images could not be stored: %s", job_id, details)
                self.fail(job_id, f"Generated, but the images could not be stored: {reason_of(error)}")
                return True
            note = f"Generated, but the images cannot be stored yet: {error}"
            if note != job.error:
                log.warning("Job %s: %s", job_id, note)
                self._change(job_id, error=note)
            return False
        self.stored_at = time.monotonic()
        live = self._live_job(job_id)
        if live is not None:
            live.generated_at, live.publishing_since = live.clock(), time.monotonic()
        if self.images.is_shared:
            self._publisher.add_answer(stored)
        else:
            self.published(stored)
        return True

    def published(self, stored: Job) -> None:
        """All webuis have a job's files: it is Completed. `stored` is what `images.save` or `images.find` said of it.

        That holds for a job of this process, and for one that others took for left behind. Raises StoreError if that
        cannot be told now.
        """
        changes = {name: getattr(stored, name) for name in self.SAVED_FIELDS}
        live = self._live_job(stored.id)
        if live is not None:
            self._change(stored.id, status=COMPLETED, error=None, finished=live.generated_at, **changes)
            return
        taken = self.store.with_key(stored.key) if stored.key else None
        if taken is not None and taken.id != stored.id and taken.status != FAILED:
            return  # the request has been repeated

        def complete(job: Job) -> Optional[Job]:
            if not is_left_behind(job):
                return None
            webhook = job.webhook and job.webhook._replace(delivered=False, attempts=0)
            now = self.store.now()
            return ended_job(job._replace(webhook=webhook, **changes), COMPLETED, now, LEASE, error=None)

        self._change_stored([stored.id], complete).result()

    def wait_for_publishing(self, job_id: str, reason: str) -> None:
        """A generated job waits for its images to be published, which cannot be done now. Says so in the job."""
        note = f"Generated; its webui keeps the images until the bucket takes them: {reason}"
        live = self._live_job(job_id)
        if live is not None and live.publishing_since < math.inf and live.job.error != note:
            live.answered = False  # nobody is to wait for its end
            self._change(job_id, error=note)

    def _adopt(self, job: Job) -> None:
        """A webui left a job behind whose images lie here, and only here. It ends when they are published."""
        live = LiveJob(job, finished_future(None), lambda is_taken=False: False, Clock(self.store.now))
        live.kept.set_result(job.has_request)
        live.publishing_since = -math.inf
        with self._lock:
            self._live[job.id] = live
        self._publisher.add_left(job)

    def fail(self, job_id: str, error: str) -> None:
        """The job ends without images. `error` is for its user."""
        self._change(job_id, "finished", status=FAILED, error=error[:2000])

    def _change(self, job_id: str, moment: str = "", **changes: Any) -> None:
        """Changes a job that has not ended, and stores it. `moment` is the field that is to say when that was."""
        with self._lock:
            live = self._live.get(job_id)
            if live is None or live.end is not None:
                return
            changed = live.job._replace(**{moment: live.clock()} if moment else {}, **changes)
            if changed.ended:
                live.end = ended_job(changed, changed.status, self.store.now(), LEASE)
                self._lock_queue.pop(job_id, None)
            else:
                live.job = changed
        # The callback runs here and now if the job is accepted already.
        live.accepted.add_done_callback(lambda _: self._write(live))

    def _write(self, live: LiveJob) -> None:
        """Stores a job as it is by now: two changes may come here in either order, and the later stores the end."""
        with self._storing:
            with self._lock:
                shown, end = live.job, live.end
                if live.end_given or live.accepted.exception() is not None:
                    return
                live.end_given = end is not None
            live.written = written = self.store.put(end or shown, meanwhile=shown if end else None)

        def report(written: Future) -> None:
            failure = written.exception()
            if isinstance(failure, Superseded):
                log.warning("Job %s is not changed to %s any more: %s", shown.id, (end or shown).status, failure)
            elif failure is not None:
                log.error("Job %s is %s, which could not be written: %s", shown.id, (end or shown).status, failure)
            if end is not None:
                (self._ended if failure is None else self._leave)(end)

        written.add_done_callback(report)

    def _ended(self, job: Job) -> None:
        """A job has ended, and that is on disk. Called once for each, also for those that a webui left behind.

        It may be called by the store, which is not to wait for anything.
        """
        live = self._leave(job)
        self.on_ended(job)
        if job.status == COMPLETED and live is None:
            self._remove_request(job)
        elif job.status == COMPLETED:  # not before it is kept
            live.kept.add_done_callback(lambda _: self._remove_request(job))
        if job.status == COMPLETED and self.images.is_shared:
            with contextlib.suppress(StoreError):  # the publisher finds them
                self.keepers.submit(self.images.remove_local, self.images.counted_files_of(job))

    def _remove_request(self, job: Job) -> None:
        """Removes a job's request, a little later. Waits for nothing."""
        with contextlib.suppress(StoreError):  # the housekeeper finds it
            self.keepers.submit(self.images.remove_request, job)

    def _leave(self, job: Job, is_over: bool = True) -> Optional[LiveJob]:
        """The job has ended, or came to be none; or it goes on elsewhere, and whoever waits for its end waits on."""
        with self._lock:
            live = self._live.pop(job.id, None)
            self._lock_queue.pop(job.id, None)
        if is_over:
            self._wake(job.id)
        return live

    def _wake(self, job_id: str) -> None:
        """Whoever waits for the end of a job waits no longer."""
        with self._lock:
            waiting = list(self._waiting.get(job_id, ()))
        for ended in waiting:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                ended.get_loop().call_soon_threadsafe(ended.cancel)

    # A job's way without a client

    def park(self, job: Job, body: bytes) -> Future:
        """A new parked job. The Future ends when it and its request are on disk, or with StoreError: then is none.

        Waits for nothing.
        """
        job = job._replace(owner=self.store.owner)
        parked = uncancellable_future()
        with self._lock:
            self._parking.add(job.id)

        def put(kept: Future) -> None:
            if kept.exception() is None:
                self.store.put(job, new=True).add_done_callback(tell)
            else:
                fail(StoreError.of(kept.exception()))

        def tell(written: Future) -> None:
            if written.exception() is not None:
                fail(written.exception())
                self._remove_request(job)
                return
            with self._lock:
                is_withdrawn = job.id not in self._parking
                self._parking.discard(job.id)
            if is_withdrawn:
                withdrawing = self._change_stored([job.id], withdraw)
                withdrawing.add_done_callback(remove)
            else:
                parked.set_result(None)
                self.on_parked()

        def withdraw(job: Job) -> Optional[Job]:
            return self._failed(job._replace(webhook=None), CANCELLED) if job.parked else None

        def remove(failed: Future) -> None:
            fail(self.no_answer())
            with contextlib.suppress(StoreError):  # then it stays, as Failed or as it is
                self.keepers.submit(lambda: self.remove(failed.result()))

        def fail(error: Exception) -> None:
            parked.set_exception(error)
            with self._lock:
                self._parking.discard(job.id)

        self._save_request(job, body).add_done_callback(put)
        return parked

    def withdraw(self, job: Job, parked: Future) -> bool:
        """Gives up a job that takes too long to be parked. False if it has been parked after all.

        Otherwise its Future ends with StoreError, once the job is Failed on disk if it came there: nobody else, as
        with a repeat of its request, can be promised it then.
        """
        with self._lock:
            is_withdrawn = job.id in self._parking
            self._parking.discard(job.id)
        if is_withdrawn:
            self._hung = parked
        return is_withdrawn or (parked.done() and parked.exception() is not None)

    def next_parked(self) -> Optional[Tuple[Job, bytes]]:
        """The oldest parked job and its request's body, None if none can be generated here. Raises StoreError.

        While this webui is free, other free ones get other jobs for the next moments: none waits for this one then.
        """
        while True:
            with self._lock:
                is_free = self._holder is None and not self._lock_queue
            has_all = self.images.is_shared or not self.store.is_shared
            job = self.store.oldest_parked(hold=is_free and has_all, without=self._unreachable)
            if job is None:
                return None
            body = self.images.read_request(job)
            if body is not None:
                return job, body
            if self._is_elsewhere(job):
                self._pass_over(job)
                continue
            if self.images.is_empty():
                raise StoreError("there is nothing in images/", temporary=True)
            self.fail_parked([job.id], "The request that was kept is no longer on disk").result()

    def _pass_over(self, job: Job) -> None:
        """Leaves a parked job to the webui that has its request. Raises StoreError."""
        if not self._unreachable:
            log.warning(
                "Jobs that wait are left to the webuis that have their requests, first job %s: "
                "all must have one TRACKER_IMAGES, or share the folder",
                job.id,
            )
        self._unreachable.add(job.id)
        if len(self._unreachable) >= self._unreachable_limit:
            found = self.store.get_many(self._unreachable)
            self._unreachable = {job_id for job_id, job in found.items() if job.parked}
            self._unreachable_limit = 2 * len(self._unreachable) + self.REMOVED_AT_ONCE

    def start_parked(self, job_id: str, cancel: Callable[..., bool]) -> bool:
        """A parked job has the queue lock. True if its generation begins, and that it does is on disk.

        Otherwise nothing is to be generated: it is no longer parked, since another webui was first, or it was
        cancelled; or that cannot be told or written now, or the webui ends, and it stays parked. `cancel` is as for
        `accept`.
        """
        clock = Clock(self.store.now)

        def start(job: Job) -> Optional[Job]:
            changes = {"status": PROCESSING, "owner": self.store.owner, "started": clock(), "parked": False}
            changes["server"] = self.server or None
            return job._replace(**changes) if job.parked else None

        self.leave_lock_queue(job_id)
        with self._lock:
            self._starting.add(job_id)
        try:
            # Otherwise the store stays open for it. A server that stops waits for its clients, but not for these jobs.
            if self.stopping.is_set() or (self.listener is not None and not self.listener.is_serving()):
                return False
            starting = self.store.change([job_id], start)
            try:
                started = self._wait_for(starting)
            except FutureTimeout:  # others wait for the lock
                starting.add_done_callback(self._park_again)
                return False
            except StoreError:  # it is logged
                return False
            if started:
                live = LiveJob(started[0], starting, cancel, clock)
                live.kept.set_result(True)
                with self._lock:
                    self._live[job_id] = live
                self._hold_lock(job_id)
            return bool(started)
        finally:
            with self._lock:
                self._starting.discard(job_id)

    def _park_again(self, starting: Future) -> None:
        """A job was started on disk too late, and is not generated."""

        def park(job: Job) -> Optional[Job]:
            if job.status != PROCESSING:
                return None
            if job.cancel_wanted:  # meanwhile
                return self._failed(job, CANCELLED)._replace(started=None)
            return job._replace(status=PENDING, started=None, parked=True, server=None)

        if starting.exception() is None:
            self._change_stored([job.id for job in starting.result()], park, until_written=True)

    def fail_parked(self, ids: List[str], error: str) -> Future:
        """Ends those jobs that are still parked. The Future ends when that is on disk, with these."""
        return self._change_stored(ids, lambda job: self._failed(job, error[:2000]) if job.parked else None)

    def _failed(self, job: Job, error: str) -> Job:
        """A job that did not begin, as it ends now."""
        now = self.store.now()
        return ended_job(job, FAILED, now, LEASE, error=error, finished=now)

    def _change_stored(
        self, ids: List[str], decide: Callable[[Job], Optional[Job]], until_written: bool = False
    ) -> Future:
        """Changes jobs as the store does, and tells whoever waits for their ends."""

        def tell(changed: Future) -> None:
            for job in changed.result() if changed.exception() is None else ():
                if job.ended:
                    self._ended(job)

        changed = self.store.change(ids, decide, until_written)
        changed.add_done_callback(tell)
        return changed

    def webhook_for(self, url: Optional[str]) -> Optional[Webhook]:
        """The webhook of a new job, whose request names a URL or none."""
        if url:
            return Webhook(url)
        return Webhook(self.settings.webhook_url, is_operators=True) if self.settings.webhook_url else None

    def webhook_url(self, webhook: Webhook) -> str:
        """Where a webhook goes now: the operator's may have moved since its job was accepted."""
        return (webhook.is_operators and self.settings.webhook_url) or webhook.url

    def retry(self, job_id: str) -> Optional[Job]:
        """Parks a new job with the request of a Failed one, and returns it. None if there is no such job.

        It is on disk then. Raises Conflict, Gone, TooMany and StoreError.
        """
        job = self.get(job_id)
        if job is None:
            return None
        if job.status != FAILED:
            raise Conflict(f"The job is {job.status}")
        body = self.images.read_request(job) if job.has_request else None
        if body is None:
            raise self._no_request(job)
        again = Job(
            id=self.store.reserve_id(),
            type=job.type,
            status=PENDING,
            timestamp=int(self.store.now()),
            ip=job.ip,
            prompt=job.prompt,
            bytes=len(body),
            has_request=True,
            promised=True,
            parked=True,
            retry_of=job.id,
            label=job.label,
            webhook=self.webhook_for(job.webhook.url if job.webhook and not job.webhook.is_operators else None),
        )
        self.admit()
        try:
            parked = self.park(again, body)
            try:
                parked.result(self.patience())
            except FutureTimeout:
                if self.withdraw(again, parked):
                    raise self.no_answer() from None
        finally:
            self.admitted()
        return self.get(again.id) or again

    def _no_request(self, job: Job) -> Exception:
        """Why the request of a job cannot be read here. Raises StoreError where that cannot be told."""
        if job.has_request and self._is_elsewhere(job):
            return Gone("The request of this job is not kept by this webui")
        may_come = job.has_request and self.images.is_shared and is_elsewhere(job, self.server)
        if may_come and job.server in self.store.servers():
            return StoreError(f"the request of this job is still on its way from {job.server}", temporary=True)
        return Gone("The request of this job is no longer kept")

    def _follow(self) -> None:
        """Notices what other webuis do that share the jobs: they park and end jobs, and ask for the end of ours."""
        unsure: Set[str] = set()  # which could not be looked up
        unheard: Dict[str, float] = {}  # to be cancelled, but not here, unless they begin by then
        while not self.drained.wait(self.store.FOLLOW_EVERY):
            changed = self.store.follow()
            if changed != {}:
                self.on_parked()
            elif not (unsure or unheard):
                continue
            with self._lock:
                live = dict(self._live)
                others = {*self._waiting, *self._lock_queue}.difference(live)
            if changed is None:  # these may have changed as well: a missed word is made up for here
                unsure, changed = {*live, *others}, {}
            # Of its own jobs, others change only those of which they took this webui for dead.
            own = {*changed, *unsure} if self.store.is_shared else unsure
            looked_at = {*live.keys() & own, *others & {*changed, *unsure}}
            try:
                jobs = self.store.get_many(looked_at) if looked_at else {}
            except StoreError:
                jobs, looked_at, unsure = {}, set(), looked_at
            else:
                unsure = set()
            self._notice(jobs, looked_at.difference(live))
            wanted = {job_id for job_id, is_wanted in changed.items() if is_wanted}
            wanted.update(job.id for job in jobs.values() if job.cancel_wanted)
            for job_id in live.keys() & {*wanted, *unheard}:
                live[job_id].cancel()
                unheard.pop(job_id, None)
            for job in jobs.values():
                if job.id in live and live[job.id].job.status == PENDING:
                    self._leave_if_taken(live[job.id], job)
            now = time.monotonic()
            unheard.update(dict.fromkeys(wanted.difference(live), now + self.MOMENT))
            unheard = {job_id: until for job_id, until in unheard.items() if now < until}

    def _notice(self, jobs: Dict[str, Job], looked_at: Set[str]) -> None:
        """What became of jobs that are not generated here, of which `jobs` has those that are still kept."""
        for job_id in looked_at:
            job = jobs.get(job_id)
            if job is None or not job.parked:
                self.leave_lock_queue(job_id)  # one that asks for the lock here is not ahead of others any more
            if job is None or job.ended:
                self._wake(job_id)

    def _leave_if_taken(self, live: LiveJob, stored: Job) -> None:
        """A job that waits here, while others took this webui for dead, is not to begin here if they went on with it.

        One that is only left behind goes on: its client is still here, and nobody else has it.
        """
        is_over = stored.ended and not is_left_behind(stored)
        is_taken = is_over or stored.parked or stored.owner != self.store.owner
        if is_taken and live.accepted.done() and self._live_job(stored.id) is live and live.end is None:
            log.warning("Job %s is left to others, which took this webui for dead", stored.id)
            self._leave(live.job, is_over=False)
            live.cancel(True)

    # Looking at jobs

    async def in_pool(self, function: Callable[..., Any], *args: Any, pool: Optional[Threads] = None) -> Any:
        """Runs a function that may block in a thread of the tracker's own. Raises also what `Threads.submit` does.

        What nobody waits for any more runs all the same: it would stay in the queue, and would not be counted.
        """
        return await asyncio.shield(asyncio.wrap_future((pool or self.pool).submit(function, *args)))

    def pool_for(self, job: Optional[Job]) -> Threads:
        """Threads for work on a job: where it waits or runs here, that needs no disk, and is not to wait for one."""
        is_here = job is not None and not job.ended and self.running(job.id) is not None
        return self.senders if is_here else self.pool

    def running(self, job_id: str) -> Optional[Job]:
        """A job of this process that has not ended, None for any other. Waits for nothing."""
        live = self._live_job(job_id)
        return None if live is None else live.job

    def _live_job(self, job_id: str) -> Optional[LiveJob]:
        with self._lock:
            return self._live.get(job_id)

    async def find(self, job_id: str) -> Optional[Job]:
        """The same as `get`, for the event loop. A job of this process that has not ended is found at once."""
        return self.running(job_id) or await self.in_pool(self.get, job_id)

    def get(self, job_id: str) -> Optional[Job]:
        """A job as it is now, None if there is none. Raises StoreError."""
        live = self._live_job(job_id)
        if live is None or live.end_given:  # then the store knows the moment from which the end is seen, as lists do
            return self.store.get(job_id)
        return live.job

    def missing(self, job: Job) -> Set[int]:
        """The numbers of a job's images that are no longer on disk. Raises a temporary StoreError."""
        return self.images.missing(job)

    def where_missing(self, job: Job) -> str:
        """For people: where files of a job are that are not here."""
        with contextlib.suppress(StoreError):
            if is_elsewhere(job, self.server) and self._is_elsewhere(job):
                return f"where {job.server} keeps its own"
        return "no longer on disk"

    async def thumbnail(self, job: Job, abandoned: threading.Event) -> Optional[bytes]:
        """A job's thumbnail, made unless it was made before. None if there can be none. Raises StoreError.

        Set `abandoned` once nobody waits for it any more.
        """

        def make() -> Optional[bytes]:
            return None if abandoned.is_set() else self.images.make_thumbnail(job)

        made = await self.in_pool(self.images.read_thumbnail, job)
        if made is None and self.images.may_have_thumbnail(job):
            made = await self.in_pool(make, pool=self.painters)
        return made

    def standing(self, jobs: Iterable[Job], with_previews: bool = False) -> Standing:
        """What `describe` and the like need for some jobs besides their records. Does not raise.

        Other webuis are asked for previews, too, `with_previews`. Where no job needs it, it costs nothing.
        """
        jobs, standing = list(jobs), Standing({}, {})
        theirs = [job for job in jobs if not (job.ended or job.parked) and job.owner != self.store.owner]
        parked = [job.id for job in jobs if job.parked]
        with contextlib.suppress(StoreError):  # the jobs themselves are known
            if theirs:
                standing.glances.update(self.store.glances(theirs, with_previews))
            if parked and self.store.is_ready:
                standing.places.update(self.store.queue_places(parked))
        return standing

    def position(self, job: Job, standing: Optional[Standing] = None) -> Optional[int]:
        """Where a Pending job stands in the queue, 1 is next. None for any other, and where that cannot be told.

        What asks for the queue lock gets it in that order. One parked job at a time does, and so those behind it have
        all that ask now before them. A job whose client waits at another webui stands in the queue of that.
        """
        if job.status != PENDING:
            return None
        with self._lock:
            asking = list(self._lock_queue)
            connected = len(self._lock_queue.keys() & self._live.keys())
        if job.id in asking:
            return asking.index(job.id) + 1
        standing = standing or self.standing([job])
        if job.id in standing.places:
            return connected + standing.places[job.id] + 1
        glance = standing.glances.get(job.id)
        return None if glance is None else glance.queue_position

    def progress_of(self, job: Job, standing: Optional[Standing] = None) -> Tuple[Progress, Optional[float]]:
        """How far a Processing job is, by the host's state, never that of another generation, and the seconds left."""
        if job.status != PROCESSING:
            return None, None
        if job.owner != self.store.owner:
            glance = (standing or self.standing([job])).glances.get(job.id)
            return (None, None) if glance is None else (glance.progress, glance.eta)
        is_starting = job.id in self._starting  # it is shown as Processing, and is about to be told to have the lock
        progress, seconds = self.host.progress(self._begun), self.seconds(job)
        if self._holder != job.id:
            # Otherwise the lock is released: generation is done, and only storing remains.
            return (0.0, None) if is_starting else (1.0, 0.0)
        if not progress or seconds is None:
            return progress, None
        seconds = self.host.counted_seconds(seconds)
        return progress, round(seconds / progress - seconds, 3)

    def seconds(self, job: Job) -> Optional[float]:
        """How long the generation of a job took, or has taken until now. None where nobody knows."""
        live, until = self._live_job(job.id), job.finished
        if live is not None and not job.ended:
            until = live.generated_at or live.clock()
        elif job.status == PROCESSING and self.store.is_shared:  # by the clock of all
            until = self.store.now()
        return None if job.started is None or until is None else max(until - job.started, 0.0)

    async def preview(self, job_id: str) -> Optional[Preview]:
        """The live preview of a job that has the queue lock, None if there is none. Does not raise.

        All who ask share one look at the host, in a thread of its own. There is none while nobody asks. If another
        webui generates the job, that is asked, if the store can do so.
        """
        looking = self._look_for_preview(job_id)
        if looking is not None:
            await asyncio.wait({asyncio.wrap_future(looking)}, timeout=self.PREVIEW_PATIENCE)
            return self.last_preview(job_id)
        until = time.monotonic() + self.SHOWN_WITHIN
        while self.store.is_shared:
            with contextlib.suppress(StoreError):
                preview, may_come = await self.in_pool(self._preview_elsewhere, job_id)
                if preview is not None or not may_come:
                    return preview
            if time.monotonic() >= until or self.closing.is_set():
                break
            await asyncio.sleep(self.SHOW_EVERY / 2)
        return None

    def _preview_elsewhere(self, job_id: str) -> Tuple[Optional[Preview], bool]:
        """The preview of a job that another webui generates, and whether it may have one soon. Raises StoreError."""
        job = self.get(job_id)
        if job is None or job.status != PROCESSING or job.owner == self.store.owner:
            return None, False
        return self.newest_preview(job, self.standing([job], with_previews=True)), True

    def newest_preview(self, job: Job, standing: Standing) -> Optional[Preview]:
        """The last preview of a job, None if there is none. Has a new one made. Waits for nothing.

        `standing` must have been asked for with previews.
        """
        glance = standing.glances.get(job.id)
        if glance is not None:
            preview = Preview(job.id, glance.preview_number, glance.preview, glance.media_type)
            return preview if glance.preview and job.status == PROCESSING else None
        self.begin_preview(job.id)
        return self.last_preview(job.id)

    def begin_preview(self, job_id: str) -> Optional[int]:
        """The number of the last preview of a job, None if there is none. Has a new one made. Waits for nothing."""
        self._look_for_preview(job_id)
        preview = self.last_preview(job_id)
        return None if preview is None else preview.number

    def last_preview(self, job_id: str) -> Optional[Preview]:
        """The last preview that somebody asked for. Waits for nothing."""
        preview = self._preview
        return preview if preview is not None and preview.job_id == job_id == self._holder else None

    def why_no_preview(self, job: Job) -> str:
        """For people: why a job has no preview now."""
        if job.status != PROCESSING:
            return f"The job is {job.status}: there is a preview only while it is {PROCESSING}"
        if job.owner != self.store.owner:
            why = "tells no preview of it now" if self.store.is_shared else "alone has its preview"
            return f"The job is generated by another webui, which {why}"
        if not self.host.has_previews():
            return "Live previews are off in the webui's settings"
        return "There is no preview of the job now"

    def _look_for_preview(self, job_id: str) -> Optional[Future]:
        """Has a new preview made, unless the last one is new. The Future ends when it is there. None if none can be."""
        with self._lock:
            if self._holder != job_id:
                return None
            last_job, since = self._previewing_since
            is_due = last_job != job_id or time.monotonic() - since >= self.PREVIEW_EVERY
            if is_due and self._previewing.done():
                with contextlib.suppress(StoreError):  # the webui is being reloaded
                    self._previewing = self.previewers.submit(self._make_preview, job_id)
                    self._previewing_since = job_id, time.monotonic()
            return self._previewing

    def _show(self) -> None:
        """Tells other webuis how jobs are getting on here, while they ask."""
        shown: Dict[str, int] = {}  # the numbers of the last previews
        while not self.drained.wait(self.SHOW_EVERY):
            glances: Dict[str, Glance] = {}
            with contextlib.suppress(StoreError):  # asked again in a moment
                for job_id, with_preview in self.store.glanced_at().items() if self._live else ():
                    job = self.running(job_id)
                    if job is not None:
                        glances[job_id] = self._glance(job, with_preview, shown.get(job_id, 0))
                if glances:
                    self.store.show(glances)
            # Who asks for previews only now does not have the last one.
            shown = {job_id: glance.preview_number for job_id, glance in glances.items() if glance.preview_number}

    def _glance(self, job: Job, with_preview: bool, shown: int) -> Glance:
        """How a job is getting on here, with its preview if that is another than the one of a number."""
        standing = Standing({}, {})
        glance = Glance(*self.progress_of(job, standing), self.position(job, standing))
        preview = self.newest_preview(job, standing) if with_preview else None
        if preview is None:
            return glance
        data = b"" if preview.number == shown else preview.data
        return glance._replace(preview=data, preview_number=preview.number, media_type=preview.media_type)

    def _make_preview(self, job_id: str) -> None:
        """Makes a preview, if the host has something new to show of the job. Does not raise."""
        if self._holder != job_id:
            return
        last, begun = self.last_preview(job_id), self._begun
        try:
            made = self.host.preview(begun, last and self._preview_place)
        except Exception as error:  # whatever a fork has in the place of what we know
            if self._preview_failed != job_id:
                self._preview_failed = job_id
                log.warning("Job %s has no preview: %s", job_id, error, exc_info=True)
            return
        if made is not None:
            self._preview_place, data, media_type = made
            self._preview = Preview(job_id, last.number + 1 if last else 1, data, media_type)
            # It is the job's if that has had the lock all the time. Otherwise nobody was given it, see `last_preview`.
            if self._holder != job_id:
                self._preview = None

    def stats(self) -> Dict[str, Any]:
        """What there is to know of all jobs together, as the API shows it. Raises StoreError."""
        counts, size = self.store.stats()
        oldest = self.store.oldest_pending() if counts[PENDING] else None
        return {
            "jobs": counts,
            "bytes": size,
            "oldest_pending": oldest and max(round(self.store.now() - oldest.timestamp, 1), 0.0),
            "enabled": self.settings.enabled,
            "version": VERSION,
            "servers": self.store.servers(),
        }

    async def wait(self, job_id: str, seconds: float) -> None:
        """Returns when a job has ended or is unknown, after some seconds, or at the webui's end. Holds no thread."""
        until = time.monotonic() + seconds
        ended = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.setdefault(job_id, set()).add(ended)
            is_live = job_id in self._live
        try:
            if not is_live:
                job = await self.in_pool(self.get, job_id)
                if job is None or job.ended or self.closing.is_set():
                    return
            await asyncio.wait({ended}, timeout=max(until - time.monotonic(), 0))
        finally:
            with self._lock:
                self._waiting[job_id].discard(ended)
                if not self._waiting[job_id]:
                    del self._waiting[job_id]

    async def wait_until_stored(self, job_id: Optional[str] = None) -> None:
        """Waits a moment for a job whose end is being stored, or for all of them. Does not raise.

        A client that has the answer must not see the job as Processing.
        """
        until = time.monotonic() + self.STORE_WAIT
        with self._lock:
            lives = list(self._live.values()) if job_id is None else [self._live.get(job_id)]
        for live in lives:
            left = until - time.monotonic()
            if live is not None and (live.answered or live.end is not None) and left > 0:
                if self._live_job(live.job.id) is live:  # it may have left while another was waited for
                    await self.wait(live.job.id, left)

    def describe(
        self, job: Job, whole: bool = False, root: str = "", standing: Optional[Standing] = None
    ) -> Dict[str, Any]:
        """A job as the API shows it, without its images. Reads the file with the answer.

        Unless it is to be `whole`, `parameters` are brief, and only the brief ones are read. What is large is a `Part`.
        `root` is what the client's paths have before those of the webui. `standing` is for many jobs, see there.
        """
        standing = standing or self.standing([job])
        parameters = info = None
        error, webhook = job.error, job.webhook
        live = self._live_job(job.id)
        if live is not None and live.end is not None and self.store.trouble:
            error = f"The job has ended, but that could not be stored yet: {self.store.trouble}"
        if job.status == COMPLETED:
            try:
                parameters, info = self.images.read_values(job, whole)
            except StoreError as failure:
                why = f"cannot be read: {failure}" if failure.temporary else f"are {self.where_missing(job)}"
                error = error or f"The parameters {why}"
        progress, eta = self.progress_of(job, standing)
        return {
            **{name: getattr(job, name) for name in self.PLAIN_FIELDS},
            "error": error,
            "queue_position": self.position(job, standing),
            "progress": progress,
            "eta": eta,
            "parameters": parameters,
            "info": info,
            "image_count": len(job.images),
            "image_urls": [
                self.images.url(image.name) or root + self.IMAGE_PATH.format(id=job.id, n=number)
                for number, image in enumerate(job.images)
            ],
            "webhook": webhook and {name: getattr(webhook, name) for name in ("url", "delivered", "attempts")},
        }

    def list_as_json(self, jobs: List[Job], root: str = "") -> Iterator[Iterator[bytes]]:
        """Jobs as the API lists them, each a chunk at a time. Raises StoreError."""
        standing = self.standing(jobs)
        self.images.prepare(jobs)
        for job in jobs:
            yield self.as_json(job, images=False, root=root, standing=standing)

    def as_json(
        self, job: Job, images: bool = True, root: str = "", standing: Optional[Standing] = None
    ) -> Iterator[bytes]:
        """A job as the API shows it, a chunk at a time. Raises StoreError.

        Without its images, its `parameters` are brief.
        """
        missing = self.missing(job) if images else set()
        description = self.describe(job, whole=images, root=root, standing=standing)
        if missing:
            description["error"] = f"{len(missing)} of {len(job.images)} images are {self.where_missing(job)}"
        yield from description_as_json(description)
        if images:
            yield b',"images":['
            yield from self.images.images_as_json(job)
            yield b"]"
        yield b"}"

    # Idempotency

    def reserve_key(self, key: str, digest: str) -> Tuple[KeyReservation, bool]:
        """Reserves a key, or finds the reservation of the first who did. True for the caller's own.

        The caller must `free_key` its own at the request's end. A Failed job frees its key, also while its generation
        still waits in the queue. Raises StoreError, also when the disk does nothing for `store.PATIENCE` seconds.
        """
        own = self._reservations.get(key)
        if own is not None and not own.outcome.done():  # which needs no disk
            return own, False
        progress, reserving = self.store.progress, self.key_readers.submit(self._reserve_key, key, digest)
        while not wait_for_futures([reserving], timeout=self.patience()).done:
            before, progress = progress, self.store.progress
            if progress == before:  # otherwise a long jobs.json is being read
                if not reserving.cancel():
                    self._hung = reserving
                    reserving.add_done_callback(lambda _: self._free_late_key(key, reserving))
                raise self.no_answer()
        return reserving.result()

    def _free_late_key(self, key: str, reserving: Future) -> None:
        """Frees a key that was reserved after its request had given up."""
        if reserving.exception() is None and reserving.result()[1]:
            self.free_key(key, reserving.result()[0])

    def _reserve_key(self, key: str, digest: str) -> Tuple[KeyReservation, bool]:
        """Called in one thread only, so that two requests never look for the same key at once."""
        own = self._reservations.get(key)
        if own is not None and not (own.outcome.done() and self._is_free(own.outcome.result())):
            return own, False
        job = self.store.with_key(key)
        if job is not None and not job.ended and job.owner != self.store.owner and not self.store.is_shared:
            self.recover().result()  # the webui that had it may be dead
        if job is not None and not self._is_free(job.id):
            return KeyReservation(job.digest or "", job.id), False
        with self._lock:  # whoever frees that of a failed job does it before or after
            reservation = self._reservations[key] = KeyReservation(digest)
        return reservation, True

    def _is_free(self, job_id: Optional[str]) -> bool:
        """Whether the key of a job can be used again."""
        job = None if job_id is None else self.get(job_id)
        return job is None or job.status == FAILED

    def free_key(self, key: str, reservation: KeyReservation) -> None:
        """The request of a reservation has ended, as a job or as none."""
        with self._lock:
            if self._reservations.get(key) is reservation:
                del self._reservations[key]
        if not reservation.outcome.done():
            reservation.outcome.set_result(None)

    # The end of jobs

    def cancel(self, job_id: str) -> bool:
        """Takes a job out of the queue or interrupts it. False if there is none. Raises Conflict, StoreError.

        A Pending job fails at once, and is shown so when that is on disk. A Processing one fails when the host has
        stopped it. One of another webui on the folder fails when that has noticed, within about a second.
        """
        while True:
            live = self._live_job(job_id)
            if live is not None:
                if not live.cancel():
                    raise Conflict("The generation has ended, and is being stored")
                return True
            job = self.get(job_id)
            if job is None:
                return False
            if job.ended:
                raise Conflict(f"The job is {job.status}")
            if self._change_stored([job_id], self._cancelled).result():
                return True
            time.sleep(0.01)  # it has just been started here, or has just ended

    def _cancelled(self, job: Job) -> Optional[Job]:
        """What becomes of a job that is to be cancelled and does not live here."""
        if job.parked:
            return self._failed(job, CANCELLED)
        is_others = not job.ended and job.owner != self.store.owner
        return job._replace(cancel_wanted=True) if is_others else None

    def delete(self, job_id: str) -> bool:
        """Removes a job that has ended and its files. False if there is none. Raises Conflict, StoreError."""
        job = self.get(job_id)
        if job is None:
            return False
        if not job.ended:
            raise Conflict(f"The job is {job.status}")
        self.remove([job])
        return True

    def cancel_all(self, filter_: Filter) -> int:
        """Cancels all jobs that match and have not ended. Returns how many. Raises StoreError."""
        count = 0
        with self._logged_if_it_fails(lambda: f"{count} jobs were cancelled"):
            # Those that wait come first, so that none of them begins when one that runs is interrupted.
            for status in (PENDING, PROCESSING) if filter_.status is None else {filter_.status}.difference(ENDED):
                for jobs in self._pages(filter_._replace(status=status)):
                    parked = [job.id for job in jobs if job.parked]
                    ended = {job.id for job in self.fail_parked(parked, CANCELLED).result()} if parked else set()
                    count += len(ended)
                    for job in jobs:
                        with contextlib.suppress(Conflict):  # it has ended meanwhile
                            count += job.id not in ended and self.cancel(job.id)
        return count

    def delete_all(self, filter_: Filter) -> int:
        """Removes all jobs that match and have ended, and their files. Returns how many. Raises StoreError."""
        purged = Purged()
        with self._logged_if_it_fails(lambda: f"{purged} were removed"):
            for jobs in self._pages(filter_):
                purged = purged.plus(self.remove([job for job in jobs if job.ended]))
        if purged.jobs:
            log.info("Removed, as a client asked for: %s", purged)
        return purged.jobs

    def _pages(self, filter_: Filter) -> Iterator[List[Job]]:
        """All jobs that match, newest first, `REMOVED_AT_ONCE` at a time, whatever changes meanwhile.

        Raises StoreError, also once the webui unloads its scripts.
        """
        cursor = None
        while True:
            page = self.store.query(filter_, self.REMOVED_AT_ONCE, cursor, abandoned=self.closing)
            if self.closing.is_set():
                raise StoreError("the webui is being reloaded", temporary=True)
            yield page.jobs
            cursor = page.cursor
            if cursor is None:
                return

    @contextlib.contextmanager
    def _logged_if_it_fails(self, done: Callable[[], str]) -> Iterator[None]:
        """Around work on many jobs: who asked for it learns only that it failed."""
        try:
            yield
        except StoreError as error:
            log.error("%s, then this failed: %s", done(), error.details)
            raise

    def remove(self, jobs: List[Job]) -> Purged:
        """Removes jobs that have ended, and their files. Raises StoreError."""
        if not jobs:
            return Purged()
        with self.store.removing:  # an image of these may have been copied since
            now = self.store.get_many([job.id for job in jobs])
            jobs = [now.get(job.id, job) for job in jobs]
            removed = self.store.remove([job.id for job in jobs])
        removed.result()
        freed = self.images.remove(name for job in jobs for name in self.images.files_of(job))
        return Purged(len(jobs), sum(len(job.images) for job in jobs), freed)

    def recover(self) -> Future:
        """Ends the jobs of dead webuis, or has them go on. The Future ends when that is done, or with StoreError."""

        def recovered(job: Job) -> None:
            if job.ended:
                self._ended(job)
            elif job.parked:
                self.on_parked()
            else:
                self._adopt(job)

        return self.store.recover(self._recovered, recovered, parked=self.settings.resume == "off")

    def _recovered(self, job: Job) -> Job:
        """What becomes of a job that a webui left behind. Raises StoreError if that cannot be told now.

        One that was Processing is never generated again by itself: it may be what ended the webui. Nobody knows when a
        job ended that did. The store may hold a lock meanwhile, so nothing is published here.
        """
        if self.images.unpublished(job) is not None:
            return job._replace(status=PROCESSING, owner=self.store.owner, parked=False)
        found, now = self.images.find(job), self.store.now()
        if found is not None:
            return ended_job(found, COMPLETED, now, error=None)
        is_resumed = job.promised if self.settings.resume == "async" else self.settings.resume == "all"
        if job.cancel_wanted:
            return ended_job(job, FAILED, now, error=CANCELLED)
        if job.status == PENDING and is_resumed:
            if self.images.has_request(job) or (job.promised and self._is_elsewhere(job)):
                return job._replace(promised=True, parked=True, server=None)
            if job.promised and self.images.is_empty():
                raise StoreError("there is nothing in images/", temporary=True)
        return ended_job(job, FAILED, now, error=LEFT_BEHIND)

    async def stop(self) -> None:
        """The server ends, and has waited for its requests. Returns when the parked job that is generated has ended."""
        self.stopping.set()
        self.on_parked()
        while True:
            with self._lock:
                ending = [job_id for job_id, live in self._live.items() if live.end is not None]
                is_idle = not self._starting and len(ending) == len(self._unfinished())
            if is_idle:
                break
            await asyncio.sleep(0.1)
        await asyncio.gather(*(self.wait(job_id, self.store.PATIENCE) for job_id in ending))

    def _unfinished(self) -> List[LiveJob]:
        """The jobs for whose end a webui waits that ends: not those that wait for nothing but their images' place."""
        late = time.monotonic() - self.PUBLISH_WAIT
        return [live for live in list(self._live.values()) if live.end is not None or live.publishing_since > late]

    def close(self) -> Future:
        """Closes the store and the threads once the last running job has ended and the last answer is sent.

        The Future ends then. Nobody else waits for it: on Forge, Reload UI does not wait for clients, and they are to
        get their answers.
        """
        closed = uncancellable_future()
        self.closing.set()
        self.stopping.set()
        self.on_parked()
        with self._lock:
            waiting = set(self._waiting).difference(self._live)
        for job_id in waiting:  # nobody would tell them
            self._wake(job_id)

        def drain() -> None:
            for helper in self.helpers:
                helper.join()
            self.bulk.shutdown()
            while self._starting or self._unfinished() or self.sending:  # in this order: what starts comes to live
                time.sleep(0.2)
            self.drained.set()
            for helper in self.late_helpers:
                helper.join()
            self._publisher.stop()
            for job_id in list(self._live):
                self._wake(job_id)
            self.store.close()
            looking, storing = (self.pool, self.searchers, self.key_readers), (self.storers, self.keepers)
            for pool in (*looking, *storing, self.senders, self.previewers, self.painters):
                pool.shutdown(wait=False)
            closed.set_result(None)

        threading.Thread(target=drain, name="job-tracker-end", daemon=True).start()
        return closed


# ------------------------------------------------------------------------------------------------------------------
# Webhooks: the ends of jobs, told to others
# ------------------------------------------------------------------------------------------------------------------

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # what all others in IPv6 are for is not the public internet
SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")  # which leads to an IPv4 address, through relays of times gone by
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # stands for an IPv4 address
INTERNET = (socket.AF_INET, socket.AF_INET6)


def is_global_address(address: str) -> bool:
    """Whether an IP address is one of the public internet, and so is the IPv4 address that it may stand for."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or (ipaddress.IPv4Address(ip.packed[12:]) if ip in NAT64 else None)
        if inner is not None:
            ip = inner
        elif ip not in GLOBAL_UNICAST or ip in SIX_TO_FOUR or ip.teredo:
            return False
    return ip.is_global and not ip.is_multicast


def is_any_address(address: str) -> bool:
    return True


def addresses_of(host: str, port: int) -> List[str]:
    """The IP addresses of a host, in the order in which they are to be tried. May take long. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError("it cannot be the name of a host") from None
    return list(dict.fromkeys(str(place[0]) for family, *_, place in found if family in INTERNET))


class Target(NamedTuple):
    """Where a webhook's URL leads."""

    scheme: str
    host: str  # a name, or an IP address without brackets
    port: int
    path: str  # with the query

    PORTS = {"http": 80, "https": 443}

    @classmethod
    def parse(cls, url: str) -> "Target":
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme, parts.hostname or "", parts.port or cls.PORTS[parts.scheme], path)

    @property
    def _host_in_url(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def receiver(self) -> str:
        """Who is behind it, for the log, too: the rest of a URL may be a secret."""
        return f"{self.scheme}://{self._host_in_url}:{self.port}"

    @property
    def authority(self) -> str:
        """What the header `Host` says. httpcore leaves out the brackets of an IPv6 address."""
        return self._host_in_url if self.port == self.PORTS[self.scheme] else f"{self._host_in_url}:{self.port}"

    @property
    def url(self) -> httpcore.URL:
        """For httpcore, which would leave out what follows a semicolon."""
        return httpcore.URL(scheme=self.scheme, host=self.host, port=self.port, target=self.path)

    @property
    def address(self) -> Optional[str]:
        """The IP address that it has in the place of a name, in the form that Python and the system read alike.

        Pythons before 3.8.12 and 3.9.5 take 0177.0.0.1 for 177.0.0.1, and systems for 127.0.0.1.
        """
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(self.host))
        return None


class LimitedStream:
    """A connection of httpcore's of which no more than some bytes are read."""

    def __init__(self, stream: Any, limit: int):
        self._stream = stream
        self._limit = self._left = limit

    async def read(self, *args: Any, **options: Any) -> bytes:
        data = await self._stream.read(*args, **options)
        self._left -= len(data)
        if self._left < 0:
            raise httpcore.ReadError("it answered too much")
        return data

    async def start_tls(self, *args: Any, **options: Any) -> "LimitedStream":
        return LimitedStream(await self._stream.start_tls(*args, **options), self._limit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PinnedNetwork:
    """Connects httpcore to addresses that are given, in the place of those that a URL's host has by then.

    All else goes by the URL: the header `Host`, and the name that the certificate must have.
    """

    def __init__(self, addresses: List[str], seconds: float, limit: int):
        """The addresses are tried in turn, each for some seconds. At most `limit` bytes of the answer are read."""
        self._addresses = addresses
        self._seconds = seconds
        self._limit = limit
        self._streams: List[LimitedStream] = []
        # httpcore below 0.17 has it by another name.
        make = getattr(httpcore, "AnyIOBackend", None)
        self._network = make() if make else importlib.import_module("httpcore.backends.asyncio").AsyncIOBackend()

    async def connect_tcp(self, host: str, port: int, **options: Any) -> LimitedStream:
        options["timeout"] = self._seconds
        failure: Exception = httpcore.ConnectError("it has no address")
        for address in self._addresses:
            try:
                stream = LimitedStream(await self._network.connect_tcp(address, port, **options), self._limit)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                self._streams.append(stream)
                return stream
        raise failure

    async def aclose(self) -> None:
        """Closes all connections. httpcore leaves one open if its task is cancelled while TLS is being negotiated."""
        for stream in self._streams:
            await stream.aclose()


class WebhookMessage(NamedTuple):
    """What a job's webhook says. The ID is the same at each try, so that a receiver knows what it has already.

    It is another for another end of the job.
    """

    url: str
    is_operators: bool  # who may have it go to any address
    id: str
    body: bytes

    def headers(self, secret: Optional[bytes], now: int) -> Dict[str, str]:
        """Those of one try, by Standard Webhooks. `now` is in Unix seconds."""
        headers = {
            "content-type": "application/json",
            "user-agent": f"Job-Tracker/{VERSION}",
            "connection": "close",
            "webhook-id": self.id,
            "webhook-timestamp": str(now),
        }
        if secret is not None:
            signed = f"{self.id}.{now}.".encode() + self.body
            signature = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
            headers["webhook-signature"] = f"v1,{signature}"
        return headers


# How a receiver took what it was sent last, and so the order in which receivers come.
GOOD, UNKNOWN, TROUBLED = range(3)


class Receiver:
    """A server that webhooks go to. For the thread of the webhooks alone."""

    TRIES_AT_ONCE = 8
    MOST_WAITING = {GOOD: 1_000, UNKNOWN: 1_000, TROUBLED: 10}  # tries, by its state

    def __init__(self, name: str):
        self.name = name
        self.state = UNKNOWN
        self.known_since = time.monotonic()
        self.waiting: "deque[Attempt]" = deque()
        self.running = 0  # tries
        self.is_trouble_logged = False

    @property
    def turn(self) -> Tuple[int, float]:
        """The least comes first. Of those that nobody knows it is the newest: a thousand dead ones may be before it."""
        return self.state, -self.known_since if self.state == UNKNOWN else 0.0

    @property
    def has_room(self) -> bool:
        """Whether another try may begin."""
        return self.running < (1 if self.state == TROUBLED else self.TRIES_AT_ONCE)


class Attempt:
    """One try to tell one receiver of one job's end."""

    RETRY_DELAYS = (5, 60, 300, 1800, 7200, 18000, 36000, 36000)  # seconds after the first try, the second, and so on
    JITTER = 0.2  # of these, so that what failed together does not come back together

    def __init__(self, job_id: str, receiver: Receiver, webhook: Webhook):
        self.job_id = job_id
        self.receiver = receiver
        self.since = webhook.since  # which end it tells: another webui's own may take the place of one of LEFT_BEHIND
        self.due = webhook.due  # as the job's record says: no other process tries before
        self.began = 0.0
        self.task: Optional["asyncio.Task[None]"] = None
        self.alarms: List[asyncio.TimerHandle] = []
        self.given_up = ""  # why
        self.status: Optional[int] = None  # that the receiver answered

    @property
    def is_delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def outcome(self, job: Job, now: float) -> Optional[Job]:
        """A job's record with what came of this try. None if it is to stay, since another process knows more."""
        webhook = job.webhook
        if webhook is None or webhook.delivered or webhook.since != self.since:
            return None
        if webhook.due != self.due and not self.is_delivered:
            return None
        due = None
        if not self.is_delivered and self.status != 410 and webhook.attempts < len(self.RETRY_DELAYS):
            due = now + self.RETRY_DELAYS[webhook.attempts] * (1 + random.random() * self.JITTER)
        changes = {"delivered": self.is_delivered, "attempts": webhook.attempts + 1, "due": due}
        return job._replace(webhook=webhook._replace(**changes))


class Webhooks:
    """Tells the ends of jobs to whom their requests name, by standardwebhooks.com, in a thread with its own event loop.

    Each end is told at least once, whatever is killed: whether it was, and when the next try is due, stands in the
    job's record. Until then the job belongs to the process that ended it, or that has put off its due time, and no
    other one tries. So several webuis on a folder tell an end once. The outcome of a try is in the record before the
    next one; whoever is killed between a delivery and its record tells the same again under the same `webhook-id`.

    A receiver that does not answer costs the others nothing: see `_start_waiting`.
    """

    TRY_SECONDS = 15.0  # that one try may take, from the look at the job to the end of the answer
    CHECK_SECONDS = 2.0  # that a client waits at most for a look at the addresses of its receiver
    ANSWER_LIMIT = 1 << 16  # bytes that are read of an answer
    ADDRESSES_TRIED = 4  # of one receiver
    SLOW_AFTER = 1.0  # seconds after which a receiver is troubled that has not answered
    TRIES_AT_ONCE = 200
    KNOWN_LIMIT = 10_000  # jobs that wait in memory, and receivers that are remembered; the rest is on disk
    FOUND_AT_ONCE = 1_000  # jobs
    FIND_EVERY = 30.0  # seconds between two looks for what is due while nothing is
    FIND_AGAIN = 5.0  # the same while something is due
    CLOSE_EVERY = 0.5  # seconds between two looks whether nothing is left to be told after the scripts were unloaded
    CLOSE_SECONDS = 5.0  # that tries may take then

    def __init__(self, tracker: Tracker, rules: Callable[[], Tuple[bool, bool]]):
        """`rules` says whether a client's URL may be called, and whether only at global addresses."""
        self.tracker = tracker
        self.rules = rules
        limit = max(min(self.TRIES_AT_ONCE, open_files_limit() // 4), 8)
        # Tries at once by the receiver's state: of this one and of those that come after it.
        self._shares = {GOOD: limit, UNKNOWN: limit * 7 // 8, TROUBLED: limit // 2}
        self._writers = Threads(2, "webhook")  # the disk, for what is to be sent
        # DNS can hang. Good receivers have their own threads for it.
        self._lookups = {GOOD: Threads(4, "dns"), UNKNOWN: Threads(32, "dns"), TROUBLED: Threads(32, "dns")}
        self._receivers: Dict[str, Receiver] = {}
        self._waiting: Dict[Receiver, None] = {}  # for which something waits
        self._running: Dict[Attempt, None] = {}  # in the order in which they began
        self._known: Set[str] = set()  # the jobs that wait, or are tried, or whose outcome is being written
        self._outcomes: Dict[str, Attempt] = {}  # that wait to be written, by job
        self._recording: Optional["asyncio.Task[None]"] = None
        self._tls: Optional[Future] = None
        self._find_at = -math.inf  # by the loop's clock, which nobody sets
        self._found_to = -1.0  # due times up to which the last look went, if it did not go to the end
        helper = threading.Thread(target=lambda: asyncio.run(self._run()), name="job-tracker-webhooks", daemon=True)
        tracker.late_helpers.append(helper)
        helper.start()

    # For the host's threads

    def check(self, url: str) -> None:
        """Raises ValueError for a URL that cannot be called or may not be, as far as that can be told within moments.

        Each try looks again.
        """
        target = Target.parse(parse_webhook_url(url))
        is_allowed = self._address_rule()
        if is_allowed is is_any_address:
            return
        try:
            looking = self._lookups[UNKNOWN].submit(addresses_of, target.host, target.port)
            addresses = looking.result(self.CHECK_SECONDS)
        except (OSError, StoreError, FutureTimeout):
            return
        self._allowed(addresses, is_allowed)

    def _address_rule(self) -> Callable[[str], bool]:
        """Says which addresses may be called for a client. Raises ValueError if none may."""
        are_allowed, only_global = self.rules()
        if not are_allowed:
            raise ValueError("this webui sends no requests to URLs of its clients")
        return is_global_address if only_global else is_any_address

    def _allowed(self, addresses: List[str], is_allowed: Callable[[str], bool]) -> List[str]:
        allowed = list(filter(is_allowed, addresses))
        if not allowed:
            raise ValueError("this webui sends no requests to local addresses for its clients")
        return allowed[: self.ADDRESSES_TRIED]

    # What is to be told

    async def _run(self) -> None:
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Event()
        self.tracker.on_ended = self._on_ended
        while not self.tracker.drained.is_set():
            if self._loop.time() >= self._find_at:
                self._find_at = math.inf
                self._finding = self._loop.create_task(self._find_due())
            self._start_waiting()
            pause = min(self._find_at - self._loop.time(), self.CLOSE_EVERY)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._told.wait(), pause)
            self._told.clear()
        ending = {attempt.task for attempt in self._running if attempt.task is not None}
        if ending:
            _, late = await asyncio.wait(ending, timeout=self.CLOSE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._recording is not None:
            await asyncio.wait({self._recording}, timeout=self.CLOSE_SECONDS)
        for pool in (self._writers, *self._lookups.values()):
            pool.shutdown(wait=False)

    def _on_ended(self, job: Job) -> None:
        """Called from any thread, with a job whose end is on disk."""
        if job.webhook is not None and job.webhook.due is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed. Another process tells, or the next start
                self._loop.call_soon_threadsafe(self._add, job.id, job.webhook)

    def _add(self, job_id: str, webhook: Webhook) -> None:
        """Has a try wait. One for which there is no room is found again by its due time."""
        receiver = self._receiver(Target.parse(self.tracker.webhook_url(webhook)).receiver)
        limit = self.KNOWN_LIMIT if receiver.state == GOOD else self.KNOWN_LIMIT // 2
        has_room = len(self._known) < limit and len(receiver.waiting) < receiver.MOST_WAITING[receiver.state]
        if has_room and job_id not in self._known:
            self._known.add(job_id)
            receiver.waiting.append(Attempt(job_id, receiver, webhook))
            self._waiting[receiver] = None
            self._told.set()

    def _receiver(self, name: str) -> Receiver:
        if name not in self._receivers and len(self._receivers) >= self.KNOWN_LIMIT:
            busy = (one for one in self._receivers.values() if one.waiting or one.running)
            self._receivers = {receiver.name: receiver for receiver in busy}
        return self._receivers.setdefault(name, Receiver(name))

    async def _find_due(self) -> None:
        """Has those tries wait that are due: again, or since nobody is left who would have made them."""
        store, pause = self.tracker.store, self.FIND_AGAIN
        try:
            now = store.now()
            find = functools.partial(store.due_webhooks, now, self.FOUND_AT_ONCE, self._found_to)
            jobs = await self.tracker.in_pool(find, pool=self._writers)
            for job in jobs:
                self._add(job.id, job.webhook)
            # One receiver that does not answer may have more than one look finds. The next look begins behind these.
            self._found_to = jobs[-1].webhook.due if len(jobs) == self.FOUND_AT_ONCE else -1.0
            next_due = await self.tracker.in_pool(store.next_webhook, pool=self._writers)
            if next_due is None or next_due > now:
                pause = min(self.FIND_EVERY, math.inf if next_due is None else next_due - now)
        except StoreError:  # it is logged, and asked again
            pass
        except Exception:  # a bug of ours
            log.exception("Webhooks that are due cannot be found now")
            pause = self.FIND_EVERY
        self._find_at = min(self._find_at, self._loop.time() + pause)
        self._told.set()

    # Whose turn it is

    def _start_waiting(self) -> None:
        """Begins what waits, as far as there is room: good receivers first, troubled ones last.

        A receiver has a few tries at once, a troubled one a single one. There is always room for good receivers, since
        the others have a share of all tries only. Troubled ones may fill it while nobody else waits. Then those that
        have taken longest are given up, as tries that failed, until troubled receivers have half of all.
        """
        running = Counter(attempt.receiver.state for attempt in self._running)
        unclaimed = []
        for receiver in sorted(self._waiting, key=lambda one: one.turn):
            state = receiver.state
            while receiver.waiting and receiver.has_room:
                if sum(running[other] for other in range(state, TROUBLED + 1)) >= self._shares[state]:
                    if state != TROUBLED:
                        self._give_up_longest()
                    break
                attempt = receiver.waiting.popleft()
                running[state] += 1
                receiver.running += 1
                self._running[attempt] = None
                if attempt.due - self.tracker.store.now() < self.TRY_SECONDS:
                    unclaimed.append(attempt)
                else:
                    self._begin(attempt)
            del self._waiting[receiver]
            if receiver.waiting:
                self._waiting[receiver] = None  # behind the others
        if unclaimed:
            claiming = self._loop.create_task(self._claim(unclaimed))
            claiming.add_done_callback(lambda _: self._told.set())

    def _give_up_longest(self) -> None:
        troubled = [one for one in self._running if one.receiver.state == TROUBLED and one.task and not one.given_up]
        if len(troubled) > self._shares[TROUBLED]:
            self._give_up(troubled[0], "it did not answer, while others waited")

    async def _claim(self, attempts: List[Attempt]) -> None:
        """Begins those tries that still are to be made, and has no other process make them."""
        left = {attempt.job_id: attempt for attempt in attempts}
        store = self.tracker.store

        def claim(job: Job) -> Optional[Job]:
            if job.webhook is None or job.webhook.due != left[job.id].due:
                return None
            return job._replace(webhook=job.webhook._replace(due=store.now() + LEASE))

        claimed: List[Job] = []
        with contextlib.suppress(StoreError):  # they are found again
            claimed = await asyncio.wrap_future(store.change(list(left), claim))
        for job in claimed:
            attempt = left[job.id]
            attempt.due = job.webhook.due
            if attempt.due - store.now() >= self.TRY_SECONDS:  # otherwise the disk was slow
                self._begin(left.pop(job.id))
        for attempt in left.values():
            self._forget(attempt)

    def _begin(self, attempt: Attempt) -> None:
        attempt.began = self._loop.time()
        attempt.task = self._loop.create_task(self._exchange(attempt))
        attempt.task.add_done_callback(functools.partial(self._tried, attempt))
        reason = f"it did not answer within {self.TRY_SECONDS:g} s"
        attempt.alarms = [
            self._loop.call_later(self.SLOW_AFTER, self._note_slow, attempt),
            self._loop.call_later(self.TRY_SECONDS, self._give_up, attempt, reason),
        ]

    def _give_up(self, attempt: Attempt, reason: str) -> None:
        attempt.given_up = reason
        attempt.task.cancel()

    def _note_slow(self, attempt: Attempt) -> None:
        attempt.receiver.state = TROUBLED
        self._told.set()

    def _leave(self, attempt: Attempt) -> None:
        """A try has ended."""
        del self._running[attempt]
        attempt.receiver.running -= 1
        self._told.set()

    def _forget(self, attempt: Attempt) -> None:
        """A try was none."""
        self._leave(attempt)
        self._known.discard(attempt.job_id)

    def _tried(self, attempt: Attempt, task: "asyncio.Task[None]") -> None:
        for alarm in attempt.alarms:
            alarm.cancel()
        error = None if task.cancelled() else task.exception()
        # Otherwise there was nothing to be told, it could not be read, or the webui unloads its scripts.
        is_receivers = error is not None and not isinstance(error, StoreError)
        if attempt.status is None and not (is_receivers or attempt.given_up):
            self._forget(attempt)
            return
        receiver = attempt.receiver
        self._leave(attempt)
        if attempt.is_delivered:
            if receiver.is_trouble_logged:
                log.info("Webhooks reach %s again", receiver.name)
            receiver.is_trouble_logged = False
            receiver.state = GOOD if self._loop.time() - attempt.began < self.SLOW_AFTER else UNKNOWN
        else:
            receiver.state = TROUBLED
            if not receiver.is_trouble_logged:
                reason = f"it answered {attempt.status}" if attempt.status else attempt.given_up
                reason = escape_for_log(reason or f"{type(error).__name__}: {reason_of(error)}")
                log.warning("A webhook to %s failed, and later ones may, too: %s", receiver.name, reason)
            receiver.is_trouble_logged = True
        self._outcomes[attempt.job_id] = attempt
        if self._recording is None or self._recording.done():
            self._recording = self._loop.create_task(self._record())

    async def _record(self) -> None:
        """Writes outcomes, all that there are at once. While the disk takes none, none of these jobs is tried again."""
        while self._outcomes:
            outcomes, self._outcomes = self._outcomes, {}
            written: List[Job] = []
            with contextlib.suppress(StoreError):  # the store is closed
                written = await asyncio.wrap_future(self._store_outcomes(outcomes))
            for job in written:
                if job.webhook.due is not None:
                    pause = job.webhook.due - self.tracker.store.now()
                    self._find_at = min(self._find_at, self._loop.time() + pause)
                elif not job.webhook.delivered:
                    log.warning("The webhook of job %s is given up after attempt %d", job.id, job.webhook.attempts)
            self._known.difference_update(outcomes)
            self._told.set()

    def _store_outcomes(self, outcomes: Dict[str, Attempt]) -> Future:
        store = self.tracker.store
        return store.change(list(outcomes), lambda job: outcomes[job.id].outcome(job, store.now()), until_written=True)

    # One try

    async def _exchange(self, attempt: Attempt) -> None:
        """Sends a job's end, and notes what is answered. If the job is not to be told any more, nothing is."""
        message = await self.tracker.in_pool(self._message, attempt.job_id, pool=self._writers)
        if message is None:
            return
        target = Target.parse(message.url)
        is_allowed = is_any_address if message.is_operators else self._address_rule()
        addresses = [] if target.address is None else [target.address]
        if not addresses:
            pool = self._lookups[attempt.receiver.state]
            addresses = await self.tracker.in_pool(addresses_of, target.host, target.port, pool=pool)
        # There is no other look-up: the addresses that were judged are those that are called.
        addresses = self._allowed(addresses, is_allowed)
        context = await self._tls_context() if target.scheme == "https" else None
        network = PinnedNetwork(addresses, self.TRY_SECONDS / len(addresses), self.ANSWER_LIMIT)
        headers = message.headers(self.tracker.settings.webhook_secret, int(self.tracker.store.now()))
        headers = {"host": target.authority, **headers}
        pool = httpcore.AsyncConnectionPool(ssl_context=context, network_backend=network)
        try:
            async with pool, pool.stream("POST", target.url, headers=headers, content=message.body) as response:
                attempt.status = response.status  # which counts, whatever becomes of the rest
                async for _ in response.aiter_stream():  # as it comes: nothing is decoded
                    pass
        finally:
            await network.aclose()

    def _message(self, job_id: str) -> Optional[WebhookMessage]:
        """What is to be sent. None if the job is gone, or its end was told meanwhile. Raises StoreError."""
        job = self.tracker.store.get(job_id)
        if job is None or job.webhook is None or job.webhook.due is None:
            return None
        since = datetime.fromtimestamp(job.webhook.since or job.timestamp, timezone.utc)
        event = {
            "type": f"job.{job.status.lower()}",
            "timestamp": since.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        }
        data = b"".join(self.tracker.as_json(job, images=False))
        body = as_json(event)[:-1] + b',"data":' + data + b"}"
        url, message_id = self.tracker.webhook_url(job.webhook), f"msg_{job.id}_{job.timestamp}"
        if job.error == LEFT_BEHIND:  # its webui may live after all, and then its own end is news
            message_id += "_left"
        return WebhookMessage(url, job.webhook.is_operators, message_id, body)

    async def _tls_context(self) -> ssl.SSLContext:
        """Made once, since it takes long: by httpx, which knows the usual authorities and SSL_CERT_FILE."""
        if self._tls is None or (self._tls.done() and self._tls.exception() is not None):
            self._tls = self._writers.submit(httpx.create_ssl_context)
        return await asyncio.shield(asyncio.wrap_future(self._tls))


# ------------------------------------------------------------------------------------------------------------------
# Housekeeper: what is done now and then
# ------------------------------------------------------------------------------------------------------------------

CLOCKS_START = 1577836800  # 2020-01-01 in Unix seconds: a clock that is before was never set


class Outlook(NamedTuple):
    """What a purge that somebody asks for finds, its files aside."""

    days: Optional[float]  # the retention, None if it is off
    jobs: int = 0  # that are older and have ended
    has_unfinished: bool = False  # whether others are as old


class Housekeeper:
    """A thread that removes what is too old, ends what other webuis left behind, and looks at what may have changed."""

    LOOK_EVERY = 5  # seconds between two looks at config.json, and at the host
    AGAIN_AFTER = 60  # seconds until a failed purge is repeated
    TURN_EVERY = 1.0  # seconds between two looks whether another webui has purged
    PURGE_EVERY = 6 * 3600
    LOOKED_UP_AT_ONCE = 500  # jobs of files that are looked for

    def __init__(self, tracker: Tracker, predecessor: Predecessor):
        self.tracker = tracker
        self.settings = tracker.settings
        self.store = tracker.store
        self.images = tracker.images
        self.watch: Callable[[], None] = lambda: None  # looks after the host
        self.next_purge: Optional[float] = None  # by time.monotonic()
        self.kept_for_clock = 0  # jobs that the last purge kept though they are old, since the clock may be wrong
        self._started, self._started_by_clock = time.monotonic(), int(self.store.now())
        self.waits = False  # a purge waits for that of another webui
        self._purging = threading.Lock()
        self._unremoved: List[Job] = []  # chosen by `keep_below_limit`, and not known to be removed
        self._stop = tracker.closing
        helper = threading.Thread(target=self._keep_house, name="job-tracker-housekeeping", daemon=True)
        tracker.helpers.append(helper)
        helper.start()
        with contextlib.suppress(OSError):  # what cannot be looked at now is looked at by the next start
            if not self.store.is_shared and predecessor.is_unfinished():
                copying, arguments = predecessor.copy_images, (self.store, self.images, self._stop)
                threading.Thread(target=copying, args=arguments, name="job-tracker-predecessor", daemon=True).start()

    def _keep_house(self) -> None:
        purge_at = time.monotonic()
        recover_at = purge_at + self.store.RECOVER_EVERY
        trouble = ""
        while True:
            now = time.monotonic()
            try:
                self.settings.refresh()
                self.watch()
                if now >= recover_at:
                    recover_at = now + self.store.RECOVER_EVERY
                    self.tracker.recover().result()
                    trouble = ""
                if now >= purge_at:
                    purge_at = now + self.AGAIN_AFTER
                    self.purge(asked_for=False)
                    self.next_purge = purge_at = now + self.PURGE_EVERY
                self.keep_below_limit()
            except Exception as error:
                text = details_of(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
                if text != trouble:  # it may last for days
                    log.error("Housekeeping will be tried again: %s", text)
                trouble = text
            if self._stop.wait(self.LOOK_EVERY):
                return

    def purge(self, asked_for: bool = True) -> Purged:
        """Removes the jobs that are older than the retention, with their files, and files that no job names.

        Files of many jobs that the store does not know are kept: then it has been lost. A purge that nobody asked for
        removes nothing by a clock that may be wrong. Of all webuis that share the jobs, one purges at a time: a purge
        that is asked for waits for its turn, any other is left to the webui that is at it. Raises StoreError.
        """
        with self._purging, self._turn(asked_for) as is_ours:
            return self._purge(asked_for) if is_ours else Purged()

    @contextlib.contextmanager
    def _turn(self, waits: bool) -> Iterator[bool]:
        """Around a removal, of which there is one at a time. False if it is another webui's turn. Raises StoreError."""
        while True:
            with self.store.purging() as is_ours:
                self.waits = waits and not is_ours
                if not self.waits:
                    yield is_ours
                    return
            if self._stop.wait(self.TURN_EVERY):
                self.waits = False
                raise StoreError("the webui is being reloaded", temporary=True)

    def _purge(self, asked_for: bool) -> Purged:
        days, now = self.settings.retention_days, self.store.now()
        self.kept_for_clock = 0
        if now < CLOCKS_START and not asked_for:
            log.warning("The clock says %s, so nothing is purged", time.strftime("%Y-%m-%d", time.gmtime(now)))
            return Purged()
        if self.settings.retention_unknown and not asked_for:
            days = None
        purged, expired = Purged(), [] if days is None else self.store.expired(now - days * 86400)
        if not asked_for:
            expired = self._without_doubtful(expired, now, days)
        at_once = self.tracker.REMOVED_AT_ONCE
        for start in range(0, len(expired), at_once):
            if self._stop.is_set():
                break
            self.settings.refresh()  # this may take minutes
            if days is not None and self.settings.retention_days != days:
                break  # what is too old is another question now
            jobs = self.store.get_many(expired[start : start + at_once]).values()
            purged = purged.plus(self.tracker.remove([job for job in jobs if job.ended]))
        if asked_for or not self.kept_for_clock:
            purged = purged.plus(self._remove_orphans())
        if any(purged):
            log.info("Purge: removed %s", purged)
        return purged

    def keep_below_limit(self) -> None:
        """Removes the oldest ended jobs while the files of all that have ended exceed TRACKER_MAX_GB.

        The newest stays, whatever its size. Does nothing while a purge is at work. Raises StoreError. What could not be
        removed is removed by a later call, once the store has written that: it would not name these jobs again.
        """
        if self.settings.max_gb is None or (self._unremoved and self.store.trouble):
            return
        if not self._purging.acquire(blocking=False):
            return
        purged, limit = Purged(), self.settings.max_gb * 10**9
        try:
            left = self.store.ended_bytes()
            size = left + sum(job.bytes for job in self._unremoved)
            if left <= limit and not self._unremoved:
                return
            with self._turn(waits=False) as is_ours:
                while is_ours and not self._stop.is_set():
                    if left > limit and not self._unremoved:
                        self._unremoved = self.store.oldest_ended(math.ceil(left - limit), self.tracker.REMOVED_AT_ONCE)
                    if not self._unremoved:
                        break
                    purged = purged.plus(self.tracker.remove(self._unremoved))
                    self._unremoved = []
                    left = self.store.ended_bytes()
        finally:
            self._purging.release()
            if purged.jobs:
                log.info(
                    "TRACKER_MAX_GB is %g, and the files of ended jobs had %s bytes. Removed the oldest: %s",
                    self.settings.max_gb,
                    f"{size:,}",
                    purged,
                )

    def outlook(self) -> Outlook:
        """What a purge that is asked for would find now. Removes nothing. Raises StoreError."""
        days = self.settings.retention_days
        if days is None:
            return Outlook(None)
        before = self.store.now() - days * 86400
        old = (Filter(status=status, before=before) for status in STATUSES if status not in ENDED)
        has_unfinished = any(self.store.query(filter_, 1).jobs for filter_ in old)
        return Outlook(days, len(self.store.expired(before)), has_unfinished)

    def _without_doubtful(self, expired: List[str], now: float, days: Optional[float]) -> List[str]:
        """Leaves out the jobs from before this start, if all of them were too old by then: is the clock ahead?

        Those that grow too old while this process lives do so by a clock that nobody sets.
        """
        started = int(now - (time.monotonic() - self._started))  # as whole as the times of jobs
        if not expired or self.store.query(Filter(after=started - days * 86400 - 1, before=started), 1).jobs:
            return expired
        young = self.store.expired(now - days * 86400, after=started - 1)
        newest = self.store.query(Filter(before=min(started, self._started_by_clock)), 1).jobs
        if newest:
            # What was too old when the newest was accepted still goes: a webui may be started only now and then.
            young = self.store.expired(newest[0].timestamp - days * 86400) + young
        self.kept_for_clock = len(expired) - len(young)
        if self.kept_for_clock:
            log.warning(
                "The clock may be wrong: all jobs from before this start are older than the retention. These %d are "
                "kept until Purge Now, or until a start that finds younger ones",
                self.kept_for_clock,
            )
        return young

    def _remove_orphans(self) -> Purged:
        orphans, lost = self._orphans(self.images.ORPHAN_AGE)
        if lost:
            log.warning("%d jobs in images/ are not in jobs.json. Is it whole? Their files are kept", lost)
        images = sum(IMAGE_FORM.match(name) is not None for name in orphans)
        return Purged(0, images, self.images.remove(orphans))

    def kept_orphans(self) -> Tuple[int, int]:
        """What a purge that has just ended left in images/: young files that no job names, and jobs that are lost.

        Of files that many webuis share, nothing is said: all that are stored just now are among them.
        """
        if self.images.is_shared:
            return 0, 0
        orphans, lost = self._orphans(0)
        return len(orphans), lost

    def _orphans(self, age: float) -> Tuple[List[str], int]:
        """Files that no job names and that are older than some seconds, without those of jobs that the store has lost.

        Of these, only how many they are.
        """
        orphans, unknown = [], set()
        files = self.images.older_than(self.store.now() - age)
        for some in iter(lambda: list(itertools.islice(files, self.LOOKED_UP_AT_ONCE)), []):
            jobs = self.store.get_many({job_id for job_id, _ in some})
            for job_id, name in some:
                job = jobs.get(job_id)
                if job is None:
                    unknown.add(job_id)
                if job is None or (job.ended and name not in self.images.files_of(job)):
                    orphans.append((job_id, name))
        kept = self.store.quarantined_ids() if orphans else None  # records that somebody may read yet
        if kept is None:
            return [], 0
        if self.settings.store_url:
            kept = kept | self.images.named_beside(unknown)
        lost = unknown if len(unknown) > self.tracker.REMOVED_AT_ONCE else set()
        return [name for job_id, name in orphans if job_id not in kept | lost], len(lost)


# ------------------------------------------------------------------------------------------------------------------
# Http: what HTTP, browsers and servers ask for, whatever is sent
# ------------------------------------------------------------------------------------------------------------------

HEARTBEAT = 15.0  # seconds between two bytes of white space
CHUNK = 1 << 19  # bytes of an answer that are sent at a time

JOB_HEADER = "X-Job-ID"
OWN_HEADERS = (  # those that a page of another origin cannot read unless they are exposed
    JOB_HEADER,
    "Location",
    "Preference-Applied",
    "Idempotent-Replayed",
    "Link",
    "ETag",
    "Content-Disposition",
    "Retry-After",
)


# Reading a request


def header_of(scope: Scope, name: bytes) -> str:
    """A request header, its fields joined as in RFC 9110, 5.3; empty if there is none."""
    return ", ".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


def path_of(scope: Scope) -> str:
    """The path as the client sent it: with the prefix that a proxy took away, which servers add or do not."""
    root, path = scope.get("root_path", ""), scope["path"]
    return quote(path if path.startswith(root + "/") else root + path)


def root_of(scope: Scope) -> str:
    """What the path has before that of the webui: a prefix that a proxy took away, or the webui's own subpath."""
    return path_of(scope).rpartition("/sdapi/")[0]


def text_header_of(scope: Scope, name: bytes) -> str:
    """A request header that is text for people. Clients send it as UTF-8, or as Latin-1 where that has all of it."""
    text = header_of(scope, name)
    try:
        return text.encode("latin-1").decode()
    except UnicodeDecodeError:
        return text


def accepts_gzip(scope: Scope) -> bool:
    """By RFC 9110, 12.5.3."""
    for part in header_of(scope, b"accept-encoding").lower().split(","):
        coding, _, parameters = part.partition(";")
        if coding.strip() in ("gzip", "x-gzip"):
            return not re.search(r"q\s*=\s*0(\.0*)?\s*(;|\Z)", parameters)
    return False


def user_of(scope: Scope) -> str:
    """The user of RFC 7617 whose password the host has checked, or whatever else somebody in front has checked."""
    header = header_of(scope, b"authorization")
    scheme, _, credentials = header.partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):  # it is no base64, and so as good as any other scheme
            return base64.b64decode(credentials).partition(b":")[0].hex()
    return header


# A quote without an end reaches to the end: otherwise each further quote would be looked for there, too.
PREFERENCE = re.compile(r'(?:"(?:\\.|[^"\\])*(?:"|\\?\Z)|[^",])+')


class Preference(NamedTuple):
    """What a client prefers to waiting for its answer, by RFC 7240, 2, 4.1 and 4.3."""

    respond_async: bool = False
    wait: Optional[int] = None  # seconds that it waits all the same

    LIMIT = 300

    @classmethod
    def of(cls, scope: Scope) -> "Preference":
        preferences: Dict[str, str] = {}  # by names in small letters, without their parameters. The first counts
        for preference in PREFERENCE.findall(header_of(scope, b"prefer")):
            name, _, value = preference.partition(";")[0].partition("=")
            preferences.setdefault(name.strip().lower(), value.strip().strip('"'))
        if preferences.get("respond-async") != "":
            return cls()
        wait = preferences.get("wait", "")
        return cls(True, min(int(wait), cls.LIMIT) if re.match(r"[0-9]{1,9}\Z", wait) else None)

    def applied(self, respond_async: bool) -> Dict[str, str]:
        """The header of an answer that is an early one or not."""
        applied = ["respond-async"] if respond_async else []
        applied += [] if self.wait is None else [f"wait={self.wait}"]
        return {"Preference-Applied": ", ".join(applied)} if applied else {}


# Pages of other origins

DEFAULT_PORTS = {"http": 80, "https": 443}
LOOPBACK = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|\[::1\]")
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^][\s/:@?#,]+)(?::([0-9]{0,5}))?")


def parse_authority(text: str, scheme: str) -> Optional[Tuple[str, int]]:
    """Host and port by RFC 3986, 3.2, the port of the scheme where none is said; None for what is invalid."""
    form = AUTHORITY.fullmatch(text.strip().lower())
    return (form.group(1), int(form.group(2) or DEFAULT_PORTS[scheme])) if form else None


def is_foreign(scope: Scope, is_allowed: Callable[[str], bool]) -> bool:
    """Whether a browser says that a request comes from a page of another origin, and of one that is not allowed.

    Browsers send `Sec-Fetch-Site` (W3C, Fetch Metadata, 2.4) over HTTPS and to loopback addresses, and no page can set
    it. Elsewhere `Origin` (RFC 6454, 7; Fetch, 3.2) must be that of the host that the browser asked for. This stands in
    `Host` or, where a proxy on this machine has changed that, in `X-Forwarded-Host`. That is not believed elsewhere: a
    page can send it, too, once gradio has allowed it to, which it does while the webui starts. Programs send neither
    `Origin` nor `Sec-Fetch-Site`, and are never foreign.
    """
    origin, site = header_of(scope, b"origin"), header_of(scope, b"sec-fetch-site")
    if origin and is_allowed(origin):
        return False
    if site or not origin:
        return site not in ("", "same-origin", "none")
    scheme, _, authority = origin.lower().partition("://")
    if scheme not in DEFAULT_PORTS:  # of a page without an origin, too, which is "null"
        return True
    page = parse_authority(authority, scheme)
    host = parse_authority(header_of(scope, b"host"), scheme)
    if page is None or page == host:
        return page is None
    forwarded = header_of(scope, b"x-forwarded-host").split(",")
    is_proxied = host is not None and LOOPBACK.fullmatch(host[0]) is not None
    return not (is_proxied and page in [parse_authority(other, scheme) for other in forwarded])


class OriginGuard:
    """Refuses what pages of other origins ask for, with a line in the log, but not with one for each call."""

    REFUSAL = (
        "A page of another origin may not do this, unless --cors-allow-origins names it. If this page is the webui's "
        "own, a proxy before it has to set X-Forwarded-Host"
    )
    SILENCE = 60.0  # seconds after a line in the log

    def __init__(self, is_allowed: Callable[[str], bool]):
        """`is_allowed` says whether the webui's options name an origin."""
        self.is_allowed = is_allowed
        self._silent_until = -math.inf

    def refuses(self, scope: Scope, action: str) -> bool:
        if not is_foreign(scope, self.is_allowed):
            return False
        self.warn(f"A page of {escape_for_log(header_of(scope, b'origin') or 'another origin')}", action)
        return True

    def warn(self, who: str, action: str) -> None:
        if time.monotonic() >= self._silent_until:
            log.warning("%s tried to %s, and was refused", who, action)
            self._silent_until = time.monotonic() + self.SILENCE


def refusal() -> JSONResponse:
    # What gradio's page shows is `error`.
    return JSONResponse({"detail": OriginGuard.REFUSAL, "error": OriginGuard.REFUSAL}, 403)


def exposed(names: Iterable[str]) -> Dict[str, str]:
    """The header by which the Fetch standard lets pages of other origins read our headers, of an answer with some."""
    carried = {name.lower() for name in names}
    own = [name for name in OWN_HEADERS if name.lower() in carried]
    return {"Access-Control-Expose-Headers": ", ".join(own)} if own else {}


# Images

IMAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'", "X-Content-Type-Options": "nosniff"}


def is_known(scope: Scope, etag: str) -> bool:
    """Whether If-None-Match names what the client has already (RFC 9110, 13.1.2)."""
    known = [tag.strip() for tag in header_of(scope, b"if-none-match").replace("W/", "").split(",")]
    return etag in known or known == ["*"]


# Writing the log


def format_host_traceback(error: BaseException) -> str:
    """The host's part of a traceback, each line of it indented, so that none can be taken for another of the log."""
    text = "".join(traceback.format_exception(type(error), error, without_own_frames(error.__traceback__)))
    return textwrap.indent(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.rstrip()), "    ", lambda _: True)


def without_own_frames(frames: Optional[TracebackType]) -> Optional[TracebackType]:
    """A traceback without the frames of this file.

    They say nothing of a failed generation, and SD.Next reads a source file for each when it logs one.
    """
    kept, rest = [], None
    while frames is not None:
        if frames.tb_frame.f_code.co_filename != without_own_frames.__code__.co_filename:
            kept.append(frames)
        frames = frames.tb_next
    for one in reversed(kept):
        rest = TracebackType(rest, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return rest


# Sending an answer


class Gzip:
    """Gzip for base64: it has nothing that repeats, so Huffman codes alone do as well, at a fifth of the time."""

    def __init__(self, level: int = 1) -> None:
        """Level 0 packs without compressing."""
        self._stream = zlib.compressobj(level, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)

    def encode(self, data: bytes, last: bool = False) -> bytes:
        """Encodes so that the other side can decode all of it at once."""
        return self._stream.compress(data) + self._stream.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)

    def encode_all(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            yield self.encode(chunk)
        yield self.encode(b"", last=True)


def json_array(items: Iterable[Iterator[bytes]]) -> Iterator[bytes]:
    """A JSON array of items, each of which comes in chunks."""
    yield b"["
    for number, item in enumerate(items):
        first = next(item)
        yield b"," + first if number else first
        yield from item
    yield b"]"


class ThreadedChunks:
    """The chunks of a generator, made and packed in a thread of a pool, small ones together."""

    def __init__(self, pool: Threads, chunks: Iterator[bytes], sending: Any, gzip: Optional[Gzip] = None):
        """It stands in the set `sending` for as long as it needs the pool."""
        self._pool, self._sending = pool, sending
        self._chunks = gzip.encode_all(chunks) if gzip else chunks
        self._making = finished_future(b"")
        self._first = b""
        self._ended = False
        sending.add(self)

    def __aiter__(self) -> "ThreadedChunks":
        return self

    async def begin(self) -> "ThreadedChunks":
        """Makes the first chunk before anything is sent, so that trouble with it still has a status of its own."""
        try:
            self._first = await self._next()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __anext__(self) -> bytes:
        chunk, self._first = self._first or await self._next(), b""
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def _next(self) -> bytes:
        if self._ended:
            return b""
        self._making = self._pool.submit(self._make)
        return await asyncio.wrap_future(self._making)

    def _make(self) -> bytes:
        """Small chunks together, for each way to a thread and back takes time."""
        made, size = [], 0
        for chunk in self._chunks:
            made.append(chunk)
            size += len(chunk)
            if size >= CHUNK:
                break
        else:
            self._ended = True
        return b"".join(made)

    async def aclose(self) -> None:
        """Ends the generator, and so closes its file, as soon as no thread is in it. Waits for nothing."""

        def close(_: Future) -> None:
            if not self._ended:  # closing a file waits for a disk that does not answer
                threading.Thread(target=self._chunks.close, name="job-tracker-close", daemon=True).start()

        self._sending.discard(self)
        self._making.add_done_callback(close)


async def after_heartbeats(
    wait: Callable[[], Any], result: Callable[[], Any], gzip: Optional[Gzip]
) -> AsyncIterator[bytes]:
    """White space until what `wait` gives is done, and then the chunks that the coroutine `result` gives."""
    ended = asyncio.ensure_future(wait())  # not before: nothing ends a generator that was never begun
    try:
        while not ended.done():
            yield gzip.encode(b" ") if gzip else b" "
            await asyncio.wait({ended}, timeout=HEARTBEAT)
    finally:
        ended.cancel()  # nobody else waits for it
        ended.add_done_callback(lambda _: ended.cancelled() or ended.exception())  # `result` meets the same trouble
    chunks = await result()
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        await chunks.aclose()


class NoResult(HTTPException):
    """A job has no answer of success, which is logged already. Its client learns it by a status, or by an abort."""


class ClosingStreamingResponse(StreamingResponse):
    """Its content is closed at the end, also when the client leaves before. It breaks off without a clean end.

    Content that has a function `leave` is told by it at once that the client has left, and ends then.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope.get(OuterMiddleware.KEY)
        self.headers.update(exposed(self.headers))
        gone = asyncio.get_running_loop().create_task(wait_for_disconnect(receive))
        is_live = hasattr(self.body_iterator, "leave")
        if is_live:
            gone.add_done_callback(self.body_iterator.leave)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self.body_iterator:
                if is_live and connection is not None:
                    await connection.send_past_layers(send, chunk)
                else:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                # Not before: a response that ends before its first chunk is an error to the host's layers.
                if gone.done():
                    return
            if not gone.done():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Exception as error:
            if connection is None:
                raise
            connection.aborted = True  # some layers would end the response cleanly
            if not gone.done() and not isinstance(error, NoResult):
                name, reason = self.headers.get(JOB_HEADER) or scope["path"], getattr(error, "details", repr(error))
                is_strange = not isinstance(error, (StoreError, HTTPException))
                log.error("The answer to %s breaks off: %s", *map(escape_for_log, (name, reason)), exc_info=is_strange)
        finally:
            gone.cancel()
            await self.body_iterator.aclose()


# ASGI messages


def replay_body(body: List[Message]) -> Receive:
    """A `receive` that gives the body once, and after it never says that the client left."""

    async def receive() -> Message:
        if not body:
            await asyncio.get_running_loop().create_future()
        return body.pop(0)

    return receive


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


# Around the whole host


class ConnectionState:
    """What the parts inside the host tell the layer around it about one request. It stands in the request's scope."""

    def __init__(self) -> None:
        self.aborted = False  # nothing more is sent, and the connection is closed without a clean end
        self.refused = False  # a 403 is sent in the response's place
        self.error_headers: Dict[str, str] = {}  # which an error gets besides: the host drops those of an exception
        self.uncompressed = False  # see `leave_uncompressed`
        self._server_send: Optional[Send] = None  # that of the server, once it has the head
        self._in_layers = 0  # bytes of `send_past_layers` that the host's layers were given, and have not passed on
        self.listener: Any = None  # asyncio's server, by which the request came, if that can be told
        self.server_stops: Callable[[], bool] = lambda: False  # whether the server waits for this request, to end
        self.work: Optional["asyncio.Task[None]"] = None  # which outlives the response

    def leave_uncompressed(self) -> Dict[str, str]:
        """The headers by which the host's gzip leaves a response alone, on the event loop and as large as it is.

        It does so for what has an encoding. There is none, which is the name of one (RFC 9110, 8.4.1) but is not to be
        sent, and so the outermost layer takes it away again.
        """
        self.uncompressed = True
        return {"Content-Encoding": "identity"}

    async def send_past_layers(self, send: Send, data: bytes) -> None:
        """Sends a piece of a response that has many, and many clients, for which each of the host's layers takes time.

        The first goes through all of them, by `send`, as the head does. They are passed by from when they have let it
        through: if it has another length then, one of them changes what it gets, and they get everything.
        """
        message = {"type": "http.response.body", "body": data, "more_body": True}
        if self._server_send is not None and self._in_layers == 0:
            if not self.aborted:
                await self._server_send(message)
        else:
            self._in_layers += len(data)
            await send(message)

    def filter(self, scope: Scope, receive: Receive, send: Send) -> Send:
        """A `send` that does what was told here."""

        async def pass_on(message: Message) -> None:
            is_head = message["type"] == "http.response.start"
            if self.refused:
                if is_head:
                    await refusal()(scope, receive, send)
                return
            if is_head and self.uncompressed:
                raw = [header for header in message["headers"] if header != (b"content-encoding", b"identity")]
                message = {**message, "headers": raw}
            if is_head and message["status"] >= 400 and self.error_headers:
                headers = MutableHeaders(raw=list(message["headers"]))
                headers.update({**self.error_headers, **exposed(self.error_headers)})
                message = {**message, "headers": headers.raw}
            if not self.aborted:
                await send(message)
            if is_head:
                self._server_send = send
            else:
                self._in_layers -= len(message.get("body", b""))

        return pass_on


class OuterMiddleware:
    """The outermost layer around the host: aborts connections, and keeps the server alive for work without a client.

    Whatever the layers between do to end a response, nothing passes once its connection is aborted, and a response
    without an end is closed. A server that stops waits for its requests, and so for the work that outlives them.
    """

    KEY = "job_tracker.connection"  # of the ConnectionState in a scope
    CLOSING = 5.0  # seconds that a client may take to read the rest, before its connection is dropped

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        connection = scope[self.KEY] = ConnectionState()
        cycle = getattr(send, "__self__", None)  # uvicorn's, of this request
        connection.listener = getattr(getattr(cycle, "transport", None), "_server", None)  # TLS hides it
        connection.server_stops = functools.partial(
            server_stops, connection.listener, cycle, getattr(cycle, "keep_alive", False)
        )
        if scope.get("http_version") == "1.0":
            send = without_chunk_sizes(send, cycle)
        asked = header_of(scope, b"access-control-request-headers").lower()
        if scope["method"] == "OPTIONS" and "x-forwarded-host" in asked:
            # Only proxies say this, and `is_foreign` believes it. gradio 4 would let any page say it.
            await refusal()(scope, receive, send)
            return
        try:
            await self.app(scope, receive, connection.filter(scope, receive, send))
        except Exception:
            if not connection.aborted:  # otherwise it is logged already
                raise
        finally:
            if connection.aborted:
                await self._abort(scope, receive, cycle)
            elif connection.work is not None:
                await asyncio.wait({connection.work})

    async def _abort(self, scope: Scope, receive: Receive, cycle: Any) -> None:
        """Closes the connection. A server that we do not know does that itself, and complains in its log."""
        transport = getattr(cycle, "transport", None)
        if transport is None:
            return
        if scope.get("http_version") == "1.0":  # to which a closed connection is the clean end: only a reset is not
            with contextlib.suppress(OSError):  # it is closed already
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            transport.abort()  # a close would end TLS in good order, and that is a clean end, too
        else:
            transport.close()
        try:
            await asyncio.wait_for(wait_for_disconnect(receive), self.CLOSING)
        except asyncio.TimeoutError:  # the client does not read
            transport.abort()
        cycle.disconnected = True  # or uvicorn, which may not have noticed yet, complains of a response without an end


def connection_of(scope: Scope) -> ConnectionState:
    """That of a request. One for nobody where it came before the outermost layer was there."""
    return scope.get(OuterMiddleware.KEY) or ConnectionState()


def server_stops(listener: Any, cycle: Any, kept_alive: bool) -> bool:
    """Whether uvicorn takes no more requests, and waits for those that it has. It tells nobody.

    `cycle` is its own for a request that it has, and `kept_alive` whether the connection was to stay open after that.
    """
    has_closed = listener is not None and not listener.is_serving()
    return has_closed or (kept_alive and not cycle.keep_alive)


def without_chunk_sizes(send: Send, cycle: Any) -> Send:
    """A server's `send` for a client of HTTP/1.0, which knows no chunks: RFC 9112, 6.1 forbids to send it any.

    With httptools, uvicorn sends their sizes all the same where the head has no Content-Length. Its `cycle` is led to
    believe that each piece of the body has the length that was promised.
    """
    if not hasattr(cycle, "expected_content_length"):  # with h11 it knows
        return send
    endless = False

    async def send_plain(message: Message) -> None:
        nonlocal endless
        if message["type"] == "http.response.start":
            endless = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if endless:
                cycle.chunked_encoding = False
        elif endless:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plain


# ------------------------------------------------------------------------------------------------------------------
# Generation: the way of one generation request
# ------------------------------------------------------------------------------------------------------------------
#
#  1. `Middleware` stands around each of the host's generation routes. Each request gets a `ClientResponse`.
#  2. The ClientResponse reads the body, and begins a `Generation`: the host's route in a task that is not the client's.
#  3. The host checks credentials and body, and calls its endpoint, in a worker thread: `on_endpoint`.
#  4. The endpoint asks for the host's queue lock, for which an `ObservedLock` stands: `on_lock_wanted`. This makes the
#     request a job, which is on its way to the disk from now on. Once it is there, the client is told of it.
#  5. The endpoint gets the lock, generates, and gives the lock back: `on_lock_acquired`, `on_lock_released`.
#  6. The route ends with a `HostResponse`. The ClientResponse sends it, and the Generation stores it as the job's end.
#
# A request that need not wait with its connection is parked in step 4: an exception takes it out of the host's route,
# and so it holds no thread, no memory and no place in the queue. The `Runner` sends it through the route again.

STORE_DELAY = 0.1  # seconds that an answer may take to be sent before its images are stored meanwhile
STORE_AGAIN = (0.5, 1, 2, 5, 10, 20, 30, 45, 60, 75)  # seconds between tries to store after temporary failures
GIVE_UP_AFTER = 60.0  # seconds that an answer waits for a disk that has not taken its job yet
EARLY_FAILURE_WINDOW = 0.02  # seconds in which a generation that has just begun may fail with the host's own answer
INTERRUPT_EVERY = 0.2  # seconds
IDEMPOTENCY_KEY_LIMIT = 255  # characters
LABEL_HEADER, WEBHOOK_HEADER = "X-Job-Label", "X-Job-Webhook"

current: "contextvars.ContextVar[Optional[Generation]]" = contextvars.ContextVar("job_tracker_current", default=None)


class DuplicateRequest(Exception):
    """Ends a host's route: another generation has the same idempotency key."""

    def __init__(self, reservation: KeyReservation):
        self.reservation = reservation


class Parked(Exception):
    """Ends a host's route: the job waits on disk, and is generated by another run of it."""


class NotStarted(Exception):
    """Ends a host's route: the job is not to be generated here and now."""


MISUSED_KEY = "Idempotency-Key was used with another body"
NO_IMAGE = "The webui answered without an image"


class Cancelled(NoResult):
    """What a cancelled generation came to. It ends a host's route that waits for the queue lock."""

    def __init__(self) -> None:
        super().__init__(500, CANCELLED)


class NotHere(NoResult):
    """What a generation came to whose job another webui has taken. It ends a host's route that asks for the lock."""

    def __init__(self) -> None:
        super().__init__(500, "Another webui has taken the job")


class Middleware:
    """Wraps the application of one generation route of the host."""

    def __init__(
        self,
        app: ASGIApp,
        type_: str,
        tracker: Tracker,
        host: Any,
        check_webhook: Callable[[str], Any] = parse_webhook_url,
    ):
        """`host` is asked for what differs between webuis: see the part Host. `check_webhook` raises ValueError."""
        self.app = app
        self.type = type_
        self.tracker = tracker
        self.host = host
        self.check_webhook = check_webhook

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Requests that came before the outer middleware was there have no connection state.
        if not self.tracker.settings.enabled or OuterMiddleware.KEY not in scope:
            await self.app(scope, receive, send)
            return
        try:
            await ClientResponse(self, scope, receive, send).serve()
        except Exception as error:
            raise error.with_traceback(without_own_frames(error.__traceback__))


class ClientResponse:
    """What one client is told. It may leave at any moment; its generation does not notice."""

    def __init__(self, middleware: Middleware, scope: Scope, receive: Receive, send: Send):
        self.middleware = middleware
        self.tracker = middleware.tracker
        self.scope = scope
        self.receive = receive
        self.send = send
        self.connection: ConnectionState = scope[OuterMiddleware.KEY]
        self.tracker.listener = self.connection.listener or self.tracker.listener
        self.gzip = Gzip() if accepts_gzip(scope) else None
        self.preference = Preference.of(scope)

    async def serve(self) -> None:
        body = [await self.receive()]
        while body[-1].get("more_body", False):
            body.append(await self.receive())
        if body[-1]["type"] != "http.request":  # the client left before the end of its body: the host is to see that
            await self.middleware.app(self.scope, replay_body(body), self.send)
            return
        while not await self._generate(body):
            pass  # it repeated a request that came to nothing, and so becomes one of its own

    async def _generate(self, body: List[Message]) -> bool:
        """False if the generation repeats one that came to nothing, so that another is due."""
        self.connection.error_headers = {}
        parks = self.preference.respond_async and not self.preference.wait
        generation = Generation(self.middleware, self.scope, body, parks=parks)
        self.connection.work = generation.begin()
        over = generation.over
        try:
            if parks:  # it leaves the host's route at once, refused or parked
                await asyncio.wait({over})
            is_accepted = await generation.is_accepted()
            if isinstance(generation.response.error, Parked):  # and no other webui was first with its key
                await self._tell_parked(generation, is_accepted)
                return True
            if is_accepted:
                # For so long it may still end with the host's own answer and status.
                seconds = EARLY_FAILURE_WINDOW if generation.phase >= Phase.GENERATING else 0
                if self.preference.respond_async:
                    seconds = self.preference.wait or 0
                await asyncio.wait({over}, timeout=seconds)
                if not (over.done() and generation.response.failed):
                    await self._follow(generation)
                    return True
            await asyncio.wait({over})
            if isinstance(generation.response.error, DuplicateRequest):
                return await self._repeat(generation.response.error.reservation)
            await self._pass_on(generation, is_accepted)
            return True
        except StoreError as error:  # before a head is out
            job_id = self.connection.error_headers.get(JOB_HEADER)
            log.error("Job %s: the stored answer cannot be read: %s", job_id, error.details)
            raise HTTPException(503, f"The stored answer cannot be read: {error}") from None
        finally:
            set_once(generation.passed_on, False)
            set_once(generation.client_done, None)

    # The three ways to answer: as the host, with the generation's own job, with another's

    async def _pass_on(self, generation: "Generation", is_accepted: bool) -> None:
        """Gives the client what the host gave, as if we were not there."""
        set_once(generation.passed_on, True)
        response = generation.response
        if is_accepted and self.preference.wait is not None:
            self.connection.error_headers = self._job_headers(generation.job.id)
        if generation.job is not None and response.failed:
            # A client that has the answer is to find the job Failed.
            await self.tracker.wait_until_stored(generation.job.id)
        if response.error is not None or response.head is None:
            raise response.error or RuntimeError(response.reason())
        body = response.body
        headers = MutableHeaders(raw=list(response.head["headers"]))
        if not response.send_images and not response.failed:
            body = await self.tracker.in_pool(response.body_for_client, pool=self.tracker.senders)
            headers["Content-Length"] = str(len(body))
        await self.send({**response.head, "headers": headers.raw})
        await self.send({"type": "http.response.body", "body": body})

    async def _follow(self, generation: "Generation") -> None:
        """Tells the client of its job, from its acceptance on."""
        set_once(generation.passed_on, False)
        self.connection.error_headers = self._job_headers(generation.job.id)

        async def result() -> ThreadedChunks:
            if generation.response.failed:
                # A client that sees the abort is to find the job Failed.
                await self.tracker.wait_until_stored(generation.job.id)
                raise NoResult(500, generation.response.reason())
            return await self._begin(generation.response.chunks_for_client(), self.tracker.senders)

        await self._tell(generation.job, asyncio.shield(generation.over), result, is_replay=False)

    async def _tell_parked(self, generation: "Generation", is_on_disk: bool) -> None:
        """202 if the job is on disk. Otherwise there is none, and is not to be one later."""
        if not is_on_disk and generation.withdraw():
            raise HTTPException(503, "The job cannot be kept now, so it was not accepted")
        never = asyncio.get_running_loop().create_future()
        await self._tell(generation.job, never, lambda: never, is_replay=False)

    async def _repeat(self, reservation: KeyReservation) -> bool:
        """Answers from the job that was first with the idempotency key. False if there is none any more."""
        job_id = await asyncio.shield(asyncio.wrap_future(reservation.outcome))  # not ours to cancel
        if job_id is None:
            return False
        self.connection.error_headers = self._job_headers(job_id)
        await self.tracker.wait_until_stored(job_id)  # it may have just failed
        job = await self.tracker.find(job_id)
        if job is None or job.status == FAILED:
            return False

        async def result() -> ThreadedChunks:
            job = await self.tracker.in_pool(self.tracker.get, job_id)
            if job is None or job.status != COMPLETED:
                raise NoResult(500, job.error if job else "The job was deleted")
            return await self._begin(self.tracker.images.replay(job), self.tracker.pool)

        ended = asyncio.get_running_loop().create_task(self.tracker.wait(job_id, math.inf))
        ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # `result` meets the same
        try:
            if job.ended or self.preference.wait is not None:  # so that a trouble with what is stored has a status
                await asyncio.wait({ended}, timeout=None if job.ended else self.preference.wait)
            await self._tell(job, ended, result, is_replay=job.ended)
        finally:
            ended.cancel()
        return True

    # Telling of a job

    async def _tell(self, job: Job, ended: "asyncio.Future[Any]", result: Callable[[], Any], is_replay: bool) -> None:
        """202 now, which is a promise, or 200 now and the result when there is one.

        That is when `ended` is done. The coroutine `result` gives ThreadedChunks. Raises NoResult before the head.
        """
        in_time = bool(self.preference.wait) and ended.done()  # within no time nothing ends
        is_early = self.preference.respond_async and not in_time
        headers = {"Idempotent-Replayed": "true"} if is_replay else {}
        if is_early:
            await self._promise(job)
            headers["Location"] = path_of(self.scope).rpartition("/")[0] + f"/job/{job.id}"
            if not job.parked:
                with contextlib.suppress(StoreError):  # then as it was
                    job = await self.tracker.find(job.id) or job
            description = self.tracker.as_json(job, images=False, root=root_of(self.scope))
            content: Any = await self._begin(description, self.tracker.pool_for(job))
        elif ended.done():
            content = await result()
        else:
            content = after_heartbeats(lambda: ended, result, self.gzip)
        headers.update(self._job_headers(job.id, is_early))
        headers["Vary"] = "Accept-Encoding"
        headers["X-Accel-Buffering"] = "no"  # nginx would keep the head back until the end
        if self.gzip:
            headers["Content-Encoding"] = "gzip"
        response = ClosingStreamingResponse(content, 202 if is_early else 200, headers, "application/json")
        await response(self.scope, self.receive, self.send)

    async def _promise(self, job: Job) -> None:
        if job.ended or job.promised:
            return
        try:
            promising = self.tracker.in_pool(self.tracker.promise, job.id)
            try:  # the pool's threads may all wait for the store
                await asyncio.wait_for(promising, self.tracker.patience())
            except asyncio.TimeoutError:
                raise self.tracker.no_answer() from None
        except StoreError as error:
            log.error("Job %s goes on, but does not outlive the webui: %s", job.id, error.details)
            raise HTTPException(503, f"The job cannot be kept beyond this request: {error}") from None

    async def _begin(self, chunks: Iterator[bytes], pool: Threads) -> ThreadedChunks:
        return await ThreadedChunks(pool, chunks, self.tracker.sending, self.gzip).begin()

    def _job_headers(self, job_id: str, respond_async: bool = False) -> Dict[str, str]:
        return {JOB_HEADER: job_id, **self.preference.applied(respond_async)}


class Phase(enum.IntEnum):
    """Where the host's route is with a request. It only goes on, and waits for neither the client nor the disk.

    A request that is refused goes from the first to the last at once, and a job that is cancelled while it waits from
    the second.
    """

    CHECKING = 0  # the host checks credentials and body: no job yet
    WAITING = 1  # a job, for which the route waits for the queue lock
    GENERATING = 2  # the route has the queue lock
    ENCODING = 3  # the route has given the queue lock back, and makes its answer of the images
    ENDED = 4  # the route has ended, and what it came to is being stored


class Generation:
    """One run of the host's route, in a task of its own, whatever becomes of the client."""

    tasks: Set["asyncio.Task[None]"] = set()  # asyncio holds its tasks only weakly

    def __init__(
        self,
        middleware: Middleware,
        scope: Scope,
        body: List[Message],
        parks: bool = False,
        parked: Optional[Job] = None,
    ):
        """With `parks` the request becomes a parked job; with the job `parked` it is the run of one, for no client."""
        self.middleware = middleware
        self.tracker = middleware.tracker
        self.host = middleware.host
        self.scope = scope
        self.body = body  # emptied when the host has read it, for it may be large
        self.response = HostResponse()

        # Where it is. The first two change in any thread, the others in the event loop, and only once.
        self._lock = threading.Lock()  # guards the next two
        self.phase = Phase.CHECKING
        self.cancelled: Optional[Exception] = None  # what it comes to, since it is to end
        self._loop = loop = asyncio.get_running_loop()
        self.on_disk: "asyncio.Future[bool]" = loop.create_future()  # whether the job could be written
        self.over: "asyncio.Future[None]" = loop.create_future()  # the client need not wait any longer
        self.passed_on: "asyncio.Future[bool]" = loop.create_future()  # whether the client gets the host's own answer
        self.client_done: "asyncio.Future[None]" = loop.create_future()  # it has its answer, or has left
        self.started: "asyncio.Future[None]" = loop.create_future()  # the parked job is being generated

        # What is known of the request by the time that it becomes a job, and then of this.
        self.has_thread = False  # a worker thread was added, for it to wait for the queue lock in
        self.key: Optional[str] = None
        self.reservation: Optional[KeyReservation] = None  # of the key
        self.reserved_id: Optional[str] = None
        self.is_admitted = False  # it counts among the jobs that wait
        self.waited = 0.0  # seconds, for the store
        self.prompt = ""
        self.label: Optional[str] = None
        self.webhook: Optional[Webhook] = None
        self.task_id: Optional[str] = None  # the host's own name for it
        self.job = parked  # as it was accepted
        self.written: Optional[Future] = None  # ends when that is on disk
        self.parks = parks
        self.was_parked = parked is not None
        self.is_live = False  # the job ends as this run does
        self.stored = finished_future(False)  # what the last try to store that end came to
        if self.was_parked:
            self.on_disk.set_result(True)
            self.passed_on.set_result(False)
            self.client_done.set_result(None)

    # The task

    def begin(self) -> "asyncio.Task[None]":
        """Runs the host's route and all that follows, in a task of its own."""
        work = self._loop.create_task(self._work())
        self.tasks.add(work)
        work.add_done_callback(self.tasks.discard)
        return work

    async def _work(self) -> None:
        current.set(self)
        try:
            with self.host.extra_worker_thread() as self.has_thread:
                await self.middleware.app(dict(self.scope), replay_body(list(self.body)), self.response.send)
        except BaseException as error:  # also when the server is stopped: its job then says so
            self.response.error = error
        with self._lock:
            self.phase = Phase.ENDED
        if self.cancelled:  # the host may answer with what there was of the images by then
            self.response.error = self.cancelled
        if self.is_live:
            self.tracker.answered(self.job.id)  # before its client can ask for the job
        set_once(self.over, None)
        try:
            if self.is_live:
                await self._end_job()
            elif self.was_parked:
                await self._end_unstarted()
            elif isinstance(self.response.error, Parked):
                await asyncio.wait({self.on_disk})  # until then, a repeat of the request cannot be told of the job
        finally:
            self._set_admitted()
            if self.reservation:
                self.tracker.free_key(self.key, self.reservation)
        await asyncio.wait({self.client_done})
        self.response.clear()  # an idle worker thread of the host keeps its last context, and so this object

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *args)

    async def is_accepted(self) -> bool:
        """Whether the client can be told of a job: it is on disk. Waits until that is known, for a time."""
        await asyncio.wait({self.on_disk, self.over}, return_when=asyncio.FIRST_COMPLETED)
        if self.job is not None:  # the host may have been faster than the disk
            await asyncio.wait({self.on_disk}, timeout=max(self.tracker.patience() - self.waited, 0.0))
        return self.on_disk.done() and self.on_disk.result()

    # CHECKING, on the host's worker thread

    def on_endpoint(self, arguments: Dict[str, Any]) -> None:
        """The host has checked credentials and body, and its endpoint is about to run. Raises what is to end it."""
        if not self.was_parked:
            self._check_request()
        with log_errors("reading a request"):
            self.reserved_id = self.job.id if self.was_parked else self.tracker.store.reserve_id()
            adapted = self.host.adapt_request(arguments, self.reserved_id)
            self.prompt, self.response.send_images, self.task_id = adapted

    def _check_request(self) -> None:
        """Raises what refuses it."""
        self.label = text_header_of(self.scope, LABEL_HEADER.lower().encode()).strip() or None
        if self.label is not None and len(self.label) > LABEL_LIMIT:
            raise HTTPException(422, f"{LABEL_HEADER} must have at most {LABEL_LIMIT} characters")
        url = header_of(self.scope, WEBHOOK_HEADER.lower().encode()).strip()
        try:
            if url:
                self.middleware.check_webhook(url)
        except ValueError as reason:
            raise HTTPException(422, f"{WEBHOOK_HEADER}: {reason}") from None
        self.webhook = self.tracker.webhook_for(url)
        began = time.monotonic()
        if any(name == b"idempotency-key" for name, _ in self.scope["headers"]):
            self._reserve_key(header_of(self.scope, b"idempotency-key"))
        try:
            if not (self.has_thread or self.parks):
                raise TooMany(f"{self.host.SPARE_THREADS:,} generations wait already")
            self.tracker.admit()
            self.is_admitted = True
        except TooMany as reason:
            self.scope[OuterMiddleware.KEY].error_headers = {"Retry-After": str(TooMany.RETRY_AFTER)}
            raise HTTPException(429, str(reason)) from None
        self.waited = time.monotonic() - began

    def _set_admitted(self) -> None:
        """The request is a job on disk, or is over."""
        if self.is_admitted:
            self.is_admitted = False
            self.tracker.admitted()

    def _reserve_key(self, key: str) -> None:
        if not 1 <= len(key) <= IDEMPOTENCY_KEY_LIMIT:
            raise HTTPException(422, f"Idempotency-Key must have 1 to {IDEMPOTENCY_KEY_LIMIT} characters")
        digest = hashlib.sha256(b"".join(message.get("body", b"") for message in self.body)).hexdigest()
        whose = json.dumps([key, user_of(self.scope), self.middleware.type])
        self.key = hashlib.sha256(whose.encode()).hexdigest()[:32]
        try:
            reservation, is_first = self.tracker.reserve_key(self.key, digest)
        except StoreError as error:
            raise HTTPException(503, f"The jobs cannot be read, so a repeat cannot be told: {error}") from None
        if is_first:
            self.reservation = reservation
        elif reservation.digest != digest:
            raise HTTPException(422, MISUSED_KEY)
        else:
            raise DuplicateRequest(reservation)

    # CHECKING -> WAITING -> GENERATING -> ENCODING, on the host's worker thread

    def on_lock_wanted(self) -> None:
        """The host's route asks for the queue lock: that makes it a job. Raises Parked."""
        with self._lock:
            if self.phase is not Phase.CHECKING:
                return
            self.phase = Phase.WAITING
        if self.was_parked:
            self.tracker.ask_for_lock(self.job.id)
            return
        body = b"".join(message.get("body", b"") for message in self.body)
        if self.key is None:  # otherwise it may come to be the repeat of a job that fails, and be sent once more
            self.body.clear()
        with log_errors("accepting a job"):
            client = self.scope.get("client")
            self.job = Job(
                id=self.reserved_id or self.tracker.store.reserve_id(),
                type=self.middleware.type,
                status=PENDING,
                timestamp=int(self.tracker.store.now()),
                ip=client[0][:IP_LIMIT] if client else None,
                prompt=self.prompt[:PROMPT_LIMIT],
                key=self.key,
                digest=self.reservation.digest if self.reservation else None,
                bytes=len(body),
                has_request=True,
                promised=self.parks,
                parked=self.parks,
                label=self.label,
                webhook=self.webhook,
            )
            if self.parks:
                self.written = self.tracker.park(self.job, body)
            else:
                self.is_live = True
                self.written = self.tracker.accept(self.job, self.cancel, body)
        if self.written is None:
            self._in_loop(self._set_on_disk, False)
        else:
            self.written.add_done_callback(self._on_written)
        if self.parks:
            self.host.dequeue(self.task_id)
            raise Parked

    def withdraw(self) -> bool:
        """The client is to be told that the job could not be parked. False if it could."""
        return self.written is None or self.tracker.withdraw(self.job, self.written)

    def _on_written(self, written: Future) -> None:
        duplicate = self._duplicate()
        with self._lock:
            # One that has the lock is told of it where it waits to begin. If it did not wait so long, it goes on.
            ends = duplicate is not None and (self.parks or self.phase is Phase.WAITING)
            if ends:
                self.cancelled = self.response.error = duplicate
        if ends:
            self.host.dequeue(self.task_id)
            self._in_loop(set_once, self.over, None)
        self._in_loop(self._set_on_disk, written.exception() is None)

    def _duplicate(self) -> Optional[Exception]:
        """What the request comes to if another webui was first with its key, in the same moment. None if none was."""
        taken = self.written.exception() if self.written is not None and self.written.done() else None
        if not isinstance(taken, KeyTaken):
            return None
        if taken.digest != self.job.digest:
            return HTTPException(422, MISUSED_KEY)
        return DuplicateRequest(KeyReservation(taken.digest, taken.job_id))

    def _set_on_disk(self, on_disk: bool) -> None:
        if not self._duplicate():
            self.body.clear()
        self._set_admitted()
        set_once(self.on_disk, on_disk)
        if on_disk and self.reservation:
            set_once(self.reservation.outcome, self.job.id)

    def on_lock_acquired(self) -> None:
        """The route has the queue lock. Raises what it comes to if it is to give it back at once."""
        with self._lock:
            if self.cancelled:  # which it comes to; the host would report that, where it knows the error's kind
                raise NotStarted
            self.phase = max(self.phase, Phase.GENERATING)
        if self.was_parked:
            if self.is_live:  # it has had the lock before
                return
            if not self.tracker.start_parked(self.job.id, self.cancel):
                self.host.dequeue(self.task_id)
                raise NotStarted
            self.is_live = True
            self._in_loop(set_once, self.started, None)
        elif self.job is not None:
            begins = True
            with log_errors("starting a job"):
                begins = self.tracker.start(self.job.id)
            duplicate = self._duplicate()
            if duplicate or not begins:
                self.tracker.generated()
                self.host.dequeue(self.task_id)
                raise duplicate or NotHere()

    def on_lock_released(self) -> None:
        """The route is about to give the queue lock back."""
        with self._lock:
            self.phase = max(self.phase, Phase.ENCODING)  # the task ends before its thread where the server is stopped
        self.tracker.generated()

    # WAITING or GENERATING, on any thread

    def cancel(self, is_taken: bool = False) -> bool:
        """Fails the job now if it waits, or when the host has stopped it if it runs. False if that has ended.

        If another webui has taken the job, it only does not begin: one that runs goes on.
        """
        with self._lock:
            if self.cancelled or self.phase is Phase.ENDED:
                return self.cancelled is not None
            is_waiting = self.phase is Phase.WAITING
            if is_taken and not is_waiting:
                return False
            self.cancelled = NotHere() if is_taken else Cancelled()  # and the route cannot get the queue lock any more
        if not is_taken:
            log.info("Job %s was cancelled", self.job.id)
        if is_waiting:
            self.response.error = self.cancelled
            self.host.dequeue(self.task_id)
            self.tracker.fail(self.job.id, CANCELLED)
            self._in_loop(set_once, self.over, None)
        else:
            self._in_loop(self._interrupt)
        return True

    def _interrupt(self) -> None:
        """Interrupts the host again and again, for a generation resets the mark when it begins."""
        with self._lock:  # which keeps the route from releasing the queue lock, so that no other is interrupted
            if self.phase is Phase.GENERATING:
                self.host.interrupt()
                self._loop.call_later(INTERRUPT_EVERY, self._interrupt)

    # ENDED, in the task

    async def _end_unstarted(self) -> None:
        """The host refused a parked job before it was generated, as it may after an update, or it did not begin."""
        if isinstance(self.response.error, (NotStarted, asyncio.CancelledError)):
            return
        reason = self.response.reason() if self.response.failed else "The webui answered without its queue lock"
        log.warning("Job %s failed: %s", self.job.id, escape_for_log(reason))
        with contextlib.suppress(StoreError):  # it is logged, and the job still parked
            await asyncio.wrap_future(self.tracker.fail_parked([self.job.id], reason))

    async def _end_job(self) -> None:
        """Stores the job's end, once the job itself is on disk."""
        try:
            await self._store_in_turn()
        except asyncio.CancelledError:  # the server is stopped by force, which ends no thread
            self.stored.add_done_callback(lambda stored: stored.result() or self._begin_to_store(is_last=True))
            raise

    async def _store_in_turn(self) -> None:
        size, began = len(self.response.body), time.monotonic()
        while not self.tracker.reserve_memory(size):
            if time.monotonic() - max(began, self.tracker.stored_at) > GIVE_UP_AFTER:  # nothing is stored any more
                self._give_up()
                return
            await asyncio.sleep(0.2)
        try:
            # Where this takes long, the client was told of no job.
            await asyncio.wait({self.on_disk}, timeout=GIVE_UP_AFTER)
            if not self.on_disk.done():
                self._give_up()
            elif self.on_disk.result():
                await self._store_when_told()
        finally:
            self.tracker.free_memory(size)

    def _give_up(self) -> None:
        """The disk does not answer. The client gets its images, but they are not stored: they would fill the memory."""
        log.error("Job %s was generated, but is not stored: the disk does not answer", self.job.id)
        lost = "Generated, but not stored: the disk did not answer"
        reason = self.response.reason() if self.response.failed else lost
        self.tracker.fail(self.job.id, reason)  # as soon as the disk answers

    def _report_failure(self) -> None:
        """Logs a failure that the host does not see, since its client got the head before, or has left.

        Raised to the host, it would be a crash of the server, which each of its layers reports, or none, as on Forge.
        """
        error = self.response.error
        if self.passed_on.result() or isinstance(error, (asyncio.CancelledError, Cancelled, NotHere)):
            return
        is_plain = error is None or isinstance(error, HTTPException)  # an answer, though not one of success
        details = "" if is_plain else "\n" + format_host_traceback(error)
        log.warning("Job %s failed: %s%s", self.job.id, escape_for_log(self.response.reason()), details)

    async def _store_when_told(self) -> None:
        """Stores the outcome. It gives a fast client a moment to receive the answer: storing competes with sending."""
        if self.response.failed:
            await asyncio.wait({self.passed_on})
            with log_errors("logging a failure"):
                self._report_failure()
        else:
            await asyncio.wait({self.client_done}, timeout=STORE_DELAY)
        for pause in STORE_AGAIN:
            if await asyncio.shield(asyncio.wrap_future(self._begin_to_store())):
                return
            await asyncio.sleep(pause)  # in no thread, for other answers may be stored meanwhile
        await asyncio.shield(asyncio.wrap_future(self._begin_to_store(is_last=True)))

    def _begin_to_store(self, is_last: bool = False) -> Future:
        pool = self.tracker.senders if self.response.failed else self.tracker.storers  # a failure needs no disk of ours
        self.stored = pool.submit(self._store, is_last)
        return self.stored

    def _store(self, is_last: bool) -> bool:
        """False if it is to be tried again."""
        if self.response.failed:
            self.tracker.fail(self.job.id, self.response.reason())
            return True
        try:
            answer = self.response.answer()
            if not answer.images and self.host.hides_failures():
                log.warning("Job %s failed: %s", self.job.id, NO_IMAGE)
                self.tracker.fail(self.job.id, NO_IMAGE)
                return True
            return self.tracker.finish(self.job.id, answer, is_last)
        except Exception as error:  # the job is to say whatever it was, and the client has its images
            log.error("Job %s was generated, but could not be stored: %s", self.job.id, escape_for_log(repr(error)))
            self.tracker.fail(self.job.id, f"Generated, but it could not be stored: {reason_of(error)}")
            return True


@contextlib.contextmanager
def log_errors(where: str) -> Iterator[None]:
    """Around our code on the host's thread: what goes wrong in it is logged, and the generation goes on."""
    try:
        yield
    except Exception:
        log.exception("Job Tracker failed in %s, the generation goes on", where)


def set_once(future: Any, value: Any) -> None:
    if not future.done():
        future.set_result(value)


def observed_endpoint(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A host's endpoint that tells the current generation that it is called."""

    def call(**arguments: Any) -> Any:
        generation = current.get()
        if generation is not None:
            generation.on_endpoint(arguments)
        return endpoint(**arguments)

    return call


class ObservedLock:
    """Stands for the host's queue lock, and tells the current generation that it asks for it, has it, and is done.

    Does not change the lock's order. Ignores callers that are not tracked generations. Every host uses `with`.
    """

    def __init__(self, lock: Any):
        self._lock = lock

    def __enter__(self) -> Any:
        generation = current.get()
        if generation is None:
            return self._lock.__enter__()
        generation.on_lock_wanted()
        entered = self._lock.__enter__()
        try:
            generation.on_lock_acquired()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return entered

    def __exit__(self, *error: Any) -> Any:
        generation = current.get()
        if generation is not None:
            generation.on_lock_released()
        return self._lock.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


class HostResponse:
    """What the host's route came to: its answer, or what it raised."""

    def __init__(self) -> None:
        self.head: Optional[Message] = None
        self._chunks: List[bytes] = []  # of the body
        self.error: Optional[BaseException] = None
        self.send_images: Optional[bool] = True  # to the client, as it said: null is no. The host answers with them
        self._answer: Optional[Answer] = None
        self._reading = threading.Lock()  # guards this one

    async def send(self, message: Message) -> None:
        """For the route to send with."""
        if message["type"] == "http.response.start":
            self.head = message
        else:
            self._chunks.append(message.get("body", b""))

    def clear(self) -> None:
        self.head, self._chunks, self.error, self._answer = None, [], None, None

    @property
    def body(self) -> bytes:
        return b"".join(self._chunks)

    @property
    def failed(self) -> bool:
        """Whether there is no answer of success, or not yet."""
        return self.error is not None or self.head is None or not 200 <= self.head["status"] < 300

    def answer(self) -> Answer:
        """The body in parts, with the parameters as the client sent them. It is read once, by whoever comes first."""
        with self._reading:
            if self._answer is None:
                answer = split_answer(self.body)
                self._answer = answer if self.send_images else with_images_hidden(answer, self.send_images)
            return self._answer

    def body_for_client(self) -> bytes:
        """Of an answer of success, as the client asked for it."""
        return self.body if self.send_images else self.answer().rest

    def chunks_for_client(self) -> Iterator[bytes]:
        body = self.body_for_client()
        for start in range(0, len(body), CHUNK):
            yield body[start : start + CHUNK]

    def reason(self) -> str:
        """Why it failed, for its user."""
        if isinstance(self.error, asyncio.CancelledError):
            return "The webui was stopped"
        if self.error is not None:
            name = text = type(self.error).__name__
            with contextlib.suppress(Exception):  # an exception of an extension's may fail at that, too
                text = str(getattr(self.error, "detail", "") or reason_of(self.error))
            return f"{name}: {text}" if text not in ("", name) else name
        if self.head is None:
            return "The webui gave no answer"
        return f"The webui answered {self.head['status']}: {self.body[:1000].decode('utf-8', 'replace')}"


def with_error_kept(app: ASGIApp) -> ASGIApp:
    """A route's application whose error is the current generation's, before the layers around make an answer of it."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:
            current.get().response.error = error

    return call


class Runner:
    """Generates parked jobs, in order of acceptance, in a thread with an event loop of its own.

    It always has one of them ask for the host's queue lock, so that parked and connected requests take turns. Which
    webui on the folder generates a job is decided when it has the lock: whoever is free first starts it, on disk.
    """

    DELAY = 0.5  # seconds at the start, in which other extensions are told of it, too
    PAUSE = 0.1  # seconds after a look that found none: in a fleet something changes all the time
    RETRY = 5.0  # seconds after trouble
    LOADING = 1.0  # seconds between two looks whether the host is ready
    IDLE = 10.0  # seconds between two looks while nobody says that a job was parked

    def __init__(self, routes: Dict[str, Middleware], tracker: Tracker):
        """`routes` are copies of the host's generation routes that need no credentials, by type."""
        self.routes = routes
        self.tracker = tracker
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._trouble = ""
        threading.Thread(target=lambda: asyncio.run(self._run()), name="job-tracker-runner", daemon=True).start()

    async def _run(self) -> None:
        self._loop, self._parked = asyncio.get_running_loop(), asyncio.Event()
        self.tracker.on_parked = self._wake
        pause = 0.0
        runs: Set["asyncio.Task[None]"] = set()  # that have begun to generate
        await asyncio.sleep(self.DELAY)
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._parked.wait(), pause)
            if self.tracker.stopping.is_set():
                break
            self._parked.clear()
            try:
                pause = await self._start_next(runs) if self.tracker.host.is_ready() else self.LOADING
            except Exception as error:
                if self.tracker.stopping.is_set():  # the tracker's threads end, too
                    break
                self._report(error)
                pause = self.RETRY
        await asyncio.gather(*runs, return_exceptions=True)

    def _wake(self) -> None:
        """Called from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._parked.set)

    def _report(self, error: Exception) -> None:
        """Logs a trouble when it begins, not each time that it shows."""
        trouble = f"{type(error).__name__}: {details_of(error)}"
        if trouble != self._trouble:
            log.error("Jobs that wait cannot be generated now: %s", trouble, exc_info=not isinstance(error, StoreError))
        self._trouble = trouble

    async def _start_next(self, runs: Set["asyncio.Task[None]"]) -> float:
        """Has the oldest parked job generated. Returns when that begins, with seconds until the next look."""
        found = await self.tracker.in_pool(self.tracker.next_parked)
        if self._trouble:
            log.info("Jobs that wait can be generated again")
        self._trouble = ""
        if found is None:
            await asyncio.sleep(self.PAUSE)
            return self.IDLE
        job, body = found
        generation = self._generation(job, body)
        run = generation.begin()
        await asyncio.wait({run, generation.started}, return_when=asyncio.FIRST_COMPLETED)
        if generation.started.done():
            runs.add(run)
            run.add_done_callback(runs.discard)
            return 0
        left = await self.tracker.in_pool(self.tracker.get, job.id)
        return self.RETRY if left is not None and left.parked else 0

    def _generation(self, job: Job, body: bytes) -> Generation:
        """A run of the host's route for a kept request."""
        middleware = self.routes[job.type]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": f"/sdapi/v1/{job.type}",
            "raw_path": f"/sdapi/v1/{job.type}".encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
            "client": (job.ip or "127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
            OuterMiddleware.KEY: ConnectionState(),
        }
        message = {"type": "http.request", "body": body, "more_body": False}
        return Generation(middleware, scope, [message], parked=job)


# ------------------------------------------------------------------------------------------------------------------
# Events: what those are told who watch a job
# ------------------------------------------------------------------------------------------------------------------
#
# Server-Sent Events, WHATWG HTML, 9.2. A watch follows one job for all its listeners: it looks at the job, and makes
# the bytes of each event once, in threads. A listener is one response. It has no queue: each time that it can send, it
# takes what is newest of each kind, so that a slow client skips what is outdated and costs no memory.

STATUS_EVENT, PROGRESS_EVENT, PREVIEW_EVENT = EVENT_KINDS = ("status", "progress", "preview")
LAST_EVENT = "ended"  # the ID of a job's last event. A browser sends it when it connects again, as it does by itself
LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")  # in JSON they are white space, in an event its end
EVENT_COMMENT = b":\n\n"


def event(kind: str, data: bytes, event_id: str = "") -> bytes:
    return b"event: %s\n%sdata: %s\n\n" % (
        kind.encode(),
        b"id: %s\n" % event_id.encode() if event_id else b"",
        data.translate(LINE_ENDS),
    )


class Look(NamedTuple):
    """What a watch has seen of its job. The bytes are events."""

    job: Job
    status: bytes
    place: Tuple[Any, Any]  # how far the job is, of which a change is worth an event
    progress: bytes
    preview: bytes  # empty where there is no other one than at the look before
    preview_number: Optional[int]


class Listener:
    """The events of one response, from the job as it is to its end. All its methods are the event loop's."""

    def __init__(self, watch: "Watch", kinds: Tuple[str, ...], connection: ConnectionState):
        self.kinds = kinds
        self.connection = connection
        self._watch = watch
        self._sent = watch.numbers_for_new()  # of the last event of each kind
        self._woken = asyncio.get_running_loop().create_future()
        self._left = False

    def __aiter__(self) -> "Listener":
        return self

    async def __anext__(self) -> bytes:
        while not self._left:
            events = self._watch.events_after(self._sent, self.kinds)
            if events:
                return events
            if self._watch.over:
                break
            loop = asyncio.get_running_loop()
            self._woken = loop.create_future()
            timer = loop.call_later(HEARTBEAT, set_once, self._woken, EVENT_COMMENT)
            try:
                comment = await self._woken
            finally:
                timer.cancel()
            if comment:
                return comment
        raise StopAsyncIteration

    def wake(self) -> None:
        set_once(self._woken, None)

    def leave(self, _: Any = None) -> None:
        """The client has left."""
        self._left = True
        self.wake()

    async def aclose(self) -> None:
        self._watch.remove(self)


class Watch:
    """Follows a job for all who listen to it, until that has ended or nobody listens any more."""

    EVERY = 0.5  # seconds from one look at the job to the next

    def __init__(self, events: "Events", job_id: str, root: str):
        """`root` is what the paths of images begin with."""
        self.key = job_id, root
        self.listeners: Dict[Listener, None] = {}
        self.over = False  # there will be no other event
        self._events, self._tracker = events, events.tracker
        self._job_id, self._root = job_id, root
        self._newest: Dict[str, Tuple[int, bytes]] = {}  # events by kind, with their numbers
        self._last: Optional[Look] = None
        self._following = asyncio.get_running_loop().create_task(self._follow())

    def add(self, kinds: Tuple[str, ...], connection: ConnectionState) -> Listener:
        listener = Listener(self, kinds, connection)
        self.listeners[listener] = None
        return listener

    def remove(self, listener: Listener) -> None:
        self.listeners.pop(listener, None)
        if not self.listeners:
            self.end()

    def end(self) -> None:
        """Ends the listeners' responses, once they have sent what is new."""
        if not self.over:
            self.over = True
            self._events.forget(self)
            self._following.cancel()
            self._events.wake(self.listeners)

    def events_after(self, sent: Dict[str, int], kinds: Tuple[str, ...]) -> bytes:
        """The newest event of each kind, unless it has been sent. Notes in `sent` that it has."""
        new = []
        for kind in kinds:
            number, data = self._newest.get(kind, (0, b""))
            if number > sent.get(kind, 0):
                sent[kind] = number
                new.append(data)
        return b"".join(new)

    def numbers_for_new(self) -> Dict[str, int]:
        """The progress stands in the job as it is, with which each response begins."""
        number, _ = self._newest.get(PROGRESS_EVENT, (0, b""))
        return {PROGRESS_EVENT: number}

    async def _follow(self) -> None:
        try:
            while not self._tracker.closing.is_set():
                pause = self._events.pause(self.EVERY)
                try:
                    if await self._look():
                        break
                    await self._tracker.wait(self._job_id, pause)  # for its end is told at once
                except StoreError:  # later, perhaps
                    await asyncio.sleep(pause)
        except Exception:
            log.exception("Job %s cannot be watched", self._job_id)
        finally:
            self.end()

    async def _look(self) -> bool:
        """Tells the listeners what has changed. True if nothing will any more. Raises StoreError."""
        running = self._tracker.running(self._job_id)
        wants_preview = any(PREVIEW_EVENT in listener.kinds for listener in self.listeners)
        pool = self._tracker.pool_for(running)
        look = await self._tracker.in_pool(self._look_in_thread, running, self._last, wants_preview, pool=pool)
        if look is None:  # the job was deleted
            return True
        last, self._last = self._last, look
        is_new_status = last is None or look.job.status != last.job.status
        # The status is kept up to date for those who are new.
        self._set(STATUS_EVENT, look.status, is_new_status)
        changed = {STATUS_EVENT} if is_new_status else set()
        if look.job.ended:
            self._newest = {STATUS_EVENT: self._newest[STATUS_EVENT]}
        else:
            if last is not None and look.place != last.place and not is_new_status:
                self._set(PROGRESS_EVENT, look.progress)
                changed.add(PROGRESS_EVENT)
            if look.preview:
                self._set(PREVIEW_EVENT, look.preview)
                changed.add(PREVIEW_EVENT)
        self._events.wake(listener for listener in self.listeners if changed.intersection(listener.kinds))
        return look.job.ended

    def _set(self, kind: str, data: bytes, is_new: bool = True) -> None:
        number, _ = self._newest.get(kind, (0, b""))
        self._newest[kind] = number + is_new, data

    def _look_in_thread(self, job: Optional[Job], last: Optional[Look], wants_preview: bool) -> Optional[Look]:
        job = job or self._tracker.get(self._job_id)
        if job is None:
            return None
        standing = self._tracker.standing([job], wants_preview)
        description = self._tracker.describe(job, root=self._root, standing=standing)
        progress = {name: description[name] for name in ("progress", "eta", "queue_position")}
        data = b"".join(description_as_json(description)) + b"}"
        number, preview = last and last.preview_number, b""
        # The one that is begun now is seen at the next look.
        seen = self._tracker.newest_preview(job, standing) if wants_preview else None
        if seen is not None and seen.number != number:
            uri = b"data:%s;base64,%s" % (seen.media_type.encode(), base64.b64encode(seen.data))
            number, preview = seen.number, event(PREVIEW_EVENT, uri)
        return Look(
            job,
            event(STATUS_EVENT, data, LAST_EVENT if job.ended else ""),
            (progress["progress"], progress["queue_position"]),
            event(PROGRESS_EVENT, as_json(progress)),
            preview,
            number,
        )


class Events:
    """All watches, and what they share: the event loop, which they are not to hold."""

    LOOKS = 100  # the most, by all watches together in a second
    BATCH = 8  # listeners that are woken at a time: each sends through all the layers of the host
    BATCH_PAUSE = 0.002  # seconds after that
    CHECK_EVERY = 0.5  # seconds between two checks whether the server stops

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self._watches: Dict[Tuple[str, str], Watch] = {}  # by job and root, which is in the URLs of images
        self._to_wake: Dict[Listener, None] = {}
        self._waking: Optional["asyncio.Task[None]"] = None
        self._checking: Optional["asyncio.Task[None]"] = None

    def listen(self, job_id: str, root: str, with_preview: bool, connection: ConnectionState) -> Listener:
        """The events of a response, to be closed at its end."""
        key = job_id, root
        if key not in self._watches:
            self._watches[key] = Watch(self, job_id, root)
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self._check_server())
        return self._watches[key].add(EVENT_KINDS if with_preview else EVENT_KINDS[:2], connection)

    def pause(self, seconds: float) -> float:
        """The seconds between two looks of a watch: more where there are many."""
        return max(seconds, len(self._watches) / self.LOOKS)

    def forget(self, watch: Watch) -> None:
        """A watch is over."""
        if self._watches.get(watch.key) is watch:
            del self._watches[watch.key]

    def wake(self, listeners: Iterable[Listener]) -> None:
        """Has listeners send what is new, a few at a time."""
        self._to_wake.update(dict.fromkeys(listeners))
        if self._to_wake and (self._waking is None or self._waking.done()):
            self._waking = asyncio.get_running_loop().create_task(self._wake())

    async def _wake(self) -> None:
        while self._to_wake:
            for listener in list(itertools.islice(self._to_wake, self.BATCH)):
                del self._to_wake[listener]
                listener.wake()
            await asyncio.sleep(self.BATCH_PAUSE)

    async def _check_server(self) -> None:
        """Ends all watches with the webui, and where the server waits for their responses, to end itself."""
        while self._watches:
            await asyncio.sleep(self.CHECK_EVERY)
            listeners = [next(iter(watch.listeners), None) for watch in self._watches.values()]
            stops = any(listener is not None and listener.connection.server_stops() for listener in listeners)
            if stops or self.tracker.closing.is_set():
                for watch in list(self._watches.values()):
                    watch.end()


# ------------------------------------------------------------------------------------------------------------------
# API: the routes under /sdapi/v1/job
# ------------------------------------------------------------------------------------------------------------------


def nullable(description: str) -> Any:
    """A field that can be null. Only pydantic 2 says so by itself in the documentation."""
    return Field(None, description=description, **({"nullable": True} if PYDANTIC.startswith("1.") else {}))


class WebhookState(BaseModel):
    """Where a job's end is sent, and how that stands."""

    url: str
    delivered: bool
    attempts: int = Field(description="how often it was tried")


class JobSummary(BaseModel):
    """A job without image data."""

    id: str = Field(description="8 characters of A-Z a-z 0-9, as sent in the header X-Job-ID")
    type: Literal[TYPES]
    status: Literal[STATUSES]
    prompt: str
    timestamp: int = Field(description="when the job was accepted, in Unix seconds")
    ip: Optional[str] = nullable("address of the client")
    started: Optional[float] = nullable("when generation began, in Unix seconds")
    finished: Optional[float] = nullable("when the job ended, in Unix seconds; null if its webui ended before it")
    error: Optional[str] = nullable("why the job failed, what is missing of it, or why its end is not stored yet")
    queue_position: Optional[int] = nullable("while Pending: 1 is next")
    progress: Optional[float] = nullable("while Processing: 0 to 1")
    eta: Optional[float] = nullable("while Processing: seconds that are left, if that can be told")
    retry_of: Optional[str] = nullable("the Failed job that this one repeats")
    label: Optional[str] = nullable("the header X-Job-Label of the request")
    server: Optional[str] = nullable("the webui that generates it, or did; null while it waits for a free one")
    webhook: Optional[WebhookState] = nullable("where the job's end is sent, if anywhere")
    parameters: Optional[Dict[str, Any]] = nullable(
        "as the webui answered. Except in a job with its images, with a note in the place of each text of more than "
        "1,000 characters, and of lists and objects that are too much, so that it has some 64 kB at most. null until "
        "Completed"
    )
    info: Optional[str] = nullable("JSON text, as the webui answered; null until Completed")
    image_count: int = Field(description="how many images the job has")
    image_urls: List[str] = Field(
        description="the images as files, in the webui's order: paths, or URLs that a bucket takes for an hour"
    )


class JobWithImages(JobSummary):
    """A job. With `images=false` it has no `images`."""

    images: List[Optional[str]] = Field(
        [], description="base64, in the webui's order; empty until Completed; null for a file that is gone"
    )


class JobCount(BaseModel):
    """What was done to all jobs that match."""

    jobs: int = Field(description="how many there were")


class JobStats(BaseModel):
    """All jobs together."""

    jobs: Dict[str, int] = Field(description="how many there are, by status")
    bytes: int = Field(description="what the files of all jobs have")
    oldest_pending: Optional[float] = nullable("seconds that the oldest Pending job has waited; null if none waits")
    enabled: bool = Field(description="whether generations become jobs")
    version: str = Field(description="Job Tracker's")
    servers: List[str] = Field(description="the webuis that share the jobs, and live")


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


def text_header(description: str, **schema: Any) -> Dict[str, Any]:
    return {"description": description, "schema": {"type": "string", **schema}}


def example(value: Any) -> Dict[str, Any]:
    return {"application/json": {"example": value}}


def problem(description: str, detail: Optional[str] = None) -> Dict[str, Any]:
    """An error, with an example of its detail."""
    return {
        "model": Problem,
        "description": description,
        **({"content": example({"detail": detail})} if detail else {}),
    }


# The filters of all routes that have some: what each means, and the schema that its values must fit
FILTERS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "ip": ("address of the client", {"type": "string"}),
    "status": ("case ignored", {"type": "string", "enum": list(STATUSES)}),
    "type": ("case ignored", {"type": "string", "enum": list(TYPES)}),
    "after": ("accepted after this moment, in Unix seconds", {"type": "number"}),
    "before": ("accepted before this moment, in Unix seconds", {"type": "number"}),
    "label": ("as in the header X-Job-Label of the request", {"type": "string", "maxLength": LABEL_LIMIT}),
    "q": ("text in the prompt, case ignored", {"type": "string", "maxLength": Filter.LIMIT}),
}


def filter_value(name: str, value: Any, is_json: bool) -> Any:
    """The value of a filter, from JSON or from the text in a URL. Raises ValueError that says what it must be."""
    _, schema = FILTERS[name]
    if schema["type"] == "number":
        with contextlib.suppress(ValueError, OverflowError):
            if type(value) in ((int, float) if is_json else (str,)) and math.isfinite(float(value)):
                return float(value)
        raise ValueError("it must be a finite number")
    if not isinstance(value, str):
        raise ValueError("it must be text")
    if len(value) > schema.get("maxLength", math.inf):
        raise ValueError(f"it must have at most {schema['maxLength']} characters")
    return one_of(value, schema["enum"]) if "enum" in schema else value


# What is null is in no example: fastapi leaves it out.
COMPLETED_EXAMPLE = {
    "id": "A3f9K2xY",
    "type": "txt2img",
    "status": COMPLETED,
    "prompt": "a lighthouse",
    "timestamp": 1736712000,
    "ip": "192.0.2.7",
    "started": 1736712000.25,
    "finished": 1736712009.5,
    "parameters": {"prompt": "a lighthouse", "seed": -1, "steps": 20},
    "info": '{"prompt": "a lighthouse", "seed": 7, "infotexts": ["a lighthouse\\nSteps: 20, Seed: 7"]}',
    "label": "album 7",
    "server": "gpu1:7860",
    "image_count": 1,
    "image_urls": ["/sdapi/v1/job/A3f9K2xY/images/0"],
    "webhook": {"url": "https://example.org/job-ended", "delivered": True, "attempts": 1},
}
UNFINISHED = {"finished": None, "parameters": None, "info": None, "image_count": 0, "image_urls": []}
NOT_TOLD = {**COMPLETED_EXAMPLE["webhook"], "delivered": False, "attempts": 0}
WAITING = {"status": PENDING, "started": None, "server": None, "webhook": NOT_TOLD, "queue_position": 3}
PENDING_EXAMPLE = {**COMPLETED_EXAMPLE, **UNFINISHED, **WAITING}
PROCESSING_EXAMPLE = {**COMPLETED_EXAMPLE, **UNFINISHED, "status": PROCESSING, "webhook": NOT_TOLD, "progress": 0.0}
CANCELLED_EXAMPLE = {**COMPLETED_EXAMPLE, **UNFINISHED, "status": FAILED, "finished": 1736712002.5, "error": CANCELLED}

# The answers of each route, besides those that fastapi finds by itself
ANY_ROUTE_DOCS = {
    401: problem("Missing or wrong credentials"),
    503: problem("The jobs cannot be read or changed now"),
}
ONE_JOB_DOCS = {404: problem("There is no such job", "Job not found")}
CONFLICT_DOCS = {409: problem("The job's status does not allow this", "The job is Completed")}
FOREIGN_DOCS = {
    403: problem(
        "A browser says that a page of another origin asks, which --cors-allow-origins does not name",
        OriginGuard.REFUSAL,
    )
}
JOB_DOCS = {200: {"description": "The job", "content": example({**COMPLETED_EXAMPLE, "images": ["iVBORw0K…"]})}}
CANCEL_DOCS = {
    200: {"description": "The job, which ends as Failed", "content": example(CANCELLED_EXAMPLE)},
    202: {
        "description": "The job, which another webui has, and has not ended yet, though it was asked to",
        "content": example(PROCESSING_EXAMPLE),
    },
    **CONFLICT_DOCS,
}
RETRY_DOCS = {
    202: {
        "description": "The new job",
        "content": example({**PENDING_EXAMPLE, "retry_of": "c7Rm2QzB"}),
        "headers": {JOB_HEADER: text_header("the new job's ID"), "Location": text_header("the new job's path")},
    },
    **CONFLICT_DOCS,
    410: problem("The request of this job is no longer kept", "The request of this job is no longer kept"),
    429: problem("Too many jobs wait already: try again after `Retry-After` seconds"),
}
JOBS_DOCS = {
    200: {
        "description": "The jobs, newest first",
        "content": example([PENDING_EXAMPLE, COMPLETED_EXAMPLE]),
        "headers": {"Link": text_header('the next page: <…>; rel="next"')},
    }
}
# For what is done to many jobs, which is refused where one is empty
FULL_FILTERS = {
    name: (description, {**schema, "minLength": 1} if schema["type"] == "string" else schema)
    for name, (description, schema) in FILTERS.items()
}
FILTERS_DOCS, FULL_FILTERS_DOCS = (
    {
        "parameters": [
            {"name": name, "in": "query", "required": False, "description": description, "schema": schema}
            for name, (description, schema) in filters.items()
        ]
    }
    for filters in (FILTERS, FULL_FILTERS)
)
FULL_FILTERS_BODY_DOCS = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        name: {"description": description, **schema}
                        for name, (description, schema) in FULL_FILTERS.items()
                    },
                    "additionalProperties": False,
                    "minProperties": 1,
                },
                "example": {"status": PENDING, "ip": "192.0.2.7"},
            }
        },
    }
}
COUNT_DOCS = {
    200: {"description": "It is done", "content": example({"jobs": 3})},
    422: {
        "description": "There is no filter, or one that is unknown, empty or invalid",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}},
    },
}
STATS_EXAMPLE = {
    "jobs": {PENDING: 3, PROCESSING: 1, COMPLETED: 250, FAILED: 2},
    "bytes": 312_500_000,
    "oldest_pending": 42.5,
    "enabled": True,
    "version": VERSION,
    "servers": ["gpu1:7860"],
}
STATS_DOCS = {200: {"description": "All jobs together", "content": example(STATS_EXAMPLE)}}
IMAGE_DOCS = {
    200: {
        "description": "The image",
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary"}}
            for media_type in (*MEDIA_TYPES.values(), OTHER_MEDIA_TYPE)
        },
        "headers": {
            "ETag": text_header("for If-None-Match"),
            "Cache-Control": text_header("an image never changes: it may be kept, but not shared"),
            "Content-Disposition": text_header("with the name of the file"),
        },
    },
    304: {"description": "If-None-Match names the image that the client has"},
    404: problem("There is no such job, or no such image of it", "The job has no such image"),
}

PREVIEW_DOCS = {
    200: {
        "description": "The picture as it is now",
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary"}}
            for media_type in ("image/png", "image/jpeg", "image/webp")
        },
        "headers": {"ETag": text_header("for If-None-Match"), "Cache-Control": text_header("no-store")},
    },
    304: {"description": "If-None-Match names the picture that the client has: there is no newer one"},
    404: problem("There is no such job, or no preview of it now", "Job not found"),
}
EVENTS_EXAMPLE = (
    b"".join(
        (
            event(STATUS_EVENT, as_json(PROCESSING_EXAMPLE)),
            event(PROGRESS_EVENT, as_json({"progress": 0.25, "eta": 6.9, "queue_position": None})),
            event(PREVIEW_EVENT, b"data:image/png;base64,iVBORw0K..."),
            event(STATUS_EVENT, as_json(COMPLETED_EXAMPLE), LAST_EVENT),
        )
    )
).decode()
EVENTS_DOCS = {
    200: {
        "description": "Server-Sent Events until the job has ended. The data of `status` is a JobSummary as JSON, that "
        "of `progress` has three of its fields, that of `preview` is a data: URI. The last event has the ID `ended`",
        "content": {"text/event-stream": {"schema": {"type": "string"}, "example": EVENTS_EXAMPLE}},
    },
    204: {"description": "The client has the last event, says its Last-Event-ID: it is not to connect again"},
}

# What is added to the host's own description of a generation route
PREFER_TEXT = (
    "RFC 7240. respond-async: answer 202 with the job when it is accepted. respond-async, wait=N: what ends within N "
    "seconds (at most 300) is answered as the webui answers it, with its true status, a failure too, and the rest "
    "with 202"
)
KEY_TEXT = "As a UUID. The same key, user, path and body is one generation, however often it is sent"
LABEL_TEXT = "Your own word for the job, such as the name of an album. Lists can be filtered by it"
WEBHOOK_TEXT = "The URL to which the job's end is sent, by POST, as Standard Webhooks has it"
GENERATION_DOCS = {
    # Without examples: Swagger UI would send them, and so one key for all that is tried under /docs.
    "parameters": [
        {"name": "Prefer", "in": "header", **text_header(PREFER_TEXT)},
        {"name": "Idempotency-Key", "in": "header", **text_header(KEY_TEXT, maxLength=IDEMPOTENCY_KEY_LIMIT)},
        {"name": LABEL_HEADER, "in": "header", **text_header(LABEL_TEXT, maxLength=LABEL_LIMIT)},
        {"name": WEBHOOK_HEADER, "in": "header", **text_header(WEBHOOK_TEXT, format="uri", maxLength=URL_LIMIT)},
    ],
    "responses": {
        "200": {
            "headers": {
                JOB_HEADER: text_header("the job's ID, while tracking is enabled; sent before generation starts"),
                "Preference-Applied": text_header("wait=N, of a generation that ended within the N seconds"),
                "Idempotent-Replayed": text_header("true for a stored answer"),
            }
        },
        "422": {
            "description": "The body is invalid, or a header that is for Job Tracker: then `detail` is a text that "
            "says which, and what it must be"
        },
        "429": {"description": "Too many generations wait already: try again after `Retry-After` seconds"},
        "503": {"description": "The job cannot be kept, as Prefer: respond-async or Idempotency-Key needs it"},
        "202": {
            "description": "The job is accepted, as Prefer: respond-async asked for: it outlives the webui",
            "headers": {
                JOB_HEADER: text_header("the job's ID"),
                "Location": text_header("the job's path"),
                "Preference-Applied": text_header("respond-async, and wait=N where that was asked for"),
                "Idempotent-Replayed": text_header("true if the job had ended already"),
            },
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/JobSummary"}, "example": PENDING_EXAMPLE}
            },
        },
    },
}


CHANGING = ("POST", "DELETE")


def endpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the Api that answers requests. Refusals and failures become HTTP statuses.

    The host has checked the credentials before.
    """

    @functools.wraps(function)
    async def answer(api: "Api", request: Request, **arguments: Any) -> Response:
        connection = connection_of(request.scope)
        # A cache may keep a 404 (RFC 9111, 4.2.2), and what is not there now may be there in a moment.
        connection.error_headers = {"Cache-Control": "no-store"}
        if request.method in CHANGING:
            if api.origins.refuses(request.scope, f"call {request.method} {request.scope['route'].path}"):
                raise HTTPException(403, OriginGuard.REFUSAL)
        try:
            return await function(api, request, **arguments)
        except Conflict as reason:
            raise HTTPException(409, str(reason)) from None
        except Gone as reason:
            raise HTTPException(410, str(reason)) from None
        except TooMany as reason:
            connection.error_headers["Retry-After"] = str(TooMany.RETRY_AFTER)
            raise HTTPException(429, str(reason)) from None
        except StoreError as error:
            raise HTTPException(503, f"The jobs cannot be read or changed: {error}") from None
        except ClientDisconnect:
            return Response(status_code=503)  # which nobody reads, while SD.Next logs what is raised

    return answer


FOR_GOOD = "private, max-age=31536000, immutable"  # Cache-Control of what never changes


class Api:
    """The endpoints. They look at jobs in threads of the tracker's own, so that the host's are never needed."""

    BODY_LIMIT = 1 << 16  # bytes of JSON that hold some filters
    NOTICED = 2.0  # seconds within which another webui has ended a job that is to be cancelled

    def __init__(self, tracker: Tracker, origins: OriginGuard):
        self.tracker = tracker
        self.origins = origins
        self.events = Events(tracker)

    def add_to(self, add_route: Callable[..., Any]) -> None:
        """Registers the routes through the host's own `add_api_route`, which guards them as it guards its own."""

        def add(method: str, path: str, function: Callable[..., Any], docs: Dict[int, Any], **more: Any) -> None:
            any_job = {**ANY_ROUTE_DOCS, **(ONE_JOB_DOCS if "{id}" in path else {})}
            responses = {**any_job, **docs, **(FOREIGN_DOCS if method in CHANGING else {})}
            add_route(path, function, methods=[method], tags=["Job Tracker"], responses=responses, **more)

        job, jobs = "/sdapi/v1/job/{id}", "/sdapi/v1/jobs"
        add("GET", job, self.get_job, JOB_DOCS, response_model=JobWithImages)
        add("GET", jobs, self.get_jobs, JOBS_DOCS, response_model=List[JobSummary], openapi_extra=FILTERS_DOCS)
        add("GET", f"{jobs}/stats", self.get_stats, STATS_DOCS, response_model=JobStats)
        add("GET", Tracker.IMAGE_PATH, self.get_image, IMAGE_DOCS, response_class=Response)
        add("HEAD", Tracker.IMAGE_PATH, self.get_image, {}, include_in_schema=False)
        add("GET", f"{job}/preview", self.get_preview, PREVIEW_DOCS, response_class=Response)
        add("HEAD", f"{job}/preview", self.get_preview, {}, include_in_schema=False)
        add("GET", f"{job}/events", self.get_events, EVENTS_DOCS, response_class=StreamingResponse)
        add("POST", f"{job}/cancel", self.cancel_job, CANCEL_DOCS, response_model=JobSummary)
        add("POST", f"{job}/retry", self.retry_job, RETRY_DOCS, response_model=JobSummary, status_code=202)
        add("DELETE", job, self.delete_job, CONFLICT_DOCS, status_code=204)
        count: Dict[str, Any] = {"docs": COUNT_DOCS, "response_model": JobCount}
        add("POST", f"{jobs}/cancel", self.cancel_jobs, openapi_extra=FULL_FILTERS_BODY_DOCS, **count)
        add("DELETE", jobs, self.delete_jobs, openapi_extra=FULL_FILTERS_DOCS, **count)

    # The endpoints

    @endpoint
    async def get_job(
        self,
        request: Request,
        id: str = Path(description="the job's ID"),
        images: bool = Query(True, description="false leaves the image data out"),
        wait: float = Query(
            0,
            ge=0,
            le=300,
            description="seconds to wait for the job's end; from the 15th on, with white space before the JSON",
        ),
    ) -> Response:
        """The job as it is now, or, with `wait`, once it has ended."""
        if wait:
            await self._while_connected(request, self.tracker.wait(id, min(wait, HEARTBEAT)))
        job = await self._get(id)
        if wait <= HEARTBEAT or job.ended:
            return await self._respond(request, job, images)
        # nginx would keep the head and the white space back until the end.
        headers = {**self._json_headers(request), "X-Accel-Buffering": "no"}
        rest = self._wait_on(request, id, images, wait - HEARTBEAT)
        return ClosingStreamingResponse(rest, 200, headers, "application/json")

    def _wait_on(self, request: Request, job_id: str, images: bool, seconds: float) -> AsyncIterator[bytes]:
        """White space while the job goes on, and then the job. The head is out: for trouble, the connection is cut."""
        gzip = Gzip() if accepts_gzip(request.scope) else None

        async def result() -> ThreadedChunks:
            job = await self._get(job_id)
            chunks, pool = self.tracker.as_json(job, images, root_of(request.scope)), self.tracker.pool_for(job)
            return ThreadedChunks(pool, chunks, self.tracker.sending, gzip)

        return after_heartbeats(lambda: self.tracker.wait(job_id, seconds), result, gzip)

    @endpoint
    async def get_jobs(
        self,
        request: Request,
        limit: int = Query(50, ge=1, le=1000, description="jobs at most"),
        cursor: Optional[str] = Query(None, description="from the Link header of the page before"),
    ) -> Response:
        """Jobs that match all filters. When there are more, the header `Link` with `rel="next"` has the next page."""
        filter_ = self._filter("query", request.query_params)
        abandoned = threading.Event()
        pool = self.tracker.searchers if filter_.text else self.tracker.pool
        looking = self.tracker.in_pool(self.tracker.store.query, filter_, limit, cursor, 0, abandoned, pool=pool)
        try:
            page = await self._while_connected(request, looking)
        except InvalidCursor as error:
            raise self._invalid(str(error), "query", "cursor") from None
        finally:
            abandoned.set()
        headers = self._json_headers(request)
        if page.cursor is not None:
            asked = URL("?" + request.scope["query_string"].decode("latin-1"))
            query = asked.include_query_params(cursor=page.cursor).query
            headers["Link"] = f'<{path_of(request.scope)}?{query}>; rel="next"'
        jobs = self.tracker.list_as_json(page.jobs, root_of(request.scope))
        return await self._stream(json_array(jobs), headers)

    @endpoint
    async def get_stats(self, request: Request) -> Response:
        """How many jobs there are, and how this webui is."""
        await self.tracker.wait_until_stored()
        return JSONResponse(await self.tracker.in_pool(self.tracker.stats), headers={"Cache-Control": "no-store"})

    @endpoint
    async def get_image(
        self,
        request: Request,
        id: str = Path(description="the job's ID"),
        n: int = Path(ge=0, le=999_999, description="the image's number, from 0"),
    ) -> Response:
        """One image of a job as a file."""
        job = await self._get(id)
        if n >= len(job.images):
            raise HTTPException(404, "The job has no such image" if job.ended else f"The job is still {job.status}")
        image = job.images[n]
        size = await self.tracker.in_pool(self.tracker.images.size, image.name)
        lost = HTTPException(404, "The image is no longer on disk")
        if size is None:
            raise lost
        gzip = accepts_gzip(request.scope)
        headers = {
            "ETag": f'"{image.file_name}-{size}{"-gzip" * gzip}"',
            "Cache-Control": FOR_GOOD,
            "Content-Disposition": f'inline; filename="{image.file_name}"',
            **IMAGE_HEADERS,
            "Vary": "Accept-Encoding",
        }
        if is_known(request.scope, headers["ETag"]):
            return Response(None, 304, {**headers, **exposed(headers)})
        # Otherwise the host would compress the image itself, on the event loop and to no use.
        headers.update({"Content-Encoding": "gzip"} if gzip else {"Content-Length": str(size)})
        chunks = (b"" for _ in ()) if request.method == "HEAD" else self.tracker.images.read(image.name)
        try:
            return await self._stream(chunks, headers, image.media_type, level=0)
        except StoreError as error:
            raise (error if error.temporary else lost) from None

    @endpoint
    async def get_preview(self, request: Request, id: str = Path(description="the job's ID")) -> Response:
        """How a job's pictures look while they are generated: the webui's live preview, of this job only.

        There is none before the first and after the last step, and where live previews are off in the settings. It is
        made when it is asked for, at most every 0.4 s.
        """
        preview = await self.tracker.preview(id)
        if preview is None:
            raise HTTPException(404, self.tracker.why_no_preview(await self._get(id)))
        return self._send_preview(request, preview)

    @endpoint
    async def get_page_preview(self, request: Request, id: str = Path(description="the job's ID")) -> Response:
        """The same for the tab: 204 if the job has ended meanwhile, since browsers report a 404 as an error."""
        preview = await self.tracker.preview(id)
        return Response(status_code=204) if preview is None else self._send_preview(request, preview)

    def _send_preview(self, request: Request, preview: Preview) -> Response:
        etag = f'"{preview.job_id}-{preview.number}"'
        return self._send_picture(request, preview.data, preview.media_type, etag, "no-store")

    @endpoint
    async def get_thumbnail(self, request: Request, id: str = Path(description="the job's ID")) -> Response:
        """A small JPEG of a job's first image, for the tab."""
        job, abandoned = await self._get(id), threading.Event()
        try:
            data = await self._while_connected(request, self.tracker.thumbnail(job, abandoned))
        finally:
            abandoned.set()
        if data is None:
            raise HTTPException(404, "The job has no thumbnail")
        return self._send_picture(request, data, "image/jpeg", f'"{job.id}-{zlib.crc32(data):08x}"', FOR_GOOD)

    @endpoint
    async def get_events(
        self,
        request: Request,
        id: str = Path(description="the job's ID"),
        preview: bool = Query(False, description="true sends the live previews, too"),
    ) -> Response:
        """The job as it goes on, as a browser's EventSource reads it: `status` at once and at each change of it,
        `progress` at most twice a second, and `preview` where it is asked for. Ends when the job has ended.
        """
        await self._get(id)
        if request.headers.get("Last-Event-ID") == LAST_EVENT:
            return Response(None, 204, {"Cache-Control": "no-store"})
        connection = connection_of(request.scope)
        # nginx would keep the events back until its buffers are full.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **connection.leave_uncompressed()}
        events = self.events.listen(id, root_of(request.scope), preview, connection)
        return ClosingStreamingResponse(events, 200, headers, "text/event-stream")

    @endpoint
    async def cancel_job(self, request: Request, id: str = Path(description="the job's ID")) -> Response:
        """Takes a Pending job out of the queue, or interrupts a Processing one. It ends as Failed, "Cancelled".

        202: another webui has it, and was asked. If that is done with it before it notices, it ends as Completed.
        """
        await self._end(self.tracker.cancel, id)
        job = await self._get(id)
        is_elsewhere = not job.ended and self.tracker.running(id) is None
        if is_elsewhere:
            await self.tracker.wait(id, self.NOTICED)
            job = await self._get(id)
        if job.status == COMPLETED:  # by another webui, before it noticed
            raise Conflict(f"The job is {job.status}")
        status = 202 if is_elsewhere and not job.ended else 200
        return await self._respond(request, job, images=False, status=status)

    @endpoint
    async def retry_job(self, request: Request, id: str = Path(description="the job's ID")) -> Response:
        """Generates a Failed job once more, from the request that was kept: as a new job, which needs no client."""
        await self.tracker.wait_until_stored(id)
        job = await self.tracker.in_pool(self.tracker.retry, id)
        if job is None:
            raise HTTPException(404, "Job not found")
        headers = {JOB_HEADER: job.id, "Location": path_of(request.scope).rsplit("/", 2)[0] + f"/{job.id}"}
        return await self._respond(request, job, images=False, status=202, headers=headers)

    @endpoint
    async def delete_job(self, request: Request, id: str = Path(description="the job's ID")) -> Response:
        """Removes a job that has ended, and its images."""
        await self.tracker.wait_until_stored(id)
        await self._end(self.tracker.delete, id)
        return Response(None, 204)

    @endpoint
    async def cancel_jobs(self, request: Request) -> Response:
        """Cancels all jobs that match all filters, of which there must be one, and have not ended."""
        filter_ = self._required_filter("body", await self._json_members(request))
        count = await self.tracker.in_pool(self.tracker.cancel_all, filter_, pool=self.tracker.bulk)
        await self.tracker.wait_until_stored()  # so that no list shows one of them as Pending any more
        return self._count(count)

    @endpoint
    async def delete_jobs(self, request: Request) -> Response:
        """Removes all jobs that match all filters, of which there must be one, and have ended, and their images."""
        filter_ = self._required_filter("query", request.query_params.multi_items())
        await self.tracker.wait_until_stored()
        return self._count(await self.tracker.in_pool(self.tracker.delete_all, filter_, pool=self.tracker.bulk))

    # What they share

    def _filter(self, where: str, values: Mapping[str, Any]) -> Filter:
        """The filters among some parameters. Raises HTTPException for one that is invalid."""
        found = {}
        for name in FILTERS:
            if name in values:
                try:
                    found[name] = filter_value(name, values[name], where == "body")
                except ValueError as error:
                    raise self._invalid(str(error), where, name) from None
        return Filter(**found)

    def _required_filter(self, where: str, given: List[Tuple[str, Any]]) -> Filter:
        """The filter for what is done to many jobs: never of more than was meant. Raises HTTPException."""
        values = dict(given)
        for name in values:
            if name not in FILTERS:
                raise self._invalid("there is no such filter", where, without_surrogates(name[:100]))
        if len(values) < len(given):
            raise self._invalid("a filter is given more than once", where)
        if not values:
            raise self._invalid("at least one filter is required: " + ", ".join(FILTERS), where)
        filter_ = self._filter(where, values)
        for name, value in values.items():
            if value == "":  # as of a variable that was not set
                raise self._invalid("it is empty: leave it out if all are meant", where, name)
        return filter_

    @staticmethod
    def _count(jobs: int) -> Response:
        return JSONResponse({"jobs": jobs}, headers={"Cache-Control": "no-store"})

    async def _json_members(self, request: Request) -> List[Tuple[str, Any]]:
        """The members of the JSON object in a request's body.

        Raises HTTPException for all else, and ClientDisconnect.
        """
        data = b""
        try:
            async for chunk in request.stream():
                data += chunk
                if len(data) > self.BODY_LIMIT:
                    raise self._invalid(f"it must have at most {self.BODY_LIMIT:,} bytes", "body")
            members = json.loads(data, object_pairs_hook=tuple)
        except (ValueError, RecursionError):
            members = None
        if not isinstance(members, tuple):  # which JSON has for an object only
            raise self._invalid("it must be a JSON object", "body")
        return list(members)

    async def _while_connected(self, request: Request, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of some work, which is given up when the client leaves. Raises ClientDisconnect then."""
        loop = asyncio.get_running_loop()
        working, gone = loop.create_task(work), loop.create_task(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect
            return working.result()
        finally:
            working.cancel()
            gone.cancel()

    async def _get(self, job_id: str) -> Job:
        await self.tracker.wait_until_stored(job_id)
        job = await self.tracker.find(job_id)
        if job is None:
            raise HTTPException(404, "Job not found")
        return job

    async def _end(self, function: Callable[[str], bool], job_id: str) -> None:
        pool = self.tracker.pool_for(self.tracker.running(job_id))
        if not await self.tracker.in_pool(function, job_id, pool=pool):
            raise HTTPException(404, "Job not found")

    @staticmethod
    def _invalid(message: str, *place: str) -> HTTPException:
        """`place` is where it stands: in the query or in the body, and by which name."""
        return HTTPException(422, [{"loc": place, "msg": message, "type": "value_error"}])

    @staticmethod
    def _json_headers(request: Request) -> Dict[str, str]:
        packed = {"Content-Encoding": "gzip"} if accepts_gzip(request.scope) else {}
        return {"Vary": "Accept-Encoding", "Cache-Control": "no-store", **packed}

    async def _respond(
        self, request: Request, job: Job, images: bool, status: int = 200, headers: Optional[Dict[str, str]] = None
    ) -> Response:
        chunks, pool = self.tracker.as_json(job, images, root_of(request.scope)), self.tracker.pool_for(job)
        return await self._stream(chunks, {**self._json_headers(request), **(headers or {})}, pool=pool, status=status)

    @staticmethod
    def _send_picture(request: Request, data: bytes, media_type: str, etag: str, cache_control: str) -> Response:
        """A picture that is in memory, or 304 if the client has it."""
        headers = {
            "ETag": etag,
            "Cache-Control": cache_control,
            **IMAGE_HEADERS,
            **connection_of(request.scope).leave_uncompressed(),
        }
        headers.update(exposed(headers))
        if is_known(request.scope, etag):
            return Response(None, 304, headers)
        if request.method == "HEAD":
            headers["Content-Length"] = str(len(data))
        return Response(b"" if request.method == "HEAD" else data, 200, headers, media_type)

    async def _stream(
        self,
        chunks: Iterator[bytes],
        headers: Dict[str, str],
        media_type: str = "application/json",
        level: int = 1,
        pool: Optional[Threads] = None,
        status: int = 200,
    ) -> Response:
        """A response that is made as it is sent, packed if `headers` say so."""
        gzip = Gzip(level) if "Content-Encoding" in headers else None
        made = ThreadedChunks(pool or self.tracker.pool, chunks, self.tracker.sending, gzip)
        return ClosingStreamingResponse(await made.begin(), status, headers, media_type)


# ------------------------------------------------------------------------------------------------------------------
# Tab: the page "Job Tracker" in the webui
# ------------------------------------------------------------------------------------------------------------------


class Texts:
    """Everything that the tab says, to be reworded or translated here. What stands in braces is filled in."""

    # The controls
    ENABLED, ENABLED_INFO = "Enable Tracking", "Each generation through the API becomes a job that is kept."
    RETENTION, RETENTION_INFO = "Retention", "Older jobs are removed, with their images."
    RETENTIONS = {"30 days": 30, "7 days": 7, "3 days": 3, "1 day": 1, "Off (keep all)": None}
    OTHER_RETENTION = "{days:g} days"
    LOCKED = "Set by the variable {variable}, and locked by it."
    PURGE, PURGE_JOBS, PURGE_FILES, PURGING = "Purge Now", "Remove {jobs}?", "Remove stray files?", "Purging \u2026"
    ALL, ANY_IP, ANY_LABEL, ANY_PROMPT = "All", "Any address", "Any label", "Any text"
    LOADING = "Loading"
    NOT_SAVED = "Not saved: {reason}"
    NO_QUEUE = "This cannot be called through the queue"

    # The notes above all else
    NOT_TRACKED = "Generations are not tracked: {reason}."
    LOCKED_OFF = "Tracking is off: {variable} says so."
    TRACKING_OFF = "Tracking is off: generations leave no job. Enable Tracking takes effect at once."
    SETTINGS_TROUBLE = "{trouble}."
    STORE_TROUBLE = "Jobs cannot be stored now: {reason}."
    KEPT_FOR_CLOCK = (
        "{jobs:,} jobs are older than the retention, all from before this start. "
        "They are kept, since the clock may be wrong. Purge Now removes them."
    )
    # What Purge Now would do, which it does when it is pressed again
    PURGE_REMOVES = "Purge Now removes {jobs} older than {days} with their images. {files} Press again to do it."
    PURGE_REMOVES_NO_JOB = "Purge Now removes no job. {why} {files} Press again to do it."
    FILES_TOO = "Files that no job names go too, if they are older than an hour."
    # Why it removed nothing
    RETENTION_IS_OFF = "Retention is off: all jobs are kept."
    NONE_OLDER, OLDER_RUN = "No job is older than {days}.", "The jobs older than {days} still wait or run."
    CLOCK_UNSET = "The webui's clock says {date}, so no job is old."
    YOUNG_FILES = "Files that no job names are younger than an hour, and are kept: {files:,}."
    LOST_JOBS = "{jobs} in images/ are not in jobs.json. Is it whole? Their files are kept."
    PURGE_RUNS = "Purging: old jobs are being removed. All else goes on meanwhile."
    PURGE_WAITS = "Another webui is purging. The purge begins here when that is done."
    PURGE_FAILED = "The purge failed: {reason}"
    PURGED = "Purge at {time}: removed {jobs:,} jobs, {images:,} images, {size}."
    PURGED_NOTHING = "Purge at {time}: removed nothing. {why}"
    NOT_READABLE = "The jobs cannot be read: {reason}"

    # The figures
    ON_DISK, ON_DISK_OF, NEXT_PURGE = "On disk", "On disk, of {limit:g} GB", "Next purge"
    CANCEL_WAITING, CANCEL_WAITING_NOW = "Cancel all that wait", "Cancel {jobs}?"
    NEVER = "Off"

    # The table of jobs
    ID, TIME, TYPE, STATUS = "ID", "Time", "Type", "Status"
    PROMPT, LABEL, IMAGES, SECONDS, IP, SERVER = "Prompt", "Label", "Images", "Seconds", "IP", "Server"
    THUMBNAIL = ""  # the column of pictures
    NEXT, PLACE = "next", "no. {place}"  # of a job that waits
    CANCELLED, CRASHED, ERROR = "cancelled", "crashed", "error"  # why a job failed
    NO_JOBS, NO_MATCH = "No jobs yet.", "No job matches these filters."
    NEWEST, NEWER, OLDER, OLDEST = "Newest", "Newer", "Older", "Oldest"
    ROWS, ROWS_OF_ALL = "{first:,} to {last:,}", "{first:,} to {last:,} of {total:,}"

    # The open job
    CLOSE, GONE = "Close", "This job is no longer kept."
    CANCEL, RETRY, DELETE, DELETE_FOR_GOOD = "Cancel", "Retry", "Delete", "Delete for good?"
    NOT_DONE = "Not done: {reason}"
    INFO_TOO_LONG = "What the webui says of this job is too long to be shown here: {size}"
    IMAGE, IMAGE_GONE = "Image {number}", "no longer on disk"
    PREVIEW = "Live preview"
    NEGATIVE_PROMPT, INFOTEXT, INFOTEXT_OF_IMAGE = "Negative prompt", "Infotext", "Infotext of image {number}"
    CLIENT, ACCEPTED, WAITED, TOOK, LEFT, SEED = "Client", "Accepted", "Waited", "Took", "Left", "Seed"
    RETRY_OF, WEBHOOK = "Retry of", "Webhook"
    WEBHOOK_WAITS, BEING_DELIVERED, DELIVERED = "waits for the job", "is being delivered", "delivered"
    TRIED, GIVEN_UP = "tried {times}, next {when}", "given up after {tries}"

    # Values
    CUT = "\u2026 and {count:,} characters more"
    JOBS, DAYS = ("1 job", "{:,} jobs"), ("1 day", "{:g} days")
    TIMES, TRIES = ("once", "{:,} times"), ("1 try", "{:,} tries")
    SOON, IN_MINUTES, IN_HOURS = "soon", "in {minutes} min", "in {hours} h {minutes:02} min"
    DURATIONS = ("{seconds} s", "{minutes} min {seconds:02} s", "{hours} h {minutes:02} min")
    SIZES = ("{:,.0f} bytes", "{:,.1f} kB", "{:,.1f} MB", "{:,.1f} GB")


class Column(NamedTuple):
    """A column of the table."""

    name: str  # and the class of its cells
    heading: str
    cell: str  # as a piece of the template: `shown` says what is known of `job` besides
    # Whether a page with these jobs has it, on the webui that is called so.
    is_on: Callable[[List[Job], str], bool] = lambda jobs, server: True


COLUMNS = (
    Column(
        "thumbnail",
        Texts.THUMBNAIL,
        """{% if shown.has_thumbnail %}
          <img src="{{ "." + thumbnail_path.format(id=job.id) }}" alt="" loading="lazy">
        {% endif %}""",
        lambda jobs, _: any(map(ImageStore.may_have_thumbnail, jobs)),
    ),
    Column("id", Texts.ID, '<button type="button" aria-expanded="{{ is_open | lower }}">{{ job.id }}</button>'),
    Column("time", Texts.TIME, "{{ job.timestamp | time }}"),
    Column("type", Texts.TYPE, "{{ job.type }}"),
    Column("status", Texts.STATUS, "{{ status(job.status, shown) }}"),
    Column("prompt", Texts.PROMPT, "{{ job.prompt[:300] | text }}"),
    Column("label", Texts.LABEL, "{{ job.label | text(100) }}", lambda jobs, _: any(job.label for job in jobs)),
    Column("images", Texts.IMAGES, '{{ job.images | length or "" }}'),
    Column("seconds", Texts.SECONDS, '{{ "" if shown.seconds is none else "{:.1f}".format(shown.seconds) }}'),
    Column("ip", Texts.IP, "{{ job.ip | text(100) }}"),
    # For people with more than one webui: on a single one, each row would say the same.
    Column(
        "server",
        Texts.SERVER,
        "{{ job.server | text(100) }}",
        lambda jobs, server: any(is_elsewhere(job, server) for job in jobs),
    ),
)

# What the template, the script and the style share is named once, here. They write `$name`, and a name that is not here
# is an error as soon as this file is loaded. What they write without `$` is HTML's or gradio's.
IDS = (
    *("style", "settings", "enabled", "retention", "purge", "filters", "status", "ip", "label", "text", "fresh"),
    *("look", "action"),
)
CLASSES = (
    *("top", "main", "note", "error", "empty", "figures", "frame", "open", "gallery", "blank", "text", "wide"),
    *("actions", "asking", "preview"),
)
DATA = ("job", "page", "key", "version", "action", "asks", "confirm")  # attributes data-...
NAMES = {name: name for name in (*CLASSES, *DATA, *STATUSES, *(column.name for column in COLUMNS))}
NAMES.update({"tab": "job_tracker", **{f"tab_{name}": f"job_tracker_{name}" for name in IDS}})


def with_names(text: str, **more: str) -> str:
    """Fills in what is named once. Raises KeyError for an unknown name."""
    return Template(text).substitute(NAMES, **more)


# What a button of the page does, with the ID of a job where it is for one.
CANCEL, RETRY, DELETE, CANCEL_WAITING, PURGE = "cancel", "retry", "delete", "cancel_waiting", "purge"


# Control characters, those that turn the direction of text, and what is no character.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


# The template's filters


def as_text(text: Optional[str], limit: int = 20_000) -> Markup:
    """Foreign text as HTML that shows it as text, cut, and with no say in the direction of what is beside it.

    What is HTML already stays as it is.
    """
    if isinstance(text, Markup):
        return text
    if not text:
        return Markup("")
    rest = len(text) - limit
    more = f" <em>{escape(Texts.CUT.format(count=rest))}</em>" if rest > 0 else ""
    return Markup(f"<bdi>{escape(UNPRINTABLE.sub(chr(0xFFFD), text[:limit]))}</bdi>{more}")


def as_time(moment: float) -> Markup:
    """A moment in Unix seconds as HTML, in UTC; the page's script turns it into the reader's local time."""
    text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
    return Markup(f'<time datetime="{text}">{text}</time>')


def as_count(count: float, texts: Tuple[str, str]) -> str:
    """How many of something, by its text for one and that for many."""
    return texts[0] if count == 1 else texts[1].format(count)


def as_duration(seconds: float) -> str:
    """In the units that people use."""
    short, medium, long = Texts.DURATIONS
    if seconds < 60:
        return short.format(seconds=round(max(seconds, 0), 1))
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (long if hours else medium).format(hours=hours, minutes=minutes, seconds=seconds)


def as_wait(seconds: float) -> str:
    """How far away something is that is to come, to the minute."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    if seconds < 60:
        return Texts.SOON
    return (Texts.IN_HOURS if hours else Texts.IN_MINUTES).format(hours=hours, minutes=minutes)


def as_size(size: float) -> str:
    """A number of bytes, in the units that people use."""
    *texts, largest = Texts.SIZES
    for text in texts:
        if size < 1000:
            return text.format(size)
        size /= 1000
    return largest.format(size)


def failure_of(job: Job) -> Optional[str]:
    """Why a job failed, in a word; its `error` says it in full. None if it has not failed."""
    if job.status != FAILED:
        return None
    return {CANCELLED: Texts.CANCELLED, LEFT_BEHIND: Texts.CRASHED}.get(job.error or "", Texts.ERROR)


def target_of(webhook: Webhook) -> str:
    """Where a webhook leads. What follows the path is left out: it may be a secret."""
    url = urlsplit(webhook.url)
    return url.netloc + url.path


def state_of(webhook: Webhook, now: float) -> str:
    """How far the delivery of a webhook is, by the store's clock."""
    if webhook.delivered:
        return Texts.DELIVERED
    if webhook.since is None:
        return Texts.WEBHOOK_WAITS
    if webhook.due is None:
        return Texts.GIVEN_UP.format(tries=as_count(webhook.attempts, Texts.TRIES))
    if not webhook.attempts:
        return Texts.BEING_DELIVERED
    times, when = as_count(webhook.attempts, Texts.TIMES), as_wait(webhook.due - now)
    return Texts.TRIED.format(times=times, when=when)


def why_no_job(outlook: Outlook, now: float) -> str:
    """Why a purge removes no job, by the store's clock."""
    if outlook.days is None:
        return Texts.RETENTION_IS_OFF
    if now < CLOCKS_START:
        return Texts.CLOCK_UNSET.format(date=time.strftime("%Y-%m-%d", time.gmtime(now)))
    text = Texts.OLDER_RUN if outlook.has_unfinished else Texts.NONE_OLDER
    return text.format(days=as_count(outlook.days, Texts.DAYS))


TAB_TEMPLATE = with_names(
    """
{% macro status(name, shown=none) %}
  <span class="$status {{ name }}">{{ name }}
  {% if shown and shown.progress is not none %} {{ "{:.0%}".format(shown.progress) }}
    <progress value="{{ "{:.2f}".format(shown.progress) }}"></progress>
  {% elif shown and shown.position is not none %} <small>
    {{ texts.NEXT if shown.position == 1 else texts.PLACE.format(place=shown.position) }}
  </small>{% elif shown and shown.failure %} <small>{{ shown.failure }}</small>{% endif %}
  </span>
{% endmacro %}

{% macro notes_of(notes) %}
  {% for note in notes %}<p class="$note{{ " $error" if note.is_error }}">{{ note.text | text }}</p>{% endfor %}
{% endmacro %}

{% macro button(action, label, question=none) %}
  <button type="button" data-$action="{{ action }}"{{ " data-$asks" if question }}
    {%- if action == confirm %} class="$asking"{% endif %}>{{ question if action == confirm else label }}</button>
{% endmacro %}

{% macro turn(label, page, is_possible) %}
  <button type="button" data-$page="{{ page }}"{{ "" if is_possible else " disabled" }}>{{ label }}</button>
{% endmacro %}

{% macro figure_of(name, media_type, size, number, url) %}
  <figure>
    {% if size is none %}
      <div class="$blank">{{ texts.IMAGE_GONE }}</div>
      <figcaption>{{ name }}</figcaption>
    {% else %}
      <a href="{{ url }}" target="_blank" rel="noopener">
        {% if media_type in media_types %}
          <img src="{{ url }}" alt="{{ texts.IMAGE.format(number=number) }}" loading="lazy">
        {% else %}
          <div class="$blank">{{ name.rpartition(".")[2] }}</div>
        {% endif %}
      </a>
      <figcaption>
        <a href="{{ url }}" target="_blank" rel="noopener">{{ name }}</a>
        {{ " " }}<small>{{ size | size }}</small>
      </figcaption>
    {% endif %}
  </figure>
{% endmacro %}

{% macro long_text(label, text, is_open=true) %}
  <details{{ " open" if is_open }}>
    <summary>{{ label }}</summary>
    <div class="$text">{{ text | text or "\u00a0" }}</div>
  </details>
{% endmacro %}

{% macro link_to(job_id) %}<button type="button" data-$job="{{ job_id }}">{{ job_id }}</button>{% endmacro %}

{% macro webhook(one) %}{{ one | target | text(100) }} <small>{{ one | state }}</small>{% endmacro %}

{% macro fact(label, value, is_wide=false) %}
  {% if value %}
    <div{% if is_wide %} class="$wide"{% endif %}><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
  {% endif %}
{% endmacro %}

<div class="$top" data-$confirm="{{ confirm }}">
  <div role="status">{{ notes_of(notes) }}</div>
  {% if counts is defined %}
    <div class="$figures">
      {% for name, count in counts.items() %}
        <div>
          <div><b>{{ "{:,}".format(count) }}</b>{{ status(name) }}</div>
          {% if name == pending and count %}<div aria-live="polite">{{ button(*cancel_waiting) }}</div>{% endif %}
        </div>
      {% endfor %}
      <div><div>
        <b>{{ size | size }}</b>{{ texts.ON_DISK if limit is none else texts.ON_DISK_OF.format(limit=limit) }}
      </div></div>
      <div><div><b>{{ next_purge }}</b>{{ texts.NEXT_PURGE }}</div></div>
    </div>
  {% endif %}
</div>
<div class="$main">
  {% if table is defined %}
    <section>
      {% if table.jobs %}
        <div class="$frame"><table>
          <thead><tr>
            {% for name, heading in table.columns.items() %}
              <th class="{{ name }}" scope="col">{{ heading }}</th>
            {% endfor %}
          </tr></thead>
          <tbody>
            {% for shown in table.jobs %}
              {% set job, is_open = shown.job, shown.job.id == table.open %}
              <tr data-$key="{{ job.id }}" data-$job="{{ "" if is_open else job.id }}" class="{{ "$open" if is_open }}">
                $cells
              </tr>
            {% endfor %}
          </tbody>
        </table></div>
        <nav>
          {{ turn(texts.NEWEST, 0, table.page > 0) }}
          {{ turn(texts.NEWER, table.page - 1, table.page > 0) }}
          <span>{{ table.where }}</span>
          {{ turn(texts.OLDER, table.page + 1, table.has_more) }}
          {% if table.last_page is not none %}{{ turn(texts.OLDEST, table.last_page, table.has_more) }}{% endif %}
        </nav>
      {% else %}
        <p class="$empty">{{ table.nothing }}</p>
      {% endif %}
    </section>
  {% endif %}
  {% if open is defined %}
    <aside data-$key="{{ open.id }}">
      {% set shown, job = open.shown, open.shown and open.shown.job %}
      <header>
        <b>{{ open.id }}</b>
        {% if job %}{{ status(job.status, shown) }}{% endif %}
        <button type="button" data-$job="">{{ texts.CLOSE }}</button>
      </header>
      {% if job %}
        <div class="$actions" aria-live="polite">{% for one in open.actions %}{{ button(*one) }}{% endfor %}</div>
        <div>{{ notes_of(open.notes) }}</div>
        <div class="$gallery">
          {% if open.preview is not none %}
            {% set url = "." + preview_path.format(id=job.id) ~ "?n=" ~ open.preview %}
            <figure class="$preview"><img src="{{ url }}" alt="{{ texts.PREVIEW }}"></figure>
          {% endif %}
          {% for image, size in open.images %}
            {% set url = "." + image_path.format(id=job.id, n=loop.index0) %}
            {{ figure_of(image.file_name, image.media_type, size, loop.index, url) }}
          {% endfor %}
        </div>
        {{ long_text(texts.PROMPT, job.prompt) }}
        {% if open.negative_prompt %}{{ long_text(texts.NEGATIVE_PROMPT, open.negative_prompt) }}{% endif %}
        <dl>
          {{ fact(texts.TYPE, job.type) }}
          {{ fact(texts.CLIENT, job.ip | text(100)) }}
          {{ fact(texts.ACCEPTED, job.timestamp | time) }}
          {{ fact(texts.WAITED, (job.started - job.timestamp) | int | duration if job.started) }}
          {{ fact(texts.TOOK, shown.seconds | duration if job.started and job.finished) }}
          {{ fact(texts.LEFT, shown.eta | duration if shown.eta is not none) }}
          {{ fact(texts.ON_DISK, job.bytes | size if job.bytes) }}
          {{ fact(texts.RETRY_OF, link_to(job.retry_of) if job.retry_of) }}
          {{ fact(texts.SERVER, job.server | text(100) if open.is_elsewhere or "server" in table.columns) }}
          {{ fact(texts.LABEL, job.label | text(300), is_wide=true) }}
          {{ fact(texts.WEBHOOK, webhook(job.webhook) if job.webhook, is_wide=true) }}
          {{ fact(texts.SEED, open.seeds | text(1000), is_wide=true) }}
        </dl>
        {% for text in open.infotexts %}
          {% set label = texts.INFOTEXT if loop.length == 1 else texts.INFOTEXT_OF_IMAGE.format(number=loop.index) %}
          {{ long_text(label, text, is_open=loop.first) }}
        {% endfor %}
      {% else %}
        <p class="$empty">{{ texts.GONE }}</p>
      {% endif %}
    </aside>
  {% endif %}
</div>
""",
    cells="".join(
        f'{{% if "{name}" in table.columns %}}<td class="{name}">{with_names(cell)}</td>{{% endif %}}'
        for name, _, cell, _ in COLUMNS
    ),
)


class PageState(NamedTuple):
    """What one open page shows. It comes from the browser with every look."""

    page: int = 0
    job: str = ""  # the ID of the job that is open
    confirm: str = ""  # the action whose button asks whether it is meant
    version: str = ""  # of the HTML that it has

    @classmethod
    def parse(cls, text: Any) -> "PageState":
        """Anybody can send anything: an invalid state is the first page."""
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            state = cls(**json.loads(text))
            is_page = type(state.page) is int and 0 <= state.page < 1 << 32
            if is_page and (state.job == "" or ID_FORM.match(state.job)) and isinstance(state.confirm, str):
                return state
        return cls()


class Note(NamedTuple):
    text: str
    is_error: bool = False


class TabHtml:
    """The HTML of the page: looks up what it shows, and renders the template, both in a thread that may block."""

    ROWS = 50
    INFOTEXTS = 20
    # Guarded as gradio guards the page: the API's routes want their own credentials.
    IMAGE = "/job-tracker/{id}/{n}"
    THUMBNAIL = "/job-tracker/{id}/thumbnail"
    PREVIEW = "/job-tracker/{id}/preview"
    SHOWN_FORMATS = ("png", "jpg", "webp", "gif", "avif", "bmp")  # by browsers

    def __init__(self, tracker: Tracker, housekeeper: Housekeeper):
        self.tracker = tracker
        self.housekeeper = housekeeper

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        """Made when the page is first looked at: every start would take a tenth of a second longer, the API's too."""
        # Every value is escaped that is not Markup, and an unknown name raises.
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        environment.filters.update(text=as_text, time=as_time, duration=as_duration, size=as_size)
        environment.filters.update(target=target_of, state=lambda webhook: state_of(webhook, self.tracker.store.now()))
        shown = [MEDIA_TYPES[name] for name in self.SHOWN_FORMATS]
        environment.globals.update(texts=Texts, media_types=shown, pending=PENDING)
        paths = {"image_path": self.IMAGE, "thumbnail_path": self.THUMBNAIL, "preview_path": self.PREVIEW}
        environment.globals.update(paths)
        # Line breaks between two tags, and what indents the second, are for the template's readers only.
        return environment.from_string(re.sub(r"(?<=[>}])\n\s*(?=[<{])", "", TAB_TEMPLATE.strip()))

    def render(self, state: PageState, filter_: Filter, notes: Iterable[Note] = ()) -> str:
        """The whole page. What cannot be read is left out, and a note says so."""
        parts: Dict[str, Any] = {"notes": [*notes], "confirm": state.confirm}
        try:
            counts, size = self.tracker.store.stats()
            parts.update(counts=counts, size=size, limit=self.tracker.settings.max_gb, next_purge=self._next_purge())
            waiting = Texts.CANCEL_WAITING_NOW.format(jobs=as_count(counts[PENDING], Texts.JOBS))
            parts["cancel_waiting"] = (CANCEL_WAITING, Texts.CANCEL_WAITING, waiting)
            parts["table"] = self._table(state, filter_, counts)
            if state.job:
                parts["open"] = self._open(state.job)
        except StoreError as error:
            parts["notes"].append(Note(Texts.NOT_READABLE.format(reason=error), is_error=True))
        return self._template.render(parts)

    def _next_purge(self) -> str:
        at = self.housekeeper.next_purge
        if self.tracker.settings.retention_days is None:
            return Texts.NEVER
        return Texts.SOON if at is None else as_wait(at - time.monotonic())

    def _table(self, state: PageState, filter_: Filter, counts: Dict[str, int]) -> Dict[str, Any]:
        """A page of the jobs that match. A page beyond the last one becomes the first."""
        page, total = state.page, None
        if filter_ == Filter(status=filter_.status):  # all others would have to be counted
            total = sum(counts.values()) if filter_.status is None else counts[filter_.status]
        found = self.tracker.store.query(filter_, self.ROWS, skip=page * self.ROWS)
        if page and not found.jobs:
            page, found = 0, self.tracker.store.query(filter_, self.ROWS)
        first = page * self.ROWS + 1
        where = Texts.ROWS if total is None else Texts.ROWS_OF_ALL
        jobs = [self.tracker.running(job.id) or job for job in found.jobs]
        standing = self.tracker.standing(jobs)
        return {
            "jobs": [self._shown(job, standing) for job in jobs],
            "columns": {one.name: one.heading for one in COLUMNS if one.is_on(jobs, self.tracker.server)},
            "open": state.job,
            "nothing": Texts.NO_JOBS if filter_ == Filter() else Texts.NO_MATCH,
            "page": page,
            "where": where.format(first=first, last=first + len(found.jobs) - 1, total=total),
            "has_more": found.cursor is not None,
            "last_page": None if total is None else (total - 1) // self.ROWS,
        }

    def _shown(self, job: Job, standing: Standing) -> Dict[str, Any]:
        """A job with what its record does not say. `seconds` are those of its generation, until now."""
        progress, eta = self.tracker.progress_of(job, standing)
        position, seconds = self.tracker.position(job, standing), self.tracker.seconds(job)
        shown = {"job": job, "progress": progress, "eta": eta, "position": position, "seconds": seconds}
        return {**shown, "failure": failure_of(job), "has_thumbnail": self.tracker.images.may_have_thumbnail(job)}

    def _open(self, job_id: str) -> Dict[str, Any]:
        """All there is to know of a job."""
        job = self.tracker.get(job_id)
        if job is None:
            return {"id": job_id, "shown": None}
        standing = self.tracker.standing([job], with_previews=True)
        preview = self.tracker.newest_preview(job, standing)
        known = self.tracker.describe(job, standing=standing)
        info = known["info"]
        notes = [Note(known["error"], is_error=True)] if known["error"] else []
        if isinstance(info, Part):
            notes.append(Note(Texts.INFO_TOO_LONG.format(size=as_size(info.size))))
        images = list(zip(job.images, self.tracker.images.image_sizes(job)))
        return {
            "id": job_id,
            "shown": self._shown(job, standing),
            "actions": [*self._actions(job)],
            "notes": notes,
            "images": images,
            "preview": preview and preview.number,
            "is_elsewhere": is_elsewhere(job, self.tracker.server),
            **self._info(info),
        }

    @staticmethod
    def _actions(job: Job) -> Iterator[Tuple[str, ...]]:
        """The buttons of an open job: what each does, what it says, and what it asks first, if it asks."""
        if not job.ended:
            yield f"{CANCEL} {job.id}", Texts.CANCEL
            return
        if job.status == FAILED and job.has_request:
            yield f"{RETRY} {job.id}", Texts.RETRY
        yield f"{DELETE} {job.id}", Texts.DELETE, Texts.DELETE_FOR_GOOD

    def _info(self, text: Any) -> Dict[str, Any]:
        """What is shown of the host's `info`, whatever that is."""
        info: Any = None
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            info = json.loads(text)
        if not isinstance(info, dict):
            info = {}
        lists = {name: info[name] if isinstance(info.get(name), list) else [] for name in ("all_seeds", "infotexts")}
        return {
            "negative_prompt": str(info.get("negative_prompt") or ""),
            "seeds": ", ".join(map(str, lists["all_seeds"] or [info.get("seed", "")])),
            "infotexts": list(map(str, lists["infotexts"][: self.INFOTEXTS])),
        }


class Tab:
    """The page: settings, figures, the table of jobs, and the job that is open.

    Gradio has the controls, HTML is the rest. A script in the page asks `look` for all of it again and again while
    somebody sees it, and after each click. So `look` is the only way for data into the page, several pages agree,
    and nothing is asked while nobody looks.
    """

    TOKEN = "/job-tracker/token"
    DIRECT = re.compile(r"/(run|api)/[^/]+/?\Z")  # the paths at which gradio calls a function without its queue

    def __init__(
        self, tracker: Tracker, housekeeper: Housekeeper, origins: OriginGuard, trouble: Callable[[], Optional[str]]
    ):
        """`trouble` says why generations are not tracked, None if they are."""
        self.tracker = tracker
        self.housekeeper = housekeeper
        self.origins = origins
        self.trouble = trouble
        self.html = TabHtml(tracker, housekeeper)
        self._purge: Optional[Future] = None  # the last one that was asked for here
        self._purge_began = 0.0
        # Only pages of the webui itself can read it, and so prove what they are where a proxy changes `Host`.
        self._token = secrets.token_urlsafe()

    @property
    def _gr(self) -> Any:
        import gradio  # not before there is a tab: it takes seconds

        return gradio

    # The controls

    def build(self) -> Any:
        """The page as gradio's Blocks, for gradio 3.41 and 4.40."""
        gr = self._gr
        with gr.Blocks(analytics_enabled=False) as blocks, gr.Column(elem_id=NAMES["tab"]):
            gr.HTML(f"<style>{TAB_STYLE}</style>", elem_id=NAMES["tab_style"])
            with gr.Row(elem_id=NAMES["tab_settings"]):
                setting = self._control("enabled", "enabled", Texts.ENABLED, Texts.ENABLED_INFO)
                enabled = gr.Checkbox(self.tracker.settings.enabled, **setting)
                setting = self._control("retention", "retention_days", Texts.RETENTION, Texts.RETENTION_INFO)
                retention = gr.Radio(self._retentions(), value=self._retention(), **setting)
                purge = gr.Button(Texts.PURGE, size="sm", elem_id=NAMES["tab_purge"])
            gr.HTML(with_names('<div class="$top"></div>'))
            with gr.Row(elem_id=NAMES["tab_filters"]):
                statuses = [Texts.ALL, *STATUSES]
                status = gr.Dropdown(statuses, value=Texts.ALL, label=Texts.STATUS, elem_id=NAMES["tab_status"])
                ip = gr.Textbox(label=Texts.IP, placeholder=Texts.ANY_IP, max_lines=1, elem_id=NAMES["tab_ip"])
                a_label = {"label": Texts.LABEL, "placeholder": Texts.ANY_LABEL}
                label = gr.Textbox(max_lines=1, elem_id=NAMES["tab_label"], **a_label)
                prompt = {"label": Texts.PROMPT, "placeholder": Texts.ANY_PROMPT}
                text = gr.Textbox(max_lines=1, elem_id=NAMES["tab_text"], **prompt)
            gr.HTML(with_names('<div class="$main"><p class="$empty">$loading</p></div>', loading=Texts.LOADING))
            fresh = gr.HTML(elem_id=NAMES["tab_fresh"])  # the script brings it into the top and the main part
            state, token = gr.Textbox(visible=False), gr.Textbox(visible=False)
            wish, opened = gr.Textbox(visible=False), gr.Textbox(visible=False)
            look = gr.Button("Look", elem_id=NAMES["tab_look"])  # for the script, nobody sees it
            action = gr.Button("Action", elem_id=NAMES["tab_action"])  # nor this

            self._on(blocks.load, TAB_SCRIPT)
            inputs = [state, enabled, retention, status, ip, text, label, token]
            outputs = [enabled, retention, purge, fresh]
            looked = self._call(look.click, "ask", self.look, "see the jobs", inputs, outputs)
            self._on(looked.success, "() => window.jobTracker.answered()")
            for control in (status, ip, text, label):
                self._on(control.change, "() => window.jobTracker.filter()")
            self._on(purge.click, f'() => window.jobTracker.press("{PURGE}", true)')
            acted = self._call(
                action.click, "order", self.act, "cancel, retry, delete or purge jobs", [wish, token], [opened]
            )
            self._on(acted.success, "(opened) => window.jobTracker.done(opened)", None, [opened], [])
            for event, function, action, inputs in (
                (enabled.input, self.set_enabled, "turn tracking on or off", [enabled, token]),
                (retention.input, self.set_retention, "set the retention", [retention, token]),
            ):
                done = self._call(event, "sign", function, action, inputs, [])
                self._on(done.then, "() => window.jobTracker.act()")

        for block in blocks.blocks.values():
            block.do_not_save_to_config = True  # or the webui puts the values of its ui-config.json back
        return blocks

    def _control(self, name: str, setting: str, label: str, info: str) -> Dict[str, Any]:
        """What the control of a setting says, and whether it can be used."""
        variable = self.tracker.settings.locked.get(setting)
        info = Texts.LOCKED.format(variable=variable) if variable else info
        return {"label": label, "info": info, "interactive": not variable, "elem_id": NAMES[f"tab_{name}"]}

    def _call(self, event: Any, way: str, function: Any, action: str, inputs: List[Any], outputs: List[Any]) -> Any:
        """Calls a function at an event. `way` is how the script makes its last input, which is the token."""
        script = f"(...values) => window.jobTracker.{way}(values.slice(0, {len(inputs)}))"
        return self._on(event, script, self._guarded(function, action, len(outputs)), inputs, outputs)

    def _on(self, event: Any, script: str, function: Any = None, inputs: Any = None, outputs: Any = None) -> Any:
        options = {"queue": False, "show_progress": "hidden", "api_name": False}
        options["js" if int(self._gr.__version__.split(".")[0]) >= 4 else "_js"] = script
        return event(function, inputs, outputs, **options)

    # Who may use them

    async def get_token(self, request: Request) -> Response:
        """Another page's script cannot read it: the browser says what page asks, or lets no script have the answer."""
        if self.origins.refuses(request.scope, "read the tab's token"):
            raise HTTPException(403, OriginGuard.REFUSAL)
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return Response(as_json(self._token), 200, headers, "application/json")

    def _guarded(self, function: Callable[..., Any], action: str, outputs: int) -> Callable[..., Any]:
        """A function for gradio that pages of other origins cannot call, and nobody through gradio's queue."""

        async def guarded(request: self._gr.Request, *values: Any) -> Any:
            *values, token = values
            scope = self._direct_scope(request)
            if scope is None:
                self.origins.warn("A call through gradio's queue", action)
                raise self._gr.Error(Texts.NO_QUEUE)
            is_own = secrets.compare_digest(str(token).encode("utf-8", "replace"), self._token.encode())
            if is_own or not self.origins.refuses(scope, action):
                return await function(*values)
            if OuterMiddleware.KEY not in scope:
                raise self._gr.Error(OriginGuard.REFUSAL)
            # Of an exception gradio would make a 500, and a traceback.
            scope[OuterMiddleware.KEY].refused = True
            return [self._gr.update()] * outputs

        return guarded

    @classmethod
    def _direct_scope(cls, request: Any) -> Optional[Scope]:
        """The HTTP request that gradio answers by a function's result; None if it came through the queue.

        gradio 3 calls a function of its queue without one, and also lets the body of any request claim to come from
        there, with headers of its own. gradio 4 has that by which the queue was joined.
        """
        direct = getattr(request, "request", None)
        if isinstance(direct, Request) and cls.DIRECT.search(direct.scope["path"]):
            return direct.scope
        return None

    def _retention(self) -> str:
        days = self.tracker.settings.retention_days
        texts = {value: text for text, value in Texts.RETENTIONS.items()}
        return texts.get(days) or Texts.OTHER_RETENTION.format(days=days)

    def _retentions(self) -> List[str]:
        return [*{self._retention()}.difference(Texts.RETENTIONS), *Texts.RETENTIONS]

    # What the controls do, in threads of the tracker's own, so that the host's are never needed

    async def set_enabled(self, enabled: Any) -> None:
        if isinstance(enabled, bool):  # anybody can send anything
            await self._save(enabled=enabled)

    async def set_retention(self, retention: Any) -> None:
        if retention in list(Texts.RETENTIONS):  # a list also looks for what has no hash
            await self._save(retention_days=Texts.RETENTIONS[retention])

    async def _save(self, **changes: Any) -> None:
        try:
            await self.tracker.in_pool(lambda: self.tracker.settings.save(**changes))
        except (OSError, StoreError, ValueError) as error:
            raise self._gr.Error(Texts.NOT_SAVED.format(reason=reason_of(error))) from None

    async def act(self, action: Any) -> str:
        """Does what a button says. Gives the job that it was for, and that which is to be open then, if any."""
        name, _, job_id = str(action).partition(" ")
        opened: Optional[str] = job_id
        try:
            if name == PURGE:
                self._begin_purge()
            elif name == CANCEL_WAITING:
                await self.tracker.in_pool(self.tracker.cancel_all, Filter(status=PENDING), pool=self.tracker.bulk)
            elif name in (CANCEL, RETRY, DELETE) and ID_FORM.match(job_id):  # anybody can send anything
                opened = await self._act_on_job(name, job_id)
        except (Conflict, Gone, TooMany, StoreError) as error:
            raise self._gr.Error(Texts.NOT_DONE.format(reason=error)) from None
        if opened is None:
            raise self._gr.Error(Texts.NOT_DONE.format(reason=Texts.GONE))
        return f"{job_id} {opened}"

    async def _act_on_job(self, name: str, job_id: str) -> Optional[str]:
        """The ID of the job to be open then, None if there is no such job. Raises what the tracker does."""
        tracker = self.tracker
        if name == CANCEL:
            is_there = await tracker.in_pool(tracker.cancel, job_id, pool=tracker.pool_for(tracker.running(job_id)))
            await tracker.wait_until_stored(job_id)
            return job_id if is_there else None
        await tracker.wait_until_stored(job_id)
        if name == DELETE:
            await tracker.in_pool(tracker.delete, job_id)
            return ""
        job = await tracker.in_pool(tracker.retry, job_id)
        return job and job.id

    def _begin_purge(self) -> None:
        """It may take minutes, so its result comes with a later look."""
        if not self._purging:
            self._purge_began = self.tracker.store.now()
            self._purge = self.tracker.pool.submit(self._run_purge)

    def _run_purge(self) -> Tuple[Purged, str]:
        """What was removed, and why nothing was."""
        purged = self.housekeeper.purge()
        if any(purged):
            return purged, ""
        young, lost = self.housekeeper.kept_orphans()
        why = [why_no_job(self.housekeeper.outlook(), self.tracker.store.now())]
        if young:
            why.append(Texts.YOUNG_FILES.format(files=young))
        if lost:
            why.append(Texts.LOST_JOBS.format(jobs=as_count(lost, Texts.JOBS)))
        return purged, " ".join(why)

    async def look(
        self, state: Any, enabled: Any, retention: Any, status: Any, ip: Any, text: Any, label: Any
    ) -> List[Any]:
        """The outputs of `build`, for the values of its inputs."""
        filter_ = Filter(
            ip=str(ip or "").strip() or None,
            status=status if status in STATUSES else None,
            label=str(label or "").strip() or None,
            q=str(text or "").strip()[: Filter.LIMIT] or None,
        )
        pool = self.tracker.searchers if filter_.text else self.tracker.pool
        return await self.tracker.in_pool(self._look, PageState.parse(state), enabled, retention, filter_, pool=pool)

    def _look(self, state: PageState, enabled: Any, retention: Any, filter_: Filter) -> List[Any]:
        settings = self.tracker.settings
        settings.refresh()
        notes, purge = [*self._notes()], Texts.PURGING if self._purging else Texts.PURGE
        if state.confirm == PURGE and not self._purging:
            note, purge = self._purge_question()
            notes.append(note)
        html = self.html.render(state, filter_, notes)
        version = str(zlib.crc32(html.encode()))
        days = self._retention()
        # A value that agrees is left alone: it may be changing under somebody's hand.
        return [
            self._gr.update(**({} if enabled == settings.enabled else {"value": settings.enabled})),
            self._gr.update(choices=self._retentions(), **({} if retention == days else {"value": days})),
            self._gr.update(interactive=purge != Texts.PURGING, value=purge),
            self._gr.update() if version == state.version else f'<div data-{NAMES["version"]}="{version}">{html}</div>',
        ]

    @property
    def _purging(self) -> bool:
        return self._purge is not None and not self._purge.done()

    def _notes(self) -> Iterator[Note]:
        """What has to be said before all else."""
        settings, trouble, kept = self.tracker.settings, self.trouble(), self.housekeeper.kept_for_clock
        if trouble:
            yield Note(Texts.NOT_TRACKED.format(reason=trouble), is_error=True)
        elif not settings.enabled and "enabled" in settings.locked:
            yield Note(Texts.LOCKED_OFF.format(variable=settings.locked["enabled"]))
        elif not settings.enabled:
            yield Note(Texts.TRACKING_OFF)
        if settings.trouble:
            yield Note(Texts.SETTINGS_TROUBLE.format(trouble=settings.trouble), is_error=True)
        if self.tracker.store.trouble:
            yield Note(Texts.STORE_TROUBLE.format(reason=self.tracker.store.trouble), is_error=True)
        if kept and not self._purging:
            yield Note(Texts.KEPT_FOR_CLOCK.format(jobs=kept))
        if self._purging:
            yield Note(Texts.PURGE_WAITS if self.housekeeper.waits else Texts.PURGE_RUNS)
        elif self._purge is not None and self._purge.exception() is not None:
            yield Note(Texts.PURGE_FAILED.format(reason=reason_of(self._purge.exception())), is_error=True)
        elif self._purge is not None:
            (jobs, images, size), why = self._purge.result()
            text = escape(Texts.PURGED_NOTHING if why else Texts.PURGED)
            began = as_time(self._purge_began)
            yield Note(text.format(time=began, jobs=jobs, images=images, size=as_size(size), why=why))

    def _purge_question(self) -> Tuple[Note, str]:
        """What is said before a purge, and what its button says."""
        try:
            outlook = self.housekeeper.outlook()
        except StoreError as error:
            return Note(Texts.PURGE_FAILED.format(reason=error), is_error=True), Texts.PURGE
        if not outlook.jobs:
            why = why_no_job(outlook, self.tracker.store.now())
            text = Texts.PURGE_REMOVES_NO_JOB.format(why=why, files=Texts.FILES_TOO)
            return Note(text), Texts.PURGE_FILES
        jobs, days = as_count(outlook.jobs, Texts.JOBS), as_count(outlook.days or 0, Texts.DAYS)
        text = Texts.PURGE_REMOVES.format(jobs=jobs, days=days, files=Texts.FILES_TOO)
        return Note(text), Texts.PURGE_JOBS.format(jobs=jobs)


TAB_SCRIPT = with_names(
    """() => {
    if (window.jobTracker) return;  // gradio may load the page's parts again
    const EVERY = 1500, AWAY = 10000;  // milliseconds between two looks, and until an answer is given up
    const PAUSE = 500, CONFIRM = 8000;  // until a button that asks may be pressed again, and until it no longer asks
    const state = {page: 0, job: history.state?.jobTracker ?? "", confirm: ""};
    let due = 0, asked = null, acted = false, watched = null, token = null;
    let wish = "", confirmed = 0, unconfirm = null;

    const learnToken = () => fetch(".$token").then((answer) => answer.ok ? answer.json() : "")
        .catch(() => "").then((text) => { token = text; });
    const tick = () => {
        const root = [...document.querySelectorAll("#$tab")].find((element) => element.offsetParent);
        if (document.hidden || !root || token === null) return;
        if (root !== watched) watch(root);
        const now = Date.now();
        if (now < due || asked !== null && now - asked < (acted ? EVERY : AWAY)) return;
        if (asked !== null) learnToken();  // no answer: the webui may be another one since a restart
        asked = now;
        acted = false;
        root.querySelector("#$tab_look").click();
    };
    const act = (change = {}, delay = 0) => {
        Object.assign(state, change);
        acted = true;
        due = Date.now() + delay;
        tick();
    };

    // What is alike stays in place, so that focus, selection and a click under way live on.
    const morph = (old, fresh) => {
        if (old.isEqualNode(fresh)) return;
        if (old.nodeType !== 1 || old.nodeName !== fresh.nodeName || old.dataset.$key !== fresh.dataset.$key)
            return old.replaceWith(fresh.cloneNode(true));
        if (old.nodeName !== "DETAILS") {  // which are the reader's to open and close
            for (const {name} of [...old.attributes])  // the style is this script's own, see below
                if (!fresh.hasAttribute(name) && name !== "style") old.removeAttribute(name);
            for (const {name, value} of fresh.attributes)  // the same source again would be loaded again
                if (old.getAttribute(name) !== value) old.setAttribute(name, value);
        }
        // What has a key is never made into something else: a row stays that of its job, and its picture with it.
        const keyOf = (node) => node?.dataset?.$key, keys = new Set([...fresh.children].map(keyOf));
        for (const child of [...old.children]) if (keyOf(child) && !keys.has(keyOf(child))) child.remove();
        [...fresh.childNodes].forEach((child, place) => {
            const here = old.childNodes[place];
            if (here && keyOf(here) === keyOf(child)) return morph(here, child);
            const same = keyOf(child) && [...old.children].find((one) => keyOf(one) === keyOf(child));
            if (same) morph(same, child);
            old.insertBefore(same || child.cloneNode(true), here ?? null);
        });
        while (old.childNodes.length > fresh.childNodes.length) old.lastChild.remove();
    };
    const fresh = (part) => watched.querySelector("#$tab_fresh " + part);
    const changed = () => {
        watched.querySelectorAll("time:not([title])").forEach(inLocalTime);
        for (const part of [".$top", ".$main"])  // the first of each is the one that is seen
            if (fresh(part)) morph(watched.querySelector(part), fresh(part));
    };
    const observer = new MutationObserver(changed);
    const watch = (root) => {
        observer.disconnect();
        observer.observe(root, {childList: true, subtree: true});
        watched = root;
        changed();
    };
    const inLocalTime = (element) => {
        const moment = new Date(element.dateTime);
        const day = {month: "short", day: "2-digit"};
        const clock = {hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23"};
        element.title = moment.toLocaleString([], {dateStyle: "full", timeStyle: "long"});
        element.textContent = moment.toLocaleString([], {...day, ...clock});
    };

    // An open job has an entry of its own in the browser's history, so that Back closes it.
    const openJob = (job) => {
        const isOpen = history.state?.jobTracker;
        if (!job && isOpen) history.back();
        else if (job && job !== isOpen)
            history[isOpen ? "replaceState" : "pushState"]({...history.state, jobTracker: job}, "");
        act({job, confirm: ""});
    };
    addEventListener("popstate", (event) => {
        const job = event.state?.jobTracker ?? "";
        if (job !== state.job) act({job, confirm: ""});
    });

    // What cannot be undone is done by a second press, once the page has shown what it does.
    const press = (action, asks) => {
        const isShown = watched.querySelector(".$top").dataset.$confirm === action;
        clearTimeout(unconfirm);
        if (asks && !(isShown && Date.now() - confirmed > PAUSE)) {
            confirmed = Date.now();
            unconfirm = setTimeout(() => act({confirm: ""}), CONFIRM);
            return act({confirm: action});
        }
        wish = action;
        watched.querySelector("#$tab_action").click();
        act({confirm: ""});
    };
    const done = (answer) => {
        const [job, opened] = answer.split(" ");
        if (job === state.job && job !== opened) openJob(opened);
        else act();
    };

    document.addEventListener("click", (event) => {
        const target = event.target.closest(":is([data-$job], [data-$page], [data-$action]):is(#$tab *)");
        if (!target || target.tagName === "TR" && String(getSelection())) return;
        const {$job, $page, $action} = target.dataset;
        if ($action !== undefined) press($action, "$asks" in target.dataset);
        else if ($page !== undefined) act({page: Number($page)});
        else openJob($job);
    });
    document.addEventListener("keydown", (event) => {
        // A key that is held down is one press.
        if (event.repeat && event.target.closest?.("#$tab [data-$action], #$tab_purge")) event.preventDefault();
        if (event.key !== "Escape" || !watched?.offsetParent || !(state.confirm || state.job)) return;
        // The webui looks for an Interrupt button here, and its script breaks where a page has none.
        event.stopImmediatePropagation();
        if (state.confirm) act({confirm: ""});
        else openJob("");
    }, true);
    // A picture that is not there after all leaves its place empty, without the browser's sign for a broken one.
    for (const kind of ["error", "load"])
        document.addEventListener(kind, ({target}) => {
            const visibility = kind === "error" ? "hidden" : "";
            if (target.matches?.("#$tab :is(td, .$preview) img")) Object.assign(target.style, {visibility});
        }, true);
    document.addEventListener("visibilitychange", tick);
    setInterval(tick, 200);
    learnToken();

    const sign = (values) => [...values.slice(0, -1), token ?? ""];
    const ask = ([, ...values]) => {
        const version = fresh("[data-$version]")?.dataset.$version;
        return sign([JSON.stringify({...state, version}), ...values]);
    };
    const order = ([, ...values]) => sign([wish, ...values]);
    const answered = () => {
        asked = null;
        if (!acted) due = Date.now() + EVERY;
        tick();
    };
    const filter = () => act({page: 0}, 300);
    window.jobTracker = {act, answered, ask, done, filter, order, press, sign};
}""",
    token=Tab.TOKEN,
)

TAB_STYLE = with_names("""
#$tab { gap: 16px; }
#$tab_style, #$tab_look, #$tab_action, #$tab_fresh { display: none !important; }
#$tab :is(button, p, table, figure, img, summary, dd) { margin: 0; }
#$tab b { font-weight: 600; }
#$tab :is(small, em) { font-size: inherit; font-style: normal; }
#$tab :is(small, em, th, summary, dt, .$empty, .$blank, .$figures > div) { color: var(--body-text-color-subdued); }
#$tab :is(table, nav, dl, summary, dt, header button, .$text, .$figures > div) { font-size: var(--text-sm); }
#$tab :is(.$empty, .$figures, .$frame, aside) { border: 1px solid var(--border-color-primary);
    border-radius: var(--radius-lg); }
#$tab :is(nav button, header button, [data-$action]) { padding: 4px 12px; border: 1px solid var(--border-color-primary);
    border-radius: var(--radius-md); background: none; color: var(--body-text-color); cursor: pointer; }
#$tab :is(nav button, header button, [data-$action]):hover { border-color: var(--color-accent); }
#$tab [data-$action] { font-size: var(--text-sm); white-space: nowrap; }
:is(#$tab .$asking, #$tab:has([data-$confirm="purge"]) #$tab_purge) { border-color: var(--color-red-500);
    background: var(--color-red-500); color: white; }

#$tab_settings { align-items: flex-start; gap: 16px; padding: 4px 0; }
#$tab_settings :is(.form, .block) { border: 0 !important; background: none; box-shadow: none; }
/* The webuis take this from some kinds of controls, and not from others. */
#$tab_filters [data-testid="block-info"] { margin-bottom: var(--spacing-lg) !important; }
#$tab_settings .form { display: flex; flex-flow: row wrap; gap: 16px 64px; overflow: visible; }
#$tab_settings .block { flex: 0 1 auto; width: auto; padding: 0; }
#$tab_enabled { display: flex; flex-direction: column; gap: 6px; }
#$tab_enabled label { order: -1; }
#$tab_settings label:has(:disabled) { cursor: default; }
#$tab_settings label:has(:disabled):not(.selected) { opacity: 0.5; }
#$tab_purge { flex: none; align-self: center; margin-left: auto; padding: 6px 20px;
    border: 1px solid var(--border-color-primary); }

/* gradio 4 takes the margin below from whatever is the last child, by !important. */
#$tab .$note { margin-bottom: 8px !important; padding: 8px 12px; border-left: 3px solid var(--border-color-primary);
    background: var(--background-fill-secondary); color: var(--body-text-color); overflow-wrap: anywhere; }
#$tab .$note.$error { border-color: var(--color-red-500); }
#$tab .$empty { padding: 64px 16px; text-align: center; }

#$tab .$figures { display: grid; grid-template-columns: repeat(6, 1fr); gap: 1px; overflow: hidden;
    background: var(--border-color-primary); }
#$tab .$figures > div { display: flex; flex-wrap: wrap; align-content: flex-start; align-items: center;
    justify-content: space-between; gap: 4px 8px; padding: 10px 14px; background: var(--background-fill-primary); }
#$tab .$figures b { display: block; font-size: var(--text-lg); color: var(--body-text-color);
    font-variant-numeric: tabular-nums; white-space: nowrap; }

#$tab span.$status { white-space: nowrap; }
#$tab span.$status::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 7px;
    border: 2px solid var(--dot); border-radius: 50%; background: var(--dot); box-sizing: border-box;
    vertical-align: 1px; }
#$tab span.$Pending { --dot: var(--body-text-color-subdued); }
#$tab span.$Pending::before { background: none; }
#$tab span.$Processing { --dot: var(--color-accent); }
#$tab span.$Completed { --dot: var(--color-green-500); }
#$tab span.$Failed { --dot: var(--color-red-500); }
#$tab progress { display: block; width: 100%; height: 3px; margin: 3px 0 -6px; border: 0; border-radius: 2px;
    overflow: hidden; appearance: none; background: var(--border-color-primary); }
#$tab progress::-webkit-progress-bar { background: var(--border-color-primary); }
#$tab progress::-webkit-progress-value { background: var(--color-accent); }
#$tab progress::-moz-progress-bar { background: var(--color-accent); }

#$tab .$main { display: flex; align-items: flex-start; gap: 16px; }
#$tab .$main > * { flex: 1 1 0; min-width: 0; }
#$tab .$frame { overflow: hidden; }
#$tab table { width: 100%; border: 0; border-collapse: collapse; table-layout: fixed; line-height: 1.4; }
/* A webui can have other paddings for the cells of all tables, by !important. */
#$tab :is(th, td) { padding: 8px 10px !important; text-align: left; vertical-align: middle; white-space: nowrap;
    overflow: hidden; text-overflow: ellipsis; }
#$tab :is(thead, tbody, tr, th, td) { border: 0; }
#$tab th { font-weight: 500; background: var(--background-fill-secondary); }
#$tab td { color: var(--body-text-color); }
#$tab tbody tr { border-top: 1px solid var(--border-color-primary); cursor: pointer; background: none; }
#$tab tbody tr:is(:hover, .$open) { background: var(--background-fill-secondary); }
#$tab tbody tr.$open { box-shadow: inset 3px 0 var(--color-accent); }
#$tab :is(td, dd) button { display: block; padding: 0; border: 0; background: none; color: var(--body-text-color);
    font: inherit; font-family: var(--font-mono); cursor: pointer; }
#$tab dd button { text-decoration: underline; }
#$tab .$thumbnail { width: 58px; }
#$tab td.$thumbnail { height: 48px; padding: 4px 0 4px 10px !important; text-overflow: clip; }
#$tab td img { display: block; width: 40px; height: 40px; object-fit: cover; border-radius: var(--radius-sm);
    background: var(--background-fill-secondary); }
#$tab .$id { width: 100px; }
#$tab .$time { width: calc(20px + 8.8em); }
#$tab .$type { width: 80px; }
#$tab :is(th, td).$status { width: 150px; }
#$tab .$images { width: 70px; text-align: right; }
#$tab .$seconds { width: 80px; text-align: right; font-variant-numeric: tabular-nums; }
#$tab :is(.$ip, .$label, .$server) { width: 130px; }
#$tab .$main:has(aside) :is(.$type, .$label, .$images, .$seconds, .$ip, .$server) { display: none; }
#$tab nav { display: flex; justify-content: center; align-items: center; gap: 4px; padding: 12px 0;
    white-space: nowrap; }
#$tab nav span { min-width: 110px; text-align: center; font-variant-numeric: tabular-nums; }
#$tab nav button:disabled { opacity: 0.4; cursor: default; border-color: var(--border-color-primary); }

#$tab .$main aside { flex: 0 0 min(480px, 45%); position: sticky; top: 8px; max-height: calc(100vh - 16px);
    overflow-y: auto; padding: 0 16px; background: var(--background-fill-primary); }
#$tab header { display: flex; align-items: center; gap: 14px; position: sticky; top: 0; z-index: 1;
    padding: 12px 0; background: var(--background-fill-primary); }
#$tab header b { font-family: var(--font-mono); }
#$tab header button { margin-left: auto; }
#$tab header progress { width: 80px; margin: 2px 0 0; }
#$tab .$actions { display: flex; gap: 8px; margin: 2px 0 14px; }
#$tab aside .$note { max-height: 240px; overflow: auto; }
#$tab .$gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 12px; }
#$tab :is(.$gallery:not(:empty), dl, details) { margin: 0 0 14px !important; }
#$tab figure:only-child { grid-column: 1 / -1; }
#$tab :is(figure img, .$blank) { display: block; width: 100%; max-height: 420px; object-fit: contain;
    border-radius: var(--radius-md); background: var(--background-fill-secondary); }
#$tab figure img { aspect-ratio: auto 1; }  /* room for what is still to come */
#$tab .$blank { padding: 48px 8px; text-align: center; }
#$tab figcaption { margin-top: 4px; font-size: var(--text-xs); overflow-wrap: anywhere; }
#$tab :is(summary, dt) { font-weight: 400; }
#$tab summary { cursor: pointer; }
#$tab .$text { max-height: 240px; margin-top: 4px; padding: 8px 10px; overflow: auto; white-space: pre-wrap;
    overflow-wrap: anywhere; border-radius: var(--radius-md); background: var(--background-fill-secondary);
    line-height: 1.5; }
#$tab dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px 16px; }
#$tab dl .$wide { grid-column: 1 / -1; }
#$tab dd { overflow-wrap: anywhere; }

/* The prompt has what the other columns leave. gradio is narrower by a quarter from 1023 on. */
@media (max-width: 1400px) {
    #$tab table:has(.$server) :is(.$type, .$images) { display: none; }
}
@media (max-width: 1250px) {
    #$tab table:has(.$label, .$server) :is(.$type, .$images, .$seconds) { display: none; }
    #$tab :is(table:has(.$server) .$ip, .$main:has(aside) .$time) { display: none; }
}
@media (min-width: 1024px) {
    #$tab .$figures:has([data-$action]) { grid-template-columns: 1.5fr repeat(5, 1fr); }
}
@media (max-width: 1023px) {
    #$tab .$figures { grid-template-columns: repeat(3, 1fr); }
    #$tab :is(.$type, .$ip, .$server) { display: none; }
    #$tab .$main aside { position: fixed; z-index: 100; inset: 0; max-width: 100vw; max-height: 100vh; border: 0;
        border-radius: 0; }
    /* Where anything on the page is wider than a phone, the job would be as wide, and Close out of sight. */
    :is(html, body):has(#$tab .$main aside) { overflow-x: clip; }
}
@media (max-width: 800px) {
    #$tab :is(.$label, .$images, .$seconds) { display: none; }
}
@media (max-width: 640px) {
    #$tab .$figures { grid-template-columns: repeat(2, 1fr); }
    #$tab_purge { margin-left: 0; }
    #$tab_filters .form { display: grid; grid-template-columns: 1fr 1fr; }
    #$tab_filters .form > * { min-width: 0 !important; }
    #$tab thead { display: none; }
    #$tab tbody tr:first-child { border: 0; }
    #$tab td progress { margin: 3px 0 0; }
    #$tab tbody tr { position: relative; display: grid; grid-template-columns: auto 1fr auto;
        padding: 8px 10px !important; }
    #$tab :is(td.$prompt, td.$status, td.$time, td.$label) { display: block; width: auto; padding: 1px 0 !important; }
    #$tab td.$thumbnail { grid-area: 1 / 1 / 3 / 2; display: block; width: 48px; height: 40px;
        padding: 0 !important; }
    #$tab td.$prompt { grid-area: 1 / 2 / 2 / 4; }
    #$tab td.$time { grid-column: 2; }
    #$tab td.$status { grid-column: 3; padding-left: 8px !important; }
    #$tab td.$label { grid-column: 2 / 4; }
    #$tab td.$label:empty { display: none; }
    #$tab :is(.$images, .$seconds):is(th, td) { display: none; }
    /* Unseen, but its button is how the keyboard and screen readers come to a row. */
    #$tab td.$id { position: absolute; width: 1px; height: 1px; padding: 0 !important; clip-path: inset(50%); }
    #$tab tbody tr:has(:focus-visible) { outline: 2px solid var(--color-accent); outline-offset: -2px; }
    #$tab nav { flex-wrap: wrap; }
    #$tab nav span { flex: 1 0 100%; order: -1; }
}
""")


# ------------------------------------------------------------------------------------------------------------------
# Host: the only part that knows the webui
# ------------------------------------------------------------------------------------------------------------------


class UnsupportedHost(Exception):
    """The host lacks something that we rely on."""


class StartGuard:
    """Keeps the requests that come while the webui starts from ending its start.

    With the UI, gradio's server answers before the host has put its layers around the application. For that the host
    first takes down those that there are. A request that comes then has new ones built, after which starlette adds no
    more, and the host goes on without an API, or ends. Clients that ask until the webui is back send such requests. So
    until the start is over, they get layers that are built for them alone.
    """

    def __init__(self, kind: Any):
        """From now on, the applications of the class `kind` are guarded, until `end`."""
        self._kind = kind
        self._before = before = kind.__call__
        served: "WeakSet[Any]" = WeakSet()

        async def call(app: Any, scope: Scope, receive: Receive, send: Send) -> None:
            if app not in served:  # the first that asks is its own server
                served.add(app)
                await before(app, scope, receive, send)
                return
            scope["app"] = app  # this and the next line are all that starlette and fastapi do besides
            scope["root_path"] = app.root_path or scope.get("root_path", "")
            await (app.middleware_stack or app.build_middleware_stack())(scope, receive, send)

        self._call = kind.__call__ = call

    def end(self) -> None:
        """May be called again. Not where another has taken the place meanwhile: that goes on to ask for ours."""
        if self._kind.__call__ is self._call:
            self._kind.__call__ = self._before


class Host:
    """The webui: A1111, its forks, and SD.Next, with gradio 3 or 4. All that differs between them stands here."""

    WORKER_THREADS = 40  # of anyio, for all that a webui does in threads
    SPARE_THREADS = 1000  # the most worker threads that are added to these

    @property
    def _shared(self) -> Any:
        from modules import shared

        return shared

    # For the Tracker: the generation that has the queue lock

    def begun(self) -> Any:
        """What the host says of when its last generation began."""
        return getattr(self._shared.state, "time_start", None)

    def progress(self, begun: Any) -> Progress:
        """How far the host is. `begun` is what `begun()` said when the job got the queue lock."""
        try:
            state = self._shared.state
            if self.begun() == begun or state.job_count <= 0:  # the rest is from the generation before
                return 0.0
            progress = state.job_no / state.job_count
            if state.sampling_steps:
                progress += state.sampling_step / state.sampling_steps / state.job_count
            return min(max(progress, 0.0), 1.0)
        except (AttributeError, TypeError):  # the state of a fork that counts in another way
            return None

    def counted_seconds(self, seconds: float) -> float:
        """How many of the `seconds` that a generation has taken `progress` is about: on SD.Next, those of one image."""
        since = getattr(self._shared.state, "time_start", None)
        return min(seconds, max(time.time() - since, 0.0)) if isinstance(since, float) else seconds

    def has_previews(self) -> bool:
        """Whether the settings allow live previews."""
        # SD.Next lacks the former. By the latter it shows the last picture of the generation before.
        options = self._shared.opts
        return getattr(options, "live_previews_enable", True) and getattr(options, "show_progress_type", "") != "None"

    def preview(self, begun: Any, last: Any) -> Optional[Tuple[Any, bytes, str]]:
        """A picture of the generation under way: where that stood, the image, its media type. None if none is new.

        `begun` is what `begun()` said when the job got the queue lock, and `last` where the generation stood in the
        last picture of this job. Made by the host's own function, as often as the settings want it, on this thread.

        That function puts the picture into the host's state once it is made, and by then that can be the state of
        another generation. So it is given a copy, which is one moment of one generation. What others had the host make
        is not used, for the same reason, but for what the generation has made itself.
        """
        shared, state = self._shared, copy.copy(self._shared.state)
        if state.time_start == begun or state.job_count <= 0 or not self.has_previews():
            return None
        place: Tuple[Any, ...] = (state.time_start, state.job_no)
        is_own = not getattr(shared, "parallel_processing_allowed", True)  # with little memory
        is_own = is_own or getattr(shared.opts, "show_progress_every_n_steps", None) == -1
        if is_own:
            place += (state.id_live_preview,)
        else:
            before = last[-1] if last and last[:-1] == place else min(state.current_image_sampling_step, 0)
            place += (state.sampling_step,)
            state.current_image, state.current_image_sampling_step = None, before
            if hasattr(state, "disable_preview"):  # SD.Next, where the other function refuses what the API generates
                if shared.cmd_opts.lowvram or state.job in ("VAE", "Upscale"):
                    return None
                state.do_set_current_image()
            else:
                state.set_current_image()
        if state.current_image is None or place == last:
            return None
        image, format_ = state.current_image, getattr(shared.opts, "live_previews_image_format", "jpeg")
        file = io.BytesIO()
        if format_ == "jpeg" and image.mode not in ("RGB", "L"):
            image = image.convert("RGB")
        image.save(file, format_, **({"compress_level": 1} if format_ == "png" else {}))
        return place, file.getvalue(), f"image/{format_}"

    def interrupt(self) -> None:
        self._shared.state.interrupt()

    def dequeue(self, task: Optional[str]) -> None:
        """Takes a task off the list of those that wait: the host takes off only what has begun."""
        with contextlib.suppress(ImportError, AttributeError):  # where there is no such list
            from modules import progress

            progress.pending_tasks.pop(task, None)

    # For the Runner and a Generation: whether it generates

    def is_ready(self) -> bool:
        """Whether it can generate. SD.Next serves before it has its model, and answers without an image until then."""
        try:
            from modules.modeldata import model_data
        except ImportError:
            return True
        return not (getattr(model_data, "locked", False) or model_data.lock.locked())

    def hides_failures(self) -> bool:
        """Whether it answers what failed as what succeeded, but without an image, as SD.Next does."""
        return hasattr(self._shared.state, "disable_preview")

    # For a Generation: its request and its thread

    @contextlib.contextmanager
    def extra_worker_thread(self) -> Iterator[bool]:
        """Gives the host one worker thread more, unless it has too many already. In the event loop only.

        A generation holds a thread for as long as it waits in the queue: 40 of them would leave none for others.
        """
        limiter = anyio.to_thread.current_default_thread_limiter()
        added = limiter.total_tokens < self.WORKER_THREADS + self.SPARE_THREADS
        limiter.total_tokens += added
        try:
            yield added
        finally:
            limiter.total_tokens -= added

    def adapt_request(self, arguments: Dict[str, Any], name: str) -> Tuple[str, Optional[bool], Optional[str]]:
        """Makes the host answer with the images, and /internal/progress by our name unless the client gave one.

        Returns the prompt, the client's `send_images`, and the host's own name for the request.
        """
        body = next((value for value in arguments.values() if hasattr(value, "prompt")), None)
        send_images = getattr(body, "send_images", True)
        if not send_images:
            body.send_images = True
        if not getattr(body, "force_task_id", True):
            body.force_task_id = name
        prompt = getattr(body, "prompt", "")
        task_id = getattr(body, "force_task_id", None)
        return prompt if isinstance(prompt, str) else "", send_images, task_id

    # For the Extension

    def guard_start(self) -> Callable[[], None]:
        """Guards the start of a webui with a UI, which is yet to be launched. Returns what ends that."""
        try:
            return StartGuard(importlib.import_module("gradio.routes").App).end
        except (ImportError, AttributeError):  # a gradio of another kind
            return lambda: None

    def server_name(self, demo: Any) -> str:
        """By which people know this webui: its machine and its port. `demo` is gradio's, None without a UI."""
        port = getattr(demo, "server_port", None) or getattr(getattr(self._shared, "cmd_opts", None), "port", None)
        return f"{socket.gethostname()}:{port or (7860 if demo is not None else 7861)}"

    # For the Webhooks

    def request_rules(self) -> Tuple[bool, bool]:
        """Whether the API may send requests to URLs of its clients, and whether only to global addresses.

        SD.Next has no such options, and so forbids nothing.
        """
        options = getattr(self._shared, "opts", None)
        are_allowed = getattr(options, "api_enable_requests", True)
        return bool(are_allowed), bool(getattr(options, "api_forbid_local_requests", False))

    # For the OriginGuard

    def allows_origin(self, origin: str) -> bool:
        """Whether --cors-allow-origins names an origin, in the way in which the host's own CORS layer takes it."""

        def option(*names: str) -> str:
            options = getattr(self._shared, "cmd_opts", None)
            return next(filter(None, (getattr(options, name, None) for name in names)), "")

        # The second ones are SD.Next's.
        allowed = option("cors_allow_origins", "cors_origins").split(",")
        pattern = option("cors_allow_origins_regex", "cors_regex")
        with contextlib.suppress(re.error):  # Forge's pages do without the layer that would not start with it
            return "*" in allowed or origin in allowed or bool(pattern and re.fullmatch(pattern, origin))
        return False

    # For the API: the host's routes

    def generation_routes(self, app: Any) -> List[Any]:
        """SD.Next has each of them twice."""
        paths = tuple(f"/sdapi/v1/{type_}" for type_ in TYPES)
        routes = [route for route in app.routes if getattr(route, "path", "").endswith(paths)]
        return [route for route in routes if "POST" in (route.methods or ())]

    @staticmethod
    def type_of(route: Any) -> str:
        return route.path.rpartition("/")[2]

    def check(self, routes: List[Any]) -> None:
        """Raises UnsupportedHost, or whatever else, where something is missing that we use."""
        for route in routes:
            if hasattr(route.app, "tracker"):  # as ours has, of whatever version
                raise UnsupportedHost("another copy of Job Tracker is at work. Remove one of them")
            has_lock = hasattr(getattr(route.endpoint, "__self__", None), "queue_lock")
            if not has_lock or not callable(route.dependant.call):
                raise UnsupportedHost(f"this webui is not supported, its {route.path} is of another kind")

    def find_add_api_route(self, routes: List[Any]) -> Callable[..., Any]:
        """The host's own add_api_route, which guards a route as it guards the host's. Raises UnsupportedHost."""
        owners = [route.endpoint.__self__ for route in routes]
        for owner in (*owners, getattr(self._shared, "api", None)):  # SD.Next has it in the latter place
            if callable(getattr(owner, "add_api_route", None)):
                return owner.add_api_route
        raise UnsupportedHost("this webui is not supported, it has no add_api_route")

    def observe(self, routes: List[Any]) -> None:
        """From now on, the endpoints of these routes tell their generation how far they are."""
        for route in routes:
            owner = route.endpoint.__self__
            if not isinstance(owner.queue_lock, ObservedLock):  # the routes share one
                owner.queue_lock = ObservedLock(owner.queue_lock)
            route.dependant.call = observed_endpoint(route.dependant.call)

    def private_app(self, route: Any) -> ASGIApp:
        """A copy of a generation route that needs no credentials, and is never served, for requests that had them.

        It stands in an application of its own, since newer fastapis want what only an application gives to a route.
        """
        app, path = FastAPI(openapi_url=None), f"/sdapi/v1/{self.type_of(route)}"
        private = APIRoute(path, route.endpoint, methods=["POST"], response_model=route.response_model)
        private.dependant.call = observed_endpoint(private.dependant.call)
        private.app = with_error_kept(private.app)
        app.router.routes.append(private)
        return app

    def put_around(self, app: Any, layer: Callable[[ASGIApp], ASGIApp]) -> None:
        """Puts a layer around all others, whether these are built already (Forge, or after a first request) or not."""
        build = app.build_middleware_stack
        app.build_middleware_stack = lambda: layer(build())
        if getattr(app, "middleware_stack", None) is not None:
            app.middleware_stack = layer(app.middleware_stack)

    def on_shutdown(self, app: Any, function: Callable[[], Any]) -> None:
        """The server calls a coroutine at its end, and waits for it, where the webui lets it end in good order."""
        with contextlib.suppress(AttributeError):  # a later starlette
            app.router.on_shutdown.append(function)

    # For the tab: what gradio serves

    def keep_from_gradio(self, demo: Any, folders: Iterable[str]) -> None:
        """gradio 3 gives every file below the webui's folder to whoever can open the UI, but for what is blocked."""
        if hasattr(demo, "blocked_paths"):
            demo.blocked_paths = [*demo.blocked_paths, *folders, *map(os.path.realpath, folders)]

    def add_page_routes(self, app: Any, routes: Dict[str, Callable[..., Any]]) -> None:
        """Adds routes for the tab, of which the first that fits a path has it.

        Whoever gradio lets see the page may use them, with or without --api-auth.
        """
        paths = {route.path: route for route in app.routes if hasattr(route, "dependencies")}
        login = next((route.dependencies for path, route in paths.items() if path.startswith("/file=")), None)
        if login is None:
            log.warning("The tab shows no images, since gradio guards its files in an unknown way")
            return
        generation = f"/sdapi/v1/{TYPES[0]}"
        roots = {path[: -len(generation)] for path in paths if path.endswith(generation)}  # SD.Next has a subpath
        for root in {"", *roots}:
            for path, endpoint in routes.items():
                app.add_api_route(root + path, endpoint, dependencies=login, include_in_schema=False)


class Extension:
    """The program inside one life of the webui, from the loading of its scripts to their unloading."""

    def __init__(self) -> None:
        settings = Settings(EXTENSION_FOLDER, dict(os.environ))
        self.host = host = Host()
        predecessor = Predecessor(settings.folder, settings.data_folder)
        if settings.store_url is None:
            predecessor.merge_jobs()
        store, images = open_stores(settings, predecessor.refuse_to_open)
        self.tracker = Tracker(settings, host, store, images)
        self.housekeeper = Housekeeper(self.tracker, predecessor)
        origins = OriginGuard(host.allows_origin)
        self.api = Api(self.tracker, origins)
        self.tab = Tab(self.tracker, self.housekeeper, origins, lambda: self.trouble)
        self.trouble: Optional[str] = None  # why generations are not tracked, for the tab
        self.webhooks: Optional[Webhooks] = None  # from when all of the host is in place
        self._end_guard: Callable[[], None] = lambda: None
        self._app: Any = None
        self._routes: List[Any] = []  # those that are tracked, as they stand in the app

    def ui_tabs(self) -> List[Tuple[Any, str, str]]:
        """The pages beside the host's own. The host launches gradio's server next."""
        self._end_guard = self.host.guard_start()
        return [(self.tab.build(), "Job Tracker", "job_tracker")]

    def app_started(self, demo: Any, app: Any) -> None:
        """Everything of the host is in place. `demo` is gradio's, None without a UI."""
        has_tab = demo is not None
        self.tracker.announce(self.tracker.settings.server or self.host.server_name(demo))
        self.webhooks = Webhooks(self.tracker, self.host.request_rules)
        try:
            if has_tab:
                folders = {EXTENSION_FOLDER, self.tracker.settings.data_folder, self.tracker.images.folder}
                self.host.keep_from_gradio(demo, folders)
            self._attach(app, has_tab)
        except Exception as error:  # the webui is to start all the same
            is_known = isinstance(error, UnsupportedHost)
            self.trouble = str(error) if is_known else f"{type(error).__name__}: {reason_of(error)}"
            log.warning("Generations are not tracked: %s", self.trouble, exc_info=not is_known)
        self._end_guard()
        if has_tab:
            self.host.add_page_routes(app, self._page_routes())

    def _page_routes(self) -> Dict[str, Callable[..., Any]]:
        """What the tab asks for by itself. The path of the images, with any number, comes last of its kind."""
        return {
            TabHtml.THUMBNAIL: self.api.get_thumbnail,
            TabHtml.PREVIEW: self.api.get_page_preview,
            TabHtml.IMAGE: self.api.get_image,
            Tab.TOKEN: self.tab.get_token,
        }

    def script_unloaded(self) -> None:
        """The webui reloads its scripts."""
        self._end_guard()
        self.tracker.close()

    def _attach(self, app: Any, has_tab: bool) -> None:
        """Puts us around the host. Looks everything up before it changes anything: it is all or nothing."""
        routes = self.host.generation_routes(app)
        if not routes:
            if has_tab:  # which is refused to foreign pages all the same
                self.host.put_around(app, OuterMiddleware)
            raise UnsupportedHost("the API is off. Start the webui with --api")
        self.host.check(routes)
        add_api_route = self.host.find_add_api_route(routes)
        apps = {self.host.type_of(route): self.host.private_app(route) for route in routes}
        private = {type_: Middleware(private, type_, self.tracker, self.host) for type_, private in apps.items()}

        self.host.put_around(app, OuterMiddleware)
        self.host.on_shutdown(app, self.tracker.stop)
        self.api.add_to(add_api_route)
        self.host.observe(routes)
        for route in routes:
            type_, check_webhook = self.host.type_of(route), self.webhooks.check
            route.app = Middleware(route.app, type_, self.tracker, self.host, check_webhook)
            route.openapi_extra = {**(route.openapi_extra or {}), **GENERATION_DOCS}
        Runner(private, self.tracker)
        app.openapi_schema = None  # it may have been asked for already
        self._app, self._routes = app, routes
        self.housekeeper.watch = self._watch_routes
        settings = self.tracker.settings
        state = "on" if settings.enabled else "off"
        advice = "" if settings.enabled else self._advice(has_tab)
        log.info("Ready, tracking is %s, %s%s", state, places_of(settings), advice)

    def _advice(self, has_tab: bool) -> str:
        """How to turn tracking on."""
        variable = self.tracker.settings.locked.get("enabled")
        if variable:
            return f". {variable} turns it off"
        tab = 'tick Enable Tracking in the tab "Job Tracker", ' if has_tab else ""
        return f'. To turn it on, {tab}put "enabled": true into config.json, or start with TRACKER_ENABLED=1'

    def _watch_routes(self) -> None:
        """Notices when an extension that was loaded later has put a route of its own before one of ours."""
        trouble = None
        for own in self._routes:
            asked = {"type": "http", "method": "POST", "path": own.path, "root_path": "", "headers": []}
            try:
                first = next((route for route in self._app.routes if route.matches(dict(asked))[0] is Match.FULL), None)
            except Exception:  # a route of a kind that we do not know
                return
            if first is not own and trouble is None:
                module = getattr(getattr(first, "endpoint", None), "__module__", None)
                trouble = f"{own.path} was taken away by {module or 'another extension'}"
        if trouble != self.trouble:
            self.trouble = trouble
            if trouble:
                log.warning("Generations are not tracked any more: %s", trouble)
            else:
                log.info("Generations are tracked again")


class PrefixFilter(logging.Filter):
    """Formats the message once, with our name, because a handler that SD.Next adds breaks later formatting."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = f"[Job Tracker] {record.getMessage()}", None
        return True


def log_to_console() -> None:
    """The webui shows no log below warnings by itself, and this script may be loaded more than once."""
    log.handlers.clear()
    log.filters.clear()
    log.addFilter(PrefixFilter())
    log.addHandler(logging.StreamHandler(sys.stderr))
    log.setLevel(logging.INFO)
    log.propagate = False


if __name__ == "__main__":  # a webui gives the script another name
    log_to_console()
    sys.exit(run_command(sys.argv[1:], os.environ))

try:
    from modules import script_callbacks
except ImportError:  # imported by a test or a tool, not by a webui
    pass
else:
    log_to_console()
    extension = Extension()
    script_callbacks.on_ui_tabs(extension.ui_tabs)
    script_callbacks.on_app_started(extension.app_started)
    script_callbacks.on_script_unloaded(extension.script_unloaded)
