"""When our own disk or code fails, or the webui is not supported, generations go on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time

import httpx
import pytest
from system import System

from harness import CLOSE, MODE_FLAGS, MODES, QUICK, SHAPE, Page, body, until, without_time


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


def assert_tracks(webui):
    """It does all that it should."""
    response = webui.post(body())
    job = webui.job(response.headers["X-Job-ID"], wait=30)
    assert (job["status"], job["images"]) == ("Completed", response.json()["images"])
    until(webui.is_idle)
    assert job["id"] in webui.records()


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
    for prefer in ("respond-async", "respond-async, wait=1", "respond-async, wait=30"):
        with trouble(mended, name):
            answer = mended.post(body(standin=standin), headers={"Prefer": prefer, **CLOSE})
        assert answer.status_code == (500 if "fail" in standin else 200)
        assert not {"x-job-id", "preference-applied", "location"} & set(answer.headers)


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


@contextlib.contextmanager
def moved_away(path):
    away = path.with_name(path.name + "-away")
    path.rename(away)
    try:
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(str(path))
        elif path.exists():
            path.unlink()
        away.rename(path)


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


def test_jobs_json_replaced_by_a_folder(elsewhere):
    """It is set aside, and a new file begun."""
    assert_tracks(elsewhere)
    path = elsewhere.data / "jobs.json"
    path.unlink()
    path.mkdir()
    position = len(elsewhere.log)
    assert elsewhere.post(body()).json()["images"]
    assert_tracks(elsewhere)
    assert path.is_file()
    assert any("set aside" in line for line in own_lines(elsewhere, position))


@pytest.fixture
def small_disk(tmp_path):
    if sys.platform != "linux":
        pytest.skip("a small disk is made on Linux only")
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


PAGE = 4096


def fill(folder, but=0):
    """Leaves no page, or a few."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    os.truncate(str(path), path.stat().st_size - but * PAGE)
    return path


def test_full_disk(start, alone, small_disk):
    """The generation's answer comes all the same, and when there is room again everything works, without a restart."""
    (small_disk / "jobs.json.index").mkdir()  # it is in memory then, and takes and gives back no room
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


# Webuis that are not as we know them


def test_ui_without_the_api(start):
    if SHAPE == "sdnext":
        pytest.skip("it always has the API")
    webui = start()
    assert [line for line in webui.our_log() if "--api" in line] == webui.our_log()[-1:]
    assert webui.client.get("/").status_code == 200
    assert webui.client.get("/sdapi/v1/jobs").status_code == 404
    assert "Traceback" not in webui.log


STRANGE = """
from modules import script_callbacks

def find(app, name):
    return next(route for route in app.routes if getattr(route, "path", "") == "/sdapi/v1/" + name)

def change(_, app):
    {change}

script_callbacks.on_app_started(change)
"""

STRANGERS = {
    "an endpoint without an object": "find(app, 'txt2img').endpoint = lambda: None",
    "an object without a lock": "find(app, 'img2img').endpoint = [].append",
    "a route that is none of FastAPI's": "del find(app, 'txt2img').dependant",
    "a host without add_api_route": (
        "import modules.shared\n"
        "    modules.shared.api = None\n"
        "    type(find(app, 'txt2img').endpoint.__self__).add_api_route = None"
    ),
    "no route of its name": "find(app, 'img2img').path = find(app, 'txt2img').path = '/other'",
}


@pytest.mark.parametrize("change", STRANGERS)
def test_unknown_webui(start, change):
    """One clear line, nothing half done, and the webui runs on."""
    webui = start(*QUICK, scripts={"a-stranger": STRANGE.format(change=STRANGERS[change])})
    lines = [line for line in webui.our_log() if "not tracked" in line]
    assert len(lines) == 1, webui.log
    assert not [line for line in webui.our_log() if "Ready" in line]
    for kind in ("txt2img", "img2img"):
        response = webui.post(body(kind=kind), kind)
        assert response.status_code == 200
        assert response.json()["images"]
        assert "X-Job-ID" not in response.headers
    assert webui.records() == {}


LATER = """
from modules import script_callbacks

PATH = "/sdapi/v1/txt2img"

def answer():
    return {{"images": []}}

def mounted(endpoint):
    import fastapi
    app = fastapi.FastAPI()
    app.add_api_route("/txt2img", endpoint, methods=["POST"])
    return app

def change(_, app):
    routes = app.router.routes
    before = list(routes)
    own = next(route for route in routes if getattr(route, "path", "") == PATH)
    app.add_api_route(PATH, answer, methods=["POST"])
    {change}

    def put_back():
        routes[:] = before

    app.add_api_route("/put-back", put_back)

script_callbacks.on_app_started(change)
"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change",
    [
        "routes.remove(own)",
        "routes.insert(0, routes.pop())",
        "app.add_api_route('/sdapi/v1/{any:path}', answer, methods=['POST']), routes.insert(0, routes.pop())",
        "app.mount('/sdapi/v1', mounted(answer)), routes.insert(0, routes.pop())",
    ],
)
def test_route_that_is_registered_anew(start, mode, change):
    """By an extension that is loaded later. It is said within seconds, in the log and in the tab, and once."""
    scripts = {"z-later": LATER.format(change=change)}
    webui = start(*MODE_FLAGS[mode], scripts=scripts, constants={"LOOK_EVERY": 0.1})
    assert webui.post(body()).json() == {"images": []}
    until(lambda: any("not tracked any more" in line for line in webui.our_log()), what="it is said")
    assert "/sdapi/v1/txt2img was taken away" in webui.our_log()[-1]
    if mode == "ui":
        assert "was taken away" in Page(webui.client).look()
    webui.client.get("/put-back")
    until(lambda: "tracked again" in webui.our_log()[-1], what="it is said")
    assert len(webui.our_log()) == 3, webui.our_log()
    assert_tracks(webui)


def test_route_that_comes_after_ours(start):
    """It never gets a request."""
    webui = start(*QUICK, scripts={"z-later": LATER.format(change="pass")}, constants={"LOOK_EVERY": 0.1})
    assert_tracks(webui)
    time.sleep(0.5)
    assert len(webui.our_log()) == 1, webui.our_log()


def test_config_that_cannot_be_read_is_said_in_the_tab(start):
    webui = start(*MODE_FLAGS[MODES[0]])
    page = Page(webui.client)
    assert "config.json" not in page.look()
    (webui.extension / "config.json").write_text('{"enabled": true, "retention_days": 7,}')
    html = page.look()
    assert "config.json cannot be read (" in html and "what was known of it holds" in html
    assert str(webui.folder) not in html
    (webui.extension / "config.json").write_text('{"enabled": true, "retention_days": "7"}')
    assert "retention_days is invalid, so retention is off" in page.look()
    (webui.extension / "config.json").write_text('{"enabled": true, "retention_days": 7}')
    assert "config.json" not in page.look()


@pytest.mark.every_mode
@pytest.mark.parametrize("mode", MODES)
def test_ready_and_off(start, mode):
    """It says how to turn tracking on, and when somebody did."""
    webui = start(*MODE_FLAGS[mode], tracking=None, constants={"LOOK_EVERY": 0.1})
    (line,) = webui.our_log()
    assert line.startswith(f"[Job Tracker] Ready, tracking is off, jobs are in {webui.data}. To turn it on, ")
    assert '"enabled": true' in line and "TRACKER_ENABLED=1" in line
    assert ("the tab" in line) == (mode == "ui")
    path = webui.extension / "config.json"
    for enabled, word in ((True, "on"), (False, "off")):
        path.write_text(json.dumps({"enabled": enabled}))
        until(lambda word=word: webui.our_log()[-1] == f"[Job Tracker] Tracking is {word} now")
    webui.kill()
    webui.environ["TRACKER_ENABLED"] = "off"
    webui.start()
    assert webui.our_log()[-1].endswith(f"jobs are in {webui.data}. TRACKER_ENABLED turns it off")


@pytest.mark.parametrize("mode", MODES)
def test_installed_twice(start, mode):
    webui = start(*MODE_FLAGS[mode], copies=2)
    lines = [line for line in webui.our_log() if "another copy" in line]
    assert len(lines) == 1, webui.log
    assert "Traceback" not in webui.log
    assert_tracks(webui)
    assert len(webui.records()) == 1
    second = webui.extension.with_name("job-tracker-2")
    assert (second / "jobs.json").read_text().split() == ["{", "}"]
