"""A response on its way through what the webui, and another extension, put around every route."""

from __future__ import annotations

import json
import re

import pytest

from harness import MODE_FLAGS, MODES, Sent, as_bytes, body, until, without_time

# An extension that puts a layer of its own around everything, as some do. It is started before or after Job Tracker,
# by its name.
FOREIGN = """
import time
from modules import script_callbacks
from starlette.middleware.base import BaseHTTPMiddleware


async def stamp(request, call_next):
    response = await call_next(request)
    response.headers["X-Foreign"] = "was here"
    return response


def started(demo, app):
    try:
        app.add_middleware(BaseHTTPMiddleware, dispatch=stamp)
        print("foreign layer is there")
    except RuntimeError as error:
        print(f"foreign layer is refused: {error}")


script_callbacks.on_app_started(started)
"""

CASES = [(mode, name) for mode in MODES for name in ("a-foreign", "z-foreign")]
RESET = pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
KEPT = pytest.mark.parametrize("connection", ["close", "keep-alive"])
LARGE = {"image_bytes": 3_000_000}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def layered(request, start_shared):
    mode, name = request.param
    webui = start_shared(*MODE_FLAGS[mode], scripts={name: FOREIGN})
    if "foreign layer is refused" in webui.log:
        pytest.skip("this webui takes no further layer")
    return webui


@pytest.fixture
def calm(layered):
    """Nothing that the test does may be an error in the log, of ours or of the server."""
    start = len(layered.log)
    yield
    state = layered.client.get("/standin/threads").json()
    assert state["total_tokens"] == 40
    log = layered.log[start:]
    for word in ("Traceback", "job_tracker.py", "[Job Tracker]", "was destroyed", "never retrieved", "ASGI"):
        assert word not in log, log


def send(webui, standin, connection="close", encoding="identity", **fields):
    return webui.send(body(standin=standin, **fields), headers={"Connection": connection, "Accept-Encoding": encoding})


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.usefixtures("calm")
def test_success(layered, alone, encoding):
    gate = layered.gate()
    request = body(standin={"hold": gate, **LARGE})
    with layered.client.stream(
        "POST",
        "/sdapi/v1/txt2img",
        content=as_bytes(request),
        headers={"Accept-Encoding": encoding},
    ) as response:
        job_id = response.headers["X-Job-ID"]
        assert response.headers["X-Foreign"] == "was here"
        assert response.headers.get("Content-Encoding", "identity") == encoding
        assert layered.job(job_id)["status"] in ("Pending", "Processing"), "the head comes before the generation ends"
        gate.open()
        answer = response.read()
    own = alone(layered).post(request).content
    assert without_time(answer.lstrip(b" ")).replace(f'"{job_id}"'.encode(), b"null") == without_time(own)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_failure(layered, encoding):
    gate = layered.gate()
    sent = send(layered, {"hold": gate, "fail": "ValueError", "message": "no"}, encoding=encoding)
    job_id = sent.job_id()
    layered.until_status(job_id, "Processing")
    gate.open()
    with pytest.raises(ConnectionError):
        sent.content()
    assert layered.job(job_id, wait=30)["error"] == "ValueError: no"


def test_refusal(layered, alone):
    own = alone(layered).post(body(steps="many"))
    response = layered.post(body(steps="many"))
    assert (response.status_code, response.content) == (own.status_code, own.content)
    assert "X-Job-ID" not in response.headers


@RESET
@KEPT
@pytest.mark.usefixtures("calm")
def test_client_leaves_while_queued(layered, reset, connection):
    gate = layered.gate()
    first = send(layered, {"hold": gate}, connection)
    second = send(layered, None, connection, seed=21)
    ids = first.job_id(), second.job_id()
    second.leave(reset)
    first.leave(reset)
    gate.open()
    assert [layered.job(job_id, wait=30)["status"] for job_id in ids] == ["Completed"] * 2


@RESET
@KEPT
@pytest.mark.usefixtures("calm")
def test_client_leaves_in_the_middle_of_the_body(layered, reset, connection):
    sent = send(layered, LARGE, connection)
    sent.read_until(b'"images"')
    job_id = sent.job_id()
    sent.leave(reset)
    job = layered.job(job_id, wait=30)
    assert (job["status"], len(job["images"])) == ("Completed", 1)


@RESET
@KEPT
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.usefixtures("calm")
def test_client_leaves_before_the_body_is_sent(layered, reset, connection, share):
    """It is as on the webui alone, which says nothing."""
    before = set(layered.records())
    data = layered.raw(body("x" * 200_000), headers={"Connection": connection})
    head = data.index(b"\r\n\r\n") + 4
    sent = Sent(layered.port, data[: head + int((len(data) - head) * share)])
    layered.client.get("/standin/empty")
    sent.leave(reset)
    layered.client.get("/standin/empty")
    assert set(layered.records()) == before


@pytest.mark.usefixtures("calm")
def test_one_connection_for_many(layered):
    """The next request on a connection is served when the answer before it is out."""
    request = layered.raw(body(), headers={"Connection": "keep-alive", "Accept-Encoding": "identity"})
    sent = Sent(layered.port, request)
    ids = set()
    for _ in range(3):
        sent.read_until(b"\r\n0\r\n\r\n")
        ids.add(re.search(rb"(?i)x-job-id: (\w+)", sent.received).group(1).decode())
        sent.received = b""
        sent.socket.sendall(request)
    sent.read_until(b"\r\n0\r\n\r\n")
    sent.leave()
    assert len(ids) == 3
    assert {layered.job(job_id, wait=30)["status"] for job_id in ids} == {"Completed"}


@RESET
@pytest.mark.usefixtures("calm")
def test_client_leaves_after_a_first_answer(layered, reset):
    gate = layered.gate()
    kept = {"Connection": "keep-alive"}
    sent = Sent(layered.port, layered.raw(body(), headers=kept))
    sent.read_until(b"\r\n0\r\n\r\n")
    sent.received = b""
    sent.socket.sendall(layered.raw(body(standin={"hold": gate}), headers=kept))
    job_id = sent.job_id()
    sent.leave(reset)
    gate.open()
    assert layered.job(job_id, wait=30)["status"] == "Completed"


@pytest.mark.usefixtures("calm")
def test_client_that_reads_slowly(layered):
    """It gets all of it, and holds up nobody, not even the job's end."""
    sent = send(layered, LARGE)
    job_id = sent.job_id()
    assert layered.job(job_id, wait=30)["status"] == "Completed"
    assert layered.post(body()).status_code == 200
    until(lambda: layered.is_idle())
    answer = json.loads(sent.content())
    assert answer["images"] == layered.job(job_id)["images"]
