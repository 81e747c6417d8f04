"""The receivers of webhooks that README.md shows: they take what is signed, and nothing else, once."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import httpx
import pytest
from programs import node, npm_install
from readme import ADDRESS, RECEIVERS

from harness import MODE_FLAGS, MODES, Webui, body, free_port, until

standardwebhooks = pytest.importorskip("standardwebhooks.webhooks", reason="is for Python 3.9 and newer")

pytestmark = pytest.mark.one_mode

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
PACKAGES = {"private": True, "dependencies": {"express": "4.21.2", "standardwebhooks": "1.0.0"}}
LANGUAGES = ["python", pytest.param("javascript", marks=pytest.mark.all_only)]


class Receiver:
    """One that runs."""

    def __init__(self, language: str, folder: Path, webui: str, port: int):
        self.folder = folder
        self.port = port
        self.url = f"http://127.0.0.1:{self.port}/job-ended"
        text = RECEIVERS[language].replace(ADDRESS, webui)
        assert text != RECEIVERS[language]
        if language == "python":
            (folder / "receiver.py").write_text(text, encoding="utf-8")
            command = [sys.executable, "-m", "uvicorn", "receiver:app", "--port", str(self.port)]
        else:
            (folder / "receiver.mjs").write_text(text, encoding="utf-8")
            command = [node(), "receiver.mjs"]
        environ = {**os.environ, "NO_PROXY": "*", "WEBHOOK_SECRET": SECRET, "PORT": str(self.port)}
        self.output = folder / "output.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=str(folder), env=environ, stdout=output, stderr=subprocess.STDOUT
            )

    def serves(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def send(self, content: bytes, headers: Dict[str, str]) -> int:
        return httpx.post(self.url, content=content, headers=headers, timeout=20, trust_env=False).status_code

    def told(self) -> List[List[str]]:
        """The IDs and statuses of jobs that it printed."""
        lines = [line.split() for line in self.output.read_text(encoding="utf-8").splitlines()]
        return [line[:2] for line in lines if line[1:2] in (["Completed"], ["Failed"])]

    def images(self, job_id: str) -> List[bytes]:
        return [path.read_bytes() for path in sorted(self.folder.glob(f"{job_id}-*"))]

    def has(self, job: Dict[str, Any]) -> bool:
        """Whether it has the images of a job, all of each."""
        assert self.process.poll() is None, self.output.read_text()
        return self.images(job["id"]) == [base64.b64decode(image) for image in job["images"]]


@pytest.fixture(scope="session")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm_install(tmp_path_factory.mktemp("npm"), PACKAGES)


@pytest.fixture(params=LANGUAGES)
def receiver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Receiver]]:
    """`receiver(url)` starts one that fetches images from a webui, `receiver(url, port)` one at that port."""
    folder = tmp_path
    if request.param == "javascript":
        folder = request.getfixturevalue("npm_folder") / tmp_path.name
        folder.mkdir()
    with contextlib.ExitStack() as stack:

        def start(webui: str, port: int = 0) -> Receiver:
            made = Receiver(request.param, folder, webui, port or free_port())
            stack.callback(made.process.wait)
            stack.callback(made.process.kill)
            until(made.serves)
            return made

        yield start


def event_of(job: Dict[str, Any]) -> bytes:
    job = {name: value for name, value in job.items() if name != "images"}
    return json.dumps({"type": "job.completed", "timestamp": "2025-01-12T20:00:09Z", "data": job}).encode()


def signed(content: bytes, id_: str, secret: str = SECRET, age: float = 0.0) -> Dict[str, str]:
    moment = datetime.now(timezone.utc) - timedelta(seconds=age)
    return {
        "content-type": "application/json",
        "webhook-id": id_,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": standardwebhooks.Webhook(secret).sign(id_, moment, content.decode()),
    }


def completed_job(webui: Webui, **headers: str) -> Dict[str, Any]:
    answer = webui.post(body(batch_size=2), headers=headers)
    return webui.job(answer.headers["x-job-id"], wait=30)


def test_it_takes_what_is_signed(webui, receiver):
    """Also a job of more than a hundred kilobytes, and each once."""
    runs = receiver(webui.url)
    job, other = completed_job(webui), completed_job(webui, **{"X-Job-Label": "album"})
    content = event_of({**job, "prompt": "a lighthouse, " * 20_000})
    assert runs.send(content, signed(content, "msg_1")) == 204
    until(lambda: runs.has(job), what="it has the images")
    assert runs.send(content, signed(content, "msg_1")) == 204
    content = event_of(other)
    assert runs.send(content, signed(content, "msg_2")) == 204
    until(lambda: runs.has(other), what="it has the images")
    assert runs.told() == [[job["id"], "Completed"], [other["id"], "Completed"]]


def test_it_refuses_the_rest_and_answers_at_once(webui, receiver):
    """Here it fetches images from where nobody ever answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        runs = receiver(f"http://127.0.0.1:{silent.getsockname()[1]}")
        job = completed_job(webui)
        content = event_of(job)
        good = signed(content, "msg_1")
        other_secret = "whsec_" + base64.b64encode(bytes(32)).decode()
        for wrong in (
            {},
            {**good, "webhook-id": "msg_2"},
            {**good, "webhook-signature": "v1"},
            {**good, "webhook-signature": "v1,not base64"},
            {**good, "webhook-timestamp": "nan"},
            signed(content, "msg_1", secret=other_secret),
            signed(content, "msg_1", age=3600),
        ):
            assert runs.send(content, wrong) == 401, wrong
        assert runs.send(content.replace(b"Completed", b"Failed"), good) == 401
        assert runs.send(b"\xff" + content, good) == 401
        assert runs.send(b"", {name: value for name, value in good.items() if name != "content-type"}) == 401
        assert runs.told() == []
        assert runs.send(content, good) == 204
        until(lambda: runs.told() == [[job["id"], "Completed"]])


def test_the_whole_way(start, receiver):
    """From a generation to its images at the receiver."""
    port = free_port()
    environ = {"TRACKER_WEBHOOK_URL": f"http://127.0.0.1:{port}/job-ended", "TRACKER_WEBHOOK_SECRET": SECRET}
    webui = start(*MODE_FLAGS[MODES[-1]], environ=environ)
    runs = receiver(webui.url, port)
    job = completed_job(webui, **{"X-Job-Label": "album"})
    until(lambda: runs.has(job), what="it has the images")
    sent = webui.send(body(standin={"fail": "ValueError"}))
    sent.to_end()
    failed = webui.jobs(limit=1)[0]
    until(lambda: runs.told() == [[job["id"], "Completed"], [failed["id"], "Failed"]])
    until(lambda: all(one["webhook"]["delivered"] and one["webhook"]["attempts"] == 1 for one in webui.jobs()))
