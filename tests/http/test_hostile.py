"""Hostile requests, files and names: no answer 500, nothing forged, nothing revealed."""

from __future__ import annotations

import json
import os
import re
import string
import time
import uuid
from typing import Any, Dict, Optional, Sequence, Tuple

import httpx
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from harness import CLOSE, MODES, QUICK, Page, Sent, Webui, body, fewer, status_of, strictly, until

pytestmark = pytest.mark.one_mode

FORGED = "x\n[Job Tracker] forged\r\n[Job Tracker] forged\x85\u2028\x1b[2J\x1b[31m\u202e\u2066\x00\x07"
LONG = 60_000  # bytes; uvicorn takes that many of headers if they come in one piece, as they nearly always do here
SOON = 3.0  # seconds


@pytest.fixture(scope="session")
def own(pool) -> Webui:
    """The same webui without Job Tracker."""
    return pool.get("alone", MODES[-1], auth=True)


@pytest.fixture(scope="module")
def job_id(webui: Webui) -> str:
    job_id, _ = (webui.post(body()).headers["x-job-id"] for _ in range(2))  # two, so that a list has a next page
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    return job_id


@pytest.fixture(scope="module")
def cursor(webui: Webui, job_id: str) -> str:
    """One that is valid, for it comes from a Link header."""
    link = webui.client.get("/sdapi/v1/jobs", params={"limit": 1}).links["next"]["url"]
    return link.partition("cursor=")[2]


@pytest.fixture
def quiet(webui: Webui) -> Any:
    """Whatever a test sends, no exception reaches the webui's log."""
    position = webui.log_path.stat().st_size
    yield
    assert "Traceback" not in webui.log_since(position)


def send(webui: Webui, method: str, path: str, headers: Sequence[Tuple[str, str]] = ()) -> bytes:
    """A request to the byte, and all that came back."""
    host = [] if "Host" in dict(headers) else ["Host: x"]
    lines = [f"{method} {path} HTTP/1.1", *host, "Connection: close", *map(": ".join, headers)]
    return Sent(webui.port, "\r\n".join([*lines, "", ""]).encode("latin-1")).to_end()


# All routes


ESCAPES = ["%00", "%0a", "%0d%0a", "%ff", "%ed%a0%80", "%e2%80%ae", "%2e%2e", "%2f"]
PIECES = [*ESCAPES, "\xff", "..", "/", "\\", "%", "+", "&", "=", ";", "a", "0", "-", "1e999", "nan", "null", "x" * 999]
ODD = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
NUMBERS = ["0", "-1", "1", "999999", "1000000", "9" * 5000, "1e5", "nan", "-inf", "0x1", "\xb2", "%D9%A3", "true", ""]
NUMBER = st.sampled_from(NUMBERS)
IDS = st.one_of(st.just("{job}"), st.sampled_from(["AAAAAAAA", "jobs", ".", "%7Bjob%7D"]), ODD)
PATH = st.one_of(
    st.builds("/sdapi/v1/job/{}".format, IDS),
    st.builds("/sdapi/v1/job/{}/images/{}".format, IDS, st.one_of(NUMBER, ODD)),
    st.builds("/sdapi/v1/job/{}/cancel".format, IDS),
    st.sampled_from(["/sdapi/v1/jobs", "/sdapi/v1/jobs/stats"]),
    st.builds("/sdapi/v1/{}".format, ODD),
)
NAMES = "ip status type after before label q limit cursor images wait nobody".split()
STATUS = st.sampled_from(["Pending", "pROCESSING", "completed", "Failed", "txt2img"])
CURSOR = st.sampled_from(
    ["0-0-0-AAAAAAAA", "9-9-999999999999-AAAAAAAA", "1" + "-AAAAAAAA" * 11, "0-0-0-{job}", "{cursor}"]
)
QUERY = st.lists(st.builds("{}={}".format, st.sampled_from(NAMES), st.one_of(NUMBER, STATUS, CURSOR, ODD)), max_size=4)
FIELD = st.sampled_from(
    "Accept-Encoding If-None-Match Prefer Idempotency-Key X-Job-Label X-Job-Webhook X-Forwarded-For "
    "X-Forwarded-Proto Host Range Origin "
    "Authorization Cookie Accept Content-Type If-Modified-Since Forwarded X-HTTP-Method-Override Expect".split()
)
TOKENS = ["gzip", "q=0", ";", ",", "*", '"', "\\", "W/", "\xe9", "\x85", "\x1b[2J", " "]
TOKENS += ["[", "]", "::1", "/", "?", "#", "@", "bytes=0-"]
VALUE = st.lists(st.sampled_from(TOKENS), max_size=5).map(lambda tokens: "".join(tokens).strip())
METHOD = st.sampled_from(["GET"] * 6 + ["HEAD", "POST", "PUT", "PATCH", "OPTIONS", "TRACE", "get", "X"])


@pytest.mark.usefixtures("quiet")
@hypothesis_settings(max_examples=fewer(300), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(METHOD, PATH, QUERY, st.lists(st.tuples(FIELD, VALUE), max_size=4))
@example("GET", "/sdapi/v1/jobs", ["limit=1", "cursor={cursor}"], [])
@example("GET", "/sdapi/v1/jobs", ["limit=1"], [("Host", "[")])
@example("GET", "/sdapi/v1/jobs", ["limit=1"], [("Host", "a]b")])
@example("GET", "/sdapi/v1/jobs", ["limit=1"], [("Host", "\x1b[31m")])
@example("GET", "/sdapi/v1/jobs", ["limit=1"], [("Host", "elsewhere/?x=")])
def test_any_request(webui, job_id, cursor, method, path, query, headers):
    url = (path + "?" * bool(query) + "&".join(query)).replace("{job}", job_id).replace("{cursor}", cursor)
    answer = send(webui, method, url, headers)
    status = status_of(answer)
    assert 200 <= status < 500, answer[:500]
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"elsewhere" not in head
    link = re.search(rb"(?i)\r\nlink: ([^\r]*)", head)
    assert not link or re.fullmatch(rb'</sdapi/v1/jobs\?[!-~]*>; rel="next"', link.group(1))
    if status in (404, 405, 422) and method != "HEAD":
        assert strictly(content)["detail"]


def test_the_job_is_still_there(webui, job_id):
    assert webui.job(job_id)["images"]
    assert webui.is_idle()


# Headers


KEPT_HEADERS = ["Idempotency-Key", "X-Job-Label", "X-Job-Webhook"]
REPEATED = ['\\"', '"\\', '"', '"a', ",", ";", " ", "\xe9", "q=", "0"]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("start, end", [("", ""), ('"', "\\")])
@pytest.mark.parametrize("name", ["Prefer", "Accept-Encoding", "If-None-Match", "X-Forwarded-For", *KEPT_HEADERS])
def test_a_long_header_holds_up_nobody(webui, job_id, name, start, end):
    """Whatever it repeats is read once, and not again from each place where it might begin."""

    def ask(line, headers=(), content=b""):
        lines = [f"{line} HTTP/1.1", "Host: x", "Connection: close", f"{name}: {value}", *headers]
        for _ in range(5):
            answer = Sent(webui.port, "\r\n".join([*lines, "", ""]).encode("latin-1") + content).to_end()
            if b"Invalid HTTP request" not in answer:  # which is uvicorn's word if it came in more than one piece
                break
        return status_of(answer)

    content = json.dumps(body()).encode()
    typed = ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    for repeated in REPEATED:
        value = start + repeated * (LONG // len(repeated)) + end
        if not value.strip():
            continue
        began = time.monotonic()
        assert ask("POST /sdapi/v1/txt2img", typed, content) in (200, 202, 422)
        assert ask(f"GET /sdapi/v1/job/{job_id}/images/0") == 200
        assert ask("GET /sdapi/v1/jobs?limit=1") == 200
        assert time.monotonic() - began < SOON, repeated


@pytest.mark.usefixtures("quiet")
def test_many_headers(webui, job_id):
    """More than the server takes is its own answer; what it takes is answered."""
    for name in ("Prefer", "Accept-Encoding", "If-None-Match", "Authorization", "X-Forwarded-For"):
        assert status_of(send(webui, "GET", f"/sdapi/v1/job/{job_id}", [(name, "a, b")] * 1000)) == 200
        assert status_of(send(webui, "GET", f"/sdapi/v1/job/{job_id}", [(name, "x" * 1_000_000)])) in (400, 431)


@pytest.mark.parametrize(
    "value",
    ["<script>alert(1)</script>", "\x1b[2J", "\xe9\x85", '"', "\\", "' OR 1=1", "a" * 20_000, "null", "%s%n", "::1, x"],
    ids=lambda value: value[:10],
)
def test_an_address_that_is_none(webui, value):
    """uvicorn takes what a proxy on the same machine says for the address, whatever it is."""
    prompt = str(uuid.uuid4())
    raw = webui.raw(body(prompt), headers={"Prefer": "respond-async"})
    for source, fields in (("127.0.0.1", value), ("127.0.0.2", "127.0.0.2")):
        data = raw.replace(b"\r\n", b"\r\nX-Forwarded-For: " + value.encode("latin-1") + b"\r\n", 1)
        sent = socket_from(source, webui.port, data)
        assert status_of(sent) == 202
        (job,) = webui.jobs(q=prompt, limit=1)
        assert fields.startswith(job["ip"]) or job["ip"] in value
        assert len(job["ip"]) <= 100
        assert [one["id"] for one in webui.jobs(q=prompt, ip=job["ip"])][:1] == [job["id"]]
        assert webui.job(job["id"], wait=30)["status"] == "Completed"
        assert webui.records()[job["id"]]["ip"] == job["ip"]
        assert (source == "127.0.0.2") == (job["ip"] == "127.0.0.2")


def socket_from(source: str, port: int, data: bytes) -> bytes:
    import socket

    with socket.create_connection(("127.0.0.1", port), 30, (source, 0)) as connection:
        connection.sendall(data)
        received = b""
        while True:
            piece = connection.recv(65536)
            if not piece:
                return received
            received += piece


def test_a_text_to_look_for_has_a_limit(webui):
    """Some Pythons look for it in a time that grows with the product of both lengths."""
    longest = webui.client.get("/sdapi/v1/jobs", params={"q": "a" * 500})
    assert longest.status_code == 200
    answer = webui.client.get("/sdapi/v1/jobs", params={"q": "a" * 501})
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["query", "q"]


def test_a_text_that_is_hard_to_find_holds_up_nobody(webui):
    sent = [webui.post(body("a" * 100_000, steps=0), headers=CLOSE) for _ in range(8)]
    assert {answer.status_code for answer in sent} == {500}
    began = time.monotonic()
    assert webui.jobs(q="a" * 250 + "b" + "a" * 249) == []
    assert time.monotonic() - began < SOON


# Clients that leave


def test_who_leaves_at_once_is_no_error(webui, job_id):
    """The webui's layers take a response that did not begin for a failure, and log it with what the client sent."""
    position = webui.log_path.stat().st_size
    for path in ("jobs", f"job/{job_id}", f"job/{job_id}?images=false", f"job/{job_id}/images/0"):
        for reset in (False, True):
            request = f"GET /sdapi/v1/{path} HTTP/1.1\r\nHost: \x1b[31mforged\r\n\r\n".encode()
            for sent in [Sent(webui.port, request) for _ in range(30)]:
                sent.leave(reset)
    until(lambda: webui.client.get("/standin/threads").json()["tasks"] < 12, what="nothing of them is left")
    log = webui.log_since(position)
    assert "Traceback" not in log and "forged" not in log, log[-3000:]


# Bodies


def quick(**fields: Any) -> str:
    return json.dumps({"steps": 1, "width": 64, "height": 64, **fields})


def deep(depth: int) -> bytes:
    return quick(comments=0).replace("0}", '{"a":' * depth + "1" + "}" * depth + "}").encode()


BODIES: Dict[str, bytes] = {
    **{f"depth {depth}": deep(depth) for depth in (100, 300, 450, 600, 800, 900, 1000, 10_000, 100_000)},
    "lists of depth 10,000": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "not a number": quick(cfg_scale=float("nan")).encode(),
    "not a number, unused": quick(comments={"a": float("nan")}).encode(),
    "infinite": b'{"cfg_scale": 1e999, ' + quick()[1:].encode(),
    "infinite steps": b'{"steps": Infinity}',
    "half a character": b'{"prompt": "\\ud800", ' + quick()[1:].encode(),
    "the other half": b'{"prompt": "\\udc00\\ud800", ' + quick()[1:].encode(),
    "half a character as a key": b'{"comments": {"\\ud800": 1}, ' + quick()[1:].encode(),
    "half a character as bytes": b'{"prompt": "\xed\xa0\x80", ' + quick()[1:].encode(),
    "NUL": quick(prompt="a\0b").encode(),
    "controls": quick(prompt=FORGED).encode(),
    "UTF-16": quick().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + quick().encode(),
    "the same key twice": b'{"prompt": 1, "prompt": "b", ' + quick()[1:].encode(),
    "huge number": b'{"seed": ' + b"9" * 5000 + b"}",
    "large number": b'{"seed": ' + b"9" * 400 + b", " + quick()[1:].encode(),
    "large float": b'{"subseed_strength": 1' + b"0" * 400 + b".5, " + quick()[1:].encode(),
    **{
        f"prompt {json.dumps(prompt)[:20]}": quick(prompt=prompt).encode()
        for prompt in (None, 5, 1.5, True, [], ["a"], {}, {"a": 1}, [[["a"]]])
    },
    "prototype": b'{"__proto__": {"prompt": "x"}, "constructor": 1, ' + quick()[1:].encode(),
    "flag that is none": quick(send_images="no").encode(),
    "flag that is null": quick(send_images=None).encode(),
    "task that is none": quick(force_task_id=5).encode(),
    "task with controls": quick(force_task_id=FORGED).encode(),
    "task that is a path": quick(force_task_id="../../../x").encode(),
}


def outcome(webui: Webui, content: bytes) -> Tuple[Optional[int], bytes, Optional[str]]:
    """Status, content and job's ID; no status for a connection that was cut."""
    try:
        answer = webui.post(content)
    except httpx.RemoteProtocolError:
        return None, b"", None
    return answer.status_code, answer.content, answer.headers.get("x-job-id")


@pytest.mark.parametrize("name", BODIES)
def test_hostile_body(webui, own, name):
    """The webui's own answer to it, or, where it fails as a job, its own failure or a cut."""
    before = set(webui.records())
    expected = outcome(own, BODIES[name])
    status, content, job_id = outcome(webui, BODIES[name])
    until(webui.is_idle)
    new = set(webui.records()) - before
    for one in new:
        for path in (f"job/{one}", f"job/{one}?images=false", "jobs?limit=1"):
            answer = webui.client.get(f"/sdapi/v1/{path}")
            assert answer.status_code == 200
            job = strictly(answer.content)
            job = job if isinstance(job, dict) else job[0]
            assert isinstance(job["prompt"], str)
            assert job["status"] == ("Completed" if expected[0] == 200 else "Failed")
            assert bool(job["error"]) == (job["status"] == "Failed")
    if expected[0] == 200:
        assert status == 200 and new == {job_id}
        assert len(json.loads(content)["images"]) == len(json.loads(expected[1])["images"])
        assert webui.job(job_id)["parameters"] == json.loads(content)["parameters"]
    elif expected[0] == 500:
        assert status in (None, 500)
        if status and b'"error"' in expected[1]:
            assert json.loads(content)["error"] == json.loads(expected[1])["error"]
        assert len(new) == (name != "infinite steps")  # some webuis fail when they refuse these
    else:
        assert (status, content) == expected[:2]
        assert not new and job_id is None


def test_100_megabytes(webui, own):
    """The job is as small as any other."""
    data = b'{"nobody knows": "' + b"x" * 100_000_000 + b'", ' + quick(seed=7)[1:].encode()
    expected, answer = own.post(data), webui.post(data, headers={"Idempotency-Key": str(uuid.uuid4())})
    assert answer.json()["images"] == expected.json()["images"]
    job_id = answer.headers["x-job-id"]
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    assert len(json.dumps(webui.records()[job_id])) < 1000


# Files that somebody changed


def replace_answer(webui: Webui, job_id: str, content: Optional[bytes]) -> Any:
    (path,) = [path for path in webui.images() if path.name == f"{job_id}.json"]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    return path


ANSWERS = {
    "gone": None,
    "empty": b"",
    "cut": b'{"images":[],"parameters":{"prompt":"a',
    "not UTF-8": b'{"images":[],"parameters":{"prompt":"\xff"},"info":""}',
    "a list": b"[]",
    "null": b"null",
    "no parameters": b'{"images":[],"info":""}',
    "parameters that are none": b'{"images":[],"parameters":[],"info":""}',
    "deep": b'{"images":[],"parameters":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "deep lists": b'{"images":[],"parameters":' + b"[" * 100_000,
    "not a number": b'{"images":[],"parameters":{"a":NaN},"info":""}',
    "zeros": bytes(5000),
}


SOUND = ("not a number", "no parameters", "parameters that are none")  # a webui may have answered so


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ANSWERS)
def test_a_stored_answer_that_is_damaged(webui, name):
    """The job can be shown, and a repeat of its request does not get it as a good answer."""
    request, key = body(f"of {uuid.uuid4()}"), {"Idempotency-Key": str(uuid.uuid4())}
    job_id = webui.post(request, headers=key).headers["x-job-id"]
    webui.job(job_id, wait=30)
    replace_answer(webui, job_id, ANSWERS[name])
    for path in (f"job/{job_id}", f"job/{job_id}?images=false", "jobs?limit=1"):
        answer = webui.client.get(f"/sdapi/v1/{path}")
        assert answer.status_code == 200
        strictly(answer.content)
    assert webui.job(job_id)["images"][0]
    if name not in SOUND:
        repeat = webui.post(request, headers=key)
        assert (repeat.status_code, repeat.headers["x-job-id"]) == (503, job_id)
        assert repeat.json()["detail"].startswith("The stored answer cannot be read: ")
        assert any(job_id in line and "cannot be read" in line for line in webui.our_log())


@pytest.mark.usefixtures("quiet")
def test_a_stored_answer_that_is_a_link(webui, tmp_path):
    """What it leads to is not revealed, and not removed."""
    secret = tmp_path / "secret"
    secret.write_text('{"images":[],"parameters":{"secret":"word"},"info":"secret"}')
    job_id = webui.post(body()).headers["x-job-id"]
    webui.job(job_id, wait=30)
    path = replace_answer(webui, job_id, None)
    path.symlink_to(secret)
    answer = webui.client.get(f"/sdapi/v1/job/{job_id}")
    assert answer.status_code == 200 and "secret" not in answer.text
    assert answer.json()["parameters"] is None
    assert webui.client.delete(f"/sdapi/v1/job/{job_id}").status_code == 204
    assert secret.exists() and not os.path.lexists(str(path))


# The log


def test_nothing_forges_a_line_of_the_log(start):
    """By a variable, a broken config.json, a damaged jobs.json, a prompt, an ID, a header, or an error's text."""

    def prepare(webui: Webui) -> None:
        (webui.extension / "config.json").write_bytes(b'{"enabled": ' + FORGED.encode())
        record = b'"AAAAAAAA": {"id": "' + FORGED.encode() + b'"},\n'
        (webui.data / "jobs.json").write_bytes(b"{\n" + record + FORGED.encode())

    environ = {"TRACKER_ENABLED": "1", "TRACKER_RETENTION": FORGED.replace("\0", "") + "7"}
    webui = start(*QUICK, environ=environ, prepare=prepare)
    job_id = webui.post(body(FORGED.replace("\0", ""))).headers["x-job-id"]
    webui.job(job_id, wait=30)
    replace_answer(webui, job_id, FORGED.encode())
    headers = {"Idempotency-Key": "\x85[Job Tracker] forged \x1b[2J", "X-Forwarded-For": "\x1b[2J"}
    headers.update({"X-Job-Label": headers["Idempotency-Key"], "X-Job-Webhook": "\x85[Job Tracker] forged"})
    for path in ("job/{}", "job/{}/images/0", "jobs?q={}", "jobs?status={}", "job/{}/cancel"):
        for value in ("%0a%5BJob%20Tracker%5D%20forged%1b%5b2J", "%E2%80%AE", job_id):
            send(webui, "GET", "/sdapi/v1/" + path.format(value), list(headers.items()))
    lines = until(lambda: [line for line in webui.our_log() if "jobs.json is damaged" in line] and webui.our_log())
    assert not any(line.startswith("[Job Tracker] forged") for line in lines), lines

    gate = webui.gate()
    failing = webui.send(body(FORGED, standin={"hold": gate, "fail": "ValueError", "message": FORGED}))
    failed_id = failing.job_id()
    webui.until_status(failed_id, "Processing")
    gate.open()
    failing.to_end()
    assert webui.job(failed_id, wait=30)["status"] == "Failed"
    lines += [line for line in webui.our_log() if failed_id in line]  # the host's own lines are its own affair
    assert "x\\n[Job Tracker] forged" in lines[-1]
    printable = set(string.printable) - set("\n\r\t\x0b\x0c")
    assert all(set(line) <= printable for line in lines), lines
    for about in (
        "TRACKER_RETENTION=",
        "config.json cannot be read",
        "jobs.json is damaged",
        f"Job {failed_id} failed",
    ):
        assert sum(about in line for line in lines) == 1, (about, lines)


# The page


@pytest.fixture(scope="module")
def paged(start_shared: Any) -> Webui:
    webui = start_shared("--api")
    webui.job(webui.post(body(FORGED.replace("\0", "") + "<script>")).headers["x-job-id"], wait=30)
    return webui


NO_SETTINGS = [
    *("false", "true", "", 0, 1, -1, 1.5, None, [], [True], {}, {"enabled": False}, "x" * 100_000, "\ud800"),
    *("30", "Off ", "off", "0 days", "1000000 days", 30, 0, ["7 days"], {"7 days": 7}, [[]], FORGED, "../config"),
]


def test_the_settings_take_only_what_they_know(paged):
    page, path = Page(paged.client), paged.extension / "config.json"
    before = path.read_bytes()
    for value in NO_SETTINGS:
        for name in ("job_tracker_enabled", "job_tracker_retention"):
            answer = page.call(name, value)
            assert answer.status_code == 200, (name, value, answer.text[:300])
            assert path.read_bytes() == before, (name, value)
    assert page.call("job_tracker_enabled", False).status_code == 200
    assert page.call("job_tracker_retention", "7 days").status_code == 200
    assert json.loads(path.read_text()) == {"enabled": False, "retention_days": 7}
    assert page.call("job_tracker_enabled", True).status_code == 200
    assert json.loads(path.read_text()) == {"enabled": True, "retention_days": 7}
    assert "Traceback" not in paged.log


def test_a_look_shows_what_it_knows_whatever_is_asked(paged):
    page, (job_id,) = Page(paged.client), paged.records()
    assert job_id in page.look()
    views = ["", "null", "[]", 5, None, [], {}, "[" * 100_000, '{"page": 4294967295}', '{"page": 1e400}']
    views += [json.dumps(view) for view in ({"job": FORGED}, {"job": "\ud800"}, {"version": [1]}, {"job": job_id})]
    odds = ("", None, 0, [], {"a": 1}, "\ud800", FORGED, "x" * 1_000_000)
    for view, odd in [*((view, "") for view in views), *((views[-1], odd) for odd in odds)]:
        answer = page.call("job_tracker_look", view, *[odd] * 6)
        assert answer.status_code == 200, (view, odd, answer.text[:300])
        html = answer.text
        assert "<script>" not in html and "\\u202e" not in html.lower() and "\u202e" not in html
    assert "Traceback" not in paged.log
