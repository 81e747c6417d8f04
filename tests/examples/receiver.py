"""Receives the ends of jobs, checks who sent them, and fetches their images.

pip install fastapi uvicorn requests standardwebhooks
WEBHOOK_SECRET=whsec_... uvicorn receiver:app --port 9000
"""

import os
from pathlib import Path

import requests
from fastapi import BackgroundTasks, FastAPI, Request, Response
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

WEBUI = "http://127.0.0.1:7860"
webhook = Webhook(os.environ["WEBHOOK_SECRET"])
seen = set()  # what was received since the start: what comes again after that is done again
app = FastAPI()


@app.post("/job-ended")
async def job_ended(request: Request, tasks: BackgroundTasks):
    try:
        event = webhook.verify(await request.body(), dict(request.headers))
    except (WebhookVerificationError, ValueError):
        return Response(status_code=401)
    if request.headers["webhook-id"] not in seen:
        seen.add(request.headers["webhook-id"])
        tasks.add_task(handle, event["data"])  # when the answer is out
    return Response(status_code=204)


def handle(job):
    print(job["id"], job["status"], job["label"], job["error"], flush=True)
    for number, url in enumerate(job["image_urls"]):
        if url.startswith("/"):
            url = WEBUI + url
        image = requests.get(url, timeout=60)  # auth=("user", "password")
        image.raise_for_status()
        ending = image.headers["Content-Type"].rpartition("/")[2]
        Path(f"{job['id']}-{number}.{ending}").write_bytes(image.content)
