"""A short run of each kind of crash.py, whose long run is for a quiet hour."""

from __future__ import annotations

import os
import random
import sys

import crash
import lossy
import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_trackers_are_killed():
    print(crash.trackers(20, print))


@needs_fork
def test_neighbours_are_killed():
    print(crash.neighbours(25, print))


def test_the_power_is_cut():
    print(crash.power(400, print, random.Random()))


@pytest.mark.parametrize("forgetful", ["JobStore", "ImageStore", "sync_folder"])
def test_who_forgets_to_sync_is_found(monkeypatch, forgetful):
    fsync = lossy.Recorder.fsync

    def forget(recorder, file):
        caller = sys._getframe(2)  # of sync_file
        name = type(caller.f_locals["self"]).__name__ if "self" in caller.f_locals else caller.f_code.co_name
        if name != forgetful:
            fsync(recorder, file)

    monkeypatch.setattr(lossy.Recorder, "fsync", forget)
    with pytest.raises(AssertionError, match="gone|has not all its images|was Completed and is"):
        crash.power(5000, print, random.Random())


def test_webuis_are_killed():
    print(crash.webui(1, print))
