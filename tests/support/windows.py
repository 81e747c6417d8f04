"""A stand-in for Windows: the script, loaded as if it ran there, on a Linux machine.

    script = load_on_windows()

There is no `fcntl`, but a `msvcrt`. `os` lacks what Windows lacks, and its files are as there: one that is open, in any
process of this group, can be neither removed nor renamed nor replaced; a byte that this process has locked can be
neither read nor written by way of another open file; names that differ in case only are one; a folder cannot be opened;
a file that is opened without O_BINARY is one whose line ends would be changed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import types
from typing import Any, Dict, Iterator, List

from inside import load_script

MISSING = {
    *("pread", "pwrite", "preadv", "pwritev", "fchmod", "fchown", "chown", "fork", "getpgrp", "statvfs", "sysconf"),
    *("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_SYNC", "O_CLOEXEC", "openpty", "mkfifo", "fdatasync"),
    "register_at_fork",
}
O_BINARY = 1 << 30


def own_spelling(path: Any) -> str:
    """The name under which a file is there, whatever its case."""
    path = os.fspath(path)
    if os.path.lexists(path) or not os.path.isdir(os.path.dirname(path)):
        return path
    folder, name = os.path.split(path)
    return next((os.path.join(folder, one) for one in os.listdir(folder) if one.lower() == name.lower()), path)


def processes() -> Iterator[int]:
    """This one, and those that were started with it."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.getpgid(int(name)) == os.getpgrp():
                    yield int(name)
            except ProcessLookupError:
                pass


def refuse_open(path: str) -> None:
    """Raises PermissionError for a file that somebody has open."""
    if not os.path.lexists(path):
        return
    wanted = os.lstat(path)
    for process in processes():
        folder = f"/proc/{process}/fd"
        try:
            for number in os.listdir(folder):
                try:
                    if os.path.samestat(os.stat(f"{folder}/{number}"), wanted):
                        raise PermissionError(errno.EACCES, "it is being used by another process", path)
                except FileNotFoundError:
                    pass
        except FileNotFoundError:
            pass


class WindowsPath:
    """`os.path`, for names whose case does not matter."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(os.path, name)
        if name in ("exists", "lexists", "isfile", "isdir", "islink", "getsize"):
            return lambda path: function(own_spelling(path))
        return function


class WindowsOs:
    """`os`."""

    name = "nt"
    O_BINARY = O_BINARY

    def __init__(self, msvcrt: Msvcrt) -> None:
        self.path = WindowsPath()
        self._locked = msvcrt.locked
        self.refused: List[str] = []  # what could not be done, since a file was open

    def __getattr__(self, name: str) -> Any:
        if name in MISSING:
            raise AttributeError(name)
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        assert flags & O_BINARY, f"{path} is opened as text"
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder cannot be opened", path)
        return os.open(own_spelling(path), flags & ~O_BINARY, mode)

    def fsync(self, file: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "it is open for reading only")
        os.fsync(file)

    def _refuse_locked(self, file: int) -> None:
        """The first byte, which is the one that is ever locked."""
        if os.lseek(file, 0, os.SEEK_CUR) == 0:
            own = os.fstat(file)
            if any(other != file and os.path.samestat(found, own) for other, found in list(self._locked.items())):
                raise PermissionError(errno.EACCES, "another process has locked a portion of the file")

    def read(self, file: int, length: int) -> bytes:
        self._refuse_locked(file)
        return os.read(file, length)

    def write(self, file: int, data: bytes) -> int:
        self._refuse_locked(file)
        return os.write(file, data)

    def _refuse_open(self, what: str, path: str) -> None:
        try:
            refuse_open(path)
        except PermissionError:
            self.refused.append(f"{what} {os.path.basename(path)}")
            raise

    def replace(self, source: str, target: str) -> None:
        self._refuse_open("replace by", own_spelling(source))
        self._refuse_open("replace", own_spelling(target))
        os.replace(own_spelling(source), own_spelling(target))

    def rename(self, source: str, target: str) -> None:
        if os.path.lexists(own_spelling(target)):
            raise FileExistsError(errno.EEXIST, "it exists", target)
        self.replace(source, target)

    def unlink(self, path: str) -> None:
        self._refuse_open("remove", own_spelling(path))
        os.unlink(own_spelling(path))

    remove = unlink

    def stat(self, path: Any, **options: Any) -> Any:
        return os.stat(path if isinstance(path, int) else own_spelling(path), **options)

    def lstat(self, path: str) -> Any:
        return os.lstat(own_spelling(path))


class Msvcrt(types.ModuleType):
    """`msvcrt`: a lock on the first byte belongs to the open file, as one of `flock` does."""

    LK_UNLCK, LK_LOCK, LK_NBLCK, LK_RLCK, LK_NBRLCK = range(5)

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.locked: Dict[int, os.stat_result] = {}  # by the number of the open file

    def locking(self, file: int, mode: int, length: int) -> None:
        assert (os.lseek(file, 0, os.SEEK_CUR), length) == (0, 1), "always the same byte"
        assert mode in (self.LK_NBLCK, self.LK_UNLCK), "LK_LOCK gives up after ten seconds"
        try:
            fcntl.flock(file, fcntl.LOCK_UN if mode == self.LK_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None
        if mode == self.LK_UNLCK:
            self.locked.pop(file, None)
        else:
            self.locked[file] = os.fstat(file)


def load_on_windows() -> Any:
    """The script, as inside.load_script gives it. Its `os` is a WindowsOs."""
    load_script()  # so that its packages are there already, and see the true ones
    msvcrt = Msvcrt()
    names = {"os": WindowsOs(msvcrt), "fcntl": None, "msvcrt": msvcrt}
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        return load_script()
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
