"""Lists and polls carry no picture of a request, though the webui gives it back in `parameters`."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import Any, Dict

import pytest
from inside import an_answer, load_script, make_tracker

from harness import QUICK, Webui, body, until

SIZE = 1_000_000


@pytest.fixture(scope="module")
def webui(start_shared: Any) -> Webui:
    return start_shared(*QUICK)


def with_picture(**fields: Any) -> Dict[str, Any]:
    """A request with a picture for a script, as for ControlNet."""
    return body(standin={"comment": {"image": "A" * SIZE}}, **fields)


def longest_text(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return max(map(longest_text, [*value, *value.values()]), default=0)
    return max(map(longest_text, value), default=0) if isinstance(value, list) else 0


def test_lists_and_polls_are_small(webui):
    answers = [webui.post(with_picture()) for _ in range(5)]
    jobs = [webui.job(answer.headers["x-job-id"], wait=30) for answer in answers]
    for answer, job in zip(answers, jobs):
        assert longest_text(job["parameters"]) == SIZE and job["parameters"] == answer.json()["parameters"]
    listed = webui.client.get("/sdapi/v1/jobs", params={"limit": 5})
    assert len(listed.content) < 50_000
    ways = [
        *zip(listed.json(), reversed(jobs)),
        *((webui.job(job["id"], images=False), job) for job in jobs),
        *((webui.job(job["id"], wait=1, images=False), job) for job in jobs[:1]),
    ]
    for brief, whole in ways:
        assert longest_text(brief["parameters"]) <= 1000
        script = brief["parameters"]["alwayson_scripts"]["Stand-in"]["args"][0]
        assert script == {"comment": {"image": "(1,000,000 characters)"}}
        rest = ("alwayson_scripts",)
        assert {name: value for name, value in brief["parameters"].items() if name not in rest} == {
            name: value for name, value in whole["parameters"].items() if name not in rest
        }
        assert brief["info"] == whole["info"]


def test_a_repeat_that_does_not_wait_is_small(webui):
    headers = {"Idempotency-Key": str(uuid.uuid4()), "Prefer": "respond-async"}
    job_id = webui.post(with_picture(), headers=headers).headers["x-job-id"]
    webui.job(job_id, wait=30)
    repeat = webui.post(with_picture(), headers=headers)
    assert repeat.status_code == 202 and repeat.json()["status"] == "Completed"
    assert longest_text(repeat.json()["parameters"]) <= 1000
    headers["Prefer"] = "respond-async, wait=5"
    assert longest_text(webui.post(with_picture(), headers=headers).json()["parameters"]) == SIZE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has read")
def test_a_list_does_not_read_them(webui):
    job_ids = [webui.post(with_picture()).headers["x-job-id"] for _ in range(5)]
    webui.job(job_ids[-1], wait=30)
    until(webui.is_idle)

    def read() -> int:
        fields = dict(line.split(": ") for line in Path(f"/proc/{webui.pid}/io").read_text().splitlines())
        return int(fields["rchar"])

    before = read()
    webui.jobs(limit=5)
    webui.job(job_ids[0], images=False)
    assert read() - before < SIZE / 2
    before = read()
    webui.job(job_ids[0])
    assert read() - before > SIZE, "this one has it"


def test_they_go_with_the_job(webui):
    job_id = webui.post(with_picture()).headers["x-job-id"]
    webui.job(job_id, wait=30)
    names = [path.name for path in webui.images() if path.name.startswith(job_id)]
    assert names == [f"{job_id}.brief.json", f"{job_id}.json", f"{job_id}_0.png"]
    until(lambda: webui.client.delete(f"/sdapi/v1/job/{job_id}").status_code == 204)
    assert not [path for path in webui.images() if path.name.startswith(job_id)]
    small = webui.post(body()).headers["x-job-id"]
    webui.job(small, wait=30)
    assert not [path for path in webui.images() if path.name.startswith(f"{small}.brief")]


@pytest.mark.parametrize(
    "parameters, brief",
    [
        ({"a": "x" * 1000}, {"a": "x" * 1000}),
        ({"a": "x" * 1001}, {"a": "(1,001 characters)"}),
        ({"a": ["x" * 2000, {"b": ["x" * 3000]}]}, {"a": ["(2,000 characters)", {"b": ["(3,000 characters)"]}]}),
        ({"x" * 2000: 1}, {"(2,000 characters)": 1}),
        ({"a": None, "b": [1, 2.5, True], "c": {}, "d": []}, {"a": None, "b": [1, 2.5, True], "c": {}, "d": []}),
        (None, None),
        ("x" * 2000, "(2,000 characters)"),
        (["\ud800" * 1001, "\U0001f3a8" * 1001], ["(1,001 characters)"] * 2),
    ],
    ids=lambda value: str(value)[:40],
)
def test_brief_parameters(script, parameters, brief):
    before = json.dumps(parameters)
    assert script.brief_parameters(parameters) == brief
    assert json.dumps(parameters) == before, "the original is as it was"


def test_brief_parameters_however_deep(script):
    parameters: Any = {"seed": 7}
    for _ in range(5000):
        parameters = [parameters]
    brief = script.brief_parameters({"seed": 7, "deep": parameters})
    assert brief["seed"] == 7
    assert json.dumps(brief).endswith('"(1 entries)"' + "]" * (script.BRIEF_DEPTH) + "}")


def test_parameters_too_deep_for_a_brief_answer_cost_no_image(tmp_path, monkeypatch):
    """Python may read what it cannot write again."""
    script = load_script()
    images = script.ImageStore(str(tmp_path))
    job = script.Job("AAAAAAAA", "txt2img", script.COMPLETED, 1736712000, None, "")
    rest = json.dumps({"images": [], "parameters": {"mask": "x" * 2000}, "info": "{}"}).encode()

    def too_deep(data: Any) -> bytes:
        raise RecursionError

    monkeypatch.setattr(script, "as_host_json", too_deep)
    saved = images.save(job, an_answer(script, job.id, 1)._replace(rest=rest))
    assert len(saved.images) == 1 and not saved.has_brief and images.size(images.answer_name(saved)) == len(rest)


def test_jobs_of_earlier_versions(script, tmp_path):
    """Their answer lies there whole only."""
    tracker = make_tracker(script, tmp_path)
    job = script.Job("AAAAAAAA", "txt2img", script.COMPLETED, 1736712000, None, "", finished=1736712001.0)
    rest = json.dumps({"images": [], "parameters": {"mask": "x" * 2000}, "info": "{}"}).encode()
    saved = tracker.images.save(job, an_answer(script, job.id, 1)._replace(rest=rest))
    tracker.images.remove([tracker.images.brief_answer_name(saved)])
    tracker.store.put(saved._replace(has_brief=False), new=True).result()
    job = tracker.get(job.id)
    assert tracker.describe(job)["parameters"] == {"mask": "(2,000 characters)"}
    assert tracker.describe(job, whole=True)["parameters"] == {"mask": "x" * 2000}
    tracker.close()
