"""Job Tracker: no generation requested through the webui's API is lost.

Every `POST /sdapi/v1/txt2img` and `/sdapi/v1/img2img` becomes a job with an ID, which reaches the client in the
header `X-Job-ID` before generation starts. The job and its images are kept on disk and handed out later.

The file reads in the order in which a request meets its parts, and every part knows only those above it:

    Platform      what differs between operating systems
    Settings      config.json and the environment's variables
    Job           the record, on disk and as JSON
    JobStore      jobs.json
    ImageStore    images/
    Predecessor   the jobs of API-Job-Tracker-SD-WebUI
    Tracker       a job's life, the only writer of both stores
    Middleware    the ASGI side of one generation request
    API           the routes under /sdapi/v1/job
    Tab           the page "Job Tracker" in the webui
    Host          the only part that knows the webui
"""

import asyncio
import base64
import bisect
import contextlib
import contextvars
import copy
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import stat
import struct
import sys
import textwrap
import threading
import time
import traceback
import zlib
from array import array
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from datetime import datetime
from html import escape
from types import TracebackType
from typing import (
    Any,
    AsyncIterator,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Literal,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Union,
)
from weakref import WeakSet

import anyio.to_thread
from fastapi import HTTPException, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import VERSION as PYDANTIC
from pydantic import BaseModel, Field
from starlette.datastructures import URL
from starlette.routing import Match

log = logging.getLogger("job_tracker")

EXTENSION_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ------------------------------------------------------------------------------------------------------------------
# Platform: what differs between operating systems
# ------------------------------------------------------------------------------------------------------------------

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

BINARY = getattr(os, "O_BINARY", 0)
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # for a pipe where a file should be

OPEN_FILES_STAY = os.name == "nt"  # nobody can remove, rename or replace them
RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # SO_LINGER: a close drops what is unsent and resets
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.ENOTTY, errno.EINVAL)  # by a mount
IRREPLACEABLE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)  # a mounted file


LOCK_SECONDS = 5.0  # how long a lock between processes is waited for: nobody who is well holds one for so long
LOCK_MOMENT = 0.1  # the same once that was in vain
LOCK_PAUSE = 0.001  # seconds, at most, between two tries
LOCK_TURN = 0.05  # seconds for which one process may take the lock again and again, and no other meets it free


class FileLock:
    """A lock between processes: an open file that the system unlocks when its holder ends, however it ends.

    It also excludes other instances in the same process, since `flock` and `msvcrt.locking` belong to the open file.
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
        self._patience = LOCK_SECONDS
        self._turn = self._released = -math.inf  # when the row of turns began, and when the last of them ended

    def acquire(self, seconds: float = LOCK_SECONDS) -> bool:
        """Takes the lock. False when another still holds it after some seconds; 0 is one try. Raises OSError."""
        self._let_others_in()
        until, pause = time.monotonic() + seconds, LOCK_PAUSE / 8
        while True:
            if self._file is None:
                self._open()
            try:
                taken = self._take()
                is_lock = stands_for(self.path, self._file)
            except OSError:
                self.close()  # its disk may be gone, and come back
                raise
            if not is_lock:
                self.close()  # somebody has tidied it away, and others lock a new one
            elif taken or time.monotonic() >= until:
                return taken
            else:
                time.sleep(pause)
                pause = min(2 * pause, LOCK_PAUSE)

    def _let_others_in(self) -> None:
        """Who waits only tries now and then. One that takes the lock all the time would be met without it by chance."""
        now = time.monotonic()
        if now - self._released >= 2 * LOCK_PAUSE:
            self._turn = now
        elif now - self._turn >= LOCK_TURN:
            time.sleep(2 * LOCK_PAUSE)
            self._turn = time.monotonic()

    def _open(self) -> None:
        make_folder(os.path.dirname(self.path))
        source: Optional[os.stat_result] = None
        with contextlib.suppress(FileNotFoundError):
            source = os.stat(self._guarded)
        # A new one is at no moment open to more people than it is to be. Of 0o022 the umask leaves those who may write.
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | NO_WAIT | BINARY, 0o600 if source else 0o622)
        self.opened.add(self)
        with contextlib.suppress(OSError):
            found = os.fstat(self._file)
            if found.st_size or not os.path.samestat(os.lstat(self.path), found):
                return  # it is a link to somebody's file, whose mode is not ours to change
            source = source or found
            writers = source.st_mode & 0o022
            give_access(self._file, source, 0o600 | writers | writers << 1)

    def _take(self) -> bool:
        try:
            if fcntl:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                os.lseek(self._file, 0, os.SEEK_SET)
                msvcrt.locking(self._file, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                return False
            if fcntl is None or error.errno not in UNSUPPORTED:
                raise
            # A file system without locks, such as some network mounts: one webui alone is as safe as ever.
        return True

    def release(self) -> None:
        self._released = time.monotonic()
        if fcntl:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        else:
            os.lseek(self._file, 0, os.SEEK_SET)
            msvcrt.locking(self._file, msvcrt.LK_UNLCK, 1)

    def close(self) -> None:
        """Gives the lock and the file back."""
        file, self._file = self._file, None
        if file is None:
            return
        if fcntl:
            with contextlib.suppress(OSError):  # a child that is being forked just now may have a copy of it
                fcntl.flock(file, fcntl.LOCK_UN)
        close_file(file)
        self.opened.discard(self)

    @classmethod
    def let_go(cls) -> None:
        """In a forked child: closes its copies, by which it would hold the locks after its parent's end.

        Does not unlock them: a copy is the same open file, and the parent would lose its lock.
        """
        for lock in list(cls.opened):
            file, lock._file = lock._file, None
            close_file(file)
        cls.opened.clear()

    def hold(self) -> None:
        """Takes the lock. Raises TimeoutError, an OSError, if another holds it.

        After that it is only asked for a moment, until it can be had again: who waits for us has waited once already.
        """
        taken = self.acquire(self._patience)
        self._patience = LOCK_SECONDS if taken else LOCK_MOMENT
        if not taken:
            name = os.path.basename(self.path)
            raise TimeoutError(errno.ETIMEDOUT, f"another program holds the lock {name}", self.path)

    def __enter__(self) -> "FileLock":
        self.hold()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FileLock.let_go)


def reason_of(error: BaseException) -> str:
    """Why something failed, for clients and pages: without the path that an OSError names. The log may have that."""
    if isinstance(error, OSError):
        # One without a number was given a text alone, or, by shutil, a list of paths.
        own = error.args[0] if len(error.args) == 1 and not isinstance(error, shutil.Error) else ""
        return error.strerror or (own if isinstance(own, str) and own else type(error).__name__)
    return str(error) or type(error).__name__


def stands_for(path: str, file: int) -> bool:
    """Whether a name stands for a file that is open. Raises OSError if the name cannot be looked up."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        with contextlib.suppress(OSError):  # of a file whose disk has gone, though another is in its place by now
            return OPEN_FILES_STAY or os.path.samestat(found, os.fstat(file))
    return False


def close_file(file: Optional[int]) -> None:
    """Closes a file, if there is one. Whatever the system reports, it is closed and its number is another's."""
    if file is not None:
        with contextlib.suppress(OSError):
            os.close(file)


seeking = threading.Lock()  # where a file has but one position, Windows


def read_at(file: int, length: int, position: int) -> bytes:
    """`length` bytes from `position`, fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(file, length, position)
    with seeking:
        os.lseek(file, position, os.SEEK_SET)
        return os.read(file, length)


def write_at(file: int, data: bytes, position: int) -> None:
    """All of `data` at `position`. Raises OSError; a part may then have been written."""
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(file, data, position)
        else:
            with seeking:
                os.lseek(file, position, os.SEEK_SET)
                written = os.write(file, data)
        data = data[written:]
        position += written


def sync_file(file: int) -> None:
    """Makes what was written survive a power cut. On macOS, `fsync` alone leaves it in the drive's own memory."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    os.fsync(file)


def sync_folder(path: str) -> None:
    """Makes the names in a folder survive a power cut. Windows has no such call and does it by itself."""
    if os.name == "nt":
        return
    folder = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(folder)


def make_folder(path: str, records: str = "") -> None:
    """Makes a folder, and those above it, so that they survive a power cut.

    It is for nobody who may not read the file `records`, if there is one, nor beyond the umask.
    """
    if not os.path.isdir(path):
        above = os.path.dirname(path)
        if above != path:  # as of a drive that is not there
            make_folder(above)
        sources = readable(records)
        mode = common_mode(sources)
        os.makedirs(path, mode=mode | (mode & 0o444) >> 2, exist_ok=True)
        if sources and hasattr(os, "fchown"):
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | NO_FOLLOW)
            try:
                give_access(folder, sources[0], stat.S_IMODE(os.fstat(folder).st_mode))
            finally:
                os.close(folder)
        sync_folder(os.path.dirname(path))


# Who may read what we make. A file is made for its owner alone and opened to others when it has its true group:
# whoever opens it before can read what is written into it later. Windows has no such modes.


def give_access(file: int, source: os.stat_result, mode: int) -> None:
    """Gives a file of ours the owner and the group of another, where that is allowed, and a mode. Does not raise.

    A group that is not the other's may do no more than everybody.
    """
    if not hasattr(os, "fchown"):
        return
    with contextlib.suppress(OSError):
        found = os.fstat(file)
        for owner in (source.st_uid, found.st_uid):
            if (owner, source.st_gid) != (found.st_uid, found.st_gid):
                with contextlib.suppress(OSError):
                    os.fchown(file, owner, source.st_gid)
                    break
        found = os.fstat(file)
        if found.st_gid != source.st_gid:
            mode = mode & ~0o070 | (mode & 0o007) << 3
        if stat.S_IMODE(found.st_mode) != mode:
            os.fchmod(file, mode)


def copy_access(path: str, file: int) -> None:
    """Gives a file of ours the owner, the group and the mode of another. Raises OSError if that cannot be told."""
    source = os.stat(path)
    give_access(file, source, source.st_mode & 0o666)


def readable(*paths: str) -> List[os.stat_result]:
    """Of those of some files that are there, who may read them."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.append(os.stat(path))
    return found


def common_mode(sources: List[os.stat_result]) -> int:
    """The mode of a file, with the group of the first, for those who may read them all."""
    mode = 0o666
    for source in sources:
        own = source.st_mode & 0o666
        if source.st_gid != sources[0].st_gid:
            own = own & 0o606 | (own & 0o006) << 3
        mode &= own
    return mode | 0o600


def make_like(path: str, other: str, flags: int = os.O_WRONLY, least: int = 0) -> int:
    """Opens a new file for the same people as another, and the bits `least`. Without that, the umask says for whom."""
    flags |= os.O_CREAT | os.O_EXCL | BINARY
    sources = readable(other)
    if not sources:
        return os.open(path, flags, 0o666)
    file = os.open(path, flags, 0o600)
    give_access(file, sources[0], sources[0].st_mode & 0o666 | least)
    return file


def make_within(path: str, *others: str) -> int:
    """Opens a new file for nobody who may not read all of some others, as far as they are there, nor beyond the umask.

    It belongs to the owner of the first.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY
    sources = readable(*others)
    file = os.open(path, flags, common_mode(sources))
    if not sources:
        return file
    mode = stat.S_IMODE(os.fstat(file).st_mode)  # as the umask leaves it
    if os.fstat(file).st_gid != sources[0].st_gid:  # another group may have opened it
        os.close(file)
        os.unlink(path)
        file = os.open(path, flags, 0o600)
    give_access(file, sources[0], mode)
    return file


def narrow_access(path: str, other: str) -> None:
    """Takes a file from those who may not read another. Raises OSError."""
    sources = readable(path, other)
    readers = common_mode(sources) & 0o044
    mode = sources[0].st_mode & (0o600 | readers | readers >> 1)
    if mode != stat.S_IMODE(sources[0].st_mode):
        os.chmod(path, mode)


def copy_file(source: str, target: str, least: int = 0) -> None:
    """Copies a file to a new name, for the same people, and the bits `least`. Raises OSError."""
    with contextlib.ExitStack() as files:
        copied = files.enter_context(os.fdopen(make_like(target, source, least=least), "wb"))
        original = files.enter_context(open(source, "rb", opener=lambda name, flags: os.open(name, flags | NO_WAIT)))
        if not stat.S_ISREG(os.fstat(original.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no file", source)
        shutil.copyfileobj(original, copied)


def replace_file(path: str, data: bytes, like: str = "") -> None:
    """Puts a new file in the place of an old one: after a crash there is the one or the other, whole.

    It is for the same people as the old one, or as the file `like`.
    """
    part = f"{path}.{secrets.token_hex(4)}.part"
    try:
        file = make_like(part, like or path)
        try:
            write_at(file, data, 0)
            sync_file(file)
        finally:
            os.close(file)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
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


def create_file(path: str, data: bytes) -> None:
    """Makes a file that is not there, whole or not at all. Raises FileExistsError if somebody else has just made it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
    try:
        try:
            write_at(file, data, 0)
            sync_file(file)
        finally:
            os.close(file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    sync_folder(os.path.dirname(path))


def name_aside(path: str) -> str:
    """A new name for what cannot be used: `<path>.damaged-<time>`."""
    name = f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    unique, count = name, 1
    while os.path.lexists(unique):
        count += 1
        unique = f"{name}-{count}"
    return unique


def set_aside(path: str) -> str:
    """Renames what cannot be used, and returns the new name."""
    name = name_aside(path)
    os.rename(path, name)
    return name


# ------------------------------------------------------------------------------------------------------------------
# Settings: config.json and the environment's variables
# ------------------------------------------------------------------------------------------------------------------

DEFAULT_CONFIG = {
    "enabled": False,
    "retention_days": 30,  # null, 0 or "off": nothing is removed by age
}
UNKNOWN_CONFIG = {"enabled": False, "retention_days": None}  # in force until config.json can be read for the first time

BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


NUMBER = re.compile(r"[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?\Z")  # Python's `float` takes more: 1_0
LONGEST = sys.float_info.max  # an int can be more, and is no float then


def as_number(text: str) -> Union[float, str]:
    """A number of JSON, or its text where it is too large for a float, which would be no JSON any more."""
    return float(text) if math.isfinite(float(text)) else text


def as_days(value: Any) -> Optional[float]:
    """A retention as a number of days, None for off. Raises ValueError for anything else."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "off"):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LONGEST:
        raise ValueError("it must be a number of days >= 0, or off")
    return float(value) or None


def find_data_folder(environ: Dict[str, str], default: str) -> str:
    """The folder of `TRACKER_DATA_DIR`, as people write it into a shell script, a batch file or a list of variables."""
    text = environ.get("TRACKER_DATA_DIR", "").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    path = os.path.expanduser(text or default)
    if not os.path.isabs(path):
        log.warning("TRACKER_DATA_DIR=%r is not an absolute path: jobs are in %s", text, os.path.abspath(path))
    return os.path.abspath(path)


class Settings:
    """What the user decided. `enabled` and `retention_days` (None: off) may be read from any thread at any time.

    A variable of the environment overrides config.json for the life of the process; `locked` maps the name of such a
    setting to its variable. Nothing here raises for what a file or a variable says: it warns and goes on.

    What cannot be read or understood never deletes anything and never overwrites anything. While config.json is
    broken, empty, half-written or gone, what was known of it holds; until it can be read for the first time, tracking
    and retention are off. A retention that cannot be understood is off.
    """

    def __init__(self, folder: str, environ: Dict[str, str]):
        self.folder = folder  # the extension's
        self.path = os.path.join(folder, "config.json")
        self.data_folder = find_data_folder(environ, folder)
        self.locked: Dict[str, str] = {}
        self.enabled: bool = UNKNOWN_CONFIG["enabled"]
        self.retention_days: Optional[float] = UNKNOWN_CONFIG["retention_days"]
        self.trouble: Optional[str] = None  # why config.json does not count as it is now
        self._lock = threading.Lock()
        self._config: Dict[str, Any] = dict(UNKNOWN_CONFIG)  # as it was last understood
        self._known = False  # it was, or it was made here
        self._version: Any = None  # of the file that was understood, None where it is to be read
        self._failure: Optional[Exception] = None  # why the file could not be read or understood
        self._ready = False  # changes are worth a line in the log
        self._read_variable(environ, "TRACKER_ENABLED", "enabled")
        self._read_variable(environ, "TRACKER_RETENTION", "retention_days")
        self.refresh()
        self._ready = True

    def _read_variable(self, environ: Dict[str, str], variable: str, name: str) -> None:
        text = environ.get(variable, "").strip()
        if not text:
            return
        try:
            setattr(self, name, self._parse_enabled(text) if name == "enabled" else self._parse_days(text))
        except ValueError as error:
            if name != "retention_days":
                log.warning("%s=%r is ignored: %s", variable, text[:80], error)
                return
            log.warning("%s=%r is not understood, so retention is off: %s", variable, text[:80], error)
        self.locked[name] = variable

    @staticmethod
    def _parse_enabled(text: str) -> bool:
        if text.lower() not in BOOLEANS:
            raise ValueError("it must be one of " + ", ".join(BOOLEANS))
        return BOOLEANS[text.lower()]

    @staticmethod
    def _parse_days(text: str) -> Optional[float]:
        return as_days(float(text) if NUMBER.match(text) else text)

    @property
    def is_unsure(self) -> bool:
        """Whether the retention stands in a config.json that cannot be read or understood now."""
        return self._failure is not None and "retention_days" not in self.locked

    def refresh(self) -> None:
        """Reads config.json again if it was changed, and makes it if there never was one."""
        with self._lock:
            self._refresh()
            self._apply()

    def _refresh(self) -> None:
        try:
            version = self._look_at_file()
            if version == self._version:
                return
            config = self._parse()
        except FileNotFoundError as error:
            # A link that leads nowhere is no first start: what it leads to may be on a drive that is not there yet.
            if self._known or os.path.islink(self.path):
                self._hold(error)
            else:
                self._create()
        except (OSError, ValueError, RecursionError) as error:
            self._hold(error)
        else:
            if self.trouble:
                log.info("config.json can be read again")
            self._take(config, version)

    def _look_at_file(self) -> Tuple[int, int, int]:
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no file", self.path)
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _take(self, config: Dict[str, Any], version: Any) -> None:
        self._config, self._version, self._known = config, version, True
        self.trouble = self._failure = None
        for name in DEFAULT_CONFIG:
            try:
                self._understand(name)
            except ValueError as error:
                instead = "retention is off" if name == "retention_days" else "it is ignored"
                self.trouble = f"config.json: {name} is not understood, so {instead}: {error}"
                log.warning("%s", self.trouble)
        if "tracking_enabled" in config and "enabled" not in config:
            self._take_over()

    def _take_over(self) -> None:
        """Writes the settings of our predecessor, API-Job-Tracker-SD-WebUI, by our own names."""
        config = dict(self._config)
        enabled = config.pop("tracking_enabled")
        if isinstance(enabled, bool):
            log.info("config.json of API-Job-Tracker-SD-WebUI is taken over")
            self._config = {"enabled": enabled, **config}
            self._try_to_write(write_file)

    def _hold(self, error: Exception) -> None:
        """The file does not count, since it cannot be read or understood."""
        self._version, self._failure = None, error
        text = f"config.json cannot be read ({reason_of(error)}). Until it can be, "
        text += "what was known of it holds" if self._known else "tracking and retention are off"
        if text != self.trouble:
            log.warning("%s", text)
        self.trouble = text

    def _create(self) -> None:
        before, self._config = self._config, dict(DEFAULT_CONFIG)
        try:
            self._known = self._try_to_write(create_file)
        except FileExistsError:  # somebody has just written it: it is read at the next look, and may want no default
            self._config = before

    def _try_to_write(self, write: Callable[[str, bytes], None]) -> bool:
        try:
            self._write(self._config, write)
        except FileExistsError:
            raise
        except OSError as error:
            text = f"config.json cannot be written, settings will not be kept: {reason_of(error)}"
            if text != self.trouble:
                log.warning("%s", text)
            self.trouble = text
            return False
        self.trouble = None
        return True

    def save(self, **changes: Any) -> None:
        """Changes settings, at once and in config.json, which keeps what else stands in it.

        A file that is not understood is set aside first. Raises ValueError for an unknown name, an invalid value, or a
        setting that a variable locks, and OSError if the file cannot be read or written; then nothing has changed.
        """
        for name, value in changes.items():
            if name not in DEFAULT_CONFIG:
                raise ValueError(f"there is no setting {name!r}")
            if name in self.locked:
                raise ValueError(f"{name} is set by {self.locked[name]}")
            self._check(name, value)
        with self._lock:
            self._refresh()
            failure = self._failure
            if isinstance(failure, OSError) and not isinstance(failure, FileNotFoundError):
                raise failure
            write = write_file
            if failure is not None and not isinstance(failure, OSError):
                self._set_aside()
                # It may be half of an upload, whose rest is not to go into a file that has lost its name.
                write = overwrite_file
            self._write({**self._config, **changes}, write)
            self.trouble, self._failure, self._known = None, None, True
            self._apply()

    def _set_aside(self) -> None:
        """Keeps a copy of a file that is not understood. The file itself stays: a start without one is the first."""
        name = name_aside(self.path)
        with open(self.path, "rb") as file:
            replace_file(name, file.read(), like=self.path)
        log.warning("config.json was not understood. It is written anew, what stood in it is in %s", name)

    def _understand(self, name: str) -> Any:
        """The value that config.json gives a setting. Raises ValueError."""
        if name == "retention_days" and name not in self._config:
            for other in self._config.keys() - {*DEFAULT_CONFIG, "tracking_enabled"}:
                # It may be meant by it, by somebody who does not want the default.
                raise ValueError(f"it is missing, and {other[:80]!a} is no setting")
        return self._check(name, self._config.get(name, DEFAULT_CONFIG[name]))

    @staticmethod
    def _check(name: str, value: Any) -> Any:
        if name == "retention_days":
            return as_days(value)
        if not isinstance(value, bool):
            raise ValueError("it must be true or false")
        return value

    def _parse(self) -> Dict[str, Any]:
        """Raises OSError, ValueError, RecursionError."""
        with open(self.path, "rb") as file:
            data = file.read(1 << 20)
        config = json.loads(data.decode("utf-8-sig"), parse_constant=str, parse_float=as_number)
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        json.dumps(config, indent=4)  # what is too deep to be written again is broken, too
        return config

    def _write(self, config: Dict[str, Any], write: Callable[[str, bytes], None]) -> None:
        write(os.path.realpath(self.path), json.dumps(config, indent=4).encode() + b"\n")
        self._config, self._version = config, None  # somebody may have written it since: it is read again

    def _apply(self) -> None:
        was = self.enabled
        for name in DEFAULT_CONFIG:
            if name not in self.locked:
                try:
                    setattr(self, name, self._understand(name))
                except ValueError:  # a warning was given; `enabled` stays as it is
                    if name == "retention_days":
                        self.retention_days = None
        if self._ready and self.enabled != was:
            log.info("Tracking is %s now", "on" if self.enabled else "off")


# ------------------------------------------------------------------------------------------------------------------
# Job: the record, on disk and as JSON
# ------------------------------------------------------------------------------------------------------------------

PENDING, PROCESSING, COMPLETED, FAILED = STATUSES = ("Pending", "Processing", "Completed", "Failed")
ENDED = (COMPLETED, FAILED)
TYPES = ("txt2img", "img2img")

ID_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
ID_FORM = re.compile(r"[A-Za-z0-9]{8}\Z")
DAY_FORM = re.compile(r"\d{4}-\d\d-\d\d\Z")
OWN_FILE_FORM = re.compile(
    r"\d{4}-\d\d-\d\d/[A-Za-z0-9]{8}"
    r"((\.brief)?\.json|_\d{1,6}\.[a-z]{3,4}|(_\d{1,6}|\.brief)?\.[0-9a-f]{8}\.part)\Z"
)
IMAGE_FORM = re.compile(r"\d{4}-\d\d-\d\d/([A-Za-z0-9]{8})_(\d{1,6})\.[a-z]{3,4}\Z")

LAST_MOMENT = 1 << 34  # Unix seconds, in the year 2514: Windows knows no day after 3000
PROMPT_LIMIT = 100_000  # characters kept in jobs.json; `parameters` has the whole prompt
IP_LIMIT = 100  # characters: a server that trusts a proxy takes what that says for an address


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
    images: Tuple[str, ...] = ()  # files below images/, in the host's order
    bytes: int = 0  # of these files and the answer beside them
    owner: Optional[str] = None  # the process that runs it
    key: Optional[str] = None  # of its idempotency, see idempotency_key
    digest: Optional[str] = None  # of the request's body, for a job with a key
    has_brief: bool = False  # beside the answer lies a brief one, see brief_parameters
    ranges: Tuple[int, ...] = ()  # of a large answer, see ranges_of

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def day(self) -> str:
        """The folder below images/ that has its files, in UTC: it must not move with the machine's time zone."""
        return time.strftime("%Y-%m-%d", time.gmtime(self.timestamp))

    @property
    def answer(self) -> str:
        """The file below images/ with the host's answer without its images."""
        return f"{self.day}/{self.id}.json"

    @property
    def brief_answer(self) -> str:
        """The file below images/ with brief parameters, or the answer itself if its own are brief."""
        return f"{self.day}/{self.id}.brief.json" if self.has_brief else self.answer

    @property
    def files(self) -> Tuple[str, ...]:
        """All files below images/ that the record stands for."""
        return (*self.images, self.answer, self.brief_answer) if self.has_brief else (*self.images, self.answer)


def new_id() -> str:
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(8))


def id_number(job_id: str) -> int:
    """One number for all spellings of an ID that differ in case only: they would name the same file on Windows."""
    return int(job_id, 36)


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
    """A job as it stands in jobs.json."""
    fields = job._asdict().items()
    return as_json({name: without_surrogates(value) if isinstance(value, str) else value for name, value in fields})


def job_from_record(record: Any) -> Job:
    """A job from its JSON in jobs.json. Raises ValueError for anything that is no valid job."""
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    values = {name: record[name] for name in Job._fields if name in record}
    images = values.get("images", [])
    if not isinstance(images, list):
        raise ValueError("images is no list")
    values["images"] = tuple(images)
    ranges = values.get("ranges", [])
    if not isinstance(ranges, list) or len(ranges) not in (0, 7):
        raise ValueError("ranges is no list of seven numbers, or of none")
    values["ranges"] = tuple(ranges)
    try:
        job = Job(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if not (isinstance(job.id, str) and ID_FORM.match(job.id)):
        raise ValueError("id is no job ID")
    if job.status not in STATUSES or job.type not in TYPES:
        raise ValueError("status or type is unknown")
    for number, end in ((job.timestamp, LAST_MOMENT), (job.bytes, 1 << 50), *((place, 1 << 50) for place in ranges)):
        if type(number) is not int or not 0 <= number < end:
            raise ValueError("timestamp, bytes or a place in ranges is no valid number")
    if any(end != 0 and start >= end for start, end in ((ranges[0:2], ranges[3:5]) if ranges else ())):
        raise ValueError("a range ends before it starts")
    for moment in (job.started, job.finished):
        if moment is not None and (type(moment) not in (int, float) or not 0 <= moment < LAST_MOMENT):
            raise ValueError("started or finished is no valid time")
    if not isinstance(job.prompt, str) or not isinstance(job.has_brief, bool):
        raise ValueError("prompt is no text, or has_brief neither true nor false")
    for text in (job.ip, job.error, job.owner, job.key, job.digest):
        if text is not None and not isinstance(text, str):
            raise ValueError("ip, error, owner, key or digest is no text")
    for name in job.images:
        form = isinstance(name, str) and IMAGE_FORM.match(name)
        if not form or form.group(1) != job.id:
            raise ValueError("images has a name that is none of this job's")
    return job


# ------------------------------------------------------------------------------------------------------------------
# JobStore: jobs.json
# ------------------------------------------------------------------------------------------------------------------


SEARCH_WORK = 1 << 22  # the length of a text by that of what is looked for in it: at worst 3 ms of the interpreter


def fold(text: str) -> bytes:
    """Text in the form in which it is searched, without case."""
    return text.casefold().encode("utf-8", "surrogatepass")


def contains(text: bytes, wanted: bytes) -> bool:
    """Whether `wanted` is in a text. What `in` does can take a time that grows with the product of both lengths."""
    if len(text) * len(wanted) <= SEARCH_WORK:
        return wanted in text
    return re.search(re.escape(wanted), text) is not None  # slower as a rule, but never slower than that


class Filter(NamedTuple):
    """Which jobs are wanted; all that is not None must hold."""

    ip: Optional[str] = None
    status: Optional[str] = None  # one of STATUSES
    type: Optional[str] = None  # one of TYPES
    after: Optional[float] = None  # Unix seconds, exclusive
    before: Optional[float] = None
    q: Optional[str] = None  # text in the prompt, case ignored, at most LIMIT characters

    LIMIT = 500  # see SEARCH_WORK

    @property
    def text(self) -> bytes:
        return fold(self.q or "")


class Index:
    """Where each job's record lies in jobs.json, and the fields that filters need. Holds no Job.

    A job is a slot, a number that counts up in order of acceptance; each field is an array over all slots. So a job
    takes some 200 bytes and its prompt, and a million jobs are no work for the garbage collector. A removed job keeps
    its slot until the file is compacted, so that paging goes on from where it was. Not safe between threads.
    """

    TEXT_LIMIT = 1000  # bytes of a prompt kept for searching; the rest is looked up in the file
    REMOVED = 255

    def __init__(self) -> None:
        self.slots: Dict[int, int] = {}  # the ID's number -> slot
        self.ids = bytearray()
        self.place = array("Q")  # of the record in jobs.json
        self.length = array("I")
        self.timestamp = array("q")
        self.status = bytearray()
        self.type = bytearray()
        self.ip = array("I")
        self.bytes = array("Q")
        self.text = bytearray()  # prompts without case, each after a byte that UTF-8 does not have
        self.text_start = array("Q")
        self.unsure: List[int] = []  # slots whose prompt is not, or not all, in `text`, in order
        self.ips: Dict[Optional[str], int] = {}
        self.keys: Dict[str, int] = {}  # idempotency key -> the ID's number; a job that is gone may still stand here
        self.unfinished: Set[int] = set()
        self.counts = [0] * len(STATUSES)
        self.total_bytes = 0
        self.lines = 0  # in the file, dead ones too

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def top(self) -> int:
        """The slot of the next job."""
        return len(self.place)

    @property
    def dead(self) -> int:
        return self.lines - len(self)

    def slot(self, job_id: str) -> Optional[int]:
        """The slot of a job that is kept, None for any other ID."""
        slot = self.slots.get(id_number(job_id))
        if slot is None or self.status[slot] == self.REMOVED or self.id(slot) != job_id:
            return None
        return slot

    def id(self, slot: int) -> str:
        return self.ids[8 * slot : 8 * slot + 8].decode()

    def apply(self, job_id: str, job: Optional[Job], place: int, length: int) -> None:
        """A job as it is now, or None for its end."""
        number = id_number(job_id)
        slot = self.slots.get(number)
        if job is None:
            if slot is not None:
                self._count(slot, -1)
                self.status[slot] = self.REMOVED
            return
        if slot is not None and self.id(slot) == job_id:
            self._count(slot, -1)
            if job.prompt and self._text_end(slot) - self.text_start[slot] == 1 and not self.must_check(slot):
                bisect.insort(self.unsure, slot)  # the prompt became known when the job ended
        else:
            slot = self.slots[number] = self.top
            self.ids += job_id.encode()
            self.status.append(self.REMOVED)
            self.type.append(TYPES.index(job.type))
            self.timestamp.append(job.timestamp)
            self.ip.append(self.ips.setdefault(job.ip, len(self.ips)))
            text = fold(job.prompt)
            if len(text) > self.TEXT_LIMIT:
                self.unsure.append(slot)
            self.text_start.append(len(self.text))
            self.text += b"\xff" + text[: self.TEXT_LIMIT]
            for column in (self.place, self.length, self.bytes):
                column.append(0)
        self.place[slot] = place
        self.length[slot] = length
        self.status[slot] = STATUSES.index(job.status)
        self.bytes[slot] = job.bytes
        if job.key:
            self.keys[job.key] = number
        self._count(slot, 1)

    def _count(self, slot: int, change: int) -> None:
        status = self.status[slot]
        if status == self.REMOVED:
            return
        self.counts[status] += change
        self.total_bytes += change * self.bytes[slot]
        if change > 0 and STATUSES[status] not in ENDED:
            self.unfinished.add(slot)
        else:
            self.unfinished.discard(slot)

    def step(self, wanted: Filter, below: int, slots: int) -> int:
        """How far down to look at once from `below`: at most so many slots, and no more than SEARCH_WORK."""
        above = max(0, below - slots)
        if not wanted.text:
            return above
        first = self._text_end(below - 1) - SEARCH_WORK // len(wanted.text)
        return min(bisect.bisect_left(self.text_start, first, above, below), below - 1)

    def find(self, wanted: Filter, below: int, above: int = 0) -> List[int]:
        """Slots from `above` up to `below` that match, newest first. For some the text remains: see `must_check`."""
        text, slots = wanted.text, self._fitting(wanted, range(below - 1, above - 1, -1))
        if not (text and slots):
            return slots
        if len(slots) * 8 > below - above:
            hits = self.text.count(text, *self._text_range(above, below))
            if hits == 0 and not self.unsure:
                return []
            if hits * 8 < len(slots):  # it is quicker to look for the text than at each slot
                return self._fitting(wanted, self._with_text(text, below, above))
        return [slot for slot in slots if self._has_text(slot, text)]

    def _fitting(self, wanted: Filter, slots: Iterable[int]) -> List[int]:
        """Those that match in all but the text."""
        if wanted.ip is not None:
            ips, ip = self.ip, self.ips.get(wanted.ip, -1)
            slots = [slot for slot in slots if ips[slot] == ip]
        if wanted.after is not None or wanted.before is not None:
            times = self.timestamp
            after = -math.inf if wanted.after is None else wanted.after
            before = math.inf if wanted.before is None else wanted.before
            slots = [slot for slot in slots if after < times[slot] < before]
        if wanted.type is not None:
            types, type_ = self.type, TYPES.index(wanted.type)
            slots = [slot for slot in slots if types[slot] == type_]
        statuses = self.status
        if wanted.status is not None:
            status = STATUSES.index(wanted.status)
            return [slot for slot in slots if statuses[slot] == status]
        return [slot for slot in slots if statuses[slot] != self.REMOVED]

    def _text_end(self, slot: int) -> int:
        return self.text_start[slot + 1] if slot + 1 < self.top else len(self.text)

    def _text_range(self, above: int, below: int) -> Tuple[int, int]:
        return (self.text_start[above], self._text_end(below - 1)) if above < below else (0, 0)

    def _has_text(self, slot: int, text: bytes) -> bool:
        return self.text.find(text, self.text_start[slot], self._text_end(slot)) >= 0 or self.must_check(slot)

    def _with_text(self, text: bytes, below: int, above: int) -> Iterator[int]:
        """Slots whose kept text has `text`, and those for which that does not say all."""
        start, end = self._text_range(above, below)
        unsure = bisect.bisect_left(self.unsure, below) - 1
        while True:
            found = self.text.rfind(text, start, end)
            slot = bisect.bisect_right(self.text_start, found) - 1 if found >= 0 else above - 1
            while unsure >= 0 and self.unsure[unsure] > slot:
                yield self.unsure[unsure]
                unsure -= 1
            if found < 0:
                return
            if unsure >= 0 and self.unsure[unsure] == slot:
                unsure -= 1
            yield slot
            end = self.text_start[slot]

    def must_check(self, slot: int) -> bool:
        """Whether only the record tells if the prompt has a text."""
        at = bisect.bisect_left(self.unsure, slot)
        return at < len(self.unsure) and self.unsure[at] == slot


class Page(NamedTuple):
    """Jobs that match, newest first; `more` when there are others after the last of them."""

    jobs: List[Job]
    more: bool


class Line(NamedTuple):
    """A line of jobs.json: what became of a job."""

    id: str
    job: Optional[Job]  # None: its end
    place: int  # of the record in the file
    length: int


class Gap(NamedTuple):
    """A part of jobs.json that is no line of it."""

    place: int
    length: int
    blank: bool  # nothing is lost with it


LINE = re.compile(rb'(,?)\n"([A-Za-z0-9]{8})": (null|\{[^\n]*\})(?=,?(?:\n|\Z))')
TORN_LINES = re.compile(rb'(?:,?\n"[ -~]*\n)*\Z')  # what a crash leaves, or a few spoilt bytes
FOREIGN_LINE = re.compile(r'(?<!\\)"([A-Za-z0-9]{8})"\s*:\s*(?=null|\{)')
BLANK = b" \t\r\n,{}\xef\xbb\xbf"


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def parse_int(digits: str) -> int:
    """Python before 3.10.7 reads a whole number in a time that grows with the square of its length."""
    if len(digits.lstrip("-")) > 4300:
        raise ValueError("a number is too long")
    return int(digits)


LINE_DECODER = json.JSONDecoder(parse_int=parse_int, parse_constant=refuse)
DECODER = json.JSONDecoder(parse_constant=refuse)  # for what the host wrote, and so reads
REACH = 8  # keys in a damaged record that may look like the begin of another one: a later version may have such fields


def read_line(job_id: str, record: bytes, place: int) -> Line:
    """Raises ValueError, RecursionError."""
    job = None
    if record != b"null":
        job = job_from_record(LINE_DECODER.decode(record.decode()))
        if job.id != job_id:
            raise ValueError("the ID is not the key")
    return Line(job_id, job, place, len(record))


def read_lines(data: bytes, base: int) -> Iterator[Union[Line, Gap]]:
    """The lines, and what is none, of a part of jobs.json that lies at `base`, which is where a line ends."""
    position = 0
    for match in LINE.finditer(data):
        if bool(match.group(1)) != (base + match.start() > len(JobStore.HEAD)):
            continue
        try:
            line = read_line(match.group(2).decode(), match.group(3), base + match.start(3))
        except (ValueError, RecursionError):
            continue
        if match.start() > position:
            yield from read_foreign(data[position : match.start()], base + position)
        yield line
        position = match.end()
    if position < len(data):
        yield from read_foreign(data[position:], base + position)


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


def read_foreign(data: bytes, base: int) -> Iterator[Union[Line, Gap]]:
    """The same for a part that is damaged, or laid out in another way, by an editor or jq."""
    text = data.decode("latin-1")  # a character a byte
    position, looked_at, blank = 0, 0, True
    matches = (match for match in FOREIGN_LINE.finditer(text) if match.group(1) not in Job._fields)
    for match, end in with_reach(matches, len(text)):
        start = match.end()
        try:
            # A part of the text, for an error costs as much as all that comes before it.
            _, length = LINE_DECODER.raw_decode(text[start:end])
            line = read_line(match.group(1), data[start : start + length], base + start)
        except (ValueError, RecursionError):
            continue
        if match.start() < position:  # in a record that has lost its end, and so goes on
            if line.job is not None:
                yield line
            continue
        blank = blank and not data[looked_at : match.start()].strip(BLANK)
        looked_at = match.start()
        if line.job is not None or blank:  # otherwise it may be a field of a record that is cut here
            yield Gap(base + position, match.start() - position, blank)
            yield line
            position = looked_at = start + length
            blank = True
    yield Gap(base + position, len(data) - position, blank and not data[looked_at:].strip(BLANK))


class Opened:
    """jobs.json as it is open now, and what is known of it."""

    def __init__(self, file: Optional[int]):
        self.file = file
        self.index = Index()
        self.seen = 0  # the index knows the file up to here
        self.ahead = 0  # what lies between `seen` and here is this process's own
        self.gaps: List[Gap] = []  # which are to be set aside
        self.foreign = False  # it holds what this program would have written in another way
        self.stale = False  # somebody changed it where the index knows it

    def close(self) -> None:
        file, self.file = self.file, None
        close_file(file)


class Change(NamedTuple):
    """What waits to be written to jobs.json."""

    jobs: Dict[str, Optional[Job]]  # None: its end
    new: bool
    patient: bool  # `written` ends only when it is on disk
    written: Future


class NotUndone(OSError):
    """Lines could not be appended, and may stand in the file all the same."""


class Appended(NamedTuple):
    """Lines at the end of jobs.json that are perhaps not on disk yet."""

    lines: List[Line]
    end: int  # where the file's last line ended before
    length: int
    known: bool  # the index knows all that comes before them


Chore = Tuple[Iterator[None], Future]  # work that is done piece by piece, and its result


def promise() -> Future:
    """A Future that nobody can cancel."""
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future


class JobStore:
    """Jobs in a JSON file that is appended to in place and is valid JSON after every write.

    The file is an object from ID to record, a record a line; later lines win, as they do for every reader of JSON
    with duplicate keys, and `null` ends a job. A change is one write over the closing brace. When dead lines
    outnumber live ones, the live ones go to a new file that replaces the old.

    One thread, the store's own, writes the file and the index. In turns it writes all that waits to be written, with
    one fsync, and does a small piece of other work. Loading and compacting are such pieces, so neither the start nor a
    compaction with a million jobs keeps a request waiting.

    Any thread may call any method; none is for the event loop. Several processes may share the file: each holds
    `jobs.json.lock` while it writes, and follows what the others appended or replaced. What a Future of `put` or
    `remove` reports done survives a crash and a power cut.
    """

    HEAD, TAIL, EMPTY = b"{", b"\n}\n", b"{\n}\n"
    PIECE = 1 << 16  # bytes read between two looks at what waits to be written
    LINE_LIMIT = 1 << 23  # a longer line is damage
    SPARE_DEAD = 1000  # dead lines that are not worth a compaction
    RETRY = 5.0  # seconds until a write that failed is tried again
    COMPACT_RETRY = 600.0  # the same for a compaction
    BREAK = 0.0005  # seconds between two pieces of work for which somebody waits

    def __init__(self, folder: str, check: Callable[[], None] = lambda: None):
        """`check` raises OSError as long as jobs.json is not to be opened."""
        self.path = os.path.realpath(os.path.join(folder, "jobs.json"))
        self._check = check
        self.owner = secrets.token_hex(4)
        self._lock = threading.Lock()  # guards these three and the index; held for a moment, never for the disk
        self._opened = Opened(None)
        self._unwritten: Dict[str, Optional[Job]] = {}  # what is not in the file yet
        self._meanwhile: Dict[str, Job] = {}  # what is shown of some of them until they are
        self._reading = threading.Lock()  # taken before `_lock`: who holds it may use the open file, which stays so
        self._work = threading.Condition()  # guards these six
        self._queue: List[Change] = []
        self._chores: List[Chore] = []
        self._following: Optional[Future] = None
        self._end_left: Optional[Callable[[Job], Job]] = None  # for jobs left behind, if they are to be looked for
        self._awaited = 0  # how many wait for it
        self._closing = self._closed = False
        self._between = FileLock(self.path + ".lock", self.path)  # of the thread alone, as is what follows
        self._alive = FileLock(f"{self.path}.owner-{self.owner}", self.path)  # held for as long as this process lives
        self._retry: Dict[str, Optional[Job]] = {}
        self._patient: List[Future] = []  # of what is in `_retry`
        self._trouble = ""
        self._retry_at = self._compact_at = 0.0
        self._troubles: Dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="job-tracker-store", daemon=True)
        self._thread.start()

    # What others call

    def put(self, job: Job, new: bool = False, meanwhile: Optional[Job] = None) -> Future:
        """Keeps a job as it is now. The Future ends when that is on disk, or with OSError.

        A new job that cannot be written is not kept. A change that cannot be written is in force all the same, and is
        tried again until it is written or the process ends. With `meanwhile`, the job is shown as that until its own
        record is on disk, and the Future ends only then, or with OSError if the store is closed before.
        """
        return self._change({job.id: job}, new, meanwhile)

    @property
    def progress(self) -> Any:
        """Something that changes as jobs.json is read."""
        opened = self._opened
        return id(opened), opened.seen

    @property
    def trouble(self) -> str:
        """Why records cannot be written now, for everybody's eyes; empty while they can."""
        return self._trouble

    def remove(self, ids: List[str]) -> Future:
        """Ends jobs. The Future ends when that is on disk, or with OSError; then it is tried again."""
        return self._change(dict.fromkeys(ids), False)

    def knows(self, job_id: str) -> bool:
        """Whether an ID is taken, in any spelling. What is still being loaded is not looked at."""
        number = id_number(job_id)
        with self._lock:
            return number in self._opened.index.slots or number in map(id_number, self._unwritten)

    def get(self, job_id: str) -> Optional[Job]:
        """A job, None if there is none. Waits while the file is being loaded. Raises OSError."""
        if not ID_FORM.match(job_id):
            return None
        while True:
            with self._lock:
                if job_id in self._unwritten:
                    return self._in_force(job_id)
            with self._current() as index:
                slot = index.slot(job_id)
                if slot is None or job_id in self._unwritten:
                    return None if slot is None else self._in_force(job_id)
                opened, place, length = self._opened, index.place[slot], index.length[slot]
            with self._reading:
                if opened.file is not None:  # otherwise the record has moved to another file
                    return self._read(opened, job_id, place, length)

    def with_key(self, key: str) -> Optional[Job]:
        """The latest job with an idempotency key, None if there is none. Raises OSError."""
        with self._current() as index:
            slot = index.slots.get(index.keys.get(key, -1))
        job = None if slot is None else self.get(index.id(slot))
        return job if job is not None and job.key == key else None

    def query(
        self,
        wanted: Filter,
        limit: int,
        skip: int = 0,
        after_id: Optional[str] = None,
        after_time: int = 0,
        abandoned: Optional[threading.Event] = None,
    ) -> Page:
        """The newest jobs that match: at most `limit`, without the first `skip`, or those that come after a job.

        If the job `after_id` is no longer known, those that are not newer than `after_time` (Unix seconds). Ends early,
        with what was found, once `abandoned` is set. Raises OSError.
        """
        with self._current() as index:
            below = index.top if after_id is None else index.slots.get(id_number(after_id))
        if below is None:
            times = index.timestamp
            below = next((slot + 1 for slot in range(index.top - 1, -1, -1) if times[slot] <= after_time), 0)
        jobs: List[Job] = []
        for slot in self._matching(index, wanted, below, abandoned):
            if skip > 0:
                skip -= 1
            elif len(jobs) == limit:
                return Page(jobs, True)
            else:
                job = self.get(index.id(slot))
                if job is not None and wanted.status in (None, job.status):  # it may have changed since
                    jobs.append(job)
        return Page(jobs, False)

    def figures(self) -> Tuple[Dict[str, int], int]:
        """Jobs by status, and the bytes of all their files. Raises OSError."""
        with self._current() as index:
            return dict(zip(STATUSES, index.counts)), index.total_bytes

    def expired(self, before: float, after: Optional[float] = None) -> List[str]:
        """IDs of ended jobs accepted before a time, and after another (Unix seconds), oldest first. Raises OSError."""
        with self._current() as index:
            top = index.top
        old = self._matching(index, Filter(before=before, after=after), top)
        return [index.id(slot) for slot in old if slot not in index.unfinished][::-1]

    def set_aside_ids(self) -> Optional[Set[str]]:
        """IDs of jobs in what was, or is to be, set aside; None if they cannot be told. Raises OSError.

        Before `get` knows nothing of a job whose record is damaged, it is among them.
        """
        folder, name = os.path.split(self.path)
        found: Set[str] = set()
        if self._opened.gaps:
            return None
        for entry in os.listdir(folder):
            path = os.path.join(folder, entry)
            if entry.startswith(f"{name}.damaged-") and os.path.isfile(path):
                try:
                    with open(path, "rb") as file:
                        data = file.read(self.PIECE)
                except OSError:
                    return None
                if not TORN_LINES.match(data):
                    return None
                found.update(job_id.decode() for job_id in re.findall(rb'"(\w{8})"', data))  # a key or an ID
        return found

    def recover(self, end: Callable[[Job], Job]) -> Future:
        """Changes each unfinished job of a process that is gone by `end`, once among all processes that try.

        The Future ends when that is done, or with OSError if the file cannot be read. If this is called before
        anything else, nobody sees such a job unchanged, as long as the disk takes it. A change that cannot be written
        is tried again. `end` may raise OSError for a job that cannot be judged now: it stays as it is.
        """
        with self._work:
            self._end_left = end
            self._following = self._add_chore(self._load(), first=True)
            return self._following

    def idle(self, seconds: float = 60.0) -> bool:
        """Waits until nothing is left to be written, read or compacted. False if something still is after that time."""
        until = time.monotonic() + seconds
        while True:
            with self._lock, self._work:
                is_idle = not (
                    self._queue or self._chores or self._unwritten or self._retry or self._is_worth_compacting()
                )
            if is_idle or time.monotonic() >= until:
                return is_idle
            time.sleep(0.005)

    def close(self) -> None:
        """Writes what waits to be written and ends the thread. Other work is given up."""
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join()

    # What is in force, and what is found

    def _change(self, jobs: Dict[str, Optional[Job]], new: bool, meanwhile: Optional[Job] = None) -> Future:
        with self._lock:
            self._supersede(jobs, {} if meanwhile is None else {meanwhile.id: meanwhile})
            change = Change(jobs, new, meanwhile is not None, promise())
            with self._work:
                if not self._closed:
                    self._queue.append(change)
                    self._work.notify()
                    return change.written
        change.written.set_exception(OSError("the store is closed"))
        return change.written

    def _supersede(self, jobs: Dict[str, Optional[Job]], meanwhile: Dict[str, Job]) -> None:
        """Puts changes in force whose lines are still to come, or what is to be shown of them until then."""
        for job_id in jobs:
            self._meanwhile.pop(job_id, None)
        self._unwritten.update(jobs)
        self._meanwhile.update(meanwhile)
        self._show(jobs)

    def _in_force(self, job_id: str) -> Optional[Job]:
        """What is shown of a job whose line is still to come."""
        return self._meanwhile.get(job_id, self._unwritten[job_id])

    def _show(self, job_ids: Iterable[str]) -> None:
        """Makes the index show jobs as they are now, though their lines are still to come."""
        index = self._opened.index
        for job_id in job_ids:
            slot = index.slot(job_id)
            if slot is not None:
                index.apply(job_id, self._in_force(job_id), index.place[slot], index.length[slot])

    @contextlib.contextmanager
    def _current(self) -> Iterator[Index]:
        """Holds the lock, with an index that knows all that the file held when this was called. Raises OSError."""
        while True:
            with self._lock:
                opened, seen = self._opened, self._opened.seen
            with self._reading:
                try:
                    length = self._length(opened)
                except OSError:
                    length = -1
            with self._lock:
                # What this process has appended since only moved `ahead` on.
                if self._opened is opened and seen <= length <= opened.ahead:
                    yield opened.index
                    return
            with self._work:
                self._awaited += 1
            try:
                self._follow().result()
            finally:
                with self._work:
                    self._awaited -= 1

    def _length(self, opened: Opened) -> int:
        """Of the file without its closing, -1 if it is no longer the one that is open. Raises OSError."""
        if opened.file is not None and not opened.stale:
            if stands_for(self.path, opened.file):
                return os.fstat(opened.file).st_size - len(self.TAIL)
        return -1

    def _matching(
        self, index: Index, wanted: Filter, below: int, abandoned: Optional[threading.Event] = None
    ) -> Iterator[int]:
        """Slots of an index, newest first. Holds the lock for a moment at a time."""
        step = 500
        while below > 0:
            with self._lock:
                began = time.monotonic()
                above = index.step(wanted, below, step)
                found = index.find(wanted, below, above)
                held = time.monotonic() - began
            if held > 4 * self.BREAK:
                time.sleep(self.BREAK)  # nobody else has a lock that is taken again at once
            for slot in found:
                if abandoned is not None and abandoned.is_set():
                    return
                if wanted.text and index.unsure and index.must_check(slot):
                    job = self.get(index.id(slot))
                    if job is None or not contains(fold(job.prompt), wanted.text):
                        continue
                yield slot
            if abandoned is not None and abandoned.is_set():
                return
            below, step = above, min(2 * step, 2_000 if wanted.text else 20_000)

    @staticmethod
    def _read(opened: Opened, job_id: str, place: int, length: int) -> Optional[Job]:
        try:
            return read_line(job_id, read_at(opened.file, length, place), place).job
        except (ValueError, RecursionError):
            log.error("jobs.json: the record of job %s is not where it was, all is read again", job_id)
            opened.stale = True
            return None

    # The thread and what it is asked for

    def _add_chore(self, work: Iterator[None], first: bool = False) -> Future:
        result = promise()
        with self._work:
            if self._closed:
                result.set_exception(OSError("the store is closed"))
            else:
                self._chores.insert(0 if first else len(self._chores), (work, result))
                self._work.notify()
        return result

    def _follow(self) -> Future:
        """Reads what the index does not know yet. The Future ends when it does, or with OSError."""
        with self._work:
            if self._following is None or self._following.done():
                self._following = self._add_chore(self._load(), first=True)
            self._work.notify()
            return self._following

    def _run(self) -> None:
        while True:
            with self._work:
                if not (self._queue or self._chores or self._closing):
                    self._work.wait(max(0, self._retry_at - time.monotonic()) if self._retry else None)
                changes, self._queue = self._queue, []
                chore = self._chores[0] if self._chores else None
                self._closed = self._closing and not changes
            if changes or (self._retry and (self._closed or time.monotonic() >= self._retry_at)):
                self._write(changes)
            if self._closed:
                break
            if chore is not None:
                began = time.monotonic()
                self._do_piece(chore)
                self._be_polite(2 * (time.monotonic() - began))
        for work, result in self._chores:
            work.close()
            result.set_exception(OSError("the store is closed"))
        for written in self._patient:
            written.set_exception(OSError("the store is closed"))
        self._close_files()

    def _be_polite(self, seconds: float) -> None:
        """Lets others have the interpreter and the lock: for long, for a webui may be starting, if nobody waits."""
        with self._work:
            if self._chores and not (self._queue or self._closing):
                self._work.wait(self.BREAK if self._awaited else seconds)

    def _do_piece(self, chore: Chore) -> None:
        work, result = chore
        value, failure = None, None
        try:
            next(work)
            return
        except StopIteration as end:
            value = end.value
        except Exception as error:
            failure = error
        with self._work:
            self._chores.remove(chore)
        self._tell("read", failure)
        if failure is None:
            result.set_result(value)
            self._consider_compacting()
        else:
            result.set_exception(failure)

    def _is_worth_compacting(self) -> bool:
        index = self._opened.index
        is_due = time.monotonic() >= self._compact_at
        return is_due and (self._opened.foreign or index.dead > len(index) + self.SPARE_DEAD)

    def _consider_compacting(self) -> None:
        if not self._chores and self._is_worth_compacting():
            self._add_chore(self._compact())

    def _tell(self, what: str, error: Optional[Exception]) -> None:
        """Logs a trouble when it begins and when it is over, not each time that it shows."""
        text = f"jobs.json cannot be {what}: {type(error).__name__}: {error}" if error else ""
        if text != self._troubles.get(what, ""):
            self._troubles[what] = text
            log.error("%s", text or f"jobs.json can be {what} again")

    # The file

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[Opened]:
        """Holds the lock between processes, with the file open that the name stands for now."""
        with self._between:
            if self._length(self._opened) < self._opened.seen:
                self._open()
            yield self._opened

    def _open(self) -> None:
        self._let_go()
        self._check()
        self._alive.close()  # the folder may be another: nobody asks for it while we hold the lock
        self._alive.hold()
        try:
            file = self._open_file()
        except (IsADirectoryError, PermissionError) as error:
            aside = set_aside(self.path)
            with contextlib.suppress(OSError):
                copy_file(aside, self.path, least=0o600)
            log.warning("jobs.json cannot be opened for writing (%s), it was set aside as %s", error, aside)
            file = self._open_file()
        opened = self._opened = Opened(file)
        head = read_at(file, 1, 0)
        opened.foreign = head not in (b"", self.HEAD)
        if not head:
            write_at(file, self.EMPTY, 0)
        sync_file(file)
        sync_folder(os.path.dirname(self.path))
        opened.seen = 0 if opened.foreign else len(self.HEAD)

    def _open_file(self) -> int:
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise IsADirectoryError(errno.EISDIR, "it is no file", self.path)
        return os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)

    def _let_go(self) -> None:
        """Closes the file, and forgets what is known of it."""
        with self._reading:
            with self._lock:
                old, self._opened = self._opened, Opened(None)
            old.close()

    def _close_files(self) -> None:
        self._let_go()
        with contextlib.suppress(OSError):
            os.unlink(self._alive.path)
        self._alive.close()
        self._between.close()

    def _end(self) -> int:
        """Where the next line goes. Mends a file that does not end as it should."""
        opened = self._opened
        size = os.fstat(opened.file).st_size
        end = size - len(self.TAIL)
        if (end == len(self.HEAD) or end > 16) and read_at(opened.file, len(self.TAIL), end) == self.TAIL:
            return end
        start, span, good = size, self.PIECE, None
        while good is None and start > opened.seen:
            start, span = max(opened.seen, size - span), 2 * span
            for found in read_lines(read_at(opened.file, size - start, start), start):
                if isinstance(found, Line):
                    good = found.place + found.length
        if good is None:
            good = start if start > len(self.HEAD) else 0
        rest = read_at(opened.file, size - good, good)
        if rest.strip(BLANK):
            self._keep_damage([Gap(good, len(rest), False)])
        write_at(opened.file, self.TAIL if good else self.EMPTY, good)
        good = good or len(self.HEAD)
        os.ftruncate(opened.file, good + len(self.TAIL))
        sync_file(opened.file)
        return good

    def _keep_damage(self, gaps: List[Gap]) -> bool:
        """Copies damaged parts to a file of their own, for somebody who may read more in them, if there is room."""
        path = name_aside(self.path)
        try:
            with os.fdopen(make_like(path, self.path), "wb") as aside:
                for gap in gaps:
                    for place in range(gap.place, gap.place + gap.length, self.PIECE):
                        aside.write(read_at(self._opened.file, min(self.PIECE, gap.place + gap.length - place), place))
                    aside.write(b"\n")
                aside.flush()
                sync_file(aside.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            self._tell("set aside where it is damaged", error)
            return False
        self._tell("set aside where it is damaged", None)
        size, first = sum(gap.length for gap in gaps), gaps[0].place
        log.warning(
            "jobs.json is damaged in %d places, from byte %d on: %d bytes set aside in %s", len(gaps), first, size, path
        )
        return True

    # Reading

    def _load(self) -> Iterator[None]:
        """Reads what the index does not know yet, a piece at a time, and recovers if that is due."""
        began = time.monotonic()
        while True:
            with self._exclusive() as opened:
                end = self._end()
                if opened.seen == end:
                    if opened.gaps and self._keep_damage(opened.gaps):
                        opened.gaps = []
                    self._recover(opened)
                    opened.ahead = opened.seen
                    break
                sync_file(opened.file)  # who wrote what follows may have ended, or failed, before that was done
            yield from self._read_lines(opened, end)
        if time.monotonic() - began > 1:
            log.info("jobs.json: %d jobs loaded in %.1f s", len(opened.index), time.monotonic() - began)

    def _read_lines(self, opened: Opened, end: int) -> Iterator[None]:
        """Brings the index from where it is to `end`, the end of a line."""
        step = self.PIECE
        while opened.file is not None and opened.seen < end:
            data = read_at(opened.file, min(step, end - opened.seen), opened.seen)
            if not data:
                return  # somebody cut the file
            found, read = list(read_lines(data, opened.seen)), opened.seen + len(data)
            if isinstance(found[-1], Gap) and read < end:
                if found[-1].place > opened.seen or step < self.LINE_LIMIT:
                    read = found.pop().place  # the begin of a line, perhaps
            step = 2 * step if read == opened.seen else self.PIECE
            with self._lock:
                for item in found:
                    if isinstance(item, Line):
                        self._apply(opened, item)
                    else:
                        opened.foreign = True
                        opened.gaps += [] if item.blank else [item]
                opened.seen = read
            yield

    def _apply(self, opened: Opened, line: Line) -> None:
        """A line of the file. A later change may be in force already, though its line is still to come."""
        job = line.job
        if self._unwritten.get(line.id, job) == job:
            self._unwritten.pop(line.id, None)
            self._meanwhile.pop(line.id, None)
        elif job is not None:
            job = self._in_force(line.id)
        opened.index.apply(line.id, job, line.place, line.length)
        opened.index.lines += 1

    # Writing

    def _write(self, changes: List[Change]) -> None:
        latest = dict(self._retry)
        for change in changes:
            latest.update(change.jobs)
        appended: Optional[Appended] = None
        try:
            with self._exclusive():  # until it is on disk: no other process shows what a power cut may take back
                appended = self._append(latest)
                self._make_durable(appended)
        except Exception as error:
            self._tell("written", error)
            self._trouble = reason_of(error)
            self._retry_at = time.monotonic() + self.RETRY
            for change in changes:
                if change.new:
                    self._give_up(change.jobs, appended is not None or isinstance(error, NotUndone))
                else:
                    self._retry.update(change.jobs)
                if change.patient:
                    self._patient.append(change.written)
                else:
                    change.written.set_exception(error)
            return
        self._tell("written", None)
        self._trouble = ""
        written, self._retry, self._patient = self._patient, {}, []
        for future in [*written, *(change.written for change in changes)]:
            future.set_result(None)
        self._consider_compacting()

    def _give_up(self, jobs: Dict[str, Optional[Job]], appended: bool) -> None:
        """A new job could not be stored. If it is in the file, but perhaps not on disk, it must go from there."""
        with self._lock:
            for job_id, job in jobs.items():
                if appended:
                    self._unwritten[job_id] = self._retry[job_id] = None
                    self._show([job_id])
                elif self._unwritten.get(job_id) is job:
                    del self._unwritten[job_id]

    def _append(self, jobs: Dict[str, Optional[Job]], awaited: bool = False) -> Appended:
        """Writes lines to the end of the file. Only `_make_durable` makes the index show them.

        Who looks at the index meanwhile sees it without them, or waits for them if they are to be `awaited`.
        """
        opened, end = self._opened, self._end()
        if 0 < end - opened.seen <= self.PIECE:
            sync_file(opened.file)  # as in `_load`
            for _ in self._read_lines(opened, end):  # what other processes wrote
                pass
        data, lines = bytearray(), []
        for job_id, job in jobs.items():
            record = b"null" if job is None else record_of(job)
            data += (b",\n" if end + len(data) > len(self.HEAD) else b"\n") + f'"{job_id}": '.encode()
            lines.append(Line(job_id, job, end + len(data), len(record)))
            data += record
        appended = Appended(lines, end, len(data), opened.seen == end and self._end_left is None)
        with self._lock:
            opened.ahead = end + len(data) if appended.known and not awaited else opened.ahead
        try:
            write_at(opened.file, bytes(data) + self.TAIL, end)
        except OSError as error:
            try:
                self._take_back(appended)
            except OSError:
                raise NotUndone(error.errno, error.strerror) from error
            raise
        return appended

    def _make_durable(self, appended: Appended) -> None:
        """Has lines that were appended written to disk, and then shows what they say."""
        opened = self._opened
        try:
            sync_file(opened.file)
        except OSError:
            self._take_back(appended)
            raise
        with self._lock:
            for line in appended.lines:
                if appended.known:
                    self._apply(opened, line)
                elif self._unwritten.get(line.id, line) == line.job:
                    del self._unwritten[line.id]
                    self._meanwhile.pop(line.id, None)
            if appended.known:
                opened.seen = appended.end + appended.length

    def _take_back(self, appended: Appended) -> None:
        """Undoes an append. Overwriting existing bytes works on a full disk, too."""
        opened = self._opened
        opened.ahead = opened.seen if appended.known else opened.ahead
        write_at(opened.file, self.TAIL, appended.end)
        os.ftruncate(opened.file, appended.end + len(self.TAIL))

    def _compact(self) -> Iterator[None]:
        """Writes the live lines to a new file, a piece at a time, and puts it in the place of the old."""
        yield from self._load()
        old, known, path = self._opened, self._opened.seen, f"{self.path}.{self.owner}.part"
        if old.gaps:  # what is damaged could not be set aside, and would be gone
            self._compact_at = time.monotonic() + self.COMPACT_RETRY
            return
        if old.foreign:
            log.warning("jobs.json was not as this program writes it: it is written anew, with %d jobs", len(old.index))
        fresh = Opened(None)
        try:
            fresh.file = make_like(path, self.path, os.O_RDWR)
            write_at(fresh.file, self.HEAD, 0)
            fresh.seen = synced = len(self.HEAD)
            for start in range(0, old.index.top, 200):
                if old.file is None or not self._copy_slots(old, fresh, start, start + 200):
                    return
                if fresh.seen - synced > 1 << 22:
                    sync_file(fresh.file)
                    synced = fresh.seen
                yield
            while old.file is not None and old.seen - known > self.PIECE // 8:
                known += self._copy_tail(old, fresh, known, old.seen)
                yield
            sync_file(fresh.file)
            yield
            with self._exclusive():
                if self._opened is old and not old.stale:
                    end = self._end()
                    while known < end:
                        known += self._copy_tail(old, fresh, known, end)
                    self._replace(old, fresh, path)
        except Exception as error:
            self._compact_at = time.monotonic() + self.COMPACT_RETRY
            log.warning("jobs.json could not be compacted, it will be tried again: %s", error)
        finally:
            if fresh is not self._opened:
                fresh.close()
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _copy_slots(self, old: Opened, fresh: Opened, start: int, end: int) -> bool:
        """Writes the live lines of some slots. False if the file is not as the index says."""
        data, index = bytearray(), old.index
        for slot in range(start, min(end, index.top)):
            if index.status[slot] == Index.REMOVED:
                continue
            job_id, record = index.id(slot), read_at(old.file, index.length[slot], index.place[slot])
            try:
                job = read_line(job_id, record, 0).job
            except (ValueError, RecursionError):
                old.stale = True
                return False
            record = record.replace(b"\n", b" ")
            data += (b",\n" if fresh.seen + len(data) > len(self.HEAD) else b"\n") + f'"{job_id}": '.encode()
            fresh.index.apply(job_id, job, fresh.seen + len(data), len(record))
            fresh.index.lines += 1
            data += record
        write_at(fresh.file, bytes(data), fresh.seen)
        fresh.seen += len(data)
        return True

    def _copy_tail(self, old: Opened, fresh: Opened, start: int, end: int) -> int:
        """Copies lines that were appended meanwhile, about a piece of them, and returns how many bytes."""
        data = read_at(old.file, min(self.PIECE, end - start), start)
        if not data:
            raise OSError(errno.EIO, "somebody cut the file")
        if start + len(data) < end:
            cut = data.rfind(b",\n")
            data = data[:cut] if cut > 0 else read_at(old.file, end - start, start)
        copied = data.lstrip(b",") if fresh.seen == len(self.HEAD) else data
        write_at(fresh.file, copied, fresh.seen)
        for _ in self._read_lines(fresh, fresh.seen + len(copied)):
            pass
        return len(data)

    def _replace(self, old: Opened, fresh: Opened, path: str) -> None:
        """Puts a new file, and what is known of it, in the place of the old."""
        write_at(fresh.file, self.TAIL, fresh.seen)
        copy_access(self.path, fresh.file)  # somebody may have made it private meanwhile
        sync_file(fresh.file)
        with self._reading:
            if OPEN_FILES_STAY:
                old.close()
                fresh.close()
            try:
                os.replace(path, self.path)
            except OSError:
                old.file = old.file or self._open_file()
                raise
            fresh.file = fresh.file or self._open_file()
            with self._lock:
                fresh.ahead = fresh.seen
                self._opened = fresh
                self._show(self._unwritten)
            old.close()
        sync_folder(os.path.dirname(self.path))

    # Jobs of processes that are gone

    def _recover(self, opened: Opened) -> None:
        """Raises OSError if the jobs cannot be read. Whatever else cannot be done now, jobs can be looked at."""
        with self._work:
            end, self._end_left = self._end_left, None
        if end is None:
            return
        with self._lock:
            index = opened.index
            ids = [index.id(slot) for slot in sorted(index.unfinished)]
            known = {job_id: self._in_force(job_id) for job_id in ids if job_id in self._unwritten}
            places = {index.id(slot): (index.place[slot], index.length[slot]) for slot in index.unfinished}
        try:
            found = [known[one] if one in known else self._read(opened, one, *places[one]) for one in ids]
        except OSError:
            with self._work:
                self._end_left = self._end_left or end  # at the next look
            raise
        jobs = [job for job in found if job is not None]
        gone = {owner: self._is_gone(owner) for owner in {job.owner for job in jobs}}
        meanwhile = {job.id: job for job in jobs if gone[job.owner]}
        left: Dict[str, Optional[Job]] = {}
        failure: Optional[OSError] = None
        for job in meanwhile.values():
            try:
                left[job.id] = end(job)
            except OSError as error:  # that passes: it is tried again at the next look
                failure = error
        self._tell("completed by what lies in images/", failure)
        with contextlib.suppress(OSError):
            self._remove_leftovers()
        if not left:
            return
        try:
            self._make_durable(self._append(left, awaited=True))
            log.warning("%d jobs that a webui left behind have ended: %s", len(left), self._by_status(left.values()))
        except OSError as error:
            self._tell("written", error)
            with self._lock:
                self._supersede(left, {job_id: meanwhile[job_id] for job_id in left})
            self._retry.update(left)
            self._retry_at = time.monotonic() + self.RETRY

    @staticmethod
    def _by_status(jobs: Iterable[Optional[Job]]) -> str:
        statuses = [job.status for job in jobs if job is not None]
        return ", ".join(f"{statuses.count(status)} {status}" for status in ENDED if status in statuses)

    def _is_gone(self, owner: Optional[str]) -> bool:
        """Whether a process has ended: then its lock can be had."""
        if owner == self.owner:
            return False
        path = f"{self.path}.owner-{owner}"
        if owner is None or not re.match(r"[0-9a-f]{8}\Z", owner) or not os.path.exists(path):
            return True
        lock, failure = FileLock(path, self.path), None
        try:
            return lock.acquire(0)
        except OSError as error:
            failure = error
            return False
        finally:
            lock.close()
            self._tell(f"searched for what process {owner} left", failure)

    def _remove_leftovers(self) -> None:
        """Removes the files of processes that are gone."""
        folder, name = os.path.split(self.path)
        form = re.compile(re.escape(name) + r"\.(?:owner-([0-9a-f]{8})|([0-9a-f]{8})\.part)\Z")
        for entry in os.listdir(folder):
            match = form.match(entry)
            if match and self._is_gone(match.group(1) or match.group(2)):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, entry))


# ------------------------------------------------------------------------------------------------------------------
# ImageStore: images/
# ------------------------------------------------------------------------------------------------------------------

IMAGE_TYPES = (  # how a file begins, its ending, its media type
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png", "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "jpg", "image/jpeg"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "webp", "image/webp"),
    (re.compile(rb"GIF8[79]a"), "gif", "image/gif"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "avif", "image/avif"),
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n"), "jxl", "image/jxl"),
    (re.compile(rb"II\*\x00|MM\x00\*"), "tiff", "image/tiff"),
    (re.compile(rb"BM"), "bmp", "image/bmp"),
)
MEDIA_TYPES = {ending: media_type for _, ending, media_type in IMAGE_TYPES}
MEDIA_TYPES["txt"] = "text/plain"  # starlette adds the charset
OTHER_MEDIA_TYPE = "application/octet-stream"


class Contents(NamedTuple):
    """What an answer without its images says, which is read once."""

    parameters: Any
    ranges: Tuple[int, ...]  # where the values of `parameters` and `info` start and end in it; 0 for what is not there


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

    The JSON reader would hold the interpreter for as long as it needs for all images together. So they are found by
    their quotes, where they come first and have no escapes, as base64 has none.
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
SPACE = re.compile(rb"[ \t\r\n]*")
SCALAR = re.compile(rb"[-+.0-9A-Za-z]+")
BRACKET = re.compile(rb"[\[\]{}]")


def end_of_string(data: bytes, position: int) -> int:
    """The end of a JSON string that begins before `position`, found in steps that hold the interpreter shortly."""
    step = 256  # most are short
    while position < len(data):
        piece = data[position : position + step]
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        quote = piece.find(b'"')
        if quote >= 0:
            return position + quote + 1
        if position + step >= len(data):
            break
        position += len(piece) - piece.endswith(b"\\")  # which belongs to what comes next
        step = min(4 * step, 1 << 16)
    raise ValueError("a string has no end")


def end_of_value(data: bytes, position: int) -> int:
    """The same for any JSON value, of which only the brackets and the quotes are looked at."""
    first, depth, step = data[position : position + 1], 0, 1 << 16
    if first == b'"':
        return end_of_string(data, position + 1)
    if first not in (b"{", b"["):
        scalar = SCALAR.match(data, position)
        if scalar is None:
            raise ValueError("a value is missing")
        return scalar.end()
    while position < len(data):
        quote = data.find(b'"', position, position + step)
        end = quote if quote >= 0 else min(position + step, len(data))
        for bracket in BRACKET.finditer(data, position, end):
            depth += 1 if bracket.group() in b"[{" else -1
            if depth == 0:
                return bracket.end()
        position = end if quote < 0 else end_of_string(data, quote + 1)
    raise ValueError("a list or an object has no end")


def members(data: bytes, position: int = 0) -> Iterator[Tuple[str, int, int]]:
    """The members of a JSON object: each one's name, and where its value starts and ends. Raises ValueError."""

    def skip(position: int, *expected: bytes) -> int:
        """The place after some space, one of the expected signs and some space again."""
        position = SPACE.match(data, position).end()
        if data[position : position + 1] not in expected:
            raise ValueError("it is no JSON object")
        return SPACE.match(data, position + 1).end()

    position = skip(position, b"{")
    if data[position : position + 1] == b"}":
        return
    while True:
        if data[position : position + 1] != b'"':
            raise ValueError("a name is missing")
        end = end_of_string(data, position + 1)
        name = json.loads(data[position:end].decode())
        start = skip(end, b":")
        end = end_of_value(data, start)
        yield name, start, end
        position = skip(end, b",", b"}")
        if data[end:position].strip() == b"}":
            return


def contents_of(rest: bytes) -> Contents:
    """Reads an answer without its images. Raises ValueError, RecursionError.

    Of a large one, only `parameters` are read, and the rest is passed by.
    """
    places = {name: (start, end) for name, start, end in members(rest)}
    (start, end), info = (places.get(name, (0, 0)) for name in ("parameters", "info"))
    if len(rest) < LARGE:
        parameters = json.loads(rest.decode()).get("parameters")
    else:
        parameters = json.loads(rest[start:end].decode()) if end else None
    return Contents(parameters, (start, end, *info))


def ranges_of(rest: bytes, contents: Contents) -> Tuple[int, ...]:
    """What is kept of a large answer: where `parameters` and `info` start and end, each with the CRC of its bytes.

    The last is the CRC of all of it. So what is passed on without being read is known to be what was stored.
    """
    view, (start, end, info_start, info_end) = memoryview(rest), contents.ranges
    info = info_start, info_end, zlib.crc32(view[info_start:info_end])
    return (start, end, zlib.crc32(view[start:end]), *info, zlib.crc32(view))


def with_images_hidden(answer: Answer) -> Answer:
    """An answer whose parameters say that the client does not want the images, and else the same to the byte."""
    contents = answer.contents
    if not isinstance(contents.parameters, dict) or "send_images" not in contents.parameters:
        return answer
    places = {name: (start, end) for name, start, end in members(answer.rest, contents.ranges[0])}
    start, end = places["send_images"]
    rest = b"".join((answer.rest[:start], b"false", answer.rest[end:]))
    moved = len(rest) - len(answer.rest)
    ranges = tuple(place + moved if place >= end else place for place in contents.ranges)
    return answer._replace(rest=rest, contents=Contents({**contents.parameters, "send_images": False}, ranges))


def parameters_of(rest: bytes) -> Dict[str, Any]:
    """The parameters of an answer; empty if they are no object. Raises ValueError, RecursionError if it is none."""
    parameters = contents_of(rest).parameters
    return parameters if isinstance(parameters, dict) else {}


BRIEF_TEXT = 1000  # characters that a text in `parameters` may have in a list
BRIEF_SIZE = 1 << 16  # bytes that they may have there together, about
BRIEF_DEPTH = 100  # lists and objects within one another


def brief_parameters(parameters: Any) -> Tuple[Any, bool]:
    """A copy of `parameters` with a note in the place of what is large, and whether there was something large.

    That is each long text, and, where there is too much in sum, what lies deepest: a list or an object as a whole.
    What lies at the top and is no text, list or object always stays. The host gives a request's own pictures back in
    there, wherever its scripts take them.
    """
    found, left, note = False, BRIEF_SIZE, 30  # bytes that are left, and those of a note

    def shorten(value: Any, room: float = math.inf) -> Any:
        """A scalar, or a note in its place. Takes what it costs from what is left."""
        nonlocal found, left
        if isinstance(value, str) and (len(value) > BRIEF_TEXT or len(as_json(value)) > room):
            found = True
            value = f"({len(value):,} characters)"
        left -= len(as_json(value)) + 1
        return value

    def fits(value: Any) -> bool:
        """Whether there is room for all that a list or an object has, with a note for each list or object in it."""
        size, entries = 0, [value] if isinstance(value, list) else [value, value.values()]
        if sum(map(len, entries)) * 2 > left:
            return False
        for entry in itertools.chain(*entries):
            long = isinstance(entry, str) and len(entry) > BRIEF_TEXT
            size += note if long or isinstance(entry, (dict, list)) else len(as_json(entry)) + 1
            if size > left:
                return False
        return True

    result: List[Any] = [None]
    waiting = deque([(parameters, result, 0, 0)])  # level by level, and however deep
    while waiting:
        value, parent, key, depth = waiting.popleft()
        left += note
        if not isinstance(value, (dict, list)):
            parent[key] = shorten(value)
            continue
        is_top = depth == 0 and isinstance(value, dict) and len(value) <= BRIEF_TEXT
        if not is_top and (depth > BRIEF_DEPTH or not fits(value)):
            found = True
            parent[key] = shorten(f"({len(value):,} entries)")
            continue
        copy = parent[key] = [None] * len(value) if isinstance(value, list) else {}
        left -= 2
        for name, entry in enumerate(value) if isinstance(value, list) else value.items():
            name = shorten(name) if isinstance(name, str) else name
            if isinstance(entry, (dict, list)):
                copy[name] = None  # keeps the order
                left -= note  # for that it costs at least
                waiting.append((entry, copy, name, depth + 1))
            else:
                copy[name] = shorten(entry, left if is_top else math.inf)
    return result[0], found


def brief_answer_of(rest: bytes, contents: Contents) -> Optional[bytes]:
    """An answer with brief parameters, or None if its own are. Of a large one, nothing else is in it."""
    if len(rest) <= BRIEF_TEXT:
        return None
    try:
        parameters, found = brief_parameters(contents.parameters)
        data = as_host_json(parameters) if found else b""
    except RecursionError:  # Pythons differ in how deep they read and write, and that is not to cost the images
        return None
    if not found:
        return None
    start, end = contents.ranges[:2]
    return b'{"images":[],"parameters":%s}' % data if len(rest) >= LARGE else rest[:start] + data + rest[end:]


PASSING = (
    *(errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH),  # of mounts
)


def passes(error: OSError) -> bool:
    """Whether the same may go well in a moment: too many files are open, say, or a mount does not answer."""
    return error.errno in PASSING


class ImageStore:
    """The files of jobs, in a folder for each day. Every method may block, and raises OSError unless it says else.

    A file is whole once it has its name, and it has its name before a record names it. No symbolic link below the
    folder is followed.
    """

    PIECE = 3 << 16  # bytes, a multiple of 3: there base64 can be cut

    def __init__(self, folder: str):
        self.folder = folder
        self._sources = (os.path.join(os.path.dirname(folder), "jobs.json"),)  # who may not read them reads no image
        with contextlib.suppress(OSError):
            self._make_folder(folder)

    def as_private_as(self, paths: Iterable[str]) -> "ImageStore":
        """The same, whose new files are for nobody who may not read some others."""
        store = copy.copy(self)
        store._sources = (*self._sources, *paths)
        return store

    def save(self, job: Job, answer: Answer) -> Job:
        """Stores an answer, safe from a power cut, and returns the job with the names and the size of its files.

        The host's answer comes last, when all else is safe: where it is, all is, see `find`.
        """
        folder = os.path.join(self.folder, job.day)
        self._make_folder(self.folder)
        self._make_folder(folder, links=False)
        contents = answer.contents or contents_of(answer.rest)
        brief = brief_answer_of(answer.rest, contents)
        ranges = ranges_of(answer.rest, contents) if len(answer.rest) >= LARGE else ()
        job = job._replace(has_brief=brief is not None, ranges=ranges)
        names: List[str] = []
        total = 0
        try:
            for number, image in enumerate(answer.images):
                name, size = self._save_image(f"{job.day}/{job.id}_{number}", image)
                names.append(name)
                total += size
            if brief is not None:
                total += self._write(job.brief_answer, [brief])
            if total:
                sync_folder(folder)
            total += self._write(job.answer, [answer.rest])
            sync_folder(folder)
            sync_folder(self.folder)
        except BaseException:
            self.remove([*names, *job.files])
            raise
        return job._replace(images=tuple(names), bytes=total)

    def find(self, job: Job) -> Optional[Job]:
        """A job that a crash left between `save` and its record, with its files, as `save` returned it.

        None if `save` did not come to its end. Raises OSError if that cannot be told.
        """
        folder = os.path.join(self.folder, job.day)
        if os.path.islink(folder):  # which is never followed
            return None
        try:
            os.lstat(self._path(job.answer))  # most jobs have none, and a folder takes long to list
        except (FileNotFoundError, NotADirectoryError):
            return None
        entries = {f"{job.day}/{entry}" for entry in os.listdir(folder) if entry.startswith(job.id)}
        images = {int(match.group(2)): match.group(0) for match in map(IMAGE_FORM.match, entries) if match}
        if sorted(images) != list(range(len(images))):
            return None
        job = job._replace(images=tuple(images[number] for number in range(len(images))), has_brief=True)
        job = job._replace(has_brief=job.brief_answer in entries)
        if os.lstat(self._path(job.answer)).st_size >= LARGE:
            with contextlib.suppress(ValueError, RecursionError):
                rest = b"".join(self.read(job.answer))
                job = job._replace(ranges=ranges_of(rest, contents_of(rest)))
        return job._replace(bytes=sum(os.lstat(self._path(name)).st_size for name in job.files))

    def _make_folder(self, path: str, links: bool = True) -> None:
        """Sets aside what stands where a folder should be."""
        if os.path.lexists(path) and (not os.path.isdir(path) or (os.path.islink(path) and not links)):
            log.warning("%s is no folder, it was set aside as %s", path, set_aside(path))
        make_folder(path, self._sources[0])

    def _save_image(self, base: str, image: Union[bytes, memoryview]) -> Tuple[str, int]:
        if bytes(image[:5]) == b"data:":
            image = image[bytes(image[:100]).find(b",") + 1 :]
        try:
            start = next(self._decode(image[:64]))
            ending = next((ending for form, ending, _ in IMAGE_TYPES if form.match(start)), "bin")
            return f"{base}.{ending}", self._write(f"{base}.{ending}", self._decode(image))
        except ValueError:  # no base64: kept as it is
            return f"{base}.txt", self._write(f"{base}.txt", [bytes(image)])

    def _decode(self, image: Union[bytes, memoryview]) -> Iterator[bytes]:
        """Decodes so that encoding gives the same text again, piece by piece, since it holds the interpreter."""
        if not image or len(image) % 4:
            raise ValueError("no base64")
        step = self.PIECE // 3 * 4
        for position in range(0, len(image), step):
            piece = bytes(image[position : position + step])
            data = base64.b64decode(piece, validate=True)
            if position + step >= len(image):
                if base64.b64encode(data) != piece:
                    raise ValueError("not canonical")
            elif len(data) != self.PIECE:
                raise ValueError("padding inside")
            yield data

    def _write(self, name: str, pieces: Any) -> int:
        path = self._path(name)
        part = f"{os.path.splitext(path)[0]}.{secrets.token_hex(4)}.part"
        size = 0
        try:
            file = self._create(part)
            try:
                for piece in pieces:
                    write_at(file, piece, size)
                    size += len(piece)
                sync_file(file)
            finally:
                os.close(file)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        return size

    def _create(self, path: str) -> int:
        try:
            return make_within(path, *self._sources)
        except FileNotFoundError:  # a purge took the folder together with its last file
            make_folder(os.path.dirname(path), self._sources[0])
            return make_within(path, *self._sources)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, *name.split("/"))

    @staticmethod
    def _refuse_link(path: str) -> None:
        if os.path.islink(path):
            raise OSError(errno.ELOOP, "a symbolic link is not followed", path)

    def open(self, name: str) -> Tuple[int, int]:
        """A descriptor for reading, to be closed by the caller, and the size in bytes."""
        path = self._path(name)
        self._refuse_link(os.path.dirname(path))
        self._refuse_link(path)
        file = os.open(path, os.O_RDONLY | NO_FOLLOW | NO_WAIT | BINARY)
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            os.close(file)
            raise OSError(errno.EINVAL, "no regular file", path)
        return file, status.st_size

    def size(self, name: str) -> Optional[int]:
        """In bytes; None if the file is not there or cannot be read. Raises only an OSError that passes."""
        try:
            file, size = self.open(name)
        except OSError as error:
            if passes(error):
                raise
            return None
        os.close(file)
        return size

    def read(self, name: str, start: int = 0, end: Optional[int] = None) -> Iterator[bytes]:
        """A file's bytes, or a part of them, `PIECE` at a time."""
        file, _ = self.open(name)
        try:
            position = start
            while end is None or position < end:
                data = read_at(file, self.PIECE if end is None else min(self.PIECE, end - position), position)
                if not data and end is not None:
                    raise self.damaged(name)
                if not data:
                    return
                yield data
                position += len(data)
        finally:
            os.close(file)

    @staticmethod
    def damaged(name: str) -> OSError:
        """What is raised for a file that is not as it was stored."""
        return OSError(errno.EIO, "it is damaged", name)

    def check(self, name: str, crc: int, start: int = 0, end: Optional[int] = None) -> None:
        """Reads a file, or a part of it. Raises OSError if it is not as it was stored."""
        found = 0
        for data in self.read(name, start, end):
            found = zlib.crc32(data, found)
        if found != crc:
            raise self.damaged(name)

    def read_as_json(self, name: str) -> Iterator[bytes]:
        """The JSON string that the host answered for this file, a piece at a time."""
        if name.endswith(".txt"):
            try:
                text = b"".join(self.read(name)).decode("utf-8", "surrogatepass")
            except UnicodeDecodeError:
                raise self.damaged(name) from None
            yield as_host_json(text)
            return
        pieces = self.read(name)
        yield b'"' + base64.b64encode(next(pieces, b""))  # the file is open from now on, and may be deleted
        for data in pieces:
            yield base64.b64encode(data)
        yield b'"'

    def remove(self, names: Any) -> int:
        """Removes files, and folders that are empty then. Returns the bytes that it freed. Does not raise."""
        freed, folders = 0, set()
        for name in names:
            path = self._path(name)
            folder = os.path.dirname(path)
            with contextlib.suppress(OSError):
                self._refuse_link(folder)
                size = os.lstat(path).st_size
                os.unlink(path)
                freed += size
                folders.add(folder)
        for folder in folders:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        return freed

    def older_than(self, before: float) -> Iterator[str]:
        """Names of all files that this program made and last changed before a time (Unix seconds)."""
        try:
            days = sorted(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for day in days:
            folder = os.path.join(self.folder, day)
            if not DAY_FORM.match(day) or os.path.islink(folder) or not os.path.isdir(folder):
                continue
            try:
                entries = os.listdir(folder)
            except FileNotFoundError:  # it went with its last file
                continue
            except OSError as error:
                log.warning("%s cannot be searched for what no job names: %s", folder, error)
                continue
            for entry in entries:
                name = f"{day}/{entry}"
                with contextlib.suppress(FileNotFoundError):
                    if OWN_FILE_FORM.match(name) and os.lstat(self._path(name)).st_mtime < before:
                        yield name


# ------------------------------------------------------------------------------------------------------------------
# Predecessor: the jobs of API-Job-Tracker-SD-WebUI
# ------------------------------------------------------------------------------------------------------------------


class LegacyJob(NamedTuple):
    """An entry of the predecessor's jobs.json."""

    id: str
    prompt: str
    ip: Optional[str]
    timestamp: Optional[int]  # Unix seconds; None if it cannot be understood
    status: str
    paths: List[str]  # of the images, in the webui's output folder


class LegacyFile(NamedTuple):
    """The predecessor's jobs.json."""

    jobs: List[LegacyJob]  # in order of acceptance
    unreadable: int  # entries that are no jobs


LEGACY_ENTRY_START = re.compile(r'\{\s*"id"\s*:')
LEGACY_DECODER = json.JSONDecoder(parse_int=parse_int)
SEED = re.compile(r"\bSeed: (\d{1,100})")


def read_legacy_file(path: str) -> Optional[LegacyFile]:
    """Reads a file as the predecessor's jobs.json. None if it is something else, or is not there. Raises OSError."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        text = file.read().decode("utf-8-sig", "replace").strip()
    if not text.startswith("["):
        return None
    entries, damaged = read_legacy_entries(text)
    jobs = [job for job in map(legacy_job, entries) if job is not None]
    unreadable = damaged + len(entries) - len(jobs)
    return LegacyFile(jobs, unreadable) if jobs or not unreadable else None


def read_legacy_entries(text: str) -> Tuple[List[Any], int]:
    """The entries of a JSON array, and how many of them, at least, are lost where it is damaged."""
    try:
        return LEGACY_DECODER.decode(text), 0
    except (ValueError, RecursionError):
        pass
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


def legacy_job(entry: Any) -> Optional[LegacyJob]:
    """An entry as a job, None if it is none. A field that cannot be understood does not cost the others."""
    if not isinstance(entry, dict) or "status" not in entry:
        return None
    job_id, prompt, ip, status = (entry.get(name) for name in ("id", "prompt", "ip", "status"))
    if not (isinstance(job_id, str) and job_id):
        return None
    paths = entry.get("output_paths") or entry.get("output_path") or []  # the latter is of its first version
    if not isinstance(paths, list):
        paths = [paths]
    return LegacyJob(
        job_id,
        without_surrogates(prompt) if isinstance(prompt, str) else "",
        without_surrogates(ip)[:IP_LIMIT] if isinstance(ip, str) else None,
        legacy_time(entry.get("timestamp")),
        status if isinstance(status, str) else "",
        [path for path in paths if isinstance(path, str) and path],
    )


def legacy_time(value: Any) -> Optional[int]:
    """A time in Unix seconds, from a number, its text or an ISO date. None for everything else."""
    try:
        seconds = int(float(value))
    except (TypeError, ValueError, OverflowError):
        try:
            seconds = int(datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp())
        except (AttributeError, ValueError, OverflowError, OSError):
            return None
    return seconds if 0 < seconds < LAST_MOMENT else None


def assign_ids(jobs: List[LegacyJob], known: Dict[int, str]) -> List[str]:
    """An ID for each of the predecessor's jobs: its own, where that is an ID of ours and differs from every other.

    `known` has the IDs in jobs.json by their number. An ID that is known already belongs to the same job, taken over
    before a crash: so the answer must be, and is, the same each time.
    """
    ids: List[str] = []
    used: Set[int] = set()

    def is_free(job_id: str) -> bool:
        number = id_number(job_id)
        return number not in used and known.get(number, job_id) == job_id

    for job in jobs:
        job_id, attempt = job.id, 0
        while not (ID_FORM.match(job_id) and is_free(job_id)):
            digest = hashlib.sha256(f"{job.id} {attempt}".encode("utf-8", "surrogatepass")).digest()
            job_id = "".join(ID_ALPHABET[byte % len(ID_ALPHABET)] for byte in digest[:8])
            attempt += 1
        ids.append(job_id)
        used.add(id_number(job_id))
    return ids


def infotext_of(image: bytes) -> Optional[str]:
    """The text that the host writes into a PNG, None if there is none."""
    position = 8 if IMAGE_TYPES[0][0].match(image) else len(image)
    while image[position + 4 : position + 8] not in (b"IDAT", b""):
        length = int.from_bytes(image[position : position + 4], "big")
        kind, chunk = image[position + 4 : position + 8], image[position + 8 : position + 8 + length]
        if chunk.startswith(b"parameters\0"):
            if kind == b"tEXt":
                return chunk[11:].decode("latin-1")
            if kind == b"iTXt" and chunk[11:12] == b"\0":  # it is not compressed
                return chunk[13:].split(b"\0", 2)[-1].decode("utf-8", "replace")
        position += 12 + length
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
    RETRY = 600.0  # seconds until what could not be done is tried again
    LOOK_EVERY = 5.0  # seconds between two looks whether the process that copies is gone
    SPARE = 1 << 30  # bytes that copies leave free on the disk, or a twentieth of a smaller one
    # What says that there is no such file. Everything else may be different later, as with a drive that is not ready.
    GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO)

    def __init__(self, extension_folder: str, data_folder: str):
        paths = (os.path.realpath(os.path.join(folder, "jobs.json")) for folder in (data_folder, extension_folder))
        self.paths = list(dict.fromkeys(paths))  # where the predecessor's file, or what has become of it, may be
        self.path = self.paths[0]  # ours
        # A1111 shortens the path of an image in its own folder: it starts there, or where the extensions' folder lies.
        self.bases = (os.curdir, os.path.dirname(os.path.dirname(os.path.realpath(extension_folder))))
        self.changing = threading.Lock()  # around a change to a job that must not meet the job's removal
        self._trouble = ""

    # The jobs

    def list_jobs(self) -> None:
        """Merges the predecessor's jobs into jobs.json, before those that are there. Copies no image.

        Does not raise. What cannot be done now is done later, and until then nobody takes the predecessor's file for
        a damaged one of ours. To be called before the JobStore opens its file.
        """
        try:
            if not (any(map(self._may_be_legacy, self.paths)) or self._files(self.FOUND)):
                return
            with contextlib.closing(FileLock(self.path + ".lock", self.path)) as lock, lock:
                read: Dict[str, LegacyFile] = {}
                for path in self.paths:
                    source, legacy = self._find_legacy(path)
                    if legacy is not None:
                        read[self._rename(source, path, self.FOUND)] = legacy
                for path, source in self._files(self.FOUND):
                    self._merge(path, source, read.get(source) or self._read(source))
        except Exception as error:
            self._log_once(f"The predecessor's jobs cannot be taken over yet: {type(error).__name__}: {error}")

    @staticmethod
    def _may_be_legacy(path: str) -> bool:
        """Whether a jobs.json, for all that one byte says, is not ours."""
        if not os.path.isfile(path):
            return os.path.isfile(f"{path}.bak")
        with open(path, "rb") as file:
            return file.read(1) != JobStore.HEAD

    def _find_legacy(self, path: str) -> Tuple[str, Optional[LegacyFile]]:
        """What the predecessor would read: its jobs.json, or, where a power cut cost it that, the copy beside it."""
        if not self._may_be_legacy(path):
            return path, None
        legacy = read_legacy_file(path)
        if legacy is None and not any(self._files(stage) for stage in (self.FOUND, self.LISTED, self.DONE)):
            return f"{path}.bak", read_legacy_file(f"{path}.bak")
        return path, legacy

    @staticmethod
    def _read(source: str) -> LegacyFile:
        legacy = read_legacy_file(source)
        if legacy is None:
            raise ValueError(f"{source} is not as it was")
        return legacy

    def _files(self, stage: str) -> List[Tuple[str, str]]:
        """The predecessor's files that have come to a stage, each with the path of the jobs.json that it was."""
        found = []
        for path in self.paths:
            folder, name = os.path.split(path)
            form = re.compile(re.escape(f"{name}.{stage}") + r"(-\d+)?\Z")
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                found += [(path, os.path.join(folder, entry)) for entry in os.listdir(folder) if form.match(entry)]
        return sorted(found)

    @staticmethod
    def _rename(source: str, path: str, stage: str) -> str:
        """Gives the predecessor's file the name of its next stage, and returns that."""
        target, count = f"{path}.{stage}", 1
        while os.path.lexists(target):
            count += 1
            target = f"{path}.{stage}-{count}"
        os.rename(source, target)
        sync_folder(os.path.dirname(path))
        return target

    def _merge(self, path: str, source: str, legacy: LegacyFile) -> None:
        """Writes the jobs of the predecessor's file, if they are not there yet, before our own."""
        ours = self._read_ours()
        if ours.strip() and not (ours.startswith(JobStore.EMPTY[:2]) and ours.endswith(JobStore.TAIL)):
            raise ValueError("jobs.json is damaged, and must be mended first")
        known = self._known_ids(ours)
        lines = []
        last_time = min(max(int(os.stat(source).st_mtime), 0), LAST_MOMENT - 1)
        for job, job_id in zip(legacy.jobs, assign_ids(legacy.jobs, known)):
            last_time = job.timestamp or last_time
            if id_number(job_id) not in known:
                lines.append(b'\n"%s": %s' % (job_id.encode(), record_of(self._listed(job, job_id, last_time))))
            if job_id != job.id:
                log.warning("Job %r of the predecessor has got the ID %s", job.id[:100], job_id)
        if lines:
            rest = ours[len(JobStore.HEAD) : -len(JobStore.TAIL)]
            self._make_as_private_as(source)
            data = JobStore.HEAD + b",".join(lines) + (b"," if rest else b"") + rest + JobStore.TAIL
            replace_file(self.path, data)
        self._rename(source, path, self.LISTED)
        log.info("Taken over from the predecessor: %d jobs, whose images are being copied", len(legacy.jobs))

    def _read_ours(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return b""

    @staticmethod
    def _known_ids(ours: bytes) -> Dict[int, str]:
        """The IDs in our jobs.json by their number, those of removed jobs too."""
        ids = (match.group(2).decode() for match in LINE.finditer(ours))
        return {id_number(job_id): job_id for job_id in ids}

    def _make_as_private_as(self, source: str) -> None:
        """Sees to it that our jobs.json is for nobody who may not read the predecessor's. The next inherits that."""
        try:
            close_file(make_like(self.path, source, least=0o600))
        except FileExistsError:
            narrow_access(self.path, source)

    def _listed(self, legacy: LegacyJob, job_id: str, timestamp: int) -> Job:
        """A job of the predecessor before its images are copied."""
        status, notes = FAILED, []
        if legacy.status.casefold() == COMPLETED.casefold():
            status = COMPLETED
            notes.append("Its images are still to be copied" if legacy.paths else "No images of it were kept")
        elif legacy.status.casefold() == FAILED.casefold():
            notes.append("The generation failed, and it was not kept why")
        else:
            notes.append("The webui ended before the generation did")
        return Job(
            id=job_id,
            type=TYPES[0],  # the predecessor did not keep which
            status=status,
            timestamp=timestamp,
            ip=legacy.ip,
            prompt=legacy.prompt[:PROMPT_LIMIT],
            error=self._error(legacy, job_id, notes),
        )

    @staticmethod
    def _error(legacy: LegacyJob, job_id: str, notes: List[str]) -> Optional[str]:
        if job_id != legacy.id:
            notes = [*notes, f"Its ID was {without_surrogates(legacy.id[:100])}"]
        return ". ".join(notes) or None

    # Their images

    def is_unfinished(self) -> bool:
        """Whether something is still to be found, merged or copied. Raises OSError."""
        return bool(self._is_in_the_way() or self._files(self.FOUND) or self._files(self.LISTED))

    def _is_in_the_way(self) -> bool:
        """Whether a jobs.json is still the predecessor's, which could not be given another name."""
        return any(self._may_be_legacy(path) and read_legacy_file(path) is not None for path in self.paths)

    def refuse_to_open(self) -> None:
        """Raises OSError while jobs.json is the predecessor's: the store would take it for a damaged one of ours."""
        if self._may_be_legacy(self.path) and read_legacy_file(self.path) is not None:
            raise OSError(errno.EBUSY, "The predecessor's jobs.json cannot be taken over yet", self.path)

    def copy_images(self, store: JobStore, images: ImageStore, stop: threading.Event) -> None:
        """Copies the images of all jobs of the predecessor. Returns when that is done, or `stop` is set."""
        while not stop.is_set():
            pause = self.RETRY
            try:
                self.list_jobs()
                if self._is_in_the_way():
                    pause = self.LOOK_EVERY
                with contextlib.closing(FileLock(f"{self.path}.{self.FOUND}.lock", self.path)) as lock:
                    if lock.acquire(0):
                        for path, source in self._files(self.LISTED):
                            self._copy_file(path, source, store, images, stop)
                    else:
                        pause = self.LOOK_EVERY
                if not self.is_unfinished():
                    with contextlib.suppress(OSError):
                        os.unlink(lock.path)
                    return
            except Exception as error:
                if not stop.is_set():  # the store may be closed then
                    self._log_once(f"Images of the predecessor's jobs cannot be copied yet: {error}")
            stop.wait(pause)

    def _copy_file(self, path: str, source: str, store: JobStore, images: ImageStore, stop: threading.Event) -> None:
        """Copies the images of one file's jobs, newest first. Raises OSError if some cannot be copied now."""
        legacy = self._read(source)
        count = copied = size = missing = 0
        failure: Optional[OSError] = None
        ids = assign_ids(legacy.jobs, self._known_ids(self._read_ours()))
        for one, job_id in zip(reversed(legacy.jobs), reversed(ids)):
            began = time.monotonic()
            if stop.is_set():
                return
            job = store.get(job_id)
            if job is not None and job.status == COMPLETED and not self._is_copied(one, job):
                try:
                    found = [self._read_image(image) for image in one.paths]
                except OSError as error:
                    failure = error
                    self._note(one, job, error, store)
                    continue
                job = self._store(one, job, [image for image in found if image is not None], store, images)
                stop.wait(2 * (time.monotonic() - began))  # generations, and a webui that starts, come first
            if job is not None:
                count, copied, size = count + 1, copied + len(job.images), size + job.bytes
                missing += len(one.paths) - len(job.images) if job.status == COMPLETED else 0
        if failure is not None:
            raise failure
        self._rename(source, path, self.DONE)
        log.info(
            "The predecessor's jobs are complete: %d jobs, %d images, %s bytes; %d images were no longer on disk, "
            "%d entries could not be read",
            count,
            copied,
            f"{size:,}",
            missing,
            legacy.unreadable,
        )

    @staticmethod
    def _is_copied(legacy: LegacyJob, job: Job) -> bool:
        """Whether nothing is left to do: a job of which no image was found may have some by now."""
        return bool(job.images) or (job.bytes > 0 and not legacy.paths)

    def _note(self, legacy: LegacyJob, job: Job, failure: OSError, store: JobStore) -> None:
        """Says in a job why its images are not there yet."""
        error = self._error(legacy, job.id, [f"Its images cannot be copied yet: {reason_of(failure)}"])
        with self.changing:
            if job.error != error and store.get(job.id) is not None:
                store.put(job._replace(error=error))

    def _read_image(self, path: str) -> Optional[Tuple[str, bytes]]:
        """An image of the predecessor's, and where it lies; None if it is no longer there.

        Raises OSError if it cannot be read now.
        """
        for place in dict.fromkeys(os.path.join(base, path) for base in self.bases):
            try:
                with open(place, "rb", opener=lambda name, flags: os.open(name, flags | NO_WAIT)) as file:
                    data = file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
            except ValueError:  # no path
                continue
            except OSError as error:
                if error.errno in self.GONE or os.path.isdir(place):
                    continue
                raise
            if any(form.match(data) for form, _, _ in IMAGE_TYPES):
                return place, data
        return None

    def _store(
        self, legacy: LegacyJob, job: Job, images_found: List[Tuple[str, bytes]], store: JobStore, images: ImageStore
    ) -> Optional[Job]:
        """Stores what was found, and returns the job as it is then, None if it was removed. Raises OSError."""
        found = [data for _, data in images_found]
        if job.bytes and not found:
            return job
        make_folder(images.folder)
        disk = shutil.disk_usage(images.folder)
        if disk.free - sum(map(len, found)) < min(self.SPARE, disk.total // 20):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        infotexts = [text for text in map(infotext_of, found) if text is not None]
        seeds = [int(match.group(1)) for match in map(SEED.search, infotexts) if match]
        info = {"prompt": legacy.prompt, **({"seed": seeds[0]} if seeds else {}), "infotexts": infotexts}
        rest = {"images": [], "parameters": {"prompt": legacy.prompt}, "info": json.dumps(info)}
        private = images.as_private_as(place for place, _ in images_found)
        kept = private.save(job, Answer(list(map(self._as_base64, found)), as_host_json(rest)))
        notes = []
        if not legacy.paths:
            notes.append("No images of it were kept")
        elif len(found) < len(legacy.paths):
            lost = len(legacy.paths) - len(found)
            notes.append(f"{lost} of {len(legacy.paths)} images were no longer on disk when the job was taken over")
        kept = kept._replace(error=self._error(legacy, job.id, notes))
        with self.changing:
            if store.get(job.id) is None:
                images.remove(kept.files)
                return None
            written = store.put(kept)
        written.result()
        return kept

    @staticmethod
    def _as_base64(data: bytes) -> bytes:
        """Encodes piece by piece, since it holds the interpreter."""
        step = ImageStore.PIECE
        return b"".join(base64.b64encode(data[start : start + step]) for start in range(0, len(data), step))

    def _log_once(self, trouble: str) -> None:
        """Logs a trouble when it begins, not each time that it shows."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.error("%s", trouble)


# ------------------------------------------------------------------------------------------------------------------
# Tracker: a job's life
# ------------------------------------------------------------------------------------------------------------------


class Purged(NamedTuple):
    """What a purge removed."""

    jobs: int = 0
    images: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.jobs} jobs, {self.images} images, {self.bytes:,} bytes"

    def plus(self, other: "Purged") -> "Purged":
        return Purged(*(one + two for one, two in zip(self, other)))


CLOCKS_START = 1577836800  # 2020-01-01 in Unix seconds: a clock that is before was never set


class Conflict(Exception):
    """What was asked for does not go with the job's status."""


class Claim:
    """That a generation was the first with its idempotency key. Others with the key wait for what becomes of it."""

    def __init__(self, digest: str, job_id: Optional[str] = None):
        self.digest = digest  # of the request's body
        self.job_id: Future = Future()  # None: it was no job in the end
        if job_id is not None:
            self.job_id.set_result(job_id)


class Part(NamedTuple):
    """A value of a large answer, which is passed on and never read as a whole: where it lies, and its CRC."""

    start: int
    end: int  # 0: there is none
    crc: int


Progress = Optional[float]  # 0 to 1; None where unknown


class Clock:
    """Unix seconds, from now on by a clock that nobody sets: what differs by a second was a second apart."""

    def __init__(self) -> None:
        # A thread can be held up between the two readings, so the pair that lies closest together counts.
        pairs = [(time.monotonic(), time.time(), time.monotonic()) for _ in range(3)]
        before, moment, _ = min(pairs, key=lambda pair: pair[2] - pair[0])
        self._offset = moment - before

    def __call__(self) -> float:
        return self._offset + time.monotonic()


class Threads(ThreadPoolExecutor):
    """Threads for one kind of work, which so keeps back no other, and a limit to how much of it may wait."""

    def __init__(self, count: int, name: str, limit: int = 2_000):
        super().__init__(count, f"job-tracker-{name}")
        self._limit = limit
        self._unfinished = 0
        self._counting = threading.Lock()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """The result of a function that may block. Raises OSError if too much waits, or the webui is being reloaded."""
        with self._counting:
            if self._unfinished >= self._limit:
                raise OSError(errno.EAGAIN, "too many wait already")
            try:
                work = super().submit(function, *args)
            except RuntimeError:
                raise OSError(errno.EAGAIN, "the webui is being reloaded") from None
            self._unfinished += 1
        work.add_done_callback(self._finished)
        return work

    def _finished(self, _: Future) -> None:
        with self._counting:
            self._unfinished -= 1


class Tracker:
    """A job's life, and the only writer of both stores.

    `accept`, `start`, and `finish` or `fail` are called in this order, from any thread, and never raise for the disk:
    a trouble is logged and stands in the job. What the first two set is seen by `get` and by the store's queries at
    once. That a job has ended is seen by nobody before its record is on disk, so that no crash can take it back.
    """

    ORPHAN_AGE = 3600  # seconds; a younger file may belong to a job that is being stored
    PURGE_EVERY = 6 * 3600
    RECOVER_EVERY = 60  # seconds between two looks for processes that are gone, and until a failed purge is repeated
    REMOVED_AT_ONCE = 100  # jobs: a crash leaves the files of no more
    LOOK_EVERY = 5  # seconds between two looks at config.json
    PATIENCE = 10.0  # seconds that a request waits for the disk before it goes on without it, or is refused
    MOMENT = 0.5  # the same while the disk does not answer
    STORE_AGAIN = (0.5, 1, 2, 5, 10, 20, 30, 45, 60, 75)  # seconds between tries to store what may pass
    UNSTORED_LIMIT = 1 << 29  # bytes of answers that wait for the disk: more could cost the webui its memory
    SETTLE = 1.0  # seconds that storing may take before a job is shown Processing to who has its answer
    SHOWN = ("id", "type", "status", "prompt", "timestamp", "ip", "started", "finished")  # as they are

    def __init__(
        self,
        settings: Settings,
        begun: Callable[[], Any],
        progress: Callable[[Any], Progress],
        interrupt: Callable[[], None],
        dequeue: Callable[[Optional[str]], None],
    ):
        """`begun`, `progress` and `interrupt` are the host's, for the generation that has its queue lock.

        `begun` is what the host says of when its last generation began, and `progress` is given what it said when the
        job got the lock: as long as it says the same, its state is still that of the generation before. `dequeue`
        tells the host that the task with an ID of its own will not begin.
        """
        self.settings = settings
        self.begun = begun
        self.progress = progress
        self.interrupt = interrupt
        self.dequeue = dequeue
        self.predecessor = Predecessor(settings.folder, settings.data_folder)
        self.predecessor.list_jobs()
        self.store = JobStore(settings.data_folder, self.predecessor.refuse_to_open)
        self.images = ImageStore(os.path.join(settings.data_folder, "images"))
        # Threads by what they may have to wait for: who looks at jobs keeps back no answer, whatever the disk does.
        self.pool = Threads(4, "look")  # the disk, for whoever looks at jobs
        self.searchers = Threads(2, "search", limit=100)  # all prompts to be searched, which can take long
        self.key_readers = Threads(1, "key")  # the disk, for requests with an idempotency key, one after another
        self.storers = Threads(2, "store")  # the disk, to store answers on it
        self.senders = Threads(2, "send")  # nothing: what is in memory goes to clients
        self.sending: "WeakSet[Any]" = WeakSet()  # what is on its way to clients, and needs the pool for its rest
        self.watch: Callable[[], None] = lambda: None  # looks after the host, as often as for config.json
        self.next_purge: Optional[float] = None  # by time.monotonic()
        self.kept_for_clock = 0  # jobs that the last purge kept though they are old, since the clock may be wrong
        self._started, self._started_by_clock = time.monotonic(), int(time.time())
        self._storing = threading.Lock()  # around this lock: jobs go to the store in the order of their changes
        self._lock = threading.Lock()  # held for a moment, never while the store is asked: the event loop takes it
        self._running: Dict[str, Job] = {}  # jobs of this process that have not ended, in order of acceptance
        self._ended: Dict[str, Job] = {}  # those whose end is not on disk yet
        self._stored_ends: Set[str] = set()  # those of these that were given to the store
        self._clocks: Dict[str, Clock] = {}
        self._accepted: Dict[str, Future] = {}
        self._accepted_at: Dict[str, float] = {}  # by time.monotonic()
        self._cancels: Dict[str, Callable[[], None]] = {}
        self._answered: Set[str] = set()  # those whose answer is being stored
        self.stored_at = time.monotonic()  # when the last answer was stored
        self._unstored = 0  # bytes of all answers that wait to be stored
        self._waiting: Dict[str, List[Callable[[], None]]] = {}
        self._holder: Optional[str] = None  # the job that has the host's queue lock
        self._begun: Any = None  # what the host said when it got that
        self._claims: Dict[str, Claim] = {}
        self._claiming = threading.Lock()
        self._hung_look: Optional[Future] = None  # the last look for a key that took too long
        self._purging = threading.Lock()
        self._stop = threading.Event()
        self._recover()
        self._housekeeper = threading.Thread(target=self._keep_house, name="job-tracker-housekeeping", daemon=True)
        self._housekeeper.start()
        self._take_over_images()

    def _take_over_images(self) -> None:
        with contextlib.suppress(OSError):
            if self.predecessor.is_unfinished():
                arguments = (self.store, self.images, self._stop)
                threading.Thread(
                    target=self.predecessor.copy_images, args=arguments, name="job-tracker-predecessor", daemon=True
                ).start()

    # A job's way

    def reserve_id(self) -> str:
        """An ID that no job has, in any spelling. What is still being loaded is not looked at."""
        job_id = new_id()
        while self.store.knows(job_id):
            job_id = new_id()
        return job_id

    def accept(self, job: Job, cancel: Callable[[], bool]) -> Future:
        """A new job. The Future ends when it is on disk, or with OSError: then there is no job.

        `cancel` is called for a job that is to be cancelled; its generation then sees to it that the job fails, or
        returns False, since it has ended.
        """
        job = job._replace(owner=self.store.owner)
        with self._storing:
            written = self.store.put(job, new=True)
            with self._lock:
                self._running[job.id] = job
                self._clocks[job.id] = Clock()
                self._accepted[job.id] = written
                self._accepted_at[job.id] = time.monotonic()
                self._cancels[job.id] = cancel
        written.add_done_callback(lambda future: future.exception() and self._forget(job.id))
        return written

    def patience(self) -> float:
        """Seconds that a request waits for the disk now: a moment only where another has waited in vain."""
        with self._lock:
            since = [self._accepted_at[job_id] for job_id, written in self._accepted.items() if not written.done()]
            look = self._hung_look
        has_hung = (since and time.monotonic() - min(since) >= self.PATIENCE) or (look is not None and not look.done())
        return self.MOMENT if has_hung else self.PATIENCE

    def _forget(self, job_id: str) -> None:
        log.error("A generation is not tracked, since its job could not be stored")
        self._leave(job_id)

    def start(self, job_id: str) -> None:
        """The job has the queue lock: generation begins."""
        self._holder, self._begun = job_id, self.begun()
        with self._lock:
            job = self._running.get(job_id)
            if job is None or job_id in self._ended:
                return
            self._running[job_id] = job._replace(status=PROCESSING, started=self._clocks[job_id]())
        self._write_when_accepted(job_id)

    def generated(self) -> None:
        """The job that has the queue lock is about to give it back."""
        self._holder = None

    def answered(self, job_id: str) -> None:
        """The host answered, and the client may have that answer before it is stored."""
        with self._lock:
            if job_id in self._running:
                self._answered.add(job_id)

    def hold(self, size: int) -> bool:
        """Counts an answer of a size in bytes that waits to be stored. False if there is no room for it yet."""
        with self._lock:
            has_room = not self._unstored or self._unstored + size <= self.UNSTORED_LIMIT
            self._unstored += size if has_room else 0
        return has_room

    def let_go(self, size: int) -> None:
        """An answer for which there was room has been stored, or given up."""
        with self._lock:
            self._unstored -= size

    def finish(self, job_id: str, answer: Answer, prompt: str = "") -> Future:
        """The host answered with success. Stores the images; a job whose images cannot be stored has failed.

        `prompt` is the one that the host used, for a request that named none. A trouble that may pass is waited for,
        for minutes, in which the job is shown Processing and says so. The Future ends when that is over.
        """
        done = promise()

        def store_again() -> None:
            for tries, pause in enumerate(self.STORE_AGAIN, 1):
                time.sleep(pause)
                if self._try_to_finish(job_id, answer, prompt, is_last=tries == len(self.STORE_AGAIN)):
                    break
            done.set_result(None)

        if self._try_to_finish(job_id, answer, prompt, is_last=False):
            done.set_result(None)
        else:  # in a thread of its own, for there may be many
            threading.Thread(target=store_again, name="job-tracker-again", daemon=True).start()
        return done

    def _try_to_finish(self, job_id: str, answer: Answer, prompt: str, is_last: bool) -> bool:
        """False if it is worth another try."""
        job = self.running(job_id)
        if job is None:
            return True
        try:
            job = self.images.save(job, answer)
        except Exception as error:
            if isinstance(error, OSError) and passes(error) and not is_last:
                self._note(job_id, f"Generated, but the images cannot be stored yet: {reason_of(error)}")
                return False
            log.error("Job %s was generated, but its images could not be stored: %s", job_id, error)
            self.fail(job_id, f"Generated, but the images could not be stored: {reason_of(error)}")
            return True
        self.stored_at = time.monotonic()
        stored = {name: getattr(job, name) for name in ("images", "bytes", "has_brief", "ranges")}
        self._end(job_id, status=COMPLETED, prompt=job.prompt or prompt[:PROMPT_LIMIT], error=None, **stored)
        return True

    def _note(self, job_id: str, error: str) -> None:
        """Says in a job that has not ended what it waits for."""
        with self._lock:
            job = self._running.get(job_id)
            if job is None or job.error == error:
                return
            self._running[job_id] = job._replace(error=error)
        log.warning("Job %s: %s", job_id, error)
        self._write_when_accepted(job_id)

    def fail(self, job_id: str, error: str) -> None:
        """The job ends without images. `error` is for its user."""
        self._end(job_id, status=FAILED, error=error[:2000])

    def _end(self, job_id: str, **changes: Any) -> None:
        with self._lock:
            job = self._running.get(job_id)
            if job is None or job_id in self._ended:
                return
            self._ended[job_id] = job._replace(finished=self._clocks[job_id](), **changes)
        self._write_when_accepted(job_id)

    def _write_when_accepted(self, job_id: str) -> None:
        with self._lock:
            accepted = self._accepted.get(job_id)
        if accepted is not None:
            accepted.add_done_callback(lambda accepted: self._write(job_id, accepted))  # at once, when that is done

    def _write(self, job_id: str, accepted: Future) -> None:
        """Stores a job as it is by now: two changes may come here in either order, and the later stores the end."""
        with self._storing:
            with self._lock:
                shown = self._running.get(job_id)
                job = self._ended.get(job_id, shown)
                if shown is None or job_id in self._stored_ends or accepted.exception() is not None:
                    return
                if job.ended:
                    self._stored_ends.add(job_id)
            written = self.store.put(job, meanwhile=shown if job.ended else None)

        def report(written: Future) -> None:
            if written.exception() is not None:
                log.error("Job %s is %s, which could not be written: %s", job_id, job.status, written.exception())
            if job.ended:
                self._leave(job_id)

        written.add_done_callback(report)

    def _leave(self, job_id: str) -> None:
        with self._lock:
            for jobs in (
                self._running,
                self._ended,
                self._clocks,
                self._accepted,
                self._accepted_at,
                self._cancels,
            ):
                jobs.pop(job_id, None)
            for ids in (self._answered, self._stored_ends):
                ids.discard(job_id)
            waiting = self._waiting.pop(job_id, [])
        for wake in waiting:
            wake()

    # Looking at jobs

    async def in_pool(self, function: Callable[..., Any], *args: Any, pool: Optional[Threads] = None) -> Any:
        """Runs a function that may block in a thread of the tracker's own. Raises OSError, also as `Threads.submit`.

        What nobody waits for any more runs all the same: it would stay in the queue, and would not be counted.
        """
        return await asyncio.shield(asyncio.wrap_future((pool or self.pool).submit(function, *args)))

    def pool_for(self, job: Optional[Job]) -> Threads:
        """Threads for work on a job: where it has not ended, that needs no disk, and is not to wait for one."""
        return self.pool if job is None or job.ended else self.senders

    def running(self, job_id: str) -> Optional[Job]:
        """A job of this process that has not ended, None for any other. Waits for nothing."""
        with self._lock:
            return self._running.get(job_id)

    async def find(self, job_id: str) -> Optional[Job]:
        """The same as `get`, for the event loop. A job of this process that has not ended is found at once."""
        return self.running(job_id) or await self.in_pool(self.get, job_id)

    def get(self, job_id: str) -> Optional[Job]:
        """A job as it is now, None if there is none. Raises OSError."""
        return self.running(job_id) or self.store.get(job_id)

    def position(self, job_id: str) -> Optional[int]:
        """Where a Pending job stands in the queue, 1 is next. None for any other, or one of another process."""
        with self._lock:
            pending = [job.id for job in self._running.values() if job.status == PENDING]
        return pending.index(job_id) + 1 if job_id in pending else None

    def progress_of(self, job: Job) -> Tuple[Progress, Optional[float]]:
        """How far a Processing job is, by the host's state, never that of another generation, and the seconds left."""
        if job.status != PROCESSING or job.owner != self.store.owner:
            return None, None
        progress, seconds = self.progress(self._begun), self.seconds(job)
        if self._holder != job.id:  # it gave the lock back, and is stored by now or soon
            return 1.0, 0.0
        return progress, round(seconds / progress - seconds, 3) if progress and seconds is not None else None

    def seconds(self, job: Job) -> Optional[float]:
        """How long the generation of a job took, or has taken until now. None where nobody knows."""
        with self._lock:
            clock = self._clocks.get(job.id)
        until = clock() if clock is not None and not job.ended else job.finished
        return None if job.started is None or until is None else max(until - job.started, 0.0)

    async def wait(self, job_id: str, seconds: float) -> None:
        """Returns when a job has ended or is unknown, or after some seconds. Holds no thread."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended.set)

        with self._lock:
            own = job_id in self._running
            if own:
                self._waiting.setdefault(job_id, []).append(wake)
        until = loop.time() + seconds
        try:
            while not ended.is_set() and loop.time() < until:
                if not own:  # another process on the same folder may have it
                    job = await self.in_pool(self.get, job_id)
                    if job is None or job.ended:
                        return
                left = until - loop.time()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(ended.wait(), left if own else min(left, 0.5))
        finally:
            with self._lock, contextlib.suppress(KeyError, ValueError):
                self._waiting[job_id].remove(wake)
                if not self._waiting[job_id]:
                    del self._waiting[job_id]

    async def settle(self, job_id: str) -> None:
        """Waits a moment for a job whose end is being stored: who has its answer is to see it ended. Does not raise."""
        with self._lock:
            ending = job_id in self._answered or job_id in self._ended
        if ending:
            await self.wait(job_id, self.SETTLE)

    def describe(self, job: Job, whole: bool = False) -> Dict[str, Any]:
        """A job as the API shows it, without its images. Reads the file with the answer.

        Unless it is to be `whole`, `parameters` are brief, nor are others read from disk. What is large is a `Part`.
        """
        parameters = info = None
        error = job.error
        with self._lock:
            if job.id in self._ended and self.store.trouble:
                error = f"The job has ended, but that could not be stored yet: {self.store.trouble}"
        if job.status == COMPLETED:
            try:
                parameters, info = self._read_answer(job, whole)
            except (OSError, ValueError, AttributeError, RecursionError) as failure:
                passing = isinstance(failure, OSError) and passes(failure)
                error = error or "The parameters " + (
                    f"cannot be read: {reason_of(failure)}" if passing else "are no longer on disk"
                )
        progress, eta = self.progress_of(job)
        return {
            **{name: getattr(job, name) for name in self.SHOWN},
            "error": error,
            "queue_position": self.position(job.id),
            "progress": progress,
            "eta": eta,
            "parameters": parameters,
            "info": info,
            "image_count": len(job.images),
        }

    def _read_answer(self, job: Job, whole: bool) -> Tuple[Any, Any]:
        """`parameters` and `info` of a Completed job. Raises OSError, ValueError, AttributeError, RecursionError."""
        if job.ranges:
            parameters, info = Part(*job.ranges[:3]), Part(*job.ranges[3:6])
            return (
                self._look_at(job, parameters) if whole else self._brief_parameters(job),
                self._look_at(job, info) if info.end - info.start > LARGE else self._read_part(job, info),
            )
        answer = self._read_json(job.answer if whole else job.brief_answer)
        parameters = answer.get("parameters")
        return parameters if whole else brief_parameters(parameters)[0], answer.get("info")

    def _look_at(self, job: Job, part: Part) -> Optional[Part]:
        """A part that is to be passed on, if it is there and as it was stored."""
        if not part.end:
            return None
        self.images.check(job.answer, part.crc, part.start, part.end)
        return part

    def _read_part(self, job: Job, part: Part) -> Any:
        return self._read_json(job.answer, part) if part.end else None

    def _read_json(self, name: str, part: Optional[Part] = None) -> Any:
        """A file, or a part of one if that is as it was stored."""
        start, end = part[:2] if part else (0, None)
        data = b"".join(self.images.read(name, start, end))
        if part and zlib.crc32(data) != part.crc:
            raise self.images.damaged(name)
        return DECODER.decode(data.decode())

    def _brief_parameters(self, job: Job) -> Any:
        """Those of a large answer."""
        if not job.has_brief:
            return self._read_part(job, Part(*job.ranges[:3]))
        return self._read_json(job.brief_answer).get("parameters")

    def _known_parameters(self, job: Job) -> Any:
        """The same where they have what lies at their top, else all of them."""
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            parameters = self._brief_parameters(job)
            if isinstance(parameters, dict):
                return parameters
        return self._read_part(job, Part(*job.ranges[:3]))

    def as_json(self, job: Job, images: bool = True) -> Iterator[bytes]:
        """A job as the API shows it, a piece at a time. Raises OSError, before a piece or at one.

        Without its images, its `parameters` are brief.
        """
        there = [self.images.size(name) is not None for name in job.images] if images else []
        description = self.describe(job, whole=images)
        if not all(there):
            description["error"] = f"{there.count(False)} of {len(there)} images are no longer on disk"
        parts = {name: value for name, value in description.items() if isinstance(value, Part)}

        def pieces() -> Iterator[bytes]:
            known = as_json({name: value for name, value in description.items() if name not in parts})[:-1]
            for start in range(0, len(known), self.images.PIECE):
                yield known[start : start + self.images.PIECE]
            for name, part in parts.items():
                yield b',"%s":' % name.encode()
                yield from self.images.read(job.answer, part.start, part.end)
            if images:
                yield b',"images":['
                yield from self._images_as_json(job, needed=False)
                yield b"]"
            yield b"}"

        return pieces()

    def answer_as_json(self, job: Job) -> Iterator[bytes]:
        """What the host answered, once more, a piece at a time. Raises OSError."""
        if job.ranges:
            self.images.check(job.answer, job.ranges[6])
        with contextlib.closing(self.images.read(job.answer)) as pieces:
            try:
                rest = next(pieces, b"") if job.ranges else b"".join(pieces)
                parameters = self._known_parameters(job) if job.ranges else parameters_of(rest)
                wanted = not isinstance(parameters, dict) or parameters.get("send_images", True)
                start = IMAGES_START.match(rest).end()
            except (ValueError, AttributeError, RecursionError):
                raise OSError(errno.EIO, "the stored answer is damaged", job.answer) from None
            yield rest[:start]
            if wanted:
                yield from self._images_as_json(job, needed=True)
            yield rest[start:]
            yield from pieces

    def _images_as_json(self, job: Job, needed: bool) -> Iterator[bytes]:
        """An image that is not there is null, or OSError if it is needed or the trouble passes."""
        for number, name in enumerate(job.images):
            if number:
                yield b","
            pieces = self.images.read_as_json(name)
            try:
                first = next(pieces)
            except OSError as error:
                if needed or passes(error):
                    raise
                first = b"null"
            yield first
            yield from pieces

    # Idempotency

    def claim(self, key: str, digest: str) -> Tuple[Claim, bool]:
        """Who was first with a key, and whether that is the caller, who then must `release` the claim at its end.

        A Failed job frees its key, also while its generation still waits in the queue. Raises OSError, also when the
        disk says nothing for `PATIENCE` seconds.
        """
        self._wait_for_disk(lambda seconds: self._claiming.acquire(timeout=seconds))
        try:
            claim = self._claims.get(key)
            if claim is not None and not claim.job_id.done():
                return claim, False
            looking = self.key_readers.submit(self._with_key, key, claim)
            try:
                self._wait_for_disk(lambda seconds: bool(wait_for_futures([looking], timeout=seconds).done))
            except OSError:
                if not looking.cancel():
                    self._hung_look = looking
                raise
            kept = looking.result()
            if kept is not None:
                return kept, False
            claim = self._claims[key] = Claim(digest)
            return claim, True
        finally:
            self._claiming.release()

    def _wait_for_disk(self, succeeds_within: Callable[[float], bool]) -> None:
        """Waits for something. Raises OSError if the disk does nothing meanwhile: a long jobs.json is being read."""
        seen = self.store.progress
        while not succeeds_within(self.patience()):
            before, seen = seen, self.store.progress
            if seen == before:
                raise OSError(errno.ETIMEDOUT, "the disk does not answer")

    def _with_key(self, key: str, claim: Optional[Claim]) -> Optional[Claim]:
        """The job that has a key, as a claim; `claim` is that of this process, which came to be a job."""
        if claim is not None and not self._is_free(claim.job_id.result()):
            return claim
        job = self.store.with_key(key)
        if job is not None and not job.ended and job.owner != self.store.owner:
            self._recover().result()  # the webui that had it may be gone
        return None if job is None or self._is_free(job.id) else Claim(job.digest or "", job.id)

    def _is_free(self, job_id: Optional[str]) -> bool:
        """Whether the key of a job can be used anew."""
        job = None if job_id is None else self.get(job_id)
        return job is None or job.status == FAILED

    def release(self, key: str, claim: Claim) -> None:
        """The generation of a claim has ended, as a job or as none."""
        with self._lock:
            if self._claims.get(key) is claim:
                del self._claims[key]
        if not claim.job_id.done():
            claim.job_id.set_result(None)

    # The end of jobs

    def cancel(self, job_id: str) -> bool:
        """Takes a job out of the queue or interrupts it. False if there is none. Raises Conflict, OSError.

        A Pending job fails at once, and is shown so when that is on disk. A Processing one fails when the host has
        stopped it.
        """
        with self._lock:
            cancel = self._cancels.get(job_id)
        if cancel is not None:
            if not cancel():
                raise Conflict("The generation has ended, and is being stored")
            return True
        job = self.get(job_id)
        if job is None:
            return False
        raise Conflict(f"The job is {job.status}" if job.ended else "The job belongs to another webui on this folder")

    def delete(self, job_id: str) -> bool:
        """Removes a job that has ended and its files. False if there is none. Raises Conflict, OSError."""
        job = self.get(job_id)
        if job is None:
            return False
        if not job.ended:
            raise Conflict(f"The job is {job.status}")
        self._remove([job])
        return True

    def _remove(self, jobs: List[Job]) -> Purged:
        if not jobs:
            return Purged()
        with self.predecessor.changing:  # an image of these may have been copied since
            jobs = [self.store.get(job.id) or job for job in jobs]
            removed = self.store.remove([job.id for job in jobs])
        removed.result()
        freed = self.images.remove(name for job in jobs for name in job.files)
        return Purged(len(jobs), sum(len(job.images) for job in jobs), freed)

    def purge(self, asked_for: bool = True) -> Purged:
        """Removes the jobs that are older than the retention, with their files, and files that no job names.

        Files of many jobs that the store does not know are kept: then it has been lost. A purge that nobody asked for
        removes nothing by a clock that may be wrong. One purge at a time; a second caller waits. Raises OSError.
        """
        with self._purging:
            purged = Purged()
            days, now = self.settings.retention_days, time.time()
            if self.settings.is_unsure and not asked_for:
                days = None
            expired = [] if days is None else self.store.expired(now - days * 86400)
            self.kept_for_clock = 0
            if not asked_for:
                if now < CLOCKS_START:
                    log.warning("The clock says %s, so nothing is purged", time.strftime("%Y-%m-%d", time.gmtime(now)))
                    return purged
                expired = self._without_doubtful(expired, now, days)
            for start in range(0, len(expired), self.REMOVED_AT_ONCE):
                if self._stop.is_set():
                    break
                self.settings.refresh()  # this may take minutes
                if days is not None and self.settings.retention_days != days:
                    break  # what is too old is another question now
                jobs = [self.store.get(job_id) for job_id in expired[start : start + self.REMOVED_AT_ONCE]]
                purged = purged.plus(self._remove([job for job in jobs if job is not None and job.ended]))
            if asked_for or not self.kept_for_clock:
                purged = purged.plus(self._remove_orphans())
            if any(purged):
                log.info("Purge: removed %s", purged)
            return purged

    def _without_doubtful(self, expired: List[str], now: float, days: Optional[float]) -> List[str]:
        """Leaves out the jobs from before this start, if all of them were too old by then: is the clock ahead?

        Those that grow too old while this process lives do so by a clock that nobody sets.
        """
        started = int(now - (time.monotonic() - self._started))  # as whole as the times of jobs
        if not expired or self.store.query(Filter(after=started - days * 86400 - 1, before=started), 1).jobs:
            return expired
        young = self.store.expired(now - days * 86400, after=started - 1)
        newest = self.store.query(Filter(before=min(started, self._started_by_clock)), 1).jobs
        if newest:  # what was too old by its time already goes: who starts a webui now and then has a retention, too
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
        orphans, unknown = [], set()
        for name in self.images.older_than(time.time() - self.ORPHAN_AGE):
            job_id = os.path.basename(name)[:8]
            job = self.get(job_id)
            if job is None:
                unknown.add(job_id)
            if job is None or (job.ended and name not in job.files):
                orphans.append((job_id, name))
        kept = self.store.set_aside_ids() if orphans else None  # records that somebody may read yet
        if kept is None:
            return Purged()
        if len(unknown) > self.REMOVED_AT_ONCE:
            log.warning("%d jobs in images/ are not in jobs.json. Is it whole? Their files are kept", len(unknown))
            kept |= unknown
        orphans = [name for job_id, name in orphans if job_id not in kept]
        images = sum(not name.endswith((".json", ".part")) for name in orphans)
        return Purged(0, images, self.images.remove(orphans))

    def _keep_house(self) -> None:
        purge_at = time.monotonic()
        recover_at = purge_at + self.RECOVER_EVERY
        trouble = ""
        while True:
            now = time.monotonic()
            try:
                self.settings.refresh()
                self.watch()
                if now >= recover_at:
                    recover_at = now + self.RECOVER_EVERY
                    self._recover().result()
                    trouble = ""
                if now >= purge_at:
                    purge_at = now + self.RECOVER_EVERY
                    self.purge(asked_for=False)
                    self.next_purge = purge_at = now + self.PURGE_EVERY
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                if text != trouble:  # it may last for days
                    log.error("Housekeeping will be tried again: %s", text)
                trouble = text
            if self._stop.wait(self.LOOK_EVERY):
                return

    def _recover(self) -> Future:
        return self.store.recover(self._end_left)

    def _end_left(self, job: Job) -> Job:
        """How a job ends that a webui left behind. Nobody knows when it did. Raises OSError if it cannot be told."""
        found = self.images.find(job)
        if found is None:
            return job._replace(status=FAILED, error="The webui ended before the generation did")
        prompt = job.prompt
        with contextlib.suppress(ValueError, RecursionError):
            prompt = prompt or str(parameters_of(b"".join(self.images.read(job.answer))).get("prompt", ""))
        return found._replace(status=COMPLETED, prompt=prompt[:PROMPT_LIMIT], error=None)

    def close(self) -> Future:
        """Ends the housekeeping, and the rest when the last running job has ended and the last answer is sent.

        Does not wait for that: where Reload UI does not wait for clients either, as on Forge, they get their answers.
        The Future ends when all of it has ended and the store is closed.
        """
        self._stop.set()
        closed = promise()

        def drain() -> None:
            self._housekeeper.join()
            while self._running or self.sending:
                time.sleep(0.2)
            self.store.close()
            for pool in (self.pool, self.searchers, self.key_readers, self.storers, self.senders):
                pool.shutdown(wait=False)
            closed.set_result(None)

        threading.Thread(target=drain, name="job-tracker-end", daemon=True).start()
        return closed


# ------------------------------------------------------------------------------------------------------------------
# Middleware: the ASGI side of one generation request
# ------------------------------------------------------------------------------------------------------------------

Scope = Dict[str, Any]
Message = Dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Message], Any]
App = Callable[[Scope, Receive, Send], Any]

JOB_HEADER = "X-Job-ID"
HEARTBEAT = 15.0  # seconds between two bytes of white space
SENDING = 0.1  # seconds that an answer may take to be sent before its images are stored meanwhile
UNTOLD = 60.0  # seconds that an answer waits for a disk that has not taken its job yet
GRACE = 0.02  # seconds in which a generation that has just begun may still fail with the host's own answer
PIECE = 1 << 19  # bytes of an answer that are sent at a time
IDEMPOTENCY_KEY_LIMIT = 255  # characters
CANCELLED = "Cancelled"
SPARE_THREADS = 1000  # the most worker threads that are lent to the host

current: "contextvars.ContextVar[Optional[Generation]]" = contextvars.ContextVar("job_tracker_current", default=None)


def header_of(scope: Scope, name: bytes) -> str:
    """A request header, its fields joined as in RFC 9110, 5.3; empty if there is none."""
    return ", ".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


def path_of(scope: Scope) -> str:
    """The path as the client sent it: with the prefix that a proxy took away, which servers add or do not."""
    root, path = scope.get("root_path", ""), scope["path"]
    return path if path.startswith(root + "/") else root + path


DEFAULT_PORTS = {"http": 80, "https": 443}
LOOPBACK = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|\[::1\]")
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^][\s/:@?#,]+)(?::([0-9]{0,5}))?")


def parse_authority(text: str, scheme: str) -> Optional[Tuple[str, int]]:
    """Host and port by RFC 3986, 3.2, the port of the scheme where none is said; None for what is invalid."""
    form = AUTHORITY.fullmatch(text.strip().lower())
    return (form.group(1), int(form.group(2) or DEFAULT_PORTS[scheme])) if form else None


def is_foreign(scope: Scope, is_named: Callable[[str], bool]) -> bool:
    """Whether a browser says that a request comes from a page of another origin, and of one that is not named.

    Browsers send `Sec-Fetch-Site` (W3C, Fetch Metadata, 2.4) over HTTPS and to loopback addresses, and no page can set
    it. Elsewhere `Origin` (RFC 6454, 7; Fetch, 3.2) must be that of the host that the browser asked for. This stands in
    `Host` or, where a proxy on this machine has changed that, in `X-Forwarded-Host`. That is not believed elsewhere: a
    page can send it, too, once gradio has allowed it to, which it does while the webui starts. Programs send neither
    `Origin` nor `Sec-Fetch-Site`, and are never foreign.
    """
    origin, site = header_of(scope, b"origin"), header_of(scope, b"sec-fetch-site")
    if origin and is_named(origin):
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

    def __init__(self, is_named: Callable[[str], bool]):
        """`is_named` says whether the webui's options name an origin."""
        self.is_named = is_named
        self._silent_until = -math.inf
        self._unsaid = 0

    def refuses(self, scope: Scope, action: str) -> bool:
        if not is_foreign(scope, self.is_named):
            return False
        self.warn(f"A page of {one_line(header_of(scope, b'origin') or 'another origin')}", action)
        return True

    def warn(self, who: str, action: str) -> None:
        if time.monotonic() < self._silent_until:
            self._unsaid += 1
            return
        more = f", and {self._unsaid:,} other calls since the last such line" if self._unsaid else ""
        log.warning("%s tried to %s, and was refused%s", who, action, more)
        self._silent_until, self._unsaid = time.monotonic() + self.SILENCE, 0


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
        with contextlib.suppress(ValueError):
            return base64.b64decode(credentials).partition(b":")[0].hex()
    return header


# A quote without an end reaches to the end: otherwise each further quote would be looked for there, too.
PREFERENCE = re.compile(r'(?:"(?:\\.|[^"\\])*(?:"|\\?\Z)|[^",])+')


def preferences_of(scope: Scope) -> Dict[str, str]:
    """The preferences of RFC 7240, 2, without their parameters: name in small letters -> value. The first counts."""
    preferences: Dict[str, str] = {}
    for preference in PREFERENCE.findall(header_of(scope, b"prefer")):
        name, _, value = preference.partition(";")[0].partition("=")
        preferences.setdefault(name.strip().lower(), value.strip().strip('"'))
    return preferences


class Preference(NamedTuple):
    """What a client prefers to waiting for its answer, by RFC 7240, 4.1 and 4.3."""

    respond_async: bool = False
    wait: Optional[int] = None  # seconds that it waits all the same

    LIMIT = 300

    @classmethod
    def of(cls, scope: Scope) -> "Preference":
        preferences = preferences_of(scope)
        if preferences.get("respond-async") != "":
            return cls()
        wait = preferences.get("wait", "")
        return cls(True, min(int(wait), cls.LIMIT) if re.match(r"[0-9]{1,9}\Z", wait) else None)

    def applied(self, respond_async: bool) -> bytes:
        """The content of `Preference-Applied`."""
        waited = [] if self.wait is None else [f"wait={self.wait}"]
        return ", ".join([*(["respond-async"] if respond_async else []), *waited]).encode()


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


def exposed(names: Iterable[str]) -> Dict[str, str]:
    """The header by which the Fetch standard lets pages of other origins read our headers, of an answer with some."""
    carried = {name.lower() for name in names}
    own = [name for name in OWN_HEADERS if name.lower() in carried]
    return {"Access-Control-Expose-Headers": ", ".join(own)} if own else {}


class Gzip:
    """Gzip for base64: it has nothing that repeats, so Huffman codes alone do as well, at a fifth of the time."""

    def __init__(self, level: int = 1) -> None:
        """Level 0 packs without compressing."""
        self._stream = zlib.compressobj(level, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)

    def encode(self, data: bytes, last: bool = False) -> bytes:
        """Encodes so that the other side can decode all of it at once."""
        return self._stream.compress(data) + self._stream.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)

    def encode_all(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield self.encode(piece)
        yield self.encode(b"", last=True)


def copy_of(message: Message) -> Message:
    """For whoever is given a message, or a scope, that is read again: the host's layers change what they are given."""
    return {**message, "headers": list(message["headers"])} if "headers" in message else dict(message)


def giving(body: List[Message]) -> Receive:
    """A `receive` that gives the body once, and after it never says that the client left."""

    async def receive() -> Message:
        if not body:
            await asyncio.get_running_loop().create_future()
        return copy_of(body.pop(0))

    return receive


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def in_pieces(data: bytes) -> Iterator[bytes]:
    return (data[position : position + PIECE] for position in range(0, len(data), PIECE))


class FromPool:
    """What a generator makes, a piece or more at a time, made in a thread of one of the tracker's pools."""

    def __init__(self, tracker: Tracker, pieces: Iterator[bytes], pool: Optional[Threads] = None):
        self._tracker = tracker
        self._pool = pool or tracker.pool
        self._pieces = pieces
        self._making: "Future[bytes]" = Future()
        self._making.set_result(b"")
        self._begun = b""
        self._ended = False
        tracker.sending.add(self)

    def __aiter__(self) -> "FromPool":
        return self

    async def begin(self) -> None:
        """Makes the first piece before anything is sent, so that trouble with it still has a status of its own."""
        try:
            self._begun = await self.__anext__()
        except StopAsyncIteration:
            pass
        except BaseException:
            self.close()
            raise

    async def __anext__(self) -> bytes:
        if self._begun:
            begun, self._begun = self._begun, b""
            return begun
        if not self._ended:
            self._making = self._pool.submit(self._make)
            made = await asyncio.wrap_future(self._making)
            if made:
                return made
        raise StopAsyncIteration

    def _make(self) -> bytes:
        """Small pieces together, for each way to a thread and back takes time."""
        made, size = [], 0
        for piece in self._pieces:
            made.append(piece)
            size += len(piece)
            if size >= PIECE:
                break
        else:
            self._ended = True
        return b"".join(made)

    def close(self) -> None:
        """Ends the generator, and so closes its file, as soon as no thread is in it. Waits for nothing."""
        self._tracker.sending.discard(self)
        self._making.add_done_callback(lambda _: self._close_in_thread())

    def _close_in_thread(self) -> None:
        if self._ended:
            return
        try:
            self._pool.submit(self._pieces.close)  # which waits for a disk that does not answer
        except OSError:
            threading.Thread(target=self._pieces.close, name="job-tracker-close", daemon=True).start()


def one_line(text: str) -> str:
    """Text from outside in a form that cannot forge a line of the log."""
    return text[:200].encode("unicode_escape").decode("ascii")


def traceback_of(error: BaseException) -> str:
    """The host's part of a traceback, each line of it indented, so that none can be taken for another of the log."""
    text = "".join(traceback.format_exception(type(error), error, without_this_file(error.__traceback__)))
    return textwrap.indent(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.rstrip()), "    ", lambda _: True)


class Valve:
    """Put into the scope by the shell. Once cut, nothing of the response passes; `work` outlives the response."""

    def __init__(self) -> None:
        self.cut = False
        self.headers: List[Tuple[bytes, bytes]] = []  # which the response's head gets besides
        self.error_headers: List[Tuple[bytes, bytes]] = []  # the same if it is an error: the host drops an exception's
        self.work: Optional["asyncio.Task[None]"] = None
        self.refusal: Optional[str] = None  # the detail of a 403 that is sent in the response's place


async def send_refusal(send: Send, detail: str, headers: Iterable[Tuple[bytes, bytes]] = ()) -> None:
    """A whole response. `headers` are of the one that it stands for, and stay unless they tell of its content."""
    content = as_json({"detail": detail, "error": detail})  # the latter is what gradio's page shows
    kept = [(name, value) for name, value in headers if not name.lower().startswith(b"content-")]
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": 403, "headers": [*kept, *own]})
    await send({"type": "http.response.body", "body": content})


class Shell:
    """The outermost layer around the host: cuts connections, and keeps the server alive for jobs without a client.

    Whatever the layers between do to end a response, nothing passes once its valve is cut, and the connection of a
    response without an end is closed. A server that stops waits for its requests, and so for their jobs.
    """

    KEY = "job_tracker.valve"
    CLOSING = 5.0  # seconds that a client may take to read the rest, before its connection is dropped

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        valve = scope[self.KEY] = Valve()
        cycle = getattr(send, "__self__", None)  # uvicorn's, of this request
        if scope.get("http_version") == "1.0":
            send = without_chunks(send, cycle)
        asked = header_of(scope, b"access-control-request-headers").lower()
        if scope["method"] == "OPTIONS" and "x-forwarded-host" in asked:
            # Only proxies say this, and `is_foreign` believes it. gradio 4 would let any page say it.
            await send_refusal(send, OriginGuard.REFUSAL)
            return

        async def pass_on(message: Message) -> None:
            if valve.refusal is not None:
                if message["type"] == "http.response.start":
                    await send_refusal(send, valve.refusal, message["headers"])
                return
            if message["type"] == "http.response.start":
                more = [*valve.headers, *(valve.error_headers if message["status"] >= 400 else [])]
                message = {**message, "headers": [*message["headers"], *more]} if more else message
            if not valve.cut:
                await send(message)

        try:
            await self.app(scope, receive, pass_on)
        except Exception:
            if not valve.cut:
                raise
        finally:
            if valve.cut:
                await self._abort(scope, receive, cycle)
            elif valve.work is not None:
                await asyncio.wait({valve.work})

    async def _abort(self, scope: Scope, receive: Receive, cycle: Any) -> None:
        """Closes the connection. A server that we do not know does that itself, and complains in its log."""
        transport = getattr(cycle, "transport", None)
        if transport is None:
            return
        if scope.get("http_version") == "1.0":  # to which a closed connection is the clean end: only a reset is not
            with contextlib.suppress(OSError):
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            transport.abort()  # a close would end TLS in good order, and that is a clean end, too
        else:
            transport.close()
        try:
            await asyncio.wait_for(until_gone(receive), self.CLOSING)
        except asyncio.TimeoutError:
            transport.abort()
        cycle.disconnected = True  # or uvicorn, which may not have noticed yet, complains of a response without an end


def without_chunks(send: Send, cycle: Any) -> Send:
    """A server's `send` for a client of HTTP/1.0, which knows no chunks: RFC 9112, 6.1 forbids to send it any.

    With httptools, uvicorn sends them all the same where the head has no Content-Length. Its `cycle` is led to believe
    that each piece has the length that was promised.
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


class ObservedLock:
    """Stands for the host's queue lock and tells the current generation that it asks for it, has it, and is done.

    The order of the lock is its own. Whoever is no tracked generation passes unseen.
    """

    def __init__(self, lock: Any):
        self._lock = lock

    def acquire(self, *args: Any, **kwargs: Any) -> Any:
        generation = current.get()
        if generation is not None:
            generation.asked()
        got = self._lock.acquire(*args, **kwargs)
        if generation is not None and got is not False:
            try:
                generation.got()
            except BaseException:
                self._lock.release()
                raise
        return got

    def release(self) -> None:
        generation = current.get()
        try:
            if generation is not None:
                generation.released()
        finally:
            self._lock.release()

    def __enter__(self) -> Any:
        return self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


def harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """For our code on the host's thread: what goes wrong in it is logged, and the generation goes on."""

    def guarded(self: "Generation", *args: Any) -> None:
        try:
            hook(self, *args)
        except Exception:
            log.exception("Job Tracker failed in %s, the generation goes on", hook.__name__)

    return guarded


@contextlib.contextmanager
def lent_thread() -> Iterator[bool]:
    """Gives the host one worker thread more, unless it has too many already. In the event loop only.

    A generation holds a thread for as long as it waits in the queue: 40 of them would leave none for anybody else.
    """
    limiter = anyio.to_thread.current_default_thread_limiter()
    lent = limiter.total_tokens < 40 + SPARE_THREADS
    limiter.total_tokens += lent
    try:
        yield lent
    finally:
        limiter.total_tokens -= lent


class Middleware:
    """Wraps the application of one generation route of the host."""

    def __init__(self, app: App, type_: str, tracker: Tracker):
        self.app = app
        self.type = type_
        self.tracker = tracker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.tracker.settings.enabled or Shell.KEY not in scope:  # as for what came before the shell was there
            await self.app(scope, receive, send)
            return
        try:
            await Exchange(self, scope, receive, send).serve()
        except Exception as error:
            raise error.with_traceback(without_this_file(error.__traceback__))


def without_this_file(frames: Optional[TracebackType]) -> Optional[TracebackType]:
    """A traceback without our frames, which say nothing of a failed generation: SD.Next reads a file for each."""
    kept, rest = [], None
    while frames is not None:
        if frames.tb_frame.f_code.co_filename != without_this_file.__code__.co_filename:
            kept.append(frames)
        frames = frames.tb_next
    for one in reversed(kept):
        rest = TracebackType(rest, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return rest


class Repeat(Exception):
    """Ends a host's route: another generation has the same idempotency key."""

    def __init__(self, claim: Claim):
        super().__init__("repeat")
        self.claim = claim


class Cancelled(Exception):
    """Ends a host's route whose job was cancelled before it got the queue lock."""


class Generation:
    """One generation request: the client on one side, on the other the host's route in a task of its own."""

    tasks: Set["asyncio.Task[None]"] = set()  # asyncio holds its tasks only weakly

    def __init__(self, middleware: Middleware, scope: Scope, body: List[Message]):
        self.app = middleware.app
        self.type = middleware.type
        self.tracker = middleware.tracker
        self.scope = scope
        self.body = body
        self.loop = asyncio.get_running_loop()
        self.accepted: "asyncio.Future[bool]" = self.loop.create_future()  # whether the job is on disk
        self.answered: "asyncio.Future[None]" = self.loop.create_future()  # the client need not wait any longer
        self.served: "asyncio.Future[None]" = self.loop.create_future()  # it has its answer, or is gone
        self.job: Optional[Job] = None  # as it was accepted
        self.asked_at = 0.0  # when it asked for the queue lock, by time.monotonic()
        self.has_thread = False  # of its own, to wait for the lock in
        self.claim: Optional[Claim] = None
        self.key: Optional[str] = None
        self.request: Any = None  # the host's own view of the body
        self.reserved_id: Optional[str] = None
        self.hide_images = False  # the client sent send_images: false
        self.messages: List[Message] = []  # what the host answered
        self.error: Optional[BaseException] = None  # or what it raised
        self.followed = False  # the client is told of the job, whatever comes of it
        self.passed_on = False  # it gets what the host answered as if we were not there
        self.storing: Optional[Future] = None  # how it ended
        self._reading = threading.Lock()  # guards this one
        self._answer: Optional[Answer] = None  # what the host answered, once it was read
        self._state = threading.Lock()  # guards what follows
        self.lock: Optional[str] = None  # the host's queue lock is "held", then "released"
        self.cancelled = False
        self.ended = False  # too late to be cancelled

    # On the host's worker thread

    def called(self, arguments: Dict[str, Any]) -> None:
        """The host has checked credentials and body, and its endpoint is about to run. Raises what is to end it."""
        if any(name == b"idempotency-key" for name, _ in self.scope["headers"]):
            self._claim(header_of(self.scope, b"idempotency-key"))
        if not self.has_thread:
            self.scope[Shell.KEY].error_headers = [(b"retry-after", b"60")]  # the host drops those of an exception
            raise HTTPException(429, f"{SPARE_THREADS:,} generations wait already")
        self._look_at(arguments)

    def _claim(self, key: str) -> None:
        if not 1 <= len(key) <= IDEMPOTENCY_KEY_LIMIT:
            raise HTTPException(422, f"Idempotency-Key must have 1 to {IDEMPOTENCY_KEY_LIMIT} characters")
        digest = hashlib.sha256()
        for message in self.body:
            digest.update(message.get("body", b""))
        self.key = hashlib.sha256(json.dumps([key, user_of(self.scope), self.type]).encode()).hexdigest()[:32]
        try:
            claim, first = self.tracker.claim(self.key, digest.hexdigest())
        except OSError as error:
            reason = f"The jobs cannot be read, so a repeat cannot be told: {reason_of(error)}"
            raise HTTPException(503, reason) from None
        if first:
            self.claim = claim
        elif claim.digest != digest.hexdigest():
            raise HTTPException(422, "Idempotency-Key was used with another body")
        else:
            raise Repeat(claim)

    @harmless
    def _look_at(self, arguments: Dict[str, Any]) -> None:
        self.request = next((value for value in arguments.values() if hasattr(value, "prompt")), None)
        if getattr(self.request, "send_images", True) is False:
            self.request.send_images = self.hide_images = True
        self.reserved_id = self.tracker.reserve_id()
        if not getattr(self.request, "force_task_id", True):
            self.request.force_task_id = self.reserved_id  # the host's /internal/progress answers for the job's ID

    @harmless
    def asked(self) -> None:
        """The host's route asks for the queue lock: that makes it a job."""
        if self.job is not None:
            return
        try:
            prompt = getattr(self.request, "prompt", "")
            client = self.scope.get("client")
            job = Job(
                id=self.reserved_id or self.tracker.reserve_id(),
                type=self.type,
                status=PENDING,
                timestamp=int(time.time()),
                ip=client[0][:IP_LIMIT] if client else None,
                prompt=prompt[:PROMPT_LIMIT] if isinstance(prompt, str) else "",
                key=self.key,
                digest=self.claim.digest if self.claim else None,
            )
            self.job, self.asked_at = job, time.monotonic()
            written = self.tracker.accept(job, self.cancel)
            self.body.clear()  # the host has read it, and it may be large
        except Exception:
            self._in_loop(self._accept, False)
            raise
        written.add_done_callback(lambda future: self._in_loop(self._accept, future.exception() is None))

    def got(self) -> None:
        """The route has the queue lock. Raises Cancelled if it is to give it back at once."""
        with self._state:
            if self.cancelled:
                raise Cancelled
            self.lock = "held"
        self._start()

    @harmless
    def _start(self) -> None:
        if self.job is not None:
            self.tracker.start(self.job.id)

    def released(self) -> None:
        with self._state:
            self.lock = "released"
        self.tracker.generated()

    # On any thread

    def cancel(self) -> bool:
        """Fails the job now if it waits, or when the host has stopped it if it runs. False if that has ended."""
        with self._state:
            if self.cancelled or self.ended:
                return self.cancelled
            self.cancelled = True
            waiting = self.lock is None
        log.info("Job %s was cancelled", self.job.id)
        if waiting:
            self.tracker.dequeue(getattr(self.request, "force_task_id", None))
            self.tracker.fail(self.job.id, CANCELLED)
            self._in_loop(self._end)
        else:
            self._in_loop(self._interrupt)
        return True

    def _interrupt(self) -> None:
        """Interrupts the host again and again, for a generation resets the mark when it begins."""
        with self._state:
            if self.lock == "held":
                self.tracker.interrupt()
                self.loop.call_later(0.2, self._interrupt)

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(function, *args)

    def _accept(self, accepted: bool) -> None:
        if not self.accepted.done():
            self.accepted.set_result(accepted)
        if self.claim and accepted and not self.claim.job_id.done():
            self.claim.job_id.set_result(self.job.id)

    def _end(self) -> None:
        if not self.answered.done():
            self.answered.set_result(None)

    # In the task that belongs to the job, whatever becomes of the client

    def begin(self) -> "asyncio.Task[None]":
        """Runs the host's route and all that follows, in a task of its own."""
        work = self.loop.create_task(self._work())
        self.tasks.add(work)
        work.add_done_callback(self.tasks.discard)
        return work

    async def _work(self) -> None:
        current.set(self)
        try:
            with lent_thread() as self.has_thread:
                await self.app(copy_of(self.scope), giving(list(self.body)), self._capture)
        except BaseException as error:
            self.error = error
        finally:
            with self._state:
                self.ended = True
            self._end()
        try:
            if self.job is not None:
                size = self.size()
                has_room = await self._find_room(size)
                try:
                    await self._keep(has_room)
                finally:
                    if has_room:
                        self.tracker.let_go(size)
        finally:
            if self.claim:
                self.tracker.release(self.key, self.claim)

    async def _find_room(self, size: int) -> bool:
        """Waits until the answer may wait for the disk. False if nothing was stored for long: it does not answer."""
        began = time.monotonic()
        while not self.tracker.hold(size):
            if time.monotonic() - max(began, self.tracker.stored_at) > UNTOLD:
                return False
            await asyncio.sleep(0.2)
        return True

    async def _keep(self, has_room: bool) -> None:
        """Sees to it that the job's end is stored, once the job is on disk."""
        if has_room and not self.accepted.done():  # no client was told of the job yet
            await asyncio.wait({self.accepted}, timeout=UNTOLD)
        if not has_room or not self.accepted.done():
            self._give_up()
        elif self.accepted.result():
            self.tracker.answered(self.job.id)
            followed = self.followed
            if followed:
                self._report()
            await self._store_soon()
            if not followed:  # perhaps its client left just then, and the host reports nothing
                await asyncio.wait({self.served}, timeout=SENDING)
                self._report()

    def _give_up(self) -> None:
        """The disk does not answer. The client gets its images, but they are not stored: they would fill the memory."""
        log.error("Job %s was generated, but is not stored: the disk does not answer", self.job.id)
        reason = self.reason() if self.failed else "Generated, but not stored: the disk did not answer"
        self.tracker.fail(self.job.id, reason)  # as soon as the disk answers

    @harmless
    def _report(self) -> None:
        """Logs a failure that the host does not see, since its client got the head before, or has left.

        To the host's layers it would be a crash of the server, which each of them reports, or none, as on Forge.
        """
        if not self.failed or self.passed_on or isinstance(self.error, (asyncio.CancelledError, Cancelled)):
            return
        plain = self.error is None or isinstance(self.error, HTTPException)  # an answer, though not one of success
        if not self.cancelled:
            details = "" if plain else "\n" + traceback_of(self.error)
            log.warning("Job %s failed: %s%s", self.job.id, one_line(self.reason()), details)
        elif not plain:
            log.warning("Job %s: the webui raised %s when it was stopped", self.job.id, type(self.error).__name__)

    async def _store_soon(self) -> None:
        """Stores how it ended, images after they were sent if that is soon: both would take the client longer."""
        try:
            if not self.failed and not accepts_gzip(self.scope):  # packing takes longer, and leaves room for both
                await asyncio.wait({self.served}, timeout=SENDING)
        finally:  # also if the server is stopped
            pool = self.tracker.senders if self.failed else self.tracker.storers  # a failure needs no disk of ours
            self.storing = pool.submit(self._store)
        stored = await asyncio.shield(asyncio.wrap_future(self.storing))
        if stored is not None:  # or will be, once a trouble has passed
            self.storing = stored
            await asyncio.shield(asyncio.wrap_future(stored))

    async def _capture(self, message: Message) -> None:
        self.messages.append(copy_of(message))

    def forget(self, _: Any) -> None:
        """Lets go of what is large when all is done: an idle worker thread of the host keeps its last context."""
        if self.storing is not None and not self.storing.done():  # the server was stopped meanwhile
            self.storing.add_done_callback(self.forget)
        else:
            self.messages, self.error, self.request, self._answer = [], None, None, None

    @property
    def failed(self) -> bool:
        """Whether it ended without an answer of success."""
        refused = not self.messages or not 200 <= self.messages[0]["status"] < 300
        return self.cancelled or self.error is not None or refused

    def reason(self) -> str:
        """Why it failed, for its user."""
        if self.cancelled:
            return CANCELLED
        if isinstance(self.error, asyncio.CancelledError):
            return "The webui was stopped"
        if self.error is not None:
            text = ""
            with contextlib.suppress(Exception):  # an exception of an extension's may fail at that, too
                text = str(getattr(self.error, "detail", "") or reason_of(self.error))
            name = type(self.error).__name__
            return f"{name}: {text}" if text not in ("", name) else name
        if not self.messages:
            return "The webui gave no answer"
        return f"The webui answered {self.messages[0]['status']}: {self.bytes()[:1000].decode('utf-8', 'replace')}"

    def size(self) -> int:
        """Bytes of what the host answered."""
        return sum(len(message.get("body", b"")) for message in self.messages)

    def bytes(self) -> bytes:
        """What the host answered."""
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    def answer(self) -> Answer:
        """The same in parts, with the parameters as the client sent them. It is read once."""
        with self._reading:
            if self._answer is None:
                answer = split_answer(self.bytes())
                self._answer = with_images_hidden(answer) if self.hide_images else answer
            return self._answer

    def for_client(self) -> Iterator[bytes]:
        """The same as the client asked for it, a piece at a time."""
        yield from in_pieces(self.answer().rest if self.hide_images else self.bytes())

    def _store(self) -> Optional[Future]:
        if self.failed:
            self.tracker.fail(self.job.id, self.reason())
            return None
        try:
            answer = self.answer()
            parameters = answer.contents.parameters
            prompt = parameters.get("prompt") if isinstance(parameters, dict) else None
            return self.tracker.finish(self.job.id, answer, prompt if isinstance(prompt, str) else "")
        except Exception as error:
            log.error("Job %s was generated, but could not be stored: %s", self.job.id, one_line(repr(error)))
            self.tracker.fail(self.job.id, f"Generated, but it could not be stored: {reason_of(error)}")
            return None


class Exchange:
    """One client's request and what it is told. The client may leave at any moment; the generation does not notice."""

    def __init__(self, middleware: Middleware, scope: Scope, receive: Receive, send: Send):
        self.middleware = middleware
        self.tracker = middleware.tracker
        self.scope = scope
        self.receive = receive
        self.send = send
        self.valve: Valve = scope[Shell.KEY]
        self.encoder = Gzip() if accepts_gzip(scope) else None
        self.preference = Preference.of(scope)

    async def serve(self) -> None:
        body = await self._read_body()
        served = body[-1]["type"] != "http.request"
        if served:  # the client left before the end of its body, and the host is to see that
            await self.middleware.app(self.scope, giving(body), self.send)
        while not served:
            generation = Generation(self.middleware, self.scope, body)
            self.valve.work = generation.begin()
            try:
                served = await self._serve(generation)
            finally:
                generation.served.set_result(None)
                self.valve.work.add_done_callback(generation.forget)

    async def _read_body(self) -> List[Message]:
        """The body as it came. If the client left before its end, the last message says so."""
        body = [await self.receive()]
        while body[-1].get("more_body", False):
            body.append(await self.receive())
        return body

    async def _serve(self, generation: Generation) -> bool:
        """False if the generation turned out to repeat one that came to nothing, so that another is due."""
        accepted, answered = generation.accepted, generation.answered
        await asyncio.wait({accepted, answered}, return_when=asyncio.FIRST_COMPLETED)
        if generation.job is not None and not accepted.done():
            left = generation.asked_at + self.tracker.patience() - time.monotonic()
            await asyncio.wait({accepted}, timeout=max(left, 0))  # the host was faster than the disk
        if accepted.done() and accepted.result():
            await asyncio.wait({answered}, timeout=self._patience(generation))
            if generation.cancelled or not (answered.done() and generation.failed):
                await self._follow(generation)
                return True
        await asyncio.wait({answered})
        if isinstance(generation.error, Repeat):
            return await self._repeat(generation.error.claim)
        if self.preference.wait is not None and accepted.done() and accepted.result():
            applied = self.preference.applied(respond_async=False)
            self.valve.headers = self._job_headers(generation.job, [(b"preference-applied", applied)])
        generation.passed_on = True
        if generation.job is not None and generation.failed:
            await self.tracker.settle(generation.job.id)  # who has the answer finds the job Failed
        await self._pass_on(generation)
        return True

    def _patience(self, generation: Generation) -> float:
        """Seconds in which a generation that has been accepted may still end with the host's own answer and status."""
        if self.preference.respond_async:
            return self.preference.wait or 0
        return GRACE if generation.lock else 0

    async def _follow(self, generation: Generation) -> None:
        """Tells the client of its job, from its acceptance on."""
        generation.followed = True

        async def result() -> Optional[Iterator[bytes]]:
            if not generation.failed:
                return generation.for_client()
            await self.tracker.settle(generation.job.id)  # who sees the cut finds the job Failed
            return None

        await self._tell(generation.job, generation.answered, result, [], self.tracker.senders)

    async def _pass_on(self, generation: Generation) -> None:
        """Gives the client what the host gave, as if we were not there."""
        if generation.error is not None:
            raise generation.error
        messages = generation.messages
        if generation.hide_images and not generation.failed:
            answer = await self.tracker.in_pool(generation.answer, pool=self.tracker.senders)
            headers = [pair for pair in messages[0]["headers"] if pair[0].lower() != b"content-length"]
            headers.append((b"content-length", str(len(answer.rest)).encode()))
            messages = [{**messages[0], "headers": headers}, {"type": "http.response.body", "body": answer.rest}]
        for message in messages:
            await self.send(copy_of(message))

    async def _repeat(self, claim: Claim) -> bool:
        """Answers from the job that was first with the idempotency key. False if there is none any more."""
        job_id = await asyncio.shield(asyncio.wrap_future(claim.job_id))  # not ours to cancel
        if job_id is None:
            return False
        await self.tracker.settle(job_id)  # it may have just failed
        try:
            job = await self.tracker.find(job_id)
        except OSError as error:
            raise HTTPException(503, f"The stored answer cannot be read: {reason_of(error)}") from None
        if job is None or job.status == FAILED:
            return False

        async def result() -> Optional[Iterator[bytes]]:
            job = await self.tracker.in_pool(self.tracker.get, job_id)
            return self.tracker.answer_as_json(job) if job is not None and job.status == COMPLETED else None

        ended = asyncio.get_running_loop().create_task(self.tracker.wait(job_id, math.inf))
        ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # `result` meets the same
        try:
            if job.ended or self.preference.wait is not None:  # so that a trouble with what is stored has a status
                await asyncio.wait({ended}, timeout=None if job.ended else self.preference.wait)
            headers = [(b"idempotent-replayed", b"true")] if job.ended else []
            await self._tell(job, ended, result, headers, self.tracker.pool)
        finally:
            ended.cancel()
        return True

    def _job_headers(self, job: Job, headers: List[Tuple[bytes, bytes]]) -> List[Tuple[bytes, bytes]]:
        """Headers of an answer that tells of a job, with those given, and what lets other origins read them."""
        headers = [*headers, (JOB_HEADER.lower().encode(), job.id.encode())]
        names = exposed(name.decode() for name, _ in headers)
        return [*headers, *((name.lower().encode(), value.encode()) for name, value in names.items())]

    async def _tell(self, job: Job, ended: Any, result: Any, headers: List[Tuple[bytes, bytes]], pool: Threads) -> None:
        """The head now, heartbeats while the job waits and runs, and then its result; None is no clean end.

        The result's pieces are made in the threads of `pool`.
        """
        in_time = bool(self.preference.wait) and ended.done()  # within no time nothing ends
        if self.preference.respond_async:
            headers.append((b"preference-applied", self.preference.applied(respond_async=not in_time)))
        if self.preference.respond_async and not in_time:
            location = path_of(self.scope).rpartition("/")[0] + f"/job/{job.id}"
            headers.append((b"location", location.encode()))
            with contextlib.suppress(OSError):  # then as it was
                job = await self.tracker.find(job.id) or job
            pool = self.tracker.pool_for(job)
            pieces = await self.tracker.in_pool(self.tracker.as_json, job, False, pool=pool)
            await self._start(202, self._job_headers(job, headers))
            try:
                await self._send_all(pieces, pool)
            except OSError as error:
                self.valve.cut = True
                log.error("Job %s: the stored answer cannot be read: %s", job.id, error)
            return
        pieces = await self._first(job, result, pool) if ended.done() else None
        gone = asyncio.get_running_loop().create_task(until_gone(self.receive))
        try:
            await self._start(200, self._job_headers(job, headers))
            while not ended.done():
                await self._send_piece(self.encoder.encode(b" ") if self.encoder else b" ")
                await asyncio.wait({ended, gone}, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
            if pieces is None:
                pieces = await result()
            if pieces is None:
                self.valve.cut = True
            else:
                await self._send_all(pieces, pool, gone)
        except OSError as error:
            self.valve.cut = True
            log.error("Job %s: the stored answer cannot be read: %s", job.id, error)
        except Exception:  # of which some layers would make a clean end
            self.valve.cut = True
            if not gone.done():
                log.exception("Job %s: Job Tracker failed to give the answer", job.id)
        finally:
            gone.cancel()

    async def _first(self, job: Job, result: Any, pool: Threads) -> Iterator[bytes]:
        """The result of a job that has ended, its first piece made before the head: so a failure has its true status.

        Raises HTTPException if there is none.
        """
        applied = [] if self.preference.wait is None else [(b"preference-applied", self.preference.applied(False))]
        self.valve.error_headers = self._job_headers(job, applied)
        try:
            pieces = await result()
            if pieces is not None:
                return preceded(await self.tracker.in_pool(next, pieces, b"", pool=pool), pieces)
            job = await self.tracker.find(job.id) or job
        except OSError as error:
            log.error("Job %s: the stored answer cannot be read: %s", job.id, error)
            raise HTTPException(503, f"The stored answer cannot be read: {reason_of(error)}") from None
        raise HTTPException(500, job.error or CANCELLED)

    async def _start(self, status: int, headers: List[Tuple[bytes, bytes]]) -> None:
        headers += [
            (b"content-type", b"application/json"),
            (b"vary", b"Accept-Encoding"),
            (b"x-accel-buffering", b"no"),  # nginx would keep the head back until the end
        ]
        if self.encoder:
            headers.append((b"content-encoding", b"gzip"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_all(
        self, pieces: Iterator[bytes], pool: Threads, gone: Optional["asyncio.Task[None]"] = None
    ) -> None:
        if self.encoder:
            pieces = self.encoder.encode_all(pieces)
        with contextlib.closing(FromPool(self.tracker, pieces, pool)) as made:
            async for piece in made:
                await self._send_piece(piece)
                if gone is not None and gone.done():
                    return
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_piece(self, data: bytes) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": True})


# ------------------------------------------------------------------------------------------------------------------
# API: the routes under /sdapi/v1/job
# ------------------------------------------------------------------------------------------------------------------


def maybe(description: str) -> Any:
    """A field that can be null. Only pydantic 2 says so by itself in the documentation."""
    return Field(None, description=description, **({"nullable": True} if PYDANTIC.startswith("1.") else {}))


class JobSummary(BaseModel):
    """A job without image data."""

    id: str = Field(description="8 characters of A-Z a-z 0-9, as sent in the header X-Job-ID")
    type: Literal[TYPES]
    status: Literal[STATUSES]
    prompt: str
    timestamp: int = Field(description="when the job was accepted, in Unix seconds")
    ip: Optional[str] = maybe("address of the client")
    started: Optional[float] = maybe("when generation began, in Unix seconds")
    finished: Optional[float] = maybe("when the job ended, in Unix seconds; null if its webui ended before it")
    error: Optional[str] = maybe("why the job failed, what is missing of it, or why its end is not stored yet")
    queue_position: Optional[int] = maybe("while Pending: 1 is next")
    progress: Optional[float] = maybe("while Processing: 0 to 1")
    eta: Optional[float] = maybe("while Processing: seconds that are left, if that can be told")
    parameters: Optional[Dict[str, Any]] = maybe(
        "as the webui answered. Except in a job with its images, with a note in the place of each text of more than "
        "1,000 characters, and of lists and objects that are too much, so that it has some 64 kB at most. null until "
        "Completed"
    )
    info: Optional[str] = maybe("JSON text, as the webui answered; null until Completed")
    image_count: int = Field(description="how many images the job has")


class JobWithImages(JobSummary):
    """A job. With `images=false` it has no `images`."""

    images: List[Optional[str]] = Field(
        [], description="base64, in the webui's order; empty until Completed; null for a file that is gone"
    )


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


def text_header(description: str) -> Dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


def json_like(example: Any) -> Dict[str, Any]:
    return {"application/json": {"example": example}}


COMPLETED_EXAMPLE = {
    "id": "A3f9K2xY",
    "type": "txt2img",
    "status": COMPLETED,
    "prompt": "a lighthouse",
    "timestamp": 1736712000,
    "ip": "192.0.2.7",
    "started": 1736712000.25,
    "finished": 1736712009.5,
    "error": None,
    "queue_position": None,
    "progress": None,
    "eta": None,
    "parameters": {"prompt": "a lighthouse", "seed": -1, "steps": 20},
    "info": '{"prompt": "a lighthouse", "seed": 7, "infotexts": ["a lighthouse\\nSteps: 20, Seed: 7"]}',
    "image_count": 1,
}
UNFINISHED = {"finished": None, "parameters": None, "info": None, "image_count": 0}
PENDING_EXAMPLE = {**COMPLETED_EXAMPLE, **UNFINISHED, "status": PENDING, "started": None, "queue_position": 3}
CANCELLED_EXAMPLE = {**COMPLETED_EXAMPLE, **UNFINISHED, "status": FAILED, "finished": 1736712002.5, "error": CANCELLED}

ANY_ROUTE_DOCS = {
    401: {"model": Problem, "description": "The webui asks for credentials, and these are none"},
    404: {"model": Problem, "description": "There is no such job", "content": json_like({"detail": "Job not found"})},
    503: {"model": Problem, "description": "The jobs cannot be read from disk or changed there"},
}
CONFLICT_DOCS = {
    409: {
        "model": Problem,
        "description": "It does not go with the job's status",
        "content": json_like({"detail": "The job is Completed"}),
    },
}
FOREIGN_DOCS = {
    403: {
        "model": Problem,
        "description": "A browser says that a page of another origin asks, which --cors-allow-origins does not name",
        "content": json_like({"detail": OriginGuard.REFUSAL}),
    },
}
IMAGE_DOCS = {
    200: {
        "description": "The image",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in (*MEDIA_TYPES.values(), OTHER_MEDIA_TYPE)
        },
        "headers": {
            "ETag": text_header("for If-None-Match"),
            "Cache-Control": text_header("an image never changes: it may be kept, but not shared"),
            "Content-Disposition": text_header("with the name of the file"),
        },
    },
    304: {"description": "If-None-Match names the image that the client has"},
}

GENERATION_DOCS = {
    "parameters": [
        {
            "name": "Prefer",
            "in": "header",
            "description": "RFC 7240. respond-async: answer 202 with the job when it is accepted. respond-async, "
            "wait=N: what ends within N seconds (at most 300) is answered as the webui answers it, with its true "
            "status, a failure too, and the rest with 202",
            "schema": {"type": "string"},
            "example": "respond-async, wait=30",
        },
        {
            "name": "Idempotency-Key",
            "in": "header",
            "description": "The same key, user, path and body is one generation, however often it is sent",
            "schema": {"type": "string", "maxLength": IDEMPOTENCY_KEY_LIMIT},
            "example": "8e03978e-40d5-43dd-bc93-6894a57f9324",
        },
    ],
    "responses": {
        "200": {
            "headers": {
                JOB_HEADER: text_header("the job's ID, while tracking is enabled; sent before generation starts"),
                "Preference-Applied": text_header("wait=N, of a generation that ended within the N seconds"),
                "Idempotent-Replayed": text_header("true for a stored answer"),
            }
        },
        "429": {"description": "Too many generations wait already: try again after `Retry-After` seconds"},
        "202": {
            "description": "The job is accepted, as Prefer: respond-async asked for",
            "headers": {
                JOB_HEADER: text_header("the job's ID"),
                "Location": text_header("the job's path"),
                "Preference-Applied": text_header("respond-async, and wait=N where that was asked for"),
                "Idempotent-Replayed": text_header("true if the job had ended already"),
            },
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/JobSummary"},
                    "example": PENDING_EXAMPLE,
                }
            },
        },
    },
}


class Streamed(StreamingResponse):
    """Its content is closed at the end, also when the client leaves before."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = asyncio.Event()

        async def receive_later() -> Message:
            """A response that ends before its first piece is an error to the host's layers, gone client or not."""
            await begun.wait()
            return await receive()

        async def send_and_note(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                begun.set()

        self._begun, self._valve = begun, scope.get(Shell.KEY)  # for `stream_response`, which starlette calls
        try:
            await super().__call__(scope, receive_later, send_and_note)
        finally:
            if isinstance(self.body_iterator, FromPool):
                self.body_iterator.close()
            else:
                await self.body_iterator.aclose()

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except Exception as error:
            if self._valve is None or not self._begun.is_set():  # the head may still become a true status
                raise
            self._valve.cut = True  # some layers would make a clean end of it
            log.error("An answer breaks off: %s", one_line(str(error)))


def joined(items: Iterable[Iterator[bytes]]) -> Iterator[bytes]:
    """A JSON array of items, each of which comes in pieces."""
    yield b"["
    for number, item in enumerate(items):
        first = next(item)
        yield b"," + first if number else first
        yield from item
    yield b"]"


def preceded(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


class Api:
    """The endpoints. They look at jobs in threads of the tracker's own, so that the host's are never needed."""

    JOB = "/sdapi/v1/job/{id}"
    IMAGE = "/sdapi/v1/job/{id}/images/{n}"
    JOBS = "/sdapi/v1/jobs"
    CURSOR = r"([0-9]{1,12})((-[A-Za-z0-9]{8}){1,10})"

    def __init__(self, tracker: Tracker, origins: OriginGuard):
        self.tracker = tracker
        self.origins = origins

    def add_to(self, add_route: Callable[..., Any]) -> None:
        """Registers the routes through the host's own `add_api_route`, which guards them as it guards its own."""

        def add(method: str, path: str, endpoint: Callable[..., Any], docs: Dict[int, Any], **more: Any) -> None:
            responses = {**ANY_ROUTE_DOCS, **docs}
            if method in ("POST", "DELETE"):
                endpoint = self._guarded(endpoint, f"call {method} {path}")
                responses.update(FOREIGN_DOCS)
            add_route(path, endpoint, methods=[method], tags=["Job Tracker"], responses=responses, **more)

        one = {200: {"description": "The job", "content": json_like({**COMPLETED_EXAMPLE, "images": ["iVBORw0K…"]})}}
        many = {
            200: {
                "description": "The jobs, newest first",
                "content": json_like([PENDING_EXAMPLE, COMPLETED_EXAMPLE]),
                "headers": {"Link": text_header('the next page: <…>; rel="next"')},
            }
        }
        ended = {200: {"description": "The job", "content": json_like(CANCELLED_EXAMPLE)}, **CONFLICT_DOCS}
        add("GET", self.JOB, self.get_job, one, response_model=JobWithImages)
        add("GET", self.JOBS, self.get_jobs, many, response_model=List[JobSummary])
        add("GET", self.IMAGE, self.get_image, IMAGE_DOCS, response_class=Response)
        add("HEAD", self.IMAGE, self.get_image, {}, include_in_schema=False)
        add("POST", self.JOB + "/cancel", self.cancel_job, ended, response_model=JobSummary)
        add("DELETE", self.JOB, self.delete_job, CONFLICT_DOCS, status_code=204)

    def _guarded(self, endpoint: Callable[..., Any], action: str) -> Callable[..., Any]:
        """An endpoint that changes something. The host has checked the credentials before."""

        @functools.wraps(endpoint)
        async def guarded(request: Request, **arguments: Any) -> Any:
            if self.origins.refuses(request.scope, action):
                raise HTTPException(403, OriginGuard.REFUSAL)
            return await endpoint(request=request, **arguments)

        return guarded

    async def _run(
        self,
        function: Callable[..., Any],
        *args: Any,
        lost: Optional[str] = None,
        pool: Optional[Threads] = None,
    ) -> Any:
        """Runs a function that may block. Trouble with the disk is a 503, or a 404 if it does not pass."""
        try:
            return await self.tracker.in_pool(function, *args, pool=pool)
        except OSError as error:
            if lost is not None and not passes(error):
                raise HTTPException(404, lost) from None
            raise self._unreadable(error) from None

    @staticmethod
    def _unreadable(error: OSError) -> HTTPException:
        return HTTPException(503, f"The jobs cannot be read or changed: {reason_of(error)}")

    @staticmethod
    def _let_nobody_keep_errors(request: Request) -> None:
        """A cache may keep a 404 (RFC 9111, 4.2.2), and what is not there now may be there in a moment."""
        if Shell.KEY in request.scope:
            request.scope[Shell.KEY].error_headers = [(b"cache-control", b"no-store")]

    async def _get(self, job_id: str) -> Job:
        job = self.tracker.running(job_id) or await self._run(self.tracker.get, job_id)
        if job is None:
            raise HTTPException(404, "Job not found")
        return job

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
        self._let_nobody_keep_errors(request)
        if wait and ID_FORM.match(id):
            await self._wait(request, id, min(wait, HEARTBEAT))
        await self.tracker.settle(id)
        job = await self._get(id)
        if wait > HEARTBEAT and not job.ended:
            return await self._respond(request, self._wait_on(request, id, images, wait - HEARTBEAT))
        return await self._respond(request, await self._as_json(job, images), self.tracker.pool_for(job))

    async def _as_json(self, job: Job, images: bool) -> Iterator[bytes]:
        return await self._run(self.tracker.as_json, job, images, pool=self.tracker.pool_for(job))

    async def _wait_on(self, request: Request, job_id: str, images: bool, seconds: float) -> AsyncIterator[bytes]:
        """White space while the job goes on, and then the job. The head is out: for trouble, the connection is cut."""
        ended = asyncio.get_running_loop().create_task(self.tracker.wait(job_id, seconds))
        ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # trouble shows when it is read
        gzip = Gzip() if accepts_gzip(request.scope) else None
        try:
            while not ended.done():
                yield gzip.encode(b" ") if gzip else b" "
                await asyncio.wait({ended}, timeout=HEARTBEAT)
            await self.tracker.settle(job_id)
            job = await self._get(job_id)
            pieces = await self._as_json(job, images)
            pieces = gzip.encode_all(pieces) if gzip else pieces
            with contextlib.closing(FromPool(self.tracker, pieces, self.tracker.pool_for(job))) as made:
                async for piece in made:
                    yield piece
        except (HTTPException, OSError) as error:
            request.scope[Shell.KEY].cut = True
            log.warning("Job %s cannot be given to who waited for it: %s", job_id, getattr(error, "detail", error))
        finally:
            ended.cancel()

    async def _wait(self, request: Request, job_id: str, seconds: float) -> None:
        """Waits for a job's end, unless the client leaves."""
        loop = asyncio.get_running_loop()
        ended = loop.create_task(self.tracker.wait(job_id, seconds))
        gone = loop.create_task(until_gone(request.receive))
        try:
            await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.exception()  # trouble with the disk shows when the job is read
        finally:
            ended.cancel()
            gone.cancel()

    async def get_jobs(
        self,
        request: Request,
        ip: Optional[str] = Query(None, description="address of the client"),
        status: Optional[str] = Query(None, description="case ignored", enum=STATUSES),
        type: Optional[str] = Query(None, enum=TYPES),
        after: Optional[float] = Query(None, description="accepted after this moment, in Unix seconds"),
        before: Optional[float] = Query(None, description="accepted before this moment, in Unix seconds"),
        q: Optional[str] = Query(None, max_length=Filter.LIMIT, description="text in the prompt, case ignored"),
        limit: int = Query(50, ge=1, le=1000, description="jobs at most"),
        cursor: Optional[str] = Query(
            None, description="from the Link header of the page before", pattern=f"^{CURSOR}$"
        ),
    ) -> Response:
        """Jobs that match all filters. When there are more, the header `Link` with `rel="next"` has the next page."""
        self._let_nobody_keep_errors(request)
        wanted = Filter(
            ip,
            self._one_of("status", status, STATUSES),
            self._one_of("type", type, TYPES),
            self._moment("after", after),
            self._moment("before", before),
            q,
        )
        after_time, shown = 0, []
        if cursor is not None:
            form = re.match(self.CURSOR + r"\Z", cursor)
            if not form:
                raise self._invalid("cursor", "it must come from a Link header")
            after_time, shown = int(form.group(1)), form.group(2).split("-")[1:]

        def look(abandoned: threading.Event) -> Tuple[List[Job], str]:
            store = self.tracker.store
            after_id = next(filter(store.knows, shown), shown[0] if shown else None)
            page = store.query(wanted, limit, 0, after_id, after_time, abandoned)
            # The last ones, for the page goes on behind the first of them that is still there.
            last = [str(page.jobs[-1].timestamp), *(job.id for job in page.jobs[:-11:-1])] if page.more else []
            return page.jobs, "-".join(last)

        pool = self.tracker.searchers if wanted.text else self.tracker.pool
        jobs, last = await self._run_while_here(request, look, pool)
        response = await self._respond(request, joined(self.tracker.as_json(job, images=False) for job in jobs))
        if last:
            asked = URL("?" + request.scope["query_string"].decode("latin-1"))
            query = asked.include_query_params(cursor=last).query
            response.headers["Link"] = f'<{path_of(request.scope)}?{query}>; rel="next"'
            response.headers.update(exposed(response.headers))
        return response

    async def _run_while_here(self, request: Request, look: Callable[[threading.Event], Any], pool: Threads) -> Any:
        """Runs a function that ends early when the event that it is given is set: when the client has left."""
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()
        looking = loop.create_task(self._run(look, abandoned, pool=pool))
        gone = loop.create_task(until_gone(request.receive))
        try:
            await asyncio.wait({looking, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not looking.done():
                raise HTTPException(503, "The client has left")  # which nobody reads
            return looking.result()
        finally:
            abandoned.set()
            looking.cancel()
            gone.cancel()

    async def get_image(
        self,
        request: Request,
        id: str = Path(description="the job's ID"),
        n: int = Path(ge=0, le=999_999, description="the image's number, from 0"),
    ) -> Response:
        """One image of a job as a file."""
        self._let_nobody_keep_errors(request)
        await self.tracker.settle(id)
        job = await self._get(id)
        if n >= len(job.images):
            raise HTTPException(404, "The job has no such image" if job.ended else f"The job is still {job.status}")
        name = job.images[n]
        size = await self._run(self.tracker.images.size, name)
        lost = "The image is no longer on disk"
        if size is None:
            raise HTTPException(404, lost)
        file_name = os.path.basename(name)
        gzip = accepts_gzip(request.scope)
        headers = {
            "ETag": f'"{file_name}-{size}{"-gzip" * gzip}"',
            "Cache-Control": "private, max-age=31536000, immutable",
            "Content-Disposition": f'inline; filename="{file_name}"',
            "Content-Security-Policy": "default-src 'none'",
            "X-Content-Type-Options": "nosniff",
            "Vary": "Accept-Encoding",
        }
        headers.update(exposed(headers))
        known = [tag.strip() for tag in request.headers.get("If-None-Match", "").replace("W/", "").split(",")]
        if headers["ETag"] in known or known == ["*"]:
            return Response(None, 304, headers)
        pieces = self.tracker.images.read(name)
        first = await self._run(next, pieces, b"", lost=lost)
        pieces = preceded(first, pieces)  # its file is open, and may be deleted from now on
        if gzip:
            # Otherwise the host would compress the image, in the event loop and in vain.
            pieces = Gzip(level=0).encode_all(pieces)
            headers["Content-Encoding"] = "gzip"
        else:
            headers["Content-Length"] = str(size)
        media_type = MEDIA_TYPES.get(name.rpartition(".")[2], OTHER_MEDIA_TYPE)
        if request.method == "HEAD":
            await self._run(pieces.close)
        return Streamed(FromPool(self.tracker, pieces), 200, headers, media_type)

    async def cancel_job(self, request: Request, id: str = Path(description="the job's ID")) -> Response:
        """Takes a Pending job out of the queue, or interrupts a Processing one. It ends as Failed, "Cancelled"."""
        await self._end(self.tracker.cancel, id)
        await self.tracker.settle(id)
        job = await self._get(id)
        return await self._respond(request, await self._as_json(job, images=False), self.tracker.pool_for(job))

    async def delete_job(self, request: Request, id: str = Path(description="the job's ID")) -> Response:
        """Removes a job that has ended, and its images."""
        await self.tracker.settle(id)
        await self._end(self.tracker.delete, id)
        return Response(None, 204)

    async def _end(self, function: Callable[[str], bool], job_id: str) -> None:
        try:
            found = await self._run(function, job_id, pool=self.tracker.pool_for(self.tracker.running(job_id)))
        except Conflict as reason:
            raise HTTPException(409, str(reason)) from None
        if not found:
            raise HTTPException(404, "Job not found")

    @staticmethod
    def _invalid(name: str, message: str) -> HTTPException:
        return HTTPException(422, [{"loc": ["query", name], "msg": message, "type": "value_error"}])

    def _one_of(self, name: str, value: Optional[str], allowed: Tuple[str, ...]) -> Optional[str]:
        if value is None:
            return None
        for one in allowed:
            if one.lower() == value.lower():
                return one
        raise self._invalid(name, "it must be one of " + ", ".join(allowed))

    def _moment(self, name: str, value: Optional[float]) -> Optional[float]:
        if value is not None and not math.isfinite(value):
            raise self._invalid(name, "it must be a finite number")
        return value

    async def _respond(
        self,
        request: Request,
        pieces: Union[Iterator[bytes], AsyncIterator[bytes]],
        pool: Optional[Threads] = None,
    ) -> Response:
        """JSON, a piece at a time. What an asynchronous iterator gives is packed already, if it is to be."""
        headers = {"Vary": "Accept-Encoding", "Cache-Control": "no-store"}
        gzip = accepts_gzip(request.scope)
        if gzip:
            headers["Content-Encoding"] = "gzip"
        if hasattr(pieces, "__anext__"):
            headers["X-Accel-Buffering"] = "no"  # nginx would keep the head and the white space back until the end
        else:
            pieces = FromPool(self.tracker, Gzip().encode_all(pieces) if gzip else pieces, pool)
            try:
                await pieces.begin()
            except OSError as error:
                raise self._unreadable(error) from None
        return Streamed(pieces, 200, headers, "application/json")


# ------------------------------------------------------------------------------------------------------------------
# Tab: the page "Job Tracker" in the webui
# ------------------------------------------------------------------------------------------------------------------

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def as_html(text: str, limit: int) -> str:
    """Foreign text as HTML that shows it as text, cut, and with no say in the direction of what is beside it."""
    if not text:
        return ""
    rest = len(text) - limit
    more = f" <em>\u2026 and {rest:,} characters more</em>" if rest > 0 else ""
    return f"<bdi>{escape(UNPRINTABLE.sub(chr(0xFFFD), text[:limit]))}</bdi>{more}"


def as_time(moment: float) -> str:
    """A moment as HTML, in UTC; the page's script turns it into the time of who looks at it."""
    text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
    return f'<time datetime="{text}">{text}</time>'


def as_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{round(max(seconds, 0), 1)} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def as_size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


class View(NamedTuple):
    """What one open page shows. It comes from the browser with every look."""

    page: int = 0
    job: str = ""  # the ID of the job that is open
    version: str = ""  # of the HTML that it has

    @classmethod
    def parse(cls, text: Any) -> "View":
        """Anybody can send anything: what is no view is the first page."""
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            view = cls(**json.loads(text))
            if type(view.page) is int and 0 <= view.page < 1 << 32 and (view.job == "" or ID_FORM.match(view.job)):
                return view
        return cls()


class Markup:
    """Jobs as HTML. What came from a client goes through `as_html`."""

    ROWS = 50
    ROW_TEXT, FULL_TEXT = 300, 20_000  # characters of a prompt in the table, and of any text in an open job
    INFOTEXTS = 20
    IMAGE = "/job-tracker/{id}/{n}"  # for whom gradio shows the page; the API has credentials of its own
    SHOWN = ("png", "jpg", "webp", "gif", "avif", "bmp")  # by every browser

    def __init__(self, tracker: Tracker):
        self.tracker = tracker

    @classmethod
    def note(cls, text: str, kind: str = "plain") -> str:
        return f'<p class="note {kind}">{as_html(text, cls.FULL_TEXT)}</p>'

    def figures(self) -> str:
        counts, size = self.tracker.store.figures()
        figures = [(self._status(status), f"{counts[status]:,}") for status in STATUSES]
        figures += [("On disk", as_size(size)), ("Next purge", self._next_purge())]
        cells = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in figures)
        return f'<div class="figures">{cells}</div>'

    def _next_purge(self) -> str:
        at = self.tracker.next_purge
        if self.tracker.settings.retention_days is None:
            return "Off"
        if at is None:
            return "soon"
        hours, minutes = divmod(max(int(at - time.monotonic()) // 60, 0), 60)
        return f"in {hours} h {minutes:02} min" if hours else f"in {minutes} min"

    @staticmethod
    def _status(status: str, more: str = "") -> str:
        return f'<span class="status {status}">{status}{more}</span>'

    def _status_of(self, job: Job) -> str:
        progress, _ = self.tracker.progress_of(job)
        position = self.tracker.position(job.id)
        more = ""
        if progress is not None:
            more = f' {progress:.0%}<progress value="{progress:.2f}"></progress>'
        elif position is not None:
            more = f" <small>{'next' if position == 1 else f'no. {position}'}</small>"
        return self._status(job.status, more)

    def table(self, view: View, wanted: Filter) -> str:
        """A page of the jobs that match."""
        store, total = self.tracker.store, None
        if wanted == Filter(status=wanted.status):  # all others would have to be counted
            counts = store.figures()[0]
            total = sum(counts.values()) if wanted.status is None else counts[wanted.status]
        page = view.page if total is None else min(view.page, max(total - 1, 0) // self.ROWS)
        found = store.query(wanted, self.ROWS, page * self.ROWS)
        if page and not found.jobs:
            page, found = 0, store.query(wanted, self.ROWS)
        if not found.jobs:
            text = "No jobs yet." if wanted == Filter() else "No job matches these filters."
            return f'<p class="empty">{text}</p>'
        columns = ("ID", "Time", "Type", "Status", "Prompt", "Images", "Seconds", "IP")
        head = "".join(f'<th class="{column.lower()}" scope="col">{column}</th>' for column in columns)
        rows = "".join(self._row(self.tracker.get(job.id) or job, job.id == view.job) for job in found.jobs)
        pages = self._pages(page, len(found.jobs), total, found.more)
        return f'<div class="frame"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{pages}'

    def _row(self, job: Job, is_open: bool) -> str:
        seconds = self.tracker.seconds(job)
        cells = {
            "id": f'<button type="button" aria-expanded="{"true" if is_open else "false"}">{job.id}</button>',
            "time": as_time(job.timestamp),
            "type": job.type,
            "status": self._status_of(job),
            "prompt": as_html(job.prompt[: self.ROW_TEXT], self.ROW_TEXT),
            "images": str(len(job.images) or ""),
            "seconds": "" if seconds is None else f"{seconds:.1f}",
            "ip": as_html(job.ip or "", 100),
        }
        row = "".join(f'<td class="{name}">{cell}</td>' for name, cell in cells.items())
        return f'<tr data-job="{"" if is_open else job.id}" class="{"open" if is_open else ""}">{row}</tr>'

    def _pages(self, page: int, rows: int, total: Optional[int], more: bool) -> str:
        def button(text: str, to: int, possible: bool) -> str:
            return f'<button type="button" data-page="{to}"{"" if possible else " disabled"}>{text}</button>'

        first = page * self.ROWS + 1
        where = f"{first:,} to {first + rows - 1:,}"
        newer = button("Newest", 0, page > 0) + button("Newer", page - 1, page > 0)
        older = button("Older", page + 1, more)
        if total is not None:
            where += f" of {total:,}"
            older += button("Oldest", (total - 1) // self.ROWS, more)
        return f"<nav>{newer}<span>{where}</span>{older}</nav>"

    def details(self, job_id: str) -> str:
        """All there is to know of a job."""
        close = '<button type="button" data-job="">Close</button>'
        job = self.tracker.get(job_id)
        if job is None:
            return f'<header><b>{job_id}</b>{close}</header><p class="empty">This job is no longer kept.</p>'
        known = self.tracker.describe(job)
        text = known["info"]
        size = text.end - text.start if isinstance(text, Part) else len(text) if isinstance(text, str) else 0
        info = self._info(text if size <= LARGE else None)
        error = self.note(known["error"], "error") if known["error"] else ""
        if size > LARGE:
            error += self.note(f"What the webui says of this job is too long to be shown here: {as_size(size)}")
        texts = [("Prompt", job.prompt)]
        if info["negative_prompt"]:
            texts.append(("Negative prompt", info["negative_prompt"]))
        infotexts = info["infotexts"][: self.INFOTEXTS]
        return (
            f"<header><b>{job.id}</b>{self._status_of(job)}{close}</header><div>{error}</div>"
            + self._gallery(job)
            + "".join(self._text(name, text) for name, text in texts)
            + self._facts(job, known, info)
            + "".join(
                self._text("Infotext" if len(infotexts) == 1 else f"Infotext of image {number + 1}", text, number == 0)
                for number, text in enumerate(infotexts)
            )
        )

    @staticmethod
    def _info(text: Any) -> Dict[str, Any]:
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
            "infotexts": list(map(str, lists["infotexts"])),
        }

    def _facts(self, job: Job, known: Dict[str, Any], info: Dict[str, Any]) -> str:
        facts = {
            "Type": job.type,
            "Client": as_html(job.ip or "", 100),
            "Accepted": as_time(job.timestamp),
            "Waited": as_duration(int(job.started - job.timestamp)) if job.started else "",
            "Took": as_duration(self.tracker.seconds(job) or 0) if job.started and job.finished else "",
            "Left": as_duration(known["eta"]) if known["eta"] is not None else "",
            "On disk": as_size(job.bytes) if job.bytes else "",
        }
        shown = [f"<div><dt>{name}</dt><dd>{fact}</dd></div>" for name, fact in facts.items() if fact]
        if info["seeds"]:
            shown.append(f'<div class="wide"><dt>Seed</dt><dd>{as_html(info["seeds"], 1000)}</dd></div>')
        return f"<dl>{''.join(shown)}</dl>"

    def _text(self, name: str, text: str, is_open: bool = True) -> str:
        return (
            f"<details{' open' if is_open else ''}><summary>{name}</summary>"
            f'<div class="text">{as_html(text, self.FULL_TEXT) or "&nbsp;"}</div></details>'
        )

    def _gallery(self, job: Job) -> str:
        figures = ""
        for number, name in enumerate(job.images):
            file_name, size = os.path.basename(name), self.tracker.images.size(name)
            url = "." + self.IMAGE.format(id=job.id, n=number)
            link, end = f'<a href="{url}" target="_blank" rel="noopener">', "</a>"
            ending = name.rpartition(".")[2]
            picture, note = f'<div class="blank">{ending}</div>', ""
            if size is None:
                link = end = ""
                picture = '<div class="blank">no longer on disk</div>'
            else:
                note = f" <small>{as_size(size)}</small>"
                if ending in self.SHOWN:
                    picture = f'<img src="{url}" alt="Image {number + 1}" loading="lazy">'
            caption = f"<figcaption>{link}{file_name}{end}{note}</figcaption>"
            figures += f"<figure>{link}{picture}{end}{caption}</figure>"
        return f'<div class="gallery">{figures}</div>'


class Tab:
    """The page: settings, figures, the table of jobs, and the job that is open.

    Gradio has the controls, HTML is the rest. A script in the page asks `look` for all of it again and again while
    somebody sees it, and after each click. So `look` is the only way for data into the page, several pages agree,
    and nothing is asked while nobody looks.
    """

    RETENTIONS = {"30 days": 30, "7 days": 7, "3 days": 3, "1 day": 1, "Off": None}
    TOKEN = "/job-tracker/token"
    DIRECT = re.compile(r"/(run|api)/[^/]+/?\Z")  # the paths at which gradio calls a function without its queue

    def __init__(self, tracker: Tracker, origins: OriginGuard, trouble: Callable[[], Optional[str]]):
        """`trouble` says why generations are not tracked, None if they are."""
        self.tracker = tracker
        self.origins = origins
        self.trouble = trouble
        self.markup = Markup(tracker)
        self._purge: Optional[Future] = None  # the last one that was asked for here
        self._purge_began = 0.0
        # Only pages of the webui itself can read it, and so prove what they are where a proxy changes `Host`.
        self._token = secrets.token_urlsafe()

    # The controls

    def build(self) -> Any:
        """The page as gradio's Blocks, for gradio 3.41 and 4.40."""
        import gradio as gr

        with gr.Blocks(analytics_enabled=False) as blocks, gr.Column(elem_id="job_tracker"):
            gr.HTML(f"<style>{TAB_STYLE}</style>", elem_id="job_tracker_style")
            with gr.Row(elem_id="job_tracker_settings"):
                enabled = gr.Checkbox(
                    self.tracker.settings.enabled,
                    label="Enable Tracking",
                    elem_id="job_tracker_enabled",
                    **self._state("enabled", "Each generation through the API becomes a job that is kept."),
                )
                retention = gr.Radio(
                    self._retentions(),
                    value=self._retention(),
                    label="Retention",
                    elem_id="job_tracker_retention",
                    **self._state("retention_days", "Older jobs are removed, with their images."),
                )
                purge = gr.Button("Purge Now", size="sm", elem_id="job_tracker_purge")
            gr.HTML('<div class="top"></div>')
            with gr.Row(elem_id="job_tracker_filters"):
                status = gr.Dropdown(["All", *STATUSES], value="All", label="Status", elem_id="job_tracker_status")
                ip = gr.Textbox(label="IP", placeholder="Any address", max_lines=1, elem_id="job_tracker_ip")
                text = gr.Textbox(label="Prompt", placeholder="Any text", max_lines=1, elem_id="job_tracker_text")
            gr.HTML('<div class="main"><p class="empty">Loading</p></div>')
            fresh = gr.HTML(elem_id="job_tracker_fresh")  # the script brings it into the top and the main part
            view = gr.Textbox(visible=False)
            token = gr.Textbox(visible=False)
            look = gr.Button("Look", elem_id="job_tracker_look")  # for the script, nobody sees it

            script_argument = "js" if int(gr.__version__.split(".")[0]) >= 4 else "_js"

            def on(event: Any, function: Any = None, inputs: Any = None, outputs: Any = None, script: str = "") -> Any:
                options = {"queue": False, "show_progress": "hidden", "api_name": False}
                return event(function, inputs, outputs, **options, **{script_argument: script or None})

            def call(event: Any, function: Any, action: str, inputs: List[Any], outputs: List[Any]) -> Any:
                finish = "ask" if function == self.look else "sign"
                script = f"(...values) => window.jobTracker.{finish}(values.slice(0, {len(inputs)}))"
                return on(event, self._guarded(function, action, len(outputs)), [*inputs, token], outputs, script)

            on(blocks.load, script=TAB_SCRIPT)
            inputs, outputs = [view, enabled, retention, status, ip, text], [enabled, retention, purge, fresh]
            looked = call(look.click, self.look, "see the jobs", inputs, outputs)
            on(looked.success, script="() => window.jobTracker.answered()")
            for control in (status, ip, text):
                on(control.change, script="() => window.jobTracker.filter()")
            for done in (
                call(enabled.input, self.set_enabled, "turn tracking on or off", [enabled], []),
                call(retention.input, self.set_retention, "set the retention", [retention], [retention]),
                call(purge.click, self.purge, "purge", [], []),
            ):
                on(done.then, script="() => window.jobTracker.act()")

        for block in blocks.blocks.values():
            block.do_not_save_to_config = True  # or the webui puts the values of its ui-config.json back
        return blocks

    def _state(self, name: str, info: str) -> Dict[str, Any]:
        """What the control of a setting says, and whether it can be used."""
        locked = self.tracker.settings.locked
        if name in locked:
            return {"interactive": False, "info": f"Set by the variable {locked[name]}, and locked by it."}
        return {"interactive": True, "info": info}

    # Who may use them

    async def get_token(self, request: Request) -> Response:
        """Another page's script cannot read it: the browser says what page asks, or lets no script have the answer."""
        if self.origins.refuses(request.scope, "read the tab's token"):
            raise HTTPException(403, OriginGuard.REFUSAL)
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return Response(as_json(self._token), 200, headers, "application/json")

    def _guarded(self, function: Callable[..., Any], action: str, outputs: int) -> Callable[..., Any]:
        """A function for gradio that pages of other origins cannot call, and nobody through gradio's queue."""
        import gradio as gr

        async def guarded(request: gr.Request, *values: Any) -> Any:
            *values, token = values
            scope = self._direct_scope(request)
            if scope is None:
                self.origins.warn("A call through gradio's queue", action)
                raise gr.Error("This cannot be called through the queue")
            if self._is_token(token) or not self.origins.refuses(scope, action):
                return await function(*values)
            if Shell.KEY not in scope:
                raise gr.Error(OriginGuard.REFUSAL)
            scope[Shell.KEY].refusal = OriginGuard.REFUSAL  # of an exception gradio would make a 500, and a traceback
            return [gr.update()] * outputs if outputs > 1 else gr.update() if outputs else None

        return guarded

    def _is_token(self, token: Any) -> bool:
        return isinstance(token, str) and secrets.compare_digest(token.encode("utf-8", "replace"), self._token.encode())

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
        known = [text for text, value in self.RETENTIONS.items() if value == days]
        return known[0] if known else f"{days:g} days"

    def _retentions(self) -> List[str]:
        now = self._retention()
        return [*([] if now in self.RETENTIONS else [now]), *self.RETENTIONS]

    # What they do, in threads of the tracker's own, so that the host's are never needed

    async def set_enabled(self, enabled: Any) -> None:
        if isinstance(enabled, bool):  # anybody can send anything
            await self._save(enabled=enabled)

    async def set_retention(self, retention: Any) -> Any:
        import gradio as gr

        if retention in list(self.RETENTIONS):  # a list also looks for what has no hash
            await self._save(retention_days=self.RETENTIONS[retention])
        return gr.update(choices=self._retentions(), value=self._retention())

    async def _save(self, **changes: Any) -> None:
        import gradio as gr

        try:
            await self.tracker.in_pool(lambda: self.tracker.settings.save(**changes))
        except (OSError, ValueError) as error:
            raise gr.Error(f"Not saved: {reason_of(error)}") from None

    async def purge(self) -> None:
        """Begins a purge. It may take minutes, so its result comes with a later look."""
        if self._purge is None or self._purge.done():
            self._purge_began = time.time()
            self._purge = self.tracker.pool.submit(self.tracker.purge)

    async def look(self, view: Any, enabled: Any, retention: Any, status: Any, ip: Any, text: Any) -> List[Any]:
        """The outputs of `build`, for the values of its inputs."""
        wanted = Filter(
            ip=str(ip or "").strip() or None,
            status=status if status in STATUSES else None,
            q=str(text or "").strip()[: Filter.LIMIT] or None,
        )
        pool = self.tracker.searchers if wanted.text else self.tracker.pool
        return await self.tracker.in_pool(self._look, View.parse(view), enabled, retention, wanted, pool=pool)

    def _look(self, shown: View, enabled: Any, retention: Any, wanted: Filter) -> List[Any]:
        import gradio as gr

        settings = self.tracker.settings
        settings.refresh()
        top, main = self._notes(), ""
        try:
            top += self.markup.figures()
            main = f"<section>{self.markup.table(shown, wanted)}</section>"
            if shown.job:
                main += f'<aside data-key="{shown.job}">{self.markup.details(shown.job)}</aside>'
        except OSError as error:
            top += self.markup.note(f"The jobs cannot be read: {reason_of(error)}", "error")
        # A control that agrees is left alone: it may be changing under somebody's hand.
        same = gr.update()
        days = self._retention()
        version = str(zlib.crc32(f"{top}\0{main}".encode()))
        html = f'<div class="top" data-version="{version}">{top}</div><div class="main">{main}</div>'
        return [
            same if enabled == settings.enabled else gr.update(value=settings.enabled),
            same if retention == days else gr.update(choices=self._retentions(), value=days),
            gr.update(interactive=not self._purging, value="Purging \u2026" if self._purging else "Purge Now"),
            same if version == shown.version else html,
        ]

    @property
    def _purging(self) -> bool:
        return self._purge is not None and not self._purge.done()

    def _notes(self) -> str:
        """What has to be said before all else."""
        settings, note, notes = self.tracker.settings, self.markup.note, ""
        if self.trouble():
            notes += note(f"Generations are not tracked: {self.trouble()}.", "error")
        elif not settings.enabled and "enabled" in settings.locked:
            notes += note(f"Tracking is off: {settings.locked['enabled']} says so.")
        elif not settings.enabled:
            notes += note("Tracking is off: generations leave no job. Enable Tracking takes effect at once.")
        if settings.trouble:
            notes += note(f"{settings.trouble}.", "error")
        if self.tracker.kept_for_clock and not self._purging:
            kept = f"{self.tracker.kept_for_clock:,} jobs are older than the retention, all from before this start."
            notes += note(f"{kept} They are kept, since the clock may be wrong. Purge Now removes them.")
        if self._purging:
            notes += note("Purging: old jobs are being removed. All else goes on meanwhile.")
        elif self._purge is not None and self._purge.exception() is not None:
            notes += note(f"The purge failed: {reason_of(self._purge.exception())}", "error")
        elif self._purge is not None:
            jobs, images, size = self._purge.result()
            off = " Retention is off, so no job is too old." if settings.retention_days is None else ""
            removed = f"removed {jobs:,} jobs, {images:,} images, {as_size(size)}.{off}"
            notes += f'<p class="note">Purge at {as_time(self._purge_began)}: {removed}</p>'
        return notes


TAB_SCRIPT = """() => {
    if (window.jobTracker) window.jobTracker.end();
    const EVERY = 1500, AWAY = 10000;  // milliseconds between two looks, and until an answer is given up
    const view = {page: 0, job: ""};
    let due = 0, asked = null, acted = false, watched = null, token = null;

    const learnToken = () => fetch("./job-tracker/token").then((answer) => answer.ok ? answer.json() : "")
        .catch(() => "").then((text) => { token = text; });
    const act = (delay = 0) => {
        acted = true;
        due = Date.now() + delay;
        tick();
    };
    const answered = () => {
        asked = null;
        if (!acted) due = Date.now() + EVERY;
        tick();
    };
    const tick = () => {
        const root = [...document.querySelectorAll("#job_tracker")].find((element) => element.offsetParent);
        if (document.hidden || !root || token === null) return;
        if (root !== watched) watch(root);
        const now = Date.now();
        if (now < due || asked !== null && now - asked < (acted ? EVERY : AWAY)) return;
        if (asked !== null) learnToken();  // no answer: the webui may be another one since a restart
        asked = now;
        acted = false;
        root.querySelector("#job_tracker_look").click();
    };

    // What is alike stays in place, so that focus, selection and a click under way live on.
    const morph = (old, fresh) => {
        if (old.isEqualNode(fresh)) return;
        if (old.nodeType !== 1 || old.nodeName !== fresh.nodeName || old.dataset.key !== fresh.dataset.key)
            return old.replaceWith(fresh.cloneNode(true));
        if (old.nodeName !== "DETAILS") {  // which are the reader's to open and close
            for (const {name} of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
            for (const {name, value} of fresh.attributes) old.setAttribute(name, value);
        }
        [...fresh.childNodes].forEach((child, place) => {
            if (old.childNodes[place]) morph(old.childNodes[place], child);
            else old.append(child.cloneNode(true));
        });
        while (old.childNodes.length > fresh.childNodes.length) old.lastChild.remove();
    };
    const changed = () => {
        watched.querySelectorAll("time:not([title])").forEach(inLocalTime);
        for (const part of [".top", ".main"]) {
            const fresh = watched.querySelector("#job_tracker_fresh " + part);
            if (fresh) morph(watched.querySelector(part), fresh);  // the first of them, not the fresh one
        }
    };
    const inLocalTime = (element) => {
        const moment = new Date(element.dateTime);
        const day = {month: "short", day: "2-digit"};
        const clock = {hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23"};
        element.title = moment.toLocaleString([], {dateStyle: "full", timeStyle: "long"});
        element.textContent = moment.toLocaleString([], {...day, ...clock});
    };
    const observer = new MutationObserver(changed);
    const watch = (root) => {
        observer.disconnect();
        observer.observe(root, {childList: true, subtree: true});
        watched = root;
        changed();
    };

    const open = (job) => {
        view.job = job;
        act();
    };
    const onClick = (event) => {
        const target = event.target.closest("#job_tracker [data-job], #job_tracker [data-page]");
        if (!target || target.tagName === "TR" && String(getSelection())) return;
        if (target.dataset.page === undefined) return open(target.dataset.job);
        view.page = Number(target.dataset.page);
        act();
    };
    const onKey = (event) => {
        if (event.key === "Escape" && view.job && watched && watched.offsetParent) open("");
    };
    document.addEventListener("click", onClick);
    document.addEventListener("keydown", onKey);
    document.addEventListener("visibilitychange", tick);
    const timer = setInterval(tick, 200);
    learnToken();

    window.jobTracker = {
        act,
        answered,
        ask: (values) => {
            const {version} = watched.querySelector("#job_tracker_fresh .top")?.dataset ?? {};
            return window.jobTracker.sign([JSON.stringify({...view, version}), ...values.slice(1)]);
        },
        sign: (values) => [...values, token ?? ""],
        filter: () => {
            view.page = 0;
            act(300);
        },
        end: () => {
            clearInterval(timer);
            observer.disconnect();
            document.removeEventListener("click", onClick);
            document.removeEventListener("keydown", onKey);
            document.removeEventListener("visibilitychange", tick);
        },
    };
}"""

TAB_STYLE = """
#job_tracker { gap: 16px; }
#job_tracker_style, #job_tracker_look, #job_tracker_fresh { display: none !important; }
#job_tracker .pending { opacity: 1; }
#job_tracker :is(b, th) { font-weight: 600; }
#job_tracker :is(small, em) { font-size: inherit; font-style: normal; color: var(--body-text-color-subdued); }
#job_tracker :is(button, p, table, figure, img, summary) { margin: 0; }
#job_tracker :is(td, nav, header) button { padding: 4px 12px; border: 1px solid var(--border-color-primary);
    border-radius: var(--radius-md); background: none; color: var(--body-text-color); cursor: pointer; }
#job_tracker :is(nav, header) button:hover { border-color: var(--color-accent); }

#job_tracker_settings { align-items: flex-start; gap: 16px; padding: 4px 0; }
#job_tracker_settings .form { display: flex; flex-flow: row wrap; gap: 16px 64px; border: 0; background: none;
    box-shadow: none; overflow: visible; }
#job_tracker_settings .block { flex: 0 1 auto; width: auto; padding: 0; border: 0 !important; background: none;
    box-shadow: none; }
#job_tracker_enabled { display: flex; flex-direction: column; gap: 6px; }
#job_tracker_enabled label { order: -1; }
#job_tracker_settings label:has(:disabled) { cursor: default; }
#job_tracker_settings label:has(:disabled):not(.selected) { opacity: 0.5; }
#job_tracker_purge { flex: none; align-self: center; margin-left: auto; padding: 6px 20px;
    border: 1px solid var(--border-color-primary); }

#job_tracker .note { margin-bottom: 8px; padding: 8px 12px; border-left: 3px solid var(--border-color-primary);
    background: var(--background-fill-secondary); color: var(--body-text-color); overflow-wrap: anywhere; }
#job_tracker .note.error { border-color: var(--color-red-500); }
#job_tracker .empty { padding: 64px 16px; border: 1px solid var(--border-color-primary);
    border-radius: var(--radius-lg); text-align: center; color: var(--body-text-color-subdued); }

#job_tracker .figures { display: grid; grid-template-columns: repeat(6, 1fr); gap: 1px; overflow: hidden;
    border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
    background: var(--border-color-primary); }
#job_tracker .figures > div { padding: 10px 14px; background: var(--background-fill-primary);
    color: var(--body-text-color-subdued); font-size: var(--text-sm); }
#job_tracker .figures b { display: block; font-size: var(--text-lg); color: var(--body-text-color);
    font-variant-numeric: tabular-nums; white-space: nowrap; }

#job_tracker span.status { white-space: nowrap; }
#job_tracker span.status::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 7px;
    border: 2px solid var(--dot); border-radius: 50%; background: var(--dot); box-sizing: border-box;
    vertical-align: 1px; }
#job_tracker .Pending { --dot: var(--body-text-color-subdued); }
#job_tracker span.Pending::before { background: none; }
#job_tracker .Processing { --dot: var(--color-accent); }
#job_tracker .Completed { --dot: var(--color-green-500); }
#job_tracker .Failed { --dot: var(--color-red-500); }
#job_tracker progress { display: block; width: 100%; height: 3px; margin: 3px 0 -6px; border: 0; border-radius: 2px;
    overflow: hidden; appearance: none; background: var(--border-color-primary); }
#job_tracker progress::-webkit-progress-bar { background: var(--border-color-primary); }
#job_tracker progress::-webkit-progress-value { background: var(--color-accent); }
#job_tracker progress::-moz-progress-bar { background: var(--color-accent); }

#job_tracker .main { display: flex; align-items: flex-start; gap: 16px; }
#job_tracker .main > * { flex: 1 1 0; min-width: 0; }
#job_tracker .frame { overflow: hidden; border: 1px solid var(--border-color-primary);
    border-radius: var(--radius-lg); }
#job_tracker table { width: 100%; border: 0; border-collapse: collapse; table-layout: fixed;
    font-size: var(--text-sm); line-height: 1.4; }
#job_tracker :is(th, td) { padding: 8px 10px; border: 0; text-align: left; vertical-align: middle; white-space: nowrap;
    overflow: hidden; text-overflow: ellipsis; color: var(--body-text-color); }
#job_tracker th { font-weight: 500; color: var(--body-text-color-subdued);
    background: var(--background-fill-secondary); }
#job_tracker :is(thead, tbody, tr) { border: 0; }
#job_tracker tbody tr { border-top: 1px solid var(--border-color-primary); cursor: pointer;
    background: none; }
#job_tracker tbody tr:is(:hover, .open) { background: var(--background-fill-secondary); }
#job_tracker tbody tr.open { box-shadow: inset 3px 0 var(--color-accent); }
#job_tracker td button { display: block; padding: 0; border: 0; font: inherit; font-family: var(--font-mono); }
#job_tracker .id { width: 100px; }
#job_tracker .time { width: calc(20px + 8.8em); }
#job_tracker .type { width: 80px; }
#job_tracker :is(th, td).status { width: 150px; }
#job_tracker .images { width: 70px; text-align: right; }
#job_tracker .seconds { width: 80px; text-align: right; font-variant-numeric: tabular-nums; }
#job_tracker .ip { width: 130px; }
#job_tracker .main:has(aside) :is(.type, .images, .seconds, .ip) { display: none; }
#job_tracker nav { display: flex; justify-content: center; align-items: center; gap: 4px; padding: 12px 0;
    font-size: var(--text-sm); white-space: nowrap; }
#job_tracker nav span { min-width: 110px; text-align: center; font-variant-numeric: tabular-nums; }
#job_tracker nav button:disabled { opacity: 0.4; cursor: default; border-color: var(--border-color-primary); }

#job_tracker .main aside { flex: 0 0 min(480px, 45%); position: sticky; top: 8px; max-height: calc(100vh - 16px);
    overflow-y: auto; padding: 0 16px; border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
    background: var(--background-fill-primary); }
#job_tracker header { display: flex; align-items: center; gap: 14px; position: sticky; top: 0; z-index: 1;
    padding: 12px 0; background: var(--background-fill-primary); }
#job_tracker header b { font-family: var(--font-mono); }
#job_tracker header button { margin-left: auto; font-size: var(--text-sm); }
#job_tracker header progress { width: 80px; margin: 2px 0 0; }
#job_tracker .gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 12px; }
#job_tracker .gallery:not(:empty), #job_tracker dl, #job_tracker details { margin: 0 0 14px; }
#job_tracker figure:only-child { grid-column: 1 / -1; }
#job_tracker figure img, #job_tracker .blank { display: block; width: 100%; max-height: 420px; object-fit: contain;
    border-radius: var(--radius-md); background: var(--background-fill-secondary); }
#job_tracker figure img { aspect-ratio: auto 1; }  /* room for what is still to come */
#job_tracker .blank { padding: 48px 8px; text-align: center; color: var(--body-text-color-subdued); }
#job_tracker figcaption { margin-top: 4px; font-size: var(--text-xs); overflow-wrap: anywhere; }
#job_tracker :is(summary, dt) { font-size: var(--text-sm); font-weight: 400; color: var(--body-text-color-subdued); }
#job_tracker summary { cursor: pointer; }
#job_tracker .text { max-height: 240px; margin-top: 4px; padding: 8px 10px; overflow: auto; white-space: pre-wrap;
    overflow-wrap: anywhere; border-radius: var(--radius-md); background: var(--background-fill-secondary);
    font-size: var(--text-sm); line-height: 1.5; }
#job_tracker dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px 16px; font-size: var(--text-sm); }
#job_tracker dl .wide { grid-column: 1 / -1; }
#job_tracker dd { margin: 0; overflow-wrap: anywhere; }

@media (max-width: 1000px) {
    #job_tracker .figures { grid-template-columns: repeat(3, 1fr); }
    #job_tracker :is(.type, .ip) { display: none; }
    #job_tracker .main aside { position: fixed; z-index: 100; inset: 0; max-height: none; border: 0; border-radius: 0; }
}
@media (max-width: 640px) {
    #job_tracker .figures { grid-template-columns: repeat(2, 1fr); }
    #job_tracker_purge { margin-left: 0; }
    #job_tracker_filters .form { display: grid; grid-template-columns: 1fr 1fr; }
    #job_tracker_filters .form > * { min-width: 0 !important; }
    #job_tracker_filters .form > :last-child { grid-column: 1 / -1; }
    #job_tracker thead { display: none; }
    #job_tracker tbody tr:first-child { border: 0; }
    #job_tracker td progress { margin: 3px 0 0; }
    #job_tracker tbody tr { display: grid; grid-template-columns: 1fr auto; padding: 8px 10px; }
    #job_tracker :is(td.id, td.prompt, td.status, td.time) { display: block; width: auto; padding: 1px 0; }
    #job_tracker td.prompt { grid-area: 1 / 1 / 2 / 3; }
    #job_tracker :is(.id, .images, .seconds):is(th, td) { display: none; }
    #job_tracker nav { flex-wrap: wrap; }
    #job_tracker nav span { flex: 1 0 100%; order: -1; }
}
"""


# ------------------------------------------------------------------------------------------------------------------
# Host: the only part that knows the webui
# ------------------------------------------------------------------------------------------------------------------


class Unsuitable(Exception):
    """The host lacks something that we rely on."""


class Extension:
    """The program inside one life of the webui, from the loading of its scripts to their unloading."""

    def __init__(self) -> None:
        settings = Settings(EXTENSION_FOLDER, dict(os.environ))
        self.tracker = Tracker(settings, self._begun, self._progress, self._interrupt, self._dequeue)
        self.trouble: Optional[str] = None  # why generations are not tracked, for the tab
        self._origins = OriginGuard(self._is_named)
        self._tab = Tab(self.tracker, self._origins, lambda: self.trouble)
        self._routes: List[Any] = []  # those that are ours, as they stand in the app
        self._app: Any = None

    def tab(self) -> List[Tuple[Any, str, str]]:
        """`ui_tabs`: the pages beside the host's own."""
        return [(self._tab.build(), "Job Tracker", "job_tracker")]

    def start(self, demo: Any, app: Any) -> None:
        """`app_started`: everything of the host is in place."""
        try:
            # gradio 3 gives every file below the webui's folder to whoever can open the UI.
            if hasattr(demo, "blocked_paths"):
                folders = {EXTENSION_FOLDER, self.tracker.settings.data_folder, self.tracker.images.folder}
                demo.blocked_paths = [*demo.blocked_paths, *folders, *map(os.path.realpath, folders)]
            self._attach(app, demo is not None)
        except Unsuitable as reason:
            self.trouble = str(reason)
            log.warning("Generations are not tracked: %s", reason)
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {reason_of(error)}"
            log.exception("Generations are not tracked, the webui is none that we know")
        if demo is not None:
            self._serve_tab(app)

    def stop(self) -> None:
        """`script_unloaded`: the webui reloads its scripts."""
        self.tracker.close()

    def _attach(self, app: Any, has_tab: bool) -> None:
        # Everything is looked up before anything is changed: it is all or nothing.
        routes = [
            (route, type_)
            for route in app.routes
            for type_ in TYPES
            if getattr(route, "path", "").endswith(f"/sdapi/v1/{type_}") and "POST" in (route.methods or ())
        ]
        if not routes:
            if has_tab:  # which is refused to foreign pages all the same
                self._put_shell_around(app)
            raise Unsuitable("the API is off. Start the webui with --api")
        if any(hasattr(route.app, "tracker") for route, _ in routes):
            raise Unsuitable("another copy of Job Tracker is at work. Remove one of them")
        owners = {}
        for route, _ in routes:
            owner = getattr(route.endpoint, "__self__", None)
            if not hasattr(owner, "queue_lock") or not callable(route.dependant.call):
                raise Unsuitable(f"{route.path} is not as in the webuis that we know")
            owners[id(owner)] = owner
        add_route = self._find_add_route(list(owners.values()))
        anyio.to_thread.current_default_thread_limiter  # noqa: B018 - missing in a foreign anyio

        self._put_shell_around(app)
        Api(self.tracker, self._origins).add_to(add_route)
        for owner in owners.values():
            owner.queue_lock = ObservedLock(owner.queue_lock)
        for route, type_ in routes:
            route.dependant.call = self._observed(route.dependant.call)
            route.app = Middleware(route.app, type_, self.tracker)
            route.openapi_extra = {**(route.openapi_extra or {}), **GENERATION_DOCS}
        app.openapi_schema = None  # it may have been asked for already
        self._app, self._routes = app, [route for route, _ in routes]
        self.tracker.watch = self._watch_routes
        settings = self.tracker.settings
        state = "on" if settings.enabled else "off"
        advice = "" if settings.enabled else self._advice(has_tab)
        log.info("Ready, tracking is %s, jobs are in %s%s", state, settings.data_folder, advice)

    def _advice(self, has_tab: bool) -> str:
        """How to turn tracking on."""
        variable = self.tracker.settings.locked.get("enabled")
        if variable:
            return f". {variable} turns it off"
        tab = 'tick Enable Tracking in the tab "Job Tracker", ' if has_tab else ""
        return f'. To turn it on, {tab}put "enabled": true into config.json, or start with TRACKER_ENABLED=1'

    def _watch_routes(self) -> None:
        """Notices when an extension that was loaded later has put a route of its own before one of ours."""
        taken = []
        for own in self._routes:
            asked = {"type": "http", "method": "POST", "path": own.path, "root_path": "", "headers": []}
            try:
                first = next((route for route in self._app.routes if route.matches(dict(asked))[0] is Match.FULL), None)
            except Exception:  # a route of a kind that we do not know
                return
            if first is not own:
                module = getattr(getattr(first, "endpoint", None), "__module__", None)
                who = f"by {module}" if module else "by another extension"
                taken.append(f"{own.path} was {'removed' if first is None else f'taken away {who}'}")
        trouble = ", ".join(taken) or None
        if trouble != self.trouble:
            self.trouble = trouble
            if trouble:
                log.warning("Generations are not tracked any more: %s", trouble)
            else:
                log.info("Generations are tracked again")

    def _serve_tab(self, app: Any) -> None:
        """What the tab asks for besides gradio: the API's images once more, and the token.

        For everyone whom gradio lets see the page, --api-auth or not.
        """
        paths = {route.path: route for route in app.routes if hasattr(route, "dependencies")}
        login = next((route.dependencies for path, route in paths.items() if path.startswith("/file=")), None)
        if login is None:
            log.warning("The tab shows no images, since gradio guards its files in an unknown way")
            return
        generation = f"/sdapi/v1/{TYPES[0]}"
        roots = {path[: -len(generation)] for path in paths if path.endswith(generation)}  # SD.Next has a subpath
        image = Api(self.tracker, self._origins).get_image
        for root in {"", *roots}:
            for path, endpoint in ((Markup.IMAGE, image), (Tab.TOKEN, self._tab.get_token)):
                app.add_api_route(root + path, endpoint, dependencies=login, include_in_schema=False)

    @staticmethod
    def _is_named(origin: str) -> bool:
        """Whether --cors-allow-origins names an origin, in the way in which the host's own CORS layer takes it."""
        from modules import shared

        def option(*names: str) -> str:
            options = getattr(shared, "cmd_opts", None)
            return next(filter(None, (getattr(options, name, None) for name in names)), "")

        # The second ones are SD.Next's.
        named = option("cors_allow_origins", "cors_origins").split(",")
        pattern = option("cors_allow_origins_regex", "cors_regex")
        with contextlib.suppress(re.error):  # Forge's pages do without the layer that would not start with it
            return "*" in named or origin in named or bool(pattern and re.fullmatch(pattern, origin))
        return False

    @staticmethod
    def _find_add_route(owners: List[Any]) -> Callable[..., Any]:
        from modules import shared

        for candidate in (*owners, getattr(shared, "api", None)):  # SD.Next has it in the latter place
            if callable(getattr(candidate, "add_api_route", None)):
                return candidate.add_api_route
        raise Unsuitable("the webui has no add_api_route")

    @staticmethod
    def _observed(endpoint: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            generation = current.get()
            if generation is not None:
                generation.called(arguments)
            return endpoint(**arguments)

        return call

    @staticmethod
    def _put_shell_around(app: Any) -> None:
        """Around the stack of layers, whether it is built already (Forge, or after the first request) or not."""
        build = app.build_middleware_stack

        def build_with_shell() -> Shell:
            return Shell(build())

        app.build_middleware_stack = build_with_shell
        if getattr(app, "middleware_stack", None) is not None:
            app.middleware_stack = Shell(app.middleware_stack)

    @staticmethod
    def _interrupt() -> None:
        from modules import shared

        shared.state.interrupt()

    @staticmethod
    def _dequeue(task: Optional[str]) -> None:
        """Takes a task off the list of those that wait: the host takes off only what has begun."""
        with contextlib.suppress(ImportError, AttributeError):  # where there is no such list
            from modules import progress

            progress.pending_tasks.pop(task, None)

    @staticmethod
    def _begun() -> Any:
        from modules import shared

        return getattr(shared.state, "time_start", None)

    @classmethod
    def _progress(cls, begun: Any) -> Progress:
        from modules import shared

        try:
            state = shared.state
            if cls._begun() == begun or state.job_count <= 0:  # the rest is from the generation before
                return 0.0
            progress = state.job_no / state.job_count
            if state.sampling_steps:
                progress += state.sampling_step / state.sampling_steps / state.job_count
            return min(max(progress, 0.0), 1.0)
        except (AttributeError, TypeError):
            return None

    def register(self, callbacks: Any) -> None:
        callbacks.on_ui_tabs(self.tab)
        callbacks.on_app_started(self.start)
        callbacks.on_script_unloaded(self.stop)


class WholeMessage(logging.Filter):
    """Makes a record's message whole before any handler has it: SD.Next puts its own on every logger.

    One of these formats the message for all that come after it, and they would fail to do so again.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = f"[Job Tracker] {record.getMessage()}", None
        return True


def log_to_console() -> None:
    """The webui shows no log below warnings by itself, and this script may be loaded more than once."""
    log.handlers.clear()
    log.filters.clear()
    log.addFilter(WholeMessage())
    log.addHandler(logging.StreamHandler(sys.stderr))
    log.setLevel(logging.INFO)
    log.propagate = False


try:
    from modules import script_callbacks
except ImportError:  # imported by a test or a tool, not by a webui
    pass
else:
    log_to_console()
    Extension().register(script_callbacks)
