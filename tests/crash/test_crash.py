"""A short run of each kind of crash.py, whose long run is for a quiet hour."""

from __future__ import annotations

import json
import os
import random

import crash
import lossy
import pytest
import services

from harness import fewer

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_trackers_are_killed():
    print(crash.trackers(fewer(20), print))


@needs_fork
def test_neighbours_are_killed():
    print(crash.neighbours(fewer(25), print))


def test_the_power_is_cut():
    print(crash.power(fewer(400), print, random.Random()))


FORGETFUL = {  # what is not synced: by whether it is a folder, and its name
    "jobs.json": lambda is_folder, name: name.startswith("jobs.json"),
    "images": lambda is_folder, name: not is_folder and not name.startswith("jobs.json") and ".request." not in name,
    "requests": lambda is_folder, name: ".request." in name,
    "folders": lambda is_folder, name: is_folder,
}


@pytest.mark.parametrize("forgotten", FORGETFUL)
def test_who_forgets_to_sync_is_found(monkeypatch, forgotten):
    open_file, fsync, paths = lossy.Recorder.open, lossy.Recorder.fsync, {}

    def open_and_note(recorder, path, *arguments):
        descriptor = open_file(recorder, path, *arguments)
        paths[descriptor] = path
        return descriptor

    def forget(recorder, descriptor):
        path = paths[descriptor]
        if not FORGETFUL[forgotten](os.path.isdir(path), os.path.basename(path)):
            fsync(recorder, descriptor)

    monkeypatch.setattr(lossy.Recorder, "open", open_and_note)
    monkeypatch.setattr(lossy.Recorder, "fsync", forget)
    # The last is of a jobs.json that lost its begin.
    found = "gone|has not (all its images|its whole request)|was Completed and is|Expecting"
    with pytest.raises((AssertionError, json.JSONDecodeError), match=found):
        crash.power(5000, print, random.Random())


def test_webuis_are_killed():
    print(crash.webui(1, print))


@needs_fork
def test_webuis_with_parked_jobs_are_killed():
    print(crash.parked(fewer(12), print))


@pytest.mark.all_only
def test_a_fleet_is_killed():
    reason = services.why_missing()
    if reason:
        pytest.skip(reason)
    print(crash.fleet(8, print))
