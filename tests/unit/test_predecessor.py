"""Who comes from API-Job-Tracker-SD-WebUI keeps everything."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, List, Union

import pytest
from inside import WrappedOs, a_job, alive, completed, load_script, pixels
from predecessor import INFOTEXT, NOW, entry, png, write_array, write_images

from harness import until

# In the test's own process


@pytest.fixture
def script() -> Any:
    script = load_script()
    script.Predecessor.RETRY = script.Predecessor.LOOK_EVERY = 0.05
    return script


@pytest.fixture
def tracker(new_tracker) -> Callable[..., Any]:
    """`tracker()` is one without a webui, on the test's folder."""
    return partial(new_tracker, TRACKER_RETENTION="off")


def names(folder: Path) -> List[str]:
    """Of what there is of jobs.json, without a webui's own lock and the index."""
    names = (path.name for path in folder.glob("jobs.json*"))
    return sorted(name for name in names if not name.startswith(("jobs.json.owner-", "jobs.json.index")))


DONE = ["jobs.json", "jobs.json.lock", "jobs.json.predecessor-done"]


def test_before_jobs_of_our_own(script, tracker, tmp_path):
    """Who used Job Tracker with a folder for its data, and then brings the predecessor's file."""
    (image,) = write_images(tmp_path / "outputs", 1)
    data = tmp_path / "data"
    store = script.JobStore(str(data))
    dice = random.Random(7)
    ours = [completed(a_job(script, dice, id=f"OURS{n:04}")) for n in range(3)]
    for job in [*ours, a_job(script, dice, id="TWINtwin", status="Failed")]:
        store.put(job, new=True).result()
    store.remove(["OURS0002"]).result()
    store.close()
    write_array(tmp_path, [entry("THEIRS01", output_paths=[str(image)]), entry("TWINTWIN", output_path=str(image))])
    one = tracker(TRACKER_DATA_DIR=str(data))
    ids = [job.id for job in one.store.query(script.Filter(), 100).jobs]
    assert [ids[0], ids[1], ids[2], ids[4]] == ["TWINtwin", "OURS0001", "OURS0000", "THEIRS01"] and len(ids) == 5
    until(lambda: (tmp_path / "jobs.json.predecessor-done").exists())
    assert len(one.store.get("THEIRS01").images) == len(one.store.get(ids[3]).images) == 1
    assert one.store.get(ids[3]).error == "Its ID was TWINTWIN"
    assert len(alive(data / "jobs.json")) == 5


@pytest.mark.parametrize("content", [b'[1, "two"]', b'[{"name": "x"}]', b"[", b'"text"', b"[[[", b'[{"id": ""}]'])
def test_another_array_is_left_to_the_store(script, tracker, tmp_path, content):
    (tmp_path / "jobs.json").write_bytes(content)
    one = tracker()
    assert one.store.query(script.Filter(), 10).jobs == []
    (aside,) = until(lambda: list(tmp_path.glob("jobs.json.damaged-*")))
    until(lambda: aside.read_bytes().strip() == content)
    assert not list(tmp_path.glob("*predecessor*"))


def test_a_torn_array(script, tracker, tmp_path):
    """What can be read of it is taken over, and the rest stays in the file."""
    data = write_array(
        tmp_path, [entry(f"JOB{n:05}", 100 - n, prompt='"[{"id": 5}', output_path=None) for n in range(9)]
    )
    spoilt = data.replace(b'"JOB00003"', b'"JOB\x0000003"')[:-30]
    (tmp_path / "jobs.json").write_bytes(spoilt)
    one = tracker()
    ids = [job.id for job in one.store.query(script.Filter(), 100).jobs]
    assert ids == [f"JOB{n:05}" for n in (7, 6, 5, 4, 2, 1, 0)]
    until(lambda: names(tmp_path) == DONE)
    assert (tmp_path / "jobs.json.predecessor-done").read_bytes() == spoilt


@pytest.mark.parametrize("lost", [None, b"", b"\0" * 500])
def test_the_copy_where_the_file_is_lost(script, tracker, tmp_path, lost):
    """Where a power cut cost the predecessor its jobs.json, it would read the copy beside it."""
    write_array(tmp_path, [entry("COPY0001", output_path=None)])
    (tmp_path / "jobs.json").rename(tmp_path / "jobs.json.bak")
    if lost is not None:
        (tmp_path / "jobs.json").write_bytes(lost)
    one = tracker()
    until(lambda: (tmp_path / "jobs.json.predecessor-done").exists())
    assert [job.id for job in one.store.query(script.Filter(), 10).jobs] == ["COPY0001"]


def test_a_copy_that_is_older_than_ours_is_not_read(script, tracker, tmp_path):
    write_array(tmp_path, [entry("OLDER001", output_path=None)])
    (tmp_path / "jobs.json").rename(tmp_path / "jobs.json.bak")
    (tmp_path / "jobs.json").write_bytes(b"{\n}\n")
    assert tracker().store.query(script.Filter(), 10).jobs == []


def test_a_copy_that_was_taken_over_already_is_not_read(script, tracker, tmp_path):
    """Who removes jobs.json to begin anew does not get back what the predecessor left beside it."""
    write_array(tmp_path, [entry("OLDER001", output_path=None)])
    shutil.copy(str(tmp_path / "jobs.json"), str(tmp_path / "jobs.json.bak"))
    one = tracker()
    until(lambda: (tmp_path / "jobs.json.predecessor-done").exists())
    one.close().result(60)
    (tmp_path / "jobs.json").unlink()
    assert tracker().store.query(script.Filter(), 10).jobs == []


def test_it_stays_private(script, tracker, tmp_path):
    write_array(tmp_path, [entry("SECRET01", output_path=None)])
    (tmp_path / "jobs.json").chmod(0o600)
    tracker()
    until(lambda: names(tmp_path) == DONE)
    for name in ("jobs.json", "jobs.json.predecessor-done"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name


class Dead(BaseException):
    """The process has ended."""


def dying(after: int) -> WrappedOs:
    """The module `os` of a process that dies before its n-th change to a file."""
    left = [after]

    def mortal(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                left[0] -= 1
                if left[0] < 0:
                    raise Dead
            return getattr(os, name)(*arguments, **named)

        return call

    return WrappedOs(**{name: mortal(name) for name in ("open", "rename", "replace", "unlink", "pwrite", "truncate")})


@pytest.mark.parametrize("ours", [None, b'{\n"OURS0001": null\n}\n'])
def test_a_crash_at_any_moment(script, tmp_path, monkeypatch, ours):
    deaths = 0
    while True:
        folder, data = tmp_path / str(deaths), tmp_path / str(deaths) / "data"
        entries = [entry(job_id, output_path=None) for job_id in ("FIRST001", "LONGERID12", "first001", "LAST0001")]
        array = write_array(folder if ours else data, entries)
        if ours:
            data.mkdir()
            (data / "jobs.json").write_bytes(ours)
        with monkeypatch.context() as patch:
            patch.setattr(script, "os", dying(deaths))
            try:
                script.Predecessor(str(folder), str(data)).merge_jobs()
            except Dead:
                deaths += 1
            else:
                break
        again = script.Predecessor(str(folder), str(data))
        again.merge_jobs()
        jobs = list(alive(data / "jobs.json").values())
        assert [job["id"] for job in (jobs[0], jobs[3])] == ["FIRST001", "LAST0001"] and len(jobs) == 4
        assert ["Its ID was" in job["error"] for job in jobs] == [False, True, True, False]
        (kept,) = [*folder.glob("jobs.json.predecessor-listed"), *data.glob("jobs.json.predecessor-listed")]
        assert kept.read_bytes() == array
    assert deaths >= 4


def test_a_full_disk_at_first(script, tracker, tmp_path):
    """The predecessor's file is not taken for damage of ours, and taken over as soon as there is room."""
    (image,) = write_images(tmp_path / "outputs", 1)
    array = write_array(tmp_path, [entry("WAITS001", output_paths=[str(image)])])
    full = [True]

    def replace(source: str, target: str) -> None:
        if full and target.endswith("jobs.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.replace(source, target)

    script.os = WrappedOs(replace=replace)
    one = tracker()
    assert one.store.query(script.Filter(), 10).jobs == []
    assert (tmp_path / "jobs.json.predecessor").read_bytes() == array and not list(tmp_path.glob("*.damaged-*"))
    full.clear()
    until(lambda: names(tmp_path) == DONE)
    assert len(one.store.get("WAITS001").images) == 1


@pytest.mark.parametrize("times", [1, 3])
def test_a_file_that_cannot_be_renamed_for_a_while(script, tracker, tmp_path, monkeypatch, times):
    """A virus scanner has it open, on Windows. Until it can be, nobody takes it for damage, and no job is accepted."""
    monkeypatch.setattr(script.Predecessor, "LOOK_EVERY", 0.1)
    (image,) = write_images(tmp_path / "outputs", 1)
    write_array(tmp_path, [entry("WAITS001", output_paths=[str(image)])])
    failures = [PermissionError(errno.EACCES, "Permission denied")] * times

    def rename(source: str, target: str) -> None:
        if str(source).endswith("jobs.json") and failures:
            raise failures.pop()
        os.rename(source, target)

    script.os = WrappedOs(rename=rename)
    one = tracker()
    until(lambda: names(tmp_path) == DONE, what="it is taken over")
    assert not list(tmp_path.glob("*.damaged-*"))
    assert len(one.store.get("WAITS001").images) == 1


def test_a_disk_without_room_for_images(script, tracker, tmp_path, monkeypatch, caplog):
    paths = write_images(tmp_path / "outputs", 3)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    room = [0]
    usage = shutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: usage._replace(total=1 << 40, free=room[0]))
    one = tracker()
    until(lambda: "cannot be copied yet" in caplog.text)
    time.sleep(0.3)
    assert caplog.text.count("cannot be copied yet") == 1, "it is said once"
    assert one.get("JOB00000").error == "Its images are still to be copied" and not list(tmp_path.glob("images/*/*"))
    description = one.describe(one.get("JOB00000"))
    assert (description["status"], description["error"]) == ("Completed", "Its images are still to be copied")
    room[0] = 1 << 31
    until(lambda: names(tmp_path) == DONE)
    assert [len(one.get(f"JOB{n:05}").images) for n in range(3)] == [1, 1, 1]


def test_an_image_that_cannot_be_read_now(script, tracker, tmp_path, monkeypatch):
    """The job keeps nothing until it can have all, and the others do not wait."""
    paths = write_images(tmp_path / "outputs", 3)
    write_array(
        tmp_path,
        [
            entry("BOTH0001", output_paths=[str(paths[0]), str(paths[1])]),
            entry("OTHER001", output_paths=[str(paths[2])]),
        ],
    )
    hindered = [True]

    def open_file(path: str, *rest: Any) -> int:
        if hindered[0] and path == str(paths[1]):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return os.open(path, *rest)

    monkeypatch.setattr(script, "os", WrappedOs(open=open_file))
    one = tracker()
    until(lambda: one.get("BOTH0001").error == f"Its images cannot be copied yet: {os.strerror(errno.EIO)}")
    until(lambda: len(one.get("OTHER001").images) == 1)
    assert one.get("BOTH0001").images == () and (tmp_path / "jobs.json.predecessor-listed").exists()
    hindered[0] = False
    until(lambda: names(tmp_path) == DONE)
    job = one.get("BOTH0001")
    assert (len(job.images), job.error) == (2, None)


@pytest.mark.parametrize("removal", ["meets the copying", "saw the job before it"])
def test_deleted_while_it_is_copied(script, tracker, tmp_path, monkeypatch, removal):
    """Neither does the job come back, nor do its files stay."""
    paths = write_images(tmp_path / "outputs", 2)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    made, seen = threading.Event(), threading.Event()
    save, get = script.ImageStore.save, script.Tracker.get

    def save_and_meet(images: Any, job: Any, answer: Any) -> Any:
        assert made.wait(60)
        if removal == "saw the job before it":
            assert seen.wait(60)
            return save(images, job, answer)
        kept = save(images, job, answer)
        assert job.id != "JOB00000" or one.delete(job.id)
        return kept

    def get_and_wait(self: Any, job_id: str) -> Any:
        job = get(self, job_id)
        seen.set()
        until(lambda: names(tmp_path) == DONE)
        return job

    monkeypatch.setattr(script.ImageStore, "save", save_and_meet)
    one = tracker()
    made.set()
    if removal == "saw the job before it":
        monkeypatch.setattr(script.Tracker, "get", get_and_wait)
        assert one.delete("JOB00000")
    until(lambda: names(tmp_path) == DONE)
    assert one.store.get("JOB00000") is None and len(one.store.get("JOB00001").images) == 1
    assert sorted(path.name for path in tmp_path.glob("images/*/*")) == ["JOB00001.json", "JOB00001_0.png"]


def test_two_webuis_share_the_work(script, tracker, tmp_path, monkeypatch):
    """Nothing is merged or copied twice, however slow the first is."""
    paths = write_images(tmp_path / "outputs", 3)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    merged: List[str] = []
    saved: List[str] = []
    save = script.ImageStore.save

    def replace_slowly(source: str, target: str) -> None:
        if target.endswith("jobs.json"):
            merged.append(target)
            time.sleep(0.3)
        os.replace(source, target)

    def save_slowly(images: Any, job: Any, answer: Any) -> Any:
        saved.append(job.id)
        time.sleep(0.3)
        return save(images, job, answer)

    script.os = WrappedOs(replace=replace_slowly)
    monkeypatch.setattr(script.ImageStore, "save", save_slowly)
    with ThreadPoolExecutor(2) as pool:
        both = [made.result() for made in [pool.submit(tracker), pool.submit(tracker)]]
    until(lambda: names(tmp_path) == DONE)
    assert len(merged) == 1 and sorted(saved) == ["JOB00000", "JOB00001", "JOB00002"]
    for one in both:
        assert all(len(one.store.get(job_id).images) == 1 for job_id in saved)


def test_copying_stops_when_it_is_told_to(script, tmp_path, monkeypatch):
    paths = write_images(tmp_path / "outputs", 3)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    predecessor = script.Predecessor(str(tmp_path), str(tmp_path))
    predecessor.merge_jobs()
    stop, save = threading.Event(), script.ImageStore.save

    def save_and_stop(*arguments: Any) -> Any:
        stop.set()
        return save(*arguments)

    monkeypatch.setattr(script.ImageStore, "save", save_and_stop)
    store, images = script.JobStore(str(tmp_path)), script.ImageStore(str(tmp_path / "images"))
    try:
        predecessor.copy_images(store, images, stop)
        assert [len(store.get(f"JOB{n:05}").images) for n in range(3)] == [0, 0, 1], "the newest comes first"
        stop.clear()
        monkeypatch.setattr(script.ImageStore, "save", save)
        predecessor.copy_images(store, images, stop)
        assert [len(store.get(f"JOB{n:05}").images) for n in range(3)] == [1, 1, 1]
    finally:
        store.close()


def test_purged_while_it_is_copied(script, tracker, tmp_path, monkeypatch):
    paths = write_images(tmp_path / "outputs", 2)
    young, old = (entry(f"JOB{n:05}", n * 9 * 86400, output_paths=[str(path)]) for n, path in enumerate(paths))
    write_array(tmp_path, [old, young])
    save = script.ImageStore.save
    purged: List[Any] = []

    def save_and_purge(images: Any, job: Any, answer: Any) -> Any:
        kept = save(images, job, answer)
        until(lambda: trackers)
        trackers[0].settings.retention_days = 5.0
        purged.append(trackers[0].housekeeper.purge())
        return kept

    trackers: List[Any] = []
    monkeypatch.setattr(script.ImageStore, "save", save_and_purge)
    trackers.append(tracker())
    until(lambda: names(tmp_path) == DONE)
    assert purged == [script.Purged(1, 0, 0)]
    assert len(trackers[0].store.get("JOB00000").images) == 1 and trackers[0].store.get("JOB00001") is None
    assert paths[1].exists(), "what the user has in the webui's output folder stays"


def test_the_end_of_the_webui_while_images_are_copied(script, tracker, tmp_path, caplog):
    paths = write_images(tmp_path / "outputs", 100, 20_000)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    one = tracker()
    until(lambda: one.store.get("JOB00095").images)
    one.close().result(60)
    assert (tmp_path / "jobs.json.predecessor-listed").exists()
    another = tracker()
    until(lambda: names(tmp_path) == DONE)
    assert all(len(another.store.get(f"JOB{n:05}").images) == 1 for n in range(100))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_second_file_of_the_predecessor(script, tracker, tmp_path):
    """Who goes back and comes again loses nothing, and has nothing twice."""
    (image,) = write_images(tmp_path / "outputs", 1)
    first = entry("FIRST001", output_paths=[str(image)])
    write_array(tmp_path, [first])
    one = tracker()
    until(lambda: names(tmp_path) == DONE)
    one.close().result(60)
    (tmp_path / "jobs.json").unlink()
    write_array(tmp_path, [first, entry("SECOND01", output_paths=[str(image)])])
    another = tracker()
    until(lambda: names(tmp_path) == [*DONE, "jobs.json.predecessor-done-2"])
    assert [job.id for job in another.store.query(script.Filter(), 10).jobs] == ["SECOND01", "FIRST001"]
    assert all(len(another.store.get(job_id).images) == 1 for job_id in ("FIRST001", "SECOND01"))


def test_infotext_of_anything(script):
    for text, kind in ((INFOTEXT, b"tEXt"), ("猫", b"iTXt"), ("", b"tEXt")):
        assert script.infotext_of(png(text, kind)) == (text or None)
    whole = png(INFOTEXT)
    for data in (b"", b"\xff\xd8\xff", pixels("A", 0), *(whole[:end] for end in range(len(whole)))):
        script.infotext_of(data)


def test_times_of_any_kind(script):
    known: List[Union[Any, int]] = [NOW, NOW + 0.5, str(NOW), f" {NOW}.25 "]
    assert [script.legacy_time(value) for value in known] == [NOW] * 4
    assert script.legacy_time("2025-01-12T20:00:00Z") == 1736712000
    strange = [None, "", "yesterday", -1, 0, 1 << 34, 1e300, float("nan"), float("inf"), [], {}, "9999-99-99", 10**400]
    assert [script.legacy_time(value) for value in strange] == [None] * len(strange)


def test_a_seed_that_is_no_seed(script, tracker, tmp_path):
    """A prompt can say anything, and stands in the image before the seed."""
    (tmp_path / "x.png").write_bytes(png(f"a lighthouse, Seed: {'1' * 9999}"))
    write_array(tmp_path, [entry("AAAAAAAA", output_paths=[str(tmp_path / "x.png")])])
    one = tracker()
    until(lambda: names(tmp_path) == DONE)
    assert len(one.get("AAAAAAAA").images) == 1
