"""POST /sdapi/v1/jobs/cancel and DELETE /sdapi/v1/jobs, in a webui that generates meanwhile."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from harness import MODES, QUICK, Start, Webui, body, hold_the_queue, is_cut, submit, until

pytestmark = pytest.mark.one_mode


@pytest.fixture
def own(start: Start) -> Webui:
    return start(*QUICK)


def cancel(webui: Webui, **filters: Any) -> httpx.Response:
    return webui.client.post("/sdapi/v1/jobs/cancel", json=filters)


def delete(webui: Webui, **filters: Any) -> httpx.Response:
    return webui.client.delete("/sdapi/v1/jobs", params=filters)


def test_cancel_all_that_wait(own):
    """What runs goes on, and their clients are told at once."""
    running = hold_the_queue(own)
    clients = [own.send(body()) for _ in range(3)]
    waiting = [client.job_id() for client in clients] + [submit(own) for _ in range(3)]
    answer = cancel(own, status="pending")
    assert (answer.status_code, answer.json()) == (200, {"jobs": 6})
    assert own.jobs(status="Pending") == []
    assert all(map(is_cut, clients))
    assert {(job["status"], job["error"]) for job in map(own.job, waiting)} == {("Failed", "Cancelled")}
    assert cancel(own, status="pending").json() == {"jobs": 0}
    last = submit(own)
    own.gates[-1].open()
    assert [own.job(job_id, wait=30)["status"] for job_id in (running, last)] == ["Completed"] * 2
    assert not [line for line in own.our_log() if "Traceback" in line]


def test_cancel_those_of_a_prompt(own):
    """What runs is among them, and nothing of it generates any more; the rest goes on."""
    prompt = f"of {uuid.uuid4()}"
    gate = own.gate()
    running = submit(own, prompt, standin={"hold": gate})
    own.until_status(running, "Processing")
    jobs = [submit(own, prompt if number % 2 else "another") for number in range(6)]
    assert cancel(own, q=prompt.upper()).json() == {"jobs": 4}
    ended = [own.job(job_id, wait=30) for job_id in (running, *jobs)]
    assert [job["error"] for job in ended] == ["Cancelled"] + [None, "Cancelled"] * 3
    assert [job["status"] for job in ended[1::2]] == ["Completed"] * 3


def test_delete_those_that_have_ended(own):
    done = [own.post(body("a cat")).headers["x-job-id"] for _ in range(3)]
    failed = submit(own, "a cat", standin={"fail": "RuntimeError", "fail_after": 1})
    assert own.job(failed, wait=30)["status"] == "Failed"
    other = own.post(body("a dog")).headers["x-job-id"]
    running = hold_the_queue(own)
    waiting = submit(own, "a cat")
    assert delete(own, q="a cat", status="completed").json() == {"jobs": 3}, "also the one that ended just now"
    assert {job["id"] for job in own.jobs()} == {failed, other, running, waiting}
    # What has not ended, and what has failed, has its request there.
    until(lambda: {path.name[:8] for path in own.images()} == {failed, other, running, waiting}, what="files are gone")
    assert delete(own, q="a cat").json() == {"jobs": 1}
    assert {job["id"] for job in own.jobs()} == {other, running, waiting}
    assert own.client.get(f"/sdapi/v1/job/{done[0]}").status_code == 404
    own.gates[-1].open()
    assert own.job(waiting, wait=30)["status"] == "Completed"
    assert delete(own, after=0).json()["jobs"] == 3 and own.jobs() == []
    until(lambda: own.images() == [], what="requests are gone, too")
    lines = [line for line in own.our_log() if "Removed, as a client asked for: 3 jobs, 3 images" in line]
    assert len(lines) == 2, "each with its bytes"


def test_right_after_the_answer(own):
    """A client that has its answer can delete its job, which may be still on its way to the disk."""
    for number in range(5):
        own.post(body(f"number {number}"))
        assert delete(own, q=f"number {number}").json() == {"jobs": 1}


def test_without_a_filter(own):
    submit(own)
    until(own.is_idle)
    for answer in (delete(own), cancel(own), own.client.post("/sdapi/v1/jobs/cancel"), delete(own, limit=1000)):
        assert answer.status_code == 422 and answer.json()["detail"]
    assert len(own.jobs()) == 1


def test_while_tracking_is_off(start):
    webui = start(*QUICK)
    submit(webui)
    until(webui.is_idle)
    webui.write_config('{"enabled": false}')
    webui.restart()
    assert cancel(webui, after=0).json() == {"jobs": 0} and delete(webui, after=0).json() == {"jobs": 1}


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}], ids=str)
def test_a_page_of_another_origin(webui, headers):
    hold_the_queue(webui)
    job_id = submit(webui)
    before = webui.records()
    answers = [
        webui.client.post("/sdapi/v1/jobs/cancel", json={"after": 0}, headers=headers),
        webui.client.post("/sdapi/v1/jobs/cancel", content=b'{"after": 0}', headers=headers),
        webui.client.delete("/sdapi/v1/jobs?after=0", headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert all("another origin" in answer.json()["detail"] for answer in answers)
    assert webui.records() == before and webui.job(job_id)["status"] == "Pending"


def test_needs_credentials(pool):
    webui = pool.get("tracked", MODES[-1], auth=True)
    prompt = f"of {uuid.uuid4()}"
    hold_the_queue(webui)
    job_id = submit(webui, prompt)
    for auth in (("user", "wrong"), None):
        with httpx.Client(base_url=webui.url, auth=auth, trust_env=False) as client:
            for content in (b'{"after": 0}', b"{", b""):
                assert client.post("/sdapi/v1/jobs/cancel", content=content).status_code == 401
            for query in ("after=0", "after=x", "nobody=1", ""):
                assert client.delete(f"/sdapi/v1/jobs?{query}").status_code == 401
    assert webui.job(job_id)["status"] == "Pending"
    assert cancel(webui, q=prompt).json() == {"jobs": 1}
    assert delete(webui, q=prompt).json() == {"jobs": 1}


def test_many_at_once(own):
    """Each job is cancelled, and counted, once, whoever asks."""
    hold_the_queue(own)
    for number in range(60):
        submit(own, f"a {('cat', 'dog', 'fox')[number % 3]}")
    with ThreadPoolExecutor(9) as executor:
        words = ["cat", "dog", "fox"] * 3
        cancelled = list(executor.map(lambda word: cancel(own, q=word, status="Pending").json()["jobs"], words))
        assert own.jobs(status="Pending") == []
        deleted = list(executor.map(lambda word: delete(own, q=word).json()["jobs"], words))
    assert sum(deleted) == 60 and sum(cancelled) >= 60
    assert len(own.jobs()) == 1
