"""What a fleet costs: jobs in PostgreSQL, which is a real one, on this machine. Each figure with its goal.

    python tests/bench/bench_fleet.py

Both sides of a figure were measured in turns in the same run.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Iterator, List

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import services
from bench_requests import Figure, Start, looks, percentile, print_table
from inside import a_job, an_answer, completed, load_script, make_tracker

import harness
from harness import MODE_FLAGS, MODES, Webui, body

Progress = Callable[[str, float], None]
FLAGS = MODE_FLAGS[MODES[-1]]
BATCH = 50_000  # jobs that are made at once
REPEATS = 200  # of each look at jobs


def no_progress(text: str, share: float) -> None:
    pass


# Accepting a job


def accepting(database: services.Database, times: int = 400) -> Iterator[Figure]:
    """Beside a bare insert of a record of the same size, which is committed, on the same server."""
    import psycopg

    script, dice = load_script(), random.Random(1)
    store = script.PostgresJobStore(database.url)
    found: Dict[bool, List[float]] = {True: [], False: []}
    try:
        with psycopg.connect(database.url, autocommit=True) as connection:
            connection.execute("create table bare (id text primary key, record text not null)")
            for number in range(times + 50):
                job = a_job(script, dice, owner=store.owner, timestamp=1736712000 + number)
                record = script.record_of(job).decode()
                for is_ours in (number % 2 == 0, number % 2 != 0):
                    began = time.perf_counter()
                    if is_ours:
                        store.put(job, new=True).result(60)
                    else:
                        connection.execute("insert into bare values (%s, %s)", (job.id, record), prepare=True)
                    if number >= 50:  # the first ones open connections
                        found[is_ours].append(1000 * (time.perf_counter() - began))
                    time.sleep(0.002)
    finally:
        store.close()
    medians = map(statistics.median, (found[True], found[False]))
    yield Figure("a job made safe in PostgreSQL", *medians, "ms", "a bare insert and commit", goal="2.5 times that")


# Looks at many jobs

# A record's text, and an ID of digits, by the job's number. `folded` is what the script makes of an ID.
FILL = """
    INSERT INTO job_tracker_jobs
        (folded, id, record, timestamp, status, type, ip, label, key, prompt, bytes, parked, owner, due, is_left)
    SELECT
        (SELECT sum(substr(id, place, 1)::bigint * (36 ^ (8 - place))::bigint) FROM generate_series(1, 8) AS place),
        id,
        replace(replace(replace(replace(template, 'AAAAAAAA', id), '10.0.0.255', ip), '@prompt', prompt),
            '1700000000', timestamp::text),
        timestamp, 'Completed', 'txt2img', ip, NULL, NULL, prompt, 1000, false, NULL, NULL, false
    FROM (
        SELECT
            lpad(number::text, 8, '0') AS id,
            1736712000 + number / 20 AS timestamp,
            '10.0.0.' || number %% 20 AS ip,
            'number ' || number || CASE WHEN number %% 1000 = 0 THEN ' castle snow ' ELSE ' ' END || filling AS prompt,
            template
        FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS number,
            (SELECT %(template)s::text AS template, %(filling)s::text AS filling) AS texts
    ) AS made
"""


def fill(database: services.Database, jobs: int, progress: Progress) -> None:
    """Makes jobs of which the store does not know that it has not written them."""
    script, dice = load_script(), random.Random(2)
    script.PostgresJobStore(database.url).close()
    job = completed(a_job(script, dice, id="AAAAAAAA", ip="10.0.0.255", timestamp=1700000000, prompt="@prompt"))
    job = job._replace(type="txt2img", started=None, finished=None)
    values = {"template": script.record_of(job).decode(), "filling": "golden hour, intricate, film grain, " * 3}
    for first in range(0, jobs, BATCH):
        progress(f"making {jobs:,} jobs", first / jobs)
        database.server.execute(FILL, {**values, "first": first, "last": min(first + BATCH, jobs) - 1}, database.name)
    database.server.execute("vacuum analyze job_tracker_jobs", None, database.name)


def start_on(start: Start, database: services.Database, folder: Path, name: str) -> Webui:
    environ = {"TRACKER_STORE": database.url, "TRACKER_RETENTION": "off", "TRACKER_SERVER": name}
    return start(*FLAGS, tracking="variable", environ={**environ, "TRACKER_DATA_DIR": str(folder)})


def looking(start: Start, database: services.Database, folder: Path, jobs: int, progress: Progress) -> Iterator[Figure]:
    fill(database, jobs, progress)
    webui = start_on(start, database, folder, "alone")
    job_id = webui.post(body()).headers["x-job-id"]
    webui.job(job_id, wait=60)
    yield from looks(webui, job_id, f"of {jobs:,} jobs in PostgreSQL", progress, REPEATS)


# Waking those who wait at another webui


def waking(start: Start, database: services.Database, folder: Path, rounds: int = 30) -> Iterator[Figure]:
    """How much later than at the job's own webui a client at another one learns of its end."""
    here, there = (start_on(start, database, folder, name) for name in ("here", "there"))
    late = []
    for _ in range(rounds):
        gate = here.gate()
        job_id = here.send(body(standin={"hold": gate})).job_id()
        here.until_status(job_id, "Processing")
        ended: Dict[Webui, float] = {}

        def wait(webui: Webui, job_id: str = job_id, ended: Dict[Webui, float] = ended) -> None:
            sent = webui.send_get(f"/sdapi/v1/job/{job_id}?images=false&wait=60")
            answer = sent.to_end()
            ended[webui] = time.perf_counter()
            assert b'"Completed"' in answer, answer

        threads = [threading.Thread(target=wait, args=(webui,)) for webui in (here, there)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)  # they ask
        gate.open()
        for thread in threads:
            thread.join()
        late.append(1000 * (ended[there] - ended[here]))
    yield Figure("a wake-up at another webui, typical", statistics.median(late), None, "ms", goal="50 ms")
    yield Figure("the same, 95 of 100", percentile(late, 0.95), None, "ms", goal="50 ms")


# Ten webuis and one database


def work(url: str, folder: str, name: str, rate: float, seconds: float) -> None:
    """A webui without a web: accepts, starts and ends so many jobs a second. Prints how long each took."""
    script, dice = load_script(), random.Random(name)
    tracker = make_tracker(script, Path(folder), TRACKER_STORE=url, TRACKER_ENABLED="1", TRACKER_RETENTION="off")
    tracker.announce(name)
    tracker.recover().result(60)
    heads: List[float] = []
    ends: List[float] = []

    def one() -> None:
        job = a_job(script, dice, id=tracker.store.reserve_id(), timestamp=int(time.time()))
        began = time.perf_counter()
        tracker.accept(job, lambda: True, b"").result(60)
        heads.append(1000 * (time.perf_counter() - began))
        tracker.start(job.id)
        tracker.finish(job.id, an_answer(script, job.id, 1))
        while not tracker.get(job.id).ended:
            time.sleep(0.02)
        ends.append(1000 * (time.perf_counter() - began))

    with ThreadPoolExecutor(16) as threads:
        for _ in range(20):
            one()  # opens connections
        heads.clear(), ends.clear()
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        for number in range(int(rate * seconds)):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            threads.submit(one)
    took = time.monotonic() - began
    print(json.dumps({"heads": heads, "ends": ends, "seconds": took}), flush=True)
    tracker.close().result(60)


def start_worker(url: str, folder: Path, number: int, rate: float, seconds: float) -> "subprocess.Popen[str]":
    own = folder / f"worker-{number}"
    own.mkdir(parents=True)
    words = [url, str(own), f"worker-{number}", str(rate), str(seconds)]
    return subprocess.Popen(
        [sys.executable, __file__, "work", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def crowd(
    database: services.Database, folder: Path, webuis: int = 10, rate: float = 200.0, seconds: float = 15.0
) -> Iterator[Figure]:
    """Many webuis at one database, each in a process of its own, on this one machine."""
    workers = [start_worker(database.url, folder, number, rate / webuis, seconds) for number in range(webuis)]
    try:
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        said = [json.loads(worker.stdout.readline()) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    heads = [value for one in said for value in one["heads"]]
    reached = sum(len(one["ends"]) for one in said) / max(one["seconds"] for one in said)
    assert len(heads) == webuis * int(rate / webuis * seconds)
    name = f"{webuis} webuis, {rate:g} jobs a second"
    yield Figure(f"{name}, accepted and ended", reached, None, "a second", goal=f"{rate:g}")
    yield Figure(f"{name}, a head, typical", statistics.median(heads), None, "ms")
    yield Figure(f"{name}, 99 of 100 heads", percentile(heads, 0.99), None, "ms", goal="250 ms")


def figures(jobs: int = 1_000_000, progress: Progress = no_progress) -> Iterator[Figure]:
    """All of them, each when it is there."""
    missing = services.why_missing()
    if missing:
        print(f"A fleet cannot be measured here: {missing}", file=sys.stderr)
        return
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(services.postgresql(durable=True))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        start = stack.enter_context(harness.started(lambda: Path(tempfile.mkdtemp(dir=str(folder)))))

        def database() -> services.Database:
            return stack.enter_context(services.Database(server))

        yield from accepting(database())
        yield from waking(start, database(), folder / "waking")
        yield from crowd(database(), folder / "crowd")
        yield from looking(start, database(), folder / "looking", jobs, progress)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:5], *map(float, sys.argv[5:]))
    else:
        print_table(figures())
