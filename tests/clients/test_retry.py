"""The clients of the README, over a line that breaks at random: no image is lost, and none is generated twice."""

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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from programs import CLIENTS, node

from harness import AUTH, MODES, QUICK, RESET, SECONDS, UNKNOWN, UNKNOWN_STATUS, Start, Webui, body, saved

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
        place = self._chance.choice(self.places) if self._chance.random() < self.SHARE else None
        if place == "at once":
            self._cut(place, writer)
            return
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
            limits = {"in the request": (self._chance.randrange(300), None), "before the answer": (None, 0)}
            up, down = limits.get(place or "", (None, None))
            if place == "in the answer":
                down = self._chance.randrange(1, 12000)
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
    spec = importlib.util.spec_from_file_location("retry", CLIENTS / "retry.py")
    retry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(retry)
    retry.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / HASTE))
    return retry


def test_python(webui):
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


@OFF
def test_python_while_nothing_is_tracked(off):
    with pytest.raises(RuntimeError, match="not tracked"):
        load_retry().generate(off.url, body(), off.auth)


def authorization(webui: Webui) -> Dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(":".join(webui.auth).encode()).decode()}


def in_node(
    folder: Path, url: str, requests: List[Dict[str, Any]], headers: Dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    client = (CLIENTS / "retry.mjs").read_text(encoding="utf-8")
    assert client.count("seconds * 1000") == 1
    (folder / "retry.mjs").write_text(client.replace("seconds * 1000", f"seconds * {1000 // HASTE}"), encoding="utf-8")
    script = IN_NODE % json.dumps((folder / "retry.mjs").as_uri())
    command = [node(), "--input-type=module", "--eval", script, json.dumps([url, requests, headers])]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180)


@OFF
def test_javascript_while_nothing_is_tracked(off, tmp_path):
    done = in_node(tmp_path, off.url, [body()], authorization(off))
    assert done.returncode and "not tracked" in done.stderr


def test_javascript(webui, tmp_path):
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
source {CLIENTS}/retry.sh
generate "$@"
"""


def in_bash(url: str, request: Dict[str, Any], *options: str) -> "subprocess.CompletedProcess[str]":
    for program in ("bash", "curl", "jq"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine")
    command = ["bash", "-c", IN_BASH, "bash", url, json.dumps(request), *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180)


@OFF
def test_bash_while_nothing_is_tracked(off):
    done = in_bash(off.url, body(), "-u", ":".join(off.auth))
    assert done.returncode and "not tracked" in done.stderr and not done.stdout


def test_bash(webui):
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
