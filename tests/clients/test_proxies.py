"""Behind real proxies: which of them pass on the head, the white space and a failure, as the README has it in a table.

nginx is looked at more closely: it cuts what is silent, speaks HTTP/1.0 to the webui by default, and collects
responses.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import Any, Callable, Dict, Iterator, NamedTuple, Tuple

import pytest
import requests
from programs import npm_install
from proxies import HTTP_PROXY, NGINX, NPM_PACKAGES, PROXIES, find, running
from readme import README, example, names, table

from harness import MODE_FLAGS, MODES, SECONDS, Sent, Webui, body, until

SILENCE = 20  # seconds after which nginx cuts here
# To the webui it speaks HTTP/1.0 unless it is told otherwise.
HTTP_1_0 = f"proxy_read_timeout {SILENCE}s;"
HTTP_1_1 = f"proxy_read_timeout {SILENCE}s; proxy_http_version 1.1;"


class Row(NamedTuple):
    """What the README says of a proxy."""

    version: str
    head: str
    white_space: str
    failure: str
    needs: str
    tells_address: str

    @property
    def setting(self) -> str:
        return (names(self.needs) or [""])[0]


def rows() -> Dict[str, Row]:
    found = {}
    for proxy, *cells in table("nginx"):
        name, version = proxy.rsplit(" ", 1)
        found[name] = Row(version, *cells)
    return found


ROWS = rows()
YES, NO = "yes", "no"
CUT, CLEAN, SILENT = "a cut", "a clean end", "silence"


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm_install(tmp_path_factory.mktemp("npm"), NPM_PACKAGES) / "node_modules"


Prepare = Callable[[str], Path]


@pytest.fixture(scope="module")
def prepare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """Makes a folder in which a proxy can start. Skips the test if the README speaks of another version of it."""

    def make_folder(name: str) -> Path:
        folder, proxy = tmp_path_factory.mktemp("proxy"), PROXIES[name]
        if proxy is HTTP_PROXY:
            (folder / "node_modules").symlink_to(request.getfixturevalue("node_modules"))
        words = [Template(word).substitute(folder=folder) for word in proxy.version]
        told = subprocess.run([find(proxy), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.decode()
        version = re.search(r"\d+(\.\d+)+", told).group()
        if not f"{version}.".startswith(f"{ROWS[name].version}."):
            pytest.skip(f"the README is about version {ROWS[name].version}, and this is {version}")
        return folder

    return make_folder


class Front(NamedTuple):
    """A proxy that runs before the webui of these tests."""

    name: str
    port: int
    row: Row


@pytest.fixture(scope="module")
def site(start_shared: Any) -> Webui:
    """Its white space comes often."""
    return start_shared(*MODE_FLAGS[MODES[-1]], constants={"HEARTBEAT": 0.1})


@pytest.fixture(scope="module", params=PROXIES)
def front(request: pytest.FixtureRequest, site: Webui, prepare: Prepare) -> Iterator[Front]:
    """Each proxy, with the setting that it needs by the README."""
    row = ROWS[request.param]
    with running(PROXIES[request.param], site, prepare(request.param), row.setting) as port:
        yield Front(request.param, port, row)


@pytest.fixture(scope="module")
def nginx(site: Webui, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[str, int]]:
    """nginx with each HTTP that it speaks to the webui: port by version."""
    with contextlib.ExitStack() as stack:
        yield {
            version: stack.enter_context(running(NGINX, site, tmp_path_factory.mktemp("nginx"), setting))
            for version, setting in (("1.0", HTTP_1_0), ("1.1", HTTP_1_1))
        }


# What each passes on


def test_every_proxy_of_the_table_is_tried():
    assert set(ROWS) == set(PROXIES)
    failures = {row.failure for row in ROWS.values()}
    assert failures == {CUT, CLEAN, SILENT}, "the text below the table explains these"


def while_it_waits(site: Webui, port: int, encoding: str, row: Row) -> Tuple[str, str]:
    """Whether the head and white space come before the generation ends. What then comes must be the answer."""
    gate = site.gate()
    request = {"json": body(standin={"hold": str(gate.path)}), "headers": {"Accept-Encoding": encoding}}
    patience = 30 if (row.head, row.white_space) == (YES, YES) else 1.5
    try:
        response = requests.post(f"http://127.0.0.1:{port}/sdapi/v1/txt2img", stream=True, timeout=patience, **request)
    except requests.ReadTimeout:
        gate.open()
        until(site.is_idle)
        return NO, NO
    white_space = NO
    decoder, decoded = zlib.decompressobj(31), b""
    with response:
        job_id = response.headers["X-Job-ID"]
        assert response.headers.get("Content-Encoding", "identity") == encoding
        if "nginx" in response.headers["Server"]:
            assert "X-Accel-Buffering" not in response.headers, "that was for it"
        for piece in response.raw.stream(65536, decode_content=False):
            decoded += decoder.decompress(piece) if encoding == "gzip" else piece
            if not gate.path.exists():
                assert decoded == b" " * len(decoded)
                if len(decoded) >= 4:
                    white_space = YES
                    gate.open()
    assert json.loads(decoded)["images"] == site.job(job_id, wait=30)["images"]
    return YES, white_space


def end_of_a_failure(site: Webui, port: int, encoding: str, row: Row) -> str:
    """What a client sees of a generation that fails while it waits."""
    gate = site.gate()
    request = body(standin={"hold": str(gate.path), "fail": "ValueError", "message": "no"})
    sent = Sent(port, site.raw(request, headers={"Accept-Encoding": encoding}))
    try:
        job_id = sent.job_id()
        site.until_status(job_id, "Processing")
        gate.open()
        assert site.job(job_id, wait=30)["error"] == "ValueError: no"
        sent.socket.settimeout(2 if row.failure == SILENT else 30)
        content = sent.content()
    except ConnectionError:
        return CUT
    except socket.timeout:
        return SILENT
    finally:
        sent.leave()
    if encoding == "gzip":
        content = zlib.decompressobj(31).decompress(content)
    assert content == b" " * len(content)
    return CLEAN


def early_answer_is_kept(site: Webui, port: int) -> bool:
    """Whether a proxy goes on answering as the webui did when the job had no image yet."""
    gate = site.gate()
    job_id = site.send(body(standin={"hold": str(gate.path)})).job_id()
    job, image = f"http://127.0.0.1:{port}/sdapi/v1/job/{job_id}", f"/sdapi/v1/job/{job_id}/images/0"
    assert requests.get(job).json()["status"] in ("Pending", "Processing")
    assert requests.get(f"http://127.0.0.1:{port}{image}").status_code == 404
    gate.open()
    assert site.job(job_id, wait=30)["status"] == "Completed"
    answers = requests.get(job), requests.get(f"http://127.0.0.1:{port}{image}")
    return answers[0].json()["status"] != "Completed" or answers[1].status_code != 200


def waits_without_silence(site: Webui, port: int, encoding: str) -> bool:
    """Whether a client that waits for a job gets the head and the white space at once, and in the end the job."""
    gate = site.gate()
    job_id = site.send(body(standin={"hold": str(gate.path)})).job_id()
    head = f"GET /sdapi/v1/job/{job_id}?images=false&wait=60 HTTP/1.1"
    fields = f"Host: 127.0.0.1:{port}\r\nConnection: close\r\nAccept-Encoding: {encoding}"
    sent = Sent(port, f"{head}\r\n{fields}\r\n\r\n".encode())
    sent.socket.settimeout(2)  # white space is sent ten times a second
    try:
        assert sent.head()[0] == 200
        for _ in range(4):
            sent.received += sent.socket.recv(65536)
    except socket.timeout:
        return False
    finally:
        gate.open()
    sent.socket.settimeout(SECONDS)
    content = sent.content()
    job = json.loads(zlib.decompress(content, 31) if encoding == "gzip" else content)
    assert (job["id"], job["status"]) == (job_id, "Completed")
    return True


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_waiting_for_a_job(site, front, encoding):
    assert waits_without_silence(site, front.port, encoding)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_waiting(site, front, encoding):
    assert while_it_waits(site, front.port, encoding, front.row) == (front.row.head, front.row.white_space)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_failure(site, front, encoding):
    assert end_of_a_failure(site, front.port, encoding, front.row) == front.row.failure


def test_events(site, front):
    """Each comes when it is sent, and the end is a clean one."""
    gate = site.gate()
    job_id = site.send(body(standin={"hold": str(gate.path)})).job_id()
    url = f"http://127.0.0.1:{front.port}/sdapi/v1/job/{job_id}/events"
    with requests.get(url, stream=True, timeout=30) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = response.iter_lines(chunk_size=1)
        assert next(lines) == b"event: status"
        assert b":" in lines, "a comment, of a job that goes on"
        gate.open()
        assert list(lines)[-3] == b"id: ended"


def test_nothing_is_answered_from_before(site, front):
    assert not early_answer_is_kept(site, front.port)


def test_refusal_passes(site, front):
    data = b'{"steps": "many"}'
    own = requests.post(f"{site.url}/sdapi/v1/txt2img", data=data)
    response = requests.post(f"http://127.0.0.1:{front.port}/sdapi/v1/txt2img", data=data)
    assert (response.status_code, response.content) == (own.status_code, own.content)
    assert response.status_code == 422 and "X-Job-ID" not in response.headers


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.setting])
def test_setting_is_needed(site, prepare, name):
    """Without it the row would not be true."""
    impatient = ROWS[name]._replace(head=NO)
    with running(PROXIES[name], site, prepare(name)) as port:
        passed = while_it_waits(site, port, "identity", impatient)
        assert passed == (NO, NO) or not waits_without_silence(site, port, "identity")


def test_nothing_early_is_kept(site, front):
    """A 404 of an image that is not made yet, say, by a proxy that is a cache, too."""
    assert not early_answer_is_kept(site, front.port)


@pytest.mark.parametrize("failure", [CUT, CLEAN, SILENT])
def test_the_program_of_the_readme_knows_a_failure(site, prepare, tmp_path, failure):
    """Whatever becomes of it on its way."""
    name = next(name for name, row in ROWS.items() if row.failure == failure)
    program = example("recover.py")
    wishes = {"seconds": 5, "fail": "OutOfMemoryError", "fail_after": 0.8}
    request = json.dumps({"Stand-in": {"args": [wishes]}})
    program = program.replace('"steps": 20', f'"steps": 20, "alwayson_scripts": {request}')
    assert program.count("timeout=60") == 2
    with running(PROXIES[name], site, prepare(name), ROWS[name].setting) as port:
        program = program.replace("http://127.0.0.1:7860", f"http://127.0.0.1:{port}").replace("=60)", "=2)")
        done = subprocess.run([sys.executable, "-c", program], cwd=str(tmp_path), stderr=subprocess.PIPE, timeout=60)
    assert "RuntimeError: OutOfMemoryError" in done.stderr.decode()


# nginx


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_head_and_white_space_pass_at_once(site, nginx, version, encoding):
    """Whichever HTTP it speaks to the webui."""
    assert while_it_waits(site, nginx[version], encoding, ROWS["nginx"]) == (YES, YES)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_failure_is_no_clean_end(site, nginx, version, encoding):
    """With HTTP/1.0 the end of the connection would be the end of the answer, if it were not reset."""
    assert end_of_a_failure(site, nginx[version], encoding, ROWS["nginx"]) == CUT
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        wishes = {"seconds": 5, "fail": "ValueError", "fail_after": 0.8}
        requests.post(f"http://127.0.0.1:{nginx[version]}/sdapi/v1/txt2img", json=body(standin=wishes), timeout=30)


# The address of a client. Other addresses of this machine play another client, and a proxy on another machine

CLIENT, ELSEWHERE = "127.0.0.3", "127.0.0.2"
CLAIMED = "203.0.113.9"  # what a client says of itself


def has_other_addresses() -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind((ELSEWHERE, 0))
        return True
    return False


needs_other_addresses = pytest.mark.skipif(not has_other_addresses(), reason="127.0.0.2 is no address of this machine")


def address_seen(webui: Webui, port: int, **headers: str) -> str:
    """The `ip` of a job that a client sends to a proxy."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30, source_address=(CLIENT, 0))
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json", **headers}
        connection.request("POST", "/sdapi/v1/txt2img", json.dumps(body()), headers)
        response = connection.getresponse()
        assert json.loads(response.read())["images"]
    return webui.job(response.headers["X-Job-ID"], wait=30)["ip"]


@needs_other_addresses
def test_address_behind_a_proxy_here(site, front, prepare):
    told = names(front.row.tells_address)
    assert bool(told) != (front.row.tells_address == YES)
    assert address_seen(site, front.port) == ("127.0.0.1" if told else CLIENT)
    if told:
        with running(PROXIES[front.name], site, prepare(front.name), told[0]) as port:
            assert address_seen(site, port) == CLIENT


@needs_other_addresses
@pytest.mark.parametrize(
    ("mode", "trusted", "seen", "seen_if_claimed"),
    [
        (MODES[-1], None, ELSEWHERE, ELSEWHERE),
        *((mode, "printed", CLIENT, CLIENT) for mode in MODES),
        (MODES[-1], "*", CLIENT, CLAIMED),
    ],
)
def test_address_behind_a_proxy_elsewhere(site, start, tmp_path, mode, trusted, seen, seen_if_claimed):
    """By default it is the proxy's own, and with `*` what the client says of itself."""
    find(NGINX)
    webui = site
    if trusted is not None:
        ((name, printed),) = re.findall(r"`export (FORWARDED_ALLOW_IPS)=(.*?)`", README)
        assert printed.endswith("10.0.0.2")
        value = printed.replace("10.0.0.2", ELSEWHERE) if trusted == "printed" else trusted
        webui = start(*MODE_FLAGS[mode], environ={name: value})
    setting = f"proxy_bind {ELSEWHERE}; {names(ROWS['nginx'].tells_address)[0]}"
    with running(NGINX, webui, tmp_path, setting) as port:
        assert address_seen(webui, port) == seen
        assert address_seen(webui, port, **{"X-Forwarded-For": CLAIMED}) == seen_if_claimed


# Time


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

    with contextlib.ExitStack() as stack:

        def port_before(webui: Webui, setting: str) -> int:
            folder = tmp_path / str(webui.port)
            folder.mkdir()
            return stack.enter_context(running(NGINX, webui, folder, setting))

        bare, ports = port_before(alone, HTTP_1_0), [port_before(*it) for it in zip(tracked, (HTTP_1_0, HTTP_1_1))]
        pool = stack.enter_context(ThreadPoolExecutor(8))
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
