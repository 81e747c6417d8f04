"""The readers of jobs.json, config.json and the variables, against whatever a file of this form can hold."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from typing import Any, Dict, List

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from inside import load_script, make_tracker

from harness import fewer, strictly

SCRIPT = load_script()
FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}
INTACT = ["Intact01", "Intact02", "Intact03", "Intact04"]
HOSTILE = ["Broken01", "Broken02", "Broken03"]


# What would end a string, a line or a record, or begin another, if it were not escaped.
FRAGMENTS = ['"', "\\", "\n", "\r", "\u2028", "\0", "\x1b[2J", "\u202e", "}", "{", ",", "null", ": ", "</script>", "é"]
FRAGMENTS += ["\ud800", "\udc00", '\n"Intact01": null,', '"Intact02": {', '",\n"Intact03": null\n}\n', "\U0001f3a8"]
TEXT = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)).map(
    lambda text: json.loads(json.dumps(text))  # two halves of a character are one
)
TIME = st.one_of(st.none(), st.integers(0, SCRIPT.MAX_TIMESTAMP - 1), st.floats(0, SCRIPT.MAX_TIMESTAMP - 1))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)


def job_of(job_id: str, images: int, **fields: Any) -> Any:
    day = time.strftime("%Y-%m-%d", time.gmtime(fields["timestamp"]))
    known = (SCRIPT.Image(f"{day}/{job_id}_{n}.png", 100 + n, "image/png") for n in range(images))
    return SCRIPT.Job(id=job_id, images=tuple(known), **fields)


INTACT_JOB = st.builds(
    job_of,
    st.sampled_from(INTACT),
    st.integers(0, 3),
    type=st.sampled_from(SCRIPT.TYPES),
    status=st.sampled_from(SCRIPT.ENDED),
    timestamp=st.integers(0, SCRIPT.MAX_TIMESTAMP - 1),
    ip=st.one_of(st.none(), TEXT),
    prompt=TEXT,
    started=TIME,
    finished=TIME,
    error=st.one_of(st.none(), TEXT),
    bytes=st.integers(0, 1 << 39),
    key=st.one_of(st.none(), TEXT),
    digest=st.one_of(st.none(), TEXT),
)


def record_of(job: Any) -> Dict[str, Any]:
    """As `script.record_of` makes it, but with halves of characters, which it replaces."""
    details = [[image.size, image.media_type] for image in job.images]
    return {**job._asdict(), "images": [image.name for image in job.images], "image_details": details}


GOOD = {"type": "txt2img", "status": "Completed", "timestamp": 1736712000, "prompt": "a lighthouse", "ip": "::1"}
ODD = st.one_of(
    VALUE,
    st.sampled_from(
        [*("../../etc/passwd", "Pending", "Processing", 1 << 40, 1 << 70, -1, 1e300, -0.0, 10**400, "x" * 100_000)]
        + [["2025-01-12/Intact01_0.png"], ["2025-01-12/../Broken01_0.png"], ["2025-01-12/Broken01_0.png\n"], [None]]
    ),
)
HOSTILE_RECORD = st.one_of(
    VALUE,
    st.dictionaries(st.sampled_from([*SCRIPT.Job._fields, "image_details", "later", ""]), ODD, max_size=4).map(
        lambda fields: {**GOOD, "id": "Broken01", **fields}
    ),
)
ENTRY = st.one_of(INTACT_JOB, st.tuples(st.one_of(st.sampled_from(HOSTILE), TEXT), HOSTILE_RECORD))


def in_lines(entries: List[bytes]) -> bytes:
    return b"{\n" + b",\n".join(entries) + b"\n}\n"


WRONG = {"Broken01": {"images": ["../../etc/passwd"]}, "Broken02": {"ip": 5}, "Broken03": {"prompt": []}}


LAYOUTS = {
    "lines": in_lines,
    "one line": lambda entries: b"{" + b", ".join(entries) + b"}",
    "Windows": lambda entries: b"\xef\xbb\xbf" + in_lines(entries).replace(b"\n", b"\r\n"),
    "rubbish between": lambda entries: b"{\n" + b",\n\xff\xfe{{{\n,\n".join(entries) + b"\n}\n",
    "cut": lambda entries: in_lines(entries)[:-2],
    "empty lines": lambda entries: b"{\n\n\n" + b"\n,\n\n".join(entries) + b"\n\n}",
}


def entry_of(key: str, record: Any, ascii_only: bool) -> bytes:
    text = f"{json.dumps(key)}: {json.dumps(record, ensure_ascii=ascii_only)}"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a character
        return entry_of(key, record, True)


@hypothesis_settings(max_examples=fewer(120), **FUZZ)
@given(st.lists(ENTRY, max_size=7), st.sampled_from(sorted(LAYOUTS)), st.booleans(), st.sampled_from([200, 1 << 16]))
@example([(name, {**GOOD, "id": name, **fields}) for name, fields in WRONG.items()], "lines", True, 1 << 16)
def test_any_record(tmp_path_factory, entries, layout, ascii_only, piece):
    """An intact record is found as it was written, whatever stands beside it, and everything can be shown."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "jobs.json"
    pairs = [(one.id, record_of(one)) if isinstance(one, SCRIPT.Job) else one for one in entries]
    path.write_bytes(LAYOUTS[layout]([entry_of(key, record, ascii_only) for key, record in pairs]))
    expected = {one.id: one for one in entries if isinstance(one, SCRIPT.Job)}
    SCRIPT.JOURNAL_CHUNK = piece
    tracker = make_tracker(SCRIPT, folder, TRACKER_RETENTION="off")
    try:
        found = {job.id: job for job in tracker.store.query(SCRIPT.Filter(), 1000).jobs}
        assert {job_id: found.get(job_id) for job_id in expected} == expected
        assert set(found) <= {*expected, *HOSTILE}
        for job in found.values():
            can_be_shown(tracker, job)
            if [job_id for job_id, _ in pairs].count(job.id) == 1:
                can_be_found(tracker, job)
                keys = [record.get("key") for _, record in pairs if isinstance(record, dict)]
                if job.key and keys.count(job.key) == 1:
                    assert tracker.store.with_key(job.key) == job
        job = SCRIPT.Job("NewJob01", "txt2img", "Pending", 1736712000, None, "new")
        tracker.accept(job, lambda: False, b"").result(20)
        assert tracker.store.idle()
        kept = {job_id for job_id, record in strictly(path.read_bytes()).items() if record is not None}
        assert {*expected, "NewJob01"} <= kept
        counts, _ = tracker.store.stats()
        assert sum(counts.values()) == len(found) + 1
        tracker.fail(job.id, "")  # a tracker's end waits for its running jobs
    finally:
        tracker.store.close()
        tracker.close()


def can_be_shown(tracker: Any, job: Any) -> None:
    """By the API and on the page."""
    assert isinstance(job.prompt, str) and all(text is None or isinstance(text, str) for text in (job.ip, job.error))
    assert all(SCRIPT.IMAGE_FORM.match(image.name).group(1) == job.id for image in job.images)
    assert strictly(b"".join(tracker.as_json(job)))["id"] == job.id
    html = SCRIPT.TabHtml(tracker, tracker.housekeeper).render(SCRIPT.PageState(job=job.id), SCRIPT.Filter())
    assert html.count(job.id) >= 3  # in the table once, in the open job twice
    assert "</script>" not in html and "\u202e" not in html and "\x1b" not in html
    html.encode()


def can_be_found(tracker: Any, job: Any) -> None:
    wanted = SCRIPT.Filter(ip=job.ip, status=job.status, type=job.type, q=job.prompt[:20])
    assert job.id in {one.id for one in tracker.store.query(wanted, 1000).jobs}


def test_a_prompt_is_no_record(tmp_path):
    """However a file is damaged, what stands in a text of it is never read as a record."""
    fake = SCRIPT.Job("Forged01", "txt2img", "Completed", 1736712000, "::1", "forged")
    prompt = f'\n"Forged01": {json.dumps(record_of(fake))},\n"Intact02": null\n}}\n'
    jobs = [job_of(job_id, 0, **GOOD)._replace(prompt=prompt * 3, ip=prompt, error=prompt) for job_id in INTACT[:3]]
    whole = in_lines([entry_of(job.id, record_of(job), True) for job in jobs])
    first = whole.index(b"Intact02")
    for place in range(first, whole.index(b"Intact03"), 7):
        for data in (whole[:place] + whole[place + 5 :], whole[:place] + b"\0\n" + whole[place:], whole[place:]):
            lines = list(SCRIPT.parse_entries(data[1:], 1))
            assert {line.id for line in lines if isinstance(line, SCRIPT.Entry)} <= set(INTACT)
            assert all(line.job for line in lines if isinstance(line, SCRIPT.Entry))


# config.json and the variables

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 30, 0.5, 1 << 70, 10**400, "30", True]))
CONFIG = st.one_of(
    VALUE,
    st.dictionaries(TEXT, VALUE, max_size=3),
    st.builds(
        lambda more, **known: {**more, **known},
        st.dictionaries(TEXT, st.one_of(VALUE, st.floats()), max_size=2),
        enabled=st.one_of(st.booleans(), VALUE),
        retention_days=st.one_of(st.none(), NUMBERS, VALUE),
    ),
)


def settings_are_sane(settings: Any) -> None:
    assert settings.enabled in (True, False) and isinstance(settings.enabled, bool)
    days = settings.retention_days
    assert days is None or (isinstance(days, (int, float)) and 0 < days < math.inf)


@hypothesis_settings(max_examples=fewer(150), **FUZZ)
@given(CONFIG, st.sampled_from([None, 2]), st.booleans())
@example({"enabled": True, "other": math.nan}, None, True)
@example({"enabled": True, "retention_days": 10**400}, None, True)
def test_any_settings(tmp_path_factory, config, indent, value):
    """Nothing is raised, what is no setting is not taken for one, and what else stands there is kept."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "config.json"
    text = json.dumps(config) if indent is None else json.dumps(config, indent=indent)
    path.write_text(text)
    settings = SCRIPT.Settings(str(folder), {})
    settings_are_sane(settings)
    if isinstance(config, dict) and isinstance(config.get("enabled"), bool):
        assert settings.enabled is config["enabled"]
    settings.save(enabled=value, retention_days=7)
    written = strictly(path.read_bytes())
    assert (written["enabled"], written["retention_days"]) == (value, 7)
    set_aside = list(folder.glob("config.json.damaged-*"))
    if set_aside:
        assert [one.read_text() for one in set_aside] == [text]
    elif "NaN" not in text and "Infinity" not in text:
        assert written == {**config, **written, "enabled": value, "retention_days": 7}
    again = SCRIPT.Settings(str(folder), {})
    assert (again.enabled, again.retention_days) == (value, 7)


@pytest.mark.parametrize("depth", [50, 400, 900, 5000, 100_000])
def test_settings_that_are_deep(tmp_path, depth):
    """What cannot be written again is taken for broken, and kept when the tab saves."""
    text = '{"enabled": true, "retention_days": 5, "other": ' + "[" * depth + "]" * depth + "}"
    (tmp_path / "config.json").write_text(text)
    settings = SCRIPT.Settings(str(tmp_path), {})
    broken = settings.trouble is not None
    assert settings.enabled is not broken
    assert broken == (depth == 100_000) or 50 < depth < 100_000, "Pythons differ in between"
    assert (tmp_path / "config.json").read_text() == text
    settings.save(retention_days=7)
    assert [one.read_text() for one in tmp_path.glob("config.json.damaged-*")] == [text] * broken
    assert strictly((tmp_path / "config.json").read_bytes())["retention_days"] == 7


NO_ZERO = TEXT.map(lambda text: text.replace("\0", ""))
BOOLEAN_LIKE = st.sampled_from(["TRUE", " off ", "y", "1\n", "0x1", "tRuE", "\uff11"])
NUMBER_LIKE = st.sampled_from(["1e400", "-0", "1_0", "\u0663", "nan", "+7", " 7 ", "7\n", "1e-400", "9" * 5000, "0b1"])


@hypothesis_settings(max_examples=fewer(100), **FUZZ)
@given(st.one_of(NO_ZERO, BOOLEAN_LIKE), st.one_of(NO_ZERO, NUMBER_LIKE))
def test_any_variables(tmp_path_factory, enabled, retention):
    folder = tmp_path_factory.getbasetemp() / "variables"
    folder.mkdir(exist_ok=True)
    settings = SCRIPT.Settings(str(folder), {"TRACKER_ENABLED": enabled, "TRACKER_RETENTION": retention})
    settings_are_sane(settings)
    assert ("enabled" in settings.locked) == (enabled.strip().lower() in SCRIPT.BOOLEANS)


@pytest.mark.skipif(os.name == "nt", reason="no pipes in folders")
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself", "device"])
def test_no_file_in_the_place_of_the_settings(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "link to itself" else "/dev/zero")
    settings = SCRIPT.Settings(str(tmp_path), {})
    assert (settings.enabled, settings.retention_days) == (False, None)  # nothing is purged by age meanwhile
    with contextlib.suppress(OSError):
        settings.save(enabled=True)
        assert strictly(path.read_bytes())["enabled"] is True
    settings.refresh()


# Headers


TOKENS = [*'"\\=,;: \tq0.1*', "respond-async", "gzip", "x-gzip", "\xe9"]
HEADER = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=5)


@hypothesis_settings(max_examples=fewer(100), **FUZZ)
@given(HEADER, HEADER, HEADER)
@example(['"'], ["\\", '"'], ["x"])
def test_any_header_is_read_at_once(start, repeated, end):
    """In a time that grows with its length and no faster."""
    middle = "".join(repeated) * (60_000 // len("".join(repeated)))
    value = ("".join(start) + middle + "".join(end)).encode("latin-1")
    scope = {"headers": [(name, value) for name in (b"prefer", b"accept-encoding", b"authorization")]}
    began = time.thread_time()
    for reader in (SCRIPT.Preference.of, SCRIPT.accepts_gzip, SCRIPT.user_of):
        reader(scope)
    assert time.thread_time() - began < 1


@pytest.mark.parametrize(
    "value, answer",
    [
        ('a="respond-async"', False),
        ('a="x, respond-async, y', False),
        ('respond-async, a="x', True),
        ('a="\\", respond-async"', False),
        ('a="\\\\", respond-async', True),
        ('respond-async, a="\\', True),
    ],
)
def test_a_preference_in_quotes_is_none(value, answer):
    assert SCRIPT.Preference.of({"headers": [(b"prefer", value.encode())]}).respond_async is answer
