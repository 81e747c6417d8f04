"""What tracking costs a request. Each measurement returns its figures beside what they are compared with.

    python tests/bench/bench_requests.py

Both sides run in turns, since the machine may be busy with other things: so the ratios hold where the seconds do not.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import io
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import bench_store
from inside import load_script

import harness
from harness import AUTH, HOST, MODE_FLAGS, MODES, Sent, Webui, body, until

Start = Callable[..., Webui]

ENCODINGS = ("gzip", "identity")
PICTURES = {"width": 1024, "height": 1024, "batch_size": 2, "standin": {"image_bytes": 1_500_000}}  # as those of models
MANY_LARGE = {"batch_size": 1, "standin": {"extra_images": 15, "image_bytes": 4_000_000}}
HUGE = {"batch_size": 1, "standin": {"extra_images": 49, "image_bytes": 3_000_000}}  # an answer of 200 MB
LARGE = {"batch_size": 1, "standin": {"extra_images": 24, "image_bytes": 4_000_000}}  # images of 100 MB


class Figure(NamedTuple):
    name: str
    ours: float
    other: Optional[float]  # the same on the webui alone, or what is said instead
    unit: str
    than: str = "the webui alone"
    goal: str = ""

    @property
    def ratio(self) -> float:
        return self.ours / self.other

    @property
    def cells(self) -> Tuple[str, str, str]:
        other = "" if self.other is None else f"{self.other:.4g} {self.unit} ({self.than})"
        goal = self.goal and f"goal: {self.goal}"
        return self.name, f"{self.ours:.4g} {self.unit}", ", ".join(filter(None, (other, goal)))

    def __str__(self) -> str:
        return f"| {' | '.join(self.cells)} |"


def read_all(sent: Sent) -> int:
    """Reads a response to its end, without keeping it. Returns its length."""
    sent.head()
    length, room = len(sent.received), bytearray(1 << 20)
    while True:
        more = sent.socket.recv_into(room)
        if not more:
            return length
        length += more


def generate(webui: Webui, encoding: str, **fields: Any) -> float:
    """The seconds from the first byte of a request to the last of its answer."""
    data = webui.raw(body(**fields), headers={"Accept-Encoding": encoding})
    began = time.perf_counter()
    sent = Sent(webui.port, data)
    read_all(sent)
    seconds = time.perf_counter() - began
    job_id = sent.head()[1].get("x-job-id")
    if job_id:
        until(lambda: webui.job(job_id, images=False)["status"] == "Completed")
    return seconds


# Gzip


def gzip_cost(repeats: int = 5) -> List[Figure]:
    """The processor's time and the bytes for an answer of 8 MB, the webui's gzip beside ours."""
    script = load_script()
    answer = b'{"images":["' + base64.b64encode(os.urandom(6_000_000)) + b'"]}'

    def ours() -> int:
        starts = range(0, len(answer), script.CHUNK)
        return sum(map(len, script.Gzip().encode_all(answer[start : start + script.CHUNK] for start in starts)))

    def own() -> int:
        packed = io.BytesIO()
        with gzip.GzipFile(mode="wb", fileobj=packed) as file:
            file.write(answer)
        return len(packed.getvalue())

    sizes, seconds = {}, {}
    for function in (ours, own) * repeats:
        began = time.thread_time()
        sizes[function] = function()
        seconds[function] = min(seconds.get(function, 60.0), time.thread_time() - began)
    return [
        Figure("gzip of 8 MB", seconds[ours], seconds[own], "s"),
        Figure("gzip of 8 MB", sizes[ours], sizes[own], "bytes"),
    ]


# The whole request


def whole_requests(start: Start, pairs: int = 10) -> List[Figure]:
    """Two images of 1024x1024, from the request to the last byte, for each kind of client."""
    flags = MODE_FLAGS[MODES[-1]]
    webuis = [start(*flags, copies=1), start(*flags, copies=0)]
    figures = []
    for encoding in ENCODINGS:
        seconds: List[List[float]] = [[], []]
        for webui in webuis:
            generate(webui, encoding, **PICTURES)
        for _ in range(pairs):
            for webui, own in zip(webuis, seconds):
                own.append(generate(webui, encoding, **PICTURES))
        figures.append(Figure(f"two images of 1024x1024, {encoding}", *map(statistics.median, seconds), "s"))
    return figures


# The event loop

# Counts how long the event loop is held, and by what of it: in the webui's own route, or after it.
TICKER = """
import asyncio, time
from modules import script_callbacks

ticks, answered = [], []


def now():
    return time.perf_counter(), time.thread_time()


async def tick():
    while ticks:
        await asyncio.sleep(0.001)
        ticks.append(now())


async def begin():
    ticks[:] = [now()]
    answered.clear()
    ticks.append(now())
    asyncio.get_running_loop().create_task(tick())


async def end():
    marks = [*ticks, now()]
    ticks.clear()
    since = answered[-1] if answered else marks[0]
    pairs = [(max(before, since), after) for before, after in zip(marks, marks[1:]) if after > since]
    return {
        "wall": max(after[0] - before[0] for before, after in pairs) - 0.001,
        "busy": max(after[1] - before[1] for before, after in pairs),
        "ticks": len(pairs),
    }


def marked(app):
    async def call(scope, receive, send):
        async def mark(message):
            if message["type"] == "http.response.body" and message.get("body"):
                answered.append(now())
            await send(message)

        await app(scope, receive, mark)

    return call


def started(demo, app):
    for route in app.routes:
        if getattr(route, "path", "").endswith("2img"):
            route.app = marked(route.app)
    app.add_api_route("/ticker/begin", begin, methods=["POST"])
    app.add_api_route("/ticker/end", end, methods=["POST"])


script_callbacks.on_app_started(started)
"""


class Hold(NamedTuple):
    """The longest time for which the event loop served nobody."""

    wall: float  # seconds by the clock; a busy machine adds to it
    busy: float  # seconds in which its thread worked


def hold_during(webui: Webui, function: Callable[[], Any]) -> Hold:
    webui.client.post("/ticker/begin")
    function()
    found = webui.client.post("/ticker/end").json()
    assert found["ticks"] > 1
    return Hold(found["wall"], found["busy"])


def event_loop(start: Start, rounds: int = 3) -> List[Figure]:
    """How long the event loop is held while 16 images of 4 MB go out, after the webui's route has made its answer.

    Each is the best of some rounds, since others use the machine, and Python collects the webui's garbage, too.
    """
    flags = MODE_FLAGS[MODES[-1]]
    ours = start(*flags, copies=1, scripts={"a-ticker": TICKER})
    alone = start(*flags, copies=0, scripts={"a-ticker": TICKER})
    figures = []

    def add(name: str, holds: List[Hold], other: Optional[Hold]) -> None:
        wall, busy = min(hold.wall for hold in holds), min(hold.busy for hold in holds)
        figures.append(Figure(f"{name}, by the clock", 1000 * wall, other and 1000 * other.wall, "ms"))
        figures.append(Figure(f"{name}, its work", 1000 * busy, other and 1000 * other.busy, "ms"))

    for encoding in ENCODINGS:

        def post(webui: Webui, encoding: str = encoding) -> Hold:
            return hold_during(webui, lambda: generate(webui, encoding, **MANY_LARGE))

        def get(encoding: str = encoding) -> Hold:
            path = f"/sdapi/v1/job/{ours.jobs(limit=1)[0]['id']}"

            def read() -> None:
                with ours.client.stream("GET", path, headers={"Accept-Encoding": encoding}) as response:
                    for _ in response.iter_raw():
                        pass

            return hold_during(ours, read)

        add(f"event loop held by an answer of 85 MB, {encoding}", [post(ours) for _ in range(rounds)], post(alone))
        add(f"event loop held by a job of 85 MB, {encoding}", [get() for _ in range(rounds)], None)
    return figures


# Memory


class Memory(NamedTuple):
    """By how many MB a process grew."""

    peak: float
    kept: float


def memory_for(webui: Webui, function: Callable[[], Any]) -> Memory:
    status = Path(f"/proc/{webui.pid}/status")

    def read(name: str) -> float:
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text()).group(1)) / 1000

    Path(f"/proc/{webui.pid}/clear_refs").write_text("5")  # the peak counts from here
    before = read("VmRSS")
    function()
    return Memory(read("VmHWM") - before, read("VmRSS") - before)


def memory(start: Start) -> List[Figure]:
    """What an answer of 200 MB takes at its peak, and what the process still has of it afterwards."""
    flags = MODE_FLAGS[MODES[-1]]
    found = []
    for copies in (1, 0):
        webui = start(*flags, copies=copies)
        webui.post(body())
        found.append(memory_for(webui, lambda: generate(webui, "identity", **HUGE)))  # noqa: B023
        webui.kill()
    ours, own = found
    return [
        Figure("memory for an answer of 200 MB, at its peak", ours.peak, own.peak, "MB"),
        Figure("memory for an answer of 200 MB, afterwards", ours.kept, own.kept, "MB"),
    ]


def large_job(start: Start, rounds: int = 5) -> List[Figure]:
    """A job with 100 MB of images: how soon its first byte comes, and what it takes of the process's memory."""
    webui = start(*MODE_FLAGS[MODES[-1]])
    generate(webui, "identity", **LARGE)
    generate(webui, "identity")
    webui.restart()  # so that it has no memory to spare from making the answer
    large, small = (f"/sdapi/v1/job/{job['id']}" for job in reversed(webui.jobs(limit=2)))

    def first_byte(path: str, encoding: str) -> float:
        began = time.perf_counter()
        with webui.client.stream("GET", path, headers={"Accept-Encoding": encoding}) as response:
            pieces = response.iter_raw()
            next(pieces)
            seconds = time.perf_counter() - began
            for _ in pieces:
                pass
        return 1000 * seconds

    figures = []
    for encoding in ENCODINGS:
        first_byte(small, encoding)
        if sys.platform.startswith("linux"):
            peak = memory_for(webui, lambda: first_byte(large, encoding)).peak  # noqa: B023
            figures.append(Figure(f"memory for a job of 100 MB, {encoding}", peak, None, "MB"))
        seconds = {
            path: statistics.median(first_byte(path, encoding) for _ in range(rounds)) for path in (large, small)
        }
        name = f"first byte of a job of 100 MB, {encoding}"
        figures.append(Figure(name, seconds[large], seconds[small], "ms", "of a small job"))
    return figures


# Start


def start_up(start: Start, jobs: int = 100_000, rounds: int = 3) -> List[Figure]:
    """How long the webui takes from the start of its process until it serves, with many jobs and with none."""
    script = load_script()

    def prepare(webui: Webui) -> None:
        bench_store.write_file(script, webui.data / "jobs.json", jobs, 1, lambda text, share: None)

    webuis = [
        start(*MODE_FLAGS[MODES[-1]], environ={"TRACKER_RETENTION": "off"}, prepare=prepare),
        start(*MODE_FLAGS[MODES[-1]]),
    ]
    seconds: List[List[float]] = [[], []]
    for _ in range(rounds):
        for webui, own in zip(webuis, seconds):
            webui.kill()
            began = time.perf_counter()
            webui.start()
            own.append(time.perf_counter() - began)
    return [
        Figure(f"start with {jobs:,} jobs, until the webui serves", *map(statistics.median, seconds), "s", "with none")
    ]


# Load


class Client:
    """A client that costs next to nothing: one thread, a connection for each request, nothing understood."""

    def __init__(self, webui: Webui):
        self.webui = webui
        self.auth = ""
        if webui.auth:
            self.auth = f"Authorization: Basic {base64.b64encode(':'.join(webui.auth).encode()).decode()}\r\n"

    async def post(
        self, data: Any, headers: Optional[Dict[str, str]] = None
    ) -> Tuple[float, bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        """The seconds until the head is there, the head, and the connection."""
        request = self.webui.raw(data, headers=headers)
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.webui.port)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        return time.perf_counter() - began, head, reader, writer

    async def get(self, path: str, method: str = "GET") -> float:
        """The seconds until all is there."""
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.webui.port)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: webui\r\n{self.auth}Connection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 "), answer[:300]
        return time.perf_counter() - began


class Load(NamedTuple):
    """What many requests at once came to."""

    heads: List[float]  # seconds until each was there
    polls: Dict[str, List[float]]  # seconds of each, by path
    answers: Dict[str, bytes]  # by job ID, with the marks of their chunks
    queue: List[str]  # job IDs, in the order in which they waited
    idle_burst: float  # seconds in which an idle webui answers as many of the least requests at once
    idle_polls: List[float]  # seconds of each poll of an idle webui meanwhile: what the machine has to do with it


def percentile(values: List[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


LEAST = "/standin/empty"
LOOKS = {
    "one job": "/sdapi/v1/job/{id}",
    "the newest 50": "/sdapi/v1/jobs",
    "50 with a status": "/sdapi/v1/jobs?status=completed",
    "50 of an address": "/sdapi/v1/jobs?ip=10.0.0.7",
    "50 of a time": "/sdapi/v1/jobs?before=1736762000",
    "an address that none has": "/sdapi/v1/jobs?ip=10.9.9.9",
    "a label that none has": "/sdapi/v1/jobs?label=none",
    "a time that none has": "/sdapi/v1/jobs?before=1",
    "text in some prompts": "/sdapi/v1/jobs?q=castle+snow",
    "text in no prompt": "/sdapi/v1/jobs?q=not+there",
}


def looks(
    webui: Webui, job_id: str, name: str, progress: Callable[[str, float], None], repeats: int = 200
) -> Iterator[Figure]:
    """How long looks at jobs take, 95 of 100, beside an empty route: in turns, since the machine is never the same."""
    times: Dict[str, List[float]] = {what: [] for what in ("", *LOOKS)}
    for number in range(repeats):
        progress("asking", number / repeats)
        for what, values in times.items():
            if "text" in what and number % 10:  # they take long
                continue
            began = time.perf_counter()
            answer = webui.client.get(LOOKS.get(what, LEAST).format(id=job_id))
            values.append(1000 * (time.perf_counter() - began))
            assert answer.status_code == 200, answer.text
    for what in LOOKS:
        goal = "" if "text" in what else "10 ms more"
        p95 = (percentile(times[one], 0.95) for one in (what, ""))
        yield Figure(f"{what}, {name}, 95 of 100", *p95, "ms", "an empty route", goal=goal)


POLLS = ("/sdapi/v1/job/{id}?images=false", "/sdapi/v1/samplers", LEAST)


def load(webui: Webui, idle: Webui, count: int = 500) -> Load:
    """Sends so many requests at once, behind one that is held, and polls until all are answered."""
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return asyncio.run(_load(webui, Client(webui), Client(idle), count))


async def _load(webui: Webui, client: Client, idle: Client, count: int) -> Load:
    began = time.perf_counter()
    await asyncio.gather(*(idle.get(LEAST) for _ in range(count)))
    idle_burst = time.perf_counter() - began

    gate = webui.gate()
    _, head, *held = await client.post(body(standin={"hold": gate}))
    polls: Dict[str, List[float]] = {path: [] for path in POLLS}
    idle_polls: List[float] = []
    done = asyncio.Event()

    async def poll(own: Client, path: str, seconds: List[float]) -> None:
        while not done.is_set():
            seconds.append(await own.get(path))
            await asyncio.sleep(0.01)

    polling = [asyncio.ensure_future(poll(idle, LEAST, idle_polls))]
    for path, seconds in polls.items():
        polling.append(asyncio.ensure_future(poll(client, path.format(id=job_id_of(head)), seconds)))
    requests = [client.post(body(f"number {number}", standin={"seconds": 0.01})) for number in range(count - 1)]
    sent = await asyncio.wait_for(asyncio.gather(*requests), harness.SECONDS)
    loop = asyncio.get_running_loop()
    waiting = await loop.run_in_executor(None, lambda: webui.jobs(status="pending", limit=1000))
    queue = [job["id"] for job in sorted(waiting, key=lambda job: job["queue_position"])]
    gate.open()
    answers = {}
    for _, its_head, reader, writer in [(0, head, *held), *sent]:
        answers[job_id_of(its_head)] = await asyncio.wait_for(reader.read(), harness.SECONDS)
        writer.close()
    done.set()
    await asyncio.gather(*polling)
    return Load([it[0] for it in sent], polls, answers, queue, idle_burst, idle_polls)


def job_id_of(head: bytes) -> str:
    return re.search(rb"(?i)\r\nx-job-id: (\w+)", head).group(1).decode()


def load_figures(start: Start) -> List[Figure]:
    """What 500 requests at once do to each other and to everybody else."""
    flags = MODE_FLAGS[MODES[-1]]
    webui, idle = start(*flags, *AUTH), start(*flags, copies=0)
    found = load(webui, idle)
    than = "as many empty answers of an idle webui"
    figures = [Figure("500 requests at once, the last head", max(found.heads), found.idle_burst, "s", than)]
    reference = 1000 * percentile(found.idle_polls, 0.99)
    for path, seconds in found.polls.items():
        name = f"99 of 100 polls meanwhile, {path.partition('?')[0]}"
        figures.append(Figure(name, 1000 * percentile(seconds, 0.99), reference, "ms", "an idle webui"))
    return figures


def figures() -> Iterator[Figure]:
    """All of them, each when it is there."""
    yield from gzip_cost()
    for measurement in (whole_requests, event_loop, memory, large_job, start_up, load_figures):
        with harness.started(lambda: Path(tempfile.mkdtemp(prefix="bench-"))) as start:
            yield from measurement(start)


def print_table(found: Iterable[Figure]) -> None:
    """Each when it is there."""
    print(f"Packages of {HOST}, Python {sys.version.split()[0]}\n")
    print("| what | with Job Tracker | beside |\n| --- | --- | --- |")
    for figure in found:
        print(figure, flush=True)


if __name__ == "__main__":
    print_table(figures())
