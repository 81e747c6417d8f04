"""config.json and the variables, as a webui starts with them and while it runs."""

from __future__ import annotations

import json
import os

import pytest

from harness import body, until


def test_config_json_counts_without_a_restart(start):
    webui = start("--nowebui", tracking=None, constants={"LOOK_EVERY": 0.2})
    assert "x-job-id" not in webui.post(body()).headers
    path = webui.extension / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "enabled": True}))
    until(lambda: "x-job-id" in webui.post(body()).headers, 15)


@pytest.mark.parametrize("flags", [(), ("--skip-install",)], ids=["install.py", "--skip-install"])
def test_the_first_start_makes_the_files(start, tmp_path, flags):
    """Where the extension looks for them; what is there already stays as it is."""
    webui = start(
        "--nowebui", *flags, tracking=None, environ={"HOME": str(tmp_path), "TRACKER_DATA_DIR": '"~/my jobs"'}
    )
    data = tmp_path / "my jobs"
    until(lambda: (data / "jobs.json").exists())
    assert (data / "jobs.json").read_text() == "{\n}\n" and (data / "images").is_dir()
    assert sorted(os.listdir(str(webui.extension))) == ["config.json", "install.py", "scripts"]
    text = '{"enabled": true, "retention_days": 12}'
    webui.write_config(text)
    webui.restart()
    assert (webui.extension / "config.json").read_text() == text


def test_the_folder_for_the_data(start, tmp_path):
    webui = start("--nowebui", environ={"TRACKER_DATA_DIR": str(tmp_path / "volume" / "jobs")})
    job_id = webui.post(body()).headers["x-job-id"]
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    assert job_id in webui.records()
    assert len(webui.images()) == 2
    assert sorted(os.listdir(str(webui.extension))) == ["config.json", "install.py", "scripts"]
