"""Whatever goes wrong, clients and pages are told why, and never where our files lie. The log may say that."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from typing import Any, Callable, Iterator, List

import httpx
import pytest
from disks import ROOT, moved_away
from inside import load_script
from system import System

from harness import CLOSE, MODE_FLAGS, MODES, Page, Webui, body, until


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: OSError(errno.ENOSPC, "No space left on device", "/data/jobs.json"), "No space left on device"),
        (lambda: OSError(errno.EXDEV, "Invalid link", "/data/a", None, "/data/b"), "Invalid link"),
        (lambda: FileNotFoundError(errno.ENOENT, "No such file", b"/data"), "No such file"),
        (lambda: OSError("the store is closed"), "the store is closed"),
        (lambda: OSError(), "OSError"),
        (lambda: OSError(errno.EIO), "OSError"),
        (lambda: shutil.SameFileError("'/data/a' and '/data/a' are the same file"), "SameFileError"),
        (lambda: shutil.Error([("/data/a", "/data/b", "why")]), "Error"),
        (lambda: ValueError("it must be true or false"), "it must be true or false"),
        (lambda: MemoryError(), "MemoryError"),
    ],
)
def test_reasons(make, reason):
    assert load_script().reason_of(make()) == reason


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


TROUBLES = {
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
        text = webui.client.get(f"/sdapi/v1/job/{job_id}?images=false&wait=1", headers=CLOSE).text
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
    page.call("job_tracker_purge")
    said += [page.call(f"job_tracker_{name}", value).text for name, value in (("enabled", True), ("retention", "Off"))]
    until(lambda: "Purging" not in page.look(job=known), what="the purge has ended")
    return [*said, page.look(), page.look(job=known)]


def check(webui: Webui, trouble: Trouble) -> None:
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


@pytest.mark.parametrize("name", TROUBLES)
def test_nobody_is_told_where_our_files_lie(webui, name):
    if name == "a read-only folder" and ROOT:
        pytest.skip("root may write everywhere")
    check(webui, TROUBLES[name])


@pytest.mark.skipif(not ROOT, reason="a small disk can be mounted by root only")
def test_a_full_disk(start, tmp_path):
    folder = tmp_path / "somewhere-secret"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no small disk can be mounted")

    @contextlib.contextmanager
    def full(webui: Webui) -> Iterator[None]:
        with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        with (folder / "filler").open("r+b") as filler:
            filler.truncate((folder / "filler").stat().st_size - 4096)  # room for a record, and none for images
        try:
            yield
        finally:
            (folder / "filler").unlink()

    try:
        check(start(*MODE_FLAGS[MODES[0]], environ={"TRACKER_DATA_DIR": str(folder)}), full)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
