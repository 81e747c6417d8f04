"""The middleware inside a test's process, for what no stand-in does: odd answers, and a server stopped by force."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import Any, Dict, Iterator

import pytest
from inside import SCRIPT, SmallWebui, WrappedOs, pixels, set_constants, until, when_ended

IMAGE = base64.b64encode(pixels("odd", 0)).decode()
GOOD = {"images": [IMAGE], "parameters": {}, "info": ""}
REQUEST = {"prompt": "a cat"}


@pytest.fixture
def webui(script, tmp_path) -> Iterator[SmallWebui]:
    with SmallWebui(script, tmp_path) as webui:
        yield webui


class Disk:
    """The disk under the script, which keeps calls from returning until it goes on."""

    CALLS = "open stat lstat fstat pread pwrite fsync ftruncate listdir replace rename unlink mkdir"

    def __init__(self, script: Any, calls: str = CALLS, suffix: str = ""):
        self.goes_on, self.is_asked = threading.Event(), threading.Event()
        self.suffix = suffix  # of the names that are kept waiting
        script.os = WrappedOs(**{call: self.waiting(getattr(os, call)) for call in calls.split()})

    def waiting(self, call: Any) -> Any:
        def wait(first: Any, *arguments: Any, **options: Any) -> Any:
            if str(first).endswith(self.suffix):
                self.is_asked.set()
                assert self.goes_on.wait(60)
            return call(first, *arguments, **options)

        return wait


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
def test_an_answer_of_an_odd_shape(webui, name, hide):
    """A webui of another kind, or an extension of it, may answer so. Its images are kept all the same."""
    answer = ODD[name]
    webui.generate = lambda request: answer
    images = answer["images"] if isinstance(answer["images"], list) else []

    async def run() -> None:
        keyed = {"Idempotency-Key": "one"}
        first = await webui.post({**REQUEST, "send_images": not hide}, keyed)
        assert first.json() == ({**answer, "images": []} if hide else answer)
        job_id = first.headers["x-job-id"]
        job = (await webui.get(f"job/{job_id}?wait=20")).json()
        assert (job["status"], job["error"]) == ("Completed", None)
        assert job["images"] == images
        assert (job["parameters"], job["info"]) == (answer.get("parameters"), answer["info"])
        again = await webui.post({**REQUEST, "send_images": not hide}, keyed)
        assert again.headers["x-job-id"] == job_id
        assert again.json() == {**answer, "images": images}

    asyncio.run(run())


@pytest.mark.parametrize("call, suffix", [("open", ".part"), ("fsync", "")], ids=["the images", "the jobs"])
def test_a_server_that_is_stopped_by_force(script, webui, call, suffix):
    """Answers that are being stored, or wait for that, are kept, though their tasks are cancelled meanwhile."""
    count = 8  # more than there are threads to store them
    generated = []

    def generate(request: Any) -> Any:
        generated.append(request)
        return GOOD

    async def run() -> None:
        requests = [asyncio.ensure_future(webui.post(REQUEST)) for _ in range(count)]
        wait = asyncio.get_running_loop().run_in_executor
        await wait(None, until, lambda: len(generated) == count and disk.is_asked.is_set())
        await asyncio.sleep(0.5)
        assert not any(request.done() for request in requests)
        # What is still at work when this returns is cancelled.

    webui.generate = generate
    disk = Disk(script, call, suffix)
    asyncio.run(run())
    disk.goes_on.set()
    until(lambda: len(webui.jobs(status="Completed")) == count, 20, "all are stored")
    for job in webui.jobs():
        assert json.loads(b"".join(webui.tracker.as_json(job)))["images"] == [IMAGE]


def test_a_reload_waits_for_answers_on_their_way(script, webui):
    """Where the webui does not wait for its clients, as on Forge, they get the rest all the same."""
    images = [base64.b64encode(pixels("large", number, 1_000_000)).decode() for number in range(4)]
    webui.generate = lambda request: {**GOOD, "images": images}

    async def run() -> None:
        job_id = (await webui.post(REQUEST)).headers["x-job-id"]
        assert (await webui.get(f"job/{job_id}?wait=20")).json()["status"] == "Completed"
        received, closed = [], []

        async def take_slowly(message: Any) -> None:
            received.append(message.get("body", b""))
            if len(received) == 2:
                closed.append(webui.tracker.close())
                await asyncio.sleep(0.5)
                assert not closed[0].done(), "it waits"

        await webui.send(f"job/{job_id}", take_slowly)
        assert json.loads(b"".join(received))["images"] == images
        await asyncio.wrap_future(closed[0])
        answer = await webui.get(f"job/{job_id}")
        assert answer.status_code == 503, "and not 404, as for what is lost"
        assert "reloaded" in answer.json()["detail"] or "closed" in answer.json()["detail"]

    asyncio.run(run())


@contextlib.contextmanager
def no_later_than(disk: Disk, seconds: float = 20) -> Iterator[None]:
    """Whoever waits for the disk in the event loop would wait for ever: so it goes on at last, which is a failure."""
    late = threading.Timer(seconds, disk.goes_on.set)
    late.start()
    yield
    late.cancel()
    assert not disk.goes_on.is_set(), "the event loop waited for the disk"


def test_the_loop_does_not_wait_for_the_disk(script, webui):
    """While one job fails and another is accepted on a disk that hangs, who polls is answered."""
    fails = threading.Event()

    def generate(request: Any) -> Any:
        if request.prompt == "fails":
            fails.wait(60)
            raise RuntimeError("the card is gone")
        return GOOD

    async def run() -> None:
        failing = asyncio.ensure_future(webui.post({"prompt": "fails"}))
        wait = asyncio.get_running_loop().run_in_executor
        (job,) = await wait(None, until, lambda: webui.jobs(status="Processing"))
        disk = Disk(script)
        with no_later_than(disk):
            accepted = asyncio.ensure_future(webui.post({"prompt": "waits"}))
            fails.set()
            await wait(None, until, disk.is_asked.is_set)
            for _ in range(3):
                assert (await webui.get(f"job/{job.id}")).json()["status"] == "Processing"
                await asyncio.sleep(0.1)
        disk.goes_on.set()
        await asyncio.gather(failing, accepted, return_exceptions=True)
        assert accepted.result().json() == GOOD

    webui.generate = generate
    asyncio.run(run())
    jobs = [when_ended(webui.tracker, job.id) for job in webui.jobs()]
    ends = {job.prompt: (job.status, job.error) for job in jobs}
    assert ends == {"fails": ("Failed", "RuntimeError: the card is gone"), "waits": ("Completed", None)}


def test_a_repeat_right_after_a_failure(script, webui):
    """Who repeats a generation whose failure is on its way to the store gets a generation, not that failure."""
    set_constants(script, STORE_WAIT=30.0)  # however busy this machine is
    outcomes = [RuntimeError("the card is gone"), None]
    fails = threading.Event()

    def generate(request: Any) -> Any:
        fails.wait(60)
        error = outcomes.pop(0)
        if error:
            raise error
        return GOOD

    async def run() -> None:
        keyed = {"Idempotency-Key": "one"}
        first = asyncio.ensure_future(webui.post(REQUEST, keyed))
        wait = asyncio.get_running_loop().run_in_executor
        await wait(None, until, lambda: webui.jobs(status="Processing"))
        assert await wait(None, webui.tracker.store.idle), "what is written from now on is the failure"
        disk = Disk(script, "fsync")
        fails.set()
        await wait(None, until, lambda: disk.is_asked.is_set() and not webui.tracker.store.idle(0))
        second = asyncio.ensure_future(webui.post(REQUEST, keyed))
        await asyncio.sleep(0.3)
        disk.goes_on.set()
        await asyncio.wait({first, second})
        assert second.result().json() == GOOD

    webui.generate = generate
    asyncio.run(run())
    assert sorted(when_ended(webui.tracker, job.id).status for job in webui.jobs()) == ["Completed", "Failed"]


def test_an_endpoint_that_another_extension_has_put_in_the_place_of_ours(webui):
    """The request cannot be read, but is a job all the same."""
    webui.generate = lambda request: {**GOOD, "parameters": REQUEST}
    for route in webui.app.routes:
        if route.path == "/sdapi/v1/txt2img":
            route.dependant.call = route.endpoint
    job_id = asyncio.run(webui.post(REQUEST)).headers["x-job-id"]
    job = when_ended(webui.tracker, job_id)
    assert (job.status, job.prompt, len(job.images)) == ("Completed", REQUEST["prompt"], 1)


def test_a_long_wait_whose_head_cannot_be_sent(webui):
    """Nobody waits for the job's end any more."""
    goes_on = threading.Event()
    webui.generate = lambda request: goes_on.wait(60) and GOOD
    set_constants(webui.script, HEARTBEAT=0.05)

    async def send(message: Any) -> None:
        raise OSError("the client has left")

    async def run() -> None:
        generating = asyncio.ensure_future(webui.post(REQUEST))
        (job,) = await asyncio.get_running_loop().run_in_executor(None, until, webui.jobs)
        await webui.send(f"job/{job.id}?wait=300", send)
        await asyncio.sleep(0.1)
        assert "Tracker.wait" not in [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
        goes_on.set()
        await generating

    asyncio.run(run())


def test_a_head_that_is_refused(webui, caplog, monkeypatch):
    """Too much waits already: that is a 503, and nothing goes wrong besides."""
    webui.generate = lambda request: GOOD
    job_id = asyncio.run(webui.post(REQUEST)).headers["x-job-id"]
    assert when_ended(webui.tracker, job_id).status == "Completed"
    submit = webui.tracker.pool.submit

    def refuse_chunks(function: Any, *arguments: Any) -> Any:
        if function.__name__ == "_make":
            raise webui.script.StoreError("too many wait already", temporary=True)
        return submit(function, *arguments)

    monkeypatch.setattr(webui.tracker.pool, "submit", refuse_chunks)
    plain = {"Accept-Encoding": "identity"}
    assert asyncio.run(webui.get(f"job/{job_id}/images/0", "HEAD", headers=plain)).status_code == 503
    assert caplog.text == ""


def test_answers_that_cannot_be_stored_yet_keep_no_other_from_the_disk(webui, monkeypatch):
    """However many they are. They are stored as soon as that is possible."""
    script, save, is_stuck = webui.script, webui.tracker.images.save, True
    script.STORE_AGAIN = (0.2,) * 300
    webui.generate = lambda request: GOOD

    def save_some(job: Any, answer: Any) -> Any:
        if is_stuck and job.prompt == "stuck":
            raise script.StoreError("Stale file handle", temporary=True)
        return save(job, answer)

    monkeypatch.setattr(webui.tracker.images, "save", save_some)

    async def run() -> None:
        nonlocal is_stuck
        stuck = [asyncio.create_task(webui.post({"prompt": "stuck"})) for _ in range(3)]
        await asyncio.sleep(1)
        answer = await asyncio.wait_for(webui.post(REQUEST), 20)
        assert when_ended(webui.tracker, answer.headers["x-job-id"]).status == "Completed"
        (job, *_), _ = webui.tracker.store.query(script.Filter(status="Processing"), 9)
        assert webui.tracker.get(job.id).error == "Generated, but the images cannot be stored yet: Stale file handle"
        is_stuck = False
        for answer in await asyncio.wait_for(asyncio.gather(*stuck), 20):
            job = when_ended(webui.tracker, answer.headers["x-job-id"])
            assert (job.status, job.error) == ("Completed", None)

    asyncio.run(run())


def test_a_server_that_is_stopped_by_force_between_two_tries(webui, monkeypatch):
    """One more is made, at once."""
    script, save, tries = webui.script, webui.tracker.images.save, []
    webui.generate = lambda request: GOOD

    def save_at_second_try(job: Any, answer: Any) -> Any:
        tries.append(job)
        if len(tries) == 1:
            raise script.StoreError("Stale file handle", temporary=True)
        return save(job, answer)

    monkeypatch.setattr(webui.tracker.images, "save", save_at_second_try)
    script.STORE_AGAIN = (600,)

    async def run() -> None:
        request = asyncio.ensure_future(webui.post(REQUEST))
        await asyncio.get_running_loop().run_in_executor(None, until, lambda: tries and webui.jobs()[0].error)
        assert not request.done()

    asyncio.run(run())
    assert when_ended(webui.tracker, tries[0].id).status == "Completed" and len(tries) == 2


def test_location_below_a_root_of_any_letters(webui):
    webui.generate = lambda request: GOOD
    webui.app.root_path = "/\u753b\u50cf"
    answer = asyncio.run(webui.post(REQUEST, {"Prefer": "respond-async"}))
    location = f"/%E7%94%BB%E5%83%8F/sdapi/v1/job/{answer.headers['x-job-id']}"
    assert (answer.status_code, answer.headers["location"]) == (202, location)


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


def test_two_event_loops_begin_at_once():
    """anyio gives the second one a module that is half imported, unless it was imported before."""
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); assert 'anyio._backends._asyncio' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
