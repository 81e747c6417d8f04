"""The IDs of jobs: their form, and that no two name the same file on any system."""

from __future__ import annotations

import collections
import itertools
import string
import sys
import time

import pytest
from inside import load_script, make_tracker

ALPHABET = string.ascii_letters + string.digits


@pytest.fixture(scope="module")
def script():
    script = load_script()
    script.JobStore.SPARE_IDS = 1
    return script


@pytest.fixture
def tracker(script, tracker):
    tracker.store.query(script.Filter(), 1)  # all is loaded
    return tracker


def accept(script, tracker, job_id):
    job = script.Job(job_id, "txt2img", "Pending", int(time.time()), "127.0.0.1", "a lighthouse")
    tracker.accept(job, lambda: False, b"").result()


def deal(monkeypatch, script, tracker, ids):
    """Lets chance deal these IDs, in this order, once the one that was looked for ahead of time is gone."""
    ids, by_chance = iter(ids), script.new_id
    tracker.store.reserve_id()
    monkeypatch.setattr(script, "new_id", lambda: next(ids, "") or by_chance())
    tracker.recover().result()  # another one is looked for


def test_import_without_a_webui(script):
    """Any tool can use the parts; nothing is started, and nothing is made."""
    assert "modules" not in sys.modules
    assert "job_tracker.py" not in sys.modules
    assert load_script() is not script


def test_form(script):
    ids = [script.new_id() for _ in range(20_000)]
    assert {len(job_id) for job_id in ids} == {8}
    assert set("".join(ids)) == set(ALPHABET)
    assert len(set(ids)) == len(ids)
    assert all(script.ID_FORM.match(job_id) for job_id in ids)


def test_every_character_is_as_likely_as_the_others(script):
    """At every place: 20,000 drawings of 62 give 323 of each, give or take 18."""
    ids = [script.new_id() for _ in range(20_000)]
    for place in range(8):
        counts = collections.Counter(job_id[place] for job_id in ids)
        assert all(200 < counts[character] < 450 for character in ALPHABET), counts


def test_they_come_from_secrets(script, monkeypatch):
    """Whoever has seen some of them cannot tell the next."""
    monkeypatch.setattr(script.secrets, "choice", lambda alphabet: alphabet[3])
    assert script.new_id() == "DDDDDDDD"


@pytest.mark.parametrize(
    "text",
    ["", "AAAAAAA", "AAAAAAAAA", "AAAAAAA\n", "AAAAAAAA\n", "AAAAAAA-", "AAAA AAA", "ÀAAAAAAA", "AAAAAAA٣", "../AAAAA"],
)
def test_what_is_no_id(script, tracker, text):
    assert not script.ID_FORM.match(text)
    assert tracker.get(text) is None


def test_id_in_use_is_dealt_again(script, tracker, monkeypatch):
    accept(script, tracker, "AbCdEf12")
    deal(monkeypatch, script, tracker, ["AbCdEf12", "AbCdEf13"])
    assert tracker.store.reserve_id() == "AbCdEf13"


@pytest.mark.parametrize("other", ["abcdef12", "ABCDEF12", "aBcDeF12"])
def test_id_that_differs_in_case_only_is_dealt_again(script, tracker, monkeypatch, other):
    """It would name the same files on Windows and macOS."""
    accept(script, tracker, "AbCdEf12")
    deal(monkeypatch, script, tracker, [other, "AbCdEf13"])
    assert tracker.store.reserve_id() == "AbCdEf13"
    assert tracker.get(other) is None


def test_id_of_a_job_that_is_being_written(script, tracker, monkeypatch):
    """It is taken before it is on disk, in every spelling."""
    lock = script.FileLock(str(tracker.store.path) + ".lock")
    tracker.store.query(script.Filter(), 1)
    lock.acquire()
    try:
        job = script.Job("AbCdEf12", "txt2img", "Pending", int(time.time()), None, "")
        written = tracker.accept(job, lambda: False, b"")
        ids, by_chance = iter(["AbCdEf12", "abcdef12", "AbCdEf13"]), script.new_id
        monkeypatch.setattr(script, "new_id", lambda: next(ids, "") or by_chance())
        tracker.store.reserve_id()  # which was looked for ahead of time
        assert tracker.store.reserve_id() == "AbCdEf13"
        assert not written.done()
    finally:
        lock.release()
        lock.close()
    written.result()


def test_id_of_an_ended_job_is_in_use(script, tracker, monkeypatch):
    accept(script, tracker, "AbCdEf12")
    tracker.fail("AbCdEf12", "no reason")
    deal(monkeypatch, script, tracker, ["AbCdEf12", "abcdef12", "AbCdEf13"])
    assert tracker.store.reserve_id() == "AbCdEf13"


def test_id_is_in_use_after_a_restart(script, tracker, tmp_path, monkeypatch):
    accept(script, tracker, "AbCdEf12")
    tracker.fail("AbCdEf12", "no reason")
    tracker.store.query(script.Filter(), 1)
    again = make_tracker(script, tmp_path)
    try:
        again.store.query(script.Filter(), 1)  # when this answers, the file is loaded
        deal(monkeypatch, script, again, ["AbCdEf12", "abcdef12", "AbCdEf13"])
        assert again.store.reserve_id() == "AbCdEf13"
    finally:
        again.close()


def test_numbers_of_ids(script):
    """One for all spellings that differ in case, and no two others have the same."""
    ids = ["".join(pair) * 4 for pair in itertools.product(ALPHABET, repeat=2)]
    numbers = collections.defaultdict(set)
    for job_id in ids:
        numbers[script.id_number(job_id)].add(job_id.lower())
    assert all(len(spellings) == 1 for spellings in numbers.values())
    assert len(numbers) == 36 * 36
