"""What it costs that jobs wait on disk for their turn. Each measurement returns its figures with their goals.

    python tests/bench/bench_parked.py

Both sides of each figure were measured in turns in the same run.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import bench_requests
from bench_requests import Figure, Start, job_id_of, percentile, print_table

import harness
from harness import ASYNC, MODE_FLAGS, MODES, Gate, Webui, body, submit, until

FLAGS = MODE_FLAGS[MODES[-1]]
AT_ONCE = 16  # clients that hand in the jobs
PAUSE = 0.01  # seconds between two requests that are measured, since what one leaves to be done is not the next one's
RESTARTS = 3  # each of which costs the job that is generated


def a_request(gate: Gate) -> Dict[str, Any]:
    """Of 1 kB. Its generation does not end before the gate is opened."""
    request = body(negative_prompt="", standin={"hold": gate})
    return {**request, "negative_prompt": "x" * (1000 - len(harness.as_bytes(request)))}


class Client(bench_requests.Client):
    async def hand_in(self, data: Any, is_parked: bool) -> Tuple[float, str]:
        """The milliseconds until the head is there, and the job's ID. Then the client leaves."""
        seconds, head, _, writer = await self.post(data, ASYNC if is_parked else {})
        writer.close()
        assert head.startswith(b"HTTP/1.1 202 " if is_parked else b"HTTP/1.1 200 "), head
        return 1000 * seconds, job_id_of(head)

    async def cancel(self, job_id: str) -> None:
        await self.get(f"/sdapi/v1/job/{job_id}/cancel", "POST")

    async def park_many(self, data: Any, count: int) -> None:
        left = iter(range(count))

        async def work() -> None:
            for _ in left:
                await self.hand_in(data, is_parked=True)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))


def rss(webui: Webui) -> float:
    """The process's memory, in MB."""
    return webui.client.get("/standin/threads").json()["rss_bytes"] / 1e6


class Crowd(NamedTuple):
    """Two webuis that generate one job, and behind it many wait at the first, and none at the second."""

    webuis: List[Webui]
    requests: List[Dict[str, Any]]
    grown: float  # MB that the first needed more after the jobs were handed in
    seconds_each: float  # that it took to hand in one


def make_crowd(start: Start, jobs: int) -> Crowd:
    webuis = [start(*FLAGS), start(*FLAGS)]
    requests = [a_request(webui.gate()) for webui in webuis]
    for webui, request in zip(webuis, requests):
        asyncio.run(Client(webui).park_many(request, RESTARTS + 1))
        until(lambda: webui.jobs(status="processing"))  # noqa: B023
    before, began = rss(webuis[0]), time.perf_counter()
    asyncio.run(Client(webuis[0]).park_many(requests[0], jobs))
    seconds = time.perf_counter() - began
    return Crowd(webuis, requests, rss(webuis[0]) - before, seconds / jobs)


def resume(webui: Webui) -> float:
    """Kills a webui and starts it. The seconds from when it serves until the oldest job is generated."""
    webui.kill()
    webui.start()
    began = time.perf_counter()
    until(lambda: webui.jobs(status="processing"))
    return time.perf_counter() - began


async def heads(crowd: Crowd, rounds: int) -> List[Dict[bool, List[float]]]:
    """For each webui the milliseconds until the head, of requests that are parked, and of those that are not."""
    found: List[Dict[bool, List[float]]] = [{True: [], False: []} for _ in crowd.webuis]
    sides = [*zip(map(Client, crowd.webuis), crowd.requests, found)]
    for number in range(rounds):
        for is_parked in (number % 2 == 0, number % 2 != 0):
            for client, request, times in sides:
                milliseconds, job_id = await client.hand_in(request, is_parked)
                times[is_parked].append(milliseconds)
                await asyncio.sleep(PAUSE)
                if not is_parked:  # or it would hold a thread for the rest of the measurement
                    await client.cancel(job_id)
                    await asyncio.sleep(PAUSE)
    return found


def waiting(start: Start, jobs: int = 10_000, rounds: int = 300) -> Iterator[Figure]:
    """What many parked jobs cost everybody else."""
    crowd = make_crowd(start, jobs)
    name = f"{jobs:,} parked jobs of 1 kB"
    yield Figure(f"{name}, each, {AT_ONCE} clients at once", 1000 * crowd.seconds_each, None, "ms")
    yield Figure(f"{name}, memory more than before", crowd.grown, None, "MB", goal="20 MB")
    seconds = [statistics.median(resume(webui) for _ in range(RESTARTS)) for webui in crowd.webuis]
    yield Figure(f"{name}, from the start until the first is generated", *seconds, "s", "with one", goal="2 s")
    asyncio.run(heads(crowd, 20))
    many, none = map(rss, crowd.webuis)
    yield Figure(f"{name}, memory after a start", many, none, "MB", "with none", goal="20 MB more")
    many, none = asyncio.run(heads(crowd, rounds))
    for is_parked, kind in ((True, "202"), (False, "200")):
        p99 = [percentile(times[is_parked], 0.99) for times in (many, none)]
        yield Figure(f"{name}, 99 of 100 heads of a {kind}", *p99, "ms", "with none", goal="100 ms")
    for times, place in ((none, "with none"), (many, name)):
        medians = [statistics.median(times[is_parked]) for is_parked in (True, False)]
        yield Figure(f"parking a request, {place}", *medians, "ms", "accepting one", goal="3 ms more")


def a_parked_one(webui: Webui, **standin: Any) -> float:
    """The seconds from its request until its client has the answer."""
    began = time.perf_counter()
    status, headers = webui.send(body(standin=standin), headers=ASYNC).head()
    answer = webui.send_get(f"{headers['location']}?wait=60").to_end()
    assert status == 202 and b'"Completed"' in answer
    return time.perf_counter() - began


def a_connected_one(webui: Webui, **standin: Any) -> float:
    began = time.perf_counter()
    sent = webui.send(body(standin=standin))
    sent.to_end()
    seconds = time.perf_counter() - began
    assert webui.job(sent.job_id(), wait=60)["status"] == "Completed"
    return seconds


def in_a_queue(webui: Webui, count: int, is_parked: bool, **standin: Any) -> float:
    """The seconds that each of many takes, by the records: from when the first begins until the last has ended."""
    gate = webui.gate()
    webui.until_status(submit(webui, standin={"hold": gate}), "Processing")
    sent = []
    for _ in range(count):
        sent.append(submit(webui, standin=standin) if is_parked else webui.send(body(standin=standin)).job_id())
    gate.open()
    jobs = [webui.job(job_id, wait=60) for job_id in sent]
    return (max(job["finished"] for job in jobs) - min(job["started"] for job in jobs)) / count


def running(start: Start, pairs: int = 10, seconds: float = 1.0) -> Iterator[Figure]:
    """What it costs a job that it was parked."""
    webui = start(*FLAGS)
    a_connected_one(webui), a_parked_one(webui)

    def measure(name: str, function: Callable[[bool], float], times: int) -> Figure:
        found: Dict[bool, List[float]] = {True: [], False: []}
        for _ in range(times):
            for is_parked, values in found.items():
                values.append(function(is_parked))
        medians = map(statistics.median, found.values())
        return Figure(name, *medians, "s", "a connected one", goal="1.05 of it")

    def one(is_parked: bool) -> float:
        return (a_parked_one if is_parked else a_connected_one)(webui, seconds=seconds)

    def queue(is_parked: bool) -> float:
        return in_a_queue(webui, pairs, is_parked, seconds=seconds / 2)

    yield measure(f"a parked job of {seconds:g} s, until its client has it", one, pairs)
    yield measure(f"a parked job of {seconds / 2:g} s among {pairs} in the queue", queue, 2)


def figures(jobs: int = 10_000) -> Iterator[Figure]:
    """All of them, each when it is there."""
    with harness.started(lambda: Path(tempfile.mkdtemp(prefix="bench-"))) as start:
        yield from running(start)
        yield from waiting(start, jobs)


if __name__ == "__main__":
    print_table(figures())
