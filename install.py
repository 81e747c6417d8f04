"""Makes the files that Job Tracker keeps, so that they are there before the webui starts. Needs nothing but Python.

The extension makes them by itself as well, for a webui that starts with --skip-install.
"""

import json
import os

FOLDER = os.path.dirname(os.path.abspath(__file__))
DATA_FOLDER = os.path.abspath(os.environ.get("TRACKER_DATA_DIR", "").strip() or FOLDER)


def make(path, text):
    """A new file. One that is there already is the user's and stays as it is."""
    try:
        with open(path, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        pass


try:
    os.makedirs(os.path.join(DATA_FOLDER, "images"), exist_ok=True)
    make(os.path.join(DATA_FOLDER, "jobs.json"), "{\n}\n")
    make(os.path.join(FOLDER, "config.json"), json.dumps({"enabled": False, "retention_days": 30}, indent=4) + "\n")
except OSError as error:
    print(f"Job Tracker: {error}. The extension will try again when the webui runs.")
