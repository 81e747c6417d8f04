"""Makes the virtual environments, `.venv/<host>-<Python>`, from the lists in `requirements/`.

A stamp in each says what is installed. It is written last, so that an
environment whose making was interrupted is known and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

PROJECT = Path(__file__).resolve().parents[2]
REQUIREMENTS = PROJECT / "tests" / "requirements"
FOLDER = PROJECT / ".venv"
OLDEST = {"a1111": (3, 8), "forge": (3, 8), "neo": (3, 11), "sdnext": (3, 10), "schemathesis": (3, 9)}
NEWEST = (3, 13)
HOSTS = ("a1111", "forge", "neo", "sdnext")
SHAPES = {**{host: host for host in HOSTS}, "neo": "forge"}  # Forge Neo is a Forge with newer packages


def ensure(host: str, *extra: str) -> str:
    """The Python of an environment that has the host's list, or another program's, and the extra ones."""
    if not OLDEST[host] <= sys.version_info[:2] <= NEWEST:
        sys.exit(
            f"The packages of {host} exist for Python {_dotted(OLDEST[host])} to {_dotted(NEWEST)}; "
            f"you started this with Python {_dotted(sys.version_info[:2])}."
        )
    FOLDER.mkdir(exist_ok=True)
    name = f"{host}-{_dotted(sys.version_info[:2])}"
    with _locked(FOLDER / f"{name}.lock"):
        return _Environment(name).ensure([host, *extra])


def pythons() -> dict[str, str]:
    """The Pythons of this machine that the packages exist for: version -> program, oldest first."""
    found = {}
    for minor in range(min(OLDEST.values())[1], NEWEST[1] + 1):
        version = f"3.{minor}"
        versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        candidates = [shutil.which(f"python{version}"), *map(str, sorted(versions.glob(f"{version}.*/bin/python")))]
        if os.name == "nt":
            candidates.append(_first_line(["py", f"-{version}", "-c", "import sys; print(sys.executable)"]))
        for candidate in filter(None, candidates):
            if _first_line([candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]) == version:
                found[version] = candidate
    return found


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.decode(errors="replace").splitlines() or [""])[0].strip()


def call(command: list[str], cwd: Path, env: dict[str, str]) -> int:
    """Runs a command to its end, also through Ctrl-C, which the command gets itself."""
    process = subprocess.Popen(command, cwd=str(cwd), env={**os.environ, **env})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            pass


class _Environment:
    def __init__(self, name: str) -> None:
        self.folder = FOLDER / name
        self.log = FOLDER / f"{name}.log"
        self.stamp = self.folder / "installed.txt"
        self.python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def ensure(self, lists: list[str]) -> str:
        wanted = [_this_python(), *map(_fingerprint, lists)]
        have = self._installed()
        if have[: len(wanted)] == wanted:
            return str(self.python)
        if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
            sys.exit(
                "This Python cannot make virtual environments. On Debian and Ubuntu, install it with: "
                f"sudo apt install python{_dotted(sys.version_info[:2])}-venv"
            )

        started = time.monotonic()
        self.log.write_text("")
        if not have or have != wanted[: len(have)]:
            _say(f"Making {self._name} for Python {sys.version.split()[0]} ...")
            self._make()
            have = wanted[:1]
        with contextlib.suppress(FileNotFoundError):
            self.stamp.unlink()
        for name in lists[len(have) - 1 :]:
            _say(f"Installing {name}.txt ...")
            self._install(name)
        self.stamp.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        _say(f"{self._name} is ready, after {time.monotonic() - started:.0f} s.")
        return str(self.python)

    @property
    def _name(self) -> str:
        return str(self.folder.relative_to(PROJECT))

    def _installed(self) -> list[str]:
        if not self.python.exists() or not self.stamp.exists():
            return []
        return self.stamp.read_text(encoding="utf-8").splitlines()

    def _make(self) -> None:
        try:
            if self.folder.exists():
                shutil.rmtree(str(self.folder))
        except OSError as error:
            sys.exit(f"{self._name} is out of date and cannot be removed ({error}). Is a program in it still running?")
        self._run([sys.executable, "-m", "venv", str(self.folder)])

    def _install(self, name: str) -> None:
        # The lists are complete and have a wheel for everything: nothing to search for, nothing to compile.
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
        self._run([str(self.python), "-m", "pip", "install", *options, "-r", str(REQUIREMENTS / f"{name}.txt")])

    def _run(self, command: list[str]) -> None:
        # A user's pip may be set to install elsewhere.
        env = {**os.environ, "PIP_USER": "0", "PYTHONNOUSERSITE": "1"}
        with self.log.open("ab") as log:
            status = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
        if status:
            last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            _say("\n".join(line[:300] for line in last))
            sys.exit(f"That failed. Everything pip said is in {self.log}")


def _this_python() -> str:
    return " ".join(f"{sys.version} in {sys.base_prefix}".split())


def _fingerprint(name: str) -> str:
    return f"{name} {hashlib.sha256((REQUIREMENTS / f'{name}.txt').read_bytes()).hexdigest()}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One run at a time. The system frees the lock of a process that dies."""
    with path.open("ab") as file:
        if not _lock(file.fileno()):
            _say("Another run is making this environment; waiting for it ...")
            while not _lock(file.fileno()):
                time.sleep(0.3)
        yield


def _lock(file: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
