"""Two minutes of soak.py, whose long run is for a quiet hour."""

from __future__ import annotations

from pathlib import Path

import pytest
import soak


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc, which Linux has")
def test_two_minutes():
    run = soak.soak(2, 20, lambda text, share: None)
    print(soak.table(run))
    assert not run.wrong
    assert not [line for line in soak.figures(run) if not line.flat]
    never = {action.__name__ for action, _ in run.ACTIONS} - set(run.done)
    assert not never, "these did not happen, or failed each time"
    assert run.done["purge"] > 10
