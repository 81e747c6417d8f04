"""Executing one script. The module is named after its file and never enters sys.modules."""

import contextlib
import importlib.util
import io
import os

from modules.cmd_args import cmd_opts

loaded_scripts = {}


def load_module(path):
    spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
    module = importlib.util.module_from_spec(spec)
    if cmd_opts.shape == "sdnext":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            spec.loader.exec_module(module)
        for line in filter(None, printed.getvalue().splitlines()):
            print(f"Extension: script='{os.path.relpath(path)}' {line.strip()}")
    else:
        spec.loader.exec_module(module)
    loaded_scripts[path] = module
    return module
