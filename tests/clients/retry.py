"""Generates images over a bad connection: none is lost, and none is generated twice.

    from retry import generate
    job = generate("http://127.0.0.1:7860", {"prompt": "a lighthouse", "steps": 20})
    open("lighthouse.png", "wb").write(base64.b64decode(job["images"][0]))
"""

import time
import uuid

import requests


def call(method, url, **options):
    """One request, again and again until it is answered."""
    while True:
        try:
            response = requests.request(method, url, timeout=60, **options)
            if response.status_code not in (502, 503, 504):  # a proxy's word, not the webui's
                response.raise_for_status()
                return response.json()
        except requests.HTTPError:  # refused
            raise
        except requests.RequestException:  # no connection, or it broke
            pass
        time.sleep(1)


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
