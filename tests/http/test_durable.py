"""No end of a job is shown before its record is on disk, so that no crash takes back what somebody has seen."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from system import System

from harness import MODES, QUICK, Page, Start, Webui, body, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which file a descriptor is of")


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    made = System(tmp_path)
    yield made
    made.works()


@pytest.fixture
def webui(start: Start, system: System) -> Webui:
    flags = ("--api",) if MODES[0] == "ui" else QUICK
    return start(*flags, scripts=system.scripts)


def stalled(webui: Webui, system: System) -> Any:
    """Inside a `with`, no fsync of jobs.json returns."""
    return system.waits(webui.data / "jobs.json", "fsync")


def running(webui: Webui, **standin: Any) -> Any:
    """A job that runs until its gate is opened, and its request."""
    sent = webui.send(body(standin={"hold": webui.gate(), **standin}))
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    until(lambda: webui.records()[job_id]["status"] == "Processing")
    return job_id, sent


def shown(webui: Webui, job_id: str) -> Any:
    """Each way to see a job's status."""
    listed = {
        status: [job["id"] for job in webui.jobs(status=status)] for status in ("Processing", "Completed", "Failed")
    }
    return (
        webui.job(job_id)["status"],
        webui.job(job_id, wait=0.3, images=False)["status"],
        [status for status, ids in listed.items() if job_id in ids],
        next(job["status"] for job in webui.jobs() if job["id"] == job_id),
    )


STILL_RUNNING = ("Processing", "Processing", ["Processing"], "Processing")


def test_completed_is_shown_when_it_is_safe(webui, system):
    job_id, sent = running(webui)
    page = Page(webui.client)
    with stalled(webui, system):
        webui.gates[-1].open()
        answer = json.loads(sent.content())  # this one does not wait for our disk
        assert shown(webui, job_id) == STILL_RUNNING
        html = page.look(job=job_id)
        assert "status Processing" in html and "_0.png" not in html
        assert '<b>0</b><span class="status Completed"' in html, "the figures do not count it either"
    assert webui.job(job_id, wait=10)["images"] == answer["images"]
    assert webui.jobs(status="Completed")[0]["id"] == job_id


def test_failed_and_cancelled_are_shown_when_they_are_safe(webui, system):
    failing, sent = running(webui, fail="RuntimeError")
    waiting = webui.send(body()).job_id()
    with stalled(webui, system):
        webui.gates[-1].open()
        sent.to_end()
        assert shown(webui, failing) == STILL_RUNNING
    assert webui.job(failing, wait=10)["status"] == "Failed"
    webui.job(waiting, wait=10)

    blocking, _ = running(webui)
    waiting = webui.send(body()).job_id()
    with stalled(webui, system):
        began = time.monotonic()
        answer = webui.client.post(f"/sdapi/v1/job/{waiting}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "Pending")
        assert time.monotonic() - began < 10
    job = webui.job(waiting, wait=10)
    assert (job["status"], job["error"]) == ("Failed", "Cancelled")
    webui.gates[-1].open()
    assert webui.job(blocking, wait=10)["status"] == "Completed"


def test_killed_before_its_record_is_written(webui, system):
    """All that it made is on disk, so it is Completed at the next start; a purge finds nothing to remove."""
    job_id, sent = running(webui)
    with stalled(webui, system):
        webui.gates[-1].open()
        answer = json.loads(sent.content())
        until(lambda: any(path.name == f"{job_id}.json" for path in webui.images()), what="its images are stored")
        webui.kill()
    cut_last_record(webui, job_id)
    for time_ in range(2):  # what recovery said is safe, too
        webui.start()
        job = webui.job(job_id)
        assert (job["status"], job["error"], job["images"]) == ("Completed", None, answer["images"])
        # But for who started it, it is the same answer.
        assert (job["info"], job["parameters"]) == (answer["info"], answer["parameters"])
        assert job["started"] is not None and job["finished"] is None
        said = any("1 jobs that a webui left behind are now: 1 Completed" in line for line in webui.our_log())
        assert said == (time_ == 0)
        webui.kill()


def cut_last_record(webui: Webui, job_id: str) -> None:
    """A kill leaves what was given to the system, though no fsync came back. A power cut may leave this."""
    path = webui.data / "jobs.json"
    lines = path.read_bytes().split(b"\n")
    kept = [line.rstrip(b",") for line in lines if not (job_id.encode() in line and b"Completed" in line)]
    records = [line for line in kept if line.startswith(b'"')]
    path.write_bytes(b"{\n" + b",\n".join(records) + b"\n}\n")


def test_a_neighbour_sees_it_when_it_is_safe(start, system, tmp_path):
    environ = {"TRACKER_DATA_DIR": str(tmp_path / "data")}
    one = start(*QUICK, environ=environ, scripts=system.scripts)
    two = start(*QUICK, environ=environ)
    job_id, sent = running(one)
    assert two.job(job_id)["status"] == "Processing"
    with stalled(one, system):
        one.gates[-1].open()
        sent.content()
        until(lambda: one.records()[job_id]["status"] == "Completed", what="its record is given to the system")
        seen = two.send_get(f"/sdapi/v1/job/{job_id}?images=false")
        time.sleep(0.5)
        one.kill()
    assert json.loads(seen.content())["status"] in ("Processing", "Completed")
    assert two.job(job_id, wait=90)["status"] == "Completed"
