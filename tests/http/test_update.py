"""An update by the webui's Extensions page: `git fetch` and `git reset --hard`, done by git itself."""

import shutil
import subprocess

import pytest

from harness import PROJECT, body

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def git(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout.decode()


def kept(webui):
    files = [webui.extension / "config.json", webui.extension / "jobs.json", *webui.images()]
    return {str(path.relative_to(webui.extension)): path.read_bytes() for path in files}


def test_an_update_loses_nothing(start, tmp_path):
    origin = tmp_path / "origin"
    git(tmp_path, "init", "-q", str(origin))
    for name in ("scripts", "install.py", ".gitignore", "LICENSE"):
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(str(source), str(origin / name), ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(str(source), str(origin / name))
    git(origin, "add", "-A")
    git(origin, "commit", "-q", "-m", "one version")

    def install(webui):
        shutil.rmtree(str(webui.extension))
        git(tmp_path, "clone", "-q", str(origin), str(webui.extension))

    webui = start("--nowebui", prepare=install)
    (webui.extension / "config.json").write_text('{"enabled": true, "retention_days": 12}')
    webui.restart()
    jobs = {response.headers["x-job-id"]: response.json() for response in (webui.post(body(str(n))) for n in range(3))}
    for job_id in jobs:
        webui.job(job_id, wait=30)
    webui.kill()
    assert git(webui.extension, "status", "--porcelain") == ""
    before = kept(webui)
    assert {"config.json", "jobs.json"} < set(before)

    with (origin / "scripts" / "job_tracker.py").open("a") as file:
        file.write("\n# the next version\n")
    git(origin, "commit", "-q", "-a", "-m", "the next version")
    git(webui.extension, "fetch", "--all", "-q")
    git(webui.extension, "reset", "--hard", "origin")
    assert "# the next version" in (webui.extension / "scripts" / "job_tracker.py").read_text()
    assert kept(webui) == before

    webui.start()
    for job_id, answer in jobs.items():
        job = webui.job(job_id)
        assert (job["status"], job["images"], job["info"]) == ("Completed", answer["images"], answer["info"])
    assert "x-job-id" in webui.post(body()).headers
    assert git(webui.extension, "status", "--porcelain") == ""


def test_the_project_tracks_no_file_of_the_user():
    tracked = git(PROJECT, "ls-files", "config.json", "jobs.json", "images").split()
    assert tracked == []
