"""Everything that can be wrong with a command, found before anything is written and before the first job starts."""

from charlm.preflight.command import check_command, check_launcher, is_sweep, options
from charlm.preflight.folder import held, own_folder
from charlm.preflight.runs import RUN_DIR, check_runs, resolved

__all__ = [
    "RUN_DIR",
    "check_command",
    "check_launcher",
    "check_runs",
    "held",
    "is_sweep",
    "options",
    "own_folder",
    "resolved",
]
