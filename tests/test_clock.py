"""A clock that is wrong, or is set while the webui runs, removes nothing and makes no time nonsense."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import NewTracker
from inside import an_answer

from harness import MODES, QUICK, Page, body, until

DAY = 86400

# An extension that sets the clock of its process by as many seconds as a file says.
CLOCK = """
import time

real = time.time

def wrong():
    try:
        with open({path!r}) as file:
            return real() + float(file.read() or 0)
    except OSError:
        return real()

time.time = wrong
"""


class Clock:
    def __init__(self, folder: Path):
        self.path = folder / "clock"
        self.script = CLOCK.format(path=str(self.path))

    def set(self, seconds: float) -> None:
        self.path.write_text(str(seconds))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


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
    page.call("job_tracker_purge")
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


# Purges, without a webui


@pytest.fixture
def tracker(new_tracker: NewTracker) -> Callable[..., Any]:
    def make(retention: str = "30") -> Any:
        made = new_tracker(TRACKER_RETENTION=retention)
        until(lambda: made.housekeeper.next_purge, what="the purge at the start")
        return made

    return make


def put(script: Any, tracker: Any, job_id: str, days: float) -> None:
    job = script.Job(job_id, "txt2img", "Completed", int(time.time() - days * DAY), None, "", owner="00000000")
    tracker.store.put(tracker.images.save(job, an_answer(script, job_id, 1)), new=True).result()


def ids(script: Any, tracker: Any) -> Any:
    return {job.id for job in tracker.store.query(script.Filter(), 1000).jobs}


def purge(script: Any, tracker: Any, ahead: float = 0.0, running: float = 0.0) -> Any:
    """A purge that nobody asked for, by a clock that is ahead by so many days, and after so many days of running."""

    class Time:
        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

        def time(self) -> float:
            return time.time() + ahead * DAY

        def monotonic(self) -> float:
            return time.monotonic() + running * DAY

    script.time = Time()
    try:
        return tracker.housekeeper.purge(asked_for=False)
    finally:
        script.time = time


def test_a_clock_that_was_never_set(script, tracker, caplog):
    one = tracker()
    put(script, one, "OLDER000", 40)
    put(script, one, "YOUNGER0", 1)
    orphan = one.images.save(script.Job("ORPHAN00", "txt2img", "Failed", 0, None, ""), an_answer(script, "ORPHAN00", 1))
    now = time.time() / DAY
    for day in (0.5, 18261):  # 1970, and the last of 2019
        assert purge(script, one, day - now) == script.Purged()
    assert "nothing is purged" in caplog.text
    assert ids(script, one) == {"OLDER000", "YOUNGER0"} and one.images.size(orphan.images[0].name)
    assert purge(script, one).jobs == 1
    assert ids(script, one) == {"YOUNGER0"}


def test_all_are_too_old_at_the_start(script, tracker, tmp_path):
    """Either the clock is ahead, or nobody has generated for so long. Only a younger one tells."""
    first = tracker("off")
    put(script, first, "OLDER000", 50)
    put(script, first, "OLDER001", 40)
    first.close()
    second = tracker()
    assert ids(script, second) == {"OLDER000", "OLDER001"} and second.housekeeper.kept_for_clock == 2
    put(script, second, "YOUNGER0", 0)
    assert purge(script, second) == script.Purged(), "the young one may be of the same wrong clock"
    assert purge(script, second, 40).jobs == 0, "so it is when the clock jumps"
    second.close().result(60)
    time.sleep(1.1)  # the times of jobs are whole seconds
    third = tracker()
    assert ids(script, third) == {"YOUNGER0"}, "a start that finds a younger one believes the clock"
    assert third.housekeeper.kept_for_clock == 0


def test_a_webui_that_is_started_now_and_then(script, tracker):
    """Its pauses are longer than its retention. What was too old by the time of the last job goes all the same."""
    for number in range(4):
        one = tracker("1")
        kept = ids(script, one)
        assert kept == ({f"J{number - 1:07}"} if number else set())
        one.close().result(60)
        age(one, 2)  # as if two days had passed
        one = tracker("off")
        put(script, one, f"J{number:07}", 2)
        one.close().result(60)


def age(tracker: Any, days: float) -> None:
    """Makes all jobs older."""
    path = Path(tracker.settings.data_folder) / "jobs.json"
    records = json.loads(path.read_text())
    for record in records.values():
        if record:
            record["timestamp"] -= int(days * DAY)
    path.write_text(json.dumps(records))


def test_what_grows_too_old_while_the_webui_runs(script, tracker):
    """All of them may go: time has passed by a clock that nobody sets."""
    one = tracker()
    put(script, one, "OLDER000", 29.9)
    assert purge(script, one, ahead=1, running=2).jobs == 1
    assert ids(script, one) == set()


def test_asked_for_all_that_is_old_goes(script, tracker):
    first = tracker("off")
    put(script, first, "OLDER000", 40)
    first.settings.retention_days = 30.0
    assert purge(script, first).jobs == 0
    assert first.housekeeper.purge().jobs == 1


def test_times_on_disk(script, tracker, tmp_path):
    one = tracker("off")
    job = script.Job(one.store.reserve_id(), "txt2img", script.PENDING, int(time.time()), None, "")
    one.accept(job, lambda: True).result()
    one.start(job.id)
    one.fail(job.id, "no")
    until(lambda: one.get(job.id).ended)
    record = json.loads((tmp_path / "jobs.json").read_text())[job.id]
    assert record["timestamp"] <= record["started"] <= record["finished"] <= time.time() + 1
