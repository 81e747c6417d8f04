"""The tab's HTML, without a browser: foreign text is text, and markup, style and script mean the same by a name."""

from __future__ import annotations

import asyncio
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import pytest
from inside import load_script, make_tracker

FOREIGN = "<script>x()</script></td></div><b title='\"'>&amp; {{ 7 * 7 }} $job \u202eturned \0 null \x9b"
SHOWN = "<script>x()</script></td></div><b title='\"'>&amp; {{ 7 * 7 }} $job \ufffdturned \ufffd null \ufffd"
OF_GRADIO = {"form", "block", "selected", "pending"}  # classes that the style knows and gradio gives


class Markup(HTMLParser):
    """The names in HTML, and its texts, each with the element that it is in."""

    def __init__(self, html: str):
        super().__init__()
        self.names: Set[str] = set()  # of classes, IDs and data
        self.texts: List[Tuple[str, str]] = []
        self._around: List[str] = [""]
        self.feed(html)
        self.close()
        assert self._around == [""], "all elements are closed"

    def handle_starttag(self, tag: str, attributes: List[Tuple[str, Optional[str]]]) -> None:
        for name, value in attributes:
            if name in ("class", "id"):
                self.names.update((value or "").split())
            elif name.startswith("data-"):
                self.names.add(name[len("data-") :])
        if tag != "img":
            self._around.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._around.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._around[-1], data))


class Tab(NamedTuple):
    """A tab with a job of each status. Whatever a client or the webui says of them is hostile."""

    script: Any
    tab: Any

    def look(self, job: str = "", text: str = "", confirm: str = "", label: str = "") -> str:
        """The HTML, with a job open, and a button that asks."""
        state = json.dumps({"job": job, "confirm": confirm})
        return asyncio.run(self.tab.look(state, None, None, "All", "", text, label))[3]

    def act(self, action: Any) -> Any:
        return asyncio.run(self.tab.act(action))


def jobs_of(script: Any) -> Iterator[Any]:
    job = script.Job("", "txt2img", "", int(time.time()), FOREIGN, FOREIGN, error=FOREIGN)
    told = {
        "label": FOREIGN,
        "server": FOREIGN,
        "webhook": script.Webhook("https://receiver/hook?key=secret", since=1.0),
    }
    yield job._replace(id="FAILED01", status="Failed", retry_of="IMAGES01", has_request=True, **told)
    files = ("0.png", "1.txt", "2.png")
    folder = script.ImageStore.day_of(job)
    images = tuple(script.Image(f"{folder}/IMAGES01_{name}", 1, "image/png") for name in files)
    yield job._replace(id="IMAGES01", status="Completed", images=images)


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Tab]:
    script = load_script()
    _, done = jobs = list(jobs_of(script))
    (tmp_path / "jobs.json").write_text(
        json.dumps({job.id: json.loads(script.record_of(job).decode()) for job in jobs})
    )
    (tmp_path / "images" / script.ImageStore.day_of(done)).mkdir(parents=True)
    for image in done.images[:2]:
        (tmp_path / "images" / image.name).write_bytes(b"x")
    info = {"negative_prompt": FOREIGN, "all_seeds": [FOREIGN], "infotexts": [FOREIGN, FOREIGN]}
    answer = {"images": [], "parameters": {}, "info": json.dumps(info)}
    (tmp_path / "images" / script.ImageStore.answer_name(done)).write_text(json.dumps(answer))
    tracker = make_tracker(script, tmp_path)
    running = [script.Job(name, "img2img", "Pending", done.timestamp, "::1", "") for name in ("RUNNING1", "WAITING1")]
    try:
        for job in running:
            tracker.accept(job, lambda: True, b"").result()
        tracker.start("RUNNING1")
        yield Tab(script, script.Tab(tracker, tracker.housekeeper, None, lambda: FOREIGN))
    finally:
        for job in running:
            tracker.fail(job.id, "")
        tracker.close()


def test_foreign_text_is_text_in_an_element_of_its_own(shown):
    pages: Dict[str, List[str]] = {}
    for job in ("", "FAILED01", "IMAGES01"):
        html = shown.look(job)
        texts = Markup(html).texts
        pages[job] = [element for element, text in texts if text.rstrip(".").endswith(SHOWN)]
        assert not shown.script.UNPRINTABLE.search(html)
        assert "x()" not in "".join(text for element, text in texts if element != "bdi")
    # The note above all says why nothing is tracked, two rows have a prompt and an IP, one a label and a server too. An
    # open job has an error, a prompt and an IP, and that one its label and server; a Completed one has a negative
    # prompt, a seed and two infotexts, too.
    assert {job: len(elements) for job, elements in pages.items()} == {"": 7, "FAILED01": 12, "IMAGES01": 14}
    assert {element for elements in pages.values() for element in elements} == {"bdi"}


def test_the_limit_stands_beside_what_is_on_disk(shown):
    texts = [text for _, text in Markup(shown.look()).texts]
    assert "On disk" in texts
    shown.tab.tracker.settings.max_gb = 20.0
    texts = [text for _, text in Markup(shown.look()).texts]
    assert "On disk, of 20 GB" in texts and "On disk" not in texts


def test_long_text_is_cut_and_says_so():
    as_text = load_script().as_text
    assert as_text("<" * 8, 5) == "<bdi>&lt;&lt;&lt;&lt;&lt;</bdi> <em>\u2026 and 3 characters more</em>"
    assert as_text("x" * 1_020_000).endswith("x</bdi> <em>\u2026 and 1,000,000 characters more</em>")
    assert as_text("x", 1) == "<bdi>x</bdi>"
    assert as_text(None) == as_text("") == ""


def test_markup_style_and_script_agree(shown, monkeypatch):
    """A name that one of them spells otherwise would be no error, and nothing would happen."""
    preview = shown.script.Preview("RUNNING1", 3, b"", "image/png")
    monkeypatch.setattr(shown.tab.tracker, "newest_preview", lambda job, _: {preview.job_id: preview}.get(job.id))
    pages = [shown.look(job) for job in ("", "FAILED01", "IMAGES01", "RUNNING1", "GONE0001")] + [
        shown.look(text="nobody wrote this"),
        shown.look("FAILED01", confirm="delete FAILED01"),
    ]
    in_markup = set().union(*(Markup(html).names for html in pages))
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)  # gradio 3 asks for it on Python 3.8, and `asyncio.run` leaves none
    ids = {block.elem_id for block in shown.tab.build().blocks.values()}
    asyncio.set_event_loop(None)
    loop.close()
    names = set(shown.script.NAMES.values())
    assert in_markup <= names <= in_markup | ids
    style, code = shown.script.TAB_STYLE, shown.script.TAB_SCRIPT
    in_style = re.findall(r"[.#]([A-Za-z][\w-]*)", style)
    in_code = re.findall(r"(?:#|dataset\.|data-|\"\.)([A-Za-z]\w*)", code)
    assert {*in_style, *in_code} - OF_GRADIO <= names
    assert len(set(in_style)) > 30 and len(set(in_code)) >= 8


# What is there for some jobs only


def headings_of(html: str) -> List[str]:
    return re.findall(r'<th class="(\w+)"', html)


def rows_of(html: str) -> Dict[str, str]:
    return dict(re.findall(r'<tr data-key="(\w+)"(.*?)</tr>', html, re.DOTALL))


ALWAYS = ["id", "time", "type", "status", "prompt", "images", "seconds", "ip"]


def test_columns_that_say_nothing_are_left_out(shown):
    tracker = shown.tab.tracker
    html = shown.look()
    assert headings_of(html) == ["thumbnail", *ALWAYS[:5], "label", *ALWAYS[5:], "server"]
    assert {row.count("<td") for row in rows_of(html).values()} == {len(ALWAYS) + 3}, "each row has each column"
    tracker.server = FOREIGN  # then all jobs were at this one
    assert headings_of(shown.look())[-1] == "ip"
    assert "<dt>Server</dt>" not in shown.look("FAILED01")
    assert [*rows_of(shown.look(label=f" {FOREIGN} "))] == ["FAILED01"], "the whole label matches, and nothing less"
    assert not rows_of(shown.look(label=FOREIGN[:5]))
    assert tracker.delete("FAILED01")
    assert headings_of(shown.look()) == ["thumbnail", *ALWAYS]
    assert tracker.delete("IMAGES01")
    assert headings_of(shown.look()) == ALWAYS


def test_a_completed_row_begins_with_a_thumbnail_and_opens_no_file(shown, monkeypatch):
    def fail(*arguments: Any) -> Any:
        raise AssertionError("a list opens no file")

    for name in ("read", "size", "read_thumbnail", "make_thumbnail", "read_values"):
        monkeypatch.setattr(shown.tab.tracker.images, name, fail)
    rows = rows_of(shown.look())
    pictures = {job_id: re.findall(r'<td class="thumbnail">(.*?)</td>', row) for job_id, row in rows.items()}
    img = '<img src="./job-tracker/IMAGES01/thumbnail" alt="" loading="lazy">'
    assert pictures == {"IMAGES01": [img], "FAILED01": [""], "RUNNING1": [""], "WAITING1": [""]}


def test_an_open_job_has_its_live_preview_while_there_is_one(shown, monkeypatch):
    number, asked = None, []

    def newest(job: Any, standing: Any) -> Any:
        asked.append(job.id)
        return number and shown.script.Preview(job.id, number, b"", "image/png")

    monkeypatch.setattr(shown.tab.tracker, "newest_preview", newest)
    assert "/preview" not in shown.look("RUNNING1")
    number = 3
    assert '<img src="./job-tracker/RUNNING1/preview?n=3" alt="Live preview">' in shown.look("RUNNING1")
    shown.look()
    assert asked == ["RUNNING1", "RUNNING1"], "nothing is made while no job is open"


@pytest.mark.parametrize(
    "state, text",
    [
        ({}, "waits for the job"),
        ({"since": 1.0, "due": 1.0}, "is being delivered"),
        ({"since": 1.0, "due": 1e9, "attempts": 1}, "tried once, next soon"),
        ({"since": 1.0, "due": 330, "attempts": 3}, "tried 3 times, next in 5 min"),
        ({"since": 1.0, "due": 36_030, "attempts": 1_000}, "tried 1,000 times, next in 10 h 00 min"),
        ({"since": 1.0, "attempts": 1}, "given up after 1 try"),
        ({"since": 1.0, "attempts": 9}, "given up after 9 tries"),
        ({"since": 1.0, "attempts": 2, "delivered": True}, "delivered"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_how_far_a_webhook_is(script, state, text):
    now = 1e9 if state.get("due") == 1e9 else 0.0
    assert script.state_of(script.Webhook("https://receiver/", **state), now) == text


def test_an_open_job_shows_its_webhook_without_what_may_be_secret(shown):
    html = shown.look("FAILED01")
    assert "<dt>Webhook</dt><dd><bdi>receiver/hook</bdi> <small>given up after 0 tries</small></dd>" in html
    assert "secret" not in html
    assert "<dt>Webhook</dt>" not in shown.look("IMAGES01")


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        load_script().with_names("#$tab .$nope")


@pytest.mark.parametrize(
    "text",
    [
        *(None, 1, "", "{", "[]", "null", '{"page": -1}', '{"page": true}', '{"page": 1e3}', '{"page": 4294967296}'),
        *('{"confirm": 1}', '{"confirm": null}'),
        *('{"job": "a"}', '{"job": 1}', '{"job": null}', '{"job": "../../.."}', '{"other": 1}', "[" * 100_000),
    ],
    ids=lambda text: str(text)[:20],
)
def test_an_invalid_page_state_is_the_first_page(text):
    script = load_script()
    assert script.PageState.parse(text) == script.PageState()


# What its buttons do


def actions_of(html: str) -> List[str]:
    return re.findall(r'data-action="([^"]*)"', html)


def test_an_open_job_has_the_buttons_that_fit(shown):
    expected = {
        "WAITING1": ["cancel WAITING1"],
        "RUNNING1": ["cancel RUNNING1"],
        "IMAGES01": ["delete IMAGES01"],
        "FAILED01": ["retry FAILED01", "delete FAILED01"],
        "GONE0001": [],
    }
    every_page = ["cancel_waiting"]
    assert {job: actions_of(shown.look(job)) for job in expected} == {
        job: every_page + actions for job, actions in expected.items()
    }


def test_only_the_button_that_was_pressed_asks(shown):
    for confirm, asking in (
        ("delete IMAGES01", ["Delete for good?"]),
        ("cancel_waiting", ["Cancel 1 job?"]),
        *((other, []) for other in ("", "delete FAILED01", "delete", "purge", "<script>x()</script>")),
    ):
        html = shown.look("IMAGES01", confirm=confirm)
        assert re.findall(r'class="asking">([^<]*)<', html) == asking, confirm
        assert "<script>" not in html


@pytest.mark.parametrize(
    "action",
    [None, 7, [], {}, "", "delete", "delete ", "delete ../../..", "remove IMAGES01", "Delete IMAGES01", "x" * 100_000],
    ids=lambda action: repr(action)[:20],
)
def test_an_unknown_action_does_nothing(shown, action):
    before = shown.tab.tracker.store.stats()
    shown.act(action)
    assert shown.tab.tracker.store.stats() == before


def test_actions_say_which_job_is_open_then(shown, monkeypatch):
    assert shown.act("delete IMAGES01") == "IMAGES01 "
    assert shown.act("delete IMAGES01") == "IMAGES01 "  # another was quicker
    assert "no longer kept" in shown.look("IMAGES01")
    tracker = shown.tab.tracker
    monkeypatch.setattr(tracker, "retry", lambda job_id: tracker.get(job_id)._replace(id="AGAIN001"))
    assert shown.act("retry FAILED01") == "FAILED01 AGAIN001"
    with pytest.raises(Exception, match="Not done: This job is no longer kept"):
        shown.act("cancel GONE0001")


@pytest.mark.parametrize("name", ["Conflict", "Gone", "StoreError"])
@pytest.mark.parametrize("action", ["cancel", "retry", "delete"])
def test_what_cannot_be_done_is_said(shown, monkeypatch, name, action):
    def refuse(_):
        raise getattr(shown.script, name)("it is so")

    monkeypatch.setattr(shown.tab.tracker, action, refuse)
    with pytest.raises(Exception, match="Not done: it is so") as raised:
        shown.act(f"{action} FAILED01")
    assert type(raised.value).__name__ == "Error"  # of gradio, which shows it
