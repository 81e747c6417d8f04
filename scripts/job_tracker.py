"""Job Tracker: no generation requested through the webui's API is lost.

Every `POST /sdapi/v1/txt2img` and `/sdapi/v1/img2img` becomes a job with an ID, which reaches the client in the
header `X-Job-ID` before generation starts. The job and its images are kept on disk and handed out later.

The file reads in the order in which a request meets its parts, and every part knows only those above it:

    Platform      what differs between operating systems
    Settings      config.json and the environment's variables
    Job           the record, on disk and as JSON
    JobStore      jobs.json
    ImageStore    images/
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
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import stat
import sys
import threading
import time
import zlib
from array import array
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import anyio.to_thread
from fastapi import HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

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


class FileLock:
    """A lock between processes: an open file that the system unlocks when its holder ends, however it ends.

    It also excludes other instances in the same process, since `flock` and `msvcrt.locking` belong to the open file.
    One instance is used by one thread at a time, and may be entered again while it is held.
    """

    def __init__(self, path: str):
        self.path = path
        self._file: Optional[int] = None
        self._depth = 0

    def acquire(self, blocking: bool = True) -> bool:
        """Takes the lock. False when another holds it and `blocking` is false. Raises OSError."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        if fcntl:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            except OSError as error:
                if not blocking and error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                # A file system without locks, such as some network mounts: one webui alone is as safe as ever.
            return True
        while True:
            try:
                os.lseek(self._file, 0, os.SEEK_SET)
                msvcrt.locking(self._file, msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not blocking:
                    return False
                time.sleep(0.005)

    def release(self) -> None:
        if fcntl:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        else:
            os.lseek(self._file, 0, os.SEEK_SET)
            msvcrt.locking(self._file, msvcrt.LK_UNLCK, 1)

    def close(self) -> None:
        """Gives the lock and the file back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "FileLock":
        if self._depth == 0:
            self.acquire()
        self._depth += 1
        return self

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.release()


def read_at(file: int, length: int, position: int) -> bytes:
    """`length` bytes from `position`, fewer at the end of the file. Not for two threads at once on one file."""
    if hasattr(os, "pread"):
        return os.pread(file, length, position)
    os.lseek(file, position, os.SEEK_SET)
    return os.read(file, length)


def write_at(file: int, data: bytes, position: int) -> None:
    """All of `data` at `position`. Raises OSError; a part may then have been written."""
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(file, data, position)
        else:
            os.lseek(file, position, os.SEEK_SET)
            written = os.write(file, data)
        data = data[written:]
        position += written


def sync_folder(path: str) -> None:
    """Makes the names in a folder survive a power cut. Windows has no such call and does it by itself."""
    if os.name == "nt":
        return
    folder = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts
            raise
    finally:
        os.close(folder)


def replace_file(path: str, data: bytes) -> None:
    """Puts a new file in the place of an old one: after a crash there is the one or the other, whole."""
    part = f"{path}.{secrets.token_hex(4)}.part"
    try:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        try:
            write_at(file, data, 0)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    sync_folder(os.path.dirname(path))


def set_aside(path: str) -> str:
    """Renames what cannot be used to `<path>.damaged-<time>` and returns the new name."""
    name = f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    unique, count = name, 1
    while os.path.lexists(unique):
        count += 1
        unique = f"{name}-{count}"
    os.rename(path, unique)
    return unique


# ------------------------------------------------------------------------------------------------------------------
# Settings: config.json and the environment's variables
# ------------------------------------------------------------------------------------------------------------------

DEFAULT_CONFIG = {
    "enabled": False,
    "retention_days": 30,  # null or 0: nothing is removed by age
}

BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def as_days(value: Any) -> Optional[float]:
    """A retention as a number of days, None for off. Raises ValueError for anything that is no such number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("it must be a number of days >= 0, or null")
    return float(value) or None


class Settings:
    """What the user decided. `enabled` and `retention_days` (None: off) may be read from any thread at any time.

    A variable of the environment overrides config.json for the life of the process; `locked` maps the name of such a
    setting to its variable. Nothing here raises for what a file or a variable says: it warns and goes on.
    """

    def __init__(self, folder: str, environ: Dict[str, str]):
        self.path = os.path.join(folder, "config.json")
        self.data_folder = os.path.abspath(environ.get("TRACKER_DATA_DIR", "").strip() or folder)
        self.locked: Dict[str, str] = {}
        self.enabled: bool = DEFAULT_CONFIG["enabled"]
        self.retention_days: Optional[float] = DEFAULT_CONFIG["retention_days"]
        self._lock = threading.Lock()
        self._file: Dict[str, Any] = {}
        self._version: Any = ()
        self._read_variable(environ, "TRACKER_ENABLED", "enabled", self._boolean)
        self._read_variable(environ, "TRACKER_RETENTION", "retention_days", self._days)
        self.refresh()

    @staticmethod
    def _boolean(text: str) -> bool:
        if text.lower() not in BOOLEANS:
            raise ValueError("it must be one of " + ", ".join(BOOLEANS))
        return BOOLEANS[text.lower()]

    @staticmethod
    def _days(text: str) -> Optional[float]:
        if text.lower() == "off":
            return None
        try:
            return as_days(float(text))
        except ValueError:
            raise ValueError("it must be a number of days >= 0, or off") from None

    def _read_variable(self, environ: Dict[str, str], variable: str, name: str, parse: Callable[[str], Any]) -> None:
        text = environ.get(variable, "").strip()
        if not text:
            return
        try:
            setattr(self, name, parse(text))
            self.locked[name] = variable
        except ValueError as error:
            log.warning("%s=%r is ignored: %s", variable, text[:80], error)

    def refresh(self) -> None:
        """Reads config.json again if it was changed, and makes it if it is missing."""
        with self._lock:
            try:
                status = os.stat(self.path)
                version = (status.st_ino, status.st_size, status.st_mtime_ns)
                if version != self._version:
                    self._file = self._load()
                    self._version = version
            except FileNotFoundError:
                self._file = {}
                try:
                    self._write({})
                except OSError as error:
                    if self._version != error.errno:
                        log.warning("config.json cannot be written, settings will not be kept: %s", error)
                    self._version = error.errno
            except OSError as error:
                if self._version != error.errno:
                    log.warning("config.json cannot be read, the defaults hold: %s", error)
                self._file, self._version = {}, error.errno
            self._apply()

    def save(self, **changes: Any) -> None:
        """Changes settings, at once and in config.json, which keeps what else stands in it.

        Raises ValueError for an unknown name, a value that is none, or a setting that a variable locks, and OSError
        if the file cannot be written; then nothing has changed.
        """
        for name, value in changes.items():
            if name not in DEFAULT_CONFIG:
                raise ValueError(f"there is no setting {name!r}")
            if name in self.locked:
                raise ValueError(f"{name} is set by {self.locked[name]}")
            self._check(name, value)
        self.refresh()
        with self._lock:
            self._write(changes)
            self._apply()

    @staticmethod
    def _check(name: str, value: Any) -> Any:
        if name == "retention_days":
            return as_days(value)
        if not isinstance(value, bool):
            raise ValueError("it must be true or false")
        return value

    def _load(self) -> Dict[str, Any]:
        with open(self.path, "rb") as file:
            data = file.read(1 << 20)
        try:
            config = json.loads(data.decode("utf-8-sig"))
            if not isinstance(config, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            log.warning("config.json is broken (%s), set aside as %s; the defaults hold", error, set_aside(self.path))
            raise FileNotFoundError from None
        for name in DEFAULT_CONFIG:
            try:
                self._check(name, config.get(name, DEFAULT_CONFIG[name]))
            except ValueError as error:
                log.warning("config.json: %s is ignored: %s", name, error)
                del config[name]
        return config

    def _write(self, changes: Dict[str, Any]) -> None:
        config = {**DEFAULT_CONFIG, **self._file, **changes}
        replace_file(self.path, json.dumps(config, indent=4).encode() + b"\n")
        status = os.stat(self.path)
        self._file, self._version = config, (status.st_ino, status.st_size, status.st_mtime_ns)

    def _apply(self) -> None:
        for name, default in DEFAULT_CONFIG.items():
            if name not in self.locked:
                setattr(self, name, self._check(name, self._file.get(name, default)))


# ------------------------------------------------------------------------------------------------------------------
# Job: the record, on disk and as JSON
# ------------------------------------------------------------------------------------------------------------------

PENDING, PROCESSING, COMPLETED, FAILED = STATUSES = ("Pending", "Processing", "Completed", "Failed")
ENDED = (COMPLETED, FAILED)
TYPES = ("txt2img", "img2img")

ID_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
ID_FORM = re.compile(r"[A-Za-z0-9]{8}\Z")
IMAGE_FORM = re.compile(r"\d{4}-\d\d-\d\d/([A-Za-z0-9]{8})_\d{1,6}\.[a-z]{3,4}\Z")

PROMPT_LIMIT = 100_000  # characters kept in jobs.json; `parameters` has the whole prompt


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


def new_id() -> str:
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(8))


def id_number(job_id: str) -> int:
    """One number for all spellings of an ID that differ in case only: they would name the same file on Windows."""
    return int(job_id, 36)


def as_json(data: Any) -> bytes:
    """JSON as the host writes it, but in ASCII, so that a lone surrogate is no error."""
    return json.dumps(data, separators=(",", ":")).encode()


def job_from_record(record: Any) -> Job:
    """A job from its JSON in jobs.json. Raises ValueError for anything that is no valid job."""
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    values = {name: record[name] for name in Job._fields if name in record}
    images = values.get("images", [])
    if not isinstance(images, list):
        raise ValueError("images is no list")
    values["images"] = tuple(images)
    try:
        job = Job(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if not (isinstance(job.id, str) and ID_FORM.match(job.id)):
        raise ValueError("id is no job ID")
    if job.status not in STATUSES or job.type not in TYPES:
        raise ValueError("status or type is unknown")
    for number in (job.timestamp, job.bytes):
        if type(number) is not int or not 0 <= number < 1 << 40:
            raise ValueError("timestamp or bytes is no valid number")
    for moment in (job.started, job.finished):
        if moment is not None and (type(moment) not in (int, float) or not 0 <= moment < 1 << 40):
            raise ValueError("started or finished is no valid time")
    if not isinstance(job.prompt, str):
        raise ValueError("prompt is no text")
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


def fold(text: str) -> bytes:
    """Text in the form in which it is searched, without case."""
    return text.casefold().encode("utf-8", "surrogatepass")


class Filter(NamedTuple):
    """Which jobs are wanted; all that is not None must hold."""

    ip: Optional[str] = None
    status: Optional[str] = None  # one of STATUSES
    type: Optional[str] = None  # one of TYPES
    after: Optional[float] = None  # Unix seconds, exclusive
    before: Optional[float] = None
    q: Optional[str] = None  # text in the prompt, case ignored

    @property
    def text(self) -> bytes:
        return fold(self.q or "")


class Index:
    """Where each job's record lies in jobs.json, and the fields that filters need. Holds no Job.

    A job is a slot, a number that counts up in order of acceptance; each field is an array over all slots. So a job
    takes some 150 bytes and its prompt, and a million jobs are no work for the garbage collector. A removed job keeps
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
        self.long: List[int] = []  # slots whose prompt does not fit
        self.ips: Dict[Optional[str], int] = {}
        self.keys: Dict[str, int] = {}  # idempotency key -> the ID's number; a job that is gone may still stand here
        self.unfinished: Set[int] = set()
        self.counts = [0] * len(STATUSES)
        self.total_bytes = 0
        self.lines = 0  # in the file, dead ones too

    def __len__(self) -> int:
        return sum(self.counts)

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
        else:
            slot = self.slots[number] = len(self.place)
            self.ids += job_id.encode()
            self.status.append(self.REMOVED)
            self.type.append(TYPES.index(job.type))
            self.timestamp.append(job.timestamp)
            self.ip.append(self.ips.setdefault(job.ip, len(self.ips)))
            self._add_text(slot, fold(job.prompt))
            for column in (self.place, self.length, self.bytes):
                column.append(0)
        self.place[slot] = place
        self.length[slot] = length
        self.status[slot] = STATUSES.index(job.status)
        self.bytes[slot] = job.bytes
        if job.key:
            self.keys[job.key] = number
        self._count(slot, 1)

    def copy(self, other: "Index", slot: int, place: int) -> None:
        """Takes over a slot of another index, whose record now lies at `place`."""
        own = self.slots[id_number(other.id(slot))] = len(self.place)
        self.ids += other.ids[8 * slot : 8 * slot + 8]
        self.ips, self.keys = other.ips, other.keys
        for name in ("length", "timestamp", "status", "type", "ip", "bytes"):
            getattr(self, name).append(getattr(other, name)[slot])
        self.place.append(place)
        start = other.text_start[slot]
        end = other.text_start[slot + 1] if slot + 1 < len(other.text_start) else len(other.text)
        self.text_start.append(len(self.text))
        self.text += other.text[start:end]
        if other.must_check(slot):
            self.long.append(own)
        self._count(own, 1)

    def _add_text(self, slot: int, text: bytes) -> None:
        if len(text) > self.TEXT_LIMIT:
            self.long.append(slot)
        self.text_start.append(len(self.text))
        self.text += b"\xff"
        self.text += text[: self.TEXT_LIMIT]

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

    def find(self, wanted: Filter, below: Optional[int] = None) -> Iterator[int]:
        """Slots that match, newest first. For a long prompt the text remains to be checked: see `must_check`."""
        below = len(self.place) if below is None else below
        statuses, types, timestamps, ips = self.status, self.type, self.timestamp, self.ip
        ip = self.ips.get(wanted.ip, -1)
        type_ = None if wanted.type is None else TYPES.index(wanted.type)
        status = None if wanted.status is None else STATUSES.index(wanted.status)
        after = -math.inf if wanted.after is None else wanted.after
        before = math.inf if wanted.before is None else wanted.before
        if wanted.text:
            slots: Any = self._with_text(wanted.text, below)
        elif status is not None:
            slots = self._with_status(status, below)
        else:
            slots = range(below - 1, -1, -1)
        for slot in slots:
            if (
                (statuses[slot] != self.REMOVED if status is None else statuses[slot] == status)
                and (wanted.ip is None or ips[slot] == ip)
                and after < timestamps[slot] < before
                and (type_ is None or types[slot] == type_)
            ):
                yield slot

    def _with_status(self, status: int, below: int) -> Iterator[int]:
        slot = self.status.rfind(status, 0, below)
        while slot >= 0:
            yield slot
            slot = self.status.rfind(status, 0, slot)

    def _with_text(self, text: bytes, below: int) -> Iterator[int]:
        """Slots below a slot whose kept text has `text`, or whose prompt is longer than that, newest first."""
        long = bisect.bisect_left(self.long, below) - 1
        end = self.text_start[below] if below < len(self.text_start) else len(self.text)
        while True:
            found = self.text.rfind(text, 0, end)
            slot = bisect.bisect_right(self.text_start, found) - 1 if found >= 0 else -1
            while long >= 0 and self.long[long] > slot:
                yield self.long[long]
                long -= 1
            if slot < 0:
                return
            if long >= 0 and self.long[long] == slot:
                long -= 1
            yield slot
            end = self.text_start[slot]

    def must_check(self, slot: int) -> bool:
        """Whether only the record tells if the prompt has a text."""
        at = bisect.bisect_left(self.long, slot)
        return at < len(self.long) and self.long[at] == slot


class Page(NamedTuple):
    """Jobs that match, newest first; `more` when there are others after the last of them."""

    jobs: List[Job]
    more: bool


class Damaged(NamedTuple):
    """A line of jobs.json that is no record."""

    place: int
    data: bytes


class Change(NamedTuple):
    """What waits to be written to jobs.json."""

    id: str
    job: Optional[Job]  # None: its end
    written: Future
    new: bool


class JobStore:
    """Jobs in a JSON file that is appended to in place and is valid JSON after every write.

    The file is an object from ID to record, a record a line; later lines win, as they do for every reader of JSON
    with duplicate keys, and `null` ends a job. A change is one write over the closing brace. When dead lines
    outnumber live ones, the live ones go to a new file that replaces the old.

    One thread, the store's own, writes the file and the index. It does one small piece of work at a time, and what
    waits to be written comes first, all of it with one fsync. Loading and compacting are such pieces, so neither the
    start nor a compaction with a million jobs keeps a request waiting.

    Any thread may call any method; none is for the event loop. Several processes may share the file: each holds
    `jobs.json.lock` while it writes, and follows what the others appended or replaced. What a Future of `put` or
    `remove` reports done survives a crash and a power cut.
    """

    HEAD, TAIL, EMPTY = b"{", b"\n}\n", b"{\n}\n"
    LINE = re.compile(rb'"([A-Za-z0-9]{8})": (\{.*\}|null)\Z', re.DOTALL)
    ANYWHERE = re.compile(r'(?<!\\)"([A-Za-z0-9]{8})"\s*:\s*(?=\{)')
    PIECE = 1 << 18  # bytes read between two looks at what waits to be written
    LINE_LIMIT = 1 << 23  # a longer line is damage
    SPARE_DEAD = 1000  # dead lines that are not worth a compaction
    RETRY = 5.0  # seconds until a write that failed is tried again

    def __init__(self, folder: str):
        self.path = os.path.join(folder, "jobs.json")
        self.owner = secrets.token_hex(4)
        self._lock = threading.RLock()  # guards the file's handle, the index and what is unwritten
        self._file: Optional[int] = None
        self._index = Index()
        self._seen = 0  # the index knows the file up to here
        self._unwritten: Dict[str, Job] = {}  # what the file does not have yet, or the index has not read yet
        self._damage: List[Damaged] = []
        self._between = FileLock(self.path + ".lock")
        self._alive: Optional[FileLock] = None  # held for as long as this process lives
        self._work = threading.Condition()  # guards what follows
        self._queue: List[Change] = []
        self._chores: Deque[Tuple[Iterator[None], Future]] = deque()
        self._following: Optional[Future] = None
        self._closing = False
        self._retry: Dict[str, Change] = {}  # of the thread alone, as are the others
        self._not_before = 0.0  # of the next compaction, after one that failed
        self._said: Optional[str] = None
        self._thread = threading.Thread(target=self._run, name="job-tracker-store", daemon=True)
        self._thread.start()

    # What others call

    def put(self, job: Job, new: bool = False) -> Future:
        """Keeps a job as it is now. The Future ends when that is on disk, or with OSError.

        A new job that cannot be written is not kept. A change that cannot be written is in force all the same, and is
        tried again until it is written or the process ends.
        """
        with self._lock:
            self._unwritten[job.id] = job
            slot = self._index.slot(job.id)
            if slot is not None:
                self._index.apply(job.id, job, self._index.place[slot], self._index.length[slot])
        return self._enqueue([Change(job.id, job, Future(), new)])

    def remove(self, ids: List[str]) -> Future:
        """Ends one or more jobs. The Future ends when that is on disk, or with OSError; then it is tried again."""
        with self._lock:
            for job_id in ids:
                self._unwritten.pop(job_id, None)
                if self._index.slot(job_id) is not None:
                    self._index.apply(job_id, None, 0, 0)
        return self._enqueue([Change(job_id, None, Future(), False) for job_id in ids])

    def knows(self, job_id: str) -> bool:
        """Whether an ID is taken, in any spelling. What is still being loaded is not looked at."""
        with self._lock:
            return id_number(job_id) in self._index.slots or job_id in self._unwritten

    def get(self, job_id: str) -> Optional[Job]:
        """A job, None if there is none. Waits while the file is being loaded. Raises OSError."""
        if not ID_FORM.match(job_id):
            return None
        with self._lock:
            job = self._unwritten.get(job_id)
        if job is not None:
            return job
        self._follow()
        with self._lock:
            slot = self._index.slot(job_id)
            return None if slot is None else self._read(slot)

    def with_key(self, key: str) -> Optional[Job]:
        """The latest job with an idempotency key, None if there is none. Raises OSError."""
        self._follow()
        with self._lock:
            slot = self._index.slots.get(self._index.keys.get(key, -1))
            if slot is None or self._index.status[slot] == Index.REMOVED:
                return None
            job = self._read(slot)
        return job if job is not None and job.key == key else None

    def query(
        self,
        wanted: Filter,
        limit: int,
        skip: int = 0,
        after_id: Optional[str] = None,
        after_time: int = 0,
    ) -> Page:
        """The newest jobs that match: at most `limit`, without the first `skip`, or those that come after a job.

        If the job `after_id` is no longer known, those that are not newer than `after_time` (Unix seconds). Raises
        OSError.
        """
        self._follow()
        jobs: List[Job] = []
        with self._lock:
            below = None
            if after_id is not None:
                below = self._index.slots.get(id_number(after_id))
                if below is None:
                    times = self._index.timestamp
                    below = next((slot + 1 for slot in range(len(times) - 1, -1, -1) if times[slot] <= after_time), 0)
            for slot, job in self._matching(wanted, below):
                if skip > 0:
                    skip -= 1
                elif len(jobs) == limit:
                    return Page(jobs, True)
                else:
                    job = job or self._read(slot)
                    if job is not None:
                        jobs.append(job)
        return Page(jobs, False)

    def count(self, wanted: Filter) -> int:
        """How many jobs match. Raises OSError."""
        self._follow()
        with self._lock:
            return len(self._index) if wanted == Filter() else sum(1 for _ in self._matching(wanted))

    def figures(self) -> Tuple[Dict[str, int], int]:
        """Jobs by status, and the bytes of all their files. Raises OSError."""
        self._follow()
        with self._lock:
            return dict(zip(STATUSES, self._index.counts)), self._index.total_bytes

    def expired(self, before: float) -> List[str]:
        """IDs of ended jobs accepted before a time (Unix seconds), oldest first. Raises OSError."""
        self._follow()
        with self._lock:
            index = self._index
            old = [slot for slot in index.find(Filter(before=before)) if STATUSES[index.status[slot]] in ENDED]
            return [index.id(slot) for slot in reversed(old)]

    def recover(self, fail: Callable[[Job], Job]) -> Future:
        """Changes each unfinished job of a process that is gone by `fail`, once among all processes that try.

        The Future gives the changed jobs, or OSError.
        """
        return self._add_chore(self._recover(fail))

    def close(self) -> None:
        """Writes what waits to be written and ends the thread."""
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join()

    # The thread and what it is asked for

    def _enqueue(self, changes: List[Change]) -> Future:
        with self._work:
            if self._closing and not self._thread.is_alive():
                raise OSError("the store is closed")
            self._queue += changes
            self._work.notify()
        return changes[-1].written

    def _add_chore(self, chore: Iterator[None]) -> Future:
        future: Future = Future()
        with self._work:
            self._chores.append((chore, future))
            self._work.notify()
        return future

    def _follow(self, wait: bool = True) -> None:
        """Waits until the index knows all that the file holds. Raises OSError if the file cannot be used."""
        if wait and self._is_current():
            return
        with self._work:
            future = self._following
            if future is None:
                if self._closing and not self._thread.is_alive():
                    raise OSError("the store is closed")
                future = self._following = Future()
                self._chores.append((self._load(), future))
                self._work.notify()
        if wait:
            future.result()

    def _is_current(self) -> bool:
        try:
            status = os.stat(self.path)
            with self._lock:
                if self._file is None or self._following is not None:
                    return False
                own = os.fstat(self._file)
                return os.path.samestat(status, own) and status.st_size == self._seen + len(self.TAIL)
        except OSError:
            return False

    def _run(self) -> None:
        self._follow(wait=False)
        while True:
            with self._work:
                retry = False
                if not (self._queue or self._chores or self._closing):
                    retry = not self._work.wait(self.RETRY if self._retry else None)
                changes, self._queue = self._queue, []
                chore = self._chores[0] if self._chores else None
                if not changes and not chore and self._closing:
                    break
            if changes or retry:
                self._write(changes)
            elif chore:
                self._do_piece(*chore)
        self._close_files()

    def _do_piece(self, chore: Iterator[None], future: Future) -> None:
        result, failure = None, None
        try:
            next(chore)
            return
        except StopIteration as end:
            result = end.value
        except Exception as error:
            failure = error
        with self._work:
            self._chores.popleft()
            if future is self._following:
                self._following = None
        if failure is None:
            self._said = None
            future.set_result(result)
        else:
            self._say(failure)
            future.set_exception(failure)
        self._consider_compacting()

    def _consider_compacting(self) -> None:
        if self._index.dead > len(self._index) + self.SPARE_DEAD and time.monotonic() >= self._not_before:
            if not self._chores:
                self._add_chore(self._compact())

    def _say(self, error: Exception) -> None:
        """One line for a trouble, not one for each time that it shows."""
        text = f"{type(error).__name__}: {error}"
        if text != self._said:
            self._said = text
            log.error("jobs.json cannot be used: %s", text)

    # Opening

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Holds the lock between processes, with the file open that the name stands for now."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with self._between:
            if self._alive is None:
                alive = FileLock(f"{self.path}.owner-{self.owner}")
                alive.acquire()
                self._alive = alive
            if not self._is_same_file():
                self._open()
            yield

    def _is_same_file(self) -> bool:
        if self._file is None:
            return False
        own = os.fstat(self._file)
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.path), own) and own.st_size >= self._seen
        return False

    def _open(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None
            self._index, self._seen, self._damage = Index(), len(self.HEAD), []
        try:
            file = self._open_file()
        except (IsADirectoryError, PermissionError) as error:
            log.warning("jobs.json cannot be opened (%s), set aside as %s", error, set_aside(self.path))
            file = self._open_file()
        head = read_at(file, 2, 0)
        if not head:
            write_at(file, self.EMPTY, 0)
            os.fsync(file)
            sync_folder(os.path.dirname(self.path))
        elif head not in (b"{\n", b"{\r", b"{}", b"{"):
            os.close(file)
            self._rewrite_foreign()
            file = self._open_file()
        self._file = file

    def _open_file(self) -> int:
        if os.path.isdir(self.path):  # Windows would say "permission denied"
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        return os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)

    def _close_files(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
        if self._alive is not None:
            with contextlib.suppress(OSError):
                if os.name != "nt":  # which removes no open file
                    os.unlink(self._alive.path)
                self._alive.close()
        self._between.close()

    # Damage

    def _rewrite_foreign(self) -> None:
        """Takes over a file that is laid out in another way, by an editor or jq, or is no JSON at all."""
        aside = set_aside(self.path)
        with open(aside, "rb") as file:
            text = file.read().decode("utf-8", "surrogateescape")
        decoder, end, jobs = json.JSONDecoder(), 0, {}
        for match in self.ANYWHERE.finditer(text):
            if match.start() < end:
                continue
            with contextlib.suppress(ValueError, RecursionError):
                record, end = decoder.raw_decode(text, match.end())
                job = job_from_record(record)
                jobs[job.id] = job
        lines = ",\n".join(f'"{job.id}": {as_json(job._asdict()).decode()}' for job in jobs.values())
        replace_file(self.path, f"{{\n{lines}\n}}\n".encode() if lines else self.EMPTY)
        log.warning("jobs.json was not as written by this program: kept %d jobs, the old file is %s", len(jobs), aside)

    def _set_damage_aside(self, damage: List[Damaged]) -> None:
        if not damage:
            return
        path = f"{self.path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            with open(path, "ab") as file:
                file.writelines(part.data + b"\n" for part in damage)
            kept = f"set aside in {path}"
        except OSError as error:
            kept = f"and could not be set aside: {error}"
        log.warning("jobs.json: %d damaged lines, from byte %d on, %s", len(damage), damage[0].place, kept)

    def _end(self) -> int:
        """Where the next line goes. Mends a file whose end was cut off."""
        size = os.fstat(self._file).st_size
        end = size - len(self.TAIL)
        if end >= len(self.HEAD) and read_at(self._file, len(self.TAIL), end) == self.TAIL:
            return end
        start = max(self._seen, size - 2 * self.LINE_LIMIT)
        good, damage = None, []
        for *_, place, length in self._parse(read_at(self._file, size - start, start), start, damage):
            good = place + length
        if good is None:
            if damage and not start == self._seen > len(self.HEAD):
                self._rewrite_foreign()
                self._open()
                return self._end()
            good = start
        self._set_damage_aside([part for part in damage if part.place >= good])
        write_at(self._file, self.TAIL, good)
        os.ftruncate(self._file, good + len(self.TAIL))
        os.fsync(self._file)
        return good

    # Reading

    def _load(self) -> Iterator[None]:
        """Reads what the index does not know yet, a piece at a time."""
        before, began = len(self._index), time.monotonic()
        while True:
            with self._exclusive():
                end = self._end()
            if self._seen >= end:
                break
            yield from self._read_lines(end)
        damage, self._damage = self._damage, []
        if damage and not self._index.lines:
            with self._exclusive():
                self._rewrite_foreign()
            yield from self._load()
        elif damage:
            self._set_damage_aside(damage)
            yield from self._compact()
        if time.monotonic() - began > 1:
            log.info("jobs.json: %d jobs loaded in %.1f s", len(self._index) - before, time.monotonic() - began)

    def _read_lines(self, end: int) -> Iterator[None]:
        """Brings the index from where it is to `end`, the end of a line."""
        file, step = self._file, self.PIECE
        while self._seen < end and self._file is file:
            data = read_at(file, min(step, end - self._seen), self._seen)
            if self._seen + len(data) < end:
                cut = data.rfind(b"\n", 1)
                if cut < 0 and step < self.LINE_LIMIT:
                    step *= 2
                    continue
                data = data[:cut] if cut > 0 else data
                step = self.PIECE
            with self._lock:
                for found in self._parse(data, self._seen, self._damage):
                    self._apply(*found)
                self._seen += len(data)
            yield

    @classmethod
    def _parse(cls, data: bytes, base: int, damage: List[Damaged]) -> Iterator[Tuple[str, Optional[Job], int, int]]:
        """The lines of a part of the file that lies at `base`: ID, job or None, place and length of the record."""
        place = base
        for line in data.split(b"\n"):
            text = line.rstrip(b", \r\t")
            match = cls.LINE.match(text)
            if match:
                try:
                    job_id, job = match.group(1).decode(), None
                    if match.group(2) != b"null":
                        job = job_from_record(json.loads(match.group(2).decode()))
                        if job.id != job_id:
                            raise ValueError("the ID is not the key")
                    yield job_id, job, place + match.start(2), len(match.group(2))
                except (ValueError, RecursionError):
                    match = None
            if not match and text not in (b"", b"{", b"}"):
                damage.append(Damaged(place, line))
            place += len(line) + 1

    def _apply(self, job_id: str, job: Optional[Job], place: int, length: int) -> None:
        """A line of the file."""
        latest = self._unwritten.get(job_id)
        if latest is not None and job is not None:
            # A later change is in force already, though its line is still to come.
            self._index.apply(job_id, latest, place, length)
        else:
            self._index.apply(job_id, job, place, length)
        self._index.lines += 1
        if latest is not None and latest == job:
            del self._unwritten[job_id]

    def _matching(self, wanted: Filter, below: Optional[int] = None) -> Iterator[Tuple[int, Optional[Job]]]:
        """Slots, and the job where it had to be read for finding out."""
        for slot in self._index.find(wanted, below):
            job = None
            if wanted.text and self._index.must_check(slot):
                job = self._read(slot)
                if job is None or wanted.text not in fold(job.prompt):
                    continue
            yield slot, job

    def _read(self, slot: int) -> Optional[Job]:
        job = self._unwritten.get(self._index.id(slot))
        if job is not None:
            return job
        data = read_at(self._file, self._index.length[slot], self._index.place[slot])
        try:
            return job_from_record(json.loads(data.decode()))
        except ValueError:
            log.error("jobs.json: the record of job %s can no longer be read", self._index.id(slot))
            return None

    # Writing

    def _write(self, changes: List[Change]) -> None:
        changes = [*self._retry.values(), *changes]
        self._retry = {}
        try:
            with self._exclusive():
                self._append([(change.id, change.job) for change in changes])
            os.fsync(self._file)
        except Exception as error:
            self._say(error)
            for change in changes:
                if not change.new:
                    self._retry[change.id] = change._replace(written=Future())
                    continue
                with self._lock:
                    if self._unwritten.get(change.id) is change.job:
                        del self._unwritten[change.id]
            for change in changes:
                change.written.set_exception(error)
            return
        self._said = None
        for change in changes:
            change.written.set_result(None)
        self._consider_compacting()

    def _append(self, changes: List[Tuple[str, Optional[Job]]]) -> None:
        end = self._end()
        parts, places, position = [], [], end
        for job_id, job in changes:
            record = b"null" if job is None else as_json(job._asdict())
            start = (b",\n" if position > len(self.HEAD) else b"\n") + f'"{job_id}": '.encode()
            places.append((job_id, job, position + len(start), len(record)))
            parts += (start, record)
            position += len(start) + len(record)
        try:
            write_at(self._file, b"".join(parts) + self.TAIL, end)
        except OSError:
            # As it was: these bytes have their place on disk already, even when there is no more.
            write_at(self._file, self.TAIL, end)
            os.ftruncate(self._file, end + len(self.TAIL))
            raise
        with self._lock:
            if self._seen == end:
                for change in places:
                    self._apply(*change)
                self._seen = position

    def _compact(self) -> Iterator[None]:
        """Writes the live lines to a new file, a piece at a time, and puts it in the place of the old."""
        old, index, known = self._file, self._index, self._seen
        path = f"{self.path}.{self.owner}.part"
        fresh, position, unsynced = Index(), len(self.HEAD), 0
        out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
        try:
            write_at(out, self.HEAD, 0)
            copied = 0
            while copied < len(index.place):
                parts, start = [], position
                with self._lock:
                    if self._file is not old:
                        return
                    slots = range(copied, min(copied + 200, len(index.place)))
                    for slot in slots:
                        if index.status[slot] == Index.REMOVED:
                            continue
                        record = read_at(old, index.length[slot], index.place[slot])
                        before = (b",\n" if position > len(self.HEAD) else b"\n") + f'"{index.id(slot)}": '.encode()
                        fresh.copy(index, slot, position + len(before))
                        fresh.lines += 1
                        parts += (before, record)
                        position += len(before) + len(record)
                copied = slots.stop
                write_at(out, b"".join(parts), start)
                unsynced += position - start
                if unsynced > 1 << 22:
                    os.fsync(out)
                    unsynced = 0
                yield
            os.fsync(out)
            yield from self._forget_keys(index)
            with self._exclusive():
                if self._file is not old:
                    return
                end = self._end()
                tail = read_at(old, end - known, known)
                if position == len(self.HEAD):
                    tail = tail.lstrip(b",")
                write_at(out, tail + self.TAIL, position)
                os.fsync(out)
                for found in self._parse(tail, position, []):
                    fresh.apply(*found)
                    fresh.lines += 1
                with self._lock:
                    # Windows replaces no open file.
                    os.close(out)
                    os.close(old)
                    self._file = out = None
                    try:
                        os.replace(path, self.path)
                    except OSError:
                        self._file = self._open_file()
                        raise
                    self._file = self._open_file()
                    self._index, self._seen = fresh, position + len(tail)
                sync_folder(os.path.dirname(self.path))
        except OSError as error:
            self._not_before = time.monotonic() + 600
            log.warning("jobs.json could not be compacted, it will be tried again: %s", error)
        finally:
            if out is not None:
                os.close(out)
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _forget_keys(self, index: Index) -> Iterator[None]:
        """Forgets the keys of jobs that are gone."""
        for count, (key, number) in enumerate(list(index.keys.items())):
            with self._lock:
                slot = index.slots.get(number)
                if slot is None or index.status[slot] == Index.REMOVED:
                    del index.keys[key]
            if count % 500 == 0:
                yield

    def _recover(self, fail: Callable[[Job], Job]) -> Iterator[None]:
        yield from self._load()
        changed: List[Job] = []
        with self._exclusive():
            for _ in self._read_lines(self._end()):
                pass
            gone: Dict[Optional[str], bool] = {self.owner: False}
            with self._lock:
                unfinished = [self._read(slot) for slot in sorted(self._index.unfinished)]
            for job in unfinished:
                if job is None:
                    continue
                if job.owner not in gone:
                    gone[job.owner] = self._is_gone(job.owner)
                if gone[job.owner]:
                    changed.append(fail(job))
            if changed:
                self._append([(job.id, job) for job in changed])
                os.fsync(self._file)
            self._remove_leftovers()
        return changed

    def _is_gone(self, owner: Optional[str]) -> bool:
        """Whether a process has ended: then its lock can be had."""
        path = f"{self.path}.owner-{owner}"
        if owner is None or not re.match(r"[0-9a-f]{8}\Z", owner) or not os.path.exists(path):
            return True
        lock = FileLock(path)
        try:
            return lock.acquire(blocking=False)
        finally:
            lock.close()

    def _remove_leftovers(self) -> None:
        """Removes the files of processes that are gone."""
        folder, name = os.path.split(self.path)
        form = re.compile(re.escape(name) + r"\.(?:owner-([0-9a-f]{8})|([0-9a-f]{8})\.part)\Z")
        for entry in os.listdir(folder):
            match = form.match(entry)
            owner = match and (match.group(1) or match.group(2))
            if owner and owner != self.owner and self._is_gone(owner):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, entry))

    def _close_files(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
        if self._alive is not None:
            with contextlib.suppress(OSError):
                if os.name != "nt":
                    os.unlink(self._alive.path)
                self._alive.close()
        self._between.close()


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
MEDIA_TYPES["txt"] = "text/plain; charset=utf-8"
OTHER_MEDIA_TYPE = "application/octet-stream"


class Answer(NamedTuple):
    """What the host answered: its images as base64, and its JSON with an empty list in their place."""

    images: List[Union[bytes, memoryview]]
    rest: bytes


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
            json.loads(rest.decode())
            return Answer(images, rest)
    data = json.loads(body.decode())
    if not isinstance(data, dict):
        raise ValueError("the answer is no JSON object")
    found = data.pop("images", None) or []
    rest = as_json({"images": [], **data})
    return Answer([str(image).encode("utf-8", "surrogatepass") for image in found], rest)


class ImageStore:
    """The files of jobs, in a folder for each day. Every method may block, and raises OSError unless it says else.

    A file is whole once it has its name, and it has its name before a record names it. No symbolic link below the
    folder is followed.
    """

    PIECE = 3 << 16  # bytes, a multiple of 3: there base64 can be cut

    def __init__(self, folder: str):
        self.folder = folder

    def save(self, job: Job, answer: Answer) -> Job:
        """Stores an answer, safe from a power cut, and returns the job with the names and the size of its files."""
        folder = os.path.join(self.folder, job.day)
        os.makedirs(folder, exist_ok=True)
        self._refuse_link(folder)
        names: List[str] = []
        try:
            total = self._write(job.answer, [answer.rest])
            for number, image in enumerate(answer.images):
                name, size = self._save_image(f"{job.day}/{job.id}_{number}", image)
                names.append(name)
                total += size
            sync_folder(folder)
            sync_folder(self.folder)
        except BaseException:
            self.remove([job.answer, *names])
            raise
        return job._replace(images=tuple(names), bytes=total)

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
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
            try:
                for piece in pieces:
                    write_at(file, piece, size)
                    size += len(piece)
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        return size

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
        """In bytes; None if the file is not there or cannot be read. Does not raise."""
        try:
            file, size = self.open(name)
        except OSError:
            return None
        os.close(file)
        return size

    def read(self, name: str) -> Iterator[bytes]:
        """A file's bytes, `PIECE` at a time."""
        file, _ = self.open(name)
        try:
            position = 0
            while True:
                data = read_at(file, self.PIECE, position)
                if not data:
                    return
                yield data
                position += len(data)
        finally:
            os.close(file)

    def read_as_json(self, name: str) -> Iterator[bytes]:
        """The JSON string that the host answered for this file, a piece at a time."""
        if name.endswith(".txt"):
            yield as_json(b"".join(self.read(name)).decode("utf-8", "surrogatepass"))
            return
        yield b'"'
        for data in self.read(name):
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
        """Names of all files that were last changed before a time (Unix seconds)."""
        try:
            days = sorted(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for day in days:
            folder = os.path.join(self.folder, day)
            if not re.match(r"\d{4}-\d\d-\d\d\Z", day) or os.path.islink(folder) or not os.path.isdir(folder):
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if entry.stat(follow_symlinks=False).st_mtime < before and not entry.is_dir(follow_symlinks=False):
                            yield f"{day}/{entry.name}"


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


class Conflict(Exception):
    """What was asked for does not go with the job's status."""


class Claim:
    """That a generation was the first with its idempotency key. Others with the key wait for what becomes of it."""

    def __init__(self, digest: str):
        self.digest = digest  # of the request's body
        self.job_id: Future = Future()  # None: it was no job in the end


Progress = Tuple[Optional[float], Optional[float]]  # 0 to 1, and the seconds that are left; None where unknown


class Tracker:
    """A job's life, and the only writer of both stores.

    `accept`, `start`, and `finish` or `fail` are called in this order, from any thread, and never raise for the disk:
    a trouble is logged and stands in the job. What they set is seen by `get` and by the store's queries at once.
    """

    ORPHAN_AGE = 3600  # seconds; a younger file may belong to a job that is being stored
    PURGE_EVERY = 6 * 3600
    RECOVER_EVERY = 60  # seconds between two looks for processes that are gone
    LOOK_EVERY = 5  # seconds between two looks at config.json

    def __init__(self, settings: Settings, progress: Callable[[], Progress], interrupt: Callable[[], None]):
        """`progress` and `interrupt` are the host's, for the generation that has its queue lock."""
        self.settings = settings
        self.progress = progress
        self.interrupt = interrupt
        self.store = JobStore(settings.data_folder)
        self.images = ImageStore(os.path.join(settings.data_folder, "images"))
        self.pool = ThreadPoolExecutor(8, "job-tracker")
        self.next_purge: Optional[float] = None  # Unix seconds
        self._lock = threading.Lock()
        self._running: Dict[str, Job] = {}  # jobs of this process that have not ended, in order of acceptance
        self._accepted: Dict[str, Future] = {}
        self._cancels: Dict[str, Callable[[], None]] = {}
        self._waiting: Dict[str, List[Callable[[], None]]] = {}
        self._claims: Dict[str, Claim] = {}
        self._purging = threading.Lock()
        self._stop = threading.Event()
        self._housekeeper = threading.Thread(target=self._keep_house, name="job-tracker-housekeeping", daemon=True)
        self._housekeeper.start()

    # A job's way

    def reserve_id(self) -> str:
        """An ID that no job has, in any spelling. What is still being loaded is not looked at."""
        job_id = new_id()
        while self.store.knows(job_id):
            job_id = new_id()
        return job_id

    def accept(self, job: Job, cancel: Callable[[], None]) -> Future:
        """A new job. The Future ends when it is on disk, or with OSError: then there is no job.

        `cancel` is called for a job that is to be cancelled; its generation then sees to it that the job fails.
        """
        with self._lock:
            written = self.store.put(job._replace(owner=self.store.owner), new=True)
            self._running[job.id] = job._replace(owner=self.store.owner)
            self._accepted[job.id] = written
            self._cancels[job.id] = cancel
        written.add_done_callback(lambda future: future.exception() and self._forget(job.id))
        return written

    def _forget(self, job_id: str) -> None:
        log.error("A generation is not tracked, since its job could not be stored")
        with self._lock:
            for jobs in (self._running, self._accepted, self._cancels):
                jobs.pop(job_id, None)

    def start(self, job_id: str) -> None:
        """The job has the queue lock: generation begins."""
        self._change(job_id, status=PROCESSING, started=time.time())

    def finish(self, job_id: str, answer: Answer, prompt: str = "") -> None:
        """The host answered with success. Stores the images; a job whose images cannot be stored has failed.

        `prompt` is the one that the host used, for a request that named none.
        """
        with self._lock:
            job = self._running.get(job_id)
        if job is None:
            return
        try:
            job = self.images.save(job, answer)
        except Exception as error:
            log.error("Job %s was generated, but its images could not be stored: %s", job_id, error)
            self.fail(job_id, f"Generated, but the images could not be stored: {error}")
            return
        prompt = job.prompt or prompt[:PROMPT_LIMIT]
        self._change(
            job_id, status=COMPLETED, finished=time.time(), prompt=prompt, images=job.images, bytes=job.bytes
        )

    def fail(self, job_id: str, error: str) -> None:
        """The job ends without images. `error` is for its user."""
        self._change(job_id, status=FAILED, finished=time.time(), error=error[:2000])

    def _change(self, job_id: str, **changes: Any) -> None:
        with self._lock:
            if job_id not in self._running:
                return
            self._running[job_id] = self._running[job_id]._replace(**changes)
            accepted = self._accepted[job_id]
        accepted.add_done_callback(lambda accepted: self._write(job_id, accepted))  # at once, when that is done

    def _write(self, job_id: str, accepted: Future) -> None:
        """Stores a job as it is by now: two changes may come here in either order."""
        with self._lock:
            job = self._running.get(job_id)
            if job is None or accepted.exception() is not None:
                return
            written = self.store.put(job)
            waiting = []
            if job.ended:
                del self._running[job_id], self._accepted[job_id], self._cancels[job_id]
                waiting = self._waiting.pop(job_id, [])

        def report(written: Future) -> None:
            if written.exception() is not None:
                log.error("Job %s is %s, which could not be written yet: %s", job_id, job.status, written.exception())

        written.add_done_callback(report)
        for wake in waiting:
            wake()

    # Looking at jobs

    def get(self, job_id: str) -> Optional[Job]:
        """A job as it is now, None if there is none. Raises OSError."""
        with self._lock:
            job = self._running.get(job_id)
        return job or self.store.get(job_id)

    def is_own(self, job_id: str) -> bool:
        """Whether a job waits or runs in this process."""
        with self._lock:
            return job_id in self._running

    def position(self, job_id: str) -> Optional[int]:
        """Where a Pending job stands in the queue, 1 is next. None for any other, or one of another process."""
        with self._lock:
            pending = [job.id for job in self._running.values() if job.status == PENDING]
        return pending.index(job_id) + 1 if job_id in pending else None

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
                    job = await loop.run_in_executor(self.pool, self.get, job_id)
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

    def describe(self, job: Job) -> Dict[str, Any]:
        """A job as the API shows it, without its images. Reads the file with the answer."""
        parameters = info = progress = eta = None
        error = job.error
        if job.status == COMPLETED:
            try:
                answer = json.loads(b"".join(self.images.read(job.answer)).decode())
                parameters, info = answer.get("parameters"), answer.get("info")
            except (OSError, ValueError, AttributeError):
                error = "The parameters are no longer on disk"
        if job.status == PROCESSING and self.is_own(job.id):
            progress, eta = self.progress()
        return {
            "id": job.id,
            "type": job.type,
            "status": job.status,
            "prompt": job.prompt,
            "timestamp": job.timestamp,
            "ip": job.ip,
            "started": job.started,
            "finished": job.finished,
            "error": error,
            "queue_position": self.position(job.id),
            "progress": progress,
            "eta": eta,
            "parameters": parameters,
            "info": info,
            "image_count": len(job.images),
        }

    def as_json(self, job: Job) -> Iterator[bytes]:
        """A job as the API shows it, with its images, a piece at a time."""
        there = [self.images.size(name) is not None for name in job.images]
        description = self.describe(job)
        if not all(there):
            description["error"] = f"{there.count(False)} of {len(there)} images are no longer on disk"
        yield as_json(description)[:-1] + b',"images":['
        yield from self._images_as_json(job, there)
        yield b"]}"

    def answer_as_json(self, job: Job) -> Iterator[bytes]:
        """What the host answered, once more, a piece at a time. Raises OSError."""
        rest = b"".join(self.images.read(job.answer))
        start = IMAGES_START.match(rest)
        if not start:
            raise OSError(errno.EIO, "the stored answer is damaged", job.answer)
        yield rest[: start.end()]
        if json.loads(rest.decode())["parameters"].get("send_images", True):
            yield from self._images_as_json(job, [True] * len(job.images))
        yield rest[start.end() :]

    def _images_as_json(self, job: Job, there: List[bool]) -> Iterator[bytes]:
        for number, name in enumerate(job.images):
            if number:
                yield b","
            if there[number]:
                yield from self.images.read_as_json(name)
            else:
                yield b"null"

    # Idempotency

    def claim(self, key: str, digest: str) -> Tuple[Claim, bool]:
        """Who was first with a key, and whether that is the caller, who then must `release` the claim at its end.

        A Failed job frees its key. Raises OSError.
        """
        with self._lock:
            claim = self._claims.get(key)
        if claim is None:
            job = self.store.with_key(key)
            with self._lock:
                claim = self._claims.get(key)
                if claim is None and (job is None or job.status == FAILED):
                    claim = self._claims[key] = Claim(digest)
                    return claim, True
            if claim is None:
                claim = Claim(job.digest or "")
                claim.job_id.set_result(job.id)
        return claim, False

    def release(self, key: str, claim: Claim) -> None:
        """The generation of a claim has ended, as a job or as none."""
        with self._lock:
            del self._claims[key]
        if not claim.job_id.done():
            claim.job_id.set_result(None)

    # The end of jobs

    def cancel(self, job_id: str) -> bool:
        """Takes a job out of the queue or interrupts it. False if there is none. Raises Conflict, OSError.

        A Pending job has failed when this returns, a Processing one fails when the host has stopped it.
        """
        with self._lock:
            cancel = self._cancels.get(job_id)
        if cancel is not None:
            cancel()
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
        self.store.remove([job.id for job in jobs]).result()
        freed = self.images.remove(name for job in jobs for name in (*job.images, job.answer))
        return Purged(len(jobs), sum(len(job.images) for job in jobs), freed)

    def purge(self) -> Purged:
        """Removes the jobs that are older than the retention, with their files, and files that no job names.

        One purge at a time; a second caller waits. Raises OSError.
        """
        with self._purging:
            purged = Purged()
            days = self.settings.retention_days
            expired = [] if days is None else self.store.expired(time.time() - days * 86400)
            for start in range(0, len(expired), 100):
                if self._stop.is_set():
                    break
                jobs = [self.store.get(job_id) for job_id in expired[start : start + 100]]
                purged = purged.plus(self._remove([job for job in jobs if job is not None and job.ended]))
            purged = purged.plus(self._remove_orphans())
            if any(purged):
                log.info("Purge: removed %s", purged)
            return purged

    def _remove_orphans(self) -> Purged:
        images = freed = 0
        for name in self.images.older_than(time.time() - self.ORPHAN_AGE):
            job = self.get(os.path.basename(name)[:8])
            if job is not None and (not job.ended or name in job.images or name == job.answer):
                continue
            freed += self.images.remove([name])
            images += not name.endswith((".json", ".part"))
        return Purged(0, images, freed)

    def _keep_house(self) -> None:
        recover_at = purge_at = time.monotonic()
        while True:
            now = time.monotonic()
            try:
                self.settings.refresh()
                if now >= recover_at:
                    recover_at = now + self.RECOVER_EVERY
                    self._recover()
                if now >= purge_at:
                    purge_at = now + self.PURGE_EVERY
                    self.next_purge = time.time() + self.PURGE_EVERY
                    self.purge()
            except Exception as error:
                log.error("Housekeeping will be tried again: %s: %s", type(error).__name__, error)
            if self._stop.wait(self.LOOK_EVERY):
                return

    def _recover(self) -> None:
        def fail(job: Job) -> Job:
            return job._replace(status=FAILED, finished=time.time(), error="The webui ended before the generation did")

        recovered = self.store.recover(fail).result()
        if recovered:
            log.warning("%d jobs that a webui left behind are now Failed", len(recovered))

    def close(self) -> None:
        """Ends the housekeeping, and the rest when the last running job has ended. Does not wait for it."""
        self._stop.set()

        def drain() -> None:
            self._housekeeper.join()
            while True:
                with self._lock:
                    if not self._running:
                        break
                time.sleep(0.2)
            self.store.close()
            self.pool.shutdown(wait=False)

        threading.Thread(target=drain, name="job-tracker-end", daemon=True).start()


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
GRACE = 0.02  # seconds in which a generation that has just begun may still fail with the host's own answer
PIECE = 1 << 17  # bytes of an answer that are sent at a time
IDEMPOTENCY_KEY_LIMIT = 255  # characters
CANCELLED = "Cancelled"
SPARE_THREADS = 1000  # the most worker threads that are lent to the host

current: "contextvars.ContextVar[Optional[Generation]]" = contextvars.ContextVar("job_tracker_current", default=None)


def header_of(scope: Scope, name: bytes) -> str:
    """A request header, its fields joined as in RFC 9110, 5.3; empty if there is none."""
    return ", ".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


def accepts_gzip(scope: Scope) -> bool:
    """By RFC 9110, 12.5.3."""
    for part in header_of(scope, b"accept-encoding").lower().split(","):
        coding, _, parameters = part.partition(";")
        if coding.strip() in ("gzip", "x-gzip"):
            return not re.search(r"q\s*=\s*0(\.0*)?\s*(;|\Z)", parameters)
    return False


def user_of(scope: Scope) -> str:
    """The user of RFC 7617 whose password the host has checked, as the header has it."""
    header = header_of(scope, b"authorization")
    try:
        return base64.b64decode(header.partition(" ")[2]).partition(b":")[0].hex()
    except ValueError:
        return header


def prefers_async(scope: Scope) -> bool:
    """By RFC 7240, 4.1."""
    preferences = header_of(scope, b"prefer").lower().split(",")
    return any(preference.partition(";")[0].strip() == "respond-async" for preference in preferences)


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


def in_pieces(data: bytes) -> Iterator[bytes]:
    return (data[position : position + PIECE] for position in range(0, len(data), PIECE))


async def from_pool(pool: ThreadPoolExecutor, pieces: Iterator[bytes]) -> Any:
    """The same pieces, each made in a thread."""
    loop = asyncio.get_running_loop()
    while True:
        piece = await loop.run_in_executor(pool, next, pieces, None)
        if piece is None:
            return
        yield piece


def one_line(text: str) -> str:
    """Text from outside in a form that cannot forge a line of the log."""
    return text[:200].encode("unicode_escape").decode("ascii")


class Valve:
    """Put into the scope by the shell. Once cut, nothing of the response passes; `work` outlives the response."""

    def __init__(self) -> None:
        self.cut = False
        self.work: Optional["asyncio.Task[None]"] = None


class Shell:
    """The outermost layer around the host: cuts connections, and keeps the server alive for jobs without a client.

    Whatever the layers between do to end a response, nothing passes once its valve is cut, and the server closes the
    connection of a response without an end. A server that stops waits for its requests, and so for their jobs.
    """

    KEY = "job_tracker.valve"

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        valve = scope[self.KEY] = Valve()

        async def pass_on(message: Message) -> None:
            if not valve.cut:
                await send(message)

        try:
            await self.app(scope, receive, pass_on)
        except Exception:
            if not valve.cut:
                raise
        finally:
            if valve.work is not None and not valve.cut:
                await asyncio.wait({valve.work})


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
        if generation is not None:
            generation.released()
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
def lent_thread() -> Iterator[None]:
    """Gives the host one worker thread more. In the event loop only.

    A generation holds a thread for as long as it waits in the queue: 40 of them would leave none for anybody else.
    """
    limiter = anyio.to_thread.current_default_thread_limiter()
    lent = limiter.total_tokens < 40 + SPARE_THREADS
    limiter.total_tokens += lent
    try:
        yield
    finally:
        limiter.total_tokens -= lent


class Middleware:
    """Wraps the application of one generation route of the host."""

    def __init__(self, app: App, type_: str, tracker: Tracker):
        self.app = app
        self.type = type_
        self.tracker = tracker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.tracker.settings.enabled and Shell.KEY in scope:  # not so for what came before the shell was there
            await Exchange(self, scope, receive, send).serve()
        else:
            await self.app(scope, receive, send)


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
        self.job_id: Optional[str] = None
        self.claim: Optional[Claim] = None
        self.key: Optional[str] = None
        self.request: Any = None  # the host's own view of the body
        self.reserved_id: Optional[str] = None
        self.hide_images = False  # the client sent send_images: false
        self.messages: List[Message] = []  # what the host answered
        self.error: Optional[BaseException] = None  # or what it raised
        self._state = threading.Lock()  # guards the two that follow
        self.lock: Optional[str] = None  # the host's queue lock is "held", then "released"
        self.cancelled = False

    # On the host's worker thread

    def called(self, arguments: Dict[str, Any]) -> None:
        """The host has checked credentials and body, and its endpoint is about to run. Raises what is to end it."""
        key = header_of(self.scope, b"idempotency-key")
        if key:
            self._claim(key)
        self._look_at(arguments)

    def _claim(self, key: str) -> None:
        if len(key) > IDEMPOTENCY_KEY_LIMIT:
            raise HTTPException(422, f"Idempotency-Key has more than {IDEMPOTENCY_KEY_LIMIT} characters")
        digest = hashlib.sha256()
        for message in self.body:
            digest.update(message.get("body", b""))
        self.key = hashlib.sha256(json.dumps([key, user_of(self.scope), self.type]).encode()).hexdigest()[:32]
        try:
            claim, first = self.tracker.claim(self.key, digest.hexdigest())
        except OSError as error:
            raise HTTPException(503, f"The jobs cannot be read, so a repeat cannot be told: {error}") from None
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
        if getattr(self.request, "force_task_id", "") is None:
            self.request.force_task_id = self.reserved_id  # the host's /internal/progress answers for the job's ID

    @harmless
    def asked(self) -> None:
        """The host's route asks for the queue lock: that makes it a job."""
        if self.job_id is not None:
            return
        try:
            prompt = getattr(self.request, "prompt", "")
            client = self.scope.get("client")
            job = Job(
                id=self.reserved_id or self.tracker.reserve_id(),
                type=self.type,
                status=PENDING,
                timestamp=int(time.time()),
                ip=client[0] if client else None,
                prompt=prompt[:PROMPT_LIMIT] if isinstance(prompt, str) else "",
                key=self.key,
                digest=self.claim.digest if self.claim else None,
            )
            written = self.tracker.accept(job, self.cancel)
            self.job_id = job.id
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
        if self.job_id is not None:
            self.tracker.start(self.job_id)

    def released(self) -> None:
        with self._state:
            self.lock = "released"

    # On any thread

    def cancel(self) -> None:
        """Fails the job now if it waits, or when the host has stopped it if it runs."""
        with self._state:
            self.cancelled = True
            waiting = self.lock is None
        if waiting:
            self.tracker.fail(self.job_id, CANCELLED)
            self._in_loop(self._end)
        else:
            self._in_loop(self._interrupt)

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
            self.claim.job_id.set_result(self.job_id)

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
            with lent_thread():
                await self.app(dict(self.scope), self._giving(list(self.body)), self._capture)
        except BaseException as error:
            self.error = error
        finally:
            self._end()
        try:
            if self.job_id is not None and await self.accepted:
                if self.failed:
                    self.tracker.fail(self.job_id, self.reason())
                else:
                    await self.loop.run_in_executor(self.tracker.pool, self._store)
        finally:
            if self.claim:
                self.tracker.release(self.key, self.claim)

    @staticmethod
    def _giving(body: List[Message]) -> Receive:
        """A `receive` that gives the body once and never says that the client left."""

        async def receive() -> Message:
            if not body:
                await asyncio.get_running_loop().create_future()
            return body.pop(0)

        return receive

    async def _capture(self, message: Message) -> None:
        self.messages.append(message)

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
            text = str(getattr(self.error, "detail", "") or self.error)
            return f"{type(self.error).__name__}: {text}" if text else type(self.error).__name__
        if not self.messages:
            return "The webui gave no answer"
        return f"The webui answered {self.messages[0]['status']}: {self.bytes()[:1000].decode('utf-8', 'replace')}"

    def bytes(self) -> bytes:
        """What the host answered."""
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    def answer(self) -> Answer:
        """The same in parts, with the parameters as the client sent them."""
        answer = split_answer(self.bytes())
        if not self.hide_images:
            return answer
        data = json.loads(answer.rest.decode())
        if "send_images" in data["parameters"]:
            data["parameters"]["send_images"] = False
        return answer._replace(rest=json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode())

    def for_client(self) -> Iterator[bytes]:
        """The same as the client asked for it, a piece at a time."""
        yield from in_pieces(self.answer().rest if self.hide_images else self.bytes())

    def _store(self) -> None:
        try:
            answer = self.answer()
            prompt = json.loads(answer.rest.decode())["parameters"].get("prompt")
        except Exception as error:
            log.error("Job %s: the webui's answer cannot be read: %s", self.job_id, one_line(str(error)))
            self.tracker.fail(self.job_id, f"Generated, but the webui's answer cannot be read: {error}")
            return
        self.tracker.finish(self.job_id, answer, prompt if isinstance(prompt, str) else "")


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

    async def serve(self) -> None:
        body = await self._read_body()
        served = body is None
        while not served:
            generation = Generation(self.middleware, self.scope, body)
            self.valve.work = generation.begin()
            served = await self._serve(generation)

    async def _read_body(self) -> Optional[List[Message]]:
        """The body as it came, None if the client left before its end."""
        body: List[Message] = []
        while not body or body[-1].get("more_body", False):
            message = await self.receive()
            if message["type"] != "http.request":
                return None
            body.append(message)
        return body

    async def _serve(self, generation: Generation) -> bool:
        """False if the generation turned out to repeat one that came to nothing, so that another is due."""
        accepted, answered = generation.accepted, generation.answered
        await asyncio.wait({accepted, answered}, return_when=asyncio.FIRST_COMPLETED)
        if generation.job_id is not None and not accepted.done():
            await asyncio.wait({accepted}, timeout=10)  # the host was faster than the disk
        if accepted.done() and accepted.result():
            if generation.lock:
                await asyncio.wait({answered}, timeout=GRACE)
            if generation.cancelled or not (answered.done() and generation.failed):
                await self._follow(generation)
                return True
        await asyncio.wait({answered})
        if isinstance(generation.error, Repeat):
            return await self._repeat(generation.error.claim)
        await self._pass_on(generation)
        return True

    async def _follow(self, generation: Generation) -> None:
        """Tells the client of its job, from its acceptance on."""

        async def result() -> Optional[Iterator[bytes]]:
            return None if generation.failed else generation.for_client()

        await self._tell(generation.job_id, generation.answered, result, [])
        if self.valve.cut:
            log.warning("Job %s failed, its connection is cut: %s", generation.job_id, one_line(generation.reason()))
            if isinstance(generation.error, Exception) and not generation.cancelled:
                raise generation.error  # for the host's log

    async def _pass_on(self, generation: Generation) -> None:
        """Gives the client what the host gave, as if we were not there."""
        if generation.error is not None:
            raise generation.error
        messages = generation.messages
        if generation.hide_images and not generation.failed:
            answer = await asyncio.get_running_loop().run_in_executor(self.tracker.pool, generation.answer)
            headers = [pair for pair in messages[0]["headers"] if pair[0].lower() != b"content-length"]
            headers.append((b"content-length", str(len(answer.rest)).encode()))
            messages = [{**messages[0], "headers": headers}, {"type": "http.response.body", "body": answer.rest}]
        for message in messages:
            await self.send(message)

    async def _repeat(self, claim: Claim) -> bool:
        """Answers from the job that was first with the idempotency key. False if there is none any more."""
        job_id = await asyncio.wrap_future(claim.job_id)
        job = None if job_id is None else await self._in_pool(self.tracker.get, job_id)
        if job is None or job.status == FAILED:
            return False

        async def result() -> Optional[Iterator[bytes]]:
            job = await self._in_pool(self.tracker.get, job_id)
            return self.tracker.answer_as_json(job) if job is not None and job.status == COMPLETED else None

        ended = asyncio.get_running_loop().create_task(self.tracker.wait(job_id, math.inf))
        try:
            await self._tell(job_id, ended, result, [(b"idempotent-replayed", b"true")] if job.ended else [])
        finally:
            ended.cancel()
        return True

    async def _tell(self, job_id: str, ended: Any, result: Any, headers: List[Tuple[bytes, bytes]]) -> None:
        """The head now, heartbeats while the job waits and runs, and then its result; None is no clean end."""
        headers += [
            (JOB_HEADER.lower().encode(), job_id.encode()),
            (b"access-control-expose-headers", JOB_HEADER.encode()),
        ]
        if prefers_async(self.scope):
            location = self.scope.get("root_path", "") + f"/sdapi/v1/job/{job_id}"
            headers += [(b"location", location.encode()), (b"preference-applied", b"respond-async")]
            job = await self._in_pool(self.tracker.get, job_id)
            data = as_json(await self._in_pool(self.tracker.describe, job))
            await self._start(202, headers)
            await self._send_all(iter([data]))
            return
        gone = asyncio.get_running_loop().create_task(self._until_gone())
        try:
            await self._start(200, headers)
            while not ended.done():
                await self._send_piece(self.encoder.encode(b" ") if self.encoder else b" ")
                await asyncio.wait({ended, gone}, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
            pieces = await result()
            if pieces is None:
                self.valve.cut = True
            else:
                await self._send_all(pieces, gone)
        except OSError as error:
            self.valve.cut = True
            log.error("Job %s: the stored answer cannot be read: %s", job_id, error)
        finally:
            gone.cancel()

    async def _start(self, status: int, headers: List[Tuple[bytes, bytes]]) -> None:
        headers += [(b"content-type", b"application/json"), (b"vary", b"Accept-Encoding")]
        if self.encoder:
            headers.append((b"content-encoding", b"gzip"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_all(self, pieces: Iterator[bytes], gone: Optional["asyncio.Task[None]"] = None) -> None:
        if self.encoder:
            pieces = self.encoder.encode_all(pieces)
        async for piece in from_pool(self.tracker.pool, pieces):
            await self._send_piece(piece)
            if gone is not None and gone.done():
                return
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_piece(self, data: bytes) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def _until_gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def _in_pool(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.tracker.pool, function, *args)


# ------------------------------------------------------------------------------------------------------------------
# API: the routes under /sdapi/v1/job
# ------------------------------------------------------------------------------------------------------------------


class JobSummary(BaseModel):
    """A job without image data."""

    id: str = Field(description="8 characters of A-Z a-z 0-9, as sent in the header X-Job-ID")
    type: str = Field(description="txt2img or img2img")
    status: str = Field(description="Pending, Processing, Completed or Failed")
    prompt: str
    timestamp: int = Field(description="when the job was accepted, in Unix seconds")
    ip: Optional[str] = Field(None, description="address of the client")
    started: Optional[float] = Field(None, description="when generation began, in Unix seconds")
    finished: Optional[float] = Field(None, description="when the job ended, in Unix seconds")
    error: Optional[str] = Field(None, description="why the job failed, or what is missing of it")
    queue_position: Optional[int] = Field(None, description="while Pending: 1 is next")
    progress: Optional[float] = Field(None, description="while Processing: 0 to 1")
    eta: Optional[float] = Field(None, description="while Processing: seconds that are left, if that can be told")
    parameters: Optional[Dict[str, Any]] = Field(None, description="as the webui answered; null until Completed")
    info: Optional[str] = Field(None, description="JSON text, as the webui answered; null until Completed")
    image_count: int = Field(description="how many images the job has")


class JobWithImages(JobSummary):
    """A job. With `images=false` it has no `images`."""

    images: Optional[List[Optional[str]]] = Field(
        None, description="base64, in the webui's order; empty until Completed; null for a file that is gone"
    )


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


def text_header(description: str) -> Dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


IMAGE_DOCS = {
    200: {
        "description": "The image",
        "content": {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in MEDIA_TYPES.values()},
        "headers": {"ETag": text_header("changes never: an image does not")},
    },
    304: {"description": "If-None-Match names the image that the client has"},
}

GENERATION_DOCS = {
    "parameters": [
        {
            "name": "Prefer",
            "in": "header",
            "description": "respond-async (RFC 7240): answer 202 with the job when it is accepted",
            "schema": {"type": "string"},
            "example": "respond-async",
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
                "Idempotent-Replayed": text_header("true for a stored answer"),
            }
        },
        "202": {
            "description": "The job is accepted, as Prefer: respond-async asked for",
            "headers": {JOB_HEADER: text_header("the job's ID"), "Location": text_header("the job's path")},
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSummary"}}},
        },
    },
}


class Api:
    """The endpoints. They look at jobs in threads of the tracker's own, so that the host's are never needed."""

    JOB = "/sdapi/v1/job/{id}"
    IMAGE = "/sdapi/v1/job/{id}/images/{n}"
    JOBS = "/sdapi/v1/jobs"
    CURSOR = re.compile(r"(\d{1,12})-([A-Za-z0-9]{8})\Z")

    def __init__(self, tracker: Tracker):
        self.tracker = tracker

    def add_to(self, add_route: Callable[..., Any]) -> None:
        """Registers the routes through the host's own `add_api_route`, which guards them as it guards its own."""
        missing = {404: {"model": Problem, "description": "There is no such job"}}
        conflict = {409: {"model": Problem, "description": "It does not go with the job's status"}}
        unread = {503: {"model": Problem, "description": "The jobs cannot be read from disk"}}
        for method, path, endpoint, more in (
            ("GET", self.JOB, self.get_job, {"response_model": JobWithImages, "responses": {**missing, **unread}}),
            ("DELETE", self.JOB, self.delete_job, {"status_code": 204, "responses": {**missing, **conflict, **unread}}),
            ("GET", self.JOBS, self.get_jobs, {"response_model": List[JobSummary], "responses": unread}),
            ("GET", self.IMAGE, self.get_image, {"response_class": Response, "responses": {**IMAGE_DOCS, **missing}}),
            ("HEAD", self.IMAGE, self.get_image, {"include_in_schema": False}),
            (
                "POST",
                self.JOB + "/cancel",
                self.cancel_job,
                {"response_model": JobSummary, "responses": {**missing, **conflict, **unread}},
            ),
        ):
            add_route(path, endpoint, methods=[method], tags=["Job Tracker"], **more)

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function that may block; trouble with the disk is a 503."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.tracker.pool, function, *args)
        except OSError as error:
            raise HTTPException(503, f"The jobs cannot be read: {error.strerror or error}") from None

    async def _get(self, job_id: str) -> Job:
        job = await self._run(self.tracker.get, job_id)
        if job is None:
            raise HTTPException(404, "Job not found")
        return job

    async def get_job(
        self,
        request: Request,
        id: str = Path(description="the job's ID"),
        images: bool = Query(True, description="false leaves the image data out"),
        wait: float = Query(0, ge=0, le=300, description="seconds to wait for the job's end"),
    ) -> Response:
        """The job as it is now, or, with `wait`, once it has ended."""
        if wait and ID_FORM.match(id):
            await self.tracker.wait(id, wait)
        job = await self._get(id)
        return self._respond(request, self.tracker.as_json(job) if images else iter([as_json(await self._run(self.tracker.describe, job))]))

    async def get_jobs(
        self,
        request: Request,
        ip: Optional[str] = Query(None, description="address of the client"),
        status: Optional[str] = Query(None, description="Pending, Processing, Completed or Failed, case ignored"),
        type: Optional[str] = Query(None, description="txt2img or img2img"),
        after: Optional[float] = Query(None, description="accepted after this moment, in Unix seconds"),
        before: Optional[float] = Query(None, description="accepted before this moment, in Unix seconds"),
        q: Optional[str] = Query(None, description="text in the prompt, case ignored"),
        limit: int = Query(50, ge=1, le=1000),
        cursor: Optional[str] = Query(None, description="from the Link header of the page before"),
    ) -> Response:
        """Jobs that match all filters. When there are more, the header `Link` with `rel="next"` has the next page."""
        wanted = Filter(
            ip,
            self._one_of("status", status, STATUSES),
            self._one_of("type", type, TYPES),
            self._moment("after", after),
            self._moment("before", before),
            q,
        )
        after_time, after_id = 0, None
        if cursor is not None:
            form = self.CURSOR.match(cursor)
            if not form:
                raise self._invalid("cursor", "it must come from a Link header")
            after_time, after_id = int(form.group(1)), form.group(2)

        def look() -> Tuple[bytes, Optional[str]]:
            page = self.tracker.store.query(wanted, limit, 0, after_id, after_time)
            last = f"{page.jobs[-1].timestamp}-{page.jobs[-1].id}" if page.more else None
            return as_json([self.tracker.describe(job) for job in page.jobs]), last

        body, last = await self._run(look)
        response = self._respond(request, iter([body]))
        if last:
            following = request.url.include_query_params(cursor=last)
            response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
        return response

    async def get_image(
        self,
        request: Request,
        id: str = Path(description="the job's ID"),
        n: int = Path(ge=0, le=999_999, description="the image's number, from 0"),
    ) -> Response:
        """One image of a job as a file."""
        job = await self._get(id)
        if n >= len(job.images):
            raise HTTPException(404, "The job has no such image")
        name = job.images[n]
        size = await self._run(self.tracker.images.size, name)
        if size is None:
            raise HTTPException(404, "The image is no longer on disk")
        file_name = os.path.basename(name)
        headers = {
            "ETag": f'"{file_name}-{size}"',
            "Cache-Control": "private, max-age=31536000, immutable",
            "Content-Disposition": f'inline; filename="{file_name}"',
            "Content-Security-Policy": "default-src 'none'",
            "X-Content-Type-Options": "nosniff",
            "Vary": "Accept-Encoding",
        }
        known = [tag.strip() for tag in request.headers.get("If-None-Match", "").replace("W/", "").split(",")]
        if headers["ETag"] in known or known == ["*"]:
            return Response(None, 304, headers)
        media_type = MEDIA_TYPES.get(name.rpartition(".")[2], OTHER_MEDIA_TYPE)
        pieces = self.tracker.images.read(name)
        if accepts_gzip(request.scope):
            # Otherwise the host would compress the image, in the event loop and in vain.
            pieces = Gzip(level=0).encode_all(pieces)
            headers["Content-Encoding"] = "gzip"
        else:
            headers["Content-Length"] = str(size)
        if request.method == "HEAD":
            pieces.close()
            pieces = iter(())
        return StreamingResponse(from_pool(self.tracker.pool, pieces), 200, headers, media_type)

    async def cancel_job(self, id: str = Path(description="the job's ID")) -> Response:
        """Takes a Pending job out of the queue, or interrupts a Processing one. It ends as Failed, "Cancelled"."""
        await self._end(self.tracker.cancel, id)
        return JSONResponse(await self._run(self.tracker.describe, await self._get(id)))

    async def delete_job(self, id: str = Path(description="the job's ID")) -> Response:
        """Removes a job that has ended, and its images."""
        await self._end(self.tracker.delete, id)
        return Response(None, 204)

    async def _end(self, function: Callable[[str], bool], job_id: str) -> None:
        try:
            found = await self._run(function, job_id)
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

    def _respond(self, request: Request, pieces: Iterator[bytes]) -> Response:
        headers = {"Vary": "Accept-Encoding", "Cache-Control": "no-store"}
        if accepts_gzip(request.scope):
            pieces = Gzip().encode_all(pieces)
            headers["Content-Encoding"] = "gzip"
        return StreamingResponse(from_pool(self.tracker.pool, pieces), 200, headers, "application/json")


# ------------------------------------------------------------------------------------------------------------------
# Host: the only part that knows the webui
# ------------------------------------------------------------------------------------------------------------------


class Unsuitable(Exception):
    """The host lacks something that we rely on."""


class Extension:
    """The program inside one life of the webui, from the loading of its scripts to their unloading."""

    def __init__(self) -> None:
        self.tracker = Tracker(Settings(EXTENSION_FOLDER, dict(os.environ)), self._progress, self._interrupt)
        self.trouble: Optional[str] = None  # why generations are not tracked, for the tab

    def start(self, _: Any, app: Any) -> None:
        """`app_started`: everything of the host is in place."""
        try:
            self._attach(app)
        except Unsuitable as reason:
            self.trouble = str(reason)
            log.warning("Generations are not tracked: %s", reason)
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}"
            log.exception("Generations are not tracked, the webui is none that we know")

    def stop(self) -> None:
        """`script_unloaded`: the webui reloads its scripts."""
        self.tracker.close()

    def _attach(self, app: Any) -> None:
        # Everything is looked up before anything is changed: it is all or nothing.
        routes = [
            (route, type_)
            for route in app.routes
            for type_ in TYPES
            if getattr(route, "path", "").endswith(f"/sdapi/v1/{type_}") and "POST" in (route.methods or ())
        ]
        if not routes:
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
        Api(self.tracker).add_to(add_route)
        for owner in owners.values():
            owner.queue_lock = ObservedLock(owner.queue_lock)
        for route, type_ in routes:
            route.dependant.call = self._observed(route.dependant.call)
            route.app = Middleware(route.app, type_, self.tracker)
            route.openapi_extra = {**(route.openapi_extra or {}), **GENERATION_DOCS}
        app.openapi_schema = None  # it may have been asked for already
        settings = self.tracker.settings
        log.info("Ready, tracking is %s, jobs are kept in %s", "on" if settings.enabled else "off", settings.data_folder)

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
    def _progress() -> Progress:
        from modules import shared

        try:
            state = shared.state
            jobs = max(state.job_count, 1)
            progress = state.job_no / jobs
            if state.sampling_steps:
                progress += state.sampling_step / state.sampling_steps / jobs
            progress = min(max(progress, 0.0), 1.0)
            passed = time.time() - state.time_start
            return progress, round(passed / progress - passed, 3) if progress else None
        except (AttributeError, TypeError):
            return None, None

    def register(self, callbacks: Any) -> None:
        callbacks.on_app_started(self.start)
        callbacks.on_script_unloaded(self.stop)


def log_to_console() -> None:
    """The webui shows no log below warnings by itself, and this script may be loaded more than once."""
    log.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[Job Tracker] %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


try:
    from modules import script_callbacks
except ImportError:  # imported by a test or a tool, not by a webui
    pass
else:
    log_to_console()
    Extension().register(script_callbacks)
