"""POST /sdapi/v1/job/{id}/cancel ends one job, whether it waits or runs, and never another generation."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List

import httpx
import pytest
from neighbours import HOLDS, HURRY, UI, FromUi, held_at, reached

from harness import (
    ASYNC,
    MODES,
    QUICK,
    Sent,
    Start,
    Webui,
    assert_cancelled,
    body,
    connect,
    hold_the_queue,
    is_cut,
    new_client,
    saved,
    submit,
    until,
)

pytestmark = pytest.mark.one_mode


@pytest.fixture(scope="module")
def crowded(start_shared: Start) -> Webui:
    """A webui whose UI generates as well."""
    return start_shared(*QUICK, scripts={"ui": UI, "holds": HOLDS, "hurry": HURRY})


def cancel(webui: Webui, job_id: str) -> httpx.Response:
    return webui.client.post(f"/sdapi/v1/job/{job_id}/cancel")


def test_a_job_that_waits(webui):
    running = hold_the_queue(webui)
    gate = webui.gates[-1]
    prompt = f"of {uuid.uuid4()}"
    before, log = saved(webui), webui.log
    client = webui.send(body(prompt, save_images=True))
    job_id = client.job_id()
    behind = webui.send(body(prompt, save_images=True))
    behind_id = behind.job_id()

    answer = cancel(webui, job_id)
    assert answer.status_code == 200
    job = answer.json()
    assert job["id"] == job_id and job["prompt"] == prompt
    assert job["status"] == "Failed" and job["error"] == "Cancelled"
    assert job["started"] is None and job["finished"] >= job["timestamp"]
    assert job["queue_position"] is None and "images" not in job
    assert is_cut(client)  # it is told at once, while the other still runs
    assert webui.job(running)["status"] == "Processing"
    assert webui.job(behind_id)["queue_position"] == 1
    until(lambda: webui.records()[job_id]["error"] == "Cancelled", what="it is on disk")

    gate.open()
    assert not is_cut(behind)
    assert webui.job(running, wait=30)["status"] == "Completed"
    assert webui.job(behind_id, wait=30)["status"] == "Completed"
    assert webui.job(job_id)["started"] is None
    assert len(saved(webui)) == len(before) + 1, "it was generated all the same"
    assert "API error" not in webui.log[len(log) :], "the webui takes it for no failure"


def test_all_jobs_of_a_queue(webui):
    """Nothing of them is left: no thread, and no turn in the queue."""
    running = hold_the_queue(webui)
    tokens = webui.client.get("/standin/threads").json()["total_tokens"]
    queue = [submit(webui) for _ in range(15)]
    assert webui.client.get("/standin/threads").json()["total_tokens"] == tokens  # parked ones hold none
    queue += [connect(webui) for _ in range(15)]
    assert [cancel(webui, job_id).status_code for job_id in queue] == [200] * 30
    assert webui.jobs(status="Pending") == []
    until(lambda: webui.client.get("/standin/threads").json()["pending_tasks"] <= 1, what="none of them waits")
    last = submit(webui)
    assert webui.job(last)["queue_position"] == 1
    webui.gates[-1].open()
    for job_id in (running, last):
        assert webui.job(job_id, wait=30)["status"] == "Completed"
    until(lambda: webui.client.get("/standin/threads").json()["total_tokens"] == tokens - 1, what="threads are back")


@pytest.mark.parametrize("fields", [{}, {"n_iter": 3}, {"batch_size": 2}], ids=str)
def test_a_job_that_runs(webui, fields):
    full = webui.post(body()).json()["images"]
    gate = webui.gate()
    client = webui.send(body(standin={"hold": gate}, **fields))
    job_id = client.job_id()
    webui.until_status(job_id, "Processing")
    behind = submit(webui)
    answer = cancel(webui, job_id)
    assert answer.status_code == 200 and answer.json()["status"] in ("Processing", "Failed")
    job = webui.job(job_id, wait=30)
    assert job["status"] == "Failed" and job["error"] == "Cancelled" and job["images"] == []
    assert job["started"] is not None and job["finished"] >= job["started"]
    assert is_cut(client)
    assert webui.job(behind, wait=30)["images"] == full  # the mark of the interruption is gone


def test_twice(webui):
    hold_the_queue(webui)
    waiting = submit(webui)
    assert [cancel(webui, waiting).status_code for _ in range(3)] == [200, 409, 409]
    running = webui.jobs(status="Processing")[0]["id"]
    with ThreadPoolExecutor(4) as executor:
        statuses = list(executor.map(lambda _: cancel(webui, running).status_code, range(4)))
    assert set(statuses) <= {200, 409} and 200 in statuses
    assert webui.job(running, wait=30)["error"] == "Cancelled"
    assert cancel(webui, running).status_code == 409


@pytest.mark.parametrize("status", ["Completed", "Failed"])
def test_a_job_that_has_ended(webui, status):
    gate = webui.gate()
    job_id = submit(webui, standin={"hold": gate, **({"fail": "RuntimeError"} if status == "Failed" else {})})
    gate.open()
    before = webui.job(job_id, wait=30)
    assert before["status"] == status
    answer = cancel(webui, job_id)
    assert answer.status_code == 409 and status in answer.json()["detail"]
    assert webui.job(job_id) == before


@pytest.mark.parametrize("job_id", ["AAAAAAAA", "short", "much-too-long", "%00", "äöüßäöüß", ".."])
def test_unknown(webui, job_id):
    answer = cancel(webui, job_id)
    assert answer.status_code == 404 and answer.json()["detail"]


def test_case_of_the_id_counts(webui):
    hold_the_queue(webui)
    job_id = submit(webui)
    assert cancel(webui, job_id.swapcase()).status_code == (404 if job_id.swapcase() != job_id else 200)
    assert webui.job(job_id)["status"] == "Pending" or job_id.swapcase() == job_id


def test_needs_credentials(pool):
    webui = pool.get("tracked", MODES[-1], auth=True)
    hold_the_queue(webui)
    job_id = submit(webui)
    for auth in (("user", "wrong"), None):
        with new_client(webui.url, auth=auth) as client:
            assert client.post(f"/sdapi/v1/job/{job_id}/cancel").status_code == 401
    assert webui.job(job_id)["status"] == "Pending"
    assert cancel(webui, job_id).json()["status"] == "Failed"


def test_a_prompt_that_is_no_text(webui):
    """JSON can say what UTF-8 cannot."""
    hold_the_queue(webui)
    data = webui.raw(body("PROMPT"), headers=ASYNC).replace(b"PROMPT", b"\\ud800")
    job_id = Sent(webui.port, data).head()[1]["x-job-id"]
    answer = cancel(webui, job_id)
    assert answer.status_code == 200 and answer.json()["status"] == "Failed"


def test_a_job_of_another_process(pair):
    one, two = pair
    running, own = map(hold_the_queue, pair)
    waiting, connected = submit(one), connect(one)
    answer = cancel(two, waiting)  # which is nobody's yet
    assert (answer.status_code, answer.json()["status"]) == (200, "Failed")
    for job_id in (connected, running):  # this one last, behind which the others wait
        assert_cancelled(cancel(two, job_id))
    for job_id in (running, waiting, connected):
        job = two.job(job_id, wait=30)
        assert job["status"] == "Failed" and job["error"] == "Cancelled"
    for webui in (one, two):
        webui.gates[-1].open()
    assert one.job(own, wait=30)["status"] == "Completed"


def test_a_job_that_ends_before_the_other_webui_notices(start, tmp_path):
    """Who asked for it is not told that it is cancelled."""
    environ = {"TRACKER_DATA_DIR": str(tmp_path)}
    one = start(*QUICK, environ=environ, constants={"FOLLOW_EVERY": 60})
    running = hold_the_queue(one)
    two = start(*QUICK, environ=environ)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cancel, two, running)
        until(lambda: one.records()[running]["cancel_wanted"])
        one.gates[-1].open()
        assert (answer.result().status_code, answer.result().json()["detail"]) == (409, "The job is Completed")


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_job_of_a_webui_that_does_not_notice(start, tmp_path):
    """Who asked for it is told so, and it is cancelled once that webui wakes."""
    environ = {"TRACKER_DATA_DIR": str(tmp_path)}
    one, two = (start(*QUICK, environ=environ) for _ in range(2))
    running = hold_the_queue(one)
    os.kill(one.pid, signal.SIGSTOP)
    try:
        answer = cancel(two, running)
    finally:
        os.kill(one.pid, signal.SIGCONT)
    assert (answer.status_code, answer.json()["status"]) == (202, "Processing")
    job = two.job(running, wait=30)
    assert (job["status"], job["error"]) == ("Failed", "Cancelled")


def test_the_generation_of_the_ui_is_never_interrupted(crowded):
    full = FromUi(crowded).result()
    gate = crowded.gate()

    # A job waits behind it.
    from_ui = FromUi(crowded, gate)
    from_ui.until_it_runs()
    assert cancel(crowded, submit(crowded)).json()["status"] == "Failed"

    # A job was before it, has given the lock back, and is not answered yet.
    gate.open()
    assert from_ui.result() == full
    held, gate = crowded.gate(), crowded.gate()
    job_id = submit(crowded, **held_at("encode", held))
    until(lambda: reached(held), what="its images are encoded")
    from_ui = FromUi(crowded, gate)
    from_ui.until_it_runs()
    assert cancel(crowded, job_id).status_code == 200
    time.sleep(0.5)  # longer than between two interruptions
    held.open()
    assert crowded.job(job_id, wait=30)["error"] == "Cancelled"
    gate.open()
    assert from_ui.result() == full

    # A job runs before it, and is interrupted.
    job_id = submit(crowded, standin={"hold": crowded.gate()})
    crowded.until_status(job_id, "Processing")
    from_ui = FromUi(crowded)
    assert cancel(crowded, job_id).status_code == 200
    assert from_ui.result() == full
    assert crowded.job(job_id, wait=30)["error"] == "Cancelled"


def test_a_job_that_has_the_lock_but_has_not_begun(crowded):
    """The webui takes back an interruption when it begins to generate: it needs another one."""
    held = crowded.gate()
    job_id = submit(crowded, **held_at("prepare", held), standin={"hold": crowded.gate()})
    until(lambda: reached(held), what="it has the lock")
    assert cancel(crowded, job_id).status_code == 200
    assert crowded.job(job_id)["status"] == "Processing"
    held.open()
    assert crowded.job(job_id, wait=30)["error"] == "Cancelled"


def test_no_other_job_is_hit(crowded):
    """Many short jobs are cancelled at any moment, also in that in which they end."""
    full = crowded.post(body()).json()["images"]
    from_ui = FromUi(crowded).result()
    chance = random.Random(7)
    stop = threading.Event()
    answers: Dict[str, List[int]] = {}
    pixels: List[str] = []

    def spared(job: Dict[str, Any]) -> bool:
        return ord(job["id"][-1]) % 2 == 0

    def cancel_some(status: str) -> None:
        with new_client(crowded.url) as client:
            while not stop.is_set():
                jobs = client.get("/sdapi/v1/jobs", params={"status": status, "limit": 100}).json()
                jobs = [job for job in jobs if not spared(job)]
                if not jobs:
                    continue
                job_id = chance.choice(jobs)["id"]
                time.sleep(chance.random() * 0.01)
                answer = client.post(f"/sdapi/v1/job/{job_id}/cancel")
                answers.setdefault(job_id, []).append(answer.status_code)
                if status == "Pending":
                    time.sleep(0.03)

    def generate_in_ui() -> None:
        while not stop.is_set():
            pixels.append(FromUi(crowded).result())

    threads = [threading.Thread(target=cancel_some, args=(status,)) for status in ("Processing", "Pending")]
    threads.append(threading.Thread(target=generate_in_ui))
    for thread in threads:
        thread.start()
    try:
        with ThreadPoolExecutor(8) as executor:  # so that there is always a queue
            jobs = list(executor.map(lambda _: submit(crowded, standin={"seconds": 0.04}), range(120)))
        ended = [crowded.job(job_id, wait=60) for job_id in jobs]
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    for job in ended:
        statuses = answers.get(job["id"], [])
        assert set(statuses) <= {200, 409}
        if 200 in statuses:
            assert (job["status"], job["error"], job["images"]) == ("Failed", "Cancelled", [])
        else:
            assert job["status"] == "Completed" and job["images"] == full, job["error"]
    assert pixels and set(pixels) == {from_ui}
    cancelled = [job for job in ended if job["error"] == "Cancelled"]
    assert cancelled  # which of them waited and which ran is chance; each has a test of its own
    assert not [job for job in cancelled if spared(job)]
    assert not [line for line in crowded.our_log() if "Traceback" in line or "failed in" in line]
