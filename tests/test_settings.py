"""config.json and the environment's variables."""

import errno
import json
import logging
import os
import threading

import pytest
from inside import load_script

from harness import body, until


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


@pytest.mark.parametrize(
    ("text", "enabled", "days"),
    [
        ('{"enabled": true, "retention_days": 7}', True, 7),
        ('{"enabled": true}', True, 30),
        ('{"retention_days": 0.5}', False, 0.5),
        ('{"retention_days": null}', False, None),
        ('{"retention_days": 0}', False, None),
        ("\ufeff" + '{"enabled": true}', True, 30),
        ("{}", False, 30),
    ],
)
def test_values(settings, text, enabled, days):
    made = settings(text)
    assert (made.enabled, made.retention_days) == (enabled, days)


@pytest.mark.parametrize("value", ['"7"', "-1", "true", "[]", "NaN", "Infinity", "1e999", '"off"'])
def test_a_value_that_is_none_is_a_warning_and_the_default_holds(settings, caplog, value):
    with caplog.at_level(logging.WARNING, "job_tracker"):
        made = settings('{"enabled": true, "retention_days": ' + value + "}")
    assert (made.enabled, made.retention_days) == (True, 30)
    assert "retention_days" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', b"\xff\xfe", "[" * 100_000, b"\0" * 100], ids=repr)
def test_a_broken_file_is_set_aside(settings, tmp_path, config, caplog, text):
    with caplog.at_level(logging.WARNING, "job_tracker"):
        made = settings(text)
    assert (made.enabled, made.retention_days) == (False, 30)
    aside = list(tmp_path.glob("config.json.damaged-*"))
    assert len(aside) == 1
    assert aside[0].read_bytes() == (text if isinstance(text, bytes) else text.encode())
    assert config() == {"enabled": False, "retention_days": 30}
    assert aside[0].name in caplog.text


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


@pytest.mark.parametrize(
    "environ",
    [
        {"TRACKER_ENABLED": "maybe"},
        *({"TRACKER_RETENTION": text} for text in ("-1", "seven", "nan", "inf", "7d", "1,5")),
    ],
    ids=str,
)
def test_a_variable_that_cannot_be_read_is_a_warning_and_ignored(settings, caplog, environ):
    with caplog.at_level(logging.WARNING, "job_tracker"):
        made = settings('{"enabled": true, "retention_days": 5}', **environ)
    assert (made.enabled, made.retention_days, made.locked) == (True, 5, {})
    assert next(iter(environ)) in caplog.text


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

    def stat(self, path):
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


def test_a_file_that_an_editor_is_writing(settings, script, tmp_path):
    """It is empty for a moment."""
    made = settings('{"enabled": false}')
    path = tmp_path / "config.json"
    path.write_text("")

    class Time:
        def sleep(self, seconds):
            path.write_text('{"enabled": true}')

    script.time = Time()
    made.refresh()
    assert made.enabled is True
    assert [one.name for one in tmp_path.iterdir()] == ["config.json"]


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


def test_numbers_that_are_none_for_json_stay_text(settings, tmp_path):
    settings('{"enabled": true, "x": 1e999, "y": [-1e400], "z": 1e5}').save(retention_days=5)
    written = json.loads((tmp_path / "config.json").read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert written == {"enabled": True, "retention_days": 5, "x": "1e999", "y": ["-1e400"], "z": 1e5}


def test_what_another_wrote_is_seen(settings, tmp_path):
    made = settings('{"enabled": false, "retention_days": 5}')
    (tmp_path / "new").write_text('{"enabled": true, "retention_days": 6}')
    os.replace(str(tmp_path / "new"), str(tmp_path / "config.json"))
    made.refresh()
    assert (made.enabled, made.retention_days) == (True, 6)
    (tmp_path / "config.json").unlink()
    made.refresh()
    assert (made.enabled, made.retention_days) == (False, 30)


def test_many_writers_leave_a_whole_file(settings, config):
    made = settings("{}")
    threads = [threading.Thread(target=made.save, kwargs={"retention_days": float(days)}) for days in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert config()["retention_days"] == made.retention_days in range(1, 21)


def test_config_json_counts_without_a_restart(start):
    webui = start("--nowebui", tracking=None)
    assert "x-job-id" not in webui.post(body()).headers
    path = webui.extension / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "enabled": True}))
    until(lambda: "x-job-id" in webui.post(body()).headers, 15)


def test_the_folder_for_the_data(start, tmp_path):
    webui = start("--nowebui", environ={"TRACKER_DATA_DIR": str(tmp_path / "volume" / "jobs")})
    job_id = webui.post(body()).headers["x-job-id"]
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    assert job_id in webui.records()
    assert len(webui.images()) == 2
    assert sorted(os.listdir(str(webui.extension))) == ["config.json", "install.py", "scripts"]
