"""Which extensions there are: those in the data folder and those named by flag."""

import os

from modules.cmd_args import cmd_opts
from modules.paths_internal import extensions_dir


def folders():
    found = []
    if os.path.isdir(extensions_dir):
        found = [os.path.join(extensions_dir, name) for name in sorted(os.listdir(extensions_dir))]
    return [folder for folder in found + cmd_opts.extension if os.path.isdir(folder)]
