"""Webhooks of a webui: which are sent, which refused, and that a kill loses none and two webuis send none twice."""

from __future__ import annotations

import json
import os
import signal
from typing import Any, Callable, Dict, Iterator

import pytest
from receivers import Receiver

from harness import ASYNC, QUICK, SHAPE, Start, Webui, body, connect, free_port, hold_the_queue, submit, until

SECRET = "whsec_" + "c2VjcmV0" * 5
# A try that is cut by a kill belongs to the killed webui for so long.
BRIEF = {"LEASE": 3.0, "TRY_SECONDS": 2.5, "FIND_EVERY": 0.3, "FIND_AGAIN": 0.2, "RETRY_DELAYS": (0.1,) * 8}


def allow_local(webui: Webui) -> None:
    """Prepares a webui whose clients may name receivers on this machine, as the operator can set it."""
    options = webui.folder / "webui" / "config.json"
    options.write_text(json.dumps({} if SHAPE == "sdnext" else {"api_forbid_local_requests": False}))


@pytest.fixture(scope="module")
def own() -> Iterator[Receiver]:
    """The receiver of all jobs whose requests name no other."""
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def told(start_shared: Start, own: Receiver) -> Webui:
    """A webui that may call local addresses."""
    environ = {"TRACKER_WEBHOOK_URL": own.url, "TRACKER_WEBHOOK_SECRET": SECRET}
    return start_shared(*QUICK, prepare=allow_local, environ=environ)


def hook(url: str, **headers: str) -> Dict[str, str]:
    return {"X-Job-Webhook": url, **headers}


def delivered(webui: Webui, job_id: str) -> Dict[str, Any]:
    """The job once its webhook is known to be delivered."""

    def state() -> Any:
        job = webui.job(job_id, images=False)
        return job if job["webhook"]["delivered"] else None

    return until(state, what=f"the webhook of {job_id} is delivered")


def test_the_three_ends_are_told(told, own, open_receiver):
    standard = pytest.importorskip("standardwebhooks.webhooks")
    receiver = open_receiver()
    # As it came, and by a client that leaves; the header goes before the variable.
    before = len(own.got)
    done = told.post(body("ä", batch_size=2), headers=hook(receiver.url, **{"X-Job-Label": "album 7"}))
    failed = told.post(body(standin={"fail": "OutOfMemoryError"}), headers={**hook(receiver.url), **ASYNC})
    hold_the_queue(told)
    cancelled = told.post(body(), headers={**hook(receiver.url), **ASYNC})
    assert told.client.post(f"/sdapi/v1/job/{cancelled.headers['x-job-id']}/cancel").status_code == 200
    told.gates[-1].open()
    ids = [answer.headers["x-job-id"] for answer in (done, failed, cancelled)]
    jobs = [delivered(told, job_id) for job_id in ids]
    events = {}
    for got in receiver.wait(3):
        event = standard.Webhook(SECRET).verify(got.body, got.headers)
        events[event["data"]["id"]] = event
    assert [events[job_id]["type"] for job_id in ids] == ["job.completed", "job.failed", "job.failed"]
    for job in jobs:
        webhook = {"url": receiver.url, "delivered": False, "attempts": 0}
        assert job["webhook"] == {"url": receiver.url, "delivered": True, "attempts": 1}
        assert events[job["id"]]["data"] == {**job, "webhook": webhook}
    data = events[ids[0]]["data"]
    assert data["label"] == "album 7" and data["image_count"] == 2 and data["parameters"]["prompt"] == "ä"
    assert "images" not in data and data["image_urls"][1] == f"/sdapi/v1/job/{ids[0]}/images/1"
    (held,) = own.wait(before + 1)[before:]
    assert held.event["data"]["id"] not in ids


def test_a_retry_tells_the_same_receiver(told, open_receiver):
    receiver = open_receiver()
    headers = {**hook(receiver.url, **{"X-Job-Label": "again"}), **ASYNC}
    hold_the_queue(told)
    job_id = told.post(body(), headers=headers).headers["x-job-id"]
    told.client.post(f"/sdapi/v1/job/{job_id}/cancel")
    told.gates[-1].open()
    receiver.wait()
    again = told.client.post(f"/sdapi/v1/job/{job_id}/retry").json()
    (_, got) = receiver.wait(2)
    event = got.event
    assert event["type"] == "job.completed" and event["data"]["id"] == again["id"]
    assert (event["data"]["retry_of"], event["data"]["label"]) == (job_id, "again")


REFUSED = ["nonsense", "ftp://example.org/", "http://", "http://u:p@example.org/", "http://[::1/", "http://a b/"]
LOCAL = ["http://127.0.0.1:9/", "http://localhost/", "http://[::1]:7860/", "http://[::ffff:127.0.0.1]/", "http://0/"]


def test_urls_that_are_refused(webui):
    before = len(webui.jobs())
    for url in [*REFUSED, *(LOCAL if SHAPE != "sdnext" else [])]:
        answer = webui.post(body(), headers=hook(url))
        assert answer.status_code == 422 and "x-job-id" not in answer.headers, url
        assert answer.json()["detail"].startswith("X-Job-Webhook: "), answer.text
    assert len(webui.jobs()) == before


def test_the_operators_own_url_may_be_local(start, open_receiver):
    receiver = open_receiver()
    webui = start(*QUICK, environ={"TRACKER_WEBHOOK_URL": receiver.url})
    job_id = webui.post(body()).headers["x-job-id"]
    assert delivered(webui, job_id)["webhook"]["attempts"] == 1
    assert job_id in receiver.got[0].id


@pytest.mark.skipif(SHAPE == "sdnext", reason="it has no such option")
def test_a_webui_that_sends_no_requests(start):
    def forbid(webui: Webui) -> None:
        options = {"api_enable_requests": False, "api_forbid_local_requests": False}
        (webui.folder / "webui" / "config.json").write_text(json.dumps(options))

    answer = start(*QUICK, prepare=forbid).post(body(), headers=hook("http://127.0.0.1:9/"))
    assert answer.status_code == 422, answer.text


# Kills


def kill_once(webui: Webui) -> Callable[[Any], None]:
    """An answer of a receiver: it has what was sent, and the webui dies before it knows."""

    def answer(handler: Any) -> None:
        os.kill(webui.pid, signal.SIGKILL)

    return answer


def submit_to(webui: Webui, receiver: Receiver, **fields: Any) -> str:
    answer = webui.post(body(**fields), headers={**hook(receiver.url), **ASYNC})
    assert answer.status_code == 202, answer.text
    return answer.headers["x-job-id"]


def test_a_kill_between_delivery_and_its_record(start, open_receiver):
    receiver = open_receiver()
    webui = start(*QUICK, prepare=allow_local, constants=BRIEF)
    receiver.answers = [kill_once(webui), 200]
    job_id = submit_to(webui, receiver)
    receiver.wait()
    webui.restart()
    assert delivered(webui, job_id)["status"] == "Completed"
    one, other = receiver.wait(2)
    assert one.id == other.id and one.event["data"]["id"] == job_id


def test_a_kill_between_end_and_delivery(start, open_receiver):
    """Of jobs that had ended, and of one that had not."""
    port = free_port()
    webui = start(*QUICK, prepare=allow_local, constants={**BRIEF, "RETRY_DELAYS": (1.0,) * 8})
    headers = hook(f"http://127.0.0.1:{port}/hook")
    ended = [webui.post(body(), headers=headers).headers["x-job-id"] for _ in range(3)]
    for job_id in ended:
        webui.until_status(job_id, "Completed")
    running = webui.send(body(standin={"hold": webui.gate()}), headers=headers).job_id()
    webui.until_status(running, "Processing")
    webui.kill()
    receiver = open_receiver(port=port)
    webui.start()
    for job_id in (*ended, running):
        delivered(webui, job_id)
    assert sorted(got.id.split("_")[1] for got in receiver.wait(4)) == sorted([*ended, running])
    types = {got.event["data"]["id"]: got.event["type"] for got in receiver.got}
    assert types == {**dict.fromkeys(ended, "job.completed"), running: "job.failed"}


def test_a_webui_tells_what_its_dead_neighbour_did_not(start, open_receiver, tmp_path):
    """And both together tell each end once."""
    receiver = open_receiver()
    environ = {"TRACKER_DATA_DIR": str(tmp_path), "TRACKER_WEBHOOK_URL": receiver.url}
    one, other = (start(*QUICK, environ=environ, constants=BRIEF) for _ in range(2))
    receiver.answers = [kill_once(one), 200]
    killed = connect(one)
    receiver.wait()
    one.process.wait()
    assert delivered(other, killed)["webhook"]["attempts"] == 1
    one.kill()
    one.start()
    ids = [submit(webui) for webui in (one, other) * 10]
    for job_id in ids:
        assert delivered(one, job_id)["webhook"]["attempts"] == 1
    got = [one.event["data"]["id"] for one in receiver.got]
    assert sorted(got) == sorted([killed, killed, *ids])
