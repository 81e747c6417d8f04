"""What schemathesis does before each request. Most of its IDs become those of jobs that there are."""

import os
import random
import re

import schemathesis
from schemathesis import GenerationMode

IDS, ENDED = (os.environ[name].split(",") for name in ("JOB_IDS", "ENDED_JOB_IDS"))
chance = random.Random(7)


@schemathesis.hook
def before_load_schema(context, raw_schema):
    """That a parameter can be left out is described as null by pydantic 2, which no URL can say."""
    for methods in raw_schema["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                for kind in parameter["schema"].pop("anyOf", []):
                    if kind != {"type": "null"}:
                        parameter["schema"].update(kind)


@schemathesis.hook
def before_call(context, case, kwargs):
    path, query = case.path_parameters, case.query
    mode = case.meta.generation.mode  # which is found anew after a change
    if "id" in path and chance.random() < 0.8:
        # The events of a job that is held have no end.
        path["id"] = chance.choice(ENDED if case.operation.label.endswith("/events") else IDS)
    if isinstance(path.get("n"), int) and path["n"] > 3:
        path["n"] %= 3
    if isinstance(query.get("wait"), (int, float)) and 0 < query["wait"] <= 300:
        query["wait"] /= 3000

    # A URL says nothing of an empty list, and of another the last item counts. So something else is wrong instead.
    if case.operation.label in ("GET /sdapi/v1/jobs", "DELETE /sdapi/v1/jobs"):
        unsaid = [name for name, value in query.items() if value is None or isinstance(value, (list, dict))]
        if unsaid:
            query.update(dict.fromkeys(unsaid, ""), after="many")
            case.meta.generation.mode = mode
    # What is for many jobs asks for none of those that the other requests need. No filter at all is refused, of which
    # the description of a query can say nothing.
    if case.operation.label == "DELETE /sdapi/v1/jobs":
        query.setdefault("ip", "nobody")
        case.meta.generation.mode = mode
    if case.operation.label == "POST /sdapi/v1/jobs/cancel" and mode.is_positive:
        case.body["ip"] = "nobody"
        case.meta.generation.mode = mode

    # Matters of taste. To JSON Schema 1.0 is an integer, to a reader of URLs it is not.
    for values in (path, query):
        for name in {"n", "limit"} & set(values):
            if re.fullmatch(r"\d+\.0", str(values[name])):
                values[name] = str(values[name])[:-2]
    # To a reader of URLs, 0 and 1 are booleans. The example of an answer's `images` is none for this parameter.
    # Parameters that nobody knows are ignored, as is usual.
    for name in {"images", "preview"} & set(query):
        if str(query[name]) in ("0", "1") or "iVBOR" in str(query[name]):
            query[name] = "true"
            case.meta.generation.mode = GenerationMode.POSITIVE
    if query.pop("x-schemathesis-unknown-property", None) is not None:
        case.meta.generation.mode = GenerationMode.POSITIVE
    # Only a Link header has a valid cursor, of which the description knows nothing.
    if "cursor" in query:
        if mode.is_positive:
            del query["cursor"]
        case.meta.generation.mode = mode
