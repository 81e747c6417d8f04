"""Behind a real nginx, which cuts what is silent, speaks HTTP/1.0 to the webui by default, and collects responses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
import requests

from harness import MODE_FLAGS, MODES, Sent, Webui, body, free_port, until, with_constant

SILENCE = 20  # seconds after which this nginx cuts
DEFAULT, NEWER = "", "proxy_http_version 1.1;"  # to the webui it speaks HTTP/1.0 unless it is told


@contextlib.contextmanager
def nginx(folder: Path, *upstreams: Tuple[Webui, str]) -> Iterator[List[int]]:
    """One proxy for each webui, with more of its settings. Gives their ports."""
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("nginx is not on this machine (on Debian and Ubuntu: apt install nginx-light)")
    ports = [free_port() for _ in upstreams]
    servers = "".join(
        f"server {{ listen 127.0.0.1:{port}; location / {{\n"
        f"  proxy_pass {webui.url}; proxy_read_timeout {SILENCE}s; {more} }} }}\n"
        for port, (webui, more) in zip(ports, upstreams)
    )
    paths = "".join(f"{name}_temp_path {folder};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    log = folder / "nginx.log"
    config = f"daemon off; pid {folder}/nginx.pid; error_log {log}; worker_processes 1;\n"
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        config += "user root;\n"
    config += f"events {{}}\nhttp {{ access_log off;\n{paths}{servers}}}\n"
    (folder / "nginx.conf").write_text(config)
    process = subprocess.Popen([program, "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL)

    def listens(port: int) -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        for port in ports:
            until(lambda port=port: listens(port), what="nginx listens")
        yield ports
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def site(start_shared: Any) -> Webui:
    """Its white space comes often."""
    return start_shared(*MODE_FLAGS[MODES[-1]], prepare=with_constant("\nHEARTBEAT = 15.0 ", "\nHEARTBEAT = 0.1 "))


@pytest.fixture(scope="module")
def proxies(site: Webui, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[str, int]]:
    with nginx(tmp_path_factory.mktemp("nginx"), (site, DEFAULT), (site, NEWER)) as ports:
        yield dict(zip(("1.0", "1.1"), ports))


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_head_and_white_space_pass_at_once(site, proxies, version, encoding):
    """With nginx as it comes, whichever HTTP it speaks to the webui."""
    gate = site.gate()
    url = f"http://127.0.0.1:{proxies[version]}/sdapi/v1/txt2img"
    request = body(standin={"hold": str(gate.path)})
    decoder, decoded = zlib.decompressobj(31), b""
    with requests.post(url, json=request, headers={"Accept-Encoding": encoding}, stream=True, timeout=30) as response:
        job_id = response.headers["X-Job-ID"]
        assert response.headers.get("Content-Encoding", "identity") == encoding
        assert "X-Accel-Buffering" not in response.headers, "that was for nginx"
        for piece in response.raw.stream(65536, decode_content=False):
            decoded += decoder.decompress(piece) if encoding == "gzip" else piece
            if not gate.path.exists():
                assert decoded == b" " * len(decoded)
                if len(decoded) >= 4:
                    gate.open()
    assert json.loads(decoded)["images"] == site.job(job_id, wait=30)["images"]


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_failure_is_no_clean_end(site, proxies, version, encoding):
    """With HTTP/1.0 the end of the connection would be the end of the answer, if it were not reset."""
    gate = site.gate()
    request = body(standin={"hold": str(gate.path), "fail": "ValueError", "message": "no"})
    sent = Sent(proxies[version], site.raw(request, headers={"Accept-Encoding": encoding}))
    job_id = sent.job_id()
    site.until_status(job_id, "Processing")
    gate.open()
    with pytest.raises(ConnectionError):
        sent.content()
    assert site.job(job_id, wait=30)["error"] == "ValueError: no"
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        wishes = {"seconds": 5, "fail": "ValueError", "fail_after": 0.8}
        requests.post(f"http://127.0.0.1:{proxies[version]}/sdapi/v1/txt2img", json=body(standin=wishes), timeout=30)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_refusal_passes(site, proxies, version):
    data = b'{"steps": "many"}'
    own = requests.post(f"{site.url}/sdapi/v1/txt2img", data=data)
    response = requests.post(f"http://127.0.0.1:{proxies[version]}/sdapi/v1/txt2img", data=data)
    assert (response.status_code, response.content) == (own.status_code, own.content)
    assert response.status_code == 422 and "X-Job-ID" not in response.headers


def longest_silence(sent: Sent) -> float:
    """Reads a response to its end. Returns the longest time in which nothing came."""
    longest, last = 0.0, time.monotonic()
    while True:
        data = sent.socket.recv(65536)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        if not data:
            return longest
        sent.received += data


@pytest.mark.slow
def test_a_minute_of_generation(start, tmp_path):
    """nginx cuts it after 20 s of silence on the webui alone, and nothing is silent with Job Tracker.

    All at once: a client that waits for its own generation behind nginx, and one that waits in the queue, in each mode
    and encoding.
    """
    tracked = [start(*MODE_FLAGS[mode]) for mode in MODES]
    alone = start(*MODE_FLAGS[MODES[-1]], copies=0)
    minute = {"json": body(standin={"seconds": 60}), "timeout": 90}

    def generate(port: int, encoding: str) -> requests.Response:
        url = f"http://127.0.0.1:{port}/sdapi/v1/txt2img"
        return requests.post(url, headers={"Accept-Encoding": encoding}, **minute)

    settings = (DEFAULT, NEWER)
    with nginx(tmp_path, (alone, DEFAULT), *zip(tracked, settings)) as (bare, *ports), ThreadPoolExecutor(8) as pool:
        cut = pool.submit(generate, bare, "gzip")
        answers = [pool.submit(generate, *it) for it in zip(ports, ("gzip", "identity"))]
        queued = []
        for webui in tracked:
            until(lambda webui=webui: webui.jobs(status="processing"))
            for encoding in ("identity", "gzip"):
                sent = webui.send(body(), headers={"Accept-Encoding": encoding})
                assert webui.job(sent.job_id())["status"] == "Pending"
                queued.append((sent, pool.submit(longest_silence, sent)))
        assert cut.result().status_code == 504
        for webui, answer in zip(tracked, answers):
            response = answer.result()
            assert (response.status_code, response.elapsed.total_seconds() < 5) == (200, True)
            job = webui.job(response.headers["X-Job-ID"], wait=30)
            assert response.json()["images"] == job["images"]
            assert job["finished"] - job["started"] > 59
        for sent, silence in queued:
            assert silence.result() < 16, "15 s, and what the machine takes"
            assert sent.received.endswith(b"0\r\n\r\n")
