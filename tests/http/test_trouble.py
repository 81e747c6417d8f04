"""When our own disk or code fails, generations go on, and clients and pages are told why."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from typing import Any, Callable, Iterator, List

import httpx
import pytest
from disks import ROOT, mounted, moved_away
from system import System

from harness import (
    ASYNC,
    CLOSE,
    MODE_FLAGS,
    MODES,
    QUICK,
    Page,
    Webui,
    assert_tracks,
    body,
    hold_the_queue,
    is_cut,
    saved,
    submit,
    until,
    without_time,
)


@pytest.fixture(scope="module")
def broken(start_shared, tmp_path_factory):
    """A webui whose system can be made to fail: `broken.fails(…)`, as in system.py."""
    system = System(tmp_path_factory.mktemp("system"))
    # No ID is dealt ahead of time, so that it can be seen what happens when none can be.
    webui = start_shared(*QUICK, scripts=system.scripts, constants={"SPARE_IDS": 0, "RETRY": 0.5})
    webui.fails = system.fails
    return webui


# What goes wrong, as calls, the file that they are for, and how. The disk fails as disks do, and anything fails as
# nobody expects it.
TROUBLES = {
    "no ID can be dealt": ("choice", "", "RuntimeError"),
    "jobs.json cannot be written": ("pwrite write", "jobs.json", "EIO"),
    "jobs.json cannot be synced": ("fsync", "jobs.json", "EIO"),
    "jobs.json fails as nobody expects": ("pwrite write", "jobs.json", "RuntimeError"),
    "images cannot be written": ("pwrite write", "images", "EIO"),
    "images fail as nobody expects": ("open", "images", "RuntimeError"),
    "the answer cannot be read": ("loads", "", "MemoryError"),
    "the webui's state cannot be read": ("time_start", "", "RuntimeError"),
}
UNTRACKED = ["no ID can be dealt", "jobs.json cannot be written", "jobs.json cannot be synced"]


def trouble(webui, name):
    calls, of, by = TROUBLES[name]
    return webui.fails(calls, webui.data / of, by)


@pytest.fixture
def mended(broken):
    """The same; a test that leaves it with a job that never ends leaves it to no other."""
    yield broken
    if not broken.is_idle():
        broken.restart()


def own_lines(webui, start):
    return [line for line in webui.log[start:].splitlines() if line.startswith("[Job Tracker]")]


def assert_same_answer(response, own):
    assert response.status_code == 200
    named = re.compile(rb'"force_task_id":"[A-Za-z0-9]{8}"')
    assert without_time(named.sub(b'"force_task_id":null', response.content.lstrip(b" "))) == without_time(own.content)


def until_error(webui, job_id):
    """Waits until a job says what is wrong with it."""

    def has_error():
        job = webui.job(job_id)
        return job if job["error"] else None

    return until(has_error, what="the job has an error")


def test_images_that_cannot_be_opened(mended):
    """Not for the moment is 503, for who asks again gets them; not at all is what is lost."""
    job_id = mended.post(body()).headers["X-Job-ID"]
    job = mended.job(job_id, wait=30)
    path = f"/sdapi/v1/job/{job_id}"
    with mended.fails("open", mended.data / "images", "EMFILE"):
        answers = [mended.client.get(path), mended.client.get(path + "/images/0")]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert all(os.strerror(errno.EMFILE) in answer.json()["detail"] for answer in answers)
    assert mended.job(job_id) == job
    with mended.fails("open", mended.data / "images", "EIO"):
        shown = mended.job(job_id)
        assert (shown["images"], shown["error"]) == ([None], "1 of 1 images are no longer on disk")
        assert mended.client.get(path + "/images/0").status_code == 404
    assert mended.job(job_id) == job


@pytest.mark.parametrize("path", ["job/{}", "job/{}?wait=20", "job/{}/images/0"])
@pytest.mark.parametrize("coding", ["gzip", "identity"])
def test_a_stored_answer_that_breaks_has_no_clean_end(mended, path, coding):
    """The disk fails in the middle of an image. It is a line of the log, and a cut."""
    answer = mended.post(body(standin={"image_bytes": 3_000_000}))
    job_id = answer.headers["X-Job-ID"]
    mended.job(job_id, wait=30)
    position = len(mended.log)
    with mended.fails("pread", mended.data / "images", beyond=1_000_000):
        sent = mended.send_get("/sdapi/v1/" + path.format(job_id), {"Accept-Encoding": coding})
        with pytest.raises(ConnectionError):
            sent.content()
    assert "Traceback" not in mended.log[position:]
    assert len([line for line in own_lines(mended, position) if "breaks off" in line]) == 1
    assert mended.job(job_id)["images"] == answer.json()["images"]


def test_an_answer_that_breaks_has_no_clean_end(mended):
    """Also not on SD.Next, whose layers would make one."""
    with trouble(mended, "the answer cannot be read"), pytest.raises(httpx.RemoteProtocolError):
        mended.post(body(send_images=False, standin={"seconds": 0.5}))
    until(mended.is_idle)


@pytest.mark.parametrize("name", TROUBLES)
def test_generation_survives_our_failure(mended, alone, name):
    """Whatever breaks in us: the client gets its answer, and the log says what happened."""
    before, position = set(mended.records()), len(mended.log)
    own = alone(mended).post(body())
    with trouble(mended, name):
        response = mended.post(body())
        lines = until(lambda: own_lines(mended, position), 10, "the log says so")
    assert_same_answer(response, own)
    assert len(lines) <= 3, lines
    assert any(word in mended.log[position:] for word in ("sabotage", os.strerror(errno.EIO)))
    until(mended.is_idle, 10, "the job ends")
    for job_id in set(mended.records()) - before:
        job = mended.job(job_id)
        assert job["error"] if job["status"] == "Failed" else job["images"] == response.json()["images"]
    assert mended.client.get("/standin/threads").json()["total_tokens"] == 40
    assert_tracks(mended)


@pytest.mark.parametrize("name", UNTRACKED)
@pytest.mark.parametrize("standin", [{}, {"seconds": 1.2}, {"fail": "ValueError"}], ids=str)
def test_untracked_generations_name_no_job(mended, name, standin):
    """Whatever the client prefers, and whatever comes of it."""
    for prefer in ("", "respond-async, wait=1", "respond-async, wait=30"):
        if "seconds" in standin:  # longer than is waited for, or than it takes to be accepted
            standin = {"seconds": 1.2 if "wait=1" in prefer else 0.3}
        with trouble(mended, name):
            answer = mended.post(body(standin=standin), headers={"Prefer": prefer, **CLOSE})
        assert answer.status_code == (500 if "fail" in standin else 200)
        assert not {"x-job-id", "preference-applied", "location"} & set(answer.headers)


@pytest.mark.parametrize("name", UNTRACKED)
def test_a_promise_that_cannot_be_kept_is_not_given(mended, name):
    """And nothing is generated for it."""
    before = saved(mended)
    with trouble(mended, name):
        answer = mended.post(body(save_images=True), headers={"Prefer": "respond-async"})
    assert answer.status_code == 503 and answer.json()["detail"]
    assert not {"x-job-id", "preference-applied", "location"} & set(answer.headers)
    assert_tracks(mended)
    assert saved(mended) == before


@pytest.mark.parametrize("name", UNTRACKED)
def test_many_generations_survive_our_failure(mended, name):
    with trouble(mended, name):
        gate = mended.gate()
        sent = [mended.send(body(standin={"hold": gate}))] + [mended.send(body()) for _ in range(5)]
        gate.open()
        assert all(b'"images"' in one.to_end() for one in sent)
    assert_tracks(mended)


@pytest.mark.parametrize("name", ["jobs.json cannot be written", "jobs.json cannot be synced"])
def test_change_that_could_not_be_written_is_written_later(mended, name):
    """The disk fails between acceptance and the end."""
    gate = mended.gate()
    sent = mended.send(body(standin={"hold": gate}))
    job_id = sent.job_id()
    mended.until_status(job_id, "Processing")
    until(lambda: mended.records()[job_id]["status"] == "Processing")
    with trouble(mended, name):
        gate.open()
        assert b'"images"' in sent.to_end()
        job = until_error(mended, job_id)
        assert (job["status"], job["images"]) == ("Processing", [])
        assert job["error"] == f"The job has ended, but that could not be stored yet: {os.strerror(errno.EIO)}"
        assert mended.records()[job_id]["status"] == "Processing"
        waiting = mended.send_get(f"/sdapi/v1/job/{job_id}?wait=60")
    job = json.loads(waiting.content())
    assert (job["status"], job["error"], len(job["images"])) == ("Completed", None, 1)
    assert mended.records()[job_id]["status"] == "Completed"


def test_job_that_is_being_stored_does_not_take_the_progress_of_the_next(mended):
    gate = mended.gate()
    with mended.fails("replace", mended.data / "images", by="waiting"):
        first = mended.send(body()).job_id()
        second = mended.send(body(standin={"hold": gate}, steps=50)).job_id()
        mended.until_status(second, "Processing")
        job = mended.job(first, images=False)
        assert (job["status"], job["progress"]) == ("Processing", 1.0)
    gate.open()


# Trouble with the disk itself


@pytest.fixture(scope="module")
def elsewhere(start_shared, tmp_path_factory):
    """A webui whose data folder is elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere") / "deep" / "data"
    return start_shared(*QUICK, environ={"TRACKER_DATA_DIR": str(folder)})


def test_data_folder_elsewhere(elsewhere):
    assert_tracks(elsewhere)
    assert not (elsewhere.extension / "images").exists()
    assert not (elsewhere.extension / "jobs.json").exists()
    assert (elsewhere.extension / "config.json").exists()


def test_data_folder_replaced_by_a_file(elsewhere, alone):
    own = alone(elsewhere).post(body())
    position = len(elsewhere.log)
    with moved_away(elsewhere.data):
        elsewhere.data.write_text("in the way")
        response = elsewhere.post(body())
        assert_same_answer(response, own)
        assert "X-Job-ID" not in response.headers
        status = elsewhere.client.get("/sdapi/v1/jobs")
        assert status.status_code == 503 and status.json()["detail"]
    lines = own_lines(elsewhere, position)
    assert any("jobs.json cannot be" in line for line in lines), lines
    assert len(lines) <= 3, lines
    assert_tracks(elsewhere)


def test_data_folder_gone(elsewhere):
    """Somebody removed it all: it is made anew."""
    shutil.rmtree(str(elsewhere.data))
    assert_tracks(elsewhere)


def test_images_replaced_by_a_file(elsewhere, alone):
    """It is set aside, too."""
    own = alone(elsewhere).post(body())
    assert_tracks(elsewhere)
    position = len(elsewhere.log)
    with moved_away(elsewhere.data / "images"):
        (elsewhere.data / "images").write_text("in the way")
        response = elsewhere.post(body())
        assert_same_answer(response, own)
        assert_tracks(elsewhere)
    lines = own_lines(elsewhere, position)
    assert len(lines) == 1 and "set aside" in lines[0], lines
    assert_tracks(elsewhere)


def test_day_folder_is_a_link(elsewhere, tmp_path):
    """Nothing is written through it: it is set aside."""
    answer = elsewhere.post(body())
    elsewhere.job(answer.headers["X-Job-ID"], wait=30)
    until(elsewhere.is_idle)
    day = elsewhere.images()[-1].parent
    with moved_away(elsewhere.data / "images"):
        (elsewhere.data / "images").mkdir()
        (elsewhere.data / "images" / day.name).symlink_to(tmp_path)
        assert_tracks(elsewhere)
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "small", "size=1m"):
        yield tmp_path / "small"


PAGE = 4096


def fill(folder, but=0):
    """Leaves no page, or a few."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    os.truncate(str(path), path.stat().st_size - but * PAGE)
    return path


def test_full_disk_while_jobs_are_parked(start, small_disk):
    """202 is refused, nothing is half-kept, and who waits for his answer gets it."""
    (small_disk / "jobs.json.index3").mkdir()
    webui = start(*QUICK, environ={"TRACKER_DATA_DIR": str(small_disk)})
    assert_tracks(webui)
    hold_the_queue(webui)
    filler = fill(small_disk)
    before = set(small_disk.rglob("*.request.json"))
    for room in (0, 1):  # with none, and with some for the request but not for the record
        answer = webui.post(body("x" * 2000), headers=ASYNC)
        assert answer.status_code == 503 and "x-job-id" not in answer.headers, room
        os.truncate(str(filler), filler.stat().st_size - PAGE)
    waiting = webui.send(body())
    filler.unlink()
    webui.gates[-1].open()
    assert not is_cut(waiting)
    assert webui.job(submit(webui), wait=30)["status"] == "Completed"
    until(lambda: not set(small_disk.rglob("*.request.json")) - before, what="no request is left")
    assert {record["status"] for record in webui.records().values()} == {"Completed"}


def test_full_disk(start, alone, small_disk):
    """The generation's answer comes all the same, and when there is room again everything works, without a restart."""
    (small_disk / "jobs.json.index3").mkdir()  # it is in memory then, and takes and gives back no room
    webui = start(*QUICK, environ={"TRACKER_DATA_DIR": str(small_disk)})
    own = alone(webui).post(body())
    assert_tracks(webui)

    filler = fill(small_disk)
    position = len(webui.log)
    seen = set()
    for _ in range(30):  # what is left of the last page of jobs.json takes some
        response = webui.post(body())
        assert_same_answer(response, own)
        if "X-Job-ID" in response.headers:
            job = until_error(webui, response.headers["X-Job-ID"])
            assert job["status"] in ("Failed", "Processing"), "the disk has room for its end, or not"
            assert os.strerror(errno.ENOSPC) in job["error"]
        seen.add("X-Job-ID" in response.headers)
        webui.records()  # valid at all times
    assert False in seen, "at the end no job can be written"
    assert os.strerror(errno.ENOSPC) in webui.log[position:]
    assert webui.jobs(limit=1), "what is there can be read"

    gate = webui.gate()
    filler.unlink()
    sent = webui.send(body(batch_size=4, standin={"hold": gate}))
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    fill(small_disk, but=6)
    gate.open()
    assert b'"images"' in sent.to_end(), "the disk has room for some of the images"
    job = webui.job(job_id, wait=30)
    assert job["status"] == "Failed" and "could not be stored" in job["error"]

    filler.unlink()
    assert_tracks(webui)
    until(webui.is_idle)
    assert webui.records()[job_id]["status"] == "Failed"
    assert not [path for path in webui.images() if path.suffix == ".part"]
    known = {name for record in webui.records().values() for name in record["images"]}
    assert {str(path.relative_to(small_disk / "images")) for path in webui.images() if path.suffix == ".png"} == known


def test_disk_that_is_full_at_the_start(start, small_disk):
    filler = fill(small_disk)
    webui = start(*MODE_FLAGS[MODES[0]], environ={"TRACKER_DATA_DIR": str(small_disk)})
    assert webui.post(body()).json()["images"]
    assert "Traceback" not in webui.log
    assert len(webui.our_log()) <= 6, webui.our_log()
    filler.unlink()
    until(lambda: "X-Job-ID" in webui.post(body()).headers)
    assert_tracks(webui)


# Whatever goes wrong, nobody is told where our files lie. The log may say that


Trouble = Callable[[Webui], Any]


@contextlib.contextmanager
def a_file_for(webui: Webui, name: str) -> Iterator[None]:
    path = webui.data / name if name != "config.json" else webui.extension / name
    with moved_away(path):
        path.write_text("in the way") if name != "config.json" else path.mkdir()
        yield


@contextlib.contextmanager
def read_only(webui: Webui) -> Iterator[None]:
    folders = [webui.data, *(path for path in webui.data.glob("images/**/*") if path.is_dir()), webui.data / "images"]
    for folder in folders:
        folder.chmod(0o500)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o700)


# Calls that fail, and the file that they are for.
FAILURES = {
    "images cannot be written": ("replace", "images"),
    "images cannot be opened": ("open", "images"),
    "images cannot be listed": ("listdir", "images"),
    "jobs.json cannot be looked at": ("fstat", "jobs.json"),
    "jobs.json cannot be read": ("pread read", "jobs.json"),
    "jobs.json cannot be written": ("pwrite write", "jobs.json"),
    "jobs.json cannot be synced": ("fsync", "jobs.json"),
    "config.json cannot be written": ("replace", "config.json"),
    "the answer cannot be read": ("loads", "images"),
}


def failing(webui: Webui, name: str) -> Any:
    calls, of = FAILURES[name]
    return webui.fails(calls, (webui.extension if of == "config.json" else webui.data) / of)


TOLD_TROUBLES = {
    **{name: lambda webui, name=name: failing(webui, name) for name in FAILURES},
    "a file for the data folder": lambda webui: a_file_for(webui, "."),
    "a folder for config.json": lambda webui: a_file_for(webui, "config.json"),
    "a read-only folder": read_only,
}


@pytest.fixture(scope="module")
def webui(start_shared, tmp_path_factory) -> Webui:
    """A webui whose data folder has a name that is nowhere else."""
    data = tmp_path_factory.mktemp("kept") / "somewhere-secret"
    system = System(tmp_path_factory.mktemp("system"))
    webui = start_shared(*MODE_FLAGS[MODES[0]], environ={"TRACKER_DATA_DIR": str(data)}, scripts=system.scripts)
    webui.fails = system.fails
    return webui


TOLD = (
    *("nput/output error", "ot a directory", "ile exists", "it is no file", "ermission denied", "No space left"),
    "no longer on disk",
)


def how_it_goes(webui: Webui, job_id: str) -> str:
    """A job that has ended, or cannot be stored, or cannot be read."""

    def told() -> str:
        text = webui.client.get(f"/sdapi/v1/job/{job_id}?images=false&wait=0.1", headers=CLOSE).text
        return text if '"Processing"' not in text or '"error":null' not in text else ""

    return until(told, what="the job says how it goes")


def everything_said(webui: Webui, known: str) -> List[str]:
    """What clients and the tab are told, whatever they ask."""
    client, said = webui.client, []
    path, keyed = f"/sdapi/v1/job/{known}", {"Idempotency-Key": os.urandom(4).hex()}
    for ask in (
        lambda: webui.post(body(), headers=CLOSE),
        lambda: webui.post(body(), headers={**keyed, **CLOSE}),
        lambda: webui.post(body(), headers={"Idempotency-Key": "known", **CLOSE}),
        lambda: webui.post(body(), headers={"Prefer": "respond-async, wait=20", **CLOSE}),
        lambda: client.get("/sdapi/v1/jobs?images=false", headers=CLOSE),
        lambda: client.get("/sdapi/v1/jobs?q=cat", headers=CLOSE),
        lambda: client.get(path, headers=CLOSE),
        lambda: client.get(f"{path}/images/0", headers=CLOSE),
        lambda: client.post(f"{path}/cancel", headers=CLOSE),
    ):
        with contextlib.suppress(httpx.RemoteProtocolError):  # cut, since the head was out
            answer = ask()
            said.append(answer.text)
            if "X-Job-ID" in answer.headers:
                said.append(how_it_goes(webui, answer.headers["X-Job-ID"]))
    page = Page(client)
    page.call("job_tracker_action", "purge")
    said += [
        page.call(f"job_tracker_{name}", value).text
        for name, value in (("enabled", True), ("retention", "Off (keep all)"))
    ]
    until(lambda: "Purging" not in page.look(job=known), what="the purge has ended")
    return [*said, page.look(), page.look(job=known)]


def check_what_is_told(webui: Webui, trouble: Trouble) -> None:
    for job in webui.jobs(limit=1000):  # those of the trouble before say what that was
        webui.client.delete(f"/sdapi/v1/job/{job['id']}")
    known = webui.post(body(), headers={"Idempotency-Key": "known"}).headers["X-Job-ID"]
    assert webui.job(known, wait=30)["status"] == "Completed"
    until(webui.is_idle)
    assert not [text for text in everything_said(webui, known) if any(word in text for word in TOLD)]
    gate = webui.gate()
    accepted = webui.send(body(standin={"hold": gate})).job_id()
    webui.until_status(accepted, "Processing")
    until(lambda: webui.records()[accepted]["status"] == "Processing", what="that is on disk")
    with trouble(webui):
        gate.open()
        said = [how_it_goes(webui, accepted), *everything_said(webui, known)]
    told = [text for text in said if any(word in text for word in TOLD)]
    assert told
    for text in said:
        assert webui.data.name not in text and str(webui.extension) not in text, text[:3000]
    until(lambda: webui.post(body()).headers.get("X-Job-ID"), what="all is well again")


@pytest.mark.parametrize("name", TOLD_TROUBLES)
def test_nobody_is_told_where_our_files_lie(webui, name):
    if name == "a read-only folder" and ROOT:
        pytest.skip("root may write everywhere")
    check_what_is_told(webui, TOLD_TROUBLES[name])


def test_nobody_is_told_where_our_files_lie_on_a_full_disk(start, tmp_path):
    folder = tmp_path / "somewhere-secret"

    @contextlib.contextmanager
    def full(webui: Webui) -> Iterator[None]:
        filler = fill(folder, but=1)  # room for a record, and none for images
        try:
            yield
        finally:
            filler.unlink()

    with mounted(folder, "size=2m"):
        check_what_is_told(start(*MODE_FLAGS[MODES[0]], environ={"TRACKER_DATA_DIR": str(folder)}), full)
