"""Prefer: respond-async. The answer is the job, as soon as it is accepted."""

from __future__ import annotations

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict

import httpx
import pytest

from harness import ASYNC, CLOSE, ORIGIN, QUICK, SHAPE, UNKNOWN, UNKNOWN_STATUS, Sent, body, until

pytestmark = pytest.mark.one_mode


@pytest.fixture
def request_body() -> Dict[str, Any]:
    """One that no other test sends."""
    return body(f"of {uuid.uuid4()}")


@pytest.mark.parametrize("kind", ["txt2img", "img2img"])
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_accepted(webui, kind, encoding):
    gate = webui.gate()
    request = body(f"of {uuid.uuid4()}", kind=kind, standin={"hold": gate})
    answer = webui.post(request, kind, headers={**ASYNC, "Accept-Encoding": encoding})
    assert answer.status_code == 202
    job_id = answer.headers["x-job-id"]
    assert answer.headers["location"] == f"/sdapi/v1/job/{job_id}"
    assert answer.headers["preference-applied"] == "respond-async"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("content-encoding", "identity") == encoding
    job = answer.json()
    assert job["id"] == job_id and job["type"] == kind and job["prompt"] == request["prompt"]
    assert job["status"] in ("Pending", "Processing")
    assert job["info"] is None and job["parameters"] is None and job["image_count"] == 0
    assert "images" not in job
    assert webui.records()[job_id]["prompt"] == request["prompt"]  # on disk before its ID was known
    gate.open()
    done = webui.client.get(answer.headers["location"], params={"wait": 30}).json()
    assert set(done) - {"images"} == set(job)
    assert done["status"] == "Completed" and len(done["images"]) == done["image_count"] == 1


@pytest.mark.parametrize(
    "values, applied",
    [
        (["respond-async, wait=0"], True),
        (["wait=0", "respond-async"], True),
        (["respond-async; wait=300"], True),
        (["respond-async, wait=0, wait=300"], True),
        (["respond-async, wait=-1"], True),
        (["respond-async, wait=soon"], True),
        (["respond-async, wait=1.5"], True),
        (['respond-async, x="y, wait=300"'], True),
        (["respond-async"], True),
        (["Respond-ASYNC"], True),
        (["return=minimal,respond-async"], True),
        (['wait="0", handling=lenient; x="a,b" , respond-async; priority=5'], True),
        (['say="a \\" , b", respond-async'], True),
        (["respond-async;"], True),
        (["respond-async=", "wait=0"], True),
        (["return=minimal", "respond-async"], True),
        ([" , ,respond-async,"], True),
        ([""], False),
        (["wait=10"], False),
        (["respond-sync"], False),
        (["x-respond-async"], False),
        (["respond-asynchronously"], False),
        (["wait=10; respond-async"], False),
        (['say="respond-async"'], False),
        (['say="a, respond-async, b"'], False),
        (['say="\\", respond-async"'], False),
        (["return=respond-async"], False),
    ],
    ids=str,
)
def test_ways_to_say_it(webui, request_body, values, applied):
    head, _, rest = webui.raw(request_body).partition(b"\r\n\r\n")
    fields = "".join(f"\r\nPrefer: {value}" for value in values).encode()
    sent = Sent(webui.port, head + fields + b"\r\n\r\n" + rest)
    status, headers = sent.head()
    sent.to_end()
    assert status == (202 if applied else 200)
    assert ("location" in headers) == ("preference-applied" in headers) == applied
    assert webui.job(headers["x-job-id"], wait=30)["status"] == "Completed"


def waits(seconds: Any) -> Dict[str, str]:
    return {"Prefer": f"respond-async, wait={seconds}", "Origin": ORIGIN}


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
@pytest.mark.parametrize("seconds", ["30", '"30"', "999999999"])
def test_what_ends_in_time_is_answered_as_always(webui, encoding, seconds):
    """RFC 7240, 4.3."""
    request = body(f"of {uuid.uuid4()}", standin={"seconds": 0.3})
    answer = webui.post(request, headers={**waits(seconds), "Accept-Encoding": encoding})
    assert answer.status_code == 200
    applied = "wait=30" if "30" in seconds else "wait=300"
    assert answer.headers["preference-applied"] == applied and "location" not in answer.headers
    assert answer.headers["access-control-expose-headers"] == "X-Job-ID, Preference-Applied"
    job = webui.job(answer.headers["x-job-id"], wait=30)
    assert (job["status"], job["images"]) == ("Completed", answer.json()["images"])
    assert answer.json()["parameters"] == job["parameters"]


def test_send_images_false_in_time(webui):
    answer = webui.post(body(send_images=False), headers=waits(30))
    assert (answer.status_code, answer.json()["images"]) == (200, [])
    assert len(webui.job(answer.headers["x-job-id"], wait=30)["images"]) == 1


def test_what_does_not_end_in_time_is_accepted(webui, request_body):
    gate = webui.gate()
    began = time.monotonic()
    answer = webui.post({**request_body, **body(request_body["prompt"], standin={"hold": gate})}, headers=waits(1))
    assert 1 <= time.monotonic() - began < 10
    job_id = answer.headers["x-job-id"]
    assert (answer.status_code, answer.json()["id"], answer.json()["status"]) == (202, job_id, "Processing")
    assert answer.headers["location"] == f"/sdapi/v1/job/{job_id}"
    assert answer.headers["preference-applied"] == "respond-async, wait=1"
    exposed = answer.headers["access-control-expose-headers"]
    assert exposed == "X-Job-ID, Location, Preference-Applied"
    gate.open()
    assert webui.job(job_id, wait=30)["status"] == "Completed"


@pytest.mark.parametrize("seconds", [0, 0.4])
def test_a_failure_in_time_has_its_true_status(webui, alone, request_body, seconds):
    """And its job's ID, so that it can be looked up."""
    request = body(request_body["prompt"], standin={"seconds": 5, "fail": "OutOfMemoryError", "fail_after": seconds})
    own = alone(webui).post(request, headers=CLOSE)
    answer = webui.post(request, headers={**waits(30), **CLOSE})
    assert (answer.status_code, answer.content) == (own.status_code, own.content) and own.status_code == 500
    job = webui.job(answer.headers["x-job-id"], wait=30)
    assert job["status"] == "Failed" and "OutOfMemoryError" in job["error"]
    assert answer.headers["preference-applied"] == "wait=30"


@pytest.mark.parametrize("status", ["Pending", "Processing"])
def test_a_cancel_in_time_has_a_status(webui, request_body, status):
    """The webui has no answer of its own for that, and whoever waits for it, or repeats it, gets the same."""
    gate = webui.gate()
    first = webui.send(body(standin={"hold": gate}))
    webui.until_status(first.job_id(), "Processing")
    request = body(request_body["prompt"], standin={"seconds": 30})
    headers = {**waits(60), "Idempotency-Key": str(uuid.uuid4()), **CLOSE}
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(webui.post, request, headers=headers) for _ in range(2)]
        (job,) = until(lambda: webui.jobs(q=request_body["prompt"]), what="the job is there")
        if status == "Processing":
            gate.open()
        webui.until_status(job["id"], status)
        time.sleep(0.3)
        assert webui.client.post(f"/sdapi/v1/job/{job['id']}/cancel").status_code == 200
        answers = [answer.result() for answer in answers]
    for answer in answers:
        assert (answer.status_code, answer.json()["detail"]) == (500, "Cancelled")
        assert answer.headers["x-job-id"] == job["id"] and answer.headers["preference-applied"] == "wait=60"


def test_a_repeat_waits_as_long_as_it_prefers(webui, request_body):
    gate = webui.gate()
    request = body(request_body["prompt"], standin={"hold": gate})
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first = webui.post(request, headers={**ASYNC, **key})
    began = time.monotonic()
    second = webui.post(request, headers={**waits(1), **key})
    assert 1 <= time.monotonic() - began < 10
    assert (second.status_code, second.headers["x-job-id"]) == (202, first.headers["x-job-id"])
    assert "idempotent-replayed" not in second.headers
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(webui.post, request, headers={**waits(60), **key})
        time.sleep(0.5)
        gate.open()
        third = third.result()
    fourth = webui.post(request, headers={**waits(60), **key})
    for answer in (third, fourth):
        assert (answer.status_code, answer.headers["x-job-id"]) == (200, first.headers["x-job-id"])
        assert answer.headers["preference-applied"] == "wait=60"
    assert third.json() == fourth.json()
    assert fourth.headers["idempotent-replayed"] == "true"
    assert len(webui.jobs(q=request_body["prompt"])) == 1


def test_a_repeat_is_told_that_the_first_failed(webui, request_body):
    gate = webui.gate()
    request = body(request_body["prompt"], standin={"hold": gate, "fail": "OutOfMemoryError"})
    key = {"Idempotency-Key": str(uuid.uuid4())}
    assert webui.post(request, headers={**ASYNC, **key}).status_code == 202
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(webui.post, request, headers={**waits(60), **key, **CLOSE})
        time.sleep(0.5)
        gate.open()
        second = second.result()
    assert second.status_code == 500 and "OutOfMemoryError" in second.text
    assert second.headers["x-job-id"] == webui.jobs(q=request_body["prompt"])[0]["id"]
    assert len(webui.jobs(q=request_body["prompt"])) == 1


def test_a_client_that_leaves_while_it_waits(webui, request_body):
    gate = webui.gate()
    sent = webui.send(body(request_body["prompt"], standin={"hold": gate}), headers=waits(60))
    (job,) = until(lambda: webui.jobs(q=request_body["prompt"]), what="the job is there")
    sent.leave()
    gate.open()
    assert webui.job(job["id"], wait=30)["status"] == "Completed"


def test_it_is_accepted_without_delay(start):
    """An early failure would be told by a status; a 202 has no use for one, so it does not wait for it."""
    webui = start(*QUICK, constants={"EARLY_FAILURE_WINDOW": 2.0})
    times = {}
    for name, headers in (("connected", {}), ("async", ASYNC)):
        sent = webui.send(body(standin={"seconds": 4}), headers=headers)
        began = time.monotonic()
        job_id = sent.head()[1]["x-job-id"]
        times[name] = time.monotonic() - began
        webui.client.post(f"/sdapi/v1/job/{job_id}/cancel")
        webui.job(job_id, wait=30)
    assert times["async"] < times["connected"] - 1 and times["connected"] > 1.9, times


def test_refusals_stay_refusals(guarded, request_body):
    def refusal(data: Any, kind: str = "txt2img", **options: Any) -> httpx.Response:
        plain = guarded.post(data, kind, **options)
        preferring = guarded.post(data, kind, headers=ASYNC, **options)
        assert preferring.status_code == plain.status_code
        assert preferring.content == plain.content
        assert not {"x-job-id", "location", "preference-applied"} & set(preferring.headers)
        return preferring

    assert refusal(request_body, auth=("user", "wrong")).status_code == 401
    assert refusal(b"{").status_code == 422
    assert refusal({**request_body, "steps": "many"}).status_code == 422
    assert refusal({**request_body, **UNKNOWN}).status_code == UNKNOWN_STATUS
    assert refusal(request_body, "img2img").status_code == (400 if SHAPE == "sdnext" else 404)
    assert not guarded.jobs(q=request_body["prompt"])


def test_an_early_failure_is_told_either_way(webui, request_body):
    answer = webui.post({**request_body, "steps": 0}, headers={**ASYNC, **CLOSE})
    assert answer.status_code in (202, 500)
    (job,) = webui.jobs(q=request_body["prompt"])
    assert webui.job(job["id"], wait=30)["status"] == "Failed"
    assert answer.status_code == 500 or answer.headers["x-job-id"] == job["id"]


def test_a_later_failure_is_seen_in_the_job(webui, request_body):
    gate = webui.gate()
    request = body(request_body["prompt"], standin={"hold": gate, "fail": "OutOfMemoryError"})
    answer = webui.post(request, headers=ASYNC)
    assert answer.status_code == 202
    gate.open()
    job = webui.job(answer.headers["x-job-id"], wait=30)
    assert job["status"] == "Failed" and "OutOfMemoryError" in job["error"]


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves(webui, request_body, reset):
    """It has not even read the head."""
    gate = webui.gate()
    sent = webui.send(body(request_body["prompt"], standin={"hold": gate}), headers=ASYNC)
    (job,) = until(lambda: webui.jobs(q=request_body["prompt"]), what="the job is there")
    sent.leave(reset)
    gate.open()
    assert webui.job(job["id"], wait=30)["status"] == "Completed"


def test_a_queue_of_them(webui, request_body):
    """A queue can be filled over one connection, and each is told its place in it."""
    gate = webui.gate()
    first = webui.post(body(standin={"hold": gate}), headers=ASYNC).json()["id"]
    webui.until_status(first, "Processing")
    jobs = [webui.post(request_body, headers=ASYNC).json() for _ in range(20)]
    assert [job["status"] for job in jobs] == ["Pending"] * 20
    assert [job["queue_position"] for job in jobs] == list(range(1, 21))
    listed = webui.jobs(q=request_body["prompt"])
    assert [job["id"] for job in listed] == [job["id"] for job in reversed(jobs)]
    gate.open()
    ended = [webui.job(job["id"], wait=30) for job in jobs]
    assert [job["status"] for job in ended] == ["Completed"] * 20
    starts = [job["started"] for job in ended]
    assert starts == sorted(starts)


def test_from_another_origin(webui, request_body):
    answer = webui.post(request_body, headers={**ASYNC, "Origin": ORIGIN})
    assert answer.status_code == 202
    assert "X-Job-ID" in answer.headers["access-control-expose-headers"]
    assert answer.headers["access-control-allow-origin"] in (ORIGIN, "*")
    assert webui.job(answer.headers["x-job-id"], wait=30)["status"] == "Completed"


def test_tracking_off(off, request_body):
    answer = off.post(request_body, headers=ASYNC)
    assert answer.status_code == 200 and answer.json()["images"]
    assert not {"x-job-id", "location", "preference-applied"} & set(answer.headers)


def test_answers_can_be_read_by_any_parser(webui):
    """A prompt with what JSON must escape, and more than fits a line."""
    prompt = f'"{uuid.uuid4()}"\n\t\\ 灯台 🗼 </script> ' + "x" * 5000
    answer = webui.post(body(prompt), headers=ASYNC)
    assert json.loads(answer.content.decode("ascii"))["prompt"] == prompt
    assert webui.job(answer.headers["x-job-id"], wait=30)["parameters"]["prompt"] == prompt


@pytest.mark.skipif(SHAPE != "sdnext", reason="others have each route once")
def test_location_below_a_subpath(start):
    webui = start("--api", "--subpath", "below").restart()  # the webui has these routes from its second start on
    answer = webui.client.post("/below/sdapi/v1/txt2img", json=body(), headers={"Prefer": "respond-async"})
    job_id = answer.headers["x-job-id"]
    assert answer.headers["location"] == f"/below/sdapi/v1/job/{job_id}"
    assert webui.client.get(answer.headers["location"], params={"wait": 30}).json()["status"] == "Completed"


@pytest.mark.skipif(SHAPE == "sdnext", reason="it needs no proxy")
def test_location_behind_a_prefix_that_a_proxy_takes_away(start):
    webui = start("--api", "--subpath", "below")
    for _ in range(2):
        answer = webui.post(body(), headers={"Prefer": "respond-async"})
        assert answer.headers["location"] == f"/below/sdapi/v1/job/{answer.headers['x-job-id']}"
    following = webui.client.get("/sdapi/v1/jobs", params={"limit": 1, "q": "a b"}).headers
    assert "link" not in following
    following = webui.client.get("/sdapi/v1/jobs", params={"limit": 1, "q": "a lighthouse"}).headers
    assert following["link"].startswith("</below/sdapi/v1/jobs?limit=1&q=a+lighthouse&cursor=")
