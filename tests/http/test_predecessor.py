"""A webui takes over what its predecessor left: jobs, images and settings."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from predecessor import INFOTEXT, NOW, entry, png, write_array, write_images

from harness import MODE_FLAGS, QUICK, Page, Webui, body, until


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
