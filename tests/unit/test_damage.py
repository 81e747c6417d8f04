"""Damaged files are read in a time that grows with their size, whatever the damage is, and nothing is lost by that."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from inside import a_job, completed, load_script
from journal import FOREIGN, MUTATION, damaged, every, lines, mutated

from harness import fewer

SCRIPT = load_script()
SIZE = 150_000  # bytes
CEILING = 20.0  # seconds of processor time for 0.6 MB: it takes less than one


def repeated(pattern: str, size: int, end: str = "") -> str:
    """A text of about `size` characters, with another number at each `#`."""
    length = len(pattern.replace("#", "00000000")) + len(end)
    count = size // length
    return "".join(pattern.replace("#", f"{number:08d}") for number in range(count)) + end * count


RECORD = '"id": "#", "type": "txt2img", "status": "Failed", "timestamp": 1, "ip": null, "prompt": "x"'
DAMAGE: Dict[str, Callable[[int], str]] = {
    "openings": lambda size: repeated('"#": {', size),
    "openings, a line each": lambda size: repeated('"#": {\n', size),
    "openings that are closed at the end": lambda size: repeated('"#": {', size, "}"),
    "openings that are closed at some time": lambda size: (repeated('"#": {', 14_000) + "}" * 1000) * (size // 15_000),
    "openings with a list": lambda size: repeated('"#": {"a": [', size),
    "openings with deep lists": lambda size: repeated('"#": {"a": ' + "[" * 900, size),
    "openings of a field": lambda size: '"AAAAAAAA": {' + repeated('"finished": {', size),
    "records within records": lambda size: repeated('"#": {"a": 1, ', size),
    "records that are no JSON": lambda size: repeated('"#": {]', size),
    "lines that are no JSON": lambda size: repeated('\n"#": {"x": },', size),
    "records that are no jobs": lambda size: repeated('"#": {"a": "b"}, ', size),
    "records without an end": lambda size: repeated(f'"#": {{{RECORD}, ', size),
    "records without an end, each on a line": lambda size: repeated(f'"#": {{{RECORD},\n', size),
    "ends of jobs after rubbish": lambda size: "rubbish" + repeated('"#": null, ', size),
    "ends of jobs in a record": lambda size: '"AAAAAAAA": {' + repeated('"#": null, ', size),
    "a list without an end": lambda size: '"AAAAAAAA": {"a": ' + "[" * size,
    "a text without an end": lambda size: '"AAAAAAAA": {"a": "' + "x" * size,
    "a text of quotes": lambda size: '"AAAAAAAA": {"a": "' + '\\"' * (size // 2),
    "quotes": lambda size: '"' * size,
    "braces": lambda size: "{" * size,
    "a line of braces": lambda size: '\n"AAAAAAAA": {' + "}" * size + "x",
    "blanks": lambda size: '"AAAAAAAA": ' + " " * size,
    "line ends": lambda size: "\n" * size,
    "zeros": lambda size: "\0" * size,
    "jobs on one line": lambda size: repeated(f'"#": {{{RECORD}}}, ', size),
}


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """Processor time of this thread, since others may use the machine."""
    taken: List[float] = []
    gc.collect()
    gc.freeze()  # what other tests left in memory is not to be looked through meanwhile
    try:
        while len(taken) < 2 or (len(taken) < 3 and sum(taken) < 0.5):
            began = time.thread_time()
            function(*args)
            taken.append(time.thread_time() - began)
    finally:
        gc.unfreeze()
    return min(taken)


def assert_linear(read: Callable[[Any], Any], make: Callable[[int], Any]) -> None:
    once, four_times = seconds(read, make(SIZE)), seconds(read, make(4 * SIZE))
    assert four_times < CEILING
    assert four_times < 8 * once + 0.1, f"{once:.3f} s became {four_times:.3f} s for four times as much"


@pytest.mark.parametrize("name", DAMAGE)
def test_time_grows_with_size(name):
    assert_linear(lambda data: list(SCRIPT.parse_entries(data, 0)), lambda size: DAMAGE[name](size).encode())


@pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="this Python has its own way with numbers")
def test_time_grows_with_size_of_a_number():
    """Pythons before 3.10.7 know no limit for the digits of a number, as this one is told to."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        data = '"AAAAAAAA": {"a": ' + "1" * 2_000_000 + "}"
        assert seconds(lambda: list(SCRIPT.parse_entries(data.encode(), 0))) < 2
        assert seconds(lambda: SCRIPT.read_legacy_entries('[{"id": ' + "1" * 2_000_000 + "}]")) < 2
    finally:
        sys.set_int_max_str_digits(limit)


LEGACY_DAMAGE: Dict[str, Callable[[int], str]] = {
    "openings": lambda size: "[" + '{"id":' * (size // 6),
    "entries without an end": lambda size: "["
    + '{"id": "AAAA", "status": "Completed", "output_paths": [' * (size // 55),
    "entries that are no JSON": lambda size: "[" + '{"id": },' * (size // 9),
    "entries within entries": lambda size: "[" + '{"id":' * (size // 7) + "}" * (size // 7),
    "blanks": lambda size: "[" + "{ " * (size // 2),
    "entries": lambda size: "[" + '{"id": "AAAA"},' * (size // 15),
}


@pytest.mark.parametrize("name", LEGACY_DAMAGE)
def test_time_grows_with_size_for_the_predecessor(name):
    assert_linear(SCRIPT.read_legacy_entries, LEGACY_DAMAGE[name])


@pytest.mark.parametrize("name", ["openings", "records without an end", "ends of jobs in a record", "zeros"])
@pytest.mark.parametrize("torn", [False, True])
def test_a_store_opens_on_a_large_damage(script, tmp_path, name, torn):
    """Its own ways over the file take no more time than the reading: mending the end, and setting aside."""
    job = completed(a_job(script, random.Random(1)))
    head, end = lines(script, job)[: -len(b"\n}\n")], b"" if torn else b',\n"BBBBBBBB": null\n}\n'
    (tmp_path / "jobs.json").write_bytes(head + b",\n" + DAMAGE[name](2_000_000).encode() + end)
    began = time.monotonic()
    store = script.JobStore(str(tmp_path))
    try:
        assert every(script, store) == {job.id: job}
        assert time.monotonic() - began < 2 * CEILING
        assert sum(map(len, damaged(tmp_path / "jobs.json"))) > 1_900_000
    finally:
        store.close()


# What was read before is still read


def read_to_the_end(data: bytes) -> Iterator[Any]:
    """`parse_damaged` without a limit to what may belong to a record. Its time grows with the square."""
    text, position = data.decode("latin-1"), 0
    for match in SCRIPT.FOREIGN_ENTRY.finditer(text):
        if match.start() < position or match.group(1) in SCRIPT.Job._fields:
            continue
        try:
            _, end = SCRIPT.ENTRY_DECODER.raw_decode(text, match.end())
            line = SCRIPT.parse_entry(match.group(1), data[match.end() : end], match.end())
        except (ValueError, RecursionError):
            continue
        if line.job is not None or not data[position : match.start()].strip(SCRIPT.WHITESPACE):
            yield line
            position = end


def entries_to_the_end(text: str) -> List[Any]:
    """The same of `read_legacy_entries`."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    entries, end = [], 0
    for match in SCRIPT.LEGACY_ENTRY_START.finditer(text):
        if match.start() >= end:
            with contextlib.suppress(ValueError, RecursionError):
                entry, end = json.JSONDecoder().raw_decode(text, match.start())
                entries.append(entry)
    return entries


def is_flat(data: bytes, line: Any) -> bool:
    """Whether a record holds no more keys that look like those of jobs than a later version might have in it."""
    record = data[line.offset : line.offset + line.length].decode("latin-1")
    keys = [key for key in SCRIPT.FOREIGN_ENTRY.findall(record) if key not in SCRIPT.Job._fields]
    return len(keys) <= SCRIPT.REACH


LAYOUTS = [name for name in FOREIGN if "jq" not in name] + ["our own"]
MANY_MUTATIONS = st.lists(MUTATION, min_size=1, max_size=6)


@hypothesis_settings(max_examples=fewer(400), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1000), st.integers(1, 30), st.sampled_from(LAYOUTS), MANY_MUTATIONS)
def test_nothing_is_lost(seed, count, layout, mutations):
    dice = random.Random(seed)
    jobs = [a_job(SCRIPT, dice, prompt='a "b" {' * dice.randrange(4)) for _ in range(count)]
    data = lines(SCRIPT, *jobs, *(completed(job) for job in jobs[:3]), dice.choice(jobs).id)
    data = mutated(FOREIGN.get(layout, bytes)(data), mutations)
    before = list(read_to_the_end(data))
    now = list(SCRIPT.parse_damaged(data, 0))
    found = {line for line in now if isinstance(line, SCRIPT.Entry)}
    assert {line for line in before if is_flat(data, line)} <= found
    ids, ids_before = ({line.id for line in lines if line.job is not None} for lines in (found, before))
    assert len(ids) >= len(ids_before)
    # The entries and damages in order, and every byte in one of them.
    position = 0
    for item in now:
        if isinstance(item, SCRIPT.Damage):
            assert item.offset == position
            assert item.is_whitespace == (not data[position : position + item.length].strip(SCRIPT.WHITESPACE))
            position += item.length
        elif item.offset >= position:
            position = item.offset + item.length
    assert position == len(data)


@hypothesis_settings(max_examples=fewer(300), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 30), st.sampled_from([None, 2]), st.booleans(), MANY_MUTATIONS)
def test_nothing_is_lost_of_the_predecessor(count, indent, old, mutations):
    def an_entry(number: int) -> Dict[str, Any]:
        paths: Tuple[str, Any] = ("output_path", f"/x/{number}.png") if old else ("output_paths", [f"/x/{number}.png"])
        return {
            "id": f"{number:08d}",
            "prompt": 'a {"id": "b"}',
            "timestamp": 1,
            "status": "Completed",
            paths[0]: paths[1],
        }

    text = json.dumps([an_entry(number) for number in range(count)], indent=indent)
    text = mutated(text.encode(), mutations).decode("utf-8", "replace").strip()
    before, (now, _) = entries_to_the_end(text), SCRIPT.read_legacy_entries(text)
    assert json.dumps(before) == json.dumps(now)


@pytest.mark.parametrize("followers", [3, 8, 20, 500])
def test_a_record_without_its_end_costs_no_other(followers):
    """Where a file is laid out by others, and its closing brace is lost, a record seems to hold all that follow."""
    dice = random.Random(followers)
    jobs = [completed(a_job(SCRIPT, dice)) for _ in range(followers + 1)]
    data = json.dumps(json.loads(lines(SCRIPT, *jobs).decode()), indent=2)
    data = data.replace("\n  },", ",", 1) + "}"
    found = {item.id for item in SCRIPT.parse_entries(data.encode(), 0) if isinstance(item, SCRIPT.Entry)}
    assert found >= {job.id for job in jobs[1:]}
