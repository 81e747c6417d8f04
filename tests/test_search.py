"""Searching prompts: no text that a client sends, or looks for, holds the interpreter or the store's lock for long."""

from __future__ import annotations

import random
import time
from typing import Any, List

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from inside import a_job, load_script
from test_store import lines

WORST = ["a" * 250 + "b" + "a" * 249, "a" * 498 + "ba", "b" + "a" * 499, "a" * 499 + "b", "ab" * 249 + "aa"]


@pytest.fixture
def script() -> Any:
    return load_script()


def a_store(script: Any, folder: Any, prompts: List[str]) -> Any:
    dice = random.Random(1)
    jobs = [a_job(script, dice, prompt=prompt, status="Failed") for prompt in prompts]
    (folder / "jobs.json").write_bytes(lines(script, *jobs))
    store = script.JobStore(str(folder))
    assert store.get(jobs[-1].id) == jobs[-1]
    return store


class Watched(bytearray):
    """The index's text, with a note of how long each look into it may take: one length by the other."""

    work: List[int] = []
    took: List[float] = []

    def _look(self, look: Any, text: bytes, start: int, end: int) -> int:
        self.work.append((end - start) * len(text))
        began = time.thread_time()
        result = look(text, start, end)
        self.took.append(time.thread_time() - began)
        return result

    def find(self, *args: Any) -> int:
        return self._look(super().find, *args)

    def rfind(self, *args: Any) -> int:
        return self._look(super().rfind, *args)

    def count(self, *args: Any) -> int:
        return self._look(super().count, *args)


@pytest.mark.parametrize("wanted", [*WORST, "\ufb03" * 400, "a" * 20], ids=range(7))
def test_no_look_takes_long(script, tmp_path, wanted):
    store = a_store(script, tmp_path, ["a" * 990 for _ in range(4000)])
    try:
        text = store._opened.index.text = Watched(store._opened.index.text)
        text.work, text.took = [], []
        assert len(store.query(script.Filter(q=wanted), 5000).jobs) == (4000 if wanted == "a" * 20 else 0)
        assert text.work and max(text.work) <= 1 << 22
        assert max(text.took) < 0.05
    finally:
        store.close()


@pytest.mark.parametrize("wanted", WORST, ids=range(5))
def test_no_look_at_a_long_prompt_takes_long(script, wanted):
    """At worst, looking by the bytes takes a tenth of a second and more on Pythons before 3.10."""
    text, wanted = b"a" * 600_000, wanted.encode()
    script.contains(b"", wanted)
    taken = []
    for _ in range(3):
        began = time.thread_time()
        assert not script.contains(text, wanted)
        taken.append(time.thread_time() - began)
    assert min(taken) < 0.05
    assert script.contains(text + wanted, wanted) and script.contains(wanted + text, wanted)


ALPHABET = st.text(alphabet="aAbB.*[\\ßﬃÄ猫\ud800", max_size=12)
PROMPT = st.builds(lambda text, times: text * times, ALPHABET, st.sampled_from([0, 1, 2, 90, 400]))


@hypothesis_settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PROMPT, min_size=1, max_size=40), ALPHABET, st.integers(1, 40), st.sampled_from([1, 50, 3000, 1 << 22]))
def test_the_same_is_found(tmp_path_factory, prompts, wanted, times, work):
    script = load_script()
    script.SEARCH_WORK = work
    prompts = [script.without_surrogates(prompt) for prompt in prompts]
    wanted = (wanted * times)[: script.Filter.LIMIT]
    store = a_store(script, tmp_path_factory.mktemp("search"), prompts)
    try:
        found = [job.prompt for job in store.query(script.Filter(q=wanted), 100).jobs]
        assert found == [prompt for prompt in reversed(prompts) if wanted.casefold() in prompt.casefold()]
        index = store._opened.index
        text = script.fold(wanted)
        below = index.top
        while below > 0:
            above = index.step(script.Filter(q=wanted), below, 7)
            assert max(0, below - 7) <= above < below
            length = index._text_end(below - 1) - index.text_start[above]
            assert above == below - 1 or length * len(text) <= work
            below = above
    finally:
        store.close()
