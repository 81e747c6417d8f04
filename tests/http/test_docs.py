"""The API describes itself, in /docs and /openapi.json, and is as it says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

import environment
from harness import MODES, QUICK, TESTS, body

pytestmark = pytest.mark.one_mode

ROUTES = {
    ("/sdapi/v1/job/{id}", "get"),
    ("/sdapi/v1/job/{id}", "delete"),
    ("/sdapi/v1/job/{id}/cancel", "post"),
    ("/sdapi/v1/job/{id}/retry", "post"),
    ("/sdapi/v1/job/{id}/images/{n}", "get"),
    ("/sdapi/v1/job/{id}/preview", "get"),
    ("/sdapi/v1/job/{id}/events", "get"),
    ("/sdapi/v1/jobs", "get"),
    ("/sdapi/v1/jobs", "delete"),
    ("/sdapi/v1/jobs/cancel", "post"),
    ("/sdapi/v1/jobs/stats", "get"),
}


@pytest.fixture(scope="session", params=[False, True], ids=["open", "api-auth"])
def document(request, pool) -> Dict[str, Any]:
    return pool.get("tracked", MODES[-1], auth=request.param).client.get("/openapi.json").json()


def operations(document: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    for path, method in sorted(ROUTES):
        yield document["paths"][path][method]


def test_every_route_is_there(document):
    ours = {
        (path, method)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if "Job Tracker" in operation.get("tags", [])
    }
    assert ours == ROUTES
    for operation in operations(document):
        assert operation["description"] and operation["summary"]
        for parameter in operation.get("parameters", []):
            assert parameter.get("description") or "enum" in str(parameter["schema"]), parameter["name"]


def test_every_answer_is_there(document):
    statuses = {
        (path, method): set(document["paths"][path][method]["responses"]) - {"401", "404", "422", "503"}
        for path, method in ROUTES
    }
    assert statuses == {
        ("/sdapi/v1/job/{id}", "get"): {"200"},
        ("/sdapi/v1/job/{id}", "delete"): {"204", "403", "409"},
        ("/sdapi/v1/job/{id}/cancel", "post"): {"200", "202", "403", "409"},
        ("/sdapi/v1/job/{id}/retry", "post"): {"202", "403", "409", "410", "429"},
        ("/sdapi/v1/job/{id}/images/{n}", "get"): {"200", "304"},
        ("/sdapi/v1/job/{id}/preview", "get"): {"200", "304"},
        ("/sdapi/v1/job/{id}/events", "get"): {"200", "204"},
        ("/sdapi/v1/jobs", "get"): {"200"},
        ("/sdapi/v1/jobs", "delete"): {"200", "403"},
        ("/sdapi/v1/jobs/cancel", "post"): {"200", "403"},
        ("/sdapi/v1/jobs/stats", "get"): {"200"},
    }
    images = document["paths"]["/sdapi/v1/job/{id}/images/{n}"]["get"]["responses"]["200"]
    assert {"image/png", "image/jpeg", "image/webp"} <= set(images["content"])
    assert "application/json" not in images["content"]
    assert {"ETag", "Cache-Control"} <= set(images["headers"])
    events = document["paths"]["/sdapi/v1/job/{id}/events"]["get"]["responses"]["200"]
    assert set(events["content"]) == {"text/event-stream"}
    assert "Link" in document["paths"]["/sdapi/v1/jobs"]["get"]["responses"]["200"]["headers"]


def test_every_filter_is_there(document):
    """In the same words wherever there are some. What is done to many jobs wants each text to have a character."""
    filters = {"ip", "status", "type", "after", "before", "label", "q"}
    jobs = document["paths"]["/sdapi/v1/jobs"]
    listed, deleted = ({one["name"]: one for one in jobs[method]["parameters"]} for method in ("get", "delete"))
    assert set(listed) == filters | {"limit", "cursor"} and set(deleted) == filters
    for name in filters:
        text = {"minLength": 1} if listed[name]["schema"]["type"] == "string" else {}
        assert deleted[name] == {**listed[name], "schema": {**listed[name]["schema"], **text}}
    cancel = document["paths"]["/sdapi/v1/jobs/cancel"]["post"]["requestBody"]
    assert cancel["required"]
    schema = cancel["content"]["application/json"]["schema"]
    assert schema["properties"] == {
        name: {"description": one["description"], **one["schema"]} for name, one in deleted.items()
    }
    assert (schema["additionalProperties"], schema["minProperties"]) == (False, 1)
    assert listed["status"]["schema"]["enum"] == ["Pending", "Processing", "Completed", "Failed"]
    assert listed["after"]["schema"] == {"type": "number"}
    assert (listed["q"]["schema"]["maxLength"], listed["label"]["schema"]["maxLength"]) == (500, 255)


@pytest.mark.parametrize("kind", ["txt2img", "img2img"])
def test_what_can_be_added_to_a_generation(document, kind):
    operation = document["paths"][f"/sdapi/v1/{kind}"]["post"]
    headers = {one["name"]: one for one in operation["parameters"] if one["in"] == "header"}
    assert set(headers) == {"Prefer", "Idempotency-Key", "X-Job-Label", "X-Job-Webhook"}
    assert headers["X-Job-Label"]["schema"]["maxLength"] == 255
    refused = operation["responses"]["422"]
    assert "header" in refused["description"] and "application/json" in refused["content"]
    for one in headers.values():  # Swagger UI fills these in and sends them: each try would be the same generation
        assert not {"example", "examples"} & {*one, *one["schema"]} and "default" not in one["schema"]
    assert {"X-Job-ID", "Idempotent-Replayed"} <= set(operation["responses"]["200"]["headers"])
    accepted = operation["responses"]["202"]
    assert {"X-Job-ID", "Location", "Preference-Applied"} <= set(accepted["headers"])
    assert accepted["content"]["application/json"]["schema"]["$ref"].endswith("/JobSummary")
    assert "requestBody" in operation  # the webui's own description is still there
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("Response")


def examples(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        if "example" in value and "schema" in value:
            yield value["schema"], value["example"]
        for one in value.values():
            yield from examples(one)


def check(document: Dict[str, Any], schema: Dict[str, Any], value: Any) -> None:
    """That a value is as a schema says, as far as our models go."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        types = {one.get("type") for one in schema["anyOf"]}
        assert (value is None) <= ("null" in types)
        schema = next(one for one in schema["anyOf"] if one.get("type") != "null")
        if value is not None:
            check(document, schema, value)
        return
    if schema.get("nullable") and value is None:
        return
    if "allOf" in schema:
        check(document, schema["allOf"][0], value)
        return
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    assert isinstance(value, kinds[schema["type"]]), (schema, value)
    assert value in schema.get("enum", [value])
    if schema["type"] == "array":
        for one in value:
            check(document, schema["items"], one)
    for name, kind in schema.get("properties", {}).items():
        if name in schema.get("required", []) or name in value:
            check(document, kind, value[name])


def test_examples(document, webui):
    """There is one for each answer of ours in JSON, it fits its model, and it has all that a real answer has."""
    ours = [*operations(document), document["paths"]["/sdapi/v1/txt2img"]["post"]]
    found = [pair for operation in ours for pair in examples(operation)]
    for schema, example in found:
        check(document, schema, example)
    for operation in operations(document):
        for status in {"200", "202", "403", "409", "410"} & set(operation["responses"]):
            answer = operation["responses"][status].get("content", {}).get("application/json")
            assert answer is None or "example" in answer
    job_id = webui.post(body(), headers={"X-Job-Label": "album 7"}).headers["x-job-id"]
    real = webui.job(job_id, wait=30)
    example = document["paths"]["/sdapi/v1/job/{id}"]["get"]["responses"]["200"]["content"]["application/json"][
        "example"
    ]
    null = {"error", "queue_position", "progress", "eta", "retry_of"}  # FastAPI leaves them out of an example
    assert set(example) | null == set(real)
    check(document, {"$ref": "#/components/schemas/JobWithImages"}, real)
    schema = document["components"]["schemas"]["JobWithImages"]
    assert set(schema["properties"]) == set(real)
    check(document, {"$ref": "#/components/schemas/JobStats"}, webui.client.get("/sdapi/v1/jobs/stats").json())


def test_page(webui):
    page = webui.client.get("/docs")
    assert page.status_code == 200 and "swagger" in page.text.lower()


def test_wrong_methods(webui):
    for path, methods in {
        "/sdapi/v1/job/AAAAAAAA": ("POST", "PUT", "PATCH"),
        "/sdapi/v1/jobs": ("POST", "PUT", "PATCH"),
        "/sdapi/v1/jobs/cancel": ("GET", "PUT", "PATCH", "DELETE"),
        "/sdapi/v1/jobs/stats": ("POST", "PUT", "PATCH", "DELETE"),
        "/sdapi/v1/job/AAAAAAAA/cancel": ("GET", "PUT", "PATCH", "DELETE"),
        "/sdapi/v1/job/AAAAAAAA/retry": ("GET", "PUT", "PATCH", "DELETE"),
        "/sdapi/v1/job/AAAAAAAA/preview": ("POST", "PUT", "PATCH", "DELETE"),
        "/sdapi/v1/job/AAAAAAAA/events": ("POST", "PUT", "PATCH", "DELETE"),
        "/sdapi/v1/job/AAAAAAAA/images/0": ("POST", "PUT", "PATCH", "DELETE"),
    }.items():
        for method in methods:
            answer = webui.client.request(method, path)
            assert answer.status_code == 405
            allowed = set(answer.headers["allow"].split(", "))
            assert allowed and method not in allowed
            assert answer.json()["detail"]


# By programs that are made for it


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the programs, in an environment of their own."""
    try:
        return Path(environment.ensure("schemathesis")).parent
    except SystemExit as reason:
        pytest.skip(f"schemathesis cannot be installed here: {reason}")


def run(command: List[str], **environ: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", env={**os.environ, **environ}
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_document_is_valid(programs, document, tmp_path):
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    assert run([str(programs / "python"), "-m", "openapi_spec_validator", str(tmp_path / "openapi.json")])


CONFIG = """
[checks]
# 409 and 410 are said of jobs that there are, of which the description knows nothing.
positive_data_acceptance.expected-statuses = ["2xx", 401, 404, 409, 410]
"""


@pytest.mark.all_only
def test_schemathesis(programs, start, tmp_path):
    """Hundreds of requests as the description allows them, and as it does not: no answer that it does not tell of."""
    webui = start(*QUICK, "--api-auth", "user:secret")

    def submit(count: int, **standin: Any) -> List[str]:
        asynchronous = {"Prefer": "respond-async"}
        return [webui.post(body(standin=standin), headers=asynchronous).headers["x-job-id"] for _ in range(count)]

    jobs = submit(20) + submit(3, fail="RuntimeError", fail_after=1)
    for job_id in jobs:
        webui.job(job_id, wait=30)
    ended = ",".join(jobs)
    log_before = len(webui.log)  # of those that failed it has a traceback each
    jobs += submit(6, hold=webui.gate())
    (tmp_path / "config.toml").write_text(CONFIG)
    said = run(
        [
            *(str(programs / "schemathesis"), "--config-file", str(tmp_path / "config.toml")),
            *("run", f"{webui.url}/openapi.json", "--include-tag", "Job Tracker", "--auth", "user:secret"),
            # Credentials are tested with each route.
            *("--exclude-checks", "ignored_auth", "--generation-with-security-parameters", "false"),
            *("--max-examples", "25", "--phases", "examples,coverage,fuzzing", "--continue-on-failure"),
            *("--seed", "7", "--generation-database", "none", "--suppress-health-check", "all", "--no-color"),
            *("--report", "har", "--report-har-path", str(tmp_path / "said.har")),
        ],
        SCHEMATHESIS_HOOKS="fuzz_hooks",
        PYTHONPATH=str(TESTS / "support"),
        JOB_IDS=",".join(jobs),
        ENDED_JOB_IDS=ended,
    )
    assert f"{len(ROUTES)} selected" in said and f"Tested: {len(ROUTES)}" in said
    entries = json.loads((tmp_path / "said.har").read_text(encoding="utf-8"))["log"]["entries"]
    got = {(entry["request"]["method"], entry["response"]["status"]) for entry in entries}
    assert {("GET", 200), ("GET", 404), ("GET", 422), ("DELETE", 204), ("DELETE", 409)} <= got
    assert {("POST", 200), ("POST", 409), ("POST", 404)} <= got
    assert "Traceback" not in webui.log[log_before:]
