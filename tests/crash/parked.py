"""Two webuis on one folder, while requests are parked at both: killed, suspended and reloaded at random moments.

All ends are told to a receiver of webhooks, which now and then fails or takes its time. The clients remember what they
were told. An extension in each webui writes down which generation begins, which comes to its end, and in which process.
Its name there is its job's ID, or, in SD.Next, which gives it none, the prompt, which a retry has too. `judge` says
what must hold of all that when nothing waits any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import httpx
from inside import load_script, make_tracker, until
from receivers import Delivery, Receiver

import harness

CANCELLED = "Cancelled"
LEFT_BEHIND = "The webui ended before the generation did"
LATE = 2.5  # seconds for which a webui is suspended at most
SETTLED = 120.0  # seconds within which all that waits is generated when nothing is killed any more

# Reload UI loads it again, and it must not count twice.
COUNTER = """
import os
from modules.api import generation

generation.uncounted = getattr(generation, "uncounted", generation.process_images)
file = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def note(word, p, name):
    os.write(file, f"{{word}} {{os.getpid()}} {{getattr(p, 'force_task_id', name)}}\\n".encode())

def process_images(p):
    name = p.prompt  # which the generation changes
    note("begun", p, name)
    processed = generation.uncounted(p)
    note("ended", p, name)
    return processed

generation.process_images = process_images
"""


class Keyed(NamedTuple):
    """A request with an idempotency key, that can be sent again."""

    kind: str
    body: bytes
    headers: Dict[str, str]


class NotThereYet(Exception):
    """A webui with a page serves a little before its API does, and before we are in that."""


class Told:
    """What the webuis have said to their clients."""

    def __init__(self) -> None:
        self.promised: Dict[str, bytes] = {}  # ID of what was answered 202 -> the request's body
        self.seen: Dict[str, bytes] = {}  # the same for IDs in the head of a 200
        self.cancelling: Set[str] = set()  # which somebody has asked for, whatever the answer was
        self.cancelled: Set[str] = set()  # of which a client was told that they end as Failed
        self.perhaps_cancelled: Set[str] = set()  # and of which, that another webui was asked
        self.answers: Counter[str] = Counter()
        self.wrong: List[str] = []

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)


class Client(threading.Thread):
    """Sends requests of all kinds to all webuis, one after another, through whatever befalls these."""

    LATE_ENDS: Set[int] = set()  # what a retry is answered of a job that was Failed and has ended otherwise since

    def __init__(self, webuis: List[harness.Webui], told: Told, keyed: List[Keyed], stop: threading.Event):
        super().__init__(daemon=True)
        self.webuis, self.told, self.keyed, self.stop = webuis, told, keyed, stop
        self.dice = random.Random()
        self.actions: List[Tuple[int, Callable[[httpx.Client], None]]] = [
            (8, self.park),
            (2, self.park_in_time),
            (2, self.park_many),
            (4, self.connect),
            (4, self.repeat),
            (3, self.retry),
            (4, self.cancel),
            (4, self.look),
        ]

    def run(self) -> None:
        shares, actions = zip(*self.actions)
        # A webui that is suspended answers when it is woken: it is a limit for what hangs.
        hooks = {"response": [self.check_is_there]}
        with httpx.Client(timeout=60, trust_env=False, event_hooks=hooks) as http:
            while not self.stop.wait(self.dice.random() * 0.15):
                action = self.dice.choices(actions, shares)[0]
                try:
                    action(http)
                except httpx.TimeoutException as error:
                    self.told.wrong.append(f"{action.__name__}: {type(error).__name__}")
                except (httpx.HTTPError, NotThereYet):  # or it was killed
                    self.told.answers["cut"] += 1
                except Exception as error:
                    self.told.wrong.append(f"{action.__name__}: {type(error).__name__}: {error}")

    @staticmethod
    def check_is_there(response: httpx.Response) -> None:
        if response.status_code == 404 and b'"Not Found"' in response.read():
            raise NotThereYet

    def url(self, path: str) -> str:
        return f"{self.dice.choice(self.webuis).url}/sdapi/v1/{path}"

    def request(self, with_key: float = 0.3) -> Keyed:
        kind, seconds = self.dice.choice(harness.KINDS), self.dice.choice([0.02, 0.1, 0.3])
        fields = {"batch_size": 1 + self.dice.randrange(2), "send_images": self.dice.random() < 0.9}
        body = harness.body(f"job {uuid.uuid4()}", {"seconds": seconds}, kind, **fields)
        keyed = self.dice.random() < with_key
        return Keyed(kind, json.dumps(body).encode(), {"Idempotency-Key": str(uuid.uuid4())} if keyed else {})

    def post(self, http: httpx.Client, request: Keyed, prefer: Optional[str]) -> None:
        headers = {"Content-Type": "application/json", **request.headers, **({"Prefer": prefer} if prefer else {})}
        try:
            with http.stream("POST", self.url(request.kind), content=request.body, headers=headers) as response:
                self.told.answers[f"POST {response.status_code}"] += 1
                job_id = response.headers.get("X-Job-ID")
                if response.status_code == 200 and job_id is None:
                    raise NotThereYet
                if response.status_code == 202:
                    self.told.promised[job_id] = request.body
                elif response.status_code == 200:
                    self.told.seen[job_id] = request.body
                elif response.status_code != 503 and not (prefer and response.status_code == 500):
                    # A job that was awaited for some seconds is answered with its own failure.
                    self.told.wrong.append(f"{request.kind} was answered {response.status_code}: {response.read()!r}")
                if prefer or self.dice.random() < 0.6:  # otherwise its client leaves
                    response.read()
        except httpx.HTTPError:
            # What a webui did of it before its end, or what it goes on with after a reload, is on disk by then: that
            # two webuis get the same key in the same moment is not promised to be one generation.
            time.sleep(0.5)
            raise
        finally:
            if request.headers:
                self.keyed.append(request)

    def park(self, http: httpx.Client) -> None:
        self.post(http, self.request(), "respond-async")

    def park_in_time(self, http: httpx.Client) -> None:
        """It waits with its connection at first."""
        self.post(http, self.request(), f"respond-async, wait={self.dice.choice([0, 1, 1])}")

    def park_many(self, http: httpx.Client) -> None:
        for _ in range(self.dice.randrange(8)):
            self.park(http)

    def connect(self, http: httpx.Client) -> None:
        self.post(http, self.request(), None)

    def repeat(self, http: httpx.Client) -> None:
        """Once more with the same key. Nobody else uses it meanwhile."""
        with contextlib.suppress(IndexError):
            request = self.keyed.pop(self.dice.randrange(len(self.keyed) or 1))
            self.post(http, request, self.dice.choice(["respond-async", "respond-async", None]))

    def retry(self, http: httpx.Client) -> None:
        failed = http.get(self.url("jobs"), params={"status": "Failed", "limit": 20})
        if failed.status_code != 200 or not failed.json():
            return
        job_id = self.dice.choice(failed.json())["id"]
        response = http.post(self.url(f"job/{job_id}/retry"))
        self.told.answers[f"retry {response.status_code}"] += 1
        body = self.told.promised.get(job_id)
        if response.status_code == 202:
            # What its client was not told of is compared by nobody.
            self.told.promised[response.headers["X-Job-ID"]] = body or self.told.seen.get(job_id, b"")
        else:
            # One whose request was refused after all is Failed for a moment, and is removed.
            is_known = job_id in self.told.promised or job_id in self.told.seen
            may_be = {503} | ({410} if body is None else set()) | (set() if is_known else {404}) | self.LATE_ENDS
            what = f"a retry of {job_id} was answered {response.status_code}: {response.text}"
            self.told.expect(response.status_code in may_be, what)

    def cancel(self, http: httpx.Client) -> None:
        recent = list(self.told.promised)[-10:] + list(self.told.seen)[-3:]
        if recent:
            job_id = self.dice.choice(recent)
            self.told.cancelling.add(job_id)
            response = http.post(self.url(f"job/{job_id}/cancel"))
            self.told.answers[f"cancel {response.status_code}"] += 1
            if response.status_code == 200:
                self.told.cancelled.add(job_id)
            elif response.status_code == 202:
                self.told.perhaps_cancelled.add(job_id)
            else:
                self.told.expect(response.status_code in (409, 503), f"a cancel of {job_id}: {response.text}")

    def look(self, http: httpx.Client) -> None:
        promised = list(self.told.promised)
        if promised:
            job_id = self.dice.choice(promised[-100:])
            response = http.get(self.url(f"job/{job_id}"), params={"images": "false"})
            self.told.expect(response.status_code in (200, 503), f"{job_id} is {response.text}")


class Pair:
    """The two webuis, and what becomes of them."""

    CLIENT = Client

    def __init__(self, folder: Path, dice: random.Random):
        self.folder, self.dice = folder, dice
        self.counted = folder / "generations"
        self.counted.touch()
        self.killed: Set[int] = set()
        self.befell: Counter[str] = Counter()
        self.waiting = 0  # at all of that
        self.deliveries: List[Tuple[Delivery, bool]] = []  # what came to the receiver, and whether it took it
        self.receiver = Receiver(self.receive)
        self.webuis = self.make_webuis()

    def make_webuis(self) -> List[harness.Webui]:
        self.data = self.folder / "data"
        self.data.mkdir()
        constants = {"DELAY": 0.2, "RECOVER_EVERY": 1.0, "LOOK_EVERY": 0.5, "MIN_DEAD_ENTRIES": 100}
        if self.dice.random() < 0.5:  # less than a webui is suspended for
            constants.update(PATIENCE=1.0, LOCK_SECONDS=0.5)
        environ = {"TRACKER_DATA_DIR": str(self.data)}
        return [self.make_webui(mode, environ, constants) for mode in ("ui", harness.MODES[-1])]

    def make_webui(self, mode: str, environ: Dict[str, str], constants: Dict[str, Any]) -> harness.Webui:
        place = Path(tempfile.mkdtemp(prefix="webui-", dir=str(self.folder)))
        constants = {**constants, "LEASE": 2.0, "TRY_SECONDS": 1.0, "RETRY_DELAYS": (0.2,) * 100}
        constants.update(FIND_EVERY=1.0, FIND_AGAIN=0.5)
        environ = {**environ, "TRACKER_RETENTION": "off", "TRACKER_ENABLED": "1"}
        environ["TRACKER_WEBHOOK_URL"] = self.receiver.url
        scripts = {"z-counter": COUNTER.format(path=str(self.counted))}
        options = {"tracking": None, "environ": environ, "constants": constants, "scripts": scripts}
        return harness.Webui(place, *harness.MODE_FLAGS[mode], **options)

    def receive(self, handler: Any) -> None:
        """Answers a webhook."""
        dice = random.Random()
        takes = dice.random() < 0.9
        if dice.random() < 0.1:
            time.sleep(dice.random() * 1.5)
        self.deliveries.append((handler.delivery, takes))
        with contextlib.suppress(OSError):  # it was killed
            handler.send_response(204 if takes else 503)
            handler.end_headers()

    def start(self) -> None:
        for webui in self.webuis:
            webui.launch()
        for webui in self.webuis:
            webui.wait()

    def strike(self) -> None:
        """One kill, suspension or reload, of one of them or both."""
        some = self.webuis if self.dice.random() < 0.25 else [self.dice.choice(self.webuis)]
        for webui in self.webuis:
            assert webui.process.poll() is None, "a webui ended by itself:\n" + webui.log[-3000:]
        what = self.dice.choices([self.kill, self.suspend, self.reload], [6, 3, 2])[0]
        self.befell[what.__name__] += 1
        self.waiting += sum(record["status"] == "Pending" for record in self.records().values())
        what(some)

    def kill(self, some: List[harness.Webui]) -> None:
        for webui in some:
            self.killed.add(webui.pid)
            webui.kill()
        if self.dice.random() < 0.3:  # long enough for the other to notice
            time.sleep(self.dice.random() * 2.5)
        for webui in some:
            webui.launch()
        if self.dice.random() < 0.7:  # otherwise it may be killed while it starts
            for webui in some:
                webui.wait()

    def suspend(self, some: List[harness.Webui]) -> None:
        """Every second time, if it can be, while one holds the lock between them."""
        stop_at = time.monotonic() + self.dice.choice([0, 2])
        try:
            while True:
                for webui in some:
                    os.kill(webui.pid, signal.SIGSTOP)
                is_holder = self.is_locked()
                if is_holder or time.monotonic() > stop_at:
                    break
                for webui in some:
                    os.kill(webui.pid, signal.SIGCONT)
                time.sleep(self.dice.random() * 0.01)
            self.befell["with the lock"] += is_holder
            time.sleep(self.dice.random() * self.dice.choice([0.3, LATE]))
            if self.dice.random() < 0.3:
                self.kill(some[:1])
        finally:
            for webui in some:
                os.kill(webui.pid, signal.SIGCONT)

    def is_locked(self) -> bool:
        """Whether somebody holds the lock for longer than a write takes."""
        import fcntl  # which Windows has not

        file = os.open(str(self.data / "jobs.json.lock"), os.O_RDWR)
        try:
            for _ in range(10):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return False
                time.sleep(0.01)
            return True
        finally:
            os.close(file)

    def reload(self, some: List[harness.Webui]) -> None:
        """Only the webui that has a page can be. It goes on while it is reloaded."""
        webui = self.webuis[0]
        # Its server may not be there yet, or be gone for another reload.
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{webui.url}/standin/reload", timeout=60, trust_env=False)
            if harness.SHAPE == "sdnext":  # it starts anew as the same process, and what it did has ended
                self.killed.add(webui.pid)
            if self.dice.random() < 0.5:
                time.sleep(1.0)

    def settle(self) -> None:
        """All that waits is generated, and all ends are told."""
        for webui in self.webuis:
            webui.wait()
        end = time.monotonic() + SETTLED
        left: List[str] = []
        while time.monotonic() < end:
            left = [record["id"] for record in self.records().values() if not is_settled(record)]
            if not left:
                return
            time.sleep(0.1)
        raise AssertionError(f"nothing comes of {left}: " + ", ".join(str(self.records()[job_id]) for job_id in left))

    def end(self) -> None:
        for webui in self.webuis:
            webui.kill()
            webui.client.close()
        self.receiver.close()

    def records(self) -> Dict[str, Dict[str, Any]]:
        return self.webuis[0].records()

    # What must hold in the end

    def judge_webhooks(self, records: Dict[str, Dict[str, Any]]) -> None:
        judge_webhooks(records, self.deliveries)

    def check_files(self, told: Told) -> int:
        return check_files(self, told)


def is_settled(record: Dict[str, Any]) -> bool:
    return record["status"] in ("Completed", "Failed") and (record["webhook"] or {}).get("due") is None


class Counted(NamedTuple):
    """The processes that have begun and ended some generations, once for each time."""

    begun: List[int]
    ended: List[int]


def generations(path: Path) -> Dict[str, Counted]:
    """What was counted, by name."""
    found: Dict[str, Counted] = {}
    for line in path.read_text().splitlines():
        word, process, name = line.split(" ", 2)
        getattr(found.setdefault(name, Counted([], [])), word).append(int(process))
    return found


def judge(pair: Pair, told: Told) -> None:
    """What was promised, of a folder on which nobody works any more."""
    records, counted = pair.records(), generations(pair.counted)
    assert not told.wrong, "; ".join(told.wrong[:5])
    for job_id in {**told.promised, **told.seen}:
        assert job_id in records, f"{job_id} was told to a client and is gone"
    named: Dict[str, List[Dict[str, Any]]] = {}
    for job_id, record in records.items():
        named.setdefault(record["prompt"] if harness.SHAPE == "sdnext" else job_id, []).append(record)
        judge_end(record, told)
    pair.judge_webhooks(records)
    for name, jobs in named.items():
        judge_generations(jobs, counted.get(name, Counted([], [])), pair.killed, told)
    holders = Counter(record["key"] for record in records.values() if record["key"] and record["status"] != "Failed")
    doubled = [key for key, count in holders.items() if count > 1]
    assert not doubled, f"two jobs by one key: {[record for record in records.values() if record['key'] in doubled]}"


def judge_end(record: Dict[str, Any], told: Told) -> None:
    job_id = record["id"]
    if record["status"] == "Completed":
        assert job_id not in told.cancelled, f"its client was told that it is cancelled: {record}"
    elif record["error"] == CANCELLED:
        # A request that was refused after all, since the store was slow, has a job that could not be removed, perhaps.
        is_withdrawn = record["webhook"] is None and job_id not in told.promised
        assert job_id in told.cancelling or is_withdrawn, f"nobody has cancelled it: {record}"
    else:
        assert record["status"] == "Failed" and record["error"] == LEFT_BEHIND, record
        assert job_id not in told.promised or record["started"], f"it was promised, and had not begun: {record}"


def judge_webhooks(records: Dict[str, Dict[str, Any]], deliveries: List[Tuple[Delivery, bool]]) -> None:
    """Each end was told, as it is on disk, at least once, and always by the same ID."""
    told: Dict[str, List[Tuple[Delivery, bool]]] = {}
    for delivery, was_taken in deliveries:
        told.setdefault(delivery.event["data"]["id"], []).append((delivery, was_taken))
    # A request that was refused after all, since the disk was slow, has no end that anybody is to be told.
    to_tell = {job_id for job_id, record in records.items() if record["webhook"] is not None}
    assert set(told) == to_tell, f"told or not told: {set(told) ^ to_tell}"
    for job_id, tries in told.items():
        record, events = records[job_id], [delivery.event for delivery, _ in tries]
        story = f"{record}, {tries}"
        assert {event["type"] for event in events} == {f"job.{record['status'].lower()}"}, f"told another end: {story}"
        assert {event["data"]["status"] for event in events} == {record["status"]}, story
        assert len({(delivery.id, delivery.event["timestamp"]) for delivery, _ in tries}) == 1, f"two IDs: {story}"
        assert record["webhook"]["delivered"] and any(was_taken for _, was_taken in tries), f"not delivered: {story}"


def judge_generations(jobs: List[Dict[str, Any]], counted: Counted, killed: Set[int], told: Told) -> None:
    """Of one job, or of those that have the same name in the webui."""
    story = f"{jobs}, {counted}, killed: {killed}"
    statuses = Counter(job["status"] for job in jobs)
    assert len(counted.begun) <= len(jobs), f"generated more than once: {story}"
    assert len(counted.ended) >= statuses["Completed"], f"never generated: {story}"
    if all(job["error"] == LEFT_BEHIND for job in jobs):
        assert set(counted.begun) <= killed, f"its webui was not killed: {story}"
    if all(job["started"] is None and job["id"] in told.promised for job in jobs):
        assert not counted.begun, f"generated, though it never began: {story}"


def check_files(pair: Pair, told: Told) -> int:
    """Each job has all its files and no others, an hour later. Returns how many requests had been left till then."""
    script = load_script()
    script.ImageStore.ORPHAN_AGE = -1
    tracker = make_tracker(script, pair.data, TRACKER_RETENTION="off")
    try:
        until(lambda: tracker.housekeeper.next_purge, what="the housekeeper has looked for jobs left behind")
        jobs = {job.id: job for job in all_jobs(script, tracker)}
        records = pair.records()
        assert {job.id: job.status for job in jobs.values()} == {key: one["status"] for key, one in records.items()}
        left = requests_left(pair, jobs)
        tracker.housekeeper.purge()
        named = {name for job in jobs.values() for name in tracker.images.files_of(job)}
        for path in pair.data.glob("images/*/*"):
            assert "/".join(path.parts[-2:]) in named, f"nobody names {path.name}"
        for job in jobs.values():
            body = told.promised.get(job.id)
            if job.status == "Completed":
                assert not job.has_request, f"{job} keeps its request"
                assert job.images and not tracker.missing(job), f"{job} has not all its images"
                assert tracker.describe(job, whole=True)["parameters"]["prompt"] == job.prompt, f"{job} has others"
            elif body is not None:
                assert job.has_request, f"{job} was promised and has no request"
                kept = tracker.images.read_request(job)
                assert kept is not None and body in (kept, b""), f"{job} has the request {kept!r}"
        return len(left)
    finally:
        tracker.close().result(60)


def requests_left(pair: Pair, jobs: Dict[str, Any]) -> List[Path]:
    paths = pair.data.glob("images/*/*.request.json")
    return [path for path in paths if path.name[:8] in jobs and jobs[path.name[:8]].status == "Completed"]


def all_jobs(script: Any, tracker: Any) -> Iterator[Any]:
    cursor: Optional[str] = None
    while True:
        page = tracker.store.query(script.Filter(), 1000, cursor)
        yield from page.jobs
        cursor = page.cursor
        if cursor is None:
            return


class Result(NamedTuple):
    befell: Counter[str]
    answers: Counter[str]
    ends: Counter[str]
    others: Counter[str]


def session(make: Callable[[random.Random], Pair], rounds: int, progress: Callable[[int, int], None]) -> Result:
    """Some rounds with new webuis, and what is left of them in the end."""
    dice, told, stop = random.Random(), Told(), threading.Event()
    pair, keyed = make(dice), []
    clients = [pair.CLIENT(pair.webuis, told, keyed, stop) for _ in range(4)]
    try:
        pair.start()
        for client in clients:
            client.start()
        for number in range(rounds):
            time.sleep(dice.random())
            pair.strike()
            assert not told.wrong, "; ".join(told.wrong[:5])
            progress(number + 1, len(told.promised))
        stop.set()
        for client in clients:
            client.join(90)
            assert not client.is_alive(), "a request has no end"
        pair.settle()
        for webui in pair.webuis:
            if dice.random() < 0.5:
                webui.terminate()
    finally:
        stop.set()
        pair.end()
    judge(pair, told)
    left = pair.check_files(told)
    records = pair.records().values()
    completed = {record["id"] for record in records if record["status"] == "Completed"}
    late = completed & told.perhaps_cancelled
    taken = sum(was_taken for _, was_taken in pair.deliveries)
    others = {"waited at that": pair.waiting, "were cancelled too late": len(late), "requests left for an hour": left}
    others["ends that were told more than once"] = taken - len(records)
    ends = Counter(record["error"] or record["status"] for record in records)
    return Result(pair.befell, told.answers, ends, Counter(others))
