"""What every part of the program shares."""

from modules.cmd_args import cmd_opts, parser  # noqa: F401
from modules.options import Options
from modules.shared_state import SDNextState, State

config_filename = cmd_opts.ui_settings_file
opts = Options(config_filename)
state = SDNextState() if cmd_opts.shape == "sdnext" else State()
demo = None  # the gradio.Blocks of the UI
api = None  # SD.Next's Api object
tab_names = []
