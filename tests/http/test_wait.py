"""GET /sdapi/v1/job/{id}?wait=S answers the moment the job ends, and holds nobody up until then."""

from __future__ import annotations

import json
import statistics
import time
import zlib
from typing import Any, Dict, List

import pytest
from system import System

from harness import QUICK, SDNEXT_ERROR, Sent, Webui, body, hold_the_queue, submit, until

pytestmark = pytest.mark.one_mode

SOON = 0.15  # seconds; it is a few milliseconds where nothing else runs
TASKS = 3  # at least, of each client that waits: its request, the wait for the job, and that for the client to leave


def wait_for(webui: Webui, job_id: str, seconds: float) -> Sent:
    path = f"/sdapi/v1/job/{job_id}?images=false&wait={seconds}"
    return Sent(webui.port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())


def threads(webui: Webui) -> Dict[str, Any]:
    return webui.client.get("/standin/threads").json()


def test_answers_when_the_job_ends(webui):
    delays = []
    for _ in range(9):
        job_id = hold_the_queue(webui)
        sent = wait_for(webui, job_id, 30)
        webui.gates[-1].open()
        sent.read_until(b"\r\n\r\n")
        arrived = time.time()
        sent.to_end()
        job = webui.job(job_id)
        assert job["status"] == "Completed"
        delays.append(arrived - job["finished"])
    assert statistics.median(delays) < SOON, delays


def test_answers_when_the_job_fails(webui):
    delays = []
    for _ in range(5):
        job_id = hold_the_queue(webui, fail="RuntimeError")
        sent = wait_for(webui, job_id, 30)
        webui.gates[-1].open()
        job = json.loads(sent.content())
        delays.append(time.time() - job["finished"])
        assert job["status"] == "Failed"
    assert statistics.median(delays) < SOON, delays


def test_answers_when_a_waiting_job_is_cancelled(webui):
    hold_the_queue(webui)
    job_id = submit(webui)
    sent = wait_for(webui, job_id, 30)
    began = time.monotonic()
    assert webui.client.post(f"/sdapi/v1/job/{job_id}/cancel").status_code == 200
    assert json.loads(sent.content())["status"] == "Failed"
    assert time.monotonic() - began < 5


def test_answers_after_the_time(webui):
    job_id = hold_the_queue(webui)
    began = time.monotonic()
    assert webui.job(job_id, wait=0.4)["status"] == "Processing"
    assert 0.4 <= time.monotonic() - began < 5
    began = time.monotonic()
    assert webui.job(job_id, wait=0)["status"] == "Processing"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("job_id", ["AAAAAAAA", "short", "much-too-long", "%00%00%00%00%00%00%00%00", "äöüßäöüß"])
def test_unknown_is_answered_at_once(webui, job_id):
    began = time.monotonic()
    answer = webui.client.get(f"/sdapi/v1/job/{job_id}", params={"wait": 300})
    assert answer.status_code == 404 and answer.json()["detail"]
    assert time.monotonic() - began < 5


def test_ended_is_answered_at_once(webui):
    job_id = webui.post(body()).headers["x-job-id"]
    webui.job(job_id, wait=30)
    began = time.monotonic()
    assert webui.job(job_id, wait=300)["status"] == "Completed"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("seconds", ["-0.1", "-1", "300.1", "1e9", "nan", "inf", "-inf", "x", "", "1,5", "0x1"])
def test_out_of_bounds(webui, seconds):
    for job_id in ("AAAAAAAA", webui.jobs(limit=1)[0]["id"]):
        answer = webui.client.get(f"/sdapi/v1/job/{job_id}", params={"wait": seconds})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["query", "wait"]


@pytest.mark.parametrize("seconds", ["0", "300", "0.0", "299.999", "3e2"])
def test_in_bounds(webui, seconds):
    job_id = webui.post(body()).headers["x-job-id"]
    assert webui.job(job_id, wait=seconds)["id"] == job_id


# Longer than proxies take silence


@pytest.fixture(scope="module")
def often(start_shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Webui:
    """A webui whose white space comes often, and whose system can be made to fail."""
    system = System(tmp_path_factory.mktemp("system"))
    webui = start_shared(*QUICK, constants={"HEARTBEAT": 0.2}, scripts=system.scripts)
    webui.fails = system.fails
    return webui


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("images", ["true", "false"])
def test_white_space_while_it_waits(often, images, encoding):
    job_id = hold_the_queue(often)
    path = f"/sdapi/v1/job/{job_id}?images={images}&wait=60"
    sent = often.send_get(path, {"Accept-Encoding": encoding})
    status, headers = sent.head()
    assert (status, headers["content-type"]) == (200, "application/json")
    assert headers.get("content-encoding", "identity") == encoding
    silence = []
    for _ in range(4):
        began = time.monotonic()
        sent.received += sent.socket.recv(65536)
        silence.append(time.monotonic() - began)
    assert max(silence) < 2, silence
    often.gates[-1].open()
    content = sent.content()
    content = zlib.decompress(content, 31) if encoding == "gzip" else content
    assert content.startswith(b"   ")
    job = json.loads(content)
    assert job["status"] == "Completed"
    whole = often.job(job_id, images=images == "true")
    assert job == whole


def test_white_space_until_the_time_is_over(often):
    job_id = hold_the_queue(often)
    began = time.monotonic()
    content = often.send_get(f"/sdapi/v1/job/{job_id}?wait=1.1").content()
    assert 1.1 <= time.monotonic() - began < 5
    assert content.startswith(b" ") and json.loads(content)["status"] == "Processing"


def test_status_is_true_while_it_can_be(often):
    """What is known before the first byte of white space keeps its status."""
    answer = often.client.get("/sdapi/v1/job/AAAAAAAA?wait=60")
    assert answer.status_code == 404
    job_id = hold_the_queue(often)
    sent = often.send_get(f"/sdapi/v1/job/{job_id}?wait=60")
    often.gates[-1].open()
    assert sent.head()[0] == 200
    assert json.loads(sent.content())["status"] == "Completed"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_trouble_after_white_space_is_no_clean_end(often, version):
    """Its images cannot be opened just now, say: what has begun as 200 is cut, and who asks again is told why."""
    job_id = hold_the_queue(often)
    request = f"GET /sdapi/v1/job/{job_id}?wait=60 HTTP/{version}\r\nHost: localhost\r\n\r\n"
    sent = Sent(often.port, request.encode())
    assert sent.head()[0] == 200
    log_before = len(often.log)
    images = often.data / "images"
    with often.fails("pread", images, "waiting"):
        often.gates[-1].open()
        until(lambda: often.records()[job_id]["status"] == "Completed", what="its files are stored")
        with often.fails("open pread", images, "EMFILE"):
            received = sent.to_end()
            assert not received.endswith(b"0\r\n\r\n")
            assert often.client.get(f"/sdapi/v1/job/{job_id}").status_code == 503
    of_the_host = ("HTTP/1.1", SDNEXT_ERROR)
    log = [line for line in often.log[log_before:].splitlines() if not any(word in line for word in of_the_host)]
    assert len(log) == 1 and job_id in log[0], log
    assert often.job(job_id)["status"] == "Completed"


def polls(webui: Webui, job_id: str) -> List[float]:
    """How long each of some quick requests took."""
    times = []
    for path in ["/standin/empty", f"/sdapi/v1/job/{job_id}?images=false", "/sdapi/v1/jobs?limit=5"] * 10:
        began = time.monotonic()
        assert webui.client.get(path).status_code == 200
        times.append(time.monotonic() - began)
    return times


def test_a_thousand_wait_and_hold_nobody_up(webui):
    job_id = hold_the_queue(webui)
    polls(webui, job_id)
    before = threads(webui)
    clients = [wait_for(webui, job_id, 300) for _ in range(1000)]
    until(lambda: threads(webui)["tasks"] >= before["tasks"] + 1000 * TASKS, what="all are there")
    times = polls(webui, job_id)
    meanwhile = threads(webui)
    assert statistics.median(times) < SOON and max(times) < 2, times
    assert meanwhile["threads"] <= before["threads"] + 8  # of the tracker's own pool, made as they are needed
    assert meanwhile["total_tokens"] == before["total_tokens"]
    assert meanwhile["borrowed_tokens"] == before["borrowed_tokens"]

    for client in clients[::3]:
        client.leave()
    left = before["tasks"] + (meanwhile["tasks"] - before["tasks"]) * 0.7
    until(lambda: threads(webui)["tasks"] < left, what="who has left is not waited for")
    webui.gates[-1].open()
    staying = [client for number, client in enumerate(clients) if number % 3]
    assert {json.loads(client.content())["status"] for client in staying} == {"Completed"}
    until(lambda: threads(webui)["tasks"] < before["tasks"] + 5, what="nothing of them is left")
    assert webui.post(body()).status_code == 200


def test_a_job_of_another_process(pair):
    one, two = pair
    job_id = hold_the_queue(one)
    assert two.job(job_id)["status"] == "Processing"
    before = threads(two)
    clients = [wait_for(two, job_id, 300) for _ in range(200)]
    until(lambda: threads(two)["tasks"] >= before["tasks"] + 200 * TASKS, what="all are there")
    times = polls(two, job_id)
    assert statistics.median(times) < SOON and max(times) < 2, times
    one.gates[-1].open()
    assert {json.loads(client.content())["status"] for client in clients} == {"Completed"}
    assert time.time() - one.job(job_id)["finished"] < 10

    # It is killed: its job fails as soon as that is noticed, at the latest when a webui starts again.
    job_id = hold_the_queue(one)
    sent = wait_for(two, job_id, 300)
    one.kill()
    one.start()
    job = json.loads(sent.content())
    assert job["status"] == "Failed" and "ended before" in job["error"]
