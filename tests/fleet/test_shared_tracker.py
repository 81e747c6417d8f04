"""Two trackers on one database: what they leave to each other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import Any, Callable, Dict, Iterator, Tuple
from unittest import mock

import pytest
from inside import a_job, an_answer, load_script, make_tracker, set_constants, until, when_ended

Track = Callable[..., Any]


@pytest.fixture
def track(tmp_path, database) -> Iterator[Track]:
    """`track(name, **environ)` is a tracker on the database, with a folder of its own for images."""
    made = []

    def make(name: str, constants: Dict[str, float], **environ: str) -> Any:
        (tmp_path / name).mkdir()
        script = load_script()
        set_constants(script, **constants)
        made.append(make_tracker(script, tmp_path / name, TRACKER_STORE=database.url, **environ))
        made[-1].script = script
        return made[-1]

    yield make
    for tracker in made:
        tracker.close()
        tracker.store.close()  # whatever is left in it: its database goes now


@pytest.fixture
def two(track) -> Tuple[Any, Any]:
    return tuple(track(name, {"TURN_EVERY": 0.05}, TRACKER_RETENTION="1") for name in ("one", "two"))


@pytest.fixture
def bucket_url(bucket, monkeypatch) -> str:
    """Of a bucket to which this process has the keys."""
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    return bucket.url


def parked(tracker: Any, dice: Any, timestamp: int) -> Any:
    job = a_job(tracker.script, dice, parked=True, promised=True, has_request=True, timestamp=timestamp)
    tracker.park(job, b'{"prompt": "a cat"}').result(20)
    return tracker.get(job.id)


def test_a_job_whose_request_is_elsewhere_is_passed_over(two, dice, caplog):
    keeps, looks = two
    kept = [parked(keeps, dice, 1_700_000_000 + number) for number in range(3)]
    assert looks.next_parked() is None and looks.next_parked() is None
    own = parked(looks, dice, 1_700_000_003)
    assert looks.next_parked()[0].id == own.id
    assert keeps.next_parked()[0].id == kept[0].id
    assert all(keeps.get(job.id).parked for job in kept)
    assert caplog.text.count("are left to the webuis that have their requests") == 1


def test_a_webui_with_another_bucket_fails_nobody_s_jobs(bucket_url, track, dice):
    """A slip in one webui's TRACKER_IMAGES, say."""
    right = track("right", {}, TRACKER_IMAGES=bucket_url)
    wrong = track("wrong", {}, TRACKER_IMAGES=f"{bucket_url}-wrong")
    right.announce("right")
    wrong.announce("wrong")
    job = parked(right, dice, 1_700_000_000)
    wrong.images.save_request(a_job(wrong.script, dice, parked=True), b"{}")  # so that there is something
    until(wrong.store.has_other_images, what="the wrong one knows that the other keeps its images elsewhere")
    assert wrong.next_parked() is None and right.get(job.id).parked
    found, _ = until(right.next_parked, what="the wrong one holds it for a moment")
    assert found.id == job.id


def test_images_that_are_elsewhere(two, dice):
    keeps, looks = two
    keeps.announce("gpu-1")
    job = a_job(keeps.script, dice)
    keeps.accept(job, lambda is_taken=False: True, b"{}").result(20)
    keeps.start(job.id)
    keeps.finish(job.id, an_answer(keeps.script, job.id, 1))
    job = when_ended(keeps, job.id)
    assert json.loads(b"".join(keeps.as_json(job)))["error"] is None
    shown = json.loads(b"".join(looks.as_json(looks.get(job.id))))
    assert shown["images"] == [None] and shown["error"] == "1 of 1 images are where gpu-1 keeps its own"


def test_retry_says_that_a_request_is_kept_elsewhere(two, dice):
    keeps, looks = two
    job = parked(keeps, dice, 1_700_000_000)
    keeps.fail_parked([job.id], "no").result(20)
    with pytest.raises(looks.script.Gone, match="not kept by this webui"):
        looks.retry(job.id)


def test_retry_of_a_job_whose_request_is_not_published_yet(bucket_url, track, dice):
    """The webui that has it lives, and is at it: that is no reason to give the job up."""
    keeps, asks = (track(name, {"RETRY": 0.1}, TRACKER_IMAGES=bucket_url) for name in ("keeps", "asks"))
    keeps.announce("keeps")
    asks.announce("asks")
    until(lambda: asks.store.servers() == ["asks", "keeps"])
    job, share = a_job(keeps.script, dice, has_request=True), keeps.images.share_request
    keeps.images.share_request = mock.Mock(side_effect=keeps.script.StoreError("not yet", temporary=True))
    keeps.accept(job, lambda is_taken=False: True, b'{"prompt": "a cat"}').result(20)
    keeps.fail(job.id, "no")
    until(lambda: asks.get(job.id).status == "Failed")
    with pytest.raises(asks.script.StoreError, match="on its way from keeps") as refusal:
        asks.retry(job.id)
    assert refusal.value.temporary
    keeps.images.share_request = share
    assert until(lambda: retried(asks, job.id)).retry_of == job.id


def retried(tracker: Any, job_id: str) -> Any:
    """None while that is refused for now."""
    with contextlib.suppress(tracker.script.StoreError):
        return tracker.retry(job_id)


def test_a_look_at_a_job_of_another_webui_is_no_work_for_the_threads_that_send_answers(two, dice):
    """For it waits for the database, which may be away."""
    runs, looks = two
    job = a_job(runs.script, dice)
    runs.accept(job, lambda is_taken=False: True, b"{}").result(20)
    assert looks.pool_for(looks.get(job.id)) is looks.pool
    assert runs.pool_for(runs.get(job.id)) is runs.senders
    runs.fail(job.id, "no")


def test_one_purges_at_a_time(two, dice):
    one, other = two
    until(
        lambda: all(tracker.housekeeper.next_purge is not None for tracker in two), what="each has purged at its start"
    )
    old = a_job(one.script, dice, status="Failed", timestamp=1_000_000_000, error="no")
    one.store.put(old, new=True).result(20)
    purged = []
    with one.store.purging() as is_ours:
        assert is_ours
        assert other.housekeeper.purge(asked_for=False) == (0, 0, 0)
        purge = threading.Thread(target=lambda: purged.append(other.housekeeper.purge()), daemon=True)
        purge.start()
        until(lambda: other.housekeeper.waits, what="a purge that is asked for waits")
        assert other.get(old.id) is not None
    purge.join(20)
    assert purged == [(1, 0, 0)] and not other.housekeeper.waits


def test_a_thousand_waiters_cost_one_look(two, dice):
    """Whenever it cannot be told what has changed; and where it can, only the one that has."""
    one, other = two
    jobs = [a_job(one.script, dice, owner=one.store.owner) for _ in range(1000)]
    for written in [one.store.put(job, new=True) for job in jobs]:
        written.result(30)
    looks, get_many = [], other.store.get_many

    def counted(ids: Any) -> Any:
        looks.append(sorted(ids))
        return get_many(looks[-1])

    async def wait() -> None:
        loop = asyncio.get_running_loop()
        waiting = [asyncio.ensure_future(other.wait(job.id, 60)) for job in jobs]
        other.store.get_many = counted
        everybody = sorted(job.id for job in jobs)
        await loop.run_in_executor(None, lambda: until(lambda: everybody in looks, what="all are looked at together"))
        ended = one.store.change(
            [jobs[7].id], lambda job: one.script.ended_job(job, "Failed", one.store.now(), error="no")
        )
        await asyncio.wait_for(waiting[7], 20)
        assert ended.done() and [jobs[7].id] in looks and sum(task.done() for task in waiting) == 1
        for task in waiting:
            task.cancel()

    asyncio.run(wait())
