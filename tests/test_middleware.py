"""The middleware inside a test's process, for what no stand-in does: odd answers, and a server stopped by force."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
from typing import Any, Awaitable, Callable, Dict, Iterator

import pytest
from inside import load_script, make_tracker, pixels, until, when_ended

IMAGE = base64.b64encode(pixels("odd", 0)).decode()


@pytest.fixture
def script() -> Any:
    return load_script()


@pytest.fixture
def tracker(script, tmp_path) -> Iterator[Any]:
    tracker = make_tracker(script, tmp_path, TRACKER_ENABLED="1", TRACKER_RETENTION="off")
    yield tracker
    tracker.close().result(60)


async def nothing() -> None:
    pass


class Host:
    """Stands for a webui, whose client wants its images or not."""

    def __init__(self, script: Any, hide: bool):
        self.script = script
        self.hide = hide

    def extra_worker_thread(self) -> Any:
        return contextlib.nullcontext(True)

    def dequeue(self, task: Any) -> None:
        pass

    def adapt_request(self, arguments: Any, name: str) -> Any:
        return self.script.AdaptedRequest(hide_images=self.hide)


def middleware(
    script: Any,
    tracker: Any,
    answer: Any = None,
    before: Callable[[], Awaitable[None]] = nothing,
    hide: bool = False,
    lock: Any = None,
    seen: Callable[[], None] = lambda: None,
) -> Any:
    """That of a webui that answers so, after something else. `seen` is called where a request comes by."""
    observed = script.ObservedLock(lock or threading.Lock())

    def endpoint(generation: Any) -> None:
        script.current.set(generation)  # a plain executor does not hand the context on, as the host's threads do
        seen()
        generation.on_endpoint({})
        with observed:
            seen()
        seen()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(None, endpoint, script.current.get())
        await before()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    return script.Middleware(app, "txt2img", tracker, Host(script, hide))


SCOPE = {"path": "/", "headers": [(b"accept-encoding", b"gzip")], "client": ("::1", 1)}


def generation(script: Any, *args: Any, **options: Any) -> Any:
    """A generation request, whose client has left."""
    one = script.Generation(middleware(script, *args, **options), SCOPE, [{"type": "http.request"}])
    one.set_client_done()
    return one


@pytest.mark.parametrize(
    "cancelled, phases",
    [
        (False, ["CHECKING", "WAITING", "GENERATING", "ENCODING", "ENDED"]),
        (True, ["CHECKING", "WAITING", "WITHDRAWN", "ENDED"]),
    ],
)
def test_the_way_of_a_request(script, tracker, cancelled, phases):
    passed = []

    async def run() -> str:
        nonlocal one
        one = generation(script, tracker, {"images": [IMAGE]}, lock=lock, seen=note)
        with lock:
            work = one.begin()
            assert await one.is_accepted()
            note()
            if cancelled:
                assert tracker.cancel(one.job.id)
                note()
        await work
        note()
        return one.job.id

    def note() -> None:
        passed.append(one.phase.name)

    one, lock = None, threading.Lock()
    job = when_ended(tracker, asyncio.run(run()))
    assert passed == phases
    assert (job.status, job.error) == (("Failed", "Cancelled") if cancelled else ("Completed", None))
    assert one.response.messages == [], "nothing large is kept"


def test_a_job_that_is_cancelled_before_the_disk_took_it(script, tracker, monkeypatch):
    """Its client was told of no job, and is not left without an answer."""
    lock, cancels = threading.Lock(), []
    monkeypatch.setattr(tracker, "accept", lambda job, cancel: cancels.append(cancel) or script.Future())
    monkeypatch.setattr(tracker, "patience", lambda: 0.1)
    monkeypatch.setattr(script, "GIVE_UP_AFTER", 0.1)

    async def run() -> None:
        scope = {**SCOPE, script.OuterMiddleware.KEY: script.ConnectionState()}
        receive = script.replay_body([{"type": "http.request"}])
        serving = asyncio.ensure_future(middleware(script, tracker, lock=lock)(scope, receive, None))
        with lock:
            await asyncio.get_running_loop().run_in_executor(None, until, lambda: cancels)
            assert cancels[0]()
            with pytest.raises(script.HTTPException) as told:
                await serving
        assert (told.value.status_code, told.value.detail) == (500, "Cancelled")
        await scope[script.OuterMiddleware.KEY].work

    asyncio.run(run())


ODD: Dict[str, Any] = {
    "no parameters": {"images": [IMAGE], "info": "{}"},
    "parameters null": {"images": [IMAGE], "parameters": None, "info": "{}"},
    "parameters in a list": {"images": [IMAGE], "parameters": [1], "info": "{}"},
    "parameters that are text": {"images": [IMAGE], "parameters": "x", "info": "{}"},
    "info that is no text": {"images": [IMAGE], "parameters": {}, "info": {"a": 1}},
    "a prompt that is no text": {"images": [IMAGE], "parameters": {"prompt": ["a"]}, "info": "{}"},
    "images null": {"images": None, "parameters": {}, "info": ""},
    "images that are a number": {"images": 5, "parameters": {}, "info": ""},
    "images that are an object": {"images": {"a": IMAGE}, "parameters": {}, "info": ""},
    "images last": {"parameters": {}, "info": "", "images": [IMAGE]},
}


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_an_answer_of_an_odd_shape(script, tracker, name, hide):
    """A webui of another kind, or an extension of it, may answer so. Its images are kept all the same."""
    answer = ODD[name]

    async def run() -> str:
        one = generation(script, tracker, answer, hide=hide)
        await one.begin()
        return one.job.id

    job = when_ended(tracker, asyncio.run(run()))
    assert job.status == "Completed", job.error
    images = answer["images"] if isinstance(answer["images"], list) else []
    shown = json.loads(b"".join(tracker.as_json(job)))
    assert shown["images"] == images
    assert (shown["parameters"], shown["info"]) == (answer.get("parameters"), answer["info"])
    assert json.loads(b"".join(tracker.answer_as_json(job))) == {**answer, "images": images}


def test_a_server_that_is_stopped_by_force(script, tracker):
    """An answer that waits for a thread to store it is kept, though its task is cancelled meanwhile."""
    gate = threading.Event()

    async def run() -> str:
        for _ in range(tracker.storers._max_workers):
            tracker.storers.submit(gate.wait)
        one = generation(script, tracker, {"images": [IMAGE], "parameters": {}, "info": ""})
        work = one.begin()
        await one.until(lambda: one.phase is script.Phase.ENDED)
        await asyncio.wait({work}, timeout=0.1)
        work.cancel()
        await asyncio.wait({work})
        await asyncio.sleep(0)
        gate.set()
        return one.job.id

    job_id = asyncio.run(run())
    until(lambda: tracker.get(job_id).ended)
    assert tracker.get(job_id).status == "Completed", tracker.get(job_id).error
    assert json.loads(b"".join(tracker.as_json(tracker.get(job_id))))["images"] == [IMAGE]


def test_a_failure_in_a_server_that_is_stopped_by_force(script, tracker):
    """It is kept, though nobody has told its client yet."""

    async def fail() -> None:
        raise RuntimeError("the card is gone")

    async def run() -> str:
        one = script.Generation(middleware(script, tracker, before=fail), SCOPE, [{"type": "http.request"}])
        work = one.begin()
        await one.until(lambda: one.phase is script.Phase.ENDED)
        await asyncio.wait({work}, timeout=0.1)
        work.cancel()
        await asyncio.wait({work})
        return one.job.id

    job = when_ended(tracker, asyncio.run(run()))
    assert (job.status, job.error) == ("Failed", "RuntimeError: the card is gone")


def test_a_reload_waits_for_answers_on_their_way(script, tmp_path):
    """Where the webui does not wait for its clients, as on Forge, they get the rest all the same."""
    tracker = make_tracker(script, tmp_path, TRACKER_ENABLED="1", TRACKER_RETENTION="off")
    pieces = [bytes([number]) * script.CHUNK for number in range(4)]

    async def run() -> None:
        made = script.ThreadedChunks(tracker.pool, (piece for piece in pieces), tracker.sending)
        assert await made.__anext__() == pieces[0]
        tracker.close()
        await asyncio.sleep(0.5)
        assert [piece async for piece in made] == pieces[1:]
        made.close()

    asyncio.run(run())
    tracker.close().result(60)

    with pytest.raises(script.HTTPException) as refused:  # and not 404, as for what is lost
        asyncio.run(script.Api(tracker, None)._run(tracker.get, "AAAAAAAA", lost="lost"))
    assert refused.value.status_code == 503 and "reloaded" in refused.value.detail


def test_the_loop_does_not_wait_for_the_disk(script, tracker):
    """While a job is on its way to a disk that hangs, who polls another is answered."""
    done = threading.Event()
    jobs = [script.Job(tracker.reserve_id(), "txt2img", "Pending", 1736712000, None, "a cat") for _ in range(2)]
    tracker.accept(jobs[0], lambda: True).result()
    with tracker.store._lock:  # as who looks for a job while the disk does not answer
        accepting = threading.Thread(target=tracker.accept, args=(jobs[1], lambda: True))
        accepting.start()
        until(lambda: tracker._storing.locked())
        polling = threading.Thread(target=lambda: (asyncio.run(tracker.wait(jobs[0].id, 0.01)), done.set()))
        polling.start()
        assert done.wait(20)
    for job in jobs:
        until(lambda job=job: tracker.get(job.id))
        tracker.fail(job.id, "")


def test_the_loop_does_not_wait_for_the_disk_when_a_generation_fails(script, tracker):
    """While the job that failed is on its way to a disk that hangs, all others are served."""
    disk = tracker.store._lock  # held by who looks for a job while the disk does not answer

    async def fail() -> None:
        assert await one.is_accepted()
        assert disk.acquire(timeout=20)
        late.start()
        raise RuntimeError("the card is gone")

    async def run() -> None:
        nonlocal one
        one = generation(script, tracker, {}, fail)
        work = one.begin()
        await one.until(lambda: one.phase is script.Phase.ENDED)
        await asyncio.wait({work}, timeout=0.1)
        assert not work.done() and disk.locked()
        late.cancel()
        disk.release()
        await work

    one: Any = None
    late = threading.Timer(20, disk.release)
    asyncio.run(run())
    job = when_ended(tracker, one.job.id)
    assert (job.status, job.error) == ("Failed", "RuntimeError: the card is gone")


def test_a_repeat_right_after_a_failure(script, tracker):
    """Who repeats a generation whose failure is on its way to the store gets a generation, not that failure."""
    job = script.Job(tracker.reserve_id(), "txt2img", "Pending", 1736712000, None, "a cat")
    tracker.accept(job, lambda: True).result()
    tracker.start(job.id)
    tracker.answered(job.id)
    response = script.ClientResponse(
        middleware(script, tracker), {"headers": [], script.OuterMiddleware.KEY: None}, None, None
    )
    threading.Timer(0.1, tracker.fail, (job.id, "the card is gone")).start()
    assert asyncio.run(response._repeat(script.KeyReservation("digest", job.id))) is False


@pytest.mark.parametrize(
    "one, two, same",
    [
        ("Basic dXNlcjpzZWNyZXQ=", "basic  dXNlcjpvdGhlcg==", True),
        ("Basic dXNlcjpzZWNyZXQ=", "Basic b3RoZXI6c2VjcmV0", False),
        ("Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.aaaa", "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIyIn0.aaaa", False),
        ("Bearer dXNlcjpzZWNyZXQ=", "Basic dXNlcjpzZWNyZXQ=", False),
        ("", "Basic dXNlcjpzZWNyZXQ=", False),
    ],
)
def test_who_shares_idempotency_keys(script, one, two, same):
    """A user of the webui with whatever password; behind a proxy that checks tokens, only the same token."""
    users = [script.user_of({"headers": [(b"authorization", value.encode())]}) for value in (one, two)]
    assert (users[0] == users[1]) is same
