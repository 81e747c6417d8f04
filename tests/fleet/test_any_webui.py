"""A client may ask any webui of a fleet, and is answered as by the one that has the job."""

from __future__ import annotations

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List
from urllib.parse import urlsplit

import pytest

from harness import ASYNC, Webui, assert_cancelled, body, connect, done, hold_the_queue, saved, submit, until

NAMES = ["webui-0", "webui-1", "webui-2"]


def brief(job: Dict[str, Any]) -> Dict[str, Any]:
    """A job without what each answer signs anew."""
    return {name: value for name, value in job.items() if name != "image_urls"}


def labelled(webui: Webui, label: str, *prompt: str, **fields: Any) -> str:
    answer = webui.post(body(*prompt, **fields), headers={**ASYNC, "X-Job-Label": label})
    assert answer.status_code == 202, answer.text
    return answer.headers["x-job-id"]


def test_a_job_and_its_images(fleet):
    sent = fleet[0].post(body("a fleet at sea", batch_size=2))
    job_id, images = sent.headers["x-job-id"], sent.json()["images"]
    jobs = [webui.job(job_id, wait=30) for webui in fleet]
    assert [job["images"] for job in jobs] == [images] * 3 and jobs[0]["server"] == "webui-0"
    assert brief(jobs[0]) == brief(jobs[1]) == brief(jobs[2])
    assert (jobs[1]["parameters"], jobs[1]["info"]) == (sent.json()["parameters"], sent.json()["info"])
    for webui in fleet:
        path = f"/sdapi/v1/job/{job_id}/images/1"
        image = webui.client.get(path)
        assert image.content == base64.b64decode(images[1]) and image.headers["content-type"] == "image/png"
        again = webui.client.get(path, headers={"If-None-Match": image.headers["etag"]})
        assert again.status_code == 304


def test_lists_and_their_pages(fleet):
    ids = [labelled(fleet[number % 3], "of the list", f"list {number}") for number in range(10)]
    for job_id in ids:
        assert fleet[0].job(job_id, wait=30, images=False)["status"] == "Completed"
    # Those of one second are in the order in which the database took them.
    listed = [job["id"] for job in fleet[0].jobs(label="of the list")]
    assert sorted(listed) == sorted(ids)
    for webui in fleet:
        assert [job["id"] for job in webui.jobs(label="of the list", status="completed")] == listed
        assert [job["id"] for job in webui.jobs(q="LIST 7", label="of the list")] == [ids[7]]
    pages: List[str] = []
    path = "/sdapi/v1/jobs?label=of+the+list&limit=3"
    for webui in [*fleet, fleet[0]]:  # each page from another one
        answer = webui.client.get(path)
        pages += [job["id"] for job in answer.json()]
        if "next" in answer.links:
            path = "/sdapi/v1/jobs?" + urlsplit(answer.links["next"]["url"]).query
    assert pages == listed and "next" not in answer.links


def test_waiting_for_a_job_of_another(fleet):
    job_id = hold_the_queue(fleet[0])
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(webui.job, job_id, wait=60) for webui in fleet[1:]]
        assert fleet[1].job(job_id, wait=0.2)["status"] == "Processing"
        fleet[0].gates[-1].open()
        assert [one.result(30)["status"] for one in waiting] == ["Completed"] * 2


def test_events_of_a_job_of_another(fleet):
    job_id = hold_the_queue(fleet[1])
    with fleet[2].client.stream("GET", f"/sdapi/v1/job/{job_id}/events", timeout=30) as events:
        lines = events.iter_lines()
        seen = [next(lines)]
        fleet[1].gates[-1].open()
        seen += lines
    text = "\n".join(seen)
    assert text.index("Processing") < text.index("Completed"), text


def test_cancelling_a_job_of_another(fleet):
    running = hold_the_queue(fleet[0])
    waiting = fleet[0].send(body("waits"))
    waits = waiting.job_id()
    for webui in fleet[1:]:
        hold_the_queue(webui)
    parked = submit(fleet[0])  # for whom nobody is free
    answer = fleet[2].client.post(f"/sdapi/v1/job/{parked}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "Failed")
    for job_id, webui in ((waits, fleet[1]), (running, fleet[2])):
        assert_cancelled(webui.client.post(f"/sdapi/v1/job/{job_id}/cancel"))
    for job_id in (running, waits, parked):
        job = until(lambda job_id=job_id: ended(fleet[1], job_id), what=f"the end of {job_id}")
        assert (job["status"], job["error"]) == ("Failed", "Cancelled")
        assert fleet[1].client.post(f"/sdapi/v1/job/{job_id}/cancel").status_code == 409
    for webui in fleet:
        for gate in webui.gates:
            gate.open()


def ended(webui: Webui, job_id: str) -> Any:
    job = webui.job(job_id, images=False)
    return job if job["status"] in ("Completed", "Failed") else None


def until_not_503(ask: Callable[[], Any]) -> Any:
    def answered() -> Any:
        answer = ask()
        return None if answer.status_code == 503 else [answer]

    return until(answered)[0]


def test_deleting_and_trying_again(fleet):
    hold_the_queue(fleet[0])
    failed = connect(fleet[0])
    assert fleet[1].client.delete(f"/sdapi/v1/job/{failed}").status_code == 409
    assert_cancelled(fleet[1].client.post(f"/sdapi/v1/job/{failed}/cancel"))
    until(lambda: ended(fleet[2], failed))
    fleet[0].gates[-1].open()
    retry = f"/sdapi/v1/job/{failed}/retry"
    answer = until_not_503(lambda: fleet[2].client.post(retry))  # until its request is in the bucket
    assert answer.status_code == 202 and answer.json()["retry_of"] == failed
    again = answer.json()["id"]
    assert fleet[1].job(again, wait=30)["status"] == "Completed"
    assert fleet[1].client.delete(f"/sdapi/v1/job/{again}").status_code == 204
    for webui in fleet:
        for path in (f"/sdapi/v1/job/{again}", f"/sdapi/v1/job/{again}/images/0"):
            assert webui.client.get(path).status_code == 404


def test_many_at_once(fleet):
    gates = [hold_the_queue(webui) and webui.gates[-1] for webui in fleet]
    waiting = {labelled(webui, "of the many") for webui in fleet for _ in range(3)}
    other = labelled(fleet[0], "of another kind")
    answer = fleet[1].client.post("/sdapi/v1/jobs/cancel", json={"label": "of the many"})
    assert answer.json() == {"jobs": 9}
    until(lambda: {job["id"] for job in fleet[2].jobs(label="of the many", status="failed")} == waiting)
    assert fleet[2].client.delete("/sdapi/v1/jobs", params={"label": "of the many"}).json() == {"jobs": 9}
    assert [webui.jobs(label="of the many") for webui in fleet] == [[]] * 3
    for gate in gates:
        gate.open()
    assert fleet[1].job(other, wait=30)["status"] == "Completed"


def test_figures(fleet):
    done(fleet[0])
    until(lambda: not fleet[0].jobs(status="pending") and not fleet[0].jobs(status="processing"))
    stats = [webui.client.get("/sdapi/v1/jobs/stats").json() for webui in fleet]
    assert stats[0] == stats[1] == stats[2]
    assert stats[0]["servers"] == NAMES
    assert stats[0]["jobs"]["Completed"] == len(fleet[1].jobs(status="completed", limit=1000))


def test_what_is_parked_goes_to_whoever_is_free(fleet):
    """Each once, the oldest first."""
    kept = [len(saved(webui)) for webui in fleet]
    ids = [submit(fleet[0], f"job {number}", {"seconds": 0.1}, save_images=True) for number in range(30)]
    jobs = [fleet[1].job(job_id, wait=60, images=False) for job_id in ids]
    assert {job["status"] for job in jobs} == {"Completed"}
    assert sorted({job["server"] for job in jobs}) == NAMES
    # Which of three begins first is chance.
    assert max(job["started"] for job in jobs[:10]) < min(job["started"] for job in jobs[20:])
    made = [len(saved(webui)) - before for webui, before in zip(fleet, kept)]
    assert sum(made) == 30 and min(made) > 0


@pytest.mark.parametrize("prefer", [{}, ASYNC], ids=["waits", "async"])
def test_the_same_key_in_the_same_moment(fleet, prefer):
    """One generation, whichever webui was first, and all are told of that one."""
    kept = sum(len(saved(webui)) for webui in fleet)
    rounds = 10
    for number in range(rounds):
        together = threading.Barrier(3)
        headers = {**prefer, "Idempotency-Key": f"{prefer} {number}"}

        def ask(webui: Webui, headers: Dict[str, str] = headers, together: threading.Barrier = together) -> Any:
            together.wait(30)
            return webui.post(body("the same", save_images=True), headers=headers)

        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(ask, fleet))
        assert {answer.status_code for answer in answers} == {202 if prefer else 200}
        (job_id,) = {answer.headers["x-job-id"] for answer in answers}
        assert fleet[0].job(job_id, wait=30)["status"] == "Completed"
        if not prefer:
            assert answers[0].content.strip() == answers[1].content.strip() == answers[2].content.strip()
    assert sum(len(saved(webui)) for webui in fleet) == kept + rounds


def test_the_same_key_with_another_body_in_the_same_moment(fleet):
    for number in range(5):
        together = threading.Barrier(3)
        key = {"Idempotency-Key": f"another body {number}"}

        def ask(webui: Webui, key: Dict[str, str] = key, together: threading.Barrier = together) -> int:
            together.wait(30)
            return webui.post(body(f"of {webui.port}"), headers=key).status_code

        with ThreadPoolExecutor(3) as pool:
            assert sorted(pool.map(ask, fleet)) == [200, 422, 422]
