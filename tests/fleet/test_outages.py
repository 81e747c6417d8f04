"""The database is away, slow, read-only or full, or its connections are: generations reach their clients all the same.

What could not be stored is stored when it is back, and nothing needs a restart.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, Callable, ContextManager, Iterator, List
from urllib.parse import unquote

import pytest
import services
from disks import mounted
from services import DYING_SOON, LEFT_BEHIND, end_of

from harness import ASYNC, Webui, body, connect, hold_the_queue, saved, submit, until

HEAD = 2.0 + 3.0  # seconds within which there is a head, and as many again for a busy machine


def refused(webui: Webui) -> str:
    """Why a request that is to be answered 202 is not."""
    began = time.monotonic()
    answer = webui.post(body(), headers=ASYNC)
    assert answer.status_code == 503, answer.text
    assert time.monotonic() - began < HEAD
    assert services.PASSWORD not in answer.text and "127.0.0.1" not in answer.text
    return answer.json()["detail"]


def generates_untracked(webui: Webui) -> None:
    began = time.monotonic()
    answer = webui.post(body())
    assert answer.status_code == 200 and len(answer.json()["images"]) == 1 and "x-job-id" not in answer.headers
    assert time.monotonic() - began < HEAD


def works(webui: Webui) -> Any:
    """Whether all is as ever."""
    answer = webui.post(body(), headers=ASYNC)
    return answer.status_code == 202 and end_of(webui, answer.headers["x-job-id"]) == ("Completed", None)


def no_password_in_log(webui: Webui) -> None:
    assert services.PASSWORD not in webui.log and unquote(services.PASSWORD) not in webui.log


@contextlib.contextmanager
def killed(database: services.Database) -> Iterator[None]:
    database.kill()
    yield
    database.start()


@contextlib.contextmanager
def suspended(database: services.Database) -> Iterator[None]:
    database.server.suspend()
    try:
        yield
    finally:
        database.server.resume()


OUTAGES = {"killed": killed, "suspended": suspended, "read-only": services.Database.read_only}


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage(start_fleet, database, outage):
    (webui,) = start_fleet(1, images=False, constants={"RETRY": 0.3})
    running = webui.send(body("runs", standin={"hold": webui.gate()}))
    held, waiting = running.job_id(), webui.send(body("waits"))
    waits = waiting.job_id()
    parked = submit(webui)
    webui.until_status(held, "Processing")
    away: Callable[[Any], ContextManager[None]] = OUTAGES[outage]
    with away(database):
        refused(webui)
        if outage != "read-only":
            assert webui.job(held, images=False)["status"] == "Processing", "what runs here is known"
            answer = webui.client.get("/sdapi/v1/jobs")
            assert answer.status_code == 503 and services.PASSWORD not in answer.text
        webui.gates[-1].open()
        for sent in (running, waiting):
            assert b'"images"' in sent.content()
        generates_untracked(webui)
    for job_id in (held, waits, parked):
        assert end_of(webui, job_id) == ("Completed", None)
    until(lambda: works(webui), what="it works as ever")
    assert [len(webui.job(job_id)["images"]) for job_id in (held, waits, parked)] == [1] * 3
    assert {job["id"] for job in webui.jobs()} >= {held, waits, parked}
    no_password_in_log(webui)


def test_a_start_without_the_database(start_fleet, database):
    """Jobs are kept as soon as it is there."""
    database.kill()
    (webui,) = start_fleet(1, images=False, constants={"RETRY": 0.3})
    generates_untracked(webui)
    refused(webui)
    database.start()
    until(lambda: webui.post(body(), headers=ASYNC).status_code == 202, what="it is there")
    assert works(webui)
    no_password_in_log(webui)


def test_connections_are_reset(start_fleet, database):
    """As by a failover, again and again, while jobs come and go. Nothing is lost, and nothing generated twice."""
    fleet = start_fleet(2, constants={"RETRY": 0.2})
    kept: List[str] = []
    for number in range(30):
        answer = fleet[number % 2].post(body(standin={"seconds": 0.02}, save_images=True), headers=ASYNC)
        assert answer.status_code in (202, 503)
        if answer.status_code == 202:
            kept.append(answer.headers["x-job-id"])
        if number % 5 == 4:
            database.reset()
    assert len(kept) > 15
    ends = [end_of(webui, job_id) for job_id in kept for webui in fleet[:1]]
    assert ends == [("Completed", None)] * len(kept)
    until(lambda: sum(len(saved(webui)) for webui in fleet) >= len(kept))
    assert sum(len(saved(webui)) for webui in fleet) == len(kept)


def test_a_reset_is_noticed_by_nobody(start_fleet, database):
    """The database is there again in the same moment."""
    (webui,) = start_fleet(1, images=False)
    job_id = hold_the_queue(webui)
    for _ in range(3):
        database.reset()
        assert webui.job(job_id, images=False)["id"] == job_id
        assert len(webui.jobs(limit=1)) == 1
        database.reset()
        submit(webui)
    webui.gates[-1].open()


def test_who_waits_hears_of_an_end_though_its_connection_was_lost(start_fleet, database):
    webui, other = start_fleet(2, images=False)
    job_id = hold_the_queue(webui)
    waiting = other.send_get(f"/sdapi/v1/job/{job_id}?wait=60")
    database.reset()
    time.sleep(1)  # it listens again, or does not know that it does not
    webui.gates[-1].open()
    began = time.monotonic()
    assert b'"Completed"' in waiting.content()
    assert time.monotonic() - began < 30


def test_a_slow_network(start_fleet, database, connect_through):
    """Each answer of the database takes a third of a second and more."""
    network = connect_through(database.server)
    (webui,) = start_fleet(1, images=False, through=[network])
    with network.slow(0.15):
        for _ in range(3):
            began = time.monotonic()
            sent = webui.send(body())
            assert sent.head()[0] == 200
            assert time.monotonic() - began < HEAD
            assert b'"images"' in sent.content()
    assert works(webui)


def test_a_network_that_is_cut_between_one_webui_and_the_database(start_fleet, database, bucket, connect_through):
    """It is taken for dead. What it runs reaches its client, and is kept when the network is healed."""
    network = connect_through(database.server)
    alone, other = start_fleet(2, through=[network], constants=DYING_SOON)
    hold_the_queue(other)
    sent = alone.send(body("runs", standin={"hold": alone.gate()}, save_images=True))
    running = sent.job_id()
    alone.until_status(running, "Processing")
    parked, connected = submit(alone, save_images=True), connect(alone, save_images=True)
    with network.cut():
        refused(alone)
        assert alone.job(running, images=False)["status"] == "Processing"
        assert end_of(other, running) == ("Failed", LEFT_BEHIND)
        assert end_of(other, connected) == ("Failed", LEFT_BEHIND)
        other.gates[-1].open()
        assert end_of(other, parked) == ("Completed", None)
        alone.gates[-1].open()
        assert b'"images"' in sent.content()
        generates_untracked(alone)
    for job_id in (running, connected):
        until(lambda job_id=job_id: end_of(other, job_id) == ("Completed", None), what="its own end is what counts")
        assert len(other.job(job_id)["images"]) == 1
    assert len(saved(other)) == 1 and len(saved(alone)) == 2
    until(lambda: works(alone), what="it works as ever")


def test_nobody_listens_at_the_port(start_fleet, database, connect_through):
    network = connect_through(database.server)
    (webui,) = start_fleet(1, images=False, through=[network], constants={"RETRY": 0.3})
    with network.refusing():
        network.reset()
        generates_untracked(webui)
        refused(webui)
    until(lambda: works(webui), what="it works as ever")


def test_a_full_database(start, postgresql):
    """It can be read, and takes jobs again when there is room."""
    disk = postgresql.folder / "disk"
    with mounted(disk, "size=24m,mode=777"), services.Database(postgresql, disk / "data") as database:
        (webui,) = services.start_fleet(start, 1, database, None, constants={"RETRY": 0.3})
        held = hold_the_queue(webui)
        filling = disk / "filling"
        with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        # What is there already has room for some more.
        answers = [webui.post(body("a long prompt " * 300), headers=ASYNC).status_code for _ in range(20)]
        assert set(answers) <= {202, 503} and answers[-1] == 503
        assert "disk" in webui.log or "space" in webui.log
        assert webui.job(held)["status"] == "Processing" and len(webui.jobs()) == 1 + answers.count(202)
        webui.gates[-1].open()
        filling.unlink()
        assert end_of(webui, held) == ("Completed", None)
        until(lambda: works(webui), what="it works as ever")
        webui.kill()


def test_a_search_is_given_up_while_the_network_is_cut(start_fleet, database, connect_through):
    """To cancel it there, the database is called once more. Nobody waits for that but the search's own thread."""
    network = connect_through(database.server)
    (webui,) = start_fleet(1, images=False, through=[network])
    held = hold_the_queue(webui)
    assert webui.jobs(q="nothing") == []
    with network.cut():
        search = webui.send_get("/sdapi/v1/jobs?q=nothing")
        time.sleep(0.5)  # it is on its way, and nothing tells
        search.leave()
        until_then = time.monotonic() + 3
        while time.monotonic() < until_then:
            began = time.monotonic()
            assert webui.job(held, images=False)["status"] == "Processing"
            assert time.monotonic() - began < 2
            time.sleep(0.05)
