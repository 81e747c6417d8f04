"""Who watches a job costs as little as one does, and gets what is newest, however slow he is."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Callable, Dict, List, Tuple

import pytest
from inside import a_job

MANY = 1000


class Host:
    """One whose generation stands where a test wants it, and that counts the looks at it."""

    def __init__(self) -> None:
        self.at = 0.0
        self.looks = 0

    def begun(self) -> None:
        pass

    def progress(self, begun: None) -> float:
        self.looks += 1
        return self.at

    def counted_seconds(self, seconds: float) -> float:
        return seconds


@pytest.fixture
def host(script: Any, tracker: Any) -> Host:
    tracker.host = Host()
    script.Watch.EVERY = 0.01
    return tracker.host


@pytest.fixture
def job_id(script: Any, tracker: Any, host: Host, dice: Any) -> str:
    """A job that runs."""
    job = a_job(script, dice)
    tracker.accept(job, lambda: True, b"").result(30)
    tracker.start(job.id)
    return job.id


def parsed(data: bytes) -> List[Tuple[str, Any]]:
    """Events by kind, with what stands in their JSON."""
    found = []
    for text in filter(None, data.decode().split("\n\n")):
        fields = dict(line.split(": ", 1) for line in text.split("\n"))
        found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_one_look_and_one_copy_for_all(script, tracker, host, job_id):
    """And who reads nothing meanwhile gets what is newest then, and no more."""
    described: List[str] = []
    describe = tracker.describe

    def counted(job: Any, **options: Any) -> Dict[str, Any]:
        described.append(job.id)
        return describe(job, **options)

    tracker.describe = counted
    began = time.monotonic()

    async def listen() -> None:
        events = script.Events(tracker)
        listeners = [events.listen(job_id, "", False, script.ConnectionState()) for _ in range(MANY)]
        slow, *quick = listeners
        first = await asyncio.gather(*(one.__anext__() for one in quick))
        assert len({id(data) for data in first}) <= len(described)
        assert len(set(first)) == 1 and parsed(first[0])[0][1]["id"] == job_id
        assert parsed(await slow.__anext__()) == parsed(first[0])
        for host.at in (0.25, 0.5, 0.75):
            told = await asyncio.gather(*(one.__anext__() for one in quick))
            assert len({id(data) for data in told}) == 1
            assert [(kind, data["progress"]) for kind, data in parsed(told[0])] == [("progress", host.at)]
        assert [data["progress"] for _, data in parsed(await slow.__anext__())] == [0.75]
        # The end of one look, and of the last pause, may lie outside.
        assert len(described) <= host.looks <= (time.monotonic() - began) / script.Watch.EVERY + 2
        tracker.fail(job_id, "no")
        last = await asyncio.gather(*(one.__anext__() for one in listeners))
        assert [(kind, data["error"]) for kind, data in parsed(last[0])] == [("status", "no")]
        assert b"\nid: ended\n" in last[0] and len(set(last)) == 1
        for one in listeners:
            with pytest.raises(StopAsyncIteration):
                await one.__anext__()
            await one.aclose()

    asyncio.run(listen())


def test_who_leaves_is_done_at_once_and_the_last_ends_the_looks(script, tracker, host, job_id):
    async def listen() -> None:
        events = script.Events(tracker)
        listeners = [events.listen(job_id, "", False, script.ConnectionState()) for _ in range(3)]
        for one in listeners:
            await one.__anext__()
        for one in listeners:
            waiting = asyncio.ensure_future(one.__anext__())
            await asyncio.sleep(0)
            one.leave()
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(waiting, 5)
            await one.aclose()
        looks = host.looks
        await asyncio.sleep(script.Watch.EVERY * 10)
        assert host.looks <= looks + 1
        assert events.pause(0.5) == 0.5

    asyncio.run(listen())
    tracker.fail(job_id, "no")


def test_many_watches_look_more_seldom(script, tracker, host):
    async def listen() -> None:
        events = script.Events(tracker)
        listeners = [
            events.listen(f"AAAA{number:04}", "", False, script.ConnectionState())
            for number in range(10 * events.LOOKS)
        ]
        assert events.pause(0.5) == 10.0
        for one in listeners:
            await one.aclose()
        assert events.pause(0.5) == 0.5

    asyncio.run(listen())


def test_a_disk_that_does_not_answer_ends_nothing(script, tracker, host, job_id):
    describe, failing = tracker.describe, [True]

    def fail_at_first(job: Any, **options: Any) -> Dict[str, Any]:
        if failing[0]:
            raise script.StoreError("the disk does not answer", temporary=True)
        return describe(job, **options)

    tracker.describe = fail_at_first

    async def listen() -> None:
        one = script.Events(tracker).listen(job_id, "", False, script.ConnectionState())
        first = asyncio.ensure_future(one.__anext__())
        await asyncio.sleep(script.Watch.EVERY * 10)
        assert not first.done()
        failing[0] = False
        assert [kind for kind, _ in parsed(await asyncio.wait_for(first, 30))] == ["status"]
        await one.aclose()

    asyncio.run(listen())
    tracker.fail(job_id, "no")


@pytest.mark.parametrize("end", ["the server stops", "the scripts are unloaded", "the job is deleted"])
def test_ends_with(script, tracker, host, job_id, end):
    script.Events.CHECK_EVERY = 0.01

    async def listen() -> None:
        connection = script.ConnectionState()
        one = script.Events(tracker).listen(job_id, "", False, connection)
        await one.__anext__()
        waiting = asyncio.ensure_future(one.__anext__())
        await asyncio.sleep(0)
        if end == "the server stops":
            connection.server_stops = lambda: True
        elif end == "the scripts are unloaded":
            tracker.close()
        else:
            tracker.running, tracker.get = lambda _: None, lambda _: None
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(waiting, 30)
        await one.aclose()

    running, get = tracker.running, tracker.get
    asyncio.run(listen())
    tracker.running, tracker.get = running, get
    tracker.fail(job_id, "no")


class Layer:
    """One of the host's: it passes messages on from a task of its own, later, as starlette's do."""

    def __init__(self, app: Any, change: Callable[[bytes], bytes]):
        self.app, self.change = app, change
        self.bodies: List[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        messages: asyncio.Queue[Any] = asyncio.Queue()

        async def pass_on() -> None:
            more = True
            while more:
                message = dict(await messages.get())
                await asyncio.sleep(0.002)
                if message["type"] == "http.response.body":
                    self.bodies.append(message["body"])
                    message["body"] = self.change(message["body"])
                    more = message["more_body"]
                await send(message)

        passing = asyncio.ensure_future(pass_on())
        await self.app(scope, receive, messages.put)
        await passing


@pytest.mark.parametrize("changes", [False, True])
def test_layers_are_passed_by(script, changes):
    """Not before they have let through what came before, and not where one of them changes what it gets."""
    sent: List[bytes] = []
    pieces = [b"%d" % number for number in range(9)]
    arrived: List[Any] = []  # an event: the head and five pieces are out

    async def app(scope: Any, receive: Any, send: Any) -> None:
        arrived.append(asyncio.Event())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number, piece in enumerate(pieces):
            await scope[script.OuterMiddleware.KEY].send_past_layers(send, piece)
            if number == 4:
                await arrived[0].wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if len(sent) == 6:
            asyncio.get_running_loop().call_later(0.01, arrived[0].set)  # the layer has to return from here

    layer = Layer(app, (lambda data: data * 2) if changes else (lambda data: data))
    scope = {"type": "http", "method": "GET", "headers": []}
    asyncio.run(script.OuterMiddleware(layer)(scope, None, send))
    assert b"".join(sent) == b"".join(map(layer.change, pieces))
    assert layer.bodies == (pieces if changes else pieces[:5]) + [b""]


def test_no_line_end_of_the_data_ends_an_event(script):
    assert script.event("status", b'{\r\n"a":\r1}', "x") == b'event: status\nid: x\ndata: {  "a": 1}\n\n'
