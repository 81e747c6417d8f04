"""Where things lie."""

import os

from modules.cmd_args import cmd_opts

script_path = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
modules_path = os.path.join(script_path, "modules")
data_path = cmd_opts.data_dir
extensions_dir = os.path.join(data_path, "extensions")
extensions_builtin_dir = os.path.join(script_path, "extensions-builtin")
