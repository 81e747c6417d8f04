"""Loading the extensions' scripts, and the two scripts that the program brings itself."""

import os
import sys

from modules import errors, extensions, paths, script_callbacks, script_loading

ALWAYS_ON = "stand-in"  # see modules/standin.py
SELECTABLE = "repeat"  # args: how many times the batches are made

_current_basedir = paths.script_path


def basedir():
    """The folder of the extension whose script is being loaded."""
    return _current_basedir


def load_scripts():
    """Executes scripts/*.py of each extension, not its subfolders; what they registered before is forgotten."""
    global _current_basedir
    script_callbacks.clear_callbacks()
    search_path = sys.path
    for folder in extensions.folders():
        scripts = os.path.join(folder, "scripts")
        for name in sorted(os.listdir(scripts)) if os.path.isdir(scripts) else ():
            path = os.path.join(scripts, name)
            if os.path.splitext(name)[1].lower() != ".py" or not os.path.isfile(path):
                continue
            try:
                sys.path = [folder] + search_path
                _current_basedir = folder
                script_loading.load_module(path)
            except Exception:
                errors.report(f"Error loading script: {name}", exc_info=True)
            finally:
                sys.path = search_path
                _current_basedir = paths.script_path
