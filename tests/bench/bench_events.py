"""What it costs that a thousand clients watch a job, and that its preview is looked at.

    python tests/bench/bench_events.py

Both sides of each figure were measured in turns in the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from bench_parked import rss
from bench_requests import LEAST, TICKER, Client, Figure, Hold, Start, percentile, print_table

import harness
from harness import HOST, MODE_FLAGS, MODES, Webui, body, connect

WINDOWS, WINDOW = 5, 2.0  # for so many times so many seconds the job is watched
SECONDS = WINDOWS * WINDOW


class Crowd(NamedTuple):
    """What the clients of a job saw, and what it took meanwhile."""

    events: int
    polls: List[float]  # seconds of each
    idle_polls: List[float]  # the same of an idle webui: what the machine has to do with it
    hold: Hold  # in the middle of the windows: in some, Python collects the garbage of the whole webui
    connected: float  # MB of the process when all were connected
    grown: float  # MB that it grew from then on


def raise_limit() -> None:
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def watch(webui: Webui, idle: Webui, path: str, listeners: int) -> Crowd:
    loop, counts, over = asyncio.get_running_loop(), [0], asyncio.Event()
    client, other = Client(webui), Client(idle)
    polls: List[float] = []
    idle_polls: List[float] = []

    async def listen() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", webui.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: webui\r\n\r\n".encode())
        await reader.readuntil(b"event: status")
        ready.release()
        while not over.is_set():
            data = await reader.read(1 << 16)
            counts[0] += data.count(b"event: ")
        writer.close()

    async def poll(own: Client, path: str, seconds: List[float]) -> None:
        while not over.is_set():
            seconds.append(await own.get(path))
            await asyncio.sleep(0.01)

    def in_thread(method: str, path: str) -> Any:
        return loop.run_in_executor(None, lambda: webui.client.request(method, path).json())

    ready = asyncio.Semaphore(0)
    listening = []
    for number in range(listeners):
        listening.append(asyncio.ensure_future(listen()))
        if number % 20 == 19:  # a crowd comes in a while
            await asyncio.gather(*(ready.acquire() for _ in range(20)))
    connected = await loop.run_in_executor(None, rss, webui)
    counts[0] = 0
    polling = [asyncio.ensure_future(poll(client, LEAST, polls)), asyncio.ensure_future(poll(other, LEAST, idle_polls))]
    holds = []
    for _ in range(WINDOWS):
        await in_thread("POST", "/ticker/begin")
        await asyncio.sleep(WINDOW)
        holds.append(await in_thread("POST", "/ticker/end"))
    seen = counts[0]
    hold = Hold(*(statistics.median(one[name] for one in holds) for name in ("wall", "busy")))
    grown = await loop.run_in_executor(None, rss, webui) - connected
    over.set()
    await asyncio.gather(*polling)
    for one in listening:
        one.cancel()
    await asyncio.gather(*listening, return_exceptions=True)
    return Crowd(seen, polls, idle_polls, hold, connected, grown)


def listeners(start: Start, count: int = 1000) -> Iterator[Figure]:
    """A thousand clients that watch one running job, beside none."""
    raise_limit()
    flags = MODE_FLAGS[MODES[-1]]
    webui, idle = start(*flags, scripts={"a-ticker": TICKER}), start(*flags, copies=0)
    for query in ("", "?preview=true"):
        crowds = {}
        for number in (0, count):
            job_id = connect(webui, standin={"seconds": 60}, steps=3000, width=128, height=128)
            webui.until_status(job_id, "Processing")
            before = rss(webui)
            crowds[number] = asyncio.run(watch(webui, idle, f"/sdapi/v1/job/{job_id}/events{query}", number))
            webui.client.post(f"/sdapi/v1/job/{job_id}/cancel")
            webui.job(job_id, wait=60)
        none, crowd = crowds.values()
        name = f"{count:,} listeners{' with previews' * bool(query)}"
        yield Figure(f"{name}: events that each got in a second", crowd.events / count / SECONDS, None, "")
        yield Figure(
            f"{name}: event loop held, by the clock", 1000 * crowd.hold.wall, 1000 * none.hold.wall, "ms", "none", "20"
        )
        yield Figure(
            f"{name}: event loop held, its work", 1000 * crowd.hold.busy, 1000 * none.hold.busy, "ms", "none", "20"
        )
        for share in (0.5, 0.99):
            ours, own = (1000 * percentile(it, share) for it in (crowd.polls, crowd.idle_polls))
            yield Figure(f"{name}: {100 * share:g} of 100 polls within", ours, own, "ms", "an idle webui", "100")
        yield Figure(f"{name}: memory of one", 1000 * (crowd.connected - before) / count, None, "kB")
        yield Figure(f"{name}: memory grown in {SECONDS:g} s", crowd.grown, none.grown, "MB", "none", "flat")


# The preview


def processor_seconds(webui: Webui) -> float:
    fields = Path(f"/proc/{webui.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class Cost(NamedTuple):
    seconds: float  # of the generation
    processor: float  # seconds of it that the webui took meanwhile


def generation(webui: Webui, poll: Callable[[str], Any]) -> Cost:
    """A generation that somebody polls twice a second, by its name."""
    over, task = threading.Event(), f"task-{os.urandom(4).hex()}"
    request = body(standin={"seconds": 5}, steps=50, width=512, height=512, force_task_id=task)

    def go_on() -> None:
        jobs = webui.jobs(status="processing") if webui.extension.exists() else []
        name = jobs[0]["id"] if jobs else task
        while not over.wait(0.5):
            poll(name if poll.__name__ == "preview" else task)

    polling = threading.Timer(0.2, go_on)
    before = processor_seconds(webui)
    polling.start()
    seconds = webui.post(request).elapsed.total_seconds()
    over.set()
    polling.join()
    return Cost(seconds, processor_seconds(webui) - before)


def previews(start: Start, rounds: int = 3) -> Iterator[Figure]:
    """A preview that is polled twice a second beside /internal/progress, and one of which nobody knows."""
    flags = MODE_FLAGS["ui"]
    webui, alone = start(*flags), start(*flags, copies=0)
    for one in (webui, alone):
        one.client.post("/sdapi/v1/options", json={"show_progress_every_n_steps": 1})
        one.post(body())

    def preview(job_id: str) -> None:
        webui.client.get(f"/sdapi/v1/job/{job_id}/preview")

    def progress_of(one: Webui) -> Callable[[str], Any]:
        return lambda task: one.client.post("/internal/progress", json={"id_task": task, "id_live_preview": -1})

    def nothing(_: str) -> None:
        pass

    ways = {
        "preview": (webui, preview),
        "progress": (webui, progress_of(webui)),
        "nobody": (webui, nothing),
        "without us": (alone, nothing),
    }
    costs: Dict[str, List[Cost]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (one, poll) in ways.items():
            costs[way].append(generation(one, poll))
    middle = {way: Cost(*map(statistics.median, zip(*found))) for way, found in costs.items()}
    for name, ours, own, than in (
        ("its preview polled twice a second", "preview", "progress", "/internal/progress polled as often"),
        ("no preview wanted", "nobody", "without us", "the webui alone"),
    ):
        yield Figure(f"a generation, {name}", middle[ours].seconds, middle[own].seconds, "s", than, "1.00 of it")
        work = f"a generation, {name}: the processor's time"
        yield Figure(work, middle[ours].processor, middle[own].processor, "s", than)


def figures() -> Iterator[Figure]:
    """All of them, each when it is there."""
    for measurement in (listeners, *([previews] if HOST != "sdnext" else [])):
        with harness.started(lambda: Path(tempfile.mkdtemp(prefix="bench-"))) as start:
            yield from measurement(start)


if __name__ == "__main__":
    print_table(figures())
