"""A system under a webui that fails, waits or is slow when a test wants it: what the disk, a clock or memory can do.

    system = System(tmp_path)
    webui = start(*QUICK, scripts=system.scripts)
    with system.fails("pwrite", webui.data / "jobs.json"):
        ...

It is put between Python and the program, for calls of the modules `os`, `secrets` and `json`, and so says nothing of
how the program is made inside.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, Union

CALLS = (
    "open stat lstat fstat read pread write pwrite fsync ftruncate close "
    "listdir scandir replace rename unlink mkdir rmdir chmod"
)

# An extension that is loaded before ours. A rule says what is to go wrong, in a file that is there for so long.
SCRIPT = """
import builtins, errno, json, os, secrets, threading, time
from modules import shared

RULE = {rule!r}
stat, read, loads = os.stat, builtins.open, json.loads
paths = {{}}  # of open files

def rule_for(call, path):
    try:
        stat(RULE)
        with read(RULE) as file:
            rule = loads(file.read())
    except FileNotFoundError:
        return None
    if call not in rule["calls"]:
        return None
    return rule if path is None or path == rule["of"] or path.startswith(rule["of"] + os.sep) else None

def go_wrong(call, path, position=0):
    rule = rule_for(call, path)
    while rule is not None and rule["by"] == "waiting":
        time.sleep(0.005)
        rule = rule_for(call, path)
    if rule is None or position < rule["beyond"]:
        return
    by = rule["by"]
    if isinstance(by, (int, float)):
        time.sleep(by)
    elif hasattr(errno, by):
        number = getattr(errno, by)
        raise OSError(number, os.strerror(number), rule["of"])
    else:
        raise getattr(builtins, by)("sabotage")

def wrapped(call, real):
    def function(first, *args, **options):
        names = [first, args[0]] if call in ("replace", "rename") else [first]
        for name in names:
            path = paths.get(name) if isinstance(name, int) else os.path.abspath(os.fsdecode(name))
            if path is not None:
                go_wrong(call, path, args[1] if call in ("pread", "pwrite") else 0)
        result = real(first, *args, **options)
        if call == "open" and isinstance(result, int):
            paths[result] = path
        elif call == "close":
            paths.pop(first, None)
        return result
    return function

for call in {calls!r}.split():
    if hasattr(os, call):
        setattr(os, call, wrapped(call, getattr(os, call)))
builtins.open = wrapped("open", builtins.open)

choice = secrets.choice

def choose(among):
    go_wrong("choice", None)
    return choice(among)

decode = json.JSONDecoder.raw_decode  # by which all else reads, too

def read_json(decoder, text, *args, **options):
    is_stored = "look" in threading.current_thread().name  # it is read for somebody who looks at jobs
    if len(text) > 100 and text.startswith('{{"images":[]') and not is_stored:
        go_wrong("loads", None)
    return decode(decoder, text, *args, **options)

secrets.choice, json.JSONDecoder.raw_decode = choose, read_json

class State(type(shared.state)):
    @property
    def time_start(self):
        go_wrong("time_start", None)
        return self.__dict__["time_start"]

    @time_start.setter
    def time_start(self, moment):
        self.__dict__["time_start"] = moment

shared.state.__class__ = State
"""


class System:
    """The system under a webui that is started with `scripts`."""

    def __init__(self, folder: Path):
        self._rule = folder / "what-goes-wrong"
        self.scripts = {"a-system": SCRIPT.format(rule=str(self._rule), calls=CALLS)}

    @contextlib.contextmanager
    def fails(
        self, calls: str, of: Union[Path, str] = "", by: Union[str, float] = "EIO", beyond: int = 0
    ) -> Iterator[None]:
        """Inside a `with`, calls for a file, or for all in a folder, go wrong: by an error of `errno`, by another
        exception, by so many seconds that they take, or by "waiting" until the end, or until they are to fail.

        `beyond` is from where on in a file. Besides those of `os` there are `choice`, by which IDs are dealt, `loads`,
        by which an answer is read, and `time_start` of the webui's own state.
        """
        rule: Dict[str, Any] = {"calls": calls.split(), "of": os.path.abspath(of), "by": by, "beyond": beyond}
        part = self._rule.with_name("next")
        part.write_text(json.dumps(rule))
        part.replace(self._rule)
        try:
            yield
        finally:
            self.works()

    def waits(self, of: Path, calls: str = CALLS) -> Any:
        """The same for a disk that does not answer."""
        return self.fails(calls, of, "waiting")

    def works(self) -> None:
        """Nothing goes wrong any more."""
        with contextlib.suppress(FileNotFoundError):
            self._rule.unlink()
