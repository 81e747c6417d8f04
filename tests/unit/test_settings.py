"""config.json and the environment's variables."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from inside import load_script
from journal import MUTATION, mutated

from harness import PROJECT, TESTS, fewer


@pytest.fixture(scope="module")
def script():
    """The extension's script, loaded as a webui loads it, without a webui."""
    return load_script()


@pytest.fixture
def settings(script, tmp_path):
    def make(text=None, **environ):
        if text is not None:
            (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return script.Settings(str(tmp_path), environ)

    return make


@pytest.fixture
def config(tmp_path):
    return lambda: json.loads((tmp_path / "config.json").read_text())


def test_first_start_writes_the_defaults(settings, config):
    made = settings()
    assert (made.enabled, made.retention_days, made.locked) == (False, 30, {})
    assert config() == {"enabled": False, "retention_days": 30}


def test_a_first_start_on_a_full_disk_leaves_no_half_a_file(script, settings, config, monkeypatch, tmp_path):
    """Which would be a broken one from then on."""

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "sync_file", full)
    made = settings()
    assert (made.enabled, made.retention_days, list(tmp_path.iterdir())) == (False, 30, [])
    assert "cannot be written" in made.trouble
    monkeypatch.undo()
    made.refresh()
    assert config() == {"enabled": False, "retention_days": 30} and made.trouble is None


def test_a_file_that_arrives_at_the_first_start(script, settings, monkeypatch, tmp_path):
    """Between our look and our writing. It stays, and no default is in force until it is read."""
    create_file = script.create_file

    def late(path, data):
        (tmp_path / "config.json").write_text('{"enabled": true, "retention_days": 90}')
        create_file(path, data)

    monkeypatch.setattr(script, "create_file", late)
    made = settings()
    assert (made.enabled, made.retention_days) == (False, None)
    made.refresh()
    assert (made.enabled, made.retention_days) == (True, 90)


@pytest.mark.parametrize(
    ("text", "enabled", "days"),
    [
        ('{"enabled": true, "retention_days": 7}', True, 7),
        ('{"enabled": true}', True, 30),
        ('{"retention_days": 0.5}', False, 0.5),
        ('{"retention_days": null}', False, None),
        ('{"retention_days": 0}', False, None),
        ('{"retention_days": "off"}', False, None),
        ('{"retention_days": " OFF "}', False, None),
        ("\ufeff" + '{"enabled": true}', True, 30),
        ("{}", False, 30),
    ],
)
def test_values(settings, text, enabled, days):
    made = settings(text)
    assert (made.enabled, made.retention_days) == (enabled, days)


@pytest.mark.parametrize("value", ['"7"', '"365"', "-1", "true", "[]", "NaN", "Infinity", "1e999", '"never"'])
def test_a_retention_that_is_not_understood_is_off(settings, config, caplog, value):
    """The default would remove jobs that somebody wanted to keep."""
    text = '{"enabled": true, "retention_days": ' + value + "}"
    with caplog.at_level(logging.WARNING, "job_tracker"):
        made = settings(text)
    assert (made.enabled, made.retention_days) == (True, None)
    assert "retention_days is invalid, so retention is off" in caplog.text
    assert "retention_days is invalid" in made.trouble
    made.save(enabled=False)
    assert made.retention_days is None, "a save does not bring the default either"
    assert settings(json.dumps(config())).retention_days is None


@pytest.mark.parametrize(
    "name", ["retention", "Retention_Days", "retentionDays", "retension_days", "days", "r\u00e9tention"]
)
def test_a_name_that_is_mistyped_turns_retention_off(settings, config, caplog, name):
    made = settings(json.dumps({"enabled": True, name: None}))
    assert (made.enabled, made.retention_days) == (True, None)
    assert ascii(name) in caplog.text
    made.save(enabled=False)
    assert config() == {"enabled": False, name: None}
    made.save(retention_days=7)
    assert made.retention_days == 7


def test_enabled_that_is_not_understood_is_ignored(settings, caplog):
    made = settings('{"enabled": "yes", "retention_days": 5}')
    assert (made.enabled, made.retention_days) == (False, 5)
    assert "enabled is invalid" in caplog.text


BROKEN = {
    "empty": "",
    "cut": "{",
    "no object": "[]",
    "null": "null",
    "text": '"x"',
    "not UTF-8": b"\xff\xfe",
    "UTF-16": '{"enabled": true, "retention_days": null}'.encode("utf-16"),
    "zeros": b"\0" * 100,
    "a trailing comma": '{"enabled": true, "retention_days": null,}',
    "a comment": '{"enabled": true, "retention_days": null} // keep everything',
    "Python": "{'enabled': True, 'retention_days': None}",
    "Python's None": '{"enabled": true, "retention_days": None}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_at_the_start(settings, tmp_path, caplog, name):
    """Nothing is tracked and nothing is removed until it can be read; it stays where it is, as it is."""
    text = BROKEN[name]
    with caplog.at_level(logging.WARNING, "job_tracker"):
        made = settings(text)
    for _ in range(3):
        made.refresh()
    assert (made.enabled, made.retention_days) == (False, None)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == (text if isinstance(text, bytes) else text.encode())
    assert len(caplog.records) == 1 and "tracking and retention are off" in caplog.text
    assert "tracking and retention are off" in made.trouble
    (tmp_path / "config.json").write_text('{"enabled": true, "retention_days": 90}')
    made.refresh()
    assert (made.enabled, made.retention_days, made.trouble) == (True, 90, None)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_while_the_webui_runs(settings, tmp_path, caplog, name):
    """What was known holds."""
    made = settings('{"enabled": true, "retention_days": 90}')
    text = BROKEN[name]
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for _ in range(3):
        made.refresh()
    assert (made.enabled, made.retention_days) == (True, 90)
    assert caplog.text.count("cannot be read") == 1 and "what was known of it holds" in made.trouble
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("known", [False, True])
def test_a_broken_file_is_kept_when_the_tab_saves(settings, tmp_path, config, known):
    text = '{"enabled": true, "retention_days": 365,}'
    made = settings('{"retention_days": 90, "other": 1}' if known else text)
    (tmp_path / "config.json").write_text(text)
    made.save(enabled=True)
    (aside,) = tmp_path.glob("config.json.damaged-*")
    assert aside.read_text() == text
    assert config() == {"enabled": True, **({"retention_days": 90, "other": 1} if known else {"retention_days": None})}
    assert (made.enabled, made.retention_days, made.trouble) == (True, 90 if known else None, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True),
        ("TRUE", True),
        ("Yes", True),
        ("on", True),
        ("0", False),
        ("False", False),
        ("NO", False),
        ("off", False),
    ],
)
def test_enabled_by_variable(settings, text, value):
    made = settings(json.dumps({"enabled": not value}), TRACKER_ENABLED=f" {text} ")
    assert made.enabled is value
    assert made.locked == {"enabled": "TRACKER_ENABLED"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("0.25", 0.25), ("0", None), ("off", None), ("OFF", None), ("1e3", 1000), ("0.0", None)],
)
def test_retention_by_variable(settings, text, value):
    made = settings('{"retention_days": 5}', TRACKER_RETENTION=text)
    assert made.retention_days == value
    assert made.locked == {"retention_days": "TRACKER_RETENTION"}


def test_a_variable_that_cannot_be_read_is_a_warning_and_ignored(settings, caplog):
    made = settings('{"enabled": true, "retention_days": 5}', TRACKER_ENABLED="maybe")
    assert (made.enabled, made.retention_days, made.locked) == (True, 5, {})
    assert "TRACKER_ENABLED" in caplog.text


@pytest.mark.parametrize(
    "text", ["-1", "seven", "nan", "inf", "7d", "1,5", '"365"', "None", "null", "365 days", "1_0", "\uff13"]
)
def test_a_retention_variable_that_is_not_understood_turns_retention_off(settings, caplog, text):
    """config.json says something else, but whoever set the variable did not want that."""
    made = settings('{"enabled": true, "retention_days": 5}', TRACKER_RETENTION=text)
    assert (made.enabled, made.retention_days) == (True, None)
    assert made.locked == {"retention_days": "TRACKER_RETENTION"}
    assert "TRACKER_RETENTION" in caplog.text and "retention is off" in caplog.text


BY_VARIABLE_ONLY = {
    "resume": ("TRACKER_RESUME", "async", {"async": "async", "ALL": "all", " Off ": "off"}),
    "max_gb": (
        "TRACKER_MAX_GB",
        None,
        {"20": 20, "0.5": 0.5, ".5": 0.5, "1e3": 1000, "0": None, "0.0": None, "off": None, "OFF": None},
    ),
    "max_pending": ("TRACKER_MAX_PENDING", None, {"1": 1, "500": 500, "0": None, "off": None, "Off": None}),
}


@pytest.mark.parametrize("name", BY_VARIABLE_ONLY)
def test_settings_that_only_variables_have(settings, config, caplog, name):
    variable, default, values = BY_VARIABLE_ONLY[name]
    assert getattr(settings(json.dumps({name: "all", "retention_days": 5})), name) == default
    for text, value in values.items():
        made = settings(**{variable: text})
        assert (getattr(made, name), made.locked) == (value, {name: variable})
    assert not caplog.records
    with pytest.raises(ValueError, match="no setting"):
        made.save(**{name: default})
    made.save(enabled=True)
    assert config() == {name: "all", "retention_days": 5, "enabled": True}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("resume", text) for text in ("1", "on", "sync", "async, all", "none")),
        *(("max_gb", text) for text in ("-1", "20 GB", "20G", "1,5", "1_0", "inf", "nan", "1e999", "no", "None")),
        *(("max_pending", text) for text in ("-1", "+1", "1.0", "0.5", "1e3", "\uff13", "1_0", "9" * 5000, "no")),
    ],
)
def test_one_of_these_that_cannot_be_read_is_a_warning_and_ignored(settings, caplog, name, text):
    """It turns nothing else off either."""
    variable, default, _ = BY_VARIABLE_ONLY[name]
    made = settings('{"enabled": true, "retention_days": 5}', **{variable: text})
    assert (getattr(made, name), made.locked) == (default, {})
    assert (made.enabled, made.retention_days) == (True, 5)
    assert f"{variable}={text[:80]!r} is invalid, so it is ignored" in caplog.text


@pytest.mark.parametrize("sign", "@/?#[\uff1a")
def test_a_password_that_is_not_written_as_in_a_url(script, settings, caplog, sign):
    """A part of it could be taken for the name of the host, which is shown."""
    made = settings(TRACKER_STORE=f"postgresql://tracker:xyzzy{sign}xyzzy@db.example/tracker")
    assert made.store_url is None and "TRACKER_STORE is invalid" in caplog.text and "%40" in caplog.text
    assert "xyzzy" not in caplog.text
    made = settings(TRACKER_STORE=f"postgresql://tracker:{quote('xyzzy' + sign, safe='')}@db.example:5433/tracker?a=b")
    assert "the database db.example:5433/tracker" in script.places_of(made) and "xyzzy" not in script.places_of(made)


def test_save(settings, config):
    made = settings('{"enabled": false, "retention_days": 5, "of a later version": [1]}')
    made.save(enabled=True)
    assert made.enabled is True
    made.save(retention_days=None)
    assert config() == {"enabled": True, "retention_days": None, "of a later version": [1]}


def test_save_takes_only_what_it_knows(settings, config):
    made = settings('{"enabled": false, "retention_days": 5}', TRACKER_ENABLED="1")
    for changes in ({"enabled": False}, {"enabled": 1}, {"retention_days": -1}, {"retention_days": "7"}, {"path": "/"}):
        with pytest.raises(ValueError):
            made.save(**changes)
    assert made.enabled is True
    assert config() == {"enabled": False, "retention_days": 5}


def test_a_file_that_cannot_be_written_changes_nothing(settings, tmp_path, monkeypatch):
    made = settings('{"enabled": false}')

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        made.save(enabled=True)
    assert made.enabled is False
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


class Unreadable:
    """Stands for the module `os` in the script, on a disk that reports an error."""

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags, mode=0o777):
        raise OSError(errno.EIO, "Input/output error", path)


def test_a_file_that_cannot_be_read_for_a_while(settings, script, config, caplog):
    """What was known of it holds: a purge by a retention that nobody asked for could not be undone."""
    made = settings('{"enabled": true, "retention_days": null, "other": 1}')
    script.os = Unreadable()
    made.refresh()
    assert (made.enabled, made.retention_days) == (True, None)
    with pytest.raises(OSError, match="Input/output"):
        made.save(retention_days=7)
    assert caplog.text.count("cannot be read") == 1
    script.os = os
    made.refresh()
    assert (made.enabled, made.retention_days) == (True, None)
    made.save(retention_days=7)
    assert config() == {"enabled": True, "retention_days": 7, "other": 1}


def test_a_file_that_cannot_be_read_at_the_start(settings, script):
    script.os = Unreadable()
    made = settings('{"enabled": true, "retention_days": 90}')
    assert (made.enabled, made.retention_days) == (False, None)
    script.os = os
    made.refresh()
    assert (made.enabled, made.retention_days) == (True, 90)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
@pytest.mark.parametrize("make", ["mkdir", "mkfifo"])
def test_something_else_in_its_place(settings, tmp_path, make):
    """Nobody waits for a pipe's other end, and nothing is written over it."""
    getattr(os, make)(str(tmp_path / "config.json"))
    made = settings()
    assert (made.enabled, made.retention_days) == (False, None)
    assert "config.json cannot be read (it is no file)" in made.trouble
    with pytest.raises(OSError, match="it is no file"):
        made.save(enabled=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_file_that_is_being_uploaded(settings, tmp_path):
    """It is empty for a while, then half there, then whole: the settings in force stay, and the file too."""
    made = settings('{"enabled": true, "retention_days": null}')
    text = b'{"enabled": true, "retention_days": 90, "comment": "' + b"x" * 5000 + b'"}'
    with (tmp_path / "config.json").open("wb", buffering=0) as file:
        for part in (b"", text[:40], text[40:3000]):
            file.write(part)
            made.refresh()
            assert (made.enabled, made.retention_days) == (True, None)
        file.write(text[3000:])
    made.refresh()
    assert (made.enabled, made.retention_days) == (True, 90)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == text


def test_a_save_during_an_upload_does_not_lose_it(settings, tmp_path):
    """Its text comes into the file that has the name, and not into one that has lost it."""
    made = settings('{"enabled": true, "retention_days": null}')
    text = json.dumps({"enabled": True, "retention_days": 90, "comment": "x" * 100})
    with (tmp_path / "config.json").open("w") as file:
        made.save(retention_days=7)
        assert made.retention_days == 7
        file.write(text)
    assert (tmp_path / "config.json").read_text() == text
    made.refresh()
    assert made.retention_days == 90


def test_a_file_that_is_gone_for_a_while(settings, tmp_path, config, caplog):
    """Somebody replaces it by removing it first."""
    made = settings('{"enabled": true, "retention_days": null}')
    (tmp_path / "config.json").unlink()
    for _ in range(3):
        made.refresh()
    assert (made.enabled, made.retention_days) == (True, None)
    assert list(tmp_path.iterdir()) == [], "whoever writes it just then is not overwritten"
    assert caplog.text.count("cannot be read") == 1
    made.save(retention_days=7)
    assert config() == {"enabled": True, "retention_days": 7}


# Files that are not where they seem to be


def linked(tmp_path, text=None):
    """config.json as a link to a file in another folder."""
    target = tmp_path / "volume" / "settings.json"
    target.parent.mkdir()
    if text is not None:
        target.write_text(text)
    try:
        (tmp_path / "config.json").symlink_to(target)
    except OSError:
        pytest.skip("no symbolic links here")
    return target


def test_a_link_is_written_through(settings, tmp_path):
    target = linked(tmp_path, '{"enabled": false, "retention_days": 90}')
    made = settings()
    made.save(enabled=True)
    assert (tmp_path / "config.json").is_symlink()
    assert json.loads(target.read_text()) == {"enabled": True, "retention_days": 90}
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_link_that_leads_nowhere(settings, tmp_path):
    """Its drive may not be there yet: that is no first start, whose defaults would remove jobs."""
    target = linked(tmp_path)
    made = settings()
    assert (made.enabled, made.retention_days) == (False, None)
    assert not target.exists()
    target.write_text('{"enabled": true, "retention_days": 90}')
    made.refresh()
    assert (made.enabled, made.retention_days) == (True, 90)
    target.unlink()
    made.save(retention_days=7)
    assert json.loads(target.read_text()) == {"enabled": True, "retention_days": 7}


IN_MOUNT = """
import json, sys
sys.path.insert(0, sys.argv[2])
from inside import load_script
settings = load_script().Settings(sys.argv[1], {})
settings.save(retention_days=7)
settings.save(enabled=True, retention_days=None)
settings.refresh()
print(json.dumps([settings.enabled, settings.retention_days]))
"""


def test_a_file_that_is_mounted_by_itself(tmp_path):
    """As containers do it. It cannot be replaced, so it is written in place."""
    outside = tmp_path / "outside.json"
    outside.write_text('{"enabled": false, "retention_days": 90, "comment": "' + "x" * 200 + '"}')
    folder = tmp_path / "extension"
    folder.mkdir()
    (folder / "config.json").touch()
    mount = f"mount --bind {outside} {folder}/config.json"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-m", "sh", "-c", mount], stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("a file can be mounted by root on Linux only")
    python = [sys.executable, "-c", IN_MOUNT, str(folder), str(TESTS / "support")]
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *python]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    assert json.loads(done.stdout.decode()) == [True, None]
    assert json.loads(outside.read_text()) == {"enabled": True, "retention_days": None, "comment": "x" * 200}
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("length", [10, 1000])
def test_writing_in_place_fails_whole(script, tmp_path, monkeypatch, length):
    """The old content is there again when the disk does not take the new."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "sync_file", full)
    with pytest.raises(OSError):
        script.overwrite_file(str(path), b"y" * length)
    assert path.read_bytes() == b"x" * 100
    monkeypatch.undo()
    script.overwrite_file(str(path), b"y" * length)
    assert path.read_bytes() == b"y" * length


# Where the data lie


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("/data/jobs", "/data/jobs"),
        (' "/data/my jobs" ', "/data/my jobs"),
        ("'/data/jobs'", "/data/jobs"),
        ("~/jobs", "/home/me/jobs"),
        ('"~/jobs"', "/home/me/jobs"),
        ("~", "/home/me"),
        ('""', None),
        (" ", None),
    ],
)
def test_folder_for_the_data(script, tmp_path, monkeypatch, caplog, text, folder):
    monkeypatch.setenv("HOME", "/home/me")
    made = script.Settings(str(tmp_path), {"TRACKER_DATA_DIR": text})
    assert made.data_folder == (folder or str(tmp_path))
    assert not caplog.records


@pytest.mark.parametrize("text", ["$HOME/jobs", "jobs", "./jobs", '"/data/jobs', "~nobody-of-this-name/jobs"])
def test_a_folder_that_is_not_absolute_is_warned_of(script, tmp_path, caplog, text):
    made = script.Settings(str(tmp_path), {"TRACKER_DATA_DIR": text})
    assert made.data_folder == os.path.abspath(text)
    assert "TRACKER_DATA_DIR" in caplog.text and made.data_folder in caplog.text


# One row of the table for each setting


def mode(text):
    if text not in ("all", "off"):
        raise ValueError("it must be all or off")
    return text


@pytest.mark.parametrize(("text", "value"), [(None, "all"), ("", "all"), (" off ", "off"), ("maybe", "all")])
def test_a_setting_that_only_a_variable_has(script, settings, monkeypatch, caplog, text, value):
    """It needs a row, and nothing else."""
    row = script.Setting("mode", "all", "TRACKER_MODE", mode)
    monkeypatch.setattr(script, "SETTINGS", (*script.SETTINGS, row))
    made = settings('{"mode": "off"}', **({} if text is None else {"TRACKER_MODE": text}))
    assert made.mode == value and made.locked == ({"mode": "TRACKER_MODE"} if value == "off" else {})
    assert ("TRACKER_MODE='maybe' is invalid, so it is ignored" in caplog.text) == (text == "maybe")
    with pytest.raises(ValueError, match="no setting"):
        made.save(mode="off")


# Our predecessor


@pytest.mark.parametrize(("days", "kept"), [(7, 7), (0, None)])
def test_settings_of_the_predecessor(settings, config, caplog, days, kept):
    caplog.set_level(logging.INFO, "job_tracker")
    made = settings(json.dumps({"tracking_enabled": True, "retention_days": days}))
    assert (made.enabled, made.retention_days) == (True, kept)
    assert config() == {"enabled": True, "retention_days": days}
    made.refresh()
    assert caplog.text.count("is taken over") == 1


def test_changes_at_run_time_are_in_the_log(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO, "job_tracker")
    made = settings('{"enabled": true}')
    assert not caplog.records
    made.save(enabled=False)
    (tmp_path / "config.json").write_text('{"enabled": true}')
    made.refresh()
    assert [record.getMessage() for record in caplog.records] == ["Tracking is off now", "Tracking is on now"]


def test_what_was_written_at_the_moment_of_a_save_is_seen(settings, script, tmp_path):
    made = settings('{"retention_days": 5}')
    replace_file = script.replace_file

    def replace_and_lose(path, data):
        replace_file(path, data)
        (tmp_path / "config.json").write_text('{"enabled": true, "retention_days": 99}')

    script.replace_file = replace_and_lose
    made.save(enabled=False)
    script.replace_file = replace_file
    made.refresh()
    assert (made.enabled, made.retention_days) == (True, 99)


def test_what_another_wrote_is_seen(settings, tmp_path):
    made = settings('{"enabled": false, "retention_days": 5}')
    (tmp_path / "new").write_text('{"enabled": true, "retention_days": 6}')
    os.replace(str(tmp_path / "new"), str(tmp_path / "config.json"))
    made.refresh()
    assert (made.enabled, made.retention_days) == (True, 6)


def test_a_change_is_seen_whatever_its_time(settings, tmp_path):
    """Some file systems count in seconds, and a copy may bring its own time."""
    path = tmp_path / "config.json"
    made = settings('{"retention_days": 5}')
    before = path.stat()
    path.write_text('{"retention_days": 6}')
    os.utime(str(path), ns=(before.st_atime_ns, before.st_mtime_ns))
    made.refresh()
    assert made.retention_days == 6


def test_many_writers_leave_a_whole_file(settings, config):
    made = settings("{}")
    threads = [threading.Thread(target=made.save, kwargs={"retention_days": float(days)}) for days in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert config()["retention_days"] == made.retention_days in range(1, 21)


def test_the_installer_makes_nothing(tmp_path):
    """It cannot know where: that is for the extension to say."""
    folder = tmp_path / "extension"
    folder.mkdir()
    shutil.copy(str(PROJECT / "install.py"), str(folder))
    environ = {**os.environ, "TRACKER_DATA_DIR": '"~/my jobs"'}
    subprocess.run([sys.executable, str(folder / "install.py")], cwd=str(tmp_path), env=environ, check=True)
    assert [path.name for path in tmp_path.glob("**/*")] == ["extension", "install.py"]


# Random changes of valid files


LOADED = load_script()


@hypothesis_settings(max_examples=fewer(300), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(
        [b'{"enabled": true, "retention_days": 7}', b'{\n    "enabled": false,\n    "retention_days": null\n}\n']
    ),
    st.lists(MUTATION, min_size=1, max_size=3),
)
def test_any_config(tmp_path_factory, data, mutations):
    """It never raises, and what it cannot read it sets aside, as it was."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "config.json"
    path.write_bytes(mutated(data, mutations))
    before = path.read_bytes()
    made = LOADED.Settings(str(folder), {})
    assert made.enabled in (True, False)
    assert made.retention_days is None or made.retention_days >= 0
    made.save(enabled=True)
    assert json.loads(path.read_text())["enabled"] is True
    try:
        readable = isinstance(json.loads(before.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        readable = False
    assert [other.read_bytes() for other in folder.glob("config.json.damaged-*")] == ([] if readable else [before])
