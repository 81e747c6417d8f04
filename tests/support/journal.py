"""jobs.json as tests write it, read it and spoil it."""

from __future__ import annotations

import json
import subprocess
from typing import Any, Dict, List

from hypothesis import strategies as st


def lines(script: Any, *jobs: Any) -> bytes:
    """A jobs.json with a line for each job, or the end of one for an ID."""
    texts = [
        f'"{job}": null'.encode() if isinstance(job, str) else f'"{job.id}": '.encode() + script.record_of(job)
        for job in jobs
    ]
    return b"{\n" + b",\n".join(texts) + b"\n}\n"


def every(script: Any, store: Any) -> Dict[str, Any]:
    return {job.id: job for job in store.query(script.Filter(), 10_000).jobs}


def damaged(path: Any) -> List[bytes]:
    return [other.read_bytes() for other in sorted(path.parent.glob("jobs.json.damaged-*")) if other.is_file()]


def all_pages(store: Any, wanted: Any, limit: int) -> List[Any]:
    page = store.query(wanted, limit)
    jobs = page.jobs
    while page.cursor is not None:
        page = store.query(wanted, limit, page.cursor)
        jobs += page.jobs
    return jobs


FOREIGN = {
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "minified": lambda data: json.dumps(json.loads(data.decode()), separators=(",", ":")).encode(),
    "minified, with a line end": lambda data: json.dumps(json.loads(data.decode())).encode() + b"\n",
    "indented": lambda data: json.dumps(json.loads(data.decode()), indent=2).encode(),
    "indented, in UTF-8": lambda data: json.dumps(json.loads(data.decode()), indent=4, ensure_ascii=False).encode(),
    "by jq": lambda data: subprocess.run(["jq", "."], input=data, stdout=subprocess.PIPE, check=True).stdout,
    "by jq -c": lambda data: subprocess.run(["jq", "-c", "."], input=data, stdout=subprocess.PIPE, check=True).stdout,
    "line ends of Windows": lambda data: data.replace(b"\n", b"\r\n"),
    "no last line end": lambda data: data[:-1],
    "empty lines": lambda data: data.replace(b"\n", b"\n\n"),
    "a comma too many": lambda data: data.replace(b"\n}\n", b",\n}\n"),
    "a comma missing": lambda data: data.replace(b"},\n", b"}\n"),
    "no closing brace": lambda data: data[:-3],
    "keys in another order": lambda data: json.dumps(json.loads(data.decode()), indent=1, sort_keys=True).encode(),
}


# Random changes of valid files

GARBAGE = st.sampled_from(
    [b"\0" * 40, b"\xff\xfe", b"garbage", b"{", b"}", b"\n", b",", b'"', b"\\", b"[]", b"\r\n", b"\xef\xbb\xbf"]
    + [b'"A1b2C3d4": {', b'"A1b2C3d4": null', b'"finished":null', b"\n\n", b'\n"AAAA', b"{}{}{}"]
)
PLACE = st.floats(0, 1, exclude_max=True)
MUTATION = st.one_of(
    st.tuples(st.just("cut"), PLACE),
    st.tuples(st.just("insert"), PLACE, GARBAGE),
    st.tuples(st.just("drop"), PLACE, st.integers(1, 60)),
    st.tuples(st.just("byte"), PLACE, st.integers(0, 255)),
    st.tuples(st.just("zero"), PLACE, st.integers(1, 400)),
    st.tuples(st.just("double"), PLACE, st.integers(1, 400)),
    st.tuples(st.just("separator"), st.sampled_from([b"\n", b",", b",\r\n", b",\n\n", b" ,\n", b",,\n"])),
)


def mutated(data: bytes, mutations: List[Any]) -> bytes:
    for kind, *what in mutations:
        at = int(what[0] * len(data)) if isinstance(what[0], float) else 0
        if kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + what[1] + data[at:]
        elif kind == "drop":
            data = data[:at] + data[at + what[1] :]
        elif kind == "byte":
            data = data[:at] + bytes([what[1]]) + data[at + 1 :]
        elif kind == "zero":
            data = data[:at] + bytes(min(what[1], len(data) - at)) + data[at + what[1] :]
        elif kind == "double":
            data = data[:at] + data[at : at + what[1]] + data[at:]
        elif kind == "separator":
            data = data.replace(b",\n", what[0], 1)
    return data


def settled(store: Any) -> bool:
    """Whether the store has nothing more to do."""
    return store.idle(0)
