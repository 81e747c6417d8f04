"""The ends of jobs told to receivers of every kind, by a tracker without a webui."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import time
import types
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from inside import WrappedOs, a_job, generate, load_script, set_constants, until, within
from receivers import WithoutEnd, hanging, late, make_certificate, redirect_to, server_tls

FREE = (True, False)  # the rules of a webui that forbids nothing
GLOBAL_ONLY = (True, True)
SECRET = "whsec_" + "c2VjcmV0" * 5


class Teller:
    """A tracker with webhooks."""

    def __init__(self, script: Any, tracker: Any, rules: Tuple[bool, bool]):
        self.script = script
        self.tracker = tracker
        self.rules = rules
        self.webhooks = script.Webhooks(tracker, lambda: self.rules)
        until(lambda: tracker.on_ended.__name__ != "<lambda>")

    def end(self, dice: Any, url: str, **more: Any) -> str:
        """Has a job end that is told to a URL, and gives its ID."""
        job = a_job(self.script, dice, webhook=self.script.Webhook(url, **more))
        generate(self.script, self.tracker, job)
        return job.id

    def webhook(self, job_id: str) -> Any:
        return self.tracker.get(job_id).webhook

    def until_tried(self, job_id: str, times: int = 1) -> Any:
        until(lambda: self.webhook(job_id).attempts >= times, what=f"{times} tries")
        return self.webhook(job_id)


@pytest.fixture
def teller(script, new_tracker) -> Iterator[Callable[..., Teller]]:
    set_constants(script, CLOSE_EVERY=0.05, CLOSE_SECONDS=0.2, FIND_EVERY=0.5, FIND_AGAIN=0.1)

    made: List[Teller] = []

    def make(rules: Tuple[bool, bool] = FREE, program: Any = script, **environ: str) -> Teller:
        made.append(Teller(program, new_tracker(**environ), rules))
        return made[-1]

    yield make
    for one in made:
        one.tracker.closing.set()
        for helper in one.tracker.helpers:  # so that none of them logs when the test has ended
            helper.join(60)


# What is sent


def test_the_official_package_verifies_it(script, dice, teller, open_receiver):
    standard = pytest.importorskip("standardwebhooks.webhooks")
    receiver, ours = open_receiver(), teller(TRACKER_WEBHOOK_SECRET=SECRET)
    began = time.time()
    job_id = ours.end(dice, receiver.url + "?token=1")
    (got,) = receiver.wait()
    event = standard.Webhook(SECRET).verify(got.body, got.headers)
    assert got.path == "/hook?token=1" and got.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert got.headers["content-type"] == "application/json"
    assert list(event) == ["type", "timestamp", "data"] and event["type"] == "job.completed"
    since = script.datetime.fromisoformat(event["timestamp"].replace("Z", "+00:00")).timestamp()
    assert began - 1 < since < time.time() + 1 and event["timestamp"].endswith("Z")
    ours.until_tried(job_id)
    told = ours.tracker.describe(ours.tracker.get(job_id))
    assert event["data"] == {**told, "webhook": {"url": receiver.url + "?token=1", "delivered": False, "attempts": 0}}
    assert told["webhook"]["delivered"] is True and told["webhook"]["attempts"] == 1
    for name, value in (("webhook-id", "msg_other"), ("webhook-timestamp", str(int(time.time()) + 1))):
        with pytest.raises(standard.WebhookVerificationError):
            standard.Webhook(SECRET).verify(got.body, {**got.headers, name: value})


def test_without_a_secret_there_is_no_signature(dice, teller, open_receiver):
    receiver = open_receiver()
    teller().end(dice, receiver.url)
    (got,) = receiver.wait()
    assert "webhook-signature" not in got.headers


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_url_is_called_as_it_is_written(dice, teller, open_receiver, host):
    receiver = open_receiver(host=host)
    teller().end(dice, receiver.url + "/a;v=1//%2e%2e/b;id=7?x=1;2")
    (got,) = receiver.wait()
    assert got.path == "/hook/a;v=1//%2e%2e/b;id=7?x=1;2"
    assert got.headers["host"] == receiver.name


def test_it_leaves_within_moments(dice, teller, open_receiver):
    receiver, ours = open_receiver(), teller()
    on_disk: Dict[str, float] = {}
    tell = ours.tracker.on_ended

    def note(job: Any) -> None:
        on_disk[job.id] = time.time()
        tell(job)

    ours.tracker.on_ended = note
    delays = []
    for number in range(10):
        job_id = ours.end(dice, receiver.url)
        delays.append(receiver.wait(number + 1)[-1].at - on_disk[job_id])
    assert min(delays) < 0.1, delays  # what else the machine does may delay any of them


# When


def test_the_schedule(script, dice):
    minute, hour = 60, 3600
    delays = (5, minute, 5 * minute, 30 * minute, 2 * hour, 5 * hour, 10 * hour, 10 * hour)
    job = a_job(script, dice, webhook=script.Webhook("http://example.org/", since=1.0, due=7.0))
    for attempts, delay in enumerate(delays, 1):
        job = script.Attempt(job.id, None, job.webhook).outcome(job, 50.0)
        assert job.webhook.attempts == attempts
        assert 50 + delay <= job.webhook.due <= 50 + 1.2 * delay
    job = script.Attempt(job.id, None, job.webhook).outcome(job, 50.0)
    assert job.webhook == script.Webhook("http://example.org/", False, 9, 1.0, None)


@pytest.mark.parametrize("status, is_last", [(410, True), (404, False), (301, False), (500, False), (None, False)])
def test_what_ends_it(script, dice, status, is_last):
    job = a_job(script, dice, webhook=script.Webhook("http://example.org/", since=1.0, due=7.0))
    attempt = script.Attempt(job.id, None, job.webhook)
    attempt.status = status
    assert (attempt.outcome(job, 8.0).webhook.due is None) == is_last
    assert not attempt.outcome(job, 8.0).webhook.delivered


def test_what_is_due_is_found_when_the_clock_was_set_back(script, dice, teller, open_receiver):
    class SetBack:
        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

        def time(self) -> float:
            return time.time() - 3600

    receiver, ours = open_receiver(), teller()
    ours.until_tried(ours.end(dice, receiver.url))
    script.time = SetBack()
    job = a_job(script, dice, webhook=script.Webhook(receiver.url))
    job = script.ended_job(job, "Failed", ours.tracker.store.now(), error="no")
    ours.tracker.store.put(job, new=True).result(20)
    receiver.wait(2)


def test_a_late_loser_changes_nothing(script, dice):
    """Another process has tried meanwhile."""
    url = "http://example.org/"
    webhook = script.Webhook(url, since=1.0, due=7.0)
    failed, delivered = script.Attempt("A", None, webhook), script.Attempt("A", None, webhook)
    delivered.status = 204
    told = a_job(script, dice, webhook=script.Webhook(url, True, 1, 1.0, None))
    claimed = a_job(script, dice, webhook=script.Webhook(url, False, 0, 1.0, 27.0))
    assert failed.outcome(told, 8.0) is None and delivered.outcome(told, 8.0) is None
    assert failed.outcome(claimed, 8.0) is None
    assert delivered.outcome(claimed, 8.0).webhook == script.Webhook(url, True, 1, 1.0, None)
    another_end = claimed._replace(webhook=claimed.webhook._replace(since=2.0))
    assert delivered.outcome(another_end, 8.0) is None


def test_again_until_it_is_given_up(script, dice, teller, open_receiver, caplog):
    set_constants(script, RETRY_DELAYS=(0.05, 0.05))
    receiver, ours = open_receiver(500, 302, 404), teller()
    job_id = ours.end(dice, receiver.url + "/secret")
    until(lambda: ours.webhook(job_id).due is None)
    assert ours.webhook(job_id).attempts == len(receiver.got) == 3 and not ours.webhook(job_id).delivered
    assert len({got.id for got in receiver.got}) == 1
    until(lambda: len(caplog.messages) == 2)
    name = receiver.url.replace("/hook", "")
    assert caplog.messages == [
        f"A webhook to {name} failed, and later ones may, too: it answered 500",
        f"The webhook of job {job_id} is given up after attempt 3",
    ]


def test_a_job_that_is_gone_is_not_told(script, dice, teller, open_receiver):
    set_constants(script, RETRY_DELAYS=(0.3, 600), JITTER=0)
    receiver, ours = open_receiver(500, 500, 204), teller()
    deleted = ours.end(dice, receiver.url)
    ours.until_tried(deleted)
    ours.tracker.delete(deleted)
    kept = ours.end(dice, receiver.url)  # which is tried again after the other would have been
    until(lambda: ours.webhook(kept).delivered)
    assert [kept in got.id for got in receiver.got] == [False, True, True]


def test_nothing_is_told_twice_while_the_disk_is_full(script, dice, teller, open_receiver):
    set_constants(script, RETRY=0.1, LEASE=1.5, TRY_SECONDS=1.2)
    receiver, ours = open_receiver(), teller()
    is_full = threading.Event()

    def pwrite(*arguments: Any) -> int:
        if is_full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(*arguments)

    script.os = WrappedOs(pwrite=pwrite)
    tell = ours.tracker.on_ended

    def fill(job: Any) -> None:
        is_full.set()
        tell(job)

    ours.tracker.on_ended = fill
    job_id = ours.end(dice, receiver.url)
    receiver.wait()
    until(lambda: time.time() > receiver.got[0].at + 2, what="others may try")
    assert len(receiver.got) == 1 and not ours.webhook(job_id).delivered
    is_full.clear()
    until(lambda: ours.webhook(job_id).delivered)
    assert len(receiver.got) == 1


def test_two_processes_tell_it_once(script, dice, teller, open_receiver):
    """What is due, and nobody's."""
    receiver = open_receiver()
    other = load_script()
    set_constants(other, CLOSE_EVERY=0.05)
    ours = teller()
    jobs = [a_job(script, dice, webhook=script.Webhook(receiver.url)) for _ in range(40)]
    ended = [script.ended_job(job, "Failed", ours.tracker.store.now()) for job in jobs]
    for written in [ours.tracker.store.put(job._replace(error="no"), new=True) for job in ended]:
        written.result(20)
    theirs = teller(program=other)
    until(lambda: all(ours.webhook(job.id).delivered for job in ended))
    until(lambda: ours.tracker.store.next_webhook() is None and theirs.tracker.store.next_webhook() is None)
    assert len(receiver.got) == len({got.id for got in receiver.got}) == len(ended)


def test_its_end(script, dice, teller, open_receiver):
    """A webui that unloads its scripts waits for no receiver, and what it leaves is told by the next."""
    with hanging() as port:
        ours = teller()
        job_id = ours.end(dice, f"http://127.0.0.1:{port}/")
        until(lambda: ours.webhook(job_id).due)
        within(10, ours.tracker.close().result)
    assert not [one for one in threading.enumerate() if one.name == "job-tracker-webhooks" and one.is_alive()]


# Whom


ADDRESSES = {
    True: "1.1.1.1 93.184.216.34 2606:4700::1111 ::ffff:1.1.1.1 64:ff9b::101:101 2a00:1450:4001::200e",
    False: (
        "127.0.0.1 127.9.9.9 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1 198.18.0.1 "
        "224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 fec0::1 "
        "ff02::1 ff0e::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe "
        "64:ff9b:1::101:101 2002:7f00:1:: 2002:a9fe:a9fe::1 2002:101:101:: 2001:0:7f00:1::1 2001:db8::1 100::1"
    ),
}


@pytest.mark.parametrize("is_global", [True, False])
def test_addresses(script, is_global):
    assert [one for one in ADDRESSES[is_global].split() if script.is_global_address(one) != is_global] == []


class Names:
    """A resolver in the place of the system's: it answers by the next of a name's answers, and then by the last."""

    def __init__(self, monkeypatch: Any, **answers: Any):
        self.answers = {name.replace("_", "."): list(one) for name, one in answers.items()}
        self.asked: List[str] = []
        self.system = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)

    def look_up(self, host: str, port: int, *arguments: Any, **options: Any) -> Any:
        self.asked.append(host)
        if host not in self.answers:
            return self.system(host, port, *arguments, **options)
        answers = self.answers[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer = answer()
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(families[":" in one], socket.SOCK_STREAM, 6, "", (one, port)) for one in answer]


def no_such_name() -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_what_a_client_may_name(script, teller, monkeypatch):
    held = threading.Event()
    names = {
        "in_example": [["10.0.0.1", "::1"]],
        "out_example": [["1.1.1.1"]],
        "both_example": [["127.0.0.1", "1.1.1.1"]],
        "no_example": [no_such_name],
        "slow_example": [lambda: held.wait(60) and []],
    }
    resolver = Names(monkeypatch, **names)
    own = "http://127.0.0.1:9/own"
    ours = teller(GLOBAL_ONLY, TRACKER_WEBHOOK_URL=own)

    def refused(url: str) -> str:
        try:
            ours.webhooks.check(url)
        except ValueError as error:
            return str(error)
        return ""

    local = "this webui sends no requests to local addresses for its clients"
    try:
        for host in ("in.example", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0:7860"):
            assert refused(f"http://{host}/") == local, host
        for host in ("out.example", "both.example", "no.example", "slow.example", "1.1.1.1"):
            assert refused(f"https://{host}:8443/") == "", host
        assert refused(own) == local, "a client may not, though the operator may"
        for url in ("ftp://out.example/", f"http://{'a' * 64}.example/", "http://a..example/"):
            assert "must be a URL that begins with" in refused(url), url
        ours.rules = FREE
        resolver.asked.clear()
        assert refused("http://in.example/") == "" and resolver.asked == []
        ours.rules = (False, False)
        assert refused("http://out.example/") == "this webui sends no requests to URLs of its clients"
        assert refused(own) == "this webui sends no requests to URLs of its clients" and resolver.asked == []
    finally:
        held.set()


def test_the_rules_hold_at_each_try(script, dice, teller, open_receiver, caplog):
    set_constants(script, RETRY_DELAYS=(0.05, 0.05, 0.05))
    receiver, own = open_receiver(), open_receiver()
    ours = teller(GLOBAL_ONLY, TRACKER_WEBHOOK_URL=own.url)
    job_id = ours.end(dice, receiver.url)
    ours.until_tried(job_id)
    ours.end(dice, own.url, is_operators=True)
    own.wait()
    ours.rules = (False, False)
    ours.until_tried(job_id, 2)
    assert receiver.got == []
    ours.rules = FREE
    receiver.wait()
    assert "local addresses" in caplog.messages[0]


def test_the_operators_url_may_move(script, dice, teller, open_receiver):
    """What waited for the old one, as over a restart, is told to the new."""
    old, new = open_receiver(), open_receiver()
    ours = teller(GLOBAL_ONLY, TRACKER_WEBHOOK_URL=new.url)
    assert ours.tracker.webhook_for(None) == script.Webhook(new.url, is_operators=True)
    job_id = ours.end(dice, old.url, is_operators=True)
    assert job_id in new.wait()[0].id
    assert ours.until_tried(job_id).delivered and old.got == []


def test_the_address_that_was_judged_is_called(script, dice, teller, open_receiver, monkeypatch):
    """By a name that stands for another address each time that it is looked up."""
    set_constants(script, RETRY_DELAYS=(0.05, 600))
    good = open_receiver(500)
    evil = open_receiver(host="127.0.0.2", port=good.port)
    script.is_global_address = lambda address: address == "127.0.0.1"
    names = Names(monkeypatch, evil_example=[["127.0.0.1"], ["127.0.0.2"]])
    ours = teller(GLOBAL_ONLY)
    job_id = ours.end(dice, f"http://evil.example:{good.port}/")
    assert ours.until_tried(job_id, 2).due > time.time() + 500
    assert [got.headers["host"] for got in good.got] == [f"evil.example:{good.port}"]
    assert names.asked == ["evil.example"] * 2, "one look at each try"
    assert evil.got == []


def test_an_address_that_python_reads_in_another_way_than_the_system(script, dice, teller, open_receiver):
    """As Python 3.8.10 does."""

    def ip_address(text: str) -> Any:
        return ipaddress.ip_address(".".join(str(int(part)) for part in text.split(".")))

    script.ipaddress = types.SimpleNamespace(**{**vars(ipaddress), "ip_address": ip_address})
    judged = open_receiver(host="127.0.0.10")
    other = open_receiver(host="127.0.0.8", port=judged.port)
    job_id = teller().end(dice, f"http://127.0.0.010:{judged.port}/")
    judged.wait()
    assert job_id in judged.got[0].id and other.got == []


def test_of_several_addresses_one_that_can_be_reached(script, dice, teller, open_receiver, monkeypatch):
    receiver = open_receiver()
    Names(monkeypatch, two_example=[["127.0.0.9", "127.0.0.1"]])
    teller().end(dice, f"http://two.example:{receiver.port}/")
    receiver.wait()


def test_tls_checks_the_name(script, dice, teller, open_receiver, monkeypatch, tmp_path, caplog):
    make_certificate(tmp_path, "good.example")
    receiver = open_receiver(tls=server_tls(tmp_path))
    Names(monkeypatch, good_example=[["127.0.0.1"]], bad_example=[["127.0.0.1"]])
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    ours = teller()
    good, bad = (ours.end(dice, f"https://{name}.example:{receiver.port}/") for name in ("good", "bad"))
    assert ours.until_tried(good).delivered
    assert not ours.until_tried(bad).delivered
    assert len(receiver.got) == 1 and receiver.got[0].headers["host"] == f"good.example:{receiver.port}"
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.messages[0]


# Receivers that do not do as they should


def test_receivers_of_all_kinds(script, dice, teller, open_receiver):
    set_constants(script, TRY_SECONDS=3.0)
    other = open_receiver()
    head = b"HTTP/1.1 200 OK\r\n"
    kinds = {
        "slow": ([late(0.5)], True),
        "redirects": ([redirect_to(other.url)], False),
        "gone": ([410], False),
        "body without an end": ([WithoutEnd(head + b"Content-Length: 99999999999\r\n\r\n", bytes(9999))], True),
        "head without an end": ([WithoutEnd(head, b"X: " + b"y" * 9999 + b"\r\n")], False),
        "hints without an end": ([WithoutEnd(b"", b"HTTP/1.1 103 Hints\r\n\r\n" * 99)], False),
        "bomb": ([WithoutEnd(head + b"Content-Encoding: gzip\r\n\r\n", b"\x1f\x8b" + bytes(9999))], True),
        "nonsense": ([WithoutEnd(b"SSH-2.0-OpenSSH\r\n", b"\0")], False),
        "silent": ([lambda handler: None], False),
        "too late": ([late(6)], False),
    }
    ours = teller()
    jobs = {name: ours.end(dice, open_receiver(*answers).url) for name, (answers, _) in kinds.items()}
    with socket.socket() as closed, hanging() as port:
        closed.bind(("127.0.0.1", 0))
        jobs["closed"] = ours.end(dice, f"http://127.0.0.1:{closed.getsockname()[1]}/")
        jobs["hanging"] = ours.end(dice, f"http://127.0.0.1:{port}/")
        states = {name: ours.until_tried(job_id) for name, job_id in jobs.items()}
    assert {name for name, state in states.items() if state.delivered} == {name for name in kinds if kinds[name][1]}
    assert {name for name, state in states.items() if state.due is None and not state.delivered} == {"gone"}
    assert other.got == []
    for name, ((answer, *_), _) in kinds.items():
        if isinstance(answer, WithoutEnd):
            assert answer.size < 20 << 20, f"{name}: what the systems have in between, and not what 3 s can bring"


def test_no_connection_outlives_its_try(script, dice, teller):
    """Where nobody answers the first message of TLS, nor any other."""
    set_constants(script, TRY_SECONDS=0.5)
    ours = teller()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(9)
        for scheme in ("https", "http"):
            ours.until_tried(ours.end(dice, f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/"))
            with listener.accept()[0] as connection:
                connection.settimeout(20)
                while connection.recv(9999):
                    pass


def test_a_thousand_dead_receivers_slow_nobody(script, dice, teller, open_receiver, caplog):
    ours, good, new = teller(), open_receiver(), open_receiver()
    ours.until_tried(ours.end(dice, good.url))
    threads = threading.active_count()
    with hanging() as port:
        dead = []
        for number in range(1000):
            webhook = script.Webhook(f"http://127.1.{number // 250}.{number % 250 + 1}:{port}/")
            job, now = a_job(script, dice, webhook=webhook), ours.tracker.store.now()
            dead.append(script.ended_job(job, "Failed", now, script.LEASE, error="no"))
        for written in [ours.tracker.store.put(job, new=True) for job in dead]:
            written.result(20)
        for job in dead:
            ours.tracker.on_ended(job)
        until(lambda: caplog.messages, what="the first are given up for others")
        for number in range(10):
            ended = ours.end(dice, good.url)
            (*_, got) = good.wait(number + 2)
            assert ended in got.id and got.at - ours.webhook(ended).since < 10, "a receiver that is known to be good"
        ended = ours.end(dice, new.url)
        (got,) = new.wait()
        assert got.at - ours.webhook(ended).since < 10, "one that nobody knows yet"
        assert sum(ours.webhook(job.id).attempts for job in dead) < 1000, "some were under way meanwhile"
        assert threading.active_count() < threads + 10
