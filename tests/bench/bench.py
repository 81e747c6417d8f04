"""Measures what Job Tracker costs, as a table and a picture. Started by run.py.

Every figure stands beside what it is compared with in the same run: the webui alone, an empty route, a bare write and
fsync, or a jobs.json that is written whole for each change.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import bench_events
import bench_fleet
import bench_parked
import bench_requests
import bench_store
from inside import a_job, load_script

import harness
from harness import HOST, MODE_FLAGS, MODES, PROJECT, body

PICTURE = PROJECT / ".github" / "growth.png"
SIZES = (1_000, 10_000, 100_000, 1_000_000)


def over_http(start: Callable[..., Any], jobs: int, progress: bench_store.Progress) -> List[Tuple[str, str, str]]:
    """How long the endpoints take with so many jobs, beside an empty route of the same host."""
    script = load_script()

    def prepare(webui: Any) -> None:
        bench_store.write_file(script, webui.data / "jobs.json", jobs, 1, progress)

    webui = start(*MODE_FLAGS[MODES[-1]], environ={"TRACKER_RETENTION": "off"}, prepare=prepare)
    job_id = webui.post(body()).headers["x-job-id"]
    webui.job(job_id, wait=60)
    return [figure.cells for figure in bench_requests.looks(webui, job_id, f"of {jobs:,} jobs", progress)]


def growth(progress: bench_store.Progress) -> Dict[str, List[Tuple[int, float]]]:
    """Seconds of an append, a query and of starts, by the number of jobs, for Job Tracker and for a naive jobs.json."""
    script, dice = load_script(), random.Random(5)
    lines: Dict[str, List[Tuple[int, float]]] = {}

    def note(line: str, jobs: int, call: Callable[[], Any], repeats: int) -> Any:
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - began)
        lines.setdefault(line, []).append((jobs, statistics.median(seconds)))
        return result

    for jobs in SIZES:
        with bench_store.a_folder() as folder:
            path = folder / "jobs.json"
            bench_store.write_file(script, path, jobs, 1, progress)
            progress(f"growth, {jobs:,} jobs", 0)
            everything = note("start, naive", jobs, lambda path=path: json.loads(path.read_bytes().decode()), 1)
            naive = str(folder / "naive.json")

            def rewrite(everything: Any = everything, naive: str = naive) -> None:
                job = a_job(script, dice)
                everything[job.id] = json.loads(script.record_of(job).decode())
                script.replace_file(naive, json.dumps(everything).encode())

            def scan(everything: Any = everything) -> List[Any]:
                return [job for job in reversed(list(everything.values())) if "not there" in job["prompt"].casefold()]

            note("append, naive", jobs, rewrite, 3)
            note("query, naive", jobs, scan, 3)
            del everything, rewrite, scan

            def begin(folder: Path = folder) -> Any:
                store = script.JobStore(str(folder))
                store.stats()
                return store

            note("first start", jobs, begin, 1).close()
            store = note("start", jobs, begin, 1)
            note("append", jobs, lambda store=store: store.put(a_job(script, dice), new=True).result(), 50)
            note("query", jobs, lambda store=store: store.query(script.Filter(q="not there"), 50), 20)
            store.close()
    return lines


def draw(lines: Dict[str, List[Tuple[int, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    colours = {"start": "tab:orange", "first start": "tab:red", "query": "tab:green", "append": "tab:blue"}
    names = {
        "start": "start",
        "first start": "first start, which makes the index",
        "query": "query that finds nothing",
        "append": "durable append",
    }
    for line, points in sorted(lines.items()):
        what, _, naive = line.partition(", ")
        style = {"linestyle": "--", "alpha": 0.55} if naive else {"marker": "o"}
        label = f"{names[what]}, {'naive jobs.json' if naive else 'Job Tracker'}"
        axes.plot(*zip(*points), color=colours[what], label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="jobs", ylabel="seconds")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def run(parts: List[str], jobs: int) -> int:
    live = sys.stdout.isatty()

    def progress(text: str, share: float) -> None:
        if live:
            print(f"\r[{'#' * int(share * 30):30}] {text:30}", end="", flush=True)

    def row(*cells: Any) -> None:
        if live:
            print("\r" + " " * 64 + "\r", end="")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

    print(
        f"Packages of {HOST}, Python {sys.version.split()[0]}. Times with slashes: typical / 95th of 100 / longest.\n"
    )
    row("what", "Job Tracker", "beside")
    row("---", "---", "---")
    if "store" in parts:  # first: what memory it takes is told best in a fresh process
        for bench in bench_store.BENCHES.values():
            for figure in bench(jobs, progress):
                row(*figure)
    if "requests" in parts:
        for figure in bench_requests.figures():
            print(figure, flush=True)
    if "parked" in parts:
        for figure in bench_parked.figures():
            print(figure, flush=True)
    if "fleet" in parts:
        for figure in bench_fleet.figures(jobs, progress):
            row(*figure.cells)
    if "events" in parts:
        for figure in bench_events.figures():
            print(figure, flush=True)
    if "http" in parts:
        with harness.started(lambda: Path(tempfile.mkdtemp(prefix="bench-"))) as start:
            for cells in over_http(start, jobs, progress):
                row(*cells)
    if "growth" in parts:
        lines = growth(progress)
        draw(lines)
        for line, points in sorted(lines.items()):
            row(line, ", ".join(f"{seconds:.3g} s" for _, seconds in points), "for 1,000 to 1,000,000 jobs")
        print(f"\nThe picture is {PICTURE.relative_to(PROJECT)}")
    return 0


PARTS = ("store", "requests", "parked", "events", "http", "fleet", "growth")

if __name__ == "__main__":
    sys.exit(run(sys.argv[2:] or list(PARTS), int(sys.argv[1])))
