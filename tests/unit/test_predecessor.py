"""Who comes from API-Job-Tracker-SD-WebUI keeps everything."""

from __future__ import annotations

import base64
import errno
import json
import os
import random
import shutil
import stat
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Union

import pytest
from inside import WrappedOs, a_job, alive, completed, load_script, make_tracker, pixels

from harness import MODE_FLAGS, QUICK, Page, Webui, body, until

NOW = int(time.time())
INFOTEXT = "a café\nSteps: 20, Sampler: Euler, Seed: 4711, Size: 8x8"


def png(text: str = "", kind: bytes = b"tEXt", size: int = 0) -> bytes:
    """A red dot with a text in it, as the host writes it; `size` more bytes that do not compress."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    content = text.encode("latin-1") if kind == b"tEXt" else b"\0\0\0\0" + text.encode()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        + (chunk(kind, b"parameters\0" + content) if text else b"")
        + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
        + (chunk(b"rnDM", os.urandom(size)) if size else b"")
        + chunk(b"IEND", b"")
    )


def entry(job_id: str, age: float = 60, status: str = "Completed", prompt: Any = "a lighthouse", **rest: Any) -> Any:
    """A job as the predecessor keeps it."""
    return {"id": job_id, "prompt": prompt, "ip": "10.0.0.9", "timestamp": NOW - int(age), "status": status, **rest}


def write_array(folder: Path, entries: List[Any]) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(entries, indent=2).encode()
    (folder / "jobs.json").write_bytes(data)
    return data


def write_images(folder: Path, count: int, size: int = 1000) -> List[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05}-7.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(png(f"a cat {number}", size=size))
    return paths


def of(job: Dict[str, Any]) -> List[bytes]:
    """The images in the answer for a job."""
    return [base64.b64decode(image) for image in job["images"]]


def until_complete(*webuis: Webui) -> None:
    folders = {webui.data for webui in webuis} | {webui.extension for webui in webuis}
    until(lambda: any(done for folder in folders for done in folder.glob("jobs.json.predecessor-done*")))


def our_lines(webui: Webui, text: str) -> List[str]:
    return [line for line in webui.log_since(0).splitlines() if text in line]


TAKEN, COMPLETE = "Taken over from the predecessor", "The predecessor's jobs are complete"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the predecessor leaves, in a folder `extension`, with its images elsewhere."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    images = {
        "old.png": png(),
        "one.png": png(INFOTEXT),
        "two.jpg": b"\xff\xd8\xff\xe0 two",
        "three.webp": b"RIFF\x05\0\0\0WEBPVP8 ",
        "twin.png": png("猫, Seed: 12", b"iTXt"),
    }
    for name, data in images.items():
        (outputs / name).write_bytes(data)
    (outputs / "text.txt").write_text("no image")
    (outputs / "folder.png").mkdir()
    os.mkfifo(str(outputs / "pipe.png"))

    def paths(*names: str) -> Dict[str, Any]:
        return {"output_paths": [str(outputs / name) for name in names]}

    write_array(
        tmp_path / "extension",
        [
            entry("FIRST001", 900, output_path=str(outputs / "old.png")),
            entry("NULL0001", 800, output_path=None),
            entry("THREE001", 700, **paths("one.png", "two.jpg", "three.webp")),
            entry("GONE0001", 600, **paths("gone.png", "one.png")),
            entry("ALLGONE1", 590, **paths("gone.png", "text.txt", "folder.png", "pipe.png", "\0", "x" * 5000)),
            entry("LONGERID12", 500, **paths("twin.png")),
            "no entry",
            {"id": 7, "status": "Completed"},
            entry("abcdEFGH", 400, **paths("one.png")),
            entry("ABCDefgh", 390, **paths("twin.png")),
            entry("FLOAT001", 0, **{**paths("one.png"), "timestamp": NOW - 300.25}),
            entry("ISO00001", 0, timestamp=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(NOW - 290))),
            entry("FUTURE01", 0, timestamp=1e300),
            entry("NOTIME01", 0, timestamp=None, prompt=None, ip=None),
            entry("PENDING1", 200, "Pending", output_paths=[]),
            entry("PROCESS1", 190, "Processing", output_paths=[]),
            entry("FAILED01", 180, "Failed", output_paths=[]),
            entry("STRANGE1", 170, "Unknown"),
            entry("LAST0001", 100, prompt="x" * 200_000, **paths("old.png")),
        ],
    )
    return tmp_path


def left_by_predecessor(folder: Path) -> Callable[[Webui], None]:
    def prepare(webui: Webui) -> None:
        shutil.copy(str(folder / "extension" / "jobs.json"), str(webui.extension))
        (webui.extension / "images").mkdir()

    return prepare


@pytest.mark.parametrize("elsewhere", [False, True], ids=["extension", "data"])
def test_everything_is_taken_over(start, folder, elsewhere):
    environ = {"TRACKER_DATA_DIR": str(folder / "data")} if elsewhere else {}
    outputs = folder / "outputs"
    before = {path.name: path.read_bytes() for path in outputs.iterdir() if path.is_file()}
    array = (folder / "extension" / "jobs.json").read_bytes()
    webui = start(*MODE_FLAGS["ui"], environ=environ, prepare=left_by_predecessor(folder))
    listed = webui.jobs(limit=100)
    assert len(listed) == 17, "they are listed while their images are being copied"
    until_complete(webui)

    def images(*names: str) -> List[bytes]:
        return [before[name] for name in names]

    jobs = {job["id"]: job for job in (webui.job(one["id"]) for one in listed)}
    renamed = {job["error"].split("Its ID was ")[1]: job for job in jobs.values() if "Its ID" in (job["error"] or "")}
    assert set(renamed) == {"LONGERID12", "ABCDefgh"}
    assert of(jobs["FIRST001"]) == images("old.png") and jobs["FIRST001"]["error"] is None
    assert of(jobs["NULL0001"]) == [] and jobs["NULL0001"]["error"] == "No images of it were kept"
    assert of(jobs["THREE001"]) == images("one.png", "two.jpg", "three.webp") and jobs["THREE001"]["error"] is None
    assert of(jobs["GONE0001"]) == images("one.png")
    assert jobs["GONE0001"]["error"] == "1 of 2 images were no longer on disk when the job was taken over"
    assert of(jobs["ALLGONE1"]) == []
    assert jobs["ALLGONE1"]["error"] == "6 of 6 images were no longer on disk when the job was taken over"
    assert of(renamed["LONGERID12"]) == of(renamed["ABCDefgh"]) == images("twin.png")
    assert of(jobs["abcdEFGH"]) == of(jobs["FLOAT001"]) == images("one.png")
    assert jobs["FLOAT001"]["timestamp"] == NOW - 301
    assert jobs["ISO00001"]["timestamp"] == jobs["FUTURE01"]["timestamp"] == jobs["NOTIME01"]["timestamp"] == NOW - 290
    assert (jobs["NOTIME01"]["prompt"], jobs["NOTIME01"]["ip"], jobs["FIRST001"]["ip"]) == ("", None, "10.0.0.9")
    for job_id in ("PENDING1", "PROCESS1", "STRANGE1"):
        assert (jobs[job_id]["status"], jobs[job_id]["error"]) == (
            "Failed",
            "The webui ended before the generation did",
        )
    assert (jobs["FAILED01"]["status"], jobs["FAILED01"]["error"]) == (
        "Failed",
        "The generation failed, and it was not kept why",
    )
    assert jobs["LAST0001"]["parameters"] == {"prompt": "x" * 200_000}
    for job in jobs.values():
        assert (job["type"], job["started"], job["finished"]) == ("txt2img", None, None)
    info = json.loads(jobs["THREE001"]["info"])
    assert info == {"prompt": "a lighthouse", "seed": 4711, "infotexts": [INFOTEXT]}
    assert json.loads(renamed["LONGERID12"]["info"])["infotexts"] == ["猫, Seed: 12"]

    times = [job["timestamp"] for job in listed]
    assert times == sorted(times, reverse=True) and listed[0]["id"] == "LAST0001" and listed[-1]["id"] == "FIRST001"
    response = webui.client.get("/sdapi/v1/job/THREE001/images/2")
    assert (response.headers["content-type"], response.content) == ("image/webp", before["three.webp"])
    page = Page(webui.client)
    shown = page.look(job="GONE0001")
    assert "1 of 2 images were no longer on disk" in shown and "GONE0001_0.png" in shown
    assert "4711" in page.look(job="THREE001") and "LAST0001" in page.look()

    assert {path.name: path.read_bytes() for path in outputs.iterdir() if path.is_file()} == before
    (kept,) = webui.extension.glob("jobs.json.predecessor*")
    assert (kept.name, kept.read_bytes()) == ("jobs.json.predecessor-done", array)
    assert not list(webui.data.glob("*.damaged-*"))
    (line,) = our_lines(webui, COMPLETE)
    assert "17 jobs, 10 images, " in line and "7 images were no longer on disk, 2 entries could not be read" in line
    assert len(our_lines(webui, TAKEN)) == 1

    files = {path: path.read_bytes() for path in [webui.data / "jobs.json", *webui.images()]}
    webui.client.delete("/sdapi/v1/job/FIRST001").raise_for_status()
    assert "x-job-id" in webui.post(body()).headers
    webui.restart()
    assert len(webui.jobs(limit=100)) == 17 and webui.client.get("/sdapi/v1/job/FIRST001").status_code == 404
    left = [path for path in files if path.exists() and path.name != "jobs.json"]
    assert len(left) == len(files) - 3 and all(path.read_bytes() == files[path] for path in left)
    assert len(our_lines(webui, TAKEN)) == len(our_lines(webui, COMPLETE)) == 1


def test_paths_that_start_in_the_webui(start):
    """A1111 shortens the paths of images that lie in its own folder."""

    def prepare(webui):
        (image,) = write_images(webui.folder / "webui" / "outputs" / "txt2img-images", 1)
        path = image.relative_to(webui.folder / "webui")
        write_array(webui.extension, [entry("RELATIVE", output_paths=[str(path)])])

    webui = start(*QUICK, prepare=prepare)
    until_complete(webui)
    assert of(webui.job("RELATIVE")) == [next(webui.folder.glob("webui/outputs/*/*.png")).read_bytes()]


def test_an_array_without_jobs(start):
    webui = start(*QUICK, prepare=lambda webui: write_array(webui.extension, []))
    until_complete(webui)
    assert webui.jobs() == [] and not list(webui.extension.glob("*.damaged-*"))


def test_kill_while_images_are_copied(start, tmp_path):
    paths = write_images(tmp_path / "outputs", 150, 30_000)
    entries = [entry(f"JOB{n:05}", 3600 - n, output_paths=[str(path)]) for n, path in enumerate(paths)]
    webui = start(*QUICK, prepare=lambda webui: write_array(webui.extension, entries))
    for copied in (10, 50, 90):
        until(lambda copied=copied: sum(bool(it.get("images")) for it in webui.records().values()) >= copied)
        webui.kill()
        assert (webui.extension / "jobs.json.predecessor-listed").exists(), "it was killed too late to show anything"
        webui.start()
        assert len(webui.jobs(limit=1000)) == 150
    until_complete(webui)
    for n, path in enumerate(paths):
        job = webui.job(f"JOB{n:05}")
        assert (of(job), job["error"]) == ([path.read_bytes()], None)
    whole = [path for path in webui.images() if path.suffix != ".part"]  # what a kill cut goes with a later purge
    assert len(webui.records()) == 150 and len(whole) == 300, "and nothing that no job names"
    (line,) = our_lines(webui, COMPLETE)
    assert "150 jobs, 150 images, " in line and " 0 images were no longer" in line


def test_two_webuis_at_once(start, tmp_path):
    paths = write_images(tmp_path / "outputs", 40)
    entries = [entry(f"JOB{n:05}", 3600 - n, output_paths=[str(path)]) for n, path in enumerate(paths)]
    entries.append(entry("LONGERID12", 5, output_paths=[str(paths[0])]))
    write_array(tmp_path / "data", entries)
    environ = {"TRACKER_DATA_DIR": str(tmp_path / "data")}
    webuis = [start(*QUICK, environ=environ, wait=False) for _ in range(2)]
    for webui in webuis:
        webui.wait()
    until_complete(*webuis)
    for webui in webuis:
        assert len(webui.jobs(limit=100)) == len(webui.records()) == 41
        assert of(webui.job("JOB00039")) == [paths[39].read_bytes()]
    assert len(webuis[0].images()) == 82
    lines = [line for webui in webuis for line in webui.our_log()]
    assert sum(TAKEN in line for line in lines) == sum(COMPLETE in line for line in lines) == 1, lines


@pytest.mark.slow
def test_a_long_array_does_not_hold_up_the_start(start):
    entries = [entry(f"J{n:07}", 40_000 - n, output_paths=[f"/nowhere/{n}.png"]) for n in range(20_000)]
    webui = start(*QUICK)

    def seconds() -> float:
        began = time.monotonic()
        webui.start()
        return time.monotonic() - began

    without, with_array = [], []
    for _ in range(3):
        webui.kill()
        for path in webui.extension.glob("jobs.json*"):
            path.unlink()
        shutil.rmtree(str(webui.extension / "images"))
        without.append(seconds())
        webui.kill()
        (webui.extension / "jobs.json").unlink()
        write_array(webui.extension, entries)
        with_array.append(seconds())
        assert len(webui.jobs(limit=1000)) == 1000
    print(f"start without: {min(without):.2f} s, with 20,000 entries: {min(with_array):.2f} s")
    assert min(with_array) < 2 * min(without)


# In the test's own process


@pytest.fixture
def script() -> Any:
    script = load_script()
    script.Predecessor.RETRY = script.Predecessor.LOOK_EVERY = 0.05
    return script


@pytest.fixture
def tracker(script, tmp_path):
    """`tracker()` is one without a webui, on the test's folder."""
    made = []

    def make(**environ: str) -> Any:
        made.append(make_tracker(script, tmp_path, TRACKER_RETENTION="off", **environ))
        return made[-1]

    yield make
    for one in made:
        one.close()


def names(folder: Path) -> List[str]:
    """Of what there is of jobs.json, without a webui's own lock and the index."""
    names = (path.name for path in folder.glob("jobs.json*"))
    return sorted(name for name in names if not name.startswith(("jobs.json.owner-", "jobs.json.index")))


DONE = ["jobs.json", "jobs.json.lock", "jobs.json.predecessor-done"]


def test_before_jobs_of_our_own(script, tracker, tmp_path):
    """Who used Job Tracker with a folder for its data, and then brings the predecessor's file."""
    (image,) = write_images(tmp_path / "outputs", 1)
    data = tmp_path / "data"
    store = script.JobStore(str(data))
    dice = random.Random(7)
    ours = [completed(a_job(script, dice, id=f"OURS{n:04}")) for n in range(3)]
    for job in [*ours, a_job(script, dice, id="TWINtwin", status="Failed")]:
        store.put(job, new=True).result()
    store.remove(["OURS0002"]).result()
    store.close()
    write_array(tmp_path, [entry("THEIRS01", output_paths=[str(image)]), entry("TWINTWIN", output_path=str(image))])
    one = tracker(TRACKER_DATA_DIR=str(data))
    ids = [job.id for job in one.store.query(script.Filter(), 100).jobs]
    assert [ids[0], ids[1], ids[2], ids[4]] == ["TWINtwin", "OURS0001", "OURS0000", "THEIRS01"] and len(ids) == 5
    until(lambda: (tmp_path / "jobs.json.predecessor-done").exists())
    assert len(one.store.get("THEIRS01").images) == len(one.store.get(ids[3]).images) == 1
    assert one.store.get(ids[3]).error == "Its ID was TWINTWIN"
    assert len(alive(data / "jobs.json")) == 5


@pytest.mark.parametrize("content", [b'[1, "two"]', b'[{"name": "x"}]', b"[", b'"text"', b"[[[", b'[{"id": ""}]'])
def test_another_array_is_left_to_the_store(script, tracker, tmp_path, content):
    (tmp_path / "jobs.json").write_bytes(content)
    one = tracker()
    assert one.store.query(script.Filter(), 10).jobs == []
    (aside,) = until(lambda: list(tmp_path.glob("jobs.json.damaged-*")))
    until(lambda: aside.read_bytes().strip() == content)
    assert not list(tmp_path.glob("*predecessor*"))


def test_a_torn_array(script, tracker, tmp_path):
    """What can be read of it is taken over, and the rest stays in the file."""
    data = write_array(
        tmp_path, [entry(f"JOB{n:05}", 100 - n, prompt='"[{"id": 5}', output_path=None) for n in range(9)]
    )
    spoilt = data.replace(b'"JOB00003"', b'"JOB\x0000003"')[:-30]
    (tmp_path / "jobs.json").write_bytes(spoilt)
    one = tracker()
    ids = [job.id for job in one.store.query(script.Filter(), 100).jobs]
    assert ids == [f"JOB{n:05}" for n in (7, 6, 5, 4, 2, 1, 0)]
    until(lambda: names(tmp_path) == DONE)
    assert (tmp_path / "jobs.json.predecessor-done").read_bytes() == spoilt


@pytest.mark.parametrize("lost", [None, b"", b"\0" * 500])
def test_the_copy_where_the_file_is_lost(script, tracker, tmp_path, lost):
    """Where a power cut cost the predecessor its jobs.json, it would read the copy beside it."""
    write_array(tmp_path, [entry("COPY0001", output_path=None)])
    (tmp_path / "jobs.json").rename(tmp_path / "jobs.json.bak")
    if lost is not None:
        (tmp_path / "jobs.json").write_bytes(lost)
    one = tracker()
    until(lambda: (tmp_path / "jobs.json.predecessor-done").exists())
    assert [job.id for job in one.store.query(script.Filter(), 10).jobs] == ["COPY0001"]


def test_a_copy_that_is_older_than_ours_is_not_read(script, tracker, tmp_path):
    write_array(tmp_path, [entry("OLDER001", output_path=None)])
    (tmp_path / "jobs.json").rename(tmp_path / "jobs.json.bak")
    (tmp_path / "jobs.json").write_bytes(b"{\n}\n")
    assert tracker().store.query(script.Filter(), 10).jobs == []


def test_a_copy_that_was_taken_over_already_is_not_read(script, tracker, tmp_path):
    """Who removes jobs.json to begin anew does not get back what the predecessor left beside it."""
    write_array(tmp_path, [entry("OLDER001", output_path=None)])
    shutil.copy(str(tmp_path / "jobs.json"), str(tmp_path / "jobs.json.bak"))
    one = tracker()
    until(lambda: (tmp_path / "jobs.json.predecessor-done").exists())
    one.close().result(60)
    (tmp_path / "jobs.json").unlink()
    assert tracker().store.query(script.Filter(), 10).jobs == []


def test_it_stays_private(script, tracker, tmp_path):
    write_array(tmp_path, [entry("SECRET01", output_path=None)])
    (tmp_path / "jobs.json").chmod(0o600)
    tracker()
    until(lambda: names(tmp_path) == DONE)
    for name in ("jobs.json", "jobs.json.predecessor-done"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name


class Dead(BaseException):
    """The process has ended."""


def dying(after: int) -> WrappedOs:
    """The module `os` of a process that dies before its n-th change to a file."""
    left = [after]

    def mortal(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                left[0] -= 1
                if left[0] < 0:
                    raise Dead
            return getattr(os, name)(*arguments, **named)

        return call

    return WrappedOs(**{name: mortal(name) for name in ("open", "rename", "replace", "unlink", "pwrite", "truncate")})


@pytest.mark.parametrize("ours", [None, b'{\n"OURS0001": null\n}\n'])
def test_a_crash_at_any_moment(script, tmp_path, monkeypatch, ours):
    deaths = 0
    while True:
        folder, data = tmp_path / str(deaths), tmp_path / str(deaths) / "data"
        entries = [entry(job_id, output_path=None) for job_id in ("FIRST001", "LONGERID12", "first001", "LAST0001")]
        array = write_array(folder if ours else data, entries)
        if ours:
            data.mkdir()
            (data / "jobs.json").write_bytes(ours)
        with monkeypatch.context() as patch:
            patch.setattr(script, "os", dying(deaths))
            try:
                script.Predecessor(str(folder), str(data)).merge_jobs()
            except Dead:
                deaths += 1
            else:
                break
        again = script.Predecessor(str(folder), str(data))
        again.merge_jobs()
        jobs = list(alive(data / "jobs.json").values())
        assert [job["id"] for job in (jobs[0], jobs[3])] == ["FIRST001", "LAST0001"] and len(jobs) == 4
        assert ["Its ID was" in job["error"] for job in jobs] == [False, True, True, False]
        (kept,) = [*folder.glob("jobs.json.predecessor-listed"), *data.glob("jobs.json.predecessor-listed")]
        assert kept.read_bytes() == array
    assert deaths >= 4


def test_a_full_disk_at_first(script, tracker, tmp_path):
    """The predecessor's file is not taken for damage of ours, and taken over as soon as there is room."""
    (image,) = write_images(tmp_path / "outputs", 1)
    array = write_array(tmp_path, [entry("WAITS001", output_paths=[str(image)])])
    full = [True]

    def replace(source: str, target: str) -> None:
        if full and target.endswith("jobs.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.replace(source, target)

    script.os = WrappedOs(replace=replace)
    one = tracker()
    assert one.store.query(script.Filter(), 10).jobs == []
    assert (tmp_path / "jobs.json.predecessor").read_bytes() == array and not list(tmp_path.glob("*.damaged-*"))
    full.clear()
    until(lambda: names(tmp_path) == DONE)
    assert len(one.store.get("WAITS001").images) == 1


@pytest.mark.parametrize("times", [1, 3])
def test_a_file_that_cannot_be_renamed_for_a_while(script, tracker, tmp_path, monkeypatch, times):
    """A virus scanner has it open, on Windows. Until it can be, nobody takes it for damage, and no job is accepted."""
    monkeypatch.setattr(script.Predecessor, "LOOK_EVERY", 0.1)
    (image,) = write_images(tmp_path / "outputs", 1)
    write_array(tmp_path, [entry("WAITS001", output_paths=[str(image)])])
    failures = [PermissionError(errno.EACCES, "Permission denied")] * times

    def rename(source: str, target: str) -> None:
        if str(source).endswith("jobs.json") and failures:
            raise failures.pop()
        os.rename(source, target)

    script.os = WrappedOs(rename=rename)
    one = tracker()
    until(lambda: names(tmp_path) == DONE, what="it is taken over")
    assert not list(tmp_path.glob("*.damaged-*"))
    assert len(one.store.get("WAITS001").images) == 1


def test_a_disk_without_room_for_images(script, tracker, tmp_path, monkeypatch, caplog):
    paths = write_images(tmp_path / "outputs", 3)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    room = [0]
    usage = shutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: usage._replace(total=1 << 40, free=room[0]))
    one = tracker()
    until(lambda: "cannot be copied yet" in caplog.text)
    time.sleep(0.3)
    assert caplog.text.count("cannot be copied yet") == 1, "it is said once"
    assert one.get("JOB00000").error == "Its images are still to be copied" and not list(tmp_path.glob("images/*/*"))
    description = one.describe(one.get("JOB00000"))
    assert (description["status"], description["error"]) == ("Completed", "Its images are still to be copied")
    room[0] = 1 << 31
    until(lambda: names(tmp_path) == DONE)
    assert [len(one.get(f"JOB{n:05}").images) for n in range(3)] == [1, 1, 1]


def test_an_image_that_cannot_be_read_now(script, tracker, tmp_path, monkeypatch):
    """The job keeps nothing until it can have all, and the others do not wait."""
    paths = write_images(tmp_path / "outputs", 3)
    write_array(
        tmp_path,
        [
            entry("BOTH0001", output_paths=[str(paths[0]), str(paths[1])]),
            entry("OTHER001", output_paths=[str(paths[2])]),
        ],
    )
    hindered = [True]

    def open_file(path: str, *rest: Any) -> int:
        if hindered[0] and path == str(paths[1]):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return os.open(path, *rest)

    monkeypatch.setattr(script, "os", WrappedOs(open=open_file))
    one = tracker()
    until(lambda: one.get("BOTH0001").error == f"Its images cannot be copied yet: {os.strerror(errno.EIO)}")
    until(lambda: len(one.get("OTHER001").images) == 1)
    assert one.get("BOTH0001").images == () and (tmp_path / "jobs.json.predecessor-listed").exists()
    hindered[0] = False
    until(lambda: names(tmp_path) == DONE)
    job = one.get("BOTH0001")
    assert (len(job.images), job.error) == (2, None)


@pytest.mark.parametrize("removal", ["meets the copying", "saw the job before it"])
def test_deleted_while_it_is_copied(script, tracker, tmp_path, monkeypatch, removal):
    """Neither does the job come back, nor do its files stay."""
    paths = write_images(tmp_path / "outputs", 2)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    made, seen = threading.Event(), threading.Event()
    save, get = script.ImageStore.save, script.Tracker.get

    def save_and_meet(images: Any, job: Any, answer: Any) -> Any:
        assert made.wait(60)
        if removal == "saw the job before it":
            assert seen.wait(60)
            return save(images, job, answer)
        kept = save(images, job, answer)
        assert job.id != "JOB00000" or one.delete(job.id)
        return kept

    def get_and_wait(self: Any, job_id: str) -> Any:
        job = get(self, job_id)
        seen.set()
        until(lambda: names(tmp_path) == DONE)
        return job

    monkeypatch.setattr(script.ImageStore, "save", save_and_meet)
    one = tracker()
    made.set()
    if removal == "saw the job before it":
        monkeypatch.setattr(script.Tracker, "get", get_and_wait)
        assert one.delete("JOB00000")
    until(lambda: names(tmp_path) == DONE)
    assert one.store.get("JOB00000") is None and len(one.store.get("JOB00001").images) == 1
    assert sorted(path.name for path in tmp_path.glob("images/*/*")) == ["JOB00001.json", "JOB00001_0.png"]


def test_two_webuis_share_the_work(script, tracker, tmp_path, monkeypatch):
    """Nothing is merged or copied twice, however slow the first is."""
    paths = write_images(tmp_path / "outputs", 3)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    merged: List[str] = []
    saved: List[str] = []
    save = script.ImageStore.save

    def replace_slowly(source: str, target: str) -> None:
        if target.endswith("jobs.json"):
            merged.append(target)
            time.sleep(0.3)
        os.replace(source, target)

    def save_slowly(images: Any, job: Any, answer: Any) -> Any:
        saved.append(job.id)
        time.sleep(0.3)
        return save(images, job, answer)

    script.os = WrappedOs(replace=replace_slowly)
    monkeypatch.setattr(script.ImageStore, "save", save_slowly)
    with ThreadPoolExecutor(2) as pool:
        both = [made.result() for made in [pool.submit(tracker), pool.submit(tracker)]]
    until(lambda: names(tmp_path) == DONE)
    assert len(merged) == 1 and sorted(saved) == ["JOB00000", "JOB00001", "JOB00002"]
    for one in both:
        assert all(len(one.store.get(job_id).images) == 1 for job_id in saved)


def test_copying_stops_when_it_is_told_to(script, tmp_path, monkeypatch):
    paths = write_images(tmp_path / "outputs", 3)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    predecessor = script.Predecessor(str(tmp_path), str(tmp_path))
    predecessor.merge_jobs()
    stop, save = threading.Event(), script.ImageStore.save

    def save_and_stop(*arguments: Any) -> Any:
        stop.set()
        return save(*arguments)

    monkeypatch.setattr(script.ImageStore, "save", save_and_stop)
    store, images = script.JobStore(str(tmp_path)), script.ImageStore(str(tmp_path / "images"))
    try:
        predecessor.copy_images(store, images, stop)
        assert [len(store.get(f"JOB{n:05}").images) for n in range(3)] == [0, 0, 1], "the newest comes first"
        stop.clear()
        monkeypatch.setattr(script.ImageStore, "save", save)
        predecessor.copy_images(store, images, stop)
        assert [len(store.get(f"JOB{n:05}").images) for n in range(3)] == [1, 1, 1]
    finally:
        store.close()


def test_purged_while_it_is_copied(script, tracker, tmp_path, monkeypatch):
    paths = write_images(tmp_path / "outputs", 2)
    young, old = (entry(f"JOB{n:05}", n * 9 * 86400, output_paths=[str(path)]) for n, path in enumerate(paths))
    write_array(tmp_path, [old, young])
    save = script.ImageStore.save
    purged: List[Any] = []

    def save_and_purge(images: Any, job: Any, answer: Any) -> Any:
        kept = save(images, job, answer)
        until(lambda: trackers)
        trackers[0].settings.retention_days = 5.0
        purged.append(trackers[0].housekeeper.purge())
        return kept

    trackers: List[Any] = []
    monkeypatch.setattr(script.ImageStore, "save", save_and_purge)
    trackers.append(tracker())
    until(lambda: names(tmp_path) == DONE)
    assert purged == [script.Purged(1, 0, 0)]
    assert len(trackers[0].store.get("JOB00000").images) == 1 and trackers[0].store.get("JOB00001") is None
    assert paths[1].exists(), "what the user has in the webui's output folder stays"


def test_the_end_of_the_webui_while_images_are_copied(script, tracker, tmp_path, caplog):
    paths = write_images(tmp_path / "outputs", 100, 20_000)
    write_array(tmp_path, [entry(f"JOB{n:05}", output_paths=[str(path)]) for n, path in enumerate(paths)])
    one = tracker()
    until(lambda: one.store.get("JOB00095").images)
    one.close().result(60)
    assert (tmp_path / "jobs.json.predecessor-listed").exists()
    another = tracker()
    until(lambda: names(tmp_path) == DONE)
    assert all(len(another.store.get(f"JOB{n:05}").images) == 1 for n in range(100))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_second_file_of_the_predecessor(script, tracker, tmp_path):
    """Who goes back and comes again loses nothing, and has nothing twice."""
    (image,) = write_images(tmp_path / "outputs", 1)
    first = entry("FIRST001", output_paths=[str(image)])
    write_array(tmp_path, [first])
    one = tracker()
    until(lambda: names(tmp_path) == DONE)
    one.close().result(60)
    (tmp_path / "jobs.json").unlink()
    write_array(tmp_path, [first, entry("SECOND01", output_paths=[str(image)])])
    another = tracker()
    until(lambda: names(tmp_path) == [*DONE, "jobs.json.predecessor-done-2"])
    assert [job.id for job in another.store.query(script.Filter(), 10).jobs] == ["SECOND01", "FIRST001"]
    assert all(len(another.store.get(job_id).images) == 1 for job_id in ("FIRST001", "SECOND01"))


def test_infotext_of_anything(script):
    for text, kind in ((INFOTEXT, b"tEXt"), ("猫", b"iTXt"), ("", b"tEXt")):
        assert script.infotext_of(png(text, kind)) == (text or None)
    whole = png(INFOTEXT)
    for data in (b"", b"\xff\xd8\xff", pixels("A", 0), *(whole[:end] for end in range(len(whole)))):
        script.infotext_of(data)


def test_times_of_any_kind(script):
    known: List[Union[Any, int]] = [NOW, NOW + 0.5, str(NOW), f" {NOW}.25 "]
    assert [script.legacy_time(value) for value in known] == [NOW] * 4
    assert script.legacy_time("2025-01-12T20:00:00Z") == 1736712000
    strange = [None, "", "yesterday", -1, 0, 1 << 34, 1e300, float("nan"), float("inf"), [], {}, "9999-99-99", 10**400]
    assert [script.legacy_time(value) for value in strange] == [None] * len(strange)


def test_a_seed_that_is_no_seed(script, tracker, tmp_path):
    """A prompt can say anything, and stands in the image before the seed."""
    (tmp_path / "x.png").write_bytes(png(f"a lighthouse, Seed: {'1' * 9999}"))
    write_array(tmp_path, [entry("AAAAAAAA", output_paths=[str(tmp_path / "x.png")])])
    one = tracker()
    until(lambda: names(tmp_path) == DONE)
    assert len(one.get("AAAAAAAA").images) == 1
