"""No end of a job is shown before its record is on disk, so that no crash takes back what somebody has seen."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from conftest import Start
from inside import WrappedOs, an_answer, files_are_whole, make_tracker, pixels, set_constants
from system import System

from harness import MODES, QUICK, Page, Webui, body, until

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
        said = any("1 jobs that a webui left behind have ended: 1 Completed" in line for line in webui.our_log())
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


# The same, without a webui


def test_a_line_of_a_neighbour_is_synced_before_it_is_shown(script, tmp_path):
    """It may have been killed before it did that itself."""
    calls: List[str] = []
    job = script.Job("NEWJOB00", "txt2img", script.PENDING, int(time.time()), None, "")

    def note(file: int) -> None:
        os.fsync(file)
        calls.append(os.readlink(f"/proc/self/fd/{file}"))

    def die(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith("jobs.json"):
            os._exit(9)

    neighbour = os.fork()
    if neighbour == 0:
        try:
            until((tmp_path / "begun").exists)
            store = script.JobStore(str(tmp_path))
            store.query(script.Filter(), 1)
            script.os = WrappedOs(fsync=die)
            store.put(job, new=True).result()
        finally:
            os._exit(1)
    tracker = make_tracker(script, tmp_path)
    until(lambda: tracker.housekeeper.next_purge, what="it has looked for jobs left behind")
    script.os = WrappedOs(fsync=note)
    (tmp_path / "begun").touch()
    assert os.waitpid(neighbour, 0)[1] == 9 << 8, "it died where it was to sync"
    assert tracker.get(job.id).status == "Pending"
    assert str(tmp_path / "jobs.json") in calls
    tracker.close()


def left_behind(script: Any, folder: Path, images: int, lost: Callable[[Any, Any], Any]) -> Any:
    """The job, at the next start, of a process that was killed after storing so many images; some files were lost."""
    tracker = make_tracker(script, folder)
    until(lambda: tracker.housekeeper.next_purge, what="it has looked for jobs left behind")
    job = script.Job(
        tracker.store.reserve_id(), "txt2img", script.PROCESSING, int(time.time()), None, "", started=time.time()
    )
    tracker.store.put(job._replace(owner="00000000"), new=True).result()
    saved = tracker.images.save(job, an_answer(script, job.id, images))
    tracker.images.remove(lost(tracker.images, saved))
    tracker.close().result(60)
    tracker = make_tracker(script, folder)
    found = tracker.get(job.id)
    if found.status == script.COMPLETED:
        assert files_are_whole(tracker, found)
        assert found.bytes == saved.bytes and found.images == saved.images and found.prompt == job.id
    tracker.close()
    return found


def test_a_folder_that_is_a_link(script, tmp_path):
    """Nothing is taken from behind it, and the job does not stay without an end."""
    tracker = make_tracker(script, tmp_path)
    until(lambda: tracker.housekeeper.next_purge, what="it has looked for jobs left behind")
    job = script.Job(
        tracker.store.reserve_id(), "txt2img", script.PROCESSING, int(time.time()), None, "", owner="00000000"
    )
    tracker.store.put(job, new=True).result()
    tracker.images.save(job, an_answer(script, job.id, 1))
    (tmp_path / "images" / tracker.images.day_of(job)).rename(tmp_path / "elsewhere")
    (tmp_path / "images" / tracker.images.day_of(job)).symlink_to(tmp_path / "elsewhere")
    tracker.close().result(60)
    tracker = make_tracker(script, tmp_path)
    assert tracker.get(job.id).status == "Failed"
    tracker.close()


@pytest.mark.parametrize(
    "images, lost, status",
    [
        (0, lambda images, job: [], "Completed"),
        (1, lambda images, job: [], "Completed"),
        (12, lambda images, job: [], "Completed"),
        (2, lambda images, job: [images.answer_name(job)], "Failed"),
        (2, lambda images, job: images.files_of(job), "Failed"),
        (2, lambda images, job: [image.name for image in job.images[:1]], "Failed"),
        (3, lambda images, job: [image.name for image in job.images[1:2]], "Failed"),
    ],
)
def test_what_a_crash_left(script, tmp_path, images, lost, status):
    job = left_behind(script, tmp_path, images, lost)
    assert job.status == status
    assert job.finished is None
    assert job.error == (None if status == "Completed" else "The webui ended before the generation did")


def test_images_that_cannot_be_looked_at_now(script, tmp_path):
    """A job is not failed for a disk that may be back in a moment."""
    failing = [True]

    def listdir(path: str) -> Any:
        if failing and "images" in str(path):
            raise OSError(5, "Input/output error", path)
        return os.listdir(path)

    tracker = make_tracker(script, tmp_path)
    until(lambda: tracker.housekeeper.next_purge, what="it has looked for jobs left behind")
    job = script.Job(
        tracker.store.reserve_id(), "txt2img", script.PROCESSING, int(time.time()), None, "", owner="00000000"
    )
    tracker.store.put(job, new=True).result()
    tracker.images.save(job, an_answer(script, job.id, 1))
    tracker.close().result(60)
    script.os = WrappedOs(listdir=listdir)
    set_constants(script, LOOK_EVERY=0.05, RECOVER_EVERY=0.1)
    tracker = make_tracker(script, tmp_path)
    assert tracker.get(job.id).status == "Processing"
    failing.clear()
    until(lambda: tracker.get(job.id).status == "Completed", what="it is looked at again")
    assert b"".join(tracker.images.read(tracker.get(job.id).images[0].name)) == pixels(job.id, 0)
    tracker.close()


def test_the_answer_is_the_last_file(script, tmp_path):
    """So where it is, all is. Also after a power cut: what came before it was synced, names too."""
    steps: List[str] = []

    def replace(source: str, target: str) -> None:
        os.replace(source, target)
        steps.append(Path(target).name)

    def fsync(file: int) -> None:
        os.fsync(file)
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.is_dir():
            steps.append(f"sync {path.name}")

    images = script.ImageStore(str(tmp_path / "images"))
    script.os = WrappedOs(replace=replace, fsync=fsync)
    job = script.Job("AAAAAAAA", "txt2img", script.PROCESSING, 1736712000, None, "")
    rest = json.dumps({"images": [], "parameters": {"mask": "x" * 2000}, "info": "{}"}).encode()
    images.save(job, an_answer(script, job.id, 2)._replace(rest=rest))
    assert steps[-7:] == [
        "AAAAAAAA_0.png",
        "AAAAAAAA_1.png",
        "AAAAAAAA.brief.json",
        "sync 2025-01-12",
        "AAAAAAAA.json",
        "sync 2025-01-12",
        "sync images",
    ]


def test_every_end_is_told_once_and_not_before_it_is_on_disk(script, tmp_path):
    """Of jobs that were generated, failed or cancelled, and of those that a webui left behind on a full disk."""
    told: List[str] = []
    script.JobStore.RETRY = 0.05

    class Tracker(script.Tracker):
        def _ended(self, job: Any) -> None:
            assert json.loads((tmp_path / "jobs.json").read_text())[job.id]["status"] == job.status
            told.append(f"{job.prompt} {job.status}")
            super()._ended(job)

    def a_job(prompt: str, **fields: Any) -> Any:
        return script.Job(
            tracker.store.reserve_id(), "txt2img", script.PENDING, int(time.time()), None, prompt=prompt, **fields
        )

    script.Tracker = Tracker
    tracker = make_tracker(script, tmp_path)
    until(lambda: tracker.housekeeper.next_purge, what="it has looked for jobs left behind")
    jobs = {prompt: a_job(prompt) for prompt in ("done", "failed", "cancelled")}
    for job in jobs.values():
        tracker.accept(job, lambda: tracker.fail(jobs["cancelled"].id, "Cancelled") or True).result()
    tracker.finish(jobs["done"].id, an_answer(script, jobs["done"].id, 1))
    tracker.fail(jobs["failed"].id, "no reason")
    tracker.fail(jobs["failed"].id, "again")
    assert tracker.cancel(jobs["cancelled"].id)
    until(lambda: len(told) >= 3)
    tracker.store.put(a_job("left", owner="00000000"), new=True).result()
    write_at = script.write_at

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    script.write_at = fail
    tracker.recover().result()
    script.write_at = write_at
    until(lambda: len(told) >= 4)
    tracker.recover().result()
    tracker.store.put(a_job("left again", owner="00000000"), new=True).result()
    tracker.recover().result()
    assert sorted(told) == ["cancelled Failed", "done Completed", "failed Failed", "left Failed", "left again Failed"]
    tracker.close()
