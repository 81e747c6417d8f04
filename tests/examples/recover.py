"""Generates images, and gets them however often the connection breaks after the answer's head.

The timeout of a minute is for silence: the webui sends a space every 15 seconds while it is busy. After about an hour
without the webui the program gives up, and says the ID: the job is kept.
"""

import base64
import time

import requests

API = "http://127.0.0.1:7860/sdapi/v1"


def generate(request):
    job_id = None
    try:
        response = requests.post(f"{API}/txt2img", json=request, stream=True, timeout=60)
        job_id = response.headers.get("X-Job-ID")
        response.raise_for_status()
        answer = dict(response.json())
        if job_id is None or "images" in answer:
            return answer
    except (requests.RequestException, ValueError, TypeError):  # broken, or no JSON: spaces alone, or a page of HTML
        if job_id is None:  # refused, not tracked, or broken before the head
            raise
    misses = 0  # attempts in a row that the webui did not answer
    while misses < 120:  # about an hour
        try:
            response = requests.get(f"{API}/job/{job_id}?wait=30", timeout=60)
            job = dict(response.json())
        except (requests.RequestException, ValueError, TypeError):  # the connection is still broken, or no JSON
            job = {}
        if job.get("status") == "Completed":
            return job
        if job.get("status") == "Failed":
            raise RuntimeError(job["error"])
        # The webui's own refusal has a reason. "Not Found" is what it says while it starts.
        if response.status_code in (401, 403, 404) and job.get("detail", "Not Found") != "Not Found":
            raise RuntimeError(f"job {job_id}: {job['detail']}")
        misses = 0 if "id" in job else misses + 1
        time.sleep(min(misses + 1, 30))
    raise RuntimeError(f"job {job_id}: the webui cannot be reached")


answer = generate({"prompt": "a lighthouse", "steps": 20, "batch_size": 2})
for number, image in enumerate(answer["images"]):
    with open(f"lighthouse-{number}.png", "wb") as file:
        file.write(base64.b64decode(image))
