"""GET /sdapi/v1/job/{id}/events: a job as it goes on, as Server-Sent Events, from any webui to any client."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List

import httpx
import pytest
from httpx_sse import EventSource, ServerSentEvent, connect_sse
from proxies import NGINX, find, running

from harness import (
    MODE_FLAGS,
    MODES,
    QUICK,
    SECONDS,
    SHAPE,
    Sent,
    Start,
    Webui,
    connect,
    hold_the_queue,
    new_client,
    submit,
)

pytestmark = pytest.mark.one_mode


def path_of(job_id: str) -> str:
    return f"/sdapi/v1/job/{job_id}/events"


@contextlib.contextmanager
def listening(client: httpx.Client, job_id: str, **options: Any) -> Iterator[EventSource]:
    with connect_sse(client, "GET", path_of(job_id), **options) as source:
        assert source.response.status_code == 200
        yield source


def data_of(event: ServerSentEvent) -> Dict[str, Any]:
    return json.loads(event.data)


def status_in(event: ServerSentEvent) -> str:
    assert event.event == "status"
    return data_of(event)["status"]


@pytest.fixture(scope="module", params=MODES)
def site(request: pytest.FixtureRequest, start_shared: Start) -> Webui:
    webui = start_shared(*MODE_FLAGS[request.param])
    if SHAPE != "sdnext":  # which has no such setting
        webui.client.post("/sdapi/v1/options", json={"show_progress_every_n_steps": 1})
    return webui


@pytest.fixture(params=["directly", "through nginx"])
def client(request: pytest.FixtureRequest, site: Webui, tmp_path: Path) -> Iterator[httpx.Client]:
    """One that takes gzip, as all do."""
    if request.param == "directly":
        yield site.client
        return
    find(NGINX)
    setting = "gzip on; gzip_types *; gzip_min_length 0;"
    with running(NGINX, site, tmp_path, setting) as port, new_client(f"http://127.0.0.1:{port}") as proxied:
        yield proxied


def test_from_queue_to_end(site, client):
    gate, first_gate = site.gate(), site.gate()
    first = connect(site, standin={"hold": first_gate})
    job_id = submit(site, standin={"hold": gate, "seconds": 1.5}, steps=9)
    with listening(client, job_id, params={"preview": "true"}) as source:
        response, events = source.response, source.iter_sse()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-store"
        assert client is not site.client or "content-encoding" not in response.headers  # this nginx likes to pack
        at_first = data_of(next(events))
        assert (at_first["status"], at_first["queue_position"]) == ("Pending", 1)
        assert "images" not in at_first
        first_gate.open()
        seen: List[ServerSentEvent] = []
        for event in events:
            seen.append(event)
            if event.event == "progress" and data_of(event)["progress"] == pytest.approx(8 / 9):
                gate.open()
    assert site.job(first)["status"] == "Completed"
    assert status_in(seen.pop(0)) == "Processing"
    last = seen.pop()
    assert last.id == "ended" and all(event.id == "" for event in seen)
    assert data_of(last) == site.job(job_id, images=False) and status_in(last) == "Completed"
    steps = [data_of(event) for event in seen if event.event == "progress"]
    shares = [step["progress"] for step in steps]
    assert shares == sorted(set(shares)) and 2 <= len(shares) <= 9
    assert all(set(step) == {"progress", "eta", "queue_position"} for step in steps)
    previews = [event.data for event in seen if event.event == "preview"]
    assert previews and len(set(previews)) == len(previews)
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*\Z", data) for data in previews)


def test_after_the_end(site):
    job_id = submit(site)
    job = site.job(job_id, wait=30, images=False)
    with listening(site.client, job_id) as source:
        (only,) = source.iter_sse()
    assert (only.event, only.id, data_of(only)) == ("status", "ended", job)
    again = site.client.get(path_of(job_id), headers={"Last-Event-ID": "ended"})
    assert (again.status_code, again.content) == (204, b"")
    for headers in ({}, {"Last-Event-ID": "ended"}):
        unknown = site.client.get(path_of("AAAAAAAA"), headers=headers)
        assert (unknown.status_code, unknown.json()["detail"]) == (404, "Job not found")
    assert site.client.get(path_of(job_id), params={"preview": "maybe"}).status_code == 422
    assert site.client.head(path_of(job_id)).status_code == 405


def test_http_1_0(site):
    job_id = submit(site)
    site.job(job_id, wait=30)
    sent = Sent(site.port, f"GET {path_of(job_id)} HTTP/1.0\r\n\r\n".encode())
    head, _, content = sent.to_end().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"chunked" not in head
    assert re.fullmatch(rb"event: status\nid: ended\ndata: \{[^\n]+\}\n\n", content)


@pytest.fixture(scope="module")
def seldom(start_shared: Start) -> Webui:
    """One whose watches look at their jobs once a minute, and whose silence is short."""
    return start_shared(*QUICK, constants={"EVERY": 60.0, "HEARTBEAT": 0.1})


def test_the_end_is_told_at_once_and_silence_is_broken(seldom):
    hold_the_queue(seldom)
    ids = [connect(seldom), submit(seldom)]
    for job_id in ids:
        with listening(seldom.client, job_id) as source:
            lines = source.response.iter_lines()
            while next(lines) != ":":  # a comment
                pass
            assert seldom.client.post(f"/sdapi/v1/job/{job_id}/cancel").status_code == 200
            rest = [line for line in lines if line not in ("", ":")]
        assert rest[:2] == ["event: status", "id: ended"] and len(rest) == 3
        assert json.loads(rest[2].partition(": ")[2])["error"] == "Cancelled"


def test_a_client_that_leaves_or_does_not_read_changes_nothing(seldom):
    job_id = hold_the_queue(seldom)
    sent = [seldom.send_get(path_of(job_id)) for _ in range(20)]
    for one in sent[:10]:
        one.read_until(b"\n\n")
        one.leave(reset=True)
    seldom.gates[-1].open()
    assert seldom.job(job_id, wait=30)["status"] == "Completed"
    for one in sent[10:]:
        assert b"id: ended" in one.content()
    assert "Traceback" not in seldom.log


def test_a_job_of_another_webui_on_the_folder(pair):
    runs, asked = pair
    job_id = hold_the_queue(runs)
    with listening(asked.client, job_id) as source:
        events = source.iter_sse()
        at_first = data_of(next(events))
        assert (at_first["status"], at_first["progress"]) == ("Processing", None)
        runs.gates[-1].open()
        assert [(event.event, event.id) for event in events] == [("status", "ended")]


def begin_to_listen(webui: Webui, job_id: str) -> Future:
    """A listener in a thread, that has had the first event. The Future ends with the response, if that ends well."""
    client = new_client(webui.url)
    begun = threading.Event()

    def listen() -> None:
        with client, listening(client, job_id) as source:
            for _ in source.iter_sse():
                begun.set()

    threads = ThreadPoolExecutor(1)
    ended = threads.submit(listen)
    threads.shutdown(wait=False)
    assert begun.wait(SECONDS)
    return ended


@pytest.mark.skipif(SHAPE != "a1111", reason="others die at once")
def test_does_not_keep_a_server_that_stops(start):
    """It waits for its responses. That of a job which waits on disk would not end before the next start."""
    webui = start(*MODE_FLAGS["nowebui"])
    hold_the_queue(webui)
    ended = begin_to_listen(webui, submit(webui))
    webui.process.send_signal(signal.SIGTERM)
    ended.result(SECONDS)
    webui.gates[-1].open()
    webui.terminate()


@pytest.mark.skipif(SHAPE == "sdnext", reason="SD.Next starts anew as a process")
def test_does_not_hold_up_a_reload(start):
    webui = start(*MODE_FLAGS["ui"])
    gate = webui.gate()
    submit(webui, standin={"hold": gate})
    waiting = submit(webui, standin={"hold": gate})
    ended = begin_to_listen(webui, waiting)
    webui.client.post("/standin/reload")  # it interrupts the first, waits for all responses, and the other begins
    ended.result(SECONDS)
    gate.open()
    webui.wait(2)
    with listening(webui.client, waiting) as source:  # as a browser does by itself
        until_end = [status_in(event) for event in source.iter_sse() if event.event == "status"]
    assert until_end[-1] in ("Completed", "Failed")
