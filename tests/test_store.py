"""jobs.json and images/: format, damage, full disks, several stores on one file, threads and ends."""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import gc
import itertools
import json
import os
import random
import shutil
import subprocess
import threading
import time
import tracemalloc
from concurrent.futures import wait
from typing import Any, Dict, Iterator, List

import bench_store
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from inside import (
    WrappedOs,
    a_job,
    alive,
    an_answer,
    completed,
    files_are_whole,
    load_script,
    make_tracker,
    pixels,
    read_jobs,
    until,
    when_ended,
)

from harness import fewer

EMPTY = b"{\n}\n"


@pytest.fixture
def script() -> Any:
    """A module of its own for each test, so that its constants can be changed."""
    return load_script()


@pytest.fixture
def opened(script, tmp_path):
    """`opened()` is a store on the test's folder."""
    stores = []

    def open_store():
        stores.append(script.JobStore(str(tmp_path)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.json"


class WrappedFcntl(WrappedOs):
    """The same for `fcntl`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(fcntl, name)


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


def settled(store: Any) -> bool:
    """Whether the store has nothing more to do."""
    return store.idle(0)


# The format


def test_every_write_leaves_valid_json(script, opened, path, dice):
    store = opened()
    assert every(script, store) == {} and path.exists()
    jobs = [a_job(script, dice, prompt='"},\n"AAAAAAAA": null, {} \\ \u2028 \0 猫 \U0001f408' * 3) for _ in range(4)]
    store.put(jobs[0], new=True).result()
    inode, before = path.stat().st_ino, path.read_bytes()
    for job in jobs:
        for step in (job, job._replace(status="Processing", started=1.5), completed(job, 2)):
            store.put(step).result()
            assert script.job_from_record(read_jobs(path)[job.id]) == step
            assert path.read_bytes().startswith(before[:-3])  # what is there stays where it is
            before = path.read_bytes()
    store.remove([jobs[1].id, jobs[2].id]).result()
    assert read_jobs(path)[jobs[1].id] is None
    assert list(alive(path)) == [jobs[0].id, jobs[3].id]
    assert path.stat().st_ino == inode
    assert path.read_bytes().endswith(b"\n}\n")
    store.close()
    assert every(script, opened()) == {job.id: completed(job, 2) for job in (jobs[0], jobs[3])}


def test_half_a_character(script, opened, path, dice):
    """A client can send it, but jq does not read it."""
    store = opened()
    store.put(a_job(script, dice, id="AAAAAAAA", prompt="\ud83d\ude00 \ud800!", error="\udfff"), new=True).result()
    assert read_jobs(path)["AAAAAAAA"]["prompt"] == "\U0001f600 \ufffd!"
    assert store.get("AAAAAAAA").error == "\ufffd"


def test_a_reader_beside_the_writer(script, opened, path, dice):
    """Another program finds JSON at any moment; if it reads in the middle of a write, then when it looks again."""
    script.JobStore.MIN_DEAD_ENTRIES = 20
    store = opened()
    store.stats()
    stop, tries = threading.Event(), [0]

    def read() -> None:
        while not stop.is_set():
            with contextlib.suppress(ValueError):
                read_without_jq(path)
                tries[0] = -1
            tries[0] += 1
            if tries[0] > 10:
                return

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(200):
        job = a_job(script, dice)
        store.put(job, new=True).result()
        store.put(completed(job)).result()
    assert thread.is_alive(), "it was not to be read ten times in a row"
    stop.set()
    thread.join()


def test_compaction_is_a_replacement(script, opened, path, dice):
    """New file, synced; then the name; then the folder synced. Nothing dead is left, and nothing of the work."""
    calls: List[Any] = []

    def note(name: str, what: Any) -> Any:
        def call(*arguments: Any) -> Any:
            target = arguments[-1]
            calls.append((name, os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target))
            return what(*arguments)

        return call

    if os.path.isdir("/proc/self/fd"):
        script.os = WrappedOs(fsync=note("fsync", os.fsync), replace=note("replace", os.replace))
    script.JobStore.MIN_DEAD_ENTRIES = 10
    store = opened()
    jobs = [a_job(script, dice) for _ in range(10)]
    for job in jobs:
        store.put(job, new=True).result()
    inode = path.stat().st_ino
    for job in jobs[:8]:
        for step in (completed(job, 1), completed(job, 2), completed(job, 3)):
            store.put(step).result()
    store.remove([job.id for job in jobs[:3]]).result()
    until(lambda: path.stat().st_ino != inode)
    until(lambda: settled(store))
    expected = {job.id: completed(job, 3) for job in jobs[3:8]}
    expected.update((job.id, job) for job in jobs[8:])
    assert every(script, store) == expected
    assert set(alive(path)) == set(expected)
    assert all(store.get(job_id) == job for job_id, job in expected.items())
    assert not list(path.parent.glob("*.part"))
    if calls:
        at = max(number for number, (name, _) in enumerate(calls) if name == "replace")
        part = f"{path}.{store.owner}.part"
        assert calls[at - 1] == ("fsync", part)
        assert calls[at + 1] == ("fsync", str(path.parent))
    store.close()
    assert every(script, opened()) == expected


def test_compaction_keeps_the_rights(script, opened, path, dice):
    path.write_bytes(b'{"a": 1}')
    path.chmod(0o600)
    opened().stats()
    until(lambda: path.read_bytes() == EMPTY)
    assert path.stat().st_mode & 0o777 == 0o600 or os.name == "nt"


def test_many_writers_share_an_fsync(script, opened, dice):
    count = [0]

    def slow_fsync(file: int) -> None:
        count[0] += 1
        time.sleep(0.02)
        os.fsync(file)

    store = opened()
    store.stats()
    script.os = WrappedOs(fsync=slow_fsync)
    futures = [store.put(a_job(script, dice), new=True) for _ in range(500)]
    wait(futures)
    assert all(future.exception() is None for future in futures)
    assert count[0] < 10
    assert len(every(script, store)) == 500


def test_a_link_to_the_file_stays_a_link(script, opened, path, tmp_path, dice):
    """jobs.json may be a link to a volume."""
    elsewhere = tmp_path / "volume"
    elsewhere.mkdir()
    path.symlink_to(elsewhere / "jobs.json")
    script.JobStore.MIN_DEAD_ENTRIES = 2
    store = opened()
    job = a_job(script, dice)
    for _ in range(10):
        store.put(job, new=True).result()
    until(lambda: settled(store))
    assert path.is_symlink()
    assert list(alive(elsewhere / "jobs.json")) == [job.id]


def test_the_folder_is_made_and_synced(script, tmp_path, dice):
    synced = []
    real = script.sync_folder
    script.sync_folder = lambda folder: (synced.append(folder), real(folder))
    folder = tmp_path / "one" / "two"
    store = script.JobStore(str(folder))
    store.put(a_job(script, dice), new=True).result()
    store.close()
    assert {str(tmp_path), str(tmp_path / "one"), str(folder)} <= set(synced)


# A model of it, with every kind of call in any order, and up to three stores on the file


def expected_page(script: Any, model: Dict[str, Any], wanted: Any) -> List[Any]:
    def fits(job: Any) -> bool:
        return (
            wanted.ip in (None, job.ip)
            and wanted.status in (None, job.status)
            and wanted.type in (None, job.type)
            and (wanted.after is None or job.timestamp > wanted.after)
            and (wanted.before is None or job.timestamp < wanted.before)
            and (wanted.q or "").casefold() in job.prompt.casefold()
        )

    return [job for job in reversed(list(model.values())) if fits(job)]


def all_pages(store: Any, wanted: Any, limit: int) -> List[Any]:
    page = store.query(wanted, limit)
    jobs = page.jobs
    while page.cursor is not None:
        page = store.query(wanted, limit, page.cursor)
        jobs += page.jobs
    return jobs


@pytest.mark.parametrize("seed", range(12))
def test_against_a_model(script, tmp_path, path, seed):
    dice = random.Random(seed)
    script.JobStore.MIN_DEAD_ENTRIES = dice.choice([3, 20, 100])
    script.JOURNAL_CHUNK = dice.choice([64, 300, 2000, 1 << 16])
    if seed % 4 == 3:  # as on Windows, which has one position in a file and replaces no open one
        script.os = WrappedOs(name="nt")
        script.hasattr = lambda thing, name: name not in ("pread", "pwrite") and hasattr(thing, name)
    stores = [script.JobStore(str(tmp_path)) for _ in range(1 + seed % 3)]
    model: Dict[str, Any] = {}
    removed: List[str] = []

    def a_time() -> Any:
        return dice.choice([None, None, 1736712000 + dice.randrange(100000)])

    for _ in range(250):
        store, turn = dice.choice(stores), dice.random()
        settle = len(stores) > 1 or dice.random() < 0.7
        if turn < 0.3:
            prompt = dice.choice(["", a_job(script, dice).prompt * dice.randrange(4)])
            job = a_job(script, dice, prompt=prompt, key=dice.choice([None, f"key {dice.randrange(5)}"]))
            store.put(job, new=True).result()
            model[job.id] = job
        elif turn < 0.55 and model:
            job = dice.choice(list(model.values()))
            prompt = job.prompt or dice.choice(["", "castle"])
            job = dice.choice([job._replace(status="Processing"), completed(job, 2), job._replace(status="Failed")])
            job = model[job.id] = job._replace(prompt=prompt)
            written = store.put(job)
            if settle:
                written.result()
        elif turn < 0.65 and model:
            ids = dice.sample(list(model), min(len(model), dice.randrange(1, 6)))
            written = store.remove(ids)
            removed += ids
            for job_id in ids:
                del model[job_id]
            if settle:
                written.result()
        elif turn < 0.67:
            store.close()
            stores[stores.index(store)] = script.JobStore(str(tmp_path))
        elif turn < 0.85:
            wanted = script.Filter(
                ip=dice.choice([None, None, f"10.0.0.{dice.randrange(22)}"]),
                status=dice.choice([None, None, *script.STATUSES]),
                type=dice.choice([None, None, *script.TYPES]),
                after=a_time(),
                before=a_time(),
                q=dice.choice([None, "", "castle", "STRASSE", "ärger", "zz", "猫", "film grain"]),
            )
            fitting = expected_page(script, model, wanted)
            limit, skip = dice.randrange(1, 20), dice.randrange(10)
            page = store.query(wanted, limit, skip=skip)
            assert page.jobs == fitting[skip : skip + limit]
            assert (page.cursor is None) == (len(fitting) <= skip + limit)
            assert all_pages(store, wanted, limit) == fitting
        elif turn < 0.95:
            assert all(store.get(job.id) == job for job in model.values())
            assert not any(store.get(job_id) for job_id in removed)
            counts, size = store.stats()
            assert sum(counts.values()) == len(model)
            assert size == sum(job.bytes for job in model.values())
            for number in range(5):
                job = store.with_key(f"key {number}")
                assert job is None or (job == model[job.id] and job.key == f"key {number}")
        else:
            moment = 1736712000 + dice.randrange(100000)
            old = [job.id for job in model.values() if job.ended and job.timestamp < moment]
            assert store.expired(moment) == old
    for store in stores:
        store.close()
    assert {job_id: script.job_from_record(record) for job_id, record in alive(path).items()} == model


# Damage: each file opens, what can be kept is kept, the rest is set aside, the log says so


@pytest.fixture
def three(script, dice):
    return [completed(a_job(script, dice), 1) for _ in range(3)]


def open_damaged(script: Any, opened: Any, path: Any, dice: random.Random) -> Dict[str, Any]:
    """Opens a store on what is there, uses it, and returns the jobs that it found."""
    store = opened()
    found = every(script, store)
    job = a_job(script, dice)
    store.put(job, new=True).result(20)
    until(lambda: settled(store))
    assert set(alive(path)) == {*found, job.id}
    store.close()
    again = opened()
    assert every(script, again) == {**found, job.id: job}
    again_written = path.stat().st_ino
    assert again.idle() and path.stat().st_ino == again_written, "it is as this program writes it"
    again.close()
    return found


def test_cut_at_every_byte_of_the_last_two_records(script, opened, path, three, dice):
    whole = lines(script, *three)
    records = min(2, fewer(3))  # the last one in the short run
    before = len(lines(script, *three[:-records])) - 3
    for end in range(before, len(whole)):
        for other in path.parent.glob("*"):
            other.unlink()
        path.write_bytes(whole[:end])
        store = opened()
        found = every(script, store)
        job = a_job(script, dice)
        store.put(job, new=True).result()
        assert set(read_without_jq(path)) == {*found, job.id}
        store.close()
        kept = [one for one in three if f'"{one.id}": '.encode() + script.record_of(one) in whole[:end]]
        assert found == {one.id: one for one in kept}
        rest = whole[len(lines(script, *kept)) - 3 : end].strip(script.WHITESPACE)
        assert b"".join(damaged(path)).strip(script.WHITESPACE) == rest


def read_without_jq(path: Any) -> Dict[str, Any]:
    return json.loads(path.read_text())


def spoil(script: Any, name: str, whole: bytes, three: List[Any]) -> bytes:
    middle = whole.index(three[1].id.encode()) - 2
    record = script.record_of(three[1])
    return {
        "garbage": whole[:middle] + b"\n\xff\xfe\x00 no line {{{ \x80" + whole[middle:],
        "zeros": whole[:middle] + bytes(5000) + whole[middle:],
        "a huge line": whole[:middle] + b"\n" + b"x" * 9_000_000 + b"," + whole[middle:],
        "zeros at the end": whole + bytes(5000),
        "garbage at the end": whole + os.urandom(300).replace(b"}", b"") + b"!",
        "many zeros at the end": whole + bytes(20_000_000),
        "not UTF-8": whole.replace(record, record.replace(b"2img", b"2\xff\xfeimg").replace(b"prompt", b"pr\xff")),
        "a status that is none": whole.replace(b'"Completed"', b'"Done"', 2).replace(b'"Done"', b'"Completed"', 1),
        "wrong types": whole.replace(record, b'{"id": 5, "images": {}, "prompt": []}'),
        "another ID inside": whole.replace(record, record.replace(three[1].id.encode(), b"AAAAAAAA")),
        "a path in images": whole.replace(f"{three[1].id}_0.png".encode(), b"../../../../etc/passwd"),
        "deep": whole.replace(record, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a huge number": whole.replace(record, record.replace(b'"bytes":1000', b'"bytes":' + b"9" * 9999)),
        "not a number": whole.replace(record, record.replace(b'"started":', b'"started":NaN,"was":')),
    }[name]


SPOILT = (
    "garbage,zeros,a huge line,zeros at the end,garbage at the end,many zeros at the end,not UTF-8,"
    "a status that is none,wrong types,another ID inside,a path in images,deep,a huge number,not a number"
).split(",")


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt(script, opened, path, three, dice, caplog, name):
    data = spoil(script, name, lines(script, *three), three)
    assert data != lines(script, *three)
    path.write_bytes(data)
    found = open_damaged(script, opened, path, dice)
    spoilt = set() if "garbage" in name or "zeros" in name or "huge line" in name else {three[1].id}
    assert found == {job.id: job for job in three if job.id not in spoilt}
    assert damaged(path)
    assert "damaged" in caplog.text
    assert str(path.parent / "jobs.json.damaged-") in caplog.text


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


@pytest.mark.parametrize("name", FOREIGN)
def test_laid_out_by_others(script, opened, path, three, dice, name):
    if "jq" in name and not script.shutil.which("jq"):
        pytest.skip("no jq here")
    path.write_bytes(FOREIGN[name](lines(script, *three)))
    assert open_damaged(script, opened, path, dice) == {job.id: job for job in three}
    assert not damaged(path)


@pytest.mark.parametrize("name", FOREIGN)
def test_laid_out_by_others_while_a_request_comes(script, opened, path, three, dice, name):
    """A job may be written before the file was read."""
    if "jq" in name and not script.shutil.which("jq"):
        pytest.skip("no jq here")
    script.JOURNAL_CHUNK = 64
    path.write_bytes(FOREIGN[name](lines(script, *three)))
    store, job = opened(), a_job(script, dice)
    store.put(job, new=True).result()
    assert every(script, store) == {one.id: one for one in [*three, job]}
    until(lambda: settled(store))
    assert set(alive(path)) == {one.id for one in [*three, job]}
    assert not damaged(path)


def test_what_was_removed_stays_so_in_a_foreign_file(script, opened, path, three, dice):
    data = lines(script, *three, three[1].id)
    path.write_bytes(data.replace(b": ", b" : ").replace(b",\n", b" ,\n\n"))
    assert set(open_damaged(script, opened, path, dice)) == {three[0].id, three[2].id}


NOTHING = [b"", b"{}", b"{ }", b"{\n}", b"{\n\n}\n", b"\n", b"  ", b"\xef\xbb\xbf{\n}\n"]
RUBBISH = [
    b"[]",
    b"null",
    b"\0" * 100,
    b"hello",
    b'"',
    b"{{{{:",
    b'{"a": 1}',
    b"x\n}\n",
    b"\xff" * 50,
    b'{"AAAAAAAA": 5}',
]


@pytest.mark.parametrize("data", [*NOTHING, *RUBBISH], ids=repr)
def test_nothing_in_it(script, opened, path, dice, data):
    path.write_bytes(data)
    assert open_damaged(script, opened, path, dice) == {}
    assert bool(damaged(path)) == (data in RUBBISH)


def test_a_folder_in_its_place(script, opened, path, dice, caplog):
    path.mkdir()
    (path / "precious").touch()
    assert open_damaged(script, opened, path, dice) == {}
    (aside,) = path.parent.glob("jobs.json.damaged-*")
    assert (aside / "precious").exists()
    assert str(aside) in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="no pipes in folders")
def test_a_pipe_in_its_place(script, opened, path, dice):
    os.mkfifo(path)
    assert open_damaged(script, opened, path, dice) == {}


@pytest.mark.parametrize("readable", [True, False])
def test_no_right_to_write(script, opened, path, three, dice, caplog, readable):
    path.write_bytes(lines(script, *three))
    inode = path.stat().st_ino

    def open_by_rights(name: str, flags: int, *mode: int) -> int:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(name).st_ino == inode and flags & (os.O_RDWR | os.O_WRONLY):
                raise PermissionError(errno.EACCES, "Permission denied", name)
        return os.open(name, flags, *mode)

    script.os = WrappedOs(open=open_by_rights)
    if not readable:

        def no_copy(source: str, target: str) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", source)

        script.copy_file = no_copy
    assert open_damaged(script, opened, path, dice) == ({job.id: job for job in three} if readable else {})
    assert damaged(path) == [lines(script, *three)]
    assert "set aside" in caplog.text


def test_a_close_that_reports_an_error_has_closed_the_file(script, opened, path, dice):
    """Its number may be another file's by then, which is not ours to close or to write."""
    store = opened()
    job = a_job(script, dice)
    store.put(job, new=True).result()
    inode = path.stat().st_ino

    def close(file: int) -> None:
        is_journal = os.fstat(file).st_ino == inode
        os.close(file)
        if is_journal:
            raise OSError(errno.EIO, "late trouble")

    script.os = WrappedOs(close=close)
    neighbour = path.read_bytes()
    os.replace(str(path), str(path) + ".old")
    path.write_bytes(neighbour)
    assert store.get(job.id) == job
    with open(str(path) + ".host", "w+b") as host:
        before = os.fstat(host.fileno()).st_ino
        store.put(a_job(script, dice), new=True).result()
        assert len(every(script, store)) == 2
        assert os.fstat(host.fileno()).st_ino == before


def test_a_disk_that_goes_and_comes_back(script, opened, path, dice):
    """Files that were open before are dead then, as on a network drive, and new ones are opened."""
    store = opened()
    jobs = [a_job(script, dice) for _ in range(3)]
    store.put(jobs[0], new=True).result()
    dead = {one.stat().st_ino for one in (path, path.with_name("jobs.json.lock"))}
    gone = True

    def alive_or(function: Any) -> Any:
        def checked(file: Any, *args: Any) -> Any:
            if isinstance(file, int) and os.fstat(file).st_ino in dead:
                raise OSError(errno.ESTALE, "stale")
            if gone and isinstance(file, str) and file.startswith(str(path)):
                raise OSError(errno.ENOTCONN, "not connected")
            return function(file, *args)

        return checked

    script.os = WrappedOs(fstat=alive_or(os.fstat), stat=alive_or(os.stat), open=alive_or(os.open))
    script.fcntl = WrappedFcntl(flock=alive_or(script.fcntl.flock))
    with pytest.raises(script.StoreError, match="stale|not connected"):
        store.get(jobs[0].id)
    assert store.put(jobs[1], new=True).exception() is not None
    for name in (path, path.with_name("jobs.json.lock")):  # other files by the same names
        data = name.read_bytes()
        os.replace(str(name), f"{name}.old")
        name.write_bytes(data)
    gone = False
    assert store.get(jobs[0].id) == jobs[0]
    store.put(jobs[2], new=True).result()
    assert set(alive(path)) == {jobs[0].id, jobs[2].id}


@pytest.mark.parametrize("indent", [None, 2])
def test_fields_of_a_later_version(script, opened, path, dice, indent):
    """Where a record is cut between two pieces, `"priority": null` in it does not end a job of that name."""
    jobs = [completed(a_job(script, dice)) for _ in range(2000)]
    records = {job.id: {"priority": None, **json.loads(script.record_of(job).decode())} for job in jobs}
    if indent:
        path.write_text(json.dumps(records, indent=indent))
    else:
        path.write_bytes(b"{\n" + b",\n".join(script.as_json({key: records[key]})[1:-1] for key in records) + b"\n}\n")
    store = opened()
    assert every(script, store) == {job.id: job for job in jobs}
    until(lambda: settled(store))
    assert set(alive(path)) == set(records)
    assert not damaged(path)


def test_a_number_that_is_none_in_a_record_of_another_layout(script, opened, path, dice):
    job = completed(a_job(script, dice))
    record = json.loads(script.record_of(job).decode())
    path.write_text(json.dumps({job.id: {**record, "later": 777}}, indent=2).replace("777", "1e999"))
    store = opened()
    assert every(script, store) == {job.id: job}
    until(lambda: settled(store))
    json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    store.close()
    assert every(script, opened()) == {job.id: job}


def test_damage_without_room_to_set_it_aside(script, opened, path, three, dice, caplog):
    """It stays where it is, and nothing is compacted or said to be an orphan, until there is room."""
    hurt = b'"AAAAAAAA": {"id": "AAAAAAAA", "hurt": '
    path.write_bytes(lines(script, *three).replace(b"\n", b"\n" + hurt + b"\n", 1))
    script.JobStore.MIN_DEAD_ENTRIES = 1
    script.JobStore.COMPACT_RETRY = 0.0

    def open_with_room_elsewhere(name: Any, *arguments: Any) -> Any:
        if "damaged" in str(name):
            raise OSError(errno.ENOSPC, "no room")
        return os.open(name, *arguments)

    script.os = WrappedOs(open=open_with_room_elsewhere)
    store = opened()
    assert every(script, store) == {job.id: job for job in three}
    for _ in range(3):
        for job in three:
            store.put(job).result()
    assert store.recover(lambda job: job).result() is None
    assert hurt in path.read_bytes()
    assert not damaged(path) and store.set_aside_ids() is None
    assert caplog.text.count("jobs.json cannot be set aside") == 1
    script.os = os
    assert store.recover(lambda job: job).result() is None
    assert hurt in b"".join(damaged(path))
    store.put(three[0]).result()
    until(lambda: hurt not in path.read_bytes())
    assert every(script, store) == {job.id: job for job in three}


def test_a_key_that_is_spoilt_still_names_the_files_of_its_job(script, opened, path, three):
    path.write_bytes(lines(script, *three).replace(b'\n"' + three[1].id.encode(), b'\n"Spoilt00', 1))
    store = opened()
    assert set(every(script, store)) == {three[0].id, three[2].id}
    assert store.set_aside_ids() >= {three[1].id}


def test_a_folder_that_is_put_back_from_a_copy(script, tmp_path, dice):
    """Its webui lives, so no other takes its jobs for left behind."""
    folder, copy = tmp_path / "data", tmp_path / "copy"
    one = script.JobStore(str(folder))
    other = None
    try:
        one.put(a_job(script, dice, owner=one.owner), new=True).result()
        shutil.copytree(str(folder), str(copy))
        shutil.rmtree(str(folder))
        copy.rename(folder)
        job = a_job(script, dice, owner=one.owner)
        one.put(job, new=True).result()
        other = make_tracker(script, folder)
        assert other.get(job.id).status == "Pending"
    finally:
        one.close()
        if other is not None:
            other.close()


def test_no_folder_can_be_made(script, opened, path, tmp_path, dice, caplog):
    """The store says so, and works as soon as it can."""
    (tmp_path / "file").touch()
    store = script.JobStore(str(tmp_path / "file" / "data"))
    with pytest.raises(script.StoreError):
        store.get("AAAAAAAA")
    with pytest.raises(script.StoreError):
        store.query(script.Filter(), 5)
    job = a_job(script, dice)
    assert isinstance(store.put(job, new=True).exception(), script.StoreError)
    assert caplog.text.count("jobs.json cannot be written") == 1
    (tmp_path / "file").unlink()
    store.put(job, new=True).result()
    assert store.get(job.id) == job
    store.close()


def test_changed_by_an_editor_while_it_is_used(script, opened, path, three, dice, caplog):
    store = opened()
    for job in three:
        store.put(job, new=True).result()
    with path.open("r+b") as file:  # in place, and every record after the first moves
        data = file.read().replace(b'"prompt":"', b'"prompt":"edited ')
        file.seek(0)
        file.write(data)
    until(lambda: (every(script, store), settled(store))[1])
    assert {job.prompt[:7] for job in every(script, store).values()} == {"edited "}
    assert all(store.get(job.id).prompt == "edited " + job.prompt for job in three)
    late = a_job(script, dice)
    store.put(late, new=True).result()
    until(lambda: settled(store))
    assert set(alive(path)) == {job.id for job in [*three, late]}


def test_removed_or_put_back_while_it_is_used(script, opened, path, three, dice):
    store = opened()
    store.put(three[0], new=True).result()
    backup = path.read_bytes()
    store.put(three[1], new=True).result()
    path.unlink()
    assert every(script, store) == {}
    store.put(three[2], new=True).result()
    assert every(script, store) == {three[2].id: three[2]}
    path.write_bytes(backup)  # in place: it is seen as soon as something is not where it was
    until(lambda: every(script, store) == {three[0].id: three[0]})
    until(lambda: settled(store))
    assert set(alive(path)) == {three[0].id}


# Readers of files against random changes of valid ones

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


def good_lines(script: Any, data: bytes) -> Dict[str, Any]:
    """Jobs whose last mention in the file is a line that is whole."""
    found = {}
    rows = data.split(b"\n")
    for number, row in enumerate(rows):
        match = script.re.fullmatch(rb'"([A-Za-z0-9]{8})": (\{.*\}),?', row)
        if match:
            with contextlib.suppress(ValueError, RecursionError):
                job = script.job_from_record(json.loads(match.group(2).decode()))
                if job.id.encode() == match.group(1) and match.group(1) not in b"\n".join(rows[number + 1 :]):
                    found[job.id] = job
    return found


@hypothesis_settings(max_examples=fewer(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 1000), st.lists(MUTATION, min_size=1, max_size=4), st.sampled_from([64, 500, 1 << 16]), st.booleans()
)
def test_any_damage(tmp_path_factory, seed, mutations, piece, early):
    script, dice = LOADED, random.Random(seed)
    script.JOURNAL_CHUNK = piece
    jobs = [a_job(script, dice, prompt="a b" * dice.randrange(60)) for _ in range(dice.randrange(1, 9))]
    changed = [completed(dice.choice(jobs)) for _ in range(3)]
    data = mutated(lines(script, *jobs, *changed, dice.choice(jobs).id), mutations)
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "jobs.json"
    path.write_bytes(data)
    expected = good_lines(script, data)
    store = script.JobStore(str(folder))
    try:
        for is_early in (True, False):
            if early or not is_early:
                job = expected[job.id] = a_job(script, dice)
                store.put(job, new=True).result(20)
        found = every(script, store)
        assert {job_id: found.get(job_id) for job_id in expected} == expected
        until(lambda: settled(store))
        assert {job_id: script.job_from_record(record) for job_id, record in json_of(path).items()} == found
    finally:
        store.close()


def json_of(path: Any) -> Dict[str, Any]:
    return {job_id: record for job_id, record in json.loads(path.read_text()).items() if record is not None}


LOADED = load_script()


@hypothesis_settings(max_examples=fewer(300), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(
        [b'{"enabled": true, "retention_days": 7}', b'{\n    "enabled": false,\n    "retention_days": null\n}\n']
    ),
    st.lists(MUTATION, min_size=1, max_size=3),
)
def test_any_config(tmp_path_factory, data, mutations):
    """It never raises, and what it cannot read it sets aside, as it was."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "config.json"
    path.write_bytes(mutated(data, mutations))
    before = path.read_bytes()
    made = LOADED.Settings(str(folder), {})
    assert made.enabled in (True, False)
    assert made.retention_days is None or made.retention_days >= 0
    made.save(enabled=True)
    assert json.loads(path.read_text())["enabled"] is True
    try:
        readable = isinstance(json.loads(before.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        readable = False
    assert [other.read_bytes() for other in folder.glob("config.json.damaged-*")] == ([] if readable else [before])


# A disk that is full


@pytest.fixture
def full_disk(script):
    """`full_disk(bytes)` leaves so much room, None takes the limit away."""
    left = [None]

    def pwrite(file: int, data: bytes, position: int) -> int:
        beyond = max(0, position + len(data) - os.fstat(file).st_size)  # what lies in the file has its place
        if left[0] is None:
            return os.pwrite(file, data, position)
        fits = len(data) - max(0, beyond - left[0])
        if fits <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= min(beyond, left[0])
        return os.pwrite(file, data[:fits], position)

    script.os = WrappedOs(pwrite=pwrite)
    return lambda room: left.__setitem__(0, room)


def test_what_was_left_behind_is_never_seen_unfinished(script, opened, path, dice):
    """From the first moment on, however slow the disk is."""

    def pwrite(*args: Any) -> int:
        time.sleep(0.05)
        return os.pwrite(*args)

    script.os = WrappedOs(pwrite=pwrite)
    left = a_job(script, dice)
    path.write_bytes(lines(script, left))
    store = opened()
    recovered = store.recover(lambda job: job._replace(status="Failed"))
    new = [store.put(a_job(script, dice, status="Failed"), new=True) for _ in range(3)]
    while not (recovered.done() and all(written.done() for written in new)):
        assert store.get(left.id).status == "Failed"
        assert {job.status for job in every(script, store).values()} == {"Failed"}
        assert store.stats()[0]["Pending"] == 0
    assert alive(path)[left.id]["status"] == "Failed"
    assert len(alive(path)) == 4


def test_an_owner_that_cannot_be_asked_hides_no_other(script, opened, path, dice, caplog):
    """Its file is another user's, perhaps."""
    jobs = [a_job(script, dice)._replace(owner=owner) for owner in ("00000001", "00000002", None)]
    path.write_bytes(lines(script, *jobs))
    (path.parent / "jobs.json.owner-00000001").mkdir()
    (path.parent / "jobs.json.owner-00000002").touch()
    store = opened()
    store.recover(lambda job: job._replace(status="Failed")).result()
    assert [store.get(job.id).status for job in jobs] == ["Pending", "Failed", "Failed"]
    assert "cannot be searched for what process 00000001 left" in caplog.text


def test_what_was_left_behind_on_a_full_disk(script, opened, path, dice, full_disk, caplog):
    script.JobStore.RETRY = 0.05
    left = a_job(script, dice)
    path.write_bytes(lines(script, left))
    before = path.read_bytes()
    full_disk(0)
    store = opened()
    store.recover(lambda job: job._replace(status="Failed")).result()
    assert store.get(left.id).status == left.status, "nobody sees an end that is not on disk"
    assert path.read_bytes() == before
    assert caplog.text.count("No space left") == 1
    full_disk(None)
    until(lambda: store.get(left.id).status == "Failed")
    assert alive(path)[left.id]["status"] == "Failed"


@pytest.mark.parametrize("room", [0, 1, 5, 40, 300])
def test_full_disk(script, opened, path, dice, full_disk, caplog, room):
    script.JobStore.RETRY = 0.05
    store = opened()
    jobs = [a_job(script, dice) for _ in range(3)]
    for job in jobs:
        store.put(job, new=True).result()
    before = path.read_bytes()
    full_disk(room)
    refused = [a_job(script, dice, prompt="a" * 500) for _ in range(5)]
    for job in refused:
        error = store.put(job, new=True).exception()
        assert isinstance(error, script.StoreError) and str(error) == "No space left on device"
        assert read_jobs(path).keys() == {job.id for job in jobs}
        assert store.get(job.id) is None
    assert path.read_bytes() == before
    assert caplog.text.count("No space left") == 1
    # Changes are in force at once.
    for job in jobs[:2]:
        assert isinstance(store.put(completed(job)).exception(), script.StoreError)
    later = jobs[0]._replace(status="Failed", error="later")
    assert isinstance(store.put(later).exception(), script.StoreError)
    assert isinstance(store.remove([jobs[2].id]).exception(), script.StoreError)
    expected = {later.id: later, jobs[1].id: completed(jobs[1])}
    assert every(script, store) == expected
    assert {job_id: store.get(job_id) for job_id in expected} == expected
    assert store.get(jobs[2].id) is None
    assert store.stats()[0] == {"Pending": 0, "Processing": 0, "Completed": 1, "Failed": 1}
    assert [job.id for job in store.query(script.Filter(status="Failed"), 9).jobs] == [later.id]
    time.sleep(0.2)  # tries in vain
    assert path.read_bytes() == before
    # There is room again: all is written without being asked for.
    full_disk(None)
    until(lambda: set(alive(path)) == set(expected))
    assert {job_id: script.job_from_record(record) for job_id, record in alive(path).items()} == expected
    assert every(script, store) == expected
    store.put(refused[0], new=True).result()
    store.close()
    assert every(script, opened()) == {**expected, refused[0].id: refused[0]}


def test_full_disk_in_a_compaction(script, opened, path, dice, full_disk):
    script.JobStore.MIN_DEAD_ENTRIES = 10
    script.JobStore.COMPACT_RETRY = 0
    store = opened()
    jobs = [a_job(script, dice) for _ in range(30)]
    for job in jobs:
        store.put(job, new=True).result()
    full_disk(20_000)
    for job in jobs:
        store.put(completed(job)).result()
    store.remove([job.id for job in jobs[:2]]).exception()
    assert read_jobs(path)
    assert len(every(script, store)) == 28
    full_disk(None)
    inode = path.stat().st_ino
    for job in jobs[2:]:
        store.put(completed(job, 2)).result()
    until(lambda: path.stat().st_ino != inode and settled(store))
    assert {job_id: script.job_from_record(record) for job_id, record in alive(path).items()} == {
        job.id: completed(job, 2) for job in jobs[2:]
    }
    assert not list(path.parent.glob("*.part"))


def test_closing_tries_once_more(script, opened, path, dice, full_disk):
    store = opened()
    job = a_job(script, dice)
    store.put(job, new=True).result()
    full_disk(0)
    store.put(completed(job)).exception()
    full_disk(None)
    store.close()
    assert alive(path)[job.id]["status"] == "Completed"


@pytest.mark.parametrize("what", ["fsync", "pwrite"])
def test_a_disk_that_fails(script, opened, path, dice, what):
    """A job whose acceptance could not be made durable is none, though a part of it was written."""
    script.JobStore.RETRY = 0.05
    store = opened()
    kept = a_job(script, dice)
    store.put(kept, new=True).result()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    script.os = WrappedOs(**{what: fail})
    refused = a_job(script, dice)
    assert isinstance(store.put(refused, new=True).exception(), script.StoreError)
    assert store.get(refused.id) is None
    assert isinstance(store.put(completed(kept)).exception(), script.StoreError)
    assert every(script, store) == {kept.id: completed(kept)}
    script.os = os
    until(lambda: alive(path) and alive(path)[kept.id]["status"] == "Completed" and len(alive(path)) == 1)
    store.close()
    assert every(script, opened()) == {kept.id: completed(kept)}


@contextlib.contextmanager
def mounted(folder: Any, options: str) -> Iterator[None]:
    """A file system in memory at a folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def generate(script: Any, tracker: Any, job: Any) -> str:
    """Takes a job from its acceptance to its end, and returns its status."""
    if tracker.accept(job, lambda: True).exception() is not None:
        until(lambda: tracker.get(job.id) is None)
        return "refused"
    tracker.start(job.id)
    tracker.finish(job.id, an_answer(script, job.id, 1))
    until(lambda: tracker.get(job.id).ended or tracker.store.trouble)
    return tracker.get(job.id).status


def test_a_real_full_disk(script, tmp_path, dice):
    """On a file system of half a megabyte, filled by images and by jobs."""
    disk = tmp_path / "disk"
    with mounted(disk, "size=512k"):
        tracker = make_tracker(script, disk, TRACKER_RETENTION="off")
        outcome = {"Completed": 0, "Failed": 0, "Processing": 0, "refused": 0}
        for number in range(300):
            prompt = "a" * (2000 if number > 150 else 10)
            outcome[generate(script, tracker, a_job(script, dice, timestamp=int(time.time()), prompt=prompt))] += 1
        outcome.pop("Processing")  # the disk may have no room for the end of one or two
        assert all(outcome.values()), outcome
        assert read_jobs(disk / "jobs.json")
        assert not list(disk.glob("images/*/*.part"))
        for job in tracker.store.query(script.Filter(), 1000).jobs:
            if job.status == "Completed":
                assert files_are_whole(tracker, job)
            else:
                assert "No space left on device" in tracker.describe(job)["error"]
        lost = next(disk.glob("images/*/*.png"))
        lost.unlink()
        assert tracker.store.idle()
        until(lambda: all(job.ended for job in tracker.store.query(script.Filter(), 1000).jobs))
        jobs = tracker.store.query(script.Filter(), 1000).jobs
        tracker.close().result(60)
        assert {job.id for job in jobs} == set(alive(disk / "jobs.json"))
        for job in jobs:
            whole = job.status == "Completed" and files_are_whole(tracker, job)
            assert whole or "No space left on device" in (job.error or "") or lost.name in job.images[0].name, job


def test_an_append_that_cannot_be_undone(script, opened, path, dice, monkeypatch):
    """What was refused does not come back when the disk is well again, though its line was written."""
    monkeypatch.setattr(script.JobStore, "RETRY", 0.05)
    store = opened()
    store.put(a_job(script, dice), new=True).result()
    write_at, broken = script.write_at, []

    def write(file: int, data: bytes, position: int) -> None:
        if broken or a_name in data:
            if not broken:
                write_at(file, data, position)
            broken.append(position)
            raise OSError(errno.EIO, "Input/output error")
        write_at(file, data, position)

    job = a_job(script, dice)
    a_name = job.id.encode()
    monkeypatch.setattr(script, "write_at", write)
    assert isinstance(store.put(job, new=True).exception(), script.StoreError)
    monkeypatch.setattr(script, "write_at", write_at)
    store.put(a_job(script, dice), new=True).result()
    assert store.get(job.id) is None
    assert job.id not in {one.id for one in store.query(script.Filter(), 10).jobs}
    until(lambda: job.id not in alive(path))


# Threads and ends


def test_two_changes_at_once(script, opened, path, dice):
    """Whatever the order in which two threads come, memory and file agree."""
    store = opened()
    jobs = [a_job(script, dice) for _ in range(20)]
    for job in jobs:
        store.put(job, new=True).result()

    def change(name: str) -> None:
        for number in range(50):
            store.put(jobs[number % 20]._replace(error=f"{name} {number}"))

    threads = [threading.Thread(target=change, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = {job.id: store.get(job.id) for job in jobs}
    store.close()
    assert {job_id: script.job_from_record(record) for job_id, record in alive(path).items()} == said


def test_after_the_end(script, opened, path, dice):
    store = opened()
    job = a_job(script, dice)
    store.put(job, new=True).result()
    store.close()
    store.close()
    assert isinstance(store.put(completed(job)).exception(5), script.StoreError)
    assert isinstance(store.remove([job.id]).exception(5), script.StoreError)
    assert isinstance(store.recover(lambda job: job).exception(5), script.StoreError)
    with pytest.raises(script.StoreError):
        store.query(script.Filter(), 5)
    with pytest.raises(script.StoreError):
        store.stats()
    assert alive(path)[job.id]["status"] == "Pending"
    assert not list(path.parent.glob("*owner*"))


def test_the_end_comes_while_others_write(script, opened, path, dice):
    """Each Future ends, and what it says is so."""
    store = opened()
    told: List[Any] = []

    def write() -> None:
        own = random.Random()
        for _ in range(300):
            job = a_job(script, own)
            told.append((job.id, store.put(job, new=True)))

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    store.close()
    for thread in threads:
        thread.join()
    kept = {job_id for job_id, written in told if written.exception(5) is None}
    assert kept == set(alive(path))


def test_the_end_comes_while_it_loads_and_compacts(script, opened, path, dice):
    script.JobStore.MIN_DEAD_ENTRIES = 10
    jobs = [a_job(script, dice) for _ in range(2000)]
    path.write_bytes(lines(script, *jobs, *map(completed, jobs)))
    for number in range(15):
        store = opened()
        waiting = [store.recover(lambda job: job), store.put(jobs[0]._replace(error=str(number)))]
        time.sleep(number * 0.01)
        store.close()
        assert waiting[1].exception(5) is None
        assert waiting[0].done()
        assert not list(path.parent.glob("*.part"))
    assert len(every(script, opened())) == 2000
    assert read_jobs(path)[jobs[0].id]["error"] == "14"


def test_what_others_wrote_is_seen_under_load(script, opened, dice):
    """There is always something to write, and the file is compacted besides."""
    script.JobStore.MIN_DEAD_ENTRIES = 50
    busy, other = opened(), opened()
    stop = threading.Event()

    def write() -> None:
        own = random.Random()
        job = a_job(script, own)
        while not stop.is_set():
            busy.put(job._replace(error=str(own.random()))).result()

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        job = a_job(script, dice)
        other.put(job, new=True).result(10)
        began = time.monotonic()
        assert busy.get(job.id) == job
        assert time.monotonic() - began < 5
    stop.set()
    for thread in threads:
        thread.join()


def slow_copying(script: Any, seconds: float, times: int = 1000) -> threading.Event:
    """Makes a compaction last, by some of its writes. The event is set when one has begun."""
    begun, left = threading.Event(), itertools.count(times, -1)

    def pwrite(file: int, data: bytes, position: int) -> int:
        if os.readlink(f"/proc/self/fd/{file}").endswith(".part"):
            begun.set()
            time.sleep(seconds if next(left) > 0 else 0)
        return os.pwrite(file, data, position)

    script.os = WrappedOs(pwrite=pwrite)
    return begun


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="which file a descriptor is cannot be told here")
def test_a_store_that_waits_for_nobody(script, tmp_path, opened, dice):
    """While another process compacts or loads for long, this one writes and reads."""
    one = opened()
    jobs = [a_job(script, dice) for _ in range(500)]
    for _ in range(3):
        wait([one.put(job) for job in jobs])
    slow = load_script()
    slow.JobStore.MIN_DEAD_ENTRIES = 0
    slow.JobStore.COPIED_AT_ONCE = 5
    copying = slow_copying(slow, 0.05)
    other = slow.JobStore(str(tmp_path))
    other.stats()
    assert copying.wait(20)
    timer = []
    for job in jobs[:100]:
        began = time.monotonic()
        one.put(completed(job)).result()
        assert other.get(job.id) == completed(job)
        timer.append(time.monotonic() - began)
    assert sorted(timer)[50] < 0.5
    assert every(script, other) == every(script, one)
    other.close()


def test_locks(script, tmp_path):
    """One at a time, also within the process; whoever does not wait is told."""
    path = str(tmp_path / "lock")
    one, two = script.FileLock(path), script.FileLock(path)
    with one:
        assert not two.acquire(0)
    assert two.acquire(0)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(one.acquire()))
    thread.start()
    time.sleep(0.05)
    assert not taken
    two.close()
    thread.join(10)
    assert taken == [True]
    one.close()


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed")
def test_a_lock_that_was_tidied_away_still_locks(script, tmp_path):
    path = tmp_path / "lock"
    one, two = script.FileLock(str(path)), script.FileLock(str(path))
    assert one.acquire()
    one.release()
    path.unlink()
    assert two.acquire()
    assert not one.acquire(0)
    two.close()
    assert one.acquire(0)
    one.close()


def test_the_whole_folder_goes_while_it_is_used(script, tmp_path, dice):
    folder = tmp_path / "data"
    one = script.JobStore(str(folder))
    one.put(a_job(script, dice), new=True).result()
    script.shutil.rmtree(str(folder))
    other = script.JobStore(str(folder))
    jobs = [a_job(script, dice) for _ in range(40)]
    for written in [store.put(job, new=True) for job, store in zip(jobs, [one, other] * 20)]:
        written.result()
    assert every(script, one) == every(script, other) == {job.id: job for job in jobs}
    one.close()
    other.close()
    assert set(alive(folder / "jobs.json")) == {job.id for job in jobs}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="which file a descriptor is cannot be told here")
@pytest.mark.parametrize("piece", [300, 3000, 1 << 16])
def test_much_is_written_during_a_compaction(script, path, opened, dice, piece):
    script.JOURNAL_CHUNK = piece
    script.JobStore.MIN_DEAD_ENTRIES = 0
    script.JobStore.COPIED_AT_ONCE = 20
    one = opened()
    jobs = [a_job(script, dice) for _ in range(300)]
    for job in jobs:
        written = one.put(job, new=True)
    written.result()
    other = opened()
    inode, turns = path.stat().st_ino, 0
    copying = slow_copying(script, 0.01, times=30)
    for job in jobs:
        one.put(job).result()
    one.put(jobs[0]).result()
    assert copying.wait(20)
    while path.stat().st_ino == inode:
        for store in (one, other):
            job = dice.choice(jobs)
            store.put(completed(job, turns % 4))
            if turns % 3 == 0:
                jobs.append(a_job(script, dice))
                store.put(jobs[-1], new=True)
        turns += 1
        time.sleep(0.01)
    assert turns > 5 and one.idle() and other.idle()
    expected = {job.id for job in jobs}
    until(lambda: set(every(script, one)) == expected)
    assert path.stat().st_ino != inode
    assert every(script, one) == every(script, other)
    assert {job_id: script.job_from_record(record) for job_id, record in alive(path).items()} == every(script, one)


def test_paging_while_jobs_come_and_go(script, opened, dice):
    """Neither repeats nor skips a job that was there all the time."""
    script.JobStore.MIN_DEAD_ENTRIES = 30
    store = opened()
    jobs = [a_job(script, dice, timestamp=1736712000) for _ in range(300)]
    for job in jobs:
        last = store.put(job, new=True)
    last.result()
    stay, go = jobs[::2], jobs[1::2]

    def churn() -> None:
        own = random.Random(1)
        for job in go:
            store.put(a_job(script, own), new=True)
            store.put(completed(job))
            store.remove([job.id]).result()

    thread = threading.Thread(target=churn)
    thread.start()
    rounds = 0
    while thread.is_alive():
        seen = [job.id for job in all_pages(store, script.Filter(before=1736712001), 7)]
        assert len(seen) == len(set(seen))
        assert [job_id for job_id in seen if job_id in {job.id for job in stay}] == [job.id for job in stay][::-1]
        rounds += 1
    thread.join()
    assert rounds


# Many jobs; bench_store.py measures it


def test_memory_of_many_jobs(script, tmp_path):
    bench_store.write_file(script, tmp_path / "jobs.json", 20_000, 3, lambda text, share: None)
    script.JobStore.MIN_DEAD_ENTRIES = 1 << 60
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        store = script.JobStore(str(tmp_path))
        store.stats()
        gc.collect()
        assert (tracemalloc.get_traced_memory()[0] - before) / 20_000 < 100
    finally:
        tracemalloc.stop()
    store.close()


def test_one_job_of_many_is_found_before_all_are_indexed(script, opened, path, dice):
    bench_store.write_file(script, path, 20_000, 3, lambda text, share: None)
    ended, left = bench_store.some_id(path), a_job(script, dice)
    entry = f',\n"{left.id}": {script.record_of(left).decode()}\n}}\n'
    path.write_text(path.read_text().replace("\n}\n", entry))
    store = opened()
    recovered = store.recover(lambda job: job._replace(status="Failed", error="it was left behind"))
    assert store.get(ended).status == "Completed"
    assert not recovered.done()
    assert store.get(left.id).status == "Failed"  # nobody is shown it before it is known whether somebody has it
    assert recovered.done()


@pytest.mark.parametrize("bench", bench_store.BENCHES.values(), ids=bench_store.BENCHES)
def test_benches(bench, monkeypatch):
    monkeypatch.setattr(bench_store, "SECONDS_BESIDE", 0.5)
    figures = bench(2_000, lambda text, share: None)
    assert all(figure.measured for figure in figures)


# Images


@pytest.fixture
def images(script, tmp_path):
    return script.ImageStore(str(tmp_path / "images"))


@pytest.fixture
def today(script, dice):
    return a_job(script, dice, timestamp=int(time.time()))


def test_images(script, images, today, tmp_path):
    saved = images.save(today, an_answer(script, today.id, 3))
    content = [pixels(today.id, number) for number in range(3)]
    assert [b"".join(images.read(image.name)) for image in saved.images] == content
    assert [image.size for image in saved.images] == [len(data) for data in content]
    assert {image.media_type for image in saved.images} == {"image/png"}
    assert saved.bytes == sum(path.stat().st_size for path in tmp_path.glob("images/*/*"))
    assert images.size(saved.images[1].name) == len(content[1])
    assert images.remove(images.files_of(saved)) == saved.bytes
    assert os.listdir(str(tmp_path / "images")) == []
    assert images.size(saved.images[0].name) is None


def test_images_in_records(script, images, today):
    """An earlier version on the same folder reads the names alone, and would set aside what else it finds there."""
    strange = [base64.b64encode(data) for data in (b"\xff\xd8\xff", b"no image", b"RIFF....WEBP")]
    saved = images.save(today, an_answer(script, today.id, 1)._replace(images=[*strange, b"no base64"]))
    record = json.loads(script.record_of(saved).decode())
    assert record["images"] == [image.name for image in saved.images]
    assert script.job_from_record(record) == saved
    assert [(image.file_name, image.size, image.media_type) for image in saved.images] == [
        (f"{today.id}_0.jpg", 3, "image/jpeg"),
        (f"{today.id}_1.bin", 8, "application/octet-stream"),
        (f"{today.id}_2.webp", 12, "image/webp"),
        (f"{today.id}_3.txt", 9, "text/plain"),
    ]
    unknown = saved._replace(images=tuple(image._replace(size=None) for image in saved.images))
    assert script.job_from_record(json.loads(script.record_of(unknown).decode())) == unknown
    for details in (None, {}, [], [[1, "image/png"]] * 5, [None] * 4, [[1]] * 4, [[-1, "a\r\nb: c"], [True, 1], "", 7]):
        assert script.job_from_record({**record, "image_details": details}) == unknown
    del record["image_details"]
    assert script.job_from_record(record) == unknown
    for names in (None, "a", [1], [None], ["../x_0.png"], ["2025-01-12/AAAAAAAA_0.png"]):
        with pytest.raises(ValueError):
            script.job_from_record({**record, "images": names})


STRINGS = [
    "",
    "A",
    "AAAA",
    "data:image/png;base64,iVBORw0KGgo=",
    "no base64 at all",
    "AAA=",
    "AAB=",
    "AA A",
    "\ud800",
    "猫" * 4,
]


@pytest.mark.parametrize("text", STRINGS, ids=ascii)
def test_strings_that_are_no_images(script, images, today, text):
    saved = images.save(today, script.Answer([text.encode("utf-8", "surrogatepass")], b"{}"))
    (image,) = saved.images
    given = b"".join(images.read_as_json(image.name)).decode()
    assert json.loads(given) == text.partition(",")[2] if text.startswith("data:") else json.loads(given) == text


@pytest.mark.parametrize("kind", ["a file", "a link to nothing"])
def test_images_is_no_folder(script, today, tmp_path, caplog, kind):
    place = tmp_path / "images"
    if kind == "a file":
        place.write_bytes(b"precious")
    else:
        place.symlink_to(tmp_path / "nowhere")
    images = script.ImageStore(str(place))
    saved = images.save(today, an_answer(script, today.id, 1))
    assert b"".join(images.read(saved.images[0].name)) == pixels(today.id, 0)
    (aside,) = tmp_path.glob("images.damaged-*")
    assert str(aside) in caplog.text
    assert kind != "a file" or aside.read_bytes() == b"precious"


def test_images_goes_while_it_is_used(script, images, today, tmp_path):
    script.shutil.rmtree(str(tmp_path / "images"))
    assert list(images.older_than(time.time() + 9)) == []
    saved = images.save(today, an_answer(script, today.id, 1))
    assert images.size(saved.images[0].name)


def test_images_may_be_a_link(script, today, tmp_path):
    """To another disk. Only below it no link is followed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    images = script.ImageStore(str(tmp_path / "images"))
    saved = images.save(today, an_answer(script, today.id, 1))
    assert (tmp_path / "elsewhere" / saved.images[0].name).exists()
    assert len(list(images.older_than(time.time() + 9))) == 2


def test_no_link_below_images_is_followed(script, images, today, tmp_path, caplog):
    outside = tmp_path / "outside"
    outside.mkdir()
    name = f"{images.day_of(today)}/{today.id}_0.png"
    (outside / f"{today.id}_0.png").write_bytes(b"secret")
    day = tmp_path / "images" / images.day_of(today)
    # A folder that is a link.
    day.symlink_to(outside)
    with pytest.raises(script.StoreError):
        list(images.read(name))
    assert images.size(name) is None
    assert images.remove([name]) == 0
    assert list(images.older_than(time.time() + 9)) == []
    saved = images.save(today, an_answer(script, today.id, 1))
    assert b"".join(images.read(name)) == pixels(today.id, 0)
    assert os.listdir(str(outside)) == [f"{today.id}_0.png"]
    assert (outside / f"{today.id}_0.png").read_bytes() == b"secret"
    assert "set aside" in caplog.text
    # An image that is a link.
    (tmp_path / "images" / name).unlink()
    (tmp_path / "images" / name).symlink_to(outside / f"{today.id}_0.png")
    with pytest.raises(script.StoreError):
        list(images.read(name))
    images.remove(images.files_of(saved))
    assert not os.path.lexists(str(tmp_path / "images" / name))
    assert (outside / f"{today.id}_0.png").exists()


@pytest.mark.skipif(os.name == "nt", reason="no pipes in folders")
def test_a_pipe_for_an_image_holds_up_nobody(images, today, tmp_path):
    day = tmp_path / "images" / images.day_of(today)
    day.mkdir()
    os.mkfifo(str(day / f"{today.id}_0.png"))
    assert images.size(f"{images.day_of(today)}/{today.id}_0.png") is None


def test_images_gone_or_cut(script, tmp_path, dice):
    tracker = make_tracker(script, tmp_path, TRACKER_RETENTION="off")
    job = a_job(script, dice, timestamp=int(time.time()))
    tracker.accept(job, lambda: True).result()
    tracker.start(job.id)
    tracker.finish(job.id, an_answer(script, job.id, 3))
    done = when_ended(tracker, job.id)
    (tmp_path / "images" / done.images[0].name).unlink()
    os.truncate(str(tmp_path / "images" / done.images[1].name), 50)
    shown = json.loads(b"".join(tracker.as_json(done)).decode())
    assert (shown["status"], shown["images"][0]) == ("Completed", None)
    assert shown["images"][2] == an_answer(script, job.id, 3).images[2].decode()
    assert "no longer on disk" in shown["error"]
    assert tracker.delete(job.id)
    assert not list(tmp_path.glob("images/*"))
    tracker.close()


@pytest.mark.parametrize("opened", range(3))
def test_images_that_cannot_be_read_for_a_moment(script, tmp_path, dice, opened):
    """Too many files are open: whoever asks is told so, and not that the images are lost."""
    tracker = make_tracker(script, tmp_path, TRACKER_RETENTION="off")
    job = a_job(script, dice, timestamp=int(time.time()))
    assert generate(script, tracker, job) == "Completed"
    count = [0]

    def fail_once(path: str, *arguments: Any) -> int:
        if f"{os.sep}images{os.sep}" in str(path):
            count[0] += 1
            if count[0] == opened + 1:
                raise OSError(errno.EMFILE, "Too many open files", path)
        return os.open(path, *arguments)

    def shown() -> Any:
        return json.loads(b"".join(tracker.as_json(tracker.get(job.id))))

    whole = shown()
    assert whole["images"] == [image.decode() for image in an_answer(script, job.id, 1).images]
    script.os = WrappedOs(open=fail_once)
    if opened == 1:  # between two looks at the image
        without = shown()
        assert without["error"] == "The parameters cannot be read: Too many open files"
        assert without == {**whole, "parameters": None, "info": None, "error": without["error"]}
    else:
        with pytest.raises(script.StoreError, match="Too many open files"):
            shown()
    assert shown() == whole
    script.os = os
    tracker.close()


def test_an_image_that_was_no_image_and_is_damaged(script, images, today, tmp_path):
    saved = images.save(today, script.Answer([b"no base64"], b"{}"))
    (tmp_path / "images" / saved.images[0].name).write_bytes(b"\xff\xfe")
    with pytest.raises(script.StoreError):
        list(images.read_as_json(saved.images[0].name))


def test_a_folder_that_a_purge_takes_away_just_now(script, images, today, tmp_path):
    """It removes the day's folder with its last file, while another job's first file is being made."""
    made, real = [], os.open

    def open_late(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith(".part") and not made:
            made.append(os.rmdir(os.path.dirname(path)))
        return real(path, flags, mode)

    script.os = WrappedOs(open=open_late)
    saved = images.save(today, an_answer(script, today.id, 1))
    assert made and images.size(saved.images[0].name)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_images_that_cannot_be_stored_leave_nothing(script, images, today, tmp_path, call):
    count = [0]

    def fail_the_third(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return getattr(os, call)(*arguments)

    script.os = WrappedOs(**{call: fail_the_third})
    with pytest.raises(script.StoreError):
        images.save(today, an_answer(script, today.id, 3))
    assert not list(tmp_path.glob("images/*/*"))


def test_images_that_are_read_only(script, tmp_path, dice):
    """The job has failed and says why; as soon as it can be written, others are stored."""
    with mounted(tmp_path / "images", "ro"):
        tracker = make_tracker(script, tmp_path, TRACKER_RETENTION="off")
        failed = a_job(script, dice, timestamp=int(time.time()))
        assert generate(script, tracker, failed) == "Failed"
        assert "Read-only file system" in tracker.get(failed.id).error
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "images")], check=True)
        done = a_job(script, dice, timestamp=int(time.time()))
        assert generate(script, tracker, done) == "Completed"
        assert files_are_whole(tracker, tracker.get(done.id))
        tracker.close().result(60)
