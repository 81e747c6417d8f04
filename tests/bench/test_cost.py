"""What tracking costs stays within its bounds. The `bench_` files measure; here are margins for a busy machine."""

from __future__ import annotations

import sys

import bench_parked
import bench_requests as bench
import pytest


def test_gzip_is_cheaper_and_smaller_than_the_webuis_own():
    seconds, size = bench.gzip_cost()
    assert seconds.ratio < 1 / 3, seconds
    assert size.ratio <= 1, size


def test_whole_request(start):
    """Two images of 1024x1024. The bounds on a machine that does nothing else are 0.8 and 1.05."""
    packed, plain = bench.whole_requests(start, pairs=8)
    assert packed.ratio < 0.95, packed
    assert plain.ratio < 1.3, plain


def test_event_loop_serves_everybody_else(start):
    """It is never held by our code for longer than 20 ms, whatever the size."""
    for figure in bench.event_loop(start):
        assert figure.ours < (40 if "clock" in figure.name else 20), figure
        if "gzip" in figure.name and figure.other is not None:
            assert figure.ratio < 0.1, figure


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of a process's memory")
def test_memory_of_a_large_answer(start):
    for figure in bench.memory(start):
        assert figure.ours < 1.1 * figure.other + 30, figure


def test_large_job(start):
    """It is read and sent a piece at a time."""
    for figure in bench.large_job(start):
        if figure.unit == "MB":
            assert figure.ours < 24, figure
        else:
            assert figure.ours < 50 + 5 * figure.other, figure


def test_start_with_many_jobs(start):
    (figure,) = bench.start_up(start)
    assert figure.ours < figure.other + 1, figure


def test_parked_jobs_cost_nobody(start, monkeypatch):
    """No memory, and no time of others, however many they are."""
    monkeypatch.setattr(bench_parked, "RESTARTS", 1)
    for figure in bench_parked.waiting(start, jobs=1_000, rounds=40):
        if figure.unit == "MB":
            assert figure.ours < (figure.other or 0) + 20, figure
        elif figure.unit == "s":
            assert figure.ours < figure.other + 1, figure
        elif figure.other is not None:
            assert figure.ours < 5 * figure.other, figure


def test_a_parked_job_takes_no_longer(start):
    """The bound on a machine that does nothing else is 1.05."""
    for figure in bench_parked.running(start, pairs=3):
        assert figure.ratio < 1.3, figure
