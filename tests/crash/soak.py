"""Two webuis on one folder under mixed load for a long time: what they hold stays the same, and nothing is lost.

    python3 tests/crash/soak.py --minutes 30
    python3 tests/crash/soak.py --minutes 30 --picture soak.png

Clients generate (plain, with gzip, with respond-async, with Idempotency-Key), poll, page through lists, fetch images,
look at the tab, delete, cancel, and leave at random moments, by FIN or RST. The jobs are kept for half a minute only,
somebody presses Purge Now every few seconds, and one of the webuis is told to Reload UI from time to time.

Meanwhile it is written down what each process holds (memory, threads, open files) and what lies in the folder. The
first quarter is warm-up; the medians of the last quarter are compared with those of the second. What is checked, too:
an ID that was sent resolves, on both webuis, until its job is deleted or too old; what was deleted is gone; images are
byte for byte what the generation gave; Job Tracker logs nothing but what belongs there; no more files than the kept
jobs have; and after a last purge none at all.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import os
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

try:
    import fastapi  # noqa: F401
    import httpx
except ImportError:
    import environment

    sys.exit(environment.call([environment.ensure("a1111", "test"), *sys.argv], cwd=Path.cwd(), env={}))

import harness
from harness import MODE_FLAGS, MODES, QUICK, SHAPE, Page, Webui, body, new_client, until

RETENTION = 25.0  # seconds
PURGE_EVERY = 4.0  # seconds between two presses of Purge Now
SAMPLE_EVERY = 0.5
CLIENTS = 8
SEEDS = range(9)
CALM = 12.0  # seconds after which a webui has let go of idle threads

# What may grow from the second quarter to the last, as a share, and in units on top of it.
MEMORY = 0.03, 8e6
RELOAD_MEMORY = 7e6  # a Reload UI leaves so much; gradio alone leaves half of it
HELD = 0.15, 4  # threads, open files
FOLDER = 0.5, 100_000  # bytes in the folder, and of jobs.json at its largest

OUR_LINES = (  # what Job Tracker may say here
    r"Ready, tracking is on, jobs are in \S+",
    r"Purge: removed [\d,]+ jobs?, [\d,]+ images?, [\d,]+ bytes?",
    r"Job \w{8} was cancelled",
    r"jobs\.json: \d+ jobs loaded in [\d.]+ s",
)
FIXED_FILES = re.compile(r"jobs\.json(\.lock|\.index3(-wal|-shm)?|\.owner-[0-9a-f]{8})?\Z")


class Kept:
    """A job whose ID a client has seen."""

    def __init__(self, job_id: str, seed: int, began: float):
        self.id = job_id
        self.seed = seed
        self.began = began  # when its request was sent, in Unix seconds
        self.ended = False
        self.cancelled = False
        self.going = False  # being deleted, or gone

    def must_resolve(self) -> bool:
        """Whether nothing can have removed it until now."""
        return not self.going and time.time() < int(self.began) + RETENTION


class Held(NamedTuple):
    """What a process holds."""

    rss: float
    own: float  # without what lies in files, which other processes share
    threads: float
    files: float


class Sample(NamedTuple):
    at: float  # seconds since the load began
    processes: Tuple[Held, ...]
    images: float  # files below images/
    bytes: float  # of all files in the folder
    jobs_json: float


def held(pid: int) -> Held:
    folder = Path("/proc") / str(pid)
    memory = dict(re.findall(r"(\w+): +(\d+) kB", (folder / "smaps_rollup").read_text()))
    rss, own = (1024.0 * int(memory[name]) for name in ("Rss", "Anonymous"))
    return Held(rss, own, len(os.listdir(folder / "task")), len(os.listdir(folder / "fd")))


class HeldIdle(NamedTuple):
    """What a process holds that has nothing to do."""

    threads: List[str]
    files: List[str]  # but the index's: SQLite keeps as many for the next reader as have ever read at once


def held_idle(pid: int) -> HeldIdle:
    folder, files = Path("/proc") / str(pid), []
    for file in (folder / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            files.append(os.readlink(str(file)))
    files = sorted(name for name in files if "jobs.json.index" not in name)
    return HeldIdle(os.listdir(folder / "task"), files)


def files_of(folder: Path) -> Dict[str, int]:
    """All files below a folder, with their bytes."""
    sizes = {}
    for place, _, names in os.walk(str(folder)):
        for name in names:
            path = os.path.join(place, name)
            with contextlib.suppress(FileNotFoundError):
                sizes[os.path.relpath(path, str(folder))] = os.stat(path).st_size
    return sizes


class Soak:
    """The webuis, those who use them, and what these know."""

    def __init__(self, start: Callable[..., Webui], folder: Path, rate: float):
        self.rate = rate
        self.folder = folder / "data"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        environ = {
            "TRACKER_ENABLED": "1",
            "TRACKER_RETENTION": repr(RETENTION / 86400),
            "TRACKER_DATA_DIR": str(self.folder),
            "TMPDIR": str(self.temporary),
            "MALLOC_ARENA_MAX": "2",  # or each thread gets a heap of its own, and memory takes long to settle
        }
        self.webuis = [start(*flags, tracking=None, environ=environ) for flags in (MODE_FLAGS[MODES[0]], QUICK)]
        self.kept: Dict[str, Kept] = {}
        self.unnamed: List[float] = []  # when requests were sent whose IDs nobody saw
        self.gone: "collections.deque[str]" = collections.deque(maxlen=50)
        self.done: "collections.Counter[str]" = collections.Counter()
        self.wrong: List[str] = []
        self.samples: List[Sample] = []
        self.reloads: List[Tuple[float, float]] = []  # from when to when, in Unix seconds
        self.reloading: Optional[float] = None
        self.purge_began = 0.0
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.load_began = time.time()
        self.suspects: Dict[str, float] = {}  # files that no job names, and when they were first seen
        self.loose: Set[str] = set()  # those that were complained of
        self.pictures = {
            seed: self.webuis[0].client.post("/sdapi/v1/txt2img", json=self.request(seed)).json()["images"]
            for seed in SEEDS
        }
        self.tab = Page(new_client(self.webuis[0].url))

    @staticmethod
    def request(seed: int, seconds: float = 0.02) -> Dict[str, Any]:
        size = 64 if seed % 3 else 192
        return body("soak", {"seconds": seconds}, seed=seed, batch_size=1 + seed % 3, width=size, height=size)

    # What the clients do

    def client(self, number: int) -> None:
        dice = random.Random(os.urandom(8))
        clients = [new_client(webui.url) for webui in self.webuis]
        due = time.monotonic()
        actions, weights = zip(*self.ACTIONS)
        while not self.stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + dice.expovariate(self.rate / CLIENTS), time.monotonic() - 1)
            place = dice.randrange(len(self.webuis))
            action = dice.choices(actions, weights)[0]
            began = time.time()
            try:
                action(self, Turn(self, self.webuis[place], clients, place, dice))
                self.done[action.__name__] += 1
            except Exception as error:
                if not self.was_reloading(began):
                    self.complain(f"{action.__name__}: {type(error).__name__}: {error}")
        for client in clients:
            client.close()

    def was_reloading(self, began: float, ended: Optional[float] = None) -> bool:
        """Whether the first webui was being reloaded at any time from `began` on."""
        ended = time.time() if ended is None else ended
        current = [] if self.reloading is None else [(self.reloading, time.time())]
        return any(start - 1 < ended and began < end + 1 for start, end in self.reloads + current)

    def complain(self, text: str) -> None:
        with self.lock:
            if len(self.wrong) < 50:
                self.wrong.append(f"after {time.time() - self.load_began:.0f} s: {text[:500]}")

    def keep(self, job_id: str, seed: int, began: float) -> Kept:
        kept = Kept(job_id, seed, began)
        with self.lock:
            self.kept[job_id] = kept
        return kept

    def one(self, dice: random.Random, ended: bool = False) -> Optional[Kept]:
        """One of the jobs that must be there."""
        with self.lock:
            those = [kept for kept in self.kept.values() if kept.must_resolve() and (kept.ended or not ended)]
        return dice.choice(those) if those else None

    def check(self, kept: Kept, job: Dict[str, Any]) -> None:
        """A job as the API shows it, with its images."""
        if job["status"] == "Completed":
            kept.ended = True
            if job["images"] != self.pictures[kept.seed] and kept.must_resolve():
                assert self.was_reloading(job["started"], job["finished"]), f"{kept.id} has other images"
        elif job["status"] == "Failed":
            kept.ended = True
            assert kept.cancelled and job["error"] == "Cancelled", f"{kept.id} failed: {job['error']}"

    def generate(self, turn: Turn) -> None:
        turn.plain("identity")

    def generate_gzip(self, turn: Turn) -> None:
        turn.plain("gzip")

    def generate_async(self, turn: Turn) -> None:
        kept = turn.accepted()
        job = turn.get(kept, wait=30)
        if job is not None:
            assert job["status"] != "Pending", f"{kept.id} has waited too long"
            self.check(kept, job)

    def generate_with_key(self, turn: Turn) -> None:
        """Twice or three times, the repeats wherever the job is known."""
        key = {"Idempotency-Key": os.urandom(8).hex()}
        kept = turn.plain("gzip", key)
        for _ in range(turn.dice.randrange(1, 3)):
            began = time.time()
            client = turn.dice.choice(turn.clients)
            response = client.post("/sdapi/v1/txt2img", json=self.request(kept.seed), headers=key)
            job_id = response.headers.get("x-job-id")
            if job_id is None:
                assert self.was_reloading(began), "no job, although tracking is on"  # and not in its place for a moment
            elif job_id != kept.id:
                self.keep(job_id, kept.seed, began)
                assert not kept.must_resolve() or self.was_reloading(began), f"{kept.id} was generated anew"
            else:
                same = response.json()["images"] == self.pictures[kept.seed]
                assert same or self.was_reloading(kept.began), f"{kept.id} is repeated with other images"

    def leave(self, turn: Turn) -> None:
        """A client that goes away: in the middle of its request, before the head, after it, or during the answer."""
        dice = turn.dice
        seed, began = dice.choice(SEEDS), time.time()
        encoding = {"Accept-Encoding": dice.choice(["gzip", "identity"])}
        data = turn.webui.raw(self.request(seed), headers=encoding)
        cut = dice.random() < 0.15
        sent = harness.Sent(turn.webui.port, data[: dice.randrange(len(data))] if cut else data)
        job_id = None
        try:
            if dice.random() < 0.5 or cut:
                time.sleep(dice.random() * 0.05)
            else:
                job_id = sent.job_id()
                self.keep(job_id, seed, began)
                for _ in range(dice.randrange(3)):
                    sent.socket.recv(1000)
        finally:
            sent.leave(reset=dice.random() < 0.5)
            if job_id is None and not cut:
                with self.lock:
                    self.unnamed.append(began)

    def poll(self, turn: Turn) -> None:
        kept = self.one(turn.dice)
        if kept is not None:
            job = turn.get(kept)
            if job is not None:
                self.check(kept, job)

    def poll_gone(self, turn: Turn) -> None:
        if self.gone:
            job_id = turn.dice.choice(list(self.gone))
            response = turn.http.get(f"/sdapi/v1/job/{job_id}")
            assert response.status_code == 404, f"{job_id} was deleted, and is {response.status_code}: {response.text}"

    def image(self, turn: Turn) -> None:
        kept = self.one(turn.dice, ended=True)
        if kept is None or kept.cancelled:
            return
        number = turn.dice.randrange(len(self.pictures[kept.seed]))
        with turn.http.stream("GET", f"/sdapi/v1/job/{kept.id}/images/{number}") as response:
            if turn.dice.random() < 0.2:
                return  # leaves
            data = response.read()
        if kept.must_resolve() and not self.was_reloading(kept.began, kept.began + 5):
            assert response.status_code == 200, f"image {number} of {kept.id}: {response.status_code}"
            assert data == base64.b64decode(self.pictures[kept.seed][number]), f"image {number} of {kept.id} is another"

    def walk(self, turn: Turn) -> None:
        """Through all pages, with a filter or not."""
        with self.lock:
            wanted = [kept for kept in self.kept.values() if kept.must_resolve()]
        filters = turn.dice.choice(["", "&q=SOAK", "&type=txt2img", "&ip=127.0.0.1", f"&after={time.time() - 1000}"])
        url: Optional[str] = f"/sdapi/v1/jobs?limit={turn.dice.choice([7, 40, 200])}{filters}"
        seen: List[str] = []
        while url:
            response = turn.http.get(url)
            assert response.status_code == 200, response.text[:200]
            seen += [job["id"] for job in response.json()]
            url = response.links.get("next", {}).get("url")
        assert len(seen) == len(set(seen)), "a page repeats a job"
        missing = {kept.id for kept in wanted if kept.must_resolve()} - set(seen)
        assert not missing, f"{missing} are in no page"

    def look(self, turn: Turn) -> None:
        kept = self.one(turn.dice)
        page = turn.dice.randrange(3)
        self.tab.look(page, kept.id if kept and turn.dice.random() < 0.5 else "")

    def delete(self, turn: Turn) -> None:
        kept = self.one(turn.dice, ended=True)
        if kept is None:
            return
        kept.going = True
        response = turn.http.delete(f"/sdapi/v1/job/{kept.id}")
        assert response.status_code in (204, 404), f"{kept.id} cannot be deleted: {response.text[:200]}"
        self.gone.append(kept.id)

    def cancel(self, turn: Turn) -> None:
        kept = turn.accepted(seconds=0.2, cancelled=True)
        time.sleep(turn.dice.random() * 0.15)
        response = turn.http.post(f"/sdapi/v1/job/{kept.id}/cancel")
        assert response.status_code in (200, 202, 409), f"{kept.id} cannot be cancelled: {response.text[:200]}"
        job = turn.get(kept, wait=30)
        if job is not None:
            self.check(kept, job)
            may_be = {200: ["Failed"], 202: ["Failed", "Completed"], 409: ["Completed"]}[response.status_code]
            assert job["status"] in may_be, f"{kept.id} is {job}"

    ACTIONS = (
        (generate, 12),
        (generate_gzip, 12),
        (generate_async, 12),
        (generate_with_key, 6),
        (leave, 12),
        (cancel, 3),
        (poll, 22),
        (poll_gone, 3),
        (image, 10),
        (walk, 4),
        (look, 4),
        (delete, 5),
    )

    # What is done to the webuis

    def purge_now(self) -> None:
        """The button, until the purge is done."""
        assert self.tab.call("job_tracker_action", "purge").status_code == 200, "Purge Now failed"
        until(lambda: "Purging:" not in self.tab.look(), what="the purge ends")

    def purge(self) -> None:
        while not self.stop.wait(PURGE_EVERY):
            if self.reloading is None:
                began = time.time()
                try:
                    self.purge_now()
                    self.purge_began = began
                    self.done["purge"] += 1
                except Exception as error:
                    if not self.was_reloading(began):
                        self.complain(f"purge: {type(error).__name__}: {error}")

    def reload(self) -> None:
        self.reloading = time.time()
        self.webuis[0].reload_ui()
        self.tab.read()
        self.reloads.append((self.reloading, time.time()))
        self.reloading = None
        self.done["reload"] += 1

    # What is written down, and looked at meanwhile

    def sample(self) -> None:
        files = files_of(self.folder)
        images = sum(name.startswith("images") for name in files)
        processes = tuple(held(webui.pid) for webui in self.webuis)
        at = time.time() - self.load_began
        self.samples.append(Sample(at, processes, images, sum(files.values()), files.get("jobs.json", 0)))

    def check_files(self) -> None:
        """No files but those of kept jobs, and no more of these than the retention leaves."""
        names = files_of(self.folder)
        records = self.webuis[0].records()
        since = self.purge_began - RETENTION - 10
        with self.lock:
            self.kept = {job_id: kept for job_id, kept in self.kept.items() if kept.began > since}
            self.unnamed = [began for began in self.unnamed if began > since]
            most = sum(len(self.pictures[kept.seed]) + 2 for kept in self.kept.values()) + 4 * len(self.unnamed)
        images = [name for name in names if name.startswith("images")]
        if self.purge_began and len(images) > most + 20:
            self.complain(f"{len(images)} files in images/, though no more than {most} can be of kept jobs")
        named = {f"images/{name}" for record in records.values() for name in record["images"]}
        named |= {os.path.dirname(name) + f"/{os.path.basename(name)[:8]}.json" for name in named}
        named |= {
            name
            for name in names
            if name.endswith(".request.json") and records.get(name[-21:-13], {}).get("has_request")
        }
        loose = {name for name in names if name not in named and not FIXED_FILES.match(name)}
        running = {job_id for job_id, record in records.items() if record["status"] in ("Pending", "Processing")}
        loose = {name for name in loose if os.path.basename(name)[:8] not in running}
        self.suspects = {name: self.suspects.get(name, time.monotonic()) for name in loose}
        for name, first in self.suspects.items():
            if time.monotonic() - first > 10 and name not in self.loose:
                self.loose.add(name)
                self.complain(f"{name} belongs to no job")
        for webui in self.webuis:
            self.check_log(webui)

    def check_log(self, webui: Webui) -> None:
        for line in webui.our_log():
            if not any(re.fullmatch(form, line[len("[Job Tracker] ") :]) for form in OUR_LINES):
                self.complain(f"the log says: {line}")
        for found in re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n)*\S.*", webui.log):
            self.complain(f"the log has a traceback: ...{found[-400:]}")

    # From the begin to the end

    def run(self, minutes: float, progress: Callable[[str, float], None]) -> None:
        seconds = 60 * minutes
        time.sleep(1)
        before = [held_idle(webui.pid) for webui in self.webuis]
        self.load_began = began = time.time()
        threads = [threading.Thread(target=self.client, args=(number,)) for number in range(CLIENTS)]
        threads.append(threading.Thread(target=self.purge))
        for thread in threads:
            thread.start()
        try:
            look_at = 5.0
            reload_at = 0.15 * seconds
            while time.time() - began < seconds:
                passed = time.time() - began
                self.sample()
                progress(self.line(), passed / seconds)
                if passed > look_at:
                    look_at += 5
                    self.check_files()
                if passed > reload_at and SHAPE != "sdnext":  # which starts anew as a process
                    reload_at += max(0.4 * seconds, 60) if minutes < 10 else 120
                    self.reload()
                time.sleep(SAMPLE_EVERY)
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()
        self.end(before, progress)

    def line(self) -> str:
        last = self.samples[-1]
        memory = " + ".join(f"{one.rss / 1e6:.0f}" for one in last.processes)
        return f"{sum(self.done.values())} done, {len(self.wrong)} wrong, {memory} MB, {last.images:.0f} files"

    def end(self, before: List[HeldIdle], progress: Callable[[str, float], None]) -> None:
        """When all is quiet: every job that must be there is there, the rest goes, and nothing stays behind."""
        progress("the end", 1)
        until(self.webuis[0].is_idle, what="all jobs have ended")
        for webui in self.webuis:
            for kept in [kept for kept in self.kept.values() if kept.must_resolve()]:
                response = webui.client.get(f"/sdapi/v1/job/{kept.id}")
                if kept.must_resolve():
                    try:
                        assert response.status_code == 200, f"{kept.id} is gone"
                        assert response.json()["status"] in ("Completed", "Failed"), f"{kept.id} has not ended"
                        self.check(kept, response.json())
                    except AssertionError as error:
                        self.complain(str(error))
                self.done["at the end"] += 1
        time.sleep(max(CALM, RETENTION + 2))
        self.purge_now()
        records = self.webuis[0].records()
        if records:
            self.complain(f"{len(records)} jobs are left after the last purge")
        left = [name for name in files_of(self.folder) if not FIXED_FILES.match(name)]
        left += [str(path) for path in self.temporary.rglob("*") if path.is_file()]
        if left:
            self.complain(f"{len(left)} files are left after the last purge, such as {left[0]}")
        for webui, then in zip(self.webuis, before):
            webui.client.get("/standin/empty")
            webui.client.get("/standin/empty")
            self.check_log(webui)
            now = held_idle(webui.pid)
            for name, room in (("threads", 16), ("files", 6)):  # the threads of the pools may not have begun then
                idle, before_load = getattr(now, name), getattr(then, name)
                if len(idle) > len(before_load) + room:
                    self.complain(f"{len(idle)} {name} when idle, {idle}, {len(before_load)} before the load")


class Turn:
    """One client's turn at one of the webuis."""

    def __init__(self, soak: Soak, webui: Webui, clients: List[httpx.Client], place: int, dice: random.Random):
        self.soak = soak
        self.webui = webui
        self.clients = clients
        self.http = clients[place]
        self.dice = dice

    def plain(self, encoding: str, headers: Optional[Dict[str, str]] = None) -> Kept:
        """A generation, from its request to the end of its answer."""
        soak, seed, began = self.soak, self.dice.choice(SEEDS), time.time()
        headers = {"Accept-Encoding": encoding, **(headers or {})}
        with self.http.stream("POST", "/sdapi/v1/txt2img", json=soak.request(seed), headers=headers) as response:
            assert response.status_code == 200, response.status_code
            kept = soak.keep(response.headers["x-job-id"], seed, began)
            response.read()
        if response.json()["images"] != soak.pictures[seed]:
            assert soak.was_reloading(began), f"{kept.id} is answered with other images"
        return kept

    def accepted(self, seconds: float = 0.02, cancelled: bool = False) -> Kept:
        """A generation with respond-async."""
        seed, began = self.dice.choice(SEEDS), time.time()
        request = self.soak.request(seed, seconds)
        response = self.http.post("/sdapi/v1/txt2img", json=request, headers={"Prefer": "respond-async"})
        assert response.status_code == 202, f"{response.status_code} for respond-async"
        kept = self.soak.keep(response.headers["x-job-id"], seed, began)
        kept.cancelled = cancelled
        return kept

    def get(self, kept: Kept, **params: Any) -> Optional[Dict[str, Any]]:
        """A job, from either webui. None if it may be gone by now."""
        response = self.dice.choice(self.clients).get(f"/sdapi/v1/job/{kept.id}", params=params)
        if response.status_code == 200:
            return response.json()
        assert response.status_code == 404, f"{kept.id}: {response.status_code}"
        assert not kept.must_resolve(), f"{kept.id} was sent and is gone"
        return None


# What came out


class Figure(NamedTuple):
    """A line of the table."""

    what: str
    second: float  # in the second quarter
    last: float
    limit: float  # for the last
    unit: float  # what is shown as 1

    @property
    def flat(self) -> bool:
        return self.last <= self.limit

    def cells(self) -> List[str]:
        numbers = [f"{number / self.unit:,.1f}".replace(".0", "") for number in (self.second, self.last, self.limit)]
        return [self.what, *numbers, "flat" if self.flat else "GROWS"]


def figures(soak: Soak) -> List[Figure]:
    """The second quarter beside the last one: medians, and the largest jobs.json, which shrinks by turns."""
    end = soak.samples[-1].at
    second = [sample for sample in soak.samples if end / 4 <= sample.at < end / 2]
    last = [sample for sample in soak.samples if end * 3 / 4 <= sample.at]
    reloads = sum(end / 4 < begun - soak.load_began for begun, _ in soak.reloads)
    lines: List[Figure] = []

    def add(what: str, of: Callable[[Sample], float], room: Tuple[float, float], unit: float = 1, more: float = 0):
        then, now = (statistics.median(map(of, samples)) for samples in (second, last))
        lines.append(Figure(what, then, now, then * (1 + room[0]) + room[1] + more, unit))

    for place, name in enumerate(("webui with the UI", "webui without")):
        more = 0 if place else reloads * RELOAD_MEMORY
        add(f"memory of the {name}, MB", lambda it, place=place: it.processes[place].rss, MEMORY, 1e6, more)
        add("of that, not of files, MB", lambda it, place=place: it.processes[place].own, MEMORY, 1e6, more)
        add("its threads", lambda it, place=place: it.processes[place].threads, HELD)
        add("its open files", lambda it, place=place: it.processes[place].files, HELD)
    add("files in images/", lambda it: it.images, (FOLDER[0], 50))
    add("all files, MB", lambda it: it.bytes, FOLDER, 1e6)
    half = [sample.jobs_json for sample in soak.samples if end / 4 <= sample.at < end * 5 / 8]
    rest = [sample.jobs_json for sample in soak.samples if end * 5 / 8 <= sample.at]
    lines.append(Figure("largest jobs.json, MB", max(half), max(rest), max(half) * (1 + FOLDER[0]) + FOLDER[1], 1e6))
    return lines


def draw(soak: Soak, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(8, 8), sharex=True)
    minutes = [sample.at / 60 for sample in soak.samples]
    for place, (name, colour) in enumerate((("with the UI", "tab:blue"), ("without", "tab:green"))):
        own = [sample.processes[place] for sample in soak.samples]
        style = {"color": colour, "linewidth": 1}
        axes[0].plot(minutes, [one.rss / 1e6 for one in own], label=name, **style)
        axes[1].plot(minutes, [one.threads for one in own], label=f"threads, {name}", **style)
        axes[1].plot(minutes, [one.files for one in own], label=f"open files, {name}", alpha=0.55, **style)
    axes[2].plot(minutes, [sample.images for sample in soak.samples], color="tab:orange", linewidth=1)
    axes[3].plot(minutes, [sample.jobs_json / 1e6 for sample in soak.samples], color="tab:orange", linewidth=1)
    for axis, name in zip(axes, ("memory, MB", "threads, open files", "files in images/", "jobs.json, MB")):
        axis.set(ylabel=name, ylim=(0, None))
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for number, (begun, _) in enumerate(soak.reloads):
        label = None if number else "Reload UI"
        axes[0].axvline((begun - soak.load_began) / 60, color="grey", alpha=0.4, linewidth=1, label=label)
    for axis in axes[:2]:
        axis.legend(frameon=False, fontsize=8, loc="lower right", ncol=2)
    axes[3].set(xlabel="minutes")
    figure.align_ylabels()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(soak: Soak) -> str:
    rows = [["what", "second quarter", "last quarter", "limit", ""], ["---"] * 5]
    rows += [line.cells() for line in figures(soak)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def soak(minutes: float, rate: float, progress: Callable[[str, float], None]) -> Soak:
    """A whole run. Its findings are in `wrong`; what grows is in `figures`."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        numbers = iter(range(100))

        def folder() -> Path:
            path = Path(name) / f"webui-{next(numbers)}"
            path.mkdir()
            return path

        with harness.started(folder) as start:
            run = Soak(start, Path(name), rate)
            run.run(minutes, progress)
            return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long the load goes on (default: 30)")
    parser.add_argument("--rate", type=float, default=20, help="actions of clients a second (default: 20)")
    parser.add_argument("--picture", type=Path, help="a PNG to draw", metavar="FILE")
    options = parser.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("this reads /proc, which Linux has")
    live = sys.stdout.isatty()

    def progress(text: str, share: float) -> None:
        if live:
            print(f"\r[{'#' * int(share * 30):30}] {text:60}", end="", flush=True)

    run = soak(options.minutes, options.rate, progress)
    if live:
        print("\r" + " " * 93 + "\r", end="")
    print(table(run))
    print("\n" + ", ".join(f"{count:,} x {name}" for name, count in sorted(run.done.items())))
    print(f"{len(run.wrong)} things went wrong" + "".join(f"\n  {line}" for line in run.wrong))
    if options.picture:
        draw(run, options.picture)
    return int(bool(run.wrong) or not all(line.flat for line in figures(run)))


if __name__ == "__main__":
    sys.exit(main())
