"""Several stores on one folder, and what those left behind that are gone."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from inside import WrappedOs, a_job, alive, completed, load_script, make_tracker, set_constants, until, within
from journal import all_pages, every, lines


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


def test_what_a_neighbour_removes_before_the_index_knows_it_is_gone(opened, dice):
    """The index cannot be written for a moment, and then knows for long nothing of what its own store has written."""
    slow, released = load_script(), threading.Event()
    add, calls = slow.Index.add, itertools.count()

    def add_late(*args: Any) -> bool:
        if next(calls) == 0:
            raise sqlite3.OperationalError("database is locked")
        assert released.wait(20)
        return add(*args)

    neighbour = opened()
    store, job = opened(program=slow), a_job(slow, dice)
    assert store.get("00000000") is None  # it is ready
    slow.Index.add = add_late
    store.put(job, new=True).result(10)
    neighbour.remove([job.id]).result(10)
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(store.get, job.id)
        time.sleep(0.1)
        released.set()
        assert seen.result(20) is None


@pytest.mark.every_store
def test_what_others_wrote_is_seen_under_load(script, opened, dice):
    """There is always something to write, and the file is compacted besides."""
    script.JobStore.MIN_DEAD_ENTRIES = 50
    busy, other = opened(), opened()
    stop = threading.Event()

    def write() -> None:
        own = random.Random()
        job = a_job(script, own, owner=busy.owner)
        busy.put(job, new=True).result()
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
def test_much_is_written_during_a_compaction(script, path, opened, dice, caplog, piece):
    script.JOURNAL_CHUNK = piece
    script.JobStore.MIN_DEAD_ENTRIES = 0
    script.JobStore.COPIED_AT_ONCE = 20
    set_constants(script, LOCK_SECONDS=60.0)  # for a slow machine: a new job that cannot be written is none
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
    assert "could not be compacted" not in caplog.text  # only one of them tries at a time
    expected = {job.id for job in jobs}
    until(lambda: set(every(script, one)) == expected)
    assert every(script, one) == every(script, other)
    assert {job_id: script.job_from_record(record) for job_id, record in alive(path).items()} == every(script, one)


def test_touched_during_a_compaction(script, path, opened, dice, monkeypatch):
    """It is read anew, and that keeps nobody waiting."""
    script.JobStore.MIN_DEAD_ENTRIES = 0
    jobs, touched, add = [a_job(script, dice) for _ in range(6000)], threading.Event(), script.Index.add
    path.write_bytes(lines(script, *jobs, *jobs, *jobs[:10]))

    def touch(store: Any, *args: Any) -> None:
        os.utime(path)
        touched.set()
        copy_rest(store, *args)

    def add_slowly(*args: Any) -> bool:
        time.sleep(0.05 if touched.is_set() else 0)
        return add(*args)

    copy_rest = script.JobStore._copy_rest
    monkeypatch.setattr(script.JobStore, "_copy_rest", touch)
    monkeypatch.setattr(script.Index, "add", add_slowly)
    store = opened()
    store.stats()
    assert touched.wait(60)
    within(1, store.put(a_job(script, dice), new=True).result)


@pytest.mark.every_store
def test_paging_while_jobs_come_and_go(script, opened, dice):
    """Neither repeats nor skips a job that was there all the time."""
    script.JobStore.MIN_DEAD_ENTRIES = 30
    store = opened()
    jobs = [a_job(script, dice, timestamp=1736712000, owner=store.owner) for _ in range(300)]
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
