"""202 is a promise: a job that was answered so is generated, once, whatever becomes of the webui."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, List

import pytest

from harness import (
    ASYNC,
    AUTH,
    MODE_FLAGS,
    MODES,
    QUICK,
    SHAPE,
    UNKNOWN,
    Webui,
    as_bytes,
    body,
    connect,
    hold_the_queue,
    saved,
    submit,
    until,
)

MODE = pytest.mark.parametrize("mode", MODES)
LEFT_BEHIND = "The webui ended before the generation did"


def requests_of(webui: Webui) -> List[Path]:
    return [path for path in webui.images() if path.name.endswith(".request.json")]


def request_of(webui: Webui, job_id: str) -> Path:
    (path,) = [path for path in requests_of(webui) if path.name.startswith(job_id)]
    return path


def cancel(webui: Webui, job_id: str) -> None:
    assert webui.client.post(f"/sdapi/v1/job/{job_id}/cancel").status_code == 200


def retry(webui: Webui, job_id: str) -> Any:
    return webui.client.post(f"/sdapi/v1/job/{job_id}/retry")


def failed(webui: Webui, **fields: Any) -> str:
    """A Failed job whose request is good."""
    hold_the_queue(webui)
    job_id = submit(webui, **fields)
    cancel(webui, job_id)
    webui.gates[-1].open()
    return job_id


def restart(webui: Webui, how: str) -> None:
    if how == "kill":
        webui.restart()
    elif how == "sigterm":
        webui.terminate()
        webui.start()
    else:
        webui.reload_ui()


@pytest.mark.parametrize("how, mode", [("kill", "ui"), ("kill", "nowebui"), ("sigterm", "nowebui"), ("reload", "ui")])
def test_what_waits_goes_on_after_a_restart(start, how, mode):
    """In order of acceptance, each once. What was running is not tried again."""
    if mode not in MODES:
        pytest.skip("this webui has no such mode")
    is_abrupt = how == "kill" or (how == "sigterm" and SHAPE != "a1111")  # only A1111's API alone ends in good order
    webui = start(*MODE_FLAGS[mode], *AUTH)
    running = hold_the_queue(webui)
    gate = webui.gates[-1]
    waiting = [submit(webui, f"job {number}", save_images=True) for number in range(5)]
    connected = connect(webui, "connected")
    until(lambda: len(requests_of(webui)) == 7)
    for _ in range(2):
        if not is_abrupt:
            gate.open()
        restart(webui, how)
        gate.path.unlink(missing_ok=True)
    jobs = [webui.job(job_id, wait=30) for job_id in waiting]
    assert [job["status"] for job in jobs] == ["Completed"] * 5
    assert [job["started"] for job in jobs] == sorted(job["started"] for job in jobs)
    assert len(saved(webui)) == 5
    if is_abrupt:
        for job_id in (running, connected):
            job = webui.job(job_id)
            assert (job["status"], job["error"]) == ("Failed", LEFT_BEHIND)
    until(lambda: len(requests_of(webui)) == (2 if is_abrupt else 0), what="requests of Completed jobs are gone")


def test_any_number_of_restarts(start):
    webui = start(*QUICK)
    hold_the_queue(webui)
    waiting = [submit(webui, save_images=True) for _ in range(2)]
    for _ in range(3):
        webui.kill()
        webui.start()
        assert webui.job(waiting[1], images=False)["status"] in ("Pending", "Processing", "Completed")
    for job_id in waiting:
        job = webui.job(job_id, wait=30)
        assert job["status"] == "Completed" or job["error"] == LEFT_BEHIND


@pytest.mark.parametrize("resume, goes_on", [("async", [True, False]), ("ALL", [True, True]), ("off", [False, False])])
def test_the_variable(start, resume, goes_on):
    webui = start(*QUICK, environ={"TRACKER_RESUME": resume})
    hold_the_queue(webui)
    parked, connected = submit(webui), connect(webui)
    until(lambda: len(requests_of(webui)) == 3)
    webui.restart()
    for job_id, is_resumed in zip((parked, connected), goes_on):
        job = webui.job(job_id, wait=30)
        assert (job["status"], job["error"]) == (("Completed", None) if is_resumed else ("Failed", LEFT_BEHIND))


def test_a_promise_after_some_seconds(start):
    """`wait=N`: what waits then is promised, too."""
    webui = start(*QUICK)
    hold_the_queue(webui)
    answer = webui.post(body("late"), headers={"Prefer": "respond-async, wait=1"})
    assert (answer.status_code, answer.json()["status"]) == (202, "Pending")
    webui.restart()
    assert webui.job(answer.json()["id"], wait=30)["status"] == "Completed"


def test_a_repeat_is_promised_the_first_ones_job(start):
    webui = start(*QUICK)
    hold_the_queue(webui)
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first = webui.send(body("once"), headers=key).job_id()
    answer = webui.post(body("once"), headers={**key, **ASYNC})
    assert (answer.status_code, answer.json()["id"]) == (202, first)
    webui.restart()
    assert webui.job(first, wait=30)["status"] == "Completed"
    again = webui.post(body("once"), headers=key)
    assert again.headers["x-job-id"] == first and again.headers["idempotent-replayed"] == "true"


def test_a_key_of_a_parked_job(start):
    """One generation, though it is asked for before a restart, after it and at its end."""
    webui = start(*QUICK)
    hold_the_queue(webui)
    key = {"Idempotency-Key": str(uuid.uuid4())}
    request = body("once", save_images=True, standin={"seconds": 0.5})
    first = webui.post(request, headers={**key, **ASYNC}).json()["id"]
    assert webui.post(request, headers={**key, **ASYNC}).json()["id"] == first
    assert webui.post({**request, "seed": 1}, headers=key).status_code == 422
    webui.restart()
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: webui.post(request, headers=key), range(3)))
    assert {answer.headers["x-job-id"] for answer in answers} == {first}
    assert len({answer.content for answer in answers}) == 1
    assert len(saved(webui)) == 1


def asks_for_the_lock(webui: Webui, job_id: str) -> bool:
    """Whether a parked job stands before one that comes now."""
    later = connect(webui)
    position = webui.job(job_id)["queue_position"]
    cancel(webui, later)
    return position == 1


@pytest.mark.skipif(SHAPE != "a1111" or os.name == "nt", reason="this webui dies at once in every mode")
def test_none_begins_while_a_server_that_stops_waits_for_clients(start):
    """It might be killed while it generates that, and then the job would have failed. The next start generates it."""
    webui = start("--nowebui")
    hold_the_queue(webui)
    parked = submit(webui)
    until(lambda: asks_for_the_lock(webui, parked))
    last = webui.send(body(seed=9))
    assert webui.job(last.job_id())["queue_position"] == 2
    webui.process.send_signal(signal.SIGTERM)
    until(lambda: "Shutting down" in webui.log)
    webui.gates[-1].open()
    last.content()
    assert webui.process.wait(30) is not None
    assert webui.records()[parked]["status"] == "Pending"
    webui.restart()
    assert webui.job(parked, wait=30)["status"] == "Completed"


def test_positions(webui):
    """What is really ahead: those that ask for the lock, and for parked ones also the parked ones before."""
    hold_the_queue(webui)
    parked = [submit(webui) for _ in range(3)]
    until(lambda: asks_for_the_lock(webui, parked[0]))
    connected = [connect(webui) for _ in range(2)]
    time.sleep(0.1)
    positions = {job["id"]: job["queue_position"] for job in webui.jobs(status="Pending")}
    assert [positions[job_id] for job_id in parked] == [1, 4, 5]
    assert [positions[job_id] for job_id in connected] == [2, 3]
    webui.gates[-1].open()
    order = sorted([*parked, *connected], key=lambda job_id: webui.job(job_id, wait=30)["started"])
    assert order == [parked[0], *connected, *parked[1:]] or order[:2] == [parked[0], connected[0]]


def test_parked_and_connected_take_turns(webui):
    hold_the_queue(webui)
    parked = [submit(webui) for _ in range(4)]
    until(lambda: asks_for_the_lock(webui, parked[0]))
    connected = [connect(webui) for _ in range(4)]
    webui.gates[-1].open()
    started = {job_id: webui.job(job_id, wait=30)["started"] for job_id in (*parked, *connected)}
    assert [*parked] == sorted(parked, key=started.get)
    if SHAPE == "sdnext":  # whose lock goes to anybody who waits for it
        connected.sort(key=started.get)
    else:
        assert [*connected] == sorted(connected, key=started.get)
    assert started[parked[0]] < started[connected[1]] and started[connected[0]] < started[parked[2]]


def test_a_parked_job_is_cancelled(webui):
    hold_the_queue(webui)
    first, second = submit(webui), submit(webui, save_images=True)
    before = saved(webui)
    waiting = webui.send_get(f"/sdapi/v1/job/{second}?wait=60")
    for job_id in (first, second):
        cancel(webui, job_id)
        job = webui.job(job_id)
        assert (job["status"], job["error"], job["started"]) == ("Failed", "Cancelled", None)
        assert job["finished"] >= job["timestamp"]
    assert json.loads(waiting.content())["error"] == "Cancelled"
    webui.gates[-1].open()
    assert webui.job(submit(webui), wait=30)["status"] == "Completed"
    assert saved(webui) == before


def test_the_request_is_kept(guarded):
    """As it came, without credentials, until the job is Completed."""
    webui = guarded
    hold_the_queue(webui)
    before = set(requests_of(webui))
    request = json.dumps(body(f"of {uuid.uuid4()}"), indent=3).encode()
    with_type = {"Content-Type": "application/json"}
    parked = webui.client.post("/sdapi/v1/txt2img", content=request, headers={**with_type, **ASYNC}).json()["id"]
    connected = webui.send(request).job_id()
    until(lambda: len(set(requests_of(webui)) - before) == 2)
    for path in set(requests_of(webui)) - before:
        assert path.name[:8] in (parked, connected) and path.read_bytes() == request
    assert all(webui.records()[job_id]["bytes"] == len(request) for job_id in (parked, connected))
    webui.gates[-1].open()
    for job_id in (parked, connected):
        assert webui.job(job_id, wait=30)["status"] == "Completed"
    until(lambda: not set(requests_of(webui)) - before, what="they are gone")


def test_retry(webui):
    job_id = failed(webui, prompt="once more")
    answer = retry(webui, job_id)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/sdapi/v1/job/{job['id']}" and answer.headers["x-job-id"] == job["id"]
    assert job["id"] != job_id and job["retry_of"] == job_id and job["prompt"] == "once more" and "images" not in job
    done = webui.job(job["id"], wait=30)
    assert done["status"] == "Completed" and done["retry_of"] == job_id
    assert webui.job(job_id)["status"] == "Failed" and webui.job(job_id)["retry_of"] is None
    assert retry(webui, job["id"]).status_code == 409
    assert webui.job(retry(webui, job_id).json()["id"], wait=30)["images"] == done["images"]


@pytest.mark.parametrize("how", ["a failure", "a crash"])
def test_retry_after(start, how):
    webui = start(*QUICK)
    if how == "a failure":
        job_id = submit(webui, standin={"fail": "OutOfMemoryError"})
        job = webui.job(job_id, wait=30)
    else:
        job_id = hold_the_queue(webui)
        until(lambda: requests_of(webui), what="its request is kept, which is a little later")
        webui.restart()
        job = webui.job(job_id)
    assert job["status"] == "Failed"
    again = retry(webui, job_id).json()["id"]
    for gate in webui.gates:
        gate.open()
    expected = "Failed" if how == "a failure" else "Completed"
    assert webui.job(again, wait=30)["status"] == expected


def test_retry_of_what_is_not_kept(webui):
    assert retry(webui, "AAAAAAAA").status_code == 404
    job_id = failed(webui)
    request_of(webui, job_id).unlink()
    answer = retry(webui, job_id)
    assert (answer.status_code, answer.json()["detail"]) == (410, "The request of this job is no longer kept")
    waiting = submit(webui, standin={"hold": webui.gate()})
    assert retry(webui, waiting).status_code == 409


def test_a_request_that_is_gone(start):
    webui = start(*QUICK)
    hold_the_queue(webui)
    lost, kept = submit(webui), submit(webui)
    webui.kill()
    request_of(webui, lost).unlink()
    webui.start()
    assert webui.job(kept, wait=30)["status"] == "Completed"
    job = webui.job(lost)
    assert job["status"] == "Failed" and "no longer" in job["error"]


@pytest.mark.parametrize("content", [b"{", b'{"prompt": {"a": 1}}', as_bytes(UNKNOWN), b""])
def test_a_body_that_is_no_longer_accepted(start, content):
    """As after an update: it ends with the webui's words, and holds up none behind it."""
    webui = start(*QUICK)
    hold_the_queue(webui)
    refused, behind = submit(webui), submit(webui)
    webui.kill()
    request_of(webui, refused).write_bytes(content)
    webui.start()
    assert webui.job(behind, wait=30)["status"] == "Completed"
    job = webui.job(refused, wait=30)
    assert job["status"] == "Failed" and job["error"] and job["started"] is None


def test_as_many_as_may_wait(start):
    webui = start(*QUICK, environ={"TRACKER_MAX_PENDING": "3"})
    hold_the_queue(webui)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: webui.post(body(), headers=ASYNC), range(10)))
    assert sorted(answer.status_code for answer in answers) == [202] * 3 + [429] * 7
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) > 0 and "x-job-id" not in refused.headers
    assert webui.send(body()).head()[0] == 429
    accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
    assert len(webui.records()) == 4 and len(requests_of(webui)) == 4
    cancel(webui, accepted[0])
    assert retry(webui, accepted[0]).status_code == 202
    assert retry(webui, accepted[0]).status_code == 429
    webui.gates[-1].open()
    for job_id in accepted[1:]:
        assert webui.job(job_id, wait=30)["status"] == "Completed"


def test_two_webuis_share_them(start, tmp_path):
    """Whoever is free takes the oldest, and each is generated once."""
    environ = {"TRACKER_DATA_DIR": str(tmp_path)}
    webuis = [start(*QUICK, environ=environ) for _ in range(2)]
    for webui in webuis:
        hold_the_queue(webui)
    jobs = [submit(webuis[number % 2], save_images=True, standin={"seconds": 0.2}) for number in range(12)]
    webuis[1].gates[-1].open()
    assert webuis[0].job(jobs[3], wait=30)["status"] == "Completed"  # by the other one, for this one is busy
    webuis[0].gates[-1].open()
    done = [webuis[number % 2].job(job_id, wait=30) for number, job_id in enumerate(jobs)]
    assert [job["status"] for job in done] == ["Completed"] * 12
    images = [len(saved(webui)) for webui in webuis]
    assert sum(images) == 12 and min(images) > 0


def test_the_other_webui_takes_them_over(start, tmp_path):
    environ = {"TRACKER_DATA_DIR": str(tmp_path)}
    one, two = (start(*QUICK, environ=environ) for _ in range(2))
    hold_the_queue(two)
    hold_the_queue(one)
    jobs = [submit(one, save_images=True) for _ in range(4)]
    one.kill()
    two.gates[-1].open()
    assert [two.job(job_id, wait=30)["status"] for job_id in jobs] == ["Completed"] * 4
    assert len(saved(two)) == 4
