"""What the store costs, each time beside what it is compared with on the same machine in the same run.

    python3 tests/bench/bench_store.py                     all of it, about three minutes
    python3 tests/bench/bench_store.py appends --jobs 1000 one of it, with fewer jobs

Each function returns its figures as lines of a table: what, measured, compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

try:
    import fastapi  # noqa: F401
except ImportError:
    import environment

    sys.exit(environment.call([environment.ensure("a1111", "test"), *sys.argv], cwd=Path.cwd(), env={}))

from inside import a_job, a_prompt, completed, load_script, make_tracker, until

Progress = Callable[[str, float], None]
SECONDS_BESIDE = 10.0  # that the event loop is looked at beside two searches, and beside none
STARTS = 5  # later ones, each in a process of its own


class Figure(NamedTuple):
    """A line of the table."""

    what: str
    measured: str
    compared: str = ""


class Timer:
    """How long each of many calls took."""

    def __init__(self) -> None:
        self.seconds: List[float] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - began)

    def at(self, share: float) -> float:
        """In milliseconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000

    def __str__(self) -> str:
        return f"{self.at(0.5):.2f} / {self.at(0.95):.2f} / {self.at(1):.2f} ms"


def write_file(script: Any, path: Path, jobs: int, lines: int, progress: Progress) -> None:
    """A jobs.json with so many Completed jobs, each with the lines that it would have before a compaction."""
    dice = random.Random(1)
    prompts = [a_prompt(dice) for _ in range(5000)]
    with path.open("wb") as file:
        file.write(b"{")
        for number in range(jobs):
            job = a_job(script, dice, prompt=f"{dice.choice(prompts)} {number}", timestamp=1736712000 + number)
            steps = [job, job._replace(status="Processing", started=job.timestamp + 0.5), completed(job)]
            for step in steps[3 - lines :]:
                file.write((b",\n" if file.tell() > 1 else b"\n") + f'"{job.id}": '.encode())
                file.write(script.record_of(step))
            if number % 5000 == 0:
                progress("writing a file", number / jobs)
        file.write(b"\n}\n")
        file.flush()
        os.fsync(file.fileno())  # or the first to sync waits for all of it


def memory() -> int:
    """Of this process, in bytes."""
    gc.collect()
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def a_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        yield Path(name)


class Start(NamedTuple):
    """What a process took from its start until it had answered."""

    poll: float  # seconds until it could say what one job is
    all: float  # seconds until it had looked at all jobs
    bytes: int  # by which it grew until then, and at its most


# Started in a process of its own: what another start has left in memory would be counted, or used again.
STARTING = """
import json, sys, time
import bench_store, inside

folder, job_id = sys.argv[1:]
script = inside.load_script()
script.JobStore.MIN_DEAD_ENTRIES = 1 << 60
before, began = bench_store.memory(), time.perf_counter()
store = script.JobStore(folder)
assert store.get(job_id) is not None
poll = time.perf_counter() - began
store.query(script.Filter(), 50), store.stats()
whole = time.perf_counter() - began
print(json.dumps([poll, whole, bench_store.memory() - before]))
store.close()
"""


def start(folder: Path, job_id: str) -> Start:
    command = [sys.executable, "-c", STARTING, str(folder), job_id]
    done = subprocess.run(command, cwd=str(Path(__file__).parent), stdout=subprocess.PIPE, check=True)
    return Start(*json.loads(done.stdout.decode().splitlines()[-1]))


def some_id(path: Path, share: float = 0.5) -> str:
    """Of a job in the middle of a jobs.json, or so far from its start."""
    with path.open("rb") as file:
        file.seek(int(path.stat().st_size * share))
        file.readline()
        return json.loads(b"{" + file.readline().strip(b",\n") + b"}").popitem()[0]


def starting(jobs: int, progress: Progress) -> List[Figure]:
    """The first start after an update, which makes the index, and later ones, each until its first answers."""
    with a_folder() as folder:
        write_file(load_script(), folder / "jobs.json", jobs, 3, progress)
        job_id = some_id(folder / "jobs.json")
        progress("starting", 0)
        first, *later = [start(folder, job_id) for _ in range(1 + STARTS)]
        began = time.perf_counter()
        json.loads((folder / "jobs.json").read_bytes().decode())
        naive = time.perf_counter() - began
    return [
        Figure(f"first start with {jobs:,} jobs, {3 * jobs:,} lines, all indexed", f"{first.all:.1f} s"),
        Figure("first poll of it", f"{first.poll:.3f} s", f"{naive:.1f} s for json.loads"),
        Figure("memory for it", f"{first.bytes / 1e6:.0f} MB"),
        *later_starts(jobs, later),
    ]


def later_starts(jobs: int, starts: List[Start]) -> List[Figure]:
    polls, lists = sorted(start.poll for start in starts), sorted(start.all for start in starts)
    return [
        Figure(f"later starts with {jobs:,} jobs, first poll", f"{polls[0]:.3f} to {polls[-1]:.3f} s"),
        Figure("first list and figures", f"{lists[0]:.3f} to {lists[-1]:.3f} s"),
        Figure("memory", f"{max(start.bytes for start in starts) / 1e6:.1f} MB"),
    ]


def reading(jobs: int, progress: Progress) -> List[Figure]:
    """Typical / 95th / longest of a hundred calls."""
    script = load_script()
    with a_folder() as folder:
        write_file(script, folder / "jobs.json", jobs, 1, progress)
        store = script.JobStore(str(folder))
        wanted: Dict[str, Callable[[], Any]] = {
            "get": lambda: store.get(dice.choice(ids)),
            "newest 50": lambda: store.query(script.Filter(), 50),
            "50 of an IP": lambda: store.query(script.Filter(ip="10.0.0.7"), 50),
            "IP that has none": lambda: store.query(script.Filter(ip="10.9.9.9"), 50),
            "status that none has": lambda: store.query(script.Filter(status="Failed"), 50),
            "time that none has": lambda: store.query(script.Filter(before=1), 50),
            "type and time, none": lambda: store.query(script.Filter(type="img2img", after=1e12), 50),
            "q, some": lambda: store.query(script.Filter(q="castle snow"), 50),
            "q, none": lambda: store.query(script.Filter(q="not there"), 50),
            "q in each, IP, none": lambda: store.query(script.Filter(q=" ", ip="10.9.9.9"), 50),
            "q in each, type, none": lambda: store.query(script.Filter(q=" ", type="img2img", after=1e12), 50),
        }
        dice = random.Random(2)
        ids = [job.id for job in store.query(script.Filter(), jobs).jobs]
        figures = []
        for number, (name, call) in enumerate(wanted.items()):
            progress("reading", number / len(wanted))
            timer = Timer()
            for _ in range(100):
                with timer():
                    call()
            figures.append(Figure(f"{name}, of {jobs:,}", str(timer)))
        store.close()
    return figures


def appends(jobs: int, progress: Progress) -> List[Figure]:
    """A job made durable, beside the same bytes written and synced, and beside a file that is written whole."""
    script, dice = load_script(), random.Random(3)
    bare, ours, many, whole = Timer(), Timer(), Timer(), Timer()
    with a_folder() as folder:
        write_file(script, folder / "jobs.json", jobs, 1, progress)
        everything = json.loads((folder / "jobs.json").read_bytes().decode())
        store = script.JobStore(str(folder))
        store.stats()
        file, position = os.open(str(folder / "bare"), os.O_RDWR | os.O_CREAT), 0
        for number in range(300):  # in turns: the disk is not the same from minute to minute
            progress("appending", number / 300)
            job = a_job(script, dice)
            data = script.record_of(job) + b'"12345678": ,\n'
            with bare():
                os.pwrite(file, data, position)
                os.fsync(file)
            position += len(data)
            with ours():
                store.put(job, new=True).result()
            if number % 100 == 0:
                everything[job.id] = json.loads(script.record_of(job).decode())
                with whole():
                    script.replace_file(str(folder / "naive.json"), json.dumps(everything).encode())
        os.close(file)
        batch = [a_job(script, dice) for _ in range(1000)]
        with many():
            for written in [store.put(job, new=True) for job in batch]:
                written.result()
        store.close()
    return [
        Figure("a durable append", str(ours), f"{bare} for write and fsync alone"),
        Figure("", f"{ours.at(0.5) / bare.at(0.5):.1f} times the bare one", f"{whole} for the file written whole"),
        Figure("1,000 at once", f"{many.at(0):.0f} ms"),
    ]


def while_busy(store: Any, script: Any, ids: List[str], work: Callable[[], Any]) -> Tuple[Timer, Timer, float]:
    """How long puts and gets take while something else goes on, and how long that takes."""
    puts, gets, stop = Timer(), Timer(), threading.Event()
    trouble: List[BaseException] = []

    def again_and_again(timer: Timer, call: Callable[[random.Random], Any]) -> None:
        dice = random.Random(4)
        try:
            while not stop.wait(0.002):
                with timer():
                    call(dice)
        except BaseException as error:
            trouble.append(error)

    def put(dice: random.Random) -> None:
        store.put(a_job(script, dice, timestamp=int(time.time())), new=True).result()

    def get(dice: random.Random) -> None:
        store.get(dice.choice(ids))

    threads = [
        threading.Thread(target=again_and_again, args=(puts, put)),
        threading.Thread(target=again_and_again, args=(gets, get)),
    ]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    stop.set()
    for thread in threads:
        thread.join()
    assert not trouble, trouble
    return puts, gets, seconds


def busy(jobs: int, progress: Progress) -> List[Figure]:
    """Typical / 95th / longest of the puts and gets that go on during a compaction and a purge."""
    script = load_script()
    figures = []
    with a_folder() as folder:
        write_file(script, folder / "jobs.json", jobs, 3, progress)
        script.JobStore.MIN_DEAD_ENTRIES = 1 << 60
        tracker = make_tracker(script, folder, TRACKER_RETENTION="off")
        store = tracker.store
        ids = [job.id for job in store.query(script.Filter(), jobs).jobs]
        until(lambda: tracker.housekeeper.next_purge)
        time.sleep(0.3)
        idle = while_busy(store, script, ids, lambda: time.sleep(1))
        size = (folder / "jobs.json").stat().st_size

        def compact() -> None:
            script.JobStore.MIN_DEAD_ENTRIES = 1000
            until(lambda: (folder / "jobs.json").stat().st_size < size * 0.6)

        progress("compacting", 0)
        puts, gets, seconds = while_busy(store, script, ids, compact)
        figures += [
            Figure(f"put during a compaction of {jobs:,}, {seconds:.1f} s", str(puts), f"{idle[0]} otherwise"),
            Figure("get during it", str(gets), f"{idle[1]} otherwise"),
        ]
        progress("purging", 0)
        tracker.settings.retention_days = 30.0
        puts, gets, seconds = while_busy(store, script, ids, tracker.housekeeper.purge)
        figures += [
            Figure(f"put during a purge of {jobs:,}, {seconds:.1f} s", str(puts), f"{idle[0]} otherwise"),
            Figure("get during it", str(gets), f"{idle[1]} otherwise"),
        ]
        tracker.close().result(60)
    return figures


def beside(jobs: int, progress: Progress) -> List[Figure]:
    """For how long an event loop is kept from its work while two threads search all prompts."""
    script = load_script()
    delays = Timer()
    with a_folder() as folder:
        write_file(script, folder / "jobs.json", jobs, 1, progress)
        store = script.JobStore(str(folder))
        store.stats()
        stop, searches = threading.Event(), Timer()

        def search() -> None:
            while not stop.is_set():
                with searches():
                    store.query(script.Filter(q="not there"), 50)

        async def tick() -> None:
            end = time.perf_counter() + SECONDS_BESIDE
            while time.perf_counter() < end:
                began = time.perf_counter()
                await asyncio.sleep(0.001)
                delays.seconds.append(max(0.0, time.perf_counter() - began - 0.001))

        progress("searching", 0)
        asyncio.run(tick())
        alone, delays = delays, Timer()
        threads = [threading.Thread(target=search) for _ in range(2)]
        for thread in threads:
            thread.start()
        asyncio.run(tick())
        stop.set()
        for thread in threads:
            thread.join()
        store.close()
    return [
        Figure(f"event loop late beside two searches of {jobs:,}", str(delays), f"{alone} beside none"),
        Figure("the searches", str(searches)),
    ]


def million(jobs: int, progress: Progress) -> List[Figure]:
    """Ten times as many jobs: the index is made in the background, and new ones come meanwhile."""
    jobs *= 10
    script = load_script()
    with a_folder() as folder:
        write_file(script, folder / "jobs.json", jobs, 1, progress)
        job_id = some_id(folder / "jobs.json", 0.999)
        before = memory()
        store = script.JobStore(str(folder))
        progress("indexing", 0)
        puts, gets, seconds = while_busy(store, script, [job_id], store.stats)
        size = memory() - before
        store.close()
        progress("starting", 0)
        later = [start(folder, job_id) for _ in range(STARTS)]
    return [
        Figure(f"first start with {jobs:,} jobs, all indexed", f"{seconds:.1f} s"),
        Figure("memory", f"{size / 1e6:.0f} MB"),
        Figure(f"{len(puts.seconds):,} puts meanwhile", str(puts)),
        Figure(f"{len(gets.seconds):,} gets of a late job meanwhile", str(gets)),
        *later_starts(jobs, later),
    ]


BENCHES = {bench.__name__: bench for bench in (starting, reading, appends, beside, busy, million)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", help=", ".join(BENCHES) + " (default: all)")
    parser.add_argument("--jobs", type=int, default=100_000, help="how many jobs there are (default: 100000)")
    options = parser.parse_args()
    if set(options.benches) - set(BENCHES):
        parser.error("there are " + ", ".join(BENCHES))
    live = sys.stdout.isatty()

    def progress(text: str, share: float) -> None:
        if live:
            print(f"\r[{'#' * int(share * 30):30}] {text:30}", end="", flush=True)

    print("Times are typical / 95th of a hundred / longest.")
    for name in options.benches or list(BENCHES):
        figures = BENCHES[name](options.jobs, progress)
        if live:
            print("\r" + " " * 64 + "\r", end="")
        for figure in figures:
            print(f"{figure.what:46}{figure.measured:28}{figure.compared}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
