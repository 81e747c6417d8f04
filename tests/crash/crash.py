"""Kills processes at random moments, again and again, and checks that nothing was lost.

    python3 tests/crash/crash.py --rounds 500          about a quarter of an hour
    python3 tests/crash/crash.py trackers --rounds 50  one of the kinds alone

trackers    a process that uses the Tracker itself, under load from several threads; killed, started again on the same
            folder, which it checks first. Some are killed while they check.
webui       the stand-in webui, under load over HTTP; killed, started again, asked for every ID that a client has seen.
neighbours  three processes on one folder, each of them killed and started again while the others go on.
parked      two webuis on one folder, both with requests that need no client, that have a key, are retried, and are
            cancelled by whichever of the two; killed, suspended for some seconds, or reloaded.
fleet       the same with three webuis on a database and a bucket, which are killed, too, suspended, or cut off.
power       what the Tracker asked of the disk is recorded, and opened as it could be left when the power fails after
            each step: all that was not yet synced may be there or not, in any order, with no index, that of any earlier
            moment or the newest. A round is such a state.

Otherwise a round is one kill. Of N, the trackers have six tenths, the neighbours three, the webui, the parked ones and
the fleet one each. What is checked: every ID that was acknowledged resolves; Completed jobs have all their images, byte
for byte; jobs that were running are Failed and say so, once; what was promised waits on, with its whole request, and is
generated once; what was removed stays so; no file is left that nobody names; jobs.json is valid JSON, and what the
index finds is what stands in it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import random
import re
import select
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

try:
    import fastapi  # noqa: F401
    import httpx
except ImportError:
    import environment

    sys.exit(environment.call([environment.ensure("a1111", "test"), *sys.argv], cwd=Path.cwd(), env={}))

import lossy
import parked as two_webuis
import services
from inside import an_answer, files_are_whole, load_script, make_tracker, pixels, set_constants, until

import harness

FAST_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None
END_OF_CRASHED = "The webui ended before the generation did"


class Known:
    """What the processes have said of their jobs."""

    def __init__(self) -> None:
        self.accepted: Set[str] = set()
        self.promised: Set[str] = set()  # of these, what is to be generated after a restart, too
        self.begun: Set[str] = set()
        self.completed: Set[str] = set()
        self.going: Set[str] = set()  # being removed, perhaps
        self.removed: Set[str] = set()
        self.checks = 0

    def hear(self, line: str) -> None:
        word, _, job_id = line.partition(" ")
        if word == "error":
            raise AssertionError(job_id)
        if word == "begun" and job_id in self.begun:
            raise AssertionError(f"{job_id} is generated twice")
        if word == "checked":
            self.checks += 1
        else:
            getattr(self, word).add(job_id)

    @property
    def kept(self) -> Set[str]:
        return self.accepted - self.going


class Child:
    """A process with a Tracker, forked off. It says what is done, and only when it is done."""

    def __init__(self, script: Any, folder: Path, known: Known, options: argparse.Namespace):
        ours, theirs = os.pipe()
        self.known = known
        self.rest = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ours)
            with contextlib.suppress(BaseException):
                Work(script, folder, known, options, theirs).run()
            os._exit(1)
        os.close(theirs)
        self.pipe = ours

    def listen(self, seconds: float) -> bool:
        """Hears what it says for some time. False when it has ended."""
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.pipe], [], [], left)[0]:
                return True
            data = os.read(self.pipe, 1 << 16)
            if not data:
                return False
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                self.known.hear(line.decode())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        assert os.WIFSIGNALED(status), "a process ended by itself"
        while self.listen(60):
            pass
        os.close(self.pipe)


class CutShort:
    """Stands for the module `os` in the script. Once in many writes the process is killed in the middle of it."""

    def __init__(self, dice: random.Random):
        self.dice = dice

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, file: int, data: bytes, position: int) -> int:
        if self.dice.random() < 0.003:
            os.pwrite(file, data[: self.dice.randrange(len(data))], position)
            os.kill(os.getpid(), signal.SIGKILL)
        return os.pwrite(file, data, position)


class Work:
    """What a child does: it checks what is there, and then works until it is killed."""

    def __init__(self, script: Any, folder: Path, known: Known, options: argparse.Namespace, pipe: int):
        self.script = script
        self.folder = folder
        self.known = known
        self.options = options
        self.pipe = pipe
        self.shared = os.open(str(folder / "said"), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.dice = random.Random(os.urandom(8))
        script.os = CutShort(self.dice)
        script.JobStore.MIN_DEAD_ENTRIES = options.spare_dead
        script.JOURNAL_CHUNK = 4000
        script.Housekeeper.LOOK_EVERY = 0.02
        set_constants(script, RECOVER_EVERY=0.02 if options.together else 3600)

    def say(self, word: str, job_id: str = "") -> None:
        line = f"{word} {job_id}\n".encode()
        os.write(self.pipe, line)
        if self.options.together and word in ("accepted", "going"):
            os.write(self.shared, line)

    def run(self) -> None:
        try:
            data = self.folder / "data"
            self.tracker = make_tracker(self.script, data, TRACKER_RETENTION="1")
            put = self.tracker.store.put

            def heard(job: Any, new: bool = False, meanwhile: Any = None) -> Any:
                written = put(job, new, meanwhile)
                if job.status == self.script.COMPLETED:
                    written.add_done_callback(lambda done: done.exception() or self.say("completed", job.id))
                return written

            self.tracker.store.put = heard
            if not self.options.together:
                self.check()
                if self.options.last:
                    self.tracker.close().result(60)
                self.say("checked")
            if self.options.last:
                time.sleep(3600)
            loops = [self.generate] * 4 + [self.park, self.run_parked, self.retry, self.remove, self.purge]
            loops += [self.look] * self.options.together
            for loop in loops:
                threading.Thread(target=self.guard, args=(loop,)).start()
        except BaseException as error:
            self.say("error", f"{type(error).__name__}: {error}".replace("\n", " "))
        time.sleep(3600)

    def guard(self, loop: Callable[[], None]) -> None:
        try:
            while True:
                loop()
        except BaseException as error:
            self.say("error", f"{loop.__name__}: {type(error).__name__}: {error}".replace("\n", " ")[:1000])

    # The load

    def generate(self) -> None:
        script, tracker, dice = self.script, self.tracker, self.dice
        old = dice.random() < 0.1
        timestamp = int(time.time()) - old * 2 * 86400
        prompt = "a cat " * (20_000 if dice.random() < 0.05 else 1)  # a kill may cut a long line
        job = script.Job(tracker.store.reserve_id(), dice.choice(script.TYPES), script.PENDING, timestamp, None, prompt)
        if old:
            self.say("going", job.id)  # a purge removes it as soon as it has ended
        if dice.random() < 0.5:
            job = job._replace(has_request=True, bytes=len(request_of(job)))
        tracker.accept(job, lambda: True, request_of(job)).result()
        self.say("accepted", job.id)
        if job.has_request and not old and dice.random() < 0.3:  # its client waits no longer
            tracker.promise(job.id)
            self.say("promised", job.id)
        time.sleep(dice.random() * 0.02)
        tracker.start(job.id)
        self.say("begun", job.id)
        self.end(job)

    def end(self, job: Any) -> None:
        script, tracker, dice = self.script, self.tracker, self.dice
        time.sleep(dice.random() * 0.02)
        if dice.random() < 0.1:
            tracker.fail(job.id, "as it happens")
        else:
            tracker.finish(job.id, an_answer(script, job.id, dice.randrange(4)))
            for _ in range(20):  # whoever looks, as those do who wait for it
                seen = tracker.get(job.id)
                if seen is not None and seen.status == script.COMPLETED:
                    self.say("completed", job.id)
                    break

    def park(self) -> None:
        script, tracker, dice = self.script, self.tracker, self.dice
        time.sleep(dice.random() * 0.04)
        job = script.Job(
            *(tracker.store.reserve_id(), dice.choice(script.TYPES), script.PENDING, int(time.time()), None, "a dog"),
            has_request=True,
            promised=True,
            parked=True,
        )
        tracker.park(job._replace(bytes=len(request_of(job))), request_of(job)).result()
        self.say("accepted", job.id)
        self.say("promised", job.id)

    def run_parked(self) -> None:
        """Any process generates what any has parked."""
        found = self.tracker.next_parked()
        if found is None:
            time.sleep(0.01)
            return
        job, body = found
        assert body == request_of(job), f"{job} has another request"
        if self.tracker.start_parked(job.id, lambda: True):
            self.say("begun", job.id)
            self.end(job)

    def retry(self) -> None:
        time.sleep(self.dice.random() * 0.1)
        page = self.tracker.store.query(self.script.Filter(status=self.script.FAILED), 20)
        jobs = [job for job in page.jobs if job.retry_of is None and job.id not in self.known.going]
        if jobs:
            # Another thread may remove it, or it has no request.
            with contextlib.suppress(self.script.Gone):
                again = self.tracker.retry(self.dice.choice(jobs).id)
                if again is not None:
                    self.say("accepted", again.id)
                    self.say("promised", again.id)

    def remove(self) -> None:
        time.sleep(self.dice.random() * 0.05)
        page = self.tracker.store.query(self.script.Filter(status=self.dice.choice(self.script.ENDED)), 20)
        if page.jobs:
            job_id = self.dice.choice(page.jobs).id
            self.say("going", job_id)
            self.tracker.delete(job_id)
            self.say("removed", job_id)

    def purge(self) -> None:
        time.sleep(0.1)
        self.tracker.housekeeper.purge()

    def look(self) -> None:
        """What one process has acknowledged, the others see."""
        time.sleep(0.01)
        accepted, going = self.said()
        for job_id in self.dice.sample(sorted(accepted), min(20, len(accepted))):
            if job_id not in going and self.tracker.get(job_id) is None:
                assert job_id in self.said()[1], f"{job_id} of another process is not seen"

    def said(self) -> Any:
        words: Dict[str, Set[str]] = {"accepted": set(), "going": set()}
        text = (self.folder / "said").read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            word, _, job_id = line.partition(" ")
            words[word].add(job_id)
        return words["accepted"], words["going"]

    # The check, before anything else

    def check(self) -> None:
        script, tracker, known = self.script, self.tracker, self.known
        until(lambda: tracker.housekeeper.next_purge, what="the housekeeper has looked for jobs left behind")
        age, script.ImageStore.ORPHAN_AGE = script.ImageStore.ORPHAN_AGE, -1
        tracker.housekeeper.purge()
        script.ImageStore.ORPHAN_AGE = age
        jobs = {job.id: job for job in self.all_jobs()}
        for job_id in known.kept:
            assert job_id in jobs, f"{job_id} was acknowledged and is gone"
            assert tracker.get(job_id) == jobs[job_id], f"{job_id} is {tracker.get(job_id)}, was {jobs[job_id]}"
        assert not known.removed & set(jobs), "what was removed is back"
        for job in jobs.values():
            assert job.ended or job.parked, f"{job.id} is {job.status}, but nobody runs it"
            assert not (job.parked and job.id in known.begun), f"{job.id} had begun, and waits again"
            if job.id in known.completed:
                assert job.status == script.COMPLETED, f"{job.id} was Completed and is {job.status}: {job.error}"
            if job.status == script.COMPLETED:
                assert files_are_whole(tracker, job), f"{job.id} has not all its images"
            elif job.ended:
                assert job.error in ("as it happens", END_OF_CRASHED), f"{job.id} has failed for {job.error}"
            if job.id in known.promised:
                self.check_promised(job)
        self.check_index(jobs)
        self.check_files(jobs)

    def check_promised(self, job: Any) -> None:
        """It waits, or had begun. Until it is Completed, its request is there."""
        assert job.promised, f"{job.id} was promised, and does not know"
        if job.status != self.script.COMPLETED:
            assert job.has_request, f"{job.id} was promised and has no request"
            assert self.tracker.images.read_request(job) == request_of(job), f"{job.id} has not its whole request"
        if job.error == END_OF_CRASHED:
            assert job.started, f"{job.id} was promised, had not begun, and has failed"

    def check_index(self, jobs: Dict[str, Any]) -> None:
        """Lists, figures and single jobs are those of jobs.json, as everybody reads it."""
        script, store = self.script, self.tracker.store
        assert store.idle(), "there is no end to it"
        records = json.loads((self.folder / "data" / "jobs.json").read_text())
        stored = {key: script.job_from_record(record) for key, record in records.items() if record is not None}
        assert jobs == stored, f"shown otherwise than stored: {set(jobs.items()) ^ set(stored.items())}"
        for status in script.STATUSES:
            found = {job.id for job in self.all_jobs(status=status)}
            expected = {job.id for job in stored.values() if job.status == status}
            assert found == expected, f"{found ^ expected} are {status}, or are not"
            assert store.stats()[0][status] == len(expected), f"{store.stats()[0]} is not what there is"
        for text in ("a cat", "a dog"):
            found = {job.id for job in self.all_jobs(q=text)}
            assert found == {job.id for job in stored.values() if text in job.prompt}, "the text is not that of the job"
        for key in {job.key for job in stored.values() if job.key}:
            holder = store.with_key(key)
            assert holder == stored.get(holder and holder.id), f"{holder} holds {key}"
        for job_id in [key for key, record in records.items() if record is None]:
            assert store.get(job_id) is None, f"{job_id} was removed and is found"

    def all_jobs(self, **filters: Any) -> Iterator[Any]:
        cursor: Optional[str] = None
        while True:
            page = self.tracker.store.query(self.script.Filter(**filters), 1000, cursor)
            yield from page.jobs
            cursor = page.cursor
            if cursor is None:
                return

    def check_files(self, jobs: Dict[str, Any]) -> None:
        """Nothing is left that nobody names."""
        tracker = self.tracker
        named = {name for job in jobs.values() for name in tracker.images.files_of(job)}
        doubtful = tracker.store.quarantined_ids()
        for path in tracker_files(tracker, "images/*/*"):
            name = "/".join(path.parts[-2:])
            assert name in named or doubtful is None or path.name[:8] in doubtful, f"nobody names {name}"
        for path in tracker_files(tracker, "*"):
            left = "jobs.json.owner-" in path.name or ("jobs.json." in path.name and path.name.endswith(".part"))
            assert not left or tracker.store.owner in path.name, f"{path.name} is left"


def request_of(job: Any) -> bytes:
    """The body of its request: always the same."""
    return pixels(job.retry_of or job.id, 9)


def tracker_files(tracker: Any, pattern: str) -> List[Path]:
    return list(Path(tracker.settings.data_folder).glob(pattern))


# The loops


def final_check(script: Any, folder: Path, known: Known, options: argparse.Namespace) -> None:
    before = known.checks
    options = argparse.Namespace(**{**vars(options), "together": False, "last": True})
    child = Child(script, folder, known, options)
    while known.checks == before:
        if not child.listen(0.1):
            child.kill()
            child = Child(script, folder, known, options)
    child.kill()


def history(path: Path) -> Dict[str, List[str]]:
    """Each job's line after line, from a jobs.json that was not compacted."""
    lines: Dict[str, List[str]] = {}

    def collect(pairs: Any) -> Any:
        for key, value in pairs:
            if value is None or (isinstance(value, dict) and "status" in value):
                lines.setdefault(key, []).append("gone" if value is None else value["status"])
        return dict(pairs)

    json.loads(path.read_text(), object_pairs_hook=collect)
    lines.pop("finished", None)  # and the like, of records
    return lines


def check_history(path: Path) -> None:
    """Every job went its way once: no neighbour has ended it, and nobody has ended it twice."""
    for job_id, steps in history(path).items():
        way = " ".join(steps)
        assert re.fullmatch("(Pending ?)*(Processing ?)?((Completed|Failed) ?)?(gone ?)*", way), f"{job_id} went {way}"


def trackers(rounds: int, progress: Callable[[str], None]) -> str:
    """One process at a time."""
    script, dice = load_script(), random.Random()
    jobs = checks = torn = damaged = 0
    options = argparse.Namespace(together=False, last=False, spare_dead=30)
    done = 0
    while done < rounds:
        with tempfile.TemporaryDirectory(prefix="crash-") as name:
            folder, known = Path(name), Known()
            for _ in range(min(25, rounds - done)):
                child, wanted = Child(script, folder, known, options), known.checks + 1
                early = dice.random() < 0.15
                try:
                    while not early and known.checks < wanted and child.listen(0.05):
                        pass
                    child.listen(dice.random() * (0.05 if early else 0.3))
                finally:
                    child.kill()
                done += 1
                with contextlib.suppress(FileNotFoundError):
                    torn += not is_json(folder / "data" / "jobs.json")
                progress(f"{done} of {rounds} kills, {jobs + len(known.accepted)} jobs")
            final_check(script, folder, known, options)
            jobs += len(known.accepted)
            checks += known.checks
            damaged += len(list(folder.glob("data/jobs.json.damaged-*")))
    return f"{done} kills of a tracker, {jobs} jobs, {checks} checks, {torn} lines cut by a kill, {damaged} set aside"


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def neighbours(rounds: int, progress: Callable[[str], None], processes: int = 3) -> str:
    """Several processes on one folder. Every second time without compaction, so that each line can be seen."""
    script, dice = load_script(), random.Random()
    done = jobs = 0
    turn = 0
    while done < rounds:
        turn += 1
        options = argparse.Namespace(together=True, last=False, spare_dead=30 if turn % 2 else 1 << 60)
        with tempfile.TemporaryDirectory(prefix="crash-") as name:
            folder, known = Path(name), Known()
            children = [Child(script, folder, known, options) for _ in range(processes)]
            try:
                for _ in range(min(20, rounds - done)):
                    end, place = time.monotonic() + dice.random() * 0.6, dice.randrange(processes)
                    while time.monotonic() < end:
                        for number, child in enumerate(children):
                            if not child.listen(0.01):
                                end, place = 0, number
                    children[place].kill()
                    children[place] = Child(script, folder, known, options)
                    done += 1
                    progress(f"{done} of {rounds} kills, {jobs + len(known.accepted)} jobs")
            finally:
                for child in children:
                    child.kill()
            final_check(script, folder, known, options)
            if not turn % 2:
                check_history(folder / "data" / "jobs.json")
            jobs += len(known.accepted)
    return f"{done} kills among {processes} processes on one folder, {jobs} jobs"


def power(rounds: int, progress: Callable[[str], None], dice: Optional[random.Random] = None) -> str:
    """Records a tracker's work, cuts the power in thought after each step of it, and opens what could be left."""
    dice = dice or random.Random()
    script, checker = load_script(), load_script()
    seen: Set[int] = set()
    steps = kept = 0
    for module in (script, checker):
        module.JobStore.MIN_DEAD_ENTRIES = 8
        module.JOURNAL_CHUNK = 4000
        module.Housekeeper.LOOK_EVERY = 0.005
    while len(seen) < rounds:
        with tempfile.TemporaryDirectory(prefix="crash-", dir=FAST_FOLDER) as name:
            trace = record(script, Path(name) / "data", dice)
            steps += len(trace)
            cuts = list(range(1, len(trace) + 1))
            if (len(seen) + 20 * len(cuts)) > rounds:
                dice.shuffle(cuts)
            for end in cuts:
                for lost, torn in lossy.choices(trace, end, dice, 16):
                    left = lossy.after_power_cut(trace, end, lost, torn, dice)
                    said = [op.what for op in trace[:end] if op.kind == "said"]
                    for index in lossy.index_choices(trace, end, dice):
                        if index is not None and dice.random() < 0.4:
                            continue
                        state = hash((frozenset(left.files.items()), frozenset(left.folders), frozenset(said), index))
                        if state in seen:
                            continue
                        seen.add(state)
                        folder = Path(name) / str(len(seen)) / "data"
                        folder.parent.mkdir()
                        lossy.put_down(left, index, Path(name) / "data", folder, dice)
                        try:
                            kept += check_state(checker, folder, said)
                        except AssertionError as error:
                            story = [f"{number} {trace[number]}"[:150] for number in [*sorted(lost), end - 1]]
                            what = f"index: {index and (index.file, index.state)}; lost, and last:"
                            raise AssertionError("\n".join([f"{error}; {what}", *story])) from None
                        shutil.rmtree(str(folder.parent))
                        if len(seen) % 20 == 0:
                            progress(f"{len(seen)} of {rounds} states after a power cut")
                if len(seen) >= rounds:
                    break
    return f"{len(seen)} states after a power cut, during {steps} steps, {kept} with an index that was read on from"


def record(script: Any, folder: Path, dice: random.Random) -> List[lossy.Op]:
    """What a tracker does to files while jobs come, end and go."""
    script.os = recorder = lossy.Recorder()
    script.sqlite3 = lossy.RecordedSqlite(recorder, dice.choice([4, 40, 400]))
    folder.mkdir()
    for _ in range(dice.choice([1, 2])):
        record_session(script, folder, dice, recorder)
    return recorder.trace


def record_session(script: Any, folder: Path, dice: random.Random, recorder: lossy.Recorder) -> None:
    """From a start of the tracker to its end."""
    tracker = make_tracker(script, folder, TRACKER_RETENTION="1")
    put = tracker.store.put

    def heard(job: Any, new: bool = False, meanwhile: Any = None) -> Any:
        written = put(job, new, meanwhile)
        if job.status == script.COMPLETED:
            written.add_done_callback(lambda done: recorder.said("completed", job.id))
        return written

    tracker.store.put = heard

    def generate(old: bool) -> str:
        timestamp = int(time.time()) - old * 2 * 86400
        prompt = "a cat" * dice.choice([1, 1, 300])
        job = script.Job(tracker.store.reserve_id(), "txt2img", script.PENDING, timestamp, None, prompt)
        job = job._replace(has_request=dice.random() < 0.7)
        if old:
            recorder.said("going", job.id)
        tracker.accept(job, lambda: True, request_of(job)).result()
        recorder.said("accepted", job.id)
        if job.has_request and dice.random() < 0.5:
            tracker.promise(job.id)
            recorder.said("promised", job.id)
        tracker.start(job.id)
        recorder.said("begun", job.id)
        return end(job)

    def park() -> None:
        job = script.Job(tracker.store.reserve_id(), "img2img", script.PENDING, int(time.time()), None, "a dog")
        job = job._replace(has_request=True, promised=True, parked=True)
        tracker.park(job, request_of(job)).result()
        recorder.said("accepted", job.id)
        recorder.said("promised", job.id)
        if dice.random() < 0.7:
            assert tracker.start_parked(job.id, lambda: True)
            recorder.said("begun", job.id)
            end(job)
            if tracker.get(job.id).status == script.FAILED:
                again = tracker.retry(job.id)
                recorder.said("accepted", again.id)
                recorder.said("promised", again.id)

    def end(job: Any) -> str:
        if dice.random() < 0.2:
            tracker.fail(job.id, "as it happens")
        else:
            tracker.finish(job.id, an_answer(script, job.id, dice.randrange(3)))
        while not tracker.get(job.id).ended:
            time.sleep(0.0001)
        if tracker.get(job.id).status == script.COMPLETED:
            recorder.said("completed", job.id)
        return job.id

    def many() -> None:
        for number in range(5):
            if dice.random() < 0.5:
                park()
            job_id = generate(number == 2)
            if number == 3:
                recorder.said("going", job_id)
                tracker.delete(job_id)
                recorder.said("removed", job_id)

    threads = [threading.Thread(target=many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracker.housekeeper.purge()
    tracker.close().result(60)


def check_state(script: Any, folder: Path, said: List[Any]) -> bool:
    """Returns whether the index was good, and was not made anew."""
    known = Known()
    for word, job_id in said:
        known.hear(f"{word} {job_id}")
    work = Work.__new__(Work)
    work.script, work.known, work.folder = script, known, folder.parent
    epoch = epoch_of(folder)
    work.tracker = make_tracker(script, folder, TRACKER_RETENTION="off")
    try:
        work.check()
        return epoch is not None and epoch == epoch_of(folder)
    finally:
        work.tracker.close().result(60)


def epoch_of(folder: Path) -> Optional[int]:
    """What an index has for as long as it is not made anew; None if there is none."""
    path = folder / "jobs.json.index3"
    if not path.exists():
        return None
    with contextlib.closing(sqlite3.connect(str(path))) as connection:
        try:
            return connection.execute("SELECT epoch FROM state").fetchone()[0]
        except sqlite3.OperationalError:
            return None


class Clients:
    """What those who use a webui send and see. The same seed gives the same pictures."""

    SEEDS = range(12)

    def __init__(self, served: Any):
        self.served = served
        self.pictures = {seed: served.post(self.request(seed)).json()["images"] for seed in self.SEEDS}
        self.seen: Dict[str, int] = {}  # ID -> seed
        self.whole = 0  # answers that came to their end
        self.wrong: List[str] = []
        self.stop = threading.Event()

    @staticmethod
    def request(seed: int) -> Dict[str, Any]:
        return harness.body(f"cat {seed}", {"seconds": 0.02}, seed=seed, batch_size=1 + seed % 3)

    def run(self) -> None:
        with harness.new_client(self.served.url) as http:
            while not self.stop.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    self.generate(http, random.choice(self.SEEDS))

    def generate(self, http: httpx.Client, seed: int) -> None:
        with http.stream("POST", "/sdapi/v1/txt2img", json=self.request(seed)) as response:
            job_id = response.headers["X-Job-ID"]
            self.seen[job_id] = seed
            if random.random() < 0.3:
                return
            response.read()
        self.whole += 1
        if response.json()["images"] != self.pictures[seed]:
            self.wrong.append(f"{job_id} came out wrong")

    def until_killed(self, seconds: float) -> None:
        self.stop.clear()
        threads = [threading.Thread(target=self.run) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self.served.kill()
        self.stop.set()
        for thread in threads:
            thread.join()

    def check(self) -> None:
        """Of a webui that was started again."""
        assert not self.wrong, self.wrong
        records = self.served.records()
        for job_id in self.seen:
            assert job_id in records, f"{job_id} was in a header and is gone"
        for job_id in random.sample(sorted(self.seen), min(60, len(self.seen))):
            job = self.served.job(job_id)
            if job["status"] == "Completed":
                assert job["images"] == self.pictures[self.seen[job_id]], f"{job_id} has other images"
            else:
                assert (job["status"], job["error"]) == ("Failed", END_OF_CRASHED), f"{job_id} is {job}"
        until(lambda: all(path.name[:8] in records for path in self.served.images()), what="nobody names a file")


def webui(rounds: int, progress: Callable[[str], None]) -> str:
    """The stand-in webui, and what its clients saw."""
    with tempfile.TemporaryDirectory(prefix="crash-") as name:
        served = harness.Webui(Path(name), "--nowebui", tracking="variable")
        try:
            clients = Clients(served.start())
            for done in range(1, rounds + 1):
                clients.until_killed(0.1 + random.random())
                for path in served.images():
                    os.utime(str(path), (1, 1))  # as old as need be for a purge
                served.start()
                clients.check()
                progress(f"{done} of {rounds} kills, {len(clients.seen)} jobs")
        finally:
            served.kill()
    return f"{rounds} kills of a webui, {len(clients.seen)} IDs seen, {clients.whole} answers read to their end"


def parked(rounds: int, progress: Callable[[str], None]) -> str:
    """Two webuis on one folder, and the jobs that wait there for either."""
    return in_sessions(rounds, progress, "two webuis", two_webuis.Pair)


def fleet(rounds: int, progress: Callable[[str], None]) -> str:
    """Three webuis on a database and a bucket, all of which are killed."""
    import fleet as three_webuis

    reason = services.why_missing()
    if reason:
        return f"nothing, since {reason}"
    with services.postgresql(durable=True) as database, services.seaweedfs() as bucket:
        make = functools.partial(three_webuis.Fleet, database, bucket)
        return in_sessions(rounds, progress, "three webuis", make)


def in_sessions(rounds: int, progress: Callable[[str], None], what: str, make: Callable[..., Any]) -> str:
    """Rounds of a kind, 25 on each new folder. The folder of what failed is kept."""
    done, befell, ends, others, answers = 0, Counter(), Counter(), Counter(), Counter()

    def report(count: int, promised: int) -> None:
        progress(f"{done + count} of {rounds} rounds, {sum(ends.values()) + promised} jobs")

    while done < rounds:
        folder = Path(tempfile.mkdtemp(prefix="crash-"))
        try:
            result = two_webuis.session(functools.partial(make, folder), min(25, rounds - done), report)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{folder}") from None
        shutil.rmtree(str(folder))
        done += min(25, rounds - done)
        befell += result.befell
        ends += result.ends
        others += result.others
        answers += result.answers
    what = f"{in_words(befell)} of {what}, {sum(ends.values())} jobs: {in_words(ends)}; {in_words(others)}"
    return f"{what}; answers: {in_words(answers)}"


def in_words(counted: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counted.most_common())


# The command

LOOPS: Dict[str, Callable[..., str]] = {
    "trackers": trackers,
    "webui": webui,
    "neighbours": neighbours,
    "parked": parked,
    "fleet": fleet,
    "power": power,
}
SHARES = {"trackers": 0.6, "webui": 0.1, "neighbours": 0.3, "parked": 0.1, "fleet": 0.1, "power": 10}


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="which of them (default: all)", metavar="kind")
    parser.add_argument("--rounds", type=int, default=500, help="how many kills in all (default: 500)")
    options = parser.parse_args(arguments)
    kinds = options.kinds or list(LOOPS)
    if set(kinds) - set(LOOPS):
        parser.error("the kinds are " + ", ".join(LOOPS))
    live = sys.stdout.isatty()
    logging.getLogger("job_tracker").setLevel(logging.CRITICAL)
    for kind in kinds:
        began = time.monotonic()
        rounds = options.rounds if len(kinds) == 1 else max(1, round(options.rounds * SHARES[kind]))

        def progress(text: str, kind: str = kind, began: float = began) -> None:
            if live:
                print(f"\r{kind:11}{text}, {time.monotonic() - began:.0f} s   ", end="", flush=True)

        try:
            result = LOOPS[kind](rounds, progress)
        except AssertionError as error:
            print(f"\n{kind:11}FAILED: {error}")
            return 1
        print("\r" * live + f"{kind:11}{result}, {time.monotonic() - began:.0f} s: nothing lost", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
