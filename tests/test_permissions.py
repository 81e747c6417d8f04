"""What we make belongs to whom the umask says, and what somebody has made private stays so."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path
from typing import Any, Dict

import pytest
from inside import a_job, load_script, make_tracker, until

from harness import QUICK, Webui, body

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")


def modes_of(folder: Path) -> Dict[str, int]:
    """Of all that is in a folder, the folder too, but for what was installed."""
    paths = [folder, *folder.glob("**/*")]
    ours = [path for path in paths if not {"scripts", "install.py"} & set(path.relative_to(folder).parts)]
    return {str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in ours}


@pytest.mark.parametrize("umask", [0o077, 0o022], ids=oct)
def test_the_umask_decides(start, tmp_path, umask):
    def prepare(webui: Webui) -> None:
        webui.data.mkdir()
        (webui.data / "jobs.json").write_text('{"AAAAAAAA": {"id": 5}}')  # is set aside, and written anew

    data = tmp_path / "data"
    before = os.umask(umask)
    try:
        webui = start(*QUICK, tracking="variable", environ={"TRACKER_DATA_DIR": str(data)}, prepare=prepare)
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


@pytest.fixture
def script() -> Any:
    return load_script()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660], ids=oct)
def test_jobs_that_were_made_private_stay_so(script, tmp_path, mode):
    """Through a compaction, and in what is set aside."""
    path = tmp_path / "jobs.json"
    path.write_bytes(b'{\n"secret prompt": 5\n}\n')
    path.chmod(mode)
    script.JobStore.SPARE_DEAD = 2
    store = script.JobStore(str(tmp_path))
    try:
        job = a_job(script, random.Random(7))
        for _ in range(20):
            store.put(job).result()
        until(lambda: path.read_bytes().count(b"\n") < 10 and b"secret" not in path.read_bytes())
        (aside,) = tmp_path.glob("jobs.json.damaged-*")
        assert "secret prompt" in aside.read_text()
        assert [stat.S_IMODE(one.stat().st_mode) for one in (path, aside)] == [mode, mode]
    finally:
        store.close()


@pytest.mark.parametrize("mode", [0o600, 0o664], ids=oct)
def test_settings_keep_their_mode(script, tmp_path, mode):
    path = tmp_path / "config.json"
    path.write_text('{"enabled": false}')
    path.chmod(mode)
    script.Settings(str(tmp_path), {}).save(enabled=True)
    assert json.loads(path.read_text())["enabled"] is True
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_folder_that_was_made_private_stays_so(script, tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for path in (data, data / "images"):
        path.chmod(0o700)
    tracker = make_tracker(script, tmp_path, TRACKER_DATA_DIR=str(data))
    try:
        tracker.store.figures()
        assert tracker.images.folder == str(data / "images")
        modes = modes_of(data)
        assert modes["."] == modes["images"] == 0o700
    finally:
        tracker.close()


def test_nobody_waits_with_a_link_for_a_file_of_ours(script, tmp_path):
    """Where others may write, they do not lead our next file elsewhere."""
    precious = tmp_path / "precious"
    precious.write_text("words")
    data = tmp_path / "data"
    data.mkdir()
    (data / "jobs.json").write_text('{"minified": 5}')
    store = script.JobStore(str(data))
    try:
        store.figures()
        part = data / f"jobs.json.{store.owner}.part"
        job = a_job(script, random.Random(7))
        script.JobStore.SPARE_DEAD = 2
        until(lambda: not store._chores)
        part.symlink_to(precious)
        for _ in range(20):
            store.put(job).result()
        until(lambda: not store._chores)
        assert precious.read_text() == "words"
    finally:
        store.close()
