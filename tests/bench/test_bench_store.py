"""Each measurement of bench_store.py works, with few jobs."""

from __future__ import annotations

import bench_store
import pytest


@pytest.mark.parametrize("bench", bench_store.BENCHES.values(), ids=bench_store.BENCHES)
def test_benches(bench, monkeypatch):
    monkeypatch.setattr(bench_store, "SECONDS_BESIDE", 0.5)
    monkeypatch.setattr(bench_store, "STARTS", 1)
    figures = bench(200 if bench is bench_store.million else 2_000, lambda text, share: None)
    assert all(figure.measured for figure in figures)
