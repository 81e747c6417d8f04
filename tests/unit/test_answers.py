"""Answers that are large without their images: they are kept as they are, and shown in brief."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List
from unittest import mock

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from inside import SmallWebui, a_job, an_answer, load_script, make_tracker, pixels, when_ended

from harness import fewer, until

SCRIPT = load_script()
PIECE = 1 << 20  # bytes: at most so much is made at once
TEXTS = ["x" * 996 + 'é\n"' for _ in range(10_000)]  # none of them is shortened


# Places in JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=9), children, max_size=4),
    max_leaves=30,
)
LAYOUT = st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"separators": (" ,\t", "\r\n: ")}])


@hypothesis_settings(max_examples=fewer(300), deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=6), LAYOUT, st.booleans(), st.text('\\"x', max_size=700))
def test_places_of_members(data, layout, ascii_only, text):
    data["text"] = text
    with contextlib.suppress(UnicodeEncodeError):
        encoded = json.dumps(data, ensure_ascii=ascii_only, **layout).encode()
        found = list(SCRIPT.members(encoded))
        assert {name: value for name, value, _, _ in found} == data
        assert {name: json.loads(encoded[start:end].decode()) for name, _, start, end in found} == data


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b'{"a"', b'{"a":', b'{"a":}', b'{"a":1', b'{"a":[1', b'{"a":"x', b'{"a":"x\\', b'{"a":"x\\"}']
    + [b'{"a":1,}', b'{"a":1 "b":2}', b"{1:2}", b'{"a":1,,}', b'{"a" 1}', b'{"a":"' + b"\\" * 70_000, b"nul"]
    + [b"{} x", b'{"a":1} x', b'{"a":1}}', b"{}{}"],
    ids=lambda data: ascii(data[:20]),
)
def test_no_places(data):
    with pytest.raises(ValueError):
        list(SCRIPT.members(data))


@pytest.mark.parametrize(
    "value",
    ['"' + "x" * 3_000_000 + '"', '"' + '\\"' * 1_500_000 + '"', "[" + "[],1," * 600_000 + "1]"],
    ids=lambda value: ascii(value[:20]),
)
def test_places_are_found_in_a_time_that_grows_with_size(value):
    taken = []
    for times in (1, 4):
        data = b'{"a":' + b'{"b":%s}' % (b"[" + b",".join([value.encode()] * times) + b"]") + b"}"
        began = time.thread_time()
        assert [(name, end) for name, _, _, end in SCRIPT.members(data)] == [("a", len(data) - 1)]
        taken.append(time.thread_time() - began)
    assert taken[1] < 8 * taken[0] + 0.1 and taken[1] < 20


# Brief parameters

BIG: Dict[str, Any] = {
    "many texts": ["x" * 999] * 40_000,
    "many texts that are not ASCII": ["\U0001f3a8" * 999] * 1000,
    "many texts in objects": [{"text": "x" * 999, "n": number} for number in range(20_000)],
    "many numbers": list(range(1_000_000)),
    "many names": {f"name {number}": None for number in range(200_000)},
    "many long names": {"x" * 990 + str(number): None for number in range(2000)},
    "many empty lists": [[] for _ in range(300_000)],
    "lists of lists": [[["x" * 50] * 50 for _ in range(50)] for _ in range(50)],
    "two halves": [[1] * 20_000, [2] * 20_000],
    "a long text": "x" * 10_000_000,
}


@pytest.mark.parametrize("name", BIG)
def test_brief_parameters_are_bounded(name):
    scalars = {"prompt": "a lighthouse", "seed": -1, "steps": 20, "send_images": True, "cfg_scale": 7.5, "eta": None}
    parameters = {"first": BIG[name], **scalars, "second": [BIG[name]], "third": {"args": [{"more": BIG[name]}, 1]}}
    brief = SCRIPT.brief_parameters(parameters)
    assert brief != parameters and list(brief) == list(parameters)
    assert {key: brief[key] for key in scalars} == scalars
    assert len(SCRIPT.as_json(brief)) < 1.1 * SCRIPT.BRIEF_SIZE
    alone = SCRIPT.brief_parameters(BIG[name])
    assert alone != BIG[name] and len(SCRIPT.as_json(alone)) < 1.1 * SCRIPT.BRIEF_SIZE


@hypothesis_settings(max_examples=fewer(200), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.text(max_size=9), JSON, max_size=9), st.sampled_from([20, 100, 300, 1 << 16]))
def test_any_brief_parameters(parameters, size):
    before = json.dumps(parameters)
    with mock.patch.object(SCRIPT, "BRIEF_SIZE", size):
        brief = SCRIPT.brief_parameters(parameters)
    assert json.dumps(parameters) == before
    assert brief != parameters or len(before) < 30 * size
    scalars = {key: value for key, value in parameters.items() if not isinstance(value, (str, list, dict))}
    assert {key: brief[key] for key in scalars} == scalars
    if size == 1 << 16:
        assert brief == parameters


def test_notes():
    brief = SCRIPT.brief_parameters({"styles": ["x" * 999] * 40_000, "script_args": {"a": ["y" * 3000, 5]}})
    assert brief == {"styles": "(40,000 entries)", "script_args": {"a": ["(3,000 characters)", 5]}}


# What is kept


def an_answer_of(parameters: Any, info: Any, images: int = 2) -> bytes:
    """An answer as the host writes it."""
    pictures = [base64.b64encode(pixels("x", number)).decode() for number in range(images)]
    data = {"images": pictures, "parameters": parameters, "info": info}
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()


INFO = json.dumps({"prompt": "é" * 100_000, "infotexts": ['"é\n' * 100_000]}, ensure_ascii=False)
ANSWERS: Dict[str, bytes] = {
    "large both": an_answer_of({"prompt": "a", "styles": TEXTS, "send_images": True, "seed": 7}, INFO),
    "large parameters": an_answer_of({"prompt": "a", "styles": TEXTS}, '{"infotexts": ["Seed: 7"]}'),
    "large info": an_answer_of({"prompt": "a", "seed": 7}, INFO),
    "no info": an_answer_of({"prompt": "a", "styles": TEXTS}, None),
    "parameters that are no object": an_answer_of(TEXTS, INFO),
    "no images": an_answer_of({"prompt": "a", "styles": TEXTS}, INFO, images=0),
    "neither": json.dumps({"images": [], "html": "x" * 400_000}, separators=(",", ":")).encode(),
    "another order": json.dumps({"info": INFO, "images": ["QUJD"], "parameters": {"styles": TEXTS}}).encode(),
}


def stored(tracker: Any, answer: bytes) -> Any:
    """A Completed job with such an answer, as the store has it."""
    job = a_job(SCRIPT, random.Random(), status="Processing", prompt="")
    tracker.accept(job, lambda: True, b"").result()
    tracker.start(job.id)
    tracker.finish(job.id, SCRIPT.split_answer(answer))
    return until(lambda: (lambda done: done if done.ended else None)(tracker.get(job.id)))


def page_of(script: Any, tracker: Any) -> Callable[[Any], str]:
    """Gives the tab's HTML with a job open."""
    html = script.TabHtml(tracker, tracker.housekeeper)
    return lambda job: html.render(script.PageState(job=job.id), script.Filter())


def pieces_of(pieces: Iterator[bytes]) -> bytes:
    """All pieces together, none of which is large."""
    made = list(pieces)
    assert max(map(len, made)) <= PIECE
    return b"".join(made)


@pytest.mark.parametrize("name", ANSWERS)
def test_all_looks_at_a_large_answer(tracker, name):
    body = ANSWERS[name]
    answer = json.loads(body.decode())
    job = stored(tracker, body)
    assert job.status == "Completed" and len(job.ranges) == 7
    whole = json.loads(pieces_of(tracker.as_json(job)).decode())
    assert {key: whole[key] for key in ("images", "parameters", "info")} == {
        "parameters": None,
        "info": None,
        **{key: value for key, value in answer.items() if key in ("images", "parameters", "info")},
    }
    brief = json.loads(pieces_of(tracker.as_json(job, images=False)).decode())
    assert "images" not in brief and brief["info"] == answer.get("info")
    assert len(json.dumps(brief["parameters"])) < 1.1 * SCRIPT.BRIEF_SIZE
    assert brief["parameters"] == SCRIPT.brief_parameters(answer.get("parameters"))
    assert brief.keys() == whole.keys() - {"images"}
    if name != "another order":
        assert pieces_of(tracker.images.replay(job)) == body
    else:
        assert json.loads(pieces_of(tracker.images.replay(job)).decode()) == answer


def test_a_small_answer_is_as_before(tracker):
    body = an_answer_of({"prompt": "é", "mask": "x" * 2000, "styles": ["x" * 999] * 100}, "{}")
    job = stored(tracker, body)
    assert job.ranges == () and job.has_brief
    assert json.loads(pieces_of(tracker.as_json(job)).decode())["parameters"] == json.loads(body.decode())["parameters"]
    brief = json.loads(pieces_of(tracker.as_json(job, images=False)).decode())
    assert brief["parameters"] == {"prompt": "é", "mask": "(2,000 characters)", "styles": "(100 entries)"}
    assert brief["info"] == "{}"
    assert pieces_of(tracker.images.replay(job)) == body


@pytest.mark.parametrize("name", ["large both", "large info"])
@pytest.mark.parametrize("look", ["whole", "brief", "replay", "tab"])
def test_a_look_holds_little(script, tracker, name, look):
    job = stored(tracker, ANSWERS[name])
    size = tracker.images.size(tracker.images.answer_name(job))
    on_the_page = page_of(script, tracker)
    on_the_page(job)  # the first look of all makes the template
    looks = {
        "whole": lambda: tracker.as_json(job),
        "brief": lambda: tracker.as_json(job, images=False),
        "replay": lambda: tracker.images.replay(job),
        "tab": lambda: iter([on_the_page(job).encode()]),
    }
    tracemalloc.start()
    try:
        began, total = tracemalloc.get_traced_memory()[0], 0
        for piece in looks[look]():
            total += len(piece)
        peak = tracemalloc.get_traced_memory()[1] - began
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 < size
    assert total > 300_000 or look == "tab"


def test_an_answer_is_read_once(script, tmp_path, monkeypatch):
    """For the client and for the disk together."""
    read: List[int] = []
    monkeypatch.setattr(script, "json", Counted(read))
    answer = ANSWERS["large both"]
    with SmallWebui(script, tmp_path) as webui:
        webui.generate = lambda request: answer
        first = asyncio.run(webui.post({"prompt": "a", "send_images": False}))
        job = when_ended(webui.tracker, first.headers["x-job-id"])
    assert (job.status, job.error) == ("Completed", None)
    assert sum(size for size in read if size > 1000) < len(answer)
    expected = json.loads(answer.decode())
    expected["parameters"]["send_images"] = False
    rest = first.content.lstrip()
    assert rest == json.dumps({**expected, "images": []}, separators=(",", ":"), ensure_ascii=False).encode()
    assert rest == (tmp_path / "images" / webui.tracker.images.answer_name(job)).read_bytes()
    start, end, _, info_start, info_end, *_ = job.ranges
    assert json.loads(rest[start:end].decode()) == expected["parameters"]
    assert json.loads(rest[info_start:info_end].decode()) == expected["info"]


class Counted:
    """Stands for the module `json` in the script, and notes how much it is given to read."""

    def __init__(self, read: List[int]):
        self.read = read

    def loads(self, text: Any, **options: Any) -> Any:
        self.read.append(len(text))
        return json.loads(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(json, name)


@pytest.mark.parametrize("name", ["large both", "large info"])
def test_after_a_crash(script, tracker, tmp_path, name):
    """The record was never written, and what lies in images/ says all that it did."""
    job = a_job(script, random.Random(), status="Processing", prompt="", owner="00000000")
    # In this order, for the housekeeper may look for jobs of the dead at any moment.
    saved = tracker.images.save(job, script.split_answer(ANSWERS[name]))
    tracker.store.put(job, new=True).result()
    tracker.close().result(60)
    again = make_tracker(script, tmp_path)
    ended = again.get(job.id)
    assert (ended.ranges, ended.status, ended.prompt) == (saved.ranges, "Completed", "a")
    assert saved.ranges and (ended.images, ended.bytes) == (saved.images, saved.bytes)
    again.close()


def test_the_record(script):
    job = a_job(script, random.Random(1), status="Failed", ranges=(20, 300_000, 1, 300_010, 300_020, 2, 3))
    record = json.loads(script.record_of(job).decode())
    assert script.job_from_record(record) == job
    del record["ranges"]
    assert script.job_from_record(record) == job._replace(ranges=())
    for ranges in (
        None,
        5,
        {},
        [1],
        [1, 2, 3, 4],
        [1, 2, 3, 4, 5, 6, -7],
        [1, 2, 3, 4, 5, 6, "7"],
        [1, 2, 3, 4, 5, 6, 7.0],
        [1, 2, 3, 4, 5, 6, True],
        [2, 2, 3, 4, 5, 6, 7],
        [1, 2, 3, 5, 4, 6, 7],
        [1] * 8,
    ):
        with pytest.raises(ValueError):
            script.job_from_record({**record, "ranges": ranges})


@pytest.mark.parametrize("harm", ["gone", "cut", "no brief one"])
def test_a_large_answer_that_is_gone(tracker, harm):
    job = stored(tracker, ANSWERS["large both"])
    path = Path(tracker.images.folder, tracker.images.answer_name(job))
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        os.truncate(str(path), 300_000)
    else:
        Path(tracker.images.folder, tracker.images.brief_answer_name(job)).unlink()
    brief = json.loads(pieces_of(tracker.as_json(job, images=False)).decode())
    assert brief["parameters"] is None and "no longer on disk" in brief["error"]
    if harm == "gone":
        whole = json.loads(pieces_of(tracker.as_json(job)).decode())
        assert whole["parameters"] is whole["info"] is None and len(whole["images"]) == 2
        assert "no longer on disk" in whole["error"]


def test_a_large_answer_of_an_earlier_version(script, tracker):
    """Its record has no places."""
    job = a_job(script, random.Random(), status="Processing")
    saved = tracker.images.save(job, script.split_answer(ANSWERS["large both"]))
    old = saved._replace(status="Completed", has_brief=False, ranges=())
    answer = json.loads(ANSWERS["large both"].decode())
    assert json.loads(b"".join(tracker.as_json(old)).decode())["parameters"] == answer["parameters"]
    brief = json.loads(b"".join(tracker.as_json(old, images=False)).decode())
    assert brief["info"] == answer["info"] and brief["parameters"]["styles"] == "(10,000 entries)"
    assert b"".join(tracker.images.replay(old)) == ANSWERS["large both"]


def test_the_tab_says_so(script, tracker):
    on_the_page = page_of(script, tracker)
    large = on_the_page(stored(tracker, ANSWERS["large info"]))
    assert "too long to be shown here" in large and len(large) < 100_000
    other = on_the_page(stored(tracker, ANSWERS["large parameters"]))
    assert "too long" not in other and "Seed: 7" in other
    assert "too long" not in on_the_page(stored(tracker, an_answer_of({}, "{}")))


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
