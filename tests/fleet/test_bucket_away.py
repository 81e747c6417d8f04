"""The bucket is away: generations reach their clients, their images wait in the local folder, and nothing is lost."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List

import pytest

from harness import ASYNC, QUICK, Start, Webui, body, connect, hold_the_queue, submit, until

PROMISED_IN_TIME = {"Prefer": "respond-async, wait=1"}
# What is tried again, or taken for left behind, is so sooner. A webui is taken for dead sooner, too.
BRIEF = {"RETRY": 0.3, "ASK_AGAIN": 0.2, "LOOK_EVERY": 0.5, "RECOVER_EVERY": 0.5}
KEPT_HERE = "Generated; its webui keeps the images until the bucket takes them: the bucket"


@pytest.fixture
def environ(bucket: Any) -> Dict[str, str]:
    """Jobs in files, images in a bucket."""
    return {"TRACKER_IMAGES": bucket.url, **bucket.environ}


@pytest.fixture
def alone(start: Start, environ: Dict[str, str]) -> Webui:
    return start(*QUICK, environ=environ, constants=BRIEF)


def local_files(webui: Webui) -> List[Path]:
    return sorted((webui.data / "images").glob("*/*"))


def until_waiting(webui: Webui, job_id: str) -> None:
    """It is generated, and says why it is not Completed."""
    until(lambda: (webui.job(job_id, images=False)["error"] or "").startswith(KEPT_HERE), what="the job says why")
    job = webui.job(job_id)
    assert (job["status"], job["images"], job["finished"]) == ("Processing", [], None)


def is_kept(webui: Webui, job_id: str, answer: Dict[str, Any]) -> bool:
    job = webui.job(job_id, wait=30)
    assert (job["status"], job["error"]) == ("Completed", None), job
    return job["images"] == answer["images"] and job["info"] == answer["info"]


def test_a_bucket_that_is_there(alone, bucket):
    """Its images are read in it: by this webui, or by whoever has the URL."""
    response = alone.post(body(n_iter=2))
    answer, job_id = response.json(), response.headers["x-job-id"]
    assert is_kept(alone, job_id, answer)
    until(lambda: not local_files(alone), what="nothing is left in the folder")
    until(lambda: not [name for name in bucket.names() if "request" in name], what="the request is removed")
    job = alone.job(job_id)
    assert job["image_urls"][0].startswith(f"{bucket.environ['AWS_ENDPOINT_URL']}/")
    for number, url in enumerate(job["image_urls"]):
        own = alone.client.get(f"/sdapi/v1/job/{job_id}/images/{number}", headers={"Accept-Encoding": "identity"})
        direct = alone.client.get(url, auth=None)
        assert own.headers["content-type"] == direct.headers["content-type"] == "image/png"
        assert own.content == direct.content and len(own.content) == int(own.headers["content-length"])
        known = {"If-None-Match": own.headers["etag"], "Accept-Encoding": "identity"}
        assert alone.client.get(f"/sdapi/v1/job/{job_id}/images/{number}", headers=known).status_code == 304
    listed = alone.jobs()[0]
    assert [url.partition("?")[0] for url in listed["image_urls"]] == [u.partition("?")[0] for u in job["image_urls"]]
    assert bucket.environ["AWS_SECRET_ACCESS_KEY"] not in str(job) + alone.log
    assert alone.client.delete(f"/sdapi/v1/job/{job_id}").status_code == 204
    assert not bucket.names()


@pytest.mark.parametrize("outage", ["killed", "silent"])
def test_an_outage(alone, bucket, outage):
    (bucket.kill if outage == "killed" else bucket.server.suspend)()
    responses = [alone.post(body(str(number))) for number in range(3)]
    ids = [response.headers["x-job-id"] for response in responses]
    for response, job_id in zip(responses, ids):
        assert response.status_code == 200 and len(response.json()["images"]) == 1
        until_waiting(alone, job_id)
    began = time.monotonic()
    refused = alone.post(body(), headers=ASYNC)
    assert refused.status_code == 503 and "not accepted" in refused.json()["detail"]
    assert time.monotonic() - began < 2 + 3, "the head is not held back"
    assert [job["status"] for job in alone.jobs()] == ["Processing"] * 3, "lists are there all the same"
    assert alone.client.post(f"/sdapi/v1/job/{ids[0]}/cancel").status_code == 409
    (bucket.start if outage == "killed" else bucket.server.resume)()
    for response, job_id in zip(responses, ids):
        assert is_kept(alone, job_id, response.json())
        ended = alone.job(job_id, images=False)
        assert ended["finished"] - ended["started"] < 5, "the upload does not count"
    until(lambda: not local_files(alone), what="nothing is left in the folder")
    assert alone.job(submit(alone), wait=30)["status"] == "Completed"
    waited = [line for line in alone.our_log() if "kept here until" in line]
    assert len(waited) == 1, "one line, however long it lasts"


def test_a_webui_that_is_killed_while_the_bucket_is_away(alone, bucket):
    bucket.kill()
    response = alone.post(body())
    job_id = response.headers["x-job-id"]
    until_waiting(alone, job_id)
    alone.kill()
    alone.start()
    until_waiting(alone, job_id)
    bucket.start()
    assert is_kept(alone, job_id, response.json())
    until(lambda: not local_files(alone), what="nothing is left in the folder")


def test_a_reload_while_the_bucket_is_away(start, environ, bucket):
    """What waits for nothing but the bucket does not keep the old tracker alive: the new one goes on with it."""
    webui = start("--api", environ=environ, constants={**BRIEF, "PUBLISH_WAIT": 0.5})
    bucket.kill()
    response = webui.post(body())
    job_id = response.headers["x-job-id"]
    until_waiting(webui, job_id)
    webui.reload_ui()
    until(lambda: [line for line in webui.our_log() if "left behind are now: 1 Processing" in line])
    bucket.start()
    assert is_kept(webui, job_id, response.json())


def test_others_took_it_for_dead(start_fleet, bucket, database):
    """They cannot have its images, and say that it has failed. Its next start knows better."""
    victim, other = start_fleet(2, constants={**BRIEF, "DEAD_AFTER": 3.0, "BEAT_EVERY": 0.5, "GAP": 1.5})
    bucket.kill()
    responses = [victim.post(body(), headers={"Idempotency-Key": str(number)}) for number in range(2)]
    kept, repeated = [response.headers["x-job-id"] for response in responses]
    for job_id in (kept, repeated):
        until_waiting(victim, job_id)
    victim.kill()
    bucket.start()
    for job_id in (kept, repeated):
        until(lambda job_id=job_id: other.job(job_id, images=False)["status"] == "Failed", what="it is given up")
    again = other.post(body(), headers={"Idempotency-Key": "1"}).headers["x-job-id"]
    assert again != repeated and other.job(again, wait=30)["status"] == "Completed"
    victim.start()
    until(lambda: victim.job(kept, images=False)["status"] == "Completed", what="its images are found")
    assert is_kept(other, kept, responses[0].json())
    assert other.job(repeated, images=False)["status"] == "Failed", "another job has its key by now"


def test_requests(alone, bucket):
    """That of a job whose client waits comes to the bucket in the background, or when it is promised."""
    hold_the_queue(alone)
    parked, connected = submit(alone), connect(alone)
    until(lambda: len([name for name in bucket.names() if "request" in name]) == 3, what="all are in the bucket")
    bucket.kill()
    late = connect(alone)
    began = time.monotonic()
    assert alone.post(body(), headers=PROMISED_IN_TIME).status_code == 503, "it is not in the bucket"
    assert time.monotonic() - began < 1 + 2 + 3
    bucket.start()
    promised = alone.post(body(), headers=PROMISED_IN_TIME)
    assert (promised.status_code, promised.json()["status"]) == (202, "Pending")
    until(lambda: any(late in name for name in bucket.names()), what="it is there later")
    alone.gates[-1].open()
    for job_id in (parked, connected, late, promised.headers["x-job-id"]):
        assert alone.job(job_id, wait=60)["status"] == "Completed"
    until(lambda: not [name for name in bucket.names() if "request" in name], what="no request is left")
    assert not local_files(alone)


def test_a_bucket_far_away_takes_many_requests_at_once(start, environ, bucket, seaweedfs, connect_through):
    """Each answer takes it a tenth of a second: none of these may be refused for it."""
    network = connect_through(seaweedfs)
    webui = start(*QUICK, environ={**environ, **bucket.environ_at(network.port)})
    hold_the_queue(webui)
    with network.slow(0.05), ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: webui.post(body(), headers=ASYNC).status_code, range(100)))
    assert answers == [202] * 100
    webui.gates[-1].open()
