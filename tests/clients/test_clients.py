"""Clients: what those see that know nothing of Job Tracker, and what the README's own make of a line that breaks.

Each of the former meets a success, a refusal (422), a generation that fails, and a connection that breaks on its way.
None takes a generation that failed for a good one. With the latter no image is lost, and none is generated twice.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import random
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import httpx
import pytest
from programs import node, npm_install
from readme import EXAMPLES, OF_TESTS, example, table

from harness import (
    AUTH,
    MODE_FLAGS,
    MODES,
    QUICK,
    RESET,
    SECONDS,
    UNKNOWN,
    UNKNOWN_STATUS,
    Gate,
    Proxy,
    Start,
    Webui,
    body,
    hold_the_queue,
    saved,
    until,
)

CASES = ("success", "refusal", "failure", "cut")
IMAGE = "the images"
BLANK = "only white space"


def seen_by_clients() -> Dict[str, List[str]]:
    """The table of tests/README.md: for each client what it makes of each case. The last two are one column there."""
    rows = [[cell.replace("`", "") for cell in row] for row in table("curl", OF_TESTS)]
    return {client: [*seen, seen[-1]] for client, *seen in rows}


SEEN = seen_by_clients()

PACKAGES = {
    "private": True,
    "type": "module",
    "dependencies": {"axios": "1.7.9", "stable-diffusion-api": "0.0.7"},
    "overrides": {"sharp": "0.33.5"},  # the one that it asks for must be compiled
}

FETCH = """
const [url, request] = process.argv.slice(2);
const clients = {
  async fetch() {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch(`${url}/sdapi/v1/txt2img`, { method: "POST", headers, body: request });
    return response.ok ? (await response.json()).images : response.status;
  },
};
"""

NPM = """
import axios from "axios";
import stableDiffusion from "stable-diffusion-api";

const [url, request] = process.argv.slice(2);
const clients = {
  async axios() {
    return (await axios.post(`${url}/sdapi/v1/txt2img`, JSON.parse(request), { proxy: false })).data.images;
  },
  async "stable-diffusion-api"() {
    const { hostname: host, port } = new URL(url);
    const api = new stableDiffusion.default({ host, port, protocol: "http" });
    const result = await api.txt2img(JSON.parse(request));
    await result.image.metadata(); // a picture
    return result.response.data.images;
  },
};
"""

TELL = """
const told = {};
for (const [name, call] of Object.entries(clients)) {
  told[name] = await call().catch((error) => `${error.code ?? error.name}: ${error.message}`);
}
console.log(JSON.stringify(told));
"""


# stable-diffusion-api names this script in every request, as people who use it have it.
CONTROLNET = """
from types import SimpleNamespace
from modules.api import generation

known = generation.always_on


def always_on(request, missing):
    scripts = {name: value for name, value in (request.alwayson_scripts or {}).items() if name != "ControlNet"}
    return known(SimpleNamespace(alwayson_scripts=scripts), missing)


generation.always_on = always_on
"""

# Programs that take a cut for the end of the answer. Each prints, as JSON, what its user gets.
UNAWARE = {
    "PHP file_get_contents": (
        ["php", "-r"],
        "$http = ['method' => 'POST', 'header' => 'Content-Type: application/json', 'content' => $argv[2]];"
        "echo json_encode(@file_get_contents($argv[1], false, stream_context_create(['http' => $http])));",
    ),
    "Perl LWP": (
        ["perl", "-MLWP::UserAgent", "-MJSON::PP", "-e"],
        "my $response = LWP::UserAgent->new->post($ARGV[0], Content_Type => 'application/json', Content => $ARGV[1]);"
        "print encode_json([$response->is_success ? $response->content : 0 + $response->code]);",
    ),
}
WGET = "wget --tries=1"


class Cut(Proxy):
    """A proxy in front of a webui that ends a connection when the first byte of the answer's body is through."""

    def __init__(self, webui: Webui):
        self.ids: List[str] = []
        super().__init__(webui)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            while True:
                request = receive(client)
                with socket.create_connection(("127.0.0.1", self.upstream)) as webui:
                    webui.sendall(request)
                    if not request.startswith(b"POST "):
                        client.sendall(receive(webui))
                        continue
                    answer = b""
                    while not answer.partition(b"\r\n\r\n")[2]:
                        answer += webui.recv(65536)
                    self.ids.append(headers_of(answer)["x-job-id"])
                    client.sendall(answer)
                    client.shutdown(socket.SHUT_RDWR)
                    webui.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    return


def headers_of(message: bytes) -> Dict[str, str]:
    lines = message.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in lines}


def receive(connection: socket.socket) -> bytes:
    """A whole message. Raises OSError if the other side has gone."""
    message, whole = b"", False
    while not whole:
        data = connection.recv(65536)
        if not data:
            raise ConnectionError
        message += data
        head, end, content = message.partition(b"\r\n\r\n")
        headers = headers_of(head)
        if "transfer-encoding" in headers:
            whole = content.endswith(b"0\r\n\r\n")
        else:
            whole = bool(end) and len(content) >= int(headers.get("content-length", 0))
    return message


@pytest.fixture(scope="module")
def site(start_shared: Callable[..., Webui]) -> Webui:
    return start_shared(*MODE_FLAGS[MODES[-1]], scripts={"controlnet": CONTROLNET})


@pytest.fixture(scope="module")
def cut(site: Webui) -> Iterator[Cut]:
    proxy = Cut(site)
    yield proxy
    proxy.close()


class Case(NamedTuple):
    name: str
    url: str
    request: Dict[str, Any]
    gate: Optional[Gate]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, site: Webui, cut: Cut, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setenv("NO_PROXY", "*")
    if request.param == "refusal":
        return Case("refusal", site.url, body(steps="many"), None)
    if request.param == "failure":
        wishes = {"seconds": 5, "fail": "OutOfMemoryError", "fail_after": 0.8}
        return Case("failure", site.url, body(standin=wishes), None)
    if request.param == "cut":
        gate = site.gate()
        return Case("cut", cut.url, body(standin={"hold": str(gate.path)}), gate)
    return Case("success", site.url, body(), None)


class Python:
    """Each gives the images, or the status of an answer that is none; what it raises is what its user sees."""

    def __init__(self, case: Case):
        self.url = f"{case.url}/sdapi/v1/txt2img"
        self.case = case

    def requests(self) -> Any:
        import requests

        response = requests.post(self.url, json=self.case.request)
        return response.json()["images"] if response.ok else response.status_code

    def httpx(self) -> Any:
        response = httpx.post(self.url, json=self.case.request, trust_env=False, timeout=30)
        return response.json()["images"] if response.is_success else response.status_code

    def aiohttp(self) -> Any:
        aiohttp = pytest.importorskip("aiohttp")

        async def post() -> Any:
            async with aiohttp.ClientSession() as session, session.post(self.url, json=self.case.request) as response:
                return (await response.json())["images"] if response.ok else response.status

        return asyncio.run(post())

    def urllib(self) -> Any:
        data = json.dumps(self.case.request).encode()
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)["images"]

    def webuiapi(self) -> Any:
        return self._webuiapi().json["images"]

    def webuiapi_async(self) -> Any:
        async def post() -> Any:
            return (await self._webuiapi(use_async=True)).json["images"]

        return asyncio.run(post())

    def _webuiapi(self, **options: Any) -> Any:
        webuiapi = pytest.importorskip("webuiapi")
        request = self.case.request
        fields = {name: request[name] for name in ("alwayson_scripts", "steps") if name in request}
        return webuiapi.WebUIApi(baseurl=f"{self.case.url}/sdapi/v1").txt2img(**fields, **options)


PYTHON = {
    "Python requests": "requests",
    "Python httpx": "httpx",
    "Python aiohttp": "aiohttp",
    "Python urllib": "urllib",
    "webuiapi": "webuiapi",
    "webuiapi, use_async": "webuiapi_async",
}


def in_words(images: Any) -> str:
    """What a client has got. The image is one that can be opened."""
    if isinstance(images, (str, int)):
        return f"status {images}" if isinstance(images, int) else images
    assert len(images) == 1 and images[0].startswith("iVBOR")
    return IMAGE


def check_kept(site: Webui, cut: Cut, case: Case, clients: int = 1) -> None:
    """What a broken connection cost its client is found by its ID."""
    if case.gate is None:
        return
    case.gate.open()
    until(lambda: len(cut.ids) >= clients)
    for job_id in cut.ids:
        assert len(site.job(job_id, wait=30)["images"]) == 1
    cut.ids.clear()


def test_every_client_of_the_table_is_tried():
    assert set(SEEN) == {"curl", *PYTHON, "fetch in Node", "axios", "stable-diffusion-api", *UNAWARE, WGET}


@pytest.mark.parametrize("client", PYTHON)
def test_python(site, cut, case, client):
    function = getattr(Python(case), PYTHON[client])
    try:
        seen = in_words(function())
    except Exception as error:
        seen = f"{type(error).__module__}.{type(error).__qualname__}".replace("builtins.", "")
        if seen == "RuntimeError":
            assert error.args[0] == 422
    assert seen == SEEN[client][CASES.index(case.name)]
    check_kept(site, cut, case)


def test_curl(site, cut, case):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not on this machine")
    command = [curl, "-sS", "--compressed", "-w", "\n%{http_code}", "-H", "Content-Type: application/json", "-d", "@-"]
    data = json.dumps(case.request).encode()
    done = subprocess.run([*command, f"{case.url}/sdapi/v1/txt2img"], input=data, capture_output=True)
    answer, _, status = done.stdout.rpartition(b"\n")
    if done.returncode:
        seen = f"exits with {done.returncode}"
    elif status == b"200":
        seen = in_words(json.loads(answer)["images"])
    else:
        seen = f"status {status.decode()}"
    assert seen == SEEN["curl"][CASES.index(case.name)]
    check_kept(site, cut, case)


@pytest.mark.parametrize("client", UNAWARE)
def test_programs_that_know_no_cut(site, cut, case, client):
    (program, *options), source = UNAWARE[client]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not on this machine")
    trial = [program, *options, "1" if program == "perl" else "1;"]
    if subprocess.run(trial, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        pytest.skip(f"this {program} has no {client}")
    command = [program, *options, source, f"{case.url}/sdapi/v1/txt2img", json.dumps(case.request)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    got = json.loads(done.stdout)
    got = got[0] if isinstance(got, list) else got
    if isinstance(got, str):
        seen = in_words(json.loads(got)["images"]) if got.strip() else BLANK
    else:
        seen = "false" if got is False else f"status {got}"
    assert seen == SEEN[client][CASES.index(case.name)]
    check_kept(site, cut, case)


def wget(case: Case, *options: str, **more: Any) -> subprocess.Popen[bytes]:
    program = shutil.which("wget")
    if program is None:
        pytest.skip("wget is not on this machine")
    head, data = "--header=Content-Type: application/json", f"--post-data={json.dumps(case.request)}"
    return subprocess.Popen([program, *options, "-qO-", head, data, f"{case.url}/sdapi/v1/txt2img"], **more)


def test_wget(site, cut, case):
    process = wget(case, *WGET.split()[1:], stdout=subprocess.PIPE)
    answer, _ = process.communicate(timeout=60)
    seen = f"exits with {process.returncode}" if process.returncode else in_words(json.loads(answer)["images"])
    assert seen == SEEN[WGET][CASES.index(case.name)]
    check_kept(site, cut, case)


def test_wget_repeats(site):
    """Unless it is told to try once."""
    until(site.is_idle)
    known = len(site.jobs(limit=1000))
    wishes = {"seconds": 5, "fail": "OutOfMemoryError", "fail_after": 0.5}
    process = wget(Case("failure", site.url, body(standin=wishes), None), "--waitretry=0", stdout=subprocess.DEVNULL)
    try:
        until(lambda: len(site.jobs(limit=1000)) >= known + 3, what="a third generation")
    finally:
        process.kill()
        process.wait()


def run_node(folder: Any, source: str, case: Case) -> Dict[str, str]:
    (folder / "client.mjs").write_text(source + TELL)
    command = [shutil.which("node"), "client.mjs", case.url, json.dumps(case.request)]
    done = subprocess.run(command, cwd=str(folder), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return {name: in_words(told) for name, told in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm_install(tmp_path_factory.mktemp("npm"), PACKAGES)


def test_fetch(site, cut, case, tmp_path):
    node()
    (seen,) = run_node(tmp_path, FETCH, case).values()
    assert seen == SEEN["fetch in Node"][CASES.index(case.name)]
    check_kept(site, cut, case)


@pytest.mark.all_only
def test_npm(site, cut, case, npm_folder):
    seen = run_node(npm_folder, NPM, case)
    assert seen == {name: SEEN[name][CASES.index(case.name)] for name in ("axios", "stable-diffusion-api")}
    check_kept(site, cut, case, clients=2)


# The clients of the README, over a line that breaks at random


# The shared webui that does not track, in one mode.
OFF = pytest.mark.parametrize("off", MODES[-1:], indirect=True)
HASTE = 20  # how many times shorter than their own the clients' pauses are here

IN_NODE = """
import { generate } from %s;
const [url, requests, headers] = JSON.parse(process.argv[1]);
const jobs = await Promise.all(requests.map((request) => generate(url, request, headers)));
console.log(JSON.stringify(jobs));
"""


class BadLine:
    """A proxy that cuts connections, by FIN or RST: at once, within the request, before the answer or within it."""

    PLACES = ("in the request", "before the answer", "in the answer", "at once")
    SHARE = 0.5  # of the connections that break

    def __init__(self, port: int, places: Tuple[str, ...] = PLACES):
        self.port = port
        self.places = places
        self.cuts: "Counter[str]" = Counter()
        self._chance = random.Random(7)
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=200))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Where it was cut least often: few clients make few connections.
        place = min(self.places, key=lambda one: (self.cuts[one], self._chance.random()))
        place = place if self._chance.random() < self.SHARE else None
        if place == "at once":
            self._cut(place, writer)
            return
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
            limits = {"in the request": (self._chance.randrange(300), None), "before the answer": (None, 0)}
            up, down = limits.get(place or "", (None, None))
            if place == "in the answer":
                down = self._chance.randrange(1, self._chance.choice((300, 300, 300, 12000)))  # most answers are short
            ways = {
                asyncio.ensure_future(self._pass(reader, back, up)),
                asyncio.ensure_future(self._pass(there, writer, down)),
            }
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            if any(not way.cancelled() and way.exception() is None and way.result() for way in done):
                self._cut(place or "", writer)
            back.close()
        writer.close()

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: Optional[int]) -> bool:
        """True when as many bytes were passed as the limit says, and there were more."""
        while True:
            data = await reader.read(4096)
            if not data:
                return False
            if limit is not None and len(data) > limit:
                writer.write(data[:limit])
                await writer.drain()
                return True
            if limit is not None:
                limit -= len(data)
            writer.write(data)
            await writer.drain()

    def _cut(self, place: str, writer: asyncio.StreamWriter) -> None:
        self.cuts[place] += 1
        if self._chance.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.close()


@pytest.fixture(scope="module")
def webui(start_shared: Start) -> Webui:
    return start_shared(*QUICK, *AUTH)


@contextlib.contextmanager
def bad_line(webui: Webui, places: Tuple[str, ...] = BadLine.PLACES) -> Iterator[BadLine]:
    line = BadLine(webui.port, places)
    try:
        yield line
    finally:
        line.close()


def requests_of(client: str, count: int = 40) -> List[Dict[str, Any]]:
    return [body(f"for {client}, {number}", seed=-1, save_images=True) for number in range(count)]


def check(webui: Webui, line: BadLine, requests: List[Dict[str, Any]], jobs: List[Dict[str, Any]]) -> None:
    assert set(line.cuts) == set(line.places), line.cuts
    assert [job["prompt"] for job in jobs] == [request["prompt"] for request in requests]
    for job in jobs:
        assert job == webui.job(job["id"])
        assert len(job["images"]) == 1
    assert len(webui.jobs(limit=1000, q=requests[0]["prompt"].partition(",")[0])) == len(requests)


REFUSED = body(**UNKNOWN)
FAILING = body(standin={"fail": "OutOfMemoryError", "fail_after": 1})


def load_retry() -> Any:
    spec = importlib.util.spec_from_file_location("retry", EXAMPLES / "retry.py")
    retry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(retry)
    retry.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / HASTE))
    return retry


def test_retry_py(webui):
    retry = load_retry()
    requests, before = requests_of("python"), len(saved(webui))
    with bad_line(webui) as line, ThreadPoolExecutor(20) as executor:
        jobs = list(executor.map(lambda request: retry.generate(line.url, request, webui.auth), requests))
        check(webui, line, requests, jobs)
        assert len(saved(webui)) - before == len(requests)

        # What cannot be repaired is said.
        with pytest.raises(retry.requests.HTTPError, match=str(UNKNOWN_STATUS)):
            retry.generate(line.url, REFUSED, webui.auth)
        with pytest.raises(RuntimeError, match="OutOfMemoryError"):
            retry.generate(line.url, FAILING, webui.auth)


@pytest.mark.parametrize(
    "client", ["python", *(pytest.param(client, marks=pytest.mark.all_only) for client in ("node", "bash"))]
)
def test_retry_through_kills(start, client, tmp_path):
    """The webui is killed again and again while the jobs wait. Each is generated once, and its client has it."""
    webui = start(*QUICK, *AUTH, constants={"DELAY": 3})  # so that it is killed before it generates
    requests = requests_of(client, 4)
    hold_the_queue(webui)

    def generate(url: str) -> Any:
        if client == "python":
            with ThreadPoolExecutor(len(requests)) as executor:
                return list(executor.map(lambda request: load_retry().generate(url, request, webui.auth), requests))
        if client == "node":
            done = [in_node(tmp_path, url, requests, authorization(webui))]
        else:
            with ThreadPoolExecutor(len(requests)) as executor:
                options = ("-u", ":".join(webui.auth))
                done = list(executor.map(lambda request: in_bash(url, request, *options), requests))
        assert not any(it.returncode for it in done), [it.stderr for it in done]
        return json.loads(done[0].stdout) if client == "node" else [json.loads(it.stdout) for it in done]

    with bad_line(webui, BadLine.PLACES[:3]) as line, ThreadPoolExecutor(1) as executor:
        generating = executor.submit(generate, line.url)
        for _ in range(3):
            until(lambda: webui.jobs(status="Pending"))
            time.sleep(random.random())
            webui.restart()
            line.port = webui.port
        jobs = generating.result()
        check(webui, line, requests, jobs)
    assert len(saved(webui)) == len(requests)


@OFF
def test_retry_py_while_nothing_is_tracked(off):
    with pytest.raises(RuntimeError, match="not tracked"):
        load_retry().generate(off.url, body(), off.auth)


def authorization(webui: Webui) -> Dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(":".join(webui.auth).encode()).decode()}


def in_node(
    folder: Path, url: str, requests: List[Dict[str, Any]], headers: Dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    client = example("retry.mjs")
    assert client.count("seconds * 1000") == 1
    (folder / "retry.mjs").write_text(client.replace("seconds * 1000", f"seconds * {1000 // HASTE}"), encoding="utf-8")
    script = IN_NODE % json.dumps((folder / "retry.mjs").as_uri())
    command = [node(), "--input-type=module", "--eval", script, json.dumps([url, requests, headers])]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180)


@OFF
def test_retry_mjs_while_nothing_is_tracked(off, tmp_path):
    done = in_node(tmp_path, off.url, [body()], authorization(off))
    assert done.returncode and "not tracked" in done.stderr


def test_retry_mjs(webui, tmp_path):
    headers = authorization(webui)

    def generate(*requests: Dict[str, Any]) -> "subprocess.CompletedProcess[str]":
        return in_node(tmp_path, line.url, list(requests), headers)

    requests, before = requests_of("node"), len(saved(webui))
    # Not "at once": that can leave node's fetch waiting, until the client gives up a minute later.
    with bad_line(webui, BadLine.PLACES[:3]) as line:
        done = generate(*requests)
        assert done.returncode == 0, done.stderr
        check(webui, line, requests, json.loads(done.stdout))
        assert len(saved(webui)) - before == len(requests)

        done = generate(REFUSED)
        assert done.returncode and str(UNKNOWN_STATUS) in done.stderr
        done = generate(FAILING)
        assert done.returncode and "OutOfMemoryError" in done.stderr


IN_BASH = f"""
set -euo pipefail
sleep() {{ command sleep "$(jq -n "$1 / {HASTE}")"; }}
source {EXAMPLES}/retry.sh
generate "$@"
"""


def in_bash(url: str, request: Dict[str, Any], *options: str) -> "subprocess.CompletedProcess[str]":
    for program in ("bash", "curl", "jq"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine")
    command = ["bash", "-c", IN_BASH, "bash", url, json.dumps(request), *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180)


@OFF
def test_retry_sh_while_nothing_is_tracked(off):
    done = in_bash(off.url, body(), "-u", ":".join(off.auth))
    assert done.returncode and "not tracked" in done.stderr and not done.stdout


def test_retry_sh(webui):
    requests, before = requests_of("bash", 12), len(saved(webui))
    with bad_line(webui) as line, ThreadPoolExecutor(6) as executor:

        def generate(request: Dict[str, Any]) -> "subprocess.CompletedProcess[str]":
            return in_bash(line.url, request, "-u", ":".join(webui.auth))

        done = list(executor.map(generate, requests))
        assert not any(it.returncode for it in done), [it.stderr for it in done]
        check(webui, line, requests, [json.loads(it.stdout) for it in done])
        assert len(saved(webui)) - before == len(requests)

        refused, failed = generate(REFUSED), generate(FAILING)
        assert refused.returncode and str(UNKNOWN_STATUS) in refused.stderr and not refused.stdout
        assert failed.returncode and "OutOfMemoryError" in failed.stderr and not failed.stdout
