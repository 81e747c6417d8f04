"""Three webuis on one database and one bucket, with the load of parked.py: all of them are killed at random moments.

Besides, webuis are suspended for longer than it takes to be thought dead, connections reset, and a webui cut off from
the database. `Pair` says what is counted, and `judge` what must hold of it when nothing waits any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from inside import load_script, make_tracker, until
from parked import Client, Pair, Told, all_jobs
from services import DYING_SOON, Bucket, Database, Network, PostgreSQL, SeaweedFS

import harness

AWAY = 4.0  # seconds for which a service, a webui or a connection is away at most: longer than DEAD_AFTER


class FleetClient(Client):
    LATE_ENDS = {409}  # of a webui that was thought dead, and was not


class Fleet(Pair):
    """The webuis, what they share, and what becomes of all that."""

    CLIENT = FleetClient

    def __init__(self, postgresql: PostgreSQL, seaweedfs: SeaweedFS, folder: Path, dice: random.Random):
        self.database, self.bucket = Database(postgresql), Bucket(seaweedfs)
        self.network = Network(postgresql.port)  # of the last webui alone
        super().__init__(folder, dice)

    def make_webuis(self) -> List[harness.Webui]:
        webuis = []
        for number in range(3):
            url = self.network.through(self.database.url) if number == 2 else self.database.url
            environ = {"TRACKER_STORE": url, "TRACKER_SERVER": f"webui-{number}"}
            environ.update(self.bucket.environ, TRACKER_IMAGES=self.bucket.url)
            mode = harness.MODES[-1 if number else 0]
            webuis.append(self.make_webui(mode, environ, {**DYING_SOON, "DELAY": 0.2}))
        return webuis

    def strike(self) -> None:
        """One kill, or another misfortune, of one of them or of what they share."""
        for webui in self.webuis:
            assert webui.process.poll() is None, "a webui ended by itself:\n" + webui.log[-3000:]
        some = random.sample(self.webuis, self.dice.choice([1, 1, 1, 2, 3]))
        strikes: Dict[Callable[[List[harness.Webui]], None], int] = {
            self.kill: 6,
            self.suspend: 2,
            self.reload: 1,
            self.kill_database: 3,
            self.kill_bucket: 2,
            self.reset: 2,
            self.cut_off: 1,
        }
        what = self.dice.choices(list(strikes), list(strikes.values()))[0]
        self.befell[what.__name__.replace("_", " ")] += 1
        self.waiting += sum(record["status"] == "Pending" for record in self.records().values())
        what(some)

    def suspend(self, some: List[harness.Webui]) -> None:
        for webui in some:
            os.kill(webui.pid, signal.SIGSTOP)
        time.sleep(self.dice.random() * AWAY)
        for webui in some:
            os.kill(webui.pid, signal.SIGCONT)

    def kill_database(self, some: List[harness.Webui]) -> None:
        self.database.kill()
        self._while_away(some)
        self.database.start()

    def kill_bucket(self, some: List[harness.Webui]) -> None:
        self.bucket.kill()
        self._while_away(some)
        self.bucket.start()

    def _while_away(self, some: List[harness.Webui]) -> None:
        time.sleep(self.dice.random() * AWAY)
        if self.dice.random() < 0.2:
            self.befell["at a kill"] += 1
            self.kill(some)

    def reset(self, _: List[harness.Webui]) -> None:
        self.database.reset()
        self.network.reset()

    def cut_off(self, _: List[harness.Webui]) -> None:
        with self.network.cut():
            time.sleep(self.dice.random() * 2 * AWAY)

    def end(self) -> None:
        super().end()
        self.network.close()

    def records(self) -> Dict[str, Dict[str, Any]]:
        records = [json.loads(record) for (record,) in self.database.execute("select record from job_tracker_jobs")]
        return {record["id"]: record for record in records}

    # What must hold in the end

    def judge_webhooks(self, records: Dict[str, Dict[str, Any]]) -> None:
        """The end of each was told, and each telling by an ID of its own.

        Of a webui that was thought dead and was not, others have told an end that its own has replaced.
        """
        told: Dict[str, Dict[str, Any]] = {}  # ID of the job -> ID of the webhook -> what it said
        for delivery, was_taken in self.deliveries:
            event = delivery.event
            said = (event["type"], event["timestamp"], event["data"]["status"])
            first = told.setdefault(event["data"]["id"], {}).setdefault(delivery.id, [said, False])
            assert first[0] == said, f"two ends by one ID: {first}, {said}"
            first[1] = first[1] or was_taken
        to_tell = {job_id for job_id, record in records.items() if record["webhook"] is not None}
        assert to_tell <= set(told), f"not told: {to_tell - set(told)}"
        for job_id in to_tell:
            record = records[job_id]
            story = f"{record}, {told[job_id]}"
            assert record["webhook"]["delivered"], f"not delivered: {story}"
            assert any(said[2] == record["status"] and taken for said, taken in told[job_id].values()), story
            assert len(told[job_id]) <= 2, f"told again and again: {story}"

    def check_files(self, told: Told) -> int:
        """Each Completed job has all its files in the bucket, and each promised one that failed its request."""
        script = load_script()
        environ = {"TRACKER_STORE": self.database.url, "TRACKER_IMAGES": self.bucket.url, "TRACKER_RETENTION": "off"}
        place = self.folder / "judge"
        place.mkdir()
        with contextlib.ExitStack() as stack:
            for name, value in self.bucket.environ.items():
                os.environ[name] = value
                stack.callback(os.environ.pop, name)
            tracker = make_tracker(script, place, **environ)
            stack.callback(lambda: tracker.close().result(60))
            until(lambda: tracker.housekeeper.next_purge, what="the housekeeper has looked for jobs left behind")
            for job in all_jobs(script, tracker):
                body = told.promised.get(job.id)
                if job.status == "Completed":
                    assert job.images and not tracker.missing(job), f"{job} has not all its images"
                    assert tracker.describe(job, whole=True)["parameters"]["prompt"] == job.prompt, f"{job}: others"
                elif body is not None:
                    kept = tracker.images.read_request(job)
                    assert kept is not None and body in (kept, b""), f"{job} has the request {kept!r}"
        names = {name[:8] for name in (path.rpartition("/")[2] for path in self.bucket.names())}
        return len(names - set(self.records()))
