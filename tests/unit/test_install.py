"""install.py: it installs what speaks to a database and a bucket where these are asked for, and ends no launch."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from harness import PROJECT

# A webui's package `launch` of a few lines, with the pip of the test.
LAUNCH = """
import json, os, pathlib
place = pathlib.Path(__file__).parent
def run_pip(command, desc=None):
    (place / "asked").write_text(json.dumps([command, desc]))
    {pip}
"""
INSTALLS = """[path.write_text("") for path in place.glob("[po]*.py")]"""
ASKED: Dict[str, Tuple[str, str, str]] = {
    "TRACKER_STORE": ("postgresql://a:secret@b/c", "psycopg", "psycopg[binary]>=3.2"),
    "TRACKER_IMAGES": ("s3://a/b", "obstore", "obstore"),
}
HAS_OBSTORE = pytest.mark.skipif(sys.version_info < (3, 9), reason="obstore needs Python 3.9")


def run(folder: Path, pip: str, *variables: str, before: str = "") -> Tuple[str, Any]:
    """What install.py says in a webui without the two packages, and what it asked of the webui's pip last."""
    (folder / "launch.py").write_text(LAUNCH.format(pip=pip))
    for name in ("psycopg", "obstore"):
        (folder / f"{name}.py").write_text("raise ImportError('no such package')")
    environ = {"PYTHONPATH": str(folder), **{variable: ASKED[variable][0] for variable in variables}}
    code = f"import runpy, sys; {before or None}; runpy.run_path({str(PROJECT / 'install.py')!r})"
    command: List[str] = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == 0, done.stdout
    asked = folder / "asked"
    return done.stdout.decode(), json.loads(asked.read_text()) if asked.exists() else None


@pytest.mark.parametrize("variable", ["TRACKER_STORE", pytest.param("TRACKER_IMAGES", marks=HAS_OBSTORE)])
def test_what_is_asked_for_is_installed(tmp_path, variable):
    said, (command, what_for) = run(tmp_path, INSTALLS, variable)
    _, module, requirement = ASKED[variable]
    assert (said, command) == ("", f'install "{requirement}"')
    assert module in what_for and variable in what_for


@HAS_OBSTORE
@pytest.mark.parametrize("pip", ["pass", "raise RuntimeError('no network')", "raise SystemExit('no')", "syntax error"])
def test_what_cannot_be_installed(tmp_path, pip):
    """--skip-install, no network, a fork with another launch: one line says what to do."""
    said, _ = run(tmp_path, pip, *ASKED)
    lines = said.splitlines()
    assert len(lines) == 2
    for line, (_, _, requirement) in zip(lines, ASKED.values()):
        assert line.endswith(f'"{sys.executable}" -m pip install "{requirement}"') and "secret" not in line


def test_nothing_is_asked_for(tmp_path):
    """It imports nothing of the webui, and says nothing."""
    assert run(tmp_path, "syntax error") == ("", None)


def test_an_old_python(tmp_path):
    said, asked = run(tmp_path, INSTALLS, "TRACKER_IMAGES", before="sys.version_info = (3, 8, 20)")
    assert "obstore needs Python 3.9" in said and asked is None


def test_a_database_without_its_driver(script, monkeypatch, caplog):
    """Whoever asks is told what to do, and so is the log, once."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url, _, requirement = ASKED["TRACKER_STORE"]
    with contextlib.closing(script.PostgresJobStore(url)) as store:
        for ask in (store.stats, lambda: store.get("AAAAAAAA"), lambda: store.remove(["AAAAAAAA"]).result(60)):
            with pytest.raises(script.StoreError, match=re.escape(f'python -m pip install "{requirement}"')):
                ask()
    line = f'To install it: "{sys.executable}" -m pip install "{requirement}"'
    assert caplog.text.count("The database cannot be used") == 1 and line in caplog.text


def test_many_that_ask_for_a_driver_at_once(script, monkeypatch):
    """Two threads at once in what importlib does then fail over what the other one has removed."""
    at_work, most = [], []
    invalidate = importlib.invalidate_caches

    def invalidate_slowly() -> None:
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.01)
        invalidate()
        at_work.pop()

    monkeypatch.setattr(importlib, "invalidate_caches", invalidate_slowly)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(script.import_driver, "no_such_driver", "no-such-driver") for _ in range(8)]
        found = [threads.submit(script.import_driver, "json", "json") for _ in range(8)]
    assert {type(one.exception()) for one in asked} == {script.StoreError}
    assert {one.result() for one in found} == {json}
    assert most == [1] * 8, "one after the other, and not for what is there"
