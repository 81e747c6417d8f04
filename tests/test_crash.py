"""A short run of each kind of crash.py, whose long run is for a quiet hour."""

from __future__ import annotations

import os
import random

import crash
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


def test_webuis_are_killed():
    print(crash.webui(1, print))
