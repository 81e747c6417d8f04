"""What a crash left is read as it is safe on disk, and every end is told once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, List

import pytest
from inside import WrappedOs, a_job, alive, an_answer, files_are_whole, make_tracker, pixels, set_constants, within

from harness import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which file a descriptor is of")


# Adds a job to the folder, and dies where it is to sync that. It is no fork of the tests' process, which has threads: a
# lock that one of them holds just then would be held in the fork for ever.
DYING_NEIGHBOUR = """
import os, sys, time
from inside import WrappedOs, load_script

def die(file):
    if os.readlink(f"/proc/self/fd/{file}").endswith("jobs.json"):
        os._exit(9)

script = load_script()
store = script.JobStore(sys.argv[1])
store.query(script.Filter(), 1)
script.os = WrappedOs(fsync=die)
store.put(script.Job("NEWJOB00", "txt2img", script.PENDING, int(time.time()), None, ""), new=True).result()
"""


def test_a_line_of_a_neighbour_is_synced_before_it_is_shown(script, tmp_path):
    """It may have been killed before it did that itself."""
    calls: List[str] = []

    def note(file: int) -> None:
        os.fsync(file)
        calls.append(os.readlink(f"/proc/self/fd/{file}"))

    tracker = make_tracker(script, tmp_path)
    until(lambda: tracker.housekeeper.next_purge, what="it has looked for jobs left behind")
    script.os = WrappedOs(fsync=note)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    neighbour = subprocess.run([sys.executable, "-c", DYING_NEIGHBOUR, str(tmp_path)], env=environ, timeout=60)
    assert neighbour.returncode == 9, "it died where it was to sync"
    assert tracker.get("NEWJOB00").status == "Pending"
    assert str(tmp_path / "jobs.json") in calls
    tracker.close()


def test_such_a_line_is_also_synced_before_a_compaction_shows_it(script, opened, path, dice, monkeypatch):
    script.JobStore.MIN_DEAD_ENTRIES = 10
    copy_rest, add, calls, left = script.JobStore._copy_rest, script.Index.add, [], a_job(script, dice)

    def after_a_death(store: Any, *args: Any) -> None:
        with open(str(path), "r+b") as file:
            end = path.stat().st_size - len(script.TAIL)
            script.append_records(file.fileno(), end, {left.id: script.record_of(left)})
        calls.clear()
        copy_rest(store, *args)

    def note_sync(file: int) -> None:
        os.fsync(file)
        calls.append(os.readlink(f"/proc/self/fd/{file}"))

    def note_add(index: Any, inode: int, start: int, found: Any, *args: Any) -> bool:
        calls.extend(entry.id for entry in found)
        return add(index, inode, start, found, *args)

    store, job = opened(), a_job(script, dice)
    store.put(job, new=True).result()
    monkeypatch.setattr(script.JobStore, "_copy_rest", after_a_death)
    monkeypatch.setattr(script.Index, "add", note_add)
    script.os = WrappedOs(fsync=note_sync)
    for number in range(40):
        store.put(job._replace(bytes=number)).result()
    # Not by the file's inode, which a second compaction may have got back.
    assert store.idle() and path.read_bytes().count(b"\n") < 30
    assert calls.index(str(path)) < calls.index(left.id)


def save_and_die(script: Any, tracker: Any, images: int = 1, **fields: Any) -> Any:
    """The job of a process that has stored so many images of it, but not its end."""
    until(lambda: tracker.housekeeper.next_purge, what="it has looked for jobs left behind")
    job_id, now = tracker.store.reserve_id(), int(time.time())
    job = script.Job(job_id, "txt2img", script.PROCESSING, now, None, "", owner="00000000", **fields)
    tracker.store.put(job, new=True).result()
    return tracker.images.save(job, an_answer(script, job.id, images))


def left_behind(script: Any, folder: Path, images: int, lost: Callable[[Any, Any], Any]) -> Any:
    """The job, at the next start, of a process that was killed after storing so many images; some files were lost."""
    tracker = make_tracker(script, folder)
    saved = save_and_die(script, tracker, images, started=time.time())
    tracker.images.remove(lost(tracker.images, saved))
    tracker.close().result(60)
    tracker = make_tracker(script, folder)
    found = tracker.get(saved.id)
    if found.status == script.COMPLETED:
        assert files_are_whole(tracker, found)
        assert found.bytes == saved.bytes and found.images == saved.images and found.prompt == saved.id
    tracker.close()
    return found


def test_a_folder_that_is_a_link(script, tmp_path):
    """Nothing is taken from behind it, and the job does not stay without an end."""
    tracker = make_tracker(script, tmp_path)
    job = save_and_die(script, tracker)
    (tmp_path / "images" / tracker.images.day_of(job)).rename(tmp_path / "elsewhere")
    (tmp_path / "images" / tracker.images.day_of(job)).symlink_to(tmp_path / "elsewhere")
    tracker.close().result(60)
    tracker = make_tracker(script, tmp_path)
    assert tracker.get(job.id).status == "Failed"
    tracker.close()


@pytest.mark.parametrize(
    "images, lost, status",
    [
        (0, lambda images, job: [], "Completed"),
        (1, lambda images, job: [], "Completed"),
        (12, lambda images, job: [], "Completed"),
        (2, lambda images, job: [images.answer_name(job)], "Failed"),
        (2, lambda images, job: images.files_of(job), "Failed"),
        (2, lambda images, job: [image.name for image in job.images[:1]], "Failed"),
        (3, lambda images, job: [image.name for image in job.images[1:2]], "Failed"),
    ],
)
def test_what_a_crash_left(script, tmp_path, images, lost, status):
    job = left_behind(script, tmp_path, images, lost)
    assert job.status == status
    assert job.finished is None
    assert job.error == (None if status == "Completed" else "The webui ended before the generation did")


def test_images_that_cannot_be_looked_at_now(script, tmp_path):
    """A job is not failed for a disk that may be back in a moment."""
    failing = [True]

    def listdir(path: str) -> Any:
        if failing and "images" in str(path):
            raise OSError(5, "Input/output error", path)
        return os.listdir(path)

    tracker = make_tracker(script, tmp_path)
    job = save_and_die(script, tracker)
    tracker.close().result(60)
    script.os = WrappedOs(listdir=listdir)
    set_constants(script, LOOK_EVERY=0.05, RECOVER_EVERY=0.1)
    tracker = make_tracker(script, tmp_path)
    assert tracker.get(job.id).status == "Processing"
    failing.clear()
    until(lambda: tracker.get(job.id).status == "Completed", what="it is looked at again")
    assert b"".join(tracker.images.read(tracker.get(job.id).images[0].name)) == pixels(job.id, 0)
    tracker.close()


def test_the_answer_is_the_last_file(script, tmp_path):
    """So where it is, all is. Also after a power cut: what came before it was synced, names too."""
    steps: List[str] = []

    def replace(source: str, target: str) -> None:
        os.replace(source, target)
        steps.append(Path(target).name)

    def fsync(file: int) -> None:
        os.fsync(file)
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.is_dir():
            steps.append(f"sync {path.name}")

    images = script.ImageStore(str(tmp_path / "images"))
    script.os = WrappedOs(replace=replace, fsync=fsync)
    job = script.Job("AAAAAAAA", "txt2img", script.PROCESSING, 1736712000, None, "")
    rest = json.dumps({"images": [], "parameters": {"mask": "x" * 2000}, "info": "{}"}).encode()
    images.save(job, an_answer(script, job.id, 2)._replace(rest=rest))
    assert steps[-7:] == [
        "AAAAAAAA_0.png",
        "AAAAAAAA_1.png",
        "AAAAAAAA.brief.json",
        "sync 2025-01-12",
        "AAAAAAAA.json",
        "sync 2025-01-12",
        "sync images",
    ]


def test_every_end_is_told_once_and_not_before_it_is_on_disk(script, tmp_path):
    """Of jobs that were generated, failed or cancelled, and of those that a webui left behind on a full disk."""
    told: List[str] = []
    script.JobStore.RETRY = 0.05

    class Tracker(script.Tracker):
        def _ended(self, job: Any) -> None:
            assert json.loads((tmp_path / "jobs.json").read_text())[job.id]["status"] == job.status
            told.append(f"{job.prompt} {job.status}")
            super()._ended(job)

    def a_job(prompt: str, **fields: Any) -> Any:
        return script.Job(
            tracker.store.reserve_id(), "txt2img", script.PENDING, int(time.time()), None, prompt=prompt, **fields
        )

    script.Tracker = Tracker
    tracker = make_tracker(script, tmp_path)
    until(lambda: tracker.housekeeper.next_purge, what="it has looked for jobs left behind")
    jobs = {prompt: a_job(prompt) for prompt in ("done", "failed", "cancelled")}
    for job in jobs.values():
        tracker.accept(job, lambda: tracker.fail(jobs["cancelled"].id, "Cancelled") or True, b"").result()
    tracker.finish(jobs["done"].id, an_answer(script, jobs["done"].id, 1))
    tracker.fail(jobs["failed"].id, "no reason")
    tracker.fail(jobs["failed"].id, "again")
    assert tracker.cancel(jobs["cancelled"].id)
    until(lambda: len(told) >= 3)
    tracker.store.put(a_job("left", owner="00000000"), new=True).result()
    write_at = script.write_at

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    script.write_at = fail
    tracker.recover().result()
    script.write_at = write_at
    until(lambda: len(told) >= 4)
    tracker.recover().result()
    tracker.store.put(a_job("left again", owner="00000000"), new=True).result()
    tracker.recover().result()
    assert sorted(told) == ["cancelled Failed", "done Completed", "failed Failed", "left Failed", "left again Failed"]
    tracker.close()


def request_kept(script: Any, tracker: Any, **fields: Any) -> Any:
    """A job whose client waits, and whose request is on disk."""
    job = a_job(script, random.Random(), has_request=True, **fields)
    tracker.accept(job, lambda: True, b"{}").result(20)
    until(lambda: tracker.images.read_request(job) == b"{}")
    return job


@pytest.mark.parametrize("by", ["itself", "another webui"])
def test_what_was_promised_begins_only_when_that_is_on_disk(script, tracker, new_tracker, tmp_path, by):
    """Otherwise it would be generated once more after a crash."""

    def write_late(*arguments: Any) -> int:
        time.sleep(0.3)
        return os.pwrite(*arguments)

    job = request_kept(script, tracker, key="a key")
    (tracker if by == "itself" else new_tracker()).promise(job.id)
    assert alive(tmp_path / "jobs.json")[job.id]["promised"]
    script.os = WrappedOs(pwrite=write_late)
    tracker.start(job.id)
    assert alive(tmp_path / "jobs.json")[job.id]["status"] == "Processing"


def test_a_disk_that_hangs_holds_it_up_for_a_moment_only(script, tracker):
    set_constants(script, PATIENCE=0.1)
    job, go = request_kept(script, tracker), threading.Event()
    tracker.promise(job.id)
    script.os = WrappedOs(pwrite=lambda *arguments: go.wait(20) and os.pwrite(*arguments))
    try:
        within(10, tracker.start, job.id)
        assert tracker.get(job.id).status == "Processing"
    finally:
        go.set()


@pytest.mark.every_store
@pytest.mark.parametrize("status", ["Pending", "Processing"])
def test_what_was_to_be_cancelled_does_not_go_on(script, new_tracker, status):
    """Its webui ended before it noticed that another one was asked to."""
    tracker = new_tracker()
    tracker.recover().result(20)  # otherwise its first look might find the job before it is cancelled
    job = a_job(script, random.Random(), status=status, has_request=True, promised=True, owner="00000000")
    tracker.images.save_request(job, b"{}")
    tracker.store.put(job, new=True).result(20)
    assert tracker.cancel(job.id)
    tracker.close().result(20)
    tracker = new_tracker()
    found = until(lambda: next((job for job in [tracker.get(job.id)] if job.ended), None), 20, "it has ended")
    assert (found.status, found.error, found.finished) == ("Failed", "Cancelled", None)
