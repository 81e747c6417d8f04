"""Jobs outlive interruption, crashes, restarts, Reload UI, and the end of the webui or of tracking while they run."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx
import pytest

from harness import AUTH, MODE_FLAGS, MODES, QUICK, SHAPE, assert_tracks, body, new_client, until

MODE = pytest.mark.parametrize("mode", MODES)


def hold_and_queue(webui):
    """One that has ended, one that runs, one that waits; and the gate of the second."""
    done = webui.post(body(batch_size=2))
    job = webui.job(done.headers["X-Job-ID"], wait=30)
    until(webui.is_idle)
    gate = webui.gate()
    running = webui.send(body("runs", standin={"hold": gate}))
    webui.until_status(running.job_id(), "Processing")
    waiting = webui.send(body("waits", kind="img2img"), "img2img")
    waiting.job_id()
    return job, running, waiting, gate


def test_interrupt(every_webui):
    """The webui answers with what there is of the image, and so does the job."""
    webui = every_webui
    first = webui.post(body("interrupted", steps=20))
    whole = first.json()["images"]
    webui.job(first.headers["X-Job-ID"], wait=30)
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(webui.post, body("interrupted", steps=20, standin={"seconds": 60}))
        (job,) = until(lambda: webui.jobs(status="Processing", q="interrupted"))
        until(lambda: webui.job(job["id"], images=False)["progress"])
        assert webui.client.post("/sdapi/v1/interrupt").status_code in (200, 204)
        answer = answering.result()
    assert answer.status_code == 200
    assert answer.headers["X-Job-ID"] == job["id"]
    stored = webui.job(job["id"], wait=30)
    assert stored["status"] == "Completed"
    assert stored["images"] == answer.json()["images"]
    assert len(stored["images"]) == 1 and stored["images"] != whole
    assert stored["error"] is None


def test_interrupt_leaves_those_that_wait(webui):
    gate = webui.gate()
    running = webui.send(body(standin={"hold": gate})).job_id()
    webui.until_status(running, "Processing")
    waiting = webui.send(body(seed=5)).job_id()
    webui.client.post("/sdapi/v1/interrupt")
    assert webui.job(running, wait=30)["status"] == "Completed"
    assert webui.job(waiting, wait=30)["images"] == webui.post(body(seed=5)).json()["images"]


@MODE
def test_crash(start, mode):
    """What had ended is there, with its images; what had not is Failed and says so. Twice."""
    webui = start(*MODE_FLAGS[mode], *AUTH)
    done, running, waiting, _ = hold_and_queue(webui)
    webui.kill()
    assert running.to_end()[-5:] != b"0\r\n\r\n"
    before = webui.records()
    assert [before[sent.job_id()]["status"] for sent in (running, waiting)] == ["Processing", "Pending"]

    for _ in range(2):
        webui.restart()
        assert webui.job(done["id"]) == done
        for sent, started in ((running, True), (waiting, False)):
            job = until(lambda sent=sent: webui.job(sent.job_id()) if webui.is_idle() else None)
            assert job["status"] == "Failed"
            assert "ended" in job["error"]
            assert (job["started"] is not None) == started
            assert job["finished"] is None and job["images"] == [], "nobody knows when it was"
        assert {job["id"] for job in webui.jobs()} == set(webui.records()) == set(before)
    lines = [line for line in webui.our_log() if "Failed" in line]
    assert not lines, "the second start has nothing to say about them"
    assert_tracks(webui)
    assert not list(webui.data.glob("*.damaged*")) and not list(webui.data.glob("*.part"))


def test_crash_at_any_moment(start):
    """Killed again and again while jobs come and go: what was Completed keeps its images, and nothing is damaged."""
    webui = start(*QUICK)
    completed = {}
    for round_ in range(3):
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(webui.post, body(f"round {round_}", seed=seed)) for seed in range(40)]
            next(itertools.islice(as_completed(asking), 3 + 4 * round_, None))
            for job in webui.jobs(status="Completed"):
                completed[job["id"]] = webui.job(job["id"])["images"]
            webui.kill()
            for one in asking:
                one.exception()
        webui.start()
        until(webui.is_idle)
        assert not list(webui.data.glob("jobs.json.damaged*"))
        for job_id, images in completed.items():
            job = webui.job(job_id)
            assert (job["status"], job["images"]) == ("Completed", images)
        for record in webui.records().values():
            assert all((webui.data / "images" / name).is_file() for name in record["images"])
    assert len(completed) > 6


@MODE
def test_terminated_while_idle(start, mode):
    webui = start(*MODE_FLAGS[mode])
    answer = webui.post(body())
    job_id = answer.headers["X-Job-ID"]
    webui.job(job_id, wait=30)
    webui.client.close()
    webui.terminate(20)
    webui.start()
    assert webui.job(job_id)["images"] == answer.json()["images"]


@MODE
@pytest.mark.parametrize("number, stays", [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["TERM", "INT"])
def test_terminated_while_a_job_runs(start, mode, number, stays):
    """The API alone waits for all jobs, although clients have left. With the UI the webui dies at once."""
    webui = start(*MODE_FLAGS[mode])
    done, running, waiting, gate = hold_and_queue(webui)
    running.leave()
    if not stays:
        waiting.leave()
    webui.client.get("/standin/empty")
    webui.client.close()
    webui.process.send_signal(number)
    if mode == "nowebui" and SHAPE == "a1111":
        with pytest.raises(Exception, match="timed out"):
            webui.process.wait(1)
        gate.open()
        webui.process.wait(20)
        for sent in (running, waiting):
            record = webui.records()[sent.job_id()]
            assert record["status"] == "Completed"
            assert (webui.data / "images" / record["images"][0]).is_file()
        assert not stays or waiting.to_end().endswith(b"0\r\n\r\n"), "one whose client stays is answered"
    else:
        try:
            webui.process.wait(5)
        except Exception:
            gate.open()
            webui.process.wait(20)
    webui.kill()
    webui.start()
    until(webui.is_idle)
    assert webui.job(done["id"]) == done
    for sent in (running, waiting):
        job = webui.job(sent.job_id())
        assert (job["status"] == "Completed") == bool(job["images"])
        assert job["status"] == "Completed" or "ended" in job["error"]
    assert_tracks(webui)


def test_reload_while_a_job_runs_and_one_waits(start):
    """The running one is interrupted and keeps what there is; the waiting one runs on the old server to its end."""
    if SHAPE == "sdnext":
        pytest.skip("it restarts as a process")
    webui = start(*MODE_FLAGS["ui"])
    done, running, waiting, _ = hold_and_queue(webui)
    webui.reload_ui()
    for sent in (running, waiting):
        job = webui.job(sent.job_id(), wait=30)
        assert (job["status"], len(job["images"])) == ("Completed", 1)
        image = job["images"][0]
        received = sent.to_end()
        assert received.endswith(b"0\r\n\r\n")
        assert image.encode()[:1000] in received
    assert webui.job(done["id"]) == done
    assert {job["id"] for job in webui.jobs()} == {done["id"], running.job_id(), waiting.job_id()}
    assert_tracks(webui)
    assert "Traceback" not in webui.log
    assert len([line for line in webui.our_log() if "Ready" in line]) == 2


def test_reload_again_and_again(start):
    """Nothing of the lives before stays."""
    if SHAPE == "sdnext":
        pytest.skip("it restarts as a process")
    webui = start(*MODE_FLAGS["ui"])
    assert_tracks(webui)

    def held():
        state = webui.client.get("/standin/threads").json()
        return state["threads"], state["open_files"] or 0

    webui.reload_ui()
    assert_tracks(webui)
    threads, files = held()
    for _ in range(4):
        webui.reload_ui()
        assert_tracks(webui)
    until(lambda: held()[0] <= threads + 12, 20, "the threads of the lives before end")
    until(lambda: held()[1] <= files + 6, 20, "their files are closed")
    assert len(webui.records()) == 6
    until(
        lambda: len(list(webui.data.glob("jobs.json.owner-*"))) == 1, 20, "the last life before has let go of its lock"
    )


def test_switching_at_run_time(start):
    """config.json is looked at again and again: a job that began tracked ends tracked."""
    webui = start(*MODE_FLAGS[MODES[0]], tracking=None, constants={"LOOK_EVERY": 0.1})
    assert "X-Job-ID" not in webui.post(body()).headers
    config = webui.extension / "config.json"
    assert json.loads(config.read_text()) == {"enabled": False, "retention_days": 30}

    webui.write_config('{"enabled": true, "retention_days": 30}')
    until(lambda: "X-Job-ID" in webui.post(body()).headers, 20)
    gate = webui.gate()
    sent = webui.send(body(standin={"hold": gate}))
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    webui.write_config('{"enabled": false, "retention_days": 30}')
    untracked = until(lambda: without_a_head(webui), 20)
    gate.open()
    assert "x-job-id" not in untracked.head()[1]
    job = webui.job(job_id, wait=30)
    assert job["status"] == "Completed"
    assert base64.b64decode(job["images"][0])
    assert b'"images"' in sent.to_end()


def without_a_head(webui):
    """A request that is in the queue and has no head yet, if that is how it is now."""
    sent = webui.send(body())
    sent.socket.settimeout(2)
    try:
        sent.head()
    except socket.timeout:
        sent.socket.settimeout(30)
        return sent
    return None


# The webui stops, or is told to track no more, while jobs run and wait and some of their clients have left


QUIET = r"Ready|Tracking is (on|off) now|\d+ jobs? .* left behind"
OURS = re.compile(rf"^\[Job Tracker\] (?!{QUIET}).*|^.*job_tracker\.py.*", re.MULTILINE)
GRACEFUL = pytest.mark.skipif(SHAPE != "a1111", reason="this webui dies at once in every mode")


def busy(webui):
    """A running job, and two that wait; the client of the first of these has left."""
    gate = webui.gate()
    plain = {"Accept-Encoding": "identity"}
    sent = [webui.send(body(standin={"hold": gate}), headers=plain)]
    webui.until_status(sent[0].job_id(), "Processing")
    sent += [webui.send(body(seed=number), headers=plain) for number in (8, 9)]
    assert [webui.job(it.job_id())["status"] for it in sent[1:]] == ["Pending"] * 2
    sent[1].leave()
    return gate, sent


def wait_for_end(webui):
    webui.process.wait(30)
    webui.kill()
    assert not OURS.search(webui.log), webui.log


@GRACEFUL
def test_api_alone_finishes_what_it_has(start):
    """It takes no more requests, and all that it accepted are stored, and answered where there is somebody."""
    webui = start("--nowebui")
    gate, sent = busy(webui)
    webui.process.send_signal(signal.SIGTERM)
    until(lambda: "Shutting down" in webui.log)
    gate.open()
    answers = [json.loads(sent[number].content())["images"] for number in (0, 2)]
    wait_for_end(webui)
    webui.start()
    images = [webui.job(it.job_id())["images"] for it in sent]
    assert [images[0], images[2]] == answers
    assert len(images[1]) == 1


@GRACEFUL
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="uvicorn waits for the connections there, also by itself")
def test_second_signal_ends_it_at_once(start):
    """No answer is a clean one then, and the jobs say why."""
    webui = start("--nowebui")
    _, sent = busy(webui)
    webui.process.send_signal(signal.SIGTERM)
    until(lambda: "Shutting down" in webui.log)
    webui.process.send_signal(signal.SIGINT)
    for number in (0, 2):
        with pytest.raises(ConnectionError):
            sent[number].content()
    wait_for_end(webui)
    webui.start()
    for it in sent:
        job = webui.job(it.job_id(), wait=10)
        assert (job["status"], job["images"]) == ("Failed", [])
        assert job["error"] in ("The webui ended before the generation did", "The webui was stopped")


def test_tracking_switched_off_and_on(start):
    """Who was accepted as a job stays one, who was not does not become one."""

    def switch(enabled):
        before = len(webui.our_log())
        webui.write_config(json.dumps({"enabled": enabled, "retention_days": 30}))
        until(lambda: len(webui.our_log()) > before, what="it is noticed")

    webui = start(*MODE_FLAGS[MODES[-1]], constants={"LOOK_EVERY": 0.1})
    gate, sent = busy(webui)
    switch(False)
    untracked = webui.send(body(seed=7), headers={"Accept-Encoding": "identity"})
    assert webui.job(sent[0].job_id())["status"] == "Processing"
    switch(True)
    tracked = webui.send(body(seed=8))
    ids = [it.job_id() for it in (*sent, tracked)]
    assert webui.job(ids[-1])["status"] == "Pending"
    switch(False)
    gate.open()
    status, headers = untracked.head()
    assert status == 200 and "x-job-id" not in headers and "content-length" in headers
    assert len(json.loads(untracked.content())["images"]) == 1
    assert {webui.job(job_id, wait=30)["status"] for job_id in ids} == {"Completed"}
    assert set(webui.records()) == set(ids)
    assert "X-Job-ID" not in webui.post(body()).headers
    assert not OURS.search(webui.log), webui.log
    assert webui.client.get("/standin/threads").json()["total_tokens"] == 40


SLOW_LAYERS = """
import time
from starlette.applications import Starlette

add = Starlette.add_middleware

def add_slowly(*args, **kwargs):
    time.sleep(0.1)
    add(*args, **kwargs)

Starlette.add_middleware = add_slowly
"""


def test_asked_while_it_starts(start):
    """Clients that ask until the webui is back do not end its start, nor that after Reload UI: starlette adds no layer
    once a request had them built.
    """
    webui = start("--api", scripts={"slow-layers": SLOW_LAYERS}, wait=False)
    early, over = [], threading.Event()

    def ask():
        # Each time anew: a server that stops waits for a connection that it got meanwhile, for as long as that is used.
        closes = {"Connection": "close"}
        with new_client(webui.url) as client:
            while not over.wait(0.002):
                with contextlib.suppress(httpx.TransportError):
                    early.append(client.get("/sdapi/v1/jobs", headers=closes).status_code)

    for again in (webui.wait, webui.reload_ui):
        early.clear()
        over.clear()
        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask) for _ in range(2)]
            try:
                again()
                until(lambda: 200 in early)
            finally:
                over.set()
            assert all(it.exception() is None for it in asking)
        assert early.count(404) > 5, "it was asked before the API was there"
        assert_tracks(webui)
        assert not any("Cannot add middleware" in line for line in webui.log.splitlines())
