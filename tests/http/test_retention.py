"""What a webui removes by itself, also when its clock is wrong or is set while it runs."""

from __future__ import annotations

import logging
import time

import pytest

from harness import MODES, QUICK, Page, body, until

DAY = 86400


def test_over_a_restart(start, clock):
    webui = start("--nowebui", scripts={"a-clock": clock.script})
    clock.set(-31 * DAY)
    done = webui.post(body()).headers["x-job-id"]
    webui.job(done, wait=30)
    clock.set(0)
    gate = webui.gate()
    sent = webui.send(body(standin={"hold": gate}))
    running = sent.head()[1]["x-job-id"]
    until(lambda: running in webui.records())
    webui.kill()
    time.sleep(1.1)  # the times of jobs are whole seconds: the running one is to be from before this start
    webui.start()
    purges = until(lambda: [line for line in webui.our_log() if "Purge: removed" in line], what="the purge")
    assert len(purges) == 1
    assert done not in webui.records()
    assert not [path for path in webui.images() if path.name.startswith(done)]
    assert webui.job(running)["status"] == "Failed"


def test_a_retention_that_is_none_removes_nothing(start, caplog):
    with caplog.at_level(logging.WARNING):
        webui = start("--nowebui", environ={"TRACKER_RETENTION": "a while"})
    assert any("TRACKER_RETENTION" in line for line in webui.our_log())
    job_id = webui.post(body()).headers["x-job-id"]
    assert webui.job(job_id, wait=30)["status"] == "Completed"


LISTER = """
import threading
from modules import script_callbacks

def add(_, app):
    app.add_api_route("/threads", lambda: [thread.name for thread in threading.enumerate()])

script_callbacks.on_app_started(add)
"""


def test_one_housekeeper_after_reloads(start):
    webui = start("--api", scripts={"lister": LISTER})
    for _ in range(3):
        webui.reload_ui()

    def ours():
        names = webui.client.get("/threads").json()
        return sorted(name for name in names if name in ("job-tracker-housekeeping", "job-tracker-store"))

    until(lambda: ours() == ["job-tracker-housekeeping", "job-tracker-store"], 15, "the old threads have ended")


def test_a_start_with_a_clock_ten_years_ahead(start, clock):
    """Nothing goes until somebody says so, also not after a job was accepted by that clock."""
    webui = start("--api" if MODES[0] == "ui" else QUICK[0], scripts={"a-clock": clock.script})
    kept = [webui.post(body()).headers["x-job-id"] for _ in range(2)]
    webui.job(kept[-1], wait=30)
    webui.kill()
    clock.set(10 * 365 * DAY)
    for _ in range(2):
        webui.start()
        until(lambda: any("The clock may be wrong" in line for line in webui.our_log()), what="it is said")
        assert {job["id"] for job in webui.jobs()} >= set(kept)
        webui.kill()
    webui.start()
    young = webui.post(body()).headers["x-job-id"]
    assert webui.job(young, wait=30)["timestamp"] > time.time() + 9 * 365 * DAY
    page = Page(webui.client)
    assert "2 jobs are older than the retention" in until(page.look)
    assert {job["id"] for job in webui.jobs()} == {*kept, young}
    page.call("job_tracker_action", "purge")
    until(lambda: {job["id"] for job in webui.jobs()} == {young}, what="Purge Now removes them")
    until(lambda: "are older than the retention" not in page.look(), what="nothing is kept any more")


def test_a_clock_that_is_put_right_later(start, clock):
    """It was ahead at the start, as on a board without a battery, and purges by age go on when it is right."""
    webui = start(*QUICK, scripts={"a-clock": clock.script})
    job_id = webui.post(body()).headers["x-job-id"]
    webui.job(job_id, wait=30)
    webui.kill()
    clock.set(100 * DAY)
    webui.start()
    until(lambda: any("The clock may be wrong" in line for line in webui.our_log()), what="it is said")
    clock.set(0)
    assert webui.job(job_id)["status"] == "Completed"


@pytest.mark.parametrize("change", [-7200, 7200, 10 * 365 * DAY])
def test_a_clock_that_is_set_while_a_job_runs(start, clock, change):
    webui = start(*QUICK, scripts={"a-clock": clock.script})
    gate, began = webui.gate(), time.monotonic()
    waiting = webui.gate()
    first = webui.send(body(standin={"hold": gate}, steps=4)).job_id()
    second = webui.send(body(standin={"hold": waiting}, steps=4)).job_id()
    until(lambda: webui.client.get("/sdapi/v1/progress").json()["state"]["sampling_step"] == 3)
    clock.set(change)
    jobs = [webui.job(first, images=False)]
    gate.open()
    jobs.append(webui.job(first, wait=30))
    webui.until_status(second, "Processing")
    until(lambda: webui.job(second)["progress"], what="the next one is at work")
    jobs.append(webui.job(second, images=False))
    waiting.open()
    jobs.append(webui.job(second, wait=30))
    for job in jobs:
        assert job["eta"] is None or 0 <= job["eta"] < 60, job
        for earlier, later in (("timestamp", "started"), ("started", "finished")):
            if job[later] is not None:
                assert 0 <= job[later] - job[earlier] <= time.monotonic() - began + 1, job
    assert [job["status"] for job in jobs] == ["Processing", "Completed"] * 2
    assert jobs[0]["progress"] == jobs[2]["progress"] == 0.75


def test_a_job_of_a_webui_that_was_killed_has_no_end(start):
    """Nobody knows when it was, and the time until the next start is no part of it."""
    webui = start("--api" if MODES[0] == "ui" else QUICK[0])
    job_id = webui.send(body(standin={"hold": webui.gate()})).job_id()
    webui.until_status(job_id, "Processing")
    until(lambda: webui.records()[job_id]["status"] == "Processing")
    webui.kill()
    webui.start()
    job = webui.job(job_id)
    assert (job["status"], job["finished"]) == ("Failed", None)
    assert job["started"] is not None
    page = Page(webui.client)
    assert '<td class="seconds"></td>' in page.look()
    assert "<dt>Took</dt>" not in page.look(job=job_id)


def test_the_oldest_go_when_their_files_are_too_large(start):
    """Within a minute of a job's end, and at a start."""
    webui = start(*QUICK)
    jobs = []

    def generate() -> str:
        jobs.append(webui.post(body()).headers["x-job-id"])
        return webui.job(jobs[-1], wait=30)["status"]

    assert [generate() for _ in range(3)] == ["Completed"] * 3
    until(webui.is_idle)
    size = sum(webui.records()[job_id]["bytes"] for job_id in jobs)
    webui.kill()
    webui.environ["TRACKER_MAX_GB"] = f"{size * 0.9 / 10**9:.12f}"
    webui.start()
    until(lambda: jobs[0] not in webui.records(), what="the oldest goes at the start")
    assert [job["id"] for job in webui.jobs()] == jobs[:0:-1]
    assert generate() == "Completed"
    until(lambda: jobs[1] not in webui.records(), 60, what="the oldest goes after a job's end")
    until(lambda: {path.name[:8] for path in webui.images()} == set(jobs[2:]), what="with its files")
    assert webui.client.get(f"/sdapi/v1/job/{jobs[1]}").status_code == 404
    lines = until(lambda: [line for line in webui.our_log() if "Removed the oldest: 1 job, 1 image," in line])
    assert "TRACKER_MAX_GB is" in lines[-1]
