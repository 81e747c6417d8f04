"""By which names the webuis on a folder know each other: they stand in the files of their locks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest
from disks import ROOT
from inside import SCRIPT, load_script, until, within

LIVES = Path("/proc/self/fd").exists()
if LIVES:
    from windows import load_on_windows

HOLDS = """
import sys, runpy, time
script = runpy.run_path(sys.argv[1])
store = script["JobStore"](sys.argv[2])
store.announce(sys.argv[3])
store.query(script["Filter"](), 1)
print("ready", flush=True)
time.sleep(600)
"""


def servers(store: Any) -> List[str]:
    return within(20, store.servers)


def owners(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.glob("jobs.json.owner-*"))


@pytest.mark.every_store
@pytest.mark.parametrize("load", [load_script, pytest.param("windows", marks=pytest.mark.skipif(not LIVES, reason=""))])
def test_they_know_each_other(opened, tmp_path, load):
    """Also where nobody can read the byte that is locked, as on Windows."""
    script = load_on_windows() if load == "windows" else load()
    names = ["gpu:7860", "猫" * 100, "\udce9?"]
    stores = [opened(program=script) for _ in names]
    assert servers(stores[0]) == []
    for store, name in zip(stores, names):
        store.announce(name)
    shown = sorted(["gpu:7860", "猫" * 100, "??"])
    until(lambda: servers(stores[0]) == servers(stores[1]) == shown)
    stores[1].announce("another")
    until(lambda: "another" in servers(stores[0]) and "猫" * 100 not in servers(stores[0]))
    stores[1].close()
    assert servers(stores[0]) == ["??", "gpu:7860"]


def test_one_that_was_killed(opened, tmp_path):
    store = opened()
    store.announce("survivor")
    command = [sys.executable, "-c", HOLDS, str(SCRIPT), str(tmp_path), "victim"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        before = owners(tmp_path)
        assert servers(store) == ["survivor", "victim"]
        process.kill()
    assert servers(store) == ["survivor"]
    assert owners(tmp_path) == before and len(before) == 2, "asking makes and removes no file"


def test_it_says_so_again_after_its_folder_was_put_back(script, opened, tmp_path):
    folder = tmp_path / "data"
    one, two = opened(folder), opened(folder)
    for store, name in ((one, "one"), (two, "two")):
        store.announce(name)
        within(20, store.query, script.Filter(), 1)
    until(lambda: servers(one) == ["one", "two"])
    folder.rename(tmp_path / "away")
    for store in (one, two):
        within(20, store.query, script.Filter(), 1)
    until(lambda: servers(one) == servers(two) == ["one", "two"])


def test_what_cannot_be_asked_hides_no_other(opened, tmp_path):
    """A folder, a pipe, a file that is gone, and one of an earlier version, which says nothing."""
    store, earlier = opened(), opened()
    store.announce("one")
    until(lambda: len(owners(tmp_path)) == 1)
    (tmp_path / "jobs.json.owner-00000001").mkdir()
    (tmp_path / "jobs.json.owner-00000002").touch()
    (tmp_path / "jobs.json.owner-00000003").symlink_to(tmp_path / "nowhere")
    if os.name != "nt":
        os.mkfifo(tmp_path / "jobs.json.owner-00000004")
    assert earlier.idle(20)
    assert servers(store) == ["one"]
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(not ROOT, reason="only root can be another user")
def test_asking_opens_a_lock_to_nobody(script, opened, tmp_path):
    """Its mode stays, whatever the umask of who asks is."""
    (tmp_path / "jobs.json").write_bytes(b"{\n}\n")
    (tmp_path / "jobs.json").chmod(0o600)
    silent, asking = opened(), opened()
    for store in (silent, asking):
        within(20, store.query, script.Filter(), 1)
    script.UMASK = 0
    assert servers(asking) == []
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("jobs.json.owner-*")} == {0o600}
