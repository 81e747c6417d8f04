"""The webui runs this file at each launch, in a process of its own, for what an extension has to install.

Job Tracker needs nothing that the webui does not ship, unless its jobs or images are to be shared by many webuis: then
the webui's own pip installs what speaks to the database and to the bucket. Some launches do not come here, as those
with --skip-install and most of SD.Next, so the extension itself says what is missing, too.

The files config.json, jobs.json and images/ are made by the extension itself.
"""

import importlib
import os
import sys

DRIVERS = (  # the variable that asks for it, its module, what pip installs, the Python that it needs
    ("TRACKER_STORE", "psycopg", "psycopg[binary]>=3.2", (3, 8)),
    ("TRACKER_IMAGES", "obstore", "obstore", (3, 9)),
)


def is_installed(module):
    importlib.invalidate_caches()
    try:
        importlib.import_module(module)
    except ImportError:  # as that of psycopg is without its binary part
        return False
    return True


def install(variable, module, requirement):
    """Returns why it is not there, if it is not. Raises nothing: the webui is to start all the same."""
    try:
        import launch

        launch.run_pip(f'install "{requirement}"', f"{module} for Job Tracker, as {variable} is set")
    except (Exception, SystemExit) as error:  # whatever a fork has in the place of what we know
        lines = str(error).split("\n")
        return lines[0].strip() or type(error).__name__
    return "" if is_installed(module) else "the webui installed nothing"


def main():
    for variable, module, requirement, version in DRIVERS:
        if not os.environ.get(variable, "").strip() or is_installed(module):
            continue
        if sys.version_info < version:
            needed = ".".join(map(str, version))
            print(f"[Job Tracker] {variable} is set, but {module} needs Python {needed}: use a webui that runs on it")
            continue
        reason = install(variable, module, requirement)
        if reason:
            command = f'"{sys.executable}" -m pip install "{requirement}"'
            print(f"[Job Tracker] {variable} needs {module} ({reason}). To install it: {command}")


main()
