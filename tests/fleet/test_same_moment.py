"""Two webuis are asked with one Idempotency-Key in the same moment: both find nothing of it, and one is first."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Iterator, List, Tuple

import pytest
from inside import SmallWebui, load_script, until

KEY = {"Idempotency-Key": "the same"}
CAT = {"prompt": "a cat"}


class Asked(SmallWebui):
    """One that generates what it is asked for once `ready` is set, and that has seen nothing of the key before."""

    def __init__(self, *args: Any, **environ: str):
        super().__init__(load_script(), *args, **environ)
        self.generated: List[str] = []
        self.ready = threading.Event()
        self.generate = self.paint
        self.tracker.store.with_key = lambda key: None

    def paint(self, request: Any) -> Any:
        self.generated.append(request.prompt)
        assert self.ready.wait(60)
        return {"images": ["QUJD"], "parameters": {}, "info": "{}"}


@pytest.fixture
def two(tmp_path, database) -> Iterator[Tuple[Asked, Asked]]:
    environ = {"TRACKER_STORE": database.url, "TRACKER_DATA_DIR": str(tmp_path)}
    with Asked(tmp_path / "one", **environ) as first, Asked(tmp_path / "two", **environ) as second:
        yield first, second


async def in_thread(function: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def ask_both(first: Asked, second: Asked, body: Any = CAT, **headers: str) -> Tuple[Any, Any]:
    """The answers of both. The first has generated nothing before the second has asked."""
    asking = asyncio.ensure_future(first.post(CAT, KEY))
    await in_thread(until, lambda: first.generated)
    again = asyncio.ensure_future(second.post(body, {**KEY, **headers}))
    await asyncio.wait({again}, timeout=1)
    first.ready.set()
    answer = await asking
    if second.queue_lock.locked():  # all that the webui does for the request is to be over when it is answered
        second.queue_lock.release()
    return answer, await again


@pytest.mark.parametrize("waits", [False, True], ids=["free", "waiting"])
def test_one_generation_and_both_have_its_answer(two, waits):
    """Also where the second waits for its own queue lock, and does not get it."""
    first, second = two

    async def ask() -> None:
        if waits:
            second.queue_lock.acquire()
        one, other = await ask_both(first, second)
        assert one.status_code == other.status_code == 200
        assert one.headers["X-Job-ID"] == other.headers["X-Job-ID"]
        assert one.json() == other.json()

    asyncio.run(ask())
    assert first.generated == ["a cat"] and not second.generated
    assert len(first.jobs()) == 1 == len(second.jobs())


def test_what_would_be_parked_is_promised_by_the_id_of_the_first(two):
    first, second = two
    one, other = asyncio.run(ask_both(first, second, Prefer="respond-async"))
    assert other.status_code == 202 and other.headers["X-Job-ID"] == one.headers["X-Job-ID"] == other.json()["id"]
    assert other.headers["Location"].endswith(f"/job/{one.headers['X-Job-ID']}")
    assert not second.generated and len(first.jobs()) == 1


@pytest.mark.parametrize("prefer", ["", "respond-async"])
def test_another_body_is_refused(two, prefer):
    first, second = two
    one, other = asyncio.run(ask_both(first, second, {"prompt": "a dog"}, **({"Prefer": prefer} if prefer else {})))
    assert one.status_code == 200 and other.status_code == 422 and "another body" in other.json()["detail"]
    assert "X-Job-ID" not in other.headers and not second.generated


def test_when_the_first_comes_to_nothing_the_second_generates(two):
    first, second = two
    second.ready.set()
    look, failed = second.tracker.find, []

    async def find(job_id: str) -> Any:
        if not failed:  # in the moment between
            failed.append(job_id)
            await in_thread(first.tracker.cancel, job_id)
            await in_thread(until, lambda: first.tracker.store.get(job_id).ended)
        return await look(job_id)

    second.tracker.find = find

    async def ask() -> Any:
        first.queue_lock.acquire()
        asking = asyncio.ensure_future(first.post(CAT, {**KEY, "Prefer": "wait=60"}))
        await in_thread(until, first.jobs)
        other = await second.post(CAT, KEY)
        first.queue_lock.release()
        await asyncio.gather(asking, return_exceptions=True)
        return other

    answer = asyncio.run(ask())
    assert answer.status_code == 200 and second.generated == ["a cat"] and not first.generated
    assert failed and answer.headers["X-Job-ID"] != failed[0]
