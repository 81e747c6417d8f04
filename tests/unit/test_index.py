"""The index, the view beside jobs.json: whatever becomes of it costs no job, no answer and nobody else's file."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from disks import ROOT, mounted
from inside import SCRIPT, a_job, alive, completed, set_constants, until, within
from journal import lines

from harness import TESTS

BEFORE = "9945b77"  # the last commit without an index
EARLIER = {"": "78461e1", "2": "c4dd77c"}  # versions with it: what its name ends in, and the last commit


@pytest.fixture
def index(tmp_path):
    return tmp_path / "jobs.json.index3"


def filled(script: Any, store: Any, dice: random.Random, count: int = 200, **fields: Any) -> List[Any]:
    jobs = [a_job(script, dice, **fields) for _ in range(count)]
    for written in [store.put(job, new=True) for job in jobs]:
        written.result(20)
    return jobs


def every(script: Any, store: Any) -> Dict[str, Any]:
    return {job.id: job for job in within(20, store.query, script.Filter(), 100_000).jobs}


def modes(folder: Path) -> Dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.glob("jobs.json*")}


# The index is removed, damaged, or another's


def remove(index: Path) -> None:
    for path in index.parent.glob("jobs.json.index*"):
        path.unlink()


def fill_with_rubbish(index: Path) -> None:
    index.write_bytes(os.urandom(50_000))


def spoil_pages(index: Path) -> None:
    data = index.read_bytes()
    index.write_bytes(data[:4096] + os.urandom(len(data) - 4096))


def truncate(index: Path) -> None:
    index.write_bytes(b"")


def replace_by_folder(index: Path) -> None:
    remove(index)
    index.mkdir()


def replace_by_pipe(index: Path) -> None:
    remove(index)
    os.mkfifo(index)


CHANGES = [remove, fill_with_rubbish, spoil_pages, truncate, replace_by_folder, replace_by_pipe]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("is_running", [True, False], ids=["running", "at a start"])
def test_whatever_becomes_of_the_index(script, opened, index, dice, change, is_running):
    store = opened()
    jobs = filled(script, store, dice)
    assert len(every(script, store)) == len(jobs)
    if not is_running:
        store.close()
    change(index)
    store = store if is_running else opened()
    more = filled(script, store, dice, 3)
    within(20, store.put(completed(jobs[0])).result)
    assert every(script, store) == {job.id: job for job in (completed(jobs[0]), *jobs[1:], *more)}
    assert within(20, store.get, jobs[1].id) == jobs[1]
    assert within(20, store.stats)[0]["Completed"] == 1


def test_the_index_is_removed_while_many_look(script, opened, index, dice):
    """It is a file again after that, and at no moment open to more people than jobs.json."""
    every(script, opened())
    index.with_name("jobs.json").chmod(0o600)
    store = opened()
    jobs = filled(script, store, dice, 1000, prompt="a" * 3000)
    remove(index)
    with ThreadPoolExecutor(6) as pool:
        looks = [pool.submit(store.query, script.Filter(q="z"), 5) for _ in range(20)]
        assert all(look.result(30).jobs == [] for look in looks)
    filled(script, store, dice, 1)
    assert len(every(script, store)) == len(jobs) + 1 and index.stat().st_size > 0
    assert set(modes(index.parent).values()) == {0o600}


def test_one_that_was_removed_is_not_made_by_who_looks(script, index):
    """SQLite would make it for everybody to read, whoever may read jobs.json."""
    opened = script.Index(str(index), str(index))
    with opened.reading():
        index.unlink()
        with pytest.raises(sqlite3.OperationalError), opened.reading():
            pass
    opened.close()
    assert not index.exists()


@pytest.mark.parametrize("name", ["a b?mode=memory", "100%41 #1", "\udcff"], ids=ascii)
def test_whatever_its_folder_is_called(script, opened, tmp_path, dice, name):
    jobs = filled(script, opened(tmp_path / name), dice, 2)
    assert len(every(script, opened(tmp_path / name))) == len(jobs)
    assert (tmp_path / name / "jobs.json.index3").stat().st_size


def test_a_link_to_a_file_of_somebody_is_not_followed(script, opened, index, tmp_path_factory, dice):
    other = tmp_path_factory.mktemp("other") / "theirs.db"
    with contextlib.closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE precious (value)")
    other.chmod(0o644)
    before = other.read_bytes()
    index.symlink_to(other)
    (index.parent / "jobs.json").write_bytes(b"{\n}\n")
    (index.parent / "jobs.json").chmod(0o600)
    store = opened()
    jobs = filled(script, store, dice, 3)
    assert len(every(script, store)) == len(jobs)
    assert other.read_bytes() == before and stat.S_IMODE(other.stat().st_mode) == 0o644


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_jobs_are_made_private_while_the_webui_runs(script, opened, index, dice):
    """The index has the prompts, too."""
    store = opened()
    filled(script, store, dice, 3)
    (index.parent / "jobs.json").chmod(0o600)
    filled(script, store, dice, 1)
    every(script, store)
    assert {name: mode for name, mode in modes(index.parent).items() if name.startswith(index.name)} == dict.fromkeys(
        [index.name, index.name + "-wal", index.name + "-shm"], 0o600
    )


READ_ONLY = """
import os, sys
sys.path.insert(0, {tests!r})
from inside import load_script
script = load_script()
os.setgid(65534)
os.setuid(65534)
store = script.JobStore({folder!r})
store.put(script.Job("BBBBBBBB", "txt2img", "Pending", 1736712000, None, "b"), new=True).result(20)
print(len(store.query(script.Filter(), 10).jobs), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not ROOT, reason="only root can make somebody else's files")
def test_an_index_that_only_its_owner_may_write(script, opened, public, dice):
    filled(script, opened(public), dice, 1)
    folder, index = public, public / "jobs.json.index3"
    folder.chmod(0o777)
    for path in folder.glob("jobs.json*"):
        path.chmod(0o666)
    index.chmod(0o644)
    code = READ_ONLY.format(tests=str(TESTS / "support"), folder=str(folder))
    process = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=30)
    assert process.stdout == b"2\n"


# The disk


def test_a_disk_with_no_room_for_the_first_index(script, opened, tmp_path, dice):
    """The index is then in memory, and what it took of the disk is given back to the jobs."""
    disk = tmp_path / "disk"
    with mounted(disk, "size=6m"):
        jobs = [completed(a_job(script, dice, prompt="c" * 200)) for _ in range(8000)]
        (disk / "jobs.json").write_bytes(lines(script, *jobs))
        store = opened(disk)
        assert len(within(30, store.query, script.Filter(), 50).jobs) == 50
        within(20, store.put(a_job(script, dice), new=True).result)
        assert sum(within(20, store.stats)[0].values()) == len(jobs) + 1
        store.close()


def test_the_index_leaves_the_disk_to_the_jobs(script, opened, tmp_path, dice):
    """Who fills a disk finds it full of jobs, not of a view of them that is made anew at any time."""
    disk = tmp_path / "disk"
    with mounted(disk, "size=4m"):
        store = opened(disk)
        with pytest.raises(script.StoreError):
            for _ in range(10_000):
                store.put(a_job(script, dice, prompt="p" * 3000), new=True).result(20)
        assert (disk / "jobs.json").stat().st_size > 1 << 20
        store.close()


# Another program holds the database


@contextlib.contextmanager
def held(index: Path) -> Iterator[None]:
    """A write transaction of another program, as long as this lasts."""
    with contextlib.closing(sqlite3.connect(index, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("ROLLBACK")


def test_another_program_holds_the_index(script, opened, index, dice):
    """A record is safe once it is in jobs.json: neither its request nor a neighbour waits for the index."""
    store, neighbour = opened(), opened()
    jobs = [*filled(script, store, dice, 3), *filled(script, neighbour, dice, 3)]
    with held(index):
        new = [a_job(script, dice) for _ in range(2)]
        for written in [store.put(new[0], new=True), neighbour.put(new[1], new=True)]:
            written.result(3)
        for one in (store, neighbour):
            assert set(every(script, one)) == {job.id for job in (*jobs, *new)}
    assert set(every(script, store)) == {job.id for job in (*jobs, *new)}


def test_another_program_holds_the_index_at_a_start(script, opened, index, dice):
    jobs = filled(script, opened(), dice, 3)
    with held(index):
        store = opened()
        assert within(8, store.get, jobs[0].id) == jobs[0]


# In memory


@pytest.fixture
def in_memory(opened, index):
    """A store whose index cannot be a file."""
    index.mkdir()
    return opened()


def test_an_index_in_memory(script, opened, in_memory, index, dice):
    jobs = filled(script, in_memory, dice, 300)
    in_memory.put(completed(jobs[0])).result(20)
    in_memory.remove([jobs[1].id]).result(20)
    index.rmdir()
    beside = opened()  # whose index is a file
    expected = {job.id: job for job in (completed(jobs[0]), *jobs[2:])}
    assert every(script, in_memory) == every(script, beside) == expected
    more = [*filled(script, in_memory, dice, 20), *filled(script, beside, dice, 20)]
    expected.update((job.id, job) for job in more)
    assert every(script, in_memory) == every(script, beside) == expected


def test_jobs_are_replaced_while_many_look_into_memory(script, in_memory, index, dice):
    path = index.parent / "jobs.json"
    jobs = filled(script, in_memory, dice, 2000, prompt="a" * 1000)
    with ThreadPoolExecutor(6) as pool:
        looks = [pool.submit(in_memory.query, script.Filter(q="z"), 5) for _ in range(100)]
        for _ in range(3):
            shutil.copyfile(path, str(path) + ".new")
            os.replace(str(path) + ".new", path)
            within(20, in_memory.put(completed(jobs[0])).result)
        assert all(within(30, look.result).jobs == [] for look in looks)


def test_the_store_is_closed_while_many_look_into_memory(script, in_memory, dice):
    filled(script, in_memory, dice, 2000, prompt="a" * 1000)
    every(script, in_memory)
    failed = []

    def look() -> None:
        with contextlib.suppress(script.StoreError):
            while True:
                in_memory.query(script.Filter(q="z"), 5)
        failed.append(True)

    threads = [threading.Thread(target=look, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    within(20, in_memory.close)
    for thread in threads:
        thread.join(20)
    assert len(failed) == len(threads)


def test_looks_into_memory_do_not_keep_a_job_from_the_disk(script, in_memory, dice):
    filled(script, in_memory, dice, 300, prompt="a" * 100_000)
    every(script, in_memory)
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            in_memory.query(script.Filter(q="a" * 499 + "b"), 5)

    with ThreadPoolExecutor(4) as pool:
        looks = [pool.submit(look) for _ in range(4)]
        try:
            for _ in range(3):
                in_memory.put(a_job(script, dice), new=True).result(5)
        finally:
            ended.set()
        assert all(done.result(30) is None for done in looks)


# What jobs.json may hold


def test_half_a_character_in_any_text_of_a_record(script, opened, index, dice):
    """By hand, or from another program: as JSON it is valid."""
    job = a_job(script, dice)
    record = script.record_of(job._replace(ip="IP", key="KEY", status="Failed", error="x"))
    record = record.replace(b'"IP"', b'"\\ud800"').replace(b'"KEY"', b'"\\udfff"')
    path = index.parent / "jobs.json"
    path.write_bytes(b'{\n"%s": %s\n}\n' % (job.id.encode(), record))
    store = opened()
    assert within(20, store.get, job.id).prompt == job.prompt
    assert list(every(script, store)) == [job.id]
    new = a_job(script, dice)
    within(20, store.put(new, new=True).result)
    assert set(every(script, store)) == {job.id, new.id}


def test_half_a_character_in_a_new_job_or_a_filter(script, opened, index, dice):
    store = opened()
    job = a_job(script, dice, ip="\ud800")
    within(20, store.put(job, new=True).result)
    assert list(alive(index.parent / "jobs.json")) == [job.id] == list(every(script, store))
    within(20, store.query, script.Filter(ip="\udfff"), 5)


# Copies


@pytest.mark.parametrize("endings", [(), ("",), ("", "-wal"), ("", "-wal", "-shm"), ("-wal",)], ids=str)
def test_a_folder_that_was_copied_under_a_running_webui(script, opened, index, tmp_path_factory, dice, endings):
    store = opened()
    jobs = filled(script, store, dice)
    store.put(completed(jobs[0])).result(20)
    copy = tmp_path_factory.mktemp("copy")
    for name in ("jobs.json", *(index.name + ending for ending in endings)):
        shutil.copyfile(str(index.parent / name), str(copy / name))
    assert every(script, opened(copy)) == {job.id: job for job in (completed(jobs[0]), *jobs[1:])}


@pytest.mark.parametrize("name", ["jobs.json", "jobs.json.index3"])
def test_one_of_the_two_is_restored(script, opened, index, tmp_path_factory, dice, name):
    store = opened()
    jobs = filled(script, store, dice)
    store.close()
    copy = tmp_path_factory.mktemp("copy") / name
    shutil.copy2(str(index.parent / name), str(copy))
    store = opened()
    store.remove([job.id for job in jobs[:50]]).result(20)
    filled(script, store, dice, 60)
    store.close()
    shutil.copy2(str(copy), str(index.parent / name))
    assert set(every(script, opened())) == set(alive(index.parent / "jobs.json"))


# Neighbours and builds


def program_of(commit: str) -> Any:
    """An earlier version."""
    command = ["git", "show", f"{commit}:scripts/{SCRIPT.name}"]
    shown = subprocess.run(command, cwd=str(SCRIPT.parent), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if shown.returncode:
        pytest.skip("needs the history")
    module = types.ModuleType("job_tracker.py")
    module.__file__ = str(SCRIPT)
    exec(compile(shown.stdout, SCRIPT.name, "exec"), module.__dict__)
    return module


@pytest.fixture
def before() -> Any:
    """The version before, which knows of no index."""
    return program_of(BEFORE)


def test_the_version_before_is_a_neighbour(script, opened, before, index, dice):
    """It appends, removes and compacts without the index."""
    before.JobStore.SPARE_DEAD = 20  # its name for it
    set_constants(script, MIN_DEAD_ENTRIES=20)
    new, old = opened(), opened(program=before)
    known: Dict[str, Any] = {}
    for step in range(150):
        store, program = dice.choice([(new, script), (old, before)])
        if known and dice.random() < 0.7:
            fields = {"status": "Failed", "error": str(step)}
            job_id = dice.choice(list(known))
            job = known[job_id] = known[job_id]._replace(**fields)
        else:
            job = a_job(script, dice)
            known[job.id] = job
        theirs = program.Job(**{name: value for name, value in job._asdict().items() if name in program.Job._fields})
        within(20, store.put(theirs).result)
        assert within(20, new.get, job.id) == job
        if step % 10 == 0:
            gone = known.pop(dice.choice(list(known)))
            within(20, store.remove([gone.id]).result)
    assert every(script, new) == known
    assert set(alive(index.parent / "jobs.json")) == set(known)
    assert {job.id for job in old.query(before.Filter(), 1000)[0]} == set(known)


@pytest.mark.parametrize("ending", EARLIER)
def test_an_earlier_version_on_the_same_folder(script, opened, index, dice, ending):
    """Each has its own, also after a compaction, and both count the same. That of the earlier one goes after it."""
    earlier = program_of(EARLIER[ending])
    earlier.JobStore.MIN_DEAD_ENTRIES = 20
    set_constants(script, MIN_DEAD_ENTRIES=20)
    stores = [(opened(), script), (opened(program=earlier), earlier)]
    for store, _ in stores:
        within(20, store.recover(lambda job: job).result)
    for number in range(200):
        store, program = stores[number % 2]
        fields = {name: value for name, value in a_job(script, dice)._asdict().items() if name in earlier.Job._fields}
        job = program.Job(**{**fields, "bytes": number, "status": "Pending"})
        within(20, store.put(job, new=True).result)
        store, program = dice.choice(stores)
        within(20, store.put(program.Job(**{**fields, "bytes": 10, "status": "Completed"})).result)
    for store, _ in stores:
        assert store.idle(20)
        assert store.stats() == ({"Pending": 0, "Processing": 0, "Completed": 200, "Failed": 0}, 2000)
    theirs = index.with_name(f"jobs.json.index{ending}")
    for store, _ in stores:  # the earlier version ends last
        store.close()
        again = opened()
        within(20, again.recover(lambda job: job).result)
        again.close()
        assert (index.exists(), theirs.exists()) == (True, store is stores[0][0])


def test_the_first_build_keeps_nobody_waiting(script, opened, index, dice):
    jobs = [completed(a_job(script, dice)) for _ in range(20_000)]
    (index.parent / "jobs.json").write_bytes(lines(script, *jobs))
    store = opened()
    assert within(20, store.get, jobs[7].id) == jobs[7]
    new = a_job(script, dice)
    within(20, store.put(new, new=True).result)
    assert within(20, store.get, new.id) == new
    assert not store.idle(0)  # it was not so quick that this shows nothing
    assert len(every(script, store)) == len(jobs) + 1


def test_a_look_through_the_file_keeps_nobody_from_it(script, opened, index, dice, monkeypatch):
    """Who asks for an unknown job while the index is made has the whole file read."""
    jobs = [completed(a_job(script, dice)) for _ in range(20_000)]
    (index.parent / "jobs.json").write_bytes(lines(script, *jobs))
    find_last_entry, begun, gate = script.find_last_entry, threading.Event(), threading.Event()

    def find(file: int, job_id: str) -> Any:
        if job_id == "Unknown0":
            begun.set()
            assert gate.wait(60)
        return find_last_entry(file, job_id)

    monkeypatch.setattr(script, "find_last_entry", find)
    store = opened()
    with ThreadPoolExecutor(1) as pool:
        unknown = pool.submit(store.get, "Unknown0")
        try:
            assert begun.wait(20)
            assert within(20, store.get, jobs[7].id) == jobs[7]
        finally:
            gate.set()
        assert unknown.result(60) is None


def test_the_first_build_shows_no_job_that_a_dead_process_left_as_if_it_ran(script, opened, index, dice):
    left = a_job(script, dice, status="Processing", owner="deadbeef")
    jobs = [completed(a_job(script, dice)) for _ in range(20_000)]
    (index.parent / "jobs.json").write_bytes(lines(script, *jobs, left))
    store = opened()
    store.recover(lambda job: job._replace(status="Failed", error="gone"))
    seen = {within(60, store.get, left.id).status}
    until(lambda: seen.add(store.get(left.id).status) or store.idle(0))
    assert seen == {"Failed"}


def test_a_compaction_that_failed_keeps_no_neighbour_from_it(script, opened, index, dice):
    """Also when the webui that gave it up lives on, and has nothing to do."""
    set_constants(script, MIN_DEAD_ENTRIES=20)
    store, job = opened(), a_job(script, dice)
    path = index.parent / "jobs.json"

    class Full:
        """Stands for `os`: there is no room for a second jobs.json."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, name: Any, *args: Any, **options: Any) -> int:
            if str(name).endswith(".part"):
                raise OSError(errno.ENOSPC, "No space left on device", str(name))
            return os.open(name, *args, **options)

    script.os = Full()
    for number in range(60):
        store.put(job._replace(bytes=number)).result(20)
    assert store.idle(20)
    script.os = os
    neighbour = opened()
    for number in range(60):
        neighbour.put(job._replace(bytes=number)).result(20)
    assert neighbour.idle(20) and path.read_bytes().count(b"\n") < 60


def test_the_disk_goes_away_in_a_compaction(script, opened, tmp_path, dice):
    """The store lives on, and goes on when it is back."""
    set_constants(script, COMPACT_RETRY=0)
    gone = threading.Event()

    def check() -> None:
        if gone.is_set():
            raise OSError(errno.EIO, "Input/output error")

    store = script.JobStore(str(tmp_path), check)
    jobs = filled(script, store, dice, 3000)
    for change in ("a", "b"):
        for written in [store.put(completed(job)._replace(error=change)) for job in jobs]:
            written.result(20)
    gone.set()
    (tmp_path / "jobs.json").unlink()
    with pytest.raises(script.StoreError):
        within(20, store.put(a_job(script, dice), new=True).result)
    gone.clear()
    new = a_job(script, dice)
    within(20, store.put(new, new=True).result)
    assert every(script, store) == {new.id: new}
    within(20, store.close)
