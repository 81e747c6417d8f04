"""A webui that others took for dead, though it only could not reach the database: what becomes of its jobs."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from inside import SmallWebui, load_script, set_constants, until, when_ended


class Watched(SmallWebui):
    """One that goes on to generate once `ready` is set."""

    def __init__(self, *args: Any, **environ: str):
        script = load_script()
        set_constants(script, FIND_EVERY=0.2, FIND_AGAIN=0.2)
        super().__init__(script, *args, **environ)
        self.generated: List[str] = []
        self.ready = threading.Event()
        self.generate = self.paint

    def paint(self, request: Any) -> Any:
        self.generated.append(request.prompt)
        assert self.ready.wait(60)
        return {"images": ["QUJD"], "parameters": {}, "info": "{}"}


@pytest.fixture
def receiver(open_receiver) -> Any:
    return open_receiver()


@pytest.fixture
def two(tmp_path, database, receiver) -> Iterator[Tuple[Watched, Watched]]:
    environ = {
        "TRACKER_STORE": database.url,
        "TRACKER_DATA_DIR": str(tmp_path),
        "TRACKER_WEBHOOK_URL": receiver.url,
    }
    with Watched(tmp_path / "one", **environ) as first, Watched(tmp_path / "two", **environ) as second:
        yield first, second


async def in_thread(function: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


def test_one_that_waits_is_left_to_whoever_took_it(two, caplog):
    first, second = two
    second.ready.set()

    async def ask() -> None:
        first.queue_lock.acquire()
        asking = asyncio.ensure_future(first.post({"prompt": "a cat"}, {"Idempotency-Key": "K"}))
        (job,) = await in_thread(until, first.jobs)
        tracker = first.tracker
        await in_thread(until, lambda: first.tracker.images.size(tracker.images.request_name(job)) is not None)
        repeat = asyncio.ensure_future(first.post({"prompt": "a cat"}, {"Idempotency-Key": "K"}))
        await in_thread(until, lambda: job.id in tracker._waiting)
        parked = second.tracker.store.change([job.id], lambda job: job._replace(promised=True, parked=True))
        assert await in_thread(parked.result, 20)
        await in_thread(until, lambda: tracker.running(job.id) is None)
        ended = await in_thread(when_ended, first.tracker, job.id)
        assert (ended.status, ended.owner) == ("Completed", second.tracker.store.owner)
        first.queue_lock.release()
        await asyncio.gather(asking, return_exceptions=True)  # cut, or an error: its generation is none of this webui's
        assert (await repeat).json()["images"] == ["QUJD"]

    asyncio.run(ask())
    assert second.generated == ["a cat"] and not first.generated
    assert "which took this webui for dead" in caplog.text


def test_one_that_another_has_begun_does_not_begin_before_that_is_heard(two):
    """As when a webui wakes up that was suspended: it has heard nothing yet."""
    first, second = two
    store = second.tracker.store

    async def ask() -> None:
        first.queue_lock.acquire()
        asking = asyncio.ensure_future(first.post({"prompt": "a cat"}, {"Idempotency-Key": "K"}))
        (job,) = await in_thread(until, first.jobs)
        deaf = threading.Event()

        def hear_nothing() -> Dict[str, bool]:
            deaf.set()
            first.tracker.closing.wait(0.1)
            return {}

        first.tracker.store.follow = hear_nothing
        await in_thread(deaf.wait, 20)
        begun = store.change([job.id], lambda job: job._replace(owner=store.owner, status="Processing"))
        assert await in_thread(begun.result, 20)
        assert first.tracker.running(job.id).status == "Pending"
        first.queue_lock.release()
        await asyncio.gather(asking, return_exceptions=True)
        assert first.tracker.running(job.id) is None
        assert first.tracker.get(job.id).owner == store.owner

    asyncio.run(ask())
    assert not first.generated


def leave_behind(webui: Watched, job_id: str) -> None:
    """Ends a job as a webui does that takes its owner for dead."""
    script, store = webui.script, webui.tracker.store

    def left(job: Any) -> Any:
        return script.ended_job(job, "Failed", store.now(), error=script.LEFT_BEHIND)

    assert store.change([job_id], left).result(20)
    assert webui.tracker.get(job_id).error == script.LEFT_BEHIND


def test_one_that_waits_with_its_client_goes_on(two, caplog):
    first, second = two
    first.ready.set()

    async def ask() -> Any:
        first.queue_lock.acquire()
        asking = asyncio.ensure_future(first.post({"prompt": "a cat"}))
        (job,) = await in_thread(until, second.jobs)
        other = job._replace(id="OTHER000", owner=second.tracker.store.owner, bytes=0, has_request=False)
        await in_thread(second.tracker.store.put(other, True).result, 20)
        heard = asyncio.ensure_future(first.tracker.wait(other.id, 60))
        await in_thread(leave_behind, second, job.id)
        await in_thread(leave_behind, second, other.id)
        await heard  # and what was written before it
        assert not asking.done()
        first.queue_lock.release()
        return await asking

    answer = asyncio.run(ask())
    assert answer.status_code == 200 and answer.json()["images"] == ["QUJD"]
    assert when_ended(second.tracker, answer.headers["X-Job-ID"])
    until(lambda: second.tracker.get(answer.headers["X-Job-ID"]).status == "Completed")
    assert first.generated == ["a cat"] and not second.generated


def test_one_that_runs_goes_on_and_its_end_is_told_once_more(two, receiver):
    first, second = two

    async def ask() -> Any:
        asking = asyncio.ensure_future(first.post({"prompt": "a cat"}))
        await in_thread(until, lambda: first.generated and first.jobs(status="Processing"))
        (job,) = second.jobs()
        await in_thread(leave_behind, second, job.id)
        await in_thread(receiver.wait, 1)
        first.ready.set()
        return await asking

    answer = asyncio.run(ask())
    assert answer.status_code == 200 and answer.json()["images"] == ["QUJD"]
    job = until(lambda: next(iter(second.jobs(status="Completed")), None))
    assert job.id == answer.headers["X-Job-ID"] and job.error is None
    lost, found = receiver.wait(2)
    assert [delivery.event["type"] for delivery in (lost, found)] == ["job.failed", "job.completed"]
    assert lost.id != found.id
    webhook = until(lambda: second.tracker.get(job.id).webhook.delivered and second.tracker.get(job.id).webhook)
    assert webhook.attempts == 1
