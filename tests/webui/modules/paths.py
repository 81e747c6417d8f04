"""The name under which extensions look for `paths_internal`."""

from modules.paths_internal import (  # noqa: F401
    data_path,
    extensions_builtin_dir,
    extensions_dir,
    modules_path,
    script_path,
)
