"""Shows a fleet, live: three webuis, one PostgreSQL, one S3 store, twenty jobs, and one webui that dies in the middle.

As in demonstration.py, every line of the show is a check of what happened. Both servers come from PyPI, and end with
this program. Started by run.py.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import shutil
import sys
import time
import urllib.parse
from typing import Any, Dict, List, Optional, Tuple

import services

import demonstration
from demonstration import DATA, Failed, Terminal, check
from harness import HOST

FOLDER = DATA / "fleet"
NAMES = ("webui-1", "webui-2", "webui-3")
VICTIM = NAMES[1]
JOBS = 20
STEPS = 6  # of each generation
DONE_FIRST = 5  # jobs that are Completed before a webui is killed
PATIENCE = 180  # seconds for all of it: that a webui is dead is known within 60
LABEL = "demo"
COLOURS = {"Completed": Terminal.GREEN, "Failed": Terminal.RED}

Job = Dict[str, Any]


class Table:
    """The jobs, ten beside ten. On a terminal it is drawn anew in its place; elsewhere each change is a line."""

    LINES = 10

    def __init__(self, terminal: Terminal, order: List[str]):
        self.terminal = terminal
        self.order = order
        self.is_drawn = False
        self.known: Dict[str, Tuple[Any, Any]] = {}

    def draw(self, jobs: Dict[str, Job], note: str) -> None:
        if not self.terminal.live:
            for job_id, job in jobs.items():
                state = job["status"], job["server"]
                if self.known.get(job_id, ("Pending", None)) != state:
                    self.known[job_id] = state
                    self.terminal.line(job["status"], f"{job_id}  {job['server'] or ''}", COLOURS.get(state[0], ""))
            return
        if self.is_drawn:
            print(f"\x1b[{self.LINES + 1}A", end="")
        self.is_drawn = True
        for line in range(self.LINES):
            cells = [self.cell(jobs.get(job_id)) for job_id in self.order[line :: self.LINES]]
            print("\x1b[2K  " + "   ".join(cells))
        print(f"\x1b[2K  {note}", flush=True)

    def cell(self, job: Optional[Job]) -> str:
        if job is None:
            return " " * 36
        progress = job["progress"]
        bar = "" if progress is None else "#" * int(progress * 8)
        status = self.terminal.paint(f"{job['status']:<10}", COLOURS.get(job["status"], ""))
        return f"{job['id']} {status} {job['server'] or '':<7} {bar:<8}"


class Client(demonstration.Client):
    """Asks whichever webui the load balancer has in mind."""

    def post(self, path: str, body: str = "", **headers: str) -> Tuple[int, Any]:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, body, fields)
            response = connection.getresponse()
            return response.status, json.loads(response.read())


class Story:
    def __init__(self, terminal: Terminal, webuis: Dict[str, demonstration.Webui], balancer: services.RoundRobin):
        self.terminal = terminal
        self.webuis = webuis
        self.client = Client(balancer.port)
        self.killed: Optional[Job] = None  # the job that ran at the webui that was killed
        self.killed_at = 0.0

    def tell(self) -> None:
        order = self.hand_in()
        jobs = self.watch(order)
        self.check_ends(jobs)
        self.retry()

    def hand_in(self) -> List[str]:
        """Gives the jobs' IDs."""
        headers = {"Content_Type": "application/json", "Prefer": "respond-async", "X_Job_Label": LABEL}
        order = []
        for number in range(JOBS):
            request = {"prompt": f"lighthouse {number}", "seed": number, "steps": STEPS, "save_images": True}
            status, job = self.client.post("/sdapi/v1/txt2img", json.dumps(request), **headers)
            check(status == 202, f"The webui answered {status}: {job}")
            order.append(job["id"])
        self.terminal.line("Hand in", f"{JOBS} jobs by the load balancer, each was answered 202", Terminal.GREEN)
        return order

    def watch(self, order: List[str]) -> Dict[str, Job]:
        """Shows the jobs until all have ended, and kills a webui meanwhile."""
        table, jobs = Table(self.terminal, order), {}
        query = urllib.parse.urlencode({"label": LABEL, "limit": JOBS})
        began = time.monotonic()
        while not (len(jobs) == JOBS and all(job["status"] in COLOURS for job in jobs.values())):
            check(time.monotonic() - began < PATIENCE, f"After {PATIENCE} s not all jobs have ended.")
            with contextlib.suppress(OSError, http.client.HTTPException):  # what the killed one was about to say
                status, found = self.client.get_json(f"/sdapi/v1/jobs?{query}")
                check(status == 200, f"The jobs cannot be listed: the webui answered {status}.")
                jobs = {job["id"]: job for job in reversed(found)}
            table.draw(jobs, self.note(jobs))
            if self.killed is None:
                self.kill_when_it_hurts(jobs)
            time.sleep(0.2)
        check(self.killed is not None, f"{VICTIM} was never seen generating.")
        return jobs

    def note(self, jobs: Dict[str, Job]) -> str:
        counts = collections.Counter(job["status"] for job in jobs.values())
        states = ", ".join(f"{counts[status]} {status}" for status in ("Pending", "Processing", *COLOURS))
        if self.killed is None:
            return states
        return f"{states}. {VICTIM} killed {time.monotonic() - self.killed_at:.0f} s ago"

    def kill_when_it_hurts(self, jobs: Dict[str, Job]) -> None:
        done = sum(job["status"] == "Completed" for job in jobs.values())
        running = [job for job in jobs.values() if job["status"] == "Processing" and job["server"] == VICTIM]
        if done >= DONE_FIRST and running:
            self.webuis[VICTIM].kill()
            self.killed, self.killed_at = running[0], time.monotonic()
            if not self.terminal.live:
                self.terminal.line("Kill", f"{VICTIM} is killed (kill -9) while it generates {self.killed['id']}")

    def check_ends(self, jobs: Dict[str, Job]) -> None:
        failed = [job for job in jobs.values() if job["status"] == "Failed"]
        done = [job for job in jobs.values() if job["status"] == "Completed"]
        for job in failed:
            check(job["server"] == VICTIM, f"{job['id']} failed at {job['server']}: {job['error']}")
            self.terminal.line("Failed", f"{job['id']} at {VICTIM}: {job['error']}", Terminal.RED)
        check(len(failed) <= 1, f"{len(failed)} jobs have failed.")
        by = collections.Counter(job["server"] for job in done)
        text = ", ".join(f"{by[name]} by {name}" for name in NAMES)
        self.terminal.line("Completed", f"{len(done)}: {text}", Terminal.GREEN)
        for job in done:
            status, image = self.client.get(f"/sdapi/v1/job/{job['id']}/images/0")
            check(status == 200, f"The image of {job['id']} cannot be read: the webui answered {status}.")
            demonstration.read_png(image)
        self.terminal.line("Images", f"all {len(done)} came back, by whichever webui was asked", Terminal.GREEN)
        made = [path for webui in self.webuis.values() for path in (webui.data / "webui").glob("output*/**/*.png")]
        check(len(made) <= JOBS, f"{len(made)} images were generated for {JOBS} jobs.")
        self.terminal.line("Once", f"{len(made)} images were generated: none twice", Terminal.GREEN)

    def retry(self) -> None:
        """What was being generated is for its owner to repeat: it may be what killed the webui."""
        job_id = self.killed["id"]
        if self.client.get_json(f"/sdapi/v1/job/{job_id}?images=false")[1]["status"] == "Completed":
            return  # it had stored its images already
        status, job = self.client.post(f"/sdapi/v1/job/{job_id}/retry")
        check(status == 202, f"The job cannot be repeated: the webui answered {status}.")
        status, job = self.client.get_json(f"/sdapi/v1/job/{job['id']}?images=false&wait=60")
        check(job["status"] == "Completed", f"Repeated, it is {job['status']}: {job['error']}")
        self.terminal.line("Retry", f"{job_id} once more, as {job['id']}: Completed by {job['server']}", Terminal.GREEN)


def show(terminal: Terminal, port: int, nowebui: bool, once: bool) -> None:
    with contextlib.ExitStack() as stack:
        terminal.now("Start", "waiting for PostgreSQL and the S3 store ...")
        database = stack.enter_context(services.Database(stack.enter_context(services.postgresql(durable=True))))
        bucket = stack.enter_context(services.Bucket(stack.enter_context(services.seaweedfs())))
        terminal.line("Start", "PostgreSQL and SeaweedFS, an S3 store, on 127.0.0.1")
        terminal.now("Start", "waiting for three webuis ...")
        webuis: Dict[str, demonstration.Webui] = {}
        for name in NAMES:
            environ = {"TRACKER_STORE": database.url, "TRACKER_IMAGES": bucket.url, "TRACKER_SERVER": name}
            environ.update(bucket.environ)
            free = demonstration.free_port(port + len(webuis))
            webui = demonstration.Webui(sys.executable, HOST, free, nowebui, FOLDER / name, environ)
            webuis[name] = stack.enter_context(webui)
        for webui in webuis.values():
            webui.wait_until_ready()
        balancer = services.RoundRobin([webui.client.port for webui in webuis.values()])
        stack.callback(balancer.close)
        for name, webui in webuis.items():
            terminal.line("Start", f"{name} serves at {webui.url}")
        Story(terminal, webuis, balancer).tell()
        terminal.title("All of it was so.")
        if not once:
            invite(terminal, webuis, balancer)


def invite(terminal: Terminal, webuis: Dict[str, demonstration.Webui], balancer: services.RoundRobin) -> None:
    alive = [webui for name, webui in webuis.items() if name != VICTIM]
    for webui in alive:
        terminal.line("A webui", f"{webui.url}  (its tab Job Tracker shows the jobs of all)")
    terminal.line("The API", f"http://127.0.0.1:{balancer.port}/docs  (whichever webui is next)")
    terminal.line("End", "Ctrl-C")
    alive[0].wait()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--nowebui", action="store_true")
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    missing = services.why_missing()
    if missing:
        print(f"demo --fleet cannot run here: {missing}", file=sys.stderr)
        return 1
    demonstration.end_on_signals()
    terminal = Terminal()
    terminal.title(f"Three webuis share their jobs ({HOST}; everything is real but the model)")
    shutil.rmtree(str(FOLDER), ignore_errors=True)  # of a database that is no more
    try:
        show(terminal, options.port, options.nowebui, options.once)
        return 0
    except (Failed, ValueError) as failure:
        return demonstration.report(terminal, str(failure), FOLDER)
    except (OSError, http.client.HTTPException) as error:
        return demonstration.report(terminal, f"A webui does not answer: {error!r}", FOLDER)
    except KeyboardInterrupt:
        terminal.end_line()
        terminal.title("All that was started has ended.")
        return 130 if options.once else 0


if __name__ == "__main__":
    sys.exit(main())
