"""What a fleet costs stays within its bounds. bench_fleet.py measures; here are margins for a busy machine."""

from __future__ import annotations

import bench_fleet as bench


def test_accepting(database):
    """Beside a bare insert. On a machine that does nothing else, with fsync, the bound is 2.5."""
    (figure,) = bench.accepting(database, times=100)
    assert figure.ratio < 8, figure


def test_waking(start, database, tmp_path):
    typical, _ = bench.waking(start, database, tmp_path / "jobs", rounds=8)
    assert typical.ours < 250, typical


def test_many_webuis(database, tmp_path):
    reached, typical, slowest = bench.crowd(database, tmp_path / "jobs", webuis=3, rate=15, seconds=2)
    assert reached.ours > 5 and slowest.ours < 2_000, (reached, typical, slowest)


def test_looks(start, database, tmp_path, monkeypatch):
    """With jobs that are made as the store itself would have made them."""
    monkeypatch.setattr(bench, "REPEATS", 20)
    for figure in bench.looking(start, database, tmp_path / "jobs", 3_000, bench.no_progress):
        assert figure.ours < figure.other + 2000, figure


def test_jobs_that_are_made(script, database):
    """They are as those that the store writes."""
    bench.fill(database, 2_000, bench.no_progress)
    store = script.PostgresJobStore(database.url)
    try:
        job = store.get("00001000")
        assert job.prompt.startswith("number 1000 castle snow ") and job.status == "Completed"
        assert store.stats()[0] == {**dict.fromkeys(script.STATUSES, 0), "Completed": 2_000}
        assert [one.id for one in store.query(script.Filter(q="CASTLE"), 5).jobs] == ["00001000", "00000000"]
        assert len(store.query(script.Filter(ip="10.0.0.7"), 1000).jobs) == 100
        row = "select folded, record, timestamp, type, ip, prompt, bytes from job_tracker_jobs where id = %s"
        (made,) = database.execute(row, job.id)
        store.remove([job.id]).result(30)
        store.put(job, new=True).result(30)
        assert database.execute(row, job.id) == [made]
    finally:
        store.close()
