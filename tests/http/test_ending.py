"""The webui stops, or is told to track no more, while jobs run and wait and some of their clients have left."""

from __future__ import annotations

import json
import re
import signal
import sys
import time

import pytest

from harness import MODE_FLAGS, MODES, SHAPE, body, until

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
        (webui.extension / "config.json").write_text(json.dumps({"enabled": enabled, "retention_days": 30}))
        time.sleep(0.7)

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
