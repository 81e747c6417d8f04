"""Images, parameters and info are kept and given as the webui made them, byte for byte."""

from __future__ import annotations

import base64
import gzip
import io
import json
from typing import List

import pytest
from inside import load_script
from PIL import Image

from harness import KINDS, PNG, SHAPE, body, until, without_time

FORMATS = {"png": ("PNG", ".png"), "jpg": ("JPEG", ".jpg"), "webp": ("WEBP", ".webp")}


def files_of(webui, job_id):
    """The images on disk, in order."""
    until(webui.is_idle)
    return [webui.data / "images" / name for name in webui.records()[job_id]["images"]]


def stored(webui, answer):
    """The job of an answer, after it was compared with it in every way."""
    job_id = answer.headers["X-Job-ID"]
    job = webui.job(job_id, wait=30)
    assert job["status"] == "Completed", job["error"]
    assert job["parameters"] == answer.json()["parameters"]
    assert job["info"] == answer.json()["info"]
    assert job["image_count"] == len(job["images"]) == len(files_of(webui, job_id))
    return job


@pytest.fixture
def set_format(every_webui):
    def set_format(samples_format):
        assert every_webui.client.post("/sdapi/v1/options", json={"samples_format": samples_format}).status_code == 200

    yield set_format
    set_format("png")


@pytest.mark.parametrize("samples_format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_formats_by_their_bytes(every_webui, set_format, samples_format, kind):
    name, ending = FORMATS[samples_format]
    set_format(samples_format)
    answer = every_webui.post(body(kind=kind, batch_size=2), kind)
    job = stored(every_webui, answer)
    assert job["images"] == answer.json()["images"]
    assert len(job["images"]) == 2
    for image, path in zip(job["images"], files_of(every_webui, job["id"])):
        data = base64.b64decode(image)
        assert path.read_bytes() == data
        assert path.suffix == ending
        assert Image.open(io.BytesIO(data)).format == name
    assert job["type"] == kind


def test_grid_comes_first(webui):
    answer = webui.post(body(batch_size=3, save_images=True))
    images = stored(webui, answer)["images"]
    assert images == answer.json()["images"]
    assert len(images) == 4
    sizes = [Image.open(io.BytesIO(base64.b64decode(image))).size for image in images]
    assert sizes[0] > sizes[1] == sizes[2] == sizes[3]
    assert json.loads(answer.json()["info"])["index_of_first_image"] == 1


def test_more_images_than_asked_for(webui):
    answer = webui.post(body(standin={"extra_images": 12}))
    images = stored(webui, answer)["images"]
    assert images == answer.json()["images"]
    assert len(images) == len(set(images)) == 13, "the tenth does not come after the first"


@pytest.mark.skipif(SHAPE == "sdnext", reason="it answers so where it failed")
def test_no_images(webui):
    answer = webui.post(body(standin={"no_images": True}))
    assert answer.json()["images"] == []
    assert stored(webui, answer)["images"] == []


def test_large_images(webui):
    """Nothing compresses these."""
    answer = webui.post(body(batch_size=2, standin={"image_bytes": 3_000_001}))
    images = stored(webui, answer)["images"]
    assert images == answer.json()["images"]
    assert all(len(image) > 4_000_000 for image in images)


STRINGS = [
    "not base64!",
    "",
    "aGVsbG8=",
    "aGVsbG8",
    "aGVsbG9=",
    "aGVs\nbG8=",
    " aGVsbG8=",
    "aGVs====",
    'quotes " and \\ and \t',
    "</script><img src=x onerror=alert(1)>",
    "ünïcode 🎨",
    "null",
    "../../etc/passwd",
    "R0lGODlhAQABAAAAACwAAAAAAQABAAA=",
    "x" * 300_001,
    "QUJD" * 300_000,
    "QUJD" * 70_000 + "Q=JD" + "QUJD" * 70_000,
]


@pytest.mark.parametrize("text", STRINGS, ids=lambda text: text[:20].encode("unicode_escape").decode() or "empty")
def test_strings_that_are_no_images(webui, text):
    answer = webui.post(body(standin={"strings": [text]}))
    images = stored(webui, answer)["images"]
    assert answer.json()["images"][1] == text
    assert images == answer.json()["images"]


def test_all_strings_at_once(webui):
    answer = webui.post(body(standin={"strings": STRINGS, "no_images": True}))
    assert stored(webui, answer)["images"] == answer.json()["images"] == STRINGS


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", "data:image/png;name=a b.png;base64,"])
def test_data_prefix_is_taken_off(webui, prefix):
    answer = webui.post(body(standin={"strings": [prefix + PNG]}))
    images = stored(webui, answer)["images"]
    assert answer.json()["images"][1] == prefix + PNG, "towards the client it stays"
    assert images[1] == PNG
    assert files_of(webui, answer.headers["X-Job-ID"])[1].suffix == ".png"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_images_that_the_client_does_not_want_are_kept(every_webui, alone, kind, encoding):
    request = body(kind=kind, batch_size=2, send_images=False)
    headers = {"Accept-Encoding": encoding}
    answer = every_webui.post(request, kind, headers=headers)
    own = alone(every_webui).post(request, kind, headers=headers)
    assert answer.json()["images"] == own.json()["images"] == []
    named = f'"force_task_id":"{answer.headers["X-Job-ID"]}"'.encode()
    same = answer.content.lstrip(b" ").replace(named, b'"force_task_id":null')
    assert without_time(same) == without_time(own.content)
    assert answer.json()["parameters"]["send_images"] is False
    images = stored(every_webui, answer)["images"]
    assert images == every_webui.post(body(kind=kind, batch_size=2), kind).json()["images"]
    assert len(images) == 2


def test_parameters_and_info_of_a_request_with_everything(webui):
    request = body(
        'ünïcode "quotes" \\ 漢字 🎨\nsecond line',
        negative_prompt="ugly",
        cfg_scale=3.5,
        override_settings={"CLIP_stop_at_last_layers": 2},
        styles=["a", "b"],
        comments={"deep": {"nested": [1, 2.5, None, True]}},
        standin={"strings": ['"images": [']},
    )
    answer = webui.post(request)
    job = stored(webui, answer)
    assert job["prompt"] == request["prompt"]
    assert job["parameters"]["comments"] == request["comments"]
    assert job["images"] == answer.json()["images"]


def test_long_prompt(webui):
    prompt = "very " * 30_000 + "long"
    answer = webui.post(body(prompt))
    job = stored(webui, answer)
    assert job["parameters"]["prompt"] == prompt
    assert prompt.startswith(job["prompt"]) and len(job["prompt"]) >= 100_000


def test_request_without_a_prompt(webui):
    answer = webui.post({"steps": 1, "width": 64, "height": 64})
    assert stored(webui, answer)["prompt"] == ""


def answer_with(webui, coding, request):
    """The answer as it came, without a client that decodes it by itself."""
    http = webui.client.build_request("POST", "/sdapi/v1/txt2img", json=request)
    del http.headers["Accept-Encoding"]
    if coding is not None:
        http.headers["Accept-Encoding"] = coding
    response = webui.client.send(http, stream=True)
    try:
        return response.headers, b"".join(response.iter_raw())
    finally:
        response.close()


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate, gzip;q=0.5", "br;q=1, gzip; q=0.001", "x-gzip"])
def test_gzip_for_those_who_take_it(webui, coding):
    headers, data = answer_with(webui, coding, body())
    assert headers.get_list("Content-Encoding") == ["gzip"]
    decoded = json.loads(gzip.decompress(data))
    assert decoded["images"] == webui.job(headers["X-Job-ID"], wait=30)["images"]


@pytest.mark.parametrize("coding", [None, "", "identity", "deflate", "br"])
def test_no_gzip_for_others(webui, coding):
    headers, data = answer_with(webui, coding, body())
    assert "Content-Encoding" not in headers
    assert json.loads(data)["images"] == webui.job(headers["X-Job-ID"], wait=30)["images"]


@pytest.mark.parametrize("coding", ["gzip;q=0", "gzip; q=0.0, identity", "identity, gzip;q=0.000", "gzippy"])
def test_gzip_is_not_accepted(webui, alone, coding):
    """The webui's own layer looks for nothing but the word: then it is as without us."""
    headers, data = answer_with(webui, coding, body())
    own = alone(webui).post(body(), headers={"Accept-Encoding": coding})
    assert headers.get("Content-Encoding") in (None, own.headers.get("Content-Encoding"))
    if "Content-Encoding" in headers:
        data = gzip.decompress(data)
    assert json.loads(data)["images"] == webui.job(headers["X-Job-ID"], wait=30)["images"]


@pytest.mark.parametrize(
    "header, accepted",
    [
        ("gzip", True),
        ("GZip ; Q=1", True),
        ("br, x-gzip;q=0.001", True),
        ("gzip;q=0", False),
        ("gzip; q=0.0, identity", False),
        ("identity, gzip;q=0.000", False),
        ("gzippy, not gzip", False),
        ("", False),
    ],
)
def test_who_accepts_gzip(header, accepted):
    """As asked of us alone, for the webui's own layer packs whatever has the word."""
    scope = {"headers": [(b"accept-encoding", header.encode())]}
    assert load_script().accepts_gzip(scope) == accepted


def test_gzip_is_smaller(webui):
    request = body(width=512, height=512)
    _, plain = answer_with(webui, "identity", request)
    _, packed = answer_with(webui, "gzip", request)
    assert len(packed) < 0.8 * len(plain)


def test_nothing_but_images_and_their_answer_is_kept(webui):
    """No part of a file is left over."""
    job_id = webui.post(body(batch_size=2)).headers["X-Job-ID"]
    until(webui.is_idle)

    def mine() -> List[str]:
        return sorted(path.name for path in webui.images() if job_id in path.name)

    until(lambda: f"{job_id}.request.json" not in mine(), what="the request is gone")
    assert mine() == [f"{job_id}.json", f"{job_id}_0.png", f"{job_id}_1.png"]
    assert not [path for path in webui.images() if path.suffix == ".part"]
