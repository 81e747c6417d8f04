"""Parked jobs where the disk, a neighbour or Reload UI comes at a bad moment."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from inside import SmallWebui, WrappedOs, a_job, alive, set_constants, within

from harness import ASYNC, until


def parked(script: Any, tracker: Any, **fields: Any) -> Any:
    """A parked job, on disk with its request."""
    fields = {"parked": True, "promised": True, "has_request": True, **fields}
    job = a_job(script, random.Random(), **fields)
    tracker.park(job, b"{}").result(20)
    return tracker.get(job.id)


def full_disk(script: Any) -> Callable[[], None]:
    """From now on nothing can be written to jobs.json, until the function is called that this returns."""
    write_at = script.write_at

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    script.write_at = fail
    return lambda: setattr(script, "write_at", write_at)


def test_what_a_neighbour_has_begun_is_not_parked_again(script, new_tracker):
    """Both found a job that a third one had left. One of them could not write that, and tries again later."""
    set_constants(script, RETRY=0.5)
    tracker, neighbour = new_tracker(), new_tracker()
    job = a_job(script, random.Random(), owner="00000000", promised=True, has_request=True)
    tracker.images.save_request(job, b"{}")
    until(lambda: tracker.housekeeper.next_purge and neighbour.housekeeper.next_purge)
    tracker.store.put(job, new=True).result(20)
    append, failed = script.JobStore._append, []

    def fail_once(store: Any, jobs: Any) -> None:
        if store is tracker.store and not failed:
            failed.append(jobs)
            raise OSError(28, "No space left on device")
        append(store, jobs)

    script.JobStore._append = fail_once
    tracker.recover().result(20)
    neighbour.recover().result(20)
    assert failed and neighbour.start_parked(job.id, lambda: True)
    time.sleep(1)
    assert tracker.store.idle(20)
    for one in (tracker, neighbour):
        assert one.store.get(job.id).status == "Processing"
    neighbour.fail(job.id, "so that it ends")


class HeldFiles:
    """Nothing reaches jobs.json until `go` is set."""

    def __init__(self, script: Any):
        self.go, self.began = threading.Event(), threading.Event()
        script.os = WrappedOs(pwrite=self._write)

    def _write(self, *arguments: Any) -> int:
        self.began.set()
        self.go.wait(20)
        return os.pwrite(*arguments)


def test_a_repeat_is_not_promised_a_job_that_is_withdrawn(script, tmp_path):
    """The first was told 503. Its repeat gets a job of its own, or none: never one that is removed then."""
    set_constants(script, PATIENCE=0.3, MOMENT=0.3)
    key = {"Idempotency-Key": "once", **ASYNC}

    async def ask(webui: SmallWebui) -> Any:
        disk = HeldFiles(script)
        requests = []
        for _ in range(2):
            requests.append(asyncio.ensure_future(webui.post({"prompt": "once"}, key)))
            await asyncio.sleep(0.6)
        disk.go.set()
        return await asyncio.gather(*requests)

    with SmallWebui(script, tmp_path) as webui:
        webui.tracker.stopping.set()  # so that it stays parked
        remove = script.Tracker.remove
        script.Tracker.remove = lambda *arguments: time.sleep(0.5) or remove(*arguments)
        first, repeat = asyncio.run(ask(webui))
        assert first.status_code == 503
        time.sleep(1)
        promised = [repeat.json()["id"]] if repeat.status_code == 202 else []
        assert [job.id for job in webui.jobs()] == promised


def started_too_late(script: Any, tracker: Any, meanwhile: Callable[[Any], None]) -> Any:
    """A parked job whose start comes to the disk when its webui has given it up. `meanwhile` is before it is undone."""
    job, change = parked(script, tracker), tracker.store.change
    disk = HeldFiles(script)
    threading.Timer(0.6, disk.go.set).start()

    def change_later(ids: Any, *arguments: Any, **more: Any) -> Any:
        if disk.go.is_set():
            tracker.store.change = change
            meanwhile(job)
        return change(ids, *arguments, **more)

    tracker.store.change = change_later
    assert not tracker.start_parked(job.id, lambda: True)
    return job


def test_what_began_too_late_waits_again_once_the_disk_takes_it(script, new_tracker):
    set_constants(script, PATIENCE=0.2, MOMENT=0.2, RETRY=0.2)
    tracker, mended = new_tracker(), []
    job = started_too_late(script, tracker, lambda job: mended.append(full_disk(script)))
    until(lambda: tracker.get(job.id).status == "Processing")
    time.sleep(0.3)
    mended[0]()
    until(lambda: tracker.get(job.id).parked, what="it is parked again")
    within(20, tracker.cancel, job.id)
    assert tracker.get(job.id).error == "Cancelled"


def test_what_began_too_late_was_to_be_cancelled(script, new_tracker):
    set_constants(script, PATIENCE=0.2, MOMENT=0.2)
    tracker, neighbour = new_tracker(), new_tracker()

    def cancel(job: Any) -> None:
        """By another webui, which takes it for one that runs."""
        wish = lambda job: job._replace(cancel_wanted=True)  # noqa: E731
        tracker.store.change([job.id], wish)

    job = started_too_late(script, tracker, cancel)
    until(lambda: tracker.get(job.id).ended)
    assert neighbour.get(job.id).error == "Cancelled"


@pytest.mark.parametrize("kept", ["not yet", "never"])
def test_a_neighbours_job_is_promised_only_with_its_request(script, new_tracker, tmp_path, kept):
    """Its record comes first, and says that there is one."""
    set_constants(script, PATIENCE=0.5)
    tracker, neighbour = new_tracker(), new_tracker()
    go = threading.Event()

    def save(images: Any, *arguments: Any) -> None:
        go.wait(20)
        raise script.StoreError("the disk is full")

    script.ImageStore.save_request = save
    job = a_job(script, random.Random(), has_request=True, key="a key")
    tracker.accept(job, lambda: True, b"{}").result(20)
    if kept == "never":
        go.set()
        until(lambda: not alive(tmp_path / "jobs.json")[job.id]["has_request"])
    with pytest.raises(script.StoreError):
        neighbour.promise(job.id)
    go.set()
    tracker.fail(job.id, "so that it ends")
    until(lambda: neighbour.get(job.id).ended)
    neighbour.promise(job.id)  # which needs no promise any more


@pytest.mark.every_store
def test_a_reloaded_webui_still_hears_of_cancels(script, new_tracker):
    """What its clients wait for runs on beside its successor, who is asked to cancel it."""
    tracker, successor = new_tracker(), new_tracker()
    job, cancelled = a_job(script, random.Random()), threading.Event()
    tracker.accept(job, lambda: not cancelled.set(), b"").result(20)
    closed = tracker.close()
    time.sleep(0.2)
    assert successor.cancel(job.id)
    until(cancelled.is_set, 10)
    tracker.fail(job.id, "Cancelled")
    closed.result(20)


def test_what_begins_at_a_reload_ends(script, new_tracker):
    """It has the queue lock while the webui reloads its scripts, and its start is on the way to the disk."""
    tracker = new_tracker()
    job = parked(script, tracker)
    disk, started = HeldFiles(script), []
    thread = threading.Thread(target=lambda: started.append(tracker.start_parked(job.id, lambda: True)))
    thread.start()
    assert disk.began.wait(20)
    closed = tracker.close()
    time.sleep(0.5)
    disk.go.set()
    thread.join(20)
    time.sleep(0.5)
    assert started == [True] and not closed.done()
    tracker.fail(job.id, "at its end")
    closed.result(20)
    successor = new_tracker()
    assert successor.get(job.id).error == "at its end"
    later = parked(script, successor)
    successor.close().result(20)
    assert not successor.start_parked(later.id, lambda: True)


def test_requests_are_let_in_though_jobs_cannot_be_counted(script, new_tracker):
    """They are counted one after another, but only the first waits long for a disk that does not answer."""
    set_constants(script, PATIENCE=2, MOMENT=0.01)
    tracker, go = new_tracker(TRACKER_MAX_PENDING="100"), threading.Event()
    until(lambda: tracker.store.is_ready)
    tracker.store.stats = lambda: go.wait(60) and ({"Pending": 9}, 0)
    try:
        tracker.admit()
        for _ in range(20):
            within(1, tracker.admit)
    finally:
        go.set()


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="counts references")
def test_a_job_that_waits_does_not_hold_its_request(script, tracker):
    """Beside the host, which has it in parts."""
    body = b"x" * 1000
    count = sys.getrefcount(body)
    job = a_job(script, random.Random(), has_request=True)
    tracker.accept(job, lambda: True, body).result(20)
    until(lambda: tracker.images.read_request(job))
    until(lambda: sys.getrefcount(body) <= count, 10)
    tracker.fail(job.id, "so that it ends")


def test_a_parked_job_is_told_of_though_its_place_is_not_known(script, tmp_path):
    """It is on disk, and will be generated: 503 would have the client ask for another."""

    def fail(*_: Any) -> int:
        raise script.StoreError("the disk is gone")

    script.JobStore.queue_places = fail
    with SmallWebui(script, tmp_path) as webui:
        webui.tracker.stopping.set()  # so that it stays parked
        until(lambda: webui.tracker.store.is_ready)
        answer = asyncio.run(webui.post({"prompt": "once"}, ASYNC))
        assert (answer.status_code, answer.json()["queue_position"]) == (202, None)


@pytest.mark.parametrize("leaves", ["nothing", "an empty folder"])
def test_a_disk_that_is_away_costs_no_job(script, tracker, tmp_path, leaves):
    """images/ may be on another disk than jobs.json."""
    job = parked(script, tracker)
    (tmp_path / "images").rename(tmp_path / "away")
    if leaves == "an empty folder":
        (tmp_path / "images").mkdir()
    with pytest.raises(script.StoreError):
        tracker.next_parked()
    assert tracker.get(job.id).parked
    if leaves == "an empty folder":
        (tmp_path / "images").rmdir()
    (tmp_path / "away").rename(tmp_path / "images")
    assert tracker.next_parked() == (job, b"{}")
    (tmp_path / "images" / tracker.images.request_name(job)).unlink()
    assert tracker.next_parked() is None
    assert "no longer on disk" in tracker.get(job.id).error


@pytest.mark.every_store
@pytest.mark.parametrize("by", ["a start", "a cancel", "a purge"])
def test_a_place_in_the_queue_that_a_neighbour_took_away(script, new_tracker, by):
    """The job that asks for the lock here is generated there, or by nobody. It is no longer ahead of others."""
    tracker, neighbour = new_tracker(), new_tracker()
    job = parked(script, tracker)
    tracker.ask_for_lock(job.id)
    behind = a_job(script, random.Random())
    tracker.accept(behind, lambda: True, b"").result(20)
    assert tracker.position(behind) == 2
    if by == "a start":
        assert neighbour.start_parked(job.id, lambda: True)
    else:
        neighbour.cancel(job.id)
        if by == "a purge":
            neighbour.delete(job.id)
    until(lambda: tracker.position(behind) == 1, 10)
    for one in (tracker, neighbour):
        one.fail(behind.id, "so that it ends")
        one.fail(job.id, "so that it ends")


def test_a_reload_while_a_job_asks_for_the_lock(script, tmp_path, caplog):
    """It is left to the webui's next life, and nothing is wrong with that."""
    set_constants(script, DELAY=0.0)
    with SmallWebui(script, tmp_path) as webui, webui.queue_lock:
        answer = asyncio.run(webui.post({"prompt": "later"}, ASYNC))
        job_id = answer.json()["id"]
        until(lambda: webui.tracker.position(webui.tracker.get(job_id)) == 1)
        time.sleep(0.5)
        webui.tracker.close().result(20)
        webui.queue_lock.release()
        time.sleep(1)
        webui.queue_lock.acquire()
    assert alive(tmp_path / "jobs.json")[job_id]["parked"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_promises_of_a_disk_that_hangs(script, tracker):
    """Each holds a thread that others need to look at jobs: only the first does so for long."""
    set_constants(script, PATIENCE=2, MOMENT=0.01)
    go, jobs = threading.Event(), [a_job(script, random.Random(), has_request=True) for _ in range(10)]
    script.ImageStore.save_request = lambda *_: go.wait(60)
    try:
        for job in jobs:
            tracker.accept(job, lambda: True, b"{}").result(20)
        for number, job in enumerate(jobs):
            with pytest.raises(script.StoreError):
                within(1 if number else 10, tracker.promise, job.id)
    finally:
        go.set()
        for job in jobs:
            tracker.fail(job.id, "so that it ends")


def test_a_disk_that_is_away_at_a_start_costs_no_promised_job(script, new_tracker, tmp_path):
    tracker = new_tracker()
    job = a_job(script, random.Random(), has_request=True, promised=True, owner="00000000")
    tracker.images.save_request(job, b"{}")
    (tmp_path / "images").rename(tmp_path / "away")
    tracker.store.put(job, new=True).result(20)
    tracker.recover().result(20)
    assert tracker.get(job.id).status == "Pending"
    (tmp_path / "away").rename(tmp_path / "images")
    tracker.recover().result(20)
    assert tracker.get(job.id).parked


def test_progress_of_one_that_is_about_to_begin(script, tracker, monkeypatch):
    """On disk it is Processing already, and it is not taken for one that has been generated."""
    job, seen = parked(script, tracker), []
    monkeypatch.setattr(tracker.host, "begun", lambda: seen.append(tracker.progress_of(tracker.get(job.id))))
    assert tracker.start_parked(job.id, lambda: True)
    assert seen == [(0.0, None)]
    tracker.generated()
    assert tracker.progress_of(tracker.get(job.id)) == (1.0, 0.0)
    tracker.fail(job.id, "")


def ended(webui: SmallWebui, job_id: str) -> Any:
    return until(lambda: (lambda job: job if job.ended else None)(webui.tracker.get(job_id)))


def test_a_webui_that_has_no_model_yet(script, tmp_path, monkeypatch):
    """SD.Next serves before it has loaded one, and answers without an image until then: a promised job waits."""
    set_constants(script, LOADING=0.05)
    loading = threading.Lock()
    data = SimpleNamespace(locked=True, lock=loading)
    monkeypatch.setitem(sys.modules, "modules.modeldata", SimpleNamespace(model_data=data))
    with SmallWebui(script, tmp_path) as webui:
        webui.generate = lambda _: {"images": [] if data.locked or loading.locked() else ["aW1hZ2U="], "info": "{}"}
        answer = asyncio.run(webui.post({"prompt": "a cat"}, ASYNC))
        assert answer.status_code == 202
        job_id = answer.json()["id"]
        time.sleep(1)
        assert webui.tracker.get(job_id).parked
        with loading:
            data.locked = False
            time.sleep(0.3)
            assert webui.tracker.get(job_id).parked
        job = ended(webui, job_id)
        assert (job.status, len(job.images)) == ("Completed", 1)


def test_a_webui_that_answers_a_failure_as_a_success(script, tmp_path):
    """As SD.Next does, without an image."""
    with SmallWebui(script, tmp_path) as webui:
        sys.modules["modules.shared"].state.disable_preview = False
        webui.generate = lambda _: {"images": [], "info": ""}
        answer = asyncio.run(webui.post({"prompt": "a cat"}))
        assert (answer.status_code, answer.json()) == (200, {"images": [], "info": ""})
        job = ended(webui, answer.headers["x-job-id"])
        assert (job.status, job.error) == ("Failed", "The webui answered without an image")
        webui.generate = lambda _: {"images": ["aW1hZ2U="], "info": "{}"}
        assert len(ended(webui, webui.tracker.retry(job.id).id).images) == 1
