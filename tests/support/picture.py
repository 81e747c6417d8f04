"""Makes the pictures of the tab that the README shows, `.github/tab*.png`, with the Python of an environment:

.venv/a1111-3.11/bin/python tests/support/picture.py
"""

import json
import sys
import tempfile
from pathlib import Path

import browser
from browser import MAIN, Page
from harness import PROJECT, Webui, started

OPENED = "layered mountains under a low sun, cut paper, soft grain"
ENDED = (  # prompt, seconds, address, and what else is asked for
    ("an old fishing harbour in fog, film photograph, muted colours", 0.8, "192.168.1.20", {}),
    (OPENED, 4.2, "192.168.1.34", {"n_iter": 4, "seed": 1618033988, "negative_prompt": "people, text, watermark"}),
    ("portrait of a clockmaker in his workshop, warm light, 85mm", 1.1, "192.168.1.34", {"fail": "OutOfMemoryError"}),
    ("terraced rice fields after rain, aerial view, soft light", 2.4, "192.168.1.20", {"n_iter": 2}),
    ("a paper lantern drifting over a still lake at night", 1.3, "192.168.1.51", {}),
)
PLAIN = "::-webkit-scrollbar { display: none }"
RUNS = "snow on pine trees, woodblock print, three colours"
UNENDED = (
    (RUNS, 40),
    ("desert observatory under the milky way, wide angle", 1),
    ("a walled garden in spring, watercolour", 1),
)


def take(page: Page, prompt: str, height: int, name: str) -> None:
    """A picture with the job open that has this prompt, once all of it is there."""
    page.resize(1400, height)
    page.add_style(PLAIN)
    page.until(lambda: len(page.rows()) == len(ENDED) + len(UNENDED), "all jobs are shown")
    page.open(next(row["id"] for row in page.rows() if row["prompt"] == prompt))
    images = f"[...document.querySelectorAll('{MAIN} img')]"
    page.until(
        lambda: page.run(
            f"return {images}.every((it) => it.naturalWidth) && {images}.some((it) => it.closest('aside'))"
        ),
        "the images are there",
        40,
    )
    target = PROJECT / ".github" / name
    page.picture(target)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def request(prompt, seconds, fail=None, **fields):
    wishes = {"seconds": seconds, "fail": fail, "fail_after": seconds, "message": "CUDA out of memory"}
    standin = {"args": [wishes if fail else {"seconds": seconds}]}
    return {"prompt": prompt, "steps": 20, "seed": 7, "alwayson_scripts": {"Stand-in": standin}, **fields}


def spread(webui: Webui) -> None:
    """As if the jobs had come from several machines, some minutes apart."""
    records = list(webui.records().values())
    for number, (record, (_, _, ip, _)) in enumerate(zip(records, ENDED)):
        # Not into the day before, whose folder has not their files.
        shift = min(97 * (len(records) - number) + 13 * number**2, record["timestamp"] % 86400)
        record["ip"] = ip
        for name in ("timestamp", "started", "finished"):
            record[name] -= shift
    lines = ",\n".join(f'"{record["id"]}": {json.dumps(record)}' for record in records)
    (webui.data / "jobs.json").write_text(f"{{\n{lines}\n}}\n")


def main() -> None:
    with started(lambda: Path(tempfile.mkdtemp(prefix="picture-"))) as start, browser.opened() as driver:
        webui = start("--api")
        for prompt, seconds, _, fields in ENDED:
            webui.job(webui.send(request(prompt, seconds, **fields)).job_id(), wait=60)
        webui.kill()
        spread(webui)
        webui.start()
        webui.client.post("/sdapi/v1/options", json={"show_progress_every_n_steps": 1})
        for prompt, seconds in UNENDED:
            webui.send(request(prompt, seconds)).job_id()
        page = Page(driver, webui)
        page.until(lambda: "Processing 3" in page.text(MAIN), "one is at 30 percent", 40)
        take(page, OPENED, 1160, "tab.png")
        page = Page(driver, webui, "dark")
        page.until(lambda: "Processing 6" in page.text(MAIN), "it is at 60 percent", 40)
        take(page, RUNS, 900, "tab-dark.png")


if __name__ == "__main__":
    sys.exit(main())
