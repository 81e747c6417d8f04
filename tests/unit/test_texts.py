"""Whatever clients send as text is kept as it is, by any store, and found by it."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from inside import a_job

from harness import fewer

ODD = st.sampled_from("\0\ud800\udfff\ufffd'\"\\%_{}\n\r\x7f猫🐈ßﬃ")
SIGNS = st.text(alphabet=st.one_of(st.characters(), ODD), max_size=30)
TEXT = st.builds(lambda text, times: text * times, SIGNS, st.sampled_from([1, 1, 1, 8]))
LONG_TEXT = st.builds(lambda text, times: text * times, SIGNS, st.sampled_from([1, 1, 30, 3000]))


@pytest.fixture
def pair(opened):
    return opened(), opened()


@pytest.mark.every_store
@hypothesis_settings(max_examples=fewer(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(LONG_TEXT, TEXT, TEXT, TEXT, TEXT)
def test_any_text_is_kept(script, pair, prompt, label, ip, key, error):
    """As it is, but for halves of characters."""
    store, other = pair
    prompt, label, ip, key, error = map(script.without_surrogates, (prompt, label, ip, key, error))
    texts = {"label": label[: script.LABEL_LIMIT], "ip": ip[: script.IP_LIMIT], "key": key, "error": error}
    job = a_job(script, random.Random(), prompt=prompt[: script.PROMPT_LIMIT], owner=store.owner, **texts)
    store.put(job, new=True).result(20)
    try:
        assert other.get(job.id) == other.with_key(key) == job
        assert other.query(script.Filter(label=job.label), 10).jobs == [job]
        assert other.query(script.Filter(ip=job.ip, q=prompt[: script.Filter.LIMIT]), 10).jobs == [job]
    finally:
        store.remove([job.id]).result(20)


@pytest.mark.parametrize("store_environ", ["postgresql"], indirect=True)
def test_an_id_that_another_has_taken_in_the_same_moment(script, pair, dice):
    """It is nobody else's then, in any spelling. On one folder, chance alone keeps them apart."""
    store, other = pair
    first = a_job(script, dice, id="AbCdEf12", owner=store.owner)
    store.put(first, new=True).result(20)
    for spelling in ("AbCdEf12", "aBCDeF12"):
        written = other.put(a_job(script, dice, id=spelling, owner=other.owner), new=True)
        assert isinstance(written.exception(20), script.StoreError)
        assert store.get("AbCdEf12") == other.get("AbCdEf12") == first
