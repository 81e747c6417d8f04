"""Generates images over a bad connection: none is lost, and none is generated twice.

    from retry import generate
    job = generate("http://127.0.0.1:7860", {"prompt": "a lighthouse", "steps": 20})
    open("lighthouse.png", "wb").write(base64.b64decode(job["images"][0]))
"""

import logging
import random
import time
import uuid

import requests
from requests.exceptions import ChunkedEncodingError, ContentDecodingError

BROKEN = (requests.ConnectionError, requests.Timeout, ChunkedEncodingError, ContentDecodingError)


def json_of(response):
    """The JSON object in a response. Empty for anything else: a gateway's HTML page, or white space alone."""
    try:
        data = response.json()
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def call(method, url, **options):
    """One request, again and again until the webui itself answers it."""
    attempt = doubtful = 0
    while True:
        attempt += 1
        wait = min(attempt, 30)
        try:
            response = requests.request(method, url, timeout=60, **options)
        except BROKEN as error:  # no connection, a broken one, or a minute of silence
            problem = error
        else:
            status, answer = response.status_code, json_of(response)
            if response.ok and ("id" in answer or "images" in answer):
                return answer
            problem = f"{method} {url}: {status} {response.text[:1000]}"
            # These say that another try may go well, whoever sends them. The rest is a refusal if the request is at
            # fault or the webui says why. Otherwise it may be a gateway, or a webui that is starting: "Not Found".
            if status not in (408, 425, 429) and status <= 500:
                doubtful += 1
                refused = status in (400, 401, 413, 422) or answer.get("detail", "Not Found") != "Not Found"
                if refused or doubtful == 30:
                    raise requests.HTTPError(problem, response=response)
            retry_after = response.headers.get("Retry-After", "")
            if retry_after.isdecimal():
                wait = max(wait, min(int(retry_after), 60))
        logging.getLogger(__name__).warning("Trying again in %d s: %s", wait, problem)
        time.sleep(wait * random.uniform(1, 1.5))


def generate(url, request, auth=None):
    # The key makes all attempts one generation; it is accepted at once, and we come back for the images.
    headers = {"Idempotency-Key": str(uuid.uuid4()), "Prefer": "respond-async"}
    job = call("POST", f"{url}/sdapi/v1/txt2img", json=request, headers=headers, auth=auth)
    if "id" not in job:
        raise RuntimeError("jobs are not tracked: this webui would generate anew with every attempt")
    while True:
        job = call("GET", f"{url}/sdapi/v1/job/{job['id']}?wait=20", auth=auth)
        if job["status"] == "Completed":
            return job
        if job["status"] == "Failed":
            raise RuntimeError(job["error"])
        time.sleep(1)  # in case something between answers for the webui at once
