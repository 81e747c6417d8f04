"""A webui of a fleet that dies, or only seems to: nothing that was promised is lost, and nothing generated twice."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, List

from receivers import Receiver
from services import DYING_SOON, LEFT_BEHIND, end_of

from harness import Webui, body, connect, hold_the_queue, saved, submit, until

PROMISED_IN_TIME = {"Prefer": "respond-async, wait=1"}


def promise_late(webui: Webui) -> str:
    """A job that was answered 202 while its request waits in this webui's queue."""
    answer = webui.post(body("late", save_images=True), headers=PROMISED_IN_TIME)
    assert (answer.status_code, answer.json()["status"]) == (202, "Pending"), answer.text
    return answer.headers["x-job-id"]


def test_one_that_was_killed(start_fleet):
    """By the others' clock it takes some seconds here, and a minute at most as it is."""
    victim, *others = start_fleet(3, constants=DYING_SOON)
    for webui in others:
        hold_the_queue(webui)
    held = hold_the_queue(victim)
    connected, promised, parked = connect(victim), promise_late(victim), [submit(victim) for _ in range(3)]
    victim.kill()
    for job_id in (held, connected):
        assert end_of(others[0], job_id) == ("Failed", LEFT_BEHIND)
    for webui in others:
        webui.gates[-1].open()
    assert [end_of(others[1], job_id) for job_id in (promised, *parked)] == [("Completed", None)] * 4
    assert others[0].client.get("/sdapi/v1/jobs/stats").json()["servers"] == ["webui-1", "webui-2"]
    # It comes back as another one, under its old name.
    victim.start()
    assert end_of(victim, submit(victim)) == ("Completed", None)


def test_one_that_runs_a_promised_job_when_it_is_killed(start_fleet):
    """It may be what killed it, and is never run again by itself."""
    victim, other = start_fleet(2, constants=DYING_SOON)
    hold_the_queue(other)
    gate = victim.gate()
    running = submit(victim, standin={"hold": gate}, save_images=True)
    victim.until_status(running, "Processing")
    victim.kill()
    assert end_of(other, running) == ("Failed", LEFT_BEHIND)
    other.gates[-1].open()
    gate.open()
    assert end_of(other, submit(other)) == ("Completed", None)
    assert saved(other) == []


def test_one_that_was_suspended(start_fleet):
    """It wakes up when all that it had is another's, and generates nothing of that. What it ran comes to its end."""
    sleeper, other = start_fleet(2, constants=DYING_SOON)
    hold_the_queue(other)
    sent = sleeper.send(body("runs", standin={"hold": sleeper.gate()}, save_images=True))
    running = sent.job_id()
    sleeper.until_status(running, "Processing")
    jobs = [promise_late(sleeper), *(submit(sleeper, save_images=True) for _ in range(3))]
    os.kill(sleeper.pid, signal.SIGSTOP)
    try:
        assert end_of(other, running) == ("Failed", LEFT_BEHIND)
        other.gates[-1].open()
        assert [end_of(other, job_id) for job_id in jobs] == [("Completed", None)] * 4
    finally:
        os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.gates[-1].open()
    assert b'"images"' in sent.content(), "its client gets its answer"
    until(lambda: end_of(other, running) == ("Completed", None), what="its own end replaces what others thought")
    assert len(saved(other)) == 4 and len(saved(sleeper)) == 1
    assert end_of(other, submit(sleeper)) == ("Completed", None)


def test_one_that_cannot_tell_begins_nothing_that_was_promised(start_fleet, database):
    """The others may take it for dead, and the job for theirs. One whose client waits is another matter."""
    (webui,) = start_fleet(1, constants={"RETRY": 0.3, "WRITE_SECONDS": 3.0})
    hold_the_queue(webui)
    promised, connected = promise_late(webui), webui.send(body("waits"))
    connected.job_id()
    database.server.suspend()
    webui.gates[-1].open()
    assert b'"images"' in connected.content()
    assert saved(webui) == []
    database.server.resume()
    assert end_of(webui, promised) == ("Completed", None)
    assert len(saved(webui)) == 1


def test_all_of_them(start_fleet):
    """Whoever comes first goes on with what was promised."""
    fleet = start_fleet(3, constants=DYING_SOON)
    for webui in fleet:
        hold_the_queue(webui)
    jobs = [submit(fleet[number % 3]) for number in range(6)]
    for webui in fleet:
        webui.kill()
    fleet[1].start()
    assert [end_of(fleet[1], job_id) for job_id in jobs] == [("Completed", None)] * 6


def test_webhooks_are_told_once_by_whoever_lives(start_fleet, open_receiver):
    """The first tries of each fail, as long as its webui lives."""
    refused: List[Any] = []
    taken: List[Any] = []
    is_dead = threading.Event()

    def answer(handler: Any) -> None:
        (taken if is_dead.is_set() else refused).append(handler.delivery)
        handler.send_response(204 if is_dead.is_set() else 503)
        handler.end_headers()

    receiver: Receiver = open_receiver(answer)
    constants = {**DYING_SOON, "LEASE": 3.0, "TRY_SECONDS": 2.5, "FIND_EVERY": 0.3, "FIND_AGAIN": 0.2}
    constants["RETRY_DELAYS"] = (2.0,) * 20
    victim, *others = start_fleet(3, constants=constants, environ={"TRACKER_WEBHOOK_URL": receiver.url})
    for webui in others:
        hold_the_queue(webui)
    jobs = {victim.post(body()).headers["x-job-id"] for _ in range(5)}
    until(lambda: {one.event["data"]["id"] for one in list(refused)} == jobs, what="all were tried")
    victim.kill()
    is_dead.set()
    for webui in others:
        webui.gates[-1].open()
    jobs.update(job["id"] for job in others[0].jobs())
    until(lambda: all(others[0].job(job_id)["webhook"]["delivered"] for job_id in jobs), what="all are told")
    assert sorted(one.event["data"]["id"] for one in taken) == sorted(jobs), "each once"
    assert {one.event["type"] for one in taken} == {"job.completed"}
    assert {one.id for one in refused} <= {one.id for one in taken}, "by the same ID"
