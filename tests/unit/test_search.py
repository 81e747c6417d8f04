"""Searching prompts: no text that a client sends, or looks for, holds the interpreter or the store for long."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, Callable, Iterator, List

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from inside import a_job, load_script
from journal import lines

from harness import fewer

WORST = ["a" * 250 + "b" + "a" * 249, "a" * 498 + "ba", "b" + "a" * 499, "a" * 499 + "b", "ab" * 249 + "aa"]
PROMPTS = ["a" * 990] * 4000


def a_store(script: Any, folder: Any, prompts: List[str]) -> Any:
    dice = random.Random(1)
    jobs = [a_job(script, dice, prompt=prompt, status="Failed") for prompt in prompts]
    (folder / "jobs.json").write_bytes(lines(script, *jobs))
    store = script.JobStore(str(folder))
    assert store.get(jobs[-1].id) == jobs[-1]
    return store


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script()


@pytest.fixture(scope="module")
def large(script, tmp_path_factory) -> Iterator[Any]:
    """A store of prompts in which each search begins to match everywhere."""
    store = a_store(script, tmp_path_factory.mktemp("search"), PROMPTS)
    yield store
    store.close()


class Search(threading.Thread):
    """A search in a thread of its own."""

    def __init__(self, script: Any, store: Any, wanted: str):
        super().__init__(daemon=True)
        self.abandoned = threading.Event()
        self.jobs: Any = None
        self._look: Callable[[], Any] = lambda: store.query(script.Filter(q=wanted), 5000, abandoned=self.abandoned)
        self.start()

    def run(self) -> None:
        self.jobs = self._look().jobs


def longest_stop(search: Search) -> float:
    """Seconds for which this thread did not get the interpreter, while a search goes on beside it, at most."""
    longest = 0.0
    last = time.monotonic()
    while search.is_alive():
        time.sleep(0.001)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest


@pytest.mark.parametrize("wanted", [*WORST, "\ufb03" * 400, "a" * 20], ids=range(7))
def test_others_run_beside_a_search(script, large, wanted):
    stops = []
    for _ in range(3):  # others may use the machine
        search = Search(script, large, wanted)
        stops.append(longest_stop(search))
        assert len(search.jobs) == (4000 if wanted == "a" * 20 else 0)
    assert min(stops) < 0.05


def test_others_are_answered_beside_a_search(script, large):
    """Who asks for a job, or stores one, does not wait for it."""
    job = a_job(script, random.Random(2))
    seconds = []
    for number in range(5):
        search = Search(script, large, WORST[number])
        began = time.monotonic()
        large.put(job).result(20)
        assert large.get(job.id) == job
        seconds.append(time.monotonic() - began)
        search.abandoned.set()
        search.join()
    large.remove([job.id]).result(20)
    assert min(seconds) < 0.1


@pytest.mark.parametrize("wanted", WORST, ids=range(5))
def test_a_search_ends_with_its_client(script, large, wanted):
    """Even where it takes long, and finds nothing."""
    seconds = []
    for _ in range(3):
        search = Search(script, large, wanted)
        search.abandoned.set()
        began = time.monotonic()
        search.join(20)
        seconds.append(time.monotonic() - began)
        assert search.jobs == []
    assert min(seconds) < 0.1


@pytest.mark.parametrize("wanted", WORST, ids=range(5))
def test_a_search_of_a_long_prompt(script, tmp_path, wanted):
    """Others run beside it, too, though it is one look."""
    store = a_store(script, tmp_path, ["a" * script.PROMPT_LIMIT, "a" * (script.PROMPT_LIMIT - 500) + wanted])
    try:
        stops = []
        for _ in range(3):
            search = Search(script, store, wanted)
            stops.append(longest_stop(search))
            assert len(search.jobs) == 1
        assert min(stops) < 0.05
    finally:
        store.close()


ALPHABET = st.text(alphabet="aAbB.*[\\ßﬃÄ猫\ud800\0", max_size=12)
PROMPT = st.builds(lambda text, times: text * times, ALPHABET, st.sampled_from([0, 1, 2, 90, 400]))


@pytest.mark.every_store
@hypothesis_settings(max_examples=fewer(120), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PROMPT, min_size=1, max_size=40), ALPHABET, st.integers(1, 40))
def test_the_same_is_found(script, opened, store_environ, prompts, wanted, times):
    prompts = [script.without_surrogates(prompt) for prompt in prompts]
    wanted = (wanted * times)[: script.Filter.LIMIT]
    if store_environ:  # a database has no sign for these, and takes one and the same for both
        prompts, wanted = [text.replace("\0", "\ufffd") for text in prompts], script.without_surrogates(wanted)
        wanted = wanted.replace("\0", "\ufffd")
    store, dice = opened(), random.Random(1)
    jobs = [a_job(script, dice, prompt=prompt, timestamp=number) for number, prompt in enumerate(prompts)]
    for written in [store.put(job, new=True) for job in jobs]:
        written.result(20)
    try:
        found = [job.prompt for job in store.query(script.Filter(q=wanted), 100).jobs]
        assert found == [prompt for prompt in reversed(prompts) if wanted.casefold() in prompt.casefold()]
    finally:
        store.remove([job.id for job in jobs]).result(20)
        store.close()
