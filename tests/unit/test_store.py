"""The store: what it promises of jobs, on disks that are full, fail or go away, in threads and at its end."""

from __future__ import annotations

import errno
import gc
import os
import random
import shutil
import threading
import time
import tracemalloc
from concurrent.futures import wait
from typing import Any, List

import bench_store
import pytest
from disks import mounted
from inside import (
    WrappedFcntl,
    WrappedOs,
    a_job,
    alive,
    completed,
    files_are_whole,
    generate,
    load_script,
    make_tracker,
    read_jobs,
    set_constants,
    until,
)
from journal import every, lines, settled

from harness import fewer


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


def test_the_folder_is_made_and_synced(script, tmp_path, dice):
    synced = []
    real = script.sync_folder
    script.sync_folder = lambda folder: (synced.append(folder), real(folder))
    folder = tmp_path / "one" / "two"
    store = script.JobStore(str(folder))
    store.put(a_job(script, dice), new=True).result()
    store.close()
    assert {str(tmp_path), str(tmp_path / "one"), str(folder)} <= set(synced)


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


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="which file a descriptor is cannot be told here")
def test_a_disk_without_room_for_the_first_bytes_of_a_compaction(script, opened, path, dice):
    set_constants(script, MIN_DEAD_ENTRIES=10, COMPACT_RETRY=0)

    def pwrite(file: int, *args: Any) -> int:
        if os.readlink(f"/proc/self/fd/{file}").endswith(".part"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(file, *args)

    script.os = WrappedOs(pwrite=pwrite)
    store, job = opened(), a_job(script, dice)
    store.put(job, new=True).result()
    inode = path.stat().st_ino
    for number in range(40):
        store.put(job._replace(bytes=number)).result()
    assert store.idle() and path.stat().st_ino == inode and not list(path.parent.glob("*.part"))
    script.os = os
    store.put(job).result()
    until(lambda: path.stat().st_ino != inode)


def test_a_folder_that_is_not_synced_after_a_compaction(script, opened, path, dice, monkeypatch):
    """A power cut could put the old file back, so nothing is stored in the new one before."""
    set_constants(script, MIN_DEAD_ENTRIES=10)
    store, job, failed, synced = opened(), a_job(script, dice), [], set()
    store.put(job, new=True).result()
    first, sync_folder = path.stat().st_ino, script.sync_folder

    def fail_once(folder: str) -> None:
        if path.stat().st_ino != first and not failed:
            failed.append(folder)
            raise OSError(errno.EMFILE, "Too many open files")
        sync_folder(folder)
        synced.add(path.stat().st_ino)

    monkeypatch.setattr(script, "sync_folder", fail_once)
    for number in range(40):
        store.put(job._replace(bytes=number)).result()
    assert store.idle() and failed
    store.put(job).result()
    assert path.stat().st_ino in synced


def test_a_folder_that_is_not_synced_at_the_start(script, opened, path, dice, monkeypatch):
    calls, sync_folder = [], script.sync_folder

    def fail_once(folder: str) -> None:
        calls.append(folder)
        if len(calls) == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        sync_folder(folder)

    store = opened()
    monkeypatch.setattr(script, "sync_folder", fail_once)
    with pytest.raises(script.StoreError):
        store.put(a_job(script, dice), new=True).result()
    store.put(a_job(script, dice), new=True).result()
    assert calls == [str(path.parent)] * 2


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


# Many jobs; bench_store.py measures it


def test_memory_of_many_jobs(script, tmp_path):
    count = fewer(20_000)
    bench_store.write_file(script, tmp_path / "jobs.json", count, 3, lambda text, share: None)
    script.JobStore.MIN_DEAD_ENTRIES = 1 << 60
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        store = script.JobStore(str(tmp_path))
        store.stats()
        gc.collect()
        assert (tracemalloc.get_traced_memory()[0] - before) / count < 100
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


# What a failure is called


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: OSError(errno.ENOSPC, "No space left on device", "/data/jobs.json"), "No space left on device"),
        (lambda: OSError(errno.EXDEV, "Invalid link", "/data/a", None, "/data/b"), "Invalid link"),
        (lambda: FileNotFoundError(errno.ENOENT, "No such file", b"/data"), "No such file"),
        (lambda: OSError("the store is closed"), "the store is closed"),
        (lambda: OSError(), "OSError"),
        (lambda: OSError(errno.EIO), "OSError"),
        (lambda: shutil.SameFileError("'/data/a' and '/data/a' are the same file"), "SameFileError"),
        (lambda: shutil.Error([("/data/a", "/data/b", "why")]), "Error"),
        (lambda: ValueError("it must be true or false"), "it must be true or false"),
        (lambda: MemoryError(), "MemoryError"),
    ],
)
def test_reasons(make, reason):
    assert load_script().reason_of(make()) == reason
