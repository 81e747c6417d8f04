"""The suite's part of HTTP once more, on a server with httptools and uvloop, as some install them beside the webui."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib

import pytest

from harness import PROJECT, QUICK, SERVER, TESTS, Sent, body

pytest.importorskip("httptools")
pytest.importorskip("uvloop")

FILES = (
    *(f"http/test_{name}.py" for name in ("requests", "failures", "wait", "async", "cancel", "leaving", "image_route")),
    "clients/test_proxies.py",
)


@pytest.mark.all_only
@pytest.mark.skipif(SERVER == "httptools", reason="all of this runs on it already")
def test_all_of_http():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in FILES)],
        cwd=str(PROJECT),
        env={**os.environ, "WEBUI_SERVER": "httptools"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 100, done.stdout


@pytest.fixture(scope="module")
def webui(start_shared):
    return start_shared(*QUICK, *([] if SERVER == "httptools" else ["--httptools"]))


def old_request(webui, data: bytes) -> Sent:
    """The same request by a client of HTTP/1.0, for which a connection that is closed ends the answer."""
    return Sent(webui.port, data.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n"))


def content_of(received: bytes) -> bytes:
    head, _, content = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower(), "which HTTP/1.0 does not have"
    return content


def test_it_is_the_server(webui):
    assert {"httptools", "uvloop"} <= set(webui.client.get("/standin/modules").json())


@pytest.mark.parametrize("kind", ["txt2img", "img2img"])
def test_a_generation_over_http_1_0(webui, kind):
    sent = old_request(webui, webui.raw(body(kind=kind, standin={"seconds": 0.3}), kind))
    content = content_of(sent.to_end())
    job = webui.job(sent.head()[1]["x-job-id"], wait=30)
    assert json.loads(content)["images"] == job["images"]


@pytest.mark.parametrize("path", ["jobs?limit=3", "job/{}", "job/{}?images=false", "job/{}?wait=1"])
def test_lists_and_jobs_over_http_1_0(webui, path):
    job_id = webui.post(body()).headers["x-job-id"]
    webui.job(job_id, wait=30)
    path = "/sdapi/v1/" + path.format(job_id)
    sent = old_request(webui, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert json.loads(content_of(sent.to_end())) == webui.client.get(path).json()


def test_an_image_over_http_1_0(webui):
    job_id = webui.post(body()).headers["x-job-id"]
    webui.job(job_id, wait=30)
    path = f"/sdapi/v1/job/{job_id}/images/0"
    for encoding in ("identity", "gzip"):
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: {encoding}\r\n\r\n"
        content = content_of(old_request(webui, request.encode()).to_end())
        content = zlib.decompress(content, 31) if encoding == "gzip" else content
        assert content == webui.client.get(path).content
