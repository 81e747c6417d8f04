"""The bucket and the local folder, and what their trouble costs: seen from inside, on a real S3 store."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, List

import pytest
from inside import a_job, an_answer, files_are_whole, generate, set_constants, until, when_ended

LEFT_BEHIND = "The webui ended before the generation did"
NAME = "2026-01-12/AAAAAAAA_0.png"
SECRETS = ("xyzzy-key", "xyzzy-secret")


@pytest.fixture(autouse=True)
def environ(bucket, monkeypatch):
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def images(script, tmp_path, bucket):
    return script.ObjectImageStore(str(tmp_path / "images"), bucket.url)


@pytest.fixture
def today(script, dice):
    return a_job(script, dice, timestamp=int(time.time()))


@pytest.fixture
def new_shared(script, new_tracker, bucket):
    """`new_shared()` is a tracker whose images are in the bucket."""
    set_constants(script, RETRY=0.2, ASK_AGAIN=0.1, LOOK_EVERY=0.2, LOOK_COST=0.0)
    return lambda: new_tracker(TRACKER_IMAGES=bucket.url, TRACKER_RETENTION="off")


def failure_of(script: Any, work: Any) -> Any:
    with pytest.raises(script.StoreError) as raised:
        work()
    failure = raised.value
    assert failure.temporary
    for secret in SECRETS:
        assert secret not in str(failure) + failure.details + repr(failure.__cause__)
    return failure


def local_files(tmp_path: Path) -> List[str]:
    return sorted(path.name for path in tmp_path.glob("images/*/*"))


def make_old(tmp_path: Path, days: float) -> None:
    for path in tmp_path.glob("images/*/*"):
        os.utime(str(path), (time.time() - days * 86400,) * 2)


def test_a_bucket_that_is_away(script, images, bucket, today, tmp_path):
    saved = images.save(today, an_answer(script, today.id, 1))
    bucket.kill()
    for work in (
        images.is_empty,
        lambda: images.size(NAME),
        lambda: list(images.read(NAME)),
        lambda: images.find(today),
    ):
        assert str(failure_of(script, work)) == "the bucket cannot be reached"
    failure_of(script, lambda: images.publish(saved))
    failure_of(script, lambda: images.save_request(today._replace(parked=True), b"{}"))
    assert images.remove([NAME]) == 0, "it is no trouble for who removes"
    assert b"".join(images.read(saved.images[0].name)), "what is here is read here"
    bucket.start()
    until(lambda: is_there(script, images), what="nothing needs a restart")
    images.publish(saved)
    assert images.find(today) == saved


def is_there(script: Any, images: Any) -> bool:
    try:
        return images.is_empty()
    except script.StoreError:
        return False


def test_a_bucket_that_does_not_answer(script, images, bucket, today):
    """A call takes 2 s, and others do not wait for the same: they fail at once."""
    set_constants(script, ASK_AGAIN=60.0)
    saved = images.save(today, an_answer(script, today.id, 1))
    bucket.server.suspend()
    began = time.monotonic()
    assert "does not answer" in str(failure_of(script, lambda: images.save_request(today._replace(parked=True), b"{}")))
    assert time.monotonic() - began < 2 + 3
    began = time.monotonic()
    for _ in range(100):
        failure_of(script, lambda: images.publish(saved))
        failure_of(script, lambda: images.size(NAME))
    assert time.monotonic() - began < 2


def test_a_bucket_that_is_not_there(script, tmp_path, today):
    """An image in it is not lost: somebody has yet to name the right one."""
    images = script.ObjectImageStore(str(tmp_path / "images"), "s3://none-such/prefix")
    assert "NoSuchBucket" in str(failure_of(script, lambda: images.read_request(today)))
    failure_of(script, lambda: images.find(today))
    failure_of(script, images.is_empty)
    failure_of(script, lambda: images.publish(images.save(today, an_answer(script, today.id, 1))))


def test_the_driver_is_missing(script, images, monkeypatch):
    """The log and the job say what to do. Nothing needs a restart then."""
    set_constants(script, ASK_AGAIN=0.0)
    monkeypatch.setitem(sys.modules, "obstore", None)
    failure = failure_of(script, images.is_empty)
    assert str(failure).endswith('python -m pip install "obstore"')
    assert images.url(NAME) is None
    monkeypatch.delitem(sys.modules, "obstore")
    assert images.is_empty() and images.url(NAME)


def test_signed_urls(script, images, today):
    """They are for what is in the bucket, and need nobody."""
    saved = images.save(today, an_answer(script, today.id, 1))
    assert images.url(saved.images[0].name) is None
    images.publish(saved)
    images.remove_local(images.counted_files_of(saved))
    url = images.url(saved.images[0].name)
    assert "X-Amz-Expires=3600" in url and SECRETS[1] not in url
    began = time.monotonic()
    for _ in range(1000):
        images.url(saved.images[0].name)
    assert time.monotonic() - began < 2


def test_what_is_in_neither_place(script, images, today):
    saved = images.save(today, an_answer(script, today.id, 2))
    images.remove_local([saved.images[1].name])
    with pytest.raises(script.StoreError) as raised:
        images.publish(saved)
    assert not raised.value.temporary
    assert images.find(today) is None, "the answer comes last"


def test_what_was_left_in_the_folder(script, new_shared, bucket, tmp_path, dice):
    """By crashes between any two steps, and by those who took this webui for dead."""
    names = ("done", "copied", "given up", "cancelled", "cut", "gone", "its key is taken")
    jobs = {name: a_job(script, dice, timestamp=int(time.time())) for name in names}
    local = script.ObjectImageStore(str(tmp_path / "images"), bucket.url)
    saved = {name: local.save(job, an_answer(script, job.id, 2)) for name, job in jobs.items()}
    local.publish(saved["copied"])
    local.remove_local([local.answer_name(saved["cut"])])
    make_old(tmp_path, 0.5)
    failed = {"status": "Failed", "error": LEFT_BEHIND, "images": (), "bytes": 0}
    records = {
        "done": saved["done"]._replace(status="Completed"),  # before there was a bucket
        "copied": saved["copied"]._replace(status="Completed"),
        "given up": jobs["given up"]._replace(**failed),
        "cancelled": jobs["cancelled"]._replace(**{**failed, "error": "Cancelled"}),
        "cut": jobs["cut"]._replace(**failed),
        "its key is taken": jobs["its key is taken"]._replace(**failed, key="k" * 32, digest="d"),
    }
    tracker = new_shared()
    for job in records.values():
        tracker.store.put(job, new=True).result(20)
    newer = a_job(script, dice, timestamp=int(time.time()), status="Completed", key="k" * 32, digest="d")
    tracker.store.put(newer, new=True).result(20)
    job = when_completed(tracker, jobs["given up"].id)
    assert files_are_whole(tracker, job) and job.error is None
    kept = {jobs[name].id for name in ("done", "gone", "its key is taken")}
    until(lambda: {name[:8] for name in local_files(tmp_path)} <= kept, what="what nobody needs is removed")
    assert files_are_whole(tracker, tracker.get(jobs["done"].id)), "it has no other place"
    assert tracker.get(jobs["cancelled"].id).status == tracker.get(jobs["cut"].id).status == "Failed"
    assert tracker.get(jobs["its key is taken"].id).status == "Failed"
    assert {name for name in local_files(tmp_path) if name.startswith(jobs["gone"].id)}, "not in a week"
    make_old(tmp_path, 8)
    until(lambda: not [name for name in local_files(tmp_path) if name.startswith(jobs["gone"].id)])
    assert files_are_whole(tracker, tracker.get(jobs["done"].id))


def when_completed(tracker: Any, job_id: str) -> Any:
    return until(lambda: (job := tracker.get(job_id)).status == "Completed" and job)


def test_files_that_nobody_names(script, new_shared, bucket, dice, monkeypatch):
    tracker = new_shared()
    job = a_job(script, dice, timestamp=int(time.time()))
    assert generate(script, tracker, job) in ("Completed", "Processing")
    when_ended(tracker, job.id)
    orphan = a_job(script, dice, timestamp=int(time.time()))
    saved = tracker.images.save(orphan, an_answer(script, orphan.id, 2))
    tracker.images.publish(saved)
    tracker.images.remove_local(tracker.images.counted_files_of(saved))
    assert tuple(tracker.housekeeper.purge()) == (0, 0, 0), "a webui that was cut off may still need them"
    monkeypatch.setattr(script.ObjectImageStore, "ORPHAN_AGE", -60.0)
    assert tuple(tracker.housekeeper.purge()) == (0, 2, saved.bytes)
    assert files_are_whole(tracker, tracker.get(job.id))
    until(lambda: len(bucket.names()) == 2, what="an image and an answer are left")
    assert tracker.delete(job.id) and not bucket.names()


def test_files_of_jobs_that_are_to_be_copied_to_a_database(script, new_tracker, bucket, tmp_path, dice):
    """TRACKER_STORE was set, and nobody has copied the jobs yet: no purge takes their images for orphans."""
    old = new_tracker(TRACKER_RETENTION="off")
    jobs = [a_job(script, dice, timestamp=int(time.time())) for _ in range(2)]
    for job in jobs:
        assert generate(script, old, job) == "Completed"
    old.close().result(20)
    stray = a_job(script, dice, timestamp=int(time.time()))
    script.ImageStore(str(tmp_path / "images")).save(stray, an_answer(script, stray.id, 1))
    make_old(tmp_path, 30)
    tracker = new_tracker(TRACKER_RETENTION="off")
    tracker.settings.store_url = "postgresql://elsewhere"
    tracker.store = tracker.housekeeper.store = script.JobStore(str(tmp_path / "elsewhere"))
    tracker.housekeeper.purge()
    assert {name[:8] for name in local_files(tmp_path)} == {job.id for job in jobs}
    tracker.store.close()


def test_a_file_with_keys_that_is_not_there(script, tmp_path, monkeypatch):
    """Its path is for the log only."""
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "xyzzy.json"))
    failure = failure_of(script, script.ObjectImageStore(str(tmp_path / "images"), "gs://bucket/prefix").is_empty)
    assert "xyzzy.json" in failure.details and "xyzzy" not in str(failure)
