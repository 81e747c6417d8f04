"""What a job says of itself while it waits and runs: its place in the queue, how far it is, and how long it takes."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Any, Dict, List

import pytest
from inside import an_answer, load_script, make_tracker, when_ended
from neighbours import HOLDS, UI, FromUi, held_at, reached

from harness import QUICK, SHAPE, Start, Webui, body, connect, submit, until


@pytest.fixture(scope="module")
def webui(start_shared: Start) -> Webui:
    """One whose UI generates as well."""
    return start_shared(*QUICK, scripts={"ui": UI, "holds": HOLDS})


def held_job(webui: Webui, **fields: Any) -> Dict[str, Any]:
    """A job that waits with its last step undone until the latest gate is opened."""
    job_id = connect(webui, standin={"hold": webui.gate()}, **fields)
    steps = fields.get("steps", 2)

    def is_held() -> Any:
        state = webui.client.get("/sdapi/v1/progress?skip_current_image=true").json()["state"]
        job = webui.job(job_id)
        return job["status"] == "Processing" and state["sampling_step"] == steps - 1 and job

    return until(is_held, what="the job is at its last step")


def test_from_queue_to_end(webui):
    held = held_job(webui)
    jobs = [submit(webui, standin={"seconds": 0.4}, steps=10), submit(webui)]
    assert [webui.job(job_id)["queue_position"] for job_id in jobs] == [1, 2]
    for job in map(webui.job, jobs):
        assert job["status"] == "Pending" and job["progress"] is job["eta"] is job["started"] is None
    assert held["queue_position"] is None
    webui.gates[-1].open()

    seen: List[Dict[str, Any]] = []

    def has_ended() -> bool:
        seen.append(webui.job(jobs[0], images=False))
        return seen[-1]["status"] == "Completed"

    until(has_ended, what="the job ends")
    running = [job for job in seen if job["status"] == "Processing"]
    shares = [job["progress"] for job in running]
    assert shares == sorted(shares) and len(set(shares)) > 3, shares
    assert all(0 <= share <= 1 for share in shares)
    assert all(job["eta"] is None or 0 <= job["eta"] < 60 for job in running)
    assert all(job["eta"] is not None for job in running if job["progress"] > 0)
    assert all(job["queue_position"] is None for job in running)
    assert seen[-1]["progress"] is seen[-1]["eta"] is None
    assert webui.job(jobs[1], wait=30)["status"] == "Completed"


@pytest.mark.parametrize("fields, share", [({}, 0.5), ({"n_iter": 2}, 0.25), ({"steps": 10}, 0.9)], ids=str)
def test_share(webui, fields, share):
    job = held_job(webui, **fields)
    assert job["progress"] == pytest.approx(share)
    assert job["eta"] >= 0
    listed = next(one for one in webui.jobs() if one["id"] == job["id"])
    assert listed["progress"] == pytest.approx(share)


def test_a_job_that_ends_while_it_is_described(tmp_path):
    """Then it is told as it was, whole."""
    script = load_script()
    tracker = make_tracker(script, tmp_path)
    job = script.Job(tracker.store.reserve_id(), "txt2img", script.PENDING, int(time.time()), None, "a cat")
    tracker.accept(job, lambda: True, b"").result()
    tracker.start(job.id)
    running = tracker.get(job.id)
    tracker.generated()
    tracker.finish(job.id, an_answer(script, job.id, 1))
    ended = when_ended(tracker, job.id)
    assert tracker.describe(running)["status"] == "Processing"
    assert (tracker.describe(running)["progress"], tracker.describe(running)["eta"]) == (1, 0)
    assert tracker.describe(ended)["progress"] is None
    tracker.close()


def test_places_move_up(webui):
    held_job(webui)
    jobs = [submit(webui) for _ in range(5)]
    assert webui.client.post(f"/sdapi/v1/job/{jobs[1]}/cancel").status_code == 200
    assert [webui.job(job_id)["queue_position"] for job_id in jobs] == [1, None, 2, 3, 4]
    webui.gates[-1].open()
    assert webui.job(jobs[-1], wait=30)["queue_position"] is None


def test_before_it_begins(webui):
    """The webui's state is still that of the generation before, which may have failed and left anything."""
    failing = held_job(webui, n_iter=2)
    held = webui.gate()
    job_id = submit(webui, **held_at("prepare", held))
    webui.gates[-2].open()
    webui.job(failing["id"], wait=30)
    until(lambda: reached(held), what="the job has the lock")
    job = webui.job(job_id)
    assert job["status"] == "Processing"
    assert (job["progress"], job["eta"]) == (0, None)


def test_after_it_ended(webui):
    """Its images are encoded and stored while another generation, one of the UI, moves the webui's state."""
    held, gate = webui.gate(), webui.gate()
    job_id = submit(webui, **held_at("encode", held))
    until(lambda: reached(held), what="its images are encoded")
    assert (webui.job(job_id)["progress"], webui.job(job_id)["eta"]) == (1, 0)
    from_ui = FromUi(webui, gate)
    from_ui.until_it_runs()
    host = webui.client.get("/sdapi/v1/progress?skip_current_image=true").json()
    assert 0 < host["progress"] < 1
    job = webui.job(job_id)
    assert job["status"] == "Processing"
    assert (job["progress"], job["eta"]) == (1, 0)

    # One that waits has none at all.
    job = webui.job(submit(webui))
    assert job["status"] == "Pending" and job["queue_position"] == 1
    assert job["progress"] is job["eta"] is None
    gate.open()
    held.open()
    from_ui.result()


def test_a_job_of_another_process(pair):
    one, two = pair
    jobs = [held_job(one)["id"], connect(one)]
    held_job(two)
    for job_id, status in zip(jobs, ("Processing", "Pending")):
        job = two.job(job_id)
        assert job["status"] == status
        assert job["queue_position"] is job["progress"] is job["eta"] is None


def test_in_the_answer_of_a_cancel(webui):
    job = held_job(webui)
    answer = webui.client.post(f"/sdapi/v1/job/{job['id']}/cancel").json()
    assert answer["progress"] is None or 0 <= answer["progress"] <= 1
    assert webui.job(job["id"], wait=30)["progress"] is None


# The webui's own view of it


@pytest.fixture(scope="module")
def with_tasks(start_shared: Start) -> Webui:
    if SHAPE == "sdnext":
        pytest.skip("SD.Next knows no force_task_id")
    return start_shared("--api")


def task(webui: Webui, name: str) -> Dict[str, Any]:
    answer = webui.client.post("/internal/progress", json={"id_task": name, "id_live_preview": -1})
    assert answer.status_code == 200
    return answer.json()


def test_the_id_is_the_task(with_tasks):
    first = held_job(with_tasks, steps=12)
    second = connect(with_tasks)
    running, waiting = task(with_tasks, first["id"]), task(with_tasks, second)
    assert (running["active"], running["queued"], running["completed"]) == (True, False, False)
    assert running["progress"] == pytest.approx(first["progress"])
    kind, _, preview = running["live_preview"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(preview).startswith(b"\x89PNG")
    assert (waiting["active"], waiting["queued"]) == (False, True) and "1/1" in waiting["textinfo"]
    pending = with_tasks.client.get("/internal/pending-tasks").json()
    assert pending == {"size": 1, "tasks": [second]}
    with_tasks.gates[-1].open()
    for job_id in (first["id"], second):
        job = with_tasks.job(job_id, wait=30)
        assert job["parameters"]["force_task_id"] == job_id
        done = task(with_tasks, job_id)
        assert (done["active"], done["queued"], done["completed"]) == (False, False, True)


@pytest.mark.parametrize("kind", ["txt2img", "img2img"])
def test_the_task_of_the_client_is_its_own(with_tasks, kind):
    name = f"task({uuid.uuid4()})"
    answer = with_tasks.post(body(kind=kind, force_task_id=name), kind)
    assert answer.json()["parameters"]["force_task_id"] == name
    assert task(with_tasks, name)["completed"] is True
    assert task(with_tasks, answer.headers["x-job-id"])["completed"] is False


@pytest.mark.parametrize("value", [None, ""])
def test_no_task_of_the_client(with_tasks, value):
    answer = with_tasks.post(body(force_task_id=value))
    assert answer.json()["parameters"]["force_task_id"] in (answer.headers["x-job-id"], value or "")
    if value is None:
        assert task(with_tasks, answer.headers["x-job-id"])["completed"] is True


def test_a_task_that_failed_is_not_taken_for_the_next(with_tasks):
    """The webui goes on to call it active, since it never heard of its end."""
    gate = with_tasks.gate()
    failed = submit(with_tasks, standin={"hold": gate, "fail": "RuntimeError"})
    gate.open()
    assert with_tasks.job(failed, wait=30)["status"] == "Failed"
    assert task(with_tasks, failed)["active"] is True
    job = with_tasks.job(failed)
    assert job["progress"] is job["eta"] is job["queue_position"] is None
    following = held_job(with_tasks, steps=4)
    assert following["progress"] == pytest.approx(0.75)
    assert with_tasks.job(failed)["progress"] is None
