"""A generation that fails is never a clean success, whatever the client."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
import subprocess

import httpx
import pytest

from harness import CLOSE, KINDS, MODES, QUICK, Sent, body, until

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB"


def ended_cleanly(received):
    """Whether a response in chunks has its end."""
    return received.endswith(b"0\r\n\r\n")


def answer_of(received):
    """What came after the head, without the marks of its chunks."""
    return b"".join(received.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2])


@pytest.mark.parametrize("kind", KINDS)
def test_late_failure_cuts_the_connection(every_webui, kind):
    webui, gate = every_webui, every_webui.gate()
    request = body(kind=kind, standin={"hold": gate, "fail": "OutOfMemoryError", "message": MESSAGE})
    sent = webui.send(request, kind, {"Accept-Encoding": "identity"})
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    log_before = len(webui.log)
    gate.open()
    received = sent.to_end()
    assert not ended_cleanly(received)
    assert answer_of(received).strip() == b""

    job = webui.job(job_id, wait=30)
    assert job["status"] == "Failed"
    assert job["error"] == f"OutOfMemoryError: {MESSAGE}"
    assert (job["images"], job["parameters"], job["info"]) == ([], None, None)
    assert job["started"] <= job["finished"]
    until(webui.is_idle)
    assert webui.records()[job_id]["error"] == job["error"]

    assert_logged_once(webui.log[log_before:], job_id)
    assert webui.post(body()).status_code == 200, "and the next one is generated"


def assert_logged_once(log, job_id):
    """With the traceback of the webui, and in no way as a crash of the server or of ours."""
    ours = [line for line in log.splitlines() if line.startswith("[Job Tracker]")]
    assert len(ours) == 1 and job_id in ours[0], ours
    assert log.count("Traceback") == 1 and "OutOfMemoryError" in log, log
    for word in ("Exception in ASGI", "without completing response", "job_tracker.py", "API error"):
        assert word not in log, log


@pytest.mark.parametrize("reset", [False, True])
def test_failure_of_a_job_whose_client_has_left_is_logged_once(every_webui, reset):
    webui, gate = every_webui, every_webui.gate()
    sent = webui.send(body(standin={"hold": gate, "fail": "OutOfMemoryError", "message": MESSAGE}))
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    log_before = len(webui.log)
    sent.leave(reset)
    gate.open()
    assert webui.job(job_id, wait=30)["status"] == "Failed"
    assert_logged_once(webui.log[log_before:], job_id)


def test_failure_of_a_job_for_which_nobody_waits_is_logged_once(every_webui):
    webui, gate = every_webui, every_webui.gate()
    request = body(standin={"hold": gate, "fail": "OutOfMemoryError", "message": MESSAGE})
    job_id = webui.post(request, headers={"Prefer": "respond-async"}).headers["x-job-id"]
    webui.until_status(job_id, "Processing")
    log_before = len(webui.log)
    gate.open()
    assert webui.job(job_id, wait=30)["status"] == "Failed"
    assert_logged_once(webui.log[log_before:], job_id)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("status", ["Pending", "Processing"])
def test_a_cancelled_request_is_one_line_of_the_log(webui, status, version):
    gate = webui.gate()
    blocking = webui.send(body(standin={"hold": gate}))
    webui.until_status(blocking.job_id(), "Processing")
    data = webui.raw(body(standin={"seconds": 30} if status == "Processing" else None), headers=CLOSE)
    sent = Sent(webui.port, data.replace(b" HTTP/1.1\r\n", b" HTTP/" + version.encode() + b"\r\n"))
    job_id = sent.job_id()
    if status == "Processing":
        gate.open()
    webui.until_status(job_id, status)
    log_before = len(webui.log)
    webui.client.post(f"/sdapi/v1/job/{job_id}/cancel")
    assert not ended_cleanly(sent.to_end())
    assert webui.job(job_id, wait=30)["error"] == "Cancelled"
    log = [line for line in webui.log[log_before:].splitlines() if "HTTP/1.1" not in line and line]
    assert log == [f"[Job Tracker] Job {job_id} was cancelled"]


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_failure_while_running(webui, encoding, version):
    """Nothing that a client could take for an answer comes, in any encoding and version of HTTP."""
    wishes = {"seconds": 5, "fail": "ValueError", "fail_after": 0.2}
    data = webui.raw(body(standin=wishes), headers={"Accept-Encoding": encoding})
    before = set(webui.records())
    with http.client.socket.create_connection(("127.0.0.1", webui.port), 30) as connection:
        connection.sendall(data.replace(b" HTTP/1.1\r\n", b" HTTP/" + version.encode() + b"\r\n"))
        received, reset = b"", False
        try:
            for piece in iter(lambda: connection.recv(65536), b""):
                received += piece
        except ConnectionResetError:
            reset = True
    assert reset or version == "1.1", "where a closed connection is a clean end, it is reset"
    assert not ended_cleanly(received)
    (job_id,) = set(webui.records()) - before
    assert webui.job(job_id, wait=30)["error"] == "ValueError"


@pytest.mark.parametrize("held", [True, False])
def test_failure_when_the_images_are_encoded(webui, held):
    """The lock is released by then."""
    gate = webui.gate()
    before = set(webui.records())
    wishes = {"fail_encoding": True, "fail": "RuntimeError", "message": "no room", "hold": gate}
    sent = webui.send(body(standin=wishes))
    if held:
        webui.until_status(sent.job_id(), "Processing")
    gate.open()
    received = sent.to_end()
    assert not received.startswith(b"HTTP/1.1 200") or not ended_cleanly(received)
    (job_id,) = set(webui.records()) - before
    job = webui.job(job_id, wait=30)
    assert (job["status"], job["error"], job["images"]) == ("Failed", "RuntimeError: no room", [])


@pytest.mark.skipif("nowebui" not in MODES, reason="the UI's own server would need a certificate that it trusts")
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_failure_over_tls(start, tmp_path, version):
    """TLS has a good-bye of its own, which to HTTP/1.0 would be the end of a whole answer."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not on this machine")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([openssl, *request, "-keyout", key, "-out", certificate], check=True, stderr=subprocess.DEVNULL)
    webui = start(*QUICK, "--tls-keyfile", key, "--tls-certfile", certificate)
    data = webui.raw(body(standin={"seconds": 5, "fail": "ValueError", "fail_after": 1}))
    plain = socket.create_connection(("127.0.0.1", webui.port), 30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    received, clean = b"", True
    with context.wrap_socket(plain, suppress_ragged_eofs=False) as connection:
        connection.sendall(data.replace(b" HTTP/1.1\r\n", b" HTTP/" + version.encode() + b"\r\n"))
        try:
            for piece in iter(lambda: connection.recv(65536), b""):
                received += piece
        except (ConnectionResetError, ssl.SSLEOFError):
            clean = False
    assert b" 200 OK" in received and not ended_cleanly(received)
    assert version == "1.1" or not clean
    assert "without completing response" not in webui.log


def test_failure_in_the_queue(webui):
    """One that waits fails as soon as it is its turn, and harms nobody around it."""
    gate = webui.gate()
    first = webui.send(body(standin={"hold": gate}))
    webui.until_status(first.job_id(), "Processing")
    second = webui.send(body(standin={"fail": "OutOfMemoryError"}))
    third = webui.send(body())
    ids = [sent.job_id() for sent in (first, second, third)]
    gate.open()
    ends = [sent.to_end() for sent in (first, second, third)]
    assert [ended_cleanly(end) for end in ends] == [True, False, True]
    jobs = [webui.job(job_id, wait=30) for job_id in ids]
    assert [job["status"] for job in jobs] == ["Completed", "Failed", "Completed"]
    assert jobs[1]["error"] == "OutOfMemoryError"


def test_early_failure_keeps_its_own_status(webui, alone):
    """The webui's answer, where the head is not out yet. The job says the same."""
    request = body(standin={"fail": "OutOfMemoryError", "message": MESSAGE})
    own = alone(webui).post(request)
    assert own.status_code == 500
    own_words, before = 0, set(webui.records())
    for _ in range(10):
        try:
            response = webui.post(request, headers=CLOSE)
        except httpx.RemoteProtocolError:
            continue
        assert (response.status_code, response.content) == (500, own.content)
        assert "X-Job-ID" not in response.headers
        own_words += 1
    assert own_words
    jobs = [webui.job(job_id, wait=30) for job_id in set(webui.records()) - before]
    assert [(job["status"], job["error"]) for job in jobs] == [("Failed", f"OutOfMemoryError: {MESSAGE}")] * 10


@pytest.mark.parametrize(
    "name, message",
    [
        ("KeyError", "prompt"),
        ("UnicodeError", "ünïcode 🎨"),
        ("AssertionError", ""),
        ("StopAsyncIteration", ""),
        ("TimeoutError", ""),
        ("ConnectionResetError", "gone"),
        ("BrokenPipeError", ""),
        ("RuntimeError", "x" * 10000),
    ],
)
def test_every_exception_is_a_failed_job(webui, name, message):
    """Also those that mean something to a server."""
    gate = webui.gate()
    sent = webui.send(body(standin={"hold": gate, "fail": name, "message": message}))
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    gate.open()
    assert not ended_cleanly(sent.to_end())
    job = webui.job(job_id, wait=30)
    assert job["status"] == "Failed"
    assert name in job["error"] and message[:100] in job["error"]


def test_exception_forges_no_line_of_the_log(webui):
    gate, before = webui.gate(), webui.log_path.stat().st_size
    message = "oops\n[Job Tracker] Ready, tracking is off\r\n\x1b[2J"
    sent = webui.send(body(standin={"hold": gate, "fail": "ValueError", "message": message}))
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    gate.open()
    sent.to_end()
    assert webui.job(job_id, wait=30)["error"] == f"ValueError: {message}"
    lines = [line for line in webui.our_log() if job_id in line]
    assert len(lines) == 1
    assert "\x1b" not in lines[0] and "oops\\n" in lines[0]
    assert not [line for line in webui.our_log() if "Ready, tracking is off" in line and job_id not in line]
    assert "\x1b" not in webui.log_since(before)  # others put some into what the host says of their addresses


def test_an_exception_that_has_no_text(start):
    """Some extension's may even fail at that. Its job ends all the same."""
    script = (
        "from modules import standin\n"
        "class Mute(RuntimeError):\n"
        "    def __str__(self):\n"
        "        raise ValueError\n"
        "standin.StandIn.error = lambda self: Mute()\n"
    )
    webui = start(*QUICK, scripts={"mute": script})
    gate = webui.gate()
    sent = webui.send(body(standin={"hold": gate, "fail": "Mute"}))
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    gate.open()
    assert not ended_cleanly(sent.to_end())
    job = webui.job(job_id, wait=30)
    assert (job["status"], job["error"]) == ("Failed", "Mute")


def test_who_sees_a_cut_finds_the_job_failed(webui):
    """So a client that repeats it at once, with another request under the same key, say, is not refused."""
    for number in range(15):
        gate, headers = webui.gate(), {"Idempotency-Key": f"cut {number}"}
        sent = webui.send(body(standin={"hold": gate, "fail": "ValueError"}), headers=headers)
        webui.until_status(sent.job_id(), "Processing")
        gate.open()
        assert not ended_cleanly(sent.to_end())
        assert webui.post(body("another"), headers=headers).status_code == 200


def test_answer_that_is_no_json_is_a_failure(webui):
    """A lone surrogate cannot be sent as UTF-8: the webui itself fails."""
    gate = webui.gate()
    sent = webui.send(json.dumps(body(standin={"hold": gate.path.as_posix(), "strings": ["\ud800"]})).encode())
    job_id = sent.job_id()
    webui.until_status(job_id, "Processing")
    gate.open()
    assert not ended_cleanly(sent.to_end())
    job = webui.job(job_id, wait=30)
    assert job["status"] == "Failed" and "surrogates" in job["error"]
