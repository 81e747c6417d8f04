"""A client that leaves, at any moment and in any way, loses nothing."""

from __future__ import annotations

import json
import socket

import pytest

from harness import Sent, body, until

RESET = pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
LARGE = {"image_bytes": 2_000_000}


@pytest.fixture
def expected(webui):
    """The images of a client that stays."""

    def images(**fields):
        return webui.post(body(**fields)).json()["images"]

    return images


def is_calm(webui):
    """Whether the webui holds nothing for clients that left."""
    state = webui.client.get("/standin/threads").json()
    return state["total_tokens"] == 40 and state["pending_tasks"] == 0


@RESET
def test_between_head_and_body(webui, expected, reset):
    gate = webui.gate()
    sent = webui.send(body(seed=11, batch_size=2, standin={"hold": gate}))
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    sent.leave(reset)
    gate.open()
    job = webui.job(job_id, wait=30)
    assert job["status"] == "Completed"
    assert job["images"] == expected(seed=11, batch_size=2)
    assert job["info"] and job["parameters"]["seed"] == 11
    until(lambda: is_calm(webui))


@RESET
def test_in_the_middle_of_the_body(webui, expected, reset):
    sent = webui.send(body(seed=12, standin=LARGE), headers={"Accept-Encoding": "identity"})
    sent.read_until(b'"images"')
    job_id = sent.job_id()
    sent.leave(reset)
    job = webui.job(job_id, wait=30)
    assert job["status"] == "Completed"
    assert job["images"] == expected(seed=12, standin=LARGE)
    assert len(job["images"][0]) > 2_000_000
    until(lambda: is_calm(webui))


def test_that_stays_and_stops_reading(webui):
    """Storing the images does not wait for it."""
    sent = webui.send(body(seed=18, standin={"image_bytes": 20_000_000}), headers={"Accept-Encoding": "identity"})
    job = webui.job(sent.job_id(), wait=30)
    assert job["status"] == "Completed"
    assert json.loads(sent.content())["images"] == job["images"]
    assert len(job["images"][0]) > 20_000_000


@RESET
def test_while_queued(webui, expected, reset):
    gate = webui.gate()
    first = webui.send(body(standin={"hold": gate}))
    webui.until_status(first.job_id(), "Processing")
    second = webui.send(body(seed=13))
    third = webui.send(body(seed=14))
    ids = second.job_id(), third.job_id()
    second.leave(reset)
    assert [webui.job(job_id)["status"] for job_id in ids] == ["Pending", "Pending"]
    gate.open()
    jobs = [webui.job(job_id, wait=30) for job_id in ids]
    assert [job["images"] for job in jobs] == [expected(seed=13), expected(seed=14)]
    assert third.to_end().endswith(b"0\r\n\r\n")
    until(lambda: is_calm(webui))


@RESET
def test_without_reading_anything(webui, expected, reset):
    """It leaves as soon as it is accepted, with the head unread."""
    gate = webui.gate()
    before = set(webui.records())
    sent = webui.send(body(seed=15, standin={"hold": gate}))
    (job_id,) = until(lambda: set(webui.records()) - before)
    sent.leave(reset)
    gate.open()
    job = webui.job(job_id, wait=30)
    assert (job["status"], job["images"]) == ("Completed", expected(seed=15))


@RESET
def test_right_after_sending(webui, reset):
    """Whatever the webui saw of it: there is no job, or one that completes."""
    before = set(webui.records())
    for _ in range(10):
        webui.send(body(seed=16)).leave(reset)
    webui.post(body())
    until(lambda: is_calm(webui) and webui.is_idle())
    jobs = [webui.job(job_id, images=False) for job_id in set(webui.records()) - before]
    assert 1 <= len(jobs) <= 11
    assert {(job["status"], job["image_count"]) for job in jobs} == {("Completed", 1)}


def test_that_says_it_sends_no_more(webui, expected):
    """Half of the connection is closed, the other half still listens."""
    gate = webui.gate()
    sent = webui.send(body(seed=17, standin={"hold": gate}))
    job_id = sent.job_id()
    sent.socket.shutdown(socket.SHUT_WR)
    gate.open()
    job = webui.job(job_id, wait=30)
    assert (job["status"], job["images"]) == ("Completed", expected(seed=17))


@RESET
@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_half_a_request_is_no_job(webui, reset, framing, share):
    before = (webui.data / "jobs.json").read_bytes()
    content = json.dumps(body("half a request")).encode()
    part = content[: int(len(content) * share)]
    head = f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: 127.0.0.1:{webui.port}\r\nContent-Type: application/json\r\n"
    if framing == "length":
        data = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + part
    else:
        data = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()
        if part:
            data += f"{len(part):x}\r\n".encode() + part + b"\r\n"
    Sent(webui.port, data).leave(reset)
    webui.client.get("/standin/empty")
    until(lambda: is_calm(webui))
    assert (webui.data / "jobs.json").read_bytes() == before


def test_half_a_request_that_never_ends_holds_up_nobody(webui):
    content = json.dumps(body()).encode()
    head = f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    waiting = [Sent(webui.port, head + content[:20]) for _ in range(50)]
    try:
        assert webui.post(body()).status_code == 200
    finally:
        for sent in waiting:
            sent.leave()


def test_failure_without_a_client(webui):
    gate = webui.gate()
    sent = webui.send(body(standin={"hold": gate, "fail": "OutOfMemoryError"}))
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    sent.leave()
    gate.open()
    assert webui.job(job_id, wait=30)["error"] == "OutOfMemoryError"
    until(lambda: is_calm(webui))


def test_all_of_many_leave(webui):
    """Their jobs run one after the other, and what they held is given back."""
    gate = webui.gate()
    first = webui.send(body(standin={"hold": gate}))
    webui.until_status(first.job_id(), "Processing")
    sent = [webui.send(body(seed=number)) for number in range(20)]
    ids = [one.job_id() for one in sent]
    for number, one in enumerate(sent):
        one.leave(reset=number % 2 == 0)
    gate.open()
    assert {webui.job(job_id, wait=30, images=False)["status"] for job_id in ids} == {"Completed"}
    until(lambda: is_calm(webui))
