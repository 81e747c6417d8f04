"""The README's clients behind a gateway that answers in the webui's place: no image is lost, and none is paid twice.

Cloudflare, load balancers, captive portals and the like do so, whether or not the request has reached the webui.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from programs import node
from readme import ADDRESS, example, snippets

from harness import QUICK, UNKNOWN, UNKNOWN_STATUS, Proxy, Start, Webui, body, saved

SILENCE = 1  # seconds of silence after which a hasty client asks again, in the place of a minute
LONGEST = 120  # seconds that a client may take


class Word(NamedTuple):
    """What the gateway answers by itself."""

    status: int
    body: bytes = b"<!DOCTYPE html><html><body>A word of the gateway</body></html>\n"
    type: str = "text/html; charset=UTF-8"
    header: str = "Server: gateway"
    hangs: bool = False  # the answer never ends

    def __bytes__(self) -> bytes:
        length = len(self.body) + self.hangs
        head = f"HTTP/1.1 {self.status} Gateway\r\n{self.header}\r\nContent-Type: {self.type}\r\n"
        return f"{head}Content-Length: {length}\r\nConnection: close\r\n\r\n".encode() + self.body


JSON = "application/json"
WORDS = {
    "200, hangs": Word(200, b"  ", JSON, hangs=True),  # Node's http-proxy does so
    **{str(status): Word(status) for status in (403, 404, 408, 425, 429, 500, 502, 503, 504, *range(520, 531), 598)},
    "429, Retry-After": Word(429, header="Retry-After: 1"),
    "500, JSON": Word(500, b'{"message": "Internal server error"}', JSON),
    "524, JSON": Word(524, b'{"title": "A timeout occurred", "status": 524, "detail": "No answer in time"}', JSON),
    "404, starting": Word(404, b'{"detail": "Not Found"}', JSON),  # a webui before its API is there
    "200, page": Word(200),
    "200, page as JSON": Word(200, type=JSON),
    "200, nothing": Word(200, b"", JSON),
    "200, white space": Word(200, b"    ", JSON),  # Caddy 2.6, when the webui has cut the connection
    "200, half": Word(200, b'  {"id": "A3f9K2xY", "status": "Completed", "ima', JSON),
    "200, other JSON": Word(200, b'{"success": false}', JSON),
    "200, null": Word(200, b"null", JSON),
}


Turn = Tuple[str, Word]
BEFORE: List[Turn] = [("before", word) for word in WORDS.values() if not word.hangs]  # which takes its time
AFTER: List[Turn] = [("after", word) for word in WORDS.values()]


class Gateway(Proxy):
    """A proxy that has its own words first. A request, told by its method and address, meets one turn at each attempt:
    a word "before" the webui has seen the request, or "after" the webui has answered it. After these, it passes.
    """

    def __init__(self, webui: Webui, **turns: List[Turn]):
        """The turns of each method."""
        self.turns = turns
        self.requests: List[Tuple[float, str]] = []  # when which came
        self.closed = threading.Event()
        super().__init__(webui)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, client.makefile("rb") as stream:
            head = b"".join(takewhile(bytes.strip, stream))
            length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            request = head + b"Connection: close\r\n\r\n" + stream.read(int(length.group(1)) if length else 0)
            place, word = self._turn(head.decode("latin-1").rpartition(" HTTP/")[0])
            answer = b"" if place == "before" else self._ask(request)
            if word is None:
                self._pass_on(client, answer)
                return
            client.sendall(self._words(word, answer))
            if word.hangs:
                self.closed.wait(LONGEST)

    def _turn(self, line: str) -> Tuple[str, Optional[Word]]:
        number = self.attempts()[line]
        self.requests.append((time.monotonic(), line))
        turns = self.turns.get(line.split()[0], [])
        return turns[number] if number < len(turns) else ("", None)

    def _ask(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.upstream)) as webui:
            webui.sendall(request)
            return b"".join(iter(lambda: webui.recv(65536), b""))

    def _words(self, word: Word, answer: bytes) -> bytes:
        return bytes(word)

    def _pass_on(self, client: socket.socket, answer: bytes) -> None:
        client.sendall(answer)

    def attempts(self) -> "Counter[str]":
        """How often each request came."""
        return Counter(line for _, line in self.requests)

    def all_said(self) -> bool:
        """Whether each request met all the words that there are for it."""
        attempts = self.attempts()
        return all(number >= len(self.turns.get(line.split()[0], [])) for line, number in attempts.items())

    def close(self) -> None:
        self.closed.set()
        super().close()


class WithID(Gateway):
    """Has its word after the webui's head is through, to the client that has read the job's ID in it."""

    def _words(self, word: Word, answer: bytes) -> bytes:
        job_id = re.search(rb"(?i)\r\nx-job-id: .{8}\r\n", answer)
        return bytes(word).replace(b"\r\n", job_id.group() if job_id else b"\r\n", 1)


class Slow(Gateway):
    """Needs longer for an answer with images than the clients bear silence."""

    def _pass_on(self, client: socket.socket, answer: bytes) -> None:
        size = len(answer) // 8 if len(answer) > 50000 else len(answer)
        for position in range(0, len(answer), size):
            client.sendall(answer[position : position + size])
            time.sleep(SILENCE / 6 if size < len(answer) else 0)


@contextlib.contextmanager
def gateway(webui: Webui, kind: Callable[..., Gateway] = Gateway, **turns: List[Turn]) -> Iterator[Gateway]:
    made = kind(webui, **turns)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def webui(start_shared: Start) -> Webui:
    return start_shared(*QUICK)


# The clients, with short pauses: each gives the job, or raises Complaint with what it told its user


class Complaint(Exception):
    pass


Client = Callable[[str, Dict[str, Any]], Dict[str, Any]]


def replaced(text: str, *pairs: Tuple[str, str]) -> str:
    for old, new in pairs:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    return text


def source(name: str, *pairs: Tuple[str, str]) -> str:
    return replaced(example(name), *pairs)


class Naps:
    """Stands for the module `time`, and sleeps hardly."""

    def __init__(self) -> None:
        self.seconds: List[float] = []

    def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        time.sleep(seconds / 5000)


def in_python(code: str, naps: Optional[Naps] = None) -> Client:
    """The function `generate` of a program."""
    module: Dict[str, Any] = {"__name__": "client"}
    exec(compile(code, "client.py", "exec"), module)
    module["time"] = naps or Naps()

    def generate(*args: Any) -> Dict[str, Any]:
        try:
            return module["generate"](*args)
        except (RuntimeError, module["requests"].RequestException) as error:
            raise Complaint(str(error)) from None

    return generate


def python(_: Path, silence: int = 60) -> Client:
    return in_python(source("retry.py", ("timeout=60", f"timeout={silence}")))


def recovery(naps: Optional[Naps] = None) -> Client:
    program = example("recover.py").partition("\n\n\nanswer = generate(")[0]
    pairs = ("timeout=60", f"timeout={SILENCE}"), ("?wait=30", "?wait=1")

    def generate(url: str, request: Dict[str, Any]) -> Dict[str, Any]:
        return in_python(replaced(program, (ADDRESS, url), *pairs), naps)(request)

    return generate


def run_client(command: List[str]) -> Dict[str, Any]:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=LONGEST)
    if done.returncode:
        assert not done.stdout, "half an answer"
        raise Complaint(done.stderr)
    return json.loads(done.stdout)


IN_NODE = """
import { generate } from "./retry.mjs";
const [url, request] = process.argv.slice(2);
console.log(JSON.stringify(await generate(url, JSON.parse(request))));
"""


def javascript(folder: Path, silence: int = 60, second: float = 0.2) -> Client:
    """`second` is how many milliseconds it takes for one."""
    pairs = ("60_000", f"{silence * 1000}"), ("seconds * 1000", f"seconds * {second}")
    (folder / "retry.mjs").write_text(source("retry.mjs", *pairs))
    (folder / "use.mjs").write_text(IN_NODE)
    program = node()
    return lambda url, request: run_client([program, str(folder / "use.mjs"), url, json.dumps(request)])


IN_BASH = """
set -euo pipefail
sleep() { echo "$1" >> "$FOLDER/naps"; }
source "$FOLDER/retry.sh"
"""


def in_bash(folder: Path, text: str, silence: int = 60) -> List[str]:
    for program in ("bash", "curl", "jq"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine")
    # The speed is a mean of some seconds, so only a higher limit ends a short silence.
    pair = "--speed-time 60 --speed-limit 1", f"--speed-time {silence} --speed-limit 1000"
    (folder / "retry.sh").write_text(source("retry.sh", pair))
    return ["bash", "-c", f"FOLDER={folder}{IN_BASH}{text}", "bash"]


def fire_and_forget(folder: Path) -> Client:
    """The README's lines, which make a file of the first image."""
    (text,) = [it.text for it in snippets() if "# Fire and forget" in it.text]
    lines = replaced(text, ("source retry.sh\n", ""), ("> lighthouse.png", '> "$FOLDER/lighthouse.png"'))

    def generate(url: str, request: Dict[str, Any]) -> Dict[str, Any]:
        made = '{"prompt": "a lighthouse", "steps": 20}', json.dumps(request)
        command = in_bash(folder, replaced(lines, (ADDRESS, url), made))
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=LONGEST)
        if done.returncode:
            raise Complaint(done.stderr)
        return {"status": done.stdout, "image": (folder / "lighthouse.png").read_bytes()}

    return generate


def bash(folder: Path, silence: int = 60) -> Client:
    command = in_bash(folder, 'generate "$@"', silence)
    return lambda url, request: run_client([*command, url, json.dumps(request)])


RETRY = {"retry.py": python, "retry.mjs": javascript, "retry.sh": bash}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(params=RETRY)
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Client:
    return RETRY[request.param](tmp_path)


@pytest.fixture(params=RETRY)
def hasty(request: pytest.FixtureRequest, tmp_path: Path) -> Client:
    return RETRY[request.param](tmp_path, SILENCE)


# The gateway's words


def requests_of(name: str) -> Dict[str, Any]:
    return body(f"for {name}", seed=-1, save_images=True)


@contextlib.contextmanager
def generating_once(webui: Webui) -> Iterator[None]:
    before = len(saved(webui))
    yield
    assert len(saved(webui)) - before == 1


def test_retry(webui, hasty, request):
    """Each word in each phase, and in the first also when the generation has begun."""
    wanted = requests_of(request.node.name)
    with gateway(webui, POST=[*BEFORE, *AFTER], GET=AFTER) as line, generating_once(webui):
        job = hasty(line.url, wanted)
        assert job == webui.job(job["id"]) and job["prompt"] == wanted["prompt"]
        assert len(job["images"]) == 1
        assert line.all_said(), line.attempts()
        assert len(webui.jobs(q=wanted["prompt"])) == 1


def test_fire_and_forget(webui, tmp_path):
    with gateway(webui, POST=AFTER[-3:], GET=AFTER[1:], DELETE=BEFORE[-3:]) as line, generating_once(webui):
        seen = fire_and_forget(tmp_path)(line.url, requests_of("fire and forget"))
        assert seen["status"].strip() == "Completed" and seen["image"].startswith(b"\x89PNG")
        assert line.all_said(), line.attempts()
        assert webui.jobs(q="for fire and forget") == []


@pytest.mark.parametrize("word", WORDS)
def test_recovery(webui, word):
    """Without a key it sends its request once. When it has the job's ID, nothing that a gateway says is too much."""
    wanted = requests_of(f"recovery, {word}")
    after = [("after", WORDS[word])]
    with gateway(webui, kind=WithID, POST=after, GET=after * 2) as line, generating_once(webui):
        job = recovery()(line.url, wanted)
        assert len(job["images"]) == 1 and job["prompt"] == wanted["prompt"]
        assert line.all_said(), line.attempts()


@pytest.mark.parametrize("word", ["524, JSON", "404"])
def test_recovery_has_an_end(webui, word):
    """After an hour, in which it has not hurried."""
    naps, turns = Naps(), {"POST": AFTER[1:2], "GET": [("before", WORDS[word])] * 121}
    complaint = pytest.raises(Complaint, match=r"job \w{8}: .* cannot be reached")
    with gateway(webui, kind=WithID, **turns) as line, complaint:
        recovery(naps)(line.url, body())
    assert min(naps.seconds) >= 1 and 3000 < sum(naps.seconds) < 4200


def test_recovery_of_a_job_that_is_gone(webui):
    gone = Word(404, b'{"detail": "Job not found"}', JSON)
    with gateway(webui, kind=WithID, POST=AFTER[1:2], GET=[("before", gone)] * 2) as line:
        with pytest.raises(Complaint, match="Job not found"):
            recovery()(line.url, body())
        assert attempts(line) == {"POST": 1, "GET": 1}


# What is no trouble of the line


def attempts(line: Gateway) -> Dict[str, int]:
    """How often each method came."""
    return dict(Counter(request.split()[0] for _, request in line.requests))


def test_refused_by_the_webui(webui, client):
    with gateway(webui) as line:
        with pytest.raises(Complaint, match=rf"{UNKNOWN_STATUS}.*(?i:not found)"):
            client(line.url, body(**UNKNOWN))
        assert attempts(line) == {"POST": 1}


@pytest.mark.parametrize("status", [401, 413])
def test_refused_by_the_gateway(webui, client, status):
    with gateway(webui, POST=[("before", Word(status))] * 2) as line:
        with pytest.raises(Complaint, match=rf"{status}.*A word of the gateway"):
            client(line.url, body())
        assert attempts(line) == {"POST": 1}


def test_failed_at_once(webui, client):
    """The webui says 500 itself, and why."""
    answer = b'{"error": "OutOfMemoryError", "detail": "", "body": "", "errors": "CUDA"}'
    with gateway(webui, POST=[("before", Word(500, answer, JSON))] * 2) as line:
        with pytest.raises(Complaint, match="OutOfMemoryError"):
            client(line.url, body())
        assert attempts(line) == {"POST": 1}


def test_failed_job(webui, client):
    wanted = body(standin={"fail": "OutOfMemoryError", "fail_after": 0.5})
    with gateway(webui, POST=AFTER[-3:], GET=AFTER[-3:]) as line, pytest.raises(Complaint, match="OutOfMemoryError"):
        client(line.url, wanted)


def test_job_that_is_gone(webui, client):
    with gateway(webui, GET=[("before", Word(404, b'{"detail": "Job not found"}', JSON))] * 2) as line:
        with pytest.raises(Complaint, match=r"404.*Job not found"):
            client(line.url, body())
        assert attempts(line) == {"POST": 1, "GET": 1}


@pytest.mark.parametrize("word", ["404, starting", "200, page"])
def test_doubt_has_an_end(webui, client, word):
    """Nobody can tell whether this passes. What is said is said to the user then."""
    with gateway(webui, POST=[("before", WORDS[word])] * 31) as line:
        with pytest.raises(Complaint, match=rf"{word[:3]}.*({WORDS[word].body[15:30].decode()})"):
            client(line.url, body())
        assert attempts(line) == {"POST": 30}


@pytest.mark.parametrize("after, seconds", [("45", 45), ("3600", 60), ("Wed, 21 Oct 2015 07:28:00 GMT", 1), ("-1", 1)])
def test_retry_after(webui, tmp_path, after, seconds):
    naps = Naps()
    apart = []
    for client in (in_python(source("retry.py"), naps), javascript(tmp_path, second=3), bash(tmp_path)):
        with gateway(webui, POST=[("before", Word(429, header=f"Retry-After: {after}"))]) as line:
            client(line.url, body())
            (first, _), (second, _), *_ = line.requests
            apart.append(second - first)
    assert apart[1] >= seconds * 0.003
    for nap in naps.seconds[0], float((tmp_path / "naps").read_text().split()[0]):
        assert seconds <= nap < seconds * 1.5 + 1


def test_long_answer(webui, hasty):
    """A minute is the longest silence, and not the longest answer."""
    with gateway(webui, kind=Slow) as line:
        began = time.monotonic()
        assert len(hasty(line.url, body(standin={"image_bytes": 60000}))["images"]) == 1
        assert time.monotonic() - began > SILENCE
