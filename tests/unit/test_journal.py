"""jobs.json: what is written is valid JSON at any moment, and of what is damaged all that can be kept is kept."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import threading
from typing import Any, Dict, List

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from inside import WrappedOs, a_job, alive, completed, load_script, read_jobs, until
from journal import FOREIGN, MUTATION, damaged, every, lines, mutated, settled

from harness import fewer

EMPTY = b"{\n}\n"


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
    ends = range(before, len(whole))
    if fewer(3) == 1:  # its edges, and one of three between
        ends = sorted({*ends[:20], *ends[::3], *ends[-20:]})
    for end in ends:
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
    """As Docker makes one for a file that is to be mounted and is not there."""
    path.mkdir()
    store = opened()
    for _ in range(2):
        assert isinstance(store.put(a_job(script, dice), new=True).exception(), script.StoreError)
    assert caplog.text.count("jobs.json cannot be written: IsADirectoryError") == 1 and path.is_dir()
    path.rmdir()
    store.put(a_job(script, dice), new=True).result()


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
    assert not damaged(path) and store.quarantined_ids() is None
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
    assert store.quarantined_ids() >= {three[1].id}


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
