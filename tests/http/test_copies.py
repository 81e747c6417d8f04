"""jobs.json and images/ read and saved by other programs while a webui writes to them all the time, as README.md says.

A webui under load, several jobs in each moment, with a jobs.json of several MB.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from programs import need
from readme import README, example, snippets

from harness import QUICK, Webui, body, fewer, until

OLD_JOBS = 5000
CLIENTS = 4


def old_job(number: int) -> str:
    record = {
        "id": f"old{number:05}",
        "type": "txt2img",
        "status": "Failed",
        "timestamp": 1736712000 + number,
        "ip": "10.0.0.1",
        "prompt": "an old lighthouse " * 30,
        "error": "Cancelled",
    }
    return f'"{record["id"]}": {json.dumps(record)}'


class Load:
    """Clients that send a webui one small job after the other."""

    def __init__(self, webui: Webui):
        self.webui = webui
        self.accepted: List[str] = []  # IDs
        self._ended = threading.Event()
        self._clients = [threading.Thread(target=self._send_jobs) for _ in range(CLIENTS)]
        for client in self._clients:
            client.start()

    def _send_jobs(self) -> None:
        data = json.dumps(body("a new lighthouse", steps=1, width=8, height=8))
        connection = http.client.HTTPConnection("127.0.0.1", self.webui.port, timeout=60)
        while not self._ended.is_set():
            connection.request("POST", "/sdapi/v1/txt2img", data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            self.accepted.append(response.headers["X-Job-ID"])
            response.read()

    def is_whole(self) -> bool:
        return all(client.is_alive() for client in self._clients)

    def end(self) -> None:
        self._ended.set()
        for client in self._clients:
            client.join()


@pytest.fixture(scope="module")
def load(start_shared: Any) -> Iterator[Load]:
    def prepare(webui: Webui) -> None:
        (webui.data / "jobs.json").write_text("{\n" + ",\n".join(map(old_job, range(OLD_JOBS))) + "\n}\n")

    webui = start_shared(*QUICK, environ={"TRACKER_RETENTION": "off"}, step_time=0.0, prepare=prepare)
    load = Load(webui)
    try:
        until(lambda: len(load.accepted) > 20)
        yield load
        assert load.is_whole(), "there was load until the end"
    finally:
        load.end()


@pytest.fixture
def busy(load: Load) -> Webui:
    return load.webui


def completed(webui: Webui) -> List[str]:
    """IDs of jobs that have ended well, by the webui."""
    return [job["id"] for job in webui.jobs(status="completed", limit=1000)]


def shell(line: str, webui: Webui, home: Path, status: int = 0) -> str:
    """What a command line in the folder of the data prints."""
    for program in ("flock", "jq", "rsync", "tar"):
        need(program if f"{program} " in line else "bash")
    environ = {**os.environ, "HOME": str(home)}
    command = [need("bash"), "-euo", "pipefail", "-c", line]
    done = subprocess.run(command, cwd=str(webui.data), env=environ, capture_output=True)
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode()


def printed(mark: str) -> str:
    (text,) = [it.text for it in snippets() if mark in it.text]
    return text


def printed_inline(start: str) -> str:
    """A command that stands in the text."""
    (text,) = re.findall(rf"`({re.escape(start)}[^`]*)`", README)
    return text


def check_copies(line: str, load: Load, home: Path, times: int) -> None:
    """Each is valid JSON, with all jobs that were accepted before it was made."""
    for _ in range(times):
        known = load.accepted[:]
        shell(line, load.webui, home)
        records = json.loads((home / "jobs-copy.json").read_text(encoding="utf-8"))
        assert set(known) < set(records)
        assert len(records) >= OLD_JOBS + len(known)


def test_copy_under_the_lock(load, tmp_path):
    check_copies(printed_inline("flock jobs.json.lock cp"), load, tmp_path, fewer(100))


def test_the_examples_lines_of_jq(busy, tmp_path):
    text = example("read_jobs.sh")
    known = completed(busy)
    for _ in range(fewer(6)):
        lines = shell(text, busy, tmp_path).splitlines()
        assert lines[:OLD_JOBS] == [f"old{number:05}  Cancelled" for number in range(OLD_JOBS)]
        images = {line for line in lines if line.endswith(".png")}
        assert {f"{job_id}_0.png" for job_id in known} <= {image.partition("/")[2] for image in images}


def test_copy_without_the_lock(load, tmp_path):
    """Where there is no flock."""
    check_copies(printed_inline("until cp"), load, tmp_path, fewer(20))


def test_jq_alone_meets_writes(busy):
    """That is why."""
    jq = need("jq")
    command = [jq, "empty", str(busy.data / "jobs.json")]
    until(lambda: subprocess.run(command, stderr=subprocess.DEVNULL).returncode, what="jq meets a write")


def test_lock(start, tmp_path):
    """The printed copies wait for the webui, and it for them: so nothing slow must hold it."""
    need("flock")
    webui = start(*QUICK)
    backup = next(line for line in printed("job-tracker-backup").splitlines() if line.startswith("flock "))
    copying = [printed_inline("flock jobs.json.lock cp"), backup]
    (tmp_path / "job-tracker-backup").mkdir()
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(
            subprocess.Popen(["flock", "jobs.json.lock", "cat"], cwd=str(webui.data), stdin=subprocess.PIPE)
        )
        stack.callback(holder.stdin.close)
        until(lambda: subprocess.run(["flock", "-n", "jobs.json.lock", "true"], cwd=str(webui.data)).returncode)
        sent = webui.send(body())
        options = {"cwd": str(webui.data), "env": {**os.environ, "HOME": str(tmp_path)}}
        copies = [subprocess.Popen([need("bash"), "-c", line], **options) for line in copying]
        sent.socket.settimeout(1)
        with pytest.raises(socket.timeout):
            sent.head()
        assert [copy.poll() for copy in copies] == [None, None]
    assert [copy.wait(30) for copy in copies] == [0, 0]
    sent.socket.settimeout(30)
    sent.job_id()


def check_backup(start: Any, folder: Path, jobs: Dict[str, Any]) -> None:
    """A webui that is started on the backup has every job of before, with its images."""
    webui = start(*QUICK, environ={"TRACKER_DATA_DIR": str(folder), "TRACKER_RETENTION": "off"})
    assert not any("damaged" in line for line in webui.our_log())
    assert webui.job("old00000")["status"] == "Failed"
    for job_id, job in jobs.items():
        assert webui.job(job_id) == job
        assert webui.client.get(f"/sdapi/v1/job/{job_id}/images/0").status_code == 200


def jobs_of(webui: Webui) -> Dict[str, Any]:
    """Completed jobs, the newest among them: their files were made a moment ago."""
    known = completed(webui)
    return {job_id: webui.job(job_id) for job_id in known[:10] + known[10::100]}


def test_backup(busy, start, tmp_path):
    """The second run adds to what the first has copied."""
    need("rsync")
    for _ in range(2):
        jobs = jobs_of(busy)
        shell(printed("job-tracker-backup"), busy, tmp_path)
    check_backup(start, tmp_path / "job-tracker-backup", jobs)
    assert not list((tmp_path / "job-tracker-backup").glob("**/*.part"))


def test_backup_without_rsync(busy, start, tmp_path):
    lines = printed("job-tracker-backup").splitlines()
    text = "\n".join([*lines[:-1], f"{printed_inline('cp -r images')} || true"])
    jobs = jobs_of(busy)
    shell(text, busy, tmp_path)
    check_backup(start, tmp_path / "job-tracker-backup", jobs)


def test_tar_on_the_folder(busy, tmp_path):
    """Its archive has a jobs.json that is cut."""
    tar = need("tar")
    if b"GNU tar" not in subprocess.run([tar, "--version"], stdout=subprocess.PIPE).stdout:
        pytest.skip("this is no GNU tar")

    def is_cut() -> bool:
        command = [tar, "-cf", str(tmp_path / "backup.tar"), "jobs.json"]
        made = subprocess.run(command, cwd=str(busy.data), stderr=subprocess.PIPE)
        if made.returncode != 1:
            return False
        assert b"file changed as we read it" in made.stderr
        subprocess.run([tar, "-xf", "backup.tar"], cwd=str(tmp_path), check=True)
        try:
            json.loads((tmp_path / "jobs.json").read_text(encoding="utf-8"))
        except ValueError:
            return True
        return False

    until(is_cut)
