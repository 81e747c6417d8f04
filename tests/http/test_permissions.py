"""What a webui makes is for whom the umask, or what was there before, says."""

from __future__ import annotations

import os
import stat

import pytest
from disks import modes_of, private_jobs
from inside import until

from harness import QUICK, Webui, body

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")


@pytest.mark.parametrize("umask", [0o077, 0o022], ids=oct)
def test_the_umask_decides(start, tmp_path, umask):
    def prepare(webui: Webui) -> None:
        webui.data.mkdir()
        (webui.data / "jobs.json").write_text('{"AAAAAAAA": {"id": 5}}')  # is set aside, and written anew

    data = tmp_path / "data"
    before = os.umask(umask)
    try:
        environ = {"TRACKER_DATA_DIR": str(data)}
        webui = start(*QUICK, tracking="variable", environ=environ, prepare=prepare, cold=True)
    finally:
        os.umask(before)
    job_id = webui.post(body(batch_size=2)).headers["x-job-id"]
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    until(lambda: b'"id":' in (data / "jobs.json").read_bytes() and b"{}" not in (data / "jobs.json").read_bytes())

    modes = modes_of(data)
    names = " ".join(modes)
    assert all(name in names for name in ("jobs.json.lock", "jobs.json.owner-", "jobs.json.damaged-", "images/"))
    assert sum(job_id in name for name in modes) == 3
    for name, mode in modes.items():
        lock = name.endswith(".lock") or ".owner-" in name  # for those who may write, see test_locks.py
        expected = 0o600 if lock else (0o777 if (data / name).is_dir() else 0o666) & ~umask
        assert mode == expected, (name, oct(mode))
    assert stat.S_IMODE((webui.extension / "config.json").stat().st_mode) == 0o666 & ~umask


def test_a_webui_whose_jobs_are_private(start, tmp_path):
    def prepare(webui: Webui) -> None:
        webui.data.mkdir()
        private_jobs(webui.data)

    before = os.umask(0o022)
    try:
        webui = start(*QUICK, environ={"TRACKER_DATA_DIR": str(tmp_path / "data")}, prepare=prepare)
    finally:
        os.umask(before)
    job_id = webui.post(body(batch_size=2)).headers["x-job-id"]
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    modes = modes_of(webui.data)
    assert sum(job_id in name for name in modes) == 3
    readable = {name: oct(mode) for name, mode in modes.items() if mode & 0o077 and name not in (".", "images")}
    assert not readable, "the images lie in a folder of the day"
