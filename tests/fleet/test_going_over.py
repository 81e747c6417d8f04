"""The command `copy`: a webui's jobs and images go into a database and a bucket, and back, also through kills."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from inside import SCRIPT, a_job, an_answer, pixels

from harness import QUICK, SHAPE, done, hold_the_queue, submit, until

JOBS = 600  # more than one page


class Command:
    """The command as the README has it, as a process of its own."""

    def __init__(self, extension: Path, environ: Dict[str, str]):
        self.script = extension / "scripts" / "job_tracker.py"
        if not extension.exists():
            self.script.parent.mkdir(parents=True)
            shutil.copy(str(SCRIPT), str(self.script))
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("TRACKER_")}
        self.environ.update(environ)

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(self.script), "copy", *words]
        return subprocess.Popen(command, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, *words: str, status: int = 0) -> str:
        process = self.start(*words)
        said = process.communicate(timeout=120)[0].decode()
        assert process.returncode == status, said
        return said


@pytest.fixture
def environ(database, bucket) -> Dict[str, str]:
    return {"TRACKER_STORE": database.url, "TRACKER_IMAGES": bucket.url, **bucket.environ}


def jobs_in(script: Any, folder: Path, environ: Optional[Dict[str, str]] = None) -> List[Any]:
    """All jobs, by the stores, without who ran them. All have their images, byte for byte."""
    settings = script.Settings(str(folder), {"TRACKER_DATA_DIR": str(folder), **(environ or {})})
    store, images = script.open_stores(settings)
    try:
        jobs, cursor = [], None
        while not jobs or cursor is not None:
            page = store.query(script.Filter(), 1000, cursor)
            jobs.extend(page.jobs)
            cursor = page.cursor
        for job in jobs[::50]:
            for number, image in enumerate(job.images):
                assert b"".join(images.read(image.name)) == pixels(job.id, number)
        return [job._replace(owner=None) for job in jobs]
    finally:
        store.close()


def make_jobs(script: Any, folder: Path, dice: Any) -> None:
    store, images = script.JobStore(str(folder)), script.ImageStore(str(folder / "images"))
    try:
        for number in range(JOBS):
            job = a_job(script, dice, timestamp=1736712000 + number, owner="dead")
            job = images.save(job, an_answer(script, job.id, 1))._replace(status="Completed")
            put = store.put(job, new=True)
        put.result(60)
    finally:
        store.close()


def test_there_and_back_through_kills(script, tmp_path, dice, environ, database, monkeypatch):
    files, other, local = (tmp_path / name for name in ("files", "other", "local"))
    files.mkdir()
    make_jobs(script, files, dice)
    command = Command(tmp_path / "extension", environ)
    for name, value in environ.items():  # the stores that the test itself opens
        monkeypatch.setenv(name, value)

    def count() -> int:
        return database.execute("select count(*) from job_tracker_jobs")[0][0] if has_table() else 0

    def has_table() -> bool:
        return database.execute("select to_regclass('job_tracker_jobs')")[0][0] is not None

    killed = command.start("--to-fleet", "--data-dir", str(files))
    until(lambda: count() or killed.poll() is not None, what="the first page is copied")
    killed.kill()
    killed.communicate()
    assert 0 < count() < JOBS
    before = count()
    said = command.run("--to-fleet", "--data-dir", str(files))
    assert f"{JOBS - before:,} jobs were copied, {before:,} were there already" in said
    assert f"0 jobs were copied, {JOBS:,} were there already" in command.run("--to-fleet", "--data-dir", str(files))
    ours = jobs_in(script, files)
    assert len(ours) == JOBS and jobs_in(script, local, environ) == ours

    other.mkdir()
    killed = command.start("--to-files", "--data-dir", str(other))
    until(lambda: list(other.glob("images/*/*.json")) or killed.poll() is not None, what="the first image is back")
    killed.kill()
    killed.communicate()
    command.run("--to-files", "--data-dir", str(other))
    assert jobs_in(script, other) == ours
    leftover = {path.name for path in other.glob("images/*/*") if path.name.endswith(".part")}
    assert len(leftover) <= script.Migration.THREADS
    names = [{path.name for path in folder.glob("images/*/*")} for folder in (files, other)]
    assert names[0] == names[1] - leftover


@pytest.mark.skipif(SHAPE == "sdnext", reason="its lock keeps no order")
def test_webuis_go_over(start, start_fleet, environ):
    """What a webui had on files is there at another one, and what waited is generated."""
    webui = start(*QUICK)
    completed = webui.job(done(webui, "completed"))
    failed = submit(webui, "failed", standin={"fail": "OutOfMemoryError"})
    webui.job(failed, wait=30)
    running = hold_the_queue(webui)
    waiting = [submit(webui, f"number {number}") for number in range(3)]
    webui.kill()
    said = Command(webui.extension, environ).run("--to-fleet", status=3)
    assert "2 jobs were copied" in said and "3 that waited were moved" in said and "1 had not ended" in said
    (one,) = start_fleet(1)
    assert [one.job(job_id, wait=60)["status"] for job_id in waiting] == ["Completed"] * 3
    assert {**one.job(completed["id"]), "image_urls": []} == {**completed, "image_urls": []}
    answer = one.client.post(f"/sdapi/v1/job/{failed}/retry")
    assert answer.status_code == 202
    assert one.job(answer.json()["id"], wait=60)["status"] == "Failed"
    assert one.client.get(f"/sdapi/v1/job/{running}").status_code == 404

    # The webui of before ends what it left, without any of the jobs that were moved.
    webui.start()
    assert webui.job(running)["status"] == "Failed"
    assert {job["id"] for job in webui.jobs()} == {completed["id"], failed, running}


def test_a_bucket_that_is_away(script, tmp_path, dice, environ, bucket):
    """It says so, and the next run goes on."""
    store, images = script.JobStore(str(tmp_path)), script.ImageStore(str(tmp_path / "images"))
    job = a_job(script, dice)
    job = images.save(job, an_answer(script, job.id, 1))._replace(status="Completed")
    store.put(job, new=True).result(60)
    store.close()
    command = Command(tmp_path / "extension", environ)
    bucket.kill()
    said = command.run("--to-fleet", "--data-dir", str(tmp_path), status=1)
    assert "Not all could be copied" in said and "Traceback" not in said
    assert environ["AWS_SECRET_ACCESS_KEY"] not in said
    bucket.start()
    assert "1 jobs were copied" in command.run("--to-fleet", "--data-dir", str(tmp_path))
